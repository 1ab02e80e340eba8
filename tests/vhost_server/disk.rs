//! A disk in memory whose requests can be held back, for tests of the front end.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use pcache_vhost::volume::{Buffer, Disk, DiskConfig, DiskQueue, Done, Request, RequestKind, Status};
use pcache_vhost::wake::Waker;

pub const SECTORS: u64 = 4096;

/// What the disk was asked to do, in the order in which it did it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Executed {
    pub queue: u16,
    pub kind: RequestKind,
    pub sector: u64,
}

pub struct RamDisk {
    pub config: Mutex<DiskConfig>,
    pub write_cache: AtomicBool,
    pub bytes: Mutex<Vec<u8>>,
    /// While set, nothing completes.
    held: AtomicBool,
    /// Every n-th request completes late, through the waker of a helper thread; 0 for none.
    pub late: AtomicU64,
    pub executed: Mutex<Vec<Executed>>,
    pub refuse_queues: AtomicBool,
    wakers: Mutex<Vec<Waker>>,
    pub commits: AtomicU64,
    pub pending: AtomicU64,
    /// Requests that queues have left behind.
    pub left: AtomicU64,
}

impl RamDisk {
    pub fn new() -> Arc<Self> {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut DiskConfig)) -> Arc<Self> {
        let mut config = DiskConfig {
            sectors: SECTORS,
            block_size: 512,
            physical_block_size: 4096,
            optimal_io_size: 65536,
            read_only: false,
            serial: *b"a serial of 20 bytes",
            queues: 4,
            queue_size: 256,
        };
        change(&mut config);
        Arc::new(Self {
            bytes: Mutex::new(vec![0; config.sectors as usize * 512]),
            config: Mutex::new(config),
            write_cache: AtomicBool::new(true),
            held: AtomicBool::new(false),
            late: AtomicU64::new(0),
            executed: Mutex::default(),
            refuse_queues: AtomicBool::new(false),
            wakers: Mutex::default(),
            commits: AtomicU64::new(0),
            pending: AtomicU64::new(0),
            left: AtomicU64::new(0),
        })
    }

    pub fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
    }

    pub fn release(&self) {
        self.held.store(false, Ordering::SeqCst);
        self.wakers.lock().unwrap().iter().for_each(Waker::wake);
    }

    /// Closes the descriptors of queues that have ended.
    pub fn forget_wakers(&self) {
        self.wakers.lock().unwrap().clear();
    }

    pub fn executed(&self) -> Vec<Executed> {
        self.executed.lock().unwrap().clone()
    }

    /// Waits until `count` requests are with the disk.
    pub fn wait_pending(&self, count: u64) {
        super::eventually("requests to reach the disk", || self.pending.load(Ordering::SeqCst) == count);
    }
}

pub struct RamQueue<B> {
    disk: Arc<RamDisk>,
    index: u16,
    waker: Waker,
    gathered: Vec<Request<B>>,
    waiting: VecDeque<Request<B>>,
    count: u64,
    lately: u64,
}

/// The shared disk, as the server wants it: `Disk` has `&self` methods that need the `Arc`.
pub struct Handle(pub Arc<RamDisk>);

impl Disk for Handle {
    type Queue<B: Buffer> = RamQueue<B>;

    fn config(&self) -> DiskConfig {
        self.0.config.lock().unwrap().clone()
    }

    fn write_cache(&self) -> bool {
        self.0.write_cache.load(Ordering::SeqCst)
    }

    fn set_write_cache(&self, on: bool) {
        self.0.write_cache.store(on, Ordering::SeqCst);
    }

    fn open_queue<B: Buffer>(&self, index: u16, waker: Waker) -> io::Result<RamQueue<B>> {
        if self.0.refuse_queues.load(Ordering::SeqCst) {
            return Err(io::Error::other("refused by the test"));
        }
        self.0.wakers.lock().unwrap().push(waker.clone());
        Ok(RamQueue {
            disk: Arc::clone(&self.0),
            index,
            waker,
            gathered: Vec::new(),
            waiting: VecDeque::new(),
            count: 0,
            lately: 0,
        })
    }
}

impl<B: Buffer> DiskQueue<B> for RamQueue<B> {
    fn submit(&mut self, request: Request<B>) {
        self.disk.pending.fetch_add(1, Ordering::SeqCst);
        self.gathered.push(request);
    }

    fn commit(&mut self) {
        self.disk.commits.fetch_add(1, Ordering::SeqCst);
        self.waiting.extend(self.gathered.drain(..));
    }

    fn poll(&mut self, done: &mut Vec<Done<B>>) {
        if self.disk.held.load(Ordering::SeqCst) {
            return;
        }
        while let Some(request) = self.waiting.pop_front() {
            self.count += 1;
            let late = self.disk.late.load(Ordering::SeqCst);
            if late > 0 && self.count.is_multiple_of(late) && self.lately < 3 {
                // Not now: somebody else will wake the queue for it.
                self.lately += 1;
                self.waiting.push_back(request);
                let waker = self.waker.clone();
                std::thread::spawn(move || waker.wake());
                return;
            }
            self.lately = 0;
            self.disk.pending.fetch_sub(1, Ordering::SeqCst);
            done.push(self.execute(request));
        }
    }

    fn pending(&self) -> usize {
        self.gathered.len() + self.waiting.len()
    }

    fn park(&mut self) {
        assert!(self.gathered.is_empty(), "parked with an uncommitted batch");
    }

    fn leave_behind(self) {
        self.disk.pending.fetch_sub(self.pending() as u64, Ordering::SeqCst);
        self.disk.left.fetch_add(self.waiting.len() as u64, Ordering::SeqCst);
    }
}

impl<B: Buffer> RamQueue<B> {
    fn execute(&self, request: Request<B>) -> Done<B> {
        let Request { tag, kind, sector, mut data } = request;
        self.disk.executed.lock().unwrap().push(Executed { queue: self.index, kind, sector });
        let mut bytes = self.disk.bytes.lock().unwrap();
        let len = match kind {
            RequestKind::Read | RequestKind::Write => data.len() as u64,
            RequestKind::Flush => 0,
            RequestKind::Discard { sectors } | RequestKind::WriteZeroes { sectors, .. } => sectors * 512,
        };
        let start = sector.checked_mul(512);
        let end = start.and_then(|start| start.checked_add(len));
        let Some(range) = start.zip(end).filter(|&(_, end)| end <= bytes.len() as u64) else {
            return Done { tag, status: Status::IoError, data };
        };
        let part = &mut bytes[range.0 as usize..range.1 as usize];
        let result = match kind {
            RequestKind::Read => data.copy_in(0, part),
            RequestKind::Write => data.copy_out(0, part),
            RequestKind::Flush => Ok(()),
            RequestKind::Discard { .. } | RequestKind::WriteZeroes { .. } => {
                part.fill(0);
                Ok(())
            }
        };
        let status = if result.is_ok() { Status::Ok } else { Status::IoError };
        Done { tag, status, data }
    }
}
