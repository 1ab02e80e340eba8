use super::*;
use crate::vhost::testing::{NEXT, PackedDriver, Random, WRITE, for_seeds, guest};

const EVENT_IDX: u64 = 1 << 29;

fn open(driver: &PackedDriver, base: u32, features: u64) -> Option<PackedRing> {
    let place = RingPlace {
        memory: Arc::clone(&driver.map),
        addresses: PackedDriver::addresses(),
        size: driver.size,
        base,
        log_at: None,
    };
    PackedRing::open(place, Features(features))
}

fn setup(size: u16, start: u16, features: u64) -> (PackedDriver, PackedRing) {
    let driver = PackedDriver::new(Arc::new(guest(0x10000)), size, start);
    let ring = open(&driver, driver.base(), features).unwrap();
    (driver, ring)
}

#[test]
fn chains_of_any_length_come_back_in_any_order_over_many_rounds() {
    for_seeds(40, |random: &mut Random| {
        let size = 1 + random.below(20) as u16;
        let (mut driver, mut ring) = setup(size, random.below(size.into()) as u16, 0);
        let mut taken = Vec::new();
        for _ in 0..400 {
            if driver.free() > 0 && random.chance(2) {
                let slots = 1 + random.below(driver.free().into());
                let id = (0..size).find(|&id| driver.is_free(id)).unwrap();
                let part = |i: u64| (u64::from(id) << 32 | i, i as u32 + 1, if i > 1 { WRITE } else { 0 });
                driver.offer(id, &(0..slots).map(part).collect::<Vec<_>>());
                assert_eq!(ring.take(), Ok(Some(id)));
                assert_eq!(ring.chain().len() as u64, slots);
                for i in 0..slots {
                    let found = ring.descriptor(ring.first(id) + i as u16).unwrap();
                    assert_eq!((found.addr, found.len, found.is_writable()), {
                        let (addr, len, flags) = part(i);
                        (addr, len, flags == WRITE)
                    });
                    assert_eq!((found.has_next(), found.next), (i + 1 < slots, i as u16 + 1));
                }
                taken.push(id);
                assert_eq!(ring.take(), Ok(None), "nothing more was offered");
            }
            let mut batch = Vec::new();
            while !taken.is_empty() && random.chance(2) {
                let id = taken.swap_remove(random.below(taken.len() as u64) as usize);
                ring.put_used(id, u32::from(id) + 7).unwrap();
                batch.push(id);
                assert_eq!(driver.collect(), None, "not shown before it is published");
            }
            ring.publish(&batch).unwrap();
            for id in batch {
                assert_eq!(driver.collect(), Some((id, u32::from(id) + 7)));
            }
            assert_eq!(driver.collect(), None);
        }
    });
}

#[test]
fn a_full_ring_offers_nothing_whatever_the_next_slot_says() {
    let (mut driver, mut ring) = setup(4, 1, 0);
    for id in 0..4 {
        driver.offer(id, &[(0, 1, 0)]);
        assert_eq!(ring.take(), Ok(Some(id)));
    }
    // What would make slot 1 available in the next round, were it free.
    driver.write_slot(1, 0, 1, 0, 1 << 15);
    assert_eq!((ring.available(), ring.take()), (Ok(0), Ok(None)));
}

#[test]
fn what_is_no_chain_is_an_error_and_not_taken() {
    let available = 1 << 7;
    type Slots = Vec<(u16, u16)>;
    let too_long = RingError::Chain { head: 0, error: ChainError::TooLong };
    let cases: [(Slots, RingError); 3] = [
        ((0..4).map(|_| (0, available | NEXT)).collect(), too_long),
        (vec![(4, available)], RingError::HeadOutOfRange { head: 4, size: 4 }),
        (vec![(0xffff, available | NEXT), (9, 0)], RingError::HeadOutOfRange { head: 9, size: 4 }),
    ];
    for (slots, error) in cases {
        let (driver, mut ring) = setup(4, 0, 0);
        for (slot, &(id, flags)) in slots.iter().enumerate() {
            driver.write_slot(slot as u16, 0, 1, id, flags);
        }
        let before = ring.avail;
        assert_eq!((ring.take(), ring.avail), (Err(error), before));
    }
}

#[test]
fn an_id_in_flight_is_an_error_until_the_driver_was_shown_it() {
    let (mut driver, mut ring) = setup(4, 0, 0);
    driver.offer(2, &[(0, 1, 0)]);
    ring.take().unwrap();
    driver.write_slot(1, 0, 1, 2, 1 << 7);
    assert_eq!(ring.take(), Err(RingError::HeadInFlight { head: 2 }));
    ring.put_used(2, 1).unwrap();
    assert_eq!(ring.take(), Err(RingError::HeadInFlight { head: 2 }));
    ring.publish(&[2]).unwrap();
    assert_eq!(ring.take(), Ok(Some(2)));
}

#[test]
fn what_was_untaken_is_taken_again() {
    for start in 0..5 {
        let (mut driver, mut ring) = setup(5, start, 0);
        driver.offer(3, &[(0, 1, 0); 4]);
        for _ in 0..3 {
            assert_eq!(ring.take(), Ok(Some(3)), "from slot {start}");
            ring.untake();
        }
        assert_eq!(ring.avail, Position { index: start, wrap: true });
    }
}

#[test]
fn a_ring_outside_memory_misaligned_or_at_an_impossible_position_does_not_open() {
    let driver = PackedDriver::new(Arc::new(guest(0x10000)), 5, 0);
    let good = PackedDriver::addresses();
    let place = |addresses, size, base| RingPlace {
        memory: Arc::clone(&driver.map),
        addresses,
        size,
        base,
        log_at: None,
    };
    use super::super::ring::RingAddresses as At;
    for (addresses, size, base, opens) in [
        (good, 5, 0x8000_8000, true),
        (good, 5, 0x8000_0000, true),
        (good, 5, 0x0000_0001, true),
        (good, 5, 0x0001_0000, false),
        (good, 5, 0x8000_8005, false),
        (good, 5, 0x0005_0000, false),
        (good, 0, 0, false),
        (At { descriptors: good.descriptors + 0xffd0, ..good }, 5, 0, false),
        (At { available: good.available + 2, ..good }, 5, 0, false),
        (At { used: good.descriptors + 0xfffe, ..good }, 5, 0, false),
    ] {
        let opened = PackedRing::open(place(addresses, size, base), Features(0)).is_some();
        assert_eq!(opened, opens, "{addresses:?} {size} {base:#x}");
    }
}

#[test]
fn without_event_indices_flags_decide_both_ways() {
    let (mut driver, mut ring) = setup(4, 0, 0);
    for (flags, wanted) in [(0, true), (1, false), (2, true)] {
        driver.set_event(0, flags);
        assert_eq!(ring.needs_notification(), Ok(wanted), "{flags}");
    }
    ring.disable_notifications().unwrap();
    assert_eq!(driver.device_event().1, 1);
    assert_eq!(ring.enable_notifications(), Ok(false));
    assert_eq!(driver.device_event().1, 0);
    driver.offer(0, &[(0, 1, 0)]);
    assert_eq!(ring.enable_notifications(), Ok(true), "what came meanwhile is seen");
}

#[test]
fn with_event_indices_the_driver_is_asked_to_kick_for_the_next_slot_only() {
    let (mut driver, mut ring) = setup(4, 2, EVENT_IDX);
    driver.offer(0, &[(0, 1, 0); 3]);
    ring.take().unwrap();
    ring.disable_notifications().unwrap();
    assert_eq!(driver.device_event().1, 1);
    assert_eq!(ring.enable_notifications(), Ok(false));
    assert_eq!(driver.device_event(), (1, 2), "slot 1 of the second round");
}

#[test]
fn the_driver_is_notified_exactly_when_its_slot_was_passed() {
    for_seeds(20, |random: &mut Random| {
        let size = 1 + random.below(12) as u16;
        let (mut driver, mut ring) = setup(size, 0, EVENT_IDX);
        driver.set_event(0, 2);
        assert_eq!(ring.needs_notification(), Ok(true), "the first decision knows nothing");
        for _ in 0..500 {
            // Any slot from here on, in this round or the next.
            let event = ring.used.plus(random.below(size.into()) as u16, size);
            let event = if random.chance(4) { event.plus(size, size) } else { event };
            driver.set_event(event.encode(), 2);
            let mut passed = false;
            let mut batch = Vec::new();
            while driver.free() > 0 && random.chance(2) {
                let slots = 1 + random.below(driver.free().into());
                let id = (0..size).find(|&id| driver.is_free(id)).unwrap();
                driver.offer(id, &vec![(0, 1, 0); slots as usize]);
                ring.take().unwrap();
                passed |= (0..slots).any(|skip| ring.used.plus(skip as u16, size) == event);
                ring.put_used(id, 1).unwrap();
                batch.push(id);
            }
            ring.publish(&batch).unwrap();
            while driver.collect().is_some() {}
            assert_eq!(ring.needs_notification(), Ok(passed));
        }
    });
}
