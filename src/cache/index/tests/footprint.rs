//! What a cached block costs in RAM.

use super::*;

/// Random writes of `len` sectors over `disk` sectors, shifted by `shift`, each to the next place
/// in a log. Returns bytes per extent at the fills given in eighths.
fn cost(disk: u64, len: u64, shift: u64, eighths: &[u64]) -> Vec<f64> {
    let index = Index::new(256);
    let order = Random::new(42).shuffled(disk / len);
    let mut costs = Vec::new();
    for (written, block) in order.into_iter().enumerate() {
        // A log never gives neighbours to a second writer, or joining would flatter the figure.
        let position = written as u64 * (len + 1);
        index.insert(extent(block * len + shift, len, dirty(position)), &mut Vec::new());
        let written = written as u64 + 1;
        if eighths.iter().any(|eighth| written == disk / len * eighth / 8) {
            costs.push(index.memory_bytes() as f64 / written as f64);
        }
    }
    costs
}

#[test]
fn a_random_4_kib_block_costs_at_most_12_bytes_aligned_or_not() {
    const DISK: u64 = 2 << (30 - 9);
    for shift in [0, 7] {
        let costs = cost(DISK, 8, shift, &[1, 2, 4, 6, 8]);
        println!("4 KiB blocks, shifted by {shift} sectors: {costs:.2?} bytes each at 1/8, 1/4, 1/2, 3/4, 1");
        assert!(costs.iter().all(|&cost| cost <= 12.0), "{costs:?}");
    }
}

#[test]
fn a_random_sector_costs_at_most_10_bytes() {
    let costs = cost(256 << (20 - 9), 1, 0, &[1, 4, 8]);
    println!("512-byte sectors: {costs:.2?} bytes each at 1/8, 1/2, 1");
    assert!(costs.iter().all(|&cost| cost <= 10.0), "{costs:?}");
}

#[test]
fn an_emptied_index_gives_its_memory_back() {
    let index = Index::new(16);
    let empty = index.memory_bytes();
    let blocks = Random::new(7).shuffled(1 << 15);
    for &block in &blocks {
        index.insert(extent(block * 16, 8, dirty(block * 8)), &mut Vec::new());
    }
    let full = index.memory_bytes();
    for &block in &blocks[..1 << 14] {
        index.remove(SectorRange::new(block * 16, 8), &mut Vec::new());
    }
    let half = index.memory_bytes();
    for &block in &blocks[1 << 14..] {
        index.remove(SectorRange::new(block * 16, 8), &mut Vec::new());
    }
    assert!(half < full * 2 / 3, "half of it needs {half} of {full} bytes");
    let left = index.memory_bytes() - empty;
    assert!(left < full / 8, "{left} of {full} bytes are left");
}

#[test]
fn scattered_blocks_cost_a_table_slot_each_and_give_it_back() {
    const BLOCKS: u64 = 100_000;
    let index = Index::new(256);
    let empty = index.memory_bytes();
    let mut random = Random::new(3);
    let sectors: Vec<u64> = (0..BLOCKS).map(|_| random.below(1 << 48)).collect();
    for (i, &sector) in sectors.iter().enumerate() {
        index.insert(extent(sector, 1, dirty(2 * i as u64)), &mut Vec::new());
    }
    let cost = (index.memory_bytes() - empty) as f64 / BLOCKS as f64;
    println!("one extent in each of {BLOCKS} far regions: {cost:.1} bytes each");
    assert!(cost < 128.0, "{cost}");
    for sector in sectors {
        index.remove(SectorRange::new(sector, 1), &mut Vec::new());
    }
    let left = (index.memory_bytes() - empty) as f64 / BLOCKS as f64;
    assert!(left < cost / 8.0, "{left} bytes each are left");
}
