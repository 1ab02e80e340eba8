//! What Prometheus reads (text exposition format 0.0.4), made of the engine's own counters.
//!
//! Names: `pcache_<what>_<thing>_<unit>`; what only grows ends in `_total`. Sectors are told as
//! bytes: Prometheus' base units. Every counter that the engine has is here, by itself: nobody can
//! forget one. Written by hand rather than by a client library, since those count for themselves,
//! with an atomic of their own beside the one that is there.

use std::fmt::Write;
use std::sync::Arc;

use super::daemon::windows::is_gauge;
use super::daemon::{Daemon, OpenCache, Served};
use crate::cache::latency::{Stage, bucket_end_ns};
use crate::cache::{Counters, VolumeState};

/// States of a volume, for the series that has one value per state.
const STATES: [VolumeState; 5] = [
    VolumeState::Ok,
    VolumeState::Degraded,
    VolumeState::Stalled,
    VolumeState::LostData,
    VolumeState::Failed,
];

/// A metric of a volume that is a counter of the engine.
#[derive(Clone, PartialEq, Eq, Debug)]
struct OfEngine {
    name: String,
    help: String,
    is_gauge: bool,
    scale: u64,
}

impl OfEngine {
    fn new(field: &str, description: &str) -> Self {
        let is_gauge = is_gauge(field);
        let (stem, scale) = match field.strip_suffix("_sectors") {
            Some(stem) => (format!("{stem}_bytes"), 512),
            None => (field.to_owned(), 1),
        };
        let end = if is_gauge { "" } else { "_total" };
        let name = format!("pcache_volume_{stem}{end}");
        let help = description.trim_end_matches('.').replace("Sectors", "Bytes").replace("sectors", "bytes");
        Self { name, help, is_gauge, scale }
    }
}

/// Everything, as it is now.
pub fn text(daemon: &Daemon) -> String {
    let mut page = Page(String::new());
    let status = daemon.view();
    page.family("pcache_info", "gauge", "Version of the program");
    page.sample("pcache_info", &[("version", &status.version)], 1.0);
    page.family("pcache_uptime_seconds", "gauge", "For how long the daemon has been serving");
    page.sample("pcache_uptime_seconds", &[], status.uptime_s as f64);
    caches(&mut page, daemon.caches());
    volumes(&mut page, daemon);
    page.0
}

fn caches(page: &mut Page, caches: &[OpenCache]) {
    page.family("pcache_cache_segments", "gauge", "Segments of the cache by what they are used for");
    for open in caches {
        let (name, space) = (open.config.name.as_str(), open.cache.space());
        for (kind, count) in [("free", space.free), ("used", space.used), ("bad", space.bad)] {
            page.sample("pcache_cache_segments", &[("cache", name), ("use", kind)], count as f64);
        }
    }
    let help = "Bytes of one segment of the cache";
    page.family("pcache_cache_segment_size_bytes", "gauge", help);
    for open in caches {
        let size = open.cache.geometry().segment_size;
        let labels = [("cache", open.config.name.as_str())];
        page.sample("pcache_cache_segment_size_bytes", &labels, size.into());
    }
    let help = "Whether the cache could not be made durable once and takes no more writes";
    page.family("pcache_cache_failed", "gauge", help);
    for open in caches {
        let failed = f64::from(u8::from(open.cache.has_failed()));
        page.sample("pcache_cache_failed", &[("cache", open.config.name.as_str())], failed);
    }
    page.family("pcache_cache_media_info", "gauge", "Media class of the cache: what survives what");
    for open in caches {
        use crate::pmem::Pmem;
        let class = open.pmem.class().to_string();
        let labels = [("cache", open.config.name.as_str()), ("class", class.as_str())];
        page.sample("pcache_cache_media_info", &labels, 1.0);
    }
}

fn volumes(page: &mut Page, daemon: &Daemon) {
    let served = daemon.served();
    let cache_of = |served: &Served| daemon.caches()[served.config.cache].config.name.as_str();
    let counted: Vec<Counters> = served.iter().map(|served| served.volume.counters()).collect();
    let none = Counters::default();
    let fields = none.fields().into_iter().zip(Counters::descriptions()).enumerate();
    // Free segments are the cache's.
    for (at, ((field, _), description)) in fields.filter(|(_, ((field, _), _))| *field != "free_segments") {
        let metric = OfEngine::new(field, description);
        page.family(&metric.name, if metric.is_gauge { "gauge" } else { "counter" }, &metric.help);
        for (served, counters) in served.iter().zip(&counted) {
            let value = counters.fields()[at].1 * metric.scale;
            let labels = [("cache", cache_of(served)), ("volume", served.config.name.as_str())];
            page.sample(&metric.name, &labels, value as f64);
        }
    }
    page.family("pcache_volume_state", "gauge", "1 for the state the volume is in, 0 for the others");
    for served in &served {
        let state = served.volume.health().state;
        for known in STATES {
            let text = known.to_string();
            let labels = [
                ("cache", cache_of(served)),
                ("volume", served.config.name.as_str()),
                ("state", text.as_str()),
            ];
            page.sample("pcache_volume_state", &labels, f64::from(u8::from(known == state)));
        }
    }
    latencies(page, &served, &cache_of);
    type Look = fn(&Served) -> f64;
    let looks: [(&str, &str, Look); 4] = [
        ("size_bytes", "Size of the disk that the VM sees", |served| {
            (served.volume.disk_config().sectors * 512) as f64
        }),
        ("connected", "Whether a VM is connected", |served| f64::from(u8::from(served.is_connected()))),
        ("paced", "Whether writes are slowed down to the pace of the disk", |served| {
            f64::from(u8::from(served.volume.is_paced()))
        }),
        (
            "dirty_age_seconds",
            "For how long there has been dirty data that write-back has not taken",
            |served| served.volume.dirty_age_ms() as f64 / 1000.0,
        ),
    ];
    for (what, help, look) in looks {
        let name = format!("pcache_volume_{what}");
        page.family(&name, "gauge", help);
        for served in &served {
            let labels = [("cache", cache_of(served)), ("volume", served.config.name.as_str())];
            page.sample(&name, &labels, look(served));
        }
    }
}

/// Bounds of the buckets told to Prometheus are powers of two: every `METRIC_SUBS`th of the engine's.
const METRIC_SUBS: usize = 8;

/// One histogram with a series per stage, of stages that have a sample. Sampled: the counts are not those
/// of the requests, which have counters of their own.
fn latencies<'a>(page: &mut Page, served: &'a [Arc<Served>], cache_of: &dyn Fn(&'a Served) -> &'a str) {
    let name = "pcache_volume_stage_seconds";
    page.family(name, "histogram", "How long a stage of requests takes, of a sample of them");
    for served in served {
        let (cache, volume) = (cache_of(served), served.config.name.as_str());
        for (stage, histogram) in Stage::ALL.iter().zip(served.volume.latencies()) {
            let samples = histogram.samples();
            if samples == 0 {
                continue;
            }
            let labels = format!("cache=\"{cache}\",volume=\"{volume}\",stage=\"{}\"", stage.name());
            let mut below = 0;
            for (bucket, count) in histogram.counts.iter().enumerate() {
                below += count;
                // From the first microsecond on: below nothing is told apart by anybody.
                if bucket % METRIC_SUBS == 0 && bucket >= 2 * METRIC_SUBS {
                    let bound = bucket_end_ns(bucket) as f64 / 1e9;
                    page.line(format_args!("{name}_bucket{{{labels},le=\"{bound}\"}} {below}"));
                }
            }
            page.line(format_args!("{name}_bucket{{{labels},le=\"+Inf\"}} {samples}"));
            let seconds = histogram.sum_ns as f64 / 1e9;
            page.line(format_args!("{name}_sum{{{labels}}} {seconds}\n{name}_count{{{labels}}} {samples}"));
        }
    }
}

/// A page of metrics. Names, labels and helps are ours and names of volumes are plain: nothing needs
/// to be escaped.
struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}"));
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}=\"{value}\"")).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        self.line(format_args!("{name}{labels} {value}"));
    }

    fn line(&mut self, text: std::fmt::Arguments<'_>) {
        writeln!(self.0, "{text}").expect("a String takes any text");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_of_the_engine_has_a_name_a_unit_and_a_help() {
        let counters = Counters::default();
        let (fields, helps) = (counters.fields(), Counters::descriptions());
        assert_eq!(fields.len(), helps.len());
        let mut names = std::collections::HashSet::new();
        for ((field, _), help) in fields.into_iter().zip(helps) {
            let metric = OfEngine::new(field, help);
            assert!(names.insert(metric.name.clone()), "{} twice", metric.name);
            assert_eq!(metric.name.ends_with("_total"), !metric.is_gauge, "{}", metric.name);
            assert!(!metric.name.contains("sector"), "{}: Prometheus counts bytes", metric.name);
            assert!(metric.help.len() > 8 && !metric.help.contains('\n'), "{}: {}", metric.name, metric.help);
        }
        let hits = OfEngine::new("read_hit_sectors", "Sectors read from the cache.");
        assert_eq!(hits.name, "pcache_volume_read_hit_bytes_total");
        assert_eq!((hits.help.as_str(), hits.scale), ("Bytes read from the cache", 512));
    }
}
