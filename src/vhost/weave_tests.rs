//! A ring between its queue's thread, a driver, a late disk and a control thread, in many orders.
//!
//! Both sides of a ring may sleep, each after a last look at what the other has stored: whoever
//! gets that wrong sleeps forever, once in a million. Here the kernel's sleeps are turns of the
//! scheduler, so a kick, a call or a wake-up that is lost is a request that hangs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::features::Features;
use super::memory::SharedMemory;
use super::notify::Notifier;
use super::queue::{self, QueueHandle, QueueStart};
use super::split::SplitRing;
use super::testing::{Driver, NEXT, WRITE, disk_config, guest};
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
    /// Starts the ring where it stood.
    fn start(&self, base: u32) -> QueueHandle {
        let event_idx = self.features.event_idx();
        let ring =
            SplitRing::new(self.memory.current(), Driver::addresses(), SIZE, event_idx, base as u16).unwrap();
        let start = QueueStart {
            index: 0,
            name: "woven".into(),
            disk: Arc::new(Shared(self.disk.clone())),
            memory: self.memory.clone(),
            ring,
            features: self.features,
            call: self.notifier.clone(),
            error: Arc::default(),
            inflight: None,
            resubmit: Vec::new(),
            // No clock has a say here.
            poll_max: Duration::ZERO,
        };
        queue::spawn(start, Some(borrowed(&self.kick))).unwrap()
    }
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
    let mut header = [0; 16];
    header[0..4].copy_from_slice(&1u32.to_le_bytes());
    header[8..16].copy_from_slice(&u64::from(position).to_le_bytes());
    driver.map.write(at, &header).unwrap();
    driver.map.write(at + STATUS_AT, &[NONE]).unwrap();
    driver.describe(head, at, 16 + 512, NEXT, head + SIZE / 2);
    driver.describe(head + SIZE / 2, at + STATUS_AT, 1, WRITE, 0);
    driver.set_available(position, head);
}

/// `stops`: how often the control thread stops the ring and starts it again meanwhile.
fn run(event_idx: bool, stops: u32) {
    let map = Arc::new(guest(0x10000));
    let memory = Arc::new(SharedMemory::default());
    memory.replace((*map).clone());
    let (kick, call) = (EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
    let notifier = Arc::new(Notifier::default());
    notifier.set(Some(owned(&call)));
    let features = Features(VERSION_1 | if event_idx { EVENT_IDX } else { 0 });
    let disk = Arc::new(LateDisk::default());
    let bench = Bench { disk: disk.clone(), memory, features, kick, notifier };
    let disk_thread = {
        let disk = disk.clone();
        thread::spawn(move || disk.run())
    };
    let kick = bench.kick.try_clone().unwrap();
    let driver = thread::spawn(move || drive(&Driver::new(map, SIZE), event_idx, &kick, &call));
    let mut running = bench.start(0);
    for _ in 0..stops {
        for _ in 0..20 {
            pause();
        }
        running.request_stop(None);
        let stopped = running.join();
        assert!(!stopped.broken);
        assert_eq!(stopped.base, stopped.used, "stopped with something in flight");
        // The driver may have made something available, and its kick may be gone with the old life.
        running = bench.start(stopped.base);
    }
    driver.join().unwrap();
    running.request_stop(None);
    let stopped = running.join();
    assert_eq!(
        (stopped.base, stopped.used, stopped.broken),
        (u32::from(REQUESTS), u32::from(REQUESTS), false)
    );
    disk.is_over.store(true, Ordering::SeqCst);
    disk_thread.join().unwrap();
}

#[test]
fn no_kick_call_or_wake_up_is_lost_with_flags() {
    weave(100, || run(false, 0));
}

#[test]
fn no_kick_call_or_wake_up_is_lost_with_event_indices() {
    weave(100, || run(true, 0));
}

#[test]
fn a_ring_that_is_stopped_and_started_again_returns_every_request_once() {
    weave(50, || run(false, 2));
    weave(50, || run(true, 2));
}
