//! Liveness words: which sectors of a segment hold nothing that counts any more.
//!
//! One aligned 8-byte word covers 32 sectors and carries its own check, so on DAX a word is either
//! the old or the new one, and anywhere a flipped bit or a word of an earlier life is noticed. A
//! word of zeros, which is how a segment's life begins, means nothing is dead.

use super::check::sip_words;
use super::corruption::Judge;
use super::{Corruption, Secret};

/// Sectors under one word.
pub const LIVENESS_SECTORS: u32 = 32;
/// Bytes of a word.
pub const LIVENESS_WORD: usize = 8;

/// Keeps this check apart from all others under the same secret.
const DOMAIN: u64 = u64::from_le_bytes(*b"liveness");

/// The word that says which of 32 sectors are dead: bit *i* of `dead_bits` stands for sector
/// `index * 32 + i` of the segment.
pub fn liveness_word(secret: &Secret, segment: u32, generation: u64, index: u32, dead_bits: u32) -> u64 {
    let check = sip_words(secret, &[DOMAIN, segment.into(), generation, index.into(), dead_bits.into()]);
    u64::from(dead_bits) | check << 32
}

/// Which of 32 sectors a word says are dead.
///
/// # Errors
/// [`Corruption`]: the check does not hold. All clean keys under it must be taken for dead.
pub fn liveness_bits(
    secret: &Secret,
    segment: u32,
    generation: u64,
    index: u32,
    word: u64,
) -> Result<u32, Corruption> {
    if word == 0 {
        return Ok(0);
    }
    let dead_bits = word as u32;
    let right = liveness_word(secret, segment, generation, index, dead_bits);
    Judge("liveness word").exactly("word", right, word)?;
    Ok(dead_bits)
}

#[cfg(test)]
mod tests {
    use super::super::testing::Rng;
    use super::*;

    fn secret() -> Secret {
        Secret::new([0xa5; 16])
    }

    #[test]
    fn what_was_written_is_read() {
        let seed = 0x6c69_7665;
        let mut rng = Rng::new(seed);
        for round in 0..1000 {
            let (segment, generation, index) = (rng.next() as u32, rng.next(), rng.next() as u32);
            let bits = rng.next() as u32;
            let word = liveness_word(&secret(), segment, generation, index, bits);
            let read = liveness_bits(&secret(), segment, generation, index, word);
            assert_eq!(read, Ok(bits), "seed {seed:#x} round {round}");
        }
    }

    #[test]
    fn a_blank_word_means_nothing_is_dead() {
        assert_eq!(liveness_bits(&secret(), 1, 2, 3, 0), Ok(0));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let word = liveness_word(&secret(), 7, 3, 1023, 0x8000_0001);
        for bit in 0..64 {
            assert!(liveness_bits(&secret(), 7, 3, 1023, word ^ 1 << bit).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_word_of_another_place_life_or_cache_is_noticed() {
        let word = liveness_word(&secret(), 7, 3, 5, 0xff);
        assert!(liveness_bits(&secret(), 8, 3, 5, word).is_err());
        assert!(liveness_bits(&secret(), 7, 4, 5, word).is_err());
        assert!(liveness_bits(&secret(), 7, 3, 6, word).is_err());
        assert!(liveness_bits(&Secret::new([0; 16]), 7, 3, 5, word).is_err());
    }

    #[test]
    fn the_word_is_this() {
        assert_eq!(liveness_word(&secret(), 7, 3, 5, 0xff), 0xb645_0e5e_0000_00ff);
    }
}
