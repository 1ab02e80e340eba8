//! What a round does with dirty payload that cannot be read: see `../../lost.rs` for the laws.
//!
//! The order in a round: what is damaged is set aside when it is read; the list it will be on is made
//! before the ticket whose durability the tail waits for is drawn; it is written in the tail's own
//! update; and only then does the index say that the sectors are lost.

use std::sync::atomic::Ordering;

use super::super::super::counters::add;
use super::super::super::env::Env;
use super::super::super::health::Failure;
use super::super::super::index::Extent;
use super::super::super::lost;
use super::super::super::plan::Plan;
use super::super::super::queue::{HitError, Reader};
use super::super::super::stripes::lock;
use super::{Round, Writeback};
use crate::onmedia::LostRange;
use crate::units::SectorRange;

#[derive(Clone)]
struct Part {
    lost: LostRange,
    extent: Extent,
    /// The life of the segment it lay in: reclaim may take one whose dirty data was replaced.
    generation: u64,
}

/// A round's losses.
#[derive(Clone, Default)]
pub(super) struct Damage {
    /// What could not be read, and where it lay.
    parts: Vec<Part>,
    /// The volume's list once the tail has moved.
    list: Vec<LostRange>,
    /// Whether they are not listed, as they do not fit and the operator has accepted the loss.
    is_accepted: bool,
}

impl Damage {
    /// Drops what this round brings newer content of to the disk: that heals it.
    pub fn heal(&mut self, plan: &Plan) {
        for Part { lost, extent, generation } in std::mem::take(&mut self.parts) {
            let range = extent.range;
            for sector in (range.start..range.end()).filter(|&sector| !plan.covers(sector)) {
                let of = SectorRange::new(sector, 1);
                let extent = Extent { range: of, place: extent.place_at(sector) };
                self.parts.push(Part { lost: LostRange { range: of, ..lost }, extent, generation });
            }
        }
    }

    /// Adds what another round has lost.
    pub fn append(&mut self, mut other: Damage) {
        self.parts.append(&mut other.parts);
    }

    /// The list for the tail to be written.
    pub fn take_list(&mut self) -> Vec<LostRange> {
        std::mem::take(&mut self.list)
    }
}

impl<E: Env> Writeback<E> {
    /// Puts a run back without what is damaged of it; that is lost.
    pub(super) fn set_aside(
        &self,
        plan: &mut Plan,
        damage: &mut Damage,
        run: Vec<Extent>,
    ) -> Result<(), Failure> {
        let cache = &self.volume.cache;
        let parts: Vec<Extent> = run.into_iter().flat_map(|e| cache.checked_parts(e)).collect();
        for part in parts.into_iter().rev() {
            let Err(error) = cache.copy_extent(&part, Reader::Worker, true, |_, _| Ok(())) else {
                plan.todo.push_front(part);
                continue;
            };
            self.note_damage(damage, part, &error)?;
        }
        Ok(())
    }

    /// Notes that a part is lost once the tail has moved.
    pub(super) fn note_damage(
        &self,
        damage: &mut Damage,
        part: Extent,
        error: &HitError,
    ) -> Result<(), Failure> {
        let cache = &self.volume.cache;
        add(&self.volume.core.tally.checksum_errors, 1);
        let Some(lost) = cache.lost_range(&part, error) else {
            return Err(Failure::damage(format!(
                "dirty data of {} and the record of it are damaged: {error}",
                part.range
            )));
        };
        let (id, _) = cache.media.locate(part.place.position);
        let generation = cache.segments[id as usize].generation.load(Ordering::Relaxed);
        damage.parts.push(Part { lost, extent: part, generation });
        Ok(())
    }

    /// Makes the list of what will be lost once the tail has moved. Where the list has no room, what
    /// newer data has replaced is left out: that is durable before the tail moves, since its ticket
    /// is drawn after this, and it stays dirty in a later epoch.
    pub(super) fn list_lost(&self, round: &mut Round) -> Result<(), Failure> {
        let core = &self.volume.core;
        let mut before = lock(&core.lost).clone();
        let plan = lock(&core.plan);
        for done in [&plan.written, &plan.earlier] {
            lost::heal(&mut before, done);
        }
        drop(plan);
        let Damage { parts, list, is_accepted } = &mut round.damage;
        parts.sort_unstable_by_key(|part| part.lost.range.start);
        let with = |mut list: Vec<LostRange>, replaced_too: bool| {
            let shown = |part: &&Part| replaced_too || core.index.shows(&part.extent);
            parts.iter().filter(shown).for_each(|part| lost::add(&mut list, part.lost));
            list
        };
        *list = with(before.clone(), true);
        if lost::is_too_long(list) {
            *list = with(lost::still_lost(core, &before), false);
        }
        if lost::is_too_long(list) && core.accepts_loss.load(Ordering::Relaxed) {
            (*list, *is_accepted) = (before, true);
        }
        if lost::is_too_long(list) {
            return Err(Failure::damage(format!(
                "more is lost than the list of lost sectors holds, and the tail may not pass what is not \
                 listed: overwrite some of it, or accept the loss: {}",
                lost::summary(list)
            )));
        }
        Ok(())
    }

    /// The tail has moved and the list is durable: the index may say so.
    pub(super) fn lose(&self, damage: &Damage) {
        let cache = &self.volume.cache;
        for Part { lost, extent, generation } in &damage.parts {
            let (volume, range, cause) = (&self.volume.name, lost.range, lost.cause);
            let what = match damage.is_accepted {
                true => "the loss was accepted",
                false => "these sectors are listed, and answer with an error until they are overwritten",
            };
            tracing::error!(volume, %range, %cause, "dirty data is lost: {what}");
            let (id, _) = cache.media.locate(extent.place.position);
            if cache.segments[id as usize].generation.load(Ordering::Relaxed) != *generation {
                continue;
            }
            match damage.is_accepted {
                true => cache.forget(&self.volume.core, *extent),
                false => cache.lose(&self.volume.core, std::slice::from_ref(extent)),
            }
        }
        self.volume.core.damage_seen.store(false, Ordering::Relaxed);
    }
}
