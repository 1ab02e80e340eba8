//! A queue without its thread: whoever holds it calls its turns. For fuzzing, where a system call per
//! execution would cost more than the code under test.
//!
//! The guest's memory is three regions of one file, mapped once and used again for every life:
//!
//! ```text
//! guest   0x0000 ┬ A 0x4000 ┬ B 0x1000 ┐   hole   0x10000 ┬ C 0x1000 ┐   rings lie in A,
//! file    ░░│ A │░░░░│ B │░░░░│ C │░░░                                  A and B touch
//! ```
//!
//! No region begins or ends at a page, so each is mapped with bytes of the file around it (░). They
//! are nobody's: [`QueueStepper::strays`] says whether any was written.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::super::copy;
use super::super::fds;
use super::super::inflight::{InflightArea, Shape};
use super::super::memory::{Mapping, MemoryError, RegionSpec};
use super::super::packed::PackedRing;
use super::super::ring::RingAddresses;
use super::super::split::SplitRing;
use super::super::vring::{RingContext, Vring};
use super::*;
use crate::wake::Waker;

/// VMM addresses are guest addresses plus this.
const USER: u64 = 0x7000_0000_0000;
/// Guest address, length and place in the file of each region.
const REGIONS: [(u64, u64, u64); 3] =
    [(0, 0x4000, 0x0200), (0x4000, 0x1000, 0x5200), (0x10000, 0x1000, 0x7a00)];
const FILE_LEN: u64 = 0xa000;
/// Most bytes between two regions.
const GAP_MAX: usize = 0x2000;
/// Largest ring, and the in-flight area's size for it.
const SIZE_MAX: u16 = 64;
const AREA_LEN: usize = 32 + SIZE_MAX as usize * 32;
/// What lies around the regions.
const STRAY: u8 = 0xd7;

/// How a ring is set up.
#[derive(Clone, Copy, Debug)]
pub struct RingSetup {
    /// Descriptors, up to 64; of a split ring a power of two.
    pub size: u16,
    /// Guest addresses of the descriptors, and of the available and the used ring or the driver's and
    /// the device's event area.
    pub addresses: [u64; 3],
    /// Where the VMM says that the ring stands.
    pub base: u32,
    /// Virtio feature bits, which also say whether the ring is packed.
    pub features: u64,
    /// Whether chains in flight are tracked.
    pub inflight: bool,
}

/// See the module's head.
pub struct QueueStepper<D: Disk> {
    file: Mapping,
    /// The same file as the guest's memory, whole and without one region.
    maps: [MemoryMap; 2],
    shared: Arc<SharedMemory>,
    /// For split rings, and for packed ones.
    areas: [(InflightArea, Mapping); 2],
    name: Arc<str>,
    worker: Option<Either<D>>,
    /// What lay between the ring's positions when it began and is not in flight: chains the VMM
    /// says an earlier life took.
    skew: u16,
}

/// A queue of disk `D` with a ring of layout `R`.
type DiskWorker<D, R> = Worker<<D as Disk>::Queue<GuestBuffer>, R>;

/// A queue of either layout.
enum Either<D: Disk> {
    Split(DiskWorker<D, SplitRing>),
    Packed(DiskWorker<D, PackedRing>),
}

/// Says `$body` of whichever worker it is.
macro_rules! either {
    ($either:expr, $worker:ident => $body:expr) => {
        match $either {
            Either::Split($worker) => $body,
            Either::Packed($worker) => $body,
        }
    };
}

impl<D: Disk> QueueStepper<D> {
    /// A guest with nothing in its memory and no ring.
    ///
    /// # Errors
    /// The kernel refused a resource.
    pub fn new() -> io::Result<Self> {
        crate::pmem::guard::install()?;
        let other = |error: MemoryError| io::Error::other(error.to_string());
        let file = fds::sealed_memory_file(FILE_LEN)?;
        let mut map = MemoryMap::default();
        for (guest, len, offset) in REGIONS {
            let spec = RegionSpec { guest, user: guest + USER, len, offset };
            map = map.with(spec, OwnedFd::from(file.try_clone()?), u64::MAX).map_err(other)?;
        }
        let (guest, len, offset) = REGIONS[2];
        let without = map.without(RegionSpec { guest, user: guest + USER, len, offset }).map_err(other)?;
        let area = |packed| {
            let shape = Shape { queues: 1, queue_size: SIZE_MAX, packed };
            let made = InflightArea::create(shape, true);
            let (area, file, _) = made.map_err(|error| io::Error::other(error.to_string()))?;
            let bytes = if packed { AREA_LEN } else { AREA_LEN / 2 };
            Ok::<_, io::Error>((area, Mapping::new(&file, 0, bytes as u64).map_err(other)?))
        };
        let mut stepper = Self {
            file: Mapping::new(&file, 0, FILE_LEN).map_err(other)?,
            maps: [map, without],
            shared: Arc::default(),
            areas: [area(false)?, area(true)?],
            name: Arc::from("fuzz"),
            worker: None,
            skew: 0,
        };
        stepper.poke_file(0, &[STRAY; FILE_LEN as usize]);
        stepper.clear();
        Ok(stepper)
    }

    /// Begins again: no ring, memory and in-flight area all zeros.
    pub fn clear(&mut self) {
        self.worker = None;
        for (_, len, offset) in REGIONS {
            self.poke_file(offset, &[0; 0x4000][..len as usize]);
        }
        self.poke_area(0, &[0; AREA_LEN]);
        self.shared.replace(self.maps[0].clone());
    }

    #[expect(unsafe_code, reason = "writes shared memory")]
    fn poke_file(&self, at: u64, bytes: &[u8]) {
        assert!(at + bytes.len() as u64 <= FILE_LEN);
        let to = self.file.start().wrapping_add(at as usize);
        // SAFETY: checked to lie in the mapping, of which no reference exists.
        unsafe { copy::copy_out(bytes, to) }.expect("a sealed file");
    }

    /// Writes into the in-flight areas from byte `at` on, as far as they reach.
    #[expect(unsafe_code, reason = "writes shared memory")]
    pub fn poke_area(&self, at: usize, bytes: &[u8]) {
        for (_, area) in &self.areas {
            let at = at.min(area.len());
            let bytes = &bytes[..bytes.len().min(area.len() - at)];
            // SAFETY: cut to lie in the mapping; the queue uses atomics there, and no thread runs.
            unsafe { copy::copy_out(bytes, area.start().wrapping_add(at)) }.expect("a sealed file");
        }
    }

    /// Writes to a guest address: whether all of it is there.
    pub fn write(&self, guest: u64, bytes: &[u8]) -> bool {
        self.maps[0].write(guest, bytes).is_ok()
    }

    /// Reads from a guest address: whether all of it is there.
    pub fn read(&self, guest: u64, bytes: &mut [u8]) -> bool {
        self.maps[0].read(guest, bytes).is_ok()
    }

    /// Takes the third region away, or gives it back, while the ring runs.
    pub fn show_third_region(&self, shown: bool) {
        self.shared.replace(self.maps[usize::from(!shown)].clone());
    }

    /// Starts the ring as a session would: whether it runs.
    pub fn start(&mut self, setup: &RingSetup, disk: &Arc<D>) -> bool {
        assert!(setup.size <= SIZE_MAX);
        let [descriptors, available, used] = setup.addresses.map(|at| at.wrapping_add(USER));
        let addresses = RingAddresses { descriptors, available, used };
        if !addresses.are_aligned() {
            return false;
        }
        let mut vring = Vring::default();
        (vring.size, vring.base) = (setup.size, setup.base);
        let features = Features(setup.features);
        let context = RingContext {
            name: &self.name,
            disk,
            memory: &self.shared,
            features,
            inflight: setup.inflight.then_some(&self.areas[usize::from(features.packed())].0),
            polling: Polling::default(),
            place: Place::default(),
        };
        let started = match features.packed() {
            true => begin(&vring, addresses, &context).map(|(worker, skew)| (Either::Packed(worker), skew)),
            false => begin(&vring, addresses, &context).map(|(worker, skew)| (Either::Split(worker), skew)),
        };
        let runs = started.is_some();
        if let Some((worker, skew)) = started {
            (self.worker, self.skew) = (Some(worker), skew);
        }
        runs
    }

    /// One turn of the queue's loop, and if it was idle the way to sleep: whether there was
    /// anything to do.
    ///
    /// Panics when the queue's books do not agree.
    pub fn turn(&mut self, stopping: bool) -> bool {
        let Some(worker) = &mut self.worker else { return false };
        let (did, skew) = either!(worker, worker => turn(worker, stopping));
        assert_eq!(skew, self.skew, "chains taken are in flight or returned");
        did
    }

    /// The requests the disk has not given back.
    pub fn pending(&self) -> usize {
        self.worker.as_ref().map_or(0, |worker| either!(worker, worker => worker.queue.pending()))
    }

    /// Whether the ring takes no more heads.
    pub fn is_broken(&self) -> bool {
        self.worker.as_ref().is_none_or(|worker| either!(worker, worker => worker.broken.is_some()))
    }

    /// Ends the ring in order, when nothing is pending: its position, as GET_VRING_BASE says it.
    pub fn stop(&mut self) -> Option<u32> {
        assert_eq!(self.pending(), 0);
        let worker = self.worker.take()?;
        let (base, used, size, packed) = either!(&worker, worker => {
            (worker.ring.base(worker.busy), worker.ring.used(), worker.ring.size(), worker.features.packed())
        });
        let is_tracked = either!(&worker, worker => worker.inflight.is_some());
        // As GET_VRING_BASE does it: what a broken ring has left is counted by the base.
        if is_tracked {
            self.areas[usize::from(packed)].0.clear(0, size, used);
        }
        Some(base)
    }

    /// Ends the ring as the daemon's death would: what is in flight stays so.
    pub fn kill(&mut self) {
        self.worker = None;
    }

    /// Whether a byte beside the regions was written.
    #[expect(unsafe_code, reason = "reads shared memory")]
    pub fn strays(&self) -> bool {
        let mut bytes = [0; GAP_MAX];
        let mut from = 0;
        let starts = REGIONS.iter().map(|&(_, len, offset)| (offset, offset + len));
        starts.chain([(FILE_LEN, FILE_LEN)]).any(|(start, next)| {
            let gap = &mut bytes[..(start - from) as usize];
            // SAFETY: a part of the mapping, of which no reference exists.
            unsafe { copy::copy_in(self.file.start().wrapping_add(from as usize), gap) }
                .expect("a sealed file");
            from = next;
            // By slices, which is a tenth of the time that byte by byte takes.
            *gap != [STRAY; GAP_MAX][..gap.len()]
        })
    }
}

/// A worker as a session would start it, and what its ring has that is not in flight.
fn begin<D: Disk, R: Ring>(
    vring: &Vring,
    addresses: RingAddresses,
    context: &RingContext<'_, D>,
) -> Option<(DiskWorker<D, R>, u16)> {
    let start = vring.prepare::<D, R>(0, addresses, context).ok()?;
    let queue = start.disk.open_queue::<GuestBuffer>(0, Waker::default()).ok()?;
    let mut worker = Worker::new(start, queue);
    worker.quiet();
    let resumed = !worker.resubmit.is_empty();
    let before = worker.ring.skew(worker.resubmit.len() as u16);
    worker.resume();
    // As the first turn would: a ring's books are whole between turns.
    worker.publish();
    let skew = worker.ring.skew(worker.busy);
    // What comes after a chain that breaks the ring is not taken again.
    assert!(!resumed || worker.broken.is_some() || skew == before, "chains are lost when a ring resumes");
    Some((worker, skew))
}

/// One turn, and the ring's skew after it.
fn turn<Q: DiskQueue<GuestBuffer>, R: Ring>(worker: &mut Worker<Q, R>, stopping: bool) -> (bool, u16) {
    let did = worker.turn(stopping);
    if !did && worker.asked_for_notifications(true) {
        worker.queue.park();
        worker.quiet();
    }
    let busy = worker.slots.iter().filter(|slot| slot.busy).count();
    assert_eq!(busy, usize::from(worker.busy), "slots in use are counted");
    assert!(worker.batch.is_empty(), "everything put is published at the end of a turn");
    (did, worker.ring.skew(worker.busy))
}
