//! Lost sectors: dirty data that rots in the cache before the disk has it.
//!
//! Whatever happens afterwards, nobody reads the disk's older bytes for it as if they were the
//! newest; the rest of the volume goes on, and overwriting heals.

use std::sync::Arc;

use pcache_vhost::cache::{AttachError, AttachOptions, Cache, Mode, Order, Volume, check};
use pcache_vhost::onmedia::{Geometry, LOST_MAX, LostCause};
use pcache_vhost::pmem::MediaClass::{self, AssumeDax, PageCache};
use pcache_vhost::sim::{
    DiskSurvival, Rng, Scene, SimBacking, SimBuffer, SimClock, SimEnv, SimPmem, Snapshot, Style, Survival,
};
use pcache_vhost::volume::{RequestKind, Status};

fn style(order: Order) -> Style {
    Style { mode: Mode::Writeback, order, write_cache: true, pass_discard: false }
}

const ALL: [(MediaClass, Order); 4] = [
    (AssumeDax, Order::Strict),
    (AssumeDax, Order::Relaxed),
    (PageCache, Order::Strict),
    (PageCache, Order::Relaxed),
];

/// Which write a sector shows; `None` for an error.
fn try_read(scene: &mut Scene, sector: u64) -> Option<u64> {
    let (status, data) = scene.request(RequestKind::Read, sector, SimBuffer::to_read(1));
    (status == Status::Ok).then(|| data.values(0, sector).expect("a sector of this disk")[0])
}

/// Where the cache has a sector, as a byte of the media.
fn place_of(scene: &Scene, sector: u64) -> usize {
    let mut at = None;
    scene.machine.served[0].volume.for_each_extent(|extent| {
        if (extent.range.start..extent.range.end()).contains(&sector) && !extent.place.zero {
            at = Some(extent.place_at(sector).position as usize * 512);
        }
    });
    at.expect("the sector is cached")
}

/// Flips a bit of a sector's payload.
fn rot(scene: &Scene, sector: u64) {
    let at = place_of(scene, sector);
    scene.world.with(|w| w.memory.corrupt(at + 100, |bytes| bytes[0] ^= 4));
}

/// Lets all that was written become durable, and the witness of it: what rots before that cannot be
/// told from what a crash tore.
fn settle(scene: &mut Scene) {
    scene.flush();
    for _ in 0..4 {
        scene.machine.sync();
        scene.machine.housekeeper();
    }
    scene.flush();
}

/// First sector and end of each lost range.
fn lost(scene: &Scene) -> Vec<(u64, u64)> {
    let list = scene.machine.served[0].volume.lost();
    list.iter().map(|l| (l.range.start, l.range.end())).collect()
}

fn power_cut(scene: &mut Scene) {
    scene.host_crash(Survival::Nothing, DiskSurvival::Nothing);
}

#[test]
fn a_lost_block_is_listed_and_the_rest_goes_on() {
    for (class, order) in ALL {
        let mut scene = Scene::new(class, style(order));
        scene.write(8, 8, 900);
        scene.write(16, 8, 901);
        settle(&mut scene);
        rot(&scene, 10);
        assert_eq!((try_read(&mut scene, 8), try_read(&mut scene, 16)), (None, Some(901)), "{class} {order}");
        scene.drain();
        assert_eq!(lost(&scene), [(8, 16)], "{class} {order}: one checksum covers the block");
        assert_eq!(scene.machine.served[0].volume.lost()[0].cause, LostCause::Checksum);
        assert_eq!((scene.on_disk(8), scene.on_disk(16)), (9, 901), "{class} {order}");
        assert_eq!(scene.machine.served[0].volume.counters().lost_sectors, 8);
        for round in 0..3 {
            assert_eq!(lost(&scene), [(8, 16)], "{class} {order}, start {round}");
            for (sector, shows) in [(7, Some(8)), (8, None), (15, None), (16, Some(901)), (24, Some(25))] {
                assert_eq!(try_read(&mut scene, sector), shows, "{class} {order}, start {round}: {sector}");
            }
            if round == 0 {
                scene.daemon_crash()
            } else {
                power_cut(&mut scene)
            }
            let told = |text: &String| text.contains("volume0") && text.contains("sectors 8..16");
            assert!(scene.machine.report.findings.iter().any(told), "{:?}", scene.machine.report.findings);
        }
        let report = check(&Arc::new(SimPmem::new(&scene.world)));
        let told = |text: &String| text.starts_with("volume volume0: sectors 8..16 are lost");
        assert!(report.findings.iter().any(told), "{:?}", report.findings);
    }
}

#[test]
fn overwriting_heals_exactly_what_was_overwritten() {
    for (class, order) in ALL {
        for zeros in [false, true] {
            let mut scene = Scene::new(class, style(order));
            scene.write(8, 8, 900);
            settle(&mut scene);
            rot(&scene, 8);
            scene.drain();
            let healed = if zeros { 0 } else { 902 };
            if zeros {
                scene.zero(9, 3)
            } else {
                scene.write(9, 3, 902)
            }
            scene.flush();
            let now = [(8, None), (9, Some(healed)), (11, Some(healed)), (12, None)];
            for round in 0..4 {
                for (sector, shows) in now {
                    let read = try_read(&mut scene, sector);
                    assert_eq!(read, shows, "{class} {order} zeros {zeros}, round {round}: {sector}");
                }
                match round {
                    0 => power_cut(&mut scene),
                    1 => {
                        scene.drain();
                        assert_eq!(lost(&scene), [(8, 9), (12, 16)], "{class} {order}");
                    }
                    _ => power_cut(&mut scene),
                }
            }
            scene.write(8, 8, 903);
            scene.drain();
            assert_eq!(lost(&scene), [], "{class} {order}");
            power_cut(&mut scene);
            assert_eq!((try_read(&mut scene, 8), scene.on_disk(15)), (Some(903), 903), "{class} {order}");
            assert!(scene.machine.report.findings.is_empty(), "{:?}", scene.machine.report.findings);
        }
    }
}

#[test]
fn a_healed_sector_stays_healed_when_its_segment_is_reclaimed() {
    for (class, order) in ALL {
        let mut scene = Scene::new(class, style(order));
        scene.write(8, 8, 900);
        settle(&mut scene);
        rot(&scene, 8);
        scene.drain();
        scene.write(8, 8, 901);
        scene.drain();
        for i in 0..60 {
            scene.write(100 + i % 10 * 16, 16, 1000 + i);
            scene.flush();
            scene.drain();
            (0..20).for_each(|_| scene.machine.step_all());
        }
        assert!(scene.machine.served[0].volume.counters().reclaimed > 0);
        power_cut(&mut scene);
        assert_eq!(try_read(&mut scene, 8), Some(901), "{class} {order}");
    }
}

#[test]
fn no_crash_on_the_way_shows_the_disks_older_bytes() {
    for (class, order) in ALL {
        let mut cuts = 0;
        loop {
            let mut scene = Scene::new(class, style(order));
            scene.write(8, 8, 899);
            scene.drain();
            scene.write(8, 8, 900);
            scene.write(32, 8, 900);
            settle(&mut scene);
            rot(&scene, 8);
            let Some(image) = scene.cut(cuts, Scene::drain) else { break };
            let mut rng = Rng::new(cuts);
            for survival in [Survival::Nothing, Survival::Everything, Survival::Random, Survival::Torn] {
                let (image, _) = image.host_crash(&survival, DiskSurvival::Random, &mut rng);
                scene.start(image);
                let read = (try_read(&mut scene, 8), try_read(&mut scene, 32));
                assert_eq!(read, (None, Some(900)), "{class} {order}, cut {cuts}, {survival:?}");
                scene.drain();
                assert_eq!(lost(&scene), [(8, 16)], "{class} {order}, cut {cuts}, {survival:?}");
            }
            cuts += 1;
        }
        assert!(cuts > 8, "{class} {order}: only {cuts} cuts");
    }
}

#[test]
fn no_crash_while_it_heals_loses_what_healed_it() {
    for (class, order) in ALL {
        let mut cuts = 0;
        loop {
            let mut scene = Scene::new(class, style(order));
            scene.write(8, 8, 900);
            settle(&mut scene);
            rot(&scene, 8);
            scene.drain();
            scene.write(8, 4, 901);
            scene.flush();
            let Some(image) = scene.cut(cuts, Scene::drain) else { break };
            let mut rng = Rng::new(cuts);
            for survival in [Survival::Nothing, Survival::Everything, Survival::Random, Survival::Torn] {
                let (image, _) = image.host_crash(&survival, DiskSurvival::Random, &mut rng);
                scene.start(image);
                let read = (try_read(&mut scene, 8), try_read(&mut scene, 12));
                assert_eq!(read, (Some(901), None), "{class} {order}, cut {cuts}, {survival:?}");
            }
            cuts += 1;
        }
        assert!(cuts > 8, "{class} {order}: only {cuts} cuts");
    }
}

#[test]
fn a_version_lost_below_a_newer_one_is_not_missed() {
    for class in [AssumeDax, PageCache] {
        let mut cuts = 0;
        loop {
            let mut scene = Scene::new(class, style(Order::Strict));
            scene.write(8, 8, 900);
            settle(&mut scene);
            rot(&scene, 8);
            scene.write(8, 8, 901);
            let Some(image) = scene.cut(cuts, Scene::drain) else { break };
            for survival in [Survival::Nothing, Survival::Everything, Survival::Torn] {
                let (image, _) = image.host_crash(&survival, DiskSurvival::Random, &mut Rng::new(cuts));
                scene.start(image);
                let read = try_read(&mut scene, 8);
                let is_legal = read == Some(901) || (read.is_none() && class == PageCache);
                assert!(is_legal, "{class}, cut {cuts}, {survival:?}: {read:?}");
            }
            cuts += 1;
        }
        assert!(cuts > 8, "{class}: only {cuts} cuts");
    }
}

#[test]
fn a_list_that_is_full_stops_the_tail_and_nothing_is_forgotten() {
    let mut scene = Scene::new(AssumeDax, style(Order::Strict));
    // Single sectors far enough apart: no two are in one range.
    let count = LOST_MAX as u64 + 1;
    for i in 0..count {
        scene.write(i * 2, 1, 1000 + i);
    }
    settle(&mut scene);
    for i in 0..count {
        rot(&scene, i * 2);
    }
    let stopped = |s: &Scene| s.machine.served[0].volume.counters().writeback_errors >= 3;
    assert!(scene.write_back(true, stopped), "the round must fail");
    assert!(!scene.machine.served[0].volume.is_clean());
    assert!(lost(&scene).len() <= LOST_MAX);
    power_cut(&mut scene);
    assert_eq!((try_read(&mut scene, 0), try_read(&mut scene, 2 * count - 2)), (None, None));
    let before = scene.world.photograph("full");
    let listed = drain_with_the_loss_accepted(&scene);
    power_cut(&mut scene);
    for sector in (0..count).map(|i| i * 2) {
        let shows = if listed.contains(&sector) { None } else { Some(sector + 1) };
        assert_eq!(try_read(&mut scene, sector), shows, "listed, or given up: sector {sector}");
    }
    assert!(listed.len() < LOST_MAX, "what did not fit was given up");
    scene.start(before);
    scene.write(0, 1, 5000);
    scene.drain();
    assert_eq!(lost(&scene).len(), LOST_MAX);
    power_cut(&mut scene);
    assert_eq!((try_read(&mut scene, 0), try_read(&mut scene, 2)), (Some(5000), None));
}

#[test]
fn an_unreadable_page_loses_what_was_in_it_and_no_more() {
    for (class, order) in ALL {
        let mut scene = Scene::new(class, style(order));
        scene.write(8, 24, 900);
        scene.flush();
        let page = place_of(&scene, 16) as u64 & !4095;
        scene.world.with(|w| w.memory.poison(page..page + 4096));
        scene.drain();
        assert_eq!(lost(&scene), [(16, 24)], "{class} {order}");
        assert_eq!(scene.machine.served[0].volume.lost()[0].cause, LostCause::Unreadable);
        assert_eq!((scene.on_disk(8), scene.on_disk(16), scene.on_disk(24)), (900, 17, 900));
        scene.daemon_crash();
        assert_eq!((try_read(&mut scene, 15), try_read(&mut scene, 16)), (Some(900), None));
    }
}

/// What is listed after a drain by an operator who has accepted the loss.
fn drain_with_the_loss_accepted(scene: &Scene) -> Vec<u64> {
    let volume = open(scene, Mode::Writeback, true).expect("accepted");
    volume.drain_here(&mut |_| {}).expect("nothing else is wrong");
    volume.lost().iter().flat_map(|l| l.range.start..l.range.end()).collect()
}

/// Opens a scene's cache and attaches its volume, as an operator would.
fn open(scene: &Scene, mode: Mode, accept_loss: bool) -> Result<Arc<Volume<SimEnv>>, AttachError> {
    let (cache, _) = Cache::<SimEnv>::open(Arc::new(SimPmem::new(&scene.world)), SimClock::default())
        .expect("a cache that opened before");
    cache.attach(AttachOptions {
        name: "volume0".to_owned(),
        backing: Arc::new(SimBacking::new(&scene.world, 0)),
        mode,
        order: Order::Strict,
        redo: None,
        data_crc: true,
        pass_discard: false,
        reads: Default::default(),
        read_only: false,
        serial: String::new(),
        block_size: None,
        queues: 1,
        queue_size: 256,
        force_identity: false,
        sidecar: None,
        accept_loss,
        allow_volatile: false,
        group: None,
    })
}

/// What is lost of a scene's volume once it is attached.
fn attach(scene: &Scene, mode: Mode, accept_loss: bool) -> Result<Vec<(u64, u64)>, AttachError> {
    let volume = open(scene, mode, accept_loss)?;
    Ok(volume.lost().iter().map(|l| (l.range.start, l.range.len)).collect())
}

#[test]
fn only_the_operator_may_trade_a_loss_for_the_disks_older_bytes() {
    for class in [AssumeDax, PageCache] {
        let mut scene = Scene::new(class, style(Order::Strict));
        scene.write(8, 8, 900);
        settle(&mut scene);
        rot(&scene, 8);
        scene.drain();
        for mode in [Mode::Writethrough, Mode::Writearound, Mode::Readonly, Mode::Passthrough] {
            let refused = attach(&scene, mode, false);
            assert!(matches!(refused, Err(AttachError::Lost { sectors: 8, .. })), "{mode}: {refused:?}");
        }
        assert_eq!(attach(&scene, Mode::Writeback, false).expect("served as before"), [(8, 8)]);
        assert_eq!(attach(&scene, Mode::Writeback, true).expect("accepted"), []);
        power_cut(&mut scene);
        assert_eq!(try_read(&mut scene, 8), Some(9), "{class}: what the disk has");
        assert!(scene.machine.report.findings.is_empty());
    }
}

#[test]
fn damage_to_the_newest_copy_of_the_tail_sets_nothing_back() {
    for (class, order) in ALL {
        for copy in 0..2 {
            let mut scene = Scene::new(class, style(order));
            scene.write(8, 8, 900);
            scene.drain();
            scene.write(8, 8, 901);
            scene.drain();
            // The segment of the newer copy goes, that of the older one may stay.
            let mut rounds = 0;
            while scene.machine.served[0].volume.counters().reclaimed == 0 {
                rounds += 1;
                scene.write(100 + rounds % 20 * 16, 16, 1000 + rounds);
                scene.drain();
                (0..20).for_each(|_| scene.machine.step_all());
                assert!(rounds < 500, "nothing is ever reclaimed");
            }
            let geometry = Geometry::custom(16 << 10, 64 << 10, 12, 1).expect("a scene's");
            let at = geometry.tail(0, copy) as usize;
            let mut image: Snapshot = scene.world.photograph("at rest");
            image.memory.corrupt(at + 48, |bytes| bytes[0] ^= 1);
            scene.start(image);
            assert!(scene.machine.served[0].volume.is_clean(), "{class} {order}, copy {copy}");
            assert_eq!(try_read(&mut scene, 8), Some(901), "{class} {order}, copy {copy}");
        }
    }
}

#[test]
fn what_an_earlier_part_has_lost_is_listed_though_the_next_one_failed() {
    for class in [AssumeDax, PageCache] {
        let mut scene = Scene::new(class, style(Order::Grouped));
        for block in 0..8 {
            scene.write(block * 8, 8, 900 + block);
        }
        settle(&mut scene);
        rot(&scene, 10);
        let groups = |scene: &Scene| scene.machine.served[0].volume.counters().groups;
        assert!(scene.write_back(true, |s| groups(s) == 1), "{class}: no group");
        let errors = |scene: &Scene| scene.machine.served[0].volume.counters().writeback_errors;
        scene.world.with(|w| w.faults.away = 0b10);
        assert!(scene.write_back(true, |s| errors(s) > 0), "{class}: nothing failed");
        scene.world.with(|w| w.faults.away = 0);
        scene.drain();
        assert!(groups(&scene) > 1, "{class}: it was all one group");
        assert_eq!(lost(&scene), [(8, 16)], "{class}");
        assert_eq!(try_read(&mut scene, 10), None, "{class}: the disk's older bytes were read");
    }
}
