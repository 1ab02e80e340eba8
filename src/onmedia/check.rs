//! The checks: a CRC-32 where only we can have written, a keyed SipHash where a guest might have.
//!
//! A CRC finds what hardware did. It proves nothing about bytes that lie where guest data may have
//! lain, because a guest can compute a CRC as well as we can; so whatever stands next to payload is
//! checked with a secret drawn at format.

use std::fmt;
use std::hash::Hasher as _;

use siphasher::sip::SipHasher13;

use super::corruption::Judge;
use super::{Corruption, Expected};

/// The key of a cache's SipHash checks. Never printed, not even by `Debug`.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Secret([u8; 16]);

impl Secret {
    /// A secret of 16 random bytes.
    pub fn new(bytes: [u8; 16]) -> Secret {
        Secret(bytes)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl super::layout::Wire for Secret {
    const SIZE: usize = 16;
    const KIND: &'static str = "bytes";

    fn put(&self, out: &mut [u8]) {
        self.0.put(out);
    }

    fn get(bytes: &[u8]) -> Result<Self, (Expected, u64)> {
        <[u8; 16]>::get(bytes).map(Secret)
    }
}

/// SipHash-1-3 of the concatenated parts.
#[inline]
pub fn sip(secret: &Secret, parts: &[&[u8]]) -> u64 {
    let mut hasher = SipHasher13::new_with_key(&secret.0);
    for part in parts {
        hasher.write(part);
    }
    hasher.finish()
}

/// SipHash-1-3 of little-endian words.
pub(super) fn sip_words(secret: &Secret, words: &[u64]) -> u64 {
    let mut hasher = SipHasher13::new_with_key(&secret.0);
    for word in words {
        hasher.write(&word.to_le_bytes());
    }
    hasher.finish()
}

/// SipHash-1-3 of one run of bytes, in one go.
#[inline]
pub(super) fn sip_bytes(secret: &Secret, bytes: &[u8]) -> u64 {
    SipHasher13::new_with_key(&secret.0).hash(bytes)
}

/// The CRC-32 (IEEE 802.3) of a [`Piece`](super::Piece) of payload.
#[inline]
pub fn payload_checksum(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// The CRC-32 of all `bytes`, those of the CRC field at `at` counted as zero.
fn crc(bytes: &[u8], at: usize) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..at]);
    hasher.update(&[0; 4]);
    hasher.update(&bytes[at + 4..]);
    hasher.finalize()
}

/// Writes the CRC-32 of `bytes` into its field at `at`.
pub(super) fn put_crc(bytes: &mut [u8], at: usize) {
    let crc = crc(bytes, at);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Compares the CRC-32 of `bytes` with its field at `at`.
pub(super) fn judge_crc(judge: Judge, bytes: &[u8], at: usize) -> Result<(), Corruption> {
    let mut found = [0; 4];
    found.copy_from_slice(&bytes[at..at + 4]);
    judge.exactly("crc", crc(bytes, at).into(), u32::from_le_bytes(found).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crc_is_the_one_of_ieee_802_3() {
        // The check value every catalogue of CRCs gives for this polynomial.
        assert_eq!(payload_checksum(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn parts_words_and_one_run_hash_alike() {
        let secret = Secret::new(*b"0123456789abcdef");
        let words = [1u64, 2, u64::MAX];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        for cut in 0..=bytes.len() {
            let (front, back) = bytes.split_at(cut);
            assert_eq!(sip(&secret, &[front, back]), sip_words(&secret, &words));
        }
        assert_eq!(sip_bytes(&secret, &bytes), sip_words(&secret, &words));
    }

    #[test]
    fn a_secret_is_not_printed() {
        let secret = Secret::new([0xab; 16]);
        assert_eq!(format!("{secret:?}"), "Secret(…)");
    }
}
