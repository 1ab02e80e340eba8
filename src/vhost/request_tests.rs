use std::sync::Arc;

use super::*;
use crate::vhost::memory::GuestBuffer;
use crate::vhost::split::SplitRing;
use crate::vhost::testing::{
    Driver, INDIRECT, NEXT, Random, WRITE, disk_config, for_seeds, guest, with_region,
};
use crate::volume::Buffer;

const DATA: u64 = 0x2_0000;

struct Bench {
    driver: Driver,
    ring: SplitRing,
    features: Features,
    parser: Parser,
    data: Vec<HostRange>,
}

fn bench(size: u16) -> Bench {
    let map = Arc::new(with_region(&guest(0x10000), DATA, 0x20_0000));
    let ring = SplitRing::new(Arc::clone(&map), Driver::addresses(), size, true, 0).unwrap();
    Bench {
        driver: Driver::new(map, size),
        ring,
        features: Features::offered(&disk_config()),
        parser: Parser::default(),
        data: Vec::new(),
    }
}

impl Bench {
    fn parse(&mut self, head: u16) -> Result<Parsed, ChainError> {
        let map = Arc::clone(&self.driver.map);
        self.parser.parse(&self.ring, &map, self.features, head, &mut self.data)
    }

    fn header(&self, at: u64, kind: u32, sector: u64) {
        let mut bytes = [0; 16];
        bytes[0..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&sector.to_le_bytes());
        self.driver.map.write(at, &bytes).unwrap();
    }

    /// Header, `out` bytes to the device, `room` bytes from it, status: one descriptor each.
    fn simple(&mut self, kind: u32, sector: u64, out: u32, room: u32) -> Parsed {
        self.header(DATA, kind, sector);
        let d = &self.driver;
        d.describe(0, DATA, 16, NEXT, 1);
        d.describe(1, DATA + 0x1000, out, NEXT, 2);
        d.describe(2, DATA + 0x10000, room, NEXT | WRITE, 3);
        d.describe(3, DATA + 0x100, 1, WRITE, 0);
        self.parse(0).unwrap()
    }
}

const IN: u32 = blk::VIRTIO_BLK_T_IN;
const OUT: u32 = blk::VIRTIO_BLK_T_OUT;

#[test]
fn each_type_of_request_becomes_what_it_asks_for() {
    let mut bench = bench(8);
    let submit = |kind, sector| Action::Submit { kind, sector };
    let answer = Action::Answer;
    for (kind, out, room, action, written) in [
        (IN, 0, 4096, submit(RequestKind::Read, 9), 4097),
        (OUT, 1024, 0, submit(RequestKind::Write, 9), 1),
        (IN, 0, 0, answer(Status::Ok), 1),
        (IN, 0, 511, answer(Status::IoError), 512),
        (OUT, 513, 0, answer(Status::IoError), 1),
        (blk::VIRTIO_BLK_T_FLUSH, 0, 0, submit(RequestKind::Flush, 0), 1),
        (blk::VIRTIO_BLK_T_GET_ID, 0, 20, Action::Identify, 21),
        (blk::VIRTIO_BLK_T_GET_ID, 0, 512, Action::Identify, 21),
        (blk::VIRTIO_BLK_T_GET_ID, 0, 5, Action::Identify, 6),
        (blk::VIRTIO_BLK_T_GET_ID, 0, 0, answer(Status::IoError), 1),
        (blk::VIRTIO_BLK_T_SCSI_CMD, 0, 0, answer(Status::Unsupported), 1),
        (blk::VIRTIO_BLK_T_SECURE_ERASE, 16, 0, answer(Status::Unsupported), 1),
        (blk::VIRTIO_BLK_T_ZONE_REPORT, 0, 512, answer(Status::Unsupported), 1),
        (0xdead_beef, 0, 0, answer(Status::Unsupported), 1),
        (blk::VIRTIO_BLK_T_DISCARD, 0, 0, answer(Status::IoError), 1),
        (blk::VIRTIO_BLK_T_DISCARD, 24, 0, answer(Status::IoError), 1),
        (blk::VIRTIO_BLK_T_WRITE_ZEROES, 257 * 16, 0, answer(Status::IoError), 1),
    ] {
        let parsed = bench.simple(kind, 9, out, room);
        assert_eq!(parsed.action, action, "type {kind} with {out} out and {room} in");
        assert_eq!(parsed.written, written, "type {kind} with {out} out and {room} in");
        assert_eq!(parsed.status_at, DATA + 0x100);
    }
}

#[test]
fn what_was_not_negotiated_is_unsupported() {
    let mut bench = bench(8);
    bench.features = Features(1 << 32);
    for kind in [blk::VIRTIO_BLK_T_FLUSH, blk::VIRTIO_BLK_T_DISCARD, blk::VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(bench.simple(kind, 0, 16, 0).action, Action::Answer(Status::Unsupported));
    }
}

#[test]
fn every_range_becomes_an_operation_and_flags_are_judged_first() {
    let mut bench = bench(8);
    let discard = blk::VIRTIO_BLK_T_DISCARD;
    let zero = blk::VIRTIO_BLK_T_WRITE_ZEROES;
    let unsupported = Action::Answer(Status::Unsupported);
    for (kind, ranges, action, operations) in [
        (
            discard,
            vec![(8u64, 16u32, 0u32), (1 << 40, u32::MAX, 0)],
            Action::SubmitRanges,
            vec![
                SectorOp { kind: RequestKind::Discard { sectors: 16 }, sector: 8 },
                SectorOp { kind: RequestKind::Discard { sectors: u64::from(u32::MAX) }, sector: 1 << 40 },
            ],
        ),
        (
            zero,
            vec![(1, 2, 1), (3, 4, 0), (5, 0, 0)],
            Action::SubmitRanges,
            vec![
                SectorOp { kind: RequestKind::WriteZeroes { sectors: 2, unmap: true }, sector: 1 },
                SectorOp { kind: RequestKind::WriteZeroes { sectors: 4, unmap: false }, sector: 3 },
            ],
        ),
        (zero, vec![(5, 0, 1)], Action::Answer(Status::Ok), vec![]),
        (discard, vec![(8, 16, 0), (8, 16, 1)], unsupported, vec![]),
        (discard, vec![(8, 16, 2)], unsupported, vec![]),
        (zero, vec![(8, 16, 3)], unsupported, vec![]),
    ] {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in &ranges {
            bytes.extend_from_slice(&sector.to_le_bytes());
            bytes.extend_from_slice(&sectors.to_le_bytes());
            bytes.extend_from_slice(&flags.to_le_bytes());
        }
        bench.driver.map.write(DATA + 0x1000, &bytes).unwrap();
        let parsed = bench.simple(kind, 0, bytes.len() as u32, 0);
        assert_eq!(parsed.action, action, "{kind} {ranges:?}");
        assert_eq!(parsed.written, 1);
        if action == Action::SubmitRanges {
            assert_eq!(bench.parser.ranges(), operations);
        }
    }
}

#[test]
fn data_outside_memory_fails_the_request_and_not_the_ring() {
    let mut bench = bench(8);
    bench.header(DATA, IN, 0);
    let d = &bench.driver;
    // UML's zero page.
    d.describe(0, DATA, 16, NEXT, 1);
    d.describe(1, 0x9000_0000, 512, NEXT | WRITE, 2);
    d.describe(2, DATA + 0x100, 1, WRITE, 0);
    assert_eq!(bench.parse(0).unwrap().action, Action::Answer(Status::IoError));
    assert!(bench.data.is_empty());
    // The header itself.
    bench.driver.describe(0, 0x9000_0000, 16, NEXT, 2);
    assert_eq!(bench.parse(0).unwrap().action, Action::Answer(Status::IoError));
    // A header that is too short.
    bench.driver.describe(0, DATA, 15, NEXT, 2);
    assert_eq!(bench.parse(0).unwrap().action, Action::Answer(Status::IoError));
    // Data that wraps around the address space.
    bench.driver.describe(0, DATA, 16, NEXT, 1);
    bench.driver.describe(1, u64::MAX - 100, 512, NEXT | WRITE, 2);
    assert_eq!(bench.parse(0).unwrap().action, Action::Answer(Status::IoError));
}

#[test]
fn chains_that_cannot_carry_a_status_are_errors() {
    type Setup = fn(&Driver);
    let table = DATA + 0x8000;
    let cases: &[(&str, Setup, ChainError)] = &[
        ("a loop", |d| d.describe(0, DATA, 16, NEXT, 0), ChainError::TooLong),
        (
            "a next outside the table",
            |d| d.describe(0, DATA, 16, NEXT, 8),
            ChainError::NextOutOfRange { next: 8, table: 8 },
        ),
        ("nothing writable", |d| d.describe(0, DATA, 16, 0, 0), ChainError::NoStatus),
        (
            "an empty writable part",
            |d| {
                d.describe(0, DATA, 16, NEXT, 1);
                d.describe(1, DATA, 0, WRITE, 0);
            },
            ChainError::NoStatus,
        ),
        (
            "readable after writable",
            |d| {
                d.describe(0, DATA, 16, NEXT, 1);
                d.describe(1, DATA, 1, NEXT | WRITE, 2);
                d.describe(2, DATA, 1, 0, 0);
            },
            ChainError::ReadableAfterWritable,
        ),
        (
            "a status outside memory",
            |d| {
                d.describe(0, DATA, 16, NEXT, 1);
                d.describe(1, 0x9000_0000, 1, WRITE, 0);
            },
            ChainError::StatusOutside,
        ),
        (
            "a status past the address space",
            |d| {
                d.describe(0, DATA, 16, NEXT, 1);
                d.describe(1, u64::MAX, 2, WRITE, 0);
            },
            ChainError::NoStatus,
        ),
        (
            "four gigabytes",
            |d| {
                d.describe(0, DATA, 16, NEXT, 1);
                d.describe(1, DATA, u32::MAX, WRITE, 0);
            },
            ChainError::TooManyBytes,
        ),
        ("indirect with next", |d| d.describe(0, DATA, 16, INDIRECT | NEXT, 1), ChainError::IndirectWithNext),
        ("an empty table", |d| d.describe(0, DATA, 0, INDIRECT, 0), ChainError::IndirectLength { len: 0 }),
        ("an odd table", |d| d.describe(0, DATA, 24, INDIRECT, 0), ChainError::IndirectLength { len: 24 }),
        (
            "a huge table",
            |d| d.describe(0, DATA, 1025 * 16, INDIRECT, 0),
            ChainError::IndirectLength { len: 1025 * 16 },
        ),
        (
            "a table outside memory",
            |d| d.describe(0, 0x9000_0000, 32, INDIRECT, 0),
            ChainError::IndirectOutside,
        ),
        (
            "a table in a table",
            |d| {
                d.describe(0, DATA + 0x8000, 16, INDIRECT, 0);
                d.map.write(DATA + 0x8000, &Driver::descriptor_bytes(DATA, 16, INDIRECT, 0)).unwrap();
            },
            ChainError::NestedIndirect,
        ),
        (
            "a loop in a table",
            |d| {
                d.describe(0, DATA + 0x8000, 16, INDIRECT, 0);
                d.map.write(DATA + 0x8000, &Driver::descriptor_bytes(DATA, 16, NEXT, 0)).unwrap();
            },
            ChainError::TooLong,
        ),
        (
            "a next outside an indirect table",
            |d| {
                d.describe(0, DATA + 0x8000, 16, INDIRECT, 0);
                d.map.write(DATA + 0x8000, &Driver::descriptor_bytes(DATA, 16, NEXT, 1)).unwrap();
            },
            ChainError::NextOutOfRange { next: 1, table: 1 },
        ),
    ];
    assert_eq!(table, DATA + 0x8000);
    for (what, setup, error) in cases {
        let mut bench = bench(8);
        setup(&bench.driver);
        assert_eq!(bench.parse(0), Err(*error), "{what}");
    }
    let mut bench = bench(8);
    bench.features = Features(0);
    bench.driver.describe(0, DATA, 16, INDIRECT, 0);
    assert_eq!(bench.parse(0), Err(ChainError::IndirectNotNegotiated));
}

/// Lays `lengths` out as descriptors, direct, indirect, or direct and then indirect.
fn lay_out(bench: &Bench, parts: &[(u64, u32, bool)], direct: usize) {
    let d = &bench.driver;
    let table = DATA + 0x1f_0000;
    for (index, &(addr, len, writable)) in parts.iter().enumerate() {
        let mut flags = if writable { WRITE } else { 0 };
        let last = index + 1 == parts.len();
        if index < direct {
            flags |= if last { 0 } else { NEXT };
            d.describe(index as u16, addr, len, flags, index as u16 + 1);
        } else {
            let at = index - direct;
            flags |= if last { 0 } else { NEXT };
            let bytes = Driver::descriptor_bytes(addr, len, flags, at as u16 + 1);
            d.map.write(table + at as u64 * 16, &bytes).unwrap();
        }
    }
    if direct < parts.len() {
        d.describe(direct as u16, table, ((parts.len() - direct) * 16) as u32, INDIRECT, 0);
    }
}

#[test]
fn any_split_into_descriptors_means_the_same_request() {
    for_seeds(300, |random: &mut Random| {
        let mut bench = bench(256);
        let read = random.chance(2);
        let sectors = random.below(32) + 1;
        let sector = random.next();
        // The bytes of the chain in their order, cut at random places.
        let readable = 16 + if read { 0 } else { sectors * 512 };
        let writable = 1 + if read { sectors * 512 } else { 0 };
        let mut stream = vec![0; 16];
        stream[0..4].copy_from_slice(&(if read { IN } else { OUT }).to_le_bytes());
        stream[8..16].copy_from_slice(&sector.to_le_bytes());
        stream.extend((16..readable).map(|_| random.next() as u8));
        let mut parts = Vec::new();
        let mut at = DATA;
        let mut places = Vec::new();
        for (mut left, is_writable) in [(readable, false), (writable, true)] {
            while left > 0 {
                let len = random.below(left.min(3000)) + u64::from(!random.chance(8));
                let len = if parts.len() > 100 { left } else { len.min(left) };
                parts.push((at, len as u32, is_writable));
                places.extend(at..at + len);
                at += len + random.below(50);
                left -= len;
            }
        }
        for (place, byte) in places.iter().zip(&stream) {
            bench.driver.map.write(*place, &[*byte]).unwrap();
        }
        let direct = random.below(parts.len() as u64 + 1) as usize;
        lay_out(&bench, &parts, direct);
        let parsed = bench.parse(0).unwrap();
        let kind = if read { RequestKind::Read } else { RequestKind::Write };
        assert_eq!(parsed.action, Action::Submit { kind, sector });
        assert_eq!(parsed.status_at, *places.last().unwrap());
        assert_eq!(u64::from(parsed.written), writable);
        let mut buffer = GuestBuffer::new(Arc::clone(&bench.driver.map), std::mem::take(&mut bench.data));
        assert_eq!(buffer.len() as u64, sectors * 512);
        if read {
            let bytes: Vec<u8> = (0..buffer.len()).map(|_| random.next() as u8).collect();
            buffer.copy_in(0, &bytes).unwrap();
            for (index, place) in places[readable as usize..places.len() - 1].iter().enumerate() {
                let mut byte = [0];
                bench.driver.map.read(*place, &mut byte).unwrap();
                assert_eq!(byte[0], bytes[index]);
            }
        } else {
            let mut bytes = vec![0; buffer.len()];
            buffer.copy_out(0, &mut bytes).unwrap();
            assert_eq!(bytes, stream[16..]);
        }
    });
}

#[test]
fn a_chain_of_random_bytes_never_does_more_than_fail() {
    for_seeds(2000, |random: &mut Random| {
        let mut bench = bench(8);
        let near = |random: &mut Random| match random.below(4) {
            0 => random.next(),
            _ => DATA + random.below(0x4000),
        };
        for index in 0..8 {
            let len = if random.chance(4) { random.next() as u32 } else { random.below(600) as u32 };
            let flags = random.below(8) as u16;
            bench.driver.describe(index, near(random), len, flags, random.below(9) as u16);
        }
        let noise: Vec<u8> = (0..0x4000).map(|_| random.next() as u8 & random.next() as u8).collect();
        bench.driver.map.write(DATA, &noise).unwrap();
        if let Ok(parsed) = bench.parse(random.below(8) as u16) {
            assert!(bench.driver.map.contains(parsed.status_at, 1));
        }
    });
}
