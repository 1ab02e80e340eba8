//! Helper threads of a disk: blocking operations, and flushes that share one `fdatasync`.
//!
//! Both engines need them. Without io_uring (containers and seccomp filters often forbid it) they
//! do everything; with it, what no single kernel operation does. One pool per disk, grown on demand.
//!
//! Flushes always come here, one `fdatasync` at a time, for two reasons. All that wait while one
//! runs share the next. And a failed write-back of the page cache is reported once per open file:
//! if two channels flushed by themselves, one would consume the error and the other would take its
//! lost writes for durable. So failures are counted here, and a flush succeeds only if none has
//! happened that its submitter had not yet reaped when submitting it.
//!
//! Invariants:
//! - Ending the pool waits for the helpers, so that when disk and channels are gone no helper still
//!   keeps the descriptor, and its locks, open.
//! - A helper in the middle of a system call keeps its process's descriptors open even when the
//!   process is being killed, so the lock on the disk outlives the I/O.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::file::DiskFile;
use super::{Completion, Op};
use crate::wake::Waker;

/// Helper threads per disk at most: enough to keep a network disk busy without io_uring.
const WORKERS_MAX: usize = 16;

/// Where helpers put a channel's completions.
pub(super) struct Inbox {
    done: Mutex<Vec<Completion>>,
    /// Length of `done`, to look without locking.
    ready: AtomicUsize,
    /// Readable while completions may be there; for a thread blocked in the channel's `wait`.
    event: EventFd,
    waker: Waker,
}

impl Inbox {
    /// An empty one whose deliveries signal `waker`.
    pub(super) fn new(waker: &Waker, depth: usize) -> io::Result<Self> {
        Ok(Self {
            done: Mutex::new(Vec::with_capacity(depth)),
            ready: AtomicUsize::new(0),
            event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            waker: waker.clone(),
        })
    }

    /// Delivers a completion.
    pub(super) fn push(&self, completion: Completion) {
        let mut done = lock(&self.done);
        done.push(completion);
        self.ready.store(done.len(), Ordering::Release);
        drop(done);
        // Both fail only when the counter is full, and then the descriptor is readable already.
        drop(self.event.write(1));
        self.waker.wake();
    }

    /// Moves what was delivered to `into`.
    pub(super) fn drain(&self, into: &mut Vec<Completion>) {
        if self.is_empty() {
            return;
        }
        let mut done = lock(&self.done);
        into.append(&mut done);
        self.ready.store(0, Ordering::Release);
    }

    /// Whether nothing has been delivered.
    pub(super) fn is_empty(&self) -> bool {
        self.ready.load(Ordering::Acquire) == 0
    }

    /// What to poll while waiting for a delivery; may be readable without one.
    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }
}

/// A blocking operation and whom to tell.
struct Job {
    file: Arc<DiskFile>,
    inbox: Arc<Inbox>,
    token: u64,
    op: Op,
}

/// A flush that waits for the next `fdatasync`.
struct Waiting {
    inbox: Arc<Inbox>,
    token: u64,
    /// Failures its submitter knew of.
    known: u64,
}

enum Task {
    Run(Job),
    Sync(Arc<DiskFile>),
}

#[derive(Default)]
struct Tasks {
    queue: VecDeque<Task>,
    idle: usize,
    workers: Vec<JoinHandle<()>>,
    closed: bool,
}

#[derive(Default)]
struct Flushes {
    waiting: Vec<Waiting>,
    /// Whether a worker runs `fdatasync`, or is about to.
    running: bool,
}

#[derive(Default)]
struct Shared {
    tasks: Mutex<Tasks>,
    arrived: Condvar,
    flushes: Mutex<Flushes>,
    /// Failed `fdatasync`s. Changed only by the worker that runs them.
    failures: AtomicU64,
}

/// The helper threads of one disk. Dropping it ends them; no channel may be left then.
#[derive(Default)]
pub(super) struct Pool {
    shared: Arc<Shared>,
}

impl Pool {
    /// Runs `op`, which is not a flush; the completion goes to `inbox`.
    pub(super) fn run(&self, file: &Arc<DiskFile>, inbox: &Arc<Inbox>, token: u64, op: Op) {
        self.start(Task::Run(Job { file: file.clone(), inbox: inbox.clone(), token, op }));
    }

    /// Makes durable what has completed before this call. `known` is what [`Pool::failures`] was
    /// when the channel last reaped a failed flush, or was opened.
    pub(super) fn flush(&self, file: &Arc<DiskFile>, inbox: &Arc<Inbox>, token: u64, known: u64) {
        let mut flushes = lock(&self.shared.flushes);
        flushes.waiting.push(Waiting { inbox: inbox.clone(), token, known });
        let start = !std::mem::replace(&mut flushes.running, true);
        drop(flushes);
        if start {
            self.start(Task::Sync(file.clone()));
        }
    }

    /// How many flushes have failed since the disk was opened.
    pub(super) fn failures(&self) -> u64 {
        self.shared.failures.load(Ordering::Acquire)
    }

    /// Queues a task and sees to it that somebody will take it.
    fn start(&self, task: Task) {
        let mut tasks = lock(&self.shared.tasks);
        tasks.queue.push_back(task);
        if tasks.idle < tasks.queue.len() && tasks.workers.len() < WORKERS_MAX {
            let shared = self.shared.clone();
            let spawned = std::thread::Builder::new().name("backing".into()).spawn(move || shared.work());
            match spawned {
                Ok(worker) => tasks.workers.push(worker),
                // With a worker alive the task only waits longer.
                Err(e) if tasks.workers.is_empty() => {
                    let task = tasks.queue.pop_back();
                    drop(tasks);
                    if let Some(task) = task {
                        self.shared.fail(task, &e);
                    }
                    return;
                }
                Err(_) => {}
            }
        }
        drop(tasks);
        self.shared.arrived.notify_one();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut tasks = lock(&self.shared.tasks);
        tasks.closed = true;
        let workers = std::mem::take(&mut tasks.workers);
        drop(tasks);
        self.shared.arrived.notify_all();
        for worker in workers {
            // A worker that panicked has nothing left that could be waited for.
            drop(worker.join());
        }
    }
}

impl Shared {
    /// A worker's life.
    fn work(&self) {
        let mut tasks = lock(&self.tasks);
        loop {
            match tasks.queue.pop_front() {
                Some(task) => {
                    drop(tasks);
                    match task {
                        Task::Run(job) => job.run(),
                        Task::Sync(file) => self.sync(&file),
                    }
                    tasks = lock(&self.tasks);
                }
                None if tasks.closed => return,
                None => {
                    tasks.idle += 1;
                    tasks = self.arrived.wait(tasks).unwrap_or_else(PoisonError::into_inner);
                    tasks.idle -= 1;
                }
            }
        }
    }

    /// Runs `fdatasync` for everyone who waits, until nobody does.
    fn sync(&self, file: &DiskFile) {
        loop {
            let batch = std::mem::take(&mut lock(&self.flushes).waiting);
            let result = file.sync();
            if result.is_err() {
                self.failures.fetch_add(1, Ordering::AcqRel);
            }
            self.answer(batch, &result);
            let mut flushes = lock(&self.flushes);
            if flushes.waiting.is_empty() {
                flushes.running = false;
                return;
            }
        }
    }

    fn answer(&self, batch: Vec<Waiting>, result: &io::Result<()>) {
        let failures = self.failures.load(Ordering::Acquire);
        for Waiting { inbox, token, known } in batch {
            let result = match result {
                Err(e) => Err(copy_error(e)),
                Ok(()) if known != failures => {
                    Err(io::Error::other("another flush of this disk failed since the last that succeeded"))
                }
                Ok(()) => Ok(()),
            };
            inbox.push(Completion { token, op: Op::Flush, result });
        }
    }

    /// Answers a task that no thread can be had for.
    fn fail(&self, task: Task, e: &io::Error) {
        match task {
            Task::Run(Job { inbox, token, op, .. }) => {
                inbox.push(Completion { token, op, result: Err(copy_error(e)) });
            }
            Task::Sync(_) => {
                let mut flushes = lock(&self.flushes);
                flushes.running = false;
                let batch = std::mem::take(&mut flushes.waiting);
                drop(flushes);
                self.answer(batch, &Err(copy_error(e)));
            }
        }
    }
}

impl Job {
    fn run(self) {
        let Job { file, inbox, token, mut op } = self;
        let result = file.run(&mut op);
        inbox.push(Completion { token, op, result });
    }
}

/// The same error once more, for another who waited for it.
fn copy_error(e: &io::Error) -> io::Error {
    e.raw_os_error().map_or_else(|| e.kind().into(), io::Error::from_raw_os_error)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> Arc<DiskFile> {
        Arc::new(DiskFile::new(tempfile::tempfile().unwrap(), 1))
    }

    #[test]
    fn what_no_thread_can_be_had_for_comes_back_as_an_error() {
        let shared = Shared::default();
        let inbox = Arc::new(Inbox::new(&Waker::default(), 4).unwrap());
        let refused = io::Error::from_raw_os_error(libc::EAGAIN);
        let op = Op::Zero { offset: 0, len: 512, unmap: true };
        shared.fail(Task::Run(Job { file: disk(), inbox: inbox.clone(), token: 1, op }), &refused);
        let mut flushes = lock(&shared.flushes);
        flushes.running = true;
        flushes.waiting.push(Waiting { inbox: inbox.clone(), token: 2, known: 0 });
        drop(flushes);
        shared.fail(Task::Sync(disk()), &refused);
        assert!(!lock(&shared.flushes).running, "the next flush starts anew");
        let mut done = Vec::new();
        inbox.drain(&mut done);
        let codes: Vec<_> =
            done.iter().map(|c| (c.token, c.result.as_ref().unwrap_err().raw_os_error())).collect();
        assert_eq!(codes, [(1, Some(libc::EAGAIN)), (2, Some(libc::EAGAIN))]);
        assert!(inbox.is_empty());
    }

    #[test]
    fn helpers_are_few_however_many_operations_wait() {
        let pool = Pool::default();
        let (file, inbox) = (disk(), Arc::new(Inbox::new(&Waker::default(), 500).unwrap()));
        file.file().set_len(4096).unwrap();
        for token in 0..500 {
            let buf = super::super::AlignedBuf::new(4096);
            pool.run(&file, &inbox, token, Op::Read { offset: 0, buf });
        }
        assert!((1..=WORKERS_MAX).contains(&lock(&pool.shared.tasks).workers.len()));
        // Ending the pool lets its helpers do what is queued first.
        drop(pool);
        let mut done = Vec::new();
        inbox.drain(&mut done);
        assert_eq!(done.len(), 500);
        assert_eq!(Arc::strong_count(&file), 1, "no helper keeps the disk open");
    }

    #[test]
    fn a_failed_flush_is_everybodys_until_they_know_of_it() {
        let shared = Shared::default();
        let inbox = Arc::new(Inbox::new(&Waker::default(), 4).unwrap());
        shared.failures.store(3, Ordering::Release);
        let eio = || Err(io::Error::from_raw_os_error(libc::EIO));
        for (known, result, good) in
            [(3, Ok(()), true), (2, Ok(()), false), (0, Ok(()), false), (3, eio(), false), (2, eio(), false)]
        {
            shared.answer(vec![Waiting { inbox: inbox.clone(), token: 0, known }], &result);
            let mut done = Vec::new();
            inbox.drain(&mut done);
            assert_eq!(done[0].result.is_ok(), good, "known {known}, {result:?}");
        }
    }
}
