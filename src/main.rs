//! `pcache-vhost`: parse, configure, run, exit.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use pcache_vhost::control::cli::{CAPABILITIES, Cli, asks_for_capabilities};
use pcache_vhost::control::exit::Exit;
use pcache_vhost::control::{announce, log, run};

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if asks_for_capabilities(&arguments) {
        announce::print(CAPABILITIES);
        return Exit::Done.into();
    }
    let cli = Cli::parse_from(arguments);
    log::start(cli.log_level());
    run::run(&cli).into()
}
