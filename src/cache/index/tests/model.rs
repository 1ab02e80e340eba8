//! Every method, at random, against an array of places.

use super::*;

const REGIONS: u64 = 20;
const SECTORS: u64 = REGIONS * REGION_SECTORS;

type Parts = Vec<(u64, Place)>;

/// Where each sector lies.
struct Model(Vec<Option<Place>>);

impl Model {
    fn new() -> Model {
        Model(vec![None; SECTORS as usize])
    }

    /// Applies `decide` to each sector's place; returns what `note` makes of old and new.
    fn edit(
        &mut self,
        range: SectorRange,
        mut decide: impl FnMut(u64, Option<Place>) -> Option<Place>,
        note: impl Fn(Option<Place>, Option<Place>) -> Option<Place>,
    ) -> Parts {
        let mut noted = Vec::new();
        for sector in range.start..range.end() {
            let place = &mut self.0[sector as usize];
            let new = decide(sector, *place);
            if let Some(what) = note(*place, new) {
                noted.push((sector, what));
            }
            *place = new;
        }
        noted
    }

    fn parts(&self, range: SectorRange) -> Parts {
        (range.start..range.end()).filter_map(|sector| Some((sector, self.0[sector as usize]?))).collect()
    }
}

fn parts_of(extents: &[Extent]) -> Parts {
    extents
        .iter()
        .flat_map(|extent| {
            (extent.range.start..extent.range.end()).map(|sector| (sector, extent.place_at(sector)))
        })
        .collect()
}

fn is_same(place: Option<Place>, extent: &Extent, sector: u64) -> bool {
    let expected = if extent.place.zero {
        extent.place.position
    } else {
        extent.place.position + (sector - extent.range.start)
    };
    place.is_some_and(|place| place.zero == extent.place.zero && place.position == expected)
}

fn random_range(random: &mut Random) -> SectorRange {
    let (start, len) = match random.below(10) {
        0..4 => (random.below(SECTORS / 8) * 8, 8),
        4..6 => (random.below(SECTORS), 1 + random.below(40)),
        6 => (random.below(SECTORS), 1 + random.below(3000)),
        7 => (random.below(REGIONS) * REGION_SECTORS, (1 + random.below(8)) * REGION_SECTORS),
        8 => (random.below(SECTORS), 1 + random.below(SECTORS)),
        _ => {
            let edge = random.below(REGIONS) * REGION_SECTORS;
            (edge.saturating_sub(random.below(9)), 1 + random.below(16))
        }
    };
    SectorRange::new(start, len.min(SECTORS - start))
}

/// A place that is new, or goes on from what lies before the range, or is that of what lies in it.
fn random_place(random: &mut Random, model: &Model, range: SectorRange) -> Place {
    let zero = random.chance(if range.len > 2048 { 80 } else { 20 });
    let fresh = Place { position: random.below(50) * 1000, zero, dirty: random.chance(50) };
    let before = model.0[range.start.saturating_sub(1) as usize];
    match before {
        Some(before) if random.chance(40) => before.advanced(1),
        _ => fresh,
    }
}

/// An extent that some of what is mapped still agrees with, more often than not.
fn random_match(random: &mut Random, model: &Model) -> Extent {
    let range = random_range(random);
    let sector = range.start + random.below(range.len);
    let place = match model.0[sector as usize] {
        Some(place) if place.zero => place,
        Some(place) => Place { position: place.position.saturating_sub(sector - range.start), ..place },
        None => random_place(random, model, range),
    };
    Extent { range, place: Place { dirty: random.chance(50), ..place } }
}

struct Pair {
    index: Index,
    model: Model,
    random: Random,
    context: String,
}

impl Pair {
    /// Checks what an operation appended: exactly `expected`, ascending, joined, after the prefix.
    fn check(&self, what: &str, out: &[Extent], expected: Parts) {
        let context = &self.context;
        assert_eq!(out[0], extent(9, 9, data(9)), "{what} left the caller's extents alone: {context}");
        assert!(parts_of(&out[1..]) == expected, "{what} named other sectors: {context}");
        for pair in out[1..].windows(2) {
            assert!(pair[0].range.end() <= pair[1].range.start, "{what} is ascending: {context}");
            assert!(!pair[0].is_continued_by(&pair[1]), "{what} is joined: {context}");
        }
    }

    fn operate(&mut self) {
        let mut out = vec![extent(9, 9, data(9))];
        let random = &mut self.random;
        let (old, new) = (|old, _| old, |old: Option<Place>, new| if old == new { None } else { new });
        let (what, expected) = match random.below(12) {
            0..3 => {
                let range = random_range(random);
                let extent = Extent { range, place: random_place(random, &self.model, range) };
                self.index.insert(extent, &mut out);
                ("insert", self.model.edit(range, |sector, _| Some(extent.place_at(sector)), old))
            }
            3..5 => {
                let range = random_range(random);
                let extent = Extent { range, place: random_place(random, &self.model, range) };
                self.index.insert_gaps(extent, &mut out);
                let decide = |sector, old: Option<Place>| old.or(Some(extent.place_at(sector)));
                ("insert_gaps", self.model.edit(range, decide, new))
            }
            5 => {
                let range = random_range(random);
                self.index.remove(range, &mut out);
                ("remove", self.model.edit(range, |_, _| None, old))
            }
            6 => {
                let extent = random_match(random, &self.model);
                self.index.remove_if(extent, &mut out);
                let decide = |sector, old| if is_same(old, &extent, sector) { None } else { old };
                let gone = |old: Option<Place>, new: Option<Place>| if new.is_none() { old } else { None };
                ("remove_if", self.model.edit(extent.range, decide, gone))
            }
            7 => {
                let from = random_match(random, &self.model);
                // Never where it was, so that the model can tell what moved.
                let to = 1_000_000 + random.below(1000) * 1000 + from.place.position % 1000;
                let to = if to == from.place.position { to + 1 } else { to };
                self.index.move_if(from, to, &mut out);
                let to = Extent { place: Place { position: to, ..from.place }, ..from };
                let decide = |sector, old: Option<Place>| {
                    if !is_same(old, &from, sector) {
                        return old;
                    }
                    old.map(|old| Place { dirty: old.dirty, ..to.place_at(sector) })
                };
                ("move_if", self.model.edit(from.range, decide, new))
            }
            8..10 => {
                let extent = random_match(random, &self.model);
                let drop_zero = random.chance(50);
                let changed = self.index.mark_clean_if(extent, drop_zero);
                let decide = |sector, old: Option<Place>| match old {
                    Some(place) if is_same(old, &extent, sector) => {
                        (!(drop_zero && place.zero)).then_some(Place { dirty: false, ..place })
                    }
                    _ => old,
                };
                let differs = |old, new| if old == new { None } else { old };
                let expected = self.model.edit(extent.range, decide, differs).len() as u64;
                assert_eq!(changed, expected, "mark_clean_if: {}", self.context);
                ("nothing", Vec::new())
            }
            10 => {
                let range = random_range(random);
                self.index.lookup(range, &mut out);
                ("lookup", self.model.parts(range))
            }
            _ => {
                let (from, max) = (random.below(SECTORS), 1 + random.below(50) as usize);
                let next = self.index.dirty_from(from, max, &mut out);
                assert!(out.len() - 1 == max || next.is_none() && out.len() - 1 < max);
                let end = next.unwrap_or(SECTORS);
                let mut expected = Vec::new();
                if from < end {
                    expected = self.model.parts(SectorRange::new(from, end - from));
                    expected.retain(|(_, place)| place.dirty);
                }
                ("dirty_from", expected)
            }
        };
        self.check(what, &out, expected);
    }

    /// Compares everything there is, and what the index keeps for its own use.
    fn audit(&self) {
        let context = &self.context;
        let stored = all(&self.index);
        let everything = self.model.parts(SectorRange::new(0, SECTORS));
        assert!(parts_of(&stored) == everything, "for_each shows what is mapped: {context}");
        assert_eq!(self.index.extents(), stored.len() as u64, "{context}");
        assert_eq!(self.index.mapped_sectors(), everything.len() as u64, "{context}");
        let dirty_count = everything.iter().filter(|(_, place)| place.dirty).count();
        assert_eq!(self.index.dirty_sectors(), dirty_count as u64, "{context}");
        for pair in stored.windows(2) {
            let is_edge = pair[1].range.start % REGION_SECTORS == 0;
            assert!(is_edge || !pair[0].is_continued_by(&pair[1]), "neighbours are joined: {context}");
        }
        let mut heap = 0;
        for region in 0..REGIONS {
            let table = self.index.shard(region).read();
            let state = table.get(region).map(Region::state);
            heap += table.get(region).map_or(0, Region::heap_bytes) as u64;
            let mut is_dirty = false;
            match state {
                Some(State::Table { is_dirty: dirty }) => {
                    is_dirty = dirty;
                    assert!(self.index.directory.run_at(region).is_none(), "in one place only: {context}");
                }
                Some(_) => panic!("region {region} does not belong into a table: {context}"),
                None => {}
            }
            let start = region * REGION_SECTORS;
            let is_next = |only_dirty| {
                matches!(self.index.directory.next(start, only_dirty),
                    Some(Next::Region(next)) if next == region)
            };
            assert_eq!((is_next(false), is_next(true)), (state.is_some(), is_dirty), "{context}");
        }
        let counted: u64 = self.index.shards.iter().map(|shard| shard.sums.heap()).sum();
        assert_eq!(counted, heap, "bytes of entries: {context}");
    }
}

fn run(shards: usize, seed: u64, operations: usize) {
    let mut pair = Pair {
        index: Index::new(shards),
        model: Model::new(),
        random: Random::new(seed),
        context: String::new(),
    };
    for operation in 0..operations {
        pair.context = format!("shards {shards}, seed {seed}, operation {operation}");
        pair.operate();
        if operation % 64 == 0 {
            pair.audit();
        }
    }
    pair.audit();
    let mut removed = vec![extent(9, 9, data(9))];
    pair.index.clear(&mut removed);
    let expected = pair.model.edit(SectorRange::new(0, SECTORS), |_, _| None, |old, _| old);
    pair.check("clear", &removed, expected);
    pair.audit();
}

#[test]
fn any_sequence_of_operations_does_what_an_array_does() {
    for seed in 0..12 {
        // One shard works on almost everything at once, 256 on one region after the other.
        for shards in [1, 4, 256] {
            run(shards, seed, 1500);
        }
    }
}

#[test]
fn small_extents_in_few_regions_do_what_an_array_does() {
    for seed in 100..104 {
        let mut random = Random::new(seed);
        let (index, mut model) = (Index::new(2), Model::new());
        // Dense regions of single sectors: arrays grow to their limit and shrink again.
        for step in 0..40_000 {
            let range = SectorRange::new(random.below(2 * REGION_SECTORS - 4), 1 + random.below(3));
            if step < 25_000 || random.chance(30) {
                let place = Place { position: random.below(1 << 30), ..dirty(0) };
                let extent = Extent { range, place };
                index.insert(extent, &mut Vec::new());
                model.edit(range, |sector, _| Some(extent.place_at(sector)), |_, _| None);
            } else {
                index.remove(range, &mut Vec::new());
                model.edit(range, |_, _| None, |_, _| None);
            }
        }
        let everything = model.parts(SectorRange::new(0, SECTORS));
        assert!(parts_of(&all(&index)) == everything, "seed {seed}");
    }
}
