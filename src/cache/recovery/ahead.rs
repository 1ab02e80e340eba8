//! Reading ahead: what sealed segments hold, read while another process still serves the cache.
//!
//! A planned upgrade makes guests wait for recovery, and most of recovery is the decoding and checking of
//! summaries that have not changed for hours. A successor reads those before the other one comes to rest.
//!
//! Laws:
//! - nothing is written, and nothing that is read ahead counts by itself: recovery reads each segment's
//!   header, and takes what was read ahead only under the very same one. A header names its segment's
//!   generation and has a sequence number, which rises with each change, and a summary is written before
//!   the header that points to it and not changed after: so the same header means the same summary;
//! - what cannot be read ahead, for whatever reason, is read when its turn comes, and complained of then.
//!
//! Liveness words, which change while a segment is sealed, are not read ahead, nor are open segments.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::super::core::load_media;
use super::super::scan::Scan;
use crate::onmedia::{SegmentHeader, SegmentState};
use crate::pmem::Pmem;

/// What was read ahead, by segment.
#[derive(Default)]
pub struct ReadAhead {
    segments: Vec<Mutex<Option<(SegmentHeader, Scan)>>>,
}

impl ReadAhead {
    /// Reads what is sealed now, by that many threads. Changes nothing.
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
                if header.state == SegmentState::Sealed && header.summary_len > 0 {
                    let scan = media.scan_summary(id, &header).ok();
                    *place.lock().unwrap_or_else(PoisonError::into_inner) = scan.map(|scan| (header, scan));
                }
            }
        });
        Self { segments }
    }

    /// What segment `id` holds, if it was read under this very header. Only once.
    pub(super) fn take(&self, id: u32, header: &SegmentHeader) -> Option<Scan> {
        let place = self.segments.get(id as usize)?;
        let (seen, scan) = place.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        (seen == *header).then_some(scan)
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use super::*;
    use crate::cache::core::Cache;
    use crate::cache::index::Extent;
    use crate::cache::{Mode, Order};
    use crate::pmem::MediaClass;
    use crate::sim::{Rng, Scene, SimClock, SimEnv, SimPmem, Style, World};

    const STYLE: Style =
        Style { mode: Mode::Writeback, order: Order::Relaxed, write_cache: true, pass_discard: false };

    fn shown(cache: &Cache<SimEnv>) -> Vec<Extent> {
        let mut all = Vec::new();
        cache.all_volumes().iter().for_each(|volume| volume.index.for_each(|extent| all.push(extent)));
        all
    }

    #[test]
    fn whatever_has_changed_since_it_was_read_ahead_recovery_finds_what_is_there() {
        let (mut used, mut stale) = (0, 0);
        for seed in 0..60 {
            let mut rng = Rng::new(seed);
            let class = if rng.chance(1, 2) { MediaClass::AssumeDax } else { MediaClass::PageCache };
            let mut scene = Scene::sized(class, STYLE, 12, 4096);
            let work = |scene: &mut Scene, rng: &mut Rng, count: u64| {
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
            };
            let (before, after) = (rng.between(20, 80), rng.below(50));
            work(&mut scene, &mut rng, before);
            let ahead = ReadAhead::read(&Arc::new(SimPmem::new(&scene.world)), 1);
            work(&mut scene, &mut rng, after);
            let image = scene.world.photograph("at a kill").daemon_crash(&mut rng);
            let open = |ahead: ReadAhead| {
                let world = World::new(image.clone(), 1);
                world.act_as(0);
                let pmem = Arc::new(SimPmem::new(&world));
                let media = load_media(Arc::clone(&pmem)).expect("a cache");
                let mut counts = (0, 0);
                for (id, place) in (0..).zip(&ahead.segments) {
                    let header = media.load_header(id).into_newest().expect("a header");
                    if let Some((seen, _)) = &*place.lock().unwrap() {
                        if *seen == header { counts.0 += 1 } else { counts.1 += 1 }
                    }
                }
                let (cache, report) = Cache::<SimEnv>::open_after(pmem, SimClock::default(), &ahead)
                    .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
                (shown(&cache), report.keys, report.dirty_bytes, report.findings, counts)
            };
            let (plain, by_ahead) = (open(ReadAhead::default()), open(ahead));
            used += by_ahead.4.0;
            stale += by_ahead.4.1;
            assert_eq!(plain.0, by_ahead.0, "seed {seed}: what is shown");
            assert_eq!((plain.1, plain.2, plain.3), (by_ahead.1, by_ahead.2, by_ahead.3), "seed {seed}");
        }
        assert!(used > 60 && stale > 60, "{used} segments were read ahead for good, {stale} in vain");
    }
}
