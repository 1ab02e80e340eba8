//! How a volume comes into a consistency group and out of it, at attach and while it runs; the laws are
//! in `consistency.rs`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::attach::{AttachError, AttachOptions};
use super::consistency::{ConsistencyGroup, Epochs, MEMBERS_MAX};
use super::core::Cache;
use super::env::Env;
use super::record::KEYS_MAX;
use super::redo::{Redo, RedoError};
use super::stripes::lock;
use super::volume::{Mode, Order, Volume, VolumeCore};
use crate::onmedia::{PAGE, RedoEntry, Uuid, pad};

/// Whether options that name a group are possible.
pub(super) fn judge_group<E: Env>(options: &AttachOptions<E>) -> Result<(), AttachError> {
    let Some(group) = &options.group else { return Ok(()) };
    let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if group.is_empty() || group.len() > 64 || !group.chars().all(good) {
        return Err(AttachError::BadGroup(group.clone()));
    }
    if options.order == Order::Relaxed || options.mode != Mode::Writeback {
        return Err(AttachError::GroupUnordered { name: options.name.clone(), group: group.clone() });
    }
    Ok(())
}

/// What the attachment of a volume means for its membership.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Membership {
    /// It is in no group, or nothing is to change about that.
    AsItIs,
    /// It goes on in the group that the media names.
    Stays,
    /// It is to be in a group, once it has nothing dirty.
    Joins,
}

impl<E: Env> Cache<E> {
    /// The counter of the group of this name, if there is one.
    fn find_group(&self, name: &str) -> Option<Arc<Epochs>> {
        let volumes = self.all_volumes();
        let member = volumes.iter().find(|v| v.group().is_some_and(|group| group.name == name))?;
        Some(member.counting.epochs().clone())
    }

    /// Takes a volume that is to be served otherwise than its group out of that, durably, and says what
    /// it is to be. Nothing of it is under way.
    pub(super) fn begin_membership(
        &self,
        core: &Arc<VolumeCore>,
        options: &AttachOptions<E>,
    ) -> Result<Membership, AttachError> {
        if options.read_only {
            // Nothing is written back: whose turn it would be does not change.
            return Ok(Membership::AsItIs);
        }
        if let Some(name) = &options.group {
            self.judge_fellows(core, name, options)?;
        }
        let was_order = lock(&core.descriptor).0.order;
        let is_same = |group: &ConsistencyGroup| {
            Some(&group.name) == options.group.as_ref() && was_order == options.order
        };
        match core.group() {
            Some(group) if is_same(group) => return Ok(Membership::Stays),
            Some(_) => self.leave_group(core)?,
            None => {}
        }
        match options.group {
            Some(_) => Ok(Membership::Joins),
            None => {
                core.count_alone();
                Ok(Membership::AsItIs)
            }
        }
    }

    fn judge_fellows(
        &self,
        core: &VolumeCore,
        group: &str,
        options: &AttachOptions<E>,
    ) -> Result<(), AttachError> {
        let Some(epochs) = self.find_group(group) else { return Ok(()) };
        let fellows = epochs.group.as_ref().map(|group| group.fellows(core)).unwrap_or_default();
        let group = group.to_owned();
        if fellows.len() >= MEMBERS_MAX {
            return Err(AttachError::GroupFull { group, members: fellows.len() });
        }
        let served = fellows.iter().filter(|fellow| fellow.attached.load(Ordering::SeqCst));
        for fellow in served {
            let descriptor = lock(&fellow.descriptor).0.clone();
            if descriptor.order != options.order {
                let (name, fellow) = (options.name.clone(), descriptor.name_text().into_owned());
                return Err(AttachError::GroupOrder { name, group, fellow, order: descriptor.order });
            }
        }
        Ok(())
    }

    /// Ends a volume's membership, durably. No round of its write-back is under way.
    pub(crate) fn leave_group(&self, core: &VolumeCore) -> Result<(), AttachError> {
        let Some(group) = core.group() else { return Ok(()) };
        let (volume, group) = (core.descriptor_name(), group.name.clone());
        self.update_descriptor(core, |d| (d.group_uuid, d.group_name) = (Uuid::default(), [0; 64]))?;
        core.leave();
        match core.is_clean() {
            true => tracing::info!(volume, group, "the volume has left its consistency group"),
            false => tracing::warn!(
                volume,
                group,
                "the volume has left its consistency group with dirty data: from here on its disk and those \
                 of the others do not stand at one point"
            ),
        }
        Ok(())
    }

    /// Takes a volume that is about to be detached with what it has dirty out of its group, durably: the
    /// others need not wait until it is back. No worker serves it, and no queue is open.
    ///
    /// # Errors
    /// The media failed; it is a member still.
    pub fn leave_for_good(&self, volume: &Volume<E>) -> Result<(), AttachError> {
        self.leave_group(&volume.core)
    }

    /// Makes a volume a member of the group of this name, durably. It has nothing dirty.
    pub(super) fn join_group(&self, core: &Arc<VolumeCore>, name: &str) -> Result<(), AttachError> {
        let epochs = match self.find_group(name) {
            Some(epochs) => epochs,
            None => {
                let mut uuid = Uuid::default();
                getrandom::fill(&mut uuid)
                    .map_err(|e| AttachError::Disk { path: "getrandom".into(), error: e.into() })?;
                Arc::new(Epochs::new(1, Some(ConsistencyGroup::new(uuid, name.to_owned()))))
            }
        };
        let uuid = epochs.group.as_ref().map_or(Uuid::default(), |group| group.uuid);
        let text = pad(name).ok_or_else(|| AttachError::BadGroup(name.to_owned()))?;
        self.update_descriptor(core, |d| (d.group_uuid, d.group_name) = (uuid, text))?;
        core.join(&epochs);
        Ok(())
    }

    /// From here on the other members may count on this one's answers.
    pub(super) fn end_membership(&self, volume: &Volume<E>, is_member: bool) {
        let core = &volume.core;
        let Some(group) = core.group().filter(|_| is_member) else { return };
        let header = volume.redo.as_ref().map(|redo| redo.header()).filter(|h| {
            (h.group_uuid, h.volume_uuid, h.incarnation) == (group.uuid, core.uuid, core.incarnation)
        });
        *lock(&core.area) = Some(header.map_or(0, |header| header.epoch));
        group.wake();
    }

    /// What one of so many queues may put into an epoch, so that every epoch fits the area.
    pub(super) fn epoch_share(
        &self,
        redo: &Redo<E::Backing>,
        block: u32,
        queues: u16,
    ) -> Result<EpochShare, RedoError> {
        let queues = u64::from(queues.max(1));
        let slack = 2 * (RedoEntry::SIZE as u64 + redo.block);
        let unaligned = if redo.block > u64::from(block) { 3 * redo.block } else { 0 };
        let keys = KEYS_MAX as u64 * (2 * RedoEntry::SIZE as u64 + unaligned);
        // A record takes at least one piece, and ends with the first that goes over its limit.
        let piece = self.piece_sectors_max() * 512;
        redo.check_room((2 * piece + keys) * queues + slack - 2 * PAGE as u64)?;
        let share = (redo.capacity() - slack) / queues;
        Ok(EpochShare { share, payload: share - piece - keys })
    }
}

/// What one queue may put into an epoch, and into a record.
#[derive(Clone, Copy, Debug)]
pub(super) struct EpochShare {
    /// Bytes of the redo area.
    share: u64,
    /// Bytes of payload.
    payload: u64,
}

impl<E: Env> Volume<E> {
    /// From here on no epoch outgrows the redo area.
    pub(super) fn bound_epochs(&self, EpochShare { share, payload }: EpochShare) {
        self.epoch_payload.store(payload, Ordering::SeqCst);
        self.epoch_share.store(share, Ordering::SeqCst);
    }

    /// Most payload of a record, as far as an epoch bounds it.
    pub(super) fn epoch_payload(&self) -> u32 {
        u32::try_from(self.epoch_payload.load(Ordering::Relaxed)).unwrap_or(u32::MAX)
    }

    /// The name of its consistency group, if it is in one.
    pub fn group(&self) -> Option<String> {
        self.core.group().map(|group| group.name.clone())
    }

    /// The other members of its group, attached or not: their names, and whether they have nothing dirty.
    pub fn fellows(&self) -> Vec<(String, bool)> {
        let fellows = self.core.group().map(|group| group.fellows(&self.core)).unwrap_or_default();
        fellows.iter().map(|fellow| (fellow.descriptor_name(), fellow.is_clean())).collect()
    }
}
