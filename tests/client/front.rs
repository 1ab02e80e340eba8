//! A whole front end: handshake, rings, requests, and coming back after the server died.
//!
//! The handshake is QEMU's, message for message; others are replayed by `tests/vmm_handshake.rs`
//! from the parts.

#![expect(unsafe_code, reason = "waits with poll(2)")]

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::memory::Memory;
use super::packed::Packed;
use super::request::{Completion, Layout, OK, Request};
use super::ring::Queue;
use super::wire::{Inflight, Req, Wire, feature, longs, protocol, words};

/// How completions are waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Notify {
    /// By the call eventfd, asleep meanwhile: a call that never comes is found.
    Call,
    /// By looking at the used ring.
    Poll,
}

/// What SET_VRING_BASE says after the server was restarted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RestartBase {
    /// The used index, as QEMU does.
    Used,
    /// The available index, as Cloud Hypervisor does: wrong for whoever believes it.
    Available,
}

/// What kind of front end to be.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    pub queues: u16,
    pub queue_size: u16,
    pub event_idx: bool,
    pub indirect: bool,
    pub inflight: bool,
    /// Packed rings, if they are offered.
    pub packed: bool,
    /// Bytes of guest memory, shared by the queues.
    pub mem_size: u64,
    /// Regions it is cut into.
    pub regions: u16,
    /// Virtio features to take if offered; those of the options above are taken away from it.
    pub features: u64,
    /// Protocol features to take if offered.
    pub protocol: u64,
    /// What to write to the `wce` byte, if anything.
    pub wce: Option<bool>,
    pub notify: Notify,
    pub restart_base: RestartBase,
    /// How long anything may take.
    pub patience: Duration,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 128,
            event_idx: true,
            indirect: true,
            inflight: true,
            packed: false,
            mem_size: 64 << 20,
            regions: 2,
            features: u64::MAX,
            protocol: u64::MAX,
            wce: None,
            notify: Notify::Call,
            restart_base: RestartBase::Used,
            patience: Duration::from_secs(30),
        }
    }
}

impl ClientOptions {
    fn features(&self) -> u64 {
        let mut taken = feature::BLK_SEG_MAX
            | feature::BLK_SIZE_MAX
            | feature::BLK_RO
            | feature::BLK_BLK_SIZE
            | feature::BLK_FLUSH
            | feature::BLK_TOPOLOGY
            | feature::BLK_CONFIG_WCE
            | feature::BLK_MQ
            | feature::BLK_DISCARD
            | feature::BLK_WRITE_ZEROES
            | feature::INDIRECT
            | feature::EVENT_IDX
            | feature::PROTOCOL_FEATURES
            | feature::VERSION_1;
        if self.packed {
            taken |= feature::RING_PACKED;
        }
        if !self.event_idx {
            taken &= !feature::EVENT_IDX;
        }
        if !self.indirect {
            taken &= !feature::INDIRECT;
        }
        taken & self.features
    }

    fn protocol(&self) -> u64 {
        let mut taken = protocol::MQ
            | protocol::BACKEND_REQ
            | protocol::REPLY_ACK
            | protocol::CONFIG
            | protocol::INFLIGHT_SHMFD
            | protocol::RESET_DEVICE
            | protocol::LOG_SHMFD
            | protocol::STATUS
            | protocol::CONFIGURE_MEM_SLOTS;
        if !self.inflight {
            taken &= !protocol::INFLIGHT_SHMFD;
        }
        taken & self.protocol
    }
}

/// A connected front end with its guest.
#[derive(Debug)]
pub struct Client {
    pub options: ClientOptions,
    pub wire: Wire,
    pub memory: Arc<Memory>,
    pub queues: Vec<Queue>,
    /// Virtio features in force.
    pub features: u64,
    /// Protocol features in force.
    pub protocol: u64,
    /// The configuration space at the last handshake.
    pub config: Vec<u8>,
    path: PathBuf,
    /// Of a client that tracks what is in flight.
    pub inflight: Option<Inflight>,
}

impl Client {
    /// Connects, shakes hands and starts all rings.
    pub fn connect(path: &Path, options: ClientOptions) -> Self {
        let memory = Arc::new(Memory::new(options.mem_size, options.regions));
        memory.seal();
        let queues = queues_in(&memory, options.queues, options.queue_size);
        Self::connect_in(path, options, memory, queues)
    }

    /// The same with memory and rings of the caller's, as many as the options say.
    pub fn connect_in(path: &Path, options: ClientOptions, memory: Arc<Memory>, queues: Vec<Queue>) -> Self {
        let wire = Wire::connect(path, options.patience);
        let mut client = Self {
            options,
            wire,
            memory,
            queues,
            features: 0,
            protocol: 0,
            config: Vec::new(),
            path: path.to_path_buf(),
            inflight: None,
        };
        client.negotiate();
        client.start();
        client
    }

    /// A front end on a connection that somebody else has set up, for its requests alone.
    pub fn assembled(wire: Wire, memory: Arc<Memory>, queues: Vec<Queue>, options: ClientOptions) -> Self {
        let config = Vec::new();
        let (path, features, protocol, inflight) = (PathBuf::new(), options.features, options.protocol, None);
        Self { options, wire, memory, queues, features, protocol, config, path, inflight }
    }

    /// Comes back after the server went away: the same memory, rings and in-flight region.
    pub fn reconnect(&mut self) {
        self.wire = Wire::connect(&self.path, self.options.patience);
        let (features, protocol, config) = (self.features, self.protocol, std::mem::take(&mut self.config));
        self.negotiate();
        assert_eq!(self.features, features, "a restarted server offers what it offered");
        assert_eq!(self.protocol, protocol, "a restarted server offers what it offered");
        // Byte 32 is `wce`, which the front end may have changed.
        let same = |from: usize, to: usize| self.config.get(from..to) == config.get(from..to);
        assert!(same(0, 32) && same(33, 60), "a restarted server shows the same configuration");
        self.start();
        self.queues.iter_mut().for_each(Queue::kick);
    }

    /// Everything up to the guest driver's first word, like `vhost_user_blk_connect` in QEMU.
    fn negotiate(&mut self) {
        self.wire.need_reply = false;
        let offered = self.wire.get_u64(Req::GetFeatures);
        assert_ne!(offered & feature::PROTOCOL_FEATURES, 0, "a block server must know CONFIG");
        let offered_protocol = self.wire.get_u64(Req::GetProtocolFeatures);
        self.protocol = offered_protocol & self.options.protocol();
        self.wire.set_u64(Req::SetProtocolFeatures, self.protocol);
        self.wire.need_reply = self.protocol & protocol::REPLY_ACK != 0;
        if self.protocol & protocol::MQ != 0 {
            let queues = self.wire.get_u64(Req::GetQueueNum);
            assert!(queues >= u64::from(self.options.queues), "the server has {queues} queues only");
        }
        if self.protocol & protocol::CONFIGURE_MEM_SLOTS != 0 {
            let slots = self.wire.get_u64(Req::GetMaxMemSlots);
            assert!(slots >= u64::from(self.options.regions), "the server has {slots} memory slots only");
        }
        self.wire.tell(Req::SetOwner, &[], &[]);
        self.features = self.wire.get_u64(Req::GetFeatures) & self.options.features();
        for queue in &self.queues {
            self.wire.set_vring_fd(Req::SetVringCall, queue.index, Some(queue.call.as_raw_fd()));
        }
        self.config = self.wire.get_config(0, 60).expect("the server shows its configuration");
        if let Some(on) = self.options.wce {
            self.wire.set_config(32, &[u8::from(on)]);
        }
    }

    /// The guest driver says DRIVER_OK, like `vhost_user_blk_start` in QEMU.
    fn start(&mut self) {
        self.wire.set_u64(Req::SetFeatures, self.features);
        if self.protocol & protocol::INFLIGHT_SHMFD != 0 {
            let (count, size) = (self.options.queues, self.options.queue_size);
            let wire = &self.wire;
            self.inflight.get_or_insert_with(|| Inflight::get(wire, count, size)).set(wire);
        }
        self.wire.set_u64(Req::SetFeatures, self.features);
        if self.protocol & protocol::CONFIGURE_MEM_SLOTS != 0 {
            self.memory.add_regions(&self.wire);
        } else {
            self.memory.set_table(&self.wire);
        }
        for index in 0..self.queues.len() {
            let queue = &mut self.queues[index];
            queue.event_idx = self.features & feature::EVENT_IDX != 0;
            if self.features & feature::RING_PACKED != 0 && queue.packed.is_none() {
                queue.packed = Some(Packed::new(queue.size));
            }
            let base = queue.base(self.options.restart_base == RestartBase::Available);
            if self.options.notify == Notify::Poll {
                queue.disarm();
            }
            self.set_up_ring(index, base);
        }
        for queue in &self.queues {
            self.wire.set_vring(Req::SetVringEnable, queue.index, 1);
        }
    }

    /// Everything a ring needs but ENABLE.
    pub fn set_up_ring(&self, index: usize, base: u32) {
        set_up_ring(&self.wire, &self.memory, &self.queues[index], base);
    }

    /// Stops a ring; the server has finished what it had taken. Returns where it stood.
    pub fn stop_ring(&self, index: usize) -> u16 {
        self.wire.get_vring_base(self.queues[index].index)
    }

    /// A request with its own tag and layout. False when the ring or its memory is full.
    pub fn submit(&mut self, queue: usize, tag: u64, request: &Request, layout: &Layout) -> bool {
        self.queues[queue].submit(tag, request, layout)
    }

    /// Requests the server has not completed, on all queues.
    pub fn outstanding(&self) -> usize {
        self.queues.iter().map(Queue::outstanding).sum()
    }

    /// Collects completions of all queues; waits for one if there is none yet.
    pub fn wait(&mut self, done: &mut Vec<(usize, Completion)>) {
        let deadline = Instant::now() + self.options.patience;
        let before = done.len();
        loop {
            self.collect(done);
            if done.len() > before {
                return;
            }
            assert!(self.outstanding() > 0, "there is nothing to wait for");
            if Instant::now() >= deadline || self.wire.is_closed() {
                self.give_up();
            }
            match self.options.notify {
                Notify::Poll => std::thread::yield_now(),
                Notify::Call => self.sleep(deadline),
            }
        }
    }

    /// Collects completions of all queues without waiting.
    pub fn collect(&mut self, done: &mut Vec<(usize, Completion)>) {
        let mut found = Vec::new();
        for (index, queue) in self.queues.iter_mut().enumerate() {
            queue.collect(&mut found);
            done.extend(found.drain(..).map(|completion| (index, completion)));
        }
    }

    /// Sleeps until a ring calls, the server hangs up, or the deadline has passed.
    fn sleep(&mut self, deadline: Instant) {
        // Bitwise: every queue is armed, whatever the first ones say.
        if !self.queues.iter().fold(true, |quiet, queue| queue.arm() & quiet) {
            return;
        }
        self.wait_calls(deadline.saturating_duration_since(Instant::now()));
    }

    /// Sleeps until a ring calls, the server hangs up, or `limit` has passed.
    pub fn wait_calls(&mut self, limit: Duration) {
        let mut polls: Vec<_> = self
            .queues
            .iter()
            .map(|queue| libc::pollfd { fd: queue.call_fd(), events: libc::POLLIN, revents: 0 })
            .collect();
        polls.push(libc::pollfd { fd: self.wire.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 });
        // SAFETY: the array is ours and its length is given.
        unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as _, limit.as_millis() as i32 + 1) };
        self.queues.iter_mut().for_each(Queue::take_call);
    }

    fn give_up(&mut self) -> ! {
        let why = if self.wire.is_closed() { "the server hung up" } else { "patience ran out" };
        let mut late = Vec::new();
        self.collect(&mut late);
        if !late.is_empty() {
            panic!("{why}: {} requests had completed, but the call for them never came", late.len());
        }
        let hanging: Vec<_> = self.queues.iter().map(Queue::describe_outstanding).collect();
        panic!("{why} with requests outstanding, per ring: {hanging:?}");
    }

    /// One request, start to end, on a queue with nothing else outstanding.
    pub fn execute_on(&mut self, queue: usize, request: &Request, layout: &Layout) -> Completion {
        assert_eq!(self.outstanding(), 0, "execute is for one request at a time");
        assert!(self.submit(queue, u64::MAX, request, layout), "an empty ring has room");
        self.queues[queue].publish();
        let mut done = Vec::new();
        self.wait(&mut done);
        done.remove(0).1
    }

    /// The same on queue 0 in the plain layout.
    pub fn execute(&mut self, request: &Request) -> Completion {
        self.execute_on(0, request, &Layout::plain(request))
    }

    /// A write and a read back on one queue; other requests may be outstanding.
    pub fn assert_works(&mut self, queue: usize, stamp: u8) {
        const TAG: u64 = u64::MAX - 1;
        let sector = 500 + u64::from(stamp);
        let write = Request::write(sector, vec![stamp; 512]);
        for (request, data) in [(write, vec![]), (Request::read(sector, 512), vec![stamp; 512])] {
            assert!(self.submit(queue, TAG, &request, &Layout::plain(&request)), "the ring has room");
            self.queues[queue].publish();
            let mut done = Vec::new();
            let one = loop {
                self.wait(&mut done);
                if let Some(at) = done.iter().position(|(at, one)| *at == queue && one.tag == TAG) {
                    break done.swap_remove(at).1;
                }
            };
            assert_eq!((one.status, one.data), (OK, data), "queue {queue}");
        }
    }

    /// Size of the disk in sectors.
    pub fn capacity(&self) -> u64 {
        u64::from_le_bytes(self.config[..8].try_into().expect("eight bytes"))
    }
}

/// Queues that share a memory evenly, each with a part of every region.
pub fn queues_in(memory: &Arc<Memory>, count: u16, size: u16) -> Vec<Queue> {
    (0..count)
        .map(|index| {
            let ranges = memory.regions().iter().map(move |region| {
                let share = (region.len / u64::from(count)) & !4095;
                (region.guest + u64::from(index) * share, share)
            });
            Queue::new(memory.clone(), index, size, ranges.collect::<Vec<_>>())
        })
        .collect()
}

/// SET_VRING_NUM, ADDR, BASE, KICK, CALL and ERR of one ring.
pub fn set_up_ring(wire: &Wire, memory: &Memory, queue: &Queue, base: u32) {
    wire.set_vring(Req::SetVringNum, queue.index, u32::from(queue.size));
    wire.set_vring(Req::SetVringBase, queue.index, base);
    wire.tell(Req::SetVringAddr, &ring_addresses(memory, queue, 0), &[]);
    wire.set_vring_fd(Req::SetVringKick, queue.index, Some(queue.kick.as_raw_fd()));
    wire.set_vring_fd(Req::SetVringCall, queue.index, Some(queue.call.as_raw_fd()));
    wire.set_vring_fd(Req::SetVringErr, queue.index, Some(queue.err.as_raw_fd()));
}

/// The body of SET_VRING_ADDR.
pub fn ring_addresses(memory: &Memory, queue: &Queue, log: u64) -> Vec<u8> {
    let mut body = words(&[u32::from(queue.index), 0]);
    let user = |guest| memory.user(guest);
    body.extend(longs(&[user(queue.desc_at), user(queue.used_at), user(queue.avail_at), log]));
    body
}
