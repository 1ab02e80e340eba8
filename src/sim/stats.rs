//! What runs have done: an image counts only if the engine recovered it and every sector was compared.

use std::fmt;

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
    /// Instants at which images were made.
    points,
    /// States of a disk alone that were judged.
    disks_alone,
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
    /// Sectors evicted.
    evicted,
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
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.fields() {
            writeln!(f, "{name:>18} {value}")?;
        }
        Ok(())
    }
}
