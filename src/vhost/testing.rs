//! What the unit tests of this module share: guest memory of memfds, a driver's side of a ring, and
//! a random generator.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::cell::Cell;
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

thread_local! {
    static FUEL: Cell<u64> = const { Cell::new(u64::MAX) };
}

/// What a process that has died says.
struct Died;

/// See `copy::step`.
pub(super) fn step() {
    FUEL.with(|fuel| match fuel.get() {
        u64::MAX => {}
        0 => std::panic::resume_unwind(Box::new(Died)),
        left => fuel.set(left - 1),
    });
}

/// Runs `life` for `steps` steps: what it returned, or `None` when it died before.
pub(super) fn live<T>(steps: u64, life: impl FnOnce() -> T) -> Option<T> {
    FUEL.set(steps);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(life));
    FUEL.set(u64::MAX);
    match outcome {
        Ok(value) => Some(value),
        Err(panic) if panic.is::<Died>() => None,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// The driver's side of a packed ring, at fixed places in the guest's first 64 KiB.
pub(super) struct PackedDriver {
    pub map: Arc<MemoryMap>,
    pub size: u16,
    next: u16,
    wrap: bool,
    used: u16,
    used_wrap: bool,
    /// Slots of the chain under each id, or 0.
    slots: Vec<u16>,
    free: u16,
}

impl PackedDriver {
    const DRIVER_AREA: u64 = 0x8000;
    const DEVICE_AREA: u64 = 0x9000;

    /// A driver that stands at slot `start` of its first round.
    pub fn new(map: Arc<MemoryMap>, size: u16, start: u16) -> Self {
        let slots = vec![0; size.into()];
        let driver =
            Self { map, size, next: start, wrap: true, used: start, used_wrap: true, slots, free: size };
        // What lies behind it was used in this round.
        (0..start).for_each(|slot| driver.write_slot(slot, 0, 0, 0, 1 << 7 | 1 << 15));
        driver
    }

    pub fn addresses() -> RingAddresses {
        RingAddresses {
            descriptors: USER,
            available: USER + Self::DRIVER_AREA,
            used: USER + Self::DEVICE_AREA,
        }
    }

    /// Where it stands, as SET_VRING_BASE says it when nothing is in flight.
    pub fn base(&self) -> u32 {
        (u32::from(self.used) | u32::from(self.used_wrap) << 15) * 0x1_0001
    }

    /// Where it writes next, as events word it.
    #[cfg(feature = "weave")]
    pub fn next_place(&self) -> u16 {
        self.next | u16::from(self.wrap) << 15
    }

    /// Where it looks for the next used descriptor.
    #[cfg(feature = "weave")]
    pub fn used_place(&self) -> u16 {
        self.used | u16::from(self.used_wrap) << 15
    }

    /// Slots that are not in use.
    pub fn free(&self) -> u16 {
        self.free
    }

    /// Whether no chain has this id.
    pub fn is_free(&self, id: u16) -> bool {
        self.slots[usize::from(id)] == 0
    }

    /// Writes one slot whole.
    pub fn write_slot(&self, slot: u16, addr: u64, len: u32, id: u16, flags: u16) {
        let bytes = Driver::descriptor_bytes(addr, len, id, flags);
        self.map.write(u64::from(slot) * 16, &bytes).unwrap();
    }

    /// Makes a chain available under `id`: address, length and flags of each part.
    pub fn offer(&mut self, id: u16, parts: &[(u64, u32, u16)]) {
        assert!(self.is_free(id) && parts.len() <= usize::from(self.free));
        let mut slots = Vec::new();
        for (i, &(addr, len, flags)) in parts.iter().enumerate() {
            let link = if i + 1 < parts.len() { NEXT } else { 0 };
            let state = if self.wrap { 1 << 7 } else { 1 << 15 };
            slots.push((self.next, addr, len, flags | link | state));
            self.next += 1;
            if self.next == self.size {
                (self.next, self.wrap) = (0, !self.wrap);
            }
        }
        // The first slot last: it makes the whole chain available.
        for &(slot, addr, len, flags) in slots.iter().rev() {
            self.write_slot(slot, addr, len, id, flags);
        }
        self.slots[usize::from(id)] = parts.len() as u16;
        self.free -= parts.len() as u16;
    }

    /// The next used chain: its id and the length written.
    pub fn collect(&mut self) -> Option<(u16, u32)> {
        let mut bytes = [0; 16];
        self.map.read(u64::from(self.used) * 16, &mut bytes).unwrap();
        let word = u128::from_le_bytes(bytes);
        let (len, id, flags) = ((word >> 64) as u32, (word >> 96) as u16, (word >> 112) as u16);
        let (avail, used) = (flags >> 7 & 1 == 1, flags >> 15 == 1);
        if avail != used || used != self.used_wrap {
            return None;
        }
        let slots = std::mem::take(&mut self.slots[usize::from(id)]);
        assert!(slots > 0, "id {id} comes back and is not in flight");
        self.free += slots;
        self.used += slots;
        if self.used >= self.size {
            (self.used, self.used_wrap) = (self.used - self.size, !self.used_wrap);
        }
        Some((id, len))
    }

    pub fn set_event(&self, off_wrap: u16, flags: u16) {
        let bytes = u32::from(off_wrap) | u32::from(flags) << 16;
        self.map.write(Self::DRIVER_AREA, &bytes.to_le_bytes()).unwrap();
    }

    /// The device's event: its position and flags.
    pub fn device_event(&self) -> (u16, u16) {
        let mut bytes = [0; 4];
        self.map.read(Self::DEVICE_AREA, &mut bytes).unwrap();
        let word = u32::from_le_bytes(bytes);
        (word as u16, (word >> 16) as u16)
    }
}
