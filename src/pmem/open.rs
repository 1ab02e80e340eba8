//! From a path to mapped memory of a known class, or to a sentence that says why not.
//!
//! Opening changes nothing on the media. What has been opened exclusively stays locked until the
//! [`MappedPmem`] is dropped.

use std::fs::{self, File};
use std::io::{self, Seek};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::classify::{self, Medium, PersistenceDomain, Refusal};
use super::lock::{self, Holder, LockError};
use super::mapped::MappedPmem;
use super::mapping::{MapFailure, Mapping, Part};
use super::{MediaClass, StorePlan, guard};

/// How to open a cache's media.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// A devdax device, a file, or a block device.
    pub path: PathBuf,
    /// Map without the right to write; [`super::Pmem::write`] then panics.
    pub read_only: bool,
    /// Use memory that loses its content with power as if it did not: tests and benchmarks only.
    pub assume_dax: bool,
    /// Keep others out: from reading and writing, or with `read_only` from writing only.
    pub lock: bool,
    /// Touch every page now, so that no request pays for a first touch.
    pub prefault: bool,
    /// The media, opened and locked already by a process that gives them up. `path` still has to mean
    /// them.
    pub taken: Option<Arc<File>>,
    /// How to store; `None` chooses. Opening DAX with one that is not durable panics.
    pub store: Option<StorePlan>,
}

impl OpenOptions {
    /// For reading and writing, locked, nothing assumed, nothing pre-faulted.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            read_only: false,
            assume_dax: false,
            lock: true,
            prefault: false,
            taken: None,
            store: None,
        }
    }
}

/// The media were not opened. Each is one sentence that says what to do, or leaves no doubt.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such file.
    #[error("cache {} does not exist", path.display())]
    Missing {
        /// As given.
        path: PathBuf,
    },
    /// Somebody has it.
    #[error("cache {} is in use by {holder}", path.display())]
    InUse {
        /// As given.
        path: PathBuf,
        /// Who.
        holder: Holder,
    },
    /// A block device that is mounted, or part of something else.
    #[error("cache {} is in use by the kernel: it is mounted, or part of a RAID, LVM or device-mapper device", path.display())]
    Claimed {
        /// As given.
        path: PathBuf,
    },
    /// `/dev/pmemN`.
    #[error(
        "cache {} is the block device of persistent memory, which hides the memory behind the page cache; \
         use a devdax device (ndctl create-namespace --mode=devdax) or a file on a file system mounted with -o dax",
        path.display()
    )]
    RawPmem {
        /// As given.
        path: PathBuf,
    },
    /// A directory, a socket, a terminal.
    #[error("cache {} is {what}, not a file, a block device or a devdax device", path.display())]
    NotMedia {
        /// As given.
        path: PathBuf,
        /// With its article.
        what: &'static str,
    },
    /// No bytes.
    #[error("cache {} is empty; create it with a size", path.display())]
    Empty {
        /// As given.
        path: PathBuf,
    },
    /// `assume_dax` for something that is not memory.
    #[error(
        "cache {} is not memory and cannot be assumed to be DAX; leave that out, or use a file on tmpfs or hugetlbfs",
        path.display()
    )]
    NotMemory {
        /// As given.
        path: PathBuf,
    },
    /// This machine cannot guard itself against vanishing memory.
    #[error("cache {} cannot be mapped safely: {source}", path.display())]
    Unguarded {
        /// As given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused a step.
    #[error("cache {} cannot be {step}: {source}", path.display())]
    Io {
        /// As given.
        path: PathBuf,
        /// A past participle: "opened", "mapped".
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A file, and what was found out about it on the way to mapping it.
struct Found {
    file: File,
    medium: Medium,
    domain: PersistenceDomain,
    len: u64,
    /// Alignment of address and length that the kernel demands of a mapping.
    page_size: u64,
}

impl MappedPmem {
    /// Opens, classifies, locks and maps.
    ///
    /// # Errors
    /// [`OpenError`]; nothing was changed.
    pub fn open(options: &OpenOptions) -> Result<Self, OpenError> {
        let path = || options.path.clone();
        guard::install().map_err(|source| OpenError::Unguarded { path: path(), source })?;
        let found = find(options)?;
        if options.lock {
            lock::lock(&found.file, !options.read_only).map_err(|error| match error {
                LockError::Held(holder) => OpenError::InUse { path: path(), holder },
                LockError::Io(source) => OpenError::Io { path: path(), step: "locked", source },
            })?;
        }
        let (class, reason) =
            classify::classify(&found.medium, &found.domain, options.assume_dax).map_err(|refusal| {
                match refusal {
                    Refusal::RawPmem => OpenError::RawPmem { path: path() },
                    Refusal::NotMemory => OpenError::NotMemory { path: path() },
                }
            })?;
        if found.len == 0 {
            return Err(OpenError::Empty { path: path() });
        }
        let map_sync = matches!(found.medium, Medium::File { map_sync: true, dax_attribute: true, .. });
        let Found { file, len, page_size, .. } = found;
        let part = Part { path: path(), file, base: 0, start: 0, page_size, map_sync };
        let mapping = Mapping::new(std::slice::from_ref(&part), len, !options.read_only)
            .and_then(|mapping| {
                if options.prefault {
                    mapping.prefault(class)?;
                }
                Ok(mapping)
            })
            .map_err(|MapFailure { step, source }| OpenError::Io { path: path(), step, source })?;
        let store = options.store.unwrap_or_else(|| {
            if class.fence_is_durable() { StorePlan::measured() } else { StorePlan::plain() }
        });
        Ok(Self::new(vec![part], mapping, class, reason, store))
    }
}

/// Opens the file and asks the kernel what it is.
fn find(options: &OpenOptions) -> Result<Found, OpenError> {
    let path = || options.path.clone();
    let io_error = |step| move |source| OpenError::Io { path: options.path.clone(), step, source };
    let file = open_file(options)?;
    let meta = file.metadata().map_err(io_error("examined"))?;
    let kind = meta.file_type();
    if kind.is_char_device() {
        let device = sysfs_device(Path::new("/sys"), "char", meta.rdev());
        let subsystem = device.as_ref().and_then(|dir| fs::canonicalize(dir.join("subsystem")).ok());
        let (Some(device), Some("dax")) =
            (device, subsystem.as_ref().and_then(|name| name.file_name()?.to_str()))
        else {
            return Err(OpenError::NotMedia { path: path(), what: "a character device that is not devdax" });
        };
        let number = |name: &str| fs::read_to_string(device.join(name)).ok()?.trim().parse::<u64>().ok();
        let len = number("size").ok_or_else(|| {
            io_error("measured")(io::Error::new(io::ErrorKind::InvalidData, "sysfs tells no size"))
        })?;
        // Kernels before 5.10 do not tell; 2 MiB is what ndctl makes by itself.
        let page_size = number("align").unwrap_or(2 << 20);
        let domain = classify::domain_of_device(&device);
        return Ok(Found { file, medium: Medium::DevDax, domain, len, page_size });
    }
    if kind.is_block_device() {
        let name = sysfs_device(Path::new("/sys"), "block", meta.rdev())
            .and_then(|device| Some(device.file_name()?.to_str()?.to_owned()))
            .unwrap_or_default();
        let len = (&file).seek(io::SeekFrom::End(0)).map_err(io_error("measured"))?;
        let medium = Medium::Block(name);
        return Ok(Found { file, medium, domain: PersistenceDomain::Unknown, len, page_size: 4096 });
    }
    if !kind.is_file() {
        let what = if kind.is_dir() { "a directory" } else { "a pipe or something stranger" };
        return Err(OpenError::NotMedia { path: path(), what });
    }
    let (magic, fs_block) = file_system(&file).map_err(io_error("examined"))?;
    let memory_fs = classify::memory_fs(magic);
    let page_size = if memory_fs == Some("hugetlbfs") { fs_block } else { 4096 };
    let map_sync = memory_fs.is_none() && meta.len() > 0 && Mapping::can_sync(&file, !options.read_only);
    let medium = Medium::File { memory_fs, map_sync, dax_attribute: has_dax_attribute(&file) };
    let domain = classify::domain_of_all_regions(Path::new("/sys"));
    Ok(Found { file, medium, domain, len: meta.len(), page_size })
}

fn open_file(options: &OpenOptions) -> Result<File, OpenError> {
    let path = options.path.clone();
    if let Some(taken) = &options.taken {
        let same = || -> io::Result<File> {
            let (named, given) = (fs::metadata(&path)?, taken.metadata()?);
            match (named.dev(), named.ino()) == (given.dev(), given.ino()) {
                true => taken.try_clone(),
                false => Err(io::Error::other("its name means something else than what was taken over")),
            }
        };
        return same().map_err(|source| OpenError::Io { path: path.clone(), step: "taken over", source });
    }
    // Non-blocking, so that a pipe is refused rather than waited for; it means nothing to media.
    let mut flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let is_block = fs::metadata(&path).is_ok_and(|meta| meta.file_type().is_block_device());
    if is_block && options.lock && !options.read_only {
        // The kernel's own claim: fails on what is mounted or part of another device.
        flags |= libc::O_EXCL;
    }
    fs::OpenOptions::new().read(true).write(!options.read_only).custom_flags(flags).open(&path).map_err(
        |source| match source.raw_os_error() {
            Some(libc::ENOENT) => OpenError::Missing { path },
            Some(libc::EISDIR) => OpenError::NotMedia { path, what: "a directory" },
            Some(libc::ENXIO) => OpenError::NotMedia { path, what: "a socket or a device without a driver" },
            Some(libc::EBUSY) if is_block => claimed(path),
            _ => OpenError::Io { path, step: "opened", source },
        },
    )
}

/// Finds out who has a cache by now, for the refusal to name him: a process that has been confined in
/// between does not see others' descriptors.
pub fn notice_holder(path: &Path) {
    if let Ok(file) = File::open(path) {
        lock::held(&file);
    }
}

/// A block device that refused to be claimed: by one of us, or by the kernel.
fn claimed(path: PathBuf) -> OpenError {
    let held = File::open(&path).ok().and_then(|file| lock::lock(&file, false).err());
    match held {
        Some(LockError::Held(holder)) => OpenError::InUse { path, holder },
        _ => OpenError::Claimed { path },
    }
}

/// A device's directory in sysfs, links resolved.
fn sysfs_device(sys: &Path, kind: &str, rdev: u64) -> Option<PathBuf> {
    let (major, minor) = (libc::major(rdev), libc::minor(rdev));
    fs::canonicalize(sys.join(format!("dev/{kind}/{major}:{minor}"))).ok()
}

/// Magic number and block size of the file system.
#[expect(unsafe_code, reason = "calls fstatfs")]
fn file_system(file: &File) -> io::Result<(i64, u64)> {
    // SAFETY: statfs is plain numbers, for which zero is valid.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and `stat` is writable.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((stat.f_type as i64, stat.f_bsize as u64))
}

/// Whether the kernel says that the file bypasses the page cache (Linux 5.8 and later).
#[expect(unsafe_code, reason = "calls statx")]
fn has_dax_attribute(file: &File) -> bool {
    // SAFETY: statx is plain numbers, for which zero is valid.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty path with AT_EMPTY_PATH is the descriptor itself; `stat` is writable.
    let asked = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_BASIC_STATS, &mut stat)
    };
    asked == 0 && stat.stx_attributes & stat.stx_attributes_mask & libc::STATX_ATTR_DAX as u64 != 0
}

/// Bytes that a device has now.
pub(super) fn device_len(file: &File, meta: &fs::Metadata) -> io::Result<u64> {
    if meta.file_type().is_block_device() {
        return (&*file).seek(io::SeekFrom::End(0));
    }
    let device = sysfs_device(Path::new("/sys"), "char", meta.rdev());
    let size = device.and_then(|device| fs::read_to_string(device.join("size")).ok()?.trim().parse().ok());
    size.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "sysfs tells no size"))
}

/// One sentence for the log line at start.
pub(super) fn durability(class: MediaClass) -> &'static str {
    match class {
        MediaClass::Dax => "an acknowledged write survives a power cut",
        MediaClass::AssumeDax => "for tests and benchmarks only: a power cut loses everything",
        MediaClass::PageCache => "a write survives a power cut once a later FLUSH is acknowledged",
        MediaClass::Volatile => "survives the daemon, not the host",
    }
}
