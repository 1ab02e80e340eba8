//! How long the stages of a request take, as distributions: an average hides what an operator looks for.
//!
//! ```text
//!  guest ──submit──┬─ read: cached ────────────────────────────────────────► read_hit
//!                  ├─ read: not cached ─► disk_read ───────────────────────► read_miss
//!                  ├─ write ─► write_wait (batch, pace, space) ─► record ──► write
//!                  ├─ write around the cache ─► disk_write, disk_flush ────► write_around
//!                  └─ flush, discard ──────────────────────────────────────► flush, discard
//!  worker ─► writeback_write ─► writeback_flush
//! ```
//!
//! Laws:
//! - Measuring decides nothing: nothing here is read by the engine, and a look at the clock for it
//!   ([`Clock::now_ns`](super::env::Clock::now_ns)) changes nothing in a simulation.
//! - Of a queue's requests one in [`SAMPLE_EVERY`] is timed, so that a request pays for two looks at a
//!   clock and one addition only so often; operations on disks are all timed, they cost far more. Each
//!   distribution is of samples, and their share of the requests is known from the counters.
//! - A queue writes to cells of its own, made when it is first opened; who wants to know adds them up.
//!
//! Buckets are of one width per power of two and [`SUBS`] of them in each, from 256 ns to 68 s: an eighth
//! of the value is the coarsest that is told, and interpolation makes less of it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Of so many requests of a queue one is timed. Odd, so that batches of a power of two are sampled at each
/// of their places.
pub(crate) const SAMPLE_EVERY: u32 = 31;
/// Buckets per power of two; a power of two itself.
const SUBS: usize = 8;
const SUBS_SHIFT: u32 = SUBS.trailing_zeros();
/// Below 2 to this many nanoseconds nothing is told apart.
const LOW_SHIFT: u32 = 8;
/// From 2 to this many on neither.
const HIGH_SHIFT: u32 = 36;
/// Buckets of a distribution.
pub const BUCKETS: usize = 1 + (HIGH_SHIFT - LOW_SHIFT) as usize * SUBS;

macro_rules! stages {
    ($(#[doc = $doc:literal] $stage:ident $name:literal,)*) => {
        /// What takes its time.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u8)]
        pub enum Stage { $(#[doc = $doc] $stage,)* }

        impl Stage {
            /// All, in the order of their codes.
            pub const ALL: &[Stage] = &[$(Stage::$stage),*];

            /// Its name, as metrics and the API have it.
            pub fn name(self) -> &'static str {
                match self { $(Stage::$stage => $name),* }
            }

            /// What it is.
            pub fn description(self) -> &'static str {
                match self { $(Stage::$stage => $doc.trim_ascii()),* }
            }
        }
    };
}

stages! {
    /// A read that the cache alone answered, from submission to completion.
    ReadHit "read_hit",
    /// A read that needed the backing disk, from submission to completion.
    ReadMiss "read_miss",
    /// A write, from submission until its record in the cache is begun: batch, pace of the disk, space.
    WriteWait "write_wait",
    /// A write into the cache, from submission to completion.
    Write "write",
    /// A write around the cache, from submission to completion.
    WriteAround "write_around",
    /// A DISCARD or WRITE_ZEROES, from submission to completion.
    Discard "discard",
    /// A FLUSH, from submission to completion.
    Flush "flush",
    /// A read of the backing disk for a guest.
    DiskRead "disk_read",
    /// A write to the backing disk around the cache.
    DiskWrite "disk_write",
    /// A flush of the backing disk for a guest.
    DiskFlush "disk_flush",
    /// A write to the backing disk by write-back.
    WritebackWrite "writeback_write",
    /// A flush of the backing disk by write-back.
    WritebackFlush "writeback_flush",
}

/// The bucket of so many nanoseconds.
fn bucket_of(ns: u64) -> usize {
    if ns < 1 << LOW_SHIFT {
        return 0;
    }
    let ns = ns.min((1 << HIGH_SHIFT) - 1);
    let octave = ns.ilog2() - LOW_SHIFT;
    let sub = (ns >> (octave + LOW_SHIFT - SUBS_SHIFT)) as usize & (SUBS - 1);
    1 + octave as usize * SUBS + sub
}

/// Where a bucket ends, in nanoseconds: no value in it is as large.
pub fn bucket_end_ns(bucket: usize) -> u64 {
    let (octave, sub) = (bucket / SUBS, bucket % SUBS);
    ((SUBS + sub) as u64) << (octave as u32 + LOW_SHIFT - SUBS_SHIFT)
}

/// What of a distribution lies below `share` (0 to 1) of it, in nanoseconds; `None` if it is empty.
pub fn quantile_ns(counts: &[f64], share: f64) -> Option<f64> {
    let total: f64 = counts.iter().sum();
    if total <= 0.0 {
        return None;
    }
    let wanted = total * share;
    let mut below = 0.0;
    for (bucket, &count) in counts.iter().enumerate().filter(|(_, count)| **count > 0.0) {
        if below + count >= wanted {
            let start = if bucket == 0 { 0 } else { bucket_end_ns(bucket - 1) };
            let width = (bucket_end_ns(bucket) - start) as f64;
            return Some(start as f64 + width * ((wanted - below) / count).clamp(0.0, 1.0));
        }
        below += count;
    }
    // Rounding has left a trace of the last one.
    counts.iter().rposition(|&count| count > 0.0).map(|last| bucket_end_ns(last) as f64)
}

/// The distribution of one stage; all since the volume was attached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Histogram {
    /// Samples by bucket.
    pub counts: Box<[u64]>,
    /// Their sum.
    pub sum_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS].into(), sum_ns: 0 }
    }
}

impl Histogram {
    /// Samples in it.
    pub fn samples(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Counts one.
    pub fn record(&mut self, ns: u64) {
        self.counts[bucket_of(ns)] += 1;
        self.sum_ns += ns;
    }
}

struct Live {
    counts: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

/// The live distributions of one writer; made at the first sample, or when it is told to be ready.
#[derive(Default)]
pub(crate) struct Latencies(OnceLock<Box<[Live]>>);

impl Latencies {
    /// Makes the cells, so that no request has to.
    pub fn prepare(&self) {
        self.cells();
    }

    /// Counts one.
    pub fn record(&self, stage: Stage, ns: u64) {
        let live = &self.cells()[stage as usize];
        live.counts[bucket_of(ns)].fetch_add(1, Ordering::Relaxed);
        live.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }

    /// Adds these to `sums`, which are in the order of [`Stage::ALL`].
    pub fn add_to(&self, sums: &mut [Histogram]) {
        for (live, sum) in self.0.get().into_iter().flatten().zip(sums) {
            for (live, sum) in live.counts.iter().zip(&mut sum.counts) {
                *sum += live.load(Ordering::Relaxed);
            }
            sum.sum_ns += live.sum_ns.load(Ordering::Relaxed);
        }
    }

    fn cells(&self) -> &[Live] {
        let live = || Live { counts: [const { AtomicU64::new(0) }; BUCKETS], sum_ns: AtomicU64::new(0) };
        self.0.get_or_init(|| Stage::ALL.iter().map(|_| live()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_in_the_bucket_that_ends_after_it() {
        let mut last = 0;
        for ns in (0..4096).chain((12..40).flat_map(|shift| [(1u64 << shift) - 1, 1 << shift, 3 << shift])) {
            let bucket = bucket_of(ns);
            let within = ns.min((1 << HIGH_SHIFT) - 1);
            assert!(within < bucket_end_ns(bucket), "{ns} in {bucket}");
            assert!(bucket == 0 || within >= bucket_end_ns(bucket - 1), "{ns} in {bucket}");
            last = last.max(bucket);
        }
        assert_eq!(last, BUCKETS - 1);
        assert_eq!(bucket_end_ns(0), 1 << LOW_SHIFT);
        assert_eq!(bucket_end_ns(BUCKETS - 1), 1 << HIGH_SHIFT);
    }

    #[test]
    fn a_quantile_is_within_an_eighth_of_the_sorted_truth() {
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        for round in 0..50 {
            let mut values: Vec<u64> = (0..2000)
                .map(|_| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    // From half a microsecond to seconds, evenly by magnitude.
                    let magnitude = 9 + seed % (1 + round % 24);
                    (1 << magnitude) + (seed >> 20) % (1 << magnitude)
                })
                .collect();
            let mut histogram = Histogram::default();
            values.iter().for_each(|&ns| histogram.record(ns));
            values.sort_unstable();
            assert_eq!(histogram.samples(), 2000);
            assert_eq!(histogram.sum_ns, values.iter().sum::<u64>());
            let counts: Vec<f64> = histogram.counts.iter().map(|&count| count as f64).collect();
            for share in [0.01, 0.5, 0.9, 0.99, 0.999] {
                let truth = values[((2000.0 * share) as usize).min(1999)] as f64;
                let told = quantile_ns(&counts, share).unwrap();
                assert!(
                    (told - truth).abs() <= truth / 7.0,
                    "round {round}: {share} is {truth}, told {told}"
                );
            }
        }
    }

    #[test]
    fn an_empty_distribution_has_no_quantile() {
        assert_eq!(quantile_ns(&[0.0; BUCKETS], 0.5), None);
    }

    #[test]
    fn cells_are_added_up_by_stage() {
        let (one, other, unused) = (Latencies::default(), Latencies::default(), Latencies::default());
        one.record(Stage::Write, 1000);
        other.record(Stage::Write, 3000);
        other.record(Stage::Flush, 5);
        let mut sums = vec![Histogram::default(); Stage::ALL.len()];
        [&one, &other, &unused].into_iter().for_each(|cells| cells.add_to(&mut sums));
        assert_eq!((sums[Stage::Write as usize].samples(), sums[Stage::Write as usize].sum_ns), (2, 4000));
        assert_eq!(sums[Stage::Flush as usize].counts[0], 1);
        assert_eq!(sums[Stage::ReadHit as usize], Histogram::default());
        assert!(unused.0.get().is_none(), "who samples nothing costs nothing");
        let names: std::collections::HashSet<_> = Stage::ALL.iter().map(|stage| stage.name()).collect();
        assert_eq!(names.len(), Stage::ALL.len());
    }
}
