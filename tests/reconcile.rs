//! Counters add up: a random hour of a guest in virtual time, a third of it in each order of write-back, and
//! every sum that the counters promise.
//!
//! ```text
//!  reads            = read_hits + read_misses              in requests
//!  sectors read     = read_hit + read_miss                 in sectors, as the guest counts them
//!  sectors written and discarded = dirtied                 in write-back mode
//!  dirtied          = cleaned + coalesced + discarded while dirty + lost + still dirty
//!  requests timed   = one in 31
//! ```
//!
//! And what a drain says of its end: from its first quarter on within a fifth of the truth.
//!
//! `PCACHE_SEED` repeats a run; `PCACHE_RECONCILE_S` makes it longer or shorter than an hour.

use pcache_vhost::cache::latency::{Histogram, Stage};
use pcache_vhost::cache::{Counters, Order};
use pcache_vhost::sim::Rng;
use pcache_vhost::sim::timed::{Ask, DiskModel, Guest, Lab, RandomWrites, RedoPlace, Setup};

/// A guest with a hot part and a cold one, that writes, reads, discards and flushes at moments of its own.
struct Busy {
    rng: Rng,
    sectors: u64,
    now_us: u64,
    until_us: u64,
    asked: Asked,
}

/// What was asked, as the guest counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Asked {
    reads: u64,
    read_sectors: u64,
    writes: u64,
    write_sectors: u64,
    discards: u64,
    discard_sectors: u64,
    flushes: u64,
}

impl Guest for Busy {
    fn next(&mut self, is_busy: &dyn Fn(u64, u64) -> bool) -> Option<(u64, Ask)> {
        // Bursts, and pauses in which write-back comes to an end.
        self.now_us +=
            if self.rng.chance(1, 500) { self.rng.below(4_000_000) } else { self.rng.below(9_000) };
        if self.now_us > self.until_us {
            return None;
        }
        if self.rng.chance(1, 40) {
            self.asked.flushes += 1;
            return Some((self.now_us, Ask::Barrier));
        }
        let (first, sectors) = loop {
            let longest = if self.rng.chance(1, 10) { 512 } else { 16 };
            let sectors = 1 + self.rng.below(longest);
            let part = if self.rng.chance(3, 4) { self.sectors / 32 } else { self.sectors - 512 };
            let first = self.rng.below(part);
            if !is_busy(first, sectors) {
                break (first, sectors);
            }
        };
        let ask = match self.rng.below(100) {
            0..55 => {
                self.asked.writes += 1;
                self.asked.write_sectors += sectors;
                Ask::Write { first, sectors }
            }
            55..95 => {
                self.asked.reads += 1;
                self.asked.read_sectors += sectors;
                Ask::Read { first, sectors }
            }
            _ => {
                self.asked.discards += 1;
                self.asked.discard_sectors += sectors;
                Ask::Discard { first, sectors }
            }
        };
        Some((self.now_us, ask))
    }
}

fn setup(order: Order, model: DiskModel, sectors: u64) -> Setup {
    let redo_sectors = sectors / 16;
    let redo = match order {
        Order::Grouped => RedoPlace::OtherDisk(redo_sectors),
        Order::Strict | Order::Relaxed => RedoPlace::None,
    };
    Setup { segment_size: 256 << 10, segments: 96, sectors, model, order, redo }
}

/// Every sum. `dirty_sectors`: what of it is dirty by the index.
fn reconcile(asked: &Asked, c: &Counters) -> Result<(), String> {
    let equal = |what: &str, one: u64, other: u64| {
        (one == other).then_some(()).ok_or_else(|| format!("{what}: {one} and {other}\n{asked:?}\n{c:?}"))
    };
    equal("reads asked and counted", asked.reads, c.reads)?;
    equal("reads are hits or misses", c.reads, c.read_hits + c.read_misses)?;
    equal("sectors read are hits or misses", asked.read_sectors, c.read_hit_sectors + c.read_miss_sectors)?;
    equal("writes asked and counted", asked.writes, c.writes)?;
    equal("sectors written asked and counted", asked.write_sectors, c.write_sectors)?;
    equal("discards asked and counted", asked.discards, c.discards)?;
    equal("sectors discarded asked and counted", asked.discard_sectors, c.discard_sectors)?;
    equal("flushes asked and counted", asked.flushes, c.flushes)?;
    equal("errors", c.errors, 0)?;
    equal(
        "what was written or discarded became dirty or went around",
        c.write_sectors + c.discard_sectors,
        c.dirtied_sectors + c.bypass_sectors,
    )?;
    let ended = c.cleaned_sectors + c.coalesced_sectors + c.discarded_dirty_sectors + c.lost_dirty_sectors;
    equal("what became dirty has ended or is dirty", c.dirtied_sectors, ended + c.dirty_bytes / 512)?;
    (c.written_back_sectors >= c.cleaned_sectors)
        .then_some(())
        .ok_or_else(|| format!("more became clean than was written back: {c:?}"))
}

fn samples(latencies: &[Histogram], stages: &[Stage]) -> u64 {
    stages.iter().map(|&stage| latencies[stage as usize].samples()).sum()
}

#[test]
fn after_a_random_hour_every_sum_is_right() {
    let seed = std::env::var("PCACHE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_121);
    let seconds: u64 =
        std::env::var("PCACHE_RECONCILE_S").ok().and_then(|text| text.parse().ok()).unwrap_or(3600);
    for order in [Order::Strict, Order::Relaxed, Order::Grouped] {
        println!("PCACHE_SEED={seed}, {order:?}, {seconds} s");
        let setup = setup(order, DiskModel::NETWORK, 96 << 11);
        let mut lab = Lab::new(&setup);
        let mut guest = Busy {
            rng: Rng::new(seed),
            sectors: setup.sectors,
            now_us: 0,
            until_us: seconds * 1_000_000 / 3,
            asked: Asked::default(),
        };
        let trail = lab.run(&mut guest, 16);
        assert_eq!(trail.failed, 0);
        let counters = lab.volume.counters();
        reconcile(&guest.asked, &counters).unwrap_or_else(|why| panic!("{order:?}, seed {seed}: {why}"));
        assert!(counters.dirty_bytes > 0 && counters.coalesced_sectors > 0, "{counters:?}");
        assert!(counters.discarded_dirty_sectors > 0 && counters.evicted_sectors > 0, "{counters:?}");

        let Asked { reads, writes, discards, flushes, .. } = guest.asked;
        let latencies = lab.volume.latencies();
        let timed =
            [Stage::ReadHit, Stage::ReadMiss, Stage::Write, Stage::WriteAround, Stage::Discard, Stage::Flush];
        assert_eq!(samples(&latencies, &timed), (reads + writes + discards + flushes).div_ceil(31));
        let gathered = samples(&latencies, &[Stage::Write, Stage::Discard]);
        assert_eq!(samples(&latencies, &[Stage::WriteWait]), gathered);
        assert!(samples(&latencies, &[Stage::WritebackWrite]) >= counters.writeback_ops);
        let disk = &latencies[Stage::DiskRead as usize];
        let mean_us = disk.sum_ns / disk.samples() / 1000;
        // The model's disk takes half a millisecond for an operation that waits for no other.
        assert!((400..400_000).contains(&mean_us), "a read of the disk took {mean_us} µs");

        lab.drain(10_000);
        let counters = lab.volume.counters();
        assert_eq!(counters.dirty_bytes, 0);
        reconcile(&guest.asked, &counters).unwrap_or_else(|why| panic!("{order:?}, seed {seed}: {why}"));
        lab.judge_disk().unwrap_or_else(|wrong| panic!("{order:?}, seed {seed}: {wrong}"));
    }
}

#[test]
fn a_wrong_sum_is_seen() {
    let asked = Asked { reads: 3, read_sectors: 24, writes: 2, write_sectors: 16, ..Asked::default() };
    let right = Counters {
        reads: 3,
        read_hits: 1,
        read_misses: 2,
        read_hit_sectors: 8,
        read_miss_sectors: 16,
        writes: 2,
        write_sectors: 16,
        dirtied_sectors: 16,
        coalesced_sectors: 8,
        dirty_bytes: 4096,
        ..Counters::default()
    };
    reconcile(&asked, &right).expect("it is right");
    for wrong in [
        Counters { read_hits: 2, ..right },
        Counters { read_hit_sectors: 7, ..right },
        Counters { dirtied_sectors: 15, ..right },
        Counters { coalesced_sectors: 0, ..right },
        Counters { cleaned_sectors: 8, ..right },
        Counters { dirty_bytes: 0, ..right },
        Counters { errors: 1, ..right },
    ] {
        assert!(reconcile(&asked, &wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn from_its_first_quarter_on_a_drain_knows_its_end_within_a_fifth() {
    let mut wrong = Vec::new();
    for (model, name) in [(DiskModel::NETWORK, "network"), (DiskModel::HARD_DISK, "hard disk")] {
        for order in [Order::Strict, Order::Relaxed, Order::Grouped] {
            for (barrier, restarts) in [(0, false), (64, false), (0, true), (64, true)] {
                let setup = setup(order, model, 96 << 11);
                let mut lab = Lab::new(&setup);
                // Half of what the cache holds, of which some is written twice.
                let blocks = u64::from(setup.segments) * u64::from(setup.segment_size) / 4096;
                let mut guest = RandomWrites::new(11, setup.sectors / 4, blocks / 2, barrier);
                lab.run(&mut guest, 32);
                let mut lab = if restarts { lab.restart() } else { lab };
                let began = lab.clock.us();
                let mut seen = Vec::new();
                lab.drain_noting(10_000, &mut |now, step| seen.push((now, step)));
                let took = (lab.clock.us() - began) as f64;
                let mut worst = 0f64;
                for (now, step) in seen {
                    let (elapsed, done) = ((now - began) as f64, step.total_bytes - step.dirty_bytes);
                    if elapsed * 4.0 >= took {
                        // As `drain` and the API tell it.
                        let whole = elapsed * step.total_bytes as f64 / done as f64;
                        worst = worst.max((whole / took - 1.0).abs());
                    }
                }
                let seconds = took / 1e6;
                println!(
                    "{name}, {order:?}, a FLUSH every {barrier}, restarted: {restarts}: {seconds:.2} s, off by {:.0} %",
                    worst * 100.0
                );
                // A group is journaled before it is written, and what one holds of what comes next differs. What
                // an earlier life has committed is applied from the area, which tells nothing until it has ended.
                let bound = match (order, restarts) {
                    (Order::Strict | Order::Relaxed, _) => 0.2,
                    (Order::Grouped, false) => 0.25,
                    (Order::Grouped, true) => f64::INFINITY,
                };
                if worst > bound {
                    wrong.push(format!("{name}, {order:?}, {barrier}, {restarts}: off by {worst:.2}"));
                }
                lab.judge_disk().unwrap_or_else(|wrong| panic!("{name}, {order:?}, {barrier}: {wrong}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
