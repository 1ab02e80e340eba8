use std::cell::RefCell;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::*;
use crate::pmem::{OpenOptions, create};

const MIB: u64 = 1 << 20;

/// Files of such lengths, and what is in memory of them.
fn files(dir: &Path, lens: &[u64]) -> Vec<PathBuf> {
    let paths: Vec<PathBuf> = (0..lens.len()).map(|n| dir.join(format!("member{n}"))).collect();
    paths.iter().zip(lens).for_each(|(path, len)| create(path, *len).unwrap());
    paths
}

fn open(paths: &[PathBuf], assume_dax: bool) -> Vec<MappedPmem> {
    let open = |path| MappedPmem::open(&OpenOptions { assume_dax, ..OpenOptions::new(path) }).unwrap();
    paths.iter().map(open).collect()
}

/// One of 4 MiB, one of 6 behind 4, and one of 3 behind 4.
fn joined(dir: &Path, assume_dax: bool) -> (Vec<PathBuf>, MappedPmem) {
    let paths = files(dir, &[5 * MIB, 12 * MIB, 7 * MIB + 4096]);
    let places =
        [(0, 0), (4, 4), (10, 4)].map(|(base, start)| Place { base: base * MIB, start: start * MIB });
    let pmem = MappedPmem::join(open(&paths, assume_dax), &places).unwrap();
    (paths, pmem)
}

fn bytes(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8 ^ seed).collect()
}

#[test]
fn what_is_stored_across_members_lies_in_each_at_its_place() {
    let disk = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    for (dir, assume_dax) in [(&disk, false), (&memory, true)] {
        let (paths, pmem) = joined(dir.path(), assume_dax);
        assert_eq!(pmem.len(), 13 * MIB + 4096);
        let ends: Vec<_> = pmem.members().map(|(path, range)| (path.to_owned(), range.end)).collect();
        let expected = [4 * MIB, 10 * MIB, 13 * MIB + 4096];
        assert_eq!(ends, paths.iter().cloned().zip(expected).collect::<Vec<_>>());
        // Over both seams, and up to the end.
        for (at, file, own) in [
            (4 * MIB - 5000, 0, 4 * MIB - 5000),
            (10 * MIB - 5000, 1, 10 * MIB - 5000),
            (13 * MIB - 904, 2, 7 * MIB - 904),
        ] {
            let len = if file == 2 { 5000 } else { 10_000 };
            let stored = bytes(file as u8, len);
            pmem.write(at, &stored).unwrap();
            pmem.fence();
            pmem.sync().unwrap();
            let mut read = vec![0; len];
            pmem.read(at, &mut read).unwrap();
            assert!(read == stored);
            let mut own_bytes = vec![0; 5000];
            let of = |n: usize| File::open(&paths[n]).unwrap();
            of(file).read_exact_at(&mut own_bytes, own).unwrap();
            assert!(own_bytes == stored[..5000], "member {file}");
            if file < 2 {
                of(file + 1).read_exact_at(&mut own_bytes, 4 * MIB).unwrap();
                assert!(own_bytes == stored[5000..], "the beginning of member {}", file + 1);
            }
        }
        // What is not the whole's is as it was.
        let mut rest = vec![1; MIB as usize];
        File::open(&paths[0]).unwrap().read_exact_at(&mut rest, 4 * MIB).unwrap();
        assert!(rest.iter().all(|byte| *byte == 0));
        pmem.allocate().unwrap();
        pmem.prefault().unwrap();
        assert!(pmem.is_on_device(&[0..8192, 4 * MIB - 8192..4 * MIB + 8192, 9 * MIB..11 * MIB]).unwrap());
        pmem.reread().unwrap();
        let mut read = vec![0; 10_000];
        pmem.read(4 * MIB - 5000, &mut read).unwrap();
        assert!(read == bytes(0, 10_000), "it was on the device");
    }
}

#[test]
fn only_the_last_member_grows_and_is_cut_off() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (paths, pmem) = joined(dir.path(), true);
    let len = |n: usize| std::fs::metadata(&paths[n]).unwrap().len();
    pmem.write(4 * MIB - 2, b"seam").unwrap();
    assert_eq!(pmem.resize(20 * MIB).unwrap(), 20 * MIB);
    assert_eq!([len(0), len(1), len(2)], [5 * MIB, 12 * MIB, 14 * MIB]);
    pmem.write(20 * MIB - 4, b"last").unwrap();
    assert_eq!(pmem.resize(11 * MIB).unwrap(), 11 * MIB);
    assert_eq!(len(2), 5 * MIB);
    // A member stays one.
    for less in [10 * MIB, 6 * MIB] {
        assert_eq!(pmem.resize(less).unwrap(), 11 * MIB);
        assert_eq!([len(0), len(1), len(2)], [5 * MIB, 12 * MIB, 5 * MIB]);
    }
    let mut read = [0; 4];
    pmem.read(4 * MIB - 2, &mut read).unwrap();
    assert_eq!(&read, b"seam");
}

#[test]
fn a_member_that_is_cut_off_under_its_users_fails_the_copies_that_touch_it_and_no_others() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (paths, pmem) = joined(dir.path(), true);
    File::options().write(true).open(&paths[1]).unwrap().set_len(6 * MIB).unwrap();
    let mut byte = [0];
    for (at, is_there) in [(4 * MIB - 1, true), (6 * MIB - 1, true), (6 * MIB, false), (10 * MIB, true)] {
        assert_eq!(pmem.read(at, &mut byte).is_ok(), is_there, "byte {at}");
        assert_eq!(pmem.write(at, &byte).is_ok(), is_there, "byte {at}");
    }
    let across = pmem.read(10 * MIB - 8, &mut [0; 16]).unwrap_err();
    assert_eq!((across.at, across.len), (10 * MIB - 8, 16), "told as the whole's bytes");
}

#[test]
fn each_member_stays_locked_and_its_files_can_be_given_away() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (paths, pmem) = joined(dir.path(), false);
    for path in &paths {
        let second = MappedPmem::open(&OpenOptions::new(path)).map(drop);
        assert!(matches!(second, Err(OpenError::InUse { .. })), "{second:?}");
    }
    let sources = pmem.sources().unwrap();
    drop(pmem);
    let second = MappedPmem::open(&OpenOptions::new(&paths[1])).map(drop);
    assert!(
        matches!(second, Err(OpenError::InUse { .. })),
        "whoever has the files has the locks: {second:?}"
    );
    drop(sources);
    open(&paths, false);
}

#[test]
fn members_that_cannot_be_one_are_refused_with_a_sentence() {
    let disk = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let place = |base, start| Place { base, start };
    let refused = |members, places: &[Place]| MappedPmem::join(members, places).unwrap_err().to_string();
    let mut mixed = open(&files(disk.path(), &[4 * MIB]), false);
    let other = open(&files(memory.path(), &[8 * MIB]), false);
    let first = mixed[0].class();
    mixed.extend(other);
    if first == MediaClass::PageCache {
        let said = refused(mixed, &[place(0, 0), place(4 * MIB, 4 * MIB)]);
        assert!(said.contains("is page-cache and") && said.ends_with("are of one class"), "{said}");
    }
    let two = || open(&[memory.path().join("member0"), memory.path().join("second")], true);
    create(&memory.path().join("second"), 8 * MIB).unwrap();
    for (places, expected) in [
        ([place(0, 0), place(9 * MIB, 4 * MIB)], "has 8388608 bytes and 9437184 are needed"),
        ([place(0, 0), place(8 * MIB, 8 * MIB)], "has 8388608 bytes and 8388609 are needed"),
        ([place(0, 0), place(4097, 4 * MIB)], "mapped in pages of 4096 bytes"),
    ] {
        let said = refused(two(), &places);
        assert!(said.contains(expected), "{said}");
    }
}

#[test]
fn a_sync_of_several_asks_each_and_fails_with_any() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (_, pmem) = joined(dir.path(), false);
    for failing in [None, Some(0), Some(1), Some(2)] {
        let asked = RefCell::new(0);
        let flushed = flush_each(pmem.parts(), |_| {
            let this = asked.replace_with(|asked| *asked + 1);
            if Some(this) == failing { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
        });
        assert_eq!(*asked.borrow(), 3, "all of them, also after a failure");
        assert_eq!(flushed.is_err(), failing.is_some());
    }
}
