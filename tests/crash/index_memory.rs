//! The bound on the index's RAM: single sectors cost the most, and are what is measured.

use pcache_vhost::cache::{Mode, Order};
use pcache_vhost::pmem::MediaClass::AssumeDax;
use pcache_vhost::sim::{Rng, Scene, SimBuffer, Style};
use pcache_vhost::volume::{RequestKind, Status};

/// Sectors of the disk: 16 MiB, all of which fits the cache.
const SECTORS: u64 = 32 << 10;
/// Segments of 64 KiB: with single sectors as payload, each needs as much again for its keys.
const SEGMENTS: u32 = 700;

/// A guest that writes single sectors everywhere, every second one, so that none goes on from another. The
/// most that the index took, after half of them, and how many sectors are cached at the end.
fn write_sectors(max: u64) -> (u64, u64) {
    let style =
        Style { mode: Mode::Writeback, order: Order::Relaxed, write_cache: true, pass_discard: false };
    let mut scene = Scene::sized(AssumeDax, style, SEGMENTS, SECTORS);
    scene.machine.cache.set_index_memory_max(max);
    let mut rng = Rng::new(7);
    let mut order: Vec<u64> = (0..SECTORS / 2).map(|n| n * 2).collect();
    for at in (1..order.len()).rev() {
        order.swap(at, rng.below(at as u64 + 1) as usize);
    }
    let mut most = 0;
    for (done, &sector) in order.iter().enumerate() {
        let data = SimBuffer::of_write(0, sector, 1, 9000);
        assert_eq!(scene.request_in_time(RequestKind::Write, sector, data), Some(Status::Ok));
        if done % 64 == 0 {
            scene.work(4);
            if done > order.len() / 2 {
                most = most.max(scene.machine.cache.index_memory_bytes());
            }
        }
    }
    for &sector in order.iter().step_by(97) {
        assert_eq!(scene.read(sector), 9000, "sector {sector}");
    }
    (most, scene.machine.served[0].volume.counters().cached_bytes / 512)
}

#[test]
fn reclaim_begins_earlier_where_the_index_is_bounded_and_the_cache_still_serves() {
    let (free, all) = write_sectors(0);
    let per_sector = free as f64 / all as f64;
    println!("512-byte writes: {all} sectors cached, index {free} bytes, {per_sector:.1} a sector");
    assert_eq!(all, SECTORS / 2, "without a bound all of them are cached");
    for max in [free * 3 / 4, free / 2] {
        let (most, cached) = write_sectors(max);
        println!("bounded to {max} bytes: {most} at most, {cached} sectors cached");
        assert!(most <= max + max / 8, "{most} bytes, bounded to {max}");
        assert!(cached > all / 4 && cached < all, "{cached} sectors are cached");
    }
}
