//! The control plane: options and file to [`config::Config`], and the life of the process around
//! the engine. It sees every module, and none sees it.
//!
//! ```text
//!  cli, file ─► config ─► serve ─► daemon (what runs) ◄─ api (HTTP on a Unix socket) ◄─ online (verbs)
//!  verbs (a cache that nobody serves)                     └─ metrics
//! ```

pub mod activation;
pub mod announce;
pub mod api;
mod calls;
mod check_config;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod exit;
pub mod file;
mod generate;
pub mod log;
mod metrics;
pub mod notify;
pub mod online;
mod progress;
pub mod run;
pub mod sandbox;
pub mod serve;
pub mod signals;
pub mod socket;
mod suggest;
mod sys;
pub mod value;
mod verbs;
