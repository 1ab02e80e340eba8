//! A volume's redo area on this host: a file beside its disk, or what the operator names.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::created::Created;
use super::image::Sizing;
use crate::backing::{self, Disk, OpenError, OpenOptions};

/// Largest area that is made unless told: enough for large sequential runs between its flushes.
pub const SIZE_DEFAULT_MAX: u64 = 256 << 20;
/// Smallest area that is made unless told.
pub const SIZE_DEFAULT_MIN: u64 = 16 << 20;
/// How long a killed predecessor's last writes may keep it locked.
const PREDECESSOR_TIMEOUT: Duration = Duration::from_secs(10);

/// Which area.
#[derive(Clone, Debug)]
pub struct RedoOptions<'a> {
    /// What the operator named.
    pub path: Option<&'a Path>,
    /// The disk that it is for.
    pub disk: &'a Path,
    /// Bytes of that disk.
    pub disk_size: u64,
    /// Bytes to make it with, if it is to be made.
    pub size: Sizing,
    /// Whether it is made where it is missing.
    pub is_needed: bool,
    /// Opened already, by a process that gives it up.
    pub taken: Option<Arc<fs::File>>,
}

/// Where the area of an image file is unless told: beside it.
pub fn beside(disk: &Path) -> PathBuf {
    let mut name = OsString::from(disk.as_os_str());
    name.push(".redo");
    name.into()
}

/// Opens an area, making it first where it is needed: whole, so that no group meets a full file
/// system. `None` where there is none and none is needed, and for a block device where none is named.
///
/// # Errors
/// [`OpenError`]; nothing has been changed.
pub fn open_or_create(
    options: &RedoOptions<'_>,
    created: &mut Created,
) -> Result<Option<Arc<Disk>>, OpenError> {
    let is_file = fs::metadata(options.disk).is_ok_and(|meta| meta.is_file());
    let path = match options.path {
        Some(path) => path.to_owned(),
        None if is_file => beside(options.disk),
        None => return Ok(None),
    };
    let is_missing = matches!(fs::metadata(&path), Err(error) if error.kind() == io::ErrorKind::NotFound);
    if is_missing && !options.is_needed {
        return Ok(None);
    }
    if is_missing {
        let default = (options.disk_size / 16).clamp(SIZE_DEFAULT_MIN, SIZE_DEFAULT_MAX);
        backing::create_allocated(&path, options.size.to_create().unwrap_or(default))?;
        created.file(&path);
    }
    let mut open = OpenOptions::new(&path);
    // The engine refuses what is neither blank nor a redo area.
    open.allow_format = true;
    open.wait_lock = Some(PREDECESSOR_TIMEOUT);
    open.taken = options.taken.clone();
    Ok(Some(Arc::new(Disk::open(&open)?)))
}
