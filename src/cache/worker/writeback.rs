//! Write-back of one volume: rounds that carry dirty data to the disk and move the tail.
//!
//! A round, and what breaks if two steps are swapped:
//! 1. gather: *strict*, the keys of the lowest closed epoch above the tail, from records, newest
//!    per sector; *relaxed*, every dirty extent of the index, with the tail to become the epoch
//!    closed before the first look;
//! 2. make their records durable: the disk must not have what the cache may still lose, or an older
//!    clean copy would be read until it is evicted, and the newer bytes after that;
//! 3. write them, sorted and merged, all of them (law 7: nothing of a later epoch before step 4);
//! 4. flush the disk (law 6: evidence; without writes of its own too: fills of modes that write
//!    around the cache wait for it);
//! 5. make the liveness words of all that has died durable: what zeros have replaced must not
//!    outlive them;
//! 6. write the tail's older copy and make that durable;
//! 7. mark clean, only where the index still points at what was written.
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

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::super::counters::add;
use super::super::env::{Clock, Env};
use super::super::ghost;
use super::super::health::Failure;
use super::super::index::{Extent, ExtentMap};
use super::super::plan::{Consumed, Plan};
use super::super::queue::Reader;
use super::super::scan::WalkError;
use super::super::segments::State;
use super::super::stripes::lock;
use super::super::syncer::{Durable, Outcome};
use super::super::volume::{Cursor, Order, Volume};
use super::Progress;
use super::retry::delay_ms;
use crate::backing::{AlignedBuf, Backing, Channel, Completion, Op};
use crate::mutant::{Mutant, if_mutated, mutated};
use crate::onmedia::Key;
use crate::sync::thread;
use crate::units::SectorRange;
use crate::wake::Waker;

/// Operations in flight.
const DEPTH: u32 = 32;
/// Longest single write in sectors (1 MiB): with [`DEPTH`] this bounds the memory of a round.
const WRITE_SECTORS_MAX: u64 = 2048;
/// Longest single zeroing in sectors (1 GiB).
const ZERO_SECTORS_MAX: u64 = 1 << 21;
/// Dirty data older than this is written back even when nothing presses.
const AGE_MS_MAX: u64 = 2000;
/// Extents looked up at a time in `relaxed`.
const SWEEP: usize = 4096;

/// What a round is doing.
enum Phase {
    Idle,
    Gathered(Round, Durable),
    Writing(Round),
    Flushing(Round),
    /// A failed round whose other operations have not ended.
    Failing(Failure),
    MakingDurable(Round, Durable),
    MovingTail(Round, Durable),
}

/// One round.
struct Round {
    /// The tail if it succeeds.
    epoch: u64,
    /// Where a relaxed sweep goes on; `None` when all is in the plan.
    sweep: Option<u64>,
}

pub(crate) struct Writeback<E: Env> {
    pub(super) volume: Arc<Volume<E>>,
    channel: Option<<E::Backing as Backing>::Channel>,
    phase: Phase,
    completions: Vec<Completion>,
    spare: Vec<AlignedBuf>,
    failures: u32,
    last_error: String,
    retry_at_ms: u64,
    /// The epoch that was current when dirty data grew too old: rounds go on until it is reached.
    overdue: u64,
}

impl<E: Env> Writeback<E> {
    pub fn new(volume: Arc<Volume<E>>) -> Self {
        Self {
            volume,
            channel: None,
            phase: Phase::Idle,
            completions: Vec::new(),
            spare: Vec::new(),
            failures: 0,
            last_error: String::new(),
            retry_at_ms: 0,
            overdue: 0,
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
        match &mut self.channel {
            Some(channel) if !for_media && channel.in_flight() > 0 => channel.wait(timeout),
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
            Phase::Writing(round) => self.write(round),
            Phase::Flushing(round) => self.flush_done(round),
            Phase::Failing(failure) => self.abort(failure),
            Phase::MakingDurable(round, ticket) => self.media_done(round, ticket),
            Phase::MovingTail(round, ticket) => self.tail_done(round, ticket),
        }
    }

    fn begin(&mut self) -> Progress {
        let core = self.volume.core.clone();
        let now = self.volume.cache.clock.now_ms();
        if core.is_clean() || core.damaged.load(Ordering::Relaxed) || now < self.retry_at_ms {
            return Progress::Idle;
        }
        let age = now.saturating_sub(core.dirty_since.load(Ordering::Relaxed));
        let urgent = self.volume.draining.load(Ordering::SeqCst)
            || self.volume.cache.is_pressed()
            || self.volume.is_round_due();
        if !urgent && age < AGE_MS_MAX {
            return Progress::Idle;
        }
        if age >= AGE_MS_MAX && core.tail.load(Ordering::SeqCst) >= self.overdue {
            self.overdue = core.epoch.load(Ordering::SeqCst);
        }
        if self.channel.is_none() {
            match self.volume.backing.channel(&Waker::default(), DEPTH) {
                Ok(channel) => self.channel = Some(channel),
                Err(error) => return self.fail(Failure::resources(&error)),
            }
        }
        let mut plan = lock(&core.plan);
        plan.clear();
        let round = match self.volume.order() {
            Order::Relaxed => self.gather_relaxed(),
            Order::Strict if mutated(Mutant::NewestAcrossEpochs) => self.gather_relaxed(),
            Order::Strict => self.gather_strict(&mut plan),
        };
        let has_nothing = plan.todo.is_empty();
        drop(plan);
        match round {
            Ok(Some(round)) if has_nothing => {
                self.phase = Phase::Writing(round);
                Progress::Did
            }
            Ok(Some(round)) => self.gathered(round),
            Ok(None) => Progress::Idle,
            Err(error) => {
                // Records of dirty data are gone: only this volume stops.
                core.damaged.store(true, Ordering::SeqCst);
                let cause = format!("dirty records cannot be read, the volume stops: {error}");
                self.fail(Failure::damage(cause))
            }
        }
    }

    fn fail(&mut self, failure: Failure) -> Progress {
        lock(&self.volume.core.plan).clear();
        let now = self.volume.cache.clock.now_ms();
        let delay = delay_ms(self.failures, self.volume.core.incarnation ^ now);
        self.failures += 1;
        self.retry_at_ms = now + delay;
        add(&self.volume.core.tally.writeback_errors, 1);
        let (volume, error) = (&self.volume.name, &failure.cause);
        tracing::warn!(volume, failures = self.failures, retry_ms = delay, error, "write-back failed");
        self.last_error.clone_from(error);
        self.volume.core.facts.writeback_failed(failure, self.failures, now, self.retry_at_ms);
        self.volume.core.pacer.end_round(false);
        Progress::Idle
    }

    /// Whether operations are with the disk.
    pub fn is_owed(&self) -> bool {
        self.channel.as_ref().is_some_and(|c| c.in_flight() > 0)
    }

    /// Takes what has ended, of a round that will not go on.
    pub fn end_operations(&mut self) {
        // The next start finds the tail where it was and writes all of it again.
        drop(self.reap());
    }

    /// Ends the worker. What the disk has not answered is left to it.
    pub fn leave(mut self) {
        if let Some(channel) = self.channel.take()
            && channel.in_flight() > 0
        {
            let since_ms = self.volume.core.facts.writeback.since_ms();
            ghost::leave(&self.volume.core, &self.volume.name, channel, since_ms, Vec::new());
        }
        self.volume.core.facts.writeback.set(None);
    }

    /// Shows since when the disk owes this worker an answer: it waits for all of a round, so what
    /// counts is the last time that anything ended.
    fn note_owed(&self) {
        self.volume.core.facts.writeback.set(self.is_owed().then(|| self.volume.cache.clock.now_ms()));
    }

    fn gather_relaxed(&mut self) -> Result<Option<Round>, WalkError> {
        let core = &self.volume.core;
        core.raise_epoch();
        let epoch = core.closed_epoch();
        if epoch <= core.tail.load(Ordering::SeqCst) {
            return Ok(None);
        }
        self.volume.begin_pace(core.index.dirty_sectors() * 512, None);
        Ok(Some(Round { epoch, sweep: Some(0) }))
    }

    fn gather_strict(&mut self, plan: &mut Plan) -> Result<Option<Round>, WalkError> {
        let core = self.volume.core.clone();
        let mut dirty = lock(&core.dirty);
        let mut is_raised = false;
        let epoch = loop {
            // Before the look: what is committed after it belongs to an epoch above this one.
            let closed = core.closed_epoch();
            match self.lowest_epoch(&mut dirty)? {
                Some(epoch) if epoch <= closed => break epoch,
                // Nothing is dirty below: the tail may follow the closed epochs.
                None if closed > core.tail.load(Ordering::SeqCst) => {
                    return Ok(Some(Round { epoch: closed, sweep: None }));
                }
                _ if is_raised => return Ok(None),
                _ => core.raise_epoch(),
            }
            is_raised = true;
        };
        let mut keys = Vec::new();
        for ((_, id), cursor) in dirty.known.range((epoch, 0)..=(epoch, u32::MAX)) {
            let upto = epoch + u64::from(mutated(Mutant::NextEpochAlong));
            let (cursor, next) = self.consume(*id, cursor.clone(), upto, &mut keys)?;
            let generation = self.volume.cache.segments[*id as usize].generation.load(Ordering::Relaxed);
            plan.cursors.push(Consumed { id: *id, generation, cursor, next });
        }
        drop(dirty);
        tracing::debug!(volume = self.volume.name, epoch, ?keys, "gathered");
        // Two copies have one version if a crash came between relocation and the end of its source:
        // the segment decides, as it does in recovery.
        keys.sort_unstable_by_key(|(k, id): &(Key, u32)| (k.version, *id));
        if_mutated(Mutant::OldestOfEpochWritten, || keys.reverse());
        if_mutated(Mutant::ZerosNotWrittenBack, || keys.retain(|(k, _)| k.kind.has_payload()));
        let mut newest = ExtentMap::new();
        let mut replaced = Vec::new();
        for (key, id) in &keys {
            replaced.clear();
            let place = self.volume.cache.media.place(*id, key, true);
            newest.insert(Extent { range: key.range(), place }, &mut replaced);
        }
        newest.iter().for_each(|extent| cut(extent, &mut plan.todo));
        if_mutated(Mutant::WritesOverlap, || plan.todo.extend(plan.todo.clone()));
        let bytes = |len: u64| len * 512;
        let write = plan.todo.iter().filter(|e| !e.place.zero).map(|e| bytes(e.range.len)).sum();
        let payload: u64 =
            keys.iter().filter(|(k, _)| k.kind.has_payload()).map(|(k, _)| bytes(k.range().len)).sum();
        self.volume.begin_pace(write, Some(payload + payload / 16));
        Ok(Some(Round { epoch, sweep: None }))
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
            Outcome::Waiting if mutated(Mutant::DiskBeforeRecordDurable) => self.write(round),
            Outcome::Waiting => {
                self.phase = Phase::Gathered(round, ticket);
                Progress::Waiting
            }
            Outcome::Failed => self.abort(Failure::media("the cache cannot be made durable".to_owned())),
            Outcome::Reached => {
                self.phase = Phase::Writing(round);
                Progress::Did
            }
        }
    }

    /// Keeps the queue to the disk full.
    fn write(&mut self, mut round: Round) -> Progress {
        if let Err(error) = self.reap() {
            return self.abort(error);
        }
        let core = self.volume.core.clone();
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
            if channel.in_flight() >= DEPTH as usize {
                channel.kick();
                self.phase = Phase::Writing(round);
                return Progress::Waiting;
            }
            let op = self.next_op(&mut plan);
            drop(plan);
            let op = match op {
                Ok(op) => op,
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
        if mutated(Mutant::TailBeforeFlush) {
            return self.flushed(round);
        }
        self.submit(Op::Flush);
        self.channel.as_mut().expect("opened before the round").kick();
        self.volume.core.pacer.written(self.volume.cache.clock.now_us());
        add(&self.volume.core.tally.writeback_flushes, 1);
        self.phase = Phase::Flushing(round);
        Progress::Waiting
    }

    fn submit(&mut self, op: Op) {
        let channel = self.channel.as_mut().expect("opened before the round");
        let is_first = channel.in_flight() == 0;
        assert!(channel.submit(0, op).is_ok(), "fewer than the depth are in flight");
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

    /// The next operation: a run of adjacent extents of one kind.
    fn next_op(&mut self, plan: &mut Plan) -> Result<Op, Failure> {
        let first = *plan.todo.front().expect("the caller looked");
        let longest = if first.place.zero { ZERO_SECTORS_MAX } else { WRITE_SECTORS_MAX };
        let mut run = Vec::new();
        let mut end = first.range.start;
        while let Some(extent) = plan.todo.front() {
            let len = extent.range.end() - first.range.start;
            let joins = extent.range.start == end
                && extent.place.zero == first.place.zero
                && (!first.place.zero || extent.place.position % 2 == first.place.position % 2);
            if !joins || (len > longest && !run.is_empty()) {
                break;
            }
            end = extent.range.end();
            run.push(plan.todo.pop_front().expect("it is there"));
        }
        let offset = first.range.start * 512;
        let sectors = end - first.range.start;
        plan.written.extend_from_slice(&run);
        if first.place.zero {
            let unmap = self.volume.pass_discard && first.place.position % 2 == 1;
            return Ok(Op::Zero { offset, len: sectors * 512, unmap });
        }
        let mut buf = self.buffer(sectors as usize * 512);
        let mut at = 0;
        for extent in &run {
            let copied = self.volume.cache.copy_extent(extent, Reader::Worker, true, |offset, bytes| {
                buf[at + offset..][..bytes.len()].copy_from_slice(bytes);
                Ok(())
            });
            if let Err(error) = copied {
                add(&self.volume.core.tally.checksum_errors, 1);
                let cause = format!("dirty data of {} is damaged: {error}", extent.range);
                return Err(Failure::damage(cause));
            }
            at += extent.range.len as usize * 512;
        }
        Ok(Op::Write { offset, buf })
    }

    fn buffer(&mut self, len: usize) -> AlignedBuf {
        match self.spare.iter().position(|b| b.capacity() >= len) {
            Some(i) => {
                let mut buf = self.spare.swap_remove(i);
                buf.set_len(len);
                buf
            }
            None => AlignedBuf::new(len),
        }
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
            if let Op::Write { buf, .. } = completion.op
                && self.spare.len() < DEPTH as usize
            {
                self.spare.push(buf);
            }
        }
        self.completions = done;
        result
    }

    /// Ends a round that failed, once all of its operations have ended.
    fn abort(&mut self, failure: Failure) -> Progress {
        // Further failures of the same round say nothing new.
        drop(self.reap());
        if let Some(channel) = &mut self.channel
            && channel.in_flight() > 0
        {
            channel.kick();
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
        // What is superseded must be durably dead as well: recovery ignores zeros below the tail,
        // and an older clean copy of those sectors would come back.
        let cache = self.volume.cache.clone();
        if mutated(Mutant::TailBeforeLiveness) {
            return self.media_done(round, cache.syncer.request(&*cache.media.pmem, None));
        }
        let ticket = match cache.write_liveness(None) {
            Ok(ticket) => ticket,
            Err(error) => {
                return self.fail(Failure::media(format!("liveness words cannot be written: {error}")));
            }
        };
        self.phase = Phase::MakingDurable(round, ticket);
        Progress::Did
    }

    fn media_done(&mut self, round: Round, ticket: Durable) -> Progress {
        let cache = self.volume.cache.clone();
        match cache.syncer.outcome(ticket) {
            Outcome::Waiting if mutated(Mutant::TailBeforeLivenessDurable) => {}
            Outcome::Waiting => {
                self.phase = Phase::MakingDurable(round, ticket);
                return Progress::Waiting;
            }
            Outcome::Failed => {
                return self.fail(Failure::media("the cache cannot be made durable".to_owned()));
            }
            Outcome::Reached => {}
        }
        let core = &self.volume.core;
        let next = lock(&core.tail_page).1 ^ usize::from(mutated(Mutant::TailNewestOverwritten));
        if let Err(error) = cache.write_tail(core, next, round.epoch) {
            return self.fail(Failure::media(format!("the tail cannot be written: {error}")));
        }
        let ticket = cache.syncer.request(&*cache.media.pmem, None);
        self.phase = Phase::MovingTail(round, ticket);
        Progress::Did
    }

    fn tail_done(&mut self, round: Round, ticket: Durable) -> Progress {
        let cache = self.volume.cache.clone();
        match cache.syncer.outcome(ticket) {
            Outcome::Waiting => {
                self.phase = Phase::MovingTail(round, ticket);
                return Progress::Waiting;
            }
            Outcome::Failed => {
                return self.fail(Failure::media("the tail cannot be made durable".to_owned()));
            }
            Outcome::Reached => {}
        }
        let core = &self.volume.core;
        let mut written = 0;
        let mut plan = lock(&core.plan);
        for extent in &plan.written {
            core.index.mark_clean_if(*extent, true);
            written += extent.range.len;
        }
        add(&core.tally.written_back_sectors, written);
        // Last: from then on reclaim may take the segments, and with them their cursors.
        self.settle(round.epoch, &mut plan);
        core.tail.store(round.epoch, Ordering::SeqCst);
        core.pacer.end_round(true);
        plan.clear();
        drop(plan);
        if core.is_clean() {
            core.dirty_since.store(0, Ordering::Relaxed);
        } else if round.epoch >= self.overdue {
            // Only what is younger is left. A guest that flushes often leaves many epochs behind
            // it, and they are all as old as the first.
            core.dirty_since.store(cache.clock.now_ms().max(1), Ordering::Relaxed);
        }
        if std::mem::take(&mut self.failures) > 0 {
            core.facts.writeback_recovered();
        }
        cache.housekeeper.raise();
        Progress::Did
    }

    /// Files the segments a round has consumed from.
    fn settle(&self, epoch: u64, plan: &mut Plan) {
        let core = &self.volume.core;
        let segments = &self.volume.cache.segments;
        let mut dirty = lock(&core.dirty);
        for Consumed { id, generation, cursor, next } in plan.cursors.drain(..) {
            let segment = &segments[id as usize];
            let is_gone = matches!(segment.state(), State::Free | State::Reclaiming | State::Bad);
            if is_gone || segment.generation.load(Ordering::Relaxed) != generation {
                // Reclaim has taken its entries away; those there are now are of its next life.
                continue;
            }
            dirty.known.remove(&(epoch, id));
            match (next, cursor) {
                (Some(next), cursor) => _ = dirty.known.insert((next, id), cursor),
                (None, cursor @ Cursor::Log(_)) => _ = dirty.drained.insert(id, cursor),
                (None, Cursor::Keys(_)) => {}
            }
        }
        // What relaxed rounds have cleaned wholly needs no cursor any more, once nothing more can
        // be appended to it.
        let done = |id: u32| {
            let segment = &segments[id as usize];
            segment.state() != State::Open && segment.max_epoch.load(Ordering::SeqCst) <= epoch
        };
        dirty.known.retain(|&(_, id), _| !done(id));
        dirty.drained.retain(|&id, _| !done(id));
    }
}

/// Appends an extent in pieces that one operation can take.
fn cut(extent: Extent, todo: &mut VecDeque<Extent>) {
    let longest = if extent.place.zero { ZERO_SECTORS_MAX } else { WRITE_SECTORS_MAX };
    let mut start = extent.range.start;
    while start < extent.range.end() {
        let range = SectorRange::new(start, (extent.range.end() - start).min(longest));
        todo.push_back(Extent { range, place: extent.place_at(start) });
        start = range.end();
    }
}
