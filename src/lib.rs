//! A vhost-user-blk server whose disks live in a persistent write-back and read cache.
//!
//! ```text
//!  guest ring ─► vhost ─► volume ─► cache ─┬─► pmem      fast side: copy, persist
//!                                    ▲     └─► backing   slow side: io_uring
//!             workers: write-back, reclaim ┘
//!  control (config, CLI, lifecycle), tools (offline verbs) ─► everything;  nothing ─► them
//! ```
//!
//! A module uses only what is right of it on the path; `units`, `sync` and the pure `onmedia` lie
//! under everything. `tests/tidy.rs` enforces it. The laws the engine keeps are in
//! `src/cache/DESIGN.md`, the bytes on the media in `src/onmedia/FORMAT.md`.

pub mod backing;
pub mod cache;
pub mod control;
#[cfg(feature = "sim")]
pub mod fuzz;
pub mod mutant;
pub mod onmedia;
pub mod pmem;
#[cfg(feature = "sim")]
pub mod sim;
mod sync;
pub mod tools;
pub mod units;
pub mod vhost;
pub mod volume;
pub mod wake;
