//! What the index promises, against a model that is an array with a place for each sector.

mod build;
mod concurrency;
mod footprint;
mod model;

use super::*;

/// xorshift64*: enough randomness for a test, and the same on every machine.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn shuffled(&mut self, count: u64) -> Vec<u64> {
        let mut all: Vec<u64> = (0..count).collect();
        for i in (1..all.len()).rev() {
            all.swap(i, self.below(i as u64 + 1) as usize);
        }
        all
    }
}

fn data(position: u64) -> Place {
    Place { position, zero: false, dirty: false }
}

fn dirty(position: u64) -> Place {
    Place { position, zero: false, dirty: true }
}

fn zeros(position: u64) -> Place {
    Place { position, zero: true, dirty: true }
}

fn extent(start: u64, len: u64, place: Place) -> Extent {
    Extent { range: SectorRange::new(start, len), place }
}

fn all(index: &Index) -> Vec<Extent> {
    let mut all = Vec::new();
    index.for_each(|extent| all.push(extent));
    all
}

fn lookup(index: &Index, start: u64, len: u64) -> Vec<Extent> {
    let mut found = Vec::new();
    index.lookup(SectorRange::new(start, len), &mut found);
    found
}

#[test]
fn the_newest_insertion_wins_and_what_it_took_is_named() {
    let index = Index::new(4);
    let mut replaced = Vec::new();
    index.insert(extent(100, 100, dirty(5000)), &mut replaced);
    assert_eq!(replaced, []);
    index.insert(extent(150, 10, data(9000)), &mut replaced);
    assert_eq!(replaced, [extent(150, 10, dirty(5050))]);
    assert_eq!(
        lookup(&index, 0, 2048),
        [extent(100, 50, dirty(5000)), extent(150, 10, data(9000)), extent(160, 40, dirty(5060))]
    );
    assert_eq!((index.extents(), index.mapped_sectors(), index.dirty_sectors()), (3, 100, 90));
}

#[test]
fn a_sequential_stream_is_one_entry_per_region_and_one_extent_to_a_reader() {
    let index = Index::new(4);
    for i in 0..1024 {
        index.insert(extent(8 * i, 8, dirty(100_000 + 8 * i)), &mut Vec::new());
    }
    assert_eq!(index.extents(), 4);
    assert_eq!(lookup(&index, 1000, 5000), [extent(1000, 5000, dirty(101_000))]);
}

#[test]
fn a_fill_goes_only_where_nothing_is() {
    let index = Index::new(4);
    index.insert(extent(2040, 16, dirty(77)), &mut Vec::new());
    let mut inserted = Vec::new();
    index.insert_gaps(extent(2000, 100, data(500)), &mut inserted);
    assert_eq!(inserted, [extent(2000, 40, data(500)), extent(2056, 44, data(556))]);
    assert_eq!(lookup(&index, 2040, 16), [extent(2040, 16, dirty(77))]);
}

#[test]
fn an_eviction_spares_what_was_overwritten() {
    let index = Index::new(4);
    index.insert(extent(0, 64, data(1000)), &mut Vec::new());
    index.insert(extent(16, 8, dirty(2000)), &mut Vec::new());
    let mut removed = Vec::new();
    index.remove_if(extent(0, 64, data(1000)), &mut removed);
    assert_eq!(removed, [extent(0, 16, data(1000)), extent(24, 40, data(1024))]);
    assert_eq!(all(&index), [extent(16, 8, dirty(2000))]);
}

#[test]
fn a_relocation_keeps_dirty_dirty() {
    let index = Index::new(4);
    index.insert(extent(0, 8, dirty(1000)), &mut Vec::new());
    index.insert(extent(8, 8, data(1008)), &mut Vec::new());
    let mut moved = Vec::new();
    index.move_if(extent(0, 16, data(1000)), 8000, &mut moved);
    assert_eq!(moved, [extent(0, 8, dirty(8000)), extent(8, 8, data(8008))]);
    assert_eq!(all(&index), moved);
}

#[test]
fn zeros_may_leave_the_index_once_they_are_on_the_disk() {
    let index = Index::new(4);
    index.insert(extent(0, 64, zeros(7)), &mut Vec::new());
    index.insert(extent(8, 8, dirty(100)), &mut Vec::new());
    assert_eq!(index.mark_clean_if(extent(0, 64, zeros(7)), true), 56);
    assert_eq!(all(&index), [extent(8, 8, dirty(100))]);
    assert_eq!(index.mark_clean_if(extent(8, 8, data(100)), true), 8);
    assert_eq!(index.mark_clean_if(extent(8, 8, data(100)), true), 0, "it is clean already");
    assert_eq!(all(&index), [extent(8, 8, data(100))]);
}

#[test]
fn dirty_extents_come_in_pages() {
    let index = Index::new(4);
    for i in 0..100 {
        let place = if i % 2 == 0 { dirty(10_000 * (i + 1)) } else { data(10_000 * (i + 1)) };
        index.insert(extent(i * 1_000_000, 8, place), &mut Vec::new());
    }
    let (mut found, mut from, mut pages) = (Vec::new(), Some(4), 0);
    while let Some(sector) = from {
        let before = found.len();
        from = index.dirty_from(sector, 7, &mut found);
        assert!(found.len() - before <= 7);
        pages += 1;
    }
    let mut expected: Vec<_> =
        (0..50).map(|i| extent(i * 2_000_000, 8, dirty(10_000 * (2 * i + 1)))).collect();
    expected[0] = extent(4, 4, dirty(10_004));
    assert_eq!(found, expected);
    assert_eq!(pages, 8);
    assert_eq!(index.dirty_from(0, 0, &mut found), Some(0), "no room is not the end");
}

#[test]
fn a_discarded_ten_terabyte_volume_is_one_run() {
    const DISK: u64 = 10 << (40 - 9);
    let index = Index::new(256);
    index.insert(extent(0, DISK, zeros(3)), &mut Vec::new());
    assert_eq!((index.extents(), index.mapped_sectors()), (1, DISK));
    assert!(index.memory_bytes() < 256 << 10, "{}", index.memory_bytes());

    // Writes into it cost what they write, wherever they are.
    let mut random = Random::new(1);
    for i in 0..1000 {
        let sector = random.below(DISK / 8 - 1) * 8 + 3;
        let mut replaced = Vec::new();
        index.insert(extent(sector, 8, dirty(10_000 + 9 * i)), &mut replaced);
        assert_eq!(replaced.iter().map(|part| part.range.len).sum::<u64>(), 8);
    }
    assert_eq!((index.mapped_sectors(), index.dirty_sectors()), (DISK, DISK));
    assert!(index.memory_bytes() < 1 << 20, "{}", index.memory_bytes());

    // Read, written back, discarded again, all as a whole.
    let found = lookup(&index, 0, DISK);
    assert_eq!(found.iter().map(|part| part.range.len).sum::<u64>(), DISK);
    let mapped_as_data = found.iter().filter(|part| !part.place.zero).count();
    assert!(mapped_as_data > 990);
    assert!(index.mark_clean_if(extent(0, DISK, zeros(3)), true) >= DISK - 1000 * 8);
    assert_eq!(lookup(&index, 0, DISK).len(), mapped_as_data);
    let mut replaced = Vec::new();
    index.insert(extent(0, DISK, zeros(4)), &mut replaced);
    assert_eq!(replaced.len(), mapped_as_data);
    assert_eq!(lookup(&index, 0, DISK), [extent(0, DISK, zeros(4))]);
    assert_eq!(index.extents(), 1);
    assert!(index.memory_bytes() < 256 << 10, "it gave back {}", index.memory_bytes());
}

#[test]
fn the_ends_of_the_address_space_work() {
    let index = Index::new(8);
    let last = (1 << 62) - 1;
    index.insert(extent(last, 1, dirty(POSITION_END - 1)), &mut Vec::new());
    index.insert(extent(0, (1 << 62) - 1, zeros(0)), &mut Vec::new());
    assert_eq!(lookup(&index, last, 1), [extent(last, 1, dirty(POSITION_END - 1))]);
    let mut removed = Vec::new();
    index.clear(&mut removed);
    assert_eq!(removed.iter().map(|part| part.range.len).sum::<u64>(), 1 << 62);
    assert_eq!((index.extents(), all(&index).len()), (0, 0));
}

#[test]
#[should_panic(expected = "media position out of range")]
fn a_position_that_would_be_cut_is_refused() {
    Index::new(1).insert(extent(0, 8, data(POSITION_END - 7)), &mut Vec::new());
}

#[test]
fn a_map_gives_back_what_was_put_in_newest_first() {
    let mut map = ExtentMap::new();
    assert!(map.is_empty());
    map.insert(extent(0, 1 << 30, zeros(1)), &mut Vec::new());
    map.insert(extent(5000, 8, dirty(100)), &mut Vec::new());
    let mut replaced = Vec::new();
    map.insert(extent(5004, 8, dirty(200)), &mut replaced);
    assert_eq!(replaced, [extent(5004, 4, dirty(104)), extent(5008, 4, zeros(1))]);
    let mut found = Vec::new();
    map.lookup(SectorRange::new(4999, 6), &mut found);
    assert_eq!(found, [extent(4999, 1, zeros(1)), extent(5000, 4, dirty(100)), extent(5004, 1, dirty(200))]);
    let stored: Vec<_> = map.iter().collect();
    assert_eq!(stored[2..4], [extent(5000, 4, dirty(100)), extent(5004, 8, dirty(200))]);
    assert_eq!(stored.iter().map(|part| part.range.len).sum::<u64>(), 1 << 30);
}
