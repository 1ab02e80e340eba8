//! The check that the checks can fail: every deliberate bug of `src/mutant.rs` is noticed, by seeds
//! that the engine itself passes.
//!
//! Question: is there a law whose breach the simulation would not see?
//!
//! With `--nocapture` it prints the table of `src/sim/MUTANTS.md`. `PCACHE_MUTANT=Name` hunts one alone,
//! `PCACHE_MUTANT_SEEDS=n` sets how many seeds are tried on each.

#[path = "mutants/document.rs"]
mod document;
#[path = "mutants/failing.rs"]
mod failing;
#[path = "crash/fellows.rs"]
mod fellows;
#[path = "crash/growth.rs"]
mod growth;
#[path = "crash/held.rs"]
mod held;
#[path = "mutants/instruments.rs"]
mod instruments;
#[path = "crash/pairs.rs"]
mod pairs;
#[path = "mutants/product.rs"]
mod product;
#[path = "mutants/rest.rs"]
mod rest;
#[path = "mutants/shares.rs"]
mod shares;
#[path = "crash/sizes.rs"]
mod sizes;
#[path = "mutants/starts.rs"]
mod starts;
#[path = "mutants/stories.rs"]
mod stories;

use std::collections::BTreeMap;
use std::panic;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use self::instruments::Instrument;
use pcache_vhost::mutant::{self, Mutant};

/// Seeds tried on each mutant. Most need three.
const SEEDS: u64 = 60;

/// What became of a mutant.
struct Hunt {
    mutant: Mutant,
    instrument: &'static str,
    /// The seeds tried; the last one killed it, if any did.
    seeds: Vec<u64>,
    images: u64,
    /// How often its place was reached.
    reached: u64,
    /// What noticed it.
    killed: Option<String>,
    seconds: f64,
}

fn hunt(mutant: Mutant, seeds: u64) -> Hunt {
    let began = Instant::now();
    let (name, instrument) = Instrument::of(mutant);
    let mut hunt = Hunt {
        mutant,
        instrument: name,
        seeds: Vec::new(),
        images: 0,
        reached: 0,
        killed: None,
        seconds: 0.0,
    };
    for seed in instrument.seeds().take(seeds as usize) {
        hunt.seeds.push(seed);
        let (result, reached) = mutant::with(mutant, || instrument.run(seed));
        hunt.reached += reached;
        match result {
            Ok(images) => hunt.images += images,
            Err(caught) => {
                hunt.images += caught.images;
                hunt.killed = Some(caught.what);
                break;
            }
        }
    }
    hunt.seconds = began.elapsed().as_secs_f64();
    hunt
}

impl Hunt {
    /// Its row of the table.
    fn row(&self) -> String {
        let Hunt { mutant, instrument, seeds, images, .. } = self;
        let caught = self.killed.as_deref().map_or("SURVIVED", document::check_of);
        let (name, what, law) = (mutant.name(), mutant.what(), mutant.law());
        format!("| `{name}` | {what} | {law} | {instrument}: {caught} | {} | {images} |", seeds.len())
    }
}

/// Runs `work` on every item, on two threads.
fn on_two_threads<T: Copy + Sync, R: Send>(items: &[T], work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(BTreeMap::new());
    let run = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(&item) = items.get(number) else { return };
            let result = work(item);
            results.lock().expect("no thread panicked with it").insert(number, result);
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(run);
        run();
    });
    results.into_inner().expect("no thread panicked with it").into_values().collect()
}

#[test]
fn every_mutant_is_killed_by_seeds_that_the_engine_passes() {
    // A mutated engine may fail its own assertions: that is how some mutants die.
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if mutant::active().is_none() {
            report(info);
        }
    }));
    let began = Instant::now();
    let only = std::env::var("PCACHE_MUTANT").ok();
    let seeds = std::env::var("PCACHE_MUTANT_SEEDS").map_or(SEEDS, |text| text.parse().expect("a number"));
    let mutants: Vec<Mutant> =
        Mutant::ALL.iter().copied().filter(|m| only.as_ref().is_none_or(|name| name == m.name())).collect();
    assert!(!mutants.is_empty(), "there is no mutant {only:?}");
    let hunts = on_two_threads(&mutants, |mutant| {
        let hunt = hunt(mutant, seeds);
        let what: String = hunt.killed.as_deref().unwrap_or("SURVIVED").chars().take(200).collect();
        eprintln!("{:<30} {:>5.1} s, reached {:>7}: {what}", mutant.name(), hunt.seconds, hunt.reached);
        hunt
    });
    hunts.iter().for_each(|hunt| println!("{}", hunt.row()));
    let hunted = began.elapsed().as_secs_f64();
    let mut passed = BTreeMap::new();
    for hunt in &hunts {
        for &seed in &hunt.seeds {
            passed.insert((hunt.instrument, seed), (hunt.mutant, seed));
        }
    }
    let jobs: Vec<(Mutant, u64)> = passed.into_values().collect();
    let failed: Vec<String> = on_two_threads(&jobs, |(mutant, seed)| {
        let (name, instrument) = Instrument::of(mutant);
        instrument.run(seed).err().map(|caught| format!("{name}, seed {seed}: {}", caught.what))
    })
    .into_iter()
    .flatten()
    .collect();
    println!(
        "{} mutants in {hunted:.0} s, the engine itself in {:.0} s",
        hunts.len(),
        began.elapsed().as_secs_f64() - hunted
    );
    assert!(failed.is_empty(), "the engine itself fails: {failed:#?}");
    let survivors: Vec<&str> = hunts.iter().filter(|h| h.killed.is_none()).map(|h| h.mutant.name()).collect();
    assert!(survivors.is_empty(), "{survivors:?} survived");
}
