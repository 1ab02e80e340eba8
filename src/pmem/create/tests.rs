use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

#[test]
fn a_new_cache_is_whole_zero_allocated_and_private() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache.img");
    create(&path, (3 << 20) + 4096).unwrap();
    let meta = fs::metadata(&path).unwrap();
    assert_eq!(meta.len(), (3 << 20) + 4096);
    assert!(meta.blocks() * 512 >= meta.len(), "{} blocks", meta.blocks());
    assert_eq!(meta.permissions().mode() & 0o7777, 0o600);
    assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
    assert_eq!(entries(dir.path()), 1);
}

#[test]
fn what_exists_and_is_not_empty_is_never_touched() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache.img");
    fs::write(&path, b"precious").unwrap();
    let error = create(&path, 1 << 20).unwrap_err();
    assert!(matches!(error, CreateError::Exists { .. }), "{error}");
    assert!(matches!(create(dir.path(), 1 << 20), Err(CreateError::Exists { .. })), "a directory");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    assert_eq!(entries(dir.path()), 1);
}

#[test]
fn an_empty_file_is_filled_and_keeps_its_inode_and_mode() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache.img");
    fs::write(&path, b"").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let before = fs::metadata(&path).unwrap();
    create(&path, 1 << 20).unwrap();
    let after = fs::metadata(&path).unwrap();
    assert_eq!((after.len(), after.ino(), after.mode()), (1 << 20, before.ino(), before.mode()));
}

#[test]
fn a_full_file_system_is_told_in_bytes_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let free = free_space(&File::open(dir.path()).unwrap()).unwrap();
    let (path, empty) = (dir.path().join("cache.img"), dir.path().join("empty.img"));
    fs::write(&empty, b"").unwrap();
    // Far above what is free, below the largest file of every file system.
    let size = free + (64 << 30);
    for path in [&path, &empty] {
        match create(path, size).unwrap_err() {
            CreateError::NoSpace { size: wanted, free, .. } => {
                assert!(wanted == size && free < size);
                let said = create(path, size).unwrap_err().to_string();
                assert!(said.contains("are missing") && said.contains(&size.to_string()), "{said}");
            }
            other => panic!("{other}"),
        }
    }
    assert!(!path.exists());
    assert_eq!(fs::metadata(&empty).unwrap().len(), 0);
    assert_eq!(entries(dir.path()), 1);
}

#[test]
fn a_file_whose_space_ends_halfway_is_undone() {
    let dir = tempfile::tempdir().unwrap();
    let (new, empty) = (dir.path().join("new.img"), dir.path().join("empty.img"));
    fs::write(&empty, b"").unwrap();
    let ends_halfway: Allocate = |file, size| {
        write_zeros(file, 0, size / 2)?;
        Err(io::Error::from_raw_os_error(libc::ENOSPC))
    };
    for (path, is_new) in [(&new, true), (&empty, false)] {
        let error = make_in_place(path, 1 << 20, is_new, ends_halfway).unwrap_err();
        assert!(error.to_string().contains("cannot be allocated"), "{error}");
    }
    assert!(!new.exists());
    assert_eq!(fs::metadata(&empty).unwrap().len(), 0);
    for (path, is_new) in [(&new, true), (&empty, false)] {
        make_in_place(path, 1 << 20, is_new, allocate).unwrap();
        assert_eq!(fs::metadata(path).unwrap().len(), 1 << 20);
    }
    assert!(matches!(make_in_place(&new, 1 << 20, true, allocate), Err(CreateError::Exists { .. })));
}

#[test]
fn two_creators_of_one_empty_file_do_not_both_succeed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache.img");
    fs::write(&path, b"").unwrap();
    let other = fs::OpenOptions::new().write(true).open(&path).unwrap();
    assert!(lock::lock(&other, true).is_ok());
    let error = create(&path, 1 << 20).unwrap_err();
    assert!(matches!(error, CreateError::InUse { .. }), "{error}");
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
}

#[test]
fn impossible_sizes_and_places_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    for size in [0, u64::MAX] {
        assert!(matches!(create(&dir.path().join("a"), size), Err(CreateError::Io { .. })), "{size}");
    }
    let error = create(&dir.path().join("missing/cache.img"), 4096).unwrap_err();
    assert!(error.to_string().contains("cannot be created"), "{error}");
    assert_eq!(entries(dir.path()), 0);
}

#[test]
fn file_systems_without_fallocate_get_their_zeros_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zeros");
    write_zeros(&File::create(&path).unwrap(), 0, (2 << 20) + 513).unwrap();
    let content = fs::read(&path).unwrap();
    assert_eq!(content.len(), (2 << 20) + 513);
    assert!(content.iter().all(|byte| *byte == 0));
}
