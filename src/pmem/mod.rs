//! The fast side: memory that the cache is made of.
//!
//! The engine sees only this trait, so it runs the same on DAX memory, on a mapped file, and in a
//! simulation that loses whatever was not made durable.
//!
//! What `write`, `fence` and `sync` mean per media class:
//!
//! | class | `write` then `fence` | `sync` |
//! |---|---|---|
//! | `dax` | durable: survives the host | the same as `fence` |
//! | `page-cache` | stable: survives the daemon | durable, when it returns `Ok` |
//! | `volatile` | stable | nothing more |
//!
//! A fence covers its own thread's stores only, so after the death of a daemon nobody's fence covers
//! what that had stored last. `settle` does, for a range, and where `sync` is the kernel's business
//! that does, for everything.

mod classify;
mod create;
pub mod guard;
mod join;
mod lock;
mod mapped;
mod mapping;
mod open;
#[expect(unsafe_code, reason = "assembly")]
mod routines;
mod store;
#[expect(unsafe_code, reason = "assembly")]
mod sums;

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::OnceLock;

use self::guard::{ForeignSlice, ForeignSliceMut};

pub use create::{CreateError, create};
pub use join::{JoinError, Place};
pub use lock::Holder;
pub use mapped::MappedPmem;
pub use open::{OpenError, OpenOptions, notice_holder};
pub use store::{LineFlush, NtWidth, StoreMethod, StorePlan};

/// What survives what; found at open, printed, shown in status.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MediaClass {
    /// Persistent memory mapped with `MAP_SYNC`, in a persistence domain.
    Dax,
    /// RAM used as if it were [`MediaClass::Dax`]: the same stores, flushes and fences, for tests
    /// and benchmarks only.
    AssumeDax,
    /// A file or block device behind the page cache.
    PageCache,
    /// tmpfs, hugetlbfs, memfd: survives the daemon, not the host.
    Volatile,
}

impl MediaClass {
    /// Whether a fence makes earlier writes durable.
    pub fn fence_is_durable(self) -> bool {
        matches!(self, MediaClass::Dax | MediaClass::AssumeDax)
    }
}

impl fmt::Display for MediaClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MediaClass::Dax => "dax",
            MediaClass::AssumeDax => "assume-dax",
            MediaClass::PageCache => "page-cache",
            MediaClass::Volatile => "volatile",
        })
    }
}

/// The media could not be read or written at a place: poison, a hole, a truncated file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the cache media failed at byte {at} (of {len} bytes accessed)")]
pub struct MediaError {
    /// First byte of the access that failed.
    pub at: u64,
    /// Length of that access.
    pub len: usize,
}

/// `sync` failed: what was written since the last good one may be gone although it still reads
/// back. Final for this process.
#[derive(Debug, thiserror::Error)]
#[error("making the cache durable failed: {0}")]
pub struct SyncError(pub std::io::Error);

/// Byte-addressable memory.
///
/// Offsets past `len()` are a bug of the caller and panic. All methods may be called from any
/// thread; accesses to the same bytes are ordered by the caller.
pub trait Pmem: Send + Sync + 'static {
    /// Size in bytes; only [`Pmem::resize`] changes it.
    fn len(&self) -> u64;

    /// Gives the memory another size, where it can have one: a file grows, with all of its space taken, or
    /// is cut off; of a device what it has by now is found out. Returns the size that it has then. What
    /// it has had before and has still does not move, and a size that is returned is durable; nobody may
    /// touch what is cut off.
    ///
    /// # Errors
    /// It cannot; it has the size it had.
    fn resize(&self, len: u64) -> io::Result<u64> {
        let _ = len;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Bytes before its end at which the second superblock of a cache is looked for when nothing is left
    /// of the first. 2 MiB, but in simulations.
    fn back_size(&self) -> u64 {
        2 << 20
    }

    /// Whether there is nothing.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What survives what.
    fn class(&self) -> MediaClass;

    /// Copies `dst.len()` bytes from `at`.
    ///
    /// # Errors
    /// [`MediaError`] when any of them cannot be read; `dst` is then unspecified.
    fn read(&self, at: u64, dst: &mut [u8]) -> Result<(), MediaError>;

    /// Stores `src` at `at` such that the calling thread's next [`Pmem::fence`] covers it. Until
    /// then other threads may see any part of it.
    ///
    /// Not atomic: a crash before that keeps any subset of its aligned 8-byte words (`dax`) or
    /// 512-byte sectors (`page-cache`); of these one may be half new, by words, when the kernel
    /// happened to write its page back in the middle of the store.
    ///
    /// # Errors
    /// [`MediaError`] when any byte cannot be stored; the range is then unspecified.
    fn write(&self, at: u64, src: &[u8]) -> Result<(), MediaError>;

    /// Orders and completes this thread's earlier writes; see the table above.
    fn fence(&self);

    /// Makes everything durable that was written before it began, by any thread. May take as long
    /// as the disk likes: only workers call it.
    ///
    /// # Errors
    /// [`SyncError`]: nothing written since the last good `sync` may be believed durable, ever.
    fn sync(&self) -> Result<(), SyncError>;

    /// Makes durable what anybody has stored in a range, a daemon that died included. For recovery:
    /// it believes what it reads, so that must not be taken back by a power cut.
    ///
    /// On DAX the range's lines are written back, whoever stored them; elsewhere there is nothing to
    /// do, since [`Pmem::sync`] covers everybody's stores.
    ///
    /// # Errors
    /// [`MediaError`] when any of the range cannot be reached.
    fn settle(&self, at: u64, len: u64) -> Result<(), MediaError> {
        let _ = (at, len);
        Ok(())
    }

    /// Forgets what was stored and has not reached the device: reads show what a power cut would leave.
    /// For after a failed `sync`, which may have left pages that read back and exist nowhere else.
    /// Nothing to do but on page-cache media. Whoever else has the media mapped prevents it.
    ///
    /// # Errors
    /// [`SyncError`]: some pages could not be dropped, and nothing read is to be believed.
    fn reread(&self) -> Result<(), SyncError> {
        Ok(())
    }

    /// Whether the device has what reads show in these ranges of whole pages, which are clean: a `sync`
    /// has succeeded since they were stored. Where it does not, one before that has failed. Pages that
    /// cannot be read are passed over. True but on page-cache media.
    ///
    /// # Errors
    /// The device cannot be read past the page cache here.
    fn is_on_device(&self, ranges: &[Range<u64>]) -> io::Result<bool> {
        let _ = ranges;
        Ok(true)
    }

    /// Names the life of the host whose page cache holds what has not reached the device; zeros where
    /// nothing does.
    fn boot_id(&self) -> [u8; 16] {
        boot_id()
    }

    /// Stores what is lent at `at` as [`Pmem::write`] does, and returns its CRC-32, of the bytes that are
    /// stored: each is loaded once.
    ///
    /// `None`: this memory has no such way for that length and place, or some of either side is not
    /// there. The range is then unspecified, and a copy in steps tells which side it was.
    fn write_summed(&self, at: u64, src: ForeignSlice<'_>) -> Option<u32> {
        let _ = (at, src);
        None
    }

    /// Copies as many bytes as are lent from `at` on, and returns the CRC-32 of the bytes that are copied:
    /// each is loaded once. `None` as for [`Pmem::write_summed`].
    fn read_summed(&self, at: u64, dst: &mut ForeignSliceMut<'_>) -> Option<u32> {
        let _ = (at, dst);
        None
    }

    /// Hints that `at` will be read soon.
    fn prefetch(&self, at: u64) {
        let _ = at;
    }
}

/// The kernel's identity of this boot; zeros where it has none.
pub(crate) fn boot_id() -> [u8; 16] {
    static BOOT_ID: OnceLock<[u8; 16]> = OnceLock::new();
    *BOOT_ID.get_or_init(read_boot_id)
}

fn read_boot_id() -> [u8; 16] {
    let mut id = [0; 16];
    if let Ok(text) = std::fs::read_to_string("/proc/sys/kernel/random/boot_id") {
        let digits: Vec<u8> =
            text.bytes().filter_map(|c| (c as char).to_digit(16)).map(|d| d as u8).collect();
        for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
    }
    id
}
