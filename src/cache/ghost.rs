//! What is left with a disk that does not answer, so that a queue or a worker can end without it.
//!
//! Laws:
//! - The kernel owns the buffers of operations in flight until they have ended; the channel that
//!   holds them moves, whole, to a thread that waits for that and does nothing else.
//! - A write around the cache that may still land keeps its registration, so that nothing that
//!   overlaps it reaches the disk before it has: one that landed later would undo a newer one.
//! - While anything is left behind the disk's content is not known: [`Facts`](super::health::Facts)
//!   counts it, and no fingerprint is taken.
//! - A process that ends with something left behind leaves it to the kernel, which keeps the disk's
//!   descriptor, and so its lock, until the operations have ended (see `backing/lock.rs`).

use std::sync::Arc;
use std::time::Duration;

use super::stripes::Ticket;
use super::volume::VolumeCore;
use crate::backing::Channel;
use crate::units::SectorRange;

/// Channels left behind by one volume at most: a front end that stops and starts its rings while the
/// disk hangs must not make threads without end. All the rings of one volume, four times over.
const LEFT_MAX: u32 = 1024;

/// Waits for the disk, which has owed an answer since `since_ms`, for as long as that takes, on a thread of its own. Where the kernel refuses
/// the thread, or there are too many already, it waits here: late is better than lost.
pub(crate) fn leave<C: Channel>(
    core: &Arc<VolumeCore>,
    name: &str,
    channel: C,
    since_ms: Option<u64>,
    registered: Vec<(Ticket, SectorRange)>,
) {
    let operations = channel.in_flight();
    tracing::warn!(volume = name, operations, "the disk does not answer: what it has is left to it");
    core.facts.leave(since_ms);
    let ghost = Ghost { core: core.clone(), name: name.to_owned(), channel, registered };
    if core.facts.left_behind() > LEFT_MAX {
        return drop(ghost);
    }
    // A refused thread drops the closure, and the ghost waits in its own drop.
    if let Err(error) = std::thread::Builder::new().name("pcache-ghost".into()).spawn(move || drop(ghost)) {
        tracing::warn!(%error, "it was waited for instead");
    }
}

struct Ghost<C: Channel> {
    core: Arc<VolumeCore>,
    name: String,
    channel: C,
    registered: Vec<(Ticket, SectorRange)>,
}

impl<C: Channel> Drop for Ghost<C> {
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.channel.in_flight() > 0 {
            self.channel.wait(Duration::from_secs(60));
            self.channel.reap(&mut done);
            // Nobody waits for them; their buffers may go.
            done.clear();
        }
        for (ticket, range) in self.registered.drain(..) {
            self.core.stripes.remove(ticket, range);
        }
        self.core.wake_waiting();
        self.core.facts.came_back();
        tracing::info!(volume = self.name, "the disk has ended what was left to it");
    }
}
