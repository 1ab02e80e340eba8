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
}

/// An upgrade as a simulation has it: one reads ahead, another works on and is gone, the first recovers.
#[cfg(feature = "sim")]
pub mod story {
    use super::*;
    use crate::cache::core::Cache;
    use crate::cache::index::Extent;
    use crate::cache::{Mode, Order};
    use crate::pmem::MediaClass;
    use crate::sim::{Rng, Scene, SimClock, SimEnv, SimPmem, Snapshot, Style, World};

    const STYLE: Style =
        Style { mode: Mode::Writeback, order: Order::Relaxed, write_cache: true, pass_discard: false };

    /// What became of the segments that were read ahead.
    #[derive(Default, Debug)]
    pub struct Counts {
        /// Read for good, open ones among them.
        pub used: u64,
        /// Of these, found open.
        pub open: u64,
        /// Read in vain.
        pub stale: u64,
    }

    /// Whatever has changed between reading ahead and recovery, that finds what it would have found without.
    ///
    /// # Panics
    /// It does not.
    pub fn upgrade(seed: u64, counts: &mut Counts) {
        let mut rng = Rng::new(seed);
        let class = if rng.chance(1, 2) { MediaClass::AssumeDax } else { MediaClass::PageCache };
        let mut scene = Scene::sized(class, STYLE, 12, 4096);
        // Half of them with little done meanwhile, so that what was open then still is.
        let most = if rng.chance(1, 2) { 4 } else { 50 };
        let (before, after) = (rng.between(20, 80), rng.below(most));
        work(&mut scene, &mut rng, before, seed);
        let ahead = ReadAhead::read(&Arc::new(SimPmem::new(&scene.world)), 1);
        work(&mut scene, &mut rng, after, seed);
        let image = scene.world.photograph("at a kill").daemon_crash(&mut rng);
        let plain = open(&image, &ReadAhead::default(), seed, &mut Counts::default());
        let by_ahead = open(&image, &ahead, seed, counts);
        assert_eq!(plain, by_ahead, "seed {seed}");
    }

    fn work(scene: &mut Scene, rng: &mut Rng, count: u64, seed: u64) {
        for number in 0..count {
            scene.write(rng.below(4000), rng.between(1, 48), 1000 * seed + number + 1);
            // So that no write ever waits for space.
            for _ in 0..12 {
                scene.machine.step_all();
            }
            if number % 4 == 3 {
                scene.drain();
                (0..40).for_each(|_| scene.machine.step_all());
            }
        }
    }

    type Recovered = (Vec<Extent>, u64, u64, Vec<String>);

    fn open(image: &Snapshot, ahead: &ReadAhead, seed: u64, counts: &mut Counts) -> Recovered {
        let world = World::new(image.clone(), 1);
        world.act_as(0);
        let pmem = Arc::new(SimPmem::new(&world));
        let media = load_media(Arc::clone(&pmem)).expect("a cache");
        for (id, place) in (0..).zip(&ahead.segments) {
            let header = media.load_header(id).into_newest().expect("a header");
            if let Some((seen, _)) = &*place.lock().unwrap_or_else(PoisonError::into_inner) {
                let is_open = header.state == SegmentState::Open;
                counts.used += u64::from(*seen == header);
                counts.open += u64::from(*seen == header && is_open);
                counts.stale += u64::from(*seen != header);
            }
        }
        let (cache, report) = Cache::<SimEnv>::open_after(pmem, SimClock::default(), ahead)
            .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let mut shown = Vec::new();
        cache.all_volumes().iter().for_each(|volume| volume.index.for_each(|extent| shown.push(extent)));
        (shown, report.keys, report.dirty_bytes, report.findings)
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use super::story::{Counts, upgrade};

    #[test]
    fn whatever_has_changed_since_it_was_read_ahead_recovery_finds_what_is_there() {
        let mut counts = Counts::default();
        (0..60).for_each(|seed| upgrade(seed, &mut counts));
        assert!(counts.used > 60 && counts.open > 15 && counts.stale > 60, "{counts:?}");
    }
}
