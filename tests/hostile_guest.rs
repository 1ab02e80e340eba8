//! What a guest with bad intentions gets: an error status, or a ring that is broken; never its
//! neighbour's ring, and never the server.

mod client;

use std::time::{Duration, Instant};

use client::attacks;
use client::request::{IOERR, OK, Range, UNMAP, UNSUPP};
use client::ring::Descriptor;
use client::wire::{longs, words};
use client::{Client, ClientOptions, Daemon, Kind, Layout, Req, Request, Rng, Workspace, feature};

const MIB: u64 = 1 << 20;
const DISK: u64 = 64 * MIB;
const PATIENCE: Duration = Duration::from_secs(20);

fn server(queues: u16, more: &[&str]) -> (Workspace, Daemon) {
    let workspace = Workspace::new();
    let daemon = Daemon::cached(&workspace, "64MiB", DISK, queues, more);
    (workspace, daemon)
}

fn options(queues: u16) -> ClientOptions {
    ClientOptions { queues, queue_size: 16, patience: PATIENCE, ..ClientOptions::default() }
}

#[test]
fn requests_that_cannot_be_served_get_the_status_the_specification_names() {
    let (_workspace, daemon) = server(1, &["--serial", "pcache-0123456789"]);
    let mut client = Client::connect(daemon.socket(), options(1));
    let end = client.capacity();
    let range = |sector, sectors, flags| Range { sector, sectors, flags };
    let other = |code| Request { kind: Kind::Other(code), sector: 0, out: vec![], in_len: 0 };
    let ranges = |kind, list: &[Range]| Request::ranges(kind, list);
    let crooked = |kind, len| Request { kind, sector: 0, out: vec![0; len], in_len: 0 };
    let cases = [
        (Request::read(end, 512), IOERR),
        (Request::read(end - 1, 1024), IOERR),
        (Request::read(u64::MAX, 512), IOERR),
        (Request::read(u64::MAX / 512, 1024), IOERR),
        (Request::write(end, vec![1; 512]), IOERR),
        (Request::write(end - 7, vec![1; 4096]), IOERR),
        (Request::read(0, 511), IOERR),
        (Request::read(0, 513), IOERR),
        (Request::write(0, vec![1; 100]), IOERR),
        (other(2), UNSUPP),
        (other(14), UNSUPP),
        (other(77), UNSUPP),
        (other(u32::MAX), UNSUPP),
        (ranges(Kind::Discard, &[range(end, 1, 0)]), IOERR),
        (ranges(Kind::Discard, &[range(64, 8, 0), range(end - 1, 2, 0)]), IOERR),
        (ranges(Kind::Discard, &[range(0, 8, UNMAP)]), UNSUPP),
        (ranges(Kind::Discard, &[range(0, 8, 2)]), UNSUPP),
        (ranges(Kind::WriteZeroes, &[range(u64::MAX, 8, 0)]), IOERR),
        (ranges(Kind::WriteZeroes, &[range(0, 8, 2)]), UNSUPP),
        (ranges(Kind::Discard, &[range(0, 1, 0); 257]), IOERR),
        (crooked(Kind::Discard, 15), IOERR),
        (crooked(Kind::WriteZeroes, 17), IOERR),
        (Request::flush(), OK),
        (ranges(Kind::Discard, &[range(0, 1, 0); 256]), OK),
        (ranges(Kind::WriteZeroes, &[range(0, u32::try_from(end).expect("a small disk"), UNMAP)]), OK),
    ];
    let marker = Request::write(0, vec![9; 512]);
    for (at, (request, status)) in cases.into_iter().enumerate() {
        assert_eq!(client.execute(&marker).status, OK);
        assert_eq!(client.execute(&request).status, status, "case {at}: {request:?}");
        if status != OK {
            let read = client.execute(&Request::read(0, 512));
            assert!(read.data == [9; 512], "case {at} failed and changed something");
        }
    }
    let id = client.execute(&Request::get_id());
    assert_eq!((id.status, &id.data[..]), (OK, &b"pcache-0123456789\0\0\0"[..]));
}

#[test]
fn a_read_only_disk_says_so_and_keeps_its_word() {
    let (_workspace, daemon) = server(1, &["--read-only"]);
    let mut client = Client::connect(daemon.socket(), options(1));
    assert_ne!(client.features & feature::BLK_RO, 0);
    let range = [Range { sector: 0, sectors: 8, flags: 0 }];
    assert_eq!(client.execute(&Request::write(0, vec![1; 512])).status, IOERR);
    for kind in [Kind::Discard, Kind::WriteZeroes] {
        // Not offered at all, or refused.
        let status = client.execute(&Request::ranges(kind, &range)).status;
        assert!(matches!(status, IOERR | UNSUPP), "{kind:?} gets {status}");
    }
    let read = client.execute(&Request::read(0, 4096));
    assert_eq!((read.status, read.data), (OK, vec![0; 4096]));
}

#[test]
fn a_bad_ring_breaks_itself_and_neither_its_neighbour_nor_the_server() {
    let (_workspace, mut daemon) = server(2, &[]);
    for (name, attack) in attacks::split::ALL {
        eprintln!("attack: {name}");
        let mut client = Client::connect(daemon.socket(), options(2));
        client.assert_works(0, 1);
        attack(&mut client);
        client.queues[0].store_avail();
        client.queues[0].kick();
        // The neighbour works while ring 0 is being looked at, and afterwards.
        let until = Instant::now() + Duration::from_millis(30);
        let mut stamp = 2;
        while Instant::now() < until {
            neighbour_works(&mut client, stamp);
            stamp = stamp % 200 + 1;
        }
        daemon.assert_alive();
        // A broken ring can be stopped: its answer comes, whatever it says.
        client.stop_ring(0);
        neighbour_works(&mut client, 250);
        drop(client);
        Client::connect(daemon.socket(), options(2)).assert_works(0, 3);
        daemon.assert_alive();
    }
}

/// A write and a read back on queue 1 alone, with nothing collected from ring 0, which is no ring any more.
fn neighbour_works(client: &mut Client, stamp: u8) {
    let sector = 900 + u64::from(stamp);
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

/// A descriptor of any kind whose address, when it is one, lies in `buffer` or in the ring's own areas.
fn random_descriptor(rng: &mut Rng, buffer: u64, rings: u64) -> Descriptor {
    let offset = 16 * rng.below(64);
    let addr = match rng.below(20) {
        0 => rng.next_u64() | 1 << 62,
        1 => rings + offset % 256,
        2 => u64::MAX - offset,
        _ => buffer + offset,
    };
    let len = match rng.below(12) {
        0 => 0,
        1 => rng.next_u64() as u32,
        2 => rng.below(600) as u32,
        3..6 => 16,
        6..9 => 512,
        _ => 1,
    };
    let flags = [0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, rng.next_u64() as u16][rng.below(12) as usize];
    Descriptor { addr, len, flags, next: rng.below(17) as u16 }
}

#[test]
fn random_rings_break_nothing_but_themselves() {
    let seed = Rng::seed_from_env("PCACHE_SEED");
    eprintln!("PCACHE_SEED={seed}");
    let mut rng = Rng::new(seed);
    let (_workspace, mut daemon) = server(2, &[]);
    let mut client = Client::connect(daemon.socket(), ClientOptions { inflight: false, ..options(2) });
    let mut used = 0;
    for round in 0..1000 {
        let buffer = client.queues[0].alloc(4096);
        for at in 0..64 {
            // Headers, tables and noise, wherever a descriptor may point to.
            let bytes = match rng.below(3) {
                0 => random_descriptor(&mut rng, buffer, client.queues[0].desc_at).to_bytes(),
                1 => {
                    let code = [0, 1, 4, 8, 11, 13, 99][rng.below(7) as usize];
                    let header = [words(&[code, 0]), longs(&[4096 + rng.below(1 << 18)])].concat();
                    header.try_into().expect("sixteen bytes")
                }
                _ => u128::from(rng.next_u64()).to_le_bytes(),
            };
            client.memory.write(buffer + 16 * at, &bytes);
        }
        for slot in 0..16 {
            let descriptor = random_descriptor(&mut rng, buffer, client.queues[0].desc_at);
            client.queues[0].write_descriptor(slot, descriptor);
        }
        for _ in 0..rng.between(1, 16) {
            client.queues[0].offer(rng.below(17) as u16);
        }
        client.queues[0].store_avail();
        client.queues[0].kick();
        neighbour_answers(&mut client, round);
        daemon.assert_alive();
        // The next round finds a ring as after a reset: broken ones come back by being set up anew.
        client.stop_ring(0);
        used += u64::from(client.queues[0].used_index());
        client.queues[0].free_raw(buffer, 4096);
        client.queues[0].reset();
        client.set_up_ring(0, 0);
        client.wire.set_vring(Req::SetVringEnable, 0, 1);
        if round % 50 == 0 {
            client.assert_works(0, 1);
            client.stop_ring(0);
            client.queues[0].reset();
            client.set_up_ring(0, 0);
            client.wire.set_vring(Req::SetVringEnable, 0, 1);
        }
    }
    eprintln!("{used} random chains were answered");
    assert!(used > 0, "no random chain was ever answered: the test has lost its teeth");
}

/// A read on queue 1. What it returns is not compared: the other ring writes anywhere on the disk.
fn neighbour_answers(client: &mut Client, tag: u64) {
    let request = Request::read(8, 4096);
    assert!(client.submit(1, tag, &request, &Layout::plain(&request)));
    client.queues[1].publish();
    let deadline = Instant::now() + PATIENCE;
    let mut done = Vec::new();
    while done.is_empty() {
        client.queues[1].collect(&mut done);
        assert!(Instant::now() < deadline, "the neighbour of a random ring hangs");
        assert!(!client.wire.is_closed(), "a random ring ended the connection");
        std::thread::yield_now();
    }
    assert_eq!((done[0].tag, done[0].status), (tag, OK));
}
