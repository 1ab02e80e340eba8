//! Bad guests and bad front ends while the daemon is replaced, and while their memory is logged: what
//! `hostile_guest`, `hostile_memory` and `packed` claim of one process holds across two, on both layouts.
//!
//! A successor is told of a session by its predecessor, but the memory behind it is the VMM's, who may
//! change it between the two: it costs that VMM its ring or its connection, and nobody else anything.

mod client;

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use client::attacks::{self, Attack};
use client::front::{ring_addresses, set_up_ring};
use client::request::OK;
use client::ring::Descriptor;
use client::wire::{longs, vring_state};
use client::{
    Client, ClientOptions, Daemon, Layout, Memory, Notify, Region, Req, Request, Rng, Wire, Workspace,
};
use client::{feature, protocol};

const MIB: u64 = 1 << 20;
const DISK: u64 = 64 * MIB;
const PAGE: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(20);

fn options(packed: bool) -> ClientOptions {
    let mem_size = 16 * MIB;
    ClientOptions {
        queues: 2,
        queue_size: 16,
        packed,
        mem_size,
        patience: PATIENCE,
        ..ClientOptions::default()
    }
}

/// A daemon with one volume that can be taken over from.
fn daemon(workspace: &Workspace) -> Daemon {
    let control = workspace.path("control.sock");
    Daemon::cached(workspace, "64MiB", DISK, 2, &["--control", control.to_str().expect("text")])
}

/// A daemon with two volumes that can be taken over from, and their sockets.
fn two_volumes(workspace: &Workspace) -> (Daemon, [PathBuf; 2]) {
    let path = |name: &str| workspace.path(name).display().to_string();
    let sockets = ["a", "b"].map(|name| workspace.path(&format!("{name}.sock")));
    let mut config = format!(
        "[control]\nsocket = {:?}\n[[cache]]\nname = \"c\"\npath = {:?}\nsize = \"64MiB\"\n",
        path("control.sock"),
        path("cache.img")
    );
    for name in ["a", "b"] {
        workspace.disk(&format!("{name}.img"), DISK);
        config += &format!(
            "[[volume]]\nname = {name:?}\nsocket = {:?}\nbacking = {:?}\nqueues = 2\n",
            path(&format!("{name}.sock")),
            path(&format!("{name}.img"))
        );
    }
    (Daemon::configured(workspace, &config, &sockets[0]), sockets)
}

/// Replaces the daemon, doing `meanwhile` again and again.
fn replace(daemon: &mut Daemon, mut meanwhile: impl FnMut()) {
    daemon.spawn_successor();
    let deadline = Instant::now() + 3 * PATIENCE;
    while !daemon.has_taken_over() {
        meanwhile();
        assert!(Instant::now() < deadline, "the hand-over takes for ever; they said\n{}", daemon.read_log());
    }
}

/// A write and a read back on queue 1 alone: ring 0 may be no ring any more.
fn neighbour_works(client: &mut Client, stamp: u8) {
    let sector = 100_000 + u64::from(stamp);
    let write = Request::write(sector, vec![stamp; 512]);
    for (request, data) in [(write, vec![]), (Request::read(sector, 512), vec![stamp; 512])] {
        assert!(client.submit(1, 1, &request, &Layout::plain(&request)));
        client.queues[1].publish();
        let deadline = Instant::now() + PATIENCE;
        let mut done = Vec::new();
        while done.is_empty() {
            client.queues[1].collect(&mut done);
            assert!(Instant::now() < deadline, "the neighbour of a bad ring hangs");
            assert!(!client.wire.is_closed(), "a bad ring ended the connection");
            std::thread::yield_now();
        }
        assert_eq!((done[0].status, &done[0].data), (OK, &data));
    }
}

/// Has ring 0 look at what was done to it.
fn attack(client: &mut Client, packed: bool, attack: Attack) {
    attack(client);
    if !packed {
        client.queues[0].store_avail();
    }
    client.queues[0].kick();
}

/// Stops ring 0, whatever it is, and begins it anew.
fn begin_anew(client: &mut Client, packed: bool) {
    client.wire.get_vring_position(0);
    client.queues[0].reset();
    client.set_up_ring(0, if packed { 0x8000_8000 } else { 0 });
    client.wire.set_vring(Req::SetVringEnable, 0, 1);
}

/// Each attack before a hand-over or in the middle of one, by turns, and again after it.
fn bad_rings(packed: bool, attacks: &[(&str, Attack)]) {
    let workspace = Workspace::new();
    let mut daemon = daemon(&workspace);
    for (number, (name, bad)) in attacks.iter().enumerate() {
        eprintln!("attack: {name}");
        let mut client = Client::connect(daemon.socket(), options(packed));
        client.assert_works(0, 1);
        let mut stamp = 0;
        let mut works = |client: &mut Client| {
            stamp = stamp % 200 + 1;
            neighbour_works(client, stamp);
        };
        if number % 2 == 0 {
            attack(&mut client, packed, *bad);
            works(&mut client);
            replace(&mut daemon, || works(&mut client));
        } else {
            // Some of the neighbour's requests later: wherever the two processes are then.
            let mut left = number % 7 * 10;
            replace(&mut daemon, || {
                works(&mut client);
                if left == 0 {
                    attack(&mut client, packed, *bad);
                }
                left = left.wrapping_sub(1);
            });
        }
        works(&mut client);
        // Whatever became of the ring, a driver that begins anew is served, and may go wrong again.
        begin_anew(&mut client, packed);
        client.assert_works(0, 2);
        attack(&mut client, packed, *bad);
        for _ in 0..20 {
            works(&mut client);
        }
        daemon.assert_alive();
        drop(client);
        Client::connect(daemon.socket(), options(packed)).assert_works(0, 3);
    }
    daemon.stop();
}

#[test]
fn a_bad_split_ring_breaks_itself_alone_before_during_and_after_a_hand_over() {
    bad_rings(false, attacks::split::ALL);
}

#[test]
fn a_bad_packed_ring_breaks_itself_alone_before_during_and_after_a_hand_over() {
    bad_rings(true, attacks::packed::ALL);
}

/// The dirty log of `client`, given to the server, and asked for as QEMU does it.
fn log(client: &Client) -> Memory {
    let end = client.memory.regions().iter().map(|region| region.guest + region.len).max();
    let len = (end.expect("there is memory") / PAGE).div_ceil(64) * 8;
    let log = Memory::new(len.next_multiple_of(PAGE), 1);
    let reply = client.wire.ask(Req::SetLogBase, &longs(&[len, 0]), &[log.file().as_raw_fd()]);
    assert_eq!(reply.as_u64(), 0);
    client.wire.set_u64(Req::SetFeatures, client.features | feature::LOG_ALL);
    for queue in &client.queues {
        let mut body = ring_addresses(&client.memory, queue, queue.used_at);
        body[4] = 1;
        client.wire.tell(Req::SetVringAddr, &body, &[]);
    }
    log
}

/// The pages in the log, which are forgotten.
fn logged(log: &Memory) -> BTreeSet<u64> {
    let mut bytes = vec![0; log.file().metadata().expect("a memfd").len() as usize];
    log.file().read_exact_at(&mut bytes, 0).expect("the log is whole");
    log.file().write_all_at(&vec![0; bytes.len()], 0).expect("the log is ours");
    (0..bytes.len() as u64 * 8).filter(|page| bytes[(page / 8) as usize] >> (page % 8) & 1 == 1).collect()
}

/// Each attack on a ring whose memory is logged: nothing is logged that is no memory of the guest's, and
/// what the neighbour is told is. Half of them after a hand-over, which the log outlives.
fn bad_logged_rings(packed: bool, attacks: &[(&str, Attack)]) {
    let workspace = Workspace::new();
    let mut daemon = daemon(&workspace);
    for (number, (name, bad)) in attacks.iter().enumerate() {
        eprintln!("attack: {name}");
        let options = ClientOptions { notify: Notify::Poll, ..options(packed) };
        let mut client = Client::connect(daemon.socket(), options);
        assert_ne!(client.protocol & protocol::LOG_SHMFD, 0);
        let log = log(&client);
        client.assert_works(0, 1);
        if number % 4 == 3 {
            replace(&mut daemon, || neighbour_works(&mut client, 5));
        }
        attack(&mut client, packed, *bad);
        logged(&log);
        for stamp in 1..10 {
            neighbour_works(&mut client, stamp);
        }
        let pages = logged(&log);
        let is_memory = |page: &u64| {
            let of = |region: &Region| (region.guest..region.guest + region.len).contains(&(page * PAGE));
            client.memory.regions().iter().any(of)
        };
        assert!(pages.iter().all(is_memory), "{name}: logged and no memory: {pages:?}");
        let ring = client.queues[1].used_at.min(client.queues[1].desc_at) / PAGE;
        let last = client.queues[1].used_at.max(client.queues[1].desc_at) / PAGE;
        assert!(pages.range(ring..=last).next().is_some(), "{name}: the neighbour's ring is not logged");
        daemon.assert_alive();
        begin_anew(&mut client, packed);
        client.assert_works(0, 2);
    }
    daemon.stop();
}

#[test]
fn a_bad_split_ring_under_a_dirty_log_breaks_itself_alone_and_logs_nothing_that_is_not_there() {
    bad_logged_rings(false, attacks::split::ALL);
}

#[test]
fn a_bad_packed_ring_under_a_dirty_log_breaks_itself_alone_and_logs_nothing_that_is_not_there() {
    bad_logged_rings(true, attacks::packed::ALL);
}

/// Works on `socket` until told to stop; how often.
fn neighbour(socket: PathBuf, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<u64> {
    let stop = Arc::clone(stop);
    std::thread::spawn(move || {
        let mut client = Client::connect(&socket, options(false));
        let mut rounds = 0;
        while !stop.load(Ordering::Relaxed) {
            client.assert_works(0, (rounds % 250) as u8 + 1);
            rounds += 1;
        }
        rounds
    })
}

/// A client with one ring in the first mebibyte of memory that can become shorter.
fn unsealable(socket: &Path, packed: bool) -> Client {
    let mut wire = Wire::connect(socket, PATIENCE);
    wire.tell(Req::SetOwner, &[], &[]);
    let features = wire.get_u64(Req::GetFeatures);
    let offered = wire.get_u64(Req::GetProtocolFeatures);
    wire.set_u64(Req::SetProtocolFeatures, offered & (protocol::MQ | protocol::REPLY_ACK));
    wire.need_reply = true;
    let layout = if packed { feature::RING_PACKED } else { 0 };
    let taken = feature::VERSION_1 | feature::PROTOCOL_FEATURES | feature::BLK_FLUSH | layout;
    wire.set_u64(Req::SetFeatures, features & taken);
    let memory = Arc::new(Memory::unsealable(8 * MIB));
    memory.set_table(&wire);
    let first = Region { len: MIB, ..memory.regions()[0] };
    let mut queue = client::Queue::new(memory.clone(), 0, 16, [(first.guest, first.len)]);
    queue.packed = packed.then(|| client::packed::Packed::new(16));
    set_up_ring(&wire, &memory, &queue, if packed { 0x8000_8000 } else { 0 });
    wire.set_vring(Req::SetVringEnable, 0, 1);
    Client::assembled(wire, memory, vec![queue], ClientOptions { queues: 1, ..options(packed) })
}

#[test]
fn memory_that_vanishes_during_a_hand_over_costs_its_own_connection_at_most() {
    let seed = Rng::seed_from_env("PCACHE_SEED");
    eprintln!("PCACHE_SEED={seed}");
    let mut rng = Rng::new(seed);
    let workspace = Workspace::new();
    let (mut daemon, [bad, good]) = two_volumes(&workspace);
    let stop = Arc::new(AtomicBool::new(false));
    let neighbour = neighbour(good, &stop);
    let mut ended = 0;
    for round in 0..16 {
        let packed = round % 2 == 0;
        let mut client = unsealable(&bad, packed);
        client.assert_works(0, 1);
        // Some of the data in what goes.
        for tag in 0..4 {
            let piece = Descriptor::readable((1 + tag) * MIB, 1 << 20);
            client.queues[0].submit_framed(tag, 1, tag * 2048, &[piece]);
        }
        let file = client.memory.file().try_clone().expect("a descriptor more");
        // Everything, the ring included, or what the requests are about.
        let (delay, rest) = (rng.below(150_000), if rng.chance(30) { 0 } else { MIB + rng.below(6 * MIB) });
        let shrinker = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(delay));
            file.set_len(rest).expect("nobody can seal it");
        });
        client.queues[0].publish();
        client.queues[0].kick();
        replace(&mut daemon, || std::thread::sleep(Duration::from_millis(1)));
        shrinker.join().expect("the shrinker has nothing to fail");
        std::thread::sleep(Duration::from_millis(10));
        ended += u32::from(client.wire.is_closed());
        drop(client);
        // Its volume is whole: the next front end works.
        Client::connect(&bad, options(packed)).assert_works(0, 9);
        daemon.assert_alive();
    }
    stop.store(true, Ordering::Relaxed);
    let rounds = neighbour.join().expect("the neighbour notices nothing");
    eprintln!("{ended} of 16 connections could not go on; the neighbour did {rounds} rounds");
    assert!(ended > 0 && ended < 16, "the test has lost its teeth");
    daemon.stop();
}

#[test]
fn an_in_flight_area_scribbled_on_during_a_hand_over_costs_its_own_rings_at_most() {
    let seed = Rng::seed_from_env("PCACHE_SEED");
    eprintln!("PCACHE_SEED={seed}");
    let workspace = Workspace::new();
    let (mut daemon, [bad, good]) = two_volumes(&workspace);
    let stop = Arc::new(AtomicBool::new(false));
    let neighbour = neighbour(good, &stop);
    for round in 0..12u64 {
        let packed = round % 2 == 0;
        let mut client = Client::connect(&bad, options(packed));
        client.assert_works(0, 1);
        for tag in 0..8 {
            let request = Request::write(tag * 8, vec![3; 4096]);
            assert!(client.submit(tag as usize % 2, tag, &request, &Layout::plain(&request)));
        }
        let area = client.inflight.as_ref().expect("it tracks what is in flight");
        let file = area.file.try_clone().expect("a descriptor more");
        let done = Arc::new(AtomicBool::new(false));
        let scribbler = std::thread::spawn({
            let (done, mut rng) = (Arc::clone(&done), Rng::new(seed ^ round));
            move || {
                let len = file.metadata().expect("a memfd").len();
                while !done.load(Ordering::Relaxed) {
                    // Half of it small numbers: entries that might be.
                    let value = if rng.chance(50) { rng.below(17) } else { rng.next_u64() };
                    let at = rng.below(len);
                    let bytes = &value.to_le_bytes()[..(1 + rng.below(8)).min(len - at) as usize];
                    file.write_all_at(bytes, at).expect("it can be written");
                }
            }
        });
        client.queues.iter_mut().for_each(|queue| queue.publish());
        replace(&mut daemon, || std::thread::sleep(Duration::from_millis(1)));
        done.store(true, Ordering::Relaxed);
        scribbler.join().expect("the scribbler has nothing to fail");
        drop(client);
        Client::connect(&bad, options(packed)).assert_works(0, 9);
        daemon.assert_alive();
    }
    stop.store(true, Ordering::Relaxed);
    assert!(neighbour.join().expect("the neighbour notices nothing") > 0);
    daemon.stop();
}

#[test]
fn a_ring_that_was_taken_over_is_frozen_like_any_that_runs() {
    let workspace = Workspace::new();
    let mut daemon = daemon(&workspace);
    for packed in [false, true] {
        for size in [1u32, 8, 32, 1024] {
            let mut client = Client::connect(daemon.socket(), options(packed));
            client.assert_works(0, 1);
            replace(&mut daemon, || neighbour_works(&mut client, 1));
            // Refused, or done to the ring as a whole: never half of it under the running thread.
            let answer = client.wire.try_tell_acked(Req::SetVringNum, &vring_state(0, size), &[]);
            daemon.assert_alive();
            if matches!(answer, Ok(ack) if ack != 0) {
                client.assert_works(0, 2);
            }
            drop(client);
            Client::connect(daemon.socket(), options(packed)).assert_works(0, 3);
        }
    }
    daemon.stop();
}
