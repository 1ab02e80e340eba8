//! The driver's side of one split virtqueue (virtio 1.3 §2.7), or of a packed one by what `packed`
//! knows of it: requests, buffers and canaries are the same.
//!
//! Invariants checked at every used element: its id is the head of an outstanding chain, `len` does
//! not exceed what was writable, and the canaries beside every piece are whole. The used index never
//! runs ahead of what is outstanding.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::arena::Arena;
use super::memory::Memory;
use super::packed::Packed;
use super::request::{Completion, Layout, OK, Request, UNTOUCHED};
use super::wire::{longs, words};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Bytes of canary on each side of a piece.
const CANARY: usize = 16;
const CANARY_BYTE: u8 = 0xc7;
/// What unwritten data buffers hold.
const STALE: u8 = 0x5e;

/// A descriptor as it stands in a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Descriptor {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    /// A piece the device reads.
    pub fn readable(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: 0, next: 0 }
    }

    /// A piece the device writes.
    pub fn writable(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: WRITE, next: 0 }
    }

    /// A table of descriptors.
    pub fn indirect(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: INDIRECT, next: 0 }
    }

    /// The 16 bytes.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A buffer of a request with its canaries.
#[derive(Clone, Copy, Debug)]
struct Piece {
    addr: u64,
    len: usize,
}

/// A chain the device has not used yet.
#[derive(Debug)]
struct Outstanding {
    tag: u64,
    /// What it is, for whoever has to find out why it hangs.
    what: String,
    heads: Vec<u16>,
    readable: Vec<Piece>,
    writable: Vec<Piece>,
    table: Option<(u64, u64)>,
}

impl Outstanding {
    fn writable_len(&self) -> usize {
        self.writable.iter().map(|piece| piece.len).sum()
    }
}

/// One virtqueue with memory of its own to put requests in.
#[derive(Debug)]
pub struct Queue {
    pub index: u16,
    pub size: u16,
    /// Guest-physical addresses of the three areas.
    pub desc_at: u64,
    pub avail_at: u64,
    pub used_at: u64,
    pub kick: EventFd,
    pub call: EventFd,
    pub err: EventFd,
    pub event_idx: bool,
    /// Kicks written and left out, calls taken: what notification suppression is worth.
    pub kicks: u64,
    pub kicks_spared: u64,
    pub calls: u64,
    /// Where a packed ring stands; `None` for a split one.
    pub packed: Option<Packed>,
    memory: Arc<Memory>,
    arena: Arena,
    /// Descriptors of a split ring, ids of a packed one.
    free: Vec<u16>,
    outstanding: Vec<Option<Outstanding>>,
    count: usize,
    avail: u16,
    published: u16,
    used: u16,
}

impl Queue {
    /// A queue with its rings and buffers in `ranges` of guest-physical memory.
    pub fn new(
        memory: Arc<Memory>,
        index: u16,
        size: u16,
        ranges: impl IntoIterator<Item = (u64, u64)>,
    ) -> Self {
        let mut arena = Arena::new(ranges);
        let mut area = |len: u64, align| {
            let at = arena.alloc(len, align).expect("the rings fit into the guest's memory");
            memory.fill(at, 0, len as usize);
            at
        };
        let n = u64::from(size);
        let (desc_at, avail_at, used_at) = (area(16 * n, 16), area(6 + 2 * n, 4), area(6 + 8 * n, 4));
        let event = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        Self {
            index,
            size,
            desc_at,
            avail_at,
            used_at,
            kick: event(),
            call: event(),
            err: event(),
            event_idx: false,
            kicks: 0,
            kicks_spared: 0,
            calls: 0,
            packed: None,
            memory,
            arena,
            free: (0..size).rev().collect(),
            outstanding: (0..size).map(|_| None).collect(),
            count: 0,
            avail: 0,
            published: 0,
            used: 0,
        }
    }

    /// Requests the device has not used yet.
    pub fn outstanding(&self) -> usize {
        self.count
    }

    /// What they are.
    pub fn describe_outstanding(&self) -> Vec<String> {
        self.outstanding.iter().flatten().map(|request| request.what.clone()).collect()
    }

    /// The index of the next entry of the available ring to fill, as the device knows it.
    pub fn avail_index(&self) -> u16 {
        self.published
    }

    /// The used index as it stands in memory.
    pub fn used_index(&self) -> u16 {
        self.memory.load(self.used_at + 2)
    }

    fn piece(&mut self, len: usize, odd: u64) -> Option<Piece> {
        let whole = (len + 2 * CANARY) as u64 + odd;
        let at = self.arena.alloc(whole, 64)?;
        // The oddness is kept by alignment: it is found again as the offset from the last multiple.
        let piece = Piece { addr: at + CANARY as u64 + odd, len };
        self.memory.fill(piece.addr - CANARY as u64, CANARY_BYTE, CANARY);
        self.memory.fill(piece.addr + len as u64, CANARY_BYTE, CANARY);
        Some(piece)
    }

    fn free_piece(&mut self, piece: Piece) {
        let first = piece.addr - CANARY as u64;
        let odd = first % 64;
        self.arena.free(first - odd, (piece.len + 2 * CANARY) as u64 + odd);
    }

    fn pieces(&mut self, lens: &[usize], got: &mut Vec<Piece>) -> bool {
        lens.iter().all(|len| {
            // Buffers begin at every alignment that a guest may use, single bytes included.
            let odd = [0, 0, 1, 8, 33][(self.avail as usize + got.len()) % 5];
            self.piece(*len, odd).map(|piece| got.push(piece)).is_some()
        })
    }

    /// Puts a request into the available ring without telling the device. Says whether there was room.
    pub fn submit(&mut self, tag: u64, request: &Request, layout: &Layout) -> bool {
        let bytes = request.readable();
        assert_eq!(layout.readable.iter().sum::<usize>(), bytes.len(), "the layout is of this request");
        assert_eq!(
            layout.writable.iter().sum::<usize>(),
            request.in_len + 1,
            "the layout is of this request"
        );
        let slots = if layout.indirect { 1 } else { layout.len() };
        assert!(slots <= self.size as usize, "a chain is no longer than its ring");
        let room = self.packed.as_ref().map_or(self.free.len(), |packed| usize::from(packed.free));
        if room < slots {
            return false;
        }
        let (mut readable, mut writable, mut table) = (Vec::new(), Vec::new(), None);
        let mut room =
            self.pieces(&layout.readable, &mut readable) && self.pieces(&layout.writable, &mut writable);
        if room && layout.indirect {
            let len = 16 * layout.len() as u64;
            table = self.arena.alloc(len, 16).map(|at| (at, len));
            room = table.is_some();
        }
        if !room {
            readable.into_iter().chain(writable).for_each(|piece| self.free_piece(piece));
            return false;
        }

        let mut at = 0;
        for piece in &readable {
            self.memory.write(piece.addr, &bytes[at..at + piece.len]);
            at += piece.len;
        }
        for piece in &writable {
            self.memory.fill(piece.addr, STALE, piece.len);
        }
        let status = writable.last().expect("there is always a status byte");
        self.memory.write(status.addr + status.len as u64 - 1, &[UNTOUCHED]);

        let mut chain: Vec<Descriptor> =
            readable.iter().map(|p| Descriptor::readable(p.addr, p.len as u32)).collect();
        chain.extend(writable.iter().map(|p| Descriptor::writable(p.addr, p.len as u32)));
        if let Some((table, len)) = table {
            self.write_table(table, &mut chain);
            chain = vec![Descriptor::indirect(table, len as u32)];
        }
        let heads = self.place(&mut chain);
        let what = format!("{tag}: {}", request.describe());
        self.track(heads, Outstanding { tag, what, heads: Vec::new(), readable, writable, table });
        true
    }

    /// Writes an indirect table at `at`, each entry linked to the next.
    pub fn write_table(&self, at: u64, chain: &mut [Descriptor]) {
        if self.packed.is_some() {
            // Its flags lie where a split one has its links, and all of it is the chain.
            for (i, descriptor) in chain.iter().enumerate() {
                let bytes = Descriptor { flags: 0, next: descriptor.flags, ..*descriptor }.to_bytes();
                self.memory.write(at + 16 * i as u64, &bytes);
            }
            return;
        }
        let last = chain.len() - 1;
        for (i, descriptor) in chain.iter_mut().enumerate() {
            if i < last {
                descriptor.flags |= NEXT;
                descriptor.next = i as u16 + 1;
            }
            self.memory.write(at + 16 * i as u64, &descriptor.to_bytes());
        }
    }

    /// Writes descriptors into free slots of the ring's table, each linked to the next.
    fn place(&mut self, chain: &mut [Descriptor]) -> Vec<u16> {
        if let Some(packed) = &mut self.packed {
            let id = self.free.pop().expect("there are as many ids as slots");
            packed.place(&self.memory, self.desc_at, id, chain);
            return vec![id];
        }
        let slots: Vec<u16> = chain.iter().map(|_| self.free.pop().expect("there is room")).collect();
        for (i, descriptor) in chain.iter_mut().enumerate() {
            if let Some(next) = slots.get(i + 1) {
                descriptor.flags |= NEXT;
                descriptor.next = *next;
            }
            self.write_descriptor(slots[i], *descriptor);
        }
        slots
    }

    fn track(&mut self, heads: Vec<u16>, mut outstanding: Outstanding) {
        let head = heads[0];
        outstanding.heads = heads;
        assert!(self.outstanding[head as usize].is_none(), "free descriptors are not outstanding");
        self.outstanding[head as usize] = Some(outstanding);
        self.count += 1;
        self.offer(head);
    }

    /// Puts a chain of the caller's own making into the available ring: nothing about it is checked.
    pub fn submit_raw(&mut self, tag: u64, chain: &[Descriptor]) {
        let heads = self.place(&mut chain.to_vec());
        let what = format!("{tag}: made by hand");
        let (readable, writable) = (Vec::new(), Vec::new());
        self.track(heads, Outstanding { tag, what, heads: Vec::new(), readable, writable, table: None });
    }

    /// The same with a good header for `sector` in front and a status byte behind; returns where that is.
    pub fn submit_framed(&mut self, tag: u64, code: u32, sector: u64, middle: &[Descriptor]) -> u64 {
        let (header, status) = (self.alloc(16), self.alloc(16));
        self.memory.write(header, &[words(&[code, 0]), longs(&[sector])].concat());
        self.memory.write(status, &[UNTOUCHED]);
        let mut chain = vec![Descriptor::readable(header, 16)];
        chain.extend(middle);
        chain.push(Descriptor::writable(status, 1));
        self.submit_raw(tag, &chain);
        status
    }

    /// Overwrites one slot of the descriptor table.
    pub fn write_descriptor(&self, slot: u16, descriptor: Descriptor) {
        assert!(slot < self.size, "the table has {} slots", self.size);
        self.memory.write(self.desc_at + 16 * u64::from(slot), &descriptor.to_bytes());
    }

    /// Writes any head into the next entry of the available ring.
    pub fn offer(&mut self, head: u16) {
        if self.packed.is_some() {
            return;
        }
        let slot = u64::from(self.avail % self.size);
        self.memory.store(self.avail_at + 4 + 2 * slot, head);
        self.avail = self.avail.wrapping_add(1);
    }

    /// Writes descriptors into the next slots of a packed ring and makes them available, each under
    /// an id of its own: nothing about them is checked, and the driver does not know of them.
    pub fn offer_packed(&mut self, slots: &[(Descriptor, u16)]) {
        let packed = self.packed.as_ref().expect("a packed ring");
        for (skip, (descriptor, id)) in slots.iter().enumerate().rev() {
            let (slot, available) = packed.slot_and_flags(skip as u16);
            let flags = descriptor.flags | available;
            self.write_descriptor(slot, Descriptor { flags: *id, next: flags, ..*descriptor });
        }
    }

    /// Makes the available index run ahead without entries.
    pub fn jump(&mut self, by: u16) {
        self.avail = self.avail.wrapping_add(by);
    }

    /// A piece of this queue's memory for chains of the caller's own making.
    pub fn alloc(&mut self, len: u64) -> u64 {
        let at = self.arena.alloc(len, 16).expect("the guest's memory has room");
        self.memory.fill(at, 0, len as usize);
        at
    }

    /// Takes back what [`Queue::alloc`] gave.
    pub fn free_raw(&mut self, at: u64, len: u64) {
        self.arena.free(at, len);
    }

    /// Publishes what was submitted, and kicks if the device asks for it.
    pub fn publish(&mut self) {
        if let Some(packed) = &mut self.packed {
            let passed = packed.publish(&self.memory, self.desc_at);
            if passed == 0 {
                return;
            }
            fence(Ordering::SeqCst);
            if packed.wants_kick(&self.memory, self.used_at, passed) {
                self.kick();
            } else {
                self.kicks_spared += 1;
            }
            return;
        }
        let old = self.published;
        self.store_avail();
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.memory.load(self.used_at + 4 + 8 * u64::from(self.size));
            self.avail.wrapping_sub(event).wrapping_sub(1) < self.avail.wrapping_sub(old)
        } else {
            self.memory.load(self.used_at) & 1 == 0
        };
        if wanted && old != self.avail {
            self.kick();
        } else {
            self.kicks_spared += 1;
        }
    }

    /// Publishes what was submitted without a kick.
    pub fn store_avail(&mut self) {
        self.memory.store(self.avail_at + 2, self.avail);
        self.published = self.avail;
    }

    /// Writes the kick eventfd.
    pub fn kick(&mut self) {
        self.kick.write(1).expect("the kick can be written");
        self.kicks += 1;
    }

    /// Says that completions are polled for: no call is wanted.
    pub fn disarm(&self) {
        if self.packed.is_some() {
            return self.memory.store(self.avail_at + 2, 1);
        }
        if self.event_idx {
            // As far behind as it gets: the device passes it only after 65535 more completions.
            self.memory.store(self.avail_at + 4 + 2 * u64::from(self.size), self.used.wrapping_sub(1));
        } else {
            self.memory.store(self.avail_at, 1);
        }
    }

    /// Asks for a call at the next completion. False: there is one already.
    pub fn arm(&self) -> bool {
        if let Some(packed) = &self.packed {
            packed.arm(&self.memory, self.avail_at, self.event_idx);
            fence(Ordering::SeqCst);
            return packed.next_used(&self.memory, self.desc_at).is_none();
        }
        if self.event_idx {
            self.memory.store(self.avail_at + 4 + 2 * u64::from(self.size), self.used);
        } else {
            self.memory.store(self.avail_at, 0);
        }
        fence(Ordering::SeqCst);
        self.used_index() == self.used
    }

    /// Asks for a call once `count` more chains are used, each of which has one slot.
    pub fn arm_after(&self, count: u16) {
        assert!(self.event_idx && count > 0);
        if let Some(packed) = &self.packed {
            return packed.arm_after(&self.memory, self.avail_at, count - 1);
        }
        let event = self.used.wrapping_add(count - 1);
        self.memory.store(self.avail_at + 4 + 2 * u64::from(self.size), event);
    }

    /// Takes a call that may have come.
    pub fn take_call(&mut self) {
        if let Ok(calls) = self.call.read() {
            self.calls += calls;
        }
    }

    /// Collects what the device has used since the last look.
    pub fn collect(&mut self, done: &mut Vec<Completion>) {
        if self.packed.is_some() {
            return self.collect_packed(done);
        }
        let used = self.used_index();
        let new = used.wrapping_sub(self.used);
        assert!(
            usize::from(new) <= self.count,
            "ring {}: the used index went from {} to {used} with {} outstanding",
            self.index,
            self.used,
            self.count
        );
        while self.used != used {
            let mut element = [0; 8];
            self.memory.read(self.used_at + 4 + 8 * u64::from(self.used % self.size), &mut element);
            let id = u32::from_le_bytes(element[..4].try_into().expect("four bytes"));
            let len = u32::from_le_bytes(element[4..].try_into().expect("four bytes"));
            done.push(self.complete(id, len));
            self.used = self.used.wrapping_add(1);
        }
    }

    fn collect_packed(&mut self, done: &mut Vec<Completion>) {
        while let Some((id, len)) =
            self.packed.as_ref().and_then(|packed| packed.next_used(&self.memory, self.desc_at))
        {
            done.push(self.complete(u32::from(id), len));
            self.packed.as_mut().expect("it was there").take_back(id);
            self.used = self.used.wrapping_add(1);
        }
    }

    /// Where the ring stands as SET_VRING_BASE is to say it: a VMM that lost its server does not
    /// know where a packed ring is, and says where it began.
    pub fn base(&self, is_available: bool) -> u32 {
        match &self.packed {
            Some(packed) if is_available => packed.position(),
            Some(_) => 0x8000_8000,
            None if is_available => self.avail_index().into(),
            None => self.used_index().into(),
        }
    }

    fn complete(&mut self, id: u32, used_len: u32) -> Completion {
        let slot = self.outstanding.get_mut(id as usize).and_then(Option::take);
        let Some(request) = slot else {
            panic!("ring {}: used id {id} is not outstanding (entry {})", self.index, self.used);
        };
        self.count -= 1;
        let mut data = vec![0; request.writable_len()];
        let mut at = 0;
        for piece in &request.writable {
            self.memory.read(piece.addr, &mut data[at..at + piece.len]);
            at += piece.len;
        }
        let status = data.pop().unwrap_or(UNTOUCHED);
        if !request.writable.is_empty() {
            let room = data.len() + 1;
            assert!(used_len as usize <= room, "used.len is {used_len} of {room} writable bytes");
            if status == OK {
                assert_eq!(used_len as usize, room, "used.len is what a successful request wrote");
            }
        }
        for piece in request.readable.iter().chain(&request.writable) {
            self.check_canaries(*piece);
        }
        request.readable.into_iter().chain(request.writable).for_each(|piece| self.free_piece(piece));
        if let Some((at, len)) = request.table {
            self.arena.free(at, len);
        }
        self.free.extend(request.heads);
        Completion { tag: request.tag, status, used_len, data }
    }

    fn check_canaries(&self, piece: Piece) {
        let mut canary = [0; CANARY];
        for at in [piece.addr - CANARY as u64, piece.addr + piece.len as u64] {
            self.memory.read(at, &mut canary);
            assert_eq!(
                canary, [CANARY_BYTE; CANARY],
                "the device wrote beside the buffer at {:#x}",
                piece.addr
            );
        }
    }

    /// Forgets everything, as a driver does that resets its device.
    pub fn reset(&mut self) {
        for outstanding in std::mem::take(&mut self.outstanding).into_iter().flatten() {
            let Outstanding { readable, writable, table, .. } = outstanding;
            readable.into_iter().chain(writable).for_each(|piece| self.free_piece(piece));
            if let Some((at, len)) = table {
                self.arena.free(at, len);
            }
        }
        self.outstanding = (0..self.size).map(|_| None).collect();
        self.free = (0..self.size).rev().collect();
        (self.count, self.avail, self.published, self.used) = (0, 0, 0, 0);
        let n = usize::from(self.size);
        self.memory.fill(self.desc_at, 0, 16 * n);
        self.memory.fill(self.avail_at, 0, 6 + 2 * n);
        self.memory.fill(self.used_at, 0, 6 + 8 * n);
        self.packed = self.packed.take().map(|_| Packed::new(self.size));
    }

    /// The call eventfd, for `poll`.
    pub fn call_fd(&self) -> RawFd {
        self.call.as_raw_fd()
    }
}
