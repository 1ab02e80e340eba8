//! A configuration that changes while a front end is connected.
//!
//! Invariants:
//! - a front end with a channel is told of every change, at least once after the last of them;
//! - told it is also when its rings begin to run and it has not read the configuration as it is now: a
//!   front end may take no notice while nothing runs, and after a reconnect it does not ask again;
//! - the channel is let go as soon as somebody else waits to be served (`channel` says why), and the
//!   connection goes on without;
//! - nothing here waits for the front end.

use std::os::fd::{AsFd, OwnedFd, RawFd};

use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

use super::super::channel::{Channel, Handle};
use super::super::decode::Refusal;
use super::super::fds;
use super::super::message::{Connection, ConnectionError};
use super::{Reply, Session};
use crate::volume::Disk;

/// What a session looks out for beside its front end's messages.
#[derive(Debug)]
pub(in super::super) struct Outside {
    /// Tells that the disk's configuration has changed.
    pub changed: Handle,
    /// Where the next front end would come from, if any can.
    pub listener: Option<RawFd>,
}

/// The numbers by which they are known while they are watched.
const CHANGED: u64 = 0;
const CHANNEL: u64 = 1;
const LISTENER: u64 = 2;

impl<D: Disk> Session<D> {
    pub(super) fn set_channel(&mut self, mut fds: Vec<OwnedFd>) -> Result<Reply, Refusal> {
        self.require(Protocol::BACKEND_REQ)?;
        let fd = fds.pop().filter(|fd| fds::is_socket(fd.as_fd()));
        self.channel = Some(Channel::new(fd.ok_or(Refusal::Malformed("a channel needs a socket"))?));
        Ok(Reply::Done)
    }

    /// Waits for the next message, and does meanwhile what else there is to do.
    pub(super) fn look_out(
        &mut self,
        connection: &Connection,
        outside: &Outside,
    ) -> Result<(), ConnectionError> {
        if std::mem::take(&mut self.started) && self.seen != Some(self.disk.config()) {
            self.tell();
        }
        outside.changed.set_heard(self.channel.is_some());
        // The channel is another, or none, whenever a message was obeyed: watched anew, and no longer
        // than here. A descriptor that its sender has open as well stays watched when it is closed.
        let channel = self.channel.as_ref().map(Channel::as_raw_fd);
        let watched = [
            (Some(outside.changed.as_raw_fd()), CHANGED),
            (channel, CHANNEL),
            (outside.listener.filter(|_| channel.is_some()), LISTENER),
        ];
        let fds = || watched.iter().filter_map(|&(fd, number)| Some((fd?, number)));
        let watching = fds().try_for_each(|(fd, number)| connection.watch(fd, number));
        let looked = watching.map_err(ConnectionError::from).and_then(|()| {
            connection.look_out(|number| {
                match number {
                    CHANGED => {
                        outside.changed.take();
                        self.tell();
                    }
                    CHANNEL => self.hear(),
                    _ => self.let_go("somebody else waits to be served"),
                }
                if self.channel.is_none() {
                    channel.into_iter().chain(outside.listener).for_each(|fd| connection.unwatch(fd));
                    outside.changed.set_heard(false);
                    // Now, and not when it returns: this may be what keeps the connection open.
                    self.let_go = None;
                }
            })
        });
        fds().for_each(|(fd, _)| connection.unwatch(fd));
        self.let_go = None;
        looked
    }

    /// Tells the front end that the configuration is another, if it can be told.
    fn tell(&mut self) {
        let acknowledge = self.negotiated(Protocol::REPLY_ACK);
        if !self.negotiated(Protocol::CONFIG) {
            return;
        }
        let Some(channel) = &mut self.channel else { return };
        match channel.config_changed(acknowledge) {
            Ok(()) => {
                tracing::info!(disk = &*self.name, "the front end is told to read the configuration anew")
            }
            Err(error) => self.let_go(&error.to_string()),
        }
    }

    /// Reads an answer.
    fn hear(&mut self) {
        let acknowledge = self.negotiated(Protocol::REPLY_ACK);
        let Some(channel) = &mut self.channel else { return };
        match channel.hear(acknowledge) {
            Ok(None | Some(0)) => {}
            Ok(Some(code)) => {
                tracing::warn!(
                    disk = &*self.name,
                    code,
                    "the front end has refused to take note of a change"
                );
            }
            Err(error) => self.let_go(&error.to_string()),
        }
    }

    /// Uses the channel no more. It is closed when it is not watched any more.
    fn let_go(&mut self, why: &str) {
        if let Some(channel) = self.channel.take() {
            tracing::info!(disk = &*self.name, why, "the channel for changes is closed");
            self.let_go = Some(channel);
        }
    }
}
