//! The world the engine runs in: memory, disk and time are injected, with static dispatch, so the
//! same engine runs on a host and in a simulation without threads, time or randomness.

use std::time::Instant;

use crate::backing::Backing;
use crate::pmem::Pmem;

/// One choice of memory, disk and clock.
pub trait Env: Send + Sync + Sized + 'static {
    /// The fast side.
    type Pmem: Pmem;
    /// The slow side.
    type Backing: Backing;
    /// Time.
    type Clock: Clock;

    /// Threads that a start may use. One, where everything has to come in the same order each time.
    fn threads() -> usize {
        std::thread::available_parallelism().map_or(1, |n| n.get().min(16))
    }
}

/// Time, as the engine needs it.
pub trait Clock: Send + Sync + 'static {
    /// Milliseconds since some fixed moment; never goes back.
    fn now_ms(&self) -> u64;

    /// Microseconds since the same moment.
    fn now_us(&self) -> u64 {
        self.now_ms() * 1000
    }

    /// Nanoseconds since the same moment, to measure by and to decide nothing by: looking at it changes
    /// nothing, not even where time goes on by being looked at.
    fn now_ns(&self) -> u64 {
        self.now_us() * 1000
    }

    /// Milliseconds since 1970, for what is written to the media.
    fn unix_ms(&self) -> u64;
}

/// The host's clock.
#[derive(Debug)]
pub struct SystemClock(Instant);

impl Default for SystemClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for SystemClock {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn now_ns(&self) -> u64 {
        let elapsed = self.0.elapsed();
        elapsed.as_secs() * 1_000_000_000 + u64::from(elapsed.subsec_nanos())
    }

    fn unix_ms(&self) -> u64 {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
    }
}
