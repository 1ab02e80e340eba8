//! Limits on what a guest may ask of its disk: requests and bytes a second, reads, writes, and both.
//!
//! No VMM can throttle a vhost-user disk: its requests never pass through the VMM. So it is done here, as
//! the requests come from the ring (`queue/throttle.rs`).
//!
//! ```text
//!  asked  ─────┬───────┬─┬───────────────────┬──────►  time
//!              │       │ └── held until ──┐  │
//!  started ────┴───────┴──────────────────┴──┴──────►
//! ```
//!
//! Laws:
//! - In any time `t` what starts under a limit is at most `rate · (t + burst)`, and one request more. What
//!   a guest leaves unused is saved up for `burst` and no longer.
//! - A request is given its moment once, when it comes: it is charged to all the limits it falls under and
//!   starts at the latest moment that they leave. So the queues of a volume are served in the order of
//!   their requests, nobody has to look again, and a late wake-up costs nobody anything: what it left
//!   unused counts as saved.
//! - Limits of reads hold up no write, and the other way round. FLUSH is not limited and waits for
//!   nothing: it covers what has completed.
//! - A change holds at once, also for what is held: every limit begins anew, and what is held is given
//!   another moment, in its order.
//! - A queue that is to stop holds nothing back.
//! - Without limits a request pays one load.

use super::env::Env;
use super::stripes::lock;
use super::volume::Volume;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::volume::RequestKind;

/// For how long what is not used is saved up, unless told otherwise: longer than a thread needs to wake up.
pub const BURST_MS_DEFAULT: u32 = 100;
/// Picoseconds in a microsecond: at 10 GB/s a sector takes 51 ns, which is not to be rounded.
const PS: u128 = 1_000_000;

/// Limits of a volume; 0 for none. All that are set hold together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IoLimits {
    /// Requests a second: reads, writes and discards.
    pub iops: u64,
    /// Reads a second.
    pub read_iops: u64,
    /// Writes and discards a second.
    pub write_iops: u64,
    /// Bytes a second that are read or written.
    pub bytes_per_s: u64,
    /// Bytes a second that are read.
    pub read_bytes_per_s: u64,
    /// Bytes a second that are written.
    pub write_bytes_per_s: u64,
    /// For how many milliseconds a guest may save up what it does not use.
    pub burst_ms: u32,
}

impl Default for IoLimits {
    fn default() -> Self {
        Self {
            iops: 0,
            read_iops: 0,
            write_iops: 0,
            bytes_per_s: 0,
            read_bytes_per_s: 0,
            write_bytes_per_s: 0,
            burst_ms: BURST_MS_DEFAULT,
        }
    }
}

impl IoLimits {
    /// Whether there is any.
    pub fn is_any(&self) -> bool {
        let Self { iops, read_iops, write_iops, bytes_per_s, read_bytes_per_s, write_bytes_per_s, .. } =
            *self;
        [iops, read_iops, write_iops, bytes_per_s, read_bytes_per_s, write_bytes_per_s].iter().any(|&n| n > 0)
    }
}

/// What a request was held back by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Why {
    /// The number of requests.
    Iops,
    /// Their bytes.
    Bytes,
}

/// When a request may start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Start {
    pub at_us: u64,
    pub why: Why,
}

/// One limit.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    /// A second; 0 for no limit.
    rate: u64,
    /// When everything charged so far would be over at exactly this rate.
    over_ps: u128,
}

impl Bucket {
    /// Charges `amount`; says from when on it may be used, in microseconds.
    fn charge(&mut self, amount: u64, now_us: u64, burst_ps: u128) -> u64 {
        if self.rate == 0 || amount == 0 {
            return now_us;
        }
        let now_ps = u128::from(now_us) * PS;
        let start_ps = now_ps.max(self.over_ps.saturating_sub(burst_ps));
        let time_ps = (u128::from(amount) * PS * 1_000_000).div_ceil(u128::from(self.rate));
        self.over_ps = self.over_ps.max(now_ps) + time_ps;
        u64::try_from(start_ps.div_ceil(PS)).unwrap_or(u64::MAX)
    }
}

/// All limits of a volume: of requests and of bytes; for reads and writes together, and for each.
#[derive(Debug, Default)]
struct Buckets {
    limits: IoLimits,
    both: [Bucket; 2],
    reads: [Bucket; 2],
    writes: [Bucket; 2],
}

impl Buckets {
    fn new(limits: IoLimits) -> Self {
        let of = |iops, bytes| [iops, bytes].map(|rate| Bucket { rate, over_ps: 0 });
        Self {
            limits,
            both: of(limits.iops, limits.bytes_per_s),
            reads: of(limits.read_iops, limits.read_bytes_per_s),
            writes: of(limits.write_iops, limits.write_bytes_per_s),
        }
    }

    fn charge(&mut self, is_read: bool, bytes: u64, now_us: u64) -> Start {
        let burst_ps = u128::from(self.limits.burst_ms) * 1000 * PS;
        let own = if is_read { &mut self.reads } else { &mut self.writes };
        let mut start = Start { at_us: now_us, why: Why::Iops };
        for buckets in [&mut self.both, own] {
            for (bucket, (amount, why)) in buckets.iter_mut().zip([(1, Why::Iops), (bytes, Why::Bytes)]) {
                let at_us = bucket.charge(amount, now_us, burst_ps);
                if at_us > start.at_us {
                    start = Start { at_us, why };
                }
            }
        }
        start
    }
}

/// What limits one volume.
#[derive(Debug, Default)]
pub(crate) struct Limiter {
    is_on: AtomicBool,
    /// How often the limits have been changed.
    generation: AtomicU64,
    buckets: Mutex<Buckets>,
}

impl Limiter {
    /// Whether there are any limits.
    pub fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }

    /// A number that is another one after a change.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Charges a request; says when it may start.
    pub fn charge(&self, kind: RequestKind, sectors: u64, now_us: u64) -> Start {
        let bytes = match kind {
            RequestKind::Read | RequestKind::Write => sectors * 512,
            _ => 0,
        };
        lock(&self.buckets).charge(kind == RequestKind::Read, bytes, now_us)
    }

    fn set(&self, limits: IoLimits) {
        *lock(&self.buckets) = Buckets::new(limits);
        self.is_on.store(limits.is_any(), Ordering::Relaxed);
        self.generation.fetch_add(1, Ordering::Release);
    }

    fn limits(&self) -> IoLimits {
        lock(&self.buckets).limits
    }
}

impl<E: Env> Volume<E> {
    /// Limits what the guest may ask for, at once.
    pub fn set_io_limits(&self, limits: IoLimits) {
        if limits == self.limiter.limits() {
            return;
        }
        self.limiter.set(limits);
        for shared in self.core.queues.iter() {
            lock(&shared.waker).wake();
        }
    }

    /// What [`Volume::set_io_limits`] has set.
    pub fn io_limits(&self) -> IoLimits {
        self.limiter.limits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000;

    /// A guest that always has `depth` requests of so many bytes under way: how many start in `seconds`.
    fn started(buckets: &mut Buckets, is_read: bool, bytes: u64, depth: usize, seconds: u64) -> u64 {
        let mut starts = std::collections::VecDeque::from(vec![0u64; depth]);
        let mut count = 0;
        loop {
            let now = starts.pop_front().expect("depth is above 0");
            let start = buckets.charge(is_read, bytes, now);
            if start.at_us >= seconds * SECOND {
                return count;
            }
            count += 1;
            starts.push_back(start.at_us.max(now));
        }
    }

    #[test]
    fn a_limit_is_kept_to_the_request_and_its_burst() {
        let rows = [
            (IoLimits { iops: 1, ..IoLimits::default() }, 10, 1),
            (IoLimits { iops: 100, ..IoLimits::default() }, 1000, 10),
            (IoLimits { read_iops: 777, ..IoLimits::default() }, 7770, 78),
            (IoLimits { iops: 200_000, ..IoLimits::default() }, 2_000_000, 20_000),
            (IoLimits { bytes_per_s: 40_960, ..IoLimits::default() }, 100, 1),
            (IoLimits { read_bytes_per_s: 1 << 30, ..IoLimits::default() }, 2_621_440, 26_215),
            // The tighter of two.
            (IoLimits { iops: 500, read_bytes_per_s: 4096 * 50, ..IoLimits::default() }, 500, 5),
        ];
        for (limits, most, burst) in rows {
            for depth in [1, 32] {
                let count = started(&mut Buckets::new(limits), true, 4096, depth, 10);
                assert!(
                    (most..=most + burst + 1).contains(&count),
                    "{limits:?}, depth {depth}: {count} of {most} and {burst}"
                );
            }
        }
    }

    #[test]
    fn writes_do_not_pay_for_a_limit_of_reads() {
        let mut buckets = Buckets::new(IoLimits { read_iops: 10, ..IoLimits::default() });
        for _ in 0..100 {
            buckets.charge(true, 4096, 5);
        }
        assert_eq!(buckets.charge(false, 4096, 5), Start { at_us: 5, why: Why::Iops });
        assert!(buckets.charge(true, 4096, 5).at_us > 9 * SECOND);
    }

    #[test]
    fn a_request_says_which_limit_it_waits_for() {
        let limits = IoLimits { iops: 1000, bytes_per_s: 1 << 20, ..IoLimits::default() };
        let mut buckets = Buckets::new(limits);
        let last = |buckets: &mut Buckets, bytes| (0..1000).map(|_| buckets.charge(true, bytes, 0)).last();
        assert_eq!(last(&mut buckets, 512).unwrap().why, Why::Iops);
        assert_eq!(last(&mut buckets, 1 << 16).unwrap().why, Why::Bytes);
    }

    #[test]
    fn what_is_saved_up_is_lost_after_the_burst() {
        let limits = IoLimits { iops: 100, burst_ms: 200, ..IoLimits::default() };
        let mut buckets = Buckets::new(limits);
        let at_once = |buckets: &mut Buckets, now: u64| {
            (0..).take_while(|_| buckets.charge(true, 0, now).at_us == now).count()
        };
        assert_eq!(at_once(&mut buckets, 0), 21);
        assert_eq!(at_once(&mut buckets, 3600 * SECOND), 21, "an hour of silence saves no more");
    }
}
