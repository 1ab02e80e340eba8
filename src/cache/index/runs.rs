//! Runs of whole regions that read as zeros.
//!
//! One discard may cover terabytes. As entries that would be one table slot per mebibyte, half a
//! gigabyte of memory at a guest's word; as a run it is one.
//!
//! Invariants: runs are disjoint, none is empty, and neighbours that touch differ in their place.

use std::collections::BTreeMap;
use std::ops::Range;

use super::REGION_SECTORS;
use super::entry::{Extent, Place};
use crate::units::SectorRange;

#[derive(Clone, Copy)]
struct Run {
    /// One past its last region.
    end: u64,
    place: Place,
}

/// Which regions are wholly zeros of one record, by region number.
#[derive(Default)]
pub(super) struct Runs {
    by_first: BTreeMap<u64, Run>,
    regions: u64,
    regions_dirty: u64,
}

impl Runs {
    /// How many runs there are.
    pub fn len(&self) -> usize {
        self.by_first.len()
    }

    /// How many regions they cover.
    pub fn regions(&self) -> u64 {
        self.regions
    }

    /// How many of those are dirty.
    pub fn regions_dirty(&self) -> u64 {
        self.regions_dirty
    }

    /// Bytes on the heap, near enough: a B-tree's nodes are two thirds full.
    pub fn memory_bytes(&self) -> u64 {
        (self.len() * size_of::<(u64, Run)>() * 3 / 2) as u64
    }

    /// The place of the zeros that cover `region`.
    pub fn get(&self, region: u64) -> Option<Place> {
        let (_, run) = self.by_first.range(..=region).next_back()?;
        (region < run.end).then_some(run.place)
    }

    /// The runs inside `regions`, clipped, ascending.
    pub fn within(&self, regions: Range<u64>) -> impl Iterator<Item = (Range<u64>, Place)> {
        let first = match self.by_first.range(..=regions.start).next_back() {
            Some((&first, run)) if run.end > regions.start => first,
            _ => regions.start,
        };
        self.by_first
            .range(first..)
            .map(|(&first, run)| (first, run.end, run.place))
            .take_while({
                let end = regions.end;
                move |&(first, ..)| first < end
            })
            .map(move |(first, end, place)| (first.max(regions.start)..end.min(regions.end), place))
    }

    /// Makes `regions`, which must not be empty, zeros of one record, whatever they were before.
    pub fn set(&mut self, regions: Range<u64>, place: Place) {
        debug_assert!(place.zero && !regions.is_empty());
        self.unset(regions.clone());
        self.count(&regions, place, 1);
        let Range { mut start, mut end } = regions;
        if let Some((&first, run)) = self.by_first.range(..start).next_back()
            && run.end == start
            && run.place == place
        {
            start = first;
        }
        if let Some(run) = self.by_first.get(&end)
            && run.place == place
        {
            let run_end = run.end;
            self.by_first.remove(&end);
            end = run_end;
        }
        self.by_first.insert(start, Run { end, place });
    }

    /// Takes `regions` out of all runs.
    pub fn unset(&mut self, regions: Range<u64>) {
        let Range { start, end } = regions;
        while let Some((&first, &run)) = self.by_first.range(..end).next_back() {
            if run.end <= start {
                break;
            }
            self.count(&(first.max(start)..run.end.min(end)), run.place, -1);
            self.by_first.remove(&first);
            if run.end > end {
                self.by_first.insert(end, run);
            }
            if first < start {
                self.by_first.insert(first, Run { end: start, place: run.place });
                break;
            }
        }
    }

    fn count(&mut self, regions: &Range<u64>, place: Place, sign: i64) {
        let regions = (regions.end - regions.start) as i64 * sign;
        self.regions = self.regions.wrapping_add_signed(regions);
        if place.dirty {
            self.regions_dirty = self.regions_dirty.wrapping_add_signed(regions);
        }
    }
}

/// The extent of whole regions at one place.
pub(super) fn extent_of(regions: Range<u64>, place: Place) -> Extent {
    Extent {
        range: SectorRange {
            start: regions.start * REGION_SECTORS,
            len: (regions.end - regions.start) * REGION_SECTORS,
        },
        place,
    }
}
