//! Backing disks whose cache is lost: what their redo areas hold is brought to them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::backing::{Disk, OpenError, OpenOptions};
use crate::cache::{Member, Recovered, RedoError, recover_group};

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
    /// Not one area for each disk.
    #[error("{disks} disks and {redos} redo areas are named: name one area for each disk, in their order")]
    Uneven {
        /// Disks named.
        disks: usize,
        /// Areas named.
        redos: usize,
    },
    /// The two could not be used.
    #[error("{0}; where it is the right disk all the same, --force applies the group")]
    Foreign(RedoError),
    /// Something failed.
    #[error(transparent)]
    Redo(RedoError),
}

/// Brings each of `disks` to the end of what its area, in `redos` at the same place, holds: those of a
/// consistency group to one common point; `None` where an area holds nothing that counts.
///
/// # Errors
/// [`RecoverError`]; what was begun goes on when it is called again.
pub fn recover(
    disks: &[PathBuf],
    redos: &[PathBuf],
    force: bool,
    alone: bool,
) -> Result<Vec<Option<Recovered>>, RecoverError> {
    if disks.len() != redos.len() {
        return Err(RecoverError::Uneven { disks: disks.len(), redos: redos.len() });
    }
    let open = |path: &PathBuf| {
        let mut open = OpenOptions::new(path);
        // What a guest has written may look like anything; header and samples tell whether they fit.
        open.allow_format = true;
        open.wait_lock = Some(PREDECESSOR_TIMEOUT);
        Disk::open(&open)
    };
    let disks = disks.iter().map(open).collect::<Result<Vec<_>, _>>().map_err(RecoverError::Disk)?;
    let redos = redos.iter().map(open).collect::<Result<Vec<_>, _>>().map_err(RecoverError::Area)?;
    let member = |(redo, disk)| Member { redo: Arc::new(redo), disk };
    let members: Vec<_> = redos.into_iter().zip(&disks).map(member).collect();
    recover_group(&members, force, alone).map_err(|error| match error {
        RedoError::Foreign { .. } if !force => RecoverError::Foreign(error),
        error => RecoverError::Redo(error),
    })
}
