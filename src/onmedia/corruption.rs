//! What is wrong with bytes that should have been a structure of ours: which field, what it holds,
//! what it should have held.
//!
//! A plain copyable value without allocation: a recovery scan makes and drops many of these.

use std::fmt;

/// A structure on the media is not what was written there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{structure}: {field} is {found:#x}, expected {expected}")]
pub struct Corruption {
    /// The structure, as FORMAT.md calls it.
    pub structure: &'static str,
    /// The field, or what else was compared.
    pub field: &'static str,
    /// What would have been right.
    pub expected: Expected,
    /// What is there; of fields wider than 8 bytes the first 8.
    pub found: u64,
}

/// What a field should have held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Expected {
    /// This value.
    Exactly(u64),
    /// This or more.
    AtLeast(u64),
    /// This or less.
    AtMost(u64),
    /// A multiple of this.
    MultipleOf(u64),
    /// As described.
    Text(&'static str),
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expected::Exactly(value) => write!(f, "{value:#x}"),
            Expected::AtLeast(value) => write!(f, "at least {value:#x}"),
            Expected::AtMost(value) => write!(f, "at most {value:#x}"),
            Expected::MultipleOf(value) => write!(f, "a multiple of {value:#x}"),
            Expected::Text(text) => f.write_str(text),
        }
    }
}

impl Corruption {
    /// The media refused to give the structure up (poison): a copy that is lost like a damaged one.
    pub fn unreadable(structure: &'static str) -> Corruption {
        Corruption { structure, field: "page", expected: Expected::Text("readable"), found: 0 }
    }
}

/// Names the structure once for a row of comparisons.
#[derive(Clone, Copy)]
pub(super) struct Judge(pub &'static str);

impl Judge {
    pub fn corrupt(self, field: &'static str, expected: Expected, found: u64) -> Corruption {
        Corruption { structure: self.0, field, expected, found }
    }

    pub fn exactly(self, field: &'static str, expected: u64, found: u64) -> Result<(), Corruption> {
        self.that(expected == found, field, Expected::Exactly(expected), found)
    }

    pub fn at_least(self, field: &'static str, bound: u64, found: u64) -> Result<(), Corruption> {
        self.that(found >= bound, field, Expected::AtLeast(bound), found)
    }

    pub fn at_most(self, field: &'static str, bound: u64, found: u64) -> Result<(), Corruption> {
        self.that(found <= bound, field, Expected::AtMost(bound), found)
    }

    /// Judges a number that is only ever raised: whoever raises a valid one need not fear its end.
    #[inline]
    pub fn counter(self, field: &'static str, found: u64) -> Result<(), Corruption> {
        self.at_most(field, super::COUNTER_MAX, found)
    }

    pub fn multiple_of(self, field: &'static str, unit: u64, found: u64) -> Result<(), Corruption> {
        self.that(found.is_multiple_of(unit), field, Expected::MultipleOf(unit), found)
    }

    pub fn that(
        self,
        holds: bool,
        field: &'static str,
        expected: Expected,
        found: u64,
    ) -> Result<(), Corruption> {
        if holds { Ok(()) } else { Err(self.corrupt(field, expected, found)) }
    }

    /// Compares the cache a structure says it belongs to.
    pub fn cache(self, expected: &super::Uuid, found: &super::Uuid) -> Result<(), Corruption> {
        let first = u64::from_le_bytes(*found.first_chunk().unwrap_or(&[0; 8]));
        self.that(expected == found, "cache_uuid", Expected::Text("the UUID of this cache"), first)
    }

    /// The first `N` bytes, if there are as many.
    pub fn chunk<const N: usize>(self, bytes: &[u8]) -> Result<&[u8; N], Corruption> {
        bytes.first_chunk().ok_or(Corruption {
            structure: self.0,
            field: "length",
            expected: Expected::AtLeast(N as u64),
            found: bytes.len() as u64,
        })
    }
}
