//! The audit: whether what DRAM counts is what there is. For simulations and tests.
//!
//! Recovery and every worker keep the same facts several times over, each for its own reader: free
//! list and states, live counts and index, dead bits and records, cursors and epochs. A crash test
//! that only reads data sees a wrong one of them late or never (space that leaks, a dead copy that
//! waits for its superseder to be evicted), so it asks here, at a moment when no thread is inside.
//!
//! What holds at such a moment:
//! 1. every segment is free, used or bad; the free list has exactly the free ones, once each;
//! 2. an open segment is some stream's of its owner, and of one only; reclaim's target and the one in
//!    reserve for it are nobody else's; a sealed one is on the list of victims, once;
//! 3. the index points into used segments of its own volume, into their payload, at nothing dead,
//!    and `live` counts exactly that;
//! 4. a payload sector that a record names and the index does not point at is dead (law 4);
//! 5. the index's sums are those of its entries; a clean volume has none that are dirty;
//! 6. what a volume is said to hold is the segments that are its own, and within its maximum unless that
//!    was lowered since;
//! 7. a segment with an epoch above the tail has a cursor: write-back will come to it (law 12).

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;

use super::core::{Cache, Space};
use super::env::Env;
use super::segments::{Segment, State};
use super::stripes::lock;
use super::volume::VolumeCore;
use crate::onmedia::{Key, SegmentHeader, SegmentState};

/// What the indexes point at, by segment: sectors of the segment.
type Pointed = HashMap<u32, HashSet<u32>>;

/// How the segments are used, as far as the audit agrees.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Audit {
    /// All of them.
    pub space: Space,
    /// Those in the housekeeper's hands, on no list: to be sealed, or on their way to the free list.
    pub in_hand: usize,
}

impl<E: Env> Cache<E> {
    /// Compares everything the cache counts with what there is. Exact only while no thread is in the
    /// cache; `with_records` reads every record as well.
    ///
    /// # Errors
    /// The first thing that does not add up, in words.
    pub fn audit(&self, with_records: bool) -> Result<Audit, String> {
        let space = self.audit_lists()?;
        let mut volumes = self.all_volumes();
        volumes.sort_unstable_by_key(|v| v.incarnation);
        let mut pointed = Pointed::new();
        for volume in &volumes {
            self.audit_index(volume, &mut pointed)?;
            self.audit_share(volume)?;
            self.audit_dirty(volume)?;
        }
        for (id, segment) in self.segments.iter().enumerate() {
            let id = id as u32;
            let Some(volume) = self.volume_of(segment.owner.load(Ordering::Relaxed)) else { continue };
            if matches!(segment.state(), State::Free | State::Bad | State::Retired) {
                continue;
            }
            let none = HashSet::new();
            let sectors = pointed.get(&id).unwrap_or(&none);
            let live = segment.live.load(Ordering::Relaxed);
            if live as usize != sectors.len() {
                let count = sectors.len();
                return Err(format!("segment {id} counts {live} live sectors, the index points at {count}"));
            }
            if with_records {
                self.audit_records(id, &volume, sectors)?;
            }
        }
        let withheld = self.segments.iter().filter(|s| s.state() == State::Target).count();
        if withheld > 2 {
            return Err(format!("reclaim withholds {withheld} segments"));
        }
        let is_in_hand = |s: &&Segment| matches!(s.state(), State::Full | State::Reclaiming);
        Ok(Audit { space, in_hand: self.segments.iter().filter(is_in_hand).count() })
    }

    /// Claims 1 and 2.
    fn audit_lists(&self) -> Result<Space, String> {
        let space = self.space();
        if space.free + space.used + space.bad != space.total || space.free != self.free_segments() {
            return Err(format!("space does not add up: {space:?}, {} free", self.free_segments()));
        }
        let mut homes: HashMap<u32, u32> = HashMap::new();
        let mut count = |id: u32, state: State, what: &str| {
            *homes.entry(id).or_default() += 1;
            let found = self.segments[id as usize].state();
            if found == state { Ok(()) } else { Err(format!("segment {id} is {what} and {found:?}")) }
        };
        self.free_list().into_iter().try_for_each(|id| count(id, State::Free, "on the free list"))?;
        lock(&self.sealed).iter().try_for_each(|id| count(*id, State::Sealed, "a candidate for reclaim"))?;
        for volume in self.all_volumes() {
            for stream in volume.all_streams() {
                if let Some(open) = &lock(stream).open {
                    count(open.id, State::Open, "some stream's")?;
                    let owner = self.segments[open.id as usize].owner.load(Ordering::Relaxed);
                    if owner != volume.incarnation {
                        return Err(format!("segment {} of {owner} is open in another volume", open.id));
                    }
                }
            }
        }
        for (id, segment) in self.segments.iter().enumerate() {
            let homes = homes.get(&(id as u32)).copied().unwrap_or(0);
            let expected = match segment.state() {
                State::Free | State::Open | State::Sealed => 1,
                // In the hands of the housekeeper, or in nobody's.
                State::Full | State::Reclaiming | State::Target | State::Bad | State::Retired => 0,
            };
            if homes != expected {
                return Err(format!("segment {id}, {:?}, is on {homes} lists", segment.state()));
            }
        }
        Ok(space)
    }

    /// Claims 3 and 5.
    fn audit_index(&self, volume: &VolumeCore, pointed: &mut Pointed) -> Result<(), String> {
        let incarnation = volume.incarnation;
        let (mut mapped, mut dirty) = (0, 0);
        let mut wrong = None;
        volume.index.for_each(|extent| {
            mapped += extent.range.len;
            dirty += if extent.place.dirty { extent.range.len } else { 0 };
            if extent.place.zero {
                return;
            }
            for i in 0..extent.range.len {
                let (id, offset) = self.media.locate(extent.place.position + i);
                if let Err(what) = self.audit_sector(volume, id, offset, extent.place.dirty) {
                    wrong.get_or_insert(format!("{what}: {extent:?}"));
                } else if !pointed.entry(id).or_default().insert(offset / 512) {
                    wrong.get_or_insert(format!("segment {id} is pointed at twice: {extent:?}"));
                }
            }
        });
        if let Some(wrong) = wrong {
            return Err(format!("volume {incarnation}: {wrong}"));
        }
        let sums = (volume.index.mapped_sectors(), volume.index.dirty_sectors());
        if sums != (mapped, dirty) {
            return Err(format!(
                "volume {incarnation} maps {mapped} sectors, {dirty} dirty; it counts {sums:?}"
            ));
        }
        if volume.is_clean() && dirty > 0 {
            return Err(format!("volume {incarnation} calls itself clean and has {dirty} dirty sectors"));
        }
        Ok(())
    }

    fn audit_sector(&self, volume: &VolumeCore, id: u32, offset: u32, dirty: bool) -> Result<(), String> {
        let segment = &self.segments[id as usize];
        let owner = segment.owner.load(Ordering::Relaxed);
        if matches!(segment.state(), State::Free | State::Bad | State::Retired) || owner != volume.incarnation
        {
            return Err(format!("the index points into segment {id}, {:?} of {owner}", segment.state()));
        }
        let payload = self.media.geometry.data_start()..segment.payload_end.load(Ordering::Relaxed);
        if !payload.contains(&offset) {
            return Err(format!("the index points at byte {offset} of segment {id}, past its payload"));
        }
        if segment.is_dead(offset / 512) {
            return Err(format!(
                "the index points at sector {} of segment {id}, which is dead",
                offset / 512
            ));
        }
        let (epoch, tail) = (segment.max_epoch.load(Ordering::SeqCst), volume.tail.load(Ordering::SeqCst));
        if dirty && epoch <= tail {
            return Err(format!("dirty data in segment {id} of epoch {epoch}, below the tail {tail}"));
        }
        Ok(())
    }

    /// Claim 6.
    fn audit_share(&self, volume: &VolumeCore) -> Result<(), String> {
        let (held, holds) = (volume.share.held(), self.holds(volume.incarnation));
        let incarnation = volume.incarnation;
        if held != holds {
            return Err(format!("volume {incarnation} is said to hold {held} segments and holds {holds}"));
        }
        match self.check_bound(volume) {
            Some(bound) => Err(format!("volume {incarnation} holds {held} segments, more than {bound}")),
            None => Ok(()),
        }
    }

    /// Claim 7.
    fn audit_dirty(&self, volume: &VolumeCore) -> Result<(), String> {
        let tail = volume.tail.load(Ordering::SeqCst);
        let dirty = lock(&volume.dirty);
        for (id, segment) in self.segments.iter().enumerate() {
            let id = id as u32;
            let owned = segment.owner.load(Ordering::Relaxed) == volume.incarnation;
            let used =
                !matches!(segment.state(), State::Free | State::Bad | State::Retired | State::Reclaiming);
            let epoch = segment.max_epoch.load(Ordering::SeqCst);
            if !owned || !used || epoch <= tail || volume.damaged.load(Ordering::Relaxed) {
                continue;
            }
            let known = dirty.known.keys().any(|(_, other)| *other == id) || dirty.drained.contains_key(&id);
            if !known {
                return Err(format!("segment {id} has epoch {epoch} above the tail {tail} and no cursor"));
            }
        }
        Ok(())
    }

    /// Claim 4.
    fn audit_records(&self, id: u32, volume: &VolumeCore, pointed: &HashSet<u32>) -> Result<(), String> {
        let segment = &self.segments[id as usize];
        let Some(keys) = self.keys_of(id) else { return Ok(()) };
        for key in keys.iter().filter(|k| k.kind.has_payload()) {
            if key.range().end() > volume.descriptor_sectors() {
                continue;
            }
            for sector in key.payload..key.payload + key.sectors {
                if !pointed.contains(&sector) && !segment.is_dead(sector) {
                    return Err(format!(
                        "sector {sector} of segment {id} ({:?}) is neither pointed at nor dead: {key:?}",
                        segment.state()
                    ));
                }
            }
        }
        Ok(())
    }

    /// The keys a segment's records name; `None` where they cannot be read.
    fn keys_of(&self, id: u32) -> Option<Vec<Key>> {
        let segment = &self.segments[id as usize];
        // Sealed, it may hold a record more: a torn one that recovery did not count.
        if let Some(header) = self.media.load_header(id).newest
            && header.state == SegmentState::Sealed
        {
            let summary = self.media.scan_summary(id, &header);
            return Some(match summary {
                Ok(scan) => scan.keys,
                Err(_) => self.media.scan_records(id, &header).ok()?.keys,
            });
        }
        let header = SegmentHeader {
            incarnation: segment.owner.load(Ordering::Relaxed),
            generation: segment.generation.load(Ordering::Relaxed),
            start_counter: segment.start_counter.load(Ordering::Relaxed),
            ..SegmentHeader::default()
        };
        let (top, low) = (self.media.geometry.data_end(), segment.log_low.load(Ordering::Acquire));
        let mut keys = Vec::new();
        let walked =
            self.media.walk_from(id, &header, top, low, u64::MAX, |r| keys.extend_from_slice(&r.keys));
        walked.ok().map(|_| keys)
    }
}
