//! Bodies of messages, and why a request is not obeyed.
//!
//! A body has exactly the length its request says; what it claims beyond that is for `session` and
//! what lies under it to judge.

use std::os::fd::OwnedFd;

use vhost::vhost_user::message::{VhostUserConfig, VhostUserMemoryRegion, VhostUserU64};
use vm_memory::ByteValued;

use super::dirty_log::LogError;
use super::inflight::InflightError;
use super::memory::{MemoryError, RegionSpec};
use super::message::{Message, exactly};
use super::vring::StartError;

/// A descriptor message without a descriptor (vhost-user spec, "VHOST_USER_SET_VRING_KICK").
pub(super) const NO_FD: u64 = 1 << 8;
/// The queue such a message names.
pub(super) const QUEUE_MASK: u64 = 0xff;

/// Why a request was not obeyed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("malformed: {0}")]
    Malformed(&'static str),
    #[error("not a request this back end knows")]
    Unknown,
    #[error("belongs to a feature that was not negotiated")]
    NotNegotiated,
    #[error("asks for features {0:#x} that were not offered")]
    NotOffered(u64),
    #[error("queue {queue} of {queues}")]
    NoSuchQueue { queue: u64, queues: u16 },
    #[error("the ring is running")]
    RingRunning,
    #[error("a ring of {size}, at most {limit} and a power of two")]
    RingSize { size: u32, limit: u16 },
    #[error("a ring position of {0}")]
    RingPosition(u32),
    #[error("ring addresses are not aligned")]
    Unaligned,
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Inflight(#[from] InflightError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("only the write-back byte of the configuration can be written")]
    ReadOnlyConfig,
}

impl Refusal {
    /// Whether the sender, left without an answer, would be wrong about something that matters.
    pub fn ends_connection(&self) -> bool {
        !matches!(self, Refusal::ReadOnlyConfig)
    }
}

/// The body, which is one value.
pub(super) fn body<T: ByteValued + Default>(message: &Message) -> Result<T, Refusal> {
    message.body_as().ok_or(Refusal::Malformed("wrong length"))
}

/// The body, which is one number.
pub(super) fn number(message: &Message) -> Result<u64, Refusal> {
    Ok(body::<VhostUserU64>(message)?.value)
}

/// A value as it goes onto the wire.
pub(super) fn bytes_of(value: &impl ByteValued) -> Vec<u8> {
    value.as_slice().to_vec()
}

/// A region as `memory` wants it.
pub(super) fn spec(region: &VhostUserMemoryRegion) -> RegionSpec {
    RegionSpec {
        guest: region.guest_phys_addr,
        user: region.user_addr,
        len: region.memory_size,
        offset: region.mmap_offset,
    }
}

/// The header of a configuration message and its payload, which may be absent in a request to read.
pub(super) fn config_message(message: &Message) -> Option<(VhostUserConfig, &[u8])> {
    let (header, payload) = message.body.split_at_checked(size_of::<VhostUserConfig>())?;
    let header: VhostUserConfig = exactly(header)?;
    (payload.is_empty() || payload.len() == header.size as usize).then_some((header, payload))
}

/// The descriptor of a ring message, whose value says whether there is one.
pub(super) fn only_fd(value: u64, fds: &mut Vec<OwnedFd>) -> Result<Option<OwnedFd>, Refusal> {
    if value & !(QUEUE_MASK | NO_FD) != 0 {
        return Err(Refusal::Malformed("unknown bits"));
    }
    match (value & NO_FD != 0, fds.pop()) {
        (true, None) => Ok(None),
        (false, Some(fd)) => Ok(Some(fd)),
        _ => Err(Refusal::Malformed("a descriptor too many or too few")),
    }
}
