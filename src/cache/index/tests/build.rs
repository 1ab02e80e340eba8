//! Building whole regions against inserting one extent after the other.

use super::*;
use crate::cache::index::Fragment;

const SECTORS: u64 = 12 * REGION_SECTORS;

/// Extents as recovery may find them, each with a rank: blocks written again and again, ragged ones, and
/// zeros that go over a region's border. Payload of its own for each.
fn random_keys(random: &mut Random, count: u64) -> Vec<(u64, Extent)> {
    let mut keys = Vec::new();
    for rank in 0..count {
        let start = random.below(SECTORS - REGION_SECTORS);
        let (start, len) = match random.below(8) {
            0..5 => (start / 8 * 8, 8),
            5 => (start, 1 + random.below(40)),
            6 => (start, 1 + random.below(512)),
            _ => (start / REGION_SECTORS * REGION_SECTORS, REGION_SECTORS),
        };
        let position = 1_000_000 + rank * 600;
        let zero = random.chance(5) || len == REGION_SECTORS;
        keys.push((rank, extent(start, len, Place { position, zero, dirty: zero || random.chance(40) })));
    }
    keys
}

/// How often each sector of payload is named.
fn payload_of(extents: &[Extent]) -> Vec<u64> {
    let data = extents.iter().filter(|e| !e.place.zero);
    let mut sectors: Vec<u64> = data.flat_map(|e| e.place.position..e.place.position + e.range.len).collect();
    sectors.sort_unstable();
    sectors
}

fn build(index: &Index, keys: &[(u64, Extent)]) -> Vec<Extent> {
    let mut replaced = Vec::new();
    let fragments: Vec<Fragment> = keys.iter().flat_map(|&(rank, e)| Fragment::split(e, rank)).collect();
    for shard in 0..index.shard_count() {
        let of_shard = |f: &&Fragment| index.shard_of(f.region()) == shard;
        let mut fragments: Vec<Fragment> = fragments.iter().filter(of_shard).copied().collect();
        Index::sort(&mut fragments);
        index.build(shard, &mut fragments, &mut replaced);
    }
    replaced
}

#[test]
fn building_comes_to_what_inserting_in_order_of_rank_comes_to() {
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let count = 1 + random.below(400);
        let mut keys = random_keys(&mut random, count);
        let (inserted, mut lost) = (Index::new(4), Vec::new());
        for (_, key) in &keys {
            inserted.insert(*key, &mut lost);
        }
        // Found in any order.
        for at in (1..keys.len()).rev() {
            keys.swap(at, random.below(at as u64 + 1) as usize);
        }
        let built = Index::new(4);
        let replaced = build(&built, &keys);
        assert_eq!(all(&built), all(&inserted), "seed {seed}");
        assert_eq!(payload_of(&replaced), payload_of(&lost), "seed {seed}");
        let sums = |index: &Index| (index.extents(), index.mapped_sectors(), index.dirty_sectors());
        assert_eq!(sums(&built), sums(&inserted), "seed {seed}");
        // It is an index like any other, also by its own account of the regions' state and bytes.
        let mut removed = Vec::new();
        built.clear(&mut removed);
        assert_eq!(payload_of(&removed).len() + payload_of(&replaced).len(), payload_of_keys(&keys));
        assert_eq!((sums(&built), all(&built).len()), ((0, 0, 0), 0), "seed {seed}");
        assert_eq!(built.shards.iter().map(|s| s.sums.heap()).sum::<u64>(), 0, "seed {seed}");
    }
}

fn payload_of_keys(keys: &[(u64, Extent)]) -> usize {
    keys.iter().filter(|(_, e)| !e.place.zero).map(|(_, e)| e.range.len as usize).sum()
}

#[test]
fn what_is_built_takes_the_place_of_zeros_in_a_run() {
    let index = Index::new(4);
    index.insert(extent(0, 8 * REGION_SECTORS, zeros(3)), &mut Vec::new());
    let part = extent(2 * REGION_SECTORS, REGION_SECTORS, zeros(3));
    let block = extent(2 * REGION_SECTORS + 64, 8, dirty(5000));
    assert_eq!(build(&index, &[(1, part), (2, block)]), [extent(block.range.start, 8, zeros(3))]);
    assert_eq!((index.extents(), index.mapped_sectors()), (5, 8 * REGION_SECTORS));
    assert_eq!(lookup(&index, block.range.start, 8), [block]);
    // And back: the newer zeros make the region a run's again.
    assert_eq!(build(&index, &[(3, part), (2, block)]), [block]);
    assert_eq!((index.extents(), index.mapped_sectors()), (1, 8 * REGION_SECTORS));
}

#[test]
fn of_one_version_the_higher_payload_counts_and_a_loss_before_any() {
    let (low, high) = (extent(0, 8, dirty(1000)), extent(0, 8, dirty(2000)));
    let index = Index::new(1);
    assert_eq!(build(&index, &[(7, high), (7, low)]), [low]);
    assert_eq!(all(&index), [high]);
    let lost = extent(4, 4, Place::LOST);
    let index = Index::new(1);
    assert_eq!(build(&index, &[(7, lost), (7, high)]), [extent(4, 4, dirty(2004))]);
    assert_eq!(all(&index), [extent(0, 4, dirty(2000)), lost]);
}
