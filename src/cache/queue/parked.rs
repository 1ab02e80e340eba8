//! Operations that the disk failed and that are tried again, and those it has owed for too long.
//!
//! The laws are in `../failing.rs`. Here: one list of what waits for its next try, one alarm for the
//! earliest moment at which anything is to be done, and what a passed deadline does to each kind of
//! operation. Nothing of it is touched while the disk works.
//!
//! A late operation keeps its token, and with it its place in the channel, until it has ended; its purpose
//! is [`Purpose::Late`] from the deadline on. One that the channel had not taken yet never happens.

use super::super::counters::add;
use super::super::env::{Clock, Env};
use super::super::failing::{OnBackingError, is_lasting};
use super::super::health::Failure;
use super::super::worker::delay_within;
use super::Queue;
use super::io::Purpose;
use crate::backing::Op;
use crate::mutant::{Mutant, mutated};
use crate::sync::atomic::Ordering;
use crate::volume::{Buffer, Status};

/// Longest time between two tries: what a guest may lose when the disk works again.
const RETRY_MS_MAX: u64 = 2000;

/// An operation that waits for its next try.
pub(crate) struct Parked {
    due_ms: u64,
    /// Tries so far.
    tries: u32,
    purpose: Purpose,
    op: Op,
}

impl Parked {
    pub fn into_purpose(self) -> Purpose {
        self.purpose
    }
}

impl<E: Env, B: Buffer> Queue<E, B> {
    /// The disk failed an operation, for the first time or again. `Some` gives it back: the failure is
    /// the guest's.
    pub(super) fn take_failure(
        &mut self,
        purpose: Purpose,
        tries: u32,
        op: Op,
        error: &std::io::Error,
    ) -> Option<(Purpose, Op)> {
        // A guest must not be able to fill the log: the volume's state says it once.
        tracing::debug!(volume = self.volume.name, %error, ?purpose, "the backing disk failed");
        add(&self.shared().tally.disk_errors, 1);
        let now_ms = self.volume.cache.clock.now_ms();
        let core = &self.volume.core;
        core.facts.guest_failed(Failure::disk(&op, error), now_ms);
        if !is_lasting(error) {
            core.policy.note_guest_failed(now_ms);
        }
        if core.policy.on_error() != OnBackingError::Wait
            || is_lasting(error)
            || matches!(purpose, Purpose::Late { .. })
            || (op_is_flush(&op) && !mutated(Mutant::FailedFlushRetried))
        {
            return Some((purpose, op));
        }
        self.park_io(purpose, tries, op, now_ms);
        None
    }

    /// Puts an operation off.
    pub(super) fn park_io(&mut self, purpose: Purpose, tries: u32, op: Op, now_ms: u64) {
        add(&self.shared().tally.disk_retries, 1);
        let due_ms = now_ms + delay_within(RETRY_MS_MAX, tries, self.volume.core.incarnation ^ now_ms);
        self.io.parked.push(Parked { due_ms, tries: tries + 1, purpose, op });
        self.set_alarm();
    }

    /// Sets the alarm for what comes first: a next try, or a deadline.
    pub(super) fn set_alarm(&self) {
        let deadline = self.volume.core.policy.deadline_ms();
        let tries = self.io.parked.iter().map(|p| p.due_ms).min();
        let oldest = [self.io.oldest_owed_ms(), self.bypass.oldest_blocked_ms()].into_iter().flatten().min();
        let ends = deadline.and_then(|ms| oldest.map(|since| since + ms));
        self.shared().alarm.set([tries, ends].into_iter().flatten().min());
    }

    /// Does what the alarm was set for, if it has rung.
    pub(super) fn hear_alarm(&mut self) {
        if !self.shared().alarm.is_heard() {
            return;
        }
        let now_ms = self.volume.cache.clock.now_ms();
        if self.volume.core.policy.on_error() == OnBackingError::Wait {
            for Parked { tries, purpose, op, .. } in
                self.io.parked.extract_if(.., |p| p.due_ms <= now_ms).collect::<Vec<_>>()
            {
                self.try_again(purpose, tries, op);
            }
        } else {
            self.fail_parked();
        }
        if let Some(deadline) = self.volume.core.policy.deadline_ms() {
            self.expire(now_ms.saturating_sub(deadline));
        }
        self.set_alarm();
    }

    fn try_again(&mut self, purpose: Purpose, tries: u32, op: Op) {
        if let Err((purpose, op)) = self.submit_try(purpose, op, tries) {
            let now_ms = self.volume.cache.clock.now_ms();
            self.park_io(purpose, tries, op, now_ms);
        }
    }

    /// Ends what waits for the disk to work again, with an error.
    pub(super) fn fail_parked(&mut self) {
        for Parked { purpose, op, .. } in std::mem::take(&mut self.io.parked) {
            self.io_ended(purpose, op, false);
        }
    }

    /// Ends, for the guest, what the disk has owed since `since_ms` or longer.
    fn expire(&mut self, since_ms: u64) {
        for token in self.io.owed_since(since_ms) {
            match self.io.make_late(token) {
                None => {}
                Some((Purpose::Miss { slot, range, fill, joined }, _)) => {
                    self.count_expired();
                    self.drop_placeholder(fill.map(|f| f.0), range);
                    self.part_done(slot, false);
                    // From before there was a deadline: theirs is their own.
                    joined.into_iter().for_each(|joined| self.read_disk(joined, None));
                }
                Some((Purpose::Bypass { slot }, is_out)) => self.expire_bypass(token, is_out, slot),
                Some((Purpose::BypassFlush { slot }, _)) => {
                    self.count_expired();
                    self.bypass_flushed(slot, false);
                }
                Some((Purpose::Flush { slot }, _)) => {
                    self.count_expired();
                    self.part_done(slot, false);
                }
                Some((Purpose::Late { .. }, _)) => unreachable!("it is late once"),
            }
        }
        for slot in self.bypass.take_blocked(since_ms) {
            self.count_expired();
            self.complete(slot, Status::IoError);
        }
    }

    fn count_expired(&self) {
        add(&self.shared().tally.deadline_errors, 1);
    }

    /// Ends a write around the cache for the guest. Its registration stays with what of it the disk
    /// still has.
    fn expire_bypass(&mut self, first: u32, is_out: bool, slot: u32) {
        self.count_expired();
        let name = self.bypass.next_late();
        let mut out = u32::from(is_out);
        if is_out {
            self.io.name_late(first, name);
        }
        for token in self.io.tokens_of_bypass(slot) {
            if let Some((_, true)) = self.io.make_late(token) {
                self.io.name_late(token, name);
                out += 1;
            }
        }
        // What was to be tried again under another policy.
        self.io.parked.retain(|p| !matches!(p.purpose, Purpose::Bypass { slot: other } if other == slot));
        let keeps = out > 0 && !mutated(Mutant::LateWriteForgotten);
        if let Some((ticket, range)) = self.bypass.make_late(slot, name, if keeps { out } else { 0 }) {
            self.volume.core.stripes.remove(ticket, range);
            self.volume.core.wake_waiting();
        }
        self.slots.get(slot).left = 1;
        self.part_done(slot, false);
    }

    /// A late operation has ended, well or not.
    pub(super) fn late_ended(&mut self, name: Option<u64>) {
        if let Some((ticket, range)) = name.and_then(|name| self.bypass.late_ended(name)) {
            self.volume.core.stripes.remove(ticket, range);
            self.volume.core.wake_waiting();
        }
    }

    /// The queue is to stop, and nobody would submit again what it leaves: what waits for the disk to
    /// work again ends with an error.
    pub(super) fn give_up_waiting(&mut self) {
        self.fail_parked();
        let core = &self.volume.core;
        let waits = self.shared().waiting.load(Ordering::SeqCst);
        if waits && core.policy.is_failing(|| self.volume.cache.clock.now_ms()) {
            self.fail_gathered();
        }
    }
}

fn op_is_flush(op: &Op) -> bool {
    matches!(op, Op::Flush)
}
