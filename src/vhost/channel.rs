//! The back end's own requests: telling the front end that the configuration has changed.
//!
//! The front end hands over a socket for them (SET_BACKEND_REQ_FD). It may never read it, close it, or
//! say anything on it.
//!
//! Invariants:
//! - nothing here waits: a message goes whole or not at all, answers are read when they are there;
//! - where answers are asked for, one message at most is out. What changes until its answer is told by
//!   one more message then;
//! - where they are not, a full socket holds an unread message, and whoever reads that asks for a
//!   configuration that is at least as new as what could not be told;
//! - a channel on which anything else happens is closed, and the connection goes on without it.
//!
//! What a channel cannot be trusted with is the life of its connection. A front end can leave the other
//! end of that in the channel's queue, and die: as long as we hold the channel, the connection then
//! stays open, and whoever comes next would wait for ever. So a session lets its channel go as soon as
//! somebody else waits to be served.

use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost::vhost_user::message::BackendReq;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::fds;
use super::message::{FLAG_NEED_REPLY, FLAG_REPLY, HEADER_LEN, VERSION, VERSION_MASK};

/// An answer: a header, and a number that is zero for success.
const ANSWER_LEN: usize = HEADER_LEN + 8;

/// By which a server is told that its disk's configuration is another. Clones are of the same server.
#[derive(Clone, Debug)]
pub struct Handle {
    event: Arc<EventFd>,
    is_heard: Arc<AtomicBool>,
}

impl Handle {
    pub(super) fn new() -> std::io::Result<Self> {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        Ok(Self { event, is_heard: Arc::default() })
    }

    /// Has the front end told, if there is one, that [`Disk::config`](crate::volume::Disk::config) says
    /// something else than before. Never waits.
    pub fn config_changed(&self) {
        // It can only fail by being full, which says the same.
        drop(self.event.write(1));
    }

    /// Whether there is a front end that can be told now. One that cannot sees a change when it connects
    /// the next time.
    pub fn is_heard(&self) -> bool {
        self.is_heard.load(Ordering::Relaxed)
    }

    pub(super) fn set_heard(&self, is_heard: bool) {
        self.is_heard.store(is_heard, Ordering::Relaxed);
    }

    /// Forgets what it has been told.
    pub(super) fn take(&self) {
        // It fails when there is nothing to take.
        drop(self.event.read());
    }

    pub(super) fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

/// Why a channel is closed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChannelError {
    #[error("the front end has closed it")]
    Closed,
    #[error("something came on it that is no answer")]
    Garbage,
    #[error("it takes less than a message")]
    Cut,
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct Channel {
    socket: OwnedFd,
    /// Whether a message has not been answered that asks for it.
    awaits: bool,
    /// Whether something has changed since that message.
    again: bool,
    answer: [u8; ANSWER_LEN],
    answered: usize,
}

impl Channel {
    /// Takes over a socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, awaits: false, again: false, answer: [0; ANSWER_LEN], answered: 0 }
    }

    pub fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Says that the configuration has changed; `acknowledge` asks for an answer.
    ///
    /// # Errors
    /// Any; the channel is of no further use.
    pub fn config_changed(&mut self, acknowledge: bool) -> Result<(), ChannelError> {
        if self.awaits {
            self.again = true;
            return Ok(());
        }
        self.again = false;
        let flags = if acknowledge { VERSION | FLAG_NEED_REPLY } else { VERSION };
        let mut bytes = [0; HEADER_LEN];
        bytes[..4].copy_from_slice(&u32::from(BackendReq::CONFIG_CHANGE_MSG).to_ne_bytes());
        bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
        loop {
            match fds::send_now(self.socket.as_fd(), &bytes) {
                Ok(HEADER_LEN) => {
                    self.awaits = acknowledge;
                    return Ok(());
                }
                Ok(_) => return Err(ChannelError::Cut),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Reads what has come. Returns what was answered, once all of an answer is there.
    ///
    /// # Errors
    /// Any; the channel is of no further use.
    pub fn hear(&mut self, acknowledge: bool) -> Result<Option<u64>, ChannelError> {
        while self.answered < ANSWER_LEN {
            match fds::receive_now(self.socket.as_fd(), &mut self.answer[self.answered..]) {
                Ok(0) => return Err(ChannelError::Closed),
                Ok(_) if !self.awaits => return Err(ChannelError::Garbage),
                Ok(count) => self.answered += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
        let field = |at: usize| {
            let bytes = &self.answer[at..at + 4];
            u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
        };
        let (code, flags, size) = (field(0), field(4), field(8));
        let is_answer = code == u32::from(BackendReq::CONFIG_CHANGE_MSG)
            && flags & (VERSION_MASK | FLAG_REPLY) == VERSION | FLAG_REPLY
            && size == 8;
        if !is_answer {
            return Err(ChannelError::Garbage);
        }
        let value = u64::from(field(12)) | u64::from(field(16)) << 32;
        (self.answered, self.awaits) = (0, false);
        if self.again {
            self.config_changed(acknowledge)?;
        }
        Ok(Some(value))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn channel() -> (Channel, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (Channel::new(ours.into()), theirs)
    }

    /// What the front end finds: flags of each message.
    fn messages(mut theirs: &UnixStream) -> Vec<u32> {
        let mut flags = Vec::new();
        let mut bytes = [0; HEADER_LEN];
        while let Ok(count) = theirs.read(&mut bytes) {
            assert_eq!(count, HEADER_LEN);
            assert_eq!(bytes[..4], 2u32.to_ne_bytes());
            assert_eq!(bytes[8..], [0; 4]);
            flags.push(u32::from_ne_bytes(bytes[4..8].try_into().unwrap()));
        }
        flags
    }

    fn answer(mut theirs: &UnixStream, value: u64) {
        let mut bytes = Vec::new();
        for field in [2u32, VERSION | FLAG_REPLY, 8] {
            bytes.extend(field.to_ne_bytes());
        }
        bytes.extend(value.to_ne_bytes());
        theirs.write_all(&bytes).unwrap();
    }

    #[test]
    fn with_answers_one_message_is_out_and_all_changes_since_are_one_more() {
        let (mut channel, theirs) = channel();
        for _ in 0..1000 {
            channel.config_changed(true).unwrap();
        }
        assert_eq!(messages(&theirs), [VERSION | FLAG_NEED_REPLY]);
        assert_eq!(channel.hear(true).unwrap(), None);
        answer(&theirs, 0);
        assert_eq!(channel.hear(true).unwrap(), Some(0));
        assert_eq!(messages(&theirs), [VERSION | FLAG_NEED_REPLY]);
        answer(&theirs, 7 << 40);
        assert_eq!(channel.hear(true).unwrap(), Some(7 << 40));
        assert!(messages(&theirs).is_empty());
    }

    #[test]
    fn without_answers_a_front_end_that_never_reads_holds_nobody_up() {
        let (mut channel, theirs) = channel();
        for _ in 0..100_000 {
            channel.config_changed(false).unwrap();
        }
        let unread = messages(&theirs);
        assert!(!unread.is_empty() && unread.len() < 100_000, "{} messages", unread.len());
        assert!(unread.iter().all(|&flags| flags == VERSION));
        channel.config_changed(false).unwrap();
        assert_eq!(messages(&theirs), [VERSION]);
    }

    #[test]
    fn what_is_no_answer_closes_the_channel() {
        type Act = fn(&UnixStream);
        let acts: [(&str, Act, bool); 4] = [
            ("unasked", |theirs| answer(theirs, 0), false),
            ("garbage", |mut theirs| theirs.write_all(&[0xff; ANSWER_LEN]).unwrap(), true),
            ("another request", |mut theirs| theirs.write_all(&[3; ANSWER_LEN]).unwrap(), true),
            ("closed", |theirs| theirs.shutdown(std::net::Shutdown::Both).unwrap(), true),
        ];
        for (what, act, asked) in acts {
            let (mut channel, theirs) = channel();
            channel.config_changed(asked).unwrap();
            act(&theirs);
            assert!(channel.hear(asked).is_err(), "{what}");
        }
        let (mut channel, theirs) = channel();
        drop(theirs);
        assert!(channel.config_changed(false).is_err());
    }

    #[test]
    fn an_answer_may_come_in_pieces() {
        let (mut channel, theirs) = channel();
        channel.config_changed(true).unwrap();
        let (mut ours, feed) = UnixStream::pair().unwrap();
        answer(&feed, 1);
        let mut bytes = [0; ANSWER_LEN];
        ours.read_exact(&mut bytes).unwrap();
        for (at, byte) in bytes.iter().enumerate() {
            assert_eq!(channel.hear(true).unwrap(), None, "before byte {at}");
            (&theirs).write_all(&[*byte]).unwrap();
        }
        assert_eq!(channel.hear(true).unwrap(), Some(1));
    }
}
