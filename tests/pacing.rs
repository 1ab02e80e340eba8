//! Full is never a cliff: the engine in virtual time, before disks that no test machine has.
//!
//! Question: when writes come faster than the disk takes them and the cache is full, does the guest
//! get the disk's own speed, evenly, or stalls? Every figure is a ratio to the bare disk under the
//! same requests and flushes: four times the cache's size in random writes of 4 KiB, of which the
//! second half counts.
//!
//! `PACING_ROWS=text` runs the rows whose name contains it.

use pcache_vhost::cache::Order;
use pcache_vhost::sim::timed::{DiskModel, Lab, RandomWrites, RedoPlace, Setup, Trail, run_bare};

/// A disk, and a cache of 96 segments so large that the run takes several seconds of its time.
struct Bench {
    name: &'static str,
    model: DiskModel,
    segment_size: u32,
}

const SEGMENTS: u32 = 96;
const BENCHES: [Bench; 2] = [
    Bench { name: "8 ms, 150 MB/s", model: DiskModel::HARD_DISK, segment_size: 256 << 10 },
    Bench { name: "0.5 ms, 250 MB/s", model: DiskModel::NETWORK, segment_size: 2 << 20 },
];

/// What is asked of an order: least worst window and greatest p99.9, both relative to the bare disk. A
/// guest of `grouped` waits while a group is on its way to the redo area of a disk that hardly seeks.
const BARS: [(Order, f64, f64); 3] =
    [(Order::Relaxed, 0.95, 2.0), (Order::Strict, 0.8, 3.5), (Order::Grouped, 0.45, 100.0)];

fn worst(trail: &Trail, skip: usize) -> f64 {
    let worst = trail.worst_window(skip, 1_000_000);
    if worst.is_finite() { worst } else { trail.rate(skip) }
}

#[test]
fn a_full_cache_is_as_fast_and_as_even_as_its_disk() {
    let only = std::env::var("PACING_ROWS").unwrap_or_default();
    let mut broken = Vec::new();
    for bench in &BENCHES {
        let blocks = u64::from(bench.segment_size) * u64::from(SEGMENTS) / 4096;
        let sectors = blocks * 8 * 4;
        for (depth, barrier) in [(1, 0), (1, 64), (32, 0), (32, 64)] {
            let row = format!("{}, depth {depth}, a FLUSH every {barrier}", bench.name);
            if !row.contains(&only) {
                continue;
            }
            let guest = || RandomWrites::new(7, sectors, 4 * blocks, barrier);
            let (bare, _) = run_bare(bench.model, sectors, &mut guest(), depth);
            let half = bare.ends.len() / 2;
            let bare_tail = bare.percentile(half, 0.999);
            println!("{row}: bare {:.0}/s, p99.9 {bare_tail} µs", bare.rate(half));
            for (order, least, greatest) in BARS {
                let (model, segment_size) = (bench.model, bench.segment_size);
                // Groups share the arm with what they are for.
                let redo = match order {
                    Order::Grouped => RedoPlace::SameDisk(sectors / 8),
                    Order::Strict | Order::Relaxed => RedoPlace::None,
                };
                let setup = Setup { segment_size, segments: SEGMENTS, sectors, model, order, redo };
                let mut lab = Lab::new(&setup);
                let trail = lab.run(&mut guest(), depth);
                assert_eq!(trail.failed, 0, "{row}, {order:?}");
                let window = worst(&trail, half) / worst(&bare, half);
                let tail = trail.percentile(half, 0.999) as f64 / bare_tail as f64;
                let all = trail.rate(half) / bare.rate(half);
                println!("    {order:?}: rate {all:.2}, worst second {window:.2}, p99.9 {tail:.2}");
                if window < least || tail > greatest {
                    broken.push(format!("{row}, {order:?}: {window:.2}, {tail:.2}"));
                }
                lab.drain(10_000);
                lab.judge_disk().unwrap_or_else(|wrong| panic!("{row}, {order:?}: {wrong}"));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}
