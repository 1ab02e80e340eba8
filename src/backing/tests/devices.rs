//! Block devices, mounts, full and failing disks: what needs root and loop devices.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::*;

/// A loop device over a fresh sparse file, with its folder.
fn device(size: u64, options: &[&str]) -> Result<(Loop, tempfile::TempDir), String> {
    let dir = scratch();
    let device = Loop::attach(&image(dir.path(), size), options)?;
    Ok((device, dir))
}

/// Ends the test, loudly, where the host has no loop devices for us.
macro_rules! need {
    ($test:expr, $what:expr) => {
        match $what {
            Ok(found) => found,
            Err(why) => return skip($test, &why),
        }
    };
}

#[test]
fn a_block_device_is_opened_with_its_own_block_sizes() {
    for sector in [512, 4096] {
        let (device, _dir) = need!(
            "a_block_device_is_opened_with_its_own_block_sizes",
            device(8 << 20, &["--sector-size", &sector.to_string()])
        );
        for engine in [Engine::Auto, Engine::Threads] {
            let disk = Disk::open(&OpenOptions { engine, ..patient(&device.path) }).unwrap();
            let geometry = disk.geometry();
            assert_eq!((geometry.size, geometry.logical_block), (8 << 20, sector));
            assert!(geometry.physical_block >= sector && disk.is_direct());
            assert!(geometry.can_unmap, "loop devices on files discard");
            let identity = disk.identity();
            assert_eq!(identity.kind, BackingKind::BlockDevice);
            assert_eq!((identity.device, identity.inode), (fs::metadata(&device.path).unwrap().rdev(), 0));
            disk.still_same().unwrap();
            disk.fingerprint(0).unwrap();

            let mut channel = disk.channel(&Waker::default(), 8).unwrap();
            write(&mut channel, 0, filled(1 << 20, 0xC3)).unwrap();
            for unmap in [true, false] {
                let (offset, len) = (u64::from(sector), 8 * u64::from(sector));
                run(&mut channel, Op::Zero { offset, len, unmap }).1.unwrap();
                flush(&mut channel).unwrap();
                let found = read(&mut channel, 0, 1 << 20).unwrap();
                for (at, byte) in found.iter().enumerate() {
                    let inside = (offset..offset + len).contains(&(at as u64));
                    assert_eq!(*byte, if inside { 0 } else { 0xC3 }, "{engine:?} unmap {unmap} at {at}");
                }
                write(&mut channel, 0, filled(1 << 20, 0xC3)).unwrap();
            }
        }
    }
}

#[test]
fn a_block_size_that_no_guest_expects_is_refused() {
    let test = "a_block_size_that_no_guest_expects_is_refused";
    let (device, _dir) = need!(test, device(8 << 20, &["--sector-size", "2048"]));
    match Disk::open(&patient(&device.path)) {
        Err(error @ OpenError::BlockSize { block: 2048, .. }) => {
            assert!(error.to_string().contains("blocks of 2048 bytes"), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn sectors_smaller_than_the_file_systems_device_has_are_written_one_by_one() {
    let test = "sectors_smaller_than_the_file_systems_device_has_are_written_one_by_one";
    let (device, dir) = need!(test, device(64 << 20, &["--sector-size", "4096"]));
    need!(test, command(&["mkfs.ext4", "-q", device.text()]));
    let on = dir.path().join("mnt");
    fs::create_dir(&on).unwrap();
    let _mounted = need!(test, mount(&[], device.text(), &on));
    let path = on.join("disk.img");
    create_sparse(&path, 4 << 20).unwrap();
    for engine in [Engine::Auto, Engine::Threads] {
        let disk = Disk::open(&OpenOptions { engine, ..patient(&path) }).unwrap();
        assert_eq!(disk.core().file.align(), 4096, "this is a disk with blocks of 4096 bytes");
        assert_eq!(disk.geometry().logical_block, 512);
        let mut channel = disk.channel(&Waker::default(), 64).unwrap();
        for sector in 0..64u8 {
            let op = Op::Write { offset: u64::from(sector) * 512, buf: filled(512, sector) };
            channel.submit(u64::from(sector), op).unwrap();
        }
        let mut done = Vec::new();
        while channel.in_flight() > 0 {
            channel.wait(PATIENCE);
            channel.reap(&mut done);
        }
        assert!(done.iter().all(|c| c.result.is_ok()));
        flush(&mut channel).unwrap();
        let found = read(&mut channel, 512, 63 * 512).unwrap();
        assert!((1..64).all(|s: usize| found[(s - 1) * 512..][..512].iter().all(|b| *b == s as u8)));
    }
    // Its last sector stands alone in a block: only the page cache can write that.
    let odd = on.join("odd.img");
    create_sparse(&odd, (1 << 20) + 512).unwrap();
    let disk = Disk::open(&patient(&odd)).unwrap();
    assert!(!disk.is_direct());
    let mut channel = disk.channel(&Waker::default(), 4).unwrap();
    write(&mut channel, 1 << 20, filled(512, 8)).unwrap();
    flush(&mut channel).unwrap();
    assert_eq!(fs::metadata(&odd).unwrap().len(), (1 << 20) + 512);
}

/// The reason why `path` is in use.
fn in_use(path: &Path) -> String {
    match Disk::open(&patient(path)) {
        Err(OpenError::InUse { by, .. }) => by,
        other => panic!("{} is in use, but: {other:?}", path.display()),
    }
}

#[test]
fn a_mounted_disk_is_refused_and_so_is_the_file_below_it() {
    let test = "a_mounted_disk_is_refused_and_so_is_the_file_below_it";
    let (device, dir) = need!(test, device(64 << 20, &[]));
    let file = dir.path().join("disk.img");
    need!(test, command(&["mkfs.ext4", "-q", device.text()]));
    let on = dir.path().join("a mount point");
    fs::create_dir(&on).unwrap();
    let mounted = need!(test, mount(&[], device.text(), &on));
    let expected = format!("{} is mounted on {}", device.text(), on.display());
    assert_eq!(in_use(&device.path), expected);
    assert!(in_use(&file).ends_with(&expected));
    let read_only = OpenOptions { read_only: true, ..patient(&device.path) };
    assert!(matches!(Disk::open(&read_only), Err(OpenError::InUse { .. })));
    drop(mounted);
    Disk::open(&patient(&device.path)).unwrap();
    Disk::open(&patient(&file)).unwrap();
}

#[test]
fn a_disk_with_a_mounted_partition_is_refused() {
    let test = "a_disk_with_a_mounted_partition_is_refused";
    let dir = scratch();
    let path = image(dir.path(), 64 << 20);
    let device = need!(test, Loop::attach(&path, &[]));
    // Told to the kernel directly: it need not know any kind of partition table.
    need!(test, command(&["addpart", device.text(), "1", "2048", "129024"]));
    let _partition = Undo::new(&["delpart", device.text(), "1"]);
    let partition = format!("{}p1", device.text());
    until("the partition's node", || Path::new(&partition).exists().then_some(()));
    need!(test, command(&["mkfs.ext4", "-q", &partition]));
    let on = dir.path().join("mnt");
    fs::create_dir(&on).unwrap();
    let mounted = need!(test, mount(&[], &partition, &on));
    let by = in_use(&device.path);
    assert!(by.starts_with(&partition) && by.contains("is mounted on"), "{by}");
    assert!(in_use(Path::new(&partition)).contains("is mounted on"));
    assert!(in_use(&path).contains("is mounted on"), "the file below the disk of the partition");
    drop(mounted);
    let whole = Disk::open(&patient(&device.path)).unwrap();
    // The kernel knows that a partition and its disk are one.
    match Disk::open(&OpenOptions::new(&partition)) {
        Err(OpenError::InUse { by, .. }) => assert!(by.contains("busy"), "{by}"),
        other => panic!("a partition opened beside its disk: {other:?}"),
    }
    drop(whole);
    let disk = Disk::open(&patient(&partition)).unwrap();
    assert_eq!(disk.geometry().size, 63 << 20);
    assert!(disk.geometry().can_unmap, "a partition unmaps as its disk does");
}

#[test]
fn swap_space_is_refused() {
    let test = "swap_space_is_refused";
    let (device, dir) = need!(test, device(16 << 20, &[]));
    need!(test, command(&["mkswap", device.text()]));
    need!(test, command(&["swapon", device.text()]));
    let off = Undo::new(&["swapoff", device.text()]);
    assert_eq!(in_use(&device.path), format!("{} is swap space", device.text()));
    assert!(in_use(&dir.path().join("disk.img")).contains("is swap space"));
    drop(off);
    Disk::open(&patient(&device.path)).unwrap();
    let file = dir.path().join("swap file");
    fs::write(&file, vec![0; 16 << 20]).unwrap();
    fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let text = file.to_str().unwrap();
    need!(test, command(&["mkswap", text]));
    need!(test, command(&["swapon", text]));
    let _off = Undo::new(&["swapoff", text]);
    assert_eq!(in_use(&file), "it is swap space");
}

#[test]
fn a_device_below_a_mapped_one_is_refused() {
    let test = "a_device_below_a_mapped_one_is_refused";
    let (device, _dir) = need!(test, device(16 << 20, &[]));
    let name = format!("pcache-test-{}", std::process::id());
    let table = format!("0 8192 linear {} 0", device.text());
    need!(test, command(&["dmsetup", "create", &name, "--table", &table]));
    let _remove = Undo::new(&["dmsetup", "remove", &name]);
    let by = in_use(&device.path);
    assert!(by.contains(&name) && by.contains("is built on it"), "{by}");
}

#[test]
fn a_device_opened_exclusively_by_another_is_refused() {
    let test = "a_device_opened_exclusively_by_another_is_refused";
    let (device, _dir) = need!(test, device(16 << 20, &[]));
    let _no_forks = no_forks();
    let unlocked = OpenOptions { lock: false, ..OpenOptions::new(&device.path) };
    let first = Disk::open(&unlocked).unwrap();
    match Disk::open(&unlocked) {
        Err(OpenError::InUse { by, .. }) => assert!(by.contains("busy"), "{by}"),
        other => panic!("opened twice: {other:?}"),
    }
    drop(first);
    let first = Disk::open(&patient(&device.path)).unwrap();
    match Disk::open(&OpenOptions::new(&device.path)) {
        Err(OpenError::Locked { holder, .. }) => assert!(holder.contains("this process"), "{holder}"),
        other => panic!("opened twice: {other:?}"),
    }
    let waiting = patient(&device.path);
    let waiter = std::thread::spawn(move || Disk::open(&waiting).map(|_| ()));
    let brief = OpenOptions { wait_lock: Some(Duration::from_millis(120)), ..patient(&device.path) };
    assert!(matches!(Disk::open(&brief), Err(OpenError::Locked { .. })));
    assert!(!waiter.is_finished());
    drop(first);
    waiter.join().unwrap().unwrap();
}

#[test]
fn a_write_protected_disk_opens_only_for_reading() {
    let test = "a_write_protected_disk_opens_only_for_reading";
    let (device, dir) = need!(test, device(16 << 20, &["--read-only"]));
    let check = |path: &Path| {
        match Disk::open(&patient(path)) {
            Err(OpenError::WriteProtected { .. }) => {}
            other => panic!("{}: {other:?}", path.display()),
        }
        let disk = Disk::open(&OpenOptions { read_only: true, ..patient(path) }).unwrap();
        assert!(disk.geometry().read_only);
    };
    check(&device.path);
    let on = dir.path().join("mnt");
    fs::create_dir(&on).unwrap();
    let _mounted = need!(test, mount(&["-t", "tmpfs"], "tmpfs", &on));
    let path = image(&on, 1 << 20);
    command(&["mount", "-o", "remount,ro", on.to_str().unwrap()]).unwrap();
    check(&path);
}

/// A tmpfs with room for `size` bytes.
fn small_tmpfs(size: u64) -> Result<(Undo, tempfile::TempDir), String> {
    let dir = scratch();
    let mounted = mount(&["-t", "tmpfs", "-o", &format!("size={size}")], "tmpfs", dir.path())?;
    Ok((mounted, dir))
}

#[test]
fn a_full_file_system_is_an_error_of_the_write_and_goes_away_with_its_cause() {
    let test = "a_full_file_system_is_an_error_of_the_write_and_goes_away_with_its_cause";
    for engine in [Engine::Auto, Engine::Threads] {
        let (_mounted, dir) = need!(test, small_tmpfs(2 << 20));
        let path = image(dir.path(), 8 << 20);
        let disk = Disk::open(&OpenOptions { engine, ..patient(&path) }).unwrap();
        let mut channel = disk.channel(&Waker::default(), 4).unwrap();
        let e = write(&mut channel, 0, filled(4 << 20, 1)).unwrap_err();
        assert_eq!(e.kind(), std::io::ErrorKind::StorageFull, "{engine:?}: {e}");
        run(&mut channel, Op::Zero { offset: 0, len: 4 << 20, unmap: true }).1.unwrap();
        write(&mut channel, 1 << 20, filled(1 << 20, 1)).unwrap();
    }
}

#[test]
fn a_failing_device_is_an_error_of_the_operation() {
    let test = "a_failing_device_is_an_error_of_the_operation";
    for engine in [Engine::Auto, Engine::Threads] {
        let (_mounted, dir) = need!(test, small_tmpfs(2 << 20));
        let device = need!(test, Loop::attach(&image(dir.path(), 16 << 20), &[]));
        let disk = Disk::open(&OpenOptions { engine, ..patient(&device.path) }).unwrap();
        let mut channel = disk.channel(&Waker::default(), 4).unwrap();
        write(&mut channel, 0, filled(1 << 20, 1)).unwrap();
        let e = write(&mut channel, 8 << 20, filled(4 << 20, 1)).unwrap_err();
        let code = e.raw_os_error();
        assert!(matches!(code, Some(libc::EIO | libc::ENOSPC)), "{engine:?}: {e}");
        assert!(read(&mut channel, 0, 1 << 20).unwrap().iter().all(|b| *b == 1), "the rest still works");
    }
}

#[test]
fn no_channel_takes_another_ones_failed_flush_for_its_own_success() {
    let test = "no_channel_takes_another_ones_failed_flush_for_its_own_success";
    for engine in [Engine::Auto, Engine::Threads] {
        let (_mounted, dir) = need!(test, small_tmpfs(2 << 20));
        let device = need!(test, Loop::attach(&image(dir.path(), 16 << 20), &[]));
        let options = OpenOptions { engine, direct: Direct::Off, ..patient(&device.path) };
        let disk = Disk::open(&options).unwrap();
        let channel = || disk.channel(&Waker::default(), 4).unwrap();
        let (mut first, mut second) = (channel(), channel());
        // The page cache takes it; the device has no room for it.
        write(&mut second, 8 << 20, filled(4 << 20, 1)).unwrap();
        flush(&mut first).expect_err("the kernel reports the failure to the first who asks");
        flush(&mut second).expect_err("its own write was lost");
        // Submitted when its channel knew of the failure, so it is about what came later.
        flush(&mut second).unwrap();
        flush(&mut first).unwrap();
        flush(&mut channel()).unwrap();
    }
}

#[test]
fn two_flushes_of_one_channel_share_the_failure() {
    let test = "two_flushes_of_one_channel_share_the_failure";
    let (_mounted, dir) = need!(test, small_tmpfs(2 << 20));
    let device = need!(test, Loop::attach(&image(dir.path(), 16 << 20), &[]));
    let options = OpenOptions { direct: Direct::Off, ..patient(&device.path) };
    let disk = Disk::open(&options).unwrap();
    let mut channel = disk.channel(&Waker::default(), 4).unwrap();
    write(&mut channel, 8 << 20, filled(4 << 20, 1)).unwrap();
    for token in 0..4 {
        channel.submit(token, Op::Flush).unwrap();
    }
    let mut done = Vec::new();
    while done.len() < 4 {
        channel.wait(PATIENCE);
        // Reaped together, so that no later one was submitted knowing of the failure.
        if channel.in_flight() == 4 {
            channel.reap(&mut done);
        }
        channel.reap(&mut done);
    }
    assert!(done.iter().all(|c| c.result.is_err()), "{done:?}");
    flush(&mut channel).unwrap();
}

#[test]
fn a_host_that_forbids_io_uring_gets_helper_threads() {
    let dir = scratch();
    let disk = Disk::open(&patient(image(dir.path(), 1 << 20))).unwrap();
    for errno in [libc::EPERM, libc::ENOSYS] {
        let disk = &disk;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                forbid_io_uring(errno);
                let mut channel = disk.channel(&Waker::default(), 4).unwrap();
                assert!(!channel.has_ring());
                write(&mut channel, 512, filled(4096, 6)).unwrap();
                flush(&mut channel).unwrap();
                assert!(read(&mut channel, 512, 4096).unwrap().iter().all(|b| *b == 6));
            });
        });
    }
    assert!(disk.channel(&Waker::default(), 4).unwrap().has_ring(), "only those threads were forbidden to");
}

/// Makes io_uring_setup fail with `errno` in this thread, as container runtimes do.
#[expect(unsafe_code, reason = "std has no seccomp")]
fn forbid_io_uring(errno: i32) {
    let filter = |code: u32, jt, jf, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let refuse = libc::SECCOMP_RET_ERRNO | errno as u32;
    let mut program = [
        // The system call's number is the first word of what a filter looks at.
        filter(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        filter(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_io_uring_setup as u32),
        filter(libc::BPF_RET | libc::BPF_K, 0, 0, refuse),
        filter(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: both calls change this thread only; `program` and its instructions are alive and the
    // kernel copies them.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program), 0);
    }
}
