//! The plainest world an engine can run in: bytes in memory that obey at once.
//!
//! Unlike the simulation's, these disks and this memory have no opinion about content: hostile images
//! may well bring garbage to a disk. What they insist on is the contract: nothing past the end,
//! nothing unaligned, no two overlapping writes in flight.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::backing::{Backing, BackingGeometry, BackingIdentity, BackingKind, Channel, Completion, Op};
use crate::cache::{Clock, Env};
use crate::pmem::{MediaClass, MediaError, Pmem, SyncError};
use crate::wake::Waker;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The world.
pub(super) struct Plain;

impl Env for Plain {
    type Pmem = PlainPmem;
    type Backing = PlainDisk;
    type Clock = PlainClock;

    fn threads() -> usize {
        1
    }
}

/// Time in which much has passed at every look: whoever waits for a moment sees it come at once, the
/// longest delay of a retry included.
#[derive(Clone, Debug, Default)]
pub(super) struct PlainClock(Arc<AtomicU64>);

impl Clock for PlainClock {
    fn now_ms(&self) -> u64 {
        self.0.fetch_add(5000, Ordering::Relaxed)
    }

    fn now_ns(&self) -> u64 {
        self.0.load(Ordering::Relaxed) * 1_000_000
    }

    fn unix_ms(&self) -> u64 {
        1_700_000_000_000 + self.now_ms()
    }
}

/// Memory.
pub(super) struct PlainPmem {
    bytes: Mutex<Vec<u8>>,
    len: u64,
    class: MediaClass,
    stores: AtomicU64,
}

impl PlainPmem {
    pub fn new(bytes: Vec<u8>, class: MediaClass) -> Self {
        Self { len: bytes.len() as u64, bytes: Mutex::new(bytes), class, stores: AtomicU64::new(0) }
    }

    /// A copy of all of it.
    pub fn bytes(&self) -> Vec<u8> {
        lock(&self.bytes).clone()
    }

    /// Times it was written.
    pub fn stores(&self) -> u64 {
        self.stores.load(Ordering::Relaxed)
    }

    fn judge(&self, at: u64, len: usize) {
        let end = at.checked_add(len as u64);
        assert!(end.is_some_and(|end| end <= self.len), "access past the end: {at}+{len} of {}", self.len);
    }
}

impl Pmem for PlainPmem {
    fn len(&self) -> u64 {
        self.len
    }

    fn class(&self) -> MediaClass {
        self.class
    }

    fn read(&self, at: u64, dst: &mut [u8]) -> Result<(), MediaError> {
        self.judge(at, dst.len());
        dst.copy_from_slice(&lock(&self.bytes)[at as usize..][..dst.len()]);
        Ok(())
    }

    fn write(&self, at: u64, src: &[u8]) -> Result<(), MediaError> {
        self.judge(at, src.len());
        self.stores.fetch_add(1, Ordering::Relaxed);
        lock(&self.bytes)[at as usize..][..src.len()].copy_from_slice(src);
        Ok(())
    }

    fn fence(&self) {}

    fn sync(&self) -> Result<(), SyncError> {
        Ok(())
    }
}

/// A disk.
pub(super) struct PlainDisk {
    bytes: Arc<Mutex<Vec<u8>>>,
    number: u64,
}

impl PlainDisk {
    pub fn new(bytes: Vec<u8>, number: u64) -> Self {
        Self { bytes: Arc::new(Mutex::new(bytes)), number }
    }

    /// A copy of all of it.
    pub fn bytes(&self) -> Vec<u8> {
        lock(&self.bytes).clone()
    }
}

impl Backing for PlainDisk {
    type Channel = PlainChannel;

    fn geometry(&self) -> BackingGeometry {
        BackingGeometry {
            size: lock(&self.bytes).len() as u64,
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
            inode: self.number,
            path: format!("/plain/disk{}", self.number),
            ..BackingIdentity::default()
        }
    }

    fn fingerprint(&self, _seed: u64) -> io::Result<u64> {
        Ok(u64::from(crc32fast::hash(&lock(&self.bytes))))
    }

    fn channel(&self, _waker: &Waker, depth: u32) -> io::Result<PlainChannel> {
        Ok(PlainChannel { bytes: self.bytes.clone(), depth: depth as usize, ops: Vec::new() })
    }
}

/// One thread's operations on a disk.
pub(super) struct PlainChannel {
    bytes: Arc<Mutex<Vec<u8>>>,
    depth: usize,
    ops: Vec<(u64, Op)>,
}

/// What an operation touches, and whether it changes it.
fn extent(op: &Op) -> (u64, u64, bool) {
    match op {
        Op::Read { offset, buf } => (*offset, buf.len() as u64, false),
        Op::Write { offset, buf } => (*offset, buf.len() as u64, true),
        Op::Zero { offset, len, .. } => (*offset, *len, true),
        Op::Flush => (0, 0, false),
    }
}

impl Channel for PlainChannel {
    fn submit(&mut self, token: u64, op: Op) -> Result<(), Op> {
        if self.ops.len() >= self.depth {
            return Err(op);
        }
        let (at, len, writes) = extent(&op);
        let size = lock(&self.bytes).len() as u64;
        let inside = at.checked_add(len).is_some_and(|end| end <= size);
        assert!(inside, "an operation past the end of the disk: {at}+{len} of {size}");
        let whole = at.is_multiple_of(512) && len.is_multiple_of(512) && (len > 0 || matches!(op, Op::Flush));
        assert!(whole, "an operation that is not of whole blocks: {at}+{len}");
        for (_, other) in &self.ops {
            let (other_at, other_len, other_writes) = extent(other);
            let apart = at + len <= other_at || other_at + other_len <= at;
            assert!(apart || !writes || !other_writes, "overlapping writes in flight: {at}+{len}");
        }
        self.ops.push((token, op));
        Ok(())
    }

    fn kick(&mut self) {}

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let mut bytes = lock(&self.bytes);
        for (token, mut op) in self.ops.drain(..) {
            match &mut op {
                Op::Read { offset, buf } => {
                    let len = buf.len();
                    buf.copy_from_slice(&bytes[*offset as usize..][..len]);
                }
                Op::Write { offset, buf } => bytes[*offset as usize..][..buf.len()].copy_from_slice(buf),
                Op::Zero { offset, len, .. } => bytes[*offset as usize..][..*len as usize].fill(0),
                Op::Flush => {}
            }
            done.push(Completion { token, op, result: Ok(()) });
        }
    }

    fn wait(&mut self, _timeout: Duration) {}

    fn in_flight(&self) -> usize {
        self.ops.len()
    }
}
