//! A volume's mode is changed while guests use it.
//!
//! Laws:
//! - No write of the old mode is under way when the first of the new one begins: a write around the
//!   cache that met one of write-back could reach the disk in either order.
//! - A mode that writes around the cache begins with nothing dirty: what write-back brought to the
//!   disk later would undo a newer write that went there directly (*strict* order writes also what
//!   the index no longer shows).
//! - A mode that writes into the cache begins with a flushed disk: from then on FLUSH does not reach
//!   the disk, and what was acknowledged around the cache would never become durable.
//! - A mode that writes around the cache ends the volume's membership of a consistency group.
//! - The descriptor says the new mode before the first write of a mode that writes around the cache,
//!   and after the last of such a one: a start in between drains, which is always right.
//! - Guests wait only while writes are held: [`HOLD_MAX`] at most, then they go on in the old mode
//!   and it is tried again. Reads are never held.
//!
//! Steps: drain while guests write, until little comes meanwhile; hold writes ([`Volume::hold`]); wait
//! for every queue to leave the section it is in, and for writes around the cache to end; drain the
//! rest; flush the disk; descriptor; mode; let writes go on.

use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::attach::AttachError;
use super::env::Env;
use super::flush::FlushError;
use super::volume::{Mode, Volume};
use super::worker::DrainProgress;
use crate::pmem::MediaClass;
use crate::sync::thread;

/// Longest time that writes are held at a stretch.
const HOLD_MAX: Duration = Duration::from_secs(2);
/// Dirty bytes that are drained with writes held: a disk takes that in a blink.
const REST_BYTES: u64 = 4 << 20;
/// Drains under way before writes are held whatever is dirty: a guest may write as fast as the disk.
const DRAINS_MAX: u32 = 4;
/// Times that writes are held.
const HOLDS_MAX: u32 = 3;

/// Why the mode stays as it was.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// The drain did not end.
    #[error(transparent)]
    Flush(#[from] FlushError),
    /// Lost sectors would read as the disk's older bytes.
    #[error(
        "{0} sectors are lost to damage of the cache: a mode that writes around it would read the disk's \
         older bytes there; overwrite them first, or attach again with --accept-loss"
    )]
    Lost(u64),
    /// Volatile media.
    #[error("the cache is on {0} media, which does not survive the host: writes could be lost")]
    Volatile(MediaClass),
    /// The cache no longer accepts writes.
    #[error("making the cache durable has failed before: it accepts no writes")]
    SyncFailed,
    /// What is under way does not end.
    #[error("the disk has not ended in {HOLD_MAX:?} what it was given: the volume goes on in its old mode")]
    Slow,
    /// The descriptor could not be made durable.
    #[error(transparent)]
    Descriptor(#[from] AttachError),
}

/// Lets writes go on when dropped.
struct Hold<'a, E: Env>(&'a Volume<E>);

impl<E: Env> Drop for Hold<'_, E> {
    fn drop(&mut self) {
        self.0.let_go();
        self.0.core.wake_waiting();
    }
}

impl<E: Env> Volume<E> {
    /// Changes the mode. One caller at a time; the volume's worker must run, unless it is read-only.
    ///
    /// # Errors
    /// [`SwitchError`]; the volume goes on in the mode it had.
    pub fn switch_mode(
        &self,
        mode: Mode,
        allow_volatile: bool,
        progress: &mut dyn FnMut(DrainProgress) -> ControlFlow<()>,
    ) -> Result<(), SwitchError> {
        if self.mode() == mode {
            return Ok(());
        }
        if mode == Mode::Writeback {
            let class = self.cache.media_class();
            if class == MediaClass::Volatile && !allow_volatile {
                return Err(SwitchError::Volatile(class));
            }
            if self.cache.has_failed() {
                return Err(SwitchError::SyncFailed);
            }
        }
        let mut slow = SwitchError::Slow;
        for _ in 0..HOLDS_MAX {
            for _ in 0..DRAINS_MAX {
                self.flush_to_disk(progress)?;
                if self.core.index.dirty_sectors() * 512 <= REST_BYTES {
                    break;
                }
            }
            match self.switch_held(mode) {
                // The disk was too slow, or failed for a moment: guests go on, and then again.
                Err(error @ (SwitchError::Slow | SwitchError::Flush(_))) => slow = error,
                ended => return ended,
            }
        }
        Err(slow)
    }

    fn switch_held(&self, mode: Mode) -> Result<(), SwitchError> {
        let until = Instant::now() + HOLD_MAX;
        self.hold();
        let hold = Hold(self);
        // Who commits now began before writes were held, and may still be of the old mode.
        self.core.wait_for_readers();
        while self.core.stripes.has_bypasses() {
            if Instant::now() > until {
                return Err(SwitchError::Slow);
            }
            thread::sleep(Duration::from_micros(200));
        }
        let flushed = self.flush_to_disk(&mut |_| match Instant::now() > until {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        });
        match flushed {
            Err(FlushError::Interrupted) => return Err(SwitchError::Slow),
            flushed => flushed?,
        }
        // In a mode that writes around the cache fills count as unsettled until the disk is flushed,
        // and they go on; of written data there is none.
        let begins_to_bypass = mode.bypasses() && !self.mode().bypasses();
        assert!(!begins_to_bypass || self.core.is_clean(), "nothing is written while writes are held");
        let lost_sectors = self.counters().lost_sectors;
        if mode.bypasses() && lost_sectors > 0 {
            return Err(SwitchError::Lost(lost_sectors));
        }
        if begins_to_bypass {
            // What goes to the disk at once would be ahead of the others.
            self.cache.leave_group(&self.core)?;
        }
        self.cache.update_descriptor(&self.core, |descriptor| descriptor.mode = mode)?;
        self.set_mode(mode);
        drop(hold);
        Ok(())
    }

    /// Whether writes wait because the mode is being changed. A queue that has been told so is woken
    /// when they go on.
    pub(crate) fn holds_back(&self, waiting: &crate::sync::atomic::AtomicBool) -> bool {
        if !self.is_held() {
            return false;
        }
        waiting.store(true, Ordering::SeqCst);
        // They may have been let go just before that.
        self.is_held()
    }
}
