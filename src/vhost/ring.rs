//! The split virtqueue (virtio 1.3 §2.7), device side, on raw pointers into guest memory.
//!
//! ```text
//! descriptors   size × { addr u64, len u32, flags u16, next u16 }
//! available     flags u16, idx u16, size × head u16, used_event u16
//! used          flags u16, idx u16, size × { head u32, len u32 }, avail_event u16
//! ```
//!
//! Nothing here believes the driver: an index that runs more than a ring ahead or a head that is no
//! descriptor is an error, and the ring is then not read again.
//!
//! Order, and what breaks if two steps are swapped:
//! 1. load the available index (acquire), then heads and descriptors: else stale descriptors;
//! 2. store used elements, then the used index (release): else the driver reads garbage elements;
//! 3. store the used index, full fence, load the driver's event: else both sides sleep;
//! 4. ask for notifications, full fence, load the available index: else both sides sleep.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};

use super::copy::{self, Fault};
use super::memory::MemoryMap;
use crate::sync;

/// Bytes of a descriptor.
pub(super) const DESCRIPTOR_LEN: usize = 16;

const FLAGS_AT: usize = 0;
const INDEX_AT: usize = 2;
const ENTRIES_AT: usize = 4;
const AVAIL_ENTRY: usize = 2;
const USED_ENTRY: usize = 8;

/// Why a ring is not read any more. The driver's fault, all of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum RingError {
    #[error("the available index jumped {ahead} ahead on a ring of {size}")]
    IndexJump { ahead: u16, size: u16 },
    #[error("descriptor {head} is made available on a ring of {size}")]
    HeadOutOfRange { head: u16, size: u16 },
    #[error("descriptor {head} is made available while it is in flight")]
    HeadInFlight { head: u16 },
    #[error("descriptor chain {head}: {error}")]
    Chain { head: u16, error: ChainError },
    #[error("the ring's memory is gone")]
    Fault,
}

impl From<Fault> for RingError {
    fn from(Fault: Fault) -> Self {
        RingError::Fault
    }
}

/// What is wrong with a chain of descriptors such that no status can be returned through it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum ChainError {
    #[error("longer than the ring, or a loop")]
    TooLong,
    #[error("the next descriptor, {next}, is outside the table of {table}")]
    NextOutOfRange { next: u16, table: u16 },
    #[error("a device-readable part after a device-writable one")]
    ReadableAfterWritable,
    #[error("an indirect table inside an indirect table")]
    NestedIndirect,
    #[error("a descriptor that is indirect and has a next one")]
    IndirectWithNext,
    #[error("an indirect descriptor, which was not negotiated")]
    IndirectNotNegotiated,
    #[error("an indirect table of {len} bytes")]
    IndirectLength { len: u32 },
    #[error("an indirect table outside the guest's memory")]
    IndirectOutside,
    #[error("more than 2^32 bytes")]
    TooManyBytes,
    #[error("no room for the status byte")]
    NoStatus,
    #[error("its status byte is outside the guest's memory")]
    StatusOutside,
    #[error("its memory is gone")]
    Fault,
}

/// One descriptor, copied out of guest memory once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Descriptor {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    flags: u16,
    /// The descriptor after this one, if [`Descriptor::has_next`].
    pub next: u16,
}

impl Descriptor {
    /// From the bytes of one.
    pub fn decode(bytes: &[u8; DESCRIPTOR_LEN]) -> Self {
        let word = u128::from_le_bytes(*bytes);
        Self {
            addr: word as u64,
            len: (word >> 64) as u32,
            flags: (word >> 96) as u16,
            next: (word >> 112) as u16,
        }
    }

    /// Whether the chain goes on.
    pub fn has_next(&self) -> bool {
        u32::from(self.flags) & VRING_DESC_F_NEXT != 0
    }

    /// Whether the device writes there (rather than reads).
    pub fn is_writable(&self) -> bool {
        u32::from(self.flags) & VRING_DESC_F_WRITE != 0
    }

    /// Whether it refers to a table of descriptors.
    pub fn is_indirect(&self) -> bool {
        u32::from(self.flags) & VRING_DESC_F_INDIRECT != 0
    }
}

/// Where a ring's parts are, in the VMM's addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct RingAddresses {
    /// Descriptor table, 16-aligned.
    pub descriptors: u64,
    /// Available ring, 2-aligned.
    pub available: u64,
    /// Used ring, 4-aligned.
    pub used: u64,
}

impl RingAddresses {
    /// Whether each part is aligned as virtio demands.
    pub fn are_aligned(&self) -> bool {
        self.descriptors.is_multiple_of(16) && self.available.is_multiple_of(2) && self.used.is_multiple_of(4)
    }
}

/// A running split virtqueue. Only its queue's thread touches it.
#[derive(Debug)]
pub(super) struct Ring {
    descriptors: *const u8,
    available: *const u8,
    used: *mut u8,
    size: u16,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    /// The used index at the last decision whether to notify; `None` before the first.
    notified: Option<u16>,
    /// Keeps the three pointers mapped.
    _memory: Arc<MemoryMap>,
}

// SAFETY: the pointers lie in mappings that `_memory` keeps alive, valid from any thread.
#[expect(unsafe_code, reason = "raw pointers are not Send by themselves")]
unsafe impl Send for Ring {}

impl Ring {
    /// A ring of `size` descriptors, a power of two, at `addresses`, which are aligned; the next
    /// head is taken from position `next_avail`. The used index goes on where the guest's is.
    ///
    /// `None` when a part does not lie wholly in one region of the guest's memory, or is aligned
    /// there otherwise than it claims.
    pub fn new(
        memory: Arc<MemoryMap>,
        addresses: RingAddresses,
        size: u16,
        event_idx: bool,
        next_avail: u16,
    ) -> Option<Self> {
        assert!(size.is_power_of_two(), "a split ring of {size}");
        let count = usize::from(size);
        let descriptors = memory.at_user(addresses.descriptors, count * DESCRIPTOR_LEN)?.at;
        let available = memory.at_user(addresses.available, ENTRIES_AT + count * AVAIL_ENTRY + 2)?.at;
        let used = memory.at_user(addresses.used, ENTRIES_AT + count * USED_ENTRY + 2)?.at;
        if available.addr() % 2 != 0 || used.addr() % 4 != 0 {
            return None;
        }
        let mut ring = Self {
            descriptors,
            available,
            used,
            size,
            event_idx,
            next_avail,
            next_used: 0,
            notified: None,
            _memory: memory,
        };
        ring.next_used = ring.load_used(INDEX_AT).ok()?;
        Some(ring)
    }

    /// Descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The position the next head will be taken from.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Sets the position the next head will be taken from.
    pub fn set_next_avail(&mut self, position: u16) {
        self.next_avail = position;
    }

    /// The used index, counting elements not yet published.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// The driver's index: the position after the last head it made available.
    ///
    /// # Errors
    /// The ring's memory is gone.
    pub fn available_index(&self) -> Result<u16, RingError> {
        Ok(self.load_available(INDEX_AT)?)
    }

    /// How many heads wait.
    ///
    /// # Errors
    /// The index is impossible, or gone.
    pub fn available(&self) -> Result<u16, RingError> {
        let ahead = self.available_index()?.wrapping_sub(self.next_avail);
        if ahead > self.size {
            return Err(RingError::IndexJump { ahead, size: self.size });
        }
        Ok(ahead)
    }

    /// Takes the next head, one of those [`Ring::available`] has counted.
    ///
    /// # Errors
    /// It is no descriptor of this ring; the position is unchanged then.
    pub fn take(&mut self) -> Result<u16, RingError> {
        let slot = usize::from(self.next_avail & (self.size - 1));
        let head = self.load_available(ENTRIES_AT + slot * AVAIL_ENTRY)?;
        if head >= self.size {
            return Err(RingError::HeadOutOfRange { head, size: self.size });
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(head)
    }

    /// Copies descriptor `index`, below [`Ring::size`].
    ///
    /// # Errors
    /// Its memory is gone.
    #[expect(unsafe_code, reason = "copies guest memory")]
    pub fn descriptor(&self, index: u16) -> Result<Descriptor, Fault> {
        assert!(index < self.size);
        let mut bytes = [0; DESCRIPTOR_LEN];
        let at = self.descriptors.wrapping_add(usize::from(index) * DESCRIPTOR_LEN);
        // SAFETY: `descriptors` has `size` entries in memory that `_memory` keeps mapped.
        unsafe { copy::copy_in(at, &mut bytes) }?;
        Ok(Descriptor::decode(&bytes))
    }

    /// Puts a completed chain into the used ring; the driver sees it after [`Ring::publish`].
    ///
    /// # Errors
    /// The ring's memory is gone.
    #[expect(unsafe_code, reason = "copies guest memory")]
    pub fn put_used(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        let slot = usize::from(self.next_used & (self.size - 1));
        let element = u64::from(head) | u64::from(written) << 32;
        let at = self.used.wrapping_add(ENTRIES_AT + slot * USED_ENTRY);
        sync::access();
        // SAFETY: `used` has `size` elements in memory that `_memory` keeps mapped writable.
        unsafe { copy::copy_out(&element.to_le_bytes(), at) }?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver everything put so far.
    ///
    /// # Errors
    /// The ring's memory is gone.
    pub fn publish(&mut self) -> Result<(), RingError> {
        Ok(self.store_used(INDEX_AT, self.next_used)?)
    }

    /// Whether the driver wants to be notified of what was published since the last call. Call it
    /// after every [`Ring::publish`]: skipped indices would be forgotten.
    ///
    /// # Errors
    /// The ring's memory is gone.
    pub fn needs_notification(&mut self) -> Result<bool, RingError> {
        fence(Ordering::SeqCst);
        let new = self.next_used;
        let old = self.notified.replace(new);
        if !self.event_idx {
            let flags = u32::from(self.load_available(FLAGS_AT)?);
            return Ok(flags & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let event = self.load_available(ENTRIES_AT + usize::from(self.size) * AVAIL_ENTRY)?;
        // Whether the event index is one of those passed: old ≤ event < new, modulo 2^16.
        Ok(old.is_none_or(|old| new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)))
    }

    /// Asks the driver to kick for the next head: whether some came meanwhile, for which it will
    /// not.
    ///
    /// # Errors
    /// The ring's memory is gone, or its index impossible.
    pub fn enable_notifications(&mut self) -> Result<bool, RingError> {
        if self.event_idx {
            self.store_used(ENTRIES_AT + usize::from(self.size) * USED_ENTRY, self.next_avail)?;
        } else {
            self.store_used(FLAGS_AT, 0)?;
        }
        fence(Ordering::SeqCst);
        Ok(self.available()? > 0)
    }

    /// Asks the driver not to kick. With event indices an event left behind says so already.
    ///
    /// # Errors
    /// The ring's memory is gone.
    pub fn disable_notifications(&mut self) -> Result<(), RingError> {
        if !self.event_idx {
            self.store_used(FLAGS_AT, VRING_USED_F_NO_NOTIFY as u16)?;
        }
        Ok(())
    }

    #[expect(unsafe_code, reason = "reads guest memory")]
    fn load_available(&self, at: usize) -> Result<u16, Fault> {
        // SAFETY: `at` is even and below the available ring's length, which `_memory` keeps mapped;
        // `available` is 2-aligned.
        unsafe { copy::load_u16(self.available.wrapping_add(at)) }
    }

    #[expect(unsafe_code, reason = "reads guest memory")]
    fn load_used(&self, at: usize) -> Result<u16, Fault> {
        // SAFETY: as above, for the used ring, which is 4-aligned.
        unsafe { copy::load_u16(self.used.wrapping_add(at)) }
    }

    #[expect(unsafe_code, reason = "writes guest memory")]
    fn store_used(&self, at: usize, value: u16) -> Result<(), Fault> {
        // SAFETY: as above, and mapped writable.
        unsafe { copy::store_u16(self.used.wrapping_add(at), value) }
    }
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
