//! What the script's driver knows of a packed ring: where it stands, and whose the slots are.

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
