//! How much of what waits one group takes, and which part of the redo area.
//!
//! One group in all of the area coalesces most: of each sector only the newest version of all its epochs
//! is written. But then the disk waits while it is journaled, and the area's disk while it is applied. Two
//! groups side by side, each in a half, keep both disks busy (`ahead.rs`), and smaller ones waste less
//! time at both ends. So groups are small where four things hold:
//! - somebody waits for what they bring to the disk: what comes of age by itself has time;
//! - the area lies on another disk: one arm would only seek between the two;
//! - what is cut apart would hardly have been coalesced: the parts cost at most a sixteenth more than the
//!   whole, in bytes and in runs;
//! - a half has room for any piece of a write.

use super::super::super::env::Env;
use super::super::super::index::{Extent, ExtentMap};
use super::super::super::redo::Room;
use super::Writeback;
use super::group::Group;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{Key, RedoEntry};
use crate::sync::atomic::Ordering;

/// Least bytes of a group that another follows: three flushes and an access, which is what the disk waits
/// for between two groups, are then a twentieth of its time even where each takes 8 ms.
const BYTES_LEAST: u64 = 64 << 20;
/// Into how many groups what waits is cut at most, if they have [`BYTES_LEAST`].
const GROUPS_MOST: u64 = 32;
/// The same where there are so many keys that to look at them all again takes long.
const GROUPS_OF_MANY_KEYS: u64 = 8;
const MANY_KEYS: usize = 1 << 16;
/// What a run costs, in bytes: a seek of a disk that is not slow.
const RUN_BYTES: u64 = 64 << 10;

/// Behind what a group comes.
pub(super) struct Behind {
    /// Everything up to this (epoch, version) is on the disk, or will be.
    pub upto: Option<(u64, u64)>,
    /// The tail by then.
    pub tail: u64,
    /// The half of the area that is free for it; `None` for all of it.
    pub half: Option<u64>,
}

/// What was gathered for a group.
pub(super) struct Gathered {
    pub epoch: u64,
    /// `None` where nothing is to be written.
    pub group: Option<Group>,
    /// Bytes to be written, and bytes of the records that this covers.
    pub bytes: u64,
    pub covers: u64,
}

impl Gathered {
    pub fn nothing(epoch: u64) -> Gathered {
        Gathered { epoch, group: None, bytes: 0, covers: 0 }
    }
}

/// What one group takes.
pub(super) struct Share {
    /// The newest of the first keys.
    pub newest: ExtentMap,
    /// How many these are.
    pub fit: usize,
    pub room: Room,
    pub half: Option<u64>,
}

/// What a group costs to write.
fn cost(map: &ExtentMap) -> u64 {
    let (mut bytes, mut end) = (0, u64::MAX);
    for extent in map {
        if !extent.place.zero {
            bytes += extent.range.len * 512;
        }
        if extent.range.start != end {
            bytes += RUN_BYTES;
        }
        end = extent.range.end();
    }
    bytes
}

impl<E: Env> Writeback<E> {
    /// What the next group takes of these keys, in their order. With `half` it must lie there: `None` where
    /// that does not pay.
    pub(super) fn share(&self, keys: &[(Key, u32)], half: Option<u64>) -> Option<Share> {
        let room = self.redo().whole();
        let (newest, fit) = self.fit(keys, room.capacity);
        if self.is_joint() {
            return Some(Share { newest, fit, room, half: None });
        }
        // Whatever follows a header that goes to the first page then begins right behind it.
        let first = || 1 - self.redo().next_copy();
        let beside = self.share_half(&keys[..fit], &newest, half.unwrap_or_else(first));
        match half {
            None => beside.or(Some(Share { newest, fit, room, half: None })),
            Some(_) => beside,
        }
    }

    /// A part of what would fit the whole area, small enough that another group lies beside it; `all` is
    /// the newest of it.
    fn share_half(&self, keys: &[(Key, u32)], all: &ExtentMap, half: u64) -> Option<Share> {
        let needed = self.needed(all);
        let limit = self.bytes_of_one(needed, keys.len())?;
        let room = self.redo().half(half);
        let piece = self.volume.cache.piece_sectors_max() * 512;
        if keys.is_empty() || room.capacity < self.more(piece) {
            return None;
        }
        let limit = limit.max(self.more(piece)).min(room.capacity);
        let room = if mutated(Mutant::NextOverCommitted) { self.redo().half(0) } else { room };
        let half = Some(half);
        if needed <= limit {
            return Some(Share { newest: self.newest_of(keys), fit: keys.len(), room, half });
        }
        let (newest, fit) = self.first_fit(keys, limit);
        let is_told = self.volume.wishes.group_bytes.load(Ordering::Relaxed) > 0;
        if !is_told {
            let apart = cost(&newest) + cost(&self.newest_of(&keys[fit..]));
            if apart > cost(all) / 16 * 17 {
                return None;
            }
        }
        Some(Share { newest, fit, room, half })
    }

    /// Bytes that one group takes if others follow it; `None` where they do not go side by side.
    fn bytes_of_one(&self, needed: u64, keys: usize) -> Option<u64> {
        match self.volume.wishes.group_bytes.load(Ordering::Relaxed) {
            0 if !self.redo().is_apart || !self.is_waited_for() => None,
            0 => {
                let most = if keys > MANY_KEYS { GROUPS_OF_MANY_KEYS } else { GROUPS_MOST };
                Some(BYTES_LEAST.max(needed / most))
            }
            told => Some(told),
        }
    }

    /// The newest of as many keys, from the first on, as `capacity` holds, and how many these are.
    fn fit(&self, keys: &[(Key, u32)], capacity: u64) -> (ExtentMap, usize) {
        // What is overwritten or trimmed later need not fit.
        let newest = self.newest_of(keys);
        match self.needed(&newest) <= capacity {
            true => (newest, keys.len()),
            false => self.first_fit(keys, capacity),
        }
    }

    /// The same of those that come before the first one that does not fit.
    fn first_fit(&self, keys: &[(Key, u32)], capacity: u64) -> (ExtentMap, usize) {
        let block = self.redo().block;
        let mut newest = ExtentMap::new();
        let mut replaced = Vec::new();
        // At least what is needed: pieces that were replaced are taken off, rounded down.
        let mut need = 0u64;
        for (i, key) in keys.iter().enumerate() {
            let extent = self.extent_of(key);
            let more = if extent.place.zero { self.more(0) } else { self.more(extent.range.len * 512) };
            if need + more > capacity {
                need = self.needed(&newest);
                if need + more > capacity {
                    return (newest, i);
                }
            }
            replaced.clear();
            newest.insert(extent, &mut replaced);
            let gone =
                replaced.iter().map(|e| if e.place.zero { 0 } else { e.range.len * 512 / block * block });
            need = (need + more).saturating_sub(gone.sum());
        }
        (newest, keys.len())
    }

    /// What all of the area holds of these keys if it may have to hold any number of the first of them.
    pub(super) fn fit_prefix(&self, keys: &[(Key, u32)]) -> (ExtentMap, usize) {
        self.first_fit(keys, self.redo().capacity())
    }

    /// Of each sector the newest version that these keys have.
    pub(super) fn newest_of(&self, keys: &[(Key, u32)]) -> ExtentMap {
        let mut newest = ExtentMap::new();
        let mut replaced = Vec::new();
        for key in keys {
            replaced.clear();
            newest.insert(self.extent_of(key), &mut replaced);
        }
        newest
    }

    fn extent_of(&self, (key, id): &(Key, u32)) -> Extent {
        Extent { range: key.range(), place: self.volume.cache.media.place(*id, key, true) }
    }

    /// Bytes of the area that a group of these takes.
    fn needed(&self, newest: &ExtentMap) -> u64 {
        let block = self.redo().block;
        let payload = |e: &Extent| if e.place.zero { 0 } else { (e.range.len * 512).next_multiple_of(block) };
        newest.iter().map(|e| payload(&e) + RedoEntry::SIZE as u64).sum()
    }

    /// Most that one key of so many bytes may take more: it may cut another in two.
    fn more(&self, bytes: u64) -> u64 {
        let block = self.redo().block;
        bytes.next_multiple_of(block) + 2 * (RedoEntry::SIZE as u64 + block)
    }
}
