//! What a guest sees of a disk that fails: a policy for each volume, and when a disk counts as failing.
//!
//! ```text
//!  policy      a miss, a write around the cache   a write that finds no space   any other write
//!  wait        tried again until it works         waits                         goes on
//!  error       an error                           an error                      goes on
//!  read_only   an error                           an error                      an error
//! ```
//!
//! *wait* is the default. What the disk lacks is usually a path, a pool's space or a server that comes
//! back, and a guest that is told of an error never forgets it: its file system turns read-only and its
//! databases stop, while one whose requests take longer goes on as if nothing had been. `error` is for
//! guests that have something better to do (a mirror of their own), `read_only` for operators who do not
//! want dirty data to pile up before a disk that cannot take it. Every policy ends by itself, with the
//! failure: nothing has to be reset.
//!
//! Laws:
//! - What time does not mend (a bad sector, an image that was cut off) is an error under every policy.
//! - A FLUSH that the disk failed is never tried again, under any policy: it says that what was written
//!   since the last good one is not there, and the next would succeed without it. The guest is told. In
//!   write-back mode none reaches the disk on a guest's behalf.
//! - An operation is tried again only when its last try has ended; until then, and while it waits, it keeps
//!   its registration (`stripes.rs`). So nothing that overlaps a write reaches the disk beside it.
//! - What waits is bounded by what guests may have under way, and ends with its queue.
//! - With a deadline, in `error` and `read_only`, what the disk has owed for so long ends for the guest with
//!   an error and for nobody else: the buffer stays with the operation, and a write its registration, until
//!   that has ended. What it brings then is nobody's: it neither answers nor fills.

use std::io;

use super::counters::add;
use super::env::{Clock, Env};
use super::health::{FAILED_GUEST_MS, Failure, STALL_MS};
use super::stripes::lock;
use super::volume::{Volume, VolumeCore};
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

/// What becomes of requests that need the disk while it fails. See the module's head.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnBackingError {
    /// They wait, and are tried again until the disk works.
    #[default]
    Wait,
    /// They end with an error.
    Error,
    /// So they do, and so does every write.
    ReadOnly,
}

/// A volume's policy, changed at any time.
#[derive(Debug)]
pub(crate) struct Policy {
    on_error: AtomicU8,
    /// 0 for none.
    timeout_ms: AtomicU64,
    /// Whether the disk has owed something for too long, at the last look.
    is_stalled: AtomicBool,
    /// Whether write-back's last round failed.
    is_writeback_failing: AtomicBool,
    /// When a guest's operation last failed in a way that time may mend, plus 1 ms; 0 for never.
    guest_failed_ms: AtomicU64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            on_error: AtomicU8::new(OnBackingError::default() as u8),
            timeout_ms: AtomicU64::new(0),
            is_stalled: AtomicBool::new(false),
            is_writeback_failing: AtomicBool::new(false),
            guest_failed_ms: AtomicU64::new(0),
        }
    }
}

impl Policy {
    pub fn on_error(&self) -> OnBackingError {
        match self.on_error.load(Ordering::Relaxed) {
            0 => OnBackingError::Wait,
            1 => OnBackingError::Error,
            _ => OnBackingError::ReadOnly,
        }
    }

    /// After how long what the disk owes counts as failed for the guest.
    pub fn deadline_ms(&self) -> Option<u64> {
        let timeout = self.timeout_ms.load(Ordering::Relaxed);
        (timeout > 0 && self.on_error() != OnBackingError::Wait).then_some(timeout)
    }

    /// After how long the disk counts as stalled.
    pub fn stall_ms(&self) -> u64 {
        self.deadline_ms().map_or(STALL_MS, |deadline| deadline.min(STALL_MS))
    }

    /// Notes whether the disk has owed something for too long; says whether that is new.
    pub fn note_stalled(&self, is_stalled: bool) -> bool {
        self.is_stalled.swap(is_stalled, Ordering::Relaxed) != is_stalled
    }

    pub fn note_writeback(&self, is_failing: bool) {
        self.is_writeback_failing.store(is_failing, Ordering::Relaxed);
    }

    pub fn note_guest_failed(&self, now_ms: u64) {
        self.guest_failed_ms.store(now_ms + 1, Ordering::Relaxed);
    }

    /// Whether the disk takes nothing that write-back has for it.
    fn takes_nothing(&self) -> bool {
        self.is_writeback_failing.load(Ordering::Relaxed) || self.is_stalled.load(Ordering::Relaxed)
    }

    /// Whether the disk fails, as far as anybody can know: what nobody asks of it cannot fail.
    pub fn is_failing(&self, now_ms: impl FnOnce() -> u64) -> bool {
        let guest_failed = || match self.guest_failed_ms.load(Ordering::Relaxed) {
            0 => false,
            at => now_ms() < at + FAILED_GUEST_MS,
        };
        self.takes_nothing() || guest_failed()
    }
}

/// Whether time does not mend what the disk says: it is about these sectors, or about the request.
pub(crate) fn is_lasting(error: &io::Error) -> bool {
    // What Linux makes of a medium error, a target's refusal and a protection error (block/blk-core.c).
    let of_kernel = [libc::ENODATA, libc::EREMOTEIO, libc::EILSEQ, libc::EOPNOTSUPP, libc::EINVAL];
    // A transfer that gets no further: the image was cut off.
    let is_short = matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::WriteZero);
    is_short || error.raw_os_error().is_some_and(|code| of_kernel.contains(&code))
}

/// When a queue is to be woken because time has passed. Set by its thread, rung by the housekeeper.
#[derive(Debug)]
pub(crate) struct Alarm {
    due_ms: AtomicU64,
    has_rung: AtomicBool,
}

impl Default for Alarm {
    fn default() -> Self {
        Self { due_ms: AtomicU64::new(u64::MAX), has_rung: AtomicBool::new(false) }
    }
}

impl Alarm {
    /// Sets it, or with `None` turns it off.
    pub fn set(&self, due_ms: Option<u64>) {
        self.due_ms.store(due_ms.unwrap_or(u64::MAX), Ordering::SeqCst);
    }

    pub fn is_set(&self) -> bool {
        self.due_ms.load(Ordering::Relaxed) != u64::MAX
    }

    /// Whether it is to ring now. It does so once until it is heard.
    pub fn rings(&self, now_ms: u64) -> bool {
        self.due_ms.load(Ordering::SeqCst) <= now_ms && !self.has_rung.swap(true, Ordering::SeqCst)
    }

    /// Rings now.
    pub fn ring(&self) {
        self.has_rung.store(true, Ordering::SeqCst);
    }

    /// Whether it has rung since this was last asked.
    pub fn is_heard(&self) -> bool {
        self.has_rung.load(Ordering::Relaxed) && self.has_rung.swap(false, Ordering::SeqCst)
    }
}

impl VolumeCore {
    /// Whether queues have alarms set.
    pub fn has_alarms(&self) -> bool {
        self.queues.iter().any(|q| q.alarm.is_set())
    }

    /// Wakes the queues whose time has come.
    pub fn ring_alarms(&self, now_ms: u64) {
        for shared in self.queues.iter() {
            if shared.alarm.rings(now_ms) {
                lock(&shared.waker).wake();
            }
        }
    }

    /// A round of write-back failed, the `count`th in a row.
    pub fn writeback_failed(&self, failure: Failure, count: u32, now_ms: u64, retry_at_ms: u64) {
        let is_of_disk = failure.is_of_disk;
        self.facts.writeback_failed(failure, count, now_ms, retry_at_ms);
        self.policy.note_writeback(is_of_disk);
        if is_of_disk {
            // Whoever waits for space may have to give up.
            self.wake_waiting();
        }
    }

    /// A round of write-back succeeded after some that failed.
    pub fn writeback_recovered(&self) {
        self.facts.writeback_recovered();
        self.policy.note_writeback(false);
    }

    /// Notes whether the disk owes an answer for too long, and wakes who has to know.
    pub fn look_for_stall(&self, now_ms: u64) {
        let is_stalled = self.owed_ms(now_ms) >= self.policy.stall_ms();
        if self.policy.note_stalled(is_stalled) {
            self.wake_waiting();
        }
    }
}

impl<E: Env> Volume<E> {
    /// Sets what becomes of requests that need the disk while it fails, and after how many milliseconds
    /// without an answer it does (0 for never; in [`OnBackingError::Wait`] never). Holds at once, also
    /// for what waits already.
    pub fn set_on_backing_error(&self, on_error: OnBackingError, timeout_ms: u64) {
        let core = &self.core;
        core.policy.on_error.store(on_error as u8, Ordering::Relaxed);
        core.policy.timeout_ms.store(timeout_ms, Ordering::Relaxed);
        for shared in core.queues.iter() {
            shared.alarm.ring();
            lock(&shared.waker).wake();
        }
        core.wake_waiting();
    }

    /// What becomes of requests that need the disk while it fails.
    pub fn on_backing_error(&self) -> OnBackingError {
        self.core.policy.on_error()
    }

    /// Milliseconds after which a disk that does not answer has failed, 0 for never.
    pub fn backing_timeout_ms(&self) -> u64 {
        self.core.policy.timeout_ms.load(Ordering::Relaxed)
    }

    /// Whether the guest's writes are turned away now: counts one that is.
    pub(crate) fn turns_away(&self, q: u16) -> bool {
        let policy = &self.core.policy;
        let turned =
            policy.on_error() == OnBackingError::ReadOnly && policy.is_failing(|| self.cache.clock.now_ms());
        if turned {
            add(&self.core.queue(q).tally.turned_away, 1);
        }
        turned
    }

    /// Whether a write that finds no space is not to wait for any: there will be none soon.
    pub(crate) fn gives_up_on_space(&self) -> bool {
        let policy = &self.core.policy;
        policy.on_error() != OnBackingError::Wait && policy.takes_nothing()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_does_not_mend_what_is_about_the_sectors_or_the_request() {
        for code in [libc::EIO, libc::ENXIO, libc::ENODEV, libc::ENOSPC, libc::ETIMEDOUT, libc::ENOLINK] {
            assert!(!is_lasting(&io::Error::from_raw_os_error(code)), "{code}");
        }
        for code in [libc::ENODATA, libc::EREMOTEIO, libc::EILSEQ] {
            assert!(is_lasting(&io::Error::from_raw_os_error(code)), "{code}");
        }
        assert!(is_lasting(&io::ErrorKind::UnexpectedEof.into()));
    }

    #[test]
    fn a_deadline_counts_where_nobody_waits_and_brings_the_stall_forward() {
        let policy = Policy::default();
        policy.timeout_ms.store(3000, Ordering::Relaxed);
        assert_eq!((policy.deadline_ms(), policy.stall_ms()), (None, STALL_MS));
        policy.on_error.store(OnBackingError::Error as u8, Ordering::Relaxed);
        assert_eq!((policy.deadline_ms(), policy.stall_ms()), (Some(3000), 3000));
        policy.timeout_ms.store(60_000, Ordering::Relaxed);
        assert_eq!((policy.deadline_ms(), policy.stall_ms()), (Some(60_000), STALL_MS));
    }

    #[test]
    fn a_disk_fails_until_the_last_reason_to_think_so_is_gone() {
        let policy = Policy::default();
        assert!(!policy.is_failing(|| 5));
        policy.note_guest_failed(1000);
        assert!(
            policy.is_failing(|| 1000 + FAILED_GUEST_MS) && !policy.is_failing(|| 1001 + FAILED_GUEST_MS)
        );
        policy.note_writeback(true);
        assert!(policy.note_stalled(true) && !policy.note_stalled(true));
        policy.note_writeback(false);
        assert!(policy.is_failing(|| u64::MAX / 2));
        policy.note_stalled(false);
        assert!(!policy.is_failing(|| u64::MAX / 2));
    }

    #[test]
    fn an_alarm_rings_once_until_it_is_heard() {
        let alarm = Alarm::default();
        assert!(!alarm.is_set() && !alarm.rings(u64::MAX - 1));
        alarm.set(Some(100));
        assert!(!alarm.rings(99) && alarm.rings(100) && !alarm.rings(101));
        assert!(alarm.is_heard() && !alarm.is_heard());
        assert!(alarm.rings(102));
    }
}
