//! The engine through its public face, on real memory and a real disk, without a front end.
//!
//! Claims: what a guest wrote is what it reads, whatever the cache did meanwhile; a daemon that ends
//! at any moment loses nothing acknowledged; after a drain the disk alone holds it all.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use pcache_vhost::backing::{Disk as BackingDisk, OpenOptions as DiskOptions};
use pcache_vhost::cache::volume::VolumeDisk;
use pcache_vhost::cache::worker::Workers;
use pcache_vhost::cache::{
    AttachOptions, Cache, Env, FormatOptions, Mode, Order, SystemClock, Verdict, Volume, check, format,
};
use pcache_vhost::pmem::{MappedPmem, OpenOptions as MediaOptions};
use pcache_vhost::volume::{Buffer, Disk, DiskQueue, Done, GuestFault, Request, RequestKind, Status};
use pcache_vhost::wake::Waker;

struct Host;

impl Env for Host {
    type Pmem = MappedPmem;
    type Backing = BackingDisk;
    type Clock = SystemClock;
}

struct Bytes(Vec<u8>);

impl Buffer for Bytes {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn copy_out(&self, at: usize, dst: &mut [u8]) -> Result<(), GuestFault> {
        dst.copy_from_slice(&self.0[at..at + dst.len()]);
        Ok(())
    }

    fn copy_in(&mut self, at: usize, src: &[u8]) -> Result<(), GuestFault> {
        self.0[at..at + src.len()].copy_from_slice(src);
        Ok(())
    }
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

type Queue = <VolumeDisk<Host> as Disk>::Queue<Bytes>;

/// A cache with one volume, attached, with two queues.
struct World {
    queues: Vec<Queue>,
    volume: Arc<Volume<Host>>,
    workers: Option<Workers<Host>>,
    cache: Arc<Cache<Host>>,
}

#[derive(Clone, Copy)]
struct Setup {
    assume_dax: bool,
    mode: Mode,
    order: Order,
}

impl World {
    fn open(dir: &Path, setup: Setup) -> World {
        let media = MappedPmem::open(&MediaOptions {
            assume_dax: setup.assume_dax,
            ..MediaOptions::new(dir.join("cache"))
        });
        let (cache, report) =
            Cache::<Host>::open(Arc::new(media.expect("the media opens")), SystemClock::default())
                .expect("the cache opens");
        assert_eq!(report.findings, Vec::<String>::new());
        let mut disk = DiskOptions::new(dir.join("disk"));
        disk.wait_lock = Some(Duration::from_secs(10));
        let volume = attach(&cache, "vm", Arc::new(BackingDisk::open(&disk).expect("the disk opens")), setup);
        let workers = Workers::spawn(&cache, std::slice::from_ref(&volume)).expect("threads");
        let disk = VolumeDisk(volume.clone());
        let queues = (0..2).map(|q| disk.open_queue(q, Waker::default()).expect("a queue")).collect();
        World { queues, volume, workers: Some(workers), cache }
    }

    /// Waits until everything submitted has completed.
    fn settle(&mut self, done: &mut Vec<(usize, Done<Bytes>)>) {
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        loop {
            for (q, queue) in self.queues.iter_mut().enumerate() {
                let mut some = Vec::new();
                queue.commit();
                queue.poll(&mut some);
                done.extend(some.into_iter().map(|d| (q, d)));
            }
            if self.queues.iter().all(|q| q.pending() == 0) {
                return;
            }
            if std::time::Instant::now() > deadline {
                panic!("requests hang: {:?}", self.volume.counters());
            }
            std::thread::yield_now();
        }
    }
}

fn attach(
    cache: &Arc<Cache<Host>>,
    name: &str,
    backing: Arc<BackingDisk>,
    setup: Setup,
) -> Arc<Volume<Host>> {
    attach_with(cache, name, backing, setup, 2)
}

fn attach_with(
    cache: &Arc<Cache<Host>>,
    name: &str,
    backing: Arc<BackingDisk>,
    setup: Setup,
    queues: u16,
) -> Arc<Volume<Host>> {
    cache
        .attach(AttachOptions {
            name: name.to_owned(),
            backing,
            mode: setup.mode,
            order: setup.order,
            redo: None,
            data_crc: true,
            pass_discard: true,
            reads: Default::default(),
            read_only: false,
            serial: "serial".to_owned(),
            block_size: None,
            queues,
            queue_size: 128,
            force_identity: false,
            sidecar: None,
            accept_loss: false,
            allow_volatile: true,
            group: None,
        })
        .expect("the volume attaches")
}

fn make(dir: &Path, cache_size: u64, disk_size: u64, setup: Setup) {
    pcache_vhost::pmem::create(&dir.join("cache"), cache_size).expect("created");
    let media = MappedPmem::open(&MediaOptions {
        assume_dax: setup.assume_dax,
        ..MediaOptions::new(dir.join("cache"))
    });
    format(&media.expect("opens"), &SystemClock::default(), &FormatOptions::default()).expect("formats");
    let disk = std::fs::File::create(dir.join("disk")).expect("creates");
    disk.set_len(disk_size).expect("grows");
}

/// Random traffic over two queues against a plain model, with the world dropped and reopened
/// between rounds.
fn traffic(seed: u64, dir: &Path, setup: Setup, rounds: usize, batches: usize) {
    let disk_size: u64 = 256 << 20;
    make(dir, 64 << 20, disk_size, setup);
    let mut rng = Rng(seed);
    let mut model = vec![0u8; disk_size as usize];
    let (mut reclaimed, mut relocated) = (0, 0);
    for round in 0..rounds {
        let mut world = World::open(dir, setup);
        for batch in 0..batches {
            let context = format!("seed {seed:#x} round {round} batch {batch}");
            step(&mut world, &mut rng, &mut model, &context);
        }
        let counters = world.volume.counters();
        assert_eq!(counters.checksum_errors, 0);
        reclaimed += counters.reclaimed;
        relocated += counters.relocated_sectors;
        world.queues.clear();
        if round + 1 == rounds {
            world.workers.take();
            world.volume.drain_here(&mut |_| {}).expect("drains");
            world.cache.detach(&world.volume).expect("detaches");
            world.cache.close().expect("closes");
            drop(world);
            assert!(
                std::fs::read(dir.join("disk")).expect("reads") == model,
                "seed {seed:#x}: the disk alone"
            );
            let media = MappedPmem::open(&MediaOptions::new(dir.join("cache"))).expect("opens");
            let report = check(&Arc::new(media));
            assert_eq!((report.verdict, report.findings), (Verdict::Clean, vec![]));
        }
    }
    assert!(reclaimed > 0, "seed {seed:#x}: nothing was reclaimed");
    if setup.mode == Mode::Writeback {
        assert!(relocated > 0, "seed {seed:#x}: nothing was relocated");
    }
}

/// A batch of disjoint requests on both queues; reads are compared, writes enter the model.
fn step(world: &mut World, rng: &mut Rng, model: &mut [u8], context: &str) {
    let sectors = model.len() as u64 / 512;
    let hot = if rng.below(2) == 0 { sectors } else { sectors / 32 };
    let mut at = rng.below(hot);
    let mut asked = Vec::new();
    for tag in 0..1 + rng.below(24) as u32 {
        let len = match rng.below(4) {
            0 => 1 + rng.below(16),
            1 => 8,
            2 => 8 * (1 + rng.below(16)),
            _ => 1 + rng.below(512),
        };
        if at + len > sectors {
            break;
        }
        let (start, bytes) = (at, (len * 512) as usize);
        at += len + rng.below(64);
        let kind = match rng.below(16) {
            0..6 => RequestKind::Read,
            6..14 => RequestKind::Write,
            14 => RequestKind::Discard { sectors: len },
            _ => RequestKind::WriteZeroes { sectors: len, unmap: rng.below(2) == 0 },
        };
        let (first, range) = (rng.next() as u8, start as usize * 512..start as usize * 512 + bytes);
        let data = match kind {
            RequestKind::Write => (0..bytes).map(|i| first.wrapping_add((i / 7) as u8)).collect(),
            RequestKind::Read => vec![0xee; bytes],
            _ => Vec::new(),
        };
        match kind {
            RequestKind::Write => model[range.clone()].copy_from_slice(&data),
            RequestKind::Read => {}
            _ => model[range.clone()].fill(0),
        }
        asked.push((kind, range));
        let q = rng.below(2) as usize;
        world.queues[q].submit(Request { tag, kind, sector: start, data: Bytes(data) });
    }
    if rng.below(4) == 0 {
        world.queues[0].submit(Request {
            tag: 999,
            kind: RequestKind::Flush,
            sector: 0,
            data: Bytes(vec![]),
        });
    }
    let mut done = Vec::new();
    world.settle(&mut done);
    for (_, done) in done {
        assert_eq!(done.status, Status::Ok, "{context}: request {}", done.tag);
        if done.tag == 999 {
            continue;
        }
        let (kind, range) = &asked[done.tag as usize];
        if *kind == RequestKind::Read && done.data.0 != model[range.clone()] {
            let wrong =
                done.data.0.iter().zip(&model[range.clone()]).position(|(a, b)| a != b).expect("differs");
            panic!("{context}: sector {} of {range:?} reads back wrong", (range.start + wrong) / 512);
        }
    }
}

fn memory_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a directory in memory")
}

#[test]
fn on_dax_memory_strict_write_back_keeps_every_byte() {
    let dir = memory_dir();
    let setup = Setup { assume_dax: true, mode: Mode::Writeback, order: Order::Strict };
    traffic(0x5eed_0001, dir.path(), setup, 4, 250);
}

#[test]
fn on_dax_memory_relaxed_write_back_keeps_every_byte() {
    let dir = memory_dir();
    let setup = Setup { assume_dax: true, mode: Mode::Writeback, order: Order::Relaxed };
    traffic(0x5eed_0002, dir.path(), setup, 4, 250);
}

#[test]
fn on_a_page_cache_file_write_back_keeps_every_byte() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let setup = Setup { assume_dax: false, mode: Mode::Writeback, order: Order::Strict };
    traffic(0x5eed_0003, dir.path(), setup, 3, 100);
}

#[test]
fn modes_that_write_around_the_cache_keep_every_byte() {
    for (i, mode) in [Mode::Writethrough, Mode::Writearound].into_iter().enumerate() {
        let dir = memory_dir();
        let setup = Setup { assume_dax: true, mode, order: Order::Strict };
        traffic(0x5eed_0010 + i as u64, dir.path(), setup, 2, 250);
    }
}

/// Two volumes on one cache, as one daemon would serve them.
struct Pair {
    queues: Vec<Queue>,
    volumes: Vec<Arc<Volume<Host>>>,
    _workers: Workers<Host>,
}

impl Pair {
    fn open(dir: &Path, setup: Setup) -> Pair {
        let media =
            MappedPmem::open(&MediaOptions { assume_dax: true, ..MediaOptions::new(dir.join("cache")) });
        let (cache, _) =
            Cache::<Host>::open(Arc::new(media.expect("opens")), SystemClock::default()).expect("opens");
        let volumes: Vec<_> = ["a", "b"]
            .iter()
            .map(|name| {
                let disk = DiskOptions {
                    create_sparse: Some(256 << 20),
                    wait_lock: Some(Duration::from_secs(10)),
                    ..DiskOptions::new(dir.join(name))
                };
                attach(&cache, name, Arc::new(BackingDisk::open(&disk).expect("opens")), setup)
            })
            .collect();
        let workers = Workers::spawn(&cache, &volumes).expect("threads");
        let open =
            |v: &Arc<Volume<Host>>| VolumeDisk(v.clone()).open_queue(0, Waker::default()).expect("a queue");
        Pair { queues: volumes.iter().map(open).collect(), volumes, _workers: workers }
    }

    fn ask(&mut self, volume: usize, kind: RequestKind, sector: u64, data: Vec<u8>) -> Vec<u8> {
        let queue = &mut self.queues[volume];
        queue.submit(Request { tag: 0, kind, sector, data: Bytes(data) });
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        let mut done = Vec::new();
        while done.is_empty() {
            assert!(std::time::Instant::now() < deadline, "the request hangs");
            queue.commit();
            queue.poll(&mut done);
        }
        let done = done.remove(0);
        assert_eq!(done.status, Status::Ok);
        done.data.0
    }
}

/// The story: epochs went on above the keys found, not above the tail. A volume whose segments had
/// all been reclaimed began at epoch 1 again, below its tail, and what it wrote counted as clean:
/// gone after the next crash. (Simulation, seed 34.)
#[test]
fn a_volume_that_lost_every_segment_to_reclaim_still_counts_epochs_above_its_tail() {
    let dir = memory_dir();
    let setup = Setup { assume_dax: true, mode: Mode::Writeback, order: Order::Strict };
    make(dir.path(), 64 << 20, 512, setup);
    let mut pair = Pair::open(dir.path(), setup);
    for round in 0..4 {
        pair.ask(0, RequestKind::Write, 0, vec![round; 4096]);
        pair.ask(0, RequestKind::Flush, 0, vec![]);
    }
    for mib in 0..200 {
        pair.ask(1, RequestKind::Write, mib * 2048, vec![mib as u8; 1 << 20]);
    }
    // Nothing presses this volume: its data goes to the disk when it is old enough.
    let moved = (0..200).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        pair.volumes[0].counters().tail_epoch >= 4
    });
    assert!(moved, "the tail has not moved");
    drop(pair);
    let mut pair = Pair::open(dir.path(), setup);
    for mib in 0..200 {
        pair.ask(1, RequestKind::Write, mib * 2048, vec![mib as u8; 1 << 20]);
    }
    let mut held = 0;
    pair.volumes[0].for_each_extent(|_| held += 1);
    assert_eq!(held, 0, "reclaim has taken all of it");
    drop(pair);
    let mut pair = Pair::open(dir.path(), setup);
    pair.ask(0, RequestKind::Write, 0, vec![0xaa; 4096]);
    drop(pair);
    let mut pair = Pair::open(dir.path(), setup);
    assert!(
        pair.ask(0, RequestKind::Read, 0, vec![0; 4096]) == [0xaa; 4096],
        "an acknowledged write is gone"
    );
}

/// A volume is attached and detached again and again in one life of the cache, each time with other
/// queues, dirty data staying in the cache in between.
#[test]
fn a_volume_comes_back_with_more_queues_in_the_same_life_and_keeps_every_byte() {
    for order in [Order::Strict, Order::Relaxed] {
        let dir = memory_dir();
        let setup = Setup { assume_dax: true, mode: Mode::Writeback, order };
        make(dir.path(), 64 << 20, 64 << 20, setup);
        let media = MappedPmem::open(&MediaOptions {
            assume_dax: true,
            ..MediaOptions::new(dir.path().join("cache"))
        });
        let (cache, _) =
            Cache::<Host>::open(Arc::new(media.expect("opens")), SystemClock::default()).expect("opens");
        let mut workers = Workers::spawn(&cache, &[]).expect("threads");
        let mut rng = Rng(0x5eed_0020);
        let mut model = vec![0u8; 64 << 20];
        let mut was_dirty = false;
        for (life, queues) in [2, 5, 1, 16, 3].into_iter().enumerate() {
            let mut disk = DiskOptions::new(dir.path().join("disk"));
            disk.wait_lock = Some(Duration::from_secs(10));
            let disk = Arc::new(BackingDisk::open(&disk).expect("the disk of the last life is let go"));
            let volume = attach_with(&cache, "vm", disk, setup, queues);
            workers.serve(&volume).expect("a thread");
            let face = VolumeDisk(volume.clone());
            let last = queues - 1;
            let queues = [0, last].map(|q| face.open_queue(q, Waker::default()).ok());
            let mut world = World {
                // Both of one queue, where there is only one: the second cannot be opened.
                queues: queues.into_iter().flatten().collect(),
                volume: volume.clone(),
                workers: None,
                cache: cache.clone(),
            };
            for batch in 0..60 {
                let context = format!("{order:?} life {life} batch {batch}");
                if world.queues.len() == 2 {
                    step(&mut world, &mut rng, &mut model, &context);
                }
            }
            world.queues.clear();
            was_dirty |= !volume.is_clean();
            workers.retire(&volume);
            cache.detach(&volume).expect("detaches");
        }
        assert!(was_dirty, "{order:?}: nothing was ever kept dirty over a detach");

        let disk = Arc::new(BackingDisk::open(&DiskOptions::new(dir.path().join("disk"))).expect("opens"));
        let volume = attach_with(&cache, "vm", disk, setup, 2);
        workers.serve(&volume).expect("a thread");
        let mut steps = Vec::new();
        let flushed = volume.flush_to_disk(&mut |step| {
            steps.push((step.dirty_bytes, step.total_bytes));
            std::ops::ControlFlow::Continue(())
        });
        flushed.expect("flushes");
        assert!(steps.last().is_some_and(|(dirty, _)| *dirty == 0), "{steps:?}");
        assert!(std::fs::read(dir.path().join("disk")).expect("reads") == model, "{order:?}: the disk alone");
        assert!(volume.is_clean());
    }
}

/// What a flush waits for is what was acknowledged before it, not what a guest goes on writing.
#[test]
fn a_flush_to_the_disk_ends_under_a_guest_that_never_stops_and_can_be_given_up() {
    use std::ops::ControlFlow::{Break, Continue};
    let dir = memory_dir();
    let setup = Setup { assume_dax: true, mode: Mode::Writeback, order: Order::Strict };
    make(dir.path(), 64 << 20, 16 << 20, setup);
    let mut world = World::open(dir.path(), setup);
    let write = |world: &mut World, sector: u64, byte: u8| {
        let data = Bytes(vec![byte; 4096]);
        world.queues[0].submit(Request { tag: 0, kind: RequestKind::Write, sector, data });
        world.settle(&mut Vec::new());
    };
    for page in 0..64 {
        write(&mut world, page * 8, 0xa1);
    }
    let interrupted = world.volume.flush_to_disk(&mut |_| Break(())).expect_err("was told to stop");
    assert_eq!(interrupted.to_string().split(';').next(), Some("it was interrupted"));

    let volume = world.volume.clone();
    let flush = std::thread::spawn(move || volume.flush_to_disk(&mut |_| Continue(())));
    let mut after = 0;
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while !flush.is_finished() {
        assert!(std::time::Instant::now() < deadline, "the flush follows the guest");
        write(&mut world, (1024 + after % 1024) * 8, 0xb2);
        after += 1;
    }
    flush.join().expect("no panic").expect("flushes");
    assert!(after > 0, "the guest wrote nothing meanwhile");
    let disk = std::fs::read(dir.path().join("disk")).expect("reads");
    assert!(disk[..64 * 4096].iter().all(|&byte| byte == 0xa1), "what was acknowledged before is there");
}

/// Reads that come while another is on its way to the same bytes ask the disk for nothing; all get what is
/// there, and so does one that asks for a part.
#[test]
fn reads_of_one_missing_range_share_one_read_of_the_disk() {
    use pcache_vhost::cache::latency::Stage;
    let dir = memory_dir();
    let setup = Setup { assume_dax: true, mode: Mode::Writeback, order: Order::Strict };
    make(dir.path(), 64 << 20, 16 << 20, setup);
    let pattern: Vec<u8> = (0..16 << 20).map(|at| (at / 512 % 251) as u8).collect();
    std::fs::write(dir.path().join("disk"), &pattern).expect("writes");
    let mut world = World::open(dir.path(), setup);
    let asked = |world: &World| world.volume.latencies()[Stage::DiskRead as usize].samples();
    let before = asked(&world);
    let parts = [(800u64, 16usize), (800, 16), (800, 16), (808, 8), (804, 4)];
    for (tag, (sector, sectors)) in parts.into_iter().enumerate() {
        let data = Bytes(vec![0; sectors * 512]);
        world.queues[0].submit(Request { tag: tag as u32, kind: RequestKind::Read, sector, data });
    }
    let mut done = Vec::new();
    world.settle(&mut done);
    assert_eq!((done.len(), asked(&world) - before), (parts.len(), 1));
    for (_, done) in done {
        let (sector, sectors) = parts[done.tag as usize];
        let expected = &pattern[sector as usize * 512..][..sectors * 512];
        assert!(done.status == Status::Ok && done.data.0 == expected, "read {}", done.tag);
    }
}
