//! A backing disk whose cache is lost: what its redo area holds is brought to it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::backing::{Disk, OpenError, OpenOptions};
use crate::cache::{Recovered, RedoError, recover_backing};

/// How long whoever used the disk last may keep it locked.
const PREDECESSOR_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a disk is as it was.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The disk could not be opened.
    #[error("the backing disk {0}")]
    Disk(OpenError),
    /// Its redo area could not be opened.
    #[error("the redo area {0}")]
    Area(OpenError),
    /// The two could not be used.
    #[error("{0}; where it is the right disk all the same, --force applies the group")]
    Foreign(RedoError),
    /// Something failed.
    #[error(transparent)]
    Redo(RedoError),
}

/// Applies the group that the area at `redo` holds for the disk at `disk`; `None` where it holds none.
///
/// # Errors
/// [`RecoverError`]; what was begun goes on when it is called again.
pub fn recover(disk: &Path, redo: &Path, force: bool) -> Result<Option<Recovered>, RecoverError> {
    let open = |path: &Path| {
        let mut open = OpenOptions::new(path);
        // What a guest has written may look like anything; header and samples tell whether they fit.
        open.allow_format = true;
        open.wait_lock = Some(PREDECESSOR_TIMEOUT);
        Disk::open(&open)
    };
    let disk = open(disk).map_err(RecoverError::Disk)?;
    let redo = Arc::new(open(redo).map_err(RecoverError::Area)?);
    recover_backing(redo, &disk, force).map_err(|error| match error {
        RedoError::Foreign { .. } if !force => RecoverError::Foreign(error),
        error => RecoverError::Redo(error),
    })
}
