//! Between two lives: what may be done to disks and volumes while nobody serves them.
//!
//! What must hold:
//! - A disk that is not the volume's own, has another size, was written to since an orderly end, or
//!   is not there, is refused and not written to; nothing is lost by the attempt, and the right disk
//!   is welcome afterwards. A copy is welcome after an orderly end.
//! - A host that dies after an orderly end changes nothing about that.
//! - A volume deleted without leave to lose data has all of it on its disk. Of a deleted volume
//!   nothing shows in the one made in its slot, at any instant: whoever crashes inside the delete
//!   finds the old volume whole, or none.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::super::backing::SimBacking;
use super::super::check::{disk_survival, survival};
use super::super::disk::DiskState;
use super::super::machine::Machine;
use super::super::memory::SimPmem;
use super::super::oracle::Oracle;
use super::super::scenario::Scenario;
use super::super::world::{SimClock, SimEnv, Snapshot, World};
use super::Run;
use crate::cache::{Cache, DeleteError, recover_backing};

/// What a life left, on its way into the next.
pub(super) struct Left {
    pub image: Snapshot,
    /// Whether the host has died since, or only the daemon.
    pub host: bool,
    /// Whether the life ended in order.
    pub in_order: bool,
}

impl Run {
    /// Lets one thing happen to what is left, or none.
    pub(super) fn between_lives(&mut self, left: &mut Left) -> Result<(), String> {
        if !self.rng.chance(1, if left.in_order { 1 } else { 3 }) {
            return Ok(());
        }
        let volume = self.rng.index(self.scenario.volumes);
        match self.rng.below(9) {
            0 => self.another_disk(left, volume),
            1 => self.another_size(left, volume),
            2 => self.no_disk(left, volume),
            3 if left.in_order => self.changed_disk(left, volume),
            4 => self.copied_disk(left, volume),
            5 | 8 if left.in_order => {
                self.host_dies(left);
                self.stats.late_crashes += 1;
                Ok(())
            }
            // Nobody deletes a volume under a guest that waits for the daemon to come back.
            // Of a group each volume is needed.
            _ if (left.host || left.in_order) && !self.scenario.is_joint => {
                self.delete_and_make(left, volume)
            }
            _ => Ok(()),
        }
    }

    fn host_dies(&mut self, left: &mut Left) {
        let mut rng = self.rng.fork();
        let how = survival(left.image.memory.pending_lines(), &mut rng);
        left.image = left.image.host_crash(&how, disk_survival(&mut rng), &mut rng).0;
        left.host = true;
        self.note(|| "the host dies between two lives".to_owned());
    }

    /// Content of a disk that nobody has seen.
    fn fresh_disk(&mut self, sectors: u64) -> DiskState {
        let value = self.next_value;
        self.next_value += 1;
        let rng = &mut self.rng;
        let content = (0..sectors).map(|_| if rng.chance(3, 4) { value } else { 0 });
        DiskState::new(content.collect()).named(1000 + value)
    }

    fn another_disk(&mut self, left: &mut Left, volume: usize) -> Result<(), String> {
        let disk = self.fresh_disk(left.image.disks[volume].sectors());
        self.stats.other_disks += 1;
        self.refused(left, volume, disk, "is not the one that volume")
    }

    fn another_size(&mut self, left: &mut Left, volume: usize) -> Result<(), String> {
        let own = &left.image.disks[volume];
        let (sectors, by) = (own.sectors(), self.rng.pick(&[8, 64, 1000]));
        let grown = self.rng.chance(1, 2) || by >= sectors;
        let disk = own.resized(if grown { sectors + by } else { sectors - by });
        self.stats.other_sizes += 1;
        self.refused(left, volume, disk, "bytes, but volume")
    }

    fn no_disk(&mut self, left: &mut Left, volume: usize) -> Result<(), String> {
        let disk = left.image.disks[volume].clone();
        self.stats.absent_disks += 1;
        self.absent = 1 << volume;
        let refused = self.refused(left, volume, disk, "cannot be read or flushed");
        self.absent = 0;
        refused
    }

    /// Somebody else writes to the disk, wherever the fingerprint looks.
    fn changed_disk(&mut self, left: &mut Left, volume: usize) -> Result<(), String> {
        let own = &left.image.disks[volume];
        let (sectors, identity) = (own.sectors(), own.identity);
        let disk = self.fresh_disk(sectors).named(identity);
        self.stats.changed_disks += 1;
        self.refused(left, volume, disk, "has changed since")
    }

    /// After an orderly end content speaks louder than names; after a crash nobody knows whether the
    /// copy was made before it or after.
    fn copied_disk(&mut self, left: &mut Left, volume: usize) -> Result<(), String> {
        let identity = 1000 + self.next_value;
        self.next_value += 1;
        let mut copy = left.image.disks[volume].clone();
        copy.identity = identity;
        if left.in_order {
            self.note(|| format!("disk {volume} was copied"));
            left.image.disks[volume] = copy;
            self.stats.copied_disks += 1;
            return Ok(());
        }
        self.stats.other_disks += 1;
        self.refused(left, volume, copy, "is not the one that volume")
    }

    /// With `disk` as the volume's, the start is refused for the reason that `says`; afterwards the
    /// right one is back in its place.
    fn refused(&mut self, left: &mut Left, volume: usize, disk: DiskState, says: &str) -> Result<(), String> {
        self.note(|| format!("a start with a disk that {says} {volume}"));
        let own = left.image.disks[volume].clone();
        let mut wrong = left.image.clone();
        wrong.disks[volume] = disk.clone();
        let world = World::new(wrong, self.rng.next());
        world.with(|w| w.faults.away = self.absent);
        match Machine::open(&world, &self.styles, self.scenario.queues) {
            Ok(_) => return Err(format!("volume {volume} was attached to a disk that {says}")),
            Err(error) if error.contains(says) => {}
            Err(error) => return Err(format!("not refused as `{says}`: {error}")),
        }
        let mut after = world.photograph("a refused start");
        if after.disks[volume].values() != disk.values() {
            return Err(format!("a disk that was refused ({says}) was written to"));
        }
        after.disks[volume] = own;
        left.image = after.daemon_crash(&mut self.rng);
        // Other volumes may have been attached before this one was refused.
        left.in_order = false;
        if self.rng.chance(1, 2) {
            self.host_dies(left);
        }
        Ok(())
    }

    /// Deletes the volume; the next start makes another of that name before another disk.
    fn delete_and_make(&mut self, left: &mut Left, volume: usize) -> Result<(), String> {
        self.note(|| format!("volume {volume} is deleted"));
        let world = World::new(left.image.clone(), self.rng.next());
        world.act_as(0);
        // What a redo area holds of a volume that is no more would be nobody's.
        let backing = |number| SimBacking::new(&world, number);
        recover_backing(Arc::new(backing(self.scenario.volumes + volume)), &backing(volume), false)
            .map_err(|e| format!("volume {volume}, before it is deleted: {e}"))?;
        left.image = world.photograph("its redo area was applied");
        let rate = self.rng.between(2, 40);
        world.with(|w| (w.cuts.rate, w.cuts.count_max) = (rate, 2));
        self.delete(&world, left, volume)?;
        for (_, snapshot) in world.take_cuts() {
            self.crash_inside_delete(&snapshot, left.host, volume)?;
        }
        left.image = world.photograph("a delete").daemon_crash(&mut self.rng);
        left.in_order = false;
        let sectors = self.rng.pick(Scenario::sizes(self.scenario.is_large));
        let disk = self.fresh_disk(sectors);
        self.oracles[volume] = Oracle::new(disk.durable_values());
        left.image.disks[volume] = disk;
        if self.rng.chance(1, 2) {
            self.host_dies(left);
        }
        Ok(())
    }

    fn delete(&mut self, world: &Arc<World>, left: &Left, volume: usize) -> Result<(), String> {
        let (cache, _) = open_cache(world)?;
        let name = name_of(volume);
        match cache.delete_volume(&name, false) {
            Ok(()) => {
                let disk = &left.image.disks[volume];
                for sector in 0..disk.sectors() {
                    let value = disk.value(sector);
                    self.oracles[volume].may_recover(sector, value, left.host).map_err(|e| {
                        format!("volume {volume} was deleted without leave to lose data: {e}")
                    })?;
                }
            }
            Err(DeleteError::Dirty(_)) => {
                self.stats.deletes_of_dirty += 1;
                cache.delete_volume(&name, true).map_err(|e| format!("volume {volume} stays: {e}"))?;
            }
            Err(error) => return Err(format!("volume {volume} is not deleted: {error}")),
        }
        self.stats.deletes += 1;
        if cache.descriptor(&name).is_some() {
            return Err(format!("volume {volume} is still there after its delete"));
        }
        cache.audit(true).map_err(|e| format!("audit after a delete: {e}"))?;
        Ok(())
    }

    /// Whoever crashes inside a delete finds the old volume whole, or none and the disk as it is.
    fn crash_inside_delete(&mut self, snapshot: &Snapshot, host: bool, volume: usize) -> Result<(), String> {
        // Dice of its own: whether this is judged must not matter to the run.
        let mut dice = self.rng.fork();
        let mut seen = BTreeSet::new();
        for _ in 0..if self.plan.judges(self.step) { 3 } else { 0 } {
            let mut rng = dice.fork();
            let dies = rng.chance(2, 3);
            let (image, hash) = if dies {
                let how = survival(snapshot.memory.pending_lines(), &mut rng);
                let (image, hash) = snapshot.host_crash(&how, disk_survival(&mut rng), &mut rng);
                (image, Some(hash))
            } else {
                (snapshot.daemon_crash(&mut rng), None)
            };
            if !seen.insert(hash) {
                self.stats.equal_images += 1;
                continue;
            }
            let (cache, report) = open_cache(&World::new(image.clone(), 1))?;
            let is_there = cache.descriptor(&name_of(volume)).is_some();
            drop(cache);
            let old = self.oracles[volume].clone();
            if !is_there {
                self.oracles[volume] = Oracle::new(&image.disks[volume].values());
            }
            // Whose volume it is, is not durable while only the daemon is dead: a host that dies before
            // recovery has made it so may still bring the old one back.
            let depth = if dies { 2 } else { 0 };
            let judged = self.judge(image, host || dies, depth, &mut rng);
            self.oracles[volume] = old;
            self.stats.delete_images += 1;
            judged.map_err(|e| {
                let what = snapshot.what;
                format!("crash inside a delete before {what}, volume there: {is_there}: {e}; {report:?}")
            })?;
        }
        Ok(())
    }
}

type Opened = (Arc<Cache<SimEnv>>, crate::cache::RecoveryReport);

fn open_cache(world: &Arc<World>) -> Result<Opened, String> {
    let opened = Cache::<SimEnv>::open(Arc::new(SimPmem::new(world)), SimClock::default());
    opened.map_err(|e| format!("the cache does not open: {e}"))
}

/// What [`Machine::open`] calls a volume.
fn name_of(volume: usize) -> String {
    format!("volume{volume}")
}
