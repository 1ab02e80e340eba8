//! One life of the product's engine in a world, with every thread's steps called by hand.

use std::sync::Arc;

use super::backing::SimBacking;
use super::content::{self, BYTES};
use super::memory::SimPmem;
use super::world::{SimClock, SimEnv, World};
use crate::cache::queue::Queue;
use crate::cache::worker::{Progress, Stepper};
use crate::cache::{AttachOptions, Cache, Mode, Order, RecoveryReport, Volume, VolumeDisk};
use crate::volume::{Buffer, Disk, DiskQueue, Done, GuestFault, Request, RequestKind, Status};
use crate::wake::Waker;

/// How a volume is served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Style {
    /// How writes go.
    pub mode: Mode,
    /// How write-back goes.
    pub order: Order,
    /// Whether the guest has a write cache to flush.
    pub write_cache: bool,
    /// Whether discards reach the disk as such.
    pub pass_discard: bool,
}

/// A guest's buffer.
#[derive(Debug, Default)]
pub struct SimBuffer {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// From this byte on the memory is not there.
    pub gone_from: Option<usize>,
}

impl Buffer for SimBuffer {
    fn len(&self) -> usize {
        self.bytes.len()
    }

    fn copy_out(&self, at: usize, dst: &mut [u8]) -> Result<(), GuestFault> {
        dst.copy_from_slice(&self.bytes[at..at + dst.len()]);
        self.judge(at + dst.len())
    }

    fn copy_in(&mut self, at: usize, src: &[u8]) -> Result<(), GuestFault> {
        self.bytes[at..at + src.len()].copy_from_slice(src);
        self.judge(at + src.len())
    }
}

impl SimBuffer {
    fn judge(&self, end: usize) -> Result<(), GuestFault> {
        if self.gone_from.is_some_and(|gone| gone < end) { Err(GuestFault) } else { Ok(()) }
    }
}

/// A volume being served.
pub struct Served {
    /// The volume.
    pub volume: Arc<Volume<SimEnv>>,
    /// Its queues.
    pub queues: Vec<Queue<SimEnv, SimBuffer>>,
    /// Which queues have taken requests since they last committed: they may hold positions.
    pub is_inside: Vec<bool>,
}

impl SimBuffer {
    /// What a guest writes: `count` sectors from `first` of a volume, all of write `value`.
    pub fn of_write(volume: usize, first: u64, count: u64, value: u64) -> SimBuffer {
        let mut bytes = vec![0; count as usize * BYTES];
        for (i, out) in bytes.chunks_exact_mut(BYTES).enumerate() {
            content::encode(volume, first + i as u64, value, out);
        }
        SimBuffer { bytes, gone_from: None }
    }

    /// Room for `count` sectors.
    pub fn to_read(count: u64) -> SimBuffer {
        SimBuffer { bytes: vec![0xee; count as usize * BYTES], gone_from: None }
    }

    /// Whose bytes these are, sector by sector from `first` of a volume on.
    ///
    /// # Errors
    /// A sector is nobody's, or belongs elsewhere.
    pub fn values(&self, volume: usize, first: u64) -> Result<Vec<u64>, String> {
        let decode = |(i, bytes)| content::decode(volume, first + i as u64, bytes);
        self.bytes.chunks_exact(BYTES).enumerate().map(decode).collect()
    }
}

/// A running engine.
pub struct Machine {
    world: Arc<World>,
    /// Its clock.
    pub clock: SimClock,
    /// The volumes, by number.
    pub served: Vec<Served>,
    /// Its cache.
    pub cache: Arc<Cache<SimEnv>>,
    /// What recovery found.
    pub report: RecoveryReport,
    stepper: Stepper<SimEnv>,
}

/// Logical threads.
const CONTROL: u32 = 0;
const SYNCER: u32 = 1;
const HOUSEKEEPER: u32 = 2;
const WRITEBACK: u32 = 10;
const QUEUE: u32 = 100;
/// Times a queue is asked before its request counts as lost.
const POLLS_MAX: u32 = 10_000;
/// How [`Machine::open`] says that the engine refuses to serve what it found.
const REFUSALS: [&str; 2] = ["the cache does not open", "is not attached"];
/// Longest read of [`Machine::read_all`] in sectors.
const READ_SECTORS: u64 = 128;

impl Machine {
    /// Recovers the cache of `world` and attaches its volumes.
    ///
    /// # Errors
    /// Recovery or an attach failed, in words.
    pub fn open(world: &Arc<World>, styles: &[Style], queues: u16) -> Result<Machine, String> {
        world.act_as(CONTROL);
        let clock = SimClock::default();
        let pmem = Arc::new(SimPmem::new(world));
        let (cache, report) =
            Cache::open(pmem, clock.clone()).map_err(|e| format!("the cache does not open: {e}"))?;
        let mut served = Vec::new();
        for (number, style) in styles.iter().enumerate() {
            let options = attach_options(world, (number, styles.len()), style, queues);
            let volume = cache
                .attach(options)
                .map_err(|e| format!("volume {number} is not attached: {e}; {:?}", report.findings))?;
            let disk = VolumeDisk(volume.clone());
            disk.set_write_cache(style.write_cache);
            let open = |q| disk.open_queue(q, Waker::default()).map_err(|e| e.to_string());
            let queues: Vec<_> = (0..queues).map(open).collect::<Result<_, _>>()?;
            served.push(Served { volume, is_inside: vec![false; queues.len()], queues });
        }
        let volumes: Vec<_> = served.iter().map(|s| s.volume.clone()).collect();
        let stepper = Stepper::new(&cache, &volumes);
        Ok(Machine { world: world.clone(), clock, served, cache, report, stepper })
    }

    /// Ends in order.
    ///
    /// # Errors
    /// A detach or the close failed, in words.
    pub fn close(mut self) -> Result<(), String> {
        self.world.act_as(CONTROL);
        for served in &mut self.served {
            served.queues.clear();
        }
        drop(self.stepper);
        for served in &self.served {
            self.cache.detach(&served.volume).map_err(|e| format!("a volume is not detached: {e}"))?;
        }
        self.cache.close().map_err(|e| format!("the cache is not closed: {e}"))
    }

    /// Submits a request.
    pub fn submit(&mut self, volume: usize, queue: usize, request: Request<SimBuffer>) {
        self.act_as_queue(volume, queue);
        let served = &mut self.served[volume];
        served.is_inside[queue] = true;
        served.queues[queue].submit(request);
    }

    /// Ends a queue's batch.
    pub fn commit(&mut self, volume: usize, queue: usize) {
        self.act_as_queue(volume, queue);
        let served = &mut self.served[volume];
        served.is_inside[queue] = false;
        served.queues[queue].commit();
    }

    /// Asks a queue for what has completed.
    pub fn poll(&mut self, volume: usize, queue: usize) -> Vec<Done<SimBuffer>> {
        self.act_as_queue(volume, queue);
        self.stepper.watch();
        let mut done = Vec::new();
        self.served[volume].queues[queue].poll(&mut done);
        done
    }

    /// Lets a queue's thread go to sleep.
    pub fn park(&mut self, volume: usize, queue: usize) {
        if !self.served[volume].is_inside[queue] {
            self.act_as_queue(volume, queue);
            self.served[volume].queues[queue].park();
        }
    }

    /// Runs a `sync` if any is asked for.
    pub fn sync(&mut self) -> bool {
        self.world.act_as(SYNCER);
        self.stepper.sync()
    }

    /// One step of a volume's write-back.
    pub fn writeback(&mut self, volume: usize) -> Progress {
        self.world.act_as(WRITEBACK + volume as u32);
        self.stepper.writeback(volume)
    }

    /// One step of the housekeeper, unless a queue holds positions: it would wait for that queue.
    pub fn housekeeper(&mut self) -> Progress {
        if self.served.iter().any(|s| s.is_inside.contains(&true)) {
            return Progress::Idle;
        }
        self.world.act_as(HOUSEKEEPER);
        self.stepper.housekeeper()
    }

    /// Whether reclaim relocates or drops, from now on.
    pub fn relocate(&mut self, on: bool) {
        self.stepper.relocate(on);
    }

    /// One step of everything but the guest.
    pub fn step_all(&mut self) {
        self.sync();
        for volume in 0..self.served.len() {
            self.writeback(volume);
        }
        self.housekeeper();
    }

    /// What every sector of a volume reads as now. No request may be under way on queue 0.
    ///
    /// # Errors
    /// A read failed, never ended, or showed garbage.
    pub fn read_all(&mut self, volume: usize) -> Result<Vec<u64>, String> {
        let sectors = self.world.with(|w| w.disks[volume].sectors());
        let mut values = vec![0; sectors as usize];
        let mut left = 0u64;
        for first in (0..sectors).step_by(READ_SECTORS as usize) {
            let count = READ_SECTORS.min(sectors - first);
            let data = SimBuffer::to_read(count);
            let request = Request { tag: first as u32, kind: RequestKind::Read, sector: first, data };
            self.submit(volume, 0, request);
            left += 1;
        }
        self.commit(volume, 0);
        for _ in 0..POLLS_MAX {
            for done in self.poll(volume, 0) {
                if done.status != Status::Ok {
                    return Err(format!("a read of volume {volume} from sector {} failed", done.tag));
                }
                let read = done.data.values(volume, done.tag.into())?;
                values[done.tag as usize..][..read.len()].copy_from_slice(&read);
                left -= 1;
            }
            if left == 0 {
                return Ok(values);
            }
        }
        Err(format!("{left} reads of volume {volume} never ended"))
    }

    fn act_as_queue(&self, volume: usize, queue: usize) {
        self.world.act_as(QUEUE + volume as u32 * 16 + queue as u32);
    }
}

/// Whether the engine refused to serve, rather than serve something wrong.
pub(super) fn is_refusal(error: &str) -> bool {
    REFUSALS.iter().any(|refusal| error.contains(refusal))
}

fn attach_options(
    world: &Arc<World>,
    (number, volumes): (usize, usize),
    style: &Style,
    queues: u16,
) -> AttachOptions<SimEnv> {
    // After the volumes' disks come their redo areas, in worlds that have any.
    let redo = volumes + number;
    let has_redo = world.with(|w| redo < w.disks.len());
    AttachOptions {
        name: format!("volume{number}"),
        backing: Arc::new(SimBacking::new(world, number)),
        mode: style.mode,
        order: style.order,
        redo: has_redo.then(|| Arc::new(SimBacking::new(world, redo))),
        data_crc: true,
        pass_discard: style.pass_discard,
        reads: Default::default(),
        read_only: false,
        serial: format!("sim{number}"),
        block_size: None,
        queues,
        queue_size: 256,
        force_identity: false,
        sidecar: None,
        accept_loss: false,
        allow_volatile: false,
        group: world.with(|w| w.disks[number].group.clone()),
    }
}
