//! What is asked of the control API: the bodies of its requests, and what a checkpoint answers.

#[cfg(test)]
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A volume to be served: the keys of a `[[volume]]` in the configuration file.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug, Default)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct AttachRequest {
    /// Its name in the cache.
    pub name: String,
    /// The cache, by name; needed when there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<String>,
    /// Where the VMM will connect.
    pub socket: String,
    /// Permission bits of the socket, in octal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_mode: Option<String>,
    /// Group of the socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_group: Option<String>,
    /// The backing disk.
    pub backing: String,
    /// `raw`: take it as raw even if it looks like another image format.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_format: Option<String>,
    /// Create the disk with this size if it does not exist, like `8GiB`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_size: Option<String>,
    /// Queues offered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Largest ring.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<u16>,
    /// What is cached and when a write is done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// In which order write-back reaches the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<String>,
    /// Whether every hit is verified.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_crc: Option<bool>,
    /// Block size the VM sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block_size: Option<u32>,
    /// Whether writes are refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_only: Option<bool>,
    /// What the VM reads as the disk's serial.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// `pass` or `keep`: whether a discard also frees space on the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discard: Option<String>,
    /// How an idle queue waits for work: `adaptive`, `fixed` or `off`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub poll: Option<String>,
    /// Longest time it looks for work before it sleeps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub poll_us: Option<u32>,
    /// Most of a processor that it spends looking for work, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub poll_cpu_percent: Option<u8>,
    /// Threads that share its queues; 0 for one for each queue.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_threads: Option<u16>,
    /// The group of volumes that shares them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thread_group: Option<String>,
    /// Processors they stay on, like `0-3,8`, or `any`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<String>,
    /// Consistency group: with the cache lost, the disks of all its volumes stand at one common point.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Redo area of `grouped` order: a file, made if it does not exist, or a block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redo: Option<String>,
    /// Size to make the redo area with, like `64MiB`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redo_size: Option<String>,
    /// Most seconds by which the disk may be behind the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_lag_s: Option<u32>,
    /// Most dirty bytes, like `4GiB`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_dirty: Option<String>,
    /// What becomes of requests that need the disk while it fails: `wait`, `error` or `read_only`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_backing_error: Option<String>,
    /// Seconds after which a disk that does not answer has failed; 0 for never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_timeout_s: Option<u32>,
    /// Cache space that other volumes never push it below, like `4GiB`; `0` for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_min: Option<String>,
    /// Most cache space, like `16GiB`; `0` for no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_max: Option<String>,
    /// Its part of cache space that all volumes want, relative to the others' weights: 1 to 10000, 100
    /// without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// Share of `cache_max`, or of the cache, from which on it makes space although nobody needs it: 0 to
    /// 90, 100 for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gc_percent: Option<u8>,
    /// Most requests a second; 0 for no limit, here and below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Most reads a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_iops: Option<u64>,
    /// Most writes and discards a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_iops: Option<u64>,
    /// Most bytes a second, like `200MiB`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<String>,
    /// Most bytes read a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_bytes_per_s: Option<String>,
    /// Most bytes written a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_bytes_per_s: Option<String>,
    /// For how long what these limits leave unused may be saved up: 1 to 60000, 100 without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst_ms: Option<u32>,
    /// Whether a file beside the disk tells a restored or exchanged one; without it, as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sidecar: Option<bool>,
    /// Which reads become cached: `adaptive`, `second-miss` or `never`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admission: Option<String>,
    /// How much is read in one go before what follows is not cached any more, like `4MiB`; `0` for no
    /// limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequential_cutoff: Option<String>,
    /// Consent, for this once: the disk need not be the one the volume belongs to.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force_identity: bool,
    /// Consent, for this once: what the cache lost to damage may stay lost.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accept_loss: bool,
}

/// What is to change in a volume: at least one of these. Limits hold at once; mode and order when the
/// job is done. Nothing changes if any of it is refused.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug, Default)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct SetRequest {
    /// What is cached and when a write is done. A mode other than `writeback` is entered by a drain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// In which order write-back reaches the disk: `strict`, `grouped` (if it was attached with a redo
    /// area) or `relaxed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<String>,
    /// Most seconds by which the disk may be behind the guest; 0 for no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_lag_s: Option<u32>,
    /// Most dirty bytes, like `4GiB`; `0` for as many as there is space.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_dirty: Option<String>,
    /// What becomes of requests that need the disk while it fails: `wait`, `error` or `read_only`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_backing_error: Option<String>,
    /// Seconds after which a disk that does not answer has failed; 0 for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_timeout_s: Option<u32>,
    /// Cache space that other volumes never push it below, like `4GiB`; `0` for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_min: Option<String>,
    /// Most cache space, like `16GiB`; `0` for no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_max: Option<String>,
    /// Its part of cache space that all volumes want, relative to the others' weights: 1 to 10000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// Share of `cache_max`, or of the cache, from which on it makes space although nobody needs it: 0 to
    /// 90, 100 for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gc_percent: Option<u8>,
    /// Most requests a second; 0 for no limit, here and below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Most reads a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_iops: Option<u64>,
    /// Most writes and discards a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_iops: Option<u64>,
    /// Most bytes a second, like `200MiB`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<String>,
    /// Most bytes read a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_bytes_per_s: Option<String>,
    /// Most bytes written a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_bytes_per_s: Option<String>,
    /// For how long what these limits leave unused may be saved up: 1 to 60000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst_ms: Option<u32>,
}

/// The size that a volume is to have.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug, Default)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct ResizeRequest {
    /// Like `20GiB`: a regular file that is shorter grows to it. Without it, the volume becomes as large
    /// as its disk has become.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
}

/// The size that a cache is to have.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug, Default)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct CacheResizeRequest {
    /// Like `20GiB`: of the file, which grows to it or is cut off, or what of a device is used.
    pub size: String,
}

/// A checkpoint to be held.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug, Default)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct CheckpointRequest {
    /// For how long at most the disk is kept still once the checkpoint is reached, unless that is
    /// prolonged: from 1 to 3600, 60 without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold_s: Option<u32>,
}

/// A checkpoint: the disk has everything that was acknowledged before it, and is kept still.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[cfg_attr(test, derive(JsonSchema))]
pub struct Checkpoint {
    /// Number of the job that began it.
    pub job: u64,
    /// Whether it is reached: before that the disk changes.
    pub is_reached: bool,
    /// In how many milliseconds it ends by itself, unless it is prolonged; none before it is reached.
    pub left_ms: Option<u64>,
}
