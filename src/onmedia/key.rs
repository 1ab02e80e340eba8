//! A key: one range of a volume's sectors, and where in the segment their content lies.
//!
//! Keys carry a version and an epoch of their own, so that one moved to another segment keeps them.
//! A key never names its segment: its payload lies in the segment its record lies in.
//!
//! Invariants of a key that was decoded: `1 ≤ sectors`, `first + sectors ≤ 2^48`; with payload,
//! `sectors ≤ 512` and the payload lies within the bounds the decoder was given; without, `payload`
//! is 0.

use std::iter;
use std::ops::Range;

use super::corruption::Judge;
use super::layout::{codes, layout};
use super::{Corruption, Expected, Field, RecordError};
use crate::units::{SECTOR_SHIFT, SECTORS_PER_BLOCK, SectorRange};

/// Most sectors a volume has, hence one past the highest sector a key can name.
pub const VOLUME_SECTORS_MAX: u64 = 1 << FIRST_BITS;
/// Most sectors of a key with payload: 256 KiB, so that an extent lies in few index shards and a
/// read of it is bounded.
pub const KEY_SECTORS_MAX: u32 = 512;

const FIRST_BITS: u32 = 48;
const KIND_SHIFT: u32 = 48;
const FLAGS_SHIFT: u32 = 56;
const JUDGE: Judge = Judge("Key");

codes! {
    /// What a key says about its sectors. Codes not listed are incompatible.
    pub enum KeyKind {
        /// The guest wrote them; the content is the payload.
        Data = 1 "data",
        /// The guest wrote zeros.
        Zero = 2 "zero",
        /// The guest discarded them: they read as zeros.
        Discard = 3 "discard",
        /// Read from the disk; the content is the payload, and never dirty.
        Fill = 4 "fill",
    }
}

impl KeyKind {
    /// Whether keys of this kind have payload.
    pub fn has_payload(self) -> bool {
        matches!(self, KeyKind::Data | KeyKind::Fill)
    }
}

/// One range of a volume and where its content lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Key {
    /// First sector on the volume, below 2^48.
    pub first: u64,
    /// What the key says.
    pub kind: KeyKind,
    /// Number of sectors.
    pub sectors: u32,
    /// First sector of the payload, counted from the segment's first byte; 0 for none.
    pub payload: u32,
    /// Of two keys for one sector the one with the higher version counts.
    pub version: u64,
    /// The epoch in which it was written.
    pub epoch: u64,
}

/// A part of a payload that has one checksum: a whole block, or one sector of a packed block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// First sector, counted from the segment's first byte.
    pub start: u32,
    /// Number of sectors, 1 or 8.
    pub sectors: u32,
}

layout! {
    /// A key's four words as they are on the media.
    struct RawKey: 32 {
        frame {}
        0 word0: u64,
        8 sectors: u32,
        12 payload: u32,
        16 version: u64,
        24 epoch: u64,
    }
}

impl Key {
    /// Bytes it takes on the media.
    pub const SIZE: usize = RawKey::SIZE;
    /// Where its fields lie.
    pub const FIELDS: &'static [Field] = RawKey::FIELDS;

    /// Number of checksums its payload has.
    #[inline]
    pub fn checksum_count(&self) -> usize {
        if !self.kind.has_payload() {
            return 0;
        }
        let start = u64::from(self.payload);
        let end = start + u64::from(self.sectors);
        let blocks_start = start.next_multiple_of(SECTORS_PER_BLOCK);
        let blocks_end = end - end % SECTORS_PER_BLOCK;
        let blocked = blocks_end.saturating_sub(blocks_start);
        (u64::from(self.sectors) - blocked + blocked / SECTORS_PER_BLOCK) as usize
    }

    /// The parts of its payload in the order of their checksums.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> + use<> {
        let mut start = self.payload;
        let mut left = if self.kind.has_payload() { self.sectors } else { 0 };
        iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            let block = SECTORS_PER_BLOCK as u32;
            let sectors = if start.is_multiple_of(block) && left >= block { block } else { 1 };
            let piece = Piece { start, sectors };
            start += sectors;
            left -= sectors;
            Some(piece)
        })
    }

    /// The sectors of the volume it speaks of. Panics for a key that breaks the type's invariants.
    pub fn range(&self) -> SectorRange {
        SectorRange::new(self.first, self.sectors.into())
    }

    /// Writes the key.
    #[inline]
    pub(super) fn encode(&self, out: &mut [u8; Key::SIZE]) {
        let word0 = self.first | (self.kind as u64) << KIND_SHIFT;
        let Key { sectors, payload, version, epoch, .. } = *self;
        RawKey { word0, sectors, payload, version, epoch }.put(out);
    }

    /// Reads a key and judges it. `payload` bounds where payload may lie, in bytes from the
    /// segment's first.
    #[inline]
    pub(super) fn decode(bytes: &[u8; Key::SIZE], payload: &Range<u32>) -> Result<Key, RecordError> {
        let raw = RawKey::get(bytes).map_err(RecordError::Damaged)?;
        let (kind, flags) = ((raw.word0 >> KIND_SHIFT) as u8, (raw.word0 >> FLAGS_SHIFT) as u8);
        let known = KeyKind::from_code(kind).filter(|_| flags == 0);
        let key = Key {
            first: raw.word0 & (VOLUME_SECTORS_MAX - 1),
            kind: known.ok_or(RecordError::Incompatible { kind, flags })?,
            sectors: raw.sectors,
            payload: raw.payload,
            version: raw.version,
            epoch: raw.epoch,
        };
        // Not for the encoder to judge: what was read at the limit may be raised once more.
        let counters = JUDGE.counter("version", key.version).and(JUDGE.counter("epoch", key.epoch));
        counters.and_then(|()| key.judge(payload)).map_err(RecordError::Damaged)?;
        Ok(key)
    }

    /// Whether the type's invariants hold.
    #[inline]
    pub(super) fn judge(&self, payload: &Range<u32>) -> Result<(), Corruption> {
        let sectors = u64::from(self.sectors);
        JUDGE.at_least("sectors", 1, sectors)?;
        JUDGE.at_most("first", VOLUME_SECTORS_MAX - 1, self.first)?;
        JUDGE.at_most("first + sectors", VOLUME_SECTORS_MAX, self.first + sectors)?;
        let start = u64::from(self.payload);
        if !self.kind.has_payload() {
            return JUDGE.that(start == 0, "payload", Expected::Exactly(0), start);
        }
        JUDGE.at_most("sectors", KEY_SECTORS_MAX.into(), sectors)?;
        JUDGE.at_least("payload", u64::from(payload.start), start << SECTOR_SHIFT)?;
        JUDGE.at_most("payload + sectors", payload.end.into(), (start + sectors) << SECTOR_SHIFT)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Rng, assert_golden};
    use super::*;

    const BOUNDS: Range<u32> = 12 << 10..56 << 10;

    fn data() -> Key {
        Key { first: 0xabcd_1234_5678, kind: KeyKind::Data, sectors: 9, payload: 30, version: 7, epoch: 3 }
    }

    fn encoded(key: &Key) -> [u8; Key::SIZE] {
        let mut bytes = [0xee; Key::SIZE];
        key.encode(&mut bytes);
        bytes
    }

    #[test]
    fn what_was_written_is_read() {
        let zero = Key { kind: KeyKind::Zero, payload: 0, sectors: u32::MAX, ..data() };
        let discard = Key { kind: KeyKind::Discard, ..zero };
        let last = Key { first: VOLUME_SECTORS_MAX - 9, kind: KeyKind::Fill, ..data() };
        for key in [data(), zero, discard, last] {
            assert_eq!(Key::decode(&encoded(&key), &BOUNDS), Ok(key));
            assert_eq!(key.range().end(), key.first + u64::from(key.sectors));
        }
    }

    #[test]
    fn a_changed_byte_gives_another_key_or_an_error() {
        let good = encoded(&data());
        for at in 0..good.len() {
            for mask in [0x01, 0x80, 0xff] {
                let mut bytes = good;
                bytes[at] ^= mask;
                assert_ne!(Key::decode(&bytes, &BOUNDS), Ok(data()), "byte {at} mask {mask:#x}");
            }
        }
    }

    #[test]
    fn unknown_kinds_and_flags_are_incompatible() {
        for kind in 0..=255u8 {
            for flags in [0, 1, 0x80] {
                let mut bytes = encoded(&data());
                (bytes[6], bytes[7]) = (kind, flags);
                let read = Key::decode(&bytes, &BOUNDS);
                let known = flags == 0 && KeyKind::from_code(kind).is_some();
                assert_eq!(read == Err(RecordError::Incompatible { kind, flags }), !known);
            }
        }
    }

    #[test]
    fn keys_out_of_bounds_are_refused() {
        let low = BOUNDS.start / 512;
        let top = BOUNDS.end / 512;
        for (key, good) in [
            (Key { sectors: 0, ..data() }, false),
            (Key { sectors: 0, payload: 0, kind: KeyKind::Zero, ..data() }, false),
            (Key { first: VOLUME_SECTORS_MAX - 8, ..data() }, false),
            (Key { first: VOLUME_SECTORS_MAX - 9, ..data() }, true),
            (Key { kind: KeyKind::Zero, ..data() }, false),
            (Key { kind: KeyKind::Discard, ..data() }, false),
            (Key { payload: low, ..data() }, true),
            (Key { payload: low - 1, ..data() }, false),
            (Key { payload: top - 9, ..data() }, true),
            (Key { payload: top - 8, ..data() }, false),
            (Key { payload: u32::MAX, ..data() }, false),
            (Key { payload: 0, ..data() }, false),
            (Key { sectors: KEY_SECTORS_MAX + 1, payload: low, ..data() }, false),
            (Key { sectors: u32::MAX, ..data() }, false),
        ] {
            assert_eq!(key.judge(&BOUNDS).is_ok(), good, "{key:?}");
        }
        let wide = 0..u32::MAX;
        for (sectors, good) in [(KEY_SECTORS_MAX, true), (KEY_SECTORS_MAX + 1, false)] {
            assert_eq!(Key { sectors, ..data() }.judge(&wide).is_ok(), good);
        }
    }

    #[test]
    fn blocks_have_one_checksum_and_packed_sectors_one_each() {
        for (payload, sectors, count) in [
            (64, 8, 1),
            (64, 512, 64),
            (64, 1, 1),
            (64, 7, 7),
            (65, 7, 7),
            (60, 8, 8),
            (60, 12, 5),
            (60, 14, 7),
            (64, 9, 2),
            (63, 10, 3),
            (63, 9, 2),
            (61, 512, 3 + 63 + 5),
        ] {
            let key = Key { payload, sectors, ..data() };
            assert_eq!(key.checksum_count(), count, "{payload}+{sectors}");
            let zero = Key { kind: KeyKind::Zero, ..key };
            assert_eq!((zero.checksum_count(), zero.pieces().count()), (0, 0));
        }
    }

    #[test]
    fn pieces_cover_the_payload_once_and_in_order() {
        let seed = 0x7069_6563;
        let mut rng = Rng::new(seed);
        for round in 0..2000 {
            let (payload, sectors) = (rng.below(100) as u32, 1 + rng.below(60) as u32);
            let key = Key { payload, sectors, ..data() };
            let context = format!("seed {seed:#x} round {round}: {payload}+{sectors}");
            // The dumb model: sector by sector; a block counts when all its eight are in the key.
            let whole = |sector: u32| {
                let block = sector / 8 * 8;
                block >= payload && block + 8 <= payload + sectors
            };
            let expected: Vec<Piece> = (payload..payload + sectors)
                .filter(|&sector| !whole(sector) || sector.is_multiple_of(8))
                .map(|start| Piece { start, sectors: if whole(start) { 8 } else { 1 } })
                .collect();
            assert_eq!(key.pieces().collect::<Vec<_>>(), expected, "{context}");
            assert_eq!(key.checksum_count(), expected.len(), "{context}");
        }
    }

    #[test]
    fn no_key_overflows_its_count() {
        let key = Key { payload: u32::MAX, sectors: u32::MAX, ..data() };
        assert!(key.checksum_count() > 0 && key.judge(&BOUNDS).is_err());
    }

    #[test]
    fn the_bytes_are_these() {
        assert_golden(
            &encoded(&data()),
            "
             0000: 78 56 34 12 cd ab 01 00 09 00 00 00 1e 00 00 00
             0010: 07 00 00 00 00 00 00 00 03 00 00 00 00 00 00 00
            ",
        );
    }
}
