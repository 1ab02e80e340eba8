use std::fs;
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use super::super::mapping::BASE_ALIGN;
use super::*;
use crate::pmem::{LineFlush, OpenError, OpenOptions, StoreMethod, create};

const MIB: u64 = 1 << 20;

/// A memfd under a path, for as long as the file is open: volatile on every machine.
#[expect(unsafe_code, reason = "calls memfd_create")]
fn memfd(len: u64, flags: libc::c_uint) -> Option<(File, PathBuf)> {
    // SAFETY: makes a new descriptor, which nobody else has.
    let fd = unsafe { libc::memfd_create(c"pmem-test".as_ptr(), flags | libc::MFD_CLOEXEC) };
    if fd < 0 {
        return None;
    }
    // SAFETY: as above.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).unwrap();
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    Some((file, path))
}

fn volatile(len: u64, change: impl FnOnce(&mut OpenOptions)) -> (File, MappedPmem) {
    let (file, path) = memfd(len, 0).unwrap();
    let mut options = OpenOptions::new(path);
    change(&mut options);
    let pmem = MappedPmem::open(&options).unwrap();
    (file, pmem)
}

/// A file on a disk: next to this binary. `None` where even that is in memory.
fn on_disk(len: u64) -> Option<(tempfile::TempDir, PathBuf)> {
    let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let path = dir.path().join("cache.img");
    create(&path, len).unwrap();
    let pmem = MappedPmem::open(&OpenOptions::new(&path)).unwrap();
    if pmem.class() == MediaClass::Volatile {
        eprintln!("SKIPPED: {} is {}", dir.path().display(), pmem.reason());
        return None;
    }
    Some((dir, path))
}

#[test]
fn what_is_written_is_read_back_by_whoever_opens_it_next() {
    for assume_dax in [false, true] {
        let (file, pmem) = volatile(4 * MIB, |options| options.assume_dax = assume_dax);
        let expected = if assume_dax { MediaClass::AssumeDax } else { MediaClass::Volatile };
        assert_eq!(pmem.class(), expected);
        assert_eq!(pmem.len(), 4 * MIB);
        assert!(!assume_dax || pmem.store_plan().is_durable());
        pmem.write(MIB + 3, b"a record").unwrap();
        pmem.fence();
        pmem.prefetch(4 * MIB - 1);
        pmem.sync().unwrap();
        drop(pmem);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let again = MappedPmem::open(&OpenOptions::new(path)).unwrap();
        let mut copy = [0; 8];
        again.read(MIB + 3, &mut copy).unwrap();
        assert_eq!(&copy, b"a record");
    }
}

#[test]
fn every_store_method_works_through_the_trait() {
    for method in StoreMethod::available() {
        let (_file, pmem) = volatile(2 * MIB, |options| {
            options.assume_dax = method != StoreMethod::Cached;
            options.store = Some(StorePlan::uniform(method));
        });
        let source: Vec<u8> = (0..100_000).map(|byte| (byte % 251) as u8).collect();
        for at in [0, 64, 4096, 4097, 70_003] {
            pmem.write(at, &source).unwrap();
            pmem.fence();
            let mut copy = vec![0; source.len()];
            pmem.read(at, &mut copy).unwrap();
            assert!(copy == source, "{method} at {at}");
        }
    }
}

#[test]
fn a_file_on_a_disk_is_page_cache_and_its_sync_is_a_real_one() {
    let Some((_dir, path)) = on_disk(2 * MIB) else { return };
    let pmem = MappedPmem::open(&OpenOptions::new(&path)).unwrap();
    if pmem.class() == MediaClass::Dax {
        eprintln!("SKIPPED: {} is {}", path.display(), pmem.reason());
        return;
    }
    assert_eq!((pmem.class(), pmem.len()), (MediaClass::PageCache, 2 * MIB));
    pmem.write(5000, &[3; 10_000]).unwrap();
    pmem.fence();
    pmem.sync().unwrap();
    let content = fs::read(&path).unwrap();
    assert!(content[5000..15_000].iter().all(|byte| *byte == 3));
    assert!(content[..5000].iter().chain(&content[15_000..]).all(|byte| *byte == 0));

    drop(pmem);
    let mut options = OpenOptions::new(&path);
    options.assume_dax = true;
    let error = MappedPmem::open(&options).unwrap_err();
    assert!(matches!(error, OpenError::NotMemory { .. }), "{error}");
}

#[test]
fn the_base_is_aligned_so_that_huge_pages_fit() {
    for len in [4096, MIB + 5, 6 * MIB] {
        let (_file, pmem) = volatile(len, |_| {});
        assert_eq!(pmem.mapping.base.addr() as u64 % BASE_ALIGN, 0, "{len} bytes");
        let last = [1];
        pmem.write(len - 1, &last).unwrap();
    }
}

#[test]
fn a_truncated_file_is_a_media_error_at_the_access_and_the_rest_works_on() {
    for assume_dax in [false, true] {
        for method in StoreMethod::available() {
            if assume_dax && method == StoreMethod::Cached {
                continue;
            }
            let (file, pmem) = volatile(4 * MIB, |options| {
                options.assume_dax = assume_dax;
                options.store = Some(StorePlan::uniform(method));
            });
            file.set_len(2 * MIB).unwrap();
            let mut copy = vec![0; 8192];
            for (at, len) in [(2 * MIB - 4096, 8192), (3 * MIB, 8), (3 * MIB + 3, 100), (4 * MIB - 64, 64)] {
                let error = Err(MediaError { at, len });
                assert_eq!(pmem.read(at, &mut copy[..len]), error, "{method}");
                assert_eq!(pmem.write(at, &copy[..len]), error, "{method}");
            }
            assert_eq!(pmem.write(2 * MIB - 8192, &copy), Ok(()), "{method}");
            assert_eq!(pmem.read(2 * MIB - 8192, &mut copy), Ok(()), "{method}");
            assert_eq!(pmem.is_zero(MIB..3 * MIB), Err(MediaError { at: 2 * MIB, len: ZERO_STEP }));
            pmem.prefetch(3 * MIB);
        }
    }
}

#[test]
fn a_hole_that_memory_cannot_fill_is_a_media_error() {
    // A huge-page file with more pages than the machine has set aside: the mapping is refused, or
    // the first touch of a page that does not exist raises SIGBUS. Never the end of the process.
    let Some((file, path)) = memfd(0, libc::MFD_HUGETLB) else {
        eprintln!("SKIPPED: no hugetlbfs here");
        return;
    };
    if let Err(error) = file.set_len(512 << 30) {
        eprintln!("SKIPPED: {error}");
        return;
    }
    match MappedPmem::open(&OpenOptions::new(path)) {
        Err(error) => assert!(error.to_string().contains("cannot be mapped"), "{error}"),
        Ok(pmem) => {
            assert_eq!(pmem.class(), MediaClass::Volatile);
            assert!(pmem.reason().contains("hugetlbfs"), "{}", pmem.reason());
            let pages = (pmem.len() / (2 * MIB)).min(1 << 18);
            assert!((0..pages).any(|page| pmem.write(page * 2 * MIB, &[1]).is_err()));
        }
    }
}

#[test]
#[should_panic(expected = "of 4096")]
fn an_access_past_the_end_is_a_bug() {
    let (_file, pmem) = volatile(4096, |_| {});
    pmem.read(4089, &mut [0; 8]).unwrap();
}

#[test]
#[should_panic(expected = "of 4096")]
fn an_access_whose_end_overflows_is_a_bug() {
    let (_file, pmem) = volatile(4096, |_| {});
    pmem.write(u64::MAX - 3, &[0; 8]).unwrap();
}

#[test]
#[should_panic(expected = "opened for reading")]
fn a_store_to_media_opened_for_reading_is_a_bug() {
    let (_file, pmem) = volatile(4096, |options| options.read_only = true);
    assert!(pmem.is_read_only());
    pmem.sync().unwrap();
    pmem.write(0, &[0; 8]).unwrap();
}

#[test]
#[should_panic(expected = "not durable on assume-dax")]
fn a_plan_that_is_not_durable_is_not_accepted_for_dax() {
    volatile(4096, |options| {
        options.assume_dax = true;
        options.store = Some(StorePlan::uniform(StoreMethod::Cached));
    });
}

#[test]
fn zeros_are_told_from_anything_else() {
    let (_file, pmem) = volatile(MIB, |_| {});
    assert_eq!(pmem.is_zero(0..MIB), Ok(true));
    assert_eq!(pmem.is_zero(5..5), Ok(true));
    for at in [0, 1, 4095, ZERO_STEP as u64 - 1, ZERO_STEP as u64, 100_001, MIB - 1] {
        pmem.write(at, &[0x80]).unwrap();
        assert_eq!(pmem.is_zero(0..MIB), Ok(false), "{at}");
        assert_eq!(pmem.is_zero(at..at + 1), Ok(false), "{at}");
        assert_eq!(pmem.is_zero(0..at), Ok(true), "{at}");
        assert_eq!(pmem.is_zero(at + 1..MIB), Ok(true), "{at}");
        pmem.write(at, &[0]).unwrap();
    }
}

#[test]
fn prefaulting_and_allocating_change_no_byte() {
    let (file, pmem) = volatile(4 * MIB, |_| {});
    pmem.write(9, b"kept").unwrap();
    pmem.allocate().unwrap();
    let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
    assert!(blocks * 512 >= 4 * MIB, "{blocks} blocks");
    drop(pmem);
    for read_only in [false, true] {
        let mut options = OpenOptions::new(format!("/proc/self/fd/{}", file.as_raw_fd()));
        (options.prefault, options.read_only) = (true, read_only);
        let pmem = MappedPmem::open(&options).unwrap();
        let mut copy = [0; 4];
        pmem.read(9, &mut copy).unwrap();
        assert_eq!(&copy, b"kept");
        assert_eq!(pmem.is_zero(13..4 * MIB), Ok(true));
    }
}

#[test]
fn a_second_opener_is_told_who_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache.img");
    create(&path, MIB).unwrap();
    let options = |read_only| OpenOptions { read_only, ..OpenOptions::new(&path) };
    let command = fs::read_to_string("/proc/self/comm").unwrap();
    let expected =
        format!("cache {} is in use by process {} ({})", path.display(), std::process::id(), command.trim());
    let refused = |read_only| {
        let error = MappedPmem::open(&options(read_only)).unwrap_err();
        assert_eq!(error.to_string(), expected);
    };

    let writer = MappedPmem::open(&options(false)).unwrap();
    refused(false);
    refused(true);
    let unlocked = OpenOptions { lock: false, ..options(true) };
    MappedPmem::open(&unlocked).unwrap();
    drop(writer);

    let readers = [true, true].map(|read_only| MappedPmem::open(&options(read_only)).unwrap());
    refused(false);
    drop(readers);
    MappedPmem::open(&options(false)).unwrap();
}

#[test]
fn the_holder_may_be_another_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache.img");
    create(&path, MIB).unwrap();
    // The lock goes with the open file description, which the child inherits as its standard input.
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    assert!(crate::pmem::lock::lock(&file, true).is_ok());
    let mut child = std::process::Command::new("sleep").arg("60").stdin(file).spawn().unwrap();
    let error = MappedPmem::open(&OpenOptions::new(&path)).unwrap_err().to_string();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(error.ends_with(&format!("in use by process {} (sleep)", child.id())), "{error}");
    MappedPmem::open(&OpenOptions::new(&path)).unwrap();
}

#[test]
fn what_is_not_media_is_refused_with_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("empty"), b"").unwrap();
    let _socket = UnixListener::bind(at("socket")).unwrap();
    let fifo = std::ffi::CString::new(at("fifo").to_str().unwrap()).unwrap();
    #[expect(unsafe_code, reason = "calls mkfifo")]
    // SAFETY: a path that ends in NUL.
    let made = unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) };
    assert_eq!(made, 0);
    let table = [
        (at("missing"), "does not exist"),
        (at("empty"), "is empty"),
        (at("socket"), "is a socket"),
        (at("fifo"), "is a pipe"),
        (dir.path().to_owned(), "is a directory"),
        (PathBuf::from("/dev/null"), "is a character device that is not devdax"),
    ];
    for (path, expected) in table {
        for read_only in [false, true] {
            let options = OpenOptions { read_only, ..OpenOptions::new(&path) };
            let error = MappedPmem::open(&options).unwrap_err().to_string();
            assert!(error.starts_with(&format!("cache {} ", path.display())), "{error}");
            assert!(error.contains(expected), "{error}");
        }
    }
}

#[test]
fn the_sentence_for_raw_pmem_names_the_two_ways_out() {
    let error = OpenError::RawPmem { path: PathBuf::from("/dev/pmem0") }.to_string();
    assert!(error.contains("/dev/pmem0") && error.contains("devdax") && error.contains("-o dax"), "{error}");
}

#[test]
fn a_failed_sync_is_final() {
    let durability = Durability::default();
    assert!(durability.sync(|| Ok(())).is_ok());
    let failing = durability.sync(|| Err(io::Error::from_raw_os_error(libc::ENOSPC)));
    assert_eq!(failing.unwrap_err().0.raw_os_error(), Some(libc::ENOSPC));
    for _ in 0..2 {
        let later = durability.sync(|| panic!("the kernel is not asked again"));
        assert_eq!(later.unwrap_err().0.raw_os_error(), Some(libc::ENOSPC));
    }
}

#[test]
fn of_syncs_that_overlap_none_succeeds_past_a_failure() {
    // The kernel tells a failure to the first that asks and success to the others.
    let durability = Arc::new(Durability::default());
    let told = Arc::new(Mutex::new(false));
    let answers: Vec<_> = (0..8)
        .map(|_| {
            let (durability, told) = (durability.clone(), told.clone());
            thread::spawn(move || {
                durability
                    .sync(|| {
                        let mut told = told.lock().unwrap();
                        if std::mem::replace(&mut *told, true) {
                            Ok(())
                        } else {
                            Err(io::Error::from_raw_os_error(libc::EIO))
                        }
                    })
                    .is_ok()
            })
        })
        .collect();
    assert!(answers.into_iter().all(|answer| !answer.join().unwrap()));
}

/// A loop device over a memfd.
struct Loop {
    path: PathBuf,
    device: File,
}

impl Loop {
    const SET_FD: libc::c_ulong = 0x4c00;
    const CLR_FD: libc::c_ulong = 0x4c01;
    const GET_FREE: libc::c_ulong = 0x4c82;

    #[expect(unsafe_code, reason = "calls ioctl")]
    fn over(file: &File) -> io::Result<Self> {
        let control = File::open("/dev/loop-control")?;
        // Somebody else may take the free device first: then it is the next one's turn.
        for _ in 0..20 {
            // SAFETY: takes no argument.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), Self::GET_FREE) };
            if number < 0 {
                return Err(io::Error::last_os_error());
            }
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = fs::OpenOptions::new().read(true).write(true).open(&path)?;
            // SAFETY: takes a descriptor.
            if unsafe { libc::ioctl(device.as_raw_fd(), Self::SET_FD, file.as_raw_fd()) } == 0 {
                return Ok(Self { path, device });
            }
        }
        Err(io::Error::last_os_error())
    }
}

impl Drop for Loop {
    #[expect(unsafe_code, reason = "calls ioctl")]
    fn drop(&mut self) {
        // SAFETY: takes no argument.
        unsafe { libc::ioctl(self.device.as_raw_fd(), Self::CLR_FD, 0) };
    }
}

#[test]
fn a_block_device_is_page_cache_and_can_be_opened_by_one() {
    let (file, _) = memfd(4 * MIB, 0).unwrap();
    let device = match Loop::over(&file) {
        Ok(device) => device,
        Err(error) => return eprintln!("SKIPPED: no loop device: {error}"),
    };
    let pmem = MappedPmem::open(&OpenOptions::new(&device.path)).unwrap();
    assert_eq!((pmem.class(), pmem.len()), (MediaClass::PageCache, 4 * MIB));
    pmem.allocate().unwrap();
    pmem.write(4000, &[5; 200]).unwrap();
    pmem.sync().unwrap();
    let mut content = [0; 200];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut content, 4000).unwrap();
    assert_eq!(content, [5; 200], "what was synced has reached the disk");
    for read_only in [false, true] {
        let options = OpenOptions { read_only, ..OpenOptions::new(&device.path) };
        let error = MappedPmem::open(&options).unwrap_err().to_string();
        assert!(error.contains(&format!("is in use by process {}", std::process::id())), "{error}");
    }
    drop(pmem);
    // Claimed by the kernel, as a mount does it.
    let claim = std::os::unix::fs::OpenOptionsExt::custom_flags(
        fs::OpenOptions::new().read(true).write(true),
        libc::O_EXCL,
    )
    .open(&device.path)
    .unwrap();
    let error = MappedPmem::open(&OpenOptions::new(&device.path)).unwrap_err();
    assert!(matches!(error, OpenError::Claimed { .. }), "{error}");
    drop(claim);
}

#[test]
#[expect(unsafe_code, reason = "calls fcntl")]
fn a_disk_that_fails_a_sync_fails_every_later_one() {
    let (file, _) = memfd(4 * MIB, libc::MFD_ALLOW_SEALING).unwrap();
    let device = match Loop::over(&file) {
        Ok(device) => device,
        Err(error) => return eprintln!("SKIPPED: no loop device: {error}"),
    };
    let pmem = MappedPmem::open(&OpenOptions::new(&device.path)).unwrap();
    pmem.write(0, &[1; 4096]).unwrap();
    pmem.sync().unwrap();
    // The disk loses its second half, for writing and for good.
    file.set_len(2 * MIB).unwrap();
    // SAFETY: takes a number.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_GROW) }, 0);
    pmem.write(3 * MIB, &[2; 4096]).unwrap();
    pmem.sync().unwrap_err();
    // This one the kernel would grant.
    pmem.write(0, &[3; 4096]).unwrap();
    let error = pmem.sync().unwrap_err();
    assert_eq!(error.0.raw_os_error(), Some(libc::EIO), "{error}");
}

#[test]
fn a_plan_names_its_methods() {
    let clflush = StoreMethod::CachedFlush(LineFlush::Clflush);
    assert_eq!(StorePlan::uniform(clflush).to_string(), "cached+clflush");
    assert_eq!(StorePlan::uniform(StoreMethod::Cached).to_string(), "cached");
}

#[test]
fn rereading_shows_the_device_and_not_what_the_page_cache_has_of_it() {
    let (file, _) = memfd(4 * MIB, 0).unwrap();
    let device = match Loop::over(&file) {
        Ok(device) => device,
        Err(error) => return eprintln!("SKIPPED: no loop device: {error}"),
    };
    let pmem = MappedPmem::open(&OpenOptions::new(&device.path)).unwrap();
    pmem.write(8192, &[5; 100]).unwrap();
    pmem.sync().unwrap();
    // Behind the page cache's back: what it shows is not what the device holds.
    std::os::unix::fs::FileExt::write_all_at(&file, &[6; 100], 8192).unwrap();
    let mut copy = [0; 100];
    pmem.read(8192, &mut copy).unwrap();
    assert_eq!(copy, [5; 100]);
    let is_on_device = |range| pmem.is_on_device(&[0..4096, range]).unwrap();
    assert!(!is_on_device(8192..12_288) && !is_on_device(4096..4 * MIB));
    assert!(is_on_device(4096..8192) && is_on_device(12_288..4 * MIB));
    pmem.reread().unwrap();
    assert!(is_on_device(4096..4 * MIB));
    pmem.read(8192, &mut copy).unwrap();
    assert_eq!(copy, [6; 100]);
}

#[test]
fn settling_changes_nothing_that_is_read() {
    for assume_dax in [false, true] {
        let (_file, pmem) = volatile(2 * MIB, |options| options.assume_dax = assume_dax);
        pmem.write(4090, &[9; 5000]).unwrap();
        for (at, len) in [(4090, 5000), (0, 1), (2 * MIB - 1, 1), (0, 2 * MIB)] {
            pmem.settle(at, len).unwrap();
        }
        let mut copy = [0; 5000];
        pmem.read(4090, &mut copy).unwrap();
        assert_eq!(copy, [9; 5000]);
    }
}

/// A file that grows and is cut off while others copy from what stays: nothing moves, what is new reads
/// as zeros, and what was there is there.
#[test]
fn a_file_grows_and_is_cut_off_under_those_who_use_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache");
    create(&path, 4 * MIB).unwrap();
    let pmem = MappedPmem::open(&OpenOptions::new(&path)).unwrap();
    pmem.write(0, &[7; 4096]).unwrap();
    pmem.write(4 * MIB - 4096, &[8; 4096]).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut copy = [0; 4096];
            while !stop.load(Ordering::Relaxed) {
                pmem.read(0, &mut copy).unwrap();
                assert_eq!(copy, [7; 4096]);
                pmem.write(MIB, &copy).unwrap();
            }
        });
        for len in [9 * MIB, 33 * MIB + 4096, 5 * MIB, 64 * MIB, 4 * MIB] {
            let before = pmem.len();
            assert_eq!(pmem.resize(len).unwrap(), len);
            assert_eq!((pmem.len(), std::fs::metadata(&path).unwrap().len()), (len, len));
            let mut copy = [1; 4096];
            pmem.read(4 * MIB - 4096, &mut copy).unwrap();
            assert_eq!(copy, [8; 4096], "what stays");
            if len > before {
                assert!(pmem.is_zero(before..len).unwrap(), "what is new");
                pmem.write(len - 4096, &[9; 4096]).unwrap();
                pmem.sync().unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    drop(pmem);
    let pmem = MappedPmem::open(&OpenOptions::new(&path)).unwrap();
    let mut copy = [0; 4096];
    pmem.read(MIB, &mut copy).unwrap();
    assert_eq!((pmem.len(), copy), (4 * MIB, [7; 4096]));
}

#[test]
fn a_file_that_finds_no_space_to_grow_keeps_its_length_and_content() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache");
    create(&path, 4 * MIB).unwrap();
    let pmem = MappedPmem::open(&OpenOptions::new(&path)).unwrap();
    pmem.write(0, &[7; 4096]).unwrap();
    let error = pmem.resize(1 << 50).unwrap_err().to_string();
    assert!(error.contains("are needed") || error.contains("File too large"), "{error}");
    assert_eq!((pmem.len(), std::fs::metadata(&path).unwrap().len()), (4 * MIB, 4 * MIB));
    let mut copy = [0; 4096];
    pmem.read(0, &mut copy).unwrap();
    assert_eq!(copy, [7; 4096]);
}
