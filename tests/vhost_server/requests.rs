//! Requests through a ring.

use std::sync::atomic::Ordering;

use pcache_vhost::volume::RequestKind;

use crate::disk::{RamDisk, SECTORS};
use crate::frontend::*;
use crate::{Running, eventually};

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

#[test]
fn what_is_written_is_read_and_zeroed_ranges_read_as_zeros() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 128);
    let data = pattern(1, 4096);
    let written = ring.run(OUT, 8, &data, 0);
    assert_eq!((written.status, written.written), (0, 1));
    let read = ring.run(IN, 8, &[], 4096);
    assert_eq!((read.status, read.written), (0, 4097));
    assert_eq!(read.data, data);
    assert_eq!(ring.run(FLUSH, 0, &[], 0).status, 0);

    let mut ranges = Vec::new();
    for (sector, sectors) in [(8u64, 1u32), (10, 2), (15, 1)] {
        ranges.extend(sector.to_le_bytes());
        ranges.extend(sectors.to_le_bytes());
        ranges.extend(0u32.to_le_bytes());
    }
    assert_eq!(ring.run(WRITE_ZEROES, 0, &ranges, 0).status, 0);
    let mut expected = data;
    for sector in [0, 2, 3, 7] {
        expected[sector * 512..][..512].fill(0);
    }
    assert_eq!(ring.run(IN, 8, &[], 4096).data, expected);
    assert_eq!(ring.run(DISCARD, 0, &ranges[..16], 0).status, 0);

    let id = ring.run(GET_ID, 0, &[], 20);
    assert_eq!((id.status, id.written), (0, 21));
    assert_eq!(id.data, b"a serial of 20 bytes");
    assert_eq!(ring.run(99, 0, &[], 512).status, 2);
}

#[test]
fn a_request_of_several_ranges_ends_once_with_the_worst_status() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 128);
    let mut ranges = Vec::new();
    for at in 0..256u64 {
        // The hundredth is outside the disk.
        let sector = if at == 100 { SECTORS } else { at };
        ranges.extend(sector.to_le_bytes());
        ranges.extend(1u32.to_le_bytes());
        ranges.extend(0u32.to_le_bytes());
    }
    let outcome = ring.run(DISCARD, 0, &ranges, 0);
    assert_eq!((outcome.status, outcome.written), (1, 1));
    assert_eq!(server.disk.executed().len(), 256);
    assert_eq!(ring.used_index(), 1);
}

#[test]
fn a_failed_read_says_that_only_its_status_was_written() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 128);
    let outcome = ring.run(IN, SECTORS, &[], 512);
    assert_eq!((outcome.status, outcome.written), (1, 1));
}

#[test]
fn a_request_outside_memory_is_an_error_of_that_request_only() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 128);
    let head = ring.build(0, OUT, 0, &[0; 512], 0);
    ring.describe(head + 1, MEMORY + 4096, 512, NEXT, head + 2);
    ring.offer(head);
    ring.kick();
    ring.wait();
    assert_eq!(ring.get(ring.slot_at(0) + 32, 1), [1]);
    assert_eq!(ring.run(OUT, 0, &[7; 512], 0).status, 0);
    assert!(ring.err.read().is_err());
}

#[test]
fn many_requests_at_once_all_come_back_whenever_the_disk_is_late() {
    for features in [u64::MAX, !F_EVENT_IDX] {
        let server = Running::new(RamDisk::new());
        server.disk.late.store(7, Ordering::SeqCst);
        let mut frontend = server.connect();
        frontend.negotiate(features);
        frontend.share_memory();
        let mut rings: Vec<Ring> = (0..4).map(|index| frontend.start_ring(index, 64)).collect();
        for round in 0..300u64 {
            for ring in &mut rings {
                let read = round % 2 == 1;
                for slot in 0..20 {
                    let sector = u64::from(ring.index) * 1000 + u64::from(slot) * 4;
                    let data = pattern(round as u8 & !1 ^ slot as u8, 2048);
                    let head = match read {
                        true => ring.build(slot, IN, sector, &[0xcc; 2048], 2048),
                        false => ring.build(slot, OUT, sector, &data, 0),
                    };
                    ring.offer(head);
                    if ring.wants_kick() {
                        ring.kick();
                    }
                }
            }
            for ring in &mut rings {
                let mut heads: Vec<u32> = (0..20).map(|_| ring.wait().0).collect();
                heads.sort_unstable();
                assert_eq!(heads, (0..20).map(|slot| slot * 3).collect::<Vec<u32>>());
                for slot in 0..20 {
                    let at = ring.slot_at(slot);
                    assert_eq!(ring.get(at + 32, 1), [0]);
                    if round % 2 == 1 {
                        assert_eq!(
                            ring.get(at + 0x1000, 2048),
                            pattern((round - 1) as u8 ^ slot as u8, 2048)
                        );
                    }
                }
            }
        }
        assert_eq!(server.disk.executed().len(), 4 * 300 * 20);
    }
}

#[test]
fn writes_at_hand_together_are_committed_together() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = Ring::new(&frontend, 0, 128);
    for slot in 0..16 {
        let head = ring.build(slot, OUT, u64::from(slot), &[1; 512], 0);
        ring.offer(head);
    }
    ring.set_up(&frontend, 0);
    frontend.must(SET_VRING_ENABLE, &state_body(0, 1), &[]);
    for _ in 0..16 {
        ring.wait();
    }
    assert_eq!(server.disk.commits.load(Ordering::SeqCst), 1);
}

#[test]
fn a_driver_that_does_not_want_notifications_gets_none() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 128);
    // The first decision after a start knows no earlier one.
    ring.run(OUT, 0, &[0; 512], 0);
    eventually("the first notification", || ring.call.read().is_ok());
    ring.set_used_event(ring.seen.wrapping_add(50));
    for _ in 0..50 {
        ring.run(OUT, 0, &[0; 512], 0);
    }
    assert!(ring.call.read().is_err(), "the event was not passed yet");
    ring.run(OUT, 0, &[0; 512], 0);
    assert_eq!(wait_event(&ring.call), 1);
}

#[test]
fn an_idle_queue_asks_to_be_kicked_and_a_busy_one_does_not() {
    for features in [u64::MAX, !F_EVENT_IDX] {
        let server = Running::new(RamDisk::new());
        let mut frontend = server.connect();
        frontend.negotiate(features);
        frontend.share_memory();
        let mut ring = frontend.start_ring(0, 128);
        server.disk.hold();
        for slot in 0..3 {
            let head = ring.build(slot, OUT, 0, &[0; 512], 0);
            eventually("the queue to fall asleep", || ring.is_asleep());
            ring.offer(head);
            ring.kick();
            server.disk.wait_pending(u64::from(slot) + 1);
        }
        server.disk.release();
        for _ in 0..3 {
            ring.wait();
        }
    }
}

#[test]
fn without_a_kick_the_queue_polls() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = Ring::new(&frontend, 0, 128);
    ring.set_up(&frontend, 0);
    frontend.must(SET_VRING_KICK, &u64_body(1 << 8), &[]);
    frontend.must(SET_VRING_ENABLE, &state_body(0, 1), &[]);
    for slot in 0..20 {
        std::thread::sleep(std::time::Duration::from_millis(u64::from(slot % 3)));
        let head = ring.build(slot, OUT, 1, &[5; 512], 0);
        ring.offer(head);
        ring.wait();
    }
    // With requests at the disk it still hears of a stop.
    server.disk.hold();
    let head = ring.build(0, OUT, 1, &[5; 512], 0);
    ring.offer(head);
    server.disk.wait_pending(1);
    server.disk.release();
    ring.wait();
    assert_eq!(frontend.vring_base(0), 21);
}

#[test]
fn the_disk_sees_flushes_only_where_the_driver_sent_them() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(1, 128);
    ring.run(OUT, 3, &[0; 512], 0);
    ring.run(FLUSH, 0, &[], 0);
    ring.run(OUT, 4, &[0; 512], 0);
    let kinds: Vec<RequestKind> = server.disk.executed().iter().map(|done| done.kind).collect();
    assert_eq!(kinds, [RequestKind::Write, RequestKind::Flush, RequestKind::Write]);
    assert!(server.disk.executed().iter().all(|done| done.queue == 1));
}
