//! Where everything lies: a pure function of five numbers in the superblock.
//!
//! Metadata stands at both ends of the device and each segment keeps its two headers at its own two
//! ends, so that no single bad 2 MiB page takes both copies of anything (segments below 4 MiB
//! excepted: there both headers may share one). Sizes are parameters of the code, so a simulation
//! runs whole caches of a few hundred KiB.
//!
//! Invariants of a valid [`Geometry`]: all offsets are multiples of [`PAGE`]; the metadata ends and
//! the segments do not overlap and lie inside `device_size`; every slot lies inside its metadata
//! end; every segment has room for at least one record and its payload. No method overflows.

use super::PAGE;

/// Bytes of each metadata end of a product's cache. Fixed, so that the back end can be found when
/// nothing of the front is left; 2 MiB, so that segments are aligned for huge mappings.
pub const META_SIZE: u64 = 2 << 20;
/// Smallest segment: the fixed parts take 20 KiB.
pub const SEGMENT_SIZE_MIN: u32 = 32 << 10;
/// Largest segment.
pub const SEGMENT_SIZE_MAX: u32 = 1 << 30;
/// Fewest segments: one open, one to relocate into, one in reserve, one being freed.
pub const SEGMENT_COUNT_MIN: u32 = 4;
/// Records and summaries start at multiples of this many bytes.
pub const LOG_ALIGN: u32 = 256;

/// Smallest segment [`Geometry::choose`] takes by itself.
const SEGMENT_SIZE_CHOSEN_MIN: u32 = 64 << 10;
/// Segment size [`Geometry::choose`] takes from [`SEGMENT_SIZE_FULL_FROM`] upwards.
const SEGMENT_SIZE_FULL: u32 = 16 << 20;
/// Device size from which segments are of [`SEGMENT_SIZE_FULL`].
const SEGMENT_SIZE_FULL_FROM: u64 = 1 << 30;
/// Segments a smaller device should have.
const SEGMENT_COUNT_AIM: u64 = 64;
/// Bytes of a header page and of a witness page.
const PAGE_U32: u32 = PAGE as u32;

/// A geometry that cannot be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GeometryError {
    /// The device is too small for the fixed parts and the fewest segments.
    #[error("{device_size} bytes are too few for a cache: at least {minimum} are needed")]
    DeviceTooSmall {
        /// Bytes there are.
        device_size: u64,
        /// Bytes it takes.
        minimum: u64,
    },
    /// The segment size is not a power of two within bounds.
    #[error(
        "a segment size of {segment_size} is not a power of two from {SEGMENT_SIZE_MIN} to {SEGMENT_SIZE_MAX}"
    )]
    SegmentSize {
        /// The size asked for.
        segment_size: u32,
    },
    /// Too few or too many segments.
    #[error("{segment_count} segments are not between {SEGMENT_COUNT_MIN} and 2^32 - 1")]
    SegmentCount {
        /// The number asked for.
        segment_count: u64,
    },
    /// A size that must be a multiple of [`PAGE`] is not.
    #[error("{what} of {size} is not a multiple of {PAGE}")]
    Unaligned {
        /// Which.
        what: &'static str,
        /// Its value.
        size: u64,
    },
    /// The volume slots do not fit the metadata, or there is none.
    #[error("{volume_slots} volume slots do not fit metadata of {meta_size} bytes")]
    VolumeSlots {
        /// Slots asked for.
        volume_slots: u32,
        /// Bytes of one metadata end.
        meta_size: u64,
    },
}

/// Where everything is. Pure function of superblock fields. In simulations tiny.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Bytes of the device that are ours, a multiple of [`PAGE`].
    pub device_size: u64,
    /// Bytes of each metadata end.
    pub meta_size: u64,
    /// Bytes of a segment, a power of two.
    pub segment_size: u32,
    /// Number of segments.
    pub segment_count: u32,
    /// Number of volumes there is room for.
    pub volume_slots: u32,
}

/// Where copy 1 of the superblock lies on media of `media_len` bytes whose metadata ends are of
/// `meta_size` bytes; for when copy 0 cannot say. `None` when the media are too short to have one.
pub fn backup_superblock(media_len: u64, meta_size: u64) -> Option<u64> {
    let device_size = media_len - media_len % PAGE as u64;
    device_size.checked_sub(meta_size).filter(|&at| at >= meta_size)
}

impl Geometry {
    /// The product's choice for a device: metadata ends of [`META_SIZE`], 16 MiB segments from 1 GiB
    /// upwards, below that the largest power of two that gives at least 64, but 64 KiB at least.
    ///
    /// # Errors
    /// [`GeometryError`]: the device is too small (the error says how large it must be) or the
    /// segment size asked for is impossible.
    pub fn choose(device_size: u64, segment_size: Option<u32>) -> Result<Geometry, GeometryError> {
        let device_size = device_size - device_size % PAGE as u64;
        let usable = device_size.saturating_sub(2 * META_SIZE);
        let segment_size = segment_size.unwrap_or_else(|| chosen_segment_size(device_size, usable));
        judge_segment_size(segment_size)?;
        let minimum = 2 * META_SIZE + u64::from(SEGMENT_COUNT_MIN) * u64::from(segment_size);
        if device_size < minimum {
            return Err(GeometryError::DeviceTooSmall { device_size, minimum });
        }
        let segment_count = usable / u64::from(segment_size);
        let geometry = Geometry {
            device_size,
            meta_size: META_SIZE,
            segment_size,
            segment_count: u32::try_from(segment_count)
                .map_err(|_| GeometryError::SegmentCount { segment_count })?,
            volume_slots: (META_SIZE / PAGE as u64 - 2) as u32 / 2,
        };
        geometry.validate()?;
        Ok(geometry)
    }

    /// A geometry of one's own choice, for simulations.
    ///
    /// # Errors
    /// [`GeometryError`]: it cannot be.
    pub fn custom(
        meta_size: u64,
        segment_size: u32,
        segment_count: u32,
        volume_slots: u32,
    ) -> Result<Geometry, GeometryError> {
        let segments = u64::from(segment_size) * u64::from(segment_count);
        let device_size = meta_size.saturating_mul(2).saturating_add(segments) & !(PAGE as u64 - 1);
        let geometry = Geometry { device_size, meta_size, segment_size, segment_count, volume_slots };
        geometry.validate()?;
        Ok(geometry)
    }

    /// The same cache on `device_size` bytes: as many segments as fit.
    ///
    /// # Errors
    /// [`GeometryError`]: they are too few, or too many.
    pub fn resized(&self, device_size: u64) -> Result<Geometry, GeometryError> {
        let device_size = device_size - device_size % PAGE as u64;
        let usable = device_size.saturating_sub(2 * self.meta_size);
        let segment_count = usable / u64::from(self.segment_size);
        if segment_count < SEGMENT_COUNT_MIN.into() {
            let segments = u64::from(SEGMENT_COUNT_MIN) * u64::from(self.segment_size);
            return Err(GeometryError::DeviceTooSmall {
                device_size,
                minimum: 2 * self.meta_size + segments,
            });
        }
        let segment_count =
            u32::try_from(segment_count).map_err(|_| GeometryError::SegmentCount { segment_count })?;
        let geometry = Geometry { device_size, segment_count, ..*self };
        geometry.validate()?;
        Ok(geometry)
    }

    /// Whether all the type's invariants hold.
    ///
    /// # Errors
    /// [`GeometryError`]: the first that does not.
    pub fn validate(&self) -> Result<(), GeometryError> {
        let Geometry { device_size, meta_size, segment_size, segment_count, volume_slots } = *self;
        judge_segment_size(segment_size)?;
        if segment_count < SEGMENT_COUNT_MIN {
            return Err(GeometryError::SegmentCount { segment_count: segment_count.into() });
        }
        for (what, size) in [("device size", device_size), ("metadata size", meta_size)] {
            if !size.is_multiple_of(PAGE as u64) {
                return Err(GeometryError::Unaligned { what, size });
            }
        }
        let slot_pages = 2 + 2 * u64::from(volume_slots);
        if volume_slots == 0 || meta_size / (PAGE as u64) < slot_pages {
            return Err(GeometryError::VolumeSlots { volume_slots, meta_size });
        }
        let segments = u64::from(segment_size) * u64::from(segment_count);
        let minimum = meta_size.saturating_mul(2).saturating_add(segments);
        if device_size < minimum {
            return Err(GeometryError::DeviceTooSmall { device_size, minimum });
        }
        Ok(())
    }

    /// First byte of copy 0 or 1 of the superblock.
    pub fn superblock(&self, copy: usize) -> u64 {
        self.meta_page(copy, 0)
    }

    /// First byte of copy 0 or 1 of the start page.
    pub fn start_page(&self, copy: usize) -> u64 {
        self.meta_page(copy, 1)
    }

    /// First byte of copy 0 or 1 of a volume's descriptor.
    pub fn descriptor(&self, slot: u32, copy: usize) -> u64 {
        assert!(slot < self.volume_slots, "no volume slot {slot}");
        self.meta_page(copy, 2 + 2 * u64::from(slot))
    }

    /// First byte of copy 0 or 1 of a volume's tail.
    pub fn tail(&self, slot: u32, copy: usize) -> u64 {
        assert!(slot < self.volume_slots, "no volume slot {slot}");
        self.meta_page(copy, 3 + 2 * u64::from(slot))
    }

    /// First byte of a segment.
    pub fn segment(&self, id: u32) -> u64 {
        assert!(id < self.segment_count, "no segment {id}");
        self.meta_size + u64::from(id) * u64::from(self.segment_size)
    }

    /// Copy 0 or 1 of a segment's header, from the segment's first byte.
    pub fn header_offset(&self, copy: usize) -> u32 {
        self.segment_page(copy, 0)
    }

    /// A segment's even (0) or odd (1) witness line, from the segment's first byte.
    pub fn witness_offset(&self, copy: usize) -> u32 {
        self.segment_page(copy, 1)
    }

    /// Copy 0 or 1 of a segment's liveness floor, from the segment's first byte: behind a witness.
    pub fn floor_offset(&self, copy: usize) -> u32 {
        self.witness_offset(copy) + 64
    }

    /// The mark of a `sync` under way, from the device's first byte: in the page of segment 0's witness.
    pub fn sync_mark(&self) -> u64 {
        self.segment(0) + u64::from(self.witness_offset(0)) + 512
    }

    /// The first of a segment's liveness words, from the segment's first byte.
    pub fn liveness_offset(&self) -> u32 {
        2 * PAGE_U32
    }

    /// Liveness words of a segment: one for every 32 sectors of it.
    pub fn liveness_words(&self) -> u32 {
        self.segment_size.div_ceil(512 * 32)
    }

    /// Where a segment's payload may start, from the segment's first byte.
    pub fn data_start(&self) -> u32 {
        self.liveness_offset() + (self.liveness_words() * 8).next_multiple_of(PAGE_U32)
    }

    /// Where a segment's first record must end, from the segment's first byte: records grow down.
    pub fn data_end(&self) -> u32 {
        self.segment_size - 2 * PAGE_U32
    }

    fn meta_page(&self, copy: usize, page: u64) -> u64 {
        assert!(copy < 2, "no copy {copy}");
        let base = if copy == 0 { 0 } else { self.device_size - self.meta_size };
        base + page * PAGE as u64
    }

    fn segment_page(&self, copy: usize, page: u32) -> u32 {
        assert!(copy < 2, "no copy {copy}");
        if copy == 0 { page * PAGE_U32 } else { self.segment_size - (page + 1) * PAGE_U32 }
    }
}

fn judge_segment_size(segment_size: u32) -> Result<(), GeometryError> {
    let bounded = (SEGMENT_SIZE_MIN..=SEGMENT_SIZE_MAX).contains(&segment_size);
    if bounded && segment_size.is_power_of_two() {
        Ok(())
    } else {
        Err(GeometryError::SegmentSize { segment_size })
    }
}

fn chosen_segment_size(device_size: u64, usable: u64) -> u32 {
    if device_size >= SEGMENT_SIZE_FULL_FROM {
        return SEGMENT_SIZE_FULL;
    }
    let mut size = SEGMENT_SIZE_FULL;
    while size > SEGMENT_SIZE_CHOSEN_MIN && usable / u64::from(size) < SEGMENT_COUNT_AIM {
        size /= 2;
    }
    size
}

#[cfg(test)]
mod tests {
    use super::super::testing::Rng;
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_choice_follows_the_size_of_the_device() {
        for (device_size, forced, segment_size, segment_count) in [
            (1 << 30, None, 16 << 20, 63),
            ((1 << 30) + 4095, None, 16 << 20, 63),
            ((1 << 30) - 1, None, 8 << 20, 127),
            (68 * MIB, None, 1 << 20, 64),
            (68 * MIB - 1, None, 512 << 10, 127),
            (8 * MIB, None, 64 << 10, 64),
            (5 * MIB, None, 64 << 10, 16),
            (4 * MIB + (256 << 10), None, 64 << 10, 4),
            (1 << 40, None, 16 << 20, 65535),
            (1 << 30, Some(64 << 10), 64 << 10, 16320),
            (1 << 33, Some(1 << 30), 1 << 30, 7),
        ] {
            let geometry = Geometry::choose(device_size, forced).unwrap();
            assert_eq!((geometry.segment_size, geometry.segment_count), (segment_size, segment_count));
            assert_eq!(geometry.device_size, device_size / 4096 * 4096);
            assert_eq!((geometry.meta_size, geometry.volume_slots), (META_SIZE, 255));
        }
    }

    #[test]
    fn a_device_of_exactly_the_stated_minimum_is_enough() {
        for forced in [None, Some(SEGMENT_SIZE_MIN), Some(16 << 20)] {
            for device_size in [0, 4095, MIB, 4 * MIB] {
                let Err(GeometryError::DeviceTooSmall { minimum, .. }) =
                    Geometry::choose(device_size, forced)
                else {
                    panic!("{device_size} bytes must be too few");
                };
                let geometry = Geometry::choose(minimum, forced).unwrap();
                assert_eq!(geometry.segment_count, SEGMENT_COUNT_MIN);
                assert!(Geometry::choose(minimum - 1, forced).is_err());
            }
        }
    }

    #[test]
    fn another_size_changes_the_number_of_segments_and_nothing_else() {
        let old = Geometry::choose(64 * MIB, None).unwrap();
        let count = |size| old.resized(size).map(|new| new.segment_count);
        assert_eq!(old.resized(old.device_size), Ok(old));
        assert_eq!(count(old.device_size + 5), Ok(old.segment_count));
        let segment = u64::from(old.segment_size);
        assert_eq!(count(old.device_size + 3 * segment), Ok(old.segment_count + 3));
        assert_eq!(count(4 * MIB + 4 * segment), Ok(4));
        for size in [0, 4096, 4 * MIB, 4 * MIB + 4 * segment - 1] {
            assert!(matches!(count(size), Err(GeometryError::DeviceTooSmall { .. })), "{size}");
        }
        let tiny = Geometry::custom(16 << 10, SEGMENT_SIZE_MIN, 4, 1).unwrap();
        assert!(matches!(tiny.resized(1 << 60), Err(GeometryError::SegmentCount { .. })));
    }

    #[test]
    fn impossible_geometries_are_refused() {
        let good = Geometry::custom(16 << 10, 32 << 10, 4, 1).unwrap();
        for (bad, why) in [
            (Geometry { segment_size: 0, ..good }, "segment size 0"),
            (Geometry { segment_size: 16 << 10, ..good }, "no room for records"),
            (Geometry { segment_size: 48 << 10, ..good }, "not a power of two"),
            (Geometry { segment_size: 1 << 31, ..good }, "above the maximum"),
            (Geometry { segment_count: 3, ..good }, "too few segments"),
            (Geometry { segment_count: u32::MAX, ..good }, "past the device"),
            (Geometry { meta_size: !4095, ..good }, "overflow"),
            (Geometry { meta_size: (16 << 10) + 512, ..good }, "unaligned"),
            (Geometry { meta_size: 12 << 10, ..good }, "slots do not fit"),
            (Geometry { volume_slots: 0, ..good }, "no slot"),
            (Geometry { volume_slots: u32::MAX, ..good }, "slots do not fit"),
            (Geometry { device_size: good.device_size - 4096, ..good }, "does not fit"),
            (Geometry { device_size: good.device_size + 1, ..good }, "unaligned"),
        ] {
            assert!(bad.validate().is_err(), "{why}");
        }
        assert!(Geometry::choose(1 << 60, Some(SEGMENT_SIZE_MIN)).is_err(), "more than 2^32 segments");
    }

    /// Every region of a geometry, in order.
    fn regions(geometry: &Geometry) -> Vec<(u64, u64)> {
        let page = PAGE as u64;
        let mut all = Vec::new();
        for copy in 0..2 {
            all.push((geometry.superblock(copy), page));
            all.push((geometry.start_page(copy), page));
            for slot in 0..geometry.volume_slots {
                all.push((geometry.descriptor(slot, copy), page));
                all.push((geometry.tail(slot, copy), page));
            }
        }
        for id in 0..geometry.segment_count {
            let base = geometry.segment(id);
            for copy in 0..2 {
                all.push((base + u64::from(geometry.header_offset(copy)), page));
                all.push((base + u64::from(geometry.witness_offset(copy)), page));
            }
            let liveness = u64::from(geometry.liveness_offset());
            all.push((base + liveness, u64::from(geometry.liveness_words()) * 8));
            let log = u64::from(geometry.data_start());
            all.push((base + log, u64::from(geometry.data_end()) - log));
        }
        all.sort_unstable();
        all
    }

    #[test]
    fn nothing_overlaps_and_everything_is_aligned_and_inside() {
        let seed = 0x6765_6f6d;
        let mut rng = Rng::new(seed);
        for round in 0..200 {
            let slots = 1 + rng.below(8) as u32;
            let meta = (2 + 2 * u64::from(slots) + rng.below(4)) * 4096;
            let size = SEGMENT_SIZE_MIN << rng.below(10);
            let geometry = Geometry::custom(meta, size, 4 + rng.below(8) as u32, slots).unwrap();
            let all = regions(&geometry);
            for pair in all.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0, "seed {seed:#x} round {round}: {pair:?}");
            }
            for (at, len) in all {
                assert!(at.is_multiple_of(4096) && at + len <= geometry.device_size, "seed {seed:#x}");
            }
            assert!(geometry.data_end() - geometry.data_start() >= 12 << 10, "seed {seed:#x}");
            assert!(u64::from(geometry.liveness_words()) * 32 * 512 >= u64::from(size), "seed {seed:#x}");
        }
    }

    #[test]
    fn the_back_superblock_is_found_without_the_front() {
        for media_len in [1u64 << 30, (1 << 30) + 4095, (1 << 30) + 4096, 8 * MIB, 5 * MIB + 17] {
            let geometry = Geometry::choose(media_len, None).unwrap();
            assert_eq!(backup_superblock(media_len, META_SIZE), Some(geometry.superblock(1)));
        }
        for media_len in [0, 4096, 2 * MIB, 4 * MIB - 1] {
            assert_eq!(backup_superblock(media_len, META_SIZE), None, "{media_len}");
        }
    }
}
