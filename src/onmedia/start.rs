//! The start page: what one run of the daemon leaves for the next to know.

use super::check::{judge_crc, put_crc};
use super::corruption::Judge;
use super::dual::Sequenced;
use super::layout::{layout, offset_of};
use super::{Corruption, PAGE, Uuid};

/// The first 8 bytes of a start page, as a little-endian number.
pub const START_MAGIC: u64 = u64::from_le_bytes(*b"PCVSTART");

const CRC: usize = offset_of(StartPage::FIELDS, "crc");
const JUDGE: Judge = Judge("StartPage");

layout! {
    /// What happened to the cache so far. See FORMAT.md.
    #[derive(Clone, PartialEq, Eq, Debug, Default)]
    pub struct StartPage: 4096 {
        frame { 0 magic: u64, 8 crc: u32 }
        /// Raised by each update.
        16 sequence: u64,
        /// The cache it belongs to.
        24 cache_uuid: Uuid,
        /// Starts so far, this one included.
        40 start_counter: u64,
        /// The kernel's boot identity at the last start.
        48 boot_id: [u8; 16],
        /// The incarnation the next volume gets; never reused.
        64 next_incarnation: u64,
        /// Raised by each takeover of the cache by another owner.
        72 owner_generation: u64,
        /// The device's count of unsafe shutdowns at the last start; 0 where there is none.
        80 unsafe_shutdowns: u64,
        /// Whether the last run ended in order.
        88 clean: bool,
        /// Whether a `sync` failed since: the page cache is not to be believed.
        89 sync_failed: bool,
    }
}

impl StartPage {
    /// Its page.
    pub fn encode(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        self.put(&mut page);
        page[..8].copy_from_slice(&START_MAGIC.to_le_bytes());
        put_crc(&mut page, CRC);
        page
    }

    /// The start page of the cache `cache_uuid` in a page.
    ///
    /// # Errors
    /// [`Corruption`]: magic, CRC, cache or a code is wrong.
    pub fn decode(bytes: &[u8], cache_uuid: &Uuid) -> Result<StartPage, Corruption> {
        let page: &[u8; PAGE] = JUDGE.chunk(bytes)?;
        JUDGE.exactly("magic", START_MAGIC, u64::from_le_bytes(*JUDGE.chunk(page)?))?;
        judge_crc(JUDGE, page, CRC)?;
        let start = StartPage::get(page)?;
        JUDGE.cache(cache_uuid, &start.cache_uuid)?;
        JUDGE.counter("sequence", start.sequence)?;
        JUDGE.counter("start_counter", start.start_counter)?;
        JUDGE.counter("next_incarnation", start.next_incarnation)?;
        JUDGE.counter("owner_generation", start.owner_generation)?;
        Ok(start)
    }
}

impl Sequenced for StartPage {
    fn sequence(&self) -> u64 {
        self.sequence
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{
        assert_every_flip_is_noticed, assert_golden, assert_total, assert_total_behind_check,
    };
    use super::*;

    const CACHE: Uuid = [0x11; 16];

    fn example() -> StartPage {
        StartPage {
            sequence: 3,
            cache_uuid: CACHE,
            start_counter: 2,
            boot_id: [0x22; 16],
            next_incarnation: 5,
            owner_generation: 1,
            unsafe_shutdowns: 9,
            clean: true,
            sync_failed: false,
        }
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(StartPage::decode(&example().encode(), &CACHE), Ok(example()));
    }

    #[test]
    fn every_changed_byte_is_noticed_and_no_bytes_panic() {
        let decode = |bytes: &[u8]| StartPage::decode(bytes, &CACHE);
        assert_every_flip_is_noticed(&example().encode(), decode);
        assert_total(0x5354, &example().encode(), decode);
    }

    #[test]
    fn a_page_of_another_cache_or_with_an_unknown_flag_does_not_count() {
        let error = StartPage::decode(&example().encode(), &[0x12; 16]).unwrap_err();
        assert_eq!((error.structure, error.field), ("StartPage", "cache_uuid"));
        let mut page = example().encode();
        page[88] = 2;
        put_crc(&mut page, CRC);
        assert_eq!(StartPage::decode(&page, &CACHE).unwrap_err().field, "clean");
    }

    #[test]
    fn nothing_is_believed_for_the_crcs_sake() {
        let check = |page: &mut [u8]| put_crc(page, CRC);
        let encode = |start: &StartPage| start.encode().to_vec();
        let decode = |bytes: &[u8]| StartPage::decode(bytes, &CACHE);
        assert_total_behind_check(0x5343, &example().encode(), check, encode, decode);
    }

    #[test]
    fn the_bytes_are_these() {
        assert_golden(
            &example().encode(),
            "
             0000: 50 43 56 53 54 41 52 54 42 e3 39 bc 00 00 00 00
             0010: 03 00 00 00 00 00 00 00 11 11 11 11 11 11 11 11
             0020: 11 11 11 11 11 11 11 11 02 00 00 00 00 00 00 00
             0030: 22 22 22 22 22 22 22 22 22 22 22 22 22 22 22 22
             0040: 05 00 00 00 00 00 00 00 01 00 00 00 00 00 00 00
             0050: 09 00 00 00 00 00 00 00 01 00 00 00 00 00 00 00
            ",
        );
    }
}
