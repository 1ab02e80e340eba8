//! Why a disk could not be opened, sorted by who must act.
//!
//! Each variant is one sentence an operator can act upon; `tests/open.rs` provokes every one of
//! them for real.

use std::io;
use std::path::{Path, PathBuf};

/// Why [`Disk::open`](super::Disk::open) or [`create_sparse`](super::create_sparse) refused.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nothing has that name.
    #[error("{path}: there is no such file or block device")]
    Missing {
        /// As given.
        path: PathBuf,
    },
    /// A directory.
    #[error("{path} is a directory, not a disk image or block device")]
    IsDirectory {
        /// As given.
        path: PathBuf,
    },
    /// A character device.
    #[error("{path} is a character device, which has no blocks; name a block device or a raw image")]
    IsCharDevice {
        /// As given.
        path: PathBuf,
    },
    /// A pipe, a socket.
    #[error("{path} is a {what}, not a disk image or block device")]
    NotADisk {
        /// As given.
        path: PathBuf,
        /// What it is instead.
        what: &'static str,
    },
    /// No bytes.
    #[error("{path} is empty; a disk needs a size (`truncate -s SIZE` gives an image one)")]
    Empty {
        /// As given.
        path: PathBuf,
    },
    /// Not a whole number of blocks.
    #[error("{path} is {size} bytes long, which is not a multiple of its block size of {block} bytes")]
    OddSize {
        /// As given.
        path: PathBuf,
        /// Length in bytes.
        size: u64,
        /// Logical block in bytes.
        block: u32,
    },
    /// A block size no virtio-blk driver expects.
    #[error("{path} has logical blocks of {block} bytes; only 512 and 4096 are supported")]
    BlockSize {
        /// As given.
        path: PathBuf,
        /// Logical block in bytes.
        block: u32,
    },
    /// The kernel of this host uses it.
    #[error("{path} is in use by this host: {by}")]
    InUse {
        /// As given.
        path: PathBuf,
        /// Mount point, swap, mapped device.
        by: String,
    },
    /// Another program holds a lock on it.
    #[error("{path} is locked by {holder}")]
    Locked {
        /// As given.
        path: PathBuf,
        /// Name and process id where they can be seen.
        holder: String,
    },
    /// The file system cannot lock.
    #[error("{path} cannot be locked: {source}; without a lock, two programs may write to it at once")]
    LockFailed {
        /// As given.
        path: PathBuf,
        /// What fcntl said.
        source: io::Error,
    },
    /// An image of another format, which served raw would be destroyed.
    #[error(
        "{path} looks like {format}, not like a raw disk; convert it (`qemu-img convert -O raw`), \
         or say that its format is raw if the guest wrote this itself"
    )]
    Formatted {
        /// As given.
        path: PathBuf,
        /// Name of the format.
        format: &'static str,
    },
    /// File permissions or the immutable attribute forbid it.
    #[error("{path}: permission denied to open it {access} as user {uid}")]
    PermissionDenied {
        /// As given.
        path: PathBuf,
        /// "for reading" or "for writing".
        access: &'static str,
        /// Effective user.
        uid: u32,
    },
    /// The file system or the device is read-only.
    #[error("{path} can only be read; open it read-only or make it writable")]
    WriteProtected {
        /// As given.
        path: PathBuf,
    },
    /// It exists with another size than was to be created.
    #[error("{path} exists with {found} bytes, but {wanted} were asked for; it was left alone")]
    SizeDiffers {
        /// As given.
        path: PathBuf,
        /// Length in bytes.
        found: u64,
        /// Length asked for.
        wanted: u64,
    },
    /// A new image was asked for where something exists.
    #[error("{path} exists; it was left alone")]
    Exists {
        /// As given.
        path: PathBuf,
    },
    /// The name stopped meaning the same file while it was being opened.
    #[error("{path} was replaced by another file while it was being opened; try again")]
    Replaced {
        /// As given.
        path: PathBuf,
    },
    /// The kernel refused something else.
    #[error("{path}: {doing}: {source}")]
    Io {
        /// As given.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl OpenError {
    /// Wraps what the kernel said while `doing` something to `path`.
    pub(super) fn io(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, doing, source }
    }
}

/// The open disk is no longer what it was.
#[derive(Debug, thiserror::Error)]
pub enum DiskChanged {
    /// Its end is gone: reads there fail, and a write would leave a hole before it.
    #[error("{path} shrank from {opened} to {now} bytes while in use")]
    Shrunk {
        /// As given at open.
        path: PathBuf,
        /// Size at open.
        opened: u64,
        /// Size now.
        now: u64,
    },
    /// Its name means another file; what we write goes to one that nobody will find.
    #[error("{path} was replaced by another file while in use")]
    Replaced {
        /// As given at open.
        path: PathBuf,
    },
    /// Its name is gone.
    #[error("{path} was removed while in use")]
    Removed {
        /// As given at open.
        path: PathBuf,
    },
    /// It could not be looked at.
    #[error("{path} could not be examined: {source}")]
    Io {
        /// As given at open.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}
