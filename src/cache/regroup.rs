//! Attach of a volume whose groups lie in a redo area: what an earlier life has left there comes first. Of
//! a member of a consistency group that waits until all of them are there (`worker/writeback/together.rs`).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::attach::{AttachError, AttachOptions};
use super::core::Cache;
use super::env::Env;
use super::membership::Membership;
use super::redo::{Owner, Redo, RedoError};
use super::stripes::lock;
use super::volume::{Order, VolumeCore};
use crate::backing::Backing;
use crate::onmedia::Uuid;

impl<E: Env> Cache<E> {
    /// Opens the redo area and applies the group it may hold, in whatever order the volume goes on.
    pub(super) fn open_redo(
        &self,
        core: &VolumeCore,
        options: &AttachOptions<E>,
        membership: Membership,
    ) -> Result<Option<Arc<Redo<E::Backing>>>, AttachError> {
        let descriptor = lock(&core.descriptor).0.clone();
        let Some(disk) = &options.redo else {
            if options.order == Order::Grouped {
                return Err(AttachError::NoRedo(options.name.clone()));
            }
            // A group's sectors are dirty: who only reads has them from the cache.
            if descriptor.redo_open && !options.force_identity && !options.read_only {
                return Err(AttachError::RedoMissing(options.name.clone()));
            }
            return Ok(None);
        };
        let redo = Redo::open(disk.clone())?.beside(&*options.backing);
        let owner = Owner {
            cache_uuid: self.media.uuid,
            volume_uuid: descriptor.uuid,
            incarnation: core.incarnation,
            backing_size: options.backing.geometry().size,
        };
        redo.judge(&owner, core.tail.load(Ordering::SeqCst))?;
        redo.check_room(self.piece_sectors_max() * 512)?;
        if !options.read_only && redo.is_of(&owner) {
            redo.mend()?;
        }
        let is_joint = redo.header().group_uuid == descriptor.group_uuid && membership == Membership::Stays;
        if redo.is_committed() && is_joint && descriptor.group_uuid != Uuid::default() {
            redo.keep_pending()?;
        } else if redo.is_committed() {
            let sectors = redo.apply(&*options.backing).map_err(|error| match error {
                RedoError::Disk { path, error } => AttachError::Disk { path, error },
                error => AttachError::Redo(error),
            })?;
            tracing::info!(volume = options.name, sectors, "applied the group that was in the redo area");
        }
        if options.order == Order::Grouped && !redo.is_of(&owner) {
            redo.claim(&owner)?;
        }
        Ok(Some(Arc::new(redo)))
    }
}
