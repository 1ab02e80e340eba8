//! The program as a server: what it makes, prints, serves and refuses, each asked of the program
//! itself. Traffic in earnest is `tests/traffic.rs`'s business; here a block or two show that what
//! was promised is what is served.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod cli_support;
mod client;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use cli_support::{Place, Server, allocated, is_socket, program, run};
use client::{Client, ClientOptions, Kind, Range, Request};

const MIB: u64 = 1 << 20;

fn connect(socket: &str) -> Client {
    Client::connect(Path::new(socket), ClientOptions::default())
}

fn block(stamp: u8) -> Vec<u8> {
    vec![stamp; 4096]
}

/// Writes a block, flushes, and reads it back.
fn assert_writable(client: &mut Client, sector: u64, stamp: u8) {
    assert_eq!(client.execute(&Request::write(sector, block(stamp))).status, 0, "write");
    assert_eq!(client.execute(&Request::flush()).status, 0, "flush");
    assert_holds(client, sector, stamp);
}

fn assert_holds(client: &mut Client, sector: u64, stamp: u8) {
    let read = client.execute(&Request::read(sector, 4096));
    assert_eq!((read.status, read.data == block(stamp)), (0, true), "sector {sector} is not {stamp}'s");
}

/// A cache of 64 MiB and a disk of 256 MiB, both to be made, and more options.
fn small(place: &Place, more: &[&str]) -> (String, Vec<String>) {
    let socket = place.path("s.sock");
    let mut args = vec![format!("--socket={socket}"), format!("--cache={}", place.path("c.img"))];
    args.extend(["--cache-size=64MiB".into(), format!("--backing={}", place.path("d.img"))]);
    args.push("--backing-size=256MiB".into());
    args.extend(more.iter().map(|&arg| arg.to_owned()));
    (socket, args)
}

fn start_small(place: &Place, more: &[&str]) -> (String, Server) {
    let (socket, args) = small(place, more);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let server = Server::start(place, &socket, &args);
    (socket, server)
}

fn refuse_small(place: &Place, more: &[&str], words: &[&str]) {
    let (_, args) = small(place, more);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    place.refuses(&args, 1, words);
}

#[test]
fn a_socket_alone_is_enough_for_a_disk() {
    let place = Place::new();
    let (socket, state) = (place.path("s.sock"), place.path("state"));
    let args = ["--socket", &socket, "--state-dir", &state];
    let server = Server::start(&place, &socket, &args);
    let mut client = connect(&socket);
    assert_eq!(client.capacity(), 10 << 30 >> 9);
    assert_writable(&mut client, 8, 1);
    drop(client);

    let (cache, disk) = (format!("{state}/cache.img"), format!("{state}/disk.img"));
    assert!(allocated(&cache) >= 1 << 30, "the cache is not fully allocated");
    assert!(allocated(&disk) < 1 << 20, "the disk is not sparse");
    assert_eq!(fs::metadata(&disk).unwrap().len(), 10 << 30);
    assert_eq!(fs::metadata(&state).unwrap().permissions().mode() & 0o777, 0o700);
    let out = server.out();
    for words in [
        format!("{cache}: 1 GiB, page-cache, created"),
        "a power cut once a FLUSH".into(),
        format!("disk0: 10 GiB on {disk}, created, writeback, order strict"),
        format!("-chardev socket,id=vu-disk0,path={socket},reconnect-ms=200"),
        "-device vhost-user-blk-pci,chardev=vu-disk0".into(),
        "memory-backend-memfd,id=mem,size=4G,share=on".into(),
        format!("--disk vhost_user=true,socket={socket},num_queues=1"),
    ] {
        assert!(out.contains(&words), "{out}\nwithout: {words}");
    }
    server.stop();

    let server = Server::start(&place, &socket, &args);
    assert!(!server.out().contains("created"), "{}", server.out());
    assert_holds(&mut connect(&socket), 8, 1);
    server.stop();
}

#[test]
fn a_stop_by_signal_is_clean_and_leaves_no_socket() {
    for signal in ["TERM", "INT"] {
        let place = Place::new();
        let (socket, server) = start_small(&place, &[]);
        let mut client = connect(&socket);
        assert_writable(&mut client, 0, 7);
        let (code, log) = server.end(signal);
        assert_eq!(code, Some(0), "{log}");
        for words in [&format!("stopping: SIG{signal}"), "counters volume=disk0 ", "c.img closed"] {
            assert!(log.contains(words), "{log}\nwithout: {words}");
        }
        assert!(!Path::new(&socket).exists() && !Path::new(&format!("{socket}.lock")).exists());
        let (socket, server) = start_small(&place, &[]);
        assert!(server.err().contains("was_clean=true"), "{}", server.err());
        assert_holds(&mut connect(&socket), 0, 7);
        server.stop();
    }
}

#[test]
fn what_a_killed_server_leaves_does_not_stop_the_next() {
    let place = Place::new();
    let (socket, server) = start_small(&place, &[]);
    assert_writable(&mut connect(&socket), 16, 3);
    let (code, _) = server.end("KILL");
    assert_eq!((code, is_socket(&socket)), (None, true));
    let (socket, server) = start_small(&place, &[]);
    assert!(server.err().contains("was_clean=false"), "{}", server.err());
    assert_holds(&mut connect(&socket), 16, 3);
    server.stop();
}

#[test]
fn usr1_logs_the_state_and_the_counters_of_each_volume() {
    let place = Place::new();
    let (socket, mut server) = start_small(&place, &[]);
    assert_writable(&mut connect(&socket), 0, 1);
    server.signal("USR1");
    server.wait_for("counters volume=disk0");
    let log = server.err();
    let line = log.lines().find(|line| line.contains("counters volume=disk0")).unwrap();
    for field in [
        "writes=1",
        "flushes=1",
        "read_hits=1",
        "read_misses=",
        "reclaimed=",
        "dirty_bytes=",
        "free_segments=",
    ] {
        assert!(line.contains(&format!(" {field}")), "{line}\nwithout: {field}");
    }
    server.stop();
    // Also where the level is above such lines: they were asked for.
    let (_, mut server) = start_small(&place, &["--log-level=error"]);
    assert_eq!(server.err(), "");
    server.signal("USR1");
    server.wait_for("counters volume=disk0");
    let words: Vec<_> = server.err().lines().map(|line| line.split(' ').next().map(str::to_owned)).collect();
    assert_eq!(words, ["scrub", "status", "counters"].map(|word| Some(word.to_owned())));
    server.stop();
}

#[test]
fn log_lines_are_one_per_event() {
    let place = Place::new();
    let (socket, server) = start_small(&place, &["--log-level=debug"]);
    drop(connect(&socket));
    let (_, log) = server.end("TERM");
    assert!(!log.is_empty());
    for line in log.lines() {
        let is_event = ["ERROR", " WARN", " INFO", "DEBUG", "TRACE"].iter().any(|level| line.contains(level));
        assert!(line.starts_with("20") && is_event, "not an event: {line}");
    }
}

#[test]
fn a_second_start_is_refused_with_the_name_of_the_first() {
    let place = Place::new();
    let (_, server) = start_small(&place, &[]);
    let holder = format!("{}", server.pid());
    let its_own = ["c.img", "d.img"];
    let (_, args) = small(&place, &[]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    place.refuses_beside(&args, 1, &["s.sock", "in use by", &holder, "pcache-vhost"], &its_own);
    let other = place.path("t.sock");
    let (cache, disk) = (place.path("c.img"), place.path("d.img"));
    let disk2 = place.zeros("d2.img", MIB);
    let args = ["--socket", &other, "--cache", &cache, "--backing", &disk2];
    place.refuses_beside(&args, 1, &["c.img", "in use by", &holder, "pcache-vhost"], &its_own);
    let cache2 = place.path("c2.img");
    let args = ["--socket", &other, "--cache", &cache2, "--cache-size=64MiB", "--backing", &disk];
    let ran = run(&args);
    assert_eq!(ran.code, 1);
    assert!(ran.err.contains("d.img is locked by") && ran.err.contains(&holder), "{}", ran.err);
    assert!(!Path::new(&cache2).exists() && !Path::new(&other).exists());
    server.stop();
}

#[test]
fn a_stale_socket_is_replaced_and_anything_else_never() {
    let place = Place::new();
    let socket = place.path("s.sock");
    drop(UnixListener::bind(&socket).unwrap());
    assert!(is_socket(&socket));
    let (_, server) = start_small(&place, &[]);
    drop(connect(&socket));
    server.stop();
    fs::write(&socket, "precious").unwrap();
    refuse_small(&place, &[], &["is a file, not a socket"]);
    fs::remove_file(&socket).unwrap();
    let _foreign = UnixListener::bind(&socket).unwrap();
    refuse_small(&place, &[], &["in use by", &std::process::id().to_string()]);
}

#[test]
fn the_socket_has_the_mode_and_group_asked_for() {
    let place = Place::new();
    let gid = fs::metadata(place.dir()).unwrap().gid().to_string();
    let group = format!("--socket-group={gid}");
    for (options, mode) in [
        (&[][..], 0o600),
        (&[group.as_str()], 0o660),
        (&["--socket-mode=0606"], 0o606),
        (&[group.as_str(), "--socket-mode=0620"], 0o620),
    ] {
        let (socket, server) = start_small(&place, options);
        let about = fs::metadata(&socket).unwrap();
        assert_eq!((about.mode() & 0o777, about.gid().to_string()), (mode, gid.clone()), "{options:?}");
        server.stop();
    }
    refuse_small(&place, &["--socket-group=no-such-group"], &["no group `no-such-group`"]);
    let nowhere = place.path("nowhere/s.sock");
    let state = place.path("state");
    place.refuses(&["--socket", &nowhere, "--state-dir", &state], 1, &["no directory", "nowhere"]);
}

/// Runs the program with `socket` as descriptor 5. The shell moves it there, since what the
/// standard library opens is closed on exec.
fn with_descriptor(place: &Place, socket: OwnedFd) -> Command {
    let (cache, disk) = (place.path("c.img"), place.path("d.img"));
    let line = format!(
        "exec 5<&0 </dev/null; exec {} --fd=5 --cache={cache} --cache-size=64MiB --blk-file={disk} \
         --backing-size=256MiB",
        env!("CARGO_BIN_EXE_pcache-vhost")
    );
    let mut command = Command::new("sh");
    command.args(["-c", &line]).stdin(Stdio::from(socket));
    command
}

#[test]
fn an_inherited_listening_socket_is_served() {
    let place = Place::new();
    let path = place.path("parent.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = Server::start_by(&place, &mut with_descriptor(&place, listener.into()));
    assert_writable(&mut connect(&path), 0, 1);
    assert_writable(&mut connect(&path), 8, 2);
    server.stop();
    assert!(is_socket(&path), "the parent's socket was removed");
}

#[test]
fn an_inherited_connection_is_served_and_its_end_is_the_servers() {
    let place = Place::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut server = Server::start_by(&place, &mut with_descriptor(&place, theirs.into()));
    drop(ours);
    let (code, log) = server.ended();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("c.img closed"), "{log}");
}

#[test]
fn a_descriptor_that_is_no_socket_is_refused() {
    let place = Place::new();
    let file = File::open("/dev/null").unwrap();
    let before = place.snapshot();
    let output = with_descriptor(&place, file.into()).stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with("pcache-vhost: --fd 5: "), "{said}");
    assert_eq!(place.snapshot(), before);
    let state = place.path("state");
    place.refuses(&["--fd=199", "--state-dir", &state], 1, &["--fd 199: "]);
    place.refuses(&["--fd=1", "--state-dir", &state], 1, &["--fd 1: ", "standard streams"]);
}

#[test]
fn every_mode_serves_what_was_written_and_keeps_it_over_a_change_of_mode() {
    let place = Place::new();
    let modes = ["writeback", "writethrough", "writearound", "readonly", "passthrough", "writeback"];
    for (index, mode) in modes.iter().enumerate() {
        let (socket, server) = start_small(&place, &[&format!("--cache-mode={mode}")]);
        assert!(server.out().contains(&format!("{mode}, order strict")), "{}", server.out());
        let mut client = connect(&socket);
        for earlier in 0..index {
            assert_holds(&mut client, 8 * earlier as u64, earlier as u8 + 1);
        }
        assert_writable(&mut client, 8 * index as u64, index as u8 + 1);
        drop(client);
        server.stop();
    }
}

#[test]
fn every_option_is_seen_by_the_guest_or_in_the_output() {
    let place = Place::new();
    let id = |client: &mut Client| {
        let answer = client.execute(&Request::get_id()).data;
        String::from_utf8(answer).unwrap().trim_end_matches('\0').to_owned()
    };
    let (socket, server) =
        start_small(&place, &["--order=relaxed", "--data-crc", "--poll-us=0", "--discard=keep"]);
    assert!(server.out().contains("order relaxed"), "{}", server.out());
    let mut client = connect(&socket);
    assert_eq!(id(&mut client), "disk0");
    assert_writable(&mut client, 0, 1);
    let discard = Request::ranges(Kind::Discard, &[Range { sector: 0, sectors: 8, flags: 0 }]);
    assert_eq!(client.execute(&discard).status, 0);
    assert_holds(&mut client, 0, 0);
    drop(client);
    server.stop();

    let options = ["--serial=SN 42", "--queues=3", "--queue-size=64", "--block-size=4096"];
    let (socket, server) = start_small(&place, &options);
    let client_options = ClientOptions { queues: 3, queue_size: 64, ..ClientOptions::default() };
    let mut client = Client::connect(Path::new(&socket), client_options);
    assert_eq!(id(&mut client), "SN 42");
    // virtio 1.3 §5.2.4: blk_size at 20, num_queues at 34.
    assert_eq!(client.config[20..24], 4096u32.to_le_bytes());
    assert_eq!(client.config[34..36], 3u16.to_le_bytes());
    assert_writable(&mut client, 0, 1);
    drop(client);
    server.stop();

    let (socket, server) = start_small(&place, &["--read-only"]);
    assert!(server.out().contains("read-only"), "{}", server.out());
    let mut client = connect(&socket);
    assert_holds(&mut client, 0, 1);
    assert_ne!(client.execute(&Request::write(0, block(9))).status, 0, "a read-only disk was written");
    drop(client);
    server.stop();
}

#[test]
fn the_names_that_qemus_conventions_use_mean_the_same() {
    let place = Place::new();
    let (socket, state) = (place.path("s.sock"), place.path("state"));
    let disk = place.zeros("d.img", 4 * MIB);
    let args = [
        "--socket-path",
        &socket,
        "--blk-file",
        &disk,
        "--state-dir",
        &state,
        "--cache-size=64MiB",
        "--read-only",
    ];
    let server = Server::start(&place, &socket, &args);
    let mut client = connect(&socket);
    assert_eq!(client.capacity(), 4 * MIB / 512);
    assert_ne!(client.execute(&Request::write(0, block(1))).status, 0);
    drop(client);
    server.stop();
}

#[test]
fn a_configuration_file_serves_several_volumes_on_several_caches() {
    let place = Place::new();
    let text = |extra: &str| {
        let dir = place.dir().display();
        format!(
            r#"
            [[cache]]
            name = "fast"
            path = "{dir}/fast.img"
            size = "64MiB"
            segment_size = "256KiB"

            [[cache]]
            name = "faster"
            path = "{dir}/faster.img"
            size = "64MiB"

            [[volume]]
            name = "web"
            cache = "fast"
            socket = "{dir}/web.sock"
            backing = "{dir}/web.img"
            backing_size = "32MiB"
            serial = "WEB"
            {extra}

            [[volume]]
            name = "db"
            cache = "fast"
            socket = "{dir}/db.sock"
            socket_mode = "0666"
            backing = "{dir}/db.img"
            backing_size = "16MiB"
            queues = 2
            order = "relaxed"

            [[volume]]
            name = "log"
            cache = "faster"
            socket = "{dir}/log.sock"
            backing = "{dir}/log.img"
            backing_size = "8MiB"
            mode = "writethrough"
            "#
        )
    };
    let file = place.file("pcache.toml", text("").as_bytes());
    let serve = || Server::start_by(&place, &mut program(&["--config", &file]));
    let server = serve();
    for (index, (name, size)) in [("web", 32), ("db", 16), ("log", 8)].into_iter().enumerate() {
        let mut client = connect(&place.path(&format!("{name}.sock")));
        assert_eq!(client.capacity(), size * MIB / 512);
        assert_writable(&mut client, 0, index as u8 + 1);
    }
    assert_eq!(fs::metadata(place.path("db.sock")).unwrap().mode() & 0o777, 0o666);
    let (_, log) = server.end("TERM");
    assert_eq!(log.matches("counters volume=").count(), 3, "{log}");
    let server = serve();
    for (index, name) in ["web", "db", "log"].into_iter().enumerate() {
        assert_holds(&mut connect(&place.path(&format!("{name}.sock"))), 0, index as u8 + 1);
    }
    server.stop();
    // One volume that cannot start keeps all of them from starting, and nothing is left of it.
    fs::rename(place.path("log.img"), place.path("gone.img")).unwrap();
    place.file("pcache.toml", text("").replace("backing_size = \"8MiB\"", "").as_bytes());
    place.refuses(&["--config", &file], 1, &["log.img"]);
}

#[test]
fn memory_that_does_not_survive_the_host_needs_an_explicit_yes() {
    let place = Place::in_memory();
    refuse_small(&place, &[], &["volatile", "--allow-volatile"]);
    let (socket, server) = start_small(&place, &["--allow-volatile"]);
    assert!(server.out().contains("volatile"), "{}", server.out());
    assert_writable(&mut connect(&socket), 0, 1);
    server.stop();
    let (socket, server) = start_small(&place, &["--cache-mode=writethrough"]);
    assert_holds(&mut connect(&socket), 0, 1);
    server.stop();
    let (socket, server) = start_small(&place, &["--assume-dax"]);
    assert!(server.out().contains("assume-dax") && server.out().contains("tests only"), "{}", server.out());
    assert!(server.err().contains("WARN") && server.err().contains("tests only"), "{}", server.err());
    assert_holds(&mut connect(&socket), 0, 1);
    server.stop();
    let disk = Place::new();
    refuse_small(&disk, &["--assume-dax"], &["cannot be assumed to be DAX"]);
}

#[test]
fn a_cache_that_cannot_be_is_refused_before_it_is_made() {
    let place = Place::new();
    let (socket, cache, disk) = (place.path("s.sock"), place.path("c.img"), place.zeros("d.img", MIB));
    let with = |more: &[&'static str]| {
        let mut args = vec!["--socket", &socket, "--cache", &cache, "--backing", &disk];
        args.extend_from_slice(more);
        args.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let refuses = |more: &[&'static str], words: &[&str]| {
        let args = with(more);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        place.refuses(&args, 1, words);
    };
    refuses(&[], &["c.img does not exist", "--cache-size"]);
    refuses(&["--cache-size=1MiB"], &["c.img", "at least"]);
    refuses(&["--cache-size=64MiB", "--segment-size=64MiB"], &["c.img"]);
    refuses(&["--cache-size=64MiB", "--block-size=512", "--backing-size=2MiB"], &["d.img"]);
    let directory = place.path("dir");
    fs::create_dir(&directory).unwrap();
    place.refuses(&["--socket", &socket, "--cache", &directory, "--backing", &disk], 1, &["directory"]);
    place.refuses(&["--socket", &socket, "--cache=/dev/null", "--backing", &disk], 1, &["/dev/null"]);
}

#[test]
fn a_cache_that_is_something_else_is_never_overwritten() {
    let place = Place::new();
    let (socket, disk) = (place.path("s.sock"), place.zeros("d.img", MIB));
    let mut foreign = vec![0; 8 << 20];
    foreign[..4].copy_from_slice(b"XFSB");
    let xfs = place.file("xfs", &foreign);
    place.refuses(
        &["--socket", &socket, "--cache", &xfs, "--backing", &disk],
        1,
        &["an XFS file system", "--force"],
    );
    let blank = place.zeros("blank", 8 * MIB);
    place.refuses(
        &["--socket", &socket, "--cache", &blank, "--backing", &disk],
        1,
        &["nothing but zeros", "pcache-vhost format"],
    );
    let text = place.file("text", &b"diary ".repeat(100_000));
    place.refuses(&["--socket", &socket, "--cache", &text, "--backing", &disk], 1, &["unknown kind"]);
    let empty = place.file("empty", b"");
    place.refuses(&["--socket", &socket, "--cache", &empty, "--backing", &disk], 1, &["empty"]);
}

#[test]
fn a_cache_of_another_version_or_with_a_wrong_checksum_is_refused() {
    use std::os::unix::fs::FileExt;
    let place = Place::new();
    let (_, server) = start_small(&place, &[]);
    server.stop();
    let cache = File::options().read(true).write(true).open(place.path("c.img")).unwrap();
    let len = cache.metadata().unwrap().len();
    let whole: Vec<Vec<u8>> = [0, len - 2 * MIB]
        .map(|at| {
            let mut page = vec![0; 4096];
            cache.read_exact_at(&mut page, at).unwrap();
            page
        })
        .into();
    let put = |change: &dyn Fn(&mut [u8])| {
        for (page, at) in whole.iter().zip([0, len - 2 * MIB]) {
            let mut page = page.clone();
            change(&mut page);
            cache.write_all_at(&page, at).unwrap();
        }
    };
    put(&|page| page[100] ^= 1);
    refuse_small(&place, &[], &["c.img", "superblock"]);
    // FORMAT.md: version at 8, CRC-32 of the page with the field zeroed at 12.
    put(&|page| {
        page[8..12].copy_from_slice(&999u32.to_le_bytes());
        page[12..16].fill(0);
        let crc = crc32fast::hash(page);
        page[12..16].copy_from_slice(&crc.to_le_bytes());
    });
    refuse_small(&place, &[], &["c.img", "version 999"]);
    // One good copy is enough.
    put(&|_| {});
    cache.write_all_at(&[0xff; 4096], 0).unwrap();
    let (_, server) = start_small(&place, &[]);
    server.stop();
    cache.set_len(len / 2).unwrap();
    let (_, args) = small(&place, &[]);
    let args: Vec<&str> = args.iter().filter(|arg| !arg.contains("-size")).map(String::as_str).collect();
    cache.write_all_at(&whole[0], 0).unwrap();
    place.refuses(&args, 1, &["c.img", "cut off"]);
}

#[test]
fn a_disk_that_cannot_be_served_is_refused_with_what_to_do() {
    let place = Place::new();
    let (socket, cache) = (place.path("s.sock"), place.path("c.img"));
    let refuses = |disk: &str, words: &[&str]| {
        let args = ["--socket", &socket, "--cache", &cache, "--cache-size=64MiB", "--backing", disk];
        place.refuses(&args, 1, words);
    };
    refuses(&place.path("missing"), &["missing", "no such"]);
    refuses(&place.zeros("odd", 1000), &["odd", "multiple"]);
    refuses(&place.zeros("empty", 0), &["empty"]);
    refuses(place.dir().to_str().unwrap(), &["directory"]);
    refuses("/dev/null", &["/dev/null"]);
    let mut image = vec![0; 1 << 20];
    for (magic, name) in
        [(&b"QFI\xfb\0\0\0\x03"[..], "qcow2"), (b"KDMV\x01\0\0\0", "VMDK"), (b"LUKS\xba\xbe\0\x02", "LUKS")]
    {
        image[..8].copy_from_slice(magic);
        let disk = place.file(name, &image);
        refuses(&disk, &[name]);
        let args = [
            "--socket",
            &socket,
            "--cache",
            &place.path(&format!("{name}.cache")),
            "--cache-size=64MiB",
            "--backing",
            &disk,
            "--backing-format=raw",
        ];
        Server::start(&place, &socket, &args).stop();
    }
}

#[test]
fn a_disk_that_is_not_the_caches_is_refused_unless_forced() {
    let place = Place::new();
    let (socket, server) = start_small(&place, &[]);
    assert_writable(&mut connect(&socket), 0, 1);
    server.stop();
    let cache = place.path("c.img");
    // Another disk of the same size, with other content.
    let other = place.zeros("other.img", 256 * MIB);
    fs::write(&other, "other").unwrap();
    File::options().write(true).open(&other).unwrap().set_len(256 * MIB).unwrap();
    let args = ["--socket", &socket, "--cache", &cache, "--backing", &other];
    place.refuses(&args, 1, &["disk0", "not the one", "d.img", "pcache-vhost resolve"]);
    let mut forced = args.to_vec();
    forced.push("--force-identity");
    Server::start(&place, &socket, &forced).stop();
    // The disk shrank, or grew.
    let own = File::options().write(true).open(&other).unwrap();
    own.set_len(128 * MIB).unwrap();
    place.refuses(&args, 1, &["134217728", "268435456"]);
    place.refuses(&forced, 1, &["134217728", "268435456"]);
    own.set_len(256 * MIB).unwrap();
}

#[test]
fn a_disk_that_was_written_behind_the_cache_is_refused_unless_forced() {
    let place = Place::new();
    let (socket, server) = start_small(&place, &[]);
    assert_writable(&mut connect(&socket), 0, 1);
    server.stop();
    fs::write(place.path("d2.img"), "").unwrap();
    let disk = File::options().write(true).open(place.path("d.img")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&disk, b"changed", 0).unwrap();
    refuse_small(&place, &[], &["changed since", "pcache-vhost resolve"]);
    let (socket, server) = start_small(&place, &["--force-identity=disk0"]);
    assert_holds(&mut connect(&socket), 0, 1);
    server.stop();
}

#[test]
fn a_disk_locked_by_another_program_is_refused_with_its_name() {
    let place = Place::new();
    let disk = place.zeros("d.img", MIB);
    let mut holder = Command::new("flock").args(["-x", &disk, "sleep", "600"]).spawn().unwrap();
    while Command::new("flock").args(["-n", &disk, "true"]).status().unwrap().success() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let (socket, cache) = (place.path("s.sock"), place.path("c.img"));
    let args = ["--socket", &socket, "--cache", &cache, "--cache-size=64MiB", "--backing", &disk];
    let ran = run(&args);
    // `flock` hands its lock to the command it runs: kill the group of two by their own names.
    let killed = Command::new("pkill").args(["-KILL", "-P", &holder.id().to_string()]).status();
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert!(killed.is_ok());
    assert_eq!(ran.code, 1, "{}", ran.err);
    assert!(ran.err.contains("is locked by") && ran.err.contains(&holder.id().to_string()), "{}", ran.err);
    assert!(!Path::new(&cache).exists());
}

#[test]
fn a_stop_while_starting_ends_it_at_once() {
    let place = Place::new();
    let disk = place.zeros("d.img", MIB);
    // A start waits some seconds for a killed predecessor's lock on the disk; this one is ours.
    let holder = File::open(&disk).unwrap();
    holder.lock().unwrap();
    let (socket, cache) = (place.path("s.sock"), place.path("c.img"));
    let args = ["--socket", &socket, "--cache", &cache, "--cache-size=64MiB", "--backing", &disk];
    let mut server = Server::spawn(&place, &mut program(&args));
    server.wait_for("waiting up to");
    let (code, log) = server.end("TERM");
    assert_eq!((code, log.contains("stopped while starting")), (Some(0), true), "{log}");
    assert!(!Path::new(&cache).exists() && !Path::new(&socket).exists());
    holder.unlock().unwrap();
    Server::start(&place, &socket, &args).stop();
}

/// A loop device or a mount of a test, undone when dropped; `None` where it is not permitted.
struct Undo(Vec<Vec<String>>);

impl Drop for Undo {
    fn drop(&mut self) {
        for command in self.0.drain(..).rev() {
            let done = Command::new(&command[0]).args(&command[1..]).status();
            assert!(done.is_ok_and(|status| status.success()), "{command:?}");
        }
    }
}

impl Undo {
    fn after(&mut self, does: &[&str], undo: &[&str]) -> Option<String> {
        let done = Command::new(does[0]).args(&does[1..]).output();
        match done {
            Ok(output) if output.status.success() => {
                let said = String::from_utf8(output.stdout).unwrap().trim().to_owned();
                let undo = undo.iter().map(|word| if *word == "{}" { said.clone() } else { (*word).into() });
                self.0.push(undo.collect());
                Some(said)
            }
            failed => {
                eprintln!("skipped: {does:?} is not possible here: {failed:?}");
                None
            }
        }
    }
}

#[test]
fn a_mounted_disk_is_refused() {
    let place = Place::new();
    let image = place.zeros("fs.img", 16 * MIB);
    assert!(Command::new("/sbin/mkfs.ext4").args(["-q", "-F", &image]).status().unwrap().success());
    let mut undo = Undo(Vec::new());
    let mount = place.path("mnt");
    fs::create_dir(&mount).unwrap();
    let Some(device) = undo.after(&["losetup", "--find", "--show", &image], &["losetup", "--detach", "{}"])
    else {
        return;
    };
    let Some(_) = undo.after(&["mount", &device, &mount], &["umount", &mount]) else { return };
    let (socket, cache) = (place.path("s.sock"), place.path("c.img"));
    for disk in [&device, &image] {
        let ran = run(&["--socket", &socket, "--cache", &cache, "--cache-size=64MiB", "--backing", disk]);
        assert_eq!(ran.code, 1, "{disk} {}", ran.err);
        assert!(ran.err.contains("in use") && ran.err.contains(&mount), "{}", ran.err);
        assert!(!Path::new(&cache).exists() && !Path::new(&socket).exists());
    }
    let ran = run(&["format", "--cache", &device, "--force"]);
    assert_eq!(ran.code, 1, "{}", ran.out);
    assert!(ran.err.contains("in use"), "{}", ran.err);
}

#[test]
fn a_file_system_too_full_for_the_cache_is_left_as_it_was() {
    let place = Place::new();
    let mount = place.path("small");
    fs::create_dir(&mount).unwrap();
    let mut undo = Undo(Vec::new());
    let Some(_) =
        undo.after(&["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", &mount], &["umount", &mount])
    else {
        return;
    };
    let (socket, cache) = (place.path("s.sock"), format!("{mount}/c.img"));
    let disk = place.zeros("d.img", MIB);
    let args = ["--socket", &socket, "--cache", &cache, "--cache-size=64MiB", "--backing", &disk];
    place.refuses(&args, 1, &["no space", "67108864"]);
    place.refuses(&["format", "--cache", &cache, "--cache-size=64MiB"], 1, &["no space"]);
    assert_eq!(fs::read_dir(&mount).unwrap().count(), 0);
}

#[test]
fn the_block_device_of_persistent_memory_is_refused_in_favour_of_dax() {
    if !Path::new("/dev/pmem0").exists() {
        eprintln!("skipped: there is no /dev/pmem0; src/pmem tests the decision itself");
        return;
    }
    let place = Place::new();
    let (socket, disk) = (place.path("s.sock"), place.zeros("d.img", MIB));
    place.refuses(&["--socket", &socket, "--cache=/dev/pmem0", "--backing", &disk], 1, &["devdax", "dax"]);
}

#[test]
fn a_disk_whose_guest_has_encrypted_it_is_served_again() {
    let place = Place::new();
    let (socket, server) = start_small(&place, &[]);
    let mut client = connect(&socket);
    let mut luks = vec![0; 4096];
    luks[..8].copy_from_slice(b"LUKS\xba\xbe\x00\x02");
    assert_eq!(client.execute(&Request::write(0, luks.clone())).status, 0);
    assert_eq!(client.execute(&Request::flush()).status, 0);
    drop(client);
    server.stop();
    let drained = run(&["drain", "--cache", &place.path("c.img")]);
    assert_eq!(drained.code, 0, "{}", drained.err);
    let (socket, server) = start_small(&place, &[]);
    assert_eq!(connect(&socket).execute(&Request::read(0, 4096)).data, luks);
    server.stop();
    // To a cache that does not know the disk it is still an image of another format.
    let (other, disk) = (place.path("other.img"), place.path("d.img"));
    let args = ["--socket", &socket, "--cache", &other, "--cache-size=64MiB", "--backing", &disk];
    place.refuses(&args, 1, &["LUKS", "its format is raw"]);
}
