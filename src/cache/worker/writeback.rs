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
//! 6. write the tail's older copy and make that durable; then the other one, so that no damage to one
//!    copy sets the tail back: reclaim waits for durability once more before it frees what became
//!    clean here, and by then both copies are;
//! 7. mark clean, only where the index still points at what was written.
//!
//! Damaged payload is left out of a round; the tail's own update lists it as lost (`../lost.rs`).
//!
//! A failure anywhere leaves tail and marks as they were; the round is repeated after a delay that
//! grows. Overlapping writes are never in flight together: the extents of a round are disjoint,
//! and a round begins when all of the last one has ended.

mod damage;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use self::damage::Damage;
use super::super::counters::add;
use super::super::env::{Clock, Env};
use super::super::index::{Extent, ExtentMap};
use super::super::scan::WalkError;
use super::super::segments::State;
use super::super::stripes::lock;
use super::super::syncer::{Durable, Outcome};
use super::super::volume::{Cursor, DirtySegments, Order, Volume};
use super::Progress;
use crate::backing::{AlignedBuf, Backing, Channel, Completion, Op};
use crate::onmedia::{Key, KeyKind, SegmentHeader};
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
/// First and longest delay after a failed round.
const RETRY_MS: (u64, u64) = (100, 30_000);
/// Extents looked up at a time in `relaxed`.
const SWEEP: usize = 4096;

/// What a round is doing.
enum Phase {
    Idle,
    Gathered(Round, Durable),
    Writing(Round),
    Flushing(Round),
    MakingDurable(Round, Durable),
    MovingTail(Round, Durable),
}

/// One round.
#[derive(Default)]
struct Round {
    /// The tail if it succeeds.
    epoch: u64,
    /// Still to be written, ascending.
    todo: VecDeque<Extent>,
    /// Where a relaxed sweep goes on; `None` when all is in `todo`.
    sweep: Option<u64>,
    /// To be marked clean.
    written: Vec<Extent>,
    /// Where segments go on: what the round has consumed.
    cursors: Vec<Consumed>,
    damage: Damage,
}

/// How far a round has read a segment's records.
struct Consumed {
    id: u32,
    /// A segment without dirty data may be reclaimed, and used again, while the round goes on.
    generation: u64,
    cursor: Cursor,
    /// The epoch of the record that comes next, if there is one.
    next: Option<u64>,
}

pub(crate) struct Writeback<E: Env> {
    volume: Arc<Volume<E>>,
    channel: Option<<E::Backing as Backing>::Channel>,
    phase: Phase,
    completions: Vec<Completion>,
    spare: Vec<AlignedBuf>,
    failures: u32,
    last_error: String,
    retry_at_ms: u64,
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
        match (&self.phase, &mut self.channel) {
            (Phase::Writing(_) | Phase::Flushing(_), Some(channel)) => channel.wait(timeout),
            _ => std::thread::sleep(timeout.min(Duration::from_millis(1))),
        }
    }

    /// Does a bounded piece of work.
    pub fn step(&mut self) -> Progress {
        match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Idle => self.begin(),
            Phase::Gathered(round, ticket) => self.records_durable(round, ticket),
            Phase::Writing(round) => self.write(round),
            Phase::Flushing(round) => self.flush_done(round),
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
            || core.damage_seen.load(Ordering::Relaxed);
        if !urgent && age < AGE_MS_MAX {
            return Progress::Idle;
        }
        if self.channel.is_none() {
            match self.volume.backing.channel(&Waker::default(), DEPTH) {
                Ok(channel) => self.channel = Some(channel),
                Err(error) => return self.fail(format!("cannot open a channel to the disk: {error}")),
            }
        }
        let round = match self.volume.order() {
            Order::Relaxed => self.gather_relaxed(),
            Order::Strict => self.gather_strict(),
        };
        match round {
            Ok(Some(round)) if round.todo.is_empty() => {
                self.phase = Phase::Writing(round);
                Progress::Did
            }
            Ok(Some(round)) => self.gathered(round),
            Ok(None) => Progress::Idle,
            Err(error) => {
                // Records of dirty data are gone: only this volume stops.
                core.damaged.store(true, Ordering::SeqCst);
                self.fail(format!("dirty records cannot be read, the volume stops: {error}"))
            }
        }
    }

    fn fail(&mut self, error: String) -> Progress {
        let delay = (RETRY_MS.0 << self.failures.min(10)).min(RETRY_MS.1);
        self.failures += 1;
        self.retry_at_ms = self.volume.cache.clock.now_ms() + delay;
        add(&self.volume.core.tally.writeback_errors, 1);
        let volume = &self.volume.name;
        tracing::error!(volume, failures = self.failures, retry_ms = delay, error, "write-back failed");
        self.last_error = error;
        Progress::Idle
    }

    fn gather_relaxed(&mut self) -> Result<Option<Round>, WalkError> {
        let core = &self.volume.core;
        core.raise_epoch();
        let epoch = core.closed_epoch();
        if epoch <= core.tail.load(Ordering::SeqCst) {
            return Ok(None);
        }
        Ok(Some(Round { sweep: Some(0), ..Round::empty(epoch) }))
    }

    fn gather_strict(&mut self) -> Result<Option<Round>, WalkError> {
        let core = self.volume.core.clone();
        let mut dirty = lock(&core.dirty);
        let mut is_raised = false;
        let epoch = loop {
            // Before the look: what is committed after it belongs to an epoch above this one.
            let closed = core.closed_epoch();
            match self.lowest_epoch(&mut dirty)? {
                Some(epoch) if epoch <= closed => break epoch,
                // Nothing is dirty below: the tail may follow the closed epochs.
                None if closed > core.tail.load(Ordering::SeqCst) => return Ok(Some(Round::empty(closed))),
                _ if is_raised => return Ok(None),
                _ => core.raise_epoch(),
            }
            is_raised = true;
        };
        let mut keys = Vec::new();
        let mut cursors = Vec::new();
        for ((_, id), cursor) in dirty.known.range((epoch, 0)..=(epoch, u32::MAX)) {
            let (cursor, next) = self.consume(*id, cursor.clone(), epoch, &mut keys)?;
            let generation = self.volume.cache.segments[*id as usize].generation.load(Ordering::Relaxed);
            cursors.push(Consumed { id: *id, generation, cursor, next });
        }
        drop(dirty);
        tracing::debug!(volume = self.volume.name, epoch, ?keys, "gathered");
        keys.sort_unstable_by_key(|(k, _): &(Key, u32)| k.version);
        let mut newest = ExtentMap::new();
        let mut replaced = Vec::new();
        for (key, id) in &keys {
            replaced.clear();
            let place = self.volume.cache.media.place(*id, key, true);
            newest.insert(Extent { range: key.range(), place }, &mut replaced);
        }
        let mut todo = VecDeque::new();
        newest.iter().for_each(|extent| cut(extent, &mut todo));
        Ok(Some(Round { todo, cursors, ..Round::empty(epoch) }))
    }

    /// The lowest epoch of any dirty record, after looking for new ones in open segments.
    fn lowest_epoch(&self, dirty: &mut DirtySegments) -> Result<Option<u64>, WalkError> {
        let tail = self.volume.core.tail.load(Ordering::SeqCst);
        for (id, cursor) in std::mem::take(&mut dirty.drained) {
            self.file(dirty, id, cursor, tail)?;
        }
        while let Some((&(epoch, id), _)) = dirty.known.first_key_value() {
            if epoch > tail {
                return Ok(Some(epoch));
            }
            // Left behind by relaxed rounds.
            let cursor = dirty.known.remove(&(epoch, id)).expect("it is the first");
            self.file(dirty, id, cursor, tail)?;
        }
        Ok(None)
    }

    /// Files a segment under the epoch of its next record above `tail`.
    fn file(&self, dirty: &mut DirtySegments, id: u32, cursor: Cursor, tail: u64) -> Result<(), WalkError> {
        // The state before the log: what is full by then has nothing to come.
        let state = self.volume.cache.segments[id as usize].state();
        match self.consume(id, cursor, tail, &mut Vec::new())? {
            (cursor, Some(next)) => _ = dirty.known.insert((next, id), cursor),
            (cursor @ Cursor::Log(_), None) if state == State::Open => {
                dirty.drained.insert(id, cursor);
            }
            _ => {}
        }
        Ok(())
    }

    /// Takes the dirty keys of epochs ≤ `upto`; returns where to go on and the next epoch there.
    fn consume(
        &self,
        id: u32,
        cursor: Cursor,
        upto: u64,
        keys: &mut Vec<(Key, u32)>,
    ) -> Result<(Cursor, Option<u64>), WalkError> {
        match cursor {
            Cursor::Keys(mut queue) => {
                while let Some(key) = queue.pop_front_if(|k| k.epoch <= upto) {
                    keys.push((key, id));
                }
                let next = queue.front().map(|k| k.epoch);
                Ok((Cursor::Keys(queue), next))
            }
            Cursor::Log(from) => {
                let segment = &self.volume.cache.segments[id as usize];
                let header = SegmentHeader {
                    incarnation: self.volume.core.incarnation,
                    generation: segment.generation.load(Ordering::Relaxed),
                    start_counter: segment.start_counter.load(Ordering::Relaxed),
                    ..SegmentHeader::default()
                };
                let low = segment.log_low.load(Ordering::Acquire);
                let (cursor, next) =
                    self.volume.cache.media.walk_from(id, &header, from, low, upto, |record| {
                        let dirty = record.keys.iter().filter(|k| k.kind != KeyKind::Fill);
                        keys.extend(dirty.map(|k| (*k, id)));
                    })?;
                Ok((Cursor::Log(cursor), next))
            }
        }
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
            Outcome::Waiting => {
                self.phase = Phase::Gathered(round, ticket);
                Progress::Waiting
            }
            Outcome::Failed => self.abort("the cache cannot be made durable".to_owned()),
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
        loop {
            if round.todo.is_empty() {
                if !self.sweep_on(&mut round) {
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
            let op = match self.next_op(&mut round) {
                Ok(Some(op)) => op,
                Ok(None) => continue,
                Err(error) => return self.abort(error),
            };
            let channel = self.channel.as_mut().expect("opened before the round");
            assert!(channel.submit(0, op).is_ok(), "fewer than the depth are in flight");
            add(&self.volume.core.tally.writeback_ops, 1);
        }
        let channel = self.channel.as_mut().expect("opened before the round");
        channel.kick();
        if channel.in_flight() > 0 {
            self.phase = Phase::Writing(round);
            return Progress::Waiting;
        }
        assert!(channel.submit(0, Op::Flush).is_ok(), "nothing is in flight");
        channel.kick();
        add(&self.volume.core.tally.writeback_flushes, 1);
        self.phase = Phase::Flushing(round);
        Progress::Waiting
    }

    /// Looks up more dirty extents for a relaxed round. False when there are no more.
    fn sweep_on(&mut self, round: &mut Round) -> bool {
        while let Some(from) = round.sweep {
            let mut found = Vec::new();
            round.sweep = self.volume.core.index.dirty_from(from, SWEEP, &mut found);
            found.into_iter().for_each(|extent| cut(extent, &mut round.todo));
            if !round.todo.is_empty() {
                return true;
            }
        }
        false
    }

    /// The next operation: a run of adjacent extents of one kind. `None` when damage has taken the run
    /// apart: what is good of it comes next.
    fn next_op(&mut self, round: &mut Round) -> Result<Option<Op>, String> {
        let first = *round.todo.front().expect("the caller looked");
        let longest = if first.place.zero { ZERO_SECTORS_MAX } else { WRITE_SECTORS_MAX };
        let mut run = Vec::new();
        let mut end = first.range.start;
        while let Some(extent) = round.todo.front() {
            let len = extent.range.end() - first.range.start;
            let joins = extent.range.start == end
                && extent.place.zero == first.place.zero
                && (!first.place.zero || extent.place.position % 2 == first.place.position % 2);
            if !joins || (len > longest && !run.is_empty()) {
                break;
            }
            end = extent.range.end();
            run.push(round.todo.pop_front().expect("it is there"));
        }
        let offset = first.range.start * 512;
        let sectors = end - first.range.start;
        if first.place.zero {
            round.written.extend_from_slice(&run);
            let unmap = self.volume.pass_discard && first.place.position % 2 == 1;
            return Ok(Some(Op::Zero { offset, len: sectors * 512, unmap }));
        }
        let mut buf = self.buffer(sectors as usize * 512);
        let mut at = 0;
        for extent in &run {
            let copied = self.volume.cache.copy_extent(extent, true, |offset, bytes| {
                buf[at + offset..][..bytes.len()].copy_from_slice(bytes);
                Ok(())
            });
            if copied.is_err() {
                self.set_aside(round, run)?;
                return Ok(None);
            }
            at += extent.range.len as usize * 512;
        }
        round.written.extend_from_slice(&run);
        Ok(Some(Op::Write { offset, buf }))
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
    fn reap(&mut self) -> Result<(), String> {
        let mut done = std::mem::take(&mut self.completions);
        if let Some(channel) = &mut self.channel {
            channel.reap(&mut done);
        }
        let mut result = Ok(());
        for completion in done.drain(..) {
            if let Err(error) = completion.result {
                result = Err(format!("the disk failed: {error}"));
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

    /// Ends a round that failed, after all of its operations have ended.
    fn abort(&mut self, error: String) -> Progress {
        while self.channel.as_ref().is_some_and(|c| c.in_flight() > 0) {
            if let Some(channel) = &mut self.channel {
                channel.kick();
                channel.wait(Duration::from_secs(1));
            }
            // Further failures of the same round say nothing new.
            drop(self.reap());
        }
        self.fail(error)
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

    fn flushed(&mut self, mut round: Round) -> Progress {
        if let Err(error) = self.list_lost(&mut round) {
            return self.fail(error);
        }
        // What is superseded must be durably dead as well: recovery ignores zeros below the tail,
        // and an older clean copy of those sectors would come back.
        let ticket = match self.volume.cache.write_liveness(None) {
            Ok(ticket) => ticket,
            Err(error) => return self.fail(format!("liveness words cannot be written: {error}")),
        };
        self.phase = Phase::MakingDurable(round, ticket);
        Progress::Did
    }

    fn media_done(&mut self, mut round: Round, ticket: Durable) -> Progress {
        let cache = self.volume.cache.clone();
        match cache.syncer.outcome(ticket) {
            Outcome::Waiting => {
                self.phase = Phase::MakingDurable(round, ticket);
                return Progress::Waiting;
            }
            Outcome::Failed => return self.fail("the cache cannot be made durable".to_owned()),
            Outcome::Reached => {}
        }
        let core = &self.volume.core;
        *lock(&core.lost) = round.damage.take_list();
        let next = lock(&core.tail_page).1;
        if let Err(error) = cache.write_tail(core, next, round.epoch) {
            return self.fail(format!("the tail cannot be written: {error}"));
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
            Outcome::Failed => return self.fail("the tail cannot be made durable".to_owned()),
            Outcome::Reached => {}
        }
        let core = &self.volume.core;
        if let Err(error) = cache.write_tail_again(core, round.epoch) {
            return self.fail(format!("the tail's second copy cannot be written: {error}"));
        }
        let mut written = 0;
        for extent in &round.written {
            core.index.mark_clean_if(*extent, true);
            written += extent.range.len;
        }
        add(&core.tally.written_back_sectors, written);
        self.lose(&round.damage);
        // Last: from then on reclaim may take the segments, and with them their cursors.
        let epoch = round.epoch;
        self.settle(round);
        core.tail.store(epoch, Ordering::SeqCst);
        let oldest = if core.is_clean() { 0 } else { cache.clock.now_ms().max(1) };
        core.dirty_since.store(oldest, Ordering::Relaxed);
        self.failures = 0;
        cache.housekeeper.raise();
        Progress::Did
    }

    /// Files the segments a round has consumed from.
    fn settle(&self, round: Round) {
        let core = &self.volume.core;
        let segments = &self.volume.cache.segments;
        let mut dirty = lock(&core.dirty);
        for Consumed { id, generation, cursor, next } in round.cursors {
            let segment = &segments[id as usize];
            let is_gone = matches!(segment.state(), State::Free | State::Reclaiming | State::Bad);
            if is_gone || segment.generation.load(Ordering::Relaxed) != generation {
                // Reclaim has taken its entries away; those there are now are of its next life.
                continue;
            }
            dirty.known.remove(&(round.epoch, id));
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
            segment.state() != State::Open && segment.max_epoch.load(Ordering::SeqCst) <= round.epoch
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

impl Round {
    fn empty(epoch: u64) -> Self {
        Self { epoch, ..Self::default() }
    }
}
