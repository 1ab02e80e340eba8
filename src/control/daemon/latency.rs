//! Percentiles of a volume's latencies that forget: distributions whose samples count for less the older
//! they are, over the windows of [`super::windows`], and one that an operator can begin anew.

use super::super::api::model::Latency;
use super::windows::WINDOWS_S;
use crate::cache::latency::{BUCKETS, Histogram, Stage, bucket_end_ns, quantile_ns};

/// A distribution whose counts have been faded, and so are no whole numbers.
#[derive(Clone)]
struct Faded {
    counts: Box<[f64]>,
    sum_ns: f64,
}

impl Faded {
    /// The samples that `now` has more than `then`.
    fn grown(now: &Histogram, then: &Histogram) -> Self {
        let counts = now.counts.iter().zip(&then.counts);
        Self {
            counts: counts.map(|(now, then)| now.saturating_sub(*then) as f64).collect(),
            sum_ns: now.sum_ns.saturating_sub(then.sum_ns) as f64,
        }
    }

    fn empty() -> Self {
        Self { counts: vec![0.0; BUCKETS].into(), sum_ns: 0.0 }
    }

    /// Lets what it has count for `keep` of what it did, and adds `more`.
    fn fade(&mut self, keep: f64, more: &Faded) {
        for (count, more) in self.counts.iter_mut().zip(&more.counts) {
            // Below a thousandth of a sample it is forgotten, or it would be faded for ever.
            let kept = if *count < 1e-3 { 0.0 } else { *count * keep };
            *count = kept + more;
        }
        self.sum_ns = self.sum_ns * keep + more.sum_ns;
    }

    /// What is to be told of it; nothing where it has no sample.
    fn view(&self, stage: Stage, window_s: u32) -> Option<Latency> {
        let samples: f64 = self.counts.iter().sum();
        let us = |share: f64| quantile_ns(&self.counts, share).map(|ns| ns / 1000.0);
        let slowest = self.counts.iter().rposition(|&count| count > 0.0)?;
        Some(Latency {
            stage: stage.name().into(),
            window_s,
            samples: samples.round() as u64,
            mean_us: self.sum_ns / samples / 1000.0,
            p50_us: us(0.5)?,
            p90_us: us(0.9)?,
            p99_us: us(0.99)?,
            p999_us: us(0.999)?,
            max_us: bucket_end_ns(slowest) as f64 / 1000.0,
        })
    }
}

/// See the module's head. Distributions are in the order of [`Stage::ALL`].
pub struct LatencyWindows {
    base: Vec<Histogram>,
    last: Vec<Histogram>,
    windows: [Vec<Faded>; WINDOWS_S.len()],
}

impl LatencyWindows {
    /// Windows of a volume whose distributions are these.
    pub fn new(now: Vec<Histogram>) -> Self {
        let windows = std::array::from_fn(|_| vec![Faded::empty(); Stage::ALL.len()]);
        Self { base: now.clone(), last: now, windows }
    }

    /// Takes in the samples of the last `seconds`.
    pub fn sample(&mut self, seconds: f64, now: Vec<Histogram>) {
        let grown: Vec<Faded> =
            now.iter().zip(&self.last).map(|(now, then)| Faded::grown(now, then)).collect();
        for (window_s, window) in WINDOWS_S.into_iter().zip(&mut self.windows) {
            let keep = (-seconds / f64::from(window_s)).exp();
            window.iter_mut().zip(&grown).for_each(|(window, grown)| window.fade(keep, grown));
        }
        self.last = now;
    }

    /// Begins to count from here; the windows go on.
    pub fn reset(&mut self, now: Vec<Histogram>) {
        self.base = now;
    }

    /// What has been counted since the last reset (window 0), and lately.
    pub fn view(&self, now: &[Histogram]) -> Vec<Latency> {
        let mut rows = Vec::new();
        for (at, &stage) in Stage::ALL.iter().enumerate() {
            rows.extend(Faded::grown(&now[at], &self.base[at]).view(stage, 0));
            for (window_s, window) in WINDOWS_S.into_iter().zip(&self.windows) {
                rows.extend(window[at].view(stage, window_s));
            }
        }
        rows
    }

    /// Those of one window.
    pub fn view_window(&self, window_s: u32) -> Vec<Latency> {
        let Some(at) = WINDOWS_S.iter().position(|&known| known == window_s) else { return Vec::new() };
        Stage::ALL
            .iter()
            .zip(&self.windows[at])
            .filter_map(|(&stage, faded)| faded.view(stage, window_s))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(rows: &[Latency], stage: Stage, window_s: u32) -> Option<&Latency> {
        rows.iter().find(|row| row.stage == stage.name() && row.window_s == window_s)
    }

    #[test]
    fn what_is_slow_now_shows_at_once_and_is_forgotten_by_short_windows_first() {
        let mut now = vec![Histogram::default(); Stage::ALL.len()];
        let mut windows = LatencyWindows::new(now.clone());
        let write = Stage::Write as usize;
        for _ in 0..30 {
            (0..100).for_each(|_| now[write].record(10_000));
            windows.sample(1.0, now.clone());
        }
        // A second of a disk that stalls.
        (0..100).for_each(|_| now[write].record(50_000_000));
        windows.sample(1.0, now.clone());
        let rows = windows.view(&now);
        for window_s in [10, 60, 900, 0] {
            let row = find(&rows, Stage::Write, window_s).unwrap();
            assert!(row.p999_us > 40_000.0 && (row.p50_us - 10.0).abs() < 2.0, "{row:?}");
        }
        for _ in 0..120 {
            (0..100).for_each(|_| now[write].record(10_000));
            windows.sample(1.0, now.clone());
        }
        let rows = windows.view(&now);
        assert!(find(&rows, Stage::Write, 10).unwrap().p999_us < 12.0);
        assert!(find(&rows, Stage::Write, 900).unwrap().p999_us > 40_000.0);
        assert_eq!(windows.view_window(60).len(), 1);
        assert!(find(&rows, Stage::Flush, 0).is_none(), "without a sample there is nothing to tell");
    }

    #[test]
    fn a_reset_counts_from_zero_and_leaves_the_windows_alone() {
        let mut now = vec![Histogram::default(); Stage::ALL.len()];
        let mut windows = LatencyWindows::new(now.clone());
        now[Stage::Flush as usize].record(5_000);
        windows.sample(1.0, now.clone());
        windows.reset(now.clone());
        let rows = windows.view(&now);
        assert!(find(&rows, Stage::Flush, 0).is_none());
        assert_eq!(find(&rows, Stage::Flush, 60).unwrap().samples, 1);
        now[Stage::Flush as usize].record(7_000);
        let rows = windows.view(&now);
        let row = find(&rows, Stage::Flush, 0).unwrap();
        assert_eq!((row.samples, row.mean_us), (1, 7.0));
    }
}
