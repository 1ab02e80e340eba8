//! What a channel promises, for every engine and alignment.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;

/// Ways to do I/O that must behave alike.
#[derive(Clone, Copy, Debug)]
struct Way {
    engine: Engine,
    direct: Direct,
    /// Pretended alignment of direct I/O.
    align: Option<u32>,
    folder: &'static str,
}

const DISK_FOLDER: &str = "/tmp";
const RAM_FOLDER: &str = "/dev/shm";

fn ways() -> Vec<Way> {
    let mut ways = Vec::new();
    for engine in [Engine::Auto, Engine::Threads] {
        for (direct, align, folder) in [
            (Direct::Auto, None, DISK_FOLDER),
            (Direct::Auto, Some(4096), DISK_FOLDER),
            (Direct::Off, None, DISK_FOLDER),
            (Direct::Auto, None, RAM_FOLDER),
        ] {
            ways.push(Way { engine, direct, align, folder });
        }
    }
    ways
}

/// Runs `test` on a fresh sparse disk of `size` bytes per way.
fn each_way(size: u64, test: impl Fn(Way, Disk, &Path)) {
    for way in ways() {
        let dir = tempfile::tempdir_in(way.folder).unwrap();
        let path = image(dir.path(), size);
        let mut disk =
            Disk::open(&OpenOptions { direct: way.direct, engine: way.engine, ..patient(&path) }).unwrap();
        if let Some(align) = way.align {
            disk = disk.with_align(align);
        }
        test(way, disk, &path);
    }
}

fn open_channel(way: Way, disk: &Disk, depth: u32) -> DiskChannel {
    let channel = disk.channel(&Waker::default(), depth).unwrap();
    assert_eq!(channel.has_ring(), way.engine == Engine::Auto, "this host should permit io_uring");
    channel
}

#[derive(Debug)]
struct Expected {
    start: u64,
    end: u64,
    writes: bool,
    /// What a read must find.
    data: Vec<u8>,
}

#[test]
fn concurrent_operations_agree_with_a_plain_array() {
    const SIZE: u64 = 6 << 20;
    const SECTORS: u64 = SIZE / 512;
    let seed =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    each_way(SIZE, |way, disk, path| {
        let context = format!("seed {seed:#x}, {way:?}");
        let mut rng = Rng(seed);
        let mut model = vec![0u8; SIZE as usize];
        let mut channels = [open_channel(way, &disk, 16), open_channel(way, &disk, 5)];
        let mut pending: Vec<Option<Expected>> = Vec::new();
        let mut done = Vec::new();
        for step in 0..1500 {
            // Mostly fine and close together, so that operations share blocks; sometimes large.
            let len = match rng.below(20) {
                0 => 1 + rng.below(3000),
                1..=4 => 8 * (1 + rng.below(16)),
                _ => 1 + rng.below(12),
            };
            let start = match rng.below(3) {
                0 => rng.below(64),
                1 => rng.below(SECTORS / 8) * 8,
                _ => rng.below(SECTORS),
            };
            let (start, end) = (start * 512, (start + len).min(SECTORS) * 512);
            let kind = rng.below(10);
            let writes = kind < 6;
            let clashes = |e: &Expected| e.start < end && start < e.end && (e.writes || writes);
            let range = start as usize..end as usize;
            let channel = &mut channels[rng.below(2) as usize];
            if !pending.iter().flatten().any(clashes) {
                let buf_len = (end - start) as usize;
                let (op, data) = match kind {
                    0..=3 => {
                        let mut buf = AlignedBuf::new(buf_len);
                        rng.fill(&mut buf);
                        (Op::Write { offset: start, buf }, Vec::new())
                    }
                    4 | 5 => (Op::Zero { offset: start, len: end - start, unmap: kind == 4 }, Vec::new()),
                    6 => (Op::Flush, Vec::new()),
                    _ => (
                        Op::Read { offset: start, buf: filled(buf_len, 0xEE) },
                        model[range.clone()].to_vec(),
                    ),
                };
                let written = match &op {
                    Op::Write { buf, .. } => Some(buf.to_vec()),
                    Op::Zero { .. } => Some(vec![0; buf_len]),
                    _ => None,
                };
                let flushes = matches!(op, Op::Flush);
                if channel.submit(pending.len() as u64, op).is_ok() {
                    if let Some(bytes) = written {
                        model[range].copy_from_slice(&bytes);
                    }
                    let (start, end) = if flushes { (0, 0) } else { (start, end) };
                    pending.push(Some(Expected { start, end, writes, data }));
                }
            }
            let channel = &mut channels[rng.below(2) as usize];
            match rng.below(4) {
                0 => channel.kick(),
                1 => channel.wait(PATIENCE),
                _ => {}
            }
            channel.reap(&mut done);
            check(&mut done, &mut pending, &format!("{context}, step {step}"));
        }
        for channel in &mut channels {
            while channel.in_flight() > 0 {
                channel.wait(PATIENCE);
                channel.reap(&mut done);
            }
        }
        check(&mut done, &mut pending, &context);
        assert!(pending.iter().all(Option::is_none), "{context}: an operation never completed");
        flush(&mut channels[0]).unwrap();
        drop((channels, disk));
        let found = fs::read(path).unwrap();
        let differs = (0..model.len()).find(|at| found[*at] != model[*at]);
        assert_eq!(differs, None, "{context}: first byte that differs");
        assert_eq!(found.len(), model.len(), "{context}: the file changed its size");
    });
}

fn check(done: &mut Vec<Completion>, pending: &mut [Option<Expected>], context: &str) {
    for completion in done.drain(..) {
        let expected = pending[completion.token as usize].take();
        let expected = expected.unwrap_or_else(|| panic!("{context}: {} completed twice", completion.token));
        completion.result.unwrap_or_else(|e| panic!("{context}: {expected:?}: {e}"));
        if let Op::Read { buf, offset } = completion.op {
            assert!(buf[..] == expected.data[..], "{context}: a read at {offset} found something else");
        }
    }
}

#[test]
fn writers_of_neighbouring_sectors_in_one_block_do_not_undo_each_other() {
    each_way(1 << 20, |way, disk, path| {
        std::thread::scope(|scope| {
            for sector in 0..8u64 {
                let mut channel = open_channel(way, &disk, 2);
                scope.spawn(move || {
                    for round in 0..40u8 {
                        write(&mut channel, sector * 512, filled(512, round ^ sector as u8)).unwrap();
                        let found = read(&mut channel, sector * 512, 512).unwrap();
                        assert!(found.iter().all(|b| *b == round ^ sector as u8), "{way:?} round {round}");
                    }
                });
            }
        });
        let found = fs::read(path).unwrap();
        for sector in 0..8 {
            assert!(found[sector * 512..][..512].iter().all(|b| *b == 39 ^ sector as u8), "{way:?}");
        }
    });
}

#[test]
fn zeroed_ranges_read_as_zeros_and_unmapping_gives_space_back() {
    each_way(4 << 20, |way, disk, path| {
        let mut channel = open_channel(way, &disk, 4);
        for (unmap, offset, len) in [
            (true, 1 << 20, 1 << 20),
            (false, 1 << 20, 1 << 20),
            (true, 512, 1024),
            (false, 3 * 512, 3 << 20),
        ] {
            write(&mut channel, 0, filled(4 << 20, 0xAB)).unwrap();
            flush(&mut channel).unwrap();
            let before = fs::metadata(path).unwrap().blocks() * 512;
            assert!(before >= 4 << 20, "{way:?}: the disk is wholly allocated");
            let (_, result) = run(&mut channel, Op::Zero { offset, len, unmap });
            result.unwrap();
            flush(&mut channel).unwrap();
            let found = read(&mut channel, 0, 4 << 20).unwrap();
            for (at, byte) in found.iter().enumerate() {
                let inside = (offset..offset + len).contains(&(at as u64));
                assert_eq!(*byte, if inside { 0 } else { 0xAB }, "{way:?} {offset}+{len} at {at}");
            }
            let after = fs::metadata(path).unwrap().blocks() * 512;
            if unmap && len > 4096 {
                assert!(before - after >= len, "{way:?}: {} bytes given back of {len}", before - after);
            } else if !unmap {
                assert!(after >= 4 << 20, "{way:?}: {after} bytes left allocated");
            }
        }
    });
}

#[test]
fn a_disk_without_fallocate_is_zeroed_by_writing() {
    each_way(4 << 20, |way, disk, path| {
        for mode in [true, false].map(|unmap| disk.core().file.fallocate_mode(unmap)).into_iter().flatten() {
            disk.core().file.refuse(mode);
        }
        for unmap in [true, false] {
            if let Some(mode) = disk.core().file.fallocate_mode(unmap) {
                disk.core().file.refuse(mode);
            }
            assert_eq!(disk.core().file.fallocate_mode(unmap), None);
        }
        let mut channel = open_channel(way, &disk, 4);
        write(&mut channel, 0, filled(4 << 20, 0xAB)).unwrap();
        let (offset, len) = (512, (3 << 20) + 512);
        run(&mut channel, Op::Zero { offset, len, unmap: true }).1.unwrap();
        let found = fs::read(path).unwrap();
        let wrong = (0..found.len()).find(|at| {
            let inside = (offset..offset + len).contains(&(*at as u64));
            found[*at] != if inside { 0 } else { 0xAB }
        });
        assert_eq!(wrong, None, "{way:?}");
    });
}

#[test]
fn tmpfs_cannot_zero_a_range_in_place_and_the_fallback_is_remembered() {
    let dir = tempfile::tempdir_in(RAM_FOLDER).unwrap();
    let disk = Disk::open(&patient(image(dir.path(), 1 << 20))).unwrap();
    let mut channel = disk.channel(&Waker::default(), 4).unwrap();
    assert!(disk.core().file.fallocate_mode(false).is_some());
    write(&mut channel, 0, filled(1 << 20, 1)).unwrap();
    run(&mut channel, Op::Zero { offset: 0, len: 1 << 20, unmap: false }).1.unwrap();
    assert!(read(&mut channel, 0, 1 << 20).unwrap().iter().all(|b| *b == 0));
    assert_eq!(disk.core().file.fallocate_mode(false), None);
    assert!(disk.core().file.fallocate_mode(true).is_some(), "holes can still be punched");
}

#[test]
fn a_full_channel_gives_the_operation_back_unchanged() {
    each_way(1 << 20, |way, disk, _| {
        let mut channel = open_channel(way, &disk, 3);
        for token in 0..3 {
            channel.submit(token, Op::Write { offset: token * 4096, buf: filled(4096, 1) }).unwrap();
        }
        let op = channel.submit(3, Op::Write { offset: 512, buf: filled(1024, 9) }).unwrap_err();
        assert!(matches!(&op, Op::Write { offset: 512, buf } if buf[..] == [9; 1024]), "{op:?}");
        assert_eq!(channel.in_flight(), 3);
        let mut done = Vec::new();
        while done.is_empty() {
            channel.wait(PATIENCE);
            channel.reap(&mut done);
        }
        channel.submit(3, op).unwrap();
    });
}

#[test]
fn dropping_a_channel_waits_for_everything_it_accepted() {
    each_way(16 << 20, |way, disk, path| {
        let mut channel = open_channel(way, &disk, 16);
        for token in 0..16 {
            channel.submit(token, Op::Write { offset: token << 20, buf: filled(1 << 20, 7) }).unwrap();
        }
        let _no_forks = no_forks();
        drop(channel);
        let found = fs::read(path).unwrap();
        assert!(found.iter().all(|b| *b == 7), "{way:?}");
        drop(disk);
        // The locks went with the last of both.
        Disk::open(&OpenOptions::new(path)).unwrap_or_else(|e| panic!("{way:?}: {e}"));
    });
}

#[test]
fn completions_signal_the_waker() {
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
    each_way(1 << 20, |way, disk, _| {
        let waker = Waker::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let mut channel = disk.channel(&waker, 4).unwrap();
        let ops = [
            Op::Write { offset: 512, buf: filled(512, 1) },
            Op::Write { offset: 8192, buf: filled(8192, 1) },
            Op::Zero { offset: 4096, len: 4096, unmap: true },
            Op::Flush,
            Op::Read { offset: 0, buf: filled(4096, 2) },
        ];
        for op in ops {
            let what = format!("{way:?} {op:?}");
            channel.submit(1, op).unwrap();
            channel.kick();
            let mut done = Vec::new();
            // Never `wait`: a queue thread sleeps on the waker alone.
            while done.is_empty() {
                until(&what, || waker.event().unwrap().read().ok());
                channel.reap(&mut done);
            }
            done[0].result.as_ref().unwrap_or_else(|e| panic!("{what}: {e}"));
        }
    });
}

#[test]
fn waiting_with_nothing_in_flight_returns_at_once_and_a_timeout_ends_a_wait() {
    each_way(1 << 20, |way, disk, _| {
        let mut channel = open_channel(way, &disk, 4);
        let start = Instant::now();
        channel.wait(PATIENCE);
        channel.wait(Duration::ZERO);
        assert!(start.elapsed() < PATIENCE / 2, "{way:?}");
        assert_eq!(channel.in_flight(), 0);
    });
}

#[test]
fn a_disk_truncated_behind_our_back_gives_errors_and_is_noticed() {
    each_way(8 << 20, |way, disk, path| {
        let mut channel = open_channel(way, &disk, 4);
        write(&mut channel, 0, filled(8 << 20, 5)).unwrap();
        flush(&mut channel).unwrap();
        disk.still_same().unwrap();
        fs::OpenOptions::new().write(true).open(path).unwrap().set_len((4 << 20) + 512).unwrap();
        let unexpected_end = |result: std::io::Result<AlignedBuf>| match result {
            Ok(_) => panic!("{way:?}: read what is not there"),
            Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::UnexpectedEof, "{way:?}: {e}"),
        };
        unexpected_end(read(&mut channel, 6 << 20, 4096));
        unexpected_end(read(&mut channel, 4 << 20, 4096));
        unexpected_end(read(&mut channel, 3 << 20, 2 << 20));
        unexpected_end(read(&mut channel, (4 << 20) + 512, 512));
        assert!(read(&mut channel, 0, 4 << 20).unwrap().iter().all(|b| *b == 5));
        let changed = disk.still_same().unwrap_err();
        assert!(
            matches!(changed, DiskChanged::Shrunk { opened: 8388608, now: 4194816, .. }),
            "{way:?}: {changed}"
        );
    });
}

#[test]
fn a_replaced_or_removed_disk_is_noticed_and_a_grown_one_is_the_same() {
    let dir = scratch();
    let path = image(dir.path(), 1 << 20);
    let disk = Disk::open(&patient(&path)).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(2 << 20).unwrap();
    disk.still_same().unwrap();
    fs::rename(&path, dir.path().join("moved")).unwrap();
    assert!(matches!(disk.still_same(), Err(DiskChanged::Removed { .. })));
    create_sparse(&path, 1 << 20).unwrap();
    assert!(matches!(disk.still_same(), Err(DiskChanged::Replaced { .. })));
}

#[test]
fn a_disk_grows_under_open_channels_and_only_to_what_it_is() {
    for engine in [Engine::Auto, Engine::Threads] {
        let dir = scratch();
        let path = image(dir.path(), 1 << 20);
        let disk = Disk::open(&OpenOptions { engine, ..patient(&path) }).unwrap();
        let mut channel = disk.channel(&Waker::default(), 4).unwrap();
        assert!(disk.grow((2 << 20) + 100).is_err(), "not a number of blocks");
        assert_eq!((disk.measure().unwrap(), disk.geometry().size), (1 << 20, 1 << 20));
        disk.grow(2 << 20).unwrap();
        assert_eq!((disk.geometry().size, disk.identity().size), (2 << 20, 2 << 20));
        assert_eq!(fs::metadata(&path).unwrap().len(), 2 << 20);
        run(&mut channel, Op::Write { offset: (2 << 20) - 4096, buf: filled(4096, 7) }).1.unwrap();
        assert!(read(&mut channel, 1 << 20, 4096).unwrap().iter().all(|byte| *byte == 0));
        // Somebody else has made it longer: that is its size now, and no other.
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4 << 20).unwrap();
        assert_eq!((disk.measure().unwrap(), disk.geometry().size), (4 << 20, 2 << 20));
        assert!(disk.grow(3 << 20).is_err());
        disk.grow(4 << 20).unwrap();
        assert!(read(&mut channel, (4 << 20) - 4096, 4096).unwrap().iter().all(|byte| *byte == 0));
        assert_eq!(read(&mut channel, (2 << 20) - 4096, 4096).unwrap()[..], [7; 4096]);
        disk.still_same().unwrap();
    }
}

#[test]
fn a_read_only_disk_reads_and_refuses_the_rest() {
    for engine in [Engine::Auto, Engine::Threads] {
        let dir = scratch();
        let path = image(dir.path(), 1 << 20);
        fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&[3; 4096], 0).unwrap();
        let disk = Disk::open(&OpenOptions { read_only: true, engine, ..patient(&path) }).unwrap();
        let geometry = disk.geometry();
        assert!(geometry.read_only && !geometry.can_unmap);
        let mut channel = disk.channel(&Waker::default(), 4).unwrap();
        assert!(read(&mut channel, 0, 4096).unwrap().iter().all(|b| *b == 3));
        for op in [
            Op::Write { offset: 0, buf: filled(512, 1) },
            Op::Zero { offset: 0, len: 512, unmap: true },
            Op::Zero { offset: 0, len: 512, unmap: false },
        ] {
            let e = run(&mut channel, op).1.unwrap_err();
            assert_eq!(e.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        }
        flush(&mut channel).unwrap();
        assert_eq!(fs::read(&path).unwrap()[..4096], [3; 4096]);
    }
}

#[test]
fn operations_outside_the_disk_or_between_sectors_are_the_callers_bug() {
    let dir = scratch();
    let disk = Disk::open(&patient(image(dir.path(), 1 << 20))).unwrap();
    for (offset, len) in
        [(1 << 20, 512), ((1 << 20) - 512, 1024), (100, 512), (0, 100), (0, 0), (u64::MAX - 511, 512)]
    {
        let attempt = std::panic::AssertUnwindSafe(|| {
            let mut channel = disk.channel(&Waker::default(), 1).unwrap();
            drop(channel.submit(0, Op::Zero { offset, len, unmap: true }));
        });
        assert!(std::panic::catch_unwind(attempt).is_err(), "{offset}+{len} was accepted");
    }
}

#[test]
fn a_channel_needs_a_sensible_depth() {
    let dir = scratch();
    let disk = Disk::open(&patient(image(dir.path(), 1 << 20))).unwrap();
    for (depth, fine) in [(0, false), (1, true), (4096, true), (4097, false), (u32::MAX, false)] {
        assert_eq!(disk.channel(&Waker::default(), depth).is_ok(), fine, "{depth}");
    }
}

#[test]
fn operations_survive_the_thread_that_submitted_them() {
    each_way(4 << 20, |way, disk, path| {
        let mut channel = open_channel(way, &disk, 4);
        let mut channel = std::thread::spawn(move || {
            for token in 0..4 {
                let buf = filled(1 << 20, token as u8 + 1);
                channel.submit(token, Op::Write { offset: token << 20, buf }).unwrap();
            }
            channel.kick();
            channel
        })
        .join()
        .unwrap();
        let mut done = Vec::new();
        while channel.in_flight() > 0 {
            channel.wait(PATIENCE);
            channel.reap(&mut done);
        }
        for completion in done {
            completion.result.unwrap_or_else(|e| panic!("{way:?}: {e}"));
        }
        let found = fs::read(path).unwrap();
        assert!((0..4).all(|i| found[i << 20..][..1 << 20].iter().all(|b| *b == i as u8 + 1)), "{way:?}");
    });
}

#[test]
fn a_fingerprint_sees_its_samples_and_does_not_depend_on_the_way() {
    let mut rng = Rng(0x5EED);
    let mut content = vec![0; (3 << 20) + 512];
    rng.fill(&mut content);
    let mut seen = Vec::new();
    for engine in [Engine::Auto, Engine::Threads] {
        for direct in [Direct::Auto, Direct::Off] {
            let dir = scratch();
            let path = dir.path().join("disk.img");
            fs::write(&path, &content).unwrap();
            let options = OpenOptions { engine, direct, ..patient(&path) };
            seen.push(Disk::open(&options).unwrap().fingerprint(0).unwrap());
        }
    }
    // The value is kept in caches: it may never change between versions.
    assert_eq!(seen, [GOLDEN; 4]);

    let dir = scratch();
    let path = dir.path().join("disk.img");
    let fingerprint = |content: &[u8]| {
        fs::write(&path, content).unwrap();
        Disk::open(&patient(&path)).unwrap().fingerprint(0).unwrap()
    };
    let middle_sample = (content.len() as u64 * 15 / 31) as usize / 4096 * 4096;
    for (at, changes) in [
        (0, true),
        (65535, true),
        (content.len() - 1, true),
        (content.len() - 65536, true),
        (middle_sample, true),
        (middle_sample + 4095, true),
        (middle_sample + 4096, false),
        (65536, false),
    ] {
        content[at] ^= 1;
        assert_eq!(fingerprint(&content) != GOLDEN, changes, "byte {at}");
        content[at] ^= 1;
    }
    let sizes = [512, 1024, 4096, 65536, 65536 + 512, 131_072, 1 << 20];
    let mut all: Vec<_> = sizes.iter().map(|size| fingerprint(&vec![0; *size])).collect();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), sizes.len(), "disks of zeros differ by their size");
}

/// The fingerprint of the content above.
const GOLDEN: u64 = 15_564_000_126_616_734_326;
