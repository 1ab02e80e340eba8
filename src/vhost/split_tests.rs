use super::*;
use crate::vhost::testing::{Driver, NEXT, Random, WRITE, for_seeds, guest};

fn setup(size: u16, event_idx: bool) -> (Driver, SplitRing) {
    let driver = Driver::new(Arc::new(guest(0x10000)), size);
    let ring = SplitRing::new(Arc::clone(&driver.map), Driver::addresses(), size, event_idx, 0).unwrap();
    (driver, ring)
}

#[test]
fn heads_are_taken_in_the_order_they_were_offered_across_the_wrap() {
    let driver = Driver::new(Arc::new(guest(0x10000)), 4);
    driver.set_available_index(0xfffe);
    driver.set_used_index(0xfffe);
    let mut ring = SplitRing::new(Arc::clone(&driver.map), Driver::addresses(), 4, false, 0xfffe).unwrap();
    assert_eq!(ring.available(), Ok(0));
    for round in 0..20u16 {
        let position = 0xfffe_u16.wrapping_add(round);
        driver.set_available(position, round % 4);
        driver.set_available_index(position.wrapping_add(1));
        assert_eq!(ring.available(), Ok(1));
        assert_eq!(ring.take(), Ok(Some(round % 4)));
        ring.put_used(round % 4, u32::from(round)).unwrap();
        assert_eq!(driver.used_index(), position, "not shown before it is published");
        ring.publish(&[]).unwrap();
        assert_eq!(driver.used_index(), position.wrapping_add(1));
        assert_eq!(driver.used(position), (u32::from(round % 4), u32::from(round)));
    }
}

#[test]
fn an_index_more_than_a_ring_ahead_is_an_error() {
    let (driver, ring) = setup(8, false);
    driver.set_available_index(8);
    assert_eq!(ring.available(), Ok(8));
    for index in [9, 0x8000, 0xffff] {
        driver.set_available_index(index);
        assert_eq!(ring.available(), Err(RingError::IndexJump { ahead: index, size: 8 }));
    }
}

#[test]
fn a_head_outside_the_table_is_an_error_and_not_taken() {
    let (driver, mut ring) = setup(8, false);
    driver.set_available(0, 8);
    driver.set_available_index(1);
    assert_eq!(ring.take(), Err(RingError::HeadOutOfRange { head: 8, size: 8 }));
    assert_eq!(ring.next_avail, 0);
}

#[test]
fn descriptors_are_read_as_they_are_laid_out() {
    let (driver, ring) = setup(8, false);
    driver.describe(3, 0x0123_4567_89ab_cdef, 0x1122_3344, NEXT | WRITE, 7);
    let descriptor = ring.descriptor(3).unwrap();
    assert_eq!((descriptor.addr, descriptor.len), (0x0123_4567_89ab_cdef, 0x1122_3344));
    assert!(descriptor.has_next() && descriptor.is_writable() && !descriptor.is_indirect());
    assert_eq!(descriptor.next, 7);
}

#[test]
fn a_ring_outside_memory_or_misaligned_does_not_start() {
    let map = Arc::new(guest(0x10000));
    let good = Driver::addresses();
    let ring = |addresses, size| SplitRing::new(Arc::clone(&map), addresses, size, true, 0);
    assert!(ring(good, 256).is_some());
    assert!(ring(RingAddresses { used: good.descriptors + 0xffe0, ..good }, 256).is_none());
    assert!(ring(RingAddresses { available: 0, ..good }, 256).is_none());
    assert!(ring(RingAddresses { descriptors: good.descriptors + 0xf010, ..good }, 256).is_none());
    assert!(!RingAddresses { used: good.used + 2, ..good }.are_aligned());
    assert!(!RingAddresses { available: good.available + 1, ..good }.are_aligned());
    assert!(!RingAddresses { descriptors: good.descriptors + 8, ..good }.are_aligned());
    assert!(good.are_aligned());
}

#[test]
fn without_event_indices_flags_decide_both_ways() {
    let (driver, mut ring) = setup(8, false);
    driver.set_available_flags(1);
    assert_eq!(ring.needs_notification(), Ok(false));
    driver.set_available_flags(0);
    assert_eq!(ring.needs_notification(), Ok(true));
    ring.disable_notifications().unwrap();
    assert_eq!(driver.used_flags(), 1);
    assert_eq!(ring.enable_notifications(), Ok(false));
    assert_eq!(driver.used_flags(), 0);
    driver.set_available_index(1);
    assert_eq!(ring.enable_notifications(), Ok(true), "what came meanwhile is seen");
}

#[test]
fn with_event_indices_the_driver_is_asked_to_kick_for_the_next_head_only() {
    let (driver, mut ring) = setup(8, true);
    driver.set_available_index(3);
    for _ in 0..3 {
        ring.take().unwrap();
    }
    ring.disable_notifications().unwrap();
    assert_eq!(driver.available_event(), 0, "left behind, so no kick");
    assert_eq!(driver.used_flags(), 0);
    assert_eq!(ring.enable_notifications(), Ok(false));
    assert_eq!(driver.available_event(), 3);
}

#[test]
fn the_driver_is_notified_exactly_when_its_event_was_passed() {
    for_seeds(20, |random: &mut Random| {
        let start = random.next() as u16;
        let driver = Driver::new(Arc::new(guest(0x10000)), 16);
        driver.set_available_index(start);
        driver.set_used_index(start);
        let map = Arc::clone(&driver.map);
        let mut ring = SplitRing::new(map, Driver::addresses(), 16, true, start).unwrap();
        assert_eq!(ring.needs_notification(), Ok(true), "the first decision knows nothing");
        for _ in 0..500 {
            let event = ring.next_used().wrapping_add(random.below(24) as u16).wrapping_sub(8);
            driver.set_used_event(event);
            let mut passed = false;
            for _ in 0..random.below(17) {
                passed |= ring.next_used() == event;
                ring.put_used(0, 0).unwrap();
            }
            ring.publish(&[]).unwrap();
            assert_eq!(ring.needs_notification(), Ok(passed));
        }
    });
}
