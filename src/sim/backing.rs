//! The slow side as the engine sees it: operations that end late, in any order, sometimes badly.
//!
//! A write may reach the write cache long before its completion is seen, a read may have looked
//! long before; both are decided when they are submitted, by chance.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::content::{self, BYTES};
use super::world::{Event, State, World};
use crate::backing::{Backing, BackingGeometry, BackingIdentity, BackingKind, Channel, Completion, Op};
use crate::wake::Waker;

/// Most times a channel is asked before an operation ends.
const DELAY_MAX: u64 = 4;

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
            inode: self.disk as u64 + 1,
            path: format!("/sim/disk{}", self.disk),
        }
    }

    fn fingerprint(&self) -> io::Result<u64> {
        let values = self.world.with(|w| w.disks[self.disk].values());
        let mix = |hash: u64, value: &u64| (hash ^ value).wrapping_mul(0x100_0000_01b3).rotate_left(9);
        Ok(values.iter().fold(0xcbf2_9ce4_8422_2325, mix))
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
    /// Of a read: whether it has looked already.
    has_read: bool,
    delay: u64,
}

/// One thread's operations on a disk.
pub struct SimChannel {
    world: Arc<World>,
    disk: usize,
    depth: usize,
    ops: Vec<Flying>,
}

fn read(w: &State, disk: usize, op: &mut Op) {
    let Op::Read { offset, buf } = op else { unreachable!("only reads read") };
    let first = *offset / BYTES as u64;
    for (i, out) in buf.chunks_exact_mut(BYTES).enumerate() {
        let sector = first + i as u64;
        content::encode(disk, sector, w.disks[disk].value(sector), out);
    }
}

impl SimChannel {
    fn begin(&self, w: &mut State, token: u64, mut op: Op) -> Flying {
        let disk = self.disk;
        let early = w.rng.chance(1, 2);
        let mut number = 0;
        match &mut op {
            Op::Read { offset, buf } => {
                let end = *offset + buf.len() as u64;
                assert!(end <= w.disks[disk].sectors() * BYTES as u64, "a read past the end of the disk");
                if early {
                    read(w, disk, &mut op);
                }
            }
            Op::Write { offset, buf } => {
                assert!(offset.is_multiple_of(BYTES as u64) && buf.len().is_multiple_of(BYTES));
                let first = *offset / BYTES as u64;
                let decode = |(i, bytes)| content::decode(disk, first + i as u64, bytes);
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
        let delay = w.rng.below(DELAY_MAX);
        Flying { token, op, number, has_read: early, delay }
    }

    fn end(&self, w: &mut State, mut flying: Flying) -> Completion {
        let disk = self.disk;
        let rate = match flying.op {
            Op::Read { .. } => w.faults.read,
            Op::Write { .. } | Op::Zero { .. } => w.faults.write,
            Op::Flush => w.faults.flush,
        };
        let failed = w.faults.is_hit(rate, &mut w.rng);
        match &mut flying.op {
            op @ Op::Read { .. } if !flying.has_read => read(w, disk, op),
            Op::Read { .. } => {}
            Op::Write { .. } | Op::Zero { .. } => {
                let State { disks, rng, .. } = w;
                disks[disk].complete_write(flying.number, failed.then_some(rng));
            }
            Op::Flush if failed => {}
            Op::Flush => w.disks[disk].complete_flush(flying.number),
        }
        let result = if failed { Err(io::Error::from_raw_os_error(5)) } else { Ok(()) };
        Completion { token: flying.token, op: flying.op, result }
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
            let mut i = w.rng.index(self.ops.len().max(1));
            for _ in 0..self.ops.len() {
                i = if i >= self.ops.len() { 0 } else { i };
                if self.ops[i].delay > 0 {
                    self.ops[i].delay -= 1;
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
