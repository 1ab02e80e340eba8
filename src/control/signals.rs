//! What the process waits for while it serves: signals, and servers that end by themselves.
//!
//! SIGTERM, SIGINT, SIGUSR1 and SIGHUP are blocked before the first thread starts and read from a
//! signalfd, so they interrupt nothing and need no handler. After the first request to stop the
//! signals act as usual again: a second one ends a stop that takes too long. That is safe at any
//! instruction; it only leaves more to do for the next start. For the same reason a request to stop
//! that comes before there is anything to stop ends the process on the spot.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal;

use super::sys;

const SIGNALS: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGHUP];

/// Why the wait ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// SIGTERM or SIGINT; its name.
    Stop(&'static str),
    /// SIGUSR1.
    ShowCounters,
    /// SIGHUP.
    Reload,
    /// Every server ended by itself.
    AllEnded,
    /// Nothing, for as long as was asked.
    Quiet,
}

/// The wait of the main thread.
pub struct Signals {
    signals: File,
    watched: Watched,
    ended: Arc<Ended>,
}

/// What came first.
enum Seen {
    Signal(libc::c_int),
    Event,
    Nothing,
}

/// Signals, or an event that makes waiting for them pointless.
struct Watched {
    signals: File,
    event: EventFd,
    epoll: Epoll,
}

impl Watched {
    fn new(signals: File, event: EventFd) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for fd in [signals.as_raw_fd(), event.as_raw_fd()] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        Ok(Self { signals, event, epoll })
    }

    /// Sleeps until a signal comes, or for `longest`.
    fn next(&self, longest: Option<Duration>) -> io::Result<Seen> {
        let until = longest.map(|longest| Instant::now() + longest);
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        loop {
            match (&self.signals).read_exact(&mut info) {
                // `ssi_signo` is the structure's first field (signalfd(2)).
                Ok(()) => return Ok(Seen::Signal(i32::from_ne_bytes([info[0], info[1], info[2], info[3]]))),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if self.event.read().is_ok() {
                return Ok(Seen::Event);
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(Seen::Nothing);
            }
            // Rounded up, or the last millisecond would be spent awake.
            let left = left.map_or(-1, |left| i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX));
            match self.epoll.wait(left, &mut [EpollEvent::default(); 2]) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
    }
}

/// While it lives, a request to stop ends the process at once.
pub struct Starting {
    begun: EventFd,
    watch: Option<JoinHandle<()>>,
}

impl Drop for Starting {
    fn drop(&mut self) {
        // Written once, so the counter cannot be full.
        drop(self.begun.write(1));
        if let Some(watch) = self.watch.take()
            && watch.join().is_err()
        {
            tracing::warn!("the watch for signals during the start ended early");
        }
    }
}

struct Ended {
    running: AtomicU32,
    event: EventFd,
}

/// Held by a server's thread; when the last one is dropped, [`Event::AllEnded`] is due.
pub struct Running(Arc<Ended>);

impl Drop for Running {
    fn drop(&mut self) {
        if self.0.running.fetch_sub(1, Ordering::AcqRel) == 1 {
            // The counter cannot overflow: it is written once per server.
            drop(self.0.event.write(1));
        }
    }
}

/// Counts servers: from any thread, for as long as the process lives.
#[derive(Clone)]
pub struct Servers(Arc<Ended>);

impl Servers {
    /// Counts one more server.
    pub fn running(&self) -> Running {
        self.0.running.fetch_add(1, Ordering::AcqRel);
        Running(Arc::clone(&self.0))
    }
}

impl Signals {
    /// Blocks the signals. Call before any other thread exists.
    ///
    /// # Errors
    /// The kernel refused a descriptor.
    pub fn block() -> io::Result<Self> {
        Self::of(&SIGNALS)
    }

    fn of(signals: &[libc::c_int]) -> io::Result<Self> {
        let signals = sys::signal_descriptor(signals)?;
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let watched = Watched::new(signals.try_clone()?, event.try_clone()?)?;
        Ok(Self { signals, watched, ended: Arc::new(Ended { running: AtomicU32::new(0), event }) })
    }

    /// What counts the servers whose end is waited for.
    pub fn servers(&self) -> Servers {
        Servers(Arc::clone(&self.ended))
    }

    /// Watches from a thread of its own for a request to stop, and ends the process at once if one
    /// comes before the result is dropped.
    ///
    /// # Errors
    /// The kernel refused a descriptor or a thread.
    pub fn end_while_starting(&self) -> io::Result<Starting> {
        let begun = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let watched = Watched::new(self.signals.try_clone()?, begun.try_clone()?)?;
        let watch = std::thread::Builder::new().name("pcache-start".into()).spawn(move || {
            // A watch that fails leaves the signal for the main thread: late, but not lost.
            while let Ok(Seen::Signal(number)) = watched.next(None) {
                if number != libc::SIGUSR1 && number != libc::SIGHUP {
                    tracing::info!("stopped while starting");
                    std::process::exit(0);
                }
                tracing::info!("still starting");
            }
        })?;
        Ok(Starting { begun, watch: Some(watch) })
    }

    /// Sleeps until something happens, or for `longest`.
    ///
    /// # Errors
    /// The wait itself failed.
    pub fn wait(&mut self, longest: Option<Duration>) -> io::Result<Event> {
        let number = match self.watched.next(longest)? {
            Seen::Signal(number) => number,
            Seen::Event => return Ok(Event::AllEnded),
            Seen::Nothing => return Ok(Event::Quiet),
        };
        Ok(match number {
            libc::SIGTERM => Event::Stop("SIGTERM"),
            libc::SIGINT => Event::Stop("SIGINT"),
            libc::SIGHUP => Event::Reload,
            _ => Event::ShowCounters,
        })
    }

    /// Lets the signals act as usual: the next request to stop ends the process at once.
    pub fn unblock(self) {
        for number in [libc::SIGTERM, libc::SIGINT] {
            if let Err(error) = signal::unblock_signal(number) {
                tracing::warn!("signal {number} stays blocked: {error}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_ends_when_the_last_server_did() {
        // No signals: they are the whole process's, and here that is the test runner.
        let mut signals = Signals::of(&[]).unwrap();
        let (first, second) = (signals.servers().running(), signals.servers().running());
        drop(first);
        let waiter = std::thread::spawn(move || signals.wait(None).unwrap());
        drop(second);
        assert_eq!(waiter.join().unwrap(), Event::AllEnded);
    }

    #[test]
    fn a_wait_without_anything_to_wait_for_ends_in_its_time() {
        let mut signals = Signals::of(&[]).unwrap();
        let _running = signals.servers().running();
        let begun = Instant::now();
        assert_eq!(signals.wait(Some(Duration::from_millis(30))).unwrap(), Event::Quiet);
        assert!(begun.elapsed() >= Duration::from_millis(30));
    }

    #[test]
    fn the_watch_of_the_start_ends_with_it() {
        let signals = Signals::of(&[]).unwrap();
        drop(signals.end_while_starting().unwrap());
    }
}
