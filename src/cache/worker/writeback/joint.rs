//! The round that a consistency group in `grouped` order is in: who takes part, how far each is, and
//! whether it counts. Pure: `together.rs` says what a round is, and holds the lock around this.
//!
//! Invariants:
//! - A round is decided when all parts are committed, and by nothing else; from then on nobody can give
//!   it up. Given up by one before that, it is given up for all.
//! - It ends when all parts have ended, and only then is there another one.
//! - Its target is no more than any member has bid, and everybody takes part who has anything up to it.

use std::collections::BTreeMap;

use crate::mutant::{Mutant, mutated};
use crate::onmedia::Uuid;

/// How far one member is in a round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    /// It has not bid.
    Asked,
    /// Its first epoch that is not on the disk, and the last for which its area has room.
    Bid { low: u64, upto: u64 },
    /// It is to journal.
    Named,
    /// It does.
    Writing,
    /// Its header is durable.
    Committed,
    /// It has voided its area, or has nothing in it.
    Ended,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Bidding,
    Writing,
    Decided,
    GivenUp,
}

#[derive(Debug)]
struct JointRound {
    target: u64,
    stage: Stage,
    /// By incarnation; the members that are not clean.
    parts: BTreeMap<u64, (Uuid, Part)>,
}

/// What a round asks of a member.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Wish {
    Nothing,
    /// A bid for epochs up to this.
    Bid(u64),
    /// To write everything up to this; who takes part.
    Write(u64, Vec<Uuid>),
}

/// The round in `grouped` order that a group is in, if any. Pure: who calls holds its lock.
#[derive(Debug, Default)]
pub(crate) struct Joint {
    round: Option<JointRound>,
}

impl Joint {
    /// Begins a round of everything up to `target`, which is closed, with those who are not clean.
    pub fn begin(&mut self, target: u64, members: impl Iterator<Item = (u64, Uuid)>) {
        let parts = members.map(|(me, uuid)| (me, (uuid, Part::Asked))).collect();
        self.round = Some(JointRound { target, stage: Stage::Bidding, parts });
    }

    pub fn wish(&self, me: u64) -> Wish {
        let Some(round) = &self.round else { return Wish::Nothing };
        match (round.stage, round.parts.get(&me)) {
            (Stage::Bidding, Some((_, Part::Asked))) => Wish::Bid(round.target),
            (Stage::Writing, Some((_, Part::Named))) => {
                Wish::Write(round.target, round.parts.values().map(|(uuid, _)| *uuid).collect())
            }
            _ => Wish::Nothing,
        }
    }

    /// Who has not bid yet.
    pub fn silent(&self) -> Option<u64> {
        let round = self.round.as_ref().filter(|round| round.stage == Stage::Bidding)?;
        round.parts.iter().find(|(_, (_, part))| *part == Part::Asked).map(|(me, _)| *me)
    }

    /// Who has not committed yet.
    pub fn late(&self) -> Option<u64> {
        let round = self.round.as_ref()?;
        let is_late = |part: &Part| !matches!(part, Part::Committed | Part::Ended);
        round.parts.iter().find(|(_, (_, part))| is_late(part)).map(|(me, _)| *me)
    }

    /// A member's bid. After the last the target stands, and who takes part; without anybody the round
    /// has ended.
    pub fn bid(&mut self, me: u64, low: u64, upto: u64) {
        let Some(round) = &mut self.round else { return };
        let Some((_, part)) = round.parts.get_mut(&me) else { return };
        *part = Part::Bid { low, upto };
        let bids = round.parts.values().map(|(_, part)| match *part {
            Part::Bid { low, upto } => Some((low, upto)),
            _ => None,
        });
        let Some(bids) = bids.collect::<Option<Vec<_>>>() else { return };
        let target = bids.iter().map(|(_, upto)| *upto).fold(round.target, u64::min);
        round.parts.retain(|_, (_, part)| matches!(part, Part::Bid { low, .. } if *low <= target));
        round.parts.values_mut().for_each(|(_, part)| *part = Part::Named);
        (round.target, round.stage) = (target, Stage::Writing);
        self.end_if_over();
    }

    pub fn begin_part(&mut self, me: u64) {
        self.set(me, Part::Writing);
    }

    /// A member's header is durable. True when it was the last.
    pub fn commit(&mut self, me: u64) -> bool {
        self.set(me, Part::Committed);
        let Some(round) = self.round.as_mut().filter(|round| round.stage == Stage::Writing) else {
            return false;
        };
        let is_last = round.parts.values().all(|(_, part)| *part == Part::Committed)
            || mutated(Mutant::JointDecidedByOne);
        if is_last {
            round.stage = Stage::Decided;
        }
        is_last
    }

    /// Whether the round counts that this member takes part in, once that is known.
    pub fn verdict(&self, me: u64) -> Option<bool> {
        let round = self.round.as_ref().filter(|round| round.parts.contains_key(&me));
        match round.map(|round| round.stage) {
            Some(Stage::Bidding | Stage::Writing) => None,
            Some(Stage::Decided) => Some(true),
            // A round ends only when all parts have: this one was given up.
            Some(Stage::GivenUp) | None => Some(false),
        }
    }

    /// A member cannot go on. `is_over` if its area holds nothing of the round.
    pub fn give_up(&mut self, me: u64, is_over: bool) {
        let Some(round) = self.round.as_mut().filter(|round| round.parts.contains_key(&me)) else { return };
        match round.stage {
            Stage::Bidding => self.round = None,
            Stage::Decided => {}
            Stage::Writing | Stage::GivenUp => {
                round.stage = Stage::GivenUp;
                for (_, part) in round.parts.values_mut().filter(|(_, part)| *part == Part::Named) {
                    *part = Part::Ended;
                }
                if is_over {
                    self.end(me);
                }
            }
        }
    }

    /// A round of a member's has failed. It may still bid.
    pub fn fail(&mut self, me: u64, is_over: bool) {
        if self.round.as_ref().is_some_and(|round| round.stage != Stage::Bidding) {
            self.give_up(me, is_over);
        }
    }

    /// A member takes no part from here on; what its area says of the round stands.
    pub fn leave(&mut self, me: u64) {
        self.give_up(me, false);
        self.end(me);
    }

    /// A member has ended its part.
    pub fn end(&mut self, me: u64) {
        // What ends while others bid is of a round before, or of an earlier life.
        if self.round.as_ref().is_some_and(|round| round.stage != Stage::Bidding) {
            self.set(me, Part::Ended);
            self.end_if_over();
        }
    }

    fn end_if_over(&mut self) {
        let over = |round: &mut JointRound| round.parts.values().all(|(_, part)| *part == Part::Ended);
        self.round.take_if(over);
    }

    fn set(&mut self, me: u64, to: Part) {
        if let Some((_, part)) = self.round.as_mut().and_then(|round| round.parts.get_mut(&me)) {
            *part = to;
        }
    }

    pub fn names(&self, me: u64) -> bool {
        self.round.as_ref().is_some_and(|round| round.parts.contains_key(&me))
    }
}

impl Joint {
    /// How far the round is, to tell whether anything has changed for anybody.
    pub fn progress(&self) -> Option<(u64, u8)> {
        self.round.as_ref().map(|round| (round.target, round.stage as u8))
    }

    /// Whether there is a round.
    pub fn is_under_way(&self) -> bool {
        self.round.is_some()
    }

    /// Who takes part in the round, and to what end.
    pub fn takers(&self) -> Option<(u64, Vec<u64>)> {
        self.round.as_ref().map(|round| (round.target, round.parts.keys().copied().collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uuid(me: u64) -> Uuid {
        [me as u8; 16]
    }

    /// A round of everything up to 9 for members 1 to 3.
    fn begun() -> Joint {
        let mut joint = Joint::default();
        joint.begin(9, (1..=3).map(|me| (me, uuid(me))));
        joint
    }

    #[test]
    fn the_target_is_the_least_that_an_area_has_room_for_and_who_has_nothing_up_to_it_is_left_out() {
        let mut joint = begun();
        assert_eq!(joint.wish(2), Wish::Bid(9));
        joint.bid(1, 3, 9);
        joint.bid(2, 2, 5);
        assert_eq!((joint.wish(1), joint.silent()), (Wish::Nothing, Some(3)), "it has bid; one has not");
        joint.bid(3, 6, 9);
        assert_eq!(joint.wish(1), Wish::Write(5, vec![uuid(1), uuid(2)]));
        assert_eq!((joint.wish(3), joint.verdict(3)), (Wish::Nothing, Some(false)));
        let mut joint = begun();
        (1..=3).for_each(|me| joint.bid(me, u64::MAX, u64::MAX));
        assert!(!joint.is_under_way(), "nobody has anything");
    }

    #[test]
    fn a_round_counts_with_the_last_commit_and_is_given_up_by_anybody_before() {
        // (how many have committed when the third gives up, whether it counts)
        for (commits, counts) in [(0, false), (1, false), (2, false), (3, true)] {
            let mut joint = begun();
            (1..=3).for_each(|me| joint.bid(me, 1, 9));
            (1..=3).for_each(|me| joint.begin_part(me));
            for me in 1..=commits {
                assert_eq!(joint.verdict(me), None);
                assert_eq!(joint.commit(me), me == 3);
            }
            joint.give_up(3, commits < 3);
            for me in 1..=2 {
                assert_eq!(joint.verdict(me), Some(counts), "after {commits} commits");
                assert!(joint.is_under_way(), "{me} has something in its area");
                joint.end(me);
            }
            joint.end(3);
            assert!(!joint.is_under_way());
        }
    }

    #[test]
    fn who_leaves_ends_the_bidding_and_no_round_waits_for_it() {
        let mut joint = begun();
        joint.leave(2);
        assert!(!joint.is_under_way());
        let mut joint = begun();
        (1..=3).for_each(|me| joint.bid(me, 1, 9));
        joint.leave(2);
        assert!(!joint.is_under_way(), "nobody had begun");
        let mut joint = begun();
        joint.end(1);
        assert_eq!(joint.wish(1), Wish::Bid(9), "what has ended was of an earlier life");
    }
}
