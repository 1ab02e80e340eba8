//! Structures on the media: any bytes give a value or an error, and a value gives its bytes again.
//!
//! The first byte names a decoder and says whether the bytes that follow get a right check first:
//! without that a mutation would hardly ever come past it.

use super::Input;
use crate::onmedia::{
    Geometry, KEY_SECTORS_MAX, Key, MemberLabel, PAGE, RecordExpect, RecordHeader, Secret, SegmentHeader,
    StartPage, SummaryExpect, SummaryHeader, Superblock, Tail, VOLUME_SECTORS_MAX, VolumeDescriptor, Witness,
    backup_superblock, decode_record, decode_summary, encode_record, encode_summary, liveness_bits,
    liveness_word, record_len, sip, summary_len,
};

const SECRET: [u8; 16] = [7; 16];
const UUID: [u8; 16] = [9; 16];

fn geometry() -> Geometry {
    Geometry::custom(16 << 10, 64 << 10, 8, 1).expect("a geometry")
}

/// The target.
pub fn media(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let choice = input.byte();
    let repaired = choice & 0x80 == 0;
    let secret = Secret::new(SECRET);
    let mut bytes = input.rest().to_vec();
    let crc_at = |repaired: bool, bytes: &mut Vec<u8>, size: usize, at: usize| {
        bytes.resize(size, 0);
        if repaired {
            bytes[at..at + 4].fill(0);
            let crc = crc32fast::hash(bytes);
            bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        }
    };
    match choice & 7 {
        0 => {
            crc_at(repaired, &mut bytes, PAGE, 12);
            if let Ok(value) = Superblock::decode(&bytes) {
                look_at_geometry(&value.geometry());
                assert_eq!(Superblock::decode(&value.encode()), Ok(value));
            }
        }
        1 => {
            crc_at(repaired, &mut bytes, PAGE, 8);
            if let Ok(value) = StartPage::decode(&bytes, &UUID) {
                assert_eq!(StartPage::decode(&value.encode(), &UUID), Ok(value));
            }
            if let Ok(value) = MemberLabel::decode(&bytes) {
                assert_eq!(MemberLabel::decode(&value.encode()), Ok(value));
            }
        }
        2 => {
            crc_at(repaired, &mut bytes, PAGE, 8);
            if let Ok(value) = VolumeDescriptor::decode(&bytes, &UUID, 0) {
                assert!(value.sectors <= VOLUME_SECTORS_MAX || value.state as u8 == 0);
                _ = (value.name_text(), value.path_text());
                assert_eq!(VolumeDescriptor::decode(&value.encode(), &UUID, 0), Ok(value));
            }
        }
        3 => {
            crc_at(repaired, &mut bytes, PAGE, 8);
            if let Ok(value) = Tail::decode(&bytes, &UUID, 1) {
                assert_eq!(Tail::decode(&value.encode(), &UUID, 1), Ok(value));
            }
        }
        4 => {
            crc_at(repaired, &mut bytes, SegmentHeader::SIZE, 4);
            if let Ok(value) = SegmentHeader::decode(&bytes, &UUID, &geometry(), 0) {
                assert_eq!(SegmentHeader::decode(&value.encode(), &UUID, &geometry(), 0), Ok(value));
            }
        }
        5 => small(&secret, repaired, bytes),
        6 => record(&secret, repaired, bytes),
        _ => summary(&secret, repaired, bytes),
    }
}

/// Every place a valid geometry names lies on the device.
fn look_at_geometry(geometry: &Geometry) {
    let end = geometry.device_size;
    for copy in 0..2 {
        assert!(geometry.superblock(copy) + PAGE as u64 <= end);
        assert!(geometry.start_page(copy) + PAGE as u64 <= end);
        assert!(geometry.tail(geometry.volume_slots - 1, copy) + PAGE as u64 <= end);
        assert!(geometry.header_offset(copy) < geometry.segment_size);
    }
    let last = geometry.segment(geometry.segment_count - 1) + u64::from(geometry.segment_size);
    assert!(last <= end && geometry.data_start() < geometry.data_end());
    _ = backup_superblock(end, geometry.meta_size);
}

/// Witness lines and liveness words.
fn small(secret: &Secret, repaired: bool, mut bytes: Vec<u8>) {
    bytes.resize(Witness::SIZE, 0);
    if repaired {
        let check = sip(secret, &[b"witness\0", &bytes[8..]]);
        bytes[..8].copy_from_slice(&check.to_le_bytes());
    }
    if let Ok(value) = Witness::decode(&bytes, secret, 0) {
        assert_eq!(Witness::decode(&value.encode(secret), secret, 0), Ok(value));
    }
    let mut input = Input::new(&bytes[8..]);
    let (word, segment, generation, index) = (input.long(), input.word(), input.long(), input.word());
    if let Ok(dead) = liveness_bits(secret, segment, generation, index, word) {
        assert!(word == 0 || liveness_word(secret, segment, generation, index, dead) == word);
    }
}

/// Makes the lengths of a body agree and its check right, mostly.
fn repair_body(secret: &Secret, bytes: &mut Vec<u8>, head: usize, counts_at: [usize; 2]) {
    bytes.resize(bytes.len().max(head), 0);
    let mut word = |at: usize, limit: u32| {
        let mut word = [0; 4];
        word.copy_from_slice(&bytes[at..at + 4]);
        let value = u32::from_le_bytes(word) % limit;
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        value as usize
    };
    let (keys, checksums) = (word(counts_at[0], 64), word(counts_at[1], 512));
    let len = head + keys * Key::SIZE + checksums * 4;
    bytes.resize(bytes.len().max(len), 0);
    bytes[4..8].copy_from_slice(&(len as u32).to_le_bytes());
    bytes[8..16].fill(0);
    let check = sip(secret, &[&bytes[..len]]);
    bytes[8..16].copy_from_slice(&check.to_le_bytes());
}

fn look_at_keys(keys: &[Key], checksums: &[u32]) {
    let mut pieces = 0;
    for key in keys {
        assert!(key.range().end() <= VOLUME_SECTORS_MAX);
        assert!(!key.kind.has_payload() || key.sectors <= KEY_SECTORS_MAX);
        assert_eq!(key.pieces().count(), key.checksum_count());
        pieces += key.checksum_count();
    }
    assert_eq!(pieces, checksums.len(), "a checksum for each piece");
}

fn record(secret: &Secret, repaired: bool, mut bytes: Vec<u8>) {
    const OFFSET: u32 = 20 << 10;
    if repaired {
        bytes.resize(bytes.len().max(RecordHeader::SIZE), 0);
        bytes[..4].copy_from_slice(b"PCRC");
        bytes[48..56].copy_from_slice(&u64::from(OFFSET).rotate_left(32).to_le_bytes());
        bytes[16..32].copy_from_slice(&[1u64.to_le_bytes(), 1u64.to_le_bytes()].concat());
        repair_body(secret, &mut bytes, RecordHeader::SIZE, [56, 60]);
    }
    let expect = RecordExpect { segment: 0, generation: 1, incarnation: 1, offset: OFFSET };
    let Ok(record) = decode_record(secret, &geometry(), &bytes, &expect) else { return };
    look_at_keys(&record.keys, &record.checksums);
    let mut again = Vec::new();
    encode_record(secret, &record.header, &record.keys, &record.checksums, &mut again);
    assert_eq!(again.len(), record_len(record.keys.len(), record.checksums.len()));
    let mut found = decode_record(secret, &geometry(), &again, &expect).expect("what was just encoded");
    // Reserved bytes are ignored, not kept, and the check covers them.
    found.header.check = record.header.check;
    assert_eq!(found, record);
}

fn summary(secret: &Secret, repaired: bool, mut bytes: Vec<u8>) {
    if repaired {
        bytes.resize(bytes.len().max(SummaryHeader::SIZE), 0);
        bytes[..4].copy_from_slice(b"PCSM");
        bytes[16..32].copy_from_slice(&[1u64.to_le_bytes(), 1u64.to_le_bytes()].concat());
        bytes[32..36].fill(0);
        repair_body(secret, &mut bytes, SummaryHeader::SIZE, [36, 40]);
    }
    let expect = SummaryExpect { segment: 0, generation: 1, incarnation: 1 };
    let Ok(summary) = decode_summary(secret, &geometry(), &bytes, &expect) else { return };
    look_at_keys(&summary.keys, &summary.checksums);
    let mut again = Vec::new();
    encode_summary(secret, &summary.header, &summary.keys, &summary.checksums, &mut again);
    assert_eq!(again.len(), summary_len(summary.keys.len(), summary.checksums.len()));
    let mut found = decode_summary(secret, &geometry(), &again, &expect).expect("what was just encoded");
    found.header.check = summary.header.check;
    assert_eq!(found, summary);
}
