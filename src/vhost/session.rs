//! One connection: the protocol's state and what each message does to it.
//!
//! Invariants:
//! - an acknowledgement is sent only when what it acknowledges is in force;
//! - a request that cannot be obeyed changes nothing that runs. Its sender is told so if it asked for
//!   an acknowledgement; otherwise it would go on in a false belief, so the connection ends;
//! - memory is taken away, and rings are changed, only while the queues concerned are stopped and
//!   everything they had in flight is returned; memory is added while they run;
//! - a disk that does not answer holds nobody up for ever who can submit a request again: with
//!   in-flight tracking, and when the connection ends, queues stop without it after a while;
//! - a session that ends has stopped its queues and unmapped its memory.

mod areas;
mod changes;

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use vhost::vhost_user::message::{
    FrontendReq, MAX_ATTACHED_FD_ENTRIES, VhostUserMemory, VhostUserMemoryRegion,
    VhostUserProtocolFeatures as Protocol, VhostUserSingleMemoryRegion, VhostUserU64, VhostUserVringAddr,
    VhostUserVringState,
};
use vm_memory::ByteValued;

use super::channel::Channel;
use super::config_space;
use super::decode::{QUEUE_MASK, Refusal, body, bytes_of, config_message, number, only_fd, spec};
use super::dirty_log::DirtyLog;
use super::features::{Features, protocol_offered};
use super::inflight::InflightArea;
use super::memory::{MAX_REGIONS, MemoryMap, SharedMemory};
use super::message::{Connection, ConnectionError, Message, exactly};
use super::notify::Notifier;
use super::ring::RingAddresses;
use super::server::Options;
use super::vring::{Kick, RingContext, Vring};
use crate::volume::{Disk, DiskConfig};

pub(super) use changes::Outside;

/// Queues a message that carries a descriptor can name.
const QUEUES_MAX: u16 = 256;

/// Flag of a ring whose writes are to be logged.
const VRING_F_LOG: u32 = 1;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionEnd {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("{request}: {refusal}")]
    Refused { request: String, refusal: Refusal },
}

/// What is answered to a request that was obeyed.
enum Reply {
    /// Nothing but an acknowledgement, if one was asked for.
    Done,
    /// A body.
    Body(Vec<u8>),
    /// A body and a descriptor.
    WithFile(Vec<u8>, File),
}

impl Reply {
    fn value(value: &impl ByteValued) -> Result<Self, Refusal> {
        Ok(Reply::Body(bytes_of(value)))
    }

    fn number(value: u64) -> Result<Self, Refusal> {
        Self::value(&VhostUserU64::new(value))
    }
}

/// The state of one connection.
pub(super) struct Session<D: Disk> {
    disk: Arc<D>,
    options: Options,
    name: Arc<str>,
    queues: u16,
    features: Features,
    protocol: u64,
    memory: Arc<SharedMemory>,
    rings: Vec<Vring>,
    inflight: Option<InflightArea>,
    /// Where the VMM wants to be told what we write, if it has said so.
    log: Option<Arc<DirtyLog>>,
    /// Who is told that the log has changed.
    log_changed: Arc<Notifier>,
    /// The device status as the VMM last set it.
    status: u8,
    /// The write-back byte of the configuration.
    writeback: bool,
    /// Whether the driver has chosen it in this session.
    writeback_chosen: bool,
    /// For what we have to say, if the front end has handed it over.
    channel: Option<Channel>,
    /// One that is not used any more and may still be watched.
    let_go: Option<Channel>,
    /// The configuration as the front end has last read it.
    seen: Option<DiskConfig>,
    /// Whether rings have begun to run since it was compared with that.
    started: bool,
}

impl<D: Disk> Session<D> {
    /// A session at its beginning. `writeback` is what the configuration says until the driver, or
    /// the memory of an earlier session, says otherwise.
    pub fn new(disk: Arc<D>, options: Options, writeback: bool) -> Self {
        let queues = disk.config().queues.clamp(1, QUEUES_MAX);
        let name = Arc::from(options.name.as_str());
        disk.set_write_cache(writeback);
        Self {
            disk,
            options,
            name,
            queues,
            features: Features::default(),
            protocol: 0,
            memory: Arc::default(),
            rings: (0..queues).map(|_| Vring::default()).collect(),
            inflight: None,
            log: None,
            log_changed: Arc::default(),
            status: 0,
            writeback,
            writeback_chosen: false,
            channel: None,
            let_go: None,
            seen: None,
            started: false,
        }
    }

    /// Serves the connection until it ends, then stops every queue.
    pub fn serve(mut self, connection: &mut Connection, outside: &Outside) -> SessionEnd {
        outside.changed.take();
        let end = loop {
            if let Err(error) = self.look_out(connection, outside) {
                break error.into();
            }
            let message = match connection.receive() {
                Ok(message) => message,
                Err(error) => break error.into(),
            };
            if let Err(end) = self.answer(connection, message) {
                break end;
            }
        };
        // Nobody is left to wait for an answer.
        self.stop_all(Some(self.patience_left()));
        end
    }

    fn answer(&mut self, connection: &mut Connection, message: Message) -> Result<(), SessionEnd> {
        let code = message.code;
        let acknowledge = message.need_reply && self.negotiated(Protocol::REPLY_ACK);
        let request = FrontendReq::try_from(code);
        let result = match request {
            Ok(request) => self.obey(request, message),
            Err(_) => Err(Refusal::Unknown),
        };
        match result {
            Ok(Reply::Body(body)) => connection.reply(code, &body, None)?,
            Ok(Reply::WithFile(body, file)) => connection.reply(code, &body, Some(file.as_raw_fd()))?,
            Ok(Reply::Done) if acknowledge => {
                connection.reply(code, VhostUserU64::new(0).as_slice(), None)?
            }
            Ok(Reply::Done) => {}
            Err(refusal) => {
                let request =
                    request.map_or_else(|_| format!("request {code}"), |known| format!("{known:?}"));
                tracing::debug!(disk = &*self.name, request, %refusal, "refused");
                // Requests with an answer of their own have no room for a refusal.
                if acknowledge && !request.starts_with("GET_") {
                    connection.reply(code, VhostUserU64::new(1).as_slice(), None)?;
                } else if refusal.ends_connection() {
                    return Err(SessionEnd::Refused { request, refusal });
                }
            }
        }
        Ok(())
    }

    fn obey(&mut self, request: FrontendReq, mut message: Message) -> Result<Reply, Refusal> {
        let fds = std::mem::take(&mut message.fds);
        let fds_allowed = match request {
            FrontendReq::SET_MEM_TABLE => MAX_ATTACHED_FD_ENTRIES,
            FrontendReq::SET_VRING_KICK
            | FrontendReq::SET_VRING_CALL
            | FrontendReq::SET_VRING_ERR
            | FrontendReq::SET_INFLIGHT_FD
            | FrontendReq::SET_LOG_BASE
            | FrontendReq::SET_LOG_FD
            | FrontendReq::SET_BACKEND_REQ_FD
            | FrontendReq::ADD_MEM_REG
            // Old front ends send the region's own descriptor along.
            | FrontendReq::REM_MEM_REG => 1,
            _ => 0,
        };
        if fds.len() > fds_allowed {
            return Err(Refusal::Malformed("more descriptors than it takes"));
        }
        match request {
            FrontendReq::GET_FEATURES => Reply::number(Features::offered(&self.disk.config()).0),
            FrontendReq::SET_FEATURES => self.set_features(number(&message)?),
            FrontendReq::GET_PROTOCOL_FEATURES => Reply::number(protocol_offered()),
            FrontendReq::SET_PROTOCOL_FEATURES => self.set_protocol_features(number(&message)?),
            FrontendReq::SET_OWNER => Ok(Reply::Done),
            FrontendReq::RESET_OWNER => self.disable_rings(),
            FrontendReq::RESET_DEVICE => self.reset_device(),
            FrontendReq::SET_STATUS => self.set_status(number(&message)?),
            FrontendReq::GET_STATUS => self.get_status(),
            FrontendReq::GET_QUEUE_NUM => Reply::number(u64::from(self.queues)),
            FrontendReq::GET_CONFIG => self.get_config(&message),
            FrontendReq::SET_CONFIG => self.set_config(&message),
            FrontendReq::SET_MEM_TABLE => self.set_mem_table(&message, fds),
            FrontendReq::GET_MAX_MEM_SLOTS => Reply::number(MAX_REGIONS as u64),
            FrontendReq::ADD_MEM_REG => self.add_mem_reg(&message, fds),
            FrontendReq::REM_MEM_REG => self.rem_mem_reg(&message),
            FrontendReq::SET_LOG_BASE => self.set_log_base(body(&message)?, fds),
            FrontendReq::SET_LOG_FD => self.set_log_fd(fds),
            FrontendReq::SET_BACKEND_REQ_FD => self.set_channel(fds),
            FrontendReq::SET_VRING_NUM => self.set_vring_num(body(&message)?),
            FrontendReq::SET_VRING_BASE => self.set_vring_base(body(&message)?),
            FrontendReq::SET_VRING_ADDR => self.set_vring_addr(body(&message)?),
            FrontendReq::SET_VRING_ENABLE => self.set_vring_enable(body(&message)?),
            FrontendReq::GET_VRING_BASE => self.get_vring_base(body(&message)?),
            FrontendReq::SET_VRING_KICK => self.set_vring_kick(number(&message)?, fds),
            FrontendReq::SET_VRING_CALL | FrontendReq::SET_VRING_ERR => {
                self.set_vring_notifier(request, number(&message)?, fds)
            }
            FrontendReq::GET_INFLIGHT_FD => self.get_inflight_fd(body(&message)?),
            FrontendReq::SET_INFLIGHT_FD => self.set_inflight_fd(body(&message)?, fds),
            _ => Err(Refusal::Unknown),
        }
    }

    // Features and the device as a whole.

    fn negotiated(&self, feature: Protocol) -> bool {
        self.protocol & feature.bits() != 0
    }

    fn require(&self, feature: Protocol) -> Result<(), Refusal> {
        if self.negotiated(feature) { Ok(()) } else { Err(Refusal::NotNegotiated) }
    }

    fn set_features(&mut self, bits: u64) -> Result<Reply, Refusal> {
        let unknown = bits & !Features::offered(&self.disk.config()).0;
        if unknown != 0 {
            return Err(Refusal::NotOffered(unknown));
        }
        let features = Features(bits);
        if features != self.features {
            self.while_stopped(|session| {
                session.features = features;
                session.apply_log();
            });
        }
        self.apply_write_cache();
        Ok(Reply::Done)
    }

    fn set_protocol_features(&mut self, bits: u64) -> Result<Reply, Refusal> {
        let unknown = bits & !protocol_offered();
        if unknown != 0 {
            return Err(Refusal::NotOffered(unknown));
        }
        self.protocol = bits;
        Ok(Reply::Done)
    }

    /// Rings stop and forget; what was negotiated for the connection, the guest's memory and what
    /// the driver last chose for the write-back byte stay, for the VMM does not repeat them.
    fn reset_device(&mut self) -> Result<Reply, Refusal> {
        self.require(Protocol::RESET_DEVICE)?;
        // The driver has given its requests up.
        self.stop_all(Some(self.patience_left()));
        for ring in &mut self.rings {
            *ring = Vring::default();
        }
        self.features = Features::default();
        self.status = 0;
        self.inflight = None;
        self.apply_log();
        Ok(Reply::Done)
    }

    /// Zero resets the device, as it does for its driver (virtio 1.3 §2.4.1): rings stop and forget.
    /// Whom they notify stays, for that is the VMM's business and not the driver's.
    fn set_status(&mut self, status: u64) -> Result<Reply, Refusal> {
        self.require(Protocol::STATUS)?;
        self.status = u8::try_from(status).map_err(|_| Refusal::Malformed("a status of more than a byte"))?;
        if status == 0 {
            self.stop_all(Some(self.patience_left()));
            for ring in &mut self.rings {
                let (call, error) = (Arc::clone(&ring.call), Arc::clone(&ring.error));
                *ring = Vring::default();
                (ring.call, ring.error) = (call, error);
            }
            self.inflight = None;
        }
        Ok(Reply::Done)
    }

    fn get_status(&self) -> Result<Reply, Refusal> {
        self.require(Protocol::STATUS)?;
        Reply::number(u64::from(self.status))
    }

    fn disable_rings(&mut self) -> Result<Reply, Refusal> {
        self.stop_all(self.patience());
        for ring in &mut self.rings {
            ring.enabled = false;
        }
        Ok(Reply::Done)
    }

    // The configuration space.

    fn get_config(&mut self, message: &Message) -> Result<Reply, Refusal> {
        self.require(Protocol::CONFIG)?;
        let wanted = config_message(message).and_then(|(header, _)| {
            let range = config_space::range(header.offset, header.size)?;
            Some((header, range))
        });
        // An empty answer is how a refusal looks here.
        let Some((header, range)) = wanted else { return Ok(Reply::Body(Vec::new())) };
        let config = self.disk.config();
        let space = config_space::bytes(&config, self.writeback);
        self.seen = Some(config);
        let mut body = header.as_slice().to_vec();
        body.extend_from_slice(&space[range]);
        Ok(Reply::Body(body))
    }

    fn set_config(&mut self, message: &Message) -> Result<Reply, Refusal> {
        self.require(Protocol::CONFIG)?;
        let (header, payload) =
            config_message(message).ok_or(Refusal::Malformed("no configuration header"))?;
        let at = config_space::WRITEBACK_AT as usize;
        match (config_space::range(header.offset, header.size), payload) {
            (Some(range), &[value]) if range == (at..at + 1) => {
                self.writeback = value != 0;
                self.writeback_chosen = true;
                if let Some(area) = &self.inflight {
                    area.set_writeback(self.writeback);
                }
                self.apply_write_cache();
                Ok(Reply::Done)
            }
            _ => Err(Refusal::ReadOnlyConfig),
        }
    }

    /// A driver that cannot flush, or believes it need not, gets every completion durable.
    fn apply_write_cache(&self) {
        self.disk.set_write_cache(self.writeback && self.features.flush());
    }

    // Memory.

    fn set_mem_table(&mut self, message: &Message, fds: Vec<OwnedFd>) -> Result<Reply, Refusal> {
        const MALFORMED: Refusal = Refusal::Malformed("memory table");
        let (header, rest) = message.body.split_at_checked(size_of::<VhostUserMemory>()).ok_or(MALFORMED)?;
        let count = exactly::<VhostUserMemory>(header).ok_or(MALFORMED)?.num_regions as usize;
        // Some front ends send a table of fixed size, of which the first `count` entries count.
        let needed = count.checked_mul(size_of::<VhostUserMemoryRegion>()).ok_or(MALFORMED)?;
        if count > MAX_ATTACHED_FD_ENTRIES || rest.len() < needed {
            return Err(MALFORMED);
        }
        if fds.len() != count {
            return Err(Refusal::Malformed("a memory table needs one descriptor for each region"));
        }
        let mut map = MemoryMap::default();
        for (bytes, fd) in rest.chunks_exact(size_of::<VhostUserMemoryRegion>()).zip(fds) {
            let region = exactly(bytes).ok_or(MALFORMED)?;
            map = map.with(spec(&region), fd, self.options.guest_memory_max)?;
        }
        self.while_stopped(|session| {
            session.memory.replace(map);
            session.apply_log();
        });
        Ok(Reply::Done)
    }

    fn add_mem_reg(&mut self, message: &Message, mut fds: Vec<OwnedFd>) -> Result<Reply, Refusal> {
        self.require(Protocol::CONFIGURE_MEM_SLOTS)?;
        let region: VhostUserSingleMemoryRegion = body(message)?;
        let fd = fds.pop().ok_or(Refusal::Malformed("a region needs a descriptor"))?;
        let map = self.memory.current().with(spec(&region), fd, self.options.guest_memory_max)?;
        self.memory.replace(map);
        // A ring whose memory was taken away and given back goes on.
        self.start_all();
        Ok(Reply::Done)
    }

    fn rem_mem_reg(&mut self, message: &Message) -> Result<Reply, Refusal> {
        self.require(Protocol::CONFIGURE_MEM_SLOTS)?;
        let region: VhostUserSingleMemoryRegion = body(message)?;
        let map = self.memory.current().without(spec(&region))?;
        self.while_stopped(|session| session.memory.replace(map));
        Ok(Reply::Done)
    }

    // Rings.

    fn ring(&mut self, index: u64) -> Result<(u16, &mut Vring), Refusal> {
        let queues = self.queues;
        match usize::try_from(index).ok().and_then(|at| self.rings.get_mut(at)) {
            Some(ring) => Ok((index as u16, ring)),
            None => Err(Refusal::NoSuchQueue { queue: index, queues }),
        }
    }

    fn set_vring_num(&mut self, state: VhostUserVringState) -> Result<Reply, Refusal> {
        let (size, limit) = (state.num, self.disk.config().queue_size);
        let packed = self.features.packed();
        let (_, ring) = self.ring(u64::from(state.index))?;
        let is_possible = size.is_power_of_two() || (packed && size > 0);
        if !is_possible || size > u32::from(limit) {
            return Err(Refusal::RingSize { size, limit });
        }
        if ring.is_running() && u32::from(ring.size) != size {
            return Err(Refusal::RingRunning);
        }
        ring.size = size as u16;
        Ok(Reply::Done)
    }

    fn set_vring_base(&mut self, state: VhostUserVringState) -> Result<Reply, Refusal> {
        let base = state.num;
        // A packed ring has two positions in it.
        if !self.features.packed() && base > u32::from(u16::MAX) {
            return Err(Refusal::RingPosition(base));
        }
        let (_, ring) = self.ring(u64::from(state.index))?;
        if ring.is_running() {
            return Err(Refusal::RingRunning);
        }
        ring.base = base;
        Ok(Reply::Done)
    }

    fn set_vring_addr(&mut self, message: VhostUserVringAddr) -> Result<Reply, Refusal> {
        let addresses = RingAddresses {
            descriptors: message.descriptor,
            available: message.available,
            used: message.used,
        };
        if !addresses.are_aligned() {
            return Err(Refusal::Unaligned);
        }
        let log_at = (message.flags & VRING_F_LOG != 0).then_some(message.log);
        let patience = self.patience();
        let (index, ring) = self.ring(u64::from(message.index))?;
        // The same addresses come again when a VMM changes the flags of a running ring.
        if (ring.addresses, ring.log_at) != (Some(addresses), log_at) {
            ring.stop(patience);
            (ring.addresses, ring.log_at) = (Some(addresses), log_at);
        }
        self.start(index)
    }

    fn set_vring_enable(&mut self, state: VhostUserVringState) -> Result<Reply, Refusal> {
        let patience = self.patience();
        let (index, ring) = self.ring(u64::from(state.index))?;
        match state.num {
            0 => {
                ring.enabled = false;
                ring.stop(patience);
                Ok(Reply::Done)
            }
            1 => {
                ring.enabled = true;
                self.start(index)
            }
            _ => Err(Refusal::Malformed("neither enabled nor disabled")),
        }
    }

    fn get_vring_base(&mut self, state: VhostUserVringState) -> Result<Reply, Refusal> {
        let patience = self.patience();
        let inflight = self.inflight.take();
        let base = self
            .ring(u64::from(state.index))
            .map(|(index, ring)| ring.take_base(index, inflight.as_ref(), patience));
        self.inflight = inflight;
        Reply::value(&VhostUserVringState::new(state.index, base?))
    }

    fn set_vring_kick(&mut self, value: u64, mut fds: Vec<OwnedFd>) -> Result<Reply, Refusal> {
        let fd = only_fd(value, &mut fds)?;
        let patience = self.patience();
        let (index, ring) = self.ring(value & QUEUE_MASK)?;
        ring.stop(patience);
        ring.kick = fd.map_or(Kick::Polled, Kick::Fd);
        self.start(index)
    }

    fn set_vring_notifier(
        &mut self,
        request: FrontendReq,
        value: u64,
        mut fds: Vec<OwnedFd>,
    ) -> Result<Reply, Refusal> {
        let fd = only_fd(value, &mut fds)?;
        let (_, ring) = self.ring(value & QUEUE_MASK)?;
        if request == FrontendReq::SET_VRING_ERR {
            ring.error.set(fd);
            return Ok(Reply::Done);
        }
        ring.call.set(fd);
        if ring.is_running() {
            // What was published just before may have been told to the old descriptor only.
            ring.call.notify();
        }
        Ok(Reply::Done)
    }

    // Starting and stopping.

    fn start(&mut self, index: u16) -> Result<Reply, Refusal> {
        let context = RingContext {
            name: &self.name,
            disk: &self.disk,
            memory: &self.memory,
            features: self.features,
            inflight: self.inflight.as_ref(),
            poll_max: self.options.poll_max,
        };
        let ring = &mut self.rings[usize::from(index)];
        let was_running = ring.is_running();
        ring.start(index, &context)?;
        self.started |= ring.is_running() && !was_running;
        Ok(Reply::Done)
    }

    /// Starts every ring that can run. One that cannot because its memory is away is no error here:
    /// the message that led here was about something else.
    fn start_all(&mut self) {
        for index in 0..self.queues {
            if let Err(refusal) = self.start(index) {
                tracing::warn!(disk = &*self.name, queue = index, %refusal, "ring stays stopped");
            }
        }
    }

    fn stop_all(&mut self, patience: Option<Duration>) {
        self.rings.iter().for_each(|ring| ring.request_stop(patience));
        self.rings.iter_mut().for_each(|ring| ring.stop(patience));
    }

    /// How long to wait for a disk when its requests can be submitted again, and how long otherwise:
    /// without tracking only an answer says which have taken effect.
    fn patience(&self) -> Option<Duration> {
        self.inflight.as_ref().map(|_| self.patience_left())
    }

    /// Rings stop one after another; the disk that had no answer for one has none for the next.
    fn patience_left(&self) -> Duration {
        const ONCE_WAITED: Duration = Duration::from_millis(50);
        let waited = self.rings.iter().any(Vring::has_left_requests);
        if waited { self.options.stop_patience.min(ONCE_WAITED) } else { self.options.stop_patience }
    }

    /// Makes a change that no queue may see happen.
    fn while_stopped(&mut self, change: impl FnOnce(&mut Self)) {
        self.stop_all(self.patience());
        change(self);
        self.start_all();
    }
}
