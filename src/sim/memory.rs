//! The fast side: memory that knows of every store whether it is durable yet.
//!
//! Two classes. On *DAX* the line is 64 bytes, and until the storing thread's fence a crash keeps
//! any subset of the aligned words stored (non-temporal stores leave in any order). On *page-cache*
//! the line is a sector of 512 bytes; the kernel writes any of them out at any moment as they then
//! are, so a crash keeps, per sector, any state since the last `sync`.
//!
//! Threads are logical: the run says on whose behalf it calls ([`World::act_as`](super::World)). A
//! fence covers its own thread's stores only. The stores of a daemon that died belong to nobody: no
//! fence ever covers them. On page-cache a `sync` does, on DAX only a `settle` of their range, or a
//! store over them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::rng::Rng;
use super::world::World;
use crate::pmem::{MediaClass, MediaError, Pmem, SyncError};

/// What of the lines that were not durable a host crash leaves.
#[derive(Clone, Debug)]
pub enum Survival {
    /// Nothing.
    Nothing,
    /// Everything.
    Everything,
    /// The lines whose bit is set, of at most 64.
    Lines(u64),
    /// Everything but one line.
    AllBut(usize),
    /// One line.
    Only(usize),
    /// Each line by chance, in any of its states.
    Random,
    /// Each word by chance; on page-cache media the same as [`Survival::Random`].
    Torn,
}

/// The owner of stores whose daemon is dead.
const NOBODY: u32 = u32::MAX;

#[derive(Clone, Debug)]
struct Store {
    thread: u32,
    /// Words of the line that it wrote and that no later durable store covers.
    words: u64,
    /// The whole line after it.
    after: Box<[u8]>,
}

/// A line with stores that are not durable.
#[derive(Clone, Debug)]
struct Pending {
    durable: Box<[u8]>,
    stores: Vec<Store>,
}

/// Bytes, and what of them is not durable.
#[derive(Clone, Debug)]
pub struct Memory {
    class: MediaClass,
    line: usize,
    /// As a processor sees them.
    bytes: Vec<u8>,
    pending: BTreeMap<u32, Pending>,
    /// What the device holds where a failed `sync` lost pages that still read back.
    lost: BTreeMap<u32, Box<[u8]>>,
    poison: Vec<Range<u64>>,
}

impl Memory {
    /// Zeroed memory of a class: `AssumeDax` or `PageCache`.
    pub fn new(class: MediaClass, len: u64) -> Memory {
        let line = if class.fence_is_durable() { 64 } else { 512 };
        Memory {
            class,
            line,
            bytes: vec![0; len as usize],
            pending: BTreeMap::new(),
            lost: BTreeMap::new(),
            poison: Vec::new(),
        }
    }

    /// Lines that are not durable.
    pub fn pending_lines(&self) -> usize {
        self.pending.len()
    }

    /// All bytes, as a processor sees them.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Changes bytes behind everybody's back: damage at rest.
    pub fn corrupt(&mut self, at: usize, change: impl FnOnce(&mut [u8])) {
        change(&mut self.bytes[at..]);
    }

    /// Makes a range unreadable and unwritable.
    pub fn poison(&mut self, range: Range<u64>) {
        self.poison.push(range);
    }

    fn judge(&self, at: u64, len: usize) -> Result<(), MediaError> {
        let end = at + len as u64;
        assert!(end <= self.bytes.len() as u64, "access past the end: {at}+{len}");
        match self.poison.iter().any(|p| p.start < end && at < p.end) {
            true => Err(MediaError { at, len }),
            false => Ok(()),
        }
    }

    fn read(&self, at: u64, dst: &mut [u8]) -> Result<(), MediaError> {
        self.judge(at, dst.len())?;
        dst.copy_from_slice(&self.bytes[at as usize..][..dst.len()]);
        Ok(())
    }

    fn write(&mut self, at: u64, src: &[u8], thread: u32) -> Result<(), MediaError> {
        self.judge(at, src.len())?;
        let (mut at, mut src) = (at as usize, src);
        while !src.is_empty() {
            let number = (at / self.line) as u32;
            let (base, within) = (at - at % self.line, at % self.line);
            let n = (self.line - within).min(src.len());
            let now = &mut self.bytes[base..base + self.line];
            let pending = self.pending.entry(number).or_insert_with(|| Pending {
                durable: self.lost.remove(&number).unwrap_or_else(|| now.into()),
                stores: Vec::new(),
            });
            now[within..within + n].copy_from_slice(&src[..n]);
            let words = (within / 8..(within + n).div_ceil(8)).fold(0, |mask, word| mask | 1 << word);
            pending.stores.push(Store { thread, words, after: (&*now).into() });
            at += n;
            src = &src[n..];
        }
        Ok(())
    }

    fn fence(&mut self, thread: u32) {
        if self.class.fence_is_durable() {
            self.pending.retain(|_, pending| {
                pending.fence(thread);
                !pending.stores.is_empty()
            });
        }
    }

    fn sync(&mut self) {
        self.pending.clear();
    }

    /// Makes durable what anybody has stored in a range.
    fn settle(&mut self, range: Range<u64>) {
        let line = self.line as u64;
        let lines = (range.start / line) as u32..range.end.div_ceil(line) as u32;
        let settled: Vec<u32> = self.pending.range(lines).map(|(&number, _)| number).collect();
        settled.iter().for_each(|number| _ = self.pending.remove(number));
    }

    /// Shows what the device holds where pages that it never got have been read so far.
    fn reread(&mut self) {
        self.sync();
        for (number, durable) in std::mem::take(&mut self.lost) {
            let at = number as usize * self.line;
            self.bytes[at..at + self.line].copy_from_slice(&durable);
        }
    }

    /// A `sync` that failed: each line has reached the device or never will.
    fn lose_sync(&mut self, rng: &mut Rng) {
        for (number, pending) in std::mem::take(&mut self.pending) {
            if rng.chance(2, 3) {
                self.lost.insert(number, pending.durable);
            }
        }
    }

    /// The daemon dies: everything stored stays readable, nothing becomes more durable.
    pub fn daemon_crash(&mut self) {
        for store in self.pending.values_mut().flat_map(|p| &mut p.stores) {
            store.thread = NOBODY;
        }
    }

    /// The host dies. Returns a hash of what was kept of the lines that were not durable.
    pub fn host_crash(&mut self, survival: &Survival, rng: &mut Rng) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        let is_words = self.class.fence_is_durable();
        for (i, (number, pending)) in std::mem::take(&mut self.pending).into_iter().enumerate() {
            let at = number as usize * self.line;
            let now = &mut self.bytes[at..at + self.line];
            match survival {
                Survival::Everything => {}
                Survival::Nothing => now.copy_from_slice(&pending.durable),
                Survival::Lines(mask) if mask >> i & 1 == 1 => {}
                Survival::AllBut(out) if *out != i => {}
                Survival::Only(one) if *one == i => {}
                Survival::Lines(_) | Survival::AllBut(_) | Survival::Only(_) => {
                    now.copy_from_slice(&pending.durable);
                }
                Survival::Torn if is_words => pending.tear(now, rng),
                Survival::Random | Survival::Torn => {
                    let which = rng.index(pending.stores.len() + 1);
                    match pending.stores.get(which) {
                        None => now.copy_from_slice(&pending.durable),
                        // A state in between may lack words that another thread has made durable.
                        Some(_) if is_words => {}
                        Some(store) => now.copy_from_slice(&store.after),
                    }
                }
            }
            for word in now.as_chunks::<8>().0 {
                hash = (hash ^ u64::from_le_bytes(*word)).wrapping_mul(0x100_0000_01b3).rotate_left(5);
            }
        }
        for (number, durable) in std::mem::take(&mut self.lost) {
            let at = number as usize * self.line;
            self.bytes[at..at + self.line].copy_from_slice(&durable);
        }
        hash
    }
}

impl Pending {
    /// Makes the thread's stores durable, and with them all that they were stored over.
    fn fence(&mut self, thread: u32) {
        for i in 0..self.stores.len() {
            if self.stores[i].thread != thread {
                continue;
            }
            let words = std::mem::take(&mut self.stores[i].words);
            for word in bits(words) {
                let at = word * 8..word * 8 + 8;
                self.durable[at.clone()].copy_from_slice(&self.stores[i].after[at]);
            }
            self.stores[..i].iter_mut().for_each(|s| s.words &= !words);
        }
        self.stores.retain(|s| s.words != 0);
    }

    /// Keeps each word in any state it has had.
    fn tear(&self, now: &mut [u8], rng: &mut Rng) {
        for (word, out) in now.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let at = word * 8..word * 8 + 8;
            let stored = self.stores.iter().filter(|s| s.words >> word & 1 == 1);
            let which = rng.index(stored.clone().count() + 1);
            let from = stored.map(|s| &s.after).nth(which).unwrap_or(&self.durable);
            out.copy_from_slice(&from[at]);
        }
    }
}

fn bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = (mask != 0).then_some(mask.trailing_zeros() as usize)?;
        mask &= mask - 1;
        Some(bit)
    })
}

/// The world's memory, as the engine sees it.
pub struct SimPmem {
    world: Arc<World>,
    len: u64,
    class: MediaClass,
}

impl SimPmem {
    /// The memory of `world`.
    pub fn new(world: &Arc<World>) -> SimPmem {
        let (len, class) = world.with(|w| (w.memory.bytes.len() as u64, w.memory.class));
        SimPmem { world: world.clone(), len, class }
    }
}

impl Pmem for SimPmem {
    fn len(&self) -> u64 {
        self.len
    }

    fn class(&self) -> MediaClass {
        self.class
    }

    fn read(&self, at: u64, dst: &mut [u8]) -> Result<(), MediaError> {
        self.world.with(|w| w.memory.read(at, dst))
    }

    fn write(&self, at: u64, src: &[u8]) -> Result<(), MediaError> {
        self.world.with(|w| {
            w.event("store");
            let thread = w.thread;
            w.memory.write(at, src, thread)
        })
    }

    fn fence(&self) {
        self.world.with(|w| {
            w.event("fence");
            let thread = w.thread;
            w.memory.fence(thread);
        });
    }

    fn sync(&self) -> Result<(), SyncError> {
        self.world.with(|w| {
            w.event("sync");
            if w.faults.is_hit(w.faults.sync, &mut w.rng) && self.class == MediaClass::PageCache {
                w.memory.lose_sync(&mut w.rng);
                // Only the first of them: what the kernel says later is not to be believed.
                w.faults.sync = 0;
                w.faults.sync_failed = true;
                return Err(SyncError(std::io::Error::from_raw_os_error(5)));
            }
            match self.class {
                MediaClass::PageCache => w.memory.sync(),
                _ => w.memory.fence(w.thread),
            }
            Ok(())
        })
    }

    fn settle(&self, at: u64, len: u64) -> Result<(), MediaError> {
        self.world.with(|w| {
            w.memory.judge(at, len as usize)?;
            if self.class.fence_is_durable() {
                w.event("settle");
                w.memory.settle(at..at + len);
            }
            Ok(())
        })
    }

    fn reread(&self) -> Result<(), SyncError> {
        self.world.with(|w| {
            w.event("reread");
            w.memory.reread();
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(memory: &Memory, at: usize) -> u8 {
        memory.bytes[at * 8]
    }

    #[test]
    fn a_fence_covers_its_own_thread_only() {
        let mut memory = Memory::new(MediaClass::AssumeDax, 4096);
        memory.write(0, &[1; 8], 1).unwrap();
        memory.write(8, &[2; 8], 2).unwrap();
        memory.fence(1);
        memory.host_crash(&Survival::Nothing, &mut Rng::new(1));
        assert_eq!((word(&memory, 0), word(&memory, 1)), (1, 0));
    }

    #[test]
    fn before_the_fence_any_subset_of_words_survives_and_none_is_torn() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let mut memory = Memory::new(MediaClass::AssumeDax, 4096);
            memory.write(0, &[1; 24], 1).unwrap();
            memory.write(8, &[2; 8], 1).unwrap();
            memory.host_crash(&Survival::Torn, &mut Rng::new(seed));
            assert!(memory.bytes.as_chunks::<8>().0.iter().all(|w| w.iter().all(|b| *b == w[0])));
            seen.insert((word(&memory, 0), word(&memory, 1), word(&memory, 2)));
        }
        assert_eq!(seen.len(), 2 * 3 * 2, "{seen:?}");
    }

    #[test]
    fn what_a_dead_daemon_stored_is_covered_where_it_is_settled_and_by_no_fence() {
        for (settled, kept) in [(64..128, 0), (0..64, 7), (32..40, 7)] {
            let mut memory = Memory::new(MediaClass::AssumeDax, 4096);
            memory.write(0, &[7; 64], 1).unwrap();
            memory.daemon_crash();
            assert_eq!(word(&memory, 0), 7, "it still reads back");
            memory.fence(1);
            memory.settle(settled);
            memory.host_crash(&Survival::Nothing, &mut Rng::new(1));
            assert_eq!(word(&memory, 0), kept);
        }
    }

    #[test]
    fn page_cache_keeps_any_state_of_a_sector_since_the_sync_and_never_a_mixture() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let mut memory = Memory::new(MediaClass::PageCache, 4096);
            memory.write(0, &[1; 1024], 1).unwrap();
            memory.sync();
            memory.write(0, &[2; 512], 1).unwrap();
            memory.fence(1);
            memory.write(0, &[3; 512], 1).unwrap();
            memory.host_crash(&Survival::Random, &mut Rng::new(seed));
            assert!(memory.bytes[..512].iter().all(|b| *b == memory.bytes[0]));
            seen.insert((memory.bytes[0], memory.bytes[512]));
        }
        assert_eq!(seen, [(1, 1), (2, 1), (3, 1)].into());
    }

    #[test]
    fn what_a_failed_sync_lost_reads_back_until_the_host_dies() {
        let mut lost = 0;
        for seed in 0..50 {
            let mut memory = Memory::new(MediaClass::PageCache, 4096);
            memory.write(0, &[9; 512], 1).unwrap();
            memory.lose_sync(&mut Rng::new(seed));
            memory.sync();
            assert_eq!(memory.bytes[0], 9);
            let mut reread = memory.clone();
            reread.reread();
            memory.host_crash(&Survival::Everything, &mut Rng::new(seed));
            assert_eq!(reread.bytes[0], memory.bytes[0]);
            lost += u32::from(memory.bytes[0] == 0);
        }
        assert!(lost > 10 && lost < 50, "{lost} of 50");
    }
}
