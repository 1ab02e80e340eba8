//! A guest's driver that costs next to nothing: what is measured is the server.
//!
//! The handshake is that of the tests' client; the rings are driven here. Each of `depth` slots has its
//! three descriptors for good, a header and a status byte; only the place of the data and the header change
//! from request to request. Nothing is checked but that each status says OK: the tests check the rest.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use crate::client::memory::Memory;
use crate::client::ring::Descriptor;
use crate::client::{Client, ClientOptions, Notify, Queue};

const NEXT: u16 = 1;
/// Descriptors of a request.
const CHAIN: u16 = 3;
/// Bytes of guest memory a server's rings, headers and status bytes have.
const RINGS: u64 = 1 << 20;
/// Descriptors per ring: enough for 42 requests of three.
const RING_SIZE: u16 = 128;
/// Longest time without any completion.
const PATIENCE: Duration = Duration::from_secs(60);

/// The guest's memory: rings of several servers in front, and the data buffers that all of them share.
pub struct Guest {
    pub memory: Arc<Memory>,
    servers: u64,
    data_at: u64,
    data_len: u64,
}

impl Guest {
    /// With data buffers of `len` bytes in all, which rotate.
    pub fn new(servers: u64, len: u64) -> Self {
        let data_at = servers * RINGS;
        let memory = Arc::new(Memory::new(data_at + len, 1));
        memory.seal();
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut page = [0u8; 4096];
        for at in (0..len).step_by(page.len()) {
            for word in page.as_chunks_mut::<8>().0 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *word = state.to_le_bytes();
            }
            memory.write(memory.regions()[0].guest + data_at + at, &page);
        }
        Self { memory, servers, data_at, data_len: len }
    }
}

/// What one request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Do {
    Read(u64),
    Write(u64),
    Flush,
}

/// One request, by sector.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub what: Do,
    pub len: u32,
}

/// What a run came to.
#[derive(Clone, Debug, Default)]
pub struct Run {
    pub requests: u64,
    pub elapsed: Duration,
    /// Of each request in ns, unsorted.
    pub latencies: Vec<u32>,
    /// When requests completed, counted by [`TICK`].
    pub ticks: Vec<u32>,
    pub kicks: u64,
    pub calls: u64,
}

/// One step of the throughput over time.
pub const TICK: Duration = Duration::from_millis(10);

struct Slot {
    sent: Instant,
}

struct Lane {
    desc_at: u64,
    avail_at: u64,
    used_at: u64,
    header_at: u64,
    status_at: u64,
    free: Vec<u16>,
    slots: Vec<Slot>,
    avail: u16,
    shown: u16,
    used: u16,
}

/// A connected driver.
pub struct Driver {
    pub client: Client,
    lanes: Vec<Lane>,
    memory: Arc<Memory>,
    data_at: u64,
    data_len: u64,
    next: u64,
    is_polled: bool,
}

impl Driver {
    /// Connects as the `index`-th server's driver.
    pub fn connect(path: &std::path::Path, guest: &Guest, index: u64, queues: u16, notify: Notify) -> Self {
        assert!(index < guest.servers, "there is room for {} servers", guest.servers);
        let base = guest.memory.regions()[0].guest;
        let options = ClientOptions {
            queues,
            queue_size: RING_SIZE,
            event_idx: notify == Notify::Call,
            indirect: false,
            notify,
            patience: PATIENCE,
            ..ClientOptions::default()
        };
        let share = RINGS / u64::from(queues);
        let rings = (0..queues).map(|queue| {
            let range = (base + index * RINGS + u64::from(queue) * share, share & !4095);
            Queue::new(guest.memory.clone(), queue, RING_SIZE, [range])
        });
        let mut client = Client::connect_in(path, options, guest.memory.clone(), rings.collect());
        let lane = |queue: &mut Queue| Lane {
            desc_at: queue.desc_at,
            avail_at: queue.avail_at,
            used_at: queue.used_at,
            header_at: queue.alloc(16 * u64::from(RING_SIZE)),
            status_at: queue.alloc(u64::from(RING_SIZE)),
            free: (0..RING_SIZE / CHAIN).rev().collect(),
            slots: (0..RING_SIZE).map(|_| Slot { sent: Instant::now() }).collect(),
            avail: 0,
            shown: 0,
            used: 0,
        };
        let lanes = client.queues.iter_mut().map(lane).collect();
        Self {
            client,
            lanes,
            memory: guest.memory.clone(),
            data_at: base + guest.data_at,
            data_len: guest.data_len,
            next: 0,
            is_polled: notify == Notify::Poll,
        }
    }

    /// Does the steps, `depth` at a time on each queue, and waits for all of them.
    pub fn run(&mut self, steps: &[Step], depth: usize) -> Run {
        assert!(depth <= self.lanes[0].slots.len() / 3, "a ring has room for {} requests", RING_SIZE / 3);
        let mut run = Run { latencies: Vec::with_capacity(steps.len()), ..Run::default() };
        let mut todo = steps.iter().copied();
        let (begin, mut last) = (Instant::now(), Instant::now());
        let before = self.client.queues.iter().map(|queue| queue.kicks).sum::<u64>();
        for lane in 0..self.lanes.len() {
            for _ in 0..depth {
                let Some(step) = todo.next() else { break };
                self.issue(lane, step, begin);
            }
            self.show(lane);
        }
        let mut left = steps.len();
        while left > 0 {
            let mut found = 0;
            for lane in 0..self.lanes.len() {
                found += self.collect(lane, &mut todo, begin, &mut run);
            }
            left -= found;
            if found > 0 {
                last = Instant::now();
            } else if left > 0 {
                assert!(last.elapsed() < PATIENCE, "{left} requests hang");
                if self.is_polled { std::hint::spin_loop() } else { self.sleep(&mut run) }
            }
        }
        run.elapsed = begin.elapsed();
        run.requests = steps.len() as u64;
        run.kicks = self.client.queues.iter().map(|queue| queue.kicks).sum::<u64>() - before;
        run
    }

    /// Puts one request into the ring; the device does not see it before [`Driver::show`].
    fn issue(&mut self, lane: usize, step: Step, now: Instant) {
        let len = u64::from(step.len);
        if self.next + len > self.data_len {
            self.next = 0;
        }
        let data_at = self.data_at + self.next;
        self.next += len.next_multiple_of(4096);
        let lane = &mut self.lanes[lane];
        let slot = lane.free.pop().expect("as many slots as the depth");
        let (kind, sector) = match step.what {
            Do::Read(sector) => (0u32, sector),
            Do::Write(sector) => (1, sector),
            Do::Flush => (4, 0),
        };
        let header_at = lane.header_at + 16 * u64::from(slot);
        self.memory.write(header_at, &(u128::from(kind) | u128::from(sector) << 64).to_le_bytes());
        let first = slot * CHAIN;
        let header = Descriptor { flags: NEXT, next: first + 1, ..Descriptor::readable(header_at, 16) };
        let status = Descriptor::writable(lane.status_at + u64::from(slot), 1);
        let data = match step.what {
            Do::Read(_) => Descriptor::writable(data_at, step.len),
            Do::Write(_) => Descriptor::readable(data_at, step.len),
            Do::Flush => status,
        };
        let mut chain = [0; 48];
        chain[..16].copy_from_slice(&header.to_bytes());
        if step.what == Do::Flush {
            chain[16..32].copy_from_slice(&status.to_bytes());
        } else {
            let data = Descriptor { flags: data.flags | NEXT, next: first + 2, ..data };
            chain[16..32].copy_from_slice(&data.to_bytes());
            chain[32..].copy_from_slice(&status.to_bytes());
        }
        self.memory.write(lane.desc_at + 16 * u64::from(first), &chain);
        self.memory.store(lane.avail_at + 4 + 2 * u64::from(lane.avail % RING_SIZE), first);
        lane.avail = lane.avail.wrapping_add(1);
        lane.slots[usize::from(slot)].sent = now;
    }

    /// Shows the device what was put into the ring, and kicks it if it wants that.
    fn show(&mut self, index: usize) {
        let lane = &mut self.lanes[index];
        if lane.shown == lane.avail {
            return;
        }
        self.memory.store(lane.avail_at + 2, lane.avail);
        fence(Ordering::SeqCst);
        let is_wanted = if self.is_polled {
            self.memory.load(lane.used_at) & 1 == 0
        } else {
            let event = self.memory.load(lane.used_at + 4 + 8 * u64::from(RING_SIZE));
            let (passed, all) =
                (lane.avail.wrapping_sub(event).wrapping_sub(1), lane.avail.wrapping_sub(lane.shown));
            passed < all
        };
        lane.shown = lane.avail;
        if is_wanted {
            self.client.queues[index].kick();
        }
    }

    /// Takes what has completed, and issues as much again. How many it took.
    fn collect(
        &mut self,
        index: usize,
        todo: &mut impl Iterator<Item = Step>,
        begin: Instant,
        run: &mut Run,
    ) -> usize {
        let used = self.memory.load(self.lanes[index].used_at + 2);
        let new = used.wrapping_sub(self.lanes[index].used);
        if new == 0 {
            return 0;
        }
        let now = Instant::now();
        let tick = ((now - begin).as_nanos() / TICK.as_nanos()) as usize;
        if run.ticks.len() <= tick {
            run.ticks.resize(tick + 1, 0);
        }
        run.ticks[tick] += u32::from(new);
        while self.lanes[index].used != used {
            let lane = &mut self.lanes[index];
            let at = lane.used_at + 4 + 8 * u64::from(lane.used % RING_SIZE);
            let slot = self.memory.load(at) / CHAIN;
            let mut status = [0];
            self.memory.read(lane.status_at + u64::from(slot), &mut status);
            assert_eq!(status, [0], "a request failed");
            lane.used = lane.used.wrapping_add(1);
            lane.free.push(slot);
            let latency = (now - lane.slots[usize::from(slot)].sent).as_nanos();
            run.latencies.push(u32::try_from(latency).unwrap_or(u32::MAX));
            if let Some(step) = todo.next() {
                self.issue(index, step, now);
            }
        }
        self.show(index);
        usize::from(new)
    }

    /// Sleeps until a ring calls.
    fn sleep(&mut self, run: &mut Run) {
        for lane in &self.lanes {
            self.memory.store(lane.avail_at + 4 + 2 * u64::from(RING_SIZE), lane.used);
        }
        fence(Ordering::SeqCst);
        if self.lanes.iter().any(|lane| self.memory.load(lane.used_at + 2) != lane.used) {
            return;
        }
        self.client.wait_calls(PATIENCE);
        run.calls += 1;
    }
}
