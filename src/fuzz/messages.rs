//! A front end's messages with descriptors, through a socket to the real session.
//!
//! The input is a script: messages that are right, nearly right or noise, descriptors of every kind,
//! and between them what a guest and its VMM may do at any moment: fill a ring and kick it, scribble
//! over memory, make the file behind a region shorter, replace everything.
//!
//! Claims: the session ends when the front end has gone, nobody panics, on no thread, and afterwards
//! descriptors, mappings of memory files and threads of queues are as many as before.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::Input;
use crate::vhost::{Options, Server};
use crate::volume::{Buffer, Disk, DiskConfig, DiskQueue, Done, Request, RequestKind, Status};
use crate::wake::Waker;

/// Steps of a script.
const STEPS_MAX: u32 = 64;
/// Guest memory: two regions in one file.
const REGION: u64 = 0x8000;
const USER: u64 = 0x7000_0000_0000;
/// How long a session may take to end when its front end has gone.
const PATIENCE: Duration = Duration::from_secs(20);
/// Most bytes of answers a front end lets pile up before it reads them.
const ANSWERS: usize = 4096;

const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;

// Requests of the front end (vhost-user spec).
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const RESET_DEVICE: u32 = 34;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;

/// A disk that does everything at once and keeps nothing.
struct Nothing;

impl Disk for Nothing {
    type Queue<B: Buffer> = NothingQueue<B>;

    fn config(&self) -> DiskConfig {
        DiskConfig {
            sectors: 2048,
            block_size: 512,
            physical_block_size: 4096,
            optimal_io_size: 0,
            read_only: false,
            serial: *b"a serial of 20 bytes",
            queues: 3,
            queue_size: 64,
        }
    }

    fn write_cache(&self) -> bool {
        true
    }

    fn set_write_cache(&self, _on: bool) {}

    fn open_queue<B: Buffer>(&self, _index: u16, _waker: Waker) -> io::Result<NothingQueue<B>> {
        Ok(NothingQueue(Vec::new()))
    }
}

struct NothingQueue<B>(Vec<Request<B>>);

impl<B: Buffer> DiskQueue<B> for NothingQueue<B> {
    fn submit(&mut self, request: Request<B>) {
        self.0.push(request);
    }

    fn commit(&mut self) {}

    fn poll(&mut self, done: &mut Vec<Done<B>>) {
        for mut request in self.0.drain(..) {
            let (len, mut bytes) = (request.data.len(), [0x3c; 512]);
            let width = len.min(512);
            let moved = [0, len - width].iter().all(|&at| match request.kind {
                RequestKind::Read => request.data.copy_in(at, &bytes[..width]).is_ok(),
                _ => request.data.copy_out(at, &mut bytes[..width]).is_ok(),
            });
            let status = if moved { Status::Ok } else { Status::IoError };
            done.push(Done { tag: request.tag, status, data: request.data });
        }
    }

    fn pending(&self) -> usize {
        self.0.len()
    }

    fn park(&mut self) {}

    fn leave_behind(self) {}
}

/// What front ends share, made once: only what is sent is duplicated.
struct Props {
    /// Guest memory that cannot become shorter.
    sealed: File,
    pipe: io::PipeReader,
    pipe_end: io::PipeWriter,
    event: EventFd,
    directory: File,
    zero: File,
    /// What there was before the first session.
    baseline: Option<(usize, usize)>,
}

#[expect(unsafe_code, reason = "no safe wrapper of memfd_create")]
fn memory_file(len: u64) -> File {
    // SAFETY: the name is a NUL-terminated constant, and the result is checked before it is used.
    let fd = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    assert!(fd >= 0, "memfd_create: {}", io::Error::last_os_error());
    // SAFETY: the kernel has just made this descriptor for us.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(len).expect("a new memory file can grow");
    file
}

#[expect(unsafe_code, reason = "no safe wrapper of fcntl")]
fn seal(file: &File, seals: i32) {
    // SAFETY: F_ADD_SEALS takes an int and touches no memory.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
}

impl Props {
    fn new() -> Self {
        let sealed = memory_file(2 * REGION);
        seal(&sealed, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL);
        let (pipe, pipe_end) = io::pipe().expect("a pipe");
        Self {
            sealed,
            pipe,
            pipe_end,
            event: EventFd::new(EFD_NONBLOCK).expect("an eventfd"),
            directory: File::open("/").expect("a root directory"),
            zero: File::open("/dev/zero").expect("a source of zeros"),
            baseline: None,
        }
    }
}

thread_local! {
    static PROPS: RefCell<Props> = RefCell::new(Props::new());
}

/// The target.
pub fn messages(bytes: &[u8]) {
    PROPS.with_borrow_mut(|props| {
        if props.baseline.is_none() {
            // What the first session leaves for good is not the later ones' fault.
            run(&FIRST, props);
            props.baseline = Some(census());
        }
        let baseline = props.baseline.expect("just taken");
        run(bytes, props);
        // A descriptor on its way through a socket that was closed is closed with it, a little later.
        let deadline = Instant::now() + PATIENCE;
        while census() != baseline {
            let now = census();
            assert!(
                Instant::now() < deadline,
                "descriptors and mappings: {baseline:?} before, {now:?} after"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    });
}

/// A script that starts a ring.
const FIRST: [u8; 10] = [0, 9, 0, 4, 14, 0, 0, 5, 8, 0];

/// Open descriptors, and mappings of memory files.
fn census() -> (usize, usize) {
    let descriptors = std::fs::read_dir("/proc/self/fd").expect("a process has descriptors").count();
    let mut maps = String::new();
    File::open("/proc/self/maps").and_then(|mut file| file.read_to_string(&mut maps)).expect("a map");
    (descriptors, maps.matches("/memfd:").count())
}

fn run(bytes: &[u8], props: &Props) {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let options = Options { guest_memory_max: 1 << 30, ..Options::default() };
    let server = Server::new(theirs, Arc::new(Nothing), options).expect("a server");
    let stopper = server.stopper();
    let (ended, end) = mpsc::channel();
    let thread = std::thread::Builder::new()
        .name(String::from("session"))
        .spawn(move || {
            let result = server.run();
            // Whoever waits has given up, or is told.
            _ = ended.send(());
            result
        })
        .expect("a thread");
    // Its own memory file, because it may become shorter.
    let mut front = Front { stream: ours, props, open: memory_file(2 * REGION), pending: 0, available: 0 };
    front.stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let mut input = Input::new(bytes);
    front.prologue(&mut input);
    for _ in 0..STEPS_MAX {
        if input.is_over() || !front.step(&mut input) {
            break;
        }
    }
    drop(front);
    if end.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
        stopper.stop();
        panic!("the session does not end although its front end has gone");
    }
    thread.join().expect("a session does not panic").expect("one connection has nothing to fail");
}

struct Front<'a> {
    stream: UnixStream,
    props: &'a Props,
    open: File,
    /// Bytes of answers that may wait.
    pending: usize,
    available: u16,
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

impl Front<'_> {
    /// What every front end begins with, unless the script says otherwise.
    fn prologue(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        if choice & 1 != 0 {
            return;
        }
        self.send(SET_OWNER, VERSION, &[], &[]);
        self.send(GET_FEATURES, VERSION, &[], &[]);
        self.send(GET_PROTOCOL_FEATURES, VERSION, &[], &[]);
        self.send(SET_PROTOCOL_FEATURES, VERSION, &longs(&[0xb209]), &[]);
        let features = 1 << 32 | 1 << 30 | 1 << 9 | u64::from(choice >> 1 & 1) << 28;
        self.send(SET_FEATURES, VERSION, &longs(&[features]), &[]);
        if choice & 4 == 0 {
            let memory = if choice & 8 == 0 { &self.props.sealed } else { &self.open };
            let body = [words(&[2, 0]), region(0, 0), region(1, 0)].concat();
            let fd = memory.as_raw_fd();
            self.send(SET_MEM_TABLE, VERSION, &body, &[fd, fd]);
        }
    }

    /// One message or deed: whether the connection is still there.
    fn step(&mut self, input: &mut Input<'_>) -> bool {
        match input.byte() % 16 {
            0..9 => self.message(input),
            9 | 10 => {
                let index = u32::from(input.byte() % 3);
                let size = 1 << (input.byte() % 7);
                self.ring(index, size)
            }
            11 => {
                let (at, len) = (u64::from(input.half()), input.below(64));
                // Past a file's new end there is nothing to be scribbled over.
                let end = self.open.metadata().map_or(0, |metadata| metadata.len());
                if at + 64 <= end {
                    drop(self.open.write_at(input.slice(len), at));
                }
                true
            }
            12 => {
                drop(self.open.set_len(u64::from(input.half())));
                true
            }
            13 => {
                seal(&self.open, i32::from(input.byte() & 0x1f));
                true
            }
            14 => self.offer(input),
            _ => {
                // Anything at all, with any number of descriptors.
                let count = input.below(40);
                let fds: Vec<RawFd> = (0..input.below(40)).map(|at| self.fd(at as u8)).collect();
                self.raw(input.slice(count), &fds)
            }
        }
    }

    /// A descriptor of some kind.
    fn fd(&self, kind: u8) -> RawFd {
        match kind % 10 {
            0..3 => self.props.sealed.as_raw_fd(),
            3 => self.open.as_raw_fd(),
            4 | 5 => self.props.event.as_raw_fd(),
            6 if kind & 64 != 0 => self.props.pipe_end.as_raw_fd(),
            6 => self.props.pipe.as_raw_fd(),
            7 => self.props.directory.as_raw_fd(),
            8 => self.props.zero.as_raw_fd(),
            _ => self.stream.as_raw_fd(),
        }
    }

    /// Everything a ring needs, right.
    fn ring(&mut self, index: u32, size: u32) -> bool {
        let event = self.props.event.as_raw_fd();
        self.send(SET_VRING_NUM, VERSION, &words(&[index, size]), &[])
            && self.send(SET_VRING_BASE, VERSION, &words(&[index, 0]), &[])
            && self.send(SET_VRING_ADDR, VERSION, &addresses(index), &[])
            && self.send(SET_VRING_CALL, VERSION, &longs(&[index.into()]), &[event])
            && self.send(SET_VRING_KICK, VERSION, &longs(&[index.into()]), &[event])
            && self.send(SET_VRING_ENABLE, VERSION, &words(&[index, 1]), &[])
    }

    /// A request on ring 0, in whatever is mapped, and a kick.
    fn offer(&mut self, input: &mut Input<'_>) -> bool {
        let memory = if input.byte() & 1 == 0 { &self.props.sealed } else { &self.open };
        if memory.metadata().map_or(0, |metadata| metadata.len()) < 2 * REGION {
            return true;
        }
        let put = |at: u64, bytes: &[u8]| drop(memory.write_at(bytes, at));
        let mut header = [0; 16];
        header[0] = input.byte() % 14;
        header[8] = input.byte();
        put(0x1000, &header);
        let len = u32::from(input.byte()) * 64;
        let data = u64::from(input.half());
        let parts =
            [(0x1000, 16, 1u16, 1u16), (data, len, 1 | u16::from(header[0] != 1) << 1, 2), (0x1fff, 1, 2, 0)];
        for (slot, (addr, len, flags, next)) in parts.into_iter().enumerate() {
            let mut bytes = longs(&[addr]);
            bytes.extend(words(&[len]));
            bytes.extend(flags.to_ne_bytes());
            bytes.extend(next.to_ne_bytes());
            put(slot as u64 * 16, &bytes);
        }
        self.available = self.available.wrapping_add(1);
        put(0x404, &[0; 128]);
        put(0x402, &self.available.to_ne_bytes());
        drop(self.props.event.write(1));
        true
    }

    /// A message that is often right.
    fn message(&mut self, input: &mut Input<'_>) -> bool {
        let (code, how) = (u32::from(input.byte() % 44), input.byte());
        let index = u32::from(input.byte() % 4);
        let which = u64::from(index & 1);
        let (mut body, mut fds) = match code {
            SET_FEATURES => (longs(&[input.edge() & 0x1_7000_7644]), vec![]),
            SET_PROTOCOL_FEATURES => (longs(&[input.edge() & 0xb209]), vec![]),
            SET_MEM_TABLE => {
                let count = input.below(10) as u32;
                let regions = (0..u64::from(count)).flat_map(|at| region(at, 0)).collect();
                let fds = (0..count).map(|at| self.fd(at as u8 & how)).collect();
                ([words(&[count, 0]), regions].concat(), fds)
            }
            SET_VRING_NUM => (words(&[index, 1 << (input.byte() % 12)]), vec![]),
            SET_VRING_ADDR => (addresses(index), vec![]),
            SET_VRING_BASE | GET_VRING_BASE => (words(&[index, input.half().into()]), vec![]),
            SET_VRING_ENABLE => (words(&[index, u32::from(input.byte() % 3)]), vec![]),
            SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => {
                let none = u64::from(input.byte() & 1) << 8;
                let fds = if none == 0 { vec![self.fd(input.byte())] } else { vec![] };
                (longs(&[u64::from(index) | none]), fds)
            }
            GET_CONFIG => {
                let len = u32::from(input.byte());
                ([words(&[input.byte().into(), len, 0]), vec![0; len as usize]].concat(), vec![])
            }
            SET_CONFIG => ([words(&[32, 1, 0]), vec![input.byte()]].concat(), vec![]),
            GET_INFLIGHT_FD | SET_INFLIGHT_FD => {
                let mut body = longs(&[input.edge(), input.edge() & 0xfc0]);
                body.extend(u16::from(input.byte() % 5).to_ne_bytes());
                body.extend([0u16, 1, 64, 128, 1024][input.below(5)].to_ne_bytes());
                body.resize(24, 0);
                if how & 1 == 0 {
                    body[..16].copy_from_slice(&longs(&[2 * REGION, 0]));
                    body[18..20].copy_from_slice(&64u16.to_ne_bytes());
                }
                let fds = if code == SET_INFLIGHT_FD { vec![self.fd(input.byte())] } else { vec![] };
                (body, fds)
            }
            ADD_MEM_REG => {
                ([longs(&[0]), region(which, u64::from(input.half()))].concat(), vec![self.fd(how)])
            }
            REM_MEM_REG => ([longs(&[0]), region(which, 0)].concat(), vec![]),
            RESET_DEVICE => (vec![], vec![]),
            _ => (longs(&[input.edge()]), vec![]),
        };
        match how >> 4 {
            0 if !body.is_empty() => {
                let at = usize::from(input.byte()) % body.len();
                let edge = input.edge().to_ne_bytes();
                let end = (at + 8).min(body.len());
                body[at..end].copy_from_slice(&edge[..end - at]);
            }
            1 => body.resize(usize::from(input.byte()) * 20, 0x55),
            2 => fds = (0..input.below(34)).map(|at| self.fd(at as u8)).collect(),
            3 => {
                let flags = input.word();
                return self.send(code, flags, &body, &fds);
            }
            _ => {}
        }
        let ack = if how & 8 == 0 { NEED_REPLY } else { 0 };
        self.send(code, VERSION | ack, &body, &fds)
    }

    fn send(&mut self, code: u32, flags: u32, body: &[u8], fds: &[RawFd]) -> bool {
        let mut bytes = words(&[code, flags, body.len() as u32]);
        bytes.extend_from_slice(body);
        self.raw(&bytes, fds)
    }

    fn raw(&mut self, bytes: &[u8], fds: &[RawFd]) -> bool {
        // The largest answer, of a configuration read, has 280 bytes.
        self.pending += 300;
        if self.pending > ANSWERS {
            self.read_answers();
        }
        if bytes.is_empty() {
            return true;
        }
        match self.stream.send_with_fds(&[bytes], fds) {
            Ok(sent) => sent == bytes.len(),
            // It has hung up.
            Err(_) => false,
        }
    }

    /// Throws away what has been answered so far.
    fn read_answers(&mut self) {
        self.pending = 0;
        let mut bytes = [0; 4096];
        self.stream.set_nonblocking(true).expect("a socket");
        while let Ok((1.., _)) = receive(&self.stream, &mut bytes) {}
        self.stream.set_nonblocking(false).expect("a socket");
    }
}

/// Reads bytes; descriptors that come along are closed.
#[expect(unsafe_code, reason = "descriptors arrive as bare numbers")]
fn receive(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, usize)> {
    let mut numbers: [RawFd; 32] = [-1; 32];
    let mut iov = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
    // SAFETY: the one vector describes `bytes`, which is ours alone for the call.
    let (len, count) = unsafe { stream.recv_with_fds(&mut iov, &mut numbers) }
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    for &number in &numbers[..count] {
        // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
    }
    Ok((len, count))
}

/// Region `which`, 0 or 1 for those that exist, `extra` bytes longer than they are.
fn region(which: u64, extra: u64) -> Vec<u8> {
    let at = which * REGION;
    longs(&[at, REGION + extra, USER + at, at % (2 * REGION)])
}

/// Where the parts of a ring are: each ring in a page of its own.
fn addresses(index: u32) -> Vec<u8> {
    let at = USER + u64::from(index) * 0x2000;
    [words(&[index, 0]), longs(&[at, at + 0x800, at + 0x400, 0])].concat()
}
