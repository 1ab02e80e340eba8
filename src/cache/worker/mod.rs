//! Beside the path: what brings dirty data to the disk, and what makes space.
//!
//! Each worker is a `step()` that does a bounded amount of work, never sleeps and says what it did;
//! only [`Workers`] sleeps. So a simulation drives the same workers without threads or time.

mod dirty;
mod housekeeper;
mod pieces;
mod pinned;
mod relocate;
mod resize;
mod retry;
mod scrub;
mod victims;
mod writeback;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

pub(crate) use housekeeper::Housekeeper;
pub(crate) use retry::delay_within;
pub use writeback::OrderError;
pub(crate) use writeback::{Joint, Wishes, Writeback, verdict};

use super::core::Cache;
use super::env::{Clock, Env};
use super::pair::KEEP_MS;
use super::stripes::lock;
use super::volume::Volume;
use crate::sync::thread::{self, JoinHandle};

/// What a step did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// Something: call again.
    Did,
    /// Operations or a `sync` are under way: wait for them.
    Waiting,
    /// Nothing to do at present.
    Idle,
}

/// The workers of a cache without threads: whoever holds it calls their steps.
pub struct Stepper<E: Env> {
    cache: Arc<Cache<E>>,
    housekeeper: Housekeeper<E>,
    writebacks: Vec<Writeback<E>>,
}

impl<E: Env> Stepper<E> {
    /// The workers of `cache` and of these volumes. No others may run.
    pub fn new(cache: &Arc<Cache<E>>, volumes: &[Arc<Volume<E>>]) -> Self {
        Self {
            cache: cache.clone(),
            housekeeper: Housekeeper::new(cache.clone()),
            writebacks: volumes.iter().cloned().map(Writeback::new).collect(),
        }
    }

    /// Whether reclaim relocates, as it does, or drops clean data first in, first out: a baseline to
    /// compare with.
    pub fn relocate(&mut self, on: bool) {
        self.housekeeper.relocates = on;
    }

    /// Wakes queues whose time has come, and looks for disks that owe an answer for too long.
    pub fn watch(&self) {
        let volumes = self.cache.all_volumes();
        // Where nothing waits for it nobody looks at the clock.
        if volumes.iter().any(|v| v.has_alarms() || v.policy.deadline_ms().is_some()) {
            let now_ms = self.cache.clock.now_ms();
            volumes.iter().for_each(|v| v.look_for_stall(now_ms));
            volumes.iter().for_each(|v| v.ring_alarms(now_ms));
        }
    }

    /// One `sync` if any is asked for; says whether it ran.
    pub fn sync(&self) -> bool {
        self.cache.syncer.step(&*self.cache.media.pmem)
    }

    /// One step of the housekeeper. It waits for queues that are between `submit` and `commit`.
    pub fn housekeeper(&mut self) -> Progress {
        self.housekeeper.step()
    }

    /// One step of the write-back of the volume with this index.
    pub fn writeback(&mut self, volume: usize) -> Progress {
        self.writebacks[volume].step()
    }
}

/// How far a drain is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DrainProgress {
    /// Bytes that were dirty when it began.
    pub total_bytes: u64,
    /// Of these, what is still to be done, in proportion to what write-back does for it.
    pub dirty_bytes: u64,
}

impl DrainProgress {
    /// All is done.
    pub fn ended(total_bytes: u64) -> Self {
        Self { total_bytes, dirty_bytes: 0 }
    }
}

/// Why a drain ended early.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// The disk or the cache fails again and again.
    #[error("dirty data could not be brought to the disk: {0}")]
    Failed(String),
}

/// How long a worker that is to end waits for what the disk has under way.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// Rounds that may fail one after the other before a drain gives up.
const DRAIN_FAILURES_MAX: u32 = 5;

impl<E: Env> Volume<E> {
    /// Brings everything acknowledged to the disk, on the calling thread. Only while no worker
    /// serves the volume and no queue is open.
    ///
    /// On return the disk has all of it, flushed, and the cache knows so durably.
    ///
    /// # Errors
    /// [`DrainError`]: the disk failed several times in a row; nothing is lost.
    pub fn drain_here(self: &Arc<Self>, progress: &mut dyn FnMut(DrainProgress)) -> Result<(), DrainError> {
        self.draining.store(true, Ordering::SeqCst);
        let mut worker = Writeback::new(self.clone());
        let mut begun = self.begin_progress();
        let result = loop {
            if self.core.is_clean() {
                break Ok(());
            }
            // A volume that has lost dirty records is not written back any further.
            let is_damaged = self.core.damaged.load(Ordering::SeqCst);
            if is_damaged && worker.failures() == 0 {
                break Err(DrainError::Failed(String::from("the volume has lost dirty data")));
            }
            if is_damaged || worker.failures() >= DRAIN_FAILURES_MAX {
                break Err(DrainError::Failed(worker.last_error().to_owned()));
            }
            progress(begun.now(self));
            self.cache.keep_pair(self);
            match worker.step() {
                Progress::Did => {}
                Progress::Waiting => {
                    if !self.cache.syncer.step(&*self.cache.media.pmem) {
                        worker.wait(Duration::from_millis(20));
                    }
                }
                Progress::Idle => thread::sleep(Duration::from_millis(10)),
            }
        };
        progress(begun.now(self));
        self.draining.store(false, Ordering::SeqCst);
        result
    }
}

/// The threads of a cache. Dropping it ends and joins them.
pub struct Workers<E: Env> {
    cache: Arc<Cache<E>>,
    threads: Vec<JoinHandle<()>>,
    /// Nobody waits long for these: what they write stands beside disks, which may hang.
    keepers: Vec<(Arc<Volume<E>>, std::thread::JoinHandle<()>)>,
    /// The volumes that are written back, each by its thread.
    writebacks: Vec<(Arc<Volume<E>>, JoinHandle<()>)>,
}

impl<E: Env> Workers<E> {
    /// Starts the syncer and the housekeeper of a cache and one write-back thread per volume.
    ///
    /// # Errors
    /// The kernel refused a thread; those already started are ended.
    pub fn spawn(cache: &Arc<Cache<E>>, volumes: &[Arc<Volume<E>>]) -> std::io::Result<Workers<E>> {
        cache.stopping.store(false, Ordering::SeqCst);
        let mut workers = Workers {
            cache: cache.clone(),
            threads: Vec::new(),
            keepers: Vec::new(),
            writebacks: Vec::new(),
        };
        cache.syncer.rearm();
        let c = cache.clone();
        workers.add("pcache-sync", move || c.syncer.run(&*c.media.pmem))?;
        let c = cache.clone();
        workers.add("pcache-house", move || {
            let mut housekeeper = Housekeeper::new(c.clone());
            while !c.stopping.load(Ordering::SeqCst) {
                c.watch_volumes();
                match housekeeper.step() {
                    Progress::Did => {}
                    Progress::Waiting => c.housekeeper.wait(Duration::from_millis(1)),
                    Progress::Idle => c.housekeeper.wait(Duration::from_millis(200)),
                }
            }
        })?;
        for volume in volumes {
            workers.serve(volume)?;
        }
        Ok(workers)
    }

    /// Starts the write-back of one more volume of the cache.
    ///
    /// # Errors
    /// The kernel refused the thread.
    pub fn serve(&mut self, volume: &Arc<Volume<E>>) -> std::io::Result<()> {
        let name: String = format!("pcache-wb-{}", volume.name).chars().take(15).collect();
        let served = volume.clone();
        let thread = thread::Builder::new().name(name).spawn(move || run_writeback(served))?;
        volume.is_written_back.store(true, Ordering::SeqCst);
        self.writebacks.push((volume.clone(), thread));
        let kept = volume.clone();
        let name: String = format!("pcache-id-{}", volume.name).chars().take(15).collect();
        let keeper = std::thread::Builder::new().name(name).spawn(move || run_keeper(&kept))?;
        self.keepers.push((volume.clone(), keeper));
        Ok(())
    }

    /// Waits for keepers that are to end, but not for long.
    fn end_keepers(keepers: impl Iterator<Item = std::thread::JoinHandle<()>>) {
        let patience = Instant::now() + STOP_PATIENCE;
        for keeper in keepers {
            while !keeper.is_finished() && Instant::now() < patience {
                thread::sleep(Duration::from_millis(1));
            }
            if keeper.is_finished() {
                drop(keeper.join());
            }
        }
    }

    /// Ends the write-back of a volume that is to be detached. A disk that does not answer is waited
    /// for as long as at a stop; what is dirty stays in the cache.
    pub fn retire(&mut self, volume: &Arc<Volume<E>>) {
        volume.retired.store(true, Ordering::SeqCst);
        volume.core.writeback.raise();
        for (_, thread) in self.writebacks.extract_if(.., |(served, _)| Arc::ptr_eq(served, volume)) {
            drop(thread.join());
        }
        volume.core.keeper.raise();
        let keepers = self.keepers.extract_if(.., |(served, _)| Arc::ptr_eq(served, volume));
        Self::end_keepers(keepers.map(|(_, keeper)| keeper));
        volume.is_written_back.store(false, Ordering::SeqCst);
        // Of the round it was in nothing counts: the tail has not moved.
        lock(&volume.core.plan).clear();
        volume.core.pacer.end_round(false);
    }

    fn add(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        let thread = thread::Builder::new().name(name.to_owned()).spawn(body)?;
        self.threads.push(thread);
        Ok(())
    }
}

fn run_writeback<E: Env>(volume: Arc<Volume<E>>) {
    let mut worker = Writeback::new(volume.clone());
    while !volume.cache.stopping.load(Ordering::SeqCst) && !volume.retired.load(Ordering::SeqCst) {
        match worker.step() {
            Progress::Did => {}
            Progress::Waiting => worker.wait(Duration::from_millis(50)),
            Progress::Idle => volume.core.writeback.wait(Duration::from_millis(100)),
        }
    }
    // What the disk has under way may end in good time; then nothing need be left to it.
    let patience = Instant::now() + STOP_PATIENCE;
    while worker.is_owed() && Instant::now() < patience {
        worker.wait(Duration::from_millis(50));
        worker.end_operations();
    }
    worker.leave();
}

/// Keeps what the next start needs to recognise the disk.
fn run_keeper<E: Env>(volume: &Volume<E>) {
    while !volume.cache.stopping.load(Ordering::SeqCst) && !volume.retired.load(Ordering::SeqCst) {
        volume.cache.keep_pair(volume);
        volume.core.keeper.wait(Duration::from_millis(KEEP_MS / 4));
    }
}

impl<E: Env> Cache<E> {
    /// Logs what has changed in the states of its volumes.
    fn watch_volumes(&self) {
        let (failed, now_ms) = (self.has_failed(), self.clock.now_ms());
        for volume in self.all_volumes() {
            if volume.attached.load(Ordering::SeqCst) {
                volume.watch(failed, now_ms);
            }
        }
    }
}

impl<E: Env> Drop for Workers<E> {
    fn drop(&mut self) {
        self.cache.stopping.store(true, Ordering::SeqCst);
        self.cache.housekeeper.raise();
        for volume in self.cache.all_volumes() {
            volume.writeback.raise();
            volume.keeper.raise();
        }
        // The syncer last: the others may wait for it.
        let syncer = (!self.threads.is_empty()).then(|| self.threads.remove(0));
        let writebacks = self.writebacks.drain(..).map(|(_, thread)| thread);
        for thread in self.threads.drain(..).chain(writebacks) {
            drop(thread.join());
        }
        Self::end_keepers(self.keepers.drain(..).map(|(_, keeper)| keeper));
        self.cache.syncer.stop();
        if let Some(syncer) = syncer {
            drop(syncer.join());
        }
    }
}
