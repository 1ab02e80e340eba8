//! The judgement of one crash image: recovered by the engine, read through it, compared.

use std::cell::{OnceCell, RefCell};
use std::sync::Arc;

use super::backing::SimBacking;
use super::books::{self, Dirty};
use super::disk::{DiskState, DiskSurvival};
use super::joint::JointOracle;
use super::machine::{Machine, Style};
use super::memory::{Memory, Survival};
use super::oracle::{Oracle, Recoverable};
use super::rng::Rng;
use super::stats::Stats;
use super::world::{Snapshot, State, World};
use crate::cache::{Member, Mode, Order, recover_backing, recover_group};

/// What the images of one instant are judged by.
pub(super) struct Instant<'a> {
    pub oracles: &'a [Oracle],
    /// The model of all of them as one, where they are a consistency group.
    pub joint: Option<&'a JointOracle>,
    pub styles: &'a [Style],
    pub queues: u16,
    /// Of each volume: what it may show after a daemon's death, and after the host's.
    recoverable: [OnceCell<Vec<Recoverable>>; 2],
    /// Of each volume: what its disk alone held when it was last judged.
    disks_alone: RefCell<Vec<Vec<u64>>>,
}

impl<'a> Instant<'a> {
    pub fn new(
        oracles: &'a [Oracle],
        joint: Option<&'a JointOracle>,
        styles: &'a [Style],
        queues: u16,
    ) -> Instant<'a> {
        let disks_alone = RefCell::new(vec![Vec::new(); oracles.len()]);
        Instant { oracles, joint, styles, queues, recoverable: Default::default(), disks_alone }
    }

    fn recoverable(&self, host: bool) -> &[Recoverable] {
        let all = || self.oracles.iter().map(|o| o.recoverable(host)).collect();
        self.recoverable[usize::from(host)].get_or_init(all)
    }
}

/// How an image came about.
#[derive(Clone, Copy)]
pub(super) struct Judge<'a> {
    pub at: &'a Instant<'a>,
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
            self.disks_alone(&image, rng, stats)?;
        }
        let before = (self.depth > 0 && rng.chance(1, 8)).then(|| image.clone());
        let world = World::new(image, rng.next());
        if before.is_some() {
            world.with(|w| {
                w.cuts.rate = rng.between(1, 40);
                w.cuts.every_edge = rng.chance(1, 8);
                w.cuts.count_max = 4;
            });
        }
        let machine = Machine::open(&world, self.at.styles, self.at.queues)?;
        let cuts = world.take_cuts();
        stats.images += 1;
        stats.host_images += u64::from(self.host);
        books::audit(&machine, rng.chance(1, 4), stats)?;
        let recovered = self.compare(world, machine)?;
        if let Some(before) = before {
            for (_, snapshot) in cuts {
                self.inside_recovery(&before, &snapshot, rng, stats)?;
            }
        }
        if self.depth > 0 && rng.chance(1, 8) {
            self.after_recovery(&recovered, rng, stats)?;
        }
        Ok(recovered)
    }

    fn compare(&self, world: Arc<World>, mut machine: Machine) -> Result<Recovered, String> {
        let dirty = books::dirty(&machine);
        let mut values = Vec::new();
        for (volume, recoverable) in self.at.recoverable(self.host).iter().enumerate() {
            let read = machine.read_all(volume)?;
            if let Some(sector) = recoverable.first_wrong(&read) {
                let told = self.at.oracles[volume].may_recover(sector, read[sector as usize], self.host);
                return Err(format!("volume {volume}, after recovery: {}", told.expect_err("it is wrong")));
            }
            values.push(read);
        }
        Ok(Recovered { world, machine, values, dirty })
    }

    /// With the cache lost, each ordered disk is a legal older state of its volume.
    fn disks_alone(&self, image: &Snapshot, rng: &mut Rng, stats: &mut Stats) -> Result<(), String> {
        if let Some(joint) = self.at.joint {
            return self.disks_together(image, joint, rng, stats);
        }
        let mut judged = self.at.disks_alone.borrow_mut();
        for (volume, (oracle, disk)) in self.at.oracles.iter().zip(&image.disks).enumerate() {
            let style = self.at.styles[volume];
            let is_of = |order| u64::from(style.mode == Mode::Writeback && style.order == order);
            if !oracle.is_ordered {
                stats.alone_relaxed += is_of(Order::Relaxed);
                continue;
            }
            stats.disks_alone += 1;
            stats.alone_strict += is_of(Order::Strict);
            stats.alone_grouped += is_of(Order::Grouped) & u64::from(oracle.is_exact);
            let alone = self.recover_backing(image, volume, rng, stats)?;
            for disk in if alone.is_empty() { vec![disk] } else { alone.iter().collect() } {
                let values = disk.durable_values();
                if judged[volume] != values {
                    oracle
                        .judge_disk_alone(values)
                        .map_err(|e| format!("volume {volume}, cache lost: {e}"))?;
                    values.clone_into(&mut judged[volume]);
                }
            }
        }
        Ok(())
    }

    /// With the cache lost, the disks of a consistency group stand at one point, whatever befalls who
    /// recovers them; each is a legal older state of its volume.
    fn disks_together(
        &self,
        image: &Snapshot,
        joint: &JointOracle,
        rng: &mut Rng,
        stats: &mut Stats,
    ) -> Result<(), String> {
        let volumes = self.at.oracles.len();
        stats.disks_together += 1;
        let has_areas = image.disks.len() > volumes && !image.disks[volumes..].iter().all(|d| d.is_blank());
        let disks = image.disks.clone();
        let mut images = vec![Snapshot { what: "recover-backing", memory: Memory::nothing(), disks }];
        let mut is_first = true;
        while let Some(image) = images.pop() {
            let world = World::new(image, rng.next());
            if has_areas {
                if is_first && rng.chance(1, 4) {
                    world.with(|w| (w.cuts.rate, w.cuts.count_max) = (4, 2));
                }
                let disks: Vec<_> = (0..volumes).map(|number| SimBacking::new(&world, number)).collect();
                let redo = |number| Arc::new(SimBacking::new(&world, volumes + number));
                let members = disks.iter().enumerate().map(|(n, disk)| Member { redo: redo(n), disk });
                let members: Vec<_> = members.collect();
                let done = recover_group(&members, false, false)
                    .map_err(|e| format!("a group of volumes, cache lost: {e}"))?;
                for (_, cut) in world.take_cuts() {
                    images.push(cut.host_crash(&Survival::Nothing, disk_survival(rng), rng).0);
                }
                stats.joint_images += u64::from(done.iter().flatten().count() > 1);
            }
            is_first = false;
            let values =
                |w: &mut State| w.disks[..volumes].iter().map(|d| d.durable_values().to_vec()).collect();
            let values: Vec<Vec<u64>> = world.with(values);
            for (volume, (oracle, values)) in self.at.oracles.iter().zip(&values).enumerate() {
                oracle.judge_disk_alone(values).map_err(|e| format!("volume {volume}, cache lost: {e}"))?;
            }
            joint
                .judge_disks_alone(&values.concat())
                .map_err(|e| format!("a group of volumes, cache lost: {e}"))?;
        }
        Ok(())
    }

    /// What the redo area makes of a volume's disk alone; nothing where there is none, or it is idle.
    /// A crash inside that changes nothing about where it ends.
    fn recover_backing(
        &self,
        image: &Snapshot,
        volume: usize,
        rng: &mut Rng,
        stats: &mut Stats,
    ) -> Result<Vec<DiskState>, String> {
        let redo = self.at.oracles.len() + volume;
        if redo >= image.disks.len() || image.disks[redo].is_blank() {
            return Ok(Vec::new());
        }
        let disks = image.disks.clone();
        let mut images = vec![Snapshot { what: "recover-backing", memory: Memory::nothing(), disks }];
        let mut recovered = Vec::new();
        while let Some(image) = images.pop() {
            let world = World::new(image, rng.next());
            if recovered.is_empty() && rng.chance(1, 4) {
                world.with(|w| (w.cuts.rate, w.cuts.count_max) = (4, 2));
            }
            let backing = |number| SimBacking::new(&world, number);
            let done = recover_backing(Arc::new(backing(redo)), &backing(volume), false)
                .map_err(|e| format!("volume {volume}, cache lost: {e}"))?;
            for (_, cut) in world.take_cuts() {
                images.push(cut.host_crash(&Survival::Nothing, disk_survival(rng), rng).0);
            }
            if done.is_none() && recovered.is_empty() {
                return Ok(Vec::new());
            }
            stats.redo_images += 1;
            recovered.push(world.with(|w| w.disks[volume].clone()));
        }
        Ok(recovered)
    }

    /// A crash inside the recovery of `before`: what it leaves is recovered like any other image.
    fn inside_recovery(
        &self,
        before: &Snapshot,
        snapshot: &Snapshot,
        rng: &mut Rng,
        stats: &mut Stats,
    ) -> Result<(), String> {
        let host = self.host || rng.chance(1, 2);
        let image = if host {
            let survival = survival(snapshot.memory.pending_lines(), rng);
            snapshot.host_crash(&survival, disk_survival(rng), rng).0
        } else {
            snapshot.daemon_crash(rng)
        };
        if image.is_same(before) {
            stats.equal_images += 1;
            return Ok(());
        }
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
            let is_settled = self.host || !self.at.styles[volume].mode.bypasses();
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

/// Pending lines up to which every subset of them is an image.
pub(super) const EXHAUSTED_LINES: usize = 6;

/// The ways to lose things that are tried at one instant, where `lines` may be lost.
pub(super) fn survivals(lines: usize, rng: &mut Rng) -> Vec<Survival> {
    if lines == 0 {
        // Only the disks have a choice.
        return vec![Survival::Everything; 4];
    }
    let mut all: Vec<Survival> = if lines <= EXHAUSTED_LINES {
        (0..1 << lines).map(Survival::Lines).collect()
    } else {
        let mut line = || rng.index(lines);
        vec![
            Survival::Nothing,
            Survival::Everything,
            Survival::AllBut(line()),
            Survival::Only(line()),
            Survival::AllBut(line()),
            Survival::Random,
        ]
    };
    all.extend([Survival::TornLine(rng.index(lines)), Survival::Torn]);
    all
}

/// A way to lose things, where `lines` may be lost.
pub(super) fn survival(lines: usize, rng: &mut Rng) -> Survival {
    let line = rng.index(lines.max(1));
    match rng.below(8) {
        0 => Survival::Nothing,
        1 => Survival::Everything,
        2 => Survival::AllBut(line),
        3 => Survival::Only(line),
        4 => Survival::TornLine(line),
        5 => Survival::Random,
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
