//! The bytes of `struct virtio_blk_config` (virtio 1.3 §5.2.4).
//!
//! ```text
//!  0 capacity        u64   8 size_max        u32  12 seg_max   u32  16 geometry       4 B
//! 20 blk_size        u32  24 physical_exp    u8   25 align_off u8   26 min_io         u16
//! 28 opt_io          u32  32 writeback       u8   33 unused    u8   34 num_queues     u16
//! 36 max_discard     u32  40 max_discard_seg u32  44 discard_align  u32
//! 48 max_zeroes      u32  52 max_zeroes_seg  u32  56 zeroes_unmap   u8   57 unused    3 B
//! ```
//!
//! What follows (secure erase, zoned) reads as zeros, up to the 256 bytes a VMM may ask for.

use crate::units::SECTOR;
use crate::volume::DiskConfig;

/// Bytes that can be read: what the vhost-user spec allows a message to carry.
pub(super) const CONFIG_LEN: u32 = 256;
/// Where old Cloud Hypervisor versions believe the configuration begins (the PCI offset).
const PCI_OFFSET: u32 = 0x100;
/// The one byte a driver may write.
pub(super) const WRITEBACK_AT: u32 = 32;
/// Ranges one DISCARD or WRITE_ZEROES may carry.
pub(super) const MAX_RANGES: u32 = 256;

/// Fewest segments offered: what Linux and Windows drivers assume of any disk.
const SEG_MAX_MIN: u32 = 126;
/// Sectors in one discarded or zeroed range: no limit but that of the field.
const MAX_RANGE_SECTORS: u32 = u32::MAX;

/// The whole space for `config`, with the write-back byte as given.
pub(super) fn bytes(config: &DiskConfig, writeback: bool) -> [u8; CONFIG_LEN as usize] {
    let mut space = [0; CONFIG_LEN as usize];
    let mut put = |at: usize, value: &[u8]| space[at..at + value.len()].copy_from_slice(value);
    let block = config.block_size.max(SECTOR as u32);
    let physical = config.physical_block_size.max(block);

    put(0, &config.sectors.to_le_bytes());
    put(12, &seg_max(config.queue_size).to_le_bytes());
    put(20, &block.to_le_bytes());
    put(24, &[(physical / block).ilog2() as u8]);
    // min_io_size is in logical blocks and 16 bits wide; opt_io_size in logical blocks.
    put(26, &u16::try_from(physical / block).unwrap_or(u16::MAX).to_le_bytes());
    put(28, &(config.optimal_io_size / block).to_le_bytes());
    put(WRITEBACK_AT as usize, &[u8::from(writeback)]);
    put(34, &config.queues.max(1).to_le_bytes());
    if !config.read_only {
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &(physical / SECTOR as u32).to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]);
    }
    space
}

/// The range of [`bytes`] that a message names, or `None` when there is no such range.
pub(super) fn range(offset: u32, size: u32) -> Option<std::ops::Range<usize>> {
    let start = if offset >= PCI_OFFSET { offset - PCI_OFFSET } else { offset };
    let end = start.checked_add(size)?;
    (size > 0 && end <= CONFIG_LEN).then_some(start as usize..end as usize)
}

/// Segments a request may have beside its header and status.
fn seg_max(queue_size: u16) -> u32 {
    u32::from(queue_size).saturating_sub(2).max(SEG_MAX_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::testing::disk_config;

    #[test]
    fn every_field_lies_where_the_specification_puts_it() {
        let config = DiskConfig {
            sectors: 0x0102_0304_0506,
            block_size: 512,
            physical_block_size: 4096,
            optimal_io_size: 65536,
            queues: 7,
            queue_size: 1024,
            ..disk_config()
        };
        let space = bytes(&config, true);
        assert_eq!(space[0..8], 0x0102_0304_0506u64.to_le_bytes());
        assert_eq!(space[8..12], [0; 4], "size_max is not offered");
        assert_eq!(space[12..16], 1022u32.to_le_bytes());
        assert_eq!(space[20..24], 512u32.to_le_bytes());
        assert_eq!(space[24..26], [3, 0]);
        assert_eq!(space[26..28], 8u16.to_le_bytes());
        assert_eq!(space[28..32], 128u32.to_le_bytes());
        assert_eq!(space[32..34], [1, 0]);
        assert_eq!(space[34..36], 7u16.to_le_bytes());
        assert_eq!(space[36..40], u32::MAX.to_le_bytes());
        assert_eq!(space[40..44], 256u32.to_le_bytes());
        assert_eq!(space[44..48], 8u32.to_le_bytes());
        assert_eq!(space[48..52], u32::MAX.to_le_bytes());
        assert_eq!(space[52..56], 256u32.to_le_bytes());
        assert_eq!(space[56], 1);
        assert!(space[57..].iter().all(|&byte| byte == 0));
        assert_eq!(bytes(&config, false)[32], 0);
    }

    #[test]
    fn small_rings_still_promise_the_segments_drivers_assume() {
        assert_eq!(seg_max(2), 126);
        assert_eq!(seg_max(128), 126);
        assert_eq!(seg_max(256), 254);
    }

    #[test]
    fn ranges_are_taken_at_both_origins_and_refused_past_the_end() {
        for (offset, size, expected) in [
            (0, 60, Some(0..60)),
            (0, 57, Some(0..57)),
            (0, 256, Some(0..256)),
            (32, 1, Some(32..33)),
            (0x100, 60, Some(0..60)),
            (0x120, 1, Some(32..33)),
            (0, 0, None),
            (0, 257, None),
            (255, 2, None),
            (0x1ff, 2, None),
            (u32::MAX, 2, None),
            (0x100, u32::MAX, None),
        ] {
            assert_eq!(range(offset, size), expected, "{offset:#x}+{size}");
        }
    }
}
