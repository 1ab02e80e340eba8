//! A `sync` of page-cache media that fails: pages that still read back exist nowhere else. The next
//! start believes the device, brings what is left to the disk, and takes no writes before that.

use std::sync::Arc;

use pcache_vhost::cache::{AttachError, AttachOptions, Cache, Mode, Order};
use pcache_vhost::pmem::MediaClass::PageCache;
use pcache_vhost::sim::{
    DiskSurvival, Machine, Rng, Scene, SimBacking, SimBuffer, SimClock, SimEnv, SimPmem, Snapshot, Style,
    Survival, World,
};
use pcache_vhost::volume::{RequestKind, Status};

const STYLE: Style =
    Style { mode: Mode::Writeback, order: Order::Strict, write_cache: true, pass_discard: false };

fn options(world: &Arc<World>) -> AttachOptions<SimEnv> {
    AttachOptions {
        name: "volume0".to_owned(),
        backing: Arc::new(SimBacking::new(world, 0)),
        mode: STYLE.mode,
        order: STYLE.order,
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
        accept_loss: false,
        allow_volatile: false,
        group: None,
    }
}

fn open(world: &Arc<World>) -> Arc<Cache<SimEnv>> {
    Cache::<SimEnv>::open(Arc::new(SimPmem::new(world)), SimClock::default()).expect("it opens").0
}

#[test]
fn after_a_failed_sync_the_device_is_drained_and_nothing_else_is_believed() {
    let mut partly = [0; 3];
    for round in 0..120 {
        let mut scene = Scene::new(PageCache, STYLE);
        // Other dice for each round: which pages are lost.
        (0..round).for_each(|_| scene.world.with(|w| _ = w.rng.next()));
        scene.write(8, 8, 900);
        scene.flush();
        scene.machine.housekeeper();
        scene.write(8, 1, 901);
        scene.write(40, 1, 901);
        scene.world.with(|w| w.faults.sync = 10_000);
        let (status, _) = scene.request(RequestKind::Flush, 0, SimBuffer::default());
        assert_eq!(status, Status::IoError);
        scene.machine.housekeeper();
        // What reads back now may be nowhere else; what the next start shows must be.
        let image = match round % 3 {
            0 => scene.world.photograph("daemon").daemon_crash(&mut pcache_vhost::sim::Rng::new(round)),
            _ => {
                let photo = scene.world.photograph("host");
                photo
                    .host_crash(
                        &Survival::Random,
                        DiskSurvival::Nothing,
                        &mut pcache_vhost::sim::Rng::new(round),
                    )
                    .0
            }
        };
        let world = World::new(image, round);
        let cache = open(&world);
        if round % 3 == 0 {
            assert!(cache.has_failed(), "round {round}: the page cache remembers");
        }
        if cache.has_failed() {
            let refused = cache.attach(options(&world)).map(|_| ());
            assert!(matches!(refused, Err(AttachError::SyncFailed)), "round {round}: {refused:?}");
        }
        let volume = cache.attach_to_drain(options(&world)).expect("to be drained");
        volume.drain_here(&mut |_| {}).expect("the disk is well");
        let disk = world.with(|w| w.disks[0].durable_values().to_vec());
        for (sector, value) in disk.iter().enumerate().take(16).skip(8) {
            assert!([900, 901].contains(value), "round {round}: sector {sector} is {value:#x}");
        }
        for (sector, value) in disk.iter().enumerate().take(48).skip(40) {
            let is_legal = [sector as u64 + 1, 901].contains(value);
            assert!(is_legal, "round {round}: sector {sector} is {value:#x}");
        }
        partly[usize::from(disk[8] == 901) + usize::from(disk[40] == 901)] += 1;
        let had_failed = cache.has_failed();
        assert_eq!(cache.forgive().expect("the device is well again"), had_failed);
        drop((volume, cache));
        let volume = open(&world).attach(options(&world)).expect("nothing is left that could suffer");
        assert!(volume.is_clean());
    }
    assert!(partly[0] > 0 && partly[2] > 0, "{partly:?}");
}

/// What a start after a `sync` that may have failed shows of sector 8, now and after a power cut;
/// `None` if it does not serve.
fn shown(image: Snapshot, seed: u64) -> Option<u64> {
    let world = World::new(image, seed);
    let error = match Machine::open(&world, &[STYLE], 1) {
        Ok(mut machine) => {
            let values = machine.read_all(0).expect("it serves what it recovered");
            let photo = world.photograph("served");
            let (after, _) = photo.host_crash(&Survival::Nothing, DiskSurvival::Nothing, &mut Rng::new(seed));
            let mut machine = Machine::open(&World::new(after, seed), &[STYLE], 1).expect("a power cut");
            assert_eq!(machine.read_all(0).expect("a power cut"), values, "seed {seed}");
            return Some(values[8]);
        }
        Err(error) => error,
    };
    assert!(error.contains("making the cache durable has failed before"), "seed {seed}: {error}");
    None
}

/// A daemon killed within a `sync` that fails, or before it has said so: what its guest was told is
/// there, durably, or the next start does not serve. Wherever that start is cut off, the one after it
/// says the same.
#[test]
fn a_failed_sync_that_nobody_lived_to_tell_of_is_found_out() {
    let (mut served, mut refused, mut cuts) = (0, 0, 0);
    for seed in 0..40 {
        let mut scene = Scene::new(PageCache, STYLE);
        (0..seed).for_each(|_| scene.world.with(|w| _ = w.rng.next()));
        scene.write(8, 1, 900);
        scene.flush();
        scene.write(8, 1, 901);
        scene.submit(RequestKind::Flush, 0, SimBuffer::default());
        scene.world.with(|w| w.faults.sync = 10_000);
        scene.machine.sync();
        let image = scene.world.photograph("told by the kernel").daemon_crash(&mut Rng::new(seed));
        let first = shown(image.clone(), seed);
        match first {
            Some(value) => assert_eq!(value, 901, "seed {seed}: an acknowledged write is lost"),
            None => refused += 1,
        }
        served += u64::from(first.is_some());
        for n in 0.. {
            let world = World::new(image.clone(), seed);
            world.with(|w| w.cuts.at = n + 1);
            drop(Machine::open(&world, &[STYLE], 1));
            let Some((_, photo)) = world.take_cuts().pop() else { break };
            cuts += 1;
            let again = shown(photo.daemon_crash(&mut Rng::new(n)), seed);
            assert_eq!(again, first, "seed {seed}, cut before event {n} of the start");
        }
    }
    assert!(served > 0 && refused > 20 && cuts > 400, "{served} served, {refused} refused, {cuts} cuts");
}

#[test]
fn a_sync_that_fails_while_a_cache_is_opened_is_remembered_by_the_next_start() {
    let mut refused = 0;
    for seed in 0..40 {
        let mut scene = Scene::new(PageCache, STYLE);
        scene.write(8, 1, 900);
        scene.flush();
        scene.write(8, 1, 901);
        let image = scene.world.photograph("killed").daemon_crash(&mut Rng::new(seed));
        let world = World::new(image, seed);
        world.with(|w| w.faults.sync = 10_000);
        let error = Machine::open(&world, &[STYLE], 1).err().expect("nothing can be made durable");
        assert!(error.contains("cannot be made durable"), "{error}");
        match shown(world.photograph("gave up").daemon_crash(&mut Rng::new(seed)), seed) {
            Some(value) => assert_eq!(value, 901, "seed {seed}: an acknowledged write is lost"),
            None => refused += 1,
        }
    }
    assert!(refused > 20, "{refused} refused");
}
