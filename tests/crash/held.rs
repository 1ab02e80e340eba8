//! Stories of checkpoints: disks that are brought to one moment and kept there while the guest goes on.

use std::collections::BTreeMap;

use pcache_vhost::cache::{Mode, Order, Volume};
use pcache_vhost::pmem::MediaClass::{AssumeDax, PageCache};
use pcache_vhost::sim::{DiskSurvival, Rng, Scene, Style, Survival, World};

use super::fellows::Pair;

/// Blocks of each disk that are written.
const BLOCKS: u64 = 8;
/// Segments of the cache: what is written while the disks are kept still finds room in it.
const SEGMENTS: u32 = 40;
const ACTS_HELD: u32 = 40;
/// Seeds of each order and media class.
const SEEDS: u64 = 24;

/// What block *b* of disk *d* holds, by (*d*, *b*).
type Blocks = BTreeMap<(usize, u64), u64>;

/// One guest on two disks.
struct Guest {
    pair: Pair,
    rng: Rng,
    written: Blocks,
    next: u64,
}

impl Guest {
    /// A write or a FLUSH of either disk, or some steps of either's write-back.
    fn act(&mut self) {
        let volume = self.rng.below(2) as usize;
        match self.rng.below(10) {
            0..4 => {
                let block = self.rng.below(BLOCKS);
                self.pair.write(volume, block * 8, self.next);
                self.written.insert((volume, block), self.next);
                self.next += 1;
            }
            4..6 => self.pair.flush(volume),
            _ => {
                let steps = 1 + self.rng.below(12) as u32;
                self.pair.work(&[volume], steps);
                self.pair.machine.housekeeper();
            }
        }
    }

    fn are_still(&self) -> bool {
        self.pair.machine.served.iter().all(|served| served.volume.is_at_checkpoint())
    }

    /// What the disks hold when the host dies now, with the cache and whatever was not flushed.
    fn alone(&mut self) -> Blocks {
        let snapshot = self.pair.world.photograph("lost");
        let (image, _) = snapshot.host_crash(&Survival::Nothing, DiskSurvival::Nothing, &mut self.rng);
        let world = World::new(image, 1);
        self.pair.recover_disks(&world);
        let blocks = (0..2).flat_map(|disk| (0..BLOCKS).map(move |block| (disk, block)));
        blocks.map(|(disk, block)| ((disk, block), world.with(|w| w.disks[disk].value(block * 8)))).collect()
    }
}

/// A checkpoint of both disks of a group, at some moment of a guest that goes on.
fn keep_still(mut guest: Guest, order: Order) {
    let seed = guest.next;
    for _ in 0..guest.rng.below(60) {
        guest.act();
    }
    Volume::begin_checkpoint(guest.pair.machine.served.iter().map(|served| &*served.volume));
    let moment = guest.written.clone();
    let mut acts = 0;
    while !guest.are_still() {
        guest.act();
        acts += 1;
        assert!(acts < 4000, "{order}, seed {seed}: it is never reached");
    }
    assert_eq!(guest.alone(), moment, "{order}, seed {seed}: the disks are not where they were asked to be");
    for _ in 0..ACTS_HELD {
        guest.act();
        assert_eq!(guest.alone(), moment, "{order}, seed {seed}: a disk that is kept still has changed");
        assert!(guest.are_still(), "{order}, seed {seed}: it is over though nobody has ended it");
    }
    guest.pair.machine.served.iter().for_each(|served| served.volume.release_checkpoint());
    guest.pair.drain();
    assert_eq!(guest.alone(), guest.written, "{order}, seed {seed}: not all of it is there");
}

#[test]
fn a_checkpoint_keeps_a_disk_as_it_is_while_the_guest_writes() {
    a_disk_that_is_kept_still(&mut 0);
}

/// Checkpoints of one volume: with dirty data, with nothing dirty, and of one that was never written to.
pub fn a_disk_that_is_kept_still(images: &mut u64) {
    for order in [Order::Strict, Order::Grouped, Order::Relaxed] {
        for writes in 0..3 {
            let style = Style { mode: Mode::Writeback, order, write_cache: true, pass_discard: false };
            let mut scene = Scene::new(PageCache, style);
            let hold = |scene: &mut Scene| {
                Volume::begin_checkpoint([&*scene.machine.served[0].volume]);
                scene.write_back(true, |scene| scene.machine.served[0].volume.is_at_checkpoint())
            };
            let disk = |scene: &Scene| scene.world.with(|w| w.disks[0].values());
            for value in 0..writes {
                scene.write(value * 8, 8, 900 + value);
            }
            *images += 1;
            assert!(hold(&mut scene), "{order}, {writes} writes: it is never reached");
            let moment = disk(&scene);
            assert!(
                (0..writes).all(|value| scene.on_disk(value * 8) == 900 + value),
                "{order}, {writes} writes"
            );
            scene.write(0, 16, 950);
            scene.flush();
            scene.work(100);
            assert!(disk(&scene) == moment, "{order}, {writes} writes: the disk was not kept still");
            scene.machine.served[0].volume.release_checkpoint();
            scene.drain();
            assert_eq!((scene.on_disk(0), scene.on_disk(15)), (950, 950), "{order}, {writes} writes");
            assert!(hold(&mut scene), "{order}, {writes} writes: with nothing dirty it is never reached");
        }
    }
}

#[test]
fn a_checkpoint_keeps_the_disks_of_a_group_at_one_moment_while_the_guest_goes_on() {
    a_group_that_is_kept_still(&mut 0);
}

/// Checkpoints of groups in both orders and on both kinds of media.
pub fn a_group_that_is_kept_still(images: &mut u64) {
    for order in [Order::Strict, Order::Grouped] {
        for class in [AssumeDax, PageCache] {
            for seed in 0..SEEDS {
                let first = |(disk, block): (usize, u64)| ((disk, block), block * 8 + 1);
                let blocks = (0..2).flat_map(|disk| (0..BLOCKS).map(move |block| (disk, block)));
                let written = blocks.map(first).collect();
                *images += 1;
                let pair = Pair::sized(class, order, SEGMENTS);
                // Values that are no sector's first one, and tell the seed.
                let guest = Guest { pair, rng: Rng::new(seed + 1), written, next: 1000 + 1000 * seed };
                keep_still(guest, order);
            }
        }
    }
}
