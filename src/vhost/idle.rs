//! Waiting for work: how long to poll, and where to sleep.
//!
//! Invariants:
//! - whatever is signalled between the last look and the sleep ends the sleep at once;
//! - an idle queue costs no processor time, unless its driver has no way to kick it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::sync;

/// First and last length of a sleep of a queue without a kick descriptor.
const NAP_MIN: Duration = Duration::from_micros(10);
const NAP_MAX: Duration = Duration::from_millis(1);

/// How long to poll before sleeping: as long as has lately been worth it.
///
/// Sleeping and being woken costs tens of microseconds on each side. A queue that was woken within
/// about that time would have done better to wait awake, so the window grows; one that slept long
/// polled in vain, so it shrinks, and an idle queue soon polls not at all.
#[derive(Debug)]
pub(super) struct Idle {
    max: Duration,
    window: Duration,
    since: Option<Instant>,
}

impl Idle {
    const FIRST: Duration = Duration::from_micros(4);

    /// A queue may poll for `max` at most; it begins as if that had been worth it.
    pub fn new(max: Duration) -> Self {
        Self { max, window: max, since: None }
    }

    /// There was something to do.
    pub fn worked(&mut self) {
        self.since = None;
    }

    /// There was nothing to do: whether to look again rather than sleep.
    pub fn keep_polling(&mut self) -> bool {
        if self.window.is_zero() {
            return false;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        since.elapsed() < self.window
    }

    /// A sleep has taken `time`.
    pub fn slept(&mut self, time: Duration) {
        self.since = None;
        if time < self.max * 2 {
            self.window = (self.window * 2).clamp(Self::FIRST.min(self.max), self.max);
        } else {
            self.window /= 2;
            if self.window < Self::FIRST {
                self.window = Duration::ZERO;
            }
        }
    }
}

/// Where the thread sleeps.
#[derive(Debug)]
pub(super) struct Sleeper {
    epoll: Epoll,
    has_kick: bool,
    /// Without a kick: the next sleep's length.
    nap: Duration,
}

impl Sleeper {
    /// Wakes at `event`, and at `kick` if the driver has one; both must stay open.
    ///
    /// # Errors
    /// The kernel refused a resource, or `kick` cannot be waited for.
    pub fn new(event: &EventFd, kick: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        // Edge-triggered: neither descriptor is ever read. Every write to an eventfd is an edge,
        // and a counter of 64 bits does not fill up.
        let interest = |token| EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest(0))?;
        if let Some(kick) = kick {
            epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), interest(1))?;
        }
        Ok(Self { epoll, has_kick: kick.is_some(), nap: NAP_MIN })
    }

    /// Whether the driver can wake it.
    pub fn is_kicked(&self) -> bool {
        self.has_kick
    }

    /// There was something to do: the next nap is a short one.
    pub fn worked(&mut self) {
        self.nap = NAP_MIN;
    }

    /// Sleeps until an event, for `limit` at most, or for a nap when nobody will kick; `woken_only`
    /// says that the ring is not looked at any more. Returns the time it took.
    pub fn sleep(&mut self, woken_only: bool, limit: Option<Duration>) -> Duration {
        let start = Instant::now();
        let mut events = [EpollEvent::default(); 2];
        if self.has_kick || woken_only {
            // Errors are EINTR; the loop looks again anyway.
            let limit_ms = limit.map_or(-1, |limit| i32::try_from(limit.as_millis() + 1).unwrap_or(i32::MAX));
            sync::block(limit_ms, |timeout| self.epoll.wait(timeout, &mut events).is_ok_and(|n| n > 0));
        } else if self.nap < NAP_MAX {
            sync::thread::sleep(self.nap);
            self.nap *= 2;
        } else {
            let nap = NAP_MAX.as_millis() as i32;
            sync::block(nap, |timeout| self.epoll.wait(timeout, &mut events).is_ok_and(|n| n > 0));
        }
        start.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn polling_grows_while_it_pays_and_ends_when_idle() {
        let max = Duration::from_micros(50);
        let mut idle = Idle::new(max);
        for _ in 0..10 {
            idle.slept(Duration::from_millis(10));
        }
        assert!(!idle.keep_polling(), "an idle queue does not poll");
        for _ in 0..10 {
            idle.slept(Duration::from_micros(20));
        }
        assert_eq!(idle.window, max);
        assert!(idle.keep_polling());
    }

    #[test]
    fn polling_that_is_turned_off_stays_off() {
        let mut idle = Idle::new(Duration::ZERO);
        for _ in 0..3 {
            idle.slept(Duration::ZERO);
            assert!(!idle.keep_polling());
        }
    }

    #[test]
    fn what_is_signalled_before_the_sleep_ends_it() {
        let (event, kick) =
            (EventFd::new(EFD_NONBLOCK).unwrap(), std::os::unix::net::UnixStream::pair().unwrap());
        let mut sleeper = Sleeper::new(&event, Some(kick.0.as_fd())).unwrap();
        assert!(sleeper.is_kicked());
        for _ in 0..3 {
            // Never read, and yet every write counts.
            event.write(1).unwrap();
            sleeper.sleep(false, None);
            std::io::Write::write_all(&mut &kick.1, &[1]).unwrap();
            sleeper.sleep(false, None);
        }
    }

    #[test]
    fn without_a_kick_naps_grow_to_their_limit_and_start_short_again() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut sleeper = Sleeper::new(&event, None).unwrap();
        for _ in 0..20 {
            sleeper.sleep(false, None);
        }
        assert!(sleeper.nap >= NAP_MAX);
        sleeper.worked();
        assert_eq!(sleeper.nap, NAP_MIN);
        event.write(1).unwrap();
        sleeper.sleep(true, None);
    }
}
