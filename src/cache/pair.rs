//! The pair of a cache and a disk: what is noted of it, so that the next attach can tell whether
//! both are still what they were.
//!
//! Noted in the volume's descriptor: the disk's identity and traces (see `backing`), samples of its
//! content at an orderly end, and until when the daemon may have written to it. Where there is a
//! *sidecar* beside the disk, both sides carry the *generation* of the pair as well.
//!
//! Laws of a step of the generation:
//! - Three things become durable one after the other: the descriptor names the next generation, the
//!   sidecar says it, the descriptor says that it does. So after a crash anywhere the sidecar says
//!   one of the two that the descriptor names, and anything else is another time of one of them.
//! - Each generation comes with a number drawn at random, so that two copies of one pair which have
//!   gone on apart do not agree by counting alike.
//! - A step is taken at every attach before a guest is served, at every orderly end when nothing is
//!   under way any more, and in between every [`KEEP_MS`] while anything changes. What was restored
//!   from before the last step is told; what was restored from after it is not.
//! - A sidecar that says neither is never overwritten, but where the operator has said so.
//!
//! Laws of the lease:
//! - Nothing is written to the disk later than the durable `disk_used_until_ms` says, because that is
//!   moved on by [`LEASE_MS`] every [`KEEP_MS`]. So a file that was written to later, and is found so
//!   after a crash, was written to by somebody else.
//! - A failure to keep it is logged and tried again; it costs a guest nothing.
//!
//! Who holds what: `step` from the look at the sidecar to the last update, so that of those who attach,
//! keep (`Workers`) and detach one at a time takes a step; the descriptor's mutex within, during each of
//! its updates. Neither is taken by anybody who serves a guest.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::attach::AttachError;
use super::core::Cache;
use super::env::{Clock, Env};
use super::mismatch::Mismatch;
use super::stripes::lock;
use super::volume::{Volume, VolumeCore};
use crate::backing::{Backing, BackingIdentity, Traces};
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{Dual, PAGE, Sidecar, Uuid, VolumeDescriptor, newest, pad_cut};
use crate::pmem::boot_id;

/// How often the pair is noted while it is in use.
pub(crate) const KEEP_MS: u64 = 20_000;
/// For how long a note says that the disk may be written to.
const LEASE_MS: u64 = 3 * KEEP_MS;

/// What a running volume's pair was last noted to be.
#[derive(Default)]
pub(crate) struct Kept {
    at_ms: u64,
    /// What has changed since is different from this: versions drawn, tail, sectors around the cache.
    seen: [u64; 3],
}

/// What is found where a disk's sidecar would be.
pub(super) enum Found {
    /// Nothing, or nothing yet.
    Nothing,
    /// A sidecar, and the copy to write next.
    Sidecar(Box<Sidecar>, usize),
    /// One of which no copy is whole.
    Damaged,
    /// Something else, and why.
    Other(String),
}

/// Looks for the sidecar of a disk.
pub(super) fn look(backing: &impl Backing) -> Found {
    let bytes = match backing.read_sidecar() {
        Ok(None) => return Found::Nothing,
        Ok(Some(bytes)) => bytes,
        Err(error) => return Found::Other(error.to_string()),
    };
    if bytes.iter().all(|byte| *byte == 0) {
        // A crash came while it was being made.
        return Found::Nothing;
    }
    let copy = |at: usize| bytes.get(at * PAGE..(at + 1) * PAGE).unwrap_or_default();
    match newest(Sidecar::decode(copy(0)), Sidecar::decode(copy(1))) {
        Dual { newest: Some(sidecar), next, .. } => Found::Sidecar(Box::new(sidecar), next),
        _ if Sidecar::is_claimed(copy(0)) || Sidecar::is_claimed(copy(1)) => Found::Damaged,
        _ => Found::Other("it is something else".to_owned()),
    }
}

/// A generation of a pair; number 0 means that there is no sidecar.
type Generation = (u64, u64);

/// The two generations of which a sidecar may be.
fn named(descriptor: &VolumeDescriptor) -> [Generation; 2] {
    let d = descriptor;
    [(d.pair_generation, d.pair_nonce), (d.pair_next_generation, d.pair_next_nonce)]
}

/// Whether a volume has, or is about to have, a sidecar.
pub(super) fn has_sidecar(descriptor: &VolumeDescriptor) -> bool {
    descriptor.pair_next_generation > 0
}

/// Whether what stands beside a disk agrees with the volume. `descriptor` is `None` for a volume that
/// is about to be made; `wanted` says whether one is to be made beside the disk.
pub(super) fn judge_sidecar(
    cache: &Uuid,
    descriptor: Option<&VolumeDescriptor>,
    found: &Found,
    path: &str,
    wanted: bool,
) -> Result<(), Mismatch> {
    let named = descriptor.map_or([(0, 0); 2], named);
    let has_one = named.iter().any(|(generation, _)| *generation > 0);
    let place = || format!("{path}.pcache");
    let sidecar = match found {
        Found::Nothing if named.iter().any(|(generation, _)| *generation == 0) => return Ok(()),
        Found::Nothing => return Err(Mismatch::NoSidecar(place())),
        Found::Damaged => return Err(Mismatch::SidecarDamaged(place())),
        // Somebody else's file, and nothing that this volume needs.
        Found::Other(_) if !has_one && !wanted => return Ok(()),
        Found::Other(why) => return Err(Mismatch::SidecarUnreadable { path: place(), why: why.clone() }),
        Found::Sidecar(sidecar, _) => sidecar,
    };
    let volume = descriptor.map(|d| d.uuid);
    if sidecar.cache_uuid != *cache || Some(sidecar.volume_uuid) != volume {
        let uuid = sidecar.cache_uuid.map(|byte| format!("{byte:02x}")).concat();
        return Err(Mismatch::OtherCache { name: sidecar.name_text().into_owned(), cache: uuid });
    }
    let says = (sidecar.generation, sidecar.nonce);
    match says {
        _ if named.contains(&says) => Ok(()),
        (generation, _) if generation < named[0].0.min(named[1].0) => Err(Mismatch::DiskOlder),
        (generation, _) if generation > named[0].0.max(named[1].0) => Err(Mismatch::CacheOlder),
        _ => Err(Mismatch::Forked),
    }
}

/// Notes that the disk is in use from now on: nothing that was noted of its content counts.
pub(super) fn note_use(d: &mut VolumeDescriptor, identity: &BackingIdentity, traces: &Traces, now_ms: u64) {
    d.attach_count += 1;
    d.fingerprint_valid = false;
    d.disk_used_until_ms = now_ms + LEASE_MS;
    note_identity(d, identity);
    note_traces(d, traces);
    d.disk_settled_ns = traces.modified_ns;
}

/// Notes that the disk is at rest, and what it is like.
pub(super) fn note_rest(d: &mut VolumeDescriptor, sample: (u64, u64), traces: &Traces) {
    (d.fingerprint_seed, d.fingerprint) = sample;
    d.fingerprint_valid = true;
    d.redo_open = false;
    d.disk_used_until_ms = 0;
    note_traces(d, traces);
    d.disk_settled_ns = traces.modified_ns;
}

/// Notes which disk it is.
pub(super) fn note_identity(d: &mut VolumeDescriptor, identity: &BackingIdentity) {
    d.backing_kind = identity.kind as u32;
    d.backing_size = identity.size;
    d.backing_device = identity.device;
    d.backing_inode = identity.inode;
    d.disk_stable = identity.stable;
    d.disk_born_ns = identity.born_ns;
    d.path = pad_cut(&identity.path);
}

fn note_traces(d: &mut VolumeDescriptor, traces: &Traces) {
    d.disk_modified_ns = traces.modified_ns;
    d.disk_attachment = traces.attachment;
    d.disk_written = traces.written;
    d.disk_boot = boot_id();
}

/// Where a volume's fingerprint looks: nobody who does not read the cache knows.
pub(super) fn sample_seed(descriptor: &VolumeDescriptor) -> u64 {
    let (a, b) = descriptor.uuid.split_at(8);
    let half = |bytes: &[u8]| bytes.iter().fold(0u64, |seed, byte| seed << 8 | u64::from(*byte));
    (half(a) ^ half(b).rotate_left(17)).max(1)
}

impl<E: Env> Cache<E> {
    /// Changes a volume's descriptor, and takes a step of the pair if it has a sidecar or is to have
    /// one. Returns once all of it is durable. If `takes_over`, whatever stands in the sidecar's place
    /// is replaced; else only what [`judge_sidecar`] agrees with.
    ///
    /// # Errors
    /// The media or the sidecar failed. The change may have been made, the step not or in part; both
    /// agree.
    pub(super) fn step_pair(
        &self,
        core: &VolumeCore,
        backing: &E::Backing,
        wanted: bool,
        takes_over: bool,
        change: impl FnOnce(&mut VolumeDescriptor),
    ) -> Result<(), AttachError> {
        let _step = lock(&core.step);
        let descriptor = lock(&core.descriptor).0.clone();
        let has_one = named(&descriptor).iter().any(|(generation, _)| *generation > 0);
        if !has_one && !wanted && !takes_over {
            return self.update_descriptor(core, change);
        }
        let path = backing.identity().path;
        let found = look(backing);
        if !takes_over {
            judge_sidecar(&self.media.uuid, Some(&descriptor), &found, &path, wanted)
                .map_err(|what| AttachError::mismatch(&descriptor, &path, what))?;
        }
        let (copy, last, stands) = match &found {
            Found::Sidecar(s, next) => (*next, s.generation, (s.generation, s.nonce)),
            _ => (0, 0, (0, 0)),
        };
        let last = named(&descriptor).iter().fold(last, |last, (generation, _)| last.max(*generation));
        let next = if wanted { (last + 1, draw_nonce()?) } else { (0, 0) };
        self.update_descriptor(core, |d| {
            change(d);
            if !takes_over {
                (d.pair_generation, d.pair_nonce) = stands;
            }
            (d.pair_next_generation, d.pair_next_nonce) = next;
            if mutated(Mutant::SidecarUnannounced) {
                (d.pair_next_generation, d.pair_next_nonce) = stands;
            }
        })?;
        let of_sidecar = |error| AttachError::Sidecar { path: format!("{path}.pcache"), error };
        if wanted {
            let sidecar = Sidecar {
                generation: next.0,
                nonce: next.1,
                cache_uuid: self.media.uuid,
                volume_uuid: descriptor.uuid,
                time_ms: self.clock.unix_ms(),
                name: descriptor.name,
            };
            if takes_over && !matches!(found, Found::Sidecar(..) | Found::Nothing) {
                backing.remove_sidecar().map_err(of_sidecar)?;
            }
            backing.write_sidecar(copy, &sidecar.encode()).map_err(of_sidecar)?;
        } else if has_one || matches!(found, Found::Sidecar(..) | Found::Damaged) {
            backing.remove_sidecar().map_err(of_sidecar)?;
        }
        self.update_descriptor(core, |d| {
            (d.pair_generation, d.pair_nonce) = next;
            (d.pair_next_generation, d.pair_next_nonce) = next;
        })
    }

    /// Notes that an attached volume's disk is in use still, and takes a step of the pair if anything
    /// has changed. Does nothing until [`KEEP_MS`] have passed since the last time.
    pub(crate) fn keep_pair(&self, volume: &Volume<E>) {
        let core = &volume.core;
        if self.has_failed() {
            // Nothing can be noted any more; whoever recovers from that looks for himself.
            return;
        }
        let now_ms = self.clock.now_ms();
        let tail = core.tail.load(Ordering::Relaxed);
        let seen = [core.version.load(Ordering::Relaxed), tail, volume.counters().bypass_sectors];
        let changes = {
            let mut kept = lock(&core.kept);
            if now_ms < kept.at_ms + KEEP_MS {
                return;
            }
            kept.at_ms = now_ms;
            std::mem::replace(&mut kept.seen, seen) != seen
        };
        let until_ms = self.clock.unix_ms() + LEASE_MS;
        if let Err(error) = self.keep_noted(volume, until_ms, changes) {
            let volume = &volume.name;
            tracing::error!(volume, %error, "what the next start needs to recognise the disk was not noted");
        }
    }

    fn keep_noted(&self, volume: &Volume<E>, until_ms: u64, changes: bool) -> Result<(), AttachError> {
        let core = &volume.core;
        // The lease first: it waits for nothing but the cache.
        let modified_ns = volume.backing.traces(false).map_or(0, |traces| traces.modified_ns);
        self.update_descriptor(core, |d| {
            d.disk_used_until_ms = until_ms;
            d.disk_modified_ns = if modified_ns == 0 { d.disk_modified_ns } else { modified_ns };
        })?;
        let has_one = has_sidecar(&lock(&core.descriptor).0);
        if changes && has_one && !volume.config.read_only {
            self.step_pair(core, &volume.backing, true, false, |_| {})?;
        }
        Ok(())
    }

    /// Notes at an orderly end what the disk is like. Nothing may be under way on it.
    pub(super) fn note_rest(&self, volume: &Volume<E>) -> Result<(), AttachError> {
        let (core, backing): (&VolumeCore, &Arc<E::Backing>) = (&volume.core, &volume.backing);
        let of_disk = |error| AttachError::Disk { path: backing.identity().path, error };
        let descriptor = lock(&core.descriptor).0.clone();
        let seed = sample_seed(&descriptor);
        let fingerprint = backing.fingerprint(seed).map_err(of_disk)?;
        let traces = backing.traces(true).map_err(of_disk)?;
        let wanted = has_sidecar(&descriptor);
        let change = |d: &mut VolumeDescriptor| note_rest(d, (seed, fingerprint), &traces);
        match volume.config.read_only {
            true => self.update_descriptor(core, change),
            false => self.step_pair(core, backing, wanted, false, change),
        }
    }
}

fn draw_nonce() -> Result<u64, AttachError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes)
        .map_err(|e| AttachError::Disk { path: "getrandom".into(), error: e.into() })?;
    Ok(u64::from_le_bytes(bytes))
}
