//! Recovery: from the media alone to a warm cache.
//!
//! Laws: idempotent, and safe to be interrupted anywhere, because all it writes before it is done
//! is the start counter, summaries and sealed headers of segments found open, and floors that say of
//! damaged liveness words what it has found out, and nothing of that changes what a second recovery
//! finds. Keys are inserted in version order, so the newest wins.
//! A dirty key counts as it is; a clean one where its liveness words allow; a fill only if the disk
//! has been flushed since. Loss of keys that may
//! have been dirty damages the volume they belonged to, and no other.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::core::{Cache, OpenError, write};
use super::env::Env;
use super::index::{Extent, Place};
use super::lost;
use super::scan::Scan;
use super::segments::{Class, State};
use super::stripes::lock;
use super::volume::{Cursor, VolumeCore};
use crate::mutant::{Mutant, if_mutated, mutated};
use crate::onmedia::{
    Key, KeyKind, LIVENESS_SECTORS, SegmentHeader, SegmentState, SummaryHeader, Tail, VolumeDescriptor,
    VolumeState, encode_summary,
};
use crate::pmem::Pmem;
use crate::units::SectorRange;

/// What recovery found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Volumes on the cache.
    pub volumes: usize,
    /// Segments that hold something.
    pub segments_used: usize,
    /// Keys that count.
    pub keys: u64,
    /// Bytes that are dirty.
    pub dirty_bytes: u64,
    /// Bytes that are cached, dirty ones included.
    pub cached_bytes: u64,
    /// Sectors that are lost: neither here nor on the disk.
    pub lost_sectors: u64,
    /// Torn records at ends of logs: legal after a crash.
    pub torn_records: u64,
    /// Whether the last run ended in order.
    pub was_clean: bool,
    /// What is damaged, in words.
    pub findings: Vec<String>,
}

/// A key on its way into the index.
struct Found {
    version: u64,
    range: SectorRange,
    /// Sector in the segment; unused for keys without payload.
    payload: u32,
    segment: u32,
    kind: KeyKind,
    dirty: bool,
    /// The key of this version is lost, wherever it lay; nothing above but the range says anything.
    is_lost: bool,
}

/// Fills the cache's DRAM from its media.
pub(super) fn recover<E: Env>(cache: &mut Cache<E>) -> Result<RecoveryReport, OpenError> {
    let mut report = RecoveryReport { was_clean: lock(&cache.start).was_clean, ..RecoveryReport::default() };
    let volumes = load_volumes(cache, &mut report);
    let mut found: BTreeMap<u64, Vec<Found>> = BTreeMap::new();
    let mut sealed: Vec<(u64, u32)> = Vec::new();
    for id in 0..cache.media.geometry.segment_count {
        cache.media.settle_segment(id);
        let copies = cache.media.load_header(id);
        if copies.is_damaged() {
            report.findings.push(format!("segment {id}: a copy of its header is damaged"));
        }
        let header = match copies.into_newest() {
            Ok(header) => header,
            Err(error) => {
                report.findings.push(format!("segment {id} is lost: {error}"));
                cache.segments[id as usize].set_state(State::Bad);
                // Whose it was is not known: nobody's dirty data can be taken for complete.
                volumes.values().for_each(|v| v.damaged.store(true, Ordering::Relaxed));
                continue;
            }
        };
        let segment = &cache.segments[id as usize];
        segment.header_sequence.store(header.sequence, Ordering::Relaxed);
        segment.generation.store(header.generation, Ordering::Relaxed);
        if header.state == SegmentState::Free {
            cache.add_free(id);
            continue;
        }
        segment.begin(&cache.media.geometry, header.incarnation, header.generation, header.start_counter);
        segment.set_class(Class::of_stream(header.stream));
        report.segments_used += 1;
        if let Some(volume) = volumes.get(&header.incarnation) {
            let scan = scan_segment(cache, id, &header, volume, &mut report);
            let keys = take_keys(cache, id, &header, volume, &scan, &mut report);
            found.entry(header.incarnation).or_default().extend(keys);
        }
        segment.set_state(State::Sealed);
        sealed.push((segment.max_version.load(Ordering::Relaxed), id));
    }
    sealed.sort_unstable();
    for (age, (_, id)) in sealed.iter().enumerate() {
        cache.segments[*id as usize].born.store(age as u64, Ordering::Relaxed);
    }
    cache.opened.store(sealed.len() as u64, Ordering::Relaxed);
    lock(&cache.sealed).extend(sealed.into_iter().map(|(_, id)| id));
    for volume in volumes.values() {
        let mut keys = found.remove(&volume.incarnation).unwrap_or_default();
        add_lost(volume, &mut keys, &mut report);
        insert(cache, volume, keys, &mut report);
    }
    for volume in volumes.values() {
        report.dirty_bytes += volume.index.dirty_sectors() * 512;
        report.cached_bytes += volume.index.mapped_sectors() * 512;
    }
    report.volumes = volumes.len();
    *write(&cache.volumes) = volumes;
    Ok(report)
}

/// Reads descriptors and tails.
fn load_volumes<E: Env>(cache: &Cache<E>, report: &mut RecoveryReport) -> BTreeMap<u64, Arc<VolumeCore>> {
    let media = &cache.media;
    let mut volumes = BTreeMap::new();
    for slot in 0..media.geometry.volume_slots {
        let copies = media.load(
            |copy| media.geometry.descriptor(slot, copy),
            |bytes| VolumeDescriptor::decode(bytes, &media.uuid, slot),
        );
        let next = copies.next;
        if copies.is_damaged() {
            report.findings.push(format!("volume slot {slot}: a copy of its descriptor is damaged"));
        }
        let descriptor = match copies.into_newest() {
            Ok(descriptor) => descriptor,
            Err(error) => {
                report.findings.push(format!("volume slot {slot} is lost: {error}"));
                continue;
            }
        };
        if descriptor.state == VolumeState::Empty {
            continue;
        }
        let is_deleted = descriptor.state == VolumeState::Deleting;
        let volume = VolumeCore::new(descriptor, next, cache.segments.len());
        if is_deleted {
            if let Err(error) = cache.finish_delete(&volume) {
                report.findings.push(format!("volume slot {slot} cannot be emptied: {error}"));
            }
            continue;
        }
        let tails = media.load(
            |copy| media.geometry.tail(slot, copy),
            |bytes| Tail::decode(bytes, &media.uuid, volume.incarnation),
        );
        let (next, damaged) = (tails.next, tails.is_damaged());
        match tails.into_newest() {
            Ok(tail) => {
                if damaged {
                    report.findings.push(format!("volume slot {slot}: a copy of its tail is damaged"));
                }
                volume.tail.store(tail.epoch, Ordering::Relaxed);
                // Also where no segment is left to say what was used: an epoch at or below the
                // tail would count as clean.
                if !mutated(Mutant::EpochRestartsBelowTail) {
                    volume.epoch.store(tail.epoch + 1, Ordering::Relaxed);
                }
                if !mutated(Mutant::VersionsRestart) {
                    volume.version.store(tail.version_floor.max(1), Ordering::Relaxed);
                }
                *lock(&volume.tail_page) = (tail.sequence, next);
                *lock(&volume.lost) = tail.lost;
            }
            Err(error) => {
                // Tail 0 takes everything for dirty, and clean data may be older than the disk's.
                report.findings.push(format!("volume slot {slot}: its tail is lost: {error}"));
                volume.damaged.store(true, Ordering::Relaxed);
            }
        }
        volumes.insert(volume.incarnation, Arc::new(volume));
    }
    volumes
}

/// What a segment in use holds; seals it if it was found open.
fn scan_segment<E: Env>(
    cache: &Cache<E>,
    id: u32,
    header: &SegmentHeader,
    volume: &VolumeCore,
    report: &mut RecoveryReport,
) -> Scan {
    let mut scan = Scan::default();
    let geometry = &cache.media.geometry;
    match header.state {
        // Its records were fenced by those who wrote them before it was sealed.
        SegmentState::Sealed => {
            let end = header.summary_offset.saturating_add(header.summary_len).min(geometry.data_end());
            cache.media.settle_range(id, header.summary_offset, end);
        }
        _ => cache.media.settle_range(id, geometry.data_start(), geometry.data_end()),
    }
    if header.state == SegmentState::Sealed && header.summary_len > 0 {
        match cache.media.scan_summary(id, header) {
            Ok(found) => return found,
            Err(error) => {
                report
                    .findings
                    .push(format!("segment {id}: its summary is damaged ({error}); reading its records"));
            }
        }
    }
    match cache.media.scan_records(id, header) {
        Ok(found) => scan = found,
        Err(error) => scan.losses.push((u64::MAX, error.to_string())),
    }
    if header.state == SegmentState::Sealed && scan.last_sequence < header.last_sequence {
        scan.losses.push((u64::MAX, "its last records are missing".to_owned()));
    }
    report.torn_records += u64::from(scan.torn);
    let tail = volume.tail.load(Ordering::Relaxed);
    for (epoch, what) in &scan.losses {
        // Epochs do not fall within a segment: what is before a clean record was clean.
        let dirty = *epoch > tail;
        let so = if dirty { "its volume is damaged" } else { "only clean data is gone" };
        report.findings.push(format!("segment {id}: {what}; {so}"));
        if dirty {
            volume.damaged.store(true, Ordering::Relaxed);
        }
    }
    if header.state == SegmentState::Open {
        // Sealed with what is left, the segment no longer shows that there was more: the volume's
        // descriptor must say so first, or the next start would find nothing amiss.
        let is_lost = scan.losses.iter().any(|(epoch, _)| *epoch > tail);
        // Both copies: neither may be left saying that all is well.
        let note = || cache.update_descriptor(volume, |d| d.damaged = true);
        match if is_lost { note().and_then(|()| note()) } else { Ok(()) } {
            Ok(()) => seal_found(cache, id, header, &scan, report),
            Err(error) => report.findings.push(format!("segment {id} cannot be sealed: {error}")),
        }
    }
    scan
}

/// Seals a segment that was open when the daemon ended, with exactly the records that counted.
fn seal_found<E: Env>(
    cache: &Cache<E>,
    id: u32,
    header: &SegmentHeader,
    scan: &Scan,
    report: &mut RecoveryReport,
) {
    cache.segments[id as usize].log_low.store(scan.log_low, Ordering::Relaxed);
    cache.segments[id as usize].payload_end.store(scan.payload_end, Ordering::Relaxed);
    cache.segments[id as usize].last_sequence.store(scan.last_sequence, Ordering::Relaxed);
    if let Err(error) =
        cache.seal(id, header.incarnation, header.stream, header.generation, &scan.keys, &scan.checksums)
    {
        report.findings.push(format!("segment {id} cannot be sealed: {error}"));
    }
}

/// Turns a scan into DRAM state and keys for the index.
fn take_keys<E: Env>(
    cache: &Cache<E>,
    id: u32,
    header: &SegmentHeader,
    volume: &VolumeCore,
    scan: &Scan,
    report: &mut RecoveryReport,
) -> Vec<Found> {
    let segment = &cache.segments[id as usize];
    let tail = volume.tail.load(Ordering::Relaxed);
    let sectors = volume.descriptor_sectors();
    let is_dirty = |key: &Key| key.kind != KeyKind::Fill && key.epoch > tail;
    segment.log_low.store(scan.log_low, Ordering::Relaxed);
    segment.payload_end.store(scan.payload_end, Ordering::Relaxed);
    segment.last_sequence.store(scan.last_sequence, Ordering::Relaxed);
    segment.key_count.store(scan.keys.len() as u32, Ordering::Relaxed);
    load_liveness(cache, id, header, report);
    let mut checksums = scan.checksums.iter();
    let mut found = Vec::with_capacity(scan.keys.len());
    let mut dirty_keys = Vec::new();
    let (mut max_version, mut max_epoch, mut max_dirty) = (0, 0, 0);
    for key in &scan.keys {
        for piece in key.pieces() {
            let crc = *checksums.next().expect("the decoder counted them");
            match piece.sectors {
                8 => segment.set_block_checksum(piece.start / 8, crc),
                _ => segment.set_sector_checksum(piece.start, crc),
            }
        }
        max_version = max_version.max(key.version);
        max_epoch = max_epoch.max(key.epoch);
        if key.first + u64::from(key.sectors) > sectors {
            continue;
        }
        if mutated(Mutant::ZerosForgotten) && !key.kind.has_payload() {
            continue;
        }
        if is_dirty(key) && !(mutated(Mutant::DeadWordsEndDirtyKeys) && segment.is_dead(key.payload)) {
            max_dirty = max_dirty.max(key.epoch);
            dirty_keys.push(*key);
            if key.kind.has_payload() {
                segment.revive(key.payload, key.sectors);
            }
            found.push(Found {
                version: key.version,
                range: key.range(),
                payload: key.payload,
                segment: id,
                kind: key.kind,
                dirty: true,
                is_lost: false,
            });
        } else if key.kind == KeyKind::Fill && key.epoch > tail {
            // The disk may have lost what this was filled from: dead, durably so before the tail
            // can reach its epoch.
            cache.mark_sectors_dead(id, key.payload, key.sectors);
        } else if key.kind.has_payload() {
            found.extend(live_runs(segment, key, id));
        }
    }
    segment.max_version.store(max_version, Ordering::Relaxed);
    segment.max_epoch.store(max_dirty, Ordering::Relaxed);
    segment.min_epoch.store(0, Ordering::Relaxed);
    if !mutated(Mutant::VersionsRestart) {
        volume.version.fetch_max(max_version + 1, Ordering::Relaxed);
    }
    volume.epoch.fetch_max(max_epoch + 1, Ordering::Relaxed);
    volume.stamped.fetch_max(max_dirty, Ordering::Relaxed);
    if !dirty_keys.is_empty() {
        dirty_keys.sort_by_key(|k| (k.epoch, k.version));
        let first = dirty_keys[0].epoch;
        lock(&volume.dirty).known.insert((first, id), Cursor::Keys(dirty_keys.into()));
    }
    found
}

/// The parts of a clean key that are not dead.
fn live_runs(segment: &super::segments::Segment, key: &Key, id: u32) -> Vec<Found> {
    let mut runs: Vec<Found> = Vec::new();
    for i in 0..key.sectors {
        if segment.is_dead(key.payload + i) {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.range.end() == key.first + u64::from(i) => run.range.len += 1,
            _ => runs.push(Found {
                version: key.version,
                range: SectorRange::new(key.first + u64::from(i), 1),
                payload: key.payload + i,
                segment: id,
                kind: key.kind,
                dirty: false,
                is_lost: false,
            }),
        }
    }
    runs
}

/// Takes over what the liveness words say. Where they are damaged, everything is dead, and stays so.
fn load_liveness<E: Env>(cache: &Cache<E>, id: u32, header: &SegmentHeader, report: &mut RecoveryReport) {
    let segment = &cache.segments[id as usize];
    let dead = cache.media.load_liveness(id, header.generation);
    let is_believed = mutated(Mutant::BadLivenessWordIgnored);
    if dead.is_damaged && !is_believed {
        report.findings.push(format!("segment {id}: its liveness words are damaged; clean data is dropped"));
        if let Err(error) = cache.bury(id) {
            report.findings.push(format!("segment {id}: its liveness words cannot be repaired: {error}"));
        }
    }
    for (index, word) in dead.words.iter().enumerate() {
        match word {
            Some(bits) if !dead.is_damaged || is_believed => {
                if *bits != 0 {
                    segment.restore_dead(index, *bits);
                }
            }
            None if is_believed => {}
            _ => segment.distrust(index),
        }
    }
    const { assert!(LIVENESS_SECTORS == 32) };
}

/// Adds what is listed as lost to a volume's keys: each range counts like a key of its version.
fn add_lost(volume: &VolumeCore, keys: &mut Vec<Found>, report: &mut RecoveryReport) {
    let list = lock(&volume.lost);
    let whole = SectorRange::new(0, volume.descriptor_sectors());
    for lost in list.iter() {
        volume.version.fetch_max(lost.version + 1, Ordering::Relaxed);
        keys.extend(lost.range.intersection(&whole).map(|range| Found {
            version: lost.version,
            range,
            payload: 0,
            segment: 0,
            kind: KeyKind::Data,
            dirty: false,
            is_lost: true,
        }));
    }
    if !list.is_empty() {
        let name = volume.descriptor_name();
        report.lost_sectors += lost::sectors(&list);
        report.findings.push(format!("volume {name}: {}", lost::summary(&list)));
    }
}

/// Inserts a volume's keys, oldest first; what loses is dead. Of two copies of one version, which a
/// crash during relocation leaves, the one in the higher segment wins: write-back decides likewise.
fn insert<E: Env>(cache: &Cache<E>, volume: &VolumeCore, mut keys: Vec<Found>, report: &mut RecoveryReport) {
    // At equality the loss: the key it speaks of is the one that is lost.
    keys.sort_unstable_by_key(|k| (k.version, k.is_lost, k.segment));
    if_mutated(Mutant::OldestWins, || keys.reverse());
    report.keys += keys.len() as u64;
    let mut replaced = Vec::new();
    for found in keys {
        if found.is_lost {
            replaced.clear();
            volume.index.insert(Extent { range: found.range, place: Place::LOST }, &mut replaced);
            cache.mark_dead(&replaced);
            continue;
        }
        let key = Key {
            first: found.range.start,
            kind: found.kind,
            sectors: found.range.len as u32,
            payload: found.payload,
            version: found.version,
            epoch: 0,
        };
        if found.kind.has_payload() {
            cache.segments[found.segment as usize].add_live(key.sectors);
        }
        replaced.clear();
        let place = cache.media.place(found.segment, &key, found.dirty);
        volume.index.insert(Extent { range: found.range, place }, &mut replaced);
        if !mutated(Mutant::LosersNotKilled) {
            cache.mark_dead(&replaced);
        }
    }
    if !volume.is_clean() {
        volume.dirty_since.store(1, Ordering::Relaxed);
    }
}

impl<E: Env> Cache<E> {
    /// Writes a segment's summary and its sealed header.
    pub(crate) fn seal(
        &self,
        id: u32,
        incarnation: u64,
        stream: u16,
        generation: u64,
        keys: &[Key],
        checksums: &[u32],
    ) -> Result<(), crate::pmem::MediaError> {
        let segment = &self.segments[id as usize];
        let (log_low, payload_end) =
            (segment.log_low.load(Ordering::Acquire), segment.payload_end.load(Ordering::Relaxed));
        let last_sequence = segment.last_sequence.load(Ordering::Relaxed);
        let header = SummaryHeader {
            incarnation,
            generation,
            segment: id,
            record_count: last_sequence as u32,
            last_sequence,
            ..SummaryHeader::default()
        };
        let mut bytes = Vec::new();
        encode_summary(&self.media.secret, &header, keys, checksums, &mut bytes);
        // A page of its own: it is written when pages around it are durable already.
        let mut offset = payload_end.next_multiple_of(4096);
        if offset + bytes.len() as u32 > log_low & !4095 {
            offset = payload_end.next_multiple_of(256);
        }
        let fits = offset + bytes.len() as u32 <= log_low;
        if fits {
            self.media.pmem.write(self.media.in_segment(id, offset), &bytes)?;
            self.media.pmem.fence();
        }
        self.write_header(id, |h| {
            h.state = SegmentState::Sealed;
            h.stream = stream;
            h.incarnation = incarnation;
            h.generation = generation;
            h.start_counter = segment.start_counter.load(Ordering::Relaxed);
            h.last_sequence = last_sequence;
            h.log_low = log_low;
            h.payload_end = payload_end;
            h.summary_offset = if fits { offset } else { 0 };
            h.summary_len = if fits { bytes.len() as u32 } else { 0 };
            h.key_count = keys.len() as u32;
            h.max_version = keys.iter().map(|k| k.version).max().unwrap_or(0);
            h.min_epoch = keys.iter().map(|k| k.epoch).min().unwrap_or(0);
            h.max_epoch = keys.iter().map(|k| k.epoch).max().unwrap_or(0);
        })
    }
}
