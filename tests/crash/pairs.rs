//! The pair of a cache and a disk, cut by crashes: whatever instant is left of a step of its
//! generation is recognised, whatever is of another time is refused, and clean data that an operator
//! has dropped stays dropped.

use std::sync::Arc;

use pcache_vhost::cache::{AdoptOptions, AttachOptions, Cache, Mode, Order, Volume};
use pcache_vhost::pmem::MediaClass::{AssumeDax, PageCache};
use pcache_vhost::sim::{
    DiskState, DiskSurvival, Machine, Rng, Scene, SimBacking, SimClock, SimEnv, SimPmem, Snapshot, Style,
    Survival, World,
};

const STYLE: Style =
    Style { mode: Mode::Writeback, order: Order::Strict, write_cache: true, pass_discard: false };

type Attached = (Arc<Cache<SimEnv>>, Arc<Volume<SimEnv>>);

fn open(world: &Arc<World>) -> Arc<Cache<SimEnv>> {
    Cache::<SimEnv>::open(Arc::new(SimPmem::new(world)), SimClock::default()).expect("a legal image").0
}

fn attach(world: &Arc<World>, sidecar: Option<bool>) -> Result<Attached, String> {
    world.act_as(0);
    let cache = open(world);
    let options = AttachOptions {
        name: "volume0".to_owned(),
        backing: Arc::new(SimBacking::new(world, 0)),
        mode: Mode::Writeback,
        order: Order::Strict,
        redo: None,
        data_crc: true,
        pass_discard: false,
        read_only: false,
        serial: String::new(),
        block_size: None,
        queues: 1,
        queue_size: 256,
        force_identity: false,
        sidecar,
        accept_loss: false,
        reads: Default::default(),
        allow_volatile: false,
        group: None,
    };
    let volume = cache.attach(options).map_err(|e| e.to_string())?;
    Ok((cache, volume))
}

/// A life in which nothing is done.
fn live(world: &Arc<World>, sidecar: Option<bool>) {
    let (cache, volume) = attach(world, sidecar).expect("a pair");
    cache.detach(&volume).expect("nothing fails here");
    cache.close().expect("nothing fails here");
}

fn world(image: &Snapshot) -> Arc<World> {
    World::new(image.clone(), 5)
}

/// What crashes at an instant may leave.
fn crashes(cut: &Snapshot) -> Vec<Snapshot> {
    let mut rng = Rng::new(7);
    let mut images = vec![cut.daemon_crash(&mut rng)];
    for survival in [Survival::Nothing, Survival::Everything] {
        images.push(cut.host_crash(&survival, DiskSurvival::Nothing, &mut rng).0);
    }
    images
}

/// Runs `act` on `image`, and `judge` on what crashes before each of its events leave. Returns what
/// is left in the end.
fn cut_everywhere(
    image: &Snapshot,
    act: impl Fn(&Arc<World>),
    mut judge: impl FnMut(&Snapshot, u64),
) -> Snapshot {
    for n in 0.. {
        let world = world(image);
        world.with(|w| w.cuts.at = w.events + n + 1);
        act(&world);
        match world.take_cuts().pop() {
            Some((_, cut)) => crashes(&cut).iter().for_each(|image| judge(image, n)),
            None => return world.photograph("the end").daemon_crash(&mut Rng::new(3)),
        }
    }
    unreachable!("an act ends")
}

/// A crash anywhere in a life with a sidecar leaves a pair; parts of two times are none.
pub fn steps_of_a_pair(images: &mut u64) {
    for class in [AssumeDax, PageCache] {
        let mut scene = Scene::new(class, STYLE);
        scene.write(8, 8, 900);
        scene.drain();
        let mut last = scene.end();
        for (act, sidecar) in [Some(true), None, Some(true), Some(false), Some(true)].into_iter().enumerate()
        {
            let next = cut_everywhere(
                &last,
                |world| live(world, sidecar),
                |image, n| {
                    *images += 1;
                    let attached = attach(&world(image), None);
                    assert!(attached.is_ok(), "{class}, life {act} cut at {n}: {:?}", attached.err());
                },
            );
            let mixed = Snapshot { disks: last.disks.clone(), ..next.clone() };
            let refused = attach(&world(&mixed), None).err();
            assert!(refused.is_some(), "{class}, life {act}: an older sidecar is accepted");
            let mixed = Snapshot { disks: next.disks.clone(), ..last.clone() };
            let refused = attach(&world(&mixed), None).err();
            assert!(refused.is_some(), "{class}, life {act}: an older cache is accepted");
            last = next;
        }
    }
}

/// Who adopts another disk and drops what is clean reads that disk, and until then nothing.
pub fn dropped_clean_data(images: &mut u64) {
    for class in [AssumeDax, PageCache] {
        let mut scene = Scene::new(class, STYLE);
        scene.write(8, 8, 900);
        scene.drain();
        scene.write(24, 8, 901);
        scene.flush();
        let mut left = scene.end();
        let sectors = left.disks[0].sectors();
        left.disks[0] = DiskState::new((0..sectors).map(|sector| 5000 + sector).collect());
        let expected = |sector: u64| if (24..32).contains(&sector) { 901 } else { 5000 + sector };
        let read = |image: &Snapshot| {
            let mut machine = Machine::open(&world(image), &[STYLE], 1)?;
            let values = machine.read_all(0)?;
            let wrong = (0..sectors).find(|&sector| values[sector as usize] != expected(sector));
            assert_eq!(wrong, None, "{class}: {values:?}");
            Ok::<(), String>(())
        };
        assert!(read(&left).is_err(), "{class}: another disk is accepted");
        let adopt = |world: &Arc<World>| {
            world.act_as(0);
            let (cache, backing) = (open(world), SimBacking::new(world, 0));
            let how = AdoptOptions { drop_clean: true, grow: false };
            cache.adopt("volume0", &backing, how).expect("nothing fails here");
            cache.close().expect("nothing fails here");
        };
        let mut refusals = 0;
        let adopted = cut_everywhere(&left, adopt, |image, _| {
            *images += 1;
            refusals += u64::from(read(image).is_err());
        });
        assert!(refusals > 0, "no crash came before the decision");
        read(&adopted).unwrap_or_else(|e| panic!("{class}: adopted and refused: {e}"));
        // What was dirty then is clean later, and dropping it is right as well.
        let mut life = Scene::new(class, STYLE);
        life.start(adopted);
        life.drain();
        let drained = life.end();
        read(&drained).unwrap_or_else(|e| panic!("{class}: drained and refused: {e}"));
    }
}

#[test]
fn a_crash_anywhere_in_a_step_leaves_a_pair_and_parts_of_two_times_are_none() {
    steps_of_a_pair(&mut 0);
}

#[test]
fn clean_data_dropped_for_another_disk_never_comes_back() {
    dropped_clean_data(&mut 0);
}
