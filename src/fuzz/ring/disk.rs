//! The disk behind a fuzzed ring: it answers as the script says, and judges what it is given.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::volume::{Buffer, Disk, DiskConfig, DiskQueue, Done, Request, RequestKind, Status};
use crate::wake::Waker;

/// Sectors of the disk, and so requests of a script.
const SECTORS: u64 = 1 << 20;

/// What the disk has been asked for and what it is to answer.
#[derive(Default)]
pub(super) struct Ledger {
    /// Sector, and how the disk answered or will answer, of each execution.
    pub executed: Vec<(u64, Status)>,
    /// What the next requests come to.
    pub status: u8,
    /// Whether requests stay until they are let go.
    pub holds: bool,
    /// Whether the next to be let go is the last that came.
    pub lifo: bool,
    pub let_go: u32,
    /// Whether writes carry the lowest byte of their sector, everywhere.
    pub honest: bool,
}

/// A disk that answers as the script says.
struct ScriptDisk(Mutex<Ledger>);

impl ScriptDisk {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Clone)]
pub(super) struct Shared(Arc<ScriptDisk>);

impl Shared {
    pub fn new(ledger: Ledger) -> Self {
        Self(Arc::new(ScriptDisk(Mutex::new(ledger))))
    }

    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.0.ledger()
    }
}

impl Disk for Shared {
    type Queue<B: Buffer> = ScriptQueue<B>;

    fn config(&self) -> DiskConfig {
        DiskConfig {
            sectors: SECTORS,
            block_size: 512,
            physical_block_size: 4096,
            optimal_io_size: 0,
            read_only: false,
            serial: *b"a serial of 20 bytes",
            queues: 1,
            queue_size: 64,
        }
    }

    fn write_cache(&self) -> bool {
        true
    }

    fn set_write_cache(&self, _on: bool) {}

    fn open_queue<B: Buffer>(&self, _index: u16, _waker: Waker) -> io::Result<ScriptQueue<B>> {
        Ok(ScriptQueue { disk: self.0.clone(), held: VecDeque::new(), committed: 0 })
    }
}

pub(super) struct ScriptQueue<B> {
    disk: Arc<ScriptDisk>,
    held: VecDeque<(Request<B>, Status)>,
    /// How many of them were there at the last commit.
    committed: usize,
}

/// What a read of a sector shows.
pub(super) fn content(sector: u64) -> u8 {
    sector as u8 ^ 0x5a
}

/// Bytes of a request's buffer that the disk touches at each end: all it takes to find a range that
/// is not there, and not minutes for a request of 256 MiB.
const TOUCHED: usize = 64;

impl<B: Buffer> ScriptQueue<B> {
    fn execute(&mut self, request: &mut Request<B>, status: Status) -> Status {
        let len = request.data.len();
        let ends = [0, len.saturating_sub(TOUCHED)];
        let width = len.min(TOUCHED);
        let mut bytes = [content(request.sector); TOUCHED];
        match request.kind {
            RequestKind::Read if status == Status::Ok => {
                let failed = ends.iter().any(|&at| request.data.copy_in(at, &bytes[..width]).is_err());
                assert!(!failed, "memory that cannot shrink is gone");
            }
            RequestKind::Write => {
                for at in ends {
                    let read = request.data.copy_out(at, &mut bytes[..width]);
                    assert!(read.is_ok(), "memory that cannot shrink is gone");
                    let honest = self.disk.ledger().honest;
                    let whole = bytes[..width].iter().all(|&byte| byte == request.sector as u8);
                    assert!(!honest || whole, "a write of {len} bytes has other bytes than the guest's");
                }
            }
            RequestKind::Flush | RequestKind::Discard { .. } | RequestKind::WriteZeroes { .. } => {
                assert_eq!(len, 0, "a request without data has a buffer");
            }
            RequestKind::Read => {}
        }
        status
    }
}

impl<B: Buffer> DiskQueue<B> for ScriptQueue<B> {
    fn submit(&mut self, request: Request<B>) {
        let mut ledger = self.disk.ledger();
        let status = match ledger.status % 8 {
            6 => Status::IoError,
            7 => Status::Unsupported,
            _ => Status::Ok,
        };
        ledger.executed.push((request.sector, status));
        drop(ledger);
        self.held.push_back((request, status));
    }

    fn commit(&mut self) {
        self.committed = self.held.len();
    }

    fn poll(&mut self, done: &mut Vec<Done<B>>) {
        assert_eq!(self.committed, self.held.len(), "polled before what was submitted is committed");
        loop {
            let mut ledger = self.disk.ledger();
            if self.held.is_empty() || ledger.holds && ledger.let_go == 0 {
                return;
            }
            ledger.let_go = ledger.let_go.saturating_sub(1);
            let lifo = ledger.lifo;
            drop(ledger);
            let next = if lifo { self.held.pop_back() } else { self.held.pop_front() };
            let Some((mut request, status)) = next else { return };
            self.committed -= 1;
            let status = self.execute(&mut request, status);
            done.push(Done { tag: request.tag, status, data: request.data });
        }
    }

    fn pending(&self) -> usize {
        self.held.len()
    }

    fn park(&mut self) {
        assert_eq!(self.committed, self.held.len(), "parked before what was submitted is committed");
    }

    fn leave_behind(self) {
        drop(self);
    }
}
