//! Pacing: as dirty data fills the space, writes are slowed evenly down to the disk's own speed.
//!
//! Without it a full cache is a cliff: writes run at memory speed until the last segment is taken,
//! then stand still until write-back has ended a whole round. With it, from a limit on, each byte
//! that reaches the disk buys the guest a byte of space, so a write waits about as long as the disk
//! takes for one, and no longer.
//!
//! Everything is counted in bytes of segments, since that is what runs out: `used` by segments that
//! reclaim cannot have yet, and of these `unsettled`, what no ended round has brought to the disk.
//! A round that is under way settles its part in proportion to what it has written:
//!
//! ```text
//!  allowed = limit − (unsettled − settles · done / todo)
//! ```
//!
//! where the flush at its end counts as what could have been written in its time.
//!
//! In `relaxed` a round takes everything, and what comes meanwhile must fit beside it: the limit is
//! half the room, so each round finds as much as the last one released, and the rate is steady. In
//! `strict` rounds are epochs, cut at an eighth of the room if the guest does not flush: the limit
//! leaves room for one of them. When a round found more than the limit (after a restart, or after a
//! disk that had failed came back) the guest gets what room is left evenly over that round.
//!
//! Laws:
//! - Pacing only delays: space is still taken from the free list, and whoever finds none waits.
//! - It delays only while write-back makes progress. Idle, between the attempts of a failed round, or
//!   before a disk that has taken nothing for [`PATIENCE_US`], a volume may take the rest of its room.
//! - The room of one volume leaves to each of the others what that holds of its share (`shares.rs`) and
//!   half of it at least, whatever its disk does.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::core::Cache;
use super::course::Course;
use super::env::{Clock, Env};
use super::stream::Stream;
use super::stripes::lock;
use super::volume::{Order, QueueShared, Volume, VolumeCore};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

/// Bytes by which writes may be ahead of the disk so that each step of the disk frees one.
const OVERDRAFT: i64 = 16 << 10;
/// How long a disk may take nothing before its volume's writes stop to keep its pace.
const PATIENCE_US: u64 = 500_000;
/// Part of the room after which `strict` ends an epoch by itself.
const EPOCH_SHARE: u64 = 8;

/// A round of write-back under way.
#[derive(Clone, Copy, Debug)]
struct Round {
    /// Bytes to be written, and bytes written.
    todo: u64,
    done: u64,
    /// `done` when writes were last granted, and when it last grew; µs.
    seen: u64,
    seen_us: u64,
    /// Bytes that could be written while a group is on its way to the redo area.
    leading: u64,
    /// Bytes that could be written while the round's end takes its time.
    ending: u64,
    /// When its writes began, and when the last of them ended; µs.
    began_us: u64,
    written_us: Option<u64>,
    /// Bytes of space that it settles.
    settles: u64,
    /// Bytes ever taken when it began, and the room that was left.
    taken: u64,
    room: u64,
}

#[derive(Debug, Default)]
struct State {
    /// Closed segments with dirty data, by highest epoch, and what was left over in each.
    held: BinaryHeap<Reverse<(u64, u32, u64)>>,
    /// Bytes taken that no queue has counted: found at attach, or left over in closed segments.
    beside: u64,
    /// Left-overs of closed segments not yet in `beside`: they come as a lump, and are told in
    /// slices of an eighth of what is taken, or with the release of their segment.
    rests: u64,
    /// Bytes ever taken when slices were last told.
    sliced: u64,
    /// Bytes of segments that write-back has wholly cleaned.
    released: u64,
    /// Bytes that ended rounds have settled.
    settled: u64,
    /// Bytes ever taken when the epoch was last cut.
    cut: u64,
    round: Option<Round>,
    /// How far all of it is.
    course: Course,
    /// Bytes a second that the last rounds have written.
    rate: u64,
    /// What the last groups took until they were in the redo area, in µs.
    leading_us: u64,
    /// What the last rounds took from the last write to the end of the flush, in µs.
    ending_us: u64,
}

impl State {
    /// Notes that so many bytes of segments are free of dirty data. What was left over in them is told by now,
    /// or more would be released than was ever taken, and what is taken later would not be seen.
    fn release(&mut self, bytes: u64, rests: u64) {
        let untold = rests.min(self.rests);
        self.rests -= untold;
        self.beside += untold;
        self.settled += untold;
        self.released += bytes;
    }
}

/// What paces one volume.
#[derive(Debug, Default)]
pub(crate) struct Pacer {
    is_paced: AtomicBool,
    /// Whether the volume has taken all of its room.
    is_out_of_room: AtomicBool,
    /// Bytes of segments held, for the other volumes to see.
    used: AtomicU64,
    /// Bytes of dirty records that recovery has found.
    owed: AtomicU64,
    state: Mutex<State>,
}

/// What one queue has taken, and may take. Both are written by its thread, the budget by
/// write-back as well.
#[derive(Debug, Default)]
pub(crate) struct Purse {
    taken: AtomicU64,
    budget: AtomicI64,
    /// Sectors it has made zero: dirty, and no bytes to be written.
    pub zeroed: AtomicU64,
}

impl Pacer {
    /// Bytes of segments with dirty data, at the last look.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Notes so many bytes of dirty records that recovery has found.
    pub fn owe(&self, bytes: u64) {
        self.owed.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Notes a segment that recovery found.
    pub fn found(&self, max_epoch: u64, id: u32, capacity: u64) {
        let mut state = lock(&self.state);
        state.held.push(Reverse((max_epoch, id, 0)));
        state.beside += capacity;
    }

    /// Notes that a segment takes no more records, and how much of it nobody has taken.
    fn closed(&self, max_epoch: u64, id: u32, rest: u64) {
        let mut state = lock(&self.state);
        state.held.push(Reverse((max_epoch, id, rest)));
        state.rests += rest;
    }

    /// Notes that relocation has taken all that was dirty out of a segment.
    pub fn emptied(&self, id: u32, capacity: u64) {
        let mut state = lock(&self.state);
        let held = std::mem::take(&mut state.held).into_vec();
        let (emptied, held): (Vec<_>, Vec<_>) = held.into_iter().partition(|Reverse((_, of, _))| *of == id);
        state.held = held.into();
        emptied.iter().for_each(|Reverse((_, _, rest))| state.release(capacity, *rest));
    }

    /// Notes what a round has written.
    pub fn wrote(&self, bytes: u64) {
        let mut state = lock(&self.state);
        state.course.wrote(bytes);
        if let Some(round) = &mut state.round {
            round.done = (round.done + bytes).min(round.leading + round.todo);
        }
    }

    /// Notes that so many of a group's sectors are on their way to the redo area.
    pub fn journaled(&self, done: u64, all: u64) {
        let mut state = lock(&self.state);
        state.course.journaled(done, all);
        if let Some(round) = &mut state.round {
            let part = u128::from(round.leading) * u128::from(done) / u128::from(all.max(1));
            round.done = round.done.max(part as u64);
        }
    }

    /// Notes that a group is in the redo area. It has bought as much as its time was worth.
    pub fn journal_ended(&self, now_us: u64) {
        let mut state = lock(&self.state);
        state.course.journal_ended(now_us);
        let Some(round) = &mut state.round else { return };
        round.done = round.leading;
        let us = now_us.saturating_sub(round.began_us);
        round.began_us = now_us;
        state.leading_us = average(state.leading_us, us);
    }

    /// Bytes of records up to `goal` that have been brought to the disk, in the measure of `course.rs`.
    pub fn way(&self, goal: u64, now_us: u64) -> u64 {
        lock(&self.state).course.way(goal, now_us)
    }

    /// Notes that a round's writes have all ended.
    pub fn written(&self, now_us: u64) {
        let mut state = lock(&self.state);
        state.course.written(now_us);
        let Some(round) = &mut state.round else { return };
        round.written_us = Some(now_us);
        let (bytes, us) =
            (round.done.saturating_sub(round.leading), now_us.saturating_sub(round.began_us).max(1));
        if bytes > 0 {
            state.rate = average(state.rate, bytes.saturating_mul(1_000_000) / us);
        }
    }

    /// Notes that a round's flush has ended. It has bought as much as its time was worth.
    pub fn flushed(&self, now_us: u64) {
        let mut state = lock(&self.state);
        state.course.flushed(now_us);
        let Some(round) = &mut state.round else { return };
        round.done = round.leading + round.todo + round.ending;
        let us = now_us.saturating_sub(round.written_us.unwrap_or(now_us));
        state.ending_us = average(state.ending_us, us);
    }

    /// How long so many bytes take to the disk, in milliseconds, as far as rounds have shown.
    pub fn time_to_write(&self, bytes: u64) -> Option<u64> {
        let state = lock(&self.state);
        let writing = bytes.saturating_mul(1000).checked_div(state.rate)?;
        Some(writing + (state.leading_us + state.ending_us) / 1000)
    }

    /// Notes that a round has ended, well or not.
    pub fn end_round(&self, is_settled: bool) {
        let mut state = lock(&self.state);
        state.course.end(is_settled);
        if let Some(round) = state.round.take()
            && is_settled
        {
            state.settled += round.settles;
        }
    }
}

/// Of what there was and what is new; 0 for nothing yet.
fn average(old: u64, new: u64) -> u64 {
    if old == 0 { new } else { old - old / 4 + new / 4 }
}

impl VolumeCore {
    /// Bytes that queue `q` may take now.
    pub fn allowance(&self, q: u16) -> u32 {
        if !self.pacer.is_paced.load(Ordering::Relaxed) {
            return u32::MAX;
        }
        let budget = self.queue(q).purse.budget.load(Ordering::Relaxed);
        u32::try_from(budget.max(0)).unwrap_or(u32::MAX)
    }

    /// Whether the volume has taken all of its room: only its disk can give it any.
    pub fn is_out_of_room(&self) -> bool {
        self.pacer.is_out_of_room.load(Ordering::Relaxed)
    }

    /// Whether writes wait for the disk.
    pub fn is_paced(&self) -> bool {
        self.pacer.is_paced.load(Ordering::Relaxed)
    }

    /// Notes that queue `q` has taken so many bytes.
    pub fn charge(&self, q: u16, bytes: u32) {
        let purse = &self.queue(q).purse;
        // Only this thread writes it.
        purse.taken.store(purse.taken.load(Ordering::Relaxed) + u64::from(bytes), Ordering::Relaxed);
        if self.pacer.is_paced.load(Ordering::Relaxed) {
            purse.budget.fetch_sub(i64::from(bytes), Ordering::Relaxed);
        }
    }

    fn taken(&self) -> u64 {
        let queues = self.queues.iter();
        queues.map(|q| q.purse.taken.load(Ordering::Relaxed)).sum()
    }

    /// Bytes of all dirty records ever, in the order of their commits: what write-back owes the disk, or did.
    pub fn owed(&self) -> u64 {
        let written = |q: &QueueShared| {
            let zeroed = q.purse.zeroed.load(Ordering::Relaxed);
            q.tally.dirtied_sectors.load(Ordering::Relaxed).saturating_sub(zeroed)
        };
        let sectors: u64 = self.queues.iter().map(written).sum();
        self.pacer.owed.load(Ordering::Relaxed) + sectors * 512
    }

    /// Takes note of that nothing is dirty.
    pub fn note_clean(&self) {
        let owed = self.owed();
        if self.is_clean() {
            lock(&self.pacer.state).course.settle(owed);
        }
    }

    /// Streams of writes, one at least.
    pub fn stream_count(&self) -> u64 {
        self.streams.len().max(1) as u64
    }

    /// Hands out `allowed` bytes, less what is still unspent, to the queues that wait; at least
    /// `least` to each.
    fn grant(&self, allowed: i64, least: i64) {
        let queues = || self.queues.iter();
        let unspent: i64 = queues().map(|q| q.purse.budget.load(Ordering::Relaxed).max(0)).sum();
        let waiting = queues().filter(|q| q.waiting.load(Ordering::SeqCst)).count() as i64;
        let share = ((allowed - unspent) / waiting.max(1)).max(least);
        if share <= 0 || waiting == 0 {
            return;
        }
        for queue in queues().filter(|q| q.waiting.load(Ordering::SeqCst)) {
            // A debt is in `allowed` already.
            let budget = queue.purse.budget.load(Ordering::Relaxed).min(0);
            if queue.purse.budget.fetch_add(share - budget, Ordering::Relaxed) + share - budget > 0
                && queue.waiting.swap(false, Ordering::SeqCst)
            {
                lock(&queue.waker).wake();
            }
        }
    }
}

impl<E: Env> Cache<E> {
    /// Bytes that records and payload of one segment can take.
    pub(crate) fn segment_capacity(&self) -> u64 {
        u64::from(self.media.geometry.data_end() - self.media.geometry.data_start())
    }

    /// Ends a stream's segment; the housekeeper seals it.
    pub(crate) fn close_segment(&self, stream: &mut Stream) {
        let Some(open) = stream.open.take() else { return };
        let segment = &self.segments[open.id as usize];
        segment.set_state(super::segments::State::Full);
        if let Some(volume) = self.volume_of(segment.owner.load(Ordering::Relaxed)) {
            let rest = self.segment_capacity() - u64::from(open.charged());
            volume.pacer.closed(segment.max_epoch.load(Ordering::SeqCst), open.id, rest);
        }
        self.queue_for_sealing(open.id);
    }
}

impl<E: Env> Volume<E> {
    /// Notes that a round of write-back begins: bytes to be written, bytes of the records that it covers,
    /// `None` for all, and whether it goes by way of the redo area.
    pub(crate) fn begin_pace(&self, todo: u64, payload: Option<u64>, is_group: bool) {
        let core = &self.core;
        let (taken, owed) = (core.taken(), core.owed());
        let room = self.cache.room_for(core);
        let mut state = lock(&core.pacer.state);
        let left = owed.saturating_sub(state.course.paid());
        let pays = payload.unwrap_or(left).min(left);
        // Records take space beside what they bring.
        let settles = payload.map(|bytes| bytes + bytes / 16);
        let (used, unsettled) = self.judge(&mut state, taken);
        let settles = settles.unwrap_or(unsettled).min(unsettled);
        let room = room.saturating_sub(used);
        let worth = |us: u64| (u128::from(state.rate) * u128::from(us) / 1_000_000) as u64;
        let leading = if is_group { worth(state.leading_us) } else { 0 };
        let ending = worth(state.ending_us);
        let (began_us, todo) = (self.cache.clock.now_us(), todo.max(1));
        state.course.begin(pays, todo, is_group, began_us);
        let (leading, ending) = (leading.min(todo), ending.min(todo));
        state.round = Some(Round {
            todo,
            done: 0,
            seen: 0,
            seen_us: began_us,
            leading,
            ending,
            began_us,
            written_us: None,
            settles,
            taken,
            room,
        });
    }

    /// Bytes in use, and of these those that no ended round has settled.
    fn judge(&self, state: &mut State, taken: u64) -> (u64, u64) {
        let core = &self.core;
        let tail = core.tail.load(Ordering::SeqCst);
        let capacity = self.cache.segment_capacity();
        while let Some(&Reverse((epoch, _, rest))) = state.held.peek()
            && epoch <= tail
        {
            state.held.pop();
            state.release(capacity, rest);
        }
        let slice = state.rests.min(taken.saturating_sub(state.sliced) / 8);
        (state.rests, state.beside) = (state.rests - slice, state.beside + slice);
        state.sliced += slice * 8;
        if state.rests == 0 {
            state.sliced = state.sliced.max(taken);
        }
        let all = taken + state.beside;
        let used = all.saturating_sub(state.released);
        // What rounds settle is an estimate; what they release is not.
        let most = (core.stream_count() + 1) * capacity;
        let unsettled = all.saturating_sub(state.settled).clamp(used.saturating_sub(most), used);
        state.settled = all - unsettled;
        core.pacer.used.store(used, Ordering::Relaxed);
        (used, unsettled)
    }

    /// Whether enough is dirty that write-back should not wait for it to age.
    pub(crate) fn is_round_due(&self) -> bool {
        let core = &self.core;
        if core.is_paced() {
            return true;
        }
        let (taken, room) = (core.taken(), self.cache.room_for(core));
        let mut state = lock(&core.pacer.state);
        let (_, unsettled) = self.judge(&mut state, taken);
        let limit = self.limit(room, state.rate);
        unsettled > self.cache.gc_bytes(core).map_or(limit, |bytes| limit.min(bytes)) / 2
    }

    fn limit(&self, room: u64, rate: u64) -> u64 {
        let max_dirty = self.wishes.max_dirty.load(Ordering::Relaxed);
        let room = if max_dirty > 0 { room.min(max_dirty) } else { room };
        let lag = self.wishes.max_lag_ms.load(Ordering::Relaxed);
        let room = match lag > 0 && rate > 0 {
            // What is dirty must be on the disk before it is too old, and so must what comes meanwhile.
            true => room.min((rate.saturating_mul(lag) / 1000).max(self.cache.segment_capacity())),
            false => room,
        };
        match self.order() {
            Order::Relaxed | Order::Grouped => room / 2,
            Order::Strict => room - room / EPOCH_SHARE - self.cache.segment_capacity().min(room / 2),
        }
    }

    /// Looks at the space, paces or frees the volume's writes, and hands out what they may take.
    ///
    /// Called by write-back after each step, and by whoever has opened a segment, which bounds what
    /// a queue takes between two looks.
    pub(crate) fn pace(&self, mut is_idle: bool) {
        let core = &self.core;
        let (taken, room) = (core.taken(), self.cache.room_for(core));
        let now_us = self.cache.clock.now_us();
        let (allowed, has_moved) = {
            let mut state = lock(&core.pacer.state);
            let (used, unsettled) = self.judge(&mut state, taken);
            let rate = state.rate;
            let now = taken + state.beside;
            if self.order() == Order::Strict && now.saturating_sub(state.cut) > room / EPOCH_SHARE {
                state.cut = now;
                core.raise_epoch();
            }
            let (mut settling, mut evenly, mut has_moved) = (0, i64::MIN, false);
            if let Some(r) = &mut state.round {
                has_moved = std::mem::replace(&mut r.seen, r.done) != r.done;
                if has_moved {
                    r.seen_us = now_us;
                }
                is_idle |= now_us.saturating_sub(r.seen_us) > PATIENCE_US;
                let all = u128::from(r.leading + r.todo + r.ending);
                let part = |bytes: u64| (u128::from(bytes) * u128::from(r.done) / all) as u64;
                settling = part(r.settles);
                evenly =
                    part(r.room.min(r.settles - r.settles / 8)) as i64 - taken.saturating_sub(r.taken) as i64;
            }
            let level = self.limit(room, rate) as i64 - unsettled.saturating_sub(settling) as i64;
            // Without a disk that takes anything there is nothing to keep pace with.
            let left = room as i64 - used as i64;
            core.pacer.is_out_of_room.store(left <= 0, Ordering::Relaxed);
            let rest = if is_idle { left } else { i64::MIN };
            (level.max(evenly).max(rest), has_moved)
        };
        let is_paced = allowed < (core.stream_count() * self.cache.segment_capacity()) as i64;
        let was_paced = core.pacer.is_paced.swap(is_paced, Ordering::Relaxed);
        if is_paced {
            if !was_paced {
                for queue in core.queues.iter() {
                    queue.purse.budget.store(0, Ordering::Relaxed);
                }
                core.writeback.raise();
            }
            // What the disk has taken is worth a write, however small: the sums come out later.
            let is_close = allowed > -OVERDRAFT;
            core.grant(allowed, i64::from(has_moved && is_close));
        } else if was_paced {
            core.wake_waiting();
        }
    }
}
