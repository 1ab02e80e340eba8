//! The engine in virtual time: a disk whose every operation costs what a model says, memory that
//! costs nothing, and guests that keep a queue full.
//!
//! The rest of the simulation asks what survives; this part asks how fast, how smooth and how much,
//! on disks that no test machine has, with figures that are the same on every run:
//!
//! ```text
//!  disk   TimedDisk: when operations end, what it holds, what was written
//!  lab    Lab: cache, volume, queue and workers of the product, and the loop that lets time pass
//!  fleet  Fleet: several volumes with guests that compare, and disks that fail
//!  guest  what is asked for: random writes, barriers, a trace
//!  trail  when requests ended and how long they took: rates by window, percentiles
//! ```
//!
//! Time stands still while processors work, but for a fixed cost for each request, so that a cache
//! that never waits for its disk is fast and not infinitely so.

mod disk;
mod fleet;
mod guest;
mod lab;
mod trail;

pub use disk::{DiskModel, TimedBacking, TimedDisk, Written};
pub use fleet::{Fleet, Member, Seen};
pub use guest::{Ask, Guest, RandomWrites};
pub use lab::{Lab, PlainMemory, RedoPlace, Setup, TimedEnv, VirtualClock, run_bare};
pub use trail::Trail;
