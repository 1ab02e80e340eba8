//! Relocation: what reclaim copies to another segment, because it is worth keeping or still needed.
//!
//! Laws:
//! - A copy keeps kind, version and epoch of its key, hence its dirty state. Its bytes were verified
//!   against the checksum they have; what does not match is never copied.
//! - Only what the index shows is copied, and from that look to the publish the stripes are held and
//!   no write around the cache overlaps: nothing newer can come between the copy's record and the
//!   index, so no copy is ever valid on the media for data that has been superseded already. The
//!   publish is a compare-and-swap all the same: a reader may have dropped a damaged copy, and then
//!   the new one is marked dead like any other. (Dirty zeros are copied whether shown or not: they
//!   have no payload, and count for nothing once they are clean.)
//! - The source is freed by the housekeeper's ordinary steps, the first of which makes everything
//!   stored before it durable, the copies included.
//! - A crash that leaves both copies leaves two keys of one version and content: recovery takes the
//!   one in the higher segment and marks the other dead; write-back decides likewise.
//! - Copies go to one segment at a time, the target. Once that is in use an empty one is held in
//!   reserve as the next, so the dirty data of a mostly dead segment always finds room: where the
//!   disk is down nothing else makes any. Reclaim withholds these two segments and no more, and a
//!   cache has at least six: with all others clean, guests get the second of those it frees (law 12).
//!   Without a target nothing is relocated: clean data is dropped, dirty data waits for write-back.
//! - Dirty data: see `pinned.rs`.
//! - What is copied was less than half of its segment, and of clean data a tenth of what comes in: reclaim
//!   writes less than it frees.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use super::super::core::Cache;
use super::super::counters::add;
use super::super::env::Env;
use super::super::index::{Extent, Place};
use super::super::plan::Moved;
use super::super::queue::{HitError, Reader};
use super::super::record::Draft;
use super::super::segments::{Class, State};
use super::super::stream::{Open, Stamp, Stream};
use super::super::volume::VolumeCore;
use super::pieces::{cut, runs};
use crate::mutant::{Mutant, if_mutated, mutated};
use crate::onmedia::{Key, KeyKind};
use crate::pmem::Pmem;
use crate::sync::atomic::Ordering;

/// What stands in a target's header for the stream that fills it.
const STREAM: u16 = u16::MAX;
/// Times another volume asks for the target before its present one has to give it up: it is
/// sealed as it is, which costs at most a segment for so many freed ones.
const PATIENCE: u32 = 8;
/// Why copying ends early.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stop {
    /// No target, or it is full and there is no other.
    NoRoom,
    /// It would not pay, or something is needed that cannot be moved.
    NotNow,
    /// The media refused a record, or dirty data does not match its checksum.
    Media,
}

/// Where copies go.
struct Target {
    volume: Arc<VolumeCore>,
    stream: Stream,
    /// Times another volume has asked for it since it was last written to.
    refused: u32,
}

/// What a segment was like when its dirty data was left in it.
pub(super) struct Attempt {
    generation: u64,
    tail: u64,
    live: u32,
}

/// What has been moved of one segment's dirty data.
#[derive(Default)]
pub(super) struct Moves {
    /// The new keys, by target.
    pub keys: Vec<(u32, Key)>,
    pub payload: Vec<Moved>,
    /// Sectors of the source whose bytes were moved.
    pub sectors: HashSet<u32>,
    /// Versions of keys without payload.
    pub zeros: HashSet<u64>,
}

pub(super) struct Relocator<E: Env> {
    pub(super) cache: Arc<Cache<E>>,
    target: Option<Target>,
    /// The next target: free on the media, on no list.
    reserve: Option<u32>,
    draft: Draft,
    stripes: Vec<u16>,
    bytes: Vec<u8>,
    /// Dirty segments that could not be emptied, or were filled here.
    pub(super) left_alone: HashMap<u32, Attempt>,
}

impl<E: Env> Relocator<E> {
    pub fn new(cache: Arc<Cache<E>>) -> Self {
        Self {
            cache,
            target: None,
            reserve: None,
            draft: Draft::new(),
            stripes: Vec::new(),
            bytes: Vec::new(),
            left_alone: HashMap::new(),
        }
    }

    /// Writes the target's witness, if its last record has become durable.
    pub fn witness(&mut self, syncs_completed: u64) {
        if let Some(open) = self.target.as_mut().and_then(|t| t.stream.open.as_mut()) {
            open.witness_durable(&self.cache.media, syncs_completed);
        }
    }

    /// Whether the target, if there is one, might not take the dirty data of one segment more.
    fn wants_reserve(&self) -> bool {
        let open = self.target.as_ref().and_then(|t| t.stream.open.as_ref());
        self.reserve.is_none() && open.is_none_or(Open::is_used)
    }

    /// Takes a reserve off the free list, if there is need of one and it is not the last.
    pub fn fill_reserve(&mut self) {
        if self.target.as_ref().is_some_and(|t| self.cache.volume_of(t.volume.incarnation).is_none()) {
            // Its volume was deleted.
            self.close();
        }
        if self.wants_reserve() {
            self.reserve = self.cache.take_free(true);
            if let Some(id) = self.reserve {
                self.cache.segments[id as usize].set_state(State::Target);
            }
        }
    }

    /// Keeps a segment that has just been freed back from the free list, if there is need of one.
    pub fn take_reserve(&mut self, id: u32) -> bool {
        let is_wanted = self.wants_reserve();
        if is_wanted {
            self.cache.segments[id as usize].set_state(State::Target);
            self.reserve = Some(id);
        }
        is_wanted
    }

    /// Whether the target is this volume's.
    pub fn is_aimed_at(&self, volume: &Arc<VolumeCore>) -> bool {
        self.target.as_ref().is_some_and(|t| Arc::ptr_eq(&t.volume, volume))
    }

    /// Whether there is somewhere to put dirty data of this volume.
    pub fn has_room_for(&self, volume: &Arc<VolumeCore>) -> bool {
        self.reserve.is_some() || self.is_aimed_at(volume)
    }

    /// Copies what a clean segment has that guests have read so often, up to so many sectors. What does
    /// not fit is not kept.
    pub fn save_hot(&mut self, id: u32, least: u8, most: u64) {
        let Some((volume, mut keys)) = self.contents(id) else { return };
        let segment = &self.cache.segments[id as usize];
        keys.retain(|k| k.kind.has_payload());
        let mut pieces = VecDeque::new();
        for key in &keys {
            for part in self.live_parts(&volume, id, key) {
                pieces.extend(runs(part, |sector| segment.heat(sector) >= least));
            }
        }
        let mut left = most;
        pieces.retain(|piece| {
            let fits = u64::from(piece.sectors) <= left;
            left -= if fits { u64::from(piece.sectors) } else { 0 };
            fits
        });
        // A failure is noted where it happens; the rest is dropped as if it were cold.
        _ = self.copy(&volume, id, u64::MAX, PATIENCE, &mut pieces, &mut Moves::default());
    }

    /// Whether a dirty segment has been tried in vain, and nothing has changed since.
    pub fn is_left_alone(&self, id: u32, tail: u64) -> bool {
        let now = self.attempt(id, tail);
        self.left_alone.get(&id).is_some_and(|then| {
            (then.generation, then.tail) == (now.generation, now.tail) && now.live > then.live / 2
        })
    }

    /// Leaves a segment alone until the tail moves or half of what lives in it has died: else two that
    /// do not fit together would be copied for ever.
    pub(super) fn leave_alone(&mut self, id: u32, tail: u64) {
        let attempt = self.attempt(id, tail);
        self.left_alone.insert(id, attempt);
    }

    fn attempt(&self, id: u32, tail: u64) -> Attempt {
        let segment = &self.cache.segments[id as usize];
        let generation = segment.generation.load(Ordering::Relaxed);
        Attempt { generation, tail, live: segment.live.load(Ordering::Relaxed) }
    }

    /// A sealed segment's volume and keys, if both can be trusted.
    ///
    /// By its summary: one that recovery has sealed may hold a record more than counts, valid but for
    /// a payload that a crash has torn, and its keys must not come to count by being copied.
    pub(super) fn contents(&self, id: u32) -> Option<(Arc<VolumeCore>, Vec<Key>)> {
        let segment = &self.cache.segments[id as usize];
        let volume = self.cache.volume_of(segment.owner.load(Ordering::Relaxed))?;
        if volume.damaged.load(Ordering::Relaxed) {
            return None;
        }
        let media = &self.cache.media;
        let header = media.load_header(id).newest?;
        if header.generation != segment.generation.load(Ordering::Relaxed) {
            return None;
        }
        if header.summary_len > 0
            && let Ok(scan) = media.scan_summary(id, &header)
        {
            return Some((volume, scan.keys));
        }
        let scan = media.scan_records(id, &header).ok()?;
        scan.losses.is_empty().then_some((volume, scan.keys))
    }

    /// The position of a segment's sector.
    pub(super) fn position(&self, id: u32, sector: u32) -> u64 {
        self.cache.media.in_segment(id, sector * 512) / 512
    }

    /// The parts of a key that the index shows in this segment.
    pub(super) fn live_parts(&self, volume: &VolumeCore, id: u32, key: &Key) -> Vec<Key> {
        let mut found = Vec::new();
        volume.index.lookup(key.range(), &mut found);
        let base = self.position(id, key.payload);
        let is_here = |e: &Extent| !e.place.zero && e.place.position == base + (e.range.start - key.first);
        found.retain(is_here);
        found.iter().map(|e| cut(key, e.range)).collect()
    }

    /// Copies pieces of a segment, a record at a time. Those above `tail` are dirty. Another volume's
    /// target is left to it until asked for more than `patience` times.
    pub(super) fn copy(
        &mut self,
        volume: &Arc<VolumeCore>,
        id: u32,
        tail: u64,
        patience: u32,
        pieces: &mut VecDeque<Key>,
        moves: &mut Moves,
    ) -> Result<(), Stop> {
        while !pieces.is_empty() {
            self.aim(volume, patience)?;
            let sources = self.draft(id, tail, pieces)?;
            if sources.is_empty() && !pieces.is_empty() {
                // Full. A fresh one takes any piece.
                self.close();
                continue;
            }
            self.publish(id, tail, sources, moves)?;
        }
        Ok(())
    }

    /// Makes the target ready for a record of `volume`.
    fn aim(&mut self, volume: &Arc<VolumeCore>, patience: u32) -> Result<(), Stop> {
        if let Some(target) = &mut self.target
            && !Arc::ptr_eq(&target.volume, volume)
        {
            target.refused += 1;
            if target.refused <= patience {
                return Err(Stop::NoRoom);
            }
            self.close();
        }
        if self.target.is_none() {
            self.fill_reserve();
            let id = self.reserve.take().ok_or(Stop::NoRoom)?;
            let open = self.cache.open_taken(id, volume.incarnation, STREAM).ok_or(Stop::NoRoom)?;
            let stream = Stream { open: Some(open) };
            self.cache.segments[id as usize].set_state(State::Target);
            self.target = Some(Target { volume: volume.clone(), stream, refused: 0 });
        }
        let target = self.target.as_mut().expect("opened above");
        target.refused = 0;
        let open = target.stream.open.as_mut().expect("a target is open");
        if !self.cache.media.pmem.class().fence_is_durable() {
            open.witness_durable(&self.cache.media, self.cache.syncer.completed());
        }
        open.align(self.cache.syncer.started());
        Ok(())
    }

    /// Ends the target; the housekeeper seals it. What it holds is not moved again soon.
    fn close(&mut self) {
        if let Some(mut target) = self.target.take() {
            if let Some(open) = &target.stream.open {
                let tail = target.volume.tail.load(Ordering::SeqCst);
                self.leave_alone(open.id, tail);
            }
            self.cache.close_segment(&mut target.stream);
        }
    }

    /// Stores as many pieces as one record takes; returns the source sector of each key drafted.
    fn draft(&mut self, id: u32, tail: u64, pieces: &mut VecDeque<Key>) -> Result<Vec<u32>, Stop> {
        let Self { cache, target, draft, bytes, .. } = self;
        let target = target.as_mut().expect("aimed");
        let open = target.stream.open.as_ref().expect("a target is open");
        let segment = &cache.segments[open.id as usize];
        draft.begin(open);
        let limit = open.payload_end + cache.record_payload_max();
        let mut sources = Vec::new();
        while let Some(piece) = pieces.front().copied() {
            let sectors = if piece.kind.has_payload() { u64::from(piece.sectors) } else { 0 };
            if !draft.has_room(open, sectors) || draft.payload_end + sectors as u32 * 512 > limit {
                break;
            }
            pieces.pop_front();
            let from = draft.keys.len();
            if sectors == 0 {
                draft.add_zero(piece.range(), piece.kind);
            } else {
                let position = cache.media.in_segment(id, piece.payload * 512) / 512;
                let place = Place { position, zero: false, dirty: false };
                let extent = Extent { range: piece.range(), place };
                bytes.resize(sectors as usize * 512, 0);
                let verify = !mutated(Mutant::RelocatedUnverified);
                let copied = cache.copy_extent(&extent, Reader::Worker, verify, |at, part| {
                    bytes[at..at + part.len()].copy_from_slice(part);
                    Ok(())
                });
                if let Err(error) = copied {
                    note_damage(&target.volume, &piece, &error);
                    if piece.epoch > tail && piece.kind != KeyKind::Fill {
                        return Err(Stop::Media);
                    }
                    continue;
                }
                let source = |at: usize, part: &mut [u8]| {
                    part.copy_from_slice(&bytes[at..at + part.len()]);
                    Ok(())
                };
                if draft.store(&cache.media, open, segment, piece.range(), piece.kind, source).is_err() {
                    self.close();
                    return Err(Stop::Media);
                }
            }
            for key in &mut draft.keys[from..] {
                (key.version, key.epoch) = (piece.version, piece.epoch);
                let core = &target.volume;
                let fresh = || key.version = core.version.fetch_add(1, Ordering::SeqCst);
                if_mutated(Mutant::RelocatedWithNewVersion, fresh);
                let now = || key.epoch = core.epoch();
                if_mutated(Mutant::RelocatedInNewEpoch, now);
                sources.push(piece.payload + (key.first - piece.first) as u32);
            }
        }
        Ok(sources)
    }

    /// Persists the draft and makes the index show it, as far as it shows the sources still.
    fn publish(&mut self, id: u32, tail: u64, sources: Vec<u32>, moves: &mut Moves) -> Result<(), Stop> {
        let Self { cache, target, draft, stripes, .. } = self;
        let target = target.as_mut().expect("aimed");
        let volume = &target.volume;
        let open = target.stream.open.as_mut().expect("a target is open");
        let segment = &cache.segments[open.id as usize];
        let held = volume.stripes.hold(draft.keys.iter().map(Key::range), stripes);
        let shown = |key: &Key, source: u32| {
            let position = cache.media.in_segment(id, source * 512) / 512;
            Extent { range: key.range(), place: Place { position, zero: false, dirty: false } }
        };
        let sources = keep(draft, sources, |key, source| {
            !key.kind.has_payload()
                || is_shown(volume, &shown(key, source)) && !volume.stripes.is_bypassed(key.range())
        });
        if draft.keys.is_empty() {
            return Ok(());
        }
        let is_dirty = |key: &Key| key.kind != KeyKind::Fill && key.epoch > tail;
        // Before the record exists, so that no one takes the segment for clean while it holds it.
        let highest = draft.keys.iter().filter(|k| is_dirty(k)).map(|k| k.epoch).max().unwrap_or(0);
        if !mutated(Mutant::RelocatedCountsClean) {
            segment.max_epoch.fetch_max(highest, Ordering::SeqCst);
        }
        segment.min_epoch.store(0, Ordering::SeqCst);
        // The keys have epochs of their own. The record's never falls within a segment and is not
        // below any of its keys': what a damaged record may have held is judged by it.
        let stamp = Stamp {
            incarnation: volume.incarnation,
            start_counter: cache.start_counter,
            epoch: volume.epoch(),
            time_ms: cache.recent_ms.load(Ordering::Relaxed),
        };
        if let Err(error) = open.persist(&cache.media, segment, draft, &stamp) {
            tracing::error!(%error, segment = open.id, "the cache media refused a relocated record");
            drop(held);
            self.close();
            return Err(Stop::Media);
        }
        open.appended(cache.syncer.started());
        let highest = draft.keys.iter().map(|k| k.version).max().unwrap_or(0);
        segment.max_version.fetch_max(highest, Ordering::Relaxed);
        let mut mapped = Vec::new();
        for (key, &source) in draft.keys.iter().zip(&sources) {
            let dirty = is_dirty(key);
            if dirty {
                moves.keys.push((open.id, *key));
            }
            if !key.kind.has_payload() {
                moves.zeros.insert(key.version);
                continue;
            }
            mapped.clear();
            segment.add_live(key.sectors);
            if !dirty {
                let origin = &cache.segments[id as usize];
                for at in (0..key.sectors).step_by(8) {
                    segment.warm(key.payload + at, origin.heat(source + at).saturating_sub(1));
                }
                volume.reuse.stored(key.range(), Class::Proven, cache.opened.load(Ordering::Relaxed));
            }
            let (from, to) = (shown(key, source), cache.media.place(open.id, key, false).position);
            volume.index.move_if(from, to, &mut mapped);
            cache.mark_unmapped_dead(open.id, key, &mapped);
            let mut sectors = 0;
            for extent in &mut mapped {
                sectors += extent.range.len;
                extent.place = from.place_at(extent.range.start);
            }
            cache.mark_dead(&mapped);
            add(&volume.tally.relocated_sectors, sectors);
            if dirty {
                add(&volume.tally.relocated_dirty_sectors, sectors);
                moves.sectors.extend(source..source + key.sectors);
                moves.payload.push(Moved { from: from.place.position, to, sectors: key.range().len });
            }
        }
        segment.log_low.store(open.log_low, Ordering::Release);
        drop(held);
        Ok(())
    }
}

impl<E: Env> Drop for Relocator<E> {
    /// The segments outlive the housekeeper.
    fn drop(&mut self) {
        self.close();
        if let Some(id) = self.reserve.take() {
            self.cache.add_free(id);
        }
    }
}

/// Whether the index shows all of `extent`, where it says.
fn is_shown(volume: &VolumeCore, extent: &Extent) -> bool {
    let mut found = Vec::new();
    volume.index.lookup(extent.range, &mut found);
    found.retain(|e| e.place.is_same_payload(&extent.place_at(e.range.start)));
    found.iter().map(|e| e.range.len).sum::<u64>() == extent.range.len
}

/// Takes keys that fail the test out of the draft, with their checksums and sources.
fn keep(draft: &mut Draft, sources: Vec<u32>, test: impl Fn(&Key, u32) -> bool) -> Vec<u32> {
    let verdicts: Vec<bool> =
        draft.keys.iter().zip(&sources).map(|(key, &source)| test(key, source)).collect();
    let mut at = 0;
    let mut checksums = Vec::with_capacity(draft.checksums.len());
    for (key, &good) in draft.keys.iter().zip(&verdicts) {
        let count = key.checksum_count();
        if good {
            checksums.extend_from_slice(&draft.checksums[at..at + count]);
        }
        at += count;
    }
    draft.checksums = checksums;
    let mut verdict = verdicts.iter();
    draft.keys.retain(|_| *verdict.next().expect("one each"));
    sources.into_iter().zip(&verdicts).filter(|(_, good)| **good).map(|(source, _)| source).collect()
}

fn note_damage(volume: &VolumeCore, piece: &Key, error: &HitError) {
    add(&volume.tally.checksum_errors, 1);
    let (incarnation, range) = (volume.incarnation, piece.range());
    tracing::warn!(incarnation, %range, %error, "cached data is damaged and is not relocated");
}
