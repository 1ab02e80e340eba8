//! The bytes of a file, or of several one after the other, in the address space: reserved, mapped, grown
//! and cut.
//!
//! Several look like one from outside: each is mapped at its place in one reservation, so a copy may
//! begin in one and end in the next, and who copies knows nothing of it.
//!
//! Invariant: the mapping never moves. What it may grow to is reserved from the start, and a part that
//! is cut off stays reserved, so that `len` may change while others copy; they touch nothing past it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::MediaClass;

/// Alignment of the mapping's base: a huge page of every size that matters, so that a structure
/// aligned on the media is aligned in memory, and file systems can map 2 MiB at once.
pub(super) const BASE_ALIGN: u64 = 2 << 20;

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

/// A file, and which of the mapping's bytes are its.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) path: PathBuf,
    pub(super) file: File,
    /// The mapping's byte with which it begins; its end is the next one's `base`, or the mapping's.
    pub(super) base: u64,
    /// Its own byte where that is.
    pub(super) start: u64,
    /// Alignment of address, offset and length that the kernel demands.
    pub(super) page_size: u64,
    /// Whether its pages need no `fsync` to stay, if mapped so.
    pub(super) map_sync: bool,
}

/// The bytes of files in the address space.
#[derive(Debug)]
pub(super) struct Mapping {
    pub(super) base: *mut u8,
    /// Bytes that are the files'.
    len: AtomicU64,
    /// Bytes of addresses that are ours, from `base` on; at least `len`.
    reserved_len: AtomicUsize,
    /// What the last part demands: only its length changes.
    pub(super) page_size: u64,
    pub(super) writable: bool,
}

/// Addresses reserved for a mapping to grow into: so many times what it has, and this at least.
/// Addresses cost nothing; a process has 128 TiB of them.
const GROWTH: u64 = 16;
const GROWTH_MIN: u64 = 64 << 30;

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

    /// Maps `len` bytes of the parts, which follow one another: the `base` and `start` of each is a multiple
    /// of its page size, and the first's `base` is 0.
    #[expect(unsafe_code, reason = "calls munmap")]
    pub(super) fn new(parts: &[Part], len: u64, writable: bool) -> Result<Self, MapFailure> {
        let too_long = || MapFailure { step: "mapped", source: io::Error::from_raw_os_error(libc::ENOMEM) };
        let largest = parts.iter().map(|part| part.page_size).max().unwrap_or(1);
        let page_size = parts.last().map_or(1, |part| part.page_size);
        let align = BASE_ALIGN.max(largest.next_power_of_two());
        let mapped_len = len.checked_next_multiple_of(page_size).ok_or_else(too_long)?;
        let least = mapped_len.checked_add(align).ok_or_else(too_long)?;
        let most = mapped_len.saturating_mul(if writable { GROWTH } else { 1 }).max(least);
        let most = if writable { most.max(GROWTH_MIN) } else { most };
        // More addresses than needed, so that an aligned base is among them. Where addresses are limited
        // there is less to grow into.
        let (reserved, reserved_len) = reserve(most as usize)
            .map(|reserved| (reserved, most as usize))
            .or_else(|_| reserve(least as usize).map(|reserved| (reserved, least as usize)))?;
        let mapped_len = mapped_len as usize;
        let base = reserved.wrapping_add(reserved.align_offset(align as usize));
        let before = base.addr() - reserved.addr();
        if before > 0 {
            // SAFETY: the front of our own reservation, which nothing has been mapped over.
            unsafe { libc::munmap(reserved.cast(), before) };
        }
        let reserved_len = (reserved_len - before) / page_size as usize * page_size as usize;
        let mapping = Self {
            base,
            len: AtomicU64::new(len),
            reserved_len: AtomicUsize::new(reserved_len),
            page_size,
            writable,
        };
        let ends = parts.iter().skip(1).map(|part| part.base as usize).chain([mapped_len]);
        for (part, end) in parts.iter().zip(ends) {
            if let Err(failure) = mapping.map(part, part.base as usize, end) {
                // The reservation is left as it is: the kernel may have opened a hole in it already, in
                // which another thread's mapping may lie by now. It costs addresses, not memory.
                std::mem::forget(mapping);
                return Err(failure);
            }
        }
        Ok(mapping)
    }

    /// Maps bytes `from` to `end`, whole pages of the part within the reservation.
    #[expect(unsafe_code, reason = "calls mmap and madvise")]
    fn map(&self, part: &Part, from: usize, end: usize) -> Result<(), MapFailure> {
        let how = if part.map_sync { libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC } else { libc::MAP_SHARED };
        let (at, len) = (self.base.wrapping_add(from).cast(), end - from);
        let fd = part.file.as_raw_fd();
        let offset = (from as u64 - part.base + part.start) as libc::off_t;
        // SAFETY: replaces a part of our own reservation, in which nobody copies yet.
        let mapped =
            unsafe { libc::mmap(at, len, protection(self.writable), how | libc::MAP_FIXED, fd, offset) };
        if mapped == libc::MAP_FAILED {
            return Err(MapFailure::last("mapped"));
        }
        // SAFETY: advice about our own mapping, whose refusal is harmless: huge pages are a hint, and a
        // core dump only gets bigger.
        unsafe {
            libc::madvise(at, len, libc::MADV_HUGEPAGE);
            libc::madvise(at, len, libc::MADV_DONTDUMP);
        }
        Ok(())
    }

    /// Bytes that are the files'.
    #[inline]
    pub(super) fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Bytes mapped: those of the files, rounded up to the last one's page size.
    pub(super) fn mapped_len(&self) -> usize {
        self.len().next_multiple_of(self.page_size) as usize
    }

    /// Maps what the last part has become longer by.
    pub(super) fn grow(&self, last: &Part, len: u64, class: MediaClass) -> io::Result<()> {
        let (from, end) = (self.mapped_len(), len.next_multiple_of(self.page_size) as usize);
        let reserved_len = self.reserved_len.load(Ordering::Relaxed);
        if end > reserved_len {
            let what = format!("addresses are reserved for {reserved_len} bytes only: open the cache again");
            return Err(io::Error::other(what));
        }
        if from < end {
            self.map(last, from, end).map_err(|failure| {
                // As in `new`: what is behind may be another's by now, and is left as it is.
                self.reserved_len.store(from, Ordering::Relaxed);
                failure.source
            })?;
            if class != MediaClass::PageCache {
                // No guest's request is to pay for the first touch of memory.
                self.populate(from, end, class).map_err(|failure| failure.source)?;
            }
        }
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    /// Unmaps what the last part is about to be shorter by; the addresses stay ours. Nobody copies there.
    #[expect(unsafe_code, reason = "calls mmap")]
    pub(super) fn cut(&self, len: u64) -> io::Result<()> {
        let (from, end) = (len.next_multiple_of(self.page_size) as usize, self.mapped_len());
        self.len.store(len, Ordering::Release);
        if from < end {
            let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
            let at = self.base.wrapping_add(from).cast();
            // SAFETY: replaces a part of our own mapping that nobody touches any more.
            if unsafe { libc::mmap(at, end - from, libc::PROT_NONE, private, -1, 0) } == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Whether any page of it is in the page cache.
    #[expect(unsafe_code, reason = "calls mincore")]
    pub(super) fn is_resident(&self) -> io::Result<bool> {
        const STEP: usize = 1 << 30;
        let mut pages = vec![0u8; STEP / 4096];
        let mapped_len = self.mapped_len();
        for at in (0..mapped_len).step_by(STEP) {
            let len = STEP.min(mapped_len - at);
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
    pub(super) fn prefault(&self, class: MediaClass) -> Result<(), MapFailure> {
        self.populate(0, self.mapped_len(), class)
    }

    #[expect(unsafe_code, reason = "calls madvise")]
    pub(super) fn populate(&self, from: usize, end: usize, class: MediaClass) -> Result<(), MapFailure> {
        let for_writing = self.writable && class != MediaClass::PageCache;
        let advice = if for_writing { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
        loop {
            // SAFETY: our own mapping, whose content populating does not change.
            if unsafe { libc::madvise(self.base.wrapping_add(from).cast(), end - from, advice) } == 0 {
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
        unsafe { libc::munmap(self.base.cast(), self.reserved_len.load(Ordering::Relaxed)) };
    }
}

/// Addresses that nothing is mapped at, and nobody else will map anything at.
#[expect(unsafe_code, reason = "calls mmap")]
fn reserve(len: usize) -> Result<*mut u8, MapFailure> {
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let reserved = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, private, -1, 0) };
    if reserved == libc::MAP_FAILED { Err(MapFailure::last("given addresses")) } else { Ok(reserved.cast()) }
}

fn protection(writable: bool) -> libc::c_int {
    libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 }
}
