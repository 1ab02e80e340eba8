//! A world without hardware, time or chance, in which the product's own engine runs and dies.
//!
//! `kill -9` proves nothing about the order in which bytes become durable: page cache and processor
//! caches outlive the process. Here every store, fence, `sync` and disk write is known, so a run
//! can be cut anywhere and continued from any state that hardware might have left:
//!
//! ```text
//!  run      random requests and worker steps from one seed ─► crashes ─► checks ─► next life
//!  machine  one life of the engine: cache, volumes, queues, workers, all stepped by hand
//!  oracle   which values every sector may show, now and after a crash; what the disk alone may hold
//!  joint    the oracle of the volumes of a consistency group, as one
//!  world    what outlives a daemon: memory (fast side) and disks (slow side), and the snapshots
//!  loss     the images of one instant: what a host crash leaves of memory that was not durable
//!  check    the judgement of an image: recovered by the engine, read through it, compared
//!  scene    the same by hand, for one claim at a time
//! ```
//!
//! Invariants:
//! - One seed gives one run: no thread, no wall clock, no map order has a say. Looking at an instant
//!   changes nothing of what happens after it.
//! - The world is never kinder than its contract (`pmem::Pmem`, `backing::Channel`): what those do
//!   not promise to survive, some image loses.
//! - Content names the sector and the write it comes from, so that a wrong, mixed or foreign sector
//!   cannot pass for a right one.

mod backing;
mod books;
mod check;
mod content;
mod disk;
mod joint;
mod loss;
mod machine;
mod memory;
mod oracle;
mod pages;
mod rng;
mod run;
mod scenario;
mod scene;
mod stats;
pub mod timed;
pub mod upgrade;
mod world;

pub use backing::{SimBacking, SimChannel};
pub use disk::{DiskState, DiskSurvival};
pub use machine::{Machine, SimBuffer, Style};
pub use memory::{Memory, SimPmem, Survival};
pub use oracle::Oracle;
pub use rng::Rng;
pub use run::{Plan, Run, Violation, run_seed, shrink};
pub use scenario::Scenario;
pub use scene::Scene;
pub use stats::Stats;
pub use world::{Cuts, DiskDeeds, Event, Faults, SimClock, SimEnv, Snapshot, World};
