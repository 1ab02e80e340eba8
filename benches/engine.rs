//! Question: what does the engine add to a 4 KiB copy into persistent memory?
//!
//! Budget: a durable random write at most 2.5 times, a verified read hit at most 2 times the bare
//! non-temporal copy and fence (or copy) of the same bytes, in the same run, on the same memory,
//! on one thread. One fence per write on both sides at batch 1, one per 32 at batch 32.
//!
//! The memory is a file on tmpfs opened as `assume-dax`; offsets are uniform over twice its size;
//! source buffers rotate through more than the caches hold. Rounds of both sides alternate, write-
//! back and reclaim run between them, and the medians' ratio is printed with its spread.
//! `cargo bench --bench engine`; `ENGINE_BENCH_GIB` sets the memory's size (default 2), and with
//! `ENGINE_BENCH_PROFILE` set there is nothing but writes, for a profiler.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use pcache_vhost::backing::{Disk as BackingDisk, OpenOptions as DiskOptions};
use pcache_vhost::cache::volume::VolumeDisk;
use pcache_vhost::cache::worker::Workers;
use pcache_vhost::cache::{
    AttachOptions, Cache, Env, FormatOptions, Mode, Order, SystemClock, Volume, format,
};
use pcache_vhost::pmem::{MappedPmem, OpenOptions as MediaOptions, Pmem};
use pcache_vhost::volume::{Buffer, Disk, DiskQueue, GuestFault, Request, RequestKind, Status};
use pcache_vhost::wake::Waker;

const BLOCK: usize = 4096;
const ROUNDS: usize = 9;
const WRITES: usize = 60_000;
/// Source buffers in rotation: 256 MiB.
const SOURCES: usize = 65_536;

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
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

type Queue = <VolumeDisk<Host> as Disk>::Queue<Source>;

struct Bench {
    queue: Queue,
    volume: Arc<Volume<Host>>,
    _workers: Workers<Host>,
    bare: MappedPmem,
    sources: Arc<Vec<u8>>,
    rng: Rng,
    next: usize,
    blocks: u64,
    written: Vec<u64>,
    spare: Vec<Source>,
}

impl Bench {
    fn new(dir: &Path, bytes: u64) -> Bench {
        let open = |name: &str| {
            let path = dir.join(name);
            pcache_vhost::pmem::create(&path, bytes).expect("room in /dev/shm");
            MappedPmem::open(&MediaOptions { assume_dax: true, prefault: true, ..MediaOptions::new(path) })
                .expect("opens")
        };
        let (media, bare) = (open("cache"), open("bare"));
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
                queues: 1,
                queue_size: 128,
                force_identity: false,
                sidecar: None,
                accept_loss: false,
                allow_volatile: true,
                group: None,
            })
            .expect("attaches");
        let workers = Workers::spawn(&cache, std::slice::from_ref(&volume)).expect("threads");
        let queue = VolumeDisk(volume.clone()).open_queue(0, Waker::default()).expect("a queue");
        let sources = (0..SOURCES * BLOCK).map(|i| (i / 13) as u8).collect();
        Bench {
            queue,
            volume,
            _workers: workers,
            bare,
            sources: Arc::new(sources),
            rng: Rng(0x9e37_79b9),
            next: 0,
            blocks: bytes * 2 / BLOCK as u64,
            written: Vec::new(),
            spare: Vec::new(),
        }
    }

    fn source(&mut self) -> Source {
        self.next = (self.next + 1) % SOURCES;
        let spare = self.spare.pop();
        let source =
            spare.unwrap_or_else(|| Source { all: self.sources.clone(), at: 0, sink: Box::new([0; BLOCK]) });
        Source { at: self.next * BLOCK, ..source }
    }

    /// Nanoseconds per 4 KiB request through the engine.
    fn engine(&mut self, batch: usize, kind: RequestKind) -> f64 {
        let mut done = Vec::with_capacity(batch);
        let start = Instant::now();
        let mut count = 0;
        while count < WRITES {
            for tag in 0..batch as u32 {
                let block = match kind {
                    RequestKind::Write => self.rng.below(self.blocks),
                    _ => self.written[self.rng.below(self.written.len() as u64) as usize],
                };
                if kind == RequestKind::Write {
                    self.written.push(block);
                }
                let data = self.source();
                self.queue.submit(Request { tag, kind, sector: block * 8, data });
            }
            self.queue.commit();
            while self.queue.pending() > 0 {
                self.queue.poll(&mut done);
            }
            for done in done.drain(..) {
                assert_eq!(done.status, Status::Ok);
                self.spare.push(done.data);
            }
            count += batch;
        }
        start.elapsed().as_nanos() as f64 / count as f64
    }

    /// Nanoseconds per bare copy of 4 KiB to a random place, with a fence per batch.
    fn bare_write(&mut self, batch: usize) -> f64 {
        let blocks = self.bare.len() / BLOCK as u64;
        let start = Instant::now();
        for i in 0..WRITES {
            let at = self.rng.below(blocks) * BLOCK as u64;
            self.next = (self.next + 1) % SOURCES;
            let source = &self.sources[self.next * BLOCK..][..BLOCK];
            self.bare.write(at, source).expect("memory takes it");
            if (i + 1) % batch == 0 {
                self.bare.fence();
            }
        }
        start.elapsed().as_nanos() as f64 / WRITES as f64
    }

    /// Nanoseconds per bare copy of 4 KiB from a random place.
    fn bare_read(&mut self) -> f64 {
        let blocks = self.bare.len() / BLOCK as u64;
        let mut sink = [0; BLOCK];
        let start = Instant::now();
        for _ in 0..WRITES {
            self.bare.read(self.rng.below(blocks) * BLOCK as u64, &mut sink).expect("memory gives it");
            std::hint::black_box(&sink);
        }
        start.elapsed().as_nanos() as f64 / WRITES as f64
    }

    /// Lets write-back finish, untimed: rounds neither wait for it nor share the machine with it.
    fn settle(&mut self) {
        while self.volume.counters().dirty_bytes > 0 {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn report(what: &str, budget: f64, rounds: &[(f64, f64)]) {
    let mut ratios: Vec<f64> = rounds.iter().map(|(e, b)| e / b).collect();
    let mut engine: Vec<f64> = rounds.iter().map(|r| r.0).collect();
    let mut bare: Vec<f64> = rounds.iter().map(|r| r.1).collect();
    let (e, b, r) = (median(&mut engine), median(&mut bare), median(&mut ratios));
    println!(
        "{what:<28} engine {e:>6.0} ns  bare {b:>6.0} ns  ratio {r:.2} ({:.2} to {:.2})  budget {budget}",
        ratios[0],
        ratios[ratios.len() - 1]
    );
}

fn main() {
    let gib: u64 = std::env::var("ENGINE_BENCH_GIB").ok().and_then(|g| g.parse().ok()).unwrap_or(2);
    let dir = tempfile::tempdir_in("/dev/shm").expect("tmpfs at /dev/shm");
    let mut bench = Bench::new(dir.path(), gib << 30);
    println!("memory: {gib} GiB on tmpfs as dax, stores: {}", bench.bare.store_plan());
    if std::env::var_os("ENGINE_BENCH_PROFILE").is_some() {
        // For a profiler: nothing but durable writes of one block each, before write-back begins.
        for _ in 0..5 {
            println!("{:.0} ns a write", bench.engine(1, RequestKind::Write));
        }
        return;
    }
    // Before anything is reclaimed or written back: the path alone.
    let fill = ((gib << 30) / (2 * (WRITES * BLOCK) as u64)).min(7);
    let rounds: Vec<_> =
        (0..fill).map(|_| (bench.engine(1, RequestKind::Write), bench.bare_write(1))).collect();
    report("batch 1, nothing reclaimed", 2.5, &rounds);
    // A first fill, so that the rounds run with reclaim.
    for _ in 0..(gib << 30) / (WRITES * BLOCK) as u64 {
        bench.engine(32, RequestKind::Write);
        bench.settle();
    }
    for batch in [1, 32] {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            bench.settle();
            rounds.push((bench.engine(batch, RequestKind::Write), bench.bare_write(batch)));
        }
        report(&format!("4 KiB random write, batch {batch}"), 2.5, &rounds);
    }
    bench.settle();
    let recent = bench.written.len().saturating_sub(100_000);
    bench.written.drain(..recent);
    let rounds: Vec<_> =
        (0..ROUNDS).map(|_| (bench.engine(32, RequestKind::Read), bench.bare_read())).collect();
    report("4 KiB random read hit", 2.0, &rounds);
    let counters = bench.volume.counters();
    println!(
        "reclaimed {} segments, waited for space {} times, hits {} misses {}",
        counters.reclaimed, counters.space_waits, counters.read_hits, counters.read_misses
    );
}
