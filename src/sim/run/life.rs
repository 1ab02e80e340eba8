//! Lives: how one begins, how it ends by a crash or in order, and what is compared then.

use std::collections::{BTreeMap, BTreeSet};

use super::super::books;
use super::super::check::{EXHAUSTED_LINES, Instant, Judge, Recovered, disk_survival, survival, survivals};
use super::super::loss::Loss;
use super::super::machine::{Served, Style, is_refusal};
use super::super::rng::Rng;
use super::super::scenario::Scenario;
use super::super::world::{Faults, Snapshot};
use super::between::Left;
use super::{Run, UnderWay};
use crate::cache::{IoLimits, Mode, OnBackingError, Order, ScrubOptions};

/// Rounds of everything after which a request counts as hung.
const ROUNDS_MAX: u32 = 20_000;

impl Run {
    fn faults(&mut self) -> Faults {
        match self.scenario.has_faults && self.rng.chance(1, 2) {
            true => Faults { read: 300, write: 800, flush: 2000, ..Faults::default() },
            false => Faults::default(),
        }
    }

    pub(super) fn begin_life(&mut self) {
        let faults = Faults { lossy: self.lossy_disks(), is_uneven: true, ..self.faults() };
        self.world.with(|w| w.faults = faults);
        self.trouble_ends = None;
        self.changing = 0;
        self.forgives = faults.may_fail_requests();
        let tail = |served: &Served| served.volume.counters().tail_epoch;
        self.tails = self.machine().served.iter().map(tail).collect();
        for volume in 0..self.scenario.volumes {
            let style = self.styles[volume];
            let is_clean = self.machine().served[volume].volume.is_clean();
            let is_grouped = style.mode == Mode::Writeback && style.order == Order::Grouped;
            let oracle = &mut self.oracles[volume];
            oracle.is_exact = is_grouped && (oracle.is_exact || is_clean);
            if style.mode == Mode::Writeback && style.order == Order::Relaxed {
                self.oracles[volume].is_ordered = false;
            } else if is_clean {
                self.oracles[volume].is_ordered = true;
            }
        }
        let is_clean = |served: &Served| served.volume.is_clean();
        let are_clean = self.machine().served.iter().all(is_clean);
        if let Some(joint) = &mut self.joint {
            joint.all.is_exact = self.styles[0].order == Order::Grouped && (joint.all.is_exact || are_clean);
        }
        let policy = if self.scenario.waits { OnBackingError::Wait } else { OnBackingError::Error };
        let bytes_per_s = if self.scenario.is_scrubbed { 1 << 30 } else { 0 };
        let machine = self.machine.as_ref().expect("a life has a machine");
        if self.scenario.has_shares {
            // Dice of its own.
            let mut rng = Rng::new(self.scenario.seed ^ self.step ^ 0x5a4e);
            for served in &machine.served {
                let shares = self.scenario.shares(&mut rng);
                // What cannot be kept is refused, and then there are none.
                let refused = served.volume.set_shares(shares).is_err();
                self.stats.shares_given += u64::from(!refused);
                self.stats.shares_refused += u64::from(refused);
                served.volume.set_io_limits(Scenario::limits(&mut rng));
            }
        }
        machine.served.iter().for_each(|s| s.volume.set_on_backing_error(policy, 0));
        machine.served.iter().for_each(|s| s.volume.set_group_bytes(self.scenario.group_bytes));
        machine.cache.set_scrub(ScrubOptions { bytes_per_s, interval_ms: 0 });
        let text = format!("life begins: {:?}, faults {faults:?}", self.styles);
        self.note(|| text);
    }

    /// Judges images of a crash at `snapshot`.
    pub(super) fn crash_at(&mut self, snapshot: &Snapshot) -> Result<(), String> {
        // Dice of its own: whether this is judged must not matter to the run.
        let mut rng = self.rng.fork();
        if !self.plan.judges(self.step) {
            return Ok(());
        }
        self.stats.points += 1;
        let loss = Loss::new(&snapshot.memory);
        self.stats.exhausted_points += u64::from(loss.lines() <= EXHAUSTED_LINES);
        let mut seen = BTreeSet::new();
        let Self { oracles, joint, styles, stats, scenario, .. } = self;
        let at = Instant::new(oracles, joint.as_ref(), styles, scenario.queues);
        // A cache that could once not be made durable may refuse to serve.
        let forgives = self.world.with(|w| w.faults.sync_failed);
        let mut judge =
            |image, host, rng: &mut Rng| match (Judge { at: &at, host, depth: 2 }).image(image, rng, stats) {
                Err(error) if !(forgives && is_refusal(&error)) => Err(error),
                _ => Ok(()),
            };
        let (mut equal, mut both) = (0, 0);
        for survival in survivals(loss.lines(), &mut rng) {
            let disk = disk_survival(&mut rng);
            let (image, hash) = snapshot.losing(&loss, &survival, disk, &mut rng);
            if seen.insert(hash) {
                judge(image, true, &mut rng).map_err(|e| {
                    format!("host crash before {} ({survival:?}, {disk:?}): {e}", snapshot.what)
                })?;
            } else {
                equal += 1;
            }
        }
        let image = snapshot.daemon_crash(&mut rng);
        judge(image, false, &mut rng).map_err(|e| format!("daemon crash before {}: {e}", snapshot.what))?;
        if rng.chance(1, 3) {
            // The daemon dies, and the host before anything has recovered.
            let dead = snapshot.daemon_crash(&mut rng);
            let how = survival(dead.memory.pending_lines(), &mut rng);
            let (image, hash) = dead.host_crash(&how, disk_survival(&mut rng), &mut rng);
            if seen.insert(hash) {
                both += 1;
                judge(image, true, &mut rng)
                    .map_err(|e| format!("daemon, then host crash before {}: {e}", snapshot.what))?;
            } else {
                equal += 1;
            }
        }
        self.stats.equal_images += equal;
        self.stats.host_before_recovery += both;
        Ok(())
    }

    /// Judges an image and, up to `depth` deep, what crashes inside and after its recovery leave.
    pub(super) fn judge(
        &mut self,
        image: Snapshot,
        host: bool,
        depth: u32,
        rng: &mut Rng,
    ) -> Result<Option<Recovered>, String> {
        let Self { oracles, joint, styles, stats, scenario, world, .. } = self;
        let at = Instant::new(oracles, joint.as_ref(), styles, scenario.queues);
        match (Judge { at: &at, host, depth }).image(image, rng, stats) {
            Ok(recovered) => Ok(Some(recovered)),
            // A cache that could once not be made durable may refuse to serve.
            Err(error) if world.with(|w| w.faults.sync_failed) && is_refusal(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The crash is real: goes on with an image.
    pub(super) fn die(&mut self, snapshot: &Snapshot) -> Result<(), String> {
        let mut rng = self.rng.fork();
        let host = rng.chance(2, 3);
        let image = if host {
            let survival = survival(snapshot.memory.pending_lines(), &mut rng);
            snapshot.host_crash(&survival, disk_survival(&mut rng), &mut rng).0
        } else {
            snapshot.daemon_crash(&mut rng)
        };
        self.harvest();
        self.machine = None;
        self.done.clear();
        self.note(|| format!("{} crash before {}", if host { "host" } else { "daemon" }, snapshot.what));
        self.stats.crashes += 1;
        self.begin_again(Left { image, host, in_order: false })
    }

    /// What is left becomes the next life, with whatever happens to it before that. A front end that
    /// has lost its daemon, and not its host, submits again what it has no answer to.
    fn begin_again(&mut self, mut left: Left) -> Result<(), String> {
        let mut rng = self.rng.fork();
        let died = self.styles.clone();
        self.change_styles();
        if !self.world.with(|w| w.faults.sync_failed) {
            self.between_lives(&mut left)?;
        }
        let Left { image, host, .. } = left;
        let unanswered = std::mem::take(&mut self.under_way);
        let counted = self.stats;
        let recovered = self.judge(image, host, 2, &mut rng);
        // It may be one that was judged at this instant already.
        self.stats = counted;
        let Some(recovered) = recovered? else { return Ok(()) };
        for (volume, values) in recovered.values.iter().enumerate() {
            // What a disk's write cache held when only the daemon died may still be lost.
            let is_durable = host || !died[volume].mode.bypasses();
            self.oracles[volume].narrow(values, is_durable);
        }
        if let Some(joint) = &mut self.joint {
            joint.all.narrow(&recovered.values.concat(), true);
        }
        (self.world, self.machine) = (recovered.world, Some(recovered.machine));
        self.begin_life();
        if !host {
            self.submit_unanswered(unanswered);
        }
        Ok(())
    }

    fn submit_unanswered(&mut self, unanswered: BTreeMap<(usize, usize, u32), UnderWay>) {
        for ((volume, queue, _), request) in unanswered {
            let UnderWay { kind, first, count, value, is_gone, .. } = request;
            self.submit_again(volume, queue, kind, (first, count), value, is_gone);
            self.stats.resubmitted += 1;
        }
    }

    fn change_styles(&mut self) {
        if !self.scenario.changes_style || !self.rng.chance(1, 2) {
            return;
        }
        let rng = &mut self.rng;
        self.styles.iter_mut().for_each(|s| *s = Style::random(rng));
        for (oracle, style) in self.oracles.iter_mut().zip(&self.styles) {
            // Asked for, relaxed order is noted before the first start has drained what a mode
            // around the cache wants drained; cut off in that, the next goes on in relaxed order.
            oracle.is_ordered &= style.order != Order::Relaxed;
        }
        let text = format!("styles from here on: {:?}", self.styles);
        self.note(|| text);
    }

    fn harvest(&mut self) {
        let Some(machine) = &self.machine else { return };
        for (number, served) in machine.served.iter().enumerate() {
            let c = served.volume.counters();
            self.stats.records += c.records;
            self.stats.reclaimed += c.reclaimed;
            self.stats.evicted += c.evicted_sectors;
            self.stats.relocated += c.relocated_sectors;
            self.stats.relocated_dirty += c.relocated_dirty_sectors;
            self.stats.written_back += c.written_back_sectors;
            self.stats.epochs += c.tail_epoch - c.tail_epoch.min(self.tails[number]);
            self.stats.fills += c.fill_sectors;
            self.stats.bypassed += c.bypass_sectors;
            self.stats.hits += c.read_hit_sectors;
            self.stats.misses += c.read_miss_sectors;
            self.stats.writeback_errors += c.writeback_errors;
            self.stats.groups += c.groups;
            self.stats.groups_ahead += c.groups_ahead;
            self.stats.space_waits += c.space_waits;
            self.stats.disk_retries += c.disk_retries;
            self.stats.scrubbed += c.scrubbed_sectors;
            self.stats.held_back += c.limit_waits;
        }
        self.stats.steps = self.step;
        let deeds = self.world.with(|w| std::mem::take(&mut w.deeds));
        self.stats.short_transfers += deeds.short_transfers;
        self.stats.slow_ops += deeds.slow_ops;
        self.stats.failed_away += deeds.failed_away;
        self.stats.lost_by_flush += deeds.lost_by_flush;
        self.stats.wraps = self.stats.reclaimed / u64::from(self.scenario.geometry.segment_count);
    }

    /// Lets everything end that was begun, maybe drains, and closes.
    pub(super) fn end_in_order(&mut self, drain: bool) -> Result<(), String> {
        self.note(|| format!("the end, drained: {drain}"));
        self.world.with(|w| {
            w.faults = Faults::default();
            w.cuts.stop();
        });
        self.trouble_ends = None;
        for volume in 0..self.scenario.volumes {
            for queue in 0..usize::from(self.scenario.queues) {
                self.machine().commit(volume, queue);
            }
        }
        let mut rounds = 0;
        // Requests that were under way may still fail by a fault of before.
        while !self.under_way.is_empty() {
            rounds += 1;
            if rounds > ROUNDS_MAX {
                let space = self.machine().cache.space();
                let hung: Vec<_> =
                    self.under_way.iter().map(|(k, u)| (k, u.kind, u.first, u.count)).collect();
                return Err(format!("requests that never end: {hung:?}; {space:?}"));
            }
            self.machine().clock.advance(100);
            self.machine().step_all();
            for volume in 0..self.scenario.volumes {
                for queue in 0..usize::from(self.scenario.queues) {
                    self.poll(volume, queue);
                }
            }
            self.see_completions()?;
        }
        if drain {
            self.drain()?;
            self.settle_size()?;
        }
        // What is asked from here on is asked without time.
        self.machine().served.iter().for_each(|s| s.volume.set_io_limits(IoLimits::default()));
        self.harvest();
        let mut machine = self.machine.take().expect("it was running");
        books::settle(&mut machine, &mut self.stats)?;
        // What a kernel still owes would fail the close, rightly; nothing that is not flushed counts as
        // written back, so an end in order need not be told.
        self.world.with(|w| w.disks.iter_mut().for_each(|disk| disk.owes_error = false));
        machine.close()?;
        self.stats.clean_ends += 1;
        Ok(())
    }

    fn drain(&mut self) -> Result<(), String> {
        let volumes = self.scenario.volumes;
        for round in 0.. {
            if (0..volumes).all(|v| self.machine().served[v].volume.is_clean()) {
                break;
            }
            if round > ROUNDS_MAX {
                return Err(format!("write-back never ends; {:?}", self.machine().cache.space()));
            }
            self.machine().clock.advance(500);
            self.machine().step_all();
        }
        for volume in 0..volumes {
            let style = self.styles[volume];
            let disk = self.world.with(|w| w.disks[volume].clone());
            let is_flushed = style.mode == Mode::Writeback;
            let values = if is_flushed { disk.durable_values().to_vec() } else { disk.values() };
            self.oracles[volume].judge_drained(&values).map_err(|e| format!("volume {volume}: {e}"))?;
            if style.order != Order::Relaxed {
                self.oracles[volume].is_ordered = true;
            }
            self.stats.drains += 1;
        }
        Ok(())
    }

    /// Opens again what was closed in order; everything must read as before.
    pub(super) fn reopen(&mut self) -> Result<(), String> {
        let image = self.world.photograph("the end of a life").daemon_crash(&mut self.rng);
        self.begin_again(Left { image, host: false, in_order: true })
            .map_err(|e| format!("after a life that ended in order: {e}"))
    }

    /// Ends with a `sync` that fails: nothing after it may be promised.
    pub(super) fn end_unsynced(&mut self) -> Result<(), String> {
        self.note(|| "from here on a sync fails".to_owned());
        let last = self.step + 60;
        self.world.with(|w| w.faults = Faults { sync: 5000, ..Faults::default() });
        while self.step < last && self.machine.is_some() {
            self.step()?;
            let faults = self.world.with(|w| w.faults);
            if faults.sync == 0 && !faults.sync_failed {
                // A crash has begun another life.
                return self.end_in_order(true);
            }
        }
        self.harvest();
        self.machine = None;
        Ok(())
    }
}
