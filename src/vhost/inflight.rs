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
//! Order of a chain's life, each step a store the next one must not overtake, because the process
//! may die between any two:
//! 1. [`InflightQueue::begin`]: counter, then the mark;
//! 2. [`InflightQueue::retire`]: link into the batch, then `last_batch_head`;
//! 3. the used index in the ring moves (not here);
//! 4. [`InflightQueue::end_batch`]: the marks of the batch go, then `used_idx`.
//!
//! A used index that differs from `used_idx` means death between 3 and 4, and its batch is
//! finished at the next start. The content is not trusted: links and counts are bounded, and an area
//! that contradicts its ring is discarded. Accesses are plain because the file behind it must be
//! sealed against shrinking, as every memfd made for this purpose is.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use vhost::vhost_user::message::VhostUserInflight;

use super::fds;
use super::memory::{Mapping, MemoryError};

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
    queues: u16,
    queue_size: u16,
}

/// Bytes for one queue of `size` descriptors.
fn stride(size: u16) -> u64 {
    (HEADER_LEN as u64 + u64::from(size) * ENTRY_LEN as u64).next_multiple_of(ALIGN)
}

impl InflightArea {
    /// Makes a new area, all zeros: what GET_INFLIGHT_FD answers.
    ///
    /// # Errors
    /// [`InflightError::Create`].
    pub fn create(
        queues: u16,
        queue_size: u16,
        writeback: bool,
    ) -> Result<(Self, File, VhostUserInflight), InflightError> {
        let len = u64::from(queues) * stride(queue_size) + TRAILER_LEN;
        let file = fds::sealed_memory_file(len)?;
        let mapping = Arc::new(Mapping::new(&file, 0, len)?);
        let area = Self { mapping, queues, queue_size };
        area.set_writeback(writeback);
        Ok((area, file, VhostUserInflight::new(len, 0, queues, queue_size)))
    }

    /// Takes an area the VMM has kept: SET_INFLIGHT_FD.
    ///
    /// # Errors
    /// It is too small, misplaced, or of a kind that could vanish.
    pub fn open(fd: OwnedFd, shape: &VhostUserInflight) -> Result<Self, InflightError> {
        let (queues, queue_size) = (shape.num_queues, shape.queue_size);
        if queues == 0 || queue_size == 0 {
            return Err(InflightError::Shape { queues, size: queue_size });
        }
        let (len, offset) = (shape.mmap_size, shape.mmap_offset);
        let needed = u64::from(queues) * stride(queue_size);
        if len < needed || offset % ALIGN != 0 {
            return Err(InflightError::Size { len, offset, needed });
        }
        let file = File::from(fd);
        if !fds::seal_length(&file) {
            return Err(InflightError::Unsealed);
        }
        // No more than is used, whatever the VMM claims.
        let mapping = Arc::new(Mapping::new(&file, offset, len.min(needed + TRAILER_LEN))?);
        Ok(Self { mapping, queues, queue_size })
    }

    /// The part of queue `index`, for a ring of `ring_size`; `None` when there is none or it is too
    /// small.
    pub fn queue(&self, index: u16, ring_size: u16) -> Option<InflightQueue> {
        if index >= self.queues || ring_size > self.queue_size {
            return None;
        }
        let skip = u64::from(index) * stride(self.queue_size);
        Some(InflightQueue {
            mapping: Arc::clone(&self.mapping),
            start: skip as usize,
            entries: ring_size,
            counter: 0,
        })
    }

    /// What [`InflightArea::set_writeback`] was last told, by this process or an earlier one.
    pub fn writeback(&self) -> Option<bool> {
        let trailer = self.trailer()?;
        let magic = word(&self.mapping, trailer).load(Ordering::Acquire);
        (magic == TRAILER_MAGIC).then(|| byte(&self.mapping, trailer + 8).load(Ordering::Acquire) != 0)
    }

    /// Remembers the driver's choice for whoever serves this VM next.
    pub fn set_writeback(&self, on: bool) {
        if let Some(trailer) = self.trailer() {
            byte(&self.mapping, trailer + 8).store(u8::from(on), Ordering::Release);
            word(&self.mapping, trailer).store(TRAILER_MAGIC, Ordering::Release);
        }
    }

    /// Where the trailer is; an area made by another back end has none.
    fn trailer(&self) -> Option<usize> {
        let at = u64::from(self.queues) * stride(self.queue_size);
        (self.mapping.len() as u64 >= at + TRAILER_LEN).then_some(at as usize)
    }
}

/// What was found at the start of a queue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Recovery {
    /// The area was never used: the VMM's ring base counts.
    Fresh,
    /// The area was in use. The ring goes on `heads.len()` positions after its used index, and
    /// these chains, in the order in which they were taken, are executed again.
    Resumed {
        /// First descriptors.
        heads: Vec<u16>,
    },
    /// The area contradicts the ring and was cleared; the ring goes on at its used index.
    Discarded,
}

/// The part of the area that belongs to one queue. Only its queue's thread touches it while the
/// queue runs.
#[derive(Debug)]
pub(super) struct InflightQueue {
    mapping: Arc<Mapping>,
    /// Where this queue's part begins.
    start: usize,
    entries: u16,
    /// The next value of the counter that orders chains.
    counter: u64,
}

impl InflightQueue {
    /// Finishes the batch an earlier life may have died in and says what it left, for a ring whose
    /// indices are `used` and `available`.
    pub fn recover(&mut self, used: u16, available: u16) -> Recovery {
        let version = self.header(VERSION_AT);
        let count = self.header(COUNT_AT);
        if version.load(Ordering::Acquire) != VERSION || count.load(Ordering::Acquire) != self.entries {
            let fresh = version.load(Ordering::Acquire) == 0;
            self.clear(used);
            return if fresh { Recovery::Fresh } else { Recovery::Discarded };
        }
        self.finish_batch(used);
        let mut marked: Vec<(u64, u16)> = (0..self.entries)
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

    /// A chain is about to be executed.
    pub fn begin(&mut self, head: u16) {
        self.entry_counter(head).store(self.counter, Ordering::Release);
        self.mark(head).store(1, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
    }

    /// A chain is about to be shown to the driver as used.
    pub fn retire(&mut self, head: u16) {
        let batch = self.header(BATCH_HEAD_AT);
        self.link(head).store(batch.load(Ordering::Relaxed), Ordering::Release);
        batch.store(head, Ordering::Release);
    }

    /// The driver has been shown `heads`, and the used index is now `used`.
    pub fn end_batch(&mut self, heads: &[u16], used: u16) {
        for &head in heads {
            self.mark(head).store(0, Ordering::Release);
        }
        self.header(USED_INDEX_AT).store(used, Ordering::Release);
    }

    /// Forgets everything: the ring has stopped in good order at the used index `used`.
    pub fn clear(&mut self, used: u16) {
        for head in 0..self.entries {
            self.mark(head).store(0, Ordering::Release);
        }
        self.counter = 0;
        self.header(BATCH_HEAD_AT).store(0, Ordering::Release);
        self.header(USED_INDEX_AT).store(used, Ordering::Release);
        self.header(COUNT_AT).store(self.entries, Ordering::Release);
        self.header(VERSION_AT).store(VERSION, Ordering::Release);
    }

    /// Removes the marks of a batch that was shown but not ended.
    fn finish_batch(&mut self, used: u16) {
        let recorded = self.header(USED_INDEX_AT);
        let batch = used.wrapping_sub(recorded.load(Ordering::Acquire));
        let mut head = self.header(BATCH_HEAD_AT).load(Ordering::Acquire);
        for _ in 0..batch.min(self.entries) {
            if head >= self.entries {
                break;
            }
            self.mark(head).store(0, Ordering::Release);
            head = self.link(head).load(Ordering::Acquire);
        }
        recorded.store(used, Ordering::Release);
    }

    fn header(&self, at: usize) -> &AtomicU16 {
        half(&self.mapping, self.start + at)
    }

    fn entry(&self, head: u16) -> usize {
        assert!(head < self.entries, "descriptor {head} of {}", self.entries);
        self.start + HEADER_LEN + usize::from(head) * ENTRY_LEN
    }

    fn mark(&self, head: u16) -> &AtomicU8 {
        byte(&self.mapping, self.entry(head) + MARK_AT)
    }

    fn link(&self, head: u16) -> &AtomicU16 {
        half(&self.mapping, self.entry(head) + NEXT_AT)
    }

    fn entry_counter(&self, head: u16) -> &AtomicU64 {
        word(&self.mapping, self.entry(head) + COUNTER_AT)
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
fn word(mapping: &Mapping, at: usize) -> &AtomicU64 {
    // SAFETY: as in `byte`, and checked to be aligned.
    unsafe { AtomicU64::from_ptr(place(mapping, at)) }
}

#[cfg(test)]
#[path = "inflight_tests.rs"]
mod tests;
