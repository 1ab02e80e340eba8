//! A witness: the last record of a segment known to be whole.
//!
//! It tells the torn end of a log, which is no loss, from a record that was once good and is not
//! any more. Two lines at the segment's two ends are written in turn, record *n* into line
//! *n* mod 2, so a torn one leaves the other. A witness is flushed but not fenced for: it lags by a
//! record, which makes it cautious, never wrong.

use super::check::sip;
use super::corruption::Judge;
use super::layout::{layout, offset_of};
use super::{Corruption, Secret};

const CHECK: usize = offset_of(Witness::FIELDS, "check");
const JUDGE: Judge = Judge("Witness");

/// Keeps this check apart from all others under the same secret.
const DOMAIN: &[u8; 8] = b"witness\0";

layout! {
    /// The last record known to be whole. See FORMAT.md.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Witness: 64 {
        frame { 0 check: u64 }
        /// The life of the segment; in another life it counts as none.
        8 generation: u64,
        /// The record's sequence number; 0 for none.
        16 sequence: u64,
        /// Where that record begins, from the segment's first byte.
        24 log_low: u32,
        /// The segment.
        28 segment: u32,
    }
}

impl Witness {
    /// The line that a record's witness is written into, 0 or 1.
    pub fn line(sequence: u64) -> usize {
        (sequence % 2) as usize
    }

    /// Its line.
    #[inline]
    pub fn encode(&self, secret: &Secret) -> [u8; Witness::SIZE] {
        let mut bytes = [0; Witness::SIZE];
        self.put(&mut bytes);
        let check = check(secret, &bytes);
        bytes[CHECK..CHECK + 8].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    /// The witness of segment `segment` in a line. A line of zeros, never written, gives generation
    /// and sequence 0.
    ///
    /// # Errors
    /// [`Corruption`]: the check does not hold, or it is another segment's.
    pub fn decode(bytes: &[u8], secret: &Secret, segment: u32) -> Result<Witness, Corruption> {
        let line: &[u8; Witness::SIZE] = JUDGE.chunk(bytes)?;
        if line == &[0; Witness::SIZE] {
            return Ok(Witness { segment, ..Witness::default() });
        }
        JUDGE.exactly("check", check(secret, line), u64::from_le_bytes(*JUDGE.chunk(&line[CHECK..])?))?;
        let witness = Witness::get(line)?;
        JUDGE.exactly("segment", segment.into(), witness.segment.into())?;
        Ok(witness)
    }
}

/// SipHash of the line but its first 8 bytes.
fn check(secret: &Secret, line: &[u8; Witness::SIZE]) -> u64 {
    sip(secret, &[DOMAIN, &line[CHECK + 8..]])
}

#[cfg(test)]
mod tests {
    use super::super::testing::{
        assert_every_flip_is_noticed, assert_golden, assert_total, assert_total_behind_check,
    };
    use super::*;

    fn secret() -> Secret {
        Secret::new([0xa5; 16])
    }

    fn example() -> Witness {
        Witness { generation: 9, sequence: 4, log_low: 12544, segment: 2 }
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(Witness::decode(&example().encode(&secret()), &secret(), 2), Ok(example()));
    }

    #[test]
    fn every_changed_byte_is_noticed_and_no_bytes_panic() {
        let decode = |bytes: &[u8]| Witness::decode(bytes, &secret(), 2);
        assert_every_flip_is_noticed(&example().encode(&secret()), decode);
        assert_total(0x5749, &example().encode(&secret()), decode);
    }

    #[test]
    fn a_blank_line_is_the_witness_of_nothing() {
        let blank = Witness::decode(&[0; 64], &secret(), 2).unwrap();
        assert_eq!(blank, Witness { segment: 2, ..Witness::default() });
        for at in 0..64 {
            let mut bytes = [0; 64];
            bytes[at] = 1;
            assert!(Witness::decode(&bytes, &secret(), 2).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_line_of_another_segment_or_cache_does_not_count() {
        let line = example().encode(&secret());
        assert_eq!(Witness::decode(&line, &secret(), 3).unwrap_err().field, "segment");
        assert_eq!(Witness::decode(&line, &Secret::new([0; 16]), 2).unwrap_err().field, "check");
    }

    #[test]
    fn consecutive_records_use_the_two_lines_in_turn() {
        assert_eq!([1, 2, 3, u64::MAX].map(Witness::line), [1, 0, 1, 1]);
    }

    #[test]
    fn nothing_is_believed_for_the_checks_sake() {
        let rehash = |line: &mut [u8]| {
            let right = sip(&secret(), &[DOMAIN, &line[8..]]);
            line[..8].copy_from_slice(&right.to_le_bytes());
        };
        let encode = |witness: &Witness| witness.encode(&secret()).to_vec();
        let decode = |bytes: &[u8]| Witness::decode(bytes, &secret(), 2);
        assert_total_behind_check(0x5343, &example().encode(&secret()), rehash, encode, decode);
    }

    #[test]
    fn the_bytes_are_these() {
        assert_golden(
            &example().encode(&secret()),
            "
             0000: f1 58 7f d7 ad 28 5a 67 09 00 00 00 00 00 00 00
             0010: 04 00 00 00 00 00 00 00 00 31 00 00 02 00 00 00
            ",
        );
    }
}
