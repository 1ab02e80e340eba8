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
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.fields() {
            writeln!(f, "{name:>18} {value}")?;
        }
        Ok(())
    }
}
