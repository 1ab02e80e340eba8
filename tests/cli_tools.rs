//! The offline verbs, asked of the program itself: `format` destroys only what it was told to,
//! `check` and `dump` never write, `drain` leaves everything on the disk.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod cli_support;
mod client;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use cli_support::{Place, Server, allocated, run};
use client::{Client, ClientOptions, Request};

const MIB: u64 = 1 << 20;

/// Serves a new cache of 64 MiB over a disk of 64 MiB, writes `blocks` blocks of 64 KiB, and ends.
fn written(place: &Place, blocks: u64, signal: &str) -> (String, String) {
    let (socket, cache, disk) = (place.path("s.sock"), place.path("c.img"), place.path("d.img"));
    let args = [
        "--socket",
        &socket,
        "--cache",
        &cache,
        "--cache-size=64MiB",
        "--backing",
        &disk,
        "--backing-size=64MiB",
    ];
    let server = Server::start(place, &socket, &args);
    let mut client = Client::connect(Path::new(&socket), ClientOptions::default());
    for index in 0..blocks {
        let write = Request::write(index * 128, vec![index as u8 + 1; 65536]);
        assert_eq!(client.execute(&write).status, 0);
    }
    assert_eq!(client.execute(&Request::flush()).status, 0);
    server.end(signal);
    (cache, disk)
}

fn assert_on_disk(disk: &str, blocks: u64) {
    let disk = File::open(disk).unwrap();
    let mut block = vec![0; 65536];
    for index in 0..blocks {
        disk.read_exact_at(&mut block, index * 65536).unwrap();
        assert!(block.iter().all(|&byte| byte == index as u8 + 1), "block {index} is not on the disk");
    }
}

#[test]
fn format_makes_a_cache_of_nothing_and_of_zeros() {
    let place = Place::new();
    let cache = place.path("c.img");
    let made = run(&["format", "--cache", &cache, "--cache-size=64MiB"]);
    assert_eq!((made.code, made.err.as_str()), (0, ""));
    assert!(made.out.contains("formatted, 64 MiB") && made.out.contains("page-cache"), "{}", made.out);
    assert!(allocated(&cache) >= 64 * MIB, "not fully allocated");
    assert_eq!(run(&["check", "--cache", &cache]).code, 0);
    assert!(!Path::new(&format!("{cache}.new")).exists());

    let blank = place.zeros("blank.img", 32 * MIB);
    let made = run(&["format", "--cache", &blank, "--segment-size=64KiB"]);
    assert_eq!(made.code, 0, "{}", made.err);
    assert!(made.out.contains("segments of 64 KiB"), "{}", made.out);
    assert_eq!(run(&["check", "--cache", &blank]).code, 0);

    let state = place.path("state");
    assert_eq!(run(&["format", "--state-dir", &state]).code, 0);
    assert_eq!(fs::metadata(format!("{state}/cache.img")).unwrap().len(), 1 << 30);
    assert_eq!(run(&["check", "--state-dir", &state]).code, 0);
}

#[test]
fn format_overwrites_only_when_forced() {
    let place = Place::new();
    let mut foreign = vec![0; 32 << 20];
    foreign[0x438..0x43a].copy_from_slice(b"\x53\xef");
    let ext4 = place.file("ext4.img", &foreign);
    place.refuses(&["format", "--cache", &ext4], 1, &["ext4", "--force"]);
    assert_eq!(run(&["format", "--cache", &ext4, "--force"]).code, 0);
    assert_eq!(run(&["check", "--cache", &ext4]).code, 0);
    place.refuses(&["format", "--cache", &ext4], 1, &["a pcache-vhost cache", "--force"]);
    assert_eq!(run(&["format", "--cache", &ext4, "--force"]).code, 0);
}

#[test]
fn format_refuses_what_cannot_be_a_cache() {
    let place = Place::new();
    let missing = place.path("missing");
    place.refuses(&["format", "--cache", &missing], 1, &["missing does not exist", "--cache-size"]);
    place.refuses(&["format", "--cache", &missing, "--cache-size=1MiB"], 1, &["missing", "at least"]);
    let small = place.zeros("small", MIB);
    place.refuses(&["format", "--cache", &small], 1, &["small", "at least"]);
    place.refuses(&["format", "--cache", &small, "--force"], 1, &["small", "at least"]);
    let blank = place.zeros("blank", 32 * MIB);
    place.refuses(&["format", "--cache", &blank, "--cache-size=64MiB"], 1, &["33554432", "67108864"]);
    place.refuses(&["format", "--cache", "/dev/null", "--force"], 1, &["/dev/null"]);
    let nowhere = place.path("no/where");
    place.refuses(&["format", "--cache", &nowhere, "--cache-size=64MiB"], 1, &["no/where"]);
}

#[test]
fn the_remains_of_a_killed_format_do_not_stop_the_next() {
    let place = Place::new();
    let cache = place.path("c.img");
    place.zeros("c.img.new", 64 * MIB);
    assert_eq!(run(&["format", "--cache", &cache, "--cache-size=64MiB"]).code, 0);
    assert!(!Path::new(&format!("{cache}.new")).exists());
    assert_eq!(run(&["check", "--cache", &cache]).code, 0);
}

#[test]
fn nothing_offline_touches_a_cache_in_use() {
    let place = Place::new();
    let (socket, cache, disk) = (place.path("s.sock"), place.path("c.img"), place.path("d.img"));
    let args = [
        "--socket",
        &socket,
        "--cache",
        &cache,
        "--cache-size=64MiB",
        "--backing",
        &disk,
        "--backing-size=64MiB",
    ];
    let server = Server::start(&place, &socket, &args);
    let holder = server.pid().to_string();
    for verb in [&["format", "--force"][..], &["check"], &["dump"], &["drain"]] {
        let mut args = verb.to_vec();
        args.extend(["--cache", &cache]);
        let ran = run(&args);
        assert_eq!(ran.code, 1, "{verb:?}: {}", ran.out);
        assert!(ran.err.contains("in use by") && ran.err.contains(&holder), "{verb:?}: {}", ran.err);
    }
    server.stop();
}

#[test]
fn check_says_clean_and_changes_nothing() {
    let place = Place::new();
    for signal in ["TERM", "KILL"] {
        let (cache, _) = written(&place, 16, signal);
        let before = place.snapshot();
        let ran = run(&["check", "--cache", &cache]);
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{}", ran.out);
        assert!(ran.out.ends_with(&format!("{cache}: clean\n")), "{}", ran.out);
        assert!(ran.out.contains("volume  disk0: 64 MiB"), "{}", ran.out);
        assert_eq!(place.snapshot(), before);
        let dump = run(&["dump", "--cache", &cache, "--keys"]);
        assert_eq!((dump.code, dump.err.as_str()), (0, ""));
        assert!(dump.out.contains("disk0"), "{}", dump.out);
        assert!(dump.out.len() > run(&["dump", "--cache", &cache]).out.len(), "--keys shows nothing more");
        assert_eq!(place.snapshot(), before);
    }
}

#[test]
fn check_says_damaged_wherever_a_byte_of_metadata_or_data_is_wrong() {
    let place = Place::new();
    let (cache, _) = written(&place, 16, "TERM");
    let image = fs::read(&cache).unwrap();
    // Both superblocks' ends, the start page, the first volume's slot, and the guest's own bytes.
    let data = image.windows(4096).step_by(4096).position(|page| page == [3; 4096]).unwrap() * 4096;
    let places = [200, image.len() - 2 * MIB as usize + 200, 4096 + 30, 2 * 4096 + 40, data + 1000];
    let file = File::options().write(true).open(&cache).unwrap();
    for at in places {
        file.write_all_at(&[image[at] ^ 0x10], at as u64).unwrap();
        let before = place.snapshot();
        let ran = run(&["check", "--cache", &cache]);
        assert_eq!(ran.code, 3, "byte {at}: {}", ran.out);
        assert!(ran.out.contains("damage  ") && ran.out.ends_with(": damaged\n"), "{}", ran.out);
        assert_eq!(place.snapshot(), before);
        file.write_all_at(&[image[at]], at as u64).unwrap();
    }
    assert_eq!(run(&["check", "--cache", &cache]).code, 0);
}

#[test]
fn check_says_what_is_not_ours_and_what_it_is() {
    let place = Place::new();
    let mut foreign = vec![0; 8 << 20];
    foreign[..8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
    for (name, content, says) in [
        ("luks", foreign, "LUKS"),
        ("blank", vec![0; 8 << 20], "nothing but zeros"),
        ("text", b"text ".repeat(10_000), "unknown kind"),
    ] {
        let file = place.file(name, &content);
        let before = place.snapshot();
        let ran = run(&["check", "--cache", &file]);
        assert_eq!(ran.code, 4, "{name}: {}{}", ran.out, ran.err);
        assert!(ran.out.contains(says) && ran.out.contains("not a pcache-vhost cache"), "{}", ran.out);
        place.refuses(&["dump", "--cache", &file], 1, &[name]);
        place.refuses(&["drain", "--cache", &file], 1, &[says]);
        assert_eq!(place.snapshot(), before);
    }
    place.refuses(&["check", "--cache", &place.path("missing")], 1, &["missing"]);
    place.refuses(&["dump", "--cache", &place.path("missing")], 1, &["missing"]);
    place.refuses(&["drain", "--cache", &place.path("missing")], 1, &["missing"]);
}

#[test]
fn drain_brings_everything_to_the_disk_and_leaves_the_cache_clean() {
    for signal in ["TERM", "KILL"] {
        let place = Place::new();
        let (cache, disk) = written(&place, 64, signal);
        let ran = run(&["drain", "--cache", &cache]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        assert!(ran.out.contains("volume  disk0: "), "{}", ran.out);
        assert!(ran.out.contains(&disk) || ran.out.contains("clean already"), "{}", ran.out);
        assert_on_disk(&disk, 64);
        let again = run(&["drain", "--cache", &cache]);
        assert_eq!((again.code, again.out.as_str()), (0, "volume  disk0: clean already\n"));
        let check = run(&["check", "--cache", &cache]);
        assert_eq!(check.code, 0, "{}", check.out);
        // Drained, the cache is not needed any more.
        assert_eq!(run(&["format", "--cache", &cache, "--force"]).code, 0);
        assert_on_disk(&disk, 64);
    }
}

#[test]
fn drain_finds_a_disk_that_moved_and_refuses_a_strange_one() {
    let place = Place::new();
    let (cache, disk) = stuck(&place, 16, "");
    let moved = place.path("moved.img");
    fs::rename(&disk, &moved).unwrap();
    let strange = place.zeros("strange.img", 64 * MIB);
    let small = place.zeros("small.img", 32 * MIB);
    // What is dirty is known only after recovery, which counts a start; the disks stay as they are.
    let disks = |place: &Place| {
        let mut content = place.content();
        content.remove(Path::new(&cache));
        content
    };
    let before = disks(&place);
    let rows: &[(&[&str], &[&str])] = &[
        (&[], &["disk0", "d.img"]),
        (&["--backing", &strange], &["disk0", "pcache-vhost resolve"]),
        (&["--backing", &small, "--force-identity"], &["33554432"]),
        (&["--name=other"], &["no volume `other`"]),
    ];
    for (options, words) in rows {
        let mut args = vec!["drain", "--cache", &cache];
        args.extend_from_slice(options);
        let ran = run(&args);
        assert_eq!(ran.code, 1, "{options:?}: {}", ran.out);
        let last = ran.err.lines().last().unwrap();
        assert!(last.starts_with("pcache-vhost: cache "), "{}", ran.err);
        assert!(words.iter().all(|word| last.contains(word)), "{options:?}: {}", ran.err);
        assert_eq!(disks(&place), before, "{options:?}");
    }
    let ran = run(&["drain", "--cache", &cache, "--backing", &moved]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.out.contains("1 MiB written to"), "{}", ran.out);
}

#[test]
fn drain_of_a_configuration_drains_every_volume() {
    let place = Place::new();
    let dir = place.dir().display();
    let volume = |name: &str| {
        format!(
            "[[volume]]\nname = \"{name}\"\nsocket = \"{dir}/{name}.sock\"\nbacking = \"{dir}/{name}.img\"\n\
             backing_size = \"16MiB\"\n"
        )
    };
    let cache = format!("[[cache]]\nname = \"c\"\npath = \"{dir}/c.img\"\nsize = \"64MiB\"\n");
    let file = place.file("p.toml", format!("{cache}{}{}", volume("a"), volume("b")).as_bytes());
    let server = Server::start_by(&place, &mut cli_support::program(&["--config", &file]));
    for name in ["a", "b"] {
        let socket = place.path(&format!("{name}.sock"));
        let mut client = Client::connect(Path::new(&socket), ClientOptions::default());
        for index in 0..8u64 {
            assert_eq!(client.execute(&Request::write(index * 128, vec![index as u8 + 1; 65536])).status, 0);
        }
        assert_eq!(client.execute(&Request::flush()).status, 0);
    }
    server.stop();
    let cache = place.path("c.img");
    let usage = run(&["drain", "--cache", &cache, "--accept-loss"]);
    assert_eq!((usage.code, usage.err.contains("say which with --name")), (2, true), "{}", usage.err);
    let ran = run(&["drain", "--config", &file]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.out.contains("volume  a: ") && ran.out.contains("volume  b: "), "{}", ran.out);
    for name in ["a", "b"] {
        assert_on_disk(&place.path(&format!("{name}.img")), 8);
    }
}

/// Serves a disk that takes no write beyond its first MiB, so that what is written beyond it stays
/// in the cache: `blocks` blocks of 64 KiB from `FAR` on.
fn stuck(place: &Place, blocks: u64, option: &str) -> (String, String) {
    let (socket, cache, disk) = (place.path("s.sock"), place.path("c.img"), place.zeros("d.img", 64 * MIB));
    assert_eq!(run(&["format", "--cache", &cache, "--cache-size=64MiB"]).code, 0);
    // The shell counts in blocks of 512 bytes.
    let line = format!(
        "ulimit -f 2048; trap '' XFSZ; exec {} --socket={socket} --cache={cache} --backing={disk} {option}",
        env!("CARGO_BIN_EXE_pcache-vhost")
    );
    let mut server = Server::start_by(place, std::process::Command::new("sh").args(["-c", &line]));
    let mut client = Client::connect(Path::new(&socket), ClientOptions::default());
    for index in 0..blocks {
        let write = Request::write(FAR + index * 128, vec![index as u8 + 1; 65536]);
        assert_eq!(client.execute(&write).status, 0);
    }
    assert_eq!(client.execute(&Request::flush()).status, 0);
    server.signal("USR1");
    server.wait_for("counters volume=disk0");
    server.end("KILL");
    (cache, disk)
}

const FAR: u64 = 2 * MIB / 512;

#[test]
fn what_the_disk_refused_stays_in_the_cache_and_drain_brings_it_later() {
    let place = Place::new();
    let (cache, disk) = stuck(&place, 64, "");
    let ran = run(&["drain", "--cache", &cache]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert_eq!(ran.out, format!("volume  disk0: 4 MiB written to {disk}, clean\n"));
    let mut block = vec![0; 65536];
    for index in 0..64 {
        File::open(&disk).unwrap().read_exact_at(&mut block, FAR * 512 + index * 65536).unwrap();
        assert_eq!(block, vec![index as u8 + 1; 65536]);
    }
}

#[test]
fn a_read_only_server_leaves_what_is_dirty_in_the_cache() {
    let place = Place::new();
    let (cache, disk) = stuck(&place, 16, "");
    let (socket, before) = (place.path("s.sock"), fs::read(&disk).unwrap());
    let args = ["--socket", &socket, "--cache", &cache, "--backing", &disk, "--read-only"];
    let server = Server::start(&place, &socket, &args);
    let mut client = Client::connect(Path::new(&socket), ClientOptions::default());
    for index in 0..16u64 {
        let read = client.execute(&Request::read(FAR + index * 128, 65536));
        assert_eq!((read.status, read.data), (0, vec![index as u8 + 1; 65536]));
    }
    drop(client);
    let (code, log) = server.end("TERM");
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("its dirty data stays in the cache") && !log.contains("ERROR"), "{log}");
    assert!(fs::read(&disk).unwrap() == before, "the disk of a read-only volume was written");
    let ran = run(&["drain", "--cache", &cache]);
    assert_eq!(ran.out, format!("volume  disk0: 1 MiB written to {disk}, clean\n"));
}

#[test]
fn a_drain_that_the_disk_refuses_says_so_and_loses_nothing() {
    let place = Place::new();
    let (cache, disk) = stuck(&place, 16, "");
    let line = format!(
        "ulimit -f 2048; trap '' XFSZ; exec {} drain --cache={cache}",
        env!("CARGO_BIN_EXE_pcache-vhost")
    );
    let ran = cli_support::ran(std::process::Command::new("sh").args(["-c", &line]));
    assert_eq!(ran.code, 1, "{}", ran.out);
    let last = ran.err.lines().last().unwrap();
    assert!(last.contains("disk0") && last.contains("stays in the cache"), "{last}");
    let ran = run(&["drain", "--cache", &cache]);
    assert_eq!(ran.out, format!("volume  disk0: 1 MiB written to {disk}, clean\n"));
}

#[test]
fn a_damaged_volume_is_read_but_not_written_until_its_loss_is_accepted() {
    // Persistent memory's rules: every record below a valid one must be there.
    let place = Place::in_memory();
    // So few that their segment is still open: a sealed one has a second copy of its keys.
    let (cache, disk) = stuck(&place, 4, "--assume-dax");
    let magic = pcache_vhost::onmedia::RECORD_MAGIC.to_le_bytes();
    let image = fs::read(&cache).unwrap();
    // Records begin at multiples of 256 bytes and grow down; the flush made all of these whole.
    let records: Vec<usize> =
        (0..image.len()).step_by(256).filter(|&at| image[at..].starts_with(&magic)).collect();
    let file = File::options().write(true).open(&cache).unwrap();
    let keys = records.last().unwrap() + 100;
    file.write_all_at(&[image[keys] ^ 1], keys as u64).unwrap();
    assert_eq!(run(&["check", "--cache", &cache]).code, 3);

    let socket = place.path("s.sock");
    let args = ["--socket", &socket, "--cache", &cache, "--backing", &disk, "--assume-dax"];
    for args in [&args[..], &["drain", "--cache", &cache, "--assume-dax"]] {
        let ran = run(args);
        assert_eq!(ran.code, 1, "{args:?}: {}", ran.out);
        assert!(ran.err.contains("has lost dirty data") && ran.err.contains("--accept-loss"), "{}", ran.err);
    }
    let with = |option: &'static str| {
        let mut all = args.to_vec();
        all.push(option);
        all
    };
    let server = Server::start(&place, &socket, &with("--read-only"));
    let mut client = Client::connect(Path::new(&socket), ClientOptions::default());
    assert_eq!(client.execute(&Request::read(FAR + 3 * 128, 4096)).data, vec![4; 4096]);
    drop(client);
    server.stop();
    assert_eq!(run(&args).code, 1, "reading accepted the loss");

    let server = Server::start(&place, &socket, &with("--accept-loss"));
    let mut client = Client::connect(Path::new(&socket), ClientOptions::default());
    assert_eq!(client.execute(&Request::write(0, vec![0xee; 4096])).status, 0);
    drop(client);
    server.stop();
    Server::start(&place, &socket, &args).stop();
}
