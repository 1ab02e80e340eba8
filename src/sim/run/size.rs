//! Changes of the cache's size under its guests, at random moments, to random sizes, now and then called
//! off.
//!
//! What must hold beside everything else: a crash at any instant leaves a cache that opens, of the old
//! size or the new one; a change that nothing stands in the way of ends.

use super::super::memory::Memory;
use super::super::rng::Rng;
use super::super::scenario::Scenario;
use super::Run;
use crate::cache::ResizeError;
use crate::onmedia::Geometry;

/// One step in so many asks for another size, where none is asked for yet.
const BEGINS: u64 = 60;
/// One step in so many calls it off.
const CALLED_OFF: u64 = 400;
/// Rounds of all workers after which a change of size should have come to its end.
const ROUNDS_MAX: u32 = 4000;

/// The memory of a scenario: as large as its cache, or a device with room for all that it may become.
pub(super) fn memory(scenario: &Scenario) -> Memory {
    let Geometry { device_size, meta_size, segment_size, segment_count, .. } = scenario.geometry;
    let memory = |len| Memory::new(scenario.class, len).with_back(meta_size);
    match scenario.resizes && scenario.is_device {
        true => memory(device_size + u64::from(segment_count) * u64::from(segment_size)).as_device(),
        false => memory(device_size),
    }
}

impl Run {
    /// Now and then begins to change the size, calls that off, or sees how it ended.
    pub(super) fn change_size(&mut self) -> Result<(), String> {
        if !self.scenario.resizes || self.machine.is_none() {
            return Ok(());
        }
        let mut rng = self.rng.fork();
        self.see_size()?;
        if rng.chance(1, BEGINS) {
            let size = self.size(&mut rng);
            let segments = self.machine().cache.geometry().segment_count;
            let begun = self.machine().control(|cache| cache.begin_resize(size));
            if begun.is_ok() {
                self.segments = segments;
            }
            self.note(|| format!("to {size} bytes: {begun:?}"));
            if let Err(error @ (ResizeError::Unfinished | ResizeError::Superblock(_))) = begun {
                return Err(format!("the cache takes no other size: {error}"));
            }
        } else if rng.chance(1, CALLED_OFF) {
            self.machine().control(|cache| cache.cancel_resize());
        }
        Ok(())
    }

    /// From as few segments as its volumes can do with to twice as many as at first. Mostly whole ones.
    fn size(&self, rng: &mut Rng) -> u64 {
        let Geometry { meta_size, segment_size, segment_count, .. } = self.scenario.geometry;
        let least = 3 * self.scenario.volumes as u64 + 3;
        let segments = rng.between(least, 2 * u64::from(segment_count));
        let rest = if rng.chance(1, 4) { rng.below(u64::from(segment_size)) } else { 0 };
        2 * meta_size + segments * u64::from(segment_size) + rest
    }

    /// Sees how a change of size has ended, if it has.
    fn see_size(&mut self) -> Result<(), String> {
        let Some(ended) = self.machine().control(|cache| cache.end_resize()) else { return Ok(()) };
        self.note(|| format!("of another size: {ended:?}"));
        match ended {
            Ok(geometry) if geometry.segment_count < self.segments => self.stats.shrinks += 1,
            Ok(_) => self.stats.growths += 1,
            Err(ResizeError::Interrupted) => self.stats.resizes_undone += 1,
            // The disk of a volume that nobody serves at the moment.
            Err(ResizeError::Pinned { .. } | ResizeError::Damaged(_)) => self.stats.resizes_undone += 1,
            Err(_) if self.world.with(|w| w.faults.sync_failed) => self.stats.resizes_undone += 1,
            Err(error) => return Err(format!("the cache's size could not be changed: {error}")),
        }
        Ok(())
    }

    /// Lets what is under way come to its end: everything is clean and nobody asks for anything.
    pub(super) fn settle_size(&mut self) -> Result<(), String> {
        for _ in 0..ROUNDS_MAX {
            self.see_size()?;
            if !self.machine().cache.is_resizing() {
                return Ok(());
            }
            self.machine().clock.advance(100);
            self.machine().step_all();
        }
        let progress = self.machine().cache.resize_progress();
        Err(format!("a change of size that never ends: {progress:?}, {:?}", self.machine().cache.space()))
    }
}
