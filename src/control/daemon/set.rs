//! What can change in a volume while it is used: limits at once, mode and order as a job.
//!
//! Laws:
//! - Nothing changes if any of what is asked for is refused.
//! - One change of mode or order at a time (`Served::switching`), and none while a checkpoint holds the
//!   disk still: it could not end before that does.
//! - A change of order that is called off goes back to the order there was; limits stay.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use super::super::api::model::Job;
use super::super::config::{Mode, OnBackingError, Order};
use super::super::serve;
use super::super::share::{ShareArgs, ShareConfig};
use super::jobs::{Outcome, Task};
use super::{Daemon, DaemonError, Served, lock};
use crate::cache::worker::DrainProgress;
use crate::cache::{self, ShareError, Volume};
use crate::tools::Host;

/// Between two looks at a change of order.
const LOOK: Duration = Duration::from_millis(5);

/// What is to change; what is `None` stays.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Change {
    /// What is cached.
    pub mode: Option<Mode>,
    /// In which order write-back goes.
    pub order: Option<Order>,
    /// Seconds by which the disk may lag behind; 0 for no bound.
    pub max_lag_s: Option<u32>,
    /// Most dirty bytes; 0 for no bound.
    pub max_dirty: Option<u64>,
    /// What becomes of requests that need the disk while it fails.
    pub on_backing_error: Option<OnBackingError>,
    /// Seconds until a disk that does not answer has failed; 0 for never.
    pub backing_timeout_s: Option<u32>,
    /// What it may hold of the cache, and ask for.
    pub share: ShareArgs,
}

/// The limits of a volume as they are now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Limits {
    pub max_lag_s: u64,
    pub max_dirty_bytes: u64,
    pub on_backing_error: OnBackingError,
    pub backing_timeout_s: u64,
}

impl Limits {
    pub fn of(volume: &Volume<Host>) -> Self {
        Self {
            max_lag_s: volume.max_lag_ms() / 1000,
            max_dirty_bytes: volume.max_dirty(),
            on_backing_error: match volume.on_backing_error() {
                cache::OnBackingError::Wait => OnBackingError::Wait,
                cache::OnBackingError::Error => OnBackingError::Error,
                cache::OnBackingError::ReadOnly => OnBackingError::ReadOnly,
            },
            backing_timeout_s: volume.backing_timeout_ms() / 1000,
        }
    }
}

impl Served {
    /// Whether its order can be changed to this one without attaching it again.
    pub(super) fn may_change_order(&self, order: Order) -> Result<(), DaemonError> {
        if self.config.read_only {
            return Err(DaemonError::NotWrittenBack(self.config.name.to_string()));
        }
        Ok(self.volume.may_change_order(serve::order(order))?)
    }
}

impl Daemon {
    /// Changes a volume's limits, and begins to change its mode and order.
    ///
    /// # Errors
    /// It cannot be; nothing has been changed.
    pub fn start_set(self: &Arc<Self>, name: &str, change: Change) -> Result<Job, DaemonError> {
        let served = self.find(name)?;
        if let Some(order) = change.order {
            served.may_change_order(order)?;
        }
        if change.order.is_some() || change.mode.is_some() {
            served.refuse_if_held()?;
        }
        if change.share.is_any() {
            let wanted = change.share.applied_to(ShareConfig::of(&served.volume));
            self.caches[served.config.cache].cache.may_share(name, &wanted.shares)?;
        }
        let own = Arc::clone(self);
        self.jobs.start("set", name, move |task| {
            set_limits(&served.volume, &change).map_err(|error| error.to_string())?;
            own.switch(&served, change, task)
        })
    }

    fn switch(&self, served: &Served, change: Change, task: &Task) -> Outcome {
        if change.order.is_none() && change.mode.is_none() {
            return Ok(None);
        }
        // Two at a time would hold writes against each other.
        let _alone = lock(&served.switching);
        served.refuse_if_held().map_err(|error| error.to_string())?;
        if let Some(order) = change.order {
            self.switch_order(served, serve::order(order), task)?;
        }
        let Some(mode) = change.mode else { return Ok(None) };
        let allow_volatile = self.caches[served.config.cache].config.allow_volatile;
        let switched = served.volume.switch_mode(serve::mode(mode), allow_volatile, &mut |step| {
            task.progress(step);
            if task.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        switched.map(|()| None).map_err(|error| error.to_string())
    }

    fn switch_order(&self, served: &Served, order: cache::Order, task: &Task) -> Result<(), String> {
        let (volume, before) = (&served.volume, served.volume.order());
        let mut begun = volume.begin_progress();
        volume.change_order(order).map_err(|error| error.to_string())?;
        while volume.is_changing_order() || volume.order() != order {
            task.progress(begun.now(volume));
            if task.is_cancelled() {
                volume.change_order(before).map_err(|error| error.to_string())?;
                return Err(format!("it was interrupted; the order stays {}", before.name()));
            }
            if !self.is_serving(served) {
                return Err("it is being detached; the order is changed when it is set again".into());
            }
            std::thread::sleep(LOOK);
        }
        task.progress(DrainProgress::ended(begun.now(volume).total_bytes));
        Ok(())
    }
}

fn set_limits(volume: &Volume<Host>, change: &Change) -> Result<(), ShareError> {
    if change.share.is_any() {
        // First: of all limits only these may be refused, if another change came between.
        change.share.applied_to(ShareConfig::of(volume)).set(volume)?;
    }
    if let Some(seconds) = change.max_lag_s {
        volume.set_max_lag_ms(u64::from(seconds) * 1000);
    }
    if let Some(bytes) = change.max_dirty {
        volume.set_max_dirty(bytes);
    }
    if change.on_backing_error.is_some() || change.backing_timeout_s.is_some() {
        let now = Limits::of(volume);
        let policy = change.on_backing_error.unwrap_or(now.on_backing_error);
        let timeout_s = change.backing_timeout_s.map_or(now.backing_timeout_s, u64::from);
        volume.set_on_backing_error(serve::on_backing_error(policy), timeout_s * 1000);
    }
    Ok(())
}
