//! Packed rings: what a guest sees of them is what it sees of split ones, also over a killed server, and
//! a bad one harms nobody else.

mod client;

use std::time::{Duration, Instant};

use client::attacks;
use client::attacks::packed::{WRITE, part};
use client::request::{IOERR, OK};
use client::ring::Descriptor;
use client::{
    Client, ClientOptions, Completion, Daemon, Layout, Mix, Req, Request, RestartBase, Rng, Traffic,
    Workspace, feature,
};

const MIB: u64 = 1 << 20;
const DISK: u64 = 64 * MIB;
const PATIENCE: Duration = Duration::from_secs(20);

fn server(queues: u16) -> (Workspace, Daemon) {
    let workspace = Workspace::new();
    let daemon = Daemon::cached(&workspace, "64MiB", DISK, queues, &[]);
    (workspace, daemon)
}

fn options(queues: u16, queue_size: u16) -> ClientOptions {
    ClientOptions { queues, queue_size, packed: true, patience: PATIENCE, ..ClientOptions::default() }
}

#[test]
fn traffic_over_packed_rings_is_right_with_and_without_each_feature() {
    let seed = Rng::seed_from_env("PCACHE_SEED");
    let (_workspace, daemon) = server(2);
    for (event_idx, indirect) in [(true, true), (true, false), (false, true), (false, false)] {
        let shape = ClientOptions { event_idx, indirect, ..options(2, 64) };
        let client = Client::connect(daemon.socket(), shape);
        assert_ne!(client.features & feature::RING_PACKED, 0);
        let mut traffic = Traffic::new(client, seed, Mix::default());
        traffic.run(4000);
        traffic.quiesce();
        let sectors = traffic.model.sectors();
        // The next round begins on a disk of zeros.
        traffic.verify(0..sectors);
        let zero = client::Range { sector: 0, sectors: sectors as u32, flags: 0 };
        let done = traffic.client.execute(&Request::ranges(client::Kind::WriteZeroes, &[zero]));
        assert_eq!(done.status, OK);
    }
}

#[test]
fn killed_on_packed_rings_nothing_is_lost() {
    let seed = Rng::seed_from_env("PCACHE_SEED");
    let workspace = Workspace::new();
    let mut daemon = Daemon::cached(&workspace, "64MiB", DISK, 4, &[]);
    let client = Client::connect(daemon.socket(), options(4, 128));
    let mut traffic = Traffic::new(client, seed, Mix::default());
    let kills = match std::env::var("PCACHE_KILLS") {
        Ok(text) => text.parse().expect("PCACHE_KILLS is a number"),
        Err(_) => 12,
    };
    let mut in_flight = 0;
    for kill in 0..kills {
        // Every fourth life is killed before it has served a request of its own.
        if kill % 4 != 3 {
            let operations = traffic.rng.between(1, 1500);
            traffic.run(operations);
        }
        in_flight += traffic.client.outstanding();
        // Where the ring began, or what the driver has made available: neither is where it stands.
        let base = if kill % 2 == 0 { RestartBase::Used } else { RestartBase::Available };
        traffic.client.options.restart_base = base;
        let until = Instant::now() + Duration::from_micros(traffic.rng.below(3000));
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        daemon.kill();
        daemon.restart();
        traffic.client.reconnect();
    }
    traffic.quiesce();
    traffic.verify(0..traffic.model.sectors());
    eprintln!("kills={kills} in_flight_at_kills={in_flight} lost=0 {:?}", traffic.tally);
    assert!(in_flight as u64 >= kills, "hardly anything was in flight at the kills");
}

#[test]
fn a_ring_that_was_stopped_goes_on_where_it_stood_over_many_rounds() {
    let (_workspace, daemon) = server(1);
    for queue_size in [8, 7, 5] {
        let mut client = Client::connect(daemon.socket(), options(1, queue_size));
        for round in 0..40u8 {
            client.assert_works(0, round % 9 + 1);
            let position = client.wire.get_vring_position(0);
            assert_eq!(position, client.queues[0].base(true), "size {queue_size}, round {round}");
            client.set_up_ring(0, position);
            client.wire.set_vring(Req::SetVringEnable, 0, 1);
        }
    }
}

/// Chains as Windows guests send them, and worse.
fn long_chains(packed: bool) {
    let seed = Rng::seed_from_env("PCACHE_SEED");
    eprintln!("PCACHE_SEED={seed}");
    let mut rng = Rng::new(seed);
    let workspace = Workspace::new();
    let daemon = Daemon::cached(&workspace, "64MiB", DISK, 1, &["--queue-size", "1024"]);
    for indirect in [false, true] {
        let queue_size = if indirect { 128 } else { 1024 };
        let shape = ClientOptions { packed, ..options(1, queue_size) };
        let mut client = Client::connect(daemon.socket(), shape);
        let mut longest = 0;
        for round in 0..30 {
            let data: Vec<u8> = (0..256 * 1024).map(|_| rng.next_u64() as u8).collect();
            let (write, read) = (Request::write(64, data.clone()), Request::read(64, data.len()));
            for request in [&write, &read] {
                let layout = match round % 2 {
                    0 => Layout::segmented(request, &mut rng, 512, indirect),
                    _ => Layout::ragged(request, &mut rng, 600, indirect),
                };
                longest = longest.max(layout.len());
                let done = client.execute_on(0, request, &layout);
                assert_eq!(done.status, OK, "{} descriptors, indirect: {indirect}", layout.len());
                assert!(request.in_len == 0 || done.data == data, "the bytes of round {round}");
            }
        }
        assert!(longest >= 500, "the longest chain had {longest} descriptors only");
    }
}

#[test]
fn chains_of_500_segments_in_any_split_are_served_on_packed_rings() {
    long_chains(true);
}

#[test]
fn chains_of_500_segments_in_any_split_are_served_on_split_rings() {
    long_chains(false);
}

#[test]
fn a_bad_packed_ring_breaks_itself_and_neither_its_neighbour_nor_the_server() {
    let (_workspace, mut daemon) = server(2);
    for (name, attack) in attacks::packed::ALL {
        eprintln!("attack: {name}");
        let mut client = Client::connect(daemon.socket(), options(2, 16));
        client.assert_works(0, 1);
        attack(&mut client);
        client.queues[0].kick();
        let deadline = Instant::now() + PATIENCE;
        while client.queues[0].err.read().is_err() {
            neighbour_works(&mut client, 7);
            assert!(Instant::now() < deadline, "{name}: the ring is not broken");
        }
        neighbour_works(&mut client, 8);
        daemon.assert_alive();
        // It can be stopped, and a driver that begins anew is served.
        client.wire.get_vring_position(0);
        client.queues[0].reset();
        client.set_up_ring(0, 0x8000_8000);
        client.wire.set_vring(Req::SetVringEnable, 0, 1);
        client.assert_works(0, 3);
    }
}

#[test]
fn a_header_cut_short_or_missing_is_an_error_and_not_the_end_of_a_packed_ring() {
    let (_workspace, daemon) = server(1);
    let mut client = Client::connect(daemon.socket(), options(1, 16));
    for layout in [vec![], vec![8], vec![15]] {
        let mut chain: Vec<_> = layout.iter().map(|&len| part(&mut client, len, 0)).collect();
        chain.push(part(&mut client, 1, WRITE));
        let status = chain[chain.len() - 1].addr;
        client.queues[0].submit_raw(5, &chain);
        client.queues[0].publish();
        let mut done: Vec<(usize, Completion)> = Vec::new();
        client.wait(&mut done);
        let mut byte = [0];
        client.memory.read(status, &mut byte);
        assert_eq!((done[0].1.tag, byte), (5, [IOERR]));
    }
    client.assert_works(0, 1);
}

#[test]
fn random_packed_rings_break_nothing_but_themselves() {
    let seed = Rng::seed_from_env("PCACHE_SEED");
    eprintln!("PCACHE_SEED={seed}");
    let mut rng = Rng::new(seed);
    let (_workspace, mut daemon) = server(2);
    let mut client = Client::connect(daemon.socket(), options(2, 16));
    let mut moved = 0;
    for round in 0..600 {
        let buffer = client.queues[0].alloc(4096);
        let noise: Vec<u8> = (0..4096).map(|_| rng.next_u64() as u8 & 0x0f).collect();
        client.memory.write(buffer, &noise);
        for slot in 0..16 {
            let addr = match rng.below(12) {
                0 => rng.next_u64() | 1 << 62,
                1 => client.queues[0].desc_at + 16 * rng.below(16),
                2 => u64::MAX - rng.below(512),
                _ => buffer + 16 * rng.below(200),
            };
            let len = [0, 1, 1, 16, 16, 512, 512, rng.next_u64() as u32][rng.below(8) as usize];
            let flags = [0, 1, 1, 2, 2, 2, 3, 4, rng.next_u64() as u16][rng.below(9) as usize];
            let state = [1 << 7, 1 << 7, 1 << 7, 1 << 15, 0][rng.below(5) as usize];
            let id = rng.below(17) as u16;
            let descriptor = Descriptor { addr, len, flags: id, next: flags ^ state };
            client.queues[0].write_descriptor(slot, descriptor);
        }
        client.queues[0].kick();
        neighbour_works(&mut client, round as u8 % 200);
        daemon.assert_alive();
        moved += u32::from(client.wire.get_vring_position(0) != 0x8000_8000);
        client.queues[0].free_raw(buffer, 4096);
        client.queues[0].reset();
        client.set_up_ring(0, 0x8000_8000);
        client.wire.set_vring(Req::SetVringEnable, 0, 1);
        if round % 50 == 0 {
            client.assert_works(0, 1);
            client.wire.get_vring_position(0);
            client.queues[0].reset();
            client.set_up_ring(0, 0x8000_8000);
            client.wire.set_vring(Req::SetVringEnable, 0, 1);
        }
    }
    eprintln!("{moved} random rings got something answered");
    assert!(moved > 0, "no random chain was ever answered: the test has lost its teeth");
}

/// A write and a read back on queue 1 alone, of sectors that no other test of this file writes at random.
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
