//! The sidecar: what stands beside a disk, so that a disk and a cache that do not belong together,
//! or no longer do, are told apart without believing either.

use std::borrow::Cow;

use super::check::{judge_crc, put_crc};
use super::corruption::Judge;
use super::dual::Sequenced;
use super::layout::{layout, offset_of};
use super::{Corruption, PAGE, Uuid, unpad};

/// The first 8 bytes of a sidecar, as a little-endian number.
pub const SIDECAR_MAGIC: u64 = u64::from_le_bytes(*b"PCVSIDEC");

const CRC: usize = offset_of(Sidecar::FIELDS, "crc");
const JUDGE: Judge = Judge("Sidecar");

layout! {
    /// One copy of a disk's sidecar. See FORMAT.md.
    #[derive(Clone, PartialEq, Eq, Debug)]
    pub struct Sidecar: 4096 {
        frame { 0 magic: u64, 8 crc: u32 }
        /// Of the pair of cache and disk; raised by each step of it.
        16 generation: u64,
        /// Drawn with it: tells two histories of one generation apart.
        24 nonce: u64,
        /// The cache.
        32 cache_uuid: Uuid,
        /// The volume in it.
        48 volume_uuid: Uuid,
        /// When it was written, milliseconds since 1970 UTC.
        64 time_ms: u64,
        /// The volume's name, as text.
        72 name: [u8; 64],
    }
}

impl Sidecar {
    /// The volume's name, whatever its bytes.
    pub fn name_text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(unpad(&self.name))
    }

    /// Whether a page begins like a sidecar, whole or not.
    pub fn is_claimed(bytes: &[u8]) -> bool {
        bytes.starts_with(&SIDECAR_MAGIC.to_le_bytes())
    }

    /// Its page.
    pub fn encode(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        self.put(&mut page);
        page[..8].copy_from_slice(&SIDECAR_MAGIC.to_le_bytes());
        put_crc(&mut page, CRC);
        page
    }

    /// The sidecar in a page.
    ///
    /// # Errors
    /// [`Corruption`]: magic, CRC or generation is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Sidecar, Corruption> {
        let page: &[u8; PAGE] = JUDGE.chunk(bytes)?;
        JUDGE.exactly("magic", SIDECAR_MAGIC, u64::from_le_bytes(*JUDGE.chunk(page)?))?;
        judge_crc(JUDGE, page, CRC)?;
        let sidecar = Sidecar::get(page)?;
        JUDGE.at_least("generation", 1, sidecar.generation)?;
        JUDGE.counter("generation", sidecar.generation)?;
        Ok(sidecar)
    }
}

impl Sequenced for Sidecar {
    fn sequence(&self) -> u64 {
        self.generation
    }
}

#[cfg(test)]
mod tests {
    use super::super::pad;
    use super::super::testing::{
        assert_every_flip_is_noticed, assert_golden, assert_total, assert_total_behind_check,
    };
    use super::*;

    fn example() -> Sidecar {
        Sidecar {
            generation: 3,
            nonce: 0x0807_0605_0403_0201,
            cache_uuid: [0x11; 16],
            volume_uuid: [0x33; 16],
            time_ms: 1_700_000_000_123,
            name: pad("vm-1").unwrap(),
        }
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(Sidecar::decode(&example().encode()), Ok(example()));
        assert_eq!(example().name_text(), "vm-1");
        assert!(Sidecar::is_claimed(&example().encode()) && !Sidecar::is_claimed(&[0; PAGE]));
    }

    #[test]
    fn every_changed_byte_is_noticed_and_no_bytes_panic() {
        assert_every_flip_is_noticed(&example().encode(), Sidecar::decode);
        assert_total(0x5343, &example().encode(), Sidecar::decode);
    }

    #[test]
    fn nothing_is_believed_for_the_crcs_sake() {
        let check = |page: &mut [u8]| put_crc(page, CRC);
        let encode = |sidecar: &Sidecar| sidecar.encode().to_vec();
        assert_total_behind_check(0x5344, &example().encode(), check, encode, Sidecar::decode);
    }

    #[test]
    fn the_bytes_are_these() {
        assert_golden(
            &example().encode(),
            "
             0000: 50 43 56 53 49 44 45 43 fb 42 91 d3 00 00 00 00
             0010: 03 00 00 00 00 00 00 00 01 02 03 04 05 06 07 08
             0020: 11 11 11 11 11 11 11 11 11 11 11 11 11 11 11 11
             0030: 33 33 33 33 33 33 33 33 33 33 33 33 33 33 33 33
             0040: 7b 68 e5 cf 8b 01 00 00 76 6d 2d 31 00 00 00 00
            ",
        );
    }
}
