//! Question: what does a guest get from the daemon, next to what it would get from others?
//!
//! One driver (`driver.rs`) asks the same of several servers in turn, round by round, on the same machine
//! and the same kind of files: our own release build; `null`, which completes and does nothing; `copy`,
//! which makes the same copy and nothing else (both by our own front end, `null.rs`); `qemu-storage-daemon`
//! where it is installed; Cloud Hypervisor's `vhost_user_block` where it is on PATH. Three stages:
//!
//! 1. cache and disks on tmpfs, the cache opened as `assume-dax`: what the code costs;
//! 2. the cache on tmpfs, disks on a real file system: what a FLUSH costs;
//! 3. the cache on tmpfs, disks on a FUSE export that takes 0.5 ms and 250 MB/s: what a cache is for. Needs
//!    root and `/dev/fuse`; skipped aloud without.
//!
//! Figures of a round are compared with those of the same round; the table has medians and extremes, and
//! below it stand the bars with what became of each. Processor time is that of the server's threads.
//!
//! ```sh
//! cargo bench --bench daemon      # some five minutes; a table, and target/bench/daemon.svg
//! ```
//!
//! `DAEMON_BENCH_GIB` sets the cache's size (default 2; memory needed: six times that), or
//! `DAEMON_BENCH_MIB`; `DAEMON_BENCH_ROUNDS` the rounds (default 5); `DAEMON_BENCH_ONLY=depth 1` takes
//! workloads with that in their names only; `PCACHE_TEST_DIR` says where real disks lie.

#[path = "../../tests/client/mod.rs"]
mod client;

mod bars;
mod chart;
mod driver;
mod null;
mod servers;
mod table;
mod work;

use std::path::Path;
use std::time::Duration;

use client::Workspace;
use driver::{Guest, Run};
use servers::Server;
use table::{Sample, Table};
use work::{Access, Layout, Steps, Work};

/// Data buffers that rotate, in bytes: more than caches hold.
const DATA_LEN: u64 = 256 << 20;
/// The cache before a slow disk, which lies in memory twice.
const SLOW_CACHE: u64 = 64 << 20;

/// What the environment asks for.
struct Plan {
    cache: u64,
    rounds: usize,
    only: String,
}

impl Plan {
    fn from_env() -> Self {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let gib = number("DAEMON_BENCH_GIB").unwrap_or(2) << 30;
        Self {
            cache: number("DAEMON_BENCH_MIB").map_or(gib, |mib| mib << 20),
            rounds: number("DAEMON_BENCH_ROUNDS").unwrap_or(5).max(1) as usize,
            only: std::env::var("DAEMON_BENCH_ONLY").unwrap_or_default(),
        }
    }

    fn takes(&self, work: &Work) -> bool {
        work.name.contains(&self.only)
    }
}

/// Runs every workload on every server, and returns what came out.
fn measure(servers: &mut [Server], guest: &Guest, works: &[Work], layout: Layout, plan: &Plan) -> Table {
    let (mut table, mut steps) = (Table::default(), Steps::new(layout));
    for work in works.iter().filter(|work| plan.takes(work)) {
        eprintln!("  {}", work.name);
        for server in &mut *servers {
            if matches!(work.access, Access::Hit) {
                server.fill(guest, 0..layout.hot);
            }
            // Connects, and touches what was not touched before.
            let warm = Work { requests: work.requests / 10 + 1, ..*work };
            let warm = steps.round(&warm);
            server.run(guest, work, &warm);
        }
        for _ in 0..plan.rounds {
            let round = steps.round(work);
            for server in &mut *servers {
                let (run, cpu) = server.run(guest, work, &round);
                table.add(work.name, server.name, Sample::new(&run, cpu));
            }
        }
    }
    table
}

/// Writes all over the disk, three times the cache, without a pause.
fn overfill(servers: &mut [Server], guest: &Guest, layout: Layout) -> Vec<(&'static str, Run)> {
    let requests = (layout.wide * 3 / 2) as usize;
    let work =
        Work { name: "cache full", access: Access::Write, depth: 32, queues: 1, requests, notified: false };
    let round = Steps::new(layout).round(&work);
    servers.iter_mut().map(|server| (server.name, server.run(guest, &work, &round).0)).collect()
}

fn in_memory(plan: &Plan) -> (Table, Vec<(&'static str, Run)>) {
    let layout = Layout::of(plan.cache);
    let workspace = Workspace::in_memory();
    let guest = Guest::new(8, DATA_LEN);
    let mut servers = servers::in_memory(&workspace, plan.cache, layout);
    for server in &mut servers {
        // The first fill: from here on ours reclaims.
        server.fill(&guest, 0..layout.wide);
    }
    let mut table = measure(&mut servers, &guest, work::IN_MEMORY, layout, plan);
    let full = if plan.only.is_empty() { overfill(&mut servers, &guest, layout) } else { Vec::new() };
    for (name, run) in &full {
        table.add("write 4 KiB, cache full, depth 32", name, Sample::new(run, Duration::ZERO));
    }
    table.print("Cache and disks on tmpfs");
    (table, full)
}

fn on_disk(plan: &Plan) -> Table {
    let layout = Layout::of(SLOW_CACHE);
    let (memory, disks) = (Workspace::in_memory(), Workspace::new());
    let guest = Guest::new(4, DATA_LEN);
    let mut servers = servers::on_disk(&memory, &disks, SLOW_CACHE, layout);
    let table = measure(&mut servers, &guest, work::ON_DISK, layout, plan);
    table.print("Cache on tmpfs, disks on a file system");
    table
}

fn on_slow_disk(plan: &Plan) -> Option<Table> {
    let layout = Layout::of(SLOW_CACHE);
    let memory = Workspace::in_memory();
    let guest = Guest::new(4, DATA_LEN);
    let mut servers = match servers::on_slow_disk(&memory, SLOW_CACHE, layout) {
        Ok(servers) => servers,
        Err(error) => {
            println!("\nSKIPPED: no slow disk on FUSE: {error}");
            return None;
        }
    };
    for server in &mut servers {
        server.fill(&guest, 0..layout.wide);
    }
    let table = measure(&mut servers, &guest, work::ON_SLOW_DISK, layout, plan);
    table.print("Cache on tmpfs, disks of 0.5 ms and 250 MB/s");
    Some(table)
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let Some(at) = args.iter().position(|arg| arg == "--serve-null") {
        let [socket, bytes, memory @ ..] = &args[at + 1..] else {
            panic!("socket, size, and perhaps memory")
        };
        let bytes = bytes.parse().expect("a size");
        null::serve(Path::new(socket), bytes, memory.first().map(Path::new)).expect("serves until killed");
        return;
    }
    if !args.iter().any(|arg| arg == "--bench") {
        // `cargo test --benches` only asks whether it is there: it takes minutes and gigabytes.
        return;
    }
    let plan = Plan::from_env();
    println!("{}", servers::machine());
    let (memory, full) = in_memory(&plan);
    let disk = on_disk(&plan);
    let slow = on_slow_disk(&plan);
    bars::print(&memory, &disk, slow.as_ref());
    let picture = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench/daemon.svg");
    match chart::write(&picture, &memory, &full) {
        Ok(()) => println!("\n{}", picture.display()),
        Err(error) => println!("\nno picture: {error}"),
    }
}
