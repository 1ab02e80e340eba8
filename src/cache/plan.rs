//! What a write-back round has looked up and not let go of yet.
//!
//! A round keeps positions for as long as the disk takes, so it cannot be waited for as a queue is.
//! Instead what it holds lies here, where reclaim can change it.
//!
//! Laws:
//! - Positions of dirty data are looked up, read and marked clean with the plan locked; reclaim
//!   holds it from its first look at a segment's dirty data until index, cursors and plan name the
//!   copies. So the bytes of a position in the plan are there, and its copy is what turns clean.
//! - No disk operation is issued or waited for with it locked; queues never take it.
//! - While a group goes to the disk the next one may be on its way to the redo area. What that holds is
//!   a plan of its own behind the first, and whatever moves is followed in both.

use std::collections::VecDeque;
use std::ops::Range;

use super::index::Extent;
use super::volume::Cursor;
use crate::mutant::{Mutant, mutated};
use crate::units::SectorRange;

/// How far a round has read a segment's records.
pub(crate) struct Consumed {
    pub id: u32,
    /// A segment without dirty data may be reclaimed, and used again, while the round goes on.
    pub generation: u64,
    pub cursor: Cursor,
    /// The epoch of the record that comes next, if there is one.
    pub next: Option<u64>,
}

/// See the module's head. Empty between rounds.
#[derive(Default)]
pub(crate) struct Plan {
    /// Still to be written, ascending.
    pub todo: VecDeque<Extent>,
    /// To be marked clean.
    pub written: Vec<Extent>,
    /// Written by earlier groups of the epoch that is on its way to the disk in parts: to be marked
    /// clean with the tail.
    pub earlier: Vec<Extent>,
    /// Where segments go on: what the round has consumed.
    pub cursors: Vec<Consumed>,
    /// What comes after this round, being journaled meanwhile.
    pub next: Option<Box<Plan>>,
}

/// Payload that lies elsewhere now; positions in 512-byte units of the media.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moved {
    pub from: u64,
    pub to: u64,
    pub sectors: u64,
}

impl Plan {
    /// Forgets the round: it has ended.
    pub fn clear(&mut self) {
        self.todo.clear();
        self.written.clear();
        self.earlier.clear();
        self.cursors.clear();
        self.next = None;
    }

    /// The round has ended: what comes after it takes its place.
    pub fn advance(&mut self) {
        *self = self.next.take().map_or_else(Plan::default, |next| *next);
    }

    /// Forgets how far a segment has been read: its keys were filed anew.
    pub fn drop_cursors_of(&mut self, id: u32) {
        self.cursors.retain(|c| c.id != id);
        if let Some(next) = &mut self.next {
            next.drop_cursors_of(id);
        }
    }

    /// Whether a sector is still to be written.
    pub fn covers(&self, sector: u64) -> bool {
        let after = self.todo.partition_point(|e| e.range.start <= sector);
        after > 0 && self.todo[after - 1].range.end() > sector
    }

    /// Follows payload out of the segment at `positions`. With `drops_rest`, what did not move is
    /// superseded and goes; otherwise it stays.
    pub fn redirect(&mut self, positions: &Range<u64>, moves: &mut [Moved], drops_rest: bool) {
        if let Some(next) = &mut self.next
            && !mutated(Mutant::NextKeepsOldPositions)
        {
            next.redirect(positions, moves, drops_rest);
        }
        moves.sort_unstable_by_key(|m| m.from);
        let concerned = |e: &Extent| !e.place.zero && positions.contains(&e.place.position);
        if self.todo.iter().any(concerned) {
            let old = std::mem::take(&mut self.todo);
            for extent in old {
                match concerned(&extent) {
                    true => follow(extent, moves, drops_rest, |part| self.todo.push_back(part)),
                    false => self.todo.push_back(extent),
                }
            }
        }
        for written in [&mut self.written, &mut self.earlier] {
            if written.iter().any(concerned) {
                for extent in std::mem::take(written) {
                    match concerned(&extent) {
                        true => follow(extent, moves, drops_rest, |part| written.push(part)),
                        false => written.push(extent),
                    }
                }
            }
        }
    }
}

/// Shows the parts of `extent` where they lie now, in ascending order.
fn follow(extent: Extent, moves: &[Moved], drops_rest: bool, mut show: impl FnMut(Extent)) {
    let end = extent.place.position + extent.range.len;
    let mut at = extent.place.position;
    let part = |from: u64, to: u64, position: u64| {
        let start = extent.range.start + (from - extent.place.position);
        let mut place = extent.place;
        place.position = position;
        Extent { range: SectorRange::new(start, to - from), place }
    };
    let first = moves.partition_point(|m| m.from + m.sectors <= at);
    for moved in moves[first..].iter().take_while(|m| m.from < end) {
        if moved.from > at && !drops_rest {
            show(part(at, moved.from, at));
        }
        let (from, to) = (at.max(moved.from), end.min(moved.from + moved.sectors));
        show(part(from, to, moved.to + (from - moved.from)));
        at = to;
    }
    if at < end && !drops_rest {
        show(part(at, end, at));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::index::Place;

    fn extent(start: u64, len: u64, position: u64) -> Extent {
        Extent { range: SectorRange::new(start, len), place: Place { position, zero: false, dirty: true } }
    }

    #[test]
    fn a_plan_follows_what_moved_and_drops_or_keeps_the_rest() {
        let moves = || [Moved { from: 110, to: 500, sectors: 4 }, Moved { from: 104, to: 700, sectors: 4 }];
        let other = extent(64, 8, 900);
        let zero = Extent { place: Place { position: 106, zero: true, dirty: true }, ..extent(80, 8, 0) };
        let plan = || Plan {
            todo: [extent(0, 16, 100), other, zero].into(),
            written: vec![extent(32, 2, 111)],
            earlier: Vec::new(),
            cursors: Vec::new(),
            next: None,
        };
        let mut kept = plan();
        kept.redirect(&(100..200), &mut moves(), false);
        let parts = [(0, 4, 100), (4, 4, 700), (8, 2, 108), (10, 4, 500), (14, 2, 114)];
        let parts = parts.map(|(start, len, position)| extent(start, len, position));
        assert_eq!(kept.todo, [&parts[..], &[other, zero]].concat());
        assert_eq!(kept.written, [extent(32, 2, 501)]);
        let mut dropped = plan();
        dropped.redirect(&(100..200), &mut moves(), true);
        assert_eq!(dropped.todo, [parts[1], parts[3], other, zero]);
        let mut untouched = plan();
        untouched.redirect(&(300..400), &mut moves(), true);
        assert_eq!((untouched.todo, untouched.written), (plan().todo, plan().written));
        let mut behind = Plan { next: Some(Box::new(plan())), ..plan() };
        behind.redirect(&(100..200), &mut moves(), true);
        behind.advance();
        assert_eq!(
            (behind.todo, behind.written, behind.next.is_none()),
            (dropped.todo, dropped.written, true)
        );
    }
}
