//! Recovery of one segment: what its media say becomes DRAM state, and keys for the index.
//!
//! Touches nothing but its own segment, its volume's counters and what `Finds` collects, so segments
//! are recovered by several threads at once, in any order, to the same end.
//! What it stores (a summary and header, a floor, a volume's mark of damage) it fences itself: a fence
//! covers its own thread's stores only.
//!
//! What it believes is durable first, for whoever stored it may have died before its fence. That is little,
//! and all else need not be written back once more while guests wait: a summary was fenced before the
//! header that points to it was stored, a record and its payload before the witness that counts it. What is
//! left are headers, witnesses and words themselves, and the record above the witness.

use std::sync::atomic::Ordering;

use super::super::core::Cache;
use super::super::env::Env;
use super::super::index::{Extent, Place};
use super::super::scan::Scan;
use super::super::segments::{Class, Segment, State};
use super::super::stripes::lock;
use super::super::volume::{Cursor, VolumeCore};
use super::Volumes;
use super::ahead::ReadAhead;
use super::rebuild::Keys;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{Key, KeyKind, LIVENESS_SECTORS, SegmentHeader, SegmentState};
use crate::units::SectorRange;

/// What one segment came to.
pub(super) struct Found {
    pub id: u32,
    /// What it holds next: free, sealed, or bad.
    pub state: State,
    pub torn_records: u32,
    /// What is damaged, in words.
    pub findings: Vec<String>,
}

/// Recovers a segment; what counts of it goes to `keys`, by volume.
pub(super) fn recover<E: Env>(
    cache: &Cache<E>,
    id: u32,
    volumes: &Volumes,
    ahead: &ReadAhead,
    keys: &mut Keys,
) -> Found {
    let mut found = Found { id, state: State::Sealed, torn_records: 0, findings: Vec::new() };
    cache.media.settle_segment(id);
    let copies = cache.media.load_header(id);
    if copies.is_damaged() {
        found.findings.push(format!("segment {id}: a copy of its header is damaged"));
    }
    let header = match copies.into_newest() {
        Ok(header) => header,
        Err(error) => {
            found.findings.push(format!("segment {id} is lost: {error}"));
            found.state = State::Bad;
            // Whose it was is not known: nobody's dirty data can be taken for complete.
            volumes.values().for_each(|v| v.damaged.store(true, Ordering::Relaxed));
            return found;
        }
    };
    let segment = &cache.segments[id as usize];
    segment.header_sequence.store(header.sequence, Ordering::Relaxed);
    segment.generation.store(header.generation, Ordering::Relaxed);
    if header.state == SegmentState::Free {
        found.state = State::Free;
        return found;
    }
    segment.begin(cache.media.geometry.fixed(), header.incarnation, header.generation, header.start_counter);
    segment.set_class(Class::of_stream(header.stream));
    if let Some(volume) = volumes.get(&header.incarnation) {
        let scan = scan_segment(cache, id, &header, volume, ahead, &mut found);
        load_liveness(cache, id, &header, &mut found);
        take_keys(cache, id, volume, &scan, keys);
    }
    found
}

/// What a segment in use holds; seals it if it was found open.
fn scan_segment<E: Env>(
    cache: &Cache<E>,
    id: u32,
    header: &SegmentHeader,
    volume: &VolumeCore,
    ahead: &ReadAhead,
    found: &mut Found,
) -> Scan {
    let seen = ahead.take(id, header);
    if header.state == SegmentState::Sealed && header.summary_len > 0 {
        match seen.map_or_else(|| cache.media.scan_summary(id, header), Ok) {
            Ok(scan) => return scan,
            Err(error) => {
                let what = format!("segment {id}: its summary is damaged ({error}); reading its records");
                found.findings.push(what);
            }
        }
    } else if let Some(scan) = seen {
        let is_all = mutated(Mutant::AheadTakenForAll);
        let scan = if is_all { scan } else { cache.media.scan_on(id, header, scan) };
        return end_scan(cache, id, header, volume, scan, found);
    }
    let scan = cache
        .media
        .scan_records(id, header)
        .unwrap_or_else(|error| Scan { losses: vec![(u64::MAX, error.to_string())], ..Scan::default() });
    end_scan(cache, id, header, volume, scan, found)
}

/// Judges what is missing among a segment's records; seals it if it was found open.
fn end_scan<E: Env>(
    cache: &Cache<E>,
    id: u32,
    header: &SegmentHeader,
    volume: &VolumeCore,
    mut scan: Scan,
    found: &mut Found,
) -> Scan {
    for range in scan.unwitnessed.iter().filter(|_| !mutated(Mutant::UnwitnessedNotSettled)) {
        cache.media.settle_range(id, range.start, range.end);
    }
    if header.state == SegmentState::Sealed && scan.last_sequence < header.last_sequence {
        scan.losses.push((u64::MAX, "its last records are missing".to_owned()));
    }
    found.torn_records += scan.torn;
    let tail = volume.tail.load(Ordering::Relaxed);
    for (epoch, what) in &scan.losses {
        // Epochs do not fall within a segment: what is before a clean record was clean.
        let dirty = *epoch > tail;
        let so = if dirty { "its volume is damaged" } else { "only clean data is gone" };
        found.findings.push(format!("segment {id}: {what}; {so}"));
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
            Ok(()) => seal_found(cache, id, header, &scan, found),
            Err(error) => found.findings.push(format!("segment {id} cannot be sealed: {error}")),
        }
    }
    scan
}

/// Seals a segment that was open when the daemon ended, with exactly the records that counted.
fn seal_found<E: Env>(cache: &Cache<E>, id: u32, header: &SegmentHeader, scan: &Scan, found: &mut Found) {
    note_log(&cache.segments[id as usize], scan);
    let SegmentHeader { incarnation, stream, generation, .. } = *header;
    if let Err(error) = cache.seal(id, incarnation, stream, generation, &scan.keys, &scan.checksums) {
        found.findings.push(format!("segment {id} cannot be sealed: {error}"));
    }
}

fn note_log(segment: &Segment, scan: &Scan) {
    segment.log_low.store(scan.log_low, Ordering::Relaxed);
    segment.payload_end.store(scan.payload_end, Ordering::Relaxed);
    segment.last_sequence.store(scan.last_sequence, Ordering::Relaxed);
}

/// Turns a scan into DRAM state and keys for the index.
fn take_keys<E: Env>(cache: &Cache<E>, id: u32, volume: &VolumeCore, scan: &Scan, keys: &mut Keys) {
    let segment = &cache.segments[id as usize];
    let tail = volume.tail.load(Ordering::Relaxed);
    let (sectors, clean_from) = (volume.descriptor_sectors(), lock(&volume.descriptor).0.clean_from_version);
    let is_dirty = |key: &Key| key.kind != KeyKind::Fill && key.epoch > tail;
    note_log(segment, scan);
    segment.key_count.store(scan.keys.len() as u32, Ordering::Relaxed);
    let mut sink = keys.of(volume);
    let mut checksums = scan.checksums.iter();
    let mut dirty_keys = Vec::new();
    let mut live = 0;
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
                live += key.sectors;
            }
            let place = cache.media.place(id, key, true);
            sink.add(key.version, Extent { range: key.range(), place });
        } else if key.kind == KeyKind::Fill && key.epoch > tail {
            // The disk may have lost what this was filled from: dead, durably so before the tail
            // can reach its epoch.
            cache.mark_sectors_dead(id, key.payload, key.sectors);
        } else if key.version < clean_from && !mutated(Mutant::DroppedCleanCounts) {
            // The operator has dropped all that was clean then.
            if key.kind.has_payload() {
                cache.mark_sectors_dead(id, key.payload, key.sectors);
            }
        } else if key.kind.has_payload() {
            let place = cache.media.place(id, key, false);
            for run in live_runs(segment, key, place) {
                live += run.range.len as u32;
                sink.add(key.version, run);
            }
        }
    }
    // What loses against a newer version leaves the count when it does.
    segment.add_live(live);
    segment.max_version.store(max_version, Ordering::Relaxed);
    segment.max_epoch.store(max_dirty, Ordering::Relaxed);
    segment.min_epoch.store(0, Ordering::Relaxed);
    if !mutated(Mutant::VersionsRestart) {
        volume.version.fetch_max(max_version + 1, Ordering::Relaxed);
    }
    volume.counting.epochs().raise_to(max_epoch + 1);
    volume.stamped.fetch_max(max_dirty, Ordering::Relaxed);
    if !dirty_keys.is_empty() {
        let payload = |key: &&Key| key.kind.has_payload();
        let owed: u64 = dirty_keys.iter().filter(payload).map(|key| key.range().len * 512).sum();
        volume.pacer.owe(owed);
        dirty_keys.sort_by_key(|k| (k.epoch, k.version));
        let first = dirty_keys[0].epoch;
        lock(&volume.dirty).known.insert((first, id), Cursor::Keys(dirty_keys.into()));
    }
}

/// The parts of a clean key that are not dead; the key is shown at `place`.
fn live_runs(segment: &Segment, key: &Key, place: Place) -> impl Iterator<Item = Extent> {
    let (first, mut at, end) = (key.payload, key.payload, key.payload + key.sectors);
    let volume_first = key.first;
    std::iter::from_fn(move || {
        let start = segment.next_live(at, end);
        at = segment.next_dead(start, end);
        (start < end).then(|| Extent {
            range: SectorRange::new(volume_first + u64::from(start - first), u64::from(at - start)),
            place: place.advanced(u64::from(start - first)),
        })
    })
}

/// Takes over what the liveness words say. Where they are damaged, everything is dead, and stays so.
fn load_liveness<E: Env>(cache: &Cache<E>, id: u32, header: &SegmentHeader, found: &mut Found) {
    let segment = &cache.segments[id as usize];
    let dead = cache.media.load_liveness(id, header.generation);
    let is_believed = mutated(Mutant::BadLivenessWordIgnored);
    if dead.is_damaged && !is_believed {
        found.findings.push(format!("segment {id}: its liveness words are damaged; clean data is dropped"));
        if let Err(error) = cache.bury(id) {
            found.findings.push(format!("segment {id}: its liveness words cannot be repaired: {error}"));
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
