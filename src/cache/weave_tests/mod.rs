//! Interleavings inside a call: the engine's own code under a scheduler that tries many orders.
//!
//! The crash simulation steps the engine from one thread, so two calls never overlap there. Here
//! they do: with the feature `weave` every lock, atomic access and media access of the engine is a
//! point at which another thread may go on (`src/sync.rs`), and each test is run through many
//! orders of these points: half of them at random, half by PCT, which finds a bug that needs few
//! changes of turn with a known probability.
//!
//! ```text
//!  parts     one protocol at a time, over the engine's own types: epochs, stripes, sections, tickets
//!  index     readers and writers of one index
//!  media     the liveness words and the life of a segment, on memory that forgets what is not fenced
//!  engine    queues, write-back, housekeeper and syncer together, crashed in the middle
//! ```
//!
//! Without the feature, under Miri, `parts` and `index` run on real threads: the scheduler knows no
//! weak memory, Miri does. What a test itself shares between threads is therefore relaxed: it must
//! not order what the engine leaves unordered.
//!
//! A failure names its seed; `PCACHE_WEAVE_SEED` runs that seed alone, `PCACHE_WEAVE_TIMES`
//! multiplies the number of orders. See `docs/testing.md`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[cfg(feature = "weave")]
mod engine;
mod index;
#[cfg(feature = "weave")]
mod media;
mod parts;
#[cfg(feature = "weave")]
mod world;

#[cfg(feature = "weave")]
pub(crate) use scheduled::{pause, weave};
#[cfg(not(feature = "weave"))]
pub(crate) use threaded::{pause, weave};

/// Real threads: the orders, and what weak memory makes of them, are Miri's.
#[cfg(not(feature = "weave"))]
mod threaded {
    /// Runs `test` once: Miri runs the whole program under one seed after the other.
    pub(crate) fn weave(_: u64, test: impl Fn() + Send + Sync + 'static) {
        test();
    }

    /// Another thread's turn, perhaps.
    pub(crate) fn pause() {
        std::thread::yield_now();
    }
}

#[cfg(feature = "weave")]
mod scheduled {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
    use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

    /// Orders tried under one seed.
    const RUNS_PER_SEED: usize = 25;
    /// Changes of turn that PCT places in a run, beside the turns that end by themselves.
    const PCT_DEPTH: usize = 4;

    /// Says which seed has failed, unless it has not.
    struct Told<'a>(u64, &'a AtomicU64);

    impl Drop for Told<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                let runs = self.1.load(Ordering::Relaxed);
                eprintln!("PCACHE_WEAVE_SEED={} leads here again, in run {runs} of that seed", self.0);
            }
        }
    }

    fn number(name: &str) -> Option<u64> {
        let text = std::env::var(name).ok()?;
        Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
    }

    /// Runs `test` through `seeds` × [`RUNS_PER_SEED`] orders of its threads' steps.
    pub(crate) fn weave(seeds: u64, test: impl Fn() + Send + Sync + 'static) {
        let test = Arc::new(test);
        let seeds = match number("PCACHE_WEAVE_SEED") {
            Some(seed) => seed..=seed,
            None => 1..=seeds * number("PCACHE_WEAVE_TIMES").unwrap_or(1),
        };
        let mut config = Config::new();
        config.stack_size = 1 << 20;
        config.failure_persistence = FailurePersistence::None;
        config.max_steps = MaxSteps::FailAfter(2_000_000);
        config.silence_warnings = true;
        for seed in seeds {
            let scheduler: Box<dyn Scheduler + Send> = match seed % 2 {
                0 => Box::new(RandomScheduler::new_from_seed(seed, RUNS_PER_SEED)),
                _ => Box::new(PctScheduler::new_from_seed(seed, PCT_DEPTH, RUNS_PER_SEED)),
            };
            let runs = Arc::new(AtomicU64::new(0));
            let _told = Told(seed, &runs);
            let (test, runs) = (Arc::clone(&test), Arc::clone(&runs));
            Runner::new(scheduler, config.clone()).run(move || {
                runs.fetch_add(1, Ordering::Relaxed);
                test();
            });
        }
    }

    /// Another thread's turn, perhaps. Not a yield: PCT takes that for a sign of waiting.
    pub(crate) fn pause() {
        let point = crate::sync::atomic::AtomicBool::new(false);
        point.store(true, Ordering::SeqCst);
    }
}
