//! Several media as one: members that follow one another in one range of addresses.
//!
//! Each member was opened, classified and locked by itself, so whatever is refused of one device is
//! refused of each of several. Joining them makes one mapping of all in place of theirs; from then on
//! there is one length, one class, and nobody who reads or writes can tell.
//!
//! Laws:
//! 1. Nothing is written here, and no file is let go of: its lock goes from the member to the whole.
//! 2. All members are of one class. A fence that is durable on one and not on the next would be neither.
//! 3. Durability is one promise for all. Records refer to payload, and tails to records, across members:
//!    so a `sync` has succeeded when it has on each of them, and one that has failed on any has failed
//!    for the whole, for good. Still it goes on to the others: what they can keep they should.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use super::mapped::MappedPmem;
use super::mapping::{BASE_ALIGN, MapFailure, Mapping, Part};
use super::{MediaClass, OpenError, Pmem};

/// Where a member lies in the whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The whole's byte with which it begins.
    pub base: u64,
    /// Its own byte where that is; what is before is not the whole's.
    pub start: u64,
}

/// The members cannot be one.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Law 2.
    #[error(
        "cache {} is {class} and {} is {other}: devices that are one cache are of one class",
        first.display(), path.display()
    )]
    Classes {
        /// The first member.
        first: PathBuf,
        /// Its class.
        class: MediaClass,
        /// The one that differs.
        path: PathBuf,
        /// Its class.
        other: MediaClass,
    },
    /// It has not what lies on it.
    #[error("cache {} has {found} bytes and {needed} are needed: it has been cut off, or is another device", path.display())]
    Short {
        /// Which.
        path: PathBuf,
        /// Bytes it has.
        found: u64,
        /// Bytes that lie on it, with what is before them.
        needed: u64,
    },
    /// It cannot be mapped there.
    #[error("cache {} is mapped in pages of {page_size} bytes, and its part of the cache does not begin with one", path.display())]
    Unaligned {
        /// Which.
        path: PathBuf,
        /// Bytes of a page.
        page_size: u64,
    },
    /// The kernel refused.
    #[error(transparent)]
    Open(#[from] OpenError),
}

impl MappedPmem {
    /// What every `base` and `start` of a member of these has to be a multiple of, so that each can be
    /// mapped at its place, in huge pages where there are any.
    pub fn join_unit(members: &[MappedPmem]) -> u64 {
        let pages = members.iter().flat_map(|member| member.parts().iter().map(|part| part.page_size));
        pages.fold(BASE_ALIGN, |unit, page_size| unit.max(page_size.next_power_of_two()))
    }

    /// Makes one of members that were opened alike, each alone. The first is at place 0, 0; each ends where
    /// the next begins, and the last where its file or device ends.
    ///
    /// # Errors
    /// [`JoinError`]; the members are closed.
    pub fn join(members: Vec<MappedPmem>, places: &[Place]) -> Result<MappedPmem, JoinError> {
        assert!(!members.is_empty() && members.len() == places.len(), "a place for each member");
        let is_read_only = members[0].is_read_only();
        let (class, store) = (members[0].class(), members[0].store_plan());
        let first = members[0].path().to_owned();
        let mut reasons: Vec<String> = Vec::new();
        let mut parts = Vec::new();
        let mut len = 0;
        for (index, (member, place)) in members.into_iter().zip(places).enumerate() {
            assert_eq!(member.is_read_only(), is_read_only, "members are opened alike");
            let (path, found) = (member.path().to_owned(), member.len());
            if member.class() != class {
                return Err(JoinError::Classes { first, class, path, other: member.class() });
            }
            if !reasons.iter().any(|reason| reason == member.reason()) {
                reasons.push(member.reason().to_owned());
            }
            let held = match places.get(index + 1) {
                Some(next) => next.base.checked_sub(place.base).expect("members follow one another"),
                None => found.saturating_sub(place.start),
            };
            let needed = place.start.saturating_add(held.max(1));
            if found < needed {
                return Err(JoinError::Short { path, found, needed });
            }
            for part in member.into_parts() {
                let page_size = part.page_size;
                let is_aligned = |at: u64| at.is_multiple_of(page_size);
                if !is_aligned(place.base) || !is_aligned(place.start) {
                    return Err(JoinError::Unaligned { path, page_size });
                }
                parts.push(Part { base: place.base, start: place.start, ..part });
            }
            len = place.base + held;
        }
        let mapping = Mapping::new(&parts, len, !is_read_only)
            .map_err(|MapFailure { step, source }| OpenError::Io { path: first, step, source })?;
        Ok(Self::new(parts, mapping, class, reasons.join(" and "), store))
    }
}

/// Flushes each file; the first that fails tells, and the others are flushed all the same.
pub(super) fn flush_each(parts: &[Part], mut flush: impl FnMut(&File) -> io::Result<()>) -> io::Result<()> {
    let mut first = Ok(());
    for part in parts {
        let flushed = flush(&part.file).inspect_err(|error| {
            tracing::error!(%error, "what was stored on {} cannot be made durable", part.path.display());
        });
        first = first.and(flushed);
    }
    first
}

#[cfg(test)]
mod tests;
