//! Checkpoints: a disk is brought up to date and then kept still, so that whatever copies it without us
//! copies one moment.
//!
//! The members of a consistency group are one: a checkpoint of any of them is of all that are attached, and
//! their disks stand at one moment of the VM.
//!
//! Laws:
//! - At most one checkpoint of a volume at a time, known by the job that began it: who holds one never
//!   ends another's.
//! - Once it is reached the disk does not change until it is ended. While it is there, mode and order do
//!   not change and the volume is not detached: each of these writes to the disk, or waits for that. Nor
//!   is another member attached: its disk would not be of that moment.
//! - It is reached, prolonged and ended for all its volumes at once.
//! - It ends by itself when nobody has prolonged it for as long as was asked for at first: who began it
//!   may be dead, and write-back must go on. Who ends it, or prolongs it, then learns that it was over.
//! - Locks: `Served::switching`, of several volumes by their names → `Served::hold`; the latter for a look
//!   or an exchange only, and one at a time.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::api::model::{Checkpoint, Job};
use super::jobs::{Outcome, Task};
use super::{Daemon, DaemonError, Entry, Served, lock};
use crate::cache::worker::DrainProgress;
use crate::cache::{Mode, Volume};

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
        for member in self.held_with(&served)? {
            member.may_hold()?;
        }
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
        let not_held = || DaemonError::NotHeld(name.into());
        let held = (*lock(&served.hold)).filter(|hold| job.is_none_or(|job| hold.job == job));
        let job = held.ok_or_else(not_held)?.job;
        let now = Instant::now();
        let mut view = None;
        for member in self.held_by(job, &served) {
            let mut held = lock(&member.hold);
            // It may have ended since.
            let hold = held.as_mut().filter(|hold| hold.job == job).ok_or_else(not_held)?;
            hold.until = hold.until.map(|_| now + hold.length);
            view = Some(hold.view());
        }
        view.ok_or_else(not_held)
    }

    /// Ends a checkpoint: write-back goes on. What it was until then.
    ///
    /// # Errors
    /// There is none, or another than this job's.
    pub fn end_checkpoint(&self, name: &str, job: Option<u64>) -> Result<Checkpoint, DaemonError> {
        let served = self.find(name)?;
        served.expire_checkpoint();
        let held = (*lock(&served.hold)).filter(|hold| job.is_none_or(|job| hold.job == job));
        let hold = held.ok_or_else(|| DaemonError::NotHeld(name.into()))?;
        Self::release(&self.held_by(hold.job, &served), hold.job);
        Ok(hold.view())
    }

    /// The volumes whose disks stand still with this one's: itself, or all attached members of its group.
    fn held_with(&self, served: &Arc<Served>) -> Result<Vec<Arc<Served>>, DaemonError> {
        let mut together = vec![Arc::clone(served)];
        for (name, is_clean) in served.volume.fellows() {
            let present = self.find(&name).ok().filter(|fellow| fellow.config.cache == served.config.cache);
            match present {
                Some(fellow) => together.push(fellow),
                // Nobody writes to its disk.
                None if is_clean => {}
                None => {
                    let why = format!("`{name}` of its group has dirty data and is not attached");
                    return Err(DaemonError::NotHoldable { volume: served.config.name.to_string(), why });
                }
            }
        }
        together.sort_by(|a, b| a.config.name.cmp(&b.config.name));
        Ok(together)
    }

    /// The volumes whose disks a job keeps still, `served` among them.
    fn held_by(&self, job: u64, served: &Arc<Served>) -> Vec<Arc<Served>> {
        let mut volumes = self.served();
        volumes.retain(|volume| {
            Arc::ptr_eq(volume, served) || lock(&volume.hold).is_some_and(|hold| hold.job == job)
        });
        volumes
    }

    fn release(together: &[Arc<Served>], job: u64) {
        for served in together {
            let mut hold = lock(&served.hold);
            if hold.take_if(|hold| hold.job == job).is_some() {
                served.volume.release_checkpoint();
            }
        }
    }

    /// Refuses a member of a group whose disks a checkpoint keeps still.
    ///
    /// # Errors
    /// It does.
    pub(super) fn refuse_beside_held(&self, cache: usize, group: Option<&str>) -> Result<(), DaemonError> {
        let Some(group) = group else { return Ok(()) };
        let is_fellow =
            |s: &&Arc<Served>| s.config.cache == cache && s.volume.group().as_deref() == Some(group);
        self.served().iter().filter(is_fellow).try_for_each(|fellow| fellow.refuse_if_held())
    }

    fn reach(&self, served: &Arc<Served>, length: Duration, task: &Task) -> Outcome {
        let together = self.held_with(served).map_err(|error| error.to_string())?;
        // Changes of mode or order that have begun end first, and none begins on the way.
        let _alone: Vec<_> = together.iter().map(|member| lock(&member.switching)).collect();
        for member in &together {
            member.may_hold().map_err(|error| error.to_string())?;
        }
        // Most of the way is a flush: it knows how far it is, and when it is hopeless.
        flush_all(&together, task)?;
        for member in &together {
            *lock(&member.hold) = Some(Hold { job: task.id(), length, until: None });
        }
        Volume::begin_checkpoint(together.iter().map(|member| &*member.volume));
        let failures: Vec<_> = together.iter().map(|member| member.volume.health().failures).collect();
        loop {
            let is_held = |m: &Arc<Served>| lock(&m.hold).is_some_and(|hold| hold.job == task.id());
            if !together.iter().all(is_held) {
                Self::release(&together, task.id());
                return Err("it was ended before it was reached".into());
            }
            if together.iter().all(|member| member.volume.is_at_checkpoint()) {
                return self.begin_holding(&together, length, task);
            }
            let why = together.iter().zip(&failures).find_map(|(member, before)| {
                let health = member.volume.health();
                if !self.is_serving(member) {
                    Some(format!("volume {} is being detached", member.config.name))
                } else {
                    (health.failures >= before + FAILURES_MAX).then_some(health.cause)
                }
            });
            if let Some(why) = why.or_else(|| task.is_cancelled().then(|| "it was interrupted".to_owned())) {
                Self::release(&together, task.id());
                return Err(format!("{why}; nothing is held"));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// The disks are still: from now on it is held.
    fn begin_holding(&self, together: &[Arc<Served>], length: Duration, task: &Task) -> Outcome {
        let until = Instant::now() + length;
        for member in together {
            let mut held = lock(&member.hold);
            match held.as_mut().filter(|hold| hold.job == task.id()) {
                Some(hold) => hold.until = Some(until),
                None => {
                    drop(held);
                    Self::release(together, task.id());
                    return Err("it was ended before it was reached".into());
                }
            }
        }
        let names: Vec<_> = together.iter().map(|member| member.config.name.as_str()).collect();
        Ok((names.len() > 1).then(|| format!("the disks of {} stand at one moment", names.join(", "))))
    }

    /// Whether this very volume is served and nobody is taking it away.
    pub(super) fn is_serving(&self, served: &Served) -> bool {
        match lock(&self.volumes).get(served.config.name.as_str()) {
            Some(Entry::Served(present)) => std::ptr::eq(&raw const **present, served),
            _ => false,
        }
    }
}

/// Brings everything acknowledged so far to the disks of all these volumes.
fn flush_all(together: &[Arc<Served>], task: &Task) -> Result<(), String> {
    let dirty = |of: &[Arc<Served>]| of.iter().map(|m| m.volume.counters().dirty_bytes).sum::<u64>();
    let total_bytes = dirty(together);
    for (index, member) in together.iter().enumerate() {
        let behind = &together[index + 1..];
        let flushed = member.volume.flush_to_disk(&mut |step| {
            let dirty_bytes = (step.dirty_bytes + dirty(behind)).min(total_bytes);
            task.progress(DrainProgress { total_bytes, dirty_bytes });
            if task.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        flushed.map_err(|error| error.to_string())?;
    }
    Ok(())
}
