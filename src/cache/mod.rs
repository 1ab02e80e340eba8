//! The engine: a log-structured, crash-persistent cache over [`Pmem`](crate::pmem::Pmem) and
//! [`Backing`](crate::backing::Backing). `DESIGN.md` beside this file says what it keeps true.
//!
//! ```text
//!  Queue (one per virtqueue) ── write ─► Stream ─► record ─► publish ─► Index
//!        │        └─ read ─► Index ─► Segments (checksums) ─► Pmem
//!        └─ miss, bypass ─► Backing
//!  Volume: index, stripes, epochs, streams         Cache: media, segments, free list, liveness
//!  worker::writeback (one per volume)              worker::housekeeper: seal, sync, reclaim
//! ```

pub mod check;
pub mod counters;
pub mod env;
pub mod format;
pub mod index;
pub mod queue;
pub mod volume;
pub mod worker;

mod adopt;
mod attach;
#[cfg(feature = "sim")]
mod audit;
mod bound;
mod compare;
mod consistency;
mod core;
mod cursor;
mod delete;
mod doubt;
mod enlarge;
mod evicted;
mod failing;
mod flush;
mod geometry;
mod ghost;
mod grown;
mod health;
mod judge;
pub mod latency;
mod ledger;
mod limits;
mod liveness;
mod lost;
mod media;
mod membership;
mod mismatch;
mod pacing;
mod pair;
mod plan;
mod positions;
mod record;
mod recovery;
mod redo;
mod regroup;
mod replay;
mod resize;
mod reunite;
mod reuse;
mod scan;
mod scrub;
mod segments;
mod shares;
mod stream;
mod stripes;
mod switch;
mod syncer;
mod table;
#[cfg(all(test, feature = "sim", any(feature = "weave", miri)))]
pub(crate) mod weave_tests;

pub use adopt::{AdoptOptions, Unwritten};
pub use attach::{AttachError, AttachOptions};
#[cfg(feature = "sim")]
pub use audit::Audit;
pub use check::{CheckReport, Verdict, check, dump};
pub use core::{Cache, OpenError, Space};
pub use counters::Counters;
pub use delete::DeleteError;
pub use enlarge::EnlargeError;
pub use env::{Clock, Env, SystemClock};
pub use failing::OnBackingError;
pub use flush::FlushError;
pub use format::{FormatError, FormatOptions, format};
pub use health::{Health, STALL_MS, VolumeState};
pub use judge::{has_volume, superblock, would_attach};
pub use limits::{BURST_MS_DEFAULT, IoLimits};
pub use mismatch::Mismatch;
pub use positions::{Position, Positions};
pub use recovery::RecoveryReport;
pub use recovery::ahead::ReadAhead;
pub use redo::RedoError;
pub use resize::{ResizeError, ResizeProgress};
pub use reunite::{Member, Recovered, recover_backing, recover_group};
pub use scrub::{ScrubOptions, ScrubStatus};
pub use shares::{GC_PERCENT_MAX, ShareError, Shares, WEIGHT_DEFAULT, WEIGHT_MAX};
pub use switch::SwitchError;
pub use volume::{Admission, Mode, Order, ReadPolicy, Volume, VolumeDisk};
