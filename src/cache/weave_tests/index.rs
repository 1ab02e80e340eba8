//! One index under several threads, every lock and counter of it a place to lose the turn.

use std::sync::Arc;

use super::{pause, weave};
use crate::cache::index::{Extent, Index, Place, REGION_SECTORS};
use crate::sim::Rng;
use crate::sync::thread;
use crate::units::SectorRange;

/// Bits of a data position that repeat the sector, so that any reader can tell a wrong mapping.
const SECTOR_BITS: u32 = 20;

fn data(sector: u64, version: u64) -> Place {
    Place { position: version << SECTOR_BITS | sector, zero: false, dirty: true }
}

fn zeros(position: u64) -> Place {
    Place { position, zero: true, dirty: true }
}

fn extent(start: u64, len: u64, place: Place) -> Extent {
    Extent { range: SectorRange::new(start, len), place }
}

fn assert_is_sane(extents: &[Extent]) {
    let mut end = 0;
    for extent in extents {
        assert!(extent.range.start >= end, "ascending and disjoint: {extents:?}");
        end = extent.range.end();
        if !extent.place.zero {
            assert_eq!(extent.place.position % (1 << SECTOR_BITS), extent.range.start, "{extent:?}");
        }
    }
}

/// Two writers of regions of their own and a third of the whole range, a mover and a cleaner: what
/// each of them is told it took is, all together, exactly what was there.
#[test]
fn every_mapping_is_taken_exactly_once_by_whoever_replaces_it() {
    const REGIONS: u64 = 3;
    weave(40, || {
        let index = Arc::new(Index::new(2));
        let threads: Vec<_> = (0..3)
            .map(|me| {
                let index = index.clone();
                thread::spawn(move || {
                    let mut rng = Rng::new(me);
                    let (mut put, mut taken) = (0u64, Vec::new());
                    for round in 0..4 {
                        let start = rng.below(REGIONS * REGION_SECTORS - 64);
                        let len = rng.between(1, 64).min(REGION_SECTORS - start % REGION_SECTORS);
                        let version = 1 + me + 3 * round;
                        match rng.below(4) {
                            0 => index.remove(SectorRange::new(start, len), &mut taken),
                            1 => {
                                index.insert(extent(0, REGIONS * REGION_SECTORS, zeros(version)), &mut taken);
                                put += REGIONS * REGION_SECTORS;
                            }
                            _ => {
                                index.insert(extent(start, len, data(start, version)), &mut taken);
                                put += len;
                            }
                        }
                    }
                    assert!(taken.iter().all(|e| e.range.len > 0));
                    (put, taken.iter().map(|e| e.range.len).sum::<u64>())
                })
            })
            .collect();
        let (mut put, mut taken) = (0, 0);
        for thread in threads {
            let (p, t) = thread.join().unwrap();
            (put, taken) = (put + p, taken + t);
        }
        let mut left = Vec::new();
        index.for_each(|e| left.push(e));
        assert_is_sane(&left);
        let mapped: u64 = left.iter().map(|e| e.range.len).sum();
        assert_eq!(mapped + taken, put, "what was put is there or was taken once");
        assert_eq!(index.mapped_sectors(), mapped);
        assert_eq!(index.dirty_sectors(), mapped, "nothing here is clean");
    });
}

/// A region goes back and forth between entries and a run of zeros, and is dirty all the time.
/// Relaxed write-back moves the tail on the word of `dirty_from`: missing it once would lose data.
#[test]
fn a_dirty_sector_is_never_overlooked_while_its_region_changes_its_form() {
    const REGIONS: u64 = 3;
    weave(40, || {
        let index = Arc::new(Index::new(2));
        let whole = extent(0, REGIONS * REGION_SECTORS, zeros(1));
        index.insert(whole, &mut Vec::new());
        let writers: Vec<_> = (0..2)
            .map(|me| {
                let index = index.clone();
                thread::spawn(move || {
                    let mut rng = Rng::new(me);
                    for version in 1..5 {
                        let region = rng.below(REGIONS) * REGION_SECTORS;
                        match rng.below(4) {
                            0 => index.insert(whole, &mut Vec::new()),
                            1 => {
                                index.insert(extent(region, REGION_SECTORS, zeros(version)), &mut Vec::new());
                            }
                            _ => {
                                let at = region + rng.below(REGION_SECTORS - 8);
                                index.insert(extent(at, 8, data(at, version)), &mut Vec::new());
                            }
                        }
                    }
                })
            })
            .collect();
        for _ in 0..3 {
            let (mut found, mut from) = (Vec::new(), Some(0));
            while let Some(sector) = from {
                from = index.dirty_from(sector, 3, &mut found);
            }
            assert_is_sane(&found);
            let sectors: u64 = found.iter().map(|e| e.range.len).sum();
            assert_eq!(sectors, whole.range.len, "all of it is dirty: {found:?}");
            assert_eq!(index.dirty_sectors(), whole.range.len, "the sum never dips");
        }
        writers.into_iter().for_each(|t| t.join().unwrap());
    });
}

/// What a hit is read by: inside one region a lookup sees all of a commit or nothing of it.
#[test]
fn a_lookup_sees_a_whole_commit_or_none_of_it_while_blocks_move_and_turn_clean() {
    const START: u64 = REGION_SECTORS + 96;
    weave(40, || {
        let index = Arc::new(Index::new(2));
        let range = SectorRange::new(START, 16);
        index.insert(Extent { range, place: data(START, 0) }, &mut Vec::new());
        let (i, writer) = (index.clone(), index.clone());
        let writer = thread::spawn(move || {
            for version in 1..4 {
                writer.insert(Extent { range, place: data(START, version) }, &mut Vec::new());
                pause();
            }
        });
        let worker = thread::spawn(move || {
            for version in 0..4 {
                let mut moved = Vec::new();
                let old = Extent { range, place: data(START, version) };
                i.mark_clean_if(old, true);
                // Relocation: the same sectors elsewhere, under a version no writer uses.
                i.move_if(old, data(START, version + 100).position, &mut moved);
                assert_is_sane(&moved);
            }
        });
        for _ in 0..6 {
            let mut found = Vec::new();
            index.lookup(range, &mut found);
            assert_is_sane(&found);
            assert_eq!(found.len(), 1, "one version, all of it: {found:?}");
            assert_eq!(found[0].range, range);
        }
        writer.join().unwrap();
        worker.join().unwrap();
    });
}
