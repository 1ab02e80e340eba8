//! Question: how long does a start take, and what does it cost a key?
//!
//! Budget: 100 ns of CPU a key (10 million keys a second a core), and 100 ms until a cache of 1 GiB of
//! random 4 KiB extents, 262,144 keys, is ready. *Killed*: everything is dirty and what was open is
//! found open; *again*: the same, all of it sealed by the start before; *clean*: drained and ended in
//! order.
//!
//! The memory is a file on tmpfs opened as `assume-dax`. The time is of `Cache::open` alone; CPU is
//! user and system time of the whole process over it, so that threads do not hide what a key costs.
//! `cargo bench --bench recovery`; `RECOVERY_BENCH_GIB` sets how much is cached (default 1), and
//! `RECOVERY_BENCH_SECTORS` the size of an extent (default 8). Without `--bench` it runs once over
//! 16 MiB, to see that it runs.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pcache_vhost::backing::{Disk as BackingDisk, OpenOptions as DiskOptions};
use pcache_vhost::cache::volume::VolumeDisk;
use pcache_vhost::cache::worker::Workers;
use pcache_vhost::cache::{
    AttachOptions, Cache, Env, FormatOptions, Mode, Order, RecoveryReport, SystemClock, Volume, format,
};
use pcache_vhost::pmem::{MappedPmem, OpenOptions as MediaOptions};
use pcache_vhost::volume::{Buffer, Disk, DiskQueue, GuestFault, Request, RequestKind, Status};
use pcache_vhost::wake::Waker;

struct Host;

impl Env for Host {
    type Pmem = MappedPmem;
    type Backing = BackingDisk;
    type Clock = SystemClock;
}

/// The same bytes for every write: recovery of sealed segments does not look at payload.
struct Source(usize);

impl Buffer for Source {
    fn len(&self) -> usize {
        self.0
    }

    fn copy_out(&self, _at: usize, dst: &mut [u8]) -> Result<(), GuestFault> {
        dst.fill(0x5a);
        Ok(())
    }

    fn copy_in(&mut self, _at: usize, _src: &[u8]) -> Result<(), GuestFault> {
        Ok(())
    }
}

/// What is measured over.
struct Scale {
    /// Bytes of extents.
    bytes: u64,
    sectors: u64,
    rounds: usize,
}

impl Scale {
    fn from_env() -> Scale {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        if !std::env::args().any(|arg| arg == "--bench") {
            return Scale { bytes: 16 << 20, sectors: 8, rounds: 1 };
        }
        Scale {
            bytes: number("RECOVERY_BENCH_GIB").unwrap_or(1) << 30,
            sectors: number("RECOVERY_BENCH_SECTORS").unwrap_or(8),
            rounds: 7,
        }
    }

    /// Extents written, each once.
    fn extents(&self) -> u64 {
        self.bytes / 512 / self.sectors
    }

    /// Of the volume: four times as many extents fit.
    fn volume_bytes(&self) -> u64 {
        self.bytes * 4
    }

    /// Of the cache: from half its room on, writes would wait for write-back.
    fn cache_bytes(&self) -> u64 {
        self.bytes * 5 / 2 + self.extents() * 256 + (512 << 20)
    }
}

fn open_media(dir: &Path) -> Arc<MappedPmem> {
    let options = MediaOptions { assume_dax: true, prefault: true, ..MediaOptions::new(dir.join("cache")) };
    Arc::new(MappedPmem::open(&options).expect("opens"))
}

fn attach(cache: &Arc<Cache<Host>>, dir: &Path, scale: &Scale) -> Arc<Volume<Host>> {
    let disk =
        DiskOptions { create_sparse: Some(scale.volume_bytes()), ..DiskOptions::new(dir.join("disk")) };
    cache
        .attach(AttachOptions {
            name: "bench".to_owned(),
            backing: Arc::new(BackingDisk::open(&disk).expect("opens")),
            mode: Mode::Writeback,
            order: Order::Relaxed,
            redo: None,
            data_crc: true,
            pass_discard: true,
            read_only: false,
            serial: String::new(),
            block_size: None,
            queues: 1,
            queue_size: 128,
            force_identity: false,
            accept_loss: false,
            sidecar: None,
            reads: Default::default(),
            allow_volatile: true,
            group: None,
        })
        .expect("attaches")
}

/// Writes `scale.extents()` different extents in random order, and leaves the last segment open.
fn fill(volume: &Arc<Volume<Host>>, scale: &Scale) {
    let mut queue = VolumeDisk(volume.clone()).open_queue(0, Waker::default()).expect("a queue");
    let places = scale.extents() * 4;
    // An odd stride over a power of two visits every place once, no two neighbours together.
    let stride = (0x9e37_79b9_7f4a_7c15 % places) | 1;
    let mut done = Vec::new();
    for extent in 0..scale.extents() {
        let place = (u128::from(extent) * u128::from(stride) % u128::from(places)) as u64;
        queue.submit(Request {
            tag: (extent % 32) as u32,
            kind: RequestKind::Write,
            sector: place * scale.sectors,
            data: Source(scale.sectors as usize * 512),
        });
        if extent % 32 == 31 {
            queue.commit();
            while queue.pending() > 0 {
                queue.poll(&mut done);
            }
            assert!(done.drain(..).all(|done| done.status == Status::Ok));
        }
    }
}

/// CPU time of all threads so far.
#[expect(unsafe_code, reason = "calls clock_gettime")]
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec to be written.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    assert_eq!(done, 0, "every Linux has this clock");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// One start: how long, how much CPU, what it found.
fn start(dir: &Path) -> (Duration, Duration, RecoveryReport, Arc<Cache<Host>>) {
    let media = open_media(dir);
    let (cpu, began) = (cpu_time(), Instant::now());
    let (cache, report) = Cache::<Host>::open(media, SystemClock::default()).expect("opens");
    (began.elapsed(), cpu_time() - cpu, report, cache)
}

fn print(what: &str, mut rounds: Vec<(Duration, Duration, RecoveryReport)>) {
    rounds.sort_by_key(|round| round.0);
    let (wall, _, report) = rounds[rounds.len() / 2].clone();
    let (best, worst) = (rounds[0].0, rounds[rounds.len() - 1].0);
    rounds.sort_by_key(|round| round.1);
    let cpu = rounds[rounds.len() / 2].1;
    println!(
        "{what:<8} {:>9} keys, {:>6} MiB dirty: ready in {:.1} ms ({:.1} to {:.1}), CPU {:.1} ms, {:.0} ns a key",
        report.keys,
        report.dirty_bytes >> 20,
        wall.as_secs_f64() * 1e3,
        best.as_secs_f64() * 1e3,
        worst.as_secs_f64() * 1e3,
        cpu.as_secs_f64() * 1e3,
        cpu.as_nanos() as f64 / report.keys.max(1) as f64,
    );
}

fn main() {
    let scale = Scale::from_env();
    let dir = tempfile::tempdir_in("/dev/shm").expect("tmpfs at /dev/shm");
    let dir = dir.path();
    pcache_vhost::pmem::create(&dir.join("cache"), scale.cache_bytes()).expect("room in /dev/shm");
    let media = open_media(dir);
    format(&*media, &SystemClock::default(), &FormatOptions::default()).expect("formats");
    let (cache, _) = Cache::<Host>::open(media, SystemClock::default()).expect("opens");
    let volume = attach(&cache, dir, &scale);
    // The housekeeper seals; nobody writes back.
    let workers = Workers::spawn(&cache, &[]).expect("threads");
    fill(&volume, &scale);
    std::thread::sleep(Duration::from_millis(500));
    drop(workers);
    drop(volume);
    drop(cache);
    let several = |rounds: usize| -> Vec<_> {
        (0..rounds).map(|_| start(dir)).map(|(wall, cpu, report, _)| (wall, cpu, report)).collect()
    };
    print("killed", several(1));
    print("again", several(scale.rounds));

    let (.., cache) = start(dir);
    let volume = attach(&cache, dir, &scale);
    let workers = Workers::spawn(&cache, std::slice::from_ref(&volume)).expect("threads");
    while !volume.is_clean() {
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(workers);
    cache.detach(&volume).expect("detaches");
    cache.close().expect("ends in order");
    drop(volume);
    drop(cache);
    print("clean", several(scale.rounds));
}
