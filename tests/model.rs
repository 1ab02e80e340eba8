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
        self.model.check(0, &self.contents[number])
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
    assert!(model.check(0, &bytes[SECTOR..]).unwrap_err().contains("the data of sector 1"));
    let (_, other) = Model::new(8, 2).begin_write(0, 1);
    assert!(model.check(0, &other).unwrap_err().contains("damaged"));
    let mut torn = bytes.clone();
    torn[256..SECTOR].fill(0);
    assert!(model.check(0, &torn[..SECTOR]).unwrap_err().contains("torn or damaged at byte 256"));
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
