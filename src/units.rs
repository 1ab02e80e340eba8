//! Numbers with meaning: what is counted in sectors, what in bytes, and which number is which.
//!
//! Two integers of one type in a signature want names; these are the names.

use std::fmt;

/// Bytes in a sector, the unit of every virtio-blk address (virtio 1.3 §5.2.6).
pub const SECTOR: u64 = 512;
/// `log2(SECTOR)`.
pub const SECTOR_SHIFT: u32 = 9;
/// Bytes of payload under one checksum, and the page size of every on-media structure.
pub const BLOCK: u64 = 4096;
/// Sectors in a [`BLOCK`].
pub const SECTORS_PER_BLOCK: u64 = BLOCK / SECTOR;

/// A half-open, non-empty range of a volume's sectors.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SectorRange {
    /// First sector.
    pub start: u64,
    /// Number of sectors, at least 1.
    pub len: u64,
}

impl SectorRange {
    /// A range of `len` sectors from `start`. Panics when empty or past 2^63: callers have checked
    /// it against a volume's size.
    pub fn new(start: u64, len: u64) -> Self {
        assert!(len > 0 && start < 1 << 62 && len < 1 << 62, "bad sector range {start}+{len}");
        Self { start, len }
    }

    /// One past the last sector.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Whether any sector is in both.
    pub fn overlaps(&self, other: &SectorRange) -> bool {
        self.start < other.end() && other.start < self.end()
    }

    /// The sectors in both, if any.
    pub fn intersection(&self, other: &SectorRange) -> Option<SectorRange> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| SectorRange { start, len: end - start })
    }
}

impl fmt::Debug for SectorRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start, self.len)
    }
}

impl fmt::Display for SectorRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sectors {}..{}", self.start, self.end())
    }
}

/// A number of bytes, shown for people: in the largest unit that keeps it exact, else with one
/// decimal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Bytes(pub u64);

const BINARY_UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in BINARY_UNITS {
            let one = 1u64 << shift;
            if self.0 >= one && self.0.is_multiple_of(one) {
                return f.pad(&format!("{} {unit}", self.0 >> shift));
            }
            // Of many units a decimal says enough; few are more exact in the next smaller one.
            if self.0 >= 10 * one {
                return f.pad(&format!("{:.1} {unit}", self.0 as f64 / one as f64));
            }
        }
        f.pad(&format!("{} bytes", self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_shown_in_the_largest_unit_that_says_enough() {
        let rows = [
            (1, "1 bytes"),
            (512, "512 bytes"),
            (4096, "4 KiB"),
            (1 << 30, "1 GiB"),
            (3 << 29, "1536 MiB"),
            ((10 << 30) + 1, "10.0 GiB"),
            ((123 << 20) + 5, "123.0 MiB"),
            (5 << 40, "5 TiB"),
        ];
        for (bytes, text) in rows {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }
}
