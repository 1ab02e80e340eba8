//! What can be done to a range of the index, one small type per operation.
//!
//! Walking regions, locking and repacking are the same for all operations; what differs is what
//! becomes of a mapped piece and of a gap. So the walk asks an [`Edit`], and an operation is its two
//! answers. Every piece it is shown maps linearly (or is zeros), hence is wholly affected or not at
//! all.

use super::entry::{Extent, Place, push_joined};
use crate::mutant::{Mutant, mutated};
use crate::units::SectorRange;

/// What is to become of a mapped piece.
pub(super) enum Verdict {
    /// Stays as it is.
    Keep,
    /// Is mapped no more.
    Unmap,
    /// Is mapped here from now on.
    Map(Place),
}

/// One operation on a range. Pieces and gaps are shown in ascending order, clipped to the range,
/// each sector once.
pub(super) trait Edit {
    /// Decides about a mapped piece and notes what the caller wants to know of it.
    fn piece(&mut self, old: Extent) -> Verdict;

    /// Where sectors that are not mapped should be from now on.
    fn gap(&mut self, _gap: SectorRange) -> Option<Place> {
        None
    }

    /// Whether it may map sectors to data that were not mapped to data before.
    fn maps_data(&self) -> bool {
        false
    }
}

/// Newest wins.
pub(super) struct Insert<'a> {
    pub extent: Extent,
    pub floor: usize,
    pub replaced: &'a mut Vec<Extent>,
}

impl Edit for Insert<'_> {
    fn piece(&mut self, old: Extent) -> Verdict {
        push_joined(self.replaced, self.floor, old);
        Verdict::Map(self.extent.place_at(old.range.start))
    }

    fn gap(&mut self, gap: SectorRange) -> Option<Place> {
        Some(self.extent.place_at(gap.start))
    }

    fn maps_data(&self) -> bool {
        !self.extent.place.zero
    }
}

/// Oldest wins.
pub(super) struct InsertGaps<'a> {
    pub extent: Extent,
    pub floor: usize,
    pub inserted: &'a mut Vec<Extent>,
}

impl Edit for InsertGaps<'_> {
    fn piece(&mut self, _old: Extent) -> Verdict {
        Verdict::Keep
    }

    fn gap(&mut self, gap: SectorRange) -> Option<Place> {
        let place = self.extent.place_at(gap.start);
        push_joined(self.inserted, self.floor, Extent { range: gap, place });
        Some(place)
    }

    fn maps_data(&self) -> bool {
        !self.extent.place.zero
    }
}

/// Everything goes.
pub(super) struct Remove<'a> {
    pub floor: usize,
    pub removed: &'a mut Vec<Extent>,
}

impl Edit for Remove<'_> {
    fn piece(&mut self, old: Extent) -> Verdict {
        push_joined(self.removed, self.floor, old);
        Verdict::Unmap
    }
}

/// What still maps to `extent` goes.
pub(super) struct RemoveIf<'a> {
    pub extent: Extent,
    pub floor: usize,
    pub removed: &'a mut Vec<Extent>,
}

impl Edit for RemoveIf<'_> {
    fn piece(&mut self, old: Extent) -> Verdict {
        if !self.extent.place_at(old.range.start).is_same_payload(&old.place) {
            return Verdict::Keep;
        }
        push_joined(self.removed, self.floor, old);
        Verdict::Unmap
    }
}

/// What still maps to `from` maps to `to` from now on, dirty or clean as it is.
pub(super) struct MoveIf<'a> {
    pub from: Extent,
    /// `from` at its new position.
    pub to: Extent,
    pub floor: usize,
    pub moved: &'a mut Vec<Extent>,
}

impl Edit for MoveIf<'_> {
    fn piece(&mut self, old: Extent) -> Verdict {
        if !self.from.place_at(old.range.start).is_same_payload(&old.place) {
            return Verdict::Keep;
        }
        let place = Place { dirty: old.place.dirty, ..self.to.place_at(old.range.start) };
        push_joined(self.moved, self.floor, Extent { range: old.range, place });
        Verdict::Map(place)
    }
}

/// What still maps to `extent` maps to `to`, which is nowhere in particular, from now on.
pub(super) struct ReplaceIf<'a> {
    pub extent: Extent,
    pub to: Place,
    pub floor: usize,
    pub removed: &'a mut Vec<Extent>,
}

impl Edit for ReplaceIf<'_> {
    fn piece(&mut self, old: Extent) -> Verdict {
        if !self.extent.place_at(old.range.start).is_same_payload(&old.place) {
            return Verdict::Keep;
        }
        push_joined(self.removed, self.floor, old);
        Verdict::Map(self.to)
    }
}

/// What still maps to `extent` is clean from now on, or, if zeros and so wished, goes.
pub(super) struct MarkCleanIf {
    pub extent: Extent,
    pub drop_zero: bool,
    pub changed: u64,
}

impl Edit for MarkCleanIf {
    fn piece(&mut self, old: Extent) -> Verdict {
        let is_same = self.extent.place_at(old.range.start).is_same_payload(&old.place);
        if !is_same && !mutated(Mutant::NewerMarkedClean) {
            return Verdict::Keep;
        }
        let verdict = if self.drop_zero && old.place.zero {
            Verdict::Unmap
        } else if old.place.dirty {
            Verdict::Map(Place { dirty: false, ..old.place })
        } else {
            return Verdict::Keep;
        };
        self.changed += old.range.len;
        verdict
    }
}
