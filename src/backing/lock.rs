//! Locks that keep two programs from writing to one disk, and who holds them.
//!
//! The locks belong to the open file description that also does the I/O. The kernel drops them only
//! when the last operation on that description has ended, so a successor that waits for them also
//! waits for what a killed predecessor still has in flight: no late write lands on newer data.
//!
//! Both kinds are taken. `fcntl` open-file-description locks are what QEMU and its tools look for;
//! `flock` is what udev, `util-linux` and scripts use, and on local file systems the two kinds do
//! not see each other.
//!
//! A writer locks the whole file. A reader shares: it stays off bytes 100..=200, because QEMU's
//! users of an image hold a shared lock on byte 100 + n while they use permission n, and on byte
//! 200 + n while they forbid others to use it (n = 0 is reading, n = 1 writing). So readers and QEMU
//! readers live together, and a reader sees a QEMU writer by its byte 101.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::error::OpenError;

/// How often a lock held by another is tried again.
const RETRY: Duration = Duration::from_millis(50);
/// How often the wait is mentioned.
const REMIND: Duration = Duration::from_secs(5);

/// QEMU's lock byte for "I write to it".
const QEMU_WRITES: i64 = 101;
/// QEMU's lock byte for "nobody else may write to it".
const QEMU_FORBIDS_WRITES: i64 = 201;

/// A bounded wait for another program, which says from time to time what it waits for.
pub(super) struct Wait {
    path: PathBuf,
    start: Instant,
    limit: Duration,
    remind_at: Duration,
}

impl Wait {
    /// Waits for `path`, up to `limit` from now in all.
    pub(super) fn new(path: &Path, limit: Duration) -> Self {
        Self { path: path.to_owned(), start: Instant::now(), limit, remind_at: Duration::ZERO }
    }

    /// Sleeps a little before the next attempt; false when there is no time for one.
    pub(super) fn sleep(&mut self, holder: impl FnOnce() -> String) -> bool {
        let waited = self.start.elapsed();
        if waited >= self.limit {
            return false;
        }
        let left = self.limit - waited;
        if waited >= self.remind_at {
            tracing::warn!("{} is held by {}; waiting up to {left:.0?}", self.path.display(), holder());
            self.remind_at = waited + REMIND;
        }
        std::thread::sleep(RETRY.min(left));
        true
    }
}

/// Locks `file` for reading or for writing, as soon as no other holder is left.
pub(super) fn acquire(file: &File, read_only: bool, wait: &mut Wait) -> Result<(), OpenError> {
    loop {
        match try_acquire(file, read_only) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(source) => return Err(OpenError::LockFailed { path: wait.path.clone(), source }),
        }
        if !wait.sleep(|| holder(file)) {
            return Err(OpenError::Locked { path: wait.path.clone(), holder: holder(file) });
        }
    }
}

/// Takes all locks, or none and returns false.
fn try_acquire(file: &File, read_only: bool) -> io::Result<bool> {
    if !try_flock(file, if read_only { libc::LOCK_SH } else { libc::LOCK_EX })? {
        return Ok(false);
    }
    let ranges: &[(i64, i64)] = if read_only { &[(0, 100), (QEMU_FORBIDS_WRITES, 0)] } else { &[(0, 0)] };
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    let mut locked = true;
    for (start, len) in ranges {
        locked = locked && set_range(file, libc::F_OFD_SETLK, kind, *start, *len)?.is_some();
    }
    if locked && read_only {
        // Asks only: would an exclusive lock of that byte conflict with anybody's?
        let asked = set_range(file, libc::F_OFD_GETLK, libc::F_WRLCK, QEMU_WRITES, 1)?;
        locked = asked == Some(libc::F_UNLCK);
    }
    if !locked {
        // A waiter that keeps half of the locks would keep the holder's successor out.
        set_range(file, libc::F_OFD_SETLK, libc::F_UNLCK, 0, 0)?;
        try_flock(file, libc::LOCK_UN)?;
    }
    Ok(locked)
}

/// One `flock`; false when another holds it. Where there is no such lock nobody can hold one.
#[expect(unsafe_code, reason = "std's lock cannot be told apart from its other errors")]
fn try_flock(file: &File, how: i32) -> io::Result<bool> {
    // SAFETY: plain integers; the descriptor is open as long as `file`.
    if unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    let e = io::Error::last_os_error();
    match e.raw_os_error() {
        Some(libc::EWOULDBLOCK) => Ok(false),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENOLCK) => Ok(true),
        _ => Err(e),
    }
}

/// One `fcntl` lock command on a range, `len` 0 meaning to the end of all files. Returns the type
/// the kernel left in the structure, or `None` when another holds a conflicting lock.
#[expect(unsafe_code, reason = "std has no open-file-description locks")]
fn set_range(file: &File, command: i32, kind: i32, start: i64, len: i64) -> io::Result<Option<i32>> {
    let mut lock = libc::flock64 {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: `lock` is an initialised `flock64`, which these commands take, and outlives the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), command, &mut lock) } == 0 {
        return Ok(Some(i32::from(lock.l_type)));
    }
    let e = io::Error::last_os_error();
    match e.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(None),
        _ => Err(e),
    }
}

/// Names who locks `file`.
fn holder(file: &File) -> String {
    visible_holder(file).unwrap_or_else(|| {
        "a program that cannot be seen from here (in another container, or killed with I/O still in flight)"
            .into()
    })
}

/// Names who locks `file`, as far as this process may see.
pub(super) fn visible_holder(file: &File) -> Option<String> {
    let wanted = file.metadata().ok()?;
    let mut holders = descriptors_locking(&wanted);
    if holders.is_empty() {
        // Others' descriptors may be hidden from us while the kernel's list is not.
        let list = fs::read_to_string("/proc/locks").unwrap_or_default();
        holders = pids_locking(&list, wanted.dev(), wanted.ino());
    }
    holders.sort_unstable();
    holders.dedup();
    let names: Vec<_> = holders.into_iter().map(program).collect();
    (!names.is_empty()).then(|| names.join(" and "))
}

fn program(pid: u32) -> String {
    if pid == std::process::id() {
        return format!("this process ({pid})");
    }
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!("{} (process {pid})", name.trim_end()),
        Err(_) => format!("process {pid}"),
    }
}

/// Processes with a descriptor that holds a lock on the file. This also finds
/// open-file-description locks, which belong to no process and have none in `/proc/locks`.
fn descriptors_locking(wanted: &Metadata) -> Vec<u32> {
    let mut found = Vec::new();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in processes {
        let Some(pid) = number(&process.file_name()) else { continue };
        for fd in fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            // Follows the link to the open file itself, whatever its name means by now.
            let same = fs::metadata(fd.path())
                .is_ok_and(|meta| meta.dev() == wanted.dev() && meta.ino() == wanted.ino());
            let info = process.path().join("fdinfo").join(fd.file_name());
            if same && fs::read_to_string(info).is_ok_and(|info| info.contains("\nlock:")) {
                found.push(pid);
            }
        }
    }
    found
}

fn number(name: &OsStr) -> Option<u32> {
    name.to_str()?.parse().ok()
}

/// Process ids in the text of `/proc/locks` that lock this file.
fn pids_locking(list: &str, dev: u64, ino: u64) -> Vec<u32> {
    let file = format!("{:02x}:{:02x}:{ino}", libc::major(dev), libc::minor(dev));
    list.lines()
        // `3: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF`; a waiter has `->` after the number.
        .filter(|line| !line.contains("->"))
        .filter_map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            (*words.get(5)? == file).then(|| words[4].parse().ok()).flatten()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_is_refused_and_not_held_by_another_is_an_error_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        fs::write(&path, [0; 512]).unwrap();
        // A writer's lock needs a descriptor that can write.
        let file = File::open(&path).unwrap();
        let mut wait = Wait::new(&path, Duration::from_secs(3600));
        let error = acquire(&file, false, &mut wait).unwrap_err();
        assert!(matches!(error, OpenError::LockFailed { .. }), "{error:?}");
        assert!(error.to_string().contains("cannot be locked"), "{error}");
    }

    #[test]
    fn the_kernels_list_of_locks_names_holders_but_not_waiters() {
        let list = "1: POSIX  ADVISORY  WRITE 4711 fe:00:10256661 0 EOF\n\
                    1: -> POSIX  ADVISORY  WRITE 4712 fe:00:10256661 0 EOF\n\
                    2: OFDLCK ADVISORY  READ -1 fe:00:10256661 100 100\n\
                    3: FLOCK  ADVISORY  WRITE 99 fe:00:1025666 0 EOF\n\
                    4: FLOCK  ADVISORY  WRITE 98 fe:10:10256661 0 EOF\n\
                    short\n";
        let dev = libc::makedev(0xfe, 0);
        assert_eq!(pids_locking(list, dev, 10_256_661), [4711]);
        assert_eq!(pids_locking(list, libc::makedev(0xfe, 0x10), 10_256_661), [98]);
        assert_eq!(pids_locking(list, dev, 5), [0; 0]);
    }
}
