//! One virtqueue's way into the engine.
//!
//! Everything a request needs happens on the queue's own thread: writes and hits in batches, misses
//! and bypasses through the queue's own io_uring. Nothing here blocks: a request that has to wait
//! (for space, for durability, for the disk, for an overlapping bypass) is parked on a list, and
//! [`Queue::poll`] goes on with it after the waker was signalled.
//!
//! Invariants:
//! - A submitted request is in `slots` until it is in `done`, and in `done` exactly once.
//! - Positions looked up in the index are used only inside a section ([`Queue::enter`]); reclaim
//!   waits for the section to end before it reuses a segment.

mod bypass;
mod fill;
mod io;
mod parked;
mod read;
mod sequential;
mod throttle;
mod write;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use self::fill::Fill;
use self::io::Io;
pub(crate) use self::read::{HitError, Reader};
use self::sequential::Sequential;
use self::throttle::{Throttle, Wait};
use self::write::{Gathered, Scratch};
use super::counters::add;
use super::env::{Clock, Env};
use super::index::Extent;
use super::latency::{SAMPLE_EVERY, Stage};
use super::stripes::lock;
use super::syncer::{Durable, Outcome};
use super::volume::{QueueShared, Volume};
use crate::mutant::{Mutant, mutated};
use crate::sync::atomic::Ordering;
use crate::units::SectorRange;
use crate::volume::{Buffer, DiskQueue, Done, Request, RequestKind, Status};
use crate::wake::Waker;

/// A request under way.
pub(crate) struct Active<B> {
    pub request: Request<B>,
    /// Disk operations it still waits for, plus one while it is being taken apart.
    pub left: u32,
    pub failed: bool,
    /// Whether it has asked the disk for something.
    pub asked_disk: bool,
    /// When it was submitted, of one that is timed; else 0.
    pub since_ns: u64,
}

/// Requests under way by slot; slots are reused, so nothing is allocated in a steady state.
pub(crate) struct Slots<B> {
    slots: Vec<Option<Active<B>>>,
    free: Vec<u32>,
    used: usize,
}

impl<B> Slots<B> {
    fn insert(&mut self, request: Request<B>) -> u32 {
        let active = Some(Active { request, left: 0, failed: false, asked_disk: false, since_ns: 0 });
        self.used += 1;
        if let Some(slot) = self.free.pop() {
            self.slots[slot as usize] = active;
            return slot;
        }
        self.slots.push(active);
        (self.slots.len() - 1) as u32
    }

    pub fn get(&mut self, slot: u32) -> &mut Active<B> {
        self.slots[slot as usize].as_mut().expect("a slot named by a list is in use")
    }

    fn take(&mut self, slot: u32) -> Active<B> {
        self.used -= 1;
        self.free.push(slot);
        self.slots[slot as usize].take().expect("a slot is completed once")
    }
}

/// What to do once a ticket is durable.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Then {
    /// The request is complete.
    Complete(u32),
    /// The FLUSH is complete: raise the epoch first.
    Flushed(u32),
    /// The cached copies are dead: write to the disk.
    Bypass(u32),
}

/// See the module's head.
pub struct Queue<E: Env, B: Buffer> {
    pub(crate) volume: Arc<Volume<E>>,
    pub(crate) index: u16,
    pub(crate) waker: Waker,
    pub(crate) slots: Slots<B>,
    /// Reads not yet looked up, in order of arrival.
    reads: Vec<(u32, SectorRange)>,
    /// Writes and zeroes not yet committed, in order of arrival.
    pub(crate) gather: VecDeque<Gathered>,
    flushes: Vec<u32>,
    pub(crate) waiting_sync: VecDeque<(Durable, Then)>,
    pub(crate) fills: VecDeque<Fill>,
    pub(crate) bypass: bypass::Bypasses,
    pub(crate) io: Io<E>,
    pub(crate) scratch: Scratch,
    pub(crate) found: Vec<Extent>,
    /// What the index shows of the read that comes next.
    found_ahead: Vec<Extent>,
    pub(crate) gaps: Vec<SectorRange>,
    sequential: Sequential,
    throttle: Throttle,
    /// What its writes wait for, and since when in clock µs.
    waits_for: Option<(Wait, u64)>,
    done: Vec<Done<B>>,
    inside: bool,
    /// Requests until the next that is timed.
    until_sample: u32,
    /// Whether a write that is timed is gathered.
    has_sample_gathered: bool,
}

impl<E: Env, B: Buffer> Queue<E, B> {
    pub(crate) fn open(volume: Arc<Volume<E>>, index: u16, waker: Waker) -> std::io::Result<Self> {
        let shared = volume.core.queue(index);
        if shared.taken.swap(true, Ordering::SeqCst) {
            return Err(std::io::Error::other(format!("queue {index} is in use")));
        }
        *lock(&shared.waker) = waker.clone();
        shared.latencies.prepare();
        Ok(Self {
            index,
            waker,
            slots: Slots { slots: Vec::new(), free: Vec::new(), used: 0 },
            reads: Vec::new(),
            gather: VecDeque::new(),
            flushes: Vec::new(),
            waiting_sync: VecDeque::new(),
            fills: VecDeque::new(),
            bypass: bypass::Bypasses::default(),
            io: Io::default(),
            scratch: Scratch::new(),
            found: Vec::new(),
            found_ahead: Vec::new(),
            gaps: Vec::new(),
            sequential: Sequential::default(),
            throttle: Throttle::default(),
            waits_for: None,
            done: Vec::new(),
            inside: false,
            until_sample: 1,
            has_sample_gathered: false,
            volume,
        })
    }

    pub(crate) fn shared(&self) -> &QueueShared {
        self.volume.core.queue(self.index)
    }

    /// Begins a section: from here on the thread may hold positions.
    pub(crate) fn enter(&mut self) {
        if !self.inside {
            self.inside = true;
            self.shared().enter();
        }
    }

    /// Ends the section. Stores made in it have been fenced by each record's persist.
    fn leave(&mut self) {
        if self.inside {
            self.inside = false;
            self.shared().leave();
        }
    }

    /// Hands a request back.
    pub(crate) fn complete(&mut self, slot: u32, status: Status) {
        if status != Status::Ok {
            add(&self.shared().tally.errors, 1);
        }
        let active = self.slots.take(slot);
        if active.since_ns != 0 {
            self.timed(&active);
        }
        self.done.push(Done { tag: active.request.tag, status, data: active.request.data });
    }

    /// Notes when a request was submitted, of one in so many.
    fn sample(&mut self, slot: u32) {
        self.until_sample -= 1;
        if self.until_sample == 0 {
            self.until_sample = SAMPLE_EVERY;
            self.slots.get(slot).since_ns = self.volume.cache.clock.now_ns().max(1);
        }
    }

    /// Counts how long a request took.
    #[cold]
    fn timed(&self, active: &Active<B>) {
        let stage = match (active.request.kind, active.asked_disk) {
            (RequestKind::Read, false) => Stage::ReadHit,
            (RequestKind::Read, true) => Stage::ReadMiss,
            (RequestKind::Write, false) => Stage::Write,
            (RequestKind::Write, true) => Stage::WriteAround,
            (RequestKind::Discard { .. } | RequestKind::WriteZeroes { .. }, _) => Stage::Discard,
            (RequestKind::Flush, _) => Stage::Flush,
        };
        let now_ns = self.volume.cache.clock.now_ns();
        self.shared().latencies.record(stage, now_ns.saturating_sub(active.since_ns));
    }

    /// One part of a request has ended; completes it when it was the last.
    pub(crate) fn part_done(&mut self, slot: u32, ok: bool) {
        let active = self.slots.get(slot);
        active.failed |= !ok;
        active.left -= 1;
        if active.left == 0 || mutated(Mutant::CompletedWithFirstPart) {
            let status = if active.failed { Status::IoError } else { Status::Ok };
            self.complete(slot, status);
        }
    }

    /// The sectors a request names, `None` when it names none it may.
    fn range_of(&self, request: &Request<B>) -> Option<SectorRange> {
        let sectors = match request.kind {
            RequestKind::Read | RequestKind::Write => {
                let bytes = request.data.len() as u64;
                bytes.is_multiple_of(512).then_some(bytes / 512)?
            }
            RequestKind::Discard { sectors } | RequestKind::WriteZeroes { sectors, .. } => sectors,
            RequestKind::Flush => return None,
        };
        let end = request.sector.checked_add(sectors)?;
        let block = self.volume.block_sectors();
        let aligned = request.sector.is_multiple_of(block) && sectors.is_multiple_of(block);
        (sectors > 0 && end <= self.volume.sectors() && aligned)
            .then(|| SectorRange::new(request.sector, sectors))
    }

    /// Begins a request that names sectors it may; `is_through` if the guest had no write cache when it
    /// was submitted.
    fn start(&mut self, slot: u32, range: SectorRange, kind: RequestKind, is_through: bool) {
        if kind == RequestKind::Read {
            return self.gather_read(slot, range);
        }
        if self.volume.config.read_only || self.volume.turns_away(self.index) {
            return self.complete(slot, Status::IoError);
        }
        self.gather_write(slot, range, kind, is_through);
    }

    fn submit_flush(&mut self, slot: u32) {
        add(&self.shared().tally.flushes, 1);
        self.flushes.push(slot);
    }

    /// FLUSH covers what completed before it was submitted; all of that is stable by now.
    fn start_flushes(&mut self) {
        let mut flushes = std::mem::take(&mut self.flushes);
        for slot in flushes.drain(..) {
            if self.volume.mode().bypasses() {
                self.start_disk_flush(slot);
                continue;
            }
            if self.volume.cache.syncer.has_failed() {
                self.complete(slot, Status::IoError);
                continue;
            }
            let cache = &self.volume.cache;
            let ticket = cache.syncer.request(&*cache.media.pmem, Some(&self.waker));
            self.when_durable(ticket, Then::Flushed(slot));
        }
        self.flushes = flushes;
    }

    /// Goes on with `then` once `ticket` is durable: now, if it is already.
    pub(crate) fn when_durable(&mut self, ticket: Durable, then: Then) {
        match self.volume.cache.syncer.outcome(ticket) {
            Outcome::Waiting => self.waiting_sync.push_back((ticket, then)),
            decided => self.go_on(then, decided == Outcome::Reached),
        }
    }

    fn go_on(&mut self, then: Then, durable: bool) {
        let status = if durable { Status::Ok } else { Status::IoError };
        match then {
            Then::Complete(slot) => self.complete(slot, status),
            Then::Flushed(slot) => {
                if !mutated(Mutant::EpochNotRaisedAtFlush) {
                    self.volume.core.raise_epoch();
                }
                self.complete(slot, status);
            }
            Then::Bypass(slot) => self.bypass_killed(slot, durable),
        }
    }

    fn poll_sync(&mut self) {
        while let Some(&(ticket, then)) = self.waiting_sync.front() {
            match self.volume.cache.syncer.outcome(ticket) {
                Outcome::Waiting => return,
                decided => {
                    self.waiting_sync.pop_front();
                    if mutated(Mutant::FlushNeverCompletes) {
                        continue;
                    }
                    self.go_on(then, decided == Outcome::Reached);
                }
            }
        }
    }
}

impl<E: Env, B: Buffer> DiskQueue<B> for Queue<E, B> {
    fn submit(&mut self, request: Request<B>) {
        let range = self.range_of(&request);
        let kind = request.kind;
        let empty = matches!(kind, RequestKind::Read | RequestKind::Write) && request.data.is_empty();
        let slot = self.slots.insert(request);
        self.sample(slot);
        let range = match (kind, range) {
            (RequestKind::Flush, _) => return self.submit_flush(slot),
            (_, Some(range)) => range,
            (_, None) => {
                return self.complete(slot, if empty { Status::Ok } else { Status::IoError });
            }
        };
        if !self.holds_back_request(slot, range, kind) {
            let is_through = !self.volume.has_write_cache();
            self.start(slot, range, kind, is_through);
        }
    }

    fn commit(&mut self) {
        self.enter();
        self.start_reads();
        // Asked with the section open: whoever holds writes waits for its end.
        if !self.volume.holds_back(&self.shared().waiting) {
            if self.volume.mode().bypasses() {
                self.start_bypasses();
            } else {
                self.gather_blocked();
                self.commit_writes();
            }
        }
        self.commit_fills();
        self.start_flushes();
        self.io.kick();
        self.leave();
    }

    fn poll(&mut self, done: &mut Vec<Done<B>>) {
        self.reap();
        self.hear_alarm();
        self.poll_sync();
        let has_gathered = self.start_held() || !self.reads.is_empty() || !self.gather.is_empty();
        if has_gathered || !self.fills.is_empty() || self.bypass.is_blocked() {
            self.commit();
        }
        self.io.kick();
        done.append(&mut self.done);
    }

    fn pending(&self) -> usize {
        self.slots.used + self.done.len()
    }

    fn is_busy(&self) -> bool {
        self.pending() > 0 || self.io.has_late()
    }

    fn due_in(&self) -> Option<Duration> {
        self.held_due_in()
    }

    fn hasten(&mut self) {
        self.end_throttle();
    }

    fn park(&mut self) {
        self.leave();
        // A flush of this core's stores is ordered by nobody else's fence.
        crate::pmem::Pmem::fence(&*self.volume.cache.media.pmem);
    }

    fn give_up(&mut self) {
        self.give_up_waiting();
    }

    fn leave_behind(mut self) {
        self.leave_io();
    }
}

impl<E: Env, B: Buffer> Drop for Queue<E, B> {
    fn drop(&mut self) {
        if self.io.has_late() {
            // Nobody waits for them; the end of the channel would.
            self.leave_io();
        }
        self.abandon();
        self.leave();
        let shared = self.shared();
        shared.owed.set(None);
        shared.alarm.set(None);
        *lock(&shared.waker) = Waker::default();
        shared.waiting.store(false, Ordering::SeqCst);
        shared.taken.store(false, Ordering::SeqCst);
    }
}
