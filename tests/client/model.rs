//! What a disk may answer, sector by sector, while requests overlap and the server dies.
//!
//! Every written sector says who wrote it: its content is a function of (seed, sector, version), and
//! the version stands in it. So a sector read back names its write, and a sector of another place,
//! an older life or another disk cannot pass.
//!
//! A sector is an atomic register. Its candidates are the writes that may be its value now: those in
//! flight, and those completed that nothing has surely overwritten. A candidate is dropped
//! - when a write completes that began after the candidate had completed;
//! - when a read returns such a write, complete or not: it has taken effect;
//! - when a read returns something else although the candidate had completed before that read began:
//!   then the other one is on top, and it stays (no flipping back and forth).
//!
//! A dropped candidate remains legal for reads that had begun before. Nothing here knows of FLUSH
//! or of the server's death: what was acknowledged or once read survives a `kill -9`.

use std::collections::HashMap;
use std::fmt;

const SECTOR: usize = 512;
const MAGIC: u64 = 0x7063_6163_6865_2d31;

/// A write's number; 0 is whatever reads as zeros.
type Version = u32;

/// A moment: every beginning and every end has its own.
type Moment = u64;

const NEVER: Moment = Moment::MAX;

/// One write that a sector may hold.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    /// What the sector holds under it; 0 for zeros.
    content: Version,
    began: Moment,
    /// When it completed, well or not; [`NEVER`] while it is in flight.
    ended: Moment,
    /// When it ceased to be a possible value; [`NEVER`] while it is one.
    dropped: Moment,
    /// Whether it ended in an error: then it may or may not have taken effect.
    failed: bool,
}

/// A sector about which more is to be known than one version.
#[derive(Debug)]
struct Busy {
    candidates: Vec<Candidate>,
    /// Beginnings of the reads in flight.
    reads: Vec<Moment>,
}

/// A write, discard or write-zeroes in flight. Must be ended.
#[derive(Debug)]
#[must_use]
pub struct Writing {
    pub sector: u64,
    pub sectors: u64,
    content: Version,
    began: Moment,
}

/// A read in flight. Must be ended.
#[derive(Debug)]
#[must_use]
pub struct Reading {
    pub sector: u64,
    pub sectors: u64,
    began: Moment,
}

/// A sector that must not hold what was read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wrong {
    pub sector: u64,
    pub why: String,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sector {}: {}", self.sector, self.why)
    }
}

/// A disk as it may be.
#[derive(Debug)]
pub struct Model {
    seed: u64,
    settled: Vec<Version>,
    busy: HashMap<u64, Busy>,
    versions: Version,
    now: Moment,
}

/// The words of a sector.
fn words(seed: u64, sector: u64, version: Version) -> impl Iterator<Item = u64> {
    let head = [MAGIC, sector, u64::from(version)];
    let mut key = seed ^ sector.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (u64::from(version) << 32);
    key ^= key >> 29;
    key = key.wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1;
    head.into_iter().chain((3..(SECTOR / 8) as u64).map(move |i| key.wrapping_mul(i) ^ (key >> i)))
}

fn word(bytes: &[u8], index: usize) -> u64 {
    u64::from_le_bytes(bytes[index * 8..index * 8 + 8].try_into().expect("eight bytes"))
}

/// The version a sector's content names, 0 for zeros.
fn identify(seed: u64, sector: u64, bytes: &[u8]) -> Result<Version, String> {
    if word(bytes, 0) != MAGIC {
        let zeros = bytes.iter().all(|byte| *byte == 0);
        return zeros.then_some(0).ok_or_else(|| format!("neither data nor zeros: {:02x?}", &bytes[..24]));
    }
    let (found, version) = (word(bytes, 1), word(bytes, 2) as Version);
    if found != sector {
        return Err(format!("the data of sector {found} (version {version})"));
    }
    match words(seed, sector, version).enumerate().find(|(i, expected)| word(bytes, *i) != *expected) {
        None => Ok(version),
        Some((at, _)) => Err(format!("version {version}, but torn or damaged at byte {}", at * 8)),
    }
}

impl Model {
    /// A disk of zeros.
    pub fn new(sectors: u64, seed: u64) -> Self {
        Self { seed, settled: vec![0; sectors as usize], busy: HashMap::new(), versions: 0, now: 0 }
    }

    /// Size in sectors.
    pub fn sectors(&self) -> u64 {
        self.settled.len() as u64
    }

    /// Whether nothing is in flight and every sector has one possible value: then a number each is
    /// all that is kept.
    pub fn is_settled(&self) -> bool {
        self.busy.is_empty()
    }

    fn tick(&mut self) -> Moment {
        self.now += 1;
        self.now
    }

    /// Begins a write and gives the bytes to write.
    pub fn begin_write(&mut self, sector: u64, sectors: u64) -> (Writing, Vec<u8>) {
        self.versions += 1;
        let content = self.versions;
        let mut bytes = Vec::with_capacity(sectors as usize * SECTOR);
        for at in sector..sector + sectors {
            words(self.seed, at, content).for_each(|word| bytes.extend(word.to_le_bytes()));
        }
        (self.begin(sector, sectors, content), bytes)
    }

    /// Begins something that makes sectors read as zeros.
    pub fn begin_zeroes(&mut self, sector: u64, sectors: u64) -> Writing {
        self.begin(sector, sectors, 0)
    }

    fn begin(&mut self, sector: u64, sectors: u64, content: Version) -> Writing {
        let began = self.tick();
        for at in sector..sector + sectors {
            let candidate = Candidate { content, began, ended: NEVER, dropped: NEVER, failed: false };
            self.busy(at).candidates.push(candidate);
        }
        Writing { sector, sectors, content, began }
    }

    fn busy(&mut self, sector: u64) -> &mut Busy {
        let content = self.settled[sector as usize];
        self.busy.entry(sector).or_insert_with(|| Busy {
            candidates: vec![Candidate { content, began: 0, ended: 0, dropped: NEVER, failed: false }],
            reads: Vec::new(),
        })
    }

    /// Ends a write. One that failed may or may not have taken effect, sector by sector, until
    /// something surely overwrites it.
    pub fn end_write(&mut self, writing: Writing, succeeded: bool) {
        let now = self.tick();
        for at in writing.sector..writing.sector + writing.sectors {
            let busy = self.busy.get_mut(&at).expect("a sector under writing is busy");
            let mut same = busy.candidates.iter_mut().filter(|c| c.began == writing.began);
            let own = same.next().expect("a write under way is a candidate");
            own.ended = now;
            own.failed = !succeeded;
            if succeeded {
                busy.drop_ended_before(writing.began, now);
            }
            self.settle(at);
        }
    }

    /// Begins a read.
    pub fn begin_read(&mut self, sector: u64, sectors: u64) -> Reading {
        let began = self.tick();
        for at in sector..sector + sectors {
            self.busy(at).reads.push(began);
        }
        Reading { sector, sectors, began }
    }

    /// Ends a read with what it returned.
    ///
    /// # Errors
    /// The first sector that must not have held what was read.
    pub fn end_read(&mut self, reading: Reading, bytes: &[u8]) -> Result<(), Wrong> {
        assert_eq!(bytes.len() as u64, reading.sectors * SECTOR as u64, "a read returns what was asked for");
        let now = self.tick();
        let mut verdict = Ok(());
        for (i, bytes) in bytes.chunks_exact(SECTOR).enumerate() {
            let at = reading.sector + i as u64;
            let found = identify(self.seed, at, bytes);
            let busy = self.busy.get_mut(&at).expect("a sector under reading is busy");
            let explained = found.and_then(|content| busy.observe(content, reading.began, now));
            verdict = verdict.and(explained.map_err(|why| Wrong { sector: at, why }));
            let own = busy.reads.iter().position(|began| *began == reading.began);
            busy.reads.swap_remove(own.expect("a read under way is known"));
            self.settle(at);
        }
        verdict
    }

    /// Forgets what no read can ask for any more.
    fn settle(&mut self, sector: u64) {
        let busy = self.busy.get_mut(&sector).expect("only busy sectors settle");
        let first = busy.reads.iter().min().copied().unwrap_or(NEVER);
        busy.candidates.retain(|c| c.dropped == NEVER || c.dropped > first);
        let Some(content) = busy.candidates.first().map(|c| c.content) else {
            unreachable!("the last candidate is never dropped");
        };
        let alike = busy.candidates.iter().all(|c| c.content == content && c.ended != NEVER);
        if alike && busy.reads.is_empty() {
            self.settled[sector as usize] = content;
            self.busy.remove(&sector);
        }
    }

    /// What a sector's content is, whether it may be there or not.
    pub fn describe(&self, sector: u64, bytes: &[u8]) -> String {
        identify(self.seed, sector, bytes).map_or_else(|why| why, name)
    }

    /// Checks a quiet disk, read some other way, from `sector` on.
    ///
    /// # Errors
    /// As [`Model::end_read`].
    pub fn check(&mut self, sector: u64, bytes: &[u8]) -> Result<(), Wrong> {
        let reading = self.begin_read(sector, (bytes.len() / SECTOR) as u64);
        self.end_read(reading, bytes)
    }
}

impl Busy {
    fn drop_ended_before(&mut self, moment: Moment, now: Moment) {
        for other in self.candidates.iter_mut().filter(|c| c.ended < moment && c.dropped == NEVER) {
            other.dropped = now;
        }
    }

    /// Accounts for a read that began at `began` and returned `content`.
    fn observe(&mut self, content: Version, began: Moment, now: Moment) -> Result<(), String> {
        let legal = |c: &&Candidate| c.content == content && c.dropped > began;
        // Zeros do not say who wrote them: then the earliest that may have is all that is certain.
        let Some(first) = self.candidates.iter().filter(legal).map(|c| c.began).min() else {
            let allowed: Vec<_> =
                self.candidates.iter().filter(|c| c.dropped > began).map(Candidate::describe).collect();
            return Err(format!("holds {}, allowed: {}", name(content), allowed.join(", ")));
        };
        self.drop_ended_before(first, now);
        for other in &mut self.candidates {
            if other.content != content && other.ended < began && other.dropped == NEVER {
                other.dropped = now;
            }
        }
        Ok(())
    }
}

impl Candidate {
    fn describe(&self) -> String {
        let state = match (self.ended, self.failed) {
            (NEVER, _) => "in flight",
            (_, true) => "failed",
            (_, false) => "completed",
        };
        format!("{} ({state}, began at {})", name(self.content), self.began)
    }
}

fn name(content: Version) -> String {
    if content == 0 { "zeros".to_owned() } else { format!("version {content}") }
}
