//! Sequential reads: how far the one under way has come.
//!
//! Who reads a disk from end to end (a backup, a scrub, a copy) gains little from the cache and would
//! push out what others need: from a cutoff on its misses are not cached. A read that begins where
//! another ended goes on with it; a few that take turns on one queue are told apart.

use crate::units::SectorRange;

/// Readers that are told apart on one queue.
const READERS: usize = 16;

/// The reads that go on where another ended.
///
/// All starts stand side by side, and the order of use in one word, for this is on the way of every hit.
pub(crate) struct Sequential {
    /// Where the next read of each would begin, [`NOWHERE`] before the first.
    next: [u64; READERS],
    sectors: [u64; READERS],
    /// Readers by their numbers, four bits each, who went on last in the lowest.
    order: u64,
}

/// No read begins there.
const NOWHERE: u64 = u64::MAX;

impl Default for Sequential {
    fn default() -> Self {
        Self { next: [NOWHERE; READERS], sectors: [0; READERS], order: 0xfedc_ba98_7654_3210 }
    }
}

impl Sequential {
    /// Notes a read; returns the sectors read in one go, up to its end.
    pub fn note(&mut self, range: SectorRange) -> u64 {
        // All of them, without a branch for each: which it is, if any, is found by one word.
        let found = self
            .next
            .iter()
            .enumerate()
            .fold(0, |found, (at, &next)| found | u32::from(next == range.start) << at);
        let at = if found == 0 {
            // Whoever went on last the longest ago gives way.
            let oldest = (self.order >> 60) as usize;
            self.sectors[oldest] = 0;
            self.order = self.order << 4 | oldest as u64;
            oldest
        } else {
            let at = found.trailing_zeros() as usize;
            self.bring_forward(at as u64);
            at
        };
        self.next[at] = range.end();
        self.sectors[at] += range.len;
        self.sectors[at]
    }

    /// Puts a reader in front of those that went on after it.
    fn bring_forward(&mut self, reader: u64) {
        let place = (0..READERS).find(|place| self.order >> (place * 4) & 15 == reader);
        let shift = place.map_or(0, |place| place * 4);
        // In two shifts: behind the last place there is nothing.
        let behind = self.order & (!0 << shift << 4);
        let before = self.order & !(!0 << shift);
        self.order = behind | before << 4 | reader;
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
