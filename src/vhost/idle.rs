//! How long an idle queue looks again and again before it sleeps.
//!
//! Sleeping and being woken costs tens of microseconds on each side. A queue that was woken within about
//! that time would have done better to wait awake.
//!
//! Invariants:
//! - an idle queue soon costs no processor time, but for one that is told to poll always and for ever;
//! - polling takes no larger part of a processor than it is allowed, over any [`PERIOD`] and a half.

use std::time::{Duration, Instant};

/// Over which the part of a processor is reckoned.
const PERIOD: Duration = Duration::from_millis(100);

/// Whether a queue polls.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PollMode {
    /// Never: it sleeps as soon as there is nothing to do.
    Off,
    /// As long as it may, each time there is nothing to do.
    Fixed,
    /// As long as has lately been worth it, and no longer than it may.
    #[default]
    Adaptive,
}

/// How a queue waits for work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Polling {
    /// Whether it polls.
    pub mode: PollMode,
    /// Longest time it polls before it sleeps.
    pub max: Duration,
    /// Most of a processor that it may spend on polling, in percent; 100 for no bound.
    pub cpu_percent: u8,
}

impl Default for Polling {
    fn default() -> Self {
        Self { mode: PollMode::Adaptive, max: Duration::from_micros(32), cpu_percent: 100 }
    }
}

/// One queue's.
#[derive(Debug)]
pub(super) struct Idle {
    polling: Polling,
    /// How long it polls now.
    window: Duration,
    /// When it began to poll, if it does.
    since: Option<Instant>,
    /// Whether that is over until there is something to do, or it has slept.
    is_over: bool,
    period: Instant,
    /// Polled in this period.
    spent: Duration,
}

impl Idle {
    const FIRST: Duration = Duration::from_micros(4);

    /// It begins as if polling had been worth it.
    pub fn new(polling: Polling) -> Self {
        let window = if polling.mode == PollMode::Off { Duration::ZERO } else { polling.max };
        let now = Instant::now();
        Self { polling, window, since: None, is_over: false, period: now, spent: Duration::ZERO }
    }

    /// There was something to do.
    pub fn worked(&mut self) {
        if let Some(since) = self.since.take()
            && !self.is_over
        {
            self.spent += since.elapsed();
        }
        self.is_over = false;
    }

    /// There was nothing to do: whether to look again rather than sleep.
    pub fn keep_polling(&mut self) -> bool {
        !self.window.is_zero() && self.keep_polling_at(Instant::now())
    }

    fn keep_polling_at(&mut self, now: Instant) -> bool {
        if self.is_over {
            return false;
        }
        let since = *self.since.get_or_insert(now);
        let polled = now.saturating_duration_since(since);
        if polled < self.window && self.may_spend(polled, now) {
            return true;
        }
        self.spent += polled;
        self.is_over = true;
        false
    }

    /// Whether it may poll on, having polled so long now.
    fn may_spend(&mut self, polled: Duration, now: Instant) -> bool {
        if self.polling.cpu_percent >= 100 {
            return true;
        }
        if now.saturating_duration_since(self.period) >= PERIOD {
            (self.period, self.spent) = (now, Duration::ZERO);
        }
        self.spent + polled < PERIOD * u32::from(self.polling.cpu_percent) / 100
    }

    /// A sleep has taken `time`.
    pub fn slept(&mut self, time: Duration) {
        (self.since, self.is_over) = (None, false);
        if self.polling.mode != PollMode::Adaptive {
            return;
        }
        // One that was woken soon would have done better to wait awake, so the window grows; one that
        // slept long has polled in vain, so it shrinks, and soon there is no polling at all.
        if time < self.polling.max * 2 {
            self.window = (self.window * 2).clamp(Self::FIRST.min(self.polling.max), self.polling.max);
        } else {
            self.window /= 2;
            if self.window < Self::FIRST {
                self.window = Duration::ZERO;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn polling(mode: PollMode, max_us: u64, cpu_percent: u8) -> Polling {
        Polling { mode, max: Duration::from_micros(max_us), cpu_percent }
    }

    #[test]
    fn polling_grows_while_it_pays_and_ends_when_idle() {
        let mut idle = Idle::new(polling(PollMode::Adaptive, 50, 100));
        for _ in 0..10 {
            idle.slept(Duration::from_millis(10));
        }
        assert!(!idle.keep_polling(), "an idle queue does not poll");
        for _ in 0..10 {
            idle.slept(Duration::from_micros(20));
        }
        assert_eq!(idle.window, Duration::from_micros(50));
        assert!(idle.keep_polling());
    }

    #[test]
    fn polling_that_is_off_stays_off_and_fixed_polling_learns_nothing() {
        for (mode, max_us) in [(PollMode::Off, 50), (PollMode::Adaptive, 0), (PollMode::Fixed, 0)] {
            let mut idle = Idle::new(polling(mode, max_us, 100));
            for _ in 0..3 {
                idle.slept(Duration::ZERO);
                assert!(!idle.keep_polling(), "{mode:?} {max_us}");
            }
        }
        let mut idle = Idle::new(polling(PollMode::Fixed, 50, 100));
        for _ in 0..10 {
            idle.slept(Duration::from_secs(1));
            let now = Instant::now();
            assert!(idle.keep_polling_at(now));
            assert!(idle.keep_polling_at(now + Duration::from_micros(49)));
            assert!(!idle.keep_polling_at(now + Duration::from_micros(50)));
            assert!(!idle.keep_polling_at(now), "it is over until it has slept");
        }
    }

    /// How much of `time` is polled by a queue that has something to do every `gap_us`.
    fn polled(mut idle: Idle, gap_us: u64, time: Duration) -> f64 {
        let (begun, step) = (idle.period, Duration::from_micros(1));
        let (mut now, mut polled) = (begun, Duration::ZERO);
        while now - begun < time {
            let work = now + Duration::from_micros(gap_us);
            while now < work {
                let polls = idle.keep_polling_at(now);
                now += step;
                polled += if polls { step } else { Duration::ZERO };
            }
            // What `worked` does, by this clock.
            if let (Some(since), false) = (idle.since.take(), idle.is_over) {
                idle.spent += now - since;
            }
            idle.is_over = false;
        }
        polled.as_secs_f64() / time.as_secs_f64()
    }

    #[test]
    fn polling_keeps_to_its_part_of_a_processor() {
        for percent in [1, 5, 25, 60, 100] {
            for gap_us in [10, 40, 1000] {
                let idle = Idle::new(polling(PollMode::Fixed, 50, percent));
                let share = polled(idle, gap_us, Duration::from_secs(1));
                let wanted = f64::from(percent) / 100.0;
                let possible = (50.0 / gap_us as f64).min(1.0);
                assert!(share <= wanted + 0.002, "{percent} % allowed, {share} taken at {gap_us} us");
                let least = wanted.min(possible) - 0.02;
                assert!(share >= least, "{percent} % allowed, {share} taken at {gap_us} us");
            }
        }
    }
}
