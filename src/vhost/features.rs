//! What is offered, and what the bits mean once they come back.

use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::volume::DiskConfig;

/// The vhost-user spec's own bit among the virtio features.
const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// And the one by which it asks for a dirty log.
const F_LOG_ALL: u64 = 1 << 26;

/// Feature bits that the driver and the VMM have agreed to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Features(pub u64);

impl Features {
    /// What a disk like `config` offers. In-order completion, notification data and ring reset are
    /// absent because they are not implemented in full: a VMM takes all it is offered.
    pub fn offered(config: &DiskConfig) -> Self {
        let mut bits = F_PROTOCOL_FEATURES | F_LOG_ALL;
        for bit in [
            VIRTIO_F_VERSION_1,
            VIRTIO_F_RING_PACKED,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            blk::VIRTIO_BLK_F_SEG_MAX,
            blk::VIRTIO_BLK_F_BLK_SIZE,
            blk::VIRTIO_BLK_F_TOPOLOGY,
            blk::VIRTIO_BLK_F_MQ,
            blk::VIRTIO_BLK_F_FLUSH,
            blk::VIRTIO_BLK_F_CONFIG_WCE,
        ] {
            bits |= 1 << bit;
        }
        bits |= if config.read_only {
            1 << blk::VIRTIO_BLK_F_RO
        } else {
            1 << blk::VIRTIO_BLK_F_DISCARD | 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES
        };
        Self(bits)
    }

    fn has(self, bit: u32) -> bool {
        self.0 & (1 << bit) != 0
    }

    /// Whether rings need an explicit enable.
    pub fn protocol_features(self) -> bool {
        self.0 & F_PROTOCOL_FEATURES != 0
    }

    /// Whether writes to the guest's memory are logged.
    pub fn log_all(self) -> bool {
        self.0 & F_LOG_ALL != 0
    }

    /// Whether rings are packed.
    pub fn packed(self) -> bool {
        self.has(VIRTIO_F_RING_PACKED)
    }

    /// Whether notifications are told by index (virtio 1.3 §2.7.7).
    pub fn event_idx(self) -> bool {
        self.has(VIRTIO_RING_F_EVENT_IDX)
    }

    /// Whether a descriptor may refer to a table of descriptors.
    pub fn indirect(self) -> bool {
        self.has(VIRTIO_RING_F_INDIRECT_DESC)
    }

    /// Whether the driver can ask for durability.
    pub fn flush(self) -> bool {
        self.has(blk::VIRTIO_BLK_F_FLUSH)
    }

    /// Whether DISCARD requests may come.
    pub fn discard(self) -> bool {
        self.has(blk::VIRTIO_BLK_F_DISCARD)
    }

    /// Whether WRITE_ZEROES requests may come.
    pub fn write_zeroes(self) -> bool {
        self.has(blk::VIRTIO_BLK_F_WRITE_ZEROES)
    }
}

/// Protocol features offered. What is not here is not obeyed: `docs/protocol.md` says why.
pub(super) fn protocol_offered() -> u64 {
    (Protocol::MQ
        | Protocol::LOG_SHMFD
        | Protocol::REPLY_ACK
        | Protocol::BACKEND_REQ
        | Protocol::CONFIG
        | Protocol::INFLIGHT_SHMFD
        | Protocol::RESET_DEVICE
        | Protocol::STATUS
        | Protocol::CONFIGURE_MEM_SLOTS)
        .bits()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::testing::disk_config;

    #[test]
    fn a_read_only_disk_offers_nothing_that_changes_it() {
        let offered = Features::offered(&DiskConfig { read_only: true, ..disk_config() });
        assert!(offered.has(blk::VIRTIO_BLK_F_RO));
        assert!(!offered.discard() && !offered.write_zeroes());
        let offered = Features::offered(&disk_config());
        assert!(!offered.has(blk::VIRTIO_BLK_F_RO));
        assert!(offered.discard() && offered.write_zeroes());
    }

    #[test]
    fn nothing_unimplemented_is_offered() {
        let bits = Features::offered(&disk_config()).0;
        let known = 1 << 2 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14;
        let transport = 1 << 26 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32 | 1 << 34;
        assert_eq!(bits & !(known | transport), 0, "{bits:#x}");
        assert_eq!(
            protocol_offered(),
            1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 16
        );
    }
}
