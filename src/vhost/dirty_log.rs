//! The dirty log (vhost-user spec, "Migration"): which pages of the guest's memory we have written
//! to, told to a VMM that is copying them to another host.
//!
//! One bit for each 4 KiB page, page 0 the lowest bit of byte 0. The VMM fetches and clears bits
//! while we set them.
//!
//! Invariants:
//! - a bit is set after its page was written and before the driver is told that it was: set before,
//!   it could be fetched and the page copied without what is written then;
//! - a bit is only ever set here, each by one atomic operation;
//! - a page that the log has no bit for is the VMM's fault; it is counted, once told, and lost.
//!
//! Accesses are plain because the file behind must be sealed against shrinking, as every memfd made
//! for this purpose is.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use vhost::vhost_user::message::VhostUserLog;

use super::fds;
use super::memory::{Mapping, MemoryError};
use super::notify::Notifier;

/// Bytes of a page, whatever the processor's are.
const PAGE: u64 = 4096;

/// Why a log was refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum LogError {
    #[error("a dirty log of no bytes")]
    Empty,
    #[error("the dirty log can be made shorter behind our back")]
    Unsealed,
    #[error("mapping the dirty log failed: {0}")]
    Map(#[from] MemoryError),
}

/// A log in shared memory.
#[derive(Debug)]
pub(super) struct DirtyLog {
    mapping: Mapping,
    /// What it was opened from: whoever serves this VM after us opens it anew.
    source: File,
    offset: u64,
    /// Told when a page becomes dirty.
    changed: Arc<Notifier>,
    has_overrun: AtomicBool,
}

impl DirtyLog {
    /// The log in `len` bytes of the file behind `fd`, from `offset`.
    ///
    /// # Errors
    /// It is empty, or of a kind that could vanish, or cannot be mapped.
    pub fn open(fd: OwnedFd, offset: u64, len: u64, changed: Arc<Notifier>) -> Result<Self, LogError> {
        if len == 0 {
            return Err(LogError::Empty);
        }
        let file = File::from(fd);
        if !fds::seal_length(&file) {
            return Err(LogError::Unsealed);
        }
        let mapping = Mapping::new(&file, offset, len)?;
        Ok(Self { mapping, source: file, offset, changed, has_overrun: AtomicBool::new(false) })
    }

    /// The body and the descriptor of a SET_LOG_BASE that gives this log to somebody else.
    pub fn source(&self) -> (VhostUserLog, &File) {
        (VhostUserLog { mmap_size: self.mapping.len() as u64, mmap_offset: self.offset }, &self.source)
    }

    /// `len` bytes from a guest address have been written.
    pub fn mark(&self, guest: u64, len: usize) {
        let Some(last) = (len as u64).checked_sub(1).map(|rest| guest.saturating_add(rest)) else { return };
        let mut is_news = false;
        for page in guest / PAGE..=last / PAGE {
            let Some(bits) = self.bits(page / 8) else {
                if !self.has_overrun.swap(true, Ordering::Relaxed) {
                    tracing::warn!(guest, "the dirty log ends before the guest's memory does");
                }
                break;
            };
            let bit = 1 << (page % 8);
            // Reading first spares the line a write where most pages are dirty already.
            is_news |=
                bits.load(Ordering::SeqCst) & bit == 0 && bits.fetch_or(bit, Ordering::SeqCst) & bit == 0;
        }
        if is_news {
            self.changed.notify();
        }
    }

    #[expect(unsafe_code, reason = "shared memory as atomics")]
    fn bits(&self, at: u64) -> Option<&AtomicU8> {
        let at = usize::try_from(at).ok().filter(|&at| at < self.mapping.len())?;
        // SAFETY: checked to lie in the mapping, which the result borrows and whose file cannot
        // shrink; everyone on our side uses atomics.
        Some(unsafe { AtomicU8::from_ptr(self.mapping.start().wrapping_add(at)) })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::vhost::testing::memory_file;

    fn log(len: u64) -> (File, DirtyLog) {
        let file = memory_file(len);
        let fd = file.try_clone().unwrap().into();
        (file, DirtyLog::open(fd, 0, len, Arc::default()).unwrap())
    }

    #[test]
    fn every_page_touched_has_its_bit_and_no_other() {
        for (guest, len, pages) in [
            (0, 1, vec![0]),
            (4095, 1, vec![0]),
            (4095, 2, vec![0, 1]),
            (4096, 4096, vec![1]),
            (7 * 4096 + 5, 8192, vec![7, 8, 9]),
            (63 * 4096, 1, vec![63]),
            (5, 0, vec![]),
        ] {
            let (file, log) = log(8);
            log.mark(guest, len);
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, 0).unwrap();
            let expected = pages.iter().fold(0u64, |bits, page| bits | 1 << page);
            assert_eq!(u64::from_le_bytes(bytes), expected, "{guest:#x}+{len}");
        }
    }

    #[test]
    fn pages_beyond_the_log_change_nothing() {
        let (file, log) = log(8);
        for guest in [64 * 4096, u64::MAX - 1, u64::MAX] {
            log.mark(guest, 2);
        }
        log.mark(63 * 4096, 1 << 20);
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), 1 << 63);
    }

    #[test]
    fn a_log_that_could_vanish_is_refused() {
        let open = |file: File, len| DirtyLog::open(file.into(), 0, len, Arc::default());
        assert!(matches!(open(memory_file(8), 0), Err(LogError::Empty)));
        assert!(matches!(open(memory_file(8), 4097 * 8), Err(LogError::Map(_))));
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        assert!(matches!(open(file, 4096), Err(LogError::Unsealed)));
    }
}
