//! The simulation's memory and disk with a pause before every access, and memory accesses torn.
//!
//! Threads are the scheduler's: a fence covers the stores of its own thread only, as on hardware,
//! so a crash here also judges whose fence a mark or a header rests on.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use super::pause;
use crate::backing::{Backing, BackingGeometry, BackingIdentity, Channel, Completion, Op};
use crate::cache::{AttachOptions, Cache, Env, FormatOptions, Mode, Order, Volume, format};
use crate::onmedia::Geometry;
use crate::pmem::{MediaClass, MediaError, Pmem, SyncError};
use crate::sim::{
    DiskState, Memory, Oracle, SimBacking, SimChannel, SimClock, SimPmem, Snapshot, Style, World,
};
use crate::wake::Waker;

/// The engine's world, with pauses.
pub(super) struct WeaveEnv;

impl Env for WeaveEnv {
    type Pmem = WeavePmem;
    type Backing = WeaveBacking;
    type Clock = SimClock;

    fn threads() -> usize {
        1
    }
}

/// A moment at which the host may die, with what was promised by then.
pub(super) struct Scene {
    pub snapshot: Snapshot,
    pub oracle: Oracle,
}

/// What all threads of a run share beside the engine. Plain locks: taken and let go between two
/// pauses, they are never contended.
pub(super) struct Stage {
    pub world: Arc<World>,
    pub oracle: Mutex<Oracle>,
    /// The access before which a scene is taken, counted down; 0 for none.
    pub scene_in: Mutex<u64>,
    pub scenes: Mutex<Vec<Scene>>,
}

impl Stage {
    /// A thread is about to touch the media: a crash may come before.
    fn access(&self, what: &'static str) {
        pause();
        self.world.act_as(usize::from(shuttle::current::me()) as u32);
        let mut scene_in = self.scene_in.lock().unwrap();
        if *scene_in > 0 {
            *scene_in -= 1;
            if *scene_in == 0 {
                let scene = Scene {
                    snapshot: self.world.photograph(what),
                    oracle: self.oracle.lock().unwrap().clone(),
                };
                self.scenes.lock().unwrap().push(scene);
            }
        }
    }
}

/// Memory that others see half-written and that forgets what nobody fenced.
pub(super) struct WeavePmem {
    inner: SimPmem,
    stage: Arc<Stage>,
}

/// Bytes accessed between two pauses: a copy of a block is four.
const TORN: usize = 1024;

impl Pmem for WeavePmem {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn class(&self) -> MediaClass {
        self.inner.class()
    }

    fn read(&self, at: u64, dst: &mut [u8]) -> Result<(), MediaError> {
        for (i, part) in dst.chunks_mut(TORN).enumerate() {
            pause();
            self.inner.read(at + (i * TORN) as u64, part)?;
        }
        Ok(())
    }

    fn write(&self, at: u64, src: &[u8]) -> Result<(), MediaError> {
        for (i, part) in src.chunks(TORN).enumerate() {
            self.stage.access("store");
            self.inner.write(at + (i * TORN) as u64, part)?;
        }
        Ok(())
    }

    fn fence(&self) {
        self.stage.access("fence");
        self.inner.fence();
    }

    fn sync(&self) -> Result<(), SyncError> {
        self.stage.access("sync");
        self.inner.sync()
    }
}

/// The simulation's disk.
pub(super) struct WeaveBacking {
    inner: SimBacking,
    stage: Arc<Stage>,
}

/// Signals its waker as long as there is something to reap or to wait for: the simulated disk ends
/// an operation when it is asked about it.
pub(super) struct WeaveChannel {
    inner: SimChannel,
    stage: Arc<Stage>,
    waker: Waker,
}

impl Backing for WeaveBacking {
    type Channel = WeaveChannel;

    fn geometry(&self) -> BackingGeometry {
        self.inner.geometry()
    }

    fn identity(&self) -> BackingIdentity {
        self.inner.identity()
    }

    fn fingerprint(&self, seed: u64) -> std::io::Result<u64> {
        self.inner.fingerprint(seed)
    }

    fn channel(&self, waker: &Waker, depth: u32) -> std::io::Result<WeaveChannel> {
        let (inner, stage) = (self.inner.channel(waker, depth)?, self.stage.clone());
        Ok(WeaveChannel { inner, stage, waker: waker.clone() })
    }
}

impl Channel for WeaveChannel {
    fn submit(&mut self, token: u64, op: Op) -> Result<(), Op> {
        self.stage.access("disk operation submitted");
        self.waker.wake();
        self.inner.submit(token, op)
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.stage.access("disk operations complete");
        self.inner.reap(done);
        if self.inner.in_flight() > 0 {
            self.waker.wake();
        }
    }

    fn wait(&mut self, timeout: Duration) {
        pause();
        self.inner.wait(timeout);
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }
}

/// Segments of a cache. As few as one attached volume may have: its queues share a stream, and
/// segments are reclaimed all the time.
pub(super) const SCARCE: u32 = 6;
/// So many that two queues have a stream each, and their commits overlap.
pub(super) const AMPLE: u32 = 32;
/// The smallest that takes records on either class of media: pages cost page-cache media 8 KiB more.
fn segment_size(class: MediaClass) -> u32 {
    if class.fence_is_durable() { 32 << 10 } else { 64 << 10 }
}

/// An engine in a world with pauses.
pub(super) struct Bench {
    pub stage: Arc<Stage>,
    pub cache: Arc<Cache<WeaveEnv>>,
    pub volume: Arc<Volume<WeaveEnv>>,
    pub clock: SimClock,
}

/// An empty cache before a disk of `sectors` sectors, sector *s* holding write *s* + 1.
fn fresh(class: MediaClass, segments: u32, sectors: u64) -> Snapshot {
    static FORMATTED: [OnceLock<Memory>; 4] = [const { OnceLock::new() }; 4];
    let which = usize::from(class.fence_is_durable()) * 2 + usize::from(segments == SCARCE);
    let memory = FORMATTED[which].get_or_init(|| {
        let geometry = Geometry::custom(16 << 10, segment_size(class), segments, 1).unwrap();
        let memory = Memory::new(class, geometry.device_size);
        let world = World::new(Snapshot { what: "nothing", memory, disks: Vec::new() }, 1);
        let options = FormatOptions { geometry: Some(geometry), ..FormatOptions::default() };
        format(&SimPmem::new(&world), &SimClock::default(), &options).unwrap();
        world.photograph("formatted").memory
    });
    let disks = vec![DiskState::new((1..=sectors).collect())];
    Snapshot { what: "the beginning", memory: memory.clone(), disks }
}

/// How a write-back volume is served.
pub(super) fn write_back(order: Order) -> Style {
    Style { mode: Mode::Writeback, order, write_cache: true, pass_discard: false }
}

impl Bench {
    pub fn new(class: MediaClass, style: Style, segments: u32, queues: u16, sectors: u64) -> Bench {
        let world = World::new(fresh(class, segments, sectors), 1);
        let oracle = Mutex::new(Oracle::new(&(1..=sectors).collect::<Vec<_>>()));
        let (scene_in, scenes) = (Mutex::new(0), Mutex::default());
        let stage = Arc::new(Stage { world: world.clone(), oracle, scene_in, scenes });
        let clock = SimClock::default();
        let pmem = Arc::new(WeavePmem { inner: SimPmem::new(&world), stage: stage.clone() });
        let (cache, _) = Cache::<WeaveEnv>::open(pmem, clock.clone()).unwrap();
        let backing = Arc::new(WeaveBacking { inner: SimBacking::new(&world, 0), stage: stage.clone() });
        let volume = cache
            .attach(AttachOptions {
                name: "volume0".into(),
                backing,
                mode: style.mode,
                order: style.order,
                redo: None,
                data_crc: true,
                pass_discard: style.pass_discard,
                reads: Default::default(),
                read_only: false,
                serial: "sim0".into(),
                block_size: None,
                queues,
                queue_size: 256,
                force_identity: false,
                sidecar: None,
                accept_loss: false,
                allow_volatile: false,
                group: None,
            })
            .unwrap();
        Bench { stage, cache, volume, clock }
    }
}
