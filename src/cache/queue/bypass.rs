//! Writes around the cache: every mode but write-back.
//!
//! Laws, in the order of the steps; each write
//! 1. registers its range: no overlapping one is in flight, and no miss that overlaps may fill;
//! 2. removes every cached copy from the index and makes it, and all it ever superseded, durably
//!    dead: a crash from here on must not bring one back over what the disk has by then;
//! 3. goes to the disk; without a write cache the disk is flushed as well;
//! 4. completes; write-through caches the bytes it wrote if nothing broke its registration.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;

use super::super::counters::add;
use super::super::env::{Clock, Env};
use super::super::record::EXTENT_SECTORS_MAX;
use super::super::stripes::Ticket;
use super::super::volume::Mode;
use super::io::Purpose;
use super::write::Books;
use super::{Fill, Gathered, Queue, Then};
use crate::backing::{AlignedBuf, Op};
use crate::mutant::{Mutant, mutated};
use crate::onmedia::KeyKind;
use crate::units::SectorRange;
use crate::volume::Buffer;

/// Longest single write to the disk, in bytes.
const WRITE_MAX: usize = 1 << 20;

/// One write around the cache, from its registration to its end.
struct Bypass {
    range: SectorRange,
    kind: KeyKind,
    ticket: Ticket,
    /// Drawn before the disk write was issued.
    version: u64,
    /// Whether the disk is flushed before it completes.
    is_through: bool,
    /// Disk operations under way.
    left: u32,
    failed: bool,
    /// What was written, for write-through: byte offset in the request, and the bytes.
    written: Vec<(usize, AlignedBuf)>,
}

#[derive(Default)]
pub(crate) struct Bypasses {
    under_way: HashMap<u32, Bypass>,
    /// Waiting for an overlapping one to end, and since when.
    blocked: VecDeque<(u64, Gathered)>,
    /// Ended for the guest while the disk had operations of them: how many, and the registration that
    /// lasts until they have ended.
    late: HashMap<u64, (u32, Ticket, SectorRange)>,
    lates: u64,
}

impl Bypasses {
    pub fn is_blocked(&self) -> bool {
        !self.blocked.is_empty()
    }

    /// Takes the registrations of those that have operations with the disk.
    pub fn take_under_way(&mut self) -> Vec<(Ticket, SectorRange)> {
        let under_way = self.under_way.extract_if(|_, bypass| bypass.left > 0);
        let under_way = under_way.map(|(_, bypass)| (bypass.ticket, bypass.range));
        under_way.chain(self.late.drain().map(|(_, (_, ticket, range))| (ticket, range))).collect()
    }

    /// Since when the oldest of the blocked ones has waited.
    pub fn oldest_blocked_ms(&self) -> Option<u64> {
        self.blocked.iter().map(|(since, _)| *since).min()
    }

    /// Takes the requests that have been blocked since `since_ms` or longer.
    pub fn take_blocked(&mut self, since_ms: u64) -> Vec<u32> {
        let (taken, kept): (VecDeque<_>, _) =
            self.blocked.drain(..).partition(|(since, _): &(u64, Gathered)| *since <= since_ms);
        self.blocked = kept;
        taken.into_iter().map(|(_, gathered)| gathered.slot).collect()
    }

    /// A name for the next that becomes late.
    pub fn next_late(&mut self) -> u64 {
        self.lates += 1;
        self.lates
    }

    /// The guest waits for it no longer, but the disk has `out` operations of it. Without any its
    /// registration is given back.
    pub fn make_late(&mut self, slot: u32, name: u64, out: u32) -> Option<(Ticket, SectorRange)> {
        let Bypass { ticket, range, .. } = self.under_way.remove(&slot).expect("under way");
        if out == 0 {
            return Some((ticket, range));
        }
        self.late.insert(name, (out, ticket, range));
        None
    }

    /// One of its operations has ended. With the last its registration is given back.
    pub fn late_ended(&mut self, name: u64) -> Option<(Ticket, SectorRange)> {
        let (out, ticket, range) = self.late.get_mut(&name)?;
        *out -= 1;
        let ended = (*out == 0).then_some((*ticket, *range));
        if ended.is_some() {
            self.late.remove(&name);
        }
        ended
    }
}

impl<E: Env, B: Buffer> Queue<E, B> {
    pub(super) fn start_bypasses(&mut self) {
        let blocked = std::mem::take(&mut self.bypass.blocked);
        for (since, gathered) in blocked {
            self.start_bypass(gathered, Some(since));
        }
        for gathered in std::mem::take(&mut self.gather) {
            self.start_bypass(gathered, None);
        }
    }

    /// Writes that waited for others around the cache go into it, since the mode has changed.
    pub(super) fn gather_blocked(&mut self) {
        while let Some((_, gathered)) = self.bypass.blocked.pop_back() {
            self.gather.push_front(gathered);
        }
    }

    fn start_bypass(&mut self, gathered: Gathered, blocked_since: Option<u64>) {
        let (slot, range) = (gathered.slot, gathered.range);
        let core = &self.volume.core;
        let stripes = &mut self.scratch.stripes;
        let ticket = core.stripes.bypass(range, stripes).or_else(|| {
            core.queue(self.index).waiting.store(true, Ordering::SeqCst);
            // What it would wait for may have ended just before that, and told nobody.
            core.stripes.bypass(range, stripes)
        });
        let Some(ticket) = ticket else {
            let since = blocked_since.unwrap_or_else(|| self.volume.cache.clock.now_ms());
            self.bypass.blocked.push_back((since, gathered));
            if self.volume.core.policy.deadline_ms().is_some() && !self.shared().alarm.is_set() {
                self.set_alarm();
            }
            return;
        };
        let version = core.version.fetch_add(1, Ordering::SeqCst);
        let mut removed = std::mem::take(&mut self.scratch.replaced);
        removed.clear();
        if !mutated(Mutant::BypassLeavesCopies) {
            core.index.remove(range, &mut removed);
        }
        self.volume.cache.mark_dead(&removed);
        let Gathered { kind, is_through, .. } = gathered;
        let mut books = Books::default();
        books.note_replaced(kind, &removed);
        books.close(&self.shared().tally);
        self.scratch.replaced = removed;
        let (left, failed, written) = (0, false, Vec::new());
        let bypass = Bypass { range, kind, ticket, version, is_through, left, failed, written };
        self.bypass.under_way.insert(slot, bypass);
        add(&self.shared().tally.bypass_sectors, range.len);
        if mutated(Mutant::BypassNotDurablyDead) {
            return self.bypass_killed(slot, true);
        }
        match self.volume.cache.write_liveness(Some(&self.waker)) {
            Ok(durable) => self.when_durable(durable, Then::Bypass(slot)),
            Err(error) => {
                tracing::error!(volume = self.volume.name, %error, "cannot make a cached copy dead: the write fails");
                self.end_bypass(slot, false);
            }
        }
    }

    /// The cached copies are durably dead (or never will be): write to the disk.
    pub(super) fn bypass_killed(&mut self, slot: u32, durable: bool) {
        let bypass = self.bypass.under_way.get_mut(&slot).expect("registered before it was killed");
        bypass.left = 1;
        let (range, kind) = (bypass.range, bypass.kind);
        if !durable {
            return self.bypass_part(slot, false);
        }
        if kind != KeyKind::Data {
            let unmap = kind == KeyKind::Discard && self.volume.pass_discard;
            let op = Op::Zero { offset: range.start * 512, len: range.len * 512, unmap };
            self.bypass_submit(slot, op);
            return self.bypass_part(slot, true);
        }
        let bytes = range.len as usize * 512;
        for at in (0..bytes).step_by(WRITE_MAX) {
            let mut buf = self.io.buffer((bytes - at).min(WRITE_MAX));
            if self.slots.get(slot).request.data.copy_out(at, &mut buf).is_err() {
                return self.bypass_part(slot, false);
            }
            self.bypass_submit(slot, Op::Write { offset: range.start * 512 + at as u64, buf });
        }
        self.bypass_part(slot, true);
    }

    fn bypass_submit(&mut self, slot: u32, op: Op) {
        self.bypass.under_way.get_mut(&slot).expect("under way").left += 1;
        if self.submit_io(Purpose::Bypass { slot }, op).is_err() {
            self.bypass_part(slot, false);
        }
    }

    /// An operation on the disk has ended.
    pub(super) fn bypass_written(&mut self, slot: u32, op: Op, ok: bool) {
        if let Op::Write { offset, buf } = op {
            let bypass = self.bypass.under_way.get_mut(&slot).expect("under way");
            if self.volume.mode() == Mode::Writethrough {
                bypass.written.push(((offset - bypass.range.start * 512) as usize, buf));
            } else {
                self.io.recycle(buf);
            }
        }
        self.bypass_part(slot, ok);
    }

    fn bypass_part(&mut self, slot: u32, ok: bool) {
        let bypass = self.bypass.under_way.get_mut(&slot).expect("under way");
        bypass.failed |= !ok;
        bypass.left -= 1;
        if bypass.left > 0 {
            return;
        }
        if bypass.failed || !bypass.is_through || mutated(Mutant::BypassUnflushed) {
            let ok = !bypass.failed;
            return self.end_bypass(slot, ok);
        }
        let purpose = Purpose::BypassFlush { slot };
        if self.submit_io(purpose, Op::Flush).is_err() {
            self.end_bypass(slot, false);
        }
    }

    pub(super) fn bypass_flushed(&mut self, slot: u32, ok: bool) {
        self.end_bypass(slot, ok);
    }

    fn end_bypass(&mut self, slot: u32, ok: bool) {
        let bypass = self.bypass.under_way.remove(&slot).expect("ends once");
        let Bypass { range, ticket, version, written, .. } = bypass;
        if ok && self.volume.mode() == Mode::Writethrough && !written.is_empty() {
            self.fill_written(range, ticket, version, written);
        } else {
            written.into_iter().for_each(|(_, buf)| self.io.recycle(buf));
            self.volume.core.stripes.remove(ticket, range);
        }
        self.volume.core.wake_waiting();
        self.slots.get(slot).left = 1;
        self.part_done(slot, ok);
    }

    /// Caches what write-through has written. One registration covers all the pieces; the last
    /// piece carries it and the others borrow it, so it is removed after them.
    fn fill_written(
        &mut self,
        range: SectorRange,
        ticket: Ticket,
        version: u64,
        written: Vec<(usize, AlignedBuf)>,
    ) {
        let longest = self.volume.cache.piece_sectors_max().min(EXTENT_SECTORS_MAX);
        let mut pieces = Vec::new();
        for (base, buf) in &written {
            let (mut at, len) = (0, buf.len() as u64 / 512);
            while at < len {
                let start = range.start + *base as u64 / 512 + at;
                let in_region =
                    super::super::index::REGION_SECTORS - start % super::super::index::REGION_SECTORS;
                let n = (len - at).min(longest).min(in_region);
                let mut piece = self.io.buffer(n as usize * 512);
                piece.copy_from_slice(&buf[at as usize * 512..][..n as usize * 512]);
                pieces.push((SectorRange::new(start, n), piece));
                at += n;
            }
        }
        written.into_iter().for_each(|(_, buf)| self.io.recycle(buf));
        let last = pieces.len() - 1;
        for (i, (piece, buf)) in pieces.into_iter().enumerate() {
            let carries = (i == last).then_some(range);
            self.fills.push_back(Fill { range: piece, at: 0, buf, version, ticket, registered: carries });
        }
    }

    /// Gives up what is under way: the queue is going away.
    pub(super) fn abandon(&mut self) {
        for purpose in self.io.drain_purposes() {
            if let Purpose::Miss { range, fill: Some((ticket, _)), .. } = purpose {
                self.volume.core.stripes.remove(ticket, range);
            }
        }
        for (_, bypass) in self.bypass.under_way.drain() {
            self.volume.core.stripes.remove(bypass.ticket, bypass.range);
        }
        for (_, (_, ticket, range)) in self.bypass.late.drain() {
            self.volume.core.stripes.remove(ticket, range);
        }
        for fill in self.fills.drain(..) {
            if let Some(registered) = fill.registered {
                self.volume.core.stripes.remove(fill.ticket, registered);
            }
        }
    }
}
