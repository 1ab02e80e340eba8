//! The cache's segments: an array that grows and shrinks while everybody looks at it.
//!
//! Queues, write-back and reclaim index it without a lock, so nothing in it ever moves or goes away: it
//! grows by pieces, each as large as all before it, and shrinks by what counts. What was there from the
//! start, nearly always all, lies in the first piece and is found as in an array.
//!
//! Invariants:
//! - An element once made is at one address for as long as the table is.
//! - One thread changes it at a time: whoever recovers, then the housekeeper.
//! - `len` is how many segments are used for something new; behind it may be some that are being
//!   emptied, and some that are retired. Who looks for what there is goes through all of them.

use std::ops::Index;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::segments::{Segment, State};

/// Pieces beyond the first: four doubled thirty times are more than a `u32` can number.
const PIECES: usize = 31;

/// See the module's head.
pub(crate) struct SegmentTable {
    first: Box<[Segment]>,
    more: [OnceLock<Box<[Segment]>>; PIECES],
    made: AtomicUsize,
    len: AtomicUsize,
}

impl SegmentTable {
    /// So many segments, of which nothing is known; at least one.
    pub fn new(len: usize) -> Self {
        assert!(len > 0, "a cache has segments");
        Self {
            first: (0..len).map(|_| Segment::default()).collect(),
            more: [const { OnceLock::new() }; PIECES],
            made: AtomicUsize::new(len),
            len: AtomicUsize::new(len),
        }
    }

    /// Segments in use, or to be used.
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// All segments, also those that are being emptied or retired.
    pub fn made(&self) -> usize {
        self.made.load(Ordering::Acquire)
    }

    /// Makes at least so many; those that are new are retired.
    pub fn make(&self, len: usize) {
        let mut room = self.first.len();
        for piece in &self.more {
            if room >= len {
                break;
            }
            let make = || {
                let segment = Segment::default();
                segment.set_state(State::Retired);
                segment
            };
            room += piece.get_or_init(|| (0..room).map(|_| make()).collect()).len();
        }
        assert!(room >= len, "doubling pieces suffice");
        self.made.fetch_max(len, Ordering::Release);
    }

    /// Says how many are used for something new.
    pub fn set_len(&self, len: usize) {
        assert!(len <= self.made(), "{len} of {}", self.made());
        self.len.store(len, Ordering::Release);
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Segment> + Clone {
        let more = self.more.iter().map_while(OnceLock::get).flat_map(|piece| piece.iter());
        self.first.iter().chain(more).take(self.made())
    }

    #[cold]
    fn later(&self, at: usize) -> &Segment {
        // Piece n begins at the first one's length times 2 to the n.
        let (first, made) = (self.first.len(), self.made());
        assert!(at < made, "segment {at} of {made}");
        let piece = (at / first).ilog2() as usize;
        let made = self.more[piece].get().expect("a piece is there before its segments are counted");
        &made[at - (first << piece)]
    }
}

impl Index<usize> for SegmentTable {
    type Output = Segment;

    #[inline]
    fn index(&self, at: usize) -> &Segment {
        match self.first.get(at) {
            Some(segment) => segment,
            None => self.later(at),
        }
    }
}

impl<'a> IntoIterator for &'a SegmentTable {
    type Item = &'a Segment;
    type IntoIter = Box<dyn Iterator<Item = &'a Segment> + 'a>;

    fn into_iter(self) -> Self::IntoIter {
        Box::new(self.iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_stays_where_it_is_however_the_table_grows_and_shrinks() {
        for first in [1, 4, 7] {
            let table = SegmentTable::new(first);
            let mut seen: Vec<*const Segment> = Vec::new();
            for len in [first, first + 1, 2 * first, 2 * first + 1, 40, 40, 1000] {
                table.make(len);
                assert!(table.made() >= len && table.iter().count() == table.made());
                for (at, segment) in table.iter().enumerate() {
                    assert!(std::ptr::eq(segment, &table[at]), "{at} of {len}, {first} at first");
                }
                for (at, &earlier) in seen.iter().enumerate() {
                    assert!(std::ptr::eq(earlier, &table[at]), "{at} has moved");
                }
                seen = table.iter().map(std::ptr::from_ref).collect();
            }
            assert_eq!((table.len(), table[999].state()), (first, State::Retired));
            table.set_len(1000);
            table.set_len(first);
            assert_eq!((table.len(), table.made()), (first, 1000));
        }
    }

    #[test]
    #[should_panic(expected = "segment 5 of 5")]
    fn past_the_end_there_is_nothing() {
        let table = SegmentTable::new(4);
        table.make(5);
        _ = table[5].state();
    }
}
