//! What holds while several threads use one index.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::*;

/// Bits of a data position that repeat the sector, so that any reader can tell a wrong mapping.
const SECTOR_BITS: u32 = 20;

/// Ends the readers when the writers are through, be it by a failed assertion.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn place_of(sector: u64, version: u64) -> Place {
    dirty((version % 1000) << SECTOR_BITS | sector)
}

fn assert_is_sane(extents: &[Extent]) {
    let mut end = 0;
    for extent in extents {
        assert!(extent.range.start >= end, "ascending and disjoint: {extents:?}");
        end = extent.range.end();
        if !extent.place.zero {
            let sector = extent.place.position % (1 << SECTOR_BITS);
            assert_eq!(sector, extent.range.start, "{extent:?}");
        }
    }
}

#[test]
fn writers_of_disjoint_stripes_see_exactly_their_own_writes() {
    const WRITERS: u64 = 4;
    const REGIONS: u64 = 64;
    let index = Index::new(8);
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = |seed| {
            let (index, is_over) = (&index, &is_over);
            move || {
                let mut random = Random::new(seed);
                while !is_over.load(Ordering::Relaxed) {
                    let mut found = Vec::new();
                    let start = random.below(REGIONS * REGION_SECTORS);
                    index.lookup(SectorRange::new(start, 1 + random.below(40_000)), &mut found);
                    assert_is_sane(&found);
                    found.clear();
                    index.dirty_from(start, 100, &mut found);
                    assert_is_sane(&found);
                    assert_is_sane(&all(index));
                }
            }
        };
        scope.spawn(reader(1));
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let index = &index;
                scope.spawn(move || {
                    let mut random = Random::new(writer + 10);
                    let mut versions = vec![None; (REGIONS * REGION_SECTORS) as usize];
                    for version in 1..20_000 {
                        let region = random.below(REGIONS / WRITERS) * WRITERS + writer;
                        let start = random.below(REGION_SECTORS);
                        let len = (1 + random.below(24)).min(REGION_SECTORS - start);
                        let range = SectorRange::new(region * REGION_SECTORS + start, len);
                        let sectors = range.start as usize..range.end() as usize;
                        let mut old = Vec::new();
                        match random.below(8) {
                            0 => index.remove(range, &mut old),
                            _ => {
                                let place = place_of(range.start, version);
                                index.insert(Extent { range, place }, &mut old);
                            }
                        }
                        let old: Vec<_> = old
                            .iter()
                            .flat_map(|part| (0..part.range.len).map(|i| part.place.advanced(i).position))
                            .collect();
                        let expected: Vec<u64> =
                            versions[sectors.clone()].iter().flatten().copied().collect();
                        assert_eq!(old, expected, "writer {writer}, version {version}");
                        let mut found = Vec::new();
                        index.lookup(range, &mut found);
                        assert!(found.len() <= 1, "{found:?}");
                        for sector in sectors {
                            versions[sector] =
                                found.first().map(|extent| extent.place_at(sector as u64).position);
                        }
                    }
                })
            })
            .collect();
        let _over = Over(&is_over);
        for writer in writers {
            writer.join().unwrap();
        }
    });
    assert_is_sane(&all(&index));
}

/// A region goes back and forth between a table and a run, and is dirty all the time. Relaxed
/// write-back moves the tail on the word of `dirty_from`, so missing it once would lose data.
#[test]
fn a_dirty_sector_is_never_overlooked_while_its_region_changes_its_form() {
    const REGIONS: u64 = 6;
    let index = Index::new(2);
    let whole = extent(0, REGIONS * REGION_SECTORS, zeros(1));
    index.insert(whole, &mut Vec::new());
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let _over = Over(&is_over);
            let mut random = Random::new(5);
            for _ in 0..30_000 {
                let region = random.below(REGIONS);
                let start = region * REGION_SECTORS;
                match random.below(5) {
                    0 => index.insert(whole, &mut Vec::new()),
                    1 => index.insert(extent(start, REGION_SECTORS, zeros(1)), &mut Vec::new()),
                    2 => index.insert(extent(start, REGION_SECTORS, zeros(2)), &mut Vec::new()),
                    _ => {
                        let sector = start + random.below(REGION_SECTORS - 8);
                        index.insert(extent(sector, 8, place_of(sector, 1)), &mut Vec::new());
                    }
                }
            }
        });
        while !is_over.load(Ordering::Relaxed) {
            let (mut found, mut from) = (Vec::new(), Some(0));
            while let Some(sector) = from {
                from = index.dirty_from(sector, 3, &mut found);
            }
            assert_is_sane(&found);
            let sectors: u64 = found.iter().map(|extent| extent.range.len).sum();
            assert_eq!(sectors, whole.range.len, "all of it is dirty: {found:?}");
            assert_eq!(index.dirty_sectors(), whole.range.len, "the sum never dips");
        }
        writer.join().unwrap();
    });
}
