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

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::copy::{self, Fault};
use super::features::Features;
use super::inflight::SplitTracker;
use super::memory::MemoryMap;
use super::ring::{DESCRIPTOR_LEN, Descriptor, Ring, RingAddresses, RingError, RingPlace};
use crate::sync;

const FLAGS_AT: usize = 0;
const INDEX_AT: usize = 2;
const ENTRIES_AT: usize = 4;
const AVAIL_ENTRY: usize = 2;
const USED_ENTRY: usize = 8;

/// A running split virtqueue. Only its queue's thread touches it.
#[derive(Debug)]
pub(super) struct SplitRing {
    descriptors: *const u8,
    available: *const u8,
    used: *mut u8,
    size: u16,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    /// The used index at the last decision whether to notify; `None` before the first.
    notified: Option<u16>,
    /// Guest address of the used ring where writes to it are logged.
    log_at: Option<u64>,
    /// Keeps the three pointers mapped.
    memory: Arc<MemoryMap>,
}

// SAFETY: the pointers lie in mappings that `memory` keeps alive, valid from any thread.
#[expect(unsafe_code, reason = "raw pointers are not Send by themselves")]
unsafe impl Send for SplitRing {}

impl SplitRing {
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
            log_at: None,
            memory,
        };
        ring.next_used = ring.load_used(INDEX_AT).ok()?;
        Some(ring)
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

    /// Notes that `len` bytes of the used ring from `at` on have changed, if that is wanted.
    #[inline]
    fn changed(&self, at: usize, len: usize) {
        if let Some(log_at) = self.log_at {
            self.memory.note(log_at.wrapping_add(at as u64), len);
        }
    }

    #[expect(unsafe_code, reason = "reads guest memory")]
    fn load_available(&self, at: usize) -> Result<u16, Fault> {
        // SAFETY: `at` is even and below the available ring's length, which `memory` keeps mapped;
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
        unsafe { copy::store_u16(self.used.wrapping_add(at), value) }?;
        self.changed(at, 2);
        Ok(())
    }
}

impl Ring for SplitRing {
    type Tracker = SplitTracker;

    const PACKED: bool = false;

    fn open(place: RingPlace, features: Features) -> Option<Self> {
        let RingPlace { memory, addresses, size, base, log_at } = place;
        if !size.is_power_of_two() {
            return None;
        }
        let next_avail = u16::try_from(base).ok()?;
        let mut ring = Self::new(memory, addresses, size, features.event_idx(), next_avail)?;
        ring.log_at = log_at;
        Some(ring)
    }

    fn size(&self) -> u16 {
        self.size
    }

    #[inline]
    fn available(&self) -> Result<u16, RingError> {
        let ahead = self.available_index()?.wrapping_sub(self.next_avail);
        if ahead > self.size {
            return Err(RingError::IndexJump { ahead, size: self.size });
        }
        Ok(ahead)
    }

    #[inline]
    fn prefetch(&self, count: u16) {
        for ahead in 0..count {
            let slot = usize::from(self.next_avail.wrapping_add(ahead) & (self.size - 1));
            let Ok(head) = self.load_available(ENTRIES_AT + slot * AVAIL_ENTRY) else { return };
            copy::prefetch(self.descriptors.wrapping_add(usize::from(head) * DESCRIPTOR_LEN));
        }
    }

    #[inline]
    fn take(&mut self) -> Result<Option<u16>, RingError> {
        let slot = usize::from(self.next_avail & (self.size - 1));
        let head = self.load_available(ENTRIES_AT + slot * AVAIL_ENTRY)?;
        if head >= self.size {
            return Err(RingError::HeadOutOfRange { head, size: self.size });
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    fn untake(&mut self) {
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    #[inline]
    fn first(&self, head: u16) -> u16 {
        head
    }

    #[inline]
    #[expect(unsafe_code, reason = "copies guest memory")]
    fn descriptor(&self, at: u16) -> Result<Descriptor, Fault> {
        assert!(at < self.size);
        let mut bytes = [0; DESCRIPTOR_LEN];
        let at = self.descriptors.wrapping_add(usize::from(at) * DESCRIPTOR_LEN);
        // SAFETY: `descriptors` has `size` entries in memory that `memory` keeps mapped.
        unsafe { copy::copy_in(at, &mut bytes) }?;
        Ok(Descriptor::decode(&bytes))
    }

    #[inline]
    #[expect(unsafe_code, reason = "copies guest memory")]
    fn put_used(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        let slot = usize::from(self.next_used & (self.size - 1));
        let element = u64::from(head) | u64::from(written) << 32;
        let at = ENTRIES_AT + slot * USED_ENTRY;
        sync::access();
        // SAFETY: `used` has `size` elements in memory that `memory` keeps mapped writable.
        unsafe { copy::copy_out(&element.to_le_bytes(), self.used.wrapping_add(at)) }?;
        self.changed(at, USED_ENTRY);
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    #[inline]
    fn publish(&mut self, _heads: &[u16]) -> Result<(), RingError> {
        Ok(self.store_used(INDEX_AT, self.next_used)?)
    }

    fn needs_notification(&mut self) -> Result<bool, RingError> {
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

    fn enable_notifications(&mut self) -> Result<bool, RingError> {
        if self.event_idx {
            self.store_used(ENTRIES_AT + usize::from(self.size) * USED_ENTRY, self.next_avail)?;
        } else {
            self.store_used(FLAGS_AT, 0)?;
        }
        fence(Ordering::SeqCst);
        Ok(self.available()? > 0)
    }

    fn disable_notifications(&mut self) -> Result<(), RingError> {
        if !self.event_idx {
            self.store_used(FLAGS_AT, VRING_USED_F_NO_NOTIFY as u16)?;
        }
        Ok(())
    }

    fn used(&self) -> u32 {
        u32::from(self.next_used)
    }

    #[cfg(feature = "sim")]
    fn skew(&self, busy: u16) -> u16 {
        self.next_avail.wrapping_sub(self.next_used).wrapping_sub(busy)
    }

    fn base(&self, busy: u16) -> u32 {
        u32::from(self.next_avail.wrapping_sub(busy))
    }
}

#[cfg(test)]
#[path = "split_tests.rs"]
mod tests;
