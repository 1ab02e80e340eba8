//! Bytes on the media ⇄ values. Pure; see `FORMAT.md` beside this file.
