//! Relocation: what reclaim carries to another segment is there afterwards, once and unchanged,
//! whenever the host or the daemon dies; and it pays.

use pcache_vhost::cache::worker::Progress;
use pcache_vhost::cache::{Counters, Mode, Order};
use pcache_vhost::pmem::MediaClass::{self, AssumeDax, PageCache};
use pcache_vhost::sim::{DiskSurvival, Faults, Rng, Scene, SimBuffer, Snapshot, Style, Survival};
use pcache_vhost::volume::{RequestKind, Status};

const CLASSES: [MediaClass; 2] = [AssumeDax, PageCache];
/// A disk that takes nothing.
fn broken() -> Faults {
    Faults { write: 10_000, flush: 10_000, ..Faults::default() }
}

fn style(order: Order) -> Style {
    Style { mode: Mode::Writeback, order, write_cache: true, pass_discard: false }
}

fn counters(scene: &Scene) -> Counters {
    scene.machine.served[0].volume.counters()
}

/// Writes a block and lets the workers go on, as far as they come.
fn write(scene: &mut Scene, block: u64, value: u64) {
    let tag = scene.submit(RequestKind::Write, block * 8, SimBuffer::of_write(0, block * 8, 8, value));
    for _ in 0..2000 {
        scene.machine.clock.advance(100);
        (0..4).for_each(|_| scene.machine.step_all());
        if scene.machine.poll(0, 0).iter().any(|d| d.tag == tag) {
            return;
        }
    }
    panic!("the write of block {block} never ends: {:?}", counters(scene));
}

/// Lets the housekeeper and `sync`s go on until they have nothing to do.
fn keep_house(scene: &mut Scene) {
    loop {
        let did = scene.machine.housekeeper();
        if !scene.machine.sync() && did == Progress::Idle {
            return;
        }
    }
}

fn break_disk(scene: &Scene, faults: Faults) {
    scene.world.with(|w| w.faults = faults);
}

#[test]
fn what_guests_read_outlives_reclaim_and_dropping_first_in_first_out_loses_it() {
    for class in CLASSES {
        let misses = [true, false].map(|relocates| {
            let mut scene = Scene::sized(class, style(Order::Strict), 16, 8192);
            scene.machine.relocate(relocates);
            let hot = 0..10;
            for block in hot.clone() {
                write(&mut scene, block, 9000 + block);
            }
            let mut misses = 0;
            for lap in 0..100 {
                for block in 0..8 {
                    write(&mut scene, 16 + (lap * 8 + block) % 900, lap * 8 + block + 10_000);
                }
                scene.flush();
                scene.drain();
                keep_house(&mut scene);
                let before = counters(&scene).read_miss_sectors;
                for block in hot.clone() {
                    assert_eq!(scene.read(block * 8 + 3), 9000 + block, "{class}");
                }
                misses += counters(&scene).read_miss_sectors - before;
            }
            let counters = counters(&scene);
            assert!(counters.reclaimed > 50, "{class}: {counters:?}");
            assert_eq!(counters.relocated_sectors > 0, relocates, "{class}: {counters:?}");
            misses
        });
        assert!(misses[0] * 10 < misses[1], "{class}: {misses:?}");
    }
}

/// Fills a cache far beyond its size with overwritten blocks, each segment pinned by one that is not.
fn pinned(class: MediaClass, order: Order, writes: u64) -> Scene {
    let mut scene = Scene::sized(class, style(order), 16, 1024);
    break_disk(&scene, broken());
    for i in 0..writes {
        write(&mut scene, pinned_block(i), 10_000 + i);
    }
    scene
}

/// The block of a write of `pinned`: every eleventh is to one that is seldom overwritten.
fn pinned_block(i: u64) -> u64 {
    if i.is_multiple_of(11) { 64 + i / 11 % 24 } else { i % 11 }
}

/// What block `block` reads as after `pinned`.
fn last_value(block: u64, writes: u64) -> u64 {
    let last = (0..writes).rev().find(|&i| pinned_block(i) == block);
    last.map_or(block * 8 + 1, |i| 10_000 + i)
}

#[test]
fn dirty_remains_of_dead_segments_do_not_pin_them_while_the_disk_is_down() {
    for class in CLASSES {
        // Ten times what the cache holds.
        let writes = 2000;
        let mut scene = pinned(class, Order::Relaxed, writes);
        let after = counters(&scene);
        assert!(after.relocated_dirty_sectors > 0 && after.reclaimed > 100, "{class}: {after:?}");
        assert_eq!(after.written_back_sectors, 0, "{class}");
        scene.flush();
        let blocks: Vec<u64> = (1..11).chain(64..88).collect();
        for crash in 0..3 {
            for &block in &blocks {
                let read = scene.read(block * 8 + block % 8);
                assert_eq!(read, last_value(block, writes), "{class} crash {crash} block {block}");
            }
            match crash {
                0 => scene.daemon_crash(),
                1 => scene.host_crash(Survival::Nothing, DiskSurvival::Nothing),
                _ => {}
            }
        }
        scene.drain();
        for block in blocks {
            assert_eq!(scene.on_disk(block * 8), last_value(block, writes), "{class} block {block}");
        }
    }
}

#[test]
fn in_strict_order_a_segment_with_superseded_versions_of_older_epochs_is_left_alone() {
    for class in CLASSES {
        let mut scene = Scene::sized(class, style(Order::Strict), 16, 1024);
        break_disk(&scene, broken());
        let mut tags = Vec::new();
        for i in 0..400 {
            let block = i % 7;
            tags.push(scene.submit(
                RequestKind::Write,
                block * 8,
                SimBuffer::of_write(0, block * 8, 8, 10_000 + i),
            ));
            scene.submit(RequestKind::Flush, 0, SimBuffer::default());
            scene.machine.clock.advance(100);
            for _ in 0..4 {
                scene.machine.step_all();
                let done = scene.machine.poll(0, 0);
                tags.retain(|tag| !done.iter().any(|d| d.tag == *tag));
            }
        }
        let stuck = counters(&scene);
        assert!(!tags.is_empty(), "{class}: the cache should be full of versions that are needed");
        break_disk(&scene, Faults::default());
        for _ in 0..10_000 {
            scene.machine.clock.advance(100);
            scene.machine.step_all();
            let done = scene.machine.poll(0, 0);
            tags.retain(|tag| !done.iter().any(|d| d.tag == *tag));
            let disk: Vec<u64> = (0..7).map(|block| scene.on_disk(block * 8)).collect();
            let (low, high) = (disk.iter().min().unwrap(), disk.iter().max().unwrap());
            // One write an epoch, until the cache was full: the disk never shows one and misses an
            // earlier one.
            let is_one_an_epoch = *high < 10_000 + stuck.records - 16;
            assert!(*low < 10_000 || high - low < 7 || !is_one_an_epoch, "{class}: {disk:?}");
            if tags.is_empty() && scene.machine.served[0].volume.is_clean() {
                break;
            }
        }
        assert!(tags.is_empty(), "{class}");
        assert_eq!(scene.on_disk(0), 10_399, "{class}");
    }
}

#[test]
fn a_round_that_waits_for_the_disk_finds_what_was_relocated_meanwhile() {
    for class in CLASSES {
        let mut scene = Scene::sized(class, style(Order::Relaxed), 64, 4096);
        // Cold blocks far apart, so that each is an operation of its own, and more than a round has
        // under way; between them two that are overwritten.
        let cold = |i: u64| 64 + 3 * i;
        for i in 0..42 {
            for (block, value) in [(i % 2, 20_000 + i), (cold(i), 10_000 + i)] {
                let data = SimBuffer::of_write(0, block * 8, 8, value);
                assert_eq!(scene.request(RequestKind::Write, block * 8, data).0, Status::Ok);
                keep_house(&mut scene);
            }
        }
        scene.flush();
        break_disk(&scene, Faults { hung: 1, ..Faults::default() });
        // The sources are freed and written over while the disk does not answer.
        for i in 0..1500 {
            let block = if i % 3 == 0 { 200 + i / 3 % 180 } else { 500 + i % 10 };
            write(&mut scene, block, 30_000 + i);
        }
        let waiting = counters(&scene);
        assert!((30..40).contains(&waiting.writeback_ops), "{class}: the round stands still: {waiting:?}");
        assert!(waiting.relocated_dirty_sectors > 100, "{class}: {waiting:?}");
        break_disk(&scene, Faults::default());
        scene.drain();
        for i in 0..42 {
            assert_eq!(scene.on_disk(cold(i) * 8 + 5), 10_000 + i, "{class}");
        }
        let after = counters(&scene);
        assert_eq!((after.checksum_errors, after.writeback_errors, after.dirty_bytes), (0, 0, 0), "{class}");
    }
}

/// A cache in which the housekeeper relocates as soon as some more is written, dirty data or what was
/// read; and what its sectors read as.
fn about_to_relocate(class: MediaClass, order: Order, dirty: bool) -> (Scene, Vec<(u64, u64)>) {
    if dirty {
        let writes = 600;
        let mut scene = pinned(class, order, writes);
        scene.flush();
        let blocks = (1..11).chain(64..88);
        return (scene, blocks.map(|b| (b * 8, last_value(b, writes))).collect());
    }
    let mut scene = Scene::sized(class, style(order), 16, 1024);
    for block in 0..100 {
        write(&mut scene, block, 10_000 + block);
    }
    scene.flush();
    scene.drain();
    for block in (0..100).step_by(3) {
        scene.read(block * 8);
    }
    (scene, (0..100).map(|b| (b * 8, 10_000 + b)).collect())
}

fn assert_reads(scene: &mut Scene, values: &[(u64, u64)], context: &str) {
    for &(sector, value) in values {
        assert_eq!(scene.read(sector), value, "{context}: sector {sector}");
    }
}

#[test]
fn a_crash_anywhere_in_a_relocation_leaves_one_of_two_copies() {
    for (class, order, dirty) in [
        (AssumeDax, Order::Strict, false),
        (AssumeDax, Order::Relaxed, true),
        (PageCache, Order::Strict, false),
        (PageCache, Order::Relaxed, true),
    ] {
        let (mut cuts, mut relocated, mut step) = (0, 0, 1);
        loop {
            let context = format!("{class} {order} dirty {dirty}, cut {cuts}");
            let (mut scene, values) = about_to_relocate(class, order, dirty);
            let mut act = |scene: &mut Scene| {
                let before = counters(scene).relocated_sectors;
                for i in 0..30 {
                    write(scene, 110 + i % 5, 40_000 + i);
                }
                keep_house(scene);
                relocated = counters(scene).relocated_sectors - before;
            };
            let Some(image) = scene.cut(cuts, &mut act) else { break };
            judge_cut(&mut scene, &image, cuts, &values, &context);
            cuts += step;
            step = 1 + cuts / 40;
        }
        assert!(relocated > 0, "{class} {order} dirty {dirty}: nothing was relocated in {cuts} cuts");
    }
}

/// Both kinds of crash at `image`, another right after, and then the disk alone.
fn judge_cut(scene: &mut Scene, image: &Snapshot, cut: u64, values: &[(u64, u64)], context: &str) {
    let mut rng = Rng::new(cut);
    for survival in [Survival::Nothing, Survival::Everything, Survival::Random, Survival::Torn] {
        let (state, _) = image.host_crash(&survival, DiskSurvival::Completed, &mut rng);
        scene.start(state);
        assert_reads(scene, values, &format!("{context}, {survival:?}"));
        scene.host_crash(Survival::Nothing, DiskSurvival::Nothing);
        assert_reads(scene, values, &format!("{context}, {survival:?}, and again"));
    }
    scene.start(image.daemon_crash(&mut rng));
    assert_reads(scene, values, &format!("{context}, daemon"));
    scene.drain();
    for &(sector, value) in values {
        assert_eq!(scene.on_disk(sector), value, "{context}: sector {sector} of the disk");
    }
    assert_eq!(
        counters(scene).dirty_bytes,
        0,
        "{context}: of two copies the one the index shows turns clean"
    );
}

#[test]
fn damaged_data_is_not_given_a_fresh_checksum() {
    for class in CLASSES {
        let mut scene = Scene::sized(class, style(Order::Strict), 16, 8192);
        for block in 0..10 {
            write(&mut scene, block, 9000 + block);
        }
        scene.flush();
        scene.drain();
        for block in 0..3 {
            scene.read(block * 8);
        }
        let mut damaged = 0;
        scene.machine.served[0].volume.for_each_extent(|extent| {
            if extent.range.start < 80 {
                let at = extent.place.position as usize * 512;
                scene.world.with(|w| w.memory.corrupt(at & !63, |bytes| bytes[7] ^= 4));
                damaged += 1;
            }
        });
        assert!(damaged > 0);
        for i in 0..400 {
            write(&mut scene, 16 + i % 900, 10_000 + i);
        }
        let after = counters(&scene);
        assert!(after.reclaimed > 10 && after.checksum_errors > 0, "{class}: {after:?}");
        for block in 0..10 {
            assert_eq!(scene.read(block * 8), 9000 + block, "{class}: from the disk");
        }
    }
}

/// Reads `count` blocks by a zipf distribution over `blocks`; returns how many hit.
fn zipf_hits(relocates: bool, blocks: u64, count: u64) -> (u64, Counters) {
    let mut scene = Scene::sized(AssumeDax, style(Order::Strict), 24, blocks * 8);
    scene.machine.relocate(relocates);
    let mut sums = Vec::new();
    let mut sum = 0.0;
    for rank in 1..=blocks {
        sum += 1.0 / rank as f64;
        sums.push(sum);
    }
    let mut rng = Rng::new(7);
    // Rank and place have nothing to do with one another.
    let place = |rank: u64| rank * 1_000_003 % blocks;
    for i in 0..count {
        let at = rng.below(1 << 40) as f64 / (1u64 << 40) as f64 * sum;
        let block = place(sums.partition_point(|s| *s < at) as u64);
        match rng.chance(1, 10) {
            true => write(&mut scene, block, 100_000 + i),
            false => _ = scene.read(block * 8),
        }
        scene.machine.step_all();
    }
    let counters = counters(&scene);
    (counters.read_hits, counters)
}

#[test]
fn under_a_zipf_load_relocation_hits_more_often_than_dropping_first_in_first_out() {
    let (hits, with) = zipf_hits(true, 2003, 12_000);
    let (fifo, without) = zipf_hits(false, 2003, 12_000);
    let percent = |hits: u64, c: &Counters| 100.0 * hits as f64 / c.reads as f64;
    println!(
        "hit ratio {:.1} % with relocation, {:.1} % first in, first out; segments reclaimed {} and {}; \
         {} sectors relocated, {} evicted, {} filled",
        percent(hits, &with),
        percent(fifo, &without),
        with.reclaimed,
        without.reclaimed,
        with.relocated_sectors,
        with.evicted_sectors,
        with.fill_sectors
    );
    assert!(hits * 100 > fifo * 103, "{hits} against {fifo}");
    // Reclaim writes less than it frees.
    let freed = with.reclaimed * 96;
    assert!(with.relocated_sectors * 2 < freed, "{} relocated to free {freed}", with.relocated_sectors);
}
