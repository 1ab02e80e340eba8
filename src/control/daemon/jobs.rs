//! Long work on volumes: each job is a thread of its own, with a number by which it can be watched
//! and called off. Whoever asked for it need not stay: it goes on, and says how it ended.
//!
//! Bounds: [`RUNNING_MAX`] jobs at a time, and the last [`ENDED_MAX`] that ended are remembered.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::super::api::model::Job;
use super::super::exit::sentence;
use super::{DaemonError, lock};
use crate::cache::worker::DrainProgress;

/// Jobs at a time: more than volumes are usually moved about at once, and few enough threads.
const RUNNING_MAX: usize = 32;
/// Ended jobs remembered.
const ENDED_MAX: usize = 128;
/// From when on a rate means something.
const RATE_AFTER: Duration = Duration::from_millis(300);

/// How a job ends: a remark, or why it failed.
pub type Outcome = Result<Option<String>, String>;

/// A job, as its thread and its watchers see it.
pub struct Task {
    id: u64,
    kind: &'static str,
    volume: String,
    begun: Instant,
    cancelled: AtomicBool,
    total_bytes: AtomicU64,
    done_bytes: AtomicU64,
    end: Mutex<Option<(Outcome, Duration)>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Task {
    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Whether it is to end early.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Notes how far it is. It never goes back: rounds of write-back that fail begin again.
    pub fn progress(&self, step: DrainProgress) {
        self.total_bytes.fetch_max(step.total_bytes, Ordering::Relaxed);
        let done = step.total_bytes.saturating_sub(step.dirty_bytes);
        self.done_bytes.fetch_max(done, Ordering::Relaxed);
    }

    /// As the API shows it.
    pub fn view(&self) -> Job {
        let end = lock(&self.end);
        let elapsed = end.as_ref().map_or_else(|| self.begun.elapsed(), |(_, elapsed)| *elapsed);
        let (state, message) = match &*end {
            None => ("running", None),
            Some((Ok(message), _)) => ("done", message.clone()),
            Some((Err(why), _)) if self.is_cancelled() => ("cancelled", Some(why.clone())),
            Some((Err(why), _)) => ("failed", Some(why.clone())),
        };
        let total = self.total_bytes.load(Ordering::Relaxed);
        let done = self.done_bytes.load(Ordering::Relaxed).min(total);
        let is_telling = done > 0 && elapsed >= RATE_AFTER;
        let rate = is_telling.then(|| done as f64 / elapsed.as_secs_f64());
        let left = rate.filter(|_| end.is_none()).map(|rate| (total - done) as f64 / rate);
        Job {
            id: self.id,
            kind: self.kind.into(),
            volume: self.volume.clone(),
            state: state.into(),
            elapsed_s: elapsed.as_secs_f64(),
            total_bytes: total,
            done_bytes: done,
            bytes_per_s: rate,
            left_s: left,
            message,
        }
    }

    fn is_running(&self) -> bool {
        lock(&self.end).is_none()
    }
}

/// Ends a job that a bug of ours has ended: whoever waits for it must not wait for ever.
struct EndAnyway(Arc<Task>);

impl Drop for EndAnyway {
    fn drop(&mut self) {
        let elapsed = self.0.begun.elapsed();
        let why = || (Err("the daemon failed at it: see its log".to_owned()), elapsed);
        lock(&self.0.end).get_or_insert_with(why);
    }
}

#[derive(Default)]
struct Table {
    tasks: VecDeque<Arc<Task>>,
    last_id: u64,
    is_closed: bool,
}

/// See the module's head.
#[derive(Default)]
pub struct JobTable(Mutex<Table>);

impl JobTable {
    /// Begins a job.
    ///
    /// # Errors
    /// Too many are running, or the daemon is stopping, or the kernel refused the thread.
    pub fn start(
        &self,
        kind: &'static str,
        volume: &str,
        work: impl FnOnce(&Task) -> Outcome + Send + 'static,
    ) -> Result<Job, DaemonError> {
        let mut table = lock(&self.0);
        if table.is_closed {
            return Err(DaemonError::Stopping);
        }
        let running = table.tasks.iter().filter(|task| task.is_running()).count();
        if running >= RUNNING_MAX {
            return Err(DaemonError::Busy(running));
        }
        table.last_id += 1;
        let task = Arc::new(Task {
            id: table.last_id,
            kind,
            volume: volume.into(),
            begun: Instant::now(),
            cancelled: AtomicBool::new(false),
            total_bytes: AtomicU64::new(0),
            done_bytes: AtomicU64::new(0),
            end: Mutex::new(None),
            thread: Mutex::new(None),
        });
        let own = Arc::clone(&task);
        let body = move || {
            let _end = EndAnyway(Arc::clone(&own));
            let outcome = work(&own).map_err(|why| sentence(&why));
            let (id, volume) = (own.id, &own.volume);
            match &outcome {
                Ok(None) => tracing::info!("job {id}: {kind} of volume {volume} is done"),
                Ok(Some(remark)) => tracing::info!("job {id}: {kind} of volume {volume} is done: {remark}"),
                Err(why) => tracing::warn!("job {id}: {kind} of volume {volume} ended: {why}"),
            }
            *lock(&own.end) = Some((outcome, own.begun.elapsed()));
        };
        let thread = std::thread::Builder::new()
            .name("pcache-job".into())
            .spawn(body)
            .map_err(super::RunError::os("starting a job"))?;
        *lock(&task.thread) = Some(thread);
        table.tasks.push_back(Arc::clone(&task));
        let excess = table.tasks.len().saturating_sub(ENDED_MAX);
        for _ in 0..excess {
            // The oldest that has ended: what runs is never forgotten.
            let Some(at) = table.tasks.iter().position(|task| !task.is_running()) else { break };
            table.tasks.remove(at);
        }
        Ok(task.view())
    }

    /// All that are known, the oldest first.
    pub fn view(&self) -> Vec<Job> {
        lock(&self.0).tasks.iter().map(|task| task.view()).collect()
    }

    /// The job with this number.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, id: u64) -> Result<Arc<Task>, DaemonError> {
        let table = lock(&self.0);
        table.tasks.iter().find(|task| task.id == id).cloned().ok_or(DaemonError::NoJob(id))
    }

    /// Calls a job off. It ends soon, and whatever it has done stays done.
    ///
    /// # Errors
    /// There is none of that number.
    pub fn cancel(&self, id: u64) -> Result<Job, DaemonError> {
        let task = self.find(id)?;
        task.cancelled.store(true, Ordering::Relaxed);
        Ok(task.view())
    }

    /// Calls all off and waits for their ends. None can begin any more.
    pub fn close(&self) {
        let tasks: Vec<Arc<Task>> = {
            let mut table = lock(&self.0);
            table.is_closed = true;
            table.tasks.iter().cloned().collect()
        };
        for task in &tasks {
            task.cancelled.store(true, Ordering::Relaxed);
        }
        for task in tasks {
            let thread = lock(&task.thread).take();
            if thread.is_some_and(|thread| thread.join().is_err()) {
                tracing::error!("job {} of volume {} ended early", task.id, task.volume);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(jobs: &JobTable, id: u64) -> Job {
        let task = jobs.find(id).unwrap();
        while task.is_running() {
            std::thread::yield_now();
        }
        task.view()
    }

    #[test]
    fn a_job_tells_how_far_it_is_and_how_it_ended() {
        let jobs = JobTable::default();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let job = jobs
            .start("drain", "web", move |task| {
                task.progress(DrainProgress { total_bytes: 100, dirty_bytes: 75 });
                // A round that begins again takes nothing back.
                task.progress(DrainProgress { total_bytes: 100, dirty_bytes: 90 });
                wait.recv().unwrap();
                Ok(Some("clean".into()))
            })
            .unwrap();
        assert_eq!((job.id, job.kind.as_str(), job.state.as_str()), (1, "drain", "running"));
        while jobs.find(1).unwrap().view().done_bytes != 25 {
            std::thread::yield_now();
        }
        std::thread::sleep(RATE_AFTER);
        let view = jobs.find(1).unwrap().view();
        let (rate, left) = (view.bytes_per_s.unwrap(), view.left_s.unwrap());
        assert!((left - 75.0 / rate).abs() < 1e-9, "{view:?}");
        go.send(()).unwrap();
        let job = ended(&jobs, 1);
        assert_eq!((job.state.as_str(), job.message.as_deref(), job.left_s), ("done", Some("clean"), None));
    }

    #[test]
    fn a_job_that_is_called_off_says_so_and_none_begins_after_the_close() {
        let jobs = JobTable::default();
        let wait = |task: &Task| {
            while !task.is_cancelled() {
                std::thread::yield_now();
            }
            Err("it was interrupted".to_owned())
        };
        jobs.start("flush", "web", wait).unwrap();
        jobs.cancel(1).unwrap();
        assert_eq!(ended(&jobs, 1).state, "cancelled");
        assert!(matches!(jobs.cancel(2), Err(DaemonError::NoJob(2))));
        jobs.start("flush", "web", wait).unwrap();
        jobs.close();
        assert_eq!(ended(&jobs, 2).state, "cancelled");
        assert!(matches!(jobs.start("flush", "web", wait), Err(DaemonError::Stopping)));
    }

    #[test]
    fn a_job_that_panics_has_failed() {
        let jobs = JobTable::default();
        jobs.start("set", "web", |_| panic!("this panic is part of the test")).unwrap();
        let job = ended(&jobs, 1);
        assert_eq!(job.state, "failed");
        assert!(job.message.unwrap().contains("see its log"));
    }

    #[test]
    fn jobs_are_bounded_running_and_ended() {
        let jobs = JobTable::default();
        for _ in 0..RUNNING_MAX {
            jobs.start("flush", "web", |task| {
                while !task.is_cancelled() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(None)
            })
            .unwrap();
        }
        assert!(matches!(jobs.start("flush", "web", |_| Ok(None)), Err(DaemonError::Busy(RUNNING_MAX))));
        jobs.cancel(1).unwrap();
        ended(&jobs, 1);
        for _ in 0..ENDED_MAX {
            let job = jobs.start("flush", "web", |_| Ok(None)).unwrap();
            ended(&jobs, job.id);
        }
        assert!(jobs.view().len() <= ENDED_MAX);
        assert!(jobs.find(2).is_ok(), "what runs is remembered");
        assert!(jobs.find(1).is_err(), "what ended first is forgotten first");
        jobs.close();
    }
}
