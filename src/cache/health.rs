//! How a volume is: one state for whoever must act, with its cause, since when, and what to do.
//!
//! A state is judged from facts that others leave here, never kept by itself, so it cannot be stale:
//! - *failed*: a `sync` of the cache failed, so it takes no more writes;
//! - *lost-data*: dirty data was lost to damage of the cache: what is listed answers with an error, or,
//!   where nobody knows what it was, write-back stands still;
//! - *stalled*: the disk has owed an answer for [`STALL_MS`]; hits are served, misses wait;
//! - *degraded*: the disk answers with errors; what is dirty stays in the cache and is retried;
//! - *ok*.
//!
//! The worst wins. Nothing here decides what the engine does: a state never makes anything clean,
//! and no state is left but by the fact behind it going away.
//!
//! Facts are atomics written by their one thread ([`Owed`]) or sit under one mutex that is taken
//! only when something has failed, or by whoever asks.

use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::collections::VecDeque;
use std::fmt;

use super::env::{Clock, Env};
use super::failing::OnBackingError;
use super::lost;
use super::stripes::lock;
use super::volume::{Volume, VolumeCore};
use crate::backing::Op;

/// How long the disk may take for an operation before its volume is called stalled. Disks retry and
/// remap within a few seconds; a guest gives up after thirty.
pub const STALL_MS: u64 = 5000;
/// How long a guest's failed operation counts: without traffic nobody can know whether it would
/// succeed now, and one bad sector among good ones must not make the state flicker.
pub(super) const FAILED_GUEST_MS: u64 = 10_000;

/// See the module's head. From good to bad.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum VolumeState {
    /// As it should be.
    #[default]
    Ok,
    /// The disk fails.
    Degraded,
    /// The disk does not answer.
    Stalled,
    /// Dirty data was lost.
    LostData,
    /// The cache fails.
    Failed,
}

impl fmt::Display for VolumeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            VolumeState::Ok => "ok",
            VolumeState::Degraded => "degraded",
            VolumeState::Stalled => "stalled",
            VolumeState::LostData => "lost-data",
            VolumeState::Failed => "failed",
        })
    }
}

/// A volume's state and what an operator needs with it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Health {
    /// The worst that holds.
    pub state: VolumeState,
    /// For how long, in milliseconds.
    pub for_ms: u64,
    /// Why; empty when all is well.
    pub cause: String,
    /// What to do about it; empty when all is well.
    pub advice: &'static str,
    /// Write-back rounds failed since the last good one.
    pub failures: u32,
    /// When write-back tries again after a failure, in milliseconds from now.
    pub retry_ms: Option<u64>,
}

/// Why something failed, and what can be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Failure {
    pub cause: String,
    advice: &'static str,
    /// Whether the disk is what failed.
    pub is_of_disk: bool,
}

impl Failure {
    /// The disk answered an operation with an error.
    pub fn disk(op: &Op, error: &std::io::Error) -> Self {
        let what = match op {
            Op::Read { offset, buf } => format!("reading {} bytes at {offset}", buf.len()),
            Op::Write { offset, buf } => format!("writing {} bytes at {offset}", buf.len()),
            Op::Zero { offset, len, .. } => format!("zeroing {len} bytes at {offset}"),
            Op::Flush => "flushing".to_owned(),
        };
        let advice = match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => {
                "free space where the disk lies; nothing is lost, and write-back goes on by itself"
            }
            _ => "mend the disk; nothing is lost, and write-back goes on by itself",
        };
        Self { cause: format!("the disk failed {what}: {error}"), advice, is_of_disk: true }
    }

    /// No way to the disk could be opened.
    pub fn resources(error: &std::io::Error) -> Self {
        let advice = "see to memory and limits of this process; write-back goes on by itself";
        Self { cause: format!("cannot open a channel to the disk: {error}"), advice, is_of_disk: true }
    }

    /// A group in the redo area cannot be made, or brought to the disk.
    pub fn applying(cause: String) -> Self {
        let advice = "mend the redo area or the disk; nothing is lost, and write-back goes on by itself";
        Self { cause, advice, is_of_disk: true }
    }

    /// The cache's media failed.
    pub fn media(cause: String) -> Self {
        let advice = "see the host's log about the cache's device; `check` it when stopped";
        Self { cause, advice, is_of_disk: false }
    }

    /// What is dirty cannot be read back.
    pub fn damage(cause: String) -> Self {
        let advice = "stop, see `check`, then `drain --accept-loss`: what is damaged is lost, the rest not";
        Self { cause, advice, is_of_disk: false }
    }
}

/// What one thread has with the disk and is owed an answer for: since when, for others to see.
#[derive(Debug, Default)]
pub(crate) struct Owed(AtomicU64);

impl Owed {
    /// The oldest operation out was submitted at `since_ms`; `None` when none is out.
    pub fn set(&self, since_ms: Option<u64>) {
        self.0.store(since_ms.map_or(0, |ms| ms + 1), Ordering::Relaxed);
    }

    /// When that was.
    pub fn since_ms(&self) -> Option<u64> {
        self.0.load(Ordering::Relaxed).checked_sub(1)
    }
}

/// The order in which a thread's operations were submitted, to know the oldest one out.
#[derive(Debug, Default)]
pub(crate) struct Submitted {
    /// Number, token and time, oldest first; some may have ended.
    order: VecDeque<(u64, u32, u64)>,
    /// By token: the number of its last submission, while that is out.
    out: Vec<Option<u64>>,
    next: u64,
}

impl Submitted {
    /// An operation was submitted under `token`, which had none out.
    pub fn begin(&mut self, token: u32, now_ms: u64) {
        let at = token as usize;
        if at >= self.out.len() {
            self.out.resize(at + 1, None);
        }
        self.out[at] = Some(self.next);
        self.order.push_back((self.next, token, now_ms));
        self.next += 1;
    }

    /// It has ended.
    pub fn end(&mut self, token: u32) {
        self.out[token as usize] = None;
    }

    /// When the oldest operation out that passes the test was submitted.
    pub fn find_oldest(&self, test: impl Fn(u32) -> bool) -> Option<u64> {
        let is_it =
            |&&(number, token, _): &&(u64, u32, u64)| self.out[token as usize] == Some(number) && test(token);
        self.order.iter().find(is_it).map(|&(_, _, ms)| ms)
    }

    /// The operations out that were submitted at `since_ms` or before.
    pub fn out_since(&self, since_ms: u64) -> Vec<u32> {
        let old = self.order.iter().take_while(|(_, _, ms)| *ms <= since_ms);
        let is_out = |(number, token, _): &&(u64, u32, u64)| self.out[*token as usize] == Some(*number);
        old.filter(is_out).map(|&(_, token, _)| token).collect()
    }

    /// When the oldest operation out was submitted.
    pub fn oldest_ms(&mut self) -> Option<u64> {
        while let Some(&(number, token, ms)) = self.order.front() {
            if self.out[token as usize] == Some(number) {
                return Some(ms);
            }
            self.order.pop_front();
        }
        None
    }
}

/// The facts of one volume.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    /// What write-back is owed.
    pub writeback: Owed,
    /// Channels whose operations were left with a disk that does not answer.
    left_behind: AtomicU32,
    /// The oldest of those.
    left: Owed,
    failures: Mutex<Failures>,
}

#[derive(Debug, Default)]
struct Failures {
    /// Write-back's last failure, while no round has succeeded since; when the first of them was,
    /// how many there were, and when it tries again.
    writeback: Option<(Failure, u64, u32, u64)>,
    /// A guest's last failed operation: when the first of those was, and the last.
    guest: Option<(Failure, u64, u64)>,
    /// The state last logged, and since when it holds.
    told: (VolumeState, u64),
}

impl Facts {
    /// Channels with operations that nobody waits for.
    pub fn left_behind(&self) -> u32 {
        self.left_behind.load(Ordering::SeqCst)
    }

    /// A channel whose oldest operation was submitted at `since_ms` is left to the disk.
    pub fn leave(&self, since_ms: Option<u64>) {
        if self.left_behind.fetch_add(1, Ordering::SeqCst) == 0 {
            self.left.set(since_ms);
        }
    }

    /// The disk has ended what a channel left to it had.
    pub fn came_back(&self) {
        if self.left_behind.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.left.set(None);
        }
    }

    /// A round of write-back failed, the `count`th in a row.
    pub fn writeback_failed(&self, failure: Failure, count: u32, now_ms: u64, retry_at_ms: u64) {
        let mut failures = lock(&self.failures);
        let first = failures.writeback.take().map_or(now_ms, |(_, first, _, _)| first);
        failures.writeback = Some((failure, first, count, retry_at_ms));
    }

    /// A round of write-back succeeded after some that failed.
    pub fn writeback_recovered(&self) {
        lock(&self.failures).writeback = None;
    }

    /// The volume is attached again: what failed before was another attachment's.
    pub fn begin_anew(&self) {
        let mut failures = lock(&self.failures);
        (failures.writeback, failures.guest) = (None, None);
    }

    /// The disk failed an operation of a guest.
    pub fn guest_failed(&self, failure: Failure, now_ms: u64) {
        let mut failures = lock(&self.failures);
        let recent = |(_, first, last): (Failure, u64, u64)| {
            (now_ms.saturating_sub(last) < FAILED_GUEST_MS).then_some(first)
        };
        let first = failures.guest.take().and_then(recent).unwrap_or(now_ms);
        failures.guest = Some((failure, first, now_ms));
    }
}

impl VolumeCore {
    /// Judges the facts.
    pub(crate) fn health(&self, cache_failed: bool, now_ms: u64) -> Health {
        let failures = lock(&self.facts.failures);
        let since = |ms: u64| now_ms.saturating_sub(ms);
        let told = |state| if failures.told.0 == state { since(failures.told.1) } else { 0 };
        let mut health = Health::default();
        if let Some((failure, first, count, retry_at)) = &failures.writeback {
            (health.failures, health.retry_ms) = (*count, Some(retry_at.saturating_sub(now_ms)));
            health.be(VolumeState::Degraded, since(*first), failure.clone());
        } else if let Some((failure, first, last)) = &failures.guest
            && since(*last) < FAILED_GUEST_MS
        {
            health.be(VolumeState::Degraded, since(*first), failure.clone());
        }
        if health.state == VolumeState::Ok
            && let Some((health_ms, failure)) = self.judge_awaited(now_ms)
        {
            health.be(VolumeState::Degraded, health_ms, failure);
        }
        let owed = self.owed_ms(now_ms);
        if owed >= self.policy.stall_ms() || self.facts.left_behind() > 0 {
            let cause = format!("the disk has not answered for {} s", owed / 1000);
            let advice = "see the host's log about the disk; cached data is served, nothing is lost";
            health.be(VolumeState::Stalled, owed, Failure { cause, advice, is_of_disk: true });
        }
        if self.policy.on_error() == OnBackingError::ReadOnly
            && health.state != VolumeState::Ok
            && self.policy.is_failing(|| now_ms)
        {
            health.cause.push_str("; guest writes are turned away until it works");
        }
        let lost = lock(&self.lost);
        if !lost.is_empty() {
            let advice =
                "see `check`; overwrite or restore these sectors, or give them up with --accept-loss";
            let failure = Failure { cause: lost::summary(&lost), advice, is_of_disk: false };
            health.be(VolumeState::LostData, told(VolumeState::LostData), failure);
        }
        if self.damaged.load(Ordering::Relaxed) {
            let cause = "dirty data in the cache is damaged: write-back stands still".to_owned();
            health.be(VolumeState::LostData, told(VolumeState::LostData), Failure::damage(cause));
        }
        if cache_failed {
            let cause = "the cache could not be made durable: it takes no more writes".to_owned();
            let advice = "stop, `drain`, replace the cache's device and `format` it";
            let failure = Failure { cause, advice, is_of_disk: false };
            health.be(VolumeState::Failed, told(VolumeState::Failed), failure);
        }
        health
    }

    /// For how long write-back has waited for another member of the group, and for whom, if for long.
    fn judge_awaited(&self, now_ms: u64) -> Option<(u64, Failure)> {
        let (incarnation, since) = (*lock(&self.awaited))?;
        let waited = now_ms.saturating_sub(since);
        let group = self.group().filter(|_| waited >= STALL_MS)?;
        let fellow = group.members().into_iter().find(|m| m.incarnation == incarnation)?;
        let (name, group) = (fellow.descriptor_name(), &group.name);
        let cause = match fellow.attached.load(Ordering::SeqCst) {
            true => format!("write-back waits for volume `{name}` of the consistency group `{group}`"),
            false => format!(
                "write-back waits for volume `{name}` of the consistency group `{group}`, which has dirty data \
                 and is not attached"
            ),
        };
        let advice = "see to that volume and its disk, or take it out of the group; nothing is lost";
        Some((waited, Failure { cause, advice, is_of_disk: false }))
    }

    /// For how long the disk has owed its oldest answer.
    pub(super) fn owed_ms(&self, now_ms: u64) -> u64 {
        let queues = self.queues.iter().filter_map(|q| q.owed.since_ms());
        let others = [self.facts.writeback.since_ms(), self.facts.left.since_ms()];
        queues.chain(others.into_iter().flatten()).min().map_or(0, |ms| now_ms.saturating_sub(ms))
    }

    /// Judges the facts and logs a state that differs from the last one.
    pub(crate) fn watch(&self, cache_failed: bool, now_ms: u64) {
        self.look_for_stall(now_ms);
        self.ring_alarms(now_ms);
        let health = self.health(cache_failed, now_ms);
        let mut failures = lock(&self.facts.failures);
        if failures.told.0 == health.state {
            return;
        }
        let was = std::mem::replace(&mut failures.told, (health.state, now_ms - health.for_ms.min(now_ms))).0;
        drop(failures);
        let Health { state, cause, advice, .. } = health;
        let descriptor = lock(&self.descriptor).0.clone();
        let name = &*descriptor.name_text();
        match state {
            VolumeState::Ok => tracing::info!(volume = name, "volume is {state} again, it was {was}"),
            VolumeState::Degraded | VolumeState::Stalled => {
                tracing::warn!(volume = name, "volume is {state}: {cause}; {advice}");
            }
            VolumeState::LostData | VolumeState::Failed => {
                tracing::error!(volume = name, "volume is {state}: {cause}; {advice}");
            }
        }
    }
}

impl Health {
    fn be(&mut self, state: VolumeState, for_ms: u64, Failure { cause, advice, .. }: Failure) {
        (self.state, self.for_ms, self.cause, self.advice) = (state, for_ms, cause, advice);
    }
}

impl<E: Env> Volume<E> {
    /// How it is.
    pub fn health(&self) -> Health {
        self.core.health(self.cache.has_failed(), self.cache.clock.now_ms())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onmedia::VolumeDescriptor;

    fn core() -> VolumeCore {
        VolumeCore::new(VolumeDescriptor::default(), 0, 1)
    }

    fn eio() -> Failure {
        Failure::disk(&Op::Flush, &std::io::Error::from_raw_os_error(libc::EIO))
    }

    #[test]
    fn the_oldest_operation_out_is_known_in_whatever_order_they_end() {
        let mut submitted = Submitted::default();
        assert_eq!(submitted.oldest_ms(), None);
        for (token, ms) in [(0, 10), (1, 20), (2, 30)] {
            submitted.begin(token, ms);
        }
        submitted.end(1);
        assert_eq!(submitted.oldest_ms(), Some(10));
        submitted.end(0);
        assert_eq!(submitted.oldest_ms(), Some(30), "the second has ended before");
        // The same token again is another operation.
        submitted.begin(0, 40);
        submitted.end(2);
        assert_eq!(submitted.oldest_ms(), Some(40));
        submitted.end(0);
        assert_eq!(submitted.oldest_ms(), None);
        assert!(submitted.order.is_empty(), "what has ended is forgotten");
    }

    #[test]
    fn the_worst_that_holds_is_said_and_ends_with_its_fact() {
        let core = core();
        let state = |failed, now| core.health(failed, now).state;
        assert_eq!(core.health(false, 1000), Health::default());
        core.facts.writeback_failed(eio(), 1, 1000, 1100);
        core.facts.writeback_failed(eio(), 2, 1100, 1400);
        let health = core.health(false, 1200);
        assert_eq!((health.state, health.for_ms), (VolumeState::Degraded, 200), "since the first failure");
        assert_eq!((health.failures, health.retry_ms), (2, Some(200)));
        assert!(health.cause.contains("flushing") && !health.advice.is_empty(), "{health:?}");
        core.facts.writeback.set(Some(2000));
        assert_eq!(state(false, 2000 + STALL_MS - 1), VolumeState::Degraded);
        assert_eq!(state(false, 2000 + STALL_MS), VolumeState::Stalled);
        core.damaged.store(true, Ordering::Relaxed);
        assert_eq!(state(false, 9000), VolumeState::LostData);
        assert_eq!(state(true, 9000), VolumeState::Failed);
        core.damaged.store(false, Ordering::Relaxed);
        core.facts.writeback.set(None);
        assert_eq!(state(false, 9000), VolumeState::Degraded);
        core.facts.writeback_recovered();
        assert_eq!(core.health(false, 9000), Health::default());
    }

    #[test]
    fn a_volume_with_lost_sectors_says_which_until_they_are_overwritten() {
        let core = core();
        let range = crate::units::SectorRange::new(8, 16);
        let cause = crate::onmedia::LostCause::Checksum;
        lock(&core.lost).push(crate::onmedia::LostRange { range, version: 1, time_s: 0, cause });
        let health = core.health(false, 1000);
        assert_eq!(health.state, VolumeState::LostData);
        assert!(health.cause.contains("16 sectors") && health.cause.contains("8..24"), "{health:?}");
        lock(&core.lost).clear();
        assert_eq!(core.health(false, 1000), Health::default());
    }

    #[test]
    fn a_disk_that_was_left_something_is_stalled_until_it_has_ended_that() {
        let core = core();
        core.facts.leave(Some(100));
        core.facts.leave(Some(300));
        let health = core.health(false, 1100);
        assert_eq!((health.state, health.for_ms), (VolumeState::Stalled, 1000));
        core.facts.came_back();
        assert_eq!(core.health(false, 1200).state, VolumeState::Stalled, "one is still out");
        core.facts.came_back();
        assert_eq!(core.health(false, 1300), Health::default());
    }

    #[test]
    fn a_guests_failed_operation_counts_for_a_while() {
        let core = core();
        core.facts.guest_failed(eio(), 1000);
        core.facts.guest_failed(eio(), 5000);
        assert_eq!(core.health(false, 6000).for_ms, 5000, "since the first of them");
        assert_eq!(core.health(false, 5000 + FAILED_GUEST_MS).state, VolumeState::Ok);
        core.facts.guest_failed(eio(), 50_000);
        assert_eq!(core.health(false, 50_001).for_ms, 1, "those before are forgotten");
    }
}
