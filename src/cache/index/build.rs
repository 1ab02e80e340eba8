//! Whole regions from many extents at once: what recovery makes the index of.
//!
//! Inserting one extent after the other in version order costs, for each, a lock, a search, a move of
//! the array's tail and now and then a new array, all of it in cold memory. Sorted by where they lie,
//! the extents of a region *are* its array, but for those that overlap: these few are put in order of
//! version and inserted one after the other, by the same code as ever, into a region of their own.
//!
//! Invariants:
//! - the end is the same, bit by bit, as that of insertion in ascending order of rank, and of
//!   [precedence](Entry::precedence) where ranks are equal;
//! - what loses is named exactly, once for each time it loses, and is never what is then mapped;
//! - a region's whole content changes in one step under its shard's lock.

use super::directory::State;
use super::edit::Insert;
use super::entry::{Entry, Extent};
use super::region::{Change, Region, Window, push_entry};
use super::table::Table;
use super::{Index, REGION_SECTORS, spans};
use crate::mutant::{Mutant, mutated};

/// A part of an extent, in one region, on its way into the index.
#[derive(Clone, Copy)]
pub(crate) struct Fragment {
    /// The sector it begins at: fragments are sorted by it.
    start: u64,
    /// Of two for one sector the one of the higher rank counts.
    rank: u64,
    entry: Entry,
}

impl Fragment {
    /// The parts of an extent by region, ascending.
    pub fn split(extent: Extent, rank: u64) -> impl Iterator<Item = Fragment> {
        extent.check();
        spans(extent.range).map(move |(region, window)| {
            let range = window.range(region * REGION_SECTORS);
            let entry = Entry::new(window.start, window.end - window.start, extent.place_at(range.start));
            Fragment { start: range.start, rank, entry }
        })
    }

    /// The region it lies in.
    pub fn region(&self) -> u64 {
        self.start / REGION_SECTORS
    }
}

/// Room that building reuses.
#[derive(Default)]
struct Scratch {
    entries: Vec<Entry>,
    edited: Vec<Entry>,
}

impl Index {
    /// How many shards there are.
    pub(crate) fn shard_count(&self) -> usize {
        self.shards.len()
    }

    /// The shard of a region.
    pub(crate) fn shard_of(&self, region: u64) -> usize {
        region as usize & (self.shards.len() - 1)
    }

    /// Sorts fragments as [`Index::build`] wants them.
    pub(crate) fn sort(fragments: &mut [Fragment]) {
        fragments.sort_unstable_by_key(|f| f.start);
    }

    /// Makes the regions of `fragments`, all of one shard and sorted, hold exactly these, the highest
    /// rank winning; appends to `replaced` what loses. What these regions held before must be zeros,
    /// and goes.
    pub(crate) fn build(&self, shard: usize, fragments: &mut [Fragment], replaced: &mut Vec<Extent>) {
        let mut table = self.shards[shard].write();
        let mut scratch = Scratch::default();
        for fragments in fragments.chunk_by_mut(|a, b| a.region() == b.region()) {
            let region = fragments[0].region();
            debug_assert_eq!(self.shard_of(region), shard);
            scratch.entries.clear();
            lay_out(fragments, &mut scratch, replaced);
            self.install(&mut table, region, Region::of(&scratch.entries));
        }
    }

    /// Puts a region where it belongs, in the place of what was there.
    fn install(&self, table: &mut Table, region: u64, new: Region) {
        let (_, slot) = table.slot(region);
        let is_in_table = slot.is_some();
        let (from, before) = match slot {
            Some(old) => (old.state(), old.totals()),
            None => match self.directory.run_at(region) {
                Some(place) => (State::Run(place), Region::whole(place).totals()),
                None => (State::Vacant, Change::default()),
            },
        };
        let (to, after) = (new.state(), new.totals());
        self.shard(region).sums.add(Change {
            // The entry of a region in a run counts as none of the table's.
            extents: after.extents - i64::from(to.is_run()) - (before.extents - i64::from(from.is_run())),
            mapped: after.mapped - before.mapped,
            dirty: after.dirty - before.dirty,
            heap: if matches!(to, State::Table { .. }) { after.heap } else { 0 } - before.heap,
        });
        match to {
            State::Table { .. } => table.insert(region, new),
            State::Vacant | State::Run(_) if is_in_table => table.remove(region),
            State::Vacant | State::Run(_) => {}
        }
        self.directory.settle(region, from, to);
    }
}

/// Writes the entries of one region, whose fragments are sorted.
fn lay_out(fragments: &mut [Fragment], scratch: &mut Scratch, replaced: &mut Vec<Extent>) {
    let mut first = 0;
    while first < fragments.len() {
        let (mut next, mut end) = (first + 1, fragments[first].entry.end());
        while next < fragments.len() && fragments[next].entry.start() < end {
            end = end.max(fragments[next].entry.end());
            next += 1;
        }
        match &mut fragments[first..next] {
            [alone] => push_entry(&mut scratch.entries, alone.entry),
            rivals => contest(rivals, scratch, replaced),
        }
        first = next;
    }
}

/// Writes what is left of fragments that overlap.
fn contest(rivals: &mut [Fragment], scratch: &mut Scratch, replaced: &mut Vec<Extent>) {
    let rank = |f: &Fragment| if mutated(Mutant::RivalsByPlace) { 0 } else { f.rank };
    rivals.sort_unstable_by_key(|f| (rank(f), f.entry.precedence()));
    let base = rivals[0].region() * REGION_SECTORS;
    let [losers @ .., winner] = &*rivals else { return };
    let covers =
        |f: &Fragment| winner.entry.start() <= f.entry.start() && f.entry.end() <= winner.entry.end();
    if losers.iter().all(covers) {
        // The usual case: the same blocks were written again.
        push_entry(&mut scratch.entries, winner.entry);
        replaced.extend(losers.iter().map(|f| f.entry.extent(base)));
        return;
    }
    let mut region = Region::EMPTY;
    for rival in &*rivals {
        let window = Window { start: rival.entry.start(), end: rival.entry.end() };
        let floor = replaced.len();
        let mut insert = Insert { extent: rival.entry.extent(base), floor, replaced };
        region.edit(base, window, &mut insert, &mut scratch.edited);
    }
    region.entries().iter().for_each(|&entry| push_entry(&mut scratch.entries, entry));
}
