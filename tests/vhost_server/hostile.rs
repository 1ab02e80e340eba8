//! Front ends and guests that break the rules.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use crate::Running;
use crate::disk::RamDisk;
use crate::frontend::*;

fn still_serves(server: &Running) {
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 64);
    assert_eq!(ring.run(OUT, 0, &[1; 512], 0).status, 0);
}

#[test]
fn messages_that_cannot_be_obeyed_are_refused_and_change_nothing() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 64);
    let short = memory_file(4096);
    let one = [short.as_raw_fd()];
    let region = |guest, len| table_body(&[(guest, len, USER, 0)]);
    let cases: &[(&str, u32, Vec<u8>, &[RawFd])] = &[
        ("an unknown request", 77, vec![], &[]),
        ("a back-end channel without a socket", SET_BACKEND_REQ_FD, vec![], &[]),
        ("a back-end channel that is no socket", SET_BACKEND_REQ_FD, vec![], &one),
        ("features never offered", SET_FEATURES, u64_body(1 << 35), &[]),
        ("protocol features never offered", SET_PROTOCOL_FEATURES, u64_body(1 << 18), &[]),
        ("a body too long", SET_FEATURES, vec![0; 9], &[]),
        ("a body too short", SET_VRING_NUM, vec![0; 4], &[]),
        ("a descriptor nobody asked for", SET_FEATURES, u64_body(frontend.features), &one),
        ("a table without descriptors", SET_MEM_TABLE, region(0, 4096), &[]),
        ("a table with two for one", SET_MEM_TABLE, region(0, 4096), &[one[0], one[0]]),
        ("a table longer than its message", SET_MEM_TABLE, [5, 0, 0, 0, 0, 0, 0, 0].to_vec(), &[]),
        ("a region longer than its file", SET_MEM_TABLE, region(0, 8192), &one),
        ("a region that wraps", SET_MEM_TABLE, region(u64::MAX - 1, 4096), &one),
        ("too much memory", SET_MEM_TABLE, region(0, 1 << 62), &one),
        (
            "overlapping regions",
            SET_MEM_TABLE,
            table_body(&[(0, 4096, USER, 0), (4095, 1, USER, 0)]),
            &[one[0], one[0]],
        ),
        ("a region on top of another", ADD_MEM_REG, single_region_body(0, 4096, 0, 0), &one),
        ("a region without a descriptor", ADD_MEM_REG, single_region_body(1 << 40, 4096, 0, 0), &[]),
        ("removing what is not there", REM_MEM_REG, single_region_body(1 << 40, 4096, 0, 0), &[]),
        ("a ring resized while enabled", SET_VRING_NUM, state_body(0, 32), &[]),
        ("a base moved while enabled", SET_VRING_BASE, state_body(0, 9), &[]),
        ("a ring of no size", SET_VRING_NUM, state_body(1, 0), &[]),
        ("a ring that is no power of two", SET_VRING_NUM, state_body(1, 100), &[]),
        ("a ring too large", SET_VRING_NUM, state_body(1, 512), &[]),
        ("a base too large", SET_VRING_BASE, state_body(1, 1 << 16), &[]),
        ("a queue that is not there", SET_VRING_NUM, state_body(4, 64), &[]),
        ("a kick for a queue that is not there", SET_VRING_KICK, u64_body(4), &one),
        ("a kick without its descriptor", SET_VRING_KICK, u64_body(1), &[]),
        ("a descriptor with no-descriptor", SET_VRING_CALL, u64_body(1 << 8), &one),
        ("unknown bits in a call", SET_VRING_CALL, u64_body(1 << 9), &one),
        ("an enable that is neither", SET_VRING_ENABLE, state_body(0, 2), &[]),
        ("misaligned addresses", SET_VRING_ADDR, [vec![0; 8], [1u8; 32].to_vec()].concat(), &[]),
        ("an in-flight area without a descriptor", SET_INFLIGHT_FD, vec![0; 24], &[]),
        ("an empty in-flight area", SET_INFLIGHT_FD, vec![0; 24], &one),
    ];
    for (what, code, body, fds) in cases {
        assert_eq!(frontend.tell(*code, body, fds), Some(1), "{what}");
        assert_eq!(ring.run(OUT, 0, &[1; 512], 0).status, 0, "after {what}");
    }
    drop(frontend);
    // A sender that did not ask would not know: the connection ends.
    for (what, code, body, fds) in cases {
        let frontend = server.ready();
        let _ring = frontend.start_ring(0, 64);
        frontend.send(*code, 1, body, fds);
        assert!(frontend.is_closed(), "{what}");
    }
    still_serves(&server);
}

#[test]
fn what_is_not_a_message_ends_the_connection() {
    let server = Running::new(RamDisk::new());
    let header = |code: u32, flags: u32, size: u32| {
        [code, flags, size].iter().flat_map(|field| field.to_ne_bytes()).collect::<Vec<u8>>()
    };
    for (what, bytes) in [
        ("version 0", header(GET_FEATURES, 0, 0)),
        ("version 2", header(GET_FEATURES, 2, 0)),
        ("an answer", header(GET_FEATURES, 1 | 4, 0)),
        ("a body of four gigabytes", header(SET_MEM_TABLE, 1, u32::MAX)),
        ("a body just too long", header(SET_MEM_TABLE, 1, 4097)),
        ("half a header", header(GET_FEATURES, 1, 0)[..6].to_vec()),
        ("half a body", [header(SET_FEATURES, 1, 8), vec![0; 4]].concat()),
    ] {
        let frontend = server.connect();
        std::io::Write::write_all(&mut &frontend.stream, &bytes).unwrap();
        frontend.stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(frontend.is_closed(), "{what}");
    }
    // An answer of its own has no room for a refusal.
    for (code, body) in [(GET_VRING_BASE, state_body(9, 0)), (GET_INFLIGHT_FD, vec![0; 3])] {
        let frontend = server.ready();
        assert!(frontend.send(code, 1 | NEED_REPLY, &body, &[]));
        assert!(frontend.is_closed());
    }
    still_serves(&server);
}

#[test]
fn an_impossible_in_flight_area_is_answered_with_none() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    for (queues, size) in [(0u16, 64u16), (5, 64), (1, 0), (1, 512)] {
        let mut body = vec![0; 24];
        body[16..18].copy_from_slice(&queues.to_ne_bytes());
        body[18..20].copy_from_slice(&size.to_ne_bytes());
        let (answer, file) = frontend.ask_fd(GET_INFLIGHT_FD, &body);
        assert_eq!(answer[0..8], [0; 8]);
        assert!(file.is_none());
    }
}

#[test]
fn more_regions_than_offered_are_refused() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let small = memory_file(4096);
    let region = |at: u64| single_region_body((1 << 40) + at * 4096, 4096, (1 << 45) + at * 4096, 0);
    for at in 0..508 {
        frontend.must(ADD_MEM_REG, &region(at), &[small.as_raw_fd()]);
    }
    assert_eq!(frontend.tell(ADD_MEM_REG, &region(508), &[small.as_raw_fd()]), Some(1));
    frontend.must(REM_MEM_REG, &region(17), &[]);
    frontend.must(ADD_MEM_REG, &region(508), &[small.as_raw_fd()]);
    let table: Vec<(u64, u64, u64, u64)> =
        (0..33).map(|at| (at << 20, 4096, (1 << 45) + (at << 20), 0)).collect();
    assert_eq!(frontend.tell(SET_MEM_TABLE, &table_body(&table), &[]), Some(1));
}

/// Breaks ring 1 of a device with two rings and sees that the other goes on.
fn breaks_only_its_ring(what: &str, attack: impl Fn(&mut Ring)) {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut good = frontend.start_ring(0, 64);
    let mut bad = frontend.start_ring(1, 64);
    assert_eq!(bad.run(OUT, 5, &[1; 512], 0).status, 0);
    attack(&mut bad);
    bad.kick();
    assert_eq!(wait_event(&bad.err), 1, "{what}");
    assert_eq!(good.run(OUT, 0, &[1; 512], 0).status, 0, "{what}");
    // Said once, and nothing more is taken.
    let used = bad.used_index();
    for _ in 0..100 {
        bad.kick();
    }
    assert_eq!(good.run(IN, 0, &[], 512).data, [1; 512], "{what}");
    assert!(bad.err.read().is_err(), "{what}");
    assert_eq!(bad.used_index(), used, "{what}");
    // The driver's reset cures it.
    assert_eq!(frontend.vring_base(1), u32::from(used), "{what}");
    bad.put(bad.base() + 0x5000, &[0; 4]);
    bad.put(bad.base() + 0x6000, &[0; 4]);
    let mut again = frontend.start_ring(1, 64);
    assert_eq!(again.run(OUT, 0, &[1; 512], 0).status, 0, "{what}");
}

#[test]
fn a_broken_ring_leaves_its_neighbours_alone() {
    breaks_only_its_ring("an available index that jumps", |ring| {
        ring.set_available_index(ring.available.wrapping_add(65));
    });
    breaks_only_its_ring("an available index that goes back", |ring| {
        ring.set_available_index(ring.available.wrapping_sub(1));
    });
    breaks_only_its_ring("a head outside the table", |ring| ring.offer(64));
    breaks_only_its_ring("a chain that loops", |ring| {
        ring.describe(0, ring.slot_at(0), 16, NEXT, 0);
        ring.offer(0);
    });
    breaks_only_its_ring("a chain without a status", |ring| {
        ring.describe(0, ring.slot_at(0), 16, 0, 0);
        ring.offer(0);
    });
    breaks_only_its_ring("nested tables", |ring| {
        let table = ring.slot_at(3);
        let mut descriptor = table.to_le_bytes().to_vec();
        descriptor.extend(16u32.to_le_bytes());
        descriptor.extend(INDIRECT.to_le_bytes());
        descriptor.extend([0; 2]);
        ring.put(table, &descriptor);
        ring.describe(0, table, 16, INDIRECT, 0);
        ring.offer(0);
    });
}

#[test]
fn a_head_offered_twice_breaks_the_ring_but_what_is_in_flight_comes_back() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 64);
    server.disk.hold();
    for slot in [0, 1, 0] {
        let head = ring.build(slot, OUT, u64::from(slot), &[1; 512], 0);
        ring.offer(head);
    }
    ring.kick();
    assert_eq!(wait_event(&ring.err), 1);
    server.disk.release();
    assert_eq!((ring.wait().0, ring.wait().0), (0, 3));
    assert_eq!(frontend.vring_base(0), 2);
    assert_eq!(server.disk.executed().len(), 2);
}

#[test]
fn a_disk_that_cannot_open_a_queue_leaves_the_ring_stopped_and_says_so() {
    let server = Running::new(RamDisk::new());
    server.disk.refuse_queues.store(true, Ordering::SeqCst);
    let frontend = server.ready();
    let ring = frontend.start_ring(0, 64);
    wait_event(&ring.err);
    server.disk.refuse_queues.store(false, Ordering::SeqCst);
    assert_eq!(frontend.vring_base(0), 0);
    ring.set_up(&frontend, 0);
    let mut ring = ring;
    assert_eq!(ring.run(OUT, 0, &[1; 512], 0).status, 0);
}

#[test]
fn a_call_descriptor_that_blocks_does_not_hold_the_queue() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 64);
    let full = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    full.write(u64::MAX - 1).unwrap();
    frontend.must(SET_VRING_CALL, &u64_body(0), &[full.as_raw_fd()]);
    for _ in 0..10 {
        ring.set_used_event(ring.seen);
        assert_eq!(ring.run(OUT, 0, &[1; 512], 0).status, 0);
    }
    assert_eq!(frontend.vring_base(0), 10);
}

#[test]
fn a_kick_that_cannot_be_waited_for_is_refused() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let ring = Ring::new(&frontend, 0, 64);
    ring.set_up(&frontend, 0);
    let file = memory_file(8);
    frontend.must(SET_VRING_KICK, &u64_body(0), &[file.as_raw_fd()]);
    assert_eq!(frontend.tell(SET_VRING_ENABLE, &state_body(0, 1), &[]), Some(1));
}

#[test]
fn rings_outside_memory_are_refused_when_they_are_to_start() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let ring = Ring::new(&frontend, 0, 64);
    ring.set_up(&frontend, 0);
    let mut body = state_body(0, 0);
    for _ in 0..4 {
        body.extend((USER + MEMORY - 64).to_ne_bytes());
    }
    frontend.must(SET_VRING_ADDR, &body, &[]);
    assert_eq!(frontend.tell(SET_VRING_ENABLE, &state_body(0, 1), &[]), Some(1));
    frontend.must(SET_VRING_ADDR, &ring.address_body(), &[]);
    let mut ring = ring;
    assert_eq!(ring.run(OUT, 0, &[1; 512], 0).status, 0, "and run when they are right");
}

#[test]
fn a_guest_that_scribbles_over_its_rings_harms_itself_only() {
    let server = Running::new(RamDisk::new());
    for seed in 1..40u64 {
        let frontend = server.ready();
        let mut good = frontend.start_ring(0, 64);
        let bad = frontend.start_ring(1, 64);
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        for _ in 0..50 {
            let at = bad.base() + next() % 0x7000;
            let value = next() & next();
            bad.put(at, &value.to_le_bytes()[..1 + (next() % 8) as usize]);
            bad.set_available_index(bad.used_index().wrapping_add((next() % 70) as u16));
            bad.kick();
        }
        assert_eq!(good.run(OUT, 9, &[seed as u8; 512], 0).status, 0, "seed {seed}");
        assert_eq!(good.run(IN, 9, &[], 512).data, [seed as u8; 512], "seed {seed}");
        // Still answers.
        frontend.vring_base(1);
        frontend.vring_base(0);
    }
}

#[test]
fn an_area_full_of_noise_is_survived() {
    let server = Running::new(RamDisk::new());
    for seed in 1..30u64 {
        let frontend = server.ready();
        let (area, file) = frontend.get_inflight(2, 64);
        let mut random = seed;
        let noise: Vec<u8> = (0..2200)
            .map(|_| {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (random >> 33) as u8
            })
            .collect();
        file.write_all_at(&noise, 0).unwrap();
        file.write_all_at(&[1, 0, 64, 0], 8).unwrap();
        frontend.must(SET_INFLIGHT_FD, &area, &[File::as_raw_fd(&file)]);
        let ring = Ring::new(&frontend, 0, 64);
        ring.set_available_index((seed % 65) as u16);
        ring.set_up(&frontend, 0);
        frontend.must(SET_VRING_ENABLE, &state_body(0, 1), &[]);
        let mut good = frontend.start_ring(1, 64);
        assert_eq!(good.run(OUT, 0, &[1; 512], 0).status, 0, "seed {seed}");
        frontend.vring_base(0);
    }
    still_serves(&server);
}

#[test]
fn memory_truncated_under_a_request_fails_that_request() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 64);
    // A file of a file system: it cannot be sealed.
    let other = memory_file(0x1_0000);
    frontend.must(ADD_MEM_REG, &single_region_body(MEMORY, 0x1_0000, USER + MEMORY, 0), &[other.as_raw_fd()]);
    let mut request = |kind, writable| {
        let head = ring.build(0, kind, 0, &[0; 512], if writable { 512 } else { 0 });
        let flags = if writable { NEXT | WRITE } else { NEXT };
        ring.describe(head + 1, MEMORY + 0x8000, 512, flags, head + 2);
        ring.offer(head);
        ring.kick();
        ring.wait();
        ring.get(ring.slot_at(0) + 32, 1)[0]
    };
    assert_eq!((request(OUT, false), request(IN, true)), (0, 0));
    other.set_len(0x1000).unwrap();
    assert_eq!((request(OUT, false), request(IN, true)), (1, 1));
    assert_eq!(ring.run(OUT, 0, &[1; 512], 0).status, 0);
    assert!(ring.err.read().is_err());
    assert_eq!(frontend.vring_base(0), 5);
}

#[test]
fn a_ring_truncated_away_breaks_and_everything_else_goes_on() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut good = frontend.start_ring(0, 64);
    // The second ring lies in the last quarter, which goes.
    let mut bad = Ring::new(&frontend, 7, 64);
    bad.index = 1;
    let part = memory_file(0x8_0000);
    let region = single_region_body(MEMORY, 0x8_0000, USER + MEMORY, 0);
    frontend.must(ADD_MEM_REG, &region, &[part.as_raw_fd()]);
    bad.set_up(&frontend, 0);
    let mut body = state_body(1, 0);
    for at in [0, 0x6000, 0x5000, 0] {
        body.extend((USER + MEMORY + at).to_ne_bytes());
    }
    frontend.must(SET_VRING_ADDR, &body, &[]);
    frontend.must(SET_VRING_ENABLE, &state_body(1, 1), &[]);
    assert!(bad.err.read().is_err());
    part.set_len(0).unwrap();
    bad.kick();
    assert_eq!(wait_event(&bad.err), 1);
    for _ in 0..10 {
        bad.kick();
        assert_eq!(good.run(OUT, 0, &[1; 512], 0).status, 0);
    }
    assert!(bad.err.read().is_err());
    // And a ring that is set up where nothing is any more.
    assert_eq!(frontend.vring_base(1), 0);
    bad.set_up(&frontend, 0);
    assert_eq!(frontend.tell(SET_VRING_ADDR, &body, &[]), Some(1));
    drop(frontend);
    still_serves(&server);
}

/// Messages in any order with anything in them, on rings and memory that may well exist.
fn random_message(frontend: &Frontend, ring: &Ring, next: &mut impl FnMut() -> u64) -> bool {
    let code = (next() % 50) as u32;
    let flags = if next().is_multiple_of(8) { next() as u32 } else { 1 | (next() as u32 & NEED_REPLY) };
    let small = |next: &mut dyn FnMut() -> u64| match next() % 6 {
        0 => 0,
        1 => next() % 6,
        2 => 64,
        3 => USER + next() % MEMORY / 16 * 16,
        4 => next() % MEMORY,
        _ => next(),
    };
    let body: Vec<u8> = match next() % 8 {
        0 => vec![],
        1 => state_body((next() % 5) as u32, small(next) as u32),
        2 => u64_body(small(next)),
        3 => table_body(&[(small(next), small(next), small(next), next() % 2 * 4096)]),
        4 => single_region_body(small(next), small(next), small(next), 0),
        5 => ring.address_body(),
        6 => config_body(small(next) as u32, small(next) as u32, &[next() as u8; 3][..(next() % 4) as usize]),
        _ => (0..next() % 60).flat_map(|_| (small(next) as u32).to_ne_bytes()).collect(),
    };
    let all = [frontend.memory.as_raw_fd(), ring.kick.as_raw_fd(), frontend.stream.as_raw_fd()];
    let first = (next() % 3) as usize;
    let count = if next().is_multiple_of(2) { 0 } else { (next() % 3) as usize };
    let fds: Vec<RawFd> = (0..count).map(|at| all[(first + at) % 3]).collect();
    frontend.send(code, flags, &body, &fds)
}

#[test]
fn random_conversations_end_nobody_elses() {
    let server = Running::new(RamDisk::new());
    for seed in 1..150u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let frontend = server.ready();
        let mut ring = Ring::new(&frontend, (next() % 4) as u16, 64);
        if next().is_multiple_of(2) {
            ring = frontend.start_ring(ring.index, 64);
        }
        // Answers are thrown away as they come.
        let answers = frontend.stream.try_clone().unwrap();
        let drain = std::thread::spawn(move || std::io::copy(&mut &answers, &mut std::io::sink()));
        for _ in 0..40 {
            let head = ring.build((next() % 20) as u16, (next() % 14) as u32, next() % 5000, &[0; 512], 0);
            ring.offer(head);
            ring.kick();
            if !random_message(&frontend, &ring, &mut next) {
                break;
            }
        }
        frontend.stream.shutdown(std::net::Shutdown::Both).ok();
        drop(drain.join());
        eprintln!("seed {seed} survived");
        still_serves(&server);
    }
}
