//! What has happened, counted where it happens and summed when somebody asks.
//!
//! Each queue has a line of its own, so counting costs an uncontended add.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($(#[doc = $doc:literal] $name:ident,)*) => {
        /// A snapshot; all since the volume was first attached in this life of the cache.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counters { $(#[doc = $doc] pub $name: u64,)* }

        impl Counters {
            /// Names and values, in a fixed order.
            pub fn fields(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name)),*]
            }

            /// What each counts, in the order of [`Counters::fields`].
            pub fn descriptions() -> Vec<&'static str> {
                vec![$($doc.trim_ascii()),*]
            }
        }

        /// The live counters of one writer.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub(crate) struct Tally { $(pub $name: AtomicU64,)* }

        impl Tally {
            /// Adds these to `sum`.
            pub fn add_to(&self, sum: &mut Counters) {
                $(sum.$name += self.$name.load(Ordering::Relaxed);)*
            }
        }
    };
}

counters! {
    /// Read requests.
    reads,
    /// Sectors read from the cache.
    read_hit_sectors,
    /// Sectors read from the backing disk for the guest.
    read_miss_sectors,
    /// Read requests answered by the cache alone.
    read_hits,
    /// Read requests that needed the backing disk.
    read_misses,
    /// Write requests.
    writes,
    /// Sectors written by the guest.
    write_sectors,
    /// Sectors written around the cache.
    bypass_sectors,
    /// FLUSH requests.
    flushes,
    /// DISCARD and WRITE_ZEROES requests.
    discards,
    /// Sectors discarded or zeroed by the guest.
    discard_sectors,
    /// Requests that ended in an error.
    errors,
    /// Requests that were held back because a limit of the volume's was used up.
    limit_waits,
    /// Time that requests were held back by limits on their number, in microseconds.
    limit_iops_wait_us,
    /// Time that requests were held back by limits on their bytes, in microseconds.
    limit_bytes_wait_us,
    /// Time that writes waited for the pace of the disk, in microseconds, each queue's added up.
    pace_wait_us,
    /// Time that writes waited for space, in microseconds, each queue's added up.
    space_wait_us,
    /// Times a write waited because the space fills up faster than the disk takes it.
    pace_waits,
    /// Operations of queues that the backing disk failed.
    disk_errors,
    /// Operations of queues tried again because the backing disk failed them.
    disk_retries,
    /// Requests ended with an error because the backing disk owed them for too long.
    deadline_errors,
    /// Writes turned away because the backing disk fails and the policy says so.
    turned_away,
    /// Records committed.
    records,
    /// Sectors filled after a miss.
    fill_sectors,
    /// Sectors read from the disk that were not to be cached: read in one go beyond the cutoff, or not admitted.
    unadmitted_sectors,
    /// Fills dropped because something overlapped, or there was no space.
    fills_dropped,
    /// Times a write had to wait for space.
    space_waits,
    /// Checksum mismatches and poison met.
    checksum_errors,
    /// Sectors that became dirty: written, discarded or zeroed in the cache, and not yet on the disk.
    dirtied_sectors,
    /// Dirty sectors that became clean because the backing disk has them.
    cleaned_sectors,
    /// Dirty sectors that were written anew before they became clean.
    coalesced_sectors,
    /// Dirty sectors that were discarded or zeroed before they became clean.
    discarded_dirty_sectors,
    /// Dirty sectors given up because the cache has damaged them.
    lost_dirty_sectors,
    /// Sectors written back to the backing disk.
    written_back_sectors,
    /// Writes sent to the backing disk by write-back.
    writeback_ops,
    /// Flushes sent to the backing disk by write-back.
    writeback_flushes,
    /// Groups of epochs applied by way of the redo area.
    groups,
    /// Of these, groups that were journaled while the one before went to the disk.
    groups_ahead,
    /// How old the disk alone is, in milliseconds; 0 where nothing is dirty. Not a sum.
    lag_ms,
    /// Writes of payload and tables to the redo area.
    redo_ops,
    /// Bytes of these.
    redo_bytes,
    /// Write-back rounds that failed.
    writeback_errors,
    /// Segments reclaimed.
    reclaimed,
    /// Clean sectors evicted by reclaim.
    evicted_sectors,
    /// Sectors copied to another segment by reclaim, because they were read or are dirty.
    relocated_sectors,
    /// Of these, dirty ones.
    relocated_dirty_sectors,
    /// Sectors read by scrubbing.
    scrubbed_sectors,
    /// Damaged clean sectors dropped by scrubbing, durably: the disk has them.
    scrub_healed_sectors,
    /// Damaged dirty sectors found by scrubbing: write-back lists them as lost.
    scrub_dirty_sectors,
    /// Dirty bytes now.
    dirty_bytes,
    /// Bytes mapped by the index now.
    cached_bytes,
    /// Bytes of the cache's segments that the volume holds now.
    held_bytes,
    /// Bytes it is entitled to when all volumes want what they may have, by minimum, maximum and weight.
    share_bytes,
    /// Sectors that are lost now: they answer with an error until they are overwritten.
    lost_sectors,
    /// Free segments of the cache now.
    free_segments,
    /// The epoch now being written.
    epoch,
    /// The highest epoch wholly on the backing disk.
    tail_epoch,
}

/// A word that queues change at every record, on a line of its own: what else a volume has is read at
/// every request, and would have to be fetched again from whoever changed the word.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Apart<T>(pub T);

impl<T> std::ops::Deref for Apart<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// Adds `n`, relaxed: counters order nothing.
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}
