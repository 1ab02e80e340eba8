//! Damage at rest, for the checks that only damage calls on: bits, lines and pages of segments that
//! changed, or went astray, while nobody looked. What was stored is then read, or its loss is told.

use pcache_vhost::cache::{Mode, Order};
use pcache_vhost::onmedia::Geometry;
use pcache_vhost::pmem::MediaClass::{AssumeDax, PageCache};
use pcache_vhost::sim::{Machine, Rng, Scene, SimBuffer, Snapshot, Style, World};
use pcache_vhost::volume::{Request, RequestKind, Status};

const STYLE: Style =
    Style { mode: Mode::Writeback, order: Order::Strict, write_cache: true, pass_discard: false };
/// Damages tried on each cache.
const DAMAGES: u64 = 400;
/// Sectors of a read: what one error takes with it.
const READ: u64 = 4;
const PAGE: usize = 4096;

/// A scene's layout.
fn geometry() -> Geometry {
    Geometry::custom(16 << 10, 64 << 10, 12, 1).expect("a scene's geometry")
}

/// A cache with fills, clean, dirty, zeroed and superseded data, in which everything is durable and
/// every record witnessed.
fn used_cache(rng: &mut Rng) -> Scene {
    let class = if rng.chance(1, 2) { AssumeDax } else { PageCache };
    let mut scene = Scene::new(class, STYLE);
    for i in 0..70 {
        let (first, count) = (rng.below(400), rng.between(1, 16));
        match rng.below(10) {
            0..6 => scene.write(first, count, 1000 + i),
            6 => scene.zero(first, count),
            7 => _ = scene.read(first),
            8 => scene.flush(),
            _ if i < 50 => scene.drain(),
            _ => {}
        }
        scene.machine.step_all();
    }
    scene.flush();
    for _ in 0..4 {
        scene.machine.step_all();
    }
    scene
}

/// A page of a segment's records, most often the first of them, or any of its payload.
fn page(geometry: &Geometry, rng: &mut Rng) -> usize {
    let (start, end) = (geometry.data_start() as usize, geometry.data_end() as usize);
    let segment = geometry.segment(rng.below(geometry.segment_count.into()) as u32) as usize;
    let from_end = if rng.chance(1, 2) { 1 + rng.index(2) } else { 1 + rng.index((end - start) / PAGE) };
    segment + end - from_end * PAGE
}

/// Does one random damage to `image`; says what.
fn damage(image: &mut Snapshot, geometry: &Geometry, rng: &mut Rng) -> String {
    let at = page(geometry, rng);
    match rng.below(4) {
        0 => {
            let to = page(geometry, rng);
            let stray = image.memory.bytes()[at..at + PAGE].to_vec();
            image.memory.corrupt(to, |bytes| bytes[..PAGE].copy_from_slice(&stray));
            format!("page {at:#x} written to {to:#x} as well")
        }
        1 => {
            let segment = rng.below(geometry.segment_count.into()) as u32;
            let words = geometry.segment(segment) as usize + geometry.liveness_offset() as usize;
            let bit = rng.index(geometry.liveness_words() as usize * 64);
            image.memory.corrupt(words, |bytes| bytes[bit / 8] ^= 1 << (bit % 8));
            format!("bit {bit} of the liveness words of segment {segment}")
        }
        2 => {
            let record = at + rng.index(PAGE / 256) * 256;
            image.memory.corrupt(record, |bytes| bytes[..64].fill(0));
            format!("line {record:#x} zeroed")
        }
        _ => {
            let bit = rng.index(PAGE * 8);
            image.memory.corrupt(at, |bytes| bytes[bit / 8] ^= 1 << (bit % 8));
            format!("bit {bit} of page {at:#x}")
        }
    }
}

/// What every sector reads as: the write, or `None` where a read fails; an error where it is garbage.
fn read_all(machine: &mut Machine, sectors: u64) -> Result<Vec<Option<u64>>, String> {
    let mut values = vec![None; sectors as usize];
    for first in (0..sectors).step_by(READ as usize) {
        let data = SimBuffer::to_read(READ);
        machine.submit(0, 0, Request { tag: 1, kind: RequestKind::Read, sector: first, data });
        machine.commit(0, 0);
        let done = (0..1000).find_map(|_| machine.poll(0, 0).pop()).ok_or("a read never ends")?;
        if done.status == Status::Ok {
            let read = done.data.values(0, first)?;
            for (value, read) in values[first as usize..].iter_mut().zip(read) {
                *value = Some(read);
            }
        }
    }
    Ok(values)
}

/// Counts the images in `images`.
pub fn judge(seed: u64, images: &mut u64) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let geometry = geometry();
    let mut scene = used_cache(&mut rng);
    let expected = scene.machine.read_all(0)?;
    let whole = scene.world.photograph("at rest");
    for _ in 0..DAMAGES {
        let mut image = whole.clone();
        let what = damage(&mut image, &geometry, &mut rng);
        *images += 1;
        let world = World::new(image, 1);
        // A refusal is as clear as can be.
        let Ok(mut machine) = Machine::open(&world, &[STYLE], 1) else { continue };
        let read = read_all(&mut machine, expected.len() as u64).map_err(|e| format!("{what}: {e}"))?;
        let changed = (0..read.len()).find(|&s| read[s].is_some_and(|value| value != expected[s]));
        if let Some(sector) = changed.filter(|_| machine.report.findings.is_empty()) {
            return Err(format!(
                "{what}: sector {sector} shows {:#x?} and not {:#x}, and nothing is told",
                read[sector], expected[sector]
            ));
        }
    }
    Ok(())
}
