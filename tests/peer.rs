//! Proves the test front end itself, against a server that is not ours: `qemu-storage-daemon`.
//!
//! What the client says of our server is worth something only if it agrees with an independent one.
//! Without `qemu-storage-daemon` at its usual place the tests say so and check nothing.

mod client;

use client::request::{IOERR, OK, Range, UNSUPP};
use client::{
    Client, ClientOptions, Daemon, Kind, Layout, Mix, Model, Notify, Request, Rng, Traffic, Workspace,
};

const DISK: u64 = 64 << 20;

/// The peer, or a loud word about its absence.
fn peer(workspace: &Workspace, queues: u16) -> Option<Daemon> {
    let daemon = Daemon::qemu(workspace, DISK, queues);
    if daemon.is_none() {
        eprintln!("SKIPPED: qemu-storage-daemon is not installed, so the test front end is not proven here");
    }
    daemon
}

#[test]
fn every_request_type_works_in_every_framing() {
    let workspace = Workspace::new();
    let Some(daemon) = peer(&workspace, 1) else { return };
    let seed = Rng::seed_from_env("PCACHE_SEED");
    eprintln!("PCACHE_SEED={seed}");
    let mut rng = Rng::new(seed);
    let mut client = Client::connect(daemon.socket(), ClientOptions::default());
    assert_eq!(client.capacity(), DISK / 512);
    let mut model = Model::new(client.capacity(), seed);
    for round in 0..200 {
        let indirect = round % 2 == 0;
        let (sector, sectors) = (rng.below(1000), rng.between(1, 64));
        let (writing, bytes) = model.begin_write(sector, sectors);
        let write = Request::write(sector, bytes);
        let layout = Layout::ragged(&write, &mut rng, 12, indirect);
        assert_eq!(client.execute_on(0, &write, &layout).status, OK, "{layout:?}");
        model.end_write(writing, true);

        let read = Request::read(sector, sectors as usize * 512);
        let layout = Layout::ragged(&read, &mut rng, 12, indirect);
        let done = client.execute_on(0, &read, &layout);
        assert_eq!(done.status, OK, "{layout:?}");
        model.check(sector, &done.data).unwrap_or_else(|why| panic!("{why} {layout:?}"));
    }
    for kind in [Kind::Discard, Kind::WriteZeroes] {
        let range = Range { sector: 8, sectors: 16, flags: 0 };
        assert_eq!(client.execute(&Request::ranges(kind, &[range])).status, OK, "{kind:?}");
        assert_eq!(client.execute(&Request::read(8, 16 * 512)).data, vec![0; 16 * 512], "{kind:?}");
    }
    assert_eq!(client.execute(&Request::flush()).status, OK);
    let id = client.execute(&Request::get_id());
    assert_eq!((id.status, id.data.len()), (OK, 20));
    let beyond = Request::read(client.capacity(), 512);
    assert_eq!(client.execute(&beyond).status, IOERR);
    let unknown = Request { kind: Kind::Other(77), sector: 0, out: Vec::new(), in_len: 0 };
    assert_eq!(client.execute(&unknown).status, UNSUPP);
}

#[test]
fn random_traffic_over_two_queues_agrees_with_the_model() {
    let workspace = Workspace::new();
    let Some(daemon) = peer(&workspace, 2) else { return };
    let seed = Rng::seed_from_env("PCACHE_SEED");
    for (event_idx, indirect, notify) in
        [(true, true, Notify::Call), (false, true, Notify::Poll), (true, false, Notify::Poll)]
    {
        let options = ClientOptions { queues: 2, event_idx, indirect, notify, ..Default::default() };
        let client = Client::connect(daemon.socket(), options);
        // The peer takes one range per request.
        let mix = Mix { ranges_max: 1, ..Mix::default() };
        let mut traffic = Traffic::new(client, seed, mix);
        traffic.run(3000);
        traffic.quiesce();
        traffic.verify(0..DISK / 512);
        let zeroes = Request::ranges(Kind::WriteZeroes, &[Range { sector: 0, sectors: 1 << 15, flags: 0 }]);
        for part in 0..4u32 {
            let mut zeroes = zeroes.clone();
            zeroes.out[..8].copy_from_slice(&u64::from(part << 15).to_le_bytes());
            assert_eq!(traffic.client.execute(&zeroes).status, OK);
        }
    }
}

#[test]
fn one_damaged_or_stale_sector_on_the_disk_is_found() {
    use std::os::unix::fs::FileExt;
    let workspace = Workspace::new();
    let Some(daemon) = peer(&workspace, 1) else { return };
    let client = Client::connect(daemon.socket(), ClientOptions::default());
    let mut model = Model::new(client.capacity(), 7);
    let mut client = client;
    let (writing, old) = model.begin_write(0, 64);
    assert_eq!(client.execute(&Request::write(0, old.clone())).status, OK);
    model.end_write(writing, true);
    let (writing, new) = model.begin_write(0, 64);
    assert_eq!(client.execute(&Request::write(0, new.clone())).status, OK);
    model.end_write(writing, true);

    let file = std::fs::OpenOptions::new().write(true).open(workspace.path("qsd.img")).unwrap();
    let mut flipped = new[512 * 9..512 * 10].to_vec();
    flipped[300] ^= 1;
    for (bytes, says) in [
        (&old[512 * 9..512 * 10], "holds version 1, allowed: version 2"),
        (&new[512 * 8..512 * 9], "the data of sector 8"),
        (&flipped[..], "damaged at byte 296"),
        (&[0; 512][..], "holds zeros"),
    ] {
        file.write_all_at(bytes, 512 * 9).unwrap();
        let read = client.execute(&Request::read(0, 64 * 512));
        let why = model.check(0, &read.data).unwrap_err().to_string();
        assert!(why.starts_with("sector 9: ") && why.contains(says), "{why}");
    }
    file.write_all_at(&new[512 * 9..512 * 10], 512 * 9).unwrap();
    model.check(0, &client.execute(&Request::read(0, 64 * 512)).data).unwrap();
}
