use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::*;
use crate::vhost::features::Features;
use crate::vhost::inflight::Shape;
use crate::vhost::ring::{Ring, RingPlace};
use crate::vhost::testing::{PackedDriver, Random, WRITE, for_seeds, guest, live};

/// A process that serves a packed ring.
struct Life {
    ring: PackedRing,
    tracker: PackedTracker,
    recovery: Recovery,
}

fn begin_life(driver: &PackedDriver, area: &InflightArea, base: u32) -> Life {
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

fn area(size: u16) -> (InflightArea, std::fs::File) {
    let shape = Shape { queues: 2, queue_size: size, packed: true };
    let (area, file, _) = InflightArea::create(shape, true).unwrap();
    (area, file)
}

fn setup(size: u16) -> (PackedDriver, InflightArea, std::fs::File) {
    let (area, file) = area(size);
    (PackedDriver::new(Arc::new(guest(0x10000)), size, 0), area, file)
}

#[test]
fn the_area_is_laid_out_as_the_specification_says() {
    let (mut driver, area, file) = setup(4);
    let mut life = begin_life(&driver, &area, driver.base());
    assert_eq!(life.recovery, Recovery::Fresh);
    driver.offer(3, &[(0x1122_3344_5566_7788, 16, 0), (0x99, 1, WRITE)]);
    driver.offer(1, &[(0xaa, 2, WRITE)]);
    for id in [3, 1] {
        assert_eq!(life.ring.take(), Ok(Some(id)));
        life.tracker.begin(&life.ring, id);
    }
    life.ring.put_used(3, 1).unwrap();
    life.tracker.before_publish(&[3], life.ring.used());
    // Queue 1 begins behind the 160 bytes of queue 0, rounded to 192.
    let mut bytes = [0; 160];
    file.read_exact_at(&mut bytes, 192).unwrap();
    #[rustfmt::skip]
    let expected = [
        // features, version, desc_num, free_head, old_free_head
        0, 0, 0, 0, 0, 0, 0, 0,  1, 0,  4, 0,  0, 0,  3, 0,
        // used_idx, old_used_idx, used_wrap_counter, old_used_wrap_counter
        2, 0,  0, 0,  1, 1,  0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        // inflight, pad, next, last, num, counter, id, flags, len, addr
        1, 0,  1, 0,  1, 0,  2, 0,  0, 0, 0, 0, 0, 0, 0, 0,
        3, 0,  0x81, 0,  16, 0, 0, 0,  0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11,
        0, 0,  3, 0,  0, 0,  0, 0,  0, 0, 0, 0, 0, 0, 0, 0,
        3, 0,  0x82, 0,  1, 0, 0, 0,  0x99, 0, 0, 0, 0, 0, 0, 0,
        1, 0,  3, 0,  2, 0,  1, 0,  1, 0, 0, 0, 0, 0, 0, 0,
        1, 0,  0x82, 0,  2, 0, 0, 0,  0xaa, 0, 0, 0, 0, 0, 0, 0,
        0, 0,  4, 0,  0, 0,  0, 0,  0, 0, 0, 0, 0, 0, 0, 0,
        0, 0,  0, 0,  0, 0, 0, 0,  0, 0, 0, 0, 0, 0, 0, 0,
    ];
    assert_eq!(bytes, expected);
}

/// What the driver has offered and not got back, oldest first.
type Offered = Vec<(u16, Vec<(u64, u32, u16)>)>;

/// Serves the ring: takes, returns in any order, in batches.
fn serve(life: &mut Life, in_flight: &mut Vec<u16>, random: &mut Random) {
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

fn drive(driver: &mut PackedDriver, offered: &mut Offered, random: &mut Random) {
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

#[test]
fn whatever_instruction_the_process_dies_at_every_chain_comes_back_once_and_in_order() {
    for_seeds(150, |random: &mut Random| {
        let size = 1 + random.below(9) as u16;
        let (mut driver, area, _file) = setup(size);
        let base = driver.base();
        let mut offered: Offered = Vec::new();
        let mut order: Vec<u16> = Vec::new();
        for _ in 0..60 {
            drive(&mut driver, &mut offered, random);
            let steps = random.below(200);
            live(steps, || {
                // The VMM knows nothing better than where the ring began.
                let mut life = begin_life(&driver, &area, base);
                let mut in_flight = resumed(&mut life, &offered);
                for _ in 0..3 {
                    serve(&mut life, &mut in_flight, random);
                    drive(&mut driver, &mut offered, random);
                }
            });
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
    });
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

#[test]
fn a_ring_that_stopped_in_good_order_starts_where_the_vmm_says() {
    let (mut driver, area, _file) = setup(4);
    let mut life = begin_life(&driver, &area, driver.base());
    driver.offer(0, &[(0, 1, 0)]);
    life.ring.take().unwrap();
    life.tracker.begin(&life.ring, 0);
    area.clear(1, 4, life.ring.used());
    let life = begin_life(&driver, &area, 0x0002_0002);
    assert_eq!((life.recovery, life.ring.used()), (Recovery::Fresh, 2));
}

#[test]
fn an_area_for_the_other_layout_has_no_room() {
    let (packed, _file) = area(8);
    assert!(PackedTracker::attach(&packed, 1, 8).is_some());
    assert!(PackedTracker::attach(&packed, 1, 16).is_none());
    assert!(PackedTracker::attach(&packed, 2, 8).is_none());
    assert!(crate::vhost::inflight::SplitTracker::attach(&packed, 1, 8).is_none());
}

#[test]
fn whatever_is_written_into_the_area_the_books_stay_bounded() {
    for_seeds(400, |random: &mut Random| {
        let size = 1 + random.below(12) as u16;
        let (mut driver, area, file) = setup(size);
        let base = driver.base();
        let mut life = begin_life(&driver, &area, base);
        let mut in_flight = Vec::new();
        let mut offered = Offered::new();
        for _ in 0..4 {
            drive(&mut driver, &mut offered, random);
            serve(&mut life, &mut in_flight, random);
        }
        for _ in 0..1 + random.below(4) {
            let at = 192.min(32 * (1 + u64::from(size))).next_multiple_of(64)
                + random.below(32 + 32 * u64::from(size));
            let value = if random.chance(2) { random.below(u64::from(size) + 2) } else { random.next() };
            file.write_all_at(&value.to_le_bytes()[..1 + random.below(2) as usize], at).unwrap();
        }
        let mut life = begin_life(&driver, &area, base);
        let heads = match life.recovery.clone() {
            Recovery::Resumed { heads } => heads,
            _ => Vec::new(),
        };
        for &head in &heads {
            life.tracker.recall(&mut life.ring, head);
            assert!(!life.ring.chain().is_empty() && life.ring.chain().len() <= usize::from(size));
            let last = life.ring.chain().len() - 1;
            assert!(life.ring.chain().iter().enumerate().all(|(i, d)| d.has_next() == (i < last)));
        }
        // They can be returned all the same, and others taken.
        for &head in &heads {
            life.ring.put_used(head, 1).unwrap();
        }
        if !heads.is_empty() {
            let used = life.ring.used();
            life.tracker.before_publish(&heads, used);
            life.ring.publish(&heads).unwrap();
            life.tracker.end_batch(&heads, used);
        }
        for _ in 0..size {
            match life.ring.take() {
                Ok(Some(id)) => life.tracker.begin(&life.ring, id),
                _ => break,
            }
        }
    });
}
