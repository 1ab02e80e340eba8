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
    let attempt = |steps: &[u64]| {
        let plan = Plan { steps: Some(steps.to_vec()), ..violation.plan.clone() };
        let found = plan.run(trace_len).err().filter(|found| is_panic(found) == kind)?;
        // Steps after the failure had no part in it.
        let steps = steps.iter().copied().filter(|&s| found.step == 0 || s <= found.step).collect();
        Some((found, steps))
    };
    let all: Vec<u64> = match &violation.plan.steps {
        Some(steps) => steps.clone(),
        None => (1..=violation.step).collect(),
    };
    match leave_out(all, attempt, || Instant::now() < until) {
        Some((found, _)) => found,
        // It shows only where other steps are judged too.
        None => violation,
    }
}

/// Leaves out runs of steps, long ones first, never the last step, as long as `attempt` says that what
/// is left still fails, and `goes_on`. `None` when not even all of them fail.
fn leave_out<T>(
    all: Vec<u64>,
    attempt: impl Fn(&[u64]) -> Option<(T, Vec<u64>)>,
    goes_on: impl Fn() -> bool,
) -> Option<(T, Vec<u64>)> {
    let mut best = attempt(&all)?;
    let mut chunk = best.1.len() / 2;
    while chunk > 0 && goes_on() {
        let before = best.1.len();
        let mut at = 0;
        while at + 1 < best.1.len() && goes_on() {
            let end = (at + chunk).min(best.1.len() - 1);
            let fewer: Vec<u64> = best.1[..at].iter().chain(&best.1[end..]).copied().collect();
            match attempt(&fewer) {
                Some(found) => best = found,
                None => at = end,
            }
        }
        if best.1.len() == before || chunk > 1 {
            chunk /= 2;
        }
    }
    Some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_steps_that_a_failure_needs_are_left() {
        let needed: [&[u64]; 4] = [&[200], &[1, 200], &[17, 18, 90, 200], &[3, 50, 100, 150, 200]];
        for needed in needed {
            let attempt = |steps: &[u64]| {
                let fails = needed.iter().all(|step| steps.contains(step));
                fails.then(|| ((), steps.to_vec()))
            };
            let all = (1..=200).collect();
            assert_eq!(leave_out(all, attempt, || true).map(|best| best.1).as_deref(), Some(needed));
        }
        assert!(leave_out(vec![1, 2], |_| None::<((), Vec<u64>)>, || true).is_none());
    }
}
