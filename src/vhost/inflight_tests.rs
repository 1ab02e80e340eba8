use std::os::unix::fs::FileExt;

use super::*;
use crate::vhost::testing::{Random, for_seeds, memory_file};

/// Queues with split rings.
fn rings(queues: u16, queue_size: u16) -> Shape {
    Shape { queues, queue_size, packed: false }
}

fn reopen(file: &File, shape: &VhostUserInflight) -> InflightArea {
    InflightArea::open(file.try_clone().unwrap().into(), shape, false).unwrap()
}

#[test]
fn the_area_is_laid_out_as_the_specification_says() {
    let (area, file, shape) = InflightArea::create(rings(2, 128), true).unwrap();
    assert_eq!((shape.num_queues, shape.queue_size, shape.mmap_offset), (2, 128, 0));
    assert_eq!(shape.mmap_size, 2 * 2112 + 64);
    assert!(file.set_len(0).is_err(), "its length is sealed");
    let mut queue = SplitTracker::attach(&area, 1, 128).unwrap();
    assert_eq!(queue.find(0x1234, 0x1234), Recovery::Fresh);
    queue.enter(2);
    queue.enter(1);
    queue.retire(2);
    let mut bytes = [0; 80];
    file.read_exact_at(&mut bytes, 2112).unwrap();
    #[rustfmt::skip]
    let expected = [
        // features, version, desc_num, last_batch_head, used_idx
        0, 0, 0, 0, 0, 0, 0, 0,  1, 0,  128, 0,  2, 0,  0x34, 0x12,
        // inflight, pad, next, counter
        0, 0, 0, 0, 0, 0,  0, 0,  0, 0, 0, 0, 0, 0, 0, 0,
        1, 0, 0, 0, 0, 0,  0, 0,  1, 0, 0, 0, 0, 0, 0, 0,
        1, 0, 0, 0, 0, 0,  0, 0,  0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0,  0, 0,  0, 0, 0, 0, 0, 0, 0, 0,
    ];
    assert_eq!(bytes, expected);
}

#[test]
fn the_first_use_starts_from_the_real_used_index() {
    let (area, _file, _) = InflightArea::create(rings(1, 8), true).unwrap();
    let mut queue = SplitTracker::attach(&area, 0, 8).unwrap();
    assert_eq!(queue.find(100, 103), Recovery::Fresh);
    // Death right after the first chain was shown: one batch of one, not of a hundred and one.
    queue.enter(5);
    queue.enter(6);
    queue.retire(5);
    let mut again = SplitTracker::attach(&area, 0, 8).unwrap();
    assert_eq!(again.find(101, 103), Recovery::Resumed { heads: vec![6] });
}

/// A ring and its area, with every store a step at which the process may die.
struct Life {
    queue: SplitTracker,
    used: u16,
    available: u16,
    /// Heads in flight in the order they were taken, as a driver would see it.
    taken: Vec<u16>,
    free: Vec<u16>,
}

#[test]
fn whatever_step_the_process_dies_at_the_same_chains_come_back_in_order() {
    for_seeds(200, |random: &mut Random| {
        let (area, file, shape) = InflightArea::create(rings(3, 16), true).unwrap();
        let start = random.next() as u16;
        let mut life = Life {
            queue: SplitTracker::attach(&area, 1, 16).unwrap(),
            used: start,
            available: start,
            taken: Vec::new(),
            free: (0..16).collect(),
        };
        assert_eq!(life.queue.find(start, start), Recovery::Fresh);
        for _ in 0..30 {
            let steps = random.below(12);
            for _ in 0..steps {
                turn(&mut life, random, false);
            }
            turn(&mut life, random, true);
            // Dead. The next process finds the area and the ring.
            let area = reopen(&file, &shape);
            life.queue = SplitTracker::attach(&area, 1, 16).unwrap();
            let recovery = life.queue.find(life.used, life.available);
            assert_eq!(recovery, Recovery::Resumed { heads: life.taken.clone() });
            // Executed again, in order.
            for &head in &life.taken {
                life.queue.enter(head);
            }
        }
    });
}

/// Takes some, returns some in any order; `die` after any step of it.
fn turn(life: &mut Life, random: &mut Random, die: bool) {
    let mut fuel = if die { random.below(12) } else { u64::MAX };
    let mut step = || {
        fuel = fuel.wrapping_sub(1);
        fuel != u64::MAX
    };
    for _ in 0..random.below(4) {
        let Some(at) = (!life.free.is_empty()).then(|| random.below(life.free.len() as u64) as usize) else {
            break;
        };
        if !step() {
            return;
        }
        let head = life.free.swap_remove(at);
        life.available = life.available.wrapping_add(1);
        life.queue.enter(head);
        life.taken.push(head);
    }
    let mut batch = Vec::new();
    for _ in 0..random.below(4).min(life.taken.len() as u64) {
        if !step() {
            return;
        }
        let left: Vec<u16> = life.taken.iter().copied().filter(|head| !batch.contains(head)).collect();
        let head = left[random.below(left.len() as u64) as usize];
        life.queue.retire(head);
        batch.push(head);
    }
    if !step() {
        return;
    }
    // The ring's index moves: from here on the driver owns the batch.
    life.used = life.used.wrapping_add(batch.len() as u16);
    life.taken.retain(|head| !batch.contains(head));
    life.free.extend(&batch);
    if !step() {
        return;
    }
    let ended = if die { random.below(batch.len() as u64 + 1) as usize } else { batch.len() };
    if ended < batch.len() {
        // Dead among the marks.
        for &head in &batch[..ended] {
            life.queue.mark(head).store(0, Ordering::Release);
        }
        return;
    }
    life.queue.end_batch(&batch, life.used.into());
}

#[test]
fn an_area_that_contradicts_its_ring_is_cleared() {
    let (area, file, shape) = InflightArea::create(rings(1, 8), true).unwrap();
    let mut queue = SplitTracker::attach(&area, 0, 8).unwrap();
    queue.find(10, 12);
    queue.enter(1);
    queue.enter(2);
    // The guest has reset the ring: nothing was made available there.
    let mut again = SplitTracker::attach(&reopen(&file, &shape), 0, 8).unwrap();
    assert_eq!(again.find(0, 0), Recovery::Discarded);
    assert_eq!(again.find(0, 0), Recovery::Resumed { heads: vec![] });
    // The ring has another size now.
    let mut smaller = SplitTracker::attach(&area, 0, 4).unwrap();
    assert_eq!(smaller.find(0, 0), Recovery::Discarded);
    assert_eq!(smaller.find(0, 0), Recovery::Resumed { heads: vec![] });
}

#[test]
fn a_clean_stop_leaves_nothing_to_resume() {
    let (area, _file, _) = InflightArea::create(rings(1, 8), true).unwrap();
    let mut queue = SplitTracker::attach(&area, 0, 8).unwrap();
    queue.find(0, 3);
    queue.enter(1);
    queue.clear(7);
    assert_eq!(SplitTracker::attach(&area, 0, 8).unwrap().find(7, 9), Recovery::Resumed { heads: vec![] });
}

#[test]
fn any_content_of_the_area_is_survived() {
    for_seeds(300, |random: &mut Random| {
        let (area, file, shape) = InflightArea::create(rings(2, 16), true).unwrap();
        let noise: Vec<u8> = (0..shape.mmap_size).map(|_| random.next() as u8).collect();
        file.write_all_at(&noise, 0).unwrap();
        if !random.chance(4) {
            // Past the first checks.
            file.write_all_at(&[1, 0, 16, 0], 8).unwrap();
        }
        let (used, available) = (random.next() as u16, random.next() as u16);
        let mut queue = SplitTracker::attach(&area, 0, 16).unwrap();
        if let Recovery::Resumed { heads } = queue.find(used, available) {
            assert!(heads.len() <= usize::from(available.wrapping_sub(used)));
            let mut unique = heads.clone();
            unique.sort_unstable();
            unique.dedup();
            assert_eq!(unique.len(), heads.len());
            assert!(heads.iter().all(|&head| head < 16));
        }
        queue.enter(3);
        queue.retire(3);
        queue.end_batch(&[3], used.wrapping_add(1).into());
        let _: Option<bool> = area.writeback();
    });
}

#[test]
fn the_write_back_byte_outlives_the_process() {
    let (area, file, shape) = InflightArea::create(rings(4, 64), true).unwrap();
    assert_eq!(reopen(&file, &shape).writeback(), Some(true));
    area.set_writeback(false);
    assert_eq!(reopen(&file, &shape).writeback(), Some(false));
}

#[test]
fn an_area_of_another_back_end_has_no_trailer_and_is_taken_all_the_same() {
    let len = rings(4, 64).len();
    let shape = VhostUserInflight::new(len, 0, 4, 64);
    let area = InflightArea::open(memory_file(len).into(), &shape, false).unwrap();
    assert_eq!(area.writeback(), None);
    area.set_writeback(true);
    assert_eq!(area.writeback(), None);
    assert!(SplitTracker::attach(&area, 3, 64).is_some());
    assert!(SplitTracker::attach(&area, 4, 64).is_none());
    assert!(SplitTracker::attach(&area, 0, 128).is_none());
}

#[test]
fn areas_that_are_too_small_misplaced_or_could_vanish_are_refused() {
    let fd = |len| OwnedFd::from(memory_file(len));
    let shape = |len, offset, queues, size| VhostUserInflight::new(len, offset, queues, size);
    for (what, fd, shape) in [
        ("no queues", fd(4096), shape(4096, 0, 0, 8)),
        ("no descriptors", fd(4096), shape(4096, 0, 1, 0)),
        ("too small", fd(4096), shape(100, 0, 1, 8)),
        ("behind its file", fd(128), shape(192, 0, 1, 8)),
        ("past the end", fd(4096), shape(4096, 4032, 1, 8)),
        ("odd offset", fd(4096), shape(512, 8, 1, 8)),
        ("wraps", fd(4096), shape(192, u64::MAX - 63, 1, 8)),
        ("not sealable", tempfile::tempfile().unwrap().into(), shape(192, 0, 1, 8)),
    ] {
        assert!(InflightArea::open(fd, &shape, false).is_err(), "{what}");
    }
    assert!(InflightArea::open(fd(4096), &shape(512, 64, 1, 8), false).is_ok());
}
