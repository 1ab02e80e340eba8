//! Groups side by side: one on its way to the disk, the next one to the redo area meanwhile.
//!
//! Whatever ends or fails at whatever step of it, the disk with its area is a moment of the guest's, never
//! an earlier one than before, and with the cache everything is there.

use std::sync::Arc;

use pcache_vhost::cache::{Mode, Order, Volume, recover_backing};
use pcache_vhost::pmem::MediaClass::{self, AssumeDax, PageCache};
use pcache_vhost::sim::{DiskSurvival, Rng, Scene, SimBacking, Style, Survival, World};

/// The blocks that are written one after the other; 0 stands for a FLUSH.
const WRITES: [u64; 26] =
    [1, 2, 3, 1, 0, 4, 5, 2, 6, 0, 7, 1, 8, 9, 3, 10, 11, 12, 1, 0, 2, 13, 14, 3, 15, 5];
/// What the first of them writes.
const FIRST: u64 = 900;
const BLOCKS: usize = 16;

/// What happens in the middle.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Blow {
    DaemonDies,
    HostDies,
    /// The disk, or the redo area, is away for some steps.
    Away(usize),
    /// Another order is asked for, and grouped again.
    OrderChanges,
    Checkpoint,
}

const BLOWS: [Blow; 6] =
    [Blow::DaemonDies, Blow::HostDies, Blow::Away(0), Blow::Away(1), Blow::OrderChanges, Blow::Checkpoint];

fn scene(class: MediaClass, seed: u64) -> Scene {
    let style =
        Style { mode: Mode::Writeback, order: Order::Grouped, write_cache: true, pass_discard: false };
    let mut scene = Scene::with_redo(class, style, (12, 512), 120);
    side_by_side(&scene, seed);
    for (i, block) in WRITES.iter().enumerate() {
        match block {
            0 => scene.flush(),
            block => scene.write(block * 8, 8, FIRST + i as u64),
        }
    }
    scene
}

/// Groups of one to four blocks, each beside another.
fn side_by_side(scene: &Scene, seed: u64) {
    scene.machine.served[0].volume.set_group_bytes(1 + seed % 3 * 6000);
}

/// What the blocks hold once the writes before `n` have happened.
fn moment(n: u64) -> Vec<u64> {
    let mut blocks: Vec<u64> = (0..BLOCKS as u64).map(|block| block * 8 + 1).collect();
    for (value, block) in (FIRST..n).zip(WRITES).filter(|(_, block)| *block > 0) {
        blocks[block as usize] = value;
    }
    blocks
}

/// What the blocks hold with the cache lost now, and the redo area applied.
fn disk_alone(scene: &Scene, survival: DiskSurvival, rng: &mut Rng) -> Vec<u64> {
    let snapshot = scene.world.photograph("the cache is lost");
    let (image, _) = snapshot.host_crash(&Survival::Nothing, survival, rng);
    let world = World::new(image, 1);
    let backing = |number| SimBacking::new(&world, number);
    recover_backing(Arc::new(backing(1)), &backing(0), false).expect("a legal area");
    (0..BLOCKS as u64).map(|block| world.with(|w| w.disks[0].value(block * 8))).collect()
}

/// How many writes the disk alone has, if it is a moment, whatever of the unflushed survives: at least.
fn judge(scene: &Scene, rng: &mut Rng) -> u64 {
    let all = [DiskSurvival::Random, DiskSurvival::Everything, DiskSurvival::Nothing];
    let ends = all.map(|survival| {
        let alone = disk_alone(scene, survival, rng);
        let newest = alone.iter().copied().filter(|value| *value >= FIRST).max().map_or(FIRST, |n| n + 1);
        assert_eq!(alone, moment(newest), "beside write {newest}, {survival:?}: no moment of the guest's");
        newest
    });
    ends[2]
}

fn strike(scene: &mut Scene, blow: Blow) {
    let volume = &scene.machine.served[0].volume;
    match blow {
        Blow::DaemonDies => scene.daemon_crash(),
        Blow::HostDies => scene.host_crash(Survival::Nothing, DiskSurvival::Random),
        Blow::Away(disk) => scene.world.with(|w| w.faults.away = 1 << disk),
        Blow::OrderChanges => {
            volume.change_order(Order::Strict).expect("any order is possible");
        }
        Blow::Checkpoint => Volume::begin_checkpoint([&**volume]),
    }
}

fn recover(scene: &mut Scene, blow: Blow) {
    let volume = &scene.machine.served[0].volume;
    match blow {
        Blow::DaemonDies | Blow::HostDies => {}
        Blow::Away(_) => scene.world.with(|w| w.faults.away = 0),
        Blow::OrderChanges => volume.change_order(Order::Grouped).expect("there is an area"),
        Blow::Checkpoint => volume.release_checkpoint(),
    }
}

/// Writes back what was written, with a blow before one step; how many groups went side by side, and
/// whether there was such a step.
fn write_back(class: MediaClass, blow: Blow, before: u64) -> (u64, bool) {
    let seed = before;
    let mut scene = scene(class, seed);
    let mut rng = Rng::new(seed);
    let (mut step, mut newest, mut ahead, mut is_struck) = (0, FIRST, 0, false);
    while !scene.machine.served[0].volume.is_clean() {
        step += 1;
        assert!(step < 5000, "write-back never ends");
        if step == before {
            ahead += scene.machine.served[0].volume.counters().groups_ahead;
            strike(&mut scene, blow);
            side_by_side(&scene, seed);
            is_struck = true;
        } else if step == before + 12 {
            recover(&mut scene, blow);
        }
        scene.machine.clock.advance(500);
        scene.machine.writeback(0);
        scene.machine.sync();
        let volume = &scene.machine.served[0].volume;
        if volume.order() != Order::Grouped || volume.is_changing_order() {
            continue;
        }
        let alone = judge(&scene, &mut rng);
        assert!(alone >= newest, "the disk went back, from write {newest} to {alone}");
        newest = alone;
        if blow == Blow::Checkpoint && scene.machine.served[0].volume.is_at_checkpoint() {
            assert_eq!(newest, FIRST + WRITES.len() as u64, "what was acknowledged is on the disk");
            recover(&mut scene, blow);
        }
    }
    recover(&mut scene, blow);
    assert_eq!(judge(&scene, &mut rng), FIRST + WRITES.len() as u64, "all of it is there");
    for (block, value) in moment(FIRST + WRITES.len() as u64).into_iter().enumerate() {
        assert_eq!(scene.read(block as u64 * 8), value, "block {block}");
    }
    (ahead + scene.machine.served[0].volume.counters().groups_ahead, is_struck)
}

/// Every so many steps there is a blow. `PCACHE_GROUPS_STRIDE=1` takes a few minutes.
const STRIDE: usize = 9;

#[test]
fn groups_side_by_side_are_one_moment_whatever_befalls_them() {
    let stride = std::env::var("PCACHE_GROUPS_STRIDE").map_or(STRIDE, |n| n.parse().expect("a number"));
    for class in [AssumeDax, PageCache] {
        for (i, blow) in BLOWS.into_iter().enumerate() {
            let (mut ahead, mut steps) = (0, 0);
            for before in (1 + i as u64..).step_by(stride) {
                let (groups, is_struck) = write_back(class, blow, before);
                (ahead, steps) = (ahead + groups, steps + 1);
                if !is_struck {
                    break;
                }
            }
            println!("{class}, {blow:?}: {steps} runs, {ahead} groups side by side");
            assert!(ahead > steps, "{class}, {blow:?}: groups went one after the other");
        }
    }
}
