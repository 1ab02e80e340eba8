//! Scrubbing, as the rest sees it: how fast, how often, and what it has found.
//!
//! The work is the housekeeper's (`worker/scrub.rs`). What is found in data is counted by volume, beside
//! its other counters; what is found in metadata belongs to the cache.

// Counts, as in `counters.rs`: nothing waits for them.
use std::sync::atomic::{AtomicU64, Ordering};

use super::core::Cache;
use super::env::Env;

/// How scrubbing goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ScrubOptions {
    /// Bytes read in a second at most; 0 for no scrubbing.
    pub bytes_per_s: u64,
    /// Milliseconds from the beginning of a pass to that of the next.
    pub interval_ms: u64,
}

impl ScrubOptions {
    /// None.
    pub const OFF: ScrubOptions = ScrubOptions { bytes_per_s: 0, interval_ms: 0 };
}

/// What has been scrubbed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ScrubStatus {
    /// Passes completed since the start.
    pub passes: u64,
    /// When the last one ended, in milliseconds since 1970; 0 for never.
    pub last_pass_unix_ms: u64,
    /// How long it took, in milliseconds.
    pub last_pass_ms: u64,
    /// Whether one is under way.
    pub is_running: bool,
    /// Bytes read in all, data and metadata.
    pub bytes: u64,
    /// Structures of metadata found damaged.
    pub metadata_damaged: u64,
    /// Of these, those made good: written again from their other copy, or taken out of use.
    pub metadata_healed: u64,
}

/// Options and counts, shared with the housekeeper.
#[derive(Debug, Default)]
pub(crate) struct Scrub {
    bytes_per_s: AtomicU64,
    interval_ms: AtomicU64,
    pub passes: AtomicU64,
    pub last_pass_unix_ms: AtomicU64,
    pub last_pass_ms: AtomicU64,
    pub running: AtomicU64,
    pub bytes: AtomicU64,
    pub metadata_damaged: AtomicU64,
    pub metadata_healed: AtomicU64,
}

impl Scrub {
    pub fn options(&self) -> ScrubOptions {
        ScrubOptions {
            bytes_per_s: self.bytes_per_s.load(Ordering::Relaxed),
            interval_ms: self.interval_ms.load(Ordering::Relaxed),
        }
    }
}

impl<E: Env> Cache<E> {
    /// Sets how scrubbing goes from now on. A cache begins without any.
    pub fn set_scrub(&self, options: ScrubOptions) {
        self.scrub.bytes_per_s.store(options.bytes_per_s, Ordering::Relaxed);
        self.scrub.interval_ms.store(options.interval_ms, Ordering::Relaxed);
        self.housekeeper.raise();
    }

    /// What has been scrubbed so far.
    pub fn scrub_status(&self) -> ScrubStatus {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let scrub = &self.scrub;
        ScrubStatus {
            passes: get(&scrub.passes),
            last_pass_unix_ms: get(&scrub.last_pass_unix_ms),
            last_pass_ms: get(&scrub.last_pass_ms),
            is_running: get(&scrub.running) != 0,
            bytes: get(&scrub.bytes),
            metadata_damaged: get(&scrub.metadata_damaged),
            metadata_healed: get(&scrub.metadata_healed),
        }
    }
}
