//! Consistency groups: volumes of one VM whose disks, with the cache lost, stand at one common point.
//!
//! Why: a database keeps its log on one disk and its tables on another. Each disk alone may be a
//! consistent older state, and the two of different moments rubbish all the same.
//!
//! How: the volumes of a group count epochs by one counter, and write-back of none of them goes ahead
//! of another (`worker/writeback/together.rs`). What is durable of a group is its UUID and name in the
//! descriptors of its members; the rest follows from those.
//!
//! Laws:
//! - One counter: a record of a member takes its epoch from it as the records of a single volume do, so
//!   what any member acknowledged before a FLUSH of any other is in a lower epoch than what any of them
//!   begins after it. Nothing shared is written per request: the counter's line changes once an epoch.
//! - Epoch *e* is closed when no queue of any member announces a number ≤ *e*.
//! - A volume becomes a member with nothing dirty, and with a counter that is above all it ever used:
//!   no older data of its own can come to stand beside the others' newer.
//! - Who is a member is told by the media, attached or not: after a crash a member that is not there yet
//!   and has dirty data holds up the others, or they would pass it. It holds up nothing else of theirs,
//!   and nobody's FLUSH waits for another's disk.
//! - Leaving is durable before anything of the leaver is written ahead of the others. One that leaves
//!   with dirty data keeps it, and its own order; the point that its disk shares with theirs ends there,
//!   and to come back it is drained first.
//! - Which counter a volume goes by changes only while it is detached. One that leaves under a running
//!   guest goes on with the group's: an epoch that ends early is as legal as one at a FLUSH.

use std::sync::{Arc, OnceLock, Weak};

use super::stripes::lock;
use super::volume::VolumeCore;
use super::worker::Joint;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{Key, REDO_MEMBERS_MAX, RedoEntry, Uuid};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering, fence};

/// Most volumes of a group: as many as a redo header names.
pub const MEMBERS_MAX: usize = REDO_MEMBERS_MAX;

/// By what one volume, or all members of a group, count epochs.
#[derive(Debug)]
pub(crate) struct Epochs {
    /// The epoch commits are stamped with now.
    now: AtomicU64,
    /// Highest epoch stamped on a dirty record of anybody who counts by this.
    stamped: AtomicU64,
    /// The group whose counter it is.
    pub group: Option<ConsistencyGroup>,
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct ConsistencyGroup {
    pub uuid: Uuid,
    pub name: String,
    members: Mutex<Vec<Weak<VolumeCore>>>,
    /// The round in `grouped` order that all of them are in.
    pub joint: Mutex<Joint>,
    /// The highest epoch that somebody waits for the others to have settled.
    pub called: AtomicU64,
}

impl Epochs {
    /// A counter that begins at `now`.
    pub fn new(now: u64, group: Option<ConsistencyGroup>) -> Self {
        Self { now: AtomicU64::new(now), stamped: AtomicU64::new(0), group }
    }

    /// The present epoch.
    pub fn now(&self) -> u64 {
        self.now.load(Ordering::SeqCst)
    }

    /// From here on the present epoch is at least `epoch`.
    pub fn raise_to(&self, epoch: u64) {
        self.now.fetch_max(epoch, Ordering::SeqCst);
    }

    /// A dirty record is about to be stamped with `epoch`.
    pub fn stamp(&self, epoch: u64) {
        // A line that all queues read: written once an epoch.
        if self.stamped.load(Ordering::SeqCst) < epoch {
            self.stamped.fetch_max(epoch, Ordering::SeqCst);
        }
    }

    /// Begins a new epoch if anything was stamped with the present one. What completed before this
    /// call is in an epoch below the new one.
    pub fn raise(&self) {
        let now = self.now();
        fence(Ordering::SeqCst);
        if self.stamped.load(Ordering::SeqCst) >= now {
            // Losing the race means that somebody else has raised it since: as good.
            _ = self.now.compare_exchange(now, now + 1, Ordering::SeqCst, Ordering::SeqCst);
        }
    }
}

impl ConsistencyGroup {
    /// A group without members.
    pub fn new(uuid: Uuid, name: String) -> Self {
        let (members, joint) = (Mutex::default(), Mutex::default());
        Self { uuid, name, members, joint, called: AtomicU64::new(0) }
    }

    /// Its members, attached or not.
    pub fn members(&self) -> Vec<Arc<VolumeCore>> {
        lock(&self.members).iter().filter_map(Weak::upgrade).collect()
    }

    /// Its members but one.
    pub fn fellows(&self, of: &VolumeCore) -> Vec<Arc<VolumeCore>> {
        let mut members = self.members();
        members.retain(|member| member.incarnation != of.incarnation);
        members
    }

    /// Wakes the write-back of all members.
    pub fn wake(&self) {
        self.members().iter().for_each(|member| member.writeback.raise());
    }
}

/// The counter that a volume goes by, and those it went by before: read without a lock, replaced
/// only while the volume is detached.
#[derive(Debug)]
pub(crate) struct Counting {
    epochs: Arc<Epochs>,
    next: OnceLock<Box<Counting>>,
}

impl Counting {
    pub fn new(epochs: Arc<Epochs>) -> Self {
        Self { epochs, next: OnceLock::new() }
    }

    fn last(&self) -> &Self {
        let mut last = self;
        while let Some(next) = last.next.get() {
            last = next;
        }
        last
    }

    /// The counter.
    pub fn epochs(&self) -> &Arc<Epochs> {
        &self.last().epochs
    }

    /// Goes by `epochs` from here on.
    fn replace(&self, epochs: Arc<Epochs>) {
        let is_set = self.last().next.set(Box::new(Self::new(epochs))).is_ok();
        assert!(is_set, "one thread attaches a volume at a time");
    }
}

impl VolumeCore {
    /// The group it is a member of.
    pub fn group(&self) -> Option<&ConsistencyGroup> {
        let group = self.counting.epochs().group.as_ref()?;
        self.is_member.load(Ordering::SeqCst).then_some(group)
    }

    /// Makes it a member of the group that counts by `epochs`. It has nothing dirty, or has been a
    /// member before, and no queue is open.
    pub fn join(self: &Arc<Self>, epochs: &Arc<Epochs>) {
        let group = epochs.group.as_ref().expect("a group's counter");
        if Arc::ptr_eq(self.counting.epochs(), epochs) && self.is_member.load(Ordering::SeqCst) {
            return;
        }
        // Before any queue can announce: what it stamps is above all it ever stamped.
        epochs.raise_to(self.epoch());
        let epochs = match mutated(Mutant::EpochNotShared) {
            true => {
                let twin = ConsistencyGroup::new(group.uuid, group.name.clone());
                &Arc::new(Epochs::new(self.epoch(), Some(twin)))
            }
            false => epochs,
        };
        let group = epochs.group.as_ref().expect("a group's counter");
        if !Arc::ptr_eq(self.counting.epochs(), epochs) {
            self.counting.replace(epochs.clone());
        }
        lock(&group.members).push(Arc::downgrade(self));
        self.is_member.store(true, Ordering::SeqCst);
    }

    /// Ends its membership, once that is durable. No round of its write-back is under way.
    pub fn leave(&self) {
        let Some(group) = self.counting.epochs().group.as_ref() else { return };
        if self.is_member.swap(false, Ordering::SeqCst) {
            lock(&group.members).retain(|member| {
                member.upgrade().is_some_and(|member| member.incarnation != self.incarnation)
            });
            lock(&group.joint).leave(self.incarnation);
            group.wake();
        }
    }

    /// Counts for itself again, after it has left and before it is attached.
    pub fn count_alone(&self) {
        if self.counting.epochs().group.is_some() && !self.is_member.load(Ordering::SeqCst) {
            self.counting.replace(Arc::new(Epochs::new(self.epoch(), None)));
        }
    }

    /// Whether anything of an epoch up to `upto`, which is closed, may be missing on its disk.
    pub fn owes(&self, upto: u64) -> bool {
        if mutated(Mutant::MemberForgotten) && lock(&self.area).is_none() {
            return false;
        }
        let settled = self.settled.load(Ordering::SeqCst).max(self.tail.load(Ordering::SeqCst));
        settled < upto && !self.is_clean()
    }
}

/// What the keys of one record need at most of a redo area, beside what others need.
///
/// A key that is cut later leaves two pieces, each with its entry; where it does not begin and end with
/// a block of the disk, each of these may also take a block more.
pub(crate) fn redo_need(keys: &[Key], block: u64) -> u64 {
    let need = |key: &Key| {
        let range = key.range();
        let bytes = if key.kind.has_payload() { range.len * 512 } else { 0 };
        let is_whole = (range.start * 512).is_multiple_of(block) && (range.len * 512).is_multiple_of(block);
        bytes.next_multiple_of(block) + 2 * (RedoEntry::SIZE as u64 + if is_whole { 0 } else { block })
    };
    keys.iter().map(need).sum()
}
