//! Who gives when reclaim needs space, and what each is entitled to: the decisions of `shares.rs`, pure.
//!
//! The ledger is a look at all volumes that lasts as long as victims are chosen; what is chosen counts in
//! it at once, so a batch is fair in itself.

use crate::mutant::{Mutant, mutated};

/// Of those who hold at least so much of the most, for their weight, the worst data goes: with all of
/// them between the two, Jain's index is 0.988 at least.
const NEAR: f64 = 0.8;
/// What the choice of victims needs to know of a volume.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Holding {
    pub incarnation: u64,
    pub held: usize,
    pub min: usize,
    pub weight: u32,
    /// Whether nobody has asked for anything of it for a turn of the cache.
    pub is_idle: bool,
    /// Whether it has asked for a segment in that time.
    pub wants: bool,
    /// Whether it was refused one, and none of its own was taken for that.
    pub waits: bool,
}

/// What everybody holds, while victims are chosen.
#[derive(Debug, Default)]
pub(crate) struct Ledger(Vec<Holding>);

impl Ledger {
    /// What these hold.
    pub fn new(holdings: Vec<Holding>) -> Self {
        Self(holdings)
    }

    fn find(&self, owner: u64) -> Option<&Holding> {
        self.0.iter().find(|h| h.incarnation == owner)
    }

    /// Whether an empty segment of `owner` may be taken: of one at its minimum that wants none, too.
    pub fn gives_empty(&self, owner: u64) -> bool {
        self.find(owner).is_none_or(|h| h.held > h.min || !h.wants || mutated(Mutant::MinimumIgnored))
    }

    /// How many of so many clean segments of `owner` may be taken for others.
    pub fn can_give(&self, owner: u64, clean: usize) -> usize {
        self.find(owner).map_or(clean, |h| clean.min(h.held.saturating_sub(h.min)))
    }

    /// Notes that one is taken.
    pub fn take(&mut self, owner: u64) {
        if let Some(holding) = self.0.iter_mut().find(|h| h.incarnation == owner) {
            holding.held = holding.held.saturating_sub(1);
            holding.waits = false;
        }
    }

    /// Of which of these owners of clean segments one may be taken (laws 1 and 4), and whether each gives
    /// for itself alone.
    pub fn donors(&self, owners: &[u64]) -> (Vec<u64>, bool) {
        let all = || owners.iter().map(|&owner| (owner, self.find(owner)));
        let is_over = |h: &Holding| h.held > h.min || mutated(Mutant::MinimumIgnored);
        let first = |h: Option<&Holding>| h.is_none_or(|h| h.is_idle && is_over(h));
        let idle: Vec<u64> = all().filter(|(_, h)| first(*h)).map(|(owner, _)| owner).collect();
        if !idle.is_empty() {
            return (idle, false);
        }
        let rank = |h: &Holding| h.held as f64 / f64::from(h.weight.max(1));
        let over = || all().filter_map(|(owner, h)| Some((owner, h.filter(|h| is_over(h))?)));
        let most = over().map(|(_, h)| rank(h)).fold(0.0, f64::max);
        let is_near = |h: &Holding| rank(h) >= most * NEAR || mutated(Mutant::WeightsIgnored);
        let donors: Vec<u64> = over().filter(|(_, h)| is_near(h)).map(|(owner, _)| owner).collect();
        if !donors.is_empty() {
            return (donors, false);
        }
        (all().filter(|(_, h)| h.is_some_and(|h| h.waits)).map(|(owner, _)| owner).collect(), true)
    }
}

/// What each gets of `total` by weight, none less than its minimum or more than its maximum.
pub(crate) fn entitlements(total: f64, rows: &[(f64, f64, f64)]) -> Vec<f64> {
    let at = |level: f64| rows.iter().map(move |&(min, max, weight)| (level * weight).min(max).max(min));
    let least = rows.iter().map(|&(_, _, weight)| weight).fold(f64::MAX, f64::min);
    let (mut low, mut high) = (0.0, total / least.max(1.0));
    for _ in 0..40 {
        let level = (low + high) / 2.0;
        if at(level).sum::<f64>() > total { high = level } else { low = level }
    }
    at(low).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holding(incarnation: u64, held: usize, min: usize, weight: u32) -> Holding {
        Holding { incarnation, held, min, weight, is_idle: false, wants: true, waits: false }
    }

    #[test]
    fn victims_come_from_who_holds_most_for_its_weight_and_never_from_a_minimum() {
        let idle = |h: Holding| Holding { is_idle: true, ..h };
        let waits = |h: Holding| Holding { waits: true, ..h };
        let h = holding;
        // Who holds what, who has clean segments, who gives, and whether for itself alone.
        type Row = (Vec<Holding>, &'static [u64], &'static [u64], bool);
        let rows: Vec<Row> = vec![
            (vec![h(1, 10, 0, 100), h(2, 30, 0, 100)], &[1, 2], &[2], false),
            (vec![h(1, 25, 0, 100), h(2, 30, 0, 100)], &[1, 2], &[1, 2], false),
            (vec![h(1, 10, 0, 100), h(2, 30, 0, 300)], &[1, 2], &[1, 2], false),
            (vec![h(1, 20, 0, 100), h(2, 30, 0, 300)], &[1, 2], &[1], false),
            // The most has nothing clean: then the next, but for a minimum.
            (vec![h(1, 10, 0, 100), h(2, 30, 0, 100)], &[1], &[1], false),
            (vec![h(1, 10, 10, 100), h(2, 30, 0, 100)], &[1], &[], true),
            (vec![waits(h(1, 10, 10, 100)), h(2, 30, 0, 100)], &[1], &[1], true),
            (vec![h(1, 30, 30, 100), h(2, 10, 0, 100)], &[1, 2], &[2], false),
            // What nobody uses goes first, and so does what is nobody's.
            (vec![idle(h(1, 5, 0, 100)), h(2, 30, 0, 100)], &[1, 2], &[1], false),
            (vec![idle(h(1, 5, 5, 100)), h(2, 30, 0, 100)], &[1, 2], &[2], false),
            (vec![h(2, 30, 0, 100)], &[2, 9], &[9], false),
        ];
        for (holdings, owners, donors, is_own) in rows {
            let text = format!("{holdings:?}, clean of {owners:?}");
            assert_eq!(Ledger(holdings).donors(owners), (donors.to_vec(), is_own), "{text}");
        }
    }

    #[test]
    fn what_is_taken_counts_at_once() {
        let mut ledger = Ledger(vec![holding(1, 12, 11, 100), holding(2, 10, 0, 100)]);
        assert_eq!(ledger.donors(&[1, 2]).0, [1, 2]);
        ledger.take(1);
        assert_eq!((ledger.donors(&[1, 2]).0, ledger.can_give(1, 5)), (vec![2], 0));
        assert_eq!((ledger.can_give(2, 5), ledger.can_give(2, 50), ledger.can_give(9, 7)), (5, 10, 7));
        assert!(!ledger.gives_empty(1) && ledger.gives_empty(2) && ledger.gives_empty(9));
        ledger.0[0].wants = false;
        assert!(ledger.gives_empty(1), "an idle volume's minimum is borrowed");
    }

    #[test]
    fn entitlements_follow_weights_between_minimum_and_maximum() {
        let all = 100.0;
        type Row<'a> = (&'a [(f64, f64, f64)], &'a [f64]);
        let rows: [Row<'_>; 6] = [
            (&[(0.0, all, 100.0)], &[100.0]),
            (&[(0.0, all, 100.0), (0.0, all, 100.0)], &[50.0, 50.0]),
            (&[(0.0, all, 100.0), (0.0, all, 300.0)], &[25.0, 75.0]),
            (&[(40.0, all, 100.0), (0.0, all, 300.0)], &[40.0, 60.0]),
            (&[(0.0, 10.0, 100.0), (0.0, all, 100.0)], &[10.0, 90.0]),
            (&[(60.0, all, 1.0), (0.0, 20.0, 10_000.0), (0.0, all, 1.0)], &[60.0, 20.0, 20.0]),
        ];
        for (given, expected) in rows {
            for (found, expected) in entitlements(all, given).iter().zip(expected) {
                assert!((found - expected).abs() < 0.01, "{given:?}: {found} is not {expected}");
            }
        }
        let capped = entitlements(all, &[(0.0, 10.0, 1.0), (0.0, 20.0, 1.0)]);
        assert!(capped.iter().sum::<f64>() <= 30.0, "what nobody may have stays free: {capped:?}");
    }
}
