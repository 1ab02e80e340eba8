//! A segment's header: whose it is, in which life, and once sealed what it holds.
//!
//! Two copies at the segment's two ends, updated like all dual structures. Reading the headers of
//! all segments is the first thing recovery does, so a sealed header carries what decides whether
//! the segment must be read at all.

use super::check::{judge_crc, put_crc};
use super::corruption::Judge;
use super::dual::Sequenced;
use super::layout::{codes, layout, offset_of};
use super::{Corruption, Geometry, LOG_ALIGN, SummaryHeader, Uuid};

/// The first 4 bytes of a segment header, as a little-endian number.
pub const SEGMENT_MAGIC: u32 = u32::from_le_bytes(*b"PCSG");

const CRC: usize = offset_of(SegmentHeader::FIELDS, "crc");
const JUDGE: Judge = Judge("SegmentHeader");

codes! {
    /// Where in its life a segment is.
    pub enum SegmentState {
        /// Nobody's: what it holds does not count.
        Free = 0 "free",
        /// A volume's, and records may follow.
        Open = 1 "open",
        /// A volume's, and complete.
        Sealed = 2 "sealed",
    }
}

codes! {
    /// What a segment holds.
    pub enum SegmentKind {
        /// Records and their payload.
        Data = 0 "data",
    }
}

layout! {
    /// The state of a segment. See FORMAT.md.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct SegmentHeader: 256 {
        frame { 0 magic: u32, 4 crc: u32 }
        /// Raised by each update.
        8 sequence: u64,
        /// The cache it belongs to.
        16 cache_uuid: Uuid,
        /// The segment.
        32 segment: u32,
        /// Where in its life it is.
        36 state: SegmentState,
        /// What it holds.
        37 kind: SegmentKind,
        /// Which of its volume's streams filled it.
        38 stream: u16,
        /// The volume that owns it.
        40 incarnation: u64,
        /// Counts its lives; raised when it is freed.
        48 generation: u64,
        /// The start in which it was opened.
        56 start_counter: u64,
        /// Sealed: the sequence number of its last record, 0 if it has none.
        64 last_sequence: u64,
        /// Sealed: where its last record begins; the end of the data if there is none.
        72 log_low: u32,
        /// Sealed: one past its last byte of payload; the start of the data if there is none.
        76 payload_end: u32,
        /// Sealed: where the summary starts.
        80 summary_offset: u32,
        /// Sealed: bytes of the summary; 0 if there is none.
        84 summary_len: u32,
        /// Sealed: number of keys in all its records.
        88 key_count: u32,
        /// Sealed: the highest version of its keys.
        96 max_version: u64,
        /// Sealed: the lowest epoch of its keys.
        104 min_epoch: u64,
        /// Sealed: the highest epoch of its keys.
        112 max_epoch: u64,
    }
}

impl SegmentHeader {
    /// Its bytes; the rest of their page stays zero.
    pub fn encode(&self) -> [u8; SegmentHeader::SIZE] {
        let mut bytes = [0; SegmentHeader::SIZE];
        self.put(&mut bytes);
        bytes[..4].copy_from_slice(&SEGMENT_MAGIC.to_le_bytes());
        put_crc(&mut bytes, CRC);
        bytes
    }

    /// The header of segment `segment` of the cache `cache_uuid` at the front of `bytes`.
    ///
    /// # Errors
    /// [`Corruption`]: magic, CRC, cache, segment, a code, or what a sealed segment says about its
    /// content is wrong.
    pub fn decode(
        bytes: &[u8],
        cache_uuid: &Uuid,
        geometry: &Geometry,
        segment: u32,
    ) -> Result<SegmentHeader, Corruption> {
        let bytes: &[u8; SegmentHeader::SIZE] = JUDGE.chunk(bytes)?;
        let magic = u32::from_le_bytes(*JUDGE.chunk(bytes)?);
        JUDGE.exactly("magic", SEGMENT_MAGIC.into(), magic.into())?;
        judge_crc(JUDGE, bytes, CRC)?;
        let header = SegmentHeader::get(bytes)?;
        JUDGE.cache(cache_uuid, &header.cache_uuid)?;
        JUDGE.exactly("segment", segment.into(), header.segment.into())?;
        JUDGE.counter("sequence", header.sequence)?;
        JUDGE.counter("generation", header.generation)?;
        if header.state == SegmentState::Sealed {
            header.judge_sealed(geometry)?;
        }
        Ok(header)
    }

    /// Judges what only a sealed segment says: log, summary and payload follow each other.
    fn judge_sealed(&self, geometry: &Geometry) -> Result<(), Corruption> {
        JUDGE.counter("last_sequence", self.last_sequence)?;
        let align = u64::from(LOG_ALIGN);
        let (log_low, payload_end) = (u64::from(self.log_low), u64::from(self.payload_end));
        JUDGE.at_least("payload_end", geometry.data_start().into(), payload_end)?;
        JUDGE.at_most("log_low", geometry.data_end().into(), log_low)?;
        JUDGE.at_least("log_low", payload_end, log_low)?;
        JUDGE.multiple_of("log_low", align, log_low)?;
        if self.key_count > 0 {
            JUDGE.at_most("min_epoch", self.max_epoch, self.min_epoch)?;
        }
        if self.summary_len == 0 {
            return Ok(());
        }
        let (start, len) = (u64::from(self.summary_offset), u64::from(self.summary_len));
        JUDGE.at_least("summary_offset", payload_end, start)?;
        JUDGE.multiple_of("summary_offset", align, start)?;
        JUDGE.at_least("summary_len", SummaryHeader::SIZE as u64, len)?;
        JUDGE.at_most("summary_offset + summary_len", log_low, start + len)
    }
}

impl Sequenced for SegmentHeader {
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

    fn geometry() -> Geometry {
        Geometry::custom(16 << 10, 64 << 10, 4, 1).unwrap()
    }

    fn example() -> SegmentHeader {
        SegmentHeader {
            sequence: 3,
            cache_uuid: CACHE,
            segment: 2,
            state: SegmentState::Sealed,
            kind: SegmentKind::Data,
            stream: 1,
            incarnation: 5,
            generation: 9,
            start_counter: 2,
            last_sequence: 4,
            log_low: 40 << 10,
            payload_end: 16 << 10,
            summary_offset: 17 << 10,
            summary_len: 1000,
            key_count: 20,
            max_version: 1 << 33,
            min_epoch: 6,
            max_epoch: 8,
        }
    }

    fn decode(bytes: &[u8]) -> Result<SegmentHeader, Corruption> {
        SegmentHeader::decode(bytes, &CACHE, &geometry(), 2)
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(decode(&example().encode()), Ok(example()));
        let blank = SegmentHeader { segment: 2, cache_uuid: CACHE, ..SegmentHeader::default() };
        assert_eq!(decode(&blank.encode()), Ok(blank));
    }

    #[test]
    fn every_changed_byte_is_noticed_and_no_bytes_panic() {
        assert_every_flip_is_noticed(&example().encode(), decode);
        assert_total(0x5347, &example().encode(), decode);
    }

    #[test]
    fn a_header_from_elsewhere_does_not_count() {
        let bytes = example().encode();
        let read = SegmentHeader::decode(&bytes, &[0; 16], &geometry(), 2);
        assert_eq!(read.unwrap_err().field, "cache_uuid");
        let read = SegmentHeader::decode(&bytes, &CACHE, &geometry(), 3);
        assert_eq!(read.unwrap_err().field, "segment");
    }

    #[test]
    fn a_sealed_header_that_contradicts_itself_is_refused_though_the_crc_holds() {
        for (field, bad) in [
            ("payload_end", SegmentHeader { payload_end: (12 << 10) - 1, ..example() }),
            ("payload_end", SegmentHeader { payload_end: 0, ..example() }),
            ("log_low", SegmentHeader { payload_end: u32::MAX, ..example() }),
            ("log_low", SegmentHeader { log_low: (56 << 10) + 256, ..example() }),
            ("log_low", SegmentHeader { log_low: (16 << 10) - 256, ..example() }),
            ("log_low", SegmentHeader { log_low: (40 << 10) + 1, ..example() }),
            ("min_epoch", SegmentHeader { min_epoch: 9, ..example() }),
            ("summary_offset", SegmentHeader { summary_offset: 15 << 10, ..example() }),
            ("summary_offset", SegmentHeader { summary_offset: (17 << 10) + 8, ..example() }),
            ("summary_len", SegmentHeader { summary_len: 63, ..example() }),
            ("summary_offset + summary_len", SegmentHeader { summary_len: (23 << 10) + 1, ..example() }),
            ("summary_offset + summary_len", SegmentHeader { summary_len: u32::MAX, ..example() }),
        ] {
            assert_eq!(decode(&bad.encode()).unwrap_err().field, field, "{bad:?}");
            let open = SegmentHeader { state: SegmentState::Open, ..bad };
            assert_eq!(decode(&open.encode()), Ok(open), "says nothing about its content");
        }
    }

    #[test]
    fn a_sealed_segment_may_be_empty_or_without_a_summary() {
        let none = SegmentHeader { summary_offset: 0, summary_len: 0, ..example() };
        assert_eq!(decode(&none.encode()), Ok(none));
        let (log_low, payload_end) = (56 << 10, 12 << 10);
        let empty = SegmentHeader { log_low, payload_end, key_count: 0, min_epoch: u64::MAX, ..none };
        assert_eq!(decode(&empty.encode()), Ok(empty));
    }

    #[test]
    fn unknown_states_and_kinds_are_refused() {
        for (at, field, code) in [(36, "state", 3), (36, "state", 255), (37, "kind", 1)] {
            let mut bytes = example().encode();
            bytes[at] = code;
            put_crc(&mut bytes, CRC);
            assert_eq!(decode(&bytes).unwrap_err().field, field);
        }
    }

    #[test]
    fn nothing_is_believed_for_the_crcs_sake() {
        let check = |bytes: &mut [u8]| put_crc(bytes, CRC);
        let encode = |header: &SegmentHeader| header.encode().to_vec();
        assert_total_behind_check(0x5343, &example().encode(), check, encode, decode);
    }

    #[test]
    fn the_bytes_are_these() {
        assert_golden(
            &example().encode(),
            "
             0000: 50 43 53 47 86 bc bd 0f 03 00 00 00 00 00 00 00
             0010: 11 11 11 11 11 11 11 11 11 11 11 11 11 11 11 11
             0020: 02 00 00 00 02 00 01 00 05 00 00 00 00 00 00 00
             0030: 09 00 00 00 00 00 00 00 02 00 00 00 00 00 00 00
             0040: 04 00 00 00 00 00 00 00 00 a0 00 00 00 40 00 00
             0050: 00 44 00 00 e8 03 00 00 14 00 00 00 00 00 00 00
             0060: 00 00 00 00 02 00 00 00 06 00 00 00 00 00 00 00
             0070: 08 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
            ",
        );
    }
}
