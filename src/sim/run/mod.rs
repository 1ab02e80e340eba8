//! A run: random requests and worker steps from one seed, cut by crashes, judged at every cut.
//!
//! A step of the run is one call into one logical thread of the engine, so threads interleave
//! between calls. Before stores, fences, `sync`s and disk operations inside a call the world takes
//! photographs: before some of them, or, for stretches of steps, before every one that is an edge
//! ([`Event`]). From each come several images, every one of them recovered and compared with what
//! the model allowed *before* that call's acknowledgements; another photograph is taken *after*
//! them. Some images become the next life.
//!
//! Each step throws dice of its own, and judging an image changes nothing of the run: so a step can
//! be left out and the others stay what they were ([`Plan`]), which is how failures are made short.

mod between;
mod life;
mod plan;
mod shrink;
mod size;
mod trouble;

pub use plan::Plan;
pub use shrink::shrink;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::books;
use super::disk::DiskState;
use super::joint::JointOracle;
use super::machine::{Machine, SimBuffer, Style};
use super::memory::SimPmem;
use super::oracle::Oracle;
use super::rng::Rng;
use super::scenario::Scenario;
use super::stats::Stats;
use super::world::{SimClock, Snapshot, World};
use crate::cache::{FormatOptions, Mode, Order, format};
use crate::volume::{Done, Request, RequestKind, Status};

/// Most photographs of one step.
const CUTS_MAX: usize = 24;
/// Steps after which the models are pruned.
const PRUNE_STEPS: u64 = 16;
/// Requests under way per queue.
const UNDER_WAY_MAX: usize = 24;

/// What a run found, and how to find it again.
#[derive(Debug)]
pub struct Violation {
    /// What was run; with the same program it leads here again.
    pub plan: Plan,
    /// The step.
    pub step: u64,
    /// Images judged before.
    pub images: u64,
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
        writeln!(f, "{}\nseed {}, step {}; again with:", self.what, self.plan.seed, self.step)?;
        write!(f, "  {} cargo test --features sim --test crash no_crash_anywhere", self.plan)
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
    /// What a write writes.
    value: u64,
    /// The same two, as the model of the group has them.
    joint: (u64, u64),
    /// Whether part of its buffer is not there.
    is_gone: bool,
    /// Whether the guest had no write cache when it was submitted.
    is_through: bool,
    /// Whether the cache held all that it reads when it was submitted.
    is_held: bool,
}

/// See the module's head.
pub struct Run {
    scenario: Scenario,
    rng: Rng,
    world: Arc<World>,
    machine: Option<Machine>,
    oracles: Vec<Oracle>,
    /// The model of all volumes as one, where they are one consistency group.
    joint: Option<JointOracle>,
    styles: Vec<Style>,
    under_way: BTreeMap<(usize, usize, u32), UnderWay>,
    /// Completions that the guest has not seen yet.
    done: Vec<(usize, usize, Done<SimBuffer>)>,
    next_tag: u32,
    next_value: u64,
    stats: Stats,
    /// Whether this life's disks fail: a request may then fail, also one that is seen later.
    forgives: bool,
    /// Whether disks hang and go away, and the guest toggles its write cache.
    has_trouble: bool,
    /// The step in which the disks are back.
    trouble_ends: Option<u64>,
    /// Volumes whose order is being changed, one bit each.
    changing: u64,
    /// Segments before the last change of size.
    segments: u32,
    /// Disks that are not there at the next start, one bit each.
    absent: u64,
    /// Each volume's tail when this life began.
    tails: Vec<u64>,
    trace: VecDeque<String>,
    /// Lines kept in the trace.
    pub trace_len: usize,
    step: u64,
    plan: Plan,
}

/// Runs a seed until `images` crash images have been judged; a violation tells the last
/// `trace_len` steps.
///
/// # Errors
/// [`Violation`]: the engine broke a promise, or panicked.
pub fn run_seed(seed: u64, images: u64, trace_len: usize) -> Result<Stats, Violation> {
    Plan::whole(seed, images).run(trace_len)
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
    pub fn new(plan: Plan) -> Result<Run, Violation> {
        let scenario = Scenario::from_seed(plan.seed);
        let fail =
            |what: String| Violation { plan: plan.clone(), step: 0, images: 0, what, trace: Vec::new() };
        let mut rng = Rng::new(scenario.seed ^ 0x5eed);
        let content = |number: usize| {
            let sector = |s| if rng.chance(1, 2) { s + 1 } else { 0 };
            DiskState::new((0..scenario.sectors).map(sector).collect()).named(number as u64 + 1)
        };
        let mut disks: Vec<DiskState> = (0..scenario.volumes).map(content).collect();
        let oracles = disks.iter().map(|d| Oracle::new(d.durable_values())).collect();
        if scenario.is_joint {
            disks = disks.into_iter().map(|disk| disk.in_group("vm")).collect();
        }
        let joint = scenario.is_joint.then(|| JointOracle::new(&disks));
        let redo_sectors = scenario.redo_sectors;
        disks.extend(
            (0..scenario.volumes).map(|number| DiskState::raw(redo_sectors).named(100 + number as u64)),
        );
        let memory = size::memory(&scenario);
        let world = World::new(Snapshot { what: "the beginning", memory, disks }, rng.next());
        let options = FormatOptions { geometry: Some(scenario.geometry), ..FormatOptions::default() };
        format(&SimPmem::new(&world), &SimClock::default(), &options).map_err(|e| fail(e.to_string()))?;
        let machine = Machine::open(&world, &scenario.styles, scenario.queues).map_err(fail)?;
        let mut run = Run {
            styles: scenario.styles.clone(),
            next_value: scenario.sectors + 1,
            scenario,
            has_trouble: rng.chance(1, 3),
            trouble_ends: None,
            changing: 0,
            segments: 0,
            absent: 0,
            rng,
            world,
            machine: Some(machine),
            oracles,
            joint,
            under_way: BTreeMap::new(),
            done: Vec::new(),
            next_tag: 0,
            stats: Stats::default(),
            forgives: false,
            tails: Vec::new(),
            trace: VecDeque::new(),
            trace_len: 80,
            step: 0,
            plan,
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
            Violation { plan: self.plan.clone(), step: self.step, images: self.stats.images, what, trace }
        })
    }

    fn live(&mut self) -> Result<(), String> {
        while self.plan.goes_on(self.step, self.stats.images) {
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

    /// One call into one thread, the crashes in it, then what the guest sees.
    fn step(&mut self) -> Result<(), String> {
        self.step += 1;
        if !self.plan.has(self.step) {
            return Ok(());
        }
        self.rng = self.plan.dice(self.step);
        let (rate, hardware) = (self.rng.pick(&[20, 80, 300]), self.rng.fork());
        let every_edge = self.plan.is_dense(self.step);
        self.world.with(|w| {
            w.rng = hardware;
            (w.cuts.rate, w.cuts.every_edge) = (rate, every_edge);
            w.cuts.count_max = if every_edge { CUTS_MAX } else { 1 };
            w.cuts.rng = self.rng.fork();
        });
        self.trouble();
        self.change_size()?;
        if self.step.is_multiple_of(PRUNE_STEPS) {
            self.prune();
        }
        self.act()?;
        let cuts = self.world.take_cuts();
        let mut death = cuts.last().filter(|_| self.rng.chance(1, 6)).map(|(_, snapshot)| snapshot);
        for (event, snapshot) in &cuts {
            self.stats.count_cut(*event);
            self.crash_at(snapshot)?;
        }
        let quiet = self.world.photograph("nothing");
        if cuts.is_empty() && self.rng.chance(1, 120) {
            self.stats.cuts_quiet += 1;
            self.crash_at(&quiet)?;
            death = Some(&quiet).filter(|_| self.rng.chance(1, 3));
        }
        if let Some(snapshot) = death {
            return self.die(snapshot);
        }
        let is_ack = !self.done.is_empty();
        self.see_completions()?;
        if is_ack && (every_edge || self.rng.chance(1, 60)) {
            // Later than the acknowledgement only in what is owed.
            self.stats.cuts_acknowledgement += 1;
            self.crash_at(&Snapshot { what: "anything after an acknowledgement", ..quiet })?;
        }
        Ok(())
    }

    /// Lets the models forget what can matter no more: what they remember costs every image.
    fn prune(&mut self) {
        let Self { oracles, joint, world, under_way, styles, machine, .. } = self;
        for (volume, oracle) in oracles.iter_mut().enumerate() {
            // What a group's part brings back may be older than what the disk holds.
            if styles[volume].order == Order::Grouped
                && !machine.as_ref().is_some_and(|m| m.served[volume].volume.is_clean())
            {
                continue;
            }
            let reads = under_way.iter().filter(|(k, u)| k.0 == volume && u.began > 0);
            let since = reads.map(|(_, u)| u.began).min().unwrap_or(u64::MAX);
            oracle.prune(since, |sector| world.with(|w| w.disks[volume].possible(sector)));
        }
        let is_settled = |m: &Machine| m.served.iter().all(|s| s.volume.is_clean());
        if let Some(joint) = joint
            && (styles[0].order != Order::Grouped || machine.as_ref().is_some_and(is_settled))
        {
            joint.prune(world);
        }
    }

    fn act(&mut self) -> Result<(), String> {
        let volume = self.rng.index(self.scenario.volumes);
        let queue = self.rng.index(self.scenario.queues.into());
        match self.rng.below(1000) {
            0..380 => self.batch(volume, queue),
            380..600 => self.poll(volume, queue),
            600..780 if self.scenario.is_disk_slow && self.rng.chance(3, 4) => {}
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
            985..990 => {
                let with_records = self.rng.chance(1, 3);
                let machine = self.machine.as_ref().expect("between two lives nothing steps");
                books::audit(machine, with_records, &mut self.stats)?;
            }
            990..998 => self.prune(),
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
        } else {
            // They are looked up when the batch ends.
            let open = self.under_way.range_mut((volume, queue, 0)..=(volume, queue, u32::MAX));
            open.for_each(|(_, under_way)| under_way.is_held = false);
        }
        if self.scenario.housekeeping > 0 && self.rng.chance(3, 4) {
            for _ in 0..self.scenario.housekeeping {
                let did = self.machine().housekeeper();
                self.note(|| format!("housekeeper: {did:?}"));
            }
        }
    }

    fn range(&mut self, volume: usize) -> (u64, u64) {
        let sectors = self.oracles[volume].len();
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
        let (mut first, mut count) = self.range(volume);
        let kind = match self.rng.below(100) {
            n if n < self.scenario.write_percent => RequestKind::Write,
            0..80 => RequestKind::Read,
            80..90 => RequestKind::Flush,
            n => {
                if n == 99 {
                    (first, count) = (0, self.oracles[volume].len());
                }
                match self.rng.chance(1, 2) {
                    true => RequestKind::Discard { sectors: count },
                    false => RequestKind::WriteZeroes { sectors: count, unmap: self.rng.chance(1, 2) },
                }
            }
        };
        if kind == RequestKind::Flush {
            (first, count) = (0, 0);
        }
        let mut value = 0;
        if kind == RequestKind::Write {
            value = self.next_value;
            self.next_value += 1;
        }
        let is_gone = kind == RequestKind::Write && self.rng.chance(1, 150);
        self.submit_again(volume, queue, kind, (first, count), value, is_gone);
    }

    /// Submits a request for the first time, or once more to the next daemon.
    fn submit_again(
        &mut self,
        volume: usize,
        queue: usize,
        kind: RequestKind,
        (first, count): (u64, u64),
        value: u64,
        is_gone: bool,
    ) {
        let is_through = !self.styles[volume].write_cache;
        let (mut id, mut began, mut is_held) = (0, 0, false);
        let mut data = SimBuffer::default();
        let oracle = &mut self.oracles[volume];
        match kind {
            RequestKind::Flush => began = oracle.tick(),
            RequestKind::Read => {
                began = oracle.tick();
                data = SimBuffer::to_read(count);
                let reads_cache = self.styles[volume].mode != Mode::Passthrough;
                // A limit lets it go on later, when the block may have been evicted.
                is_held = reads_cache
                    && !self.scenario.has_shares
                    && self.is_away(volume)
                    && books::holds(self.machine(), volume, first, count);
            }
            _ => id = oracle.begin_write(first, count, value),
        }
        let in_joint = match (&mut self.joint, kind) {
            (None, _) | (_, RequestKind::Read) => (0, 0),
            (Some(joint), RequestKind::Flush) => (0, joint.all.tick()),
            (Some(joint), _) => (joint.begin_write(volume, first, count, value), 0),
        };
        if kind == RequestKind::Write {
            data = SimBuffer::of_write(volume, first, count, value);
            data.gone_from = is_gone.then(|| self.rng.index(data.bytes.len()));
        }
        self.next_tag += 1;
        let tag = self.next_tag;
        self.note(|| {
            let range = format!("{first}+{count}");
            format!("submit {volume}.{queue} #{tag} {kind:?} {range} value {value:#x}")
        });
        let joint = in_joint;
        let under_way =
            UnderWay { kind, first, count, id, began, value, joint, is_gone, is_through, is_held };
        self.under_way.insert((volume, queue, tag), under_way);
        self.machine().submit(volume, queue, Request { tag, kind, sector: first, data });
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
        let UnderWay { kind, first, count, id, began, joint, is_through, is_held, .. } = *under_way;
        let style = self.styles[volume];
        let is_ok = done.status == Status::Ok;
        self.stats.outage_hits += u64::from(is_held && is_ok);
        if !is_ok {
            self.stats.failed += 1;
            self.judge_failure(volume, under_way)?;
        }
        let oracle = &mut self.oracles[volume];
        match kind {
            RequestKind::Read if is_ok => {
                self.stats.reads += 1;
                for (i, value) in done.data.values(volume, first)?.into_iter().enumerate() {
                    let sector = first + i as u64;
                    oracle.may_read(sector, value, began).map_err(|e| format!("volume {volume}: {e}"))?;
                }
            }
            RequestKind::Read => {}
            RequestKind::Flush if is_ok => {
                self.stats.flushes += 1;
                oracle.end_flush(began);
                if let Some(all) = &mut self.joint {
                    all.all.end_flush(joint.1);
                }
            }
            RequestKind::Flush => {}
            RequestKind::Write | RequestKind::Discard { .. } | RequestKind::WriteZeroes { .. } => {
                let at_once = self.scenario.class.fence_is_durable() && style.mode == Mode::Writeback;
                if is_ok && is_through {
                    oracle.end_through(id, first, count);
                } else {
                    oracle.end_write(id, first, count, is_ok, at_once);
                }
                if let Some(all) = &mut self.joint {
                    all.end_write(volume, joint.0, (first, count), (is_ok, at_once, is_through));
                }
                let is_write = kind == RequestKind::Write;
                self.stats.writes += u64::from(is_ok && is_write);
                self.stats.zeroes += u64::from(is_ok && !is_write);
            }
        }
        Ok(())
    }

    /// Whether a request may have failed: only by its guest's fault, or where the cache needs a disk
    /// that fails.
    fn judge_failure(&self, volume: usize, under_way: &UnderWay) -> Result<(), String> {
        let UnderWay { kind, first, count, is_gone, is_held, .. } = *under_way;
        let faults = self.world.with(|w| w.faults);
        let needs_disk = self.styles[volume].mode != Mode::Writeback || kind == RequestKind::Read;
        // Where nobody waits for the disk, what finds no space needs it as well.
        let needs_disk = needs_disk || (!self.scenario.waits && kind != RequestKind::Flush);
        let by_disk = needs_disk && !is_held && (self.forgives || faults.may_fail_requests());
        if is_gone || by_disk || faults.sync_failed {
            return Ok(());
        }
        Err(format!("volume {volume}: {kind:?} of {first}+{count} failed for no reason"))
    }
}
