//! Checkpoints: a disk is brought up to a moment and then kept still, and the disks of a consistency group
//! up to one moment of them all.
//!
//! A checkpoint is asked for in three steps, and what breaks if two are swapped:
//! 1. no round of any of the volumes begins any more ([`PREPARING`]), or one might take what is younger
//!    than the epoch that is chosen;
//! 2. the present epoch is closed: what was acknowledged before is in it, or in an older one, and what is
//!    sent after an acknowledgement is in a younger one;
//! 3. each volume learns which one it is, and rounds go on up to that.
//!
//! Laws:
//! - It is reached when everything up to that epoch is on the disk, flushed, and nothing is on its way
//!   there. From then on nothing is written until it is released, whatever becomes dirty, is called for,
//!   or presses.
//! - Volumes of one group count by one counter: no round of a member goes beyond the epoch, so when all
//!   have reached it their disks are one moment of the VM.
//! - Who is named by a group's round takes part in it: a round begun before step 1 has a target that is not
//!   beyond the epoch, and none of those that begin later has.

use super::super::super::env::Env;
use super::super::super::stripes::lock;
use super::super::super::volume::Volume;
use super::Writeback;
use crate::mutant::{Mutant, mutated};
use crate::sync::atomic::Ordering;

/// A checkpoint whose epoch is not known yet.
const PREPARING: u64 = u64::MAX;

impl<E: Env> Writeback<E> {
    /// Whether a checkpoint keeps the disk still, or is about to say how far rounds may go.
    pub(super) fn is_held(&self) -> bool {
        let (core, wishes) = (&self.volume.core, &self.volume.wishes);
        let wish = wishes.checkpoint.load(Ordering::SeqCst);
        if wish == 0 || wish == PREPARING {
            return wish == PREPARING;
        }
        let epoch = wish - 1;
        let is_there = || {
            let settled = core.tail.load(Ordering::SeqCst).max(core.settled.load(Ordering::SeqCst));
            settled >= epoch || core.is_clean()
        };
        let is_reached = !self.owes_part() && core.closed_epoch() >= epoch && is_there();
        if is_reached {
            // Whatever becomes dirty from here on is younger: so it stays reached.
            self.note_settled(epoch);
            wishes.reached.store(wish, Ordering::SeqCst);
        }
        is_reached && !mutated(Mutant::CheckpointForgotten)
    }

    /// Whether no round may begin. Asked with the plan locked, as [`Volume::begin_checkpoint`] sets it.
    pub(super) fn is_preparing(&self) -> bool {
        self.volume.wishes.checkpoint.load(Ordering::SeqCst) == PREPARING
    }

    /// The last epoch that may go to the disk now.
    pub(super) fn epoch_bound(&self) -> u64 {
        match self.volume.wishes.checkpoint.load(Ordering::SeqCst) {
            0 => u64::MAX,
            PREPARING => 0,
            _ if mutated(Mutant::CheckpointUnbounded) => u64::MAX,
            wish => wish - 1,
        }
    }
}

impl<E: Env> Volume<E> {
    /// Asks for a checkpoint of the disks of `volumes`: one volume, or all attached ones of a consistency
    /// group. Everything acknowledged before this call goes to the disks, and then nothing until
    /// [`Volume::release_checkpoint`]. Meanwhile the guest goes on as long as there is space. In `strict`
    /// and `grouped` order each disk then shows exactly one moment of the guest's, and those of a group
    /// together.
    pub fn begin_checkpoint<'a>(volumes: impl IntoIterator<Item = &'a Self, IntoIter: Clone>) {
        let volumes = volumes.into_iter();
        for volume in volumes.clone() {
            // Whoever gathers a round holds this from its look at the wish to the end of the round's.
            let _plan = lock(&volume.core.plan);
            volume.wishes.reached.store(0, Ordering::SeqCst);
            volume.wishes.checkpoint.store(PREPARING, Ordering::SeqCst);
        }
        // One counter for all of them.
        let Some(any) = volumes.clone().next() else { return };
        any.core.raise_epoch();
        let epoch = any.core.epoch() - 1;
        for volume in volumes {
            volume.wishes.checkpoint.store(epoch + 1, Ordering::SeqCst);
            volume.core.writeback.raise();
        }
    }

    /// Whether the checkpoint is reached and the disk is still.
    pub fn is_at_checkpoint(&self) -> bool {
        let wish = self.wishes.checkpoint.load(Ordering::SeqCst);
        wish > 0 && self.wishes.reached.load(Ordering::SeqCst) == wish
    }

    /// Ends a checkpoint, reached or not.
    pub fn release_checkpoint(&self) {
        self.wishes.checkpoint.store(0, Ordering::SeqCst);
        self.core.writeback.raise();
    }
}
