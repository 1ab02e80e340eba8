//! Starts cut by a host crash that tears what was under way, and the starts after them cut again.
//! Whatever is left reads as before the first.

use pcache_vhost::cache::{Mode, Order};
use pcache_vhost::pmem::MediaClass::{AssumeDax, PageCache};
use pcache_vhost::sim::{DiskSurvival, Machine, Rng, Scene, Snapshot, Style, Survival, World};

const STYLE: Style =
    Style { mode: Mode::Writeback, order: Order::Strict, write_cache: true, pass_discard: false };
/// Ways to tear the first start at each of its cuts.
const TEARS: u64 = 2;

/// A cache with clean and dirty data, all of it durable.
fn used_cache(rng: &mut Rng) -> Scene {
    let class = if rng.chance(1, 2) { AssumeDax } else { PageCache };
    let mut scene = Scene::new(class, STYLE);
    for i in 0..12 {
        scene.write(rng.below(400), rng.between(1, 24), 1000 + i);
        if i == 6 {
            scene.drain();
        }
    }
    scene.flush();
    scene
}

/// What is left of `image` when the host dies in the start that found it, before that start's `n`-th
/// event; `None` if it has fewer.
fn torn_start(image: &Snapshot, n: u64, rng: &mut Rng) -> Result<Option<Snapshot>, String> {
    let world = World::new(image.clone(), 1);
    world.with(|w| w.cuts.at = n + 1);
    Machine::open(&world, &[STYLE], 1)?;
    let Some((_, cut)) = world.take_cuts().pop() else { return Ok(None) };
    Ok(Some(cut.host_crash(&Survival::Torn, DiskSurvival::Nothing, rng).0))
}

/// Counts the images in `images`.
pub fn judge(seed: u64, images: &mut u64) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let mut scene = used_cache(&mut rng);
    let expected = scene.machine.read_all(0)?;
    let whole = scene.world.photograph("at rest");
    for first in 0.. {
        for _ in 0..TEARS {
            let Some(once) = torn_start(&whole, first, &mut rng)? else { return Ok(()) };
            // Every other second cut, by turns: the count is a square.
            for second in (first % 3..).step_by(3) {
                let Some(twice) = torn_start(&once, second, &mut rng)? else { break };
                *images += 1;
                let world = World::new(twice, 1);
                let read = Machine::open(&world, &[STYLE], 1)?.read_all(0)?;
                if let Some(sector) = (0..read.len()).find(|&s| read[s] != expected[s]) {
                    return Err(format!(
                        "after starts cut at {first} and {second}, sector {sector} shows {:#x} and not {:#x}",
                        read[sector], expected[sector]
                    ));
                }
            }
        }
    }
    Ok(())
}
