//! What a VMM shares beside the guest's memory: the in-flight area, and the dirty log.
//!
//! Invariants:
//! - an in-flight area is for the layout that was negotiated when it was made or taken, and changes
//!   only while no ring runs;
//! - a log is put in force, or taken out of it, only while no ring runs and everything in flight is
//!   returned: what is in flight would be noted where it was noted when it began.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::{VhostUserInflight, VhostUserLog, VhostUserProtocolFeatures as Protocol};

use super::super::decode::{Refusal, bytes_of};
use super::super::dirty_log::DirtyLog;
use super::super::inflight::{InflightArea, Shape};
use super::super::memory::MemoryMap;
use super::super::vring::Vring;
use super::{Reply, Session};
use crate::volume::Disk;

impl<D: Disk> Session<D> {
    // Requests in flight.

    pub(super) fn get_inflight_fd(&mut self, wanted: VhostUserInflight) -> Result<Reply, Refusal> {
        self.require(Protocol::INFLIGHT_SHMFD)?;
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        // An area of no bytes is how a refusal looks here.
        if queues == 0 || queues > self.queues || size == 0 || size > self.disk.config().queue_size {
            return Reply::value(&VhostUserInflight::new(0, 0, queues, size));
        }
        let shape = Shape { queues, queue_size: size, packed: self.features.packed() };
        let (_, file, answer) = InflightArea::create(shape, self.writeback)?;
        Ok(Reply::WithFile(bytes_of(&answer), file))
    }

    pub(super) fn set_inflight_fd(
        &mut self,
        shape: VhostUserInflight,
        mut fds: Vec<OwnedFd>,
    ) -> Result<Reply, Refusal> {
        self.require(Protocol::INFLIGHT_SHMFD)?;
        let fd = fds.pop().ok_or(Refusal::Malformed("an in-flight area needs a descriptor"))?;
        if self.rings.iter().any(Vring::is_running) {
            return Err(Refusal::RingRunning);
        }
        let area = InflightArea::open(fd, &shape, self.features.packed())?;
        match area.writeback() {
            Some(earlier) if !self.writeback_chosen => {
                self.writeback = earlier;
                self.apply_write_cache();
            }
            _ => area.set_writeback(self.writeback),
        }
        self.inflight = Some(area);
        Ok(Reply::Done)
    }

    // The dirty log.

    /// Answers always, whether asked to or not: front ends wait for it.
    pub(super) fn set_log_base(
        &mut self,
        place: VhostUserLog,
        mut fds: Vec<OwnedFd>,
    ) -> Result<Reply, Refusal> {
        self.require(Protocol::LOG_SHMFD)?;
        let fd = fds.pop().ok_or(Refusal::Malformed("a dirty log needs a descriptor"))?;
        let changed = Arc::clone(&self.log_changed);
        let log = Arc::new(DirtyLog::open(fd, place.mmap_offset, place.mmap_size, changed)?);
        // What is in flight would be noted in the old one.
        self.while_stopped(|session| {
            session.log = Some(log);
            session.apply_log();
        });
        Reply::number(0)
    }

    pub(super) fn set_log_fd(&mut self, mut fds: Vec<OwnedFd>) -> Result<Reply, Refusal> {
        self.log_changed.set(fds.pop());
        Ok(Reply::Done)
    }

    /// Notes what is written from now on, if the VMM wants it noted and has said where.
    pub(super) fn apply_log(&mut self) {
        let log = self.log.as_ref().filter(|_| self.features.log_all());
        let map = MemoryMap::clone(&self.memory.current()).with_log(log.map(Arc::clone));
        self.memory.replace(map);
    }
}
