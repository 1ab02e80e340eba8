//! A daemon is replaced while guests use it: by a successor that takes over, or by a kill and a start.
//!
//! `PCACHE_UPGRADES` sets how many upgrades are measured (default 6), `PCACHE_RESTARTS` how many kills
//! (default 6), `PCACHE_WARM_MIB` how much lies in the cache meanwhile (default 128, in 4 KiB pieces at
//! random places), `PCACHE_PAUSE_MS_MAX` the longest pause at the 99th percentile (default 5000: other tests
//! run beside this one), `PCACHE_SEED` repeats a run, `PCACHE_TEST_DIR` says where cache and disk lie.

mod client;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use client::daemon::verb;
use client::{Client, ClientOptions, Daemon, Mix, Notify, Rng, Traffic, Workspace, protocol};

const MIB: u64 = 1 << 20;

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} is a number")),
        Err(_) => default,
    }
}

/// A daemon with a control socket, so that it can be taken over from.
fn daemon(workspace: &Workspace, cache: &str, disk: u64, queues: u16, more: &[&str]) -> Daemon {
    let control = workspace.path("control.sock");
    let mut all = vec!["--control", control.to_str().expect("text")];
    all.extend(more);
    Daemon::cached(workspace, cache, disk, queues, &all)
}

fn traffic(workspace: &Workspace, daemon: &Daemon, options: ClientOptions) -> Traffic {
    let client = Client::connect(daemon.socket(), options);
    let mut traffic = Traffic::new(client, Rng::seed_from_env("PCACHE_SEED"), Mix::default());
    traffic.backing = Some(workspace.path("disk.img"));
    traffic
}

/// Replaces the daemon while the traffic goes on.
fn upgrade(daemon: &mut Daemon, traffic: &mut Traffic) {
    daemon.spawn_successor();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !daemon.has_taken_over() {
        traffic.run(20);
        assert!(Instant::now() < deadline, "the upgrade takes for ever; they said\n{}", daemon.read_log());
    }
    traffic.run(50);
}

/// Fills `mib` with blocks of 4 KiB in random order.
fn warm(traffic: &mut Traffic, mib: u64) {
    let mut blocks: Vec<u64> = (0..mib * 256).collect();
    for at in (1..blocks.len()).rev() {
        let other = traffic.rng.below(at as u64 + 1) as usize;
        blocks.swap(at, other);
    }
    let queues = traffic.client.queues.len();
    for (at, block) in blocks.into_iter().enumerate() {
        while traffic.client.queues[at % queues].outstanding() >= 32 {
            traffic.wait_for_some();
        }
        traffic.write_at(at % queues, block * 8, 8);
    }
    traffic.quiesce();
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() * percent).div_ceil(100).max(1) - 1]
}

/// Prints a distribution and holds its 99th percentile against the bound.
fn judge(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let (p50, p99, max) = (percentile(&times, 50), percentile(&times, 99), times[times.len() - 1]);
    eprintln!("{what}: {} times, p50 {p50:.1?}, p99 {p99:.1?}, longest {max:.1?}", times.len());
    let bound = Duration::from_millis(number("PCACHE_PAUSE_MS_MAX", 5000));
    assert!(p99 <= bound, "{what}: {p99:?} at the 99th percentile, {bound:?} allowed");
}

/// The last value of `name` in what was said, in microseconds.
fn spent(life: &str, name: &str) -> String {
    Daemon::counter(life, name).map_or_else(|| "?".into(), |us| format!("{:.1} ms", us as f64 / 1000.0))
}

fn upgrades(order: &str, assume_dax: bool) {
    let warm_mib = number("PCACHE_WARM_MIB", 128);
    let workspace = if assume_dax { Workspace::in_memory() } else { Workspace::new() };
    let mut more = vec!["--order", order];
    more.extend(assume_dax.then_some("--assume-dax"));
    let cache = format!("{}MiB", (warm_mib * 3 / 2).max(64));
    let mut daemon = daemon(&workspace, &cache, (warm_mib * 2).max(256) * MIB, 2, &more);
    let options = ClientOptions { queues: 2, mem_size: 256 * MIB, ..ClientOptions::default() };
    let mut traffic = traffic(&workspace, &daemon, options);
    warm(&mut traffic, warm_mib);
    let mut pauses = Vec::new();
    for _ in 0..number("PCACHE_UPGRADES", 6) {
        traffic.run(200);
        traffic.watch_gaps();
        upgrade(&mut daemon, &mut traffic);
        pauses.push(traffic.gap);
        let log = daemon.read_log();
        eprintln!(
            "pause {:.1?}: rest {}, recovery {} (scan {}, build {}), attach {}",
            traffic.gap,
            spent(&log, "rest_us"),
            spent(&log, "recovery_us"),
            spent(&log, "scan_us"),
            spent(&log, "build_us"),
            spent(&log, "attach_us")
        );
    }
    traffic.quiesce();
    traffic.verify(0..traffic.model.sectors());
    // Who comes later finds the sockets where they were.
    let control = workspace.path("control.sock");
    let status = verb(&["status", "--control", control.to_str().expect("text")]);
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    traffic.client.reconnect();
    traffic.run(200);
    traffic.quiesce();
    daemon.stop();
    for name in ["vhost.sock", "vhost.sock.lock", "control.sock", "control.sock.lock", "control.sock.upgrade"]
    {
        assert!(!workspace.path(name).exists(), "{name} is left behind");
    }
    judge(&format!("pause of an upgrade, order {order}, assume_dax {assume_dax}"), pauses);
}

#[test]
fn a_daemon_on_page_cache_is_replaced_under_load_and_its_guest_sees_a_pause_and_no_error() {
    upgrades("strict", false);
}

#[test]
fn a_daemon_on_dax_is_replaced_under_load_and_its_guest_sees_a_pause_and_no_error() {
    upgrades("relaxed", true);
}

#[test]
fn every_kind_of_front_end_goes_on_under_a_successor() {
    let all = ClientOptions::default().protocol;
    let base = || ClientOptions { queues: 2, ..ClientOptions::default() };
    let rows = [
        ("packed rings", ClientOptions { packed: true, ..base() }),
        ("packed rings, untracked", ClientOptions { packed: true, inflight: false, ..base() }),
        ("untracked", ClientOptions { inflight: false, ..base() }),
        ("polling, no event index", ClientOptions { event_idx: false, notify: Notify::Poll, ..base() }),
        ("four regions", ClientOptions { regions: 4, ..base() }),
        ("a memory table", ClientOptions { protocol: all & !protocol::CONFIGURE_MEM_SLOTS, ..base() }),
        ("write cache off", ClientOptions { wce: Some(false), ..base() }),
    ];
    for (name, options) in rows {
        eprintln!("{name}");
        let workspace = Workspace::new();
        let mut daemon = daemon(&workspace, "64MiB", 64 * MIB, 2, &[]);
        let mut traffic = traffic(&workspace, &daemon, options);
        for _ in 0..2 {
            traffic.run(500);
            upgrade(&mut daemon, &mut traffic);
        }
        traffic.run(500);
        traffic.quiesce();
        traffic.verify(0..traffic.model.sectors());
        // What it negotiated is still in force: a ring stops where the driver has it.
        let base = traffic.client.stop_ring(1);
        if traffic.client.queues[1].packed.is_none() {
            assert_eq!(base, traffic.client.queues[1].base(false) as u16, "{name}");
        }
        daemon.stop();
    }
}

#[test]
fn a_successor_killed_at_any_moment_loses_nothing() {
    let workspace = Workspace::new();
    let mut daemon = daemon(&workspace, "64MiB", 128 * MIB, 2, &[]);
    let mut traffic = traffic(&workspace, &daemon, ClientOptions { queues: 2, ..ClientOptions::default() });
    let (mut before, mut after) = (0, 0);
    for _ in 0..12 {
        traffic.run(300);
        daemon.spawn_successor();
        let until = Instant::now() + Duration::from_micros(traffic.rng.below(250_000));
        let mut is_over = false;
        while Instant::now() < until && !is_over {
            is_over = daemon.has_taken_over();
            traffic.run(5);
        }
        if is_over {
            continue;
        }
        match daemon.kill_successor() {
            true => before += 1,
            false => {
                after += 1;
                daemon.restart();
                traffic.client.reconnect();
            }
        }
    }
    traffic.quiesce();
    traffic.verify(0..traffic.model.sectors());
    eprintln!("killed before the point of no return: {before}, after: {after}");
    daemon.stop();
}

/// One message of the protocol of upgrades.
fn message(text: &str) -> Vec<u8> {
    let mut bytes = b"pcHO".to_vec();
    bytes.extend((text.len() as u32).to_ne_bytes());
    bytes.extend(text.as_bytes());
    bytes
}

/// Its name, and what [`pretend`] takes.
type Pretence<'a> = (&'a str, &'a [u8], &'a str, &'a [u8], &'a str);

/// Says `bytes` to a daemon as a successor, waits until it has said `needle`, says `then`, and hangs up
/// when it has said `last` or hung up itself.
fn pretend(socket: &Path, bytes: &[u8], needle: &str, then: &[u8], last: &str) {
    let mut stream = UnixStream::connect(socket).expect("the socket for upgrades answers");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    // It may hang up in the middle of what we say: that is an answer.
    drop(stream.write_all(bytes));
    let mut heard = Vec::new();
    let mut hear = |needle: &str, stream: &mut UnixStream| {
        let mut buffer = [0; 4096];
        while !String::from_utf8_lossy(&heard).contains(needle) {
            match stream.read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(count) => heard.extend_from_slice(&buffer[..count]),
            }
        }
    };
    hear(needle, &mut stream);
    drop(stream.write_all(then));
    hear(last, &mut stream);
}

/// [`pretend`] while the traffic goes on.
fn pretend_beside(traffic: &mut Traffic, socket: &Path, &(_, bytes, needle, then, last): &Pretence<'_>) {
    std::thread::scope(|scope| {
        let pretended = scope.spawn(|| pretend(socket, bytes, needle, then, last));
        while !pretended.is_finished() {
            traffic.run(5);
        }
    });
    traffic.run(300);
    traffic.quiesce();
}

#[test]
fn a_successor_that_talks_nonsense_or_goes_away_leaves_the_daemon_serving() {
    const HELLO: &str = r#"{"word":"hello","version":1,"program":"test","pid":1}"#;
    let workspace = Workspace::new();
    let mut daemon = daemon(&workspace, "64MiB", 64 * MIB, 2, &[]);
    let mut traffic = traffic(&workspace, &daemon, ClientOptions { queues: 2, ..ClientOptions::default() });
    let socket = workspace.path("control.sock.upgrade");
    let (hello, ready) = (message(HELLO), message(r#"{"word":"ready"}"#));
    let other = message(&HELLO.replace("\"version\":1", "\"version\":999"));
    let mut endless = b"pcHO".to_vec();
    endless.extend(u32::MAX.to_ne_bytes());
    let rows: [Pretence<'_>; 10] = [
        ("nothing", b"", "", b"", ""),
        ("noise", b"GET / HTTP/1.1\r\n\r\n", "no", b"", ""),
        ("an endless message", &endless, "no", b"", ""),
        ("half a message", &hello[..20], "", b"", ""),
        ("not an object", &message("[1,2"), "no", b"", ""),
        ("an unknown word", &message(r#"{"word":"gimme"}"#), "no", b"", ""),
        ("another version", &other, "no", b"", ""),
        ("the end after the offer", &hello, "offered", b"", ""),
        ("nonsense after the offer", &hello, "offered", &message(r#"{"word":"yours"}"#), "\"no\""),
        ("the end when all is at rest", &hello, "offered", &ready, "\"all\""),
    ];
    // Whatever opens what it needs when it first needs it has done so, and everything was at rest once.
    traffic.run(500);
    traffic.quiesce();
    pretend_beside(&mut traffic, &socket, &rows[9]);
    std::thread::sleep(Duration::from_millis(500));
    let files = daemon.open_files();
    for row in &rows {
        pretend_beside(&mut traffic, &socket, row);
        daemon.assert_alive();
        eprintln!("{}: served on", row.0);
    }
    let said = daemon.read_life();
    assert!(said.contains("not handed over, serving on"), "{said}");
    // Whatever was opened for those is closed again.
    let deadline = Instant::now() + Duration::from_secs(10);
    while daemon.open_files() > files + 2 {
        assert!(Instant::now() < deadline, "{files} descriptors before, {} now", daemon.open_files());
        std::thread::sleep(Duration::from_millis(20));
    }
    upgrade(&mut daemon, &mut traffic);
    traffic.quiesce();
    traffic.verify(0..traffic.model.sectors());
    daemon.stop();
}

#[test]
fn a_successor_that_would_not_serve_the_same_is_refused_with_a_sentence() {
    let workspace = Workspace::new();
    let mut daemon = daemon(&workspace, "64MiB", 64 * MIB, 1, &[]);
    let mut traffic = traffic(&workspace, &daemon, ClientOptions::default());
    let other = workspace.path("other.sock").to_str().expect("text").to_owned();
    let moved: Vec<String> = daemon
        .args()
        .iter()
        .map(|arg| if arg.ends_with("vhost.sock") { other.clone() } else { arg.clone() })
        .collect();
    let renamed: Vec<String> = daemon.args().iter().cloned().chain(["--name=another".to_owned()]).collect();
    let absent: Vec<String> = daemon
        .args()
        .iter()
        .map(
            |arg| if arg.ends_with("disk.img") { arg.replace("disk.img", "absent.img") } else { arg.clone() },
        )
        .collect();
    let rows = [
        (moved, "change that by a restart"),
        (renamed, "add it, or detach it first"),
        (absent, "absent.img"),
    ];
    for (args, sentence) in rows {
        let output = daemon.refused_successor(&args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(sentence), "{said}");
        traffic.run(300);
        traffic.quiesce();
        daemon.assert_alive();
    }
    upgrade(&mut daemon, &mut traffic);
    traffic.quiesce();
    daemon.stop();
}

#[test]
fn with_nobody_to_take_over_from_a_start_is_a_start() {
    let workspace = Workspace::new();
    let mut daemon = daemon(&workspace, "64MiB", 64 * MIB, 1, &["--take-over"]);
    let mut traffic = traffic(&workspace, &daemon, ClientOptions::default());
    traffic.run(200);
    traffic.quiesce();
    daemon.stop();
}

/// From the start of a process, after a kill in the middle of everything, to the first completion.
fn restarts(order: &str, assume_dax: bool) {
    let warm_mib = number("PCACHE_WARM_MIB", 128);
    let workspace = if assume_dax { Workspace::in_memory() } else { Workspace::new() };
    let mut more = vec!["--order", order];
    more.extend(assume_dax.then_some("--assume-dax"));
    let cache = format!("{}MiB", (warm_mib * 3 / 2).max(64));
    let mut daemon = daemon(&workspace, &cache, (warm_mib * 2).max(256) * MIB, 2, &more);
    let options = ClientOptions { queues: 2, mem_size: 256 * MIB, ..ClientOptions::default() };
    let mut traffic = traffic(&workspace, &daemon, options);
    warm(&mut traffic, warm_mib);
    let mut times = Vec::new();
    for _ in 0..number("PCACHE_RESTARTS", 6) {
        traffic.run(300);
        assert!(traffic.client.outstanding() > 0, "nothing was in flight at the kill");
        daemon.kill();
        let begun = Instant::now();
        daemon.spawn();
        traffic.client.reconnect();
        let connected = begun.elapsed();
        traffic.wait_for_some();
        times.push(begun.elapsed());
        let life = daemon.read_life();
        eprintln!(
            "first completion after {:.1?}: connected after {connected:.1?}, recovery {}, attach {}",
            begun.elapsed(),
            spent(&life, "recovery_us"),
            spent(&life, "attach_us")
        );
    }
    traffic.quiesce();
    traffic.verify(0..traffic.model.sectors());
    daemon.stop();
    judge(&format!("start to first completion, order {order}, assume_dax {assume_dax}"), times);
}

#[test]
fn after_a_kill_a_start_on_page_cache_serves_soon() {
    restarts("strict", false);
}

#[test]
fn after_a_kill_a_start_on_dax_serves_soon() {
    restarts("relaxed", true);
}
