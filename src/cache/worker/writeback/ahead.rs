//! The group behind the one that goes to the disk: gathered and journaled meanwhile, into the half of the
//! redo area that the other does not lie in.
//!
//! ```text
//!  area   │ journal 0 │C0│ journal 1 │  │C1│ journal 0 │  │C0│ …
//!  disk   │           │  │ apply   0 │F │  │ apply   1 │F │  │ …
//! ```
//!
//! Laws, beside those of `group.rs`:
//! - What is committed is one group, or none. The next one's header is written when the last one is on the
//!   disk, flushed (*F*), and takes the place of its *idle*: so recovery knows one rule, and a crash at
//!   any instant leaves
//!   before *F* has ended: the header of the last one, whose body nobody has touched: it is applied;
//!   until the next header is durable: that, or the next one's, of which nothing is on the disk while the
//!   last one is: either leads to the end of a group;
//!   from then on: the next one's.
//! - Nothing of the next group is on the disk before its own header is durable.
//! - It is gathered as if the last one had ended, tail included. The last one's tail moves between the
//!   next one's header and its first write to the disk. If it cannot, the next one goes on all the same,
//!   and what the last one leaves behind, to be marked clean or listed as lost, is left to it.
//! - Whatever fails in or for the next group before its header is written costs that group alone: it is
//!   forgotten, the last one is voided, and what it held is gathered again. Nobody writes to the area
//!   before what it had in flight has ended. If the header's write or flush fails it may count or not:
//!   the *idle* of the last one goes over the same copy.
//! - A group that is one of several volumes' has none behind it: all of them are committed at one time.
//! - Whoever wants the chain to end, a checkpoint or a change of order, finds it ended with the last one.
//! - Positions in its plan are followed like those of the first (`../../plan.rs`).
//! - It is known by sectors that the last group has left on the disk, and by those that one was known by:
//!   no read comes between the writes.

use super::super::super::env::{Clock, Env};
use super::super::super::health::Failure;
use super::super::super::plan::Plan;
use super::super::super::redo::{entry_of, sample};
use super::super::super::stripes::lock;
use super::super::super::syncer::{Durable, Outcome};
use super::super::super::volume::Order;
use super::super::Progress;
use super::damage::Damage;
use super::group::{Fate, Group, Step};
use super::share::Behind;
use super::{Phase, Round, Writeback};
use crate::backing::{Backing, Op};
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{RedoHeader, RedoKind};
use crate::sync::atomic::Ordering;

/// Sectors by which the disk is known again.
const SAMPLES: usize = 8;
/// With fewer of the last group's the next one takes its own look.
const SAMPLES_LEAST: usize = 2;

/// A group behind another.
pub(super) struct Next {
    group: Group,
    damage: Damage,
    step: Ahead,
}

/// Where it is.
enum Ahead {
    /// Its records are being made durable.
    Gathered(Durable),
    Journal,
    Table,
    /// Its body is in the area, to be flushed.
    Body,
    /// It is being flushed.
    Flushing,
    /// Its body is durable.
    Ready,
}

impl<E: Env> Writeback<E> {
    /// Goes on with the next group while another is on its way to the disk.
    pub(super) fn step_ahead(&mut self) -> Progress {
        let Some(mut next) = self.next.take() else { return self.begin_ahead() };
        match self.redo_reap().and_then(|()| self.step_next(&mut next)) {
            Ok(progress) => {
                self.next = Some(next);
                progress
            }
            Err(failure) => {
                self.forget_next(&failure.cause);
                Progress::Did
            }
        }
    }

    fn begin_ahead(&mut self) -> Progress {
        if self.redo_in_flight() > 0 && self.group.is_some() {
            // Of one that was forgotten: whatever became of it.
            drop(self.redo_reap());
            return Progress::Waiting;
        }
        let may_go_ahead = self.may_go_ahead();
        let Some(group) = self.group.as_mut() else { return Progress::Idle };
        let (true, Some(half)) = (group.fate == Fate::Committed && may_go_ahead, group.half) else {
            return Progress::Idle;
        };
        if !std::mem::take(&mut group.has_rest) {
            return Progress::Idle;
        }
        let behind = Behind {
            upto: group.part.or(Some((group.epoch, u64::MAX))),
            tail: group.epoch,
            half: Some(1 - half),
        };
        let mut damage = if group.part.is_some() { group.damage.clone() } else { Damage::default() };
        // Since when is dirty what will be left.
        _ = self.is_time(self.volume.cache.clock.now_ms());
        let core = self.volume.core.clone();
        let mut plans = lock(&core.plan);
        let mut plan = Plan::default();
        core.raise_epoch();
        // Before the look: what is committed after it belongs to an epoch above this one.
        let closed = core.closed_epoch();
        let gathered = match self.gather_behind(&mut plan, &behind, closed) {
            Ok(gathered) => gathered,
            // The next round of its own meets the same, and says so.
            Err(error) => {
                tracing::debug!(volume = self.volume.name, %error, "no group is gathered ahead");
                None
            }
        };
        let Some(group) = gathered.and_then(|g| g.group) else { return Progress::Idle };
        damage.heal(&plan);
        plans.next = Some(Box::new(plan));
        drop(plans);
        let cache = &self.volume.cache;
        let ticket = cache.syncer.request(&*cache.media.pmem, None);
        self.next = Some(Next { group, damage, step: Ahead::Gathered(ticket) });
        Progress::Did
    }

    /// Whether nobody waits for groups to end.
    fn may_go_ahead(&self) -> bool {
        let wishes = &self.volume.wishes;
        self.volume.order() == Order::Grouped
            && !self.is_joint()
            && self.round_order() == Order::Grouped
            && wishes.order.load(Ordering::SeqCst) == 0
            && wishes.checkpoint.load(Ordering::SeqCst) == 0
    }

    fn step_next(&mut self, next: &mut Next) -> Result<Progress, Failure> {
        let group = &mut next.group;
        next.step = match &next.step {
            Ahead::Gathered(ticket) => match self.volume.cache.syncer.outcome(*ticket) {
                Outcome::Waiting => return Ok(Progress::Waiting),
                Outcome::Failed => {
                    return Err(Failure::media("the cache cannot be made durable".to_owned()));
                }
                Outcome::Reached => Ahead::Journal,
            },
            Ahead::Journal => match self.journal_some(group, &mut next.damage, true)? {
                true => Ahead::Table,
                false => return Ok(Progress::Waiting),
            },
            Ahead::Table => match self.table_some(group) {
                true => Ahead::Body,
                false => return Ok(Progress::Waiting),
            },
            Ahead::Body | Ahead::Flushing if self.redo_in_flight() > 0 => return Ok(Progress::Waiting),
            Ahead::Body => {
                if !self.carry_samples(group) {
                    return Err(Failure::applying("the next group covers what the disk is known by".into()));
                }
                if !mutated(Mutant::GroupBodyUnflushed) {
                    self.redo_submit(Op::Flush);
                }
                Ahead::Flushing
            }
            Ahead::Flushing => Ahead::Ready,
            Ahead::Ready => return Ok(Progress::Waiting),
        };
        Ok(Progress::Did)
    }

    /// Takes over by which sectors the disk is known; false if too few are left.
    fn carry_samples(&self, next: &mut Group) -> bool {
        let last = self.group.as_ref().expect("it is behind one");
        let header = self.redo().header();
        let data: Vec<usize> =
            (0..last.entries.len()).filter(|&i| last.entries[i].kind == RedoKind::Data).collect();
        let each = data.len().div_ceil(SAMPLES / 2).max(1);
        let written = data.iter().step_by(each).map(|&i| (last.entries[i].range.start, last.firsts[i]));
        let known = written.chain(header.samples.iter().map(|s| (s.sector, s.after)));
        for (sector, before) in known {
            let after = match entry_of(&next.entries, sector) {
                None => before,
                Some(i) if next.entries[i].kind == RedoKind::Data => match next.entries[i].range.start {
                    start if start == sector => next.firsts[i],
                    _ => continue,
                },
                Some(_) => continue,
            };
            if next.samples.len() < SAMPLES && next.samples.iter().all(|s| s.sector != sector) {
                next.samples.push(sample(sector, before, Some(after)));
            }
        }
        next.samples.len() >= SAMPLES_LEAST
    }

    /// Gives the next group up: nothing of it counts.
    fn forget_next(&mut self, why: &str) {
        tracing::debug!(volume = self.volume.name, why, "the group behind is given up");
        self.next = None;
        lock(&self.volume.core.plan).next = None;
    }

    /// The group is on the disk, flushed: the next one follows when it is there, else it is voided.
    pub(super) fn follow(&mut self, round: Round) -> Progress {
        if self.next.is_some() && !self.may_go_ahead() {
            self.forget_next("groups are to end");
        }
        let progress = if self.next.is_some() { self.step_ahead() } else { Progress::Did };
        let redo_in_flight = self.redo_in_flight();
        match &mut self.next {
            None if redo_in_flight > 0 => {
                drop(self.redo_reap());
                self.phase = Phase::Group(round, Step::Follow);
                Progress::Waiting
            }
            None => {
                self.phase = Phase::Group(round, Step::Void);
                Progress::Did
            }
            Some(Next { group, step: Ahead::Ready, .. }) => {
                let mut header = group.header.take().expect("made with the journal");
                header.samples = std::mem::take(&mut group.samples);
                // The disk may have grown since the area was claimed.
                header.backing_size = self.volume.backing.geometry().size;
                let redo = self.volume.redo.clone().expect("a volume in grouped order has a redo area");
                let (header, op) = redo.update(|h| *h = RedoHeader { sequence: h.sequence, ..header });
                group.header = Some(header);
                self.send(round, op, Step::FlushFollower)
            }
            Some(_) => {
                self.phase = Phase::Group(round, Step::Follow);
                progress
            }
        }
    }

    /// The next group is committed: the last one has ended.
    pub(super) fn followed(&mut self, round: Round) -> Progress {
        let Next { mut group, damage, .. } = self.next.take().expect("it has been committed");
        self.redo().note(group.header.take().expect("it was being committed"));
        (group.fate, group.damage) = (Fate::Committed, damage);
        let last = self.group.replace(group).expect("it is behind one");
        let mut plans = lock(&self.volume.core.plan);
        let plan = plans.next.as_mut().expect("it has a plan");
        plan.todo = std::mem::take(&mut plan.written).into();
        drop(plans);
        super::add(&self.volume.core.tally.groups_ahead, 1);
        self.group_ended(round, &last)
    }

    /// A group has ended, and its round: on to the one that is committed behind it, if one is.
    pub(super) fn go_on(&mut self) -> Progress {
        if let Some(group) = &self.group {
            let (bytes, covers) = (group.sectors * 512, group.covers);
            let round = Round { damage: group.damage.clone(), ..Round::empty(group.epoch) };
            self.volume.begin_pace(bytes, Some(covers), false);
            self.phase = Phase::Writing(round);
        }
        Progress::Did
    }

    /// What a failed round leaves of the next group and its plan. Before its header was written it is
    /// forgotten. Once it is committed the last one's tail alone may have failed: what was to be marked
    /// clean and listed with that is left to it.
    pub(super) fn keep_next(&mut self, plan: &mut Plan) {
        if self.next.take().is_some() {
            plan.next = None;
        }
        let Some(mut next) = plan.next.take() else { return };
        let group = self.group.as_mut().expect("it is committed");
        let mut damage = self.parts.damage.clone();
        damage.heal(&next);
        group.damage.append(damage);
        next.earlier.append(&mut plan.written);
        next.earlier.append(&mut plan.earlier);
        *plan = *next;
    }
}
