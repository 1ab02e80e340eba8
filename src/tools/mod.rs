//! Offline verbs on a cache image.
