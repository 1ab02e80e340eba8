//! One owner per cache: the lock that a daemon or a tool holds on the file, and the name of whoever
//! holds it already.
//!
//! Open-file-description locks, because the classic ones vanish when any descriptor of the file is
//! closed anywhere in the process. They go with the last copy of the descriptor, so a killed holder
//! leaves none behind. The kernel does not tell whose they are (`F_OFD_GETLK` answers pid −1, as
//! does `/proc/locks`), but each process's `fdinfo` shows the locks of its descriptors.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};

/// Who has a file that we want.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Holder {
    /// This process, with this command name.
    Process {
        /// Its id.
        pid: u32,
        /// Its command name, as `ps -o comm` shows it.
        command: String,
    },
    /// A process of another user or another pid namespace.
    Hidden,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holder::Process { pid, command } => write!(f, "process {pid} ({command})"),
            Holder::Hidden => {
                f.write_str("a process that is not visible from here (`lslocks` as root may show it)")
            }
        }
    }
}

/// Why there is no lock.
#[derive(Debug)]
pub(super) enum LockError {
    /// Somebody has it.
    Held(Holder),
    /// The file system does not know locks, or worse.
    Io(io::Error),
}

/// Locks the whole of `file` until its last descriptor is closed: for others' reading as well if
/// `exclusive`, else for their writing only.
#[expect(unsafe_code, reason = "calls fcntl")]
pub(super) fn lock(file: &File, exclusive: bool) -> Result<(), LockError> {
    // SAFETY: an all-zero flock is a valid one: from the start, for the whole length, pid 0.
    let mut whole: libc::flock = unsafe { std::mem::zeroed() };
    whole.l_type = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK } as _;
    whole.l_whence = libc::SEEK_SET as _;
    // SAFETY: the descriptor is open, and the command takes a flock.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &whole) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) {
        return Err(LockError::Io(error));
    }
    // A classic lock has an owner that the kernel does tell.
    // SAFETY: as above; the kernel writes to the flock.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut whole) };
    let classic = (asked == 0 && whole.l_pid > 0).then_some(whole.l_pid as u32);
    Err(LockError::Held(classic.map_or_else(|| find_holder(file), named)))
}

/// Who keeps others from writing to `file`, or has it for himself; `None` if nobody does, or that cannot be
/// told. Takes no lock, so that nobody who starts at the same moment is refused because of it.
#[expect(unsafe_code, reason = "calls fcntl")]
pub(super) fn held(file: &File) -> Option<Holder> {
    // SAFETY: an all-zero flock is a valid one: from the start, for the whole length, pid 0.
    let mut whole: libc::flock = unsafe { std::mem::zeroed() };
    whole.l_type = libc::F_WRLCK as _;
    whole.l_whence = libc::SEEK_SET as _;
    // SAFETY: the descriptor is open, and the kernel writes to the flock.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut whole) };
    if asked != 0 || whole.l_type == libc::F_UNLCK as libc::c_short {
        return None;
    }
    let holder = if whole.l_pid > 0 { named(whole.l_pid as u32) } else { find_holder(file) };
    if let (Holder::Process { .. }, Ok(meta)) = (&holder, file.metadata()) {
        let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        seen.push((meta.dev(), meta.ino(), holder.clone()));
    }
    Some(holder)
}

/// Who had which file, by device and inode, when it was asked: known still when this process has been
/// confined and sees others' descriptors no more.
static SEEN: Mutex<Vec<(u64, u64, Holder)>> = Mutex::new(Vec::new());

fn named(pid: u32) -> Holder {
    let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let command = command.trim_end();
    Holder::Process { pid, command: if command.is_empty() { "unknown" } else { command }.to_owned() }
}

/// The first process found with a descriptor of `file` that has a lock.
fn find_holder(file: &File) -> Holder {
    let Ok(wanted) = file.metadata() else { return Holder::Hidden };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .find(|pid: &u32| has_lock(*pid, wanted.dev(), wanted.ino()))
        .map(named)
        .or_else(|| {
            let seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
            let same = |(dev, ino, _): &&(u64, u64, Holder)| (*dev, *ino) == (wanted.dev(), wanted.ino());
            seen.iter().find(same).map(|(_, _, holder)| holder.clone())
        })
        .unwrap_or(Holder::Hidden)
}

/// Whether process `pid` has a lock on the file. Errors mean that it is gone or not ours to see.
fn has_lock(pid: u32, dev: u64, ino: u64) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    descriptors.into_iter().any(|entry| {
        let same = fs::metadata(entry.path()).is_ok_and(|found| found.dev() == dev && found.ino() == ino);
        same && fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", entry.file_name().display()))
            .is_ok_and(|info| info.lines().any(|line| line.starts_with("lock:")))
    })
}
