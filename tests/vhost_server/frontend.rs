//! A front end made by hand: it can say anything, right or wrong, and waits for nothing for ever.
//!
//! Guest memory is a memfd accessed by pread and pwrite, so the tests need no mapping of their own.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub const PATIENCE: Duration = Duration::from_secs(20);

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const SET_VRING_ERR: u32 = 14;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const GET_QUEUE_NUM: u32 = 17;
pub const SET_VRING_ENABLE: u32 = 18;
pub const SET_BACKEND_REQ_FD: u32 = 21;
pub const GET_CONFIG: u32 = 24;
pub const SET_CONFIG: u32 = 25;
pub const GET_INFLIGHT_FD: u32 = 31;
pub const SET_INFLIGHT_FD: u32 = 32;
pub const RESET_DEVICE: u32 = 34;
pub const GET_MAX_MEM_SLOTS: u32 = 36;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;

pub const NEED_REPLY: u32 = 8;
pub const USER: u64 = 0x7f00_0000_0000;
pub const MEMORY: u64 = 4 << 20;

pub const F_FLUSH: u64 = 1 << 9;
pub const F_EVENT_IDX: u64 = 1 << 29;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

pub fn u64_body(value: u64) -> Vec<u8> {
    value.to_ne_bytes().to_vec()
}

pub fn state_body(index: u32, num: u32) -> Vec<u8> {
    [index.to_ne_bytes(), num.to_ne_bytes()].concat()
}

pub fn region_body(guest: u64, len: u64, user: u64, offset: u64) -> Vec<u8> {
    [guest, len, user, offset].iter().flat_map(|field| field.to_ne_bytes()).collect()
}

pub fn single_region_body(guest: u64, len: u64, user: u64, offset: u64) -> Vec<u8> {
    [vec![0; 8], region_body(guest, len, user, offset)].concat()
}

pub fn table_body(regions: &[(u64, u64, u64, u64)]) -> Vec<u8> {
    let mut body = [(regions.len() as u32).to_ne_bytes(), [0; 4]].concat();
    for &(guest, len, user, offset) in regions {
        body.extend(region_body(guest, len, user, offset));
    }
    body
}

pub fn config_body(offset: u32, size: u32, payload: &[u8]) -> Vec<u8> {
    [&offset.to_ne_bytes()[..], &size.to_ne_bytes(), &[0; 4], payload].concat()
}

/// A memory file as a VMM makes one.
pub fn memory_file(len: u64) -> File {
    let file = tempfile::tempfile_in("/dev/shm").expect("/dev/shm");
    file.set_len(len).unwrap();
    file
}

pub struct Frontend {
    pub stream: UnixStream,
    pub memory: File,
    pub features: u64,
    /// Whether acknowledgements were negotiated.
    pub acks: bool,
}

impl Frontend {
    pub fn connect(path: &Path) -> Self {
        Self::with_memory(path, memory_file(MEMORY))
    }

    pub fn with_memory(path: &Path, memory: File) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream, memory, features: 0, acks: true }
    }

    pub fn send(&self, code: u32, flags: u32, body: &[u8], fds: &[RawFd]) -> bool {
        let mut bytes = Vec::new();
        for field in [code, flags, body.len() as u32] {
            bytes.extend_from_slice(&field.to_ne_bytes());
        }
        bytes.extend_from_slice(body);
        self.stream.send_with_fds(&[&bytes[..]], fds).is_ok_and(|sent| sent == bytes.len())
    }

    /// The next answer, or `None` when the connection was closed.
    pub fn receive(&self) -> Option<(u32, Vec<u8>, Option<File>)> {
        let mut header = [0; 12];
        let fd = self.receive_exactly(&mut header)?;
        let field = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(field(4), 1 | 4, "version 1, and an answer");
        let mut body = vec![0; field(8) as usize];
        self.receive_exactly(&mut body)?;
        Some((field(0), body, fd))
    }

    fn receive_exactly(&self, buf: &mut [u8]) -> Option<Option<File>> {
        let mut fd = None;
        let mut filled = 0;
        while filled < buf.len() {
            match self.stream.recv_with_fd(&mut buf[filled..]) {
                Ok((0, _)) => return None,
                Ok((count, file)) => {
                    filled += count;
                    fd = fd.or(file);
                }
                Err(error) if error.errno() == libc::ECONNRESET => return None,
                Err(error) => panic!("waiting for an answer: {error}"),
            }
        }
        Some(fd)
    }

    /// A request that has an answer of its own.
    pub fn ask(&self, code: u32, body: &[u8]) -> Vec<u8> {
        self.ask_fd(code, body).0
    }

    pub fn ask_fd(&self, code: u32, body: &[u8]) -> (Vec<u8>, Option<File>) {
        assert!(self.send(code, 1, body, &[]));
        let (answered, body, fd) = self.receive().expect("an answer, not the end of the connection");
        assert_eq!(answered, code);
        (body, fd)
    }

    pub fn ask_u64(&self, code: u32) -> u64 {
        u64::from_ne_bytes(self.ask(code, &[]).try_into().unwrap())
    }

    /// A request whose acknowledgement is asked for: `Some(0)` when obeyed, `None` when the
    /// connection ended.
    pub fn tell(&self, code: u32, body: &[u8], fds: &[RawFd]) -> Option<u64> {
        if !self.send(code, 1 | NEED_REPLY, body, fds) {
            return None;
        }
        let (answered, body, _) = self.receive()?;
        assert_eq!(answered, code);
        Some(u64::from_ne_bytes(body.try_into().unwrap()))
    }

    /// A request that must be obeyed, as far as the server says whether it was.
    pub fn must(&self, code: u32, body: &[u8], fds: &[RawFd]) {
        if !self.acks {
            assert!(self.send(code, 1, body, fds), "message {code}");
            return;
        }
        assert_eq!(self.tell(code, body, fds), Some(0), "message {code}");
    }

    /// Whether the server has closed the connection.
    pub fn is_closed(&self) -> bool {
        self.receive().is_none()
    }

    /// Everything up to the rings, as QEMU does it; of the features offered, those in `mask`.
    pub fn negotiate(&mut self, mask: u64) {
        self.negotiate_with(mask, u64::MAX);
    }

    /// The same with those protocol features only that are in `protocol` as well.
    pub fn negotiate_with(&mut self, mask: u64, protocol: u64) {
        let offered = self.ask_u64(GET_FEATURES);
        let protocol = self.ask_u64(GET_PROTOCOL_FEATURES) & protocol;
        assert!(self.send(SET_PROTOCOL_FEATURES, 1, &u64_body(protocol), &[]));
        self.acks = protocol & 1 << 3 != 0;
        assert!(self.ask_u64(GET_QUEUE_NUM) >= 1);
        self.must(SET_OWNER, &[], &[]);
        // Its rings are split, and it keeps no dirty log.
        self.features = offered & mask & !(1 << 34 | 1 << 26);
        self.must(SET_FEATURES, &u64_body(self.features), &[]);
        self.must(SET_FEATURES, &u64_body(self.features), &[]);
    }

    /// Sectors of the disk, as the configuration says now.
    pub fn capacity(&self) -> u64 {
        let body = self.ask(GET_CONFIG, &config_body(0, 8, &[0; 8]));
        u64::from_ne_bytes(body[12..20].try_into().unwrap())
    }

    pub fn share_memory(&self) {
        let fd = self.memory.as_raw_fd();
        self.must(SET_MEM_TABLE, &table_body(&[(0, MEMORY, USER, 0)]), &[fd]);
    }

    pub fn vring_base(&self, index: u16) -> u32 {
        let body = self.ask(GET_VRING_BASE, &state_body(u32::from(index), 0));
        assert_eq!(body[0..4], u32::from(index).to_ne_bytes());
        u32::from_ne_bytes(body[4..8].try_into().unwrap())
    }

    /// Sets up ring `index` of `size` and enables it.
    pub fn start_ring(&self, index: u16, size: u16) -> Ring {
        let ring = Ring::new(self, index, size);
        ring.set_up(self, 0);
        self.must(SET_VRING_ENABLE, &state_body(u32::from(index), 1), &[]);
        ring
    }

    /// In-flight area for `queues` rings of `size`: the message that hands it back, and the file.
    pub fn get_inflight(&self, queues: u16, size: u16) -> (Vec<u8>, File) {
        let mut body = vec![0; 24];
        body[16..18].copy_from_slice(&queues.to_ne_bytes());
        body[18..20].copy_from_slice(&size.to_ne_bytes());
        let (body, file) = self.ask_fd(GET_INFLIGHT_FD, &body);
        (body, file.expect("a descriptor with the area"))
    }
}

/// The driver's side of a ring. Each ring has 512 KiB of the guest's memory: tables below, a page
/// of header and status per slot and data above.
pub struct Ring {
    pub index: u16,
    pub size: u16,
    pub kick: EventFd,
    pub call: EventFd,
    pub err: EventFd,
    pub available: u16,
    pub seen: u16,
    memory: File,
    event_idx: bool,
}

/// How a request ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    pub status: u8,
    pub written: u32,
    pub data: Vec<u8>,
}

impl Ring {
    pub fn new(frontend: &Frontend, index: u16, size: u16) -> Self {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            index,
            size,
            kick: event(),
            call: event(),
            err: event(),
            available: 0,
            seen: 0,
            memory: frontend.memory.try_clone().unwrap(),
            event_idx: frontend.features & F_EVENT_IDX != 0,
        }
    }

    pub fn base(&self) -> u64 {
        u64::from(self.index) * 0x8_0000
    }

    pub fn address_body(&self) -> Vec<u8> {
        let mut body = state_body(u32::from(self.index), 0);
        // Descriptors, used, available, log (which nobody reads: UML sends -1).
        for at in [self.base(), self.base() + 0x6000, self.base() + 0x5000] {
            body.extend((USER + at).to_ne_bytes());
        }
        body.extend(u64::MAX.to_ne_bytes());
        body
    }

    /// Everything but the enable.
    pub fn set_up(&self, frontend: &Frontend, base: u16) {
        let index = u32::from(self.index);
        frontend.must(SET_VRING_NUM, &state_body(index, u32::from(self.size)), &[]);
        frontend.must(SET_VRING_BASE, &state_body(index, u32::from(base)), &[]);
        frontend.must(SET_VRING_ADDR, &self.address_body(), &[]);
        frontend.must(SET_VRING_KICK, &u64_body(u64::from(self.index)), &[self.kick.as_raw_fd()]);
        frontend.must(SET_VRING_CALL, &u64_body(u64::from(self.index)), &[self.call.as_raw_fd()]);
        frontend.must(SET_VRING_ERR, &u64_body(u64::from(self.index)), &[self.err.as_raw_fd()]);
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).unwrap();
    }

    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn get_u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.get(at, 2).try_into().unwrap())
    }

    pub fn describe(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&next.to_le_bytes());
        self.put(self.base() + u64::from(index) * 16, &bytes);
    }

    /// Where slot `slot`'s header, status and data are.
    pub fn slot_at(&self, slot: u16) -> u64 {
        self.base() + 0x1_0000 + u64::from(slot) * 0x2000
    }

    /// Builds a request with head `3 * slot`: header, data, status.
    pub fn build(&self, slot: u16, kind: u32, sector: u64, data: &[u8], room: u32) -> u16 {
        let at = self.slot_at(slot);
        let mut header = [0; 16];
        header[0..4].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&sector.to_le_bytes());
        self.put(at, &header);
        self.put(at + 32, &[0xee]);
        let head = slot * 3;
        let len = if room > 0 { room } else { data.len() as u32 };
        if len == 0 {
            self.describe(head, at, 16, NEXT, head + 2);
        } else {
            self.describe(head, at, 16, NEXT, head + 1);
            self.put(at + 0x1000, data);
            let flags = if room > 0 { NEXT | WRITE } else { NEXT };
            self.describe(head + 1, at + 0x1000, len, flags, head + 2);
        }
        self.describe(head + 2, at + 32, 1, WRITE, 0);
        head
    }

    pub fn set_available_index(&self, index: u16) {
        self.put(self.base() + 0x5002, &index.to_le_bytes());
    }

    /// Makes `head` available without kicking.
    pub fn offer(&mut self, head: u16) {
        let at = self.base() + 0x5004 + u64::from(self.available % self.size) * 2;
        self.put(at, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.set_available_index(self.available);
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Whether the device has asked for a kick for the last head offered.
    pub fn wants_kick(&self) -> bool {
        if !self.event_idx {
            return self.get_u16(self.base() + 0x6000) & 1 == 0;
        }
        let event = self.get_u16(self.base() + 0x6004 + u64::from(self.size) * 8);
        event == self.available.wrapping_sub(1)
    }

    /// Whether the device has asked for a kick for the next head to be offered.
    pub fn is_asleep(&self) -> bool {
        if !self.event_idx {
            return self.get_u16(self.base() + 0x6000) & 1 == 0;
        }
        self.get_u16(self.base() + 0x6004 + u64::from(self.size) * 8) == self.available
    }

    pub fn set_used_event(&self, event: u16) {
        self.put(self.base() + 0x5004 + u64::from(self.size) * 2, &event.to_le_bytes());
    }

    pub fn used_index(&self) -> u16 {
        self.get_u16(self.base() + 0x6002)
    }

    /// Head and length of the used element at `position`.
    pub fn used(&self, position: u16) -> (u32, u32) {
        let at = self.base() + 0x6004 + u64::from(position % self.size) * 8;
        let bytes = self.get(at, 8);
        let field = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        (field(0), field(4))
    }

    /// Waits for the next used element.
    pub fn wait(&mut self) -> (u32, u32) {
        super::eventually("a used element", || self.used_index() != self.seen);
        let element = self.used(self.seen);
        self.seen = self.seen.wrapping_add(1);
        element
    }

    /// One request in slot 0, from beginning to end.
    pub fn run(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> Outcome {
        let head = self.build(0, kind, sector, data, room);
        self.offer(head);
        self.kick();
        let (used, written) = self.wait();
        assert_eq!(used, u32::from(head));
        let at = self.slot_at(0);
        Outcome { status: self.get(at + 32, 1)[0], written, data: self.get(at + 0x1000, room as usize) }
    }
}

/// Waits for `event`, at most the test's patience.
pub fn wait_event(event: &EventFd) -> u64 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Ok(count) = event.read() {
            return count;
        }
        assert!(Instant::now() < deadline, "waited for a notification");
        std::thread::sleep(Duration::from_micros(50));
    }
}
