//! `explain`: why a volume is slow, or not cached, in words, from what the daemon has counted.
//!
//! Pure: two answers in, sentences out, the weightiest first. Each says what is the case, by which
//! number, and what could be done. Rates are those of the last minute, so that what is over is not
//! held against anybody.

use super::super::api::model::{VolumeStats, VolumeStatus};
use super::super::exit::Exit;
use super::args::VolumeVerbArgs;
use super::status::{duration, rate};
use super::{Done, client, say_json};
use crate::units::Bytes;

/// The window whose rates count.
const WINDOW_S: u32 = 60;
/// Share of bytes read from the cache below which reads are said to be slow.
const HITS_FEW: f64 = 0.7;
/// Share of writes that had to wait above which they are said to be held back.
const WAITS_MANY: f64 = 0.01;

/// What one write in a hundred may take before it is mentioned: a pmem write is a hundredth of it.
const WRITE_SLOW_US: f64 = 2_000.0;
/// What one miss in a hundred may take: a disk with heads needs as much.
const MISS_SLOW_US: f64 = 50_000.0;
/// What one flush of the disk in a hundred may take.
const FLUSH_SLOW_US: f64 = 100_000.0;

/// `explain`.
pub(super) fn explain(args: &VolumeVerbArgs) -> Done {
    let client = client(args.online.control.as_ref())?;
    let status: VolumeStatus = client.ask("GET", &format!("/v1/volumes/{}", args.volume), None)?;
    let stats: VolumeStats = client.ask("GET", &format!("/v1/volumes/{}/stats", args.volume), None)?;
    let sentences = sentences(&status, &stats);
    match args.online.json {
        true => say_json(&serde_json::json!({ "volume": args.volume.as_str(), "explanation": sentences })),
        false => super::super::announce::print(&(sentences.join("\n") + "\n")),
    }
    Ok(Exit::Done)
}

fn sentences(status: &VolumeStatus, stats: &VolumeStats) -> Vec<String> {
    let mut said = Vec::new();
    let summary = &status.summary;
    if summary.state != "ok" {
        said.push(format!("The volume is {}: {}. To do: {}.", summary.state, status.cause, status.advice));
    }
    if !summary.connected {
        said.push("No VM is connected, so nothing is asked of it.".into());
    }
    about_writes(&mut said, status, stats);
    about_reads(&mut said, status, stats);
    about_mode(&mut said, status);
    about_latency(&mut said, stats);
    if said.is_empty() {
        said.push("Nothing holds it up: reads come from the cache and writes go into it.".into());
    }
    said
}

fn about_writes(said: &mut Vec<String>, status: &VolumeStatus, stats: &VolumeStats) {
    let count = |name: &str| stats.counters.get(name).copied().unwrap_or(0);
    let dirty = Bytes(status.summary.dirty_bytes);
    if status.is_paced {
        let to_disk = rate(of_window(stats, |rates| rates.writeback_bytes_per_s));
        said.push(format!(
            "Writes are slowed down to the pace of the backing disk, which takes {to_disk} a second: {dirty} are \
             dirty, and no more fits. A larger cache lasts longer, order relaxed lets the disk be faster, and a \
             faster disk helps for good."
        ));
    }
    let (writes, waits) = (count("writes"), count("pace_waits") + count("space_waits"));
    if !status.is_paced && writes > 0 && waits as f64 / writes as f64 > WAITS_MANY {
        said.push(format!(
            "Of {writes} writes counted, {waits} have waited for space: the cache was filled faster than the disk \
             could take it."
        ));
    }
    let errors = count("writeback_errors");
    if errors > 0 && status.summary.state == "ok" {
        said.push(format!("Write-back has failed {errors} times and has recovered since."));
    }
}

fn about_reads(said: &mut Vec<String>, status: &VolumeStatus, stats: &VolumeStats) {
    let count = |name: &str| stats.counters.get(name).copied().unwrap_or(0);
    let window = stats.rates.iter().find(|rates| rates.window_s == WINDOW_S);
    let Some(ratio) = window.and_then(|rates| rates.read_hit_ratio) else { return };
    if ratio >= HITS_FEW || status.summary.mode == "passthrough" {
        return;
    }
    let percent = ratio * 100.0;
    let (cached, size) = (Bytes(status.summary.cached_bytes), Bytes(status.summary.size_bytes));
    let mut sentence =
        format!("Only {percent:.0} % of what was read lately was cached, the rest came from the disk. ");
    let (evicted, filled) = (count("evicted_sectors"), count("fill_sectors"));
    sentence += &if status.summary.mode == "readonly" {
        "Mode readonly adds nothing to the cache.".into()
    } else if evicted > 0 && evicted * 2 > filled {
        format!(
            "{cached} of {size} are cached, and {} have been evicted to make room: what is used does not fit.",
            Bytes(evicted * 512)
        )
    } else if count("fills_dropped") > 0 && count("fills_dropped") > count("read_misses") / 2 {
        format!("{} fills were dropped for want of space.", count("fills_dropped"))
    } else {
        format!("{cached} of {size} are cached so far: what is read for the first time is always the disk's.")
    };
    said.push(sentence);
}

fn about_mode(said: &mut Vec<String>, status: &VolumeStatus) {
    let sentence = match status.summary.mode.as_str() {
        "writethrough" | "writearound" | "readonly" => {
            "its writes are done when the backing disk has them: they are as slow as that is"
        }
        "passthrough" => "the cache is neither read nor filled: everything is as slow as the backing disk",
        _ => return,
    };
    let mode = &status.summary.mode;
    said.push(format!("It is in mode {mode}: {sentence}. `set --cache-mode writeback` changes that."));
}

/// Names the stage that takes the time, where something takes longer than a guest should notice.
fn about_latency(said: &mut Vec<String>, stats: &VolumeStats) {
    let of = |stage: &str| stats.latencies.iter().find(|row| row.stage == stage && row.window_s == WINDOW_S);
    let long = |stage: &str, bound_us: f64| of(stage).filter(|row| row.p99_us > bound_us);
    if let (Some(write), Some(wait)) = (long("write", WRITE_SLOW_US), of("write_wait")) {
        let (total, waited) = (duration(write.p99_us), duration(wait.p99_us));
        let share = if wait.p99_us * 2.0 > write.p99_us {
            "most of it waiting for space or for the pace of the disk"
        } else {
            "most of it in the cache's memory: a slow medium, or too few cores"
        };
        said.push(format!("One write in a hundred takes longer than {total}, {share} (waiting: {waited})."));
    }
    if let (Some(read), Some(disk)) = (long("read_miss", MISS_SLOW_US), of("disk_read")) {
        let (total, disk) = (duration(read.p99_us), duration(disk.p99_us));
        said.push(format!(
            "One read in a hundred that is not cached takes longer than {total}; the disk itself {disk}."
        ));
    }
    if let Some(flush) = long("writeback_flush", FLUSH_SLOW_US) {
        said.push(format!(
            "Flushes of the backing disk take up to {}: they bound how fast write-back is in order strict.",
            duration(flush.p99_us)
        ));
    }
}

fn of_window(stats: &VolumeStats, of: impl Fn(&super::super::api::model::Rates) -> f64) -> f64 {
    stats.rates.iter().find(|rates| rates.window_s == WINDOW_S).map_or(0.0, of)
}
