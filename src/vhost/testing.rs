//! What the unit tests of this module share: guest memory of memfds, a driver's side of a ring, and
//! a random generator.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::fds;
use super::memory::{MemoryMap, RegionSpec};
use super::ring::RingAddresses;
use crate::volume::DiskConfig;

/// VMM addresses are guest addresses plus this.
pub(super) const USER: u64 = 0x7000_0000_0000;

/// A small disk with four queues.
pub(super) fn disk_config() -> DiskConfig {
    DiskConfig {
        sectors: 2048,
        block_size: 512,
        physical_block_size: 4096,
        optimal_io_size: 0,
        read_only: false,
        serial: *b"a serial of 20 bytes",
        queues: 4,
        queue_size: 256,
    }
}

/// A file of `len` zero bytes that lives in memory.
pub(super) fn memory_file(len: u64) -> File {
    fds::sealed_memory_file(len).unwrap()
}

/// `map` and a region of `len` bytes at `guest`.
pub(super) fn with_region(map: &MemoryMap, guest: u64, len: u64) -> MemoryMap {
    let spec = RegionSpec { guest, user: guest + USER, len, offset: 0 };
    map.with(spec, OwnedFd::from(memory_file(len)), u64::MAX).unwrap()
}

/// A guest with one region of `len` bytes at address 0.
pub(super) fn guest(len: u64) -> MemoryMap {
    with_region(&MemoryMap::default(), 0, len)
}

/// xorshift64*: small, seeded, good enough to shuffle with.
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// Runs `test` with several seeds and names the one that fails.
pub(super) fn for_seeds(count: u64, test: impl Fn(&mut Random) + std::panic::RefUnwindSafe) {
    for seed in 1..=count {
        let seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let result = std::panic::catch_unwind(|| test(&mut Random(seed)));
        if let Err(panic) = result {
            eprintln!("failed with seed {seed:#x}");
            std::panic::resume_unwind(panic);
        }
    }
}

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// The driver's side of a split ring, at fixed places in the guest's first 64 KiB.
pub(super) struct Driver {
    pub map: Arc<MemoryMap>,
    pub size: u16,
}

impl Driver {
    const DESCRIPTORS: u64 = 0x0000;
    const AVAILABLE: u64 = 0x8000;
    const USED: u64 = 0xa000;

    pub fn new(map: Arc<MemoryMap>, size: u16) -> Self {
        Self { map, size }
    }

    pub fn addresses() -> RingAddresses {
        RingAddresses {
            descriptors: USER + Self::DESCRIPTORS,
            available: USER + Self::AVAILABLE,
            used: USER + Self::USED,
        }
    }

    pub fn descriptor_bytes(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&next.to_le_bytes());
        bytes
    }

    pub fn describe(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = Self::DESCRIPTORS + u64::from(index) * 16;
        self.map.write(at, &Self::descriptor_bytes(addr, len, flags, next)).unwrap();
    }

    fn put(&self, at: u64, value: u16) {
        self.map.write(at, &value.to_le_bytes()).unwrap();
    }

    fn get(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.map.read(at, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    pub fn set_available(&self, position: u16, head: u16) {
        self.put(Self::AVAILABLE + 4 + u64::from(position % self.size) * 2, head);
    }

    pub fn set_available_flags(&self, flags: u16) {
        self.put(Self::AVAILABLE, flags);
    }

    pub fn set_available_index(&self, index: u16) {
        self.put(Self::AVAILABLE + 2, index);
    }

    pub fn set_used_event(&self, event: u16) {
        self.put(Self::AVAILABLE + 4 + u64::from(self.size) * 2, event);
    }

    pub fn set_used_index(&self, index: u16) {
        self.put(Self::USED + 2, index);
    }

    pub fn used_flags(&self) -> u16 {
        self.get(Self::USED)
    }

    pub fn used_index(&self) -> u16 {
        self.get(Self::USED + 2)
    }

    pub fn available_event(&self) -> u16 {
        self.get(Self::USED + 4 + u64::from(self.size) * 8)
    }

    pub fn used(&self, position: u16) -> (u32, u32) {
        let mut bytes = [0; 8];
        self.map.read(Self::USED + 4 + u64::from(position % self.size) * 8, &mut bytes).unwrap();
        let word = u64::from_le_bytes(bytes);
        (word as u32, (word >> 32) as u32)
    }
}
