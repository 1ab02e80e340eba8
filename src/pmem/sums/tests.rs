//! The sums are compared with another implementation's, the faults are real.

use super::super::guard::{self, ForeignSlice, ForeignSliceMut, copy_summed};
use super::super::store::complete_stores;
use super::super::{OpenOptions, Pmem, StorePlan};
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

/// Every width this processor has, the narrow one first.
fn widths() -> Vec<Width> {
    let best = Width::best();
    [Width::Narrow, Width::Wide].into_iter().filter(|width| best >= Some(*width)).collect()
}

#[test]
fn the_factors_are_those_that_are_printed_everywhere() {
    // Of the paper and of every implementation since: 4 lanes, and 1 lane, ahead.
    assert_eq!(CONSTANTS.0[1], [0x1_5444_2bd4, 0x1_c6e4_1596]);
    assert_eq!(CONSTANTS.0[4], [0x1_7519_97d0, 0x0_ccaa_009e]);
    // The last steps: 64 bits ahead, the divisor and its inverse.
    assert_eq!(CONSTANTS.0[6], [0x1_63cd_6124, 0]);
    assert_eq!(CONSTANTS.0[7], [0x1_db71_0641, 0x1_f701_1641]);
}

#[test]
#[expect(unsafe_code, reason = "calls the routines on slices")]
fn every_width_and_method_copies_those_bytes_and_no_others_and_sums_them() {
    assert!(!widths().is_empty(), "every x86-64 of this century multiplies without carries");
    for width in widths() {
        for method in StoreMethod::available() {
            let seed = 0x0123_4567_89ab_cdef;
            let mut random = Xorshift(seed);
            let (mut memory, mut model) = (vec![0u8; 40_000], vec![0u8; 40_000]);
            let first = memory.as_ptr().align_offset(64);
            for turn in 0..500 {
                let len = UNIT * (1 + random.below(20));
                let (at, skew) = (first + random.below((40_000 - first - len) / 64) * 64, random.below(64));
                let source: Vec<u8> = (0..len + skew).map(|_| random.next() as u8).collect();
                let to = memory[at..at + len].as_mut_ptr();
                assert!(takes(method, to, len));
                // SAFETY: both ranges are ours and as long as said.
                let sum = unsafe { copy(width, method, to, source[skew..].as_ptr(), len) }.unwrap();
                complete_stores();
                let what = format!("{width:?} {method}, seed {seed:#x}, turn {turn}, {len} bytes at {at}");
                assert_eq!(sum, crc32fast::hash(&source[skew..]), "{what}");
                model[at..at + len].copy_from_slice(&source[skew..]);
                assert!(memory == model, "{what}");
            }
        }
    }
}

#[test]
fn lengths_and_places_that_the_routines_cannot_have_are_declined() {
    let around = StoreMethod::available().into_iter().find(|m| matches!(m, StoreMethod::NonTemporal(..)));
    let around = around.expect("every x86-64 has it");
    let to = |at: usize| std::ptr::without_provenance_mut::<u8>(at);
    for (method, at, len, is_taken) in [
        (StoreMethod::Cached, 64, 256, true),
        (StoreMethod::Cached, 65, 4096, true),
        (StoreMethod::Cached, 64, 0, false),
        (StoreMethod::Cached, 64, 255, false),
        (StoreMethod::Cached, 64, 512 + 64, false),
        (around, 128, 4096, true),
        (around, 96, 4096, false),
    ] {
        assert_eq!(takes(method, to(at), len), is_taken, "{method}, {len} bytes at {at}");
    }
    let (source, mut target) = ([1; 100], [0; 100]);
    assert_eq!(copy_summed(ForeignSlice::from(&source[..]), &mut target), None);
    assert_eq!(target, [0; 100]);
}

#[test]
fn memory_that_has_gone_on_either_side_is_no_sum_and_no_crash() {
    guard::install().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("media");
    const LEN: u64 = 4 << 20;
    super::super::create(&path, LEN).unwrap();
    for method in StoreMethod::available() {
        let store = Some(StorePlan::uniform(method));
        let options = OpenOptions { store, lock: false, ..OpenOptions::new(&path) };
        let media = super::super::MappedPmem::open(&options).unwrap();
        let (source, mut target) = (vec![7; 8192], vec![0; 8192]);
        let sum = crc32fast::hash(&source);
        let write = |at| media.write_summed(at, ForeignSlice::from(&source[..]));
        // Measured at open: by a method for which it does not pay, nothing is summed while it is stored.
        let pays = write(0).is_some();
        assert_eq!(write(0), pays.then_some(sum), "{method}");
        media.write(0, &source).unwrap();
        media.fence();
        assert_eq!(media.read_summed(0, &mut ForeignSliceMut::from(&mut target[..])), Some(sum), "{method}");
        assert!(target == source, "{method}");
        // The hole at the beginning, in the middle, behind.
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(LEN / 2).unwrap();
        for (at, is_whole) in [(LEN / 2, false), (LEN / 2 - 4096, false), (LEN / 2 - 8192, true)] {
            assert_eq!(write(at).is_some(), is_whole && pays, "{method} at {at}");
            let read = media.read_summed(at, &mut ForeignSliceMut::from(&mut target[..]));
            assert_eq!(read.is_some(), is_whole, "{method} at {at}");
        }
        file.set_len(LEN).unwrap();
    }
}
