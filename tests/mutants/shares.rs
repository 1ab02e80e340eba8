//! Stories of volumes that share a cache: who holds how much of it, at every millisecond. A story panics
//! where the engine is wrong.

use pcache_vhost::cache::{Mode, Order, Shares};
use pcache_vhost::sim::timed::{DiskModel, Fleet, Member};

/// Bytes of a segment of a fleet, and segments of its cache.
const SEGMENT: u64 = 256 << 10;
const SEGMENTS: u32 = 48;

/// A guest at full speed; of `tenths` of the cache.
fn member(tenths: u64, write_percent: u64) -> Member {
    Member {
        model: DiskModel::NETWORK,
        blocks: u64::from(SEGMENTS) * SEGMENT / 4096 * tenths / 10,
        mode: Mode::Writeback,
        order: Order::Relaxed,
        depth: 16,
        write_percent,
        request_us: 50,
    }
}

fn run(shares: [Shares; 2], members: [Member; 2], mut look: impl FnMut([u64; 2])) {
    let mut fleet = Fleet::new(11, SEGMENTS, &members);
    for (volume, shares) in fleet.volumes.iter().zip(shares) {
        volume.set_shares(shares).expect("the cache can keep them");
    }
    for _ in 0..3000 {
        fleet.run(1);
        look([0, 1].map(|n: usize| fleet.volumes[n].held_bytes() / SEGMENT));
    }
    fleet.quiesce(60_000);
}

/// A volume that has its minimum keeps it beside one that wants everything and for more weight.
pub fn a_minimum(images: &mut u64) {
    let own = Shares { min: 20 * SEGMENT, weight: 1, ..Shares::default() };
    let mut has_it = false;
    run([own, Shares::default()], [member(20, 10), member(80, 20)], |[held, _]| {
        has_it |= held >= 20;
        assert!(!has_it || held >= 19, "a volume of 20 segments at least holds {held}");
    });
    *images += 1;
    assert!(has_it, "a volume never gets its minimum");
}

/// A volume never holds more than its maximum, whether it reads or writes.
pub fn a_maximum(images: &mut u64) {
    let own = Shares { max: 10 * SEGMENT, ..Shares::default() };
    run([own, own], [member(20, 0), member(20, 100)], |held| {
        assert!(held.iter().all(|&held| held <= 10), "volumes of 10 segments at most hold {held:?}");
    });
    *images += 1;
}

/// Data that is worth nothing has its share all the same: another's is not for it to judge.
pub fn equal_weights(images: &mut u64) {
    let mut last = [0; 2];
    // One reads the same again and again, the other nothing twice.
    run([Shares::default(); 2], [member(6, 5), member(400, 5)], |held| last = held);
    *images += 1;
    assert!(last[1] * 10 >= last[0] * 7, "of two volumes of one weight each holds {last:?}");
}
