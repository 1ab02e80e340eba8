//! Relocation of dirty data: what a mostly dead segment is still needed for goes elsewhere, so that a
//! slow disk pins no more space than its dirty data takes.
//!
//! Laws, beside those of `relocate.rs`:
//! - Dirty data is moved with the volume's plan locked: write-back neither looks up nor reads its
//!   positions meanwhile, and afterwards index, cursors and plan name the copies alone. So each key
//!   is in exactly one cursor, and what a round has not written yet it reads from the copy.
//! - In *strict* order a version above the tail that something newer has superseded is still needed
//!   by its epoch, unless both are of one epoch. Such a version is in no index, so its segment is
//!   left alone until the tail has passed it. In *grouped*
//!   order that holds within an epoch too, as a group may end inside one. In *relaxed* order it is
//!   needed by nobody.

use std::collections::VecDeque;
use std::sync::Arc;

use super::super::env::Env;
use super::super::index::Extent;
use super::super::plan::Plan;
use super::super::stripes::lock;
use super::super::volume::{Cursor, Order, VolumeCore};
use super::pieces::{cut, runs};
use super::relocate::{Moves, Relocator, Stop};
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{Key, KeyKind};
use crate::sync::atomic::Ordering;
use crate::units::SectorRange;

/// Looks at a segment's dirty data before it is left to another time: the first finds it, a second
/// what was overwritten in part during the first.
const LOOKS: u32 = 4;

impl<E: Env> Relocator<E> {
    /// Moves all of a segment's dirty data that is still needed. When this returns true none is, and
    /// the segment counts as clean; otherwise it is as dirty as it was, wherever its data is now.
    pub fn save_dirty(&mut self, id: u32) -> bool {
        let Some((volume, mut keys)) = self.contents(id) else { return false };
        let mut plan = lock(&volume.plan);
        let tail = volume.tail.load(Ordering::SeqCst);
        keys.retain(|k| k.kind != KeyKind::Fill && k.epoch > tail);
        let mut moves = Moves::default();
        let moved = self.move_needed(&volume, id, tail, &keys, &mut moves);
        let is_empty = moved.is_ok();
        if !mutated(Mutant::RelocatedNotFiled) {
            self.file(&volume, &mut plan, id, is_empty, &keys, moves);
        }
        let segment = &self.cache.segments[id as usize];
        match moved {
            Ok(()) => {
                segment.max_epoch.store(0, Ordering::SeqCst);
                volume.pacer.emptied(id, self.cache.segment_capacity());
            }
            Err(Stop::NoRoom) => {}
            Err(_) => self.leave_alone(id, tail),
        }
        is_empty
    }

    /// Copies a segment's dirty data until none is needed there.
    fn move_needed(
        &mut self,
        volume: &Arc<VolumeCore>,
        id: u32,
        tail: u64,
        keys: &[Key],
        moves: &mut Moves,
    ) -> Result<(), Stop> {
        let order = volume.kept_for();
        for look in 0..LOOKS {
            let mut pieces = self.needed(volume, id, order, keys, moves).ok_or(Stop::NotNow)?;
            if pieces.is_empty() {
                return Ok(());
            }
            let sectors = |k: &Key| if k.kind.has_payload() { k.range().len } else { 0 };
            let is_much =
                pieces.iter().map(sectors).sum::<u64>() * 2 > u64::from(self.cache.capacity_sectors());
            if look == 0 && is_much {
                return Err(Stop::NotNow);
            }
            self.copy(volume, id, tail, 0, &mut pieces, moves)?;
        }
        Err(Stop::NotNow)
    }

    /// What of these dirty keys is to be copied; `None` if something is needed that cannot be.
    fn needed(
        &self,
        volume: &VolumeCore,
        id: u32,
        order: Order,
        keys: &[Key],
        moves: &Moves,
    ) -> Option<VecDeque<Key>> {
        let mut pieces = VecDeque::new();
        for key in keys {
            if !key.kind.has_payload() {
                // As long as it is dirty it may count beside anything newer.
                if !moves.zeros.contains(&key.version) && !mutated(Mutant::RelocationDropsZeros) {
                    pieces.push_back(*key);
                }
                continue;
            }
            let live = self.live_parts(volume, id, key);
            if order != Order::Relaxed && !mutated(Mutant::RelocationDropsSuperseded) {
                let mut gone = Vec::new();
                let mut at = key.first;
                for part in live.iter().map(Key::range).chain([SectorRange::new(key.range().end(), 1)]) {
                    let between = cut(key, SectorRange { start: at, len: part.start - at });
                    gone.extend(runs(between, |sector| !moves.sectors.contains(&sector)));
                    at = part.end();
                }
                let is_owed = |part| order == Order::Grouped || !self.is_superseded_within(volume, part);
                if gone.iter().any(is_owed) {
                    return None;
                }
            }
            pieces.extend(live);
        }
        Some(pieces)
    }

    /// Whether everything that has superseded `part` is of the same epoch, so that write-back has no
    /// use for `part`. When in doubt, no.
    fn is_superseded_within(&self, volume: &VolumeCore, part: &Key) -> bool {
        let mut found = Vec::new();
        volume.index.lookup(part.range(), &mut found);
        // Read after the look: what was there has no higher epoch.
        if volume.epoch() == part.epoch {
            return true;
        }
        let covered: u64 = found.iter().map(|e| e.range.len).sum();
        let is_of_epoch = |e: &Extent| {
            // A segment's highest epoch is raised before the index shows what is of it.
            let (id, _) = self.cache.media.locate(e.place.position);
            self.cache.segments[id as usize].max_epoch.load(Ordering::SeqCst) == part.epoch
        };
        covered == part.range().len && found.iter().all(|e| !e.place.zero && e.place.dirty && is_of_epoch(e))
    }

    /// Makes the cursors and the round under way follow what was moved.
    fn file(
        &self,
        volume: &VolumeCore,
        plan: &mut Plan,
        id: u32,
        is_empty: bool,
        keys: &[Key],
        mut moves: Moves,
    ) {
        if !is_empty && moves.keys.is_empty() {
            return;
        }
        let tail = volume.tail.load(Ordering::SeqCst);
        let mut dirty = lock(&volume.dirty);
        dirty.drained.remove(&id);
        dirty.known.retain(|&(_, other), _| other != id);
        let mut add = |id: u32, mut keys: Vec<Key>| {
            while let Some(at) = dirty.known.keys().find(|(_, other)| *other == id).copied() {
                match dirty.known.remove(&at) {
                    Some(Cursor::Keys(earlier)) => keys.extend(earlier),
                    _ => unreachable!("targets are not walked"),
                }
            }
            keys.retain(|k| k.epoch > tail);
            keys.sort_by_key(|k| (k.epoch, k.version));
            if let Some(first) = keys.first() {
                dirty.known.insert((first.epoch, id), Cursor::Keys(keys.into()));
            }
            // The round's own cursor would forget what has just been added.
            plan.drop_cursors_of(id);
        };
        if !is_empty {
            let stays = |key: &Key| match key.kind.has_payload() {
                true => runs(*key, |sector| !moves.sectors.contains(&sector)),
                false if moves.zeros.contains(&key.version) => Vec::new(),
                false => vec![*key],
            };
            add(id, keys.iter().flat_map(stays).collect());
        }
        moves.keys.sort_by_key(|(target, _)| *target);
        for chunk in moves.keys.chunk_by(|a, b| a.0 == b.0) {
            add(chunk[0].0, chunk.iter().map(|(_, key)| *key).collect());
        }
        drop(dirty);
        plan.drop_cursors_of(id);
        let first = self.position(id, 0);
        let positions = first..first + u64::from(self.cache.media.geometry.segment_size / 512);
        if !mutated(Mutant::RoundKeepsOldPositions) {
            plan.redirect(&positions, &mut moves.payload, is_empty);
        }
    }
}
