//! Liveness words: which sectors of a segment hold nothing that counts any more.
//!
//! One aligned 8-byte word covers 32 sectors and carries its own check, so on DAX a word is either
//! the old or the new one, and anywhere a flipped bit or a word of an earlier life is noticed. A
//! word of zeros, which is how a segment's life begins, means nothing is dead.
//!
//! A word put back whole to what it was earlier in the same life is valid, and zeros are. Within a
//! life sectors only die, so the *floor*, a number of dead sectors that the words had reached, tells
//! such a word: together they then say less. It stands twice, at the segment's two ends.

use super::check::{sip, sip_words};
use super::corruption::Judge;
use super::layout::{layout, offset_of};
use super::{Corruption, Secret};

/// Sectors under one word.
pub const LIVENESS_SECTORS: u32 = 32;
/// Bytes of a word.
pub const LIVENESS_WORD: usize = 8;

/// Keeps this check apart from all others under the same secret.
const DOMAIN: u64 = u64::from_le_bytes(*b"liveness");

const FLOOR_CHECK: usize = offset_of(LivenessFloor::FIELDS, "check");
const FLOOR: Judge = Judge("LivenessFloor");

/// Keeps this check apart from all others under the same secret.
const FLOOR_DOMAIN: &[u8; 8] = b"dead\0\0\0\0";

layout! {
    /// How many sectors of a segment its liveness words say are dead, at least. See FORMAT.md.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct LivenessFloor: 64 {
        frame { 0 check: u64 }
        /// The life of the segment; in another life it counts as none.
        8 generation: u64,
        /// Dead sectors; more than the words can say means that every clean key is dead.
        16 dead: u32,
        /// The segment.
        20 segment: u32,
    }
}

impl LivenessFloor {
    /// The `dead` that no words reach: every clean key of the segment is dead.
    pub const ALL: u32 = u32::MAX;

    /// Its line.
    pub fn encode(&self, secret: &Secret) -> [u8; LivenessFloor::SIZE] {
        let mut bytes = [0; LivenessFloor::SIZE];
        self.put(&mut bytes);
        let check = floor_check(secret, &bytes);
        bytes[FLOOR_CHECK..FLOOR_CHECK + 8].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    /// The floor of segment `segment` in a line. A line of zeros, never written, gives generation and
    /// count 0.
    ///
    /// # Errors
    /// [`Corruption`]: the check does not hold, or it is another segment's.
    pub fn decode(bytes: &[u8], secret: &Secret, segment: u32) -> Result<LivenessFloor, Corruption> {
        let line: &[u8; LivenessFloor::SIZE] = FLOOR.chunk(bytes)?;
        if line == &[0; LivenessFloor::SIZE] {
            return Ok(LivenessFloor { segment, ..LivenessFloor::default() });
        }
        let found = u64::from_le_bytes(*FLOOR.chunk(&line[FLOOR_CHECK..])?);
        FLOOR.exactly("check", floor_check(secret, line), found)?;
        let floor = LivenessFloor::get(line)?;
        FLOOR.exactly("segment", segment.into(), floor.segment.into())?;
        Ok(floor)
    }
}

/// SipHash of the line but its first 8 bytes.
fn floor_check(secret: &Secret, line: &[u8; LivenessFloor::SIZE]) -> u64 {
    sip(secret, &[FLOOR_DOMAIN, &line[FLOOR_CHECK + 8..]])
}

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
    use super::super::testing::{
        Rng, assert_every_flip_is_noticed, assert_golden, assert_total, assert_total_behind_check,
    };
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

    fn floor() -> LivenessFloor {
        LivenessFloor { generation: 3, dead: 77, segment: 7 }
    }

    #[test]
    fn a_floor_is_read_as_it_was_written_and_any_change_is_noticed() {
        let decode = |bytes: &[u8]| LivenessFloor::decode(bytes, &secret(), 7);
        assert_eq!(decode(&floor().encode(&secret())), Ok(floor()));
        assert_eq!(decode(&[0; 64]), Ok(LivenessFloor { segment: 7, ..LivenessFloor::default() }));
        assert_every_flip_is_noticed(&floor().encode(&secret()), decode);
        assert_total(0x464c, &floor().encode(&secret()), decode);
        assert!(LivenessFloor::decode(&floor().encode(&secret()), &secret(), 8).is_err());
        let check = |line: &mut [u8]| {
            let check = floor_check(&secret(), &line.try_into().unwrap());
            line[..8].copy_from_slice(&check.to_le_bytes());
        };
        let encode = |floor: &LivenessFloor| floor.encode(&secret()).to_vec();
        assert_total_behind_check(0x464d, &floor().encode(&secret()), check, encode, decode);
    }

    #[test]
    fn the_floor_is_this() {
        assert_golden(
            &floor().encode(&secret()),
            "
             0000: 44 2d a4 fa e0 2a b6 46 03 00 00 00 00 00 00 00
             0010: 4d 00 00 00 07 00 00 00 00 00 00 00 00 00 00 00
            ",
        );
    }

    #[test]
    fn the_word_is_this() {
        assert_eq!(liveness_word(&secret(), 7, 3, 5, 0xff), 0xb645_0e5e_0000_00ff);
    }
}
