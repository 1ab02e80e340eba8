//! How a worker tells a sleeping queue that something it waits for has happened.
//!
//! One eventfd per queue serves both the workers and the queue's io_uring, so the queue thread
//! sleeps on its kick and on this and on nothing else.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// Wakes one queue. Clones wake the same queue. The silent waker of a simulation does nothing.
#[derive(Clone, Debug, Default)]
pub struct Waker(Option<Arc<EventFd>>);

impl Waker {
    /// A waker that signals `event`, which must be non-blocking.
    pub fn new(event: EventFd) -> Self {
        Self(Some(Arc::new(event)))
    }

    /// Makes the queue's loop run again. Cheap, and harmless when it runs already.
    pub fn wake(&self) {
        if let Some(event) = &self.0 {
            // The only failure is a counter at its maximum, and then the descriptor is readable,
            // which is all a wake-up means.
            drop(event.write(1));
        }
    }

    /// The eventfd, for epoll and for registration with an io_uring; `None` for the silent one.
    pub fn event(&self) -> Option<&EventFd> {
        self.0.as_deref()
    }
}
