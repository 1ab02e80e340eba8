//! Which segments reclaim takes next.
//!
//! Clean ones: the emptiest among the oldest, and at every fourth turn the oldest, which a stream of
//! slightly emptier ones would otherwise pass by for ever.
//! - Empty ones go first, wherever they are.
//! - One of which guests have read more than half gets a second chance: it goes to the young end and
//!   what was read of it is forgotten. Copying it would cost more than it frees.
//! - Of the others what was read is relocated, and the rest is dropped.
//! - If all would be spared, the oldest of them are taken as if they were cold.
//!
//! Dirty ones: where no segment is clean and most of one is dead, what is still needed of it is
//! moved, so that a slow disk pins no more space than its dirty data takes.

use super::super::env::Env;
use super::super::segments::State;
use super::super::stripes::lock;
use super::housekeeper::Housekeeper;
use crate::mutant::{Mutant, mutated};
use crate::sync::atomic::Ordering;

/// Most of the oldest clean segments that are looked at for the emptiest; of a small cache a
/// quarter, or age, and with it a second chance, would mean nothing.
const LOOK_AHEAD: usize = 32;
/// Of so many victims one is the oldest, however much of it lives.
const OLDEST_EVERY: usize = 4;

impl<E: Env> Housekeeper<E> {
    /// Takes up to `count` clean segments off the list.
    pub(super) fn pick(&mut self, count: usize) -> Vec<u32> {
        let cache = &self.cache;
        let mut sealed = lock(&cache.sealed);
        let oldest = (sealed.len() / 4).clamp(count, LOOK_AHEAD);
        let mut clean: Vec<(u32, usize, u32)> = Vec::new();
        for (age, &id) in sealed.iter().enumerate() {
            if self.is_clean(id) {
                let live = cache.segments[id as usize].live.load(Ordering::Relaxed);
                // Beyond the oldest only the empty ones are better than those.
                let rank = if live > 0 && clean.len() >= oldest { u32::MAX } else { live };
                clean.push((rank, age, id));
            }
        }
        cache.clean_count.store(clean.len().saturating_sub(count), Ordering::Relaxed);
        clean.sort_unstable();
        let mut spared = Vec::new();
        let mut victims = Vec::new();
        while !clean.is_empty() && victims.len() < count && spared.len() < LOOK_AHEAD {
            self.turn += 1;
            let is_turn_of_oldest = self.turn.is_multiple_of(OLDEST_EVERY) && clean[0].0 > 0;
            let by_age = |at: &usize| clean[*at].1;
            let at = if is_turn_of_oldest { (0..clean.len()).min_by_key(by_age) } else { None };
            let (_, _, id) = clean.remove(at.unwrap_or(0));
            let is_hot = cache.segments[id as usize].hot_sectors() > cache.capacity_sectors() / 2;
            if self.relocates && is_hot { spared.push(id) } else { victims.push(id) }
        }
        spared.iter().for_each(|&id| cache.segments[id as usize].forget_reads());
        if victims.is_empty() {
            victims = spared.drain(..spared.len().min(count)).collect();
        }
        sealed.retain(|id| !victims.contains(id) && !spared.contains(id));
        sealed.extend(&spared);
        drop(sealed);
        victims.iter().for_each(|&id| self.begin_reclaim(id));
        victims
    }

    /// Takes one segment off the list, if it is on it and clean.
    pub(super) fn take(&mut self, id: u32) -> bool {
        let mut sealed = lock(&self.cache.sealed);
        let at = sealed.iter().position(|&other| other == id).filter(|_| self.is_clean(id));
        let is_taken = at.and_then(|at| sealed.remove(at)).is_some();
        drop(sealed);
        if is_taken {
            self.begin_reclaim(id);
        }
        is_taken
    }

    fn begin_reclaim(&self, id: u32) {
        let cache = &self.cache;
        let segment = &cache.segments[id as usize];
        segment.set_state(State::Reclaiming);
        if let Some(volume) = cache.volume_of(segment.owner.load(Ordering::Relaxed)) {
            // Nothing dirty is left in it, so write-back has no business there any more.
            let mut dirty = lock(&volume.dirty);
            dirty.drained.remove(&id);
            dirty.known.retain(|&(_, other), _| other != id);
        }
    }

    fn is_clean(&self, id: u32) -> bool {
        let segment = &self.cache.segments[id as usize];
        let max_epoch = segment.max_epoch.load(Ordering::SeqCst);
        match self.cache.volume_of(segment.owner.load(Ordering::Relaxed)) {
            _ if mutated(Mutant::DirtySegmentReclaimed) => true,
            // A damaged volume's clean and dirty cannot be told apart with certainty.
            Some(volume) => {
                max_epoch <= volume.tail.load(Ordering::SeqCst) && !volume.damaged.load(Ordering::Relaxed)
            }
            None => true,
        }
    }

    /// Moves the dirty data of the emptiest dirty segment elsewhere, if that is less than half of it.
    /// Says whether the segment is clean now.
    pub(super) fn move_pinned(&mut self) -> bool {
        let cache = &self.cache;
        let candidate = |&id: &u32| {
            let segment = &cache.segments[id as usize];
            let live = segment.live.load(Ordering::Relaxed);
            let volume = cache.volume_of(segment.owner.load(Ordering::Relaxed))?;
            let is_worth_it = live <= cache.capacity_sectors() / 2
                && !self.is_clean(id)
                && !volume.damaged.load(Ordering::Relaxed)
                && self.relocator.has_room_for(&volume)
                && !self.relocator.is_left_alone(id, volume.tail.load(Ordering::SeqCst));
            // Another volume's would end the target before it is full.
            is_worth_it.then_some((!self.relocator.is_aimed_at(&volume), live, id))
        };
        let emptiest = lock(&cache.sealed).iter().filter_map(candidate).min();
        emptiest.is_some_and(|(_, _, id)| self.relocator.save_dirty(id))
    }
}
