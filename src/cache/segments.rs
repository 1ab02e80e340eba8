//! What DRAM knows of every segment: state, owner, what is dead in it, and its checksums.
//!
//! Invariants:
//! - `live` is the number of payload sectors the index points at; a sector is dead once nothing
//!   points at it, and never becomes live again in the same generation.
//! - A checksum is stored before the key it belongs to is published, and not changed until the
//!   segment has been freed, which waits for every reader.
//! - A segment has at most one writer: the stream that opened it, until it is full.
//! - Heat is evidence, not truth: it may be lost, and a new life begins without any.

use std::sync::OnceLock;

use super::index::hint::prefetch;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::Geometry;
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

/// Where a segment is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum State {
    /// On the free list, or on its way there.
    Free = 0,
    /// A stream appends to it.
    Open = 1,
    /// Nothing more will be appended; not yet sealed on the media.
    Full = 2,
    /// Sealed on the media, with a summary.
    Sealed = 3,
    /// Being reclaimed.
    Reclaiming = 4,
    /// Reclaim's own: it appends what it relocates, or holds it in reserve for that.
    Target = 6,
    /// Its header cannot be trusted or written; never used again.
    Bad = 5,
    /// Beyond the end of the cache, or about to be: empty, on no list.
    Retired = 7,
}

impl State {
    fn from_raw(raw: u8) -> State {
        match raw {
            0 => State::Free,
            1 => State::Open,
            2 => State::Full,
            3 => State::Sealed,
            4 => State::Reclaiming,
            6 => State::Target,
            7 => State::Retired,
            _ => State::Bad,
        }
    }
}

/// What a segment was filled with. Data of one class dies, and is worth keeping, alike: reclaim
/// weighs segments by it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Class {
    /// What guests wrote; and what they read, where a cache is too small to part the two.
    Written,
    /// What was read for the first time in a while.
    Probation,
    /// What was read again and again: missed soon after it was evicted, or kept by reclaim.
    Proven,
}

impl Class {
    /// How many there are.
    pub const COUNT: usize = 3;

    /// A number below [`Class::COUNT`].
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The number that stands for the stream in a segment's header. Those of writes are counted from 0.
    pub fn stream(self, queue: u16) -> u16 {
        match self {
            Class::Written => queue,
            Class::Probation => u16::MAX - 1,
            Class::Proven => u16::MAX,
        }
    }

    /// The class of what a stream has filled.
    pub fn of_stream(stream: u16) -> Class {
        match stream {
            u16::MAX => Class::Proven,
            s if s == u16::MAX - 1 => Class::Probation,
            _ => Class::Written,
        }
    }
}

/// One segment. On lines of its own: neighbours may be open for two queues.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Segment {
    state: AtomicU8,
    /// Incarnation of the volume that owns it, 0 for none.
    pub owner: AtomicU64,
    pub generation: AtomicU64,
    /// The start in which it was opened, and all of its records were written.
    pub start_counter: AtomicU64,
    /// Sequence number of its header on the media.
    pub header_sequence: AtomicU64,
    /// Highest epoch of any dirty key in it, 0 for none.
    pub max_epoch: AtomicU64,
    /// Lowest epoch of any dirty key in it, `u64::MAX` for none. Set before the record exists.
    pub min_epoch: AtomicU64,
    pub max_version: AtomicU64,
    pub last_sequence: AtomicU64,
    /// Lowest byte of the records committed (they grow down); offset in the segment.
    pub log_low: AtomicU32,
    /// One past the highest payload byte in use; offset in the segment.
    pub payload_end: AtomicU32,
    pub key_count: AtomicU32,
    pub live: AtomicU32,
    /// Whether it is on the list of segments whose liveness words must be written.
    pub liveness_pending: AtomicBool,
    /// Bits set in what its liveness words are, or will be once they are written: counted after the
    /// mark, so that words written after a look at it hold at least as many.
    pub dead_count: AtomicU32,
    /// Whether its floor says on the media that every clean key is dead: its words need no writing.
    pub is_buried: AtomicBool,
    /// What it holds, as [`Class::code`] has it.
    class: AtomicU8,
    /// Segments that the cache had opened when this one was: its age is what has been since.
    pub born: AtomicU64,
    body: OnceLock<Body>,
}

struct Body {
    /// One bit per sector: nothing points at it.
    dead: Box<[AtomicU32]>,
    /// One bit per word of `dead`: changed since it was last written to the media.
    changed: Box<[AtomicU32]>,
    /// CRC-32 of each 4 KiB block that one key fills.
    blocks: Box<[AtomicU32]>,
    /// Marks of 32 blocks at a time.
    marks: Box<[Marks]>,
    /// CRC-32 of each sector, where `packed`.
    sectors: OnceLock<Box<[AtomicU32]>>,
    /// One bit per sector: dead on the media, and pointed at again since recovery. It stays dead
    /// there: bits are never cleared in a life.
    revived: OnceLock<Box<[AtomicU32]>>,
}

impl Body {
    fn revived(&self, word: u32) -> u32 {
        self.revived.get().map_or(0, |all| all[word as usize].load(Ordering::Relaxed))
    }
}

/// What is known of 32 blocks, bit by bit. Together, because a hit that verifies looks at `packed`
/// anyway: so the evidence that reclaim wants costs it no cache line of its own.
#[derive(Default)]
struct Marks {
    /// The block's sectors have checksums of their own.
    packed: AtomicU32,
    /// How often guests have read from the block since it was written, less what reclaim took off in
    /// passing: the n-th word has those read at least n + 1 times. Reads are counted that far.
    heat: [AtomicU32; HEAT_MAX as usize],
}

/// Reads of one block that are told apart.
pub(crate) const HEAT_MAX: u8 = 3;

fn zeros(n: usize) -> Box<[AtomicU32]> {
    (0..n).map(|_| AtomicU32::new(0)).collect()
}

impl Segment {
    pub fn state(&self) -> State {
        State::from_raw(self.state.load(Ordering::Acquire))
    }

    pub fn set_state(&self, state: State) {
        self.state.store(state as u8, Ordering::Release);
    }

    /// Makes DRAM ready for a new life of the segment. Nobody else may know the segment.
    pub fn begin(&self, geometry: &Geometry, owner: u64, generation: u64, start_counter: u64) {
        let sectors = geometry.segment_size as usize / 512;
        let fresh = || Body {
            dead: zeros(sectors.div_ceil(32)),
            changed: zeros(sectors.div_ceil(32).div_ceil(32)),
            blocks: zeros(sectors / 8),
            marks: (0..(sectors / 8).div_ceil(32)).map(|_| Marks::default()).collect(),
            sectors: OnceLock::new(),
            revived: OnceLock::new(),
        };
        let body = self.body.get_or_init(fresh);
        let revived = body.revived.get().into_iter().flatten();
        for word in body.dead.iter().chain(&body.changed).chain(revived) {
            word.store(0, Ordering::Relaxed);
        }
        for marks in &body.marks {
            marks.packed.store(0, Ordering::Relaxed);
            marks.heat.iter().for_each(|level| level.store(0, Ordering::Relaxed));
        }
        self.owner.store(owner, Ordering::Relaxed);
        self.generation.store(generation, Ordering::Relaxed);
        self.start_counter.store(start_counter, Ordering::Relaxed);
        for n in [&self.max_epoch, &self.max_version, &self.last_sequence] {
            n.store(0, Ordering::Relaxed);
        }
        self.min_epoch.store(u64::MAX, Ordering::Relaxed);
        self.key_count.store(0, Ordering::Relaxed);
        self.live.store(0, Ordering::Relaxed);
        self.dead_count.store(0, Ordering::Relaxed);
        self.is_buried.store(false, Ordering::Relaxed);
        self.log_low.store(geometry.data_end(), Ordering::Release);
        self.payload_end.store(geometry.data_start(), Ordering::Relaxed);
    }

    fn body(&self) -> &Body {
        self.body.get().expect("a segment in use has begun")
    }

    /// Counts `sectors` more as pointed at.
    pub fn add_live(&self, sectors: u32) {
        self.live.fetch_add(sectors, Ordering::Relaxed);
    }

    /// Marks sectors `[first, first + n)` of the segment dead. Returns how many were not yet.
    /// Does not touch `live`.
    pub fn mark_dead(&self, first: u32, n: u32) -> u32 {
        let body = self.body();
        let (mut fresh, mut counted) = (0, 0);
        let (mut at, end) = (first, first + n);
        while at < end {
            let word = at / 32;
            let upto = end.min((word + 1) * 32);
            let width = upto - at;
            let mask = if width == 32 { u32::MAX } else { ((1 << width) - 1) << (at % 32) };
            let old = body.dead[word as usize].fetch_or(mask, Ordering::SeqCst);
            fresh += (mask & !old).count_ones();
            counted += (mask & !old & !body.revived(word)).count_ones();
            if mask & !old != 0 {
                let (changed, bit) = (&body.changed[word as usize / 32], 1 << (word % 32));
                // Sequentially consistent with the taker: it clears the bit before it looks at the
                // word, so a bit still seen here is taken after the mark above.
                if changed.load(Ordering::SeqCst) & bit == 0 {
                    changed.fetch_or(bit, Ordering::SeqCst);
                }
            }
            at = upto;
        }
        self.dead_count.fetch_add(counted, Ordering::SeqCst);
        fresh
    }

    /// Marks dead what recovery found dead on the media already: nothing is left to write.
    pub fn restore_dead(&self, word: usize, bits: u32) {
        self.body().dead[word].store(bits, Ordering::Relaxed);
        self.dead_count.fetch_add(bits.count_ones(), Ordering::Relaxed);
    }

    /// Marks dead what the media says nothing about, or nothing that counts: neither counted nor
    /// written.
    pub fn distrust(&self, word: usize) {
        self.body().dead[word].store(u32::MAX, Ordering::Relaxed);
    }

    /// Takes sectors for live whatever the media says: dirty keys count as they are.
    pub fn revive(&self, first: u32, n: u32) {
        let body = self.body();
        let mut sector = self.next_dead(first, first + n);
        while sector < first + n {
            let (word, bit) = (sector as usize / 32, 1 << (sector % 32));
            body.dead[word].fetch_and(!bit, Ordering::Relaxed);
            let revived = body.revived.get_or_init(|| zeros(body.dead.len()));
            revived[word].fetch_or(bit, Ordering::Relaxed);
            sector = self.next_dead(sector + 1, first + n);
        }
    }

    /// The first dead sector in `[from, end)`, or `end`.
    pub fn next_dead(&self, from: u32, end: u32) -> u32 {
        self.next_where(from, end, |dead| dead)
    }

    /// The first sector in `[from, end)` that is not dead, or `end`.
    pub fn next_live(&self, from: u32, end: u32) -> u32 {
        self.next_where(from, end, |dead| !dead)
    }

    /// The first sector in `[from, end)` whose bit is set in what `bits` makes of its word, or `end`.
    fn next_where(&self, from: u32, end: u32, bits: impl Fn(u32) -> u32) -> u32 {
        let body = self.body();
        let mut at = from;
        while at < end {
            let rest = bits(body.dead[at as usize / 32].load(Ordering::Relaxed)) >> (at % 32);
            if rest != 0 {
                return end.min(at + rest.trailing_zeros());
            }
            at = (at / 32 + 1) * 32;
        }
        end
    }

    /// Whether the sector is dead.
    pub fn is_dead(&self, sector: u32) -> bool {
        self.body().dead[sector as usize / 32].load(Ordering::Relaxed) & (1 << (sector % 32)) != 0
    }

    /// Takes the words that changed since the last call: calls `f(word, bits)` for each.
    pub fn take_changed(&self, mut f: impl FnMut(u32, u32)) {
        let body = self.body();
        for (i, changed) in body.changed.iter().enumerate() {
            if changed.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = changed.swap(0, Ordering::SeqCst);
            while bits != 0 {
                let word = i as u32 * 32 + bits.trailing_zeros();
                bits &= bits - 1;
                f(word, body.dead[word as usize].load(Ordering::SeqCst) | body.revived(word));
            }
        }
    }

    /// Stores the checksum of a whole block. A draft that was given up may have packed it before.
    pub fn set_block_checksum(&self, block: u32, crc: u32) {
        let body = self.body();
        body.blocks[block as usize].store(crc, Ordering::Relaxed);
        // A draft that was given up may have packed small pieces here before.
        let (word, bit) = (&body.marks[block as usize / 32].packed, 1 << (block % 32));
        if word.load(Ordering::Relaxed) & bit != 0 && !mutated(Mutant::PackedMarkKept) {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    /// Stores the checksum of one sector of a packed block.
    pub fn set_sector_checksum(&self, sector: u32, crc: u32) {
        let body = self.body();
        let all = body.sectors.get_or_init(|| zeros(body.blocks.len() * 8));
        all[sector as usize].store(crc, Ordering::Relaxed);
        let block = sector / 8;
        body.marks[block as usize / 32].packed.fetch_or(1 << (block % 32), Ordering::Relaxed);
    }

    /// The checksum of a whole block, or `None` when its sectors have their own.
    pub fn block_checksum(&self, block: u32) -> Option<u32> {
        let body = self.body();
        let marks = &body.marks[block as usize / 32];
        let packed = marks.packed.load(Ordering::Relaxed) & (1 << (block % 32)) != 0;
        (!packed).then(|| body.blocks[block as usize].load(Ordering::Relaxed))
    }

    /// Asks for what a verified read of a block looks at, and does not wait.
    pub fn prefetch_block(&self, block: u32) {
        let body = self.body();
        prefetch(&body.marks[block as usize / 32]);
        prefetch(&body.blocks[block as usize]);
    }

    /// What it holds.
    pub fn class(&self) -> Class {
        match self.class.load(Ordering::Relaxed) {
            0 => Class::Written,
            1 => Class::Probation,
            _ => Class::Proven,
        }
    }

    /// Says what it holds.
    pub fn set_class(&self, class: Class) {
        self.class.store(class.code(), Ordering::Relaxed);
    }

    /// Notes that a guest has read `sectors` from `first` on. On the hit path: a load and a store, and
    /// after a few reads a load only.
    pub fn note_read(&self, first: u32, sectors: u32) {
        let marks = &self.body().marks;
        for block in first / 8..=(first + sectors - 1) / 8 {
            let (heat, bit) = (&marks[block as usize / 32].heat, 1 << (block % 32));
            if let Some(level) = heat.iter().find(|level| level.load(Ordering::Relaxed) & bit == 0) {
                level.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// How often guests have read from the sector's block, as far as it is counted.
    pub fn heat(&self, sector: u32) -> u8 {
        let block = sector / 8;
        let heat = &self.body().marks[block as usize / 32].heat;
        let is_set = |level: &&AtomicU32| level.load(Ordering::Relaxed) & 1 << (block % 32) != 0;
        heat.iter().take_while(is_set).count() as u8
    }

    /// Makes a block as hot as it was elsewhere.
    pub fn warm(&self, sector: u32, heat: u8) {
        let block = sector / 8;
        for level in &self.body().marks[block as usize / 32].heat[..heat.into()] {
            level.fetch_or(1 << (block % 32), Ordering::Relaxed);
        }
    }

    /// Takes one read off each block: it must be read again to stay as hot.
    pub fn cool(&self) {
        for marks in &self.body().marks {
            for level in 0..HEAT_MAX as usize {
                let next = marks.heat.get(level + 1).map_or(0, |next| next.load(Ordering::Relaxed));
                marks.heat[level].store(next, Ordering::Relaxed);
            }
        }
    }

    /// At most how many sectors of it are live and were read at least `least` times: packed space that
    /// was never used counts as live.
    pub fn hot_sectors(&self, least: u8) -> u32 {
        let body = self.body();
        let mut hot = 0;
        for (marks, dead) in body.marks.iter().zip(body.dead.chunks(8)) {
            let mut read = marks.heat[usize::from(least.clamp(1, HEAT_MAX)) - 1].load(Ordering::Relaxed);
            while read != 0 {
                let block = read.trailing_zeros();
                read &= read - 1;
                let dead = dead[block as usize / 4].load(Ordering::Relaxed) >> (block % 4 * 8);
                hot += 8 - (dead & 0xff).count_ones();
            }
        }
        hot
    }

    /// The checksum of one sector of a packed block.
    pub fn sector_checksum(&self, sector: u32) -> u32 {
        let sectors = self.body().sectors.get();
        sectors.expect("a packed block has sector checksums")[sector as usize].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment() -> Segment {
        let geometry = Geometry::custom(16 << 10, 64 << 10, 4, 1).unwrap();
        let segment = Segment::default();
        segment.begin(&geometry, 1, 1, 1);
        segment
    }

    #[test]
    fn a_block_given_up_by_a_draft_takes_the_checksums_of_its_next_use() {
        let segment = segment();
        segment.set_sector_checksum(25, 7);
        assert_eq!((segment.block_checksum(3), segment.sector_checksum(25)), (None, 7));
        segment.set_block_checksum(3, 9);
        assert_eq!(segment.block_checksum(3), Some(9));
        segment.set_sector_checksum(24, 5);
        assert_eq!((segment.block_checksum(3), segment.sector_checksum(24)), (None, 5));
    }

    #[test]
    fn a_sector_revived_by_recovery_stays_dead_on_the_media_and_counts_once() {
        let segment = segment();
        segment.restore_dead(0, 0xff);
        segment.revive(4, 8);
        assert!(segment.is_dead(3) && !segment.is_dead(4));
        assert_eq!(segment.mark_dead(20, 1), 1);
        let mut words = Vec::new();
        segment.take_changed(|word, bits| words.push((word, bits)));
        assert_eq!(words, [(0, 0x10_00ff)]);
        assert_eq!(segment.mark_dead(4, 2), 2);
        assert_eq!(segment.dead_count.load(Ordering::Relaxed), 9);
    }

    #[test]
    fn what_was_read_and_lives_is_hot_until_it_has_cooled() {
        let segment = segment();
        assert_eq!(segment.hot_sectors(1), 0);
        segment.note_read(7, 2);
        segment.note_read(8, 8);
        assert_eq!((segment.heat(0), segment.heat(15), segment.heat(16)), (1, 2, 0));
        assert_eq!((segment.hot_sectors(1), segment.hot_sectors(2), segment.hot_sectors(3)), (16, 8, 0));
        segment.mark_dead(4, 8);
        segment.note_read(127, 1);
        assert_eq!(segment.hot_sectors(1), 8 + 8);
        (0..9).for_each(|_| segment.note_read(20, 1));
        assert_eq!(segment.heat(23), HEAT_MAX);
        for left in (0..HEAT_MAX).rev() {
            segment.cool();
            assert_eq!(segment.heat(20), left);
        }
        assert_eq!(segment.hot_sectors(1), 0);
        segment.warm(33, 2);
        assert_eq!(segment.heat(33), 2);
        segment.begin(&Geometry::custom(16 << 10, 64 << 10, 4, 1).unwrap(), 1, 2, 1);
        assert_eq!(segment.hot_sectors(1), 0);
    }

    #[test]
    fn a_class_is_known_by_the_number_of_its_stream() {
        for class in [Class::Written, Class::Probation, Class::Proven] {
            assert_eq!(Class::of_stream(class.stream(7)), class);
            let segment = segment();
            segment.set_class(class);
            assert_eq!(segment.class(), class);
        }
    }

    #[test]
    fn each_sector_dies_once_and_each_changed_word_is_taken_once() {
        let segment = segment();
        assert_eq!(segment.mark_dead(30, 40), 40);
        assert_eq!(segment.mark_dead(25, 10), 5);
        let mut words = Vec::new();
        segment.take_changed(|word, bits| words.push((word, bits)));
        assert_eq!(words, [(0, 0xfe00_0000), (1, u32::MAX), (2, 0x3f)]);
        segment.take_changed(|_, _| panic!("nothing changed since"));
        assert_eq!(segment.dead_count.load(Ordering::Relaxed), 45);
        assert!(segment.is_dead(69) && !segment.is_dead(70));
    }
}
