//! What runs: the caches and volumes of this process, as they are now. Start, stop and the control
//! API change it; nothing on the data path knows of it.
//!
//! Laws:
//! - A volume's name is in the map from before anything is opened for it until all of that is closed
//!   again; while it is being changed the map says so, and a second change is refused. So no two
//!   threads ever attach, detach or drain one volume away from each other.
//! - The map is locked for a look or an exchange, never while a disk, a thread or a cache is waited
//!   for: status and metrics answer whatever a disk does.
//! - Order of locks: map → a volume's front end → a cache's workers. Jobs take none of them together.
//! - What a failed attach has made is undone; what a failed detach has stopped is started again, or
//!   left as after a kill, and the answer says which.

mod attach;
mod checkpoint;
mod enlarge;
pub mod front_end;
pub mod jobs;
pub mod latency;
mod reload;
mod set;
pub mod view;
pub mod windows;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use self::checkpoint::Hold;
use self::front_end::FrontEnd;
use self::jobs::JobTable;
use self::latency::LatencyWindows;
use self::windows::Windows;
use super::config::{CacheConfig, ControlConfig, VolumeConfig};
use super::run::RunError;
use super::signals::Servers;
use super::value::Name;
use crate::cache::worker::{OrderError, Workers};
use crate::cache::{Cache, Volume};
use crate::pmem::MappedPmem;
use crate::tools::Host;

pub use self::attach::Dirty;
pub use self::checkpoint::{HOLD_DEFAULT_S, HOLD_MAX_S};
pub use self::set::Change;

/// An opened cache.
pub struct OpenCache {
    /// As it was configured.
    pub config: CacheConfig,
    /// Its media.
    pub pmem: Arc<MappedPmem>,
    /// The engine.
    pub cache: Arc<Cache<Host>>,
    /// Whether this start made it.
    pub is_new: bool,
    /// Its threads; none once it is being closed.
    pub workers: Mutex<Option<Workers<Host>>>,
}

/// A volume that is served.
pub struct Served {
    /// As it was attached.
    pub config: VolumeConfig,
    /// The engine's.
    pub volume: Arc<Volume<Host>>,
    /// Whether this start made its disk.
    pub is_new: bool,
    /// Where the VMM connects; none while it is being changed.
    pub front_end: Mutex<Option<FrontEnd>>,
    /// Held by who changes its mode or order, or is on the way to a checkpoint.
    pub switching: Mutex<()>,
    /// The checkpoint that keeps its disk still, or is about to.
    pub hold: Mutex<Option<Hold>>,
    /// Its rates.
    pub windows: Mutex<Windows>,
    /// Its latencies.
    pub latencies: Mutex<LatencyWindows>,
}

impl Served {
    /// Whether a VM is connected.
    pub fn is_connected(&self) -> bool {
        lock(&self.front_end).as_ref().is_some_and(FrontEnd::is_connected)
    }
}

/// A name in the map.
#[derive(Clone)]
pub enum Entry {
    /// It is being attached or detached.
    Changing,
    /// It is served.
    Served(Arc<Served>),
}

/// Why the daemon does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Nothing of that name.
    #[error("there is no volume `{given}`{}", .nearest.as_ref().map_or(String::new(), |near| format!(": did you mean `{near}`?")))]
    NoVolume {
        /// What was asked for.
        given: String,
        /// What may have been meant.
        nearest: Option<String>,
    },
    /// It is on a cache, and not served.
    #[error("volume `{0}` is not attached: attach it first")]
    NotAttached(String),
    /// It is served already.
    #[error("volume `{0}` is attached already")]
    Attached(Name),
    /// Somebody else is at it.
    #[error("volume `{0}` is being attached, detached or changed right now: wait for that job")]
    Changing(String),
    /// A VM would lose its disk.
    #[error(
        "a VM is connected to volume `{0}`: unplug the disk from it or shut it down first, or use --force"
    )]
    Connected(String),
    /// Its disk is kept still.
    #[error(
        "a checkpoint holds the disk of volume `{0}` still: wait for its end, or end it with \
         `checkpoint {0} --release`"
    )]
    Held(String),
    /// There is no checkpoint, or not that one.
    #[error("no such checkpoint holds volume `{0}`: it has ended, by itself or by somebody else")]
    NotHeld(String),
    /// Its disk cannot be kept still.
    #[error("volume `{volume}` cannot be held at a checkpoint: {why}")]
    NotHoldable {
        /// The volume.
        volume: String,
        /// Why not.
        why: String,
    },
    /// Nothing of it is written back.
    #[error("volume `{0}` is read-only: nothing writes it back, in whichever order")]
    NotWrittenBack(String),
    /// An order that it cannot have.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// Too much is under way.
    #[error("{0} jobs are running already: wait for one to end")]
    Busy(usize),
    /// No such job.
    #[error("there is no job {0}: it never was, or ended long ago")]
    NoJob(u64),
    /// Nothing to read again.
    #[error("the daemon was started without a configuration file: there is nothing to reload")]
    NoFile,
    /// It is stopping.
    #[error("the daemon is stopping")]
    Stopping,
    /// It was tried and did not work.
    #[error(transparent)]
    Run(#[from] RunError),
}

/// See the module's head.
pub struct Daemon {
    caches: Vec<OpenCache>,
    volumes: Mutex<BTreeMap<String, Entry>>,
    jobs: JobTable,
    servers: Servers,
    begun: Instant,
    config_file: Option<PathBuf>,
    control: Option<ControlConfig>,
}

impl Daemon {
    /// A daemon that serves nothing yet from these caches.
    ///
    /// # Errors
    /// The kernel refused their threads.
    pub fn new(
        caches: Vec<OpenCache>,
        servers: Servers,
        config_file: Option<&Path>,
        control: Option<&ControlConfig>,
    ) -> Result<Self, RunError> {
        for cache in &caches {
            let workers = Workers::spawn(&cache.cache, &[]).map_err(RunError::os("starting the workers"))?;
            *lock(&cache.workers) = Some(workers);
        }
        Ok(Self {
            caches,
            volumes: Mutex::default(),
            jobs: JobTable::default(),
            servers,
            begun: Instant::now(),
            config_file: config_file.map(Path::to_owned),
            control: control.cloned(),
        })
    }

    /// Its caches.
    pub fn caches(&self) -> &[OpenCache] {
        &self.caches
    }

    /// Its jobs.
    pub fn jobs(&self) -> &JobTable {
        &self.jobs
    }

    /// What is served now, by name.
    pub fn served(&self) -> Vec<Arc<Served>> {
        let entries = lock(&self.volumes);
        let served = entries.values().filter_map(|entry| match entry {
            Entry::Served(served) => Some(Arc::clone(served)),
            Entry::Changing => None,
        });
        served.collect()
    }

    /// The volume of that name, if it is served and nobody is changing it.
    ///
    /// # Errors
    /// It is not there, or not now.
    pub fn find(&self, name: &str) -> Result<Arc<Served>, DaemonError> {
        match lock(&self.volumes).get(name) {
            Some(Entry::Served(served)) => return Ok(Arc::clone(served)),
            Some(Entry::Changing) => return Err(DaemonError::Changing(name.into())),
            None => {}
        }
        match self.on_a_cache(name) {
            Some(_) => Err(DaemonError::NotAttached(name.into())),
            None => Err(self.no_volume(name)),
        }
    }

    /// The cache that has a volume of that name, served or not.
    fn on_a_cache(&self, name: &str) -> Option<&OpenCache> {
        self.caches.iter().find(|cache| cache.cache.descriptor(name).is_some())
    }

    fn no_volume(&self, name: &str) -> DaemonError {
        let known: Vec<String> = self.view_volumes().into_iter().map(|volume| volume.name).collect();
        let nearest = super::suggest::nearest(name, known.iter().map(String::as_str)).map(str::to_owned);
        DaemonError::NoVolume { given: name.into(), nearest }
    }

    /// Takes a sample of every volume for the decaying windows, and ends checkpoints whose time is up.
    /// Called about once a second.
    pub fn sample(&self) {
        for served in self.served() {
            served.expire_checkpoint();
            let counters = served.volume.counters();
            let seconds = lock(&served.windows).sample(Instant::now(), &counters);
            if seconds > 0.0 {
                lock(&served.latencies).sample(seconds, served.volume.latencies());
            }
        }
    }
}

/// Locks what cannot be left half-changed.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
