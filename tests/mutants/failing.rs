//! Stories of disks that fail and of caches that rot: few steps, every outcome known. A story panics where
//! the engine is wrong, and counts the images it made.

use pcache_vhost::cache::index::Extent;
use pcache_vhost::cache::{Mode, OnBackingError, Order, ScrubOptions};
use pcache_vhost::pmem::MediaClass::{AssumeDax, PageCache};
use pcache_vhost::sim::timed::{DiskModel, Fleet, Member};
use pcache_vhost::sim::{DiskSurvival, Scene, SimBuffer, Style, Survival};
use pcache_vhost::volume::{RequestKind, Status};

fn served(mode: Mode) -> Style {
    Style { mode, order: Order::Strict, write_cache: true, pass_discard: false }
}

fn scrubbed(scene: &Scene) {
    scene.machine.cache.set_scrub(ScrubOptions { bytes_per_s: 1 << 40, interval_ms: 0 });
}

fn extents(scene: &Scene) -> Vec<Extent> {
    let mut all = Vec::new();
    scene.machine.served[0].volume.for_each_extent(|e| all.push(e));
    all.retain(|e| !e.place.zero);
    all
}

/// Damages the first block that the volume shows, and says where it was.
fn rot(scene: &Scene) -> Extent {
    let victim = extents(scene)[0];
    let at = victim.place.position as usize * 512;
    scene.world.with(|w| w.memory.corrupt(at, |bytes| bytes[7] ^= 1));
    victim
}

/// A FLUSH that the disk failed has lost what was before it; nobody is told that it has not.
pub fn a_flush_that_failed(images: &mut u64) {
    let mut scene = Scene::new(AssumeDax, served(Mode::Writearound));
    scene.write(8, 8, 900);
    scene.world.with(|w| (w.faults.flush, w.faults.lossy) = (10_000, 1));
    let tag = scene.submit(RequestKind::Flush, 0, SimBuffer::default());
    let mut status = None;
    for step in 0..200 {
        if step == 100 {
            scene.world.with(|w| w.faults.flush = 0);
        }
        scene.machine.clock.advance(100);
        scene.machine.step_all();
        let done = scene.machine.poll(0, 0);
        status = status.or(done.into_iter().find(|done| done.tag == tag).map(|done| done.status));
    }
    *images += 1;
    let status = status.expect("a FLUSH ends");
    scene.host_crash(Survival::Everything, DiskSurvival::Nothing);
    let kept = scene.read(8) == 900;
    assert!(kept || status == Status::IoError, "a FLUSH ended well and what was before it is gone");
}

/// A write around the cache that is late has not ended: what overlaps it waits. The disk panics else.
pub fn a_late_write(images: &mut u64) {
    let mut scene = Scene::new(AssumeDax, served(Mode::Writearound));
    scene.machine.served[0].volume.set_on_backing_error(OnBackingError::Error, 1000);
    scene.world.with(|w| w.faults.hung = 1);
    let first = SimBuffer::of_write(0, 8, 8, 900);
    assert_eq!(scene.request_in_time(RequestKind::Write, 8, first), Some(Status::IoError));
    scene.submit(RequestKind::Write, 8, SimBuffer::of_write(0, 8, 8, 901));
    scene.world.with(|w| w.faults.hung = 0);
    *images += 1;
    assert_eq!(scene.request_in_time(RequestKind::Read, 100, SimBuffer::to_read(8)), Some(Status::Ok));
}

/// What rots while nobody reads it is found.
pub fn damage_that_nobody_reads(images: &mut u64) {
    let mut scene = Scene::new(AssumeDax, served(Mode::Writeback));
    scene.write(8, 8, 900);
    scene.drain();
    rot(&scene);
    scrubbed(&scene);
    scene.work(200);
    *images += 1;
    let counters = scene.machine.served[0].volume.counters();
    assert_eq!(counters.scrub_healed_sectors, 8, "damage was passed over");
}

/// Damaged dirty data is never answered with the disk's older bytes, whoever found the damage.
pub fn damage_to_dirty_data(images: &mut u64) {
    let mut scene = Scene::new(AssumeDax, served(Mode::Writeback));
    scene.write(8, 8, 900);
    rot(&scene);
    scrubbed(&scene);
    for _ in 0..50 {
        scene.machine.clock.advance(10);
        scene.machine.housekeeper();
    }
    *images += 1;
    let (status, data) = scene.request(RequestKind::Read, 8, SimBuffer::to_read(1));
    assert_eq!(status, Status::IoError, "lost data reads as write {:?}", data.values(0, 8));
}

/// What was healed stays healed.
pub fn a_healing_that_does_not_last(images: &mut u64) {
    let mut scene = Scene::new(PageCache, served(Mode::Writeback));
    scene.write(8, 8, 900);
    scene.flush();
    scene.drain();
    // So that its record is witnessed durably: else recovery drops it for a torn one.
    for i in 0..4 {
        scene.write(300, 8, 901 + i);
        scene.flush();
        scene.machine.step_all();
    }
    scene.work(50);
    let victim = rot(&scene);
    scrubbed(&scene);
    for _ in 0..300 {
        // No `sync`.
        scene.machine.clock.advance(10);
        scene.machine.housekeeper();
        if scene.machine.served[0].volume.counters().scrub_healed_sectors > 0 {
            break;
        }
    }
    let is_told = scene.machine.served[0].volume.counters().scrub_healed_sectors > 0;
    scene.host_crash(Survival::Nothing, DiskSurvival::Nothing);
    *images += 1;
    let is_back = extents(&scene).iter().any(|e| e.place.position == victim.place.position);
    assert!(!is_told || !is_back, "a damaged copy is back after it was told to be healed");
}

/// Scrubbing keeps to its rate.
pub fn a_scrub_in_haste(images: &mut u64) {
    let member = Member {
        model: DiskModel::NETWORK,
        blocks: 1024,
        mode: Mode::Writeback,
        order: Order::Relaxed,
        depth: 4,
        write_percent: 90,
        request_us: 1000,
    };
    let mut fleet = Fleet::new(1, 48, &[member]);
    fleet.run(3000);
    fleet.quiesce(1000);
    fleet.set_depth(0, 0);
    let began_us = fleet.clock.us();
    fleet.scrub(ScrubOptions { bytes_per_s: 1 << 20, interval_ms: 0 });
    for _ in 0..30 {
        fleet.run(50);
        let (bytes, us) = (fleet.cache.scrub_status().bytes, fleet.clock.us() - began_us);
        assert!(bytes < (us + 2_500_000) * (1 << 20) / 1_000_000, "{bytes} bytes read in {us} µs");
    }
    *images += 1;
    assert!(fleet.cache.scrub_status().bytes > 0);
}
