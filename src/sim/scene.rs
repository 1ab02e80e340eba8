//! A scene: one volume, one queue, every step said by the test. For claims that are one story long.

use std::sync::Arc;

use super::disk::{DiskState, DiskSurvival};
use super::machine::{Machine, SimBuffer, Style};
use super::memory::{Memory, SimPmem, Survival};
use super::rng::Rng;
use super::world::{SimClock, Snapshot, World};
use crate::cache::{FormatOptions, Order, format};
use crate::onmedia::Geometry;
use crate::pmem::MediaClass;
use crate::volume::{Request, RequestKind, Status};

/// Steps after which something that was to come counts as hung.
const STEPS_MAX: u32 = 10_000;
/// Sectors of the redo area of a volume in grouped order: three blocks are a group.
const REDO_SECTORS: u64 = 56;

/// See the module's head. Sector *s* of the disk holds write *s* + 1 at first; a failure panics.
pub struct Scene {
    /// The world.
    pub world: Arc<World>,
    /// The engine.
    pub machine: Machine,
    /// How the volume is served, also after the next crash.
    pub style: Style,
    next_tag: u32,
    rng: Rng,
}

impl Scene {
    /// A fresh cache of 12 segments of 64 KiB before a disk of 512 sectors.
    pub fn new(class: MediaClass, style: Style) -> Scene {
        Scene::sized(class, style, 12, 512)
    }

    /// A fresh cache of so many segments of 64 KiB before a disk of so many sectors.
    pub fn sized(class: MediaClass, style: Style, segments: u32, sectors: u64) -> Scene {
        Scene::with_redo(class, style, (segments, sectors), REDO_SECTORS)
    }

    /// The same with a redo area of so many sectors for a volume in grouped order.
    pub fn with_redo(class: MediaClass, style: Style, sizes: (u32, u64), redo_sectors: u64) -> Scene {
        Scene::begin(Scene::world(class, style, sizes, redo_sectors), style)
    }

    /// A fresh cache of 12 segments of 64 KiB on a device, before a disk of 512 sectors.
    pub fn on_device(class: MediaClass, style: Style) -> Scene {
        let world = Scene::world(class, style, (12, 512), REDO_SECTORS);
        world.with(|w| w.memory = w.memory.clone().as_device());
        Scene::begin(world, style)
    }

    fn begin(world: Arc<World>, style: Style) -> Scene {
        let machine = Machine::open(&world, &[style], 1).expect("a fresh cache");
        Scene { world, machine, style, next_tag: 1, rng: Rng::new(2) }
    }

    /// Such a cache, formatted and never opened.
    fn world(
        class: MediaClass,
        style: Style,
        (segments, sectors): (u32, u64),
        redo_sectors: u64,
    ) -> Arc<World> {
        let mut disks = vec![DiskState::new((1..=sectors).collect())];
        if style.order == Order::Grouped {
            disks.push(DiskState::raw(redo_sectors).named(2));
        }
        let geometry = Geometry::custom(16 << 10, 64 << 10, segments, 1).expect("a geometry");
        let memory = Memory::new(class, geometry.device_size).with_back(geometry.meta_size);
        let world = World::new(Snapshot { what: "the beginning", memory, disks }, 1);
        let options = FormatOptions { geometry: Some(geometry), ..FormatOptions::default() };
        format(&SimPmem::new(&world), &SimClock::default(), &options).expect("fresh memory");
        world
    }

    /// A snapshot from before the `n`-th store, fence, `sync` or disk operation of the first start,
    /// which makes the volume; `None` if there were not so many.
    pub fn cut_beginning(class: MediaClass, style: Style, n: u64) -> Option<Snapshot> {
        let world = Scene::world(class, style, (12, 512), REDO_SECTORS);
        world.with(|w| w.cuts.at = w.events + n + 1);
        Machine::open(&world, &[style], 1).expect("a fresh cache");
        world.take_cuts().pop().map(|(_, snapshot)| snapshot)
    }

    /// Ends in order and returns what is left.
    pub fn end(self) -> Snapshot {
        self.machine.close().expect("nothing fails here");
        self.world.photograph("the end").daemon_crash(&mut Rng::new(3))
    }

    /// Submits a request, ends the batch and returns its tag.
    pub fn submit(&mut self, kind: RequestKind, sector: u64, data: SimBuffer) -> u32 {
        let tag = self.next_tag;
        self.next_tag += 1;
        self.machine.submit(0, 0, Request { tag, kind, sector, data });
        self.machine.commit(0, 0);
        tag
    }

    /// Submits a request and waits for its end; the queue's thread and `sync`s go on, nothing else.
    pub fn request(&mut self, kind: RequestKind, sector: u64, data: SimBuffer) -> (Status, SimBuffer) {
        let tag = self.submit(kind, sector, data);
        for _ in 0..STEPS_MAX {
            if let Some(done) = self.machine.poll(0, 0).into_iter().find(|d| d.tag == tag) {
                return (done.status, done.data);
            }
            self.machine.sync();
        }
        let volume = &self.machine.served[0].volume;
        panic!(
            "{kind:?} of sector {sector} never ends: {:?}, {:?}",
            self.machine.cache.space(),
            volume.counters()
        );
    }

    /// Submits a request and lets 20 s pass with everything at work; how it ended, if it did.
    pub fn request_in_time(&mut self, kind: RequestKind, sector: u64, data: SimBuffer) -> Option<Status> {
        let tag = self.submit(kind, sector, data);
        for _ in 0..200 {
            self.machine.clock.advance(100);
            self.machine.step_all();
            if let Some(done) = self.machine.poll(0, 0).into_iter().find(|d| d.tag == tag) {
                return Some(done.status);
            }
        }
        None
    }

    /// Lets everything but the guest do so many steps.
    pub fn work(&mut self, steps: u32) {
        for _ in 0..steps {
            self.machine.clock.advance(10);
            self.machine.step_all();
        }
    }

    /// Writes `count` sectors as write `value`.
    pub fn write(&mut self, first: u64, count: u64, value: u64) {
        let data = SimBuffer::of_write(0, first, count, value);
        assert_eq!(self.request(RequestKind::Write, first, data).0, Status::Ok);
    }

    /// Zeroes `count` sectors.
    pub fn zero(&mut self, first: u64, count: u64) {
        let kind = RequestKind::WriteZeroes { sectors: count, unmap: false };
        assert_eq!(self.request(kind, first, SimBuffer::default()).0, Status::Ok);
    }

    /// FLUSHes.
    pub fn flush(&mut self) {
        assert_eq!(self.request(RequestKind::Flush, 0, SimBuffer::default()).0, Status::Ok);
    }

    /// Which write a sector shows.
    pub fn read(&mut self, sector: u64) -> u64 {
        let (status, data) = self.request(RequestKind::Read, sector, SimBuffer::to_read(1));
        assert_eq!(status, Status::Ok);
        data.values(0, sector).expect("a sector of this disk")[0]
    }

    /// Which write a sector of the disk holds.
    pub fn on_disk(&self, sector: u64) -> u64 {
        self.world.with(|w| w.disks[0].value(sector))
    }

    /// Lets write-back, and `sync`s if `sync` says so, go on until `until`.
    pub fn write_back(&mut self, sync: bool, until: impl Fn(&Scene) -> bool) -> bool {
        for _ in 0..STEPS_MAX {
            if until(self) {
                return true;
            }
            self.machine.clock.advance(500);
            self.machine.writeback(0);
            if sync {
                self.machine.sync();
            }
        }
        false
    }

    /// Brings everything to the disk.
    pub fn drain(&mut self) {
        assert!(self.write_back(true, |s| s.machine.served[0].volume.is_clean()), "write-back never ends");
    }

    /// The host dies and everything starts again.
    pub fn host_crash(&mut self, memory: Survival, disk: DiskSurvival) {
        let (image, _) = self.world.photograph("a scene").host_crash(&memory, disk, &mut self.rng);
        self.start(image);
    }

    /// The daemon dies and starts again.
    pub fn daemon_crash(&mut self) {
        let image = self.world.photograph("a scene").daemon_crash(&mut self.rng);
        self.start(image);
    }

    /// Starts again from `image`.
    pub fn start(&mut self, image: Snapshot) {
        self.world = World::new(image, self.rng.next());
        self.machine = Machine::open(&self.world, &[self.style], 1).expect("a legal image");
    }

    /// Runs `act` and returns a snapshot from before its `n`-th store, fence, `sync` or disk
    /// operation, counted from 0; `None` if there were not so many.
    pub fn cut(&mut self, n: u64, act: impl FnOnce(&mut Scene)) -> Option<Snapshot> {
        self.world.with(|w| w.cuts.at = w.events + n + 1);
        act(self);
        self.world.take_cuts().pop().map(|(_, snapshot)| snapshot)
    }
}
