//! Bytes on the media ⇄ values: the whole format, pure, and the document that defines it.
#![doc = ""]
#![doc = include_str!("FORMAT.md")]
#![forbid(unsafe_code)]
//!
//! # In the code
//!
//! One file per structure; no I/O anywhere. Each layout is stated once, in a `layout!` block, from
//! which come the struct, its encoder and decoder and its row in [`STRUCTURES`];
//! `tests/format_doc.rs` reads the tables above and compares. What every file here keeps true:
//!
//! 1. Decoders are total: any bytes give a value or an error, never a panic, and a value's fields
//!    are within the bounds FORMAT.md gives them.
//! 2. Nothing is believed before its check (CRC-32 or SipHash) and its position have been compared.
//! 3. Encoders write every byte of their structure, reserved ones as zero.

mod check;
mod corruption;
mod dual;
mod geometry;
mod key;
mod layout;
mod liveness;
mod lost;
mod member;
mod record;
mod redo;
mod segment;
mod sidecar;
mod start;
mod summary;
mod superblock;
#[cfg(test)]
mod testing;
mod text;
mod volume;
mod witness;

pub use check::{Secret, payload_checksum, sip};
pub use corruption::{Corruption, Expected};
pub use dual::{Dual, Sequenced, newest};
pub use geometry::{
    Geometry, GeometryError, LOG_ALIGN, META_SIZE, SEGMENT_COUNT_MIN, SEGMENT_SIZE_MAX, SEGMENT_SIZE_MIN,
    backup_superblock,
};
pub use key::{KEY_SECTORS_MAX, Key, KeyKind, Piece, VOLUME_SECTORS_MAX};
pub use layout::Field;
pub use liveness::{LIVENESS_SECTORS, LIVENESS_WORD, LivenessFloor, liveness_bits, liveness_word};
pub use lost::{LOST_MAX, LostCause, LostRange};
pub use member::{MEMBER_LABELS, MEMBER_MAGIC, MEMBER_START_MIN, MEMBERS_MAX, Member, MemberLabel};
pub use record::{
    RECORD_LEN_MAX, RECORD_MAGIC, Record, RecordError, RecordExpect, RecordHeader, decode_record,
    decode_record_into, encode_record, record_len,
};
pub use redo::{
    REDO_MAGIC, REDO_MEMBERS_MAX, REDO_SAMPLES_MAX, REDO_VERSION, RedoEntry, RedoHeader, RedoKind,
    RedoSample, RedoState,
};
pub use segment::{SEGMENT_MAGIC, SegmentHeader, SegmentKind, SegmentState};
pub use sidecar::{SIDECAR_MAGIC, Sidecar};
pub use start::{START_MAGIC, StartPage};
pub use summary::{
    SUMMARY_MAGIC, Summary, SummaryExpect, SummaryHeader, decode_summary, decode_summary_into,
    encode_summary, summary_len,
};
pub use superblock::{
    FEATURES_COMPAT, FEATURES_INCOMPAT, FEATURES_RO_COMPAT, GENERATION_FLOOR, MEMBERS, SUPERBLOCK_MAGIC,
    Superblock, SuperblockError, VERSION, VOID_SEGMENTS,
};
pub use text::{pad, pad_cut, text, unpad};
pub use volume::{
    DESCRIPTOR_MAGIC, DiscardPolicy, GC_PERCENT_MAX, GC_PERCENT_UNSET, Mode, Order, TAIL_MAGIC, Tail,
    VolumeDescriptor, VolumeState,
};
pub use witness::Witness;

/// Bytes in a metadata page; the unit of payload checksums as well.
pub const PAGE: usize = 4096;

/// Largest value of a number that is only ever raised (sequence, version, epoch, generation and the
/// like). No cache lives to see it; a higher one is damage, and raising it could wrap to zero.
pub const COUNTER_MAX: u64 = 1 << 62;

/// 16 bytes that name a cache or a volume for good.
pub type Uuid = [u8; 16];

/// Every structure of the format: name, size in bytes, fields in ascending order. Bytes between
/// fields are reserved.
pub const STRUCTURES: &[(&str, usize, &[Field])] = &[
    ("Superblock", Superblock::SIZE, Superblock::FIELDS),
    ("StartPage", StartPage::SIZE, StartPage::FIELDS),
    ("VolumeDescriptor", VolumeDescriptor::SIZE, VolumeDescriptor::FIELDS),
    ("Tail", Tail::SIZE, Tail::FIELDS),
    ("LostRange", LostRange::SIZE, LostRange::FIELDS),
    ("Member", Member::SIZE, Member::FIELDS),
    ("MemberLabel", MemberLabel::SIZE, MemberLabel::FIELDS),
    ("Sidecar", Sidecar::SIZE, Sidecar::FIELDS),
    ("SegmentHeader", SegmentHeader::SIZE, SegmentHeader::FIELDS),
    ("Witness", Witness::SIZE, Witness::FIELDS),
    ("LivenessFloor", LivenessFloor::SIZE, LivenessFloor::FIELDS),
    ("RecordHeader", RecordHeader::SIZE, RecordHeader::FIELDS),
    ("Key", Key::SIZE, Key::FIELDS),
    ("SummaryHeader", SummaryHeader::SIZE, SummaryHeader::FIELDS),
    ("RedoHeader", RedoHeader::SIZE, RedoHeader::FIELDS),
    ("RedoSample", RedoSample::SIZE, RedoSample::FIELDS),
    ("RedoEntry", RedoEntry::SIZE, RedoEntry::FIELDS),
];

/// Every field whose values are codes: the type's name, then each code with its name.
pub const CODES: &[(&str, &[(u8, &str)])] = &[
    ("VolumeState", VolumeState::CODES),
    ("Mode", Mode::CODES),
    ("Order", Order::CODES),
    ("DiscardPolicy", DiscardPolicy::CODES),
    ("LostCause", LostCause::CODES),
    ("SegmentState", SegmentState::CODES),
    ("SegmentKind", SegmentKind::CODES),
    ("KeyKind", KeyKind::CODES),
    ("RedoState", RedoState::CODES),
    ("RedoKind", RedoKind::CODES),
];
