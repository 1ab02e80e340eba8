//! What a driver knows of a packed virtqueue (virtio 1.3 §2.8): where it stands, and the flags.
//!
//! Invariants checked at every used descriptor: its id is in flight, and it lies where the chains
//! returned so far have left the used position.

use super::memory::Memory;
use super::ring::Descriptor;

const NEXT: u16 = 1;
const FLAGS_AT: u64 = 14;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// A place in the ring and the wrap counter there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    slot: u16,
    wrap: bool,
}

impl Place {
    const START: Self = Self { slot: 0, wrap: true };

    fn step(&mut self, slots: u16, size: u16) {
        self.slot += slots;
        if self.slot >= size {
            (self.slot, self.wrap) = (self.slot - size, !self.wrap);
        }
    }

    fn bits(self) -> u16 {
        self.slot | u16::from(self.wrap) << 15
    }
}

/// A packed ring as its driver sees it.
#[derive(Debug)]
pub struct Packed {
    size: u16,
    next: Place,
    used: Place,
    /// Slots that are not in use.
    pub free: u16,
    /// Slots of the chain in flight under each id, or 0.
    slots: Vec<u16>,
    /// First slots of chains that the device has not been shown, with their flags.
    held: Vec<(u16, u16)>,
    /// Slots placed since the last publication.
    placed: u16,
}

impl Packed {
    /// An empty ring of zeros.
    pub fn new(size: u16) -> Self {
        let slots = vec![0; size.into()];
        Self { size, next: Place::START, used: Place::START, free: size, slots, held: vec![], placed: 0 }
    }

    /// Where the driver writes next and where it looks next, as SET_VRING_BASE words it.
    pub fn position(&self) -> u32 {
        u32::from(self.next.bits()) | u32::from(self.used.bits()) << 16
    }

    /// Writes a chain; the device does not see it before [`Packed::publish`].
    pub fn place(&mut self, memory: &Memory, desc_at: u64, id: u16, chain: &[Descriptor]) {
        for (i, descriptor) in chain.iter().enumerate() {
            let link = if i + 1 < chain.len() { NEXT } else { 0 };
            let state = if self.next.wrap { 1 << 7 } else { 1 << 15 };
            let flags = descriptor.flags | link | state;
            let at = desc_at + 16 * u64::from(self.next.slot);
            let bytes = Descriptor { flags: id, next: flags, ..*descriptor }.to_bytes();
            memory.write(at, &bytes[..FLAGS_AT as usize]);
            if i == 0 {
                self.held.push((self.next.slot, flags));
            } else {
                memory.store(at + FLAGS_AT, flags);
            }
            self.next.step(1, self.size);
        }
        let count = chain.len() as u16;
        assert!(count <= self.free && self.slots[usize::from(id)] == 0, "a free id and free slots");
        self.slots[usize::from(id)] = count;
        (self.free, self.placed) = (self.free - count, self.placed + count);
    }

    /// The flags that make the slot `skip` behind the next one available, and where it is.
    pub fn slot_and_flags(&self, skip: u16) -> (u16, u16) {
        let mut place = self.next;
        place.step(skip, self.size);
        (place.slot, if place.wrap { 1 << 7 } else { 1 << 15 })
    }

    /// Makes everything placed available; returns how many slots that were.
    pub fn publish(&mut self, memory: &Memory, desc_at: u64) -> u16 {
        for (slot, flags) in self.held.drain(..) {
            memory.store(desc_at + 16 * u64::from(slot) + FLAGS_AT, flags);
        }
        std::mem::take(&mut self.placed)
    }

    /// Whether the device wants a kick for the `passed` slots published last.
    pub fn wants_kick(&self, memory: &Memory, device_area: u64, passed: u16) -> bool {
        match memory.load(device_area + 2) {
            EVENT_DISABLE => false,
            EVENT_DESC => {
                let event = memory.load(device_area);
                let mut place = self.next;
                // Back by what was published, which is forward by the rest of two rounds.
                place.step(self.size - passed, self.size);
                place.step(self.size, self.size);
                (0..passed).any(|_| {
                    let hit = place.bits() == event;
                    place.step(1, self.size);
                    hit
                })
            }
            _ => true,
        }
    }

    /// Asks for a call at the next used descriptor.
    pub fn arm(&self, memory: &Memory, driver_area: u64, event_idx: bool) {
        if event_idx {
            memory.store(driver_area, self.used.bits());
        }
        memory.store(driver_area + 2, if event_idx { EVENT_DESC } else { 0 });
    }

    /// Asks for a call when the slot `slots` behind the next one is used.
    pub fn arm_after(&self, memory: &Memory, driver_area: u64, slots: u16) {
        let mut place = self.used;
        place.step(slots, self.size);
        memory.store(driver_area, place.bits());
        memory.store(driver_area + 2, EVENT_DESC);
    }

    /// The next used descriptor, if it is there: its id and length.
    pub fn next_used(&self, memory: &Memory, desc_at: u64) -> Option<(u16, u32)> {
        let at = desc_at + 16 * u64::from(self.used.slot);
        let flags = memory.load(at + FLAGS_AT);
        let (available, used) = (flags >> 7 & 1 == 1, flags >> 15 == 1);
        if available != used || used != self.used.wrap {
            return None;
        }
        let mut bytes = [0; 6];
        memory.read(at + 8, &mut bytes);
        let [a, b, c, d, e, f] = bytes;
        Some((u16::from_le_bytes([e, f]), u32::from_le_bytes([a, b, c, d])))
    }

    /// Goes on behind the used descriptor of `id`.
    pub fn take_back(&mut self, id: u16) {
        let slots = std::mem::take(&mut self.slots[usize::from(id)]);
        assert!(slots > 0, "id {id} was in flight");
        self.free += slots;
        self.used.step(slots, self.size);
    }
}
