//! What can be done with a cache that nobody serves, and what serving it begins with: look, make,
//! open, check, dump, drain, resolve.
//!
//! Each takes plain values and returns what it found; the words around it are `control`'s.

pub mod created;
pub mod disk;
pub mod drain;
pub mod image;
pub mod members;
pub mod recover;
pub mod redo;
pub mod resolve;
pub mod signature;

use crate::backing::Disk;
use crate::cache::{Env, SystemClock};
use crate::pmem::MappedPmem;

/// The engine's world on a host: mapped media, real disks, the system's clock.
#[derive(Debug)]
pub struct Host;

impl Env for Host {
    type Pmem = MappedPmem;
    type Backing = Disk;
    type Clock = SystemClock;
}
