//! What is asked for, by whom it does not matter: a closed loop keeps `depth` requests under way.

use super::super::rng::Rng;

/// The next thing a guest does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ask {
    /// Writes `sectors` from `first`.
    Write {
        /// First sector.
        first: u64,
        /// How many.
        sectors: u64,
    },
    /// Reads.
    Read {
        /// First sector.
        first: u64,
        /// How many.
        sectors: u64,
    },
    /// Discards.
    Discard {
        /// First sector.
        first: u64,
        /// How many.
        sectors: u64,
    },
    /// Waits for everything under way, flushes, waits for that.
    Barrier,
}

/// A source of requests.
pub trait Guest {
    /// The next request and the moment before which it is not made (µs, 0 for at once); `None` at
    /// the end. `is_busy` says whether a request under way touches a range: such a one is not made.
    fn next(&mut self, is_busy: &dyn Fn(u64, u64) -> bool) -> Option<(u64, Ask)>;
}

/// Writes of one block each, uniformly over the disk, with a barrier after every so many.
#[derive(Clone, Debug)]
pub struct RandomWrites {
    rng: Rng,
    blocks: u64,
    block_sectors: u64,
    left: u64,
    barrier_every: u64,
    since: u64,
}

impl RandomWrites {
    /// `count` writes of 4 KiB over `sectors`; `barrier_every` 0 for no barrier.
    pub fn new(seed: u64, sectors: u64, count: u64, barrier_every: u64) -> RandomWrites {
        let block_sectors = 8;
        RandomWrites {
            rng: Rng::new(seed),
            blocks: sectors / block_sectors,
            block_sectors,
            left: count,
            barrier_every,
            since: 0,
        }
    }
}

impl Guest for RandomWrites {
    fn next(&mut self, is_busy: &dyn Fn(u64, u64) -> bool) -> Option<(u64, Ask)> {
        if self.barrier_every > 0 && self.since == self.barrier_every {
            self.since = 0;
            return Some((0, Ask::Barrier));
        }
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        self.since += 1;
        loop {
            let first = self.rng.below(self.blocks) * self.block_sectors;
            if !is_busy(first, self.block_sectors) {
                return Some((0, Ask::Write { first, sectors: self.block_sectors }));
            }
        }
    }
}
