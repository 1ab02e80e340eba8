//! Doubt: whether a `sync` has failed of which nobody lived to hear.
//!
//! A `sync` of page-cache media that fails leaves pages which read back and exist nowhere else, and
//! the kernel tells it once. If whom it tells dies before saying so, killed in the `sync` itself for
//! one, the next start finds pages that look clean, seals what they show, and a power cut takes it.
//! So it is said before: a word beside segment 0's first witness, the *mark*, names the host's present
//! life from before each `sync` until after one that succeeded. Where a start finds it, it compares
//! what the page cache shows with what the device has: they differ only where a `sync` has failed.
//! Mostly they do not, a daemon was killed within a good `sync`, and nothing comes of it.
//!
//! Laws:
//! - While the outcome of a `sync` is not known to be good the mark is set.
//! - What the comparison finds is noted in the start page before the page cache is dropped, and the
//!   mark stays until then: whenever this start is killed, the next one finds the same.
//! - The mark dies with the host, as does the page cache it speaks of: it names its life, and one of an
//!   earlier life says nothing. A power cut takes what the device never had from everybody.
//! - What is not compared is covered otherwise: the log of a sealed segment was durable before it was
//!   sealed, and a summary that does not count is replaced by the log.
//! - Where the device cannot be read past the page cache the doubt remains, is told, and not acted on.

use std::ops::Range;

use super::core::{OpenError, load_start};
use super::media::Media;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::SegmentState;
use crate::pmem::{MediaClass, Pmem, SyncError};

/// Whether a `sync` has failed since all that this start shows was last known to be on the device. If
/// so the start page says it, and the page cache may be dropped.
///
/// # Errors
/// Nothing can be made durable: nothing has been dropped, and the doubt remains.
pub(crate) fn has_failed<P: Pmem>(media: &Media<P>) -> Result<bool, OpenError> {
    let copies = load_start(media);
    let next = copies.next;
    let mut page = copies.into_newest().map_err(OpenError::StartPage)?;
    if page.sync_failed || media.pmem.class() != MediaClass::PageCache || !is_marked(media) {
        return Ok(page.sync_failed);
    }
    tracing::info!("the last run ended within a sync: comparing the page cache with the device");
    media.pmem.sync().map_err(|_| OpenError::NotDurable)?;
    match media.pmem.is_on_device(&believed(media)) {
        Ok(true) => return Ok(false),
        Ok(false) => {}
        Err(error) => {
            tracing::warn!(%error, "the device cannot be read past the page cache: believing that");
            return Ok(false);
        }
    }
    tracing::error!("the last sync has failed: the device has less than was read back");
    page.sync_failed = true;
    page.sequence += 1;
    if !mutated(Mutant::DoubtNotNoted) {
        media.write_page(|geometry| geometry.start_page(next), &page.encode()[..])?;
    }
    media.pmem.sync().map_err(|_| OpenError::NotDurable)?;
    Ok(true)
}

/// A `sync` by whoever opens the cache, marked like all others.
///
/// # Errors
/// It failed; the mark stays.
pub(crate) fn sync<P: Pmem>(media: &Media<P>) -> Result<(), OpenError> {
    let is_marked = media.pmem.class() == MediaClass::PageCache;
    let mark_at = is_marked.then(|| media.geometry.sync_mark());
    sync_marked(&*media.pmem, mark_at).map_err(|_| OpenError::NotDurable)
}

/// A `sync` with the mark at `mark_at` set until it has succeeded.
///
/// # Errors
/// It failed; the mark stays.
pub(crate) fn sync_marked<P: Pmem>(pmem: &P, mark_at: Option<u64>) -> Result<(), SyncError> {
    let mark_at = mark_at.filter(|_| !mutated(Mutant::SyncNotMarked));
    let put = |mark: u64| {
        // Where the mark cannot be stored a failure is noted as soon as it is known, no sooner.
        if let Some(Err(error)) = mark_at.map(|at| pmem.write(at, &mark.to_le_bytes())) {
            tracing::debug!(%error, "a sync is not marked");
        }
    };
    put(mark_of(pmem));
    pmem.sync()?;
    put(0);
    Ok(())
}

/// The mark of the host's present life.
fn mark_of<P: Pmem>(pmem: &P) -> u64 {
    let id = u128::from_le_bytes(pmem.boot_id());
    (id as u64 ^ (id >> 64) as u64).max(1)
}

fn is_marked<P: Pmem>(media: &Media<P>) -> bool {
    let mut bytes = [0; 8];
    let is_read = media.pmem.read(media.geometry.sync_mark(), &mut bytes).is_ok();
    is_read && u64::from_le_bytes(bytes) == mark_of(&*media.pmem)
}

/// All that a start believes and some `sync` may have owed: metadata, what stands around every
/// segment's log, and the whole of each open one.
fn believed<P: Pmem>(media: &Media<P>) -> Vec<Range<u64>> {
    let geometry = &media.geometry;
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut add = |start: u64, end: u64| match ranges.last_mut() {
        Some(last) if last.end == start => last.end = end,
        _ => ranges.push(start..end),
    };
    add(0, geometry.meta_size);
    for id in 0..geometry.segment_count() {
        let at = |offset| media.in_segment(id, offset);
        let is_open = media.load_header(id).newest.is_some_and(|h| h.state == SegmentState::Open);
        add(at(0), at(if is_open { geometry.data_end() } else { geometry.data_start() }));
        add(at(geometry.data_end()), at(geometry.segment_size));
    }
    let back = geometry.superblock(1);
    add(back, back + geometry.meta_size);
    ranges
}
