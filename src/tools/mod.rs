//! What can be done with a cache that nobody serves: look, format, check, dump, drain.
//!
//! Each takes plain values and returns what it found; the words around it are `control`'s.

pub mod signature;
