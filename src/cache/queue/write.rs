//! Writes in write-back mode: gathered, stored, and committed a record at a time.
//!
//! The order, and what breaks if two steps are swapped, is in `../DESIGN.md` ("Writing"). What this
//! file adds: a request longer than a record is committed in parts and completed after the last;
//! a guest fault takes back only that request's keys; no space leaves the gathered list as it is.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use super::super::consistency::redo_need;
use super::super::core::Cache;
use super::super::counters::{Tally, add};
use super::super::env::{Clock, Env};
use super::super::index::{Extent, REGION_SECTORS};
use super::super::latency::Stage;
use super::super::record::{Draft, Lent, StoreError};
use super::super::segments::Class;
use super::super::stream::{Open, Stamp, Stream};
use super::super::stripes::lock;
use super::super::volume::{Cursor, Volume};
use super::throttle::Wait;
use super::{Queue, Slots, Then};
use crate::mutant::{Mutant, if_mutated, mutated};
use crate::onmedia::{Key, KeyKind};
use crate::pmem::Pmem;
use crate::units::SectorRange;
use crate::volume::{Buffer, RequestKind, Status};

/// A write or zeroing that has been submitted and not yet wholly committed.
#[derive(Debug)]
pub(crate) struct Gathered {
    pub slot: u32,
    pub range: SectorRange,
    pub kind: KeyKind,
    /// Whether it completes durably: the guest had no write cache when it was submitted.
    pub is_through: bool,
    /// Sectors committed by earlier records.
    pub done: u64,
    /// Sectors that will be committed when the draft is.
    staged: u64,
    failed: bool,
    /// Segments in a row that have refused it.
    refused: u32,
    /// When it was submitted, of one that is timed; else 0.
    since_ns: u64,
}

/// Segments in a row that may refuse a write before it fails: nothing says that the next takes it.
const REFUSALS_MAX: u32 = 16;

impl Gathered {
    fn new(slot: u32, range: SectorRange, kind: KeyKind, is_through: bool, since_ns: u64) -> Self {
        Self { slot, range, kind, is_through, done: 0, staged: 0, failed: false, refused: 0, since_ns }
    }
}

/// Memory reused from batch to batch.
pub(crate) struct Scratch {
    pub draft: Draft,
    pub stripes: Vec<u16>,
    pub replaced: Vec<Extent>,
    /// An epoch, and what this queue has put into it, in bytes of a redo area.
    spent: (u64, u64),
}

impl Scratch {
    pub fn new() -> Self {
        Self { draft: Draft::new(), stripes: Vec::new(), replaced: Vec::new(), spent: (0, 0) }
    }
}

/// How an attempt to commit a record ended.
enum Attempt {
    /// Something was committed or given up: go on.
    Progress,
    NoSpace,
    /// The volume's writes wait for its disk.
    Paced,
}

/// The next piece of a write: within one region, at most one extent.
fn piece(range: SectorRange, done: u64, longest: u64) -> SectorRange {
    let start = range.start + done;
    let in_region = REGION_SECTORS - start % REGION_SECTORS;
    SectorRange::new(start, (range.len - done).min(in_region).min(longest))
}

impl<E: Env, B: Buffer> Queue<E, B> {
    pub(super) fn gather_write(
        &mut self,
        slot: u32,
        range: SectorRange,
        kind: RequestKind,
        is_through: bool,
    ) {
        let tally = &self.shared().tally;
        let kind = match kind {
            RequestKind::Write => {
                add(&tally.writes, 1);
                add(&tally.write_sectors, range.len);
                KeyKind::Data
            }
            RequestKind::Discard { .. } => {
                add(&tally.discards, 1);
                add(&tally.discard_sectors, range.len);
                KeyKind::Discard
            }
            RequestKind::WriteZeroes { unmap, .. } => {
                add(&tally.discards, 1);
                add(&tally.discard_sectors, range.len);
                if unmap { KeyKind::Discard } else { KeyKind::Zero }
            }
            RequestKind::Read | RequestKind::Flush => unreachable!("handled by submit"),
        };
        if !self.gather.is_empty() {
            // The index is needed after the copies: by then the line has come. Alone, a write would
            // only look it up twice.
            self.volume.core.index.prefetch(range.start);
        }
        let active = self.slots.get(slot);
        if kind == KeyKind::Data {
            active.request.data.lend(0, range.len.min(8) as usize * 512, |bytes| bytes.prefetch());
        }
        let since_ns = active.since_ns;
        self.has_sample_gathered |= since_ns != 0;
        self.gather.push_back(Gathered::new(slot, range, kind, is_through, since_ns));
    }

    pub(super) fn commit_writes(&mut self) {
        let (mut committed, mut wait) = (false, None);
        while !self.gather.is_empty() {
            if self.volume.cache.syncer.has_failed() || self.volume.core.damaged.load(Ordering::Relaxed) {
                self.fail_gathered();
                break;
            }
            let allowance = self.volume.core.allowance(self.index);
            let begun_ns = if self.has_sample_gathered { self.volume.cache.clock.now_ns() } else { 0 };
            let attempt = if allowance == 0 {
                Attempt::Paced
            } else {
                let Self { volume, index, slots, gather, scratch, .. } = &mut *self;
                let mut stream = lock(volume.core.stream(*index));
                commit_record(volume, *index, &mut stream, gather, slots, scratch, allowance)
            };
            match attempt {
                Attempt::Progress => {
                    committed = true;
                    if begun_ns != 0 {
                        self.note_begun(begun_ns);
                    }
                }
                Attempt::Paced if self.wait_for_allowance() => {}
                Attempt::Paced => {
                    if self.volume.core.is_out_of_room() && self.volume.gives_up_on_space() {
                        self.fail_gathered();
                    }
                    wait = Some(Wait::Pace);
                    break;
                }
                Attempt::NoSpace if self.wait_for_space() => {}
                Attempt::NoSpace => {
                    let is_exhausted = self.volume.cache.is_exhausted.load(Ordering::SeqCst);
                    if (is_exhausted || self.volume.core.share.is_stuck()) && self.volume.gives_up_on_space()
                    {
                        self.fail_gathered();
                    }
                    wait = Some(Wait::Space);
                    break;
                }
            }
            self.complete_committed();
        }
        self.note_wait(wait.filter(|_| !self.gather.is_empty()));
        if committed {
            self.volume.note_dirty();
        }
    }

    /// Counts how long timed writes had waited when the record was begun that has their first part.
    #[cold]
    fn note_begun(&mut self, begun_ns: u64) {
        let latencies = &self.volume.core.queue(self.index).latencies;
        self.has_sample_gathered = false;
        for gathered in self.gather.iter_mut().filter(|gathered| gathered.since_ns != 0) {
            if gathered.done > 0 || gathered.failed {
                latencies.record(Stage::WriteWait, begun_ns.saturating_sub(gathered.since_ns));
                gathered.since_ns = 0;
            } else {
                self.has_sample_gathered = true;
            }
        }
    }

    /// Completes the requests whose last part is committed.
    fn complete_committed(&mut self) {
        let mut ticket = None;
        while let Some(front) = self.gather.front() {
            if front.done < front.range.len && !front.failed {
                return;
            }
            let front = self.gather.pop_front().expect("it was there");
            if front.failed && !mutated(Mutant::FaultedWriteAcknowledged) {
                self.complete(front.slot, Status::IoError);
            } else if !front.is_through || mutated(Mutant::CompletedUnsynced) {
                self.complete(front.slot, Status::Ok);
            } else {
                // Without a write cache completion is the only order there is: it ends an epoch.
                if !mutated(Mutant::EpochNotRaisedAtWrite) {
                    self.volume.core.raise_epoch();
                }
                let cache = &self.volume.cache;
                let ticket = *ticket
                    .get_or_insert_with(|| cache.syncer.request(&*cache.media.pmem, Some(&self.waker)));
                self.when_durable(ticket, Then::Complete(front.slot));
            }
        }
    }

    pub(super) fn fail_gathered(&mut self) {
        while let Some(gathered) = self.gather.pop_front() {
            self.complete(gathered.slot, Status::IoError);
        }
    }

    /// Asks for an allowance and parks. True when one came meanwhile.
    fn wait_for_allowance(&mut self) -> bool {
        let shared = self.shared();
        if !shared.waiting.swap(true, Ordering::SeqCst) {
            add(&shared.tally.pace_waits, 1);
            self.volume.core.writeback.raise();
        }
        self.volume.core.allowance(self.index) > 0
    }

    /// Asks for space and parks. True when some came meanwhile.
    fn wait_for_space(&mut self) -> bool {
        let shared = self.shared();
        if !shared.waiting.swap(true, Ordering::SeqCst) {
            add(&shared.tally.space_waits, 1);
        }
        self.volume.core.writeback.raise();
        self.volume.cache.housekeeper.raise();
        self.volume.cache.may_open(&self.volume.core)
    }
}

impl<E: Env> Volume<E> {
    /// Notes that write-back has something to do, and since when.
    pub(super) fn note_dirty(&self) {
        let core = &self.core;
        if core.dirty_since.load(Ordering::Relaxed) == 0 {
            core.dirty_since.store(self.cache.clock.now_ms().max(1), Ordering::Relaxed);
            core.writeback.raise();
        }
    }
}

/// Makes the stream's segment ready for at least one piece. False when there is no space.
pub(super) fn ensure_open<E: Env>(volume: &Volume<E>, q: u16, stream: &mut Stream, for_fill: bool) -> bool {
    let cache = &volume.cache;
    if stream.open.is_none() {
        let number = Class::Written.stream(q);
        let Some(open) = cache.open_segment(&volume.core, number, for_fill) else { return false };
        let cursor = Cursor::Log(open.log_low);
        lock(&volume.core.dirty).drained.insert(open.id, cursor);
        stream.open = Some(open);
        volume.pace(false);
    }
    make_ready(cache, stream);
    true
}

/// The same for a stream of reads alone: nothing in it is ever written back.
pub(super) fn is_open_for_fills<E: Env>(volume: &Volume<E>, class: Class, stream: &mut Stream) -> bool {
    let cache = &volume.cache;
    if stream.open.is_none() {
        stream.open = cache.open_segment(&volume.core, class.stream(0), true);
    }
    make_ready(cache, stream);
    stream.open.is_some()
}

fn make_ready<E: Env>(cache: &Cache<E>, stream: &mut Stream) {
    if let Some(open) = &mut stream.open {
        if !cache.media.pmem.class().fence_is_durable() {
            open.witness_durable(&cache.media, cache.syncer.completed());
        }
        open.align(cache.syncer.started());
    }
}

fn commit_record<E: Env, B: Buffer>(
    volume: &Volume<E>,
    q: u16,
    stream: &mut Stream,
    gather: &mut VecDeque<Gathered>,
    slots: &mut Slots<B>,
    scratch: &mut Scratch,
    allowance: u32,
) -> Attempt {
    if !ensure_open(volume, q, stream, false) {
        return Attempt::NoSpace;
    }
    let open = stream.open.as_mut().expect("ensured above");
    let allowance = allowance.min(volume.epoch_payload());
    let staged = match stage(&volume.cache, open, gather, slots, &mut scratch.draft, allowance) {
        Ok(staged) => staged,
        Err(()) => {
            refuse(gather);
            volume.cache.close_segment(stream);
            return Attempt::Progress;
        }
    };
    if scratch.draft.keys.is_empty() {
        if staged == Staged::Full {
            volume.cache.close_segment(stream);
        }
        return Attempt::Progress;
    }
    let is_published = publish(volume, q, open, scratch);
    volume.core.charge(q, open.charge());
    if is_published {
        for gathered in gather.iter_mut().take_while(|g| g.staged > 0) {
            gathered.done = std::mem::take(&mut gathered.staged);
            gathered.refused = 0;
        }
    } else {
        refuse(gather);
        volume.cache.close_segment(stream);
    }
    Attempt::Progress
}

/// The media has refused a record: nothing of it is staged, and the first write, which every record
/// begins with, may have been refused for the last time.
fn refuse(gather: &mut VecDeque<Gathered>) {
    gather.iter_mut().for_each(|g| g.staged = 0);
    if let Some(front) = gather.front_mut() {
        front.refused += 1;
        front.failed |= front.refused >= REFUSALS_MAX;
    }
}

#[derive(PartialEq, Eq)]
enum Staged {
    All,
    /// The record or the segment is full.
    Full,
}

/// Stores as many gathered pieces as one record takes. `Err`: the media failed.
fn stage<E: Env, B: Buffer>(
    cache: &Cache<E>,
    open: &Open,
    gather: &mut VecDeque<Gathered>,
    slots: &mut Slots<B>,
    draft: &mut Draft,
    allowance: u32,
) -> Result<Staged, ()> {
    let segment = &cache.segments[open.id as usize];
    draft.begin(open);
    let longest = cache.piece_sectors_max();
    // The least is one piece: a debt is paid before the next.
    let limit = open.payload_end + cache.record_payload_max().min(allowance.max(longest as u32 * 512));
    let last = gather.len() - 1;
    for (n, gathered) in gather.iter_mut().enumerate() {
        let is_last = n == last;
        let mark = (draft.keys.len(), draft.checksums.len());
        let mut done = gathered.done;
        while done < gathered.range.len {
            if gathered.kind != KeyKind::Data {
                if !draft.has_room(open, 0) {
                    break;
                }
                let rest = SectorRange::new(gathered.range.start + done, gathered.range.len - done);
                draft.add_zero(rest, gathered.kind);
                done = gathered.range.len;
                break;
            }
            let piece = piece(gathered.range, done, longest);
            if !draft.has_room(open, piece.len) || draft.payload_end + piece.len as u32 * 512 > limit {
                break;
            }
            let buffer = &slots.get(gathered.slot).request.data;
            let source = Lent { buffer, from: done as usize * 512 };
            draft.has_more = !is_last || done + piece.len < gathered.range.len;
            match draft.store(&cache.media, open, segment, piece, KeyKind::Data, source) {
                Ok(()) => done += piece.len,
                Err(StoreError::Source(_)) => {
                    draft.keys.truncate(mark.0);
                    draft.checksums.truncate(mark.1);
                    gathered.failed = true;
                    break;
                }
                Err(StoreError::Media(error)) => {
                    tracing::error!(%error, "the cache media failed under a write");
                    return Err(());
                }
            }
        }
        if gathered.failed {
            // It ends here, and so does the record: completion goes in order.
            gathered.staged = 0;
            return Ok(Staged::All);
        }
        gathered.staged = if done > gathered.done { done } else { 0 };
        if done < gathered.range.len {
            return Ok(Staged::Full);
        }
    }
    Ok(Staged::All)
}

/// Announces the queue's commit of these keys. Where a group of epochs must end with one, the queue
/// ends its epoch before it has put more into it than its share of the redo area.
fn announce<E: Env>(volume: &Volume<E>, q: u16, keys: &[Key], spent: &mut (u64, u64)) -> u64 {
    let share = volume.epoch_share.load(Ordering::Relaxed);
    if share == 0 {
        return volume.core.announce(q);
    }
    let need = volume.redo.as_ref().map_or(0, |redo| redo_need(keys, redo.block));
    if spent.1 + need > share && !mutated(Mutant::EpochOutgrowsArea) {
        // It is stamped, so the next number is another one.
        volume.core.raise_epoch();
    }
    let epoch = volume.core.announce(q);
    *spent = (epoch, need + if spent.0 == epoch { spent.1 } else { 0 });
    epoch
}

/// Draws versions, persists, publishes. False when the media refused the record: nothing of it
/// exists.
fn publish<E: Env>(volume: &Volume<E>, q: u16, open: &mut Open, scratch: &mut Scratch) -> bool {
    let (cache, core) = (&volume.cache, &volume.core);
    let Scratch { draft, stripes, replaced, spent } = scratch;
    let segment = &cache.segments[open.id as usize];
    let held = core.stripes.hold(draft.keys.iter().map(Key::range), stripes);
    let epoch = announce(volume, q, &draft.keys, spent);
    core.stamp(epoch);
    let version = core.version.fetch_add(draft.keys.len() as u64, Ordering::Relaxed);
    for (key, version) in draft.keys.iter_mut().zip(version..) {
        key.version = version;
        key.epoch = epoch;
    }
    let stamp = Stamp {
        incarnation: core.incarnation,
        start_counter: cache.start_counter,
        epoch,
        time_ms: cache.recent_ms.load(Ordering::Relaxed),
    };
    // Before the record exists, so that no one takes the segment for clean while it holds it.
    if segment.max_epoch.load(Ordering::SeqCst) < epoch {
        segment.max_epoch.fetch_max(epoch, Ordering::SeqCst);
    }
    if segment.min_epoch.load(Ordering::Relaxed) > epoch {
        segment.min_epoch.fetch_min(epoch, Ordering::SeqCst);
    }
    if let Err(error) = open.persist(&cache.media, segment, draft, &stamp)
        && !mutated(Mutant::RefusedRecordPublished)
    {
        tracing::error!(%error, segment = open.id, "the cache media refused a record");
        core.retract(q);
        return false;
    }
    open.appended(cache.syncer.started());
    segment.max_version.store(version + draft.keys.len() as u64 - 1, Ordering::Relaxed);
    let mut books = Books::default();
    for key in &draft.keys {
        replaced.clear();
        if key.kind == KeyKind::Data {
            segment.add_live(key.sectors);
            core.reuse.stored(key.range(), Class::Written, cache.opened.load(Ordering::Relaxed));
        }
        let place = cache.media.place(open.id, key, true);
        let mut range = key.range();
        if_mutated(Mutant::NewestOnlyHalfIndexed, || range.len = (range.len - 1).max(1));
        core.index.insert(Extent { range, place }, replaced);
        books.note(key.kind, range.len, replaced);
        if !mutated(Mutant::ReplacedNotMarkedDead) {
            cache.mark_dead(replaced);
        }
        core.stripes.break_placeholders(key.range());
    }
    segment.log_low.store(open.log_low, Ordering::Release);
    core.retract(q);
    drop(held);
    let queue = core.queue(q);
    add(&queue.tally.records, 1);
    if books.zeroed > 0 {
        queue.purse.zeroed.fetch_add(books.zeroed, Ordering::Relaxed);
    }
    books.close(&queue.tally);
    true
}

/// What became dirty, and what was dirty and is replaced: for the counters, which must add up.
#[derive(Default)]
pub(super) struct Books {
    dirtied: u64,
    zeroed: u64,
    coalesced: u64,
    discarded: u64,
}

impl Books {
    /// So many sectors have become dirty, in place of these.
    fn note(&mut self, kind: KeyKind, sectors: u64, replaced: &[Extent]) {
        self.dirtied += sectors;
        if !kind.has_payload() {
            self.zeroed += sectors;
        }
        self.note_replaced(kind, replaced);
    }

    /// These were replaced by something that is not dirty itself.
    pub fn note_replaced(&mut self, kind: KeyKind, replaced: &[Extent]) {
        let dirty: u64 = replaced.iter().filter(|e| e.place.dirty).map(|e| e.range.len).sum();
        match kind {
            KeyKind::Data => self.coalesced += dirty,
            _ => self.discarded += dirty,
        }
    }

    pub fn close(self, tally: &Tally) {
        add(&tally.dirtied_sectors, self.dirtied);
        // Most records replace nothing that is dirty.
        if self.coalesced > 0 {
            add(&tally.coalesced_sectors, self.coalesced);
        }
        if self.discarded > 0 {
            add(&tally.discarded_dirty_sectors, self.discarded);
        }
    }
}
