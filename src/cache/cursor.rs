//! Where write-back of each segment with dirty data goes on.

use std::collections::{BTreeMap, VecDeque};

use crate::onmedia::Key;

/// Where write-back of a segment goes on.
#[derive(Clone, Debug)]
pub(crate) enum Cursor {
    /// Records from this offset in the segment down have not been written back.
    Log(u32),
    /// What recovery found dirty, by epoch.
    Keys(VecDeque<Key>),
}

/// A volume's segments that hold dirty data, by the epoch of their next record.
#[derive(Default)]
pub(crate) struct DirtySegments {
    /// `(epoch, segment)` of the next dirty record.
    pub known: BTreeMap<(u64, u32), Cursor>,
    /// Open segments whose records have all been seen.
    pub drained: BTreeMap<u32, Cursor>,
}
