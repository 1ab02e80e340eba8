//! The in-flight area (vhost-user spec, "Inflight I/O tracking"): which chains a queue has taken
//! and not yet returned, kept in memory that the VMM holds while we are dead.
//!
//! ```text
//! per queue, 64-aligned:  features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16
//!                         desc_num × { inflight u8, pad 5, next u16, counter u64 }
//! after the queues:       magic u64, write-back u8, pad to 64     (ours; the VMM just keeps it)
//! ```
//!
//! The trailer remembers what the driver last chose for the write-back byte. A VMM does not repeat
//! it after a reconnection, and a driver that believes it runs without a volatile cache never
//! flushes.
//!
//! Of a packed ring the queues' parts look otherwise (`inflight_packed`); an area is for one layout.
//!
//! Order of a chain's life, each step a store the next one must not overtake, because the process
//! may die between any two:
//! 1. [`Tracker::begin`]: counter, then the mark;
//! 2. [`Tracker::retire`]: link into the batch, then `last_batch_head`;
//! 3. the used index in the ring moves (not here);
//! 4. [`Tracker::end_batch`]: the marks of the batch go, then `used_idx`.
//!
//! A used index that differs from `used_idx` means death between 3 and 4, and its batch is
//! finished at the next start. The content is not trusted: links and counts are bounded, and an area
//! that contradicts its ring is discarded. Accesses are plain because the file behind it must be
//! sealed against shrinking, as every memfd made for this purpose is.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use vhost::vhost_user::message::VhostUserInflight;

use super::copy::{self, Fault};
use super::fds;
use super::inflight_packed::{self, PackedTracker};
use super::memory::{Mapping, MemoryError};
use super::split::SplitRing;

const ALIGN: u64 = 64;
const HEADER_LEN: usize = 16;
const ENTRY_LEN: usize = 16;
const TRAILER_LEN: u64 = 64;
const VERSION: u16 = 1;
/// "pcvh-wce", little endian.
const TRAILER_MAGIC: u64 = u64::from_le_bytes(*b"pcvh-wce");

const VERSION_AT: usize = 8;
const COUNT_AT: usize = 10;
const BATCH_HEAD_AT: usize = 12;
const USED_INDEX_AT: usize = 14;

const MARK_AT: usize = 0;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;

/// Why an area was refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum InflightError {
    #[error("an in-flight area for {queues} queues of {size}")]
    Shape { queues: u16, size: u16 },
    #[error("an in-flight area of {len} bytes at {offset}, {needed} aligned ones are needed")]
    Size { len: u64, offset: u64, needed: u64 },
    #[error("the in-flight area can be made shorter behind our back")]
    Unsealed,
    #[error("mapping the in-flight area failed: {0}")]
    Map(#[from] MemoryError),
    #[error("making the in-flight area failed: {0}")]
    Create(#[from] io::Error),
}

/// The area of all queues.
#[derive(Debug)]
pub(super) struct InflightArea {
    mapping: Arc<Mapping>,
    shape: Shape,
    /// What it was opened from: whoever serves this VM after us opens it anew.
    source: File,
    offset: u64,
}

/// What an area is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shape {
    /// Queues.
    pub queues: u16,
    /// Most descriptors of one.
    pub queue_size: u16,
    /// Whether their rings are packed.
    pub packed: bool,
}

impl Shape {
    /// Bytes for one queue.
    fn stride(self) -> u64 {
        let (header, entry) = match self.packed {
            true => (inflight_packed::HEADER_LEN, inflight_packed::ENTRY_LEN),
            false => (HEADER_LEN, ENTRY_LEN),
        };
        (header as u64 + u64::from(self.queue_size) * entry as u64).next_multiple_of(ALIGN)
    }

    /// Bytes for all queues.
    fn len(self) -> u64 {
        u64::from(self.queues) * self.stride()
    }
}

impl InflightArea {
    /// Makes a new area, all zeros: what GET_INFLIGHT_FD answers.
    ///
    /// # Errors
    /// [`InflightError::Create`].
    pub fn create(shape: Shape, writeback: bool) -> Result<(Self, File, VhostUserInflight), InflightError> {
        let len = shape.len() + TRAILER_LEN;
        let file = fds::sealed_memory_file(len)?;
        let mapping = Arc::new(Mapping::new(&file, 0, len)?);
        let area = Self { mapping, shape, source: file.try_clone()?, offset: 0 };
        area.set_writeback(writeback);
        Ok((area, file, VhostUserInflight::new(len, 0, shape.queues, shape.queue_size)))
    }

    /// Takes an area the VMM has kept: SET_INFLIGHT_FD. `packed` says for what layout.
    ///
    /// # Errors
    /// It is too small, misplaced, or of a kind that could vanish.
    pub fn open(fd: OwnedFd, message: &VhostUserInflight, packed: bool) -> Result<Self, InflightError> {
        let shape = Shape { queues: message.num_queues, queue_size: message.queue_size, packed };
        if shape.queues == 0 || shape.queue_size == 0 {
            return Err(InflightError::Shape { queues: shape.queues, size: shape.queue_size });
        }
        let (len, offset) = (message.mmap_size, message.mmap_offset);
        let needed = shape.len();
        if len < needed || offset % ALIGN != 0 {
            return Err(InflightError::Size { len, offset, needed });
        }
        let file = File::from(fd);
        if !fds::seal_length(&file) {
            return Err(InflightError::Unsealed);
        }
        // No more than is used, whatever the VMM claims.
        let mapping = Arc::new(Mapping::new(&file, offset, len.min(needed + TRAILER_LEN))?);
        Ok(Self { mapping, shape, source: file, offset })
    }

    /// The body and the descriptor of a SET_INFLIGHT_FD that gives this area to somebody else.
    pub fn source(&self) -> (VhostUserInflight, &File) {
        let Shape { queues, queue_size, .. } = self.shape;
        (VhostUserInflight::new(self.mapping.len() as u64, self.offset, queues, queue_size), &self.source)
    }

    /// The part of queue `index`, for a ring of `ring_size` in the area's layout; `None` when there
    /// is none or it is too small.
    pub(super) fn part(&self, index: u16, ring_size: u16, packed: bool) -> Option<Part> {
        let shape = self.shape;
        if index >= shape.queues || ring_size > shape.queue_size || packed != shape.packed {
            return None;
        }
        let start = (u64::from(index) * shape.stride()) as usize;
        Some(Part { mapping: Arc::clone(&self.mapping), start, entries: ring_size })
    }

    /// Forgets what queue `index`, a ring of `ring_size`, had in flight: the ring has stopped in
    /// good order where its tracker calls it `used`.
    pub fn clear(&self, index: u16, ring_size: u16, used: u32) {
        if self.shape.packed {
            if let Some(mut tracker) = PackedTracker::attach(self, index, ring_size) {
                tracker.release();
            }
        } else if let Some(mut tracker) = SplitTracker::attach(self, index, ring_size) {
            tracker.clear(used as u16);
        }
    }

    /// What [`InflightArea::set_writeback`] was last told, by this process or an earlier one.
    pub fn writeback(&self) -> Option<bool> {
        let trailer = self.trailer()?;
        let magic = long(&self.mapping, trailer).load(Ordering::Acquire);
        (magic == TRAILER_MAGIC).then(|| byte(&self.mapping, trailer + 8).load(Ordering::Acquire) != 0)
    }

    /// Remembers the driver's choice for whoever serves this VM next.
    pub fn set_writeback(&self, on: bool) {
        if let Some(trailer) = self.trailer() {
            byte(&self.mapping, trailer + 8).store(u8::from(on), Ordering::Release);
            long(&self.mapping, trailer).store(TRAILER_MAGIC, Ordering::Release);
        }
    }

    /// Where the trailer is; an area made by another back end has none.
    fn trailer(&self) -> Option<usize> {
        let at = self.shape.len();
        (self.mapping.len() as u64 >= at + TRAILER_LEN).then_some(at as usize)
    }
}

/// One queue's part of the area.
#[derive(Clone, Debug)]
pub(super) struct Part {
    mapping: Arc<Mapping>,
    /// Where it begins.
    start: usize,
    /// Chains, or descriptors, it has room for.
    pub entries: u16,
}

impl Part {
    /// The byte at `at`.
    pub fn byte(&self, at: usize) -> &AtomicU8 {
        copy::step();
        byte(&self.mapping, self.start + at)
    }

    /// The 16-bit number at `at`.
    pub fn half(&self, at: usize) -> &AtomicU16 {
        copy::step();
        half(&self.mapping, self.start + at)
    }

    /// The 32-bit number at `at`.
    pub fn word(&self, at: usize) -> &AtomicU32 {
        copy::step();
        word(&self.mapping, self.start + at)
    }

    /// The 64-bit number at `at`.
    pub fn long(&self, at: usize) -> &AtomicU64 {
        copy::step();
        long(&self.mapping, self.start + at)
    }
}

/// A ring's books about the chains it has in flight, kept where they outlive the process.
///
/// The calls come in the order of a chain's life; the process may die between any two, and inside
/// each of them.
pub(super) trait Tracker<R>: Sized + Send + std::fmt::Debug + 'static {
    /// The books of queue `index`, a ring of `size`; `None` when the area has no room for them.
    fn attach(area: &InflightArea, index: u16, size: u16) -> Option<Self>;

    /// Finishes what an earlier life may have died in, puts the ring where it stood and says what
    /// it has to execute again.
    ///
    /// # Errors
    /// The ring's memory is gone.
    fn recover(&mut self, ring: &mut R) -> Result<Recovery, Fault>;

    /// The chain of `head`, which `ring` has just taken, is about to be executed.
    fn begin(&mut self, ring: &R, head: u16);

    /// The chain of `head`, which recovery has found, is about to be executed again.
    fn recall(&mut self, ring: &mut R, head: u16);

    /// A chain was put into the ring, which the driver has not been shown.
    fn retire(&mut self, head: u16);

    /// The driver is about to be shown `heads`, after which the ring's used position is `used`.
    fn before_publish(&mut self, heads: &[u16], used: u32);

    /// The driver has been shown them.
    fn end_batch(&mut self, heads: &[u16], used: u32);
}

/// What was found at the start of a queue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Recovery {
    /// The area was never used: the VMM's ring base counts.
    Fresh,
    /// The area was in use. The ring goes on behind these chains, which are executed again in the
    /// order in which they were taken.
    Resumed {
        /// Their heads.
        heads: Vec<u16>,
    },
    /// The area contradicts itself or the ring and was cleared.
    Discarded,
}

/// The part of the area that belongs to one queue. Only its queue's thread touches it while the
/// queue runs.
#[derive(Debug)]
pub(super) struct SplitTracker {
    part: Part,
    /// The next value of the counter that orders chains.
    counter: u64,
}

impl Tracker<SplitRing> for SplitTracker {
    fn attach(area: &InflightArea, index: u16, size: u16) -> Option<Self> {
        Some(Self { part: area.part(index, size, false)?, counter: 0 })
    }

    fn recover(&mut self, ring: &mut SplitRing) -> Result<Recovery, Fault> {
        let used = ring.next_used();
        let available = ring.available_index().map_err(|_| Fault)?;
        let recovery = self.find(used, available);
        match &recovery {
            // Nothing was ever tracked here: the VMM knows the position.
            Recovery::Fresh => {}
            // The VMM may not: Cloud Hypervisor says the available index.
            Recovery::Resumed { heads } => ring.set_next_avail(used.wrapping_add(heads.len() as u16)),
            Recovery::Discarded => ring.set_next_avail(used),
        }
        Ok(recovery)
    }

    #[inline]
    fn begin(&mut self, _ring: &SplitRing, head: u16) {
        self.enter(head);
    }

    fn recall(&mut self, _ring: &mut SplitRing, head: u16) {
        self.enter(head);
    }

    #[inline]
    fn retire(&mut self, head: u16) {
        let batch = self.part.half(BATCH_HEAD_AT);
        self.link(head).store(batch.load(Ordering::Relaxed), Ordering::Release);
        batch.store(head, Ordering::Release);
    }

    #[inline]
    fn before_publish(&mut self, _heads: &[u16], _used: u32) {}

    #[inline]
    fn end_batch(&mut self, heads: &[u16], used: u32) {
        for &head in heads {
            self.mark(head).store(0, Ordering::Release);
        }
        self.part.half(USED_INDEX_AT).store(used as u16, Ordering::Release);
    }
}

impl SplitTracker {
    /// Finishes the batch an earlier life may have died in and says what it left, for a ring whose
    /// indices are `used` and `available`.
    fn find(&mut self, used: u16, available: u16) -> Recovery {
        let version = self.part.half(VERSION_AT);
        let count = self.part.half(COUNT_AT);
        if version.load(Ordering::Acquire) != VERSION || count.load(Ordering::Acquire) != self.part.entries {
            let fresh = version.load(Ordering::Acquire) == 0;
            self.clear(used);
            return if fresh { Recovery::Fresh } else { Recovery::Discarded };
        }
        self.finish_batch(used);
        let mut marked: Vec<(u64, u16)> = (0..self.part.entries)
            .filter(|&head| self.mark(head).load(Ordering::Acquire) != 0)
            .map(|head| (self.entry_counter(head).load(Ordering::Acquire), head))
            .collect();
        marked.sort_unstable();
        // Every chain in flight was made available after the used index stood where it stands.
        if marked.len() > usize::from(available.wrapping_sub(used)) {
            self.clear(used);
            return Recovery::Discarded;
        }
        self.counter = marked.last().map_or(0, |&(counter, _)| counter.wrapping_add(1));
        Recovery::Resumed { heads: marked.into_iter().map(|(_, head)| head).collect() }
    }

    /// Marks a chain, the newest of all.
    #[inline]
    fn enter(&mut self, head: u16) {
        self.entry_counter(head).store(self.counter, Ordering::Release);
        self.mark(head).store(1, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
    }

    /// Forgets everything: the ring has stopped in good order at the used index `used`.
    pub fn clear(&mut self, used: u16) {
        for head in 0..self.part.entries {
            self.mark(head).store(0, Ordering::Release);
        }
        self.counter = 0;
        self.part.half(BATCH_HEAD_AT).store(0, Ordering::Release);
        self.part.half(USED_INDEX_AT).store(used, Ordering::Release);
        self.part.half(COUNT_AT).store(self.part.entries, Ordering::Release);
        self.part.half(VERSION_AT).store(VERSION, Ordering::Release);
    }

    /// Removes the marks of a batch that was shown but not ended.
    fn finish_batch(&mut self, used: u16) {
        let recorded = self.part.half(USED_INDEX_AT);
        let batch = used.wrapping_sub(recorded.load(Ordering::Acquire));
        let mut head = self.part.half(BATCH_HEAD_AT).load(Ordering::Acquire);
        for _ in 0..batch.min(self.part.entries) {
            if head >= self.part.entries {
                break;
            }
            self.mark(head).store(0, Ordering::Release);
            head = self.link(head).load(Ordering::Acquire);
        }
        recorded.store(used, Ordering::Release);
    }

    fn entry(&self, head: u16) -> usize {
        assert!(head < self.part.entries, "descriptor {head} of {}", self.part.entries);
        HEADER_LEN + usize::from(head) * ENTRY_LEN
    }

    fn mark(&self, head: u16) -> &AtomicU8 {
        self.part.byte(self.entry(head) + MARK_AT)
    }

    fn link(&self, head: u16) -> &AtomicU16 {
        self.part.half(self.entry(head) + NEXT_AT)
    }

    fn entry_counter(&self, head: u16) -> &AtomicU64 {
        self.part.long(self.entry(head) + COUNTER_AT)
    }
}

/// Where `T` lies at `at`, checked.
fn place<T>(mapping: &Mapping, at: usize) -> *mut T {
    assert!(at + size_of::<T>() <= mapping.len(), "{at} of {}", mapping.len());
    let place = mapping.start().wrapping_add(at).cast::<T>();
    assert!(place.is_aligned());
    place
}

#[expect(unsafe_code, reason = "shared memory as atomics")]
fn byte(mapping: &Mapping, at: usize) -> &AtomicU8 {
    // SAFETY: checked to lie in the mapping, which the result borrows and whose file cannot shrink;
    // everyone on our side uses atomics.
    unsafe { AtomicU8::from_ptr(place(mapping, at)) }
}

#[expect(unsafe_code, reason = "shared memory as atomics")]
fn half(mapping: &Mapping, at: usize) -> &AtomicU16 {
    // SAFETY: as in `byte`, and checked to be aligned.
    unsafe { AtomicU16::from_ptr(place(mapping, at)) }
}

#[expect(unsafe_code, reason = "shared memory as atomics")]
fn word(mapping: &Mapping, at: usize) -> &AtomicU32 {
    // SAFETY: as in `byte`, and checked to be aligned.
    unsafe { AtomicU32::from_ptr(place(mapping, at)) }
}

#[expect(unsafe_code, reason = "shared memory as atomics")]
fn long(mapping: &Mapping, at: usize) -> &AtomicU64 {
    // SAFETY: as in `byte`, and checked to be aligned.
    unsafe { AtomicU64::from_ptr(place(mapping, at)) }
}

#[cfg(test)]
#[path = "inflight_tests.rs"]
mod tests;
