//! Two copies of a structure, of which one is always whole.
//!
//! An update goes to the copy that is older or damaged, is made durable, and only then counts; so a
//! crash anywhere leaves the newest complete value readable. Which copy is written next follows
//! from the media alone, and is therefore right also for the first update after a restart.

use super::Corruption;

/// A structure whose copies are told apart by a number that each update raises.
pub trait Sequenced {
    /// The number.
    fn sequence(&self) -> u64;
}

/// What two copies amount to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dual<T, E = Corruption> {
    /// The newest valid copy's value, if any copy is valid.
    pub newest: Option<T>,
    /// The copy to write next: never the one `newest` came from.
    pub next: usize,
    /// What is wrong with copy 0 and copy 1.
    pub errors: [Option<E>; 2],
}

impl<T: Sequenced, E> Dual<T, E> {
    /// Whether a copy is damaged, so that the next update (or a repair) has to restore redundancy.
    pub fn is_damaged(&self) -> bool {
        self.errors.iter().any(Option::is_some)
    }

    /// The sequence number of the next update.
    pub fn next_sequence(&self) -> u64 {
        self.newest.as_ref().map_or(1, |value| value.sequence().saturating_add(1))
    }

    /// The newest value, or what is wrong with copy 0.
    ///
    /// # Errors
    /// Neither copy is valid.
    pub fn into_newest(self) -> Result<T, E> {
        match (self.newest, self.errors) {
            (Some(value), _) => Ok(value),
            (None, [Some(error), _] | [None, Some(error)]) => Err(error),
            (None, [None, None]) => unreachable!("a copy without an error is a value"),
        }
    }
}

/// Judges two copies: the valid one with the higher sequence number counts, of two equal ones copy 0.
pub fn newest<T: Sequenced, E>(a: Result<T, E>, b: Result<T, E>) -> Dual<T, E> {
    match (a, b) {
        (Ok(a), Ok(b)) if b.sequence() > a.sequence() => {
            Dual { newest: Some(b), next: 0, errors: [None, None] }
        }
        (Ok(a), Ok(_)) => Dual { newest: Some(a), next: 1, errors: [None, None] },
        (Ok(a), Err(b)) => Dual { newest: Some(a), next: 1, errors: [None, Some(b)] },
        (Err(a), Ok(b)) => Dual { newest: Some(b), next: 0, errors: [Some(a), None] },
        (Err(a), Err(b)) => Dual { newest: None, next: 0, errors: [Some(a), Some(b)] },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, PartialEq, Debug)]
    struct Value(u64, char);

    impl Sequenced for Value {
        fn sequence(&self) -> u64 {
            self.0
        }
    }

    #[test]
    fn the_newest_valid_copy_counts_and_the_other_is_written_next() {
        let a = |n| Ok(Value(n, 'a'));
        let b = |n| Ok(Value(n, 'b'));
        for (first, second, newest_is, next, damaged) in [
            (a(2), b(1), Some('a'), 1, false),
            (a(1), b(2), Some('b'), 0, false),
            (a(7), b(7), Some('a'), 1, false),
            (a(1), Err("x"), Some('a'), 1, true),
            (Err("x"), b(1), Some('b'), 0, true),
            (Err("x"), Err("y"), None, 0, true),
            (a(u64::MAX), b(0), Some('a'), 1, false),
        ] {
            let dual = newest(first, second);
            assert_eq!(dual.newest.map(|value| value.1), newest_is, "{first:?} {second:?}");
            assert_eq!((dual.next, dual.is_damaged()), (next, damaged), "{first:?} {second:?}");
        }
    }

    #[test]
    fn updates_torn_at_any_point_leave_the_last_complete_value() {
        // Two copies, an update that always tears the copy it writes before completing it.
        let mut copies = [Ok(Value(1, 'v')), Ok(Value(1, 'v'))];
        for _ in 0..100 {
            let before = newest(copies[0], copies[1]);
            let (next, sequence) = (before.next, before.next_sequence());
            copies[next] = Err("torn");
            assert_eq!(newest(copies[0], copies[1]).newest, before.newest);
            copies[next] = Ok(Value(sequence, 'v'));
            let after = newest(copies[0], copies[1]);
            assert_eq!(after.newest, Some(Value(sequence, 'v')));
            assert_ne!(after.next, next, "the newest copy would be overwritten");
        }
    }

    #[test]
    fn without_a_valid_copy_the_first_error_is_told() {
        assert_eq!(newest::<Value, _>(Err("x"), Err("y")).into_newest(), Err("x"));
        assert_eq!(newest(Err("x"), Ok(Value(3, 'b'))).into_newest(), Ok(Value(3, 'b')));
    }
}
