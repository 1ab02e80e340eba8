//! Overlap control: which ranges are being committed, read for a fill, or written to the disk.
//!
//! A stripe is a hashed 1 MiB region. Laws:
//! - A committer holds the stripes of all its keys from the draw of its versions to the publish, so
//!   overlapping commits are published in version order. Stripes are locked in ascending order;
//!   nothing is copied, and no other lock but an index shard is taken, under them.
//! - A *placeholder* is registered before its disk read is issued and broken by any overlapping
//!   commit, discard or bypass; a broken one never becomes a fill.
//! - A *bypass* is registered before its disk write is issued and removed after that ended; no two
//!   overlapping ones exist at a time, and a placeholder born under one is born broken.

use super::index::REGION_SECTORS;
use crate::mutant::{Mutant, mutated};
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Mutex, MutexGuard, hint, thread};
use crate::units::SectorRange;

/// Names one registration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ticket(u64);

#[derive(Debug)]
struct Entry {
    id: u64,
    range: SectorRange,
    bypass: bool,
    broken: bool,
}

/// On a line of its own: who locks one does not wait for the holder of the next.
#[derive(Default)]
#[repr(align(64))]
struct Stripe {
    locked: AtomicBool,
    /// Length of `entries`, so that committers usually need no second lock.
    registered: AtomicUsize,
    entries: Mutex<Vec<Entry>>,
}

/// The stripes of one volume.
pub(crate) struct Stripes {
    stripes: Box<[Stripe]>,
    next: AtomicU64,
}

/// Most stripes: two batches of 32 random writes from two queues meet in less than two of them on
/// average, and the window is the header's store and the fence.
const STRIPES_MAX: u64 = 1024;

/// The stripes a batch holds. Dropping it unlocks them; the list is reused.
pub(crate) struct Held<'a> {
    all: &'a Stripes,
    held: &'a mut Vec<u16>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        for &s in self.held.iter().rev() {
            self.all.stripes[s as usize].locked.store(false, Ordering::Release);
        }
        self.held.clear();
    }
}

impl Stripes {
    /// Stripes for a volume of so many sectors: one per region, up to a number that is enough.
    pub fn new(sectors: u64) -> Self {
        let count = sectors.div_ceil(REGION_SECTORS).clamp(1, STRIPES_MAX);
        Self { stripes: (0..count).map(|_| Stripe::default()).collect(), next: AtomicU64::new(1) }
    }

    fn of(&self, range: SectorRange) -> impl Iterator<Item = u16> + use<> {
        let first = range.start / REGION_SECTORS;
        let last = (range.end() - 1) / REGION_SECTORS;
        let stripes = self.stripes.len() as u64;
        let count = (last - first + 1).min(stripes);
        (0..count).map(move |i| ((first + i) % stripes) as u16)
    }

    /// Locks the stripes of all `ranges`. `scratch` must be empty and is emptied again.
    pub fn hold<'a>(
        &'a self,
        ranges: impl Iterator<Item = SectorRange>,
        scratch: &'a mut Vec<u16>,
    ) -> Held<'a> {
        debug_assert!(scratch.is_empty());
        // Each once and in ascending order, as the bits of a set come out of it.
        let mut set = [0u64; STRIPES_MAX as usize / 64];
        for s in ranges.flat_map(|range| self.of(range)) {
            set[usize::from(s) / 64] |= 1 << (s % 64);
        }
        for (word, mut bits) in (0u16..).zip(set) {
            while bits != 0 {
                let s = word * 64 + bits.trailing_zeros() as u16;
                bits &= bits - 1;
                self.stripes[usize::from(s)].lock();
                scratch.push(s);
            }
        }
        Held { all: self, held: scratch }
    }

    /// Breaks every placeholder that overlaps `range`; the caller holds its stripes.
    pub fn break_placeholders(&self, range: SectorRange) {
        for s in self.of(range) {
            let stripe = &self.stripes[s as usize];
            if stripe.registered.load(Ordering::Relaxed) == 0 {
                continue;
            }
            for entry in lock(&stripe.entries).iter_mut() {
                if entry.range.overlaps(&range) {
                    entry.broken = true;
                }
            }
        }
    }

    /// Registers a read that may become a fill. The range lies in one region.
    pub fn place(&self, range: SectorRange) -> Ticket {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.on_each(range, |stripe, entries| {
            let born_broken = !mutated(Mutant::PlaceholderBornWhole);
            let broken = born_broken && entries.iter().any(|e| e.bypass && e.range.overlaps(&range));
            entries.push(Entry { id, range, bypass: false, broken });
            stripe.registered.store(entries.len(), Ordering::Relaxed);
        });
        Ticket(id)
    }

    /// Registers a write around the cache, breaking what overlaps; `None` while another overlaps.
    /// The caller holds no stripe.
    pub fn bypass(&self, range: SectorRange, scratch: &mut Vec<u16>) -> Option<Ticket> {
        let held = self.hold(std::iter::once(range), scratch);
        let busy = self.of(range).any(|s| {
            let entries = lock(&self.stripes[s as usize].entries);
            entries.iter().any(|e| e.bypass && e.range.overlaps(&range))
        });
        if busy && !mutated(Mutant::BypassesOverlap) {
            return None;
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        for s in self.of(range) {
            let stripe = &self.stripes[s as usize];
            let mut entries = lock(&stripe.entries);
            for entry in entries.iter_mut().filter(|e| e.range.overlaps(&range)) {
                entry.broken = !mutated(Mutant::PlaceholderSurvivesBypass);
            }
            entries.push(Entry { id, range, bypass: true, broken: false });
            stripe.registered.store(entries.len(), Ordering::Relaxed);
        }
        drop(held);
        Some(Ticket(id))
    }

    /// Whether a write around the cache that overlaps is registered; the caller holds the stripes.
    pub fn is_bypassed(&self, range: SectorRange) -> bool {
        self.of(range).any(|s| {
            let stripe = &self.stripes[s as usize];
            stripe.registered.load(Ordering::Relaxed) > 0
                && lock(&stripe.entries).iter().any(|e| e.bypass && e.range.overlaps(&range))
        })
    }

    /// Whether any write around the cache is registered. For who has seen to it that none begins.
    pub fn has_bypasses(&self) -> bool {
        let has_one = |stripe: &Stripe| lock(&stripe.entries).iter().any(|entry| entry.bypass);
        self.stripes.iter().any(has_one)
    }

    /// Whether the registration stands unbroken; the caller holds its stripes.
    pub fn is_whole(&self, ticket: Ticket, range: SectorRange) -> bool {
        self.of(range)
            .all(|s| lock(&self.stripes[s as usize].entries).iter().any(|e| e.id == ticket.0 && !e.broken))
    }

    /// Ends a registration.
    pub fn remove(&self, ticket: Ticket, range: SectorRange) {
        self.on_each(range, |stripe, entries| {
            entries.retain(|e| e.id != ticket.0);
            stripe.registered.store(entries.len(), Ordering::Relaxed);
        });
    }

    /// Runs `f` on the entries of each stripe of `range`, with that stripe held: registration and
    /// commit of overlapping ranges never interleave.
    fn on_each(&self, range: SectorRange, mut f: impl FnMut(&Stripe, &mut Vec<Entry>)) {
        for s in self.of(range) {
            let stripe = &self.stripes[s as usize];
            stripe.lock();
            f(stripe, &mut lock(&stripe.entries));
            stripe.locked.store(false, Ordering::Release);
        }
    }
}

impl Stripe {
    fn lock(&self) {
        let mut spins = 0u32;
        while self.locked.swap(true, Ordering::Acquire) {
            while self.locked.load(Ordering::Relaxed) {
                spins += 1;
                // The holder is a header's store and a fence away, unless it was preempted.
                if spins < 200 { hint::spin_loop() } else { thread::yield_now() }
            }
        }
    }
}

/// Locks a mutex whose holders cannot leave it half-changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(start: u64, len: u64) -> SectorRange {
        SectorRange::new(start, len)
    }

    #[test]
    fn a_commit_breaks_only_placeholders_it_overlaps() {
        let stripes = Stripes::new(u64::MAX);
        let (a, b) = (stripes.place(r(0, 8)), stripes.place(r(8, 8)));
        let mut scratch = Vec::new();
        let held = stripes.hold([r(4, 4)].into_iter(), &mut scratch);
        stripes.break_placeholders(r(4, 4));
        assert!(!stripes.is_whole(a, r(0, 8)));
        assert!(stripes.is_whole(b, r(8, 8)));
        drop(held);
        stripes.remove(a, r(0, 8));
        assert!(!stripes.is_whole(a, r(0, 8)), "a removed registration is not whole");
    }

    #[test]
    fn overlapping_bypasses_exclude_each_other_and_spoil_fills_born_under_them() {
        let stripes = Stripes::new(u64::MAX);
        let mut scratch = Vec::new();
        let early = stripes.place(r(100, 8));
        let bypass = stripes.bypass(r(96, 16), &mut scratch).expect("nothing else is there");
        assert!(!stripes.is_whole(early, r(100, 8)));
        assert!(stripes.is_whole(bypass, r(96, 16)));
        assert!(stripes.bypass(r(111, 1), &mut scratch).is_none());
        assert!(stripes.is_bypassed(r(111, 9)) && !stripes.is_bypassed(r(112, 9)));
        let late = stripes.place(r(104, 8));
        assert!(!stripes.is_whole(late, r(104, 8)));
        stripes.remove(bypass, r(96, 16));
        assert!(!stripes.is_bypassed(r(100, 8)), "a placeholder is no bypass");
        assert!(stripes.bypass(r(111, 1), &mut scratch).is_some());
    }

    #[test]
    fn a_range_of_any_length_locks_each_stripe_once() {
        let stripes = Stripes::new(u64::MAX);
        let mut scratch = Vec::new();
        drop(stripes.hold([r(0, 1 << 40), r(5, 9)].into_iter(), &mut scratch));
        let again = stripes.hold([r(0, 1 << 40)].into_iter(), &mut scratch);
        assert_eq!(again.held.len() as u64, STRIPES_MAX);
    }
}
