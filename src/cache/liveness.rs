//! Liveness words: how a superseded clean copy is kept from coming back after a crash.
//!
//! Law 4: before a segment is freed, or a bypassing write is acknowledged, everything superseded so
//! far is durably dead. Queue threads only mark sectors dead in DRAM ([`Cache::mark_dead`]);
//! [`Cache::write_liveness`] writes what changed. It runs under one mutex *including its fence*, so
//! that nobody sees an empty list while another's words are still on their way.

use super::core::Cache;
use super::env::Env;
use super::index::Extent;
use super::segments::State;
use super::stripes::lock;
use super::syncer::Durable;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{Key, liveness_word};
use crate::pmem::{MediaError, Pmem};
use crate::sync::Mutex;
use crate::sync::atomic::Ordering;
use crate::units::SectorRange;
use crate::wake::Waker;

#[derive(Default)]
pub(crate) struct Liveness {
    /// Segments with words to write.
    pending: Mutex<Vec<u32>>,
    /// Held while words are written and fenced, and while an eviction is half done.
    pub writer: Mutex<()>,
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
    /// The media refused a word: that segment stays pending and nothing may be freed.
    pub(crate) fn write_liveness(&self, waker: Option<&Waker>) -> Result<Durable, MediaError> {
        let _writer = lock(&self.liveness.writer);
        let pending = std::mem::take(&mut *lock(&self.liveness.pending));
        let mut failed = None;
        for id in pending {
            let segment = &self.segments[id as usize];
            segment.liveness_pending.swap(false, Ordering::AcqRel);
            if matches!(segment.state(), State::Free | State::Bad) {
                continue;
            }
            let generation = segment.generation.load(Ordering::Relaxed);
            let base = self.media.in_segment(id, self.media.geometry.liveness_offset());
            segment.take_changed(|index, bits| {
                if mutated(Mutant::LivenessNotWritten) {
                    return;
                }
                let word = liveness_word(&self.media.secret, id, generation, index, bits);
                if let Err(e) = self.media.pmem.write(base + u64::from(index) * 8, &word.to_le_bytes()) {
                    failed = Some((id, e));
                }
            });
        }
        let ticket = self.syncer.request(&*self.media.pmem, waker);
        match failed {
            None => Ok(ticket),
            Some((id, e)) => {
                self.list_pending(id);
                Err(e)
            }
        }
    }
}
