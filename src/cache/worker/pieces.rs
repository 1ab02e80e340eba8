//! Parts of keys: what relocation copies is rarely all that a key says.

use crate::onmedia::Key;
use crate::units::SectorRange;

/// The part of a key that says `range`.
pub(super) fn cut(key: &Key, range: SectorRange) -> Key {
    let payload = key.payload + (range.start - key.first) as u32;
    Key { first: range.start, sectors: range.len as u32, payload, ..*key }
}

/// The parts of a key with payload whose payload sectors pass the test.
pub(super) fn runs(key: Key, test: impl Fn(u32) -> bool) -> Vec<Key> {
    let mut runs: Vec<Key> = Vec::new();
    for i in (0..key.sectors).filter(|i| test(key.payload + i)) {
        match runs.last_mut() {
            Some(run) if run.payload + run.sectors == key.payload + i => run.sectors += 1,
            _ => runs.push(cut(&key, SectorRange::new(key.first + u64::from(i), 1))),
        }
    }
    runs
}
