//! Trouble within a life: disks that hang or go away, and a guest that changes its mind about its
//! write cache, each with requests in flight.
//!
//! What a guest is still promised then: in write-back mode nothing but a read of what is not cached
//! may fail, whatever the disk does; and all of it goes on once the disk is back.

use super::super::machine::Machine;
use super::super::world::Faults;
use super::Run;
use crate::cache::{Mode, Order, VolumeDisk};
use crate::volume::Disk;

/// Longest trouble in steps.
const LENGTH_MAX: u64 = 400;

impl Run {
    /// Ends what has lasted long enough, and now and then begins something.
    pub(super) fn trouble(&mut self) {
        self.see_orders();
        if self.trouble_ends.is_some_and(|end| end <= self.step) {
            self.end_trouble();
        }
        if !self.has_trouble || self.trouble_ends.is_some() || !self.rng.chance(1, 150) {
            return;
        }
        let volume = self.rng.index(self.scenario.volumes);
        // The volume's disk, or its redo area.
        let disk = if self.rng.chance(1, 4) { self.scenario.volumes + volume } else { volume };
        let bit = 1 << disk;
        match self.rng.below(4) {
            3 if self.scenario.is_joint => return,
            3 => return self.change_order(volume),
            0 => {
                self.note(|| format!("disk {disk} goes away"));
                self.world.with(|w| w.faults.away |= bit);
                self.forgives = true;
                self.stats.outages += 1;
            }
            1 => {
                self.note(|| format!("disk {disk} hangs"));
                self.world.with(|w| w.faults.hung |= bit);
                self.stats.stalls += 1;
            }
            _ => return self.toggle_write_cache(volume),
        }
        self.trouble_ends = Some(self.step + self.rng.between(10, LENGTH_MAX));
    }

    fn end_trouble(&mut self) {
        self.trouble_ends = None;
        self.note(|| "the disks are back".to_owned());
        let loses = self.rng.chance(1, 2);
        self.world.with(|w| {
            let (away, lossy) = (w.faults.away, w.faults.lossy);
            (w.faults.away, w.faults.hung) = (0, 0);
            for (number, disk) in w.disks.iter_mut().enumerate() {
                if loses && Faults::has(away & lossy, number) {
                    // Its power was gone, and with it its write cache: the kernel tells by the
                    // next flush.
                    w.deeds.lost_by_flush += disk.lose_write_cache(&mut w.rng);
                    disk.owes_error = true;
                }
            }
        });
    }

    /// The disks whose loss of unflushed data the engine must survive: those it alone writes to. A
    /// guest that writes to the disk itself is told by its own FLUSH.
    pub(super) fn lossy_disks(&self) -> u64 {
        let bits = self.styles.iter().enumerate();
        let written: u64 =
            bits.filter(|(_, s)| s.mode == Mode::Writeback).map(|(volume, _)| 1 << volume).sum();
        // Redo areas are the engine's own.
        written | ((1 << self.scenario.volumes) - 1) << self.scenario.volumes
    }

    fn toggle_write_cache(&mut self, volume: usize) {
        let on = !self.styles[volume].write_cache;
        self.note(|| format!("volume {volume}: write cache {on}"));
        self.styles[volume].write_cache = on;
        set_write_cache(self.machine(), volume, on);
        self.stats.cache_toggles += 1;
    }

    /// Another order of write-back, under a guest that goes on.
    fn change_order(&mut self, volume: usize) {
        if self.styles[volume].mode != Mode::Writeback {
            return;
        }
        let order = self.rng.pick(&[Order::Strict, Order::Grouped, Order::Relaxed]);
        self.note(|| format!("volume {volume}: order {order}"));
        let changed = self.machine().served[volume].volume.change_order(order);
        changed.expect("every volume has a redo area");
        self.styles[volume].order = order;
        let oracle = &mut self.oracles[volume];
        oracle.is_ordered &= order != Order::Relaxed;
        oracle.is_exact &= order == Order::Grouped;
        self.changing |= 1 << volume;
        self.stats.order_changes += 1;
    }

    /// Sees which changes of order have come to their end: from there on the disk alone is what the
    /// order promises.
    fn see_orders(&mut self) {
        let changing = self.changing;
        for volume in (0..self.scenario.volumes).filter(|v| changing >> v & 1 == 1) {
            let served = &self.machine.as_ref().expect("between two lives nothing steps").served[volume];
            if served.volume.is_changing_order() {
                continue;
            }
            let order = served.volume.order();
            assert_eq!(order, self.styles[volume].order, "the order that was asked for");
            let oracle = &mut self.oracles[volume];
            oracle.is_ordered |= order != Order::Relaxed;
            oracle.is_exact |= order == Order::Grouped;
            self.changing &= !(1 << volume);
        }
    }

    /// Whether a disk is away now.
    pub(super) fn is_away(&self, volume: usize) -> bool {
        self.world.with(|w| Faults::has(w.faults.away, volume))
    }
}

fn set_write_cache(machine: &Machine, volume: usize, on: bool) {
    VolumeDisk(machine.served[volume].volume.clone()).set_write_cache(on);
}
