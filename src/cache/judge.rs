//! Whether a volume and a disk go together, judged before anything is written.
//!
//! [`would_attach`] asks it of media that are not open yet: opening a cache counts a start and
//! recovers, so a start that is going to be refused is better refused before. [`Cache::attach`]
//! asks the same again, of what recovery found.
//!
//! [`Cache::attach`]: super::Cache::attach

use std::sync::Arc;

use super::attach::{AttachError, AttachOptions};
use super::core::load_media;
use super::env::Env;
use super::media::Media;
use super::volume::Mode;
use crate::backing::{Backing, BackingIdentity};
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{VolumeDescriptor, VolumeState, unpad};
use crate::pmem::{MediaClass, Pmem};

/// Whether [`Cache::attach`](super::Cache::attach) would refuse these options on this media, as far
/// as the metadata tells. Reads only.
///
/// # Errors
/// What `attach` would say; [`AttachError::Cache`] if this is not a cache that can be opened.
pub fn would_attach<E: Env>(pmem: &Arc<E::Pmem>, options: &AttachOptions<E>) -> Result<(), AttachError> {
    judge_options(pmem.class(), options)?;
    let media = load_media(Arc::clone(pmem))?;
    let Some(descriptor) = find(&media, &options.name) else { return Ok(()) };
    judge_identity(&descriptor, &*options.backing, &options.backing.identity(), options)?;
    if descriptor.damaged && !options.accept_loss && !options.read_only {
        return Err(AttachError::Damaged(options.name.clone()));
    }
    Ok(())
}

/// Whether media that are not open yet hold a volume of this name. Reads only; no if they are no
/// cache.
pub fn has_volume<P: Pmem>(pmem: &Arc<P>, name: &str) -> bool {
    load_media(Arc::clone(pmem)).is_ok_and(|media| find(&media, name).is_some())
}

/// The descriptor of the volume of this name.
fn find<P: Pmem>(media: &Media<P>, name: &str) -> Option<VolumeDescriptor> {
    (0..media.geometry.volume_slots).find_map(|slot| {
        let copies = media.load(
            |copy| media.geometry.descriptor(slot, copy),
            |bytes| VolumeDescriptor::decode(bytes, &media.uuid, slot),
        );
        copies.newest.filter(|d| d.state == VolumeState::InUse && unpad(&d.name) == name.as_bytes())
    })
}

/// Whether the options are possible with this disk and this media. Returns the block size to offer.
pub(super) fn judge_options<E: Env>(
    class: MediaClass,
    options: &AttachOptions<E>,
) -> Result<u32, AttachError> {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if options.name.is_empty() || options.name.len() > 64 || !options.name.chars().all(good) {
        return Err(AttachError::BadName(options.name.clone()));
    }
    let geometry = options.backing.geometry();
    if geometry.read_only && !options.read_only {
        return Err(AttachError::ReadOnlyDisk(options.backing.identity().path));
    }
    let keeps_dirty_data = options.mode == Mode::Writeback && !options.read_only;
    if class == MediaClass::Volatile && keeps_dirty_data && !options.allow_volatile {
        return Err(AttachError::Volatile(class));
    }
    let block = options.block_size.unwrap_or(geometry.logical_block);
    if ![512, 4096].contains(&block) || block < geometry.logical_block {
        return Err(AttachError::BlockSize { asked: block, disk: geometry.logical_block });
    }
    Ok(block)
}

/// Whether the disk is the volume's own, unchanged since the last clean detach.
pub(super) fn judge_identity<B: Backing>(
    descriptor: &VolumeDescriptor,
    backing: &B,
    identity: &BackingIdentity,
    options: &AttachOptions<impl Env>,
) -> Result<(), AttachError> {
    let (name, path) = (options.name.clone(), identity.path.clone());
    if identity.size / 512 != descriptor.sectors {
        let expected = descriptor.sectors * 512;
        return Err(AttachError::SizeDiffers { name, path, expected, found: identity.size });
    }
    if options.force_identity || mutated(Mutant::WrongDiskAccepted) {
        return Ok(());
    }
    if descriptor.fingerprint_valid {
        // Content speaks louder than names: a moved or copied disk is welcome if it is unchanged.
        let fingerprint =
            backing.fingerprint().map_err(|error| AttachError::Disk { path: path.clone(), error })?;
        if fingerprint == descriptor.fingerprint {
            return Ok(());
        }
    }
    let same = descriptor.backing_kind == identity.kind as u32
        && descriptor.backing_device == identity.device
        && descriptor.backing_inode == identity.inode;
    if !same {
        let was = String::from_utf8_lossy(unpad(&descriptor.path)).into_owned();
        return Err(AttachError::OtherDisk { name, path, was });
    }
    if descriptor.fingerprint_valid {
        return Err(AttachError::ContentChanged { name, path });
    }
    Ok(())
}
