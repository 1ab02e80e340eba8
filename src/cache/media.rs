//! The media as a set of structures: reads and writes whole pages, two copies of each.
//!
//! Law: a structure is updated by writing its *older* copy and making that durable; until then the
//! newer copy stands untouched. A crash in between leaves one of the two states, never neither.

use std::sync::Arc;

use super::core::read;
use super::geometry::LiveGeometry;
use super::index::{Place, ZERO_NAME_END};
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{Corruption, Dual, Key, KeyKind, PAGE, Secret, SegmentHeader, Sequenced, newest};
use crate::pmem::{MediaError, Pmem};
use crate::sync::RwLock;

/// The media, its layout, and the secret its checks are keyed with.
pub(crate) struct Media<P> {
    pub pmem: Arc<P>,
    pub geometry: LiveGeometry,
    pub secret: Secret,
    pub uuid: [u8; 16],
    /// Where the back metadata is being moved to, while it is. Held for each store of a page of it.
    pub moving: RwLock<Option<u64>>,
}

impl<P: Pmem> Media<P> {
    /// Reads both copies of a page-sized structure. A copy that cannot be read counts as damaged.
    pub fn load<T: Sequenced>(
        &self,
        at: impl Fn(usize) -> u64,
        decode: impl Fn(&[u8]) -> Result<T, Corruption>,
    ) -> Dual<T> {
        // A copy is looked for where it is and not where it was.
        let _still = read(&self.moving);
        let copy = |n| match read_page(&*self.pmem, at(n)) {
            Ok(page) => decode(&page[..]),
            Err(_) => Err(Corruption::unreadable("page")),
        };
        newest(copy(0), copy(1))
    }

    /// Stores a page of metadata at the place that the geometry gives it: in a moment at which that is
    /// true, and while the back metadata is being moved to both its places.
    ///
    /// # Errors
    /// The media refused.
    pub fn write_page(&self, at: impl FnOnce(&LiveGeometry) -> u64, page: &[u8]) -> Result<(), MediaError> {
        let moving = read(&self.moving);
        let (at, back) = (at(&self.geometry), self.geometry.back());
        self.pmem.write(at, page)?;
        match *moving {
            Some(to) if at >= back && !mutated(Mutant::MoveNotMirrored) => {
                self.pmem.write(at - back + to, page)
            }
            _ => Ok(()),
        }
    }

    /// Makes durable what anybody has left in the metadata: recovery is about to believe it.
    pub fn settle_metadata(&self) {
        let (meta_size, back) = (self.geometry.meta_size, self.geometry.back());
        for at in [0, back] {
            // By page: what cannot be reached is not believed either, and there is another copy.
            for page in (at..at + meta_size).step_by(PAGE) {
                self.settle(page, PAGE as u64);
            }
        }
    }

    /// Makes durable what anybody has left beside a segment's log: headers, witnesses, floors, words.
    pub fn settle_segment(&self, id: u32) {
        let words = u64::from(self.geometry.liveness_words()) * 8;
        for copy in 0..2 {
            self.settle(self.in_segment(id, self.geometry.header_offset(copy)), SegmentHeader::SIZE as u64);
            self.settle(self.in_segment(id, self.geometry.witness_offset(copy)), 128);
        }
        self.settle(self.in_segment(id, self.geometry.liveness_offset()), words);
    }

    /// Makes durable what anybody has left in a part of a segment.
    pub fn settle_range(&self, id: u32, offset: u32, end: u32) {
        for page in (offset & !4095..end).step_by(PAGE) {
            self.settle(self.in_segment(id, page), PAGE as u64);
        }
    }

    /// What cannot be reached cannot be believed, and is found out when it is read.
    fn settle(&self, at: u64, len: u64) {
        if mutated(Mutant::RecoveryNotSyncedFirst) {
            return;
        }
        if let Err(error) = self.pmem.settle(at, len) {
            tracing::debug!(%error, "not settled");
        }
    }

    /// Bytes of segment `id` at `offset` on the media.
    pub fn in_segment(&self, id: u32, offset: u32) -> u64 {
        self.geometry.segment(id) + u64::from(offset)
    }

    /// The segment and the offset in it of a position in 512-byte units.
    pub fn locate(&self, position: u64) -> (u32, u32) {
        let byte = position * 512 - self.geometry.meta_size;
        let size = u64::from(self.geometry.segment_size);
        ((byte / size) as u32, (byte % size) as u32)
    }

    /// Where the index shows a key of segment `id`. A key without payload is told from others by
    /// its version: nothing else of it is unique while older ones of the segment are written back.
    pub fn place(&self, id: u32, key: &Key, dirty: bool) -> Place {
        match key.kind {
            KeyKind::Data | KeyKind::Fill => {
                Place { position: self.in_segment(id, key.payload * 512) / 512, zero: false, dirty }
            }
            KeyKind::Zero | KeyKind::Discard => {
                // Its lowest bit says whether the guest gave the space up.
                let name = key.version << 1 | u64::from(key.kind == KeyKind::Discard);
                Place { position: name % ZERO_NAME_END, zero: true, dirty }
            }
        }
    }
}

/// One page of the media.
pub(crate) fn read_page<P: Pmem>(pmem: &P, at: u64) -> Result<Box<[u8; PAGE]>, MediaError> {
    let mut page = Box::new([0; PAGE]);
    pmem.read(at, &mut page[..])?;
    Ok(page)
}
