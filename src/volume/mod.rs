//! The disk a guest sees: what the front end asks of a volume.
//!
//! The front end translates rings into [`Request`]s and completions back into used descriptors; it
//! knows nothing of caches. A [`Disk`] makes one [`DiskQueue`] per virtqueue, owned by that queue's
//! thread, so no two queues share anything on the way to the engine.
//!
//! Contract of a queue, in the order of one turn of its loop:
//! 1. `submit` every request at hand; reads that hit may complete at once, writes are gathered.
//! 2. `commit` makes the gathered writes durable (or stable, see `pmem`) and visible, together.
//! 3. `poll` hands out what has completed; each submitted request comes back exactly once.
//! 4. before sleeping, `park`; the queue's [`Waker`](crate::wake::Waker) is signalled whenever
//!    `poll` could return more.

use crate::pmem::guard::{ForeignSlice, ForeignSliceMut};

/// The guest's memory was not there when it was touched: its owner truncated it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("guest memory could not be accessed")]
pub struct GuestFault;

/// The data of a request: scattered guest memory seen as one run of bytes.
///
/// The guest may change it at any moment, so every byte is copied at most once per use.
pub trait Buffer: Send + 'static {
    /// Total length in bytes.
    fn len(&self) -> usize;

    /// Whether there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies bytes `at..at + dst.len()` of the buffer into `dst`. Panics past the end.
    ///
    /// # Errors
    /// [`GuestFault`]: part of it is not there; `dst` is unspecified.
    fn copy_out(&self, at: usize, dst: &mut [u8]) -> Result<(), GuestFault>;

    /// Copies `src` to bytes `at..` of the buffer. Panics past the end.
    ///
    /// # Errors
    /// [`GuestFault`]: part of it is not there.
    fn copy_in(&mut self, at: usize, src: &[u8]) -> Result<(), GuestFault>;

    /// Lends bytes `at..at + len` to `f` for one copy out of them, if they lie in one piece: what copies
    /// and checksums them at once then needs no copy in between. `None`, and `f` is not called, where
    /// they do not, or are known to be gone.
    fn lend<R>(&self, at: usize, len: usize, f: impl FnOnce(ForeignSlice<'_>) -> R) -> Option<R>
    where
        Self: Sized,
    {
        let _ = (at, len, f);
        None
    }

    /// The same for one copy into them.
    fn lend_mut<R>(&mut self, at: usize, len: usize, f: impl FnOnce(ForeignSliceMut<'_>) -> R) -> Option<R>
    where
        Self: Sized,
    {
        let _ = (at, len, f);
        None
    }
}

/// What a guest asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RequestKind {
    /// Fill the buffer from the disk.
    Read,
    /// Store the buffer on the disk.
    Write,
    /// Make every write completed before this was submitted durable.
    Flush,
    /// Make `sectors` sectors read as zeros; the data is no longer needed.
    Discard {
        /// How many.
        sectors: u64,
    },
    /// Make `sectors` sectors read as zeros.
    WriteZeroes {
        /// How many.
        sectors: u64,
        /// Whether the space may be deallocated.
        unmap: bool,
    },
}

/// One request. The range has been checked by nobody: `submit` does.
#[derive(Debug)]
pub struct Request<B> {
    /// The submitter's own number, returned with the completion.
    pub tag: u32,
    /// What to do.
    pub kind: RequestKind,
    /// First sector (512 bytes, whatever the block size).
    pub sector: u64,
    /// The data; empty for kinds without any. For reads and writes its length gives the sectors.
    pub data: B,
}

/// How a request ended: a virtio-blk status (virtio 1.3 §5.2.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// Done.
    Ok,
    /// Failed, was out of range, misaligned, or wrote to a read-only disk.
    IoError,
    /// Not a thing this disk does.
    Unsupported,
}

/// A completed request.
#[derive(Debug)]
pub struct Done<B> {
    /// The request's tag.
    pub tag: u32,
    /// How it ended.
    pub status: Status,
    /// Its buffer; for a successful read, filled.
    pub data: B,
}

/// What the guest's configuration space says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskConfig {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Logical block size in bytes: requests are multiples of it.
    pub block_size: u32,
    /// Physical block size in bytes.
    pub physical_block_size: u32,
    /// Preferred size of large I/O in bytes, 0 if unknown.
    pub optimal_io_size: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What GET_ID answers, NUL-padded.
    pub serial: [u8; 20],
    /// Virtqueues offered.
    pub queues: u16,
    /// Largest ring accepted, a power of two.
    pub queue_size: u16,
}

/// A disk that can be served. Shared by its queues and the front end's control thread.
pub trait Disk: Send + Sync + 'static {
    /// What its queues are.
    type Queue<B: Buffer>: DiskQueue<B>;

    /// What to tell the guest.
    fn config(&self) -> DiskConfig;

    /// Whether completed writes may still need a FLUSH to be durable (`wce`, virtio 1.3 §5.2.5).
    fn write_cache(&self) -> bool;

    /// Turns the volatile write cache on or off; requests submitted later obey.
    fn set_write_cache(&self, on: bool);

    /// Opens queue `index` (below `config().queues`) for the calling thread.
    ///
    /// # Errors
    /// The kernel refused a resource; the front end leaves the ring stopped.
    fn open_queue<B: Buffer>(&self, index: u16, waker: crate::wake::Waker)
    -> std::io::Result<Self::Queue<B>>;
}

/// One thread's way into a disk. See the module's head for the order of calls.
pub trait DiskQueue<B: Buffer>: Send {
    /// Takes a request. It comes back through `poll`, exactly once, whatever happens.
    fn submit(&mut self, request: Request<B>);

    /// Ends a batch: gathered writes are made durable and visible, misses go to the disk.
    fn commit(&mut self);

    /// Moves completed requests to `done`, and makes progress with those that wait.
    fn poll(&mut self, done: &mut Vec<Done<B>>);

    /// Requests submitted and not yet handed out by `poll`.
    fn pending(&self) -> usize;

    /// Whether `poll` may find something to do, also where no request waits for it.
    fn is_busy(&self) -> bool {
        self.pending() > 0
    }

    /// In how long `poll` will have something to do because of the time alone: the thread sleeps no longer.
    fn due_in(&self) -> Option<std::time::Duration> {
        None
    }

    /// The queue is to stop: what is held back on purpose goes on at once.
    fn hasten(&mut self) {}

    /// Says that the thread is about to sleep and holds nothing.
    fn park(&mut self);

    /// Ends requests that wait for a failing disk to work again, with an error: the queue is to stop,
    /// and nobody would submit them again.
    fn give_up(&mut self) {}

    /// Ends the queue without waiting for a disk that does not answer. Requests not yet handed out
    /// never will be; each has taken effect, or will, or never will, and whoever submits one again
    /// on another queue of this disk finds that in order. Their buffers are not touched any more.
    fn leave_behind(self)
    where
        Self: Sized;
}
