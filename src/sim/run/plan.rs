//! What is run of a seed: everything, or the steps that a failure needs.
//!
//! The text form is what a failure prints and what the environment gives back:
//! `PCACHE_SIM_SEED=7`, or `PCACHE_SIM_SEED=7 PCACHE_SIM_STEPS=3,10-14,40`. Where steps are named,
//! crashes are judged at the last of them only; crashes that begin a new life come at all of them.

use std::fmt;

use super::super::rng::Rng;
use super::super::stats::Stats;
use super::{Run, Violation};

/// Steps in a stretch of one density.
const STRETCH: u64 = 12;

/// See the module's head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What everything follows from.
    pub seed: u64,
    /// Images until the run has done enough, where no steps are named.
    pub images: u64,
    /// The steps to take, ascending; `None` for all.
    pub steps: Option<Vec<u64>>,
}

impl Plan {
    /// All of a seed until so many images have been judged.
    pub fn whole(seed: u64, images: u64) -> Plan {
        Plan { seed, images, steps: None }
    }

    /// Runs it; a violation tells the last `trace_len` steps.
    ///
    /// # Errors
    /// [`Violation`]: the engine broke a promise, or panicked.
    pub fn run(&self, trace_len: usize) -> Result<Stats, Violation> {
        let mut run = Run::new(self.clone())?;
        run.trace_len = trace_len;
        run.go()
    }

    /// Reads steps as they are printed.
    ///
    /// # Errors
    /// What is not understood.
    pub fn parse_steps(text: &str) -> Result<Vec<u64>, String> {
        let mut steps = Vec::new();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |text: &str| text.parse::<u64>().map_err(|e| format!("{part}: {e}"));
            steps.extend(number(first)?..=number(last)?);
        }
        Ok(steps)
    }

    /// Whether there is a step after `step`, with `images` judged so far.
    pub(super) fn goes_on(&self, step: u64, images: u64) -> bool {
        match &self.steps {
            Some(steps) => steps.last().is_some_and(|&last| step < last),
            None => images < self.images && step < 2000 + self.images * 40,
        }
    }

    pub(super) fn has(&self, step: u64) -> bool {
        self.steps.as_ref().is_none_or(|steps| steps.binary_search(&step).is_ok())
    }

    /// Whether crashes at this step are judged.
    pub(super) fn judges(&self, step: u64) -> bool {
        self.steps.as_ref().is_none_or(|steps| steps.last() == Some(&step))
    }

    /// The dice of a step, whatever came before it.
    pub(super) fn dice(&self, step: u64) -> Rng {
        Rng::new(Rng::new(self.seed ^ 0x5eed).next() ^ step.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Whether every edge of this step is cut.
    pub(super) fn is_dense(&self, step: u64) -> bool {
        self.dice(u64::MAX - step / STRETCH).chance(1, 32)
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PCACHE_SIM_SEED={}", self.seed)?;
        let Some(steps) = &self.steps else { return Ok(()) };
        f.write_str(" PCACHE_SIM_STEPS=")?;
        let runs = steps.chunk_by(|a, b| a + 1 == *b);
        for (i, run) in runs.enumerate() {
            let comma = if i == 0 { "" } else { "," };
            match run {
                [one] => write!(f, "{comma}{one}")?,
                _ => write!(f, "{comma}{}-{}", run[0], run[run.len() - 1])?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_read_back_as_they_are_printed() {
        for steps in [vec![5], vec![1, 2, 3, 9], vec![1, 3, 4, 5, 700]] {
            let plan = Plan { seed: 7, images: 0, steps: Some(steps.clone()) };
            let text = plan.to_string();
            let (_, text) = text.split_once("STEPS=").expect("it names steps");
            assert_eq!(Plan::parse_steps(text), Ok(steps), "{text}");
        }
        assert!(Plan::parse_steps("1-x").is_err());
    }
}
