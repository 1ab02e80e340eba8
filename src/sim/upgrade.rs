//! An upgrade as a simulation has it: one reads ahead, another works on and is gone, the first recovers.

use std::sync::Arc;

use super::{Rng, Scene, SimClock, SimEnv, SimPmem, Snapshot, Style, World};
use crate::cache::index::Extent;
use crate::cache::{Cache, Mode, Order, ReadAhead};
use crate::pmem::MediaClass;

const STYLE: Style =
    Style { mode: Mode::Writeback, order: Order::Relaxed, write_cache: true, pass_discard: false };

/// What became of the segments that were read ahead.
#[derive(Default, Debug)]
pub struct Counts {
    /// Read for good.
    pub used: usize,
    /// Of these, found open.
    pub open: usize,
    /// Read in vain.
    pub stale: usize,
}

/// Whatever has changed between reading ahead and recovery, that finds what it would have found without.
///
/// # Panics
/// It does not.
pub fn upgrade(seed: u64, counts: &mut Counts) {
    let mut rng = Rng::new(seed);
    let class = if rng.chance(1, 2) { MediaClass::AssumeDax } else { MediaClass::PageCache };
    let mut scene = Scene::sized(class, STYLE, 12, 4096);
    // Half of them with little done meanwhile, so that what was open then still is.
    let most = if rng.chance(1, 2) { 4 } else { 50 };
    let (before, after) = (rng.between(20, 80), rng.below(most));
    work(&mut scene, &mut rng, before, seed);
    let ahead = ReadAhead::read(&Arc::new(SimPmem::new(&scene.world)), 1);
    work(&mut scene, &mut rng, after, seed);
    let image = scene.world.photograph("at a kill").daemon_crash(&mut rng);
    let plain = open(&image, &ReadAhead::default(), seed, &mut Counts::default());
    let by_ahead = open(&image, &ahead, seed, counts);
    assert_eq!(plain, by_ahead, "seed {seed}");
}

fn work(scene: &mut Scene, rng: &mut Rng, count: u64, seed: u64) {
    for number in 0..count {
        scene.write(rng.below(4000), rng.between(1, 48), 1000 * seed + number + 1);
        // So that no write ever waits for space.
        for _ in 0..12 {
            scene.machine.step_all();
        }
        if number % 4 == 3 {
            scene.drain();
            (0..40).for_each(|_| scene.machine.step_all());
        }
    }
}

/// What the index shows, keys, dirty bytes, and findings.
type Recovered = (Vec<Extent>, u64, u64, Vec<String>);

fn open(image: &Snapshot, ahead: &ReadAhead, seed: u64, counts: &mut Counts) -> Recovered {
    let world = World::new(image.clone(), 1);
    world.act_as(0);
    let pmem = Arc::new(SimPmem::new(&world));
    for (is_open, counts_still) in ahead.fates(&pmem) {
        counts.used += usize::from(counts_still);
        counts.open += usize::from(counts_still && is_open);
        counts.stale += usize::from(!counts_still);
    }
    let (cache, report) = Cache::<SimEnv>::open_after(pmem, SimClock::default(), ahead)
        .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    let mut shown = Vec::new();
    cache.all_volumes().iter().for_each(|volume| volume.index.for_each(|extent| shown.push(extent)));
    (shown, report.keys, report.dirty_bytes, report.findings)
}
