//! Requests that a limit of their volume holds back (`../limits.rs`), and how long writes wait for what.
//!
//! A request that comes too early keeps its slot and waits here, reads and all others in a list each: in a
//! list moments never fall, so only the first ones are looked at. The front end asks [`Queue::held_due_in`] how
//! long it may sleep.

use std::collections::VecDeque;
use std::time::Duration;

use super::super::counters::add;
use super::super::env::{Clock, Env};
use super::super::limits::{Start, Why};
use super::Queue;
use crate::units::SectorRange;
use crate::volume::{Buffer, RequestKind};

/// A request that is not to start yet.
struct Held {
    slot: u32,
    range: SectorRange,
    kind: RequestKind,
    /// Whether the guest had no write cache when it came.
    is_through: bool,
    came_us: u64,
    start: Start,
}

/// What is held back, in order.
#[derive(Default)]
pub(super) struct Throttle {
    reads: VecDeque<Held>,
    others: VecDeque<Held>,
    /// The limits by which they were given their moments.
    generation: u64,
    /// Whether the queue is to stop: nothing is held back any more.
    is_over: bool,
}

impl Throttle {
    fn is_empty(&self) -> bool {
        self.reads.is_empty() && self.others.is_empty()
    }

    fn list(&mut self, kind: RequestKind) -> &mut VecDeque<Held> {
        if kind == RequestKind::Read { &mut self.reads } else { &mut self.others }
    }
}

/// What keeps a queue's writes from going on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wait {
    /// The disk's pace.
    Pace,
    /// Space.
    Space,
}

impl<E: Env, B: Buffer> Queue<E, B> {
    /// Whether a request has to wait; if so it is held.
    pub(super) fn holds_back_request(&mut self, slot: u32, range: SectorRange, kind: RequestKind) -> bool {
        let limiter = &self.volume.limiter;
        if self.throttle.is_over || (!limiter.is_on() && self.throttle.is_empty()) {
            return false;
        }
        let now_us = self.volume.cache.clock.now_us();
        self.judge_held_anew(now_us);
        let start = self.volume.limiter.charge(kind, range.len, now_us);
        let is_through = !self.volume.has_write_cache();
        let list = self.throttle.list(kind);
        if start.at_us <= now_us && list.is_empty() {
            return false;
        }
        list.push_back(Held { slot, range, kind, is_through, came_us: now_us, start });
        add(&self.shared().tally.limit_waits, 1);
        true
    }

    /// Gives what is held other moments, if the limits have changed since.
    fn judge_held_anew(&mut self, now_us: u64) {
        let generation = self.volume.limiter.generation();
        if std::mem::replace(&mut self.throttle.generation, generation) == generation {
            return;
        }
        let Self { volume, throttle, .. } = self;
        for held in throttle.reads.iter_mut().chain(&mut throttle.others) {
            held.start = volume.limiter.charge(held.kind, held.range.len, now_us);
        }
    }

    /// Starts the held requests whose moment has come. Says whether there were any.
    pub(super) fn start_held(&mut self) -> bool {
        if self.throttle.is_empty() {
            return false;
        }
        let now_us = self.volume.cache.clock.now_us();
        self.judge_held_anew(now_us);
        let mut has_started = false;
        for kind in [RequestKind::Read, RequestKind::Write] {
            while let Some(held) = self.throttle.list(kind).front()
                && (held.start.at_us <= now_us || self.throttle.is_over)
            {
                let Some(held) = self.throttle.list(kind).pop_front() else { break };
                let tally = &self.shared().tally;
                let counter = match held.start.why {
                    Why::Iops => &tally.limit_iops_wait_us,
                    Why::Bytes => &tally.limit_bytes_wait_us,
                };
                add(counter, now_us.saturating_sub(held.came_us));
                self.start(held.slot, held.range, held.kind, held.is_through);
                has_started = true;
            }
        }
        has_started
    }

    /// In how long the next held request is to start.
    pub(super) fn held_due_in(&self) -> Option<Duration> {
        let fronts = [self.throttle.reads.front(), self.throttle.others.front()];
        let due_us = fronts.into_iter().flatten().map(|held| held.start.at_us).min()?;
        Some(Duration::from_micros(due_us.saturating_sub(self.volume.cache.clock.now_us())))
    }

    /// Holds nothing back from now on.
    pub(super) fn end_throttle(&mut self) {
        self.throttle.is_over = true;
    }

    /// Notes what the writes wait for from now on.
    pub(super) fn note_wait(&mut self, wait: Option<Wait>) {
        if wait.is_none() && self.waits_for.is_none() {
            return;
        }
        let now_us = self.volume.cache.clock.now_us();
        if let Some((before, since_us)) = self.waits_for.take() {
            let tally = &self.shared().tally;
            let counter = match before {
                Wait::Pace => &tally.pace_wait_us,
                Wait::Space => &tally.space_wait_us,
            };
            add(counter, now_us.saturating_sub(since_us));
        }
        self.waits_for = wait.map(|wait| (wait, now_us));
    }
}
