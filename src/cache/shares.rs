//! Shares: how the volumes of one cache divide its space.
//!
//! Everything is counted in segments, the unit that space is given and taken in. A volume *holds* those
//! it owns: open, full, sealed, or relocation's target; not those that reclaim is emptying.
//!
//! ```text
//!  0 ────────── min ─────────────────── share, by weight ─────────────────── max
//!     nobody else's      taken from whoever holds most for its weight    not opened at all
//! ```
//!
//! Laws:
//! 1. *Floor.* For others, reclaim takes a segment only of a volume that holds more than its `min`. A
//!    volume at its `min` that wants another replaces one of its own: it holds one less for so long.
//! 2. *What is lacking is kept.* Free segments that a volume lacks to its `min` are given to nobody else
//!    while it wants any. So what it gave up to replace is not taken by another. A volume that has not
//!    asked while the cache was turned over once wants none, and its minimum is borrowed.
//! 3. *Ceiling.* No volume holds more than its `max`: guests are refused at one less, if its `min` is below
//!    that, and the last is for relocation. Its own clean segments are reclaimed before that; where they are dirty only its own
//!    writers wait, since no other volume is asked for anything.
//! 4. *Weights.* Between the two, reclaim takes from a volume that holds most for its weight, or nearly
//!    so (`ledger.rs`): among those, what is worth least goes. A volume of which nobody has asked for
//!    anything while the cache was turned over once gives first, down to its `min`.
//! 5. *Dirty data follows.* What a slow disk pins is bounded by what the others' shares leave
//!    (`pacing.rs`), so there is always something that law 4 can take.
//! 6. *Nobody is stuck* (law 12). The minimums in all, three segments for each volume without one, and
//!    what reclaim needs fit into the cache: so whenever free segments run low somebody holds more than
//!    its `min`. If that is dirty and its disk hangs, who waits still replaces its own.
//!
//! Held counts change under the lock of the free list where they grow, and in the housekeeper alone
//! where they shrink: no two volumes are given the same segment, nor one above its ceiling.

use super::core::Cache;
use super::env::Env;
use super::ledger::{Holding, Ledger, entitlements};
use super::segments::{Segment, State};
use super::stripes::lock;
use super::volume::{QueueShared, Volume, VolumeCore};
use crate::mutant::{Mutant, mutated};
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use crate::units::Bytes;

/// The weight of a volume that has none of its own.
pub const WEIGHT_DEFAULT: u32 = 100;
/// The greatest weight, as of a cgroup.
pub const WEIGHT_MAX: u32 = 10_000;
/// The greatest `gc_percent`, as of dm-pcache.
pub const GC_PERCENT_MAX: u8 = 90;
/// Segments without which a volume cannot be served: open, behind it, and being cleaned.
const LEAST: usize = 3;
/// The smallest `max`: one more is relocation's.
const MAX_LEAST: usize = LEAST + 1;
/// No `gc_percent`.
const UNSET: u8 = u8::MAX;

/// What a volume may hold of its cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shares {
    /// Bytes that no other volume pushes it below; 0 for none.
    pub min: u64,
    /// Most bytes; 0 for as many as there are.
    pub max: u64,
    /// Its part of what all want, relative to the others': 1 to [`WEIGHT_MAX`].
    pub weight: u32,
    /// Percent of `max`, or of the cache, from which on its clean data makes room although nobody needs it.
    pub gc_percent: Option<u8>,
}

impl Default for Shares {
    fn default() -> Self {
        Self { min: 0, max: 0, weight: WEIGHT_DEFAULT, gc_percent: None }
    }
}

/// Why a volume cannot have such shares.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ShareError {
    /// More at least than at most.
    #[error("cache_min {} is more than cache_max {}", Bytes(*.min), Bytes(*.max))]
    MinAboveMax {
        /// At least.
        min: u64,
        /// At most.
        max: u64,
    },
    /// Less than a volume can live on.
    #[error(
        "cache_max {} is too little: with segments of {} a volume needs {}",
        Bytes(*.max), Bytes(*.segment), Bytes(*.segment * MAX_LEAST as u64)
    )]
    MaxTooSmall {
        /// At most.
        max: u64,
        /// Bytes of a segment.
        segment: u64,
    },
    /// Minimums that the cache cannot keep.
    #[error(
        "the cache can promise {} in all and has promised {} to other volumes: cache_min can be {} at most",
        Bytes(*.room), Bytes(*.promised), Bytes(.room.saturating_sub(*.promised))
    )]
    TooMuchPromised {
        /// Bytes that may be promised.
        room: u64,
        /// Bytes promised to others, with what those need that have no minimum.
        promised: u64,
    },
}

/// The shares of a volume, and what it holds.
#[derive(Debug)]
pub(crate) struct Share {
    min: AtomicU64,
    max: AtomicU64,
    weight: AtomicU32,
    gc_percent: AtomicU8,
    held: AtomicUsize,
    /// The most it may hold: its maximum, or what it held of more when that was lowered. For the audit.
    bound: AtomicUsize,
    /// [`Cache::opened`] when it last asked for a segment, and 1; 0 for never.
    asked: AtomicU64,
    /// Whether it was refused one, and reclaim has taken none of its own for that since.
    waits: AtomicBool,
    /// Whether nothing of its own can be reclaimed although it holds all it may.
    is_stuck: AtomicBool,
    /// Requests of its guest at the housekeeper's last look, and [`Cache::opened`] when that last changed.
    requests: AtomicU64,
    active: AtomicU64,
}

impl Default for Share {
    fn default() -> Self {
        Self {
            min: AtomicU64::new(0),
            max: AtomicU64::new(0),
            weight: AtomicU32::new(WEIGHT_DEFAULT),
            gc_percent: AtomicU8::new(UNSET),
            held: AtomicUsize::new(0),
            bound: AtomicUsize::new(usize::MAX),
            asked: AtomicU64::new(0),
            waits: AtomicBool::new(false),
            is_stuck: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            active: AtomicU64::new(0),
        }
    }
}

impl Share {
    /// Segments it holds.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::SeqCst)
    }

    /// Counts a segment more.
    pub fn hold(&self) {
        self.held.fetch_add(1, Ordering::SeqCst);
    }

    /// Counts one less.
    pub fn give(&self) {
        let before = self.held.fetch_sub(1, Ordering::SeqCst);
        debug_assert!(before > 0, "a volume gives what it holds");
    }

    /// Whether it waits for a segment that it was refused.
    pub fn waits(&self) -> bool {
        self.waits.load(Ordering::SeqCst)
    }

    /// Notes that one of its own is reclaimed for what it waits for.
    pub fn is_served(&self) {
        self.waits.store(false, Ordering::SeqCst);
    }

    /// Whether nothing but its disk can give it any space.
    pub fn is_stuck(&self) -> bool {
        self.is_stuck.load(Ordering::SeqCst)
    }

    /// Notes whether that is so; says whether it has become so.
    pub fn note_stuck(&self, is_stuck: bool) -> bool {
        !self.is_stuck.swap(is_stuck, Ordering::SeqCst) && is_stuck
    }
}

impl VolumeCore {
    /// Whether a daemon serves it.
    pub fn is_attached(&self) -> bool {
        self.attached.load(Ordering::SeqCst)
    }

    /// How many streams take reads alone.
    pub fn fill_stream_count(&self) -> usize {
        self.fill_streams.get().map_or(0, |streams| streams.len())
    }

    /// Begins with no shares of its own, when so many segments have been opened.
    pub fn begin_shares(&self, opened: u64) {
        let share = &self.share;
        share.min.store(0, Ordering::Relaxed);
        share.max.store(0, Ordering::Relaxed);
        share.weight.store(WEIGHT_DEFAULT, Ordering::Relaxed);
        share.gc_percent.store(UNSET, Ordering::Relaxed);
        share.bound.store(usize::MAX, Ordering::Relaxed);
        share.asked.store(0, Ordering::Relaxed);
        share.waits.store(false, Ordering::SeqCst);
        share.is_stuck.store(false, Ordering::SeqCst);
        share.active.store(opened, Ordering::Relaxed);
    }

    fn shares(&self) -> Shares {
        let share = &self.share;
        let gc = share.gc_percent.load(Ordering::Relaxed);
        Shares {
            min: share.min.load(Ordering::Relaxed),
            max: share.max.load(Ordering::Relaxed),
            weight: share.weight.load(Ordering::Relaxed),
            gc_percent: (gc != UNSET).then_some(gc),
        }
    }

    /// Takes note of whether its guest has asked for anything.
    pub fn note_activity(&self, opened: u64) {
        let count = |q: &QueueShared| {
            [&q.tally.reads, &q.tally.writes, &q.tally.discards].map(|n| n.load(Ordering::Relaxed))
        };
        let requests = self.queues.iter().flat_map(count).sum();
        if self.share.requests.swap(requests, Ordering::Relaxed) != requests {
            self.share.active.store(opened, Ordering::Relaxed);
        }
    }
}

impl<E: Env> Cache<E> {
    fn segment_bytes(&self) -> u64 {
        u64::from(self.media.geometry.segment_size)
    }

    fn min_of(&self, core: &VolumeCore) -> usize {
        match core.is_attached() {
            true => core.share.min.load(Ordering::Relaxed).div_ceil(self.segment_bytes()) as usize,
            false => 0,
        }
    }

    fn max_of(&self, core: &VolumeCore) -> Option<usize> {
        let max = core.share.max.load(Ordering::Relaxed);
        (max > 0).then(|| ((max / self.segment_bytes()) as usize).max(MAX_LEAST))
    }

    /// Whether relocation may open one more for it.
    pub(crate) fn may_relocate(&self, core: &VolumeCore) -> bool {
        self.max_of(core).is_none_or(|max| core.share.held() < max)
    }

    /// Segments that a volume's guest may hold: all but relocation's one, unless that is promised.
    fn guests_max(&self, core: &VolumeCore) -> Option<usize> {
        let max = self.max_of(core).filter(|_| !mutated(Mutant::MaximumIgnored))?;
        Some((max - 1).max(self.min_of(core)).min(max))
    }

    /// Free segments kept between what a volume with a maximum holds and that, so that it need not wait.
    fn slack(max: usize) -> usize {
        (max / 32).clamp(1, 8)
    }

    /// The number of segments from which on `gc_percent` reclaims.
    fn gc_ceiling(&self, core: &VolumeCore) -> Option<usize> {
        let percent = core.shares().gc_percent?;
        let all = self.max_of(core).unwrap_or(self.segments.len());
        Some((all * usize::from(percent) / 100).max(self.min_of(core)))
    }

    /// Bytes of dirty data that `gc_percent` lets wait.
    pub(crate) fn gc_bytes(&self, core: &VolumeCore) -> Option<u64> {
        self.gc_ceiling(core).map(|ceiling| ceiling as u64 * self.segment_capacity())
    }

    /// Segments that a volume holds beyond what its own maximum or `gc_percent` leaves it.
    pub(crate) fn excess_of(&self, core: &VolumeCore) -> usize {
        if !core.is_attached() {
            return 0;
        }
        let by_max = self.guests_max(core).map(|max| {
            let ceiling = max.saturating_sub(Self::slack(max)).max(self.min_of(core));
            // Where its minimum leaves no slack it gives when it is to get another.
            if core.share.waits() { ceiling.min(max - 1) } else { ceiling }
        });
        let least = [by_max, self.gc_ceiling(core)].into_iter().flatten().min();
        least.map_or(0, |ceiling| core.share.held().saturating_sub(ceiling))
    }

    fn wants(&self, core: &VolumeCore) -> bool {
        let asked = core.share.asked.load(Ordering::Relaxed);
        let since = self.opened.load(Ordering::Relaxed).saturating_sub(asked.saturating_sub(1));
        core.is_attached() && asked > 0 && since < self.segments.len() as u64
    }

    fn is_idle(&self, core: &VolumeCore) -> bool {
        let since =
            self.opened.load(Ordering::Relaxed).saturating_sub(core.share.active.load(Ordering::Relaxed));
        !core.is_attached() || since >= self.segments.len() as u64
    }

    /// Free segments that volumes lack to their minimums and want, one of them left out (law 2).
    fn owed<'a>(&self, volumes: impl Iterator<Item = &'a VolumeCore>, but: Option<&VolumeCore>) -> usize {
        volumes
            .filter(|v| but.is_none_or(|but| but.incarnation != v.incarnation))
            .map(|v| match self.min_of(v) {
                0 => 0,
                min if self.wants(v) && !mutated(Mutant::MinimumIgnored) => {
                    min.saturating_sub(v.share.held())
                }
                _ => 0,
            })
            .sum()
    }

    /// Free segments that anybody may have.
    pub(crate) fn unpromised(&self) -> usize {
        let volumes = self.all_volumes();
        self.free_segments().saturating_sub(self.owed(volumes.iter().map(|v| &**v), None))
    }

    /// Whether as many segments are free as volumes lack to their minimums and want.
    pub(crate) fn is_kept(&self) -> bool {
        let volumes = self.all_volumes();
        self.free_segments() >= self.owed(volumes.iter().map(|v| &**v), None)
    }

    /// Whether a volume may take one of so many free segments; without one, whether reclaim may.
    pub(crate) fn may_take<'a>(
        &self,
        core: Option<&VolumeCore>,
        volumes: impl Iterator<Item = &'a VolumeCore>,
        free: usize,
    ) -> bool {
        let owed = self.owed(volumes, core);
        let Some(core) = core else { return free > owed };
        let held = core.share.held();
        if self.guests_max(core).is_some_and(|max| held >= max) {
            return false;
        }
        free > owed || (free > 0 && held < self.min_of(core))
    }

    /// Whether a volume that was refused a segment might get one now.
    pub(crate) fn may_open(&self, core: &VolumeCore) -> bool {
        let volumes = self.all_volumes();
        self.may_take(Some(core), volumes.iter().map(|v| &**v), self.free_segments())
    }

    /// Notes that a volume asks for a segment, and whether it gets one. What a fill gets is not what a
    /// write waits for.
    pub(crate) fn note_asked(&self, core: &VolumeCore, is_given: bool, for_fill: bool) {
        core.share.asked.store(self.opened.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        if !is_given || !for_fill {
            core.share.waits.store(!is_given, Ordering::SeqCst);
        }
    }

    /// Wakes those who were refused a segment and might get one now: what others lacked, they may no
    /// longer want.
    pub(crate) fn wake_refused(&self) {
        let free = self.free_segments();
        let volumes = self.all_volumes();
        for volume in volumes.iter().filter(|v| v.share.waits()) {
            if self.may_take(Some(volume), volumes.iter().map(|v| &**v), free) {
                volume.share.is_served();
                volume.wake_waiting();
            }
        }
    }

    /// What everybody holds.
    pub(crate) fn ledger(&self) -> Ledger {
        let opened = self.opened.load(Ordering::Relaxed);
        let holding = |core: &VolumeCore| {
            core.note_activity(opened);
            Holding {
                incarnation: core.incarnation,
                held: core.share.held(),
                min: self.min_of(core),
                weight: core.share.weight.load(Ordering::Relaxed),
                is_idle: self.is_idle(core),
                wants: self.wants(core),
                waits: core.share.waits(),
            }
        };
        Ledger::new(self.all_volumes().iter().map(|v| holding(v)).collect())
    }

    /// What the volume whose segment it is counts one less.
    pub(crate) fn count_given(&self, id: u32) {
        if let Some(volume) = self.volume_of(self.segments[id as usize].owner.load(Ordering::Relaxed)) {
            volume.share.give();
        }
    }

    /// Counts what every volume holds, one by one: at a start.
    pub(crate) fn count_held(&self) {
        for volume in self.all_volumes() {
            volume.share.held.store(self.holds(volume.incarnation), Ordering::SeqCst);
        }
    }

    /// Whether a volume holds more than it may: then how much that is. What it once held of more than its
    /// maximum it may not hold again.
    #[cfg(feature = "sim")]
    pub(crate) fn check_bound(&self, core: &VolumeCore) -> Option<usize> {
        let (held, bound) = (core.share.held(), core.share.bound.load(Ordering::Relaxed));
        if held > bound && core.is_attached() {
            return Some(bound);
        }
        let max = self.max_of(core).map_or(usize::MAX, |max| max.max(held));
        core.share.bound.store(max, Ordering::Relaxed);
        None
    }

    /// Segments that are a volume's, one by one.
    pub(crate) fn holds(&self, incarnation: u64) -> usize {
        let is_held = |s: &Segment| {
            matches!(s.state(), State::Open | State::Full | State::Sealed | State::Target)
                && s.owner.load(Ordering::Relaxed) == incarnation
        };
        self.segments.iter().filter(|s| is_held(s)).count()
    }

    /// What each attached volume is entitled to when all want what they may have, in segments.
    fn entitled(&self, volumes: &[std::sync::Arc<VolumeCore>]) -> Vec<(u64, f64)> {
        let attached: Vec<_> = volumes.iter().filter(|v| v.is_attached()).collect();
        let total = self.segments.len() as f64;
        let row = |core: &VolumeCore| {
            let max = self.max_of(core).map_or(total, |max| max as f64);
            (self.min_of(core) as f64, max, f64::from(core.share.weight.load(Ordering::Relaxed).max(1)))
        };
        let rows: Vec<_> = attached.iter().map(|v| row(v)).collect();
        let each = entitlements(total, &rows);
        attached.iter().map(|v| v.incarnation).zip(each).collect()
    }

    /// Room for one volume's dirty data in bytes: the segments, less what reclaim keeps in hand, less
    /// what the others hold of it or may claim (law 5).
    pub(crate) fn room_for(&self, core: &VolumeCore) -> u64 {
        let volumes = self.all_volumes();
        let entitled = self.entitled(&volumes);
        let share_of =
            |v: &VolumeCore| entitled.iter().find(|(i, _)| *i == v.incarnation).map_or(0.0, |(_, s)| *s);
        let capacity = self.segment_capacity();
        let bytes = |segments: f64| (segments * capacity as f64) as u64;
        let claim = |v: &VolumeCore| {
            let (share, least) = (share_of(v), (share_of(v) / 2.0).max(self.min_of(v) as f64));
            // What it has, and some to grow: if it does, its claim does, and gets ahead of it.
            let growth = (share / 8.0).max(2.0);
            if self.is_idle(v) { least } else { share.min(v.share.held() as f64 + growth).max(least) }
        };
        let others = volumes.iter().filter(|v| v.incarnation != core.incarnation);
        let others: u64 = others.map(|v| v.pacer.used().max(bytes(claim(v)))).sum();
        let all = self.segments.len() as u64 * capacity;
        let reserve = (self.free_target() as u64).min(self.segments.len() as u64 / 8) + core.stream_count();
        let room = all.saturating_sub(reserve * capacity + others).max(bytes(share_of(core) / 2.0));
        match self.guests_max(core) {
            None => room,
            Some(max) => {
                // Beside it are what the next write opens, and what lies open and is not dirty.
                let open =
                    core.stream_count() as usize - 1 + if core.fill_stream_count() > 0 { 2 } else { 0 };
                let most = max.saturating_sub(Self::slack(max) + open).max(1) as u64 * capacity;
                room.min(most)
            }
        }
    }

    /// Whether a volume of this name, there or yet to be attached, can have such shares.
    ///
    /// # Errors
    /// [`ShareError`].
    pub fn may_share(&self, name: &str, shares: &Shares) -> Result<(), ShareError> {
        let own = self.find_volume(name).map(|v| v.incarnation);
        let volumes = self.all_volumes();
        let others = || volumes.iter().filter(|v| v.is_attached() && Some(v.incarnation) != own);
        let (segment, total) = (self.segment_bytes(), self.space().total - self.space().bad);
        let Shares { min, max, .. } = *shares;
        if max > 0 && max / segment < MAX_LEAST as u64 {
            return Err(ShareError::MaxTooSmall { max, segment });
        }
        if max > 0 && min > max {
            return Err(ShareError::MinAboveMax { min, max });
        }
        let promised: usize = others().map(|v| self.min_of(v).max(LEAST)).sum();
        let room = total.saturating_sub(self.free_target() + LEAST);
        let wanted = (min.div_ceil(segment) as usize).max(LEAST);
        let is_promised = min > 0 || others().any(|v| self.min_of(v) > 0);
        if is_promised && wanted > room.saturating_sub(promised) {
            let (room, promised) = (room as u64 * segment, promised as u64 * segment);
            return Err(ShareError::TooMuchPromised { room, promised });
        }
        Ok(())
    }
}

impl<E: Env> Volume<E> {
    /// Sets what it may hold, at once: what it holds too much is reclaimed as soon as it is clean.
    ///
    /// # Errors
    /// [`ShareError`]; nothing has changed.
    pub fn set_shares(&self, shares: Shares) -> Result<(), ShareError> {
        let cache = &self.cache;
        let _alone = lock(&cache.sharing);
        cache.may_share(&self.name, &shares)?;
        let share = &self.core.share;
        share.min.store(shares.min, Ordering::Relaxed);
        share.max.store(shares.max, Ordering::Relaxed);
        share.weight.store(shares.weight.clamp(1, WEIGHT_MAX), Ordering::Relaxed);
        let gc = shares.gc_percent.map_or(UNSET, |percent| percent.min(GC_PERCENT_MAX));
        share.gc_percent.store(gc, Ordering::Relaxed);
        let bound = cache.max_of(&self.core).map_or(usize::MAX, |max| max.max(share.held()));
        share.bound.store(bound, Ordering::Relaxed);
        cache.housekeeper.raise();
        self.core.writeback.raise();
        cache.all_volumes().iter().for_each(|v| v.wake_waiting());
        Ok(())
    }

    /// What [`Volume::set_shares`] has set.
    pub fn shares(&self) -> Shares {
        self.core.shares()
    }

    /// Bytes of segments that it holds.
    pub fn held_bytes(&self) -> u64 {
        self.core.share.held() as u64 * self.cache.segment_bytes()
    }

    /// Bytes that it is entitled to when all volumes want what they may have.
    pub fn share_bytes(&self) -> u64 {
        let entitled = self.cache.entitled(&self.cache.all_volumes());
        let own = entitled.iter().find(|(incarnation, _)| *incarnation == self.core.incarnation);
        own.map_or(0, |(_, segments)| (segments * self.cache.segment_bytes() as f64) as u64)
    }
}
