//! Reads: hits copied and verified on the queue's thread, gaps sent to the disk.
//!
//! A hit is verified by the bytes that the guest gets, whatever the media does meanwhile. A whole block
//! goes to the guest in one pass that sums what it stores; what has no such way is copied into private
//! memory, verified there, and copied on. Either way the request completes only after the check, and
//! bytes that fail it are not left in the guest's memory. A damaged clean block is dropped and read from
//! the disk instead; a damaged dirty one fails the request and is never answered with the disk's older
//! bytes.

use std::sync::atomic::Ordering;

use super::super::core::Cache;
use super::super::counters::add;
use super::super::env::Env;
use super::super::index::{Extent, REGION_SECTORS};
use super::super::record::EXTENT_SECTORS_MAX;
use super::super::stripes::Ticket;
use super::super::volume::Admission;
use super::io::{Joined, Purpose};
use super::{Fill, Queue};
use crate::backing::Op;
use crate::mutant::{Mutant, mutated};
use crate::pmem::guard::ForeignSliceMut;
use crate::pmem::{MediaError, Pmem};
use crate::units::SectorRange;
use crate::volume::{Buffer, GuestFault};

/// Why a hit could not be answered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HitError {
    /// The guest's memory is gone.
    #[error(transparent)]
    Guest(GuestFault),
    /// The media is unreadable.
    #[error(transparent)]
    Media(MediaError),
    /// The sectors are lost, as is known already.
    #[error("the sectors are lost")]
    Lost,
    /// The media reads back something else than was stored.
    #[error("the cached bytes do not match their checksum")]
    Checksum,
}

/// For whom bytes are copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Reader {
    /// A guest: reclaim takes that for evidence that the data is worth keeping.
    Guest,
    /// Write-back or reclaim.
    Worker,
}

impl<E: Env> Cache<E> {
    /// Copies an extent's bytes out, verifying whole blocks first if asked to. `sink` is called
    /// with byte offsets from 0 on.
    pub(crate) fn copy_extent(
        &self,
        extent: &Extent,
        reader: Reader,
        verify: bool,
        mut sink: impl FnMut(usize, &[u8]) -> Result<(), GuestFault>,
    ) -> Result<(), HitError> {
        let mut block = [0u8; 4096];
        let len = extent.range.len as usize * 512;
        if extent.place.is_lost() {
            return Err(HitError::Lost);
        }
        if extent.place.zero {
            for at in (0..len).step_by(4096) {
                sink(at, &block[..(len - at).min(4096)]).map_err(HitError::Guest)?;
            }
            return Ok(());
        }
        let (id, start) = self.media.locate(extent.place.position);
        if reader == Reader::Guest {
            self.segments[id as usize].note_read(start / 512, extent.range.len as u32);
        }
        let mut at = 0;
        while at < len {
            let part = self.verified(id, start + at as u32, len - at, verify, &mut block)?;
            sink(at, part).map_err(HitError::Guest)?;
            at += part.len();
        }
        Ok(())
    }

    /// What one block has of the `len` bytes from `offset` in a segment on, by way of `block`.
    fn verified<'a>(
        &self,
        id: u32,
        offset: u32,
        len: usize,
        verify: bool,
        block: &'a mut [u8; 4096],
    ) -> Result<&'a [u8], HitError> {
        let segment = &self.segments[id as usize];
        let (number, within) = (offset / 4096, offset as usize % 4096);
        let n = (4096 - within).min(len);
        let whole = if verify { segment.block_checksum(number) } else { None };
        if let Some(crc) = whole {
            let from = self.media.in_segment(id, number * 4096);
            self.media.pmem.read(from, &mut block[..]).map_err(HitError::Media)?;
            if crc32fast::hash(&block[..]) != crc {
                return Err(HitError::Checksum);
            }
            return Ok(&block[within..within + n]);
        }
        let from = self.media.in_segment(id, offset);
        self.media.pmem.read(from, &mut block[..n]).map_err(HitError::Media)?;
        let first = offset / 512;
        let good = |(i, sector): (usize, &[u8])| {
            crc32fast::hash(sector) == segment.sector_checksum(first + i as u32)
        };
        if verify && !block[..n].chunks_exact(512).enumerate().all(good) {
            return Err(HitError::Checksum);
        }
        Ok(&block[..n])
    }

    /// Copies an extent to a guest's buffer from byte `base` on, verified. Whole blocks for which there is
    /// a way go there in one pass.
    fn copy_to_guest<B: Buffer>(&self, extent: &Extent, data: &mut B, base: usize) -> Result<(), HitError> {
        let plain = extent.place.is_lost() || extent.place.zero;
        let (id, start) = if plain { (0, 0) } else { self.media.locate(extent.place.position) };
        if plain || !start.is_multiple_of(4096) || !extent.range.len.is_multiple_of(8) {
            return self.copy_extent(extent, Reader::Guest, true, |at, bytes| data.copy_in(base + at, bytes));
        }
        let segment = &self.segments[id as usize];
        segment.note_read(start / 512, extent.range.len as u32);
        for at in (0..extent.range.len as u32 * 512).step_by(4096) {
            let (offset, to) = (start + at, base + at as usize);
            let from = self.media.in_segment(id, offset);
            if let Some(crc) = segment.block_checksum(offset / 4096) {
                let pass = |mut to: ForeignSliceMut<'_>| self.media.pmem.read_summed(from, &mut to);
                if data.lend_mut(to, 4096, pass).flatten() == Some(crc) {
                    continue;
                }
            }
            let mut block = [0; 4096];
            match self.verified(id, offset, 4096, true, &mut block) {
                Ok(part) => data.copy_in(to, part).map_err(HitError::Guest)?,
                Err(error) => {
                    // What has failed its check does not stay with the guest.
                    data.copy_in(to, &[0; 4096]).map_err(HitError::Guest)?;
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

impl<E: Env, B: Buffer> Queue<E, B> {
    /// Takes a read, which is answered when its batch ends.
    pub(super) fn gather_read(&mut self, slot: u32, range: SectorRange) {
        if !self.reads.is_empty() {
            // Needed after the copies of those before it. Alone, a read would only look it up twice.
            self.volume.core.index.prefetch(range.start);
        }
        self.reads.push((slot, range));
    }

    /// Answers the gathered reads. Each is looked up, and its first bytes and its checksum are asked for,
    /// before the one in front of it is copied: these lines are seldom in the processor's caches, and a copy
    /// is longer than a processor sees ahead. The section is open from the first look to the last copy.
    pub(super) fn start_reads(&mut self) {
        let mut reads = std::mem::take(&mut self.reads);
        let (mut found, mut ahead) = (std::mem::take(&mut self.found), std::mem::take(&mut self.found_ahead));
        if let Some(&(_, first)) = reads.first() {
            self.look_up(first, &mut found);
        }
        for (n, &(slot, range)) in reads.iter().enumerate() {
            if let Some(&(_, next)) = reads.get(n + 1) {
                self.look_up(next, &mut ahead);
            }
            self.start_read(slot, range, &found);
            std::mem::swap(&mut found, &mut ahead);
        }
        reads.clear();
        (self.reads, self.found, self.found_ahead) = (reads, found, ahead);
    }

    /// What is cached of a range.
    fn look_up(&self, range: SectorRange, found: &mut Vec<Extent>) {
        found.clear();
        if self.volume.mode() == super::super::volume::Mode::Passthrough {
            return;
        }
        let cache = &self.volume.cache;
        self.volume.core.index.lookup(range, found);
        if let Some(Extent { place, .. }) = found.first()
            && !place.is_lost()
            && !place.zero
        {
            let (id, offset) = cache.media.locate(place.position);
            cache.media.pmem.prefetch(cache.media.in_segment(id, offset));
            cache.segments[id as usize].prefetch_block(offset / 4096);
        }
    }

    /// Answers what is cached, which has been `found`, and starts disk reads for the rest.
    fn start_read(&mut self, slot: u32, range: SectorRange, found: &[Extent]) {
        add(&self.shared().tally.reads, 1);
        self.slots.get(slot).left = 1;
        let cutoff = self.volume.reads.sequential_cutoff / 512;
        let is_admitted = self.sequential.note(range) <= cutoff || cutoff == 0;
        let (core, cache) = (&self.volume.core, &self.volume.cache);
        core.reuse.read(range, cache.opened.load(Ordering::Relaxed));
        let mut gaps = std::mem::take(&mut self.gaps);
        gaps.clear();
        let mut ok = true;
        let mut at = range.start;
        for extent in found {
            if extent.range.start > at {
                gaps.push(SectorRange::new(at, extent.range.start - at));
            }
            at = extent.range.end();
            match self.answer_hit(slot, range, extent) {
                Hit::Answered => {}
                Hit::ReadAgain => gaps.push(extent.range),
                Hit::Failed => ok = false,
            }
        }
        if at < range.end() {
            gaps.push(SectorRange::new(at, range.end() - at));
        }
        let missed: u64 = gaps.iter().map(|g| g.len).sum();
        let tally = &self.shared().tally;
        add(&tally.read_hit_sectors, range.len - missed);
        add(if missed == 0 { &tally.read_hits } else { &tally.read_misses }, 1);
        if ok {
            for gap in &gaps {
                self.start_miss(slot, *gap, is_admitted);
            }
        }
        self.gaps = gaps;
        self.part_done(slot, ok);
    }

    fn answer_hit(&mut self, slot: u32, range: SectorRange, extent: &Extent) -> Hit {
        let base = (extent.range.start - range.start) as usize * 512;
        let data = &mut self.slots.get(slot).request.data;
        let verify = self.volume.data_crc && !mutated(Mutant::HitNotVerified);
        let cache = &self.volume.cache;
        let result = if verify {
            cache.copy_to_guest(extent, data, base)
        } else {
            cache.copy_extent(extent, Reader::Guest, false, |at, bytes| data.copy_in(base + at, bytes))
        };
        let error = match result {
            Ok(()) => return Hit::Answered,
            Err(HitError::Guest(_) | HitError::Lost) => return Hit::Failed,
            Err(error) => error,
        };
        add(&self.shared().tally.checksum_errors, 1);
        let (volume, range) = (&self.volume.name, extent.range);
        if !extent.place.dirty || mutated(Mutant::DamagedDirtyReadFromDisk) {
            tracing::warn!(volume, %range, %error, "a clean cached copy is damaged: reading the disk instead");
            self.volume.cache.drop_damaged(&self.volume.core, *extent);
            return Hit::ReadAgain;
        }
        tracing::error!(volume, %range, %error, "dirty data is damaged: these sectors answer with an error");
        // Write-back lists what is lost; it is not to wait for age.
        self.volume.core.damage_seen.store(true, Ordering::Relaxed);
        self.volume.core.writeback.raise();
        Hit::Failed
    }

    /// Reads a gap from the disk, in pieces that may become fills.
    fn start_miss(&mut self, slot: u32, gap: SectorRange, is_admitted: bool) {
        add(&self.shared().tally.read_miss_sectors, gap.len);
        let fills = self.volume.mode().fills();
        let longest = self.volume.cache.piece_sectors_max().min(EXTENT_SECTORS_MAX);
        let mut start = gap.start;
        while start < gap.end() {
            let in_region = REGION_SECTORS - start % REGION_SECTORS;
            let range = SectorRange::new(start, (gap.end() - start).min(in_region).min(longest));
            start = range.end();
            let part = Joined { slot, range };
            self.slots.get(slot).left += 1;
            if !self.join(part) {
                let fills = fills && self.admits(range, is_admitted);
                let fill = if fills { self.place(range) } else { None };
                self.read_disk(part, fill);
            }
        }
    }

    /// Lets a part of a read wait for the bytes that another read of this queue has asked the disk for.
    ///
    /// Whatever it must see had completed before it came. What was committed or went around the cache since
    /// the other's placeholder was registered has broken that; what came before, the disk read brings. A
    /// deadline is each request's own, so where there is one nobody waits for another.
    fn join(&mut self, part: Joined) -> bool {
        let Self { volume, io, slots, .. } = self;
        if volume.core.policy.deadline_ms().is_some() {
            return false;
        }
        let is_good =
            |ticket, whole| volume.core.stripes.is_whole(ticket, whole) || mutated(Mutant::BrokenMissJoined);
        let mut others = io.misses_over(part.range);
        let Some((.., joined)) = others.find(|(ticket, whole, _)| is_good(*ticket, *whole)) else {
            return false;
        };
        joined.push(part);
        slots.get(part.slot).asked_disk = true;
        true
    }

    /// Asks the disk for a part of a read, which counts it as left.
    pub(super) fn read_disk(&mut self, part: Joined, fill: Option<(Ticket, u64)>) {
        let Joined { slot, range } = part;
        let buf = self.io.buffer(range.len as usize * 512);
        let op = Op::Read { offset: range.start * 512, buf };
        let purpose = Purpose::Miss { slot, range, fill, joined: Vec::new() };
        if self.submit_io(purpose, op).is_err() {
            self.drop_placeholder(fill.map(|f| f.0), range);
            self.part_done(slot, false);
        }
    }

    /// Whether what is missing of a range is to be cached.
    fn admits(&self, range: SectorRange, is_admitted: bool) -> bool {
        let (evicted, volume) = (&self.volume.cache.evicted, self.volume.core.incarnation);
        let admits = is_admitted
            && match self.volume.reads.admission {
                Admission::Adaptive => true,
                Admission::Never => false,
                Admission::SecondMiss if evicted.knows(volume, range) => true,
                Admission::SecondMiss => {
                    evicted.note(volume, range);
                    false
                }
            };
        if !admits {
            add(&self.shared().tally.unadmitted_sectors, range.len);
        }
        admits
    }

    /// Registers a placeholder and draws the fill's version. `None` when something has been
    /// committed since the gap was found: the registration would not have seen it, and a fill with
    /// a higher version and the disk's older bytes would outlive it after a crash.
    fn place(&self, range: SectorRange) -> Option<(Ticket, u64)> {
        let core = &self.volume.core;
        let ticket = core.stripes.place(range);
        let mut since = Vec::new();
        core.index.lookup(range, &mut since);
        if since.is_empty() {
            return Some((ticket, core.version.fetch_add(1, Ordering::SeqCst)));
        }
        core.stripes.remove(ticket, range);
        None
    }

    pub(super) fn drop_placeholder(&self, ticket: Option<Ticket>, range: SectorRange) {
        if let Some(ticket) = ticket {
            self.volume.core.stripes.remove(ticket, range);
        }
    }

    /// The disk has answered: so is the guest, whoever of it has asked, and the data may become cached.
    pub(super) fn miss_done(
        &mut self,
        asked: Joined,
        joined: &[Joined],
        fill: Option<(Ticket, u64)>,
        op: Op,
        ok: bool,
    ) {
        let Op::Read { buf, .. } = op else { unreachable!("a miss is a read") };
        let range = asked.range;
        for part in std::iter::once(&asked).chain(joined) {
            let request = &mut self.slots.get(part.slot).request;
            let from = (part.range.start - range.start) as usize * 512;
            let to = (part.range.start - request.sector) as usize * 512;
            let bytes = &buf[from..][..part.range.len as usize * 512];
            let good = ok && request.data.copy_in(to, bytes).is_ok();
            self.part_done(part.slot, good);
        }
        match fill {
            Some((ticket, version)) if ok => {
                self.fills.push_back(Fill { range, at: 0, buf, version, ticket, registered: Some(range) });
            }
            _ => {
                self.drop_placeholder(fill.map(|f| f.0), range);
                self.io.recycle(buf);
            }
        }
    }
}

enum Hit {
    Answered,
    ReadAgain,
    Failed,
}
