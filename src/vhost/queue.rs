//! A running ring, on a thread of its own or on one that it shares (`crew`).
//!
//! A turn of its loop: take what is available, at most [`BATCH`]; submit it; commit; poll; return
//! what is done, showing it to the driver after every [`PUBLISH_EVERY`] so that driver and server
//! overlap instead of taking turns. An idle queue polls for a while it has learned to be worth it,
//! then asks for notifications, looks once more, parks and sleeps.
//!
//! Invariants:
//! - every head taken is returned once: its slot is busy from one to the other, a head that comes
//!   again meanwhile breaks the ring;
//! - it ends only when told to, with nothing in flight; a broken ring takes no more heads but
//!   returns those it has;
//! - but a disk that returns nothing for as long as the stop allows keeps what it has: those heads
//!   stay marked in the in-flight area, where whoever runs the ring next finds and submits them again;
//! - in the steady state nothing is allocated: slots, vectors and buffers are used again;
//! - memory is refreshed after heads were seen and before they are translated (see `memory`).

use std::sync::Arc;

use super::features::Features;
use super::idle::{Idle, Polling};
use super::inflight::Tracker;
use super::memory::{GuestBuffer, HostRange, MemoryMap, SharedMemory};
use super::notify::Notifier;
use super::request::{Action, Parser};
use super::ring::{Ring, RingError};
use crate::volume::{Buffer, Disk, DiskQueue, Done, Request, RequestKind, Status};

/// Heads taken before a commit. Enough to share a fence among writes, few enough that the first of
/// a full ring need not wait for the last.
const BATCH: u16 = 16;
/// Completions after which the driver is shown what is done.
const PUBLISH_EVERY: usize = 8;

/// What a queue is made of.
pub(super) struct QueueStart<D: Disk, R: Ring> {
    pub index: u16,
    /// For thread names and log lines.
    pub name: Arc<str>,
    pub disk: Arc<D>,
    pub memory: Arc<SharedMemory>,
    pub ring: R,
    pub features: Features,
    pub call: Arc<Notifier>,
    pub error: Arc<Notifier>,
    pub inflight: Option<R::Tracker>,
    /// Chains an earlier life has taken and not returned.
    pub resubmit: Vec<u16>,
    /// How it waits for work.
    pub polling: Polling,
}

/// How a queue ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stopped {
    /// Position of the first head not returned, as GET_VRING_BASE words it.
    pub base: u32,
    /// The used position, as the ring's tracker words it.
    pub used: u32,
    /// Whether the ring could not be believed, or the disk not be opened.
    pub broken: bool,
    /// Heads taken and not returned, because the disk did not answer.
    pub left: u16,
}

/// A chain between being taken and being returned. Indexed by its head.
#[derive(Debug, Default)]
struct Slot {
    busy: bool,
    /// Operations of the disk still out.
    parts: u16,
    status: Worst,
    status_at: u64,
    written: u32,
    /// Kept for the next chain with this head while this one has none out.
    ranges: Vec<HostRange>,
}

/// The worst status of the operations a request was split into.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
enum Worst {
    #[default]
    Ok = 0,
    Unsupported = 2,
    IoError = 3,
}

impl From<Status> for Worst {
    fn from(status: Status) -> Self {
        match status {
            Status::Ok => Worst::Ok,
            Status::Unsupported => Worst::Unsupported,
            Status::IoError => Worst::IoError,
        }
    }
}

impl Worst {
    /// As the driver reads it.
    fn byte(self) -> u8 {
        (match self {
            Worst::Ok => virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK,
            Worst::IoError => virtio_bindings::virtio_blk::VIRTIO_BLK_S_IOERR,
            Worst::Unsupported => virtio_bindings::virtio_blk::VIRTIO_BLK_S_UNSUPP,
        }) as u8
    }
}

struct Worker<Q, R: Ring> {
    index: u16,
    name: Arc<str>,
    serial: [u8; 20],
    features: Features,
    queue: Q,
    ring: R,
    shared: Arc<SharedMemory>,
    generation: u64,
    /// A snapshot of this queue's own, so that its count of users is no line shared with others.
    memory: Arc<MemoryMap>,
    call: Arc<Notifier>,
    error: Arc<Notifier>,
    inflight: Option<R::Tracker>,
    resubmit: Vec<u16>,
    parser: Parser,
    slots: Vec<Slot>,
    busy: u16,
    done: Vec<Done<GuestBuffer>>,
    /// Heads put into the used ring and not yet published.
    batch: Vec<u16>,
    broken: Option<RingError>,
    idle: Idle,
}

impl<Q: DiskQueue<GuestBuffer>, R: Ring> Worker<Q, R> {
    fn new<D: Disk>(start: QueueStart<D, R>, queue: Q) -> Self {
        let generation = start.memory.generation();
        let memory = Arc::new(MemoryMap::clone(&start.memory.current()));
        Self {
            index: start.index,
            name: start.name,
            serial: start.disk.config().serial,
            features: start.features,
            queue,
            slots: (0..start.ring.size()).map(|_| Slot::default()).collect(),
            ring: start.ring,
            shared: start.memory,
            generation,
            memory,
            call: start.call,
            error: start.error,
            inflight: start.inflight,
            resubmit: start.resubmit,
            parser: Parser::default(),
            busy: 0,
            done: Vec::new(),
            batch: Vec::with_capacity(PUBLISH_EVERY),
            broken: None,
            idle: Idle::new(start.polling),
        }
    }

    /// Before the first turn: goes on where an earlier life has ended.
    fn begin(&mut self) {
        // It may have published without having notified; the driver does not mind one notification
        // too many.
        if self.ring.used() != 0 {
            self.call.notify();
        }
        self.quiet();
        self.resume();
    }

    /// After the last turn: what is pending is left to the disk.
    fn end(self) -> Stopped {
        let left = if self.queue.pending() > 0 { self.busy } else { 0 };
        let stopped = Stopped {
            base: self.ring.base(self.busy),
            used: self.ring.used(),
            broken: self.broken.is_some(),
            left,
        };
        if self.queue.pending() > 0 {
            tracing::warn!(
                disk = &*self.name,
                queue = self.index,
                requests = left,
                "stopped without an answer"
            );
            self.queue.leave_behind();
        }
        stopped
    }

    /// Takes, submits, commits, polls, returns. Whether there was anything to do.
    fn turn(&mut self, stopping: bool) -> bool {
        let mut taken = 0;
        if !stopping && self.broken.is_none() {
            taken = self.take().unwrap_or_else(|error| {
                self.break_ring(error);
                1
            });
        }
        if taken > 0 {
            self.queue.commit();
        }
        if taken > 0 || self.queue.is_busy() {
            self.queue.poll(&mut self.done);
        }
        let finished = !self.done.is_empty();
        self.finish();
        self.publish();
        taken > 0 || finished
    }

    /// Submits the chains an earlier life has left.
    fn resume(&mut self) {
        let heads = std::mem::take(&mut self.resubmit);
        if heads.is_empty() {
            return;
        }
        for head in heads {
            if let Err(error) = self.enter(head).and_then(|()| {
                if let Some(inflight) = &mut self.inflight {
                    inflight.recall(&mut self.ring, head);
                }
                self.execute(head)
            }) {
                self.break_ring(error);
                break;
            }
        }
        self.queue.commit();
    }

    /// Submits what is available, at most a batch.
    fn take(&mut self) -> Result<u16, RingError> {
        let count = self.ring.available()?.min(BATCH);
        if count > 0 {
            self.refresh_memory();
        }
        if count > 1 {
            self.ring.prefetch(count);
        }
        for taken in 0..count {
            let Some(head) = self.ring.take()? else { return Ok(taken) };
            if R::PACKED {
                // It may have come since the first one was seen.
                self.refresh_memory();
            }
            if let Err(error) = self.enter(head) {
                // The position counts heads that are ours or returned; this is neither.
                self.ring.untake();
                return Err(error);
            }
            if let Some(inflight) = &mut self.inflight {
                inflight.begin(&self.ring, head);
            }
            self.execute(head)?;
            if self.broken.is_some() {
                break;
            }
        }
        Ok(count)
    }

    fn refresh_memory(&mut self) {
        let generation = self.shared.generation();
        if generation != self.generation {
            self.memory = Arc::new(MemoryMap::clone(&self.shared.current()));
            self.generation = generation;
        }
    }

    /// Takes the slot of `head`.
    fn enter(&mut self, head: u16) -> Result<(), RingError> {
        let slot = &mut self.slots[usize::from(head)];
        if slot.busy {
            return Err(RingError::HeadInFlight { head });
        }
        slot.busy = true;
        self.busy += 1;
        Ok(())
    }

    /// Parses and submits the chain of `head`.
    fn execute(&mut self, head: u16) -> Result<(), RingError> {
        let slot = &mut self.slots[usize::from(head)];
        let mut ranges = std::mem::take(&mut slot.ranges);
        let parsed = self
            .parser
            .parse(&self.ring, &self.memory, self.features, head, &mut ranges)
            .map_err(|error| RingError::Chain { head, error })?;
        slot.status_at = parsed.status_at;
        slot.written = parsed.written;
        slot.status = Worst::Ok;
        match parsed.action {
            Action::Answer(status) => {
                slot.ranges = ranges;
                slot.status = status.into();
                self.complete(head);
            }
            Action::Submit { kind, sector } => {
                slot.parts = 1;
                self.submit(head, kind, sector, ranges);
            }
            Action::SubmitRanges => {
                slot.ranges = ranges;
                slot.parts = self.parser.ranges().len() as u16;
                for at in 0..self.parser.ranges().len() {
                    let operation = self.parser.ranges()[at];
                    self.submit(head, operation.kind, operation.sector, Vec::new());
                }
            }
            Action::Identify => {
                let mut buffer = GuestBuffer::new(Arc::clone(&self.memory), ranges);
                let len = buffer.len().min(self.serial.len());
                let written = buffer.copy_in(0, &self.serial[..len]);
                slot.status = if written.is_ok() { Worst::Ok } else { Worst::IoError };
                slot.ranges = buffer.into_ranges();
                self.complete(head);
            }
        }
        Ok(())
    }

    fn submit(&mut self, head: u16, kind: RequestKind, sector: u64, ranges: Vec<HostRange>) {
        let data = GuestBuffer::new(Arc::clone(&self.memory), ranges);
        self.queue.submit(Request { tag: u32::from(head), kind, sector, data });
    }

    /// Completes the chains whose last operation has come back.
    fn finish(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        for Done { tag, status, data } in done.drain(..) {
            let slot = &mut self.slots[tag as usize];
            assert!(slot.busy && slot.parts > 0, "the disk has returned request {tag} twice");
            slot.status = slot.status.max(status.into());
            slot.parts -= 1;
            let ranges = data.into_ranges();
            if ranges.capacity() > slot.ranges.capacity() {
                slot.ranges = ranges;
            }
            if slot.parts == 0 {
                self.complete(tag as u16);
            }
        }
        self.done = done;
    }

    /// Writes a chain's status and puts it into the used ring.
    fn complete(&mut self, head: u16) {
        if let Err(error) = self.put(head) {
            self.break_ring(error);
            return;
        }
        if self.batch.len() >= PUBLISH_EVERY {
            self.publish();
        }
    }

    fn put(&mut self, head: u16) -> Result<(), RingError> {
        if self.broken == Some(RingError::Fault) {
            return Err(RingError::Fault);
        }
        let slot = &mut self.slots[usize::from(head)];
        // A request that failed is known to have written its status only.
        let written = if slot.status == Worst::Ok { slot.written } else { 1 };
        self.memory.write(slot.status_at, &[slot.status.byte()])?;
        self.ring.put_used(head, written)?;
        slot.busy = false;
        self.busy -= 1;
        if let Some(inflight) = &mut self.inflight {
            inflight.retire(head);
        }
        self.batch.push(head);
        Ok(())
    }

    /// Shows the driver what was put, and notifies it if it wants to know.
    fn publish(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let used = self.ring.used();
        if let Some(inflight) = &mut self.inflight {
            inflight.before_publish(&self.batch, used);
        }
        let shown = self.ring.publish(&self.batch);
        if let (Ok(()), Some(inflight)) = (shown, &mut self.inflight) {
            inflight.end_batch(&self.batch, used);
        }
        self.batch.clear();
        match shown.and_then(|()| self.ring.needs_notification()) {
            Ok(true) => self.call.notify(),
            Ok(false) => {}
            Err(error) => self.break_ring(error),
        }
    }

    /// Asks for notifications: whether it may sleep.
    fn asked_for_notifications(&mut self, has_kick: bool) -> bool {
        if self.broken.is_some() || !has_kick {
            return true;
        }
        match self.ring.enable_notifications() {
            Ok(more) => {
                if more {
                    self.quiet();
                }
                !more
            }
            Err(error) => {
                self.break_ring(error);
                false
            }
        }
    }

    /// Asks not to be kicked while awake.
    fn quiet(&mut self) {
        if self.broken.is_none()
            && let Err(error) = self.ring.disable_notifications()
        {
            self.break_ring(error);
        }
    }

    /// Takes no more from the ring. Said once: a guest must not be able to fill the log.
    fn break_ring(&mut self, error: RingError) {
        if self.broken.is_none() {
            tracing::warn!(disk = &*self.name, queue = self.index, %error, "ring broken");
            self.broken = Some(error);
            self.error.notify();
        } else if error == RingError::Fault {
            // Worse than before: what is in flight cannot be returned either.
            self.broken = Some(error);
        }
    }
}

#[path = "running.rs"]
mod running;
pub(super) use running::{Place, QueueHandle, spawn};

#[cfg(feature = "sim")]
#[path = "stepper.rs"]
pub(super) mod stepper;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_of_several_statuses_wins() {
        assert_eq!(Worst::from(Status::Ok).max(Worst::Unsupported).byte(), 2);
        assert_eq!(Worst::Unsupported.max(Status::IoError.into()).byte(), 1);
        assert_eq!(Worst::default().byte(), 0);
    }
}
