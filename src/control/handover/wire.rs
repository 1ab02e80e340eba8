//! What the two daemons of an upgrade say to each other, and how it looks on the socket.
//!
//! ```text
//!  0  magic "pcHO"   4  length of the text, u32   8  the text: one JSON object
//! ```
//! in the processor's byte order, for both ends are on one host; descriptors come with the first byte.
//!
//! Invariants:
//! - a length is bounded before anything is read or allocated for it, and so is the number of
//!   descriptors; what is more is closed and ends the connection;
//! - a descriptor that came is owned at once, so that whatever is wrong with a message closes it;
//! - reading and writing end at a deadline, however slowly the other side does its part.

use std::io;
use std::io::Write;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::HandoverError;
use crate::control::notify::Manager;
use crate::control::sys;

/// Version of what is said here. A daemon gives itself only to one that says the same.
pub const VERSION: u32 = 1;
/// Longest text: a vhost-user message as JSON numbers is the longest.
const TEXT_MAX: usize = 256 << 10;
/// Most descriptors of one message: a memory table has 32.
const FDS_MAX: usize = 64;
const MAGIC: [u8; 4] = *b"pcHO";
const HEADER_LEN: usize = 8;

/// One message.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(tag = "word", rename_all = "snake_case", deny_unknown_fields)]
pub enum Word {
    /// The successor introduces itself.
    Hello {
        /// [`VERSION`].
        version: u32,
        /// Of the program, for the log.
        program: String,
        /// Its process, for the log.
        pid: u32,
    },
    /// A cache's image: one descriptor.
    Cache {
        /// Where, for messages.
        path: String,
    },
    /// A volume's disk: one descriptor.
    Disk {
        /// Whose.
        volume: String,
    },
    /// A volume's redo area: one descriptor.
    Redo {
        /// Whose.
        volume: String,
    },
    /// That was everything that can be given beforehand.
    Offered {
        /// What is served.
        volumes: Vec<OfferedVolume>,
        /// The control socket, from the root.
        control: String,
        /// The service manager, if there is one.
        manager: Option<Manager>,
    },
    /// The successor can serve all of it.
    Ready,
    /// The control socket, the lock of its path if it is bound, and the listening socket for metrics, if
    /// there is one.
    Control {
        /// Whether its path is ours and not the service manager's.
        is_bound: bool,
    },
    /// The socket for upgrades and its lock.
    Upgrade,
    /// A volume's front end at rest. Descriptors: the listening socket, the lock of its path, the VMM's
    /// connection, as far as they are there. That many [`Word::Vhost`] follow.
    Rest {
        /// Of which volume.
        volume: String,
        /// Whether more VMMs may come.
        listens: bool,
        /// Whether its socket is at a path of ours.
        is_bound: bool,
        /// Whether a VMM is connected.
        is_connected: bool,
        /// What it has said.
        messages: u32,
    },
    /// What the VMM has said, descriptors included.
    Vhost {
        /// A `FrontendReq`.
        code: u32,
        /// What follows its header.
        body: Vec<u8>,
    },
    /// That was everything; the successor says it back when it has it.
    All,
    /// The point of no return.
    Yours,
    /// The successor serves.
    Serving,
    /// It is not to be; the predecessor serves on.
    No {
        /// Why.
        why: String,
    },
}

/// A volume that is served.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct OfferedVolume {
    /// Its name.
    pub name: String,
    /// Where its socket is, from the root; none of an inherited one.
    pub socket: Option<String>,
}

/// A message and its descriptors.
#[derive(Debug)]
pub struct Message {
    /// What it says.
    pub word: Word,
    /// What came with it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// Its only descriptor.
    ///
    /// # Errors
    /// It has none, or more.
    pub fn one_fd(self) -> Result<OwnedFd, HandoverError> {
        let [fd] = self.many_fds()?;
        Ok(fd)
    }

    /// Its `N` descriptors.
    ///
    /// # Errors
    /// It has more or fewer.
    pub fn many_fds<const N: usize>(self) -> Result<[OwnedFd; N], HandoverError> {
        let count = self.fds.len();
        self.fds.try_into().map_err(|_| {
            HandoverError::Protocol(format!("{:?} came with {count} descriptors, not {N}", self.word))
        })
    }
}

/// One end.
#[derive(Debug)]
pub struct Wire(UnixStream);

impl Wire {
    /// Over a connected socket.
    pub fn new(stream: UnixStream) -> Self {
        Self(stream)
    }

    /// Says `word`, with descriptors.
    ///
    /// # Errors
    /// The other side has gone, or does not listen within `limit`.
    pub fn say(&mut self, word: &Word, fds: &[RawFd], limit: Duration) -> Result<(), HandoverError> {
        let failed = HandoverError::io("talking to");
        let text = serde_json::to_vec(word).map_err(|error| failed(error.into()))?;
        if text.len() > TEXT_MAX || fds.len() > FDS_MAX {
            return Err(failed(io::Error::other("a message is longer than any may be")));
        }
        let mut bytes = MAGIC.to_vec();
        bytes.extend((text.len() as u32).to_ne_bytes());
        bytes.extend(text);
        self.0.set_write_timeout(Some(limit)).map_err(&failed)?;
        let sent = match fds {
            [] => 0,
            // Descriptors go with the first byte.
            fds => self.0.send_with_fds(&[bytes.as_slice()], fds).map_err(|e| failed(e.into()))?,
        };
        self.0.write_all(&bytes[sent..]).map_err(failed)
    }

    /// Says why not. Whether that is heard does not matter any more.
    pub fn refuse(&mut self, why: &str) {
        let word = Word::No { why: why.to_owned() };
        if let Err(error) = self.say(&word, &[], Duration::from_secs(1)) {
            tracing::debug!(%error, "a refusal was not heard");
        }
    }

    /// Hears the next message. A refusal is an error here.
    ///
    /// # Errors
    /// The other side refuses, has gone, says nothing within `limit`, or what nobody says.
    pub fn hear(&mut self, limit: Duration) -> Result<Message, HandoverError> {
        let deadline = Instant::now() + limit;
        let mut fds = Vec::new();
        let mut header = [0; HEADER_LEN];
        self.fill(&mut header, &mut fds, deadline)?;
        let (magic, len) = header.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(HandoverError::Protocol("it does not begin like a message".into()));
        }
        let len = u32::from_ne_bytes([len[0], len[1], len[2], len[3]]) as usize;
        if len > TEXT_MAX {
            return Err(HandoverError::Protocol(format!("a message of {len} bytes")));
        }
        let mut text = vec![0; len];
        self.fill(&mut text, &mut fds, deadline)?;
        match serde_json::from_slice(&text) {
            Ok(Word::No { why }) => Err(HandoverError::Refused(why)),
            Ok(word) => Ok(Message { word, fds }),
            Err(error) => Err(HandoverError::Protocol(error.to_string())),
        }
    }

    /// Hears `word` and nothing else.
    ///
    /// # Errors
    /// As for [`Wire::hear`], or it is another.
    pub fn expect(&mut self, word: &Word, limit: Duration) -> Result<(), HandoverError> {
        let message = self.hear(limit)?;
        match message.word == *word && message.fds.is_empty() {
            true => Ok(()),
            false => Err(unexpected(&message.word)),
        }
    }

    fn fill(
        &self,
        mut bytes: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        deadline: Instant,
    ) -> Result<(), HandoverError> {
        let failed = HandoverError::io("listening to");
        while !bytes.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(failed(io::ErrorKind::TimedOut.into()));
            }
            self.0.set_read_timeout(Some(left)).map_err(&failed)?;
            match sys::receive::<FDS_MAX>(&self.0, bytes, fds) {
                Ok(0) => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => bytes = &mut bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(failed(io::ErrorKind::TimedOut.into()));
                }
                Err(error) => return Err(failed(error)),
            }
            if fds.len() > FDS_MAX {
                return Err(HandoverError::Protocol("more descriptors than any message has".into()));
            }
        }
        Ok(())
    }
}

/// What was heard and is not said there.
pub fn unexpected(word: &Word) -> HandoverError {
    let mut said = format!("{word:?}");
    said.truncate(80);
    HandoverError::Protocol(format!("it says {said}"))
}
