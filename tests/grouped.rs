//! Grouped order under the real daemon: whatever instant it is killed at, and with the cache thrown
//! away, the disk and its redo area are one moment of the guest's.

mod client;

use std::fs;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use client::daemon::verb;
use client::{Client, ClientOptions, Daemon, Request, Rng, Workspace};

const MIB: u64 = 1 << 20;
const DISK: u64 = 16 * MIB;
/// Blocks that are written, few enough that each is overwritten many times.
const BLOCKS: u64 = 512;
const BLOCK: usize = 4096;

/// What write number `n` stores: its number, over and over.
fn block(n: u64) -> Vec<u8> {
    n.to_le_bytes().repeat(BLOCK / 8)
}

/// The number of the write in each block; panics where two writes are mixed.
fn numbers(disk: &Path) -> Vec<u64> {
    let bytes = fs::read(disk).expect("the disk can be read");
    let number = |block: &[u8]| {
        let words: Vec<&[u8]> = block.chunks(8).collect();
        assert!(words.iter().all(|word| *word == words[0]), "a block holds two writes");
        u64::from_le_bytes(words[0].try_into().expect("8 bytes"))
    };
    bytes[..BLOCKS as usize * BLOCK].chunks(BLOCK).map(number).collect()
}

/// What all blocks hold once the first `n` writes have happened.
fn moment(places: &[u64], n: u64) -> Vec<u64> {
    let mut blocks = vec![0; BLOCKS as usize];
    for (i, place) in places.iter().enumerate().take(n as usize) {
        blocks[*place as usize] = i as u64 + 1;
    }
    blocks
}

fn recover(disk: &Path, more: &[&str]) -> Output {
    let args = [&["recover-backing", "--backing", disk.to_str().expect("a plain path")], more].concat();
    verb(&args)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn killed_at_any_instant_and_without_its_cache_the_disk_is_one_moment_of_the_guest() {
    let mut rng = Rng::new(Rng::seed_from_env("PCACHE_SEED"));
    let mut applied = 0;
    for round in 0..8 {
        let workspace = Workspace::in_memory();
        let options = ["--order", "grouped", "--redo-size", "2MiB", "--allow-volatile"];
        let mut daemon = Daemon::cached(&workspace, "64MiB", DISK, 1, &options);
        let mut client = Client::connect(daemon.socket(), ClientOptions::default());
        let mut places = Vec::new();
        let lasts = Duration::from_millis(2200 + rng.below(800));
        let began = Instant::now();
        while began.elapsed() < lasts {
            let place = rng.below(BLOCKS);
            places.push(place);
            let request = Request::write(place * 8, block(places.len() as u64));
            assert_eq!(client.execute(&request).status, 0);
            if rng.below(16) == 0 {
                assert_eq!(client.execute(&Request::flush()).status, 0);
            }
        }
        daemon.kill();
        drop(client);
        fs::remove_file(workspace.path("cache.img")).unwrap();
        let disk = workspace.path("disk.img");
        let done = recover(&disk, &[]);
        assert!(done.status.success(), "round {round}: {}", text(&done.stderr));
        applied += u32::from(text(&done.stdout).contains("applied from"));
        let shown = numbers(&disk);
        let newest = shown.iter().copied().max().unwrap();
        assert!(newest > 0, "round {round}: nothing was written back in {lasts:?}");
        assert_eq!(
            shown,
            moment(&places, newest),
            "round {round}: not one moment, {newest} of {}",
            places.len()
        );
        let again = recover(&disk, &[]);
        assert!(text(&again.stdout).contains("consistent as it is"), "{}", text(&again.stdout));
        assert_eq!(numbers(&disk), shown);
    }
    println!("{applied} of 8 kills left a group to be applied");
}

#[test]
fn a_redo_area_is_refused_where_it_does_not_belong_and_kept() {
    let workspace = Workspace::in_memory();
    let options = ["--order", "grouped", "--allow-volatile"];
    let mut daemon = Daemon::cached(&workspace, "64MiB", DISK, 1, &options);
    daemon.stop();
    let (disk, redo) = (workspace.path("disk.img"), workspace.path("disk.img.redo"));
    assert!(redo.exists(), "the area lies beside the image");
    let other = workspace.disk("other.img", DISK);
    let precious = workspace.path("precious");
    fs::write(&precious, vec![7; 1 << 20]).unwrap();
    for (disk, redo, words) in
        [(&disk, &precious, "is not a redo area"), (&disk, &workspace.path("nowhere"), "nowhere")]
    {
        let refused = recover(disk, &["--redo", redo.to_str().unwrap()]);
        assert_eq!(refused.status.code(), Some(1), "{}", text(&refused.stdout));
        assert!(text(&refused.stderr).contains(words), "{}", text(&refused.stderr));
    }
    assert_eq!(fs::read(&precious).unwrap(), vec![7; 1 << 20]);
    let idle = recover(&other, &["--redo", redo.to_str().unwrap()]);
    assert!(idle.status.success() && text(&idle.stdout).contains("no group is under way"));
}

#[test]
fn after_a_kill_every_order_goes_on_where_groups_ended() {
    for next in ["strict", "relaxed", "grouped"] {
        let workspace = Workspace::in_memory();
        let options = ["--order", "grouped", "--redo-size", "2MiB", "--allow-volatile"];
        let mut daemon = Daemon::cached(&workspace, "64MiB", DISK, 1, &options);
        let mut client = Client::connect(daemon.socket(), ClientOptions::default());
        let mut places = Vec::new();
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(2300) {
            places.push(places.len() as u64 * 37 % BLOCKS);
            let request = Request::write(places[places.len() - 1] * 8, block(places.len() as u64));
            assert_eq!(client.execute(&request).status, 0);
        }
        daemon.kill();
        drop(client);
        let args = ["--order", next, "--allow-volatile"];
        let mut daemon = Daemon::cached(&workspace, "64MiB", DISK, 1, &args);
        daemon.stop();
        let cache = workspace.path("cache.img");
        let drained = verb(&["drain", "--cache", cache.to_str().unwrap()]);
        assert!(drained.status.success(), "{next}: {}", text(&drained.stderr));
        let written = places.len() as u64;
        assert_eq!(numbers(&workspace.path("disk.img")), moment(&places, written), "{next}");
    }
}

#[test]
fn the_disks_of_a_group_are_one_moment_of_the_guest_whenever_it_is_killed() {
    let mut rng = Rng::new(Rng::seed_from_env("PCACHE_SEED"));
    for round in 0..4 {
        let workspace = Workspace::in_memory();
        let path = |name: &str| workspace.path(name).display().to_string();
        let mut config = format!(
            "[[cache]]\nname = \"c\"\npath = {:?}\nsize = \"64MiB\"\nallow_volatile = true\n",
            path("c")
        );
        for volume in ["log", "data"] {
            workspace.disk(&format!("{volume}.img"), DISK);
            config += &format!(
                "[[volume]]\nname = {volume:?}\nsocket = {:?}\nbacking = {:?}\nqueues = 1\norder = \"grouped\"\n\
                 group = \"vm\"\nredo_size = \"2MiB\"\n",
                path(&format!("{volume}.sock")),
                path(&format!("{volume}.img"))
            );
        }
        let mut daemon = Daemon::configured(&workspace, &config, &workspace.path("log.sock"));
        let sockets = ["log.sock", "data.sock"].map(|name| workspace.path(name));
        let mut guests = sockets.map(|socket| Client::connect(&socket, ClientOptions::default()));
        // One guest, which writes now to one disk and now to the other, each write after the last.
        let (mut places, mut written) = (Vec::new(), 0);
        let lasts = Duration::from_millis(2200 + rng.below(800));
        let began = Instant::now();
        while began.elapsed() < lasts {
            written += 1;
            places.push(rng.below(2 * BLOCKS));
            let (disk, place) = (places[written - 1] / BLOCKS, places[written - 1] % BLOCKS);
            let request = Request::write(place * 8, block(written as u64));
            assert_eq!(guests[disk as usize].execute(&request).status, 0);
            if rng.below(16) == 0 {
                assert_eq!(guests[rng.below(2) as usize].execute(&Request::flush()).status, 0);
            }
        }
        daemon.kill();
        drop(guests);
        fs::remove_file(workspace.path("c")).unwrap();
        let disks = ["log.img", "data.img"].map(|name| workspace.path(name));
        let done = recover(&disks[0], &["--backing", disks[1].to_str().unwrap()]);
        assert!(done.status.success(), "round {round}: {}", text(&done.stderr));
        let shown: Vec<u64> = disks.iter().flat_map(|disk| numbers(disk)).collect();
        let newest = shown.iter().copied().max().unwrap();
        assert!(newest > 0, "round {round}: nothing was written back in {lasts:?}");
        let mut expected = vec![0; 2 * BLOCKS as usize];
        places.iter().zip(1..=newest).for_each(|(place, number)| expected[*place as usize] = number);
        assert_eq!(shown, expected, "round {round}: not one moment, {newest} of {written}");
    }
}
