//! A volume's backing disk on this host: opened as it is, or made as a sparse image.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::created::Created;
use super::image::Sizing;
use crate::backing::{self, Disk, OpenError, OpenOptions};

/// How long a killed predecessor's last writes may keep the disk locked.
pub const PREDECESSOR_TIMEOUT: Duration = Duration::from_secs(10);

/// Which disk, and how.
#[derive(Clone, Debug)]
pub struct DiskOptions<'a> {
    /// Raw image or block device.
    pub path: &'a Path,
    /// Whether it is only read.
    pub read_only: bool,
    /// Whether it is raw whatever it looks like.
    pub raw: bool,
    /// How large.
    pub size: Sizing,
    /// How long to wait for whoever has it locked.
    pub wait: Duration,
    /// Opened already, by a process that gives it up.
    pub taken: Option<Arc<fs::File>>,
}

/// An open disk.
pub struct OpenDisk {
    /// The disk.
    pub disk: Arc<Disk>,
    /// Whether it was made just now.
    pub is_new: bool,
}

/// Opens a disk, making it first where nothing is and a size is known.
///
/// # Errors
/// [`OpenError`]; nothing has been changed.
pub fn open_or_create(options: &DiskOptions<'_>, created: &mut Created) -> Result<OpenDisk, OpenError> {
    let path = options.path;
    let is_missing = matches!(fs::metadata(path), Err(error) if error.kind() == io::ErrorKind::NotFound);
    let to_create = options.size.to_create().filter(|_| is_missing);
    if let Some(size) = to_create {
        backing::create_sparse(path, size)?;
        created.file(path);
    }
    let mut open = OpenOptions::new(path);
    open.read_only = options.read_only;
    open.allow_format = options.raw;
    open.wait_lock = Some(options.wait);
    open.taken = options.taken.clone();
    if let Sizing::Exactly(size) = options.size {
        // It exists by now: this compares, and creates nothing.
        open.create_sparse = Some(size);
    }
    let disk = Arc::new(Disk::open(&open)?);
    Ok(OpenDisk { disk, is_new: to_create.is_some() })
}
