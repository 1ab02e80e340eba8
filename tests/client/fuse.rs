//! A disk that fails on command: one regular file on a FUSE file system that this process serves.
//!
//! The daemon under test opens it like any image. What the kernel hands us is answered well, with an
//! error, or not at all until the test says so: then the daemon sees a hung disk, and what it had
//! under way lands late, also after the daemon was killed.
//!
//! It models a disk with a volatile write cache, more cruel than most:
//! - what is written is visible at once, and *durable* only when a later `fdatasync` succeeds;
//! - a failed `fdatasync` drops everything written since the last good one from what can ever become
//!   durable, while reads still show it. Linux does this with a page it could not write back: the
//!   page turns clean and the error is reported once. Only who writes it again has it again;
//! - [`FuseDisk::power_cut`] makes what is durable visible.
//!
//! [`FuseDisk::throttle`] makes it a slow one: what it does is done at once, and told later.
//!
//! Invariants: a held request is answered exactly once, by [`FuseDisk::release`] or by the end of
//! the file system; dropping the disk unmounts it, so nobody stays stuck on it.
//!
//! The protocol is that of `<linux/fuse.h>`, version 7.31; structures are built from their words.

#![expect(unsafe_code, reason = "mounts a file system")]

use std::collections::{BTreeSet, VecDeque};
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Largest transfer in one request.
const TRANSFER_MAX: u32 = 1 << 20;
const SECTOR: usize = 512;
const ROOT: u64 = 1;
const DISK: u64 = 2;
const NAME: &str = "disk.img";

mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const ACCESS: u32 = 34;
    pub const INTERRUPT: u32 = 36;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
}

/// What goes wrong from now on; each an error number.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub reads: Option<i32>,
    pub writes: Option<i32>,
    pub syncs: Option<i32>,
    /// Nothing is answered.
    pub hang: bool,
}

impl Faults {
    /// Every operation fails with this.
    pub fn all(errno: i32) -> Self {
        Self { reads: Some(errno), writes: Some(errno), syncs: Some(errno), hang: false }
    }

    /// Nothing is answered until [`FuseDisk::release`].
    pub fn hang() -> Self {
        Self { hang: true, ..Self::default() }
    }
}

/// How long a disk takes: each transfer the latency, side by side, and all of them the bandwidth.
#[derive(Clone, Copy, Debug)]
pub struct Throttle {
    pub latency: Duration,
    pub bytes_per_s: u64,
}

/// Answers that wait for their time, which only grows.
#[derive(Default)]
struct Delayed {
    answers: VecDeque<(Instant, Vec<u8>)>,
    /// When what was taken so far is through.
    busy_until: Option<Instant>,
    is_ended: bool,
}

/// What has been answered, well or not.
#[derive(Clone, Copy, Debug, Default)]
pub struct Answered {
    pub reads: u64,
    pub writes: u64,
    pub syncs: u64,
    pub failed: u64,
}

struct Request {
    opcode: u32,
    unique: u64,
    node: u64,
    body: Vec<u8>,
}

struct State {
    visible: Vec<u8>,
    durable: Vec<u8>,
    /// Sectors written since the last `fdatasync`, good or failed.
    fresh: BTreeSet<usize>,
    faults: Faults,
    held: Vec<Request>,
    answered: Answered,
    throttle: Option<Throttle>,
}

struct Shared {
    device: File,
    state: Mutex<State>,
    delayed: Mutex<Delayed>,
    /// Something is delayed, or all has ended.
    news: Condvar,
}

/// See the file's head.
pub struct FuseDisk {
    dir: PathBuf,
    shared: Arc<Shared>,
    server: Option<JoinHandle<()>>,
}

impl FuseDisk {
    /// Mounts a disk of `len` zeros on the new directory `dir`.
    ///
    /// # Errors
    /// Not root, or the kernel has no FUSE.
    pub fn mount(dir: &Path, len: usize) -> io::Result<Self> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
        fs::create_dir(dir)?;
        let target = CString::new(dir.to_str().expect("text")).expect("no NUL");
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let options = CString::new(options).expect("no NUL");
        // SAFETY: five pointers to C strings that outlive the call.
        let code = unsafe {
            libc::mount(
                c"pcache-test".as_ptr(),
                target.as_ptr(),
                c"fuse".as_ptr(),
                libc::MS_NOSUID | libc::MS_NODEV,
                options.as_ptr().cast(),
            )
        };
        if code != 0 {
            return Err(io::Error::last_os_error());
        }
        let state = State {
            visible: vec![0; len],
            durable: vec![0; len],
            fresh: BTreeSet::new(),
            faults: Faults::default(),
            held: Vec::new(),
            answered: Answered::default(),
            throttle: None,
        };
        let shared = Arc::new(Shared {
            device,
            state: Mutex::new(state),
            delayed: Mutex::default(),
            news: Condvar::new(),
        });
        let server = std::thread::spawn({
            let shared = shared.clone();
            move || shared.serve()
        });
        Ok(Self { dir: dir.to_path_buf(), shared, server: Some(server) })
    }

    /// The file.
    pub fn path(&self) -> PathBuf {
        self.dir.join(NAME)
    }

    /// What goes wrong from now on. What is held stays held.
    pub fn set(&self, faults: Faults) {
        self.shared.state().faults = faults;
    }

    /// Makes reads, writes and `fdatasync`s take their time from now on.
    pub fn throttle(&self, throttle: Throttle) {
        let is_first = self.shared.state().throttle.replace(throttle).is_none();
        if is_first {
            let shared = self.shared.clone();
            std::thread::spawn(move || shared.send_delayed());
        }
    }

    /// Answers what is held, in the order in which it came, under the faults of this moment.
    pub fn release(&self) {
        let mut state = self.shared.state();
        state.faults.hang = false;
        for request in std::mem::take(&mut state.held) {
            self.shared.answer(&mut state, &request);
        }
    }

    /// Requests held: reads and writes, and all.
    pub fn held(&self) -> (usize, usize, usize) {
        let state = self.shared.state();
        let count = |opcode| state.held.iter().filter(|r| r.opcode == opcode).count();
        (count(opcode::READ), count(opcode::WRITE), state.held.len())
    }

    pub fn answered(&self) -> Answered {
        self.shared.state().answered
    }

    /// Only what is durable is left.
    pub fn power_cut(&self) {
        let mut state = self.shared.state();
        let State { visible, durable, fresh, .. } = &mut *state;
        visible.copy_from_slice(durable);
        fresh.clear();
    }

    /// What a power cut now would leave.
    pub fn durable(&self) -> Vec<u8> {
        self.shared.state().durable.clone()
    }
}

impl Drop for FuseDisk {
    fn drop(&mut self) {
        self.release();
        self.shared.delayed().is_ended = true;
        self.shared.news.notify_all();
        let target = CString::new(self.dir.to_str().expect("text")).expect("no NUL");
        // SAFETY: a C string that outlives the call.
        let code = unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        if code != 0 {
            eprintln!("{} stays mounted: {}", self.dir.display(), io::Error::last_os_error());
            return;
        }
        // Ends when the last user has closed the file; one that is stuck must not keep the test.
        let server = self.server.take().expect("ended once");
        for _ in 0..200 {
            if server.is_finished() {
                drop(server.join());
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        eprintln!("{} is still in use", self.dir.display());
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut buffer = vec![0; TRANSFER_MAX as usize + 4096];
        loop {
            let len = match (&self.device).read(&mut buffer) {
                Ok(len) => len,
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::ENOENT)) => {
                    continue;
                }
                // ENODEV: unmounted.
                Err(_) => return,
            };
            let bytes = &buffer[..len];
            let request = Request {
                opcode: u32_at(bytes, 4),
                unique: u64_at(bytes, 8),
                node: u64_at(bytes, 16),
                body: bytes[40..].to_vec(),
            };
            let mut state = self.state();
            let is_io =
                matches!(request.opcode, opcode::READ | opcode::WRITE | opcode::FSYNC | opcode::FALLOCATE);
            if is_io && state.faults.hang {
                state.held.push(request);
            } else {
                self.answer(&mut state, &request);
            }
        }
    }

    fn answer(&self, state: &mut State, request: &Request) {
        if matches!(request.opcode, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT) {
            // The first two have no answer; what is interrupted is answered in its own time.
            return;
        }
        let (error, body) = match state.obey(request) {
            Ok(body) => (0, body),
            Err(errno) => (-errno, Vec::new()),
        };
        let mut reply = Vec::with_capacity(16 + body.len());
        reply.extend((16 + body.len() as u32).to_le_bytes());
        reply.extend(error.to_le_bytes());
        reply.extend(request.unique.to_le_bytes());
        reply.extend(body);
        let is_slow = matches!(request.opcode, opcode::READ | opcode::WRITE | opcode::FSYNC);
        match state.throttle {
            Some(throttle) if is_slow => {
                let bytes = if request.opcode == opcode::FSYNC { 0 } else { u32_at(&request.body, 16) };
                self.delay(throttle, bytes, reply);
            }
            _ => self.send(&reply),
        }
    }

    fn send(&self, reply: &[u8]) {
        // Nobody may wait for it any more: its process was killed, or the disk unmounted.
        drop((&self.device).write(reply));
    }

    fn delayed(&self) -> MutexGuard<'_, Delayed> {
        self.delayed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps an answer until a disk like that would have it.
    fn delay(&self, throttle: Throttle, bytes: u32, reply: Vec<u8>) {
        let now = Instant::now();
        let mut delayed = self.delayed();
        let transfer = Duration::from_nanos(u64::from(bytes) * 1_000_000_000 / throttle.bytes_per_s);
        let busy_until = delayed.busy_until.map_or(now, |until| until.max(now)) + transfer;
        delayed.busy_until = Some(busy_until);
        delayed.answers.push_back((busy_until + throttle.latency, reply));
        self.news.notify_all();
    }

    /// Sends each answer when its time has come, until the end.
    fn send_delayed(&self) {
        let mut delayed = self.delayed();
        loop {
            let now = Instant::now();
            match delayed.answers.front() {
                Some((due, _)) if *due <= now || delayed.is_ended => {
                    let (_, reply) = delayed.answers.pop_front().expect("it was there");
                    drop(delayed);
                    self.send(&reply);
                    delayed = self.delayed();
                }
                Some((due, _)) => {
                    let left = *due - now;
                    let waited = self.news.wait_timeout(delayed, left);
                    delayed = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                None if delayed.is_ended => return,
                None => delayed = self.news.wait(delayed).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

impl State {
    fn obey(&mut self, request: &Request) -> Result<Vec<u8>, i32> {
        let body = &request.body;
        match request.opcode {
            opcode::INIT => Ok(init()),
            opcode::LOOKUP if body == format!("{NAME}\0").as_bytes() => Ok(self.entry()),
            opcode::LOOKUP => Err(libc::ENOENT),
            opcode::GETATTR => {
                let mut reply = vec![0; 16];
                reply.extend(self.attributes(request.node));
                Ok(reply)
            }
            // Times, which nobody keeps; the size is fixed.
            opcode::SETATTR if u32_at(body, 0) & 8 == 0 => {
                let mut reply = vec![0; 16];
                reply.extend(self.attributes(request.node));
                Ok(reply)
            }
            opcode::SETATTR => Err(libc::EPERM),
            opcode::OPEN => Ok(vec![0; 16]),
            opcode::RELEASE | opcode::FLUSH | opcode::ACCESS => Ok(Vec::new()),
            opcode::STATFS => Ok(statfs()),
            opcode::READ | opcode::WRITE | opcode::FALLOCATE | opcode::FSYNC => {
                let answer = self.transfer(request.opcode, body);
                self.answered.failed += u64::from(answer.is_err());
                answer
            }
            _ => Err(libc::ENOSYS),
        }
    }

    fn transfer(&mut self, code: u32, body: &[u8]) -> Result<Vec<u8>, i32> {
        let fail = |fault: Option<i32>| fault.map_or(Ok(()), Err);
        let (offset, size) = match code {
            opcode::FSYNC => (0, 0),
            opcode::FALLOCATE => (u64_at(body, 8) as usize, u64_at(body, 16) as usize),
            _ => (u64_at(body, 8) as usize, u32_at(body, 16) as usize),
        };
        let end = (offset + size).min(self.visible.len());
        match code {
            opcode::READ => {
                fail(self.faults.reads)?;
                self.answered.reads += 1;
                Ok(self.visible[offset.min(end)..end].to_vec())
            }
            opcode::WRITE => {
                fail(self.faults.writes)?;
                self.answered.writes += 1;
                self.visible[offset..end].copy_from_slice(&body[40..40 + end - offset]);
                self.fresh.extend(offset / SECTOR..end.div_ceil(SECTOR));
                Ok([(end - offset) as u32, 0].iter().flat_map(|word| word.to_le_bytes()).collect())
            }
            opcode::FALLOCATE => {
                fail(self.faults.writes)?;
                self.answered.writes += 1;
                if offset < end {
                    self.visible[offset..end].fill(0);
                    self.fresh.extend(offset / SECTOR..end.div_ceil(SECTOR));
                }
                Ok(Vec::new())
            }
            _ => {
                let fresh = std::mem::take(&mut self.fresh);
                // Reported once, and lost.
                fail(self.faults.syncs)?;
                self.answered.syncs += 1;
                for sector in fresh {
                    let bytes = sector * SECTOR..(sector + 1) * SECTOR;
                    self.durable[bytes.clone()].copy_from_slice(&self.visible[bytes]);
                }
                Ok(Vec::new())
            }
        }
    }

    /// `fuse_entry_out` of the file.
    fn entry(&self) -> Vec<u8> {
        let mut reply = DISK.to_le_bytes().to_vec();
        // Generation 1, and no caching of names or attributes.
        reply.extend(1u64.to_le_bytes());
        reply.extend([0; 24]);
        reply.extend(self.attributes(DISK));
        reply
    }

    /// `fuse_attr`.
    fn attributes(&self, node: u64) -> Vec<u8> {
        let (size, mode) = match node {
            ROOT => (0, libc::S_IFDIR | 0o755),
            _ => (self.visible.len() as u64, libc::S_IFREG | 0o600),
        };
        let longs = [node, size, size / 512, 0, 0, 0];
        let words = [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0];
        let longs = longs.iter().flat_map(|long: &u64| long.to_le_bytes());
        longs.chain(words.iter().flat_map(|word: &u32| word.to_le_bytes())).collect()
    }
}

/// `fuse_init_out`: asynchronous reads and direct I/O, large transfers, nothing cached.
fn init() -> Vec<u8> {
    const ASYNC_READ: u32 = 1;
    const BIG_WRITES: u32 = 1 << 5;
    const ASYNC_DIO: u32 = 1 << 15;
    const MAX_PAGES: u32 = 1 << 22;
    let mut reply = Vec::new();
    let flags = ASYNC_READ | BIG_WRITES | ASYNC_DIO | MAX_PAGES;
    [7, 31, TRANSFER_MAX, flags].iter().for_each(|word: &u32| reply.extend(word.to_le_bytes()));
    // Requests in the background, and where the kernel would begin to throttle.
    [4096u16, 4096].iter().for_each(|half| reply.extend(half.to_le_bytes()));
    [TRANSFER_MAX, 1].iter().for_each(|word| reply.extend(word.to_le_bytes()));
    [(TRANSFER_MAX / 4096) as u16, 0].iter().for_each(|half| reply.extend(half.to_le_bytes()));
    reply.resize(64, 0);
    reply
}

/// `fuse_kstatfs`.
fn statfs() -> Vec<u8> {
    let longs = [1u64 << 20, 1 << 20, 1 << 20, 16, 8].into_iter().flat_map(u64::to_le_bytes);
    let mut reply: Vec<u8> =
        longs.chain([4096u32, 255, 4096].into_iter().flat_map(u32::to_le_bytes)).collect();
    reply.resize(80, 0);
    reply
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
