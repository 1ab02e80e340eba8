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
use super::volume::{Order, Volume, VolumeCore};
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

/// How far write-back is since a moment.
///
/// What counts is what has become clean, and not what was written: in order strict that is more, since what
/// was written anew meanwhile goes to the disk as well, and a drain would seem done long before it is. In
/// order grouped everything is written twice, first to the redo area, and each is half of the way.
pub(crate) struct WritebackProgress {
    is_journaled: bool,
    total_bytes: u64,
    before: u64,
    /// Where it was already: what a round wrote in vain is not told as a step back.
    most: u64,
}

impl WritebackProgress {
    /// How far it is now.
    pub fn now(&mut self, core: &VolumeCore) -> DrainProgress {
        self.most = self.most.max(self.work(core).saturating_sub(self.before));
        let total_bytes = self.total_bytes;
        DrainProgress { total_bytes, dirty_bytes: total_bytes.saturating_sub(self.most) }
    }

    fn work(&self, core: &VolumeCore) -> u64 {
        let cleaned = core.tally.cleaned_sectors.load(Ordering::Relaxed) * 512 + core.pacer.under_way();
        match self.is_journaled {
            true => (cleaned + core.tally.redo_bytes.load(Ordering::Relaxed)) / 2,
            false => cleaned,
        }
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
            let dirty_bytes = if is_there { 0 } else { begun.now(core).dirty_bytes };
            if progress(DrainProgress { total_bytes, dirty_bytes }).is_break() {
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
        let is_journaled = self.order() == Order::Grouped;
        let total_bytes = self.core.index.dirty_sectors() * 512;
        let begun = WritebackProgress { is_journaled, total_bytes, before: 0, most: 0 };
        WritebackProgress { before: begun.work(&self.core), ..begun }
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
            if progress(DrainProgress { total_bytes, dirty_bytes: 0 }).is_break() {
                ghost::leave(&self.core, &self.name, channel, Some(since_ms), Vec::new());
                return Err(FlushError::Interrupted);
            }
        }
    }
}
