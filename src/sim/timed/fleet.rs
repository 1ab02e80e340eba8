//! Several volumes on one cache in virtual time, each with its own guest, disk and processor, and disks
//! that fail and hang on command.
//!
//! A guest keeps `depth` requests of one block under way, on blocks that nothing under way touches, and
//! knows what each block may hold: what was last written with success, and what was written since without.
//! Every read is compared. So nothing that an outage does to the data goes unseen, and no figure comes from
//! a guest that reads garbage.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::rng::Rng;
use super::super::world::Faults;
use super::disk::{DiskModel, TimedBacking, TimedDisk};
use super::lab::{PlainMemory, TimedEnv, VirtualClock};
use crate::cache::queue::Queue;
use crate::cache::worker::{Progress, Stepper};
use crate::cache::{
    AttachOptions, Cache, FormatOptions, Mode, Order, ScrubOptions, Volume, VolumeDisk, format,
};
use crate::onmedia::Geometry;
use crate::sim::SimBuffer;
use crate::volume::{Disk, DiskQueue, Request, RequestKind, Status};
use crate::wake::Waker;

/// How far time goes when nothing is due.
const TICK_US: u64 = 5000;
/// Sectors of a block.
const BLOCK: u64 = 8;

/// One volume and its guest.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// The disk.
    pub model: DiskModel,
    /// Blocks of it that the guest uses, from its beginning.
    pub blocks: u64,
    /// How writes go.
    pub mode: Mode,
    /// How write-back goes.
    pub order: Order,
    /// Requests under way; 0 for an idle guest.
    pub depth: usize,
    /// Writes among 100 requests.
    pub write_percent: u64,
    /// What a request costs the guest's processor in µs, thinking included.
    pub request_us: u64,
}

/// What a guest has seen.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Seen {
    /// Reads that ended well.
    pub reads: u64,
    /// Writes that ended well.
    pub writes: u64,
    /// Reads that failed.
    pub failed_reads: u64,
    /// Writes that failed.
    pub failed_writes: u64,
}

impl Seen {
    /// Requests that ended well.
    pub fn good(&self) -> u64 {
        self.reads + self.writes
    }

    /// Requests that failed.
    pub fn failed(&self) -> u64 {
        self.failed_reads + self.failed_writes
    }
}

struct Flight {
    block: u64,
    /// What a write writes.
    value: Option<u64>,
}

struct Guest {
    rng: Rng,
    depth: usize,
    write_percent: u64,
    request_us: u64,
    /// What each block may hold.
    model: Vec<Vec<u64>>,
    flights: HashMap<u32, Flight>,
    busy: Vec<bool>,
    next: u64,
    /// When its processor is free.
    free_us: u64,
    seen: Seen,
}

/// See the module's head.
pub struct Fleet {
    /// Time.
    pub clock: VirtualClock,
    /// The cache.
    pub cache: Arc<Cache<TimedEnv>>,
    /// Its memory.
    pub memory: Arc<PlainMemory>,
    /// The disks.
    pub disks: Vec<Arc<TimedDisk>>,
    /// The volumes.
    pub volumes: Vec<Arc<Volume<TimedEnv>>>,
    queues: Vec<Queue<TimedEnv, SimBuffer>>,
    stepper: Stepper<TimedEnv>,
    guests: Vec<Guest>,
}

impl Fleet {
    /// A fresh cache of so many segments of 256 KiB before disks of zeros.
    pub fn new(seed: u64, segments: u32, members: &[Member]) -> Fleet {
        let clock = VirtualClock::default();
        let slots = members.len() as u32;
        let geometry = Geometry::custom((2 + 2 * u64::from(slots)) * 4096, 256 << 10, segments, slots);
        let geometry = geometry.expect("the geometry is within its bounds");
        let memory = Arc::new(PlainMemory::zeros(geometry.device_size as usize));
        let options = FormatOptions { geometry: Some(geometry), ..FormatOptions::default() };
        format(&*memory, &clock, &options).expect("fresh memory");
        let (cache, _) = Cache::<TimedEnv>::open(memory.clone(), clock.clone()).expect("a fresh cache");
        let disks: Vec<_> =
            members.iter().map(|m| TimedDisk::new(&clock, m.model, m.blocks * BLOCK)).collect();
        let attach = |(n, (member, disk)): (usize, (&Member, &Arc<TimedDisk>))| {
            cache.attach(options_of(n, member, disk)).expect("a fresh volume")
        };
        let volumes: Vec<_> = members.iter().zip(&disks).enumerate().map(attach).collect();
        let open = |v: &Arc<Volume<TimedEnv>>| {
            let face = VolumeDisk(v.clone());
            face.set_write_cache(true);
            face.open_queue(0, Waker::default()).expect("nobody has it")
        };
        let queues = volumes.iter().map(open).collect();
        let stepper = Stepper::new(&cache, &volumes);
        let mut rng = Rng::new(seed);
        let guests = members.iter().map(|member| Guest::new(rng.fork(), member)).collect();
        Fleet { clock, cache, memory, disks, volumes, queues, stepper, guests }
    }

    /// Makes a disk fail from now on: every operation with `EIO`, none if not.
    pub fn fail_disk(&self, disk: usize, fails: bool) {
        let rate = if fails { 10_000 } else { 0 };
        self.disks[disk].set_faults(Faults { read: rate, write: rate, flush: rate, ..Faults::default() });
    }

    /// Makes a disk hang from now on, or answer again.
    pub fn hang_disk(&self, disk: usize, hangs: bool) {
        self.disks[disk].set_faults(Faults { hung: u64::from(hangs), ..Faults::default() });
    }

    /// Sets how the cache is scrubbed.
    pub fn scrub(&self, options: ScrubOptions) {
        self.cache.set_scrub(options);
    }

    /// What a guest has seen so far.
    pub fn seen(&self, guest: usize) -> Seen {
        self.guests[guest].seen
    }

    /// Requests that a guest has under way.
    pub fn under_way(&self, guest: usize) -> usize {
        self.guests[guest].flights.len()
    }

    /// Changes how many requests a guest keeps under way.
    pub fn set_depth(&mut self, guest: usize, depth: usize) {
        self.guests[guest].depth = depth;
    }

    /// Lets `ms` pass with the guests at work; returns what each saw in it.
    pub fn run(&mut self, ms: u64) -> Vec<Seen> {
        let before: Vec<Seen> = self.guests.iter().map(|g| g.seen).collect();
        let until = self.clock.us() + ms * 1000;
        while self.clock.us() < until {
            let mut any = false;
            for n in 0..self.guests.len() {
                any |= self.turn(n);
            }
            self.settle();
            if !any {
                self.pass(until);
            }
        }
        let less = |(now, then): (&Guest, &Seen)| Seen {
            reads: now.seen.reads - then.reads,
            writes: now.seen.writes - then.writes,
            failed_reads: now.seen.failed_reads - then.failed_reads,
            failed_writes: now.seen.failed_writes - then.failed_writes,
        };
        self.guests.iter().zip(&before).map(less).collect()
    }

    /// Lets the guests end what they have under way; panics when that takes longer than `limit_ms`.
    pub fn quiesce(&mut self, limit_ms: u64) {
        let depths: Vec<usize> = self.guests.iter_mut().map(|g| std::mem::take(&mut g.depth)).collect();
        let limit = self.clock.us() + limit_ms * 1000;
        while self.guests.iter().any(|g| !g.flights.is_empty()) {
            assert!(self.clock.us() < limit, "requests never end");
            self.run(1);
        }
        self.guests.iter_mut().zip(depths).for_each(|(guest, depth)| guest.depth = depth);
    }

    /// Brings everything to the disks; panics when that takes longer than `limit_ms`.
    pub fn drain(&mut self, limit_ms: u64) {
        self.quiesce(limit_ms);
        let limit = self.clock.us() + limit_ms * 1000;
        let depths: Vec<usize> = self.guests.iter_mut().map(|g| std::mem::take(&mut g.depth)).collect();
        while self.volumes.iter().any(|v| !v.is_clean()) {
            assert!(self.clock.us() < limit, "the drain does not end: {:?}", self.volumes[0].health());
            self.run(1);
        }
        self.guests.iter_mut().zip(depths).for_each(|(guest, depth)| guest.depth = depth);
    }

    /// Compares a disk alone with what its guest knows.
    ///
    /// # Errors
    /// The first block that differs, in words.
    pub fn judge_disk(&self, disk: usize) -> Result<(), String> {
        let content = self.disks[disk].content();
        for (block, may) in self.guests[disk].model.iter().enumerate() {
            let found = content[block * BLOCK as usize];
            if !may.contains(&found) {
                return Err(format!("block {block} of disk {disk} holds write {found}, not one of {may:?}"));
            }
        }
        Ok(())
    }

    fn settle(&mut self) {
        loop {
            self.stepper.watch();
            let mut did = self.stepper.sync();
            for volume in 0..self.volumes.len() {
                did |= self.stepper.writeback(volume) == Progress::Did;
            }
            did |= self.stepper.housekeeper() == Progress::Did;
            if !did {
                return;
            }
        }
    }

    fn pass(&mut self, until: u64) {
        let now = self.clock.us();
        let ends = self.disks.iter().filter_map(|d| d.next_event());
        let works = self.guests.iter().filter(|g| g.flights.len() < g.depth).map(|g| g.free_us);
        let due = ends.chain(works).filter(|&at| at > now).min().unwrap_or(u64::MAX);
        self.clock.advance_to(due.min(now + TICK_US).min(until).max(now + 1));
    }

    /// One guest asks and is answered. Whether anything happened.
    fn turn(&mut self, n: usize) -> bool {
        let now = self.clock.us();
        let guest = &mut self.guests[n];
        let mut any = false;
        while guest.flights.len() < guest.depth && guest.free_us <= now {
            let request = guest.ask();
            self.queues[n].submit(request);
            guest.free_us = guest.free_us.max(now) + guest.request_us;
            any = true;
        }
        if any {
            self.queues[n].commit();
        }
        let mut done = Vec::new();
        self.queues[n].poll(&mut done);
        for done in done {
            any = true;
            self.guests[n].answered(done.tag, done.status, &done.data);
        }
        any
    }
}

impl Guest {
    fn new(rng: Rng, member: &Member) -> Guest {
        Guest {
            rng,
            depth: member.depth,
            write_percent: member.write_percent,
            request_us: member.request_us,
            model: vec![vec![0]; member.blocks as usize],
            flights: HashMap::new(),
            busy: vec![false; member.blocks as usize],
            next: 1,
            free_us: 0,
            seen: Seen::default(),
        }
    }

    fn ask(&mut self) -> Request<SimBuffer> {
        let block = loop {
            let block = self.rng.index(self.busy.len());
            if !std::mem::replace(&mut self.busy[block], true) {
                break block as u64;
            }
        };
        let value = self.rng.chance(self.write_percent, 100).then_some(self.next);
        let tag = self.next as u32;
        self.next += 1;
        let (kind, data) = match value {
            Some(value) => {
                let mut bytes = vec![0; BLOCK as usize * 512];
                bytes.chunks_exact_mut(512).for_each(|s| s[..8].copy_from_slice(&value.to_le_bytes()));
                self.model[block as usize].push(value);
                (RequestKind::Write, SimBuffer { bytes, gone_from: None })
            }
            None => (RequestKind::Read, SimBuffer::to_read(BLOCK)),
        };
        self.flights.insert(tag, Flight { block, value });
        Request { tag, kind, sector: block * BLOCK, data }
    }

    fn answered(&mut self, tag: u32, status: Status, data: &SimBuffer) {
        let Flight { block, value } = self.flights.remove(&tag).expect("it was under way");
        self.busy[block as usize] = false;
        let may = &mut self.model[block as usize];
        match (value, status) {
            (Some(value), Status::Ok) => {
                *may = vec![value];
                self.seen.writes += 1;
            }
            (Some(_), _) => self.seen.failed_writes += 1,
            (None, Status::Ok) => {
                let found = |s: &[u8]| u64::from_le_bytes(*s.first_chunk().expect("a sector has 512 bytes"));
                for sector in data.bytes.chunks_exact(512).map(found) {
                    assert!(
                        may.contains(&sector),
                        "block {block} reads as write {sector}, not one of {may:?}"
                    );
                }
                self.seen.reads += 1;
            }
            (None, _) => self.seen.failed_reads += 1,
        }
    }
}

fn options_of(n: usize, member: &Member, disk: &Arc<TimedDisk>) -> AttachOptions<TimedEnv> {
    AttachOptions {
        name: format!("volume{n}"),
        backing: Arc::new(TimedBacking::new(disk)),
        mode: member.mode,
        order: member.order,
        data_crc: true,
        pass_discard: true,
        read_only: false,
        serial: format!("fleet{n}"),
        block_size: None,
        queues: 1,
        queue_size: 256,
        force_identity: false,
        accept_loss: false,
        sidecar: None,
        redo: None,
        reads: Default::default(),
        allow_volatile: false,
        group: None,
    }
}
