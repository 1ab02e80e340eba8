//! A stream: one writer's open segment, and how records are appended to it.
//!
//! Laws:
//! - One unfenced record per segment: [`Open::persist`] fences before it returns, so recovery need
//!   only doubt the payload of the last one.
//! - A new segment's header is durable before its first record (DAX: fenced here; page-cache: the
//!   `sync` that makes a record durable makes the header durable too, and the segment's former
//!   life was durably over before it came to the free list).
//! - On page-cache media a page written before a `sync` began is never written after it: a torn
//!   rewrite could take durable bytes with it.

use std::sync::atomic::Ordering;

use super::core::Cache;
use super::env::Env;
use super::media::Media;
use super::record::Draft;
use super::segments::{Class, Segment, State};
use super::volume::VolumeCore;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{
    RecordHeader, SegmentHeader, SegmentState, Witness, encode_record, record_len, summary_len,
};
use crate::pmem::{MediaError, Pmem};

/// Where the next small piece goes: `left` sectors from `next` on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packed {
    /// Offset in the segment, in sectors.
    pub next: u32,
    pub left: u32,
}

/// What aligning a record and the summary may cost.
fn slack(by_page: bool) -> usize {
    if by_page { 2 * 4096 } else { 256 }
}

/// A writer's place. Locked for the whole of one record.
#[derive(Default)]
pub(crate) struct Stream {
    pub open: Option<Open>,
}

/// An open segment.
pub(crate) struct Open {
    pub id: u32,
    pub generation: u64,
    /// Offset of the last record: the next one ends here.
    pub log_low: u32,
    pub payload_end: u32,
    pub packed: Option<Packed>,
    /// Sequence number of the next record, from 1.
    sequence: u64,
    keys: usize,
    checksums: usize,
    /// `Syncer::started` when the present pages were begun.
    sync_mark: u64,
    /// `Syncer::started` after the last record was stored: a later `sync` makes it durable.
    appended_at: u64,
    /// Sequence number of the last record a witness was written for.
    witnessed: u64,
    by_page: bool,
    /// Bytes of it that have been charged to a queue.
    charged: u32,
    room: u32,
}

/// What stands in a record's header beside what the segment knows.
pub(crate) struct Stamp {
    pub incarnation: u64,
    pub start_counter: u64,
    pub epoch: u64,
    pub time_ms: u64,
}

impl Open {
    /// Whether a record of so many keys and checksums, with payload up to `payload_end`, leaves
    /// room for the summary of the whole segment.
    pub fn fits(&self, payload_end: u32, keys: usize, checksums: usize) -> bool {
        let record = record_len(keys, checksums);
        let summary = summary_len(self.keys + keys, self.checksums + checksums) + slack(self.by_page);
        u64::from(payload_end) + (record + summary) as u64 <= u64::from(self.log_low)
    }

    /// Bytes taken since the last call.
    pub fn charge(&mut self) -> u32 {
        let room = self.log_low - self.payload_end;
        let taken = self.room - room;
        self.room = room;
        self.charged += taken;
        taken
    }

    /// Bytes that [`Open::charge`] has told of.
    pub fn charged(&self) -> u32 {
        self.charged
    }

    /// Whether anything was appended.
    pub fn is_used(&self) -> bool {
        self.sequence > 1
    }

    /// Begins new pages if a `sync` has begun since the last record.
    pub fn align(&mut self, syncs_started: u64) {
        if self.by_page && self.sync_mark != syncs_started {
            self.sync_mark = syncs_started;
            self.log_low &= !4095;
            self.packed = None;
        }
    }

    /// Writes the drafted record and fences: stable everywhere, durable on DAX.
    ///
    /// # Errors
    /// The media failed: the record does not exist, and the segment must be given up.
    pub fn persist<P: Pmem>(
        &mut self,
        media: &Media<P>,
        segment: &Segment,
        draft: &mut Draft,
        stamp: &Stamp,
    ) -> Result<(), MediaError> {
        let len = record_len(draft.keys.len(), draft.checksums.len()) as u32;
        assert!(self.fits(draft.payload_end, draft.keys.len(), draft.checksums.len()), "room was checked");
        let offset = self.log_low - len;
        let header = RecordHeader {
            incarnation: stamp.incarnation,
            generation: self.generation,
            sequence: self.sequence,
            start_counter: stamp.start_counter,
            segment: self.id,
            offset,
            payload_end: draft.payload_end,
            time_ms: stamp.time_ms,
            epoch: stamp.epoch,
            ..RecordHeader::default()
        };
        if !self.by_page && self.witnessed < self.sequence - 1 {
            // Of the record before: it is fenced, and this goes out with the fence of this one.
            self.write_witness(media);
        }
        if !mutated(Mutant::PayloadAfterFence) {
            draft.store_last(media, self.id)?;
        }
        draft.bytes.clear();
        encode_record(&media.secret, &header, &draft.keys, &draft.checksums, &mut draft.bytes);
        assert_eq!(draft.bytes.len(), len as usize);
        media.pmem.write(media.in_segment(self.id, offset), &draft.bytes)?;
        if !mutated(Mutant::RecordNotFenced) {
            media.pmem.fence();
        }
        if mutated(Mutant::PayloadAfterFence) {
            draft.store_last(media, self.id)?;
        }
        self.log_low = offset;
        self.payload_end = draft.payload_end;
        self.packed = draft.packed;
        self.keys += draft.keys.len();
        self.checksums += draft.checksums.len();
        segment.last_sequence.store(self.sequence, Ordering::Relaxed);
        segment.payload_end.store(self.payload_end, Ordering::Relaxed);
        segment.key_count.store(self.keys as u32, Ordering::Relaxed);
        self.sequence += 1;
        Ok(())
    }

    /// Notes how many `sync`s had begun after the record was stored.
    pub fn appended(&mut self, syncs_started: u64) {
        self.appended_at = syncs_started;
    }

    /// Writes the witness of the last record if that is durable: always on DAX, after a later `sync`
    /// on page-cache media. It becomes durable with the next fence or `sync`.
    pub fn witness_durable<P: Pmem>(&mut self, media: &Media<P>, syncs_completed: u64) {
        let durable = !self.by_page || syncs_completed > self.appended_at;
        if durable && self.witnessed < self.sequence - 1 {
            self.write_witness(media);
        }
    }

    /// Remembers, beside the record, that it was whole.
    pub fn write_witness<P: Pmem>(&mut self, media: &Media<P>) {
        let sequence = self.sequence - 1 + u64::from(mutated(Mutant::WitnessAhead));
        self.witnessed = sequence;
        let witness =
            Witness { generation: self.generation, sequence, log_low: self.log_low, segment: self.id };
        let at = media.in_segment(self.id, media.geometry.witness_offset((sequence % 2) as usize));
        // A witness that cannot be written weakens a diagnosis, not the data.
        if let Err(error) = media.pmem.write(at, &witness.encode(&media.secret)) {
            tracing::warn!(%error, segment = self.id, "cannot write a witness");
        }
    }
}

impl<E: Env> Cache<E> {
    /// Takes a free segment for `owner`. `None` when there is none for it: ask the housekeeper, wait.
    pub(crate) fn open_segment(&self, owner: &VolumeCore, stream: u16, for_fill: bool) -> Option<Open> {
        loop {
            let id = self.take_free(for_fill, Some(owner))?;
            if let Some(open) = self.open_taken(id, owner.incarnation, stream) {
                return Some(open);
            }
            owner.share.give();
        }
    }

    /// Opens a free segment that is on no list. `None` when the media refuses it: it is given up.
    pub(crate) fn open_taken(&self, id: u32, owner: u64, stream: u16) -> Option<Open> {
        let segment = &self.segments[id as usize];
        let generation = segment.generation.load(Ordering::Relaxed);
        segment.begin(self.media.geometry.fixed(), owner, generation, self.start_counter);
        if let Err(error) = self.begin_on_media(id, owner, stream, generation) {
            tracing::error!(%error, segment = id, "a segment cannot be opened and is given up");
            segment.set_state(State::Bad);
            return None;
        }
        segment.set_class(Class::of_stream(stream));
        segment.born.store(self.opened.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        segment.set_state(State::Open);
        Some(Open {
            id,
            generation,
            log_low: self.media.geometry.data_end(),
            payload_end: self.media.geometry.data_start(),
            packed: None,
            sequence: 1,
            keys: 0,
            checksums: 0,
            sync_mark: self.syncer.started(),
            appended_at: 0,
            witnessed: 0,
            by_page: !self.media.pmem.class().fence_is_durable(),
            charged: 0,
            room: self.media.geometry.data_end() - self.media.geometry.data_start(),
        })
    }

    fn begin_on_media(&self, id: u32, owner: u64, stream: u16, generation: u64) -> Result<(), MediaError> {
        let geometry = &self.media.geometry;
        let words = geometry.liveness_words() as usize * 8;
        let zeros = vec![0; words];
        self.media.pmem.write(self.media.in_segment(id, geometry.liveness_offset()), &zeros)?;
        for copy in 0..2 {
            // The witness and the floor behind it.
            self.media.pmem.write(self.media.in_segment(id, geometry.witness_offset(copy)), &[0; 128])?;
        }
        self.write_header(id, |h| {
            h.state = SegmentState::Open;
            h.stream = stream;
            h.incarnation = owner;
            h.generation = generation;
            h.start_counter = self.start_counter;
        })
    }

    /// Writes a segment's header: the older copy, a fence, then the other, so that a lost page
    /// never takes more than a moment's state with it.
    pub(crate) fn write_header(
        &self,
        id: u32,
        fill: impl FnOnce(&mut SegmentHeader),
    ) -> Result<(), MediaError> {
        let segment = &self.segments[id as usize];
        let sequence = segment.header_sequence.load(Ordering::Relaxed) + 1;
        let mut header =
            SegmentHeader { sequence, cache_uuid: self.media.uuid, segment: id, ..SegmentHeader::default() };
        fill(&mut header);
        let bytes = header.encode();
        for copy in [sequence % 2, (sequence + 1) % 2] {
            let at = self.media.in_segment(id, self.media.geometry.header_offset(copy as usize));
            self.media.pmem.write(at, &bytes)?;
            if !mutated(Mutant::HeaderCopiesTogether) {
                self.media.pmem.fence();
            }
        }
        segment.header_sequence.store(sequence, Ordering::Relaxed);
        Ok(())
    }
}
