//! What a machine's own books say, beyond what its guests can read.

use super::machine::Machine;
use super::stats::Stats;

/// Rounds of every worker after which it counts as hung.
const ROUNDS_MAX: u32 = 1000;

/// What is dirty: per volume the ranges as first sector and length, joined, ascending.
pub(super) type Dirty = Vec<Vec<(u64, u64)>>;

/// Whether what the cache counts is what there is.
///
/// # Errors
/// What does not add up.
pub(super) fn audit(machine: &Machine, with_records: bool, stats: &mut Stats) -> Result<(), String> {
    stats.audits += 1;
    let audit = machine.cache.audit(with_records).map_err(|e| format!("audit: {e}"))?;
    // Nothing here damages the media.
    if audit.space.bad > 0 { Err(format!("audit: segments given up: {audit:?}")) } else { Ok(()) }
}

/// Lets the housekeeper put down what it has in hand, and audits everything.
///
/// # Errors
/// It never does: that space is lost until the next start; or something does not add up.
pub(super) fn settle(machine: &mut Machine, stats: &mut Stats) -> Result<(), String> {
    for _ in 0..ROUNDS_MAX {
        if machine.cache.audit(false)?.in_hand == 0 {
            return audit(machine, true, stats);
        }
        machine.clock.advance(500);
        machine.step_all();
    }
    Err(format!("segments stay in the housekeeper's hands: {:?}", machine.cache.audit(false)?))
}

/// What is dirty now.
pub(super) fn dirty(machine: &Machine) -> Dirty {
    let of = |served: &super::machine::Served| {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        served.volume.for_each_extent(|extent| match ranges.last_mut() {
            _ if !extent.place.dirty => {}
            Some((first, len)) if *first + *len == extent.range.start => *len += extent.range.len,
            _ => ranges.push((extent.range.start, extent.range.len)),
        });
        ranges
    };
    machine.served.iter().map(of).collect()
}

/// Whether the cache holds all of a range.
pub(super) fn holds(machine: &Machine, volume: usize, first: u64, count: u64) -> bool {
    let mut held = 0;
    machine.served[volume].volume.for_each_extent(|extent| {
        let (start, end) = (extent.range.start.max(first), extent.range.end().min(first + count));
        held += end.saturating_sub(start);
    });
    held == count
}
