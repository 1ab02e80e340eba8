//! Question: how close does the engine come to what the memory allows?
//!
//! Every figure is a ratio to the bare thing, done in the same round on the same memory with the same
//! batch: for writes the plan's store of 4 KiB and a fence per batch, for verified read hits the guarded
//! copy. Bars, as shares of the bare rate: 0.70 at batch 32 and 0.55 at batch 1 for durable, checksummed
//! random writes, 0.75 for hits; two threads on two queues keep 0.95 of what two bare threads gain.
//!
//! Conditions: the memory is a file of 2 GiB on tmpfs opened as `assume-dax`; offsets are uniform over
//! twice its size; source buffers rotate through more than the caches hold; checksums are on; the cache
//! has been filled once, so write-back and reclaim run. Rounds of both sides alternate. Between them
//! write-back finishes, untimed, so that no round pays for the one before.
//!
//! Two ratios are printed: by the wall clock, which is what counts on a quiet machine, and by processor
//! time of the threads measured less what they waited for space, which says something on a busy one too.
//!
//! `cargo bench --bench engine`: some two minutes. `ENGINE_BENCH_GIB` sets the memory's size,
//! `ENGINE_BENCH_ROUNDS` the number of rounds (default 9); with `ENGINE_BENCH_PROFILE` set there is
//! nothing but writes of one block each, for a profiler.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use pcache_vhost::backing::{Disk as BackingDisk, OpenOptions as DiskOptions};
use pcache_vhost::cache::volume::VolumeDisk;
use pcache_vhost::cache::worker::Workers;
use pcache_vhost::cache::{
    AttachOptions, Cache, Env, FormatOptions, Mode, Order, SystemClock, Volume, format,
};
use pcache_vhost::pmem::guard::{ForeignSlice, ForeignSliceMut};
use pcache_vhost::pmem::{MappedPmem, OpenOptions as MediaOptions, Pmem};
use pcache_vhost::volume::{Buffer, Disk, DiskQueue, GuestFault, Request, RequestKind, Status};
use pcache_vhost::wake::Waker;

const BLOCK: usize = 4096;
/// Requests of one thread in one round: less than an eighth of the memory, so that a round which begins
/// with nothing dirty is not paced by the disk.
const REQUESTS: usize = 32_768;
/// Source buffers in rotation: 256 MiB for each thread.
const SOURCES: usize = 65_536;
/// Blocks that are surely still cached: those written last.
const RECENT: usize = 100_000;
const LANES: usize = 2;

struct Host;

impl Env for Host {
    type Pmem = MappedPmem;
    type Backing = BackingDisk;
    type Clock = SystemClock;
}

/// One source buffer of the rotation, or a place to read to. Small, and used again and again, as a
/// front end's descriptors are.
struct Source {
    all: Arc<Vec<u8>>,
    at: usize,
    sink: Box<[u8; BLOCK]>,
}

impl Buffer for Source {
    fn len(&self) -> usize {
        BLOCK
    }

    fn copy_out(&self, at: usize, dst: &mut [u8]) -> Result<(), GuestFault> {
        dst.copy_from_slice(&self.all[self.at + at..][..dst.len()]);
        Ok(())
    }

    fn copy_in(&mut self, at: usize, src: &[u8]) -> Result<(), GuestFault> {
        self.sink[at..at + src.len()].copy_from_slice(src);
        Ok(())
    }

    fn lend<R>(&self, at: usize, len: usize, f: impl FnOnce(ForeignSlice<'_>) -> R) -> Option<R> {
        Some(f(self.all[self.at + at..][..len].into()))
    }

    fn lend_mut<R>(&mut self, at: usize, len: usize, f: impl FnOnce(ForeignSliceMut<'_>) -> R) -> Option<R> {
        Some(f((&mut self.sink[at..at + len]).into()))
    }
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((u128::from(self.0) * u128::from(n)) >> 64) as u64
    }
}

type Queue = <VolumeDisk<Host> as Disk>::Queue<Source>;

/// What is done, on either side.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Write,
    Read,
}

/// One thread's part: a queue, and what it needs of its own.
struct Lane {
    queue: Queue,
    bare: Arc<MappedPmem>,
    sources: Arc<Vec<u8>>,
    rng: Rng,
    next: usize,
    blocks: u64,
    /// Blocks written last, in a ring.
    recent: Vec<u64>,
    oldest: usize,
    spare: Vec<Source>,
    done: Vec<pcache_vhost::volume::Done<Source>>,
    /// Processor time spent waiting.
    waited: Duration,
}

impl Lane {
    fn request(&mut self, tag: u32, work: Work) -> Request<Source> {
        let (block, kind) = match work {
            Work::Read => (self.recent[self.rng.below(self.recent.len() as u64) as usize], RequestKind::Read),
            Work::Write => {
                let block = self.rng.below(self.blocks);
                if self.recent.len() < RECENT {
                    self.recent.push(block);
                } else {
                    self.recent[self.oldest] = block;
                    self.oldest = (self.oldest + 1) % RECENT;
                }
                (block, RequestKind::Write)
            }
        };
        self.next = (self.next + 1) % SOURCES;
        let spare = self.spare.pop();
        let fresh = || Source { all: self.sources.clone(), at: 0, sink: Box::new([0; BLOCK]) };
        let data = Source { at: self.next * BLOCK, ..spare.unwrap_or_else(fresh) };
        Request { tag, kind, sector: block * 8, data }
    }

    fn engine(&mut self, work: Work, batch: usize) {
        for _ in 0..REQUESTS / batch {
            for tag in 0..batch as u32 {
                let request = self.request(tag, work);
                self.queue.submit(request);
            }
            self.queue.commit();
            self.queue.poll(&mut self.done);
            if self.queue.pending() > 0 {
                self.wait();
            }
            for done in self.done.drain(..) {
                assert_eq!(done.status, Status::Ok);
                self.spare.push(done.data);
            }
        }
    }

    /// Waits for what could not be done at once: for space, mostly. That is no processor time of the path.
    fn wait(&mut self) {
        let before = thread_time();
        while self.queue.pending() > 0 {
            std::thread::yield_now();
            self.queue.poll(&mut self.done);
        }
        self.waited += thread_time() - before;
    }

    fn bare(&mut self, work: Work, batch: usize) {
        let blocks = self.bare.len() / BLOCK as u64;
        let mut sinks = vec![[0; BLOCK]; batch];
        for i in 0..REQUESTS {
            let at = self.rng.below(blocks) * BLOCK as u64;
            match work {
                Work::Write => {
                    self.next = (self.next + 1) % SOURCES;
                    let source = &self.sources[self.next * BLOCK..][..BLOCK];
                    self.bare.write(at, source).expect("memory takes it");
                    if (i + 1) % batch == 0 {
                        self.bare.fence();
                    }
                }
                Work::Read => {
                    self.bare.read(at, &mut sinks[i % batch]).expect("memory gives it");
                    std::hint::black_box(&sinks);
                }
            }
        }
    }
}

struct Bench {
    volume: Arc<Volume<Host>>,
    _workers: Workers<Host>,
    lanes: Vec<Lane>,
}

fn open_media(dir: &Path, name: &str, bytes: u64) -> MappedPmem {
    let path = dir.join(name);
    pcache_vhost::pmem::create(&path, bytes).expect("room in /dev/shm");
    let options = MediaOptions { assume_dax: true, prefault: true, ..MediaOptions::new(path) };
    MappedPmem::open(&options).expect("opens")
}

impl Bench {
    fn new(dir: &Path, bytes: u64) -> Bench {
        let (media, bare) = (open_media(dir, "cache", bytes), Arc::new(open_media(dir, "bare", bytes)));
        format(&media, &SystemClock::default(), &FormatOptions::default()).expect("formats");
        let (cache, _) = Cache::<Host>::open(Arc::new(media), SystemClock::default()).expect("opens");
        let disk = DiskOptions { create_sparse: Some(bytes * 2), ..DiskOptions::new(dir.join("disk")) };
        let volume = cache
            .attach(AttachOptions {
                name: "bench".to_owned(),
                backing: Arc::new(BackingDisk::open(&disk).expect("opens")),
                mode: Mode::Writeback,
                order: Order::Relaxed,
                redo: None,
                data_crc: true,
                pass_discard: true,
                reads: Default::default(),
                read_only: false,
                serial: String::new(),
                block_size: None,
                queues: LANES as u16,
                queue_size: 128,
                force_identity: false,
                sidecar: None,
                accept_loss: false,
                allow_volatile: true,
                group: None,
            })
            .expect("attaches");
        let workers = Workers::spawn(&cache, std::slice::from_ref(&volume)).expect("threads");
        let lane = |index: usize| Lane {
            queue: VolumeDisk(volume.clone()).open_queue(index as u16, Waker::default()).expect("a queue"),
            bare: bare.clone(),
            sources: Arc::new((0..SOURCES * BLOCK).map(|i| (i / 13 + index) as u8).collect()),
            rng: Rng(0x9e37_79b9_7f4a_7c15 ^ index as u64),
            next: 0,
            blocks: bytes * 2 / BLOCK as u64,
            recent: Vec::new(),
            oldest: 0,
            spare: Vec::new(),
            done: Vec::new(),
            waited: Duration::ZERO,
        };
        let lanes = (0..LANES).map(lane).collect();
        Bench { volume, _workers: workers, lanes }
    }

    /// Runs `f` on the first `count` lanes at once.
    fn run(&mut self, count: usize, f: impl Fn(&mut Lane) + Sync) -> Time {
        let (start, cpu) = (Barrier::new(count), AtomicU64::new(0));
        let spans: Vec<(Instant, Instant)> = std::thread::scope(|scope| {
            let threads: Vec<_> = self.lanes[..count]
                .iter_mut()
                .map(|lane| {
                    scope.spawn(|| {
                        start.wait();
                        let (begin, before) = (Instant::now(), thread_time());
                        f(lane);
                        let used = thread_time() - before - std::mem::take(&mut lane.waited);
                        cpu.fetch_add(used.as_nanos() as u64, Ordering::Relaxed);
                        (begin, Instant::now())
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("no lane panics")).collect()
        });
        let begin = spans.iter().map(|span| span.0).min().expect("lanes");
        let end = spans.iter().map(|span| span.1).max().expect("lanes");
        let requests = (count * REQUESTS) as f64;
        Time {
            wall_ns: (end - begin).as_nanos() as f64 / requests,
            cpu_ns: cpu.into_inner() as f64 / requests,
        }
    }

    /// Lets write-back finish, untimed.
    fn settle(&mut self) {
        while self.volume.counters().dirty_bytes > 0 {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// One round of both sides.
    fn round(&mut self, work: Work, lanes: usize, batch: usize) -> Round {
        self.settle();
        let bare = self.run(lanes, |lane| lane.bare(work, batch));
        let engine = self.run(lanes, |lane| lane.engine(work, batch));
        Round { engine, bare }
    }
}

/// Processor time of the calling thread.
#[expect(unsafe_code, reason = "no safe wrapper of clock_gettime")]
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec to write to.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(failed, 0, "every thread has a clock");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Of one request, over all lanes: two that work at once halve the first.
#[derive(Clone, Copy)]
struct Time {
    wall_ns: f64,
    cpu_ns: f64,
}

#[derive(Clone, Copy)]
struct Round {
    engine: Time,
    bare: Time,
}

/// Median and extremes.
fn spread(values: impl Iterator<Item = f64>) -> (f64, f64, f64) {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    (values[0], values[values.len() / 2], values[values.len() - 1])
}

fn print_row(what: &str, ns: (f64, f64), wall: (f64, f64, f64), cpu: Option<(f64, f64, f64)>, bar: f64) {
    let cpu = cpu.map_or(String::from("-"), |cpu| format!("{:.2}", cpu.1));
    let verdict = if wall.1 >= bar { "met" } else { "missed" };
    println!(
        "{what:<36} {:>7.0} {:>7.0}   {:.2} ({:.2} to {:.2})   {cpu:>6}   {bar:.2} {verdict}",
        ns.0, ns.1, wall.1, wall.0, wall.2
    );
}

fn report(what: &str, bar: f64, rounds: &[Round]) {
    let wall = spread(rounds.iter().map(|r| r.bare.wall_ns / r.engine.wall_ns));
    let cpu = spread(rounds.iter().map(|r| r.bare.cpu_ns / r.engine.cpu_ns));
    let engine = spread(rounds.iter().map(|r| r.engine.wall_ns)).1;
    let bare = spread(rounds.iter().map(|r| r.bare.wall_ns)).1;
    print_row(what, (engine, bare), wall, Some(cpu), bar);
}

/// What two threads gain over one, against what bare ones gain.
fn report_scaling(what: &str, bar: f64, one: &[Round], two: &[Round]) {
    let gain = |pick: fn(&Round) -> f64| -> Vec<f64> {
        one.iter().zip(two).map(|(one, two)| pick(one) / pick(two)).collect()
    };
    let (engine, bare) = (gain(|r| r.engine.wall_ns), gain(|r| r.bare.wall_ns));
    let ratio = spread(engine.iter().zip(&bare).map(|(e, b)| e / b));
    let engine_gain = spread(engine.into_iter());
    let bare_gain = spread(bare.into_iter());
    print_row(what, (engine_gain.1 * 100.0, bare_gain.1 * 100.0), ratio, None, bar);
}

fn measure(bench: &mut Bench, rounds: usize) {
    println!(
        "{:<36} {:>7} {:>7}   {:<21}   {:>6}   bar",
        "4 KiB, random", "engine", "bare", "ratio (least, most)", "by cpu"
    );
    for (work, batch, bar) in
        [(Work::Write, 1, 0.55), (Work::Write, 32, 0.70), (Work::Read, 1, 0.75), (Work::Read, 32, 0.75)]
    {
        let (mut one, mut two) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            one.push(bench.round(work, 1, batch));
            two.push(bench.round(work, LANES, batch));
        }
        let name = if work == Work::Write { "write" } else { "hit" };
        report(&format!("{name}, batch {batch}, ns"), bar, &one);
        report(&format!("{name}, batch {batch}, 2 threads, ns"), bar, &two);
        report_scaling(&format!("{name}, batch {batch}, gain of 2 threads, %"), 0.95, &one, &two);
        let rate = |pick: fn(&Round) -> f64| 1e3 / spread(two.iter().map(pick)).1;
        println!(
            "{:<36} {:>6.2}M {:>6.2}M",
            format!("{name}, batch {batch}, 2 threads, a second"),
            rate(|r| r.engine.wall_ns),
            rate(|r| r.bare.wall_ns)
        );
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn main() {
    // `cargo test --benches` only asks whether it runs.
    let is_asked = std::env::args().any(|arg| arg == "--bench");
    let (bytes, rounds) = match is_asked {
        true => (number("ENGINE_BENCH_GIB", 2) << 30, number("ENGINE_BENCH_ROUNDS", 9) as usize),
        false => (512 << 20, 1),
    };
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        println!("SKIPPED: /dev/shm is not writable");
        return;
    };
    let mut bench = Bench::new(dir.path(), bytes);
    println!("{} MiB on tmpfs as dax, stores: {}", bytes >> 20, bench.lanes[0].bare.store_plan());
    if std::env::var_os("ENGINE_BENCH_PROFILE").is_some() {
        // For a profiler: nothing but durable writes, before write-back begins.
        let batch = number("ENGINE_BENCH_PROFILE", 1).max(1) as usize;
        for _ in 0..5 {
            let time = bench.run(1, |lane| lane.engine(Work::Write, batch));
            println!("{:.0} ns a write in batches of {batch}", time.wall_ns);
        }
        return;
    }
    // A first fill, so that the rounds run with reclaim.
    for _ in 0..bytes / (LANES * REQUESTS * BLOCK) as u64 + 1 {
        bench.run(LANES, |lane| lane.engine(Work::Write, 32));
        bench.settle();
    }
    measure(&mut bench, rounds);
    let counters = bench.volume.counters();
    println!(
        "reclaimed {} segments, waited for space {} times, hits {} misses {}",
        counters.reclaimed, counters.space_waits, counters.read_hits, counters.read_misses
    );
}
