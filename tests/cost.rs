//! What a request costs, in figures that no neighbour on the machine can move: instructions, fences, and
//! bytes stored. A clock on a shared machine cannot tell a path that grew by a tenth; these can.
//!
//! `TABLE` says what each figure was when it was last looked at, and how far it may go up. Who makes a
//! path dearer for a reason changes the table in the same commit and says why; who makes it cheaper
//! brings the figure down with it, so that it stays won. Instructions are those of this build, optimised
//! and with assertions on, counted by callgrind on the processor that valgrind emulates, so without its
//! wider vectors, and each byte of a `rep movsb` as one: the table compares versions of this engine, not
//! machines. Another compiler moves them a little, hence the tolerance.
//!
//! Where valgrind is missing the instruction counts are skipped aloud; `PCACHE_REQUIRE_VALGRIND=1` makes
//! that a failure.

use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pcache_vhost::backing::{Disk as BackingDisk, OpenOptions as DiskOptions};
use pcache_vhost::cache::volume::VolumeDisk;
use pcache_vhost::cache::worker::{Progress, Stepper};
use pcache_vhost::cache::{
    AttachOptions, Cache, Env, FormatOptions, Mode, Order, SystemClock, Volume, format,
};
use pcache_vhost::pmem::guard::{ForeignSlice, ForeignSliceMut};
use pcache_vhost::pmem::{MappedPmem, MediaClass, MediaError, OpenOptions as MediaOptions, Pmem, SyncError};
use pcache_vhost::volume::{Buffer, Disk, DiskQueue, GuestFault, Request, RequestKind, Status};
use pcache_vhost::wake::Waker;

/// What is counted, what it came to, and by how many percent it may be more.
const TABLE: &[(&str, f64, f64)] = &[
    ("instructions per 4 KiB write, batch 1", 9281.0, 5.0),
    ("instructions per 4 KiB write, batch 32", 5330.0, 5.0),
    ("instructions per 4 KiB read hit, batch 32", 3911.0, 5.0),
    ("instructions per key of a start after a crash", 11532.0, 5.0),
    ("instructions per key of a start from summaries", 3651.0, 5.0),
    ("fences per write, batch 1", 1.0, 0.0),
    ("fences per batch of 32 writes", 1.0, 0.0),
    ("bytes stored per 4 KiB write, batch 1", 4416.0, 0.0),
    ("bytes stored per 4 KiB write, batch 32", 4138.0, 0.0),
    ("bytes read per write to seal segments, batch 1", 191.0, 5.0),
];

/// Requests per figure; a multiple of 32.
const REQUESTS: u64 = 2048;
const BLOCKS: u64 = 1 << 16;

/// The memory, and what was asked of it.
struct Counting {
    inner: MappedPmem,
    fences: AtomicU64,
    bytes: AtomicU64,
    bytes_read: AtomicU64,
}

impl Pmem for Counting {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn class(&self) -> MediaClass {
        self.inner.class()
    }

    fn read(&self, at: u64, dst: &mut [u8]) -> Result<(), MediaError> {
        self.bytes_read.fetch_add(dst.len() as u64, Ordering::Relaxed);
        self.inner.read(at, dst)
    }

    fn write(&self, at: u64, src: &[u8]) -> Result<(), MediaError> {
        self.bytes.fetch_add(src.len() as u64, Ordering::Relaxed);
        self.inner.write(at, src)
    }

    fn write_summed(&self, at: u64, src: ForeignSlice<'_>) -> Option<u32> {
        let stored = self.inner.write_summed(at, src)?;
        self.bytes.fetch_add(src.len() as u64, Ordering::Relaxed);
        Some(stored)
    }

    fn read_summed(&self, at: u64, dst: &mut ForeignSliceMut<'_>) -> Option<u32> {
        self.inner.read_summed(at, dst)
    }

    fn fence(&self) {
        self.fences.fetch_add(1, Ordering::Relaxed);
        self.inner.fence();
    }

    fn sync(&self) -> Result<(), SyncError> {
        self.inner.sync()
    }

    fn settle(&self, at: u64, len: u64) -> Result<(), MediaError> {
        self.inner.settle(at, len)
    }

    fn prefetch(&self, at: u64) {
        self.inner.prefetch(at);
    }
}

struct Host;

impl Env for Host {
    type Pmem = Counting;
    type Backing = BackingDisk;
    type Clock = SystemClock;

    fn threads() -> usize {
        1
    }
}

/// A block of a guest's memory.
struct Block(Box<[u8; 4096]>);

impl Buffer for Block {
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

    fn lend<R>(&self, at: usize, len: usize, f: impl FnOnce(ForeignSlice<'_>) -> R) -> Option<R> {
        Some(f(self.0[at..at + len].into()))
    }

    fn lend_mut<R>(&mut self, at: usize, len: usize, f: impl FnOnce(ForeignSliceMut<'_>) -> R) -> Option<R> {
        Some(f((&mut self.0[at..at + len]).into()))
    }
}

/// A cache on RAM as if it were persistent, one volume, no workers: nothing but the path.
struct World {
    queue: <VolumeDisk<Host> as Disk>::Queue<Block>,
    volume: Arc<Volume<Host>>,
    memory: Arc<Counting>,
    spare: Vec<Block>,
    next: u64,
}

fn open_memory(dir: &Path) -> Arc<Counting> {
    let options = MediaOptions { assume_dax: true, ..MediaOptions::new(dir.join("cache")) };
    let inner = MappedPmem::open(&options).expect("the media opens");
    let [fences, bytes, bytes_read] = [0; 3].map(AtomicU64::new);
    Arc::new(Counting { inner, fences, bytes, bytes_read })
}

impl World {
    fn new(dir: &Path) -> World {
        pcache_vhost::pmem::create(&dir.join("cache"), 256 << 20).expect("room for the media");
        let memory = open_memory(dir);
        let options = FormatOptions { segment_size: Some(16 << 20), ..FormatOptions::default() };
        format(&*memory, &SystemClock::default(), &options).expect("formats");
        let (cache, _) = Cache::<Host>::open(memory.clone(), SystemClock::default()).expect("opens");
        let disk = DiskOptions { create_sparse: Some(BLOCKS * 4096), ..DiskOptions::new(dir.join("disk")) };
        let volume = cache
            .attach(AttachOptions {
                name: "cost".to_owned(),
                backing: Arc::new(BackingDisk::open(&disk).expect("the disk opens")),
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
            .expect("attaches");
        let queue = VolumeDisk(volume.clone()).open_queue(0, Waker::default()).expect("a queue");
        let spare = (0..32).map(|n| Block(Box::new([n; 4096]))).collect();
        World { queue, volume, memory, spare, next: 0 }
    }

    /// Writes blocks nobody wrote before, or reads what was written, all over the volume.
    fn run(&mut self, kind: RequestKind, batch: u64) {
        let mut done = Vec::with_capacity(32);
        for request in 0..REQUESTS {
            let number = match kind {
                RequestKind::Write => self.next,
                // Not in the order they were written.
                _ => request * 1021 % self.next,
            };
            self.next += u64::from(kind == RequestKind::Write);
            // Odd times a power of two: each block once.
            let sector = number * 40_503 % BLOCKS * 8;
            let data = self.spare.pop().expect("as many as a batch");
            self.queue.submit(Request { tag: (request % 32) as u32, kind, sector, data });
            if (request + 1) % batch == 0 {
                self.queue.commit();
                while self.queue.pending() > 0 {
                    self.queue.poll(&mut done);
                }
                for done in done.drain(..) {
                    assert_eq!(done.status, Status::Ok);
                    self.spare.push(done.data);
                }
            }
        }
    }
}

// Callgrind counts while it is in one of these, and only then, and finds them by their names. What each
// does last keeps its call from becoming a jump, which would hide its end.

#[inline(never)]
fn cost_phase_write_alone(world: &mut World) {
    world.run(RequestKind::Write, 1);
    black_box(());
}

#[inline(never)]
fn cost_phase_write_batch(world: &mut World) {
    world.run(RequestKind::Write, 32);
    black_box(());
}

#[inline(never)]
fn cost_phase_read_batch(world: &mut World) {
    world.run(RequestKind::Read, 32);
    black_box(());
}

/// A start that finds records in open segments, and seals these.
#[inline(never)]
fn cost_phase_recover(memory: Arc<Counting>) -> u64 {
    black_box(start(memory))
}

/// One that finds summaries.
#[inline(never)]
fn cost_phase_restart(memory: Arc<Counting>) -> u64 {
    // Not the same as the one above, or both would be one function.
    black_box(black_box(0) + start(memory))
}

/// Keys found.
fn start(memory: Arc<Counting>) -> u64 {
    Cache::<Host>::open(memory, SystemClock::default()).expect("opens").1.keys
}

/// Compares a figure with its line of the table.
fn compare(what: &str, found: f64) -> Result<(), String> {
    let &(_, expected, percent) =
        TABLE.iter().find(|line| line.0 == what).unwrap_or_else(|| panic!("no line says {what}"));
    println!("{what:<45} {found:>9.1}   table {expected:>9.1}");
    if found > expected * (1.0 + percent / 100.0) {
        return Err(format!("{what}: {found:.1}, and the table allows {expected:.1} and {percent} %"));
    }
    Ok(())
}

#[test]
fn a_batch_is_one_fence_and_a_block_is_stored_once() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in memory");
    let mut world = World::new(dir.path());
    // A stream is opened, and its header written, once for thousands of blocks.
    world.run(RequestKind::Write, 32);
    let mut found = Vec::new();
    for (batch, fences, bytes) in [
        (1, "fences per write, batch 1", "bytes stored per 4 KiB write, batch 1"),
        (32, "fences per batch of 32 writes", "bytes stored per 4 KiB write, batch 32"),
    ] {
        let count = |world: &World| {
            let Counting { fences, bytes, .. } = &*world.memory;
            (fences.load(Ordering::Relaxed), bytes.load(Ordering::Relaxed))
        };
        // Until a run comes that opens no segment.
        let least = (0..3).map(|_| {
            let before = count(&world);
            world.run(RequestKind::Write, batch);
            let after = count(&world);
            (after.0 - before.0, after.1 - before.1)
        });
        let least = least.min().expect("three runs");
        found.push(compare(fences, least.0 as f64 / (REQUESTS / batch) as f64));
        found.push(compare(bytes, least.1 as f64 / REQUESTS as f64));
    }
    let errors: Vec<_> = found.into_iter().filter_map(Result::err).collect();
    assert!(errors.is_empty(), "{errors:#?}");
}

#[test]
fn what_seals_a_segment_reads_its_records_once() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in memory");
    let mut world = World::new(dir.path());
    // Two segments of records with one key each, and more than half of a third.
    (0..5).for_each(|_| world.run(RequestKind::Write, 1));
    let before = world.memory.bytes_read.load(Ordering::Relaxed);
    let mut workers = Stepper::new(world.volume.cache(), &[]);
    while workers.housekeeper() == Progress::Did {}
    let read = world.memory.bytes_read.load(Ordering::Relaxed) - before;
    let per_write = read as f64 / (5 * REQUESTS) as f64;
    assert!(per_write > 100.0, "nothing was sealed: {per_write} bytes read per write");
    compare("bytes read per write to seal segments, batch 1", per_write).expect("within the table");
}

/// Instructions of a function and all it calls, by callgrind's output: the lines of its own blocks that are
/// no names end in a count, of itself or of a call it makes.
fn instructions(profile: &str, function: &str) -> u64 {
    let named = |line: &&str| line.starts_with("fn=") || line.starts_with("cfn=");
    let number = |line: &str| line.split(['(', ')']).nth(1).map(str::to_owned);
    let first = profile.lines().filter(named).find(|line| line.contains(function));
    let wanted = first.and_then(number).unwrap_or_else(|| panic!("callgrind has not seen {function}"));
    let (mut sum, mut is_within) = (0, false);
    for line in profile.lines() {
        if line.starts_with("fn=") {
            is_within = number(line).as_ref() == Some(&wanted);
        } else if is_within && !line.contains(['=', ':']) {
            let count = line.rsplit(' ').next().and_then(|count| count.parse::<u64>().ok());
            sum += count.unwrap_or(0);
        }
    }
    sum
}

#[test]
fn no_request_takes_more_instructions_than_the_table_says() {
    if Command::new("valgrind").arg("--version").output().is_err() {
        assert!(std::env::var_os("PCACHE_REQUIRE_VALGRIND").is_none(), "valgrind is missing");
        println!("SKIPPED: valgrind is missing (apt-get install valgrind), instructions are not counted");
        return;
    }
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in memory");
    let profile = dir.path().join("profile");
    let run = Command::new("valgrind")
        .args(["--tool=callgrind", "--toggle-collect=*cost_phase_*"])
        .arg(format!("--callgrind-out-file={}", profile.display()))
        .arg(std::env::current_exe().expect("its own name"))
        .args(["--ignored", "--exact", "the_phases_under_callgrind", "--test-threads=1"])
        .output()
        .expect("valgrind runs");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let profile = std::fs::read_to_string(profile).expect("what callgrind wrote");
    let written = 2 * REQUESTS;
    let errors: Vec<_> = [
        ("cost_phase_write_alone", "instructions per 4 KiB write, batch 1", REQUESTS),
        ("cost_phase_write_batch", "instructions per 4 KiB write, batch 32", REQUESTS),
        ("cost_phase_read_batch", "instructions per 4 KiB read hit, batch 32", REQUESTS),
        ("cost_phase_recover", "instructions per key of a start after a crash", written),
        ("cost_phase_restart", "instructions per key of a start from summaries", written),
    ]
    .into_iter()
    .filter_map(|(phase, what, count)| {
        compare(what, instructions(&profile, phase) as f64 / count as f64).err()
    })
    .collect();
    assert!(errors.is_empty(), "{errors:#?}");
}

#[test]
#[ignore = "what the test above counts, which runs it under valgrind: cargo test --test cost"]
fn the_phases_under_callgrind() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in memory");
    let mut world = World::new(dir.path());
    cost_phase_write_alone(&mut world);
    cost_phase_write_batch(&mut world);
    cost_phase_read_batch(&mut world);
    drop(world);
    assert_eq!(cost_phase_recover(open_memory(dir.path())), 2 * REQUESTS);
    assert_eq!(cost_phase_restart(open_memory(dir.path())), 2 * REQUESTS);
}
