//! What the script's driver knows of a packed ring: where it stands, whose the slots are, and how
//! chains are written there.

use super::{BUFFERS, DESCRIPTORS, Driver, INDIRECT, NEXT, descriptor};

/// A place in the ring and the wrap counter there.
#[derive(Clone, Copy, Debug)]
struct Place {
    slot: u16,
    wrap: bool,
}

impl Place {
    fn step(&mut self, slots: u16, size: u16) {
        self.slot += slots;
        if self.slot >= size {
            (self.slot, self.wrap) = (self.slot - size, !self.wrap);
        }
    }

    fn bits(self) -> u32 {
        u32::from(self.slot) | u32::from(self.wrap) << 15
    }
}

/// The position of a ring that nobody has used.
pub(super) const START: u32 = 0x8000_8000;

/// A packed ring as its driver sees it.
#[derive(Debug)]
pub(super) struct Packed {
    size: u16,
    next: Place,
    used: Place,
    /// Slots not in use.
    free: u16,
    /// Slots of the chain under each id, or 0.
    slots: Vec<u16>,
    /// First slots of chains placed and not shown, with their flags.
    held: Vec<(u16, u16)>,
}

impl Packed {
    pub fn new(size: u16) -> Self {
        let start = Place { slot: 0, wrap: true };
        let slots = vec![0; size.into()];
        Self { size, next: start, used: start, free: size, slots, held: Vec::new() }
    }

    /// Where it stands, as SET_VRING_BASE words it: with nothing in flight both positions are one.
    pub fn position(&self) -> u32 {
        self.used.bits() * 0x1_0001
    }

    pub fn has_room(&self, slots: usize) -> bool {
        slots <= usize::from(self.free)
    }

    /// The slot `skip` behind the next one, and the flags that make it available.
    pub fn slot(&self, skip: u16) -> (u16, u16) {
        let mut place = self.next;
        place.step(skip % self.size, self.size);
        (place.slot, if place.wrap { 1 << 7 } else { 1 << 15 })
    }

    /// Takes the next `count` slots for `id`: of each its number and the flags to write there now.
    /// Those of the first make the chain available, and are for [`Packed::show`].
    pub fn place(&mut self, id: u16, flags: &[u16]) -> Vec<(u16, Option<u16>)> {
        let placed = flags.iter().enumerate().map(|(i, flags)| {
            let (slot, state) = self.slot(i as u16);
            if i == 0 {
                self.held.push((slot, flags | state));
            }
            (slot, (i > 0).then_some(flags | state))
        });
        let placed = placed.collect();
        let count = flags.len() as u16;
        self.next.step(count, self.size);
        self.slots[usize::from(id)] = count;
        self.free -= count;
        placed
    }

    /// What makes everything placed available.
    pub fn show(&mut self) -> Vec<(u16, u16)> {
        std::mem::take(&mut self.held)
    }

    /// The slot in which the next used descriptor will be.
    pub fn looks_at(&self) -> u16 {
        self.used.slot
    }

    /// Whether these flags there say that it is.
    pub fn is_used(&self, flags: u16) -> bool {
        flags >> 7 & 1 == flags >> 15 && (flags >> 15 == 1) == self.used.wrap
    }

    /// Goes on behind the used descriptor of `id`, if that has slots.
    pub fn take_back(&mut self, id: u16) -> bool {
        let slots = self.slots.get_mut(usize::from(id)).map_or(0, std::mem::take);
        self.used.step(slots, self.size);
        self.free += slots;
        slots > 0
    }
}

impl Driver<'_> {
    /// Takes used descriptors, and compares each with what it was promised.
    pub fn collect_packed(&mut self) {
        while let Some(packed) = &mut self.packed {
            let at = DESCRIPTORS + 16 * u64::from(packed.looks_at());
            let mut bytes = [0; 16];
            self.bench.read(at, &mut bytes);
            let word = u128::from_le_bytes(bytes);
            let (written, id, flags) = ((word >> 64) as u32, (word >> 96) as u16, (word >> 112) as u16);
            if !packed.is_used(flags) {
                break;
            }
            assert!(packed.take_back(id), "{id} comes back and has no slots");
            let found = self.waiting.iter().position(|waiting| waiting.head == id);
            let found = found.unwrap_or_else(|| panic!("{id} comes back and was not under way"));
            let waiting = self.waiting.swap_remove(found);
            self.judge(&waiting, written);
            self.free.extend(&waiting.slots);
        }
        if self.waiting.is_empty() {
            self.next_buffer = BUFFERS;
        }
    }

    /// Puts a chain into free slots, or into a table where `count` is less than its parts.
    pub fn place_packed(&mut self, parts: &[(u64, u32, u16)], count: usize) -> Option<Vec<u16>> {
        if !self.packed.as_ref()?.has_room(count) {
            return None;
        }
        let mut parts = parts.to_vec();
        if count < parts.len() {
            let len = 16 * parts.len() as u64;
            let at = self.buffer(len)?;
            for (i, &(addr, len, flags)) in parts.iter().enumerate() {
                self.bench.write(at + 16 * i as u64, &descriptor(addr, len, 0, flags));
            }
            parts = vec![(at, len as u32, INDIRECT)];
        }
        let last = parts.len() - 1;
        let flags: Vec<u16> =
            parts.iter().enumerate().map(|(i, part)| part.2 | if i < last { NEXT } else { 0 }).collect();
        let id = self.free.pop().expect("as many ids as slots");
        let placed = self.packed.as_mut()?.place(id, &flags);
        for ((slot, flags), (addr, len, _)) in placed.into_iter().zip(parts) {
            let at = DESCRIPTORS + 16 * u64::from(slot);
            let old = self.get(at + 14);
            self.bench.write(at, &descriptor(addr, len, id, flags.unwrap_or(old)));
        }
        Some(vec![id])
    }

    /// A split ring's descriptor in the ring's own layout, a packed one's as if made available.
    pub fn laid_out(&self, bytes: [u8; 16]) -> [u8; 16] {
        let Some(packed) = &self.packed else { return bytes };
        let mut out = bytes;
        let (low, high) = out[12..].split_at_mut(2);
        low.swap_with_slice(high);
        let flags = u16::from_le_bytes([out[14], out[15]]);
        let state = if flags & 0x40 == 0 { packed.slot(0).1 } else { 0 };
        out[14..].copy_from_slice(&(flags ^ state).to_le_bytes());
        out
    }
}
