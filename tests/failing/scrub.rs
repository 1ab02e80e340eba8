//! Scrubbing: what rots is found, healed or told, at the rate that was set, and never in a guest's way.

use pcache_vhost::cache::index::Extent;
use pcache_vhost::cache::{Mode, Order, ScrubOptions, VolumeState};
use pcache_vhost::pmem::MediaClass::{AssumeDax, PageCache};
use pcache_vhost::sim::timed::{Fleet, Member};
use pcache_vhost::sim::{DiskSurvival, Rng, Scene, SimBuffer, Style, Survival};
use pcache_vhost::volume::{RequestKind, Status};

use crate::{MEMBER, seed};

const STYLE: Style =
    Style { mode: Mode::Writeback, order: Order::Strict, write_cache: true, pass_discard: false };
/// As fast as it goes, one pass after the other.
const ALWAYS: ScrubOptions = ScrubOptions { bytes_per_s: 1 << 40, interval_ms: 0 };

fn extents(scene: &Scene) -> Vec<Extent> {
    let mut all = Vec::new();
    scene.machine.served[0].volume.for_each_extent(|e| all.push(e));
    all.retain(|e| !e.place.zero);
    all
}

fn flip(scene: &Scene, extent: &Extent) {
    scene.world.with(|w| w.memory.corrupt(extent.place.position as usize * 512 + 100, |bytes| bytes[0] ^= 4));
}

/// Lets the workers go on until so many more passes have ended. Write-back only where it is told to.
fn passes(scene: &mut Scene, count: u64, writes_back: bool) {
    let upto = scene.machine.cache.scrub_status().passes + count;
    for _ in 0..20_000 {
        if scene.machine.cache.scrub_status().passes >= upto {
            return;
        }
        scene.machine.clock.advance(5);
        scene.machine.sync();
        scene.machine.housekeeper();
        if writes_back {
            scene.machine.writeback(0);
        }
    }
    panic!("scrubbing never ends: {:?}", scene.machine.cache.scrub_status());
}

#[test]
fn damaged_clean_data_is_healed_durably_and_then_read_from_the_disk() {
    for class in [AssumeDax, PageCache] {
        let mut scene = Scene::new(class, STYLE);
        scene.write(8, 32, 900);
        scene.read(100);
        scene.drain();
        let victim = extents(&scene)[0];
        flip(&scene, &victim);
        scene.machine.cache.set_scrub(ALWAYS);
        passes(&mut scene, 2, false);
        let counters = scene.machine.served[0].volume.counters();
        assert!(counters.scrubbed_sectors >= 33, "{class}: {counters:?}");
        assert_eq!(counters.scrub_healed_sectors, 8, "{class}: a block, not its neighbours");
        assert_eq!(counters.scrub_dirty_sectors, 0, "{class}");
        // It stays healed whatever the host loses.
        scene.host_crash(Survival::Nothing, DiskSurvival::Nothing);
        assert!(extents(&scene).iter().all(|e| !e.range.overlaps(&victim.range) || e.range.start >= 16));
        assert_eq!((scene.read(8), scene.read(16)), (900, 900), "{class}");
        let counters = scene.machine.served[0].volume.counters();
        assert_eq!(counters.checksum_errors, 0, "{class}: nobody met the damaged copy");
    }
}

#[test]
fn damaged_dirty_data_is_listed_and_never_read_from_the_disk() {
    let mut scene = Scene::new(AssumeDax, STYLE);
    scene.write(8, 32, 900);
    flip(&scene, &extents(&scene)[0]);
    scene.machine.cache.set_scrub(ALWAYS);
    passes(&mut scene, 1, false);
    let volume = scene.machine.served[0].volume.clone();
    assert_eq!(volume.counters().scrub_dirty_sectors, 8);
    assert_eq!(volume.lost(), [], "the tail's update lists it, and nobody else");
    passes(&mut scene, 20, true);
    assert_eq!(volume.health().state, VolumeState::LostData);
    assert_eq!(volume.lost().iter().map(|l| (l.range.start, l.range.len)).collect::<Vec<_>>(), [(8, 8)]);
    for (sector, status) in [(8, Status::IoError), (15, Status::IoError), (16, Status::Ok)] {
        assert_eq!(scene.request(RequestKind::Read, sector, SimBuffer::to_read(1)).0, status, "{sector}");
    }
    assert_eq!(volume.counters().scrub_dirty_sectors, 8, "what is listed is not found again");
}

#[test]
fn a_structure_with_a_good_copy_is_made_good_and_a_damaged_clean_segment_is_freed() {
    let mut scene = Scene::new(AssumeDax, STYLE);
    for n in 0..40 {
        scene.write(n * 8 % 256, 8, 900 + n);
        scene.machine.step_all();
    }
    scene.drain();
    for _ in 0..50 {
        scene.machine.step_all();
    }
    let geometry = scene.machine.cache.geometry();
    // A copy each of the superblock, the start page and the descriptor, a header's, and a record.
    let pages = [geometry.superblock(1), geometry.start_page(0), geometry.descriptor(0, 0)];
    let header = geometry.segment(0) + u64::from(geometry.header_offset(1));
    let record = geometry.segment(1) + u64::from(geometry.data_end()) - 256 + 20;
    for at in pages.into_iter().chain([header, record]) {
        scene.world.with(|w| w.memory.corrupt(at as usize + 30, |bytes| bytes[0] ^= 1));
    }
    scene.machine.cache.set_scrub(ALWAYS);
    passes(&mut scene, 2, true);
    let status = scene.machine.cache.scrub_status();
    assert!(status.metadata_damaged >= 5, "{status:?}");
    assert_eq!(status.metadata_healed, status.metadata_damaged, "{status:?}");
    let before = status.metadata_damaged;
    passes(&mut scene, 2, true);
    assert_eq!(scene.machine.cache.scrub_status().metadata_damaged, before, "it is good now");
    scene.machine.cache.audit(true).expect("what is counted is there");
    scene.daemon_crash();
    assert_eq!(scene.machine.report.findings, Vec::<String>::new());
    for n in 8..40 {
        assert_eq!(scene.read(n * 8 % 256), 900 + n);
    }
}

/// Damage of any kind and number, scrubbed, crashed: never is anything read that was not written.
#[test]
fn no_damage_that_scrubbing_meets_is_ever_read_as_data() {
    let mut rng = Rng::new(seed());
    let (mut healed, mut told) = (0, 0);
    for round in 0..150 {
        let class = if rng.chance(1, 2) { AssumeDax } else { PageCache };
        let mut scene = Scene::new(class, STYLE);
        let mut expected: Vec<u64> = (1..=512).collect();
        for i in 0..50 {
            let (first, count) = (rng.below(400), rng.between(1, 16));
            scene.write(first, count, 1000 + i);
            expected[first as usize..(first + count) as usize].fill(1000 + i);
            if rng.chance(1, 8) && i < 40 {
                scene.drain();
            }
            (0..4).for_each(|_| scene.machine.step_all());
        }
        scene.flush();
        let all = extents(&scene);
        for _ in 0..rng.between(1, 4) {
            flip(&scene, &all[rng.index(all.len())]);
        }
        scene.machine.cache.set_scrub(ALWAYS);
        let crash_after = rng.below(60);
        for _ in 0..crash_after {
            scene.machine.clock.advance(5);
            scene.machine.step_all();
        }
        let volume = scene.machine.served[0].volume.clone();
        healed += volume.counters().scrub_healed_sectors;
        told += volume.counters().scrub_dirty_sectors;
        if rng.chance(2, 3) {
            scene.host_crash(Survival::Random, DiskSurvival::Nothing);
        }
        for sector in 0..expected.len() as u64 {
            let (status, data) = scene.request(RequestKind::Read, sector, SimBuffer::to_read(1));
            if status == Status::Ok {
                let read = data.values(0, sector).expect("no garbage")[0];
                assert_eq!(read, expected[sector as usize], "round {round}, {class}: sector {sector}");
            }
        }
    }
    println!("{healed} sectors healed, {told} told");
    assert!(healed > 50 && told > 50, "both kinds were met: {healed}, {told}");
}

#[test]
fn scrubbing_reads_no_more_than_its_rate_and_less_beside_guests() {
    let rate = 1 << 20;
    let idle = Member { depth: 0, ..MEMBER };
    let mut fleet = Fleet::new(seed(), 64, &[Member { depth: 4, ..idle }]);
    fleet.run(20_000);
    fleet.quiesce(1000);
    fleet.set_depth(0, 0);
    fleet.scrub(ScrubOptions { bytes_per_s: rate, interval_ms: 0 });
    let bytes = |fleet: &Fleet| fleet.cache.scrub_status().bytes;
    let mut quiet = 0;
    for second in 0..20 {
        let before = bytes(&fleet);
        fleet.run(1000);
        let read = bytes(&fleet) - before;
        quiet += read;
        // A slice may end over the mark.
        assert!(read <= rate + rate / 2 + (1 << 20), "second {second}: {read} bytes");
    }
    assert!((18 * rate..=22 * rate).contains(&quiet), "{quiet} bytes in 20 s");
    fleet.set_depth(0, 4);
    fleet.run(2000);
    let before = bytes(&fleet);
    fleet.run(20_000);
    let busy = bytes(&fleet) - before;
    println!("{quiet} bytes in 20 quiet seconds, {busy} beside a guest");
    assert!((4 * rate..=6 * rate).contains(&busy), "{busy} bytes in 20 s beside a guest");
    assert!(fleet.cache.scrub_status().passes > 1);
}

#[test]
fn scrubbing_under_load_heals_what_rots_and_no_guest_notices() {
    let mut fleet = Fleet::new(seed(), 96, &[MEMBER]);
    fleet.scrub(ScrubOptions { bytes_per_s: 64 << 20, interval_ms: 1000 });
    let mut rng = Rng::new(seed());
    let mut damaged = 0;
    for _ in 0..30 {
        fleet.run(2000);
        let mut clean = Vec::new();
        fleet.volumes[0].for_each_extent(|e| clean.extend((!e.place.zero && !e.place.dirty).then_some(e)));
        if clean.is_empty() {
            continue;
        }
        let victim = clean[rng.index(clean.len())];
        fleet.memory.corrupt(victim.place.position * 512 + 9, |bytes| bytes[0] ^= 1);
        damaged += 1;
    }
    fleet.run(10_000);
    let counters = fleet.volumes[0].counters();
    println!("{damaged} damaged, {} sectors healed", counters.scrub_healed_sectors);
    assert!(damaged > 20 && counters.scrub_healed_sectors > 8 * damaged / 2, "{counters:?}");
    assert_eq!((counters.errors, counters.scrub_dirty_sectors), (0, 0));
    fleet.drain(60_000);
    fleet.judge_disk(0).expect("nothing is lost");
}
