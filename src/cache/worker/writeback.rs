//! Write-back of one volume: rounds that carry dirty data to the disk and move the tail.
//!
//! A round, and what breaks if two steps are swapped:
//! 1. gather: *strict*, the keys of the lowest closed epoch above the tail, from records, newest
//!    per sector; *grouped*, the same of several (`group.rs`); *relaxed*, every dirty extent of the index, with the tail to become the epoch
//!    closed before the first look;
//! 2. make their records durable: the disk must not have what the cache may still lose, or an older
//!    clean copy would be read until it is evicted, and the newer bytes after that;
//! 3. write them, sorted and merged, all of them (law 7: nothing of a later epoch before step 4);
//! 4. flush the disk (law 6: evidence; without writes of its own too: fills of modes that write
//!    around the cache wait for it);
//! 5. make the liveness words of all that has died durable: what zeros have replaced must not
//!    outlive them;
//! 6. write the tail's older copy and make that durable; then the other one, so that no damage to one
//!    copy sets the tail back: reclaim waits for durability once more before it frees what became
//!    clean here, and by then both copies are;
//! 7. mark clean, only where the index still points at what was written.
//!
//! Damaged payload is left out of a round; the tail's own update lists it as lost (`../lost.rs`).
//!
//! A failure anywhere leaves tail and marks as they were; the round is repeated after a delay that
//! grows. All of it is repeated: Linux reports a page it could not write once and calls it clean, so
//! after a failed flush nothing since the last good one counts as being on the disk. Overlapping
//! writes are never in flight together: the extents of a round are disjoint, and a round begins when
//! all of the last one has ended, also when it failed.
//!
//! What a round holds is in the volume's [`Plan`](super::super::plan::Plan), where relocation can
//! follow it: positions are used only with that locked.
//!
//! A disk that does not answer holds up its own volume's worker and nothing else. [`Writeback::leave`]
//! ends the worker without that answer.

mod ahead;
mod damage;
mod group;
mod hold;
mod joint;
mod journal;
mod op;
mod share;
mod tail;
mod together;
mod when;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use self::ahead::Next;
use self::damage::Damage;
use self::group::{Group, Parts, Step};
pub(crate) use self::joint::Joint;
pub(crate) use self::together::verdict;
pub use self::when::OrderError;
use self::when::When;
pub(crate) use self::when::Wishes;
use super::super::counters::add;
use super::super::env::{Clock, Env};
use super::super::ghost;
use super::super::health::Failure;
use super::super::index::Extent;
use super::super::latency::Stage;
use super::super::plan::Plan;
use super::super::stripes::lock;
use super::super::syncer::{Durable, Outcome};
use super::super::volume::{Order, Volume};
use super::Progress;
use super::retry::delay_ms;
use crate::backing::{AlignedBuf, Backing, Channel, Completion, Op};
use crate::mutant::{Mutant, mutated};
use crate::sync::thread;
use crate::units::SectorRange;
use crate::wake::Waker;

/// Operations in flight.
const DEPTH: u32 = 32;
/// Longest single write in sectors (1 MiB): with [`DEPTH`] this bounds the memory of a round.
const WRITE_SECTORS_MAX: u64 = 2048;
/// Longest single zeroing in sectors (1 GiB).
const ZERO_SECTORS_MAX: u64 = 1 << 21;
/// Extents looked up at a time in `relaxed`.
const SWEEP: usize = 4096;

/// What a round is doing.
enum Phase {
    Idle,
    Gathered(Round, Durable),
    Writing(Round),
    /// On its way to the redo area, from there, or out of it.
    Group(Round, Step),
    Flushing(Round),
    /// A failed round whose other operations have not ended.
    Failing(Failure),
    MakingDurable(Round, Durable),
    MovingTail(Round, Durable),
}

/// One round.
#[derive(Default)]
pub(super) struct Round {
    /// The tail if it succeeds.
    pub epoch: u64,
    /// Where a relaxed sweep goes on; `None` when all is in the plan.
    sweep: Option<u64>,
    damage: Damage,
}

pub(crate) struct Writeback<E: Env> {
    pub(super) volume: Arc<Volume<E>>,
    channel: Option<<E::Backing as Backing>::Channel>,
    phase: Phase,
    redo_channel: Option<<E::Backing as Backing>::Channel>,
    group: Option<Group>,
    /// The group behind it, if that is journaled meanwhile.
    next: Option<Next>,
    parts: Parts,
    completions: Vec<Completion>,
    /// Blocks of the disk that were read, by the number they were asked for.
    reads: Vec<(u64, AlignedBuf)>,
    spare: Vec<AlignedBuf>,
    spare_stages: Vec<AlignedBuf>,
    failures: u32,
    last_error: String,
    retry_at_ms: u64,
    when: When,
    /// Why this member of a group cannot take part in its round.
    refusal: Option<Failure>,
}

impl<E: Env> Writeback<E> {
    pub fn new(volume: Arc<Volume<E>>) -> Self {
        let mut worker = Self::fresh(volume);
        if worker.volume.order() == Order::Grouped {
            worker.remember_parts();
        }
        worker
    }

    fn fresh(volume: Arc<Volume<E>>) -> Self {
        Self {
            volume,
            channel: None,
            redo_channel: None,
            group: None,
            next: None,
            parts: Parts::default(),
            phase: Phase::Idle,
            completions: Vec::new(),
            reads: Vec::new(),
            spare: Vec::new(),
            spare_stages: Vec::new(),
            failures: 0,
            last_error: String::new(),
            retry_at_ms: 0,
            when: When::default(),
            refusal: None,
        }
    }

    /// Rounds failed since the last good one.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    pub fn last_error(&self) -> &str {
        &self.last_error
    }

    /// Waits for the disk or the media, after [`Progress::Waiting`].
    pub fn wait(&mut self, timeout: Duration) {
        let for_media =
            matches!(self.phase, Phase::Gathered(..) | Phase::MakingDurable(..) | Phase::MovingTail(..));
        match (&mut self.channel, &mut self.redo_channel) {
            (Some(channel), _) if !for_media && channel.in_flight() > 0 => channel.wait(timeout),
            (_, Some(channel)) if !for_media && channel.in_flight() > 0 => channel.wait(timeout),
            _ => thread::sleep(timeout.min(Duration::from_millis(1))),
        }
    }

    /// Does a bounded piece of work.
    pub fn step(&mut self) -> Progress {
        let progress = self.work();
        if self.volume.core.is_paced() {
            self.volume.pace(progress == Progress::Idle);
        }
        progress
    }

    fn work(&mut self) -> Progress {
        match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Idle => self.begin(),
            Phase::Gathered(round, ticket) => self.records_durable(round, ticket),
            Phase::Writing(round) => self.beside(|worker| worker.write(round)),
            Phase::Group(round, step) => self.step_group(round, step),
            Phase::Flushing(round) => self.beside(|worker| worker.flush_done(round)),
            Phase::Failing(failure) => self.abort(failure),
            Phase::MakingDurable(round, ticket) => self.media_done(round, ticket),
            Phase::MovingTail(round, ticket) => self.tail_done(round, ticket),
        }
    }

    /// Goes on with the next group beside the disk's work.
    fn beside(&mut self, disk: impl FnOnce(&mut Self) -> Progress) -> Progress {
        match (self.step_ahead(), disk(self)) {
            (Progress::Did, _) => Progress::Did,
            (_, progress) => progress,
        }
    }

    fn begin(&mut self) -> Progress {
        let core = self.volume.core.clone();
        let now = self.volume.cache.clock.now_ms();
        if self.owes_group() && now >= self.retry_at_ms {
            return self.resume_group();
        }
        if now < self.retry_at_ms || self.is_held() || !self.change_order() {
            return Progress::Idle;
        }
        if core.is_clean() {
            self.answer_clean();
            return Progress::Idle;
        }
        if core.damaged.load(Ordering::Relaxed) || !self.is_time(now) {
            return Progress::Idle;
        }
        if let Err(failure) = self.open_channel() {
            return self.fail(failure);
        }
        let mut plan = lock(&core.plan);
        if self.is_preparing() {
            return Progress::Idle;
        }
        plan.clear();
        let round = match self.round_order() {
            Order::Relaxed => self.gather_relaxed(),
            Order::Strict if mutated(Mutant::NewestAcrossEpochs) => self.gather_relaxed(),
            Order::Strict => self.gather_strict(&mut plan),
            Order::Grouped => self.gather_grouped(&mut plan),
        };
        let has_nothing = plan.todo.is_empty();
        let round = match round {
            Ok(Some(mut round)) => match self.check_restored(&plan, &mut round.damage) {
                Ok(()) => Ok(Some(round)),
                Err(failure) => {
                    drop(plan);
                    return self.fail(failure);
                }
            },
            round => round,
        };
        drop(plan);
        match round {
            Ok(Some(round)) if has_nothing => {
                self.phase = Phase::Writing(round);
                Progress::Did
            }
            Ok(Some(round)) => self.gathered(round),
            Ok(None) => match self.refusal.take() {
                Some(failure) => self.fail(failure),
                None => Progress::Idle,
            },
            Err(error) => {
                // Records of dirty data are gone: only this volume stops.
                core.damaged.store(true, Ordering::SeqCst);
                let cause = format!("dirty records cannot be read, the volume stops: {error}");
                self.fail(Failure::damage(cause))
            }
        }
    }

    fn open_channel(&mut self) -> Result<(), Failure> {
        if self.channel.is_none() {
            let channel = self.volume.backing.channel(&Waker::default(), DEPTH);
            self.channel = Some(channel.map_err(|error| Failure::resources(&error))?);
        }
        Ok(())
    }

    fn fail(&mut self, failure: Failure) -> Progress {
        let core = self.volume.core.clone();
        self.fail_joint();
        self.keep_group(&mut lock(&core.plan));
        let now = self.volume.cache.clock.now_ms();
        let delay = delay_ms(self.failures, self.volume.core.incarnation ^ now);
        self.failures += 1;
        self.retry_at_ms = now + delay;
        add(&self.volume.core.tally.writeback_errors, 1);
        let (volume, error) = (&self.volume.name, &failure.cause);
        tracing::warn!(volume, failures = self.failures, retry_ms = delay, error, "write-back failed");
        self.last_error.clone_from(error);
        self.volume.core.writeback_failed(failure, self.failures, now, self.retry_at_ms);
        self.volume.core.pacer.end_round(false);
        Progress::Idle
    }

    /// Whether operations are with the disk.
    pub fn is_owed(&self) -> bool {
        self.channel.as_ref().is_some_and(|c| c.in_flight() > 0) || self.redo_in_flight() > 0
    }

    /// Takes what has ended, of a round that will not go on.
    pub fn end_operations(&mut self) {
        // The next start finds the tail where it was and writes all of it again.
        drop(self.reap());
        drop(self.redo_reap());
    }

    /// Ends the worker. What the disk has not answered is left to it.
    pub fn leave(mut self) {
        for channel in [self.channel.take(), self.redo_channel.take()].into_iter().flatten() {
            if channel.in_flight() > 0 {
                let since_ms = self.volume.core.facts.writeback.since_ms();
                ghost::leave(&self.volume.core, &self.volume.name, channel, since_ms, Vec::new());
            }
        }
        self.volume.core.facts.writeback.set(None);
    }

    /// Shows since when the disk owes this worker an answer: it waits for all of a round, so what
    /// counts is the last time that anything ended.
    fn note_owed(&self) {
        self.volume.core.facts.writeback.set(self.is_owed().then(|| self.volume.cache.clock.now_ms()));
    }

    /// Makes durable what is about to be written: were the disk to have it and the cache to lose it,
    /// an older clean copy would hide it for as long as it is cached, and no longer.
    fn gathered(&mut self, round: Round) -> Progress {
        let cache = &self.volume.cache;
        let ticket = cache.syncer.request(&*cache.media.pmem, None);
        self.phase = Phase::Gathered(round, ticket);
        Progress::Did
    }

    fn records_durable(&mut self, round: Round, ticket: Durable) -> Progress {
        match self.volume.cache.syncer.outcome(ticket) {
            Outcome::Waiting if mutated(Mutant::DiskBeforeRecordDurable) => self.begin_writing(round),
            Outcome::Waiting => {
                self.phase = Phase::Gathered(round, ticket);
                Progress::Waiting
            }
            Outcome::Failed => self.abort(Failure::media("the cache cannot be made durable".to_owned())),
            Outcome::Reached => self.begin_writing(round),
        }
    }

    fn begin_writing(&mut self, round: Round) -> Progress {
        self.phase = match self.owes_group() {
            true => Phase::Group(round, Step::Journal),
            false => Phase::Writing(round),
        };
        Progress::Did
    }

    /// Keeps the queue to the disk full.
    fn write(&mut self, mut round: Round) -> Progress {
        if let Err(error) = self.reap() {
            return self.abort(error);
        }
        let core = self.volume.core.clone();
        let depth = self.depth();
        loop {
            let mut plan = lock(&core.plan);
            if plan.todo.is_empty() {
                if !self.sweep_on(&mut round, &mut plan) {
                    break;
                }
                self.channel.as_mut().expect("opened before the round").kick();
                return self.gathered(round);
            }
            let channel = self.channel.as_mut().expect("opened before the round");
            if channel.in_flight() >= depth {
                channel.kick();
                self.phase = Phase::Writing(round);
                return Progress::Waiting;
            }
            let op = self.next_op(&mut plan, &mut round.damage, self.applies_group());
            drop(plan);
            let op = match op {
                Ok(Some(op)) => op,
                Ok(None) => continue,
                Err(error) => return self.abort(error),
            };
            self.submit(op);
            add(&self.volume.core.tally.writeback_ops, 1);
        }
        let channel = self.channel.as_mut().expect("opened before the round");
        channel.kick();
        if channel.in_flight() > 0 {
            self.phase = Phase::Writing(round);
            return Progress::Waiting;
        }
        if mutated(Mutant::TailBeforeFlush) || self.next.is_some() && mutated(Mutant::NextCommittedEarly) {
            return self.flushed(round);
        }
        self.submit(Op::Flush);
        self.channel.as_mut().expect("opened before the round").kick();
        self.volume.core.pacer.written(self.volume.cache.clock.now_us());
        add(&self.volume.core.tally.writeback_flushes, 1);
        self.phase = Phase::Flushing(round);
        Progress::Waiting
    }

    /// Its token is when it was submitted.
    fn submit(&mut self, op: Op) {
        let since_ns = self.volume.cache.clock.now_ns();
        self.submit_as(since_ns, op);
    }

    fn submit_as(&mut self, token: u64, op: Op) {
        let channel = self.channel.as_mut().expect("opened before the round");
        let is_first = channel.in_flight() == 0;
        assert!(channel.submit(token, op).is_ok(), "fewer than the depth are in flight");
        if is_first {
            self.note_owed();
        }
    }

    /// Looks up more dirty extents for a relaxed round. False when there are no more.
    fn sweep_on(&mut self, round: &mut Round, plan: &mut Plan) -> bool {
        while let Some(from) = round.sweep {
            let mut found = Vec::new();
            round.sweep = self.volume.core.index.dirty_from(from, SWEEP, &mut found);
            found.retain(|extent| !self.is_newer(extent, round.epoch));
            found.into_iter().for_each(|extent| cut(extent, &mut plan.todo));
            if !plan.todo.is_empty() {
                return true;
            }
        }
        false
    }

    /// Whether an extent came after the round's epoch was closed: the next round's business, else a
    /// round would chase the guest. The `sync` that precedes the tail covers its record, so what it
    /// replaced, older than the tail and never written, cannot come back without it.
    fn is_newer(&self, extent: &Extent, epoch: u64) -> bool {
        if extent.place.zero {
            return false;
        }
        let cache = &self.volume.cache;
        let (id, _) = cache.media.locate(extent.place.position);
        cache.segments[id as usize].min_epoch.load(Ordering::SeqCst) > epoch
    }

    /// Takes completions. The first failure fails the round.
    fn reap(&mut self) -> Result<(), Failure> {
        let mut done = std::mem::take(&mut self.completions);
        if let Some(channel) = &mut self.channel {
            channel.reap(&mut done);
        }
        if !done.is_empty() {
            self.note_owed();
        }
        let mut result = Ok(());
        let now_ns = if done.is_empty() { 0 } else { self.volume.cache.clock.now_ns() };
        for completion in done.drain(..) {
            let is_flush = matches!(completion.op, Op::Flush);
            let unseen = if is_flush { Mutant::DiskFlushErrorIgnored } else { Mutant::DiskWriteErrorIgnored };
            if let (Err(error), Ok(())) = (&completion.result, &result)
                && !mutated(unseen)
            {
                result = Err(Failure::disk(&completion.op, error));
            }
            if let Op::Write { buf, .. } = &completion.op {
                self.volume.core.pacer.wrote(buf.len() as u64);
            }
            if !matches!(completion.op, Op::Read { .. }) {
                let stage = if is_flush { Stage::WritebackFlush } else { Stage::WritebackWrite };
                self.volume.core.latencies.record(stage, now_ns.saturating_sub(completion.token));
            }
            match completion.op {
                Op::Write { buf, .. } if self.spare.len() < DEPTH as usize => self.spare.push(buf),
                Op::Read { buf, .. } => self.reads.push((completion.token, buf)),
                _ => {}
            }
        }
        self.completions = done;
        result
    }

    /// Ends a round that failed, once all of its operations have ended.
    fn abort(&mut self, failure: Failure) -> Progress {
        // Further failures of the same round say nothing new.
        drop(self.reap());
        drop(self.redo_reap());
        if self.is_owed() {
            self.channel.iter_mut().chain(&mut self.redo_channel).for_each(Channel::kick);
            self.phase = Phase::Failing(failure);
            return Progress::Waiting;
        }
        self.fail(failure)
    }

    fn flush_done(&mut self, round: Round) -> Progress {
        if let Err(error) = self.reap() {
            return self.abort(error);
        }
        if self.channel.as_ref().is_some_and(|c| c.in_flight() > 0) {
            self.phase = Phase::Flushing(round);
            return Progress::Waiting;
        }
        self.flushed(round)
    }

    fn flushed(&mut self, round: Round) -> Progress {
        self.volume.core.pacer.flushed(self.volume.cache.clock.now_us());
        match self.owes_group() {
            true => self.applied(round),
            false => self.flushed_ungrouped(round),
        }
    }

    /// A round has succeeded.
    fn recovered(&mut self) {
        if std::mem::take(&mut self.failures) > 0 {
            self.volume.core.writeback_recovered();
        }
    }
}

impl<E: Env> Drop for Writeback<E> {
    fn drop(&mut self) {
        self.leave_joint();
    }
}

/// Appends an extent in pieces that one operation can take.
pub(super) fn cut(extent: Extent, todo: &mut VecDeque<Extent>) {
    let longest = if extent.place.zero { ZERO_SECTORS_MAX } else { WRITE_SECTORS_MAX };
    let mut start = extent.range.start;
    while start < extent.range.end() {
        let range = SectorRange::new(start, (extent.range.end() - start).min(longest));
        todo.push_back(Extent { range, place: extent.place_at(start) });
        start = range.end();
    }
}

impl Round {
    /// A round that sweeps the index.
    pub(super) fn sweeping(epoch: u64) -> Self {
        Self { sweep: Some(0), ..Self::empty(epoch) }
    }

    /// A round whose plan says it all.
    pub(super) fn empty(epoch: u64) -> Self {
        Self { epoch, ..Self::default() }
    }
}
