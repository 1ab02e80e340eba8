//! The product's engine before a timed disk, and the loop that lets time pass.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::disk::{DiskModel, TimedBacking, TimedChannel, TimedDisk};
use super::guest::{Ask, Guest};
use super::trail::Trail;
use crate::backing::{AlignedBuf, Channel, Op};
use crate::cache::queue::Queue;
use crate::cache::worker::{DrainProgress, Progress, Stepper};
use crate::cache::{
    AttachOptions, Cache, Clock, Env, FormatOptions, Mode, Order, ReadPolicy, Volume, VolumeDisk, format,
};
use crate::onmedia::Geometry;
use crate::pmem::{MediaClass, MediaError, Pmem, SyncError};
use crate::sim::SimBuffer;
use crate::volume::{Disk, DiskQueue, Request, RequestKind, Status};
use crate::wake::Waker;

/// What a request costs its processor.
const REQUEST_US: u64 = 5;
/// How far time goes when nothing is due: the engine's own delays are no finer.
const TICK_US: u64 = 1000;

/// The engine's world in virtual time.
pub struct TimedEnv;

impl Env for TimedEnv {
    type Pmem = PlainMemory;
    type Backing = TimedBacking;
    type Clock = VirtualClock;

    fn threads() -> usize {
        1
    }
}

/// Time that passes when the lab says so.
#[derive(Clone, Debug, Default)]
pub struct VirtualClock(Arc<AtomicU64>);

impl VirtualClock {
    /// Microseconds since the beginning.
    pub fn us(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Lets time pass; never back.
    pub fn advance_to(&self, us: u64) {
        self.0.fetch_max(us, Ordering::Relaxed);
    }
}

impl Clock for VirtualClock {
    fn now_ms(&self) -> u64 {
        1000 + self.0.load(Ordering::Relaxed) / 1000
    }

    fn now_us(&self) -> u64 {
        1_000_000 + self.0.load(Ordering::Relaxed)
    }

    fn unix_ms(&self) -> u64 {
        1_700_000_000_000 + Clock::now_ms(self)
    }
}

/// Memory that is durable at once: what survives is not asked here.
pub struct PlainMemory(Mutex<Vec<u8>>);

impl PlainMemory {
    /// So many zeros.
    pub fn zeros(len: usize) -> PlainMemory {
        PlainMemory(Mutex::new(vec![0; len]))
    }

    /// Damages what is stored at `at`.
    pub fn corrupt(&self, at: u64, change: impl FnOnce(&mut [u8])) {
        self.with(|b| change(&mut b[at as usize..]));
    }

    fn with<T>(&self, f: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Pmem for PlainMemory {
    fn len(&self) -> u64 {
        self.with(|b| b.len() as u64)
    }

    fn class(&self) -> MediaClass {
        MediaClass::AssumeDax
    }

    fn read(&self, at: u64, dst: &mut [u8]) -> Result<(), MediaError> {
        self.with(|b| dst.copy_from_slice(&b[at as usize..][..dst.len()]));
        Ok(())
    }

    fn write(&self, at: u64, src: &[u8]) -> Result<(), MediaError> {
        self.with(|b| b[at as usize..][..src.len()].copy_from_slice(src));
        Ok(())
    }

    fn fence(&self) {}

    fn sync(&self) -> Result<(), SyncError> {
        Ok(())
    }
}

/// What a lab is made of.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Bytes of a segment.
    pub segment_size: u32,
    /// Segments of the cache.
    pub segments: u32,
    /// Sectors of the disk.
    pub sectors: u64,
    /// The disk.
    pub model: DiskModel,
    /// How write-back goes.
    pub order: Order,
    /// Where groups lie before they are on the disk.
    pub redo: RedoPlace,
}

/// Where a lab's redo area is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RedoPlace {
    /// Nowhere.
    None,
    /// On the disk itself, behind the volume: so many sectors.
    SameDisk(u64),
    /// On another disk of the same model: so many sectors.
    OtherDisk(u64),
}

/// What outlives a daemon, and what it is told at its start.
struct World {
    setup: Setup,
    reads: ReadPolicy,
    clock: VirtualClock,
    memory: Arc<PlainMemory>,
    disk: Arc<TimedDisk>,
    redo_disk: Option<Arc<TimedDisk>>,
    value: u64,
    expected: HashMap<u64, u64>,
}

/// A cache, a volume with one queue, and a disk.
pub struct Lab {
    setup: Setup,
    reads: ReadPolicy,
    memory: Arc<PlainMemory>,
    /// Time.
    pub clock: VirtualClock,
    /// The slow side.
    pub disk: Arc<TimedDisk>,
    /// The redo area's disk, if it is another.
    pub redo_disk: Option<Arc<TimedDisk>>,
    /// The volume.
    pub volume: Arc<Volume<TimedEnv>>,
    queue: Queue<TimedEnv, SimBuffer>,
    stepper: Stepper<TimedEnv>,
    value: u64,
    /// What was last written to each sector.
    pub expected: HashMap<u64, u64>,
}

/// A request under way.
struct Flight {
    began: u64,
    first: u64,
    sectors: u64,
}

fn is_busy(flights: &HashMap<u32, Flight>, first: u64, sectors: u64) -> bool {
    flights.values().any(|f| f.first < first + sectors && first < f.first + f.sectors)
}

impl Lab {
    /// A fresh cache before a disk of zeros.
    pub fn new(setup: &Setup) -> Lab {
        Lab::with_reads(setup, ReadPolicy::default())
    }

    /// The same with a policy for reads.
    pub fn with_reads(setup: &Setup, reads: ReadPolicy) -> Lab {
        let clock = VirtualClock::default();
        let behind = if let RedoPlace::SameDisk(sectors) = setup.redo { sectors } else { 0 };
        let disk = TimedDisk::with_raw(&clock, setup.model, setup.sectors, behind);
        let redo_disk = match setup.redo {
            // Its own sector 0 is nobody's: what lies behind it is the area.
            RedoPlace::OtherDisk(sectors) => Some(TimedDisk::with_raw(&clock, setup.model, 1, sectors)),
            RedoPlace::None | RedoPlace::SameDisk(_) => None,
        };
        let geometry = Geometry::custom(16 << 10, setup.segment_size, setup.segments, 1);
        let geometry = geometry.expect("the geometry is within its bounds");
        let memory = Arc::new(PlainMemory(Mutex::new(vec![0; geometry.device_size as usize])));
        let options = FormatOptions { geometry: Some(geometry), ..FormatOptions::default() };
        format(&*memory, &clock, &options).expect("fresh memory");
        let expected = HashMap::new();
        Lab::open(World { setup: *setup, reads, clock, memory, disk, redo_disk, value: 0, expected })
    }

    /// Serves the volume from what the memory holds.
    fn open(world: World) -> Lab {
        let World { setup, reads, clock, memory, disk, redo_disk, value, expected } = world;
        let redo = match setup.redo {
            RedoPlace::None => None,
            _ => Some(Arc::new(TimedBacking::behind(redo_disk.as_ref().unwrap_or(&disk)))),
        };
        let (cache, _) = Cache::<TimedEnv>::open(memory.clone(), clock.clone()).expect("a sound cache");
        let volume = cache
            .attach(AttachOptions {
                name: "lab".to_owned(),
                backing: Arc::new(TimedBacking::new(&disk)),
                mode: Mode::Writeback,
                order: setup.order,
                redo,
                data_crc: true,
                pass_discard: true,
                reads,
                read_only: false,
                serial: "lab".to_owned(),
                block_size: None,
                queues: 1,
                queue_size: 256,
                force_identity: false,
                sidecar: None,
                accept_loss: false,
                allow_volatile: false,
                group: None,
            })
            .expect("its own volume");
        let face = VolumeDisk(volume.clone());
        face.set_write_cache(true);
        let queue = face.open_queue(0, Waker::default()).expect("nobody has it");
        let stepper = Stepper::new(&cache, std::slice::from_ref(&volume));
        Lab { setup, reads, memory, clock, disk, redo_disk, volume, queue, stepper, value, expected }
    }

    /// Kills the daemon with nothing of the guest's under way, and starts it again. What its disks have under
    /// way never happens.
    pub fn restart(self) -> Lab {
        let Lab { setup, reads, memory, clock, disk, redo_disk, volume, queue, stepper, value, expected } =
            self;
        drop((queue, stepper, volume));
        Lab::open(World { setup, reads, clock, memory, disk, redo_disk, value, expected })
    }

    /// Lets everything but the guest go on until nothing moves at this instant.
    fn settle(&mut self) {
        while [
            self.stepper.sync(),
            self.stepper.writeback(0) == Progress::Did,
            self.stepper.housekeeper() == Progress::Did,
        ]
        .contains(&true)
        {}
    }

    /// Lets time pass until something is due, at most until `limit`.
    fn pass(&mut self, limit: u64) {
        let now = self.clock.us();
        let events = [Some(&self.disk), self.redo_disk.as_ref()].into_iter().flatten();
        let due =
            events.filter_map(|d| d.next_event()).min().unwrap_or(now + TICK_US).min(limit.max(now + 1));
        self.clock.advance_to(due.max(now + 1));
    }

    /// Runs a guest with `depth` requests under way to its end.
    pub fn run(&mut self, guest: &mut dyn Guest, depth: usize) -> Trail {
        let mut trail = Trail { began: self.clock.us(), ..Trail::default() };
        let mut flights: HashMap<u32, Flight> = HashMap::new();
        let mut next = guest.next(&|_, _| false);
        let mut tag = 0u32;
        while next.is_some() || !flights.is_empty() {
            let mut submitted = 0;
            while let Some((not_before, ask)) = next
                && flights.len() < depth
                && not_before <= self.clock.us()
                && (ask != Ask::Barrier || flights.is_empty())
            {
                tag += 1;
                flights.insert(tag, self.submit(tag, ask));
                submitted += 1;
                if ask == Ask::Barrier {
                    break;
                }
                next = guest.next(&|first, sectors| is_busy(&flights, first, sectors));
            }
            if submitted > 0 {
                self.queue.commit();
            }
            self.settle();
            let mut done = Vec::new();
            self.queue.poll(&mut done);
            self.clock.advance_to(self.clock.us() + REQUEST_US * done.len() as u64);
            for done in &done {
                trail.failed += u64::from(done.status != Status::Ok);
                let flight = flights.remove(&done.tag).expect("it was under way");
                trail.add(flight.began, self.clock.us());
                if flight.sectors == 0 {
                    next = guest.next(&|_, _| false);
                }
            }
            if submitted == 0 && done.is_empty() {
                let later =
                    next.map(|(at, _)| at).filter(|&at| at > self.clock.us() && flights.len() < depth);
                self.pass(later.unwrap_or(u64::MAX));
            }
        }
        trail
    }

    fn submit(&mut self, tag: u32, ask: Ask) -> Flight {
        let began = self.clock.us();
        let (kind, first, sectors, data) = match ask {
            Ask::Write { first, sectors } => {
                self.value += 1;
                let mut bytes = vec![0; sectors as usize * 512];
                bytes.chunks_exact_mut(512).for_each(|s| s[..8].copy_from_slice(&self.value.to_le_bytes()));
                (first..first + sectors).for_each(|s| _ = self.expected.insert(s, self.value));
                (RequestKind::Write, first, sectors, SimBuffer { bytes, gone_from: None })
            }
            Ask::Read { first, sectors } => (RequestKind::Read, first, sectors, SimBuffer::to_read(sectors)),
            Ask::Discard { first, sectors } => {
                (first..first + sectors).for_each(|s| _ = self.expected.insert(s, 0));
                (RequestKind::Discard { sectors }, first, sectors, SimBuffer::default())
            }
            Ask::Barrier => (RequestKind::Flush, 0, 0, SimBuffer::default()),
        };
        self.queue.submit(Request { tag, kind, sector: first, data });
        Flight { began, first, sectors }
    }

    /// Brings everything to the disk; panics when that does not end within `limit_s`.
    pub fn drain(&mut self, limit_s: u64) {
        self.drain_noting(limit_s, &mut |_, _| {});
    }

    /// The same; `note` is told at what time (µs) how much was done, as those are told who wait for it.
    pub fn drain_noting(&mut self, limit_s: u64, note: &mut dyn FnMut(u64, DrainProgress)) {
        let mut begun = self.volume.begin_progress();
        let limit = self.clock.us() + limit_s * 1_000_000;
        self.volume.draining.store(true, Ordering::SeqCst);
        while !self.volume.is_clean() {
            assert!(self.clock.us() < limit, "the drain does not end");
            self.settle();
            note(self.clock.us(), begun.now(&self.volume));
            self.pass(u64::MAX);
        }
        self.volume.draining.store(false, Ordering::SeqCst);
    }

    /// Compares the disk alone with what was written.
    ///
    /// # Errors
    /// The first sector that differs, in words.
    pub fn judge_disk(&self) -> Result<(), String> {
        let content = self.disk.content();
        let wrong = |(&sector, &value): (&u64, &u64)| {
            (content[sector as usize] != value)
                .then(|| format!("sector {sector} holds write {}, not {value}", content[sector as usize]))
        };
        self.expected.iter().find_map(wrong).map_or(Ok(()), Err)
    }
}

/// Runs a guest against the bare disk.
pub fn run_bare(
    model: DiskModel,
    sectors: u64,
    guest: &mut dyn Guest,
    depth: usize,
) -> (Trail, Arc<TimedDisk>) {
    let clock = VirtualClock::default();
    let disk = TimedDisk::new(&clock, model, sectors);
    let mut channel: TimedChannel = disk.open(depth.max(1));
    let mut trail = Trail::default();
    let mut flights: HashMap<u32, Flight> = HashMap::new();
    let mut next = guest.next(&|_, _| false);
    let mut tag = 0u32;
    let mut done = Vec::new();
    while next.is_some() || !flights.is_empty() {
        while let Some((not_before, ask)) = next
            && flights.len() < depth
            && not_before <= clock.us()
            && (ask != Ask::Barrier || flights.is_empty())
        {
            tag += 1;
            let (op, first, sectors) = match ask {
                Ask::Write { first, sectors } => (
                    Op::Write { offset: first * 512, buf: AlignedBuf::new(sectors as usize * 512) },
                    first,
                    sectors,
                ),
                Ask::Read { first, sectors } => (
                    Op::Read { offset: first * 512, buf: AlignedBuf::new(sectors as usize * 512) },
                    first,
                    sectors,
                ),
                Ask::Discard { first, sectors } => {
                    (Op::Zero { offset: first * 512, len: sectors * 512, unmap: true }, first, sectors)
                }
                Ask::Barrier => (Op::Flush, 0, 0),
            };
            assert!(channel.submit(tag.into(), op).is_ok(), "fewer than the depth are in flight");
            flights.insert(tag, Flight { began: clock.us(), first, sectors });
            if ask == Ask::Barrier {
                break;
            }
            next = guest.next(&|first, sectors| is_busy(&flights, first, sectors));
        }
        channel.reap(&mut done);
        if done.is_empty() {
            let due = disk.next_event().unwrap_or(u64::MAX);
            let due =
                next.map_or(
                    due,
                    |(at, _)| if flights.len() < depth && at > clock.us() { due.min(at) } else { due },
                );
            clock.advance_to(due);
        }
        clock.advance_to(clock.us() + REQUEST_US * done.len() as u64);
        for completion in done.drain(..) {
            trail.failed += u64::from(completion.result.is_err());
            let flight = flights.remove(&(completion.token as u32)).expect("it was under way");
            trail.add(flight.began, clock.us());
            if flight.sectors == 0 {
                next = guest.next(&|_, _| false);
            }
        }
    }
    (trail, disk)
}
