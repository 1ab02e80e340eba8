//! One io_uring: transfers and zeroing without a thread.
//!
//! Invariants:
//! - An operation, and so its buffer, stays in its slot from the moment its entry enters the
//!   submission ring until its completion was taken from the completion ring. Dropping the ring
//!   waits for that.
//! - A slot has at most one entry in the rings, and there are as many slots as submission entries
//!   at most, so neither ring can overflow.
//! - The descriptor that carries the lock is registered, and the kernel keeps registered files until
//!   the last operation has ended, also when the process is killed. A successor that waits for the
//!   lock therefore waits for our writes.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, Probe, opcode, squeue, types::Fixed};

use super::file::{DiskFile, is_unsupported};
use super::{Completion, Op};
use crate::wake::Waker;

/// How often one operation is handed to the kernel again after it was interrupted, before the
/// blocking engine gets it.
const RETRIES_MAX: u8 = 100;

/// Index of the disk in the ring's file table.
const DISK: Fixed = Fixed(0);

/// Why there is no ring.
#[derive(Debug)]
pub(super) enum NoRing {
    /// This host does not allow it or is too old; helper threads do as well.
    Unavailable(io::Error),
    /// A resource was refused.
    Failed(io::Error),
}

/// What became of an operation that the ring is done with.
#[derive(Debug)]
pub(super) enum Ended {
    /// It is complete.
    Done(Completion),
    /// The ring cannot do it; nothing or part of it was done, and doing all of it again is right.
    HandOver(u64, Op),
}

/// A ring on one disk.
pub(super) struct Ring {
    ring: IoUring,
    file: Arc<DiskFile>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    waker: Waker,
}

/// An operation in the kernel, or room for one.
#[derive(Default)]
struct Slot {
    token: u64,
    op: Option<Op>,
    /// Bytes transferred so far.
    done: usize,
    retries: u8,
    /// The fallocate mode of a zeroing.
    mode: u32,
}

/// What a completion code means for an operation.
#[derive(Debug)]
enum Verdict {
    /// Complete, well or badly.
    Over(io::Result<()>),
    /// Go on from this many bytes.
    Continue(usize),
    /// Once more, as it was.
    Retry,
    /// This kind of zeroing does not exist on this disk.
    Unsupported,
}

impl Ring {
    /// A ring for `depth` operations at once, whose completions signal `waker`.
    pub(super) fn open(file: &Arc<DiskFile>, depth: u32, waker: &Waker) -> Result<Self, NoRing> {
        let ring = build(depth.next_power_of_two())?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe).map_err(NoRing::Unavailable)?;
        let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Fallocate::CODE];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(NoRing::Unavailable(io::ErrorKind::Unsupported.into()));
        }
        ring.submitter().register_files(&[file.file().as_raw_fd()]).map_err(NoRing::Failed)?;
        if let Some(event) = waker.event() {
            ring.submitter().register_eventfd(event.as_raw_fd()).map_err(NoRing::Failed)?;
        }
        Ok(Self {
            ring,
            file: file.clone(),
            slots: (0..depth).map(|_| Slot::default()).collect(),
            free: (0..depth).rev().collect(),
            waker: waker.clone(),
        })
    }

    /// Whether the ring has an operation for `op` on this disk.
    pub(super) fn takes(&self, op: &Op) -> bool {
        match op {
            Op::Read { offset, buf } | Op::Write { offset, buf } => self.file.fits(*offset, buf.len() as u64),
            Op::Zero { offset, len, unmap } => {
                self.file.fits(*offset, *len) && self.file.fallocate_mode(*unmap).is_some()
            }
            Op::Flush => false,
        }
    }

    /// Accepts an operation it [takes](Self::takes). Panics when all slots are used.
    pub(super) fn submit(&mut self, token: u64, op: Op) {
        let index = self.free.pop().expect("more operations than the ring was opened for");
        let mode = match op {
            Op::Zero { unmap, .. } => self.file.fallocate_mode(unmap).unwrap_or_default(),
            _ => 0,
        };
        self.slots[index as usize] = Slot { token, op: Some(op), done: 0, retries: 0, mode };
        self.push(index);
    }

    /// Hands queued entries to the kernel. If it has no memory for them now, the waker is signalled,
    /// so that the loop comes back and tries again.
    pub(super) fn kick(&mut self) {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(0) => break,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM)) => {
                    break;
                }
                Err(e) => panic!("io_uring_enter refused what it had promised to take: {e}"),
            }
        }
        if !self.ring.submission().is_empty() {
            self.waker.wake();
        }
    }

    /// Calls `ended` for every operation that is over. Never blocks.
    pub(super) fn reap(&mut self, mut ended: impl FnMut(Ended)) {
        if self.used() == 0 {
            return;
        }
        // With cooperative task running, completions may wait for this thread to enter the kernel.
        if self.ring.submission().taskrun() {
            match self.ring.submit() {
                Ok(_) => {}
                // The flag stays set, so the next turn tries again.
                Err(e) => tracing::trace!("io_uring_enter while reaping: {e}"),
            }
        }
        while let Some(entry) = { self.ring.completion().next() } {
            if let Some(end) = self.settle(entry.user_data() as u32, entry.result()) {
                ended(end);
            }
        }
        self.kick();
    }

    /// Whether completions can be reaped, or entries wait for the kernel.
    pub(super) fn is_ready(&mut self) -> bool {
        !self.ring.completion().is_empty() || self.ring.submission().taskrun()
    }

    /// Whether entries still wait for the kernel to have memory.
    pub(super) fn is_stuck(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// What to poll for completions.
    pub(super) fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    fn used(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Applies a completion code; returns the operation if it is over.
    fn settle(&mut self, index: u32, code: i32) -> Option<Ended> {
        let slot = &mut self.slots[index as usize];
        let op = slot.op.as_ref().expect("a completion of a free slot");
        let over = match verdict(op, slot.done, code, &self.file) {
            Verdict::Continue(done) => {
                slot.done = done;
                slot.retries = 0;
                None
            }
            Verdict::Retry if slot.retries < RETRIES_MAX => {
                slot.retries += 1;
                None
            }
            Verdict::Unsupported => {
                self.file.refuse(slot.mode);
                Some(Err(()))
            }
            Verdict::Retry => Some(Err(())),
            Verdict::Over(result) => Some(Ok(result)),
        };
        let Some(over) = over else {
            self.push(index);
            return None;
        };
        let (token, op) = (slot.token, slot.op.take()?);
        self.free.push(index);
        Some(match over {
            Ok(result) => Ended::Done(Completion { token, op, result }),
            Err(()) => Ended::HandOver(token, op),
        })
    }

    /// Queues an entry for what is left of the operation in a slot.
    #[expect(unsafe_code, reason = "an entry carries the address of its buffer")]
    fn push(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        let entry = entry(slot).user_data(u64::from(index));
        // SAFETY: the entry is a transfer into or out of the buffer owned by the operation in this
        // slot, within its length, or has no buffer. The buffer's pages are on the heap and do not
        // move with it. The operation leaves the slot only in `settle`, after the completion of the
        // slot's only entry was taken from the ring; `drop` waits for all of them. Nobody can reach
        // the buffer meanwhile.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "a submission ring smaller than the number of slots");
    }

    /// Blocks until every operation is over.
    fn quiesce(&mut self) {
        while self.used() > 0 {
            self.kick();
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                // Nothing better than to try again: memory the kernel may write to cannot be freed.
                Err(e) => tracing::trace!("io_uring_enter while closing: {e}"),
            }
            self.reap(|_| ());
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.quiesce();
        // Closing a ring releases its files some time later; a successor should not have to wait.
        if let Err(e) = self.ring.submitter().unregister_files() {
            tracing::debug!("the disk stays open until the kernel has taken its ring down: {e}");
        }
    }
}

/// A ring that does not interrupt the thread for completions, where the kernel has that (5.19).
fn build(entries: u32) -> Result<IoUring, NoRing> {
    let eager = || IoUring::builder().dontfork().build(entries);
    let lazy = || {
        IoUring::builder()
            .dontfork()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .build(entries)
    };
    let ring = lazy().or_else(|e| if e.raw_os_error() == Some(libc::EINVAL) { eager() } else { Err(e) });
    ring.map_err(|e| match e.raw_os_error() {
        Some(libc::ENOSYS | libc::EPERM | libc::EACCES) => NoRing::Unavailable(e),
        _ => NoRing::Failed(e),
    })
}

/// The kernel's words for what is left of the operation in `slot`.
fn entry(slot: &mut Slot) -> squeue::Entry {
    let done = slot.done;
    // A longer rest is transferred short, and continued.
    let rest = |len: usize| u32::try_from(len - done).unwrap_or(1 << 30);
    match slot.op.as_mut().expect("an entry for a free slot") {
        Op::Read { offset, buf } => {
            let len = rest(buf.len());
            let start = buf[done..].as_mut_ptr();
            opcode::Read::new(DISK, start, len).offset(*offset + done as u64).build()
        }
        Op::Write { offset, buf } => {
            let len = rest(buf.len());
            let start = buf[done..].as_ptr();
            opcode::Write::new(DISK, start, len).offset(*offset + done as u64).build()
        }
        Op::Zero { offset, len, .. } => {
            opcode::Fallocate::new(DISK, *len).offset(*offset).mode(slot.mode as i32).build()
        }
        Op::Flush => unreachable!("flushes are grouped"),
    }
}

/// What completion code `code` means for `op`, of which `done` bytes had been transferred.
fn verdict(op: &Op, done: usize, code: i32, file: &DiskFile) -> Verdict {
    if code < 0 {
        let e = io::Error::from_raw_os_error(-code);
        return match -code {
            // Cancelled: the thread that submitted it has exited before it ran.
            libc::EINTR | libc::EAGAIN | libc::ECANCELED => Verdict::Retry,
            _ if matches!(op, Op::Zero { .. }) && is_unsupported(&e) => Verdict::Unsupported,
            _ => Verdict::Over(Err(e)),
        };
    }
    let (len, stuck) = match op {
        Op::Read { buf, .. } => (buf.len(), io::ErrorKind::UnexpectedEof),
        Op::Write { buf, .. } => (buf.len(), io::ErrorKind::WriteZero),
        Op::Zero { .. } | Op::Flush => return Verdict::Over(Ok(())),
    };
    match file.advance(done, code as usize, len) {
        Some(done) if done == len => Verdict::Over(Ok(())),
        Some(done) => Verdict::Continue(done),
        None => Verdict::Over(Err(stuck.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::AlignedBuf;

    fn disk(align: u32) -> DiskFile {
        DiskFile::new(tempfile::tempfile().unwrap(), align)
    }

    #[test]
    fn completion_codes_are_read_as_the_kernel_means_them() {
        let read = || Op::Read { offset: 0, buf: AlignedBuf::new(16384) };
        let write = || Op::Write { offset: 0, buf: AlignedBuf::new(16384) };
        let zero = || Op::Zero { offset: 0, len: 16384, unmap: true };
        for (op, align, done, code, expected) in [
            (read(), 4096, 0, 16384, "Over(Ok(()))"),
            (read(), 4096, 0, 4096, "Continue(4096)"),
            (read(), 4096, 4096, 12288, "Over(Ok(()))"),
            (read(), 4096, 4096, 5000, "Continue(8192)"),
            (read(), 4096, 4096, 4095, "Over(Err(Kind(UnexpectedEof)))"),
            (read(), 1, 4096, 4095, "Continue(8191)"),
            (read(), 1, 0, 0, "Over(Err(Kind(UnexpectedEof)))"),
            (write(), 512, 0, 0, "Over(Err(Kind(WriteZero)))"),
            (write(), 512, 512, 100, "Over(Err(Kind(WriteZero)))"),
            (write(), 512, 512, 1000, "Continue(1024)"),
            (write(), 512, 0, -libc::EINTR, "Retry"),
            (read(), 512, 0, -libc::EAGAIN, "Retry"),
            (read(), 512, 0, -libc::ECANCELED, "Retry"),
            (zero(), 512, 0, -libc::EINTR, "Retry"),
            (zero(), 512, 0, 0, "Over(Ok(()))"),
            (zero(), 512, 0, -libc::EOPNOTSUPP, "Unsupported"),
            (zero(), 512, 0, -libc::ENOSYS, "Unsupported"),
            (zero(), 512, 0, -libc::ENOSPC, "Over(Err(Os { code: 28"),
            (write(), 512, 0, -libc::EIO, "Over(Err(Os { code: 5"),
            (write(), 512, 0, -libc::EOPNOTSUPP, "Over(Err(Os { code: 95"),
        ] {
            let found = format!("{:?}", verdict(&op, done, code, &disk(align)));
            assert!(found.starts_with(expected), "{op:?} after {done}, code {code}: {found}, not {expected}");
        }
    }

    #[test]
    fn an_operation_interrupted_for_ever_goes_to_the_blocking_engine() {
        let file = Arc::new(disk(1));
        file.file().set_len(4096).unwrap();
        let mut ring = Ring::open(&file, 1, &Waker::default()).unwrap();
        // The kernel never interrupts it: the codes are made up, and the entries each leaves in the
        // ring are submitted and reaped, so that the slot has one at a time.
        ring.submit(9, Op::Read { offset: 0, buf: AlignedBuf::new(4096) });
        for retry in 0..=RETRIES_MAX {
            ring.ring.submit_and_wait(1).unwrap();
            let entry = ring.ring.completion().next().unwrap();
            assert_eq!((entry.user_data(), entry.result()), (0, 4096));
            match ring.settle(0, -libc::EINTR) {
                None => assert!(retry < RETRIES_MAX),
                Some(Ended::HandOver(9, Op::Read { .. })) => assert_eq!(retry, RETRIES_MAX),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(ring.used(), 0);
    }

    #[test]
    fn short_transfers_are_continued_where_they_stopped() {
        use std::os::unix::fs::FileExt;
        let file = Arc::new(disk(512));
        file.file().set_len(16384).unwrap();
        let mut ring = Ring::open(&file, 1, &Waker::default()).unwrap();
        let mut buf = AlignedBuf::new(4096);
        buf.fill(7);
        ring.submit(9, Op::Write { offset: 8192, buf });
        ring.ring.submit_and_wait(1).unwrap();
        assert_eq!(ring.ring.completion().next().unwrap().result(), 4096);
        // As if only three and a half sectors had been written.
        file.file().write_all_at(&[0; 4096], 8192).unwrap();
        assert!(ring.settle(0, 3 * 512 + 256).is_none());
        ring.ring.submit_and_wait(1).unwrap();
        let rest = ring.ring.completion().next().unwrap().result();
        assert_eq!(rest, 4096 - 3 * 512, "resumed at the last whole sector");
        assert!(matches!(ring.settle(0, rest), Some(Ended::Done(Completion { result: Ok(()), .. }))));
        let mut found = [0; 16384];
        file.file().read_exact_at(&mut found, 0).unwrap();
        assert!(
            found.iter().enumerate().all(|(at, b)| *b == if (9728..12288).contains(&at) { 7 } else { 0 })
        );
    }
}
