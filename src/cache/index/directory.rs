//! Which regions hold anything, which hold anything dirty, and which are zeros from end to end.
//!
//! Regions are spread over shards by the low bits of their number and hashed inside a shard, which
//! is right for a lookup and useless for going through a volume in order. The directory keeps the
//! order: two bits per region, by groups of 64 regions that exist only where something is mapped,
//! and the runs of zeros. Finding the next dirty region of a sparse 10 TiB volume costs what is
//! mapped there, not what could be.
//!
//! Invariants, for every region:
//! - either the region is in its shard's table and `mapped` is set, or it is covered by a run, or
//!   nothing is mapped in it; never two of these;
//! - this state changes only under the shard's write lock, so whoever holds the shard sees it still;
//! - a change between table and run is one step under the directory's write lock, so whoever holds
//!   only the directory sees a mapped region on exactly one side;
//! - `dirty` is set exactly if the table's region has dirty sectors.
//!
//! Lock order: shards ascending, then the directory. Nothing is called with it held.

use std::collections::BTreeMap;
use std::ops::Range;

use super::entry::{Extent, Place};
use super::runs::{Runs, extent_of};
use super::{POISONED, REGION_SECTORS};
use crate::sync::atomic::{AtomicU64, Ordering::Relaxed};
use crate::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use crate::units::SectorRange;

/// `log2` of the regions in a group: one bit each in a word.
const GROUP_SHIFT: u32 = 6;

/// How a region is represented.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Nothing is mapped.
    Vacant,
    /// By entries in its shard's table.
    Table { is_dirty: bool },
    /// By a run of zeros.
    Run(Place),
}

impl State {
    pub fn is_run(self) -> bool {
        matches!(self, State::Run(_))
    }
}

/// Where something is mapped next.
pub(super) enum Next {
    /// In this region, by its table.
    Region(u64),
    /// In this part of a run.
    Run(Extent),
}

#[derive(Default)]
struct Group {
    mapped: AtomicU64,
    dirty: AtomicU64,
}

#[derive(Default)]
struct Inner {
    groups: BTreeMap<u64, Group>,
    runs: Runs,
}

/// The ordered side of an index.
#[derive(Default)]
pub(super) struct Directory {
    inner: RwLock<Inner>,
    /// Regions in runs, so that a lookup that finds nothing need not come here when there are none.
    run_regions: AtomicU64,
}

impl Directory {
    /// The zeros that cover `region`. The caller holds its shard.
    pub fn run_at(&self, region: u64) -> Option<Place> {
        // A stale zero is impossible for this region: what covers it was put under its shard's lock.
        if self.run_regions.load(Relaxed) == 0 {
            return None;
        }
        self.read().runs.get(region)
    }

    /// Records that `region` went from one state to another. The caller holds its shard for writing.
    pub fn settle(&self, region: u64, from: State, to: State) {
        if from == to {
            return;
        }
        let (is_mapped, is_dirty) = match to {
            State::Table { is_dirty } => (true, is_dirty),
            State::Vacant | State::Run(_) => (false, false),
        };
        let has_run = from.is_run() || to.is_run();
        if !has_run && self.read().mark(region, is_mapped, is_dirty) {
            return;
        }
        let mut inner = self.write();
        match to {
            State::Run(place) => inner.runs.set(region..region + 1, place),
            _ if has_run => inner.runs.unset(region..region + 1),
            _ => {}
        }
        inner.mark_or_make(region, is_mapped, is_dirty);
        self.run_regions.store(inner.runs.regions(), Relaxed);
    }

    /// Covers `regions` with zeros, or uncovers them. The caller holds all their shards for writing,
    /// and none of them is in a table.
    pub fn set_run(&self, regions: Range<u64>, place: Option<Place>) {
        let mut inner = self.write();
        match place {
            Some(place) => inner.runs.set(regions, place),
            None => inner.runs.unset(regions),
        }
        self.run_regions.store(inner.runs.regions(), Relaxed);
    }

    /// What is mapped first at or after `sector`, or, if `only_dirty`, what is or may be dirty.
    pub fn next(&self, sector: u64, only_dirty: bool) -> Option<Next> {
        let region = sector / REGION_SECTORS;
        let inner = self.read();
        let in_table = inner.next_region(region, only_dirty);
        let in_run = inner.next_run(region, in_table.unwrap_or(u64::MAX), only_dirty);
        match (in_run, in_table) {
            (Some((regions, place)), _) => {
                let rest = SectorRange { start: sector, len: u64::MAX / 2 - sector };
                extent_of(regions, place).clip(rest).map(Next::Run)
            }
            (None, Some(region)) => Some(Next::Region(region)),
            (None, None) => None,
        }
    }

    /// How many runs there are.
    pub fn runs(&self) -> u64 {
        self.read().runs.len() as u64
    }

    /// Bytes on the heap, near enough: a B-tree's nodes are two thirds full.
    pub fn memory_bytes(&self) -> u64 {
        let inner = self.read();
        let group = size_of::<(u64, Group)>() * 3 / 2;
        (inner.groups.len() * group) as u64 + inner.runs.memory_bytes()
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().expect(POISONED)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().expect(POISONED)
    }
}

impl Inner {
    /// Sets a region's bits if that needs no change of the map; says whether it did.
    fn mark(&self, region: u64, is_mapped: bool, is_dirty: bool) -> bool {
        match self.groups.get(&(region >> GROUP_SHIFT)) {
            Some(group) => {
                group.set(region, is_mapped, is_dirty);
                group.mapped.load(Relaxed) != 0
            }
            None => !is_mapped,
        }
    }

    /// Sets a region's bits, making or dropping its group as needed.
    fn mark_or_make(&mut self, region: u64, is_mapped: bool, is_dirty: bool) {
        let key = region >> GROUP_SHIFT;
        if is_mapped {
            self.groups.entry(key).or_default().set(region, is_mapped, is_dirty);
        } else if let Some(group) = self.groups.get_mut(&key) {
            group.set(region, is_mapped, is_dirty);
            if *group.mapped.get_mut() == 0 {
                self.groups.remove(&key);
            }
        }
    }

    fn next_region(&self, region: u64, only_dirty: bool) -> Option<u64> {
        let first = region >> GROUP_SHIFT;
        self.groups.range(first..).find_map(|(&key, group)| {
            let bits = if only_dirty { &group.dirty } else { &group.mapped }.load(Relaxed);
            let skipped = if key == first { region % (1 << GROUP_SHIFT) } else { 0 };
            let bits = bits >> skipped << skipped;
            (bits != 0).then(|| key << GROUP_SHIFT | u64::from(bits.trailing_zeros()))
        })
    }

    /// The first run in `region..end`.
    fn next_run(&self, region: u64, end: u64, only_dirty: bool) -> Option<(Range<u64>, Place)> {
        if self.runs.regions() == 0 || only_dirty && self.runs.regions_dirty() == 0 {
            return None;
        }
        self.runs.within(region..end).find(|(_, place)| place.dirty || !only_dirty)
    }
}

impl Group {
    fn set(&self, region: u64, is_mapped: bool, is_dirty: bool) {
        let bit = 1 << (region % (1 << GROUP_SHIFT));
        for (word, value) in [(&self.mapped, is_mapped), (&self.dirty, is_dirty)] {
            if value {
                word.fetch_or(bit, Relaxed);
            } else {
                word.fetch_and(!bit, Relaxed);
            }
        }
    }
}
