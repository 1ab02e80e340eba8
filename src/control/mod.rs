//! The control plane: options and file to [`config::Config`], and the life of the process around
//! the engine. It sees every module, and none sees it.

pub mod announce;
pub mod cli;
pub mod config;
pub mod exit;
pub mod file;
pub mod log;
mod progress;
pub mod run;
pub mod serve;
pub mod signals;
pub mod socket;
mod suggest;
mod sys;
pub mod value;
mod verbs;
