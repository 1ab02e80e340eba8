//! What a front end with bad intentions, or none, gets: an error, and at most the end of its own
//! connection. Never the server, and never a descriptor that stays open.

mod client;

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use client::front::{queues_in, ring_addresses, set_up_ring};
use client::ring::Descriptor;
use client::wire::{Inflight, longs, vring_state, words};
use client::{Client, ClientOptions, Daemon, Memory, Queue, Region, Req, Wire, Workspace, feature, protocol};

const MIB: u64 = 1 << 20;
const DISK: u64 = 64 * MIB;
const PATIENCE: Duration = Duration::from_secs(20);

fn server(queues: u16) -> (Workspace, Daemon) {
    let workspace = Workspace::new();
    let daemon = Daemon::cached(&workspace, "64MiB", DISK, queues, &[]);
    (workspace, daemon)
}

fn options(queues: u16) -> ClientOptions {
    ClientOptions { queues, queue_size: 16, patience: PATIENCE, ..ClientOptions::default() }
}

/// A connection with features negotiated, so that refusals are answered.
fn greeted(daemon: &Daemon) -> Wire {
    let mut wire = Wire::connect(daemon.socket(), PATIENCE);
    wire.tell(Req::SetOwner, &[], &[]);
    let features = wire.get_u64(Req::GetFeatures);
    let known = protocol::MQ
        | protocol::REPLY_ACK
        | protocol::CONFIG
        | protocol::INFLIGHT_SHMFD
        | protocol::CONFIGURE_MEM_SLOTS
        | protocol::RESET_DEVICE;
    let offered = wire.get_u64(Req::GetProtocolFeatures);
    wire.set_u64(Req::SetProtocolFeatures, offered & known);
    wire.need_reply = true;
    wire.set_u64(Req::SetFeatures, features & (feature::VERSION_1 | feature::PROTOCOL_FEATURES));
    wire
}

/// A message that must be refused: by a non-zero answer or by hanging up.
struct Bad {
    name: &'static str,
    request: Req,
    body: Vec<u8>,
    fds: Vec<RawFd>,
}

fn bad(name: &'static str, request: Req, body: Vec<u8>, fds: &[RawFd]) -> Bad {
    Bad { name, request, body, fds: fds.to_vec() }
}

fn table(regions: &[Region]) -> Vec<u8> {
    let mut body = words(&[regions.len() as u32, 0]);
    body.extend(regions.iter().flat_map(|region| region.to_bytes()));
    body
}

fn single(region: Region) -> Vec<u8> {
    [longs(&[0]), region.to_bytes()].concat()
}

fn inflight(len: u64, offset: u64, queues: u16, size: u16) -> Vec<u8> {
    let mut body = longs(&[len, offset]);
    body.extend(queues.to_le_bytes());
    body.extend(size.to_le_bytes());
    body.resize(24, 0);
    body
}

/// Everything wrong that a memory table can be.
fn bad_memory(memory: &Memory) -> Vec<Bad> {
    let fd = memory.file().as_raw_fd();
    let good = memory.regions()[0];
    let far = |i: u64| Region { guest: i << 32, len: 4096, user: i << 33, offset: 0 };
    let many: Vec<Region> = (0..33).map(far).collect();
    vec![
        bad(
            "a region longer than its file",
            Req::SetMemTable,
            table(&[Region { len: good.len + 1, ..good }]),
            &[fd],
        ),
        bad(
            "a region behind its file",
            Req::SetMemTable,
            table(&[Region { offset: 1 << 30, ..good }]),
            &[fd],
        ),
        bad(
            "an offset that overflows",
            Req::SetMemTable,
            table(&[Region { offset: u64::MAX - 4095, ..good }]),
            &[fd],
        ),
        bad(
            "a guest address that overflows",
            Req::SetMemTable,
            table(&[Region { guest: u64::MAX - 4095, ..good }]),
            &[fd],
        ),
        bad(
            "a user address that overflows",
            Req::SetMemTable,
            table(&[Region { user: u64::MAX - 4095, ..good }]),
            &[fd],
        ),
        bad(
            "regions that overlap",
            Req::SetMemTable,
            table(&[good, Region { user: 1 << 50, ..good }]),
            &[fd, fd],
        ),
        bad("a region of nothing", Req::SetMemTable, table(&[Region { len: 0, ..good }]), &[fd]),
        bad("33 regions", Req::SetMemTable, table(&many), &[fd; 16]),
        bad("more regions than descriptors", Req::SetMemTable, table(&[far(1), far(2)]), &[fd]),
        bad("more descriptors than regions", Req::SetMemTable, table(&[good]), &[fd, fd, fd]),
        bad("a table cut short", Req::SetMemTable, table(&[good])[..30].to_vec(), &[fd]),
        bad(
            "an added region longer than its file",
            Req::AddMemReg,
            single(Region { len: 1 << 40, ..good }),
            &[fd],
        ),
        bad("an added region without file", Req::AddMemReg, single(good), &[]),
        bad("an added region with two files", Req::AddMemReg, single(good), &[fd, fd]),
        bad(
            "an added region whose end overflows",
            Req::AddMemReg,
            single(Region { user: u64::MAX - 8, ..good }),
            &[fd],
        ),
        bad("a region to remove that is not there", Req::RemMemReg, single(good), &[]),
    ]
}

/// Everything wrong that the set-up of a ring can be.
fn bad_rings(memory: &Memory, queue: &Queue) -> Vec<Bad> {
    let fd = queue.kick.as_raw_fd();
    let other = |index: u16| [words(&[u32::from(index), 0]), longs(&[0, 0, 0, 0])].concat();
    let mut outside = ring_addresses(memory, queue, 0);
    outside[8..16].copy_from_slice(&8u64.to_le_bytes());
    vec![
        bad("a ring of 0", Req::SetVringNum, vring_state(0, 0), &[]),
        bad("a ring of 3", Req::SetVringNum, vring_state(0, 3), &[]),
        bad("a ring of 2^16", Req::SetVringNum, vring_state(0, 1 << 16), &[]),
        bad("a ring of 2^31", Req::SetVringNum, vring_state(0, 1 << 31), &[]),
        bad("the size of ring 999", Req::SetVringNum, vring_state(999, 128), &[]),
        bad("the base of ring 999", Req::SetVringBase, vring_state(999, 0), &[]),
        bad("a base of 2^16", Req::SetVringBase, vring_state(0, 1 << 16), &[]),
        bad("ring 999 enabled", Req::SetVringEnable, vring_state(999, 1), &[]),
        bad("the addresses of ring 999", Req::SetVringAddr, other(999), &[]),
        bad("a body of one byte", Req::SetVringNum, vec![0], &[]),
        bad("a body too long", Req::SetVringNum, vec![0; 64], &[]),
        bad("the kick of ring 255 of 2", Req::SetVringKick, longs(&[255]), &[fd]),
        bad("a kick without descriptor", Req::SetVringKick, longs(&[0]), &[]),
        bad("a kick with two descriptors", Req::SetVringKick, longs(&[0]), &[fd, fd]),
        bad("a call with two descriptors", Req::SetVringCall, longs(&[0]), &[fd, fd]),
        bad("descriptors where none belong", Req::SetFeatures, longs(&[0]), &[fd; 8]),
    ]
}

/// Everything else.
fn bad_rest(memory: &Memory) -> Vec<Bad> {
    let fd = memory.file().as_raw_fd();
    let len = memory.file().metadata().expect("a memfd").len();
    vec![
        bad("features never offered", Req::SetFeatures, longs(&[u64::MAX]), &[]),
        bad("protocol features never offered", Req::SetProtocolFeatures, longs(&[u64::MAX]), &[]),
        bad("an in-flight region without file", Req::SetInflightFd, inflight(4096, 0, 1, 16), &[]),
        bad(
            "an in-flight region that runs out of its file",
            Req::SetInflightFd,
            inflight(4096, len - 64, 1, 16),
            &[fd],
        ),
        bad(
            "an in-flight region too short for its rings",
            Req::SetInflightFd,
            inflight(64, 0, 2, 1024),
            &[fd],
        ),
        bad(
            "an in-flight region of 65535 rings",
            Req::SetInflightFd,
            inflight(len, 0, u16::MAX, u16::MAX),
            &[fd],
        ),
        bad(
            "an in-flight offset that overflows",
            Req::SetInflightFd,
            inflight(4096, u64::MAX - 64, 1, 16),
            &[fd],
        ),
        bad(
            "configuration written behind its end",
            Req::SetConfig,
            [words(&[300, 1, 0]), vec![1]].concat(),
            &[],
        ),
        bad("a dirty log without file", Req::SetLogBase, longs(&[4096, 0]), &[]),
        bad("a dirty log of no bytes", Req::SetLogBase, longs(&[0, 0]), &[fd]),
        bad("a dirty log longer than its file", Req::SetLogBase, longs(&[len + 1, 0]), &[fd]),
        bad("a dirty log that overflows", Req::SetLogBase, longs(&[4096, u64::MAX - 64]), &[fd]),
        bad("a dirty log in two files", Req::SetLogBase, longs(&[4096, 0]), &[fd, fd]),
        bad("a device status of nine bits", Req::SetStatus, longs(&[0x100]), &[]),
        bad("configuration cut short", Req::SetConfig, words(&[32, 16, 0]), &[]),
        bad("the capacity written", Req::SetConfig, [words(&[0, 8, 0]), vec![1; 8]].concat(), &[]),
    ]
}

#[test]
fn bad_messages_are_refused_and_cost_their_own_connection_at_most() {
    let (_workspace, mut daemon) = server(2);
    let memory = Arc::new(Memory::new(16 * MIB, 1));
    memory.seal();
    let queue = queues_in(&memory, 1, 16).remove(0);
    let mut open = None;
    let cases = [bad_memory(&memory), bad_rings(&memory, &queue), bad_rest(&memory)];
    for case in cases.into_iter().flatten() {
        let wire = greeted(&daemon);
        match wire.try_tell_acked(case.request, &case.body, &case.fds) {
            Ok(0) => panic!("{} was accepted", case.name),
            Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("{} was not answered", case.name),
            Ok(_) | Err(_) => {}
        }
        drop(wire);
        let mut client = Client::connect(daemon.socket(), options(2));
        client.assert_works(0, 1);
        let count = daemon.open_files();
        assert_eq!(*open.get_or_insert(count), count, "{} left descriptors open", case.name);
        daemon.assert_alive();
    }
}

#[test]
fn bytes_that_are_no_message_end_their_connection_and_nothing_else() {
    let (_workspace, mut daemon) = server(1);
    let header = |request: u32, flags: u32, len: u32| words(&[request, flags, len]);
    let cases: [(&str, Vec<u8>); 8] = [
        ("a request nobody knows", header(9999, 1, 0)),
        ("request 0", header(0, 1, 0)),
        ("version 0", header(1, 0, 0)),
        ("version 3", header(1, 3, 0)),
        ("an answer nobody asked for", header(1, 1 | 1 << 2, 0)),
        ("a body of 4 GiB", header(2, 1, u32::MAX)),
        ("noise", (0..4096u32).map(|i| ((i * 37) >> 3) as u8).collect()),
        ("a body larger than any", [header(5, 1, 8192), vec![0; 8192]].concat()),
    ];
    let eventfd = vmm_sys_util::eventfd::EventFd::new(0).expect("an eventfd");
    let mut open = None;
    for (name, bytes) in cases {
        for fds in [vec![], vec![eventfd.as_raw_fd(); 10]] {
            let wire = Wire::connect(daemon.socket(), PATIENCE);
            // The server may have hung up before it has read all of it.
            if wire.send_bytes(&bytes, &fds).is_ok() {
                wire.wait_closed();
            }
            let mut client = Client::connect(daemon.socket(), options(1));
            client.assert_works(0, 2);
            let count = daemon.open_files();
            assert_eq!(*open.get_or_insert(count), count, "{name} left descriptors open");
            daemon.assert_alive();
        }
    }
    // A message that never ends, from a front end that goes away.
    for len in [1, 11, 12, 15] {
        let wire = Wire::connect(daemon.socket(), PATIENCE);
        wire.send_bytes(&[header(2, 1, 8), vec![0; 8]].concat()[..len], &[]).expect("it can be sent");
        drop(wire);
        Client::connect(daemon.socket(), options(1)).assert_works(0, 3);
    }
}

#[test]
fn a_started_ring_is_frozen() {
    let (_workspace, mut daemon) = server(1);
    for size in [1u32, 8, 32, 1024] {
        let mut client = Client::connect(daemon.socket(), options(1));
        client.assert_works(0, 1);
        // Refused, or done to the ring as a whole: never half of it under the running thread.
        let answer = client.wire.try_tell_acked(Req::SetVringNum, &vring_state(0, size), &[]);
        daemon.assert_alive();
        if matches!(answer, Ok(ack) if ack != 0) {
            client.assert_works(0, 2);
        }
        drop(client);
        Client::connect(daemon.socket(), options(1)).assert_works(0, 3);
    }
}

#[test]
fn memory_taken_away_under_a_running_ring_kills_nobody() {
    let (_workspace, mut daemon) = server(1);
    for (rings_too, sealable) in [(false, true), (true, true), (false, false), (true, false)] {
        let wire = greeted(&daemon);
        let memory = if sealable { Memory::new(16 * MIB, 1) } else { Memory::unsealable(16 * MIB) };
        let memory = Arc::new(memory);
        memory.set_table(&wire);
        let queues = queues_in(&memory, 1, 16);
        set_up_ring(&wire, &memory, &queues[0], 0);
        wire.set_vring(Req::SetVringEnable, 0, 1);
        let mut client = Client::assembled(wire, memory.clone(), queues, options(1));
        client.queues[0].event_idx = false;
        client.assert_works(0, 1);
        // Data in the second half of the file, which goes; or everything goes.
        let gone = memory.regions()[0].guest + 8 * MIB;
        let statuses = [
            client.queues[0].submit_framed(1, 1, 0, &[Descriptor::readable(gone, 4096)]),
            client.queues[0].submit_framed(2, 0, 0, &[Descriptor::writable(gone, 4096)]),
        ];
        client.queues[0].store_avail();
        // The server seals what can be sealed against shrinking.
        let taken = memory.file().set_len(if rings_too { 0 } else { 8 * MIB });
        assert_eq!(taken.is_err(), sealable, "a file that can be sealed is");
        client.queues[0].kick();
        if sealable || !rings_too {
            let mut done = Vec::new();
            while done.len() < 2 {
                client.wait(&mut done);
            }
            let expected = if sealable { client::request::OK } else { client::request::IOERR };
            for at in statuses {
                let mut status = [0];
                memory.read(at, &mut status);
                assert_eq!(status, [expected]);
            }
            client.assert_works(0, 2);
        }
        daemon.assert_alive();
        drop(client);
        Client::connect(daemon.socket(), options(1)).assert_works(0, 3);
        daemon.assert_alive();
    }
}

#[test]
fn an_in_flight_region_that_could_become_shorter_is_refused() {
    let (_workspace, mut daemon) = server(1);
    for (memory, accepted) in [(Memory::unsealable(MIB), false), (Memory::new(MIB, 1), true)] {
        let wire = greeted(&daemon);
        let fd = memory.file().as_raw_fd();
        let answer = wire.try_tell_acked(Req::SetInflightFd, &inflight(MIB, 0, 1, 16), &[fd]);
        assert_eq!(matches!(answer, Ok(0)), accepted, "{answer:?}");
        // What was accepted cannot become shorter any more.
        assert_eq!(memory.file().set_len(0).is_err(), accepted);
        drop(wire);
        Client::connect(daemon.socket(), options(1)).assert_works(0, 1);
        daemon.assert_alive();
    }
}

#[test]
fn an_in_flight_region_full_of_noise_is_survived() {
    use std::os::unix::fs::FileExt;
    let (_workspace, mut daemon) = server(2);
    let mut rng = client::Rng::new(11);
    for round in 0..40 {
        let wire = greeted(&daemon);
        let region = Inflight::get(&wire, 2, 16);
        let len = u64::from_le_bytes(region.body[..8].try_into().expect("eight bytes"));
        let mut noise: Vec<u8> = (0..len).map(|_| rng.next_u64() as u8).collect();
        // Half of them with a header that passes, so that the entries are looked at.
        if round % 2 == 0 {
            for at in [0, len as usize / 2] {
                noise[at..at + 8].fill(0);
                noise[at + 8..at + 12].copy_from_slice(&[1, 0, 16, 0]);
                noise[at + 12..at + 16].fill(if round % 4 == 0 { 0 } else { 0xff });
            }
        }
        region.file.write_all_at(&noise, 0).expect("the region can be written");
        // Refused or taken: either way nobody dies, and the next front end finds a whole server.
        let taken = wire.try_tell_acked(Req::SetInflightFd, &region.body, &[region.file.as_raw_fd()]);
        if matches!(taken, Ok(0)) {
            let memory = Arc::new(Memory::new(4 * MIB, 1));
            memory.set_table(&wire);
            for queue in &queues_in(&memory, 2, 16) {
                let body = ring_addresses(&memory, queue, 0);
                drop(wire.try_tell_acked(Req::SetVringNum, &vring_state(queue.index, 16), &[]));
                drop(wire.try_tell_acked(Req::SetVringAddr, &body, &[]));
                let kick = u64::from(queue.index).to_le_bytes();
                drop(wire.try_tell_acked(Req::SetVringKick, &kick, &[queue.kick.as_raw_fd()]));
                drop(wire.try_tell_acked(Req::SetVringEnable, &vring_state(queue.index, 1), &[]));
            }
        }
        drop(wire);
        Client::connect(daemon.socket(), options(2)).assert_works(0, round as u8);
        daemon.assert_alive();
    }
}

#[test]
fn a_front_end_that_leaves_its_own_socket_behind_is_gone_all_the_same() {
    let (_workspace, mut daemon) = server(1);
    let whole = [words(&[Req::SetVringKick as u32, 1, 8]), longs(&[0])].concat();
    // In a message, and in one that never ends.
    for len in [whole.len(), 14] {
        let wire = greeted(&daemon);
        wire.send_bytes(&whole[..len], &[wire.as_raw_fd()]).expect("it can be sent");
        drop(wire);
        Client::connect(daemon.socket(), options(1)).assert_works(0, 1);
        daemon.assert_alive();
    }
}

/// A message that may be right, nearly right, or wrong; numbers are such that they often fit together.
fn random_message(rng: &mut client::Rng, memory: &Memory, queues: &[Queue]) -> (u32, Vec<u8>, Vec<RawFd>) {
    const KNOWN: [Req; 28] = [
        Req::GetFeatures,
        Req::SetFeatures,
        Req::SetOwner,
        Req::ResetOwner,
        Req::SetMemTable,
        Req::SetLogBase,
        Req::SetVringNum,
        Req::SetVringAddr,
        Req::SetVringBase,
        Req::GetVringBase,
        Req::SetVringKick,
        Req::SetVringCall,
        Req::SetVringErr,
        Req::GetProtocolFeatures,
        Req::SetProtocolFeatures,
        Req::GetQueueNum,
        Req::SetVringEnable,
        Req::GetConfig,
        Req::SetConfig,
        Req::GetInflightFd,
        Req::SetInflightFd,
        Req::ResetDevice,
        Req::GetMaxMemSlots,
        Req::AddMemReg,
        Req::RemMemReg,
        Req::SetStatus,
        Req::GetStatus,
        Req::SetLogFd,
    ];
    const RING: [Req; 8] = [
        Req::SetVringNum,
        Req::SetVringAddr,
        Req::SetVringBase,
        Req::GetVringBase,
        Req::SetVringKick,
        Req::SetVringCall,
        Req::SetVringEnable,
        Req::SetVringEnable,
    ];
    let choice: &[Req] = if rng.chance(80) { &RING } else { &KNOWN };
    let request = choice[rng.below(choice.len() as u64) as usize];
    let queue = &queues[rng.below(2) as usize];
    let index = if rng.chance(99) { queue.index } else { rng.below(300) as u16 };
    let region = memory.regions()[rng.below(2) as usize];
    let number = [0, 1, 1, 1, 16, 16, 16, 16, 17, 1 << 20][rng.below(10) as usize];
    let memfd = memory.file().as_raw_fd();
    let event = queue.kick.as_raw_fd();
    let mut features = feature::VERSION_1 | feature::PROTOCOL_FEATURES | (u64::from(number & 1) << 29);
    if rng.chance(20) {
        features |= [feature::LOG_ALL, feature::RING_PACKED][rng.below(2) as usize];
    }
    let (mut body, mut fds) = match request {
        Req::SetFeatures => (longs(&[features]), vec![]),
        Req::SetProtocolFeatures => (longs(&[0x1920b | rng.below(2) << 3]), vec![]),
        Req::SetMemTable => (table(memory.regions()), vec![memfd; 2]),
        Req::AddMemReg => (single(region), vec![memfd]),
        Req::RemMemReg => (single(region), vec![]),
        Req::SetVringAddr => {
            let mut body = ring_addresses(memory, queue, queue.used_at);
            body[4] = rng.chance(30).into();
            (body, vec![])
        }
        Req::SetLogBase => (longs(&[1 << 18, 4096 * rng.below(2)]), vec![memfd]),
        Req::SetStatus => (longs(&[[0, 1, 4, 15, 15][rng.below(5) as usize]]), vec![]),
        Req::SetLogFd => (longs(&[0]), vec![event]),
        Req::SetVringNum | Req::SetVringBase | Req::GetVringBase | Req::SetVringEnable => {
            (vring_state(index, number), vec![])
        }
        Req::SetVringKick | Req::SetVringCall | Req::SetVringErr => (longs(&[u64::from(index)]), vec![event]),
        Req::GetConfig => ([words(&[0, 60, 0]), vec![0; 60]].concat(), vec![]),
        Req::SetConfig => ([words(&[32, 1, 0]), vec![1]].concat(), vec![]),
        Req::GetInflightFd => (inflight(0, 0, 2, 16), vec![]),
        Req::SetInflightFd => (inflight(4096, 0, 2, 16), vec![memfd]),
        _ => (vec![], vec![]),
    };
    if rng.chance(2) && !body.is_empty() {
        let at = rng.below(body.len() as u64) as usize;
        body[at] = rng.next_u64() as u8;
    }
    if rng.chance(1) {
        body.truncate(rng.below(body.len() as u64 + 1) as usize);
    }
    if rng.chance(1) {
        fds = vec![event; rng.below(4) as usize];
    }
    (request as u32, body, fds)
}

#[test]
fn messages_in_any_order_leave_a_whole_server() {
    let seed = client::Rng::seed_from_env("PCACHE_SEED");
    eprintln!("PCACHE_SEED={seed}");
    let mut rng = client::Rng::new(seed);
    let (_workspace, mut daemon) = server(2);
    let memory = Arc::new(Memory::new(4 * MIB, 2));
    memory.seal();
    let (mut open, mut served) = (None, 0);
    for round in 0..300 {
        // A third begins as strangers, a third after the greeting, a third with rings that run.
        let wire = if round % 3 == 0 { Wire::connect(daemon.socket(), PATIENCE) } else { greeted(&daemon) };
        let mut queues = queues_in(&memory, 2, 16);
        if round % 3 == 2 {
            memory.set_table(&wire);
            for queue in &queues {
                set_up_ring(&wire, &memory, queue, 0);
                wire.set_vring(Req::SetVringEnable, queue.index, 1);
            }
        }
        let flush = client::Request::flush();
        for queue in &mut queues {
            for tag in 0..3 {
                assert!(queue.submit(tag, &flush, &client::Layout::plain(&flush)));
            }
            queue.publish();
        }
        for _ in 0..rng.between(1, 60) {
            let (request, body, fds) = random_message(&mut rng, &memory, &queues);
            let flags = if rng.chance(50) { client::wire::NEED_REPLY } else { 0 };
            if wire.send_raw(request, 1 | flags, &body, &fds).is_err() {
                break;
            }
            if rng.chance(30) {
                queues.iter_mut().for_each(Queue::kick);
            }
            wire.drain();
        }
        wire.finish();
        wire.wait_closed();
        served += queues.iter().filter(|queue| queue.used_index() != 0).count();
        if round % 10 == 0 {
            let mut client = Client::connect(daemon.socket(), options(2));
            client.assert_works(0, 1);
            client.assert_works(1, 2);
            let count = daemon.open_files();
            assert_eq!(*open.get_or_insert(count), count, "round {round} left descriptors open");
        }
        daemon.assert_alive();
    }
    eprintln!("{served} rings served requests");
    assert!(served > 0, "no ring ever ran: the test has lost its teeth");
}
