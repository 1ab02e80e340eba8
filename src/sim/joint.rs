//! The model of a consistency group: its volumes, one after the other, as one.
//!
//! What a group promises of its disks is what a volume promises of its own, with every FLUSH and every
//! moment common to all: so the model of one volume is enough ([`Oracle`]), if it has the sectors of all.

use super::disk::DiskState;
use super::oracle::Oracle;
use super::world::World;

/// See the module's head.
#[derive(Clone, Debug)]
pub(super) struct JointOracle {
    /// The model.
    pub all: Oracle,
    /// Where each volume's sectors begin in it.
    firsts: Vec<u64>,
}

impl JointOracle {
    /// Volumes whose disks hold what these do, durably.
    pub fn new(disks: &[DiskState]) -> JointOracle {
        let mut firsts = vec![0];
        for disk in disks {
            firsts.push(firsts[firsts.len() - 1] + disk.sectors());
        }
        let content: Vec<u64> = disks.iter().flat_map(DiskState::durable_values).copied().collect();
        JointOracle { all: Oracle::new(&content), firsts }
    }

    /// A write, or zeroing, of a volume begins. Returns its name.
    pub fn begin_write(&mut self, volume: usize, first: u64, count: u64, value: u64) -> u64 {
        self.all.begin_write(self.firsts[volume] + first, count, value)
    }

    /// It ends: acknowledged, durably so, and submitted without a write cache, or not.
    pub fn end_write(
        &mut self,
        volume: usize,
        id: u64,
        (first, count): (u64, u64),
        (is_acked, is_durable, is_through): (bool, bool, bool),
    ) {
        let first = self.firsts[volume] + first;
        match is_acked && is_through {
            true => self.all.end_through(id, first, count),
            false => self.all.end_write(id, first, count, is_acked, is_durable),
        }
    }

    /// Forgets what can matter no more.
    pub fn prune(&mut self, world: &World) {
        let Self { all, firsts } = self;
        all.prune(u64::MAX, |sector| {
            let volume = firsts.partition_point(|&first| first <= sector) - 1;
            world.with(|w| w.disks[volume].possible(sector - firsts[volume]))
        });
    }

    /// Whether the disks alone, holding these values one after the other, stand at one point.
    ///
    /// # Errors
    /// What they show, and what they should have shown before that.
    pub fn judge_disks_alone(&self, values: &[u64]) -> Result<(), String> {
        self.all.judge_disk_alone(values)
    }
}
