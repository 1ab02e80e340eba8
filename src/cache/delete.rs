//! Delete: a volume is gone, and nothing of it ever shows in another.
//!
//! Laws:
//! - Only a detached volume is deleted, and one with dirty data only when told to lose that.
//! - Both copies of its descriptor say so, durably one after the other, before any of its segments
//!   can be freed: neither a crash nor the loss of a page brings the volume back over segments that
//!   are somebody else's by then. The first copy says `deleting`; a start that finds that as the
//!   newest writes the second, `empty`.
//! - Its segments name an incarnation that no volume has again, so none of their records count for
//!   whoever gets the slot or the name next. They are clean, nobody's, and go first in reclaim.
//! - A failure leaves the volume as it was, or deleted after the next start.

use std::sync::atomic::Ordering;

use super::attach::AttachError;
use super::core::{Cache, write};
use super::env::Env;
use super::stripes::lock;
use super::volume::VolumeCore;
use crate::onmedia::{VolumeDescriptor, VolumeState};

/// Why a volume was not deleted.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// There is none of that name.
    #[error("the cache has no volume `{0}`")]
    NoVolume(String),
    /// It is attached.
    #[error("volume `{0}` is attached: stop serving it first")]
    InUse(String),
    /// It has dirty data.
    #[error("volume `{0}` has data that is not on its disk: drain it, or say that this may be lost")]
    Dirty(String),
    /// The descriptor could not be made durable.
    #[error(transparent)]
    Media(#[from] AttachError),
}

impl<E: Env> Cache<E> {
    /// Deletes a detached volume. No worker may serve it any more.
    ///
    /// On return it is durably gone and its slot is free; its segments are freed by the housekeeper.
    ///
    /// # Errors
    /// [`DeleteError`]; only after `Media` may the volume be gone, at the next start.
    pub fn delete_volume(&self, name: &str, lose_dirty_data: bool) -> Result<(), DeleteError> {
        let core = self.find_volume(name).ok_or_else(|| DeleteError::NoVolume(name.to_owned()))?;
        if core.attached.swap(true, Ordering::SeqCst) {
            return Err(DeleteError::InUse(name.to_owned()));
        }
        let deleted = self.delete_core(name, &core, lose_dirty_data);
        if deleted.is_err() {
            core.attached.store(false, Ordering::SeqCst);
        }
        deleted
    }

    fn delete_core(&self, name: &str, core: &VolumeCore, lose_dirty_data: bool) -> Result<(), DeleteError> {
        let loses = !core.is_clean() || core.damaged.load(Ordering::Relaxed);
        if loses && !lose_dirty_data {
            return Err(DeleteError::Dirty(name.to_owned()));
        }
        self.update_descriptor(core, |d| d.state = VolumeState::Deleting)?;
        self.finish_delete(core)?;
        // From here on nobody finds it: what its segments hold is nobody's.
        write(&self.volumes).remove(&core.incarnation);
        core.leave();
        for stream in core.all_streams() {
            self.close_segment(&mut lock(stream));
        }
        for segment in &self.segments {
            if segment.owner.load(Ordering::Relaxed) == core.incarnation {
                segment.live.store(0, Ordering::Relaxed);
            }
        }
        self.housekeeper.raise();
        Ok(())
    }

    /// The second step of a delete: the slot is empty.
    pub(crate) fn finish_delete(&self, core: &VolumeCore) -> Result<(), AttachError> {
        self.update_descriptor(core, |d| {
            *d = VolumeDescriptor { sequence: d.sequence, ..VolumeDescriptor::empty(d.cache_uuid, d.slot) };
        })
    }
}
