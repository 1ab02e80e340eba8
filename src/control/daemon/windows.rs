//! Rates of a volume that forget: exponentially decaying averages over a few windows, and counters
//! that an operator can begin anew. Both look at the engine's counters from outside; those only grow.

use std::time::{Duration, Instant};

use super::super::api::model::Rates;
use crate::cache::Counters;

/// The windows, in seconds: now, lately, and the last quarter of an hour.
pub const WINDOWS_S: [u32; 3] = [10, 60, 900];
/// What is averaged: see [`Windows::sample`].
const SERIES: usize = 7;

/// See the module's head.
pub struct Windows {
    /// When `counters` began, and what had been counted by then.
    since: Instant,
    base: Counters,
    last: (Instant, [u64; SERIES]),
    /// By window: averages per second.
    averages: [[f64; SERIES]; WINDOWS_S.len()],
    /// By window: how much of it has been seen, from 0 to 1.
    seen: [f64; WINDOWS_S.len()],
}

/// What has grown, and what merely is.
const GAUGES: [&str; 7] =
    ["lag_ms", "dirty_bytes", "cached_bytes", "lost_sectors", "free_segments", "epoch", "tail_epoch"];

/// Whether a counter of the engine says what is the case now, rather than what has happened.
pub fn is_gauge(name: &str) -> bool {
    GAUGES.contains(&name)
}

impl Windows {
    /// Windows of a volume that has counted `counters` so far.
    pub fn new(now: Instant, counters: &Counters) -> Self {
        Self {
            since: now,
            base: *counters,
            last: (now, series(counters)),
            averages: Default::default(),
            seen: Default::default(),
        }
    }

    /// Begins to count from here.
    pub fn reset(&mut self, now: Instant, counters: &Counters) {
        (self.since, self.base) = (now, *counters);
    }

    /// Since when `counted` counts.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
    }

    /// What has been counted since, by name; gauges are left out.
    pub fn counted(&self, counters: &Counters) -> Vec<(&'static str, u64)> {
        let fields = counters.fields().into_iter().zip(self.base.fields());
        let counted = fields.map(|((name, now), (_, then))| (name, now.saturating_sub(then)));
        counted.filter(|(name, _)| !is_gauge(name)).collect()
    }

    /// Takes in what has happened since the last sample, which was the seconds ago that it returns.
    pub fn sample(&mut self, now: Instant, counters: &Counters) -> f64 {
        let values = series(counters);
        let seconds = now.saturating_duration_since(self.last.0).as_secs_f64();
        if seconds <= 0.0 {
            return 0.0;
        }
        for (at, window) in WINDOWS_S.into_iter().enumerate() {
            // What is `window` seconds old counts 1/e; the weight of what was never seen is taken out
            // in `rates`, so a young volume's rates are not too low.
            let keep = (-seconds / f64::from(window)).exp();
            self.seen[at] = self.seen[at] * keep + (1.0 - keep);
            for (average, (new, old)) in self.averages[at].iter_mut().zip(values.iter().zip(self.last.1)) {
                let rate = new.saturating_sub(old) as f64 / seconds;
                *average = *average * keep + rate * (1.0 - keep);
            }
        }
        self.last = (now, values);
        seconds
    }

    /// The averages now.
    pub fn rates(&self) -> Vec<Rates> {
        let windows = WINDOWS_S.into_iter().enumerate();
        windows
            .map(|(at, window_s)| {
                let rate = |series: usize| match self.seen[at] {
                    0.0 => 0.0,
                    seen => self.averages[at][series] / seen,
                };
                let (hits, misses) = (rate(2), rate(3));
                Rates {
                    window_s,
                    reads_per_s: rate(0),
                    writes_per_s: rate(1),
                    read_bytes_per_s: (hits + misses) * 512.0,
                    write_bytes_per_s: rate(4) * 512.0,
                    read_hit_ratio: (hits + misses > 1e-9).then(|| hits / (hits + misses)),
                    writeback_bytes_per_s: rate(5) * 512.0,
                    errors_per_s: rate(6),
                }
            })
            .collect()
    }
}

fn series(counters: &Counters) -> [u64; SERIES] {
    [
        counters.reads,
        counters.writes,
        counters.read_hit_sectors,
        counters.read_miss_sectors,
        counters.write_sectors,
        counters.written_back_sectors,
        counters.errors,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_rate_is_known_at_once_and_an_old_one_is_forgotten() {
        let begun = Instant::now();
        let mut counters = Counters::default();
        let mut windows = Windows::new(begun, &counters);
        for second in 1..=5 {
            counters.reads += 100;
            counters.read_hit_sectors += 75 * 8;
            counters.read_miss_sectors += 25 * 8;
            windows.sample(begun + Duration::from_secs(second), &counters);
        }
        for rates in windows.rates() {
            assert!((rates.reads_per_s - 100.0).abs() < 1e-6, "{rates:?}");
            assert!((rates.read_hit_ratio.unwrap() - 0.75).abs() < 1e-6, "{rates:?}");
            assert_eq!(rates.writes_per_s, 0.0);
        }
        for second in 6..=65 {
            windows.sample(begun + Duration::from_secs(second), &counters);
        }
        let rates = windows.rates();
        assert!(rates[0].reads_per_s < 1.0, "ten seconds have forgotten it: {rates:?}");
        assert!(rates[2].reads_per_s > 5.0, "a quarter of an hour has not: {rates:?}");
        assert!(rates.windows(2).all(|pair| pair[0].reads_per_s < pair[1].reads_per_s));
    }

    #[test]
    fn a_reset_counts_from_zero_and_leaves_gauges_and_rates_alone() {
        let now = Instant::now();
        let mut counters = Counters { reads: 7, dirty_bytes: 4096, ..Counters::default() };
        let mut windows = Windows::new(now, &Counters::default());
        let reads = |windows: &Windows, counters: &Counters| {
            windows.counted(counters).into_iter().find(|(name, _)| *name == "reads").unwrap().1
        };
        assert_eq!(reads(&windows, &counters), 7);
        windows.reset(now, &counters);
        assert_eq!(reads(&windows, &counters), 0);
        counters.reads += 2;
        assert_eq!(reads(&windows, &counters), 2);
        assert!(windows.counted(&counters).iter().all(|(name, _)| !is_gauge(name)));
        let known: Vec<_> = counters.fields().into_iter().map(|(name, _)| name).collect();
        assert!(GAUGES.iter().all(|gauge| known.contains(gauge)), "a gauge that nobody has");
    }
}
