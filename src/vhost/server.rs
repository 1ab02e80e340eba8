//! Serves one disk on one socket: front ends one after another, for as long as the server runs.
//!
//! One connection is served at a time; the next waits in the socket's backlog. That is what VMMs
//! expect: libblkio connects once to ask and again to work, QEMU reconnects when it was restored.
//!
//! A server ends in one of two ways. Stopped, it hangs up. Asked to hand over, it comes to rest and
//! returns what it served with, connection and all, for [`Server::resumed`] here or in another process:
//! the VMM notices a pause and nothing else.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::channel::Handle;
use super::message::{Connection, ConnectionError};
use super::session::{Outside, ParkedSession, Saved, Session, SessionEnd};
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
pub struct Stopper {
    event: Arc<EventFd>,
    hands_over: Arc<AtomicBool>,
}

impl Stopper {
    fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { event: Arc::new(event), hands_over: Arc::default() })
    }

    /// Asks the server to come to rest: it finishes what is in flight, then
    /// [`Server::run_until_parked`] returns with what it served.
    pub fn hand_over(&self) {
        self.hands_over.store(true, Ordering::SeqCst);
        self.stop();
    }

    /// Asks the server to end: it finishes what is in flight, then [`Server::run`] returns. May be
    /// called any number of times, before and after.
    pub fn stop(&self) {
        // It can only fail by being full, which says the same.
        drop(self.event.write(1));
    }
}

/// What a server at rest leaves to the next one.
#[derive(Debug)]
pub struct Parked {
    /// Where front ends come from, if more than one may.
    pub listener: Option<UnixListener>,
    /// The one that is connected.
    pub session: Option<ParkedSession>,
}

/// What became of a connection.
enum Served {
    /// It ended by itself.
    Ended,
    /// It was ended.
    Stopped,
    /// It goes on elsewhere.
    Parked(ParkedSession),
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
    /// None where the one connection has begun elsewhere.
    endpoint: Option<Endpoint>,
    disk: Arc<D>,
    options: Options,
    stop: Stopper,
    presence: Presence,
    /// What an earlier server was told by the connection that comes first.
    told: Option<(UnixStream, Vec<Saved>)>,
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
        Self::with(Some(endpoint.into()), None, disk, options)
    }

    /// A server that goes on where another one came to rest.
    ///
    /// # Errors
    /// As for [`Server::new`].
    pub fn resumed(parked: Parked, disk: Arc<D>, options: Options) -> io::Result<Self> {
        let told = parked.session.map(|session| (session.stream, session.messages));
        Self::with(parked.listener.map(Endpoint::Listener), told, disk, options)
    }

    fn with(
        endpoint: Option<Endpoint>,
        told: Option<(UnixStream, Vec<Saved>)>,
        disk: Arc<D>,
        options: Options,
    ) -> io::Result<Self> {
        // Front ends can truncate the memory they share.
        guard::install()?;
        let (stop, writeback) = (Stopper::new()?, disk.write_cache());
        let (presence, handle) = (Presence::default(), Handle::new()?);
        Ok(Self { endpoint, disk, options, stop, presence, told, handle, writeback })
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
        self.run_until_parked().map(drop)
    }

    /// Serves like [`Server::run`]; when it was asked to hand over, returns what is left to the next
    /// server.
    ///
    /// # Errors
    /// The listening socket failed. Nothing a front end does is an error here.
    pub fn run_until_parked(mut self) -> io::Result<Option<Parked>> {
        let served = match self.told.take() {
            Some((stream, messages)) => {
                let listener = match &self.endpoint {
                    Some(Endpoint::Listener(listener)) => Some(listener.as_raw_fd()),
                    _ => None,
                };
                self.serve(stream, messages, listener)
            }
            None => Served::Ended,
        };
        match (served, self.endpoint.take()) {
            (Served::Parked(session), Some(Endpoint::Listener(listener))) => {
                Ok(Some(Parked { listener: Some(listener), session: Some(session) }))
            }
            (Served::Parked(session), _) => Ok(Some(Parked { listener: None, session: Some(session) })),
            (Served::Ended, Some(Endpoint::Stream(stream))) => match self.serve(stream, Vec::new(), None) {
                Served::Parked(session) => Ok(Some(Parked { listener: None, session: Some(session) })),
                Served::Ended | Served::Stopped => Ok(None),
            },
            (Served::Ended, Some(Endpoint::Listener(listener))) => {
                let session = match self.accept_each(&listener)? {
                    Served::Parked(session) => Some(session),
                    Served::Ended | Served::Stopped => None,
                };
                Ok(self.hands_over().then_some(Parked { listener: Some(listener), session }))
            }
            (Served::Stopped, Some(Endpoint::Listener(listener))) if self.hands_over() => {
                Ok(Some(Parked { listener: Some(listener), session: None }))
            }
            (Served::Ended | Served::Stopped, _) => Ok(None),
        }
    }

    fn hands_over(&self) -> bool {
        self.stop.hands_over.load(Ordering::SeqCst)
    }

    fn accept_each(&self, listener: &UnixListener) -> io::Result<Served> {
        const TOKEN_STOP: u64 = 1;
        listener.set_nonblocking(true)?;
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        epoll.ctl(
            ControlOperation::Add,
            self.stop.event.as_raw_fd(),
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
                return Ok(Served::Stopped);
            }
            match listener.accept() {
                Ok((stream, _)) => match self.serve(stream, Vec::new(), Some(listener.as_raw_fd())) {
                    Served::Ended => {}
                    end => return Ok(end),
                },
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

    /// Serves one connection to its end, or until it is to go on elsewhere. `told` is what an earlier
    /// server was told by it, and `listener` where the next one would come from.
    fn serve(&self, stream: UnixStream, told: Vec<Saved>, listener: Option<RawFd>) -> Served {
        let name = self.options.name.as_str();
        let mut connection = match Connection::new(stream, self.stop.event.as_raw_fd()) {
            Ok(connection) => connection,
            Err(error) => {
                tracing::error!(disk = name, %error, "connection cannot be served");
                return Served::Ended;
            }
        };
        tracing::info!(disk = name, resumed = !told.is_empty(), "front end connected");
        let outside = Outside { changed: self.handle.clone(), listener };
        let mut session = Session::new(Arc::clone(&self.disk), self.options.clone(), self.writeback);
        self.presence.0.store(true, Ordering::Relaxed);
        let end = match session.resume(told) {
            Ok(()) => session.serve(&mut connection, &outside),
            Err(end) => end,
        };
        self.handle.set_heard(false);
        let served = match end {
            SessionEnd::Connection(ConnectionError::Stopped) if self.hands_over() => {
                self.park(&mut session, connection)
            }
            SessionEnd::Connection(ConnectionError::Stopped) => Served::Stopped,
            SessionEnd::Connection(ConnectionError::Closed) => {
                tracing::info!(disk = name, "front end disconnected");
                Served::Ended
            }
            end => {
                tracing::warn!(disk = name, reason = %end, "connection ended");
                Served::Ended
            }
        };
        session.end();
        // What the next front end finds is what no guest has had a say in.
        self.disk.set_write_cache(self.writeback);
        self.presence.0.store(false, Ordering::Relaxed);
        served
    }

    fn park(&self, session: &mut Session<D>, connection: Connection) -> Served {
        let name = self.options.name.as_str();
        let Some(stream) = connection.into_stream() else {
            tracing::warn!(
                disk = name,
                "the front end is in the middle of a message: it has to connect again"
            );
            return Served::Stopped;
        };
        match session.park() {
            Ok((messages, has_left_requests)) => {
                Served::Parked(ParkedSession { stream, messages, has_left_requests })
            }
            Err(error) => {
                tracing::warn!(disk = name, %error, "the front end has to connect again");
                Served::Stopped
            }
        }
    }
}
