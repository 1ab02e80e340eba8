//! What of the configuration is about the process itself: how far it is confined (`control::sandbox`).

use std::path::PathBuf;

use clap::ValueEnum;

use super::Config;

/// What the process gives up before it serves.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Sandbox {
    /// What it does not need, as far as the kernel can; disks may be attached from wherever data is
    #[default]
    Auto,
    /// The same, or it does not start; and files only where the configuration says
    Strict,
    /// Nothing
    Off,
}

/// How far the process is confined.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Confinement {
    /// What it gives up.
    pub sandbox: Sandbox,
    /// Directories that it may use beside those of what it serves.
    pub paths: Vec<PathBuf>,
}

impl Config {
    /// How far the process is to be confined.
    pub fn confinement(&self) -> &Confinement {
        &self.confinement
    }

    /// Says how far, where the command line or the file do; more directories are added.
    pub fn confine(&mut self, sandbox: Option<Sandbox>, paths: Vec<PathBuf>) {
        self.confinement.sandbox = sandbox.unwrap_or(self.confinement.sandbox);
        self.confinement.paths.extend(paths);
    }
}
