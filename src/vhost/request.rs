//! From a descriptor chain to a virtio-blk request (virtio 1.3 §5.2.6).
//!
//! The framing is the modern one: the header is the first 16 device-readable bytes and the status
//! the last device-writable byte, however the driver cuts either into descriptors.
//!
//! Invariants:
//! - a descriptor, an indirect table, a header and a list of ranges are each copied once and judged
//!   by the copy;
//! - a chain is an error only if no status can be returned through it; everything else that is wrong
//!   becomes a status;
//! - a chain is never cut short: it is taken whole or not at all.

use virtio_bindings::virtio_blk as blk;

use super::config_space::MAX_RANGES;
use super::copy::Fault;
use super::features::Features;
use super::memory::{HostRange, MemoryMap};
use super::ring::{ChainError, DESCRIPTOR_LEN, Descriptor, Ring};
use crate::units::SECTOR;
use crate::volume::{RequestKind, Status};

const HEADER_LEN: u64 = 16;
const RANGE_LEN: usize = 16;
/// Descriptors in an indirect table. More than a ring may have: Windows drivers send chains of 515
/// through rings of 128.
const TABLE_MAX: u32 = 1024;
/// Bytes one request may move. Far above what any driver builds (a thousand segments of 256 KiB),
/// far below what would let a guest keep a queue busy for minutes with one request.
const TRANSFER_MAX: u64 = 256 << 20;

/// A request, ready to be submitted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Parsed {
    /// Guest address of the status byte, in the guest's memory when it was parsed.
    pub status_at: u64,
    /// Bytes the driver will find written when all goes well, the status included.
    pub written: u32,
    /// What to do.
    pub action: Action,
}

/// What a request needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Action {
    /// Nothing: the answer is known.
    Answer(Status),
    /// One operation of the disk; the data, if any, is in the ranges the parser was given.
    Submit {
        /// Which.
        kind: RequestKind,
        /// First sector.
        sector: u64,
    },
    /// One operation for each of [`Parser::ranges`], of which there is at least one.
    SubmitRanges,
    /// The serial number into the ranges the parser was given.
    Identify,
}

/// One operation of a DISCARD or WRITE_ZEROES request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SectorOp {
    /// What to do with the sectors.
    pub kind: RequestKind,
    /// First of them.
    pub sector: u64,
}

/// A run of guest memory as a descriptor names it.
#[derive(Clone, Copy, Debug)]
struct Part {
    addr: u64,
    len: u32,
}

/// Parses chains; its vectors are used again for each.
#[derive(Debug, Default)]
pub(super) struct Parser {
    readable: Vec<Part>,
    writable: Vec<Part>,
    readable_len: u64,
    writable_len: u64,
    bytes: Vec<u8>,
    ranges: Vec<SectorOp>,
}

impl Parser {
    /// The operations of the last request whose action is [`Action::SubmitRanges`].
    pub fn ranges(&self) -> &[SectorOp] {
        &self.ranges
    }

    /// Parses the chain of `head`, which `ring` has just taken or recalled. `data` is cleared and
    /// gets the places of the data.
    ///
    /// # Errors
    /// The chain cannot carry a status.
    pub fn parse<R: Ring>(
        &mut self,
        ring: &R,
        memory: &MemoryMap,
        features: Features,
        head: u16,
        data: &mut Vec<HostRange>,
    ) -> Result<Parsed, ChainError> {
        data.clear();
        self.walk(ring, memory, features, head)?;
        let status_at = self.status_at().ok_or(ChainError::NoStatus)?;
        if !memory.contains(status_at, 1) {
            return Err(ChainError::StatusOutside);
        }
        let (action, moved) = self.action(memory, features, data);
        Ok(Parsed { status_at, written: moved + 1, action })
    }

    /// Collects the chain's parts.
    fn walk<R: Ring>(
        &mut self,
        ring: &R,
        memory: &MemoryMap,
        features: Features,
        head: u16,
    ) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        (self.readable_len, self.writable_len) = (0, 0);
        let mut index = ring.first(head);
        for _ in 0..ring.size() {
            let descriptor = ring.descriptor(index).map_err(|Fault| ChainError::Fault)?;
            if descriptor.is_indirect() {
                return match (features.indirect(), descriptor.has_next()) {
                    (false, _) => Err(ChainError::IndirectNotNegotiated),
                    (_, true) => Err(ChainError::IndirectWithNext),
                    _ => self.walk_table::<R>(memory, descriptor),
                };
            }
            self.push(descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next;
            if index >= ring.size() {
                return Err(ChainError::NextOutOfRange { next: index, table: ring.size() });
            }
        }
        Err(ChainError::TooLong)
    }

    /// Collects the parts in an indirect table.
    fn walk_table<R: Ring>(&mut self, memory: &MemoryMap, table: Descriptor) -> Result<(), ChainError> {
        let count = table.len / DESCRIPTOR_LEN as u32;
        if !table.len.is_multiple_of(DESCRIPTOR_LEN as u32) || count == 0 || count > TABLE_MAX {
            return Err(ChainError::IndirectLength { len: table.len });
        }
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.resize(table.len as usize, 0);
        let copied = memory.read(table.addr, &mut bytes).map_err(|Fault| ChainError::IndirectOutside);
        let walked = copied.and_then(|()| match R::PACKED {
            true => self.walk_packed_copy(&bytes),
            false => self.walk_copy(&bytes, count as u16),
        });
        self.bytes = bytes;
        walked
    }

    fn walk_copy(&mut self, table: &[u8], count: u16) -> Result<(), ChainError> {
        let mut index = 0;
        for _ in 0..count {
            let at = usize::from(index) * DESCRIPTOR_LEN;
            let mut bytes = [0; DESCRIPTOR_LEN];
            bytes.copy_from_slice(&table[at..at + DESCRIPTOR_LEN]);
            let descriptor = Descriptor::decode(&bytes);
            if descriptor.is_indirect() {
                return Err(ChainError::NestedIndirect);
            }
            self.push(descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next;
            if index >= count {
                return Err(ChainError::NextOutOfRange { next: index, table: count });
            }
        }
        Err(ChainError::TooLong)
    }

    /// A packed ring's table has no links: all of it is the chain (virtio 1.3 §2.8.7).
    fn walk_packed_copy(&mut self, table: &[u8]) -> Result<(), ChainError> {
        for entry in table.chunks_exact(DESCRIPTOR_LEN) {
            let mut bytes = [0; DESCRIPTOR_LEN];
            bytes.copy_from_slice(entry);
            let (descriptor, _) = Descriptor::decode_packed(&bytes, 0);
            if descriptor.is_indirect() {
                return Err(ChainError::NestedIndirect);
            }
            self.push(descriptor)?;
        }
        Ok(())
    }

    fn push(&mut self, descriptor: Descriptor) -> Result<(), ChainError> {
        let part = Part { addr: descriptor.addr, len: descriptor.len };
        if descriptor.is_writable() {
            self.writable.push(part);
            self.writable_len += u64::from(part.len);
        } else if self.writable.is_empty() {
            self.readable.push(part);
            self.readable_len += u64::from(part.len);
        } else {
            return Err(ChainError::ReadableAfterWritable);
        }
        if self.readable_len + self.writable_len > u64::from(u32::MAX) {
            return Err(ChainError::TooManyBytes);
        }
        Ok(())
    }

    /// Address of the last writable byte.
    fn status_at(&self) -> Option<u64> {
        let last = self.writable.iter().rfind(|part| part.len > 0)?;
        last.addr.checked_add(u64::from(last.len) - 1)
    }

    /// What the request asks for, and how many bytes of data it writes to the guest.
    fn action(&mut self, memory: &MemoryMap, features: Features, data: &mut Vec<HostRange>) -> (Action, u32) {
        const FAILED: (Action, u32) = (Action::Answer(Status::IoError), 0);
        let mut header = [0; HEADER_LEN as usize];
        if self.readable_len < HEADER_LEN || gather(&self.readable, 0, &mut header, memory).is_err() {
            return FAILED;
        }
        let header = u128::from_le_bytes(header);
        let (kind, sector) = (header as u32, (header >> 64) as u64);
        let room = self.writable_len - 1;
        let sent = self.readable_len - HEADER_LEN;
        let action = match kind {
            blk::VIRTIO_BLK_T_IN => {
                let action = transfer(RequestKind::Read, sector, &self.writable, 0, room, memory, data);
                return (action, room as u32);
            }
            blk::VIRTIO_BLK_T_OUT => {
                transfer(RequestKind::Write, sector, &self.readable, HEADER_LEN, sent, memory, data)
            }
            blk::VIRTIO_BLK_T_FLUSH if features.flush() => {
                Action::Submit { kind: RequestKind::Flush, sector: 0 }
            }
            blk::VIRTIO_BLK_T_GET_ID => {
                let len = room.min(u64::from(blk::VIRTIO_BLK_ID_BYTES));
                if len == 0 || !locate(&self.writable, 0, len, memory, data) {
                    return FAILED;
                }
                return (Action::Identify, len as u32);
            }
            blk::VIRTIO_BLK_T_DISCARD if features.discard() => self.sector_ops(true, sent, memory),
            blk::VIRTIO_BLK_T_WRITE_ZEROES if features.write_zeroes() => self.sector_ops(false, sent, memory),
            _ => Action::Answer(Status::Unsupported),
        };
        (action, 0)
    }

    /// Reads the `sent` bytes of ranges of a DISCARD or WRITE_ZEROES.
    fn sector_ops(&mut self, discard: bool, sent: u64, memory: &MemoryMap) -> Action {
        let len = sent as usize;
        if len == 0 || !len.is_multiple_of(RANGE_LEN) || len > MAX_RANGES as usize * RANGE_LEN {
            return Action::Answer(Status::IoError);
        }
        self.bytes.resize(len, 0);
        if gather(&self.readable, HEADER_LEN, &mut self.bytes, memory).is_err() {
            return Action::Answer(Status::IoError);
        }
        self.ranges.clear();
        for range in self.bytes.chunks_exact(RANGE_LEN) {
            let mut bytes = [0; RANGE_LEN];
            bytes.copy_from_slice(range);
            let word = u128::from_le_bytes(bytes);
            let (sector, sectors, flags) = (word as u64, (word >> 64) as u32, (word >> 96) as u32);
            // "If any flag but unmap is set, or unmap for a discard: UNSUPP" (§5.2.6.2).
            let unmap = flags & blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            if flags & !blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (discard && unmap) {
                return Action::Answer(Status::Unsupported);
            }
            let sectors = u64::from(sectors);
            if sectors > 0 {
                let kind = match discard {
                    true => RequestKind::Discard { sectors },
                    false => RequestKind::WriteZeroes { sectors, unmap },
                };
                self.ranges.push(SectorOp { kind, sector });
            }
        }
        if self.ranges.is_empty() { Action::Answer(Status::Ok) } else { Action::SubmitRanges }
    }
}

/// A read or write of `len` bytes from byte `skip` of `parts`.
fn transfer(
    kind: RequestKind,
    sector: u64,
    parts: &[Part],
    skip: u64,
    len: u64,
    memory: &MemoryMap,
    data: &mut Vec<HostRange>,
) -> Action {
    if len == 0 {
        return Action::Answer(Status::Ok);
    }
    if !len.is_multiple_of(SECTOR) || len > TRANSFER_MAX || !locate(parts, skip, len, memory, data) {
        data.clear();
        return Action::Answer(Status::IoError);
    }
    Action::Submit { kind, sector }
}

/// The pieces of `parts` that hold `len` bytes from byte `skip`: `visit` until it says false.
/// Whether it never did, and no piece ran past the end of the address space.
fn pieces(parts: &[Part], skip: u64, len: u64, mut visit: impl FnMut(u64, usize) -> bool) -> bool {
    let (mut skip, mut left) = (skip, len);
    for part in parts {
        if left == 0 {
            break;
        }
        let part_len = u64::from(part.len);
        if skip >= part_len {
            skip -= part_len;
            continue;
        }
        let piece = (part_len - skip).min(left);
        let Some(addr) = part.addr.checked_add(skip) else { return false };
        if !visit(addr, piece as usize) {
            return false;
        }
        (skip, left) = (0, left - piece);
    }
    left == 0
}

fn locate(parts: &[Part], skip: u64, len: u64, memory: &MemoryMap, data: &mut Vec<HostRange>) -> bool {
    pieces(parts, skip, len, |addr, len| memory.locate(addr, len, data))
}

fn gather(parts: &[Part], skip: u64, dst: &mut [u8], memory: &MemoryMap) -> Result<(), Fault> {
    let mut done = 0;
    let complete = pieces(parts, skip, dst.len() as u64, |addr, len| {
        let read = memory.read(addr, &mut dst[done..done + len]);
        done += len;
        read.is_ok()
    });
    if complete { Ok(()) } else { Err(Fault) }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
