//! The superblock: that this is a cache of ours, of which version, and where everything lies.
//!
//! Written by `format` and by the rare change of label or features; read first of all. Magic,
//! version and CRC keep their places and the CRC its coverage in every version to come, so that an
//! older program can tell a newer cache from a damaged one.

use super::check::{judge_crc, put_crc};
use super::corruption::Judge;
use super::dual::{Dual, Sequenced, newest};
use super::layout::{layout, offset_of};
use super::member::{MEMBERS_MAX, Member, judge_members};
use super::{Corruption, Geometry, GeometryError, PAGE, SEGMENT_COUNT_MIN, Secret, Uuid};

/// The first 8 bytes of a cache, as a little-endian number.
pub const SUPERBLOCK_MAGIC: u64 = u64::from_le_bytes(*b"PCVHOST\x01");
/// The version this code writes, and the only one it reads.
pub const VERSION: u32 = 1;
/// Compatible features this code knows: others may be ignored.
pub const FEATURES_COMPAT: u64 = 0;
/// Read-only compatible: `generation_floor` counts, because the cache has been shrunk.
pub const GENERATION_FLOOR: u64 = 1;
/// Incompatible: `void_from` counts, because a change of size is not finished.
pub const VOID_SEGMENTS: u64 = 1;
/// Incompatible: the cache lies on several devices, which `members` names.
pub const MEMBERS: u64 = 2;
/// Read-only compatible features this code knows: with others the cache may be read, not written.
pub const FEATURES_RO_COMPAT: u64 = GENERATION_FLOOR;
/// Incompatible features this code knows: with others the cache must be left alone.
pub const FEATURES_INCOMPAT: u64 = VOID_SEGMENTS | MEMBERS;

const CRC: usize = offset_of(Superblock::FIELDS, "crc");
const VERSION_AT: usize = offset_of(Superblock::FIELDS, "version");
const JUDGE: Judge = Judge("Superblock");

layout! {
    /// The superblock. See FORMAT.md.
    #[derive(Clone, PartialEq, Eq, Debug)]
    pub struct Superblock: 4096 {
        frame { 0 magic: u64, 8 version: u32, 12 crc: u32 }
        /// Features that programs not knowing them may ignore.
        16 features_compat: u64,
        /// Features that programs not knowing them may read past, but not write.
        24 features_ro_compat: u64,
        /// Features that programs not knowing them must not touch.
        32 features_incompat: u64,
        /// Names this cache for good.
        40 uuid: Uuid,
        /// The key of every SipHash in it.
        56 secret: Secret,
        /// Raised by each update.
        72 sequence: u64,
        /// Bytes of the device that belong to the cache.
        80 device_size: u64,
        /// Bytes of each metadata end.
        88 meta_size: u64,
        /// Bytes of a segment.
        96 segment_size: u32,
        /// Number of segments.
        100 segment_count: u32,
        /// Number of volume slots.
        104 volume_slots: u32,
        /// With [`VOID_SEGMENTS`]: segments from this one on hold nothing, whatever stands there.
        108 void_from: u32,
        /// When it was formatted, seconds since 1970 UTC.
        112 created_at: u64,
        /// By what, as text.
        120 created_by: [u8; 32],
        /// The operator's name for it, as text.
        152 label: [u8; 64],
        /// With [`GENERATION_FLOOR`]: no segment that is made anew begins with a lower generation.
        216 generation_floor: u64,
        /// With [`MEMBERS`]: how many of `members` count.
        224 member_count: u32,
        /// With [`MEMBERS`]: the devices, in order.
        232 members: [Member; MEMBERS_MAX],
    }
}

/// Why media cannot be opened as a cache, by who must act.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SuperblockError {
    /// No superblock of ours: never formatted, or something else's.
    #[error("not a cache: begins with {found:#018x}")]
    NotOurs {
        /// The first 8 bytes.
        found: u64,
    },
    /// It was a superblock of ours.
    #[error(transparent)]
    Damaged(#[from] Corruption),
    /// A whole superblock of another version of the format.
    #[error("format version {found}, this program knows {VERSION} only")]
    UnknownVersion {
        /// The version it has.
        found: u32,
    },
    /// A whole superblock with incompatible features this program does not know.
    #[error("incompatible features {unknown:#x} that this program does not know")]
    UnknownFeatures {
        /// The unknown ones.
        unknown: u64,
    },
    /// Whole, but describing an impossible cache.
    #[error("superblock with impossible geometry: {0}")]
    Geometry(GeometryError),
    /// Two whole superblocks of different caches at the two ends.
    #[error("the superblocks at the two ends are of different caches")]
    TwoCaches,
}

impl Superblock {
    /// A superblock for a new cache.
    pub fn new(geometry: &Geometry, uuid: Uuid, secret: Secret) -> Superblock {
        Superblock {
            features_compat: FEATURES_COMPAT,
            features_ro_compat: 0,
            features_incompat: 0,
            uuid,
            secret,
            sequence: 1,
            device_size: geometry.device_size,
            meta_size: geometry.meta_size,
            segment_size: geometry.segment_size,
            segment_count: geometry.segment_count,
            volume_slots: geometry.volume_slots,
            void_from: 0,
            created_at: 0,
            created_by: [0; 32],
            label: [0; 64],
            generation_floor: 0,
            member_count: 0,
            members: [Member::default(); MEMBERS_MAX],
        }
    }

    /// The same cache on several devices, at most [`MEMBERS_MAX`]; on one if none is named.
    pub fn on_members(mut self, members: &[Member]) -> Superblock {
        if !members.is_empty() {
            self.features_incompat |= MEMBERS;
        }
        self.member_count = members.len() as u32;
        self.members[..members.len()].copy_from_slice(members);
        self
    }

    /// The devices it lies on, in order; none if it is one, which has nothing to be known by.
    pub fn members(&self) -> &[Member] {
        if self.features_incompat & MEMBERS == 0 {
            return &[];
        }
        &self.members[..(self.member_count as usize).min(MEMBERS_MAX)]
    }

    /// The same cache with another geometry, of which segments from `void_from` on hold nothing yet.
    pub fn with_size(self, geometry: &Geometry, void_from: Option<u32>) -> Superblock {
        Superblock {
            device_size: geometry.device_size,
            segment_count: geometry.segment_count,
            void_from: void_from.unwrap_or(0),
            features_incompat: match void_from {
                Some(_) => self.features_incompat | VOID_SEGMENTS,
                None => self.features_incompat & !VOID_SEGMENTS,
            },
            ..self
        }
    }

    /// The same cache, in which no segment that is made anew begins below this generation.
    pub fn with_generation_floor(self, floor: u64) -> Superblock {
        Superblock {
            generation_floor: self.first_generation().max(floor),
            features_ro_compat: self.features_ro_compat | GENERATION_FLOOR,
            ..self
        }
    }

    /// The first of the segments that hold nothing, whatever stands there, if there are any.
    pub fn void_from(&self) -> Option<u32> {
        (self.features_incompat & VOID_SEGMENTS != 0).then_some(self.void_from)
    }

    /// Segments whose headers count.
    pub fn usable_segments(&self) -> u32 {
        self.void_from().unwrap_or(self.segment_count)
    }

    /// The generation in which a segment that is made anew begins.
    pub fn first_generation(&self) -> u64 {
        if self.features_ro_compat & GENERATION_FLOOR == 0 { 1 } else { self.generation_floor.max(1) }
    }

    /// Where everything lies.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            device_size: self.device_size,
            meta_size: self.meta_size,
            segment_size: self.segment_size,
            segment_count: self.segment_count,
            volume_slots: self.volume_slots,
        }
    }

    /// Read-only compatible features this program does not know: with any, it must not write.
    pub fn unknown_ro_compat(&self) -> u64 {
        self.features_ro_compat & !FEATURES_RO_COMPAT
    }

    /// Its page.
    pub fn encode(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        self.put(&mut page);
        page[..8].copy_from_slice(&SUPERBLOCK_MAGIC.to_le_bytes());
        page[VERSION_AT..VERSION_AT + 4].copy_from_slice(&VERSION.to_le_bytes());
        put_crc(&mut page, CRC);
        page
    }

    /// The superblock in a page.
    ///
    /// # Errors
    /// [`SuperblockError`]; magic, CRC, version, features and geometry are judged in this order.
    pub fn decode(bytes: &[u8]) -> Result<Superblock, SuperblockError> {
        let page: &[u8; PAGE] = JUDGE.chunk(bytes)?;
        let mut magic = [0; 8];
        magic.copy_from_slice(&page[..8]);
        let found = u64::from_le_bytes(magic);
        if found != SUPERBLOCK_MAGIC {
            return Err(SuperblockError::NotOurs { found });
        }
        judge_crc(JUDGE, page, CRC)?;
        let mut version = [0; 4];
        version.copy_from_slice(&page[VERSION_AT..VERSION_AT + 4]);
        let found = u32::from_le_bytes(version);
        if found != VERSION {
            return Err(SuperblockError::UnknownVersion { found });
        }
        let superblock = Superblock::get(page)?;
        let unknown = superblock.features_incompat & !FEATURES_INCOMPAT;
        if unknown != 0 {
            return Err(SuperblockError::UnknownFeatures { unknown });
        }
        JUDGE.counter("sequence", superblock.sequence)?;
        superblock.geometry().validate().map_err(SuperblockError::Geometry)?;
        if superblock.void_from().is_some() {
            let (from, count) = (superblock.void_from.into(), superblock.segment_count.into());
            JUDGE.at_least("void_from", SEGMENT_COUNT_MIN.into(), from)?;
            JUDGE.at_most("void_from", count, from)?;
        }
        JUDGE.counter("generation_floor", superblock.first_generation())?;
        if superblock.features_incompat & MEMBERS != 0 {
            JUDGE.at_most("member_count", MEMBERS_MAX as u64, superblock.member_count.into())?;
            judge_members(superblock.members())?;
        }
        Ok(superblock)
    }

    /// What the copies at the two ends amount to.
    ///
    /// # Errors
    /// [`SuperblockError`]: no copy is valid; or one is whole but of an unknown version or with
    /// unknown features, and then the other, which this program could read, is out of date; or they
    /// are of two caches.
    pub fn newest(
        front: Result<Superblock, SuperblockError>,
        back: Result<Superblock, SuperblockError>,
    ) -> Result<Dual<Superblock, SuperblockError>, SuperblockError> {
        use SuperblockError::{NotOurs, UnknownFeatures, UnknownVersion};
        for copy in [&front, &back] {
            if let Err(error @ (UnknownVersion { .. } | UnknownFeatures { .. })) = copy {
                return Err(*error);
            }
        }
        match (&front, &back) {
            (Ok(a), Ok(b)) if a.uuid != b.uuid => Err(SuperblockError::TwoCaches),
            // What is damaged is ours at least: the better answer.
            (Err(NotOurs { .. }), Err(error)) | (Err(error), Err(_)) => Err(*error),
            _ => Ok(newest(front, back)),
        }
    }
}

impl Sequenced for Superblock {
    fn sequence(&self) -> u64 {
        self.sequence
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{
        assert_every_flip_is_noticed, assert_golden, assert_total, assert_total_behind_check,
    };
    use super::super::{pad, text};
    use super::*;

    fn example() -> Superblock {
        let geometry = Geometry::choose(1 << 30, None).unwrap();
        let uuid = *b"\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x10";
        Superblock {
            features_compat: 0x8000_0000_0000_0001,
            sequence: 7,
            created_at: 1_700_000_000,
            created_by: pad("pcache-vhost 0.1.0").unwrap(),
            label: pad("fast").unwrap(),
            ..Superblock::new(&geometry, uuid, Secret::new([0xa5; 16]))
        }
    }

    /// The example's page with `change` made and the CRC right again.
    fn changed(change: impl Fn(&mut [u8; PAGE])) -> Result<Superblock, SuperblockError> {
        let mut page = example().encode();
        change(&mut page);
        put_crc(&mut page, CRC);
        Superblock::decode(&page)
    }

    #[test]
    fn what_was_written_is_read() {
        let read = Superblock::decode(&example().encode()).unwrap();
        assert_eq!(read, example());
        assert_eq!(read.geometry(), Geometry::choose(1 << 30, None).unwrap());
        assert_eq!(text("Superblock", "label", &read.label), Ok("fast"));
    }

    #[test]
    fn every_changed_byte_is_noticed_and_no_bytes_panic() {
        assert_every_flip_is_noticed(&example().encode(), Superblock::decode);
        assert_total(0x5042, &example().encode(), Superblock::decode);
    }

    #[test]
    fn each_way_to_be_wrong_has_its_own_error() {
        assert_eq!(Superblock::decode(&[0; PAGE]), Err(SuperblockError::NotOurs { found: 0 }));
        let mut torn = example().encode();
        torn[2048..].fill(0xee);
        assert!(matches!(Superblock::decode(&torn), Err(SuperblockError::Damaged(c)) if c.field == "crc"));
        for version in [0, 2, u32::MAX] {
            let read = changed(|page| page[8..12].copy_from_slice(&version.to_le_bytes()));
            assert_eq!(read, Err(SuperblockError::UnknownVersion { found: version }));
        }
        let read = changed(|page| page[39] = 0x40);
        assert_eq!(read, Err(SuperblockError::UnknownFeatures { unknown: 0x40 << 56 }));
        let read = changed(|page| page[96] = 1);
        assert!(matches!(read, Err(SuperblockError::Geometry(GeometryError::SegmentSize { .. }))));
    }

    #[test]
    fn features_that_may_be_unknown_do_not_stop_reading() {
        let read = changed(|page| page[24] = 4).unwrap();
        assert_eq!((read.unknown_ro_compat(), read.features_compat), (4, 0x8000_0000_0000_0001));
    }

    #[test]
    fn what_a_change_of_size_notes_counts_only_with_its_feature() {
        let plain = example();
        assert_eq!((plain.void_from(), plain.first_generation(), plain.usable_segments()), (None, 1, 63));
        let without = changed(|page| {
            page[108] = 9;
            page[216] = 9;
        });
        let without = without.unwrap();
        assert_eq!((without.void_from(), without.first_generation()), (None, 1));
        let larger = Geometry { segment_count: 10, ..example().geometry() };
        let shrunk = example().with_generation_floor(7).with_size(&larger, Some(8));
        let read = Superblock::decode(&shrunk.encode()).unwrap();
        assert_eq!((read.void_from(), read.usable_segments(), read.first_generation()), (Some(8), 8, 7));
        assert_eq!(read.clone().with_generation_floor(5).first_generation(), 7, "it never falls");
        let done = read.with_size(&larger, None);
        assert_eq!((done.void_from(), done.usable_segments(), done.features_incompat), (None, 10, 0));
        for from in [0, 3, 11] {
            let bad = Superblock { void_from: from, ..shrunk.clone() };
            assert!(
                matches!(Superblock::decode(&bad.encode()), Err(SuperblockError::Damaged(c)) if c.field == "void_from")
            );
        }
    }

    #[test]
    fn a_table_of_members_counts_with_its_feature_and_must_be_possible() {
        let member = |n: u8, base, start| Member { uuid: [n; 16], base, start };
        let table = [member(1, 0, 0), member(2, 8 << 20, 4 << 20), member(3, 16 << 20, 4 << 20)];
        let several = example().on_members(&table);
        let read = Superblock::decode(&several.encode()).unwrap();
        assert_eq!((read.members(), read.features_incompat), (&table[..], MEMBERS));
        let one = example().on_members(&[]);
        assert_eq!((one.members(), one.encode()), (&[][..], example().encode()), "one device: as ever");
        let without = Superblock { features_incompat: 0, ..several.clone() };
        assert_eq!(Superblock::decode(&without.encode()).unwrap().members(), []);
        let mut cases = vec![
            (Superblock { member_count: 1, ..several.clone() }, "member_count"),
            (Superblock { member_count: 17, ..several.clone() }, "member_count"),
        ];
        for (index, bad, field) in [
            (0, member(1, 4096, 0), "base"),
            (0, member(1, 0, 4096), "start"),
            (1, member(2, 0, 4 << 20), "base"),
            (2, member(3, 8 << 20, 4 << 20), "base"),
            (2, member(3, (16 << 20) + 1, 4 << 20), "base"),
            (2, member(3, 16 << 20, 0), "start"),
            (2, member(3, u64::MAX - 4095, 4 << 20), "base"),
        ] {
            let mut superblock = several.clone();
            superblock.members[index] = bad;
            cases.push((superblock, field));
        }
        for (bad, field) in cases {
            match Superblock::decode(&bad.encode()) {
                Err(SuperblockError::Damaged(c)) if c.field == field => {}
                other => panic!("{field}: {other:?}"),
            }
        }
    }

    #[test]
    fn reserved_bytes_are_ignored_when_the_crc_holds() {
        assert_eq!(changed(|page| page[4000] = 1).unwrap(), example());
    }

    #[test]
    fn the_copies_at_the_ends_are_judged_together() {
        use SuperblockError::{NotOurs, TwoCaches, UnknownVersion};
        let old = || Ok(example());
        let new = || Ok(Superblock { sequence: 8, ..example() });
        let other = || Ok(Superblock { uuid: [9; 16], ..example() });
        let nothing = || Err(NotOurs { found: 0 });
        let damaged = || Err(SuperblockError::from(Corruption::unreadable("Superblock")));
        let newer = || Err(UnknownVersion { found: 2 });
        for (front, back, answer) in [
            (old(), new(), Ok((8, 0))),
            (new(), old(), Ok((8, 1))),
            (nothing(), old(), Ok((7, 0))),
            (old(), damaged(), Ok((7, 1))),
            (old(), newer(), Err(UnknownVersion { found: 2 })),
            (newer(), old(), Err(UnknownVersion { found: 2 })),
            (old(), other(), Err(TwoCaches)),
            (nothing(), damaged(), Err(SuperblockError::from(Corruption::unreadable("Superblock")))),
            (damaged(), nothing(), Err(SuperblockError::from(Corruption::unreadable("Superblock")))),
            (nothing(), nothing(), Err(NotOurs { found: 0 })),
        ] {
            let dual = Superblock::newest(front, back);
            let found = dual.map(|dual| (dual.newest.as_ref().map_or(0, |s| s.sequence), dual.next));
            assert_eq!(found, answer);
        }
    }

    #[test]
    fn nothing_is_believed_for_the_crcs_sake() {
        let check = |page: &mut [u8]| put_crc(page, CRC);
        let encode = |superblock: &Superblock| superblock.encode().to_vec();
        assert_total_behind_check(0x5343, &example().encode(), check, encode, Superblock::decode);
    }

    #[test]
    fn the_bytes_are_these() {
        assert_golden(
            &example().encode(),
            "
             0000: 50 43 56 48 4f 53 54 01 01 00 00 00 8d e7 1e e8
             0010: 01 00 00 00 00 00 00 80 00 00 00 00 00 00 00 00
             0020: 00 00 00 00 00 00 00 00 01 02 03 04 05 06 07 08
             0030: 09 0a 0b 0c 0d 0e 0f 10 a5 a5 a5 a5 a5 a5 a5 a5
             0040: a5 a5 a5 a5 a5 a5 a5 a5 07 00 00 00 00 00 00 00
             0050: 00 00 00 40 00 00 00 00 00 00 20 00 00 00 00 00
             0060: 00 00 00 01 3f 00 00 00 ff 00 00 00 00 00 00 00
             0070: 00 f1 53 65 00 00 00 00 70 63 61 63 68 65 2d 76
             0080: 68 6f 73 74 20 30 2e 31 2e 30 00 00 00 00 00 00
             0090: 00 00 00 00 00 00 00 00 66 61 73 74 00 00 00 00
            ",
        );
    }
}
