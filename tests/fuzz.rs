//! The fuzz targets on the committed corpus and on seeded mutations of it: a bounded run that needs
//! neither a nightly compiler nor libFuzzer. See docs/testing.md, "Fuzzing".
//!
//! `PCACHE_FUZZ_EXECUTIONS=n` sets the mutations of each target, `PCACHE_FUZZ_SEED=n` the first seed,
//! `PCACHE_FUZZ_INPUT=file` replays one input instead.
//!
//! What holds for every target, beside its own checks: an execution ends within [`PATIENCE`], takes
//! no more than [`HEAP_MAX`] bytes, and when a batch is over, memory is back where it was.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pcache_vhost::fuzz::{TARGETS, Target, mutate};
use pcache_vhost::sim::Rng;

/// An execution that takes longer hangs, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(30);
/// Most bytes of heap an execution may hold at a time beyond what was held before it.
const HEAP_MAX: usize = 64 << 20;
/// Bytes by which the heap may have grown after a batch: caches of threads and formatters.
const HEAP_SLACK: usize = 1 << 20;

/// Counts what is allocated.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[expect(unsafe_code, reason = "an allocator")]
// SAFETY: every call goes to the system's allocator as it came; only numbers are added.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static HEAP: Counting = Counting;

/// Heap and descriptors are the process's: one target at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

fn target(name: &str) -> &'static Target {
    TARGETS.iter().find(|target| target.name == name).expect("a target of that name")
}

fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target.name);
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("a readable folder").path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} has no corpus", target.name);
    paths.iter().map(|path| std::fs::read(path).expect("a readable corpus")).collect()
}

/// The input being judged, and how many have been.
static CURRENT: Mutex<Vec<u8>> = Mutex::new(Vec::new());
static COUNT: AtomicU64 = AtomicU64::new(0);
/// Panics on any thread: those of a queue do not reach its session's.
static PANICS: AtomicU64 = AtomicU64::new(0);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps an input that failed, and says how to run it again.
fn keep(target: &Target, input: &[u8]) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/artifacts").join(target.name);
    let path = folder.join(format!("found-{:08x}", crc32(input)));
    let kept = std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&path, input));
    match kept {
        Ok(()) => format!(
            "kept; again: PCACHE_FUZZ_INPUT={} cargo test --features sim --test fuzz {}",
            path.display(),
            target.name
        ),
        Err(error) => format!("{} cannot be written: {error}; the input is {input:02x?}", path.display()),
    }
}

/// A name for an input; any mixture will do.
fn crc32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// Ends the process when an execution does not end.
fn watch(target: &'static Target) {
    let mut last = (u64::MAX, Instant::now());
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let count = COUNT.load(Ordering::Relaxed);
            if count != last.0 {
                last = (count, Instant::now());
            } else if last.1.elapsed() > PATIENCE && count & 1 == 1 {
                eprintln!("{} hangs; {}", target.name, keep(target, &lock(&CURRENT)));
                std::process::abort();
            }
        }
    });
}

/// Judges one input.
fn execute(target: &Target, input: &[u8]) {
    {
        let mut current = lock(&CURRENT);
        current.clear();
        current.extend_from_slice(input);
    }
    let panics = PANICS.load(Ordering::Relaxed);
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    // Odd while an execution is under way.
    COUNT.fetch_add(1, Ordering::Relaxed);
    let result = std::panic::catch_unwind(|| (target.run)(input));
    COUNT.fetch_add(1, Ordering::Relaxed);
    let peak = PEAK.load(Ordering::Relaxed).saturating_sub(before);
    if result.is_err() || PANICS.load(Ordering::Relaxed) != panics {
        panic!("{} panicked; {}", target.name, keep(target, input));
    }
    assert!(peak <= HEAP_MAX, "{} took {peak} bytes; {}", target.name, keep(target, input));
}

/// Replays the corpus, then mutates it `executions` times.
fn fuzz(name: &str, executions: u64) {
    let _alone = lock(&ALONE);
    let target = target(name);
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        default(info);
    }));
    watch(target);
    if let Ok(path) = std::env::var("PCACHE_FUZZ_INPUT") {
        return execute(target, &std::fs::read(path).expect("a readable input"));
    }
    let corpus = corpus(target);
    let first = number("PCACHE_FUZZ_SEED").unwrap_or(1);
    let executions = number("PCACHE_FUZZ_EXECUTIONS").unwrap_or(executions);
    // What threads and formatters keep for good is there after the first look at everything.
    corpus.iter().for_each(|input| execute(target, input));
    let live = LIVE.load(Ordering::Relaxed);
    let began = Instant::now();
    corpus.iter().for_each(|input| execute(target, input));
    let mut rng = Rng::new(first);
    let mut input = Vec::new();
    for _ in 0..executions {
        input.clone_from(&corpus[rng.index(corpus.len())]);
        let other = &corpus[rng.index(corpus.len())];
        mutate(&mut input, other, target.len_max, &mut rng);
        execute(target, &input);
    }
    let seconds = began.elapsed().as_secs_f64();
    let count = executions + corpus.len() as u64;
    println!("{name}: {count} executions in {seconds:.1} s, {:.0}/s, seed {first}", count as f64 / seconds);
    drop(input);
    let grown = LIVE.load(Ordering::Relaxed).saturating_sub(live);
    assert!(grown <= HEAP_SLACK, "{name}: the heap has grown by {grown} bytes over the batch");
}

#[test]
fn ring() {
    fuzz("ring", 250_000);
}

#[test]
fn media() {
    fuzz("media", 400_000);
}

#[test]
fn image() {
    fuzz("image", 1_000);
}

#[test]
fn messages() {
    fuzz("messages", 4_000);
}

#[test]
fn settings() {
    fuzz("settings", 50_000);
}
