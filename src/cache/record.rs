//! A record in the making: payload stored and checksummed, keys gathered, nothing published.
//!
//! Dropping a [`Draft`] before it is persisted costs space and nothing else: no key names what it
//! stored, and the next record of the segment goes elsewhere.

use super::media::Media;
use super::segments::Segment;
use super::stream::{Open, Packed};
use crate::onmedia::{Key, KeyKind};
use crate::pmem::guard::{self, ForeignSlice};
use crate::pmem::{MediaError, Pmem};
use crate::units::SectorRange;
use crate::volume::{Buffer, GuestFault};

/// Most keys in a record: bounds its header to about 10 KiB and the time under the stripes.
pub(crate) const KEYS_MAX: usize = 256;
/// Longest extent of one key in sectors (256 KiB).
pub(crate) const EXTENT_SECTORS_MAX: u64 = 512;

/// Where the bytes of a piece come from, by offsets from 0 on. A closure that copies is one.
pub(crate) trait Payload {
    /// Copies some of them.
    ///
    /// # Errors
    /// [`GuestFault`]: they are not there.
    fn copy(&mut self, at: usize, dst: &mut [u8]) -> Result<(), GuestFault>;

    /// Lends some of them for one copy, if they lie in one piece.
    fn lend<R>(&self, _at: usize, _len: usize, _f: impl FnOnce(ForeignSlice<'_>) -> R) -> Option<R> {
        None
    }
}

impl<F: FnMut(usize, &mut [u8]) -> Result<(), GuestFault>> Payload for F {
    fn copy(&mut self, at: usize, dst: &mut [u8]) -> Result<(), GuestFault> {
        self(at, dst)
    }
}

/// Bytes of a guest's buffer from `from` on.
pub(crate) struct Lent<'a, B> {
    pub buffer: &'a B,
    pub from: usize,
}

impl<B: Buffer> Payload for Lent<'_, B> {
    fn copy(&mut self, at: usize, dst: &mut [u8]) -> Result<(), GuestFault> {
        self.buffer.copy_out(self.from + at, dst)
    }

    fn lend<R>(&self, at: usize, len: usize, f: impl FnOnce(ForeignSlice<'_>) -> R) -> Option<R> {
        self.buffer.lend(self.from + at, len, f)
    }
}

/// Those of `inner` from `from` on.
struct Rest<'a, S> {
    inner: &'a mut S,
    from: usize,
}

impl<S: Payload> Payload for Rest<'_, S> {
    fn copy(&mut self, at: usize, dst: &mut [u8]) -> Result<(), GuestFault> {
        self.inner.copy(self.from + at, dst)
    }
}

/// Why a piece was not stored.
#[derive(Debug)]
pub(crate) enum StoreError {
    /// The source is gone; the draft is as it was before the piece.
    Source(GuestFault),
    /// The media failed; the draft and its segment are to be given up.
    Media(MediaError),
}

/// What becomes one record. Reused from batch to batch.
pub(crate) struct Draft {
    pub keys: Vec<Key>,
    pub checksums: Vec<u32>,
    pub payload_end: u32,
    pub packed: Option<Packed>,
    /// The encoded record, for [`Open::persist`].
    pub bytes: Vec<u8>,
    /// The piece last copied in.
    block: Box<[u8; 4096]>,
    /// Where the whole block in `block` belongs, if it is not stored yet: offset in the segment.
    ///
    /// The last block of a draft goes out together with the header. Between the two lie locked
    /// operations (stripes, epoch, versions), and each would wait for a store already under way.
    unstored: Option<u32>,
    /// Whether another piece is expected to follow the next one: then no block of that is kept back, and
    /// each may go to the segment in one pass. A wrong guess costs time and nothing else.
    pub has_more: bool,
}

impl Draft {
    pub fn new() -> Self {
        Self {
            keys: Vec::with_capacity(KEYS_MAX),
            checksums: Vec::with_capacity(KEYS_MAX * 2),
            payload_end: 0,
            packed: None,
            bytes: Vec::with_capacity(16 << 10),
            block: Box::new([0; 4096]),
            unstored: None,
            has_more: false,
        }
    }

    /// Starts over, after what the open segment holds.
    pub fn begin(&mut self, open: &Open) {
        self.keys.clear();
        self.checksums.clear();
        self.payload_end = open.payload_end;
        self.packed = open.packed;
        self.unstored = None;
        self.has_more = false;
    }

    /// Stores the block that was kept back.
    ///
    /// # Errors
    /// The media failed: the draft and its segment are to be given up.
    pub fn store_last<P: Pmem>(&mut self, media: &Media<P>, open: u32) -> Result<(), MediaError> {
        match self.unstored.take() {
            Some(offset) => media.pmem.write(media.in_segment(open, offset), &self.block[..]),
            None => Ok(()),
        }
    }

    /// Whether a piece of `sectors` more would still fit both the record and the segment.
    pub fn has_room(&self, open: &Open, sectors: u64) -> bool {
        // A piece makes at most two keys: whole blocks, and a packed remainder of up to 7 sectors
        // with a checksum each, in a fresh block at worst.
        let blocks = sectors as u32 / 8;
        let (keys, checksums) = (self.keys.len() + 2, self.checksums.len() + blocks as usize + 7);
        let payload_end = self.payload_end + (blocks + 1) * 4096;
        keys <= KEYS_MAX && open.fits(payload_end, keys, checksums)
    }

    /// Adds a key without payload.
    pub fn add_zero(&mut self, range: SectorRange, kind: KeyKind) {
        self.keys.push(new_key(range, kind, 0));
    }

    /// Copies `range.len` sectors from `source` into the segment and adds their keys. The caller has asked [`Draft::has_room`].
    pub fn store<P: Pmem>(
        &mut self,
        media: &Media<P>,
        open: &Open,
        segment: &Segment,
        range: SectorRange,
        kind: KeyKind,
        mut source: impl Payload,
    ) -> Result<(), StoreError> {
        debug_assert!(range.len <= EXTENT_SECTORS_MAX);
        let before = (self.keys.len(), self.checksums.len());
        let result = self.store_blocks(media, open, segment, range, kind, &mut source).and_then(|done| {
            if done == range.len {
                return Ok(());
            }
            let rest = SectorRange::new(range.start + done, range.len - done);
            let mut source = Rest { inner: &mut source, from: done as usize * 512 };
            self.store_packed(media, open, segment, rest, kind, &mut source)
        });
        if result.is_err() {
            self.keys.truncate(before.0);
            self.checksums.truncate(before.1);
            // The draft does not go back: if all of it is given up, the next one begins where this
            // one did, and takes blocks over together with their checksums.
        }
        result
    }

    /// The part of whole 4 KiB blocks. Returns how many sectors that is.
    fn store_blocks<P: Pmem>(
        &mut self,
        media: &Media<P>,
        open: &Open,
        segment: &Segment,
        range: SectorRange,
        kind: KeyKind,
        source: &mut impl Payload,
    ) -> Result<u64, StoreError> {
        let blocks = range.len / 8;
        if blocks == 0 {
            return Ok(0);
        }
        let payload = self.payload_end;
        for i in 0..blocks as u32 {
            self.store_last(media, open.id).map_err(StoreError::Media)?;
            let offset = payload + i * 4096;
            let has_more = self.has_more || u64::from(i + 1) * 8 < range.len;
            let target = has_more.then(|| media.in_segment(open.id, offset));
            let (crc, is_stored) =
                self.take_block(media, target, i as usize * 4096, source).map_err(StoreError::Source)?;
            self.unstored = (!is_stored).then_some(offset);
            segment.set_block_checksum(offset / 4096, crc);
            self.checksums.push(crc);
            self.payload_end = offset + 4096;
        }
        self.keys.push(new_key(SectorRange::new(range.start, blocks * 8), kind, payload / 512));
        Ok(blocks * 8)
    }

    /// Takes a block from `source`, and returns its checksum: to `target` in one pass if there is one and a
    /// way, which it says; else to `self.block`.
    fn take_block<P: Pmem>(
        &mut self,
        media: &Media<P>,
        target: Option<u64>,
        at: usize,
        source: &mut impl Payload,
    ) -> Result<(u32, bool), GuestFault> {
        let store = |to| source.lend(at, 4096, |bytes| media.pmem.write_summed(to, bytes)).flatten();
        if let Some(crc) = target.and_then(store) {
            return Ok((crc, true));
        }
        let block = &mut self.block[..];
        if let Some(crc) = source.lend(at, 4096, |bytes| guard::copy_summed(bytes, block)).flatten() {
            return Ok((crc, false));
        }
        source.copy(at, &mut self.block[..])?;
        Ok((crc32fast::hash(&self.block[..]), false))
    }

    /// The remainder of less than 4 KiB, into a block shared with other small pieces.
    fn store_packed<P: Pmem>(
        &mut self,
        media: &Media<P>,
        open: &Open,
        segment: &Segment,
        range: SectorRange,
        kind: KeyKind,
        source: &mut impl Payload,
    ) -> Result<(), StoreError> {
        let sectors = range.len as u32;
        let mut packed = match self.packed {
            Some(packed) if packed.left >= sectors => packed,
            _ => {
                let fresh = Packed { next: self.payload_end / 512, left: 8 };
                self.payload_end += 4096;
                fresh
            }
        };
        let bytes = sectors as usize * 512;
        let first = packed.next;
        packed.next += sectors;
        packed.left -= sectors;
        self.packed = Some(packed);
        self.store_last(media, open.id).map_err(StoreError::Media)?;
        source.copy(0, &mut self.block[..bytes]).map_err(StoreError::Source)?;
        let at = media.in_segment(open.id, first * 512);
        media.pmem.write(at, &self.block[..bytes]).map_err(StoreError::Media)?;
        for (i, sector) in self.block[..bytes].chunks_exact(512).enumerate() {
            let crc = crc32fast::hash(sector);
            segment.set_sector_checksum(first + i as u32, crc);
            self.checksums.push(crc);
        }
        self.keys.push(new_key(range, kind, first));
        Ok(())
    }
}

/// A key whose version and epoch are drawn when it is published.
fn new_key(range: SectorRange, kind: KeyKind, payload: u32) -> Key {
    Key { first: range.start, kind, sectors: range.len as u32, payload, version: 0, epoch: 0 }
}
