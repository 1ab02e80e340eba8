//! What the control API says and hears, as values: one struct per JSON object.
//!
//! These structs are the API. `docs/openapi.json` is made of them, and a test holds the two together;
//! the verbs read their answers with them. Units are in the names. Fields may be added within `/v1`;
//! none is renamed, removed or given another meaning.

mod requests;

use std::collections::BTreeMap;

#[cfg(test)]
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::requests::{
    AttachRequest, CacheResizeRequest, Checkpoint, CheckpointRequest, ResizeRequest, SetRequest,
};

/// The daemon, its caches, and its volumes in short.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct DaemonStatus {
    /// Version of the program.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// For how long it has been serving.
    pub uptime_s: u64,
    /// The configuration file it was started with, if any.
    pub config_file: Option<String>,
    /// Its caches.
    pub caches: Vec<CacheStatus>,
    /// All volumes on these caches, served or not.
    pub volumes: Vec<VolumeSummary>,
}

/// A cache.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct CacheStatus {
    /// What volumes call it.
    pub name: String,
    /// Device or file; of several the first.
    pub path: String,
    /// Its devices or files in order, one or several.
    #[serde(default)]
    pub members: Vec<CacheMember>,
    /// Its identity, made at format.
    pub uuid: String,
    /// Its size.
    pub size_bytes: u64,
    /// What survives what: `dax`, `page-cache`, `volatile` or `assume-dax`.
    pub media_class: String,
    /// Why it is of that class.
    pub media_reason: String,
    /// Size of one segment.
    pub segment_size_bytes: u64,
    /// Segments in all.
    pub segments_total: u64,
    /// Segments that hold nothing.
    pub segments_free: u64,
    /// Segments that hold something.
    pub segments_used: u64,
    /// Segments given up because of damage.
    pub segments_bad: u64,
    /// RAM that the index takes.
    pub index_memory_bytes: u64,
    /// RAM that it may take before the cache holds less for it; 0 for no bound.
    pub index_memory_max_bytes: u64,
    /// Whether it could not be made durable once: it takes no more writes.
    pub has_failed: bool,
}

/// One of the devices or files of a cache.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct CacheMember {
    /// Which.
    pub path: String,
    /// The cache's byte with which it begins.
    pub base_bytes: u64,
    /// Bytes of the cache that it has.
    pub size_bytes: u64,
}

/// A volume in short.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct VolumeSummary {
    /// Its name.
    pub name: String,
    /// The cache it is on.
    pub cache: String,
    /// Whether it is served.
    pub attached: bool,
    /// Whether a VM is connected.
    pub connected: bool,
    /// `ok`, `degraded`, `stalled`, `lost-data` or `failed`; `detached` if it is not served,
    /// `changing` while it is being attached or detached.
    pub state: String,
    /// What is cached and when a write is done.
    pub mode: String,
    /// In which order write-back reaches the disk.
    pub order: String,
    /// Size of the disk.
    pub size_bytes: u64,
    /// Bytes not yet on the backing disk; of a volume that is not served 0 stands for none, and 1 for
    /// some.
    pub dirty_bytes: u64,
    /// Bytes of it that are cached.
    pub cached_bytes: u64,
}

/// Volumes.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct Volumes {
    /// By name.
    pub volumes: Vec<VolumeSummary>,
}

/// All about a volume that is served.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct VolumeStatus {
    /// In short.
    pub summary: VolumeSummary,
    /// For how long it has been in its state.
    pub state_for_s: u64,
    /// Why it is in it; empty when all is well.
    pub cause: String,
    /// What to do about it; empty when all is well.
    pub advice: String,
    /// Write-back rounds failed since the last good one.
    pub writeback_failures: u32,
    /// When write-back tries again after a failure.
    pub retry_in_ms: Option<u64>,
    /// Whether writes are slowed down to the pace of the disk.
    pub is_paced: bool,
    /// For how long there has been dirty data that write-back has not taken.
    pub dirty_age_ms: u64,
    /// Whether the order of write-back is being changed: from `relaxed` that takes as long as bringing
    /// what is dirty to the disk.
    pub is_changing_order: bool,
    /// How old the disk alone is: what came earlier is all there. 0 where nothing is dirty.
    pub lag_ms: u64,
    /// The checkpoint that keeps the disk still or is about to, if there is one.
    pub checkpoint: Option<Checkpoint>,
    /// Sectors that are lost: they answer with an error until they are overwritten.
    pub lost_sectors: u64,
    /// How long the stages of its requests took in the last minute or so.
    #[serde(default)]
    pub latencies: Vec<Latency>,
    /// What it was attached with, or what has been set since.
    pub settings: VolumeSettings,
    /// The nine fields of `dmsetup status` of a dm-pcache target, in their order.
    pub dm_pcache: DmPcacheStatus,
}

/// What a volume was attached with, or what has been set since.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct VolumeSettings {
    /// Where the VMM connects; none for an inherited descriptor.
    pub socket: Option<String>,
    /// The consistency group it is in now, if it is in one.
    pub group: Option<String>,
    /// The backing disk.
    pub backing: String,
    /// Queues offered.
    pub queues: u16,
    /// Largest ring.
    pub queue_size: u16,
    /// Whether every hit is verified.
    pub data_crc: bool,
    /// Block size the VM sees.
    pub block_size_bytes: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What the VM reads as the disk's serial.
    pub serial: String,
    /// Whether a discard also frees space on the disk: `pass` or `keep`.
    pub discard: String,
    /// How an idle queue waits for work: `adaptive`, `fixed` or `off`.
    pub poll: String,
    /// Longest time it looks for work before it sleeps.
    pub poll_us: u32,
    /// Most of a processor that it spends looking for work.
    pub poll_cpu_percent: u8,
    /// Threads that share its queues; 0 for one for each queue.
    pub queue_threads: u16,
    /// The group of volumes that shares them.
    pub thread_group: Option<String>,
    /// Processors they stay on, like `0-3,8`, or `any`.
    pub cpus: String,
    /// Most seconds by which the disk may be behind the guest; 0 for no bound.
    pub max_lag_s: u64,
    /// Most dirty bytes; 0 for as many as there is space.
    pub max_dirty_bytes: u64,
    /// What becomes of requests that need the disk while it fails: `wait`, `error` or `read_only`.
    pub on_backing_error: String,
    /// Seconds after which a disk that does not answer has failed; 0 for never.
    pub backing_timeout_s: u64,
    /// What it may hold of the cache, and ask for.
    pub share: ShareSettings,
}

/// What a volume may hold of its cache, and ask for.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct ShareSettings {
    /// Cache space that other volumes never push it below; 0 for none.
    pub cache_min_bytes: u64,
    /// Most cache space; 0 for no bound.
    pub cache_max_bytes: u64,
    /// Its part of cache space that all volumes want, relative to the others' weights.
    pub weight: u32,
    /// Share of its most from which on it makes space although nobody needs it; 100 for none.
    pub gc_percent: u8,
    /// Cache space it holds now, in whole segments.
    pub held_bytes: u64,
    /// Cache space it is entitled to when all volumes want what they may have.
    pub share_bytes: u64,
    /// Most requests a second; 0 for no limit, here and below.
    pub iops: u64,
    /// Most reads a second.
    pub read_iops: u64,
    /// Most writes and discards a second.
    pub write_iops: u64,
    /// Most bytes a second.
    pub bytes_per_s: u64,
    /// Most bytes read a second.
    pub read_bytes_per_s: u64,
    /// Most bytes written a second.
    pub write_bytes_per_s: u64,
    /// For how long what the limits leave unused may be saved up.
    pub burst_ms: u32,
}

/// What `dmsetup status` says of a dm-pcache target. Where that has one log, this cache has one per
/// stream, so positions are those of the newest and of the oldest.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct DmPcacheStatus {
    /// Feature bits of the superblock.
    pub sb_flags: u64,
    /// Segments of the cache device.
    pub seg_total: u64,
    /// Segments that can hold data.
    pub cache_segs: u64,
    /// Segments that hold something.
    pub segs_used: u64,
    /// Share of the segments from which on space is reclaimed.
    pub gc_percent: u8,
    /// Bit 0: every hit is verified; bits 4 and up: the mode, 0 for writeback.
    pub cache_flags: u32,
    /// `segment:offset` of the newest record.
    pub key_head: Option<String>,
    /// `segment:offset` of the oldest record that is not on the disk; none when all is.
    pub dirty_tail: Option<String>,
    /// `segment:offset` of the oldest segment that holds anything.
    pub key_tail: Option<String>,
}

/// Counters and rates of a volume.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct VolumeStats {
    /// The volume.
    pub volume: String,
    /// For how long `counters` have counted: since it was attached, or since the last reset.
    pub since_s: u64,
    /// What has happened in that time. Names ending in `_sectors` count sectors of 512 bytes.
    pub counters: BTreeMap<String, u64>,
    /// What is the case now.
    pub gauges: BTreeMap<String, u64>,
    /// Rates that forget: each an average in which what is older than its window counts for less
    /// and less.
    pub rates: Vec<Rates>,
    /// How long the stages of requests take: since the counters began, and over the same windows. Only
    /// where there was anything to time.
    #[serde(default)]
    pub latencies: Vec<Latency>,
}

/// How long a stage takes, of a sample of the requests.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct Latency {
    /// The stage: `read_hit`, `read_miss`, `write_wait`, `write`, `write_around`, `discard`, `flush` of
    /// requests; `disk_read`, `disk_write`, `disk_flush` of what these ask of the disk; `writeback_write`,
    /// `writeback_flush`.
    pub stage: String,
    /// The decaying window; 0 for all since the counters began.
    pub window_s: u32,
    /// How many were timed: one request of a queue in 31, and every operation on the disk.
    pub samples: u64,
    /// Their mean.
    pub mean_us: f64,
    /// Half of them took no longer.
    pub p50_us: f64,
    /// 90 % took no longer.
    pub p90_us: f64,
    /// 99 % took no longer.
    pub p99_us: f64,
    /// 99.9 % took no longer.
    pub p999_us: f64,
    /// All took less.
    pub max_us: f64,
}

/// Counters and rates of volumes.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct Stats {
    /// By name.
    pub volumes: Vec<VolumeStats>,
}

/// Rates over a decaying window.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct Rates {
    /// The window.
    pub window_s: u32,
    /// Read requests a second.
    pub reads_per_s: f64,
    /// Write requests a second.
    pub writes_per_s: f64,
    /// Bytes read a second.
    pub read_bytes_per_s: f64,
    /// Bytes written a second.
    pub write_bytes_per_s: f64,
    /// Share of the bytes read that the cache had, from 0 to 1; none without reads.
    pub read_hit_ratio: Option<f64>,
    /// Bytes a second that write-back brings to the disk.
    pub writeback_bytes_per_s: f64,
    /// Requests a second that ended in an error.
    pub errors_per_s: f64,
}

/// Long work: begun by a request, and followed by its number.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct Job {
    /// Its number.
    pub id: u64,
    /// `attach`, `checkpoint`, `detach`, `drain`, `flush`, `resize` or `set`.
    pub kind: String,
    /// The volume it works on; of a cache's `resize`, the cache.
    pub volume: String,
    /// `running`, `done`, `failed` or `cancelled`.
    pub state: String,
    /// For how long it has run.
    pub elapsed_s: f64,
    /// Bytes it has to bring to the disk, or of the cache to empty or add.
    pub total_bytes: u64,
    /// Bytes of these that are done.
    pub done_bytes: u64,
    /// How many a second, once that is known.
    pub bytes_per_s: Option<f64>,
    /// How long it will take yet, once that can be judged.
    pub left_s: Option<f64>,
    /// How it ended, or what is remarkable about that; a sentence.
    pub message: Option<String>,
}

/// All jobs that run, and the last ones that have ended.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct Jobs {
    /// The oldest first.
    pub jobs: Vec<Job>,
}

/// What reading the configuration file again has changed.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug, Default)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct ReloadReport {
    /// What was done, or begun as a job: a sentence each.
    pub changed: Vec<String>,
    /// What differs and takes effect only when a volume is attached again, or the daemon restarted.
    pub pending: Vec<String>,
    /// What could not be done.
    pub failed: Vec<String>,
}

/// Why a request was refused.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct Refusal {
    /// For programs: `bad-request`, `not-found`, `not-allowed`, `conflict`, `too-large`, `failed`.
    pub kind: String,
    /// For people: one sentence.
    pub message: String,
}
