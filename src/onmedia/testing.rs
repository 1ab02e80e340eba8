//! What the tests of this module share: a seeded generator, the flip test, the golden dump.

use std::fmt::{Debug, Write as _};

/// xorshift64*: enough randomness for tests, the same on every machine.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            *byte = (self.next() >> 56) as u8;
        }
    }
}

/// Asserts that `decode` notices every single flipped bit pattern in every byte.
pub fn assert_every_flip_is_noticed<T, E>(good: &[u8], decode: impl Fn(&[u8]) -> Result<T, E>) {
    assert!(decode(good).is_ok(), "the structure itself must be valid");
    let mut bytes = good.to_vec();
    for at in 0..good.len() {
        for mask in [0x01, 0x80, 0xff] {
            bytes[at] ^= mask;
            assert!(decode(&bytes).is_err(), "byte {at} changed by {mask:#04x} was not noticed");
            bytes[at] ^= mask;
        }
    }
}

/// Asserts that `decode` bears any length and any content.
pub fn assert_total<T, E>(seed: u64, good: &[u8], decode: impl Fn(&[u8]) -> Result<T, E>) {
    let mut rng = Rng::new(seed);
    for len in 0..good.len() {
        assert!(decode(&good[..len]).is_err(), "{len} of {} bytes were enough", good.len());
    }
    for round in 0..2000 {
        let mut bytes = good.to_vec();
        if round % 2 == 0 {
            rng.fill(&mut bytes);
        } else {
            for _ in 0..1 + rng.below(8) {
                let at = rng.below(good.len() as u64) as usize;
                bytes[at] = rng.next() as u8;
            }
        }
        let changed = bytes != good;
        assert!(decode(&bytes).is_err() || !changed, "seed {seed:#x} round {round} was accepted");
    }
}

/// Asserts that whatever stands behind a right check gives an error or a value that `encode` and
/// `decode` carry over unchanged: no field is believed for the check's sake, none gets lost.
pub fn assert_total_behind_check<T: PartialEq + Debug, E: Debug>(
    seed: u64,
    good: &[u8],
    check: impl Fn(&mut [u8]),
    encode: impl Fn(&T) -> Vec<u8>,
    decode: impl Fn(&[u8]) -> Result<T, E>,
) {
    let mut rng = Rng::new(seed);
    let (mut accepted, mut refused) = (0, 0);
    // Where the values are; what lies beyond is reserved.
    let used = good.iter().rposition(|&byte| byte != 0).unwrap_or(0) as u64 + 1;
    for round in 0..4000 {
        let mut bytes = good.to_vec();
        for _ in 0..1 + rng.below(3) {
            let at = rng.below(used) as usize;
            let extreme = [0x00, 0x01, 0x7f, 0x80, 0xff, rng.next() as u8];
            let width = 1 + rng.below(8).min(used - 1 - at as u64) as usize;
            bytes[at..at + width].fill(extreme[rng.below(6) as usize]);
        }
        check(&mut bytes);
        match decode(&bytes) {
            Ok(value) => {
                let again = decode(&encode(&value));
                assert_eq!(again.as_ref().ok(), Some(&value), "seed {seed:#x} round {round}");
                accepted += 1;
            }
            Err(_) => refused += 1,
        }
    }
    assert!(accepted > 40 && refused > 40, "reached nothing: {accepted} accepted, {refused} refused");
}

/// A hex dump, 16 bytes a line, lines of zeros left out.
pub fn dump(bytes: &[u8]) -> String {
    let mut out = String::new();
    for (line, chunk) in bytes.chunks(16).enumerate() {
        if chunk.iter().any(|&byte| byte != 0) {
            write!(out, "{:04x}:", line * 16).unwrap();
            for byte in chunk {
                write!(out, " {byte:02x}").unwrap();
            }
            out.push('\n');
        }
    }
    out
}

/// Asserts that `bytes` dump as `golden` says, leading blanks apart.
pub fn assert_golden(bytes: &[u8], golden: &str) {
    let golden: Vec<&str> = golden.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let found = dump(bytes);
    assert_eq!(found.lines().collect::<Vec<_>>(), golden, "the bytes are\n{found}");
}
