//! Makes a cache file: all of its space, or no file at all.
//!
//! The file appears under its name only when it is complete (`O_TMPFILE`, then a link, which never
//! replaces anything), so neither a full file system nor a kill leaves half of one. Two cases are
//! made in place instead, and undone on failure: a file that exists and is empty keeps its owner
//! and mode, and some file systems (NFS, overlayfs) know no `O_TMPFILE`.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::lock::{self, Holder, LockError};

/// The file was not made, and nothing is left of the attempt.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// There is something already. It was not touched.
    #[error("{} exists already and is not empty; name another file, or format it explicitly", path.display())]
    Exists {
        /// As given.
        path: PathBuf,
    },
    /// Somebody else is making it, or using it.
    #[error("{} is in use by {holder}", path.display())]
    InUse {
        /// As given.
        path: PathBuf,
        /// Who.
        holder: Holder,
    },
    /// Not enough space.
    #[error("no space for {} of {size} bytes: {} are free, {} are missing", path.display(), free, size.saturating_sub(*free))]
    NoSpace {
        /// As given.
        path: PathBuf,
        /// Bytes wanted.
        size: u64,
        /// Bytes that an ordinary user may take.
        free: u64,
    },
    /// The kernel refused a step.
    #[error("{} cannot be {step}: {source}", path.display())]
    Io {
        /// As given.
        path: PathBuf,
        /// A past participle: "created", "allocated".
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Takes a file's space: [`allocate`], but for the tests of what happens when that fails halfway.
type Allocate = fn(&File, u64) -> io::Result<()>;

/// Only the owner may read what guests have written.
const MODE: u32 = 0o600;

/// Makes a file of `size` zero bytes, all of them allocated, durable together with its name.
///
/// # Errors
/// [`CreateError`]; whatever existed before is unchanged, and nothing else exists.
pub fn create(path: &Path, size: u64) -> Result<(), CreateError> {
    let dir = match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    };
    let failed = |step| move |source| CreateError::Io { path: path.to_owned(), step, source };
    if size == 0 || size > i64::MAX as u64 {
        return Err(failed("created")(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{size} bytes is not a size for a cache"),
        )));
    }
    match fs::metadata(path) {
        Ok(found) if found.is_file() && found.len() == 0 => make_in_place(path, size, false, allocate)?,
        Ok(_) => return Err(CreateError::Exists { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let unnamed =
                fs::OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).mode(MODE).open(dir);
            match unnamed {
                Ok(file) => {
                    fill(path, &file, size, allocate)?;
                    link(&file, path).map_err(|error| match error.kind() {
                        io::ErrorKind::AlreadyExists => CreateError::Exists { path: path.to_owned() },
                        _ => failed("linked")(error),
                    })?;
                }
                Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
                    make_in_place(path, size, true, allocate)?;
                }
                Err(error) => return Err(failed("created")(error)),
            }
        }
        Err(error) => return Err(failed("examined")(error)),
    }
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed("made durable"))
}

/// Fills the file under its name, and undoes that on failure: removes it if it is ours (`new`),
/// else empties it again.
fn make_in_place(path: &Path, size: u64, new: bool, allocate: Allocate) -> Result<(), CreateError> {
    let failed = |step| move |source| CreateError::Io { path: path.to_owned(), step, source };
    let file =
        fs::OpenOptions::new().write(true).create_new(new).mode(MODE).open(path).map_err(
            |error| match error.kind() {
                io::ErrorKind::AlreadyExists => CreateError::Exists { path: path.to_owned() },
                _ => failed("created")(error),
            },
        )?;
    lock::lock(&file, true).map_err(|error| match error {
        LockError::Held(holder) => CreateError::InUse { path: path.to_owned(), holder },
        LockError::Io(source) => failed("locked")(source),
    })?;
    // Under the lock: whoever else was making it is done, or has given up.
    if file.metadata().map_err(failed("examined"))?.len() != 0 {
        return Err(CreateError::Exists { path: path.to_owned() });
    }
    fill(path, &file, size, allocate).inspect_err(|_| {
        if new {
            drop(fs::remove_file(path));
        }
    })
}

/// Makes a file that is in use longer: takes all of the space, makes that durable. On failure it has the
/// length it had.
///
/// # Errors
/// There is not enough space, or the file system refuses; a sentence says how much there is.
pub(super) fn extend(file: &File, from: u64, to: u64) -> io::Result<()> {
    let missing = to.saturating_sub(from);
    let no_space = |free: u64| {
        let what = format!("{missing} bytes more are needed and {free} are free");
        io::Error::new(io::ErrorKind::StorageFull, what)
    };
    if let Ok(free) = free_space(file)
        && free < missing
    {
        return Err(no_space(free));
    }
    let Err(error) = allocate_from(file, from, to).and_then(|()| file.sync_all()) else { return Ok(()) };
    // What is beyond the end is nobody's yet.
    drop(file.set_len(from));
    match (error.kind(), free_space(file)) {
        (io::ErrorKind::StorageFull, Ok(free)) => Err(no_space(free)),
        _ => Err(error),
    }
}

/// Allocates, and makes durable. On failure the file is empty again.
fn fill(path: &Path, file: &File, size: u64, allocate: Allocate) -> Result<(), CreateError> {
    let no_space = |free| CreateError::NoSpace { path: path.to_owned(), size, free };
    // Asked before, because a try would take all that is left from everybody else for its duration.
    if let Ok(free) = free_space(file)
        && free < size
    {
        return Err(no_space(free));
    }
    let Err(source) = allocate(file, size).and_then(|()| file.sync_all()) else { return Ok(()) };
    // Gives the space back before it is counted, and undoes what was done in place. A file that
    // cannot even be shortened is about to be removed, or was never linked.
    drop(file.set_len(0));
    match (source.kind(), free_space(file)) {
        (io::ErrorKind::StorageFull, Ok(free)) if free < size => Err(no_space(free)),
        _ => Err(CreateError::Io { path: path.to_owned(), step: "allocated", source }),
    }
}

fn allocate(file: &File, size: u64) -> io::Result<()> {
    allocate_from(file, 0, size)
}

/// Takes the space of a file from `from`, where it ends, to `to`.
#[expect(unsafe_code, reason = "calls fallocate")]
fn allocate_from(file: &File, from: u64, to: u64) -> io::Result<()> {
    loop {
        // SAFETY: the descriptor is open; the range is checked by the kernel.
        if unsafe { libc::fallocate(file.as_raw_fd(), 0, from as i64, (to - from) as i64) } == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => {}
            error if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return write_zeros(file, from, to),
            error => return Err(error),
        }
    }
}

/// For file systems that allocate only what is written.
fn write_zeros(file: &File, from: u64, to: u64) -> io::Result<()> {
    let zeros = vec![0; 1 << 20];
    let mut at = from;
    while at < to {
        let step = (to - at).min(zeros.len() as u64);
        file.write_all_at(&zeros[..step as usize], at)?;
        at += step;
    }
    Ok(())
}

#[expect(unsafe_code, reason = "calls fstatvfs")]
fn free_space(file: &File) -> io::Result<u64> {
    // SAFETY: statvfs is plain numbers, for which zero is valid.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and `stat` is writable.
    if unsafe { libc::fstatvfs(file.as_raw_fd(), &mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if stat.f_blocks == 0 {
        // Some network and user-space file systems do not tell.
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Names a file that has no name. Fails if the name is taken.
#[expect(unsafe_code, reason = "calls linkat")]
fn link(file: &File, path: &Path) -> io::Result<()> {
    let unnamed = std::ffi::CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let name = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: both strings end in NUL and outlive the call.
    let linked = unsafe {
        libc::linkat(libc::AT_FDCWD, unnamed.as_ptr(), libc::AT_FDCWD, name.as_ptr(), libc::AT_SYMLINK_FOLLOW)
    };
    if linked == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests;
