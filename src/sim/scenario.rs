//! What a seed decides before anything happens: media, geometry, volumes, and how they are served.

use super::machine::Style;
use super::rng::Rng;
use crate::cache::{IoLimits, Mode, Order, Shares};
use crate::onmedia::Geometry;
use crate::pmem::MediaClass;

/// The fixed part of a run.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// What everything follows from.
    pub seed: u64,
    /// Media.
    pub class: MediaClass,
    /// Layout, tiny: images are cheap and everything wraps soon.
    pub geometry: Geometry,
    /// Volumes on the cache.
    pub volumes: usize,
    /// Queues of each.
    pub queues: u16,
    /// Sectors of each.
    pub sectors: u64,
    /// How the volumes are served in the first life.
    pub styles: Vec<Style>,
    /// Whether later lives are served otherwise.
    pub changes_style: bool,
    /// Whether disks fail now and then.
    pub has_faults: bool,
    /// Whether the run ends with a `sync` that fails.
    pub ends_unsynced: bool,
    /// Longest request in sectors.
    pub request_max: u64,
    /// Whether it is one of the few with room.
    pub is_large: bool,
    /// Steps of the housekeeper after most batches: with some, segments are free more often than
    /// not, and reclaim relocates instead of dropping in haste.
    pub housekeeping: u64,
    /// Writes among 100 requests, of the 80 that are writes or reads.
    pub write_percent: u64,
    /// Whether write-back gets few steps: dirty data then pins segments for long.
    pub is_disk_slow: bool,
    /// Sectors of each volume's redo area: with few, epochs go in parts.
    pub redo_sectors: u64,
    /// Bytes of groups that go side by side where the area has room for two of them; 0 to let the engine
    /// see where that pays.
    pub group_bytes: u64,
    /// Whether what a failing disk owes waits for it.
    pub waits: bool,
    /// Whether the cache is scrubbed all the time.
    pub is_scrubbed: bool,
    /// Whether the cache grows and shrinks under its guests.
    pub resizes: bool,
    /// Whether it lies on a device, on which what is cut off stays.
    pub is_device: bool,
    /// Whether the volumes are one consistency group.
    pub is_joint: bool,
    /// Whether each life's volumes have minimums, maximums, weights and limits.
    pub has_shares: bool,
}

impl Scenario {
    /// Sizes of volumes in sectors.
    pub(super) fn sizes(is_large: bool) -> &'static [u64] {
        if is_large { &[512, 900, 2304] } else { &[40, 64, 96, 136, 200] }
    }

    /// The scenario of a seed.
    pub fn from_seed(seed: u64) -> Scenario {
        let mut rng = Rng::new(seed);
        let class = if rng.chance(3, 5) { MediaClass::AssumeDax } else { MediaClass::PageCache };
        let volumes = if rng.chance(1, 5) { 2 } else { 1 };
        // Most are as small as can be: an image costs what it holds, and everything wraps soon.
        let is_large = rng.chance(1, 10);
        // Page-cache media take none of 32 KiB.
        let small = class.fence_is_durable() && rng.chance(if is_large { 1 } else { 3 }, 4);
        let segment_size = if small { 32 << 10 } else { 64 << 10 };
        let segments = match is_large {
            true => rng.between(12, 28),
            false => rng.between(6, 12) + 3 * (volumes as u64 - 1),
        } as u32;
        let meta = (2 + 2 * volumes as u64) * 4096;
        let geometry = Geometry::custom(meta, segment_size, segments, volumes as u32);
        // Dice of their own.
        let mut apart = Rng::new(seed ^ 0x0dd5);
        let mut sizes = Rng::new(seed ^ 0x512e);
        let simple = rng.chance(1, 2);
        let plain = Style { order: rng.pick(&[Order::Strict, Order::Grouped]), ..Style::strict() };
        let styles = (0..volumes).map(|_| if simple { plain } else { Style::random(&mut rng) });
        let styles = styles.collect();
        let mut scenario = Scenario {
            seed,
            class,
            geometry: geometry.expect("within the bounds of a geometry"),
            volumes,
            queues: rng.between(1, 3) as u16,
            sectors: rng.pick(Self::sizes(is_large)),
            styles,
            changes_style: !simple && rng.chance(2, 3),
            has_faults: rng.chance(1, 4),
            ends_unsynced: class == MediaClass::PageCache && rng.chance(1, 4),
            request_max: if is_large { rng.pick(&[16, 40, 100]) } else { rng.pick(&[4, 8, 16, 40]) },
            is_large,
            housekeeping: rng.pick(&[0, 0, 4, 10]),
            write_percent: rng.pick(&[50, 50, 20]),
            is_disk_slow: rng.chance(1, 4),
            redo_sectors: 48 + u64::from(segment_size) / 16 / 512 + rng.pick(&[0, 24, 400]),
            waits: apart.chance(1, 2),
            is_scrubbed: apart.chance(1, 3),
            group_bytes: apart.pick(&[0, 1, 6 << 10, 20 << 10]),
            resizes: sizes.chance(1, 3),
            is_device: sizes.chance(1, 2),
            is_joint: false,
            has_shares: false,
        };
        if simple && volumes > 1 && apart.chance(2, 3) {
            scenario.is_joint = true;
            // An epoch must fit, whatever its queues have put into it.
            scenario.redo_sectors = 180 + apart.pick(&[0, 60, 400]);
        }
        scenario.has_shares = apart.chance(1, 4);
        scenario
    }

    /// What a volume may hold of the cache in one life. A minimum may be more than there is.
    pub(super) fn shares(&self, rng: &mut Rng) -> Shares {
        let segment = u64::from(self.geometry.segment_size);
        let max = if rng.chance(1, 2) { rng.between(4, 6) * segment } else { 0 };
        Shares {
            min: rng.pick(&[0, 0, 1, 2, 3]) * segment,
            max,
            weight: rng.pick(&[1, 100, 10_000]),
            gc_percent: rng.chance(1, 4).then(|| rng.pick(&[0, 30, 70, 90])),
        }
    }

    /// What a guest may ask for in one life.
    pub(super) fn limits(rng: &mut Rng) -> IoLimits {
        let some = |rng: &mut Rng, n: u64| if rng.chance(1, 3) { rng.between(n, 20 * n) } else { 0 };
        IoLimits {
            iops: some(rng, 5),
            read_iops: some(rng, 5),
            write_iops: some(rng, 5),
            bytes_per_s: some(rng, 20_000),
            read_bytes_per_s: some(rng, 20_000),
            write_bytes_per_s: some(rng, 20_000),
            burst_ms: rng.pick(&[1, 100, 5000]),
        }
    }
}

impl Style {
    /// Write-back in epoch order, with a write cache.
    pub fn strict() -> Style {
        Style { mode: Mode::Writeback, order: Order::Strict, write_cache: true, pass_discard: false }
    }

    /// Any: write-back mostly.
    pub fn random(rng: &mut Rng) -> Style {
        let others = [Mode::Writethrough, Mode::Writearound, Mode::Readonly, Mode::Passthrough];
        let mode = if rng.chance(3, 5) { Mode::Writeback } else { rng.pick(&others) };
        let order = rng.pick(&[Order::Strict, Order::Grouped, Order::Relaxed]);
        Style { mode, order, write_cache: rng.chance(3, 4), pass_discard: rng.chance(1, 2) }
    }
}
