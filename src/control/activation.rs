//! Sockets that the service manager listens at for us (`sd_listen_fds(3)`): a VMM that connects
//! starts the daemon, and one that reconnects while the daemon restarts waits instead of failing.
//!
//! A socket is known by the path it is bound to, so the configuration says the same with and without
//! activation, and no names have to agree between a unit and a file.
//!
//! Laws:
//! - Descriptors are taken once, before anything else is opened, and only if they are meant for this
//!   process: what a child of ours might inherit is not taken twice.
//! - They are kept for the life of the process. A volume that is detached leaves its socket here, and
//!   VMMs that connect to it wait until it is attached again: the socket is the manager's, and so
//!   are its path, its mode and its end.

use std::ffi::OsStr;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::socket::same_path;
use super::sys;

/// The first descriptor (`SD_LISTEN_FDS_START`).
const FIRST: i32 = 3;
/// More than any unit names; a number beyond it is no number of sockets.
const COUNT_MAX: u32 = 1024;

/// What descriptors of a process are: like these they are the whole process's.
static PASSED: OnceLock<Passed> = OnceLock::new();

/// Why what the manager passed cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// Not a number.
    #[error("LISTEN_FDS is `{0}`: it must be a number from 1 to {COUNT_MAX}")]
    Count(String),
    /// Not a socket that listens at a path.
    #[error("descriptor {fd} from the service manager is not a listening Unix socket with a path: {source}")]
    Socket {
        /// Its number.
        fd: i32,
        /// Why.
        source: io::Error,
    },
}

#[derive(Debug, Default)]
struct Passed(Vec<(PathBuf, UnixListener)>);

/// Takes over what the manager passed to this process, as the environment has it. Call once, before
/// the process opens anything. Descriptors in `named` are asked for by their numbers (`--fd`) and left to
/// whoever does. The paths that were passed.
///
/// # Errors
/// Something else was passed than can be used.
pub fn take(named: &[i32]) -> Result<Vec<PathBuf>, ActivationError> {
    let (pid, count) = (std::env::var_os("LISTEN_PID"), std::env::var_os("LISTEN_FDS"));
    let count = count_of(pid.as_deref(), count.as_deref(), std::process::id())?;
    let mut listeners = Vec::new();
    for fd in (FIRST..).take(count as usize).filter(|fd| !named.contains(fd)) {
        listeners.push(listener(fd).map_err(|source| ActivationError::Socket { fd, source })?);
    }
    let paths = listeners.iter().map(|(path, _)| path.clone()).collect();
    // A second call finds no descriptors: they are taken once.
    drop(PASSED.set(Passed(listeners)));
    Ok(paths)
}

/// How many descriptors are meant for process `own`.
fn count_of(pid: Option<&OsStr>, count: Option<&OsStr>, own: u32) -> Result<u32, ActivationError> {
    let (Some(pid), Some(count)) = (pid, count) else { return Ok(0) };
    if pid.to_str().and_then(|pid| pid.parse().ok()) != Some(own) {
        return Ok(0);
    }
    let number = count.to_str().and_then(|count| count.parse().ok());
    number
        .filter(|number| (1..=COUNT_MAX).contains(number))
        .ok_or_else(|| ActivationError::Count(count.to_string_lossy().into()))
}

fn listener(fd: i32) -> io::Result<(PathBuf, UnixListener)> {
    let socket = sys::inherited_socket(fd)?;
    if !sys::is_listening(std::os::fd::AsFd::as_fd(&socket))? {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is a connection, or a datagram socket"));
    }
    let listener = UnixListener::from(socket);
    let address = listener.local_addr()?;
    let path = address.as_pathname().ok_or(io::ErrorKind::AddrNotAvailable)?.to_owned();
    Ok((path, listener))
}

/// The socket that listens at `path` and was passed to this process, if one does.
///
/// # Errors
/// The kernel has no descriptor left.
pub fn at(path: &Path) -> io::Result<Option<UnixListener>> {
    let Some(Passed(listeners)) = PASSED.get() else { return Ok(None) };
    let found = listeners.iter().find(|(bound, _)| same_path(bound, path));
    found.map(|(_, listener)| listener.try_clone()).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_meant_for_this_process_is_counted() {
        let count = |pid: Option<&str>, count: Option<&str>| {
            count_of(pid.map(OsStr::new), count.map(OsStr::new), 42).map_err(|error| error.to_string())
        };
        assert_eq!(count(None, None), Ok(0));
        assert_eq!(count(None, Some("1")), Ok(0));
        assert_eq!(count(Some("41"), Some("1")), Ok(0));
        assert_eq!(count(Some("42"), None), Ok(0));
        assert_eq!(count(Some("42"), Some("2")), Ok(2));
        for wrong in ["0", "-1", "x", "", "1025"] {
            assert!(count(Some("42"), Some(wrong)).unwrap_err().contains("1 to 1024"), "{wrong}");
        }
    }

    #[test]
    fn a_socket_is_known_by_its_path_and_nothing_else_is_taken() {
        use std::os::fd::IntoRawFd;
        use std::os::unix::net::UnixStream;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (bound, _) = listener(UnixListener::bind(&path).unwrap().into_raw_fd()).unwrap();
        assert_eq!(bound, path);
        let (ours, theirs) = UnixStream::pair().unwrap();
        assert!(listener(theirs.into_raw_fd()).unwrap_err().to_string().contains("a connection"));
        drop(ours);
        assert!(listener(1).is_err());
    }
}
