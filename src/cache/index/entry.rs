//! The packed entry: one extent inside one region, in eight bytes.
//!
//! The index holds one of these per cached extent, so its size is the index's price: 8 bytes per
//! 4 KiB block in the worst case of random 4 KiB writes, before slack.
//!
//! ```text
//!  63        53 52        42  41   40  39                                  0
//! ┌────────────┬────────────┬────┬────┬─────────────────────────────────────┐
//! │ start      │ length - 1 │ d  │ z  │ position                            │
//! │ 11 bits    │ 11 bits    │    │    │ 40 bits                             │
//! └────────────┴────────────┴────┴────┴─────────────────────────────────────┘
//!  start, length: sectors, start counted from the region's first sector
//!  position: 512-byte units from the start of the media, so media end below 512 TiB
//!  d: dirty    z: reads as zeros
//! ```
//!
//! Invariants:
//! - `start + length <= REGION_SECTORS`: an entry never leaves its region.
//! - `start` is on top, so entries of a region sort as plain integers.
//! - A data entry maps its i-th sector to `position + i`; a zero entry has no payload, its position
//!   names the record that made the zeros and stays the same under splitting.
//! - Zeros that are clean need no entry: what would be one says that the sectors are lost.

use super::REGION_SECTORS;
use crate::mutant::{Mutant, mutated};
use crate::units::SectorRange;

const START_SHIFT: u32 = 53;
const LEN_SHIFT: u32 = 42;
const FIELD_MASK: u64 = REGION_SECTORS - 1;
const DIRTY: u64 = 1 << 41;
const ZERO: u64 = 1 << 40;
const POSITION_MASK: u64 = POSITION_END - 1;
/// All that says what an entry maps to, and nothing about where it lies.
const PLACE_MASK: u64 = DIRTY | ZERO | POSITION_MASK;

/// One past the highest media position an entry can hold, in 512-byte units.
pub const POSITION_END: u64 = 1 << 40;

/// Where an extent lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// 512-byte units from the start of the media, below [`POSITION_END`].
    pub position: u64,
    /// The sectors read as zeros; `position` names the record that says so.
    pub zero: bool,
    /// Not yet on the backing disk.
    pub dirty: bool,
}

/// One past the highest name of zeros: the last two positions are kept for [`Place::LOST`], two so
/// that taking a name modulo this keeps its lowest bit.
pub const ZERO_NAME_END: u64 = POSITION_END - 2;

impl Place {
    /// Nowhere: the sectors are lost, and reading them is an error.
    pub const LOST: Place = Place { position: POSITION_END - 1, zero: true, dirty: false };

    /// Whether the sectors are lost.
    pub fn is_lost(&self) -> bool {
        *self == Place::LOST
    }

    /// The place of what lies `sectors` further on in the same extent.
    pub fn advanced(self, sectors: u64) -> Place {
        Place { position: if self.zero { self.position } else { self.position + sectors }, ..self }
    }

    /// Whether both name the same payload or record; being dirty is not part of that.
    pub fn is_same_payload(&self, other: &Place) -> bool {
        self.zero == other.zero && self.position == other.position
    }
}

/// A logical range and where it lies: the i-th sector at `position + i`, or, for zeros, nowhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// The sectors of the volume.
    pub range: SectorRange,
    /// Where the first of them lies.
    pub place: Place,
}

impl Extent {
    /// The place of `sector`, which must not lie before the extent.
    pub fn place_at(&self, sector: u64) -> Place {
        debug_assert!(sector >= self.range.start);
        self.place.advanced(sector - self.range.start)
    }

    /// The part of the extent inside `range`, if any.
    pub fn clip(&self, range: SectorRange) -> Option<Extent> {
        let range = self.range.intersection(&range)?;
        Some(Extent { range, place: self.place_at(range.start) })
    }

    /// Whether `next` goes on exactly where this ends, logically, on the media, and in its flags.
    pub fn is_continued_by(&self, next: &Extent) -> bool {
        self.range.end() == next.range.start && self.place.advanced(self.range.len) == next.place
    }

    /// Panics unless every position of the extent fits an entry. The engine's geometry guarantees
    /// it; a position cut to 40 bits would map a guest's data to someone else's.
    pub(super) fn check(&self) {
        let end = self.place.advanced(self.range.len).position;
        assert!(
            self.place.position < POSITION_END && end <= POSITION_END,
            "media position out of range: {self:?}"
        );
    }
}

/// Appends `extent`, joining it with the last one if it goes on from there. Entries before `floor`
/// belong to the caller and are left alone.
pub(super) fn push_joined(out: &mut Vec<Extent>, floor: usize, extent: Extent) {
    if out.len() > floor
        && let Some(last) = out.last_mut()
        && last.is_continued_by(&extent)
    {
        last.range.len += extent.range.len;
        return;
    }
    out.push(extent);
}

/// One extent inside one region; see the file head for the bits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry(u64);

impl Entry {
    /// What unused slots of an array hold; never looked at.
    pub const UNUSED: Entry = Entry(0);

    /// `len` sectors from `start`, both relative to the region.
    pub fn new(start: u32, len: u32, place: Place) -> Entry {
        debug_assert!(len > 0 && u64::from(start + len) <= REGION_SECTORS);
        debug_assert!(place.position < POSITION_END);
        let mut bits = u64::from(start) << START_SHIFT | u64::from(len - 1) << LEN_SHIFT | place.position;
        if place.dirty {
            bits |= DIRTY;
        }
        if place.zero {
            bits |= ZERO;
        }
        Entry(bits)
    }

    /// First sector, relative to the region.
    pub fn start(self) -> u32 {
        (self.0 >> START_SHIFT) as u32
    }

    /// Number of sectors.
    pub fn len(self) -> u32 {
        (self.0 >> LEN_SHIFT & FIELD_MASK) as u32 + 1
    }

    /// One past the last sector, relative to the region.
    pub fn end(self) -> u32 {
        self.start() + self.len()
    }

    pub fn is_zero(self) -> bool {
        self.0 & ZERO != 0
    }

    pub fn is_dirty(self) -> bool {
        self.0 & DIRTY != 0
    }

    /// Where the first sector lies.
    pub fn place(self) -> Place {
        Place { position: self.0 & POSITION_MASK, zero: self.is_zero(), dirty: self.is_dirty() }
    }

    /// Decides between two entries of one version: the payload that lies higher counts, and a loss
    /// before any payload.
    pub fn precedence(self) -> u64 {
        self.0 & (ZERO | POSITION_MASK)
    }

    /// The part from `start` to `end`, which must be inside and not empty.
    pub fn clip(self, start: u32, end: u32) -> Entry {
        debug_assert!(self.start() <= start && start < end && end <= self.end());
        if start == self.start() && end == self.end() {
            return self;
        }
        let skipped = if mutated(Mutant::PositionNotAdvanced) { 0 } else { start - self.start() };
        Entry::new(start, end - start, self.place().advanced(u64::from(skipped)))
    }

    /// The two as one entry, if `next` goes on exactly where this ends.
    pub fn join(self, next: Entry) -> Option<Entry> {
        if self.end() != next.start() {
            return None;
        }
        let moved = if self.is_zero() { 0 } else { u64::from(self.len()) };
        // Flags and position are compared in one go. A position that runs over carries into the zero
        // flag, hence the second condition.
        let goes_on = (self.0 & PLACE_MASK) + moved == next.0 & PLACE_MASK;
        (goes_on && self.is_zero() == next.is_zero())
            .then(|| Entry(self.0 + (u64::from(next.len()) << LEN_SHIFT)))
    }

    /// The extent, in a region whose first sector is `base`.
    pub fn extent(self, base: u64) -> Extent {
        Extent {
            range: SectorRange { start: base + u64::from(self.start()), len: u64::from(self.len()) },
            place: self.place(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(position: u64) -> Place {
        Place { position, zero: false, dirty: false }
    }

    #[test]
    fn an_entry_gives_back_what_it_was_made_of() {
        for start in [0u32, 1, 7, 1024, 2047] {
            for len in [1u32, 2, 8, 2047, 2048] {
                if start + len > 2048 {
                    continue;
                }
                for position in [0, 1, 0x12_3456_789a, POSITION_END - 1] {
                    for (zero, dirty) in [(false, false), (true, false), (false, true), (true, true)] {
                        let place = Place { position, zero, dirty };
                        let entry = Entry::new(start, len, place);
                        assert_eq!(
                            (entry.start(), entry.len(), entry.end(), entry.place()),
                            (start, len, start + len, place)
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn the_bits_are_where_the_drawing_has_them() {
        let place = Place { position: 0xab_cdef_0123, zero: true, dirty: false };
        assert_eq!(Entry::new(1, 2, place).0, 1 << 53 | 1 << 42 | 1 << 40 | 0xab_cdef_0123);
        let place = Place { position: 0, zero: false, dirty: true };
        assert_eq!(Entry::new(2047, 1, place).0, 2047 << 53 | 1 << 41);
        assert_eq!(size_of::<Entry>(), 8);
    }

    #[test]
    fn entries_sort_by_start() {
        let far = Entry::new(1, 2047, Place { position: POSITION_END - 1, zero: true, dirty: true });
        assert!(far.0 < Entry::new(2, 1, data(0)).0);
    }

    #[test]
    fn data_moves_on_under_clipping_and_zeros_do_not() {
        let data = Entry::new(10, 20, data(1000)).clip(15, 18);
        assert_eq!((data.start(), data.len(), data.place().position), (15, 3, 1005));
        let zeros = Entry::new(10, 20, Place { position: 1000, zero: true, dirty: true }).clip(15, 30);
        assert_eq!((zeros.start(), zeros.len(), zeros.place().position), (15, 15, 1000));
    }

    #[test]
    fn only_what_is_contiguous_on_both_sides_with_the_same_flags_joins() {
        let zero = |position, dirty| Place { position, zero: true, dirty };
        let first = Entry::new(0, 8, data(100));
        let cases = [
            ("goes on", first, Entry::new(8, 8, data(108)), Some(Entry::new(0, 16, data(100)))),
            ("logical gap", first, Entry::new(9, 8, data(108)), None),
            ("media gap", first, Entry::new(8, 8, data(109)), None),
            ("dirty after clean", first, Entry::new(8, 8, Place { dirty: true, ..data(108) }), None),
            ("zeros after data", first, Entry::new(8, 8, zero(108, false)), None),
            ("data after zeros", Entry::new(0, 8, zero(100, false)), Entry::new(8, 8, data(100)), None),
            (
                "zeros of one record",
                Entry::new(0, 8, zero(100, true)),
                Entry::new(8, 2040, zero(100, true)),
                Some(Entry::new(0, 2048, zero(100, true))),
            ),
            (
                "zeros of two records",
                Entry::new(0, 8, zero(100, true)),
                Entry::new(8, 8, zero(108, true)),
                None,
            ),
            (
                "the last position is not followed by a zero record",
                Entry::new(0, 1, data(POSITION_END - 1)),
                Entry::new(1, 1, zero(0, false)),
                None,
            ),
        ];
        for (what, a, b, joined) in cases {
            assert_eq!(a.join(b).map(|e| e.0), joined.map(|e| e.0), "{what}");
        }
    }

    #[test]
    fn a_clip_of_an_extent_knows_its_place() {
        let extent = Extent { range: SectorRange::new(100, 50), place: data(7000) };
        assert_eq!(
            extent.clip(SectorRange::new(120, 100)),
            Some(Extent { range: SectorRange::new(120, 30), place: data(7020) })
        );
        assert_eq!(extent.clip(SectorRange::new(150, 1)), None);
    }

    #[test]
    fn joining_leaves_the_callers_extents_alone() {
        let part = |start, position| Extent { range: SectorRange::new(start, 4), place: data(position) };
        let mut out = vec![part(0, 100)];
        push_joined(&mut out, 1, part(4, 104));
        push_joined(&mut out, 1, part(8, 108));
        assert_eq!(out, [part(0, 100), Extent { range: SectorRange::new(4, 8), place: data(104) }]);
    }
}
