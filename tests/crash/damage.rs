//! Damage at rest: bits, lines, sectors and pages that change while nobody looks, in images that are
//! otherwise whole and settled. Every sector then reads as before, or its loss is told: by an error,
//! by a volume that is not opened, or by a finding that names the segment or volume it was in. What
//! is drained afterwards is on the disk, and what is not is listed.
//!
//! `PCACHE_DAMAGE_FAULTS=n` sets the number of faults (100,000 by default; a million takes four
//! minutes), `PCACHE_DAMAGE_SEED=n` runs the images of that seed alone.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use pcache_vhost::cache::{FormatOptions, Mode, Order, format};
use pcache_vhost::onmedia::Geometry;
use pcache_vhost::pmem::MediaClass::{self, AssumeDax, PageCache};
use pcache_vhost::sim::{
    DiskState, Machine, Memory, Rng, Scene, SimBuffer, SimClock, SimPmem, Snapshot, Style, World,
};
use pcache_vhost::volume::{Request, RequestKind, Status};

use super::number;

/// Faults in the test command.
const FAULTS: u64 = 100_000;
/// Faults tried on one image.
const FAULTS_PER_IMAGE: u64 = 1000;
/// One fault in so many is followed through a drain and another start.
const FOLLOWED: u64 = 16;
/// Sectors of each volume.
const SECTORS: u64 = 320;
/// Sectors of each redo area.
const REDO_SECTORS: u64 = 512;
/// Seeds that have found something once: all of their faults are tried again.
const KEPT: [u64; 2] = [98, 325];

/// A cache with its disks, and what every sector must read as.
struct Subject {
    seed: u64,
    geometry: Geometry,
    styles: Vec<Style>,
    /// At rest: durable, and nothing under way.
    image: Snapshot,
    /// Earlier instants of the same cache, for stale parts.
    early: Vec<Snapshot>,
    expected: Vec<Vec<u64>>,
    /// Sectors that are lost already, which answer with an error.
    lost: Vec<Vec<bool>>,
}

fn request(
    machine: &mut Machine,
    volume: usize,
    kind: RequestKind,
    sector: u64,
    data: SimBuffer,
) -> Option<SimBuffer> {
    machine.submit(volume, 0, Request { tag: 1, kind, sector, data });
    machine.commit(volume, 0);
    for _ in 0..100_000 {
        if let Some(done) = machine.poll(volume, 0).pop() {
            return (done.status == Status::Ok).then_some(done.data);
        }
        machine.step_all();
    }
    panic!("{kind:?} of sector {sector} never ends");
}

/// What `count` sectors show; `None` for an error.
fn read(machine: &mut Machine, volume: usize, first: u64, count: u64) -> Option<Vec<u64>> {
    let data = request(machine, volume, RequestKind::Read, first, SimBuffer::to_read(count))?;
    // Garbage is no write's value.
    let sector = |i: usize| data.bytes[i * 512..(i + 1) * 512].to_vec();
    let value = |i| SimBuffer { bytes: sector(i), gone_from: None }.values(volume, first + i as u64);
    Some((0..count as usize).map(|i| value(i).map_or(u64::MAX, |v| v[0])).collect())
}

/// What every sector of a volume shows; `None` where it answers with an error.
fn read_all(machine: &mut Machine, volume: usize) -> Vec<Option<u64>> {
    let mut all = Vec::new();
    for first in (0..SECTORS).step_by(64) {
        match read(machine, volume, first, 64) {
            Some(values) => all.extend(values.into_iter().map(Some)),
            None => all.extend((first..first + 64).map(|s| read(machine, volume, s, 1).map(|v| v[0]))),
        }
    }
    all
}

/// Lets everything that was begun end, and all of it become durable, notes about it included.
fn settle(machine: &mut Machine) {
    for _ in 0..6 {
        for volume in 0..machine.served.len() {
            request(machine, volume, RequestKind::Flush, 0, SimBuffer::default());
        }
        machine.sync();
        machine.housekeeper();
    }
}

fn drain(machine: &mut Machine) {
    for _ in 0..20_000 {
        if machine.served.iter().all(|s| s.volume.is_clean()) {
            return;
        }
        machine.clock.advance(500);
        machine.step_all();
    }
    panic!("write-back never ends");
}

impl Subject {
    /// A cache with fills, zeros, clean, dirty and superseded data; now and then with lost sectors.
    fn new(seed: u64) -> Subject {
        let mut rng = Rng::new(seed);
        let class = if seed.is_multiple_of(2) { AssumeDax } else { PageCache };
        let volumes = if seed % 5 < 3 { 1 } else { 2 };
        let small = class == AssumeDax && seed % 3 == 1;
        let (size, count) = if small { (32 << 10, 16) } else { (64 << 10, 10) };
        let geometry = Geometry::custom(24 << 10, size, count, 2).expect("a geometry");
        let styles: Vec<Style> = (0..volumes)
            .map(|_| {
                let order = match rng.chance(1, 3) {
                    true => Order::Relaxed,
                    false if seed % 3 == 2 => Order::Grouped,
                    false => Order::Strict,
                };
                Style { mode: Mode::Writeback, order, write_cache: true, pass_discard: false }
            })
            .collect();
        let mut disks = vec![DiskState::new((1..=SECTORS).collect()); volumes];
        disks.extend((0..volumes).map(|v| DiskState::raw(REDO_SECTORS).named(100 + v as u64)));
        let memory = Memory::new(class, geometry.device_size);
        let world = World::new(Snapshot { what: "the beginning", memory, disks }, seed);
        let options = FormatOptions { geometry: Some(geometry), ..FormatOptions::default() };
        format(&SimPmem::new(&world), &SimClock::default(), &options).expect("fresh memory");
        let mut machine = Machine::open(&world, &styles, 1).expect("a fresh cache");
        let mut early = Vec::new();
        let steps = rng.between(60, 140);
        for i in 0..steps {
            let volume = rng.index(volumes);
            let (first, count) = (rng.below(SECTORS - 24), rng.between(1, 24));
            let blank = SimBuffer::default();
            match rng.below(12) {
                0..6 => {
                    let data = SimBuffer::of_write(volume, first, count, 1000 + i);
                    request(&mut machine, volume, RequestKind::Write, first, data);
                }
                6 => {
                    let kind = RequestKind::WriteZeroes { sectors: count, unmap: false };
                    request(&mut machine, volume, kind, first, blank);
                }
                7 | 8 => _ = read(&mut machine, volume, first, 8),
                9 => _ = request(&mut machine, volume, RequestKind::Flush, 0, blank),
                _ if i + 10 < steps => drain(&mut machine),
                _ => {}
            }
            machine.step_all();
            if i % 29 == 20 {
                early.push(world.photograph("early"));
            }
            if i == steps / 2 && seed % 4 == 2 {
                Self::lose_something(&world, &mut machine, &mut rng);
            }
        }
        settle(&mut machine);
        let all: Vec<Vec<Option<u64>>> = (0..volumes).map(|v| read_all(&mut machine, v)).collect();
        settle(&mut machine);
        let lost = all.iter().map(|v| v.iter().map(Option::is_none).collect()).collect();
        let expected = all.iter().map(|v| v.iter().map(|s| s.unwrap_or(0)).collect()).collect();
        // Nobody is at work any more, on the disks either.
        let image = world.photograph("at rest").daemon_crash(&mut rng);
        Subject { seed, geometry, styles, image, early, expected, lost }
    }

    /// Damages some dirty payload and has it listed.
    fn lose_something(world: &World, machine: &mut Machine, rng: &mut Rng) {
        settle(machine);
        let mut dirty = Vec::new();
        machine.served[0].volume.for_each_extent(|e| {
            if e.place.dirty && !e.place.zero {
                dirty.push(e.place.position as usize * 512);
            }
        });
        if !dirty.is_empty() {
            let at = rng.pick(&dirty);
            world.with(|w| w.memory.corrupt(at, |bytes| bytes[7] ^= 1));
            drain(machine);
        }
    }

    /// The words by which a finding may name what lies at a byte of the media.
    fn names(&self, at: usize) -> Vec<String> {
        let g = &self.geometry;
        let (at, end) = (at as u64, g.device_size - g.meta_size);
        if (g.meta_size..end).contains(&at) {
            return vec![
                format!("segment {} ", (at - g.meta_size) / u64::from(g.segment_size)).trim().into(),
            ];
        }
        match (if at < end { at } else { at - end }) / 4096 {
            0 | 1 => vec!["superblock".into(), "start page".into()],
            page => vec![format!("volume slot {}", (page - 2) / 2)],
        }
    }

    /// Does one random damage to `image`; says what, and where.
    fn damage(&self, image: &mut Snapshot, rng: &mut Rng) -> (String, Vec<usize>) {
        let len = image.memory.len();
        let (a, b) = (rng.index(len) & !63, rng.index(len) & !63);
        let early = &self.early[rng.index(self.early.len())];
        match rng.below(8) {
            0 => {
                let bit = rng.index(512);
                image.memory.corrupt(a, |bytes| bytes[bit / 8] ^= 1 << (bit % 8));
                (format!("bit {bit} of line {a:#x}"), vec![a])
            }
            1 => {
                image.memory.corrupt(a, |bytes| bytes[..64].fill(0));
                (format!("line {a:#x} zeroed"), vec![a])
            }
            2 => {
                let a = a & !511;
                image.memory.corrupt(a, |bytes| bytes[..512].fill(0));
                (format!("sector {a:#x} zeroed"), vec![a])
            }
            3 => {
                let (first, second) = (image.memory.copy(a, 64), image.memory.copy(b, 64));
                image.memory.corrupt(a, |bytes| bytes[..64].copy_from_slice(&second));
                image.memory.corrupt(b, |bytes| bytes[..64].copy_from_slice(&first));
                (format!("lines {a:#x} and {b:#x} swapped"), vec![a, b])
            }
            4 => {
                let old = early.memory.copy(a, 64);
                image.memory.corrupt(a, |bytes| bytes[..64].copy_from_slice(&old));
                (format!("line {a:#x} as it was earlier"), vec![a])
            }
            5 => {
                let a = a & !511;
                let old = early.memory.copy(a, 512);
                image.memory.corrupt(a, |bytes| bytes[..512].copy_from_slice(&old));
                (format!("sector {a:#x} as it was earlier"), vec![a])
            }
            6 => {
                // Where single words matter and chance seldom comes.
                let g = &self.geometry;
                let id = rng.index(g.segment_count as usize) as u32;
                let words = (g.segment(id) + u64::from(g.liveness_offset())) as usize;
                let a = words + rng.index(g.liveness_words() as usize) * 8;
                let old = early.memory.copy(a, 8);
                image.memory.corrupt(a, |bytes| bytes[..8].copy_from_slice(&old));
                (format!("liveness word {a:#x} as it was earlier"), vec![a])
            }
            _ => {
                let a = a & !4095;
                image.memory.poison(a as u64..a as u64 + 4096);
                (format!("page {a:#x} poisoned"), vec![a])
            }
        }
    }

    /// Compares what every sector shows with what it must; where it differs, says so.
    fn judge(&self, machine: &mut Machine) -> Verdict {
        let mut verdict = Verdict { errors: vec![Vec::new(); self.styles.len()], changed: None };
        for volume in 0..self.styles.len() {
            for (sector, value) in read_all(machine, volume).into_iter().enumerate() {
                match value {
                    None => verdict.errors[volume].push(sector),
                    Some(value) if self.lost[volume][sector] => {
                        verdict.changed =
                            Some(format!("volume {volume}: lost sector {sector} shows {value:#x}"));
                    }
                    Some(value) if value != self.expected[volume][sector] => {
                        verdict.changed = Some(format!("volume {volume}: sector {sector} shows {value:#x}"));
                    }
                    Some(_) => {}
                }
            }
        }
        verdict
    }

    /// One fault, and what came of it.
    fn fault(&self, rng: &mut Rng) -> Result<&'static str, String> {
        let mut image = self.image.clone();
        let (mut what, mut places) = self.damage(&mut image, rng);
        if rng.chance(1, 8) {
            let (also, more) = self.damage(&mut image, rng);
            what = format!("{what} and {also}");
            places.extend(more);
        }
        let fail = |why: String| format!("seed {}: {what}: {why}", self.seed);
        let world = World::new(image, rng.next());
        let mut machine = match Machine::open(&world, &self.styles, 1) {
            Ok(machine) => machine,
            Err(_) => return Ok("refused"),
        };
        let verdict = self.judge(&mut machine);
        if let Some(changed) = verdict.changed {
            let findings = &machine.report.findings;
            let is_named = |name: &String| findings.iter().any(|finding| finding.contains(name.as_str()));
            return match places.iter().flat_map(|&at| self.names(at)).any(|name| is_named(&name)) {
                true => Ok("told by a finding"),
                false => Err(fail(format!("{changed} silently; findings: {findings:?}"))),
            };
        }
        if rng.chance(1, FOLLOWED) {
            self.follow(&world, machine, &verdict.errors).map_err(fail)?;
        }
        let before: usize = self.lost.iter().flatten().filter(|l| **l).count();
        let errors: usize = verdict.errors.iter().map(Vec::len).sum();
        Ok(if errors > before { "read errors" } else { "harmless" })
    }

    /// Drains and starts again: each sector is on the disk, or listed as lost and still an error.
    fn follow(&self, world: &Arc<World>, mut machine: Machine, errors: &[Vec<usize>]) -> Result<(), String> {
        let is_stuck = |m: &Machine| m.served.iter().any(|s| s.volume.counters().writeback_errors > 2);
        for _ in 0..20_000 {
            if machine.served.iter().all(|s| s.volume.is_clean()) || is_stuck(&machine) {
                break;
            }
            machine.clock.advance(500);
            machine.step_all();
        }
        if is_stuck(&machine) {
            // Aloud: a page of metadata cannot be written, or records cannot be read.
            return Ok(());
        }
        for (volume, errors) in errors.iter().enumerate() {
            let list = machine.served[volume].volume.lost();
            let is_listed =
                |s: usize| list.iter().any(|l| (l.range.start..l.range.end()).contains(&(s as u64)));
            let disk = world.with(|w| w.disks[volume].values());
            for (sector, on_disk) in disk.iter().enumerate() {
                match (is_listed(sector), errors.contains(&sector)) {
                    (true, true) => {}
                    (false, false) if *on_disk == self.expected[volume][sector] => {}
                    (listed, failed) => {
                        return Err(format!(
                            "volume {volume}, sector {sector}: listed {listed}, failed {failed}, disk {on_disk:#x}",
                        ));
                    }
                }
            }
        }
        drop(machine);
        let world = World::new(world.photograph("drained").daemon_crash(&mut Rng::new(1)), 1);
        let mut again = Machine::open(&world, &self.styles, 1).map_err(|e| format!("the next start: {e}"))?;
        let verdict = self.judge(&mut again);
        match verdict.changed {
            Some(changed) => Err(format!("after a drain and a start {changed}")),
            None if verdict.errors != errors => {
                Err(format!("{:?} failed before, {errors:?} after", verdict.errors))
            }
            None => Ok(()),
        }
    }
}

struct Verdict {
    /// Sectors that answer with an error, by volume.
    errors: Vec<Vec<usize>>,
    changed: Option<String>,
}

fn scene(class: MediaClass, order: Order) -> Scene {
    Scene::new(class, Style { mode: Mode::Writeback, order, write_cache: true, pass_discard: false })
}

/// The first record of each segment in use, as a byte of the media.
fn first_records(scene: &Scene) -> Vec<usize> {
    let geometry = Geometry::custom(16 << 10, 64 << 10, 12, 1).expect("a scene's");
    let bytes = scene.world.with(|w| w.memory.bytes());
    let end = |id| (geometry.segment(id) + u64::from(geometry.data_end())) as usize;
    (0..12).map(|id| end(id) - 256).filter(|&at| bytes[at..at + 4] == *b"PCRC").collect()
}

#[test]
fn a_segment_whose_records_rot_under_its_summary_is_evicted_whole_before_its_reuse() {
    for class in [AssumeDax, PageCache] {
        let mut scene = scene(class, Order::Strict);
        let mut expected: Vec<u64> = (1..=512).collect();
        // Two of three writes are to places of their own, so that no segment empties by itself.
        let fill = |scene: &mut Scene, expected: &mut Vec<u64>, values: Range<u64>| {
            for value in values {
                let first = if value % 3 == 0 { 0 } else { value * 2 / 3 * 8 };
                scene.write(first, 8, 1000 + value);
                expected[first as usize..first as usize + 8].fill(1000 + value);
                scene.drain();
                (0..8).for_each(|_| scene.machine.step_all());
            }
        };
        fill(&mut scene, &mut expected, 0..45);
        scene.daemon_crash();
        let records = first_records(&scene);
        assert!(records.len() > 3);
        for at in records {
            scene.world.with(|w| w.memory.corrupt(at, |bytes| bytes[..64].fill(0)));
        }
        fill(&mut scene, &mut expected, 45..95);
        let counters = scene.machine.served[0].volume.counters();
        assert!(counters.evicted_sectors > 0, "{class}");
        assert_eq!(scene.machine.read_all(0).expect("nothing is lost"), expected, "{class}");
    }
}

#[test]
fn write_back_does_not_pass_over_a_record_that_rots_while_it_is_dirty() {
    for class in [AssumeDax, PageCache] {
        let mut scene = scene(class, Order::Strict);
        scene.write(8, 8, 900);
        scene.write(16, 8, 901);
        scene.write(24, 8, 902);
        scene.flush();
        let at = first_records(&scene)[0];
        scene.world.with(|w| w.memory.corrupt(at, |bytes| bytes[..64].fill(0)));
        let failed = |s: &Scene| s.machine.served[0].volume.counters().writeback_errors > 0;
        assert!(scene.write_back(true, failed), "{class}: the loss of keys stops the volume");
        assert!(!scene.machine.served[0].volume.is_clean(), "{class}");
        assert_eq!((scene.on_disk(8), scene.on_disk(16)), (9, 17), "{class}");
    }
}

#[test]
fn damage_at_rest_is_harmless_or_told() {
    let faults = number("PCACHE_DAMAGE_FAULTS").unwrap_or(FAULTS);
    let alone = number("PCACHE_DAMAGE_SEED");
    let kept = KEPT.len() as u64;
    let images = if alone.is_some() { 1 } else { kept + faults.div_ceil(FAULTS_PER_IMAGE) };
    let next = AtomicU64::new(0);
    let total = Mutex::new((BTreeMap::<&str, u64>::new(), Vec::new()));
    let work = || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= images {
                return;
            }
            let seed = KEPT.get(i as usize).copied().unwrap_or_else(|| i + 1 - kept);
            let subject = Subject::new(alone.unwrap_or(seed));
            let mut rng = Rng::new(subject.seed ^ 0xda3a);
            for _ in 0..FAULTS_PER_IMAGE {
                let outcome = subject.fault(&mut rng);
                let mut total = total.lock().expect("no thread panicked with it");
                match outcome {
                    Ok(outcome) => *total.0.entry(outcome).or_default() += 1,
                    Err(silent) => total.1.push(silent),
                }
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        work();
    });
    let (outcomes, silent) = total.into_inner().expect("no thread panicked with it");
    println!("{images} images, {} silent, {outcomes:?}", silent.len());
    assert!(silent.is_empty(), "{} of them:\n{}", silent.len(), silent[..silent.len().min(20)].join("\n"));
    for outcome in ["harmless", "refused", "read errors"] {
        assert!(alone.is_some() || outcomes.contains_key(outcome), "never {outcome}: {outcomes:?}");
    }
}
