//! The slow side as the engine sees it: operations that end late, in any order, sometimes badly.
//!
//! A write may reach the write cache long before its completion is seen, a read may have looked
//! long before; both are decided when they are submitted, by chance. Some transfers are short: a
//! part is done, then the rest, with anything in between, or the rest is never done and the
//! operation fails. A disk may answer late, not at all for a while, or be gone for a while; a flush
//! that fails may have lost what it was to make durable.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::content::BYTES;
use super::world::{Event, Faults, State, World};
use crate::backing::{Backing, BackingGeometry, BackingIdentity, BackingKind, Channel, Completion, Op};
use crate::wake::Waker;

/// Most times a channel is asked before an operation ends, usually and of one in [`SLOW_ONE_IN`].
const DELAY_MAX: u64 = 4;
const DELAY_SLOW_MAX: u64 = 60;
const SLOW_ONE_IN: u64 = 80;
/// One transfer in so many is short.
const SHORT_ONE_IN: u64 = 20;

/// What the kernel says of a bad sector, and of a device that is gone.
const EIO: i32 = 5;
const ENXIO: i32 = 6;

/// One of the world's disks.
pub struct SimBacking {
    world: Arc<World>,
    disk: usize,
    can_unmap: bool,
}

impl SimBacking {
    /// Disk number `disk` of `world`.
    pub fn new(world: &Arc<World>, disk: usize) -> SimBacking {
        SimBacking { world: world.clone(), disk, can_unmap: true }
    }
}

impl Backing for SimBacking {
    type Channel = SimChannel;

    fn geometry(&self) -> BackingGeometry {
        let size = self.world.with(|w| w.disks[self.disk].sectors()) * BYTES as u64;
        BackingGeometry {
            size,
            logical_block: 512,
            physical_block: 4096,
            optimal_io: 0,
            read_only: false,
            can_unmap: self.can_unmap,
        }
    }

    fn identity(&self) -> BackingIdentity {
        BackingIdentity {
            kind: BackingKind::File,
            size: self.geometry().size,
            device: 1,
            inode: self.world.with(|w| w.disks[self.disk].identity),
            path: format!("/sim/disk{}", self.disk),
            ..BackingIdentity::default()
        }
    }

    fn fingerprint(&self, _seed: u64) -> io::Result<u64> {
        let values = self.world.with(|w| w.disks[self.disk].values());
        let mix = |hash: u64, value: &u64| (hash ^ value).wrapping_mul(0x100_0000_01b3).rotate_left(9);
        Ok(values.iter().fold(0xcbf2_9ce4_8422_2325, mix))
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        self.world.with(|w| {
            w.event(Event::DiskWrite);
            w.disks[self.disk].grow(size / BYTES as u64);
        });
        Ok(())
    }

    fn can_have_sidecar(&self) -> bool {
        true
    }

    fn read_sidecar(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.world.with(|w| w.disks[self.disk].sidecar.clone()))
    }

    fn write_sidecar(&self, copy: usize, page: &[u8]) -> io::Result<()> {
        // A crash may come before it, and between its two halves.
        let half = page.len() / 2;
        for (number, part) in page.chunks(half).enumerate() {
            let at = copy * page.len() + number * half;
            self.world.with(|w| {
                w.event(Event::DiskWrite);
                let bytes = w.disks[self.disk].sidecar.get_or_insert_with(|| vec![0; 2 * page.len()]);
                bytes[at..at + part.len()].copy_from_slice(part);
            });
        }
        Ok(())
    }

    fn remove_sidecar(&self) -> io::Result<()> {
        self.world.with(|w| {
            w.event(Event::DiskWrite);
            w.disks[self.disk].sidecar = None;
        });
        Ok(())
    }

    fn channel(&self, _waker: &Waker, depth: u32) -> io::Result<SimChannel> {
        Ok(SimChannel { world: self.world.clone(), disk: self.disk, depth: depth as usize, ops: Vec::new() })
    }
}

/// An operation under way.
struct Flying {
    token: u64,
    op: Op,
    /// Of a write or zeroing: its number on the disk. Of a flush: what it covers.
    number: u64,
    /// Sectors of a transfer that are done, or looked at.
    moved: usize,
    /// Where a short transfer stops, in sectors.
    stop: Option<usize>,
    delay: u64,
}

/// One thread's operations on a disk.
pub struct SimChannel {
    world: Arc<World>,
    disk: usize,
    depth: usize,
    ops: Vec<Flying>,
}

/// Fills the buffer of a read from sector `from` to `upto` of it.
fn read(w: &State, disk: usize, op: &mut Op, from: usize, upto: usize) {
    let Op::Read { offset, buf } = op else { unreachable!("only reads read") };
    let first = *offset / BYTES as u64;
    for (i, out) in buf.chunks_exact_mut(BYTES).enumerate().take(upto).skip(from) {
        let sector = first + i as u64;
        w.disks[disk].encode(disk, sector, out);
    }
}

/// Sectors that an operation moves; 0 for those that move nothing.
fn transfer(op: &Op) -> usize {
    match op {
        Op::Read { buf, .. } | Op::Write { buf, .. } => buf.len() / BYTES,
        Op::Zero { .. } | Op::Flush => 0,
    }
}

impl SimChannel {
    fn begin(&self, w: &mut State, token: u64, mut op: Op) -> Flying {
        let disk = self.disk;
        let is_away = Faults::has(w.faults.away, disk);
        let early = w.rng.chance(1, 2) && !is_away;
        let sectors = transfer(&op);
        let mut number = 0;
        match &mut op {
            Op::Read { offset, buf } => {
                let end = *offset + buf.len() as u64;
                assert!(end <= w.disks[disk].sectors() * BYTES as u64, "a read past the end of the disk");
                if early {
                    read(w, disk, &mut op, 0, sectors);
                }
            }
            Op::Write { offset, buf } => {
                assert!(offset.is_multiple_of(BYTES as u64) && buf.len().is_multiple_of(BYTES));
                let first = *offset / BYTES as u64;
                let decode = |(i, bytes)| w.disks[disk].decode(disk, first + i as u64, bytes);
                let values = buf.chunks_exact(BYTES).enumerate().map(decode).collect::<Result<_, _>>();
                let values = values.unwrap_or_else(|e| panic!("garbage on its way to the disk: {e}"));
                number = w.disks[disk].begin_write(first, values);
            }
            Op::Zero { offset, len, .. } => {
                let (first, sectors) = (*offset / BYTES as u64, *len / BYTES as u64);
                number = w.disks[disk].begin_write(first, vec![0; sectors as usize]);
            }
            Op::Flush => number = w.disks[disk].flush_mark(),
        }
        if early && matches!(op, Op::Write { .. } | Op::Zero { .. }) {
            w.disks[disk].land(number);
        }
        let is_uneven = w.faults.is_uneven;
        let is_short = is_uneven && !early && sectors > 1 && w.rng.chance(1, SHORT_ONE_IN);
        let stop = is_short.then(|| w.rng.between(1, sectors as u64 - 1) as usize);
        let is_slow = is_uneven && w.rng.chance(1, SLOW_ONE_IN);
        w.deeds.slow_ops += u64::from(is_slow);
        let delay = w.rng.below(if is_slow { DELAY_SLOW_MAX } else { DELAY_MAX });
        Flying { token, op, number, moved: if early { sectors } else { 0 }, stop, delay }
    }

    /// Moves the first part of a short transfer. The rest follows later.
    fn move_part(&self, w: &mut State, flying: &mut Flying, stop: usize) {
        w.deeds.short_transfers += 1;
        match &mut flying.op {
            op @ Op::Read { .. } => read(w, self.disk, op, 0, stop),
            _ => w.disks[self.disk].land_prefix(flying.number, stop),
        }
        flying.moved = stop;
        flying.delay = w.rng.below(DELAY_MAX);
    }

    fn end(&self, w: &mut State, mut flying: Flying) -> Completion {
        let disk = self.disk;
        let rate = match flying.op {
            Op::Read { .. } => w.faults.read,
            Op::Write { .. } | Op::Zero { .. } => w.faults.write,
            Op::Flush => w.faults.flush,
        };
        let is_away = Faults::has(w.faults.away, disk);
        w.deeds.failed_away += u64::from(is_away);
        let owes_error = flying.op_is_flush() && std::mem::take(&mut w.disks[disk].owes_error);
        let failed = is_away || owes_error || w.faults.is_hit(rate, &mut w.rng);
        match &mut flying.op {
            Op::Read { .. } if failed => {}
            op @ Op::Read { .. } => {
                let sectors = transfer(op);
                read(w, disk, op, flying.moved, sectors);
            }
            Op::Write { .. } | Op::Zero { .. } if is_away => w.disks[disk].end_write(flying.number),
            Op::Write { .. } | Op::Zero { .. } => {
                let State { disks, rng, .. } = w;
                disks[disk].complete_write(flying.number, failed.then_some(rng));
            }
            Op::Flush if failed && Faults::has(w.faults.lossy, disk) => {
                let State { disks, rng, deeds, .. } = w;
                deeds.lost_by_flush += disks[disk].lose_write_cache(rng);
            }
            Op::Flush if failed => {}
            Op::Flush => w.disks[disk].complete_flush(flying.number),
        }
        let result = match failed {
            true => Err(flying.error(is_away)),
            false => Ok(()),
        };
        Completion { token: flying.token, op: flying.op, result }
    }
}

impl Flying {
    fn op_is_flush(&self) -> bool {
        matches!(self.op, Op::Flush)
    }

    /// What the kernel says, or what a channel says of a transfer that got no further.
    fn error(&self, is_away: bool) -> io::Error {
        match &self.op {
            _ if is_away => io::Error::from_raw_os_error(ENXIO),
            Op::Read { .. } if self.stop.is_some() => io::ErrorKind::UnexpectedEof.into(),
            Op::Write { .. } if self.stop.is_some() => io::ErrorKind::WriteZero.into(),
            _ => io::Error::from_raw_os_error(EIO),
        }
    }
}

impl Channel for SimChannel {
    fn submit(&mut self, token: u64, op: Op) -> Result<(), Op> {
        if self.ops.len() >= self.depth {
            return Err(op);
        }
        let world = self.world.clone();
        let flying = world.with(|w| {
            w.event(match op {
                Op::Read { .. } => Event::DiskRead,
                Op::Write { .. } | Op::Zero { .. } => Event::DiskWrite,
                Op::Flush => Event::DiskFlush,
            });
            self.begin(w, token, op)
        });
        self.ops.push(flying);
        Ok(())
    }

    fn kick(&mut self) {}

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let world = self.world.clone();
        world.with(|w| {
            if Faults::has(w.faults.hung, self.disk) {
                return;
            }
            let mut i = w.rng.index(self.ops.len().max(1));
            for _ in 0..self.ops.len() {
                i = if i >= self.ops.len() { 0 } else { i };
                if self.ops[i].delay > 0 {
                    self.ops[i].delay -= 1;
                    i += 1;
                    continue;
                }
                if let Some(stop) = self.ops[i].stop
                    && self.ops[i].moved < stop
                {
                    w.event(Event::DiskPart);
                    let mut flying = self.ops.swap_remove(i);
                    self.move_part(w, &mut flying, stop);
                    self.ops.insert(i, flying);
                    i += 1;
                    continue;
                }
                w.event(Event::DiskCompletion);
                let flying = self.ops.swap_remove(i);
                done.push(self.end(w, flying));
            }
        });
    }

    fn wait(&mut self, _timeout: Duration) {}

    fn in_flight(&self) -> usize {
        self.ops.len()
    }
}

impl Drop for SimChannel {
    fn drop(&mut self) {
        let world = self.world.clone();
        world.with(|w| {
            for flying in std::mem::take(&mut self.ops) {
                self.end(w, flying);
            }
        });
    }
}
