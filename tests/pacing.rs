//! Full is never a cliff: the engine in virtual time, before disks that no test machine has.
//!
//! Question: when writes come faster than the disk takes them and the cache is full, does the guest
//! get the disk's own speed, evenly, or stalls? Every figure is a ratio to the bare disk under the
//! same requests and flushes.

use pcache_vhost::cache::Order;
use pcache_vhost::sim::timed::{DiskModel, Lab, RandomWrites, Setup, Trail, run_bare};

const SEGMENT: u32 = 256 << 10;
const SEGMENTS: u32 = 96;
const BLOCKS: u64 = SEGMENT as u64 * SEGMENTS as u64 / 4096;

struct Row {
    disk: &'static str,
    model: DiskModel,
    depth: usize,
    barrier: u64,
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (disk, model) in [("8 ms, 150 MB/s", DiskModel::HARD_DISK), ("0.5 ms, 250 MB/s", DiskModel::NETWORK)] {
        for depth in [1, 32] {
            for barrier in [0, 64] {
                rows.push(Row { disk, model, depth, barrier });
            }
        }
    }
    rows
}

fn guest(sectors: u64, barrier: u64) -> RandomWrites {
    RandomWrites::new(7, sectors, 4 * BLOCKS, barrier)
}

#[test]
fn a_full_cache_is_as_fast_and_as_even_as_its_disk() {
    let sectors = BLOCKS * 8 * 4;
    for row in rows() {
        let (bare, _) = run_bare(row.model, sectors, &mut guest(sectors, row.barrier), row.depth);
        let half = bare.ends.len() / 2;
        println!(
            "{} depth {} barrier {}: bare {:.0}/s worst {:.0}/s p50 {} p99.9 {} µs",
            row.disk, row.depth, row.barrier, bare.rate(half), bare.worst_window(half, 1_000_000),
            bare.percentile(half, 0.5), bare.percentile(half, 0.999)
        );
        for order in [Order::Relaxed, Order::Strict] {
            let setup = Setup { segment_size: SEGMENT, segments: SEGMENTS, sectors, model: row.model, order };
            let mut lab = Lab::new(&setup);
            let trail: Trail = lab.run(&mut guest(sectors, row.barrier), row.depth);
            assert_eq!(trail.failed, 0);
            println!(
                "    {order:?}: rate {:.2} worst {:.2} p50 {} p99.9 {} max {} µs; {:?}",
                trail.rate(half) / bare.rate(half),
                trail.worst_window(half, 1_000_000) / bare.worst_window(half, 1_000_000),
                trail.percentile(half, 0.5), trail.percentile(half, 0.999), trail.percentile(half, 1.0),
                lab.disk.written()
            );
            lab.drain(10_000);
            lab.judge_disk().unwrap();
        }
    }
}
