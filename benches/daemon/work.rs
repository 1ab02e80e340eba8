//! What is asked of the servers: lists of requests, the same for each, made before the clock starts.

use crate::client::Rng;
use crate::driver::{Do, Step};

/// Sectors of a block.
const BLOCK: u64 = 8;
/// Exponent of the skewed workload, and the share of its reads in percent.
const ZIPF: f64 = 1.1;
const ZIPF_READS: u64 = 70;

/// Parts of the disk, in blocks of 4 KiB. The last part is written by nobody: it misses.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// What all of the cache is smaller than.
    pub wide: u64,
    /// What is cached beforehand.
    pub hot: u64,
    /// Behind the wide part.
    pub cold: u64,
}

impl Layout {
    /// For a cache of so many bytes.
    pub fn of(cache: u64) -> Self {
        Self { wide: cache * 2 / 4096, hot: cache / 4 / 4096, cold: cache / 2 / 4096 }
    }

    pub fn disk_bytes(&self) -> u64 {
        (self.wide + self.cold) * 4096
    }
}

/// A way to use a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    Write,
    Hit,
    Miss,
    Zipf,
    SequentialWrite,
    SequentialRead,
    WriteFlush,
}

/// One line of the table for each server.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    pub name: &'static str,
    pub access: Access,
    pub depth: usize,
    pub queues: u16,
    pub requests: usize,
    /// Whether both sides notify each other rather than poll.
    pub notified: bool,
}

const fn polled(name: &'static str, access: Access, depth: usize, queues: u16, requests: usize) -> Work {
    Work { name, access, depth, queues, requests, notified: false }
}

/// With cache and disks in memory.
pub const IN_MEMORY: &[Work] = &[
    polled("write 4 KiB, depth 1", Access::Write, 1, 1, 20_000),
    polled("write 4 KiB, depth 32", Access::Write, 32, 1, 60_000),
    polled("write 4 KiB, depth 32, 2 queues", Access::Write, 32, 2, 60_000),
    polled("hit 4 KiB, depth 1", Access::Hit, 1, 1, 20_000),
    polled("hit 4 KiB, depth 32", Access::Hit, 32, 1, 60_000),
    polled("hit 4 KiB, depth 32, 2 queues", Access::Hit, 32, 2, 60_000),
    polled("miss 4 KiB, depth 1", Access::Miss, 1, 1, 5_000),
    polled("miss 4 KiB, depth 32", Access::Miss, 32, 1, 10_000),
    polled("zipf 1.1, 70 % reads, depth 32", Access::Zipf, 32, 1, 60_000),
    polled("write 1 MiB in sequence, depth 4", Access::SequentialWrite, 4, 1, 200),
    polled("read 1 MiB in sequence, depth 4", Access::SequentialRead, 4, 1, 200),
    polled("write and FLUSH in turn, depth 1", Access::WriteFlush, 1, 1, 10_000),
    Work {
        name: "write 4 KiB, depth 32, notified",
        access: Access::Write,
        depth: 32,
        queues: 1,
        requests: 60_000,
        notified: true,
    },
    Work {
        name: "hit 4 KiB, depth 32, notified",
        access: Access::Hit,
        depth: 32,
        queues: 1,
        requests: 60_000,
        notified: true,
    },
];

/// With disks that take about half a millisecond and 250 MB a second.
pub const ON_SLOW_DISK: &[Work] = &[
    polled("write 4 KiB, depth 1", Access::Write, 1, 1, 1_500),
    polled("write 4 KiB, depth 32", Access::Write, 32, 1, 6_000),
    polled("hit 4 KiB, depth 32", Access::Hit, 32, 1, 6_000),
    polled("miss 4 KiB, depth 1", Access::Miss, 1, 1, 1_000),
    polled("miss 4 KiB, depth 32", Access::Miss, 32, 1, 6_000),
    polled("zipf 1.1, 70 % reads, depth 32", Access::Zipf, 32, 1, 6_000),
    polled("write 1 MiB in sequence, depth 4", Access::SequentialWrite, 4, 1, 80),
    polled("read 1 MiB in sequence, depth 4", Access::SequentialRead, 4, 1, 80),
    polled("write and FLUSH in turn, depth 1", Access::WriteFlush, 1, 1, 600),
];

/// With a cache in memory and disks on a real file system.
pub const ON_DISK: &[Work] = &[polled("write and FLUSH in turn, depth 1", Access::WriteFlush, 1, 1, 600)];

/// Makes the lists of one run.
pub struct Steps {
    rng: Rng,
    layout: Layout,
    /// Where the next miss and the next sequential requests are.
    missed: u64,
    cursor: u64,
    /// Cumulated weights of the ranks.
    zipf: Vec<f64>,
}

impl Steps {
    pub fn new(layout: Layout) -> Self {
        let ranks = layout.wide.min(1 << 18);
        let mut sum = 0.0;
        let zipf = (1..=ranks).map(|rank| {
            sum += (rank as f64).powf(-ZIPF);
            sum
        });
        Self { rng: Rng::new(1), layout, missed: 0, cursor: 0, zipf: zipf.collect() }
    }

    /// The list for one round; the same round of all servers gets the same.
    pub fn round(&mut self, work: &Work) -> Vec<Step> {
        (0..work.requests).map(|n| self.step(work.access, n)).collect()
    }

    /// Writes all of a part of the disk once, in sequence.
    pub fn fill(blocks: std::ops::Range<u64>) -> Vec<Step> {
        blocks.step_by(64).map(|block| Step { what: Do::Write(block * BLOCK), len: 64 << 12 }).collect()
    }

    fn step(&mut self, access: Access, n: usize) -> Step {
        let Layout { wide, hot, cold } = self.layout;
        let block = |block: u64, write: bool| {
            let sector = block * BLOCK;
            Step { what: if write { Do::Write(sector) } else { Do::Read(sector) }, len: 4096 }
        };
        match access {
            Access::Write => block(self.rng.below(wide), true),
            Access::Hit => block(self.rng.below(hot), false),
            Access::Miss => {
                self.missed += 1;
                // Each block once, and then again, when it has long been evicted.
                block(wide + self.missed.wrapping_mul(0x9e37_79b9) % cold, false)
            }
            Access::Zipf => {
                let at = self.rng.below(1 << 53) as f64 / (1u64 << 53) as f64;
                let weight = at * self.zipf.last().copied().unwrap_or(0.0);
                let rank = self.zipf.partition_point(|sum| *sum < weight) as u64;
                block(rank.wrapping_mul(0x9e37_79b9_7f4a_7c15) % wide, !self.rng.chance(ZIPF_READS))
            }
            Access::SequentialWrite | Access::SequentialRead => {
                self.cursor = (self.cursor + 256) % (wide - 256);
                let sector = self.cursor * BLOCK;
                let is_write = access == Access::SequentialWrite;
                Step { what: if is_write { Do::Write(sector) } else { Do::Read(sector) }, len: 1 << 20 }
            }
            Access::WriteFlush if n % 2 == 1 => Step { what: Do::Flush, len: 0 },
            Access::WriteFlush => block(self.rng.below(wide), true),
        }
    }
}
