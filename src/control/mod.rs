//! The control plane: options and file to [`config::Config`], and the life of the process around
//! the engine. It sees every module, and none sees it.

pub mod announce;
pub mod cli;
pub mod config;
pub mod file;
pub mod log;
pub mod signals;
pub mod socket;
mod suggest;
mod sys;
pub mod value;
