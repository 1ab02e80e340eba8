//! The judgement of one crash image: recovered by the engine, read through it, compared.

use std::sync::Arc;

use super::books::{self, Dirty};
use super::disk::DiskSurvival;
use super::machine::{Machine, Style};
use super::memory::Survival;
use super::oracle::Oracle;
use super::rng::Rng;
use super::stats::Stats;
use super::world::{Snapshot, World};

/// What an image is judged by.
#[derive(Clone, Copy)]
pub(super) struct Judge<'a> {
    pub oracles: &'a [Oracle],
    pub styles: &'a [Style],
    pub queues: u16,
    /// Whether the host died at some point, or only the daemon.
    pub host: bool,
    /// Crashes inside recovery that may still follow.
    pub depth: u32,
}

/// A recovered image.
pub(super) struct Recovered {
    pub world: Arc<World>,
    pub machine: Machine,
    /// What every sector of every volume reads as.
    pub values: Vec<Vec<u64>>,
    /// What was dirty before anything was read.
    pub dirty: Dirty,
}

impl Judge<'_> {
    /// Recovers an image and compares every sector.
    pub fn image(&self, image: Snapshot, rng: &mut Rng, stats: &mut Stats) -> Result<Recovered, String> {
        if self.host {
            self.disks_alone(&image, stats)?;
        }
        let world = World::new(image, rng.next());
        let inside = self.depth > 0 && rng.chance(1, 4);
        if inside {
            world.with(|w| w.rate = rng.between(1, 60));
        }
        let machine = Machine::open(&world, self.styles, self.queues)?;
        world.with(|w| w.rate = 0);
        stats.images += 1;
        stats.host_images += u64::from(self.host);
        books::audit(&machine, rng.chance(1, 4), stats)?;
        let recovered = self.compare(world, machine)?;
        if let Some(snapshot) = recovered.world.take_snapshot() {
            self.inside_recovery(&snapshot, rng, stats)?;
        }
        if self.depth > 0 && rng.chance(1, 8) {
            self.after_recovery(&recovered, rng, stats)?;
        }
        Ok(recovered)
    }

    fn compare(&self, world: Arc<World>, mut machine: Machine) -> Result<Recovered, String> {
        let dirty = books::dirty(&machine);
        let mut values = Vec::new();
        for (volume, oracle) in self.oracles.iter().enumerate() {
            let read = machine.read_all(volume)?;
            for (sector, &value) in read.iter().enumerate() {
                oracle
                    .may_recover(sector as u64, value, self.host)
                    .map_err(|e| format!("volume {volume}, after recovery: {e}"))?;
            }
            values.push(read);
        }
        Ok(Recovered { world, machine, values, dirty })
    }

    /// With the cache lost, each ordered disk is a legal older state of its volume.
    fn disks_alone(&self, image: &Snapshot, stats: &mut Stats) -> Result<(), String> {
        for (volume, (oracle, disk)) in self.oracles.iter().zip(&image.disks).enumerate() {
            if oracle.is_ordered {
                stats.disks_alone += 1;
                oracle
                    .judge_disk_alone(disk.durable_values())
                    .map_err(|e| format!("volume {volume}, cache lost: {e}"))?;
            }
        }
        Ok(())
    }

    /// A crash inside recovery: what it leaves is recovered like any other image.
    fn inside_recovery(&self, snapshot: &Snapshot, rng: &mut Rng, stats: &mut Stats) -> Result<(), String> {
        let host = self.host || rng.chance(1, 2);
        let image = if host {
            let survival = survival(snapshot.memory.pending_lines(), rng);
            snapshot.host_crash(&survival, disk_survival(rng), rng).0
        } else {
            snapshot.daemon_crash(rng)
        };
        let what = snapshot.what;
        let judge = Judge { host, depth: self.depth - 1, ..*self };
        stats.recovery_images += 1;
        stats.host_in_recovery += u64::from(host && !self.host);
        judge.image(image, rng, stats).map_err(|e| format!("crash inside recovery before {what}: {e}"))?;
        Ok(())
    }

    /// What recovery served is durable: a host crash right after it changes nothing that was read.
    fn after_recovery(&self, first: &Recovered, rng: &mut Rng, stats: &mut Stats) -> Result<(), String> {
        let snapshot = first.world.photograph("second crash");
        let survival = if rng.chance(1, 2) { Survival::Nothing } else { survival(40, rng) };
        let (image, _) = snapshot.host_crash(&survival, DiskSurvival::Nothing, rng);
        stats.second_images += 1;
        stats.host_after_recovery += u64::from(!self.host);
        let judge = Judge { host: true, depth: 0, ..*self };
        let second = judge.image(image, rng, stats).map_err(|e| format!("host crash after recovery: {e}"))?;
        if first.dirty != second.dirty {
            return Err(format!(
                "dirty after a recovery {:?}, after the next {:?}",
                first.dirty, second.dirty
            ));
        }
        for (volume, (a, b)) in first.values.iter().zip(&second.values).enumerate() {
            // A disk's own write cache outlives a daemon, and its loss is no business of the cache.
            let is_settled = self.host || !self.styles[volume].mode.bypasses();
            if let Some(sector) = (0..a.len()).find(|&s| is_settled && a[s] != b[s]) {
                return Err(format!(
                    "volume {volume}: sector {sector} read {:#x} after a recovery and {:#x} after the next",
                    a[sector], b[sector]
                ));
            }
        }
        Ok(())
    }
}

/// A way to lose things, where `lines` may be lost.
pub(super) fn survival(lines: usize, rng: &mut Rng) -> Survival {
    let line = rng.index(lines.max(1));
    match rng.below(8) {
        0 => Survival::Nothing,
        1 => Survival::Everything,
        2 => Survival::AllBut(line),
        3 => Survival::Only(line),
        4 | 5 => Survival::Random,
        _ => Survival::Torn,
    }
}

pub(super) fn disk_survival(rng: &mut Rng) -> DiskSurvival {
    match rng.below(6) {
        0 => DiskSurvival::Nothing,
        1 => DiskSurvival::Completed,
        2 => DiskSurvival::Everything,
        _ => DiskSurvival::Random,
    }
}
