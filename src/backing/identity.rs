//! Which disk this is, and what writing to it leaves: the evidence that judges at an attach.
//!
//! Names (paths, device numbers) change with every boot, so there is a name of the disk's own where
//! one can be had: a file's inode and the time it was made, a device's WWN or serial number. And
//! writing leaves traces that the writer does not control: the time of a file's last write, the
//! kernel's count of the sectors written to a device.
//!
//! Invariants:
//! - What is not known is zero ([`Traces::UNCOUNTED`] for a count), and never equal to what is.
//! - Times count only where this host's kernel draws them: a file server's clock is another, what a
//!   client shows of a file's times may be its own guess, and asking a server that hangs would hang.
//! - Opening a disk leaves no trace; see [`keep_times`].

use std::fs::{self, File, FileTimes, Metadata};
use std::hash::Hasher;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use siphasher::sip::SipHasher13;

use super::usage::sysfs;

/// What writing to a disk leaves behind, wherever it was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Traces {
    /// When the file was last written to, nanoseconds since 1970; 0 if unknown.
    pub modified_ns: u64,
    /// The kernel's number of this attachment of the device, unique until the next boot; 0 if unknown.
    pub attachment: u64,
    /// Sectors written to and discarded from the device, as the kernel counts them, or
    /// [`Traces::UNCOUNTED`].
    pub written: u64,
    /// Whether that count began with this boot, or later and with this device.
    pub counts_from_boot: bool,
}

impl Traces {
    /// The `written` of what nobody counts.
    pub const UNCOUNTED: u64 = u64::MAX;
}

impl Default for Traces {
    fn default() -> Self {
        Traces { modified_ns: 0, attachment: 0, written: Self::UNCOUNTED, counts_from_boot: false }
    }
}

/// File systems that this host's kernel keeps, so that their times are of its clock (`statfs(2)`).
const LOCAL: [i64; 9] = [
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // xfs
    0x9123_683e, // btrfs
    0xf2f5_2010, // f2fs
    0xca45_1a4e, // bcachefs
    0x2fc1_2fc1, // zfs
    0x0102_1994, // tmpfs
    0x794c_7630, // overlayfs
    0x3153_464a, // jfs
];

/// Whether the times of `file` are of this host's clock.
#[expect(unsafe_code, reason = "std does not say what file system a file is on")]
pub(super) fn has_local_times(file: &File) -> bool {
    let mut about = MaybeUninit::<libc::statfs64>::uninit();
    // SAFETY: the descriptor is open as long as `file`, and `about` has room for the structure.
    if unsafe { libc::fstatfs64(file.as_raw_fd(), about.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: the call succeeded, so it has filled the structure.
    LOCAL.contains(&unsafe { about.assume_init() }.f_type)
}

/// The traces of writes to an open regular file with local times.
pub(super) fn traces_of_file(file: &File) -> io::Result<Traces> {
    Ok(Traces { modified_ns: modified_ns(&file.metadata()?), ..Traces::default() })
}

fn modified_ns(meta: &Metadata) -> u64 {
    let since = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
    u64::try_from(since).unwrap_or(0)
}

/// Undoes what `probe` may do to the time of the file's last write although it changes nothing in it,
/// as punching a hole behind its end does. Where that is not permitted the times count no longer:
/// returns false.
pub(super) fn keep_times<T>(file: &File, probe: impl FnOnce() -> T) -> (T, bool) {
    let before = file.metadata();
    let result = probe();
    let (Ok(before), Ok(after)) = (before, file.metadata()) else { return (result, false) };
    if modified_ns(&before) == modified_ns(&after) {
        return (result, true);
    }
    let kept = before.modified().and_then(|time| file.set_times(FileTimes::new().set_modified(time)));
    (result, kept.is_ok())
}

/// When the file was made, nanoseconds since 1970; 0 where its file system does not know.
pub(super) fn born_ns(meta: &Metadata) -> u64 {
    let since = meta.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(0))
}

/// The traces of writes to a block device.
pub(super) fn traces_of_device(dev: u64) -> Traces {
    let folder = sysfs(dev);
    let attachment = whole_disk(&folder).join("diskseq");
    let is_loop = whole_disk(&folder).join("loop").exists();
    let stat = fs::read_to_string(folder.join("stat")).unwrap_or_default();
    let counted = fs::read_to_string(whole_disk(&folder).join("queue/iostats"));
    let written = match counted {
        Ok(on) if on.trim() == "0" => None,
        _ => sectors_written(&stat),
    };
    Traces {
        modified_ns: 0,
        attachment: number_in(attachment),
        written: written.unwrap_or(Traces::UNCOUNTED),
        // A loop device goes on counting when it is given another file.
        counts_from_boot: !is_loop,
    }
}

/// Sectors written and discarded, of the text of a device's `stat` (the kernel's
/// Documentation/block/stat.rst).
fn sectors_written(stat: &str) -> Option<u64> {
    let words: Vec<u64> = stat.split_whitespace().map_while(|word| word.parse().ok()).collect();
    Some(words.get(6)?.wrapping_add(words.get(13).copied().unwrap_or(0)))
}

/// A hash of the name that a device has of its own, 0 if it has none.
pub(super) fn stable_name(dev: u64) -> u64 {
    let folder = sysfs(dev);
    let Some(name) = own_name(&folder) else { return 0 };
    let mut hasher = SipHasher13::new_with_keys(0x7063_6163_6865_2d76, 0x686f_7374_2d69_6431);
    hasher.write(name.as_bytes());
    hasher.finish().max(1)
}

/// The first of the names that Linux shows, with the place of the partition, if it is one.
fn own_name(folder: &std::path::Path) -> Option<String> {
    const NAMES: [&str; 8] = [
        "wwid",
        "device/wwid",
        "dm/uuid",
        "md/uuid",
        "device/serial",
        "serial",
        "loop/backing_file",
        "device/vpd_pg80",
    ];
    let disk = whole_disk(folder);
    let name = NAMES.iter().find_map(|name| {
        let text = fs::read(disk.join(name)).ok()?;
        let text = String::from_utf8_lossy(&text).trim_matches(['\0', ' ', '\n']).to_owned();
        (!text.is_empty()).then(|| format!("{name} {text}"))
    })?;
    let text = |of: &str| fs::read_to_string(folder.join(of)).unwrap_or_default();
    Some(format!("{name} part {} at {}", text("partition").trim(), text("start").trim()))
}

/// The folder of the disk that a partition's folder is of, or the folder itself.
fn whole_disk(folder: &std::path::Path) -> PathBuf {
    match fs::canonicalize(folder) {
        Ok(real) if real.join("partition").exists() => real.join(".."),
        _ => folder.to_owned(),
    }
}

/// Whether two block devices, or those that two file systems are on, rest on a common one. Where the kernel
/// does not show on what a file system rests, as with some of many devices and those of a network, yes.
pub(super) fn share_device(one: u64, other: u64) -> bool {
    if one == other {
        return true;
    }
    let (mut ones, mut others) = (Vec::new(), Vec::new());
    let is_known = rests_on(&sysfs(one), &mut ones) && rests_on(&sysfs(other), &mut others);
    !is_known || ones.iter().any(|folder| others.contains(folder))
}

/// The devices at the bottom of the one with this folder in sysfs, through partitions and what is built
/// on others. False where one is not shown.
fn rests_on(folder: &std::path::Path, bottom: &mut Vec<PathBuf>) -> bool {
    let Ok(disk) = fs::canonicalize(whole_disk(folder)) else { return false };
    let below: Vec<_> = fs::read_dir(disk.join("slaves")).into_iter().flatten().flatten().collect();
    // What a loop device lies in is another file system's business.
    let is_bottom = below.is_empty() && !disk.join("loop").exists();
    if is_bottom {
        bottom.push(disk);
    }
    is_bottom || !below.is_empty() && below.iter().all(|entry| rests_on(&entry.path(), bottom))
}

fn number_in(path: PathBuf) -> u64 {
    fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_apart_only_where_the_kernel_shows_that_they_are() {
        let number = |folder: &PathBuf| {
            let text = fs::read_to_string(folder.join("dev")).ok()?;
            let (major, minor) = text.trim().split_once(':')?;
            Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
        };
        let folders = |of: &str| fs::read_dir(of).into_iter().flatten().flatten().map(|e| e.path());
        let is_plain = |folder: &PathBuf| {
            !folder.join("loop").exists()
                && fs::read_dir(folder.join("slaves")).is_ok_and(|mut below| below.next().is_none())
        };
        let disks: Vec<PathBuf> = folders("/sys/block").filter(is_plain).collect();
        let nowhere = libc::makedev(0, 45);
        for disk in &disks {
            let dev = number(disk).expect("a disk has a number");
            assert!(share_device(dev, dev) && share_device(dev, nowhere) && share_device(nowhere, dev));
            for other in disks.iter().filter(|other| *other != disk) {
                let other = number(other).expect("a disk has a number");
                assert!(!share_device(dev, other), "{} and {other}", disk.display());
            }
            let parts = folders(disk.to_str().expect("a plain name"));
            for part in parts.filter(|part| part.join("partition").exists()) {
                assert!(share_device(dev, number(&part).expect("a partition has a number")));
            }
        }
    }

    #[test]
    fn written_and_discarded_sectors_are_read_from_the_kernels_line() {
        let line = "  446  12  26504  53   59  20   3192   7  0   80  63   5  0  1024  2   8  1\n";
        assert_eq!(sectors_written(line), Some(3192 + 1024));
        assert_eq!(sectors_written("446 12 26504 53 59 20 3192 7 0 80 63"), Some(3192));
        assert_eq!(sectors_written("446 12"), None);
        assert_eq!(sectors_written(""), None);
    }

    #[test]
    fn a_device_is_named_by_what_is_its_own_and_by_its_partition() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("sda");
        let part = disk.join("sda2");
        fs::create_dir_all(part.join("x")).unwrap();
        fs::create_dir_all(disk.join("device")).unwrap();
        assert_eq!(own_name(&disk), None);
        fs::write(disk.join("device/wwid"), "\n").unwrap();
        fs::write(disk.join("device/serial"), "S1 \n").unwrap();
        assert_eq!(own_name(&disk).unwrap(), "device/serial S1 part  at ");
        fs::write(disk.join("wwid"), "naa.5\n").unwrap();
        fs::write(part.join("partition"), "2\n").unwrap();
        fs::write(part.join("start"), "2048\n").unwrap();
        assert_eq!(own_name(&part).unwrap(), "wwid naa.5 part 2 at 2048");
        assert_ne!(own_name(&disk), own_name(&part));
    }

    #[test]
    fn a_probe_that_changes_nothing_leaves_the_time_of_the_last_write() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, [1; 4096]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let long_ago = UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
        file.set_times(FileTimes::new().set_modified(long_ago)).unwrap();
        let before = traces_of_file(&file).unwrap();
        assert_eq!(before.modified_ns, 1_000_000_000_123_456_789);
        let touch = || file.set_times(FileTimes::new().set_modified(std::time::SystemTime::now()));
        let (touched, kept) = keep_times(&file, touch);
        assert!(touched.is_ok() && kept);
        assert_eq!(traces_of_file(&file).unwrap(), before);
    }

    #[test]
    fn what_is_unknown_says_so() {
        assert_eq!(traces_of_device(libc::makedev(0, 0)).written, Traces::UNCOUNTED);
        assert_eq!(stable_name(libc::makedev(0, 0)), 0);
    }
}
