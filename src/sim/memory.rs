//! The fast side: memory that knows of every store whether it is durable yet.
//!
//! Two classes. On *DAX* the line is 64 bytes, and until the storing thread's fence a crash keeps
//! any subset of the aligned words stored, each in any state it has had since it was last durable.
//! That is the rule for non-temporal stores, which leave in any order; here every store counts as
//! one. A plain store would only ever survive as a prefix of its line's stores, and each such prefix
//! is one of these subsets: a world that tears plain stores too is the stricter one, and what passes
//! in it needs no argument about which instruction stored what. On *page-cache* the line is a sector
//! of 512 bytes; the kernel writes any of them out at any moment as they then are, so a crash keeps,
//! per sector, any state since the last `sync`.
//!
//! Threads are logical: the run says on whose behalf it calls ([`World::act_as`](super::World)). A
//! fence covers its own thread's stores only. The stores of a daemon that died belong to nobody: no
//! fence ever covers them. On page-cache a `sync` does, on DAX only a `settle` of their range, or a
//! store over them.
//!
//! Invariants:
//! - `durable` has every page with a store in `log`, as the device holds it; pages that are not in
//!   it are, but for `lost`, what the device holds.
//! - `log` is in the order of the stores, word-aligned, and without what a later durable store
//!   covers.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::loss::Loss;
use super::pages::{Page, Pages, split};
use super::rng::Rng;
use super::world::{Event, World};
use crate::pmem::guard::{ForeignSlice, ForeignSliceMut};
use crate::pmem::{MediaClass, MediaError, Pmem, SyncError};

/// What of the lines that were not durable a host crash leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Everything, but one line only in part: some of its words, or one of its earlier states.
    TornLine(usize),
    /// Each line by chance, in any of its states.
    Random,
    /// Each word by chance; on page-cache media the same as [`Survival::Random`].
    Torn,
}

/// The owner of stores whose daemon is dead.
const NOBODY: u32 = u32::MAX;

/// A store that is not durable: whole words, and what they were after it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Store {
    thread: u32,
    pub at: usize,
    pub len: usize,
    /// Where in `Memory::stored` the bytes are.
    from: usize,
}

impl Store {
    pub fn end(&self) -> usize {
        self.at + self.len
    }
}

/// Bytes, and what of them is not durable.
#[derive(Clone, Debug)]
pub struct Memory {
    pub(super) class: MediaClass,
    pub(super) line: usize,
    /// As a processor sees them.
    pub(super) now: Pages,
    pub(super) durable: BTreeMap<usize, Arc<Page>>,
    pub(super) log: Vec<Store>,
    /// The bytes of all stores in `log`.
    stored: Vec<u8>,
    /// What the device holds where a failed `sync` lost pages that still read back, by line.
    pub(super) lost: BTreeMap<usize, Box<[u8]>>,
    poison: Vec<Range<u64>>,
    /// Deaths of the host so far.
    boot: u64,
}

impl Memory {
    /// Zeroed memory of a class: `AssumeDax` or `PageCache`.
    pub fn new(class: MediaClass, len: u64) -> Memory {
        let line = if class.fence_is_durable() { 64 } else { 512 };
        Memory {
            class,
            line,
            now: Pages::new(len as usize),
            durable: BTreeMap::new(),
            log: Vec::new(),
            stored: Vec::new(),
            lost: BTreeMap::new(),
            poison: Vec::new(),
            boot: 1,
        }
    }

    /// None: where a cache is lost.
    pub(super) fn nothing() -> Memory {
        Memory::new(MediaClass::AssumeDax, 0)
    }

    /// The same bytes, all of them durable, in the host's next life.
    pub(super) fn settled(&self) -> Memory {
        Memory {
            class: self.class,
            line: self.line,
            now: self.now.clone(),
            durable: BTreeMap::new(),
            log: Vec::new(),
            stored: Vec::new(),
            lost: BTreeMap::new(),
            poison: self.poison.clone(),
            boot: self.boot + 1,
        }
    }

    /// Whether these are the same bytes, all of them durable, in pages never written since.
    pub(super) fn is_same(&self, other: &Memory) -> bool {
        let is_settled = |m: &Memory| m.log.is_empty() && m.lost.is_empty();
        is_settled(self) && is_settled(other) && self.now.is_shared(&other.now)
    }

    /// Lines that are not durable.
    pub fn pending_lines(&self) -> usize {
        Loss::new(self).lines()
    }

    /// Number of bytes.
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.now.len()
    }

    /// A copy of `len` bytes, as a processor sees them.
    pub fn copy(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.now.read(at, &mut bytes);
        bytes
    }

    /// A copy of all bytes, as a processor sees them.
    pub fn bytes(&self) -> Vec<u8> {
        self.copy(0, self.len())
    }

    /// Changes bytes behind everybody's back, to the end of their page: damage at rest.
    pub fn corrupt(&mut self, at: usize, change: impl FnOnce(&mut [u8])) {
        change(self.now.rest_mut(at));
    }

    /// Makes a range unreadable and unwritable.
    pub fn poison(&mut self, range: Range<u64>) {
        self.poison.push(range);
    }

    /// What a store left.
    pub(super) fn after(&self, store: &Store) -> &[u8] {
        &self.stored[store.from..store.from + store.len]
    }

    /// What the device holds of a line.
    pub(super) fn device(&self, line: usize) -> &[u8] {
        let at = line * self.line;
        match self.durable.get(&(at / super::pages::PAGE)) {
            Some(page) => &page[at % super::pages::PAGE..][..self.line],
            None => self.now.slice(at, self.line),
        }
    }

    /// Makes everything readable and writable again.
    pub fn heal(&mut self) {
        self.poison.clear();
    }

    fn judge(&self, at: u64, len: usize) -> Result<(), MediaError> {
        let end = at + len as u64;
        assert!(end <= self.len() as u64, "access past the end: {at}+{len}");
        match self.poison.iter().any(|p| p.start < end && at < p.end) {
            true => Err(MediaError { at, len }),
            false => Ok(()),
        }
    }

    fn read(&self, at: u64, dst: &mut [u8]) -> Result<(), MediaError> {
        self.judge(at, dst.len())?;
        self.now.read(at as usize, dst);
        Ok(())
    }

    fn write(&mut self, at: u64, src: &[u8], thread: u32) -> Result<(), MediaError> {
        self.judge(at, src.len())?;
        if src.is_empty() {
            return Ok(());
        }
        let (at, src_at) = (at as usize & !7, at as usize);
        let len = (src_at + src.len()).next_multiple_of(8) - at;
        for (page, _) in split(at, len) {
            self.durable.entry(page).or_insert_with(|| self.now.page(page).clone());
        }
        if !self.lost.is_empty() {
            self.find_lost(at, len);
        }
        self.now.write(src_at, src);
        let from = self.stored.len();
        self.stored.resize(from + len, 0);
        self.now.read(at, &mut self.stored[from..]);
        self.log.push(Store { thread, at, len, from });
        Ok(())
    }

    /// Lines about to be stored to have one device content again, the one that was left of them.
    fn find_lost(&mut self, at: usize, len: usize) {
        for line in at / self.line..(at + len).div_ceil(self.line) {
            if let Some(bytes) = self.lost.remove(&line) {
                let at = line * self.line;
                put(&mut self.durable, at, &bytes);
            }
        }
    }

    fn fence(&mut self, thread: u32) {
        if !self.class.fence_is_durable() {
            return;
        }
        if self.log.iter().all(|store| store.thread == thread) {
            return self.sync();
        }
        let mut kept: Vec<Store> = Vec::new();
        for store in std::mem::take(&mut self.log) {
            if store.thread != thread {
                kept.push(store);
                continue;
            }
            let after = &self.stored[store.from..store.from + store.len];
            put(&mut self.durable, store.at, after);
            // What it was stored over can no longer be what is left.
            if kept.iter().any(|k| k.at < store.end() && store.at < k.end()) {
                kept = kept.iter().flat_map(|k| without(k, &store)).collect();
            }
        }
        self.keep(kept);
    }

    /// The lines of a range, as a store would cover them.
    fn lines_of(&self, range: &Range<u64>) -> Store {
        let (start, end) = (range.start as usize / self.line, (range.end as usize).div_ceil(self.line));
        Store { thread: NOBODY, at: start * self.line, len: (end - start) * self.line, from: 0 }
    }

    /// Whether anything in the lines of a range is not durable.
    fn has_pending(&self, range: Range<u64>) -> bool {
        let over = self.lines_of(&range);
        self.log.iter().any(|s| s.at < over.end() && over.at < s.end())
    }

    /// Makes durable what anybody has stored in the lines of a range.
    fn settle(&mut self, range: Range<u64>) {
        let over = self.lines_of(&range);
        let overlaps = |s: &Store| s.at < over.end() && over.at < s.end();
        let mut kept = Vec::new();
        for store in std::mem::take(&mut self.log) {
            if overlaps(&store) {
                let (start, end) = (store.at.max(over.at), store.end().min(over.end()));
                let from = store.from + (start - store.at);
                put(&mut self.durable, start, &self.stored[from..from + (end - start)]);
                kept.extend(without(&store, &over));
            } else {
                kept.push(store);
            }
        }
        self.keep(kept);
    }

    /// Shows what the device holds where pages that it never got have been read so far.
    fn reread(&mut self) {
        self.sync();
        for (line, bytes) in std::mem::take(&mut self.lost) {
            self.now.write(line * self.line, &bytes);
        }
    }

    /// Goes on with these of the stores, and with what they need.
    fn keep(&mut self, mut kept: Vec<Store>) {
        let mut stored = Vec::new();
        for store in &mut kept {
            let from = stored.len();
            stored.extend_from_slice(&self.stored[store.from..store.from + store.len]);
            store.from = from;
        }
        (self.log, self.stored) = (kept, stored);
        let log = &self.log;
        self.durable.retain(|&page, _| {
            let (start, end) = (page * super::pages::PAGE, (page + 1) * super::pages::PAGE);
            log.iter().any(|store| store.at < end && start < store.end())
        });
    }

    fn sync(&mut self) {
        self.log.clear();
        self.stored.clear();
        self.durable.clear();
    }

    /// A `sync` that failed: each line has reached the device or never will.
    fn lose_sync(&mut self, rng: &mut Rng) {
        let mut lost = std::mem::take(&mut self.lost);
        for line in Loss::new(self).numbers() {
            if rng.chance(2, 3) {
                lost.insert(line, self.device(line).into());
            }
        }
        self.lost = lost;
        self.sync();
    }

    /// The daemon dies: everything stored stays readable, nothing becomes more durable.
    pub fn daemon_crash(&mut self) {
        for store in &mut self.log {
            store.thread = NOBODY;
        }
    }

    /// The host dies. Returns a hash of what was kept of the lines that were not durable.
    pub fn host_crash(&mut self, survival: &Survival, rng: &mut Rng) -> u64 {
        let (memory, hash) = Loss::new(self).image(survival, rng);
        *self = memory;
        hash
    }
}

/// Stores `bytes` in what is durable of their pages.
fn put(durable: &mut BTreeMap<usize, Arc<Page>>, at: usize, bytes: &[u8]) {
    let mut done = 0;
    for (page, range) in split(at, bytes.len()) {
        let n = range.len();
        let page = durable.get_mut(&page).expect("a page with stores");
        Arc::make_mut(page)[range].copy_from_slice(&bytes[done..done + n]);
        done += n;
    }
}

/// What is left of `store` where `over` does not cover it.
fn without(store: &Store, over: &Store) -> impl Iterator<Item = Store> + use<> {
    let part = |at: usize, end: usize, store: &Store| {
        (at < end).then(|| Store { at, len: end - at, from: store.from + (at - store.at), ..*store })
    };
    let before = part(store.at, store.end().min(over.at), store);
    let after = part(store.at.max(over.end()), store.end(), store);
    [before, after].into_iter().flatten()
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
        let (len, class) = world.with(|w| (w.memory.len() as u64, w.memory.class));
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
            w.event(Event::Store);
            let thread = w.thread;
            w.memory.write(at, src, thread)
        })
    }

    fn write_summed(&self, at: u64, src: ForeignSlice<'_>) -> Option<u32> {
        let mut bytes = vec![0; src.len()];
        src.copy_to(&mut bytes).ok()?;
        self.write(at, &bytes).ok()?;
        Some(crc32fast::hash(&bytes))
    }

    fn read_summed(&self, at: u64, dst: &mut ForeignSliceMut<'_>) -> Option<u32> {
        let mut bytes = vec![0; dst.len()];
        self.read(at, &mut bytes).ok()?;
        dst.copy_from(&bytes).ok()?;
        Some(crc32fast::hash(&bytes))
    }

    fn fence(&self) {
        self.world.with(|w| {
            w.event(Event::Fence);
            let thread = w.thread;
            w.memory.fence(thread);
        });
    }

    fn sync(&self) -> Result<(), SyncError> {
        self.world.with(|w| {
            w.event(Event::Sync);
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
            if self.class.fence_is_durable() && w.memory.has_pending(at..at + len) {
                w.event(Event::Sync);
                w.memory.settle(at..at + len);
            }
            Ok(())
        })
    }

    fn reread(&self) -> Result<(), SyncError> {
        self.world.with(|w| {
            w.event(Event::Sync);
            w.memory.reread();
            Ok(())
        })
    }

    fn is_on_device(&self, ranges: &[Range<u64>]) -> io::Result<bool> {
        Ok(self.world.with(|w| {
            let Memory { lost, line, now, .. } = &w.memory;
            let differs = |n: usize, had: &[u8]| now.slice(n * line, *line) != had;
            let mut gone = lost.iter().filter(|(n, had)| differs(**n, had)).map(|(n, _)| (n * line) as u64);
            !gone.any(|at| ranges.iter().any(|r| r.contains(&at)))
        }))
    }

    fn boot_id(&self) -> [u8; 16] {
        u128::from(self.world.with(|w| w.memory.boot)).to_le_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(memory: &Memory, at: usize) -> u8 {
        memory.copy(at * 8, 1)[0]
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
            assert!(memory.bytes().as_chunks::<8>().0.iter().all(|w| w.iter().all(|b| *b == w[0])));
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
            assert!(memory.copy(0, 512).iter().all(|b| *b == memory.copy(0, 1)[0]));
            seen.insert((memory.copy(0, 1)[0], memory.copy(512, 1)[0]));
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
            assert_eq!(memory.copy(0, 1)[0], 9);
            let mut reread = memory.clone();
            reread.reread();
            memory.host_crash(&Survival::Everything, &mut Rng::new(seed));
            assert_eq!(reread.copy(0, 1), memory.copy(0, 1));
            lost += u32::from(memory.copy(0, 1)[0] == 0);
        }
        assert!(lost > 10 && lost < 50, "{lost} of 50");
    }
}
