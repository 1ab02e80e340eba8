//! A disk with a clock: each operation takes what the model says, and completes when its time comes.
//!
//! Content is one number per sector, the first word of its bytes, but for an extent at the end that
//! holds any bytes, as a redo area does; a write cache is not modelled,
//! a flush costs one access after everything before it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::super::rng::Rng;
use super::super::world::Faults;
use super::lab::VirtualClock;
use crate::backing::{Backing, BackingGeometry, BackingIdentity, BackingKind, Channel, Completion, Op};
use crate::wake::Waker;

/// What operations cost.
#[derive(Clone, Copy, Debug)]
pub struct DiskModel {
    /// What an operation that does not go on where another ended takes before its first byte.
    pub access_us: u64,
    /// Bytes a second, shared by all operations.
    pub rate: u64,
    /// Operations whose accesses overlap: 1 for one arm.
    pub arms: usize,
}

impl DiskModel {
    /// One arm: 8 ms to get there, 150 MB/s.
    pub const HARD_DISK: DiskModel = DiskModel { access_us: 8000, rate: 150_000_000, arms: 1 };
    /// A network disk: half a millisecond, 250 MB/s, 32 operations at a time.
    pub const NETWORK: DiskModel = DiskModel { access_us: 500, rate: 250_000_000, arms: 32 };
}

/// What has been done to a disk.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Written {
    /// Write operations, zeroings included.
    pub writes: u64,
    /// Sectors written.
    pub sectors: u64,
    /// Read operations.
    pub reads: u64,
    /// Sectors read.
    pub read_sectors: u64,
    /// Flushes.
    pub flushes: u64,
}

/// The disk.
pub struct TimedDisk {
    clock: VirtualClock,
    model: DiskModel,
    state: Mutex<State>,
}

struct State {
    content: Vec<u64>,
    /// Bytes of the sectors behind those.
    raw: Vec<u8>,
    /// When each arm is free again.
    arms: Vec<u64>,
    /// When the wire is free again.
    wire: u64,
    /// Where the last accesses of each arm ended.
    ends: Vec<u64>,
    /// When everything submitted so far has ended.
    last_end: u64,
    /// When operations not yet reaped end.
    events: BinaryHeap<Reverse<u64>>,
    written: Written,
    faults: Faults,
    rng: Rng,
}

impl TimedDisk {
    /// A disk of zeros.
    pub fn new(clock: &VirtualClock, model: DiskModel, sectors: u64) -> Arc<TimedDisk> {
        TimedDisk::with_raw(clock, model, sectors, 0)
    }

    /// A disk of zeros, with so many sectors for any bytes behind the others.
    pub fn with_raw(clock: &VirtualClock, model: DiskModel, sectors: u64, raw: u64) -> Arc<TimedDisk> {
        let state = State {
            content: vec![0; sectors as usize],
            raw: vec![0; raw as usize * 512],
            arms: vec![0; model.arms],
            wire: 0,
            ends: vec![u64::MAX; model.arms],
            last_end: 0,
            events: BinaryHeap::new(),
            written: Written::default(),
            faults: Faults::default(),
            rng: Rng::new(1),
        };
        Arc::new(TimedDisk { clock: clock.clone(), model, state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has been done to it.
    pub fn written(&self) -> Written {
        self.state().written
    }

    /// The number in each sector.
    pub fn content(&self) -> Vec<u64> {
        self.state().content.clone()
    }

    /// Sets what fails from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.state().faults = faults;
    }

    /// When the next operation ends.
    pub fn next_event(&self) -> Option<u64> {
        let state = self.state();
        if state.faults.hung != 0 { None } else { state.events.peek().map(|e| e.0) }
    }

    /// A channel of `depth` operations.
    pub fn open(self: &Arc<Self>, depth: usize) -> TimedChannel {
        TimedChannel { disk: self.clone(), first: 0, depth, ops: Vec::new() }
    }
}

impl State {
    /// When an operation submitted now ends.
    fn schedule(&mut self, model: &DiskModel, now: u64, op: &Op, base: u64) -> u64 {
        let (first, bytes) = match op {
            Op::Read { offset, buf } | Op::Write { offset, buf } => (base + offset / 512, buf.len() as u64),
            // What holds no data moves none over the wire.
            Op::Zero { offset, len, .. } => (base + offset / 512, (*len).min(4096)),
            Op::Flush => {
                let end = self.last_end.max(now) + model.access_us;
                self.arms.fill(end);
                return end;
            }
        };
        // It goes on where another ended, or takes the arm that is free first.
        let follows = (0..self.arms.len()).find(|&a| self.ends[a] == first);
        let arm = follows.unwrap_or_else(|| (0..self.arms.len()).min_by_key(|&a| self.arms[a]).unwrap_or(0));
        let access = if follows.is_some() { 0 } else { model.access_us };
        let there = self.arms[arm].max(now) + access;
        let end = there.max(self.wire) + (bytes * 1_000_000).div_ceil(model.rate);
        (self.wire, self.arms[arm], self.ends[arm]) = (end, end, first + bytes / 512);
        end
    }

    fn perform(&mut self, op: &mut Op, base: u64) -> io::Result<()> {
        let rate = match op {
            Op::Read { .. } => self.faults.read,
            Op::Write { .. } | Op::Zero { .. } => self.faults.write,
            Op::Flush => self.faults.flush,
        };
        if self.faults.is_hit(rate, &mut self.rng) {
            return Err(io::Error::from_raw_os_error(5));
        }
        if base > 0 {
            return self.perform_raw(op, base);
        }
        match op {
            Op::Read { offset, buf } => {
                let first = (*offset / 512) as usize;
                for (bytes, value) in buf.chunks_exact_mut(512).zip(&self.content[first..]) {
                    bytes.fill(0);
                    bytes[..8].copy_from_slice(&value.to_le_bytes());
                }
                self.written.reads += 1;
                self.written.read_sectors += buf.len() as u64 / 512;
            }
            Op::Write { offset, buf } => {
                let first = (*offset / 512) as usize;
                for (bytes, value) in buf.chunks_exact(512).zip(&mut self.content[first..]) {
                    *value = u64::from_le_bytes(*bytes.first_chunk().expect("a sector has 512 bytes"));
                }
                self.written.writes += 1;
                self.written.sectors += buf.len() as u64 / 512;
            }
            Op::Zero { offset, len, .. } => {
                self.content[(*offset / 512) as usize..][..(*len / 512) as usize].fill(0);
                self.written.writes += 1;
                self.written.sectors += *len / 512;
            }
            Op::Flush => self.written.flushes += 1,
        }
        Ok(())
    }

    fn perform_raw(&mut self, op: &mut Op, base: u64) -> io::Result<()> {
        let behind = (base as usize - self.content.len()) * 512;
        match op {
            Op::Read { offset, buf } => {
                let len = buf.len();
                buf.copy_from_slice(&self.raw[behind + *offset as usize..][..len]);
                self.written.reads += 1;
                self.written.read_sectors += len as u64 / 512;
            }
            Op::Write { offset, buf } => {
                self.raw[behind + *offset as usize..][..buf.len()].copy_from_slice(buf);
                self.written.writes += 1;
                self.written.sectors += buf.len() as u64 / 512;
            }
            Op::Zero { offset, len, .. } => {
                self.raw[behind + *offset as usize..][..*len as usize].fill(0);
                self.written.writes += 1;
            }
            Op::Flush => self.written.flushes += 1,
        }
        Ok(())
    }
}

/// Operations of one user of a disk.
pub struct TimedChannel {
    disk: Arc<TimedDisk>,
    /// The sector that is its first.
    first: u64,
    depth: usize,
    ops: Vec<(u64, u64, Op)>,
}

impl Channel for TimedChannel {
    fn submit(&mut self, token: u64, op: Op) -> Result<(), Op> {
        if self.ops.len() >= self.depth {
            return Err(op);
        }
        let mut state = self.disk.state();
        let end = state.schedule(&self.disk.model, self.disk.clock.us(), &op, self.first);
        state.last_end = state.last_end.max(end);
        state.events.push(Reverse(end));
        self.ops.push((end, token, op));
        Ok(())
    }

    fn kick(&mut self) {}

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let now = self.disk.clock.us();
        let mut state = self.disk.state();
        if state.faults.hung != 0 {
            return;
        }
        while state.events.peek().is_some_and(|e| e.0 <= now) {
            state.events.pop();
        }
        let mut ended: Vec<_> = self.ops.extract_if(.., |(end, _, _)| *end <= now).collect();
        ended.sort_unstable_by_key(|(end, _, _)| *end);
        for (_, token, mut op) in ended {
            let result = state.perform(&mut op, self.first);
            done.push(Completion { token, op, result });
        }
    }

    fn wait(&mut self, timeout: Duration) {
        // Whoever waits by itself, as the end of a failed round does, lets time pass.
        let next = self.ops.iter().map(|(end, _, _)| *end).min();
        let limit = self.disk.clock.us() + timeout.as_micros() as u64;
        self.disk.clock.advance_to(next.map_or(limit, |n| n.min(limit)));
    }

    fn in_flight(&self) -> usize {
        self.ops.len()
    }
}

/// The disk as the engine attaches it.
pub struct TimedBacking {
    disk: Arc<TimedDisk>,
    /// Whether it is what lies behind the sectors of the volume.
    is_behind: bool,
}

impl TimedBacking {
    /// The sectors of a volume.
    pub fn new(disk: &Arc<TimedDisk>) -> TimedBacking {
        TimedBacking { disk: disk.clone(), is_behind: false }
    }

    /// The sectors behind those.
    pub fn behind(disk: &Arc<TimedDisk>) -> TimedBacking {
        TimedBacking { disk: disk.clone(), is_behind: true }
    }
}

impl Backing for TimedBacking {
    type Channel = TimedChannel;

    fn geometry(&self) -> BackingGeometry {
        BackingGeometry {
            size: if self.is_behind {
                self.disk.state().raw.len() as u64
            } else {
                self.disk.state().content.len() as u64 * 512
            },
            logical_block: 512,
            physical_block: 4096,
            optimal_io: 0,
            read_only: false,
            can_unmap: true,
        }
    }

    fn identity(&self) -> BackingIdentity {
        BackingIdentity {
            kind: BackingKind::File,
            size: self.geometry().size,
            device: 1,
            inode: 1,
            path: "/timed/disk".to_owned(),
            ..BackingIdentity::default()
        }
    }

    fn shares_device_with(&self, other: &TimedBacking) -> bool {
        Arc::ptr_eq(&self.disk, &other.disk)
    }

    fn fingerprint(&self, _seed: u64) -> io::Result<u64> {
        Ok(1)
    }

    fn channel(&self, _waker: &Waker, depth: u32) -> io::Result<TimedChannel> {
        let first = if self.is_behind { self.disk.state().content.len() as u64 } else { 0 };
        Ok(TimedChannel { first, ..self.disk.open(depth as usize) })
    }
}
