//! Media mapped into the address space.
//!
//! Invariants:
//!
//! 1. No Rust reference into the mapping exists, ever: all access is by the guarded copies, since
//!    the bytes may change or vanish under us.
//! 2. The address range stays reserved from open to drop, whatever happens to the file.
//! 3. After one failed `sync` every later one fails. The kernel has dropped the dirty marks of the
//!    pages it could not write, and a second `fdatasync` would say that all is well.
//!    Only a process that has dropped those pages ([`Pmem::reread`]) may believe its own again.
//! 4. `sync`s take turns. The kernel reports a write error once per open file: of two that overlap
//!    one would be told of the failure, and the other that its data is durable.
//!
//! `sync` is an `fdatasync` without an `msync`: on Linux `msync(MS_SYNC)` is a ranged `fsync` of the
//! file, and pages dirtied through a mapping are the file's dirty pages, since the first store to a
//! clean page faults and marks it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Mutex, PoisonError};

use super::guard::{ForeignSlice, ForeignSliceMut};
use super::store::complete_stores;
use super::{MediaClass, MediaError, Pmem, StoreMethod, StorePlan, SyncError, guard, open};

/// Alignment of the mapping's base: a huge page of every size that matters, so that a structure
/// aligned on the media is aligned in memory, and file systems can map 2 MiB at once.
const BASE_ALIGN: u64 = 2 << 20;

/// Bytes of the stores that are summed.
const BLOCK: usize = 4096;

/// Bytes looked at by one step of [`MappedPmem::is_zero`]: a part of the first-level cache.
const ZERO_STEP: usize = 16 << 10;

/// A cache's media. See the head of the file.
#[derive(Debug)]
pub struct MappedPmem {
    path: PathBuf,
    file: File,
    mapping: Mapping,
    class: MediaClass,
    reason: String,
    store: StorePlan,
    /// Whether blocks are summed while they are stored: measured at open.
    sums_in_one_pass: bool,
    durability: Durability,
}

impl MappedPmem {
    pub(super) fn new(
        path: PathBuf,
        file: File,
        mapping: Mapping,
        class: MediaClass,
        reason: String,
        store: StorePlan,
    ) -> Self {
        assert!(!class.fence_is_durable() || store.is_durable(), "{store} is not durable on {class}");
        let sums_in_one_pass = store.method(BLOCK).sums_in_one_pass();
        let durability = Durability::default();
        Self { path, file, mapping, class, reason, store, sums_in_one_pass, durability }
    }

    /// As it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file with its lock, for the process that is to have it next.
    ///
    /// # Errors
    /// The process has as many descriptors as it may have.
    pub fn source(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// How its class was recognised, a clause: "a file in memory (tmpfs)".
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// How bytes are stored.
    pub fn store_plan(&self) -> StorePlan {
        self.store
    }

    /// Whether [`Pmem::write`] would panic.
    pub fn is_read_only(&self) -> bool {
        !self.mapping.writable
    }

    /// What a completed write survives here, a clause.
    pub fn durability(&self) -> &'static str {
        open::durability(self.class)
    }

    /// Whether every byte of the range is zero.
    ///
    /// # Errors
    /// [`MediaError`] when any of it cannot be read.
    pub fn is_zero(&self, range: Range<u64>) -> Result<bool, MediaError> {
        let mut copy = [0; ZERO_STEP];
        let mut at = range.start;
        while at < range.end {
            let step = (range.end - at).min(ZERO_STEP as u64) as usize;
            self.read(at, &mut copy[..step])?;
            if copy[..step].iter().fold(0, |any, byte| any | byte) != 0 {
                return Ok(false);
            }
            at += step as u64;
        }
        Ok(true)
    }

    /// Allocates every block of a file that was made sparse, without changing a byte, so that a
    /// full file system cannot fail a store later. Nothing to do for devices.
    ///
    /// # Errors
    /// The file system is full, or does not know how.
    #[expect(unsafe_code, reason = "calls fallocate")]
    pub fn allocate(&self) -> io::Result<()> {
        if self.is_read_only() || !self.file.metadata()?.is_file() {
            return Ok(());
        }
        loop {
            // SAFETY: the descriptor is open; the range is the file's own.
            let done = unsafe {
                libc::fallocate(self.file.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, 0, self.mapping.len as i64)
            };
            match io::Error::last_os_error() {
                _ if done == 0 => return Ok(()),
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            }
        }
    }

    /// The address of byte `at`, of which `len` follow. Panics past the end.
    #[inline]
    fn address(&self, at: u64, len: usize) -> *mut u8 {
        let end = at.checked_add(len as u64);
        assert!(end.is_some_and(|end| end <= self.mapping.len), "{at}+{len} of {}", self.mapping.len);
        self.mapping.base.wrapping_add(at as usize)
    }
}

impl Pmem for MappedPmem {
    fn len(&self) -> u64 {
        self.mapping.len
    }

    fn class(&self) -> MediaClass {
        self.class
    }

    #[expect(unsafe_code, reason = "copies from the mapping")]
    #[inline]
    fn read(&self, at: u64, dst: &mut [u8]) -> Result<(), MediaError> {
        let from = self.address(at, dst.len());
        // SAFETY: the range lies in the mapping, which is reserved as long as `self` lives.
        unsafe { guard::copy_in(from, dst) }.map_err(|guard::Fault| MediaError { at, len: dst.len() })
    }

    #[expect(unsafe_code, reason = "copies to the mapping")]
    #[inline]
    fn write(&self, at: u64, src: &[u8]) -> Result<(), MediaError> {
        assert!(self.mapping.writable, "a store to media opened for reading");
        let to = self.address(at, src.len());
        // SAFETY: the range lies in the mapping, which is writable, reserved as long as `self`
        // lives, and never referred to; a plan holds only methods that this processor has.
        unsafe { self.store.method(src.len()).store(to, src) }
            .map_err(|guard::Fault| MediaError { at, len: src.len() })
    }

    #[expect(unsafe_code, reason = "copies to the mapping")]
    #[inline]
    fn write_summed(&self, at: u64, src: ForeignSlice<'_>) -> Option<u32> {
        assert!(self.mapping.writable, "a store to media opened for reading");
        let (to, len) = (self.address(at, src.len()), src.len());
        if !self.sums_in_one_pass {
            return None;
        }
        // SAFETY: as for `write`; whoever made `src` vouches for it.
        unsafe { self.store.method(len).store_summed(to, src.start(), len) }
    }

    #[expect(unsafe_code, reason = "copies from the mapping")]
    #[inline]
    fn read_summed(&self, at: u64, dst: &mut ForeignSliceMut<'_>) -> Option<u32> {
        let (from, len) = (self.address(at, dst.len()), dst.len());
        // SAFETY: the range lies in the mapping, which is reserved as long as `self` lives; whoever made
        // `dst` vouches for it.
        unsafe { StoreMethod::Cached.store_summed(dst.start(), from, len) }
    }

    #[inline]
    fn fence(&self) {
        // The compiler's part, then the processor's. Stable does not need the second, since a killed
        // process's stores are the page cache's; publishing does (see `store`).
        fence(Ordering::Release);
        complete_stores();
    }

    fn sync(&self) -> Result<(), SyncError> {
        match self.class {
            MediaClass::PageCache if self.mapping.writable => self.durability.sync(|| self.file.sync_data()),
            _ => {
                self.fence();
                Ok(())
            }
        }
    }

    #[expect(unsafe_code, reason = "writes lines back")]
    fn settle(&self, at: u64, len: u64) -> Result<(), MediaError> {
        if !self.class.fence_is_durable() || self.is_read_only() {
            return Ok(());
        }
        let first = self.address(at, len as usize);
        // SAFETY: the range lies in the mapping, which is reserved as long as `self` lives.
        unsafe { self.store.write_back(first, len as usize) }
            .map_err(|guard::Fault| MediaError { at, len: len as usize })?;
        self.fence();
        Ok(())
    }

    fn reread(&self) -> Result<(), SyncError> {
        match self.class {
            MediaClass::PageCache if self.mapping.writable => {
                let _turn = self.durability.failed.lock().unwrap_or_else(PoisonError::into_inner);
                drop_pages(&self.file, &self.mapping).map_err(SyncError)
            }
            _ => Ok(()),
        }
    }

    fn is_on_device(&self, ranges: &[Range<u64>]) -> io::Result<bool> {
        if self.class != MediaClass::PageCache {
            return Ok(true);
        }
        let device = open_past_cache(&self.file)?;
        let (mut shown, mut room) = (vec![0; COMPARE_STEP], vec![0; COMPARE_STEP + COMPARE_ALIGN]);
        let skew = room.as_ptr().align_offset(COMPARE_ALIGN);
        for range in ranges {
            for at in range.clone().step_by(COMPARE_STEP) {
                let len = (range.end - at).min(COMPARE_STEP as u64) as usize;
                let had = &mut room[skew..skew + len];
                match device.read_exact_at(had, at) {
                    Ok(()) => {}
                    Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Err(error),
                    // Whatever reads back from it, the device does not have it.
                    Err(_) => return Ok(false),
                }
                let shown = &mut shown[..len];
                if self.read(at, shown).is_ok() && shown != had {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    #[inline]
    fn prefetch(&self, at: u64) {
        // A record's header and keys, or the beginning of a block, whose rest the processor foresees.
        let first = self.address(at, 0);
        for line in 0..4 {
            prefetch_line(first.wrapping_add(line * 64));
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "a prefetch takes a pointer")]
#[inline]
fn prefetch_line(line: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch never faults, wherever it points.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
}

#[cfg(not(target_arch = "x86_64"))]
fn prefetch_line(_line: *const u8) {}

/// Bytes compared with the device at a time.
const COMPARE_STEP: usize = 1 << 20;
/// What every device is content with for a buffer and an offset.
const COMPARE_ALIGN: usize = 4096;

/// The same file, for reads that do not go through the page cache.
fn open_past_cache(file: &File) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().read(true).custom_flags(libc::O_DIRECT).open(path)
}

/// Times the kernel is asked to drop pages: it skips those that somebody happens to look at.
const DROP_TRIES: u32 = 50;

/// Drops a file's pages from the page cache, and makes sure that none is left.
#[expect(unsafe_code, reason = "calls madvise and posix_fadvise")]
fn drop_pages(file: &File, mapping: &Mapping) -> io::Result<()> {
    // Dirty pages are not dropped: each must be written, or given up by the kernel. What it says is
    // news of the stores that are about to be forgotten, and by reporting it the kernel forgets it.
    if let Err(error) = file.sync_data() {
        tracing::warn!(%error, "stores that never reached the cache's device are forgotten");
    }
    for _ in 0..DROP_TRIES {
        // SAFETY: our own mapping of a file: what is not mapped any more is read again when touched.
        unsafe { libc::madvise(mapping.base.cast(), mapping.mapped_len, libc::MADV_DONTNEED) };
        // SAFETY: the descriptor is open.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        if !mapping.is_resident()? {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Err(io::Error::other("pages of the cache file stay in the page cache: somebody else uses it"))
}

/// Keeps invariants 3 and 4.
#[derive(Default, Debug)]
struct Durability {
    /// The error of the `sync` that failed.
    failed: Mutex<Option<i32>>,
}

impl Durability {
    fn sync(&self, flush: impl FnOnce() -> io::Result<()>) -> Result<(), SyncError> {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.is_none() {
            *failed = flush().err().map(|error| error.raw_os_error().unwrap_or(libc::EIO));
        }
        failed.map_or(Ok(()), |errno| Err(SyncError(io::Error::from_raw_os_error(errno))))
    }
}

/// Which step of mapping failed, a past participle, and why.
#[derive(Debug)]
pub(super) struct MapFailure {
    pub(super) step: &'static str,
    pub(super) source: io::Error,
}

impl MapFailure {
    fn last(step: &'static str) -> Self {
        Self { step, source: io::Error::last_os_error() }
    }
}

/// A file's bytes in the address space.
#[derive(Debug)]
pub(super) struct Mapping {
    base: *mut u8,
    /// Bytes that are the file's.
    len: u64,
    /// Bytes mapped: `len` rounded up to the media's page size.
    mapped_len: usize,
    writable: bool,
}

#[expect(unsafe_code, reason = "a mapping belongs to the process, not to a thread")]
// SAFETY: the pointer is only ever used by the guarded copies, from any thread.
unsafe impl Send for Mapping {}
#[expect(unsafe_code, reason = "a mapping belongs to the process, not to a thread")]
// SAFETY: as above; who may touch which bytes when is the engine's business, and a race between
// machine instructions on raw memory is not one between Rust accesses.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Whether the file can be mapped such that its pages need no `fsync` to stay.
    #[expect(unsafe_code, reason = "calls mmap")]
    pub(super) fn can_sync(file: &File, writable: bool) -> bool {
        let flags = libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let tried =
            unsafe { libc::mmap(ptr::null_mut(), 4096, protection(writable), flags, file.as_raw_fd(), 0) };
        if tried == libc::MAP_FAILED {
            return false;
        }
        // SAFETY: just mapped, and nobody else knows of it.
        unsafe { libc::munmap(tried, 4096) };
        true
    }

    /// Maps `len` bytes of the file, whose mappings come in pages of `page_size`.
    #[expect(unsafe_code, reason = "calls mmap, munmap and madvise")]
    pub(super) fn new(
        file: &File,
        len: u64,
        page_size: u64,
        writable: bool,
        map_sync: bool,
    ) -> Result<Self, MapFailure> {
        let too_long = || MapFailure { step: "mapped", source: io::Error::from_raw_os_error(libc::ENOMEM) };
        let align = BASE_ALIGN.max(page_size.next_power_of_two());
        let mapped_len = len.checked_next_multiple_of(page_size).ok_or_else(too_long)?;
        let reserved_len = mapped_len.checked_add(align).ok_or_else(too_long)?;
        let (mapped_len, reserved_len) = (mapped_len as usize, reserved_len as usize);
        // More addresses than needed, so that an aligned base is among them.
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let reserved = unsafe { libc::mmap(ptr::null_mut(), reserved_len, libc::PROT_NONE, private, -1, 0) };
        if reserved == libc::MAP_FAILED {
            return Err(MapFailure::last("given addresses"));
        }
        let reserved = reserved.cast::<u8>();
        let base = reserved.wrapping_add(reserved.align_offset(align as usize));
        let how = if map_sync { libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC } else { libc::MAP_SHARED };
        // SAFETY: replaces a part of our own reservation.
        let mapped = unsafe {
            libc::mmap(
                base.cast(),
                mapped_len,
                protection(writable),
                how | libc::MAP_FIXED,
                file.as_raw_fd(),
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            // The reservation is left as it is: the kernel may have opened a hole in it already, in
            // which another thread's mapping may lie by now. It costs addresses, not memory.
            return Err(MapFailure::last("mapped"));
        }
        let before = base.addr() - reserved.addr();
        let after = reserved_len - before - mapped_len;
        // SAFETY: what is left of our own reservation on either side; the advice is about our own
        // mapping, and its refusal harmless: huge pages are a hint, and a core dump only gets bigger.
        unsafe {
            if before > 0 {
                libc::munmap(reserved.cast(), before);
            }
            if after > 0 {
                libc::munmap(base.wrapping_add(mapped_len).cast(), after);
            }
            libc::madvise(base.cast(), mapped_len, libc::MADV_HUGEPAGE);
            libc::madvise(base.cast(), mapped_len, libc::MADV_DONTDUMP);
        }
        Ok(Self { base, len, mapped_len, writable })
    }

    /// Whether any page of it is in the page cache.
    #[expect(unsafe_code, reason = "calls mincore")]
    fn is_resident(&self) -> io::Result<bool> {
        const STEP: usize = 1 << 30;
        let mut pages = vec![0u8; STEP / 4096];
        for at in (0..self.mapped_len).step_by(STEP) {
            let len = STEP.min(self.mapped_len - at);
            let base = self.base.wrapping_add(at).cast();
            // SAFETY: our own mapping, and the vector has a byte for each of its pages.
            if unsafe { libc::mincore(base, len, pages.as_mut_ptr()) } != 0 {
                return Err(io::Error::last_os_error());
            }
            if pages[..len.div_ceil(4096)].iter().any(|page| page & 1 != 0) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Touches every page. For writing where that only allocates; behind the page cache it would
    /// make every page dirty, so there for reading.
    #[expect(unsafe_code, reason = "calls madvise")]
    pub(super) fn prefault(&self, class: MediaClass) -> Result<(), MapFailure> {
        let for_writing = self.writable && class != MediaClass::PageCache;
        let advice = if for_writing { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
        loop {
            // SAFETY: our own mapping, whose content populating does not change.
            if unsafe { libc::madvise(self.base.cast(), self.mapped_len, advice) } == 0 {
                return Ok(());
            }
            let source = io::Error::last_os_error();
            match source.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN) => {}
                // Before Linux 5.14. A hint that cannot be followed.
                Some(libc::EINVAL) => {
                    tracing::warn!("this kernel cannot pre-fault a mapping; first touches will be slow");
                    return Ok(());
                }
                _ => return Err(MapFailure { step: "pre-faulted", source }),
            }
        }
    }
}

impl Drop for Mapping {
    #[expect(unsafe_code, reason = "calls munmap")]
    fn drop(&mut self) {
        // SAFETY: our own mapping, and nothing refers into it.
        unsafe { libc::munmap(self.base.cast(), self.mapped_len) };
    }
}

fn protection(writable: bool) -> libc::c_int {
    libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 }
}

#[cfg(test)]
mod tests;
