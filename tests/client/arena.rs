//! Hands out pieces of guest memory, so that requests lie scattered as a guest's do.

use std::collections::BTreeMap;

/// Free guest memory, as disjoint ranges by start.
#[derive(Debug, Default)]
pub struct Arena {
    free: BTreeMap<u64, u64>,
    /// Where the last piece came from: the next one comes from behind it, so that memory is reused late.
    cursor: u64,
}

impl Arena {
    /// An arena of these `(start, len)` ranges.
    pub fn new(ranges: impl IntoIterator<Item = (u64, u64)>) -> Self {
        Self { free: ranges.into_iter().collect(), cursor: 0 }
    }

    /// A piece of `len` bytes at a multiple of `align`, within one range.
    pub fn alloc(&mut self, len: u64, align: u64) -> Option<u64> {
        let fits = |(start, size): (&u64, &u64)| {
            let at = start.next_multiple_of(align);
            (at + len <= start + size).then_some((*start, *size, at))
        };
        let behind = self.free.range(self.cursor..).find_map(fits);
        let (start, size, at) = behind.or_else(|| self.free.range(..self.cursor).find_map(fits))?;
        self.free.remove(&start);
        if at > start {
            self.free.insert(start, at - start);
        }
        if at + len < start + size {
            self.free.insert(at + len, start + size - at - len);
        }
        self.cursor = at + len;
        Some(at)
    }

    /// Takes a piece back.
    pub fn free(&mut self, at: u64, len: u64) {
        let (mut start, mut size) = (at, len);
        if let Some((&before, &before_len)) = self.free.range(..at).next_back() {
            assert!(before + before_len <= at, "a piece was freed twice");
            if before + before_len == at {
                self.free.remove(&before);
                (start, size) = (before, before_len + len);
            }
        }
        if let Some(&after_len) = self.free.get(&(at + len)) {
            self.free.remove(&(at + len));
            size += after_len;
        }
        self.free.insert(start, size);
    }
}
