//! A ring as the VMM sets it up, piece by piece, and its queue thread while it runs.
//!
//! Invariants:
//! - a ring runs if and only if it has a size, addresses inside the guest's memory, a kick (a
//!   descriptor, or the word that there is none), is enabled, and is not broken;
//! - what a running ring was started with does not change under it: it is stopped first, which
//!   returns everything in flight, or leaves its marks in the in-flight area for the next start;
//! - a broken ring stays stopped until the VMM takes its base or resets the device.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::copy::Fault;
use super::features::Features;
use super::idle::Polling;
use super::inflight::{InflightArea, Recovery, Tracker};
use super::memory::{MemoryMap, SharedMemory};
use super::notify::Notifier;
use super::packed::PackedRing;
use super::queue::{self, Place, QueueHandle, QueueStart};
use super::ring::{Ring, RingAddresses, RingPlace};
use super::split::SplitRing;
use crate::volume::Disk;

/// Why a ring that has everything it needs does not run.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error("a ring of {size} at position {base:#x} is not possible where it is said to be")]
    Impossible { size: u16, base: u32 },
    #[error("the ring's memory is gone")]
    Fault,
    #[error("the in-flight area has no room for a ring of {size}, or is for the other layout")]
    NoInflightRoom { size: u16 },
    #[error("starting the queue's thread failed: {0}")]
    Thread(#[from] std::io::Error),
}

/// How the driver's notifications arrive.
#[derive(Debug, Default)]
pub(super) enum Kick {
    /// Not yet told.
    #[default]
    Unset,
    /// Not at all: poll.
    Polled,
    /// By this descriptor.
    Fd(OwnedFd),
}

/// What all rings of a session are started with.
pub(super) struct RingContext<'a, D: Disk> {
    pub name: &'a Arc<str>,
    pub disk: &'a Arc<D>,
    pub memory: &'a Arc<SharedMemory>,
    pub features: Features,
    pub inflight: Option<&'a InflightArea>,
    pub polling: Polling,
    pub place: Place<'a>,
}

/// One ring.
#[derive(Debug, Default)]
pub(super) struct Vring {
    /// Descriptors; 0 before the VMM has said.
    pub size: u16,
    /// Where its parts are.
    pub addresses: Option<RingAddresses>,
    /// Guest address under which the VMM wants writes to the used ring logged.
    pub log_at: Option<u64>,
    /// Its position when it starts, as SET_VRING_BASE words it.
    pub base: u32,
    /// How it is kicked.
    pub kick: Kick,
    /// How the driver is told.
    pub call: Arc<Notifier>,
    /// How the VMM is told of a broken ring.
    pub error: Arc<Notifier>,
    /// Whether the VMM wants it to run.
    pub enabled: bool,
    /// The used position it last stopped at, until the base is taken.
    stopped_at: Option<u32>,
    broken: bool,
    /// Heads that the last run left with a disk that did not answer.
    left: u16,
    running: Option<QueueHandle>,
}

impl Vring {
    /// Whether its thread exists.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Starts the thread if the ring has all it needs and does not run yet.
    ///
    /// # Errors
    /// It has all it needs, but what it has is no good.
    pub fn start<D: Disk>(&mut self, index: u16, context: &RingContext<'_, D>) -> Result<(), StartError> {
        let enabled = self.enabled || !context.features.protocol_features();
        let ready = self.size > 0 && !matches!(self.kick, Kick::Unset);
        let Some(addresses) = self.addresses.filter(|_| enabled && ready) else { return Ok(()) };
        if self.broken || self.is_running() {
            return Ok(());
        }
        let kick = match &self.kick {
            Kick::Fd(fd) => Some(fd.as_fd()),
            Kick::Unset | Kick::Polled => None,
        };
        self.running = Some(match context.features.packed() {
            true => {
                queue::spawn(self.prepare::<D, PackedRing>(index, addresses, context)?, kick, context.place)?
            }
            false => {
                queue::spawn(self.prepare::<D, SplitRing>(index, addresses, context)?, kick, context.place)?
            }
        });
        self.left = 0;
        Ok(())
    }

    /// What the queue's thread is made of: the ring, and what an earlier life has left in flight.
    ///
    /// # Errors
    /// The ring, or the in-flight area's part for it, is not there.
    pub(super) fn prepare<D: Disk, R: Ring>(
        &self,
        index: u16,
        addresses: RingAddresses,
        context: &RingContext<'_, D>,
    ) -> Result<QueueStart<D, R>, StartError> {
        let memory = Arc::new(MemoryMap::clone(&context.memory.current()));
        let (size, base) = (self.size, self.base);
        let place = RingPlace { memory, addresses, size, base, log_at: self.log_at };
        let mut ring = R::open(place, context.features).ok_or(StartError::Impossible { size, base })?;
        let mut resubmit = Vec::new();
        let mut inflight = None;
        if let Some(area) = context.inflight {
            let mut tracker =
                R::Tracker::attach(area, index, size).ok_or(StartError::NoInflightRoom { size })?;
            match tracker.recover(&mut ring).map_err(|Fault| StartError::Fault)? {
                Recovery::Fresh => {}
                Recovery::Resumed { heads } => resubmit = heads,
                Recovery::Discarded => tracing::warn!(
                    disk = &**context.name,
                    queue = index,
                    "the in-flight area contradicts the ring and was cleared"
                ),
            }
            inflight = Some(tracker);
        }
        if !resubmit.is_empty() {
            tracing::info!(disk = &**context.name, queue = index, requests = resubmit.len(), "resuming");
        }
        Ok(QueueStart {
            index,
            name: Arc::clone(context.name),
            disk: Arc::clone(context.disk),
            memory: Arc::clone(context.memory),
            ring,
            features: context.features,
            call: Arc::clone(&self.call),
            error: Arc::clone(&self.error),
            inflight,
            resubmit,
            polling: context.polling,
        })
    }

    /// Asks the thread to end; [`Vring::stop`] waits for it. Asking all rings before waiting for
    /// one lets them drain at the same time.
    pub fn request_stop(&self, patience: Option<Duration>) {
        if let Some(running) = &self.running {
            running.request_stop(patience);
        }
    }

    /// Whether it stays stopped until the VMM sets it up again.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether its last run left requests with a disk that did not answer.
    pub fn has_left_requests(&self) -> bool {
        self.left > 0
    }

    /// The used position it last stopped at with everything returned, until its base is taken.
    pub fn stopped_at(&self) -> Option<u32> {
        self.stopped_at.filter(|_| self.left == 0)
    }

    /// Says where another process's ring, which this one goes on for, has stopped.
    pub fn set_stopped_at(&mut self, used: u32) {
        self.stopped_at = Some(used);
    }

    /// Stops the thread, when everything in flight is returned, or when nothing has been for
    /// `patience`.
    pub fn stop(&mut self, patience: Option<Duration>) {
        self.request_stop(patience);
        if let Some(running) = self.running.take() {
            let stopped = running.join();
            self.base = stopped.base;
            self.stopped_at = Some(stopped.used);
            self.left = stopped.left;
            self.broken |= stopped.broken;
        }
    }

    /// Stops the ring for good, as GET_VRING_BASE asks: its position. It needs a new kick to start.
    pub fn take_base(
        &mut self,
        index: u16,
        inflight: Option<&InflightArea>,
        patience: Option<Duration>,
    ) -> u32 {
        self.stop(patience);
        self.kick = Kick::Unset;
        self.call.set(None);
        self.broken = false;
        // What a broken ring has left is counted by the base, so it will be taken again; marks that
        // stayed would be taken for chains of whatever ring comes next. But what a disk has not
        // answered is known by its marks alone: heads return in any order.
        if let Some(used) = self.stopped_at.take()
            && self.left == 0
            && let Some(area) = inflight
        {
            area.clear(index, self.size, used);
        }
        self.base
    }
}

impl Drop for Vring {
    /// A thread must not outlive the session whose memory it was given.
    fn drop(&mut self) {
        self.stop(None);
    }
}
