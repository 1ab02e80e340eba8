//! What outlives a daemon, and the moments at which it is photographed.
//!
//! All state lies behind one lock that the simulation's only thread takes: a snapshot is therefore
//! a consistent instant of memory and disks, between two steps of the hardware.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::backing::SimBacking;
use super::disk::{DiskState, DiskSurvival};
use super::loss::Loss;
use super::memory::{Memory, SimPmem, Survival};
use super::rng::Rng;
use crate::cache::{Clock, Env};

/// The engine's world, simulated.
pub struct SimEnv;

impl Env for SimEnv {
    type Pmem = SimPmem;
    type Backing = SimBacking;
    type Clock = SimClock;

    fn threads() -> usize {
        1
    }
}

/// Time that passes when the run says so, and a little with every look.
#[derive(Clone, Debug, Default)]
pub struct SimClock(Arc<AtomicU64>);

impl SimClock {
    /// Lets time pass.
    pub fn advance(&self, ms: u64) {
        self.0.fetch_add(ms, Ordering::Relaxed);
    }
}

impl Clock for SimClock {
    fn now_ms(&self) -> u64 {
        // Whoever waits for a moment by looking again and again must see it come.
        1000 + self.0.fetch_add(1, Ordering::Relaxed)
    }

    fn now_ns(&self) -> u64 {
        (1000 + self.0.load(Ordering::Relaxed)) * 1_000_000
    }

    fn unix_ms(&self) -> u64 {
        1_700_000_000_000 + self.now_ms()
    }
}

/// How often things fail, in 1 of 10 000; 0 for never.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Disk reads.
    pub read: u64,
    /// Disk writes; some of the sectors may have been written.
    pub write: u64,
    /// Disk flushes.
    pub flush: u64,
    /// `sync`s of the memory: fails once.
    pub sync: u64,
    /// Whether one has failed.
    pub sync_failed: bool,
    /// Disks that are not there, one bit each: everything on them fails.
    pub away: u64,
    /// Disks that do not answer, one bit each: nothing on them ends.
    pub hung: u64,
    /// Whether disks make short transfers and take their time now and then.
    pub is_uneven: bool,
    /// Disks whose failed flushes lose what was not durable, one bit each.
    pub lossy: u64,
}

impl Faults {
    /// Whether this one fails.
    pub(super) fn is_hit(&self, rate: u64, rng: &mut Rng) -> bool {
        rate > 0 && rng.chance(rate, 10_000)
    }

    /// Whether a guest's request may fail through no fault of the engine.
    pub fn may_fail_requests(&self) -> bool {
        self.read + self.write + self.flush + self.away > 0 || self.sync_failed
    }

    /// Whether `disks` has the bit of this disk.
    pub(super) fn has(disks: u64, disk: usize) -> bool {
        disks >> disk & 1 == 1
    }
}

/// What disks have done beyond answering at once.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskDeeds {
    /// Transfers that took two goes, or ended after the first.
    pub short_transfers: u64,
    /// Operations that took far longer than others.
    pub slow_ops: u64,
    /// Operations that failed because the disk was not there.
    pub failed_away: u64,
    /// Sectors that a failed flush has lost.
    pub lost_by_flush: u64,
}

/// What is about to happen when a crash comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// Bytes are stored in the memory.
    Store,
    /// A fence.
    Fence,
    /// A `sync` of the memory.
    Sync,
    /// A read is submitted to a disk.
    DiskRead,
    /// A write or zeroing is submitted to a disk.
    DiskWrite,
    /// A flush is submitted to a disk.
    DiskFlush,
    /// A part of a short transfer is done.
    DiskPart,
    /// An operation of a disk completes.
    DiskCompletion,
}

impl Event {
    /// All of them.
    pub const ALL: [Event; 8] = [
        Event::Store,
        Event::Fence,
        Event::Sync,
        Event::DiskRead,
        Event::DiskWrite,
        Event::DiskFlush,
        Event::DiskPart,
        Event::DiskCompletion,
    ];

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Event::Store => "a store",
            Event::Fence => "a fence",
            Event::Sync => "a sync",
            Event::DiskRead => "a disk read",
            Event::DiskWrite => "a disk write",
            Event::DiskFlush => "a disk flush",
            Event::DiskPart => "a part of a disk transfer",
            Event::DiskCompletion => "a disk completion",
        }
    }

    /// Whether what a crash leaves before it can differ from what it left before the last event in
    /// more than the bytes of one store.
    fn is_edge(self) -> bool {
        !matches!(self, Event::Store | Event::DiskRead)
    }
}

/// Which events are photographed.
#[derive(Clone, Debug)]
pub struct Cuts {
    /// One in so many, by chance; 0 for none.
    pub rate: u64,
    /// Every fence, `sync`, disk write, disk flush and disk completion.
    pub every_edge: bool,
    /// The event with this number; 0 for none.
    pub at: u64,
    /// Most photographs until they are taken away.
    pub count_max: usize,
    /// Chance of its own: whether an instant is looked at changes nothing of what happens.
    pub rng: Rng,
    taken: Vec<(Event, Snapshot)>,
}

impl Cuts {
    fn new(seed: u64) -> Cuts {
        let rng = Rng::new(seed ^ 0xc075);
        Cuts { rate: 0, every_edge: false, at: 0, count_max: 1, rng, taken: Vec::new() }
    }

    /// Photographs nothing from here on, and forgets.
    pub fn stop(&mut self) {
        (self.rate, self.every_edge, self.at) = (0, false, 0);
        self.taken.clear();
    }

    fn wants(&mut self, event: Event, number: u64) -> bool {
        number == self.at
            || self.taken.len() < self.count_max
                && (self.every_edge && event.is_edge() || self.rate > 0 && self.rng.chance(1, self.rate))
    }
}

/// Memory and disks at one instant.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// What was about to happen.
    pub what: &'static str,
    /// The fast side.
    pub memory: Memory,
    /// The slow sides.
    pub disks: Vec<DiskState>,
}

impl Snapshot {
    /// What a host crash at that instant leaves, and a hash of the chance in it.
    pub fn host_crash(&self, memory: &Survival, disk: DiskSurvival, rng: &mut Rng) -> (Snapshot, u64) {
        self.losing(&Loss::new(&self.memory), memory, disk, rng)
    }

    /// The same, with what the memory may lose found out before.
    pub(super) fn losing(
        &self,
        loss: &Loss<'_>,
        memory: &Survival,
        disk: DiskSurvival,
        rng: &mut Rng,
    ) -> (Snapshot, u64) {
        let (memory, mut hash) = loss.image(memory, rng);
        let mut disks = self.disks.clone();
        for state in &mut disks {
            hash = hash.rotate_left(17) ^ state.host_crash(disk, rng);
        }
        (Snapshot { what: self.what, memory, disks }, hash)
    }

    /// Whether nothing is different, also in what may still be lost. Says no where it cannot tell
    /// cheaply.
    pub(super) fn is_same(&self, other: &Snapshot) -> bool {
        self.memory.is_same(&other.memory) && self.disks == other.disks
    }

    /// What a daemon's death at that instant leaves.
    pub fn daemon_crash(&self, rng: &mut Rng) -> Snapshot {
        let mut image = self.clone();
        image.memory.daemon_crash();
        image.disks.iter_mut().for_each(|d| d.daemon_crash(rng));
        image
    }
}

/// What [`World::with`] gives access to.
pub struct State {
    /// The fast side.
    pub memory: Memory,
    /// The slow sides.
    pub disks: Vec<DiskState>,
    /// On whose behalf calls are made.
    pub thread: u32,
    /// What fails.
    pub faults: Faults,
    /// What disks have done in this world.
    pub deeds: DiskDeeds,
    /// The hardware's chance: delays, order of completions, faults.
    pub rng: Rng,
    /// When photographs are taken.
    pub cuts: Cuts,
    /// Events so far.
    pub events: u64,
}

impl State {
    /// Something is about to happen that a crash can come before.
    pub(super) fn event(&mut self, event: Event) {
        self.events += 1;
        if self.cuts.wants(event, self.events) {
            let photo = self.photograph(event.name());
            self.cuts.taken.push((event, photo));
        }
    }

    fn photograph(&self, what: &'static str) -> Snapshot {
        Snapshot { what, memory: self.memory.clone(), disks: self.disks.clone() }
    }
}

/// See the module's head.
pub struct World(Mutex<State>);

impl World {
    /// A world that begins as the snapshot says.
    pub fn new(snapshot: Snapshot, seed: u64) -> Arc<World> {
        Arc::new(World(Mutex::new(State {
            memory: snapshot.memory,
            disks: snapshot.disks,
            thread: 0,
            faults: Faults::default(),
            deeds: DiskDeeds::default(),
            rng: Rng::new(seed),
            cuts: Cuts::new(seed),
            events: 0,
        })))
    }

    /// Looks at or changes the state.
    pub fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Says which logical thread calls from here on.
    pub fn act_as(&self, thread: u32) {
        self.with(|w| w.thread = thread);
    }

    /// The state now.
    pub fn photograph(&self, what: &'static str) -> Snapshot {
        self.with(|w| w.photograph(what))
    }

    /// The photographs taken since the last call, oldest first; none are taken from here on.
    pub fn take_cuts(&self) -> Vec<(Event, Snapshot)> {
        self.with(|w| {
            let taken = std::mem::take(&mut w.cuts.taken);
            w.cuts.stop();
            taken
        })
    }
}
