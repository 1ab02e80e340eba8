//! The test front end judged: a device played by hand that misbehaves in every way the client claims
//! to notice.

mod client;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use client::front::queues_in;
use client::{Completion, Layout, Memory, Queue, Request};

/// A ring of eight with one read of a sector outstanding, and its device.
struct Device {
    memory: Arc<Memory>,
    queue: Queue,
    used: u16,
}

impl Device {
    fn new(event_idx: bool) -> Self {
        let memory = Arc::new(Memory::new(1 << 20, 2));
        let mut queue = queues_in(&memory, 1, 8).remove(0);
        queue.event_idx = event_idx;
        let mut device = Self { memory, queue, used: 0 };
        device.submit();
        device
    }

    fn submit(&mut self) {
        let read = Request::read(3, 512);
        let layout = Layout { readable: vec![16], writable: vec![512, 1], indirect: false };
        assert!(self.queue.submit(5, &read, &layout));
        self.queue.publish();
    }

    /// (address, length) of the descriptor `skip` links behind the head of entry `at`.
    fn descriptor(&self, at: u16, skip: u16) -> (u64, u32) {
        let mut slot = self.memory.load(self.queue.avail_at + 4 + 2 * u64::from(at % 8));
        let mut bytes = [0; 16];
        for _ in 0..=skip {
            self.memory.read(self.queue.desc_at + 16 * u64::from(slot), &mut bytes);
            slot = u16::from_le_bytes([bytes[14], bytes[15]]);
        }
        let number =
            |range: std::ops::Range<usize>| bytes[range].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
        (number(0..8), number(8..12) as u32)
    }

    fn head(&self, at: u16) -> u32 {
        u32::from(self.memory.load(self.queue.avail_at + 4 + 2 * u64::from(at % 8)))
    }

    fn status(&self, status: u8) {
        self.memory.write(self.descriptor(self.queue.avail_index().wrapping_sub(1), 2).0, &[status]);
    }

    fn push_used(&mut self, id: u32, len: u32) {
        let entry = self.queue.used_at + 4 + 8 * u64::from(self.used % 8);
        self.memory.write(entry, &[id.to_le_bytes(), len.to_le_bytes()].concat());
        self.used = self.used.wrapping_add(1);
        self.memory.store(self.queue.used_at + 2, self.used);
    }

    fn collect(&mut self) -> Result<Vec<Completion>, String> {
        let mut done = Vec::new();
        let outcome = catch_unwind(AssertUnwindSafe(|| self.queue.collect(&mut done)));
        outcome.map(|()| done).map_err(|panic| panic.downcast_ref::<String>().cloned().unwrap_or_default())
    }
}

#[test]
fn a_device_that_keeps_the_rules_is_believed_over_many_wraps() {
    for event_idx in [false, true] {
        let mut device = Device::new(event_idx);
        for round in 0..70_000u32 {
            let last = device.queue.avail_index().wrapping_sub(1);
            let (data, len) = device.descriptor(last, 1);
            assert_eq!(len, 512);
            device.memory.fill(data, round as u8, 512);
            device.status(0);
            device.push_used(device.head(last), 513);
            let done = device.collect().unwrap();
            assert_eq!((done.len(), done[0].tag, done[0].status), (1, 5, 0));
            assert_eq!(done[0].data, [round as u8; 512]);
            device.submit();
        }
    }
}

#[test]
fn every_breach_of_the_rules_is_noticed() {
    type Breach = fn(&mut Device);
    let breaches: [(&str, Breach); 8] = [
        ("is not outstanding", |d| {
            d.status(0);
            d.push_used(d.head(0) + 1, 513);
        }),
        ("is not outstanding", |d| d.push_used(8, 513)),
        ("is not outstanding", |d| d.push_used(u32::MAX, 513)),
        ("the used index went from 0 to 2 with 1 outstanding", |d| {
            d.status(0);
            d.push_used(d.head(0), 513);
            d.push_used(d.head(0), 513);
        }),
        ("used.len is what a successful request wrote", |d| {
            d.status(0);
            d.push_used(d.head(0), 1);
        }),
        ("used.len is 514 of 513", |d| {
            d.status(1);
            d.push_used(d.head(0), 514);
        }),
        ("wrote beside the buffer", |d| {
            d.status(0);
            d.memory.fill(d.descriptor(0, 1).0 + 512, 0, 1);
            d.push_used(d.head(0), 513);
        }),
        ("wrote beside the buffer", |d| {
            d.status(0);
            d.memory.fill(d.descriptor(0, 0).0 - 1, 0, 1);
            d.push_used(d.head(0), 513);
        }),
    ];
    for (says, breach) in breaches {
        let mut device = Device::new(true);
        breach(&mut device);
        let why = device.collect().expect_err(says);
        assert!(why.contains(says), "expected {says:?}, got {why:?}");
    }
}

#[test]
fn a_head_used_a_second_time_after_its_completion_is_noticed() {
    let mut device = Device::new(false);
    device.status(0);
    let head = device.head(0);
    device.push_used(head, 513);
    device.collect().unwrap();
    device.push_used(head, 513);
    assert!(device.collect().unwrap_err().contains("with 0 outstanding"));
}

#[test]
fn kicks_and_calls_follow_the_event_indices() {
    for (event, kicks) in [(0, 1), (1, 0), (u16::MAX, 0), (7, 0)] {
        let memory = Arc::new(Memory::new(1 << 20, 1));
        let mut queue = queues_in(&memory, 1, 8).remove(0);
        queue.event_idx = true;
        memory.store(queue.used_at + 4 + 8 * 8, event);
        let flush = Request::flush();
        assert!(queue.submit(1, &flush, &Layout::plain(&flush)));
        queue.publish();
        assert_eq!(queue.kicks, kicks, "avail_event {event}");
        assert!(queue.arm(), "nothing was used yet");
        assert_eq!(memory.load(queue.avail_at + 4 + 2 * 8), 0, "used_event");
    }
}
