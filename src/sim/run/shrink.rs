//! Makes a failure short: leaves steps out as long as it still fails.
//!
//! What counts as the same failure: a violation at all, and a panic only where it was one. Bounded in
//! time, so the result is short, not shortest.

use std::time::{Duration, Instant};

use super::{Plan, Violation};

/// The shortest failure of the same kind that is found within `budget`.
pub fn shrink(violation: Violation, trace_len: usize, budget: Duration) -> Violation {
    let until = Instant::now() + budget;
    let is_panic = |v: &Violation| v.what.contains("panic");
    let kind = is_panic(&violation);
    let attempt = |steps: Vec<u64>| {
        let plan = Plan { steps: Some(steps), ..violation.plan.clone() };
        plan.run(trace_len).err().filter(|found| is_panic(found) == kind)
    };
    let all = match &violation.plan.steps {
        Some(steps) => steps.clone(),
        None => (1..=violation.step).collect(),
    };
    let Some(mut best) = attempt(all) else { return violation };
    let mut kept = steps_of(&best);
    let mut chunk = kept.len() / 2;
    while chunk > 0 && Instant::now() < until {
        let before = kept.len();
        let mut at = 0;
        // The last step is where it shows.
        while at + 1 < kept.len() && Instant::now() < until {
            let end = (at + chunk).min(kept.len() - 1);
            let fewer: Vec<u64> = kept[..at].iter().chain(&kept[end..]).copied().collect();
            match attempt(fewer) {
                Some(found) => {
                    kept = steps_of(&found);
                    best = found;
                }
                None => at = end,
            }
        }
        if kept.len() == before || chunk > 1 {
            chunk /= 2;
        }
    }
    best
}

/// The steps of a failed plan up to where it failed.
fn steps_of(violation: &Violation) -> Vec<u64> {
    let steps = violation.plan.steps.iter().flatten().copied();
    steps.filter(|&step| violation.step == 0 || step <= violation.step).collect()
}
