//! One thread's queue of operations on a disk: sends each to the ring or to the helper threads.
//!
//! ```text
//!  submit ─┬─ transfer, zero ─► ring ──────┬─► reap
//!          │                     │ cannot  │
//!          ├─ too fine ──────────▼         │
//!          └─ flush ──────► helper threads ┘
//! ```

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::disk::Core;
use super::threads::Inbox;
use super::uring::{Ended, NoRing, Ring};
use super::{Channel, Completion, Engine, Op};
use crate::wake::Waker;

/// Operations in flight per channel at most.
const DEPTH_MAX: u32 = 4096;

/// How long to sleep before asking again a kernel that had no memory for our entries.
const STUCK_RETRY: Duration = Duration::from_millis(1);

/// A way to do I/O on a [`Disk`](super::Disk).
pub struct DiskChannel {
    /// Absent with [`Engine::Threads`]. Before `core`: its operations end first.
    ring: Option<Ring>,
    inbox: Arc<Inbox>,
    core: Arc<Core>,
    depth: usize,
    in_flight: usize,
    /// Failed flushes of the disk when this channel last handed one out, or was opened.
    failures_known: u64,
}

impl DiskChannel {
    pub(super) fn open(core: &Arc<Core>, waker: &Waker, depth: u32) -> io::Result<Self> {
        if !(1..=DEPTH_MAX).contains(&depth) {
            let why = format!("a channel takes 1 to {DEPTH_MAX} operations at once, not {depth}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let ring = match core.engine {
            Engine::Threads => None,
            Engine::Auto => match Ring::open(&core.file, depth, waker) {
                Ok(ring) => Some(ring),
                Err(NoRing::Failed(e)) => return Err(e),
                Err(NoRing::Unavailable(e)) => {
                    core.told_no_ring.call_once(|| {
                        tracing::warn!("io_uring is not available ({e}); helper threads do the disk's I/O");
                    });
                    None
                }
            },
        };
        Ok(Self {
            ring,
            inbox: Arc::new(Inbox::new(waker, depth as usize)?),
            core: core.clone(),
            depth: depth as usize,
            in_flight: 0,
            failures_known: core.pool.failures(),
        })
    }

    /// Whether an io_uring does the I/O; otherwise helper threads do.
    pub fn has_ring(&self) -> bool {
        self.ring.is_some()
    }

    /// Bounds and alignment are the caller's promise; what breaks it would damage a file's size or
    /// its neighbours, so it is checked in production.
    fn check(&self, op: &Op) {
        let (offset, len) = match op {
            Op::Read { offset, buf } | Op::Write { offset, buf } => (*offset, buf.len() as u64),
            Op::Zero { offset, len, .. } => (*offset, *len),
            Op::Flush => return,
        };
        let geometry = self.core.geometry();
        let block = u64::from(geometry.logical_block);
        assert!(
            len > 0 && (offset | len).is_multiple_of(block),
            "operation at {offset}+{len} is not made of blocks of {block} bytes"
        );
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= geometry.size),
            "operation at {offset}+{len} on a disk of {} bytes",
            geometry.size
        );
    }

    /// Moves everything that is over to `done`, without accounting for it.
    fn collect(&mut self, done: &mut Vec<Completion>) {
        if let Some(ring) = &mut self.ring {
            let (core, inbox) = (&self.core, &self.inbox);
            ring.reap(|ended| match ended {
                Ended::Done(completion) => done.push(completion),
                Ended::HandOver(token, op) => core.pool.run(&core.file, inbox, token, op),
            });
        }
        self.inbox.drain(done);
    }

    /// Blocks until the ring or a helper says something, or for `timeout`.
    fn poll(&mut self, timeout: Duration) {
        // Rounded up: a timeout of less than a millisecond must not spin.
        let timeout_ms = timeout.as_nanos().div_ceil(1_000_000).min(60_000) as i32;
        let ring = self.ring.as_ref().map_or(-1, Ring::fd);
        if !poll_readable([self.inbox.event().as_raw_fd(), ring], timeout_ms)[0] {
            return;
        }
        // It says only that the inbox is worth a look; another look may have emptied it already.
        drop(self.inbox.event().read());
    }

    fn is_ready(&mut self) -> bool {
        !self.inbox.is_empty() || self.ring.as_mut().is_some_and(Ring::is_ready)
    }
}

impl Channel for DiskChannel {
    fn submit(&mut self, token: u64, op: Op) -> Result<(), Op> {
        if self.in_flight == self.depth {
            return Err(op);
        }
        self.check(&op);
        self.in_flight += 1;
        let core = &self.core;
        match (&op, &mut self.ring) {
            (Op::Write { .. } | Op::Zero { .. }, _) if core.geometry().read_only => {
                let result = Err(io::ErrorKind::ReadOnlyFilesystem.into());
                self.inbox.push(Completion { token, op, result });
            }
            (Op::Flush, _) => core.pool.flush(&core.file, &self.inbox, token, self.failures_known),
            (_, Some(ring)) if ring.takes(&op) => ring.submit(token, op),
            _ => core.pool.run(&core.file, &self.inbox, token, op),
        }
        Ok(())
    }

    fn kick(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.kick();
        }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let before = done.len();
        self.collect(done);
        self.in_flight -= done.len() - before;
        let failed = |c: &Completion| matches!(c.op, Op::Flush) && c.result.is_err();
        if done[before..].iter().any(failed) {
            self.failures_known = self.core.pool.failures();
        }
    }

    fn wait(&mut self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        self.kick();
        while self.in_flight > 0 && !self.is_ready() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let stuck = self.ring.as_mut().is_some_and(Ring::is_stuck);
            self.poll(if stuck { left.min(STUCK_RETRY) } else { left });
            self.kick();
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for DiskChannel {
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.in_flight > 0 {
            self.wait(Duration::from_secs(60));
            self.reap(&mut done);
            done.clear();
        }
    }
}

impl std::fmt::Debug for DiskChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskChannel")
            .field("ring", &self.has_ring())
            .field("depth", &self.depth)
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

/// Waits until a descriptor is readable; says which. Negative descriptors are ignored. A signal
/// ends it early.
#[expect(unsafe_code, reason = "std has no poll")]
fn poll_readable(fds: [RawFd; 2], timeout_ms: i32) -> [bool; 2] {
    let mut polled = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    // SAFETY: `polled` is an array of two initialised structures that outlives the call.
    unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout_ms) };
    polled.map(|p| p.revents != 0)
}
