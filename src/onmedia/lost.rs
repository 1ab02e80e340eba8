//! Lost ranges: sectors whose newest content the media lost before the disk had it.
//!
//! They stand in the volume's tail page, so that one update moves the tail past the keys concerned
//! and remembers that they are lost; there is no moment between the two.
//!
//! Invariants of a range that was decoded: at least one sector, none past 2^48, a known cause.

use super::corruption::Judge;
use super::key::VOLUME_SECTORS_MAX;
use super::layout::{codes, layout};
use super::{Corruption, Expected, Field};
use crate::units::SectorRange;

/// Most lost ranges of a volume: what a tail page has room for.
pub const LOST_MAX: usize = 167;

const FIRST_BITS: u32 = 48;
const JUDGE: Judge = Judge("LostRange");

codes! {
    /// How the content was lost.
    pub enum LostCause {
        /// It did not match its checksum.
        Checksum = 1 "checksum",
        /// The media could not be read there.
        Unreadable = 2 "unreadable",
    }
}

/// Sectors of a volume that answer with an error until they are overwritten.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LostRange {
    /// The sectors.
    pub range: SectorRange,
    /// The version of the key that was lost: newer keys count, this one and older ones do not.
    pub version: u64,
    /// When it was found, seconds since 1970 UTC.
    pub time_s: u32,
    /// How it was lost.
    pub cause: LostCause,
}

layout! {
    /// A lost range's three words as they are on the media.
    struct RawLost: 24 {
        frame {}
        0 word0: u64,
        8 sectors: u32,
        12 time_s: u32,
        16 version: u64,
    }
}

impl LostRange {
    /// Bytes it takes on the media.
    pub const SIZE: usize = RawLost::SIZE;
    /// Where its fields lie.
    pub const FIELDS: &'static [Field] = RawLost::FIELDS;

    pub(super) fn encode(&self, out: &mut [u8; LostRange::SIZE]) {
        let word0 = self.range.start | (self.cause as u64) << FIRST_BITS;
        let sectors = self.range.len as u32;
        RawLost { word0, sectors, time_s: self.time_s, version: self.version }.put(out);
    }

    pub(super) fn decode(bytes: &[u8; LostRange::SIZE]) -> Result<LostRange, Corruption> {
        let raw = RawLost::get(bytes)?;
        let (first, sectors) = (raw.word0 & (VOLUME_SECTORS_MAX - 1), u64::from(raw.sectors));
        let code = raw.word0 >> FIRST_BITS;
        let cause = u8::try_from(code).ok().and_then(LostCause::from_code);
        JUDGE.that(cause.is_some(), "cause", Expected::Text("a code of LostCause"), code)?;
        JUDGE.at_least("sectors", 1, sectors)?;
        JUDGE.at_most("first + sectors", VOLUME_SECTORS_MAX, first + sectors)?;
        Ok(LostRange {
            range: SectorRange::new(first, sectors),
            version: raw.version,
            time_s: raw.time_s,
            cause: cause.unwrap_or(LostCause::Checksum),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> LostRange {
        LostRange { range: SectorRange::new(0xabcd, 9), version: 7, time_s: 5, cause: LostCause::Unreadable }
    }

    fn encoded(lost: &LostRange) -> [u8; LostRange::SIZE] {
        let mut bytes = [0; LostRange::SIZE];
        lost.encode(&mut bytes);
        bytes
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(LostRange::decode(&encoded(&example())), Ok(example()));
    }

    #[test]
    fn fields_out_of_bounds_are_refused() {
        let end = SectorRange::new(VOLUME_SECTORS_MAX - 1, 1);
        assert!(LostRange::decode(&encoded(&LostRange { range: end, ..example() })).is_ok());
        let past = SectorRange::new(VOLUME_SECTORS_MAX - 1, 2);
        let error = LostRange::decode(&encoded(&LostRange { range: past, ..example() })).unwrap_err();
        assert_eq!(error.field, "first + sectors");
        for (at, bad, field) in [(6, 0, "cause"), (6, 3, "cause"), (7, 1, "cause"), (8, 0, "sectors")] {
            let mut bytes = encoded(&example());
            bytes[at] = bad;
            assert_eq!(LostRange::decode(&bytes).unwrap_err().field, field, "byte {at}");
        }
    }
}
