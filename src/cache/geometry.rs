//! Where everything lies, while that may change: the geometry of an open cache.
//!
//! A cache grows and shrinks under its guests. What a request needs of the geometry (where segments
//! begin, what is in one) is the same before and after; only the number of segments and the place of
//! the back metadata change, and both change here, at one moment, for everybody.
//!
//! Laws:
//! - Segments never move, and sizes of segment and metadata never change: a position names the same
//!   bytes for ever.
//! - Who stores a page of metadata asks for its place under [`Media::write_page`](super::media::Media),
//!   who reads two copies under `Media::load`: both exclude the moment of change.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::onmedia::Geometry;

/// See the module's head.
pub(crate) struct LiveGeometry {
    /// As it was at the start: for what does not change.
    fixed: Geometry,
    /// Bytes of a segment.
    pub segment_size: u32,
    /// Bytes of each metadata end.
    pub meta_size: u64,
    /// Number of volume slots.
    pub volume_slots: u32,
    device_size: AtomicU64,
    segment_count: AtomicU32,
}

impl LiveGeometry {
    pub fn new(fixed: Geometry) -> Self {
        let Geometry { device_size, meta_size, segment_size, segment_count, volume_slots } = fixed;
        Self {
            fixed,
            segment_size,
            meta_size,
            volume_slots,
            device_size: AtomicU64::new(device_size),
            segment_count: AtomicU32::new(segment_count),
        }
    }

    /// All of it as it is now.
    pub fn now(&self) -> Geometry {
        Geometry { device_size: self.device_size(), segment_count: self.segment_count(), ..self.fixed }
    }

    /// Changes what may change.
    pub fn set(&self, to: &Geometry) {
        self.device_size.store(to.device_size, Ordering::SeqCst);
        self.segment_count.store(to.segment_count, Ordering::SeqCst);
    }

    /// What is the same in every size of the cache: what lies where in a segment.
    pub fn fixed(&self) -> &Geometry {
        &self.fixed
    }

    /// Bytes of the device that are ours.
    pub fn device_size(&self) -> u64 {
        self.device_size.load(Ordering::Acquire)
    }

    /// Segments that there is room for.
    pub fn segment_count(&self) -> u32 {
        self.segment_count.load(Ordering::Acquire)
    }

    /// First byte of the back metadata.
    pub fn back(&self) -> u64 {
        self.device_size() - self.meta_size
    }

    /// First byte of copy 0 or 1 of the superblock.
    pub fn superblock(&self, copy: usize) -> u64 {
        self.now().superblock(copy)
    }

    /// First byte of copy 0 or 1 of the start page.
    pub fn start_page(&self, copy: usize) -> u64 {
        self.now().start_page(copy)
    }

    /// First byte of copy 0 or 1 of a volume's descriptor.
    pub fn descriptor(&self, slot: u32, copy: usize) -> u64 {
        self.now().descriptor(slot, copy)
    }

    /// First byte of copy 0 or 1 of a volume's tail.
    pub fn tail(&self, slot: u32, copy: usize) -> u64 {
        self.now().tail(slot, copy)
    }

    /// First byte of a segment.
    pub fn segment(&self, id: u32) -> u64 {
        assert!(id < self.segment_count.load(Ordering::Relaxed), "no segment {id}");
        self.meta_size + u64::from(id) * u64::from(self.segment_size)
    }

    /// Copy 0 or 1 of a segment's header, from the segment's first byte.
    pub fn header_offset(&self, copy: usize) -> u32 {
        self.fixed.header_offset(copy)
    }

    /// A segment's even (0) or odd (1) witness line, from the segment's first byte.
    pub fn witness_offset(&self, copy: usize) -> u32 {
        self.fixed.witness_offset(copy)
    }

    /// Copy 0 or 1 of a segment's liveness floor, from the segment's first byte.
    pub fn floor_offset(&self, copy: usize) -> u32 {
        self.fixed.floor_offset(copy)
    }

    /// The mark of a `sync` under way, from the device's first byte.
    pub fn sync_mark(&self) -> u64 {
        self.fixed.sync_mark()
    }

    /// The first of a segment's liveness words, from the segment's first byte.
    pub fn liveness_offset(&self) -> u32 {
        self.fixed.liveness_offset()
    }

    /// Liveness words of a segment.
    pub fn liveness_words(&self) -> u32 {
        self.fixed.liveness_words()
    }

    /// Where a segment's payload may start, from the segment's first byte.
    pub fn data_start(&self) -> u32 {
        self.fixed.data_start()
    }

    /// Where a segment's first record must end, from the segment's first byte.
    pub fn data_end(&self) -> u32 {
        self.fixed.data_end()
    }
}
