//! Where the fields of a structure lie, stated once: the struct, its encoder, its decoder and the
//! table FORMAT.md is compared with all come from the same lines.
//!
//! `layout!` lists each field with its byte offset. Fields in `frame { … }` (magic, CRC) are on the
//! media but not in the value: the encoder makes them, the decoder has judged them. Bytes no field
//! covers are reserved. The compiler refuses a layout with overlapping, unordered, unaligned or
//! overhanging fields.

use super::corruption::Expected;

/// One field of a structure on the media.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Field {
    /// Its name, as in the struct.
    pub name: &'static str,
    /// Bytes from the start of the structure.
    pub offset: usize,
    /// Bytes it takes.
    pub size: usize,
    /// `u8`, `u16`, `u32`, `u64`, or `bytes`.
    pub kind: &'static str,
}

/// A value with a fixed little-endian form.
pub(super) trait Wire: Sized {
    const SIZE: usize;
    const KIND: &'static str;

    /// Fills `out`, which is `SIZE` bytes.
    fn put(&self, out: &mut [u8]);

    /// The value in `bytes`, which are `SIZE`; or what would have been a value, and what was found.
    fn get(bytes: &[u8]) -> Result<Self, (Expected, u64)>;
}

macro_rules! wire_integer {
    ($($ty:ident)*) => {$(
        impl Wire for $ty {
            const SIZE: usize = size_of::<$ty>();
            const KIND: &'static str = stringify!($ty);

            #[inline(always)]
            fn put(&self, out: &mut [u8]) {
                out.copy_from_slice(&self.to_le_bytes());
            }

            #[inline(always)]
            fn get(bytes: &[u8]) -> Result<Self, (Expected, u64)> {
                let mut array = [0; Self::SIZE];
                array.copy_from_slice(bytes);
                Ok(Self::from_le_bytes(array))
            }
        }
    )*};
}

wire_integer!(u8 u16 u32 u64);

impl<const N: usize> Wire for [u8; N] {
    const SIZE: usize = N;
    const KIND: &'static str = "bytes";

    #[inline(always)]
    fn put(&self, out: &mut [u8]) {
        out.copy_from_slice(self);
    }

    #[inline(always)]
    fn get(bytes: &[u8]) -> Result<Self, (Expected, u64)> {
        let mut array = [0; N];
        array.copy_from_slice(bytes);
        Ok(array)
    }
}

impl Wire for bool {
    const SIZE: usize = 1;
    const KIND: &'static str = "u8";

    fn put(&self, out: &mut [u8]) {
        out.copy_from_slice(&[u8::from(*self)]);
    }

    fn get(bytes: &[u8]) -> Result<Self, (Expected, u64)> {
        match u8::get(bytes)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err((Expected::AtMost(1), other.into())),
        }
    }
}

/// Whether fields are in order, apart, naturally aligned and inside `size` bytes.
pub(super) const fn is_sound(fields: &[Field], size: usize) -> bool {
    let mut end = 0;
    let mut i = 0;
    while i < fields.len() {
        let field = fields[i];
        let is_bytes = same(field.kind, "bytes");
        if field.offset < end || !is_bytes && !field.offset.is_multiple_of(field.size) {
            return false;
        }
        end = field.offset + field.size;
        i += 1;
    }
    end <= size
}

/// The offset of the field called `name`; a constant that does not compile when there is none.
pub(super) const fn offset_of(fields: &[Field], name: &str) -> usize {
    let mut i = 0;
    while i < fields.len() {
        if same(fields[i].name, name) {
            return fields[i].offset;
        }
        i += 1;
    }
    panic!("no field of that name")
}

const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

/// Declares a structure: `pub struct Name: size { frame { offset name: type, … } offset name: type, … }`.
macro_rules! layout {
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident: $size:literal {
            frame { $($frame_offset:literal $frame:ident: $frame_ty:ty),* }
            $($(#[$field_meta:meta])* $offset:literal $field:ident: $ty:ty,)*
        }
    ) => {
        $(#[$meta])*
        $vis struct $name {
            $($(#[$field_meta])* pub $field: $ty,)*
        }

        impl $name {
            /// Bytes it takes on the media.
            pub const SIZE: usize = $size;

            /// Where its fields lie; bytes between them are reserved.
            pub const FIELDS: &'static [$crate::onmedia::Field] = &[
                $($crate::onmedia::Field {
                    name: stringify!($frame),
                    offset: $frame_offset,
                    size: <$frame_ty as $crate::onmedia::layout::Wire>::SIZE,
                    kind: <$frame_ty as $crate::onmedia::layout::Wire>::KIND,
                },)*
                $($crate::onmedia::Field {
                    name: stringify!($field),
                    offset: $offset,
                    size: <$ty as $crate::onmedia::layout::Wire>::SIZE,
                    kind: <$ty as $crate::onmedia::layout::Wire>::KIND,
                },)*
            ];

            /// Fills in every field but those of the frame.
            #[inline]
            fn put(&self, out: &mut [u8; $size]) {
                $($crate::onmedia::layout::Wire::put(
                    &self.$field,
                    &mut out[$offset..$offset + <$ty as $crate::onmedia::layout::Wire>::SIZE],
                );)*
            }

            /// Reads every field but those of the frame; only codes can be wrong here.
            #[inline]
            fn get(bytes: &[u8; $size]) -> Result<Self, $crate::onmedia::Corruption> {
                Ok(Self {
                    $($field: <$ty as $crate::onmedia::layout::Wire>::get(
                        &bytes[$offset..$offset + <$ty as $crate::onmedia::layout::Wire>::SIZE],
                    )
                    .map_err(|(expected, found)| $crate::onmedia::Corruption {
                        structure: stringify!($name),
                        field: stringify!($field),
                        expected,
                        found,
                    })?,)*
                })
            }
        }

        const _: () = assert!($crate::onmedia::layout::is_sound($name::FIELDS, $size));
    };
}

/// Declares a field's codes: `pub enum Name { Variant = code "name", … }`. The first is the default.
macro_rules! codes {
    (
        $(#[$meta:meta])*
        pub enum $name:ident {
            $(#[$first_meta:meta])* $first:ident = $first_code:literal $first_text:literal,
            $($(#[$variant_meta:meta])* $variant:ident = $code:literal $text:literal,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
        #[repr(u8)]
        pub enum $name {
            $(#[$first_meta])* #[default] $first = $first_code,
            $($(#[$variant_meta])* $variant = $code,)*
        }

        impl $name {
            /// Every code and its name.
            pub const CODES: &'static [(u8, &'static str)] =
                &[($first_code, $first_text), $(($code, $text)),*];

            /// The value of a code.
            pub fn from_code(code: u8) -> Option<Self> {
                match code {
                    $first_code => Some(Self::$first),
                    $($code => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The value of a name.
            pub fn from_name(name: &str) -> Option<Self> {
                match name {
                    $first_text => Some(Self::$first),
                    $($text => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// Its name, as in FORMAT.md, configuration and messages.
            pub fn name(self) -> &'static str {
                match self {
                    Self::$first => $first_text,
                    $(Self::$variant => $text,)*
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.name())
            }
        }

        impl $crate::onmedia::layout::Wire for $name {
            const SIZE: usize = 1;
            const KIND: &'static str = "u8";

            fn put(&self, out: &mut [u8]) {
                out.copy_from_slice(&[*self as u8]);
            }

            fn get(bytes: &[u8]) -> Result<Self, ($crate::onmedia::Expected, u64)> {
                let code = <u8 as $crate::onmedia::layout::Wire>::get(bytes)?;
                Self::from_code(code).ok_or((
                    $crate::onmedia::Expected::Text(concat!("a code of ", stringify!($name))),
                    code.into(),
                ))
            }
        }
    };
}

pub(super) use {codes, layout};

#[cfg(test)]
mod tests {
    use super::*;

    const fn field(offset: usize, size: usize, kind: &'static str) -> Field {
        Field { name: "f", offset, size, kind }
    }

    #[test]
    fn a_layout_must_be_ordered_apart_aligned_and_inside() {
        for (fields, size, sound) in [
            (&[field(0, 8, "u64"), field(8, 4, "u32")][..], 16, true),
            (&[field(0, 8, "u64"), field(4, 4, "u32")], 16, false),
            (&[field(8, 8, "u64"), field(0, 4, "u32")], 16, false),
            (&[field(4, 8, "u64")], 16, false),
            (&[field(3, 9, "bytes")], 16, true),
            (&[field(8, 9, "bytes")], 16, false),
        ] {
            assert_eq!(is_sound(fields, size), sound, "{fields:?}");
        }
    }

    #[test]
    fn a_bool_is_zero_or_one_and_nothing_else() {
        for byte in 0..=255u8 {
            let read = bool::get(&[byte]);
            match byte {
                0 => assert_eq!(read, Ok(false)),
                1 => assert_eq!(read, Ok(true)),
                _ => assert!(read.is_err()),
            }
        }
    }
}
