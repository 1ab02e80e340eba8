//! The daemon as values of the API: a look from outside that holds nothing up.

use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use super::super::announce::word;
use super::super::api::model::{
    CacheMember, CacheStatus, DaemonStatus, DmPcacheStatus, ShareSettings, VolumeSettings, VolumeStats,
    VolumeStatus, VolumeSummary,
};
use super::super::config::Endpoint;
use super::super::share::{GC_PERCENT_NONE, ShareConfig};
use super::set::Limits;
use super::windows::is_gauge;
use super::{Daemon, Entry, OpenCache, Served, lock};
use crate::cache::{Mode, Position, Volume};
use crate::onmedia::unpad;
use crate::tools::Host;

/// The window of the latencies in a status: long enough to have samples, short enough to be about now.
const STATUS_WINDOW_S: u32 = 60;

impl Daemon {
    /// How the daemon is.
    pub fn view(&self) -> DaemonStatus {
        DaemonStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_s: self.begun.elapsed().as_secs(),
            config_file: self.config_file.as_ref().map(|path| path.display().to_string()),
            caches: self.caches.iter().map(view_cache).collect(),
            volumes: self.view_volumes(),
        }
    }

    /// Every volume on the caches, by name.
    pub fn view_volumes(&self) -> Vec<VolumeSummary> {
        let entries = lock(&self.volumes).clone();
        let mut rows = Vec::new();
        for (at, cache) in self.caches.iter().enumerate() {
            for (name, sectors, is_dirty) in cache.cache.volumes() {
                rows.push(match entries.get(&name) {
                    // Another cache may have one of the same name, left from other times.
                    Some(Entry::Served(served)) if served.config.cache == at => self.view_summary(served),
                    Some(Entry::Served(_)) => view_detached(cache, &name, sectors, is_dirty, false),
                    entry => view_detached(cache, &name, sectors, is_dirty, entry.is_some()),
                });
            }
        }
        rows.sort_by(|a, b| a.name.cmp(&b.name));
        rows
    }

    fn view_summary(&self, served: &Served) -> VolumeSummary {
        let Served { config, volume, .. } = served;
        let counters = volume.counters();
        VolumeSummary {
            name: config.name.to_string(),
            cache: self.caches[config.cache].config.name.to_string(),
            attached: true,
            connected: served.is_connected(),
            state: volume.health().state.to_string(),
            mode: volume.mode().name().into(),
            order: volume.order().name().into(),
            size_bytes: volume.disk_config().sectors * 512,
            dirty_bytes: counters.dirty_bytes,
            cached_bytes: counters.cached_bytes,
        }
    }

    /// All about a volume.
    pub fn view_volume(&self, served: &Served) -> VolumeStatus {
        let Served { config, volume, .. } = served;
        let (health, disk) = (volume.health(), volume.disk_config());
        let limits = Limits::of(volume);
        let socket = match &config.endpoint {
            Endpoint::Socket { path, .. } => Some(path.to_string()),
            Endpoint::Inherited(_) => None,
        };
        let settings = VolumeSettings {
            socket,
            group: volume.group(),
            backing: config.backing.path.display().to_string(),
            queues: disk.queues,
            queue_size: disk.queue_size,
            data_crc: config.data_crc,
            block_size_bytes: disk.block_size,
            read_only: disk.read_only,
            serial: config.serial.as_str().into(),
            discard: word(config.discard),
            poll: word(config.threads.poll),
            poll_us: config.threads.poll_us,
            poll_cpu_percent: config.threads.poll_cpu_percent,
            queue_threads: config.threads.queue_threads,
            thread_group: config.threads.thread_group.as_ref().map(ToString::to_string),
            cpus: config.threads.cpus.to_string(),
            max_lag_s: limits.max_lag_s,
            max_dirty_bytes: limits.max_dirty_bytes,
            on_backing_error: word(limits.on_backing_error),
            backing_timeout_s: limits.backing_timeout_s,
            share: view_share(volume),
        };
        VolumeStatus {
            summary: self.view_summary(served),
            state_for_s: health.for_ms / 1000,
            cause: health.cause,
            advice: health.advice.into(),
            writeback_failures: health.failures,
            retry_in_ms: health.retry_ms,
            is_paced: volume.is_paced(),
            dirty_age_ms: volume.dirty_age_ms(),
            is_changing_order: volume.is_changing_order(),
            lag_ms: volume.lag_ms(),
            checkpoint: served.view_checkpoint(),
            lost_sectors: volume.counters().lost_sectors,
            latencies: lock(&served.latencies).view_window(STATUS_WINDOW_S),
            settings,
            dm_pcache: self.view_dm_pcache(served),
        }
    }

    fn view_dm_pcache(&self, served: &Served) -> DmPcacheStatus {
        let cache = &self.caches[served.config.cache].cache;
        let (space, positions) = (cache.space(), served.volume.positions());
        let text = |position: Position| format!("{}:{}", position.segment, position.offset);
        DmPcacheStatus {
            sb_flags: cache.features(),
            seg_total: space.total as u64,
            cache_segs: (space.total - space.bad) as u64,
            segs_used: space.used as u64,
            gc_percent: served.volume.shares().gc_percent.unwrap_or(cache.reclaim_percent()),
            cache_flags: u32::from(served.config.data_crc) | (served.volume.mode() as u32) << 4,
            key_head: positions.key_head.map(text),
            dirty_tail: positions.dirty_tail.map(text),
            key_tail: positions.key_tail.map(text),
        }
    }

    /// Counters and rates of a volume; with `reset`, counters begin anew afterwards.
    pub fn view_stats(&self, served: &Served, reset: bool) -> VolumeStats {
        let (now, counters) = (Instant::now(), served.volume.counters());
        let (mut windows, mut latencies) = (lock(&served.windows), lock(&served.latencies));
        let histograms = served.volume.latencies();
        let text = |(name, value): (&str, u64)| (name.to_owned(), value);
        let stats = VolumeStats {
            volume: served.config.name.to_string(),
            since_s: windows.age(now).as_secs(),
            counters: windows.counted(&counters).into_iter().map(text).collect(),
            gauges: counters.fields().into_iter().filter(|(name, _)| is_gauge(name)).map(text).collect(),
            rates: windows.rates(),
            latencies: latencies.view(&histograms),
        };
        if reset {
            windows.reset(now, &counters);
            latencies.reset(histograms);
        }
        stats
    }
}

fn view_share(volume: &Volume<Host>) -> ShareSettings {
    let ShareConfig { shares, limits } = ShareConfig::of(volume);
    ShareSettings {
        cache_min_bytes: shares.min,
        cache_max_bytes: shares.max,
        weight: shares.weight,
        gc_percent: shares.gc_percent.unwrap_or(GC_PERCENT_NONE),
        held_bytes: volume.held_bytes(),
        share_bytes: volume.share_bytes(),
        iops: limits.iops,
        read_iops: limits.read_iops,
        write_iops: limits.write_iops,
        bytes_per_s: limits.bytes_per_s,
        read_bytes_per_s: limits.read_bytes_per_s,
        write_bytes_per_s: limits.write_bytes_per_s,
        burst_ms: limits.burst_ms,
    }
}

fn view_cache(open: &OpenCache) -> CacheStatus {
    use crate::pmem::Pmem;
    let (config, cache) = (&open.config, &open.cache);
    let (space, geometry) = (cache.space(), cache.geometry());
    let uuid: String = cache.uuid().iter().map(|byte| format!("{byte:02x}")).collect();
    CacheStatus {
        name: config.name.to_string(),
        path: config.path.first().display().to_string(),
        members: open.pmem.members().map(view_member).collect(),
        uuid,
        size_bytes: open.pmem.len(),
        media_class: open.pmem.class().to_string(),
        media_reason: open.pmem.reason().into(),
        segment_size_bytes: geometry.segment_size.into(),
        segments_total: space.total as u64,
        segments_free: space.free as u64,
        segments_used: space.used as u64,
        segments_bad: space.bad as u64,
        index_memory_bytes: cache.index_memory_bytes(),
        index_memory_max_bytes: cache.index_memory_max(),
        has_failed: cache.has_failed(),
    }
}

fn view_member((path, range): (&Path, Range<u64>)) -> CacheMember {
    CacheMember {
        path: path.display().to_string(),
        base_bytes: range.start,
        size_bytes: range.end - range.start,
    }
}

fn view_detached(
    open: &OpenCache,
    name: &str,
    sectors: u64,
    is_dirty: bool,
    is_changing: bool,
) -> VolumeSummary {
    let descriptor = open.cache.descriptor(name);
    let mode = descriptor.as_ref().map_or(Mode::default(), |descriptor| descriptor.mode);
    let order = descriptor.as_ref().map_or("", |descriptor| descriptor.order.name());
    debug_assert!(descriptor.is_none_or(|descriptor| unpad(&descriptor.name) == name.as_bytes()));
    VolumeSummary {
        name: name.into(),
        cache: open.config.name.to_string(),
        attached: false,
        connected: false,
        state: if is_changing { "changing" } else { "detached" }.into(),
        mode: mode.name().into(),
        order: order.into(),
        size_bytes: sectors * 512,
        dirty_bytes: u64::from(is_dirty),
        cached_bytes: 0,
    }
}
