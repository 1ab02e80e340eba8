//! What a disk may show: per sector the writes that count, by when they began and ended.
//!
//! A write *precedes* another if it had ended before the other began; writes that overlap in time
//! may take effect in either order. From this follow all rules:
//!
//! - a read may show a write unless one that it precedes had ended before the read began;
//! - after a crash a sector may show a write unless one that it precedes was acknowledged (daemon)
//!   or durable (host);
//! - the disk alone, in strict order: if it shows anything that began after a FLUSH had ended, then
//!   it shows nothing that precedes a write which had ended when that FLUSH began. A write submitted
//!   without a write cache is its own FLUSH, of itself alone.
//!
//! - the disk alone, in grouped order: if it shows anything, it shows all that had ended before that
//!   began, FLUSH or not.
//!
//! A write that failed, or was under way in a crash, may have happened, until something that it
//! precedes covers it. After a crash the run reads everything and tells ([`Oracle::narrow`]): what
//! was read once is from then on the truth.

/// Never.
const NEVER: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
struct Write {
    id: u64,
    value: u64,
    began: u64,
    /// When it was acknowledged, failed, or resolved by a crash.
    ended: u64,
    /// Whether it was acknowledged, so that it must be there.
    is_acked: bool,
    is_durable: bool,
    /// Whether its completion orders as a FLUSH does, for itself alone: written without a write
    /// cache.
    is_through: bool,
}

impl Write {
    fn precedes(&self, other: &Write) -> bool {
        self.ended < other.began
    }
}

/// A FLUSH that was acknowledged.
#[derive(Clone, Copy, Debug)]
struct Flush {
    began: u64,
    ended: u64,
}

/// What every sector of a volume may show after a crash at one instant.
#[derive(Clone, Debug)]
pub struct Recoverable {
    /// Where in `values` each sector's end.
    ends: Vec<u32>,
    values: Vec<u64>,
}

impl Recoverable {
    /// The first sector that shows what it may not.
    pub fn first_wrong(&self, values: &[u64]) -> Option<u64> {
        assert_eq!(values.len(), self.ends.len(), "every sector is compared");
        let mut start = 0;
        for (sector, (&value, &end)) in values.iter().zip(&self.ends).enumerate() {
            if !self.values[start..end as usize].contains(&value) {
                return Some(sector as u64);
            }
            start = end as usize;
        }
        None
    }
}

/// The model of one volume.
#[derive(Clone, Debug)]
pub struct Oracle {
    sectors: Vec<Vec<Write>>,
    flushes: Vec<Flush>,
    now: u64,
    next_id: u64,
    /// Whether the disk alone has been legal at every moment so far.
    pub is_ordered: bool,
    /// Whether it has shown exactly one moment of the guest's, as in grouped order.
    pub is_exact: bool,
}

impl Oracle {
    /// A volume whose disk holds `content`, durably.
    pub fn new(content: &[u64]) -> Oracle {
        let first = |&value| {
            vec![Write {
                id: 0,
                value,
                began: 0,
                ended: 0,
                is_acked: true,
                is_durable: true,
                is_through: false,
            }]
        };
        Oracle {
            sectors: content.iter().map(first).collect(),
            flushes: Vec::new(),
            now: 1,
            next_id: 1,
            is_ordered: true,
            is_exact: false,
        }
    }

    /// A moment later than all before.
    pub fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// A write, or zeroing with value 0, begins. Returns its name.
    pub fn begin_write(&mut self, first: u64, count: u64, value: u64) -> u64 {
        let (id, began) = (self.next_id, self.tick());
        self.next_id += 1;
        let write =
            Write { id, value, began, ended: NEVER, is_acked: false, is_durable: false, is_through: false };
        for sector in &mut self.sectors[first as usize..(first + count) as usize] {
            sector.push(write);
        }
        id
    }

    /// It ends: acknowledged, durably so or not, or failed.
    pub fn end_write(&mut self, id: u64, first: u64, count: u64, is_acked: bool, is_durable: bool) {
        let ended = self.tick();
        for sector in &mut self.sectors[first as usize..(first + count) as usize] {
            let write = sector.iter_mut().find(|w| w.id == id).expect("it began");
            write.ended = if is_acked { ended } else { NEVER };
            (write.is_acked, write.is_durable) = (is_acked, is_acked && is_durable);
        }
    }

    /// A FLUSH that began at `began` is acknowledged: what had ended before it is durable.
    pub fn end_flush(&mut self, began: u64) {
        let ended = self.tick();
        self.flushes.push(Flush { began, ended });
        for write in self.sectors.iter_mut().flatten() {
            write.is_durable |= write.is_acked && write.ended < began;
        }
    }

    /// A write that was acknowledged had been submitted without a write cache: it is durable, and
    /// orders itself before what begins from here on.
    pub fn end_through(&mut self, id: u64, first: u64, count: u64) {
        self.end_write(id, first, count, true, true);
        for sector in &mut self.sectors[first as usize..(first + count) as usize] {
            sector.iter_mut().find(|w| w.id == id).expect("it began").is_through = true;
        }
    }

    /// Marks a moment that orders as a FLUSH does.
    fn barrier(&mut self) {
        let (began, ended) = (self.tick(), self.tick());
        self.flushes.push(Flush { began, ended });
    }

    /// Whether a read of `sector` that began at `began` and ends now may show `value`.
    pub fn may_read(&self, sector: u64, value: u64, began: u64) -> Result<(), String> {
        self.judge(sector, value, |w| w.is_acked && w.ended < began)
    }

    /// Whether `sector` may show `value` after a crash now.
    pub fn may_recover(&self, sector: u64, value: u64, host: bool) -> Result<(), String> {
        self.judge(sector, value, |w| w.is_acked && (!host || w.is_durable))
    }

    /// The values that each sector may show after a crash now: what [`Oracle::may_recover`] allows.
    pub fn recoverable(&self, host: bool) -> Recoverable {
        let mut all = Recoverable { ends: Vec::with_capacity(self.sectors.len()), values: Vec::new() };
        for writes in &self.sectors {
            // What precedes any write that must be there precedes the one that began last.
            let must = writes.iter().filter(|w| w.is_acked && (!host || w.is_durable));
            let begun = must.map(|w| w.began).max().unwrap_or(0);
            all.values.extend(writes.iter().filter(|w| w.ended >= begun).map(|w| w.value));
            all.ends.push(all.values.len() as u32);
        }
        all
    }

    fn judge(&self, sector: u64, value: u64, must: impl Fn(&Write) -> bool) -> Result<(), String> {
        let writes = &self.sectors[sector as usize];
        let lost = |w: &Write| writes.iter().find(|other| must(other) && w.precedes(other));
        let mut named = writes.iter().filter(|w| w.value == value).peekable();
        if named.peek().is_none() {
            return Err(format!("sector {sector} shows {value:#x}, which nobody may show there: {writes:?}"));
        }
        match named.clone().find(|w| lost(w).is_none()) {
            Some(_) => Ok(()),
            None => {
                let newer = named.next_back().and_then(lost);
                Err(format!("sector {sector} shows {value:#x}, lost is {newer:?} of {writes:?}"))
            }
        }
    }

    /// After a crash, everything was read: these values, and nothing else, are the truth now. They
    /// are durable, unless they come from the write cache of a disk that kept its power.
    pub fn narrow(&mut self, values: &[u64], is_durable: bool) {
        let now = self.tick();
        let id = self.next_id;
        self.next_id += 1;
        for (sector, &value) in self.sectors.iter_mut().zip(values) {
            for write in sector.iter_mut() {
                write.ended = write.ended.min(now - 1);
            }
            let truth =
                Write { id, value, began: now, ended: now, is_acked: true, is_durable, is_through: false };
            sector.push(truth);
        }
        if is_durable {
            self.barrier();
        }
    }

    /// Whether the disk alone, holding `value(sector)`, is one that a volatile cache could leave.
    ///
    /// # Errors
    /// What it shows, and what it should have shown before that.
    pub fn judge_disk_alone(&self, values: &[u64]) -> Result<(), String> {
        let mut newest_began = 0;
        for (sector, &value) in values.iter().enumerate() {
            let shown = self.sectors[sector].iter().find(|w| w.value == value);
            let Some(oldest) = shown else {
                let writes = &self.sectors[sector];
                return Err(format!("the disk alone holds {value:#x} at sector {sector}: {writes:?}"));
            };
            newest_began = newest_began.max(oldest.began);
        }
        let flush = self.flushes.iter().filter(|f| f.ended < newest_began).max_by_key(|f| f.began);
        let flushed = flush.map_or(0, |f| f.began);
        let is_exact = self.is_exact;
        for (sector, &value) in values.iter().enumerate() {
            let writes = &self.sectors[sector];
            let lost = |shown: &Write| {
                let must = |w: &&Write| {
                    w.is_acked && w.ended < if is_exact || w.is_through { newest_began } else { flushed }
                };
                writes.iter().filter(must).find(|w| shown.precedes(w))
            };
            let mut named = writes.iter().filter(|w| w.value == value);
            if named.clone().all(|shown| lost(shown).is_some()) {
                let shown = named.next_back();
                return Err(format!(
                    "the disk alone shows a write begun at {newest_began}, after {flush:?}, but at \
                     sector {sector} {shown:?} and not {:?}",
                    shown.and_then(lost)
                ));
            }
        }
        Ok(())
    }

    /// Whether the disk holds everything acknowledged and nothing else.
    pub fn judge_drained(&self, values: &[u64]) -> Result<(), String> {
        let judge = |(sector, &value): (usize, &u64)| {
            self.judge(sector as u64, value, |w| w.is_acked)
                .map_err(|e| format!("after a drain the disk is not what the guest sees: {e}"))
        };
        values.iter().enumerate().try_for_each(judge)
    }

    /// Forgets what can matter no more. `possible` is what a sector of the disk holds or may hold,
    /// `reading_since` when the oldest read under way began.
    pub fn prune(&mut self, reading_since: u64, possible: impl Fn(u64) -> Vec<u64>) {
        for (number, writes) in self.sectors.iter_mut().enumerate() {
            if writes.len() < 4 {
                continue;
            }
            let covers = |o: &&Write| o.is_acked && o.is_durable && o.ended < reading_since;
            let covered = writes.iter().filter(covers).map(|w| w.began).max().unwrap_or(0);
            let on_disk = possible(number as u64);
            let shown = |value: &u64| writes.iter().find(|w| w.value == *value).map_or(0, |w| w.began);
            let shown = on_disk.iter().map(shown).min().unwrap_or(0);
            writes.retain(|w| w.ended >= covered.min(shown));
        }
        let oldest = self.sectors.iter().filter_map(|w| w.first()).map(|w| w.began).min().unwrap_or(0);
        if self.flushes.len() > 64 {
            // Of flushes older than everything known one is enough.
            let keep = self.flushes.iter().filter(|f| f.ended < oldest).count().saturating_sub(1);
            self.flushes.drain(..keep);
        }
    }

    /// Number of sectors.
    pub fn len(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// Whether there are no sectors.
    pub fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(oracle: &mut Oracle, sector: u64, value: u64, durable: bool) {
        let id = oracle.begin_write(sector, 1, value);
        oracle.end_write(id, sector, 1, true, durable);
    }

    #[test]
    fn an_acknowledged_write_survives_the_daemon_and_a_flushed_one_the_host() {
        let mut oracle = Oracle::new(&[1]);
        written(&mut oracle, 0, 2, false);
        assert!(oracle.may_recover(0, 1, false).is_err());
        assert!(oracle.may_recover(0, 1, true).is_ok());
        assert!(oracle.may_recover(0, 2, true).is_ok());
        assert!(oracle.may_recover(0, 9, true).is_err(), "nobody's");
        for (value, host) in [(1, false), (1, true), (2, false), (2, true), (9, true)] {
            let wrong = oracle.recoverable(host).first_wrong(&[value]).is_some();
            assert_eq!(wrong, oracle.may_recover(0, value, host).is_err(), "{value}, host {host}");
        }
        let began = oracle.tick();
        written(&mut oracle, 0, 3, false);
        oracle.end_flush(began);
        assert!(oracle.may_recover(0, 1, true).is_err());
        assert!(oracle.may_recover(0, 2, true).is_ok(), "3 ended after the flush began");
        assert!(oracle.may_recover(0, 3, true).is_ok());
    }

    #[test]
    fn writes_that_overlap_in_time_may_end_either_way_and_a_failed_one_may_have_happened() {
        let mut oracle = Oracle::new(&[1]);
        let a = oracle.begin_write(0, 1, 2);
        let b = oracle.begin_write(0, 1, 3);
        oracle.end_write(a, 0, 1, true, true);
        oracle.end_write(b, 0, 1, true, true);
        let now = oracle.tick();
        assert!(oracle.may_read(0, 2, now).is_ok() && oracle.may_read(0, 3, now).is_ok());
        assert!(oracle.may_read(0, 1, now).is_err());
        let c = oracle.begin_write(0, 1, 4);
        oracle.end_write(c, 0, 1, false, false);
        let now = oracle.tick();
        assert!((2..5).all(|value| oracle.may_read(0, value, now).is_ok()));
    }

    #[test]
    fn what_was_read_after_a_crash_stays() {
        let mut oracle = Oracle::new(&[1]);
        _ = oracle.begin_write(0, 1, 2);
        oracle.narrow(&[1], true);
        assert!(oracle.may_recover(0, 2, true).is_err());
        assert!(oracle.may_recover(0, 1, true).is_ok());
    }

    #[test]
    fn the_disk_alone_shows_the_past_of_every_flush_whose_future_it_shows() {
        let mut oracle = Oracle::new(&[1, 2]);
        written(&mut oracle, 0, 10, true);
        let began = oracle.tick();
        oracle.end_flush(began);
        written(&mut oracle, 1, 11, true);
        for (disk, legal) in [([1, 2], true), ([10, 2], true), ([10, 11], true), ([1, 11], false)] {
            assert_eq!(oracle.judge_disk_alone(&disk).is_ok(), legal, "{disk:?}");
        }
        assert!(oracle.judge_disk_alone(&[3, 2]).is_err(), "nobody's");
        oracle.prune(NEVER, |s| vec![[10, 11][s as usize]]);
        assert!(oracle.judge_disk_alone(&[10, 11]).is_ok());
        assert!(oracle.judge_drained(&[10, 11]).is_ok());
        assert!(oracle.judge_drained(&[10, 2]).is_err());
    }
}
