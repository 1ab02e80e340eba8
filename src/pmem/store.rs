//! How bytes get from private memory to the media, and which way is the fastest here.
//!
//! A DAX store is durable after its lines have left the processor's caches and a fence. There are
//! two ways there: non-temporal stores, which go around the cache, or ordinary ones followed by a
//! write-back of each line. Which wins depends on the processor and, more, on the hypervisor (a
//! `clwb` can cost 100 ns under one), so it is measured at open and not believed. On other media
//! durability is the kernel's business and the ordinary stores need no write-back, but a large store
//! to lines that are not in the cache is still faster around it: it reads none of them before.
//! Invariants:
//!
//! 1. Whatever a [`StorePlan`] of a DAX class chooses, the calling thread's next `sfence` makes the
//!    whole range durable: each of its lines is stored non-temporally in full, or written back.
//! 2. Lines are written back even where the platform claims that its caches are persistent: the
//!    cost is small next to that of a wrong claim.
//! 3. Whatever a plan chooses, another thread sees the stores only after that fence: the processor
//!    keeps non-temporal ones in no order.
//! 4. Aligned 8-byte words are stored whole (see [`super::routines`]).

use std::fmt;

use super::guard::Fault;
#[cfg(target_arch = "x86_64")]
use super::{guard::answer, routines};

/// Bytes in a cache line.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// The instruction that writes a line back to memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LineFlush {
    /// Keeps the line in the cache.
    Clwb,
    /// Drops the line from the cache.
    Clflushopt,
    /// Drops the line and orders itself after other flushes, hence slow; every x86-64 has it.
    Clflush,
}

/// The width of a non-temporal store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NtWidth {
    /// 16 bytes; every x86-64 has it.
    Sse2,
    /// 32 bytes.
    Avx2,
    /// 64 bytes.
    Avx512,
}

/// One way to store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StoreMethod {
    /// Ordinary stores and nothing more: not for DAX.
    Cached,
    /// Ordinary stores, then a write-back of each line.
    CachedFlush(LineFlush),
    /// Non-temporal stores of whole lines; [`StoreMethod::CachedFlush`] of the ends.
    NonTemporal(NtWidth, LineFlush),
}

impl fmt::Display for LineFlush {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LineFlush::Clwb => "clwb",
            LineFlush::Clflushopt => "clflushopt",
            LineFlush::Clflush => "clflush",
        })
    }
}

impl fmt::Display for NtWidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NtWidth::Sse2 => "sse2",
            NtWidth::Avx2 => "avx2",
            NtWidth::Avx512 => "avx512",
        })
    }
}

impl fmt::Display for StoreMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreMethod::Cached => f.write_str("cached"),
            StoreMethod::CachedFlush(flush) => write!(f, "cached+{flush}"),
            StoreMethod::NonTemporal(width, flush) => write!(f, "non-temporal-{width}+{flush}"),
        }
    }
}

/// Which method for which length.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StorePlan {
    /// For stores shorter than `large_len_min`.
    small: StoreMethod,
    /// For the others.
    large: StoreMethod,
    /// Bytes from which a store is large.
    large_len_min: usize,
}

impl StorePlan {
    /// The same method for every length. Panics if this processor lacks it: see
    /// [`StoreMethod::available`].
    pub fn uniform(method: StoreMethod) -> Self {
        assert!(method.is_available(), "this processor has no {method}");
        Self { small: method, large: method, large_len_min: 0 }
    }

    /// The method for `len` bytes.
    #[inline]
    pub fn method(&self, len: usize) -> StoreMethod {
        if len < self.large_len_min { self.small } else { self.large }
    }

    /// Whether a fence after these stores makes them durable on DAX.
    pub fn is_durable(&self) -> bool {
        self.small != StoreMethod::Cached && self.large != StoreMethod::Cached
    }
}

impl fmt::Display for StorePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.small == self.large {
            return write!(f, "{}", self.large);
        }
        write!(f, "{} from {} bytes, {} below", self.large, self.large_len_min, self.small)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _mm_sfence};
    use std::sync::OnceLock;
    use std::time::Instant;

    use super::super::sums::{self, Width};
    use super::{Fault, LINE, LineFlush, NtWidth, StoreMethod, StorePlan, answer, routines};

    impl LineFlush {
        /// The cheapest this processor has.
        pub fn best() -> Self {
            [LineFlush::Clwb, LineFlush::Clflushopt]
                .into_iter()
                .find(|flush| flush.is_available())
                .unwrap_or(LineFlush::Clflush)
        }

        /// Whether this processor has it.
        #[expect(unsafe_code, reason = "CPUID is unsafe in the Rust this crate supports")]
        #[allow(unused_unsafe, reason = "and safe in a later one")]
        pub fn is_available(self) -> bool {
            // SAFETY: every x86-64 processor has CPUID and leaf 0, which says whether 7 exists.
            let features = unsafe { if __cpuid(0).eax < 7 { 0 } else { __cpuid_count(7, 0).ebx } };
            match self {
                LineFlush::Clwb => features & 1 << 24 != 0,
                LineFlush::Clflushopt => features & 1 << 23 != 0,
                LineFlush::Clflush => true,
            }
        }
    }

    impl NtWidth {
        /// The widest this processor and system have.
        pub fn best() -> Self {
            [NtWidth::Avx512, NtWidth::Avx2]
                .into_iter()
                .find(|width| width.is_available())
                .unwrap_or(NtWidth::Sse2)
        }

        /// Whether this processor and system have it.
        pub fn is_available(self) -> bool {
            match self {
                NtWidth::Sse2 => true,
                NtWidth::Avx2 => is_x86_feature_detected!("avx2"),
                NtWidth::Avx512 => is_x86_feature_detected!("avx512f"),
            }
        }
    }

    impl StoreMethod {
        /// Whether this processor has the instructions.
        pub fn is_available(self) -> bool {
            match self {
                StoreMethod::Cached => true,
                StoreMethod::CachedFlush(flush) => flush.is_available(),
                StoreMethod::NonTemporal(width, flush) => width.is_available() && flush.is_available(),
            }
        }

        /// Every method this processor has.
        pub fn available() -> Vec<StoreMethod> {
            let flushes = [LineFlush::Clwb, LineFlush::Clflushopt, LineFlush::Clflush];
            let widths = [NtWidth::Sse2, NtWidth::Avx2, NtWidth::Avx512];
            [StoreMethod::Cached]
                .into_iter()
                .chain(flushes.map(StoreMethod::CachedFlush))
                .chain(widths.map(|width| StoreMethod::NonTemporal(width, LineFlush::best())))
                .filter(|method| method.is_available())
                .collect()
        }

        /// Stores `src` at `to`.
        ///
        /// # Errors
        /// [`Fault`]: some of the memory is not there; what is there may have been written.
        ///
        /// # Safety
        /// As for [`copy_out`](super::super::guard::copy_out), and the processor has the method.
        #[expect(unsafe_code, reason = "the contract on `to` cannot be checked")]
        #[inline]
        pub(in crate::pmem) unsafe fn store(self, to: *mut u8, src: &[u8]) -> Result<(), Fault> {
            // SAFETY: passed on from the caller.
            unsafe {
                match self {
                    StoreMethod::Cached => answer(routines::store(to, src.as_ptr(), src.len())),
                    StoreMethod::CachedFlush(flush) => store_and_flush(flush, to, src),
                    StoreMethod::NonTemporal(width, flush) => store_around(width, flush, to, src),
                }
            }
        }
    }

    impl StoreMethod {
        /// Whether [`StoreMethod::store_summed`] beats steps here, for blocks of 4 KiB: measured.
        pub(in crate::pmem) fn sums_in_one_pass(self) -> bool {
            sums::pays(self)
        }

        /// Stores `len` bytes from `from` at `to`, and returns their CRC-32, each byte loaded once. `None`:
        /// there is no such way here for that length and place, or some of either side is not there.
        ///
        /// # Safety
        /// As for [`StoreMethod::store`], for both ranges.
        #[expect(unsafe_code, reason = "the contract on the places cannot be checked")]
        #[inline]
        pub(in crate::pmem) unsafe fn store_summed(
            self,
            to: *mut u8,
            from: *const u8,
            len: usize,
        ) -> Option<u32> {
            let width = Width::best().filter(|_| sums::takes(self, to, len))?;
            // SAFETY: passed on from the caller; width, length and place have been asked for, and lines
            // that are whole lie in the range.
            unsafe {
                let sum = sums::copy(width, self, to, from, len).ok()?;
                if let StoreMethod::CachedFlush(flush) = self {
                    flush_lines(flush, to, to.wrapping_add(len)).ok()?;
                }
                Some(sum)
            }
        }
    }

    /// Bytes stored before their lines are written back: few enough to be still in the first level
    /// of the cache, many enough that write-backs overlap.
    const FLUSH_CHUNK: usize = 4096;

    #[expect(unsafe_code, reason = "the contract on `to` cannot be checked")]
    unsafe fn store_and_flush(flush: LineFlush, mut to: *mut u8, src: &[u8]) -> Result<(), Fault> {
        for chunk in src.chunks(FLUSH_CHUNK) {
            let first = to.wrapping_sub(to.addr() % LINE);
            let end = to.wrapping_add(chunk.len());
            // SAFETY: the caller vouches for `to ..` and for the instruction; the first and last
            // line hold at least one byte of that, and a page holds whole lines.
            unsafe {
                answer(routines::store(to, chunk.as_ptr(), chunk.len()))?;
                flush_lines(flush, first, end)?;
            }
            to = end;
        }
        Ok(())
    }

    impl StorePlan {
        /// Writes the lines of a range back, whoever stored them; the next fence completes it.
        ///
        /// # Errors
        /// [`Fault`]: some of the memory is not there.
        ///
        /// # Safety
        /// As for [`copy_in`](super::super::guard::copy_in) of the range.
        #[expect(unsafe_code, reason = "the contract on `first` cannot be checked")]
        pub(in crate::pmem) unsafe fn write_back(&self, first: *mut u8, len: usize) -> Result<(), Fault> {
            let flush = match self.small {
                // Not on DAX, where alone lines need it.
                StoreMethod::Cached => return Ok(()),
                StoreMethod::CachedFlush(flush) | StoreMethod::NonTemporal(_, flush) => flush,
            };
            let line = first.wrapping_sub(first.addr() % LINE);
            // SAFETY: the caller vouches for the range, a plan for the instruction, and a page holds
            // whole lines.
            unsafe { flush_lines(flush, line, first.wrapping_add(len)) }
        }
    }

    /// Writes back the lines from `first`, which is aligned, to before `end`.
    #[expect(unsafe_code, reason = "the contract on `first` cannot be checked")]
    unsafe fn flush_lines(flush: LineFlush, first: *mut u8, end: *mut u8) -> Result<(), Fault> {
        // SAFETY: the caller vouches for the lines and for the instruction.
        unsafe {
            answer(match flush {
                LineFlush::Clwb => routines::flush_clwb(first, end),
                LineFlush::Clflushopt => routines::flush_clflushopt(first, end),
                LineFlush::Clflush => routines::flush_clflush(first, end),
            })
        }
    }

    #[expect(unsafe_code, reason = "the contract on `to` cannot be checked")]
    unsafe fn store_around(width: NtWidth, flush: LineFlush, to: *mut u8, src: &[u8]) -> Result<(), Fault> {
        let head_len = (to.addr().next_multiple_of(LINE) - to.addr()).min(src.len());
        let (head, rest) = src.split_at(head_len);
        let (lines, tail) = rest.split_at(rest.len() / LINE * LINE);
        let lines_to = to.wrapping_add(head.len());
        // SAFETY: the caller vouches for `to ..` and for the instructions; the three parts lie in
        // it, `lines_to` is aligned if there are lines, and their length is a multiple of 64.
        unsafe {
            if !head.is_empty() {
                store_and_flush(flush, to, head)?;
            }
            if !lines.is_empty() {
                answer(match width {
                    NtWidth::Sse2 => routines::nt_sse2(lines_to, lines.as_ptr(), lines.len()),
                    NtWidth::Avx2 => routines::nt_avx2(lines_to, lines.as_ptr(), lines.len()),
                    NtWidth::Avx512 => routines::nt_avx512(lines_to, lines.as_ptr(), lines.len()),
                })?;
            }
            if !tail.is_empty() {
                store_and_flush(flush, lines_to.wrapping_add(lines.len()), tail)?;
            }
        }
        Ok(())
    }

    /// Completes this thread's non-temporal stores and line write-backs, before any later store.
    #[expect(unsafe_code, reason = "SFENCE is unsafe in the Rust this crate supports")]
    #[allow(unused_unsafe, reason = "and safe in a later one")]
    #[inline]
    pub(in crate::pmem) fn complete_stores() {
        // SAFETY: every x86-64 processor has SFENCE.
        unsafe { _mm_sfence() }
    }

    /// Lengths measured: a witness, a small record, a large one, a block, several.
    const PROBE_LENS: [usize; 5] = [64, 256, 1024, 4096, 16384];
    /// Stores per sample: enough to dwarf the clock, few enough for open to stay unnoticed.
    const PROBE_STORES: usize = 32;
    /// Samples per method and length. The fastest counts: what disturbs only adds.
    const PROBE_ROUNDS: usize = 7;

    /// Bytes from which a store goes around the cache where nothing demands it. At 1 KiB it takes 0.7
    /// of the time of a cached one, at 4 KiB less than half, at 256 bytes 0.9 (benches/copy.rs), and it
    /// leaves the cache to the index.
    const PLAIN_LARGE_LEN_MIN: usize = 1024;

    impl StorePlan {
        /// The fastest durable plan, measured once per process, in about 10 ms.
        ///
        /// On private DRAM, since the media's content must not change; so on media whose write
        /// bandwidth is far below DRAM's it tells the cost of the instructions, not of the media.
        pub fn measured() -> Self {
            static PLAN: OnceLock<StorePlan> = OnceLock::new();
            *PLAN.get_or_init(measure)
        }

        /// The plan for media that need no durable stores.
        ///
        /// Not measured at open: what a cached store costs shows only when the cache is full of
        /// dirty lines, after more stores than an open has time for.
        pub fn plain() -> Self {
            Self {
                small: StoreMethod::Cached,
                large: StoreMethod::NonTemporal(NtWidth::best(), LineFlush::best()),
                large_len_min: PLAIN_LARGE_LEN_MIN,
            }
        }

        /// The plan for the lengths [`PROBE_LENS`] and the nanoseconds each method took for them.
        /// Non-temporal stores are used from the shortest length on from which they always win.
        pub(super) fn from_costs(
            cached: StoreMethod,
            around: StoreMethod,
            costs: &[(u64, u64); PROBE_LENS.len()],
        ) -> Self {
            let lost = costs.iter().rposition(|(cached_ns, around_ns)| cached_ns < around_ns);
            match lost {
                None => Self::uniform(around),
                Some(at) if at + 1 == costs.len() => Self::uniform(cached),
                Some(at) => Self { small: cached, large: around, large_len_min: PROBE_LENS[at + 1] },
            }
        }
    }

    fn measure() -> StorePlan {
        let flush = LineFlush::best();
        let cached = StoreMethod::CachedFlush(flush);
        let around = StoreMethod::NonTemporal(NtWidth::best(), flush);
        let longest = PROBE_LENS[PROBE_LENS.len() - 1];
        let source = vec![0x5a; longest];
        let mut memory = vec![0xa5; longest * PROBE_STORES + LINE];
        let skew = memory.as_ptr().align_offset(LINE);
        let costs = PROBE_LENS.map(|len| {
            let target = &mut memory[skew..][..len * PROBE_STORES];
            let mut best = (u64::MAX, u64::MAX);
            for _ in 0..PROBE_ROUNDS {
                best.0 = best.0.min(sample(cached, &source[..len], target));
                best.1 = best.1.min(sample(around, &source[..len], target));
            }
            best
        });
        tracing::debug!(?costs, %cached, %around, "store methods measured, ns");
        StorePlan::from_costs(cached, around, &costs)
    }

    /// Nanoseconds for fenced stores of `source` all over `target`, whose lines are not in the
    /// cache, as the next lines of a log never are.
    #[expect(unsafe_code, reason = "uses the media's routines on private memory")]
    fn sample(method: StoreMethod, source: &[u8], target: &mut [u8]) -> u64 {
        let range = target.as_mut_ptr_range();
        // SAFETY: the range is exclusively ours, not empty, and starts a line.
        let mut outcome = answer(unsafe { routines::flush_clflush(range.start, range.end) });
        complete_stores();
        let begin = Instant::now();
        for chunk in target.chunks_exact_mut(source.len()) {
            // SAFETY: the chunk is exclusively ours and as long as the source; only methods this
            // processor has are measured.
            outcome = outcome.and(unsafe { method.store(chunk.as_mut_ptr(), source) });
            complete_stores();
        }
        // Private memory that faults is a broken machine; its measurement must not win.
        if outcome.is_ok() { begin.elapsed().as_nanos() as u64 } else { u64::MAX }
    }
}

/// For processors without guarded routines; nothing can be mapped there (see
/// [`super::guard::install`]), so nothing is ever stored.
#[cfg(not(target_arch = "x86_64"))]
mod other {
    use super::{Fault, StoreMethod, StorePlan};

    impl StoreMethod {
        /// Whether this processor has the instructions.
        pub fn is_available(self) -> bool {
            self == StoreMethod::Cached
        }

        /// Every method this processor has.
        pub fn available() -> Vec<StoreMethod> {
            vec![StoreMethod::Cached]
        }

        #[expect(unsafe_code, reason = "one signature on every processor")]
        pub(in crate::pmem) unsafe fn store(self, _to: *mut u8, _src: &[u8]) -> Result<(), Fault> {
            Err(Fault)
        }

        pub(in crate::pmem) fn sums_in_one_pass(self) -> bool {
            false
        }

        #[expect(unsafe_code, reason = "one signature on every processor")]
        pub(in crate::pmem) unsafe fn store_summed(
            self,
            _to: *mut u8,
            _from: *const u8,
            _len: usize,
        ) -> Option<u32> {
            None
        }
    }

    impl StorePlan {
        /// There is nothing to measure.
        pub fn measured() -> Self {
            Self::uniform(StoreMethod::Cached)
        }

        /// The only one there is.
        pub fn plain() -> Self {
            Self::uniform(StoreMethod::Cached)
        }

        #[expect(unsafe_code, reason = "one signature on every processor")]
        pub(in crate::pmem) unsafe fn write_back(&self, _first: *mut u8, _len: usize) -> Result<(), Fault> {
            Ok(())
        }
    }

    pub(in crate::pmem) fn complete_stores() {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) use other::complete_stores;
#[cfg(target_arch = "x86_64")]
pub(super) use x86_64::complete_stores;

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests;
