//! The socket a front end connects to: who may have its path, and how it appears and goes.
//!
//! 1. [`Claim::new`] locks `PATH.lock` and looks at what is at the path. A live socket is refused
//!    with its holder's name, a dead one may be replaced, anything else is never touched.
//! 2. [`Claim::bind`] makes the socket beside the path, sets its group and mode, and renames it
//!    into place: nobody can connect before the permissions are right, and a VMM that reconnects
//!    finds either the dead socket or the new one, never nothing.
//! 3. Dropping what these return removes the socket, if it is still ours, and then the lock.
//!
//! The claim comes before anything is created or opened for writing and the bind after everything
//! works, so a start that is refused leaves no trace, and a socket that is there answers.

use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use super::activation;
use super::config::Endpoint;
use super::sys;
use super::value::{SOCKET_PATH_LEN_MAX, SocketPath};

/// Longest wait for a socket to say whether somebody listens. Only a listener whose queue is full
/// answers late, and that is an answer.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody serves there.
    #[error("socket {path} is in use by {holder}: stop it, or choose another --socket")]
    InUse {
        /// The path.
        path: SocketPath,
        /// Who, as far as it can be known.
        holder: String,
    },
    /// Something else has the name.
    #[error("{path} exists and is {what}, not a socket: it is left as it is, choose another --socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The directory is missing.
    #[error("there is no directory {} for the socket: create it first", .0.display())]
    NoDirectory(PathBuf),
    /// No such group.
    #[error("there is no group `{0}` on this host: create it, or choose another --socket-group")]
    NoGroup(String),
    /// The descriptor cannot be used.
    #[error("--fd {fd}: {source}")]
    Inherited {
        /// Its number.
        fd: i32,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused a step.
    #[error("socket {path}: {step}: {source}")]
    Io {
        /// The path.
        path: SocketPath,
        /// What was tried.
        step: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// Where front ends come from.
#[derive(Debug)]
pub enum Incoming {
    /// Each accepted connection is a session, one after the other.
    Listener(UnixListener),
    /// There is one session, and it has begun.
    Connected(UnixStream),
}

/// An endpoint that is ours, before anybody can connect to it.
#[derive(Debug)]
pub enum Claimed {
    /// A path to make a socket at.
    Path(Claim),
    /// An inherited socket.
    Inherited(OwnedFd),
    /// One that the service manager listens at, and keeps.
    Activated(UnixListener),
}

impl Claimed {
    /// Claims an endpoint. Changes nothing but the lock file.
    ///
    /// # Errors
    /// It cannot be had; nothing is left behind.
    pub fn new(endpoint: &Endpoint) -> Result<Self, SocketError> {
        match endpoint {
            Endpoint::Inherited(fd) => sys::inherited_socket(*fd)
                .map(Claimed::Inherited)
                .map_err(|source| SocketError::Inherited { fd: *fd, source }),
            Endpoint::Socket { path, mode, group } => {
                let passed = activation::at(path.as_path()).map_err(|source| SocketError::Io {
                    path: path.clone(),
                    step: "taking it over from the service manager",
                    source,
                })?;
                if let Some(listener) = passed {
                    return Ok(Claimed::Activated(listener));
                }
                let group = group.as_deref().map(|group| group_number(path, group)).transpose()?;
                Claim::new(path, *mode, group).map(Claimed::Path)
            }
        }
    }

    /// Opens the endpoint to front ends.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn open(self) -> Result<(Incoming, Option<Bound>), SocketError> {
        match self {
            Claimed::Path(claim) => {
                claim.bind().map(|(listener, bound)| (Incoming::Listener(listener), Some(bound)))
            }
            Claimed::Activated(listener) => Ok((Incoming::Listener(listener), None)),
            Claimed::Inherited(fd) => {
                let number = fd.as_raw_fd();
                let listening = sys::is_listening(fd.as_fd())
                    .map_err(|source| SocketError::Inherited { fd: number, source })?;
                let incoming = match listening {
                    true => Incoming::Listener(fd.into()),
                    false => Incoming::Connected(fd.into()),
                };
                Ok((incoming, None))
            }
        }
    }
}

/// Whether two paths name one socket: by their text, or by what is there.
pub fn same_path(one: &Path, other: &Path) -> bool {
    let identity = |path| fs::symlink_metadata(path).map(|about| (about.dev(), about.ino())).ok();
    one == other || identity(one).is_some_and(|found| identity(other) == Some(found))
}

/// The right to a path.
#[derive(Debug)]
pub struct Claim {
    path: SocketPath,
    mode: u32,
    group: Option<u32>,
    lock: Lock,
}

/// A socket in place, removed when dropped.
#[derive(Debug)]
pub struct Bound {
    path: SocketPath,
    /// Device and inode, to tell it from a socket that somebody else put there meanwhile.
    identity: (u64, u64),
    /// Dropped, and so released, after the socket is gone.
    _lock: Lock,
}

impl Claim {
    fn new(path: &SocketPath, mode: u32, group: Option<u32>) -> Result<Self, SocketError> {
        let directory = match path.as_path().parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => Path::new("/"),
        };
        if !directory.is_dir() {
            return Err(SocketError::NoDirectory(directory.into()));
        }
        refuse_other_things(path.as_path()).map_err(|error| error.at(path))?;
        let lock = Lock::take(path)?;
        if let Some(holder) = listener_at(path.as_path()).map_err(|source| SocketError::Io {
            path: path.clone(),
            step: "finding out whether somebody listens",
            source,
        })? {
            return Err(SocketError::InUse { path: path.clone(), holder });
        }
        Ok(Self { path: path.clone(), mode, group, lock })
    }

    fn bind(self) -> Result<(UnixListener, Bound), SocketError> {
        let path = self.path.clone();
        let step = |step: &'static str| {
            let path = path.clone();
            move |source: io::Error| SocketError::Io { path, step, source }
        };
        // Nobody else uses this name: the lock is ours.
        let beside = beside(&self.path);
        refuse_other_things(&beside).map_err(|error| error.at(&self.path))?;
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(step("removing the remains of an earlier start")(error));
            }
            _ => {}
        }
        let listener = bind_at(&beside).map_err(step("creating it"))?;
        let place = || {
            if self.group.is_some() {
                chown(&beside, None, self.group).map_err(step("setting its group"))?;
            }
            fs::set_permissions(&beside, Permissions::from_mode(self.mode))
                .map_err(step("setting its mode"))?;
            refuse_other_things(self.path.as_path()).map_err(|error| error.at(&self.path))?;
            let about = fs::symlink_metadata(&beside).map_err(step("looking at it"))?;
            fs::rename(&beside, self.path.as_path()).map_err(step("moving it into place"))?;
            Ok((about.dev(), about.ino()))
        };
        match place() {
            Ok(identity) => Ok((listener, Bound { path: self.path, identity, _lock: self.lock })),
            Err(error) => {
                remove(&beside);
                Err(error)
            }
        }
    }
}

impl Bound {
    /// Where it is.
    pub fn path(&self) -> &Path {
        self.path.as_path()
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(self.path.as_path())
            .is_ok_and(|about| (about.dev(), about.ino()) == self.identity);
        if ours {
            remove(self.path.as_path());
        }
    }
}

/// Removes a file of ours at the end. There is nobody to tell but the log.
fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        tracing::warn!("{} could not be removed: {error}", path.display());
    }
}

/// A locked file beside the socket. It decides who may replace the socket, which looking at the
/// socket alone cannot: two starts at once would both find it dead.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    file: File,
}

impl Lock {
    fn take(socket: &SocketPath) -> Result<Self, SocketError> {
        let path = socket.with_suffix(".lock");
        let failed =
            |source| SocketError::Io { path: socket.clone(), step: "locking it (PATH.lock)", source };
        loop {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)
                .map_err(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let holder = read_process(&mut file);
                    return Err(SocketError::InUse { path: socket.clone(), holder });
                }
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
            // The holder we waited out may have removed the file on its way: then what we locked
            // is nameless, and the next one would lock another.
            let named = fs::symlink_metadata(&path).map(|about| (about.dev(), about.ino())).ok();
            let locked = file.metadata().map(|about| (about.dev(), about.ino())).map_err(failed)?;
            if named == Some(locked) {
                file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(failed)?;
                return Ok(Self { path, file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While still locked: see the loop above.
        remove(&self.path);
        if let Err(error) = self.file.unlock() {
            tracing::warn!("{} stays locked: {error}", self.path.display());
        }
    }
}

fn read_process(lock: &mut File) -> String {
    let mut text = String::new();
    match lock.read_to_string(&mut text).map(|_| text.trim().parse()) {
        Ok(Ok(pid)) => process(pid),
        _ => "another process".into(),
    }
}

/// A process as an operator knows it.
pub fn process(pid: u32) -> String {
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!("process {pid} ({})", name.trim_end()),
        Err(_) => format!("process {pid}"),
    }
}

/// Who listens at `path`, `None` if nobody does.
fn listener_at(path: &Path) -> io::Result<Option<String>> {
    let (sender, receiver) = mpsc::channel();
    let target = path.to_owned();
    // In a thread of its own: connecting to a listener that accepts nobody blocks for ever.
    std::thread::Builder::new().name("socket-probe".into()).spawn(move || {
        drop(sender.send(UnixStream::connect(target)));
    })?;
    match receiver.recv_timeout(PROBE_TIMEOUT) {
        Ok(Ok(connection)) => {
            Ok(Some(sys::peer_process(connection.as_fd()).map_or_else(|_| "another process".into(), process)))
        }
        Ok(Err(error)) => match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => Ok(None),
            _ => Err(error),
        },
        Err(_) => Ok(Some("another process, which does not answer".into())),
    }
}

/// The name under which a socket is made. Normally the path's with a `~`; that of a path which is as
/// long as `sun_path` allows gets a short one.
fn beside(path: &SocketPath) -> PathBuf {
    let beside = path.with_suffix("~");
    if beside.as_os_str().len() <= SOCKET_PATH_LEN_MAX {
        return beside;
    }
    beside.with_file_name(format!(".{:08x}~", crc32fast::hash(path.as_path().as_os_str().as_bytes())))
}

/// Binds at a path that may be too long for `sun_path`: then by way of its directory.
fn bind_at(path: &Path) -> io::Result<UnixListener> {
    if path.as_os_str().len() <= SOCKET_PATH_LEN_MAX {
        return UnixListener::bind(path);
    }
    let directory = File::open(path.parent().unwrap_or(Path::new("/")))?;
    let mut short = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    short.push(path.file_name().unwrap_or_default());
    UnixListener::bind(short)
}

enum Obstacle {
    NotASocket(PathBuf, &'static str),
    Io(io::Error),
}

impl Obstacle {
    fn at(self, path: &SocketPath) -> SocketError {
        match self {
            Obstacle::NotASocket(path, what) => SocketError::NotASocket { path, what },
            Obstacle::Io(source) => SocketError::Io { path: path.clone(), step: "looking at it", source },
        }
    }
}

/// Accepts a path where there is nothing, or a socket.
fn refuse_other_things(path: &Path) -> Result<(), Obstacle> {
    let kind = match fs::symlink_metadata(path) {
        Ok(about) => about.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Obstacle::Io(error)),
    };
    let what = match kind {
        kind if kind.is_socket() => return Ok(()),
        kind if kind.is_dir() => "a directory",
        kind if kind.is_symlink() => "a symbolic link",
        kind if kind.is_file() => "a file",
        _ => "a device or a pipe",
    };
    Err(Obstacle::NotASocket(path.into(), what))
}

fn group_number(path: &SocketPath, group: &str) -> Result<u32, SocketError> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    match sys::group_id(group) {
        Ok(Some(number)) => Ok(number),
        Ok(None) => Err(SocketError::NoGroup(group.into())),
        Err(source) => Err(SocketError::Io { path: path.clone(), step: "looking its group up", source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(path: &Path, mode: u32, group: Option<&str>) -> Endpoint {
        Endpoint::Socket {
            path: SocketPath::new(path.as_os_str()).unwrap(),
            mode,
            group: group.map(str::to_owned),
        }
    }

    fn entries(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_socket_appears_with_its_mode_and_goes_with_its_server() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let claimed = Claimed::new(&endpoint(&path, 0o640, Some("0"))).unwrap();
        assert_eq!(entries(dir.path()), ["s.lock"]);
        let (incoming, bound) = claimed.open().unwrap();
        assert!(matches!(incoming, Incoming::Listener(_)));
        let about = fs::metadata(&path).unwrap();
        assert_eq!((about.mode() & 0o777, about.gid()), (0o640, 0));
        UnixStream::connect(&path).unwrap();
        assert_eq!(entries(dir.path()), ["s", "s.lock"]);
        drop(bound);
        assert!(entries(dir.path()).is_empty());
    }

    #[test]
    fn a_second_start_is_refused_with_the_name_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = Claimed::new(&endpoint(&path, 0o600, None)).unwrap();
        let refused = |error: SocketError| {
            let text = error.to_string();
            assert!(text.contains(&format!("in use by process {} (", std::process::id())), "{text}");
        };
        refused(Claimed::new(&endpoint(&path, 0o600, None)).unwrap_err());
        let opened = first.open().unwrap();
        refused(Claimed::new(&endpoint(&path, 0o600, None)).unwrap_err());
        drop(opened);
        assert!(Claimed::new(&endpoint(&path, 0o600, None)).is_ok());
    }

    #[test]
    fn a_socket_of_another_program_is_refused_with_its_name_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _foreign = UnixListener::bind(&path).unwrap();
        let text = Claimed::new(&endpoint(&path, 0o600, None)).unwrap_err().to_string();
        assert!(text.contains(&format!("in use by process {}", std::process::id())), "{text}");
        UnixStream::connect(&path).unwrap();
        assert_eq!(entries(dir.path()), ["s"]);
    }

    #[test]
    fn a_dead_socket_is_replaced_without_a_moment_of_absence() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        drop(UnixListener::bind(dir.path().join("s~")).unwrap());
        let claimed = Claimed::new(&endpoint(&path, 0o600, None)).unwrap();
        assert!(path.exists());
        let _opened = claimed.open().unwrap();
        UnixStream::connect(&path).unwrap();
        assert_eq!(entries(dir.path()), ["s", "s.lock"]);
    }

    #[test]
    fn what_is_not_a_socket_is_never_touched() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        fs::write(&path, "precious").unwrap();
        let text = Claimed::new(&endpoint(&path, 0o600, None)).unwrap_err().to_string();
        assert!(text.contains("exists and is a file, not a socket"), "{text}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        // Also when it comes between claim and bind, and also beside the path.
        for name in ["t", "t~"] {
            let claimed = Claimed::new(&endpoint(&dir.path().join("t"), 0o600, None)).unwrap();
            fs::create_dir(dir.path().join(name)).unwrap();
            assert!(matches!(claimed.open(), Err(SocketError::NotASocket { .. })));
            fs::remove_dir(dir.path().join(name)).unwrap();
        }
        std::os::unix::fs::symlink("/nowhere", dir.path().join("u")).unwrap();
        assert!(matches!(
            Claimed::new(&endpoint(&dir.path().join("u"), 0o600, None)),
            Err(SocketError::NotASocket { what: "a symbolic link", .. })
        ));
        assert_eq!(entries(dir.path()), ["s", "u"]);
    }

    #[test]
    fn a_socket_that_somebody_put_in_our_place_is_left_to_him() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (_incoming, bound) = Claimed::new(&endpoint(&path, 0o600, None)).unwrap().open().unwrap();
        fs::remove_file(&path).unwrap();
        let _usurper = UnixListener::bind(&path).unwrap();
        drop(bound);
        assert_eq!(entries(dir.path()), ["s"]);
    }

    #[test]
    fn the_longest_path_works_however_it_is_made_up() {
        let dir = tempfile::tempdir().unwrap();
        let room = SOCKET_PATH_LEN_MAX - dir.path().as_os_str().len() - 1;
        let deep = format!("{}/x", "d".repeat(room - 2));
        fs::create_dir(dir.path().join(&deep[..deep.len() - 2])).unwrap();
        for name in [&"x".repeat(room), &deep] {
            let path = dir.path().join(name);
            assert_eq!(path.as_os_str().len(), SOCKET_PATH_LEN_MAX);
            let _opened = Claimed::new(&endpoint(&path, 0o600, None)).unwrap().open().unwrap();
            UnixStream::connect(&path).unwrap();
            assert_eq!(entries(path.parent().unwrap()).iter().filter(|name| name.ends_with('~')).count(), 0);
        }
    }

    #[test]
    fn a_missing_directory_or_group_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let nowhere = dir.path().join("no/s");
        let text = Claimed::new(&endpoint(&nowhere, 0o600, None)).unwrap_err().to_string();
        assert!(text.contains("there is no directory") && text.contains("/no for"), "{text}");
        let text = Claimed::new(&endpoint(&dir.path().join("s"), 0o600, Some("no-such"))).unwrap_err();
        assert!(text.to_string().contains("there is no group `no-such`"), "{text}");
        assert!(entries(dir.path()).is_empty());
    }

    #[test]
    fn an_inherited_socket_is_served_as_what_it_is() {
        use std::os::fd::IntoRawFd;
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let open = |fd| Claimed::new(&Endpoint::Inherited(fd)).unwrap().open().unwrap().0;
        assert!(matches!(open(listener.into_raw_fd()), Incoming::Listener(_)));
        assert!(matches!(open(theirs.into_raw_fd()), Incoming::Connected(_)));
        assert!(matches!(Claimed::new(&Endpoint::Inherited(1)), Err(SocketError::Inherited { .. })));
    }
}
