//! Descriptors that come from the peer: receiving them, and asking what they allow.
//!
//! Every descriptor is owned from the moment the kernel hands it over, so whatever a message gets
//! wrong, dropping it closes what came with it. Descriptors close on exec where we create them; a
//! received one is never inherited because this process starts no others.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::MAX_ATTACHED_FD_ENTRIES;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Reads up to `buf.len()` bytes, appending the descriptors that came with them to `fds`.
///
/// # Errors
/// `WouldBlock` and `Interrupted` as usual; `ENOBUFS` when more descriptors came than any message
/// may carry, all of which are closed.
#[expect(unsafe_code, reason = "descriptors arrive as bare numbers")]
pub(super) fn receive(stream: &UnixStream, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut numbers: [RawFd; MAX_ATTACHED_FD_ENTRIES] = [-1; MAX_ATTACHED_FD_ENTRIES];
    let mut iov = [libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() }];
    // SAFETY: the one vector describes `buf`, which is ours alone for the call.
    let (bytes, count) = unsafe { stream.recv_with_fds(&mut iov, &mut numbers) }
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    for &number in &numbers[..count] {
        // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
        fds.push(unsafe { OwnedFd::from_raw_fd(number) });
    }
    Ok(bytes)
}

/// Sends what a socket takes at once. Whoever has the same socket open can make it block; this does not.
#[expect(unsafe_code, reason = "std has no flags for a send")]
pub(super) fn send_now(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the kernel reads `bytes.len()` bytes of a slice that is ours for the call; the descriptor
    // is open.
    let sent = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives what a socket has at once, in the same way. Descriptors that come along are closed.
#[expect(unsafe_code, reason = "std has no flags for a receive")]
pub(super) fn receive_now(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `bytes.len()` bytes to a slice that is ours alone for the call;
    // the descriptor is open.
    let received =
        unsafe { libc::recv(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), libc::MSG_DONTWAIT) };
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}

/// Whether a write to `fd` may block: its O_NONBLOCK flag is clear.
#[expect(unsafe_code, reason = "no safe wrapper of fcntl")]
pub(super) fn may_block(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: F_GETFL takes no argument and changes nothing; the descriptor is open.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    flags < 0 || flags & libc::O_NONBLOCK == 0
}

/// Whether `fd` is a socket.
#[expect(unsafe_code, reason = "no safe wrapper of fstat for a descriptor of any kind")]
pub(super) fn is_socket(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: all zeros is a valid stat; fstat fills it or fails, and the descriptor is open.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let known = unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) } == 0;
    known && stat.st_mode & libc::S_IFMT == libc::S_IFSOCK
}

/// Sees to it that `file` cannot be made shorter, if its kind allows: whether that holds now.
///
/// A file system's files cannot be sealed; accesses to those must survive the loss of a page.
#[expect(unsafe_code, reason = "no safe wrapper of fcntl")]
pub(super) fn seal_length(file: &File) -> bool {
    let fd = file.as_raw_fd();
    // SAFETY: F_GET_SEALS takes no argument; the descriptor is open.
    let seals = unsafe { libc::fcntl(fd, libc::F_GET_SEALS) };
    if seals < 0 {
        return false;
    }
    if seals & libc::F_SEAL_SHRINK != 0 {
        return true;
    }
    // SAFETY: F_ADD_SEALS takes an int; it fails without effect where it is not allowed.
    unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) == 0 }
}

/// A new anonymous file of `len` zero bytes whose length is sealed both ways.
#[expect(unsafe_code, reason = "no safe wrapper of memfd_create")]
pub(super) fn sealed_memory_file(len: u64) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated constant, and the result is checked before it is used.
    let fd = unsafe {
        libc::memfd_create(c"vhost-inflight".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an int; the descriptor is open.
    if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}
