//! The life of a server, step by step; each step is undone by what it returned being dropped.
//!
//! 1. block the signals, before there is a second thread; until step 5 one to stop simply ends the
//!    process, since recovery and a drain may take long and can be repeated; give up the files that are
//!    nobody's business;
//! 2. claim every endpoint: what is in use is found before anything is opened for writing;
//! 3. open the backing disks, then the caches, making what may be made;
//! 4. attach the volumes, start the workers;
//! 5. open the sockets, that of the control API last: from here on front ends come, and what was
//!    made stays;
//! 6. give up what is not needed any more (`sandbox`), say so, and wait;
//! 7. stop in the opposite order: control API and its jobs, front ends, counters, workers, volumes,
//!    caches.
//!
//! Dirty data stays in the cache over a stop: bringing it to the disk would take as long as the disk
//! likes, and the next start finds it.
//!
//! A stop is bounded by [`STOP_MAX`], whatever a disk does. Queues and workers leave a disk that does
//! not answer by themselves, well before that; what is stuck elsewhere ends with the process, which
//! is what a kill is, and that is safe at any instruction. Either way the kernel keeps the disk's lock
//! until what was under way has ended, so a successor never overtakes it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use super::activation;
use super::announce::{self, CacheLine, VolumeLine};
use super::api;
use super::config::{
    Admission, CacheConfig, Config, Discard, Endpoint, Mode, OnBackingError, Order, Sandbox, VolumeConfig,
};
use super::daemon::{Daemon, DaemonError, OpenCache, Served};
use super::exit::{Exit, sentence};
use super::log;
use super::notify::Notifier;
use super::run::{RunError, of_cache};
use super::sandbox;
use super::signals::{Event, Signals};
use super::socket::{Claimed, same_path};
use super::sys;
use crate::backing::{Backing, Disk};
use crate::cache::{
    self, AttachOptions, Cache, ReadPolicy, RecoveryReport, ScrubOptions, SystemClock, Volume,
};
use crate::pmem::{MappedPmem, MediaClass, Pmem};
use crate::tools::Host;
use crate::tools::created::Created;
use crate::tools::disk::{self, DiskOptions};
use crate::tools::image::{self, Image, ImageOptions, Sizing};
use crate::tools::redo::{self, RedoOptions};

/// Longest time from the request to stop to the end of the process. Less than the 90 s after which
/// systemd kills.
const STOP_MAX: Duration = Duration::from_secs(20);

/// Serves until told to stop. `file` is the configuration file, to be read again on demand.
///
/// # Errors
/// What kept it from starting; nothing is left behind. Or what failed on the way.
pub fn serve(config: &Config, file: Option<&Path>) -> Result<Exit, RunError> {
    let named = config.volumes().iter().filter_map(|volume| match &volume.endpoint {
        Endpoint::Inherited(fd) => Some(*fd),
        Endpoint::Socket { .. } => None,
    });
    let passed = activation::take(&named.collect::<Vec<_>>())?;
    let mut notifier = Notifier::from_env();
    let mut signals = Signals::block().map_err(RunError::os("waiting for signals"))?;
    confine_paths(config, file)?;
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
    let control = config.control().map(api::Claimed::new).transpose()?;
    let (caches, volumes) = open_all(config, &mut created)?;
    let daemon = Arc::new(Daemon::new(caches, signals.servers(), file, config.control())?);
    let served = volumes
        .into_iter()
        .map(|(config, volume, is_new)| daemon.enter(config, volume, is_new))
        .collect::<Result<Vec<_>, _>>()?;
    drop(starting);
    let opened = open_front_ends(&daemon, &served, claims)
        .and_then(|()| control.map(|claim| claim.open(&daemon, signals.servers().running())).transpose());
    let api = match opened {
        Ok(api) => api,
        // Those that serve already must end before their volumes do.
        Err(error) => return daemon.stop_front_ends().and(Err(error)),
    };
    if let Err(error) = confine_calls(config) {
        return daemon.stop_front_ends().and(Err(error));
    }
    created.keep();
    announce::print(&announcement(&daemon, &served));
    drop(served);
    warn_of_unused(&passed, config);
    notifier.ready(&daemon);

    let ended = wait(&mut signals, &daemon, &mut notifier);
    notifier.stopping();
    signals.unblock();
    bound_the_stop(&daemon);
    drop(api);
    daemon.jobs().close();
    let served = daemon.stop_front_ends();
    show_counters(&daemon);
    let closed = if daemon.close() { Exit::Done } else { Exit::Unanswered };
    ended.and(served.map(|()| closed))
}

/// What the process gives up before there is a second thread: most of the file system.
fn confine_paths(config: &Config, file: Option<&Path>) -> Result<(), RunError> {
    let how = config.confinement().sandbox;
    if how == Sandbox::Off {
        return Ok(());
    }
    match sandbox::confine_paths(config, file) {
        Ok(what) => tracing::info!("sandbox: {what}"),
        Err(error) if how == Sandbox::Strict => return Err(error.into()),
        Err(error) => tracing::warn!("sandbox: files are not restricted: {error}"),
    }
    Ok(())
}

/// What it gives up once everything works: most system calls.
fn confine_calls(config: &Config) -> Result<(), RunError> {
    let how = config.confinement().sandbox;
    if how == Sandbox::Off {
        return Ok(());
    }
    match sandbox::confine_calls() {
        Ok(()) => tracing::info!("sandbox: system calls by seccomp"),
        Err(error) if how == Sandbox::Strict => return Err(error.into()),
        Err(error) => tracing::warn!("sandbox: system calls are not restricted: {error}"),
    }
    Ok(())
}

/// Ends the process when the stop takes too long. Where the kernel refuses the thread, a second
/// signal does it.
fn bound_the_stop(daemon: &Daemon) {
    // Not its owner: what is closed in order gives up its lock before the process ends.
    let volumes: Vec<_> = daemon.served().iter().map(|served| Arc::downgrade(&served.volume)).collect();
    let bound = move || {
        std::thread::sleep(STOP_MAX);
        for volume in volumes.iter().filter_map(Weak::upgrade) {
            let health = volume.health();
            let (name, state, cause) = (volume.name(), health.state, health.cause);
            tracing::error!("volume {name} could not be stopped within {STOP_MAX:?}: {state} {cause}");
        }
        std::process::exit(Exit::Unanswered.code().into());
    };
    if let Err(error) = std::thread::Builder::new().name("pcache-stop".into()).spawn(bound) {
        tracing::warn!(%error, "this stop takes as long as the disks like");
    }
}

/// What the start has opened: the caches, and the volumes attached to them.
type Opened = (Vec<OpenCache>, Vec<(VolumeConfig, Arc<Volume<Host>>, bool)>);

fn open_all(config: &Config, created: &mut Created) -> Result<Opened, RunError> {
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
        let volume = on.cache.attach(options).map_err(RunError::attach(&on.config, config))?;
        set_wishes(config, &volume);
        if config.read_only && !volume.is_clean() {
            tracing::info!("volume {} is read-only: its dirty data stays in the cache", config.name);
        }
        volumes.push((config.clone(), volume, is_new));
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

fn open_cache(config: &CacheConfig, image: Image) -> Result<OpenCache, RunError> {
    let (cache, report) =
        Cache::open(Arc::clone(&image.pmem), SystemClock::default()).map_err(of_cache(&config.path))?;
    log_opened(config, &image.pmem, &report);
    cache.set_scrub(ScrubOptions {
        bytes_per_s: u64::from(config.scrub_mib_s) << 20,
        interval_ms: u64::from(config.scrub_interval_h) * 3_600_000,
    });
    let (config, workers) = (config.clone(), Mutex::default());
    Ok(OpenCache { config, pmem: image.pmem, cache, is_new: image.is_new, workers })
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

/// What is asked of a volume while it runs.
pub(super) fn set_wishes(config: &VolumeConfig, volume: &Volume<Host>) {
    let timeout_ms = u64::from(config.backing_timeout_s) * 1000;
    volume.set_on_backing_error(on_backing_error(config.on_backing_error), timeout_ms);
    volume.set_max_lag_ms(u64::from(config.max_lag_s) * 1000);
    volume.set_max_dirty(config.max_dirty);
}

/// The volume's redo area: what grouped order needs, and what an earlier start may have left a group in.
pub(super) fn open_redo(
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

pub(super) fn attach_options(
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
        group: None,
    }
}

fn open_front_ends(daemon: &Daemon, served: &[Arc<Served>], claims: Vec<Claimed>) -> Result<(), RunError> {
    served.iter().zip(claims).try_for_each(|(served, claim)| daemon.open_front_end(served, claim))
}

fn announcement(daemon: &Daemon, served: &[Arc<Served>]) -> String {
    let caches: Vec<CacheLine<'_>> = daemon
        .caches()
        .iter()
        .map(|cache| CacheLine {
            path: &cache.config.path,
            size: cache.pmem.len(),
            created: cache.is_new,
            class: cache.pmem.class(),
            reason: cache.pmem.reason(),
        })
        .collect();
    let volumes: Vec<VolumeLine<'_>> = served
        .iter()
        .map(|served| VolumeLine {
            config: &served.config,
            size: served.volume.backing().geometry().size,
            created: served.is_new,
        })
        .collect();
    announce::text(&caches, &volumes)
}

/// A socket that is passed and has no volume is a mistake in a unit or in the file; an attach may mend it.
fn warn_of_unused(passed: &[PathBuf], config: &Config) {
    let volumes = config.volumes().iter().filter_map(|volume| match &volume.endpoint {
        Endpoint::Socket { path, .. } => Some(path.as_path()),
        Endpoint::Inherited(_) => None,
    });
    let control = config.control().map(|control| control.socket.as_path());
    let wanted: Vec<&Path> = volumes.chain(control).collect();
    for path in passed.iter().filter(|path| !wanted.iter().any(|wanted| same_path(path, wanted))) {
        tracing::warn!(
            "socket {} was passed by the service manager and is nobody's: who connects there waits for an attach",
            path.display()
        );
    }
}

fn wait(signals: &mut Signals, daemon: &Arc<Daemon>, notifier: &mut Notifier) -> Result<Exit, RunError> {
    loop {
        let event = signals.wait(notifier.interval()).map_err(RunError::os("waiting for signals"))?;
        notifier.alive(daemon);
        match event {
            Event::ShowCounters => show_counters(daemon),
            Event::Quiet => {}
            Event::Reload => {
                notifier.reloading();
                match daemon.reload() {
                    Ok(report) => report.lines().iter().for_each(|line| log::asked_for(line)),
                    // Nothing to read: then it is what it is elsewhere, the end of the terminal.
                    Err(DaemonError::NoFile) => {
                        tracing::info!("stopping: SIGHUP");
                        return Ok(Exit::Done);
                    }
                    Err(error) => tracing::error!("reload: {}", sentence(&error)),
                }
                notifier.ready(daemon);
            }
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

fn show_counters(daemon: &Daemon) {
    for (number, cache) in daemon.caches().iter().enumerate() {
        log::asked_for(&announce::scrub(number, &cache.cache.scrub_status()));
    }
    for served in daemon.served() {
        let (name, volume) = (&served.config.name, &served.volume);
        log::asked_for(&announce::status(name.as_str(), &volume.health()));
        let mut line = format!("counters volume={name}");
        for (name, value) in volume.counters().fields() {
            line.push_str(&format!(" {name}={value}"));
        }
        log::asked_for(&line);
    }
}

pub(super) fn mode(mode: Mode) -> cache::Mode {
    match mode {
        Mode::Writeback => cache::Mode::Writeback,
        Mode::Writethrough => cache::Mode::Writethrough,
        Mode::Writearound => cache::Mode::Writearound,
        Mode::Readonly => cache::Mode::Readonly,
        Mode::Passthrough => cache::Mode::Passthrough,
    }
}

pub(super) fn on_backing_error(policy: OnBackingError) -> cache::OnBackingError {
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

pub(super) fn order(order: Order) -> cache::Order {
    match order {
        Order::Strict => cache::Order::Strict,
        Order::Grouped => cache::Order::Grouped,
        Order::Relaxed => cache::Order::Relaxed,
    }
}
