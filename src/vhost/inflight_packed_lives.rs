//! Lives of a packed ring's daemon that end between any two stores to what outlives them: the ring, and
//! the in-flight area. Whatever is left, the next life finds every chain once, and in order.
//!
//! Told to the unit tests and, because a mutant has to be noticed by somebody, to `tests/mutants.rs`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::sync::Arc;

use super::features::Features;
use super::inflight::{InflightArea, Recovery, Shape, Tracker};
use super::inflight_packed::PackedTracker;
use super::packed::PackedRing;
use super::ring::{Ring, RingPlace};
use super::testing::{PackedDriver, Random, WRITE, guest, live};

/// A process that serves a packed ring.
pub(super) struct Life {
    pub ring: PackedRing,
    pub tracker: PackedTracker,
    pub recovery: Recovery,
}

pub(super) fn begin_life(driver: &PackedDriver, area: &InflightArea, base: u32) -> Life {
    let place = RingPlace {
        memory: Arc::clone(&driver.map),
        addresses: PackedDriver::addresses(),
        size: driver.size,
        base,
        log_at: None,
    };
    let mut ring = PackedRing::open(place, Features(0)).unwrap();
    let mut tracker = PackedTracker::attach(area, 1, driver.size).unwrap();
    let recovery = tracker.recover(&mut ring).unwrap();
    Life { ring, tracker, recovery }
}

pub(super) fn area(size: u16) -> (InflightArea, std::fs::File) {
    let shape = Shape { queues: 2, queue_size: size, packed: true };
    let (area, file, _) = InflightArea::create(shape, true).unwrap();
    (area, file)
}

pub(super) fn setup(size: u16) -> (PackedDriver, InflightArea, std::fs::File) {
    let (area, file) = area(size);
    (PackedDriver::new(Arc::new(guest(0x10000)), size, 0), area, file)
}

/// What the driver has offered and not got back, oldest first.
pub(super) type Offered = Vec<(u16, Vec<(u64, u32, u16)>)>;

/// Serves the ring: takes, returns in any order, in batches.
pub(super) fn serve(life: &mut Life, in_flight: &mut Vec<u16>, random: &mut Random) {
    while random.chance(2)
        && let Some(id) = life.ring.take().unwrap()
    {
        life.tracker.begin(&life.ring, id);
        in_flight.push(id);
    }
    let mut batch = Vec::new();
    while !in_flight.is_empty() && random.chance(2) {
        let id = in_flight.swap_remove(random.below(in_flight.len() as u64) as usize);
        life.ring.put_used(id, u32::from(id) + 9).unwrap();
        life.tracker.retire(id);
        batch.push(id);
        // Something may be taken while a batch is put together.
        if random.chance(3)
            && let Some(id) = life.ring.take().unwrap()
        {
            life.tracker.begin(&life.ring, id);
            in_flight.push(id);
        }
    }
    if !batch.is_empty() {
        let used = life.ring.used();
        life.tracker.before_publish(&batch, used);
        life.ring.publish(&batch).unwrap();
        life.tracker.end_batch(&batch, used);
    }
}

pub(super) fn drive(driver: &mut PackedDriver, offered: &mut Offered, random: &mut Random) {
    while let Some((id, len)) = driver.collect() {
        assert_eq!(len, u32::from(id) + 9);
        let at = offered.iter().position(|(known, _)| *known == id).expect("it was offered");
        offered.remove(at);
    }
    while driver.free() > 0 && random.chance(2) {
        let id = (0..driver.size).find(|&id| driver.is_free(id)).unwrap();
        let slots = 1 + random.below(driver.free().into());
        let parts: Vec<_> = (0..slots).map(|_| (random.next(), random.next() as u32, WRITE)).collect();
        driver.offer(id, &parts);
        offered.push((id, parts));
    }
}

/// One ring's lives, whose driver judges all that comes back. Adds the deaths to `deaths`.
///
/// # Panics
/// A chain is lost, comes back twice, or out of order.
pub fn packed_ring_lives(seed: u64, deaths: &mut u64) {
    let random = &mut Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let size = 1 + random.below(9) as u16;
    let (mut driver, area, _file) = setup(size);
    let base = driver.base();
    let mut offered: Offered = Vec::new();
    let mut order: Vec<u16> = Vec::new();
    for _ in 0..60 {
        drive(&mut driver, &mut offered, random);
        let steps = random.below(200);
        let life = live(steps, || {
            // The VMM knows nothing better than where the ring began.
            let mut life = begin_life(&driver, &area, base);
            let mut in_flight = resumed(&mut life, &offered);
            for _ in 0..3 {
                serve(&mut life, &mut in_flight, random);
                drive(&mut driver, &mut offered, random);
            }
        });
        *deaths += u64::from(life.is_none());
        // Chains are taken in the order they are offered, so they are resumed in it.
        let mut life = begin_life(&driver, &area, base);
        while let Some((id, _)) = driver.collect() {
            offered.retain(|(known, _)| *known != id);
        }
        let in_flight = resumed(&mut life, &offered);
        order.clear();
        order.extend(offered.iter().map(|(id, _)| *id).filter(|id| in_flight.contains(id)));
        assert_eq!(in_flight, order);
    }
    let mut life = begin_life(&driver, &area, base);
    let mut in_flight = resumed(&mut life, &offered);
    for _ in 0..10_000 {
        if offered.is_empty() {
            break;
        }
        serve(&mut life, &mut in_flight, random);
        while let Some((id, _)) = driver.collect() {
            offered.retain(|(known, _)| *known != id);
        }
    }
    assert!(offered.is_empty(), "never came back: {offered:?}");
}

/// What a new life has to execute again, each with the descriptors that were offered.
fn resumed(life: &mut Life, offered: &Offered) -> Vec<u16> {
    let heads = match &life.recovery {
        Recovery::Resumed { heads } => heads.clone(),
        Recovery::Fresh => Vec::new(),
        Recovery::Discarded => panic!("an area that nobody tampered with was discarded"),
    };
    for &head in &heads {
        life.tracker.recall(&mut life.ring, head);
        let (_, parts) = offered.iter().find(|(id, _)| *id == head).expect("it is in flight");
        let chain: Vec<_> = life.ring.chain().iter().map(|d| (d.addr, d.len)).collect();
        let expected: Vec<_> = parts.iter().map(|&(addr, len, _)| (addr, len)).collect();
        assert_eq!(chain, expected, "the chain of {head}");
    }
    heads
}
