//! The model that judges the server, judged itself: each rule of what a disk may answer.

mod client;

use client::Model;

const SECTOR: usize = 512;

/// A model of eight sectors; writes of sector 0 alone, by their order of beginning.
struct Case {
    model: Model,
    contents: Vec<Vec<u8>>,
}

impl Case {
    fn new() -> Self {
        Self { model: Model::new(8, 1), contents: vec![vec![0; SECTOR]] }
    }

    fn begin(&mut self) -> client::model::Writing {
        let (writing, bytes) = self.model.begin_write(0, 1);
        self.contents.push(bytes);
        writing
    }

    fn write(&mut self) {
        let writing = self.begin();
        self.model.end_write(writing, true);
    }

    /// Whether a read of sector 0 may return the write of this number, 0 being zeros.
    fn read(&mut self, number: usize) -> Result<(), String> {
        self.model.check(0, &self.contents[number]).map_err(|wrong| wrong.why)
    }
}

#[test]
fn a_completed_write_replaces_what_was_there() {
    let mut case = Case::new();
    case.read(0).unwrap();
    case.write();
    case.read(1).unwrap();
    assert!(case.read(0).unwrap_err().contains("holds zeros"));
}

#[test]
fn a_write_in_flight_may_or_may_not_show_but_once_shown_it_stays() {
    let mut case = Case::new();
    let one = case.begin();
    case.read(0).unwrap();
    case.read(1).unwrap();
    assert!(case.read(0).is_err(), "the new value had been seen");
    case.model.end_write(one, true);
    case.read(1).unwrap();
}

#[test]
fn of_two_overlapping_writes_either_may_stay_but_not_both_in_turn() {
    for (first, other) in [(1, 2), (2, 1)] {
        let mut case = Case::new();
        let (one, two) = (case.begin(), case.begin());
        case.model.end_write(two, true);
        case.model.end_write(one, true);
        assert!(case.read(0).is_err(), "both have completed");
        case.read(first).unwrap();
        assert!(case.read(other).is_err(), "the other one had been seen");
        case.read(first).unwrap();
    }
}

#[test]
fn a_write_that_began_after_another_completed_wins() {
    let mut case = Case::new();
    case.write();
    case.write();
    assert!(case.read(1).is_err());
    case.read(2).unwrap();
}

#[test]
fn a_read_that_began_before_a_write_completed_may_return_what_was_before() {
    let mut case = Case::new();
    let one = case.begin();
    let early = case.model.begin_read(0, 1);
    case.model.end_write(one, true);
    let late = case.model.begin_read(0, 1);
    case.model.end_read(early, &[0; SECTOR]).unwrap();
    assert!(case.model.end_read(late, &[0; SECTOR]).is_err());
    case.read(1).unwrap();
}

#[test]
fn a_write_in_flight_may_take_effect_again_over_one_that_began_and_ended_meanwhile() {
    // A killed server runs what was in flight a second time.
    let mut case = Case::new();
    let one = case.begin();
    case.read(1).unwrap();
    case.write();
    case.read(2).unwrap();
    case.read(1).unwrap();
    case.model.end_write(one, true);
    case.read(1).unwrap();
    assert!(case.read(2).is_err());
}

#[test]
fn a_failed_write_may_show_or_not_until_something_covers_it() {
    for seen in [0, 1] {
        let mut case = Case::new();
        let one = case.begin();
        case.model.end_write(one, false);
        case.read(seen).unwrap();
        assert!(case.read(1 - seen).is_err(), "what was seen stays");
        case.write();
        assert!(case.read(1).is_err());
        case.read(2).unwrap();
    }
}

#[test]
fn content_of_another_place_seed_or_half_a_write_is_refused() {
    let mut model = Model::new(8, 1);
    let (one, bytes) = model.begin_write(0, 2);
    model.end_write(one, true);
    assert!(model.check(0, &bytes[SECTOR..]).unwrap_err().why.contains("the data of sector 1"));
    let (_, other) = Model::new(8, 2).begin_write(0, 1);
    assert!(model.check(0, &other).unwrap_err().why.contains("damaged"));
    let mut torn = bytes.clone();
    torn[256..SECTOR].fill(0);
    assert!(model.check(0, &torn[..SECTOR]).unwrap_err().why.contains("torn or damaged at byte 256"));
    let mut flipped = bytes.clone();
    for at in 0..SECTOR {
        flipped[at] ^= 0x10;
        assert!(model.check(0, &flipped[..SECTOR]).is_err(), "a bit of byte {at} was flipped");
        flipped[at] ^= 0x10;
    }
    model.check(0, &bytes).unwrap();
}

#[test]
fn zeroes_and_data_replace_each_other() {
    let mut case = Case::new();
    case.write();
    let zeroes = case.model.begin_zeroes(0, 4);
    case.read(1).unwrap();
    case.model.end_write(zeroes, true);
    assert!(case.read(1).is_err());
    case.read(0).unwrap();
    case.write();
    assert!(case.read(0).is_err());
}

#[test]
fn a_quiet_model_keeps_one_number_per_sector() {
    let mut model = Model::new(8, 1);
    let (one, bytes) = model.begin_write(0, 8);
    assert!(!model.is_settled());
    model.end_write(one, true);
    model.check(0, &bytes).unwrap();
    assert!(model.is_settled());
}

/// What the dumb disk is doing.
enum Running {
    Write { writing: client::model::Writing, bytes: Vec<u8>, applied: Vec<bool> },
    Read { reading: client::model::Reading, got: Vec<Option<Vec<u8>>> },
}

/// Eight sectors of memory that run overlapping requests sector by sector in any order, and run what
/// has not been completed again after a "kill".
struct DumbDisk {
    model: Model,
    sectors: Vec<Vec<u8>>,
    running: Vec<Running>,
    history: Vec<Vec<Vec<u8>>>,
    rng: client::Rng,
}

impl DumbDisk {
    fn new(seed: u64) -> Self {
        let zeros = || vec![vec![0; SECTOR]; 8];
        let history = (0..8).map(|_| vec![vec![0; SECTOR]]).collect();
        Self {
            model: Model::new(8, seed),
            sectors: zeros(),
            running: vec![],
            history,
            rng: client::Rng::new(seed),
        }
    }

    fn begin(&mut self) {
        let sector = self.rng.below(8);
        let count = self.rng.between(1, 8 - sector);
        let running = match self.rng.below(5) {
            0..2 => Running::Read {
                reading: self.model.begin_read(sector, count),
                got: vec![None; count as usize],
            },
            2 => Running::Write {
                writing: self.model.begin_zeroes(sector, count),
                bytes: vec![0; count as usize * SECTOR],
                applied: vec![false; count as usize],
            },
            _ => {
                let (writing, bytes) = self.model.begin_write(sector, count);
                for (i, content) in bytes.chunks(SECTOR).enumerate() {
                    self.history[sector as usize + i].push(content.to_vec());
                }
                Running::Write { writing, bytes, applied: vec![false; count as usize] }
            }
        };
        self.running.push(running);
    }

    /// Runs one sector of one request.
    fn step(&mut self, which: usize) {
        match &mut self.running[which] {
            Running::Write { writing, bytes, applied } => {
                let i = self.rng.below(writing.sectors) as usize;
                if !std::mem::replace(&mut applied[i], true) {
                    self.sectors[writing.sector as usize + i] = bytes[i * SECTOR..][..SECTOR].to_vec();
                }
            }
            Running::Read { reading, got } => {
                let i = self.rng.below(reading.sectors) as usize;
                got[i].get_or_insert_with(|| self.sectors[reading.sector as usize + i].clone());
            }
        }
    }

    /// Completes a request that has run whole.
    fn complete(&mut self, which: usize) {
        let whole = match &self.running[which] {
            Running::Write { applied, .. } => applied.iter().all(|done| *done),
            Running::Read { got, .. } => got.iter().all(Option::is_some),
        };
        if !whole {
            return;
        }
        match self.running.swap_remove(which) {
            Running::Write { writing, .. } => self.model.end_write(writing, true),
            Running::Read { reading, got } => {
                let bytes: Vec<u8> = got.into_iter().flatten().flatten().collect();
                self.model.end_read(reading, &bytes).expect("a disk that does nothing wrong");
            }
        }
    }

    /// Everything in flight starts over.
    fn kill(&mut self) {
        for running in &mut self.running {
            match running {
                Running::Write { applied, .. } => applied.fill(false),
                Running::Read { got, .. } => got.fill(None),
            }
        }
    }
}

#[test]
fn a_disk_that_does_nothing_wrong_is_never_accused_and_any_older_content_is() {
    let seed = client::Rng::seed_from_env("PCACHE_SEED");
    eprintln!("PCACHE_SEED={seed}");
    for round in 0..200 {
        let mut disk = DumbDisk::new(seed.wrapping_add(round));
        for _ in 0..400 {
            match disk.rng.below(40) {
                0 => disk.kill(),
                1..6 if disk.running.len() < 6 => disk.begin(),
                roll if !disk.running.is_empty() => {
                    let which = disk.rng.below(disk.running.len() as u64) as usize;
                    if roll < 32 { disk.step(which) } else { disk.complete(which) }
                }
                _ => {}
            }
        }
        while !disk.running.is_empty() {
            disk.step(0);
            disk.complete(0);
        }
        for sector in 0..8 {
            let now = disk.sectors[sector].clone();
            disk.model.check(sector as u64, &now).unwrap();
            for older in disk.history[sector].iter().filter(|content| **content != now) {
                assert!(disk.model.check(sector as u64, older).is_err(), "round {round} sector {sector}");
            }
            disk.model.check(sector as u64, &now).unwrap();
        }
        assert!(disk.model.is_settled());
    }
}
