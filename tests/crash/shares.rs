//! One cache, several volumes: what one of them holds when its disk is gone.

use pcache_vhost::cache::{FormatOptions, Mode, Order, format};
use pcache_vhost::onmedia::Geometry;
use pcache_vhost::pmem::MediaClass::AssumeDax;
use pcache_vhost::sim::{
    DiskState, Faults, Machine, Memory, SimBuffer, SimClock, SimPmem, Snapshot, Style, World,
};
use pcache_vhost::volume::{Request, RequestKind, Status};

const SECTORS: u64 = 8192;
const SEGMENTS: u32 = 32;

/// Writes a block; says whether it completes while everything else goes on for a while.
fn writes(machine: &mut Machine, volume: usize, block: u64, value: u64) -> bool {
    let (tag, sector) = (block as u32 + 1, block * 8);
    let data = SimBuffer::of_write(volume, sector, 8, value);
    machine.submit(volume, 0, Request { tag, kind: RequestKind::Write, sector, data });
    machine.commit(volume, 0);
    for _ in 0..300 {
        if let Some(done) = machine.poll(volume, 0).into_iter().find(|d| d.tag == tag) {
            assert_eq!(done.status, Status::Ok);
            return true;
        }
        machine.clock.advance(50);
        (0..4).for_each(|_| machine.step_all());
    }
    false
}

#[test]
fn a_volume_whose_disk_is_gone_leaves_the_others_room() {
    for order in [Order::Strict, Order::Relaxed] {
        let style = Style { mode: Mode::Writeback, order, write_cache: true, pass_discard: false };
        let disks = (1..=2).map(|n| DiskState::new(vec![0; SECTORS as usize]).named(n)).collect();
        let geometry = Geometry::custom(24 << 10, 64 << 10, SEGMENTS, 2).expect("a geometry");
        let memory = Memory::new(AssumeDax, geometry.device_size);
        let world = World::new(Snapshot { what: "the beginning", memory, disks }, 1);
        let options = FormatOptions { geometry: Some(geometry), ..FormatOptions::default() };
        format(&SimPmem::new(&world), &SimClock::default(), &options).expect("fresh memory");
        let mut machine = Machine::open(&world, &[style, style], 1).expect("a fresh cache");
        world.with(|w| w.faults = Faults { away: 1, ..Faults::default() });
        let taken = (0..SECTORS / 8).find(|&n| !writes(&mut machine, 0, n, 1000 + n));
        let taken = taken.expect("nothing can take it all");
        let capacity = u64::from(SEGMENTS) * 15;
        assert!(taken > capacity / 3, "{order:?}: of {capacity} blocks it may have {taken} only");
        for n in 0..4 * capacity {
            let block = n * 7 % (SECTORS / 8);
            assert!(writes(&mut machine, 1, block, 5000 + n), "{order:?}: the neighbour's write {n} waits");
        }
        world.with(|w| w.faults = Faults::default());
        for _ in 0..2000 {
            machine.clock.advance(500);
            machine.step_all();
            if machine.poll(0, 0).iter().any(|d| u64::from(d.tag) == taken + 1) {
                break;
            }
        }
        assert!(writes(&mut machine, 0, taken + 1, 9000), "{order:?}: it does not go on");
    }
}
