//! The few system calls of the control plane that the standard library does not have.
//!
//! All of `control`'s unsafe code is here: each function is a safe face on one call, so the rest of
//! the control plane stays free of it.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use vmm_sys_util::signal;

/// Whether the process has root's powers over files, as far as conventions about paths go.
pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// The user whose rights this process has.
#[expect(unsafe_code, reason = "geteuid has no safe wrapper among the dependencies")]
pub fn own_uid() -> u32 {
    // SAFETY: the call takes nothing, touches nothing and cannot fail.
    unsafe { libc::geteuid() }
}

/// Microseconds on the clock that service managers compare times by (`CLOCK_MONOTONIC`).
#[expect(unsafe_code, reason = "the standard library keeps its clock's value to itself")]
pub fn monotonic_us() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a whole structure for the call to fill, and outlives it; this clock is always there.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec.unsigned_abs() * 1_000_000 + now.tv_nsec.unsigned_abs() / 1000
}

/// The supplementary groups of the process at the other end of a connected Unix socket, as they were
/// when it connected.
///
/// # Errors
/// The kernel does not know them.
#[expect(unsafe_code, reason = "getsockopt has no safe wrapper among the dependencies")]
pub fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups = vec![0u32; 64];
    loop {
        let mut len = (groups.len() * size_of::<u32>()) as libc::socklen_t;
        // SAFETY: `groups` has `len` bytes of plain integers for the kernel to write, and outlives
        // the call; `len` is ours.
        let result = unsafe {
            let value = groups.as_mut_ptr().cast();
            libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERGROUPS, value, &raw mut len)
        };
        let count = len as usize / size_of::<u32>();
        if result >= 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // The kernel has said how many there are.
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

/// Raises the number of descriptors the process may have to the most it is allowed. A ring takes
/// five and its io_uring one: 256 queues do not fit the usual 1024.
///
/// # Errors
/// The kernel knows no limit, or refuses this one.
#[expect(unsafe_code, reason = "rlimits have no safe wrapper among the dependencies")]
pub fn raise_descriptor_limit() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a whole structure for the call to fill, and outlives it.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } < 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is initialised and only read.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A descriptor that reads `signalfd_siginfo` of `signals`, which are blocked from now on in this
/// thread and in all that it starts. Non-blocking, closed on exec.
///
/// # Errors
/// The kernel refused the descriptor.
#[expect(unsafe_code, reason = "signalfd has no safe wrapper among the dependencies")]
pub fn signal_descriptor(signals: &[libc::c_int]) -> io::Result<File> {
    for &number in signals {
        match signal::block_signal(number) {
            Ok(()) | Err(signal::Error::SignalAlreadyBlocked(_)) => {}
            Err(error) => return Err(io::Error::other(error.to_string())),
        }
    }
    let set = signal::create_sigset(signals)?;
    // SAFETY: `set` is an initialised signal set that outlives the call; -1 asks for a new
    // descriptor, so no existing one is touched.
    let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just returned by the kernel and nothing else owns it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Sends SIGTERM to a child that has not been waited for.
///
/// # Errors
/// The kernel refused.
#[expect(unsafe_code, reason = "the standard library only sends SIGKILL")]
pub fn terminate(child: &std::process::Child) -> io::Result<()> {
    let pid = libc::pid_t::try_from(child.id()).map_err(io::Error::other)?;
    // SAFETY: the call touches no memory. A child that was not waited for keeps its number, and that is
    // positive, so it is this one process that gets the signal.
    if unsafe { libc::kill(pid, libc::SIGTERM) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes over the descriptor `fd` that the parent process left open for this one. Refuses 0 to 2
/// and what is not a socket.
///
/// # Errors
/// There is no such descriptor, or it is not a socket.
#[expect(unsafe_code, reason = "an inherited descriptor is a bare number")]
pub fn inherited_socket(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= libc::STDERR_FILENO {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "descriptors 0 to 2 are the standard streams",
        ));
    }
    let mut about = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `about` has room for the structure that the call fills; any number is allowed as
    // descriptor, an unused one gives EBADF.
    if unsafe { libc::fstat(fd, about.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above succeeded, so it filled the structure.
    let about = unsafe { about.assume_init() };
    if about.st_mode & libc::S_IFMT != libc::S_IFSOCK {
        return Err(io::Error::from_raw_os_error(libc::ENOTSOCK));
    }
    // SAFETY: F_SETFD takes an integer and changes only this descriptor's flag.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` is open. It came from our parent by its number, the program opens its own files
    // later than it takes this one, and it takes each number once, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether a socket waits for connections, rather than being one.
///
/// # Errors
/// It is not a socket.
pub fn is_listening(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let listening: libc::c_int = socket_option(socket, libc::SO_ACCEPTCONN, 0)?;
    Ok(listening != 0)
}

/// The process at the other end of a connected Unix socket: for a client, whoever listens.
///
/// # Errors
/// It is not a Unix socket, or not connected.
pub fn peer_process(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let nobody = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let peer = socket_option(socket, libc::SO_PEERCRED, nobody)?;
    // Zero: a process outside of our own PID namespace.
    u32::try_from(peer.pid).ok().filter(|&pid| pid > 0).ok_or_else(|| io::ErrorKind::NotFound.into())
}

#[expect(unsafe_code, reason = "getsockopt has no safe wrapper among the dependencies")]
fn socket_option<T: Copy>(socket: BorrowedFd<'_>, option: libc::c_int, mut value: T) -> io::Result<T> {
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is `len` bytes of plain integers (the callers use `c_int` and `ucred`), and
    // the kernel writes at most `len` bytes there.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw mut value).cast(), &raw mut len)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// The number of the group called `name`, `None` if there is no such group.
///
/// # Errors
/// The group database could not be read.
#[expect(unsafe_code, reason = "only the C library knows the system's group databases")]
pub fn group_id(name: &str) -> io::Result<Option<u32>> {
    let Ok(name) = CString::new(name) else { return Ok(None) };
    let mut buffer = vec![0 as libc::c_char; 4096];
    loop {
        let mut group = MaybeUninit::<libc::group>::uninit();
        let mut found = std::ptr::null_mut();
        // SAFETY: `name` is NUL-terminated; `group`, `buffer` with its length, and `found` are ours
        // to be written, and nothing keeps a pointer to them beyond this turn of the loop.
        let error = unsafe {
            libc::getgrnam_r(
                name.as_ptr(),
                group.as_mut_ptr(),
                buffer.as_mut_ptr(),
                buffer.len(),
                &raw mut found,
            )
        };
        match error {
            0 if found.is_null() => return Ok(None),
            // SAFETY: success with a result means that `group` was filled.
            0 => return Ok(Some(unsafe { group.assume_init() }.gr_gid)),
            // A group of very many members.
            libc::ERANGE if buffer.len() < 1 << 24 => buffer.resize(buffer.len() * 4, 0),
            libc::ENOENT | libc::ESRCH => return Ok(None),
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn a_listener_is_told_from_a_connection_and_names_its_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        assert!(is_listening(listener.as_fd()).unwrap());
        assert!(!is_listening(client.as_fd()).unwrap());
        assert_eq!(peer_process(client.as_fd()).unwrap(), std::process::id());
        let file = File::open(dir.path()).unwrap();
        assert!(is_listening(file.as_fd()).is_err());
    }

    #[test]
    fn a_group_is_found_by_name() {
        assert_eq!(group_id("root").unwrap(), Some(0));
        assert_eq!(group_id("no-such-group-here").unwrap(), None);
        assert_eq!(group_id("nul\0").unwrap(), None);
    }

    #[test]
    fn only_an_open_socket_beyond_the_standard_streams_is_inherited() {
        use std::os::fd::IntoRawFd;
        for fd in [0, 1, 2] {
            assert_eq!(inherited_socket(fd).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        assert_eq!(inherited_socket(i32::MAX).unwrap_err().raw_os_error(), Some(libc::EBADF));
        let file = File::open("/dev/null").unwrap();
        assert_eq!(inherited_socket(file.as_raw_fd()).unwrap_err().raw_os_error(), Some(libc::ENOTSOCK));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let taken = inherited_socket(theirs.into_raw_fd()).unwrap();
        drop(ours);
        assert!(!is_listening(taken.as_fd()).unwrap());
    }
}
