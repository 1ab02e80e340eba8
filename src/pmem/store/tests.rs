//! Durability itself cannot be seen from here (no test cuts the power of a DRAM module); what can be
//! is that every method stores the right bytes, whole words, and survives memory that vanishes.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

struct Xorshift(u64);

impl Xorshift {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

#[expect(unsafe_code, reason = "stores to a slice")]
fn store(method: StoreMethod, to: &mut [u8], src: &[u8]) {
    assert_eq!(to.len(), src.len());
    // SAFETY: `to` is exclusively ours and as long as `src`.
    unsafe { method.store(to.as_mut_ptr(), src) }.unwrap();
    complete_stores();
}

#[test]
fn every_method_stores_those_bytes_and_no_others_at_any_length_and_alignment() {
    for method in StoreMethod::available() {
        let seed = 0xdead_beef_cafe_f00d;
        let mut random = Xorshift(seed);
        let (mut memory, mut model) = (vec![0u8; 40_000], vec![0u8; 40_000]);
        for turn in 0..10_000 {
            let len = match random.below(8) {
                0..4 => random.below(20),
                4 => random.below(200),
                5 => 64 * random.below(20),
                6 => random.below(1100),
                _ => random.below(10_000),
            };
            let (at, skew) = (random.below(memory.len() - len), random.below(64));
            let source: Vec<u8> = (0..len + skew).map(|_| random.next() as u8).collect();
            store(method, &mut memory[at..at + len], &source[skew..]);
            model[at..at + len].copy_from_slice(&source[skew..]);
            let (from, to) = (at.saturating_sub(128), (at + len + 128).min(memory.len()));
            assert_eq!(
                memory[from..to],
                model[from..to],
                "{method}, seed {seed:#x}, turn {turn}, {len} bytes at {at}"
            );
        }
        assert!(memory == model, "{method}, seed {seed:#x}");
    }
}

#[test]
fn every_method_stores_aligned_words_whole() {
    const WORDS: usize = 300;
    for method in StoreMethod::available() {
        let mut memory = vec![0u64; WORDS];
        let base = memory.as_mut_ptr().expose_provenance();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stop = &stop;
            scope.spawn(move || {
                for turn in 0..20_000u64 {
                    let source = [(turn & 0xff) as u8; WORDS * 8];
                    // Sometimes all, sometimes from a word in the middle, odd lengths at the end.
                    let first = (turn % 17) as usize;
                    let len = (WORDS - first) * 8 - (turn % 3) as usize;
                    let to = std::ptr::with_exposed_provenance_mut::<u8>(base + first * 8);
                    #[expect(unsafe_code, reason = "stores to the words")]
                    // SAFETY: in the vector, which outlives the scope and is not referred to.
                    unsafe { method.store(to, &source[..len]) }.unwrap();
                    complete_stores();
                }
                stop.store(true, Ordering::Relaxed);
            });
            while !stop.load(Ordering::Relaxed) {
                // The last word may be covered in part.
                for word in 0..WORDS - 1 {
                    let from = std::ptr::with_exposed_provenance::<u64>(base + word * 8);
                    #[expect(unsafe_code, reason = "a racing read of a word")]
                    // SAFETY: as above; an aligned word is read by one access.
                    let value = unsafe { from.read_volatile() }.to_ne_bytes();
                    assert!(value.iter().all(|byte| *byte == value[0]), "{method}: torn {value:?} in {word}");
                }
            }
        });
        drop(memory);
    }
}

#[test]
fn non_temporal_stores_are_used_from_the_length_on_from_which_they_always_win() {
    let cached = StoreMethod::CachedFlush(LineFlush::Clflush);
    let around = StoreMethod::NonTemporal(NtWidth::Sse2, LineFlush::Clflush);
    let table = [
        // nanoseconds (cached, around) for 64, 256, 1024, 4096, 16384 bytes; method for 64, 256, 4096, 1 MiB
        ([(9, 1), (9, 1), (9, 1), (9, 1), (9, 1)], [around, around, around, around]),
        ([(1, 9), (9, 1), (9, 1), (9, 1), (9, 1)], [cached, around, around, around]),
        ([(1, 9), (1, 9), (1, 9), (9, 1), (9, 1)], [cached, cached, around, around]),
        // A win below a loss is noise, or not worth a second threshold.
        ([(9, 1), (9, 1), (1, 9), (9, 1), (9, 1)], [cached, cached, around, around]),
        ([(9, 1), (1, 9), (1, 9), (1, 9), (1, 9)], [cached, cached, cached, cached]),
        // A tie goes to the stores that leave the cache to others.
        ([(5, 5), (5, 5), (5, 5), (5, 5), (5, 5)], [around, around, around, around]),
    ];
    for (costs, expected) in table {
        let plan = StorePlan::from_costs(cached, around, &costs);
        assert_eq!([64, 256, 4096, 1 << 20].map(|len| plan.method(len)), expected, "{costs:?}");
    }
}

#[test]
fn the_plan_for_dax_is_durable_and_every_plan_runs_on_this_processor() {
    assert!(StorePlan::measured().is_durable(), "{}", StorePlan::measured());
    assert_eq!(StorePlan::measured(), StorePlan::measured(), "measured once per process");
    for plan in [StorePlan::measured(), StorePlan::plain()] {
        for len in [1, 64, 256, 4096, 1 << 20] {
            assert!(plan.method(len).is_available(), "{plan}");
        }
    }
}

#[test]
fn the_cached_method_is_not_durable() {
    assert!(!StorePlan::uniform(StoreMethod::Cached).is_durable());
}
