//! The file beside a disk that says which cache it goes with; the bytes are the cache's business.
//!
//! Invariants:
//! - It is `<disk>.pcache` beside the disk's real file, whatever symbolic links lead there, and a
//!   regular file of two pages; symbolic links and anything longer are not followed or touched.
//! - A copy that [`write`] has returned from survives the host, and so does the file's name.
//! - A device has no place beside it that would be restored, copied and moved with it: no sidecar.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes of a copy.
const PAGE: u64 = 4096;

/// The sidecar's path, of the disk's.
pub(super) fn path_of(disk: &Path) -> io::Result<PathBuf> {
    let mut name = fs::canonicalize(disk)?.into_os_string();
    name.push(".pcache");
    Ok(name.into())
}

/// What it holds, up to two pages; `None` if there is none.
pub(super) fn read(disk: &Path) -> io::Result<Option<Vec<u8>>> {
    let opened = OpenOptions::new().read(true).custom_flags(FLAGS).open(path_of(disk)?);
    let file = match opened {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => refuse_other(opened?)?,
    };
    let mut bytes = Vec::new();
    file.take(2 * PAGE + 1).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// Stores one of its two copies durably, making it first if need be.
pub(super) fn write(disk: &Path, copy: u64, page: &[u8]) -> io::Result<()> {
    assert!(copy < 2 && page.len() as u64 == PAGE, "a sidecar has two copies of one page");
    let path = path_of(disk)?;
    let open = |options: &mut OpenOptions| options.write(true).custom_flags(FLAGS).open(&path);
    let (file, is_new) = match open(&mut OpenOptions::new()) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            (open(OpenOptions::new().create_new(true).mode(0o600))?, true)
        }
        opened => (refuse_other(opened?)?, false),
    };
    if file.metadata()?.len() != 2 * PAGE {
        file.set_len(2 * PAGE)?;
    }
    file.write_all_at(page, copy * PAGE)?;
    file.sync_all()?;
    if is_new { sync_parent(&path) } else { Ok(()) }
}

/// Removes it durably, if it is there.
pub(super) fn remove(disk: &Path) -> io::Result<()> {
    let path = path_of(disk)?;
    match fs::remove_file(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.and_then(|()| sync_parent(&path)),
    }
}

/// A pipe would block, a link lead elsewhere.
const FLAGS: i32 = libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK;

fn refuse_other(file: File) -> io::Result<File> {
    let meta = file.metadata()?;
    match meta.is_file() && meta.len() <= 2 * PAGE {
        true => Ok(file),
        false => Err(io::Error::other("it is not a file of 8192 bytes")),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_read_as_written_and_links_to_the_disk_lead_to_one_sidecar() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, link) = (dir.path().join("disk"), dir.path().join("link"));
        fs::write(&disk, "").unwrap();
        std::os::unix::fs::symlink(&disk, &link).unwrap();
        assert_eq!(read(&disk).unwrap(), None);
        write(&link, 1, &[1; PAGE as usize]).unwrap();
        write(&disk, 0, &[2; PAGE as usize]).unwrap();
        let bytes = read(&link).unwrap().unwrap();
        assert_eq!((bytes.len(), bytes[0], bytes[4096]), (8192, 2, 1));
        assert!(dir.path().join("disk.pcache").exists() && !dir.path().join("link.pcache").exists());
        remove(&link).unwrap();
        assert_eq!(read(&disk).unwrap(), None);
        remove(&disk).unwrap();
    }

    #[test]
    fn what_is_no_sidecar_is_neither_followed_nor_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, path) = (dir.path().join("disk"), dir.path().join("disk.pcache"));
        fs::write(&disk, "").unwrap();
        let precious = dir.path().join("precious");
        fs::write(&precious, "precious").unwrap();
        std::os::unix::fs::symlink(&precious, &path).unwrap();
        assert!(read(&disk).is_err() && write(&disk, 0, &[1; PAGE as usize]).is_err());
        assert_eq!(fs::read(&precious).unwrap(), b"precious");
        fs::remove_file(&path).unwrap();
        fs::write(&path, vec![7; 10_000]).unwrap();
        assert!(read(&disk).is_err() && write(&disk, 0, &[1; PAGE as usize]).is_err());
        assert_eq!(fs::read(&path).unwrap(), vec![7; 10_000]);
    }
}
