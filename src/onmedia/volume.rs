//! A volume's two pages: its descriptor, changed by operators, and its tail, moved by write-back.
//!
//! They are apart so that write-back, which moves the tail all the time, never rewrites what an
//! operator configured, and needs no space but its own slot.

use std::borrow::Cow;

use super::check::{judge_crc, put_crc};
use super::corruption::Judge;
use super::dual::Sequenced;
use super::layout::{codes, layout, offset_of};
use super::{Corruption, Expected, Field, LOST_MAX, LostRange, PAGE, Uuid, VOLUME_SECTORS_MAX, text, unpad};

/// The first 8 bytes of a volume descriptor, as a little-endian number.
pub const DESCRIPTOR_MAGIC: u64 = u64::from_le_bytes(*b"PCVVOLUM");
/// The first 8 bytes of a tail, as a little-endian number.
pub const TAIL_MAGIC: u64 = u64::from_le_bytes(*b"PCVHTAIL");
/// The largest `gc_percent`.
pub const GC_PERCENT_MAX: u8 = 90;
/// The `gc_percent` that means none was set.
pub const GC_PERCENT_UNSET: u8 = 255;

codes! {
    /// What a volume slot is used for.
    pub enum VolumeState {
        /// Nothing; its other fields mean nothing.
        Empty = 0 "empty",
        /// A volume.
        InUse = 1 "in-use",
        /// A volume being deleted: it counts as none.
        Deleting = 2 "deleting",
    }
}

codes! {
    /// What the cache does with writes and reads of a volume.
    pub enum Mode {
        /// Writes complete when the cache has them.
        Writeback = 0 "writeback",
        /// Writes complete when the disk has them, and fill the cache.
        Writethrough = 1 "writethrough",
        /// Writes complete when the disk has them, and do not fill the cache.
        Writearound = 2 "writearound",
        /// Writes are refused; reads fill the cache.
        Readonly = 3 "readonly",
        /// Neither reads nor writes use the cache.
        Passthrough = 4 "passthrough",
    }
}

codes! {
    /// In what order dirty data reaches the disk.
    pub enum Order {
        /// Epoch by epoch: the disk alone is always as it was at some FLUSH.
        Strict = 0 "strict",
        /// Several epochs at a time, applied as one by way of a redo area: the disk alone, once what
        /// the redo area holds is applied, is always as it was at some FLUSH.
        Grouped = 1 "grouped",
        /// By address, across epochs: the disk alone is consistent only after a drain.
        Relaxed = 2 "relaxed",
    }
}

codes! {
    /// What becomes of a discard at the disk.
    pub enum DiscardPolicy {
        /// The disk is told to store zeros and keep the space.
        Keep = 0 "keep",
        /// The disk may give the space back.
        Pass = 1 "pass",
    }
}

const DESCRIPTOR_CRC: usize = offset_of(VolumeDescriptor::FIELDS, "crc");
const DESCRIPTOR: Judge = Judge("VolumeDescriptor");

layout! {
    /// A volume: what it is, in front of which disk, and how it is cached. See FORMAT.md.
    #[derive(Clone, PartialEq, Eq, Debug)]
    pub struct VolumeDescriptor: 4096 {
        frame { 0 magic: u64, 8 crc: u32 }
        /// The slot it stands in.
        12 slot: u32,
        /// Raised by each update.
        16 sequence: u64,
        /// The cache it belongs to.
        24 cache_uuid: Uuid,
        /// The number all of its segments and records carry; unique in the life of the cache.
        40 incarnation: u64,
        /// Names the volume for good.
        48 uuid: Uuid,
        /// What the slot is used for.
        64 state: VolumeState,
        /// What is done with its writes and reads.
        65 mode: Mode,
        /// In what order its dirty data reaches the disk.
        66 order: Order,
        /// Whether hits verify the payload's checksums (write-back always does).
        67 data_crc: bool,
        /// What becomes of a discard at the disk.
        68 discard: DiscardPolicy,
        /// Whether dirty data was lost and the operator has not accepted it.
        69 damaged: bool,
        /// Ceiling of the share in use, at most [`GC_PERCENT_MAX`], or [`GC_PERCENT_UNSET`].
        70 gc_percent: u8,
        /// Whether `fingerprint` has been taken.
        71 fingerprint_valid: bool,
        /// Logical block size in bytes.
        72 block_size: u32,
        /// What kind of thing the disk is; compared with what is found, nothing else.
        76 backing_kind: u32,
        /// Size in sectors.
        80 sectors: u64,
        /// The disk's size in bytes.
        88 backing_size: u64,
        /// The disk's device number.
        96 backing_device: u64,
        /// The disk's inode number, 0 for a device.
        104 backing_inode: u64,
        /// A checksum over samples of the disk's content at the last orderly stop.
        112 fingerprint: u64,
        /// Bytes of cache it is sure to get.
        120 cache_min: u64,
        /// Bytes of cache it gets at most; 0 for no limit.
        128 cache_max: u64,
        /// The first epoch from which on the disk alone has been consistent.
        136 consistent_from_epoch: u64,
        /// What GET_ID answers.
        144 serial: [u8; 20],
        /// Whether its redo area may hold a group of which parts are on the disk.
        164 redo_open: bool,
        /// The operator's name for it, as text.
        192 name: [u8; 64],
        /// Where the disk was found: a hint, cut if need be.
        256 path: [u8; 512],
        /// Raised by each attach.
        1024 attach_count: u64,
        /// What the disk's sidecar said when last heard of; 0 if there is none.
        1032 pair_generation: u64,
        /// Tells two histories of one generation apart.
        1040 pair_nonce: u64,
        /// What it is about to say, or says already; 0 if there will be none.
        1048 pair_next_generation: u64,
        /// The nonce of that.
        1056 pair_next_nonce: u64,
        /// Where `fingerprint` looks; 0 for the places of the first version.
        1064 fingerprint_seed: u64,
        /// Clean keys of lower versions were dropped.
        1072 clean_from_version: u64,
        /// A hash of the disk's own name (WWN, serial number), 0 if it has none.
        1080 disk_stable: u64,
        /// When the disk's file was made, 0 if unknown; all times since 1970.
        1088 disk_born_ns: u64,
        /// When the disk's file was last written to, as last seen; 0 if unknown.
        1096 disk_modified_ns: u64,
        /// The same, as it was when last known to be durable.
        1104 disk_settled_ns: u64,
        /// Until when the daemon may have written to the disk.
        1112 disk_used_until_ms: u64,
        /// The kernel's number of this attachment of the device, 0 if it gives none.
        1120 disk_attachment: u64,
        /// Sectors that the kernel had counted as written; [`u64::MAX`] if it does not count.
        1128 disk_written: u64,
        /// The kernel's boot identity when that was so.
        1136 disk_boot: [u8; 16],
        /// The consistency group it is a member of; zero for none.
        1408 group_uuid: Uuid,
        /// That group's name, as text.
        1424 group_name: [u8; 64],
        /// The size in sectors that it is growing to; 0 while it is not.
        1488 next_sectors: u64,
        /// Where its redo area was found: a hint, empty without one.
        1536 redo_path: [u8; 512],
    }
}

impl VolumeDescriptor {
    /// The descriptor of an empty slot.
    pub fn empty(cache_uuid: Uuid, slot: u32) -> VolumeDescriptor {
        VolumeDescriptor { slot, sequence: 1, cache_uuid, ..Default::default() }
    }

    /// Its name, empty for an empty slot.
    pub fn name_text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(unpad(&self.name))
    }

    /// Where its disk was found.
    pub fn path_text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(unpad(&self.path))
    }

    /// Where its redo area was found, if it has one.
    pub fn redo_path_text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(unpad(&self.redo_path))
    }

    /// The name of the consistency group it is a member of, empty without one.
    pub fn group_text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(unpad(&self.group_name))
    }

    /// Its page.
    pub fn encode(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        self.put(&mut page);
        page[..8].copy_from_slice(&DESCRIPTOR_MAGIC.to_le_bytes());
        put_crc(&mut page, DESCRIPTOR_CRC);
        page
    }

    /// The descriptor in slot `slot` of the cache `cache_uuid` in a page.
    ///
    /// # Errors
    /// [`Corruption`]: magic, CRC, cache, slot or a field of a used slot is wrong.
    pub fn decode(bytes: &[u8], cache_uuid: &Uuid, slot: u32) -> Result<VolumeDescriptor, Corruption> {
        let page: &[u8; PAGE] = DESCRIPTOR.chunk(bytes)?;
        let magic = u64::from_le_bytes(*DESCRIPTOR.chunk(page)?);
        DESCRIPTOR.exactly("magic", DESCRIPTOR_MAGIC, magic)?;
        judge_crc(DESCRIPTOR, page, DESCRIPTOR_CRC)?;
        let volume = VolumeDescriptor::get(page)?;
        DESCRIPTOR.cache(cache_uuid, &volume.cache_uuid)?;
        DESCRIPTOR.exactly("slot", slot.into(), volume.slot.into())?;
        DESCRIPTOR.counter("sequence", volume.sequence)?;
        if volume.state != VolumeState::Empty {
            volume.judge_used()?;
        }
        Ok(volume)
    }

    /// Judges the fields that mean something only in a used slot.
    fn judge_used(&self) -> Result<(), Corruption> {
        DESCRIPTOR.at_least("incarnation", 1, self.incarnation)?;
        DESCRIPTOR.counter("incarnation", self.incarnation)?;
        DESCRIPTOR.counter("attach_count", self.attach_count)?;
        DESCRIPTOR.counter("pair_generation", self.pair_generation)?;
        DESCRIPTOR.counter("pair_next_generation", self.pair_next_generation)?;
        DESCRIPTOR.counter("clean_from_version", self.clean_from_version)?;
        DESCRIPTOR.at_least("sectors", 1, self.sectors)?;
        DESCRIPTOR.at_most("sectors", VOLUME_SECTORS_MAX, self.sectors)?;
        DESCRIPTOR.at_most("next_sectors", VOLUME_SECTORS_MAX, self.next_sectors)?;
        let block = self.block_size;
        let block_good = block.is_power_of_two() && (512..=4096).contains(&block);
        let block_rule = Expected::Text("a power of two from 512 to 4096");
        DESCRIPTOR.that(block_good, "block_size", block_rule, block.into())?;
        let gc = self.gc_percent;
        let gc_rule = Expected::Text("at most 90, or 255");
        let gc_good = gc <= GC_PERCENT_MAX || gc == GC_PERCENT_UNSET;
        DESCRIPTOR.that(gc_good, "gc_percent", gc_rule, gc.into())?;
        let name = text("VolumeDescriptor", "name", &self.name)?;
        let is_name = !name.is_empty() && !name.contains(char::is_control);
        DESCRIPTOR.that(is_name, "name", Expected::Text("a name"), 0)
    }
}

impl Default for VolumeDescriptor {
    /// An empty slot's fields, with nothing said about where it stands.
    fn default() -> Self {
        VolumeDescriptor {
            slot: 0,
            sequence: 0,
            cache_uuid: [0; 16],
            incarnation: 0,
            uuid: [0; 16],
            state: VolumeState::Empty,
            mode: Mode::Writeback,
            order: Order::Strict,
            data_crc: false,
            discard: DiscardPolicy::Keep,
            damaged: false,
            gc_percent: GC_PERCENT_UNSET,
            fingerprint_valid: false,
            block_size: 0,
            backing_kind: 0,
            sectors: 0,
            backing_size: 0,
            backing_device: 0,
            backing_inode: 0,
            fingerprint: 0,
            cache_min: 0,
            cache_max: 0,
            consistent_from_epoch: 0,
            serial: [0; 20],
            redo_open: false,
            name: [0; 64],
            path: [0; 512],
            redo_path: [0; 512],
            attach_count: 0,
            pair_generation: 0,
            pair_nonce: 0,
            pair_next_generation: 0,
            pair_next_nonce: 0,
            fingerprint_seed: 0,
            clean_from_version: 0,
            disk_stable: 0,
            disk_born_ns: 0,
            disk_modified_ns: 0,
            disk_settled_ns: 0,
            disk_used_until_ms: 0,
            disk_attachment: 0,
            disk_written: 0,
            disk_boot: [0; 16],
            group_uuid: [0; 16],
            group_name: [0; 64],
            next_sectors: 0,
        }
    }
}

impl Sequenced for VolumeDescriptor {
    fn sequence(&self) -> u64 {
        self.sequence
    }
}

const TAIL_CRC: usize = offset_of(RawTail::FIELDS, "crc");
const TAIL: Judge = Judge("Tail");
const LOST_BYTES: usize = LOST_MAX * LostRange::SIZE;

layout! {
    /// A tail's page, with its lost ranges as bytes.
    struct RawTail: 4096 {
        frame { 0 magic: u64, 8 crc: u32 }
        16 sequence: u64,
        24 cache_uuid: Uuid,
        40 incarnation: u64,
        48 epoch: u64,
        56 version_floor: u64,
        64 time_ms: u64,
        72 lost_count: u32,
        80 lost: [u8; LOST_BYTES],
    }
}

/// How much of a volume is wholly on its disk, and what of it is lost. See FORMAT.md.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tail {
    /// Raised by each update.
    pub sequence: u64,
    /// The cache it belongs to.
    pub cache_uuid: Uuid,
    /// The volume it belongs to; another's is a left-over and counts as none.
    pub incarnation: u64,
    /// Every key of this epoch or a lower one is clean, or lost.
    pub epoch: u64,
    /// Versions drawn after a start are above this.
    pub version_floor: u64,
    /// When it moved, milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// Sectors that are neither here nor on the disk, at most [`LOST_MAX`] ranges.
    pub lost: Vec<LostRange>,
}

impl Tail {
    /// Bytes it takes on the media.
    pub const SIZE: usize = RawTail::SIZE;
    /// Where its fields lie.
    pub const FIELDS: &'static [Field] = RawTail::FIELDS;

    /// Its page. Panics when it has more lost ranges than a page holds.
    pub fn encode(&self) -> [u8; PAGE] {
        assert!(self.lost.len() <= LOST_MAX, "{} lost ranges", self.lost.len());
        let mut lost = [0; LOST_BYTES];
        for (range, out) in self.lost.iter().zip(lost.as_chunks_mut::<{ LostRange::SIZE }>().0) {
            range.encode(out);
        }
        let Tail { sequence, cache_uuid, incarnation, epoch, version_floor, time_ms, .. } = *self;
        let lost_count = self.lost.len() as u32;
        let raw =
            RawTail { sequence, cache_uuid, incarnation, epoch, version_floor, time_ms, lost_count, lost };
        let mut page = [0; PAGE];
        raw.put(&mut page);
        page[..8].copy_from_slice(&TAIL_MAGIC.to_le_bytes());
        put_crc(&mut page, TAIL_CRC);
        page
    }

    /// The tail of volume `incarnation` of the cache `cache_uuid` in a page.
    ///
    /// # Errors
    /// [`Corruption`]: magic, CRC, cache, incarnation or a lost range is wrong.
    pub fn decode(bytes: &[u8], cache_uuid: &Uuid, incarnation: u64) -> Result<Tail, Corruption> {
        let page: &[u8; PAGE] = TAIL.chunk(bytes)?;
        TAIL.exactly("magic", TAIL_MAGIC, u64::from_le_bytes(*TAIL.chunk(page)?))?;
        judge_crc(TAIL, page, TAIL_CRC)?;
        let raw = RawTail::get(page)?;
        TAIL.cache(cache_uuid, &raw.cache_uuid)?;
        TAIL.exactly("incarnation", incarnation, raw.incarnation)?;
        TAIL.counter("sequence", raw.sequence)?;
        TAIL.counter("epoch", raw.epoch)?;
        TAIL.counter("version_floor", raw.version_floor)?;
        TAIL.at_most("lost_count", LOST_MAX as u64, raw.lost_count.into())?;
        let lost = raw.lost.as_chunks::<{ LostRange::SIZE }>().0.iter().take(raw.lost_count as usize);
        let lost = lost.map(LostRange::decode).collect::<Result<_, _>>()?;
        let RawTail { sequence, cache_uuid, incarnation, epoch, version_floor, time_ms, .. } = raw;
        Ok(Tail { sequence, cache_uuid, incarnation, epoch, version_floor, time_ms, lost })
    }
}

impl Sequenced for Tail {
    fn sequence(&self) -> u64 {
        self.sequence
    }
}

#[cfg(test)]
mod tests {
    use super::super::COUNTER_MAX;
    use super::super::testing::{
        assert_every_flip_is_noticed, assert_golden, assert_total, assert_total_behind_check,
    };
    use super::super::{LostCause, pad, pad_cut};
    use super::*;
    use crate::units::SectorRange;

    const CACHE: Uuid = [0x11; 16];

    fn volume() -> VolumeDescriptor {
        VolumeDescriptor {
            slot: 3,
            sequence: 4,
            cache_uuid: CACHE,
            incarnation: 5,
            uuid: [0x33; 16],
            state: VolumeState::InUse,
            mode: Mode::Writethrough,
            order: Order::Relaxed,
            data_crc: true,
            discard: DiscardPolicy::Pass,
            damaged: true,
            gc_percent: 70,
            fingerprint_valid: true,
            block_size: 4096,
            backing_kind: 1,
            sectors: 0x1234_5678,
            backing_size: 0x1234_5678 * 512,
            backing_device: 0xfd01,
            backing_inode: 42,
            fingerprint: 0xdead_beef_0bad_cafe,
            cache_min: 1 << 20,
            cache_max: 1 << 30,
            consistent_from_epoch: 6,
            serial: pad("serial").unwrap(),
            redo_open: true,
            redo_path: pad("/srv/vm.img.redo").unwrap(),
            name: pad("vm-1").unwrap(),
            path: pad_cut("/srv/vm-1.raw"),
            attach_count: 7,
            pair_generation: 8,
            pair_nonce: 9,
            pair_next_generation: 10,
            pair_next_nonce: 11,
            fingerprint_seed: 12,
            clean_from_version: 13,
            disk_stable: 14,
            disk_born_ns: 15,
            disk_modified_ns: 16,
            disk_settled_ns: 17,
            disk_used_until_ms: 18,
            disk_attachment: 19,
            disk_written: 20,
            disk_boot: [0x44; 16],
            group_uuid: [0x55; 16],
            group_name: pad("vm").unwrap(),
            next_sectors: 0,
        }
    }

    fn tail() -> Tail {
        Tail {
            sequence: 8,
            cache_uuid: CACHE,
            incarnation: 5,
            epoch: 77,
            version_floor: 1 << 40,
            time_ms: 1_700_000_000_123,
            lost: Vec::new(),
        }
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(VolumeDescriptor::decode(&volume().encode(), &CACHE, 3), Ok(volume()));
        assert_eq!(Tail::decode(&tail().encode(), &CACHE, 5), Ok(tail()));
        assert_eq!((volume().name_text(), volume().path_text()), ("vm-1".into(), "/srv/vm-1.raw".into()));
        let empty = VolumeDescriptor::empty(CACHE, 9);
        assert_eq!(VolumeDescriptor::decode(&empty.encode(), &CACHE, 9), Ok(empty));
    }

    #[test]
    fn a_tail_names_as_many_lost_ranges_as_fit() {
        let lost = |i| LostRange {
            range: SectorRange::new(i * 8, 1 + i),
            version: i,
            time_s: i as u32,
            cause: if i % 2 == 0 { LostCause::Checksum } else { LostCause::Unreadable },
        };
        for count in [1, 2, LOST_MAX as u64] {
            let tail = Tail { lost: (0..count).map(lost).collect(), ..tail() };
            assert_eq!(Tail::decode(&tail.encode(), &CACHE, 5), Ok(tail));
        }
        let mut page = tail().encode();
        page[72..76].copy_from_slice(&(LOST_MAX as u32 + 1).to_le_bytes());
        put_crc(&mut page, TAIL_CRC);
        assert_eq!(Tail::decode(&page, &CACHE, 5).unwrap_err().field, "lost_count");
        page[72..76].copy_from_slice(&1u32.to_le_bytes());
        put_crc(&mut page, TAIL_CRC);
        assert_eq!(Tail::decode(&page, &CACHE, 5).unwrap_err().structure, "LostRange");
    }

    #[test]
    fn every_changed_byte_is_noticed_and_no_bytes_panic() {
        let decode = |bytes: &[u8]| VolumeDescriptor::decode(bytes, &CACHE, 3);
        assert_every_flip_is_noticed(&volume().encode(), decode);
        assert_total(0x564f, &volume().encode(), decode);
        let decode = |bytes: &[u8]| Tail::decode(bytes, &CACHE, 5);
        assert_every_flip_is_noticed(&tail().encode(), decode);
        assert_total(0x5441, &tail().encode(), decode);
    }

    #[test]
    fn a_page_from_elsewhere_does_not_count() {
        let page = volume().encode();
        assert_eq!(VolumeDescriptor::decode(&page, &[0; 16], 3).unwrap_err().field, "cache_uuid");
        assert_eq!(VolumeDescriptor::decode(&page, &CACHE, 4).unwrap_err().field, "slot");
        let page = tail().encode();
        assert_eq!(Tail::decode(&page, &[0; 16], 5).unwrap_err().field, "cache_uuid");
        assert_eq!(Tail::decode(&page, &CACHE, 6).unwrap_err().field, "incarnation");
        assert_eq!(Tail::decode(&volume().encode(), &CACHE, 5).unwrap_err().field, "magic");
    }

    #[test]
    fn a_counter_that_could_wrap_is_refused() {
        let end = COUNTER_MAX + 1;
        for bad in [
            Tail { sequence: end, ..tail() },
            Tail { epoch: end, ..tail() },
            Tail { version_floor: u64::MAX, ..tail() },
        ] {
            assert!(Tail::decode(&bad.encode(), &CACHE, 5).is_err(), "{bad:?}");
        }
        let bad = VolumeDescriptor { sequence: end, ..volume() };
        assert_eq!(VolumeDescriptor::decode(&bad.encode(), &CACHE, 3).unwrap_err().field, "sequence");
        let last = Tail { epoch: COUNTER_MAX, ..tail() };
        assert_eq!(Tail::decode(&last.encode(), &CACHE, 5), Ok(last));
    }

    #[test]
    fn fields_out_of_bounds_are_refused_though_the_crc_holds() {
        for (field, bad) in [
            ("incarnation", VolumeDescriptor { incarnation: 0, ..volume() }),
            ("sectors", VolumeDescriptor { sectors: 0, ..volume() }),
            ("sectors", VolumeDescriptor { sectors: VOLUME_SECTORS_MAX + 1, ..volume() }),
            ("next_sectors", VolumeDescriptor { next_sectors: VOLUME_SECTORS_MAX + 1, ..volume() }),
            ("block_size", VolumeDescriptor { block_size: 0, ..volume() }),
            ("block_size", VolumeDescriptor { block_size: 1536, ..volume() }),
            ("block_size", VolumeDescriptor { block_size: 8192, ..volume() }),
            ("gc_percent", VolumeDescriptor { gc_percent: 91, ..volume() }),
            ("gc_percent", VolumeDescriptor { gc_percent: 254, ..volume() }),
            ("name", VolumeDescriptor { name: [0; 64], ..volume() }),
            ("name", VolumeDescriptor { name: [0xff; 64], ..volume() }),
            ("name", VolumeDescriptor { name: [b'\n'; 64], ..volume() }),
        ] {
            let error = VolumeDescriptor::decode(&bad.encode(), &CACHE, 3).unwrap_err();
            assert_eq!(error.field, field, "{error}");
            let empty = VolumeDescriptor { state: VolumeState::Empty, ..bad };
            assert!(VolumeDescriptor::decode(&empty.encode(), &CACHE, 3).is_ok());
        }
    }

    #[test]
    fn unknown_codes_are_refused_though_the_crc_holds() {
        for (at, field, lowest_bad) in
            [(64, "state", 3), (65, "mode", 5), (66, "order", 3), (67, "data_crc", 2), (68, "discard", 2)]
        {
            for code in lowest_bad..=255 {
                let mut page = volume().encode();
                page[at] = code;
                put_crc(&mut page, DESCRIPTOR_CRC);
                let error = VolumeDescriptor::decode(&page, &CACHE, 3).unwrap_err();
                assert_eq!((error.field, error.found), (field, code.into()));
            }
        }
        assert_eq!(Order::from_code(3), None);
    }

    #[test]
    fn codes_and_names_lead_to_each_other() {
        for &(code, name) in Mode::CODES {
            let mode = Mode::from_code(code).unwrap();
            assert_eq!((mode as u8, mode.name(), Mode::from_name(name)), (code, name, Some(mode)));
        }
    }

    #[test]
    fn nothing_is_believed_for_the_crcs_sake() {
        let check = |page: &mut [u8]| put_crc(page, DESCRIPTOR_CRC);
        let encode = |volume: &VolumeDescriptor| volume.encode().to_vec();
        let decode = |bytes: &[u8]| VolumeDescriptor::decode(bytes, &CACHE, 3);
        assert_total_behind_check(0x5343, &volume().encode(), check, encode, decode);
        let check = |page: &mut [u8]| put_crc(page, TAIL_CRC);
        let encode = |tail: &Tail| tail.encode().to_vec();
        let decode = |bytes: &[u8]| Tail::decode(bytes, &CACHE, 5);
        assert_total_behind_check(0x5343, &tail().encode(), check, encode, decode);
    }

    #[test]
    fn a_size_that_is_announced_is_read_back() {
        let growing = VolumeDescriptor { next_sectors: 21, ..volume() };
        let page = growing.encode();
        assert_eq!(page[1488..1496], 21u64.to_le_bytes());
        assert_eq!(VolumeDescriptor::decode(&page, &CACHE, 3), Ok(growing));
    }

    #[test]
    fn the_bytes_are_these() {
        assert_golden(
            &volume().encode(),
            "
             0000: 50 43 56 56 4f 4c 55 4d f8 31 30 8a 03 00 00 00
             0010: 04 00 00 00 00 00 00 00 11 11 11 11 11 11 11 11
             0020: 11 11 11 11 11 11 11 11 05 00 00 00 00 00 00 00
             0030: 33 33 33 33 33 33 33 33 33 33 33 33 33 33 33 33
             0040: 01 01 02 01 01 01 46 01 00 10 00 00 01 00 00 00
             0050: 78 56 34 12 00 00 00 00 00 f0 ac 68 24 00 00 00
             0060: 01 fd 00 00 00 00 00 00 2a 00 00 00 00 00 00 00
             0070: fe ca ad 0b ef be ad de 00 00 10 00 00 00 00 00
             0080: 00 00 00 40 00 00 00 00 06 00 00 00 00 00 00 00
             0090: 73 65 72 69 61 6c 00 00 00 00 00 00 00 00 00 00
             00a0: 00 00 00 00 01 00 00 00 00 00 00 00 00 00 00 00
             00c0: 76 6d 2d 31 00 00 00 00 00 00 00 00 00 00 00 00
             0100: 2f 73 72 76 2f 76 6d 2d 31 2e 72 61 77 00 00 00
             0400: 07 00 00 00 00 00 00 00 08 00 00 00 00 00 00 00
             0410: 09 00 00 00 00 00 00 00 0a 00 00 00 00 00 00 00
             0420: 0b 00 00 00 00 00 00 00 0c 00 00 00 00 00 00 00
             0430: 0d 00 00 00 00 00 00 00 0e 00 00 00 00 00 00 00
             0440: 0f 00 00 00 00 00 00 00 10 00 00 00 00 00 00 00
             0450: 11 00 00 00 00 00 00 00 12 00 00 00 00 00 00 00
             0460: 13 00 00 00 00 00 00 00 14 00 00 00 00 00 00 00
             0470: 44 44 44 44 44 44 44 44 44 44 44 44 44 44 44 44
             0600: 2f 73 72 76 2f 76 6d 2e 69 6d 67 2e 72 65 64 6f
            ",
        );
        assert_golden(
            &tail().encode(),
            "
             0000: 50 43 56 48 54 41 49 4c 25 fb 44 57 00 00 00 00
             0010: 08 00 00 00 00 00 00 00 11 11 11 11 11 11 11 11
             0020: 11 11 11 11 11 11 11 11 05 00 00 00 00 00 00 00
             0030: 4d 00 00 00 00 00 00 00 00 00 00 00 00 01 00 00
             0040: 7b 68 e5 cf 8b 01 00 00 00 00 00 00 00 00 00 00
            ",
        );
    }
}
