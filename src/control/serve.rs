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
//! Where another daemon serves and is to be taken over from (`handover`), endpoints, disks and caches come
//! from there. Between 3 and what writes in it, the other one comes to rest; from then on it is ours.
//!
//! Dirty data stays in the cache over a stop: bringing it to the disk would take as long as the disk
//! likes, and the next start finds it.
//!
//! A stop is bounded by [`STOP_MAX`], whatever a disk does. Queues and workers leave a disk that does
//! not answer by themselves, well before that; what is stuck elsewhere ends with the process, which
//! is what a kill is, and that is safe at any instruction. Either way the kernel keeps the disk's lock
//! until what was under way has ended, so a successor never overtakes it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use super::activation;
use super::announce::{self, CacheLine, VolumeLine};
use super::api;
use super::config::{
    Admission, CacheConfig, Config, Discard, Endpoint, Mode, OnBackingError, Order, VolumeConfig,
};
use super::daemon::{Daemon, DaemonError, OpenCache, Served, lock};
use super::exit::{Exit, sentence};
use super::handover::{Estate, FrontEndRest, Gate, Giver, Predecessor};
use super::log;
use super::notify::Notifier;
use super::run::{RunError, of_cache};
use super::sandbox;
use super::signals::{Event, Signals};
use super::socket::{Claimed, same_path};
use super::sys;
use crate::backing::{Backing, Disk};
use crate::cache::{
    self, AttachError, AttachOptions, Cache, Env, ReadAhead, ReadPolicy, RecoveryReport, ScrubOptions,
    SystemClock, Volume,
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

/// What is asked of this one start, and never in a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Start {
    /// Whether to take over from the daemon that answers at the control socket.
    pub take_over: bool,
    /// How long a disk may be locked by somebody else: a killed predecessor's last writes, or the host that
    /// a VM is migrating away from.
    pub wait_for_disks: Duration,
}

/// Serves until told to stop. `file` is the configuration file, to be read again on demand.
///
/// # Errors
/// What kept it from starting; nothing is left behind. Or what failed on the way.
pub fn serve(config: &Config, file: Option<&Path>, start: &Start) -> Result<Exit, RunError> {
    let named = config.volumes().iter().filter_map(|volume| match &volume.endpoint {
        Endpoint::Inherited(fd) => Some(*fd),
        Endpoint::Socket { .. } => None,
    });
    let passed = activation::take(&named.collect::<Vec<_>>())?;
    let mut notifier = Notifier::from_env();
    let mut signals = Signals::block().map_err(RunError::os("waiting for signals"))?;
    sandbox::keep_to_paths(config, file)?;
    let starting = signals.end_while_starting().map_err(RunError::os("waiting for signals"))?;
    if let Err(error) = sys::raise_descriptor_limit() {
        tracing::warn!(%error, "the limit of open files stays: many queues may not fit it");
    }
    let mut created = Created::default();
    let predecessor = match start.take_over {
        true => Predecessor::meet(config.control())?,
        false => None,
    };
    if start.take_over && predecessor.is_none() {
        tracing::info!("nobody answers at the control socket: there is nothing to take over");
    }
    let mut claims = Claims::new(config, predecessor.as_ref())?;
    let ((caches, volumes), predecessor) =
        open_all(config, &mut created, predecessor, &mut claims, start.wait_for_disks)?;
    let daemon = Arc::new(Daemon::new(caches, signals.servers(), file, config)?);
    let served = volumes
        .into_iter()
        .map(|(config, volume, is_new)| daemon.enter(config, volume, is_new))
        .collect::<Result<Vec<_>, _>>()?;
    drop(starting);
    let (gate, api) = (Arc::new(Gate::default()), Arc::new(Mutex::new(None)));
    let opened = open_front_ends(&daemon, &served, claims.front_ends).and_then(|()| {
        if let Some(claim) = claims.control {
            *lock(&api) = Some(claim.open(&daemon, signals.servers().running())?);
        }
        claims.upgrade.map(|claim| Giver::open(claim, &daemon, &api, &gate)).transpose()
    });
    let giver = match opened {
        Ok(giver) => giver,
        // Those that serve already must end before their volumes do.
        Err(error) => return daemon.stop_front_ends().and(Err(error)),
    };
    if let Err(error) = sandbox::keep_to_calls(config) {
        return daemon.stop_front_ends().and(Err(error));
    }
    if let Some(predecessor) = predecessor {
        predecessor.say_serving();
        tracing::info!("taken over");
    }
    created.keep();
    announce::print(&announcement(&daemon, &served));
    drop(served);
    warn_of_unused(&passed, config);
    notifier.ready(&daemon);

    let ended = wait(&mut signals, &daemon, &mut notifier);
    gate.close();
    notifier.stopping();
    signals.unblock();
    bound_the_stop(&daemon);
    drop(giver);
    drop(lock(&api).take());
    daemon.jobs().close();
    let served = daemon.stop_front_ends();
    show_counters(&daemon);
    let closed = if daemon.close() { Exit::Done } else { Exit::Unanswered };
    ended.and(served.map(|()| closed))
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

/// Where the VMMs of one volume come from.
enum ClaimedFrontEnd {
    New(Claimed),
    /// From the predecessor, which has not said yet.
    Awaited,
    Resumed(FrontEndRest),
}

/// Every endpoint, before anybody can connect to it.
struct Claims {
    names: Vec<String>,
    front_ends: Vec<ClaimedFrontEnd>,
    control: Option<api::Claimed>,
    upgrade: Option<Claimed>,
}

impl Claims {
    fn new(config: &Config, predecessor: Option<&Predecessor>) -> Result<Self, RunError> {
        if let Some(predecessor) = predecessor {
            predecessor.judge(config.volumes())?;
        }
        let claim = |volume: &VolumeConfig| match predecessor {
            Some(predecessor) if predecessor.serves(volume.name.as_str()) => Ok(ClaimedFrontEnd::Awaited),
            _ => Claimed::new(&volume.endpoint).map(ClaimedFrontEnd::New),
        };
        let front_ends = config.volumes().iter().map(claim).collect::<Result<Vec<_>, _>>()?;
        let names = config.volumes().iter().map(|volume| volume.name.to_string()).collect();
        let (mut control, mut upgrade) = (None, None);
        if let (Some(config), None) = (config.control(), predecessor) {
            control = Some(api::Claimed::new(config)?);
            upgrade = match Giver::claim(config) {
                Ok(claim) => Some(claim),
                Err(RunError::Handover(error)) => {
                    tracing::warn!("this daemon cannot be taken over from: {error}");
                    None
                }
                Err(error) => return Err(error),
            };
        }
        Ok(Self { names, front_ends, control, upgrade })
    }

    /// The predecessor has left it all.
    fn take(&mut self, mut estate: Estate) {
        (self.control, self.upgrade) = (estate.control, estate.upgrade);
        for (name, claim) in self.names.iter().zip(&mut self.front_ends) {
            if let Some(rest) = estate.front_ends.remove(name) {
                *claim = ClaimedFrontEnd::Resumed(rest);
            }
        }
    }
}

/// What the start has opened: the caches, and the volumes attached to them.
type Opened = (Vec<OpenCache>, Vec<(VolumeConfig, Arc<Volume<Host>>, bool)>);

/// Opens everything. What was taken over is ours when this returns; on an error the other one goes on,
/// or what was taken over is left as after a kill.
fn open_all(
    config: &Config,
    created: &mut Created,
    mut predecessor: Option<Predecessor>,
    claims: &mut Claims,
    wait: Duration,
) -> Result<(Opened, Option<Predecessor>), RunError> {
    let (images, wanted) = match prepare(config, created, predecessor.as_ref(), wait) {
        Ok(prepared) => prepared,
        Err(error) => {
            if let Some(predecessor) = predecessor {
                predecessor.decline(&sentence(&error));
            }
            return Err(error);
        }
    };
    let mut aheads: Vec<_> = images.iter().map(|_| ReadAhead::default()).collect();
    if let (Some(predecessor), Some(control)) = (&mut predecessor, config.control()) {
        for (ahead, image) in aheads.iter_mut().zip(&images) {
            *ahead = ReadAhead::read(&image.pmem, Host::threads());
        }
        claims.take(predecessor.take_over(control)?);
    }
    // All are known to go together: only now anything is written to what was there before.
    let begun = Instant::now();
    let mut caches = Vec::new();
    for ((cache, image), ahead) in config.caches().iter().zip(images).zip(aheads) {
        caches.push(open_cache(cache, image, &ahead)?);
    }
    let recovered = begun.elapsed();
    let mut volumes = Vec::new();
    for (config, options, is_new) in wanted {
        let on = &caches[config.cache];
        let of_attach = |error| RunError::attach(&on.config, config)(error);
        on.cache.may_share(config.name.as_str(), &config.share.shares).map_err(|e| of_attach(e.into()))?;
        let volume = on.cache.attach(options).map_err(of_attach)?;
        set_wishes(config, &volume).map_err(of_attach)?;
        if config.read_only && !volume.is_clean() {
            tracing::info!("volume {} is read-only: its dirty data stays in the cache", config.name);
        }
        volumes.push((config.clone(), volume, is_new));
    }
    let attached = begun.elapsed() - recovered;
    tracing::info!("opened: recovery_us={} attach_us={}", recovered.as_micros(), attached.as_micros());
    Ok(((caches, volumes), predecessor))
}

/// The images of the caches, and what is to be attached to them.
type Prepared<'a> = (Vec<Image>, Vec<(&'a VolumeConfig, AttachOptions<Host>, bool)>);

/// Opens images and disks, and judges whether they go together. Writes only to what is new.
fn prepare<'a>(
    config: &'a Config,
    created: &mut Created,
    predecessor: Option<&Predecessor>,
    wait: Duration,
) -> Result<Prepared<'a>, RunError> {
    if let Some(path) = config.state_dir() {
        created.make_directory(path).map_err(|source| RunError::Directory { path: path.into(), source })?;
    }
    // What exists first, then the disks: a cache is made only once those are known to be there.
    let mut existing = Vec::new();
    for cache in config.caches() {
        existing.push(if !cache.path.is_one() || cache.path.first().exists() {
            Some(open_image(cache, predecessor, created)?)
        } else {
            None
        });
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
            wait,
            taken: predecessor.and_then(|other| other.disk(volume.name.as_str(), &volume.backing.path)),
        };
        disks.push(disk::open_or_create(&options, created).map_err(RunError::Disk)?);
    }
    let mut images = Vec::new();
    for (cache, image) in config.caches().iter().zip(existing) {
        images.push(match image {
            Some(image) => image,
            None => open_image(cache, predecessor, created)?,
        });
    }
    let mut wanted = Vec::new();
    for (volume, disk) in config.volumes().iter().zip(disks) {
        let cache = &config.caches()[volume.cache];
        let taken = predecessor.and_then(|other| other.redo(volume.name.as_str()));
        let redo = open_redo(volume, &disk.disk, taken, created)?;
        let options = attach_options(cache, volume, disk.disk, redo);
        cache::would_attach(&images[volume.cache].pmem, &options).map_err(RunError::attach(cache, volume))?;
        wanted.push((volume, options, disk.is_new));
    }
    Ok((images, wanted))
}

fn open_image(
    config: &CacheConfig,
    predecessor: Option<&Predecessor>,
    created: &mut Created,
) -> Result<Image, RunError> {
    let taken = predecessor.and_then(|other| other.cache(&config.path)).unwrap_or_default();
    let options = ImageOptions {
        path: &config.path,
        size: config.size,
        segment_size: config.segment_size,
        assume_dax: config.assume_dax,
        taken: &taken,
    };
    Ok(image::open_or_create(&options, created)?)
}

fn open_cache(config: &CacheConfig, image: Image, ahead: &ReadAhead) -> Result<OpenCache, RunError> {
    let (cache, report) = Cache::open_after(Arc::clone(&image.pmem), SystemClock::default(), ahead)
        .map_err(of_cache(config.path.first()))?;
    log_opened(config, &image.pmem, &report);
    cache.set_scrub(ScrubOptions {
        bytes_per_s: u64::from(config.scrub_mib_s) << 20,
        interval_ms: u64::from(config.scrub_interval_h) * 3_600_000,
    });
    cache.set_index_memory_max(config.index_memory_max);
    let (config, workers) = (config.clone(), Mutex::default());
    Ok(OpenCache { config, pmem: image.pmem, cache, is_new: image.is_new, workers })
}

fn log_opened(config: &CacheConfig, pmem: &MappedPmem, report: &RecoveryReport) {
    let (path, class) = (config.path.display(), pmem.class());
    tracing::info!(
        "cache {path} opened: class={class} volumes={} segments_used={} keys={} dirty_bytes={} \
         cached_bytes={} torn_records={} was_clean={} scan_us={} build_us={}",
        report.volumes,
        report.segments_used,
        report.keys,
        report.dirty_bytes,
        report.cached_bytes,
        report.torn_records,
        report.was_clean,
        report.scan_us,
        report.build_us
    );
    for finding in &report.findings {
        tracing::warn!("cache {path}: {finding}");
    }
    if class == MediaClass::AssumeDax {
        tracing::warn!("cache {path} is assumed to be persistent memory and is not: tests only");
    }
}

/// What is asked of a volume while it runs; an error if the cache cannot give it what it is to have.
pub(super) fn set_wishes(config: &VolumeConfig, volume: &Volume<Host>) -> Result<(), AttachError> {
    config.share.set(volume)?;
    let timeout_ms = u64::from(config.backing_timeout_s) * 1000;
    volume.set_on_backing_error(on_backing_error(config.on_backing_error), timeout_ms);
    volume.set_max_lag_ms(u64::from(config.max_lag_s) * 1000);
    volume.set_max_dirty(config.max_dirty);
    Ok(())
}

/// The volume's redo area: what grouped order needs, and what an earlier start may have left a group in.
pub(super) fn open_redo(
    config: &VolumeConfig,
    disk: &Disk,
    taken: Option<Arc<fs::File>>,
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
        taken,
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
        group: config.group.as_ref().map(|name| name.as_str().to_owned()),
    }
}

fn open_front_ends(
    daemon: &Daemon,
    served: &[Arc<Served>],
    claims: Vec<ClaimedFrontEnd>,
) -> Result<(), RunError> {
    served.iter().zip(claims).try_for_each(|(served, claim)| match claim {
        ClaimedFrontEnd::New(claim) => daemon.open_front_end(served, claim),
        ClaimedFrontEnd::Resumed(rest) => daemon.resume_front_end(served, rest),
        // It had ended before, and its socket with it.
        ClaimedFrontEnd::Awaited => Ok(()),
    })
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
