//! When requests ended and how long they took.

/// Every completed request of a run, in order of completion.
#[derive(Clone, Debug, Default)]
pub struct Trail {
    /// `(end, latency)` in µs.
    pub ends: Vec<(u64, u64)>,
    /// Requests that did not end well.
    pub failed: u64,
    /// When the run began, in µs.
    pub began: u64,
}

impl Trail {
    pub(super) fn add(&mut self, began: u64, ended: u64) {
        self.ends.push((ended, ended - began));
    }

    /// Latency in µs below which `share` of the requests from the `skip`-th on stayed.
    pub fn percentile(&self, skip: usize, share: f64) -> u64 {
        let mut all: Vec<u64> = self.ends[skip.min(self.ends.len())..].iter().map(|e| e.1).collect();
        all.sort_unstable();
        let at = ((all.len() as f64 * share) as usize).min(all.len().saturating_sub(1));
        all.get(at).copied().unwrap_or(0)
    }

    /// Requests a second over all.
    pub fn rate(&self, skip: usize) -> f64 {
        let (Some(first), Some(last)) = (self.ends.get(skip), self.ends.last()) else { return 0.0 };
        (self.ends.len() - skip) as f64 * 1e6 / (last.0 - first.0).max(1) as f64
    }

    /// The fewest requests that ended in any window of `window_us` (sliding by a tenth) that lies
    /// between the `skip`-th end and the last, a second.
    pub fn worst_window(&self, skip: usize, window_us: u64) -> f64 {
        let ends = &self.ends[skip.min(self.ends.len())..];
        let (Some(first), Some(last)) = (ends.first(), ends.last()) else { return 0.0 };
        let mut worst = f64::INFINITY;
        let mut start = first.0;
        while start + window_us <= last.0 {
            let from = ends.partition_point(|e| e.0 < start);
            let to = ends.partition_point(|e| e.0 < start + window_us);
            worst = worst.min((to - from) as f64 * 1e6 / window_us as f64);
            start += window_us / 10;
        }
        worst
    }
}
