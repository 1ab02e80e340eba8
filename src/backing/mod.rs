//! The slow side: the disk a cache stands in front of.
//!
//! One trait, so the engine neither knows nor cares whether it is a file, a block device or a
//! simulation. I/O is asynchronous through [`Channel`]s, one per thread that does I/O; buffers are
//! owned by the operation until it completes, so the kernel never writes into memory that is
//! somebody else's.
//!
//! [`Disk`] is the real one:
//!
//! ```text
//!  disk     opening: usage, lock, geometry, probe        channel   one thread's queue
//!  file     the descriptor, blocking and fine I/O        uring, threads   what moves the bytes
//!  identity, sample, sidecar     which disk it is, and whether it is what it was
//! ```
//!
//! Callers never have two overlapping writes or zeroings in flight on one disk, on whichever
//! channels.

mod buffer;
mod channel;
mod disk;
mod error;
mod file;
mod geometry;
mod identity;
mod lock;
mod probe;
mod sample;
mod sidecar;
#[cfg(test)]
mod tests;
mod threads;
mod uring;
mod usage;

pub use buffer::AlignedBuf;
pub use channel::DiskChannel;
pub use disk::{Direct, Disk, Engine, OpenOptions, create_allocated, create_sparse};
pub use error::{DiskChanged, OpenError};
pub use identity::Traces;

use crate::wake::Waker;

/// What the disk is like. Constant while it is open, but for a size that [`Backing::grow`] has raised.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BackingGeometry {
    /// Size in bytes, a multiple of `logical_block`.
    pub size: u64,
    /// Smallest unit of addressing in bytes, 512 or 4096: what a guest's requests must be a
    /// multiple of.
    pub logical_block: u32,
    /// Smallest unit the disk writes without reading first, in bytes; a power of two.
    pub physical_block: u32,
    /// Preferred size of large I/O in bytes, 0 if unknown.
    pub optimal_io: u32,
    /// Whether only reads can work.
    pub read_only: bool,
    /// Whether zeroed ranges can be deallocated.
    pub can_unmap: bool,
}

/// What tells one disk from another. Kept in the cache; compared at every attach.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BackingIdentity {
    /// Regular file or block device.
    pub kind: BackingKind,
    /// Size in bytes.
    pub size: u64,
    /// `st_dev` of the file system (file) or `st_rdev` of the device.
    pub device: u64,
    /// `st_ino` (file), 0 for a device.
    pub inode: u64,
    /// A hash of the name that a device has of its own (WWN, serial number), 0 if none is known.
    pub stable: u64,
    /// When a file was made, nanoseconds since 1970, 0 if unknown: inode numbers are used again.
    pub born_ns: u64,
    /// Where it was found: a hint for messages, never compared.
    pub path: String,
}

/// What kind of thing the disk is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u32)]
pub enum BackingKind {
    /// A regular file holding a raw image.
    #[default]
    File = 1,
    /// A block device.
    BlockDevice = 2,
}

/// One operation. Offsets and lengths are bytes, positive multiples of the disk's logical block and
/// within its size; what is not is a bug of the submitter, and panics.
#[derive(Debug)]
pub enum Op {
    /// Fills `buf` from `offset`.
    Read {
        /// First byte on the disk.
        offset: u64,
        /// Where to; its whole length is read.
        buf: AlignedBuf,
    },
    /// Stores `buf` at `offset`. Durable only after a later [`Op::Flush`] succeeded.
    Write {
        /// First byte on the disk.
        offset: u64,
        /// What; its whole length is written.
        buf: AlignedBuf,
    },
    /// Makes every write that completed before this was submitted durable. If it fails, nothing that
    /// completed on this channel since its last good one may be believed durable, even if a later
    /// one succeeds: write it again.
    Flush,
    /// Makes a range read as zeros.
    Zero {
        /// First byte on the disk.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Whether the space may be given back.
        unmap: bool,
    },
}

/// An operation that has ended, with its buffer.
#[derive(Debug)]
pub struct Completion {
    /// The submitter's own number for it.
    pub token: u64,
    /// What it was.
    pub op: Op,
    /// Whether all of it was done: a channel continues short transfers itself, and one that makes
    /// no progress is an error (`UnexpectedEof` or `WriteZero`).
    pub result: std::io::Result<()>,
}

/// A disk.
pub trait Backing: Send + Sync + 'static {
    /// How threads do I/O on it.
    type Channel: Channel;

    /// Size and block sizes.
    fn geometry(&self) -> BackingGeometry;

    /// What tells it from other disks.
    fn identity(&self) -> BackingIdentity;

    /// Whether what is done to one of the two makes the other wait, as far as one can tell: both lie on one
    /// device, or nobody knows.
    fn shares_device_with(&self, other: &Self) -> bool {
        self.identity().device == other.identity().device
    }

    /// A 64-bit checksum over sampled content: first and last 64 KiB and, between, blocks at places
    /// drawn from `seed` (0: those of the first version). A change that touches none of the samples
    /// is not seen. Blocking.
    ///
    /// # Errors
    /// The disk could not be read.
    fn fingerprint(&self, seed: u64) -> std::io::Result<u64>;

    /// What writing to it has left. If `durable`, a crash of the host takes nothing of that back.
    /// Blocking. A disk without traces has the default ones.
    ///
    /// # Errors
    /// The disk could not be examined or flushed.
    fn traces(&self, durable: bool) -> std::io::Result<Traces> {
        let _ = durable;
        Ok(Traces::default())
    }

    /// Whether a sidecar can stand beside it.
    fn can_have_sidecar(&self) -> bool {
        false
    }

    /// What its sidecar holds; `None` if there is none. Blocking.
    ///
    /// # Errors
    /// There is one, or something in its place, and it could not be read.
    fn read_sidecar(&self) -> std::io::Result<Option<Vec<u8>>> {
        Ok(None)
    }

    /// Makes one of the sidecar's two copies, a page each, durable. Blocking.
    ///
    /// # Errors
    /// It could not be written, or there can be none.
    fn write_sidecar(&self, copy: usize, page: &[u8]) -> std::io::Result<()> {
        let _ = (copy, page);
        Err(std::io::ErrorKind::Unsupported.into())
    }

    /// Removes the sidecar, durably. Blocking.
    ///
    /// # Errors
    /// It could not be removed.
    fn remove_sidecar(&self) -> std::io::Result<()> {
        Ok(())
    }

    /// Bytes that are there now: what [`Backing::grow`] would find. Blocking.
    ///
    /// # Errors
    /// The disk could not be asked.
    fn measure(&self) -> std::io::Result<u64> {
        Ok(self.geometry().size)
    }

    /// Makes the disk `size` bytes large: gives a regular file that is shorter so many zeros more, and
    /// takes note of what else has grown. From then on operations up to there are allowed, also on
    /// channels that are open. Durable on return. Blocking.
    ///
    /// # Errors
    /// The disk has not this size and cannot be given it; its size counts as before.
    fn grow(&self, size: u64) -> std::io::Result<()> {
        let _ = size;
        Err(std::io::ErrorKind::Unsupported.into())
    }

    /// Opens a way to do I/O for one thread. Completions signal `waker`.
    ///
    /// # Errors
    /// The kernel refused the resources.
    fn channel(&self, waker: &Waker, depth: u32) -> std::io::Result<Self::Channel>;
}

/// One thread's queue of operations on a disk. Every accepted operation completes exactly once,
/// through [`Channel::reap`], in any order. Dropping a channel waits for what is in flight.
pub trait Channel: Send + 'static {
    /// Accepts `op`, or gives it back when as many are in flight as the channel was opened for.
    ///
    /// # Errors
    /// The operation itself, unchanged: reap, then try again.
    fn submit(&mut self, token: u64, op: Op) -> Result<(), Op>;

    /// Hands accepted operations to the kernel. Call after a batch of submissions.
    fn kick(&mut self);

    /// Appends what has completed to `done`; never blocks.
    fn reap(&mut self, done: &mut Vec<Completion>);

    /// Kicks, then blocks until an operation has completed or `timeout` has passed; returns at once
    /// when nothing is in flight, and sometimes early. Only workers call it.
    fn wait(&mut self, timeout: std::time::Duration);

    /// Operations accepted and not yet reaped.
    fn in_flight(&self) -> usize;
}
