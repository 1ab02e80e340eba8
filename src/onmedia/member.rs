//! The members of a cache that lies on several devices, one after the other: which they are, and by
//! what each is known again.
//!
//! The superblock has the table of all, and it is what counts. A label in front of each member but the
//! first says the same of that one, so that what was left out, swapped, or taken from another cache
//! is found before anything is believed that lies behind it.

use super::check::{judge_crc, put_crc};
use super::corruption::{Expected, Judge};
use super::layout::{Wire, layout, offset_of};
use super::{Corruption, PAGE, Uuid};

/// The first 8 bytes of a member's label, as a little-endian number.
pub const MEMBER_MAGIC: u64 = u64::from_le_bytes(*b"PCVMEMBR");
/// Most members of a cache.
pub const MEMBERS_MAX: usize = 16;
/// Least bytes in front of what a member holds of the cache. Two bad pages of 2 MiB are needed to take
/// both copies of its label.
pub const MEMBER_START_MIN: u64 = 4 << 20;
/// Where the copies of a label are.
pub const MEMBER_LABELS: [u64; 2] = [0, 2 << 20];

const CRC: usize = offset_of(MemberLabel::FIELDS, "crc");
const LABEL: Judge = Judge("MemberLabel");
const TABLE: Judge = Judge("Superblock");

layout! {
    /// One device of several, and which part of the cache it has.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Member: 32 {
        frame {}
        /// Names it for good.
        0 uuid: Uuid,
        /// The cache's byte with which it begins.
        16 base: u64,
        /// Its own byte where that is: behind its labels.
        24 start: u64,
    }
}

impl Wire for [Member; MEMBERS_MAX] {
    const SIZE: usize = MEMBERS_MAX * Member::SIZE;
    const KIND: &'static str = "bytes";

    fn put(&self, out: &mut [u8]) {
        for (member, out) in self.iter().zip(out.as_chunks_mut().0) {
            member.put(out);
        }
    }

    fn get(bytes: &[u8]) -> Result<Self, (Expected, u64)> {
        let mut members = [Member::default(); MEMBERS_MAX];
        for (member, bytes) in members.iter_mut().zip(bytes.as_chunks().0) {
            *member = Member::get(bytes).map_err(|corruption| (corruption.expected, corruption.found))?;
        }
        Ok(members)
    }
}

layout! {
    /// What stands in front of a member that is not the first. See FORMAT.md.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct MemberLabel: 4096 {
        frame { 0 magic: u64, 8 crc: u32 }
        /// Its place among the members, from 1.
        12 index: u32,
        /// The cache.
        16 cache_uuid: Uuid,
        /// As in the superblock's table.
        32 uuid: Uuid,
        /// As in the superblock's table.
        48 base: u64,
        /// As in the superblock's table.
        56 start: u64,
    }
}

impl MemberLabel {
    /// The label of a member.
    pub fn new(cache_uuid: Uuid, index: u32, member: &Member) -> Self {
        Self { index, cache_uuid, uuid: member.uuid, base: member.base, start: member.start }
    }

    /// What the superblock's table says of this member, if both are right.
    pub fn member(&self) -> Member {
        Member { uuid: self.uuid, base: self.base, start: self.start }
    }

    /// Its page.
    pub fn encode(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        self.put(&mut page);
        page[..8].copy_from_slice(&MEMBER_MAGIC.to_le_bytes());
        put_crc(&mut page, CRC);
        page
    }

    /// The label in a page.
    ///
    /// # Errors
    /// [`Corruption`]: magic or CRC is wrong, or its place is impossible.
    pub fn decode(bytes: &[u8]) -> Result<Self, Corruption> {
        let page: &[u8; PAGE] = LABEL.chunk(bytes)?;
        LABEL.exactly("magic", MEMBER_MAGIC, u64::from_le_bytes(*LABEL.chunk(page)?))?;
        judge_crc(LABEL, page, CRC)?;
        let label = Self::get(page)?;
        LABEL.at_least("index", 1, label.index.into())?;
        LABEL.at_most("index", MEMBERS_MAX as u64 - 1, label.index.into())?;
        judge_place(LABEL, &label.member(), PAGE as u64)?;
        Ok(label)
    }
}

/// Whether a member other than the first can lie there, behind one that begins before `base_min`.
fn judge_place(judge: Judge, member: &Member, base_min: u64) -> Result<(), Corruption> {
    for (field, least, value) in [("base", base_min, member.base), ("start", MEMBER_START_MIN, member.start)]
    {
        judge.at_least(field, least, value)?;
        judge.multiple_of(field, PAGE as u64, value)?;
        judge.counter(field, value)?;
    }
    Ok(())
}

/// Whether a table of members is possible.
pub(super) fn judge_members(members: &[Member]) -> Result<(), Corruption> {
    TABLE.at_least("member_count", 2, members.len() as u64)?;
    TABLE.exactly("base", 0, members[0].base)?;
    TABLE.exactly("start", 0, members[0].start)?;
    for pair in members.windows(2) {
        judge_place(TABLE, &pair[1], pair[0].base + PAGE as u64)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{
        assert_every_flip_is_noticed, assert_golden, assert_total, assert_total_behind_check,
    };
    use super::*;

    fn example() -> MemberLabel {
        let member = Member { uuid: [0x33; 16], base: 0x4000_0000, start: 4 << 20 };
        MemberLabel::new([0x11; 16], 1, &member)
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(MemberLabel::decode(&example().encode()), Ok(example()));
    }

    #[test]
    fn every_changed_byte_is_noticed_and_no_bytes_panic() {
        assert_every_flip_is_noticed(&example().encode(), MemberLabel::decode);
        assert_total(0x4d4c, &example().encode(), MemberLabel::decode);
    }

    #[test]
    fn nothing_is_believed_for_the_crcs_sake() {
        let check = |page: &mut [u8]| put_crc(page, CRC);
        let encode = |label: &MemberLabel| label.encode().to_vec();
        assert_total_behind_check(0x4d4d, &example().encode(), check, encode, MemberLabel::decode);
    }

    #[test]
    fn a_place_that_cannot_be_is_damage() {
        for (bad, field) in [
            (MemberLabel { index: 0, ..example() }, "index"),
            (MemberLabel { index: MEMBERS_MAX as u32, ..example() }, "index"),
            (MemberLabel { base: 0, ..example() }, "base"),
            (MemberLabel { base: 4097, ..example() }, "base"),
            (MemberLabel { start: 2 << 20, ..example() }, "start"),
            (MemberLabel { start: (4 << 20) + 512, ..example() }, "start"),
        ] {
            assert_eq!(MemberLabel::decode(&bad.encode()).unwrap_err().field, field, "{bad:?}");
        }
    }

    #[test]
    fn the_bytes_are_these() {
        assert_golden(
            &example().encode(),
            "
             0000: 50 43 56 4d 45 4d 42 52 55 db 6c 47 01 00 00 00
             0010: 11 11 11 11 11 11 11 11 11 11 11 11 11 11 11 11
             0020: 33 33 33 33 33 33 33 33 33 33 33 33 33 33 33 33
             0030: 00 00 00 40 00 00 00 00 00 00 40 00 00 00 00 00
            ",
        );
    }
}
