//! What is to be served, valid by construction.
//!
//! A [`Config`] comes from the command line (`Config::from_args`) or from a file (`file::load`);
//! both end in `Config::new`, which refuses what does not fit together, so nobody after it asks
//! again. The only look at the file system is to see through two names of one thing.

mod confine;
mod error;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::ValueEnum;

pub use self::confine::{Confinement, Sandbox};
pub use self::error::ConfigError;
use super::cli::ServeArgs;
use super::share::ShareConfig;
use super::suggest;
use super::threads::ThreadsConfig;
use super::value::{Name, Serial, SocketPath};
use crate::tools::image::Sizing;
use crate::tools::members::CachePaths;

/// Size of the embedded default's cache.
pub const DEFAULT_CACHE_SIZE: u64 = 1 << 30;
/// Size of the embedded default's disk.
pub const DEFAULT_DISK_SIZE: u64 = 10 << 30;
/// Queues offered unless told: QEMU opens one per virtual CPU and does not start with fewer.
pub const DEFAULT_QUEUES: u16 = 256;
/// Largest ring unless told: what Firecracker and crosvm use; QEMU and Cloud Hypervisor use 128.
pub const DEFAULT_QUEUE_SIZE: u16 = 256;
/// Seconds until a disk that does not answer has failed, unless told: what Linux gives a disk.
pub const DEFAULT_BACKING_TIMEOUT_S: u32 = 30;
/// Scrubbing unless told, in MiB a second: a hundredth of what memory gives, a TiB in nine hours.
pub const DEFAULT_SCRUB_MIB_S: u32 = 32;
/// Hours from one scrub to the next unless told.
pub const DEFAULT_SCRUB_INTERVAL_H: u32 = 24;
/// Bytes read in one go before what follows is no longer cached.
pub const DEFAULT_SEQUENTIAL_CUTOFF: u64 = 4 << 20;
/// Name of the volume, and of the cache, when there is only one and it was given none.
pub const DEFAULT_VOLUME: &str = "disk0";

/// What is cached and when a write is done.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    /// A write is done when the cache has it
    #[default]
    Writeback,
    /// A write is done when the disk has it; the cache keeps a copy
    Writethrough,
    /// A write is done when the disk has it; the cache keeps only what is read
    Writearound,
    /// A write is done when the disk has it; what is cached serves, and nothing is added
    Readonly,
    /// The cache is neither read nor filled
    Passthrough,
}

/// In which order write-back reaches the backing disk.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Order {
    /// Flush by flush, as the guest wrote: the disk alone is always a state the guest's disk was in
    #[default]
    Strict,
    /// Several flushes' worth at once, by way of a redo area: the disk and that area together are
    /// always a state the guest's disk was in
    Grouped,
    /// By address, newest only: faster, and the disk alone is nothing without the cache
    Relaxed,
}

/// Which reads become cached.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Admission {
    /// All; what is not read again soon gives way first
    #[default]
    Adaptive,
    /// What is missed twice: fewer writes to the cache
    SecondMiss,
    /// None: the cache holds writes alone
    Never,
}

/// What a discard does on the backing disk.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Discard {
    /// The space is given back
    #[default]
    Pass,
    /// The space stays allocated
    Keep,
}

/// What becomes of requests that need the backing disk while it fails.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnBackingError {
    /// They wait, and are tried again until it works
    #[default]
    Wait,
    /// They end with an error, and so do writes once space has run out
    Error,
    /// They end with an error, and so does every write
    #[value(name = "read_only", alias = "read-only")]
    ReadOnly,
}

/// How the backing disk is to be read.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackingFormat {
    /// Byte for byte, whatever it looks like
    Raw,
}

/// One cache.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CacheConfig {
    /// What volumes call it.
    pub name: Name,
    /// Device or file, or several that are one cache.
    pub path: CachePaths,
    /// How large.
    pub size: Sizing,
    /// Segment size if it is created.
    pub segment_size: Option<u32>,
    /// Whether RAM passes as persistent.
    pub assume_dax: bool,
    /// Whether write-back is allowed on media that do not survive the host.
    pub allow_volatile: bool,
    /// Scrubbing in MiB a second, 0 for none.
    pub scrub_mib_s: u32,
    /// Hours from one scrub to the next.
    pub scrub_interval_h: u32,
    /// Bytes of RAM that the index may take, 0 for no bound.
    pub index_memory_max: u64,
}

/// Where a front end finds a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Endpoint {
    /// A socket made at a path.
    Socket {
        /// Where.
        path: SocketPath,
        /// Its permission bits.
        mode: u32,
        /// Its group, by name or number, if not the process's.
        group: Option<String>,
    },
    /// An inherited descriptor.
    Inherited(i32),
}

impl Endpoint {
    /// A socket at `path`. Unless told, its group may connect exactly if one was chosen.
    pub fn socket(path: SocketPath, mode: Option<u32>, group: Option<String>) -> Self {
        let mode = mode.unwrap_or(if group.is_some() { 0o660 } else { 0o600 });
        Endpoint::Socket { path, mode, group }
    }
}

/// The disk behind a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackingConfig {
    /// Raw image or block device.
    pub path: PathBuf,
    /// Whether it is raw whatever it looks like.
    pub raw: bool,
    /// How large.
    pub size: Sizing,
}

/// One volume: a disk that one VM sees.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeConfig {
    /// Its name in the cache, in logs and in counters.
    pub name: Name,
    /// Index of its cache in [`Config::caches`].
    pub cache: usize,
    /// Where a front end finds it.
    pub endpoint: Endpoint,
    /// The disk behind it.
    pub backing: BackingConfig,
    /// Queues offered.
    pub queues: u16,
    /// Largest ring.
    pub queue_size: u16,
    /// What is cached.
    pub mode: Mode,
    /// In which order write-back goes.
    pub order: Order,
    /// The consistency group it is in.
    pub group: Option<Name>,
    /// Where groups lie before they are on the disk, if not beside it.
    pub redo: Option<PathBuf>,
    /// Bytes to make that with, if not by default.
    pub redo_size: Option<u64>,
    /// Seconds by which the disk may lag behind; 0 for no wish.
    pub max_lag_s: u32,
    /// Most dirty bytes; 0 for as many as there is space.
    pub max_dirty: u64,
    /// What it may hold of the cache, and ask for.
    pub share: ShareConfig,
    /// Whether hits verify their checksums.
    pub data_crc: bool,
    /// Block size the guest sees, if not the disk's.
    pub block_size: Option<u32>,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What GET_ID answers.
    pub serial: Serial,
    /// What a discard does behind the cache.
    pub discard: Discard,
    /// What becomes of requests that need the disk while it fails.
    pub on_backing_error: OnBackingError,
    /// Seconds until a disk that does not answer has failed, 0 for never.
    pub backing_timeout_s: u32,
    /// Which reads become cached.
    pub admission: Admission,
    /// Bytes read in one go from which on they are not cached, 0 for never.
    pub sequential_cutoff: u64,
    /// The threads of its queues.
    pub threads: ThreadsConfig,
    /// Whether a sidecar stands beside the disk; `None` leaves it as it is.
    pub sidecar: Option<bool>,
    /// Whether another disk than the cache belongs to is accepted.
    pub force_identity: bool,
    /// Whether the operator gives up what a damaged volume lost.
    pub accept_loss: bool,
}

impl VolumeConfig {
    /// A volume with every choice at its default.
    pub fn new(name: Name, cache: usize, endpoint: Endpoint, backing: BackingConfig) -> Self {
        let serial = Serial::of(&name);
        Self {
            name,
            cache,
            endpoint,
            backing,
            queues: DEFAULT_QUEUES,
            queue_size: DEFAULT_QUEUE_SIZE,
            mode: Mode::default(),
            order: Order::default(),
            group: None,
            redo: None,
            redo_size: None,
            max_lag_s: 0,
            max_dirty: 0,
            share: ShareConfig::default(),
            data_crc: false,
            block_size: None,
            read_only: false,
            serial,
            discard: Discard::default(),
            on_backing_error: OnBackingError::default(),
            backing_timeout_s: DEFAULT_BACKING_TIMEOUT_S,
            admission: Admission::default(),
            sequential_cutoff: DEFAULT_SEQUENTIAL_CUTOFF,
            threads: ThreadsConfig::default(),
            sidecar: None,
            force_identity: false,
            accept_loss: false,
        }
    }
}

/// Where the running daemon is told what to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ControlConfig {
    /// The socket of the API.
    pub socket: SocketPath,
    /// Its permission bits.
    pub mode: u32,
    /// Its group, by name or number, if not the process's. Its members may use the API.
    pub group: Option<String>,
    /// A loopback address that answers `/metrics` and nothing else.
    pub metrics: Option<SocketAddr>,
}

impl ControlConfig {
    /// A socket at `path` for its owner, and for its group exactly if one was chosen.
    pub fn new(socket: SocketPath) -> Self {
        Self { socket, mode: 0o660, group: None, metrics: None }
    }
}

/// What an operator has agreed to for this one start. Never in a file: it would be agreed to again
/// at every later start.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Consents {
    /// Volumes whose backing disk may be another one; empty text for the only volume.
    pub force_identity: Vec<String>,
    /// Volumes that may lose what is damaged; empty text for the only volume.
    pub accept_loss: Vec<String>,
}

/// Everything to be served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    caches: Vec<CacheConfig>,
    volumes: Vec<VolumeConfig>,
    control: Option<ControlConfig>,
    state_dir: Option<PathBuf>,
    confinement: Confinement,
}

impl Config {
    /// Joins what fits together under a control socket: volumes may then come later.
    ///
    /// # Errors
    /// The first thing that does not.
    pub fn controlled(
        caches: Vec<CacheConfig>,
        volumes: Vec<VolumeConfig>,
        consents: &Consents,
        control: Option<ControlConfig>,
    ) -> Result<Self, ConfigError> {
        let Some(control) = control else { return Self::new(caches, volumes, consents) };
        if let Some(volume) = volumes.iter().find(|volume| match &volume.endpoint {
            Endpoint::Socket { path, .. } => canonical(path.as_path()) == canonical(control.socket.as_path()),
            Endpoint::Inherited(_) => false,
        }) {
            return Err(ConfigError::ControlIsVolume(volume.name.clone()));
        }
        let joined = Self::join(caches, volumes, consents)?;
        Ok(Self { control: Some(control), ..joined })
    }

    /// Joins what fits together.
    ///
    /// # Errors
    /// The first thing that does not.
    pub fn new(
        caches: Vec<CacheConfig>,
        volumes: Vec<VolumeConfig>,
        consents: &Consents,
    ) -> Result<Self, ConfigError> {
        if volumes.is_empty() {
            return Err(ConfigError::NoVolume);
        }
        Self::join(caches, volumes, consents)
    }

    fn join(
        caches: Vec<CacheConfig>,
        mut volumes: Vec<VolumeConfig>,
        consents: &Consents,
    ) -> Result<Self, ConfigError> {
        assert!(volumes.iter().all(|volume| volume.cache < caches.len()), "a volume without its cache");
        refuse_shared_caches(&caches)?;
        refuse_shared_volumes(&volumes)?;
        for volume in &volumes {
            let path = canonical(&volume.backing.path);
            if caches.iter().flat_map(|cache| cache.path.all()).any(|cache| canonical(cache) == path) {
                let path = volume.backing.path.display().to_string();
                return Err(ConfigError::CacheIsBacking { path, volume: volume.name.clone() });
            }
            if let (Some(block_size), Some(size)) = (volume.block_size, volume.backing.size.to_create())
                && !size.is_multiple_of(block_size.into())
            {
                let volume = volume.name.clone();
                return Err(ConfigError::DiskNotWholeBlocks { volume, size, block_size });
            }
        }
        for index in consents_for("force-identity", &consents.force_identity, &volumes)? {
            volumes[index].force_identity = true;
        }
        for index in consents_for("accept-loss", &consents.accept_loss, &volumes)? {
            volumes[index].accept_loss = true;
        }
        Ok(Self { caches, volumes, control: None, state_dir: None, confinement: Confinement::default() })
    }

    /// The configuration that a command line without `--config` describes.
    ///
    /// # Errors
    /// What is missing or does not fit together.
    pub fn from_args(args: &ServeArgs, default_state_dir: Option<PathBuf>) -> Result<Self, ConfigError> {
        let (cache, volume) = (&args.cache, &args.volume);
        let endpoint = match (&volume.socket, volume.fd) {
            (Some(path), _) => {
                Endpoint::socket(path.clone(), volume.socket_mode, volume.socket_group.clone())
            }
            (None, Some(fd)) => Endpoint::Inherited(fd),
            (None, None) => return Err(ConfigError::NoEndpoint),
        };
        if !cache.cache.is_empty() && volume.backing.is_none() {
            return Err(ConfigError::CacheWithoutBacking);
        }
        let state = StateDir::new(cache.state_dir.clone(), default_state_dir);
        let cache_default = cache.cache.is_empty().then_some(DEFAULT_CACHE_SIZE);
        let cache = CacheConfig {
            name: default_name(),
            path: state.cache(&cache.cache)?,
            size: Sizing::of(cache.cache_size, cache_default),
            segment_size: cache.segment_size,
            assume_dax: cache.assume_dax,
            allow_volatile: cache.allow_volatile,
            scrub_mib_s: cache.scrub_mib_s.unwrap_or(DEFAULT_SCRUB_MIB_S),
            scrub_interval_h: cache.scrub_interval_h.unwrap_or(DEFAULT_SCRUB_INTERVAL_H),
            index_memory_max: cache.index_memory_max.unwrap_or(0),
        };
        let disk_default = volume.backing.is_none().then_some(DEFAULT_DISK_SIZE);
        let backing = BackingConfig {
            path: state.or_in(volume.backing.as_ref(), DISK_FILE)?,
            raw: volume.backing_format == Some(BackingFormat::Raw),
            size: Sizing::of(volume.backing_size, disk_default),
        };
        let name = volume.name.clone().unwrap_or_else(default_name);
        let mut config = VolumeConfig::new(name, 0, endpoint, backing);
        config.queues = volume.queues.unwrap_or(config.queues);
        config.queue_size = volume.queue_size.unwrap_or(config.queue_size);
        config.mode = volume.cache_mode.unwrap_or(config.mode);
        config.order = volume.order.unwrap_or(config.order);
        config.group = volume.group.clone();
        config.redo = volume.redo.clone();
        config.redo_size = volume.redo_size;
        config.max_lag_s = volume.max_lag_s.unwrap_or(config.max_lag_s);
        config.max_dirty = volume.max_dirty.unwrap_or(config.max_dirty);
        config.share = args.share.applied_to(config.share);
        config.data_crc = volume.data_crc;
        config.block_size = volume.block_size;
        config.read_only = volume.read_only;
        config.serial = volume.serial.unwrap_or(config.serial);
        config.discard = volume.discard.unwrap_or(config.discard);
        config.on_backing_error = volume.on_backing_error.unwrap_or(config.on_backing_error);
        config.backing_timeout_s = volume.backing_timeout_s.unwrap_or(config.backing_timeout_s);
        config.admission = volume.admission.unwrap_or(config.admission);
        config.sequential_cutoff = volume.sequential_cutoff.unwrap_or(config.sequential_cutoff);
        config.threads = ThreadsConfig::from(volume.threads());
        config.sidecar = volume.sidecar;
        let consents =
            Consents { force_identity: args.force_identity.clone(), accept_loss: args.accept_loss.clone() };
        let mut config = Self::controlled(vec![cache], vec![config], &consents, args.control.config())?;
        let by_default = args.cache.cache.is_empty() || volume.backing.is_none();
        config.state_dir = state.0.filter(|_| by_default);
        config.confine(args.sandbox);
        Ok(config)
    }

    /// The directory of the files that are there by default, if any is: it may be made.
    pub fn state_dir(&self) -> Option<&Path> {
        self.state_dir.as_deref()
    }

    /// The caches.
    pub fn caches(&self) -> &[CacheConfig] {
        &self.caches
    }

    /// Where it is told what to do, if anywhere.
    pub fn control(&self) -> Option<&ControlConfig> {
        self.control.as_ref()
    }

    /// Replaces where it is told what to do, if the command line says where.
    pub fn set_control(&mut self, control: Option<ControlConfig>) {
        self.control = control.or(self.control.take());
    }

    /// The volumes; at least one, unless there is a control socket by which one may come.
    pub fn volumes(&self) -> &[VolumeConfig] {
        &self.volumes
    }
}

/// File of the embedded default's cache.
const CACHE_FILE: &str = "cache.img";
/// File of the embedded default's disk.
const DISK_FILE: &str = "disk.img";

/// The cache of a verb that was given none, or the one it was given.
///
/// # Errors
/// There is no place where the default could be.
pub fn cache_path(
    cache: &[PathBuf],
    state_dir: &Option<PathBuf>,
    default_state_dir: Option<PathBuf>,
) -> Result<CachePaths, ConfigError> {
    StateDir::new(state_dir.clone(), default_state_dir).cache(cache)
}

/// Where state is kept by convention: the user's own place, or for root the system's.
pub fn default_state_dir(
    is_root: bool,
    xdg_state_home: Option<PathBuf>,
    home: Option<PathBuf>,
) -> Option<PathBuf> {
    if is_root {
        return Some("/var/lib/pcache-vhost".into());
    }
    // The XDG base directory specification: a relative path is to be ignored.
    let xdg = xdg_state_home.filter(|path| path.is_absolute());
    let base = xdg.or_else(|| Some(home.filter(|path| path.is_absolute())?.join(".local/state")));
    Some(base?.join("pcache-vhost"))
}

struct StateDir(Option<PathBuf>);

impl StateDir {
    fn new(given: Option<PathBuf>, default: Option<PathBuf>) -> Self {
        Self(given.or(default))
    }

    fn cache(&self, given: &[PathBuf]) -> Result<CachePaths, ConfigError> {
        match CachePaths::new(given.to_vec()) {
            Some(paths) => Ok(paths),
            None => Ok(self.or_in(None, CACHE_FILE)?.into()),
        }
    }

    fn or_in(&self, given: Option<&PathBuf>, file: &str) -> Result<PathBuf, ConfigError> {
        match (given, &self.0) {
            (Some(path), _) => Ok(path.clone()),
            (None, Some(dir)) => Ok(dir.join(file)),
            (None, None) => Err(ConfigError::NoStateDir),
        }
    }
}

fn default_name() -> Name {
    DEFAULT_VOLUME.parse().expect("the default name is a name")
}

fn refuse_shared_caches(caches: &[CacheConfig]) -> Result<(), ConfigError> {
    for (index, cache) in caches.iter().enumerate() {
        let earlier = &caches[..index];
        if earlier.iter().any(|other| other.name == cache.name) {
            return Err(ConfigError::SharedCache { what: "name", value: cache.name.to_string() });
        }
        let others = earlier.iter().flat_map(|other| other.path.all());
        let mut seen: Vec<PathBuf> = others.map(|path| canonical(path)).collect();
        for path in cache.path.all() {
            if seen.contains(&canonical(path)) {
                return Err(ConfigError::SharedCache { what: "path", value: path.display().to_string() });
            }
            seen.push(canonical(path));
        }
    }
    Ok(())
}

fn refuse_shared_volumes(volumes: &[VolumeConfig]) -> Result<(), ConfigError> {
    let mut seen: HashMap<(&'static str, PathBuf), &Name> = HashMap::new();
    for volume in volumes {
        let mut traits = vec![
            ("name", PathBuf::from(volume.name.as_str())),
            ("backing disk", canonical(&volume.backing.path)),
        ];
        if let Endpoint::Socket { path, .. } = &volume.endpoint {
            traits.push(("socket", canonical(path.as_path())));
        }
        for (what, value) in traits {
            let shown = value.display().to_string();
            if let Some(first) = seen.insert((what, value), &volume.name) {
                let (first, second) = (first.clone(), volume.name.clone());
                return Err(ConfigError::Shared { first, second, what, value: shown });
            }
        }
    }
    Ok(())
}

/// The path with its links followed as far as it exists, so that two names of one thing meet.
fn canonical(path: &Path) -> PathBuf {
    if let Ok(path) = path.canonicalize() {
        return path;
    }
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.into());
    match (absolute.parent().and_then(|parent| parent.canonicalize().ok()), absolute.file_name()) {
        (Some(parent), Some(file)) => parent.join(file),
        _ => absolute,
    }
}

fn consents_for(
    option: &'static str,
    given: &[String],
    volumes: &[VolumeConfig],
) -> Result<Vec<usize>, ConfigError> {
    let names = || volumes.iter().map(|volume| volume.name.as_str());
    given
        .iter()
        .map(|name| match (name.as_str(), volumes.len()) {
            ("", 1) => Ok(0),
            ("", _) => Err(ConfigError::WhichVolume { option }),
            (name, _) => names().position(|candidate| candidate == name).ok_or_else(|| {
                let nearest = suggest::nearest(name, names()).map(str::to_owned);
                ConfigError::NoSuchVolume { option, given: name.into(), nearest }
            }),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::cli::Cli;
    use super::*;
    use crate::cache::{IoLimits, Shares};
    use clap::Parser;

    fn serve(line: &str) -> Result<Config, ConfigError> {
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        Config::from_args(&cli.serve, Some("/state".into()))
    }

    #[test]
    fn a_socket_alone_is_the_embedded_default() {
        let config = serve("pcache-vhost --socket /run/s").unwrap();
        assert_eq!(config.state_dir(), Some(Path::new("/state")));
        let cache = &config.caches()[0];
        assert_eq!(
            (cache.path.first(), cache.size),
            (Path::new("/state/cache.img"), Sizing::AsFoundOr(1 << 30))
        );
        let volume = &config.volumes()[0];
        assert_eq!(volume.backing.path, Path::new("/state/disk.img"));
        assert_eq!(volume.backing.size, Sizing::AsFoundOr(10 << 30));
        assert_eq!(
            (volume.mode, volume.order, volume.discard),
            (Mode::Writeback, Order::Strict, Discard::Pass)
        );
        assert_eq!((volume.queues, volume.queue_size, volume.threads.poll_us), (256, 256, 32));
        assert_eq!(&volume.serial.bytes()[..6], b"disk0\0");
        let path = "/run/s".parse().unwrap();
        assert_eq!(volume.endpoint, Endpoint::Socket { path, mode: 0o600, group: None });
        assert!(!volume.read_only && !volume.data_crc && !volume.force_identity && !volume.accept_loss);
    }

    #[test]
    fn every_option_reaches_its_field() {
        let config = serve(
            "pcache-vhost --socket-path /run/s --socket-group kvm --cache /c --cache-size 2GiB \
             --segment-size 1MiB --assume-dax --allow-volatile --name web --blk-file /b \
             --backing-format raw --backing-size 8GiB --queues 4 --queue-size 64 \
             --cache-mode writearound --order relaxed --group vm --redo /r --redo-size 32MiB --max-lag-s 60 \
             --max-dirty 1GiB --data-crc --block-size 4096 --read-only --serial S9 --discard keep \
             --admission second-miss --sequential-cutoff 1MiB --poll-us 7 --sidecar=false \
             --force-identity --accept-loss=web --on-backing-error read_only --backing-timeout-s 9 \
             --scrub-mib-s 5 --scrub-interval-h 6 --index-memory-max 64MiB \
             --cache-min 1GiB --weight 7 --iops 9 --burst-ms 8",
        )
        .unwrap();
        let cache = CacheConfig {
            name: default_name(),
            path: "/c".into(),
            size: Sizing::Exactly(2 << 30),
            segment_size: Some(1 << 20),
            assume_dax: true,
            allow_volatile: true,
            scrub_mib_s: 5,
            scrub_interval_h: 6,
            index_memory_max: 64 << 20,
        };
        let path = "/run/s".parse().unwrap();
        let volume = VolumeConfig {
            name: "web".parse().unwrap(),
            cache: 0,
            endpoint: Endpoint::Socket { path, mode: 0o660, group: Some("kvm".into()) },
            backing: BackingConfig { path: "/b".into(), raw: true, size: Sizing::Exactly(8 << 30) },
            queues: 4,
            queue_size: 64,
            mode: Mode::Writearound,
            order: Order::Relaxed,
            group: Some("vm".parse().unwrap()),
            redo: Some("/r".into()),
            redo_size: Some(32 << 20),
            max_lag_s: 60,
            max_dirty: 1 << 30,
            share: ShareConfig {
                shares: Shares { min: 1 << 30, weight: 7, ..Shares::default() },
                limits: IoLimits { iops: 9, burst_ms: 8, ..IoLimits::default() },
            },
            data_crc: true,
            block_size: Some(4096),
            read_only: true,
            serial: "S9".parse().unwrap(),
            discard: Discard::Keep,
            on_backing_error: OnBackingError::ReadOnly,
            backing_timeout_s: 9,
            admission: Admission::SecondMiss,
            sequential_cutoff: 1 << 20,
            threads: ThreadsConfig { poll_us: 7, ..ThreadsConfig::default() },
            sidecar: Some(false),
            force_identity: true,
            accept_loss: true,
        };
        assert_eq!((config.caches(), config.volumes()), (&[cache][..], &[volume][..]));
        assert_eq!(config.state_dir(), None);
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let rows = [
            ("pcache-vhost", ConfigError::NoEndpoint),
            ("pcache-vhost --socket /s --cache /c", ConfigError::CacheWithoutBacking),
            (
                "pcache-vhost --socket /s --cache /x --backing /x",
                ConfigError::CacheIsBacking { path: "/x".into(), volume: default_name() },
            ),
            (
                "pcache-vhost --socket /s --block-size 4096 --backing /b --backing-size 512",
                ConfigError::DiskNotWholeBlocks { volume: default_name(), size: 512, block_size: 4096 },
            ),
            (
                "pcache-vhost --socket /s --accept-loss=disk1",
                ConfigError::NoSuchVolume {
                    option: "accept-loss",
                    given: "disk1".into(),
                    nearest: Some("disk0".into()),
                },
            ),
        ];
        for (line, error) in rows {
            assert_eq!(serve(line), Err(error), "{line}");
        }
    }

    #[test]
    fn a_blk_file_without_a_cache_uses_the_default_cache_and_is_never_created() {
        let config = serve("pcache-vhost --fd 3 --blk-file /disk --read-only").unwrap();
        assert_eq!(config.caches()[0].path.first(), Path::new("/state/cache.img"));
        assert_eq!(config.volumes()[0].backing.size, Sizing::AsFound);
        assert_eq!(config.volumes()[0].endpoint, Endpoint::Inherited(3));
    }

    #[test]
    fn options_that_contradict_each_other_do_not_parse() {
        for line in [
            "pcache-vhost --socket /s --fd 3",
            "pcache-vhost --fd 3 --socket-mode 0600",
            "pcache-vhost --config /f --socket /s",
            "pcache-vhost --config /f --cache /c",
            "pcache-vhost --config /f --state-dir /d",
            "pcache-vhost --config /f --queues 2",
            "pcache-vhost --socket /s --socket-path /t",
            "pcache-vhost --socket /s check",
        ] {
            let error = Cli::try_parse_from(line.split_whitespace()).unwrap_err();
            assert_eq!(error.kind(), clap::error::ErrorKind::ArgumentConflict, "{line}");
        }
    }

    #[test]
    fn volumes_may_not_share_a_name_a_socket_or_a_disk() {
        let cache = serve("pcache-vhost --socket /s").unwrap().caches()[0].clone();
        let volume = |name: &str, socket: &str, disk: &str| {
            let endpoint = Endpoint::socket(socket.parse().unwrap(), None, None);
            let backing = BackingConfig { path: disk.into(), raw: false, size: Sizing::AsFound };
            VolumeConfig::new(name.parse().unwrap(), 0, endpoint, backing)
        };
        let new = |volumes| Config::new(vec![cache.clone()], volumes, &Consents::default());
        assert!(new(vec![volume("a", "/1", "/x"), volume("b", "/2", "/y")]).is_ok());
        let rows = [
            (volume("a", "/2", "/y"), "name"),
            (volume("b", "/./1", "/y"), "socket"),
            (volume("b", "/2", "/../x"), "backing disk"),
        ];
        for (second, shared) in rows {
            let Err(ConfigError::Shared { what, .. }) = new(vec![volume("a", "/1", "/x"), second]) else {
                panic!("sharing a {shared} was accepted");
            };
            assert_eq!(what, shared);
        }
        assert_eq!(new(vec![]), Err(ConfigError::NoVolume));
    }

    #[test]
    fn a_consent_among_several_volumes_names_its_own() {
        let cache = serve("pcache-vhost --socket /s").unwrap().caches()[0].clone();
        let volumes: Vec<_> = ["a", "b"]
            .map(|name| {
                let backing =
                    BackingConfig { path: format!("/{name}").into(), raw: false, size: Sizing::AsFound };
                VolumeConfig::new(name.parse().unwrap(), 0, Endpoint::Inherited(3), backing)
            })
            .into();
        let new = |force: &str| {
            let consents = Consents { force_identity: vec![force.into()], accept_loss: vec![] };
            Config::new(vec![cache.clone()], volumes.clone(), &consents)
        };
        assert_eq!(new(""), Err(ConfigError::WhichVolume { option: "force-identity" }));
        let config = new("b").unwrap();
        assert!(!config.volumes()[0].force_identity && config.volumes()[1].force_identity);
    }

    #[test]
    fn the_state_directory_follows_the_user() {
        let dir = |root, xdg: Option<&str>, home: Option<&str>| {
            default_state_dir(root, xdg.map(PathBuf::from), home.map(PathBuf::from))
        };
        let rows = [
            (dir(true, Some("/x"), Some("/h")), Some("/var/lib/pcache-vhost")),
            (dir(false, Some("/x"), Some("/h")), Some("/x/pcache-vhost")),
            (dir(false, Some("x"), Some("/h")), Some("/h/.local/state/pcache-vhost")),
            (dir(false, None, Some("/h")), Some("/h/.local/state/pcache-vhost")),
            (dir(false, None, None), None),
        ];
        for (found, expected) in rows {
            assert_eq!(found, expected.map(PathBuf::from));
        }
    }
}
