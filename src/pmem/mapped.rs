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
//! 5. The mapping never moves: what it may grow to is reserved from the start, and a part that is cut
//!    off stays reserved. So `len` may change while others copy; they touch nothing past it.
//!
//! `sync` is an `fdatasync` without an `msync`: on Linux `msync(MS_SYNC)` is a ranged `fsync` of the
//! file, and pages dirtied through a mapping are the file's dirty pages, since the first store to a
//! clean page faults and marks it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Mutex, PoisonError};

use super::guard::{ForeignSlice, ForeignSliceMut};
use super::join::flush_each;
use super::mapping::{Mapping, Part};
use super::store::complete_stores;
use super::{MediaClass, MediaError, Pmem, StoreMethod, StorePlan, SyncError, create, guard, open};

/// Bytes of the stores that are summed.
const BLOCK: usize = 4096;

/// Bytes looked at by one step of [`MappedPmem::is_zero`]: a part of the first-level cache.
const ZERO_STEP: usize = 16 << 10;

/// A cache's media. See the head of the file.
#[derive(Debug)]
pub struct MappedPmem {
    /// In order, one at least; only the last changes its length.
    parts: Vec<Part>,
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
        parts: Vec<Part>,
        mapping: Mapping,
        class: MediaClass,
        reason: String,
        store: StorePlan,
    ) -> Self {
        assert!(!class.fence_is_durable() || store.is_durable(), "{store} is not durable on {class}");
        let sums_in_one_pass = store.method(BLOCK).sums_in_one_pass();
        let durability = Durability::default();
        Self { parts, mapping, class, reason, store, sums_in_one_pass, durability }
    }

    /// As it was opened; of several members, the first.
    pub fn path(&self) -> &Path {
        &self.parts[0].path
    }

    /// Each member's path and its bytes of the whole, in order.
    pub fn members(&self) -> impl Iterator<Item = (&Path, Range<u64>)> {
        self.parts
            .iter()
            .enumerate()
            .map(|(index, part)| (part.path.as_path(), part.base..self.end_of(index)))
    }

    /// The open files with their locks, for the process that is to have them next.
    ///
    /// # Errors
    /// The process has as many descriptors as it may have.
    pub fn sources(&self) -> io::Result<Vec<File>> {
        self.parts.iter().map(|part| part.file.try_clone()).collect()
    }

    pub(super) fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Its files, which nothing maps any more.
    pub(super) fn into_parts(self) -> Vec<Part> {
        self.parts
    }

    /// Where a part ends in the whole.
    fn end_of(&self, index: usize) -> u64 {
        self.parts.get(index + 1).map_or(self.mapping.len(), |next| next.base)
    }

    /// The part that changes its length.
    fn last(&self) -> &Part {
        &self.parts[self.parts.len() - 1]
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

    /// Allocates every block of files that were made sparse, without changing a byte, so that a
    /// full file system cannot fail a store later. Nothing to do for devices.
    ///
    /// # Errors
    /// The file system is full, or does not know how.
    pub fn allocate(&self) -> io::Result<()> {
        for (index, part) in self.parts.iter().enumerate() {
            if !self.is_read_only() && part.file.metadata()?.is_file() {
                allocate(&part.file, part.start + self.end_of(index) - part.base)?;
            }
        }
        Ok(())
    }

    /// Touches every page now, so that no request pays for a first touch.
    ///
    /// # Errors
    /// Some of it cannot be reached.
    pub fn prefault(&self) -> io::Result<()> {
        self.mapping.prefault(self.class).map_err(|failure| failure.source)
    }

    /// The address of byte `at`, of which `len` follow. Panics past the end.
    #[inline]
    fn address(&self, at: u64, len: usize) -> *mut u8 {
        let end = at.checked_add(len as u64);
        assert!(end.is_some_and(|end| end <= self.mapping.len()), "{at}+{len} of {}", self.mapping.len());
        self.mapping.base.wrapping_add(at as usize)
    }
}

impl Pmem for MappedPmem {
    fn len(&self) -> u64 {
        self.mapping.len()
    }

    fn resize(&self, len: u64) -> io::Result<u64> {
        assert!(!self.is_read_only(), "a change of media opened for reading");
        let last = self.last();
        let own = |len: u64| len - last.base + last.start;
        let meta = last.file.metadata()?;
        if !meta.is_file() {
            // Whoever gives a device its size has done so already.
            let found = open::device_len(&last.file, &meta)?;
            let found = found.saturating_sub(last.start).saturating_add(last.base);
            if found > self.len() {
                self.mapping.grow(last, found, self.class)?;
            }
            return Ok(self.len());
        }
        let len = len.next_multiple_of(self.mapping.page_size);
        if len > self.len() {
            if own(len) > meta.len() {
                create::extend(&last.file, meta.len(), own(len))?;
            }
            self.mapping.grow(last, len, self.class)?;
        } else if len < self.len() && len > last.base {
            self.mapping.cut(len)?;
            last.file.set_len(own(len))?;
            last.file.sync_all()?;
        }
        Ok(self.len())
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
            MediaClass::PageCache if self.mapping.writable => {
                self.durability.sync(|| flush_each(&self.parts, File::sync_data))
            }
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
                drop_pages(&self.parts, &self.mapping).map_err(SyncError)
            }
            _ => Ok(()),
        }
    }

    fn is_on_device(&self, ranges: &[Range<u64>]) -> io::Result<bool> {
        if self.class != MediaClass::PageCache {
            return Ok(true);
        }
        for (index, part) in self.parts.iter().enumerate() {
            let device = open_past_cache(&part.file)?;
            let end = self.end_of(index);
            let own = ranges.iter().map(|range| range.start.max(part.base)..range.end.min(end));
            let own: Vec<Range<u64>> = own.filter(|range| !range.is_empty()).collect();
            if !self.is_on(&device, part, &own)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    #[inline]
    fn prefetch(&self, at: u64) {
        // A record's header and keys, or the beginning of a block, whose rest the processor foresees.
        let first = self.address(at, 0);
        for line in 0..4 {
            guard::prefetch(first.wrapping_add(line * 64));
        }
    }
}

impl MappedPmem {
    /// Whether the part's file, read past the page cache, has what these ranges of the part show.
    fn is_on(&self, device: &File, part: &Part, ranges: &[Range<u64>]) -> io::Result<bool> {
        let (mut shown, mut room) = (vec![0; COMPARE_STEP], vec![0; COMPARE_STEP + COMPARE_ALIGN]);
        let skew = room.as_ptr().align_offset(COMPARE_ALIGN);
        for range in ranges {
            for at in range.clone().step_by(COMPARE_STEP) {
                let len = (range.end - at).min(COMPARE_STEP as u64) as usize;
                let had = &mut room[skew..skew + len];
                match device.read_exact_at(had, at - part.base + part.start) {
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
}

/// Takes the space of the first `len` bytes of a file, whose length stays.
#[expect(unsafe_code, reason = "calls fallocate")]
fn allocate(file: &File, len: u64) -> io::Result<()> {
    loop {
        // SAFETY: the descriptor is open; the range is checked by the kernel.
        let done =
            unsafe { libc::fallocate(file.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, 0, len as libc::off_t) };
        match io::Error::last_os_error() {
            _ if done == 0 => return Ok(()),
            error if error.kind() == io::ErrorKind::Interrupted => {}
            error => return Err(error),
        }
    }
}

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

/// Drops the files' pages from the page cache, and makes sure that none is left.
#[expect(unsafe_code, reason = "calls madvise and posix_fadvise")]
fn drop_pages(parts: &[Part], mapping: &Mapping) -> io::Result<()> {
    // Dirty pages are not dropped: each must be written, or given up by the kernel. What it says is
    // news of the stores that are about to be forgotten, and by reporting it the kernel forgets it.
    if let Err(error) = flush_each(parts, File::sync_data) {
        tracing::warn!(%error, "stores that never reached the cache's device are forgotten");
    }
    for _ in 0..DROP_TRIES {
        // SAFETY: our own mapping of a file: what is not mapped any more is read again when touched.
        unsafe { libc::madvise(mapping.base.cast(), mapping.mapped_len(), libc::MADV_DONTNEED) };
        for part in parts {
            // SAFETY: the descriptor is open.
            unsafe { libc::posix_fadvise(part.file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        }
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

#[cfg(test)]
mod tests;
