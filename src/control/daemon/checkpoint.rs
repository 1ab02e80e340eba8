//! Checkpoints: a disk is brought up to date and then kept still, so that whatever copies it without us
//! copies one moment.
//!
//! Laws:
//! - At most one checkpoint of a volume at a time, known by the job that began it: who holds one never
//!   ends another's.
//! - Once it is reached the disk does not change until it is ended. While it is there, mode and order do
//!   not change and the volume is not detached: each of these writes to the disk, or waits for that.
//! - It ends by itself when nobody has prolonged it for as long as was asked for at first: who began it
//!   may be dead, and write-back must go on. Who ends it, or prolongs it, then learns that it was over.
//! - Locks: `Served::switching` → `Served::hold`; the latter for a look or an exchange only.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::api::model::{Checkpoint, Job};
use super::jobs::{Outcome, Task};
use super::{Daemon, DaemonError, Entry, Served, lock};
use crate::cache::Mode;

/// Seconds that a checkpoint is held unless it is prolonged, if nothing else is asked for.
pub const HOLD_DEFAULT_S: u32 = 60;
/// The most that may be asked for.
pub const HOLD_MAX_S: u32 = 3600;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(2);
/// Rounds of write-back that may fail on the way to it.
const FAILURES_MAX: u32 = 3;

/// A checkpoint, reached or on the way.
#[derive(Clone, Copy, Debug)]
pub struct Hold {
    job: u64,
    length: Duration,
    /// When it ends by itself; none before it is reached.
    until: Option<Instant>,
}

impl Hold {
    fn view(&self) -> Checkpoint {
        let left = self.until.map(|until| until.saturating_duration_since(Instant::now()).as_millis() as u64);
        Checkpoint { job: self.job, is_reached: self.until.is_some(), left_ms: left }
    }
}

impl Served {
    /// Refuses what cannot be done while a checkpoint holds the disk still.
    ///
    /// # Errors
    /// One does.
    pub fn refuse_if_held(&self) -> Result<(), DaemonError> {
        match *lock(&self.hold) {
            Some(_) => Err(DaemonError::Held(self.config.name.to_string())),
            None => Ok(()),
        }
    }

    /// The checkpoint, as the API shows it.
    pub fn view_checkpoint(&self) -> Option<Checkpoint> {
        lock(&self.hold).as_ref().map(Hold::view)
    }

    /// Ends the checkpoint whose time is up.
    pub fn expire_checkpoint(&self) {
        let mut hold = lock(&self.hold);
        let Some(Hold { job, until: Some(until), .. }) = *hold else { return };
        if Instant::now() >= until {
            *hold = None;
            self.volume.release_checkpoint();
            let volume = self.volume.name();
            tracing::warn!("volume {volume}: the checkpoint of job {job} has ended by itself");
        }
    }

    /// Whether the disk can be brought up to date and kept still.
    fn may_hold(&self) -> Result<(), DaemonError> {
        self.refuse_if_held()?;
        let why = match self.volume.mode() {
            _ if self.config.read_only => "it is read-only, and what is dirty stays in the cache".to_owned(),
            Mode::Writeback => return Ok(()),
            mode => format!("in mode {} its writes go to the disk at once", mode.name()),
        };
        Err(DaemonError::NotHoldable { volume: self.config.name.to_string(), why })
    }
}

impl Daemon {
    /// Begins a checkpoint. The job is done when it is reached; from then on it is held.
    ///
    /// # Errors
    /// It cannot be.
    pub fn start_checkpoint(self: &Arc<Self>, name: &str, hold_s: u32) -> Result<Job, DaemonError> {
        let served = self.find(name)?;
        served.may_hold()?;
        let (own, length) = (Arc::clone(self), Duration::from_secs(hold_s.into()));
        self.jobs.start("checkpoint", name, move |task| own.reach(&served, length, task))
    }

    /// Begins the time of a checkpoint anew.
    ///
    /// # Errors
    /// There is none, or another than this job's.
    pub fn prolong_checkpoint(&self, name: &str, job: Option<u64>) -> Result<Checkpoint, DaemonError> {
        let served = self.find(name)?;
        served.expire_checkpoint();
        let mut held = lock(&served.hold);
        let hold = held.as_mut().filter(|hold| job.is_none_or(|job| hold.job == job));
        let hold = hold.ok_or_else(|| DaemonError::NotHeld(name.into()))?;
        hold.until = hold.until.map(|_| Instant::now() + hold.length);
        Ok(hold.view())
    }

    /// Ends a checkpoint: write-back goes on. What it was until then.
    ///
    /// # Errors
    /// There is none, or another than this job's.
    pub fn end_checkpoint(&self, name: &str, job: Option<u64>) -> Result<Checkpoint, DaemonError> {
        let served = self.find(name)?;
        served.expire_checkpoint();
        let mut held = lock(&served.hold);
        let hold = held.take_if(|hold| job.is_none_or(|job| hold.job == job));
        let hold = hold.ok_or_else(|| DaemonError::NotHeld(name.into()))?;
        served.volume.release_checkpoint();
        Ok(hold.view())
    }

    fn reach(&self, served: &Served, length: Duration, task: &Task) -> Outcome {
        // A change of mode or order that has begun ends first, and none begins on the way.
        let _alone = lock(&served.switching);
        served.may_hold().map_err(|error| error.to_string())?;
        // Most of the way is a flush: it knows how far it is, and when it is hopeless.
        let flushed = served.volume.flush_to_disk(&mut |step| {
            task.progress(step);
            if task.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        flushed.map_err(|error| error.to_string())?;
        *lock(&served.hold) = Some(Hold { job: task.id(), length, until: None });
        served.volume.begin_checkpoint();
        let failures = served.volume.health().failures;
        loop {
            let mut held = lock(&served.hold);
            let Some(hold) = held.as_mut().filter(|hold| hold.job == task.id()) else {
                return Err("it was ended before it was reached".into());
            };
            if served.volume.is_at_checkpoint() {
                hold.until = Some(Instant::now() + length);
                return Ok(None);
            }
            let health = served.volume.health();
            let why = if task.is_cancelled() {
                "it was interrupted".to_owned()
            } else if !self.is_serving(served) {
                "the volume is being detached".to_owned()
            } else if health.failures >= failures + FAILURES_MAX {
                health.cause
            } else {
                drop(held);
                std::thread::sleep(LOOK);
                continue;
            };
            *held = None;
            served.volume.release_checkpoint();
            return Err(format!("{why}; nothing is held"));
        }
    }

    /// Whether this very volume is served and nobody is taking it away.
    pub(super) fn is_serving(&self, served: &Served) -> bool {
        match lock(&self.volumes).get(served.config.name.as_str()) {
            Some(Entry::Served(present)) => std::ptr::eq(&raw const **present, served),
            _ => false,
        }
    }
}
