//! Changes of the cache's size: whatever instant the host or the daemon dies at, the cache is of the old
//! size or the new one, with all that was acknowledged; and what is damaged then is found as before.

use pcache_vhost::cache::{Mode, Order, ResizeError};
use pcache_vhost::onmedia::Geometry;
use pcache_vhost::pmem::MediaClass::{self, AssumeDax, PageCache};
use pcache_vhost::sim::{DiskSurvival, Machine, Rng, Scene, SimBuffer, Snapshot, Style, Survival, World};
use pcache_vhost::volume::{RequestKind, Status};

const CLASSES: [MediaClass; 2] = [AssumeDax, PageCache];
/// Blocks written before a change of size: more than fit what a shrink leaves.
const BLOCKS: u64 = 60;
/// Steps of all workers after which a change of size should have ended.
const STEPS_MAX: u32 = 20_000;

fn style() -> Style {
    Style { mode: Mode::Writeback, order: Order::Strict, write_cache: true, pass_discard: false }
}

/// The size of a cache of so many segments like this one's.
fn size_of(geometry: &Geometry, segments: u32) -> u64 {
    2 * geometry.meta_size + u64::from(segments) * u64::from(geometry.segment_size)
}

/// Block `n` is of write 9000 + n, most of it on the disk already.
fn filled(class: MediaClass) -> Scene {
    let mut scene = Scene::new(class, style());
    for block in 0..BLOCKS {
        scene.write(block * 8, 8, 9000 + block);
        if block == BLOCKS * 2 / 3 {
            scene.drain();
        }
        scene.work(1);
    }
    scene.flush();
    scene
}

/// Writes a block anew, the same, with everybody at work.
fn write(scene: &mut Scene, block: u64) {
    let data = SimBuffer::of_write(0, block * 8, 8, 9000 + block);
    let status = scene.request_in_time(RequestKind::Write, block * 8, data);
    assert_eq!(status, Some(Status::Ok), "block {block}");
}

fn begin(scene: &mut Scene, segments: u32) -> Result<(), ResizeError> {
    let size = size_of(&scene.machine.cache.geometry(), segments);
    scene.machine.control(|cache| cache.begin_resize(size))
}

/// Lets everybody work until a change of size has ended.
fn ended(scene: &mut Scene) -> Result<Geometry, ResizeError> {
    for _ in 0..STEPS_MAX {
        if let Some(ended) = scene.machine.control(|cache| cache.end_resize()) {
            return ended;
        }
        scene.work(1);
    }
    panic!("it never ends: {:?}, {:?}", scene.machine.cache.resize_progress(), scene.machine.cache.space());
}

/// Everything reads as it was written, and what DRAM counts is what there is.
fn judge(scene: &mut Scene, sizes: &[u32], when: &str) {
    let count = scene.machine.cache.geometry().segment_count;
    assert!(sizes.contains(&count), "{when}: {count} segments");
    // A crash may tear one copy of a structure, or a summary, whose records are there.
    let is_loss = |f: &&String| f.contains(" is lost") || f.contains("its volume is damaged");
    let findings: Vec<_> = scene.machine.report.findings.iter().filter(is_loss).collect();
    assert!(findings.is_empty(), "{when}: {findings:?}");
    for block in 0..BLOCKS {
        assert_eq!(scene.read(block * 8), 9000 + block, "{when}: block {block}");
    }
    scene.machine.cache.audit(true).unwrap_or_else(|what| panic!("{when}: {what}"));
}

/// Cuts a change of size at every event it has, and judges what is left.
fn cut_everywhere(class: MediaClass, segments: u32) -> u64 {
    let mut images = 0;
    for n in 0.. {
        let mut scene = filled(class);
        let before = scene.machine.cache.geometry().segment_count;
        let photo = scene.cut(n, |scene| {
            begin(scene, segments).expect("it can be");
            let geometry = ended(scene).expect("nothing fails here");
            assert_eq!(geometry.segment_count, segments);
        });
        let Some(photo) = photo else {
            judge(&mut scene, &[segments], "at the end");
            scene.daemon_crash();
            judge(&mut scene, &[segments], "at the next start");
            assert!(n > 20, "{n} events are too few");
            return images;
        };
        for survival in [Survival::Nothing, Survival::Everything, Survival::Random, Survival::Torn] {
            let mut rng = Rng::new(n);
            let (image, _) = photo.host_crash(&survival, DiskSurvival::Nothing, &mut rng);
            judge_image(
                &mut scene,
                image,
                &[before, segments],
                &format!("{class}, {survival:?} before event {n}"),
            );
            images += 1;
        }
        let image = photo.daemon_crash(&mut Rng::new(n));
        judge_image(&mut scene, image, &[before, segments], &format!("{class}, a kill before event {n}"));
        images += 1;
    }
    unreachable!("it ends with its events")
}

fn judge_image(scene: &mut Scene, image: Snapshot, sizes: &[u32], when: &str) {
    scene.start(image);
    judge(scene, sizes, when);
    // It goes on: what was half done does not stand in the way of the next change.
    let other = sizes[0] + 5;
    begin(scene, other).unwrap_or_else(|error| panic!("{when}: {error}"));
    let geometry = ended(scene).unwrap_or_else(|error| panic!("{when}: {error}"));
    assert_eq!(geometry.segment_count, other);
    judge(scene, &[other], when);
}

#[test]
fn a_crash_anywhere_in_a_growth_leaves_the_old_size_or_the_new() {
    for class in CLASSES {
        let images = cut_everywhere(class, 15);
        println!("{class}: {images} images of a growth");
    }
}

#[test]
fn a_crash_anywhere_in_a_shrink_leaves_the_old_size_or_the_new() {
    for class in CLASSES {
        let images = cut_everywhere(class, 7);
        println!("{class}: {images} images of a shrink");
    }
}

#[test]
fn a_cache_grows_and_shrinks_again_and_again_with_all_that_it_holds() {
    for class in CLASSES {
        let mut scene = filled(class);
        for (turn, segments) in [20, 6, 30, 29, 12, 7, 40, 6].into_iter().enumerate() {
            begin(&mut scene, segments).expect("it begins");
            for block in 0..BLOCKS / 2 {
                write(&mut scene, block);
            }
            ended(&mut scene).expect("it ends well");
            judge(&mut scene, &[segments], &format!("{class}, turn {turn}"));
            let len = size_of(&scene.machine.cache.geometry(), segments);
            assert_eq!(scene.machine.cache.media_len(), len, "the file has the size of the cache");
            if turn % 3 == 2 {
                scene.daemon_crash();
                judge(&mut scene, &[segments], &format!("{class}, started again after turn {turn}"));
            }
        }
    }
}

#[test]
fn a_shrink_that_is_called_off_leaves_the_cache_as_large_as_it_was() {
    for class in CLASSES {
        for steps in [0, 1, 3, 10, 30] {
            let mut scene = filled(class);
            begin(&mut scene, 6).expect("it begins");
            scene.work(steps);
            scene.machine.control(|cache| cache.cancel_resize());
            match ended(&mut scene) {
                Err(ResizeError::Interrupted) => judge(&mut scene, &[12], "called off"),
                Ok(_) => judge(&mut scene, &[6], "done before it was called off"),
                Err(error) => panic!("{error}"),
            }
            assert!(scene.machine.cache.free_segments() > 0, "there is space again");
        }
    }
}

#[test]
fn what_cannot_be_is_refused_with_a_sentence_and_changes_nothing() {
    let mut scene = filled(AssumeDax);
    let now = scene.machine.cache.geometry();
    for (size, sentence) in [
        (0, "0 bytes are too few for a cache"),
        (size_of(&now, 3), "are too few for a cache"),
        (size_of(&now, 5), "1 volumes are attached and need 6 segments"),
        (now.device_size, "make no difference: the cache has 12 segments of 65536 bytes already"),
        (now.device_size + 65535, "make no difference"),
        (1 << 49, "are too many"),
    ] {
        let refused = scene.machine.control(|cache| cache.begin_resize(size));
        let refused = refused.expect_err("it cannot be").to_string();
        assert!(refused.contains(sentence), "{size}: {refused}");
        assert_eq!(scene.machine.cache.geometry(), now);
    }
    begin(&mut scene, 14).expect("it begins");
    let again = begin(&mut scene, 15).expect_err("one at a time").to_string();
    assert_eq!(again, "the size of this cache is being changed already");
    ended(&mut scene).expect("it ends well");
    judge(&mut scene, &[14], "after the refusals");
}

/// Updates of what stands twice that come while its back copy is on the way are in both places: where
/// the front copy is damaged later, the back one has them.
pub fn an_update_while_the_back_moves(images: &mut u64) {
    for steps in 0..24 {
        let mut scene = filled(AssumeDax);
        assert!(!scene.machine.served[0].volume.is_clean());
        begin(&mut scene, 15).expect("it begins");
        for _ in 0..steps {
            scene.machine.housekeeper();
        }
        scene.drain();
        ended(&mut scene).expect("it ends well");
        let tail = scene.machine.cache.geometry().tail(0, 0);
        scene.world.with(|w| w.memory.corrupt(tail as usize + 50, |bytes| bytes[0] ^= 1));
        scene.daemon_crash();
        *images += 1;
        let is_clean = scene.machine.served[0].volume.is_clean();
        assert!(
            is_clean,
            "after {steps} steps: the tail that was moved meanwhile is lost with its front copy"
        );
    }
}

#[test]
fn an_update_that_comes_while_the_back_metadata_moves_is_in_both_copies() {
    an_update_while_the_back_moves(&mut 0);
}

/// Segments that were cut off and are made anew hold what they held, on a device: none of it comes to
/// count again, however far the guest has come when the daemon is killed.
pub fn a_segment_that_is_made_anew(images: &mut u64) {
    let mut scene = Scene::on_device(AssumeDax, style());
    // Some of it twice, so that every segment is used, in its first life: nobody reclaims meanwhile.
    for (value, blocks) in [(8000, BLOCKS * 2 / 3), (9000, BLOCKS)] {
        for block in 0..blocks {
            scene.write(block * 8, 8, value + block);
        }
        scene.drain();
    }
    assert_eq!(scene.machine.cache.free_segments(), 0, "every segment has records of its first life");
    begin(&mut scene, 7).expect("it begins");
    ended(&mut scene).expect("it ends well");
    // Of what is on the disk by now the cache has the last few only.
    let mut values: Vec<u64> = (0..BLOCKS).map(|block| 9500 + block).collect();
    for block in 0..BLOCKS {
        let data = SimBuffer::of_write(0, block * 8, 8, values[block as usize]);
        assert_eq!(scene.request_in_time(RequestKind::Write, block * 8, data), Some(Status::Ok));
    }
    scene.drain();
    begin(&mut scene, 12).expect("it begins");
    ended(&mut scene).expect("it ends well");
    for (turn, block) in (0..BLOCKS).rev().enumerate() {
        values[block as usize] = 9700 + block;
        let data = SimBuffer::of_write(0, block * 8, 8, values[block as usize]);
        assert_eq!(scene.request_in_time(RequestKind::Write, block * 8, data), Some(Status::Ok));
        let world = scene.world.photograph("a kill").daemon_crash(&mut Rng::new(turn as u64));
        let mut next = Scene::on_device(AssumeDax, style());
        next.start(world);
        *images += 1;
        for (block, value) in values.iter().enumerate() {
            assert_eq!(next.read(block as u64 * 8), *value, "block {block} after {turn} writes");
        }
        let findings = &next.machine.report.findings;
        assert!(findings.is_empty(), "after {turn} writes: {findings:?}");
    }
}

#[test]
fn nothing_of_a_segment_that_was_cut_off_counts_when_it_is_made_anew() {
    a_segment_that_is_made_anew(&mut 0);
}

/// Nothing of the front superblock is left, and the cache does not end with its media.
pub fn a_front_that_is_lost(images: &mut u64) {
    for class in CLASSES {
        for segments in [7, 15] {
            let mut scene = filled(class);
            begin(&mut scene, 20).expect("it begins");
            ended(&mut scene).expect("it ends well");
            begin(&mut scene, segments).expect("it begins");
            // Like a device, which does not become shorter: nobody has seen the end.
            scene.work(5000);
            scene.world.with(|w| w.memory.corrupt(0, |bytes| bytes[..64].fill(0)));
            scene.daemon_crash();
            *images += 1;
            judge(&mut scene, &[segments], &format!("{class}, without the front"));
        }
    }
}

#[test]
fn without_its_front_superblock_a_cache_that_ends_before_its_media_is_found() {
    a_front_that_is_lost(&mut 0);
}

#[test]
fn a_crash_in_the_start_that_writes_a_damaged_front_again_leaves_a_superblock() {
    for class in CLASSES {
        let mut scene = Scene::on_device(class, style());
        for block in 0..8 {
            scene.write(block * 8, 8, 9000 + block);
        }
        scene.flush();
        // After the growth the signpost is older than the back copy, which it leads to.
        for segments in [7, 10] {
            begin(&mut scene, segments).expect("it begins");
            ended(&mut scene).expect("it ends well");
        }
        scene.world.with(|w| w.memory.corrupt(0, |bytes| bytes[0] ^= 1));
        let image = scene.world.photograph("a damaged front").daemon_crash(&mut Rng::new(1));
        let mut cuts = 0;
        loop {
            let world = World::new(image.clone(), 1);
            world.with(|w| w.cuts.at = w.events + cuts + 1);
            Machine::open(&world, &[style()], 1).expect("the back copy is whole");
            let Some((_, photo)) = world.take_cuts().pop() else { break };
            for seed in 0..8 {
                let mut rng = Rng::new(seed);
                let (left, _) = photo.host_crash(&Survival::Random, DiskSurvival::Nothing, &mut rng);
                scene.start(left);
                assert_eq!(scene.machine.cache.geometry().segment_count, 10, "{class}, cut {cuts}");
                for block in 0..8 {
                    assert_eq!(scene.read(block * 8), 9000 + block, "{class}, cut {cuts}: block {block}");
                }
            }
            cuts += 1;
        }
        assert!(cuts > 8, "{class}: {cuts} events are too few for a start");
    }
}
