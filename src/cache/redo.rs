//! The redo area of a volume in `grouped` order: where a group lies before it is on the disk.
//!
//! Why: epoch by epoch a slow disk seeks for every version of every block; sorted across epochs it is
//! fast, and after a lost cache it is rubbish. A group is several epochs, newest version only, written
//! here first, in one go, and then to the disk in address order.
//!
//! Laws (bytes and their order: `../onmedia/FORMAT.md`, "Redo area"):
//! - The area says *committed* only after everything it needs to be applied is durable in it.
//! - From the first write of a group to the disk until the disk's flush after the last one, it says so
//!   durably: whoever finds it applies it, and then the disk is at the group's end.
//! - While it says so nothing else is written to the disk. To the area goes nothing but *idle*, or the
//!   body of the next group, where the present one has nothing; the header that commits that one waits
//!   until the present one is on the disk, flushed, and takes the place of *idle*.
//! - What a header says is made durable before it is believed: one that a dead daemon wrote and did not
//!   flush would else give way to the one before, when the body under that is gone.
//! - A copy of the header that a crash has torn is replaced, durably, before anything else is written to the
//!   area. A later update of that copy might be torn as well, and bring just those sectors that the first
//!   one lacks: two headers of one group name the same members. Then the first one would count, and the
//!   body under it is gone.
//! - *idle*, or the next group's *committed*, is durable before the tail moves, so a group that is found
//!   committed was never followed by another write.
//! - Whoever attaches the volume, in whatever order, applies it first. Without the cache
//!   `recover-backing` does, if disk and area belong together: the header's samples tell.
//! - What cannot be read back of a committed group is an error, never half a group.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::replay::{DEPTH, Replay, ReplayError};
use super::stripes::lock;
use crate::backing::{AlignedBuf, Backing, Channel, Completion, Op};
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{
    Corruption, PAGE, RedoEntry, RedoHeader, RedoKind, RedoSample, RedoState, Sequenced as _, Uuid, newest,
    payload_checksum,
};
use crate::sync::Mutex;
use crate::wake::Waker;

/// Longest payload of an entry in bytes.
pub(crate) const PAYLOAD_MAX: u64 = 1 << 20;
/// Longest zeroing of an entry in sectors.
const ZERO_SECTORS_MAX: u64 = 1 << 21;

/// Why a redo area cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RedoError {
    /// It could not be read or written.
    #[error("the redo area `{path}` failed: {error}")]
    Io {
        /// Where it is.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// The disk could not be read or written.
    #[error("the disk `{path}` failed while a group was applied to it: {error}")]
    Disk {
        /// Where it is.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// It is too small for any group.
    #[error("the redo area `{path}` has {found} bytes: it needs at least {least}")]
    TooSmall {
        /// Where it is.
        path: String,
        /// Bytes it has.
        found: u64,
        /// Bytes it needs.
        least: u64,
    },
    /// It holds something, and not a redo area.
    #[error("`{path}` is not a redo area, and not blank: give the right one, or an empty file")]
    NotOurs {
        /// Where it is.
        path: String,
    },
    /// It holds a group of another volume, or for another disk.
    #[error(
        "the redo area `{path}` holds a group that belongs elsewhere ({what}): give the right one, or bring \
         that group to its own disk with `recover-backing`"
    )]
    Foreign {
        /// Where it is.
        path: String,
        /// What does not match.
        what: &'static str,
    },
    /// A group of several disks, and one of them is not given.
    #[error(
        "the redo area `{path}` holds the part of one disk in a group of {members}, and what counts is known \
         only from all of them: give all of their disks, or apply this part by itself with --alone (its \
         disk and the others then do not stand at one point)"
    )]
    NotAll {
        /// Where it is.
        path: String,
        /// How many disks.
        members: usize,
    },
    /// A committed group cannot be read.
    #[error("the redo area `{path}` holds a group that is damaged: {what}")]
    Damaged {
        /// Where it is.
        path: String,
        /// What is wrong.
        what: String,
    },
}

/// Whose groups an area holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Owner {
    pub cache_uuid: Uuid,
    pub volume_uuid: Uuid,
    pub incarnation: u64,
    pub backing_size: u64,
}

/// Where in an area a group may lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Room {
    /// Where its payload begins, in bytes from the area's start.
    pub at: u64,
    /// Bytes that payload and table may take. There is a page more: each of the two is filled up to
    /// a whole page.
    pub capacity: u64,
}

/// What the area says, and which copy of the header its next update goes to.
struct Head {
    newest: RedoHeader,
    next: usize,
    /// Whether that copy says nothing, though something was written there.
    is_torn: bool,
}

/// See the module's head.
pub(crate) struct Redo<B: Backing> {
    pub disk: Arc<B>,
    /// Bytes, a multiple of a page.
    size: u64,
    /// Smallest unit of I/O on it in bytes.
    pub block: u64,
    /// Whether neither it nor the volume's disk waits for what is done to the other.
    pub is_apart: bool,
    head: Mutex<Head>,
    /// The entries of the group that it held when it was opened, where that may not be decided.
    pending: OnceLock<Vec<RedoEntry>>,
}

impl<B: Backing> Redo<B> {
    /// Bytes between the headers that an area of `size` bytes has.
    fn body_of(size: u64) -> u64 {
        (size / PAGE as u64).saturating_sub(2) * PAGE as u64
    }

    /// Reads an area's headers. A blank area becomes an idle one in memory.
    pub fn open(disk: Arc<B>) -> Result<Redo<B>, RedoError> {
        let geometry = disk.geometry();
        let path = || disk.identity().path;
        let size = geometry.size / PAGE as u64 * PAGE as u64;
        let least = 3 * PAGE as u64;
        if size < least {
            return Err(RedoError::TooSmall { path: path(), found: geometry.size, least });
        }
        let io = |error| RedoError::Io { path: path(), error };
        if !mutated(Mutant::RedoBelievedUnflushed) {
            disk.channel(&Waker::default(), 1).and_then(|mut c| run(&mut c, Op::Flush)).map_err(io)?;
        }
        let read = |at| read(&*disk, at, PAGE);
        let (first, last) = (read(0).map_err(io)?, read(size - PAGE as u64).map_err(io)?);
        let is_blank = first.iter().chain(last.iter()).all(|&byte| byte == 0);
        let decoded = [RedoHeader::decode(&first), RedoHeader::decode(&last)];
        let torn = [0, 1].map(|copy| decoded[copy].is_err() && [&first, &last][copy].iter().any(|&b| b != 0));
        let [one, other] = decoded;
        let both = newest(one, other);
        let head = match both.newest {
            Some(newest) => Head { newest, next: both.next, is_torn: torn[both.next] },
            None if is_blank => Head { newest: RedoHeader::default(), next: 0, is_torn: false },
            None => return Err(RedoError::NotOurs { path: path() }),
        };
        Ok(Redo {
            size,
            block: u64::from(geometry.logical_block),
            is_apart: false,
            head: Mutex::new(head),
            pending: OnceLock::new(),
            disk,
        })
    }

    /// The same area, once it is known whether it shares a device with its volume's disk.
    pub fn beside(self, disk: &B) -> Redo<B> {
        Redo { is_apart: !self.disk.shares_device_with(disk), ..self }
    }

    /// All of it for one group.
    pub fn whole(&self) -> Room {
        Room { at: PAGE as u64, capacity: Self::body_of(self.size).saturating_sub(PAGE as u64) }
    }

    /// One of its halves: two groups have room beside each other.
    pub fn half(&self, number: u64) -> Room {
        let half = Self::body_of(self.size) / 2 / PAGE as u64 * PAGE as u64;
        Room { at: PAGE as u64 + number * half, capacity: half.saturating_sub(PAGE as u64) }
    }

    /// Which copy of the header its next update goes to: 0 for the first page, 1 for the last.
    pub fn next_copy(&self) -> u64 {
        lock(&self.head).next as u64
    }

    /// Bytes that payload and table of a group may take that has all of it.
    pub fn capacity(&self) -> u64 {
        self.whole().capacity
    }

    /// Where payload begins.
    pub fn body(&self) -> u64 {
        PAGE as u64
    }

    /// Whether a payload of `bytes` fits beside what else a group needs.
    pub fn check_room(&self, bytes: u64) -> Result<(), RedoError> {
        let least = bytes + 5 * PAGE as u64;
        match self.size >= least {
            true => Ok(()),
            false => Err(RedoError::TooSmall { path: self.path(), found: self.size, least }),
        }
    }

    /// Whether it has held groups of this owner, or was to.
    pub fn is_of(&self, owner: &Owner) -> bool {
        let h = self.header();
        let found = Owner {
            cache_uuid: h.cache_uuid,
            volume_uuid: h.volume_uuid,
            incarnation: h.incarnation,
            // Its disk may have grown since, and what the header says of the last group counts still.
            backing_size: h.backing_size.max(owner.backing_size),
        };
        found == *owner
    }

    /// What it says.
    pub fn header(&self) -> RedoHeader {
        lock(&self.head).newest.clone()
    }

    /// Whether it holds a group.
    pub fn is_committed(&self) -> bool {
        lock(&self.head).newest.state == RedoState::Committed
    }

    pub fn path(&self) -> String {
        self.disk.identity().path
    }

    /// The next header, given what it says, and the write that stores it. It counts once flushed;
    /// then [`Redo::note`] it.
    pub fn update(&self, change: impl FnOnce(&mut RedoHeader)) -> (RedoHeader, Op) {
        let head = lock(&self.head);
        let mut header = head.newest.clone();
        change(&mut header);
        header.sequence = head.newest.sequence() + 1;
        let mut buf = AlignedBuf::new(PAGE);
        buf.copy_from_slice(&header.encode());
        let offset = if head.next == 0 { 0 } else { self.size - PAGE as u64 };
        (header, Op::Write { offset, buf })
    }

    /// The update that says *idle*.
    pub fn void(&self) -> (RedoHeader, Op) {
        self.update(|h| h.state = RedoState::Idle)
    }

    /// The update that takes back a group that does not count, for another volume's part of it was never
    /// committed: the disk is where it was before.
    pub fn discard(&self) -> (RedoHeader, Op) {
        self.update(|h| {
            (h.state, h.is_part) = (RedoState::Idle, false);
            if !mutated(Mutant::DiscardedCountsApplied) {
                h.epoch = h.base_epoch;
            }
        })
    }

    /// Reads the group it holds, which may not count yet.
    pub fn keep_pending(&self) -> Result<(), RedoError> {
        let entries = self.table()?;
        self.verify(&entries)?;
        self.pending.get_or_init(|| entries);
        Ok(())
    }

    /// What [`Redo::keep_pending`] has read.
    pub fn pending(&self) -> Vec<RedoEntry> {
        self.pending.get().cloned().unwrap_or_default()
    }

    /// A header is durable.
    pub fn note(&self, header: RedoHeader) {
        let mut head = lock(&self.head);
        *head = Head { newest: header, next: 1 - head.next, is_torn: false };
    }

    /// Whether the area may be used for `owner`: it is idle, or its group is that owner's.
    pub fn judge(&self, owner: &Owner, tail: u64) -> Result<(), RedoError> {
        let header = self.header();
        if header.state == RedoState::Idle {
            return Ok(());
        }
        let is_old = header.epoch < tail || header.epoch == tail && !header.is_part;
        let what = if header.cache_uuid != owner.cache_uuid {
            "it is another cache's"
        } else if (header.volume_uuid, header.incarnation) != (owner.volume_uuid, owner.incarnation) {
            "it is another volume's"
        } else if header.backing_size > owner.backing_size {
            "it is for a disk of another size"
        } else if is_old {
            "it is older than the cache"
        } else {
            return Ok(());
        };
        Err(RedoError::Foreign { path: self.path(), what })
    }

    /// The entries of the group it holds, compared with their CRC and with what there is room for.
    pub fn table(&self) -> Result<Vec<RedoEntry>, RedoError> {
        let header = self.header();
        let damaged = |what: String| RedoError::Damaged { path: self.path(), what };
        let len = u64::from(header.entries) * RedoEntry::SIZE as u64;
        if header.table < self.body() || header.table + len > self.size - PAGE as u64 {
            return Err(damaged("its table lies outside".to_owned()));
        }
        let padded = usize::try_from(len.next_multiple_of(self.block)).unwrap_or(usize::MAX);
        let io = |error| RedoError::Io { path: self.path(), error };
        let mut bytes = read(&*self.disk, header.table, padded).map_err(io)?;
        bytes.set_len(len as usize);
        if payload_checksum(&bytes) != header.table_crc {
            return Err(damaged("its table does not match its checksum".to_owned()));
        }
        let entries = RedoEntry::decode_table(&bytes).map_err(|e: Corruption| damaged(e.to_string()))?;
        for entry in &entries {
            let RedoEntry { range, kind, at, .. } = *entry;
            let longest = if kind == RedoKind::Data { PAYLOAD_MAX / 512 } else { ZERO_SECTORS_MAX };
            let is_inside = range.end() * 512 <= header.backing_size
                && range.len <= longest
                && (kind != RedoKind::Data
                    || at >= self.body() && at + range.len * 512 <= self.size - PAGE as u64);
            if !is_inside {
                return Err(damaged(format!("its entry for {range} lies outside")));
            }
        }
        Ok(entries)
    }

    /// Whether every payload of these entries can be read and is whole.
    pub fn verify(&self, entries: &[RedoEntry]) -> Result<(), RedoError> {
        for entry in entries.iter().filter(|e| e.kind == RedoKind::Data) {
            let io = |error| RedoError::Io { path: self.path(), error };
            let payload = self.read_payload(entry).map_err(io)?;
            if payload_checksum(&payload) != entry.crc {
                let what = format!("the payload for {} does not match its checksum", entry.range);
                return Err(RedoError::Damaged { path: self.path(), what });
            }
        }
        Ok(())
    }

    fn read_payload(&self, entry: &RedoEntry) -> std::io::Result<AlignedBuf> {
        let len = entry.range.len * 512;
        let mut buf = read(&*self.disk, entry.at, len.next_multiple_of(self.block) as usize)?;
        buf.set_len(len as usize);
        Ok(buf)
    }

    /// Samples of the group that are neither as it found them nor as it leaves them: somebody else has
    /// written to the disk.
    pub fn strangers(&self, disk: &B) -> Result<Vec<u64>, RedoError> {
        let of_disk = |error| RedoError::Disk { path: disk.identity().path, error };
        let mut strange = Vec::new();
        for sample in &self.header().samples {
            let offset = sample_offset(disk, sample.sector);
            let block = read(disk, offset, sample_len(disk)).map_err(of_disk)?;
            let crc = sample_crc(&block, disk, sample.sector);
            if crc != sample.before && crc != sample.after {
                strange.push(sample.sector);
            }
        }
        Ok(strange)
    }

    /// Applies the group it holds to `disk` and says *idle*. Blocking; may be repeated.
    ///
    /// # Errors
    /// [`RedoError`]: the group is still there, and any part of it on the disk.
    pub fn apply(&self, disk: &B) -> Result<u64, RedoError> {
        if mutated(Mutant::RedoLeftUnapplied) {
            return Ok(0);
        }
        let entries = self.table()?;
        let sectors = entries.iter().map(|e| e.range.len).sum();
        let of_disk = |error| RedoError::Disk { path: disk.identity().path, error };
        let io = |error| RedoError::Io { path: self.path(), error };
        let mut from = self.disk.channel(&Waker::default(), DEPTH).map_err(io)?;
        let mut to = disk.channel(&Waker::default(), DEPTH).map_err(of_disk)?;
        let mut replay = Replay::new(entries, self.block);
        loop {
            match replay.step(&mut from, &mut to) {
                Ok(true) => break,
                Ok(false) if to.in_flight() > 0 => to.wait(Duration::from_millis(20)),
                Ok(false) => from.wait(Duration::from_millis(20)),
                Err(ReplayError::Redo(error)) => return Err(io(error)),
                Err(ReplayError::Disk(error)) => return Err(of_disk(error)),
                Err(ReplayError::Damaged(range)) => {
                    let what = format!("the payload for {range} does not match its checksum");
                    return Err(RedoError::Damaged { path: self.path(), what });
                }
            }
        }
        run(&mut to, Op::Flush).map_err(of_disk)?;
        let (header, op) = self.void();
        run(&mut from, op).and_then(|_| run(&mut from, Op::Flush)).map_err(io)?;
        self.note(header);
        Ok(sectors)
    }

    /// Replaces a torn copy of the header: see the laws. Blocking.
    ///
    /// # Errors
    /// [`RedoError`]: it says what it said.
    pub fn mend(&self) -> Result<(), RedoError> {
        if !lock(&self.head).is_torn || mutated(Mutant::TornHeaderKept) {
            return Ok(());
        }
        let io = |error| RedoError::Io { path: self.path(), error };
        let mut channel = self.disk.channel(&Waker::default(), 1).map_err(io)?;
        let (header, op) = self.update(|_| {});
        run(&mut channel, op).and_then(|_| run(&mut channel, Op::Flush)).map_err(io)?;
        self.note(header);
        Ok(())
    }

    /// Leaves no group under way: one that is committed is applied; one that may be, and of which nothing
    /// is on the disk, is voided. Blocking.
    ///
    /// # Errors
    /// [`RedoError`]: it is as it was.
    pub fn settle(&self, disk: &B) -> Result<(), RedoError> {
        if self.is_committed() {
            return self.apply(disk).map(|_| ());
        }
        let io = |error| RedoError::Io { path: self.path(), error };
        let mut channel = self.disk.channel(&Waker::default(), 1).map_err(io)?;
        let (header, op) = self.void();
        run(&mut channel, op).and_then(|_| run(&mut channel, Op::Flush)).map_err(io)?;
        self.note(header);
        Ok(())
    }

    /// Says *idle*, for `owner`, whatever it said: in both copies. Blocking.
    pub fn claim(&self, owner: &Owner) -> Result<(), RedoError> {
        let io = |error| RedoError::Io { path: self.path(), error };
        let mut channel = self.disk.channel(&Waker::default(), 1).map_err(io)?;
        for _ in 0..2 {
            let (header, op) = self.update(|h| {
                *h = RedoHeader {
                    cache_uuid: owner.cache_uuid,
                    volume_uuid: owner.volume_uuid,
                    incarnation: owner.incarnation,
                    backing_size: owner.backing_size,
                    ..RedoHeader::default()
                };
            });
            run(&mut channel, op).and_then(|_| run(&mut channel, Op::Flush)).map_err(io)?;
            self.note(header);
        }
        Ok(())
    }
}

/// What is read of a disk for a sample.
pub(crate) fn sample_len<B: Backing>(disk: &B) -> usize {
    disk.geometry().logical_block as usize
}

/// From where.
pub(crate) fn sample_offset<B: Backing>(disk: &B, sector: u64) -> u64 {
    let block = u64::from(disk.geometry().logical_block);
    sector * 512 / block * block
}

/// CRC of the sector in a block that was read for it.
pub(crate) fn sample_crc<B: Backing>(block: &[u8], disk: &B, sector: u64) -> u32 {
    let at = (sector * 512 - sample_offset(disk, sector)) as usize;
    payload_checksum(&block[at..at + 512])
}

/// Reads, blocking.
fn read<B: Backing>(disk: &B, offset: u64, len: usize) -> std::io::Result<AlignedBuf> {
    let mut channel = disk.channel(&Waker::default(), 1)?;
    match run(&mut channel, Op::Read { offset, buf: AlignedBuf::new(len) })? {
        Op::Read { buf, .. } => Ok(buf),
        _ => unreachable!("a read was submitted"),
    }
}

/// Runs one operation on an idle channel.
pub(crate) fn run<C: Channel>(channel: &mut C, op: Op) -> std::io::Result<Op> {
    if channel.submit(0, op).is_err() {
        return Err(std::io::Error::other("an idle channel takes no operation"));
    }
    let mut done = Vec::new();
    while done.is_empty() {
        channel.wait(Duration::from_secs(1));
        channel.reap(&mut done);
    }
    let Completion { op, result, .. } = done.remove(0);
    result.map(|()| op)
}

/// Places of a disk outside a group, and inside it, by which the disk is known again.
pub(crate) fn sample_places(entries: &[RedoEntry], sectors: u64, seed: u64) -> Vec<u64> {
    const EACH: u64 = 4;
    let data: Vec<&RedoEntry> = entries.iter().filter(|e| e.kind == RedoKind::Data).collect();
    let mut places: Vec<u64> = Vec::new();
    for i in 0..EACH.min(data.len() as u64) {
        places.push(data[(i * data.len() as u64 / EACH.min(data.len() as u64)) as usize].range.start);
    }
    let is_touched = |sector: u64| entry_of(entries, sector).is_some();
    for i in 0..EACH {
        let mixed = (seed ^ i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let place = (mixed ^ mixed >> 29) % sectors.max(1);
        if !is_touched(place) && !places.contains(&place) {
            places.push(place);
        }
    }
    places
}

/// The entry, of ascending ones, that a sector belongs to.
pub(crate) fn entry_of(entries: &[RedoEntry], sector: u64) -> Option<usize> {
    let before = entries.partition_point(|e| e.range.start <= sector).checked_sub(1)?;
    (entries[before].range.end() > sector).then_some(before)
}

/// The sample of a place, whose block was read, and which the group leaves as `after`.
pub(crate) fn sample(sector: u64, before: u32, after: Option<u32>) -> RedoSample {
    RedoSample { sector, before, after: after.unwrap_or(before) }
}
