//! What was evicted lately: a block that is missed again so soon has proved its worth.
//!
//! A table of tags without keys: four of 16 bits in a word, each a hash of volume and block and the era
//! in which it was noted. An era ends when as much as a quarter of the cache has been noted; a note
//! counts for [`ERAS`] of them, so what was evicted last is remembered up to twice the cache's size.
//!
//! - It is advice: a note may be overwritten by another (the oldest of its word goes first), and one
//!   block in some 250 is taken for one that was evicted.
//! - Memory is bounded by [`SLOTS_MAX`]: in a cache of more than 32 GiB a note is of several blocks
//!   side by side.
//! - Whoever notes and whoever asks need no lock: a lost update is a lost note.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::units::SectorRange;

/// Notes at most: 32 MiB.
const SLOTS_MAX: u64 = 1 << 24;
/// Eras for which a note counts.
const ERAS: u32 = 8;
/// Bits of a note that say when; the others say what.
const ERA_BITS: u32 = 5;
const ERA_MASK: u16 = (1 << ERA_BITS) - 1;

/// See the module's head.
pub(crate) struct Evicted {
    words: Box<[AtomicU64]>,
    /// Sectors of what one note stands for, as a power of two.
    shift: u32,
    /// Notes in an era.
    era_len: u32,
    era: AtomicU32,
    noted: AtomicU32,
}

impl Evicted {
    /// For a cache that holds so many sectors.
    pub fn new(cache_sectors: u64) -> Evicted {
        let mut shift = 3;
        while 2 * (cache_sectors >> shift) > SLOTS_MAX {
            shift += 1;
        }
        let blocks = (cache_sectors >> shift).max(4);
        let words = (2 * blocks / 4).next_power_of_two().min(SLOTS_MAX / 4);
        Evicted {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            shift,
            era_len: (blocks / 4) as u32,
            era: AtomicU32::new(0),
            noted: AtomicU32::new(0),
        }
    }

    /// The word of a block, and what stands there for it, without its era.
    fn place(&self, volume: u64, block: u64) -> (&AtomicU64, u16) {
        let mixed = (block ^ volume.rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ (mixed >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let word = mixed >> 32 & (self.words.len() as u64 - 1);
        // Never 0, which is no note.
        let tag = (mixed as u16 >> ERA_BITS).max(1) << ERA_BITS;
        (&self.words[word as usize], tag)
    }

    fn blocks(&self, range: SectorRange) -> std::ops::RangeInclusive<u64> {
        range.start >> self.shift..=(range.end() - 1) >> self.shift
    }

    fn age(&self, note: u16) -> u32 {
        self.era.load(Ordering::Relaxed).wrapping_sub(u32::from(note & ERA_MASK)) & u32::from(ERA_MASK)
    }

    /// Notes that a range has gone.
    pub fn note(&self, volume: u64, range: SectorRange) {
        for block in self.blocks(range) {
            let (word, tag) = self.place(volume, block);
            let mut notes = split(word.load(Ordering::Relaxed));
            let rank = |note: u16| match note {
                0 => 0,
                _ if note & !ERA_MASK == tag => 1,
                _ => 2 + ERA_MASK - self.age(note) as u16,
            };
            let same = notes.iter().position(|&note| note & !ERA_MASK == tag);
            let at = same.or_else(|| (0..4).min_by_key(|&i| rank(notes[i]))).unwrap_or(0);
            notes[at] = tag | self.era.load(Ordering::Relaxed) as u16 & ERA_MASK;
            word.store(join(notes), Ordering::Relaxed);
            if self.noted.fetch_add(1, Ordering::Relaxed) + 1 >= self.era_len {
                self.noted.store(0, Ordering::Relaxed);
                self.era.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Whether most of a range was noted, and not long ago.
    pub fn knows(&self, volume: u64, range: SectorRange) -> bool {
        let (mut known, mut all) = (0, 0);
        for block in self.blocks(range) {
            let (word, tag) = self.place(volume, block);
            let is_it = |&note: &u16| note & !ERA_MASK == tag && self.age(note) < ERAS;
            known += u64::from(split(word.load(Ordering::Relaxed)).iter().any(is_it));
            all += 1;
        }
        2 * known > all
    }
}

fn split(word: u64) -> [u16; 4] {
    [0, 16, 32, 48].map(|shift| (word >> shift) as u16)
}

fn join(notes: [u16; 4]) -> u64 {
    notes.iter().rev().fold(0, |word, &note| word << 16 | u64::from(note))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(n: u64) -> SectorRange {
        SectorRange::new(n * 8, 8)
    }

    #[test]
    fn what_went_lately_is_known_and_what_never_did_is_not() {
        let blocks = 10_000;
        let evicted = Evicted::new(blocks * 8);
        (0..blocks).for_each(|b| evicted.note(1, block(b)));
        let count = |volume, from: u64| {
            (from..from + blocks).filter(|&b| evicted.knows(volume, block(b))).count() as u64
        };
        assert!(count(1, 0) > blocks * 97 / 100, "{}", count(1, 0));
        assert!(count(1, blocks) < blocks / 100, "{}", count(1, blocks));
        assert!(count(2, 0) < blocks / 100, "another volume's: {}", count(2, 0));
    }

    #[test]
    fn what_went_twice_the_caches_size_ago_is_forgotten() {
        let blocks = 4096;
        let evicted = Evicted::new(blocks * 8);
        evicted.note(1, block(1 << 40));
        (0..blocks).for_each(|b| evicted.note(1, block(b)));
        assert!(evicted.knows(1, block(1 << 40)));
        (blocks..3 * blocks).for_each(|b| evicted.note(1, block(b)));
        assert!(!evicted.knows(1, block(1 << 40)));
        let last = (2 * blocks..3 * blocks).filter(|&b| evicted.knows(1, block(b))).count() as u64;
        assert!(last > blocks * 9 / 10, "{last}");
    }

    #[test]
    fn of_a_long_range_most_must_have_gone() {
        let evicted = Evicted::new(1 << 16);
        evicted.note(1, SectorRange::new(0, 64));
        assert!(evicted.knows(1, SectorRange::new(0, 120)));
        assert!(!evicted.knows(1, SectorRange::new(0, 128)));
    }

    #[test]
    fn memory_is_bounded_however_large_the_cache() {
        let evicted = Evicted::new(1 << 34);
        assert_eq!(evicted.words.len() as u64 * 4, SLOTS_MAX);
        evicted.note(1, SectorRange::new(1 << 33, 8));
        assert!(evicted.knows(1, SectorRange::new((1 << 33) + 16, 8)));
    }
}
