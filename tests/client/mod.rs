//! A vhost-user-blk front end for tests: what a VMM and its guest's driver are to a server.
//!
//! It shares no code with the server: messages are raw bytes (`wire`), rings are our own in a memfd
//! of ours (`ring`, `memory`), so a misreading of the specification on one side does not cancel
//! itself on the other. It is proven against `qemu-storage-daemon` in `tests/peer.rs`.
//!
//! What it keeps true, and panics about when the server does not:
//! - every wait ends: each has a deadline, and the panic says what was waited for;
//! - a head completes exactly once, also across a killed server, and only when it was outstanding;
//! - the server writes only into buffers it was given: canaries stand on both sides of each piece;
//! - `used.len` is what was written, the status byte included;
//! - what is read was allowed to be read (`model`), sector by sector.
//!
//! `front` composes these into a [`Client`]; `daemon` runs the program under test.

#![allow(dead_code, unused_imports, reason = "each test binary uses its own part of the client")]

pub mod arena;
pub mod attacks;
pub mod daemon;
pub mod front;
pub mod fuse;
pub mod memory;
pub mod model;
pub mod packed;
pub mod request;
pub mod ring;
pub mod rng;
pub mod traffic;
pub mod wire;

pub use daemon::{Daemon, Workspace};
pub use front::{Client, ClientOptions, Notify, RestartBase};
pub use fuse::{Faults, FuseDisk};
pub use memory::{Memory, Region};
pub use model::Model;
pub use request::{Completion, Kind, Layout, Range, Request};
pub use ring::Queue;
pub use rng::Rng;
pub use traffic::{Mix, Traffic};
pub use wire::{Req, Wire, feature, protocol};
