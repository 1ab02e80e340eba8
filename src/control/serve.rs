//! The life of a server, step by step; each step is undone by what it returned being dropped.
//!
//! 1. block the signals, before there is a second thread; until step 5 one to stop simply ends the
//!    process, since recovery and a drain may take long and can be repeated;
//! 2. claim every endpoint: what is in use is found before anything is opened for writing;
//! 3. open the backing disks, then the caches, making what may be made;
//! 4. attach the volumes, start the workers;
//! 5. open the sockets: from here on front ends come, and what was made stays;
//! 6. say so, and wait;
//! 7. stop in the opposite order: front ends, counters, workers, volumes, caches.
//!
//! Dirty data stays in the cache over a stop: bringing it to the disk would take as long as the disk
//! likes, and the next start finds it.
//!
//! A stop is bounded by [`STOP_MAX`], whatever a disk does. Queues and workers leave a disk that does
//! not answer by themselves, well before that; what is stuck elsewhere ends with the process, which
//! is what a kill is, and that is safe at any instruction. Either way the kernel keeps the disk's lock
//! until what was under way has ended, so a successor never overtakes it.

use std::io;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use super::announce::{self, CacheLine, VolumeLine};
use super::config::{Admission, CacheConfig, Config, Discard, Mode, OnBackingError, Order, VolumeConfig};
use super::exit::Exit;
use super::log;
use super::run::{RunError, of_cache};
use super::signals::{Event, Running, Signals};
use super::socket::{Bound, Claimed, Incoming};
use super::sys;
use crate::backing::{Backing, Disk};
use crate::cache::volume::VolumeDisk;
use crate::cache::worker::Workers;
use crate::cache::{
    self, AttachOptions, Cache, ReadPolicy, RecoveryReport, ScrubOptions, SystemClock, Volume, VolumeState,
};
use crate::pmem::{MappedPmem, MediaClass, Pmem};
use crate::tools::Host;
use crate::tools::created::Created;
use crate::tools::disk::{self, DiskOptions};
use crate::tools::image::{self, Image, ImageOptions, Sizing};
use crate::tools::redo::{self, RedoOptions};
use crate::vhost::{self, Server, Stopper};

/// Longest time from the request to stop to the end of the process. Less than the 90 s after which
/// systemd kills.
const STOP_MAX: Duration = Duration::from_secs(20);

/// An opened cache.
struct OpenCache<'a> {
    config: &'a CacheConfig,
    pmem: Arc<MappedPmem>,
    cache: Arc<Cache<Host>>,
    is_new: bool,
}

/// An attached volume.
struct OpenVolume<'a> {
    config: &'a VolumeConfig,
    volume: Arc<Volume<Host>>,
    is_new: bool,
}

/// The front end of one volume.
struct FrontEnd {
    stopper: Stopper,
    thread: JoinHandle<io::Result<()>>,
    /// Removes the socket.
    bound: Option<Bound>,
}

/// Serves until told to stop.
///
/// # Errors
/// What kept it from starting; nothing is left behind. Or what failed on the way.
pub fn serve(config: &Config) -> Result<Exit, RunError> {
    let mut signals = Signals::block().map_err(RunError::os("waiting for signals"))?;
    let starting = signals.end_while_starting().map_err(RunError::os("waiting for signals"))?;
    if let Err(error) = sys::raise_descriptor_limit() {
        tracing::warn!(%error, "the limit of open files stays: many queues may not fit it");
    }
    let mut created = Created::default();
    let claims = config
        .volumes()
        .iter()
        .map(|volume| Claimed::new(&volume.endpoint))
        .collect::<Result<Vec<_>, _>>()?;
    let (caches, volumes) = open_all(config, &mut created)?;
    let workers = spawn_workers(&caches, &volumes)?;
    drop(starting);
    let front_ends = open_front_ends(claims, &volumes, &signals)?;
    created.keep();
    announce::print(&announcement(&caches, &volumes));

    let ended = wait(&mut signals, &volumes);
    signals.unblock();
    bound_the_stop(&volumes);
    let served = stop_front_ends(front_ends);
    show_counters(&volumes);
    drop(workers);
    let closed = close_all(&volumes, &caches);
    ended.and(served).map(|_| closed)
}

/// Ends the process when the stop takes too long. Where the kernel refuses the thread, a second
/// signal does it.
fn bound_the_stop(volumes: &[OpenVolume<'_>]) {
    // Not its owner: what is closed in order gives up its lock before the process ends.
    let volumes: Vec<_> = volumes.iter().map(|volume| Arc::downgrade(&volume.volume)).collect();
    let bound = move || {
        std::thread::sleep(STOP_MAX);
        for volume in volumes.iter().filter_map(Weak::upgrade) {
            let health = volume.health();
            let (name, state, cause) = (volume.name(), health.state, health.cause);
            tracing::error!("volume {name} could not be stopped within {STOP_MAX:?}: {state} {cause}");
        }
        std::process::exit(Exit::Unanswered as i32);
    };
    if let Err(error) = std::thread::Builder::new().name("pcache-stop".into()).spawn(bound) {
        tracing::warn!(%error, "this stop takes as long as the disks like");
    }
}

fn open_all<'a>(
    config: &'a Config,
    created: &mut Created,
) -> Result<(Vec<OpenCache<'a>>, Vec<OpenVolume<'a>>), RunError> {
    if let Some(path) = config.state_dir() {
        created.make_directory(path).map_err(|source| RunError::Directory { path: path.into(), source })?;
    }
    // What exists first, then the disks: a cache is made only once those are known to be there.
    let mut existing = Vec::new();
    for cache in config.caches() {
        existing.push(if cache.path.exists() { Some(open_image(cache, created)?) } else { None });
    }
    let mut disks = Vec::new();
    for volume in config.volumes() {
        // The disk of a volume that exists is raw whatever its guest has written on it: whether it
        // is that disk is judged below.
        let holds = |image: &Image| cache::has_volume(&image.pmem, volume.name.as_str());
        let is_known = !volume.force_identity && existing[volume.cache].as_ref().is_some_and(holds);
        let options = DiskOptions {
            path: &volume.backing.path,
            read_only: volume.read_only,
            raw: volume.backing.raw || is_known,
            size: volume.backing.size,
        };
        disks.push(disk::open_or_create(&options, created).map_err(RunError::Disk)?);
    }
    let mut images = Vec::new();
    for (cache, image) in config.caches().iter().zip(existing) {
        images.push(match image {
            Some(image) => image,
            None => open_image(cache, created)?,
        });
    }
    let mut wanted = Vec::new();
    for (volume, disk) in config.volumes().iter().zip(disks) {
        let cache = &config.caches()[volume.cache];
        let redo = open_redo(volume, &disk.disk, created)?;
        let options = attach_options(cache, volume, disk.disk, redo);
        cache::would_attach(&images[volume.cache].pmem, &options).map_err(RunError::attach(cache, volume))?;
        wanted.push((volume, options, disk.is_new));
    }
    // All are known to go together: only now anything is written to what was there before.
    let mut caches = Vec::new();
    for (cache, image) in config.caches().iter().zip(images) {
        caches.push(open_cache(cache, image)?);
    }
    let mut volumes = Vec::new();
    for (config, options, is_new) in wanted {
        let on = &caches[config.cache];
        let volume = on.cache.attach(options).map_err(RunError::attach(on.config, config))?;
        let timeout_ms = u64::from(config.backing_timeout_s) * 1000;
        volume.set_on_backing_error(on_backing_error(config.on_backing_error), timeout_ms);
        if config.read_only && !volume.is_clean() {
            tracing::info!("volume {} is read-only: its dirty data stays in the cache", config.name);
        }
        volume.set_max_lag_ms(u64::from(config.max_lag_s) * 1000);
        volume.set_max_dirty(config.max_dirty);
        volumes.push(OpenVolume { config, volume, is_new });
    }
    Ok((caches, volumes))
}

fn open_image(config: &CacheConfig, created: &mut Created) -> Result<Image, RunError> {
    let options = ImageOptions {
        path: &config.path,
        size: config.size,
        segment_size: config.segment_size,
        assume_dax: config.assume_dax,
    };
    Ok(image::open_or_create(&options, created)?)
}

fn open_cache(config: &CacheConfig, image: Image) -> Result<OpenCache<'_>, RunError> {
    let (cache, report) =
        Cache::open(Arc::clone(&image.pmem), SystemClock::default()).map_err(of_cache(&config.path))?;
    log_opened(config, &image.pmem, &report);
    cache.set_scrub(ScrubOptions {
        bytes_per_s: u64::from(config.scrub_mib_s) << 20,
        interval_ms: u64::from(config.scrub_interval_h) * 3_600_000,
    });
    Ok(OpenCache { config, pmem: image.pmem, cache, is_new: image.is_new })
}

fn log_opened(config: &CacheConfig, pmem: &MappedPmem, report: &RecoveryReport) {
    let (path, class) = (config.path.display(), pmem.class());
    tracing::info!(
        "cache {path} opened: class={class} volumes={} segments_used={} keys={} dirty_bytes={} \
         cached_bytes={} torn_records={} was_clean={}",
        report.volumes,
        report.segments_used,
        report.keys,
        report.dirty_bytes,
        report.cached_bytes,
        report.torn_records,
        report.was_clean
    );
    for finding in &report.findings {
        tracing::warn!("cache {path}: {finding}");
    }
    if class == MediaClass::AssumeDax {
        tracing::warn!("cache {path} is assumed to be persistent memory and is not: tests only");
    }
}

/// The volume's redo area: what grouped order needs, and what an earlier start may have left a group in.
fn open_redo(
    config: &VolumeConfig,
    disk: &Disk,
    created: &mut Created,
) -> Result<Option<Arc<Disk>>, RunError> {
    if config.read_only {
        return Ok(None);
    }
    let options = RedoOptions {
        path: config.redo.as_deref(),
        disk: &config.backing.path,
        disk_size: disk.geometry().size,
        size: config.redo_size.map_or(Sizing::AsFound, Sizing::Exactly),
        is_needed: config.order == Order::Grouped,
    };
    redo::open_or_create(&options, created).map_err(RunError::Disk)
}

fn attach_options(
    cache: &CacheConfig,
    config: &VolumeConfig,
    backing: Arc<Disk>,
    redo: Option<Arc<Disk>>,
) -> AttachOptions<Host> {
    AttachOptions {
        name: config.name.as_str().into(),
        backing,
        mode: mode(config.mode),
        order: order(config.order),
        redo,
        data_crc: config.data_crc,
        pass_discard: config.discard == Discard::Pass,
        reads: ReadPolicy {
            admission: admission(config.admission),
            sequential_cutoff: config.sequential_cutoff,
        },
        read_only: config.read_only,
        serial: config.serial.as_str().into(),
        block_size: config.block_size,
        queues: config.queues,
        queue_size: config.queue_size,
        force_identity: config.force_identity,
        sidecar: config.sidecar,
        accept_loss: config.accept_loss,
        allow_volatile: cache.allow_volatile,
    }
}

fn spawn_workers(
    caches: &[OpenCache<'_>],
    volumes: &[OpenVolume<'_>],
) -> Result<Vec<Workers<Host>>, RunError> {
    let on = |index| {
        let of_cache = volumes.iter().filter(move |volume| volume.config.cache == index);
        // The disk of a read-only volume is not open for writing: what is dirty waits.
        let writable = of_cache.filter(|volume| !volume.config.read_only);
        writable.map(|volume| Arc::clone(&volume.volume)).collect::<Vec<_>>()
    };
    caches
        .iter()
        .enumerate()
        .map(|(index, cache)| Workers::spawn(&cache.cache, &on(index)))
        .collect::<io::Result<_>>()
        .map_err(RunError::os("starting the workers"))
}

fn open_front_ends(
    claims: Vec<Claimed>,
    volumes: &[OpenVolume<'_>],
    signals: &Signals,
) -> Result<Vec<FrontEnd>, RunError> {
    let mut front_ends = Vec::new();
    for (claim, volume) in claims.into_iter().zip(volumes) {
        match open_front_end(claim, volume, signals.running()) {
            Ok(front_end) => front_ends.push(front_end),
            Err(error) => {
                // Those that serve already must end before their volumes do.
                return stop_front_ends(front_ends).and(Err(error));
            }
        }
    }
    Ok(front_ends)
}

fn open_front_end(claim: Claimed, volume: &OpenVolume<'_>, running: Running) -> Result<FrontEnd, RunError> {
    let (incoming, bound) = claim.open()?;
    let endpoint = match incoming {
        Incoming::Listener(listener) => vhost::Endpoint::Listener(listener),
        Incoming::Connected(stream) => vhost::Endpoint::Stream(stream),
    };
    let options = vhost::Options {
        name: volume.config.name.as_str().into(),
        poll_max: Duration::from_micros(volume.config.poll_us.into()),
        ..vhost::Options::default()
    };
    let disk = Arc::new(VolumeDisk(Arc::clone(&volume.volume)));
    let start = || {
        let server = Server::new(endpoint, disk, options)?;
        let stopper = server.stopper();
        let name: String = format!("vhost-{}", volume.config.name).chars().take(15).collect();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let _running = running;
            server.run()
        })?;
        Ok((stopper, thread))
    };
    let (stopper, thread) = start().map_err(RunError::os("starting the server"))?;
    Ok(FrontEnd { stopper, thread, bound })
}

fn announcement(caches: &[OpenCache<'_>], volumes: &[OpenVolume<'_>]) -> String {
    let caches: Vec<CacheLine<'_>> = caches
        .iter()
        .map(|cache| CacheLine {
            path: &cache.config.path,
            size: cache.pmem.len(),
            created: cache.is_new,
            class: cache.pmem.class(),
            reason: cache.pmem.reason(),
        })
        .collect();
    let volumes: Vec<VolumeLine<'_>> = volumes
        .iter()
        .map(|volume| VolumeLine {
            config: volume.config,
            size: volume.volume.backing().geometry().size,
            created: volume.is_new,
        })
        .collect();
    announce::text(&caches, &volumes)
}

fn wait(signals: &mut Signals, volumes: &[OpenVolume<'_>]) -> Result<Exit, RunError> {
    loop {
        match signals.wait().map_err(RunError::os("waiting for signals"))? {
            Event::ShowCounters => show_counters(volumes),
            Event::Stop(signal) => {
                tracing::info!("stopping: {signal}");
                return Ok(Exit::Done);
            }
            Event::AllEnded => {
                tracing::info!("stopping: no front end can come any more");
                return Ok(Exit::Done);
            }
        }
    }
}

fn show_counters(volumes: &[OpenVolume<'_>]) {
    for (n, OpenVolume { config, volume, .. }) in volumes.iter().enumerate() {
        if volumes[..n].iter().all(|other| other.config.cache != config.cache) {
            let status = volume.cache().scrub_status();
            log::asked_for(&announce::scrub(config.cache, &status));
        }
        log::asked_for(&announce::status(config.name.as_str(), &volume.health()));
        let mut line = format!("counters volume={}", config.name);
        for (name, value) in volume.counters().fields() {
            line.push_str(&format!(" {name}={value}"));
        }
        log::asked_for(&line);
    }
}

/// Ends the front ends, each after what it has in flight, all at the same time.
fn stop_front_ends(front_ends: Vec<FrontEnd>) -> Result<Exit, RunError> {
    for front_end in &front_ends {
        front_end.stopper.stop();
    }
    let mut result = Ok(Exit::Done);
    for FrontEnd { thread, bound, .. } in front_ends {
        let ended = match thread.join() {
            Ok(ended) => ended.map_err(RunError::os("accepting front ends")),
            Err(panic) => std::panic::resume_unwind(panic),
        };
        drop(bound);
        result = result.and(ended.map(|()| Exit::Done));
    }
    result
}

/// Notes that this was no crash. Without that note the next start recovers as after one, which
/// costs it nothing but the fingerprint's assurance: so failing here is worth a line, not a failure.
fn close_all(volumes: &[OpenVolume<'_>], caches: &[OpenCache<'_>]) -> Exit {
    let mut exit = Exit::Done;
    for OpenVolume { config, volume, .. } in volumes {
        if volume.health().state == VolumeState::Stalled {
            // Its content is not known while something may still reach it, and reading it would hang.
            tracing::warn!("volume {} is left as after a kill: its disk does not answer", config.name);
            exit = Exit::Unanswered;
            continue;
        }
        if let Err(error) = volume.cache().detach(volume) {
            tracing::warn!("volume {} could not be detached in order: {error}", config.name);
        }
    }
    for OpenCache { config, cache, .. } in caches {
        match cache.close() {
            Ok(()) => tracing::info!("cache {} closed", config.path.display()),
            Err(error) => {
                tracing::warn!("cache {} could not be closed in order: {error}", config.path.display());
            }
        }
    }
    exit
}

fn mode(mode: Mode) -> cache::Mode {
    match mode {
        Mode::Writeback => cache::Mode::Writeback,
        Mode::Writethrough => cache::Mode::Writethrough,
        Mode::Writearound => cache::Mode::Writearound,
        Mode::Readonly => cache::Mode::Readonly,
        Mode::Passthrough => cache::Mode::Passthrough,
    }
}

fn on_backing_error(policy: OnBackingError) -> cache::OnBackingError {
    match policy {
        OnBackingError::Wait => cache::OnBackingError::Wait,
        OnBackingError::Error => cache::OnBackingError::Error,
        OnBackingError::ReadOnly => cache::OnBackingError::ReadOnly,
    }
}

fn admission(admission: Admission) -> cache::Admission {
    match admission {
        Admission::Adaptive => cache::Admission::Adaptive,
        Admission::SecondMiss => cache::Admission::SecondMiss,
        Admission::Never => cache::Admission::Never,
    }
}

fn order(order: Order) -> cache::Order {
    match order {
        Order::Strict => cache::Order::Strict,
        Order::Grouped => cache::Order::Grouped,
        Order::Relaxed => cache::Order::Relaxed,
    }
}
