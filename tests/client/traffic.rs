//! Random traffic that is checked against the model as it runs.
//!
//! Some operations, half by default, fall into a small window that wanders over the disk, so that
//! they overlap, hit and supersede each other; the rest fall anywhere, so that everything is evicted
//! in its turn.

use std::collections::HashMap;
use std::fs::File;
use std::ops;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::front::Client;
use super::model::{Model, Reading, Writing};
use super::request::{Completion, Kind, Layout, OK, Range, Request, UNMAP};
use super::rng::Rng;

/// Largest request in sectors: 256 KiB.
const SECTORS_MAX: u64 = 512;
/// Operations after which the window moves.
const WINDOW_LIFE: u64 = 500;

/// What the traffic is made of.
#[derive(Clone, Debug)]
pub struct Mix {
    /// Percent of operations; the rest are reads.
    pub writes: u64,
    pub discards: u64,
    pub zeroes: u64,
    pub flushes: u64,
    /// Most ranges in a discard or write-zeroes request.
    pub ranges_max: u64,
    /// Most requests in flight per queue.
    pub depth_max: u64,
    /// Most data descriptors per request.
    pub segments_max: u64,
    /// Percent of operations that fall into the window.
    pub near: u64,
    /// Sectors of the window in which operations overlap.
    pub window: u64,
}

impl Mix {
    /// A guest that flushes after every few writes, as databases and journals do.
    pub fn flushing() -> Self {
        Self { flushes: 25, writes: 50, ..Self::default() }
    }

    /// Nearly everything on top of each other: many writes in flight to one sector.
    pub fn overlapping() -> Self {
        Self { near: 95, window: 1024, writes: 60, ..Self::default() }
    }
}

impl Default for Mix {
    fn default() -> Self {
        Self {
            writes: 46,
            discards: 4,
            zeroes: 4,
            flushes: 3,
            ranges_max: 4,
            depth_max: 32,
            segments_max: 10,
            near: 50,
            window: 4096,
        }
    }
}

/// How many of what completed.
#[derive(Clone, Copy, Default, Debug)]
pub struct Tally {
    pub reads: u64,
    /// Writes, and ranges made to read as zeros.
    pub changes: u64,
    pub flushes: u64,
    pub sectors: u64,
}

enum Pending {
    Read(Reading),
    Write(Vec<Writing>),
    Flush,
}

/// Traffic over all queues of a client.
pub struct Traffic {
    pub client: Client,
    pub model: Model,
    pub rng: Rng,
    pub tally: Tally,
    /// The backing file, to say in a failure what it holds.
    pub backing: Option<PathBuf>,
    /// What to submit from now on.
    pub mix: Mix,
    /// The longest time between two completions since it was last set to zero.
    pub gap: Duration,
    completed: Instant,
    depth: u64,
    window: u64,
    pending: HashMap<u64, Pending>,
    next_tag: u64,
}

impl Traffic {
    /// Traffic over a disk of zeros, the same for the same seed but for the order of completions.
    pub fn new(client: Client, seed: u64, mix: Mix) -> Self {
        eprintln!("PCACHE_SEED={seed}");
        let model = Model::new(client.capacity(), seed);
        let rng = Rng::new(seed);
        let tally = Tally::default();
        Self {
            client,
            model,
            rng,
            tally,
            backing: None,
            mix,
            gap: Duration::ZERO,
            completed: Instant::now(),
            depth: 1,
            window: 0,
            pending: HashMap::new(),
            next_tag: 0,
        }
    }

    /// Submits `operations` more, leaving the last ones in flight.
    pub fn run(&mut self, operations: u64) {
        for _ in 0..operations {
            if self.next_tag.is_multiple_of(WINDOW_LIFE) {
                self.window = self.rng.below(self.model.sectors() - self.mix.window);
                self.depth = self.rng.between(1, self.mix.depth_max);
            }
            let queue = self.rng.below(self.client.queues.len() as u64) as usize;
            while self.client.queues[queue].outstanding() as u64 >= self.depth {
                self.publish();
                self.complete_some();
            }
            self.submit_one(queue);
            // Batches of every size: a driver publishes one request, or many at once.
            if self.rng.chance(40) {
                self.publish();
            }
        }
        self.publish();
    }

    fn publish(&mut self) {
        self.client.queues.iter_mut().for_each(|queue| queue.publish());
    }

    /// Waits until nothing is in flight.
    pub fn quiesce(&mut self) {
        self.publish();
        while self.client.outstanding() > 0 {
            self.complete_some();
        }
        assert!(self.pending.is_empty(), "every request was completed");
    }

    fn submit_one(&mut self, queue: usize) {
        let tag = self.next_tag;
        self.next_tag += 1;
        let (request, pending) = self.draw();
        let segments = self.rng.between(1, self.mix.segments_max) as usize;
        let indirect = self.client.options.indirect && self.rng.chance(50);
        let layout = Layout::random(&request, &mut self.rng, segments, indirect);
        while !self.client.submit(queue, tag, &request, &layout) {
            self.publish();
            self.complete_some();
        }
        self.pending.insert(tag, pending);
    }

    fn draw(&mut self) -> (Request, Pending) {
        let mut roll = self.rng.below(100);
        for (kind, percent) in [
            (Kind::Out, self.mix.writes),
            (Kind::Discard, self.mix.discards),
            (Kind::WriteZeroes, self.mix.zeroes),
            (Kind::Flush, self.mix.flushes),
        ] {
            if roll < percent {
                return self.draw_change(kind);
            }
            roll -= percent;
        }
        let (sector, sectors) = self.range();
        let reading = self.model.begin_read(sector, sectors);
        (Request::read(sector, sectors as usize * 512), Pending::Read(reading))
    }

    fn draw_change(&mut self, kind: Kind) -> (Request, Pending) {
        match kind {
            Kind::Flush => (Request::flush(), Pending::Flush),
            Kind::Out => {
                let (sector, sectors) = self.range();
                let (writing, bytes) = self.model.begin_write(sector, sectors);
                (Request::write(sector, bytes), Pending::Write(vec![writing]))
            }
            _ => {
                let unmap = if kind == Kind::WriteZeroes && self.rng.chance(50) { UNMAP } else { 0 };
                let (mut ranges, mut writings) = (Vec::new(), Vec::new());
                for _ in 0..self.rng.between(1, self.mix.ranges_max) {
                    let (sector, sectors) = self.range();
                    ranges.push(Range { sector, sectors: sectors as u32, flags: unmap });
                    writings.push(self.model.begin_zeroes(sector, sectors));
                }
                (Request::ranges(kind, &ranges), Pending::Write(writings))
            }
        }
    }

    /// A place and a size: small ones are frequent, all up to 256 KiB occur.
    fn range(&mut self) -> (u64, u64) {
        let class = self.rng.between(0, 9).min(self.rng.between(0, 9));
        let top = (1u64 << class).min(SECTORS_MAX);
        let mut sectors = self.rng.between(top / 2 + 1, top);
        let aligned = self.rng.chance(60);
        if aligned && sectors >= 8 {
            sectors &= !7;
        }
        let near = self.rng.chance(self.mix.near);
        let (from, len) = if near { (self.window, self.mix.window) } else { (0, self.model.sectors()) };
        let mut sector = from + self.rng.below(len - sectors + 1);
        if aligned {
            sector &= !7;
        }
        (sector, sectors)
    }

    /// Submits one write without waiting for anything.
    pub fn write_at(&mut self, queue: usize, sector: u64, sectors: u64) {
        let (writing, bytes) = self.model.begin_write(sector, sectors);
        self.submit_now(queue, &Request::write(sector, bytes), Pending::Write(vec![writing]));
    }

    /// Submits one read without waiting for anything.
    pub fn read_at(&mut self, queue: usize, sector: u64, sectors: u64) {
        let reading = self.model.begin_read(sector, sectors);
        self.submit_now(queue, &Request::read(sector, sectors as usize * 512), Pending::Read(reading));
    }

    /// Submits one FLUSH without waiting for anything.
    pub fn flush_now(&mut self, queue: usize) {
        self.submit_now(queue, &Request::flush(), Pending::Flush);
    }

    fn submit_now(&mut self, queue: usize, request: &Request, pending: Pending) {
        let tag = self.next_tag;
        self.next_tag += 1;
        assert!(self.client.submit(queue, tag, request, &Layout::plain(request)), "the ring has room");
        self.pending.insert(tag, pending);
        self.publish();
    }

    /// Judges what has completed, without waiting; returns how many requests are still out.
    pub fn poll(&mut self) -> usize {
        let mut done = Vec::new();
        self.client.collect(&mut done);
        self.judge(done);
        self.client.outstanding()
    }

    /// Waits until something in flight has completed.
    pub fn wait_for_some(&mut self) {
        self.publish();
        self.complete_some();
    }

    fn complete_some(&mut self) {
        let mut done = Vec::new();
        self.client.wait(&mut done);
        self.judge(done);
    }

    /// Begins to look for the longest gap now.
    pub fn watch_gaps(&mut self) {
        (self.gap, self.completed) = (Duration::ZERO, Instant::now());
    }

    fn judge(&mut self, done: Vec<(usize, Completion)>) {
        if !done.is_empty() {
            let now = Instant::now();
            self.gap = self.gap.max(now - self.completed);
            self.completed = now;
        }
        for (queue, completion) in done {
            let pending = self.pending.remove(&completion.tag).expect("a completed request was pending");
            let (status, tag) = (completion.status, completion.tag);
            match pending {
                Pending::Read(reading) => {
                    assert_eq!(status, OK, "read {tag} on queue {queue}: {reading:?}");
                    self.tally.reads += 1;
                    self.tally.sectors += reading.sectors;
                    if let Err(wrong) = self.model.end_read(reading, &completion.data) {
                        let held = self.describe_backing(wrong.sector);
                        panic!("read {tag} on queue {queue}: {wrong}{held}");
                    }
                }
                Pending::Write(writings) => {
                    for writing in writings {
                        assert_eq!(status, OK, "change {tag} on queue {queue}: {writing:?}");
                        self.tally.changes += 1;
                        self.tally.sectors += writing.sectors;
                        self.model.end_write(writing, true);
                    }
                }
                Pending::Flush => {
                    assert_eq!(status, OK, "FLUSH {tag} on queue {queue}");
                    self.tally.flushes += 1;
                }
            }
        }
    }

    /// What the backing file holds where a read went wrong: it tells a stale cache from a lost write.
    fn describe_backing(&self, sector: u64) -> String {
        let Some(path) = &self.backing else { return String::new() };
        let mut bytes = [0; 512];
        match File::open(path).and_then(|file| file.read_exact_at(&mut bytes, sector * 512)) {
            Ok(()) => format!("; the backing file: {}", self.model.describe(sector, &bytes)),
            Err(error) => format!("; the backing file: {error}"),
        }
    }

    /// Reads sectors in large pieces, several in flight, and compares them all with the model.
    pub fn verify(&mut self, sectors: ops::Range<u64>) {
        let mut at = sectors.start;
        while at < sectors.end {
            let count = SECTORS_MAX.min(sectors.end - at);
            let queue = (at / SECTORS_MAX) as usize % self.client.queues.len();
            let request = Request::read(at, count as usize * 512);
            let layout = Layout::plain(&request);
            while self.client.queues[queue].outstanding() >= 8
                || !self.client.submit(queue, self.next_tag, &request, &layout)
            {
                self.publish();
                self.complete_some();
            }
            let reading = self.model.begin_read(at, count);
            self.pending.insert(self.next_tag, Pending::Read(reading));
            self.next_tag += 1;
            self.client.queues[queue].publish();
            at += count;
        }
        self.quiesce();
    }
}
