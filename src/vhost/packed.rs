//! The packed virtqueue (virtio 1.3 §2.8), device side, on raw pointers into guest memory.
//!
//! ```text
//! descriptors    size × { addr u64, len u32, id u16, flags u16 }    both sides write here
//! driver area    off_wrap u16, flags u16       when the driver wants to be notified
//! device area    off_wrap u16, flags u16       when we want to be kicked
//! ```
//!
//! Each side goes round the descriptors with a wrap counter. A descriptor is available where its
//! AVAIL flag equals our counter and its USED flag does not; used where both equal it. A chain is a
//! run of slots, its id in the last. Used descriptors are written where the oldest chains lay, one
//! for each chain, and each takes as many slots as its chain had: the slots between the used and
//! the available position are those of the chains in flight, whatever the order they end in.
//!
//! Nothing here believes the driver: a chain that has more slots than are free, an id that is no
//! slot or is in flight is an error, and the ring is then not read again.
//!
//! Order, and what breaks if two steps are swapped:
//! 1. load the flags of a chain's first slot (acquire), then its descriptors: else stale ones;
//! 2. store all of a batch but the flags of its first slot, then those (release): the driver looks
//!    at that slot first, so it sees the whole batch or nothing, and so does who comes after a death;
//! 3. store those flags, full fence, load the driver's event: else both sides sleep;
//! 4. store the event's position, then its flags (release), full fence, look at the next slot: else
//!    both sides sleep.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;

use super::copy::{self, Fault};
use super::features::Features;
use super::inflight_packed::PackedTracker;
use super::memory::MemoryMap;
use super::ring::{ChainError, DESCRIPTOR_LEN, Descriptor, Ring, RingError, RingPlace};
use crate::mutant::{Mutant, mutated};
use crate::sync;

/// Descriptors a packed ring may have (virtio 1.3 §2.8.10.1).
const SIZE_MAX: u16 = 1 << 15;
const FLAG_AVAIL: u16 = 1 << 7;
const FLAG_USED: u16 = 1 << 15;
const LEN_AT: usize = 8;
const FLAGS_AT: usize = 14;
/// In both event areas.
const EVENT_FLAGS_AT: usize = 2;
const EVENT_LEN: usize = 4;
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;
const WRAP: u16 = 1 << 15;

/// A place in the ring and the wrap counter of whoever stands there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Position {
    /// Below the ring's size.
    pub index: u16,
    /// The wrap counter; it begins as true.
    pub wrap: bool,
}

impl Position {
    /// From the 16 bits that the spec's messages and structures have for one. `None`: no place in a
    /// ring of `size`.
    pub fn decode(bits: u16, size: u16) -> Option<Self> {
        let index = bits & !WRAP;
        (index < size).then_some(Self { index, wrap: bits & WRAP != 0 })
    }

    /// The 16 bits.
    pub fn encode(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    /// `slots` further, at most once round.
    pub fn plus(self, slots: u16, size: u16) -> Self {
        debug_assert!(slots <= size);
        let index = u32::from(self.index) + u32::from(slots);
        match index.checked_sub(u32::from(size)) {
            Some(index) => Self { index: index as u16, wrap: !self.wrap },
            None => Self { index: index as u16, wrap: self.wrap },
        }
    }

    /// How far it is from here to `to`, in two rounds.
    fn until(self, to: Self, size: u16) -> u32 {
        let round = u32::from(size);
        let linear = |at: Self| (u32::from(at.index) + if at.wrap { 0 } else { round }) % (2 * round);
        (linear(to) + 2 * round - linear(self)) % (2 * round)
    }

    /// Flags of a slot here that the driver has made available.
    pub fn available_flags(self) -> u16 {
        if self.wrap { FLAG_AVAIL } else { FLAG_USED }
    }

    fn used_flags(self) -> u16 {
        if self.wrap { FLAG_AVAIL | FLAG_USED } else { 0 }
    }

    /// Whether `flags`, found here, say that the slot is available.
    pub fn is_available(self, flags: u16) -> bool {
        flags & (FLAG_AVAIL | FLAG_USED) == self.available_flags()
    }
}

/// A running packed virtqueue. Only its queue's thread touches it.
#[derive(Debug)]
pub(super) struct PackedRing {
    descriptors: *mut u8,
    driver_area: *const u8,
    device_area: *mut u8,
    size: u16,
    event_idx: bool,
    avail: Position,
    /// Where the next used descriptor goes, counting those not yet published.
    used: Position,
    /// Slots between the published used position and `avail`.
    taken: u16,
    /// Slots of what was put and is not yet published.
    put: u16,
    /// Flags that publish a batch, and the slot they go to.
    first_put: Option<(u16, u16)>,
    /// The used position at the last decision whether to notify; `None` before the first.
    notified: Option<Position>,
    /// Slots published since then.
    since_notified: u32,
    /// The chain that was last taken or recalled.
    chain: Vec<Descriptor>,
    /// Slots of the chain in flight under an id, or 0.
    lens: Vec<u16>,
    /// The id of the last chain taken.
    last: u16,
    is_logged: bool,
    /// Keeps the three pointers mapped.
    memory: Arc<MemoryMap>,
}

// SAFETY: the pointers lie in mappings that `memory` keeps alive, valid from any thread.
#[expect(unsafe_code, reason = "raw pointers are not Send by themselves")]
unsafe impl Send for PackedRing {}

impl PackedRing {
    /// Where the next used descriptor goes.
    pub fn used_position(&self) -> Position {
        self.used
    }

    /// The chain that was last taken.
    pub fn chain(&self) -> &[Descriptor] {
        &self.chain
    }

    /// The flags of slot `index`, below [`Ring::size`].
    ///
    /// # Errors
    /// Its memory is gone.
    pub fn flags(&self, index: u16) -> Result<u16, Fault> {
        self.load_flags(index)
    }

    /// Puts the ring where an earlier life has left it: at `used`, with chains in flight of which
    /// each has an id and a number of slots. What that life has written into their slots and not
    /// published is taken back, or the driver would come upon it later and believe it.
    ///
    /// # Errors
    /// The ring's memory is gone.
    pub fn resume(&mut self, used: Position, in_flight: &[(u16, u16)]) -> Result<(), Fault> {
        (self.used, self.avail, self.taken) = (used, used, 0);
        self.lens.fill(0);
        for &(id, slots) in in_flight {
            self.lens[usize::from(id)] = slots;
            for _ in 0..slots {
                if !mutated(Mutant::UsedNotTakenBack) {
                    self.store_flags(self.avail.index, self.avail.available_flags())?;
                }
                self.avail = self.avail.plus(1, self.size);
            }
            self.taken += slots;
        }
        assert!(self.taken <= self.size, "{} slots in flight of {}", self.taken, self.size);
        Ok(())
    }

    /// Makes `chain` the one that [`Ring::descriptor`] reads.
    pub fn set_chain(&mut self, chain: impl Iterator<Item = Descriptor>) {
        self.chain.clear();
        self.chain.extend(chain);
    }

    /// Reads the chain at the available position and returns its id.
    fn read_chain(&mut self) -> Result<u16, RingError> {
        self.chain.clear();
        let room = self.size - self.taken;
        let mut at = self.avail;
        loop {
            if self.chain.len() == usize::from(room) {
                return Err(RingError::Chain { head: self.avail.index, error: ChainError::TooLong });
            }
            let (descriptor, id) = self.load_descriptor(at.index, self.chain.len() as u16 + 1)?;
            self.chain.push(descriptor);
            if !descriptor.has_next() {
                return Ok(id);
            }
            at = at.plus(1, self.size);
        }
    }

    fn slot(&self, index: u16) -> *mut u8 {
        assert!(index < self.size);
        self.descriptors.wrapping_add(usize::from(index) * DESCRIPTOR_LEN)
    }

    #[expect(unsafe_code, reason = "copies guest memory")]
    fn load_descriptor(&self, index: u16, next: u16) -> Result<(Descriptor, u16), Fault> {
        let mut bytes = [0; DESCRIPTOR_LEN];
        // SAFETY: `descriptors` has `size` entries in memory that `memory` keeps mapped.
        unsafe { copy::copy_in(self.slot(index), &mut bytes) }?;
        Ok(Descriptor::decode_packed(&bytes, next))
    }

    #[expect(unsafe_code, reason = "reads guest memory")]
    fn load_flags(&self, index: u16) -> Result<u16, Fault> {
        // SAFETY: as above, and `descriptors` is 16-aligned.
        unsafe { copy::load_u16(self.slot(index).wrapping_add(FLAGS_AT)) }
    }

    #[expect(unsafe_code, reason = "writes guest memory")]
    fn store_flags(&self, index: u16, flags: u16) -> Result<(), Fault> {
        let at = self.slot(index).wrapping_add(FLAGS_AT);
        // SAFETY: as above, and mapped writable.
        unsafe { copy::store_u16(at, flags) }?;
        self.changed(at, 2);
        Ok(())
    }

    #[expect(unsafe_code, reason = "writes guest memory")]
    fn store_event(&self, at: usize, value: u16) -> Result<(), Fault> {
        assert!(at + 2 <= EVENT_LEN);
        let at = self.device_area.wrapping_add(at);
        // SAFETY: the area has 4 bytes, 4-aligned, in memory that `memory` keeps mapped writable.
        unsafe { copy::store_u16(at, value) }?;
        self.changed(at, 2);
        Ok(())
    }

    #[expect(unsafe_code, reason = "reads guest memory")]
    fn load_event(&self, at: usize) -> Result<u16, Fault> {
        assert!(at + 2 <= EVENT_LEN);
        // SAFETY: as above, for the driver's area.
        unsafe { copy::load_u16(self.driver_area.wrapping_add(at)) }
    }

    /// Notes that `len` bytes at `at` have changed, if that is wanted.
    fn changed(&self, at: *mut u8, len: usize) {
        if self.is_logged {
            self.memory.note_host(at, len);
        }
    }
}

impl Ring for PackedRing {
    type Tracker = PackedTracker;

    const PACKED: bool = true;

    fn open(place: RingPlace, features: Features) -> Option<Self> {
        let RingPlace { memory, addresses, size, base, log_at } = place;
        if size == 0 || size > SIZE_MAX {
            return None;
        }
        let avail = Position::decode(base as u16, size)?;
        let used = Position::decode((base >> 16) as u16, size)?;
        let taken = used.until(avail, size);
        // Only an in-flight area knows what chains are between the two.
        if taken > u32::from(size) {
            return None;
        }
        let count = usize::from(size);
        let descriptors = memory.at_user(addresses.descriptors, count * DESCRIPTOR_LEN)?.at;
        let driver_area = memory.at_user(addresses.available, EVENT_LEN)?.at;
        let device_area = memory.at_user(addresses.used, EVENT_LEN)?.at;
        let aligned =
            descriptors.addr() % 16 == 0 && driver_area.addr() % 4 == 0 && device_area.addr() % 4 == 0;
        aligned.then(|| Self {
            descriptors,
            driver_area,
            device_area,
            size,
            event_idx: features.event_idx(),
            avail,
            used,
            taken: taken as u16,
            put: 0,
            first_put: None,
            notified: None,
            since_notified: 0,
            chain: Vec::with_capacity(count),
            lens: vec![0; count],
            last: 0,
            is_logged: log_at.is_some(),
            memory,
        })
    }

    fn size(&self) -> u16 {
        self.size
    }

    /// Heads are not counted ahead: there is one, or there is none.
    #[inline]
    fn available(&self) -> Result<u16, RingError> {
        // Where everything is taken the next slot is one that the driver waits for.
        if self.taken == self.size {
            return Ok(0);
        }
        let flags = self.load_flags(self.avail.index)?;
        Ok(if self.avail.is_available(flags) { u16::MAX } else { 0 })
    }

    #[inline]
    fn take(&mut self) -> Result<Option<u16>, RingError> {
        if self.available()? == 0 {
            return Ok(None);
        }
        let id = self.read_chain()?;
        if id >= self.size {
            return Err(RingError::HeadOutOfRange { head: id, size: self.size });
        }
        if self.lens[usize::from(id)] != 0 {
            return Err(RingError::HeadInFlight { head: id });
        }
        let slots = self.chain.len() as u16;
        self.lens[usize::from(id)] = slots;
        self.avail = self.avail.plus(slots, self.size);
        self.taken += slots;
        self.last = id;
        Ok(Some(id))
    }

    fn untake(&mut self) {
        let slots = std::mem::take(&mut self.lens[usize::from(self.last)]);
        // Back is forward by the rest of two rounds.
        self.avail = self.avail.plus(self.size - slots, self.size).plus(self.size, self.size);
        self.taken -= slots;
    }

    #[inline]
    fn first(&self, _head: u16) -> u16 {
        0
    }

    #[inline]
    fn descriptor(&self, at: u16) -> Result<Descriptor, Fault> {
        Ok(self.chain[usize::from(at)])
    }

    #[inline]
    #[expect(unsafe_code, reason = "copies guest memory")]
    fn put_used(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        let slots = self.lens[usize::from(head)];
        assert!(slots > 0, "id {head} is not in flight");
        let index = self.used.index;
        let at = self.slot(index).wrapping_add(LEN_AT);
        let element = u64::from(written) | u64::from(head) << 32;
        sync::access();
        copy::step();
        // SAFETY: `descriptors` has `size` entries in memory that `memory` keeps mapped writable.
        unsafe { copy::copy_out(&element.to_le_bytes()[..6], at) }?;
        self.changed(at, 6);
        // Something was always written: the status.
        let flags = self.used.used_flags() | VRING_DESC_F_WRITE as u16;
        match self.first_put {
            None => self.first_put = Some((index, flags)),
            Some(_) => self.store_flags(index, flags)?,
        }
        self.used = self.used.plus(slots, self.size);
        self.put += slots;
        Ok(())
    }

    #[inline]
    fn publish(&mut self, heads: &[u16]) -> Result<(), RingError> {
        let Some((index, flags)) = self.first_put.take() else { return Ok(()) };
        self.store_flags(index, flags)?;
        // From here on slots and ids are the driver's.
        for &head in heads {
            self.lens[usize::from(head)] = 0;
        }
        self.taken -= self.put;
        self.since_notified += u32::from(std::mem::take(&mut self.put));
        Ok(())
    }

    fn needs_notification(&mut self) -> Result<bool, RingError> {
        fence(Ordering::SeqCst);
        let old = self.notified.replace(self.used);
        let passed = std::mem::take(&mut self.since_notified);
        match self.load_event(EVENT_FLAGS_AT)? {
            EVENT_DISABLE => Ok(false),
            EVENT_DESC if self.event_idx => {
                let bits = self.load_event(0)?;
                let event = Position { index: bits & !WRAP, wrap: bits & WRAP != 0 };
                Ok(old.is_none_or(|old| old.until(event, self.size) < passed))
            }
            _ => Ok(true),
        }
    }

    fn enable_notifications(&mut self) -> Result<bool, RingError> {
        if self.event_idx {
            self.store_event(0, self.avail.encode())?;
            self.store_event(EVENT_FLAGS_AT, EVENT_DESC)?;
        } else {
            self.store_event(EVENT_FLAGS_AT, EVENT_ENABLE)?;
        }
        fence(Ordering::SeqCst);
        Ok(self.available()? > 0)
    }

    fn disable_notifications(&mut self) -> Result<(), RingError> {
        Ok(self.store_event(EVENT_FLAGS_AT, EVENT_DISABLE)?)
    }

    fn used(&self) -> u32 {
        u32::from(self.used.encode())
    }

    #[cfg(feature = "sim")]
    fn skew(&self, busy: u16) -> u16 {
        // Where a resumed chain broke the ring, those after it have slots and are not busy.
        let in_flight = self.lens.iter().filter(|&&slots| slots > 0);
        let idle = in_flight.clone().count().checked_sub(usize::from(busy));
        let idle = idle.expect("chains in flight have their slots");
        let round = u32::from(self.size);
        let distance = self.used.until(self.avail, self.size);
        assert!(distance == u32::from(self.taken) && distance <= round, "slots taken are counted");
        self.taken - in_flight.sum::<u16>() + idle as u16
    }

    /// What is in flight lies between the two positions, so without it they are one.
    fn base(&self, _busy: u16) -> u32 {
        u32::from(self.used.encode()) * 0x1_0001
    }
}

#[cfg(test)]
#[path = "packed_tests.rs"]
mod tests;
