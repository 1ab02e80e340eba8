//! Whether a volume and a disk go together, judged before anything is written.
//!
//! [`would_attach`] asks it of media that are not open yet: opening a cache counts a start and
//! recovers, so a start that is going to be refused is better refused before. [`Cache::attach`]
//! asks the same again, of what recovery found.
//!
//! [`Cache::attach`]: super::Cache::attach

use std::sync::Arc;

use super::attach::{AttachError, AttachOptions};
use super::core::{load_media, load_superblock};
use super::env::Env;
use super::media::Media;
use super::membership::judge_group;
use super::mismatch::Mismatch;
use super::pair::{has_sidecar, judge_sidecar, look};
use super::volume::Mode;
use crate::backing::{Backing, BackingIdentity, Traces};
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{Superblock, Uuid, VolumeDescriptor, VolumeState, unpad};
use crate::pmem::boot_id;
use crate::pmem::{MediaClass, Pmem};

/// Whether [`Cache::attach`](super::Cache::attach) would refuse these options on this media, as far
/// as the metadata tells. Reads only.
///
/// # Errors
/// What `attach` would say; [`AttachError::Cache`] if this is not a cache that can be opened.
pub fn would_attach<E: Env>(pmem: &Arc<E::Pmem>, options: &AttachOptions<E>) -> Result<(), AttachError> {
    judge_options(pmem.class(), options)?;
    let media = load_media(Arc::clone(pmem))?;
    let Some(descriptor) = find(&media, &options.name) else { return judge_new(&media.uuid, options) };
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

/// The newest superblock, if these media hold a cache of which one counts. Writes nothing.
pub fn superblock<P: Pmem>(pmem: &P) -> Option<Superblock> {
    load_superblock(pmem).ok().map(|(superblock, _)| superblock)
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
    judge_group(options)?;
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

/// Whether nobody else's sidecar stands beside the disk of a volume that is about to be made.
pub(super) fn judge_new<E: Env>(cache: &Uuid, options: &AttachOptions<E>) -> Result<(), AttachError> {
    let wanted = options.sidecar == Some(true);
    let path = options.backing.identity().path;
    if wanted && !options.backing.can_have_sidecar() {
        return Err(AttachError::NoPlaceForSidecar(path));
    }
    if options.force_identity || mutated(Mutant::WrongDiskAccepted) {
        return Ok(());
    }
    let name = options.name.clone();
    judge_sidecar(cache, None, &look(&*options.backing), &path, wanted)
        .map_err(|what| AttachError::Mismatch { name, path, what })
}

/// Whether the disk is the volume's own, and as far as its traces tell, as the volume has left it.
pub(super) fn judge_identity<B: Backing>(
    descriptor: &VolumeDescriptor,
    backing: &B,
    identity: &BackingIdentity,
    options: &AttachOptions<impl Env>,
) -> Result<(), AttachError> {
    let (name, path) = (options.name.clone(), identity.path.clone());
    // One that was growing has either size.
    if ![descriptor.sectors, descriptor.next_sectors].contains(&(identity.size / 512)) {
        let expected = descriptor.sectors * 512;
        return Err(AttachError::SizeDiffers { name, path, expected, found: identity.size });
    }
    let wanted = options.sidecar.unwrap_or(has_sidecar(descriptor));
    if wanted && !backing.can_have_sidecar() {
        return Err(AttachError::NoPlaceForSidecar(path));
    }
    if options.force_identity || mutated(Mutant::WrongDiskAccepted) {
        return Ok(());
    }
    let refused = |what| AttachError::mismatch(descriptor, &identity.path, what);
    judge_sidecar(&descriptor.cache_uuid, Some(descriptor), &look(backing), &path, wanted)
        .map_err(refused)?;
    let of_disk = |error| AttachError::Disk { path: identity.path.clone(), error };
    let traces = backing.traces(false).map_err(of_disk)?;
    let is_same = is_same_disk(descriptor, identity);
    if descriptor.fingerprint_valid {
        let is_like =
            backing.fingerprint(descriptor.fingerprint_seed).map_err(of_disk)? == descriptor.fingerprint;
        return match judge_rested(descriptor, identity, &traces, is_same, is_like) {
            Some(Verdict::Other) => Err(AttachError::OtherDisk { name, path, was: was(descriptor) }),
            Some(Verdict::Changed(what)) => Err(AttachError::ContentChanged { name, path, what }),
            None => Ok(()),
        };
    }
    if !is_same {
        return Err(AttachError::OtherDisk { name, path, was: was(descriptor) });
    }
    judge_abandoned(descriptor, &traces).map_or(Ok(()), |what| Err(refused(what)))
}

fn was(descriptor: &VolumeDescriptor) -> String {
    descriptor.path_text().into_owned()
}

/// Whether it is the same file or device, whatever it is called now. Numbers of file systems and
/// devices change with a boot; where there is better, that counts.
fn is_same_disk(descriptor: &VolumeDescriptor, identity: &BackingIdentity) -> bool {
    let d = descriptor;
    if d.backing_kind != identity.kind as u32 {
        return false;
    }
    if d.disk_stable > 0 && identity.stable > 0 {
        return d.disk_stable == identity.stable;
    }
    if d.disk_born_ns > 0 && identity.born_ns > 0 {
        return d.disk_born_ns == identity.born_ns && d.backing_inode == identity.inode;
    }
    d.backing_device == identity.device && d.backing_inode == identity.inode
}

/// What speaks against a disk after an orderly end.
#[derive(PartialEq, Eq, Debug)]
enum Verdict {
    Other,
    Changed(Mismatch),
}

/// Judges a disk by what was noted of it at an orderly end. Content speaks louder than names: a
/// moved or copied disk is welcome if nothing says that it has changed. But samples may miss a
/// change, so a trace of a write counts more than samples that agree.
fn judge_rested(
    descriptor: &VolumeDescriptor,
    identity: &BackingIdentity,
    traces: &Traces,
    is_same: bool,
    is_like: bool,
) -> Option<Verdict> {
    let d = descriptor;
    if !is_like && !is_same {
        return Some(Verdict::Other);
    }
    let has_times = d.disk_modified_ns > 0 && traces.modified_ns > 0;
    if has_times && d.disk_modified_ns != traces.modified_ns {
        return Some(Verdict::Changed(if is_same { Mismatch::Written } else { Mismatch::Copy }));
    }
    if !is_same && d.disk_stable > 0 && identity.stable > 0 {
        // Two devices, each with a name of its own: samples alone do not make one of them the other.
        return Some(Verdict::Changed(Mismatch::Copy));
    }
    if is_same && let Some(count) = written_by_others(d, traces).filter(|count| *count > 0) {
        return Some(Verdict::Changed(Mismatch::Counted(count)));
    }
    (!is_like).then_some(Verdict::Changed(Mismatch::Samples))
}

/// Judges the volume's own disk by what was noted of it before its daemon died.
fn judge_abandoned(descriptor: &VolumeDescriptor, traces: &Traces) -> Option<Mismatch> {
    let d = descriptor;
    let until_ns = d.disk_used_until_ms.saturating_mul(1_000_000);
    if traces.modified_ns > 0 && d.disk_modified_ns > 0 && until_ns > 0 {
        if traces.modified_ns > until_ns && traces.modified_ns != d.disk_modified_ns {
            return Some(Mismatch::WrittenAfterDeath);
        }
        // A host that dies may take back what was not durable of a file's times.
        let floor = if d.disk_boot == boot_id() { d.disk_modified_ns } else { d.disk_settled_ns };
        // A time after the note of it is of a clock that was wrong, and says nothing.
        if traces.modified_ns < floor && floor <= until_ns {
            return Some(Mismatch::RolledBack);
        }
    }
    let is_later_boot = d.disk_boot != [0; 16] && d.disk_boot != boot_id();
    written_by_others(d, traces).filter(|count| *count > 0 && is_later_boot).map(Mismatch::WrittenSinceBoot)
}

/// Sectors that others than the volume's daemon have written to its device, where the kernel's count
/// tells: it begins anew with each boot, and goes on while the device stays attached.
fn written_by_others(descriptor: &VolumeDescriptor, traces: &Traces) -> Option<u64> {
    let d = descriptor;
    if traces.written == Traces::UNCOUNTED || d.disk_written == Traces::UNCOUNTED || d.disk_boot == [0; 16] {
        return None;
    }
    if d.disk_boot != boot_id() {
        return traces.counts_from_boot.then_some(traces.written);
    }
    let is_attached_still = d.disk_attachment > 0 && d.disk_attachment == traces.attachment;
    (is_attached_still && d.fingerprint_valid).then(|| traces.written.wrapping_sub(d.disk_written))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::BackingKind;

    const NOW: [u8; 16] = [1; 16];

    fn noted(change: impl FnOnce(&mut VolumeDescriptor)) -> VolumeDescriptor {
        let mut d = VolumeDescriptor {
            backing_kind: BackingKind::BlockDevice as u32,
            backing_device: 7,
            disk_attachment: 3,
            disk_written: 100,
            disk_boot: boot_id(),
            fingerprint_valid: true,
            ..VolumeDescriptor::default()
        };
        change(&mut d);
        d
    }

    fn device(stable: u64) -> BackingIdentity {
        BackingIdentity { kind: BackingKind::BlockDevice, device: 7, stable, ..BackingIdentity::default() }
    }

    #[test]
    fn a_disk_is_known_by_its_own_name_before_its_number() {
        type Change = fn(&mut VolumeDescriptor);
        let rows: [(&str, Change, BackingIdentity, bool); 7] = [
            ("its number alone", |_| {}, device(0), true),
            ("another number", |d| d.backing_device = 8, device(0), false),
            (
                "its name under another number",
                |d| (d.backing_device, d.disk_stable) = (8, 5),
                device(5),
                true,
            ),
            ("another name under its number", |d| d.disk_stable = 6, device(5), false),
            ("a name that was not known then", |_| {}, device(5), true),
            ("another kind", |d| d.backing_kind = BackingKind::File as u32, device(0), false),
            (
                "a new file in the old one's inode",
                |d| (d.backing_kind, d.disk_born_ns, d.backing_inode) = (1, 50, 9),
                BackingIdentity { device: 7, inode: 9, born_ns: 51, ..BackingIdentity::default() },
                false,
            ),
        ];
        for (what, change, identity, same) in rows {
            assert_eq!(is_same_disk(&noted(change), &identity), same, "{what}");
        }
    }

    #[test]
    fn what_the_kernel_has_counted_is_others_writing() {
        let traces = |attachment, written, counts_from_boot| Traces {
            attachment,
            written,
            counts_from_boot,
            ..Traces::default()
        };
        type Change = fn(&mut VolumeDescriptor);
        let rows: [(&str, Change, Traces, Option<u64>); 8] = [
            ("nothing since", |_| {}, traces(3, 100, true), Some(0)),
            ("eight sectors since", |_| {}, traces(3, 108, true), Some(8)),
            ("attached anew", |_| {}, traces(4, 108, true), None),
            ("not counted now", |_| {}, traces(3, Traces::UNCOUNTED, true), None),
            ("not counted then", |d| d.disk_written = Traces::UNCOUNTED, traces(3, 100, true), None),
            ("another boot", |d| d.disk_boot = NOW, traces(9, 5, true), Some(5)),
            ("another boot, a count of other disks", |d| d.disk_boot = NOW, traces(9, 5, false), None),
            (
                "in use by a daemon that died in this boot",
                |d| d.fingerprint_valid = false,
                traces(3, 108, true),
                None,
            ),
        ];
        for (what, change, traces, count) in rows {
            assert_eq!(written_by_others(&noted(change), &traces), count, "{what}");
        }
    }

    #[test]
    fn after_an_orderly_end_a_trace_counts_more_than_samples() {
        let file = BackingIdentity { kind: BackingKind::File, ..BackingIdentity::default() };
        let at = |modified_ns| Traces { modified_ns, ..Traces::default() };
        let d = noted(|d| (d.backing_kind, d.disk_modified_ns) = (1, 50));
        let rows = [
            ("untouched", at(50), true, true, None),
            ("written, samples missed it", at(51), true, true, Some(Verdict::Changed(Mismatch::Written))),
            ("put back with its old time", at(49), true, true, Some(Verdict::Changed(Mismatch::Written))),
            ("same time, other content", at(50), true, false, Some(Verdict::Changed(Mismatch::Samples))),
            ("a copy that kept its time", at(50), false, true, None),
            ("a copy that did not", at(51), false, true, Some(Verdict::Changed(Mismatch::Copy))),
            ("another disk", at(50), false, false, Some(Verdict::Other)),
            ("no times", at(0), true, true, None),
            ("no times, other content", at(0), true, false, Some(Verdict::Changed(Mismatch::Samples))),
        ];
        for (what, traces, is_same, is_like, verdict) in rows {
            assert_eq!(judge_rested(&d, &file, &traces, is_same, is_like), verdict, "{what}");
        }
        let two_names = noted(|d| d.disk_stable = 5);
        let copy = judge_rested(&two_names, &device(6), &Traces::default(), false, true);
        assert_eq!(copy, Some(Verdict::Changed(Mismatch::Copy)));
    }

    #[test]
    fn after_a_crash_a_file_may_have_been_written_while_its_daemon_lived_and_no_longer() {
        const S: u64 = 1_000_000_000;
        let noted = |boot: [u8; 16]| VolumeDescriptor {
            disk_modified_ns: 100 * S,
            disk_settled_ns: 90 * S,
            disk_used_until_ms: 160_000,
            disk_boot: boot,
            disk_written: Traces::UNCOUNTED,
            ..VolumeDescriptor::default()
        };
        let at = |modified_ns| Traces { modified_ns, ..Traces::default() };
        let other = [0xee; 16];
        let rows = [
            ("as last seen", noted(boot_id()), 100, None),
            ("our own last writes", noted(boot_id()), 159, None),
            ("after the lease", noted(boot_id()), 161, Some(Mismatch::WrittenAfterDeath)),
            ("before what was seen", noted(boot_id()), 99, Some(Mismatch::RolledBack)),
            ("times lost with the host", noted(other), 91, None),
            ("before what was durable", noted(other), 89, Some(Mismatch::RolledBack)),
            ("after the lease, another boot", noted(other), 161, Some(Mismatch::WrittenAfterDeath)),
            ("no times", noted(boot_id()), 0, None),
        ];
        for (what, d, seconds, verdict) in rows {
            assert_eq!(judge_abandoned(&d, &at(seconds * S)), verdict, "{what}");
        }
        let wrong_clock = VolumeDescriptor { disk_modified_ns: 900 * S, ..noted(boot_id()) };
        assert_eq!(judge_abandoned(&wrong_clock, &at(900 * S)), None, "a time of a wrong clock, untouched");
        assert_eq!(judge_abandoned(&wrong_clock, &at(120 * S)), None, "the clock was put right");
    }
}
