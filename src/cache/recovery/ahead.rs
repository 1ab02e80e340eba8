//! Reading ahead: what segments hold, read while another process still serves the cache.
//!
//! A planned upgrade makes guests wait for recovery, and most of recovery is the decoding and checking of
//! summaries that have not changed for hours, and of the records of segments that are still filled. A
//! successor reads those before the other one comes to rest.
//!
//! Laws:
//! - nothing is written, and nothing that is read ahead counts by itself: recovery reads each segment's
//!   header, and takes what was read ahead only under the very same one. A header names its segment's
//!   generation and has a sequence number, which rises with each change, and a summary is written before
//!   the header that points to it and not changed after: so the same header means the same summary;
//! - of an open segment what was read ahead are its first records, up to one that the witness counted
//!   then: nobody changes these as long as the segment is open in that generation, so under the same
//!   header recovery reads on below them;
//! - what cannot be read ahead, for whatever reason, is read when its turn comes, and complained of then.
//!
//! Liveness words, which change all the time, do not count either. They are read all the same, and so is
//! the room of open segments that is still empty: recovery reads both again, and by then the mapping has
//! their pages.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::super::core::load_media;
use super::super::scan::Scan;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{SegmentHeader, SegmentState};
use crate::pmem::Pmem;

/// What was read ahead, by segment.
#[derive(Default)]
pub struct ReadAhead {
    segments: Vec<Mutex<Option<(SegmentHeader, Scan)>>>,
}

impl ReadAhead {
    /// Reads what is there now, by that many threads. Changes nothing.
    pub fn read<P: Pmem>(pmem: &Arc<P>, threads: usize) -> Self {
        // What is wrong with these media, the one who opens them says.
        let Ok(media) = load_media(Arc::clone(pmem)) else { return Self::default() };
        let count = media.geometry.segment_count();
        let segments: Vec<_> = (0..count).map(|_| Mutex::default()).collect();
        let next = AtomicU32::new(0);
        super::spread(threads.min(count as usize).max(1), || {
            loop {
                let id = next.fetch_add(1, Ordering::Relaxed);
                let Some(place) = segments.get(id as usize) else { return };
                let Ok(header) = media.load_header(id).into_newest() else { continue };
                let scan = match header.state {
                    SegmentState::Free => continue,
                    SegmentState::Sealed if header.summary_len > 0 => media.scan_summary(id, &header).ok(),
                    SegmentState::Sealed => None,
                    SegmentState::Open => media.scan_witnessed(id, &header),
                };
                drop(media.load_liveness(id, header.generation));
                *place.lock().unwrap_or_else(PoisonError::into_inner) = scan.map(|scan| (header, scan));
            }
        });
        Self { segments }
    }

    /// What segment `id` holds, if it was read under this very header. Only once.
    pub(super) fn take(&self, id: u32, header: &SegmentHeader) -> Option<Scan> {
        let place = self.segments.get(id as usize)?;
        let (seen, scan) = place.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        (seen == *header || mutated(Mutant::AheadOutlivesHeader)).then_some(scan)
    }

    /// Of each segment that was read ahead: whether it is open, and whether that counts by what the media
    /// say now. For simulations, which have to know that both happen.
    #[cfg(feature = "sim")]
    pub(crate) fn fates<P: Pmem>(&self, pmem: &Arc<P>) -> Vec<(bool, bool)> {
        let Ok(media) = load_media(Arc::clone(pmem)) else { return Vec::new() };
        let fate = |(id, place): (u32, &Mutex<Option<(SegmentHeader, Scan)>>)| {
            let header = media.load_header(id).into_newest().ok()?;
            let place = place.lock().unwrap_or_else(PoisonError::into_inner);
            let (seen, _) = place.as_ref()?;
            Some((header.state == SegmentState::Open, *seen == header))
        };
        (0..).zip(&self.segments).filter_map(fate).collect()
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use crate::sim::upgrade::{Counts, upgrade};

    #[test]
    fn whatever_has_changed_since_it_was_read_ahead_recovery_finds_what_is_there() {
        let mut counts = Counts::default();
        (0..60).for_each(|seed| upgrade(seed, &mut counts));
        assert!(counts.used > 60 && counts.open > 10 && counts.stale > 60, "{counts:?}");
    }
}
