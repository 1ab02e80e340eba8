//! The open file or device under a disk, and blocking I/O on it.
//!
//! Everything the io_uring engine cannot do in one kernel operation ends here, on a helper thread:
//! operations finer than direct I/O allows, zeroing where the kernel has no help, and everything on
//! hosts that forbid io_uring.
//!
//! Invariants:
//! - Every transfer handed to a direct descriptor starts and ends on a multiple of `align`, in
//!   memory that is too.
//! - Operations finer than `align` read the blocks at their two edges, change their part and write
//!   whole blocks back. The edge blocks are locked from the read to the write, so neighbours in one
//!   block never undo each other. Nothing else touches an edge block at that time, because callers
//!   never have overlapping writes in flight.
//!
//! The usual alternative, a second descriptor without `O_DIRECT` for the fine operations, is not
//! coherent enough: a fine write may dirty one block of a large folio that covers others, and a
//! direct write to those cannot then evict their stale copies (the kernel warns of "possible data
//! corruption due to collision with buffered I/O").

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};

use super::{AlignedBuf, Op};

/// Piece in which large fine operations and written zeros are worked off.
const PIECE: usize = 1 << 20;

/// Deallocate; the range reads as zeros.
const PUNCH: u32 = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
/// Zero without giving space back.
const ZERO: u32 = (libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE) as u32;

/// An open raw image or block device.
pub(super) struct DiskFile {
    file: File,
    align: u64,
    edges: Edges,
    /// One bit per fallocate mode this disk has refused: 1 for `PUNCH`, 2 for `ZERO`.
    refused: AtomicU32,
    zeros: OnceLock<AlignedBuf>,
}

impl DiskFile {
    /// Takes over `file`, whose direct I/O needs multiples of `align` (1 when it is buffered).
    pub(super) fn new(file: File, align: u32) -> Self {
        assert!(align.is_power_of_two() && align as usize <= PIECE, "odd alignment {align}");
        Self {
            file,
            align: u64::from(align),
            edges: Edges::default(),
            refused: AtomicU32::new(0),
            zeros: OnceLock::new(),
        }
    }

    /// The descriptor, which also carries the locks.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// What offsets, lengths and memory must be multiples of; 1 when I/O is buffered.
    pub(super) fn align(&self) -> u64 {
        self.align
    }

    /// Whether the kernel takes the range as it is.
    pub(super) fn fits(&self, offset: u64, len: u64) -> bool {
        (offset | len).is_multiple_of(self.align)
    }

    /// How far a transfer of `len` bytes is when the kernel moved `moved` more after `done`: `None`
    /// if that was no progress. A short direct transfer resumes at the last whole block.
    pub(super) fn advance(&self, done: usize, moved: usize, len: usize) -> Option<usize> {
        let reached = done + moved;
        if reached >= len {
            return Some(len);
        }
        let kept = reached - reached % self.align as usize;
        (kept > done).then_some(kept)
    }

    /// Does `op`, which is not a flush, from begin to end.
    pub(super) fn run(&self, op: &mut Op) -> io::Result<()> {
        match op {
            Op::Read { offset, buf } => self.read(*offset, buf),
            Op::Write { offset, buf } => self.write(*offset, buf),
            Op::Zero { offset, len, unmap } => self.zero(*offset, *len, *unmap),
            Op::Flush => unreachable!("flushes are grouped"),
        }
    }

    /// Makes what was written durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Fills `buf` from `offset`.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.direct(offset, buf) {
            return self.read_whole(offset, buf);
        }
        let end = offset + buf.len() as u64;
        let mut bounce = self.bounce(offset, end);
        for window in Windows::new(offset, end, self.align) {
            let bounce = &mut bounce[..window.len()];
            self.read_whole(window.start, bounce)?;
            buf[window.data(offset)].copy_from_slice(&bounce[window.inside()]);
        }
        Ok(())
    }

    /// Stores `data` at `offset`.
    pub(super) fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if self.direct(offset, data) {
            return self.write_whole(offset, data);
        }
        let _held = self.lock_edges(offset, data.len() as u64);
        self.write_patched(offset, data)
    }

    /// Makes a range read as zeros by the first way that works: fallocate, then written zeros.
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let _held = self.lock_edges(offset, len);
        while let Some(mode) = self.fallocate_mode(unmap) {
            match self.fallocate(mode, offset, len) {
                Err(e) if is_unsupported(&e) => self.refuse(mode),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                ended => return ended,
            }
        }
        let zeros = self.zeros.get_or_init(|| AlignedBuf::new(PIECE));
        let end = offset + len;
        let mut at = offset;
        while at < end {
            // Up to a multiple of the piece, so that only the first and last may be fine.
            let stop = end.min((at / PIECE as u64 + 1) * PIECE as u64);
            let piece = &zeros[..(stop - at) as usize];
            if self.direct(at, piece) {
                self.write_whole(at, piece)?;
            } else {
                self.write_patched(at, piece)?;
            }
            at = stop;
        }
        Ok(())
    }

    /// The fallocate mode to try next for a zeroing; `None` when only writing is left.
    pub(super) fn fallocate_mode(&self, unmap: bool) -> Option<u32> {
        let refused = self.refused.load(Ordering::Relaxed);
        if unmap && refused & refusal(PUNCH) == 0 {
            return Some(PUNCH);
        }
        (refused & refusal(ZERO) == 0).then_some(ZERO)
    }

    /// Remembers that the disk does not have `mode`.
    pub(super) fn refuse(&self, mode: u32) {
        self.refused.fetch_or(refusal(mode), Ordering::Relaxed);
    }

    /// Whether holes can be punched, found by punching one behind the end, where it changes nothing.
    pub(super) fn can_punch(&self, size: u64) -> bool {
        self.fallocate(PUNCH, size.next_multiple_of(4096), 4096).is_ok()
    }

    #[expect(unsafe_code, reason = "std has no fallocate")]
    fn fallocate(&self, mode: u32, offset: u64, len: u64) -> io::Result<()> {
        // SAFETY: plain integers and a descriptor that `self` keeps open; no memory is passed.
        let code =
            unsafe { libc::fallocate64(self.file.as_raw_fd(), mode as i32, offset as i64, len as i64) };
        if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Whether a transfer can go to the descriptor as it is.
    fn direct(&self, offset: u64, data: &[u8]) -> bool {
        self.fits(offset | data.as_ptr() as u64, data.len() as u64)
    }

    fn bounce(&self, offset: u64, end: u64) -> AlignedBuf {
        let first = offset - offset % self.align;
        AlignedBuf::new((end.next_multiple_of(self.align) - first).min(PIECE as u64) as usize)
    }

    fn read_whole(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset + done as u64) {
                Ok(moved) => {
                    done = self.advance(done, moved, buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write_whole(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < data.len() {
            match self.file.write_at(&data[done..], offset + done as u64) {
                Ok(moved) => {
                    done = self.advance(done, moved, data.len()).ok_or(io::ErrorKind::WriteZero)?;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Writes a fine range as whole blocks. The caller has locked its edges.
    fn write_patched(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (end, block) = (offset + data.len() as u64, self.align as usize);
        let mut bounce = self.bounce(offset, end);
        for window in Windows::new(offset, end, self.align) {
            let bounce = &mut bounce[..window.len()];
            let inside = window.inside();
            if inside.start > 0 {
                self.read_whole(window.start, &mut bounce[..block])?;
            }
            // The last block, unless it is the first and has just been read.
            if inside.end < bounce.len() && (inside.start == 0 || bounce.len() > block) {
                let last = bounce.len() - block;
                self.read_whole(window.start + last as u64, &mut bounce[last..])?;
            }
            bounce[inside].copy_from_slice(&data[window.data(offset)]);
            self.write_whole(window.start, bounce)?;
        }
        Ok(())
    }

    /// Locks the blocks a range covers only partly; nothing for a range of whole blocks.
    fn lock_edges(&self, offset: u64, len: u64) -> Held<'_> {
        let end = offset + len;
        let first = (!offset.is_multiple_of(self.align)).then_some(offset / self.align);
        let last = (!end.is_multiple_of(self.align)).then_some(end / self.align);
        self.edges.lock(first, last.filter(|_| first != last))
    }
}

impl std::fmt::Debug for DiskFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskFile").field("file", &self.file).field("align", &self.align).finish()
    }
}

/// Whether the kernel said "I cannot do that here" rather than "it went wrong".
pub(super) fn is_unsupported(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

fn refusal(mode: u32) -> u32 {
    if mode == PUNCH { 1 } else { 2 }
}

/// A piece of a fine range, widened to whole blocks.
struct Window {
    start: u64,
    end: u64,
    /// The part of it that was asked for.
    from: u64,
    to: u64,
}

impl Window {
    fn len(&self) -> usize {
        (self.end - self.start) as usize
    }

    /// Where the part asked for lies in the window.
    fn inside(&self) -> std::ops::Range<usize> {
        (self.from - self.start) as usize..(self.to - self.start) as usize
    }

    /// Where the part asked for lies in the caller's data, which begins at `offset` of the disk.
    fn data(&self, offset: u64) -> std::ops::Range<usize> {
        (self.from - offset) as usize..(self.to - offset) as usize
    }
}

/// Cuts a range into [`Window`]s of at most a piece.
struct Windows {
    next: u64,
    offset: u64,
    end: u64,
    align: u64,
}

impl Windows {
    fn new(offset: u64, end: u64, align: u64) -> Self {
        Self { next: offset - offset % align, offset, end, align }
    }
}

impl Iterator for Windows {
    type Item = Window;

    fn next(&mut self) -> Option<Window> {
        if self.next >= self.end {
            return None;
        }
        let start = self.next;
        let end = self.end.next_multiple_of(self.align).min(start + PIECE as u64);
        self.next = end;
        Some(Window { start, end, from: start.max(self.offset), to: end.min(self.end) })
    }
}

/// Blocks being read, changed and written back, by number. At most two per helper thread.
#[derive(Default)]
struct Edges {
    held: Mutex<Vec<u64>>,
    freed: Condvar,
}

impl Edges {
    /// Waits until neither block is held, then holds both: taking them together cannot deadlock.
    fn lock(&self, first: Option<u64>, last: Option<u64>) -> Held<'_> {
        let blocks = [first, last];
        if blocks != [None, None] {
            let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            let mut held = self
                .freed
                .wait_while(held, |held| blocks.iter().flatten().any(|block| held.contains(block)))
                .unwrap_or_else(PoisonError::into_inner);
            held.extend(blocks.iter().flatten());
        }
        Held { edges: self, blocks }
    }
}

/// Edge blocks held until this is dropped.
struct Held<'a> {
    edges: &'a Edges,
    blocks: [Option<u64>; 2],
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.blocks != [None, None] {
            let mut held = self.edges.held.lock().unwrap_or_else(PoisonError::into_inner);
            held.retain(|block| !self.blocks.contains(&Some(*block)));
            drop(held);
            self.edges.freed.notify_all();
        }
    }
}
/// Gives a new file its length and its space: by the file system, or by writing zeros.
#[expect(unsafe_code, reason = "std has no fallocate")]
pub(super) fn allocate(file: &File, len: u64) -> io::Result<()> {
    // SAFETY: plain integers and a descriptor that `file` keeps open; no memory is passed.
    if unsafe { libc::fallocate64(file.as_raw_fd(), 0, 0, len as i64) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            let zeros = vec![0; 1 << 20];
            let mut done = 0;
            while done < len {
                let part = (len - done).min(zeros.len() as u64);
                file.write_all_at(&zeros[..part as usize], done)?;
                done += part;
            }
            Ok(())
        }
        error => Err(error),
    }
}
