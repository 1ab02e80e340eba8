//! Serves one disk on one socket: front ends one after another, for as long as the server runs.
//!
//! One connection is served at a time; the next waits in the socket's backlog. That is what VMMs
//! expect: libblkio connects once to ask and again to work, QEMU reconnects when it was restored.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::channel::Handle;
use super::message::{Connection, ConnectionError};
use super::session::{Outside, Session, SessionEnd};
use crate::pmem::guard;
use crate::volume::Disk;

/// Pause before accepting again when the process has run out of something.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// What an operator may choose.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// For thread names and log lines.
    pub name: String,
    /// Longest time an idle queue polls before it sleeps. It learns how much of that is worth it;
    /// zero turns polling off.
    pub poll_max: Duration,
    /// Guest memory a front end may share, in bytes, over all regions.
    pub guest_memory_max: u64,
    /// How long a ring that is to stop waits for a disk that returns nothing, where what it has can
    /// be submitted again (in-flight tracking) or nobody waits for it any more.
    pub stop_patience: Duration,
}

/// [`Options::stop_patience`] by default: longer than a disk retries, shorter than a VMM waits.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

impl Default for Options {
    fn default() -> Self {
        Self {
            name: String::from("disk"),
            poll_max: Duration::from_micros(32),
            guest_memory_max: 16 << 40,
            stop_patience: STOP_PATIENCE,
        }
    }
}

/// Where front ends come from.
#[derive(Debug)]
pub enum Endpoint {
    /// Any number of them, one after another.
    Listener(UnixListener),
    /// Just this one.
    Stream(UnixStream),
}

impl From<UnixListener> for Endpoint {
    fn from(listener: UnixListener) -> Self {
        Endpoint::Listener(listener)
    }
}

impl From<UnixStream> for Endpoint {
    fn from(stream: UnixStream) -> Self {
        Endpoint::Stream(stream)
    }
}

/// Ends a server from another thread. Clones end the same one.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<EventFd>);

impl Stopper {
    /// Asks the server to end: it finishes what is in flight, then [`Server::run`] returns. May be
    /// called any number of times, before and after.
    pub fn stop(&self) {
        // It can only fail by being full, which says the same.
        drop(self.0.write(1));
    }
}

/// Whether a front end is connected to a server, for whoever asks.
#[derive(Clone, Debug, Default)]
pub struct Presence(Arc<AtomicBool>);

impl Presence {
    /// Whether one is now.
    pub fn is_connected(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A disk on a socket.
pub struct Server<D: Disk> {
    endpoint: Endpoint,
    disk: Arc<D>,
    options: Options,
    stop: Stopper,
    presence: Presence,
    handle: Handle,
    /// What the disk's write cache was before any guest had a say.
    writeback: bool,
}

impl<D: Disk> Server<D> {
    /// A server that does nothing until [`Server::run`].
    ///
    /// # Errors
    /// The kernel refused a descriptor, or vanishing guest memory cannot be survived here.
    pub fn new(endpoint: impl Into<Endpoint>, disk: Arc<D>, options: Options) -> io::Result<Self> {
        // Front ends can truncate the memory they share.
        guard::install()?;
        let stop = Stopper(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?));
        let writeback = disk.write_cache();
        let (presence, handle) = (Presence::default(), Handle::new()?);
        Ok(Self { endpoint: endpoint.into(), disk, options, stop, presence, handle, writeback })
    }

    /// What ends this server.
    pub fn stopper(&self) -> Stopper {
        self.stop.clone()
    }

    /// Tells whether a front end is connected.
    pub fn presence(&self) -> Presence {
        self.presence.clone()
    }

    /// By which it is told that the disk's configuration has changed.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Serves until stopped, or until the one connection it was given ends. When it returns, no
    /// queue runs and every request taken was answered, but for those a disk did not answer within
    /// [`Options::stop_patience`].
    ///
    /// # Errors
    /// The listening socket failed. Nothing a front end does is an error here.
    pub fn run(self) -> io::Result<()> {
        match &self.endpoint {
            Endpoint::Stream(stream) => {
                self.serve(stream.try_clone()?);
                Ok(())
            }
            Endpoint::Listener(listener) => self.accept_each(listener),
        }
    }

    fn accept_each(&self, listener: &UnixListener) -> io::Result<()> {
        const TOKEN_STOP: u64 = 1;
        listener.set_nonblocking(true)?;
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        epoll.ctl(
            ControlOperation::Add,
            self.stop.0.as_raw_fd(),
            EpollEvent::new(EventSet::IN, TOKEN_STOP),
        )?;
        let mut events = [EpollEvent::default(); 2];
        loop {
            let count = match epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if events[..count].iter().any(|event| event.data() == TOKEN_STOP) {
                return Ok(());
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    if self.serve(stream) {
                        return Ok(());
                    }
                }
                Err(error) => self.accept_failed(error)?,
            }
        }
    }

    /// Decides whether an error of accept is the end.
    fn accept_failed(&self, error: io::Error) -> io::Result<()> {
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR | libc::ECONNABORTED) => Ok(()),
            Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                tracing::error!(disk = self.options.name, %error, "cannot accept a connection, trying again");
                std::thread::sleep(ACCEPT_RETRY);
                Ok(())
            }
            _ => Err(error),
        }
    }

    /// Serves one connection to its end: whether that was because the server is to stop.
    fn serve(&self, stream: UnixStream) -> bool {
        let name = self.options.name.as_str();
        let mut connection = match Connection::new(stream, self.stop.0.as_raw_fd()) {
            Ok(connection) => connection,
            Err(error) => {
                tracing::error!(disk = name, %error, "connection cannot be served");
                return false;
            }
        };
        tracing::info!(disk = name, "front end connected");
        let listener = match &self.endpoint {
            Endpoint::Listener(listener) => Some(listener.as_raw_fd()),
            Endpoint::Stream(_) => None,
        };
        let outside = Outside { changed: self.handle.clone(), listener };
        let session = Session::new(Arc::clone(&self.disk), self.options.clone(), self.writeback);
        self.presence.0.store(true, Ordering::Relaxed);
        let end = session.serve(&mut connection, &outside);
        self.presence.0.store(false, Ordering::Relaxed);
        self.handle.set_heard(false);
        match end {
            SessionEnd::Connection(ConnectionError::Stopped) => return true,
            SessionEnd::Connection(ConnectionError::Closed) => {
                tracing::info!(disk = name, "front end disconnected");
            }
            end => tracing::warn!(disk = name, reason = %end, "connection ended"),
        }
        false
    }
}
