//! `status`, `list` and `stats` in words and columns.

use std::fmt::Write;

use super::super::api::model::{
    Checkpoint, DaemonStatus, DmPcacheStatus, Latency, Rates, ShareSettings, VolumeStats, VolumeStatus,
    VolumeSummary, Volumes,
};
use super::args::{OnlineArgs, StatusArgs};
use super::{Done, answer};
use crate::units::Bytes;

/// The stages of which a status tells the latency: what a guest sees. `stats` has them all.
const IN_STATUS: [&str; 5] = ["read_hit", "read_miss", "write", "write_around", "flush"];

/// `status`.
pub(super) fn status(args: &StatusArgs) -> Done {
    match &args.volume {
        None => answer(&args.online, "GET", "/v1/status", daemon_text),
        Some(volume) => answer(&args.online, "GET", &format!("/v1/volumes/{volume}"), volume_text),
    }
}

/// `list`.
pub(super) fn list(args: &OnlineArgs) -> Done {
    answer(args, "GET", "/v1/volumes", |volumes: &Volumes| table(&volumes.volumes))
}

fn daemon_text(status: &DaemonStatus) -> String {
    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").expect("a String takes any text");
    let DaemonStatus { version, pid, uptime_s, config_file, .. } = status;
    let file = config_file.as_ref().map_or(String::new(), |file| format!(", configured by {file}"));
    line(format!("daemon  version {version}, process {pid}, serving for {uptime_s} s{file}"));
    for cache in &status.caches {
        let failed = if cache.has_failed { ", FAILED: takes no more writes" } else { "" };
        let (size, segment) = (Bytes(cache.size_bytes), Bytes(cache.segment_size_bytes));
        line(format!("cache   {}: {} {size}, {}{failed}", cache.name, cache.path, cache.media_class));
        for member in cache.members.iter().skip(1) {
            let (size, base) = (Bytes(member.size_bytes), Bytes(member.base_bytes));
            line(format!("        and {}: {size} from {base} on", member.path));
        }
        let (total, free, used, bad) =
            (cache.segments_total, cache.segments_free, cache.segments_used, cache.segments_bad);
        line(format!("        {total} segments of {segment}: {used} used, {free} free, {bad} bad"));
    }
    out + &table(&status.volumes)
}

/// Volumes in columns.
fn table(volumes: &[VolumeSummary]) -> String {
    let head = ["VOLUME", "CACHE", "STATE", "VM", "MODE", "ORDER", "SIZE", "CACHED", "DIRTY"];
    let mut rows = vec![head.map(str::to_owned)];
    for volume in volumes {
        let dirty = match (volume.attached, volume.dirty_bytes) {
            (false, 0) => "no".into(),
            (false, _) => "yes".into(),
            (true, dirty) => Bytes(dirty).to_string(),
        };
        let cached = if volume.attached { Bytes(volume.cached_bytes).to_string() } else { "-".into() };
        rows.push([
            volume.name.clone(),
            volume.cache.clone(),
            volume.state.clone(),
            if volume.connected { "connected" } else { "-" }.into(),
            volume.mode.clone(),
            volume.order.clone(),
            Bytes(volume.size_bytes).to_string(),
            cached,
            dirty,
        ]);
    }
    columns(&rows)
}

/// Rows of words, each column as wide as its widest.
pub(super) fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] =
        std::array::from_fn(|at| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0));
    let mut out = String::new();
    for row in rows {
        let padded = row.iter().zip(widths).map(|(word, width)| format!("{word:width$}"));
        out.push_str(padded.collect::<Vec<_>>().join("  ").trim_end());
        out.push('\n');
    }
    out
}

fn volume_text(status: &VolumeStatus) -> String {
    let (summary, settings) = (&status.summary, &status.settings);
    let mut rows: Vec<[String; 2]> = Vec::new();
    let mut row = |key: &str, value: String| rows.push([key.into(), value]);
    row("volume", format!("{} on cache {}", summary.name, summary.cache));
    row("state", format!("{} for {} s", summary.state, status.state_for_s));
    if !status.cause.is_empty() {
        row("cause", status.cause.clone());
        row("do", status.advice.clone());
    }
    if let Some(retry) = status.retry_in_ms {
        row("write-back", format!("failed {} times, tries again in {retry} ms", status.writeback_failures));
    }
    row("VM", if summary.connected { "connected" } else { "not connected" }.into());
    row("socket", settings.socket.clone().unwrap_or_else(|| "inherited".into()));
    row("backing", format!("{}, {}", settings.backing, Bytes(summary.size_bytes)));
    let changing = if status.is_changing_order { ", which is being changed" } else { "" };
    row("mode", format!("{}, order {}{changing}", summary.mode, summary.order));
    if let Some(group) = &settings.group {
        row("group", group.clone());
    }
    row("cached", Bytes(summary.cached_bytes).to_string());
    row("dirty", format!("{}, the oldest for {} ms", Bytes(summary.dirty_bytes), status.dirty_age_ms));
    row("lag", format!("{} ms, {}", status.lag_ms, at_most(settings.max_lag_s, &|s| format!("{s} s"))));
    row("max dirty", at_most(settings.max_dirty_bytes, &|bytes| Bytes(bytes).to_string()));
    row("cache share", share_text(&settings.share));
    row("limits", limits_text(&settings.share));
    let timeout = match settings.backing_timeout_s {
        0 => "an answer may take for ever".into(),
        seconds => format!("no answer for {seconds} s is one"),
    };
    row("disk error", format!("{}, {timeout}", settings.on_backing_error));
    if let Some(checkpoint) = &status.checkpoint {
        row("checkpoint", checkpoint_text(checkpoint));
    }
    for latency in status.latencies.iter().filter(|latency| IN_STATUS.contains(&latency.stage.as_str())) {
        let [p50, p99, p999] = [latency.p50_us, latency.p99_us, latency.p999_us].map(duration);
        row(&latency.stage, format!("p50 {p50}, p99 {p99}, p99.9 {p999}"));
    }
    row("paced", if status.is_paced { "yes: writes keep the pace of the disk" } else { "no" }.into());
    if status.lost_sectors > 0 {
        row("lost", format!("{} sectors answer with an error until overwritten", status.lost_sectors));
    }
    let VolumeStatusFlags(flags) = VolumeStatusFlags::of(status);
    row("queues", format!("{} of up to {} entries", settings.queues, settings.queue_size));
    row("options", flags);
    row("serial", settings.serial.clone());
    row("dm-pcache", dm_line(&status.dm_pcache));
    columns(&rows)
}

fn at_most(bound: u64, text: &dyn Fn(u64) -> String) -> String {
    if bound == 0 { "no bound".into() } else { format!("at most {}", text(bound)) }
}

fn share_text(share: &ShareSettings) -> String {
    let least = match share.cache_min_bytes {
        0 => String::new(),
        bytes => format!(", at least {}", Bytes(bytes)),
    };
    let most = match share.cache_max_bytes {
        0 => String::new(),
        bytes => format!(", at most {}", Bytes(bytes)),
    };
    let gc = if share.gc_percent > 90 { String::new() } else { format!(", gc_percent {}", share.gc_percent) };
    let (held, entitled) = (Bytes(share.held_bytes), Bytes(share.share_bytes));
    format!("holds {held} of {entitled}{least}{most}, weight {}{gc}", share.weight)
}

fn limits_text(share: &ShareSettings) -> String {
    let iops = [("", share.iops), (" read", share.read_iops), (" write", share.write_iops)];
    let bytes =
        [("", share.bytes_per_s), (" read", share.read_bytes_per_s), (" write", share.write_bytes_per_s)];
    let iops = iops.into_iter().filter(|(_, n)| *n > 0).map(|(what, n)| format!("{n}{what} requests/s"));
    let bytes = bytes.into_iter().filter(|(_, n)| *n > 0).map(|(what, n)| format!("{}{what}/s", Bytes(n)));
    let all: Vec<String> = iops.chain(bytes).collect();
    if all.is_empty() {
        return "none".into();
    }
    format!("{}, {} ms saved up", all.join(", "), share.burst_ms)
}

fn checkpoint_text(checkpoint: &Checkpoint) -> String {
    match checkpoint.left_ms {
        Some(left) => format!("held, ends by itself in {} s (job {})", left.div_ceil(1000), checkpoint.job),
        None => format!("on the way to it (job {})", checkpoint.job),
    }
}

struct VolumeStatusFlags(String);

impl VolumeStatusFlags {
    fn of(status: &VolumeStatus) -> Self {
        let settings = &status.settings;
        let mut words = vec![format!("block_size={}", settings.block_size_bytes)];
        words.push(format!("discard={}", settings.discard));
        words.push(format!("poll={} poll_us={}", settings.poll, settings.poll_us));
        words.push(format!("queue_threads={} cpus={}", settings.queue_threads, settings.cpus));
        words.push(format!("data_crc={}", settings.data_crc));
        words.push(format!("read_only={}", settings.read_only));
        Self(words.join(" "))
    }
}

/// The nine fields as `dmsetup status` prints them.
fn dm_line(dm: &DmPcacheStatus) -> String {
    let place = |place: &Option<String>| place.clone().unwrap_or_else(|| "-".into());
    format!(
        "{} {} {} {} {} {} {} {} {}",
        dm.sb_flags,
        dm.seg_total,
        dm.cache_segs,
        dm.segs_used,
        dm.gc_percent,
        dm.cache_flags,
        place(&dm.key_head),
        place(&dm.dirty_tail),
        place(&dm.key_tail)
    )
}

/// Counters and rates in columns.
pub(super) fn stats_text(stats: &VolumeStats) -> String {
    let mut out = format!("volume {}: counted for {} s\n", stats.volume, stats.since_s);
    let head = ["WINDOW", "READS/S", "WRITES/S", "READ/S", "WRITTEN/S", "HITS", "WRITE-BACK/S"];
    let mut rows = vec![head.map(str::to_owned)];
    for Rates {
        window_s,
        reads_per_s,
        writes_per_s,
        read_bytes_per_s,
        write_bytes_per_s,
        read_hit_ratio,
        writeback_bytes_per_s,
        ..
    } in &stats.rates
    {
        rows.push([
            format!("{window_s} s"),
            format!("{reads_per_s:.0}"),
            format!("{writes_per_s:.0}"),
            rate(*read_bytes_per_s),
            rate(*write_bytes_per_s),
            read_hit_ratio.map_or("-".into(), |ratio| format!("{:.1} %", ratio * 100.0)),
            rate(*writeback_bytes_per_s),
        ]);
    }
    out += &columns(&rows);
    out += &latency_table(&stats.latencies);
    let all = stats.counters.iter().chain(&stats.gauges);
    out + &columns(&all.map(|(name, value)| [name.clone(), value.to_string()]).collect::<Vec<_>>())
}

/// Latencies in columns: since the counters began, and over the windows.
fn latency_table(latencies: &[Latency]) -> String {
    if latencies.is_empty() {
        return String::new();
    }
    let head = ["LATENCY", "WINDOW", "SAMPLES", "MEAN", "P50", "P90", "P99", "P99.9", "BELOW"];
    let mut rows = vec![head.map(str::to_owned)];
    for Latency { stage, window_s, samples, mean_us, p50_us, p90_us, p99_us, p999_us, max_us } in latencies {
        let window = if *window_s == 0 { "all".into() } else { format!("{window_s} s") };
        let times = [mean_us, p50_us, p90_us, p99_us, p999_us, max_us].map(|us| duration(*us));
        let [mean, p50, p90, p99, p999, max] = times;
        rows.push([stage.clone(), window, samples.to_string(), mean, p50, p90, p99, p999, max]);
    }
    columns(&rows)
}

/// Microseconds, as they are read best.
pub(super) fn duration(us: f64) -> String {
    match us {
        short if short < 100.0 => format!("{short:.1} us"),
        medium if medium < 10_000.0 => format!("{medium:.0} us"),
        long if long < 1e6 => format!("{:.0} ms", long / 1e3),
        very_long => format!("{:.1} s", very_long / 1e6),
    }
}

/// Bytes a second, as they are read best.
pub(super) fn rate(bytes_per_s: f64) -> String {
    match bytes_per_s {
        small if small < 1024.0 => format!("{small:.0} B"),
        medium if medium < 1024.0 * 1024.0 => format!("{:.1} KiB", medium / 1024.0),
        large => format!("{:.1} MiB", large / f64::from(1 << 20)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_word_and_lines_end_with_it() {
        let rows = [["A", "LONG"], ["longer", "x"]].map(|row| row.map(str::to_owned));
        assert_eq!(columns(&rows), "A       LONG\nlonger  x\n");
    }

    #[test]
    fn a_duration_has_the_unit_that_fits() {
        for (us, text) in
            [(0.45, "0.5 us"), (99.0, "99.0 us"), (1500.0, "1500 us"), (25e3, "25 ms"), (2.5e6, "2.5 s")]
        {
            assert_eq!(duration(us), text);
        }
    }

    #[test]
    fn a_rate_has_the_unit_that_fits() {
        let rows = [(0.0, "0 B"), (1023.0, "1023 B"), (2048.0, "2.0 KiB"), (3145728.0, "3.0 MiB")];
        for (bytes, text) in rows {
            assert_eq!(rate(bytes), text);
        }
    }
}
