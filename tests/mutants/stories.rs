//! Stories for what chance takes long to reach: few steps, every outcome known. A story panics where
//! the engine is wrong, and counts the images it made.

use std::sync::Arc;

use pcache_vhost::cache::{Mode, Order, recover_backing};
use pcache_vhost::pmem::MediaClass::{AssumeDax, PageCache};
use pcache_vhost::sim::{
    DiskSurvival, Machine, Rng, Scene, SimBacking, SimBuffer, Style, Survival, World, run_seed,
};
use pcache_vhost::volume::{RequestKind, Status};

fn served(mode: Mode) -> Style {
    Style { mode, order: Order::Strict, write_cache: true, pass_discard: false }
}

/// What was read once stays, although the disk has lost the bytes that the cache was filled from.
pub fn a_fill_and_the_disk_that_loses_its_bytes(images: &mut u64) {
    for mode in [Mode::Writethrough, Mode::Writearound] {
        let mut scene = Scene::new(AssumeDax, served(mode));
        scene.write(8, 8, 900);
        assert_eq!(scene.read(8), 900);
        scene.host_crash(Survival::Everything, DiskSurvival::Nothing);
        *images += 1;
        assert_eq!(scene.read(8), scene.on_disk(8), "the cache outlived the disk under it");
    }
}

/// An epoch goes to the disk in parts; wherever the daemon is killed on the way, and starts again, disk
/// and redo area are one moment of the guest's, and never an earlier one than before.
pub fn an_epoch_in_parts(images: &mut u64) {
    const BLOCKS: [u64; 9] = [0, 1, 2, 0, 3, 4, 5, 6, 7];
    for kill in 0..80 {
        let mut scene = Scene::new(AssumeDax, Style { order: Order::Grouped, ..served(Mode::Writeback) });
        for (block, value) in BLOCKS.iter().zip(900..) {
            scene.write(block * 8, 8, value);
        }
        let (mut steps, mut newest) = (0, 0);
        while !scene.machine.served[0].volume.is_clean() {
            steps += 1;
            assert!(steps < 2000, "write-back never ends");
            scene.machine.clock.advance(500);
            scene.machine.writeback(0);
            if steps == kill {
                scene.daemon_crash();
            }
            let alone = disk_alone(&scene);
            *images += 1;
            let shown = alone.iter().copied().filter(|value| *value >= 900).max().unwrap_or(0);
            for (block, value) in alone.iter().enumerate() {
                let writes = BLOCKS.iter().zip(900..=shown).filter(|(b, _)| **b == block as u64);
                let expected = writes.map(|(_, value)| value).max().unwrap_or(block as u64 * 8 + 1);
                assert_eq!(*value, expected, "block {block} beside write {shown}: no moment of the guest's");
            }
            assert!(shown >= newest, "the disk went back, from write {newest} to {shown}");
            newest = shown;
        }
        assert_eq!(newest, 908, "all of it is there");
    }
}

/// What the first eight blocks hold with the cache lost now, and the redo area applied.
fn disk_alone(scene: &Scene) -> Vec<u64> {
    let world = World::new(scene.world.photograph("the cache is lost").daemon_crash(&mut Rng::new(1)), 1);
    let backing = |number| SimBacking::new(&world, number);
    recover_backing(Arc::new(backing(1)), &backing(0), false).expect("a legal area");
    (0..8).map(|block| world.with(|w| w.disks[0].value(block * 8))).collect()
}

/// A write whose record cannot be stored where it was to go is stored elsewhere, or fails and leaves
/// what it would have replaced.
pub fn a_record_that_the_media_refuses(images: &mut u64) {
    for class in [AssumeDax, PageCache] {
        let mut scene = Scene::new(class, served(Mode::Writeback));
        scene.write(8, 8, 900);
        scene.flush();
        // Of the segment in use the pages of the next records are gone, not those of the payload.
        let geometry = scene.machine.cache.geometry();
        let end = geometry.segment(0) + u64::from(geometry.data_end());
        scene.world.with(|w| w.memory.poison(end - 8192..end));
        let (status, _) = scene.request(RequestKind::Write, 8, SimBuffer::of_write(0, 8, 8, 901));
        scene.world.with(|w| w.memory.heal());
        let lasting = if status == Status::Ok { 901 } else { 900 };
        scene.daemon_crash();
        *images += 1;
        assert_eq!(scene.read(8), lasting, "{class}: the write ended with {status:?}");
    }
}

/// What the cache may still lose is not on the disk.
pub fn the_disk_ahead_of_the_cache(images: &mut u64) {
    let mut scene = Scene::new(PageCache, served(Mode::Writeback));
    scene.write(8, 8, 900);
    scene.flush();
    scene.drain();
    scene.write(8, 8, 901);
    scene.write_back(false, |s| s.on_disk(8) == 901);
    scene.host_crash(Survival::Nothing, DiskSurvival::Everything);
    *images += 1;
    assert_eq!(scene.read(8), scene.on_disk(8), "a clean copy is older than the disk");
}

/// The host dies while the tail moves: what was clean stays so, also where newer bytes went around the
/// cache since.
pub fn a_tail_torn_while_it_moves(images: &mut u64) {
    for n in 0.. {
        let mut scene = Scene::new(AssumeDax, served(Mode::Writeback));
        scene.write(8, 8, 900);
        scene.drain();
        scene.style = served(Mode::Writearound);
        scene.daemon_crash();
        scene.write(8, 8, 901);
        scene.flush();
        // A fill: the next round moves the tail over it.
        assert_eq!(scene.read(100), 101);
        let Some(photo) = scene.cut(n, Scene::drain) else { break };
        for tear in 1..6 {
            let (image, _) = photo.host_crash(&Survival::Torn, DiskSurvival::Nothing, &mut Rng::new(tear));
            scene.start(image);
            *images += 1;
            assert_eq!(scene.read(8), 901, "older bytes are back after a crash before event {n}");
        }
    }
}

/// A segment whose header was lost with the host is opened again over records that were not.
pub fn a_segment_opened_twice(images: &mut u64) {
    let mut scene = Scene::new(PageCache, served(Mode::Writeback));
    // Three records: what the next life fills and writes goes over the first two.
    scene.write(24, 1, 898);
    scene.write(32, 1, 899);
    scene.write(8, 1, 900);
    let photo = scene.world.photograph("an open segment, nothing durable");
    for mask in 0..1u64 << photo.memory.pending_lines() {
        let (image, _) = photo.host_crash(&Survival::Lines(mask), DiskSurvival::Nothing, &mut Rng::new(1));
        scene.start(image);
        let first = scene.read(8);
        scene.write(16, 1, 901);
        scene.flush();
        scene.host_crash(Survival::Nothing, DiskSurvival::Nothing);
        *images += 2;
        assert_eq!(scene.read(8), first, "what was read once has changed");
    }
}

/// A daemon dies before it can say that a `sync` has failed, and the next in the middle of its start:
/// the one after that has what was acknowledged, or does not serve.
pub fn a_failed_sync_that_nobody_tells(images: &mut u64) {
    for seed in 0..8 {
        let mut scene = Scene::new(PageCache, served(Mode::Writeback));
        (0..seed).for_each(|_| scene.world.with(|w| _ = w.rng.next()));
        scene.write(8, 8, 900);
        scene.submit(RequestKind::Flush, 0, SimBuffer::default());
        scene.world.with(|w| w.faults.sync = 10_000);
        scene.machine.sync();
        let image = scene.world.photograph("untold").daemon_crash(&mut Rng::new(seed));
        for n in 0.. {
            let world = World::new(image.clone(), seed);
            world.with(|w| w.cuts.at = n + 1);
            drop(Machine::open(&world, &[scene.style], 1));
            let Some((_, photo)) = world.take_cuts().pop() else { break };
            let world = World::new(photo.daemon_crash(&mut Rng::new(n)), seed);
            *images += 1;
            let Ok(mut machine) = Machine::open(&world, &[scene.style], 1) else { continue };
            let values = machine.read_all(0).expect("it serves what it recovered");
            assert_eq!(values[8], 900, "after recovery cut before event {n}: an acknowledged write is lost");
            let photo = world.photograph("served");
            let (after, _) = photo.host_crash(&Survival::Nothing, DiskSurvival::Nothing, &mut Rng::new(seed));
            let machine = Machine::open(&World::new(after, seed), &[scene.style], 1);
            let values = machine.and_then(|mut m| m.read_all(0)).expect("what was served is durable");
            assert_eq!(values[8], 900, "after recovery cut before event {n}: what was served is lost");
        }
    }
}

/// Liveness words that hardware has put back to what they once were: what went around the cache since
/// is not hidden by the copy that died.
pub fn liveness_words_put_back(images: &mut u64) {
    let mut scene = Scene::new(AssumeDax, served(Mode::Writeback));
    scene.write(8, 8, 900);
    scene.drain();
    scene.style = served(Mode::Writearound);
    scene.daemon_crash();
    let geometry = scene.machine.cache.geometry();
    let words = |id| geometry.segment(id) as usize + geometry.liveness_offset() as usize;
    let len = geometry.liveness_words() as usize * 8;
    let early = scene.world.photograph("the copy lives").memory;
    scene.write(8, 8, 901);
    scene.flush();
    for id in 0..geometry.segment_count {
        let mut image = scene.world.photograph("the copy is dead").daemon_crash(&mut Rng::new(1));
        let (old, now) = (early.copy(words(id), len), image.memory.copy(words(id), len));
        image.memory.corrupt(words(id), |bytes| bytes[..len].copy_from_slice(&old));
        *images += u64::from(old != now);
        let mut machine =
            Machine::open(&World::new(image, 1), &[scene.style], 1).expect("clean data is at stake");
        assert_eq!(machine.read_all(0).expect("nothing is lost")[8], 901, "words of segment {id}");
    }
    assert!(*images > 0, "no word has changed");
}

/// A clean block that rots, is read no more, and is worth keeping: what reclaim carries is the block or
/// nothing.
pub fn a_block_that_rots_before_it_is_relocated(images: &mut u64) {
    for class in [AssumeDax, PageCache] {
        let mut scene = Scene::sized(class, served(Mode::Writeback), 16, 4096);
        scene.write(0, 8, 900);
        scene.drain();
        assert_eq!(scene.read(3), 900);
        let mut at = 0;
        scene.machine.served[0].volume.for_each_extent(|e| at = e.place.position as usize * 512);
        scene.world.with(|w| w.memory.corrupt(at, |bytes| bytes[3 * 512 + 7] ^= 1));
        let relocated = |scene: &Scene| {
            let counters = scene.machine.served[0].volume.counters();
            counters.relocated_sectors > 0 || counters.checksum_errors > 0
        };
        for i in 0..2000 {
            if relocated(&scene) {
                break;
            }
            scene.write(64 + i % 500 * 8, 8, 1000 + i);
            if i % 8 == 7 {
                scene.drain();
                (0..8).for_each(|_| scene.machine.step_all());
            }
        }
        assert!(relocated(&scene), "{class}: the block has met no reclaim");
        *images += 1;
        assert_eq!(scene.read(3), 900, "{class}");
    }
}

/// A header of a redo area that a kill has torn, and a later one torn by a power cut. By its seed: it takes
/// two cuts within two pages, and chance that keeps the right sectors of each.
pub fn a_header_torn_twice(images: &mut u64) {
    match run_seed(958, 1200, 0) {
        Ok(stats) => *images += stats.images,
        Err(violation) => panic!("{violation}"),
    }
}
