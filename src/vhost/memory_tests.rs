use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use super::*;
use crate::vhost::testing::{USER, for_seeds, guest, memory_file, with_region};

fn spec(guest: u64, len: u64) -> RegionSpec {
    RegionSpec { guest, user: guest + USER, len, offset: 0 }
}

fn fd(len: u64) -> OwnedFd {
    memory_file(len).into()
}

#[test]
fn a_region_longer_than_its_file_is_refused() {
    let empty = MemoryMap::default();
    let error = empty.with(spec(0, 8192), fd(4096), u64::MAX).unwrap_err();
    assert!(matches!(error, MemoryError::FileTooShort { file: 4096, needed: 8192 }), "{error}");
    let beyond = RegionSpec { offset: 4096, ..spec(0, 4096) };
    assert!(matches!(empty.with(beyond, fd(4096), u64::MAX), Err(MemoryError::FileTooShort { .. })));
    let wraps = RegionSpec { offset: u64::MAX, ..spec(0, 4096) };
    assert!(empty.with(wraps, fd(4096), u64::MAX).is_err());
}

#[test]
fn what_is_neither_file_nor_device_is_refused() {
    let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    let error = MemoryMap::default().with(spec(0, 4096), socket.into(), u64::MAX).unwrap_err();
    assert!(matches!(error, MemoryError::NotMappable), "{error}");
}

#[test]
fn regions_must_not_overlap_wrap_or_be_empty() {
    let map = with_region(&with_region(&MemoryMap::default(), 0x10000, 0x1000), 0x20000, 0x1000);
    for (start, len, allowed) in [
        (0x0f000, 0x1000, true),
        (0x0f000, 0x1001, false),
        (0x11000, 0xf000, true),
        (0x11000, 0xf001, false),
        (0x10000, 0x1000, false),
        (0x10800, 0x10, false),
        (0x20fff, 0x10, false),
        (0x30000, 0, false),
    ] {
        let result = map.with(spec(start, len), fd(0x20000), u64::MAX);
        assert_eq!(result.is_ok(), allowed, "{start:#x}+{len:#x}: {result:?}");
    }
    let guest_wraps = RegionSpec { guest: u64::MAX - 10, user: 0, len: 4096, offset: 0 };
    assert!(matches!(map.with(guest_wraps, fd(4096), u64::MAX), Err(MemoryError::BadRange { .. })));
    let user_wraps = RegionSpec { guest: 0, user: u64::MAX - 10, len: 4096, offset: 0 };
    assert!(matches!(map.with(user_wraps, fd(4096), u64::MAX), Err(MemoryError::BadRange { .. })));
}

#[test]
fn the_number_and_the_sum_of_regions_are_bounded() {
    let mut map = MemoryMap::default();
    for index in 0..MAX_REGIONS as u64 {
        map = with_region(&map, index * 0x2000, 0x1000);
    }
    let next = spec(MAX_REGIONS as u64 * 0x2000, 0x1000);
    assert!(matches!(map.with(next, fd(0x1000), u64::MAX), Err(MemoryError::TooMany)));

    let map = guest(0x10000);
    assert!(map.with(spec(0x10000, 0x1000), fd(0x1000), 0x11000).is_ok());
    let error = map.with(spec(0x10000, 0x1001), fd(0x2000), 0x11000).unwrap_err();
    assert!(matches!(error, MemoryError::TooMuch { total: 0x11001, limit: 0x11000 }), "{error}");
}

#[test]
fn an_unaligned_piece_of_a_file_is_mapped_where_it_lies() {
    let file = memory_file(0x5000);
    file.write_all_at(b"exactly here", 0x1234).unwrap();
    let region = RegionSpec { guest: 0x777, user: USER, len: 12, offset: 0x1234 };
    let map = MemoryMap::default().with(region, file.try_clone().unwrap().into(), u64::MAX).unwrap();
    let mut read = [0; 12];
    map.read(0x777, &mut read).unwrap();
    assert_eq!(&read, b"exactly here");
    map.write(0x77f, b"back").unwrap();
    file.read_exact_at(&mut read, 0x1234).unwrap();
    assert_eq!(&read, b"exactly back");
    assert_eq!(map.read(0x776, &mut [0; 2]), Err(Fault));
    assert_eq!(map.read(0x782, &mut [0; 2]), Err(Fault));
}

#[test]
fn a_shared_memory_file_cannot_shrink_once_it_is_mapped() {
    let memfd = unsealed(0x2000);
    let region = RegionSpec { guest: 0, user: USER, len: 0x2000, offset: 0 };
    let _map = MemoryMap::default().with(region, memfd.try_clone().unwrap().into(), u64::MAX).unwrap();
    assert!(memfd.set_len(0x1000).is_err());
    assert!(memfd.set_len(0x3000).is_ok(), "growing does no harm");
}

/// As a VMM makes it: sealable, not sealed.
#[expect(unsafe_code, reason = "no safe wrapper of memfd_create")]
fn unsealed(len: u64) -> File {
    use std::os::fd::FromRawFd;
    // SAFETY: a constant name; the result is checked.
    let fd = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    assert!(fd >= 0);
    // SAFETY: just made.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).unwrap();
    file.flush().unwrap();
    file
}

#[test]
fn a_removed_region_lives_as_long_as_somebody_holds_the_old_map() {
    let old = Arc::new(with_region(&guest(0x1000), 0x4000, 0x1000));
    old.write(0x4000, b"still").unwrap();
    let mut ranges = Vec::new();
    assert!(old.locate(0x4000, 5, &mut ranges));
    let buffer = GuestBuffer::new(Arc::clone(&old), ranges);
    let new = old.without(RegionSpec { offset: 99, ..spec(0x4000, 0x1000) }).unwrap();
    drop(old);
    assert!(!new.contains(0x4000, 1));
    let mut read = [0; 5];
    buffer.copy_out(0, &mut read).unwrap();
    assert_eq!(&read, b"still");
    assert!(matches!(new.without(spec(0x4000, 0x1000)), Err(MemoryError::Unknown)));
    assert!(matches!(new.without(spec(0, 0x800)), Err(MemoryError::Unknown)));
}

#[test]
fn ring_areas_must_lie_in_one_region() {
    let map = with_region(&guest(0x1000), 0x1000, 0x1000);
    assert!(map.at_user(USER + 0xff0, 0x10).is_some());
    assert!(map.at_user(USER + 0xff0, 0x11).is_none());
    assert!(map.at_user(USER + 0x1000, 0x1000).is_some());
    assert!(map.at_user(USER + 0x2000, 1).is_none());
    assert!(map.at_user(USER - 1, 1).is_none());
    assert!(map.at_user(u64::MAX, 2).is_none());
}

#[test]
fn reads_and_writes_agree_with_a_byte_by_byte_model() {
    for_seeds(20, |random| {
        const SPACE: usize = 0x1_0000;
        let mut map = MemoryMap::default();
        let mut model: Vec<Option<u8>> = vec![None; SPACE];
        let mut at = 0;
        while at < SPACE {
            let len = random.below(0x900) as usize + 1;
            let end = (at + len).min(SPACE);
            if !random.chance(4) {
                map = with_region(&map, at as u64, (end - at) as u64);
                model[at..end].fill(Some(0));
            }
            at = end;
        }
        for _ in 0..500 {
            let start = random.below(SPACE as u64) as usize;
            let len = random.below(0x1000) as usize;
            let expected: Option<Vec<u8>> = (start..start + len).map(|at| *model.get(at)?).collect();
            assert_eq!(map.contains(start as u64, len), expected.is_some());
            let mut ranges = vec![HostRange { at: std::ptr::null_mut(), len: 0 }];
            assert_eq!(map.locate(start as u64, len, &mut ranges), expected.is_some());
            if expected.is_none() {
                assert_eq!(ranges.len(), 1, "nothing is left behind");
            }
            let mut read = vec![0; len];
            match expected {
                None => assert_eq!(map.read(start as u64, &mut read), Err(Fault)),
                Some(expected) => {
                    map.read(start as u64, &mut read).unwrap();
                    assert_eq!(read, expected);
                    let bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
                    map.write(start as u64, &bytes).unwrap();
                    model[start..start + len].iter_mut().zip(bytes).for_each(|(m, b)| *m = Some(b));
                }
            }
        }
    });
}

#[test]
fn a_buffer_is_the_bytes_of_its_ranges_in_any_order_of_access() {
    for_seeds(20, |random| {
        let map = Arc::new(guest(0x10000));
        let mut ranges = Vec::new();
        let mut flat = Vec::new();
        for slot in 0..random.below(30) {
            // Disjoint, so that a write shows in one place only.
            let len = random.below(0x700);
            assert!(map.locate(slot * 0x800, len as usize, &mut ranges));
            flat.extend((0..len).map(|at| slot * 0x800 + at));
        }
        let mut model = vec![0u8; flat.len()];
        let mut end = 0;
        let mut piece = |range: &HostRange| {
            end += range.len;
            end - range.len..end
        };
        let pieces: Vec<std::ops::Range<usize>> = ranges.iter().map(&mut piece).collect();
        let mut buffer = GuestBuffer::new(Arc::clone(&map), ranges);
        assert_eq!(buffer.len(), model.len());
        for _ in 0..200 {
            let at = random.below(model.len() as u64 + 1) as usize;
            let len = random.below((model.len() - at) as u64 + 1) as usize;
            let bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
            // What is lent is in one piece; what is not says so, and is copied.
            if random.chance(3) {
                let lent = buffer.lend_mut(at, len, |mut to| to.copy_from(&bytes).unwrap());
                let is_in_one = pieces.iter().any(|piece| piece.contains(&at) && at + len <= piece.end);
                assert_eq!(lent.is_some(), is_in_one, "{at}+{len}");
                if lent.is_some() {
                    model[at..at + len].copy_from_slice(&bytes);
                }
            } else if random.chance(3) {
                let mut read = vec![0; len];
                if buffer.lend(at, len, |from| from.copy_to(&mut read).unwrap()).is_some() {
                    assert_eq!(read, model[at..at + len]);
                }
            } else if random.chance(2) {
                buffer.copy_in(at, &bytes).unwrap();
                model[at..at + len].copy_from_slice(&bytes);
            } else {
                let mut read = vec![0; len];
                buffer.copy_out(at, &mut read).unwrap();
                assert_eq!(read, model[at..at + len]);
            }
        }
        for (index, &address) in flat.iter().enumerate() {
            let mut byte = [0];
            map.read(address, &mut byte).unwrap();
            assert_eq!(byte[0], model[index]);
        }
    });
}
