//! Recovery's second half: from the keys of all segments to the indexes, the newest of each sector
//! winning.
//!
//! Keys are cut at the borders of regions and gathered by volume and index shard as they are found, by
//! each thread for itself. Then each shard is sorted and built on its own (`index/build.rs`), so that
//! threads share nothing. Laws:
//! - The result is that of inserting all keys in order of version, whatever thread found what when: a
//!   shard is sorted before it is built, and equal versions are told apart by their place. Of two
//!   copies of one version, which a crash during relocation leaves, the one in the higher segment wins:
//!   write-back decides likewise. A range that is lost wins over the key of its version: that is the one
//!   it speaks of.
//! - What loses is dead when recovery ends, its word pending.
//! - A discard of terabytes is not cut into regions. Such *wide* ranges have no payload; they are
//!   inserted first, and where a region has other keys as well their parts compete like these.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::super::core::Cache;
use super::super::env::Env;
use super::super::index::{Extent, ExtentMap, Fragment, Index, Place, REGION_SECTORS};
use super::super::stripes::lock;
use super::super::volume::VolumeCore;
use super::{Volumes, spread};
use crate::mutant::{Mutant, mutated};
use crate::units::SectorRange;

/// What one thread has found, by volume.
#[derive(Default)]
pub(super) struct Keys {
    by_volume: BTreeMap<u64, Found>,
}

/// What one thread has found of one volume.
struct Found {
    /// Keys, by shard of the volume's index.
    shards: Vec<Vec<Fragment>>,
    wide: Vec<Wide>,
    count: u64,
}

/// Zeros, or a loss, longer than a region.
struct Wide {
    rank: u64,
    extent: Extent,
}

impl Keys {
    /// Where keys of a volume go.
    pub fn of<'a>(&'a mut self, volume: &'a VolumeCore) -> Sink<'a> {
        let fresh = || Found {
            shards: (0..volume.index.shard_count()).map(|_| Vec::new()).collect(),
            wide: Vec::new(),
            count: 0,
        };
        let found = self.by_volume.entry(volume.incarnation).or_insert_with(fresh);
        Sink { index: &volume.index, found }
    }
}

/// Takes a volume's keys.
pub(super) struct Sink<'a> {
    index: &'a Index,
    found: &'a mut Found,
}

impl Sink<'_> {
    /// A key, or a part of one, of this version.
    pub fn add(&mut self, version: u64, extent: Extent) {
        self.found.count += 1;
        let rank = if mutated(Mutant::OldestWins) { !version } else { version };
        if extent.range.len > REGION_SECTORS {
            assert!(extent.place.zero, "payload is never that long");
            self.found.wide.push(Wide { rank, extent });
            return;
        }
        for fragment in Fragment::split(extent, rank) {
            self.found.shards[self.index.shard_of(fragment.region())].push(fragment);
        }
    }
}

/// One shard of one volume's index, and what it is to hold, as the threads have found it.
struct Job {
    volume: Arc<VolumeCore>,
    wide: Arc<WideMap>,
    shard: usize,
    parts: Vec<Vec<Fragment>>,
}

/// Fills the volumes' indexes with what the threads have found; returns how many keys that were.
pub(super) fn rebuild<E: Env>(
    cache: &Cache<E>,
    volumes: &Volumes,
    threads: usize,
    mut found: Vec<Keys>,
) -> u64 {
    let (mut jobs, mut count) = (Vec::new(), 0);
    for volume in volumes.values() {
        let of_volume = |keys: &mut Keys| keys.by_volume.remove(&volume.incarnation);
        let parts: Vec<Found> = found.iter_mut().filter_map(of_volume).collect();
        count += parts.iter().map(|part| part.count).sum::<u64>();
        jobs.extend(jobs_of(volume, parts).map(|job| Mutex::new(Some(job))));
    }
    let next = AtomicUsize::new(0);
    spread(threads, || {
        let mut replaced = Vec::new();
        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Some(job) = job.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
                build(cache, job, &mut replaced);
            }
        }
    });
    count
}

/// Inserts a volume's wide ranges; the jobs that are left to do.
fn jobs_of(volume: &Arc<VolumeCore>, mut parts: Vec<Found>) -> impl Iterator<Item = Job> {
    let wide = parts.iter_mut().flat_map(|part| part.wide.drain(..)).collect();
    let wide = Arc::new(WideMap::insert(volume, wide));
    (0..volume.index.shard_count()).filter_map(move |shard| {
        let parts: Vec<_> = parts.iter_mut().map(|part| std::mem::take(&mut part.shards[shard])).collect();
        let (volume, wide) = (volume.clone(), wide.clone());
        parts.iter().any(|part| !part.is_empty()).then_some(Job { volume, wide, shard, parts })
    })
}

/// Fills one shard. What loses is dead.
fn build<E: Env>(cache: &Cache<E>, job: Job, replaced: &mut Vec<Extent>) {
    replaced.clear();
    fill(job, replaced);
    if !mutated(Mutant::LosersNotKilled) {
        cache.mark_dead(replaced);
    }
}

/// Fills one shard; appends to `replaced` what loses.
fn fill(job: Job, replaced: &mut Vec<Extent>) {
    let mut parts = job.parts.into_iter().filter(|part| !part.is_empty());
    let mut fragments = parts.next().unwrap_or_default();
    parts.for_each(|part| fragments.extend(part));
    Index::sort(&mut fragments);
    if job.wide.join(&mut fragments) {
        Index::sort(&mut fragments);
    }
    job.volume.index.build(job.shard, &mut fragments, replaced);
}

/// A volume's wide ranges: which of them is the newest of a sector.
struct WideMap {
    wide: Vec<Wide>,
    /// Maps sectors to positions in `wide`.
    newest: ExtentMap,
}

impl WideMap {
    /// Makes the map, and inserts the ranges into the volume's index.
    fn insert(volume: &VolumeCore, mut wide: Vec<Wide>) -> WideMap {
        wide.sort_unstable_by_key(|wide| (wide.rank, wide.extent.place.position));
        let (mut newest, mut replaced) = (ExtentMap::new(), Vec::new());
        for (number, Wide { extent, .. }) in (0..).zip(&wide) {
            // None of them has payload to be dead.
            volume.index.insert(*extent, &mut replaced);
            let place = Place { position: number, zero: true, dirty: true };
            newest.insert(Extent { place, ..*extent }, &mut replaced);
            replaced.clear();
        }
        WideMap { wide, newest }
    }

    /// Adds the wide parts of those regions that `fragments`, sorted, lie in; says whether there are any.
    fn join(&self, fragments: &mut Vec<Fragment>) -> bool {
        if self.wide.is_empty() {
            return false;
        }
        let mut found = Vec::new();
        for fragments in fragments.chunk_by(|a, b| a.region() == b.region()) {
            let start = fragments[0].region() * REGION_SECTORS;
            self.newest.lookup(SectorRange { start, len: REGION_SECTORS }, &mut found);
        }
        let old = fragments.len();
        for part in found {
            let Wide { rank, extent } = self.wide[part.place.position as usize];
            fragments.extend(extent.clip(part.range).into_iter().flat_map(|e| Fragment::split(e, rank)));
        }
        fragments.len() > old
    }
}

/// Adds what is listed as lost to a volume's keys: each range counts like a key of its version.
pub(super) fn add_lost(volume: &VolumeCore, keys: &mut Keys) {
    let whole = SectorRange::new(0, volume.descriptor_sectors());
    let mut sink = keys.of(volume);
    for lost in lock(&volume.lost).iter() {
        volume.version.fetch_max(lost.version + 1, Ordering::Relaxed);
        if let Some(range) = lost.range.intersection(&whole) {
            sink.add(lost.version, Extent { range, place: Place::LOST });
        }
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use super::*;
    use crate::onmedia::VolumeDescriptor;
    use crate::sim::Rng;

    const REGIONS: u64 = 40;

    fn volume() -> Arc<VolumeCore> {
        let sectors = REGIONS * REGION_SECTORS;
        Arc::new(VolumeCore::new(VolumeDescriptor { sectors, ..VolumeDescriptor::default() }, 0, 64))
    }

    /// Blocks, runs, small zeros, and zeros and losses of many regions, the later the newer.
    fn keys(rng: &mut Rng) -> Vec<Extent> {
        let end = REGIONS * REGION_SECTORS;
        let key = |(number, rng): (u64, &mut Rng)| {
            let (len, zero) = match rng.below(20) {
                0 => (rng.between(1, REGION_SECTORS * 30), true),
                1 => (rng.between(1, 600), true),
                2 => (rng.between(1, 512), false),
                _ => (8, false),
            };
            let start = rng.below(end - len);
            let start = if rng.below(4) > 0 { start / 8 * 8 } else { start };
            let place = match zero && rng.below(8) == 0 {
                true => Place::LOST,
                false => Place { position: 1000 * (number + 1), zero, dirty: true },
            };
            Extent { range: SectorRange::new(start, len), place }
        };
        let count = rng.between(1, 300);
        (0..count).map(|number| key((number, rng))).collect()
    }

    fn shown(index: &Index) -> Vec<Extent> {
        let mut all = Vec::new();
        index.for_each(|extent| all.push(extent));
        all
    }

    #[test]
    fn whoever_found_what_in_whatever_order_the_newest_of_each_sector_is_shown() {
        for seed in 0..200 {
            let mut rng = Rng::new(seed);
            let keys = keys(&mut rng);
            let (expected, mut lost) = (Index::new(1), Vec::new());
            keys.iter().for_each(|key| expected.insert(*key, &mut lost));
            let volume = volume();
            let mut finders = [Keys::default(), Keys::default(), Keys::default()];
            let mut numbered: Vec<_> = (1..).zip(&keys).collect();
            while !numbered.is_empty() {
                let (version, key) = numbered.swap_remove(rng.below(numbered.len() as u64) as usize);
                finders[rng.below(3) as usize].of(&volume).add(version, *key);
            }
            let parts = finders.iter_mut().filter_map(|keys| keys.by_volume.remove(&volume.incarnation));
            let mut replaced = Vec::new();
            jobs_of(&volume, parts.collect()).for_each(|job| fill(job, &mut replaced));
            assert_eq!(shown(&volume.index), shown(&expected), "seed {seed}");
            let sums = |index: &Index| (index.extents(), index.mapped_sectors(), index.dirty_sectors());
            assert_eq!(sums(&volume.index), sums(&expected), "seed {seed}");
            let payload = |extents: &[Extent]| -> u64 {
                extents.iter().filter(|e| !e.place.zero).map(|e| e.range.len).sum()
            };
            assert_eq!(payload(&replaced), payload(&lost), "seed {seed}");
        }
    }
}
