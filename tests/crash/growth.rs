//! A volume that grows while it is used, cut by crashes: whatever instant is left, it starts again with
//! the disk it finds, and what was acknowledged before is there; afterwards so is what is in the new part.

use std::sync::Arc;

use pcache_vhost::backing::Backing;
use pcache_vhost::cache::{Mode, Order};
use pcache_vhost::pmem::MediaClass::{AssumeDax, PageCache};
use pcache_vhost::sim::{DiskSurvival, Machine, Rng, Scene, Snapshot, Style, Survival, World};

const STYLES: [Style; 3] = [
    Style { mode: Mode::Writeback, order: Order::Strict, write_cache: true, pass_discard: false },
    Style { mode: Mode::Writeback, order: Order::Grouped, write_cache: true, pass_discard: false },
    Style { mode: Mode::Writethrough, order: Order::Strict, write_cache: true, pass_discard: false },
];
/// Sectors before and after.
const SIZES: [u64; 2] = [512, 768];
/// The first sector of the new part that is written to, and which write that is.
const NEW: (u64, u64) = (600, 902);

fn crashes(cut: &Snapshot) -> Vec<Snapshot> {
    let mut rng = Rng::new(7);
    let mut images = vec![cut.daemon_crash(&mut rng)];
    for survival in [Survival::Nothing, Survival::Everything] {
        images.push(cut.host_crash(&survival, DiskSurvival::Nothing, &mut rng).0);
    }
    images
}

/// A volume with clean and dirty data.
fn used(class: pcache_vhost::pmem::MediaClass, style: Style) -> Scene {
    let mut scene = Scene::sized(class, style, 12, SIZES[0]);
    scene.write(8, 8, 900);
    scene.drain();
    scene.write(24, 8, 901);
    scene.flush();
    scene
}

fn grow(scene: &mut Scene) {
    let volume = &scene.machine.served[0].volume;
    assert_eq!(volume.enlarge(Some(SIZES[1] * 512)).expect("nothing fails here"), SIZES[1] * 512);
}

fn write_new(scene: &mut Scene) {
    scene.write(NEW.0, 8, NEW.1);
    scene.flush();
}

/// Starts from `image`. Returns what the volume holds.
fn start(image: &Snapshot, style: Style) -> Result<Vec<u64>, String> {
    let world: Arc<World> = World::new(image.clone(), 5);
    let mut machine = Machine::open(&world, &[style], 1)?;
    let volume = &machine.served[0].volume;
    assert_eq!(volume.disk_config().sectors * 512, volume.backing().geometry().size, "its disk's size");
    let values = machine.read_all(0)?;
    let wrong = (0..SIZES[0]).find(|&sector| {
        let expected = match sector {
            8..16 => 900,
            24..32 => 901,
            sector => sector + 1,
        };
        values[sector as usize] != expected
    });
    match wrong {
        Some(sector) => Err(format!("sector {sector} holds write {}", values[sector as usize])),
        None => Ok(values),
    }
}

/// Counts the images in `images`.
pub fn growing(images: &mut u64) {
    for (class, style) in [AssumeDax, PageCache].into_iter().flat_map(|class| STYLES.map(|s| (class, s))) {
        let mut sizes = [0, 0];
        for n in 0.. {
            let mut scene = used(class, style);
            let Some(cut) = scene.cut(n, grow) else { break };
            for image in crashes(&cut) {
                *images += 1;
                let values =
                    start(&image, style).unwrap_or_else(|e| panic!("{class}, {style:?}, cut at {n}: {e}"));
                let size = SIZES.iter().position(|&size| size == values.len() as u64);
                sizes[size.expect("one of the two sizes")] += 1;
                assert!(values[SIZES[0] as usize..].iter().all(|&value| value == 0), "the new part is blank");
            }
        }
        assert!(sizes[0] > 0 && sizes[1] > 0, "{class}, {style:?}: {sizes:?} starts with either size");
        // The new part is as safe as the old one, from the first write on.
        let mut scene = used(class, style);
        grow(&mut scene);
        write_new(&mut scene);
        for image in crashes(&scene.world.photograph("grown")) {
            *images += 1;
            let values = start(&image, style).unwrap_or_else(|e| panic!("{class}, {style:?}, grown: {e}"));
            let new = values.get(NEW.0 as usize..NEW.0 as usize + 8);
            assert_eq!(
                new,
                Some(&[NEW.1; 8][..]),
                "{class}, {style:?}: what was acknowledged in the new part"
            );
        }
        scene.drain();
        assert_eq!(scene.on_disk(NEW.0), NEW.1);
        let left = scene.end();
        start(&left, style).unwrap_or_else(|e| panic!("{class}, {style:?}, ended in order: {e}"));
    }
}

#[test]
fn a_crash_anywhere_while_a_volume_grows_leaves_it_whole_with_either_size() {
    growing(&mut 0);
}

#[test]
fn a_volume_never_becomes_smaller_and_is_never_of_another_size_than_its_disk() {
    let mut scene = used(AssumeDax, STYLES[0]);
    let volume = scene.machine.served[0].volume.clone();
    let refused = |bytes, words: &str| {
        let error = volume.enlarge(bytes).expect_err(words).to_string();
        assert!(error.contains(words), "{error}");
        assert_eq!(volume.disk_config().sectors, SIZES[0]);
    };
    refused(Some(511 * 512), "cannot become smaller");
    refused(Some(512 * 512 + 1), "not possible: a multiple of 512");
    refused(Some(u64::MAX - 511), "not possible");
    assert_eq!(volume.enlarge(None).expect("nothing to do"), 512 * 512);
    // Somebody else has grown the disk: the volume follows, and takes nothing less.
    scene.world.with(|w| w.disks[0] = w.disks[0].resized(640));
    assert_eq!(volume.disk_config().sectors, 512, "not by itself");
    refused(Some(600 * 512), "as large as its disk");
    assert_eq!(volume.enlarge(None).expect("it has grown"), 640 * 512);
    assert_eq!(volume.disk_config().sectors, 640);
    scene.write(632, 8, 77);
    assert_eq!(scene.read(639), 77);
}
