//! Recovery: from the media alone to a warm cache.
//!
//! 1. volumes: descriptors and tails;
//! 2. every segment, by several threads: headers, keys, checksums, liveness (`recovery/segment.rs`);
//! 3. the indexes, shard by shard, by several threads (`recovery/rebuild.rs`).
//!
//! Laws: idempotent, and safe to be interrupted anywhere, because all it writes before it is done
//! is the start counter, summaries and sealed headers of segments found open, and floors that say of
//! damaged liveness words what it has found out, and nothing of that changes what a second recovery
//! finds. Of the keys of a sector the newest wins.
//! A dirty key counts as it is; a clean one where its liveness words allow; a fill only if the disk
//! has been flushed since. Loss of keys that may
//! have been dirty damages the volume they belonged to, and no other.
//!
//! Threads: what comes out does not depend on how many there are, nor on who gets which segment, since
//! segments are read without a look at one another, lists are put in order afterwards, and the indexes
//! are built from sorted keys. Each thread fences what it stored itself before it ends.

mod rebuild;
mod segment;

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use self::rebuild::Keys;
use super::consistency::{ConsistencyGroup, Epochs};
use super::core::{Cache, OpenError, write};
use super::env::{Clock, Env};
use super::lost;
use super::segments::State;
use super::stripes::lock;
use super::volume::VolumeCore;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{
    Key, SegmentState, SummaryHeader, Tail, Uuid, VolumeDescriptor, VolumeState, encode_summary,
};
use crate::pmem::Pmem;

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
    /// Microseconds until every segment was read.
    pub scan_us: u64,
    /// Microseconds from there until the indexes stood.
    pub build_us: u64,
    /// What is damaged, in words.
    pub findings: Vec<String>,
}

/// Volumes by incarnation.
type Volumes = BTreeMap<u64, Arc<VolumeCore>>;

/// Fills the cache's DRAM from its media.
pub(super) fn recover<E: Env>(cache: &mut Cache<E>) -> Result<RecoveryReport, OpenError> {
    let cache = &*cache;
    let began_us = cache.clock.now_us();
    let mut report = RecoveryReport { was_clean: lock(&cache.start).was_clean, ..RecoveryReport::default() };
    let volumes = load_volumes(cache, &mut report);
    let threads = E::threads().min(cache.segments.len());
    let next = AtomicU32::new(0);
    let mut found = spread(threads, || {
        let (mut segments, mut keys) = (Vec::new(), Keys::default());
        loop {
            let id = next.fetch_add(1, Ordering::Relaxed);
            if id >= cache.media.geometry.segment_count {
                // What this thread has stored, nobody else's fence covers.
                cache.media.pmem.fence();
                return (segments, keys);
            }
            segments.push(segment::recover(cache, id, &volumes, &mut keys));
        }
    });
    let mut segments: Vec<_> = found.iter_mut().flat_map(|(segments, _)| segments.drain(..)).collect();
    segments.sort_unstable_by_key(|found| found.id);
    list_segments(cache, segments, &mut report);
    let mut keys: Vec<Keys> = found.into_iter().map(|(_, keys)| keys).collect();
    for volume in volumes.values() {
        rebuild::add_lost(volume, &mut keys[0]);
        let list = lock(&volume.lost);
        if !list.is_empty() {
            report.lost_sectors += lost::sectors(&list);
            report.findings.push(format!("volume {}: {}", volume.descriptor_name(), lost::summary(&list)));
        }
    }
    let scanned_us = cache.clock.now_us();
    report.keys = rebuild::rebuild(cache, &volumes, threads, keys);
    for volume in volumes.values() {
        if !volume.is_clean() {
            volume.dirty_since.store(1, Ordering::Relaxed);
        }
        report.dirty_bytes += volume.index.dirty_sectors() * 512;
        report.cached_bytes += volume.index.mapped_sectors() * 512;
    }
    gather_groups(volumes.values());
    report.volumes = volumes.len();
    report.scan_us = scanned_us - began_us;
    report.build_us = cache.clock.now_us() - scanned_us;
    *write(&cache.volumes) = volumes;
    Ok(report)
}

/// Makes the volumes of each consistency group count by one counter, above all that any of them used.
fn gather_groups<'a>(volumes: impl Iterator<Item = &'a Arc<VolumeCore>>) {
    let mut groups: BTreeMap<Uuid, Arc<Epochs>> = BTreeMap::new();
    for volume in volumes {
        let descriptor = lock(&volume.descriptor).0.clone();
        let uuid = descriptor.group_uuid;
        if uuid == Uuid::default() {
            continue;
        }
        let group = || ConsistencyGroup::new(uuid, descriptor.group_text().into_owned());
        let epochs = groups.entry(uuid).or_insert_with(|| Arc::new(Epochs::new(1, Some(group()))));
        volume.join(epochs);
    }
}

/// Puts the segments, ascending, on the lists they belong to.
fn list_segments<E: Env>(cache: &Cache<E>, segments: Vec<segment::Found>, report: &mut RecoveryReport) {
    let mut sealed = Vec::new();
    for segment::Found { id, state, torn_records, findings } in segments {
        report.torn_records += u64::from(torn_records);
        report.findings.extend(findings);
        let segment = &cache.segments[id as usize];
        if state == State::Free {
            cache.add_free(id);
            continue;
        }
        segment.set_state(state);
        if state == State::Sealed {
            report.segments_used += 1;
            sealed.push((segment.max_version.load(Ordering::Relaxed), id));
        }
    }
    sealed.sort_unstable();
    for (age, (_, id)) in sealed.iter().enumerate() {
        cache.segments[*id as usize].born.store(age as u64, Ordering::Relaxed);
    }
    cache.opened.store(sealed.len() as u64, Ordering::Relaxed);
    lock(&cache.sealed).extend(sealed.into_iter().map(|(_, id)| id));
}

/// Runs `work` on up to `threads` threads at once, this one among them, and returns what each came to.
/// With one it is a plain call: a simulation has a single thread.
fn spread<T: Send>(threads: usize, work: impl Fn() -> T + Sync) -> Vec<T> {
    if threads <= 1 {
        return vec![work()];
    }
    thread::scope(|scope| {
        let helper = |n| thread::Builder::new().name(format!("pcache-start-{n}")).spawn_scoped(scope, &work);
        // A thread that the kernel refuses is missed only by those who wait.
        let helpers: Vec<_> = (1..threads).filter_map(|n| helper(n).ok()).collect();
        let own = work();
        let joined = helpers.into_iter().map(|helper| helper.join().unwrap_or_else(|e| resume_unwind(e)));
        joined.chain([own]).collect()
    })
}

/// Reads descriptors and tails.
fn load_volumes<E: Env>(cache: &Cache<E>, report: &mut RecoveryReport) -> Volumes {
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
        volume.version.fetch_max(lock(&volume.descriptor).0.clean_from_version, Ordering::Relaxed);
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
                *lock(&volume.recovered_tail) = (tail.epoch, tail.time_ms);
                // Also where no segment is left to say what was used: an epoch at or below the
                // tail would count as clean.
                if !mutated(Mutant::EpochRestartsBelowTail) {
                    volume.counting.epochs().raise_to(tail.epoch + 1);
                }
                if !mutated(Mutant::VersionsRestart) {
                    volume.version.fetch_max(tail.version_floor, Ordering::Relaxed);
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
