//! Does the index keep out of the way of a 4 KiB hit?
//!
//! The budget of a hit is the copy of 4 KiB out of persistent memory, a microsecond or so; finding
//! it should cost a tenth of that with 64 GiB of random 4 KiB blocks in the index, far more than any
//! CPU cache holds. Each figure stands next to the same work on a `BTreeMap` under one `RwLock`, and
//! prefetching by batches next to not doing it.
//!
//! `cargo bench --bench index`. It needs about 1.5 GiB of RAM. Without `--bench`, as in
//! `cargo test --benches`, it runs once over a small index, to see that it runs.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::RwLock;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use pcache_vhost::cache::index::{Extent, Index, Place};
use pcache_vhost::units::SectorRange;

const BLOCK: u64 = 8;
const SHARDS: usize = 256;
/// Lookups in one measured batch, so that the cost of reading the clock is out of the figure.
const BATCH: u64 = 1024;

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((u128::from(self.0) * u128::from(end)) >> 64) as u64
    }
}

fn blocks() -> u64 {
    if std::env::args().any(|arg| arg == "--bench") { 1 << 24 } else { 1 << 14 }
}

fn shuffled(count: u64) -> Vec<u32> {
    let mut all: Vec<u32> = (0..count as u32).collect();
    let mut random = Random(42);
    for i in (1..all.len()).rev() {
        all.swap(i, random.below(i as u64 + 1) as usize);
    }
    all
}

fn block_at(block: u64, position: u64) -> Extent {
    Extent {
        range: SectorRange::new(block * BLOCK, BLOCK),
        place: Place { position, zero: false, dirty: block.is_multiple_of(16) },
    }
}

/// An index that took `blocks` random writes, each to the next place of a log.
fn filled(order: &[u32]) -> Index {
    let (index, mut replaced) = (Index::new(SHARDS), Vec::new());
    for (position, &block) in order.iter().enumerate() {
        index.insert(block_at(u64::from(block), position as u64 * (BLOCK + 1)), &mut replaced);
    }
    assert!(replaced.is_empty());
    index
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4096
}

fn lookups(c: &mut Criterion) {
    let blocks = blocks();
    let order = shuffled(blocks);
    let resident = resident_bytes();
    let index = filled(&order);
    println!(
        "{blocks} random 4 KiB blocks: {:.2} bytes each by its own account, {:.2} resident",
        index.memory_bytes() as f64 / blocks as f64,
        (resident_bytes() - resident) as f64 / blocks as f64,
    );

    let mut group = c.benchmark_group("lookup of a random 4 KiB block");
    group.throughput(Throughput::Elements(BATCH));
    let (mut random, mut found) = (Random(1), Vec::new());
    group.bench_function("index", |b| {
        b.iter(|| {
            for _ in 0..BATCH {
                found.clear();
                index.lookup(SectorRange::new(random.below(blocks) * BLOCK, BLOCK), &mut found);
                black_box(&found);
            }
        })
    });
    group.bench_function("index, prefetched by 32", |b| {
        b.iter(|| {
            for _ in 0..BATCH / 32 {
                let sectors: [u64; 32] = std::array::from_fn(|_| random.below(blocks) * BLOCK);
                sectors.iter().for_each(|&sector| index.prefetch(sector));
                for sector in sectors {
                    found.clear();
                    index.lookup(SectorRange::new(sector, BLOCK), &mut found);
                    black_box(&found);
                }
            }
        })
    });
    let tree: BTreeMap<u64, Extent> =
        (0..blocks).map(|block| (block * BLOCK, block_at(block, block * (BLOCK + 1)))).collect();
    let tree = RwLock::new(tree);
    group.bench_function("BTreeMap", |b| {
        b.iter(|| {
            for _ in 0..BATCH {
                found.clear();
                let sector = random.below(blocks) * BLOCK;
                let tree = tree.read().expect("nobody panics");
                let before = tree.range(..sector + BLOCK).next_back();
                found.extend(before.map(|(_, extent)| *extent));
                black_box(&found);
            }
        })
    });
    group.finish();
    drop(tree);

    let mut group = c.benchmark_group("overwrite of a random 4 KiB block");
    group.throughput(Throughput::Elements(BATCH));
    let mut position = blocks * (BLOCK + 1);
    group.bench_function("index", |b| {
        b.iter(|| {
            for _ in 0..BATCH {
                found.clear();
                position += BLOCK + 1;
                index.insert(block_at(random.below(blocks), position), &mut found);
                black_box(&found);
            }
        })
    });
    group.bench_function("index, prefetched by 16", |b| {
        b.iter(|| {
            for _ in 0..BATCH / 16 {
                let batch: [u64; 16] = std::array::from_fn(|_| random.below(blocks));
                batch.iter().for_each(|block| index.prefetch(block * BLOCK));
                for block in batch {
                    found.clear();
                    position += BLOCK + 1;
                    index.insert(block_at(block, position), &mut found);
                    black_box(&found);
                }
            }
        })
    });
    group.finish();

    let mut group = c.benchmark_group("relaxed write-back's walk, 1 block in 16 dirty");
    group.throughput(Throughput::Elements(blocks / 16));
    group.sample_size(10);
    group.bench_function("dirty_from", |b| {
        b.iter(|| {
            let (mut from, mut count) = (Some(0), 0);
            while let Some(sector) = from {
                found.clear();
                from = index.dirty_from(sector, 1024, &mut found);
                count += found.len() as u64;
            }
            assert_eq!(count, blocks / 16);
        })
    });
    group.finish();
}

fn inserts(c: &mut Criterion) {
    let blocks = blocks() / 16;
    let order = shuffled(blocks);
    let mut group = c.benchmark_group("filling an empty index");
    group.throughput(Throughput::Elements(blocks));
    group.sample_size(10);
    group.bench_function("index, random 4 KiB", |b| b.iter_with_large_drop(|| filled(&order)));
    group.bench_function("BTreeMap, random 4 KiB", |b| {
        b.iter_with_large_drop(|| {
            let tree = RwLock::new(BTreeMap::new());
            for (position, &block) in order.iter().enumerate() {
                let extent = block_at(u64::from(block), position as u64 * BLOCK);
                tree.write().expect("nobody panics").insert(extent.range.start, extent);
            }
            tree
        })
    });
    group.bench_function("index, sequential 4 KiB", |b| {
        b.iter_batched(
            || Index::new(SHARDS),
            |index| {
                let mut replaced = Vec::new();
                for block in 0..blocks {
                    let place = Place { position: block * BLOCK, zero: false, dirty: true };
                    let range = SectorRange::new(block * BLOCK, BLOCK);
                    index.insert(Extent { range, place }, &mut replaced);
                }
                index
            },
            BatchSize::PerIteration,
        )
    });
    group.finish();
}

criterion_group!(benches, lookups, inserts);
criterion_main!(benches);
