//! Every reason not to open a disk, provoked for real.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixListener;

use super::*;

/// The error of opening `path` for reading and writing.
fn refused(path: &Path) -> OpenError {
    Disk::open(&patient(path)).expect_err("it was opened")
}

/// Asserts a variant and that its sentence begins with the path and says `says`.
macro_rules! assert_refused {
    ($error:expr, $path:expr, $variant:pat, $says:expr) => {{
        let error = $error;
        assert!(matches!(error, $variant), "{error:?}");
        let text = error.to_string();
        assert!(text.starts_with($path.to_str().unwrap()) && text.contains($says), "{text}");
    }};
}

#[test]
fn what_is_not_a_disk_is_refused_by_its_kind() {
    let dir = scratch();
    let missing = dir.path().join("none");
    assert_refused!(refused(&missing), missing, OpenError::Missing { .. }, "no such file");
    let below_file = image(dir.path(), 4096).join("x");
    assert_refused!(refused(&below_file), below_file, OpenError::Missing { .. }, "no such file");
    assert_refused!(refused(dir.path()), dir.path(), OpenError::IsDirectory { .. }, "is a directory");
    let null = Path::new("/dev/null");
    assert_refused!(refused(null), null, OpenError::IsCharDevice { .. }, "is a character device");
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    assert_refused!(refused(&socket), socket, OpenError::NotADisk { .. }, "is a socket");
    let pipe = dir.path().join("pipe");
    command(&["mkfifo", pipe.to_str().unwrap()]).unwrap();
    assert_refused!(refused(&pipe), pipe, OpenError::NotADisk { .. }, "is a pipe");
}

#[test]
fn a_disk_has_a_positive_number_of_whole_sectors() {
    let dir = scratch();
    let path = dir.path().join("disk.img");
    fs::write(&path, b"").unwrap();
    assert_refused!(refused(&path), path, OpenError::Empty { .. }, "is empty");
    for size in [1, 511, 513, 4095, 100_000] {
        fs::write(&path, vec![0; size]).unwrap();
        assert_refused!(
            refused(&path),
            path,
            OpenError::OddSize { block: 512, .. },
            &format!("is {size} bytes long")
        );
    }
    for size in [512, 1024, 4096, 1 << 20] {
        fs::write(&path, vec![0; size]).unwrap();
        assert_eq!(Disk::open(&patient(&path)).unwrap().geometry().size, size as u64);
    }
}

#[test]
fn images_of_other_formats_are_refused_unless_said_to_be_raw() {
    let dir = scratch();
    let mut made = Vec::new();
    for format in ["qcow", "qcow2", "qed", "vmdk", "vhdx", "vpc", "vdi", "parallels", "luks"] {
        let path = dir.path().join(format);
        let mut line = vec!["qemu-img", "create", "-q", "-f", format];
        if format == "luks" {
            line.extend(["--object", "secret,id=s,data=x", "-o", "key-secret=s,iter-time=10"]);
        }
        line.extend([path.to_str().unwrap(), "8M"]);
        match command(&line) {
            Ok(_) => made.push(path),
            Err(why) => skip("part of images_of_other_formats_are_refused_unless_said_to_be_raw", &why),
        }
    }
    let fixed = dir.path().join("vhd");
    let line = ["qemu-img", "create", "-q", "-f", "vpc", "-o", "subformat=fixed,force_size=on"];
    if command(&[&line[..], &[fixed.to_str().unwrap(), "8M"]].concat()).is_ok() {
        made.push(fixed);
    }
    let descriptor = dir.path().join("descriptor");
    fs::write(&descriptor, format!("{:<1024}", "# Disk DescriptorFile\nversion=1\n")).unwrap();
    made.push(descriptor);
    for path in made {
        // Whole sectors, whatever the tool made.
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        let size = file.metadata().unwrap().len();
        if !size.is_multiple_of(512) {
            file.set_len(size.next_multiple_of(512)).unwrap();
        }
        let before = fs::read(&path).unwrap();
        assert_refused!(refused(&path), path, OpenError::Formatted { .. }, "looks like a");
        let read_only = OpenOptions { read_only: true, ..patient(&path) };
        assert!(matches!(Disk::open(&read_only), Err(OpenError::Formatted { .. })));
        let raw = OpenOptions { allow_format: true, ..patient(&path) };
        Disk::open(&raw).unwrap_or_else(|e| panic!("forced to be raw: {e}"));
        assert!(fs::read(&path).unwrap() == before, "looking at {} changed it", path.display());
    }
}

#[test]
fn a_raw_image_is_opened_and_not_changed_by_it() {
    let dir = scratch();
    let path = dir.path().join("disk.img");
    let mut content = vec![0x5A; 1 << 20];
    Rng(99).fill(&mut content);
    fs::write(&path, &content).unwrap();
    let disk = Disk::open(&patient(&path)).unwrap();
    assert_eq!(disk.path(), path);
    assert!(disk.is_direct(), "the file system under the temporary directory has direct I/O");
    let geometry = disk.geometry();
    assert_eq!((geometry.size, geometry.logical_block, geometry.physical_block), (1 << 20, 512, 4096));
    assert!(geometry.can_unmap && !geometry.read_only);
    drop(disk);
    assert!(fs::read(&path).unwrap() == content);
    let buffered = Disk::open(&OpenOptions { direct: Direct::Off, ..patient(&path) }).unwrap();
    assert!(!buffered.is_direct());
}

#[test]
fn identities_tell_files_apart_and_ignore_their_names() {
    let dir = scratch();
    let path = image(dir.path(), 1 << 20);
    let identity = Disk::open(&patient(&path)).unwrap().identity();
    assert_eq!((identity.kind, identity.size), (BackingKind::File, 1 << 20));
    assert_eq!(identity.path, path.to_str().unwrap());
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let linked = Disk::open(&patient(&link)).unwrap().identity();
    assert_eq!((linked.device, linked.inode), (identity.device, identity.inode));
    let copy = dir.path().join("copy");
    fs::copy(&path, &copy).unwrap();
    assert_ne!(Disk::open(&patient(&copy)).unwrap().identity().inode, identity.inode);
}

#[test]
fn permission_is_denied_in_so_many_words() {
    if !command(&["id", "-u"]).is_ok_and(|uid| uid == "0") {
        return skip("permission_is_denied_in_so_many_words", "only root can become nobody");
    }
    let dir = scratch();
    let path = image(dir.path(), 1 << 20);
    std::os::unix::fs::chown(dir.path(), Some(65534), Some(65534)).unwrap();
    let path = &path;
    let open = move |read_only| Disk::open(&OpenOptions { read_only, ..patient(path) });
    // File permissions are checked for a user that is the thread's own.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            become_nobody();
            for (read_only, says) in [(false, "for writing"), (true, "for reading")] {
                let error = open(read_only).expect_err("nobody may not");
                assert_refused!(error, path, OpenError::PermissionDenied { .. }, says);
            }
        });
    });
    open(false).unwrap();
}

#[expect(unsafe_code, reason = "std has no file system user")]
fn become_nobody() {
    // SAFETY: plain integers; changes this thread's file system user and nothing else.
    unsafe {
        libc::setfsgid(65534);
        libc::setfsuid(65534);
    }
}

#[test]
fn a_sparse_image_is_made_once_and_never_over_another_file() {
    let dir = scratch();
    let path = dir.path().join("new.img");
    create_sparse(&path, 1 << 40).unwrap();
    let meta = fs::metadata(&path).unwrap();
    assert_eq!((meta.len(), std::os::unix::fs::MetadataExt::blocks(&meta)), (1 << 40, 0));
    assert_eq!(std::os::unix::fs::MetadataExt::mode(&meta) & 0o777, 0o600);
    assert_refused!(create_sparse(&path, 512).unwrap_err(), path, OpenError::Exists { .. }, "left alone");
    assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 40);

    let odd = dir.path().join("odd.img");
    assert_refused!(create_sparse(&odd, 513).unwrap_err(), odd, OpenError::OddSize { .. }, "513 bytes");
    assert_refused!(create_sparse(&odd, 0).unwrap_err(), odd, OpenError::Empty { .. }, "is empty");
    let huge = create_sparse(&odd, 1 << 62).unwrap_err();
    assert_refused!(huge, odd, OpenError::Io { .. }, "creating it");
    assert!(!odd.exists(), "a failed creation leaves nothing behind");
    let nowhere = dir.path().join("none/x.img");
    assert_refused!(create_sparse(&nowhere, 512).unwrap_err(), nowhere, OpenError::Missing { .. }, "no such");
    let dangling = dir.path().join("dangling");
    std::os::unix::fs::symlink(dir.path().join("target"), &dangling).unwrap();
    assert!(matches!(create_sparse(&dangling, 512), Err(OpenError::Exists { .. })));
    assert!(!dir.path().join("target").exists(), "a link is not followed to make a file");
}

#[test]
fn opening_can_create_and_then_insists_on_the_size() {
    let dir = scratch();
    let path = dir.path().join("new.img");
    let options = |size| OpenOptions { create_sparse: Some(size), ..patient(&path) };
    assert_eq!(Disk::open(&options(1 << 20)).unwrap().geometry().size, 1 << 20);
    fs::OpenOptions::new().write(true).open(&path).unwrap().write_all(b"precious").unwrap();
    Disk::open(&options(1 << 20)).unwrap();
    assert_refused!(
        Disk::open(&options(2 << 20)).unwrap_err(),
        path,
        OpenError::SizeDiffers { found: 1048576, wanted: 2097152, .. },
        "left alone"
    );
    assert_eq!(&fs::read(&path).unwrap()[..8], b"precious");
}
