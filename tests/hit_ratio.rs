//! The cache keeps what is worth keeping: hit ratios of the engine beside those of known policies.
//!
//! Question: does a cache that frees whole segments, spends space on a log and copies next to nothing
//! find as many reads as policies that place every block where they like? And does it lose what it has
//! when somebody reads the whole disk?
//!
//! Every figure is of reads, in blocks of 4 KiB; writes become cached as well, in the engine and in the
//! policies. Every row is the product's engine on simulated media, the same requests one after the other.
//! A cache's size is what its segments offer to records and payload, so all that the log needs beyond
//! payload counts against the engine; only the fixed pages of a segment do not, which are 0.1 % of one
//! of the product's and much of one of these.
//!
//! `PCACHE_TRACES=folder` adds cloudPhysicsIO and arc_OLTP (their origin is in `docs/testing.md`);
//! `PCACHE_HIT_ROWS=text` runs the rows whose name contains it.

#[path = "hit_ratio/policies.rs"]
mod policies;
#[path = "hit_ratio/trace.rs"]
mod trace;

use std::path::Path;

use pcache_vhost::cache::{Admission, Counters, Order, ReadPolicy};
use pcache_vhost::sim::timed::{DiskModel, Lab, RedoPlace, Setup};

use trace::{Replay, Scan, Trace};

/// Segments of every cache.
const SEGMENTS: u32 = 128;
/// Shares of the footprint, in percent.
const SHARES: [usize; 4] = [5, 10, 20, 40];
/// Points by which the engine may be below the best policy, and a scan may cost.
const BEHIND_MAX: f64 = 1.0;
const SCAN_COST_MAX: f64 = 2.0;
/// Percent of the bytes brought in that reclaim may copy.
const COPIES_MAX: f64 = 10.0;

/// What a run was like.
#[derive(Clone, Copy, Default)]
struct Outcome {
    /// Of reads, in percent.
    hits: f64,
    /// Of bytes that writes and fills brought in, in percent.
    copies: f64,
    /// Bytes read and not cached, of those read, in percent.
    unadmitted: f64,
}

/// Runs the engine; with a scan of the whole disk half way that does not count itself.
fn engine(trace: &Trace, blocks: usize, reads: ReadPolicy, has_scan: bool) -> Outcome {
    let setup = setup(blocks, trace.disk_blocks() * 8);
    let mut lab = Lab::with_reads(&setup, reads);
    let half = trace.accesses.len() / 2;
    let (first, second) = trace.accesses.split_at(half);
    assert_eq!(lab.run(&mut Replay::new(first, 0), 1).failed, 0);
    let before = lab.volume.counters();
    let mut from_us = 0;
    if has_scan {
        let began = lab.clock.us();
        assert_eq!(lab.run(&mut Scan { next: 0, end: setup.sectors }, 4).failed, 0);
        from_us = lab.clock.us() - began;
    }
    let after = lab.volume.counters();
    assert_eq!(lab.run(&mut Replay::new(second, from_us), 1).failed, 0);
    let end = lab.volume.counters();
    let of = |field: fn(&Counters) -> u64| (field(&before) + field(&end) - field(&after)) as f64;
    let (hits, misses) = (of(|c| c.read_hit_sectors), of(|c| c.read_miss_sectors));
    let brought = (end.write_sectors + end.fill_sectors) as f64;
    Outcome {
        hits: 100.0 * hits / (hits + misses),
        copies: 100.0 * end.relocated_sectors as f64 / brought,
        unadmitted: 100.0 * of(|c| c.unadmitted_sectors) / (hits + misses),
    }
}

/// A cache whose segments offer so many blocks to records and payload.
fn setup(blocks: usize, sectors: u64) -> Setup {
    let offered = (blocks as u64 * 4096).div_ceil(u64::from(SEGMENTS));
    let size = (1..).map(|pages| pages * 4096).find(|&size| {
        let geometry = pcache_vhost::onmedia::Geometry::custom(16 << 10, size, SEGMENTS, 1);
        geometry.is_ok_and(|g| u64::from(g.data_end() - g.data_start()) >= offered)
    });
    Setup {
        segment_size: size.expect("a segment can be that large"),
        segments: SEGMENTS,
        sectors,
        model: DiskModel::NETWORK,
        order: Order::Strict,
        redo: RedoPlace::None,
    }
}

/// The hit ratios of the policies, by name.
fn rivals(trace: &Trace, blocks: usize) -> Vec<(&'static str, f64)> {
    let ratio = |policy: &mut dyn policies::Policy| {
        let (mut hits, mut reads) = (0u64, 0u64);
        for access in &trace.accesses {
            for block in access.block..access.block + access.blocks {
                let is_hit = policy.access(block);
                reads += u64::from(!access.is_write);
                hits += u64::from(!access.is_write && is_hit);
            }
        }
        100.0 * hits as f64 / reads as f64
    };
    policies::all(blocks).into_iter().map(|(name, mut policy)| (name, ratio(&mut *policy))).collect()
}

/// One row of the table; returns what is wrong with it.
fn row(trace: &Trace, share: usize) -> Vec<String> {
    let blocks = trace.footprint() * share / 100;
    let rivals = rivals(trace, blocks);
    let best = rivals.iter().map(|r| r.1).fold(0.0, f64::max);
    let reads = ReadPolicy::default();
    let without_cutoff = ReadPolicy { sequential_cutoff: 0, ..reads };
    let (mine, scanned) = (engine(trace, blocks, reads, false), engine(trace, blocks, reads, true));
    let open = engine(trace, blocks, without_cutoff, true);
    let theirs: Vec<String> = rivals.iter().map(|(name, hits)| format!("{name} {hits:.2}")).collect();
    println!(
        "{} {share} %: engine {:.2} ({:+.2}), copies {:.1} %, uncached {:.1} %, with a scan {:.2}, without cutoff \
         {:.2}; {}",
        trace.name,
        mine.hits,
        mine.hits - best,
        mine.copies,
        mine.unadmitted,
        scanned.hits,
        open.hits,
        theirs.join(", ")
    );
    let name = format!("{} at {share} %", trace.name);
    let mut wrong = Vec::new();
    let mut demand = |is_met: bool, what: String| {
        if !is_met {
            wrong.push(format!("{name}: {what}"));
        }
    };
    demand(mine.hits >= best - BEHIND_MAX, format!("{:.2} hits beside {best:.2}", mine.hits));
    demand(mine.copies <= COPIES_MAX, format!("{:.2} % copied", mine.copies));
    demand(scanned.copies <= COPIES_MAX, format!("{:.2} % copied with a scan", scanned.copies));
    demand(
        mine.hits - scanned.hits <= SCAN_COST_MAX,
        format!("a scan leaves {:.2} of {:.2}", scanned.hits, mine.hits),
    );
    wrong
}

/// Runs rows on two threads, prints them, and panics if any is wrong.
fn table(traces: &[Trace], shares: &[usize]) {
    let only = std::env::var("PCACHE_HIT_ROWS").unwrap_or_default();
    let rows: Vec<(&Trace, usize)> =
        traces.iter().flat_map(|t| shares.iter().map(move |&share| (t, share))).collect();
    let rows: Vec<_> =
        rows.into_iter().filter(|(t, s)| format!("{} {s} %", t.name).contains(&only)).collect();
    let wrong: Vec<String> = std::thread::scope(|scope| {
        let run =
            |part: Vec<(&Trace, usize)>| part.into_iter().flat_map(|(t, s)| row(t, s)).collect::<Vec<_>>();
        let odd: Vec<_> = rows.iter().skip(1).step_by(2).copied().collect();
        let even: Vec<_> = rows.iter().step_by(2).copied().collect();
        let other = scope.spawn(move || run(odd));
        let mut wrong = run(even);
        wrong.extend(other.join().expect("the rows of the other thread"));
        wrong
    });
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_engine_keeps_as_much_worth_keeping_as_the_best_known_policy_on_a_mixed_load() {
    table(&[trace::synthetic(11, 250_000)], &[10, 20]);
}

#[test]
fn the_engine_keeps_as_much_worth_keeping_as_the_best_known_policy_on_recorded_traces() {
    let Some(folder) = std::env::var_os("PCACHE_TRACES") else {
        eprintln!("SKIPPED: PCACHE_TRACES names no folder with cloudPhysicsIO.vscsi.xz and arc_OLTP.lis.zst");
        return;
    };
    let folder = Path::new(&folder);
    let load = |trace: Result<Trace, String>| trace.expect("a trace of the folder that PCACHE_TRACES names");
    table(&[load(trace::cloud_physics(folder)), load(trace::arc_oltp(folder))], &SHARES);
}

#[test]
fn what_is_not_admitted_is_not_cached_and_what_is_missed_twice_is() {
    let trace = trace::synthetic(12, 60_000);
    let blocks = trace.footprint() / 5;
    let run = |admission| engine(&trace, blocks, ReadPolicy { admission, ..ReadPolicy::default() }, false);
    let [all, twice, none] = [Admission::Adaptive, Admission::SecondMiss, Admission::Never].map(run);
    println!("adaptive {:.1}, second miss {:.1}, never {:.1}", all.hits, twice.hits, none.hits);
    assert!(none.hits < twice.hits && none.hits < all.hits);
    assert!(all.unadmitted < twice.unadmitted && twice.unadmitted < none.unadmitted);
    assert!((none.hits + none.unadmitted - 100.0).abs() < 0.1, "every miss goes by");
}
