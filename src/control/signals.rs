//! What the process waits for while it serves: signals, and servers that end by themselves.
//!
//! SIGTERM, SIGINT and SIGUSR1 are blocked before the first thread starts and read from a
//! signalfd, so they interrupt nothing and need no handler. After the first request to stop the
//! signals act as usual again: a second one ends a stop that takes too long. That is safe at any
//! instruction; it only leaves more to do for the next start.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal;

use super::sys;

const SIGNALS: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1];

/// Why the wait ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// SIGTERM or SIGINT; its name.
    Stop(&'static str),
    /// SIGUSR1.
    ShowCounters,
    /// Every server ended by itself.
    AllEnded,
}

/// The wait of the main thread.
pub struct Signals {
    signals: File,
    ended: Arc<Ended>,
    epoll: Epoll,
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

impl Signals {
    /// Blocks the signals. Call before any other thread exists.
    ///
    /// # Errors
    /// The kernel refused a descriptor.
    pub fn block() -> io::Result<Self> {
        let signals = sys::signal_descriptor(&SIGNALS)?;
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let epoll = Epoll::new()?;
        for fd in [signals.as_raw_fd(), event.as_raw_fd()] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        Ok(Self { signals, ended: Arc::new(Ended { running: AtomicU32::new(0), event }), epoll })
    }

    /// Counts one more server.
    pub fn running(&self) -> Running {
        self.ended.running.fetch_add(1, Ordering::AcqRel);
        Running(Arc::clone(&self.ended))
    }

    /// Sleeps until something happens.
    ///
    /// # Errors
    /// The wait itself failed.
    pub fn wait(&mut self) -> io::Result<Event> {
        loop {
            if let Some(event) = self.next_signal()? {
                return Ok(event);
            }
            if self.ended.event.read().is_ok() {
                return Ok(Event::AllEnded);
            }
            match self.epoll.wait(-1, &mut [EpollEvent::default(); 2]) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
    }

    fn next_signal(&mut self) -> io::Result<Option<Event>> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        match self.signals.read_exact(&mut info) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
        // `ssi_signo` is the structure's first field (signalfd(2)).
        let number = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
        Ok(Some(match number {
            libc::SIGTERM => Event::Stop("SIGTERM"),
            libc::SIGINT => Event::Stop("SIGINT"),
            _ => Event::ShowCounters,
        }))
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
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let epoll = Epoll::new().unwrap();
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, 0)).unwrap();
        // An empty signal set: signals are the whole process's, and here they are the test runner's.
        let mut signals = Signals {
            signals: sys::signal_descriptor(&[]).unwrap(),
            ended: Arc::new(Ended { running: AtomicU32::new(0), event }),
            epoll,
        };
        let (first, second) = (signals.running(), signals.running());
        drop(first);
        let waiter = std::thread::spawn(move || signals.wait().unwrap());
        drop(second);
        assert_eq!(waiter.join().unwrap(), Event::AllEnded);
    }
}
