//! What the copy to and from the media costs, by store method and length.
//!
//! Questions: which store method is the fastest at each length, and do the plans pick it? What does
//! the fault guard add to a copy? Budgets, as ratios to a plain copy between the same places in the
//! same run: a durable 4 KiB store and its fence at most 2.0, a guarded read of as much at most 1.1.
//! A ratio says something on any machine; the nanoseconds beside it only about this one, and DRAM on
//! tmpfs is not persistent memory.
//!
//! Every round runs every candidate once, one after another, so that whatever slows the machine down
//! hits all of them; the ratio is the median of the rounds' own ratios, the spread their quartiles.

use std::hint::black_box;
use std::path::PathBuf;
use std::time::Instant;

use pcache_vhost::pmem::{MappedPmem, OpenOptions, Pmem, StoreMethod, StorePlan, create};

const MEDIA_LEN: u64 = 256 << 20;
const LENS: [usize; 8] = [8, 64, 256, 512, 1024, 4096, 16384, 65536];
const ROUNDS: usize = 41;
/// Bytes copied per candidate and round, unless that makes too few or too many copies.
const ROUND_LEN: usize = 4 << 20;

fn main() {
    // `cargo test --benches` only asks whether it runs.
    let rounds = if std::env::args().any(|arg| arg == "--bench") { ROUNDS } else { 3 };
    let dir =
        if PathBuf::from("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
    let path = dir.join(format!("pcache-vhost-bench-copy-{}", std::process::id()));
    if let Err(error) = create(&path, MEDIA_LEN) {
        return println!("SKIPPED: {error}");
    }
    let opened: Result<Vec<_>, _> = StoreMethod::available()
        .into_iter()
        .map(|method| open(&path, method).map(|pmem| (method, pmem)))
        .collect();
    // Mapped, it needs no name; and an interrupted run leaves none behind.
    let removed = std::fs::remove_file(&path);
    match (opened, removed) {
        (Ok(media), Ok(())) => run(&media, rounds),
        (Err(error), _) => println!("SKIPPED: {error}"),
        (_, Err(error)) => println!("SKIPPED: {error}"),
    }
}

fn open(path: &PathBuf, method: StoreMethod) -> Result<MappedPmem, pcache_vhost::pmem::OpenError> {
    MappedPmem::open(&OpenOptions {
        store: Some(StorePlan::uniform(method)),
        lock: false,
        prefault: true,
        ..OpenOptions::new(path)
    })
}

fn run(media: &[(StoreMethod, MappedPmem)], rounds: usize) {
    println!("measured plan for dax: {}", StorePlan::measured());
    println!("plan for other media: {}", StorePlan::plain());
    println!("baseline: a plain copy between private memory and as much private memory\n");
    let mut far = vec![1u8; MEDIA_LEN as usize];
    let mut near = vec![2u8; LENS[LENS.len() - 1]];
    for len in LENS {
        let copies = (ROUND_LEN / len).clamp(64, 4096);
        let mut places = Places(0x9e37_79b9_7f4a_7c15 ^ len as u64);
        let mut table = Table::new(len, "store");
        for _ in 0..rounds {
            let seed = places.0;
            let base = time(copies, seed, len, |at| far[at..at + len].copy_from_slice(&near[..len]));
            black_box(&mut far);
            for (method, pmem) in media {
                let ns = time(copies, seed, len, |at| {
                    let stored = pmem.write(at as u64, black_box(&near[..len]));
                    pmem.fence();
                    assert!(stored.is_ok(), "tmpfs failed");
                });
                table.add(&method.to_string(), ns, base);
            }
            places.next();
        }
        table.print();
        let mut table = Table::new(len, "load");
        for _ in 0..rounds {
            let seed = places.0;
            let base = time(copies, seed, len, |at| {
                near[..len].copy_from_slice(black_box(&far[at..at + len]));
                black_box(&mut near);
            });
            let (_, pmem) = &media[0];
            let ns = time(copies, seed, len, |at| {
                assert!(pmem.read(at as u64, &mut near[..len]).is_ok(), "tmpfs failed");
            });
            table.add("guarded", ns, base);
            places.next();
        }
        table.print();
    }
    // What a ring's index costs: two bytes that stay in the cache.
    let mut table = Table::new(2, "load of one place");
    let mut word = [0; 2];
    for _ in 0..rounds {
        let base = time(4096, 0, 2, |_| word.copy_from_slice(black_box(&far[..2])));
        let ns = time(4096, 0, 2, |_| assert!(media[0].1.read(0, black_box(&mut word)).is_ok()));
        table.add("guarded", ns, base);
    }
    table.print();
}

/// Nanoseconds per copy, at pseudo-random lines that are the same for every candidate of a round.
fn time(copies: usize, seed: u64, len: usize, mut copy: impl FnMut(usize)) -> f64 {
    let mut places = Places(seed | 1);
    let begin = Instant::now();
    for _ in 0..copies {
        copy((places.next() % (MEDIA_LEN - len as u64)) as usize / 64 * 64);
    }
    begin.elapsed().as_nanos() as f64 / copies as f64
}

/// xorshift64.
struct Places(u64);

impl Places {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Samples of several candidates, each with its round's baseline.
struct Table {
    title: String,
    rows: Vec<(String, Vec<(f64, f64)>)>,
}

impl Table {
    fn new(len: usize, what: &str) -> Self {
        Self { title: format!("{what}, {len} bytes"), rows: Vec::new() }
    }

    fn add(&mut self, name: &str, ns: f64, base_ns: f64) {
        let sample = (ns, ns / base_ns);
        match self.rows.iter_mut().find(|(known, _)| known == name) {
            Some((_, samples)) => samples.push(sample),
            None => self.rows.push((name.to_owned(), vec![sample])),
        }
    }

    fn print(&self) {
        println!("{}", self.title);
        for (name, samples) in &self.rows {
            let quartiles = |pick: fn(&(f64, f64)) -> f64| {
                let mut values: Vec<f64> = samples.iter().map(pick).collect();
                values.sort_by(f64::total_cmp);
                [values.len() / 4, values.len() / 2, values.len() * 3 / 4].map(|at| values[at])
            };
            let ([low, ratio, high], [_, ns, _]) =
                (quartiles(|sample| sample.1), quartiles(|sample| sample.0));
            println!("  {name:32} {ratio:6.2} ({low:.2} .. {high:.2})   {ns:9.1} ns");
        }
        println!();
    }
}
