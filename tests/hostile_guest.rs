//! What a guest with bad intentions gets: an error status, or a ring that is broken; never its
//! neighbour's ring, and never the server.

mod client;

use std::time::{Duration, Instant};

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

/// Something bad done to ring 0.
type Attack = fn(&mut Client);

/// A chain on ring 0 with its header in front and its status behind.
fn framed(client: &mut Client, code: u32, middle: &[Descriptor]) {
    client.queues[0].submit_framed(0xbad, code, 0, middle);
}

/// One indirect descriptor on ring 0 over a table of `entries`, `len` bytes long as it claims.
fn indirect(client: &mut Client, entries: &[Descriptor], len: u32) {
    let memory = client.memory.clone();
    let table = client.queues[0].alloc(4096);
    for (i, entry) in entries.iter().enumerate() {
        memory.write(table + 16 * i as u64, &entry.to_bytes());
    }
    client.queues[0].submit_raw(0xbad, &[Descriptor::indirect(table, len)]);
}

const NEXT: u16 = 1;
const INDIRECT: u16 = 4;

const ATTACKS: &[(&str, Attack)] = &[
    ("the available index jumps by more than the ring", |c| c.queues[0].jump(17)),
    ("the available index jumps by half its range", |c| c.queues[0].jump(1 << 15)),
    ("the available index goes backwards", |c| c.queues[0].jump(u16::MAX)),
    ("a head outside the table", |c| c.queues[0].offer(16)),
    ("the highest head", |c| c.queues[0].offer(u16::MAX)),
    ("a descriptor that is its own next", |c| {
        let addr = c.queues[0].alloc(16);
        for slot in 0..16 {
            let own = Descriptor { addr, len: 16, flags: NEXT, next: slot };
            c.queues[0].write_descriptor(slot, own);
        }
        c.queues[0].offer(3);
    }),
    ("two descriptors that are each other's next", |c| {
        let addr = c.queues[0].alloc(16);
        for slot in 0..16 {
            c.queues[0].write_descriptor(slot, Descriptor { addr, len: 16, flags: NEXT, next: slot ^ 1 });
        }
        c.queues[0].offer(4);
    }),
    ("a next outside the table", |c| {
        let addr = c.queues[0].alloc(16);
        c.queues[0].write_descriptor(5, Descriptor { addr, len: 16, flags: NEXT, next: 16 });
        c.queues[0].offer(5);
    }),
    ("one head offered twice", |c| {
        let addr = c.queues[0].alloc(4096);
        framed(c, 0, &[Descriptor { addr, len: 512, flags: 2, next: 0 }]);
        let head = c.memory.load(c.queues[0].avail_at + 4 + 2 * u64::from(c.queues[0].avail_index() % 16));
        c.queues[0].offer(head);
    }),
    ("an indirect table of no bytes", |c| indirect(c, &[], 0)),
    ("an indirect table of odd length", |c| indirect(c, &[Descriptor::readable(0, 16)], 17)),
    ("an indirect table of 4 GiB", |c| indirect(c, &[Descriptor::readable(0, 16)], !15)),
    ("an indirect table in an indirect table", |c| {
        let at = c.queues[0].alloc(64);
        indirect(c, &[Descriptor::indirect(at, 16)], 16);
    }),
    ("an indirect table whose entries loop", |c| {
        let addr = c.queues[0].alloc(16);
        indirect(c, &[Descriptor { addr, len: 16, flags: NEXT, next: 0 }], 16);
    }),
    ("an indirect table with a next outside of it", |c| {
        let addr = c.queues[0].alloc(16);
        indirect(c, &[Descriptor { addr, len: 16, flags: NEXT, next: 9 }], 32);
    }),
    ("an indirect descriptor that has a next", |c| {
        let table = c.queues[0].alloc(64);
        c.queues[0].submit_raw(
            0xbad,
            &[Descriptor { addr: table, len: 32, flags: INDIRECT, next: 0 }, Descriptor::writable(table, 1)],
        );
    }),
    ("an indirect table outside the memory", |c| {
        c.queues[0].submit_raw(0xbad, &[Descriptor::indirect(1 << 60, 64)]);
    }),
    ("a readable piece behind a writable one", |c| {
        let at = c.queues[0].alloc(1024);
        framed(c, 1, &[Descriptor::writable(at, 512), Descriptor::readable(at + 512, 512)]);
    }),
    ("a chain that cannot be answered", |c| {
        let at = c.queues[0].alloc(16);
        c.queues[0].submit_raw(0xbad, &[Descriptor::readable(at, 16)]);
    }),
    ("a chain without header", |c| {
        let at = c.queues[0].alloc(16);
        c.queues[0].submit_raw(0xbad, &[Descriptor::writable(at, 1)]);
    }),
    ("a header cut short", |c| {
        let at = c.queues[0].alloc(16);
        c.queues[0].submit_raw(0xbad, &[Descriptor::readable(at, 8), Descriptor::writable(at, 1)]);
    }),
    ("a descriptor of nothing", |c| {
        let at = c.queues[0].alloc(16);
        framed(c, 1, &[Descriptor::readable(at, 0)]);
    }),
    ("a descriptor whose end overflows", |c| framed(c, 1, &[Descriptor::readable(u64::MAX - 16, 512)])),
    ("4 GiB in one descriptor", |c| {
        let at = c.queues[0].alloc(16);
        framed(c, 1, &[Descriptor::readable(at, u32::MAX)]);
    }),
    ("a piece that runs out of its region", |c| {
        let region = c.memory.regions()[0];
        framed(c, 0, &[Descriptor::writable(region.guest + region.len - 256, 512)]);
    }),
    ("a status byte outside the memory", |c| {
        let at = c.queues[0].alloc(16);
        c.queues[0].submit_raw(0xbad, &[Descriptor::readable(at, 16), Descriptor::writable(1 << 60, 1)]);
    }),
    ("data over the rings themselves", |c| {
        let (at, len) = (c.queues[0].desc_at, 512);
        framed(c, 0, &[Descriptor::writable(at, len)]);
    }),
];

#[test]
fn a_bad_ring_breaks_itself_and_neither_its_neighbour_nor_the_server() {
    let (_workspace, mut daemon) = server(2, &[]);
    for (name, attack) in ATTACKS {
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
