//! A volume becomes larger while guests use it.
//!
//! A volume is as large as its disk. So its disk is grown, or has been grown by somebody else, and the
//! descriptor follows. It never becomes smaller: what a guest has written there would be gone.
//!
//! Steps, and what breaks if two are swapped:
//! 1. the descriptor says `next_sectors`, durably: from here on the disk may have either size, and a
//!    crash leaves a volume that the next attach takes with either;
//! 2. the disk is grown, durably. Before step 1, a crash would leave a disk of another size than its
//!    volume's, which is refused;
//! 3. the descriptor says `sectors`, durably and in both copies, as a step of the pair: a record of the
//!    new part that came first would be a key past the end of the volume;
//! 4. requests up to the new end are let in. Whoever serves the volume then tells its guest.
//!
//! On an error after step 1 the volume goes on with the size it had; asking again goes on from there.
//!
//! Who holds what: nothing that a guest needs. One caller at a time: `growing`, and in steps 1 and 3 the
//! descriptor's mutex and `VolumeCore::step` (`pair.rs`). Queues read the size once per request.

use std::sync::atomic::Ordering;

use super::attach::AttachError;
use super::env::Env;
use super::pair::{has_sidecar, note_identity};
use super::stripes::lock;
use super::volume::Volume;
use crate::backing::Backing;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::VOLUME_SECTORS_MAX;

/// Why a volume has the size it had.
#[derive(Debug, thiserror::Error)]
pub enum EnlargeError {
    /// A guest would lose what is behind the new end.
    #[error("it has {now} bytes and cannot become smaller, here {wanted}: a guest may have data there")]
    Smaller {
        /// Bytes it has.
        now: u64,
        /// Bytes that were asked for, or that its disk has.
        wanted: u64,
    },
    /// It would be larger or smaller than its disk.
    #[error("its disk has {disk} bytes: a volume is as large as its disk, here {wanted}")]
    NotTheDisk {
        /// Bytes of the disk.
        disk: u64,
        /// Bytes that were asked for.
        wanted: u64,
    },
    /// Not a number of blocks, or more than can be.
    #[error("{wanted} bytes are not possible: a multiple of {block}, at most {most}")]
    Impossible {
        /// Bytes that were asked for.
        wanted: u64,
        /// Bytes of a block.
        block: u64,
        /// Most bytes of a volume.
        most: u64,
    },
    /// It is not ours to change.
    #[error("it is served read-only: attach it again, and it has its disk's size")]
    ReadOnly,
    /// The cache no longer accepts writes.
    #[error("making the cache durable has failed before: it accepts no changes")]
    SyncFailed,
    /// The disk did not grow.
    #[error("its disk cannot be made {wanted} bytes large: {error}")]
    Disk {
        /// Bytes.
        wanted: u64,
        /// Why not.
        error: std::io::Error,
    },
    /// The descriptor could not be made durable.
    #[error(transparent)]
    Descriptor(#[from] AttachError),
}

impl<E: Env> Volume<E> {
    /// Makes the volume `bytes` large, and its disk if that is a regular file; without `bytes`, as large
    /// as its disk has become. Returns how large it is now; when that is more than before, its guest is
    /// to be told. Blocking.
    ///
    /// # Errors
    /// [`EnlargeError`]; the volume has the size it had.
    pub fn enlarge(&self, bytes: Option<u64>) -> Result<u64, EnlargeError> {
        let _alone = lock(&self.growing);
        if self.config.read_only {
            return Err(EnlargeError::ReadOnly);
        }
        if self.cache.has_failed() {
            return Err(EnlargeError::SyncFailed);
        }
        let now = self.sectors() * 512;
        let of_disk = |wanted| move |error| EnlargeError::Disk { wanted, error };
        let found = self.backing.measure().map_err(of_disk(now))?;
        let wanted = bytes.unwrap_or(found);
        if wanted < now || found < now {
            return Err(EnlargeError::Smaller { now, wanted: wanted.min(found) });
        }
        let (block, most) = (self.block_sectors() * 512, VOLUME_SECTORS_MAX * 512);
        if !wanted.is_multiple_of(block) || wanted > most {
            return Err(EnlargeError::Impossible { wanted, block, most });
        }
        if wanted < found {
            return Err(EnlargeError::NotTheDisk { disk: found, wanted });
        }
        if wanted > now {
            self.enlarge_to(wanted)?;
        }
        Ok(wanted)
    }

    fn enlarge_to(&self, bytes: u64) -> Result<(), EnlargeError> {
        let (core, cache) = (&*self.core, &self.cache);
        if !mutated(Mutant::GrownUnannounced) {
            cache.update_descriptor(core, |d| d.next_sectors = bytes / 512)?;
        }
        if let Err(error) = self.backing.grow(bytes) {
            // Nobody minds an announcement that stays; but nothing will come of it.
            if let Err(error) = cache.update_descriptor(core, |d| d.next_sectors = 0) {
                tracing::warn!(volume = self.name, %error, "a size that it does not get stays announced");
            }
            return Err(EnlargeError::Disk { wanted: bytes, error });
        }
        if mutated(Mutant::GrownUnnoted) {
            self.set_sectors(bytes / 512);
            return Ok(());
        }
        let identity = self.backing.identity();
        let wanted = has_sidecar(&lock(&core.descriptor).0);
        cache.step_pair(core, &self.backing, wanted, false, |d| {
            note_identity(d, &identity);
            (d.sectors, d.next_sectors) = (bytes / 512, 0);
        })?;
        // Losing one copy takes nothing back.
        cache.update_descriptor(core, |_| {})?;
        self.set_sectors(bytes / 512);
        Ok(())
    }

    /// Sectors that guests may use.
    pub(crate) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    fn set_sectors(&self, sectors: u64) {
        self.sectors.store(sectors, Ordering::Release);
    }
}
