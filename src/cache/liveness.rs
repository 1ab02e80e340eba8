//! Liveness words: how a superseded clean copy is kept from coming back after a crash.
//!
//! Law 4: before a segment is freed, or a bypassing write is acknowledged, everything superseded so
//! far is durably dead. Queue threads only mark sectors dead in DRAM ([`Cache::mark_dead`]);
//! [`Cache::write_liveness`] writes what changed. It runs under one mutex *including its fence*, so
//! that nobody sees an empty list while another's words are still on their way.
//!
//! A segment's *floor* says how many bits its words had durably set, so that words which hardware put
//! back to an earlier state are not believed. Laws of the floor:
//! - it is written after the words it counts are durable, or a crash could make words look damaged;
//! - words that are damaged, and words that cannot be written, are answered by a floor that no words
//!   reach ([`LivenessFloor::ALL`]) *before* anything else is written there: from then on no clean
//!   key of that life counts, whatever becomes of the words.
//!
//! On page-cache media the floor of words follows with a later call, when a `sync` has made them
//! durable, and asks for none itself. Until it is durable a stale word may pass for a good one; the
//! words themselves lag behind nothing.

use super::core::Cache;
use super::env::Env;
use super::index::Extent;
use super::media::Media;
use super::segments::{Segment, State};
use super::stripes::lock;
use super::syncer::{Durable, Outcome};
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{Key, LivenessFloor, liveness_bits, liveness_word};
use crate::pmem::{MediaError, Pmem};
use crate::sync::Mutex;
use crate::sync::atomic::Ordering;
use crate::units::SectorRange;
use crate::wake::Waker;

/// A floor to be written once the words it counts are durable.
pub(crate) struct Floor {
    words: Durable,
    segment: u32,
    generation: u64,
    dead: u32,
}

#[derive(Default)]
pub(crate) struct Liveness {
    /// Segments with words to write.
    pending: Mutex<Vec<u32>>,
    /// Held while words are written and fenced, and while an eviction is half done.
    pub writer: Mutex<Vec<Floor>>,
}

/// What a segment's liveness words say.
pub(crate) struct Dead {
    /// The words; `None` for one that was left over from the life before.
    pub words: Vec<Option<u32>>,
    /// Whether they are not what they were: no clean key of the segment counts.
    pub is_damaged: bool,
}

impl<P: Pmem> Media<P> {
    /// Reads a segment's liveness words and judges them by its floor.
    pub fn load_liveness(&self, id: u32, generation: u64) -> Dead {
        let count = self.geometry.liveness_words();
        let mut bytes = vec![0; count as usize * 8];
        let at = self.in_segment(id, self.geometry.liveness_offset());
        let mut is_damaged = self.pmem.read(at, &mut bytes).is_err();
        let bits = |index: u32, generation, word| {
            liveness_bits(&self.secret, id, generation, index, u64::from_le_bytes(word)).ok()
        };
        let mut words = Vec::with_capacity(count as usize);
        for (index, &word) in (0..).zip(bytes.as_chunks::<8>().0) {
            let now = bits(index, generation, word);
            // On page-cache media a crash may lose the zeros that a life begins with.
            is_damaged |= now.is_none() && bits(index, generation.wrapping_sub(1), word).is_none();
            words.push(now);
        }
        let dead: u32 = words.iter().flatten().map(|bits| bits.count_ones()).sum();
        is_damaged |= dead < self.load_floor(id, generation);
        Dead { words, is_damaged }
    }

    fn load_floor(&self, id: u32, generation: u64) -> u32 {
        let line = |copy| {
            let mut bytes = [0; LivenessFloor::SIZE];
            self.pmem.read(self.in_segment(id, self.geometry.floor_offset(copy)), &mut bytes).ok()?;
            let floor = LivenessFloor::decode(&bytes, &self.secret, id).ok()?;
            let counts = floor.generation == generation && !mutated(Mutant::LivenessFloorIgnored);
            counts.then_some(floor.dead)
        };
        line(0).max(line(1)).unwrap_or(0)
    }

    fn write_floor(&self, copy: usize, id: u32, generation: u64, dead: u32) -> Result<(), MediaError> {
        let floor = LivenessFloor { generation, dead, segment: id };
        self.pmem.write(self.in_segment(id, self.geometry.floor_offset(copy)), &floor.encode(&self.secret))
    }
}

impl<E: Env> Cache<E> {
    /// Marks the payload of `extents` dead: the index has just ceased to point at it.
    pub(crate) fn mark_dead(&self, extents: &[Extent]) {
        for extent in extents.iter().filter(|e| !e.place.zero) {
            let (id, offset) = self.media.locate(extent.place.position);
            let segment = &self.segments[id as usize];
            segment.live.fetch_sub(extent.range.len as u32, Ordering::Relaxed);
            self.mark_sectors_dead(id, offset / 512, extent.range.len as u32);
        }
    }

    /// Marks payload dead that the index never pointed at.
    pub(crate) fn mark_sectors_dead(&self, id: u32, first: u32, sectors: u32) {
        if self.segments[id as usize].mark_dead(first, sectors) > 0 {
            self.list_pending(id);
        }
    }

    /// Puts a segment on the list of those with words to write, unless it stands there.
    ///
    /// `liveness_pending` says that it does, and so is raised together with the list: raised first,
    /// it would let another thread go by a segment that is not there yet, write an empty list and
    /// take its own marks for durable. Both sides change the flag and do not just look at it, so
    /// that whoever clears it sees every mark made before it was found raised.
    fn list_pending(&self, id: u32) {
        let flag = &self.segments[id as usize].liveness_pending;
        if flag.compare_exchange(true, true, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            let mut pending = lock(&self.liveness.pending);
            if !flag.swap(true, Ordering::AcqRel) {
                pending.push(id);
            }
        }
    }

    /// Marks dead those parts of a new key's payload that the index was not made to point at. All of
    /// it counted as live; `mapped` is ascending.
    pub(crate) fn mark_unmapped_dead(&self, id: u32, key: &Key, mapped: &[Extent]) {
        let (mut at, end) = (key.first, key.range().end());
        for part in mapped.iter().map(|e| e.range).chain([SectorRange::new(end, 1)]) {
            if part.start > at {
                let dead = (part.start - at) as u32;
                self.segments[id as usize].live.fetch_sub(dead, Ordering::Relaxed);
                self.mark_sectors_dead(id, key.payload + (at - key.first) as u32, dead);
            }
            at = part.end();
        }
    }

    /// Writes the liveness words of all that has died; the ticket says when they are durable.
    ///
    /// # Errors
    /// The media refused words, and their floor as well: that segment stays pending and nothing may
    /// be freed.
    pub(crate) fn write_liveness(&self, waker: Option<&Waker>) -> Result<Durable, MediaError> {
        let mut floors = lock(&self.liveness.writer);
        self.write_floors(&mut floors);
        let pending = std::mem::take(&mut *lock(&self.liveness.pending));
        let mut written = Vec::new();
        let mut failed = Ok(());
        for id in pending {
            let segment = &self.segments[id as usize];
            segment.liveness_pending.swap(false, Ordering::AcqRel);
            let is_gone = matches!(segment.state(), State::Free | State::Bad | State::Retired);
            if is_gone || segment.is_buried.load(Ordering::Relaxed) {
                continue;
            }
            let dead = segment.dead_count.load(Ordering::SeqCst);
            match self.write_words(id, segment) {
                Ok(()) => written.push((id, segment.generation.load(Ordering::Relaxed), dead)),
                Err(error) => match self.bury(id) {
                    Ok(()) => tracing::error!(
                        segment = id, %error,
                        "liveness words cannot be written: what is clean in the segment will not outlive the daemon"
                    ),
                    Err(error) => {
                        self.list_pending(id);
                        failed = Err(error);
                    }
                },
            }
        }
        let words = self.syncer.request(&*self.media.pmem, waker);
        let floor = |(segment, generation, dead)| Floor { words, segment, generation, dead };
        floors.extend(written.into_iter().map(floor));
        self.write_floors(&mut floors);
        failed.map(|()| words)
    }

    /// Writes the floors whose words have become durable since the last call.
    pub(crate) fn settle_floors(&self) {
        self.write_floors(&mut lock(&self.liveness.writer));
    }

    fn write_words(&self, id: u32, segment: &Segment) -> Result<(), MediaError> {
        let generation = segment.generation.load(Ordering::Relaxed);
        let base = self.media.in_segment(id, self.media.geometry.liveness_offset());
        let mut result = Ok(());
        segment.take_changed(|index, bits| {
            if mutated(Mutant::LivenessNotWritten) {
                return;
            }
            let word = liveness_word(&self.media.secret, id, generation, index, bits);
            result = result.and(self.media.pmem.write(base + u64::from(index) * 8, &word.to_le_bytes()));
        });
        result
    }

    fn write_floors(&self, floors: &mut Vec<Floor>) {
        let due = |f: &Floor| self.syncer.outcome(f.words) == Outcome::Reached;
        let due: Vec<Floor> = floors.extract_if(.., |f| due(f)).collect();
        if due.is_empty() || mutated(Mutant::LivenessFloorNotWritten) {
            return;
        }
        // One copy after the other: a crash never finds both torn.
        for copy in 0..2 {
            for floor in &due {
                let segment = &self.segments[floor.segment as usize];
                let is_gone = matches!(segment.state(), State::Free | State::Bad | State::Retired)
                    || segment.generation.load(Ordering::Relaxed) != floor.generation;
                if is_gone || segment.is_buried.load(Ordering::Relaxed) {
                    continue;
                }
                let Floor { segment: id, generation, dead, .. } = *floor;
                if let Err(error) = self.media.write_floor(copy, id, generation, dead) {
                    // Without it damage to the words may go unnoticed; the words are what counts.
                    tracing::warn!(%error, segment = id, "cannot write a liveness floor");
                }
            }
            self.media.pmem.fence();
        }
    }

    /// Makes every clean key of a segment's present life dead, whatever its words say.
    ///
    /// # Errors
    /// The media refused.
    pub(super) fn bury(&self, id: u32) -> Result<(), MediaError> {
        let segment = &self.segments[id as usize];
        let generation = segment.generation.load(Ordering::Relaxed);
        for copy in 0..2 {
            self.media.write_floor(copy, id, generation, LivenessFloor::ALL)?;
            self.media.pmem.fence();
        }
        segment.is_buried.store(true, Ordering::Relaxed);
        Ok(())
    }
}
