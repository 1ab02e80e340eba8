//! Format: makes a cache out of media.
//!
//! The superblocks come last: a crash before that leaves no cache rather than half of one. In their
//! place stands nothing valid meanwhile, so a formatted-over cache cannot come back half either.

use super::env::Clock;
use super::syncer::{Outcome, Syncer};
use crate::onmedia::{
    Geometry, GeometryError, Member, Secret, SegmentHeader, StartPage, Superblock, Uuid, VolumeDescriptor,
    pad, pad_cut,
};
use crate::pmem::{MediaClass, MediaError, Pmem};

/// How to format.
#[derive(Clone, Debug, Default)]
pub struct FormatOptions {
    /// Bytes of a segment; `None` for the default.
    pub segment_size: Option<u32>,
    /// The operator's name for the cache, up to 64 bytes.
    pub label: String,
    /// A geometry of one's own, for simulations.
    pub geometry: Option<Geometry>,
    /// The cache's identity, if it is on its members' labels already; else it is drawn.
    pub identity: Option<Uuid>,
    /// The devices it lies on, if they are several.
    pub members: Vec<Member>,
}

/// Smallest segment where durability comes by `sync`: there payload and records begin new pages
/// with every `sync`, and a smaller segment has no room for both beside its fixed parts and summary.
/// Not one record would fit, and writes would wait for ever.
const PAGED_SEGMENT_SIZE_MIN: u32 = 64 << 10;

/// Whether no record might fit a segment of this geometry on such media.
pub(super) fn has_small_segments(geometry: &Geometry, class: MediaClass) -> bool {
    !class.fence_is_durable() && geometry.segment_size < PAGED_SEGMENT_SIZE_MIN
}

/// What was made.
#[derive(Clone, Copy, Debug)]
pub struct FormatReport {
    /// Where everything is.
    pub geometry: Geometry,
    /// The cache's identity.
    pub uuid: [u8; 16],
}

/// Why nothing was made.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The size does not make a cache.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The segments are too small for this media.
    #[error(
        "segments of {segment_size} bytes are too small without DAX: at least {PAGED_SEGMENT_SIZE_MIN} are needed"
    )]
    SmallSegments {
        /// Bytes of one.
        segment_size: u32,
    },
    /// The label does not fit.
    #[error("the label is longer than 64 bytes")]
    Label,
    /// No randomness.
    #[error("the kernel gives no random bytes: {0}")]
    Random(String),
    /// The media failed.
    #[error(transparent)]
    Media(#[from] MediaError),
    /// The cache cannot be made durable.
    #[error("the cache cannot be made durable")]
    NotDurable,
}

/// Makes a cache. Whatever was there is gone; whether it may go is the caller's question.
///
/// On return it is durable.
///
/// # Errors
/// [`FormatError`]. Nothing has been written on the first four; after the others there may be no
/// cache any more.
pub fn format<P: Pmem>(
    pmem: &P,
    clock: &impl Clock,
    options: &FormatOptions,
) -> Result<FormatReport, FormatError> {
    let geometry = match options.geometry {
        Some(geometry) => geometry,
        None => Geometry::choose(pmem.len(), options.segment_size)?,
    };
    geometry.validate()?;
    if has_small_segments(&geometry, pmem.class()) {
        return Err(FormatError::SmallSegments { segment_size: geometry.segment_size });
    }
    let label = pad(&options.label).ok_or(FormatError::Label)?;
    let (mut uuid, mut secret) = ([0; 16], [0; 16]);
    for bytes in [&mut uuid, &mut secret] {
        getrandom::fill(bytes).map_err(|e| FormatError::Random(e.to_string()))?;
    }
    let uuid = options.identity.unwrap_or(uuid);
    let secret = Secret::new(secret);
    for copy in 0..2 {
        pmem.write(geometry.superblock(copy), &[0; 4096])?;
    }
    settle(pmem)?;
    write_tables(pmem, &geometry, uuid)?;
    settle(pmem)?;
    let superblock = Superblock {
        sequence: 1,
        created_at: clock.unix_ms() / 1000,
        created_by: pad_cut(concat!("pcache-vhost ", env!("CARGO_PKG_VERSION"))),
        label,
        ..Superblock::new(&geometry, uuid, secret).on_members(&options.members)
    };
    for copy in 0..2 {
        pmem.write(geometry.superblock(copy), &superblock.encode()[..])?;
    }
    settle(pmem)?;
    Ok(FormatReport { geometry, uuid })
}

fn write_tables<P: Pmem>(pmem: &P, geometry: &Geometry, uuid: [u8; 16]) -> Result<(), MediaError> {
    let start = StartPage { sequence: 1, cache_uuid: uuid, next_incarnation: 1, ..StartPage::default() };
    for copy in 0..2 {
        pmem.write(geometry.start_page(copy), &start.encode()[..])?;
        for slot in 0..geometry.volume_slots {
            let empty = VolumeDescriptor::empty(uuid, slot);
            pmem.write(geometry.descriptor(slot, copy), &empty.encode()[..])?;
        }
    }
    for id in 0..geometry.segment_count {
        let header = SegmentHeader {
            sequence: 1,
            cache_uuid: uuid,
            segment: id,
            generation: 1,
            ..SegmentHeader::default()
        };
        for copy in 0..2 {
            let at = geometry.segment(id) + u64::from(geometry.header_offset(copy));
            pmem.write(at, &header.encode())?;
        }
    }
    Ok(())
}

/// Makes all that was written durable.
fn settle<P: Pmem>(pmem: &P) -> Result<(), FormatError> {
    let syncer = Syncer::new(pmem.class());
    let ticket = syncer.request(pmem, None);
    match syncer.wait(pmem, ticket) {
        Outcome::Failed => Err(FormatError::NotDurable),
        _ => Ok(()),
    }
}
