//! Flush to the disk: when it returns, the disk alone has everything acknowledged before the call.
//!
//! A guest's FLUSH makes its writes durable in the cache. This one is the operator's, before a
//! snapshot of the disk, a migration, or the end of the cache: it waits for write-back, and guests
//! write on meanwhile.
//!
//! Steps, and what breaks if two are swapped:
//! 1. begin a new epoch: what was acknowledged before is in an epoch below it, and what comes after
//!    need not be waited for, or a busy guest would keep this waiting for ever;
//! 2. ask write-back for that epoch and wait until the tail has reached it: the tail moves only with
//!    a flushed disk (law 6), so the disk has those writes durably;
//! 3. flush the disk: writes around the cache, of a mode that does that now or did so a moment ago,
//!    are acknowledged before they are durable there.
//!
//! Nothing is changed by giving up: the next flush goes on where this one was.

use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::env::{Clock, Env};
use super::ghost;
use super::volume::Volume;
use super::worker::DrainProgress;
use crate::backing::{Backing, Channel, Op};
use crate::sync::thread;
use crate::wake::Waker;

/// Between two looks at how far write-back is.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// Write-back rounds that may fail one after the other before a flush gives up, as a drain does.
const FAILURES_MAX: u32 = 5;

/// Why the disk does not have everything.
#[derive(Debug, thiserror::Error)]
pub enum FlushError {
    /// The caller gave up.
    #[error("it was interrupted; what is dirty stays in the cache, and the next one goes on from there")]
    Interrupted,
    /// Nobody writes this volume back.
    #[error("the volume is served read-only and has dirty data: nothing writes it back")]
    ReadOnly,
    /// Write-back stands still for good.
    #[error(
        "the volume has lost dirty data to damage of the cache (`check` lists it): it is not written back"
    )]
    Damaged,
    /// Disk or cache fail again and again.
    #[error("dirty data could not be brought to the disk: {0}; it stays in the cache and is retried")]
    Failed(String),
}

/// `of · num / den`.
fn part(of: u64, num: u64, den: u64) -> u64 {
    u64::try_from(u128::from(of) * u128::from(num) / u128::from(den)).unwrap_or(u64::MAX)
}

/// How far write-back is on its way to what was dirty at a moment: the one measure of every drain, online
/// or off, and of whatever else waits for write-back.
///
/// Time and bytes are judged in the measure of `course.rs`, bytes of records; what is told is of those that
/// were dirty.
pub(crate) struct WritebackProgress {
    total_bytes: u64,
    /// What was paid when it began, and what is to be.
    from: u64,
    goal: u64,
    /// Where it was already: what a round wrote in vain is not told as a step back.
    most: u64,
}

impl WritebackProgress {
    /// How far it is now.
    pub fn now<E: Env>(&mut self, volume: &Volume<E>) -> DrainProgress {
        let now_us = volume.cache.clock.now_us();
        let way = volume.core.pacer.way(self.goal, now_us);
        self.most = self.most.max(way.saturating_sub(self.from));
        let total_bytes = self.total_bytes;
        let dirty_bytes = match volume.core.is_clean() {
            true => 0,
            false => {
                total_bytes - part(total_bytes, self.most, (self.goal - self.from).max(self.most).max(1))
            }
        };
        DrainProgress { total_bytes, dirty_bytes }
    }
}

impl<E: Env> Volume<E> {
    /// Waits until the disk has, durably, everything acknowledged before this call. The volume's
    /// worker must run. `progress` is told how far it is about every [`LOOK_INTERVAL`], and may end
    /// the wait.
    ///
    /// # Errors
    /// [`FlushError`]; nothing is lost.
    pub fn flush_to_disk(
        &self,
        progress: &mut dyn FnMut(DrainProgress) -> ControlFlow<()>,
    ) -> Result<(), FlushError> {
        let core = &self.core;
        core.raise_epoch();
        let goal = core.stamped.load(Ordering::SeqCst).min(core.epoch() - 1);
        self.wanted.fetch_max(goal, Ordering::SeqCst);
        core.writeback.raise();
        let mut begun = self.begin_progress();
        let total_bytes = begun.total_bytes;
        let failures_before = self.health().failures;
        loop {
            let is_there = core.tail.load(Ordering::SeqCst) >= goal;
            let step = if is_there { DrainProgress::ended(total_bytes) } else { begun.now(self) };
            if progress(step).is_break() {
                return Err(FlushError::Interrupted);
            }
            if is_there {
                return self.flush_disk(progress, total_bytes);
            }
            if !self.is_written_back.load(Ordering::SeqCst) {
                return Err(FlushError::ReadOnly);
            }
            if core.damaged.load(Ordering::SeqCst) {
                return Err(FlushError::Damaged);
            }
            let health = self.health();
            if health.failures >= failures_before + FAILURES_MAX {
                return Err(FlushError::Failed(health.cause));
            }
            thread::sleep(LOOK_INTERVAL);
        }
    }

    /// How much of what is dirty now has been dealt with since, whenever it is asked again.
    pub(crate) fn begin_progress(&self) -> WritebackProgress {
        let core = &self.core;
        let (total_bytes, goal) = (core.index.dirty_sectors() * 512, core.owed());
        let now_us = self.cache.clock.now_us();
        let from = core.pacer.way(goal, now_us);
        WritebackProgress { total_bytes, from, goal, most: 0 }
    }

    /// Flushes the disk. One that does not answer is left to itself if `progress` ends the wait.
    fn flush_disk(
        &self,
        progress: &mut dyn FnMut(DrainProgress) -> ControlFlow<()>,
        total_bytes: u64,
    ) -> Result<(), FlushError> {
        if self.backing.geometry().read_only {
            return Ok(());
        }
        let failed = |error: std::io::Error| FlushError::Failed(format!("the disk failed flushing: {error}"));
        let mut channel = self.backing.channel(&Waker::default(), 1).map_err(failed)?;
        let since_ms = self.cache.clock.now_ms();
        if channel.submit(0, Op::Flush).is_err() {
            return Err(failed(std::io::Error::other("an idle channel takes no operation")));
        }
        channel.kick();
        let mut done = Vec::new();
        loop {
            channel.wait(Duration::from_millis(50));
            channel.reap(&mut done);
            if let Some(completion) = done.pop() {
                return completion.result.map(drop).map_err(failed);
            }
            if progress(DrainProgress::ended(total_bytes)).is_break() {
                ghost::leave(&self.core, &self.name, channel, Some(since_ms), Vec::new());
                return Err(FlushError::Interrupted);
            }
        }
    }
}
