//! Bad disks under the real daemon: errors, a full disk, a lost flush, a disk that hangs, a disk that
//! comes back.
//!
//! The disk is a file of ours on FUSE (`client/fuse.rs`), which fails, forgets and hangs on command,
//! or a loop device on a full tmpfs. Both need root; without it, or without `/dev/fuse`, the tests
//! say that they were skipped, or fail if `PCACHE_REQUIRE_FAULTS` is set. `PCACHE_SEED` repeats a
//! run's traffic. What is promised is in the README's table; `docs/testing.md` lists the cases.

mod client;

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use client::daemon::verb;
use client::request::{IOERR, OK};
use client::{Client, ClientOptions, Daemon, Faults, FuseDisk, Mix, Request, Rng, Traffic, Workspace};

const MIB: u64 = 1 << 20;
/// Size of the bad disk, and of the good one beside it.
const DISK: u64 = 48 * MIB;
/// Longest time for what should happen soon.
const SOON: Duration = Duration::from_secs(30);
/// What a stop with a hung disk may take: 5 s for the rings, 2 s for the workers, and a busy machine.
const STOP: Duration = Duration::from_secs(15);
/// A sector that nothing has read or written before, and so is not cached.
const COLD: u64 = DISK / 512 - 64;

/// A cache with two volumes: `bad` on a disk that fails on command, and `good` beside it.
struct Rig {
    bad: Traffic,
    good: Traffic,
    daemon: Daemon,
    // After the daemon, which may hang on it until it goes.
    disk: FuseDisk,
    workspace: Workspace,
}

fn skip(why: &str) {
    assert!(std::env::var_os("PCACHE_REQUIRE_FAULTS").is_none(), "cannot run here: {why}");
    eprintln!("SKIPPED: {why}");
}

fn front_end(daemon_socket: &Path, seed: u64) -> Traffic {
    let options = ClientOptions { queues: 2, ..ClientOptions::default() };
    Traffic::new(Client::connect(daemon_socket, options), seed, Mix::default())
}

impl Rig {
    /// `None`, aloud, where no disk can be made to fail.
    fn new(of_bad: &str) -> Option<Self> {
        let seed = Rng::seed_from_env("PCACHE_SEED");
        let workspace = Workspace::new();
        let disk = match FuseDisk::mount(&workspace.path("slow"), DISK as usize) {
            Ok(disk) => disk,
            Err(error) => {
                skip(&format!("no FUSE file system can be mounted ({error}); root can"));
                return None;
            }
        };
        let good = workspace.disk("good.img", DISK);
        let sockets = ["bad.sock", "good.sock"].map(|name| workspace.path(name));
        let mut toml = format!(
            "[[cache]]\nname = \"c\"\npath = \"{}\"\nsize = \"128MiB\"\n",
            workspace.path("cache.img").display()
        );
        for (name, backing, more) in [("bad", &disk.path(), of_bad), ("good", &good, "")] {
            toml += &format!(
                "[[volume]]\nname = \"{name}\"\nsocket = \"{}\"\nbacking = \"{}\"\nqueues = 2\n{more}\n",
                workspace.path(&format!("{name}.sock")).display(),
                backing.display()
            );
        }
        let daemon = Daemon::configured(&workspace, &toml, &sockets[0]);
        let [bad, good] = sockets.map(|socket| front_end(&socket, seed));
        Some(Self { bad, good, daemon, disk, workspace })
    }

    /// Traffic that needs nothing of the disk; what is out already may stay out.
    fn write_some(&mut self, operations: u64) {
        let out = self.bad.client.outstanding();
        for _ in 0..operations {
            let (sector, sectors) = (self.bad.rng.below(COLD - 64), self.bad.rng.between(1, 64));
            let queue = self.bad.rng.below(2) as usize;
            self.bad.write_at(queue, sector, sectors);
            eventually("writes to complete", || self.bad.poll() < out + 32);
        }
        eventually("writes to complete", || self.bad.poll() <= out);
    }

    /// Traffic on the volume next door, and how long it took.
    fn next_door(&mut self, operations: u64) -> Duration {
        let begun = Instant::now();
        self.good.run(operations);
        self.good.quiesce();
        begun.elapsed()
    }

    fn counter(&self, volume: &str, name: &str) -> u64 {
        let line = self.daemon.wait_status(&format!("counters volume={volume} "), SOON);
        Daemon::counter(&line, name).unwrap_or_else(|| panic!("no {name} in {line}"))
    }

    /// The state's line as it is now.
    fn wait_status(&self, volume: &str) -> String {
        self.daemon.wait_status(&format!("status volume={volume} "), SOON)
    }

    fn wait_state(&self, volume: &str, state: &str) -> String {
        self.daemon.wait_status(&format!("status volume={volume} state={state}"), SOON)
    }

    /// Waits until the disk holds `count` requests of a kind.
    fn wait_held(&self, what: &str, held: impl Fn(&FuseDisk) -> bool) {
        eventually(what, || held(&self.disk));
    }

    /// Ends it all: in order, drained, and the disks alone compared, the bad one as a power cut at
    /// that moment would leave it.
    fn disks_alone_agree(mut self) {
        self.bad.quiesce();
        self.good.quiesce();
        self.bad.verify(0..self.bad.model.sectors());
        // What was written around the cache is the disk's to keep only after this.
        self.bad.flush_now(0);
        self.bad.quiesce();
        self.daemon.stop();
        let config = self.workspace.path("pcache.toml");
        let drained = verb(&["drain", "--config", config.to_str().expect("text")]);
        assert!(drained.status.success(), "drain: {}", String::from_utf8_lossy(&drained.stderr));
        self.disk.power_cut();
        self.bad.model.check(0, &self.disk.durable()).unwrap_or_else(|why| panic!("the bad disk: {why}"));
        let good = fs::read(self.workspace.path("good.img")).expect("the good disk");
        self.good.model.check(0, &good).unwrap_or_else(|why| panic!("the good disk: {why}"));
    }
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < SOON, "waited for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn while_the_disk_fails_dirty_data_stays_and_once_it_works_it_is_all_there() {
    let eio = Some(libc::EIO);
    for (faults, cause) in [
        (Faults { writes: eio, ..Faults::default() }, "failed writing"),
        (Faults { syncs: eio, ..Faults::default() }, "failed flushing: Input/output error"),
        (Faults { writes: Some(libc::ENOSPC), ..Faults::default() }, "No space left on device"),
        (Faults::all(libc::EIO), "Input/output error"),
    ] {
        let Some(mut rig) = Rig::new("") else { return };
        rig.write_some(200);
        eprintln!("{faults:?}");
        let before = rig.counter("bad", "written_back_sectors");
        rig.disk.set(faults);
        rig.write_some(200);
        let status = rig.wait_state("bad", "degraded");
        assert!(status.contains(cause) && status.contains("do=\""), "{status}");
        rig.wait_state("good", "ok");
        eventually("several attempts", || rig.counter("bad", "writeback_errors") >= 4);
        let life = rig.daemon.read_life();
        let delays: Vec<u64> = life.lines().filter_map(|line| Daemon::counter(line, "retry_ms")).collect();
        assert!(delays.iter().max() >= Some(&400), "the delay grows: {delays:?}");
        // Whatever was on its way when the fault came: nothing has become clean since.
        let tail = rig.counter("bad", "tail_epoch");
        rig.write_some(100);
        let took = rig.next_door(1000);
        assert!(took < SOON, "the volume next door took {took:?}");
        assert_eq!(rig.counter("bad", "tail_epoch"), tail, "the tail moved without a good flush");
        assert!(rig.counter("bad", "dirty_bytes") > 0, "dirty data turned clean without a good flush");
        rig.disk.set(Faults::default());
        rig.wait_state("bad", "ok");
        eventually("write-back to go on", || rig.counter("bad", "written_back_sectors") > before);
        rig.disks_alone_agree();
    }
}

#[test]
fn a_flush_that_failed_once_costs_nothing_although_linux_says_so_only_once() {
    let Some(mut rig) = Rig::new("order = \"relaxed\"") else { return };
    rig.write_some(300);
    // What a failed flush had before it is lost, and the next one would succeed without it.
    for _ in 0..3 {
        let failed = rig.disk.answered().failed;
        rig.disk.set(Faults { syncs: Some(libc::EIO), ..Faults::default() });
        rig.write_some(50);
        eventually("a flush to fail", || rig.disk.answered().failed > failed);
        rig.disk.set(Faults::default());
        rig.wait_state("bad", "ok");
    }
    rig.disks_alone_agree();
}

#[test]
fn a_read_the_disk_fails_is_an_error_and_one_the_cache_has_is_not() {
    let Some(mut rig) = Rig::new("on_backing_error = \"error\"") else { return };
    rig.write_some(100);
    rig.bad.write_at(0, 8, 8);
    rig.bad.quiesce();
    rig.disk.set(Faults::all(libc::EIO));
    let miss = rig.bad.client.execute(&Request::read(COLD, 4096));
    assert_eq!(miss.status, IOERR, "the cache does not have it, the disk does not give it");
    rig.bad.read_at(0, 8, 8);
    rig.bad.quiesce();
    let status = rig.wait_state("bad", "degraded");
    assert!(status.contains("cause=\"the disk failed"), "{status}");
    assert!(rig.counter("bad", "disk_errors") > 0);
    // A guest that goes on asking must not fill the log.
    let lines = rig.daemon.read_log().lines().count();
    for _ in 0..500 {
        assert_eq!(rig.bad.client.execute(&Request::read(COLD, 4096)).status, IOERR);
    }
    let said = rig.daemon.read_log().lines().count() - lines;
    assert!(said < 50, "{said} lines for 500 failed reads");
    rig.disk.set(Faults::default());
    assert_eq!(rig.bad.client.execute(&Request::read(COLD, 4096)).status, OK, "the disk is asked again");
    rig.wait_state("bad", "ok");
    rig.disks_alone_agree();
}

/// Longest time from the disk's return until everything is well again: write-back's longest delay.
const RESUMED: Duration = Duration::from_secs(45);

#[test]
fn twenty_seconds_of_eio_under_load_cost_the_guest_no_error_and_everything_goes_on_by_itself() {
    let Some(mut rig) = Rig::new("") else { return };
    rig.bad.run(500);
    rig.disk.set(Faults::all(libc::EIO));
    let begun = Instant::now();
    // Reads, writes and flushes, of the cache and of the disk; a request that fails fails the test. Misses
    // stay out until the disk works.
    let mut done = 0;
    while begun.elapsed() < Duration::from_secs(20) {
        let (sector, sectors) = (rig.bad.rng.below(COLD - 64), rig.bad.rng.between(1, 64));
        let out = rig.bad.client.outstanding();
        if out < 40 && rig.bad.rng.below(4) == 0 {
            rig.bad.read_at(0, sector, sectors);
        } else if out < 60 {
            rig.bad.write_at(1, sector, sectors);
            done += 1;
        }
        rig.bad.poll();
        std::thread::sleep(Duration::from_millis(2));
    }
    let status = rig.wait_state("bad", "degraded");
    assert!(rig.counter("bad", "writeback_errors") > 0, "{status}");
    assert_eq!(rig.counter("bad", "errors"), 0, "no request has failed");
    rig.next_door(500);
    rig.disk.set(Faults::default());
    let back = Instant::now();
    while rig.bad.poll() > 0 {
        assert!(back.elapsed() < RESUMED, "what waited goes on by itself");
        std::thread::sleep(Duration::from_millis(5));
    }
    eprintln!("{done} writes in 20 s of EIO, all that waited ended after {:?}", back.elapsed());
    while !rig.wait_status("bad").contains("state=ok") {
        assert!(back.elapsed() < RESUMED, "the state says so");
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(rig.counter("bad", "disk_retries") > 0);
    rig.disks_alone_agree();
}

#[test]
fn writes_are_turned_away_while_the_disk_fails_if_the_volume_says_so() {
    let Some(mut rig) = Rig::new("on_backing_error = \"read_only\"") else { return };
    rig.write_some(100);
    rig.bad.write_at(0, 8, 8);
    rig.bad.quiesce();
    rig.disk.set(Faults::all(libc::EIO));
    assert_eq!(rig.bad.client.execute(&Request::read(COLD, 4096)).status, IOERR);
    let write = Request::write(COLD, vec![7; 4096]);
    assert_eq!(rig.bad.client.execute(&write).status, IOERR, "the disk fails");
    rig.bad.read_at(0, 8, 8);
    rig.bad.quiesce();
    let status = rig.wait_state("bad", "degraded");
    assert!(status.contains("turned away"), "{status}");
    rig.disk.set(Faults::default());
    rig.wait_state("bad", "ok");
    assert_eq!(rig.bad.client.execute(&Request::read(COLD, 4096)).status, OK);
    rig.write_some(100);
    rig.disks_alone_agree();
}

#[test]
fn a_request_that_the_disk_owes_for_too_long_ends_with_an_error_if_the_volume_says_so() {
    let Some(mut rig) = Rig::new("on_backing_error = \"error\"\nbacking_timeout_s = 2") else { return };
    rig.write_some(100);
    rig.disk.set(Faults::hang());
    let begun = Instant::now();
    assert_eq!(rig.bad.client.execute(&Request::read(COLD, 4096)).status, IOERR);
    let took = begun.elapsed();
    assert!((Duration::from_secs(2)..Duration::from_secs(10)).contains(&took), "{took:?}");
    rig.wait_state("bad", "stalled");
    rig.next_door(200);
    rig.disk.release();
    rig.wait_state("bad", "ok");
    assert_eq!(rig.bad.client.execute(&Request::read(COLD, 4096)).status, OK);
    rig.disks_alone_agree();
}

#[test]
fn while_the_disk_hangs_hits_and_neighbours_are_served_and_misses_wait() {
    let Some(mut rig) = Rig::new("") else { return };
    rig.write_some(200);
    let calm = rig.next_door(2000);
    rig.disk.set(Faults::hang());
    rig.bad.read_at(0, COLD, 8);
    rig.wait_held("the miss to reach the disk", |disk| disk.held().0 > 0);
    rig.write_some(100);
    rig.wait_held("write-back to reach the disk", |disk| disk.held().1 > 0);
    let status = rig.wait_state("bad", "stalled");
    assert!(status.contains("has not answered for"), "{status}");
    rig.wait_state("good", "ok");
    // Everything but the miss: the other queue is free, and so is the rest of this one.
    for sector in [0, 1000, 2000] {
        for queue in [0, 1] {
            rig.bad.write_at(queue, sector, 8);
            eventually("a write", || rig.bad.poll() == 1);
            rig.bad.read_at(queue, sector, 8);
            eventually("a hit", || rig.bad.poll() == 1);
        }
    }
    let hung = rig.next_door(2000);
    eprintln!("2000 operations next door: {calm:?} before, {hung:?} while the disk hangs");
    assert!(hung < calm * 10 + Duration::from_secs(2), "{hung:?} instead of {calm:?}");
    assert!(rig.daemon.read_life().contains("volume is stalled"), "the log says it");
    rig.disk.release();
    eventually("the miss", || rig.bad.poll() == 0);
    rig.wait_state("bad", "ok");
    rig.disks_alone_agree();
}

/// What hangs, with the mode that makes it: and how to bring it about.
const HANGS: [(&str, &str); 4] = [
    ("a miss", ""),
    ("write-back", ""),
    ("a write around the cache", "mode = \"writethrough\""),
    ("a flush around the cache", "mode = \"writearound\""),
];

/// Brings about what [`HANGS`] names; says whether the guest waits for it.
fn hang(rig: &mut Rig, what: &str) -> bool {
    rig.write_some(50);
    rig.disk.set(Faults::hang());
    match what {
        "a miss" => {
            rig.bad.read_at(0, COLD, 8);
            rig.wait_held(what, |disk| disk.held().0 > 0);
        }
        "write-back" => {
            rig.write_some(20);
            rig.wait_held(what, |disk| disk.held().1 > 0);
            return false;
        }
        "a write around the cache" => {
            rig.bad.write_at(1, 4096, 64);
            rig.wait_held(what, |disk| disk.held().1 > 0);
        }
        _ => {
            rig.bad.flush_now(0);
            rig.wait_held(what, |disk| disk.held().2 > 0);
        }
    }
    true
}

#[test]
fn a_stop_does_not_wait_for_a_disk_that_hangs_and_the_next_start_does() {
    for (what, mode) in HANGS {
        let Some(mut rig) = Rig::new(mode) else { return };
        let waits = hang(&mut rig, what);
        rig.next_door(200);
        rig.daemon.signal(libc::SIGTERM);
        let begun = Instant::now();
        let closed = |rig: &Rig| rig.daemon.read_life().contains("cache.img closed");
        while !closed(&rig) {
            assert!(begun.elapsed() < STOP, "{what}: the stop waits for the disk");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(UnixStream::connect(rig.workspace.path("good.sock")).is_err(), "{what}: it serves on");
        let ended = rig.daemon.ends_within(Duration::from_secs(1));
        eprintln!("{what}: {:?} after {:?}", ended.map(|(status, _)| status), begun.elapsed());
        match ended {
            Some((status, _)) => assert_eq!(status.code(), Some(5), "{what}: {status}"),
            None => {
                // A thread that flushes is inside the kernel, and nobody can end it: the process is
                // not gone, but done with everything else.
                let (reads, writes, all) = rig.disk.held();
                assert!(all > reads + writes, "{what}: the process does not end");
                rig.daemon.forget();
            }
        }
        rig.daemon.spawn();
        eventually("the successor to wait", || rig.daemon.read_life().contains("is held by"));
        assert!(!rig.daemon.read_life().contains("front end"), "{what}: it serves before the disk is free");
        rig.disk.release();
        rig.daemon.wait_listening();
        rig.bad.client.reconnect();
        rig.good.client.reconnect();
        if waits {
            eventually("the request left behind", || rig.bad.poll() == 0);
        }
        rig.disks_alone_agree();
    }
}

#[test]
fn a_write_that_outlives_its_killed_server_never_lands_on_a_newer_one() {
    for (what, mode) in [HANGS[1], HANGS[2]] {
        let Some(mut rig) = Rig::new(mode) else { return };
        hang(&mut rig, what);
        rig.daemon.signal(libc::SIGKILL);
        if rig.daemon.ends_within(Duration::from_secs(5)).is_none() {
            rig.daemon.forget();
        }
        rig.daemon.spawn();
        eventually("the successor to wait", || rig.daemon.read_life().contains("is held by"));
        // The old write lands now, and only then anything newer can be on its way.
        rig.disk.release();
        rig.daemon.wait_listening();
        rig.bad.client.reconnect();
        rig.good.client.reconnect();
        rig.bad.quiesce();
        rig.bad.write_at(0, 4096, 64);
        rig.write_some(100);
        rig.disks_alone_agree();
    }
}

#[test]
fn a_ring_stops_without_the_disk_and_goes_on_with_what_it_left() {
    for (what, mode) in [HANGS[0], HANGS[2]] {
        let Some(mut rig) = Rig::new(mode) else { return };
        hang(&mut rig, what);
        let queue = if what == "a miss" { 0 } else { 1 };
        let writes = rig.disk.held().1;
        let begun = Instant::now();
        let base = rig.bad.client.stop_ring(queue);
        let took = begun.elapsed();
        eprintln!("{what}: GET_VRING_BASE after {took:?}");
        assert!(took < STOP, "{what}: {took:?}");
        assert_eq!(base, rig.bad.client.queues[queue].used_index(), "{what}: what was returned");
        // The VMM goes on: the ring's requests are submitted again, while the first try still hangs.
        rig.bad.client.set_up_ring(queue, base.into());
        rig.bad.client.queues[queue].kick();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(rig.bad.poll(), 1, "{what}: the disk still hangs");
        // What comes from elsewhere in write-back mode says nothing here.
        let is_alone = mode.is_empty() || rig.disk.held().1 == writes;
        assert!(is_alone, "{what}: two writes to the same sectors are under way");
        rig.disk.release();
        eventually("the request left behind", || rig.bad.poll() == 0);
        rig.bad.write_at(queue, 4096, 64);
        rig.wait_state("bad", "ok");
        rig.disks_alone_agree();
    }
}

#[test]
fn a_lost_connection_does_not_wait_for_a_disk_that_hangs() {
    for (what, mode) in [HANGS[0], HANGS[2]] {
        let Some(mut rig) = Rig::new(mode) else { return };
        hang(&mut rig, what);
        let begun = Instant::now();
        // Closes the old connection; the answer to its first question needs the old session's end.
        rig.bad.client.reconnect();
        let took = begun.elapsed();
        eprintln!("{what}: served again after {took:?}");
        assert!(took < STOP, "{what}: {took:?}");
        assert_eq!(rig.bad.poll(), 1, "{what}: the disk still hangs");
        rig.disk.release();
        eventually("the request left behind", || rig.bad.poll() == 0);
        rig.disks_alone_agree();
    }
}

/// A loop device on a file in a tmpfs that is as good as full.
struct FullLoop {
    device: PathBuf,
    dir: PathBuf,
}

fn sh(command: &str) -> Result<String, String> {
    let run = Command::new("sh").args(["-c", command]).output().map_err(|e| e.to_string())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if run.status.success() { Ok(text(&run.stdout)) } else { Err(text(&run.stderr)) }
}

impl FullLoop {
    fn new(dir: PathBuf) -> Result<Self, String> {
        fs::create_dir(&dir).map_err(|e| e.to_string())?;
        let at = dir.display();
        sh(&format!("mount -t tmpfs -o size=56m pcache-test {at}"))?;
        sh(&format!("truncate -s {DISK} {at}/disk && fallocate -l 52m {at}/ballast")).inspect_err(|_| {
            drop(sh(&format!("umount -l {at}")));
        })?;
        let device = sh(&format!("losetup -f --show {at}/disk")).inspect_err(|_| {
            drop(sh(&format!("umount -l {at}")));
        })?;
        Ok(Self { device: device.into(), dir })
    }

    fn make_room(&self) {
        fs::remove_file(self.dir.join("ballast")).expect("the ballast");
    }
}

impl Drop for FullLoop {
    fn drop(&mut self) {
        for command in
            [format!("losetup -d {}", self.device.display()), format!("umount -l {}", self.dir.display())]
        {
            if let Err(error) = sh(&command) {
                eprintln!("{command}: {error}");
            }
        }
    }
}

#[test]
fn a_block_device_that_runs_full_under_write_back_loses_nothing() {
    let workspace = Workspace::new();
    let disk = match FullLoop::new(workspace.path("full")) {
        Ok(disk) => disk,
        Err(error) => return skip(&format!("no loop device on a tmpfs can be made ({error}); root can")),
    };
    let (cache, device) = (workspace.path("cache.img"), disk.device.to_str().expect("text").to_owned());
    let cache = cache.to_str().expect("text");
    let args = ["--cache", cache, "--cache-size", "128MiB", "--backing", &device, "--queues", "2"];
    let mut daemon = Daemon::pcache(&workspace, &args);
    let mut traffic = front_end(daemon.socket(), Rng::seed_from_env("PCACHE_SEED"));
    // The device has room for 4 MiB; what comes over that has no place on it.
    for _ in 0..20 {
        traffic.run(200);
    }
    traffic.quiesce();
    let status = daemon.wait_status("status volume=disk0 state=degraded", SOON);
    eprintln!("{status}");
    assert!(status.contains("No space left") || status.contains("Input/output error"), "{status}");
    traffic.run(500);
    traffic.quiesce();
    disk.make_room();
    daemon.wait_status("status volume=disk0 state=ok", SOON);
    traffic.run(500);
    traffic.quiesce();
    traffic.verify(0..traffic.model.sectors());
    daemon.stop();
    let drained = verb(&["drain", "--cache", cache]);
    assert!(drained.status.success(), "drain: {}", String::from_utf8_lossy(&drained.stderr));
    let alone = fs::read(&disk.device).expect("the device");
    traffic.model.check(0, &alone).unwrap_or_else(|why| panic!("the device: {why}"));
}
