//! Eight volumes with clients at full speed on one cache: who holds what of it, in virtual time.
//!
//! Question: is each volume's minimum kept, no maximum passed, what is left divided by weight, and a guest's
//! hit ratio its own, whatever its neighbours do? And are limits of requests and bytes kept, at nobody
//! else's cost?
//!
//! The engine is the product's; every read is compared with what was written. Every figure is printed, and
//! the same on every run of a seed. `PCACHE_SEED` runs another.

use std::sync::Arc;

use pcache_vhost::cache::{IoLimits, Mode, Order, Shares, Volume};
use pcache_vhost::sim::timed::{DiskModel, Fleet, Member, TimedEnv};

/// Bytes of a segment of a fleet.
const SEGMENT: u64 = 256 << 10;
/// Segments of the cache.
const SEGMENTS: u32 = 96;

fn seed() -> u64 {
    let seed = std::env::var("PCACHE_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(7);
    println!("PCACHE_SEED={seed}");
    seed
}

/// A guest at full speed on a disk of so many blocks.
fn member(blocks: u64, write_percent: u64, order: Order) -> Member {
    Member {
        model: DiskModel::NETWORK,
        blocks,
        mode: Mode::Writeback,
        order,
        depth: 16,
        write_percent,
        request_us: 50,
    }
}

/// Guests that differ in everything but that each wants more than it can have.
fn eight() -> Vec<Member> {
    let blocks = u64::from(SEGMENTS) * SEGMENT / 4096;
    [
        (blocks, 0, Order::Strict),
        (blocks * 2, 0, Order::Strict),
        (blocks, 10, Order::Relaxed),
        (blocks, 30, Order::Strict),
        (blocks / 2, 50, Order::Relaxed),
        (blocks, 70, Order::Strict),
        (blocks, 100, Order::Relaxed),
        (blocks * 2, 100, Order::Strict),
    ]
    .map(|(blocks, write_percent, order)| member(blocks, write_percent, order))
    .to_vec()
}

fn held(fleet: &Fleet) -> Vec<u64> {
    fleet.volumes.iter().map(|v| v.held_bytes()).collect()
}

/// 1 where all are equal, 1/n where one has everything.
fn jain(values: &[f64]) -> f64 {
    let sum: f64 = values.iter().sum();
    sum * sum / (values.len() as f64 * values.iter().map(|v| v * v).sum::<f64>())
}

fn in_mib(bytes: &[u64]) -> Vec<f64> {
    bytes.iter().map(|&bytes| (bytes as f64 / f64::from(1 << 20) * 100.0).round() / 100.0).collect()
}

/// Runs until the cache is full.
fn fill(fleet: &mut Fleet) {
    for _ in 0..600 {
        fleet.run(100);
        if fleet.cache.free_segments() < 8 {
            fleet.run(1000);
            return;
        }
    }
    panic!("the cache never fills: {:?}", held(fleet));
}

#[test]
fn eight_volumes_at_full_speed_hold_equal_parts() {
    let mut fleet = Fleet::new(seed(), SEGMENTS, &eight());
    fill(&mut fleet);
    let mut worst = 1.0f64;
    for _ in 0..60 {
        fleet.run(20);
        let held: Vec<f64> = held(&fleet).into_iter().map(|bytes| bytes as f64).collect();
        worst = worst.min(jain(&held));
    }
    println!("held, MiB: {:?}; Jain's index, the least of 60 looks: {worst:.4}", in_mib(&held(&fleet)));
    assert!(worst >= 0.95, "Jain's index {worst}");
    fleet.cache.audit(false).unwrap();
    fleet.quiesce(60_000);
}

/// The least of so many looks, 40 ms apart, at how evenly what they hold follows their weights.
fn least_by_weight(fleet: &mut Fleet, looks: u32) -> f64 {
    let mut least = 1.0f64;
    for _ in 0..looks {
        fleet.run(40);
        let by_weight = |v: &Arc<Volume<TimedEnv>>| v.held_bytes() as f64 / f64::from(v.shares().weight);
        least = least.min(jain(&fleet.volumes.iter().map(by_weight).collect::<Vec<_>>()));
    }
    least
}

#[test]
fn what_they_hold_follows_their_weights() {
    let mut fleet = Fleet::new(seed(), SEGMENTS, &eight());
    for (n, volume) in fleet.volumes.iter().enumerate() {
        let weight = if n % 2 == 0 { 100 } else { 300 };
        volume.set_shares(Shares { weight, ..Shares::default() }).unwrap();
    }
    fill(&mut fleet);
    let index = least_by_weight(&mut fleet, 25);
    println!(
        "held, MiB: {:?}; Jain's index by weight, the least of 25 looks: {index:.4}",
        in_mib(&held(&fleet))
    );
    assert!(index >= 0.95, "Jain's index {index}");
    // Changed under load, it is taken and given.
    for (n, volume) in fleet.volumes.iter().enumerate() {
        let weight = if n % 2 == 0 { 300 } else { 100 };
        volume.set_shares(Shares { weight, ..Shares::default() }).unwrap();
    }
    fleet.run(2000);
    let index = least_by_weight(&mut fleet, 50);
    println!("the other way round: {:?}; the least of 50 looks: {index:.4}", in_mib(&held(&fleet)));
    assert!(index >= 0.95, "Jain's index {index}");
    fleet.quiesce(60_000);
}

#[test]
fn once_filled_none_is_ever_below_its_minimum_less_one_segment_nor_above_its_maximum() {
    let mut fleet = Fleet::new(seed(), SEGMENTS, &eight());
    let mins = [20, 0, 5, 15, 0, 12, 8, 0].map(|segments| segments * SEGMENT);
    let maxs = [0, 6, 6, 0, 8, 14, 0, 4].map(|segments| segments * SEGMENT);
    for (volume, (min, max)) in fleet.volumes.iter().zip(mins.into_iter().zip(maxs)) {
        volume.set_shares(Shares { min, max, ..Shares::default() }).unwrap();
    }
    let (mut reached, mut least) = ([false; 8], [u64::MAX; 8]);
    let mut most = [0u64; 8];
    for _ in 0..4000 {
        fleet.run(1);
        for (n, held) in held(&fleet).into_iter().enumerate() {
            reached[n] |= held >= mins[n];
            most[n] = most[n].max(held);
            if reached[n] {
                least[n] = least[n].min(held);
                assert!(held + SEGMENT >= mins[n], "volume {n} of {} holds {held}", mins[n]);
            }
            assert!(maxs[n] == 0 || held <= maxs[n], "volume {n} of {} at most holds {held}", maxs[n]);
        }
    }
    println!("minimum, MiB: {:?}", in_mib(&mins));
    println!("least held:   {:?}", in_mib(&least));
    println!("most held:    {:?}", in_mib(&most));
    println!("maximum:      {:?}", in_mib(&maxs));
    assert_eq!(reached, [true; 8], "everybody has its minimum in the end");
    fleet.cache.audit(true).unwrap();
    fleet.quiesce(60_000);
    fleet.drain(600_000);
    (0..8).for_each(|disk| fleet.judge_disk(disk).unwrap());
}

/// Share of what a guest reads that the cache has, over `ms`.
fn hit_ratio(fleet: &mut Fleet, volume: usize, ms: u64) -> f64 {
    let count = |fleet: &Fleet| {
        let counters = fleet.volumes[volume].counters();
        (counters.read_hit_sectors, counters.read_miss_sectors)
    };
    let before = count(fleet);
    fleet.run(ms);
    let after = count(fleet);
    let (hits, misses) = (after.0 - before.0, after.1 - before.1);
    hits as f64 / (hits + misses).max(1) as f64
}

#[test]
fn a_noisy_neighbour_takes_little_of_a_hit_ratio() {
    let blocks = u64::from(SEGMENTS) * SEGMENT / 4096;
    let half = u64::from(SEGMENTS) / 2 * SEGMENT;
    // The victim's working set in percent of the cache, its writes, and what it may hold while it is alone: a
    // log holds less than its size of what is overwritten all the time, so who writes and fills most of its
    // part is compared with itself in a cache of that size.
    for (percent, writes, max) in [(40, 0, 0), (25, 10, 0), (40, 10, half)] {
        for (what, write_percent) in [("reads", 0), ("writes", 100)] {
            let victim = Member { depth: 8, ..member(blocks * percent / 100, writes, Order::Relaxed) };
            let noisy = Member { depth: 0, ..member(blocks * 8, write_percent, Order::Relaxed) };
            let mut fleet = Fleet::new(seed(), SEGMENTS, &[victim, noisy]);
            fleet.volumes[0].set_shares(Shares { max, ..Shares::default() }).unwrap();
            fleet.run(2500);
            let alone = hit_ratio(&mut fleet, 0, 1000);
            fleet.volumes[0].set_shares(Shares::default()).unwrap();
            fleet.set_depth(1, 64);
            fleet.run(2500);
            let beside = hit_ratio(&mut fleet, 0, 1000);
            println!(
                "a guest of {percent} %, {writes} % writes; a neighbour that {what}: hit ratio alone {alone:.4}, \
                 beside it {beside:.4}; held, MiB: {:?}",
                in_mib(&held(&fleet))
            );
            assert!(alone > 0.7, "the victim's working set fits: {alone}");
            assert!(beside >= alone * 0.95, "{what}: {beside} of {alone}");
            fleet.quiesce(60_000);
        }
    }
}

#[test]
fn a_share_that_nobody_uses_is_borrowed_and_given_back() {
    let blocks = u64::from(SEGMENTS) * SEGMENT / 4096;
    let all = u64::from(SEGMENTS) * SEGMENT;
    let members = [member(blocks * 2, 30, Order::Relaxed), member(blocks * 2, 30, Order::Relaxed)];
    let mut fleet = Fleet::new(seed(), SEGMENTS, &members);
    fleet.volumes[1].set_shares(Shares { min: 10 * SEGMENT, ..Shares::default() }).unwrap();
    fill(&mut fleet);
    let equal = held(&fleet);
    fleet.set_depth(1, 0);
    fleet.run(8000);
    let borrowed = held(&fleet);
    fleet.set_depth(1, 16);
    fleet.run(6000);
    let back = held(&fleet);
    println!("both: {:?}, one alone: {:?}, both: {:?}", in_mib(&equal), in_mib(&borrowed), in_mib(&back));
    assert!(jain(&[equal[0] as f64, equal[1] as f64]) >= 0.95);
    assert!(borrowed[0] > all * 7 / 10, "an idle share is borrowed");
    assert_eq!(borrowed[1], 10 * SEGMENT, "but for its minimum");
    assert!(jain(&[back[0] as f64, back[1] as f64]) >= 0.95);
    fleet.quiesce(60_000);
}

#[test]
fn a_maximum_that_is_dirty_slows_its_own_writers_alone() {
    let blocks = u64::from(SEGMENTS) * SEGMENT / 4096;
    let slow = Member { model: DiskModel::HARD_DISK, ..member(blocks, 100, Order::Relaxed) };
    // Reads that the cache has, but for the first of each block.
    let reader = Member { depth: 4, ..member(blocks / 8, 0, Order::Relaxed) };
    let mut fleet = Fleet::new(seed(), SEGMENTS, &[slow, reader]);
    let max = 12 * SEGMENT;
    fleet.volumes[0].set_shares(Shares { max, ..Shares::default() }).unwrap();
    fleet.set_depth(0, 0);
    fleet.run(1000);
    let alone = fleet.run(2000)[1].good();
    fleet.set_depth(0, 16);
    fleet.run(3000);
    let seen = fleet.run(2000);
    let counters = fleet.volumes[0].counters();
    println!(
        "reader alone {alone}, beside it {}; writer {} in 2 s, waited {} ms for pace and {} ms for space",
        seen[1].good(),
        seen[0].good(),
        counters.pace_wait_us / 1000,
        counters.space_wait_us / 1000
    );
    assert!(seen[0].good() > 0 && fleet.volumes[0].held_bytes() <= max);
    assert!(seen[1].good() * 100 >= alone * 99, "the neighbour is not slowed");
    assert!(counters.pace_wait_us + counters.space_wait_us > 0);
    fleet.quiesce(600_000);
}

#[test]
fn a_disk_that_hangs_takes_no_minimum_from_its_neighbours() {
    let blocks = u64::from(SEGMENTS) * SEGMENT / 4096;
    let members = [member(blocks * 2, 100, Order::Relaxed), member(blocks * 2, 30, Order::Strict)];
    let mut fleet = Fleet::new(seed(), SEGMENTS, &members);
    let min = 60 * SEGMENT;
    fleet.volumes[1].set_shares(Shares { min, ..Shares::default() }).unwrap();
    fill(&mut fleet);
    fleet.hang_disk(0, true);
    fleet.run(4000);
    let seen = fleet.run(1000);
    println!("held, MiB: {:?}; the one goes on with {:?}", in_mib(&held(&fleet)), seen[1]);
    assert!(held(&fleet)[1] + SEGMENT >= min);
    assert!(seen[1].good() > 1000, "{seen:?}");
    fleet.hang_disk(0, false);
    fleet.drain(600_000);
    (0..2).for_each(|disk| fleet.judge_disk(disk).unwrap());
}

#[test]
fn gc_percent_keeps_space_free_that_nobody_needs_yet() {
    let blocks = u64::from(SEGMENTS) * SEGMENT / 4096;
    let mut fleet = Fleet::new(seed(), SEGMENTS, &[member(blocks * 2, 50, Order::Relaxed)]);
    fill(&mut fleet);
    for percent in [70, 30, 0] {
        let gc_percent = Some(percent);
        fleet.volumes[0].set_shares(Shares { gc_percent, ..Shares::default() }).unwrap();
        fleet.run(1000);
        // What is dirty waits for its disk, not for room.
        fleet.set_depth(0, 0);
        fleet.drain(60_000);
        fleet.run(1000);
        fleet.set_depth(0, 16);
        let held = fleet.volumes[0].held_bytes() / SEGMENT;
        println!("gc_percent {percent}: {held} of {SEGMENTS} segments");
        // Open ones are not reclaimed.
        assert!(held <= u64::from(SEGMENTS) * u64::from(percent) / 100 + 4);
    }
}

#[test]
fn minimums_are_refused_that_the_cache_cannot_keep() {
    let fleet = Fleet::new(seed(), SEGMENTS, &eight());
    let set = |volume: usize, min: u64, max: u64| {
        let shares = Shares { min: min * SEGMENT, max: max * SEGMENT, ..Shares::default() };
        fleet.volumes[volume].set_shares(shares).map_err(|error| error.to_string())
    };
    set(0, 50, 0).unwrap();
    let refused = set(1, 50, 0).unwrap_err();
    assert_eq!(
        refused,
        "the cache can promise 22.5 MiB in all and has promised 17 MiB to other volumes: cache_min can be \
         5632 KiB at most"
    );
    assert!(set(1, 5, 4).unwrap_err().contains("is more than cache_max"));
    assert!(set(1, 0, 3).unwrap_err().contains("is too little"));
    assert_eq!(fleet.volumes[1].shares(), Shares::default(), "a refusal changes nothing");
    set(0, 10, 0).unwrap();
    set(1, 50, 0).unwrap();
}

#[test]
fn limits_are_kept_and_cost_a_neighbour_nothing() {
    let rows = [
        (IoLimits { iops: 2000, ..IoLimits::default() }, 50, 2000.0),
        (IoLimits { read_iops: 500, ..IoLimits::default() }, 0, 500.0),
        (IoLimits { write_iops: 300, ..IoLimits::default() }, 100, 300.0),
        (IoLimits { bytes_per_s: 4 << 20, ..IoLimits::default() }, 50, 1024.0),
        (IoLimits { write_bytes_per_s: 1 << 20, ..IoLimits::default() }, 100, 256.0),
    ];
    let blocks = 2000;
    for (limits, write_percent, rate) in rows {
        let members = [member(blocks, write_percent, Order::Relaxed), member(blocks, 50, Order::Relaxed)];
        let mut fleet = Fleet::new(seed(), SEGMENTS, &members);
        fleet.run(1000);
        let free = fleet.run(1000);
        // At once, while requests are under way.
        fleet.volumes[0].set_io_limits(limits);
        fleet.run(500);
        let seen = fleet.run(4000);
        let found = seen[0].good() as f64 / 4.0;
        let counters = fleet.volumes[0].counters();
        println!(
            "{rate}/s: {found:.0}/s of {:.0}, neighbour {:.0}/s of {:.0}; {} held, {} ms and {} ms",
            free[0].good() as f64,
            seen[1].good() as f64 / 4.0,
            free[1].good() as f64,
            counters.limit_waits,
            counters.limit_iops_wait_us / 1000,
            counters.limit_bytes_wait_us / 1000,
        );
        assert!((found / rate - 1.0).abs() < 0.05, "{limits:?}: {found} a second, not {rate}");
        assert!(seen[1].good() as f64 / 4.0 >= free[1].good() as f64 * 0.95, "{limits:?}");
        let by_bytes = limits.bytes_per_s + limits.write_bytes_per_s > 0;
        let waited = [counters.limit_iops_wait_us, counters.limit_bytes_wait_us];
        assert!(waited[usize::from(by_bytes)] > 1_000_000 && waited[usize::from(!by_bytes)] == 0);
        // And at once no more.
        fleet.volumes[0].set_io_limits(IoLimits::default());
        let seen = fleet.run(1000);
        assert!(seen[0].good() as f64 >= free[0].good() as f64 * 0.9, "{limits:?} goes on holding");
        fleet.quiesce(60_000);
    }
}
