//! A volume becomes larger while it is used: the engine first, then its VM is told.
//!
//! Laws:
//! - One change of size, mode or order at a time (`Served::switching`), and none while a checkpoint
//!   holds the disk still.
//! - A VM is told of a size only when the volume has it, durably.

use std::sync::Arc;

use super::super::api::model::Job;
use super::jobs::Outcome;
use super::{Daemon, DaemonError, Served, lock};
use crate::units::Bytes;

impl Daemon {
    /// Begins to make a volume so many bytes large, or as large as its disk has become.
    ///
    /// # Errors
    /// It cannot be begun.
    pub fn start_resize(self: &Arc<Self>, name: &str, bytes: Option<u64>) -> Result<Job, DaemonError> {
        let served = self.find(name)?;
        served.refuse_if_held()?;
        self.jobs.start("resize", name, move |_| resize(&served, bytes))
    }
}

fn resize(served: &Served, bytes: Option<u64>) -> Outcome {
    let _alone = lock(&served.switching);
    served.refuse_if_held().map_err(|error| error.to_string())?;
    let before = served.volume.disk_config().sectors * 512;
    let size = served.volume.enlarge(bytes).map_err(|error| error.to_string())?;
    if size == before {
        return Ok(Some(format!("it has {} already", Bytes(size))));
    }
    let is_heard = lock(&served.front_end).as_ref().is_some_and(|front_end| front_end.config_changed());
    let seen = match (is_heard, served.is_connected()) {
        (true, _) => "its VM is told",
        (false, true) => "its VMM cannot be told, and sees it when it connects the next time",
        (false, false) => "no VM is connected",
    };
    tracing::info!("volume {}: {} became {}; {seen}", served.config.name, Bytes(before), Bytes(size));
    Ok(Some(format!("{} became {}; {seen}", Bytes(before), Bytes(size))))
}
