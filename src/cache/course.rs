//! How far write-back is, in the time that it takes: what a drain tells of its end.
//!
//! Bytes that have become clean do not say it. In `strict` the first epochs bring much to the disk that
//! later ones replace. In `relaxed` and `grouped` nothing turns clean before its round ends. And a group
//! is journaled before it is written, which takes as long as that, or next to nothing.
//!
//! So what counts is *payload*: each record owes the bytes it was committed with, replaced or not, until
//! the round that covers it has ended. Rounds take records in the order of their commits, so a drain ends
//! when all that was owed at its beginning is paid. Of a round under way that part of the payload counts
//! as paid that is the part of its time which has gone by:
//!
//! ```text
//!  ┌ journal ┬ writes ──────────┬ end ┐     a stage that has begun: time gone / part done,
//!  0 ─────── now ───────────────────── 1    one that has not: as long as the last rounds' took
//! ```
//!
//! Before there were any, journal and writes are taken to be equally long, and the end, which is a flush,
//! to be nothing.
//!
//! All of this is advice: no law depends on it. What it promises is `tests/reconcile.rs`'s.

/// What a last round's time counts for, as a part of the present one: enough until the first
/// operations of that have ended, and soon outweighed if it goes faster or slower.
const MEMORY: f64 = 1.0 / 64.0;

/// A round under way.
#[derive(Clone, Copy, Debug)]
struct Leg {
    /// Bytes of records that it pays for.
    payload: u64,
    /// Bytes to be written.
    todo: u64,
    /// Of the journal, the part that is on its way; `None` for a round without.
    journaled: Option<f64>,
    written: u64,
    /// When it began; when its writes did, and when the last of them ended; µs.
    began_us: u64,
    writes_us: Option<u64>,
    written_us: Option<u64>,
}

/// How far write-back of one volume is. Times in µs.
#[derive(Debug, Default)]
pub(crate) struct Course {
    /// Bytes of records that ended rounds have covered, of all ever committed.
    paid: u64,
    leg: Option<Leg>,
    /// What the last rounds' stages took: for each byte to be written, and in all.
    journal_per_byte: f64,
    write_per_byte: f64,
    end_us: f64,
}

impl Course {
    /// Bytes of records that ended rounds have covered.
    pub fn paid(&self) -> u64 {
        self.paid
    }

    /// Nothing is dirty of so many bytes ever committed: what relocation has dropped is paid as well.
    pub fn settle(&mut self, owed: u64) {
        self.paid = self.paid.max(owed);
    }

    /// A round begins that covers so many bytes of records and writes `todo`.
    pub fn begin(&mut self, payload: u64, todo: u64, is_journaled: bool, now_us: u64) {
        self.leg = Some(Leg {
            payload,
            todo: todo.max(1),
            journaled: is_journaled.then_some(0.0),
            written: 0,
            began_us: now_us,
            writes_us: (!is_journaled).then_some(now_us),
            written_us: None,
        });
    }

    /// So much of the journal is on its way.
    pub fn journaled(&mut self, done: u64, all: u64) {
        if let Some(leg) = &mut self.leg {
            leg.journaled = leg.journaled.map(|_| done as f64 / all.max(1) as f64);
        }
    }

    /// The journal has ended.
    pub fn journal_ended(&mut self, now_us: u64) {
        let Some(leg) = &mut self.leg else { return };
        leg.writes_us = Some(now_us);
        let us = now_us.saturating_sub(leg.began_us) as f64;
        self.journal_per_byte = us / leg.todo as f64;
    }

    /// So many bytes are on the disk.
    pub fn wrote(&mut self, bytes: u64) {
        if let Some(leg) = &mut self.leg {
            leg.written += bytes;
        }
    }

    /// All writes have ended.
    pub fn written(&mut self, now_us: u64) {
        let Some(leg) = &mut self.leg else { return };
        leg.written_us = Some(now_us);
        if leg.written > 0 {
            let us = now_us.saturating_sub(leg.writes_us.unwrap_or(leg.began_us));
            self.write_per_byte = us as f64 / leg.written as f64;
        }
    }

    /// The flush has ended.
    pub fn flushed(&mut self, now_us: u64) {
        if let Some(written_us) = self.leg.and_then(|leg| leg.written_us) {
            self.end_us = now_us.saturating_sub(written_us) as f64;
        }
    }

    /// The round has ended, well or not.
    pub fn end(&mut self, is_settled: bool) {
        if let Some(leg) = self.leg.take().filter(|_| is_settled) {
            self.paid += leg.payload;
        }
    }

    /// Bytes of records up to `goal` that are paid, those of the round under way in proportion to its time.
    pub fn way(&self, goal: u64, now_us: u64) -> u64 {
        let left = goal.saturating_sub(self.paid);
        let part = self.leg.map_or(0.0, |leg| {
            let Stages { gone, left: rest } = self.stages(&leg, now_us);
            leg.payload.min(left) as f64 * if gone > 0.0 { (gone / (gone + rest)).min(0.999) } else { 0.0 }
        });
        goal - left + part as u64
    }

    /// What of a round's time has gone by, and is left.
    fn stages(&self, leg: &Leg, now_us: u64) -> Stages {
        let since = |then: u64| now_us.saturating_sub(then) as f64;
        let todo = leg.todo as f64;
        let last_write = if self.write_per_byte > 0.0 { self.write_per_byte } else { self.journal_per_byte };
        let gone = since(leg.began_us);
        let Some(writes_us) = leg.writes_us else {
            let journal = stage(gone, leg.journaled.unwrap_or(0.0), self.journal_per_byte * todo);
            let writes = if last_write > 0.0 { last_write * todo } else { journal };
            return Stages { gone, left: journal - gone + writes + self.end_us };
        };
        if let Some(written_us) = leg.written_us {
            return Stages { gone, left: (self.end_us - since(written_us)).max(0.0) };
        }
        // A sweep may come across what was not yet dirty when it was measured.
        let done = leg.written as f64 / leg.todo.max(leg.written) as f64;
        let writes = since(writes_us);
        Stages { gone, left: stage(writes, done, last_write * todo) - writes + self.end_us }
    }
}

/// A round's time, in µs: what is gone, and what is left, infinite for unknown.
struct Stages {
    gone: f64,
    left: f64,
}

/// How long a stage takes of which a part is done after a time, and which took so long the last time; 0
/// for unknown.
fn stage(gone: f64, done: f64, last: f64) -> f64 {
    let memory = if last > 0.0 { MEMORY } else { 0.0 };
    let weight = done + memory;
    if weight > 0.0 { ((gone + last * memory) / weight).max(gone) } else { f64::INFINITY }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A fresh course whose round of `payload` writes as much from the moment 0.
    fn begun(payload: u64, is_journaled: bool) -> Course {
        let mut course = Course::default();
        course.begin(payload, payload, is_journaled, 0);
        course
    }

    #[test]
    fn a_round_has_paid_the_part_of_its_payload_that_is_the_part_of_its_time() {
        let mut course = begun(8 * MIB, false);
        assert_eq!(course.way(8 * MIB, 1000), 0, "nothing is known");
        course.wrote(2 * MIB);
        assert_eq!(course.way(8 * MIB, 1000), 2 * MIB);
        // Standing still is not getting on.
        assert_eq!(course.way(8 * MIB, 4000), 2 * MIB);
        course.wrote(6 * MIB);
        course.written(4000);
        course.flushed(5000);
        course.end(true);
        assert_eq!((course.paid(), course.way(16 * MIB, 5000)), (8 * MIB, 8 * MIB));
        // The next one knows how long a flush takes: of five parts four are gone.
        course.begin(8 * MIB, 8 * MIB, false, 10_000);
        course.wrote(8 * MIB);
        course.written(14_000);
        assert_eq!(course.way(16 * MIB, 14_000), 8 * MIB + 8 * MIB * 4 / 5);
        course.end(false);
        assert_eq!(course.paid(), 8 * MIB, "what failed has paid nothing");
    }

    #[test]
    fn a_journal_counts_for_the_time_it_takes() {
        let mut course = begun(8 * MIB, true);
        course.journaled(1, 2);
        assert_eq!(course.way(8 * MIB, 1000), 2 * MIB, "half of what may be half");
        course.journaled(1, 1);
        course.journal_ended(2000);
        assert_eq!(course.way(8 * MIB, 2000), 4 * MIB);
        // The writes turn out to take nine times as long.
        course.wrote(4 * MIB);
        let way = course.way(8 * MIB, 2000 + 9000);
        assert!(way.abs_diff(8 * MIB * 11 / 20) < MIB / 8, "{way}");
    }

    #[test]
    fn of_a_round_only_what_was_asked_for_counts() {
        let mut course = begun(8 * MIB, false);
        course.wrote(4 * MIB);
        assert_eq!(course.way(2 * MIB, 1000), MIB);
        course.end(true);
        assert_eq!(course.way(2 * MIB, 1000), 2 * MIB);
        course.settle(9 * MIB);
        course.settle(MIB);
        assert_eq!(course.paid(), 9 * MIB);
    }

    #[test]
    fn no_order_of_events_makes_it_say_more_than_all() {
        let mut course = begun(MIB, true);
        course.wrote(64 * MIB);
        course.journaled(0, 0);
        for now in [0, 1, 1000] {
            assert!(course.way(MIB, now) < MIB);
        }
        course.journal_ended(0);
        assert!(course.way(MIB, 5) <= MIB);
        course.written(0);
        assert!(course.way(MIB, 5) < MIB);
        let mut empty = Course::default();
        empty.journaled(1, 1);
        empty.journal_ended(1);
        empty.written(1);
        empty.flushed(1);
        empty.end(true);
        assert_eq!(empty.way(MIB, 5), 0);
    }
}
