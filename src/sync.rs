//! Locks, atomics and threads for code whose interleavings are tested: std's, nothing else.
//!
//! In unit tests with the feature `weave` they are a scheduler's instead: every lock, atomic access
//! and yield is then a point at which another thread may go on, and the tests in
//! `cache/weave_tests` and `vhost/weave_tests.rs` run the product's own code through as many orders
//! of these points as they have time for. No other build sees it, not even one with the feature.
//!
//! The scheduler knows no weak memory: each atomic access counts as sequentially consistent. What
//! rests on orderings is checked by running the same protocols under Miri (`docs/testing.md`).
//! A timed wait never times out there, so a lost wake-up is a hang and not a delay.

#[cfg(not(all(test, feature = "weave")))]
mod tools {
    pub(crate) use std::sync::{
        Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic,
    };
    pub(crate) use std::{hint, thread};

    /// Memory that somebody else uses at the same time is about to be touched.
    #[inline(always)]
    pub(crate) fn access() {}

    /// Waits in the kernel: `wait` does it, for so many milliseconds at most (-1: without end), and
    /// says whether what it waited for has come.
    pub(crate) fn block(timeout_ms: i32, mut wait: impl FnMut(i32) -> bool) {
        wait(timeout_ms);
    }
}

#[cfg(all(test, feature = "weave"))]
mod tools {
    pub(crate) use shuttle::hint;

    pub(crate) fn access() {
        atomic::AtomicBool::new(false).store(true, atomic::Ordering::SeqCst);
    }

    /// All threads are one: while it slept in the kernel nobody could wake it.
    pub(crate) fn block(timeout_ms: i32, mut wait: impl FnMut(i32) -> bool) {
        while !wait(0) && timeout_ms < 0 {
            thread::yield_now();
        }
    }
    pub(crate) use shuttle::sync::{
        Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic,
    };

    pub(crate) mod thread {
        pub(crate) use shuttle::thread::*;

        /// Whoever sleeps waits for somebody: its turn is over.
        pub(crate) fn sleep(_: std::time::Duration) {
            yield_now();
        }
    }
}

pub(crate) use tools::*;
