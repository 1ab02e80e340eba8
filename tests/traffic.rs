//! The bar: random traffic over several queues, on a disk much larger than its cache, through many
//! `kill -9`, without one sector that must not be what it is.
//!
//! `PCACHE_TRAFFIC_OPS` sets the number of operations (default 200000), `PCACHE_KILLS` the number of
//! kills over all the `killed_…` tests (default 60), `PCACHE_SEED` repeats a run, `PCACHE_TEST_DIR`
//! says where cache and disk lie.

mod client;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use client::daemon::verb;
use client::{Client, ClientOptions, Daemon, Mix, Notify, RestartBase, Rng, Traffic, Workspace};

const MIB: u64 = 1 << 20;
const KILLS: u64 = 20;

fn operations() -> u64 {
    match std::env::var("PCACHE_TRAFFIC_OPS") {
        Ok(text) => text.parse().expect("PCACHE_TRAFFIC_OPS is a number"),
        Err(_) => 200_000,
    }
}

/// Kills the server at an arbitrary moment of what is in flight, and goes on. Returns what it had said.
fn kill_in_flight(traffic: &mut Traffic, daemon: &mut Daemon) -> String {
    let until = Instant::now() + Duration::from_micros(traffic.rng.below(3000));
    while Instant::now() < until {
        std::hint::spin_loop();
    }
    daemon.kill();
    let life = daemon.read_life();
    daemon.restart();
    traffic.client.reconnect();
    life
}

/// The sum over the server's lives of a counter; in each life the last line counts.
fn count_lives(lives: &[String], name: &str) -> u64 {
    lives.iter().filter_map(|life| Daemon::counter(life, name)).sum()
}

#[test]
fn no_sector_is_wrong_after_random_traffic_and_twenty_kills() {
    let seed = Rng::seed_from_env("PCACHE_SEED");
    let workspace = Workspace::new();
    let mut daemon = Daemon::cached(&workspace, "64MiB", 1024 * MIB, 2, &[]);
    let options = ClientOptions { queues: 2, ..ClientOptions::default() };
    let client = Client::connect(daemon.socket(), options);
    assert_eq!(client.capacity(), 1024 * MIB / 512, "the disk is as large as its backing");
    let mut traffic = Traffic::new(client, seed, Mix::default());
    traffic.backing = Some(workspace.path("disk.img"));

    let mut lives = Vec::new();
    let share = operations() / (KILLS + 1);
    for life in 0..KILLS {
        let early = traffic.rng.below(share / 10 + 1);
        traffic.run(share - early);
        daemon.signal(libc::SIGUSR1);
        traffic.run(early);
        // Odd lives believe nothing of the ring's base: Cloud Hypervisor gives the available index.
        let base = if life % 2 == 0 { RestartBase::Used } else { RestartBase::Available };
        traffic.client.options.restart_base = base;
        lives.push(kill_in_flight(&mut traffic, &mut daemon));
        if life % 4 == 3 {
            traffic.quiesce();
            let part = traffic.model.sectors() / KILLS;
            traffic.verify(life * part..(life + 1) * part);
        }
    }
    traffic.run(share);
    traffic.quiesce();
    traffic.verify(0..traffic.model.sectors());
    daemon.stop();
    eprintln!("{:?}", traffic.tally);

    lives.push(daemon.read_life());
    let (reclaimed, written_back) =
        (count_lives(&lives, "reclaimed"), count_lives(&lives, "written_back_sectors"));
    eprintln!("reclaimed={reclaimed} written_back_sectors={written_back}");
    assert!(reclaimed > 0, "a cache of 64 MiB under a disk of 1 GiB reclaims");
    assert!(written_back > 0, "a cache of 64 MiB under a disk of 1 GiB writes back");

    drained_disk_agrees(&workspace, &mut traffic);
}

/// Drains the cache offline and compares the backing file itself with the model.
fn drained_disk_agrees(workspace: &Workspace, traffic: &mut Traffic) {
    let (cache, disk) = (workspace.path("cache.img"), workspace.path("disk.img"));
    let (cache, disk_text) = (cache.to_str().expect("text"), disk.to_str().expect("text"));
    let drained = verb(&["drain", "--cache", cache, "--backing", disk_text]);
    assert!(drained.status.success(), "drain: {}", String::from_utf8_lossy(&drained.stderr));
    let file = File::open(&disk).expect("the backing file opens");
    let mut bytes = vec![0; MIB as usize];
    for at in 0..traffic.model.sectors() * 512 / MIB {
        file.read_exact_at(&mut bytes, at * MIB).expect("the backing file is whole");
        traffic.model.check(at * MIB / 512, &bytes).unwrap_or_else(|why| panic!("after drain, {why}"));
    }
}

/// Tests that share the kills of `PCACHE_KILLS`.
const KILLED_TESTS: u64 = 6;

/// One test's share of the kills.
fn kills() -> u64 {
    let total: u64 = match std::env::var("PCACHE_KILLS") {
        Ok(text) => text.parse().expect("PCACHE_KILLS is a number"),
        Err(_) => 60,
    };
    total.div_ceil(KILLED_TESTS)
}

/// Kill after kill under load over four queues: what is in flight at one is replayed and runs into
/// the next. Every fourth life is killed before it has served a request of its own, many while they
/// replay. Then the whole disk is compared through the server, and once more alone after a drain.
fn killed(order: &str, assume_dax: bool, mix: Mix) {
    let seed = Rng::seed_from_env("PCACHE_SEED");
    let workspace = if assume_dax { Workspace::in_memory() } else { Workspace::new() };
    let mut more = vec!["--order", order];
    more.extend(assume_dax.then_some("--assume-dax"));
    let mut daemon = Daemon::cached(&workspace, "64MiB", 256 * MIB, 4, &more);
    let client = Client::connect(daemon.socket(), ClientOptions { queues: 4, ..Default::default() });
    let mut traffic = Traffic::new(client, seed, mix);
    traffic.backing = Some(workspace.path("disk.img"));
    let (kills, mut in_flight, mut checked, mut in_sync) = (kills(), 0, 0, 0);
    for kill in 0..kills {
        if kill % 4 != 3 {
            let operations = traffic.rng.between(1, 1500);
            traffic.run(operations);
        }
        in_flight += traffic.client.outstanding();
        let base = if kill % 2 == 0 { RestartBase::Used } else { RestartBase::Available };
        traffic.client.options.restart_base = base;
        let life = kill_in_flight(&mut traffic, &mut daemon);
        in_sync += u64::from(life.contains("the last run ended within a sync"));
        if kill % 8 == 7 {
            traffic.quiesce();
            let part = traffic.model.sectors() / 16;
            let from = traffic.rng.below(16) * part;
            traffic.verify(from..from + part);
            checked += part;
        }
    }
    traffic.quiesce();
    traffic.verify(0..traffic.model.sectors());
    daemon.stop();
    eprintln!(
        "order={order} assume_dax={assume_dax} kills={kills} in_flight_at_kills={in_flight} \
         within_a_sync={in_sync} sectors_compared={} lost=0 {:?}",
        checked + 2 * traffic.model.sectors(),
        traffic.tally
    );
    assert!(in_flight as u64 >= kills, "hardly anything was in flight at the kills");
    drained_disk_agrees(&workspace, &mut traffic);
}

#[test]
fn killed_in_strict_order_on_page_cache_nothing_is_lost() {
    killed("strict", false, Mix::default());
}

#[test]
fn killed_in_relaxed_order_on_page_cache_nothing_is_lost() {
    killed("relaxed", false, Mix::default());
}

#[test]
fn killed_in_strict_order_on_dax_nothing_is_lost() {
    killed("strict", true, Mix::default());
}

#[test]
fn killed_in_relaxed_order_on_dax_under_overlapping_writes_nothing_is_lost() {
    killed("relaxed", true, Mix::overlapping());
}

#[test]
fn killed_under_flush_after_flush_nothing_is_lost() {
    killed("strict", false, Mix::flushing());
}

#[test]
fn killed_under_overlapping_writes_in_strict_order_on_dax_nothing_is_lost() {
    killed("strict", true, Mix { flushes: 20, ..Mix::overlapping() });
}

/// Traffic and clean restarts on one kind of media in one order; every sector compared.
fn steady(order: &str, assume_dax: bool) {
    let seed = Rng::seed_from_env("PCACHE_SEED");
    let workspace = if assume_dax { Workspace::in_memory() } else { Workspace::new() };
    let mut more = vec!["--order", order];
    more.extend(assume_dax.then_some("--assume-dax"));
    let mut daemon = Daemon::cached(&workspace, "64MiB", 256 * MIB, 2, &more);
    let client = Client::connect(daemon.socket(), ClientOptions { queues: 2, ..Default::default() });
    let mut traffic = Traffic::new(client, seed, Mix::default());
    traffic.backing = Some(workspace.path("disk.img"));
    // Deep queues make large records, one request at a time makes many small ones.
    for depth_max in [32, 1, 8] {
        traffic.mix.depth_max = depth_max;
        // Fewer would not fill the cache.
        traffic.run((operations() / 20).max(8000));
        traffic.quiesce();
        daemon.stop();
        assert!(Daemon::counter(&daemon.read_life(), "reclaimed") > Some(0), "the cache was never full");
        daemon.restart();
        traffic.client.reconnect();
        traffic.verify(0..traffic.model.sectors());
    }
    daemon.stop();
    drained_disk_agrees(&workspace, &mut traffic);
}

#[test]
fn steady_traffic_in_strict_order_on_page_cache() {
    steady("strict", false);
}

#[test]
fn steady_traffic_in_relaxed_order_on_page_cache() {
    steady("relaxed", false);
}

#[test]
fn steady_traffic_in_strict_order_on_dax() {
    steady("strict", true);
}

#[test]
fn steady_traffic_in_relaxed_order_on_dax() {
    steady("relaxed", true);
}

#[test]
fn what_is_left_alone_reaches_the_disk_within_seconds_however_often_the_guest_has_flushed() {
    let workspace = Workspace::new();
    let mut daemon = Daemon::cached(&workspace, "64MiB", 64 * MIB, 1, &[]);
    let client = Client::connect(daemon.socket(), ClientOptions::default());
    let mut traffic = Traffic::new(client, Rng::seed_from_env("PCACHE_SEED"), Mix::default());
    for at in 0..200 {
        traffic.write_at(0, at * 64, 8);
        traffic.quiesce();
        traffic.flush_now(0);
        traffic.quiesce();
    }
    // Each flush has closed an epoch, and a round takes one. A busy machine gets time, but not the
    // 400 s that a wait for each would take.
    let line = daemon.wait_status(" dirty_bytes=0 ", Duration::from_secs(40));
    assert!(Daemon::counter(&line, "tail_epoch") >= Some(200), "{line}");
    daemon.stop();
    let bytes = std::fs::read(workspace.path("disk.img")).expect("the disk");
    traffic.model.check(0, &bytes).unwrap_or_else(|why| panic!("the disk alone: {why}"));
}

#[test]
fn requests_in_flight_at_a_kill_complete_exactly_once() {
    let seed = Rng::seed_from_env("PCACHE_SEED");
    for (event_idx, notify) in [(true, Notify::Call), (false, Notify::Call), (true, Notify::Poll)] {
        let workspace = Workspace::new();
        let mut daemon = Daemon::cached(&workspace, "64MiB", 128 * MIB, 2, &[]);
        let options = ClientOptions { queues: 2, queue_size: 64, event_idx, notify, ..Default::default() };
        let client = Client::connect(daemon.socket(), options);
        // Only reads and writes, as deep as it goes: each kill leaves many in flight.
        let mix = Mix { discards: 0, zeroes: 0, flushes: 0, depth_max: 64, ..Mix::default() };
        let mut traffic = Traffic::new(client, seed, mix);
        traffic.backing = Some(workspace.path("disk.img"));
        let mut in_flight = 0;
        for _ in 0..10 {
            traffic.run(300);
            in_flight += traffic.client.outstanding();
            kill_in_flight(&mut traffic, &mut daemon);
            traffic.quiesce();
        }
        assert!(in_flight > 0, "nothing was in flight at any kill");
        traffic.verify(0..traffic.model.sectors());
        daemon.stop();
    }
}

#[test]
fn a_server_killed_again_while_it_recovers_loses_nothing() {
    let seed = Rng::seed_from_env("PCACHE_SEED");
    let workspace = Workspace::new();
    let mut daemon = Daemon::cached(&workspace, "64MiB", 256 * MIB, 2, &[]);
    let client = Client::connect(daemon.socket(), ClientOptions { queues: 2, ..Default::default() });
    let mut traffic = Traffic::new(client, seed, Mix::default());
    traffic.backing = Some(workspace.path("disk.img"));
    for _ in 0..8 {
        traffic.run(500);
        daemon.kill();
        for _ in 0..traffic.rng.between(1, 4) {
            daemon.spawn();
            std::thread::sleep(Duration::from_micros(traffic.rng.below(20_000)));
            daemon.kill();
        }
        daemon.restart();
        traffic.client.reconnect();
        // And again while the requests that were in flight are replayed.
        if traffic.rng.chance(50) {
            kill_in_flight(&mut traffic, &mut daemon);
        }
    }
    traffic.quiesce();
    traffic.verify(0..traffic.model.sectors());
    daemon.stop();
}

#[test]
fn the_smallest_cache_serves_256_started_queues() {
    let seed = Rng::seed_from_env("PCACHE_SEED");
    let workspace = Workspace::new();
    let mut daemon = Daemon::cached(&workspace, "64MiB", 512 * MIB, 256, &[]);
    let options =
        ClientOptions { queues: 256, queue_size: 128, mem_size: 1024 * MIB, ..ClientOptions::default() };
    let client = Client::connect(daemon.socket(), options);
    let mix = Mix { depth_max: 4, ..Mix::default() };
    let mut traffic = Traffic::new(client, seed, mix);
    traffic.backing = Some(workspace.path("disk.img"));
    traffic.run((operations() / 20).max(8000));
    kill_in_flight(&mut traffic, &mut daemon);
    traffic.run((operations() / 40).max(4000));
    traffic.quiesce();
    traffic.verify(0..traffic.model.sectors());
    daemon.stop();
    assert!(Daemon::counter(&daemon.read_life(), "reclaimed") > Some(0), "the cache was never full");
}
