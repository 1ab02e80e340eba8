//! A ring between its queue's thread, a driver, a late disk and a control thread, in many orders.
//!
//! Both sides of a ring may sleep, each after a last look at what the other has stored: whoever
//! gets that wrong sleeps forever, once in a million. Here the kernel's sleeps are turns of the
//! scheduler, so a kick, a call or a wake-up that is lost is a request that hangs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::crew::Crew;
use super::features::Features;
use super::idle::{PollMode, Polling};
use super::inflight::{InflightArea, Recovery, Shape, Tracker};
use super::memory::SharedMemory;
use super::notify::Notifier;
use super::packed::PackedRing;
use super::queue::{self, Place, QueueHandle, QueueStart};
use super::ring::{Ring, RingAddresses, RingPlace};
use super::split::SplitRing;
use super::testing::{Driver, NEXT, PackedDriver, WRITE, disk_config, guest};
use crate::cache::weave_tests::{pause, weave};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, thread};
use crate::volume::{Buffer, Disk, DiskConfig, DiskQueue, Done, Request, Status};
use crate::wake::Waker;

const SIZE: u16 = 4;
/// Requests of a run: the ring goes round twice.
const REQUESTS: u16 = 8;
/// Turns without a call after which a request counts as hung.
const TURNS_MAX: u32 = 5_000;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;
/// Where the requests lie: header and data in one piece, then the status byte.
const REQUEST_AT: u64 = 0xc000;
const STRIDE: u64 = 0x400;
const STATUS_AT: u64 = 0x300;
/// A status that nobody writes.
const NONE: u8 = 0xee;

/// A disk that answers every second request at once and leaves the others to its own thread.
#[derive(Default)]
struct LateDisk {
    submitted: Mutex<Vec<u32>>,
    ended: Arc<Mutex<Vec<u32>>>,
    waker: Mutex<Waker>,
    is_over: AtomicBool,
}

struct LateQueue<B> {
    disk: Arc<LateDisk>,
    held: Vec<Request<B>>,
    done: Vec<Done<B>>,
}

/// The disk as its queues know it.
struct Shared(Arc<LateDisk>);

impl Disk for Shared {
    type Queue<B: Buffer> = LateQueue<B>;

    fn config(&self) -> DiskConfig {
        disk_config()
    }

    fn write_cache(&self) -> bool {
        true
    }

    fn set_write_cache(&self, _: bool) {}

    fn open_queue<B: Buffer>(&self, _: u16, waker: Waker) -> std::io::Result<LateQueue<B>> {
        *self.0.waker.lock().unwrap() = waker;
        Ok(LateQueue { disk: self.0.clone(), held: Vec::new(), done: Vec::new() })
    }
}

impl<B: Buffer> DiskQueue<B> for LateQueue<B> {
    fn submit(&mut self, request: Request<B>) {
        if request.sector.is_multiple_of(2) {
            self.done.push(Done { tag: request.tag, status: Status::Ok, data: request.data });
            return;
        }
        let tag = request.tag;
        self.held.push(request);
        self.disk.submitted.lock().unwrap().push(tag);
    }

    fn commit(&mut self) {}

    fn poll(&mut self, done: &mut Vec<Done<B>>) {
        for tag in self.disk.ended.lock().unwrap().drain(..) {
            let at = self.held.iter().position(|r| r.tag == tag).expect("held until it ends");
            let request = self.held.swap_remove(at);
            self.done.push(Done { tag, status: Status::Ok, data: request.data });
        }
        done.append(&mut self.done);
    }

    fn pending(&self) -> usize {
        self.held.len() + self.done.len()
    }

    fn park(&mut self) {}

    fn leave_behind(self) {}
}

impl LateDisk {
    /// The disk's own thread: ends what was submitted, then says so.
    fn run(&self) {
        while !self.is_over.load(Ordering::SeqCst) {
            let submitted = std::mem::take(&mut *self.submitted.lock().unwrap());
            if submitted.is_empty() {
                thread::yield_now();
                continue;
            }
            for tag in submitted {
                self.ended.lock().unwrap().push(tag);
                let waker = self.waker.lock().unwrap().clone();
                waker.wake();
            }
        }
    }
}

/// A machine with one ring.
struct Bench {
    disk: Arc<LateDisk>,
    memory: Arc<SharedMemory>,
    features: Features,
    kick: EventFd,
    notifier: Arc<Notifier>,
}

impl Bench {
    /// Starts the ring where it stood, with its chains tracked if there is an area for that.
    fn start<R: Ring>(&self, addresses: RingAddresses, base: u32, how: How<'_>) -> QueueHandle {
        let place = RingPlace { memory: self.memory.current(), addresses, size: SIZE, base, log_at: None };
        let mut ring = R::open(place, self.features).unwrap();
        let inflight = how.area.map(|area| {
            let mut tracker = R::Tracker::attach(area, 0, SIZE).unwrap();
            let recovery = tracker.recover(&mut ring).unwrap();
            let is_quiet = match &recovery {
                Recovery::Fresh => true,
                Recovery::Resumed { heads } => heads.is_empty(),
                Recovery::Discarded => false,
            };
            assert!(is_quiet, "a ring that was stopped has nothing in flight: {recovery:?}");
            tracker
        });
        let start = QueueStart {
            index: 0,
            name: "woven".into(),
            disk: Arc::new(Shared(self.disk.clone())),
            memory: self.memory.clone(),
            ring,
            features: self.features,
            call: self.notifier.clone(),
            error: Arc::default(),
            inflight,
            resubmit: Vec::new(),
            // No clock has a say here.
            polling: Polling { mode: PollMode::Off, ..Polling::default() },
        };
        let place = Place { crew: how.crew, cpus: &[] };
        queue::spawn(start, Some(borrowed(&self.kick)), place).unwrap()
    }
}

/// What a ring is run with.
#[derive(Clone, Copy, Default)]
struct How<'a> {
    area: Option<&'a InflightArea>,
    crew: Option<&'a Crew>,
}

#[expect(unsafe_code, reason = "an EventFd gives its descriptor as a number only")]
fn borrowed(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

#[expect(unsafe_code, reason = "an EventFd gives up its descriptor as a number only")]
fn owned(event: &EventFd) -> OwnedFd {
    let number = event.try_clone().unwrap().into_raw_fd();
    // SAFETY: the clone has just given it up.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// The driver's thread: `REQUESTS` one-sector writes, at most half a ring of them at once.
fn drive(driver: &Driver, event_idx: bool, kick: &EventFd, call: &EventFd) {
    let (mut available, mut used) = (0u16, 0u16);
    let mut free: Vec<u16> = (0..SIZE / 2).collect();
    let mut status = [NONE; 1];
    while used < REQUESTS {
        let old = available;
        while available < REQUESTS
            && let Some(head) = free.pop()
        {
            make_available(driver, available, head);
            available += 1;
        }
        if available != old {
            pause();
            driver.set_available_index(available);
            pause();
            let wants = match event_idx {
                // Whether the event index is one of those passed.
                true => available.wrapping_sub(driver.available_event()).wrapping_sub(1) < available - old,
                false => driver.used_flags() & 1 == 0,
            };
            if wants {
                pause();
                kick.write(1).unwrap();
            }
        }
        if event_idx {
            driver.set_used_event(used);
        }
        pause();
        let mut turns = 0;
        while driver.used_index() == used {
            // It sleeps until it is called, and looks then.
            while call.read().is_err() {
                turns += 1;
                assert!(
                    turns < TURNS_MAX,
                    "no call for {used} of {available}, used is {}",
                    driver.used_index()
                );
                thread::yield_now();
            }
        }
        let now = driver.used_index();
        assert!(now > used && now <= available, "{used} -> {now} of {available}");
        while used < now {
            pause();
            let (head, _) = driver.used(used);
            let at = REQUEST_AT + u64::from(head) * STRIDE + STATUS_AT;
            driver.map.read(at, &mut status).unwrap();
            assert_eq!(status, [0], "head {head} is shown as used without a status");
            // It must be completed anew before it is shown again.
            driver.map.write(at, &[NONE]).unwrap();
            free.push(head as u16);
            used += 1;
        }
    }
}

/// Request `position`, at `head`: a write of the sector of that number. Its status is described in
/// the other half of the table.
fn make_available(driver: &Driver, position: u16, head: u16) {
    let at = REQUEST_AT + u64::from(head) * STRIDE;
    prepare(&driver.map, at, position);
    driver.describe(head, at, 16 + 512, NEXT, head + SIZE / 2);
    driver.describe(head + SIZE / 2, at + STATUS_AT, 1, WRITE, 0);
    driver.set_available(position, head);
}

/// The same of a packed ring: chains of two slots, at most two of them at once. Returns the driver.
fn drive_packed(mut driver: PackedDriver, event_idx: bool, kick: &EventFd, call: &EventFd) -> PackedDriver {
    let (mut offered, mut returned) = (0u16, 0u16);
    let mut free: Vec<u16> = vec![0, 1];
    let mut status = [NONE; 1];
    while returned < REQUESTS {
        let mut passed = Vec::new();
        while offered < REQUESTS
            && let Some(id) = free.pop()
        {
            let at = REQUEST_AT + u64::from(id) * STRIDE;
            prepare(&driver.map, at, offered);
            let place = driver.next_place();
            pause();
            driver.offer(id, &[(at, 16 + 512, 0), (at + STATUS_AT, 1, WRITE)]);
            // Of two slots the second is in the same round: the ring has four.
            passed.extend([place, place + 1]);
            offered += 1;
        }
        if !passed.is_empty() {
            pause();
            let wants = match driver.device_event() {
                (_, 1) => false,
                (event, 2) => passed.contains(&event),
                _ => true,
            };
            if wants {
                pause();
                kick.write(1).unwrap();
            }
        }
        if event_idx {
            driver.set_event(driver.used_place(), 2);
        }
        pause();
        let mut turns = 0;
        let (id, written) = loop {
            if let Some(used) = driver.collect() {
                break used;
            }
            // It sleeps until it is called, and looks then.
            while call.read().is_err() {
                turns += 1;
                assert!(turns < TURNS_MAX, "no call for {returned} of {offered}");
                thread::yield_now();
            }
        };
        assert_eq!(written, 1, "a write tells of its status byte");
        let at = REQUEST_AT + u64::from(id) * STRIDE + STATUS_AT;
        driver.map.read(at, &mut status).unwrap();
        assert_eq!(status, [0], "chain {id} is shown as used without a status");
        driver.map.write(at, &[NONE]).unwrap();
        free.push(id);
        returned += 1;
    }
    driver
}

/// A write of the sector of that number, its status not yet written.
fn prepare(map: &super::memory::MemoryMap, at: u64, sector: u16) {
    let mut header = [0; 16];
    header[0..4].copy_from_slice(&1u32.to_le_bytes());
    header[8..16].copy_from_slice(&u64::from(sector).to_le_bytes());
    map.write(at, &header).unwrap();
    map.write(at + STATUS_AT, &[NONE]).unwrap();
}

/// How a run goes.
#[derive(Clone, Copy, Default)]
struct Shaped {
    event_idx: bool,
    /// How often the control thread stops the ring and starts it again meanwhile.
    stops: u32,
    packed: bool,
    /// Whether chains are tracked in an in-flight area.
    tracked: bool,
    /// Whether the ring runs on a thread that it may share.
    shared: bool,
}

fn run(shaped: Shaped) {
    let Shaped { event_idx, stops, packed, tracked, shared } = shaped;
    let map = Arc::new(guest(0x10000));
    let memory = Arc::new(SharedMemory::default());
    memory.replace((*map).clone());
    let (kick, call) = (EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
    let notifier = Arc::new(Notifier::default());
    notifier.set(Some(owned(&call)));
    let layout = if packed { 1 << 34 } else { 0 };
    let features = Features(VERSION_1 | layout | if event_idx { EVENT_IDX } else { 0 });
    let disk = Arc::new(LateDisk::default());
    let bench = Bench { disk: disk.clone(), memory, features, kick, notifier };
    let disk_thread = {
        let disk = disk.clone();
        thread::spawn(move || disk.run())
    };
    let area = tracked.then(|| {
        let shape = Shape { queues: 1, queue_size: SIZE, packed };
        InflightArea::create(shape, true).unwrap().0
    });
    let crew = shared.then(|| Crew::new("woven", 1, &[]).unwrap());
    let how = How { area: area.as_ref(), crew: crew.as_ref() };
    let kick = bench.kick.try_clone().unwrap();
    let packed_driver = PackedDriver::new(map.clone(), SIZE, 0);
    let mut base = if packed { packed_driver.base() } else { 0 };
    let driver = thread::spawn(move || match packed {
        true => drive_packed(packed_driver, event_idx, &kick, &call).base(),
        false => {
            drive(&Driver::new(map, SIZE), event_idx, &kick, &call);
            u32::from(REQUESTS)
        }
    });
    let start = |base| match packed {
        true => bench.start::<PackedRing>(PackedDriver::addresses(), base, how),
        false => bench.start::<SplitRing>(Driver::addresses(), base, how),
    };
    let mut running = start(base);
    for _ in 0..stops {
        for _ in 0..20 {
            pause();
        }
        running.request_stop(None);
        let stopped = running.join();
        assert!(!stopped.broken);
        assert!(packed || stopped.base == stopped.used, "stopped with something in flight");
        base = stopped.base;
        // The driver may have made something available, and its kick may be gone with the old life.
        running = start(base);
    }
    let end = driver.join().unwrap();
    running.request_stop(None);
    let stopped = running.join();
    assert_eq!((stopped.base, stopped.broken), (end, false));
    disk.is_over.store(true, Ordering::SeqCst);
    disk_thread.join().unwrap();
}

#[test]
fn no_kick_call_or_wake_up_is_lost_with_flags() {
    weave(100, || run(Shaped::default()));
}

#[test]
fn no_kick_call_or_wake_up_is_lost_with_event_indices() {
    weave(100, || run(Shaped { event_idx: true, ..Shaped::default() }));
}

#[test]
fn a_ring_that_is_stopped_and_started_again_returns_every_request_once() {
    for event_idx in [false, true] {
        weave(50, move || run(Shaped { event_idx, stops: 2, ..Shaped::default() }));
    }
}

#[test]
fn no_kick_call_or_wake_up_is_lost_on_packed_rings() {
    for event_idx in [false, true] {
        weave(100, move || run(Shaped { event_idx, packed: true, ..Shaped::default() }));
    }
}

#[test]
fn tracked_rings_of_either_layout_that_are_stopped_have_nothing_in_flight() {
    for packed in [false, true] {
        let shaped = Shaped { event_idx: true, stops: 2, packed, tracked: true, shared: false };
        weave(50, move || run(shaped));
    }
}

#[test]
fn a_ring_on_a_shared_thread_is_woken_and_stopped_like_one_on_its_own() {
    for packed in [false, true] {
        let shaped = Shaped { event_idx: true, stops: 2, packed, tracked: true, shared: true };
        weave(50, move || run(shaped));
    }
}
