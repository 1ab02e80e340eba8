use super::*;
use crate::vhost::inflight_packed_lives::{
    Offered, area, begin_life, drive, packed_ring_lives, serve, setup,
};
use crate::vhost::ring::Ring;
use crate::vhost::testing::{Random, WRITE, for_seeds};
use std::os::unix::fs::FileExt;

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

#[test]
fn whatever_instruction_the_process_dies_at_every_chain_comes_back_once_and_in_order() {
    let mut deaths = 0;
    for seed in 1..=150 {
        let told =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| packed_ring_lives(seed, &mut deaths)));
        if let Err(panic) = told {
            eprintln!("failed with seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
    assert!(deaths > 2000, "only {deaths} lives ended early");
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
