//! A summary: a second copy of all keys and checksums of a full segment, written when it is sealed.
//!
//! Recovery reads it instead of walking the records, and the records instead of it when it is
//! damaged. It is checked and bound to its place like a record, only its own offset is not in it:
//! the segment's header says where it lies, and a segment has one per life.

use super::check::sip_bytes;
use super::layout::{layout, offset_of};
use super::record::{Body, body_len, encode_body, pad};
use super::{Corruption, Geometry, Key, RecordError, Secret, corruption::Judge};

/// The first 4 bytes of a summary, as a little-endian number.
pub const SUMMARY_MAGIC: u32 = u32::from_le_bytes(*b"PCSM");

const CHECK: usize = offset_of(SummaryHeader::FIELDS, "check");
const JUDGE: Judge = Judge("SummaryHeader");

layout! {
    /// The head of a summary. See FORMAT.md.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct SummaryHeader: 64 {
        frame { 0 magic: u32 }
        /// Bytes of header, keys and checksums, without padding. Made by the encoder.
        4 len: u32,
        /// SipHash of those bytes, this field as zero. Made by the encoder.
        8 check: u64,
        /// The volume.
        16 incarnation: u64,
        /// The life of the segment.
        24 generation: u64,
        /// The segment.
        32 segment: u32,
        /// Number of keys. Made by the encoder.
        36 key_count: u32,
        /// Number of checksums. Made by the encoder.
        40 checksum_count: u32,
        /// Number of records whose keys these are.
        44 record_count: u32,
        /// The sequence number of the last of them.
        48 last_sequence: u64,
    }
}

/// A summary as read.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Summary {
    /// Its head.
    pub header: SummaryHeader,
    /// The segment's keys, in the order of its records.
    pub keys: Vec<Key>,
    /// The checksums of the keys' [pieces](Key::pieces), key after key.
    pub checksums: Vec<u32>,
}

/// What a summary must say to count where it was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SummaryExpect {
    /// The segment.
    pub segment: u32,
    /// The segment's generation.
    pub generation: u64,
    /// The volume that owns the segment.
    pub incarnation: u64,
}

/// Bytes a summary takes, padding included.
pub fn summary_len(keys: usize, checksums: usize) -> usize {
    pad(body_len(SummaryHeader::SIZE, keys, checksums))
}

/// Appends a summary to `out`, padded with zeros to a multiple of [`LOG_ALIGN`](super::LOG_ALIGN).
///
/// The header's `len`, `check`, `key_count` and `checksum_count` are made here. Panics when a key
/// breaks a rule its decoder would judge it by.
pub fn encode_summary(
    secret: &Secret,
    header: &SummaryHeader,
    keys: &[Key],
    checksums: &[u32],
    out: &mut Vec<u8>,
) {
    let len = body_len(SummaryHeader::SIZE, keys.len(), checksums.len());
    assert!(len <= super::SEGMENT_SIZE_MAX as usize, "a summary of {len} bytes");
    let header = SummaryHeader {
        len: len as u32,
        check: 0,
        key_count: keys.len() as u32,
        checksum_count: checksums.len() as u32,
        ..*header
    };
    let start = out.len();
    out.resize(start + pad(len), 0);
    let Some((head, body)) = out[start..].split_first_chunk_mut() else {
        unreachable!("a summary is longer than its header");
    };
    header.put(head);
    head[..4].copy_from_slice(&SUMMARY_MAGIC.to_le_bytes());
    encode_body(keys, checksums, &(0..u32::MAX), body);
    let check = sip_bytes(secret, &out[start..start + len]);
    out[start + CHECK..][..8].copy_from_slice(&check.to_le_bytes());
}

/// Reads the summary that starts at the first of `bytes`, which reach at most to the segment's end.
///
/// # Errors
/// [`RecordError`]: there is none that counts.
pub fn decode_summary(
    secret: &Secret,
    geometry: &Geometry,
    bytes: &[u8],
    expect: &SummaryExpect,
) -> Result<Summary, RecordError> {
    let mut summary = Summary::default();
    decode_summary_into(secret, geometry, bytes, expect, &mut summary)?;
    Ok(summary)
}

/// [`decode_summary`] into buffers already there. After an error their content is unspecified.
///
/// # Errors
/// [`RecordError`]: there is none that counts.
pub fn decode_summary_into(
    secret: &Secret,
    geometry: &Geometry,
    bytes: &[u8],
    expect: &SummaryExpect,
    summary: &mut Summary,
) -> Result<(), RecordError> {
    if bytes.get(..4) != Some(&SUMMARY_MAGIC.to_le_bytes()) {
        return Err(RecordError::NotARecord);
    }
    let head = JUDGE.chunk(bytes).map_err(RecordError::Damaged)?;
    let header = SummaryHeader::get(head).map_err(RecordError::Damaged)?;
    let body = Body {
        judge: JUDGE,
        head: SummaryHeader::SIZE,
        len: header.len,
        keys: header.key_count,
        checksums: header.checksum_count,
    };
    let whole = body.checked(secret, header.check, bytes).map_err(RecordError::Damaged)?;
    judge_belonging(&header, expect).map_err(RecordError::Stale)?;
    summary.header = header;
    let payload = geometry.data_start()..geometry.data_end();
    body.decode(whole, &payload, &mut summary.keys, &mut summary.checksums)
}

/// Whether a whole summary was written for the segment and life it was found in.
fn judge_belonging(header: &SummaryHeader, expect: &SummaryExpect) -> Result<(), Corruption> {
    JUDGE.exactly("segment", expect.segment.into(), header.segment.into())?;
    JUDGE.exactly("generation", expect.generation, header.generation)?;
    JUDGE.exactly("incarnation", expect.incarnation, header.incarnation)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{
        assert_every_flip_is_noticed, assert_golden, assert_total, assert_total_behind_check,
    };
    use super::super::{KeyKind, RecordExpect, decode_record};
    use super::*;

    const EXPECT: SummaryExpect = SummaryExpect { segment: 2, generation: 9, incarnation: 5 };
    const CHECKSUMS: [u32; 3] = [1, 2, 3];

    fn secret() -> Secret {
        Secret::new([0xa5; 16])
    }

    fn geometry() -> Geometry {
        Geometry::custom(16 << 10, 64 << 10, 4, 1).unwrap()
    }

    fn keys() -> [Key; 3] {
        let data = Key { first: 100, kind: KeyKind::Data, sectors: 9, payload: 88, version: 7, epoch: 6 };
        let fill = Key { kind: KeyKind::Fill, sectors: 1, payload: 97, version: 9, ..data };
        [data, Key { kind: KeyKind::Zero, payload: 0, version: 8, ..data }, fill]
    }

    fn encoded() -> Vec<u8> {
        let header = SummaryHeader {
            incarnation: EXPECT.incarnation,
            generation: EXPECT.generation,
            segment: EXPECT.segment,
            record_count: 2,
            last_sequence: 4,
            ..SummaryHeader::default()
        };
        let mut out = Vec::new();
        encode_summary(&secret(), &header, &keys(), &CHECKSUMS, &mut out);
        out
    }

    fn decode(bytes: &[u8]) -> Result<Summary, RecordError> {
        decode_summary(&secret(), &geometry(), bytes, &EXPECT)
    }

    #[test]
    fn what_was_written_is_read() {
        let bytes = encoded();
        assert_eq!(bytes.len(), summary_len(3, 3));
        let summary = decode(&bytes).unwrap();
        assert_eq!((&summary.keys[..], &summary.checksums[..]), (&keys()[..], &CHECKSUMS[..]));
        assert_eq!((summary.header.len, summary.header.record_count), (172, 2));
        let mut reused = Summary { keys: vec![keys()[0]; 9], checksums: vec![7; 9], ..Summary::default() };
        decode_summary_into(&secret(), &geometry(), &bytes, &EXPECT, &mut reused).unwrap();
        assert_eq!(reused, summary);
    }

    #[test]
    fn every_changed_byte_is_noticed_and_no_bytes_panic() {
        assert_every_flip_is_noticed(&encoded()[..172], decode);
        assert_total(0x534d, &encoded()[..172], decode);
    }

    #[test]
    fn a_left_over_is_told_from_damage() {
        for (field, expect) in [
            ("segment", SummaryExpect { segment: 3, ..EXPECT }),
            ("generation", SummaryExpect { generation: 8, ..EXPECT }),
            ("incarnation", SummaryExpect { incarnation: 6, ..EXPECT }),
        ] {
            let read = decode_summary(&secret(), &geometry(), &encoded(), &expect);
            assert!(matches!(read, Err(RecordError::Stale(c)) if c.field == field), "{field}");
        }
        assert_eq!(decode(&[0; 512]), Err(RecordError::NotARecord));
    }

    #[test]
    fn keys_out_of_the_segment_are_refused_though_the_check_holds() {
        for payload in [0, 8, 23, 112, u32::MAX] {
            let mut bytes = encoded();
            bytes[64 + 12..64 + 16].copy_from_slice(&payload.to_le_bytes());
            bytes[CHECK..CHECK + 8].fill(0);
            let check = sip_bytes(&secret(), &bytes[..172]);
            bytes[CHECK..CHECK + 8].copy_from_slice(&check.to_le_bytes());
            assert!(matches!(decode(&bytes), Err(RecordError::Damaged(_))), "{payload}");
        }
    }

    #[test]
    fn a_summary_is_no_record() {
        let expect = RecordExpect { segment: 2, generation: 9, incarnation: 5, offset: 0 };
        let read = decode_record(&secret(), &geometry(), &encoded(), &expect);
        assert_eq!(read, Err(RecordError::NotARecord));
    }

    #[test]
    fn nothing_is_believed_for_the_checks_sake() {
        let rehash = |bytes: &mut [u8]| {
            let len = u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize;
            bytes[CHECK..CHECK + 8].fill(0);
            let check = sip_bytes(&secret(), &bytes[..len.min(bytes.len())]);
            bytes[CHECK..CHECK + 8].copy_from_slice(&check.to_le_bytes());
        };
        // Reserved bytes are not kept, so the check may differ.
        let decode = |bytes: &[u8]| {
            decode(bytes).map(|mut summary| {
                summary.header.check = 0;
                summary
            })
        };
        let encode = |summary: &Summary| {
            let mut out = Vec::new();
            encode_summary(&secret(), &summary.header, &summary.keys, &summary.checksums, &mut out);
            out
        };
        assert_total_behind_check(0x5343, &encoded(), rehash, encode, decode);
    }

    #[test]
    fn the_bytes_are_these() {
        assert_golden(
            &encoded(),
            "
             0000: 50 43 53 4d ac 00 00 00 1a 85 bd 59 59 92 87 c2
             0010: 05 00 00 00 00 00 00 00 09 00 00 00 00 00 00 00
             0020: 02 00 00 00 03 00 00 00 03 00 00 00 02 00 00 00
             0030: 04 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
             0040: 64 00 00 00 00 00 01 00 09 00 00 00 58 00 00 00
             0050: 07 00 00 00 00 00 00 00 06 00 00 00 00 00 00 00
             0060: 64 00 00 00 00 00 02 00 09 00 00 00 00 00 00 00
             0070: 08 00 00 00 00 00 00 00 06 00 00 00 00 00 00 00
             0080: 64 00 00 00 00 00 04 00 01 00 00 00 61 00 00 00
             0090: 09 00 00 00 00 00 00 00 06 00 00 00 00 00 00 00
             00a0: 01 00 00 00 02 00 00 00 03 00 00 00 00 00 00 00
            ",
        );
    }
}
