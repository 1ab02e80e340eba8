//! How soon what lies in the cache is read again: measured on a few blocks, used to weigh segments.
//!
//! Whether what guests write or what they read is worth more space, and for how long, differs from
//! guest to guest: one reads back what it wrote, another keeps it in its own page cache and never
//! does. So each volume learns it from its own requests. Of a sample of its blocks, chosen by hash, it
//! is remembered when they were last stored and in which [`Class`], and it is noted at what age they
//! are read. The sample is a shadow cache without an end: it follows a block also after reclaim has
//! dropped it, up to [`AGE_MAX`] times the cache, so that what was never kept long is known as well.
//!
//! ```text
//!  hits(class, age) / exposure(class, age)   chance that a block is read, per segment of log
//!  value(class, age) = the greatest mean of it over any time ahead
//! ```
//!
//! The mean is over the time that pays most: a block that is read when a loop comes round again is
//! worth more the nearer that is, and one past its time is worth nothing.
//!
//! - Time is counted in segments that the cache has opened: what space is spent on.
//! - At most [`SAMPLE_MAX`] blocks are followed; when there are more, half of them are let go, by
//!   their hash. Rates are of blocks followed, so they do not change with their number.
//! - All of it is advice. What is lost (a lock that was taken, a restart) costs hits, nothing else.

use std::collections::HashMap;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::segments::Class;
use crate::sync::Mutex;
use crate::units::SectorRange;

/// Blocks followed at a time: enough that the share of each age is known to a few percent.
const SAMPLE_MAX: usize = 8192;
/// One block in so many is followed at first.
const SAMPLE_FIRST: u32 = 16;
/// Ages told apart, finer where they are low.
const AGES: usize = 32;
/// The greatest age, in sizes of the cache.
const AGE_MAX: f64 = 4.0;
/// Ratio of the widest age to the narrowest.
const SPREAD: f64 = 64.0;
/// What was seen so many sizes of the cache ago counts half.
const HALF_LIFE: f64 = 4.0;
/// Exposure, in sizes of the cache, that the mean of a class stands in for at each age.
const PRIOR: f64 = 0.1;
/// The shortest time ahead, in sizes of the cache: else chance finds a moment that pays.
const AHEAD_MIN: f64 = 0.02;

/// A block that is followed.
struct Followed {
    class: Class,
    /// When it was stored, and how much of its age is accounted for.
    stored: f64,
    told: f64,
}

/// What has been seen, and what follows from it.
struct Seen {
    blocks: HashMap<u64, Followed>,
    /// Reads and exposure, by class and age.
    hits: [[f64; AGES]; Class::COUNT],
    exposure: [[f64; AGES]; Class::COUNT],
    value: [[f64; AGES]; Class::COUNT],
    /// Size of the cache in segments.
    size: f64,
    solved: f64,
}

/// What one volume has learnt of its reads.
pub(crate) struct Reuse {
    seen: Mutex<Seen>,
    /// Blocks whose hash is below are followed.
    below: AtomicU32,
    /// When the values were last worked out.
    solved: AtomicU64,
}

fn hash(block: u64) -> u32 {
    let mixed = block.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32) as u32
}

/// The youngest age of the `i`-th kind, in sizes of the cache. Worked out once: a read of a block that is
/// followed asks for all of them.
fn edge(i: usize) -> f64 {
    static EDGES: LazyLock<[f64; AGES + 1]> = LazyLock::new(|| {
        std::array::from_fn(|i| AGE_MAX * (SPREAD.powf(i as f64 / AGES as f64) - 1.0) / (SPREAD - 1.0))
    });
    EDGES[i]
}

impl Reuse {
    /// Of a volume on a cache of `segments`.
    pub fn new(segments: usize) -> Reuse {
        let zeros = [[0.0; AGES]; Class::COUNT];
        let seen = Seen {
            blocks: HashMap::new(),
            hits: zeros,
            exposure: zeros,
            value: zeros,
            size: segments.max(1) as f64,
            solved: 0.0,
        };
        Reuse {
            seen: Mutex::new(seen),
            below: AtomicU32::new(u32::MAX / SAMPLE_FIRST),
            solved: AtomicU64::new(0),
        }
    }

    /// Calls `f` for the blocks of a range that are followed, unless somebody else is at it.
    fn each(&self, range: SectorRange, mut f: impl FnMut(&mut Seen, u64)) {
        let below = self.below.load(Ordering::Relaxed);
        let mut sampled = (range.start / 8..=(range.end() - 1) / 8).filter(|&b| hash(b) < below).peekable();
        if sampled.peek().is_some()
            && let Ok(mut seen) = self.seen.try_lock()
        {
            sampled.for_each(|block| f(&mut seen, block));
        }
    }

    /// Notes that a guest asks for a range, cached or not.
    pub fn read(&self, range: SectorRange, now: u64) {
        self.each(range, |seen, block| seen.read(block, now as f64));
    }

    /// Notes that a range has been stored, whatever it was before.
    pub fn stored(&self, range: SectorRange, class: Class, now: u64) {
        self.each(range, |seen, block| {
            seen.stored(block, class, now as f64);
            if seen.blocks.len() > SAMPLE_MAX {
                let below = self.below.load(Ordering::Relaxed) / 2;
                self.below.store(below, Ordering::Relaxed);
                seen.blocks.retain(|&b, _| hash(b) < below);
            }
        });
    }

    /// Works out anew what blocks are worth, if enough has happened since the last time.
    pub fn solve(&self, now: u64) {
        let mut seen = super::stripes::lock(&self.seen);
        if (now.saturating_sub(self.solved.load(Ordering::Relaxed))) as f64 >= seen.size / 32.0 {
            self.solved.store(now, Ordering::Relaxed);
            seen.solve(now as f64);
        }
    }

    /// What a block of this class and age is worth: reads per segment of log that it outlasts.
    pub fn value(&self, class: Class, age: u64) -> f64 {
        let seen = super::stripes::lock(&self.seen);
        match seen.kind(age as f64) {
            Some(kind) => seen.value[usize::from(class.code())][kind],
            None => 0.0,
        }
    }
}

impl Seen {
    /// Which of the ages it is, `None` beyond the greatest.
    fn kind(&self, age: f64) -> Option<usize> {
        let at = (age / self.size / AGE_MAX * (SPREAD - 1.0) + 1.0).ln() / SPREAD.ln() * AGES as f64;
        (at < AGES as f64).then_some(at.max(0.0) as usize)
    }

    /// Accounts for a block's life up to now.
    fn tell(size: f64, exposure: &mut [[f64; AGES]], block: &mut Followed, now: f64) {
        let age = now - block.stored;
        let row = &mut exposure[usize::from(block.class.code())];
        if block.told >= age {
            return;
        }
        for (i, time) in row.iter_mut().enumerate() {
            let upto = age.min(edge(i + 1) * size);
            if upto > block.told {
                *time += upto - block.told;
                block.told = upto;
                if upto == age {
                    return;
                }
            }
        }
    }

    fn read(&mut self, block: u64, now: f64) {
        let Some(followed) = self.blocks.get_mut(&block) else { return };
        Self::tell(self.size, &mut self.exposure, followed, now);
        let (class, age) = (usize::from(followed.class.code()), now - followed.stored);
        if let Some(kind) = self.kind(age) {
            self.hits[class][kind] += 1.0;
        }
    }

    fn stored(&mut self, block: u64, class: Class, now: f64) {
        let fresh = Followed { class, stored: now, told: 0.0 };
        if let Some(mut before) = self.blocks.insert(block, fresh) {
            Self::tell(self.size, &mut self.exposure, &mut before, now);
        }
    }

    fn solve(&mut self, now: f64) {
        let (size, exposure) = (self.size, &mut self.exposure);
        self.blocks.retain(|_, block| {
            Self::tell(size, exposure, block, now);
            now - block.stored < AGE_MAX * size
        });
        let fade = 0.5f64.powf((now - self.solved) / (HALF_LIFE * self.size));
        self.solved = now;
        for class in 0..Class::COUNT {
            self.hits[class].iter_mut().chain(&mut self.exposure[class]).for_each(|n| *n *= fade);
            let (hits, exposure) = (&self.hits[class], &self.exposure[class]);
            let mean = hits.iter().sum::<f64>() / (exposure.iter().sum::<f64>() + size * PRIOR);
            let prior = size * PRIOR;
            let rate = |i: usize| (hits[i] + mean * prior) / (exposure[i] + prior);
            for from in 0..AGES {
                let (mut reads, mut time, mut best) = (0.0, size * AHEAD_MIN, 0.0f64);
                for i in from..AGES {
                    let width = (edge(i + 1) - edge(i)) * size;
                    reads += rate(i) * width;
                    time += width;
                    best = best.max(reads / time);
                }
                self.value[class][from] = best;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(n: u64) -> SectorRange {
        SectorRange::new(n * 8, 8)
    }

    #[test]
    fn what_is_read_back_is_worth_more_than_what_is_not() {
        let reuse = Reuse::new(100);
        for now in 0..1000 {
            reuse.stored(SectorRange::new(now * 800, 400), Class::Written, now);
            reuse.stored(SectorRange::new(now * 800 + 400, 400), Class::Probation, now);
            if now > 20 {
                reuse.read(SectorRange::new((now - 20) * 800 + 400, 400), now);
            }
            reuse.solve(now);
        }
        let value = |class, age| reuse.value(class, age);
        assert!(value(Class::Probation, 1) > 10.0 * value(Class::Written, 1));
        // Nearer to the moment it is worth more, past it nothing.
        assert!(value(Class::Probation, 18) > 2.0 * value(Class::Probation, 1));
        assert!(value(Class::Probation, 60) < value(Class::Probation, 1) / 10.0);
        assert_eq!(value(Class::Probation, 401), 0.0);
        assert!(value(Class::Proven, 1) < value(Class::Probation, 1));
    }

    #[test]
    fn a_sample_stays_within_its_bound_and_goes_on_learning() {
        let reuse = Reuse::new(64);
        for now in 0..256 {
            reuse.stored(SectorRange::new(now << 20, 1 << 16), Class::Probation, now);
            assert!(super::super::stripes::lock(&reuse.seen).blocks.len() <= SAMPLE_MAX);
            if now > 2 {
                reuse.read(SectorRange::new((now - 2) << 20, 1 << 16), now);
            }
            reuse.solve(now);
        }
        assert!(reuse.below.load(Ordering::Relaxed) < u32::MAX / SAMPLE_FIRST);
        assert!(reuse.value(Class::Probation, 1) > 0.1);
    }

    #[test]
    fn exposure_is_all_of_a_life_and_counted_once() {
        let reuse = Reuse::new(10);
        let followed: Vec<u64> = (0..).filter(|&b| hash(b) < u32::MAX / SAMPLE_FIRST).take(2).collect();
        followed.iter().for_each(|&b| reuse.stored(block(b), Class::Written, 0));
        for now in [3, 7, 7, 11] {
            reuse.read(block(followed[0]), now);
        }
        reuse.stored(block(followed[0]), Class::Proven, 15);
        let mut seen = super::super::stripes::lock(&reuse.seen);
        seen.solve(20.0);
        let fade = 0.5f64.powf(20.0 / 40.0);
        let sum = |row: &[f64; AGES]| row.iter().sum::<f64>() / fade;
        assert!((sum(&seen.exposure[0]) - 35.0).abs() < 1e-9, "{}", sum(&seen.exposure[0]));
        assert!((sum(&seen.exposure[2]) - 5.0).abs() < 1e-9);
        assert!((sum(&seen.hits[0]) - 4.0).abs() < 1e-9);
    }
}
