//! Whether this host itself uses a disk: mounted, swapped to, part of a mapped device.
//!
//! For block devices the kernel has the last word, by refusing an exclusive open; what is found here
//! says *why*, and covers files, which the kernel does not protect.

use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// How a block device is used, or one of its partitions.
pub(super) fn of_device(dev: u64) -> Option<String> {
    let mut devices = vec![dev];
    devices.extend(partitions(dev));
    let mounts = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let mount = mount_points(&mounts).find(|mount| {
        // Some file systems have a device number of their own; their source still names the disk.
        devices.contains(&mount.dev) || device_at(&mount.source).is_some_and(|dev| devices.contains(&dev))
    });
    if let Some(mount) = mount {
        return Some(format!("{} is mounted on {}", name_of(mount.source), mount.point.display()));
    }
    let swaps = fs::read("/proc/swaps").unwrap_or_default();
    if let Some(path) = swap_paths(&swaps).find(|path| device_at(path).is_some_and(|d| devices.contains(&d)))
    {
        return Some(format!("{} is swap space", path.display()));
    }
    devices.iter().find_map(|dev| holders(&sysfs(*dev)))
}

/// How a regular file is used, and by which loop device if that alone is so.
pub(super) fn of_file(file: &fs::Metadata) -> Option<String> {
    let same = |path: &Path| fs::metadata(path).is_ok_and(|m| m.dev() == file.dev() && m.ino() == file.ino());
    let swaps = fs::read("/proc/swaps").unwrap_or_default();
    if swap_paths(&swaps).any(|path| same(&path)) {
        return Some("it is swap space".into());
    }
    for block in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let Ok(backing) = fs::read(block.path().join("loop/backing_file")) else { continue };
        if !same(&path_from(backing.trim_ascii_end())) {
            continue;
        }
        let name = format!("/dev/{}", block.file_name().to_string_lossy());
        match read_dev(&block.path()).and_then(of_device) {
            Some(by) => return Some(format!("it is behind the loop device {name}, and {by}")),
            None => tracing::warn!("{name} is a loop device on the same file; do not write to it"),
        }
    }
    None
}

/// A line of `mountinfo`.
struct Mount {
    dev: u64,
    point: PathBuf,
    source: PathBuf,
}

/// Parses `mountinfo` (proc_pid_mountinfo(5)); lines that are not so are left out.
fn mount_points(text: &[u8]) -> impl Iterator<Item = Mount> {
    text.split(|b| *b == b'\n').filter_map(|line| {
        let mut words = line.split(|b| *b == b' ');
        let dev = parse_dev(words.nth(2)?)?;
        let point = path_from(&unescape(words.nth(1)?));
        // Optional fields end with a lone `-`; then come the type and the source.
        let source = path_from(&unescape(words.skip_while(|word| *word != b"-").nth(2)?));
        Some(Mount { dev, point, source })
    })
}

/// The first column of `/proc/swaps`, without its heading.
fn swap_paths(text: &[u8]) -> impl Iterator<Item = PathBuf> {
    let lines = text.split(|b| *b == b'\n').skip(1);
    lines.filter_map(|line| line.split(|b| b" \t".contains(b)).next()).filter(|word| !word.is_empty()).map(
        |word| {
            let path = unescape(word);
            path_from(path.strip_suffix(b"\\040(deleted)").unwrap_or(&path))
        },
    )
}

/// Undoes the octal escapes that /proc uses for space, tab, newline and backslash.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| *first == b'\\');
        let code = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

fn path_from(bytes: &[u8]) -> PathBuf {
    PathBuf::from(std::ffi::OsString::from_vec(bytes.to_vec()))
}

/// `254:1` as a device number.
fn parse_dev(word: &[u8]) -> Option<u64> {
    let (major, minor) = std::str::from_utf8(word).ok()?.trim_end().split_once(':')?;
    Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// The number of the block device at `path`, if it is one.
fn device_at(path: &Path) -> Option<u64> {
    let absolute = path.as_os_str().as_bytes().starts_with(b"/");
    let meta = absolute.then(|| fs::metadata(path).ok())??;
    meta.file_type().is_block_device().then(|| meta.rdev())
}

/// A device's folder in sysfs.
pub(super) fn sysfs(dev: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(dev), libc::minor(dev)))
}

fn read_dev(folder: &Path) -> Option<u64> {
    parse_dev(&fs::read(folder.join("dev")).ok()?)
}

/// Numbers of a device's partitions.
fn partitions(dev: u64) -> Vec<u64> {
    let entries = fs::read_dir(sysfs(dev)).into_iter().flatten().flatten();
    entries.filter(|e| e.path().join("partition").exists()).filter_map(|e| read_dev(&e.path())).collect()
}

/// Mapped devices (dm, md, bcache) built on the device with this folder in sysfs.
fn holders(folder: &Path) -> Option<String> {
    let entries = fs::read_dir(folder.join("holders")).into_iter().flatten().flatten();
    let names: Vec<_> = entries
        .map(|e| {
            let mapped = fs::read_to_string(e.path().join("dm/name"));
            let name = e.file_name().to_string_lossy().into_owned();
            mapped.map_or(name.clone(), |mapped| format!("{name}, {},", mapped.trim_end()))
        })
        .collect();
    (!names.is_empty()).then(|| format!("{} is built on it", names.join(" and ")))
}

fn name_of(path: PathBuf) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines_are_read_with_their_escapes_and_optional_fields() {
        let text = b"36 35 98:0 /mnt1 /mnt/a\\040b rw,noatime master:1 shared:2 - ext3 /dev/root\\134x rw\n\
                     37 35 0:45 / /data rw - btrfs /dev/vdb rw\n\
                     garbage\n\
                     38 35 x:y / /bad rw - ext4 /dev/vdc rw\n";
        let mounts: Vec<_> = mount_points(text).map(|m| (m.dev, m.point, m.source)).collect();
        assert_eq!(
            mounts,
            [
                (libc::makedev(98, 0), "/mnt/a b".into(), "/dev/root\\x".into()),
                (libc::makedev(0, 45), "/data".into(), "/dev/vdb".into()),
            ]
        );
    }

    #[test]
    fn swaps_are_read_without_their_heading() {
        let text = b"Filename\tType\tSize\n/dev/zram0   partition 1 0 100\n/a\\040b file 1 0 -2\n";
        assert_eq!(swap_paths(text).collect::<Vec<_>>(), [Path::new("/dev/zram0"), Path::new("/a b")]);
        assert_eq!(swap_paths(b"Filename\n").count(), 0);
    }

    #[test]
    fn devices_built_on_a_disk_are_named_by_node_and_mapping() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(holders(dir.path()), None);
        fs::create_dir_all(dir.path().join("holders")).unwrap();
        assert_eq!(holders(dir.path()), None);
        fs::create_dir_all(dir.path().join("holders/dm-3/dm")).unwrap();
        fs::write(dir.path().join("holders/dm-3/dm/name"), "vg-root\n").unwrap();
        assert_eq!(holders(dir.path()).unwrap(), "dm-3, vg-root, is built on it");
        fs::remove_dir_all(dir.path().join("holders/dm-3")).unwrap();
        fs::create_dir_all(dir.path().join("holders/md0")).unwrap();
        assert_eq!(holders(dir.path()).unwrap(), "md0 is built on it");
    }

    #[test]
    fn escapes_that_are_none_stay() {
        for (escaped, plain) in
            [(&b"a\\040b"[..], &b"a b"[..]), (b"\\", b"\\"), (b"\\9zz", b"\\9zz"), (b"\\04", b"\\04")]
        {
            assert_eq!(unescape(escaped), plain);
        }
    }
}
