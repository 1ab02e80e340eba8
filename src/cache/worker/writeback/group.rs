//! A round in `grouped` order: several epochs at once, by way of the redo area (`../../redo.rs`).
//!
//! What comes between the steps 2 and 5 of a round, and what breaks if two are swapped:
//! 1. *journal*: the payload goes to the area, in address order and large writes; then the table;
//! 2. flush the area: a header that counts must find everything it needs;
//! 3. *commit*: the header that says so, and a flush. Before it the group may be given up at any time,
//!    after it never;
//! 4. write the group to the disk, from the cache, and flush the disk (steps 3 and 4 of a round);
//! 5. *void*: the header that says idle, and a flush: before the tail moves, and before anything else
//!    is written to the disk. Where the next group lies in the area already its *commit* stands in for
//!    that (`ahead.rs`).
//!
//! Laws:
//! - Groups never go back: what is on the disk beyond the tail is left out of the next one, also when
//!   the tail could not be moved, and after a restart, for the area says how far the disk is. Older
//!   versions of some sectors beside newer ones of others would be no moment of the guest's.
//! - A group ends at the end of an epoch, or, where an epoch does not fit the area, between two
//!   versions of it: everything before a version in the order of (epoch, version) is closed under "had
//!   completed before that one began", as an epoch is. Such a part does not move the tail.
//! - A failure before step 3 gives the group up. One in step 3 leaves it unknown whether it is
//!   committed: nothing of it is on the disk, so it is voided, over the same copy of the header, before
//!   anything else. After step 3 the group is applied until that succeeds, from the area, since what
//!   the cache has of it may change or rot meanwhile.
//! - The plan is kept as long as the group: what is marked clean at the end is what was applied.
//! - In a consistency group step 3 ends when the areas of all who take part say so (`together.rs`).

use super::super::super::counters::add;
use super::super::super::env::{Clock, Env};
use super::super::super::health::Failure;
use super::super::super::index::{Extent, ExtentMap};
use super::super::super::plan::{Consumed, Plan};
use super::super::super::queue::Reader;
use super::super::super::redo::Redo;
use super::super::super::replay::{Replay, ReplayError};
use super::super::super::scan::WalkError;
use super::super::super::stripes::lock;
use super::super::Progress;
use super::damage::Damage;
use super::share::{Behind, Gathered, Share};
use super::{Phase, Round, Writeback, cut};
use crate::backing::{AlignedBuf, Backing, Channel, Completion, Op};
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{Key, RedoEntry, RedoHeader};
use crate::sync::atomic::Ordering;
use crate::wake::Waker;

/// Writes to the area in flight, each of [`STAGE`] bytes at most.
pub(super) const DEPTH: u32 = 8;
pub(super) const STAGE: usize = 1 << 20;

/// Where a group is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Payload is being copied to the area.
    Journal,
    /// The table is.
    Table,
    /// It is there, and samples are read: to be flushed.
    Body,
    /// It is flushed: the header follows.
    Commit,
    /// The header is written: to be flushed.
    FlushCommit,
    /// The header is durable.
    Committed,
    /// It is, and those of the other volumes that take part may not be.
    Await,
    /// The group is applied from the area.
    Replay,
    /// It is on the disk, and the next one is on its way to the area.
    Follow,
    /// The header that commits the next one is written: to be flushed.
    FlushFollower,
    /// It is durable.
    Followed,
    /// The area is to be voided.
    Void,
    /// The header that does so is written: to be flushed.
    FlushVoid,
    /// It is durable.
    Voided,
}

/// How far a group has gone that a failed round has left behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fate {
    /// Nothing of it counts.
    Open,
    /// It may be committed; nothing of it is on the disk.
    Unknown,
    /// It is as an earlier life has left it, and counts if the areas of others say so.
    Undecided,
    /// It is committed.
    Committed,
    /// It is on the disk, flushed, and may still say that it is committed.
    Applied,
}

/// A group under way.
pub(super) struct Group {
    pub(super) fate: Fate,
    pub(super) entries: Vec<RedoEntry>,
    /// Of each entry's payload the CRC of its first sector.
    pub(super) firsts: Vec<u32>,
    /// Sectors to be journaled, and journaled so far.
    pub(super) sectors: u64,
    pub(super) journaled: u64,
    /// The table, and how much of it is on its way.
    pub(super) table: Vec<u8>,
    pub(super) sent: usize,
    /// What goes to the area next, how much of it is filled, and where it will go.
    pub(super) stage: Option<AlignedBuf>,
    pub(super) fill: usize,
    pub(super) at: u64,
    /// The half of the area that it lies in; `None` for all of it.
    pub(super) half: Option<u64>,
    /// Whether more waits behind it, and nobody has looked at that yet.
    pub(super) has_rest: bool,
    /// Bytes of the records that it covers.
    pub(super) covers: u64,
    /// When it was closed.
    pub(super) time_ms: u64,
    /// The version at which it ends inside an epoch.
    pub(super) part: Option<(u64, u64)>,
    /// The tail it leads to, and what of it is lost: for rounds that finish it.
    pub(super) epoch: u64,
    pub(super) damage: Damage,
    pub(super) samples: Vec<crate::onmedia::RedoSample>,
    /// The header that is being made durable.
    pub(super) header: Option<RedoHeader>,
    pub(super) replay: Option<Replay>,
    /// What makes it one of several.
    pub(super) joint: Option<super::together::JointPart>,
    /// Whether an earlier life has written it.
    pub(super) is_restored: bool,
}

/// How far beyond the tail the disk is.
#[derive(Default)]
pub(super) struct Parts {
    /// Everything up to this (epoch, version) is there.
    pub(super) upto: Option<(u64, u64)>,
    /// What of it is not, for it is lost.
    pub(super) damage: Damage,
    /// Whether an earlier life has written it, and nobody knows what was lost of it.
    is_restored: bool,
}

impl Parts {
    /// What an earlier life has left.
    pub(super) fn begin_at(&mut self, upto: Option<(u64, u64)>) {
        *self = Self { upto, is_restored: upto.is_some(), ..Self::default() };
    }
}

impl<E: Env> Writeback<E> {
    /// The epoch, above `tail`, to the end of which the disk is written.
    pub(super) fn written_beyond(&self, tail: u64) -> Option<u64> {
        self.parts.upto.filter(|(epoch, version)| *epoch > tail && *version == u64::MAX).map(|(e, _)| e)
    }

    pub(super) fn redo(&self) -> &Redo<E::Backing> {
        self.volume.redo.as_deref().expect("a volume in grouped order has a redo area")
    }

    /// Takes as many closed epochs as there is room for.
    pub(super) fn gather_grouped(&mut self, plan: &mut Plan) -> Result<Option<Round>, WalkError> {
        if self.is_joint() {
            return self.gather_joint(plan);
        }
        self.volume.core.raise_epoch();
        // Before the look: what is committed after it belongs to an epoch above this one.
        let closed = self.volume.core.closed_epoch();
        self.gather_upto(plan, closed)
    }

    /// Takes as many epochs, up to `closed`, as there is room for.
    pub(super) fn gather_upto(&mut self, plan: &mut Plan, closed: u64) -> Result<Option<Round>, WalkError> {
        let tail = self.volume.core.tail.load(Ordering::SeqCst);
        let behind = Behind { upto: self.parts.upto, tail, half: None };
        let Some(gathered) = self.gather_behind(plan, &behind, closed)? else { return Ok(None) };
        let Gathered { epoch, group, bytes, covers } = gathered;
        self.volume.begin_pace(bytes, Some(covers), !plan.todo.is_empty());
        // Kept until another group has ended: this one may be given up.
        let round = Round { damage: self.parts.damage.clone(), ..Round::empty(epoch) };
        if !group.as_ref().is_some_and(|g| g.part.is_none() && mutated(Mutant::GroupNotJournaled)) {
            self.group = group;
        }
        Ok(Some(round))
    }

    /// What comes behind the last group in the order of (epoch, version), up to `closed`.
    pub(super) fn gather_behind(
        &mut self,
        plan: &mut Plan,
        behind: &Behind,
        closed: u64,
    ) -> Result<Option<Gathered>, WalkError> {
        let core = self.volume.core.clone();
        let is_first = behind.half.is_none();
        let mut dirty = lock(&core.dirty);
        match self.lowest_epoch(&mut dirty)? {
            Some(epoch) if epoch <= closed => {}
            None if closed > behind.tail && is_first => return Ok(Some(Gathered::nothing(closed))),
            _ => return Ok(None),
        }
        let mut keys = Vec::new();
        for ((_, id), cursor) in dirty.known.range(..=(closed, u32::MAX)) {
            self.consume(*id, cursor.clone(), closed, &mut keys)?;
        }
        self.order(&mut keys);
        let done = keys.partition_point(|(k, _)| Some((k.epoch, k.version)) <= behind.upto);
        let mut there = ExtentMap::new();
        for (key, id) in keys.drain(..done).filter(|(k, _)| k.epoch > behind.tail) {
            let place = self.volume.cache.media.place(id, &key, true);
            there.insert(Extent { range: key.range(), place }, &mut Vec::new());
        }
        plan.earlier.extend(there.iter());
        let Some(Share { mut newest, mut fit, room, half }) = self.share(&keys, behind.half) else {
            return Ok(None);
        };
        let has_rest = fit < keys.len();
        let mut epoch = closed;
        let mut part = None;
        if let Some((key, _)) = keys.get(fit) {
            assert!(!self.is_joint(), "the target of a joint round fits every area");
            epoch = key.epoch - 1;
            if epoch > behind.tail && keys.first().is_some_and(|(k, _)| k.epoch <= epoch) {
                fit = keys.partition_point(|(k, _)| k.epoch <= epoch);
                newest = self.newest_of(&keys[..fit]);
            } else {
                // There is room for any key: at least one fits.
                part = keys[..fit].last().map(|(k, _)| (k.epoch, k.version));
                epoch = behind.tail;
            }
        }
        if part.is_none() {
            for ((_, id), cursor) in dirty.known.range(..=(epoch, u32::MAX)) {
                let (cursor, next) = self.consume(*id, cursor.clone(), epoch, &mut Vec::new())?;
                let generation = self.volume.cache.segments[*id as usize].generation.load(Ordering::Relaxed);
                plan.cursors.push(Consumed { id: *id, generation, cursor, next });
            }
        }
        drop(dirty);
        newest.iter().for_each(|extent| cut(extent, &mut plan.todo));
        let payload = |k: &Key| if k.kind.has_payload() { k.range().len * 512 } else { 0 };
        let covers: u64 = keys[..fit].iter().map(|(k, _)| payload(k)).sum();
        let sectors: u64 = plan.todo.iter().filter(|e| !e.place.zero).map(|e| e.range.len).sum();
        let time_ms = self.volume.cache.clock.unix_ms();
        let group =
            Group { sectors, half, has_rest, covers, part, epoch, ..Group::of(Vec::new(), room.at, time_ms) };
        let group = Some(group).filter(|_| !plan.todo.is_empty());
        Ok(Some(Gathered { epoch, group, bytes: sectors * 512, covers }))
    }

    /// Finds out what is lost of what an earlier life has written: damaged payload was left out of its
    /// groups. Only what nothing newer replaces on the disk is.
    pub(super) fn check_restored(&mut self, plan: &Plan, damage: &mut Damage) -> Result<(), Failure> {
        // Before anything is taken off the plan. What was damaged in an earlier group may be newer here.
        damage.heal(plan);
        if !self.parts.is_restored {
            return Ok(());
        }
        for extent in &plan.earlier {
            for part in self.volume.cache.checked_parts(*extent) {
                if let Err(error) = self.volume.cache.copy_extent(&part, Reader::Worker, true, |_, _| Ok(()))
                {
                    self.note_damage(damage, part, &error)?;
                }
            }
        }
        damage.heal(plan);
        Ok(())
    }

    /// Whether a group waits to be finished or given up before any other round.
    pub(super) fn owes_group(&self) -> bool {
        self.group.is_some()
    }

    /// Whether the next part of an epoch is to follow at once.
    pub(super) fn owes_part(&self) -> bool {
        self.parts.upto.is_some()
    }

    /// Forgets how far an epoch in parts is: another order begins.
    pub(super) fn forget_parts(&mut self) {
        self.parts = Parts::default();
    }

    /// How far beyond the tail an earlier life has left the disk.
    pub(super) fn remember_parts(&mut self) {
        self.restore_joint();
        let (Some(redo), core) = (&self.volume.redo, &self.volume.core) else { return };
        if self.group.is_some() {
            return;
        }
        let header = redo.header();
        let is_own =
            header.incarnation == core.incarnation && header.cache_uuid == self.volume.cache.media.uuid;
        let tail = core.tail.load(Ordering::SeqCst);
        // A part may also be found beyond a tail that had not followed the group before it yet.
        let upto = match is_own && !mutated(Mutant::PartsForgotten) {
            true if header.epoch >= tail && header.is_part => Some((header.part_epoch, header.part_version)),
            true if header.epoch > tail => Some((header.epoch, u64::MAX)),
            _ => None,
        };
        self.parts.begin_at(upto);
    }

    /// Whether the group is being written to the disk, or has been.
    pub(super) fn applies_group(&self) -> bool {
        self.group.as_ref().is_some_and(|g| matches!(g.fate, Fate::Committed | Fate::Applied))
    }

    /// Goes on with what a failed round has left.
    pub(super) fn resume_group(&mut self) -> Progress {
        if let Err(failure) = self.open_redo() {
            return self.fail(failure);
        }
        let block = self.redo().block;
        if self.group.as_ref().is_some_and(|group| group.fate == Fate::Undecided) {
            let Some(fate) = self.judge_restored() else { return Progress::Idle };
            if let Err(failure) = self.open_channel() {
                return self.fail(failure);
            }
            self.group.as_mut().expect("it is still there").fate = fate;
        }
        let group = self.group.as_mut().expect("the caller looked");
        let round = Round { damage: group.damage.clone(), ..Round::empty(group.epoch) };
        let step = match group.fate {
            Fate::Open | Fate::Unknown | Fate::Undecided | Fate::Applied => Step::Void,
            Fate::Committed => {
                let bytes = group.sectors * 512;
                group.replay = Some(Replay::new(group.entries.clone(), block));
                self.volume.begin_pace(bytes, Some(bytes), false);
                Step::Replay
            }
        };
        self.phase = Phase::Group(round, step);
        Progress::Did
    }

    /// What a failed round leaves of its group and its plan.
    pub(super) fn keep_group(&mut self, plan: &mut Plan) {
        self.keep_next(plan);
        match self.group.as_ref().map(|g| g.fate) {
            Some(Fate::Committed | Fate::Applied) => {
                // All of it will be on the disk, whatever of it is now.
                let rest = plan.todo.drain(..);
                plan.written.extend(rest);
                plan.written.sort_unstable_by_key(|e| e.range.start);
            }
            Some(Fate::Unknown | Fate::Undecided) => plan.clear(),
            Some(Fate::Open) | None => {
                self.group = None;
                plan.clear();
            }
        }
    }

    pub(super) fn open_redo(&mut self) -> Result<(), Failure> {
        if self.redo_channel.is_none() {
            let channel = self.redo().disk.channel(&Waker::default(), DEPTH.max(32));
            self.redo_channel = Some(channel.map_err(|error| Failure::resources(&error))?);
        }
        Ok(())
    }

    /// Operations with the area.
    pub(super) fn redo_in_flight(&self) -> usize {
        self.redo_channel.as_ref().map_or(0, Channel::in_flight)
    }

    pub(super) fn redo_submit(&mut self, op: Op) {
        let channel = self.redo_channel.as_mut().expect("opened before the group");
        assert!(channel.submit(0, op).is_ok(), "fewer than the depth are in flight");
        channel.kick();
    }

    /// Takes completions of the area.
    pub(super) fn redo_reap(&mut self) -> Result<(), Failure> {
        let mut done: Vec<Completion> = Vec::new();
        if let Some(channel) = &mut self.redo_channel {
            channel.reap(&mut done);
        }
        let mut result = Ok(());
        for Completion { op, result: ended, .. } in done {
            if let (Err(error), Ok(())) = (&ended, &result) {
                result = Err(Failure::applying(format!("the redo area failed: {error}")));
            }
            if let Op::Write { buf, .. } = op
                && buf.capacity() == STAGE
                && self.spare_stages.len() < DEPTH as usize
            {
                self.spare_stages.push(buf);
            }
        }
        result
    }

    /// One step of a group.
    pub(super) fn step_group(&mut self, round: Round, step: Step) -> Progress {
        match step {
            Step::Replay => return self.replay(round),
            Step::Follow => return self.follow(round),
            _ => {}
        }
        if let Err(failure) = self.redo_reap().and_then(|()| self.reap()) {
            return self.abort(failure);
        }
        if let Err(failure) = self.open_redo() {
            return self.abort(failure);
        }
        match step {
            Step::Journal => return self.journal(round),
            Step::Table => return self.write_table(round),
            _ => {}
        }
        let in_flight = self.redo_in_flight() + self.channel.as_ref().map_or(0, Channel::in_flight);
        if in_flight > 0 {
            self.phase = Phase::Group(round, step);
            return Progress::Waiting;
        }
        match step {
            Step::Journal | Step::Table | Step::Replay | Step::Follow => unreachable!("handled above"),
            Step::FlushFollower if mutated(Mutant::NextUnflushed) => self.followed(round),
            Step::FlushFollower => self.send(round, Op::Flush, Step::Followed),
            Step::Followed => self.followed(round),
            Step::Body => {
                self.take_samples();
                if mutated(Mutant::GroupBodyUnflushed) {
                    return self.commit(round);
                }
                self.send(round, Op::Flush, Step::Commit)
            }
            Step::Commit if self.is_given_up() => self.give_up_part(),
            Step::Commit => self.commit(round),
            Step::FlushCommit if mutated(Mutant::GroupAppliedUncommitted) => self.committed(round),
            Step::FlushCommit => self.send(round, Op::Flush, Step::Committed),
            Step::Committed if self.is_joint_part() => self.commit_joint(round),
            Step::Committed => self.committed(round),
            Step::Await => self.await_verdict(round),
            Step::Void => {
                let is_applied = self.applies_group();
                let (header, op) = match self.redo().is_committed() && !is_applied {
                    // As an earlier life has left it.
                    true => self.redo().discard(),
                    false => self.redo().void(),
                };
                self.group.as_mut().expect("a group is under way").header = Some(header);
                self.send(round, op, Step::FlushVoid)
            }
            Step::FlushVoid => self.send(round, Op::Flush, Step::Voided),
            Step::Voided => self.voided(round),
        }
    }

    pub(super) fn send(&mut self, round: Round, op: Op, next: Step) -> Progress {
        self.redo_submit(op);
        self.phase = Phase::Group(round, next);
        Progress::Waiting
    }

    fn commit(&mut self, round: Round) -> Progress {
        let group = self.group.as_mut().expect("a group is under way");
        group.fate = Fate::Unknown;
        group.damage = round.damage.clone();
        let mut header = group.header.take().expect("made with the journal");
        header.samples = std::mem::take(&mut group.samples);
        // The disk may have grown since the area was claimed.
        header.backing_size = self.volume.backing.geometry().size;
        let redo = self.volume.redo.clone().expect("a volume in grouped order has a redo area");
        let (header, op) = redo.update(|h| *h = RedoHeader { sequence: h.sequence, ..header });
        self.group.as_mut().expect("it is still there").header = Some(header);
        self.send(round, op, Step::FlushCommit)
    }

    /// The group is durable in the area: on to the disk.
    pub(super) fn committed(&mut self, round: Round) -> Progress {
        let header = self.group.as_mut().and_then(|g| g.header.take()).expect("it was being committed");
        self.redo().note(header);
        self.group.as_mut().expect("it is still there").fate = Fate::Committed;
        let mut plan = lock(&self.volume.core.plan);
        let written = std::mem::take(&mut plan.written);
        plan.todo.extend(written);
        drop(plan);
        let now_us = self.volume.cache.clock.now_us();
        self.volume.core.pacer.journal_ended(now_us);
        if mutated(Mutant::GroupVoidedEarly) {
            let (header, op) = self.redo().void();
            self.redo().note(header);
            self.redo_submit(op);
            self.redo_submit(Op::Flush);
        }
        self.phase = Phase::Writing(round);
        Progress::Did
    }

    fn replay(&mut self, round: Round) -> Progress {
        let channel = self.channel.as_mut().expect("opened before the round");
        let redo = self.redo_channel.as_mut().expect("opened before the group");
        let group = self.group.as_mut().expect("a group is under way");
        let failure = match group.replay.as_mut().expect("begun").step(redo, channel) {
            Ok(false) => {
                self.phase = Phase::Group(round, Step::Replay);
                return Progress::Waiting;
            }
            Ok(true) => {
                group.replay = None;
                self.submit(Op::Flush);
                self.channel.as_mut().expect("opened before the round").kick();
                self.phase = Phase::Flushing(round);
                return Progress::Waiting;
            }
            Err(ReplayError::Redo(error)) => Failure::applying(format!("the redo area failed: {error}")),
            Err(ReplayError::Disk(error)) => Failure::applying(format!("the disk failed: {error}")),
            Err(ReplayError::Damaged(range)) => {
                Failure::applying(format!("what the redo area holds for {range} is damaged"))
            }
        };
        self.abort(failure)
    }

    /// The group is on the disk, flushed: says so in the area.
    pub(super) fn applied(&mut self, round: Round) -> Progress {
        if mutated(Mutant::GroupNotVoided) {
            self.group = None;
            return self.flushed_ungrouped(round);
        }
        self.group.as_mut().expect("a group is under way").fate = Fate::Applied;
        self.phase = Phase::Group(round, Step::Follow);
        Progress::Did
    }

    /// The area is idle.
    fn voided(&mut self, round: Round) -> Progress {
        let mut group = self.group.take().expect("a group is under way");
        self.redo().note(group.header.take().expect("it was being voided"));
        if group.joint.is_some() {
            self.end_part();
        }
        if group.fate == Fate::Unknown {
            // It went over the copy that may have said *committed*: the other one is older.
            self.phase = Phase::Idle;
            return Progress::Did;
        }
        self.group_ended(round, &group)
    }

    /// A group is on the disk, and the area says so, or that it holds the next one.
    pub(super) fn group_ended(&mut self, mut round: Round, group: &Group) -> Progress {
        add(&self.volume.core.tally.groups, 1);
        match group.part {
            None => {
                let upto = Some((group.epoch, u64::MAX));
                self.parts = Parts { upto, damage: round.damage.clone(), is_restored: false };
                self.flushed_ungrouped(round)
            }
            Some(upto) => {
                let damage = std::mem::take(&mut round.damage);
                self.parts = Parts { upto: Some(upto), damage, is_restored: group.is_restored };
                lock(&self.volume.core.plan).advance();
                self.volume.core.pacer.end_round(true);
                self.recovered();
                self.go_on()
            }
        }
    }
}
