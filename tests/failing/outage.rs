//! Long outages under load, and the volume next door.

use pcache_vhost::cache::{OnBackingError, Order, VolumeState};
use pcache_vhost::sim::timed::{DiskModel, Fleet, Member};

use crate::{MEMBER, seed};

const MINUTE: u64 = 60_000;

/// Ten minutes of EIO: then the disk works again, and everything by itself.
fn outage(order: Order, policy: OnBackingError) -> Fleet {
    let mut fleet = Fleet::new(seed(), 96, &[Member { order, ..MEMBER }]);
    fleet.volumes[0].set_on_backing_error(policy, 30_000);
    fleet.run(10_000);
    fleet.fail_disk(0, true);
    let seen = fleet.run(1000)[0];
    assert_eq!(seen.failed_writes, 0, "space is there");
    fleet
}

fn ends_well(mut fleet: Fleet, what: &str) {
    assert_eq!(fleet.volumes[0].health().state, VolumeState::Degraded, "{what}");
    fleet.fail_disk(0, false);
    // Write-back's longest delay, and what it has to bring to the disk.
    fleet.run(MINUTE);
    assert_eq!(fleet.volumes[0].health().state, VolumeState::Ok, "{what}: {:?}", fleet.volumes[0].health());
    let seen = fleet.run(10_000)[0];
    assert_eq!(seen.failed(), 0, "{what}: all is well again");
    assert!(seen.writes > 300 && seen.reads > 300, "{what}: {seen:?}");
    fleet.drain(MINUTE);
    fleet.judge_disk(0).unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
}

#[test]
fn ten_minutes_of_a_dead_disk_cost_a_guest_that_waits_no_error_and_nothing_is_lost() {
    for order in [Order::Relaxed, Order::Strict] {
        let what = format!("{order:?}");
        let mut fleet = outage(order, OnBackingError::Wait);
        let mut writes = 0;
        for minute in 0..10 {
            let seen = fleet.run(MINUTE)[0];
            assert_eq!(seen.failed(), 0, "{what}, minute {minute}: {seen:?}");
            writes += seen.writes;
        }
        let counters = fleet.volumes[0].counters();
        println!("{what}: {writes} writes while the disk was dead, {} tries again", counters.disk_retries);
        assert_eq!(counters.errors, 0, "{what}");
        assert!(counters.writeback_errors > 10, "{what}: {counters:?}");
        ends_well(fleet, &what);
    }
}

#[test]
fn ten_minutes_of_a_dead_disk_with_errors_allowed_fail_misses_and_writes_without_space_alone() {
    let mut fleet = outage(Order::Strict, OnBackingError::Error);
    let mut written = 0;
    let mut first_error = None;
    for second in 0..600 {
        let seen = fleet.run(1000)[0];
        written += seen.writes;
        if seen.failed_writes > 0 && first_error.is_none() {
            let free = fleet.cache.free_segments();
            first_error = Some((second, free));
        }
        assert!(fleet.under_way(0) <= 4);
    }
    println!(
        "the first write failed after {first_error:?} (s, free segments), {written} writes went through"
    );
    // A volume's room is the cache but for a reserve: it must have been used.
    assert!(
        first_error.is_some_and(|(second, free)| second > 5 && free <= 20),
        "space ran out, and not at once"
    );
    ends_well(fleet, "error");
}

#[test]
fn a_guest_of_a_disk_that_hangs_for_ten_minutes_waits_and_loses_nothing() {
    let mut fleet = Fleet::new(seed(), 96, &[MEMBER]);
    fleet.run(5000);
    fleet.hang_disk(0, true);
    for _ in 0..10 {
        assert_eq!(fleet.run(MINUTE)[0].failed(), 0);
    }
    assert_eq!(fleet.volumes[0].health().state, VolumeState::Stalled);
    fleet.hang_disk(0, false);
    fleet.run(MINUTE);
    assert_eq!(fleet.volumes[0].health().state, VolumeState::Ok);
    fleet.drain(MINUTE);
    fleet.judge_disk(0).expect("nothing is lost");
}

/// What the second volume's guest got done in a minute, with the first one's disk dead or not loaded.
fn next_door(order: Order, trouble: Option<fn(&Fleet)>) -> u64 {
    // Disk-bound both: misses, and writes as fast as the disk takes them.
    let model = DiskModel::HARD_DISK;
    let member = Member { order, model, depth: 16, blocks: 16_384, request_us: 50, ..MEMBER };
    let mut fleet = Fleet::new(seed(), 64, &[member, member]);
    if trouble.is_none() {
        fleet.set_depth(0, 0);
    }
    fleet.run(5000);
    if let Some(trouble) = trouble {
        trouble(&fleet);
    }
    // What the first one's guest still gets done without its disk.
    fleet.run(15_000);
    let seen = fleet.run(60_000)[1];
    assert_eq!(seen.failed(), 0);
    fleet.fail_disk(0, false);
    fleet.drain(10 * MINUTE);
    fleet.judge_disk(1).expect("nothing is lost");
    seen.good()
}

#[test]
fn a_dead_disk_does_not_slow_the_volume_next_door() {
    type Trouble = (&'static str, fn(&Fleet));
    let troubles: [Trouble; 2] =
        [("fails", |fleet| fleet.fail_disk(0, true)), ("hangs", |fleet| fleet.hang_disk(0, true))];
    for order in [Order::Relaxed, Order::Strict] {
        let alone = next_door(order, None);
        for (what, trouble) in troubles {
            let beside = next_door(order, Some(trouble));
            let share = beside as f64 / alone as f64;
            println!("{order:?}: {beside} requests beside a disk that {what}, {alone} alone: {share:.3}");
            assert!(share > 0.95, "{order:?}: a disk that {what} slows the volume next door: {share:.3}");
        }
    }
}
