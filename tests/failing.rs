//! Disks that fail, hang and come back, and caches that rot, in virtual time and under the simulated world.
//!
//! What is asked: does the guest see an error only where its policy says so, does everything go on by
//! itself when the disk works again, is nothing lost, does one volume's dead disk cost another nothing, and
//! does scrubbing find what nobody reads? Guests compare every read with what they know
//! (`sim::timed::Fleet`); `PCACHE_SEED=n` repeats one seed.

#[path = "failing/outage.rs"]
mod outage;
#[path = "failing/policy.rs"]
mod policy;
#[path = "failing/scrub.rs"]
mod scrub;

use pcache_vhost::cache::{Mode, Order};
use pcache_vhost::sim::timed::{DiskModel, Member};

/// The seed of this run.
pub fn seed() -> u64 {
    let seed = std::env::var("PCACHE_SEED").map_or(11, |text| text.parse().expect("a number"));
    eprintln!("PCACHE_SEED={seed}");
    seed
}

/// A guest before a network disk of 16 MiB, half of whose requests are writes, 100 a second.
pub const MEMBER: Member = Member {
    model: DiskModel::NETWORK,
    blocks: 4096,
    mode: Mode::Writeback,
    order: Order::Relaxed,
    depth: 4,
    write_percent: 50,
    request_us: 10_000,
};
