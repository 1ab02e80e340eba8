//! The vhost-user socket as a front end sees it: raw messages, descriptors, and deadlines.
//!
//! Written from the specification (QEMU's `docs/interop/vhost-user.rst`), not on the server's
//! message types. Nothing here blocks for longer than the wire's patience.

#![expect(unsafe_code, reason = "descriptors arrive as bare numbers")]

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Virtio feature bits the client knows (virtio 1.3 §5.2.3, §6).
pub mod feature {
    pub const BLK_SIZE_MAX: u64 = 1 << 1;
    pub const BLK_SEG_MAX: u64 = 1 << 2;
    pub const BLK_RO: u64 = 1 << 5;
    pub const BLK_BLK_SIZE: u64 = 1 << 6;
    pub const BLK_FLUSH: u64 = 1 << 9;
    pub const BLK_TOPOLOGY: u64 = 1 << 10;
    pub const BLK_CONFIG_WCE: u64 = 1 << 11;
    pub const BLK_MQ: u64 = 1 << 12;
    pub const BLK_DISCARD: u64 = 1 << 13;
    pub const BLK_WRITE_ZEROES: u64 = 1 << 14;
    pub const LOG_ALL: u64 = 1 << 26;
    pub const INDIRECT: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const RING_PACKED: u64 = 1 << 34;
}

/// Protocol feature bits.
pub mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

/// Requests of a front end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Req {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    ResetOwner = 4,
    SetMemTable = 5,
    SetLogBase = 6,
    SetLogFd = 7,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    SetVringErr = 14,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    SetBackendReqFd = 21,
    GetConfig = 24,
    SetConfig = 25,
    GetInflightFd = 31,
    SetInflightFd = 32,
    ResetDevice = 34,
    GetMaxMemSlots = 36,
    AddMemReg = 37,
    RemMemReg = 38,
    SetStatus = 39,
    GetStatus = 40,
}

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
/// Asks for an answer to a message that has none of its own.
pub const NEED_REPLY: u32 = 1 << 3;

/// A message of the server.
#[derive(Debug)]
pub struct Message {
    pub request: u32,
    pub flags: u32,
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The body as one number.
    pub fn as_u64(&self) -> u64 {
        let bytes = self.body.as_slice().try_into();
        u64::from_le_bytes(bytes.unwrap_or_else(|_| panic!("expected 8 bytes, got {:?}", self.body)))
    }
}

/// A connected socket.
#[derive(Debug)]
pub struct Wire {
    stream: UnixStream,
    patience: Duration,
    /// Ask for an answer to every message that has none of its own, and insist on success.
    pub need_reply: bool,
}

impl Wire {
    /// Connects, trying again while nobody listens yet, until `patience` has passed.
    pub fn connect(path: &Path, patience: Duration) -> Self {
        let deadline = Instant::now() + patience;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(patience)).expect("a timeout can be set");
                    stream.set_write_timeout(Some(patience)).expect("a timeout can be set");
                    return Self { stream, patience, need_reply: false };
                }
                Err(error) if Instant::now() >= deadline => {
                    panic!("nobody answered at {} for {patience:?}: {error}", path.display())
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// The socket, for `poll`.
    pub fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Sends bytes that need not be a message.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let sent = self.stream.send_with_fds(&[bytes], fds).map_err(io::Error::from)?;
        if sent != bytes.len() {
            return Err(io::Error::new(
                ErrorKind::WriteZero,
                format!("{sent} of {} bytes sent", bytes.len()),
            ));
        }
        Ok(())
    }

    /// Sends one message of any number and flags.
    pub fn send_raw(&self, request: u32, flags: u32, body: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(12 + body.len());
        bytes.extend(request.to_le_bytes());
        bytes.extend((VERSION | flags).to_le_bytes());
        bytes.extend(u32::try_from(body.len()).expect("bodies are small").to_le_bytes());
        bytes.extend(body);
        self.send_bytes(&bytes, fds)
    }

    /// Receives one message.
    ///
    /// # Errors
    /// `WouldBlock` when patience ran out, `UnexpectedEof` when the server hung up.
    pub fn receive(&self) -> io::Result<Message> {
        let mut fds = Vec::new();
        let mut header = [0u8; 12];
        self.fill(&mut header, &mut fds)?;
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let (request, flags, len) = (word(0), word(4), word(8) as usize);
        if len > 1 << 20 {
            return Err(io::Error::new(ErrorKind::InvalidData, format!("a body of {len} bytes")));
        }
        let mut body = vec![0; len];
        self.fill(&mut body, &mut fds)?;
        Ok(Message { request, flags, body, fds })
    }

    fn fill(&self, mut bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut numbers = [-1 as RawFd; 16];
            let mut iov = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
            // SAFETY: the vector describes `bytes`, which is ours alone for the call.
            let got = unsafe { self.stream.recv_with_fds(&mut iov, &mut numbers) };
            let (len, count) = match got.map_err(io::Error::from) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                other => other?,
            };
            // SAFETY: the kernel has just made these descriptors for us and nobody else knows them.
            fds.extend(numbers[..count].iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }));
            if len == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            bytes = &mut bytes[len..];
        }
        Ok(())
    }

    /// Sends a message whose answer the specification defines, and returns that.
    pub fn try_ask(&self, request: Req, body: &[u8], fds: &[RawFd]) -> io::Result<Message> {
        self.try_ask_with(request, 0, body, fds)
    }

    /// The same with flags of the caller's: UML sets NEED_REPLY on these too.
    pub fn try_ask_with(&self, request: Req, flags: u32, body: &[u8], fds: &[RawFd]) -> io::Result<Message> {
        self.send_raw(request as u32, flags, body, fds)?;
        let reply = self.receive()?;
        assert_eq!(reply.request, request as u32, "the answer to {request:?} names another request");
        assert_eq!(reply.flags & 7, VERSION | REPLY, "the answer to {request:?} has these flags");
        Ok(reply)
    }

    /// [`Wire::try_ask`] that insists.
    pub fn ask(&self, request: Req, body: &[u8], fds: &[RawFd]) -> Message {
        self.try_ask(request, body, fds).unwrap_or_else(|error| self.lost(request, &error))
    }

    /// Sends a message without an answer of its own and asks for one: 0 is success.
    pub fn try_tell_acked(&self, request: Req, body: &[u8], fds: &[RawFd]) -> io::Result<u64> {
        Ok(self.try_ask_with(request, NEED_REPLY, body, fds)?.as_u64())
    }

    /// Sends a message without an answer of its own; with `need_reply`, waits until it is in force.
    pub fn tell(&self, request: Req, body: &[u8], fds: &[RawFd]) {
        if self.need_reply {
            let ack = self.try_tell_acked(request, body, fds);
            let ack = ack.unwrap_or_else(|error| self.lost(request, &error));
            assert_eq!(ack, 0, "the server refused {request:?}");
        } else {
            self.send_raw(request as u32, 0, body, fds).unwrap_or_else(|error| self.lost(request, &error));
        }
    }

    fn lost(&self, request: Req, error: &io::Error) -> ! {
        match error.kind() {
            ErrorKind::WouldBlock => panic!("no answer to {request:?} within {:?}", self.patience),
            ErrorKind::UnexpectedEof => panic!("the server hung up at {request:?}"),
            _ => panic!("{request:?} failed: {error}"),
        }
    }

    /// Throws away what the server has said so far. Never blocks for longer than a message takes.
    pub fn drain(&self) {
        let mut poll = libc::pollfd { fd: self.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        while unsafe { libc::poll(&mut poll, 1, 0) } == 1 && self.receive().is_ok() {}
    }

    /// Says that nothing more will be sent.
    pub fn finish(&self) {
        // The server may have hung up first.
        drop(self.stream.shutdown(std::net::Shutdown::Write));
    }

    /// Whether the server has hung up. Never blocks.
    pub fn is_closed(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(&mut poll, 1, 0) };
        poll.revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0
    }

    /// Waits until the server hangs up; what it says before is thrown away.
    pub fn wait_closed(&self) {
        let deadline = Instant::now() + self.patience;
        loop {
            match self.receive() {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return,
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        panic!("the server did not hang up within {:?}", self.patience);
    }

    pub fn get_u64(&self, request: Req) -> u64 {
        self.ask(request, &[], &[]).as_u64()
    }

    pub fn set_u64(&self, request: Req, value: u64) {
        self.tell(request, &value.to_le_bytes(), &[]);
    }

    /// SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ENABLE.
    pub fn set_vring(&self, request: Req, index: u16, value: u32) {
        self.tell(request, &vring_state(index, value), &[]);
    }

    /// Stops a split ring and says where it stood.
    pub fn get_vring_base(&self, index: u16) -> u16 {
        self.get_vring_position(index) as u16
    }

    /// Stops a ring and says where it stood, a packed one with both of its positions.
    pub fn get_vring_position(&self, index: u16) -> u32 {
        let reply = self.ask(Req::GetVringBase, &vring_state(index, 0), &[]);
        assert_eq!(reply.body.len(), 8, "GET_VRING_BASE answers a vring state");
        assert_eq!(reply.body[..4], u32::from(index).to_le_bytes(), "GET_VRING_BASE answers for its ring");
        u32::from_le_bytes([reply.body[4], reply.body[5], reply.body[6], reply.body[7]])
    }

    /// SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR; without `fd` the "invalid" bit is set.
    pub fn set_vring_fd(&self, request: Req, index: u16, fd: Option<RawFd>) {
        let body = (u64::from(index) | if fd.is_none() { 1 << 8 } else { 0 }).to_le_bytes();
        self.tell(request, &body, fd.as_slice());
    }

    /// The configuration space, `None` where the server refuses by an empty payload.
    pub fn get_config(&self, offset: u32, len: u32) -> Option<Vec<u8>> {
        self.get_config_with(offset, len, 0, 0)
    }

    /// The same with the message's flags and the payload's, for front ends that set them.
    pub fn get_config_with(&self, offset: u32, len: u32, flags: u32, config_flags: u32) -> Option<Vec<u8>> {
        let mut body = words(&[offset, len, config_flags]);
        body.resize(12 + len as usize, 0);
        let reply = self.try_ask_with(Req::GetConfig, flags, &body, &[]);
        let reply = reply.unwrap_or_else(|error| self.lost(Req::GetConfig, &error)).body;
        if reply.len() < 12 || reply[4..8] == [0; 4] {
            return None;
        }
        assert_eq!(reply.len(), 12 + len as usize, "GET_CONFIG of {len} bytes answers that many");
        assert_eq!(reply[..8], words(&[offset, len]), "GET_CONFIG echoes offset and size");
        Some(reply[12..].to_vec())
    }

    /// Writes bytes of the configuration space.
    pub fn set_config(&self, offset: u32, bytes: &[u8]) {
        let mut body = words(&[offset, bytes.len() as u32, 0]);
        body.extend(bytes);
        self.tell(Req::SetConfig, &body, &[]);
    }
}

/// The body of messages about one number of one ring.
pub fn vring_state(index: u16, value: u32) -> Vec<u8> {
    words(&[u32::from(index), value])
}

/// Little-endian words in a row.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Little-endian long words in a row.
pub fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

/// The shared memory in which a server remembers what it has in flight; ours to keep over its death.
#[derive(Debug)]
pub struct Inflight {
    /// The shared memory.
    pub file: File,
    /// The 24 bytes that describe it, as the server gave them.
    pub body: Vec<u8>,
}

impl Inflight {
    /// Asks the server for one.
    pub fn get(wire: &Wire, queues: u16, queue_size: u16) -> Self {
        let mut body = longs(&[0, 0]);
        body.extend(queues.to_le_bytes());
        body.extend(queue_size.to_le_bytes());
        body.resize(24, 0);
        let mut reply = wire.ask(Req::GetInflightFd, &body, &[]);
        assert!(matches!(reply.body.len(), 20 | 24), "GET_INFLIGHT_FD answers its structure");
        assert_eq!(reply.body[16..20], body[16..20], "the in-flight region is for the rings asked for");
        reply.body.resize(24, 0);
        assert_eq!(reply.fds.len(), 1, "GET_INFLIGHT_FD brings one descriptor");
        let file = File::from(reply.fds.remove(0));
        let (len, offset) = (reply.body[..8].try_into(), reply.body[8..16].try_into());
        let end = u64::from_le_bytes(len.expect("8 bytes")) + u64::from_le_bytes(offset.expect("8 bytes"));
        let size = file.metadata().expect("it can be asked for its size").len();
        assert!(size >= end, "the in-flight region ends at {end}, its file at {size}");
        Self { file, body: reply.body }
    }

    /// Gives it (back) to the server.
    pub fn set(&self, wire: &Wire) {
        wire.tell(Req::SetInflightFd, &self.body, &[self.file.as_raw_fd()]);
    }
}
