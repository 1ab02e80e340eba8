//! Scrubbing: everything that counts is read and verified now and then, before it is needed.
//!
//! A pass takes the volumes one after the other, in the order of their sectors, and reads what the index
//! shows; then the segments: header, summary, records, liveness words; then the pages of metadata. It is
//! the housekeeper's work for when it has none: between two slices of at most [`SLICE`] it looks after
//! space, and as it is the only one who frees segments, nothing it looks at can be reused meanwhile.
//!
//! Laws:
//! - *Clean* data that is damaged is dropped, so that the next read has it from the disk. Only the parts
//!   with a bad checksum go. The index and the marks change under the liveness writer's mutex, like an
//!   eviction; it counts as healed once that is durable: until then a crash brings the damaged copy back,
//!   where the next pass finds it again.
//! - *Dirty* data that is damaged is left where it is and never answered from the disk. Write-back is
//!   called, whose round lists it as lost in the update that moves the tail (`../lost.rs`): nobody else
//!   writes that list.
//! - A structure with a good copy is written again from that. A segment that is damaged and wholly clean
//!   is given to reclaim; one that is not yet clean is left to write-back, and the next pass finds it.
//!   Liveness words that do not hold are answered by a floor that nothing reaches, before anything else
//!   is written there (`../liveness.rs`). A tail's bad copy is made good by the next round of write-back,
//!   which alone writes tails.
//! - No more is read than the rate allows, a quarter of it while guests are at work, and none while the
//!   housekeeper has anything else to do.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use super::super::core::{Cache, load_start};
use super::super::counters::add;
use super::super::env::{Clock, Env};
use super::super::index::{Extent, REGION_SECTORS};
use super::super::queue::{HitError, Reader};
use super::super::scrub::ScrubOptions;
use super::super::segments::State;
use super::super::stripes::lock;
use super::super::syncer::{Durable, Outcome};
use super::super::volume::VolumeCore;
use super::Progress;
use super::housekeeper::life;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{PAGE, SegmentHeader, Superblock, Tail, VolumeDescriptor};
use crate::pmem::Pmem;
use crate::sync::atomic::Ordering;
use crate::units::SectorRange;

/// Most that is read in one step.
const SLICE: u64 = 1 << 20;
/// What a look at a region without data counts for: a large, empty disk must not keep a core busy.
const LOOK: u64 = 4096;
/// Time of the rate that may be saved up, in milliseconds: two sleeps of an idle housekeeper.
const BURST_MS: u64 = 400;
/// From the start to the first pass at the latest: who starts has other things to read.
const FIRST_MS: u64 = 600_000;
/// How long a guest counts as at work after a request.
const BUSY_MS: u64 = 1000;
/// Part of the rate while guests are at work.
const SHARE_WHILE_BUSY: u64 = 4;

/// Where a pass stands.
enum Pass {
    /// The next one begins at a moment, once that is known.
    Rest(Option<u64>),
    /// Volumes still to be read, by incarnation, and the next sector of the first of them.
    Data(VecDeque<u64>, u64),
    /// The next segment.
    Segments(u32),
    Pages,
}

/// What was dropped and is not durably dead yet.
struct Healing {
    ticket: Durable,
    dropped: Vec<(Arc<VolumeCore>, u64)>,
}

pub(super) struct Scrubber<E: Env> {
    cache: Arc<Cache<E>>,
    pass: Pass,
    began_ms: u64,
    /// Bytes that may be read now, and when that was last raised.
    budget: i64,
    raised_ms: u64,
    /// Requests of guests at the last look.
    requests: u64,
    busy_until_ms: u64,
    healing: Option<Healing>,
    /// Where dirty damage was found in this pass, and in the last one: each is told once.
    told: [HashSet<u64>; 2],
    /// Damaged segments, for reclaim.
    pub damaged: Vec<u32>,
}

impl<E: Env> Scrubber<E> {
    pub fn new(cache: Arc<Cache<E>>) -> Self {
        Self {
            cache,
            pass: Pass::Rest(None),
            began_ms: 0,
            budget: 0,
            raised_ms: 0,
            requests: 0,
            busy_until_ms: 0,
            healing: None,
            told: Default::default(),
            damaged: Vec::new(),
        }
    }

    /// Reads a slice, if it is time to.
    pub fn step(&mut self) -> Progress {
        if let Some(healing) = self.healing.take() {
            return self.heal(healing);
        }
        let options = self.cache.scrub.options();
        if options.bytes_per_s == 0 {
            // The next pass begins anew.
            self.pass = Pass::Rest(None);
            self.cache.scrub.running.store(0, Ordering::Relaxed);
            return Progress::Idle;
        }
        let now_ms = self.cache.clock.now_ms();
        if !self.is_time(&options, now_ms) {
            return Progress::Idle;
        }
        let read = match std::mem::replace(&mut self.pass, Pass::Rest(None)) {
            Pass::Rest(_) => self.begin(now_ms),
            Pass::Data(volumes, from) => self.data(volumes, from),
            Pass::Segments(id) => self.segment(id),
            Pass::Pages => self.pages(&options, now_ms),
        };
        self.budget -= read as i64;
        self.cache.scrub.bytes.fetch_add(read, Ordering::Relaxed);
        Progress::Did
    }

    /// Whether a slice is due and paid for.
    fn is_time(&mut self, options: &ScrubOptions, now_ms: u64) -> bool {
        if let Pass::Rest(next_ms) = &mut self.pass {
            let next_ms = *next_ms.get_or_insert(now_ms + options.interval_ms.min(FIRST_MS));
            if now_ms < next_ms {
                return false;
            }
        }
        let elapsed_ms = now_ms.saturating_sub(self.raised_ms).min(BURST_MS);
        let requests = self.requests_so_far();
        if std::mem::replace(&mut self.requests, requests) != requests {
            self.busy_until_ms = now_ms + BUSY_MS;
        }
        let rate = options.bytes_per_s / if now_ms < self.busy_until_ms { SHARE_WHILE_BUSY } else { 1 };
        self.raised_ms = now_ms;
        let rate = rate * if mutated(Mutant::ScrubUnpaced) { 16 } else { 1 };
        let earned = (rate * elapsed_ms / 1000) as i64;
        self.budget = (self.budget + earned).min((rate * BURST_MS / 1000) as i64);
        self.budget > 0
    }

    fn requests_so_far(&self) -> u64 {
        let volumes = self.cache.all_volumes();
        let queues = volumes.iter().flat_map(|v| v.queues.iter());
        queues.map(|q| q.tally.reads.load(Ordering::Relaxed) + q.tally.writes.load(Ordering::Relaxed)).sum()
    }

    fn begin(&mut self, now_ms: u64) -> u64 {
        self.began_ms = now_ms;
        self.told.swap(0, 1);
        self.told[0].clear();
        self.cache.scrub.running.store(1, Ordering::Relaxed);
        let volumes = self.cache.all_volumes().iter().map(|v| v.incarnation).collect();
        self.pass = Pass::Data(volumes, 0);
        0
    }

    /// What was dropped is durably dead, or never will be.
    fn heal(&mut self, healing: Healing) -> Progress {
        match self.cache.syncer.outcome(healing.ticket) {
            Outcome::Waiting if !mutated(Mutant::HealedBeforeDurable) => {
                self.healing = Some(healing);
                return Progress::Waiting;
            }
            Outcome::Failed => {}
            _ => {
                for (volume, sectors) in healing.dropped {
                    add(&volume.tally.scrub_healed_sectors, sectors);
                }
            }
        }
        Progress::Did
    }

    /// Verifies what the index shows of the next regions.
    fn data(&mut self, mut volumes: VecDeque<u64>, mut from: u64) -> u64 {
        let Some(volume) = volumes.front().and_then(|&id| self.cache.volume_of(id)) else {
            volumes.pop_front();
            self.pass = if volumes.is_empty() { Pass::Segments(0) } else { Pass::Data(volumes, 0) };
            return 0;
        };
        let (end, mut read, mut dropped) = (volume.descriptor_sectors(), 0, 0);
        // Where the records of dirty data are gone nobody can tell clean from dirty.
        let is_doubtful = volume.damaged.load(Ordering::Relaxed);
        while from < end && read < SLICE && !is_doubtful {
            let range = SectorRange::new(from, (end - from).min(REGION_SECTORS - from % REGION_SECTORS));
            let mut found = Vec::new();
            volume.index.lookup(range, &mut found);
            let mut bytes = 0;
            for extent in found.iter().filter(|e| !e.place.zero) {
                bytes += extent.range.len * 512;
                if self.is_bad(extent) {
                    dropped += self.judge(&volume, *extent);
                }
            }
            add(&volume.tally.scrubbed_sectors, bytes / 512);
            read += bytes.max(LOOK);
            from = range.end();
        }
        if dropped > 0 {
            self.make_durable(&volume, dropped);
        }
        if from >= end || is_doubtful {
            volumes.pop_front();
            from = 0;
        }
        self.pass = Pass::Data(volumes, from);
        read
    }

    fn is_bad(&self, extent: &Extent) -> bool {
        let verified =
            self.cache.copy_extent(extent, Reader::Worker, !mutated(Mutant::ScrubBelieves), |_, _| Ok(()));
        matches!(verified, Err(HitError::Checksum | HitError::Media(_)))
    }

    /// Deals with an extent of which something is damaged. Returns how many clean sectors were dropped.
    fn judge(&mut self, volume: &Arc<VolumeCore>, extent: Extent) -> u64 {
        let mut dropped = 0;
        for part in self.cache.checked_parts(extent) {
            if !self.is_bad(&part) {
                continue;
            }
            // As it is shown now: what was dirty may be clean by now, never the other way round.
            let mut shown = Vec::new();
            volume.index.lookup(part.range, &mut shown);
            shown.retain(|e| e.place.is_same_payload(&part.place_at(e.range.start)));
            for now in shown {
                add(&volume.tally.checksum_errors, 1);
                if now.place.dirty && !mutated(Mutant::ScrubDropsDirty) {
                    self.call_write_back(volume, &now);
                } else {
                    tracing::warn!(
                        volume = volume.descriptor_name(), range = %now.range,
                        "scrub: a clean cached copy is damaged and is dropped; the disk has it"
                    );
                    dropped += self.cache.drop_damaged(volume, now);
                }
            }
        }
        dropped
    }

    /// Dirty data is damaged: the next round of write-back says so durably.
    fn call_write_back(&mut self, volume: &VolumeCore, extent: &Extent) {
        let position = extent.place.position;
        if self.told[0].insert(position) && !self.told[1].contains(&position) {
            let (volume_name, range) = (volume.descriptor_name(), extent.range);
            tracing::error!(volume = volume_name, %range, "scrub: dirty data is damaged: these sectors answer with an error");
            add(&volume.tally.scrub_dirty_sectors, range.len);
        }
        volume.damage_seen.store(true, Ordering::Relaxed);
        volume.writeback.raise();
    }

    fn make_durable(&mut self, volume: &Arc<VolumeCore>, sectors: u64) {
        match self.cache.write_liveness(None) {
            Ok(ticket) => {
                self.healing = Some(Healing { ticket, dropped: vec![(volume.clone(), sectors)] });
            }
            // It stays pending, and whoever writes liveness words next tries again.
            Err(error) => tracing::error!(%error, "scrub: liveness words cannot be written"),
        }
    }

    /// Verifies one segment's metadata.
    fn segment(&mut self, id: u32) -> u64 {
        let count = self.cache.segments.len() as u32;
        self.pass = if id + 1 < count { Pass::Segments(id + 1) } else { Pass::Pages };
        if self.cache.segments[id as usize].state() != State::Sealed {
            return LOOK;
        }
        let (what, read) = self.judge_segment(id);
        if let Some(what) = what {
            self.note_metadata(&format!("segment {id}: {what}"));
            self.damaged.push(id);
        }
        self.judge_liveness(id);
        read.max(LOOK)
    }

    /// What is damaged of a sealed segment's header, summary and records, and how much was read.
    fn judge_segment(&self, id: u32) -> (Option<String>, u64) {
        let (cache, media) = (&self.cache, &self.cache.media);
        let segment = &cache.segments[id as usize];
        let copies = media.load_header(id);
        let is_damaged = copies.is_damaged();
        let Some(header) = copies.newest else {
            return (Some("both copies of its header are damaged".to_owned()), LOOK);
        };
        if is_damaged {
            self.note_metadata(&format!("segment {id}: a copy of its header"));
            self.note_healed(
                cache.write_header(id, |h| *h = SegmentHeader { sequence: h.sequence, ..header }),
            );
        }
        let mut read = u64::from(header.summary_len);
        let has_summary = header.summary_len > 0;
        if has_summary && let Err(error) = media.scan_summary(id, &header) {
            return (Some(format!("its summary: {error}")), read);
        }
        // One that recovery has sealed may hold holes: there the summary alone says what counts.
        if has_summary && segment.start_counter.load(Ordering::Relaxed) != cache.start_counter {
            return (None, read);
        }
        let (top, low) = (media.geometry.data_end(), segment.log_low.load(Ordering::Acquire));
        read += u64::from(top - low);
        let walked = media.walk_from(id, &life(cache, id), top, low, u64::MAX, |_| {});
        (walked.err().map(|error| format!("its records: {error}")), read)
    }

    /// Verifies a segment's liveness words; where they do not hold, no clean key of it outlives the daemon.
    fn judge_liveness(&self, id: u32) {
        let segment = &self.cache.segments[id as usize];
        // Nobody writes words meanwhile.
        let _writer = lock(&self.cache.liveness.writer);
        let generation = segment.generation.load(Ordering::Relaxed);
        if segment.is_buried.load(Ordering::Relaxed)
            || !self.cache.media.load_liveness(id, generation).is_damaged
        {
            return;
        }
        self.note_metadata(&format!("segment {id}: its liveness words"));
        self.note_healed(self.cache.bury(id));
    }

    /// Verifies the pages of metadata, and ends the pass.
    fn pages(&mut self, options: &ScrubOptions, now_ms: u64) -> u64 {
        self.judge_superblock();
        let is_damaged = {
            let _start = lock(&self.cache.start);
            load_start(&self.cache.media).is_damaged()
        };
        if is_damaged {
            self.note_metadata("a copy of the start page");
            self.note_healed(self.cache.update_start(|_| {}));
        }
        let volumes = self.cache.all_volumes();
        volumes.iter().for_each(|volume| self.judge_volume(volume));
        let scrub = &self.cache.scrub;
        scrub.passes.fetch_add(1, Ordering::Relaxed);
        scrub.last_pass_ms.store(now_ms.saturating_sub(self.began_ms), Ordering::Relaxed);
        scrub.last_pass_unix_ms.store(self.cache.clock.unix_ms(), Ordering::Relaxed);
        scrub.running.store(0, Ordering::Relaxed);
        self.pass = Pass::Rest(Some(self.began_ms + options.interval_ms));
        (volumes.len() as u64 + 1) * 4 * PAGE as u64
    }

    fn judge_superblock(&self) {
        let media = &self.cache.media;
        let at = [0, 1].map(|copy| media.geometry.superblock(copy));
        let read = at.map(|at| {
            let page = super::super::media::read_page(&*media.pmem, at).ok()?;
            Superblock::decode(&page[..]).ok().map(|_| page)
        });
        let (bad, good) = match &read {
            [None, Some(good)] => (at[0], good),
            [Some(good), None] => (at[1], good),
            // Both good, or nothing to make one good from: the start that comes will say so.
            _ => return,
        };
        self.note_metadata("a copy of the superblock");
        let written = media.pmem.write(bad, &good[..]);
        media.pmem.fence();
        self.note_healed(written);
    }

    fn judge_volume(&self, volume: &VolumeCore) {
        let (media, slot) = (&self.cache.media, volume.slot);
        // With the lock under which it is written.
        let descriptor = lock(&volume.descriptor);
        let copies = media.load(
            |copy| media.geometry.descriptor(slot, copy),
            |bytes| VolumeDescriptor::decode(bytes, &media.uuid, slot),
        );
        drop(descriptor);
        if copies.is_damaged() {
            self.note_metadata(&format!("a copy of the descriptor of `{}`", volume.descriptor_name()));
            let once = || self.cache.update_descriptor(volume, |_| {});
            self.note_healed(once().and_then(|()| once()));
        }
        let page = lock(&volume.tail_page);
        let copies = media.load(
            |copy| media.geometry.tail(slot, copy),
            |bytes| Tail::decode(bytes, &media.uuid, volume.incarnation),
        );
        drop(page);
        if copies.is_damaged() {
            self.note_metadata(&format!("a copy of the tail of `{}`", volume.descriptor_name()));
        }
    }

    fn note_metadata(&self, what: &str) {
        self.cache.scrub.metadata_damaged.fetch_add(1, Ordering::Relaxed);
        tracing::warn!("scrub: damaged metadata: {what}");
    }

    /// Notes how a repair went.
    fn note_healed<X: std::fmt::Display>(&self, repaired: Result<(), X>) {
        match repaired {
            Ok(()) => _ = self.cache.scrub.metadata_healed.fetch_add(1, Ordering::Relaxed),
            Err(error) => tracing::error!(%error, "scrub: it cannot be repaired"),
        }
    }
}

impl<E: Env> Cache<E> {
    /// Ceases to show clean data that is damaged; the disk has it. Returns how many sectors those were.
    ///
    /// The liveness writer's mutex is held from the index to the marks, so that a write around the cache
    /// that finds nothing in the index waits until the marks are there to be written.
    pub(crate) fn drop_damaged(&self, core: &VolumeCore, extent: Extent) -> u64 {
        let mut removed = Vec::new();
        let _writer = lock(&self.liveness.writer);
        core.index.remove_if(extent, &mut removed);
        self.mark_dead(&removed);
        removed.iter().map(|e| e.range.len).sum()
    }
}
