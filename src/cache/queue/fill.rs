//! Fills: clean data on its way into the cache, after a miss or a write-through.
//!
//! Law: a fill is published only while its registration stands unbroken, checked with its stripes
//! held, and only where the index shows nothing. So it never covers anything newer, and the version
//! it carries, drawn before its disk I/O was issued, is below that of everything written since.
//!
//! Law: a fill outlives the host only if its bytes on the disk do. In modes that write around the
//! cache the disk may not have been flushed since, so there a fill carries its epoch and counts in
//! recovery once the tail has reached it; write-back's next round flushes the disk and moves the
//! tail. In write-back mode what is not cached is flushed already: epoch 0, which always counts.

use std::sync::atomic::Ordering;

use super::super::counters::add;
use super::super::env::Env;
use super::super::index::Extent;
use super::super::segments::Class;
use super::super::stream::Stamp;
use super::super::stripes::{Ticket, lock};
use super::Queue;
use super::write::{ensure_open, is_open_for_fills};
use crate::backing::AlignedBuf;
use crate::mutant::{Mutant, if_mutated, mutated};
use crate::onmedia::KeyKind;
use crate::units::SectorRange;
use crate::volume::Buffer;

/// Clean data to be cached: `range` at byte `at` of `buf`. `registered` is what the ticket covers,
/// where this fill is the one that ends the registration.
pub(crate) struct Fill {
    pub range: SectorRange,
    pub at: usize,
    pub buf: AlignedBuf,
    pub version: u64,
    pub ticket: Ticket,
    pub registered: Option<SectorRange>,
}

/// Which keys and checksums of the draft belong to which fill.
struct Part {
    keys: std::ops::Range<usize>,
    checksums: std::ops::Range<usize>,
}

impl<E: Env, B: Buffer> Queue<E, B> {
    /// Commits waiting fills, a record at a time; without space they are dropped.
    pub(super) fn commit_fills(&mut self) {
        while !self.fills.is_empty() {
            let taken =
                if self.volume.cache.syncer.has_failed() { Some(0) } else { self.commit_fill_record() };
            let Some(taken) = taken else { continue };
            let dropped = taken == 0;
            if dropped {
                add(&self.shared().tally.fills_dropped, self.fills.len() as u64);
            }
            let count = if dropped { self.fills.len() } else { taken };
            for _ in 0..count {
                let fill = self.fills.pop_front().expect("counted");
                if let Some(registered) = fill.registered {
                    self.volume.core.stripes.remove(fill.ticket, registered);
                }
                self.io.recycle(fill.buf);
            }
            self.volume.core.wake_waiting();
        }
    }

    /// Returns how many fills are dealt with: 0 if there is no space, `None` to be called again.
    fn commit_fill_record(&mut self) -> Option<usize> {
        let Self { volume, index, fills, scratch, .. } = &mut *self;
        let (volume, q) = (&**volume, *index);
        let (cache, core) = (&volume.cache, &volume.core);
        // Those that come first and are alike go together.
        let of = |fill: &Fill| cache.evicted.knows(core.incarnation, fill.range);
        let is_proven = fills.front().is_some_and(of);
        let class = if is_proven { Class::Proven } else { Class::Probation };
        let own = core.fill_stream(class);
        let mut stream = lock(own.unwrap_or_else(|| core.stream(q)));
        let (class, is_filled) = match own {
            Some(_) => (class, is_open_for_fills(volume, class, &mut stream)),
            None => (Class::Written, ensure_open(volume, q, &mut stream, true)),
        };
        if !is_filled {
            return Some(0);
        }
        let open = stream.open.as_mut().expect("ensured above");
        let segment = &cache.segments[open.id as usize];
        let draft = &mut scratch.draft;
        draft.begin(open);
        let mut parts = Vec::with_capacity(fills.len());
        let limit = open.payload_end + cache.record_payload_max();
        for fill in fills.iter() {
            let is_another = own.is_some() && !parts.is_empty() && of(fill) != is_proven;
            if is_another
                || !draft.has_room(open, fill.range.len)
                || draft.payload_end + fill.range.len as u32 * 512 > limit
            {
                break;
            }
            let (k, c) = (draft.keys.len(), draft.checksums.len());
            let source = |offset: usize, dst: &mut [u8]| {
                dst.copy_from_slice(&fill.buf[fill.at + offset..][..dst.len()]);
                Ok(())
            };
            if draft.store(&cache.media, open, segment, fill.range, KeyKind::Fill, source).is_err() {
                cache.close_segment(&mut stream);
                return Some(parts.len());
            }
            for key in &mut draft.keys[k..] {
                key.version = fill.version;
            }
            parts.push(Part { keys: k..draft.keys.len(), checksums: c..draft.checksums.len() });
        }
        if parts.is_empty() {
            // The segment is full: the next call opens another, if there is one.
            cache.close_segment(&mut stream);
            return None;
        }
        let count = parts.len();
        let held = core.stripes.hold(fills.iter().take(count).map(|f| f.range), &mut scratch.stripes);
        for (fill, part) in fills.iter().zip(&parts).rev() {
            if !core.stripes.is_whole(fill.ticket, fill.range) && !mutated(Mutant::FillOverNewer) {
                draft.keys.drain(part.keys.clone());
                draft.checksums.drain(part.checksums.clone());
                add(&core.queue(q).tally.fills_dropped, 1);
            }
        }
        if draft.keys.is_empty() {
            return Some(count);
        }
        let epoch = core.epoch();
        let is_flushed = !volume.mode().bypasses() || mutated(Mutant::FillOutlivesDiskCache);
        if !is_flushed {
            core.stamp(epoch);
            volume.note_dirty();
        }
        draft.keys.iter_mut().for_each(|k| k.epoch = if is_flushed { 0 } else { epoch });
        let stamp = Stamp {
            incarnation: core.incarnation,
            start_counter: cache.start_counter,
            epoch,
            time_ms: cache.recent_ms.load(Ordering::Relaxed),
        };
        if open.persist(&cache.media, segment, draft, &stamp).is_err() {
            drop(held);
            cache.close_segment(&mut stream);
            return Some(count);
        }
        core.charge(q, open.charge());
        open.appended(cache.syncer.started());
        let mut inserted = std::mem::take(&mut scratch.replaced);
        for key in &draft.keys {
            inserted.clear();
            segment.add_live(key.sectors);
            let place = cache.media.place(open.id, key, false);
            if_mutated(Mutant::FillOverNewer, || core.index.remove(key.range(), &mut Vec::new()));
            core.index.insert_gaps(Extent { range: key.range(), place }, &mut inserted);
            cache.mark_unmapped_dead(open.id, key, &inserted);
            core.reuse.stored(key.range(), class, cache.opened.load(Ordering::Relaxed));
            add(&core.queue(q).tally.fill_sectors, u64::from(key.sectors));
        }
        segment.log_low.store(open.log_low, Ordering::Release);
        drop(held);
        scratch.replaced = inserted;
        Some(count)
    }
}
