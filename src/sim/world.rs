//! What outlives a daemon, and the moments at which it is photographed.
//!
//! All state lies behind one lock that the simulation's only thread takes: a snapshot is therefore
//! a consistent instant of memory and disks, between two steps of the hardware.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::backing::SimBacking;
use super::disk::{DiskState, DiskSurvival};
use super::memory::{Memory, SimPmem, Survival};
use super::rng::Rng;
use crate::cache::{Clock, Env};

/// The engine's world, simulated.
pub struct SimEnv;

impl Env for SimEnv {
    type Pmem = SimPmem;
    type Backing = SimBacking;
    type Clock = SimClock;
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

/// Memory and disks at one instant.
#[derive(Clone)]
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
        let mut image = self.clone();
        let mut hash = image.memory.host_crash(memory, rng);
        for state in &mut image.disks {
            hash = hash.rotate_left(17) ^ state.host_crash(disk, rng);
        }
        (image, hash)
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
    /// A snapshot is taken before one event in so many; 0 for none.
    pub rate: u64,
    /// A snapshot is taken before the event with this number; 0 for none.
    pub snapshot_at: u64,
    /// The snapshot, until somebody takes it.
    pub snapshot: Option<Snapshot>,
    /// Events so far.
    pub events: u64,
}

impl State {
    /// Something is about to happen that a crash can come before.
    pub(super) fn event(&mut self, what: &'static str) {
        self.events += 1;
        let by_chance = self.rate > 0 && self.snapshot.is_none() && self.rng.chance(1, self.rate);
        if by_chance || self.events == self.snapshot_at {
            self.snapshot = Some(self.photograph(what));
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
            rate: 0,
            snapshot_at: 0,
            snapshot: None,
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

    /// The snapshot taken since the last call, if any.
    pub fn take_snapshot(&self) -> Option<Snapshot> {
        self.with(|w| w.snapshot.take())
    }
}
