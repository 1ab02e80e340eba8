//! A map of extents for one thread: the index's core with a single shard.
//!
//! Write-back gathers the keys of an epoch in one, so that of each sector only the newest version is
//! written. An epoch can be as large as the cache, hence the packed form here too; the lone shard's
//! lock is never contended and costs less than a second implementation would.

use super::{Extent, Index};
use crate::units::SectorRange;

/// Which sectors map where, newest insertion wins.
pub struct ExtentMap {
    index: Index,
}

impl Default for ExtentMap {
    fn default() -> Self {
        Self::new()
    }
}

impl ExtentMap {
    /// An empty map.
    pub fn new() -> ExtentMap {
        ExtentMap { index: Index::new(1) }
    }

    /// Maps the extent, whatever was there; appends to `replaced` exactly the old parts it took.
    pub fn insert(&mut self, extent: Extent, replaced: &mut Vec<Extent>) {
        self.index.insert(extent, replaced);
    }

    /// Appends what is mapped in the range, clipped, in ascending order.
    pub fn lookup(&self, range: SectorRange, found: &mut Vec<Extent>) {
        self.index.lookup(range, found);
    }

    /// Everything mapped, in ascending order, each extent as stored.
    pub fn iter(&self) -> Iter<'_> {
        Iter { index: &self.index, cursor: Some(0), found: Vec::new().into_iter() }
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.index.mapped_sectors() == 0
    }

    /// Bytes of RAM in use.
    pub fn memory_bytes(&self) -> u64 {
        self.index.memory_bytes()
    }
}

impl<'a> IntoIterator for &'a ExtentMap {
    type Item = Extent;
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

/// The extents of an [`ExtentMap`], ascending.
pub struct Iter<'a> {
    index: &'a Index,
    cursor: Option<u64>,
    found: std::vec::IntoIter<Extent>,
}

impl Iterator for Iter<'_> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        loop {
            if let Some(extent) = self.found.next() {
                return Some(extent);
            }
            let mut found = Vec::new();
            self.cursor = self.index.step(self.cursor?, false, |extent| found.push(extent));
            self.found = found.into_iter();
        }
    }
}
