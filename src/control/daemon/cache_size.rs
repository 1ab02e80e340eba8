//! A cache grows and shrinks while its volumes are served.
//!
//! Laws:
//! - One change of a cache's size at a time; the engine refuses a second one.
//! - A shrink that is called off leaves the cache as large as it was; what was evicted is gone from it.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::super::api::model::Job;
use super::jobs::{Outcome, Task};
use super::{Daemon, DaemonError, OpenCache};
use crate::cache::ResizeProgress;
use crate::cache::worker::DrainProgress;
use crate::tools::image::Sizing;
use crate::units::Bytes;

impl Daemon {
    /// Begins to give a cache another size.
    ///
    /// # Errors
    /// There is no such cache, or the job cannot be begun.
    pub fn start_cache_resize(self: &Arc<Self>, name: &str, size: u64) -> Result<Job, DaemonError> {
        let is_it = |open: &OpenCache| open.config.name.as_str() == name;
        let at = self.caches.iter().position(is_it).ok_or_else(|| self.no_cache(name))?;
        let own = Arc::clone(self);
        self.jobs.start("resize", name, move |task| resize(&own.caches[at], size, task))
    }

    fn no_cache(&self, given: &str) -> DaemonError {
        let known = self.caches.iter().map(|open| open.config.name.as_str());
        let nearest = super::super::suggest::nearest(given, known).map(str::to_owned);
        DaemonError::NoCache { given: given.into(), nearest }
    }
}

fn resize(open: &OpenCache, size: u64, task: &Task) -> Outcome {
    let before = open.cache.geometry();
    let segment = u64::from(before.segment_size);
    let resized = open.cache.resize(size, &mut |step: &ResizeProgress| {
        let left = step.segments_total - step.segments_done;
        task.progress(DrainProgress {
            total_bytes: u64::from(step.segments_total) * segment,
            dirty_bytes: u64::from(left) * segment,
        });
        if task.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let after = resized.map_err(|error| error.to_string())?;
    tracing::info!(
        "cache {}: {} segments became {}, {} bytes {}",
        open.config.name,
        before.segment_count,
        after.segment_count,
        before.device_size,
        after.device_size
    );
    let remark = match open.config.size {
        Sizing::Exactly(configured) if configured != after.device_size => {
            "; say so in the configuration as well, or the next start refuses the cache"
        }
        _ => "",
    };
    let said = format!(
        "{} became {}: {} segments of {} instead of {}{remark}",
        Bytes(before.device_size),
        Bytes(after.device_size),
        after.segment_count,
        Bytes(segment),
        before.segment_count
    );
    Ok(Some(said))
}
