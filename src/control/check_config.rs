//! `check-config`: whether a configuration file can be served, and what it describes. It reads the
//! file and nothing else: whether disks and caches are there is found at the start.

use std::fmt::Write;

use super::announce::{print, word};
use super::config::{Consents, Endpoint};
use super::exit::Exit;
use super::file;
use super::online::args::CheckConfigArgs;
use super::run::RunError;

/// `check-config`.
pub(super) fn check_config(args: &CheckConfigArgs) -> Result<Exit, RunError> {
    let config = file::load(&args.config, &Consents::default())?;
    let mut text = String::new();
    let mut line = |line: String| writeln!(text, "{line}").expect("a String takes any text");
    if let Some(control) = config.control() {
        line(format!("control {}", control.socket));
    }
    for cache in config.caches() {
        line(format!("cache   {}: {}", cache.name, cache.path.display()));
    }
    for volume in config.volumes() {
        let (cache, backing) = (&config.caches()[volume.cache].name, volume.backing.path.display());
        let socket = match &volume.endpoint {
            Endpoint::Socket { path, .. } => path.to_string(),
            Endpoint::Inherited(fd) => format!("descriptor {fd}"),
        };
        let (mode, order) = (word(volume.mode), word(volume.order));
        line(format!(
            "volume  {}: {backing} through {cache} at {socket}, {mode}, order {order}",
            volume.name
        ));
    }
    line(format!("{}: can be served", args.config.display()));
    print(&text);
    Ok(Exit::Done)
}
