//! A list that only grows, read without a lock: what a volume has per queue and per stream.
//!
//! A volume is detached and attached again, with more queues than before, while the cache's workers
//! go on looking at what it has. So nothing in the list ever moves or goes away: it grows by whole
//! pieces, each at least as large as all before it, so that a few pieces are enough for any length.
//!
//! Invariants:
//! - An element below the length is there, at one address, for as long as the list is.
//! - One thread grows it at a time (whoever has set `VolumeCore::attached`); anybody may read.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Pieces that double reach 2^16 elements, more than a `u16` can number.
const PIECES: usize = 17;

/// See the module's head.
pub(crate) struct Grown<T> {
    len: AtomicUsize,
    pieces: [OnceLock<Box<[T]>>; PIECES],
}

impl<T> Default for Grown<T> {
    fn default() -> Self {
        Self { len: AtomicUsize::new(0), pieces: [const { OnceLock::new() }; PIECES] }
    }
}

impl<T> Grown<T> {
    /// Makes the list at least `len` long.
    pub fn grow_to(&self, len: usize, mut make: impl FnMut() -> T) {
        let mut room: usize = self.pieces.iter().filter_map(OnceLock::get).map(|piece| piece.len()).sum();
        if room < len {
            let more = (len - room).max(room);
            let empty = self.pieces.iter().find(|piece| piece.get().is_none());
            let piece = (0..more).map(|_| make()).collect();
            let is_set = empty.expect("doubling pieces suffice").set(piece).is_ok();
            assert!(is_set, "one thread grows it at a time");
            room += more;
        }
        debug_assert!(room >= len);
        self.len.fetch_max(len, Ordering::Release);
    }

    /// How long it is.
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// The element `at`. Panics past the end.
    pub fn get(&self, at: usize) -> &T {
        // Nearly always the only piece: a volume is seldom attached twice.
        if let Some(element) = self.pieces[0].get().and_then(|first| first.get(at)) {
            return element;
        }
        self.iter().nth(at).expect("an attached volume has what its queues need")
    }

    /// All of it, in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        let pieces = self.pieces.iter().map_while(OnceLock::get);
        pieces.flat_map(|piece| piece.iter()).take(self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_holds_stays_where_it_is_however_it_grows() {
        let list = Grown::default();
        assert_eq!((list.len(), list.iter().count()), (0, 0));
        let mut next = 0;
        let mut seen: Vec<*const u32> = Vec::new();
        for len in [1, 2, 3, 7, 7, 2, 64, 300, 65536] {
            list.grow_to(len, || {
                next += 1;
                next - 1
            });
            assert!(list.len() >= len);
            assert!(list.iter().copied().eq(0..list.len() as u32), "in order, after {len}");
            for (at, &earlier) in seen.iter().enumerate() {
                assert!(std::ptr::eq(earlier, list.get(at)), "{at} has moved");
            }
            seen = list.iter().map(std::ptr::from_ref).collect();
        }
        assert_eq!(list.len(), 65536);
        assert_eq!(*list.get(65535), 65535);
    }

    #[test]
    fn room_made_ahead_does_not_count_before_it_is_asked_for() {
        let list = Grown::default();
        list.grow_to(4, || ());
        list.grow_to(5, || ());
        assert_eq!((list.len(), list.iter().count()), (5, 5));
    }
}
