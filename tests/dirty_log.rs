//! What a VMM that copies a running guest to another host is told: every page the server has written,
//! from the moment it asks until it asks no more, and under load.

#![expect(unsafe_code, reason = "makes a memfd")]

mod client;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use client::front::ring_addresses;
use client::wire::longs;
use client::{Client, ClientOptions, Daemon, Layout, Mix, Notify, Req, Request, Rng, Traffic, Workspace};
use client::{feature, protocol};

const MIB: u64 = 1 << 20;
const DISK: u64 = 64 * MIB;
const PAGE: u64 = 4096;

/// A log that its VMM has shared with the server.
struct Log(File);

impl Log {
    /// One for all memory of `client`, given to the server.
    fn give(client: &Client) -> Self {
        let end = client.memory.regions().iter().map(|region| region.guest + region.len).max();
        let len = (end.expect("there is memory") / PAGE).div_ceil(64) * 8;
        // SAFETY: a literal name and valid flags.
        let fd = unsafe { libc::memfd_create(c"log".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        assert!(fd >= 0, "a memfd can be made");
        // SAFETY: the descriptor is new and ours.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(len).expect("a memfd can grow");
        // It is answered whether or not an answer is asked for.
        let reply = client.wire.ask(Req::SetLogBase, &longs(&[len, 0]), &[file.as_raw_fd()]);
        assert_eq!(reply.as_u64(), 0);
        Self(file)
    }

    /// The pages in it, which are forgotten.
    fn take(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; self.0.metadata().expect("a memfd").len() as usize];
        self.0.read_exact_at(&mut bytes, 0).expect("the log is whole");
        self.0.write_all_at(&vec![0; bytes.len()], 0).expect("the log is ours");
        (0..bytes.len() as u64 * 8).filter(|page| bytes[(page / 8) as usize] >> (page % 8) & 1 == 1).collect()
    }
}

/// Asks for the log, or says that it is no longer wanted, the way QEMU does it.
fn want_log(client: &Client, on: bool) {
    let bit = if on { feature::LOG_ALL } else { 0 };
    client.wire.set_u64(Req::SetFeatures, client.features | bit);
    for queue in &client.queues {
        let mut body = ring_addresses(&client.memory, queue, queue.used_at);
        body[4] = on.into();
        client.wire.tell(Req::SetVringAddr, &body, &[]);
    }
}

fn connect(daemon: &Daemon, packed: bool) -> Client {
    let options =
        ClientOptions { queues: 2, packed, notify: Notify::Poll, mem_size: 16 * MIB, ..Default::default() };
    let client = Client::connect(daemon.socket(), options);
    assert_ne!(client.protocol & protocol::LOG_SHMFD, 0);
    assert_eq!(client.features & feature::RING_PACKED != 0, packed);
    client
}

/// All of the guest's memory.
fn snapshot(client: &Client) -> Vec<u8> {
    let mut bytes = Vec::new();
    for region in client.memory.regions() {
        let from = bytes.len();
        bytes.resize(from + region.len as usize, 0);
        client.memory.read(region.guest, &mut bytes[from..]);
    }
    bytes
}

/// Pages whose bytes differ.
fn changed(client: &Client, before: &[u8], after: &[u8]) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    let mut at = 0;
    for region in client.memory.regions() {
        for page in 0..region.len / PAGE {
            let range = at + (page * PAGE) as usize..at + ((page + 1) * PAGE) as usize;
            if before[range.clone()] != after[range] {
                pages.insert(region.guest / PAGE + page);
            }
        }
        at += region.len as usize;
    }
    pages
}

fn everything_written_is_told(packed: bool) {
    let seed = Rng::seed_from_env("PCACHE_SEED");
    eprintln!("PCACHE_SEED={seed}");
    let mut rng = Rng::new(seed);
    let workspace = Workspace::new();
    let daemon = Daemon::cached(&workspace, "64MiB", DISK, 2, &[]);
    let mut client = connect(&daemon, packed);
    let log = Log::give(&client);
    want_log(&client, true);
    log.take();
    let mut told = 0;
    for round in 0..40u64 {
        let write = Request::write(8 * round, vec![round as u8 + 1; 16 * 1024]);
        client.execute_on(1, &write, &Layout::plain(&write));
        log.take();
        let sectors = 1 + rng.below(255);
        let request = Request::read(8 * round, 512 * sectors as usize);
        let indirect = round % 2 == 0;
        let layout = Layout::random(&request, &mut rng, 8, indirect);
        assert!(client.submit(0, round, &request, &layout));
        let before = snapshot(&client);
        client.queues[0].publish();
        let mut done = Vec::new();
        while client.outstanding() > 0 {
            client.collect(&mut done);
        }
        let after = snapshot(&client);
        let pages = log.take();
        let changed = changed(&client, &before, &after);
        // What the driver itself has published since.
        let queue = &client.queues[0];
        let own = [queue.desc_at, queue.avail_at].map(|at| at / PAGE);
        let missing: Vec<_> = changed.difference(&pages).filter(|page| !own.contains(page)).collect();
        assert!(missing.is_empty(), "round {round}: pages {missing:?} were written and not told");
        let ring = if packed { queue.desc_at } else { queue.used_at } / PAGE;
        assert!(pages.contains(&ring), "round {round}: the ring itself was not told");
        assert!(pages.len() as u64 <= sectors / 8 + 40, "round {round}: {} pages for {sectors}", pages.len());
        told += pages.len();
    }
    eprintln!("{told} pages were told");
    want_log(&client, false);
    log.take();
    client.assert_works(0, 1);
    assert_eq!(log.take(), BTreeSet::new(), "told what nobody wants to know any more");
}

#[test]
fn every_page_written_over_split_rings_is_told() {
    everything_written_is_told(false);
}

#[test]
fn every_page_written_over_packed_rings_is_told() {
    everything_written_is_told(true);
}

#[test]
fn a_log_is_begun_replaced_and_ended_under_load() {
    let seed = Rng::seed_from_env("PCACHE_SEED");
    for packed in [false, true] {
        let workspace = Workspace::new();
        let daemon = Daemon::cached(&workspace, "64MiB", DISK, 2, &[]);
        let mut traffic = Traffic::new(connect(&daemon, packed), seed, Mix::default());
        let mut logs = Vec::new();
        for round in 0..12 {
            traffic.run(300);
            assert!(traffic.client.outstanding() > 0, "round {round}: nothing is in flight");
            match round % 4 {
                // A new log for each pass, as Cloud Hypervisor does it.
                0 | 1 => logs.push(Log::give(&traffic.client)),
                2 => want_log(&traffic.client, true),
                _ => want_log(&traffic.client, false),
            }
            let last = logs.len() - 1;
            for (at, log) in logs.iter().enumerate() {
                let pages = log.take();
                assert!(at == last || pages.is_empty() || round % 4 < 2, "a log that was replaced goes on");
            }
            if round % 4 == 2 {
                traffic.run(300);
                traffic.quiesce();
                assert!(!logs[last].take().is_empty(), "round {round}: nothing is told under load");
            }
        }
        traffic.quiesce();
        traffic.verify(0..traffic.model.sectors());
    }
}
