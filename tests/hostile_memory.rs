//! Guest memory that is not still: it changes while it is written to the disk, ends where a buffer goes
//! on, or vanishes at any moment. Each costs the request that touched it, and nothing else: not its
//! ring, not the volume beside it, not the daemon, and not what the cache believes of its own bytes.

mod client;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use client::front::set_up_ring;
use client::request::{IOERR, OK};
use client::ring::Descriptor;
use client::{
    Client, ClientOptions, Daemon, Memory, Region, Req, Request, Rng, Wire, Workspace, daemon, feature,
    protocol,
};

const MIB: u64 = 1 << 20;
const DISK: u64 = 32 * MIB;
const PATIENCE: Duration = Duration::from_secs(20);

fn options() -> ClientOptions {
    ClientOptions { queues: 1, queue_size: 16, patience: PATIENCE, ..ClientOptions::default() }
}

/// A client on `memory` with its one ring in the first mebibyte.
fn client_on(socket: &std::path::Path, memory: Memory) -> Client {
    let mut wire = Wire::connect(socket, PATIENCE);
    wire.tell(Req::SetOwner, &[], &[]);
    let features = wire.get_u64(Req::GetFeatures);
    let offered = wire.get_u64(Req::GetProtocolFeatures);
    wire.set_u64(Req::SetProtocolFeatures, offered & (protocol::MQ | protocol::REPLY_ACK));
    wire.need_reply = true;
    let taken = feature::VERSION_1 | feature::PROTOCOL_FEATURES | feature::BLK_FLUSH;
    wire.set_u64(Req::SetFeatures, features & taken);
    let memory = Arc::new(memory);
    memory.set_table(&wire);
    let first = Region { len: MIB, ..memory.regions()[0] };
    let queue = client::Queue::new(memory.clone(), 0, 16, [(first.guest, first.len)]);
    set_up_ring(&wire, &memory, &queue, 0);
    wire.set_vring(Req::SetVringEnable, 0, 1);
    Client::assembled(wire, memory, vec![queue], options())
}

/// One request of `code` whose data is these pieces: its status.
fn framed(client: &mut Client, code: u32, sector: u64, pieces: &[Descriptor]) -> u8 {
    let at = client.queues[0].submit_framed(1, code, sector, pieces);
    client.queues[0].store_avail();
    client.queues[0].kick();
    let mut done = Vec::new();
    client.wait(&mut done);
    let mut status = [0];
    client.memory.read(at, &mut status);
    client.queues[0].free_raw(at, 16);
    status[0]
}

#[test]
fn a_buffer_may_lie_anywhere_and_run_from_one_region_into_the_next() {
    let workspace = Workspace::new();
    let mut daemon = Daemon::cached(&workspace, "64MiB", DISK, 1, &[]);
    let mut client = client_on(daemon.socket(), Memory::touching(8 * MIB, 4));
    let border = client.memory.regions()[1].guest;
    let pattern: Vec<u8> = (0..8192u32).map(|i| ((i * 7) >> 3) as u8).collect();
    for before in [1, 3, 511, 512, 4095, 8191] {
        for (at, len) in [(border, 4096), (2 * border, 8192), (3 * border, 512)] {
            let start = at - before.min(u64::from(len) - 1);
            for (i, byte) in pattern[..len as usize].iter().enumerate() {
                client.memory.fill(start + i as u64, *byte, 1);
            }
            assert_eq!(framed(&mut client, 1, 8, &[Descriptor::readable(start, len)]), OK);
            // Back into another crooked place, in two pieces that meet in the middle of a sector.
            let (first, second) = (257, len - 257);
            let to = start + 100_001;
            let pieces = [Descriptor::writable(to, first), Descriptor::writable(to + 257, second)];
            assert_eq!(framed(&mut client, 0, 8, &pieces), OK);
            for (i, byte) in pattern[..len as usize].iter().enumerate() {
                let mut found = [0];
                client.memory.read(to + i as u64, &mut found);
                assert_eq!(found, [*byte], "byte {i} of {len} written from {before} before {at:#x}");
            }
        }
    }
    // Past the last region there is nothing, however little of it.
    let end = 4 * border;
    assert_eq!(framed(&mut client, 1, 8, &[Descriptor::readable(end - 511, 512)]), IOERR);
    assert_eq!(framed(&mut client, 0, 8, &[Descriptor::writable(end - 1, 512)]), IOERR);
    client.assert_works(0, 1);
    daemon.assert_alive();
}

#[test]
fn what_changes_while_it_is_written_is_stored_with_the_checksum_of_what_was_stored() {
    const LEN: u32 = 64 << 10;
    let workspace = Workspace::new();
    let mut daemon = Daemon::cached(&workspace, "64MiB", DISK, 1, &["--data-crc"]);
    let mut client = client_on(daemon.socket(), Memory::new(8 * MIB, 1));
    let buffer = 2 * MIB;
    let stop = Arc::new(AtomicBool::new(false));
    let turns = Arc::new(AtomicU64::new(0));
    let scribbler = std::thread::spawn({
        let (memory, stop, turns) = (client.memory.clone(), stop.clone(), turns.clone());
        move || {
            let mut byte = 0u8;
            while !stop.load(Ordering::Relaxed) {
                byte = byte.wrapping_add(1);
                memory.fill(buffer, byte, LEN as usize);
                turns.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let mut mixed = 0;
    for round in 0..400u64 {
        // Whole blocks, single sectors, and sectors off a block's beginning.
        let len = [LEN, 512, 4096, 12 << 10][round as usize % 4];
        let sector = round * 61 % 3000;
        assert_eq!(framed(&mut client, 1, sector, &[Descriptor::readable(buffer, len)]), OK);
        let read = client.execute(&Request::read(sector, len as usize));
        assert_eq!(read.status, OK, "round {round}: what was stored does not match its checksum");
        mixed += u32::from(read.data.iter().any(|&byte| byte != read.data[0]));
        let again = client.execute(&Request::read(sector, len as usize));
        assert!((again.status, &again.data) == (OK, &read.data), "round {round}: it read otherwise before");
    }
    stop.store(true, Ordering::Relaxed);
    scribbler.join().expect("the scribbler has nothing to fail");
    assert!(mixed > 0, "no write was changed under way in {} turns", turns.load(Ordering::Relaxed));
    assert_eq!(client.execute(&Request::flush()).status, OK);
    daemon.assert_alive();
    drop(client);
    daemon.stop();
    // Every checksum on the media is right, and so is every byte that goes to the disk.
    let cache = workspace.path("cache.img");
    let cache = cache.to_str().expect("a path of text");
    for verb in ["check", "drain", "check"] {
        let ran = daemon::verb(&[verb, "--cache", cache]);
        assert_eq!(ran.status.code(), Some(0), "{verb}: {}", String::from_utf8_lossy(&ran.stderr));
    }
}

/// Two volumes of one daemon.
fn two_volumes(workspace: &Workspace) -> (Daemon, [std::path::PathBuf; 2]) {
    let sockets = ["a", "b"].map(|name| workspace.path(&format!("{name}.sock")));
    let mut config = format!(
        "[[cache]]\nname = \"c\"\npath = {:?}\nsize = \"64MiB\"\n",
        workspace.path("cache.img").display().to_string()
    );
    for (name, socket) in ["a", "b"].into_iter().zip(&sockets) {
        let disk = workspace.disk(&format!("{name}.img"), DISK);
        config += &format!(
            "[[volume]]\nname = \"{name}\"\nsocket = {:?}\nbacking = {:?}\nqueues = 1\n",
            socket.display().to_string(),
            disk.display().to_string()
        );
    }
    (Daemon::configured(workspace, &config, &sockets[0]), sockets)
}

#[test]
fn memory_that_vanishes_at_any_moment_costs_its_own_requests_and_the_other_volume_nothing() {
    let seed = Rng::seed_from_env("PCACHE_SEED");
    eprintln!("PCACHE_SEED={seed}");
    let mut rng = Rng::new(seed);
    let workspace = Workspace::new();
    let (mut daemon, [bad, good]) = two_volumes(&workspace);
    let stop = Arc::new(AtomicBool::new(false));
    let neighbour = std::thread::spawn({
        let stop = stop.clone();
        move || {
            let mut client = Client::connect(&good, options());
            let mut rounds = 0u64;
            while !stop.load(Ordering::Relaxed) {
                client.assert_works(0, (rounds % 250) as u8 + 1);
                rounds += 1;
            }
            rounds
        }
    });
    let (mut failed, mut served) = (0, 0);
    for _ in 0..60 {
        let mut client = client_on(&bad, Memory::unsealable(8 * MIB));
        client.assert_works(0, 1);
        // Large requests, so that memory goes while they are being copied.
        let mut statuses = Vec::new();
        for at in 0..4u64 {
            let data = MIB + at * MIB;
            let piece = match at % 2 {
                1 => Descriptor::readable(data, 1 << 20),
                _ => Descriptor::writable(data, 1 << 20),
            };
            statuses.push(client.queues[0].submit_framed(at, at as u32 % 2, at * 2048, &[piece]));
        }
        client.queues[0].store_avail();
        // With everything gone our own view of the ring goes too: nothing is looked at after that.
        let all_gone = rng.chance(25);
        let file = client.memory.file().try_clone().expect("a descriptor more");
        let (delay, rest) = (rng.below(1000), if all_gone { 0 } else { MIB + rng.below(6 * MIB) });
        let shrinker = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(delay));
            file.set_len(rest).expect("nobody can seal it");
        });
        client.queues[0].kick();
        shrinker.join().expect("the shrinker has nothing to fail");
        if !all_gone {
            let mut done = Vec::new();
            while done.len() < 4 {
                client.wait(&mut done);
            }
            for at in statuses {
                let mut status = [0];
                client.memory.read(at, &mut status);
                match status[0] {
                    OK => served += 1,
                    IOERR => failed += 1,
                    other => panic!("a status of {other}"),
                }
            }
            client.assert_works(0, 2);
        }
        daemon.assert_alive();
    }
    stop.store(true, Ordering::Relaxed);
    let rounds = neighbour.join().expect("the neighbour notices nothing");
    eprintln!("{failed} requests failed, {served} were served, the neighbour did {rounds} rounds");
    assert!(failed > 0 && served > 0 && rounds > 0, "the test has lost its teeth");
    daemon.stop();
}
