//! Lost sectors: dirty data that the media lost before the disk had it.
//!
//! A volume's list stands in its tail page (FORMAT.md, `LostRange`). Laws:
//! - Nobody ever reads the disk's older bytes for a lost sector: the index maps it to
//!   [`Place::LOST`], which answers with an error, until the guest overwrites it.
//! - The tail passes a lost key only in the update that lists it, and a range leaves the list only
//!   in the update that moves the tail past the keys that replace it (then the disk has those,
//!   flushed) or when the operator accepts the loss. In between, recovery tells the two apart by
//!   version: of a lost range and a key the higher counts, at equality the range.
//! - What was lost, and all it superseded, is durably dead before its range leaves the list: write-back
//!   writes the liveness words before each tail, [`Cache::forget_lost`] before its own.
//! - The list is bounded. When it is full the tail stays where it is, and with it the volume, until
//!   enough is overwritten; attached with the loss accepted, it gives up what does not fit.
//!
//! The disk alone then lacks the lost sectors of its epochs: in `strict` it is the older state it
//! always is but for those, and wholly so again when the list is empty.
//!
//! [`Place::LOST`]: super::index::Place::LOST

use std::sync::atomic::Ordering;

use super::attach::AttachError;
use super::core::Cache;
use super::counters;
use super::env::{Clock, Env};
use super::index::{Extent, Place};
use super::queue::HitError;
use super::stripes::lock;
use super::syncer::Outcome;
use super::volume::{Volume, VolumeCore};
use crate::onmedia::{Key, LOST_MAX, LostCause, LostRange, SegmentHeader};
use crate::units::SectorRange;

/// Takes what `extents` cover out of the list.
pub(super) fn heal(list: &mut Vec<LostRange>, extents: &[Extent]) {
    for extent in extents {
        let healed = extent.range;
        if !list.iter().any(|l| l.range.overlaps(&healed)) {
            continue;
        }
        let parts = |lost: LostRange| {
            let Some(gone) = lost.range.intersection(&healed) else { return [Some(lost), None] };
            let part = |start: u64, end: u64| {
                (start < end).then(|| LostRange { range: SectorRange::new(start, end - start), ..lost })
            };
            [part(lost.range.start, gone.start), part(gone.end(), lost.range.end())]
        };
        *list = list.iter().flat_map(|l| parts(*l)).flatten().collect();
    }
}

/// Adds a range, joined with the one it goes on from.
pub(super) fn add(list: &mut Vec<LostRange>, lost: LostRange) {
    match list.last_mut() {
        Some(last)
            if last.range.end() == lost.range.start
                && (last.version, last.cause) == (lost.version, lost.cause) =>
        {
            last.range.len += lost.range.len;
        }
        _ => list.push(lost),
    }
}

/// The parts of a list that nothing newer has replaced.
pub(super) fn still_lost(core: &VolumeCore, list: &[LostRange]) -> Vec<LostRange> {
    let mut left = Vec::new();
    for lost in list {
        let mut found = Vec::new();
        core.index.lookup(lost.range, &mut found);
        let parts = found.iter().filter(|e| e.place.is_lost());
        parts.for_each(|e| add(&mut left, LostRange { range: e.range, ..*lost }));
    }
    left
}

/// Sectors of a list. Ranges of different versions may name the same one, which counts once.
pub(super) fn sectors(list: &[LostRange]) -> u64 {
    let mut ranges: Vec<SectorRange> = list.iter().map(|l| l.range).collect();
    ranges.sort_unstable_by_key(|r| r.start);
    let mut end = 0;
    ranges.iter().fold(0, |sum, range| {
        let fresh = range.end().saturating_sub(end.max(range.start));
        end = end.max(range.end());
        sum + fresh
    })
}

/// The list in words: how much, and where it begins.
pub(super) fn summary(list: &[LostRange]) -> String {
    let first: Vec<String> = list.iter().take(4).map(|l| l.range.to_string()).collect();
    let more = if list.len() > 4 { ", …" } else { "" };
    format!(
        "{} sectors are lost ({}{more}): they answer with an error until they are overwritten",
        sectors(list),
        first.join(", ")
    )
}

impl<E: Env> Cache<E> {
    /// What is lost of an extent that lies in one checksummed piece and cannot be read. `None` when
    /// nothing says any more which key it was.
    pub(super) fn lost_range(&self, extent: &Extent, error: &HitError) -> Option<LostRange> {
        let cause = match error {
            HitError::Media(_) => LostCause::Unreadable,
            _ => LostCause::Checksum,
        };
        let time_s = u32::try_from(self.clock.unix_ms() / 1000).unwrap_or(u32::MAX);
        let version = self.version_at(extent.place.position)?;
        Some(LostRange { range: extent.range, version, time_s, cause })
    }

    /// The version of the key whose payload lies at a position: from the segment's records, or, where
    /// these are damaged as well, from its summary.
    fn version_at(&self, position: u64) -> Option<u64> {
        let (id, offset) = self.media.locate(position);
        let sector = offset / 512;
        let segment = &self.segments[id as usize];
        let life = SegmentHeader {
            incarnation: segment.owner.load(Ordering::Relaxed),
            generation: segment.generation.load(Ordering::Relaxed),
            start_counter: segment.start_counter.load(Ordering::Relaxed),
            ..SegmentHeader::default()
        };
        let names =
            |key: &&Key| key.kind.has_payload() && (key.payload..key.payload + key.sectors).contains(&sector);
        let mut version = None;
        let (top, low) = (self.media.geometry.data_end(), segment.log_low.load(Ordering::Acquire));
        let walked = self.media.walk_from(id, &life, top, low, u64::MAX, |record| {
            version = version.or(record.keys.iter().find(names).map(|key| key.version));
        });
        if version.is_none() && walked.is_err() {
            let header = self.media.load_header(id).newest.filter(|h| h.summary_len > 0)?;
            let summary = self.media.scan_summary(id, &header).ok()?;
            version = summary.keys.iter().find(names).map(|key| key.version);
        }
        version
    }

    /// The parts of an extent that have a checksum of their own, in ascending order.
    pub(super) fn checked_parts(&self, extent: Extent) -> Vec<Extent> {
        if extent.place.zero {
            return vec![extent];
        }
        let (id, _) = self.media.locate(extent.place.position);
        let segment = &self.segments[id as usize];
        let mut parts = Vec::new();
        let mut at = extent.range.start;
        while at < extent.range.end() {
            let place = extent.place_at(at);
            let sector = self.media.locate(place.position).1 / 512;
            let whole = segment.block_checksum(sector / 8).is_some();
            let len = if whole { u64::from(8 - sector % 8) } else { 1 };
            let range = SectorRange::new(at, len.min(extent.range.end() - at));
            parts.push(Extent { range, place });
            at = range.end();
        }
        parts
    }

    /// Ceases to point at payload that is lost: what the index still shows of it answers with an error.
    pub(super) fn lose(&self, core: &VolumeCore, extents: &[Extent]) {
        let mut removed = Vec::new();
        for extent in extents {
            core.index.replace_if(*extent, Place::LOST, &mut removed);
        }
        count_lost(core, &removed);
        self.mark_dead(&removed);
    }

    /// Ceases to point at payload that is lost, and leaves its sectors to the disk.
    pub(super) fn forget(&self, core: &VolumeCore, extent: Extent) {
        let mut removed = Vec::new();
        core.index.remove_if(extent, &mut removed);
        count_lost(core, &removed);
        self.mark_dead(&removed);
    }

    /// The operator accepts the loss: what is lost reads as the disk has it.
    pub(super) fn forget_lost(&self, core: &VolumeCore) -> Result<(), AttachError> {
        let forgotten = lock(&core.lost).clone();
        if forgotten.is_empty() {
            return Ok(());
        }
        let ticket = self.write_liveness(None)?;
        if self.syncer.wait(&*self.media.pmem, ticket) == Outcome::Failed {
            return Err(AttachError::SyncFailed);
        }
        lock(&core.lost).clear();
        if let Err(error) = self.settle_tail(core) {
            *lock(&core.lost) = forgotten;
            return Err(error);
        }
        for lost in forgotten {
            self.forget(core, Extent { range: lost.range, place: Place::LOST });
        }
        Ok(())
    }

    /// Writes both copies of the tail as it stands, each durable before the next.
    fn settle_tail(&self, core: &VolumeCore) -> Result<(), AttachError> {
        for _ in 0..2 {
            let next = lock(&core.tail_page).1;
            self.write_tail(core, next, core.tail.load(Ordering::SeqCst))?;
            let ticket = self.syncer.request(&*self.media.pmem, None);
            if self.syncer.wait(&*self.media.pmem, ticket) == Outcome::Failed {
                return Err(AttachError::SyncFailed);
            }
        }
        Ok(())
    }
}

impl<E: Env> Volume<E> {
    /// What of the volume is lost: these sectors answer with an error until they are overwritten, or
    /// the operator accepts the loss. What the guest has overwritten since leaves the list with the
    /// next round of write-back.
    pub fn lost(&self) -> Vec<LostRange> {
        lock(&self.core.lost).clone()
    }
}

/// Whether a list is too long for a tail page.
pub(super) fn is_too_long(list: &[LostRange]) -> bool {
    list.len() > LOST_MAX
}

fn count_lost(core: &VolumeCore, removed: &[Extent]) {
    let dirty: u64 = removed.iter().filter(|extent| extent.place.dirty).map(|extent| extent.range.len).sum();
    counters::add(&core.tally.lost_dirty_sectors, dirty);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(first: u64, len: u64, version: u64) -> LostRange {
        LostRange { range: SectorRange::new(first, len), version, time_s: 0, cause: LostCause::Checksum }
    }

    fn written(first: u64, len: u64) -> Extent {
        let place = Place { position: 100, zero: false, dirty: true };
        Extent { range: SectorRange::new(first, len), place }
    }

    #[test]
    fn healing_takes_exactly_what_was_written() {
        for (healed, left) in [
            ((0, 10), vec![lost(10, 10, 7)]),
            ((5, 5), vec![lost(10, 10, 7)]),
            ((20, 5), vec![lost(10, 10, 7)]),
            ((5, 10), vec![lost(15, 5, 7)]),
            ((15, 10), vec![lost(10, 5, 7)]),
            ((12, 3), vec![lost(10, 2, 7), lost(15, 5, 7)]),
            ((10, 10), vec![]),
            ((0, 100), vec![]),
        ] {
            let mut list = vec![lost(10, 10, 7)];
            heal(&mut list, &[written(healed.0, healed.1)]);
            assert_eq!(list, left, "{healed:?}");
        }
    }

    #[test]
    fn ranges_of_one_key_join_and_a_sector_named_twice_counts_once() {
        let mut list = Vec::new();
        for range in [lost(0, 8, 1), lost(8, 8, 1), lost(16, 8, 2), lost(4, 8, 3)] {
            add(&mut list, range);
        }
        assert_eq!(list, [lost(0, 16, 1), lost(16, 8, 2), lost(4, 8, 3)]);
        assert_eq!(sectors(&list), 24);
    }
}
