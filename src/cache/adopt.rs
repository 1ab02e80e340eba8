//! Adopt: the operator has decided that a volume and a disk go together from now on.
//!
//! Laws:
//! - One update of the descriptor takes everything: the disk's identity, its traces and samples, the
//!   size, and with `drop_clean` the version below which nothing clean counts any more (recovery marks
//!   it dead, law 4). So a crash leaves the volume with the disk refused as before and its cache
//!   whole, or adopted; never adopted with stale clean data.
//! - Then the sidecar is replaced, or removed where the volume has none: until then the pair is
//!   refused, and adopting it once more goes on from there.
//! - The descriptor's other copy follows before this returns: losing one copy takes nothing back.
//! - Dirty data is left alone. Who wants to lose it deletes the volume.
//! - What was clean stays in the index of this open cache: close it. The next start drops it.

use std::sync::atomic::Ordering;

use super::attach::{AttachError, AttachOptions};
use super::core::Cache;
use super::env::Env;
use super::judge::judge_identity;
use super::pair::{has_sidecar, note_identity, note_rest, sample_seed};
use super::stripes::lock;
use super::volume::VolumeCore;
use crate::backing::Backing;
use crate::onmedia::VolumeDescriptor;
use crate::units::SectorRange;

/// How a disk is adopted.
#[derive(Clone, Copy, Debug, Default)]
pub struct AdoptOptions {
    /// Whether what is clean in the cache is dropped: the disk counts, but for what is dirty.
    pub drop_clean: bool,
    /// Whether the volume grows to the size of a larger disk.
    pub grow: bool,
}

/// What of a volume is in the cache and nowhere else.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Unwritten {
    /// Sectors that are dirty, ascending, neighbours joined.
    pub dirty: Vec<SectorRange>,
    /// Sectors that are lost already: the disk has older bytes there.
    pub lost: Vec<SectorRange>,
    /// Whether dirty data was lost of which nobody knows where it belonged.
    pub damaged: bool,
    /// Bytes that are cached, dirty ones included.
    pub cached_bytes: u64,
}

impl Unwritten {
    /// Bytes that are dirty.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty.iter().map(|range| range.len * 512).sum()
    }
}

impl<E: Env> Cache<E> {
    /// What a volume would lose with the cache.
    pub fn unwritten(&self, name: &str) -> Option<Unwritten> {
        let core = self.find_volume(name)?;
        let mut unwritten = Unwritten {
            damaged: core.damaged.load(Ordering::Relaxed),
            cached_bytes: core.index.mapped_sectors() * 512,
            ..Unwritten::default()
        };
        core.index.for_each(|extent| {
            let list = match extent.place {
                place if place.is_lost() => &mut unwritten.lost,
                place if place.dirty => &mut unwritten.dirty,
                _ => return,
            };
            match list.last_mut() {
                Some(last) if last.end() == extent.range.start => last.len += extent.range.len,
                _ => list.push(extent.range),
            }
        });
        Some(unwritten)
    }

    /// Whether a disk goes with the volume, judged by everything there is, as an attach would.
    ///
    /// # Errors
    /// What an attach would say of the disk. Nothing has been changed.
    pub fn judge_pair(&self, options: &AttachOptions<E>) -> Result<(), AttachError> {
        let Some(core) = self.find_volume(&options.name) else { return Ok(()) };
        let descriptor = lock(&core.descriptor).0.clone();
        judge_identity(&descriptor, &*options.backing, &options.backing.identity(), options)?;
        self.judge_content(&core, options)
    }

    /// Makes a disk the volume's own, whatever it was. The volume must be known and not attached.
    ///
    /// # Errors
    /// [`AttachError`]: the disk is smaller than the volume, or larger and it is not to grow; disk,
    /// sidecar or media failed. Then the pair is refused as before.
    pub fn adopt(&self, name: &str, backing: &E::Backing, how: AdoptOptions) -> Result<(), AttachError> {
        let core = self.find_volume(name).ok_or_else(|| AttachError::BadName(name.to_owned()))?;
        if core.attached.swap(true, Ordering::SeqCst) {
            return Err(AttachError::InUse(name.to_owned()));
        }
        let adopted = self.adopt_core(&core, backing, how);
        core.attached.store(false, Ordering::SeqCst);
        adopted
    }

    fn adopt_core(
        &self,
        core: &VolumeCore,
        backing: &E::Backing,
        how: AdoptOptions,
    ) -> Result<(), AttachError> {
        let descriptor = lock(&core.descriptor).0.clone();
        let identity = backing.identity();
        let (expected, found) = (descriptor.sectors * 512, identity.size);
        if found != expected && !(how.grow && found > expected) {
            let (name, path) = (descriptor.name_text().into_owned(), identity.path);
            return Err(AttachError::SizeDiffers { name, path, expected, found });
        }
        let seed = sample_seed(&descriptor);
        let of_disk = |error| AttachError::Disk { path: identity.path.clone(), error };
        let fingerprint = backing.fingerprint(seed).map_err(of_disk)?;
        let traces = backing.traces(true).map_err(of_disk)?;
        let clean_from = core.version.load(Ordering::SeqCst);
        let change = |d: &mut VolumeDescriptor| {
            note_identity(d, &identity);
            note_rest(d, (seed, fingerprint), &traces);
            (d.sectors, d.next_sectors) = (found / 512, 0);
            if how.drop_clean {
                d.clean_from_version = clean_from;
            }
        };
        self.step_pair(core, backing, has_sidecar(&descriptor), true, change)?;
        self.update_descriptor(core, |_| {})
    }
}
