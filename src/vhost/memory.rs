//! Guest memory: the regions a VMM shares, and the only ways to touch them.
//!
//! A [`MemoryMap`] is an immutable snapshot. Changing the table makes a new one; requests in
//! flight hold the old one, and a region is unmapped when the last snapshot with it goes. Queue
//! threads learn of a new snapshot through [`SharedMemory`].
//!
//! Invariants:
//! - every span of a map lies in a mapping that the map keeps alive;
//! - when mapped, the file behind a region was at least as long as the region's end, and sealed
//!   against shrinking where its kind allows; if it shrinks all the same, the copy fails;
//! - spans do not overlap in guest addresses, none wraps, and their number and sum are bounded. In
//!   VMM addresses they may: one block of RAM can be visible at two guest addresses;
//! - while a VMM keeps a dirty log, every write of ours is noted in it;
//! - a [`HostRange`] never leaves this module and `ring` except beside the map it points into.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::{Arc, PoisonError};

use super::copy::{self, Fault};
use super::dirty_log::DirtyLog;
use super::fds;
use crate::pmem::guard::{ForeignSlice, ForeignSliceMut};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{self, Mutex};
use crate::volume::{Buffer, GuestFault};

/// Regions a device may have: what GET_MAX_MEM_SLOTS answers. QEMU's own limit for DIMMs and
/// virtio-mem is 509.
pub(super) const MAX_REGIONS: usize = 509;

/// Why a region was refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemoryError {
    #[error("region at {guest:#x} of {len:#x} bytes is empty or wraps around")]
    BadRange { guest: u64, len: u64 },
    #[error("region at {guest:#x} overlaps another")]
    Overlap { guest: u64 },
    #[error("more than {MAX_REGIONS} regions")]
    TooMany,
    #[error("{total:#x} bytes of guest memory are more than the {limit:#x} allowed")]
    TooMuch { total: u64, limit: u64 },
    #[error("the file behind the region ends at {file:#x}, before the region does ({needed:#x})")]
    FileTooShort { file: u64, needed: u64 },
    #[error("what is behind the region is neither a file nor a device")]
    NotMappable,
    #[error("no such region")]
    Unknown,
    #[error("mapping the region failed: {0}")]
    Map(#[from] io::Error),
}

/// An address range that a VMM's message names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct RegionSpec {
    /// First guest-physical address.
    pub guest: u64,
    /// The same byte's address in the VMM.
    pub user: u64,
    /// Bytes; need not be a multiple of anything.
    pub len: u64,
    /// Where the region starts in its file.
    pub offset: u64,
}

/// A shared mapping of a part of a file.
#[derive(Debug)]
pub(super) struct Mapping {
    base: *mut u8,
    mapped: usize,
    /// Bytes before the wanted part, for the sake of alignment.
    lead: usize,
    len: usize,
}

// SAFETY: a mapping is an address range of the process, valid from any thread until it is dropped;
// what lies in it is only ever copied, never referred to.
#[expect(unsafe_code, reason = "raw pointers are not Send by themselves")]
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` only gives out the address.
#[expect(unsafe_code, reason = "raw pointers are not Sync by themselves")]
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset`, which may be unaligned.
    ///
    /// # Errors
    /// [`MemoryError::FileTooShort`], [`MemoryError::NotMappable`], or what the kernel says.
    #[expect(unsafe_code, reason = "maps memory")]
    pub fn new(file: &File, offset: u64, len: u64) -> Result<Self, MemoryError> {
        let end = offset.checked_add(len).ok_or(MemoryError::BadRange { guest: offset, len })?;
        let metadata = file.metadata()?;
        if metadata.is_file() {
            if metadata.len() < end {
                return Err(MemoryError::FileTooShort { file: metadata.len(), needed: end });
            }
        } else if !metadata.file_type().is_char_device() {
            // A device (devdax as guest RAM) has no length here; mmap itself checks it.
            return Err(MemoryError::NotMappable);
        }
        let page = page_size(file);
        let lead = offset % page;
        // Huge pages want the length rounded as well, at unmapping at the latest.
        let mapped = (lead + len).checked_next_multiple_of(page).filter(|&bytes| bytes <= isize::MAX as u64);
        let mapped = mapped.ok_or(MemoryError::BadRange { guest: offset, len })? as usize;
        let position =
            libc::off_t::try_from(offset - lead).map_err(|_| MemoryError::BadRange { guest: offset, len })?;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                position,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        // SAFETY: the range has just been mapped. Advice only: a guest's memory in a core dump
        // would be a leak and terabytes long.
        unsafe { libc::madvise(base, mapped, libc::MADV_DONTDUMP) };
        Ok(Self { base: base.cast(), mapped, lead: lead as usize, len: len as usize })
    }

    /// The first wanted byte. Valid for [`Mapping::len`] bytes while the mapping lives.
    pub fn start(&self) -> *mut u8 {
        self.base.wrapping_add(self.lead)
    }

    /// Wanted bytes.
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    #[expect(unsafe_code, reason = "unmaps memory")]
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped, once; whoever copies holds this mapping alive.
        unsafe { libc::munmap(self.base.cast(), self.mapped) };
    }
}

/// What a region's spans point into, and where it came from: whoever serves this VM after us maps it
/// anew.
#[derive(Debug)]
struct Region {
    mapping: Mapping,
    file: File,
    offset: u64,
}

/// The unit in which `file` can be mapped.
#[expect(unsafe_code, reason = "no safe wrapper of fstatfs and sysconf")]
fn page_size(file: &File) -> u64 {
    // SAFETY: all zeros is a valid statfs; fstatfs fills it or fails.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and `stat` is ours.
    let found = unsafe { libc::fstatfs(file.as_raw_fd(), &mut stat) } == 0;
    if found && stat.f_type as u64 == libc::HUGETLBFS_MAGIC as u64 && stat.f_bsize > 0 {
        return stat.f_bsize as u64;
    }
    // SAFETY: sysconf has no preconditions.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(4096) as u64
}

/// Contiguous bytes of guest memory at their place in this process. Valid while the [`MemoryMap`]
/// it came from lives, or any later one that still has the region.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostRange {
    /// First byte.
    pub at: *mut u8,
    /// Bytes.
    pub len: usize,
}

// SAFETY: an address and a length; whoever dereferences it holds the map it points into.
#[expect(unsafe_code, reason = "raw pointers are not Send by themselves")]
unsafe impl Send for HostRange {}

/// One region of a map, flat for the search.
#[derive(Clone, Copy, Debug)]
struct Span {
    guest: u64,
    user: u64,
    len: u64,
    host: *mut u8,
}

/// The guest's memory at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct MemoryMap {
    /// In order of guest address.
    spans: Vec<Span>,
    /// What the spans point into, in the same order.
    mappings: Vec<Arc<Region>>,
    /// Where writes are noted while the VMM copies this memory to another host.
    log: Option<Arc<DirtyLog>>,
}

// SAFETY: spans are addresses inside the mappings beside them, which are Send and Sync.
#[expect(unsafe_code, reason = "raw pointers are not Send by themselves")]
unsafe impl Send for MemoryMap {}
// SAFETY: as above; nothing is changed through `&MemoryMap` but guest memory, by copies.
#[expect(unsafe_code, reason = "raw pointers are not Sync by themselves")]
unsafe impl Sync for MemoryMap {}

impl MemoryMap {
    /// A map with this one's regions and one more, mapped from `fd`.
    ///
    /// # Errors
    /// Anything in [`MemoryError`]; nothing is mapped then.
    pub fn with(&self, spec: RegionSpec, fd: OwnedFd, limit: u64) -> Result<Self, MemoryError> {
        let RegionSpec { guest, user, len, offset } = spec;
        let bad = MemoryError::BadRange { guest, len };
        let (Some(end), Some(_)) = (guest.checked_add(len), user.checked_add(len)) else { return Err(bad) };
        if len == 0 {
            return Err(bad);
        }
        if self.spans.len() >= MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        let total = self.spans.iter().try_fold(len, |sum, span| sum.checked_add(span.len));
        match total {
            Some(total) if total <= limit => {}
            total => return Err(MemoryError::TooMuch { total: total.unwrap_or(u64::MAX), limit }),
        }
        let at = self.spans.partition_point(|span| span.guest < guest);
        let before = at.checked_sub(1).map(|index| self.spans[index]);
        let after = self.spans.get(at);
        if before.is_some_and(|span| span.guest + span.len > guest)
            || after.is_some_and(|span| span.guest < end)
        {
            return Err(MemoryError::Overlap { guest });
        }
        let file = File::from(fd);
        // Before the length is looked at, so that what is found stays true.
        fds::seal_length(&file);
        let region = Region { mapping: Mapping::new(&file, offset, len)?, file, offset };
        let mut map = self.clone();
        map.spans.insert(at, Span { guest, user, len, host: region.mapping.start() });
        map.mappings.insert(at, Arc::new(region));
        Ok(map)
    }

    /// The regions as the VMM named them, each with the descriptor it came with.
    pub fn regions(&self) -> impl Iterator<Item = (RegionSpec, &File)> {
        self.spans.iter().zip(&self.mappings).map(|(span, region)| {
            let Span { guest, user, len, .. } = *span;
            (RegionSpec { guest, user, len, offset: region.offset }, &region.file)
        })
    }

    /// A map without the region at these addresses. Its offset is not compared: QEMU sends zero.
    ///
    /// # Errors
    /// [`MemoryError::Unknown`].
    pub fn without(&self, spec: RegionSpec) -> Result<Self, MemoryError> {
        let same = |span: &Span| (span.guest, span.user, span.len) == (spec.guest, spec.user, spec.len);
        let at = self.spans.iter().position(same).ok_or(MemoryError::Unknown)?;
        let mut map = self.clone();
        map.spans.remove(at);
        map.mappings.remove(at);
        Ok(map)
    }

    /// The same map, with its writes noted in `log` or not at all.
    pub fn with_log(self, log: Option<Arc<DirtyLog>>) -> Self {
        Self { log, ..self }
    }

    /// Notes a write to a guest address by whoever does not go through [`MemoryMap::write`].
    pub fn note(&self, guest: u64, len: usize) {
        if let Some(log) = &self.log {
            log.mark(guest, len);
        }
    }

    /// The same for a place in a region, as this map has it.
    pub fn note_host(&self, at: *const u8, len: usize) {
        let Some(log) = &self.log else { return };
        let place =
            |span: &Span| at.addr().checked_sub(span.host.addr()).filter(|&skip| (skip as u64) < span.len);
        if let Some((span, skip)) = self.spans.iter().find_map(|span| Some((span, place(span)?))) {
            log.mark(span.guest + skip as u64, len);
        }
    }

    /// Where `len` bytes at a VMM's address lie, if one region has them all.
    pub fn at_user(&self, user: u64, len: usize) -> Option<HostRange> {
        self.spans.iter().find_map(|span| {
            let skip = user.checked_sub(span.user).filter(|&skip| skip < span.len)?;
            (len as u64 <= span.len - skip)
                .then(|| HostRange { at: span.host.wrapping_add(skip as usize), len })
        })
    }

    /// Appends the places of `len` bytes at a guest address, which may run over several regions
    /// that touch. `false`, and nothing appended, when some are not there.
    pub fn locate(&self, guest: u64, len: usize, ranges: &mut Vec<HostRange>) -> bool {
        let before = ranges.len();
        let complete = self.each(guest, len, |range| ranges.push(range));
        if !complete {
            ranges.truncate(before);
        }
        complete
    }

    /// Whether the guest has all of `len` bytes at a guest address.
    pub fn contains(&self, guest: u64, len: usize) -> bool {
        self.each(guest, len, |_| {})
    }

    /// Copies from a guest address.
    ///
    /// # Errors
    /// [`Fault`]: some of it is outside the table, or gone; `dst` is unspecified.
    #[expect(unsafe_code, reason = "copies guest memory")]
    pub fn read(&self, guest: u64, dst: &mut [u8]) -> Result<(), Fault> {
        let mut done = 0;
        let mut result = Ok(());
        let complete = self.each(guest, dst.len(), |range| {
            let part = &mut dst[done..done + range.len];
            done += range.len;
            sync::access();
            // SAFETY: the range lies in a mapping that `self` keeps alive.
            result = result.and(unsafe { copy::copy_in(range.at, part) });
        });
        if complete { result } else { Err(Fault) }
    }

    /// Copies to a guest address.
    ///
    /// # Errors
    /// [`Fault`]: some of it is outside the table, or gone.
    #[expect(unsafe_code, reason = "copies guest memory")]
    pub fn write(&self, guest: u64, src: &[u8]) -> Result<(), Fault> {
        let mut done = 0;
        let mut result = Ok(());
        let complete = self.each(guest, src.len(), |range| {
            let part = &src[done..done + range.len];
            done += range.len;
            sync::access();
            // SAFETY: the range lies in a mapping that `self` keeps alive, mapped writable.
            result = result.and(unsafe { copy::copy_out(part, range.at) });
        });
        self.note(guest, src.len());
        if complete { result } else { Err(Fault) }
    }

    /// Calls `visit` for each contiguous piece; `false` when it came to an address with no region.
    fn each(&self, guest: u64, len: usize, mut visit: impl FnMut(HostRange)) -> bool {
        let (mut guest, mut left) = (guest, len);
        let mut index = self.spans.partition_point(|span| span.guest <= guest).wrapping_sub(1);
        while left > 0 {
            let Some(span) = self.spans.get(index) else { return false };
            let Some(skip) = guest.checked_sub(span.guest).filter(|&skip| skip < span.len) else {
                return false;
            };
            let piece = (span.len - skip).min(left as u64) as usize;
            visit(HostRange { at: span.host.wrapping_add(skip as usize), len: piece });
            left -= piece;
            // Spans do not wrap, so neither does the end of one.
            guest += piece as u64;
            index = index.wrapping_add(1);
        }
        true
    }
}

/// The current map, for the queue threads of a session.
///
/// A thread asks for news after it has seen requests and before it translates them: a VMM hands out
/// memory only after the message that adds it was answered, so the order
/// "index, then generation, then addresses" can never miss a region.
#[derive(Debug, Default)]
pub(super) struct SharedMemory {
    generation: AtomicU64,
    map: Mutex<Arc<MemoryMap>>,
}

impl SharedMemory {
    /// The map in force.
    pub fn current(&self) -> Arc<MemoryMap> {
        Arc::clone(&self.map.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts `map` in force.
    pub fn replace(&self, map: MemoryMap) {
        *self.map.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(map);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Changes with every [`SharedMemory::replace`].
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
}

/// The data of one request: ranges of guest memory, and the map that keeps them mapped.
#[derive(Debug)]
pub(super) struct GuestBuffer {
    map: Arc<MemoryMap>,
    ranges: Vec<HostRange>,
    len: usize,
    /// A range and the offset of its first byte, at or before the last access: whoever goes
    /// through a buffer in order does not search.
    cursor: Cell<(usize, usize)>,
}

impl GuestBuffer {
    /// The bytes of `ranges`, all of which `map.locate` has found.
    pub fn new(map: Arc<MemoryMap>, ranges: Vec<HostRange>) -> Self {
        let len = ranges.iter().map(|range| range.len).sum();
        Self { map, ranges, len, cursor: Cell::new((0, 0)) }
    }

    /// Gives the vector back, empty, to be used again.
    pub fn into_ranges(mut self) -> Vec<HostRange> {
        self.ranges.clear();
        self.ranges
    }

    /// Where `at..at + len` lies, if in one range.
    fn piece(&self, at: usize, len: usize) -> Option<*mut u8> {
        let (mut index, mut start) = self.cursor.get();
        if start > at {
            (index, start) = (0, 0);
        }
        while let Some(range) = self.ranges.get(index) {
            let skip = at - start;
            if skip < range.len {
                self.cursor.set((index, start));
                return (len <= range.len - skip).then(|| range.at.wrapping_add(skip));
            }
            (index, start) = (index + 1, start + range.len);
        }
        None
    }

    /// Calls `visit` with each piece of `at..at + len` and its offset from `at`, until one fails.
    fn each(
        &self,
        at: usize,
        len: usize,
        mut visit: impl FnMut(*mut u8, usize, usize) -> Result<(), Fault>,
    ) -> Result<(), GuestFault> {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "{at}+{len} of {}", self.len);
        let (mut index, mut start) = self.cursor.get();
        if start > at {
            (index, start) = (0, 0);
        }
        let mut done = 0;
        while done < len {
            let range = self.ranges[index];
            let skip = at + done - start;
            if skip >= range.len {
                (index, start) = (index + 1, start + range.len);
                continue;
            }
            self.cursor.set((index, start));
            let piece = (range.len - skip).min(len - done);
            visit(range.at.wrapping_add(skip), done, piece).map_err(|Fault| GuestFault)?;
            done += piece;
        }
        Ok(())
    }
}

impl Buffer for GuestBuffer {
    fn len(&self) -> usize {
        self.len
    }

    #[expect(unsafe_code, reason = "copies guest memory")]
    fn copy_out(&self, at: usize, dst: &mut [u8]) -> Result<(), GuestFault> {
        debug_assert!(self.ranges.is_empty() || !self.map.spans.is_empty());
        self.each(at, dst.len(), |src, done, len| {
            // SAFETY: the piece lies in a range of a mapping that `self.map` keeps alive.
            unsafe { copy::copy_in(src, &mut dst[done..done + len]) }
        })
    }

    #[expect(unsafe_code, reason = "copies guest memory")]
    fn copy_in(&mut self, at: usize, src: &[u8]) -> Result<(), GuestFault> {
        self.each(at, src.len(), |dst, done, len| {
            // SAFETY: the piece lies in a range of a mapping that `self.map` keeps alive, mapped
            // writable.
            let copied = unsafe { copy::copy_out(&src[done..done + len], dst) };
            self.map.note_host(dst, len);
            copied
        })
    }

    #[expect(unsafe_code, reason = "lends guest memory")]
    fn lend<R>(&self, at: usize, len: usize, f: impl FnOnce(ForeignSlice<'_>) -> R) -> Option<R> {
        let at = self.piece(at, len)?;
        sync::access();
        // SAFETY: the piece lies in a range of a mapping that `self.map` keeps alive.
        Some(f(unsafe { ForeignSlice::new(at, len) }))
    }

    #[expect(unsafe_code, reason = "lends guest memory")]
    fn lend_mut<R>(&mut self, at: usize, len: usize, f: impl FnOnce(ForeignSliceMut<'_>) -> R) -> Option<R> {
        let at = self.piece(at, len)?;
        sync::access();
        // SAFETY: the piece lies in a range of a mapping that `self.map` keeps alive, mapped writable;
        // nobody makes references into it.
        let answer = f(unsafe { ForeignSliceMut::new(at, len) });
        self.map.note_host(at, len);
        Some(answer)
    }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
