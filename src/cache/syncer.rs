//! Group commit on page-cache media: everyone who needs durability joins the *next* `sync`.
//!
//! Laws: a ticket names a `sync` that has not begun when the ticket is drawn, so it covers all that
//! was stored before. A failed `sync` is final: no later ticket is ever durable, because the kernel
//! may have dropped the pages it could not write (the data still reads back, the disk never got it).

use std::time::Duration;

use super::doubt;
use super::stripes::lock;
use crate::mutant::{Mutant, mutated};
use crate::pmem::{MediaClass, Pmem};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Condvar, Mutex};
use crate::wake::Waker;

/// A moment after which everything stored before the ticket was drawn is durable.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Durable(u64);

/// Where a ticket stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    Waiting,
    Reached,
    /// It will never be reached.
    Failed,
}

#[derive(Default)]
struct State {
    requested: u64,
    /// Whom to wake when which ticket is decided.
    waiters: Vec<(u64, Waker)>,
    stop: bool,
}

/// Runs and shares `sync`s.
pub(crate) struct Syncer {
    /// Whether durability needs a `sync` at all.
    by_sync: bool,
    state: Mutex<State>,
    work: Condvar,
    done: Condvar,
    /// Held for the length of a `sync`: there is one at a time.
    stepping: Mutex<()>,
    /// Whether a thread is in [`Syncer::run`].
    running: AtomicBool,
    started: AtomicU64,
    completed: AtomicU64,
    failed: AtomicBool,
    /// Where the media is marked while the outcome of a `sync` is not known to be good.
    mark_at: Option<u64>,
}

impl Syncer {
    pub fn new(class: MediaClass) -> Self {
        Self {
            by_sync: class == MediaClass::PageCache,
            state: Mutex::default(),
            work: Condvar::new(),
            done: Condvar::new(),
            stepping: Mutex::default(),
            running: AtomicBool::new(false),
            started: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            mark_at: None,
        }
    }

    /// The same, marking the media at `at` while a `sync` is in doubt (see `doubt.rs`).
    pub fn marking(self, at: u64) -> Self {
        Self { mark_at: Some(at).filter(|_| self.by_sync), ..self }
    }

    /// Draws a ticket. On media whose fence is durable the caller's fence has done it already; on
    /// volatile media there is nothing to wait for.
    pub fn request<P: Pmem>(&self, pmem: &P, waker: Option<&Waker>) -> Durable {
        if !self.by_sync {
            pmem.fence();
            return Durable(0);
        }
        let mut state = lock(&self.state);
        let ticket = self.started.load(Ordering::SeqCst) + u64::from(!mutated(Mutant::TicketOfRunningSync));
        state.requested = state.requested.max(ticket);
        if let Some(waker) = waker {
            state.waiters.push((ticket, waker.clone()));
        }
        self.work.notify_one();
        Durable(ticket)
    }

    /// Whether the ticket's moment has come.
    pub fn outcome(&self, ticket: Durable) -> Outcome {
        if self.completed.load(Ordering::Acquire) >= ticket.0 {
            Outcome::Reached
        } else if self.failed.load(Ordering::Acquire) {
            Outcome::Failed
        } else {
            Outcome::Waiting
        }
    }

    /// Whether some `sync` has failed in this run.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Number of `sync`s begun: whoever appended under an earlier number must begin a new page.
    pub fn started(&self) -> u64 {
        self.started.load(Ordering::Relaxed)
    }

    /// Blocks until the ticket is decided, doing the work itself where no thread does. For workers
    /// and control, never for a queue.
    pub fn wait<P: Pmem>(&self, pmem: &P, ticket: Durable) -> Outcome {
        loop {
            match self.outcome(ticket) {
                Outcome::Waiting if self.running.load(Ordering::SeqCst) => {
                    let state = lock(&self.state);
                    // Looked at again under the lock, through which whoever decides it or stops
                    // running goes before it notifies: the wake-up cannot come too early.
                    if self.outcome(ticket) == Outcome::Waiting && self.running.load(Ordering::SeqCst) {
                        drop(self.done.wait_timeout(state, Duration::from_millis(10)));
                    }
                }
                Outcome::Waiting => {
                    self.step(pmem);
                }
                decided => return decided,
            }
        }
    }

    /// Number of the last `sync` that succeeded: what was appended under a lower `started` is durable.
    pub fn completed(&self) -> u64 {
        self.completed.load(Ordering::Acquire)
    }

    /// Runs one `sync` if any is asked for; says whether it did.
    pub fn step<P: Pmem>(&self, pmem: &P) -> bool {
        let _one_at_a_time = lock(&self.stepping);
        let this = {
            let state = lock(&self.state);
            if state.requested <= self.started.load(Ordering::SeqCst) || self.has_failed() {
                return false;
            }
            // Under the lock: a ticket drawn after this line waits for the next one.
            self.started.fetch_add(1, Ordering::SeqCst) + 1
        };
        match doubt::sync_marked(pmem, self.mark_at) {
            Ok(()) => self.completed.store(this, Ordering::Release),
            Err(error) => {
                tracing::error!(%error, "the cache can no longer be made durable: it stops accepting writes");
                self.failed.store(!mutated(Mutant::SyncFailureForgotten), Ordering::Release);
            }
        }
        let failed = self.has_failed();
        lock(&self.state).waiters.retain(|(ticket, waker)| {
            // Those of the next `sync` stay: this one does not answer them.
            let decided = failed || *ticket <= this;
            if decided {
                waker.wake();
            }
            !decided
        });
        self.done.notify_all();
        true
    }

    /// The loop of the syncing thread, until [`Syncer::stop`].
    pub fn run<P: Pmem>(&self, pmem: &P) {
        self.running.store(true, Ordering::SeqCst);
        loop {
            while self.step(pmem) {}
            let state = lock(&self.state);
            if state.stop {
                self.running.store(false, Ordering::SeqCst);
                self.done.notify_all();
                return;
            }
            if state.requested <= self.started.load(Ordering::SeqCst) || self.has_failed() {
                drop(self.work.wait_timeout(state, Duration::from_secs(1)));
            }
        }
    }

    /// Makes a new [`Syncer::run`] possible after [`Syncer::stop`].
    pub fn rearm(&self) {
        lock(&self.state).stop = false;
    }

    /// Ends [`Syncer::run`] once what was asked for is done.
    pub fn stop(&self) {
        lock(&self.state).stop = true;
        self.work.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::pmem::{MediaError, SyncError};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    /// Media whose `sync` runs a hook, as if somebody asked for the next one meanwhile.
    struct Slow<F>(F);

    impl<F: Fn() + Send + Sync + 'static> Pmem for Slow<F> {
        fn len(&self) -> u64 {
            4096
        }

        fn class(&self) -> MediaClass {
            MediaClass::PageCache
        }

        fn read(&self, _: u64, _: &mut [u8]) -> Result<(), MediaError> {
            Ok(())
        }

        fn write(&self, _: u64, _: &[u8]) -> Result<(), MediaError> {
            Ok(())
        }

        fn fence(&self) {}

        fn sync(&self) -> Result<(), SyncError> {
            (self.0)();
            Ok(())
        }
    }

    #[test]
    fn who_asks_during_a_sync_waits_for_the_next_and_is_woken_by_it() {
        let syncer = Arc::new(Syncer::new(MediaClass::PageCache));
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let waker = Waker::new(event.try_clone().unwrap());
        let late = Arc::new(Mutex::new(None));
        let hook = {
            let (syncer, late) = (syncer.clone(), late.clone());
            move || {
                let mut late = lock(&late);
                if late.is_none() {
                    *late = Some(syncer.request(&Slow(|| {}), Some(&waker)));
                }
            }
        };
        let pmem = Slow(hook);
        let early = syncer.request(&pmem, None);
        assert!(syncer.step(&pmem));
        let late = lock(&late).unwrap();
        assert_eq!(syncer.outcome(early), Outcome::Reached);
        assert_eq!(syncer.outcome(late), Outcome::Waiting);
        assert!(event.read().is_err(), "woken before its ticket was decided");
        assert!(syncer.step(&pmem));
        assert_eq!(syncer.outcome(late), Outcome::Reached);
        assert_eq!(event.read().unwrap(), 1);
        assert!(!syncer.step(&pmem), "nobody asks for a third");
    }
}
