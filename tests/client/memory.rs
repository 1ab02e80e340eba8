//! Guest memory: a memfd shared with the server, cut into regions that are not neighbours.
//!
//! Everybody may write here at any time, so it is touched by copies and atomics only; there is never
//! a reference into it.

#![expect(unsafe_code, reason = "maps memory that is shared with the server")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicU16, Ordering};

use super::wire::{Req, Wire, longs, words};

/// Guest-physical distance between the ends of neighbouring regions.
const HOLE: u64 = 1 << 30;

/// One entry of the memory table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Region {
    /// First guest-physical address.
    pub guest: u64,
    /// Length in bytes.
    pub len: u64,
    /// First address in the front end's own space.
    pub user: u64,
    /// Where it begins in the memfd.
    pub offset: u64,
}

impl Region {
    /// As the memory messages want it.
    pub fn to_bytes(self) -> Vec<u8> {
        longs(&[self.guest, self.len, self.user, self.offset])
    }
}

/// A guest's memory.
#[derive(Debug)]
pub struct Memory {
    file: File,
    base: *mut u8,
    len: u64,
    regions: Vec<Region>,
}

// SAFETY: the pointer is to a shared mapping that lives as long as the value; it is only used for
// copies and atomic accesses.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// `len` bytes in `count` regions of the same size, with holes between them.
    pub fn new(len: u64, count: u16) -> Self {
        Self::cut(len, count, HOLE, libc::MFD_ALLOW_SEALING)
    }

    /// The same without holes: what runs out of one region runs into the next.
    pub fn touching(len: u64, count: u16) -> Self {
        Self::cut(len, count, 0, libc::MFD_ALLOW_SEALING)
    }

    /// One region that nobody can seal: it can always be made shorter.
    pub fn unsealable(len: u64) -> Self {
        Self::cut(len, 1, 0, 0)
    }

    fn cut(len: u64, count: u16, hole: u64, sealing: libc::c_uint) -> Self {
        let each = len / u64::from(count);
        assert!(each.is_multiple_of(4096) && each * u64::from(count) == len, "regions are whole pages");
        let mut memory = Self::flat(len, sealing);
        memory.regions = (0..u64::from(count))
            .map(|i| Region {
                guest: i * (each + hole),
                len: each,
                user: memory.base as u64 + i * each,
                offset: i * each,
            })
            .collect();
        memory
    }

    /// `len` bytes, any length, as one region that begins at `skip` in the file and at the same guest
    /// address as in our own space, the way libblkio does it.
    pub fn identity(len: u64, skip: u64) -> Self {
        let mut memory = Self::flat(skip + len, libc::MFD_ALLOW_SEALING);
        let user = memory.base as u64 + skip;
        memory.regions = vec![Region { guest: user, len, user, offset: skip }];
        memory
    }

    fn flat(len: u64, sealing: libc::c_uint) -> Self {
        // SAFETY: a literal name and valid flags.
        let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC | sealing) };
        assert!(fd >= 0, "memfd_create: {}", io::Error::last_os_error());
        // SAFETY: the descriptor is new and ours.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(len).expect("a memfd can grow");
        // SAFETY: a new shared mapping of the whole file, at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd,
                0,
            )
        };
        assert!(base != libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
        Self { file, base: base.cast(), len, regions: Vec::new() }
    }

    /// Forbids ever making it smaller or larger, as QEMU does by default.
    pub fn seal(&self) {
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: no memory is involved.
        let failed = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
        assert_eq!(failed, 0, "F_ADD_SEALS: {}", io::Error::last_os_error());
    }

    /// The memory table's entries.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The memfd.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// SET_MEM_TABLE.
    pub fn set_table(&self, wire: &Wire) {
        let mut body = words(&[self.regions.len() as u32, 0]);
        body.extend(self.regions.iter().flat_map(|region| region.to_bytes()));
        wire.tell(Req::SetMemTable, &body, &vec![self.file.as_raw_fd(); self.regions.len()]);
    }

    /// ADD_MEM_REG for every region.
    pub fn add_regions(&self, wire: &Wire) {
        for region in &self.regions {
            self.add_region(wire, *region);
        }
    }

    /// ADD_MEM_REG for one region of this memory's file.
    pub fn add_region(&self, wire: &Wire, region: Region) {
        wire.tell(Req::AddMemReg, &single_region(region), &[self.file.as_raw_fd()]);
    }

    /// REM_MEM_REG.
    pub fn remove_region(&self, wire: &Wire, region: Region) {
        wire.tell(Req::RemMemReg, &single_region(region), &[]);
    }

    fn offset(&self, guest: u64, len: usize) -> usize {
        let inside = |r: &&Region| guest >= r.guest && guest + len as u64 <= r.guest + r.len;
        let region = self.regions.iter().find(inside);
        let region = region.unwrap_or_else(|| panic!("{guest:#x}+{len} is not in the guest's memory"));
        (region.offset + guest - region.guest) as usize
    }

    /// The front end's own address of a guest-physical one.
    pub fn user(&self, guest: u64) -> u64 {
        self.base as u64 + self.offset(guest, 1) as u64
    }

    /// Copies into guest memory.
    pub fn write(&self, guest: u64, bytes: &[u8]) {
        let at = self.offset(guest, bytes.len());
        // SAFETY: `offset` has checked that the range is mapped; `bytes` is not in the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(at), bytes.len()) }
    }

    /// Copies out of guest memory.
    pub fn read(&self, guest: u64, bytes: &mut [u8]) {
        let at = self.offset(guest, bytes.len());
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(self.base.add(at), bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Fills guest memory with one byte.
    pub fn fill(&self, guest: u64, byte: u8, len: usize) {
        let at = self.offset(guest, len);
        // SAFETY: as in `write`.
        unsafe { std::ptr::write_bytes(self.base.add(at), byte, len) }
    }

    fn word(&self, guest: u64) -> &AtomicU16 {
        assert!(guest.is_multiple_of(2), "a ring's words are aligned");
        let at = self.offset(guest, 2);
        // SAFETY: mapped, aligned (the mapping is page-aligned and regions keep parity), lives as
        // long as `self`, and others access it atomically too.
        unsafe { AtomicU16::from_ptr(self.base.add(at).cast()) }
    }

    /// Loads a word; what was written before it was stored is visible afterwards.
    pub fn load(&self, guest: u64) -> u16 {
        u16::from_le(self.word(guest).load(Ordering::Acquire))
    }

    /// Stores a word; whoever sees it sees what was written before.
    pub fn store(&self, guest: u64, value: u16) {
        self.word(guest).store(value.to_le(), Ordering::Release);
    }
}

fn single_region(region: Region) -> Vec<u8> {
    let mut body = longs(&[0]);
    body.extend(region.to_bytes());
    body
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no pointer into it outlives the value.
        unsafe { libc::munmap(self.base.cast(), self.len as usize) };
    }
}
