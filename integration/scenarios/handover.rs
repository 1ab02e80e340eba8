//! A server that is replaced under a guest that works: by a successor that takes over, or by `kill -9` and
//! a start, every two seconds.
//!
//! `PCACHE_KILL_SECONDS` sets for how long it is killed (default 60; 600 is the long run),
//! `PCACHE_GUEST_PAUSE_MS_MAX` how long a request may take meanwhile (default 20000: the guest is emulated,
//! beside other tests).

use std::time::{Duration, Instant};

use crate::guest::{Guest, GuestOptions, Report};
use crate::prepare::{host, inapplicable};
use crate::scenarios::traffic::fio;
use crate::server::{Program, Storage};

/// How often QEMU tries to reach a server that went away, in the scenario that measures it.
const RECONNECT_MS: u32 = 20;

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} is a number")),
        Err(_) => default,
    }
}

/// A script that writes and verifies, at a rate that makes each round last at least 24 s, and tells the
/// latencies that fio has seen.
fn script(rounds: u64) -> String {
    let load = fio(&format!(
        "--numjobs=2 --size=48M --loops={rounds} --offset_increment=64M --bs=4k --iodepth=8 \
         --rate_iops=1000,1000"
    ));
    let load = load.replace("--minimal ", "");
    format!(
        "disk vda\nmark started\n{load}mark done\n\
         grep -E '^ +lat \\((n|u|m)?sec\\)' /tmp/fio | sed 's/^ */LATENCY /'\n\
         no_kernel_errors\n"
    )
}

/// The longest time a request took, as fio words it: `lat (usec): min=12, max=3400k, avg=…`.
fn longest(report: &Report) -> Duration {
    let one = |line: &&str| {
        let unit = line.split(['(', ')']).nth(1)?;
        let text = line.split("max=").nth(1)?.split(',').next()?.trim();
        let (digits, factor) = match text.strip_suffix('k') {
            Some(digits) => (digits, 1e3),
            None => (text.strip_suffix('M').unwrap_or(text), if text.ends_with('M') { 1e6 } else { 1.0 }),
        };
        let unit = match unit {
            "nsec" => 1e-9,
            "usec" => 1e-6,
            "msec" => 1e-3,
            _ => return None,
        };
        Some(Duration::from_secs_f64(digits.parse::<f64>().ok()? * factor * unit))
    };
    let lines = report.after("LATENCY");
    let longest = lines.iter().filter_map(one).max();
    longest.unwrap_or_else(|| panic!("fio told no latencies: {lines:?}"))
}

fn judge(what: &str, report: &Report) {
    let longest = longest(report);
    eprintln!("{what}: the longest request in the guest took {longest:.1?}");
    let bound = Duration::from_millis(number("PCACHE_GUEST_PAUSE_MS_MAX", 20_000));
    assert!(longest <= bound, "{what}: {longest:?}, {bound:?} allowed");
}

#[test]
fn a_guest_under_load_whose_disk_cannot_reconnect_notices_nothing_of_four_upgrades() {
    let Some(host) = host() else { return };
    if Program::chosen() == Program::StorageDaemon {
        return inapplicable("qemu-storage-daemon has no successor");
    }
    let storage = Storage::new(Program::chosen(), 64, 512).queues(2);
    let mut server = storage.serve();
    let options = GuestOptions::new(script(1)).vcpus(2).memory_mib(768).fio();
    let guest = Guest::boot(host, options.disk(storage.attached(None)));
    guest.wait_for("started");
    for upgrade in 0..4u64 {
        std::thread::sleep(Duration::from_millis(1200 + 130 * upgrade));
        assert!(!guest.has_passed("done"), "the guest was done before upgrade {upgrade}");
        server = storage.upgrade(server);
    }
    judge("four upgrades", &guest.finish());
    server.stop();
    storage.check();
}

#[test]
fn a_guest_under_load_notices_nothing_of_a_server_killed_every_two_seconds() {
    let Some(host) = host() else { return };
    if Program::chosen() == Program::StorageDaemon {
        return inapplicable("qemu-storage-daemon does not track requests in flight and loses them here");
    }
    let seconds = number("PCACHE_KILL_SECONDS", 60);
    let storage = Storage::new(Program::chosen(), 64, 512).queues(2);
    let mut server = storage.serve();
    let options = GuestOptions::new(script(1 + seconds / 12)).vcpus(2).memory_mib(768).fio();
    let options = options.timeout(Duration::from_secs(180 + 3 * seconds));
    let guest = Guest::boot(host, options.disk(storage.attached(Some(RECONNECT_MS))));
    guest.wait_for("started");
    let begun = Instant::now();
    let mut starts = Vec::new();
    while begun.elapsed() < Duration::from_secs(seconds) && !guest.has_passed("done") {
        std::thread::sleep(Duration::from_secs(2));
        server.kill();
        let killed = Instant::now();
        server = storage.serve();
        starts.push(killed.elapsed());
    }
    assert!(
        begun.elapsed() >= Duration::from_secs(seconds),
        "the guest was done after {} kills",
        starts.len()
    );
    let report = guest.finish();
    starts.sort_unstable();
    let (median, worst) = (starts[starts.len() / 2], starts[starts.len() - 1]);
    eprintln!(
        "{} kills: from the kill to a socket that listens {median:.1?} (median), {worst:.1?} (longest); \
         QEMU looks for it every {RECONNECT_MS} ms",
        starts.len()
    );
    judge("kills", &report);
    server.stop();
    storage.check();
}
