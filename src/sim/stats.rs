//! What runs have done: an image counts only if the engine recovered it and every sector was compared.

use std::fmt;

use super::world::Event;

macro_rules! stats {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counts of one run, or of many.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Stats { $($(#[$doc])* pub $name: u64,)* }

        impl Stats {
            /// Adds another's counts.
            pub fn add(&mut self, other: &Stats) {
                $(self.$name += other.$name;)*
            }

            /// Names and values.
            pub fn fields(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name)),*]
            }
        }
    };
}

stats! {
    /// Crash images recovered and compared.
    images,
    /// Of these, images of a host crash.
    host_images,
    /// Of these, images of a crash inside recovery.
    recovery_images,
    /// Of these, images of a crash after a recovery.
    second_images,
    /// Images that were not judged because they were equal to another of the same instant.
    equal_images,
    /// Instants at which images were made.
    points,
    /// Of these, with so few pending lines that every subset of them was an image.
    exhausted_points,
    /// Instants before a store.
    cuts_store,
    /// Instants before a fence.
    cuts_fence,
    /// Instants before a `sync`.
    cuts_sync,
    /// Instants before a change of the memory's size.
    cuts_resize,
    /// Instants before a disk read.
    cuts_disk_read,
    /// Instants before a disk write.
    cuts_disk_write,
    /// Instants before a disk flush.
    cuts_disk_flush,
    /// Instants in the middle of a short transfer.
    cuts_disk_part,
    /// Instants before a disk's completion.
    cuts_disk_completion,
    /// Instants after an acknowledgement.
    cuts_acknowledgement,
    /// Instants between two calls.
    cuts_quiet,
    /// States of a disk alone that were judged.
    disks_alone,
    /// Of these, in strict order.
    alone_strict,
    /// Of these, in grouped order.
    alone_grouped,
    /// States of a disk alone in relaxed order, of which nothing is promised.
    alone_relaxed,
    /// Lives that ended in a crash.
    crashes,
    /// Lives that ended in order.
    clean_ends,
    /// Drains compared with the model.
    drains,
    /// Steps.
    steps,
    /// Reads completed and compared.
    reads,
    /// Writes acknowledged.
    writes,
    /// Zeroings acknowledged.
    zeroes,
    /// FLUSHes acknowledged.
    flushes,
    /// Requests that failed, by fault of a disk or of the guest.
    failed,
    /// Records committed.
    records,
    /// Segments reclaimed.
    reclaimed,
    /// Times as many segments were reclaimed as a cache has: its log has gone once around.
    wraps,
    /// Sectors evicted.
    evicted,
    /// Sectors relocated.
    relocated,
    /// Of these, dirty ones.
    relocated_dirty,
    /// Sectors written back.
    written_back,
    /// Epochs that reached the disk.
    epochs,
    /// Sectors filled.
    fills,
    /// Sectors written around the cache.
    bypassed,
    /// Sectors read from the cache.
    hits,
    /// Sectors read from the disk.
    misses,
    /// Rounds of write-back that failed.
    writeback_errors,
    /// Times a write waited for space.
    space_waits,
    /// Operations of a guest tried again after the disk had failed them.
    disk_retries,
    /// Sectors scrubbed.
    scrubbed,
    /// Shares that a volume was given for a life.
    shares_given,
    /// Shares that were refused because the cache could not keep them.
    shares_refused,
    /// Requests that limits held back.
    held_back,
    /// Audits of what the cache counts against what there is.
    audits,
    /// Requests submitted again to the next daemon.
    resubmitted,
    /// Images of a daemon's death and the host's before anything recovered.
    host_before_recovery,
    /// Images of a daemon's death and the host's inside the recovery.
    host_in_recovery,
    /// Images of a daemon's death and the host's right after the recovery.
    host_after_recovery,
    /// Times a guest turned its write cache on or off with requests under way.
    cache_toggles,
    /// Transfers of a disk that were short.
    short_transfers,
    /// Operations of a disk that took far longer than others.
    slow_ops,
    /// Times a disk did not answer for a while.
    stalls,
    /// Times a disk went away and came back.
    outages,
    /// Operations that failed on a disk that was away.
    failed_away,
    /// Reads that the cache had to answer while the disk was away.
    outage_hits,
    /// Sectors that failed flushes and returning disks have lost.
    lost_by_flush,
    /// Other disks refused in a disk's place.
    other_disks,
    /// Disks refused that had grown or shrunk.
    other_sizes,
    /// Disks refused that somebody else had written to.
    changed_disks,
    /// Copies of a disk taken for it.
    copied_disks,
    /// Starts without a disk refused.
    absent_disks,
    /// Host crashes after an orderly end.
    late_crashes,
    /// Volumes deleted, and made anew in their slot before another disk.
    deletes,
    /// Of these, with dirty data that was given up.
    deletes_of_dirty,
    /// Images of a crash inside a delete.
    delete_images,
    /// Redo areas applied to a disk whose cache was lost, each compared.
    redo_images,
    /// Changes of a volume's order under its guest.
    order_changes,
    /// Times the cache grew under its guests.
    growths,
    /// Times the cache shrank under its guests.
    shrinks,
    /// Changes of size that were called off, or cut off by the end of a life.
    resizes_undone,
    /// Groups applied by way of a redo area.
    groups,
    /// Of these, groups journaled while the one before went to the disk.
    groups_ahead,
    /// Images whose disks, those of a consistency group, were compared as one with the cache lost.
    disks_together,
    /// Of these, with a part of a group to be applied to more than one of them.
    joint_images,
}

impl Stats {
    /// Counts an instant of a run by what was about to happen.
    pub(super) fn count_cut(&mut self, event: Event) {
        *match event {
            Event::Store => &mut self.cuts_store,
            Event::Fence => &mut self.cuts_fence,
            Event::Sync => &mut self.cuts_sync,
            Event::Resize => &mut self.cuts_resize,
            Event::DiskRead => &mut self.cuts_disk_read,
            Event::DiskWrite => &mut self.cuts_disk_write,
            Event::DiskFlush => &mut self.cuts_disk_flush,
            Event::DiskPart => &mut self.cuts_disk_part,
            Event::DiskCompletion => &mut self.cuts_disk_completion,
        } += 1;
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.fields() {
            writeln!(f, "{name:>20} {value}")?;
        }
        Ok(())
    }
}
