//! Sequential reads: how far the one under way has come.
//!
//! Who reads a disk from end to end (a backup, a scrub, a copy) gains little from the cache and would
//! push out what others need: from a cutoff on its misses are not cached. A read that begins where
//! another ended goes on with it; a few that take turns on one queue are told apart.

use crate::units::SectorRange;

/// Readers that are told apart on one queue.
const READERS: usize = 16;

#[derive(Clone, Copy, Default)]
struct Run {
    /// Where the next read would begin.
    next: u64,
    sectors: u64,
    /// When it last went on.
    turn: u64,
}

/// The reads that go on where another ended.
#[derive(Default)]
pub(crate) struct Sequential {
    runs: [Run; READERS],
    turn: u64,
}

impl Sequential {
    /// Notes a read; returns the sectors read in one go, up to its end.
    pub fn note(&mut self, range: SectorRange) -> u64 {
        self.turn += 1;
        let going_on = self.runs.iter().position(|run| run.sectors > 0 && run.next == range.start);
        let oldest = || (0..READERS).min_by_key(|&i| self.runs[i].turn).unwrap_or(0);
        let run = match going_on {
            Some(at) => &mut self.runs[at],
            None => {
                let at = oldest();
                self.runs[at] = Run::default();
                &mut self.runs[at]
            }
        };
        *run = Run { next: range.end(), sectors: run.sectors + range.len, turn: self.turn };
        run.sectors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_that_go_on_add_up_beside_others_and_random_ones_do_not() {
        let mut sequential = Sequential::default();
        for i in 0..100 {
            assert_eq!(sequential.note(SectorRange::new(i * 8, 8)), (i + 1) * 8);
            assert_eq!(sequential.note(SectorRange::new((1 << 30) + i * 64, 64)), (i + 1) * 64);
            for j in 0..READERS as u64 - 2 {
                assert_eq!(sequential.note(SectorRange::new((7919 * (i * 50 + j) + 5) * 16, 8)), 8);
            }
        }
        // Whoever waits longer than so many others are remembered begins anew.
        (0..READERS as u64).for_each(|j| _ = sequential.note(SectorRange::new(1 << 40 | j << 20, 8)));
        assert_eq!(sequential.note(SectorRange::new(800, 8)), 8);
    }
}
