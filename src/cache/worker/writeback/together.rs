//! Write-back of a consistency group: none of its disks goes ahead of another (`../../consistency.rs`).
//!
//! *strict*: a member begins epoch *e* when every other has all of *e* − 1 on its disk, flushed. Who has
//! nothing of it counts at once. So with the cache lost at any instant the disks together are everything
//! up to some epoch, and any part of the next.
//!
//! *grouped*: the members go through a round together, each by way of its own redo area:
//! 1. *bid*: each says how far from the tail on its area has room; the least of these is the target;
//! 2. *write*: who has anything up to it journals its part, and commits it: a header that names the
//!    group, the target, and all who take part;
//! 3. *decide*: when all of these headers are durable the round counts; before it does, nothing of it
//!    is on any disk, and any member may give it up for all;
//! 4. *apply* and *void*, each for itself: a void header that names the target says as much as a
//!    committed one.
//!
//! Laws:
//! - Whoever finds the areas, with the cache or without, comes to the same verdict: the round counts if
//!   and only if the area of everybody who takes part names its target, or a later one. An area that is
//!   given up goes back to the target before.
//! - A member takes part in no other round before it has applied, voided, or given up its part.
//! - Who has left the group meanwhile has applied what its area held, for its own sake: it counts as one
//!   that names the target. So leaving never takes back what may be on a disk.
//! - Every epoch fits every area ([`Volume::epoch_share`]): a round always has a target, and no group of
//!   epochs ends inside one, for versions of two volumes have no common order.
//! - A worker that ends gives up what is not decided. What is decided it leaves committed.
//! - Nobody waits with a lock held. A member waits for another's disk only to write back, and says so.
//!
//! [`Volume::epoch_share`]: super::super::super::volume::Volume::epoch_share

use super::super::super::consistency::ConsistencyGroup;
use super::super::super::env::{Clock, Env};
use super::super::super::health::Failure;
use super::super::super::plan::Plan;
use super::super::super::scan::WalkError;
use super::super::super::stripes::lock;
use super::super::super::volume::{Order, VolumeCore};
use super::super::Progress;
use super::damage::Damage;
use super::group::{Fate, Group, Step};
use super::joint::{Joint, Wish};
use super::{Phase, Round, Writeback};
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{Key, RedoEntry, RedoHeader, Uuid};
use crate::sync::atomic::Ordering;

/// Of a group under way, what makes it one of several.
pub(super) struct JointPart {
    uuid: Uuid,
    /// How far the disk was before it.
    base: u64,
    members: Vec<Uuid>,
}

/// Whether the round counts that the area of `core` names, as far as is known: see the module's head.
pub(crate) fn verdict(core: &VolumeCore, header: &RedoHeader) -> Option<bool> {
    let Some(group) = core.group().filter(|group| group.uuid == header.group_uuid) else {
        return Some(true);
    };
    if mutated(Mutant::JointPartBelieved) {
        return Some(true);
    }
    let fellows = group.fellows(core);
    let mut all = Some(true);
    for uuid in &header.members {
        let Some(fellow) = fellows.iter().find(|fellow| fellow.uuid == *uuid) else { continue };
        let is_there = fellow.tail.load(Ordering::SeqCst) >= header.epoch;
        match *lock(&fellow.area) {
            _ if is_there => {}
            Some(epoch) if epoch >= header.epoch => {}
            Some(_) => return Some(false),
            None => all = None,
        }
    }
    all
}

impl<E: Env> Writeback<E> {
    fn me(&self) -> u64 {
        self.volume.core.incarnation
    }

    /// Whether rounds are those of a group.
    pub(super) fn is_joint(&self) -> bool {
        self.volume.core.group().is_some() && self.round_order() == Order::Grouped
    }

    /// Runs `f` on the group's round, and wakes the others if this changed what is asked of them.
    fn joint<T>(&self, f: impl FnOnce(&mut Joint) -> T) -> Option<T> {
        let group = self.volume.core.group()?;
        let mut joint = lock(&group.joint);
        let before = joint.progress();
        let result = f(&mut joint);
        let is_changed = joint.progress() != before;
        drop(joint);
        if is_changed {
            group.wake();
        }
        Some(result)
    }

    /// Whether the others wait for this member, whatever its own clock says.
    pub(super) fn is_called(&self) -> bool {
        let core = &self.volume.core;
        let Some(group) = core.group() else { return false };
        core.owes(group.called.load(Ordering::SeqCst)) || lock(&group.joint).wish(self.me()) != Wish::Nothing
    }

    /// Notes who is waited for, for whoever looks at the volume's state. A round that is begun, or given
    /// up, ends no waiting: one whose disk fails bids in every one of them. What ends it is a decision.
    fn awaits(&self, fellow: Option<&VolumeCore>) {
        let now_ms = self.volume.cache.clock.now_ms();
        let mut awaited = lock(&self.volume.core.awaited);
        *awaited = fellow.map(|fellow| {
            let since = awaited.as_ref().map_or(now_ms, |(_, since)| *since);
            (fellow.incarnation, since)
        });
    }

    /// Whether epoch `epoch`, the lowest that this member has dirty, and closed, may go to its disk:
    /// whether all the others have what is older.
    pub(in super::super) fn may_write(&self, epoch: u64) -> bool {
        let core = &self.volume.core;
        core.settled.fetch_max(epoch - 1, Ordering::SeqCst);
        if epoch > self.epoch_bound() {
            return false;
        }
        let Some(group) = core.group() else { return true };
        if mutated(Mutant::MemberGoesAhead) {
            return true;
        }
        let fellows = group.fellows(core);
        let behind = fellows.iter().find(|fellow| fellow.owes(epoch - 1));
        self.awaits(behind.map(|fellow| &**fellow));
        if behind.is_some() && group.called.fetch_max(epoch - 1, Ordering::SeqCst) < epoch - 1 {
            group.wake();
        }
        behind.is_none()
    }

    /// Nothing of this member's up to `epoch`, which is closed, is missing on its disk.
    pub(in super::super) fn note_settled(&self, epoch: u64) {
        let core = &self.volume.core;
        if core.settled.fetch_max(epoch, Ordering::SeqCst) < epoch
            && let Some(group) = core.group()
        {
            group.wake();
        }
    }

    /// A member that is clean has nothing to say but that.
    pub(super) fn answer_clean(&self) {
        *lock(&self.volume.core.awaited) = None;
        let me = self.me();
        self.joint(|joint| {
            if let Wish::Bid(_) = joint.wish(me) {
                joint.bid(me, u64::MAX, u64::MAX);
            }
        });
    }

    /// Goes on with the round that the group is in, or begins one.
    pub(super) fn gather_joint(&mut self, plan: &mut Plan) -> Result<Option<Round>, WalkError> {
        let core = self.volume.core.clone();
        if let Some(epoch) = self.written_beyond(core.tail.load(Ordering::SeqCst)) {
            // The disk has it: only the tail follows.
            return self.gather_upto(plan, epoch);
        }
        let Some(group) = core.group() else { return Ok(None) };
        let me = self.me();
        let wish = lock(&group.joint).wish(me);
        match wish {
            Wish::Nothing => {
                self.begin_joint(group);
                Ok(None)
            }
            Wish::Bid(target) => self.bid(target).map(|()| None),
            Wish::Write(target, members) => {
                let base = core.tail.load(Ordering::SeqCst);
                let uuid = group.uuid;
                self.joint(|joint| joint.begin_part(me));
                let round = self.gather_upto(plan, target)?;
                match &mut self.group {
                    Some(group) => group.joint = Some(JointPart { uuid, base, members }),
                    // What it bid for is not there: its area will never name the round, so the round
                    // must not count for anybody.
                    None => _ = self.joint(|joint| joint.give_up(me, true)),
                }
                Ok(round)
            }
        }
    }

    /// Begins a round if everybody can take part; says who cannot, or has not answered yet.
    fn begin_joint(&self, group: &ConsistencyGroup) {
        let core = &self.volume.core;
        if lock(&group.joint).is_under_way() {
            let awaited = {
                let joint = lock(&group.joint);
                joint.silent().or(joint.late())
            };
            let fellows = group.fellows(core);
            self.awaits(fellows.iter().find(|f| Some(f.incarnation) == awaited).map(|f| &**f));
            return;
        }
        core.raise_epoch();
        let target = core.closed_epoch().min(self.epoch_bound());
        let dirty: Vec<_> = group.members().into_iter().filter(|m| m.owes(target)).collect();
        let absent = dirty.iter().find(|member| lock(&member.area).is_none());
        if absent.is_some() {
            self.awaits(absent.map(|fellow| &**fellow));
            return;
        }
        if target <= core.tail.load(Ordering::SeqCst) {
            return;
        }
        self.joint(|joint| {
            if !joint.is_under_way() {
                joint.begin(target, dirty.iter().map(|member| (member.incarnation, member.uuid)));
            }
        });
    }

    /// Says what this member has up to `target`, and how much of that its area has room for.
    fn bid(&mut self, target: u64) -> Result<(), WalkError> {
        let core = self.volume.core.clone();
        let mut keys: Vec<(Key, u32)> = Vec::new();
        let mut dirty = lock(&core.dirty);
        self.lowest_epoch(&mut dirty)?;
        for ((_, id), cursor) in dirty.known.range(..=(target, u32::MAX)) {
            self.consume(*id, cursor.clone(), target, &mut keys)?;
        }
        drop(dirty);
        self.order(&mut keys);
        let low = keys.first().map_or(u64::MAX, |(key, _)| key.epoch);
        let upto = match keys.get(self.fit_prefix(&keys).1) {
            Some((key, _)) => key.epoch - 1,
            None => target,
        };
        let me = self.me();
        if upto < low && low <= target {
            // An area that is smaller than when these epochs were written.
            let path = self.redo().path();
            self.refusal =
                Some(Failure::applying(format!("an epoch of the group needs more than `{path}` has")));
            self.joint(|joint| joint.give_up(me, true));
            return Ok(());
        }
        if low > target {
            self.note_settled(target);
        }
        self.joint(|joint| joint.bid(me, low, upto));
        Ok(())
    }

    /// Names the round in the header of this member's part.
    pub(super) fn name_joint(group: &Group, header: RedoHeader) -> RedoHeader {
        match &group.joint {
            Some(JointPart { uuid, base, members }) => {
                RedoHeader { group_uuid: *uuid, base_epoch: *base, members: members.clone(), ..header }
            }
            None => header,
        }
    }

    /// Whether the group under way is one of several.
    pub(super) fn is_joint_part(&self) -> bool {
        self.group.as_ref().is_some_and(|group| group.joint.is_some())
    }

    /// The member's header is durable: waits for those of the others.
    pub(super) fn commit_joint(&mut self, round: Round) -> Progress {
        let me = self.me();
        if self.joint(|joint| joint.commit(me)) == Some(true) {
            self.note_decided();
        }
        self.phase = Phase::Group(round, Step::Await);
        Progress::Did
    }

    /// All areas name the target: from here on so does everybody's word.
    fn note_decided(&self) {
        let Some(group) = self.volume.core.group() else { return };
        group.members().iter().for_each(|member| *lock(&member.awaited) = None);
        let Some((epoch, parts)) = lock(&group.joint).takers() else { return };
        for member in group.members().iter().filter(|m| parts.contains(&m.incarnation)) {
            let mut area = lock(&member.area);
            *area = area.map(|word| word.max(epoch));
        }
        group.wake();
    }

    pub(super) fn await_verdict(&mut self, round: Round) -> Progress {
        let me = self.me();
        let Some(verdict) = self.joint(|joint| joint.verdict(me)) else {
            // The group is left only with nothing under way.
            return self.give_up_part();
        };
        match verdict {
            Some(true) => {
                self.awaits(None);
                self.committed(round)
            }
            Some(false) => self.withdraw(round),
            None => {
                let core = self.volume.core.clone();
                if let Some(group) = core.group() {
                    let late = lock(&group.joint).late();
                    let fellows = group.fellows(&core);
                    self.awaits(fellows.iter().find(|f| Some(f.incarnation) == late).map(|f| &**f));
                }
                self.phase = Phase::Group(round, Step::Await);
                Progress::Idle
            }
        }
    }

    /// Whether the round was given up before this member's header was written.
    pub(super) fn is_given_up(&self) -> bool {
        let me = self.me();
        self.is_joint_part() && self.joint(|joint| joint.verdict(me)) == Some(Some(false))
    }

    /// Nothing of this member's part counts, and nothing in the area says that it might.
    pub(super) fn give_up_part(&mut self) -> Progress {
        self.group = None;
        lock(&self.volume.core.plan).clear();
        self.volume.core.pacer.end_round(false);
        let me = self.me();
        self.joint(|joint| joint.end(me));
        self.phase = Phase::Idle;
        Progress::Did
    }

    /// The round was given up after this member's header was written: it goes out of the area again,
    /// over the same copy.
    fn withdraw(&mut self, round: Round) -> Progress {
        lock(&self.volume.core.plan).clear();
        self.volume.core.pacer.end_round(false);
        self.phase = Phase::Group(round, Step::Void);
        Progress::Did
    }

    /// This member's part is over: applied, or given up.
    pub(super) fn end_part(&self) {
        let me = self.me();
        self.joint(|joint| joint.end(me));
    }

    /// A round of this member's has failed: before the group's is decided it is given up for all.
    pub(super) fn fail_joint(&self) {
        let (me, is_over) = (self.me(), self.group.as_ref().is_none_or(|group| group.fate == Fate::Open));
        self.joint(|joint| joint.fail(me, is_over));
    }

    /// Ends the worker's part in the group: see the laws.
    pub(super) fn leave_joint(&mut self) {
        self.awaits(None);
        let me = self.me();
        let verdict = self.joint(|joint| {
            if !joint.names(me) {
                return None;
            }
            joint.give_up(me, false);
            let verdict = joint.verdict(me);
            // The next worker, or the end of the attachment, goes by what is in the area.
            joint.end(me);
            verdict
        });
        if verdict.flatten() == Some(true)
            && let Some(group) = self.group.as_mut().filter(|group| group.fate == Fate::Unknown)
            && let Some(header) = group.header.take()
        {
            self.redo().note(header);
        }
    }

    /// What an earlier life has left committed, and may not be decided: the worker begins with it.
    pub(super) fn restore_joint(&mut self) {
        let Some(redo) = self.volume.redo.clone() else { return };
        let header = redo.header();
        let core = &self.volume.core;
        if !redo.is_committed() || header.group_uuid == Uuid::default() {
            return;
        }
        let base = header.base_epoch;
        let tail = core.tail.load(Ordering::SeqCst);
        self.parts.begin_at((base > tail).then_some((base, u64::MAX)));
        let entries = redo.pending();
        let sectors = entries.iter().filter(|e| e.at > 0).map(|e| e.range.len).sum();
        let part = JointPart { uuid: header.group_uuid, base, members: header.members.clone() };
        self.group = Some(Group {
            fate: Fate::Undecided,
            sectors,
            part: Some((header.epoch, u64::MAX)),
            epoch: tail,
            joint: Some(part),
            is_restored: true,
            ..Group::of(entries, redo.body(), header.time_ms)
        });
    }

    /// Whether what an earlier life has left counts; `None` while that is not known.
    pub(super) fn judge_restored(&mut self) -> Option<Fate> {
        let core = self.volume.core.clone();
        let header = self.redo().header();
        match verdict(&core, &header) {
            Some(true) => {
                self.awaits(None);
                Some(Fate::Committed)
            }
            Some(false) => {
                self.awaits(None);
                *lock(&core.area) = Some(header.base_epoch);
                Some(Fate::Unknown)
            }
            None => {
                let fellows = core.group().map(|group| group.fellows(&core)).unwrap_or_default();
                let unknown = fellows.iter().find(|fellow| lock(&fellow.area).is_none());
                self.awaits(unknown.map(|fellow| &**fellow));
                None
            }
        }
    }
}

impl Group {
    /// A group of these entries, of which nothing counts yet.
    pub(super) fn of(entries: Vec<RedoEntry>, at: u64, time_ms: u64) -> Self {
        Self {
            fate: Fate::Open,
            entries,
            firsts: Vec::new(),
            sectors: 0,
            journaled: 0,
            table: Vec::new(),
            sent: 0,
            stage: None,
            fill: 0,
            at,
            half: None,
            has_rest: false,
            settles: 0,
            time_ms,
            part: None,
            epoch: 0,
            damage: Damage::default(),
            samples: Vec::new(),
            header: None,
            replay: None,
            joint: None,
            is_restored: false,
        }
    }
}
