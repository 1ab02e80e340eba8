//! Brings what a cache holds for a volume to that volume's disk, with nobody else at work.
//!
//! Interrupting it at any moment is safe: it is the same write-back that a server does, and the
//! next drain or start goes on where it was. Nothing about the volume is changed but that it is
//! clean; mode and order stay as they were.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Host;
use super::created::Created;
use super::disk::{self, DiskOptions};
use super::image::Sizing;
use super::redo::{self, RedoOptions};
use crate::backing::{self, Backing, Disk};
use crate::cache::worker::{DrainError, DrainProgress};
use crate::cache::{AttachError, AttachOptions, Cache};
use crate::onmedia::{DiscardPolicy, VolumeDescriptor, unpad};

/// What the operator said about one volume.
#[derive(Clone, Copy, Debug, Default)]
pub struct DrainOptions<'a> {
    /// Its disk, if not where it was when last served.
    pub backing: Option<&'a Path>,
    /// Its redo area, if not where it was when last served.
    pub redo: Option<&'a Path>,
    /// Whether the disk is raw whatever it looks like.
    pub raw: bool,
    /// Whether another disk than the volume's own is accepted.
    pub force_identity: bool,
    /// Whether a damaged volume is drained of what is left.
    pub accept_loss: bool,
}

/// What was done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Drained {
    /// There was nothing to do; the disk was not touched.
    WasClean,
    /// Everything is on the disk, but for what is lost.
    Done {
        /// The disk.
        backing: PathBuf,
        /// Bytes that were dirty.
        bytes: u64,
        /// Sectors of it that are lost: the disk has older bytes there.
        lost_sectors: u64,
    },
}

/// Why a volume is still dirty.
#[derive(Debug, thiserror::Error)]
pub enum DrainFailure {
    /// No such volume.
    #[error("the cache has no volume `{0}`")]
    NoVolume(String),
    /// Its disk could not be opened.
    #[error("volume `{name}`: its backing disk {source}")]
    Disk {
        /// The volume.
        name: String,
        /// Why.
        source: backing::OpenError,
    },
    /// The two do not go together.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The disk failed.
    #[error("volume `{name}`: {source}; what is dirty stays in the cache")]
    Drain {
        /// The volume.
        name: String,
        /// Why.
        source: DrainError,
    },
}

/// Drains the volume `name`.
///
/// # Errors
/// [`DrainFailure`]; nothing is lost.
pub fn drain(
    cache: &Arc<Cache<Host>>,
    name: &str,
    options: &DrainOptions<'_>,
    progress: &mut dyn FnMut(DrainProgress),
) -> Result<Drained, DrainFailure> {
    let Some(descriptor) = cache.descriptor(name) else {
        return Err(DrainFailure::NoVolume(name.into()));
    };
    let is_dirty = cache.volumes().iter().any(|(volume, _, dirty)| volume == name && *dirty);
    if !is_dirty && !descriptor.damaged {
        cache.forgive().map_err(AttachError::from)?;
        return Ok(Drained::WasClean);
    }
    let recorded = PathBuf::from(String::from_utf8_lossy(unpad(&descriptor.path)).into_owned());
    let path = options.backing.unwrap_or(&recorded);
    // The volume's own disk is raw whatever its guest has written on it; the attach sees that it is.
    let raw = options.raw || !options.force_identity;
    let wanted = DiskOptions { path, read_only: false, raw, size: Sizing::AsFound };
    // Nothing is made of what is missing, so there is nothing to remember.
    let disk = disk::open_or_create(&wanted, &mut Created::default())
        .map_err(|source| DrainFailure::Disk { name: name.into(), source })?
        .disk;
    let recorded = PathBuf::from(descriptor.redo_path_text().into_owned());
    let redo = options.redo.or(Some(recorded.as_path()).filter(|path| !path.as_os_str().is_empty()));
    let wanted = RedoOptions {
        path: redo,
        disk: path,
        disk_size: disk.geometry().size,
        size: Sizing::AsFound,
        is_needed: false,
    };
    let redo = redo::open_or_create(&wanted, &mut Created::default())
        .map_err(|source| DrainFailure::Disk { name: name.into(), source })?;
    let volume = cache.attach_to_drain(AttachOptions {
        redo,
        force_identity: options.force_identity,
        accept_loss: options.accept_loss,
        ..volume_options(&descriptor, disk)
    })?;
    let mut bytes = 0;
    volume
        .drain_here(&mut |step| {
            bytes = bytes.max(step.total_bytes);
            progress(step);
        })
        .map_err(|source| DrainFailure::Drain { name: name.into(), source })?;
    cache.detach(&volume)?;
    cache.forgive().map_err(AttachError::from)?;
    Ok(Drained::Done { backing: path.into(), bytes, lost_sectors: volume.counters().lost_sectors })
}

/// How a volume is attached when nobody serves it: as it was when last served.
pub(super) fn volume_options(descriptor: &VolumeDescriptor, backing: Arc<Disk>) -> AttachOptions<Host> {
    AttachOptions {
        name: descriptor.name_text().into_owned(),
        backing,
        mode: descriptor.mode,
        order: descriptor.order,
        redo: None,
        data_crc: descriptor.data_crc,
        pass_discard: descriptor.discard == DiscardPolicy::Pass,
        read_only: false,
        serial: String::from_utf8_lossy(unpad(&descriptor.serial)).into_owned(),
        block_size: Some(descriptor.block_size),
        queues: 1,
        queue_size: 128,
        force_identity: false,
        sidecar: None,
        accept_loss: false,
        reads: Default::default(),
        allow_volatile: true,
        group: None,
    }
}
