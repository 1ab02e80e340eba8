//! When a round begins, and in which order: age, idleness and space; changes of order.
//!
//! Laws:
//! - To an order that promises less: the descriptor says so durably before the first round that is.
//! - From `relaxed`, or to `grouped`: relocation honours the new order first. What it dropped before,
//!   and what a relaxed round has written, is of no later epoch than the present one. So from then on
//!   rounds are strict, and when the tail has reached that epoch the disk alone is consistent; then the
//!   new order holds, durably said.
//! - Another order than its group's ends a volume's membership, durably, before anything else.
//! - The disk alone is never said to be younger than it is: what counts is when the oldest data came
//!   that it has not.

use super::super::super::env::{Clock, Env};
use super::super::super::stripes::lock;
use super::super::super::volume::{Order, Volume, VolumeCore};
use super::{DEPTH, Writeback};
use crate::sync::atomic::Ordering;

/// Dirty data older than this is written back even when nothing presses, unless a longer lag is
/// allowed.
const AGE_MS_MAX: u64 = 2000;
/// A guest that has asked for nothing for so long is idle: its dirty data is written back at once,
/// unless a longer lag is allowed.
const IDLE_MS: u64 = 1000;
/// Operations in flight beside a guest's misses, without and with space being short.
const DEPTH_BESIDE_MISSES: [usize; 2] = [4, 16];

/// What a worker remembers to judge when to begin.
#[derive(Default)]
pub(super) struct When {
    /// The epoch that was current when dirty data grew too old, and when that was: rounds go on until
    /// it is reached.
    overdue: u64,
    overdue_ms: u64,
    /// Requests of the guest at the last look, and when there was one last.
    requests: u64,
    active_ms: u64,
    /// The order that is to hold once the tail has reached an epoch.
    switching: Option<(Order, u64)>,
}

/// What is asked of a volume's write-back while it runs. Written by whoever controls it.
#[derive(Debug, Default)]
pub(crate) struct Wishes {
    /// Longest age of data that is not on the disk, in milliseconds; 0 for no wish.
    pub max_lag_ms: crate::sync::atomic::AtomicU64,
    /// Most dirty bytes; 0 for no wish.
    pub max_dirty: crate::sync::atomic::AtomicU64,
    /// Bytes of groups that go side by side, whatever disks they lie on; 0 to see where that pays.
    pub group_bytes: crate::sync::atomic::AtomicU64,
    /// The order to change to, by its code and 1; 0 for none.
    pub order: crate::sync::atomic::AtomicU8,
    /// The epoch that a checkpoint waits for, and 1; 0 for none (`hold.rs`).
    pub checkpoint: crate::sync::atomic::AtomicU64,
    /// The same of the checkpoint that is reached; an older one's says nothing of a newer one.
    pub reached: crate::sync::atomic::AtomicU64,
}

impl<E: Env> Writeback<E> {
    /// Whether a round is to begin now.
    pub(super) fn is_time(&mut self, now: u64) -> bool {
        let volume = self.volume.clone();
        let core = &volume.core;
        let age = now.saturating_sub(core.dirty_since.load(Ordering::Relaxed));
        let is_idle = self.is_idle(now);
        let is_old = match volume.wishes.max_lag_ms.load(Ordering::Relaxed) {
            0 => age >= AGE_MS_MAX || is_idle,
            lag => match core.pacer.time_to_write(core.index.dirty_sectors() * 512) {
                // What the disk takes will show.
                None => age >= lag / 3,
                // A relaxed round also takes half of what comes while it lasts: twice as long if the
                // guest is as fast as the disk.
                Some(ms) => age + 2 * ms >= lag,
            },
        };
        if is_old && core.tail.load(Ordering::SeqCst) >= self.when.overdue {
            self.when.overdue = core.epoch();
            self.when.overdue_ms = now;
        }
        is_old
            || volume.draining.load(Ordering::SeqCst)
            || volume.cache.is_pressed()
            || volume.is_round_due()
            || self.owes_part()
            || self.is_called()
            || core.tail.load(Ordering::SeqCst) < volume.wanted.load(Ordering::SeqCst)
            || self.when.switching.is_some()
            || volume.wishes.checkpoint.load(Ordering::SeqCst) > 0
            || core.damage_seen.load(Ordering::Relaxed)
    }

    /// Whether somebody waits for dirty data to be on the disk, or for the space that it takes.
    pub(super) fn is_waited_for(&self) -> bool {
        let (volume, core) = (&self.volume, &self.volume.core);
        volume.draining.load(Ordering::SeqCst)
            || core.is_paced()
            || volume.cache.is_pressed()
            || core.tail.load(Ordering::SeqCst) < volume.wanted.load(Ordering::SeqCst)
    }

    fn is_idle(&mut self, now: u64) -> bool {
        let queues = self.volume.core.queues.iter();
        let count = |q: &super::super::super::volume::QueueShared| {
            [&q.tally.reads, &q.tally.writes, &q.tally.discards]
                .map(|n| n.load(Ordering::Relaxed))
                .iter()
                .sum::<u64>()
        };
        let requests = queues.map(count).sum();
        if requests != self.when.requests {
            (self.when.requests, self.when.active_ms) = (requests, now);
        }
        now.saturating_sub(self.when.active_ms) >= IDLE_MS
    }

    /// Operations that may be in flight: a guest that waits for the disk comes first.
    pub(super) fn depth(&self) -> usize {
        let core = &self.volume.core;
        let waits = core.queues.iter().any(|q| q.owed.since_ms().is_some());
        match waits {
            true => {
                DEPTH_BESIDE_MISSES
                    [usize::from(core.is_paced() || self.volume.draining.load(Ordering::Relaxed))]
            }
            false => DEPTH as usize,
        }
    }

    /// A round has moved the tail to `epoch`: since when what is dirty now has been.
    pub(super) fn note_age(&self, epoch: u64) {
        let core = &self.volume.core;
        if core.is_clean() {
            core.dirty_since.store(0, Ordering::Relaxed);
        } else if epoch >= self.when.overdue && self.when.overdue > 0 {
            // Only what came after that epoch began is left. A guest that flushes often leaves many
            // epochs behind it, and they are all as old as the first.
            core.dirty_since.store(self.when.overdue_ms.max(1), Ordering::Relaxed);
        }
    }

    /// Before a round, with nothing on its way: changes the order if that is asked for, and possible yet.
    /// False when it could not be written down; it is tried again.
    pub(super) fn change_order(&mut self) -> bool {
        let volume = self.volume.clone();
        let core = &volume.core;
        if let Some((order, epoch)) = self.when.switching
            && (core.tail.load(Ordering::SeqCst) >= epoch || core.is_clean())
        {
            let from = core.tail.load(Ordering::SeqCst);
            if volume.write_order(order, Some(from)).is_err() {
                return false;
            }
            volume.set_order(order);
            self.when.switching = None;
        }
        let wish = volume.wishes.order.load(Ordering::SeqCst);
        let Some(order) = wish.checked_sub(1).and_then(Order::from_code) else { return true };
        if volume.order() == Order::Grouped && order == Order::Strict && self.owes_part() {
            // The disk is beyond the tail: strict rounds would take parts of it back.
            return true;
        }
        let is_written = self.take_up(order);
        if is_written {
            // A wish that came meanwhile stays.
            _ = volume.wishes.order.compare_exchange(wish, 0, Ordering::SeqCst, Ordering::SeqCst);
        }
        is_written
    }

    fn take_up(&mut self, order: Order) -> bool {
        let volume = self.volume.clone();
        let core = &volume.core;
        let pending = self.when.switching.map(|(order, _)| order);
        if pending.unwrap_or(volume.order()) == order {
            return true;
        }
        if volume.leave_group().is_err() {
            return false;
        }
        self.forget_parts();
        self.when.switching = None;
        let is_weaker = order == Order::Relaxed || volume.order() == Order::Grouped;
        if is_weaker && pending.is_none() {
            if volume.write_order(order, None).is_err() {
                return false;
            }
            volume.set_order(order);
            core.keep_for(order);
            return true;
        }
        {
            // Relocation holds the plan from its look at the order to its last drop.
            let _plan = lock(&core.plan);
            core.keep_for(order);
        }
        core.raise_epoch();
        self.when.switching = Some((order, core.epoch()));
        true
    }

    /// The order of the next round.
    pub(super) fn round_order(&self) -> Order {
        if self.when.switching.is_some() { Order::Strict } else { self.volume.order() }
    }
}

/// Why the order of write-back cannot be changed.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// No place for groups.
    #[error("volume `{0}` has no redo area: attach it with one (--redo) to serve it in grouped order")]
    NoRedo(String),
}

impl<E: Env> Volume<E> {
    /// Whether [`Volume::change_order`] would be taken up.
    ///
    /// # Errors
    /// Why not.
    pub fn may_change_order(&self, order: Order) -> Result<(), OrderError> {
        match (order, &self.redo) {
            (Order::Grouped, None) => Err(OrderError::NoRedo(self.name.clone())),
            _ => Ok(()),
        }
    }

    /// Asks for another order of write-back, while the guest goes on. The volume is in that order when
    /// [`Volume::order`] says so and [`Volume::is_changing_order`] does not: from `relaxed` that takes
    /// as long as bringing what is dirty now to the disk.
    ///
    /// # Errors
    /// [`OrderError`]; nothing has been changed.
    pub fn change_order(&self, order: Order) -> Result<(), OrderError> {
        self.may_change_order(order)?;
        self.wishes.order.store(order as u8 + 1, Ordering::SeqCst);
        self.core.writeback.raise();
        Ok(())
    }

    /// Whether a change of order is under way.
    pub fn is_changing_order(&self) -> bool {
        self.wishes.order.load(Ordering::SeqCst) > 0 || self.core.kept_for() != self.order()
    }

    /// Bounds the age of what the disk alone has not, in milliseconds, and lets write-back wait that
    /// long; 0 for neither. A disk that is too slow for what the guest writes slows the guest down.
    pub fn set_max_lag_ms(&self, ms: u64) {
        self.wishes.max_lag_ms.store(ms, Ordering::Relaxed);
        self.core.writeback.raise();
    }

    /// Bounds the dirty bytes; 0 for by space alone.
    pub fn set_max_dirty(&self, bytes: u64) {
        self.wishes.max_dirty.store(bytes, Ordering::Relaxed);
        self.core.writeback.raise();
    }

    /// Makes groups of about so many bytes, and lets each be journaled while the one before goes to the
    /// disk, wherever the two lie; 0 for where that pays, which is the default. For simulations.
    pub fn set_group_bytes(&self, bytes: u64) {
        self.wishes.group_bytes.store(bytes, Ordering::Relaxed);
    }

    /// What [`Volume::set_max_lag_ms`] has set.
    pub fn max_lag_ms(&self) -> u64 {
        self.wishes.max_lag_ms.load(Ordering::Relaxed)
    }

    /// What [`Volume::set_max_dirty`] has set.
    pub fn max_dirty(&self) -> u64 {
        self.wishes.max_dirty.load(Ordering::Relaxed)
    }

    /// How old the disk alone is, in milliseconds: what came earlier is all there. 0 where nothing is
    /// dirty.
    pub fn lag_ms(&self) -> u64 {
        let core = &self.core;
        if core.is_clean() {
            return 0;
        }
        let (tail, time_ms) = *lock(&core.recovered_tail);
        if time_ms > 0 && core.tail.load(Ordering::SeqCst) == tail {
            return self.cache.clock.unix_ms().saturating_sub(time_ms);
        }
        match core.dirty_since.load(Ordering::Relaxed) {
            0 => 0,
            since => self.cache.clock.now_ms().saturating_sub(since),
        }
    }

    /// Ends its membership of a consistency group, if it has one. Nothing is under way to its disk.
    pub(crate) fn leave_group(&self) -> Result<(), ()> {
        if self.core.group().is_none() {
            return Ok(());
        }
        let left = self.cache.leave_group(&self.core);
        left.map_err(|error| tracing::warn!(volume = self.name, %error, "leaving the group waits"))
    }

    fn write_order(&self, order: Order, consistent_from: Option<u64>) -> Result<(), ()> {
        let written = self.cache.update_descriptor(&self.core, |d| {
            d.order = order;
            d.redo_open = order == Order::Grouped;
            d.consistent_from_epoch = consistent_from.unwrap_or(d.consistent_from_epoch);
        });
        written.map_err(|error| tracing::warn!(volume = self.name, %error, "the change of order waits"))
    }
}

impl VolumeCore {
    /// The order whose needs relocation honours.
    pub(crate) fn kept_for(&self) -> Order {
        Order::from_code(self.kept_for.load(Ordering::SeqCst)).unwrap_or_default()
    }

    pub(crate) fn keep_for(&self, order: Order) {
        self.kept_for.store(order as u8, Ordering::SeqCst);
    }
}
