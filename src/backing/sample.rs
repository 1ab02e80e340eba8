//! The fingerprint of a disk: a checksum over samples of its content.
//!
//! It is there to notice a disk that was restored, reinstalled or confused with another where times
//! and counts say nothing, as with a block device that was on another host. The first and the last
//! 64 KiB are read whole, for partition tables and superblocks, and one block of 4 KiB in each of
//! [`STRATA`] equal parts between, at a place drawn from the volume's own seed: who does not know it
//! cannot avoid the samples, and no regular stride misses them all.
//!
//! A change of `k` blocks anywhere goes unnoticed with a probability of about `(1 - 126 / n)^k` on a
//! disk of `n` blocks: this is evidence of confusion, not of integrity.

use std::hash::Hasher;
use std::io;

use siphasher::sip::SipHasher13;

use super::AlignedBuf;
use super::file::DiskFile;

/// Bytes sampled at the beginning and at the end.
const ENDS: u64 = 64 << 10;
/// Blocks sampled between, each in its own part of the disk: a second on a disk of 8 ms.
const STRATA: u64 = 126;
/// Blocks that fingerprints of seed 0 look at between, at equal distances.
const UNSEEDED: u64 = 30;

/// SipHash-1-3 with a fixed key over the size and every sample with its offset.
pub(super) fn fingerprint(file: &DiskFile, size: u64, seed: u64) -> io::Result<u64> {
    let mut hasher = SipHasher13::new_with_keys(0x7063_6163_6865_2d76, 0x686f_7374_2d66_7031);
    hasher.write(&size.to_le_bytes());
    let mut buf = AlignedBuf::new(ENDS as usize + 4096);
    for (offset, len) in samples(size, seed) {
        let sample = &mut buf[..len as usize];
        file.read(offset, sample)?;
        hasher.write(&offset.to_le_bytes());
        hasher.write(sample);
    }
    Ok(hasher.finish())
}

/// Ranges that the fingerprint of this seed reads of a disk of `size` bytes. On small disks they
/// overlap.
fn samples(size: u64, seed: u64) -> impl Iterator<Item = (u64, u64)> {
    let ends = size.min(ENDS);
    let last = (size - ends) / 4096 * 4096;
    let count = if seed == 0 { UNSEEDED } else { STRATA };
    let inner = (1..=count).map(move |i| {
        let place = match seed {
            // In 128 bits: a disk may have more than 2^59 bytes.
            0 => u128::from(size) * u128::from(i) / u128::from(UNSEEDED + 1),
            _ => {
                let part = u128::from(size) / u128::from(STRATA);
                u128::from(size) * u128::from(i - 1) / u128::from(STRATA)
                    + u128::from(draw(seed, i)) * part / (1 << 64)
            }
        };
        let at = place as u64 / 4096 * 4096;
        (at, 4096.min(size - at))
    });
    [(0, ends)].into_iter().chain(inner).chain([(last, size - last)])
}

/// The `i`-th number of a seed.
fn draw(seed: u64, i: u64) -> u64 {
    let mut hasher = SipHasher13::new_with_keys(seed, 0x7361_6d70_6c65_7331);
    hasher.write_u64(i);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_lie_within_the_disk_whatever_its_size_and_seed() {
        for size in [512, 4096, 65536 + 512, 1 << 20, (1 << 30) + 512, 1 << 61] {
            for seed in [0, 1, 2, u64::MAX] {
                for (at, len) in samples(size, seed) {
                    assert!(len > 0 && at + len <= size, "{size} {seed}: {at}+{len}");
                    assert!(len <= ENDS + 4096);
                }
            }
        }
    }

    #[test]
    fn every_part_has_its_sample_and_every_seed_its_own() {
        let size = 1 << 30;
        let of = |seed| samples(size, seed).map(|(at, _)| at).collect::<Vec<_>>();
        let (a, b) = (of(1), of(2));
        assert_eq!(a.len() as u64, STRATA + 2);
        let part = size / STRATA;
        for (i, at) in a[1..=STRATA as usize].iter().enumerate() {
            assert!(at + 4096 > part * i as u64 && *at <= part * (i as u64 + 1) + 4096, "part {i}: {at}");
        }
        let same = a.iter().zip(&b).filter(|(a, b)| a == b).count();
        assert!(same <= 4, "{same} places are the same under two seeds");
        assert_eq!(a, of(1), "the places follow from the seed alone");
    }
}
