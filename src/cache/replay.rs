//! A group on its way from its redo area to the disk: each payload is read, compared with its checksum, and
//! written; what is damaged in the area never reaches the disk.

use crate::backing::{AlignedBuf, Channel, Completion, Op};
use crate::onmedia::{RedoEntry, RedoKind, payload_checksum};
use crate::units::SectorRange;

/// Operations in flight while a group is applied from its area.
pub(crate) const DEPTH: u32 = 32;

/// Why a group could not be applied.
#[derive(Debug)]
pub(crate) enum ReplayError {
    Redo(std::io::Error),
    Disk(std::io::Error),
    Damaged(SectorRange),
}

/// Applies a group from its area: reads, compares, writes.
pub(crate) struct Replay {
    entries: Vec<RedoEntry>,
    next: usize,
    block: u64,
    done: Vec<Completion>,
}

impl Replay {
    pub fn new(entries: Vec<RedoEntry>, block: u64) -> Replay {
        Replay { entries, next: 0, block, done: Vec::new() }
    }

    /// Goes on as far as it can without waiting. True when everything is written; flushing is the
    /// caller's. After an error nothing more is begun; what is in flight is the caller's to await.
    pub fn step<C: Channel>(&mut self, redo: &mut C, disk: &mut C) -> Result<bool, ReplayError> {
        let mut done = std::mem::take(&mut self.done);
        disk.reap(&mut done);
        for completion in done.drain(..) {
            completion.result.map_err(ReplayError::Disk)?;
        }
        redo.reap(&mut done);
        for completion in done.drain(..) {
            completion.result.map_err(ReplayError::Redo)?;
            let Op::Read { mut buf, .. } = completion.op else { continue };
            let entry = &self.entries[completion.token as usize];
            buf.set_len((entry.range.len * 512) as usize);
            if payload_checksum(&buf) != entry.crc {
                return Err(ReplayError::Damaged(entry.range));
            }
            let op = Op::Write { offset: entry.range.start * 512, buf };
            assert!(disk.submit(completion.token, op).is_ok(), "fewer than the depth are in flight");
        }
        while let Some(entry) = self.entries.get(self.next)
            && redo.in_flight() + disk.in_flight() < DEPTH as usize
        {
            let (token, offset, len) = (self.next as u64, entry.range.start * 512, entry.range.len * 512);
            let submitted = match entry.kind {
                RedoKind::Data => {
                    let buf = AlignedBuf::new(len.next_multiple_of(self.block) as usize);
                    redo.submit(token, Op::Read { offset: entry.at, buf })
                }
                kind => disk.submit(token, Op::Zero { offset, len, unmap: kind == RedoKind::Unmap }),
            };
            assert!(submitted.is_ok(), "fewer than the depth are in flight");
            self.next += 1;
        }
        redo.kick();
        disk.kick();
        self.done = done;
        Ok(self.next == self.entries.len() && redo.in_flight() + disk.in_flight() == 0)
    }
}
