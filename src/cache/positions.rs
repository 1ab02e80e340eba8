//! Where a volume's log stands: what an operator of dm-pcache looks for in its status line.
//!
//! That target has one log with a head, a position up to which it has written back, and a tail. Here
//! each stream has its own segment and recovery sorts by version, so the three positions are those of
//! the newest open segment, of the oldest record not yet on the disk, and of the oldest segment.
//! Each is a look without a lock over the whole: they may be a moment apart.

use std::sync::atomic::Ordering;

use super::core::{Cache, load_superblock};
use super::env::{Clock, Env};
use super::segments::State;
use super::stripes::lock;
use super::volume::{Cursor, Volume};

/// A place in a cache: segment number and byte offset in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Position {
    /// Number of the segment.
    pub segment: u32,
    /// Byte offset in it.
    pub offset: u32,
}

/// See the module's head.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Positions {
    /// The last record of the newest open segment.
    pub key_head: Option<Position>,
    /// The oldest record, or run of keys found by recovery, that is not on the disk.
    pub dirty_tail: Option<Position>,
    /// The oldest segment that holds anything of the volume.
    pub key_tail: Option<Position>,
}

impl<E: Env> Cache<E> {
    /// Feature bits of the superblock, compatible ones lowest, 0 if it cannot be read any more.
    pub fn features(&self) -> u64 {
        load_superblock(&*self.media.pmem).map_or(0, |(superblock, _)| {
            superblock.features_compat | superblock.features_ro_compat | superblock.features_incompat
        })
    }

    /// Share of the segments, in percent, from which on reclaim makes space: what dm-pcache calls
    /// `gc_percent`.
    pub fn reclaim_percent(&self) -> u8 {
        let all = self.segments.len().max(1);
        (100 * all.saturating_sub(self.free_target()) / all) as u8
    }
}

impl<E: Env> Volume<E> {
    /// Where its log stands now.
    pub fn positions(&self) -> Positions {
        let (cache, core) = (&self.cache, &self.core);
        let mut positions = Positions::default();
        let mut oldest: Option<(u64, Position)> = None;
        let mut newest: Option<(u64, Position)> = None;
        for (id, segment) in cache.segments.iter().enumerate() {
            if segment.owner.load(Ordering::Relaxed) != core.incarnation {
                continue;
            }
            let state = segment.state();
            if matches!(state, State::Free | State::Bad) {
                continue;
            }
            let epoch = segment.max_epoch.load(Ordering::Relaxed);
            let (segment, offset) = (id as u32, segment.log_low.load(Ordering::Relaxed));
            let here = Position { segment, offset };
            if state == State::Open && newest.is_none_or(|(known, _)| epoch >= known) {
                newest = Some((epoch, here));
            }
            if oldest.is_none_or(|(known, _)| epoch < known) {
                oldest = Some((epoch, Position { segment, offset: 0 }));
            }
        }
        positions.key_head = newest.map(|(_, position)| position);
        positions.key_tail = oldest.map(|(_, position)| position);
        if !core.is_clean() {
            positions.dirty_tail = lock(&core.dirty).known.iter().next().map(|(&(_, segment), cursor)| {
                let offset = if let Cursor::Log(offset) = cursor { *offset } else { 0 };
                Position { segment, offset }
            });
        }
        positions
    }

    /// For how long there has been dirty data that no round of write-back has taken, in milliseconds.
    pub fn dirty_age_ms(&self) -> u64 {
        match self.core.dirty_since.load(Ordering::Relaxed) {
            0 => 0,
            since => self.cache.clock.now_ms().saturating_sub(since),
        }
    }

    /// Whether writes are slowed down to the pace of the disk now.
    pub fn is_paced(&self) -> bool {
        self.core.is_paced()
    }

    /// How the guest sees it.
    pub fn disk_config(&self) -> crate::volume::DiskConfig {
        crate::volume::DiskConfig { sectors: self.sectors(), ..self.config.clone() }
    }
}
