//! Doubt: whether a `sync` has failed of which nobody lived to hear.
//!
//! A `sync` of page-cache media that fails leaves pages which read back and exist nowhere else, and
//! the kernel tells it once. If whom it tells dies before saying so, killed in the `sync` itself for
//! one, the next start finds pages that look clean, seals what they show, and a power cut takes it.
//! So it is said before: a word beside segment 0's first witness, the *mark*, names the host's present
//! life from before each `sync` until after one that succeeded. Where a start finds it, it compares
//! what the page cache shows with what the device has, by a digest of all that recovery believes
//! unseen: they differ only where a `sync` has failed.
//!
//! Laws:
//! - While the outcome of a `sync` is not known to be good the mark is set.
//! - The digest is in the start page, on the device too, before the page cache is dropped, and stays
//!   until the start page says what came of it, before anything is changed that was digested. So
//!   whenever this start is killed the next one compares again, and finds the same.
//! - Mark and digest die with the host, as does the page cache they speak of: both name its life, and
//!   those of an earlier one say nothing. A power cut takes what the device never had from everybody.
//! - What is not digested is covered otherwise: the log of a sealed segment was durable before it
//!   was sealed, and a summary that does not count is replaced by the log.

use super::core::{OpenError, load_start};
use super::media::{Media, read_page};
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{PAGE, SegmentState, sip};
use crate::pmem::{MediaClass, Pmem, SyncError};

/// What the page cache showed when a `sync` may have failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Doubt(u64);

impl Doubt {
    /// Whether there is doubt; if so it is noted in the start page, and the page cache may be dropped.
    ///
    /// # Errors
    /// The note cannot be made durable: nothing has been dropped, and the doubt remains.
    pub fn of<P: Pmem>(media: &Media<P>) -> Result<Option<Doubt>, OpenError> {
        if media.pmem.class() != MediaClass::PageCache {
            return Ok(None);
        }
        let copies = load_start(media);
        let next = copies.next;
        let mut page = copies.into_newest().map_err(OpenError::StartPage)?;
        let boot_id = media.pmem.boot_id();
        let is_noted = page.shown != 0 && page.boot_id == boot_id;
        if page.sync_failed || !(is_noted || is_marked(media)) {
            return Ok(None);
        }
        if !is_noted {
            (page.shown, page.boot_id) = (digest(media), boot_id);
            page.sequence += 1;
            if !mutated(Mutant::DoubtNotNoted) {
                media.pmem.write(media.geometry.start_page(next), &page.encode()[..])?;
            }
        }
        tracing::info!("the last run ended within a sync: comparing the page cache with the device");
        sync(media)?;
        Ok(Some(Doubt(page.shown)))
    }

    /// Whether the device, seen past the page cache, lacks what that showed.
    pub fn is_justified<P: Pmem>(self, media: &Media<P>) -> bool {
        let is_lost = digest(media) != self.0;
        if is_lost {
            tracing::error!("the last sync has failed: what the device has is less than was read back");
        }
        is_lost
    }
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

/// A digest, never 0, of all that a start believes and some `sync` may have owed: metadata but the
/// start page, what stands around every segment's log, and the whole of each open one.
fn digest<P: Pmem>(media: &Media<P>) -> u64 {
    let geometry = &media.geometry;
    let mark_at = geometry.sync_mark();
    let mut sum = 1u64;
    let mut add = |start: u64, end: u64| {
        for at in (start..end).step_by(PAGE) {
            // One that cannot be read counts as that.
            let page = read_page(&*media.pmem, at).map(|mut page| {
                if (at..at + PAGE as u64).contains(&mark_at) {
                    page[(mark_at - at) as usize..][..8].fill(0);
                }
                page
            });
            let bytes = page.as_ref().map_or(&[][..], |page| &page[..]);
            sum = sip(&media.secret, &[&sum.to_le_bytes(), bytes]);
        }
    };
    for copy in 0..2 {
        let (start, end) = (geometry.superblock(copy), geometry.superblock(copy) + geometry.meta_size);
        add(start, geometry.start_page(copy));
        add(geometry.start_page(copy) + PAGE as u64, end);
    }
    for id in 0..geometry.segment_count {
        let at = |offset| media.in_segment(id, offset);
        let is_open = media.load_header(id).newest.is_some_and(|h| h.state == SegmentState::Open);
        if is_open {
            add(at(0), at(geometry.segment_size));
        } else {
            add(at(0), at(geometry.data_start()));
            add(at(geometry.data_end()), at(geometry.segment_size));
        }
    }
    sum.max(1)
}
