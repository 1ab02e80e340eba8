//! What was measured, and what it comes to: medians, spreads, ratios, and which bars are met.

use std::collections::BTreeMap;

use crate::driver::Run;

/// One round of one server under one workload.
#[derive(Clone, Debug)]
pub struct Sample {
    pub rate: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
    pub cpu_us: f64,
}

impl Sample {
    pub fn new(run: &Run, cpu: std::time::Duration) -> Self {
        let mut sorted = run.latencies.clone();
        sorted.sort_unstable();
        let at = |share: f64| f64::from(sorted[(share * (sorted.len() - 1) as f64) as usize]) / 1e3;
        let requests = run.requests as f64;
        Self {
            rate: requests / run.elapsed.as_secs_f64(),
            p50_us: at(0.5),
            p99_us: at(0.99),
            p999_us: at(0.999),
            cpu_us: cpu.as_secs_f64() * 1e6 / requests,
        }
    }
}

/// Least, median, most.
pub fn spread(values: impl Iterator<Item = f64>) -> (f64, f64, f64) {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    (values[0], values[values.len() / 2], values[values.len() - 1])
}

/// All samples of a stage, by workload and server, in the order of the rounds.
#[derive(Default)]
pub struct Table {
    order: Vec<(String, String)>,
    samples: BTreeMap<(String, String), Vec<Sample>>,
}

impl Table {
    pub fn add(&mut self, work: &str, server: &str, sample: Sample) {
        let key = (work.to_owned(), server.to_owned());
        if !self.samples.contains_key(&key) {
            self.order.push(key.clone());
        }
        self.samples.entry(key).or_default().push(sample);
    }

    pub fn get(&self, work: &str, server: &str) -> Option<&[Sample]> {
        self.samples.get(&(work.to_owned(), server.to_owned())).map(Vec::as_slice)
    }

    /// Who was measured under a workload, in order.
    pub fn servers(&self, work: &str) -> Vec<&str> {
        self.order.iter().filter(|(w, _)| w == work).map(|(_, server)| server.as_str()).collect()
    }

    /// Ratios of two servers' figures, round by round: least, median, most.
    pub fn ratio(
        &self,
        work: &str,
        ours: &str,
        theirs: &str,
        pick: impl Fn(&Sample) -> f64,
    ) -> Option<(f64, f64, f64)> {
        let (ours, theirs) = (self.get(work, ours)?, self.get(work, theirs)?);
        Some(spread(ours.iter().zip(theirs).map(|(a, b)| pick(a) / pick(b))))
    }

    pub fn print(&self, title: &str) {
        println!("\n{title}");
        println!(
            "{:<34} {:<12} {:>9} {:>19} {:>8} {:>8} {:>8} {:>8}",
            "workload", "server", "a second", "(least, most)", "p50 µs", "p99 µs", "p99.9", "cpu µs"
        );
        let mut before = "";
        for (work, server) in &self.order {
            let samples = &self.samples[&(work.clone(), server.clone())];
            let (low, rate, high) = spread(samples.iter().map(|s| s.rate));
            let mid = |pick: fn(&Sample) -> f64| spread(samples.iter().map(pick)).1;
            println!(
                "{:<34} {server:<12} {rate:>9.0} {:>19} {:>8.1} {:>8.1} {:>8.1} {:>8.2}",
                if work == before { "" } else { work },
                format!("({low:.0}, {high:.0})"),
                mid(|s| s.p50_us),
                mid(|s| s.p99_us),
                mid(|s| s.p999_us),
                mid(|s| s.cpu_us),
            );
            before = work;
        }
    }
}

/// One demand and what became of it.
pub struct Bar {
    pub what: String,
    pub found: Option<(f64, f64, f64)>,
    pub wanted: f64,
    /// Whether less is better.
    pub is_limit: bool,
}

impl Bar {
    pub fn print(&self) {
        let Some((low, found, high)) = self.found else {
            return println!("-       {}: not measured", self.what);
        };
        let is_met = if self.is_limit { found <= self.wanted } else { found >= self.wanted };
        println!(
            "{:<7} {}: {found:.2} ({low:.2} to {high:.2}), {} {:.2}",
            if is_met { "met" } else { "missed" },
            self.what,
            if self.is_limit { "at most" } else { "at least" },
            self.wanted
        );
    }
}
