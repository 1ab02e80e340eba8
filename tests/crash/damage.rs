//! Damage at rest: bits, lines and pages that change while nobody looks, in images that are otherwise
//! whole. Every sector then reads as before, or its loss is told: by an error, by a volume that is not
//! opened, or at the least in what recovery has to say.
//!
//! One damage is left out because the format cannot tell it: a liveness word put back whole to what
//! it was earlier in the same life of its segment is valid, and brings dead clean copies back.

use pcache_vhost::cache::{Mode, Order};
use pcache_vhost::pmem::MediaClass::{self, AssumeDax, PageCache};
use pcache_vhost::sim::{Machine, Rng, Scene, Snapshot, Style, World};

const STYLE: Style =
    Style { mode: Mode::Writeback, order: Order::Strict, write_cache: true, pass_discard: false };
/// Faults tried on each image.
const FAULTS: u64 = 700;

/// A cache with fills, clean, dirty and superseded data, in which everything is durable.
fn used_cache(class: MediaClass, rng: &mut Rng) -> (Scene, Snapshot) {
    let mut scene = Scene::new(class, STYLE);
    let mut early = scene.world.photograph("early");
    for i in 0..80 {
        let (first, count) = (rng.below(400), rng.between(1, 24));
        match rng.below(10) {
            0..6 => scene.write(first, count, 1000 + i),
            6 => scene.zero(first, count),
            7 => _ = scene.read(first),
            8 => scene.flush(),
            _ if i < 70 => scene.drain(),
            _ => {}
        }
        scene.machine.step_all();
        if i == 40 {
            early = scene.world.photograph("early");
        }
    }
    scene.flush();
    (scene, early)
}

/// Does one random damage to `image`; says what.
fn damage(image: &mut Snapshot, early: &Snapshot, rng: &mut Rng) -> String {
    let len = image.memory.bytes().len();
    let (a, b) = (rng.index(len) & !63, rng.index(len) & !63);
    match rng.below(6) {
        0 => {
            let bit = rng.index(512);
            image.memory.corrupt(a, |bytes| bytes[bit / 8] ^= 1 << (bit % 8));
            format!("bit {bit} of line {a:#x}")
        }
        1 => {
            image.memory.corrupt(a, |bytes| bytes[..64].fill(0));
            format!("line {a:#x} zeroed")
        }
        2 => {
            let a = a & !511;
            image.memory.corrupt(a, |bytes| bytes[..512].fill(0));
            format!("sector {a:#x} zeroed")
        }
        3 => {
            let (first, second) =
                (image.memory.bytes()[a..a + 64].to_vec(), image.memory.bytes()[b..b + 64].to_vec());
            image.memory.corrupt(a, |bytes| bytes[..64].copy_from_slice(&second));
            image.memory.corrupt(b, |bytes| bytes[..64].copy_from_slice(&first));
            format!("lines {a:#x} and {b:#x} swapped")
        }
        4 => {
            let mut a = a & !511;
            if is_liveness(a) {
                a += 4096;
            }
            let old = early.memory.bytes()[a..a + 512].to_vec();
            image.memory.corrupt(a, |bytes| bytes[..512].copy_from_slice(&old));
            format!("sector {a:#x} as it was earlier")
        }
        _ => {
            let a = a as u64 & !4095;
            image.memory.poison(a..a + 4096);
            format!("page {a:#x} poisoned")
        }
    }
}

/// Whether a byte lies in the liveness words of a scene's cache.
fn is_liveness(at: usize) -> bool {
    let in_segment = at.checked_sub(16 << 10).map_or(0, |at| at % (64 << 10));
    (8 << 10..12 << 10).contains(&in_segment)
}

/// What came of a damage.
#[derive(Default, Debug)]
struct Outcomes {
    harmless: u64,
    refused: u64,
    read_errors: u64,
    told: u64,
    silent: u64,
}

#[test]
fn damage_at_rest_is_harmless_or_told() {
    let mut all = Outcomes::default();
    for (class, seed) in [(AssumeDax, 1), (AssumeDax, 2), (PageCache, 3), (PageCache, 4)] {
        let mut rng = Rng::new(seed);
        let (mut scene, early) = used_cache(class, &mut rng);
        let expected = scene.machine.read_all(0).expect("nothing is damaged yet");
        let whole = scene.world.photograph("at rest");
        for _ in 0..FAULTS {
            let mut image = whole.clone();
            let what = damage(&mut image, &early, &mut rng);
            let world = World::new(image, 1);
            let Ok(mut machine) = Machine::open(&world, &[STYLE], 1) else {
                all.refused += 1;
                continue;
            };
            match machine.read_all(0) {
                Err(_) => all.read_errors += 1,
                Ok(values) if values == expected => all.harmless += 1,
                Ok(_) if !machine.report.findings.is_empty() => all.told += 1,
                Ok(values) => {
                    let sector = (0..values.len()).find(|&s| values[s] != expected[s]);
                    println!("{class}, seed {seed}, {what}: sector {sector:?} changed silently");
                    all.silent += 1;
                }
            }
        }
    }
    println!("{all:?}");
    assert!(all.harmless > 0 && all.refused > 0 && all.read_errors > 0, "{all:?}");
    assert_eq!(all.silent, 0, "{all:?}");
}
