//! A bound on the RAM that the indexes take: reclaim begins earlier.
//!
//! An extent costs the index the same however short it is, so a guest that writes single sectors needs eight
//! times the RAM of one that writes blocks, for the same bytes. Where that is bounded, the housekeeper
//! takes clean segments while segments are still free, and write-back hurries, as they do for space.
//!
//! What holds: above the bound clean data goes until it is kept, or nothing clean is left. It is no limit for
//! dirty data: that is bounded by what write-back lets a guest have, and never dropped.

use super::core::Cache;
use super::env::{Clock, Env};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Between two looks: counting goes through all shards.
const LOOK_MS: u64 = 10;

/// See the module's head.
#[derive(Default)]
pub(crate) struct IndexBound {
    /// Bytes; 0 for no bound.
    max: AtomicU64,
    is_over: AtomicBool,
    looked_ms: AtomicU64,
}

impl IndexBound {
    /// Whether it was passed at the last look.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }
}

impl<E: Env> Cache<E> {
    /// Bounds what the indexes of all volumes take of RAM, in bytes; 0 for no bound. What is above it is
    /// reclaimed, as far as it is clean.
    pub fn set_index_memory_max(&self, bytes: u64) {
        self.index_bound.max.store(bytes, Ordering::Relaxed);
        self.index_bound.looked_ms.store(0, Ordering::Relaxed);
        self.housekeeper.raise();
    }

    /// What [`Cache::set_index_memory_max`] has set.
    pub fn index_memory_max(&self) -> u64 {
        self.index_bound.max.load(Ordering::Relaxed)
    }

    /// Bytes of RAM that the indexes of all volumes take.
    pub fn index_memory_bytes(&self) -> u64 {
        self.all_volumes().iter().map(|volume| volume.index.memory_bytes()).sum()
    }

    /// Looks whether the indexes have passed their bound, now and then.
    pub(crate) fn look_at_index(&self) -> bool {
        let (bound, max) = (&self.index_bound, self.index_memory_max());
        if max == 0 {
            bound.is_over.store(false, Ordering::Relaxed);
            return false;
        }
        let now_ms = self.clock.now_ms();
        let looked_ms = bound.looked_ms.load(Ordering::Relaxed);
        if looked_ms == 0 || now_ms.saturating_sub(looked_ms) >= LOOK_MS {
            bound.looked_ms.store(now_ms, Ordering::Relaxed);
            bound.is_over.store(self.index_memory_bytes() > max, Ordering::Relaxed);
        }
        bound.is_over()
    }
}
