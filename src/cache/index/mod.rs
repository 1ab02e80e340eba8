//! Which extent of a volume is cached where: the sharded index. Pure: no I/O, no clock.
//!
//! Every queue and every worker asks it about every request, and it holds one word per cached
//! extent of every volume, so it is built for short critical sections and for RAM:
//!
//! ```text
//!  sector ─► region = sector / 2048 ─┬─► shard (low bits) ─► table (hash) ─► entries, 8 bytes each
//!                                    │       lock                              sorted array
//!                                    └─► directory: regions mapped, regions dirty, runs of zeros
//!                                            order for write-back and tools; off the hit path
//! ```
//!
//! Neighbours that go on from one another are joined, up to a region's size, so sequential data
//! costs next to nothing; whole regions of zeros live in runs, so a discard of the volume is one.
//!
//! RAM per random 4 KiB block, slack and tables included: 8.6 bytes where a region is full, under 12
//! where an eighth of it is cached; a lone block in a region of its own costs about 80
//! (`tests/footprint.rs`).
//!
//! Invariants:
//! - a stored entry never crosses a region, and what it maps to is linear (see `entry.rs`);
//! - each operation is atomic per region; across regions it is not, and the engine's stripes order
//!   what overlaps;
//! - `replaced`, `removed`, `inserted` and `moved` name exactly the sectors concerned, once each, in
//!   ascending order, joined where they go on from one another;
//! - a thread holds one shard, or all of them in ascending order, and then at most the directory;
//!   nothing of the caller's runs under a lock.

mod build;
mod directory;
mod edit;
mod entry;
pub(super) mod hint;
mod map;
mod region;
mod runs;
mod table;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub(crate) use build::Fragment;
pub use entry::{Extent, POSITION_END, Place, ZERO_NAME_END};
pub use map::ExtentMap;

use self::directory::{Directory, Next, State};
use self::edit::{Edit, Insert, InsertGaps, MarkCleanIf, MoveIf, Remove, RemoveIf, ReplaceIf, Verdict};
use self::entry::push_joined;
use self::region::{Change, Region, Window};
use self::runs::extent_of;
use self::table::{Seed, Sums, Table};
use crate::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use crate::units::SectorRange;

/// Sectors in a region (1 MiB), the unit of sharding; stored entries never cross one.
pub const REGION_SECTORS: u64 = 2048;

/// Regions and runs that a long operation may visit before it lets go of the shards.
const WIDE_STEPS: usize = 1024;

const POISONED: &str = "a thread died inside the index; only a restart can tell what it left";

/// Which extent of one volume is cached where. Shared by reference; every method may be called from
/// any thread.
pub struct Index {
    shards: Box<[Shard]>,
    directory: Directory,
}

/// One lock's worth of regions, on cache lines of its own.
#[repr(align(128))]
struct Shard {
    table: RwLock<Table>,
    sums: Sums,
}

impl Shard {
    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().expect(POISONED)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().expect(POISONED)
    }
}

impl Index {
    /// An empty index of `shards` shards, rounded up to a power of two. A few per thread that will
    /// use it; 256 is plenty.
    pub fn new(shards: usize) -> Index {
        let shards = shards.next_power_of_two();
        let seed = Seed::random();
        let shard = |_| Shard {
            table: RwLock::new(Table::new(seed, shards.trailing_zeros())),
            sums: Sums::default(),
        };
        Index { shards: (0..shards).map(shard).collect(), directory: Directory::default() }
    }

    /// An empty index for a volume of so many sectors: with no more shards than it has regions, and at the
    /// least what a few queues need, should it grow while it is open.
    pub fn for_volume(sectors: u64) -> Index {
        Index::new(sectors.div_ceil(REGION_SECTORS).clamp(16, 1024) as usize)
    }

    /// Maps the extent, whatever was there: newest wins. Appends to `replaced` exactly the old parts
    /// it took. Zeros may cover terabytes.
    pub fn insert(&self, extent: Extent, replaced: &mut Vec<Extent>) {
        extent.check();
        let floor = replaced.len();
        self.edit(extent.range, &mut Insert { extent, floor, replaced });
    }

    /// Maps the extent where nothing is mapped; appends the parts it really mapped. For fills.
    pub fn insert_gaps(&self, extent: Extent, inserted: &mut Vec<Extent>) {
        extent.check();
        let floor = inserted.len();
        self.edit(extent.range, &mut InsertGaps { extent, floor, inserted });
    }

    /// Unmaps the range; appends what was mapped there.
    pub fn remove(&self, range: SectorRange, removed: &mut Vec<Extent>) {
        let floor = removed.len();
        self.edit(range, &mut Remove { floor, removed });
    }

    /// Unmaps those parts of `extent.range` that still map where `extent` says, dirty or not;
    /// appends them. For eviction.
    pub fn remove_if(&self, extent: Extent, removed: &mut Vec<Extent>) {
        let floor = removed.len();
        self.edit(extent.range, &mut RemoveIf { extent, floor, removed });
    }

    /// Maps those parts that still map to `from` to `to_position` and on, dirty or clean as they
    /// are; appends them as they are then. For relocation.
    pub fn move_if(&self, from: Extent, to_position: u64, moved: &mut Vec<Extent>) {
        let to = Extent { place: Place { position: to_position, ..from.place }, ..from };
        to.check();
        let floor = moved.len();
        self.edit(from.range, &mut MoveIf { from, to, floor, moved });
    }

    /// Maps those parts of `extent.range` that still map where `extent` says, dirty or not, to
    /// `place`, which has no payload; appends what they were.
    pub fn replace_if(&self, extent: Extent, place: Place, removed: &mut Vec<Extent>) {
        assert!(place.zero, "payload does not lie in one place");
        let floor = removed.len();
        self.edit(extent.range, &mut ReplaceIf { extent, to: place, floor, removed });
    }

    /// Whether any sector of `extent.range` still maps where `extent` says.
    pub fn shows(&self, extent: &Extent) -> bool {
        let mut found = Vec::new();
        self.lookup(extent.range, &mut found);
        found.iter().any(|e| extent.place_at(e.range.start).is_same_payload(&e.place))
    }

    /// Marks clean those parts that still map where `extent` says; with `drop_zero`, unmaps them if
    /// they are zeros. Returns how many sectors it changed.
    pub fn mark_clean_if(&self, extent: Extent, drop_zero: bool) -> u64 {
        let mut edit = MarkCleanIf { extent, drop_zero, changed: 0 };
        self.edit(extent.range, &mut edit);
        edit.changed
    }

    /// Unmaps everything, in one step; appends what was mapped.
    pub fn clear(&self, removed: &mut Vec<Extent>) {
        let floor = removed.len();
        let mut edit = Remove { floor, removed };
        let mut tables: Vec<_> = self.shards.iter().map(Shard::write).collect();
        let (mut cursor, end) = (0, (1 << 63) / REGION_SECTORS);
        while cursor < end {
            cursor = self.edit_batch(&mut tables, cursor, end, &mut edit);
        }
    }

    /// Appends what is mapped in the range now, clipped, in ascending order; gaps are what is absent.
    pub fn lookup(&self, range: SectorRange, found: &mut Vec<Extent>) {
        let floor = found.len();
        if range.len / REGION_SECTORS <= self.shards.len() as u64 {
            for (region, window) in spans(range) {
                self.read_region(region, window, |extent| push_joined(found, floor, extent));
            }
            return;
        }
        let mut cursor = range.start;
        while cursor < range.end() {
            let next = self.step(cursor, false, |extent| {
                if let Some(extent) = extent.clip(range) {
                    push_joined(found, floor, extent);
                }
            });
            cursor = next.unwrap_or(range.end());
        }
    }

    /// Appends up to `max` dirty extents at or after sector `from`, in ascending order, and returns
    /// the sector to go on from, or `None` when there are no more.
    pub fn dirty_from(&self, from: u64, max: usize, found: &mut Vec<Extent>) -> Option<u64> {
        let floor = found.len();
        let mut cursor = from;
        while found.len() - floor < max {
            cursor = self.step(cursor, true, |extent| {
                if extent.place.dirty {
                    push_joined(found, floor, extent);
                }
            })?;
        }
        found.truncate(floor + max);
        Some(found[floor..].last().map_or(from, |extent| extent.range.end()))
    }

    /// Shows every stored entry and every run of zeros, in ascending order. No lock is held while
    /// `f` runs.
    pub fn for_each(&self, mut f: impl FnMut(Extent)) {
        let (mut cursor, mut found) = (0, Vec::new());
        while let Some(next) = self.step(cursor, false, |extent| found.push(extent)) {
            found.drain(..).for_each(&mut f);
            cursor = next;
        }
    }

    /// Brings what a lookup of `sector` will need into the CPU's caches; a hint, and none while a
    /// writer has the shard. Worth a call per request of a batch before the first lookup: the entries
    /// are asked for and not waited for, so their misses overlap, as those of successive lookups do not.
    pub fn prefetch(&self, sector: u64) {
        let region = sector / REGION_SECTORS;
        if let Ok(table) = self.shard(region).table.try_read()
            && let Some(entries) = table.get(region)
        {
            entries.touch((sector % REGION_SECTORS) as u32);
        }
    }

    /// How many entries and runs are stored.
    pub fn extents(&self) -> u64 {
        let entries = Sums::total(self.shards.iter().map(|shard| shard.sums.extents()));
        self.directory.runs() + entries
    }

    /// How many sectors are mapped. Exact when nobody changes the index meanwhile.
    pub fn mapped_sectors(&self) -> u64 {
        Sums::total(self.shards.iter().map(|shard| shard.sums.mapped()))
    }

    /// How many sectors are mapped and not yet on the backing disk. Exact when nobody changes the
    /// index meanwhile, and never too low for a region that only changes its representation.
    pub fn dirty_sectors(&self) -> u64 {
        Sums::total(self.shards.iter().map(|shard| shard.sums.dirty()))
    }

    /// Bytes of RAM in use, allocator headers included, fragmentation not.
    pub fn memory_bytes(&self) -> u64 {
        let tables: u64 = self.shards.iter().map(|shard| shard.read().memory_bytes()).sum();
        let entries = Sums::total(self.shards.iter().map(|shard| shard.sums.heap()));
        let own = size_of::<Index>() + size_of_val::<[Shard]>(&self.shards);
        own as u64 + tables + entries + self.directory.memory_bytes()
    }

    fn shard(&self, region: u64) -> &Shard {
        &self.shards[region as usize & (self.shards.len() - 1)]
    }

    /// Shows what is mapped in a part of one region, under its shard's lock.
    fn read_region(&self, region: u64, window: Window, mut piece: impl FnMut(Extent)) {
        let base = region * REGION_SECTORS;
        let table = self.shard(region).read();
        match table.get(region) {
            Some(entries) => entries.read(base, window, piece),
            None => {
                if let Some(place) = self.directory.run_at(region) {
                    piece(Extent { range: window.range(base), place });
                }
            }
        }
    }

    /// Shows the first region or run at or after sector `cursor`, clipped; returns where to go on.
    fn step(&self, cursor: u64, only_dirty: bool, mut piece: impl FnMut(Extent)) -> Option<u64> {
        match self.directory.next(cursor, only_dirty)? {
            Next::Run(extent) => {
                piece(extent);
                Some(extent.range.end())
            }
            Next::Region(region) => {
                let base = region * REGION_SECTORS;
                let start = cursor.saturating_sub(base) as u32;
                self.read_region(region, Window { start, ..Window::ALL }, piece);
                Some(base + REGION_SECTORS)
            }
        }
    }

    /// Does `edit` to a range: region by region, or, if there are more regions than shards, under
    /// all shards at once, which costs what is mapped there rather than how far the range goes.
    fn edit<E: Edit>(&self, range: SectorRange, edit: &mut E) {
        let is_wide = range.len / REGION_SECTORS > self.shards.len() as u64 && !edit.maps_data();
        if !is_wide {
            spans(range).for_each(|(region, window)| self.edit_one(region, window, edit));
            return;
        }
        let start = range.start.next_multiple_of(REGION_SECTORS);
        let end = range.end() / REGION_SECTORS * REGION_SECTORS;
        if range.start < start {
            let head = SectorRange { start: range.start, len: start - range.start };
            spans(head).for_each(|(region, window)| self.edit_one(region, window, edit));
        }
        let mut cursor = start / REGION_SECTORS;
        while cursor < end / REGION_SECTORS {
            let mut tables: Vec<_> = self.shards.iter().map(Shard::write).collect();
            cursor = self.edit_batch(&mut tables, cursor, end / REGION_SECTORS, edit);
        }
        if end < range.end() {
            let tail = SectorRange { start: end, len: range.end() - end };
            spans(tail).for_each(|(region, window)| self.edit_one(region, window, edit));
        }
    }

    fn edit_one<E: Edit>(&self, region: u64, window: Window, edit: &mut E) {
        let mut table = self.shard(region).write();
        self.edit_region(&mut table, region, window, edit);
    }

    /// Edits whole regions from `cursor` to `end` at most, with every shard locked; returns how far
    /// it came.
    fn edit_batch<E: Edit>(
        &self,
        tables: &mut [RwLockWriteGuard<'_, Table>],
        mut cursor: u64,
        end: u64,
        edit: &mut E,
    ) -> u64 {
        for _ in 0..WIDE_STEPS {
            let next = self.directory.next(cursor * REGION_SECTORS, false);
            let (first, past) = match &next {
                Some(Next::Region(region)) => (*region, region + 1),
                Some(Next::Run(run)) => (run.range.start / REGION_SECTORS, run.range.end() / REGION_SECTORS),
                None => (end, end),
            };
            let (first, past) = (first.min(end), past.min(end));
            if cursor < first
                && let Some(place) = edit.gap(regions_range(cursor, first))
            {
                self.change_run(cursor..first, None, Some(place));
            }
            match next {
                Some(Next::Region(region)) if region < end => {
                    let table = &mut tables[region as usize & (self.shards.len() - 1)];
                    self.edit_region(table, region, Window::ALL, edit);
                }
                Some(Next::Run(run)) if first < past => {
                    let to = match edit.piece(extent_of(first..past, run.place)) {
                        Verdict::Keep => Some(run.place),
                        Verdict::Unmap => None,
                        Verdict::Map(place) => Some(place),
                    };
                    self.change_run(first..past, Some(run.place), to);
                }
                _ => return end,
            }
            cursor = past;
        }
        cursor
    }

    /// Edits a part of one region with its shard locked, and puts the region where it then belongs:
    /// in the table, in a run, or nowhere.
    fn edit_region<E: Edit>(&self, table: &mut Table, region: u64, window: Window, edit: &mut E) {
        let base = region * REGION_SECTORS;
        let (scratch, slot) = table.slot(region);
        let is_in_table = slot.is_some();
        let mut absent = Region::EMPTY;
        let entries = slot.unwrap_or_else(|| {
            absent = self.directory.run_at(region).map_or(Region::EMPTY, Region::whole);
            &mut absent
        });
        let from = entries.state();
        let Some(mut change) = entries.edit(base, window, edit, scratch) else { return };
        let to = entries.state();
        // The entry of a region in a run counts as none of the table's.
        change.extents += i64::from(from.is_run()) - i64::from(to.is_run());
        self.shard(region).sums.add(change);
        match (is_in_table, to) {
            (false, State::Table { .. }) => table.insert(region, absent),
            (true, State::Vacant | State::Run(_)) => table.remove(region),
            _ => {}
        }
        self.directory.settle(region, from, to);
    }

    /// Changes regions without a table from one place to another, with every shard locked.
    fn change_run(&self, regions: Range<u64>, from: Option<Place>, to: Option<Place>) {
        if from == to {
            return;
        }
        let sectors = ((regions.end - regions.start) * REGION_SECTORS) as i64;
        let mapped = |place: Option<Place>| if place.is_some() { sectors } else { 0 };
        let dirty = |place: Option<Place>| if place.is_some_and(|place| place.dirty) { sectors } else { 0 };
        self.shard(regions.start).sums.add(Change {
            mapped: mapped(to) - mapped(from),
            dirty: dirty(to) - dirty(from),
            ..Change::default()
        });
        self.directory.set_run(regions, to);
    }
}

/// The parts of a range by region.
fn spans(range: SectorRange) -> impl Iterator<Item = (u64, Window)> {
    let regions = range.start / REGION_SECTORS..=(range.end() - 1) / REGION_SECTORS;
    regions.map(move |region| {
        let base = region * REGION_SECTORS;
        let start = range.start.saturating_sub(base) as u32;
        let end = (range.end() - base).min(REGION_SECTORS) as u32;
        (region, Window { start, end })
    })
}

fn regions_range(first: u64, end: u64) -> SectorRange {
    SectorRange { start: first * REGION_SECTORS, len: (end - first) * REGION_SECTORS }
}
