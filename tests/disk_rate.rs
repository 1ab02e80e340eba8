//! Write-back before a real disk: is what is dirty in long runs brought to it as fast as it takes it?
//!
//! Question: how does `relaxed` compare to fio's sorted large `O_DIRECT` writes to the same file? Budget: at
//! least 0.9 of it. Both write the whole file and flush it: fio 1 MiB at a time from one end to the other, 32
//! under way, the engine what a guest has written to it in pieces of 256 KiB in any order. They take turns on
//! one file, and the median of the pairs' ratios is printed with its spread; in every second pair fio is first.
//!
//! ```sh
//! cargo test --features sim --test disk_rate -- --ignored --nocapture
//! ```
//!
//! `PCACHE_DISK_DIR` names the folder of the file (default: the build's, which is no RAM disk usually),
//! `PCACHE_DISK_MIB` its size (default 1024), `PCACHE_DISK_PAIRS` how many pairs (default 7). The cache is in
//! /dev/shm and takes two and a half times that. fio must be installed.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use pcache_vhost::backing::{Disk as BackingDisk, OpenOptions as DiskOptions};
use pcache_vhost::cache::worker::Stepper;
use pcache_vhost::cache::{
    AttachOptions, Cache, Env, FormatOptions, Mode, Order, SystemClock, Volume, VolumeDisk, format,
};
use pcache_vhost::pmem::{MappedPmem, OpenOptions as MediaOptions};
use pcache_vhost::volume::{Buffer, Disk, DiskQueue, GuestFault, Request, RequestKind, Status};
use pcache_vhost::wake::Waker;

/// What the guest writes at a time.
const PIECE: usize = 256 << 10;
/// Requests between two commits.
const BATCH: u64 = 16;
/// Least median of the engine's rate over fio's.
const LEAST: f64 = 0.9;

struct Host;

impl Env for Host {
    type Pmem = MappedPmem;
    type Backing = BackingDisk;
    type Clock = SystemClock;
}

/// A piece whose bytes say where it belongs and when it was written.
struct Piece {
    seed: u64,
}

impl Buffer for Piece {
    fn len(&self) -> usize {
        PIECE
    }

    fn copy_out(&self, at: usize, dst: &mut [u8]) -> Result<(), GuestFault> {
        for (i, word) in dst.chunks_mut(8).enumerate() {
            let value = self.seed ^ (at / 8 + i) as u64;
            word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
        }
        Ok(())
    }

    fn copy_in(&mut self, _: usize, _: &[u8]) -> Result<(), GuestFault> {
        Ok(())
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// A cache in memory before the file.
struct Rig {
    volume: Arc<Volume<Host>>,
    /// Frees what the last rounds have left clean; nobody else does.
    stepper: Stepper<Host>,
    bytes: u64,
    _memory: tempfile::TempDir,
}

impl Rig {
    fn new(file: &Path, bytes: u64) -> Rig {
        let memory = tempfile::tempdir_in("/dev/shm").expect("/dev/shm is writable");
        let path = memory.path().join("cache");
        pcache_vhost::pmem::create(&path, bytes * 5 / 2 + (512 << 20)).expect("room in /dev/shm");
        let media = MappedPmem::open(&MediaOptions { assume_dax: true, ..MediaOptions::new(path) });
        let media = media.expect("opens");
        format(&media, &SystemClock::default(), &FormatOptions::default()).expect("formats");
        let (cache, _) = Cache::<Host>::open(Arc::new(media), SystemClock::default()).expect("opens");
        let volume = cache.attach(AttachOptions {
            name: "rate".to_owned(),
            backing: Arc::new(BackingDisk::open(&DiskOptions::new(file)).expect("opens")),
            mode: Mode::Writeback,
            order: Order::Relaxed,
            redo: None,
            data_crc: true,
            pass_discard: true,
            reads: Default::default(),
            read_only: false,
            serial: String::new(),
            block_size: None,
            queues: 1,
            queue_size: 128,
            force_identity: false,
            sidecar: None,
            accept_loss: false,
            allow_volatile: true,
            group: None,
        });
        let stepper = Stepper::new(&cache, &[]);
        Rig { volume: volume.expect("attaches"), stepper, bytes, _memory: memory }
    }

    /// Writes all of the file to the cache, in any order.
    fn fill(&mut self, round: u64) {
        let mut queue = VolumeDisk(self.volume.clone()).open_queue(0, Waker::default()).expect("a queue");
        let pieces = self.bytes / PIECE as u64;
        let mut done = Vec::new();
        for i in 0..pieces {
            // An odd stride over a power of two visits every piece once.
            let piece = i.wrapping_mul(0x9e37_79b9_7f4a_7c15 | 1) % pieces;
            let (sector, seed) = (piece * (PIECE as u64 / 512), round << 40 | piece << 20);
            let tag = (i % BATCH) as u32;
            queue.submit(Request { tag, kind: RequestKind::Write, sector, data: Piece { seed } });
            if i % BATCH == BATCH - 1 || i == pieces - 1 {
                queue.commit();
                while queue.pending() > 0 {
                    queue.poll(&mut done);
                    self.stepper.housekeeper();
                    self.stepper.sync();
                }
                assert!(done.drain(..).all(|done| done.status == Status::Ok), "writes succeed");
            }
        }
    }

    /// Bytes a second at which all of it comes to the disk, flushed.
    fn write_back(&mut self, round: u64) -> f64 {
        self.fill(round);
        assert_eq!(self.volume.counters().dirty_bytes, self.bytes, "nothing is on the disk yet");
        let ops = self.volume.counters().writeback_ops;
        let began = Instant::now();
        self.volume.drain_here(&mut |_| {}).expect("the disk takes it");
        let seconds = began.elapsed().as_secs_f64();
        assert_eq!(self.volume.counters().writeback_ops - ops, self.bytes >> 20, "runs of 1 MiB");
        self.bytes as f64 / seconds
    }
}

/// Bytes a second that fio writes, its flush counted.
fn fio(file: &Path, bytes: u64) -> f64 {
    let output = Command::new("fio")
        .arg(format!("--filename={}", file.display()))
        .arg(format!("--size={bytes}"))
        .args(["--name=sorted", "--rw=write", "--bs=1M", "--direct=1", "--ioengine=io_uring"])
        .args(["--iodepth=32", "--end_fsync=1", "--output-format=json"])
        .output()
        .expect("fio is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).expect("fio tells in JSON");
    // Its own rate leaves out the flush.
    let ms = told["jobs"][0]["job_runtime"].as_f64().expect("a duration");
    bytes as f64 * 1000.0 / ms
}

/// The file, all of it allocated and written.
struct Target(PathBuf);

impl Target {
    fn new(bytes: u64) -> Target {
        let dir =
            std::env::var_os("PCACHE_DISK_DIR").map_or(env!("CARGO_TARGET_TMPDIR").into(), PathBuf::from);
        let path = dir.join("disk_rate.img");
        let mut file = File::create(&path).expect("the folder is writable");
        let chunk = vec![0x5a; 1 << 20];
        (0..bytes >> 20).for_each(|_| file.write_all(&chunk).expect("there is room"));
        file.sync_all().expect("the disk takes it");
        Target(path)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        fs::remove_file(&self.0).ok();
    }
}

#[test]
#[ignore = "a measurement that wants a real disk to itself: cargo test --features sim --test disk_rate -- --ignored --nocapture"]
fn long_runs_come_to_the_disk_as_fast_as_fio_writes_them() {
    let bytes = (number("PCACHE_DISK_MIB", 1024) << 20).next_power_of_two();
    let target = Target::new(bytes);
    let mut rig = Rig::new(&target.0, bytes);
    let mut ratios = Vec::new();
    for pair in 0..number("PCACHE_DISK_PAIRS", 7) {
        let (engine, fio) = if pair % 2 == 0 {
            let fio = fio(&target.0, bytes);
            (rig.write_back(pair), fio)
        } else {
            (rig.write_back(pair), fio(&target.0, bytes))
        };
        println!("pair {pair}: write-back {:.0} MB/s, fio {:.0} MB/s", engine / 1e6, fio / 1e6);
        ratios.push(engine / fio);
    }
    ratios.sort_unstable_by(f64::total_cmp);
    let (least, median, most) = (ratios[0], ratios[ratios.len() / 2], ratios[ratios.len() - 1]);
    println!("{} MiB: median {median:.3} of fio, from {least:.3} to {most:.3}", bytes >> 20);
    assert!(median >= LEAST, "{median}");
}
