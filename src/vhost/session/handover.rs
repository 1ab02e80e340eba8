//! A connection that goes on in another process: what its VMM has told us, in the VMM's own words.
//!
//! A session at rest is saved as the vhost-user messages that would bring a new one to where it stands.
//! So a successor believes nothing that it would not believe from a VMM: it obeys them one by one, with
//! the same checks, and a later version that has learned more needs no format of its own.
//!
//! Laws:
//! - only a session between two messages is saved, and only after its rings have stopped: what they
//!   had in flight is returned, and their positions are final;
//! - order: what was negotiated, then memory, log and in-flight area, then the rings, each one's kick
//!   and enabling last. A ring starts when it has all it needs, as after a connection;
//! - a ring that was broken gets no kick: it stays stopped until its VMM sets it up again;
//! - the VMM gets no answer to these messages: it has had its own;
//! - one thing is said that no VMM says: where a ring has stopped ([`STOPPED_AT`]). When its base is asked
//!   for, its part of the in-flight area is cleared there. Left as it is, that part would have the next
//!   driver's ring begin where the last one's ended; cleared without the ring ever having stopped in good
//!   order, it would forget what an earlier life has left in flight.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserMemory, VhostUserMemoryRegion,
    VhostUserProtocolFeatures as Protocol, VhostUserSingleMemoryRegion, VhostUserU64, VhostUserVringAddr,
    VhostUserVringState,
};

use super::super::config_space::WRITEBACK_AT;
use super::super::decode::{NO_FD, body, bytes_of};
use super::super::memory::RegionSpec;
use super::super::message::Message;
use super::super::vring::{Kick, Vring};
use super::{Refusal, Session, SessionEnd, VRING_F_LOG};
use crate::volume::Disk;

/// Where a ring has stopped: its index, and its used position. Above all `FrontendReq`s.
const STOPPED_AT: u32 = 1 << 16;

/// A message of a VMM's, as it would have to be sent again.
#[derive(Debug)]
pub struct Saved {
    /// Which: a `FrontendReq`, or our own.
    pub code: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// What comes with it.
    pub fds: Vec<OwnedFd>,
}

/// A connection at rest.
#[derive(Debug)]
pub struct ParkedSession {
    /// Its socket, between two messages.
    pub stream: UnixStream,
    /// What brings a new session to where this one stands.
    pub messages: Vec<Saved>,
    /// Whether its disk has kept requests for itself, without an answer yet. Then it is nothing for
    /// another process: what a disk still does for this one is known here alone.
    pub has_left_requests: bool,
}

/// Collects messages.
#[derive(Default)]
struct Script(Vec<Saved>);

impl Script {
    fn say(&mut self, request: FrontendReq, body: Vec<u8>) {
        self.give(request, body, Vec::new());
    }

    fn give(&mut self, request: FrontendReq, body: Vec<u8>, fds: Vec<OwnedFd>) {
        self.0.push(Saved { code: request as u32, body, fds });
    }

    fn number(&mut self, request: FrontendReq, value: u64) {
        self.say(request, bytes_of(&VhostUserU64::new(value)));
    }

    fn ring(&mut self, request: FrontendReq, index: u16, value: u32) {
        self.say(request, bytes_of(&VhostUserVringState::new(index.into(), value)));
    }

    /// A descriptor of ring `index`, or the word that there is none.
    fn ring_fd(&mut self, request: FrontendReq, index: u16, fd: Option<OwnedFd>) {
        let none = if fd.is_none() { NO_FD } else { 0 };
        self.give(request, bytes_of(&VhostUserU64::new(u64::from(index) | none)), fd.into_iter().collect());
    }
}

impl<D: Disk> Session<D> {
    /// Stops the rings; what a new session has to be told to go on for this one.
    ///
    /// # Errors
    /// The process has as many descriptors as it may have.
    pub(in super::super) fn park(&mut self) -> std::io::Result<(Vec<Saved>, bool)> {
        self.stop_all(self.patience());
        let has_left = self.rings.iter().any(Vring::has_left_requests);
        let mut script = Script::default();
        script.number(FrontendReq::SET_PROTOCOL_FEATURES, self.protocol);
        script.number(FrontendReq::SET_FEATURES, self.features.0);
        if self.negotiated(Protocol::STATUS) && self.status != 0 {
            script.number(FrontendReq::SET_STATUS, self.status.into());
        }
        if self.negotiated(Protocol::CONFIG) && self.writeback_chosen {
            let header = VhostUserConfig { offset: WRITEBACK_AT, size: 1, flags: 0 };
            let mut body = bytes_of(&header);
            body.push(u8::from(self.writeback));
            script.say(FrontendReq::SET_CONFIG, body);
        }
        self.save_memory(&mut script)?;
        if let Some(fd) = self.log_changed.source()? {
            script.give(FrontendReq::SET_LOG_FD, Vec::new(), vec![fd]);
        }
        if let Some(log) = &self.log {
            let (place, file) = log.source();
            script.give(FrontendReq::SET_LOG_BASE, bytes_of(&place), vec![file.try_clone()?.into()]);
        }
        if let Some(channel) = &self.channel
            && let Some(fd) = channel.source()?
        {
            script.give(FrontendReq::SET_BACKEND_REQ_FD, Vec::new(), vec![fd]);
        }
        if let Some(area) = &self.inflight {
            let (place, file) = area.source();
            script.give(FrontendReq::SET_INFLIGHT_FD, bytes_of(&place), vec![file.try_clone()?.into()]);
        }
        for (index, ring) in (0..).zip(&self.rings) {
            ring.save(index, &mut script)?;
        }
        Ok((script.0, has_left))
    }

    fn save_memory(&self, script: &mut Script) -> std::io::Result<()> {
        let map = self.memory.current();
        let region = |spec: RegionSpec| {
            let RegionSpec { guest, user, len, offset } = spec;
            VhostUserMemoryRegion::new(guest, len, user, offset)
        };
        if self.negotiated(Protocol::CONFIGURE_MEM_SLOTS) {
            for (spec, file) in map.regions() {
                let VhostUserMemoryRegion { guest_phys_addr, memory_size, user_addr, mmap_offset } =
                    region(spec);
                let body =
                    VhostUserSingleMemoryRegion::new(guest_phys_addr, memory_size, user_addr, mmap_offset);
                script.give(FrontendReq::ADD_MEM_REG, bytes_of(&body), vec![file.try_clone()?.into()]);
            }
            return Ok(());
        }
        let (mut body, mut fds) = (Vec::new(), Vec::new());
        for (spec, file) in map.regions() {
            body.extend(bytes_of(&region(spec)));
            fds.push(file.try_clone()?.into());
        }
        if !fds.is_empty() {
            body.splice(0..0, bytes_of(&VhostUserMemory::new(fds.len() as u32)));
            script.give(FrontendReq::SET_MEM_TABLE, body, fds);
        }
        Ok(())
    }

    /// Obeys what an earlier server was told.
    ///
    /// # Errors
    /// The first message that cannot be obeyed: then the connection cannot go on.
    pub(in super::super) fn resume(&mut self, messages: Vec<Saved>) -> Result<(), SessionEnd> {
        for Saved { code, body, fds } in messages {
            if code == STOPPED_AT {
                self.note_stop(&Message { code, need_reply: false, body, fds }).map_err(|refusal| {
                    SessionEnd::Refused { request: "where a ring has stopped".into(), refusal }
                })?;
                continue;
            }
            let request = FrontendReq::try_from(code).map_err(|_| SessionEnd::Refused {
                request: format!("request {code}"),
                refusal: Refusal::Unknown,
            })?;
            let message = Message { code, need_reply: false, body, fds };
            self.obey(request, message)
                .map_err(|refusal| SessionEnd::Refused { request: format!("{request:?}"), refusal })?;
        }
        Ok(())
    }
}

impl<D: Disk> Session<D> {
    fn note_stop(&mut self, message: &Message) -> Result<(), Refusal> {
        let VhostUserVringState { index, num } = body(message)?;
        let (_, ring) = self.ring(index.into())?;
        ring.set_stopped_at(num);
        Ok(())
    }
}

impl Vring {
    fn save(&self, index: u16, script: &mut Script) -> std::io::Result<()> {
        if self.size > 0 {
            script.ring(FrontendReq::SET_VRING_NUM, index, self.size.into());
        }
        if let Some(addresses) = self.addresses {
            let flags = if self.log_at.is_some() { VRING_F_LOG } else { 0 };
            let body = VhostUserVringAddr {
                index: index.into(),
                flags,
                descriptor: addresses.descriptors,
                used: addresses.used,
                available: addresses.available,
                log: self.log_at.unwrap_or(0),
            };
            script.say(FrontendReq::SET_VRING_ADDR, bytes_of(&body));
        }
        script.ring(FrontendReq::SET_VRING_BASE, index, self.base);
        for (request, notifier) in
            [(FrontendReq::SET_VRING_CALL, &self.call), (FrontendReq::SET_VRING_ERR, &self.error)]
        {
            if let Some(fd) = Arc::as_ref(notifier).source()? {
                script.ring_fd(request, index, Some(fd));
            }
        }
        if self.enabled {
            script.ring(FrontendReq::SET_VRING_ENABLE, index, 1);
        }
        if let Some(used) = self.stopped_at() {
            let body = bytes_of(&VhostUserVringState::new(index.into(), used));
            script.0.push(Saved { code: STOPPED_AT, body, fds: Vec::new() });
        }
        match &self.kick {
            _ if self.is_broken() => {}
            Kick::Unset => {}
            Kick::Polled => script.ring_fd(FrontendReq::SET_VRING_KICK, index, None),
            Kick::Fd(fd) => script.ring_fd(FrontendReq::SET_VRING_KICK, index, Some(fd.try_clone()?)),
        }
        Ok(())
    }
}
