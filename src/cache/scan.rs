//! Reads a segment's keys back from the media: from its records, or from its summary.
//!
//! Three answers are kept apart (law 2): the *end* of the log (nothing more was written), a *torn*
//! end (the last record did not become whole before a crash, which is legal), and *corruption* (a
//! record that must be there is not). What must be there: on media whose fence is durable, every
//! record below a valid one; everywhere, every record up to the witness.
//!
//! All bytes read are hostile: a record counts only by its keyed check, its own position, its
//! segment's generation and the start that opened it; its fields have been bounded by the decoder.

use std::ops::Range;

use super::media::Media;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{
    Corruption, Dual, Key, RECORD_LEN_MAX, Record, RecordExpect, SegmentHeader, SegmentState, SummaryExpect,
    Witness, decode_record_into, decode_summary, newest, record_len,
};
use crate::pmem::{MediaError, Pmem};

/// Bytes that are read at a time: three times the longest record.
const WINDOW: u32 = 32 << 10;
/// And at first: who looks for the records of one FLUSH wants one or two.
const FIRST_WINDOW: u32 = 4 << 10;

/// What a segment holds.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    pub keys: Vec<Key>,
    pub checksums: Vec<u32>,
    /// What is missing, and the epoch of the record that follows it, `u64::MAX` at the end: epochs
    /// do not fall within a segment, so nothing lost is of a higher one.
    pub losses: Vec<(u64, String)>,
    /// Records dropped as torn.
    pub torn: u32,
    pub last_sequence: u64,
    pub log_low: u32,
    pub payload_end: u32,
    /// Bytes of the segment that count and that no witness vouches for: on media whose fence is durable,
    /// what the one record that may not have been fenced consists of.
    pub unwitnessed: Vec<Range<u32>>,
}

impl Scan {
    /// Takes over the record that comes next.
    fn take(&mut self, record: &Record) {
        self.keys.extend_from_slice(&record.keys);
        self.checksums.extend_from_slice(&record.checksums);
        self.payload_end = self.payload_end.max(record.header.payload_end);
        self.log_low = record.header.offset;
        self.last_sequence = record.header.sequence;
    }

    /// Notes what a record that counts consists of.
    fn doubt(&mut self, record: &Record) {
        let (at, len) = (record.header.offset, record_len(record.keys.len(), record.checksums.len()));
        self.unwitnessed.push(at..at + len as u32);
        let pieces = record.keys.iter().flat_map(Key::pieces);
        self.unwitnessed.extend(pieces.map(|p| p.start * 512..(p.start + p.sectors) * 512));
    }
}

impl<P: Pmem> Media<P> {
    /// The header's newest copy, whether a copy was damaged.
    pub fn load_header(&self, id: u32) -> Dual<SegmentHeader> {
        let read = |copy: usize| {
            let mut bytes = [0; SegmentHeader::SIZE];
            let at = self.in_segment(id, self.geometry.header_offset(copy));
            match self.pmem.read(at, &mut bytes) {
                Ok(()) => SegmentHeader::decode(&bytes, &self.uuid, self.geometry.fixed(), id),
                Err(_) => Err(Corruption::unreadable("SegmentHeader")),
            }
        };
        newest(read(0), read(1))
    }

    /// The highest sequence number known to have been whole; 0 for none.
    fn load_witness(&self, id: u32, generation: u64) -> u64 {
        (0..2)
            .filter_map(|copy| {
                let mut bytes = [0; 64];
                self.pmem.read(self.in_segment(id, self.geometry.witness_offset(copy)), &mut bytes).ok()?;
                let witness = Witness::decode(&bytes, &self.secret, id).ok()?;
                let counts = witness.generation == generation && !mutated(Mutant::WitnessIgnored);
                counts.then_some(witness.sequence)
            })
            .max()
            .unwrap_or(0)
    }

    /// Everything a sealed segment holds, by its summary.
    pub fn scan_summary(&self, id: u32, header: &SegmentHeader) -> Result<Scan, String> {
        let geometry = self.geometry.fixed();
        let (offset, len) = (header.summary_offset, header.summary_len as usize);
        if offset < geometry.data_start() || u64::from(offset) + len as u64 > u64::from(geometry.data_end()) {
            return Err(format!("the summary lies outside the segment ({offset}+{len})"));
        }
        let mut bytes = vec![0; len];
        self.pmem.read(self.in_segment(id, offset), &mut bytes).map_err(|e| e.to_string())?;
        let expect =
            SummaryExpect { segment: id, generation: header.generation, incarnation: header.incarnation };
        let summary = decode_summary(&self.secret, geometry, &bytes, &expect).map_err(|e| e.to_string())?;
        Ok(Scan {
            keys: summary.keys,
            checksums: summary.checksums,
            last_sequence: header.last_sequence,
            log_low: header.log_low,
            payload_end: header.payload_end,
            ..Scan::default()
        })
    }

    /// Everything a segment holds, by walking its records.
    ///
    /// # Errors
    /// Only when the media cannot be read at all; damaged parts are losses.
    pub fn scan_records(&self, id: u32, header: &SegmentHeader) -> Result<Scan, MediaError> {
        Ok(self.scan_on(id, header, self.nothing_yet()))
    }

    /// What a segment holds below what was scanned of it earlier, and that.
    pub fn scan_on(&self, id: u32, header: &SegmentHeader, mut scan: Scan) -> Scan {
        let mut walk = Walk::new(self, id, header, scan.log_low);
        let witness = self.load_witness(id, header.generation);
        let strict = self.pmem.class().fence_is_durable();
        let mut expected = scan.last_sequence + 1;
        while let Some(record) = walk.next_record(scan.payload_end) {
            let sequence = record.header.sequence;
            let sealed_out = header.state == SegmentState::Sealed && sequence > header.last_sequence;
            if sequence < expected || sealed_out {
                continue;
            }
            if sequence > witness {
                if !self.payload_holds(id, record) {
                    // The end of what was fenced, or one of what no `sync` had reached.
                    scan.torn += 1;
                    continue;
                }
                if strict {
                    scan.doubt(record);
                }
            }
            let is_gap = sequence > expected && !mutated(Mutant::SequenceGapIgnored);
            if is_gap && (strict || expected <= witness) {
                let what = format!("records {expected} to {} are missing", sequence - 1);
                scan.losses.push((record.header.epoch, what));
            }
            expected = sequence + 1;
            scan.take(record);
        }
        if witness >= expected {
            scan.losses.push((u64::MAX, format!("records {expected} to {witness} are missing")));
        }
        scan
    }

    /// The records of a segment that nobody will change any more although others may follow: those up to
    /// the witness, which was stored after they were fenced. `None` if not all of them are there.
    pub fn scan_witnessed(&self, id: u32, header: &SegmentHeader) -> Option<Scan> {
        let witness = self.load_witness(id, header.generation);
        let mut scan = self.nothing_yet();
        let mut walk = Walk::new(self, id, header, scan.log_low);
        for sequence in 1..=witness {
            let record = walk.next_record(scan.payload_end)?;
            if record.header.sequence != sequence {
                return None;
            }
            scan.take(record);
        }
        // On to the payload, for the pages' sake.
        while walk.next_record(scan.payload_end).is_some() {}
        Some(scan)
    }

    /// A segment before its first record.
    fn nothing_yet(&self) -> Scan {
        let geometry = &self.geometry;
        Scan { log_low: geometry.data_end(), payload_end: geometry.data_start(), ..Scan::default() }
    }

    /// Whether every checksum of a record's payload holds.
    fn payload_holds(&self, id: u32, record: &Record) -> bool {
        if mutated(Mutant::PayloadNotVerified) {
            return true;
        }
        let mut checksums = record.checksums.iter();
        let mut block = [0; 4096];
        record.keys.iter().all(|key| {
            key.pieces().all(|piece| {
                let bytes = &mut block[..piece.sectors as usize * 512];
                let at = self.in_segment(id, piece.start * 512);
                self.pmem.read(at, bytes).is_ok() && checksums.next() == Some(&crc32fast::hash(bytes))
            })
        })
    }

    /// Reads the record at `offset`, if one that counts is there. A segment is written in one start
    /// only: on page-cache media its header may be lost while records in it are not, and the next
    /// start opens it again, in the same generation, over records that must not count any more.
    fn read_record(
        &self,
        id: u32,
        header: &SegmentHeader,
        offset: u32,
        bytes: &[u8],
        record: &mut Record,
    ) -> bool {
        let SegmentHeader { generation, incarnation, .. } = *header;
        let expect = RecordExpect { segment: id, generation, incarnation, offset };
        decode_record_into(&self.secret, self.geometry.fixed(), bytes, &expect, record).is_ok()
            && (record.header.start_counter == header.start_counter || mutated(Mutant::StartNotChecked))
    }

    /// Reads on from `cursor` (where an earlier record begins) down to `log_low`, as long as
    /// records are of epochs ≤ `upto`. Calls `f` for each record; returns the new cursor and, if a
    /// record of a later epoch comes next, its epoch.
    ///
    /// # Errors
    /// [`WalkError`]: a record is not there or does not follow the one before. Nobody is to take the
    /// others for all there are: what it held would never be written back, or never be evicted.
    pub fn walk_from(
        &self,
        id: u32,
        header: &SegmentHeader,
        cursor: u32,
        log_low: u32,
        upto: u64,
        mut f: impl FnMut(&Record),
    ) -> Result<(u32, Option<u64>), WalkError> {
        let mut cursor = cursor;
        let mut record = Record::default();
        let mut expected = self.sequence_from(id, header, cursor, &mut record)?;
        // What was read last lies between `low` and a cursor, and is looked at until nothing is left of it:
        // a record of one key is a hundredth of it.
        let (mut bytes, mut low, mut span) = (Vec::new(), cursor, FIRST_WINDOW);
        while cursor > log_low {
            let mut at = cursor - 256;
            loop {
                if at < low {
                    if low == log_low || cursor - low >= WINDOW {
                        return Err(WalkError::Missing { segment: id, below: cursor });
                    }
                    low = log_low.max(cursor.saturating_sub(span));
                    span = WINDOW;
                    bytes.resize((cursor - low) as usize, 0);
                    self.pmem.read(self.in_segment(id, low), &mut bytes).map_err(WalkError::Media)?;
                    continue;
                }
                let slice = &bytes[(at - low) as usize..(cursor - low) as usize];
                if self.read_record(id, header, at, slice, &mut record) {
                    break;
                }
                at -= 256;
            }
            let end = at + record_len(record.keys.len(), record.checksums.len()) as u32;
            let follows = match expected {
                Some(sequence) => record.header.sequence == sequence,
                None => end == cursor || end == cursor & !4095,
            };
            if !follows {
                return Err(WalkError::Missing { segment: id, below: cursor });
            }
            expected = Some(record.header.sequence + 1);
            if record.header.epoch > upto {
                return Ok((cursor, Some(record.header.epoch)));
            }
            f(&record);
            cursor = at;
        }
        Ok((cursor, None))
    }
}

impl<P: Pmem> Media<P> {
    /// The sequence number of the record that comes below `cursor`. `None` when that which begins there,
    /// and was read once, is damaged by now.
    fn sequence_from(
        &self,
        id: u32,
        header: &SegmentHeader,
        cursor: u32,
        record: &mut Record,
    ) -> Result<Option<u64>, WalkError> {
        let top = self.geometry.data_end();
        if cursor == top {
            return Ok(Some(1));
        }
        let mut bytes = Vec::new();
        for window in [FIRST_WINDOW, WINDOW] {
            bytes.resize((top - cursor).min(window) as usize, 0);
            self.pmem.read(self.in_segment(id, cursor), &mut bytes).map_err(WalkError::Media)?;
            if self.read_record(id, header, cursor, &bytes, record) {
                return Ok(Some(record.header.sequence + 1));
            }
        }
        Ok(None)
    }
}

/// Why write-back cannot read a segment's records.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WalkError {
    #[error(transparent)]
    Media(MediaError),
    #[error("segment {segment} has no valid record below byte {below}, where one was written")]
    Missing { segment: u32, below: u32 },
}

/// Bytes that a scan of a whole segment reads at a time: several times the longest record, as so much of
/// what was read before is kept.
const SCAN_WINDOW: u32 = 256 << 10;

/// Steps down through a segment, from record to record, over whatever lies between.
struct Walk<'a, P> {
    media: &'a Media<P>,
    id: u32,
    header: &'a SegmentHeader,
    /// What lies at and above `low`, as far up as a record from there may reach.
    bytes: Vec<u8>,
    low: u32,
    /// Everything at and above this offset has been looked at.
    at: u32,
    record: Record,
}

impl<'a, P: Pmem> Walk<'a, P> {
    /// Begins below `at`, where a record begins or the data ends.
    fn new(media: &'a Media<P>, id: u32, header: &'a SegmentHeader, at: u32) -> Self {
        Self { media, id, header, bytes: Vec::new(), low: at, at, record: Record::default() }
    }

    /// The next valid record below, down to `floor`.
    fn next_record(&mut self, floor: u32) -> Option<&Record> {
        let start = self.media.geometry.data_start();
        while self.at >= floor.max(start) + 256 {
            self.at -= 256;
            if self.at < self.low {
                self.read_on();
            }
            let slice = &self.bytes[(self.at - self.low) as usize..];
            if self.media.read_record(self.id, self.header, self.at, slice, &mut self.record) {
                return Some(&self.record);
            }
        }
        None
    }

    /// Moves the window down. A record that begins in it may end above: so much is kept.
    fn read_on(&mut self) {
        let start = self.media.geometry.data_start();
        // By page from the data's beginning: a poisoned one costs what it holds, not the segment.
        let low = start + (self.low - start).saturating_sub(SCAN_WINDOW) / 4096 * 4096;
        let (fresh, kept) = ((self.low - low) as usize, self.bytes.len().min(RECORD_LEN_MAX));
        // What is there already is overwritten.
        self.bytes.resize(self.bytes.len().max(fresh + kept), 0);
        self.bytes.copy_within(..kept, fresh);
        self.bytes.truncate(fresh + kept);
        for (i, page) in self.bytes[..fresh].chunks_mut(4096).enumerate() {
            let at = self.media.in_segment(self.id, low + i as u32 * 4096);
            if self.media.pmem.read(at, page).is_err() {
                page.fill(0);
            }
        }
        self.low = low;
    }
}
