//! What is in a sector: the write it comes from, the sector it belongs to, and nothing else.
//!
//! Every word depends on disk, sector and write, so a sector put together from two writes, moved,
//! or taken from another disk decodes as garbage. Write 0 is a sector of zeros.

/// Bytes of a sector.
pub(super) const BYTES: usize = 512;
const WORDS: usize = BYTES / 8;

/// Fills `out` (one sector) with what write `value` puts at `sector` of `disk`.
pub(super) fn encode(disk: usize, sector: u64, value: u64, out: &mut [u8]) {
    if value == 0 {
        out.fill(0);
        return;
    }
    let place = place(disk, sector);
    let base = base(place, value);
    for (i, word) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word = word_at(base, i).to_le_bytes();
    }
    out[..8].copy_from_slice(&value.to_le_bytes());
    out[8..16].copy_from_slice(&place.to_le_bytes());
}

/// Which write's bytes these are.
///
/// # Errors
/// They are nobody's, or belong elsewhere; in words.
pub(super) fn decode(disk: usize, sector: u64, bytes: &[u8]) -> Result<u64, String> {
    let words = bytes.as_chunks::<8>().0;
    assert_eq!(words.len(), WORDS, "a sector");
    let word = |i: usize| u64::from_le_bytes(words[i]);
    let value = word(0);
    let (place, base) = match value {
        0 => (0, 0),
        _ => (place(disk, sector), base(place(disk, sector), value)),
    };
    let wrong = |i: usize| if value == 0 { word(i) } else { word(i) ^ word_at(base, i) };
    // Without a branch per word: every image reads every sector.
    if word(1) == place && (2..WORDS).fold(0, |all, i| all | wrong(i)) == 0 {
        return Ok(value);
    }
    let from = (2..WORDS).find(|&i| wrong(i) != 0).unwrap_or(1);
    Err(format!(
        "sector {sector} of disk {disk} holds garbage: write {value:#x}, place {:#x}, wrong from word {from}",
        word(1)
    ))
}

fn place(disk: usize, sector: u64) -> u64 {
    (disk as u64 + 1) << 48 | sector
}

fn base(place: u64, value: u64) -> u64 {
    let mixed = (value ^ place.rotate_left(24)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ mixed >> 29
}

/// Words from the third on; the first two are the write and the place.
fn word_at(base: u64, i: usize) -> u64 {
    base.wrapping_add((i as u64).wrapping_mul(0xd6e8_feb8_6659_fd93))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_known_only_where_it_belongs() {
        let mut bytes = [0; BYTES];
        encode(1, 77, 0x1234, &mut bytes);
        assert_eq!(decode(1, 77, &bytes), Ok(0x1234));
        assert!(decode(1, 78, &bytes).is_err());
        assert!(decode(0, 77, &bytes).is_err());
        for i in 0..BYTES {
            bytes[i] ^= 1;
            assert!(decode(1, 77, &bytes).is_err(), "byte {i}");
            bytes[i] ^= 1;
        }
        assert_eq!(decode(1, 77, &[0; BYTES]), Ok(0));
    }

    #[test]
    fn two_writes_do_not_mix_into_a_third() {
        let (mut a, mut b) = ([0; BYTES], [0; BYTES]);
        encode(0, 5, 10, &mut a);
        encode(0, 5, 11, &mut b);
        for cut in 1..WORDS {
            let mut mixed = a;
            mixed[cut * 8..].copy_from_slice(&b[cut * 8..]);
            assert!(decode(0, 5, &mixed).is_err(), "cut at word {cut}");
        }
    }
}
