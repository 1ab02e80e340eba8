//! The queue's operations on the backing disk: numbered, submitted, and matched on completion.

use std::collections::VecDeque;
use std::sync::Arc;

use super::super::env::{Clock, Env};
use super::super::ghost;
use super::super::health::Submitted;
use super::super::latency::Stage;
use super::super::stripes::Ticket;
use super::Queue;
use super::parked::Parked;
use crate::backing::{AlignedBuf, Backing, Channel, Completion, Op};
use crate::units::SectorRange;
use crate::volume::Buffer;
use crate::wake::Waker;

/// Operations in flight per queue: what a fast disk needs to be busy.
const DEPTH: u32 = 64;
/// Buffers kept for reuse.
const SPARE_BUFFERS: usize = 64;

/// A part of a read that another's operation brings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Joined {
    pub slot: u32,
    pub range: SectorRange,
}

/// What an operation was for.
#[derive(Debug)]
pub(crate) enum Purpose {
    /// A gap of a read. `fill`: its placeholder and the version taken before it was issued. `joined`:
    /// other reads that wait for parts of the same bytes.
    Miss { slot: u32, range: SectorRange, fill: Option<(Ticket, u64)>, joined: Vec<Joined> },
    /// Part of a write around the cache.
    Bypass { slot: u32 },
    /// The flush after a write around the cache, for a guest without a write cache.
    BypassFlush { slot: u32 },
    /// A guest's FLUSH.
    Flush { slot: u32 },
    /// Nobody's any more: the guest was answered. `bypass` names the registration that lasts with it.
    Late { bypass: Option<u64> },
}

impl Purpose {
    /// The request it is part of.
    fn slot(&self) -> Option<u32> {
        match *self {
            Purpose::Miss { slot, .. }
            | Purpose::Bypass { slot }
            | Purpose::BypassFlush { slot }
            | Purpose::Flush { slot } => Some(slot),
            Purpose::Late { .. } => None,
        }
    }

    /// What its time is counted as. That of a late one says how patient we were, not how the disk is.
    fn stage(&self) -> Option<Stage> {
        match self {
            Purpose::Miss { .. } => Some(Stage::DiskRead),
            Purpose::Bypass { .. } => Some(Stage::DiskWrite),
            Purpose::BypassFlush { .. } | Purpose::Flush { .. } => Some(Stage::DiskFlush),
            Purpose::Late { .. } => None,
        }
    }
}

pub(crate) struct Io<E: Env> {
    channel: Option<<E::Backing as Backing>::Channel>,
    /// By token; with the tries that failed before.
    purposes: Vec<Option<(Purpose, u32)>>,
    /// By token: when it was submitted.
    since_ns: Vec<u64>,
    free: Vec<u32>,
    /// Not yet accepted by the channel.
    backlog: VecDeque<(u64, Op)>,
    completions: Vec<Completion>,
    spare: Vec<AlignedBuf>,
    submitted: Submitted,
    /// Operations out that nobody waits for.
    late_count: u32,
    /// Failed, to be tried again.
    pub parked: Vec<Parked>,
}

impl<E: Env> Default for Io<E> {
    fn default() -> Self {
        Self {
            channel: None,
            purposes: Vec::new(),
            since_ns: Vec::new(),
            free: Vec::new(),
            backlog: VecDeque::new(),
            completions: Vec::new(),
            spare: Vec::new(),
            submitted: Submitted::default(),
            late_count: 0,
            parked: Vec::new(),
        }
    }
}

impl<E: Env> Io<E> {
    /// Starts an operation.
    ///
    /// # Errors
    /// The channel could not be opened; purpose and operation come back.
    fn submit(
        &mut self,
        now: (u64, u64),
        backing: &Arc<E::Backing>,
        waker: &Waker,
        purpose: Purpose,
        op: Op,
        tries: u32,
    ) -> Result<(), (Purpose, Op)> {
        if self.channel.is_none() {
            match backing.channel(waker, DEPTH) {
                Ok(channel) => self.channel = Some(channel),
                Err(error) => {
                    tracing::error!(%error, "cannot open a channel to the backing disk");
                    return Err((purpose, op));
                }
            }
        }
        let token = match self.free.pop() {
            Some(token) => token,
            None => {
                self.purposes.push(None);
                self.since_ns.push(0);
                (self.purposes.len() - 1) as u32
            }
        };
        self.purposes[token as usize] = Some((purpose, tries));
        let (now_ms, now_ns) = now;
        self.since_ns[token as usize] = now_ns;
        self.submitted.begin(token, now_ms);
        self.backlog.push_back((u64::from(token), op));
        self.push_backlog();
        Ok(())
    }

    fn push_backlog(&mut self) {
        let Some(channel) = &mut self.channel else { return };
        while let Some((token, op)) = self.backlog.pop_front() {
            if let Err(op) = channel.submit(token, op) {
                self.backlog.push_front((token, op));
                return;
            }
        }
    }

    /// Hands what was accepted to the kernel.
    pub fn kick(&mut self) {
        if let Some(channel) = &mut self.channel {
            channel.kick();
        }
    }

    /// What has completed since the last call.
    pub fn reap(&mut self) -> Vec<Completion> {
        let mut completions = std::mem::take(&mut self.completions);
        if let Some(channel) = &mut self.channel
            && channel.in_flight() > 0
        {
            channel.reap(&mut completions);
            if !completions.is_empty() {
                self.push_backlog();
            }
        }
        completions
    }

    /// Takes the list back for reuse.
    pub fn recycle_list(&mut self, mut completions: Vec<Completion>) {
        completions.clear();
        self.completions = completions;
    }

    /// What an operation that has ended was for, and the tries that failed before.
    pub fn purpose(&mut self, token: u64) -> (Purpose, u32) {
        self.free.push(token as u32);
        self.submitted.end(token as u32);
        let ended = self.purposes[token as usize].take().expect("an operation completes once");
        self.late_count -= u32::from(matches!(ended.0, Purpose::Late { .. }));
        ended
    }

    /// Every purpose whose operation has not completed.
    pub fn drain_purposes(&mut self) -> Vec<Purpose> {
        self.backlog.clear();
        self.channel = None;
        let parked = self.parked.drain(..).map(Parked::into_purpose);
        self.purposes.drain(..).flatten().map(|(purpose, _)| purpose).chain(parked).collect()
    }

    /// The misses under way that bring all of `range` and may fill: their placeholders, and who waits.
    pub fn misses_over(
        &mut self,
        range: SectorRange,
    ) -> impl Iterator<Item = (Ticket, SectorRange, &mut Vec<Joined>)> {
        self.purposes.iter_mut().flatten().filter_map(move |(purpose, _)| match purpose {
            Purpose::Miss { range: whole, fill: Some((ticket, _)), joined, .. }
                if whole.start <= range.start && range.end() <= whole.end() =>
            {
                Some((*ticket, *whole, joined))
            }
            _ => None,
        })
    }

    /// Since when the guest has waited for its oldest operation.
    pub fn oldest_owed_ms(&self) -> Option<u64> {
        self.submitted.find_oldest(|token| !self.is_late(token))
    }

    /// What the guest has waited for since `since_ms` or longer.
    pub fn owed_since(&self, since_ms: u64) -> Vec<u32> {
        let mut tokens = self.submitted.out_since(since_ms);
        tokens.retain(|&token| !self.is_late(token));
        tokens
    }

    fn is_late(&self, token: u32) -> bool {
        matches!(self.purposes[token as usize], Some((Purpose::Late { .. }, _)))
    }

    /// Whether operations are out that nobody waits for.
    pub fn has_late(&self) -> bool {
        self.late_count > 0
    }

    /// Takes the purpose of an operation, which becomes nobody's. With it, whether the disk has it: one
    /// that waits for its turn is withdrawn. `None` if it is nobody's already, or was withdrawn.
    pub fn make_late(&mut self, token: u32) -> Option<(Purpose, bool)> {
        if self.is_late(token) {
            return None;
        }
        let (purpose, _) = self.purposes[token as usize].take()?;
        let waiting = self.backlog.iter().position(|(t, _)| *t == u64::from(token));
        match waiting.and_then(|at| self.backlog.remove(at)) {
            Some(_) => {
                self.submitted.end(token);
                self.free.push(token);
            }
            None => {
                self.late_count += 1;
                self.purposes[token as usize] = Some((Purpose::Late { bypass: None }, 0));
            }
        }
        Some((purpose, waiting.is_none()))
    }

    /// Ties a late operation to the registration that lasts with it.
    pub fn name_late(&mut self, token: u32, name: u64) {
        self.purposes[token as usize] = Some((Purpose::Late { bypass: Some(name) }, 0));
    }

    /// The operations of a write around the cache.
    pub fn tokens_of_bypass(&self, slot: u32) -> Vec<u32> {
        let is_of =
            |p: &Option<(Purpose, u32)>| matches!(p, Some((Purpose::Bypass { slot: s }, _)) if *s == slot);
        let all = self.purposes.iter().enumerate();
        all.filter(|(_, p)| is_of(p)).map(|(token, _)| token as u32).collect()
    }

    /// A buffer of `len` bytes with any content.
    pub fn buffer(&mut self, len: usize) -> AlignedBuf {
        match self.spare.iter().rposition(|b| b.capacity() >= len) {
            Some(i) => {
                let mut buffer = self.spare.swap_remove(i);
                buffer.set_len(len);
                buffer
            }
            None => AlignedBuf::new(len),
        }
    }

    pub fn recycle(&mut self, buffer: AlignedBuf) {
        if self.spare.len() < SPARE_BUFFERS {
            self.spare.push(buffer);
        }
    }
}

impl<E: Env, B: Buffer> Queue<E, B> {
    /// Starts an operation on the disk.
    ///
    /// # Errors
    /// No way to the disk could be opened; the purpose comes back.
    pub(super) fn submit_io(&mut self, purpose: Purpose, op: Op) -> Result<(), Purpose> {
        self.submit_try(purpose, op, 0).map_err(|(purpose, _)| purpose)
    }

    /// Starts an operation, or one that has failed so many times.
    ///
    /// # Errors
    /// No way to the disk could be opened; purpose and operation come back.
    pub(super) fn submit_try(&mut self, purpose: Purpose, op: Op, tries: u32) -> Result<(), (Purpose, Op)> {
        let now = (self.volume.cache.clock.now_ms(), self.volume.cache.clock.now_ns());
        if let Some(slot) = purpose.slot() {
            self.slots.get(slot).asked_disk = true;
        }
        self.io.submit(now, &self.volume.backing, &self.waker, purpose, op, tries)?;
        self.note_owed();
        if self.volume.core.policy.deadline_ms().is_some() && !self.shared().alarm.is_set() {
            self.set_alarm();
        }
        Ok(())
    }

    /// Shows how long the disk has owed its oldest answer.
    fn note_owed(&mut self) {
        let since = self.io.submitted.oldest_ms();
        self.shared().owed.set(since);
    }

    /// Leaves what the disk has not answered to a thread of its own. What may still change the disk
    /// keeps its registration until it has ended.
    pub(super) fn leave_io(&mut self) {
        self.io.backlog.clear();
        let registered = self.bypass.take_under_way();
        let since_ms = self.io.submitted.oldest_ms();
        match self.io.channel.take() {
            Some(channel) if channel.in_flight() > 0 => {
                ghost::leave(&self.volume.core, &self.volume.name, channel, since_ms, registered);
            }
            _ => registered.into_iter().for_each(|(ticket, range)| {
                self.volume.core.stripes.remove(ticket, range);
            }),
        }
        self.shared().owed.set(None);
    }

    /// Takes completed operations and goes on with what waited for them.
    pub(super) fn reap(&mut self) {
        let mut completions = self.io.reap();
        let any = !completions.is_empty();
        let now_ns = if any { self.volume.cache.clock.now_ns() } else { 0 };
        for completion in completions.drain(..) {
            let (purpose, tries) = self.io.purpose(completion.token);
            if let Some(stage) = purpose.stage() {
                let since_ns = self.io.since_ns[completion.token as usize];
                self.shared().latencies.record(stage, now_ns.saturating_sub(since_ns));
            }
            match &completion.result {
                Ok(()) => self.io_ended(purpose, completion.op, true),
                Err(error) => {
                    if let Some((purpose, op)) = self.take_failure(purpose, tries, completion.op, error) {
                        self.io_ended(purpose, op, false);
                    }
                }
            }
        }
        self.io.recycle_list(completions);
        if any {
            self.note_owed();
        }
    }

    /// An operation has ended for good.
    pub(super) fn io_ended(&mut self, purpose: Purpose, op: Op, ok: bool) {
        match purpose {
            Purpose::Miss { slot, range, fill, joined } => {
                self.miss_done(Joined { slot, range }, &joined, fill, op, ok);
            }
            Purpose::Bypass { slot } => self.bypass_written(slot, op, ok),
            Purpose::BypassFlush { slot } => self.bypass_flushed(slot, ok),
            Purpose::Flush { slot } => self.part_done(slot, ok),
            Purpose::Late { bypass } => self.late_ended(bypass),
        }
    }

    /// A guest's FLUSH goes to the disk.
    pub(super) fn start_disk_flush(&mut self, slot: u32) {
        self.slots.get(slot).left = 1;
        let purpose = Purpose::Flush { slot };
        if self.submit_io(purpose, Op::Flush).is_err() {
            self.part_done(slot, false);
        }
    }
}
