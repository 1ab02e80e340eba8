//! Stories of consistency groups: members that wait, are waited for, leave, and come back.

use std::sync::Arc;

use pcache_vhost::cache::worker::Stepper;
use pcache_vhost::cache::{
    AttachError, AttachOptions, Cache, FormatOptions, Member, Mode, Order, Volume, VolumeState, format,
    recover_group,
};
use pcache_vhost::onmedia::Geometry;
use pcache_vhost::pmem::MediaClass;
use pcache_vhost::pmem::MediaClass::{AssumeDax, PageCache};
use pcache_vhost::sim::{
    DiskState, Machine, Memory, Rng, SimBacking, SimBuffer, SimClock, SimEnv, SimPmem, Snapshot, Style, World,
};
use pcache_vhost::volume::{Request, RequestKind, Status};

/// Sectors of each disk, and of each redo area.
const SECTORS: u64 = 96;
const REDO_SECTORS: u64 = 240;

fn served(order: Order) -> Style {
    Style { mode: Mode::Writeback, order, write_cache: true, pass_discard: false }
}

/// Two volumes of one group, before disks that hold write *s* + 1 in sector *s*.
pub struct Pair {
    pub world: Arc<World>,
    pub machine: Machine,
    order: Order,
    next_tag: u32,
}

impl Pair {
    fn new(class: MediaClass, order: Order) -> Pair {
        Pair::sized(class, order, 12)
    }

    /// On a cache of so many segments.
    pub fn sized(class: MediaClass, order: Order, segments: u32) -> Pair {
        let disk = |n| DiskState::new((1..=SECTORS).collect()).named(n).in_group("vm");
        let mut disks = vec![disk(1), disk(2)];
        if order == Order::Grouped {
            disks.extend((3..5).map(|n| DiskState::raw(REDO_SECTORS).named(n)));
        }
        let geometry = Geometry::custom(32 << 10, 64 << 10, segments, 2).expect("a geometry");
        let memory = Memory::new(class, geometry.device_size);
        let world = World::new(Snapshot { what: "the beginning", memory, disks }, 1);
        let options = FormatOptions { geometry: Some(geometry), ..FormatOptions::default() };
        format(&SimPmem::new(&world), &SimClock::default(), &options).expect("fresh memory");
        let machine = Machine::open(&world, &[served(order); 2], 1).expect("a fresh cache");
        Pair { world, machine, order, next_tag: 1 }
    }

    /// The daemon dies and starts again.
    fn daemon_crash(&mut self) {
        let image = self.world.photograph("a story").daemon_crash(&mut Rng::new(3));
        self.world = World::new(image, 4);
        self.machine = Machine::open(&self.world, &[served(self.order); 2], 1).expect("a legal image");
    }

    fn request(&mut self, volume: usize, kind: RequestKind, sector: u64, data: SimBuffer) {
        let tag = self.next_tag;
        self.next_tag += 1;
        self.machine.submit(volume, 0, Request { tag, kind, sector, data });
        self.machine.commit(volume, 0);
        for _ in 0..1000 {
            if let Some(done) = self.machine.poll(volume, 0).pop() {
                assert_eq!((done.tag, done.status), (tag, Status::Ok), "{kind:?} of volume {volume}");
                return;
            }
            self.machine.clock.advance(1);
            self.machine.sync();
        }
        let volume = &self.machine.served[volume].volume;
        panic!("{kind:?} never ends: {:?}, {:?}", self.machine.cache.space(), volume.counters());
    }

    pub fn write(&mut self, volume: usize, first: u64, value: u64) {
        self.request(volume, RequestKind::Write, first, SimBuffer::of_write(volume, first, 8, value));
    }

    pub fn flush(&mut self, volume: usize) {
        self.request(volume, RequestKind::Flush, 0, SimBuffer::default());
    }

    /// Lets write-back of these volumes do so many steps.
    pub fn work(&mut self, volumes: &[usize], steps: u32) {
        for _ in 0..steps {
            self.machine.clock.advance(500);
            volumes.iter().for_each(|&volume| _ = self.machine.writeback(volume));
            self.machine.sync();
        }
    }

    pub fn drain(&mut self) {
        self.work(&[0, 1], 400);
        assert!(self.machine.served.iter().all(|s| s.volume.is_clean()), "write-back never ends");
    }

    fn on_disk(&self, volume: usize, sector: u64) -> u64 {
        self.world.with(|w| w.disks[volume].value(sector))
    }

    /// Does for the disks of `world`, which has no cache, what `recover-backing` does.
    pub fn recover_disks(&self, world: &Arc<World>) {
        if self.order == Order::Grouped {
            let disks = [0, 1].map(|n| SimBacking::new(world, n));
            let members: Vec<_> = (disks.iter().enumerate())
                .map(|(n, disk)| Member { redo: Arc::new(SimBacking::new(world, n + 2)), disk })
                .collect();
            recover_group(&members, false, false).expect("both disks and their areas are there");
        }
    }

    /// What sectors 0 and 8 of both disks hold with the cache lost now.
    fn alone(&self) -> [[u64; 2]; 2] {
        let world = World::new(self.world.photograph("lost").daemon_crash(&mut Rng::new(1)), 1);
        self.recover_disks(&world);
        [0, 1].map(|n| [0, 8].map(|sector| world.with(|w| w.disks[n].value(sector))))
    }
}

#[test]
fn a_flush_of_one_disk_orders_what_another_writes_after_it() {
    for (class, order) in
        [AssumeDax, PageCache].into_iter().flat_map(|c| [(c, Order::Strict), (c, Order::Grouped)])
    {
        let mut pair = Pair::new(class, order);
        pair.write(0, 0, 900);
        pair.flush(0);
        pair.write(1, 0, 901);
        // Only the second volume's worker gets any time.
        pair.work(&[1], 200);
        assert_eq!(pair.on_disk(1, 0), 1, "{class} {order}: it has gone ahead");
        for _ in 0..400 {
            pair.work(&[0, 1], 1);
            let [[log, _], [table, _]] = pair.alone();
            assert!(table != 901 || log == 900, "{class} {order}: the table without its log");
            if order == Order::Grouped {
                assert_eq!(table == 901, log == 900, "{class}: they were written back as one");
            }
        }
        assert_eq!((pair.on_disk(0, 0), pair.on_disk(1, 0)), (900, 901), "{class} {order}");
    }
}

#[test]
fn a_member_whose_disk_is_away_holds_up_the_write_back_of_its_group_and_nothing_else() {
    for order in [Order::Strict, Order::Grouped] {
        let mut pair = Pair::new(AssumeDax, order);
        pair.world.with(|w| w.faults.away = 2);
        pair.write(1, 0, 900);
        pair.flush(1);
        pair.write(0, 0, 901);
        pair.flush(0);
        pair.work(&[0, 1], 100);
        assert_eq!(pair.on_disk(0, 0), 1, "{order}: it is ahead of the disk that is away");
        let health = pair.machine.served[0].volume.health();
        assert_eq!(health.state, VolumeState::Degraded);
        assert!(health.cause.contains("waits for volume `volume1`"), "{order}: {health:?}");
        pair.write(0, 8, 902);
        pair.flush(0);
        pair.world.with(|w| w.faults.away = 0);
        pair.drain();
        assert_eq!(
            (pair.alone(), pair.machine.served[0].volume.health().state),
            ([[901, 902], [900, 9]], VolumeState::Ok)
        );
    }
}

/// Attaches one volume of a world by itself.
fn attach(
    cache: &Arc<Cache<SimEnv>>,
    world: &Arc<World>,
    volume: usize,
    style: Style,
    group: Option<&str>,
) -> Result<Arc<Volume<SimEnv>>, AttachError> {
    let redo = volume + 2;
    let has_redo = world.with(|w| redo < w.disks.len());
    cache.attach(AttachOptions {
        name: format!("volume{volume}"),
        backing: Arc::new(SimBacking::new(world, volume)),
        mode: style.mode,
        order: style.order,
        redo: has_redo.then(|| Arc::new(SimBacking::new(world, redo))),
        data_crc: true,
        pass_discard: false,
        reads: Default::default(),
        read_only: false,
        serial: format!("sim{volume}"),
        block_size: None,
        queues: 1,
        queue_size: 256,
        force_identity: false,
        sidecar: None,
        accept_loss: false,
        allow_volatile: false,
        group: group.map(str::to_owned),
    })
}

/// A daemon that has died, with dirty data of both volumes: the second's is the older.
fn died(order: Order) -> (Arc<World>, Arc<Cache<SimEnv>>, SimClock) {
    let mut pair = Pair::new(AssumeDax, order);
    pair.write(1, 0, 900);
    pair.flush(1);
    pair.write(0, 0, 901);
    let world = World::new(pair.world.photograph("a kill").daemon_crash(&mut Rng::new(3)), 4);
    let clock = SimClock::default();
    let cache =
        Cache::<SimEnv>::open(Arc::new(SimPmem::new(&world)), clock.clone()).expect("a legal image").0;
    (world, cache, clock)
}

fn step(stepper: &mut Stepper<SimEnv>, clock: &SimClock, volumes: usize, steps: u32) {
    for _ in 0..steps {
        clock.advance(500);
        (0..volumes).for_each(|volume| _ = stepper.writeback(volume));
        stepper.sync();
    }
}

#[test]
fn after_a_kill_no_member_passes_one_that_is_not_attached_yet() {
    a_member_that_comes_late(&mut 0);
}

/// After a kill one volume is attached long before the other, which has the older data.
pub fn a_member_that_comes_late(images: &mut u64) {
    for order in [Order::Strict, Order::Grouped] {
        let (world, cache, clock) = died(order);
        let on_disk = |volume: usize| world.with(|w| w.disks[volume].value(0));
        let first = attach(&cache, &world, 0, served(order), Some("vm")).expect("its own disk");
        let mut stepper = Stepper::new(&cache, std::slice::from_ref(&first));
        step(&mut stepper, &clock, 1, 100);
        *images += 1;
        assert_eq!(on_disk(0), 1, "{order}: it has passed the other");
        let cause = first.health().cause;
        assert!(cause.contains("`volume1`") && cause.contains("not attached"), "{order}: {cause}");
        let second = attach(&cache, &world, 1, served(order), Some("vm")).expect("its own disk");
        drop(stepper);
        let mut stepper = Stepper::new(&cache, &[first, second]);
        step(&mut stepper, &clock, 2, 200);
        assert_eq!((on_disk(0), on_disk(1)), (901, 900), "{order}");
    }
}

#[test]
fn a_member_that_is_deleted_or_leaves_with_dirty_data_is_waited_for_no_longer_and_comes_back_drained() {
    for (order, deleted) in [Order::Strict, Order::Grouped].into_iter().flat_map(|o| [(o, false), (o, true)])
    {
        let (world, cache, clock) = died(order);
        let on_disk = |volume: usize| world.with(|w| w.disks[volume].value(0));
        let first = attach(&cache, &world, 0, served(order), Some("vm")).expect("its own disk");
        if deleted {
            cache.delete_volume("volume1", true).expect("told to lose what is dirty");
        } else {
            let second = attach(&cache, &world, 1, served(order), Some("vm")).expect("its own disk");
            cache.leave_for_good(&second).expect("nothing fails");
            cache.detach(&second).expect("nothing fails");
            assert_eq!((second.group(), second.is_clean()), (None, false));
        }
        let mut stepper = Stepper::new(&cache, std::slice::from_ref(&first));
        step(&mut stepper, &clock, 1, 200);
        assert_eq!((on_disk(0), on_disk(1)), (901, 1), "{order}, deleted: {deleted}");
        if !deleted {
            let second = attach(&cache, &world, 1, served(order), Some("vm")).expect("its own disk");
            assert_eq!(
                (on_disk(1), second.is_clean()),
                (900, true),
                "{order}: it comes back with nothing dirty"
            );
            assert_eq!(second.group().as_deref(), Some("vm"));
            assert!(second.counters().epoch >= first.counters().epoch, "{order}: they count as one again");
        }
    }
}

#[test]
fn another_order_ends_a_membership_and_the_others_go_on() {
    for order in [Order::Strict, Order::Grouped] {
        let mut pair = Pair::new(AssumeDax, order);
        pair.write(1, 0, 900);
        pair.flush(1);
        pair.write(0, 0, 901);
        pair.machine.served[0].volume.change_order(Order::Relaxed).expect("possible from any order");
        pair.work(&[0], 200);
        assert_eq!(pair.machine.served[0].volume.group(), None, "{order}");
        assert_eq!((pair.on_disk(0, 0), pair.on_disk(1, 0)), (901, 1), "{order}: it goes on by itself");
        pair.work(&[1], 200);
        assert_eq!(pair.on_disk(1, 0), 900, "{order}: it waits for one that has left");
    }
}

#[test]
fn what_cannot_be_in_a_group_is_refused_with_a_sentence() {
    let mut pair = Pair::new(AssumeDax, Order::Strict);
    pair.daemon_crash();
    let world = World::new(pair.world.photograph("a start").daemon_crash(&mut Rng::new(3)), 4);
    let (cache, _) =
        Cache::<SimEnv>::open(Arc::new(SimPmem::new(&world)), SimClock::default()).expect("legal");
    let _first = attach(&cache, &world, 0, served(Order::Strict), Some("vm")).expect("its own disk");
    let around = Style { mode: Mode::Writearound, ..served(Order::Strict) };
    for (style, group, says) in [
        (served(Order::Relaxed), "vm", "in relaxed order"),
        (around, "vm", "writes around the cache"),
        (served(Order::Strict), "a group", "cannot name a consistency group"),
    ] {
        let refused = attach(&cache, &world, 1, style, Some(group)).map(|_| ()).expect_err(says);
        assert!(refused.to_string().contains(says), "{refused}");
    }
    world.with(|w| w.disks.extend((3..5).map(|n| DiskState::raw(REDO_SECTORS).named(n))));
    let refused =
        attach(&cache, &world, 1, served(Order::Grouped), Some("vm")).map(|_| ()).expect_err("refused");
    assert!(refused.to_string().contains("`volume0`, which is served in strict"), "{refused}");
}

#[test]
fn a_part_of_a_group_is_not_applied_without_the_other_disks_unless_told_to() {
    let mut pair = Pair::new(AssumeDax, Order::Grouped);
    pair.write(0, 0, 900);
    pair.write(1, 0, 901);
    let (mut refusals, mut forced) = (0, 0);
    for _ in 0..200 {
        pair.work(&[0, 1], 1);
        for volume in 0..2 {
            let image = pair.world.photograph("lost").daemon_crash(&mut Rng::new(1));
            let world = World::new(image, 1);
            let disk = SimBacking::new(&world, volume);
            let recover = |alone| {
                let redo = Arc::new(SimBacking::new(&world, volume + 2));
                recover_group(&[Member { redo, disk: &disk }], false, alone)
            };
            let before = world.with(|w| w.disks[volume].values());
            if let Err(error) = recover(false) {
                assert!(error.to_string().contains("one disk in a group of 2"), "{error}");
                assert_eq!(world.with(|w| w.disks[volume].values()), before, "a refusal changes nothing");
                refusals += 1;
                assert!(recover(true).expect("told to")[0].is_some());
                forced += u64::from(world.with(|w| w.disks[volume].value(0)) == 900 + volume as u64);
            }
        }
    }
    assert!(refusals > 2 && refusals == forced, "{refusals} refusals, {forced} applied alone");
}
