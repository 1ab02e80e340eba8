//! `top`: all volumes, once a second. On a terminal each view replaces the one before; elsewhere they
//! follow each other. Drawn with two escape sequences rather than a library: there is one table.

use std::collections::HashMap;
use std::io::{self, IsTerminal, Read};
use std::time::{Duration, Instant};

use super::super::announce::print;
use super::super::api::model::{DaemonStatus, Stats, VolumeStats};
use super::super::exit::Exit;
use super::super::sys;
use super::args::TopArgs;
use super::status::{columns, duration, rate};
use super::{Done, client, say_json};
use crate::units::Bytes;

/// Home, and nothing below what is drawn.
const BEGIN: &str = "\x1b[H\x1b[2J";

/// `top`.
pub(super) fn top(args: &TopArgs) -> Done {
    let client = client(args.online.control.as_ref())?;
    let mut signals = sys::signal_descriptor(&[libc::SIGINT, libc::SIGTERM])?;
    let is_terminal = io::stdout().is_terminal();
    let mut last: Option<(Instant, Stats)> = None;
    let mut views = 0;
    loop {
        let (status, stats): (DaemonStatus, Stats) =
            (client.ask("GET", "/v1/status", None)?, client.ask("GET", "/v1/stats", None)?);
        let now = Instant::now();
        if let Some((then, before)) = &last {
            match args.online.json {
                true => say_json(&serde_json::to_value(&stats).expect("an answer is JSON")),
                false => {
                    let begin = if is_terminal { BEGIN } else { "" };
                    print(&format!("{begin}{}", view(&status, before, &stats, now - *then)));
                }
            }
            views += 1;
            if args.count.is_some_and(|count| views >= count) {
                return Ok(Exit::Done);
            }
        }
        last = Some((now, stats));
        // The first view needs two looks.
        let wait = if views == 0 { args.interval.min(Duration::from_secs(1)) } else { args.interval };
        let until = now + wait;
        while Instant::now() < until {
            std::thread::sleep(
                Duration::from_millis(20).min(until.saturating_duration_since(Instant::now())),
            );
            if signals.read(&mut [0; size_of::<libc::signalfd_siginfo>()]).is_ok() {
                return Ok(Exit::Done);
            }
        }
    }
}

fn view(status: &DaemonStatus, before: &Stats, stats: &Stats, elapsed: Duration) -> String {
    let mut out = String::new();
    for cache in &status.caches {
        let used = cache.segments_used * 100 / cache.segments_total.max(1);
        out += &format!("{}: {} {}, {used} % used\n", cache.name, Bytes(cache.size_bytes), cache.media_class);
    }
    let head = [
        "VOLUME",
        "STATE",
        "R/S",
        "W/S",
        "READ/S",
        "WRITTEN/S",
        "HITS",
        "READ P99",
        "WRITE P99",
        "DIRTY",
        "LAG",
        "TO DISK/S",
        "ERRORS",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    let earlier: HashMap<&str, &VolumeStats> =
        before.volumes.iter().map(|volume| (volume.volume.as_str(), volume)).collect();
    for now in &stats.volumes {
        let state = status.volumes.iter().find(|volume| volume.name == now.volume);
        let Some(then) = earlier.get(now.volume.as_str()) else { continue };
        let grown = |name: &str| {
            let of = |stats: &VolumeStats| stats.counters.get(name).copied().unwrap_or(0);
            // Somebody may have reset them in between.
            of(now).saturating_sub(of(then)) as f64
        };
        let per_s = |name: &str| grown(name) / elapsed.as_secs_f64().max(1e-3);
        let (hits, misses) = (grown("read_hit_sectors"), grown("read_miss_sectors"));
        let ratio =
            if hits + misses > 0.0 { format!("{:.1} %", hits * 100.0 / (hits + misses)) } else { "-".into() };
        rows.push([
            now.volume.clone(),
            state.map_or_else(String::new, |volume| volume.state.clone()),
            format!("{:.0}", per_s("reads")),
            format!("{:.0}", per_s("writes")),
            rate((hits + misses) * 512.0 / elapsed.as_secs_f64().max(1e-3)),
            rate(per_s("write_sectors") * 512.0),
            ratio,
            p99(now, &["read_miss", "read_hit"]),
            p99(now, &["write", "write_around"]),
            Bytes(now.gauges.get("dirty_bytes").copied().unwrap_or(0)).to_string(),
            duration(now.gauges.get("lag_ms").copied().unwrap_or(0) as f64 * 1000.0),
            rate(per_s("written_back_sectors") * 512.0),
            format!("{:.0}", grown("errors")),
        ]);
    }
    out + &columns(&rows)
}

/// Window of the latencies shown, in seconds: the shortest there is.
const LATENCY_WINDOW_S: u32 = 10;

/// The 99th percentile of the first of `stages` that has any sample: the slower is named first.
fn p99(stats: &VolumeStats, stages: &[&str]) -> String {
    let of = |stage: &&str| {
        stats.latencies.iter().find(|row| row.stage == **stage && row.window_s == LATENCY_WINDOW_S)
    };
    stages.iter().find_map(of).map_or("-".into(), |row| duration(row.p99_us))
}
