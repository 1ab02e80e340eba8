//! What a round of write-back takes, and where it goes on. For ordered write-back segments are filed
//! under the epoch of the next record that was not written back.
//!
//! Invariants:
//! - a segment with such a record is filed once, under that record's epoch; an open one without is
//!   remembered as drained and looked at again, since records may be appended to it;
//! - cursors move only when a round has succeeded (see `settle`): a failed one gathers the same keys
//!   again.

use std::sync::atomic::Ordering;

use super::super::env::Env;
use super::super::index::{Extent, ExtentMap};
use super::super::plan::{Consumed, Plan};
use super::super::scan::WalkError;
use super::super::segments::State;
use super::super::stripes::lock;
use super::super::volume::{Cursor, DirtySegments};
use super::Writeback;
use super::writeback::{Round, cut};
use crate::mutant::{Mutant, if_mutated, mutated};
use crate::onmedia::{Key, KeyKind, SegmentHeader};

impl<E: Env> Writeback<E> {
    /// The lowest epoch of any dirty record, after looking for new ones in open segments.
    pub(super) fn lowest_epoch(&self, dirty: &mut DirtySegments) -> Result<Option<u64>, WalkError> {
        let tail = self.volume.core.tail.load(Ordering::SeqCst);
        for (id, cursor) in std::mem::take(&mut dirty.drained) {
            self.file(dirty, id, cursor, tail)?;
        }
        while let Some((&(epoch, id), _)) = dirty.known.first_key_value() {
            if epoch > tail {
                return Ok(Some(epoch));
            }
            // Left behind by relaxed rounds.
            let cursor = dirty.known.remove(&(epoch, id)).expect("it is the first");
            self.file(dirty, id, cursor, tail)?;
        }
        Ok(None)
    }

    /// Files a segment under the epoch of its next record above `tail`.
    fn file(&self, dirty: &mut DirtySegments, id: u32, cursor: Cursor, tail: u64) -> Result<(), WalkError> {
        // The state before the log: what is full by then has nothing to come.
        let state = self.volume.cache.segments[id as usize].state();
        match self.consume(id, cursor, tail, &mut Vec::new())? {
            (cursor, Some(next)) => _ = dirty.known.insert((next, id), cursor),
            (cursor @ Cursor::Log(_), None) if state == State::Open => {
                dirty.drained.insert(id, cursor);
            }
            _ => {}
        }
        Ok(())
    }

    /// Takes the dirty keys of epochs ≤ `upto`; returns where to go on and the next epoch there.
    pub(super) fn consume(
        &self,
        id: u32,
        cursor: Cursor,
        upto: u64,
        keys: &mut Vec<(Key, u32)>,
    ) -> Result<(Cursor, Option<u64>), WalkError> {
        match cursor {
            Cursor::Keys(mut queue) => {
                while let Some(key) = queue.pop_front_if(|k| k.epoch <= upto) {
                    keys.push((key, id));
                }
                let next = queue.front().map(|k| k.epoch);
                Ok((Cursor::Keys(queue), next))
            }
            Cursor::Log(from) => {
                let segment = &self.volume.cache.segments[id as usize];
                let header = SegmentHeader {
                    incarnation: self.volume.core.incarnation,
                    generation: segment.generation.load(Ordering::Relaxed),
                    start_counter: segment.start_counter.load(Ordering::Relaxed),
                    ..SegmentHeader::default()
                };
                let low = segment.log_low.load(Ordering::Acquire);
                let (cursor, next) =
                    self.volume.cache.media.walk_from(id, &header, from, low, upto, |record| {
                        let dirty = record.keys.iter().filter(|k| k.kind != KeyKind::Fill);
                        keys.extend(dirty.map(|k| (*k, id)));
                    })?;
                Ok((Cursor::Log(cursor), next))
            }
        }
    }

    /// Sorts keys so that of two the later one counts. Copies have one version if a crash came between
    /// relocation and the end of its source. That which the index shows counts, for it is the one to be
    /// marked clean, and what befalls a dead one is no loss; of dead ones the segment decides.
    pub(super) fn order(&self, keys: &mut [(Key, u32)]) {
        keys.sort_unstable_by_key(|(k, id)| (k.epoch, k.version, *id));
        let Self { volume, .. } = self;
        for copies in keys.chunk_by_mut(|(a, _), (b, _)| a.version == b.version) {
            if copies.iter().any(|(_, id)| *id != copies[0].1) {
                copies.sort_by_cached_key(|(key, id)| {
                    let place = volume.cache.media.place(*id, key, true);
                    volume.core.index.shows(&Extent { range: key.range(), place })
                });
            }
        }
    }

    pub(super) fn gather_relaxed(&mut self) -> Result<Option<Round>, WalkError> {
        let core = &self.volume.core;
        core.raise_epoch();
        let epoch = core.closed_epoch();
        if epoch <= core.tail.load(Ordering::SeqCst) {
            return Ok(None);
        }
        self.volume.begin_pace(core.index.dirty_sectors() * 512, None, false);
        Ok(Some(Round::sweeping(epoch)))
    }

    pub(super) fn gather_strict(&mut self, plan: &mut Plan) -> Result<Option<Round>, WalkError> {
        let core = self.volume.core.clone();
        let mut dirty = lock(&core.dirty);
        let mut is_raised = false;
        let epoch = loop {
            // Before the look: what is committed after it belongs to an epoch above this one.
            let closed = core.closed_epoch();
            match self.lowest_epoch(&mut dirty)? {
                Some(epoch) if epoch <= closed => break epoch,
                Some(epoch) if is_raised => {
                    self.note_settled((epoch - 1).min(closed));
                    return Ok(None);
                }
                // Nothing is dirty below: the tail may follow the closed epochs.
                None if closed > core.tail.load(Ordering::SeqCst) => {
                    return Ok(Some(Round::empty(closed)));
                }
                _ if is_raised => return Ok(None),
                _ => core.raise_epoch(),
            }
            is_raised = true;
        };
        if !self.may_write(epoch) {
            return Ok(None);
        }
        let mut keys = Vec::new();
        for ((_, id), cursor) in dirty.known.range((epoch, 0)..=(epoch, u32::MAX)) {
            let upto = epoch + u64::from(mutated(Mutant::NextEpochAlong));
            let (cursor, next) = self.consume(*id, cursor.clone(), upto, &mut keys)?;
            let generation = self.volume.cache.segments[*id as usize].generation.load(Ordering::Relaxed);
            plan.cursors.push(Consumed { id: *id, generation, cursor, next });
        }
        drop(dirty);
        tracing::debug!(volume = self.volume.name, epoch, ?keys, "gathered");
        self.order(&mut keys);
        if_mutated(Mutant::OldestOfEpochWritten, || keys.reverse());
        if_mutated(Mutant::ZerosNotWrittenBack, || keys.retain(|(k, _)| k.kind.has_payload()));
        let mut newest = ExtentMap::new();
        let mut replaced = Vec::new();
        for (key, id) in &keys {
            replaced.clear();
            let place = self.volume.cache.media.place(*id, key, true);
            newest.insert(Extent { range: key.range(), place }, &mut replaced);
        }
        newest.iter().for_each(|extent| cut(extent, &mut plan.todo));
        if_mutated(Mutant::WritesOverlap, || plan.todo.extend(plan.todo.clone()));
        let bytes = |len: u64| len * 512;
        let write = plan.todo.iter().filter(|e| !e.place.zero).map(|e| bytes(e.range.len)).sum();
        let payload: u64 =
            keys.iter().filter(|(k, _)| k.kind.has_payload()).map(|(k, _)| bytes(k.range().len)).sum();
        self.volume.begin_pace(write, Some(payload), false);
        Ok(Some(Round::empty(epoch)))
    }

    /// Files the segments a round has consumed from.
    pub(super) fn settle(&self, epoch: u64, plan: &mut Plan) {
        let core = &self.volume.core;
        let segments = &self.volume.cache.segments;
        let mut dirty = lock(&core.dirty);
        for Consumed { id, generation, cursor, next } in plan.cursors.drain(..) {
            let segment = &segments[id as usize];
            let is_gone =
                matches!(segment.state(), State::Free | State::Reclaiming | State::Bad | State::Retired);
            if is_gone || segment.generation.load(Ordering::Relaxed) != generation {
                // Reclaim has taken its entries away; those there are now are of its next life.
                continue;
            }
            dirty.known.remove(&(epoch, id));
            match (next, cursor) {
                (Some(next), cursor) => _ = dirty.known.insert((next, id), cursor),
                (None, cursor @ Cursor::Log(_)) => _ = dirty.drained.insert(id, cursor),
                (None, Cursor::Keys(_)) => {}
            }
        }
        // What relaxed rounds have cleaned wholly needs no cursor any more, once nothing more can
        // be appended to it.
        let done = |id: u32| {
            let segment = &segments[id as usize];
            segment.state() != State::Open && segment.max_epoch.load(Ordering::SeqCst) <= epoch
        };
        dirty.known.retain(|&(_, id), _| !done(id));
        dirty.drained.retain(|&id, _| !done(id));
    }
}
