//! A queue on its thread: starting it, waking it, stopping it.
//!
//! Invariants:
//! - a queue that sleeps has asked for notifications and looked once more since, or has no kick, and then
//!   it naps;
//! - it ends only when told to, and when it is told of its end its place in the disk is free again.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::super::crew::{self, Boarding, Crew, End, Look, Passenger, Seat};
use super::super::memory::GuestBuffer;
use super::super::ring::Ring;
use super::{QueueStart, Stopped, Worker};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::volume::{Disk, DiskQueue};
use crate::wake::Waker;

/// Whether a queue is to stop, and how long it waits for a disk that returns nothing.
#[derive(Debug)]
struct StopRequest(AtomicU64);

impl StopRequest {
    const RUN: u64 = u64::MAX;
    const FOR_EVER: u64 = u64::MAX - 1;

    fn set(&self, patience: Option<Duration>) {
        let ms = patience.map_or(Self::FOR_EVER, |patience| patience.as_millis() as u64);
        self.0.store(ms, Ordering::Release);
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire) != Self::RUN
    }

    /// `None` while nobody has asked, and where no wait is too long.
    fn patience(&self) -> Option<Duration> {
        let ms = self.0.load(Ordering::Acquire);
        (ms < Self::FOR_EVER).then(|| Duration::from_millis(ms))
    }
}

/// A running queue. Dropping it leaves the queue alone: stop and join it.
#[derive(Debug)]
pub(in super::super) struct QueueHandle {
    end: End,
    stop: Arc<StopRequest>,
    waker: Waker,
    /// What to answer if the thread panicked.
    started_at: Stopped,
}

impl QueueHandle {
    /// Asks the queue to finish what is in flight and end; with a patience, to leave what is in
    /// flight once nothing of it has come back for that long.
    pub fn request_stop(&self, patience: Option<Duration>) {
        self.stop.set(patience);
        self.waker.wake();
    }

    /// Waits for that.
    pub fn join(self) -> Stopped {
        self.end.wait().unwrap_or_else(|| {
            tracing::error!("a queue thread has panicked; its ring stays stopped");
            self.started_at
        })
    }
}

/// Where a queue runs.
#[derive(Clone, Copy, Debug, Default)]
pub(in super::super) struct Place<'a> {
    /// The threads that serve several; without, it gets one of its own.
    pub crew: Option<&'a Crew>,
    /// The processors of threads of their own.
    pub cpus: &'a [u16],
}

/// Starts a queue. `kick` stays open as long as it runs; without it the queue polls.
///
/// # Errors
/// The kernel refused a resource, or `kick` cannot be waited for.
pub(in super::super) fn spawn<D: Disk, R: Ring>(
    start: QueueStart<D, R>,
    kick: Option<BorrowedFd<'_>>,
    place: Place<'_>,
) -> io::Result<QueueHandle> {
    let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let event_fd = event.as_raw_fd();
    let stop = Arc::new(StopRequest(AtomicU64::new(StopRequest::RUN)));
    let waker = Waker::new(event);
    let started_at = not_run(&start.ring);
    let (index, name) = (start.index, format!("{}/q{}", start.name, start.index));
    let board: Boarding = Box::new({
        let (stop, waker, has_kick) = (Arc::clone(&stop), waker.clone(), kick.is_some());
        move || board(start, stop, waker, has_kick)
    });
    let passenger = Passenger { board, event: event_fd, kick: kick.map(|kick| kick.as_raw_fd()) };
    let end = match place.crew {
        Some(crew) => crew.take(index, passenger)?,
        None => crew::spawn(name, passenger, place.cpus, index)?,
    };
    Ok(QueueHandle { end, stop, waker, started_at })
}

/// What is said of a queue that never ran, or of which nothing is known.
fn not_run(ring: &impl Ring) -> Stopped {
    Stopped { base: ring.base(0), used: ring.used(), broken: true, left: 0 }
}

/// Opens a queue on the thread that runs it.
fn board<D: Disk, R: Ring>(
    start: QueueStart<D, R>,
    stop: Arc<StopRequest>,
    waker: Waker,
    has_kick: bool,
) -> Result<Box<dyn Seat>, Stopped> {
    let at = not_run(&start.ring);
    match start.disk.open_queue::<GuestBuffer>(start.index, waker) {
        Ok(queue) => {
            let mut worker = Worker::new(start, queue);
            worker.begin();
            Ok(Box::new(Running { worker: Some(worker), stop, has_kick, waited: None, armed: None }))
        }
        Err(error) => {
            tracing::error!(disk = &*start.name, queue = start.index, %error, "queue cannot be opened");
            start.error.notify();
            Err(at)
        }
    }
}

/// A worker on its thread, and what it is told from outside.
struct Running<Q, R: Ring> {
    /// Gone when it has ended.
    worker: Option<Worker<Q, R>>,
    stop: Arc<StopRequest>,
    has_kick: bool,
    /// Since when a stop has waited for the disk and nothing has come back.
    waited: Option<Instant>,
    /// Since when it has nothing to do and has asked to be woken.
    armed: Option<Instant>,
}

impl<Q: DiskQueue<GuestBuffer>, R: Ring> Seat for Running<Q, R> {
    fn look(&mut self) -> Look {
        let stopping = self.stop.is_set();
        let worker = self.worker.as_mut().expect("it is looked at until it has ended");
        if stopping {
            worker.queue.hasten();
        }
        if worker.turn(stopping) {
            worker.idle.worked();
            self.waited = None;
            self.wake();
            return Look::Worked;
        }
        if stopping {
            return self.look_while_stopping();
        }
        if self.armed.is_none() {
            if worker.idle.keep_polling() || !worker.asked_for_notifications(self.has_kick) {
                return Look::Poll;
            }
            self.armed = Some(Instant::now());
        }
        worker.queue.park();
        match self.has_kick || worker.broken.is_some() {
            true => Look::Sleep(worker.queue.due_in()),
            false => Look::Nap,
        }
    }

    fn wake(&mut self) {
        if let (Some(since), Some(worker)) = (self.armed.take(), &mut self.worker) {
            worker.idle.slept(since.elapsed());
            worker.quiet();
        }
    }
}

impl<Q: DiskQueue<GuestBuffer>, R: Ring> Running<Q, R> {
    fn look_while_stopping(&mut self) -> Look {
        let worker = self.worker.as_mut().expect("it is looked at until it has ended");
        let patience = self.stop.patience();
        if patience.is_none() {
            worker.queue.give_up();
        }
        let waited = *self.waited.get_or_insert_with(Instant::now);
        let left = patience.map(|patience| patience.saturating_sub(waited.elapsed()));
        worker.queue.park();
        if worker.queue.pending() > 0 && !left.is_some_and(|left| left.is_zero()) {
            return Look::Sleep(left);
        }
        let worker = self.worker.take().expect("as above");
        Look::Ended(worker.end())
    }
}
