//! The housekeeper of a cache: seals full segments, and reclaims clean ones when free ones run low.
//!
//! Reclaim, in this order, and what breaks if two steps are swapped:
//! 1. relocate what guests have read (`relocate.rs`), then evict the rest: the index no longer shows
//!    the segment (else a reader could start on it later);
//! 2. grace: every queue leaves the section it is in (else a reader may still be copying, or a
//!    publisher may not yet have marked what it superseded);
//! 3. liveness words of all that has died are made durable (else an older copy could come back
//!    once this segment's newer one is gone: law 4);
//! 4. the header says free with a higher generation, durably (law 5);
//! 5. it goes on the free list, and whoever waits for space is woken.
//!
//! Eviction holds the liveness writer's mutex from the index to the marks, so that a bypassing
//! write that finds nothing in the index waits until the marks are there to be written.
//!
//! Which segments, is in `victims.rs`. A step relocates and evicts one of them at most; while no
//! segment is free, only one of a batch is relocated: those who wait for space come first.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::super::core::Cache;
use super::super::counters::add;
use super::super::env::{Clock, Env};
use super::super::index::Extent;
use super::super::resize::ResizeError;
use super::super::segments::State;
use super::super::stream::Open;
use super::super::stripes::lock;
use super::super::syncer::{Durable, Outcome};
use super::super::volume::VolumeCore;
use super::Progress;
use super::relocate::Relocator;
use super::resize::Task;
use super::scrub::Scrubber;
use super::victims::Budget;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{Key, SegmentHeader, SegmentState};
use crate::pmem::Pmem;

/// Segments taken at a time: on page-cache media each batch costs two `sync`s.
const BATCH: usize = 8;

/// Where a batch of victims stands.
enum Stage {
    Idle,
    /// To be emptied, one at a time; and those that are empty.
    Emptying(VecDeque<u32>, Vec<u32>),
    /// Liveness words written; headers next.
    Buried(Durable, Vec<u32>),
    /// Headers written; free next.
    Freed(Durable, Vec<u32>),
}

pub(crate) struct Housekeeper<E: Env> {
    pub(super) cache: Arc<Cache<E>>,
    pub(super) relocator: Relocator<E>,
    scrubber: Scrubber<E>,
    /// Whether anything is relocated; otherwise clean data is dropped, first in first out.
    pub(super) relocates: bool,
    /// Victims looked for so far.
    pub(super) turn: usize,
    /// What may be copied of clean segments.
    pub(super) budget: Budget,
    stage: Stage,
    /// Full segments, to be sealed once their records are durable.
    sealing: Option<(Durable, Vec<u32>)>,
    noted_failure: bool,
    /// A change of the cache's size, and whether its turn comes before reclaim's.
    pub(super) resizing: Option<Task>,
    resizes_first: bool,
    /// Number of the last `sync` that open segments know of.
    witnessed: u64,
}

impl<E: Env> Housekeeper<E> {
    pub fn new(cache: Arc<Cache<E>>) -> Self {
        Self {
            relocator: Relocator::new(cache.clone()),
            scrubber: Scrubber::new(cache.clone()),
            relocates: true,
            turn: 0,
            budget: Budget::new(u64::from(cache.capacity_sectors())),
            cache,
            stage: Stage::Idle,
            sealing: None,
            noted_failure: false,
            resizing: None,
            resizes_first: false,
            witnessed: 0,
        }
    }

    /// Does a bounded piece of work.
    pub fn step(&mut self) -> Progress {
        self.cache.recent_ms.store(self.cache.clock.unix_ms(), Ordering::Relaxed);
        if self.cache.syncer.has_failed() {
            return self.note_failure();
        }
        if self.seal_some() {
            return Progress::Did;
        }
        self.witness();
        match std::mem::replace(&mut self.stage, Stage::Idle) {
            Stage::Idle => self.begin(),
            Stage::Emptying(full, empty) => self.empty_one(full, empty),
            Stage::Buried(ticket, victims) => match self.cache.syncer.outcome(ticket) {
                Outcome::Waiting if mutated(Mutant::SourceFreedBeforeCopy) => self.free_headers(victims),
                Outcome::Reached => self.free_headers(victims),
                _ => self.stay(Stage::Buried(ticket, victims)),
            },
            Stage::Freed(ticket, victims) => match self.cache.syncer.outcome(ticket) {
                Outcome::Waiting if mutated(Mutant::ReusedBeforeGenerationDurable) => self.hand_out(victims),
                Outcome::Reached => self.hand_out(victims),
                _ => self.stay(Stage::Freed(ticket, victims)),
            },
        }
    }

    /// Begins something: space for guests and a change of size take turns.
    fn begin(&mut self) -> Progress {
        self.resizes_first = !self.resizes_first;
        let mut waits = self.sealing.is_some();
        for resizes in [self.resizes_first, !self.resizes_first] {
            match if resizes { self.resize() } else { self.choose() } {
                Progress::Did => return Progress::Did,
                Progress::Waiting => waits = true,
                Progress::Idle => {}
            }
        }
        if waits { Progress::Waiting } else { self.scrub() }
    }

    /// Empties these segments, which were taken off the list, and frees them.
    pub(super) fn empty(&mut self, victims: Vec<u32>) {
        self.stage = Stage::Emptying(victims.into(), Vec::new());
    }

    /// Notes in open segments what has become durable since the last look: for streams that have
    /// fallen silent, as the next record of the others does it.
    fn witness(&mut self) {
        let completed = self.cache.syncer.completed();
        let by_sync = !self.cache.media.pmem.class().fence_is_durable();
        if std::mem::replace(&mut self.witnessed, completed) == completed && by_sync {
            return;
        }
        for volume in self.cache.all_volumes() {
            for stream in volume.all_streams() {
                // Whoever holds it is about to append, and does this first.
                let Ok(mut stream) = stream.try_lock() else { continue };
                if let Some(open) = &mut stream.open {
                    open.witness_durable(&self.cache.media, completed);
                }
            }
        }
        self.cache.settle_floors();
        self.relocator.witness(completed);
        self.cache.media.pmem.fence();
    }

    fn stay(&mut self, stage: Stage) -> Progress {
        self.stage = stage;
        Progress::Waiting
    }

    /// Remembers on the media that a `sync` failed, as far as the media takes it.
    fn note_failure(&mut self) -> Progress {
        if !std::mem::replace(&mut self.noted_failure, true) {
            // The `sync` behind this fails too; the bytes may still reach the device by themselves.
            if let Err(error) = self.cache.update_start(|page| page.sync_failed = true) {
                tracing::warn!(%error, "the failure cannot be noted durably on the cache itself");
            }
            self.cache.all_volumes().iter().for_each(|v| v.wake_waiting());
        }
        self.resizing = None;
        self.cache.resizing.end(Err(ResizeError::SyncFailed));
        Progress::Idle
    }

    /// Seals full segments whose records are durable. A sealed header promises all of them, and a
    /// summary is believed without a look at the payload: neither may be there first.
    fn seal_some(&mut self) -> bool {
        let (ticket, ids) = match self.sealing.take() {
            Some(sealing) => sealing,
            None => {
                let full: Vec<u32> = lock(&self.cache.full).drain(..).collect();
                if full.is_empty() {
                    return false;
                }
                (self.cache.syncer.request(&*self.cache.media.pmem, None), full)
            }
        };
        if self.cache.syncer.outcome(ticket) != Outcome::Reached && !mutated(Mutant::SealedBeforeDurable) {
            self.sealing = Some((ticket, ids));
            return false;
        }
        ids.into_iter().for_each(|id| self.seal(id));
        true
    }

    /// Seals one segment. What it holds is read back from its records.
    fn seal(&self, id: u32) {
        let cache = &self.cache;
        let segment = &cache.segments[id as usize];
        let header = life(&self.cache, id);
        let (mut keys, mut checksums) = (Vec::new(), Vec::new());
        let log_low = segment.log_low.load(Ordering::Acquire);
        let top = cache.media.geometry.data_end();
        let walked = cache.media.walk_from(id, &header, top, log_low, u64::MAX, |record| {
            keys.extend_from_slice(&record.keys);
            checksums.extend_from_slice(&record.checksums);
        });
        let sealed = match walked {
            Ok(_) => cache
                .seal(id, header.incarnation, segment.class().stream(0), header.generation, &keys, &checksums)
                .map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = sealed {
            // It stays readable by its records, and reclaim may still free it.
            tracing::error!(segment = id, error, "a segment cannot be sealed");
        }
        segment.set_state(State::Sealed);
        lock(&cache.sealed).push_back(id);
    }

    /// Nothing else is to be done.
    fn scrub(&mut self) -> Progress {
        while let Some(id) = self.scrubber.damaged.pop() {
            if self.take(id) {
                add(&self.cache.scrub.metadata_healed, 1);
                self.stage = Stage::Emptying(VecDeque::from([id]), Vec::new());
                return Progress::Did;
            }
        }
        self.scrubber.step()
    }

    /// Takes victims if free segments run low.
    fn choose(&mut self) -> Progress {
        self.cache.wake_refused();
        if self.choose_own() {
            return Progress::Did;
        }
        let (free, target) = (self.cache.unpromised(), self.cache.free_target());
        // Below the bound on the index a part of the cache stays empty.
        let over = if self.cache.look_at_index() { (self.cache.segments.len() / 32).max(1) } else { 0 };
        let wanted = target.saturating_sub(free).max(over);
        if wanted == 0 {
            return Progress::Idle;
        }
        if self.relocates {
            self.relocator.fill_reserve();
        }
        let victims = self.pick(wanted.min(BATCH), None);
        if !victims.is_empty() {
            self.cache.is_exhausted.store(false, Ordering::SeqCst);
            self.stage = Stage::Emptying(victims.into(), Vec::new());
            return Progress::Did;
        }
        for volume in self.cache.all_volumes() {
            volume.writeback.raise();
        }
        let has_moved = self.relocates && self.move_pinned(None);
        if has_moved || free == 0 && self.close_idle_streams(None) {
            return Progress::Did;
        }
        if free == 0 && self.sealing.is_none() && !self.cache.is_exhausted.swap(true, Ordering::SeqCst) {
            // Those who must not wait for a disk that fails have to know.
            self.cache.all_volumes().iter().for_each(|v| v.wake_waiting());
        }
        Progress::Idle
    }

    /// Takes victims of a volume that holds, or is about to hold, all that it may by its own `max` or
    /// `gc_percent`: nobody else gives anything for it. Says whether there was anything to do.
    fn choose_own(&mut self) -> bool {
        for volume in self.cache.all_volumes() {
            let excess = self.cache.excess_of(&volume);
            if excess == 0 {
                continue;
            }
            if self.relocates {
                self.relocator.fill_reserve();
            }
            let victims = self.pick(excess.min(BATCH), Some(volume.incarnation));
            if !victims.is_empty() {
                volume.share.note_stuck(false);
                self.stage = Stage::Emptying(victims.into(), Vec::new());
                return true;
            }
            if !volume.share.waits() {
                continue;
            }
            volume.writeback.raise();
            let has_moved = self.relocates && self.move_pinned(Some(&volume));
            if has_moved || self.close_idle_streams(Some(&volume)) {
                return true;
            }
            if self.sealing.is_none() && volume.share.note_stuck(true) {
                volume.wake_waiting();
            }
        }
        false
    }

    /// Takes out of one victim what is worth keeping, and the rest out of the index.
    fn empty_one(&mut self, mut full: VecDeque<u32>, mut empty: Vec<u32>) -> Progress {
        if let Some(id) = full.pop_front() {
            if self.relocates && (empty.is_empty() || self.cache.free_segments() > 0) {
                self.relocator.save_hot(id, self.least_heat(id), self.budget.sectors());
            }
            if !mutated(Mutant::EvictionLeavesIndex) {
                self.evict(id);
            }
            empty.push(id);
        }
        if full.is_empty() {
            return self.bury(empty);
        }
        self.stage = Stage::Emptying(full, empty);
        Progress::Did
    }

    /// Makes everything that has died durably dead, and all copies durable.
    fn bury(&mut self, victims: Vec<u32>) -> Progress {
        for volume in self.cache.all_volumes() {
            volume.wait_for_readers();
        }
        match self.cache.write_liveness(None) {
            Ok(ticket) => {
                self.stage = Stage::Buried(ticket, victims);
                Progress::Did
            }
            Err(error) => {
                // Nothing may be freed over an older copy that could come back.
                tracing::error!(%error, "liveness words cannot be written: reclaim waits");
                self.put_back(victims);
                Progress::Idle
            }
        }
    }

    fn put_back(&self, victims: Vec<u32>) {
        let mut sealed = lock(&self.cache.sealed);
        for id in victims.into_iter().rev() {
            let segment = &self.cache.segments[id as usize];
            segment.set_state(State::Sealed);
            if let Some(volume) = self.cache.volume_of(segment.owner.load(Ordering::Relaxed)) {
                volume.share.hold();
            }
            sealed.push_front(id);
        }
    }

    /// Removes a segment's entries from its volume's index.
    fn evict(&self, id: u32) {
        let cache = &self.cache;
        let segment = &cache.segments[id as usize];
        let Some(volume) = cache.volume_of(segment.owner.load(Ordering::Relaxed)) else { return };
        if segment.live.load(Ordering::Relaxed) == 0 {
            return;
        }
        let header = life(&self.cache, id);
        let mut extents = Vec::new();
        let mut note = |keys: &[Key]| {
            for key in keys.iter().filter(|k| k.kind.has_payload()) {
                extents.push(Extent { range: key.range(), place: cache.media.place(id, key, false) });
            }
        };
        let is_known = match self.summarised(&header) {
            Some(keys) => {
                note(&keys);
                true
            }
            None => {
                let (top, low) = (cache.media.geometry.data_end(), segment.log_low.load(Ordering::Acquire));
                let walk =
                    cache.media.walk_from(id, &header, top, low, u64::MAX, |record| note(&record.keys));
                walk.is_ok()
            }
        };
        let mut removed = Vec::new();
        let writer = lock(&cache.liveness.writer);
        for extent in extents {
            volume.index.remove_if(extent, &mut removed);
        }
        if !is_known {
            // The records no longer say what it held: ask the index.
            self.evict_by_search(id, &volume, &mut removed);
        }
        cache.mark_dead(&removed);
        drop(writer);
        for extent in removed.iter().filter(|e| !e.place.zero) {
            cache.evicted.note(volume.incarnation, extent.range);
        }
        add(&volume.tally.evicted_sectors, sectors(&removed));
    }

    /// The keys of a sealed segment by its summary: one read and one check, where a record for each write
    /// is as many of both. The index shows none but these.
    fn summarised(&self, life: &SegmentHeader) -> Option<Vec<Key>> {
        let media = &self.cache.media;
        let header = media.load_header(life.segment).newest?;
        let is_of_it = header.generation == life.generation && header.incarnation == life.incarnation;
        let has_summary = header.state == SegmentState::Sealed && header.summary_len > 0;
        let scan = (is_of_it && has_summary).then(|| media.scan_summary(life.segment, &header))?;
        Some(scan.ok()?.keys)
    }

    fn evict_by_search(&self, id: u32, volume: &VolumeCore, removed: &mut Vec<Extent>) {
        let mut extents = Vec::new();
        volume.index.for_each(|extent| {
            if !extent.place.zero && self.cache.media.locate(extent.place.position).0 == id {
                extents.push(extent);
            }
        });
        for extent in extents {
            volume.index.remove_if(extent, removed);
        }
    }

    fn free_headers(&mut self, victims: Vec<u32>) -> Progress {
        let cache = &self.cache;
        let mut freed = Vec::new();
        for id in victims {
            let segment = &cache.segments[id as usize];
            let risen = u64::from(!mutated(Mutant::GenerationNotRaised));
            let generation = segment.generation.load(Ordering::Relaxed) + risen;
            let written = cache.write_header(id, |h| {
                h.state = SegmentState::Free;
                h.generation = generation;
            });
            match written {
                Ok(()) => {
                    segment.generation.store(generation, Ordering::Relaxed);
                    freed.push(id);
                }
                Err(error) => {
                    tracing::error!(%error, segment = id, "a segment cannot be freed and is given up");
                    segment.set_state(State::Bad);
                }
            }
        }
        let ticket = cache.syncer.request(&*cache.media.pmem, None);
        self.stage = Stage::Freed(ticket, freed);
        Progress::Did
    }

    fn hand_out(&mut self, victims: Vec<u32>) -> Progress {
        for id in victims {
            let owner = self.cache.segments[id as usize].owner.load(Ordering::Relaxed);
            if let Some(volume) = self.cache.volume_of(owner) {
                add(&volume.tally.reclaimed, 1);
            }
            if !self.relocates || !self.relocator.take_reserve(id) {
                self.cache.add_free(id);
            }
        }
        for volume in self.cache.all_volumes() {
            volume.wake_waiting();
        }
        Progress::Did
    }

    /// Ends the segments of streams that nobody appends to right now, of one volume or all, so that
    /// write-back and reclaim can have them. Says whether there were any.
    fn close_idle_streams(&self, of: Option<&Arc<VolumeCore>>) -> bool {
        let mut closed = false;
        let is_meant = |v: &Arc<VolumeCore>| of.is_none_or(|of| Arc::ptr_eq(of, v));
        for volume in self.cache.all_volumes().into_iter().filter(is_meant) {
            let of_fills = volume.fill_streams.get().into_iter().flatten();
            let streams = volume.streams.iter().map(|s| (s, true)).chain(of_fills.map(|s| (s, false)));
            for (stream, is_waited_for) in streams {
                let Ok(mut stream) = stream.try_lock() else { continue };
                // Whoever opened one for a write is about to use it. A fill may have been given up.
                let is_over = |open: &Open| open.is_used() || !is_waited_for;
                if stream.open.as_ref().is_some_and(is_over) {
                    self.cache.close_segment(&mut stream);
                    closed = true;
                }
            }
        }
        closed
    }
}

/// What the records of the present life of a segment say of it.
pub(super) fn life<E: Env>(cache: &Cache<E>, id: u32) -> SegmentHeader {
    let segment = &cache.segments[id as usize];
    SegmentHeader {
        segment: id,
        incarnation: segment.owner.load(Ordering::Relaxed),
        generation: segment.generation.load(Ordering::Relaxed),
        start_counter: segment.start_counter.load(Ordering::Relaxed),
        ..SegmentHeader::default()
    }
}

fn sectors(extents: &[Extent]) -> u64 {
    extents.iter().filter(|e| !e.place.zero).map(|e| e.range.len).sum()
}
