//! Volumes come and go while the daemon runs.
//!
//! An attach, as at the start: 1. the name is taken in the map; 2. the endpoint is claimed; 3. the
//! disk is opened, then cache and disk are joined; 4. write-back begins; 5. the socket opens. Each
//! step is undone if a later one fails.
//!
//! A detach: 1. with `drain`, everything is brought to the disk while the VM may still write, so that
//! little is left for later; until here it can be called off and nothing has happened; 2. the front
//! end ends, and with it the last request; 3. the rest is drained; 4. write-back ends, and the disk's
//! fingerprint is taken. If 3 fails the socket opens again. If 4 does, because the disk fails or does
//! not answer, the volume is left as after a kill, which the next attach repairs.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::super::config::{Config, Consents, Endpoint, VolumeConfig};
use super::super::handover::FrontEndRest;
use super::super::run::RunError;
use super::super::serve::{attach_options, open_redo, set_wishes};
use super::super::socket::Claimed;
use super::front_end::FrontEnd;
use super::jobs::{Outcome, Task};
use super::latency::LatencyWindows;
use super::windows::Windows;
use super::{Daemon, DaemonError, Entry, OpenCache, Served, lock};
use crate::cache::worker::Workers;
use crate::cache::{self, DeleteError, FlushError, Volume};
use crate::tools::Host;
use crate::tools::created::Created;
use crate::tools::disk::{self, DiskOptions};
use crate::units::Bytes;

/// What becomes of the dirty data of a volume that is detached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dirty {
    /// It is brought to the disk first.
    Drain,
    /// It stays in the cache.
    Keep,
    /// It is lost, and the volume deleted from the cache.
    Discard,
}

/// Takes a name in the map away again, unless it was put to use.
struct Reserved<'a> {
    daemon: &'a Daemon,
    name: &'a str,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        let mut volumes = lock(&self.daemon.volumes);
        if let Some(Entry::Changing) = volumes.get(self.name) {
            volumes.remove(self.name);
        }
    }
}

impl Daemon {
    /// Enters a volume that the start has attached, and begins to write it back.
    ///
    /// # Errors
    /// The kernel refused the thread.
    pub fn enter(
        &self,
        config: VolumeConfig,
        volume: Arc<Volume<Host>>,
        is_new: bool,
    ) -> Result<Arc<Served>, RunError> {
        let cache = &self.caches[config.cache];
        write_back(cache, &config, &volume)?;
        let windows = Mutex::new(Windows::new(Instant::now(), &volume.counters()));
        let latencies = Mutex::new(LatencyWindows::new(volume.latencies()));
        let name = config.name.to_string();
        let served = Arc::new(Served {
            config,
            volume,
            is_new,
            front_end: Mutex::new(None),
            switching: Mutex::default(),
            hold: Mutex::default(),
            windows,
            latencies,
        });
        lock(&self.volumes).insert(name, Entry::Served(Arc::clone(&served)));
        Ok(served)
    }

    /// Begins to write back again, after the workers were ended for a while.
    ///
    /// # Errors
    /// The kernel refused a thread.
    pub fn work_again(&self) -> Result<(), RunError> {
        for cache in &self.caches {
            let mut workers = lock(&cache.workers);
            if workers.is_none() {
                let again = Workers::spawn(&cache.cache, &[]);
                *workers = Some(again.map_err(RunError::os("starting the workers"))?);
                drop(workers);
                for served in self.served() {
                    if std::ptr::eq(cache, &raw const self.caches[served.config.cache]) {
                        write_back(cache, &served.config, &served.volume)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Goes on with the front end that another process has left to a volume.
    ///
    /// # Errors
    /// The kernel refused it.
    pub fn resume_front_end(&self, served: &Served, rest: FrontEndRest) -> Result<(), RunError> {
        let FrontEndRest { parked, bound } = rest;
        let running = self.servers.running();
        let front_end =
            FrontEnd::resume(parked, bound, &served.config, &served.volume, &self.threads, running)?;
        *lock(&served.front_end) = Some(front_end);
        Ok(())
    }

    /// Opens the socket of a volume that was entered.
    ///
    /// # Errors
    /// The kernel refused it.
    pub fn open_front_end(&self, served: &Served, claim: Claimed) -> Result<(), RunError> {
        let front_end =
            FrontEnd::open(claim, &served.config, &served.volume, &self.threads, self.servers.running())?;
        *lock(&served.front_end) = Some(front_end);
        Ok(())
    }

    /// Ends all front ends at the same time, each after what it has in flight.
    ///
    /// # Errors
    /// The first of what ended one of them before it was told to.
    pub fn stop_front_ends(&self) -> Result<(), RunError> {
        let front_ends: Vec<FrontEnd> =
            self.served().iter().filter_map(|served| lock(&served.front_end).take()).collect();
        front_ends.iter().for_each(FrontEnd::stop);
        let ends: Vec<_> = front_ends.into_iter().map(FrontEnd::join).collect();
        ends.into_iter().collect()
    }

    /// Refuses a volume that cannot be served beside the others.
    ///
    /// # Errors
    /// Why not.
    pub fn would_attach(&self, config: &VolumeConfig) -> Result<(), DaemonError> {
        let name = &config.name;
        match lock(&self.volumes).get(name.as_str()) {
            Some(Entry::Served(_)) => return Err(DaemonError::Attached(name.clone())),
            Some(Entry::Changing) => return Err(DaemonError::Changing(name.to_string())),
            None => {}
        }
        self.refuse_beside_held(config.cache, config.group.as_ref().map(|group| group.as_str()))?;
        let caches = self.caches.iter().map(|cache| cache.config.clone()).collect();
        let others = self.served().into_iter().map(|served| served.config.clone());
        let all = others.chain([config.clone()]).collect();
        Config::controlled(caches, all, &Consents::default(), self.control.clone())
            .map_err(RunError::from)?;
        Ok(())
    }

    /// Attaches and serves one more volume.
    ///
    /// # Errors
    /// Why not; nothing is left behind.
    pub fn attach(&self, config: VolumeConfig) -> Result<(), DaemonError> {
        self.would_attach(&config)?;
        let name = config.name.to_string();
        let reserved = {
            let mut volumes = lock(&self.volumes);
            if volumes.contains_key(&name) {
                return Err(DaemonError::Changing(name));
            }
            volumes.insert(name.clone(), Entry::Changing);
            Reserved { daemon: self, name: &name }
        };
        let claim = Claimed::new(&config.endpoint).map_err(RunError::from)?;
        let mut created = Created::default();
        let cache = &self.caches[config.cache];
        let is_known = !config.force_identity && cache.cache.descriptor(&name).is_some();
        let options = DiskOptions {
            path: &config.backing.path,
            read_only: config.read_only,
            raw: config.backing.raw || is_known,
            size: config.backing.size,
            wait: disk::PREDECESSOR_TIMEOUT,
            taken: None,
        };
        let disk = disk::open_or_create(&options, &mut created).map_err(RunError::Disk)?;
        let redo = open_redo(&config, &disk.disk, None, &mut created)?;
        let options = attach_options(&cache.config, &config, disk.disk, redo);
        cache::would_attach(&cache.pmem, &options).map_err(RunError::attach(&cache.config, &config))?;
        let of_attach = |error| RunError::attach(&cache.config, &config)(error);
        let shares = config.share.shares;
        cache.cache.may_share(&name, &shares).map_err(|error| of_attach(error.into()))?;
        let volume = cache.cache.attach(options).map_err(of_attach)?;
        if let Err(error) = set_wishes(&config, &volume) {
            release(cache, &volume, false);
            return Err(of_attach(error).into());
        }
        // From here on what was made is the volume's: it would be missed.
        created.keep();
        let served = match self.enter(config, Arc::clone(&volume), disk.is_new) {
            Ok(served) => served,
            Err(error) => {
                release(cache, &volume, false);
                return Err(error.into());
            }
        };
        // The name is put to use.
        drop(reserved);
        if let Err(error) = self.open_front_end(&served, claim) {
            lock(&self.volumes).insert(name.clone(), Entry::Changing);
            release(cache, &volume, false);
            lock(&self.volumes).remove(&name);
            return Err(error.into());
        }
        tracing::info!("volume {name} is attached");
        Ok(())
    }

    /// Brings to the disk everything a volume has acknowledged so far.
    ///
    /// # Errors
    /// Why not; what is dirty stays in the cache.
    pub fn flush(served: &Served, task: &Task) -> Outcome {
        flush(&served.volume, task).map_err(|error| error.to_string())?;
        let dirty = served.volume.counters().dirty_bytes;
        Ok(match dirty {
            0 => Some("nothing is dirty".into()),
            _ => Some(format!("everything from before is on the disk; {} came since", Bytes(dirty))),
        })
    }

    /// Whether a volume may be detached now; a job does it.
    ///
    /// # Errors
    /// Why not.
    pub fn would_detach(&self, name: &str, force: bool) -> Result<Option<Arc<Served>>, DaemonError> {
        match self.find(name) {
            Ok(served) => {
                if served.is_connected() && !force {
                    return Err(DaemonError::Connected(name.into()));
                }
                served.refuse_if_held()?;
                Ok(Some(served))
            }
            Err(DaemonError::NotAttached(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Stops serving a volume.
    ///
    /// # Errors
    /// Why not: it is then served as before.
    pub fn detach(&self, served: &Arc<Served>, dirty: Dirty, task: &Task) -> Outcome {
        let name = served.config.name.as_str();
        if dirty == Dirty::Drain {
            flush(&served.volume, task).map_err(|error| error.to_string())?;
        }
        {
            let mut volumes = lock(&self.volumes);
            match volumes.get(name) {
                Some(Entry::Served(present)) if Arc::ptr_eq(present, served) => {
                    volumes.insert(name.into(), Entry::Changing);
                }
                _ => return Err(DaemonError::Changing(name.into()).to_string()),
            }
        }
        let front_end = lock(&served.front_end).take();
        if let Some(Err(error)) = front_end.map(FrontEnd::join) {
            tracing::warn!("volume {name}: {error}");
        }
        let drained = if dirty == Dirty::Drain { flush(&served.volume, task) } else { Ok(()) };
        if let Err(why) = drained {
            return Err(self.serve_again(served, &why.to_string()));
        }
        let cache = &self.caches[served.config.cache];
        // The VM goes on without it, and its other disks with them: they need not wait for this one.
        let mut remark = release(cache, &served.volume, dirty == Dirty::Keep);
        if dirty == Dirty::Discard {
            match delete(cache, name) {
                Ok(deleted) => remark = Some(deleted),
                Err(error) => remark = Some(format!("it is detached, but not deleted: {error}")),
            }
        } else if !served.volume.is_clean() {
            let kept = format!("{} stay in the cache", Bytes(served.volume.counters().dirty_bytes));
            remark = Some(remark.map_or(kept.clone(), |remark| format!("{kept}; {remark}")));
        }
        lock(&self.volumes).remove(name);
        Ok(remark)
    }

    /// Deletes a volume that is not served from its cache.
    ///
    /// # Errors
    /// Why not.
    pub fn delete_detached(&self, name: &str) -> Outcome {
        let Some(cache) = self.on_a_cache(name) else {
            return Err(self.no_volume(name).to_string());
        };
        delete(cache, name).map(Some).map_err(|error| error.to_string())
    }

    /// Opens the socket of a volume again that could not be detached.
    fn serve_again(&self, served: &Arc<Served>, why: &str) -> String {
        let name = served.config.name.as_str();
        let reopened = match &served.config.endpoint {
            Endpoint::Socket { .. } => Claimed::new(&served.config.endpoint)
                .map_err(RunError::from)
                .and_then(|claim| self.open_front_end(served, claim))
                .map_err(|error| format!("; and its socket cannot be opened again: {error}")),
            // An inherited descriptor is gone once it has been used.
            Endpoint::Inherited(_) => Err("; and its inherited socket is used up".into()),
        };
        lock(&self.volumes).insert(name.into(), Entry::Served(Arc::clone(served)));
        format!("{why}; it is served on{}", reopened.err().unwrap_or_default())
    }

    /// Detaches everything, in order, at the end of the process. Says whether every disk answered.
    pub fn close(&self) -> bool {
        let served = self.served();
        for cache in &self.caches {
            drop(lock(&cache.workers).take());
        }
        let mut is_answered = true;
        for served in served {
            let (name, volume) = (&served.config.name, &served.volume);
            if volume.health().state == cache::VolumeState::Stalled {
                // Its content is not known while something may still reach it, and reading it would hang.
                tracing::warn!("volume {name} is left as after a kill: its disk does not answer");
                is_answered = false;
                continue;
            }
            if let Err(error) = volume.cache().detach(volume) {
                tracing::warn!("volume {name} could not be detached in order: {error}");
            }
        }
        for OpenCache { config, cache, .. } in &self.caches {
            match cache.close() {
                Ok(()) => tracing::info!("cache {} closed", config.path.display()),
                Err(error) => {
                    tracing::warn!("cache {} could not be closed in order: {error}", config.path.display());
                }
            }
        }
        is_answered
    }
}

/// Starts the write-back of a volume. The disk of a read-only one is not open for writing: what is
/// dirty waits.
fn write_back(cache: &OpenCache, config: &VolumeConfig, volume: &Arc<Volume<Host>>) -> Result<(), RunError> {
    if config.read_only {
        return Ok(());
    }
    match &mut *lock(&cache.workers) {
        Some(workers) => workers.serve(volume).map_err(RunError::os("starting the workers")),
        None => Err(RunError::Stopping),
    }
}

/// Ends the write-back of a volume and its attachment. What was remarkable about it.
fn release(cache: &OpenCache, volume: &Arc<Volume<Host>>, leaves_group: bool) -> Option<String> {
    if let Some(workers) = &mut *lock(&cache.workers) {
        workers.retire(volume);
    }
    if leaves_group && let Err(error) = cache.cache.leave_for_good(volume) {
        tracing::warn!("volume {} stays in its consistency group: {error}", volume.name());
    }
    let detached = match volume.health().state {
        // Reading its content would hang.
        cache::VolumeState::Stalled => Err("its disk does not answer".to_owned()),
        _ => cache.cache.detach(volume).map_err(|error| error.to_string()),
    };
    let why = detached.err()?;
    cache.cache.abandon(volume);
    Some(format!("it is left as after a kill, which loses nothing: {why}"))
}

fn delete(cache: &OpenCache, name: &str) -> Result<String, DeleteError> {
    cache.cache.delete_volume(name, true)?;
    Ok("it is deleted from the cache".into())
}

fn flush(volume: &Volume<Host>, task: &Task) -> Result<(), FlushError> {
    volume.flush_to_disk(&mut |step| {
        task.progress(step);
        if task.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
}
