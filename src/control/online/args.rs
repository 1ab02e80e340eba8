//! Options of the verbs that speak to a running daemon.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use clap_complete::Shell;

use super::super::cli::{LogLevel, VolumeArgs, path_parser, socket_parser};
use super::super::config::{Mode, OnBackingError, Order};
use super::super::value::{self, Name, SocketPath};

/// What all of these verbs take.
#[derive(Args, Clone, Debug)]
pub struct OnlineArgs {
    /// Control socket of the daemon
    /// [default: /run/pcache-vhost/control.sock for root, else
    /// $XDG_RUNTIME_DIR/pcache-vhost/control.sock]
    #[arg(long, value_name = "PATH", value_parser = socket_parser(), env = "PCACHE_VHOST_CONTROL")]
    pub control: Option<SocketPath>,
    /// Print the daemon's own answer, as JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of verbs on one volume.
#[derive(Args, Debug)]
pub struct VolumeVerbArgs {
    /// The volume
    #[arg(value_name = "VOLUME")]
    pub volume: Name,
    /// The daemon.
    #[command(flatten)]
    pub online: OnlineArgs,
}

/// Options of `status`.
#[derive(Args, Debug)]
pub struct StatusArgs {
    /// This volume only, with all that is known about it
    #[arg(value_name = "VOLUME")]
    pub volume: Option<Name>,
    /// The daemon.
    #[command(flatten)]
    pub online: OnlineArgs,
}

/// Options of `attach`.
#[derive(Args, Debug)]
pub struct AttachArgs {
    /// Cache of the daemon to attach to, by its name; needed when it has several
    #[arg(long, value_name = "NAME")]
    pub cache: Option<Name>,
    /// The volume.
    #[command(flatten)]
    pub volume: VolumeArgs,
    /// Attach although the backing disk is not the one the volume belongs to
    #[arg(long)]
    pub force_identity: bool,
    /// Open a damaged volume for writing: what the cache lost stays lost
    #[arg(long)]
    pub accept_loss: bool,
    /// The daemon.
    #[command(flatten)]
    pub online: OnlineArgs,
}

/// Options of `detach`.
#[derive(Args, Debug)]
pub struct DetachArgs {
    /// The volume
    #[arg(value_name = "VOLUME")]
    pub volume: Name,
    /// What becomes of its dirty data.
    #[command(flatten)]
    pub dirty: DirtyArgs,
    /// Stop serving it although a VM is connected
    #[arg(long)]
    pub force: bool,
    /// The daemon.
    #[command(flatten)]
    pub online: OnlineArgs,
}

/// What becomes of dirty data.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub struct DirtyArgs {
    /// Bring everything to the backing disk first; what is cached stays, and is warm next time
    #[arg(long)]
    pub drain: bool,
    /// Leave dirty data in the cache: the backing disk alone lacks it until the next attach
    #[arg(long)]
    pub keep_dirty: bool,
    /// Delete the volume from the cache and lose what is not on the backing disk yet
    #[arg(long)]
    pub discard_dirty: bool,
}

/// Options of `set`.
#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args([
    "cache_mode", "order", "max_lag_s", "max_dirty", "on_backing_error", "backing_timeout_s",
]))]
pub struct SetArgs {
    /// The volume
    #[arg(value_name = "VOLUME")]
    pub volume: Name,
    /// What is cached and when a write is done; modes other than writeback are entered by a drain
    #[arg(long, value_name = "MODE", value_enum)]
    pub cache_mode: Option<Mode>,
    /// Order in which write-back reaches the backing disk; grouped needs a redo area
    #[arg(long, value_name = "ORDER", value_enum)]
    pub order: Option<Order>,
    /// Most seconds by which the backing disk may be behind the guest; 0 for no bound
    #[arg(long, value_name = "SECONDS", value_parser = value::max_lag_s_or_none)]
    pub max_lag_s: Option<u32>,
    /// Most dirty bytes in the cache; 0 for as many as there is space
    #[arg(long, value_name = "SIZE", value_parser = value::max_dirty_or_none)]
    pub max_dirty: Option<u64>,
    /// What becomes of requests that need the backing disk while it fails
    #[arg(long, value_name = "POLICY", value_enum)]
    pub on_backing_error: Option<OnBackingError>,
    /// Seconds after which a backing disk that does not answer has failed; 0 for never
    #[arg(long, value_name = "SECONDS", value_parser = value::timeout_s)]
    pub backing_timeout_s: Option<u32>,
    /// The daemon.
    #[command(flatten)]
    pub online: OnlineArgs,
}

/// Options of `resize`.
#[derive(Args, Debug)]
pub struct ResizeArgs {
    /// The volume
    #[arg(value_name = "VOLUME")]
    pub volume: Name,
    /// Its new size, like 20GiB; a regular file that is shorter grows to it
    /// [default: the size that its disk has by now]
    #[arg(value_name = "SIZE", value_parser = value::disk_size)]
    pub size: Option<u64>,
    /// The daemon.
    #[command(flatten)]
    pub online: OnlineArgs,
}

/// Options of `checkpoint`.
#[derive(Args, Debug)]
pub struct CheckpointArgs {
    /// The volume
    #[arg(value_name = "VOLUME")]
    pub volume: Name,
    /// Keep the disk still while this command runs (by sh -c, here), and end with its exit status
    #[arg(long, value_name = "COMMAND", conflicts_with_all = ["hold", "release", "json"])]
    pub exec: Option<String>,
    /// Keep the disk still for so long
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    #[arg(conflicts_with = "release")]
    pub hold: Option<u32>,
    /// End the checkpoint that somebody else holds
    #[arg(long)]
    pub release: bool,
    /// The daemon.
    #[command(flatten)]
    pub online: OnlineArgs,
}

/// Options of `stats`.
#[derive(Args, Debug)]
pub struct StatsArgs {
    /// This volume only
    #[arg(value_name = "VOLUME")]
    pub volume: Option<Name>,
    /// Count from zero from now on, in this view; /metrics is not touched
    #[arg(long)]
    pub reset: bool,
    /// The daemon.
    #[command(flatten)]
    pub online: OnlineArgs,
}

/// Options of `top`.
#[derive(Args, Debug)]
pub struct TopArgs {
    /// Between two views, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    pub interval: Duration,
    /// End after so many views [default: until interrupted]
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
    /// The daemon.
    #[command(flatten)]
    pub online: OnlineArgs,
}

/// Options of `check-config`.
#[derive(Args, Debug)]
pub struct CheckConfigArgs {
    /// The configuration file
    #[arg(value_name = "FILE", value_parser = path_parser())]
    pub config: PathBuf,
    /// Least important events to log
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t = LogLevel::Info)]
    pub log_level: LogLevel,
}

/// Options of `generate`.
#[derive(Args, Debug)]
pub struct GenerateArgs {
    /// What.
    #[command(subcommand)]
    pub what: Generated,
}

/// What is made from the very definition of the command line.
#[derive(Subcommand, Debug)]
pub enum Generated {
    /// Man pages, one per verb, into a directory
    Man {
        /// The directory; it must exist
        #[arg(value_name = "DIR", value_parser = path_parser())]
        directory: PathBuf,
    },
    /// A completion script, to standard output
    Completion {
        /// The shell
        #[arg(value_name = "SHELL", value_enum)]
        shell: Shell,
    },
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("not a number of seconds from 0.1 to 3600".into()),
    }
}
