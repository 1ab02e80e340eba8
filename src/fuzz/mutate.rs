//! A mutator without feedback: what it lacks in aim the committed corpus, grown by libFuzzer, makes up.

use crate::sim::Rng;

/// Changes `bytes` in one to eight places; `other` is another input to take parts from.
pub fn mutate(bytes: &mut Vec<u8>, other: &[u8], len_max: usize, rng: &mut Rng) {
    for _ in 0..1 << rng.below(4) {
        step(bytes, other, rng);
    }
    bytes.truncate(len_max);
}

fn step(bytes: &mut Vec<u8>, other: &[u8], rng: &mut Rng) {
    const EDGES: [u64; 8] = [0, 1, 0x7f, 0x80, 0xff, 0xffff, 0x8000_0000, u64::MAX];
    if bytes.is_empty() {
        bytes.extend((0..rng.between(1, 32)).map(|_| rng.next() as u8));
        return;
    }
    let at = rng.index(bytes.len());
    let len = rng.between(1, 16).min((bytes.len() - at) as u64) as usize;
    match rng.below(9) {
        0 => bytes[at] ^= 1 << rng.below(8),
        1 => bytes[at] = rng.next() as u8,
        2 => bytes[at] = bytes[at].wrapping_add(rng.between(1, 16) as u8).wrapping_sub(8),
        3 => {
            let edge = rng.pick(&EDGES).to_le_bytes();
            let width = (1 << rng.below(4)).min(bytes.len() - at);
            bytes[at..at + width].copy_from_slice(&edge[..width]);
        }
        4 => drop(bytes.drain(at..at + len)),
        5 => {
            let fresh: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
            bytes.splice(at..at, fresh);
        }
        6 => {
            let copy = bytes[at..at + len].to_vec();
            let to = rng.index(bytes.len());
            bytes.splice(to..to, copy);
        }
        7 if !other.is_empty() => {
            let from = rng.index(other.len());
            let part = &other[from..other.len().min(from + rng.between(1, 64) as usize)];
            bytes.splice(at..at + len, part.iter().copied());
        }
        _ => bytes.truncate(at),
    }
}
