//! The slow side's state: a disk with a volatile write cache, sector by sector.
//!
//! What a completed write stored is volatile until a flush that was submitted after its completion
//! has completed. A host crash keeps of each sector any state since the last such flush; of writes
//! in flight any sectors. A daemon's death leaves the write cache alone; its writes in flight land
//! wholly, in part or not at all.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::content::{self, BYTES};
use super::rng::Rng;

/// What of a volatile write cache a host crash leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskSurvival {
    /// Nothing.
    Nothing,
    /// Everything that completed, nothing that was in flight.
    Completed,
    /// Everything, in flight or not.
    Everything,
    /// Each sector by chance, in any of its states.
    Random,
}

/// A state of a sector that is not durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Version {
    value: u64,
    /// The write it comes from.
    write: u64,
    /// When that write completed; `u64::MAX` while it is in flight.
    completed: u64,
}

/// A write in flight.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Flying {
    first: u64,
    values: Vec<u64>,
    /// Sectors of it, from its first on, that have reached the write cache.
    landed: usize,
}

/// What is in the sectors of a disk that holds anything but a guest's writes: the number of each
/// content is a hash of it. One book for all images of a disk.
#[derive(Clone, Debug, Default)]
struct Book(Arc<Mutex<BTreeMap<u64, [u8; BYTES]>>>);

impl PartialEq for Book {
    fn eq(&self, _: &Book) -> bool {
        true
    }
}

impl Eq for Book {}

/// One disk: what each sector holds is the number of a write (see `content`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskState {
    /// What tells it from other disks.
    pub identity: u64,
    /// For a disk of any bytes, what they are.
    book: Option<Book>,
    /// Whether its write cache was lost and nobody has been told: the next flush fails.
    pub owes_error: bool,
    /// What stands beside it; durable as soon as it is stored.
    pub sidecar: Option<Vec<u8>>,
    /// The consistency group that its volume is served in.
    pub group: Option<String>,
    durable: Vec<u64>,
    volatile: BTreeMap<u64, Vec<Version>>,
    flying: BTreeMap<u64, Flying>,
    next_write: u64,
    /// Counts completions.
    now: u64,
}

impl DiskState {
    /// A disk with this content, all of it durable.
    pub fn new(content: Vec<u64>) -> DiskState {
        DiskState {
            identity: 1,
            book: None,
            owes_error: false,
            sidecar: None,
            group: None,
            durable: content,
            volatile: BTreeMap::new(),
            flying: BTreeMap::new(),
            next_write: 1,
            now: 1,
        }
    }

    /// The same under another name.
    pub fn named(self, identity: u64) -> DiskState {
        DiskState { identity, ..self }
    }

    /// The same, its volume served in a consistency group.
    pub fn in_group(self, name: &str) -> DiskState {
        DiskState { group: Some(name.to_owned()), ..self }
    }

    /// A blank disk of any bytes.
    pub fn raw(sectors: u64) -> DiskState {
        DiskState { book: Some(Book::default()), ..DiskState::new(vec![0; sectors as usize]) }
    }

    /// A disk of any bytes, these, all of them durable.
    pub fn raw_of(bytes: &[u8]) -> DiskState {
        let blank = DiskState::raw(0);
        let value = |(sector, bytes)| blank.decode(0, sector as u64, bytes).expect("a book takes anything");
        let durable = bytes.chunks_exact(BYTES).enumerate().map(value).collect();
        DiskState { durable, ..blank.clone() }
    }

    /// What sectors of a disk of any bytes hold.
    pub fn bytes(&self, sectors: std::ops::Range<u64>) -> Vec<u8> {
        assert!(self.book.is_some(), "a guest's disk is told by its values");
        let mut bytes = vec![0; (sectors.end - sectors.start) as usize * BYTES];
        for (sector, out) in sectors.zip(bytes.chunks_exact_mut(BYTES)) {
            self.encode(0, sector, out);
        }
        bytes
    }

    /// Fills `out` with what the sector `sector` of disk number `disk` holds.
    pub(super) fn encode(&self, disk: usize, sector: u64, out: &mut [u8]) {
        let value = self.value(sector);
        match &self.book {
            Some(_) if value == 0 => out.fill(0),
            Some(book) => {
                let book = book.0.lock().unwrap_or_else(PoisonError::into_inner);
                out.copy_from_slice(&book[&value]);
            }
            None => content::encode(disk, sector, value, out),
        }
    }

    /// The number of what is to be stored.
    pub(super) fn decode(&self, disk: usize, sector: u64, bytes: &[u8]) -> Result<u64, String> {
        let Some(book) = &self.book else { return content::decode(disk, sector, bytes) };
        if bytes.iter().all(|&byte| byte == 0) {
            return Ok(0);
        }
        let mix = |hash: u64, word: &[u8; 8]| {
            (hash.rotate_left(23) ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        };
        let value = bytes.as_chunks::<8>().0.iter().fold(1, mix) | 1;
        let content: [u8; BYTES] = bytes.try_into().map_err(|_| "not a sector".to_owned())?;
        let before = book.0.lock().unwrap_or_else(PoisonError::into_inner).insert(value, content);
        assert!(before.is_none_or(|before| before == content), "two contents with one number");
        Ok(value)
    }

    /// Whether nothing was ever stored there.
    pub(super) fn is_blank(&self) -> bool {
        self.next_write == 1
    }

    /// Number of sectors.
    pub fn sectors(&self) -> u64 {
        self.durable.len() as u64
    }

    /// What a read returns.
    pub fn value(&self, sector: u64) -> u64 {
        match self.volatile.get(&sector).and_then(|v| v.last()) {
            Some(version) => version.value,
            None => self.durable[sector as usize],
        }
    }

    /// What a read returns, of all sectors.
    pub fn values(&self) -> Vec<u64> {
        (0..self.sectors()).map(|s| self.value(s)).collect()
    }

    /// What would be left if nothing volatile survived.
    pub fn durable_values(&self) -> &[u64] {
        &self.durable
    }

    /// Everything a sector holds or may come to hold by itself: durable, volatile, in flight.
    pub fn possible(&self, sector: u64) -> Vec<u64> {
        let mut all = vec![self.durable[sector as usize]];
        all.extend(self.volatile.get(&sector).into_iter().flatten().map(|v| v.value));
        let over = |f: &&Flying| f.first <= sector && sector < f.first + f.values.len() as u64;
        all.extend(self.flying.values().filter(over).map(|f| f.values[(sector - f.first) as usize]));
        all
    }

    /// A write begins. Panics when it overlaps another: the order of the two would be nobody's.
    pub(super) fn begin_write(&mut self, first: u64, values: Vec<u64>) -> u64 {
        let end = first + values.len() as u64;
        assert!(end <= self.sectors(), "a write past the end of the disk: {first}..{end}");
        for other in self.flying.values() {
            let other_end = other.first + other.values.len() as u64;
            assert!(
                other_end <= first || end <= other.first,
                "overlapping writes in flight: {first}..{end} and {}..{other_end}",
                other.first,
            );
        }
        let write = self.next_write;
        self.next_write += 1;
        tracing::debug!(write, first, ?values, "disk write");
        self.flying.insert(write, Flying { first, values, landed: 0 });
        write
    }

    /// The write reaches the write cache, before its completion is seen.
    pub(super) fn land(&mut self, write: u64) {
        self.land_prefix(write, usize::MAX);
    }

    /// A short transfer: the first `sectors` of the write reach the write cache.
    pub(super) fn land_prefix(&mut self, write: u64, sectors: usize) {
        let flying = self.flying.get_mut(&write).expect("a write in flight");
        let upto = sectors.min(flying.values.len());
        for (i, &value) in flying.values.iter().enumerate().take(upto).skip(flying.landed) {
            let version = Version { value, write, completed: u64::MAX };
            self.volatile.entry(flying.first + i as u64).or_default().push(version);
        }
        flying.landed = flying.landed.max(upto);
    }

    /// The write completes; a failed one may have stored some of its sectors.
    pub(super) fn complete_write(&mut self, write: u64, failed: Option<&mut Rng>) {
        match failed {
            None => self.land(write),
            Some(rng) => self.land_partly(write, rng),
        }
        self.end_write(write);
    }

    /// The write ends and stores nothing more.
    pub(super) fn end_write(&mut self, write: u64) {
        self.now += 1;
        let now = self.now;
        let flying = self.flying.remove(&write).expect("a write in flight");
        for sector in flying.first..flying.first + flying.values.len() as u64 {
            for version in self.volatile.get_mut(&sector).into_iter().flatten() {
                if version.write == write {
                    version.completed = now;
                }
            }
        }
    }

    fn land_partly(&mut self, write: u64, rng: &mut Rng) {
        let flying = self.flying.get_mut(&write).expect("a write in flight");
        for (i, &value) in flying.values.iter().enumerate().skip(flying.landed) {
            if rng.chance(1, 2) {
                let version = Version { value, write, completed: u64::MAX };
                self.volatile.entry(flying.first + i as u64).or_default().push(version);
            }
        }
        flying.landed = flying.values.len();
    }

    /// The write cache loses what it held, sector by sector by chance. Returns how many sectors.
    pub(super) fn lose_write_cache(&mut self, rng: &mut Rng) -> u64 {
        let before = self.volatile.len();
        let flying: Vec<_> = self.flying.keys().copied().collect();
        self.volatile.retain(|_, versions| {
            // What is in flight is its submitter's to repeat: it has not ended yet.
            versions.iter().any(|v| flying.contains(&v.write)) || rng.chance(1, 2)
        });
        (before - self.volatile.len()) as u64
    }

    /// The moment a flush is submitted: what it covers.
    pub(super) fn flush_mark(&self) -> u64 {
        self.now
    }

    /// A flush completes.
    pub(super) fn complete_flush(&mut self, mark: u64) {
        self.now += 1;
        let durable = &mut self.durable;
        self.volatile.retain(|&sector, versions| {
            if let Some(last) = versions.iter().rposition(|v| v.completed <= mark) {
                durable[sector as usize] = versions[last].value;
                versions.drain(..=last);
            }
            !versions.is_empty()
        });
    }

    /// A disk of another size with the same content where both have sectors, zeros elsewhere.
    pub fn resized(&self, sectors: u64) -> DiskState {
        let mut content = self.values();
        content.resize(sectors as usize, 0);
        DiskState { identity: self.identity, book: self.book.clone(), ..DiskState::new(content) }
    }

    /// Gives it so many sectors more; durable at once.
    pub(super) fn grow(&mut self, sectors: u64) {
        self.durable.resize(sectors as usize, 0);
    }

    /// The daemon dies with writes in flight; they end before anybody else may open the disk.
    pub fn daemon_crash(&mut self, rng: &mut Rng) {
        // The kernel owes it to a file that is closed now.
        self.owes_error = false;
        let flying: Vec<u64> = self.flying.keys().copied().collect();
        for write in flying {
            match rng.below(3) {
                0 => self.complete_write(write, None),
                1 => self.complete_write(write, Some(rng)),
                _ if self.flying[&write].landed > 0 => self.end_write(write),
                _ => _ = self.flying.remove(&write),
            }
        }
    }

    /// The host dies. Returns a hash of what was kept of what was volatile.
    pub fn host_crash(&mut self, survival: DiskSurvival, rng: &mut Rng) -> u64 {
        let flying: Vec<u64> = self.flying.keys().copied().collect();
        for write in flying {
            match survival {
                DiskSurvival::Everything => self.complete_write(write, None),
                DiskSurvival::Random => self.complete_write(write, Some(rng)),
                DiskSurvival::Nothing | DiskSurvival::Completed => _ = self.flying.remove(&write),
            }
        }
        self.owes_error = false;
        let mut hash = 1u64;
        for (sector, versions) in std::mem::take(&mut self.volatile) {
            let kept = match survival {
                DiskSurvival::Nothing => None,
                DiskSurvival::Everything => versions.last(),
                DiskSurvival::Completed => versions.iter().rfind(|v| v.completed != u64::MAX),
                DiskSurvival::Random => versions.get(rng.index(versions.len() + 1)),
            };
            if let Some(version) = kept {
                self.durable[sector as usize] = version.value;
            }
            hash = (hash ^ self.durable[sector as usize] ^ sector << 40)
                .wrapping_mul(0x100_0000_01b3)
                .rotate_left(7);
        }
        hash
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_covers_what_completed_before_it_was_submitted() {
        let mut disk = DiskState::new(vec![0; 4]);
        let early = disk.begin_write(0, vec![1]);
        disk.complete_write(early, None);
        let during = disk.begin_write(1, vec![2]);
        disk.land(during);
        let mark = disk.flush_mark();
        disk.complete_write(during, None);
        disk.complete_flush(mark);
        assert_eq!(disk.values(), [1, 2, 0, 0]);
        assert_eq!(disk.durable_values(), [1, 0, 0, 0]);
        assert_eq!(disk.possible(1), [0, 2]);
        disk.host_crash(DiskSurvival::Nothing, &mut Rng::new(1));
        assert_eq!(disk.values(), [1, 0, 0, 0]);
    }

    #[test]
    #[should_panic(expected = "overlapping writes in flight")]
    fn overlapping_writes_in_flight_are_a_bug_of_the_caller() {
        let mut disk = DiskState::new(vec![0; 4]);
        disk.begin_write(0, vec![1, 1]);
        disk.begin_write(1, vec![2]);
    }

    #[test]
    fn any_state_of_a_sector_since_the_flush_may_survive() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..100 {
            let mut disk = DiskState::new(vec![0; 1]);
            for value in [1, 2] {
                let write = disk.begin_write(0, vec![value]);
                disk.complete_write(write, None);
            }
            _ = disk.begin_write(0, vec![3]);
            disk.host_crash(DiskSurvival::Random, &mut Rng::new(seed));
            seen.insert(disk.value(0));
        }
        assert_eq!(seen, [0, 1, 2, 3].into());
    }
}
