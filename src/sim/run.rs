//! A run: random requests and worker steps from one seed, cut by crashes, judged at every cut.
//!
//! A step of the run is one call into one logical thread of the engine, so threads interleave
//! between calls. Before some store, fence, `sync` or disk operation inside a call the world takes
//! a snapshot; from each come several images, every one of them recovered and compared with what
//! the model allowed *before* that call's acknowledgements. Some images become the next life.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::check::{Judge, Recovered, disk_survival, survival};
use super::content::{self, BYTES};
use super::disk::DiskState;
use super::machine::{Machine, SimBuffer, Style};
use super::memory::{Memory, SimPmem, Survival};
use super::oracle::Oracle;
use super::rng::Rng;
use super::scenario::Scenario;
use super::stats::Stats;
use super::world::{Faults, SimClock, Snapshot, World};
use crate::cache::{FormatOptions, Mode, Order, format};
use crate::volume::{Done, Request, RequestKind, Status};

/// Requests under way per queue.
const UNDER_WAY_MAX: usize = 24;
/// Rounds of everything after which a request counts as hung.
const ROUNDS_MAX: u32 = 20_000;

/// What a run found, and how to find it again.
#[derive(Debug)]
pub struct Violation {
    /// The seed; with the same program it leads here again.
    pub seed: u64,
    /// The step.
    pub step: u64,
    /// What is wrong.
    pub what: String,
    /// The scenario and the last steps.
    pub trace: Vec<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.trace {
            writeln!(f, "  {line}")?;
        }
        writeln!(f, "seed {} (PCACHE_SIM_SEED={}), step {}:", self.seed, self.seed, self.step)?;
        write!(f, "{}", self.what)
    }
}

/// A request under way.
struct UnderWay {
    kind: RequestKind,
    first: u64,
    count: u64,
    /// The model's name of a write.
    id: u64,
    began: u64,
    /// Whether part of its buffer is not there.
    is_gone: bool,
}

/// See the module's head.
pub struct Run {
    scenario: Scenario,
    rng: Rng,
    world: Arc<World>,
    machine: Option<Machine>,
    oracles: Vec<Oracle>,
    styles: Vec<Style>,
    under_way: BTreeMap<(usize, usize, u32), UnderWay>,
    /// Completions that the guest has not seen yet.
    done: Vec<(usize, usize, Done<SimBuffer>)>,
    next_tag: u32,
    next_value: u64,
    stats: Stats,
    /// Whether this life's disks fail: a request may then fail, also one that is seen later.
    forgives: bool,
    trace: VecDeque<String>,
    /// Lines kept in the trace.
    pub trace_len: usize,
    step: u64,
    /// Images until the run has done enough.
    images: u64,
}

/// Runs a seed until `images` crash images have been judged; a violation tells the last
/// `trace_len` steps.
///
/// # Errors
/// [`Violation`]: the engine broke a promise, or panicked.
pub fn run_seed(seed: u64, images: u64, trace_len: usize) -> Result<Stats, Violation> {
    let mut run = Run::new(Scenario::from_seed(seed), images)?;
    run.trace_len = trace_len;
    run.go()
}

fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    format!("panic: {}", text.or(payload.downcast_ref::<&str>().copied()).unwrap_or("of unknown kind"))
}

impl Run {
    /// Formats the scenario's cache and attaches its volumes.
    ///
    /// # Errors
    /// [`Violation`].
    pub fn new(scenario: Scenario, images: u64) -> Result<Run, Violation> {
        let fail = |what: String| Violation { seed: scenario.seed, step: 0, what, trace: Vec::new() };
        let mut rng = Rng::new(scenario.seed ^ 0x5eed);
        let content = |_| {
            let sector = |s| if rng.chance(1, 2) { s + 1 } else { 0 };
            DiskState::new((0..scenario.sectors).map(sector).collect())
        };
        let disks: Vec<DiskState> = (0..scenario.volumes).map(content).collect();
        let oracles = disks.iter().map(|d| Oracle::new(d.durable_values())).collect();
        let memory = Memory::new(scenario.class, scenario.geometry.device_size);
        let world = World::new(Snapshot { what: "the beginning", memory, disks }, rng.next());
        let options = FormatOptions { geometry: Some(scenario.geometry), ..FormatOptions::default() };
        format(&SimPmem::new(&world), &SimClock::default(), &options).map_err(|e| fail(e.to_string()))?;
        let machine = Machine::open(&world, &scenario.styles, scenario.queues).map_err(fail)?;
        let mut run = Run {
            styles: scenario.styles.clone(),
            next_value: scenario.sectors + 1,
            scenario,
            rng,
            world,
            machine: Some(machine),
            oracles,
            under_way: BTreeMap::new(),
            done: Vec::new(),
            next_tag: 0,
            stats: Stats::default(),
            forgives: false,
            trace: VecDeque::new(),
            trace_len: 80,
            step: 0,
            images,
        };
        run.begin_life();
        Ok(run)
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// [`Violation`].
    pub fn go(&mut self) -> Result<Stats, Violation> {
        let result =
            catch_unwind(AssertUnwindSafe(|| self.live())).unwrap_or_else(|p| Err(panic_message(&*p)));
        result.map(|()| self.stats).map_err(|what| {
            // What a panic left half done is not to be run again by destructors.
            std::mem::forget(self.machine.take());
            let head = format!("{:?}", self.scenario);
            let trace = std::iter::once(head).chain(self.trace.drain(..)).collect();
            Violation { seed: self.scenario.seed, step: self.step, what, trace }
        })
    }

    fn live(&mut self) -> Result<(), String> {
        let steps_max = 2000 + self.images * 40;
        while self.stats.images < self.images && self.step < steps_max {
            self.step()?;
        }
        if self.scenario.ends_unsynced {
            return self.end_unsynced();
        }
        self.end_in_order(true)
    }

    fn note(&mut self, what: impl FnOnce() -> String) {
        if self.trace.len() >= self.trace_len {
            self.trace.pop_front();
        }
        self.trace.push_back(format!("{:>6} {}", self.step, what()));
    }

    fn machine(&mut self) -> &mut Machine {
        self.machine.as_mut().expect("between two lives nothing steps")
    }

    fn faults(&mut self) -> Faults {
        match self.scenario.has_faults && self.rng.chance(1, 2) {
            true => Faults { read: 150, write: 150, flush: 400, ..Faults::default() },
            false => Faults::default(),
        }
    }

    fn begin_life(&mut self) {
        let faults = self.faults();
        self.world.with(|w| w.faults = faults);
        self.forgives = faults.may_fail_requests();
        for volume in 0..self.scenario.volumes {
            let style = self.styles[volume];
            let is_clean = self.machine().served[volume].volume.is_clean();
            if style.mode == Mode::Writeback && style.order == Order::Relaxed {
                self.oracles[volume].is_ordered = false;
            } else if is_clean {
                self.oracles[volume].is_ordered = true;
            }
        }
        let text = format!("life begins: {:?}, faults {faults:?}", self.styles);
        self.note(|| text);
    }

    /// One call into one thread, the crash in it if there is one, then what the guest sees.
    fn step(&mut self) -> Result<(), String> {
        self.step += 1;
        let rate = self.rng.pick(&[10, 40, 150]);
        self.world.with(|w| w.rate = rate);
        self.act()?;
        self.world.with(|w| w.rate = 0);
        let mut snapshot = self.world.take_snapshot();
        if snapshot.is_none() && self.rng.chance(1, 60) {
            snapshot = Some(self.world.photograph("nothing"));
        }
        if let Some(snapshot) = snapshot
            && self.crash_at(&snapshot)?
        {
            return Ok(());
        }
        self.see_completions()
    }

    fn act(&mut self) -> Result<(), String> {
        let volume = self.rng.index(self.scenario.volumes);
        let queue = self.rng.index(self.scenario.queues.into());
        match self.rng.below(1000) {
            0..380 => self.batch(volume, queue),
            380..600 => self.poll(volume, queue),
            600..780 => {
                let steps = self.rng.between(1, 4);
                for _ in 0..steps {
                    let did = self.machine().writeback(volume);
                    self.note(|| format!("write-back {volume}: {did:?}"));
                }
            }
            780..880 => {
                let did = self.machine().housekeeper();
                self.note(|| format!("housekeeper: {did:?}"));
            }
            880..950 => {
                let did = self.machine().sync();
                self.note(|| format!("sync: {did}"));
            }
            950..975 => {
                let ms = self.rng.between(10, 3000);
                self.machine().clock.advance(ms);
            }
            975..985 => self.machine().park(volume, queue),
            985..998 => {
                let Self { oracles, world, under_way, .. } = self;
                for (volume, oracle) in oracles.iter_mut().enumerate() {
                    let reads = under_way.iter().filter(|(k, u)| k.0 == volume && u.began > 0);
                    let since = reads.map(|(_, u)| u.began).min().unwrap_or(u64::MAX);
                    oracle.prune(since, |sector| world.with(|w| w.disks[volume].possible(sector)));
                }
            }
            _ if self.rng.chance(1, 4) && !self.world.with(|w| w.faults.sync_failed) => {
                let drain = self.rng.chance(1, 2);
                self.end_in_order(drain)?;
                self.reopen()?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Submits a few requests to a queue and mostly ends the batch.
    fn batch(&mut self, volume: usize, queue: usize) {
        let used = self.under_way.range((volume, queue, 0)..=(volume, queue, u32::MAX)).count();
        let room = UNDER_WAY_MAX.saturating_sub(used) as u64;
        for _ in 0..self.rng.between(1, 6).min(room) {
            self.submit(volume, queue);
        }
        if self.rng.chance(4, 5) {
            self.note(|| format!("commit {volume}.{queue}"));
            self.machine().commit(volume, queue);
        }
    }

    fn range(&mut self) -> (u64, u64) {
        let sectors = self.scenario.sectors;
        let mut first = self.rng.below(sectors);
        if self.rng.chance(1, 2) {
            // A hot spot, so that writes meet.
            first = self.rng.below(sectors.min(48));
        }
        let mut count = self.rng.between(1, self.scenario.request_max);
        if self.rng.chance(1, 2) {
            (first, count) = (first / 8 * 8, count.next_multiple_of(8));
        }
        (first, count.min(sectors - first))
    }

    fn submit(&mut self, volume: usize, queue: usize) {
        let (mut first, mut count) = self.range();
        let kind = match self.rng.below(100) {
            0..50 => RequestKind::Write,
            50..80 => RequestKind::Read,
            80..90 => RequestKind::Flush,
            n => {
                if n == 99 {
                    (first, count) = (0, self.scenario.sectors);
                }
                match self.rng.chance(1, 2) {
                    true => RequestKind::Discard { sectors: count },
                    false => RequestKind::WriteZeroes { sectors: count, unmap: self.rng.chance(1, 2) },
                }
            }
        };
        let oracle = &mut self.oracles[volume];
        let mut under_way = UnderWay { kind, first, count, id: 0, began: 0, is_gone: false };
        let mut data = SimBuffer::default();
        let mut value = 0;
        match kind {
            RequestKind::Flush => (under_way.began, under_way.first, under_way.count) = (oracle.tick(), 0, 0),
            RequestKind::Read => {
                under_way.began = oracle.tick();
                data.bytes = vec![0xee; count as usize * BYTES];
            }
            RequestKind::Write => {
                value = self.next_value;
                self.next_value += 1;
                data.bytes = vec![0; count as usize * BYTES];
                for (i, out) in data.bytes.chunks_exact_mut(BYTES).enumerate() {
                    content::encode(volume, first + i as u64, value, out);
                }
                if self.rng.chance(1, 150) {
                    under_way.is_gone = true;
                    data.gone_from = Some(self.rng.index(data.bytes.len()));
                }
            }
            RequestKind::Discard { .. } | RequestKind::WriteZeroes { .. } => {}
        }
        if under_way.began == 0 {
            under_way.id = oracle.begin_write(first, count, value);
        }
        self.next_tag += 1;
        let tag = self.next_tag;
        self.note(|| {
            let range = format!("{first}+{count}");
            format!("submit {volume}.{queue} #{tag} {kind:?} {range} value {value:#x}")
        });
        self.under_way.insert((volume, queue, tag), under_way);
        let sector = if kind == RequestKind::Flush { 0 } else { first };
        self.machine().submit(volume, queue, Request { tag, kind, sector, data });
    }

    fn poll(&mut self, volume: usize, queue: usize) {
        let done = self.machine().poll(volume, queue);
        if !done.is_empty() {
            let tags: Vec<_> = done.iter().map(|d| (d.tag, d.status)).collect();
            self.note(|| format!("poll {volume}.{queue}: {tags:?}"));
        }
        self.done.extend(done.into_iter().map(|d| (volume, queue, d)));
    }

    /// The guest sees completions: reads are compared, writes count.
    fn see_completions(&mut self) -> Result<(), String> {
        for (volume, queue, done) in std::mem::take(&mut self.done) {
            let key = (volume, queue, done.tag);
            let under_way = self.under_way.remove(&key).ok_or_else(|| format!("{key:?} completed twice"))?;
            self.see(volume, &under_way, done)?;
        }
        Ok(())
    }

    fn see(&mut self, volume: usize, under_way: &UnderWay, done: Done<SimBuffer>) -> Result<(), String> {
        let UnderWay { kind, first, count, id, began, is_gone } = *under_way;
        let style = self.styles[volume];
        let oracle = &mut self.oracles[volume];
        let is_ok = done.status == Status::Ok;
        if !is_ok {
            self.stats.failed += 1;
            let failed_now = self.world.with(|w| w.faults.may_fail_requests());
            if !is_gone && !self.forgives && !failed_now {
                return Err(format!("volume {volume}: {kind:?} of {first}+{count} failed for no reason"));
            }
        }
        match kind {
            RequestKind::Read if is_ok => {
                self.stats.reads += 1;
                for (i, bytes) in done.data.bytes.chunks_exact(BYTES).enumerate() {
                    let sector = first + i as u64;
                    let value = content::decode(volume, sector, bytes)?;
                    oracle.may_read(sector, value, began).map_err(|e| format!("volume {volume}: {e}"))?;
                }
            }
            RequestKind::Read => {}
            RequestKind::Flush if is_ok => {
                self.stats.flushes += 1;
                oracle.end_flush(began);
            }
            RequestKind::Flush => {}
            RequestKind::Write | RequestKind::Discard { .. } | RequestKind::WriteZeroes { .. } => {
                let at_once = self.scenario.class.fence_is_durable() && style.mode == Mode::Writeback;
                oracle.end_write(id, first, count, is_ok, at_once || !style.write_cache);
                if is_ok && !style.write_cache {
                    oracle.barrier();
                }
                let is_write = kind == RequestKind::Write;
                self.stats.writes += u64::from(is_ok && is_write);
                self.stats.zeroes += u64::from(is_ok && !is_write);
            }
        }
        Ok(())
    }

    /// Judges images of a crash at `snapshot`; says whether one of them became the next life.
    fn crash_at(&mut self, snapshot: &Snapshot) -> Result<bool, String> {
        self.stats.points += 1;
        let lines = snapshot.memory.pending_lines();
        let survivals: Vec<Survival> = match lines {
            0..=2 => (0..1 << lines).map(Survival::Lines).collect(),
            _ => (0..5).map(|_| survival(lines, &mut self.rng)).collect(),
        };
        let mut seen = BTreeSet::new();
        for survival in survivals {
            let disk = disk_survival(&mut self.rng);
            let mut rng = self.rng.fork();
            let (image, hash) = snapshot.host_crash(&survival, disk, &mut rng);
            if seen.insert(hash) {
                self.judge(image, true, &mut rng).map_err(|e| {
                    format!("host crash before {} ({survival:?}, {disk:?}): {e}", snapshot.what)
                })?;
            }
        }
        let mut rng = self.rng.fork();
        let image = snapshot.daemon_crash(&mut rng);
        self.judge(image, false, &mut rng)
            .map_err(|e| format!("daemon crash before {}: {e}", snapshot.what))?;
        if !self.rng.chance(1, 25) {
            return Ok(false);
        }
        self.die(snapshot)?;
        Ok(true)
    }

    fn judge(&mut self, image: Snapshot, host: bool, rng: &mut Rng) -> Result<Option<Recovered>, String> {
        let Self { oracles, styles, stats, scenario, world, .. } = self;
        let judge = Judge { oracles, styles, queues: scenario.queues, host, depth: 2 };
        match judge.image(image, rng, stats) {
            Ok(recovered) => Ok(Some(recovered)),
            // A cache that could once not be made durable may refuse to serve.
            Err(_) if world.with(|w| w.faults.sync_failed) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The crash is real: goes on with one of the images.
    fn die(&mut self, snapshot: &Snapshot) -> Result<(), String> {
        let mut rng = self.rng.fork();
        let host = rng.chance(2, 3);
        let image = if host {
            let survival = survival(snapshot.memory.pending_lines(), &mut rng);
            snapshot.host_crash(&survival, disk_survival(&mut rng), &mut rng).0
        } else {
            snapshot.daemon_crash(&mut rng)
        };
        let died = self.styles.clone();
        self.harvest();
        self.machine = None;
        self.under_way.clear();
        self.done.clear();
        self.change_styles();
        self.note(|| format!("{} crash before {}", if host { "host" } else { "daemon" }, snapshot.what));
        let Some(recovered) = self.judge(image, host, &mut rng)? else { return Ok(()) };
        for (volume, values) in recovered.values.iter().enumerate() {
            // What a disk's write cache held when only the daemon died may still be lost.
            self.oracles[volume].narrow(values, host || !died[volume].mode.bypasses());
        }
        (self.world, self.machine) = (recovered.world, Some(recovered.machine));
        self.stats.crashes += 1;
        self.begin_life();
        Ok(())
    }

    fn change_styles(&mut self) {
        if self.scenario.changes_style && self.rng.chance(1, 2) {
            let rng = &mut self.rng;
            self.styles.iter_mut().for_each(|s| *s = Style::random(rng));
        }
    }

    fn harvest(&mut self) {
        let Some(machine) = &self.machine else { return };
        for served in &machine.served {
            let c = served.volume.counters();
            self.stats.records += c.records;
            self.stats.reclaimed += c.reclaimed;
            self.stats.evicted += c.evicted_sectors;
            self.stats.written_back += c.written_back_sectors;
            self.stats.epochs += c.tail_epoch;
            self.stats.fills += c.fill_sectors;
            self.stats.bypassed += c.bypass_sectors;
            self.stats.hits += c.read_hit_sectors;
            self.stats.misses += c.read_miss_sectors;
            self.stats.writeback_errors += c.writeback_errors;
            self.stats.space_waits += c.space_waits;
        }
        self.stats.steps = self.step;
    }

    /// Lets everything end that was begun, maybe drains, and closes.
    fn end_in_order(&mut self, drain: bool) -> Result<(), String> {
        self.note(|| format!("the end, drained: {drain}"));
        self.world.with(|w| (w.faults, w.rate, w.snapshot) = (Faults::default(), 0, None));
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
        }
        self.harvest();
        self.machine.take().expect("it was running").close()?;
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
            if style.order == Order::Strict {
                self.oracles[volume].is_ordered = true;
            }
            self.stats.drains += 1;
        }
        Ok(())
    }

    /// Opens again what was closed in order; everything must read as before.
    fn reopen(&mut self) -> Result<(), String> {
        self.change_styles();
        let queues = self.scenario.queues;
        let mut machine = Machine::open(&self.world, &self.styles, queues)?;
        for (volume, oracle) in self.oracles.iter().enumerate() {
            for (sector, &value) in machine.read_all(volume)?.iter().enumerate() {
                oracle
                    .may_recover(sector as u64, value, false)
                    .map_err(|e| format!("volume {volume}, reopened: {e}"))?;
            }
        }
        self.machine = Some(machine);
        self.begin_life();
        Ok(())
    }

    /// Ends with a `sync` that fails: nothing after it may be promised.
    fn end_unsynced(&mut self) -> Result<(), String> {
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
