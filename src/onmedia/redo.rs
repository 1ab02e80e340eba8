//! The redo area beside a backing disk: several epochs of a volume, to be applied to it as one.
//!
//! It lies outside the cache, and must be read where the cache is lost: so nothing in it is keyed by
//! a secret, and its header says which disk it is for and how to tell that the disk is still as the
//! group expects it. No byte of it is where a guest's payload may lie but the payload itself, which
//! is found through a table that the header's CRC covers.

use super::check::{judge_crc, put_crc};
use super::corruption::Judge;
use super::dual::Sequenced;
use super::key::VOLUME_SECTORS_MAX;
use super::layout::{codes, layout, offset_of};
use super::{Corruption, Expected, Field, PAGE, Uuid};
use crate::units::SectorRange;

/// The first 8 bytes of a redo header, as a little-endian number.
pub const REDO_MAGIC: u64 = u64::from_le_bytes(*b"PCVHREDO");
/// Version of the redo area's format.
pub const REDO_VERSION: u32 = 1;
/// Most samples in a redo header.
pub const REDO_SAMPLES_MAX: usize = 16;
/// Most volumes of a consistency group that a redo header names.
pub const REDO_MEMBERS_MAX: usize = 32;

const CRC: usize = offset_of(RawHeader::FIELDS, "crc");
const MEMBER_BYTES: usize = REDO_MEMBERS_MAX * size_of::<Uuid>();
const SAMPLE_BYTES: usize = REDO_SAMPLES_MAX * RedoSample::SIZE;
const HEADER: Judge = Judge("RedoHeader");
const ENTRY: Judge = Judge("RedoEntry");
const FIRST_BITS: u32 = 48;

codes! {
    /// What a redo area holds.
    pub enum RedoState {
        /// Nothing that counts.
        Idle = 0 "idle",
        /// A whole group, of which any part may be on the disk.
        Committed = 1 "committed",
    }
}

codes! {
    /// What an entry of a redo table does to its sectors.
    pub enum RedoKind {
        /// Stores payload.
        Data = 0 "data",
        /// Stores zeros.
        Zero = 1 "zero",
        /// Stores zeros; the disk may give the space back.
        Unmap = 2 "unmap",
    }
}

/// One sector of the disk, as the group found it and as the group leaves it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RedoSample {
    /// The sector.
    pub sector: u64,
    /// CRC of its content before anything of the group was applied.
    pub before: u32,
    /// CRC of its content after all of it was: the same where the group does not touch it.
    pub after: u32,
}

layout! {
    /// A sample as it is in the header.
    struct RawSample: 16 {
        frame {}
        0 sector: u64,
        8 before: u32,
        12 after: u32,
    }
}

impl RedoSample {
    /// Bytes it takes.
    pub const SIZE: usize = RawSample::SIZE;
    /// Where its fields lie.
    pub const FIELDS: &'static [Field] = RawSample::FIELDS;
}

layout! {
    /// A redo header's page, with its samples as bytes.
    struct RawHeader: 4096 {
        frame { 0 magic: u64, 8 crc: u32 }
        12 version: u32,
        16 sequence: u64,
        24 cache_uuid: Uuid,
        40 volume_uuid: Uuid,
        56 incarnation: u64,
        64 backing_size: u64,
        72 state: RedoState,
        73 is_part: bool,
        80 epoch: u64,
        88 time_ms: u64,
        96 table: u64,
        104 entries: u32,
        108 table_crc: u32,
        112 sample_count: u32,
        120 part_epoch: u64,
        128 part_version: u64,
        136 samples: [u8; SAMPLE_BYTES],
        2048 group_uuid: Uuid,
        2064 base_epoch: u64,
        2072 member_count: u32,
        2080 members: [u8; MEMBER_BYTES],
    }
}

/// The page that says what a redo area holds. See FORMAT.md.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RedoHeader {
    /// Raised by each update.
    pub sequence: u64,
    /// The cache.
    pub cache_uuid: Uuid,
    /// The volume.
    pub volume_uuid: Uuid,
    /// The volume's incarnation.
    pub incarnation: u64,
    /// Bytes of the disk it is for.
    pub backing_size: u64,
    /// What it holds.
    pub state: RedoState,
    /// Whether the group ends inside an epoch, so that the tail does not move with it.
    pub is_part: bool,
    /// The volume's tail once the group is applied.
    pub epoch: u64,
    /// Of a part, the epoch in which it ends. Counts also when idle, while `epoch` is the tail.
    pub part_epoch: u64,
    /// Of a part, the version of the last key in it.
    pub part_version: u64,
    /// When the group was closed: the disk's state, once it is applied, is the guest's of that moment.
    pub time_ms: u64,
    /// Where the table begins, in bytes from the area's start.
    pub table: u64,
    /// Entries of the table.
    pub entries: u32,
    /// CRC of the table.
    pub table_crc: u32,
    /// By what the disk is recognised; at most [`REDO_SAMPLES_MAX`].
    pub samples: Vec<RedoSample>,
    /// The consistency group that it is written for; zero for none. Counts also when idle.
    pub group_uuid: Uuid,
    /// Of a member of that group, the tail if the group is not applied.
    pub base_epoch: u64,
    /// The volumes that take part: it counts only with theirs. At most [`REDO_MEMBERS_MAX`].
    pub members: Vec<Uuid>,
}

impl RedoHeader {
    /// Bytes it takes.
    pub const SIZE: usize = RawHeader::SIZE;
    /// Where its fields lie.
    pub const FIELDS: &'static [Field] = RawHeader::FIELDS;

    /// Its page.
    pub fn encode(&self) -> [u8; PAGE] {
        assert!(self.samples.len() <= REDO_SAMPLES_MAX, "the header has room for {REDO_SAMPLES_MAX} samples");
        let mut samples = [0; SAMPLE_BYTES];
        for (out, sample) in samples.as_chunks_mut::<{ RedoSample::SIZE }>().0.iter_mut().zip(&self.samples) {
            let RedoSample { sector, before, after } = *sample;
            RawSample { sector, before, after }.put(out);
        }
        assert!(self.members.len() <= REDO_MEMBERS_MAX, "the header has room for {REDO_MEMBERS_MAX} members");
        let mut members = [0; MEMBER_BYTES];
        members.as_chunks_mut().0.iter_mut().zip(&self.members).for_each(|(out, uuid)| *out = *uuid);
        let raw = RawHeader {
            version: REDO_VERSION,
            sequence: self.sequence,
            cache_uuid: self.cache_uuid,
            volume_uuid: self.volume_uuid,
            incarnation: self.incarnation,
            backing_size: self.backing_size,
            state: self.state,
            is_part: self.is_part,
            epoch: self.epoch,
            time_ms: self.time_ms,
            table: self.table,
            entries: self.entries,
            table_crc: self.table_crc,
            sample_count: self.samples.len() as u32,
            part_epoch: self.part_epoch,
            part_version: self.part_version,
            samples,
            group_uuid: self.group_uuid,
            base_epoch: self.base_epoch,
            member_count: self.members.len() as u32,
            members,
        };
        let mut page = [0; PAGE];
        raw.put(&mut page);
        page[..8].copy_from_slice(&REDO_MAGIC.to_le_bytes());
        put_crc(&mut page, CRC);
        page
    }

    /// The header in a page. Whose it is, the caller judges.
    ///
    /// # Errors
    /// [`Corruption`]: magic, CRC, version or a field is wrong.
    pub fn decode(bytes: &[u8]) -> Result<RedoHeader, Corruption> {
        let page: &[u8; PAGE] = HEADER.chunk(bytes)?;
        HEADER.exactly("magic", REDO_MAGIC, u64::from_le_bytes(*HEADER.chunk(page)?))?;
        judge_crc(HEADER, page, CRC)?;
        let raw = RawHeader::get(page)?;
        HEADER.exactly("version", REDO_VERSION.into(), raw.version.into())?;
        HEADER.counter("sequence", raw.sequence)?;
        HEADER.counter("incarnation", raw.incarnation)?;
        HEADER.counter("epoch", raw.epoch)?;
        HEADER.counter("part_epoch", raw.part_epoch)?;
        HEADER.counter("part_version", raw.part_version)?;
        HEADER.counter("base_epoch", raw.base_epoch)?;
        HEADER.at_most("member_count", REDO_MEMBERS_MAX as u64, raw.member_count.into())?;
        HEADER.multiple_of("table", 512, raw.table)?;
        HEADER.at_most("table", VOLUME_SECTORS_MAX * 512, raw.table)?;
        HEADER.at_most("backing_size", VOLUME_SECTORS_MAX * 512, raw.backing_size)?;
        HEADER.at_most("sample_count", REDO_SAMPLES_MAX as u64, raw.sample_count.into())?;
        let samples = raw.samples.as_chunks::<{ RedoSample::SIZE }>().0;
        let samples = samples.iter().take(raw.sample_count as usize).map(|bytes| {
            let RawSample { sector, before, after } = RawSample::get(bytes)?;
            HEADER.at_most("samples", (raw.backing_size / 512).saturating_sub(1), sector)?;
            Ok(RedoSample { sector, before, after })
        });
        Ok(RedoHeader {
            sequence: raw.sequence,
            cache_uuid: raw.cache_uuid,
            volume_uuid: raw.volume_uuid,
            incarnation: raw.incarnation,
            backing_size: raw.backing_size,
            state: raw.state,
            is_part: raw.is_part,
            epoch: raw.epoch,
            part_epoch: raw.part_epoch,
            part_version: raw.part_version,
            time_ms: raw.time_ms,
            table: raw.table,
            entries: raw.entries,
            table_crc: raw.table_crc,
            samples: samples.collect::<Result<_, Corruption>>()?,
            group_uuid: raw.group_uuid,
            base_epoch: raw.base_epoch,
            members: raw.members.as_chunks().0[..raw.member_count as usize].to_vec(),
        })
    }
}

impl Sequenced for RedoHeader {
    fn sequence(&self) -> u64 {
        self.sequence
    }
}

/// What a group does to one range of the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RedoEntry {
    /// The sectors.
    pub range: SectorRange,
    /// What is done to them.
    pub kind: RedoKind,
    /// CRC of the payload; 0 without.
    pub crc: u32,
    /// Where the payload begins, in bytes from the area's start; 0 without.
    pub at: u64,
}

layout! {
    /// An entry as it is in the table.
    struct RawEntry: 24 {
        frame {}
        0 word0: u64,
        8 sectors: u32,
        12 crc: u32,
        16 at: u64,
    }
}

impl RedoEntry {
    /// Bytes it takes.
    pub const SIZE: usize = RawEntry::SIZE;
    /// Where its fields lie.
    pub const FIELDS: &'static [Field] = RawEntry::FIELDS;

    /// Appends it to a table.
    pub fn encode(&self, table: &mut Vec<u8>) {
        let word0 = self.range.start | (self.kind as u64) << FIRST_BITS;
        let raw = RawEntry { word0, sectors: self.range.len as u32, crc: self.crc, at: self.at };
        let mut bytes = [0; RedoEntry::SIZE];
        raw.put(&mut bytes);
        table.extend_from_slice(&bytes);
    }

    /// The entries of a table whose CRC has been compared.
    ///
    /// # Errors
    /// [`Corruption`]: a field is out of its bounds.
    pub fn decode_table(table: &[u8]) -> Result<Vec<RedoEntry>, Corruption> {
        table.as_chunks::<{ RedoEntry::SIZE }>().0.iter().map(RedoEntry::decode).collect()
    }

    fn decode(bytes: &[u8; RedoEntry::SIZE]) -> Result<RedoEntry, Corruption> {
        let raw = RawEntry::get(bytes)?;
        let (first, sectors) = (raw.word0 & (VOLUME_SECTORS_MAX - 1), u64::from(raw.sectors));
        let code = raw.word0 >> FIRST_BITS;
        let kind = u8::try_from(code).ok().and_then(RedoKind::from_code);
        ENTRY.that(kind.is_some(), "kind", Expected::Text("a code of RedoKind"), code)?;
        ENTRY.at_least("sectors", 1, sectors)?;
        ENTRY.at_most("first + sectors", VOLUME_SECTORS_MAX, first + sectors)?;
        ENTRY.multiple_of("at", 512, raw.at)?;
        ENTRY.at_most("at", VOLUME_SECTORS_MAX * 512, raw.at)?;
        Ok(RedoEntry {
            range: SectorRange::new(first, sectors),
            kind: kind.unwrap_or_default(),
            crc: raw.crc,
            at: raw.at,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_every_flip_is_noticed, assert_total, assert_total_behind_check};
    use super::*;

    fn example() -> RedoHeader {
        RedoHeader {
            sequence: 9,
            cache_uuid: [0x11; 16],
            volume_uuid: [0x22; 16],
            incarnation: 3,
            backing_size: 1 << 20,
            state: RedoState::Committed,
            is_part: true,
            epoch: 77,
            part_epoch: 78,
            part_version: 1234,
            time_ms: 5,
            table: 8192,
            entries: 2,
            table_crc: 0xabcd,
            samples: vec![
                RedoSample { sector: 8, before: 1, after: 2 },
                RedoSample { sector: 9, before: 3, after: 3 },
            ],
            group_uuid: [0x33; 16],
            base_epoch: 70,
            members: vec![[0x22; 16], [0x44; 16]],
        }
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(RedoHeader::decode(&example().encode()), Ok(example()));
        let entries = [
            RedoEntry { range: SectorRange::new(8, 16), kind: RedoKind::Data, crc: 7, at: 4096 },
            RedoEntry { range: SectorRange::new(1 << 40, 1), kind: RedoKind::Unmap, crc: 0, at: 0 },
        ];
        let mut table = Vec::new();
        entries.iter().for_each(|entry| entry.encode(&mut table));
        assert_eq!(RedoEntry::decode_table(&table), Ok(entries.to_vec()));
    }

    #[test]
    fn every_changed_byte_of_a_header_is_noticed_and_no_bytes_panic() {
        assert_every_flip_is_noticed(&example().encode(), RedoHeader::decode);
        assert_total(0x5245, &example().encode(), RedoHeader::decode);
        let check = |page: &mut [u8]| put_crc(page, CRC);
        assert_total_behind_check(
            0x5246,
            &example().encode(),
            check,
            |h| h.encode().to_vec(),
            RedoHeader::decode,
        );
    }

    #[test]
    fn entries_out_of_bounds_are_refused() {
        let entry = RedoEntry { range: SectorRange::new(8, 16), kind: RedoKind::Data, crc: 7, at: 4096 };
        for (at, bad, field) in
            [(6, 3, "kind"), (7, 1, "kind"), (8, 0, "sectors"), (16, 1, "at"), (23, 2, "at")]
        {
            let mut table = Vec::new();
            entry.encode(&mut table);
            table[at] = bad;
            assert_eq!(RedoEntry::decode_table(&table).unwrap_err().field, field, "byte {at}");
        }
    }
}
