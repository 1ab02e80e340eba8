//! Which segments reclaim takes next.
//!
//! Clean ones: the emptiest among the oldest, and no more than a turn of the clock keeps them.
//! - Empty ones go first, wherever they are.
//! - One of which guests have read more than half gets a second chance: it goes to the young end and
//!   what was read of it is forgotten. Copying it would cost more than it frees.
//! - Of the others what was read is relocated, and the rest is dropped.
//! - If all would be spared, or no segment is free, nothing is spared.
//!
//! Dirty ones: where no segment is clean and most of one is dead, what is still needed of it is
//! moved, so that a slow disk pins no more space than its dirty data takes.

use std::sync::atomic::Ordering;

use super::super::env::Env;
use super::super::segments::State;
use super::super::stripes::lock;
use super::housekeeper::Housekeeper;

/// How many of the oldest clean segments are looked at for the emptiest.
const LOOK_AHEAD: usize = 32;

/// What a look for victims came to.
pub(super) struct Picked {
    pub victims: Vec<u32>,
    /// Whether some were given a second chance: another look may find more.
    pub spared: bool,
}

impl<E: Env> Housekeeper<E> {
    /// Takes up to `count` clean segments off the list.
    pub(super) fn pick(&self, count: usize) -> Picked {
        let cache = &self.cache;
        let mut sealed = lock(&cache.sealed);
        let mut clean: Vec<(u32, usize, u32)> = Vec::new();
        for (age, &id) in sealed.iter().enumerate() {
            if self.is_clean(id) {
                let live = cache.segments[id as usize].live.load(Ordering::Relaxed);
                // Beyond the oldest only the empty ones are better than those.
                let rank = if live > 0 && clean.len() >= LOOK_AHEAD { u32::MAX } else { live };
                clean.push((rank, age, id));
            }
        }
        cache.clean_count.store(clean.len().saturating_sub(count), Ordering::Relaxed);
        clean.sort_unstable();
        let may_spare = self.relocates && cache.free_segments() > 0;
        let mut spared = Vec::new();
        let mut victims = Vec::new();
        for (_, _, id) in clean {
            if victims.len() == count || spared.len() == LOOK_AHEAD {
                break;
            }
            let is_hot = cache.segments[id as usize].hot_sectors() > cache.capacity_sectors() / 2;
            if may_spare && is_hot { spared.push(id) } else { victims.push(id) }
        }
        spared.iter().for_each(|&id| cache.segments[id as usize].forget_reads());
        if victims.is_empty() {
            victims = spared.drain(..spared.len().min(count)).collect();
        }
        sealed.retain(|id| !victims.contains(id) && !spared.contains(id));
        sealed.extend(&spared);
        for &id in &victims {
            let segment = &cache.segments[id as usize];
            segment.set_state(State::Reclaiming);
            if let Some(volume) = cache.volume_of(segment.owner.load(Ordering::Relaxed)) {
                // Nothing dirty is left in it, so write-back has no business there any more.
                let mut dirty = lock(&volume.dirty);
                dirty.drained.remove(&id);
                dirty.known.retain(|&(_, other), _| other != id);
            }
        }
        Picked { victims, spared: !spared.is_empty() }
    }

    fn is_clean(&self, id: u32) -> bool {
        let segment = &self.cache.segments[id as usize];
        let max_epoch = segment.max_epoch.load(Ordering::SeqCst);
        match self.cache.volume_of(segment.owner.load(Ordering::Relaxed)) {
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
                && !self.relocator.is_left_alone(id, volume.tail.load(Ordering::SeqCst));
            is_worth_it.then_some((live, id))
        };
        let emptiest = lock(&cache.sealed).iter().filter_map(candidate).min();
        emptiest.is_some_and(|(_, id)| self.relocator.save_dirty(id))
    }
}
