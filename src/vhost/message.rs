//! Messages on the socket: framing, descriptors, answers (vhost-user spec, "Message
//! Specification").
//!
//! Invariants:
//! - a message is read whole, header then body, before anything looks at it;
//! - the descriptors that came with a message are closed with it unless a handler takes them;
//! - no message carries a socket but the one that hands over the back end's channel: the peer's own end
//!   of this connection, held by us, would keep it open after the peer has gone, so that nobody else
//!   would ever be served (`channel` says what becomes of that one);
//! - waiting does not outlast a stop request, but that a message or an answer that has begun has
//!   [`STOP_GRACE`] to end: between two messages the connection can go on in another process;
//! - a peer that stalls in the middle of a message, or does not read its answers, loses the connection.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};
use vm_memory::ByteValued;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::fds;

pub(super) const HEADER_LEN: usize = 12;
pub(super) const VERSION: u32 = 1;
pub(super) const VERSION_MASK: u32 = 3;
pub(super) const FLAG_REPLY: u32 = 1 << 2;
pub(super) const FLAG_NEED_REPLY: u32 = 1 << 3;

/// How long a peer may take between the first and the last byte of a message, or to take an answer.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a stop waits for the rest of what has begun.
const STOP_GRACE: Duration = Duration::from_millis(200);

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    /// Between two messages: the ordinary end.
    #[error("the peer has closed the connection")]
    Closed,
    /// Somebody called [`Stopper::stop`](super::Stopper::stop).
    #[error("stopped")]
    Stopped,
    /// The peer broke the framing.
    #[error("not a vhost-user message: {0}")]
    Framing(&'static str),
    /// The peer stopped in the middle.
    #[error("the peer stalled for {} s in the middle of a message", MESSAGE_TIMEOUT.as_secs())]
    Stalled,
    /// The socket failed.
    #[error("socket: {0}")]
    Io(#[from] io::Error),
}

/// One request of the front end.
#[derive(Debug)]
pub(super) struct Message {
    /// Which (`FrontendReq`), not yet known to be one.
    pub code: u32,
    /// Whether the sender asks for an acknowledgement.
    pub need_reply: bool,
    /// What follows the header.
    pub body: Vec<u8>,
    /// What came with it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The body as a value of exactly that size.
    pub fn body_as<T: ByteValued + Default>(&self) -> Option<T> {
        exactly(&self.body)
    }
}

/// `bytes` as a value of exactly that size.
pub(super) fn exactly<T: ByteValued + Default>(bytes: &[u8]) -> Option<T> {
    let mut value = T::default();
    (bytes.len() == size_of::<T>()).then(|| {
        value.as_mut_slice().copy_from_slice(bytes);
        value
    })
}

/// A connected front end.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    readable: Epoll,
    writable: Epoll,
    /// What is waited for between two messages: the above, and whatever else has been added.
    idle: Epoll,
    /// Whether a stop came in the middle of something, which did not end in time.
    is_torn: bool,
}

const TOKEN_PEER: u64 = 0;
const TOKEN_STOP: u64 = 1;
/// First of those that are added.
const TOKEN_MORE: u64 = 2;

impl Connection {
    /// Takes over `stream`; `stop` becomes readable when the server is to end.
    ///
    /// # Errors
    /// The kernel refused a resource.
    pub fn new(stream: UnixStream, stop: RawFd) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let peer = stream.as_raw_fd();
        let readable = Epoll::new()?;
        readable.ctl(ControlOperation::Add, peer, EpollEvent::new(EventSet::IN, TOKEN_PEER))?;
        readable.ctl(ControlOperation::Add, stop, EpollEvent::new(EventSet::IN, TOKEN_STOP))?;
        let writable = Epoll::new()?;
        writable.ctl(ControlOperation::Add, peer, EpollEvent::new(EventSet::OUT, TOKEN_PEER))?;
        writable.ctl(ControlOperation::Add, stop, EpollEvent::new(EventSet::IN, TOKEN_STOP))?;
        let idle = Epoll::new()?;
        idle.ctl(ControlOperation::Add, peer, EpollEvent::new(EventSet::IN, TOKEN_PEER))?;
        idle.ctl(ControlOperation::Add, stop, EpollEvent::new(EventSet::IN, TOKEN_STOP))?;
        Ok(Self { stream, readable, writable, idle, is_torn: false })
    }

    /// The socket, for whoever serves this front end next; `None` in the middle of a message.
    pub fn into_stream(self) -> Option<UnixStream> {
        (!self.is_torn).then_some(self.stream)
    }

    /// Looks out between two messages for `fd` to become readable as well; see [`Connection::look_out`].
    ///
    /// # Errors
    /// The kernel refused a resource.
    pub fn watch(&self, fd: RawFd, number: u64) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, TOKEN_MORE + number);
        self.idle.ctl(ControlOperation::Add, fd, event)
    }

    /// Ends that. A descriptor that nobody else has open may simply be closed.
    pub fn unwatch(&self, fd: RawFd) {
        // It fails where it is not watched, or not open any more.
        drop(self.idle.ctl(ControlOperation::Delete, fd, EpollEvent::default()));
    }

    /// Waits until a message begins to arrive, and gives `heard` the number of each watched descriptor
    /// that becomes readable until then.
    ///
    /// # Errors
    /// Any; the connection is of no further use.
    pub fn look_out(&self, mut heard: impl FnMut(u64)) -> Result<(), ConnectionError> {
        loop {
            let mut events = [EpollEvent::default(); 5];
            let count = match self.idle.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            let tokens = || events[..count].iter().map(EpollEvent::data);
            tokens().filter_map(|token| token.checked_sub(TOKEN_MORE)).for_each(&mut heard);
            if tokens().any(|token| token == TOKEN_PEER) {
                return Ok(());
            }
            if tokens().any(|token| token == TOKEN_STOP) {
                return Err(ConnectionError::Stopped);
            }
        }
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// Any; the connection is of no further use.
    pub fn receive(&mut self) -> Result<Message, ConnectionError> {
        let mut fds = Vec::new();
        let mut header = [0; HEADER_LEN];
        self.fill(&mut header, &mut fds, None)?;
        let deadline = Instant::now() + MESSAGE_TIMEOUT;
        let field =
            |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (code, flags, size) = (field(0), field(4), field(8) as usize);
        if flags & VERSION_MASK != VERSION {
            return Err(ConnectionError::Framing("unknown version"));
        }
        if flags & FLAG_REPLY != 0 {
            return Err(ConnectionError::Framing("an answer to nothing"));
        }
        if size > MAX_MSG_SIZE {
            return Err(ConnectionError::Framing("too long"));
        }
        let mut body = vec![0; size];
        self.fill(&mut body, &mut fds, Some(deadline))?;
        Ok(Message { code, need_reply: flags & FLAG_NEED_REPLY != 0, body, fds })
    }

    /// Answers the request `code`.
    ///
    /// # Errors
    /// Any; the connection is of no further use.
    pub fn reply(&mut self, code: u32, body: &[u8], fd: Option<RawFd>) -> Result<(), ConnectionError> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + body.len());
        for field in [code, VERSION | FLAG_REPLY, body.len() as u32] {
            bytes.extend_from_slice(&field.to_ne_bytes());
        }
        bytes.extend_from_slice(body);
        let mut deadline = Instant::now() + MESSAGE_TIMEOUT;
        let mut sent = 0;
        while sent < bytes.len() {
            // Descriptors go with the first byte.
            let attached: &[RawFd] = if sent == 0 { fd.as_slice() } else { &[] };
            match self.stream.send_with_fds(&[&bytes[sent..]], attached) {
                Ok(count) => sent += count,
                Err(error) => match io::Error::from_raw_os_error(error.errno()) {
                    error if error.kind() == io::ErrorKind::WouldBlock => {
                        if wait(&self.writable, Some(deadline))? {
                            deadline = self.hurry(EventSet::OUT, deadline)?;
                        }
                    }
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error.into()),
                },
            }
        }
        Ok(())
    }

    /// A stop has come in the middle of something: from now on it alone is waited for, and not for
    /// long. Returns until when.
    fn hurry(&mut self, awaited: EventSet, deadline: Instant) -> Result<Instant, ConnectionError> {
        let deadline = deadline.min(Instant::now() + STOP_GRACE);
        self.is_torn = true;
        let alone = Epoll::new()?;
        alone.ctl(ControlOperation::Add, self.stream.as_raw_fd(), EpollEvent::new(awaited, TOKEN_PEER))?;
        match wait(&alone, Some(deadline)) {
            Ok(_) => {}
            Err(ConnectionError::Stalled) => return Err(ConnectionError::Stopped),
            Err(error) => return Err(error),
        }
        self.is_torn = false;
        Ok(deadline)
    }

    /// Reads all of `buf`. Without a deadline the first byte may take for ever, and the rest has
    /// [`MESSAGE_TIMEOUT`].
    fn fill(
        &mut self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        deadline: Option<Instant>,
    ) -> Result<(), ConnectionError> {
        let mut deadline = deadline;
        let mut filled = 0;
        while filled < buf.len() {
            match fds::receive(&self.stream, &mut buf[filled..], fds) {
                Ok(0) if filled == 0 && deadline.is_none() => return Err(ConnectionError::Closed),
                Ok(0) => return Err(ConnectionError::Framing("cut short")),
                Ok(count) => {
                    filled += count;
                    let is_header = buf.len() == HEADER_LEN && deadline.is_none();
                    if fds.iter().any(|fd| fds::is_socket(fd.as_fd()))
                        && !(is_header && hands_over_channel(&buf[..filled]))
                    {
                        return Err(ConnectionError::Framing("a socket came as a descriptor"));
                    }
                    deadline = deadline.or_else(|| Some(Instant::now() + MESSAGE_TIMEOUT));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if wait(&self.readable, deadline)? {
                        let Some(begun) = deadline else { return Err(ConnectionError::Stopped) };
                        deadline = Some(self.hurry(EventSet::IN, begun)?);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(ConnectionError::Closed);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Whether a header is that of a message, without a body, with the socket for the back end's requests.
fn hands_over_channel(header: &[u8]) -> bool {
    let code = u32::from(FrontendReq::SET_BACKEND_REQ_FD).to_ne_bytes();
    header.len() == HEADER_LEN && header[..4] == code && header[8..] == [0; 4]
}

/// Waits for an event: whether it was the stop request.
fn wait(epoll: &Epoll, deadline: Option<Instant>) -> Result<bool, ConnectionError> {
    let timeout = match deadline.map(|at| at.saturating_duration_since(Instant::now())) {
        None => -1,
        Some(Duration::ZERO) => return Err(ConnectionError::Stalled),
        Some(left) => left.as_millis() as i32 + 1,
    };
    let mut events = [EpollEvent::default(); 2];
    match epoll.wait(timeout, &mut events) {
        Ok(count) => Ok(events[..count].iter().any(|event| event.data() == TOKEN_STOP)),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
        Err(error) => Err(error.into()),
    }
}
