//! One region: the entries of 1 MiB of a volume, sorted, in an array that is hardly ever too long.
//!
//! A tree of extents costs 40 to 100 bytes per extent in nodes, links and slack. Cutting the volume
//! into regions makes the keys relative and short enough to share a word with the position, and
//! bounds every operation: a region never has more than 2,048 entries, so moving the tail of its
//! array is at most 16 KiB of `memmove`, and usually under 2 KiB.
//!
//! Invariants:
//! - entries are sorted, disjoint, and no two neighbours could be joined;
//! - `count` is how many slots of the store are in use, `dirty` how many sectors are dirty;
//! - a region with one entry owns no heap.

use super::REGION_SECTORS;
use super::directory::State;
use super::edit::{Edit, Verdict};
use super::entry::{Entry, Extent, Place};
use super::hint;
use crate::units::SectorRange;

/// Where the entries are. A lone entry sits where the length of the boxed slice would be.
enum Store {
    Inline(Entry),
    Heap(Box<[Entry]>),
}

/// The mapped extents of one region.
pub(super) struct Region {
    store: Store,
    count: u16,
    dirty: u16,
}

// The table's price per region; `Vec` would make it 32.
const _: () = assert!(size_of::<Region>() == 24);

/// How an edit changed the sums an index keeps.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(super) struct Change {
    pub extents: i64,
    pub mapped: i64,
    pub dirty: i64,
    pub heap: i64,
}

/// A part of a region, in sectors from its start, not empty.
#[derive(Clone, Copy)]
pub(super) struct Window {
    pub start: u32,
    pub end: u32,
}

impl Window {
    pub const ALL: Window = Window { start: 0, end: REGION_SECTORS as u32 };

    /// The sectors, in a region whose first sector is `base`.
    pub fn range(self, base: u64) -> SectorRange {
        SectorRange { start: base + u64::from(self.start), len: u64::from(self.end - self.start) }
    }
}

impl Region {
    /// A region with nothing in it.
    pub const EMPTY: Region = Region { store: Store::Inline(Entry::UNUSED), count: 0, dirty: 0 };

    /// A region that maps to one place from its first sector to its last.
    pub fn whole(place: Place) -> Region {
        let entry = Entry::new(0, REGION_SECTORS as u32, place);
        let dirty = if place.dirty { REGION_SECTORS as u16 } else { 0 };
        Region { store: Store::Inline(entry), count: 1, dirty }
    }

    /// A region of these entries, which must be sorted, disjoint and joined.
    pub fn of(entries: &[Entry]) -> Region {
        Region {
            store: store_of([entries, &[], &[]]),
            count: entries.len() as u16,
            dirty: sectors_dirty(entries) as u16,
        }
    }

    /// What the region adds to the sums of an index.
    pub fn totals(&self) -> Change {
        let entries = self.entries();
        Change {
            extents: entries.len() as i64,
            mapped: sectors(entries),
            dirty: i64::from(self.dirty),
            heap: self.heap_bytes(),
        }
    }

    /// Where the region belongs: zeros of one record from end to end are a run's.
    pub fn state(&self) -> State {
        match self.entries() {
            [] => State::Vacant,
            [entry] if entry.is_zero() && u64::from(entry.len()) == REGION_SECTORS => {
                State::Run(entry.place())
            }
            _ => State::Table { is_dirty: self.dirty > 0 },
        }
    }

    /// Asks for what a search for sector `at` looks at first: where the entry is if entries are spread
    /// evenly, and the line before or behind, if it is near.
    pub fn touch(&self, at: u32) {
        let entries = self.entries();
        let guess = guess_of(entries.len(), at);
        let near = [guess.saturating_sub(GUESS_ERROR), (guess + GUESS_ERROR).min(entries.len().max(1) - 1)];
        near.into_iter().filter_map(|i| entries.get(i)).for_each(hint::prefetch);
    }

    /// Shows the mapped pieces inside `window` in ascending order; `base` is the region's first
    /// sector.
    pub fn read(&self, base: u64, window: Window, mut piece: impl FnMut(Extent)) {
        let entries = self.entries();
        for entry in &entries[first_ending_after(entries, window.start)..] {
            if entry.start() >= window.end {
                break;
            }
            let start = entry.start().max(window.start);
            piece(entry.clip(start, entry.end().min(window.end)).extent(base));
        }
    }

    /// Asks `edit` about every piece and gap of `window` and does what it says. `None` if nothing
    /// changed.
    pub fn edit<E: Edit>(
        &mut self,
        base: u64,
        window: Window,
        edit: &mut E,
        scratch: &mut Vec<Entry>,
    ) -> Option<Change> {
        let entries = self.entries();
        let overlap = first_ending_after(entries, window.start);
        let mut builder = Builder { base, edit, entries: scratch, is_changed: false };
        builder.entries.clear();

        // Neighbours that touch the window are rewritten with it, since they may join.
        let mut from = overlap;
        if overlap > 0 && entries[overlap - 1].end() == window.start {
            from = overlap - 1;
            builder.push(entries[from]);
        }
        let (mut to, mut cursor) = (overlap, window.start);
        while to < entries.len() && entries[to].start() < window.end {
            let old = entries[to];
            let (start, end) = (old.start().max(window.start), old.end().min(window.end));
            if old.start() < start {
                builder.push(old.clip(old.start(), start));
            }
            if cursor < start {
                builder.gap(cursor, start);
            }
            builder.piece(old.clip(start, end));
            if end < old.end() {
                builder.push(old.clip(end, old.end()));
            }
            (to, cursor) = (to + 1, end);
        }
        if cursor < window.end {
            builder.gap(cursor, window.end);
        }
        if to < entries.len() && entries[to].start() == window.end {
            builder.push(entries[to]);
            to += 1;
        }
        builder.is_changed.then(|| self.splice(from, to, scratch))
    }

    pub fn entries(&self) -> &[Entry] {
        let all = match &self.store {
            Store::Inline(entry) => std::slice::from_ref(entry),
            Store::Heap(slots) => slots,
        };
        &all[..usize::from(self.count)]
    }

    /// Bytes on the heap, with the allocator's word of header.
    pub fn heap_bytes(&self) -> i64 {
        match &self.store {
            Store::Inline(_) => 0,
            Store::Heap(slots) => (size_of_val::<[Entry]>(slots) + size_of::<usize>()) as i64,
        }
    }

    /// Puts `new` in the place of the entries `from..to`.
    fn splice(&mut self, from: usize, to: usize, new: &[Entry]) -> Change {
        let entries = self.entries();
        let (count_old, count_new) = (entries.len(), entries.len() - (to - from) + new.len());
        let dirty = sectors_dirty(new) - sectors_dirty(&entries[from..to]);
        let mapped = sectors(new) - sectors(&entries[from..to]);
        let heap_old = self.heap_bytes();

        if let Store::Heap(slots) = &mut self.store
            && is_fitting(slots.len(), count_new)
        {
            // An overwrite of one extent by another moves nothing, and must not touch the rest.
            if to != from + new.len() {
                slots.copy_within(to..count_old, from + new.len());
            }
            slots[from..from + new.len()].copy_from_slice(new);
        } else {
            self.store = store_of([&self.entries()[..from], new, &self.entries()[to..]]);
        }
        // Both fit: a region has 2,048 sectors, and an entry at least one of them.
        self.count = count_new as u16;
        self.dirty = (i64::from(self.dirty) + dirty) as u16;
        Change {
            extents: count_new as i64 - count_old as i64,
            mapped,
            dirty,
            heap: self.heap_bytes() - heap_old,
        }
    }
}

/// Collects what an edit leaves of the entries it saw.
struct Builder<'a, E> {
    base: u64,
    edit: &'a mut E,
    entries: &'a mut Vec<Entry>,
    is_changed: bool,
}

impl<E: Edit> Builder<'_, E> {
    fn push(&mut self, entry: Entry) {
        push_entry(self.entries, entry);
    }

    fn piece(&mut self, old: Entry) {
        match self.edit.piece(old.extent(self.base)) {
            Verdict::Keep => self.push(old),
            Verdict::Unmap => self.is_changed = true,
            Verdict::Map(place) => {
                self.is_changed = true;
                self.push(Entry::new(old.start(), old.len(), place));
            }
        }
    }

    fn gap(&mut self, start: u32, end: u32) {
        let range = Window { start, end }.range(self.base);
        if let Some(place) = self.edit.gap(range) {
            self.is_changed = true;
            self.push(Entry::new(start, end - start, place));
        }
    }
}

/// Appends an entry, joined with the last one if it goes on from it.
pub(super) fn push_entry(entries: &mut Vec<Entry>, entry: Entry) {
    if let Some(last) = entries.last_mut()
        && let Some(joined) = last.join(entry)
    {
        *last = joined;
    } else {
        entries.push(entry);
    }
}

/// The index of the first entry that ends after sector `at`, or how many there are.
///
/// Starts where the entry would be if entries were spread evenly, which for random writes of one
/// size is at most a cache line off, and widens the search from there: one miss where halving the
/// array from its middle takes four or five.
fn first_ending_after(entries: &[Entry], at: u32) -> usize {
    let is_before = |entry: &Entry| entry.end() <= at;
    let guess = guess_of(entries.len(), at);
    let (mut low, mut high, mut step) = (guess, guess, 1);
    if guess < entries.len() && is_before(&entries[guess]) {
        while high < entries.len() && is_before(&entries[high]) {
            low = high + 1;
            high += step;
            step *= 2;
        }
        high = high.min(entries.len());
    } else {
        while low > 0 && !is_before(&entries[low - 1]) {
            high = low - 1;
            low = low.saturating_sub(step);
            step *= 2;
        }
    }
    low + entries[low..high].partition_point(is_before)
}

/// How far from the guess most entries are where not all blocks of a region are cached. More would ask
/// for lines that nobody looks at.
const GUESS_ERROR: usize = 4;

/// Where among `count` entries sector `at` would be if they were spread evenly.
fn guess_of(count: usize, at: u32) -> usize {
    at as usize * count / REGION_SECTORS as usize
}

fn sectors(entries: &[Entry]) -> i64 {
    entries.iter().map(|entry| i64::from(entry.len())).sum()
}

fn sectors_dirty(entries: &[Entry]) -> i64 {
    entries.iter().filter(|entry| entry.is_dirty()).map(|entry| i64::from(entry.len())).sum()
}

/// Slots to make for `count` entries: an eighth more, so that a region of n random extents costs n
/// words and a bit, where doubling would cost up to 2n. Odd, since with its own word of header
/// glibc's malloc then hands out exactly that.
fn slots_for(count: usize) -> usize {
    (count + count / 8 + 1) | 1
}

/// Whether `count` entries may stay in an array of `slots`: they fit and no more than a fourth and
/// a cache line are wasted. The room between this and [`slots_for`] keeps an array whose count goes
/// up and down from moving each time.
fn is_fitting(slots: usize, count: usize) -> bool {
    count > 1 && count <= slots && slots <= count + count / 4 + 8
}

/// A store for the entries of `parts`, one after the other.
fn store_of(parts: [&[Entry]; 3]) -> Store {
    match parts.iter().map(|part| part.len()).sum() {
        0 => Store::Inline(Entry::UNUSED),
        1 => Store::Inline(*parts.into_iter().flatten().next().unwrap_or(&Entry::UNUSED)),
        count => {
            let mut slots = Vec::new();
            slots.reserve_exact(slots_for(count));
            parts.iter().for_each(|part| slots.extend_from_slice(part));
            slots.resize(slots_for(count), Entry::UNUSED);
            Store::Heap(slots.into_boxed_slice())
        }
    }
}
