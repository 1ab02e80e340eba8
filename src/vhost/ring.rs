//! A virtqueue as its queue's thread sees it, whichever layout the driver chose.
//!
//! The two layouts share their life, not their bytes: chains are taken, found to be in flight, put
//! back and published. So the thread is generic over [`Ring`] and compiled once for each layout;
//! nothing is decided per descriptor. A ring's books about chains that an earlier process has taken
//! are its [`Tracker`], whose layout in shared memory follows the ring's.
//!
//! Nothing behind this trait believes the driver: what it returns as an error means that the ring is
//! not read again.

use std::sync::Arc;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::copy::Fault;
use super::features::Features;
use super::inflight::Tracker;
use super::memory::MemoryMap;

/// Bytes of a descriptor, in both layouts.
pub(super) const DESCRIPTOR_LEN: usize = 16;

/// Why a ring is not read any more. The driver's fault, all of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum RingError {
    #[error("the available index jumped {ahead} ahead on a ring of {size}")]
    IndexJump { ahead: u16, size: u16 },
    #[error("descriptor {head} is made available on a ring of {size}")]
    HeadOutOfRange { head: u16, size: u16 },
    #[error("descriptor {head} is made available while it is in flight")]
    HeadInFlight { head: u16 },
    #[error("descriptor chain {head}: {error}")]
    Chain { head: u16, error: ChainError },
    #[error("the ring's memory is gone")]
    Fault,
}

impl From<Fault> for RingError {
    fn from(Fault: Fault) -> Self {
        RingError::Fault
    }
}

/// What is wrong with a chain of descriptors such that no status can be returned through it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum ChainError {
    #[error("longer than the ring, or a loop")]
    TooLong,
    #[error("the next descriptor, {next}, is outside the table of {table}")]
    NextOutOfRange { next: u16, table: u16 },
    #[error("a device-readable part after a device-writable one")]
    ReadableAfterWritable,
    #[error("an indirect table inside an indirect table")]
    NestedIndirect,
    #[error("a descriptor that is indirect and has a next one")]
    IndirectWithNext,
    #[error("an indirect descriptor, which was not negotiated")]
    IndirectNotNegotiated,
    #[error("an indirect table of {len} bytes")]
    IndirectLength { len: u32 },
    #[error("an indirect table outside the guest's memory")]
    IndirectOutside,
    #[error("more than 2^32 bytes")]
    TooManyBytes,
    #[error("no room for the status byte")]
    NoStatus,
    #[error("its status byte is outside the guest's memory")]
    StatusOutside,
    #[error("its memory is gone")]
    Fault,
}

/// One descriptor, copied out of guest memory once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Descriptor {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    flags: u16,
    /// The descriptor after this one, if [`Descriptor::has_next`].
    pub next: u16,
}

impl Descriptor {
    /// From the bytes of one.
    pub fn decode(bytes: &[u8; DESCRIPTOR_LEN]) -> Self {
        let word = u128::from_le_bytes(*bytes);
        Self {
            addr: word as u64,
            len: (word >> 64) as u32,
            flags: (word >> 96) as u16,
            next: (word >> 112) as u16,
        }
    }

    /// From the bytes of one of a packed ring or table, whose successor is simply the one behind
    /// it; and its buffer id.
    pub fn decode_packed(bytes: &[u8; DESCRIPTOR_LEN], next: u16) -> (Self, u16) {
        let word = u128::from_le_bytes(*bytes);
        let descriptor =
            Self { addr: word as u64, len: (word >> 64) as u32, flags: (word >> 112) as u16, next };
        (descriptor, (word >> 96) as u16)
    }

    /// From the parts that an in-flight area keeps.
    pub fn from_parts(addr: u64, len: u32, flags: u16, next: u16) -> Self {
        Self { addr, len, flags, next }
    }

    /// Its flags as they were read.
    pub fn flags(&self) -> u16 {
        self.flags
    }

    /// Whether the chain goes on.
    pub fn has_next(&self) -> bool {
        u32::from(self.flags) & VRING_DESC_F_NEXT != 0
    }

    /// Whether the device writes there (rather than reads).
    pub fn is_writable(&self) -> bool {
        u32::from(self.flags) & VRING_DESC_F_WRITE != 0
    }

    /// Whether it refers to a table of descriptors.
    pub fn is_indirect(&self) -> bool {
        u32::from(self.flags) & VRING_DESC_F_INDIRECT != 0
    }
}

/// Where a ring's parts are, in the VMM's addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct RingAddresses {
    /// Descriptor table, 16-aligned.
    pub descriptors: u64,
    /// Available ring, 2-aligned; of a packed ring the driver's event suppression, 4-aligned.
    pub available: u64,
    /// Used ring, or the device's event suppression, 4-aligned.
    pub used: u64,
}

impl RingAddresses {
    /// Whether each part is aligned as virtio demands of a ring of any layout.
    pub fn are_aligned(&self) -> bool {
        self.descriptors.is_multiple_of(16) && self.available.is_multiple_of(2) && self.used.is_multiple_of(4)
    }
}

/// Where a ring is and where it stands.
#[derive(Clone, Debug)]
pub(super) struct RingPlace {
    /// What its addresses mean.
    pub memory: Arc<MemoryMap>,
    /// Where its parts are.
    pub addresses: RingAddresses,
    /// Descriptors.
    pub size: u16,
    /// Its position in the words of SET_VRING_BASE: where the next head is taken from and, of a
    /// packed ring, where the next used descriptor goes.
    pub base: u32,
    /// Guest address under which writes to the used ring are logged, if they are to be logged.
    pub log_at: Option<u64>,
}

/// A running virtqueue. Only its queue's thread touches it.
///
/// A head is the number under which the driver gets its chain back, below [`Ring::size`].
pub(super) trait Ring: Sized + Send + std::fmt::Debug + 'static {
    /// What remembers its chains in flight over the death of the process.
    type Tracker: Tracker<Self>;

    /// Whether this is the packed layout.
    const PACKED: bool;

    /// The ring at `place`. `None` when a part does not lie wholly in one region of the guest's
    /// memory or is not aligned there as its layout demands, or size or position are impossible.
    fn open(place: RingPlace, features: Features) -> Option<Self>;

    /// Descriptors.
    fn size(&self) -> u16;

    /// At most how many heads wait; 0 when none does.
    ///
    /// # Errors
    /// The ring cannot be believed, or is gone.
    fn available(&self) -> Result<u16, RingError>;

    /// Asks the processor for the descriptors of the next `count` heads, and does not wait: lines that the
    /// driver has just written are in its caches, not in ours. A hint, which believes nothing.
    fn prefetch(&self, _count: u16) {}

    /// Takes the next head, if one waits.
    ///
    /// # Errors
    /// What is there is no head; the position is unchanged then.
    fn take(&mut self) -> Result<Option<u16>, RingError>;

    /// Undoes the last [`Ring::take`], whose head is in flight already.
    fn untake(&mut self);

    /// Where the chain of `head`, which was just taken or recalled, begins.
    fn first(&self, head: u16) -> u16;

    /// Copies the descriptor at `at`, below [`Ring::size`], of that chain.
    ///
    /// # Errors
    /// Its memory is gone.
    fn descriptor(&self, at: u16) -> Result<Descriptor, Fault>;

    /// Puts a completed chain into the ring; the driver sees it after [`Ring::publish`].
    ///
    /// # Errors
    /// The ring's memory is gone.
    fn put_used(&mut self, head: u16, written: u32) -> Result<(), RingError>;

    /// Shows the driver everything put so far, which is `heads`.
    ///
    /// # Errors
    /// The ring's memory is gone.
    fn publish(&mut self, heads: &[u16]) -> Result<(), RingError>;

    /// Whether the driver wants to be notified of what was published since the last call. Call it
    /// after every [`Ring::publish`]: what is skipped would be forgotten.
    ///
    /// # Errors
    /// The ring's memory is gone.
    fn needs_notification(&mut self) -> Result<bool, RingError>;

    /// Asks the driver to kick for the next head: whether some came meanwhile, for which it will
    /// not.
    ///
    /// # Errors
    /// The ring cannot be believed, or is gone.
    fn enable_notifications(&mut self) -> Result<bool, RingError>;

    /// Asks the driver not to kick.
    ///
    /// # Errors
    /// The ring's memory is gone.
    fn disable_notifications(&mut self) -> Result<(), RingError>;

    /// Where the next used element goes, counting those not yet published, for the ring's tracker.
    fn used(&self) -> u32;

    /// What lies between its two positions without being one of the `busy` chains in flight. It
    /// never changes while the ring runs. Asked between turns, when everything put is published.
    #[cfg(feature = "sim")]
    fn skew(&self, busy: u16) -> u16;

    /// Its position as GET_VRING_BASE says it while `busy` heads are in flight.
    fn base(&self, busy: u16) -> u32;
}
