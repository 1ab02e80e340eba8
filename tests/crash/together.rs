//! Consistency groups: with the cache lost at any instant, the disks of a VM stand at one common point.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use pcache_vhost::cache::Order;
use pcache_vhost::sim::{Scenario, Stats, run_seed};

/// Images of each order in the default run.
const IMAGES: u64 = 24_000;
const IMAGES_PER_SEED: u64 = 1200;

/// Runs seeds whose volumes are one group in `order`, on two threads, until `images` have been judged.
fn run(order: Order, images: u64) -> Stats {
    let fits = |seed: &u64| {
        let scenario = Scenario::from_seed(*seed);
        scenario.is_joint && scenario.styles[0].order == order
    };
    let (next, total) = (AtomicU64::new(super::number("PCACHE_SIM_FIRST").unwrap_or(1)), Mutex::default());
    let work = || {
        let is_done =
            |total: &Mutex<Stats>| total.lock().expect("no thread panicked with it").images >= images;
        while !is_done(&total) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if fits(&seed) {
                let stats = run_seed(seed, IMAGES_PER_SEED, super::trace_len());
                let stats = stats.unwrap_or_else(|violation| super::fail(violation));
                total.lock().expect("no thread panicked with it").add(&stats);
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        work();
    });
    total.into_inner().expect("no thread panicked with it")
}

#[test]
fn with_the_cache_lost_the_disks_of_a_group_stand_at_one_point() {
    let images = super::number("PCACHE_GROUP_IMAGES").unwrap_or(IMAGES);
    for order in [Order::Strict, Order::Grouped] {
        let stats = run(order, images);
        println!(
            "{order}: {} images, {} of them with disks as one, {} with parts of a group to apply",
            stats.images, stats.disks_together, stats.joint_images
        );
        assert!(stats.disks_together * 4 > stats.images, "{order}: hardly any image of lost caches\n{stats}");
        assert_eq!(stats.joint_images > 0, order == Order::Grouped, "{order}\n{stats}");
    }
}
