//! A raw image or a block device, opened for exclusive use.
//!
//! Opening goes in this order, and the order matters:
//! 1. look at the name: opening a pipe would block, and some devices act on being opened;
//! 2. ask whether this host uses it: after the open the kernel says only "busy";
//! 3. open, block devices exclusively, and look again at what was opened;
//! 4. lock, on the very descriptor that will do the I/O (see `lock`);
//! 5. only then read anything: before the lock, a predecessor may still be writing.

use std::fmt;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;

use super::channel::DiskChannel;
use super::error::{DiskChanged, OpenError};
use super::file::DiskFile;
use super::threads::Pool;
use super::{AlignedBuf, Backing, BackingGeometry, BackingIdentity, BackingKind, Traces};
use super::{geometry, identity, lock, probe, sample, sidecar, usage};
use crate::wake::Waker;

/// Whether to go around the page cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Direct {
    /// Where the file system can: errors come back with the write they belong to, and nothing is
    /// cached twice.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// What does the I/O.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Engine {
    /// io_uring where this host permits it, helper threads otherwise.
    #[default]
    Auto,
    /// Helper threads.
    Threads,
}

/// How to open a disk.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Name of the image or block device.
    pub path: PathBuf,
    /// Open for reading only.
    pub read_only: bool,
    /// Whether to go around the page cache.
    pub direct: Direct,
    /// What does the I/O.
    pub engine: Engine,
    /// Serve it raw even if it begins like an image of another format.
    pub allow_format: bool,
    /// Lock it against other programs. Off only where the file system has no locks.
    pub lock: bool,
    /// How long to wait for a lock held by another, such as a killed predecessor whose last writes
    /// are still in flight. `None`: not at all.
    pub wait_lock: Option<Duration>,
    /// The disk, opened and locked already by a process that gives it up. `path` still has to mean it,
    /// and it was opened with the same rights.
    pub taken: Option<Arc<File>>,
    /// Make a new sparse image of this many bytes if nothing has that name. What exists must have
    /// this size, and is left as it is.
    pub create_sparse: Option<u64>,
}

impl OpenOptions {
    /// `path` for reading and writing, direct where possible, locked, without waiting.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            read_only: false,
            direct: Direct::Auto,
            engine: Engine::Auto,
            allow_format: false,
            lock: true,
            wait_lock: None,
            taken: None,
            create_sparse: None,
        }
    }
}

/// What a disk and its channels share. Dropped with the last of them, which closes the descriptor
/// and so gives up the locks.
pub(super) struct Core {
    /// Before `file`: joining the helpers needs nothing of it.
    pub(super) pool: Pool,
    pub(super) file: Arc<DiskFile>,
    /// As it was opened; see [`Core::geometry`].
    opened: BackingGeometry,
    /// Bytes, never fewer than before.
    size: AtomicU64,
    pub(super) engine: Engine,
    /// Whether the log already says that this host has no io_uring for us.
    pub(super) told_no_ring: Once,
}

impl Core {
    /// What the disk is like now.
    pub(super) fn geometry(&self) -> BackingGeometry {
        BackingGeometry { size: self.size.load(Ordering::Acquire), ..self.opened }
    }
}

/// An open raw image or block device.
pub struct Disk {
    core: Arc<Core>,
    path: PathBuf,
    /// `path` from the root, so that changing directory does not change its meaning.
    absolute: PathBuf,
    kind: BackingKind,
    meta: Metadata,
    /// Whether the time of its last write is of this host's clock, and not of our own making.
    has_times: bool,
}

impl Disk {
    /// Opens a disk for exclusive use (shared with other readers if `read_only`).
    ///
    /// # Errors
    /// [`OpenError`]: the operator's to mend, each with one sentence that says how.
    pub fn open(options: &OpenOptions) -> Result<Self, OpenError> {
        let path = &options.path;
        let absolute = std::path::absolute(path).map_err(OpenError::io(path, "finding its full path"))?;
        if let Some(size) = options.create_sparse {
            match create_sparse(path, size) {
                Ok(()) | Err(OpenError::Exists { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        let named = fs::metadata(path).map_err(|e| refusal(options, "looking it up", e))?;
        let kind = kind_of(path, &named)?;
        let used = match kind {
            // Whoever gives it up has it exclusively.
            _ if options.taken.is_some() => None,
            BackingKind::BlockDevice => usage::of_device(named.rdev()),
            BackingKind::File => usage::of_file(&named),
        };
        if let Some(by) = used {
            return Err(OpenError::InUse { path: path.clone(), by });
        }
        let mut wait = lock::Wait::new(path, options.wait_lock.unwrap_or_default());
        let (file, mut direct) = open_file(options, kind, &mut wait)?;
        let meta = file.metadata().map_err(OpenError::io(path, "examining it"))?;
        if !is_same(&named, &meta) {
            return Err(OpenError::Replaced { path: path.clone() });
        }
        if options.lock {
            lock::acquire(&file, options.read_only, &mut wait)?;
            // Whoever had it locked may have put another file in its place.
            if !fs::metadata(path).is_ok_and(|now| is_same(&now, &meta)) {
                return Err(OpenError::Replaced { path: path.clone() });
            }
        }
        let geometry = measure(options, &file, kind, &meta)?;
        let align = direct.then(|| direct_align(&file, &geometry, kind)).flatten();
        if direct && align.is_none() {
            direct = false;
            geometry::make_buffered(&file).map_err(OpenError::io(path, "turning direct I/O off"))?;
        }
        let file = DiskFile::new(file, align.unwrap_or(1));
        if !options.allow_format {
            refuse_foreign_format(path, &file, geometry.size)?;
        }
        let (can_punch, has_times) = match kind {
            BackingKind::File if !options.read_only => {
                identity::keep_times(file.file(), || file.can_punch(geometry.size))
            }
            kind => (kind == BackingKind::BlockDevice, true),
        };
        let has_times = has_times && kind == BackingKind::File && identity::has_local_times(file.file());
        let can_unmap = geometry.can_unmap && can_punch;
        let geometry = BackingGeometry { can_unmap, ..geometry };
        tracing::debug!(path = %path.display(), direct, ?align, ?geometry, "disk opened");
        let core = Core {
            pool: Pool::default(),
            file: Arc::new(file),
            opened: geometry,
            size: AtomicU64::new(geometry.size),
            engine: options.engine,
            told_no_ring: Once::new(),
        };
        Ok(Self { core: Arc::new(core), path: path.clone(), absolute, kind, meta, has_times })
    }

    /// Where it was found, as given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file with its locks, for the process that is to have it next.
    ///
    /// # Errors
    /// The process has as many descriptors as it may have.
    pub fn source(&self) -> io::Result<File> {
        self.core.file.file().try_clone()
    }

    /// Whether I/O goes around the page cache.
    pub fn is_direct(&self) -> bool {
        self.core.file.align() > 1
    }

    /// Checks that the open disk is still what its name means, and not shorter than it was.
    ///
    /// # Errors
    /// [`DiskChanged`]: what has happened to it behind our back.
    pub fn still_same(&self) -> Result<(), DiskChanged> {
        let path = || self.path.clone();
        let fail = |source| DiskChanged::Io { path: path(), source };
        let now = geometry::size(self.core.file.file()).map_err(fail)?;
        let opened = self.core.geometry().size;
        if now < opened {
            return Err(DiskChanged::Shrunk { path: path(), opened, now });
        }
        match fs::metadata(&self.absolute) {
            Ok(named) if is_same(&named, &self.meta) => Ok(()),
            Ok(_) => Err(DiskChanged::Replaced { path: path() }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(DiskChanged::Removed { path: path() }),
            Err(e) => Err(fail(e)),
        }
    }

    /// Pretends that direct I/O needs `align`, to test on any file what 4Kn disks ask for.
    #[cfg(test)]
    pub(super) fn with_align(mut self, align: u32) -> Self {
        let core = Arc::get_mut(&mut self.core).expect("no channel yet");
        let file = core.file.file().try_clone().expect("a second descriptor");
        core.file = Arc::new(DiskFile::new(file, align));
        self
    }

    /// The open file, for tests that watch what is done with it.
    #[cfg(test)]
    pub(super) fn core(&self) -> &Core {
        &self.core
    }
}

impl Backing for Disk {
    type Channel = DiskChannel;

    fn geometry(&self) -> BackingGeometry {
        self.core.geometry()
    }

    fn measure(&self) -> io::Result<u64> {
        geometry::size(self.core.file.file())
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        let unit = self.core.file.align().max(self.core.opened.logical_block.into());
        if !size.is_multiple_of(unit) {
            // A last block that is only partly there could not be written without growing the file.
            let why = format!("{size} bytes are not a multiple of the {unit} that its I/O is made of");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let file = self.core.file.file();
        let found = geometry::size(file)?;
        if found < size && self.kind == BackingKind::File {
            file.set_len(size)?;
        } else if found != size {
            let why = format!("it has {found} bytes and not {size}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        if self.kind == BackingKind::File {
            file.sync_all()?;
        }
        self.core.size.fetch_max(size, Ordering::AcqRel);
        Ok(())
    }

    fn identity(&self) -> BackingIdentity {
        let (device, inode) = match self.kind {
            BackingKind::File => (self.meta.dev(), self.meta.ino()),
            BackingKind::BlockDevice => (self.meta.rdev(), 0),
        };
        let (stable, born_ns) = match self.kind {
            BackingKind::File => (0, identity::born_ns(&self.meta)),
            BackingKind::BlockDevice => (identity::stable_name(self.meta.rdev()), 0),
        };
        let path = self.path.to_string_lossy().into_owned();
        BackingIdentity {
            kind: self.kind,
            size: self.core.geometry().size,
            device,
            inode,
            stable,
            born_ns,
            path,
        }
    }

    fn shares_device_with(&self, other: &Disk) -> bool {
        let number = |disk: &Disk| match disk.kind {
            BackingKind::File => disk.meta.dev(),
            BackingKind::BlockDevice => disk.meta.rdev(),
        };
        identity::share_device(number(self), number(other))
    }

    fn fingerprint(&self, seed: u64) -> io::Result<u64> {
        sample::fingerprint(&self.core.file, self.core.geometry().size, seed)
    }

    fn traces(&self, durable: bool) -> io::Result<Traces> {
        match self.kind {
            BackingKind::BlockDevice => Ok(identity::traces_of_device(self.meta.rdev())),
            BackingKind::File if !self.has_times => Ok(Traces::default()),
            BackingKind::File => {
                let file = self.core.file.file();
                if durable && !self.core.opened.read_only {
                    // Not `fdatasync`: that leaves the times behind.
                    file.sync_all()?;
                }
                identity::traces_of_file(file)
            }
        }
    }

    fn can_have_sidecar(&self) -> bool {
        self.kind == BackingKind::File
    }

    fn read_sidecar(&self) -> io::Result<Option<Vec<u8>>> {
        if self.can_have_sidecar() { sidecar::read(&self.absolute) } else { Ok(None) }
    }

    fn write_sidecar(&self, copy: usize, page: &[u8]) -> io::Result<()> {
        match self.can_have_sidecar() {
            true => sidecar::write(&self.absolute, copy as u64, page),
            false => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn remove_sidecar(&self) -> io::Result<()> {
        if self.can_have_sidecar() { sidecar::remove(&self.absolute) } else { Ok(()) }
    }

    fn channel(&self, waker: &Waker, depth: u32) -> io::Result<DiskChannel> {
        DiskChannel::open(&self.core, waker, depth)
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("path", &self.path).field("geometry", &self.core.geometry()).finish()
    }
}

/// Makes a new raw image of `size` bytes that occupies no space yet. What exists is never touched.
///
/// # Errors
/// [`OpenError`]: it exists, cannot be made there, or `size` is not a positive multiple of 512. No
/// file is left behind.
pub fn create_sparse(path: &Path, size: u64) -> Result<(), OpenError> {
    create(path, size, |file| file.set_len(size))
}

/// Makes a new image of zeros whose space is its own, so that no write to it meets a full file system.
///
/// # Errors
/// As for [`create_sparse`], and when the file system has not that much space.
pub fn create_allocated(path: &Path, size: u64) -> Result<(), OpenError> {
    create(path, size, |file| super::file::allocate(file, size))
}

fn create(path: &Path, size: u64, fill: impl FnOnce(&File) -> io::Result<()>) -> Result<(), OpenError> {
    if size == 0 {
        return Err(OpenError::Empty { path: path.to_owned() });
    }
    if !size.is_multiple_of(512) {
        return Err(OpenError::OddSize { path: path.to_owned(), size, block: 512 });
    }
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let file = match file {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            return Err(OpenError::Exists { path: path.to_owned() });
        }
        file => file.map_err(|e| refusal(&OpenOptions::new(path), "creating it", e))?,
    };
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // The name must survive a power cut before anybody relies on the disk.
    let made = fill(&file).and_then(|()| file.sync_all()).and_then(|()| File::open(parent)?.sync_all());
    made.map_err(|e| {
        if let Err(left) = fs::remove_file(path) {
            tracing::warn!("{} could not be removed again: {left}", path.display());
        }
        OpenError::io(path, "creating it")(e)
    })
}

/// Sorts what the kernel said to a lookup or an open.
fn refusal(options: &OpenOptions, doing: &'static str, e: io::Error) -> OpenError {
    let path = options.path.clone();
    match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => OpenError::Missing { path },
        Some(libc::EROFS) => OpenError::WriteProtected { path },
        Some(libc::EBUSY) => OpenError::InUse {
            path,
            by: "the kernel says it is busy: mounted elsewhere, or part of a RAID, LVM or multipath device, \
                 or opened exclusively by another program"
                .into(),
        },
        Some(libc::ETXTBSY) => OpenError::InUse { path, by: "it is swap space or a running program".into() },
        Some(libc::EACCES | libc::EPERM) => OpenError::PermissionDenied {
            path,
            access: if options.read_only { "for reading" } else { "for writing" },
            uid: effective_uid(),
        },
        _ => OpenError::Io { path, doing, source: e },
    }
}

#[expect(unsafe_code, reason = "std has no user ids")]
fn effective_uid() -> u32 {
    // SAFETY: takes nothing, cannot fail.
    unsafe { libc::geteuid() }
}

fn kind_of(path: &Path, meta: &Metadata) -> Result<BackingKind, OpenError> {
    let (path, kind) = (path.to_owned(), meta.file_type());
    if kind.is_file() {
        Ok(BackingKind::File)
    } else if kind.is_block_device() {
        Ok(BackingKind::BlockDevice)
    } else if kind.is_dir() {
        Err(OpenError::IsDirectory { path })
    } else if kind.is_char_device() {
        Err(OpenError::IsCharDevice { path })
    } else {
        Err(OpenError::NotADisk { path, what: if kind.is_fifo() { "pipe" } else { "socket" } })
    }
}

/// Whether both are the same file or device.
fn is_same(a: &Metadata, b: &Metadata) -> bool {
    let device = |m: &Metadata| m.file_type().is_block_device();
    if device(a) && device(b) {
        // One device may have many nodes.
        return a.rdev() == b.rdev();
    }
    device(a) == device(b) && a.dev() == b.dev() && a.ino() == b.ino()
}

/// Opens it; says whether the descriptor goes around the page cache.
fn open_file(
    options: &OpenOptions,
    kind: BackingKind,
    wait: &mut lock::Wait,
) -> Result<(File, bool), OpenError> {
    if let Some(taken) = &options.taken {
        let direct = geometry::is_direct(taken, options.read_only);
        return direct
            .and_then(|direct| Ok((taken.try_clone()?, direct)))
            .map_err(OpenError::io(&options.path, "taking it over"));
    }
    let open = |direct: bool| {
        let exclusive = if kind == BackingKind::BlockDevice { libc::O_EXCL } else { 0 };
        let flags = libc::O_CLOEXEC | libc::O_NOCTTY | exclusive | if direct { libc::O_DIRECT } else { 0 };
        fs::OpenOptions::new().read(true).write(!options.read_only).custom_flags(flags).open(&options.path)
    };
    let mut direct = options.direct == Direct::Auto;
    loop {
        match open(direct) {
            // This file system has no direct I/O.
            Err(e) if direct && e.raw_os_error() == Some(libc::EINVAL) => direct = false,
            // A killed predecessor keeps a device as long as it keeps a lock. Looking for that lock
            // takes another descriptor, which is not exclusive and closed again at once.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                let holder = || File::open(&options.path).ok().and_then(|file| lock::visible_holder(&file));
                if wait.sleep(|| holder().unwrap_or("the kernel".into())) {
                    continue;
                }
                return Err(match holder() {
                    Some(holder) => OpenError::Locked { path: options.path.clone(), holder },
                    None => refusal(options, "opening it", e),
                });
            }
            opened => {
                return opened.map(|file| (file, direct)).map_err(|e| refusal(options, "opening it", e));
            }
        }
    }
}

fn measure(
    options: &OpenOptions,
    file: &File,
    kind: BackingKind,
    meta: &Metadata,
) -> Result<BackingGeometry, OpenError> {
    let path = &options.path;
    let failed = || OpenError::io(path, "asking for its size and blocks");
    let size = geometry::size(file).map_err(failed())?;
    let (blocks, can_unmap) = match kind {
        BackingKind::File => (geometry::file_blocks(file).map_err(failed())?, true),
        BackingKind::BlockDevice => {
            if !options.read_only && geometry::device_is_read_only(file).map_err(failed())? {
                return Err(OpenError::WriteProtected { path: path.clone() });
            }
            let blocks = geometry::device_blocks(file).map_err(failed())?;
            (blocks, geometry::device_can_unmap(meta.rdev()))
        }
    };
    let block = blocks.logical;
    if block != 512 && block != 4096 {
        return Err(OpenError::BlockSize { path: path.clone(), block });
    }
    if size == 0 {
        return Err(OpenError::Empty { path: path.clone() });
    }
    if !size.is_multiple_of(u64::from(block)) {
        return Err(OpenError::OddSize { path: path.clone(), size, block });
    }
    if let Some(wanted) = options.create_sparse.filter(|wanted| *wanted != size) {
        return Err(OpenError::SizeDiffers { path: path.clone(), found: size, wanted });
    }
    Ok(BackingGeometry {
        size,
        logical_block: block,
        physical_block: blocks.physical,
        optimal_io: blocks.optimal,
        read_only: options.read_only,
        can_unmap: can_unmap && !options.read_only,
    })
}

/// What direct I/O must be aligned to, or `None` if it must not be used.
fn direct_align(file: &File, geometry: &BackingGeometry, kind: BackingKind) -> Option<u32> {
    match kind {
        BackingKind::BlockDevice => Some(geometry.logical_block),
        // A last block that is only partly there could not be written without growing the file.
        BackingKind::File => geometry::direct_align(file)
            .map(|align| align.max(geometry.logical_block))
            .filter(|align| geometry.size.is_multiple_of(u64::from(*align))),
    }
}

fn refuse_foreign_format(path: &Path, file: &DiskFile, size: u64) -> Result<(), OpenError> {
    let mut sectors = [AlignedBuf::new(probe::HEAD), AlignedBuf::new(512)];
    for (sector, offset) in sectors.iter_mut().zip([0, size - 512]) {
        file.read(offset, sector).map_err(OpenError::io(path, "reading its first and last sector"))?;
    }
    match probe::foreign_format(&sectors[0], &sectors[1]) {
        Some(format) => Err(OpenError::Formatted { path: path.to_owned(), format }),
        None => Ok(()),
    }
}
