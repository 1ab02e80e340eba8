//! The control plane: options and file to [`config::Config`], and the life of the process around
//! the engine. It sees every module, and none sees it.

pub mod cli;
pub mod config;
pub mod file;
mod suggest;
pub mod value;
