//! Which segments reclaim takes next, and what of them it keeps.
//!
//! A log frees whole segments, so what is alike in worth should lie together. Segments are filled by
//! [`Class`]: what guests write; what they read, on *probation*; and what is *proven*, because it was
//! missed soon after it had been evicted, or was kept by reclaim. In order of preference, a victim is
//!
//! 1. an empty one, wherever it is, unless a volume lacks it to its minimum;
//! 2. of each volume whose turn it is to give (`shares.rs`) one that was written and one that was read,
//!    whichever is worth less: live sectors times what the volume has learnt such data of that age is
//!    worth ([`Reuse`]).
//!    - Written: the one worth least among the oldest, every fourth time the oldest.
//!    - Read: while those on probation have more than their share, the oldest of them. So a scan passes
//!      through that share and leaves the rest alone. Otherwise the oldest of the proven.
//! 3. If most of it is hot it is spared instead: it goes to the young end of the list, cooler by one
//!    read, and is proven from now on. That keeps it without copying. If all of a volume's would be
//!    spared, the oldest of them are taken: no other gives instead.
//!
//! Of a victim what is hot enough is relocated, within a budget: copies of clean data are at most a
//! tenth of the bytes that guests' writes and fills bring into the log. With much of the budget left
//! less heat is enough. The rest is dropped, and noted as evicted.
//!
//! Dirty ones: where no segment is clean and most of one is dead, what is still needed of it is
//! moved, so that a slow disk pins no more space than its dirty data takes.
//!
//! [`Reuse`]: super::super::reuse::Reuse

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::env::Env;
use super::super::segments::{Class, State};
use super::super::stripes::lock;
use super::super::volume::VolumeCore;
use super::housekeeper::Housekeeper;
use crate::mutant::{Mutant, mutated};
use crate::sync::atomic::Ordering;

/// Most of the oldest clean segments that are looked at for the one worth least; of a small cache a
/// quarter, or age would mean nothing.
const LOOK_AHEAD: usize = 32;
/// Of so many victims of a class one is the oldest, however much of it lives.
const OLDEST_EVERY: usize = 4;
/// Of what was read, those on probation may have a fifth: enough for most first reuse to happen there.
const PROBATION_SHARE: usize = 5;
/// Copies may be one in so many bytes brought in.
const COPY_SHARE: u64 = 10;
/// Reads that make what is not proven worth a copy, and those that make it so while the budget is
/// ample; of what is proven, one less.
const HEAT: u8 = 3;
const HEAT_AMPLE: u8 = 2;
/// Segments that the budget may save up for.
const SAVED_MAX: u64 = 4;

/// Clean segments of one volume, oldest first.
#[derive(Default)]
struct Clean {
    of: [Vec<u32>; Class::COUNT],
}

impl Clean {
    fn count(&self) -> usize {
        self.of.iter().map(Vec::len).sum()
    }
}

/// What may be copied.
pub(super) struct Budget {
    /// Sectors brought in, and copied, when it was last looked at.
    brought: u64,
    copied: u64,
    /// Sectors that may be copied, times [`COPY_SHARE`].
    saved: u64,
}

impl Budget {
    /// One segment of so many sectors to begin with: in a small cache much is hot before much came in.
    pub(super) fn new(capacity: u64) -> Budget {
        Budget { brought: 0, copied: 0, saved: capacity * COPY_SHARE }
    }

    /// Takes note of what was brought in and copied since the last look.
    fn update(&mut self, brought: u64, copied: u64, capacity: u64) {
        let more = brought.saturating_sub(self.brought);
        let less = copied.saturating_sub(self.copied) * COPY_SHARE;
        let most = SAVED_MAX * capacity * COPY_SHARE;
        self.saved = self.saved.saturating_add(more).saturating_sub(less).min(most);
        (self.brought, self.copied) = (brought, copied);
    }

    /// Sectors that may be copied now.
    pub(super) fn sectors(&self) -> u64 {
        self.saved / COPY_SHARE
    }

    /// Whether half of what can be saved has been.
    fn is_ample(&self, capacity: u64) -> bool {
        self.sectors() > SAVED_MAX * capacity / 2
    }
}

impl<E: Env> Housekeeper<E> {
    /// Takes up to `count` clean segments off the list, of one volume for itself or of those whose turn
    /// it is to give (`shares.rs`).
    pub(super) fn pick(&mut self, count: usize, own: Option<u64>) -> Vec<u32> {
        let cache = self.cache.clone();
        let now = cache.opened.load(Ordering::Relaxed);
        for volume in cache.all_volumes() {
            volume.reuse.solve(now);
        }
        self.update_budget();
        let mut ledger = cache.ledger();
        let mut sealed = lock(&cache.sealed);
        let mut victims = Vec::new();
        let mut clean: BTreeMap<u64, Clean> = BTreeMap::new();
        let owner_of = |id: u32| cache.segments[id as usize].owner.load(Ordering::Relaxed);
        let is_meant = |id: u32| own.is_none_or(|own| own == owner_of(id));
        for &id in sealed.iter().filter(|&&id| is_meant(id) && self.is_clean(id)) {
            let (segment, owner) = (&cache.segments[id as usize], owner_of(id));
            let is_empty = segment.live.load(Ordering::Relaxed) == 0;
            if is_empty && victims.len() < count && (own.is_some() || ledger.gives_empty(owner)) {
                ledger.take(owner);
                victims.push(id);
                continue;
            }
            clean.entry(owner).or_default().of[usize::from(segment.class().code())].push(id);
        }
        let can_give = |(&owner, clean): (&u64, &Clean)| ledger.can_give(owner, clean.count());
        let clean_count: usize = clean.iter().map(can_give).sum::<usize>() + victims.len();
        let mut spared = Vec::new();
        while victims.len() < count && spared.len() < LOOK_AHEAD {
            let owners: Vec<u64> =
                clean.iter().filter(|(_, c)| c.count() > 0).map(|(&owner, _)| owner).collect();
            let (donors, for_itself) = match own {
                Some(own) => (vec![own], true),
                None => ledger.donors(&owners),
            };
            let Some(id) = self.choose_victim(&mut clean, &donors, now) else { break };
            let owner = owner_of(id);
            if for_itself && own.is_none() {
                // One for each that it was refused.
                cache.volume_of(owner).iter().for_each(|v| v.share.is_served());
            }
            if !self.relocates || !self.is_hot(id) {
                ledger.take(owner);
                victims.push(id);
                continue;
            }
            spared.push(id);
            if clean.get(&owner).is_none_or(|left| left.count() == 0) {
                // No other volume gives instead of one that would keep all it has.
                break;
            }
        }
        for &id in &spared {
            cache.segments[id as usize].cool();
            cache.segments[id as usize].set_class(Class::Proven);
        }
        if victims.is_empty() {
            victims = spared.drain(..spared.len().min(count)).collect();
        }
        if own.is_none() {
            cache.clean_count.store(clean_count.saturating_sub(victims.len()), Ordering::Relaxed);
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
        cache.count_given(id);
        if let Some(volume) = cache.volume_of(segment.owner.load(Ordering::Relaxed)) {
            // Nothing dirty is left in it, so write-back has no business there any more.
            let mut dirty = lock(&volume.dirty);
            dirty.drained.remove(&id);
            dirty.known.retain(|&(_, other), _| other != id);
        }
    }

    /// Takes the candidate of these volumes that is worth least off the lists.
    fn choose_victim(&mut self, clean: &mut BTreeMap<u64, Clean>, donors: &[u64], now: u64) -> Option<u32> {
        self.turn += 1;
        let mut least: Option<(f64, u32)> = None;
        for volume in donors.iter().filter_map(|donor| clean.get(donor)) {
            let [written, probation, proven] = &volume.of;
            let reads = probation.len() + proven.len();
            let is_over = probation.len() * PROBATION_SHARE > reads || proven.is_empty();
            let read = if is_over { probation.first() } else { proven.first() };
            for id in self.least_written(written, now).into_iter().chain(read.copied()) {
                let worth = self.worth(id, now);
                if least.is_none_or(|(other, _)| worth < other) {
                    least = Some((worth, id));
                }
            }
        }
        let (_, id) = least?;
        clean.values_mut().flat_map(|v| &mut v.of).for_each(|ids| ids.retain(|&other| other != id));
        Some(id)
    }

    /// Of what was written the segment worth least among the oldest, or the oldest in its turn.
    fn least_written(&self, ids: &[u32], now: u64) -> Option<u32> {
        if self.turn.is_multiple_of(OLDEST_EVERY) {
            return ids.first().copied();
        }
        let oldest = ids.len().min((ids.len() / 4).clamp(1, LOOK_AHEAD));
        let worth = |&&a: &&u32, &&b: &&u32| self.worth(a, now).total_cmp(&self.worth(b, now));
        ids[..oldest].iter().min_by(worth).copied()
    }

    /// Reads that keeping a segment saves, for each that is opened meanwhile.
    fn worth(&self, id: u32, now: u64) -> f64 {
        let segment = &self.cache.segments[id as usize];
        let live = segment.live.load(Ordering::Relaxed);
        let age = now.saturating_sub(segment.born.load(Ordering::Relaxed));
        match self.cache.volume_of(segment.owner.load(Ordering::Relaxed)) {
            Some(volume) => f64::from(live) * volume.reuse.value(segment.class(), age),
            None => 0.0,
        }
    }

    /// Whether a segment is spared as it is: copying what is hot of it would cost more than it frees.
    fn is_hot(&self, id: u32) -> bool {
        let segment = &self.cache.segments[id as usize];
        let is_proven = segment.class() == Class::Proven;
        let least = if is_proven || !self.is_parted(id) { 1 } else { HEAT };
        segment.hot_sectors(least) > self.cache.capacity_sectors() / 2
    }

    fn update_budget(&mut self) {
        let (mut brought, mut copied) = (0, 0);
        for volume in self.cache.all_volumes() {
            let counters = volume.counters();
            let written = counters.write_sectors.saturating_sub(counters.bypass_sectors);
            brought += written + counters.fill_sectors;
            copied += counters.relocated_sectors - counters.relocated_dirty_sectors;
        }
        self.budget.update(brought, copied, u64::from(self.cache.capacity_sectors()));
    }

    /// Whether reads have streams of their own. Without, one read is all the evidence there will be.
    fn is_parted(&self, id: u32) -> bool {
        let owner = self.cache.segments[id as usize].owner.load(Ordering::Relaxed);
        self.cache.volume_of(owner).is_some_and(|volume| volume.fill_streams.get().is_some())
    }

    /// How hot a block of a victim must be to be kept.
    pub(super) fn least_heat(&self, id: u32) -> u8 {
        if !self.is_parted(id) {
            return 1;
        }
        let is_ample = self.budget.is_ample(u64::from(self.cache.capacity_sectors()));
        let least = if is_ample { HEAT_AMPLE } else { HEAT };
        least - u8::from(self.cache.segments[id as usize].class() == Class::Proven)
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

    /// Moves the dirty data of the emptiest dirty segment, of one volume or any, elsewhere, if that is less
    /// than half of it. Says whether the segment is clean now.
    pub(super) fn move_pinned(&mut self, of: Option<&Arc<VolumeCore>>) -> bool {
        let cache = &self.cache;
        let candidate = |&id: &u32| {
            let segment = &cache.segments[id as usize];
            let live = segment.live.load(Ordering::Relaxed);
            let volume = cache.volume_of(segment.owner.load(Ordering::Relaxed))?;
            let is_worth_it = of.is_none_or(|of| Arc::ptr_eq(of, &volume))
                && live <= cache.capacity_sectors() / 2
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_lets_a_tenth_be_copied_and_saves_no_more_than_it_may() {
        let capacity = 1000;
        let mut budget = Budget::new(capacity);
        assert_eq!(budget.sectors(), capacity);
        budget.update(500, 900, capacity);
        assert_eq!(budget.sectors(), 150);
        budget.update(500, 2000, capacity);
        assert_eq!(budget.sectors(), 0, "a debt is forgiven");
        budget.update(10_500, 2000, capacity);
        assert_eq!((budget.sectors(), budget.is_ample(capacity)), (1000, false));
        budget.update(10_000_000, 2000, capacity);
        assert_eq!((budget.sectors(), budget.is_ample(capacity)), (SAVED_MAX * capacity, true));
        // A volume that was deleted takes its counts along.
        budget.update(0, 0, capacity);
        assert_eq!(budget.sectors(), SAVED_MAX * capacity);
    }
}
