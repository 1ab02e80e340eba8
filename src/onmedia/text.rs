//! Text in fixed fields: UTF-8 (a path: any bytes), padded with NULs, not terminated when full.

use super::corruption::Judge;
use super::{Corruption, Expected};

/// `text` in a field of `N` bytes; `None` when it is too long or holds a NUL.
pub fn pad<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut field = [0; N];
    field.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
    (!text.contains('\0')).then_some(field)
}

/// As much of `text` up to its first NUL as fits a field of `N` bytes, cut between characters.
pub fn pad_cut<const N: usize>(text: &str) -> [u8; N] {
    let end = text.find('\0').unwrap_or(text.len());
    let mut field = [0; N];
    let mut cut = end.min(N);
    while !text.is_char_boundary(cut) {
        cut -= 1;
    }
    field[..cut].copy_from_slice(&text.as_bytes()[..cut]);
    field
}

/// The bytes of a field up to its padding.
pub fn unpad(field: &[u8]) -> &[u8] {
    let len = field.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    &field[..len]
}

/// The text of a field.
///
/// # Errors
/// [`Corruption`] when it is not UTF-8 or has a NUL before its end.
pub fn text<'a>(structure: &'static str, name: &'static str, field: &'a [u8]) -> Result<&'a str, Corruption> {
    let bytes = unpad(field);
    let corrupt = |at: usize| {
        let byte = bytes.get(at).copied().unwrap_or_default();
        Judge(structure).corrupt(name, Expected::Text("UTF-8 padded with NULs"), byte.into())
    };
    if let Some(at) = bytes.iter().position(|&byte| byte == 0) {
        return Err(corrupt(at));
    }
    std::str::from_utf8(bytes).map_err(|error| corrupt(error.valid_up_to()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_comes_off_again_and_too_long_is_refused() {
        for (given, fits) in [("", true), ("a", true), ("abcd", true), ("abcde", false), ("a\0b", false)] {
            match pad::<4>(given) {
                Some(field) => assert_eq!((fits, text("T", "t", &field)), (true, Ok(given))),
                None => assert!(!fits, "{given:?}"),
            }
        }
    }

    #[test]
    fn cutting_keeps_characters_whole() {
        for (given, kept) in [("äöü", "äö"), ("abcdef", "abcde"), ("a\0b", "a"), ("", "")] {
            assert_eq!(text("T", "t", &pad_cut::<5>(given)), Ok(kept));
        }
    }

    #[test]
    fn a_nul_inside_and_bad_utf8_are_corruption() {
        for field in [*b"a\0b\0", *b"ab\xff\0", *b"\0abc"] {
            assert!(text("T", "t", &field).is_err(), "{field:?}");
        }
    }
}
