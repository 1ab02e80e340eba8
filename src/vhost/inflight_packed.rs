//! The in-flight area's part for a packed ring (vhost-user spec, "Inflight I/O tracking").
//!
//! ```text
//!  0 features u64   8 version u16  10 desc_num u16  12 free_head u16       14 old_free_head u16
//! 16 used_idx u16  18 old_used_idx u16  20 used_wrap u8  21 old_used_wrap u8  22 pad to 32
//! 32 desc_num × { 0 inflight u8, pad, 2 next u16, 4 last u16, 6 num u16, 8 counter u64,
//!                 16 id u16, 18 flags u16, 20 len u32, 24 addr u64 }
//! ```
//!
//! A packed ring's slots are written over while other chains are in flight, and no index in it says
//! how far we are. So the descriptors of chains in flight are copied here, into entries linked by
//! `next`, and so is the used position. Entries not in use form the free list that begins at
//! `free_head`; the fields called `old_` are as of the last moment at which everything agreed.
//!
//! Order of a chain's life, each step a store that the next must not overtake:
//! 1. [`Tracker::begin`]: its descriptors into free entries; then both free heads at once, which is
//!    when it exists: before, its entries are in the free list, where no mark counts;
//! 2. [`Tracker::before_publish`]: its entries back into the free list, `free_head`; then the used
//!    position, its old one left behind;
//! 3. the flags of the batch's first slot in the ring change (not here);
//! 4. [`Tracker::end_batch`]: the marks go; `old_free_head`; then the old used position becomes the
//!    new one.
//!
//! A used position that differs from its old one means death between 2 and 4. The slot at the old
//! one tells whether the driver was shown the batch: it is still available, or it is not and never
//! will be again in the same round. Position and wrap counter, both old and new, lie in one word
//! that is stored as a whole: a process that died between two of them would read that slot with the
//! wrong wrap counter, under which a slot that the driver has used again looks untouched.
//!
//! What is shared is written, and read at the start only; this process goes by its own copy. What is
//! found then is not believed: every chain must be whole, no entry in two of them or in the free
//! list, no id twice. An area that contradicts itself is discarded.

use std::sync::atomic::Ordering::{Acquire, Release};

use virtio_bindings::virtio_ring::VRING_DESC_F_NEXT;

use super::copy::Fault;
use super::inflight::{InflightArea, Part, Recovery, Tracker};
use super::packed::{PackedRing, Position};
use super::ring::Descriptor;
use crate::mutant::{Mutant, mutated};

/// Bytes before the entries.
pub(super) const HEADER_LEN: usize = 32;
/// Bytes of an entry.
pub(super) const ENTRY_LEN: usize = 32;
const VERSION: u16 = 1;
const NEXT: u16 = VRING_DESC_F_NEXT as u16;

const VERSION_AT: usize = 8;
const COUNT_AT: usize = 10;
/// Both free heads.
const FREE_AT: usize = 12;
/// Both used positions.
const USED_AT: usize = 16;

const MARK_AT: usize = 0;
const NEXT_AT: usize = 2;
const LAST_AT: usize = 4;
const NUM_AT: usize = 6;
const COUNTER_AT: usize = 8;
const ID_AT: usize = 16;
const FLAGS_AT: usize = 18;
const LEN_AT: usize = 20;
const ADDR_AT: usize = 24;

/// The part of the area that belongs to one packed ring. Only its queue's thread touches it while
/// the queue runs.
#[derive(Debug)]
pub(super) struct PackedTracker {
    part: Part,
    /// First free entry; the number of entries when there is none.
    free: u16,
    /// The free list, and the links of each chain.
    next: Vec<u16>,
    /// Of each id in flight, the first entry of its chain.
    first: Vec<u16>,
    /// Of each first entry, the last of its chain.
    last: Vec<u16>,
    /// The used position that the driver was shown.
    shown: Position,
    /// The next value of the counter that orders chains.
    counter: u64,
}

/// A chain found in the area.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Found {
    counter: u64,
    id: u16,
    slots: u16,
    first: u16,
    last: u16,
}

impl PackedTracker {
    /// Says that the ring has stopped in good order: the next start goes by what the VMM says.
    pub fn release(&mut self) {
        self.part.half(VERSION_AT).store(0, Release);
    }

    /// Begins anew at `used` with everything free.
    fn clear(&mut self, used: Position) {
        let count = self.part.entries;
        self.part.half(VERSION_AT).store(0, Release);
        for entry in 0..count {
            self.part.byte(at(entry, MARK_AT)).store(0, Release);
            self.set_next(entry, entry + 1);
        }
        (self.free, self.shown, self.counter) = (0, used, 0);
        self.part.half(COUNT_AT).store(count, Release);
        self.store_free(0, 0);
        self.store_used(used, used);
        self.part.half(VERSION_AT).store(VERSION, Release);
    }

    fn set_next(&mut self, entry: u16, next: u16) {
        self.next[usize::from(entry)] = next;
        self.part.half(at(entry, NEXT_AT)).store(next, Release);
    }

    fn store_free(&self, new: u16, old: u16) {
        self.part.word(FREE_AT).store(u32::from(new) | u32::from(old) << 16, Release);
    }

    fn store_used(&self, new: Position, old: Position) {
        let mut word = u64::from(new.index) | u64::from(old.index) << 16;
        word |= u64::from(new.wrap) << 32 | u64::from(old.wrap) << 40;
        self.part.long(USED_AT).store(word, Release);
    }

    /// The used position, new and old.
    fn load_used(&self) -> Option<(Position, Position)> {
        let word = self.part.long(USED_AT).load(Acquire);
        let position = |index: u64, wrap: u64| {
            let position = Position { index: index as u16, wrap: wrap as u8 != 0 };
            (position.index < self.part.entries).then_some(position)
        };
        Some((position(word, word >> 32)?, position(word >> 16, word >> 40)?))
    }

    /// Where an earlier life has left the ring and what it had in flight, oldest first. `None` when
    /// that makes no sense.
    fn find(&mut self, ring: &PackedRing) -> Result<Option<(Position, Vec<Found>)>, Fault> {
        let Some((new, old)) = self.load_used() else { return Ok(None) };
        let free = self.part.word(FREE_AT).load(Acquire);
        let (new_free, old_free) = (free as u16, (free >> 16) as u16);
        let is_believed = mutated(Mutant::TrackedBatchBelieved);
        let was_shown = new != old && (is_believed || !old.is_available(ring.flags(old.index)?));
        let (used, free) = if was_shown { (new, new_free) } else { (old, old_free) };
        Ok(self.chains(free).map(|chains| (used, chains)))
    }

    /// The chains in flight when `free` is the first free entry.
    fn chains(&mut self, free: u16) -> Option<Vec<Found>> {
        let count = self.part.entries;
        let mut is_known = vec![false; usize::from(count)];
        // Whether nobody had the entry yet.
        let mut know = |entry: u16| {
            let known = is_known.get_mut(usize::from(entry))?;
            (!std::mem::replace(known, true)).then_some(())
        };
        let mut left = count;
        let mut entry = free;
        while entry < count {
            know(entry)?;
            self.part.byte(at(entry, MARK_AT)).store(0, Release);
            left -= 1;
            let next = self.part.half(at(entry, NEXT_AT)).load(Acquire);
            self.next[usize::from(entry)] = next;
            entry = next;
        }
        self.free = free;
        let mut found = Vec::new();
        for first in 0..count {
            if self.part.byte(at(first, MARK_AT)).load(Acquire) == 0 {
                continue;
            }
            let chain = self.chain(first)?;
            let mut entry = first;
            for _ in 0..chain.slots {
                know(entry)?;
                entry = self.next[usize::from(entry)];
            }
            left = left.checked_sub(chain.slots)?;
            found.push(chain);
        }
        found.sort_unstable();
        let mut ids: Vec<u16> = found.iter().map(|chain| chain.id).collect();
        ids.sort_unstable();
        let is_whole = left == 0 && ids.windows(2).all(|pair| pair[0] != pair[1]);
        is_whole.then_some(found)
    }

    /// The chain that begins in `first`; its links are learnt.
    fn chain(&mut self, first: u16) -> Option<Found> {
        let count = self.part.entries;
        let half = |entry: u16, field: usize| self.part.half(at(entry, field)).load(Acquire);
        let slots = half(first, NUM_AT);
        let mut last = first;
        for step in 0..slots.min(count) {
            if step > 0 {
                last = self.next[usize::from(last)];
            }
            if last >= count {
                return None;
            }
            self.next[usize::from(last)] = half(last, NEXT_AT);
        }
        let id = half(last, ID_AT);
        let counter = self.part.long(at(first, COUNTER_AT)).load(Acquire);
        let is_good = (1..=count).contains(&slots) && half(first, LAST_AT) == last && id < count;
        is_good.then_some(Found { counter, id, slots, first, last })
    }
}

impl Tracker<PackedRing> for PackedTracker {
    fn attach(area: &InflightArea, index: u16, size: u16) -> Option<Self> {
        let part = area.part(index, size, true)?;
        let of_entries = || vec![0; usize::from(size)];
        let shown = Position { index: 0, wrap: true };
        let (next, first, last) = (of_entries(), of_entries(), of_entries());
        Some(Self { part, free: 0, next, first, last, shown, counter: 0 })
    }

    fn recover(&mut self, ring: &mut PackedRing) -> Result<Recovery, Fault> {
        if self.part.half(VERSION_AT).load(Acquire) == 0 {
            self.clear(ring.used_position());
            return Ok(Recovery::Fresh);
        }
        let is_ours = self.part.half(VERSION_AT).load(Acquire) == VERSION
            && self.part.half(COUNT_AT).load(Acquire) == self.part.entries;
        let found = if is_ours { self.find(ring)? } else { None };
        let Some((used, chains)) = found else {
            self.clear(ring.used_position());
            return Ok(Recovery::Discarded);
        };
        self.shown = used;
        self.counter = chains.last().map_or(0, |chain| chain.counter.wrapping_add(1));
        for chain in &chains {
            self.first[usize::from(chain.id)] = chain.first;
            self.last[usize::from(chain.first)] = chain.last;
        }
        let in_flight: Vec<(u16, u16)> = chains.iter().map(|chain| (chain.id, chain.slots)).collect();
        // The ring before the area: as long as the two used positions differ, a death here finds
        // the same again.
        ring.resume(used, &in_flight)?;
        self.store_free(self.free, self.free);
        self.store_used(used, used);
        Ok(Recovery::Resumed { heads: in_flight.into_iter().map(|(id, _)| id).collect() })
    }

    fn begin(&mut self, ring: &PackedRing, head: u16) {
        let first = self.free;
        let (mut entry, mut last) = (first, first);
        for descriptor in ring.chain() {
            // The ring has no more slots than there are entries, and none is free before its entry.
            assert!(entry < self.part.entries, "the free entries have run out");
            self.part.half(at(entry, ID_AT)).store(head, Release);
            self.part.half(at(entry, FLAGS_AT)).store(descriptor.flags(), Release);
            self.part.word(at(entry, LEN_AT)).store(descriptor.len, Release);
            self.part.long(at(entry, ADDR_AT)).store(descriptor.addr, Release);
            (last, entry) = (entry, self.next[usize::from(entry)]);
        }
        self.part.half(at(first, LAST_AT)).store(last, Release);
        self.part.half(at(first, NUM_AT)).store(ring.chain().len() as u16, Release);
        self.part.long(at(first, COUNTER_AT)).store(self.counter, Release);
        self.part.byte(at(first, MARK_AT)).store(1, Release);
        (self.first[usize::from(head)], self.last[usize::from(first)]) = (first, last);
        if mutated(Mutant::TrackedTooLate) {
            self.part.byte(at(first, MARK_AT)).store(0, Release);
        }
        self.counter = self.counter.wrapping_add(1);
        self.free = entry;
        self.store_free(entry, entry);
    }

    fn recall(&mut self, ring: &mut PackedRing, head: u16) {
        let first = self.first[usize::from(head)];
        let last = self.last[usize::from(first)];
        let (mut entry, mut at_end) = (first, false);
        let mut chain = Vec::new();
        while !at_end {
            at_end = entry == last;
            let addr = self.part.long(at(entry, ADDR_AT)).load(Acquire);
            let len = self.part.word(at(entry, LEN_AT)).load(Acquire);
            // Whether it goes on is ours to know; the rest is judged as if the driver had said it.
            let flags = self.part.half(at(entry, FLAGS_AT)).load(Acquire) & !NEXT;
            let flags = flags | if at_end { 0 } else { NEXT };
            chain.push(Descriptor::from_parts(addr, len, flags, chain.len() as u16 + 1));
            entry = self.next[usize::from(entry)];
        }
        ring.set_chain(chain.into_iter());
    }

    /// Entries go back to the free list with their batch: until the driver is shown it, a chain that
    /// begins must not get them.
    fn retire(&mut self, _head: u16) {}

    fn before_publish(&mut self, heads: &[u16], used: u32) {
        let old_free = self.free;
        for &head in heads {
            let first = self.first[usize::from(head)];
            self.set_next(self.last[usize::from(first)], self.free);
            self.free = first;
        }
        self.store_free(self.free, old_free);
        if let Some(new) = Position::decode(used as u16, self.part.entries) {
            self.store_used(new, self.shown);
            if !mutated(Mutant::TrackedPositionStays) {
                self.shown = new;
            }
        }
    }

    fn end_batch(&mut self, heads: &[u16], _used: u32) {
        for &head in heads.iter().filter(|_| !mutated(Mutant::TrackedChainStays)) {
            let first = self.first[usize::from(head)];
            self.part.byte(at(first, MARK_AT)).store(0, Release);
        }
        self.store_free(self.free, self.free);
        self.store_used(self.shown, self.shown);
    }
}

/// Where field `field` of `entry` lies.
fn at(entry: u16, field: usize) -> usize {
    HEADER_LEN + usize::from(entry) * ENTRY_LEN + field
}

#[cfg(test)]
#[path = "inflight_packed_tests.rs"]
mod tests;
