//! A shard's regions by number, and the sums a shard keeps.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

use super::entry::Entry;
use super::region::{Change, Region};
use crate::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The regions of one shard that hold anything but a whole region of zeros.
pub(super) struct Table {
    regions: HashMap<u64, Region, Seed>,
    /// Bits of a region's number that are the same in all of this table.
    shift: u32,
    /// Where edits put entries together, kept so that an edit allocates nothing.
    scratch: Vec<Entry>,
}

impl Table {
    /// An empty table of regions whose numbers have their lowest `shift` bits in common.
    pub fn new(seed: Seed, shift: u32) -> Table {
        Table { regions: HashMap::with_hasher(seed), shift, scratch: Vec::new() }
    }

    pub fn get(&self, region: u64) -> Option<&Region> {
        self.regions.get(&(region >> self.shift))
    }

    /// The scratch and, if it is here, the region.
    pub fn slot(&mut self, region: u64) -> (&mut Vec<Entry>, Option<&mut Region>) {
        (&mut self.scratch, self.regions.get_mut(&(region >> self.shift)))
    }

    pub fn insert(&mut self, region: u64, entries: Region) {
        self.regions.insert(region >> self.shift, entries);
    }

    pub fn remove(&mut self, region: u64) {
        self.regions.remove(&(region >> self.shift));
        if self.regions.capacity() > 64 && self.regions.len() < self.regions.capacity() / 8 {
            self.regions.shrink_to(self.regions.len() * 2);
        }
    }

    /// Bytes on the heap, but for what the regions own.
    pub fn memory_bytes(&self) -> u64 {
        // hashbrown: a power of two of buckets, seven eighths of them usable, a control byte each
        // and sixteen more.
        let buckets = match self.regions.capacity() {
            0 => 0,
            capacity => (capacity * 8 / 7).next_power_of_two(),
        };
        let bucket = size_of::<(u64, Region)>() + 1;
        (buckets * bucket + 16 + self.scratch.capacity() * size_of::<Entry>()) as u64
    }
}

/// A keyed multiplicative hash of region numbers: one multiplication, both halves of the product.
///
/// Region numbers are a guest's choice, so the key is random; and they come in strides, which a
/// plain multiplication would leave in the low bits that pick a bucket.
#[derive(Clone, Copy)]
pub(super) struct Seed(u64);

impl Seed {
    pub fn random() -> Seed {
        Seed(RandomState::new().hash_one(0u64))
    }
}

impl BuildHasher for Seed {
    type Hasher = RegionHasher;

    fn build_hasher(&self) -> RegionHasher {
        RegionHasher(self.0)
    }
}

pub(super) struct RegionHasher(u64);

impl Hasher for RegionHasher {
    fn write_u64(&mut self, number: u64) {
        // 2^64 / φ, odd: consecutive numbers land as far apart as they can.
        let product = u128::from(self.0 ^ number) * 0x9e37_79b9_7f4a_7c15;
        self.0 = product as u64 ^ (product >> 64) as u64;
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// What a shard contributes to an index's sums. Written under the shard's write lock only, read by
/// anyone.
///
/// A change of a region's representation is one addition of the difference, so it cannot be seen
/// half done. A change of a run over many shards is added to one of them: single sums may wrap below
/// zero, and only their total means anything.
#[derive(Default)]
pub(super) struct Sums {
    /// Entries in the table.
    extents: AtomicU64,
    /// Sectors mapped, by the table or by runs.
    mapped: AtomicU64,
    /// Those of them that are dirty.
    dirty: AtomicU64,
    /// Bytes the table's regions own.
    heap: AtomicU64,
}

impl Sums {
    /// Adds; the caller holds the shard for writing.
    pub fn add(&self, change: Change) {
        let Change { extents, mapped, dirty, heap } = change;
        for (sum, change) in
            [(&self.extents, extents), (&self.mapped, mapped), (&self.dirty, dirty), (&self.heap, heap)]
        {
            if change != 0 {
                sum.store(sum.load(Relaxed).wrapping_add_signed(change), Relaxed);
            }
        }
    }

    /// The total over all shards. Below zero only for a reader that caught the end of a change and
    /// not its beginning.
    pub fn total(sums: impl Iterator<Item = u64>) -> u64 {
        let total = sums.fold(0, u64::wrapping_add);
        (total as i64).max(0) as u64
    }

    pub fn extents(&self) -> u64 {
        self.extents.load(Relaxed)
    }

    pub fn mapped(&self) -> u64 {
        self.mapped.load(Relaxed)
    }

    pub fn dirty(&self) -> u64 {
        self.dirty.load(Relaxed)
    }

    pub fn heap(&self) -> u64 {
        self.heap.load(Relaxed)
    }
}
