//! The command line: what can be said, and the help that explains it.
//!
//! Values are parsed by `value`, so they mean the same here and in the configuration file; what
//! they mean together is decided by `config`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

use super::config::{Admission, BackingFormat, ControlConfig, Discard, Mode, OnBackingError, Order, Sandbox};
use super::online::args::*;
use super::share::ShareArgs;
use super::threads::{self, Cpus, Poll, ThreadArgs};
use super::value::{self, Name, Serial, SocketPath, ValueError};

const EXIT_STATUS: &str = "\
Exit status:
  0  done; for `check`: the cache is whole
  1  it could not be done; a sentence on standard error says why and what to do
  2  the command line or the configuration file is wrong; nothing was touched
  3  `check` only: the cache is damaged
  4  `check` only: this is not a cache of ours
  5  stopped without the answer of a disk that hangs; nothing is lost, and the next start waits
     until what was under way has ended
  6  no daemon answers at the control socket

Signals:
  SIGTERM, SIGINT  stop cleanly; dirty data stays in the cache, a second one stops at once
  SIGUSR1          log a line with the state and one with the counters of each volume
  SIGHUP           read the configuration file again; without one, stop";

/// A vhost-user-blk server whose disks live in a write-back and read cache in persistent memory.
///
/// `pcache-vhost --socket /run/pcache.sock` alone serves a 10 GiB disk through a 1 GiB cache, both
/// made in the state directory. For real use name the cache and the disk, or write a configuration
/// file with one [[volume]] per disk.
#[derive(Parser, Debug)]
#[command(name = "pcache-vhost", version, args_conflicts_with_subcommands = true)]
#[command(max_term_width = 100, after_help = EXIT_STATUS)]
pub struct Cli {
    /// What to do instead of serving.
    #[command(subcommand)]
    pub verb: Option<Verb>,
    /// How to serve.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// What to do with a cache that nobody serves, or with the daemon that serves it.
#[derive(Subcommand, Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one of them")]
pub enum Verb {
    /// Make an empty cache. The file is created if there is none
    Format(FormatArgs),
    /// Verify a whole cache. Never writes; the exit status says clean, damaged, or not ours
    Check(CheckArgs),
    /// Print what the cache's metadata says. Never writes
    Dump(DumpArgs),
    /// Bring all dirty data to the backing disks and leave the cache clean
    Drain(DrainArgs),
    /// Without its cache: bring a disk that was served in grouped order to the last group's end
    RecoverBacking(RecoverArgs),
    /// Decide what counts where a cache and a backing disk do not go together
    Resolve(ResolveArgs),
    /// Say whether a configuration file can be served, and what it describes. Touches nothing
    CheckConfig(CheckConfigArgs),
    /// Show how the daemon, its caches and its volumes are
    Status(StatusArgs),
    /// List the volumes of the daemon's caches, one per line
    List(OnlineArgs),
    /// Serve one more volume
    Attach(AttachArgs),
    /// Stop serving a volume
    Detach(DetachArgs),
    /// Bring everything that a volume has acknowledged so far to its backing disk
    Flush(VolumeVerbArgs),
    /// Change how a volume is cached and written back, while it is used
    Set(SetArgs),
    /// Make a volume larger, or a cache larger or smaller, while it is used
    Resize(ResizeArgs),
    /// Bring everything acknowledged so far to the disk and keep that still, for a snapshot of it
    Checkpoint(CheckpointArgs),
    /// Show counters and rates
    Stats(StatsArgs),
    /// Watch all volumes: requests, hits, dirty data, once a second
    Top(TopArgs),
    /// Say in words why a volume is slow, or not cached
    Explain(VolumeVerbArgs),
    /// Let the daemon read its configuration file again, and say what changed
    Reload(OnlineArgs),
    /// Print man pages or shell completions, for packaging
    #[command(hide = true)]
    Generate(GenerateArgs),
}

/// Options of serving.
#[derive(Args, Debug)]
pub struct ServeArgs {
    /// Serve what this TOML file describes: [[cache]] and [[volume]] tables
    #[arg(long, value_name = "FILE", conflicts_with_all = ["CacheArgs", "VolumeArgs", "ShareArgs"])]
    pub config: Option<PathBuf>,
    /// Where it is told what to do.
    #[command(flatten)]
    pub control: ControlArgs,
    /// The cache.
    #[command(flatten)]
    pub cache: CacheArgs,
    /// The volume in it.
    #[command(flatten)]
    pub volume: VolumeArgs,
    /// What it may hold of the cache, and ask for.
    #[command(flatten)]
    pub share: ShareArgs,
    /// Attach although the backing disk does not go with the cache: all that is cached counts
    #[arg(long, value_name = "VOLUME", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub force_identity: Vec<String>,
    /// Open a damaged volume for writing: what the cache lost stays lost
    #[arg(long, value_name = "VOLUME", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub accept_loss: Vec<String>,
    /// Take over from the daemon that answers at the control socket: VMs keep their connections
    #[arg(long)]
    pub take_over: bool,
    /// How long to wait for disks that another host or process still serves, as in a migration
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(..=86_400))]
    #[arg(default_value_t = 10)]
    pub wait_for_disks: u32,
    /// What the process gives up before it serves: files and system calls [default: auto]
    #[arg(long, value_name = "HOW", value_enum)]
    pub sandbox: Option<Sandbox>,
    /// Least important events to log: one line each, on standard error
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t = LogLevel::Info)]
    pub log_level: LogLevel,
    /// Print what this back end can do, as JSON, and exit; all else is ignored
    #[arg(long)]
    pub print_capabilities: bool,
}

/// The control socket of a daemon.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Control")]
pub struct ControlArgs {
    /// Answer the control API, and with it the verbs below, on this socket
    #[arg(long, value_name = "PATH", value_parser = socket_parser())]
    pub control: Option<SocketPath>,
    /// Group whose members may use the control API, by name or number
    #[arg(long, value_name = "GROUP", requires = "control")]
    pub control_group: Option<String>,
    /// Also answer /metrics at this loopback address
    #[arg(long, value_name = "ADDRESS", value_parser = value::loopback, requires = "control")]
    pub metrics: Option<std::net::SocketAddr>,
}

impl ControlArgs {
    /// What they ask for.
    pub fn config(&self) -> Option<ControlConfig> {
        let socket = self.control.clone()?;
        let (group, metrics) = (self.control_group.clone(), self.metrics);
        Some(ControlConfig { group, metrics, ..ControlConfig::new(socket) })
    }
}

/// Which cache, when there is no configuration file.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Cache")]
pub struct CacheArgs {
    /// Cache: devdax device, file on a DAX file system, or any file or block device; once for each of
    /// several that are one cache, in order [default: cache.img in the state directory]
    #[arg(long, value_name = "PATH", value_parser = path_parser())]
    pub cache: Vec<PathBuf>,
    /// Create the cache with this size if it does not exist
    #[arg(long, value_name = "SIZE", value_parser = value::cache_size)]
    pub cache_size: Option<u64>,
    /// Segment size of a cache created now [default: by the cache's size]
    #[arg(long, value_name = "SIZE", value_parser = value::segment_size)]
    pub segment_size: Option<u32>,
    /// Treat a cache in RAM as if it were persistent: for tests and benchmarks only
    #[arg(long)]
    pub assume_dax: bool,
    /// Allow write-back with a cache that does not survive the host
    #[arg(long)]
    pub allow_volatile: bool,
    /// How fast the cache is scrubbed for damage, in MiB a second; 0 for not at all [default: 32]
    #[arg(long, value_name = "MIB", value_parser = value::scrub_mib_s)]
    pub scrub_mib_s: Option<u32>,
    /// Hours from one scrub to the next [default: 24]
    #[arg(long, value_name = "HOURS", value_parser = value::scrub_interval_h)]
    pub scrub_interval_h: Option<u32>,
    /// Most RAM for the index: above it the cache holds less; 0 for no bound [default: 0]
    #[arg(long, value_name = "SIZE", value_parser = value::index_memory_max)]
    pub index_memory_max: Option<u64>,
    /// Where the default cache and disk are [default: /var/lib/pcache-vhost for root, else
    /// $XDG_STATE_HOME/pcache-vhost]
    #[arg(long, value_name = "DIR", value_parser = path_parser())]
    pub state_dir: Option<PathBuf>,
}

/// Which volume, when there is no configuration file.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Volume")]
pub struct VolumeArgs {
    /// Socket that the VMM connects to
    #[arg(long, visible_alias = "socket-path", value_name = "PATH", value_parser = socket_parser())]
    #[arg(conflicts_with = "fd")]
    pub socket: Option<SocketPath>,
    /// Use this inherited descriptor, a listening or connected Unix socket, instead of a path
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    pub fd: Option<i32>,
    /// Permission bits of the socket [default: 0600, with --socket-group 0660]
    #[arg(long, value_name = "MODE", value_parser = value::file_mode, conflicts_with = "fd")]
    pub socket_mode: Option<u32>,
    /// Group of the socket, by name or number
    #[arg(long, value_name = "GROUP", conflicts_with = "fd")]
    pub socket_group: Option<String>,
    /// Name of the volume in the cache [default: disk0]
    #[arg(long, value_name = "NAME")]
    pub name: Option<Name>,
    /// Backing disk: a raw image file or a block device
    /// [default: disk.img in the state directory]
    #[arg(long, visible_alias = "blk-file", value_name = "PATH", value_parser = path_parser())]
    pub backing: Option<PathBuf>,
    /// Take the backing disk as raw, even if it looks like another image format
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub backing_format: Option<BackingFormat>,
    /// Create the backing disk as a sparse image of this size if it does not exist
    #[arg(long, value_name = "SIZE", value_parser = value::disk_size)]
    pub backing_size: Option<u64>,
    /// Most queues a VM may use [default: 256]
    #[arg(long, value_name = "N", value_parser = value::queues)]
    pub queues: Option<u16>,
    /// Largest ring a VM may use [default: 256]
    #[arg(long, value_name = "N", value_parser = value::queue_size)]
    pub queue_size: Option<u16>,
    /// What is cached and when a write is done [default: writeback]
    #[arg(long, value_name = "MODE", value_enum)]
    pub cache_mode: Option<Mode>,
    /// Order in which write-back reaches the backing disk [default: strict]
    #[arg(long, value_name = "ORDER", value_enum)]
    pub order: Option<Order>,
    /// Consistency group: with the cache lost, the backing disks of all its volumes stand at one common
    /// point. Its volumes are on one cache and in one order, strict or grouped
    #[arg(long, value_name = "NAME")]
    pub group: Option<Name>,
    /// Redo area of a volume in grouped order: a file, made if it does not exist, or a block device of
    /// its own [default: the backing image's path with .redo appended]
    #[arg(long, value_name = "PATH", value_parser = path_parser())]
    pub redo: Option<PathBuf>,
    /// Size to make the redo area with [default: a sixteenth of the disk, 16 MiB to 256 MiB]
    #[arg(long, value_name = "SIZE", value_parser = value::disk_size)]
    pub redo_size: Option<u64>,
    /// Most seconds by which the backing disk may be behind the guest. Write-back waits that long for
    /// more, and the guest is slowed before it would take longer [default: no bound, write-back after 2 s]
    #[arg(long, value_name = "SECONDS", value_parser = value::max_lag_s)]
    pub max_lag_s: Option<u32>,
    /// Most dirty bytes in the cache; the guest is slowed before there are more [default: by space]
    #[arg(long, value_name = "SIZE", value_parser = value::disk_size)]
    pub max_dirty: Option<u64>,
    /// Verify the checksum of every read hit
    #[arg(long)]
    pub data_crc: bool,
    /// Logical block size the VM sees, 512 or 4096 [default: the backing disk's]
    #[arg(long, value_name = "SIZE", value_parser = value::block_size)]
    pub block_size: Option<u32>,
    /// Refuse writes
    #[arg(long)]
    pub read_only: bool,
    /// What the VM reads as the disk's serial, up to 20 characters [default: the volume's name]
    #[arg(long, value_name = "TEXT")]
    pub serial: Option<Serial>,
    /// Whether a discard also frees space on the backing disk [default: pass]
    #[arg(long, value_name = "POLICY", value_enum)]
    pub discard: Option<Discard>,
    /// Keep a file beside the backing disk, DISK.pcache, that tells a restored, exchanged or otherwise
    /// used disk or cache; =false removes it [default: as it is]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub sidecar: Option<bool>,
    /// What becomes of requests that need the backing disk while it fails [default: wait]
    #[arg(long, value_name = "POLICY", value_enum)]
    pub on_backing_error: Option<OnBackingError>,
    /// Seconds after which a backing disk that does not answer has failed, for `error` and
    /// `read_only`; 0 for never [default: 30]
    #[arg(long, value_name = "SECONDS", value_parser = value::timeout_s)]
    pub backing_timeout_s: Option<u32>,
    /// Which reads become cached [default: adaptive]
    #[arg(long, value_name = "POLICY", value_enum)]
    pub admission: Option<Admission>,
    /// How much is read in one go before what follows is not cached any more, 0 for no limit
    /// [default: 4MiB]
    #[arg(long, value_name = "SIZE", value_parser = value::sequential_cutoff)]
    pub sequential_cutoff: Option<u64>,
    /// How an idle queue waits for work [default: adaptive]
    #[arg(long, value_name = "HOW", value_enum)]
    pub poll: Option<Poll>,
    /// How long it looks for work at most before it sleeps, in microseconds [default: 32]
    #[arg(long, value_name = "MICROSECONDS", value_parser = value::poll_us)]
    pub poll_us: Option<u32>,
    /// Most of a processor that one queue spends looking for work, in percent [default: 100]
    #[arg(long, value_name = "PERCENT", value_parser = threads::percent)]
    pub poll_cpu_percent: Option<u8>,
    /// Threads that share the volume's queues, 0 for one thread for each queue [default: 0]
    #[arg(long, value_name = "N", value_parser = threads::threads)]
    pub queue_threads: Option<u16>,
    /// Share these threads with all volumes that name the same group
    #[arg(long, value_name = "NAME")]
    pub thread_group: Option<Name>,
    /// Processors that the threads stay on, by turns, like 0-3,8 [default: any]
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<Cpus>,
}

impl VolumeArgs {
    /// The threads of its queues.
    pub fn threads(&self) -> ThreadArgs {
        ThreadArgs {
            poll: self.poll,
            poll_us: self.poll_us,
            poll_cpu_percent: self.poll_cpu_percent,
            queue_threads: self.queue_threads,
            thread_group: self.thread_group.clone(),
            cpus: self.cpus.clone(),
        }
    }
}

/// Options of `format`.
#[derive(Args, Debug)]
pub struct FormatArgs {
    /// Cache to format, once for each of several devices that are to be one [default: cache.img in the
    /// state directory]
    #[arg(long, value_name = "PATH", value_parser = path_parser())]
    pub cache: Vec<PathBuf>,
    /// Size of the file to create; an existing one keeps its size
    #[arg(long, value_name = "SIZE", value_parser = value::cache_size)]
    pub cache_size: Option<u64>,
    /// Segment size [default: by the cache's size]
    #[arg(long, value_name = "SIZE", value_parser = value::segment_size)]
    pub segment_size: Option<u32>,
    /// Treat a cache in RAM as if it were persistent: for tests and benchmarks only
    #[arg(long)]
    pub assume_dax: bool,
    /// Overwrite what is there, be it a cache with dirty data or somebody else's file system
    #[arg(long)]
    pub force: bool,
    /// Where the default cache is
    #[arg(long, value_name = "DIR", value_parser = path_parser())]
    pub state_dir: Option<PathBuf>,
    /// Least important events to log
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t = LogLevel::Info)]
    pub log_level: LogLevel,
}

/// Options of `check`.
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// Cache to read [default: cache.img in the state directory]
    #[arg(long, value_name = "PATH", value_parser = path_parser())]
    pub cache: Vec<PathBuf>,
    /// Where the default cache is
    #[arg(long, value_name = "DIR", value_parser = path_parser())]
    pub state_dir: Option<PathBuf>,
    /// Least important events to log
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t = LogLevel::Info)]
    pub log_level: LogLevel,
}

/// Options of `dump`.
#[derive(Args, Debug)]
pub struct DumpArgs {
    /// Cache to read [default: cache.img in the state directory]
    #[arg(long, value_name = "PATH", value_parser = path_parser())]
    pub cache: Vec<PathBuf>,
    /// Also print every key of every segment
    #[arg(long)]
    pub keys: bool,
    /// Where the default cache is
    #[arg(long, value_name = "DIR", value_parser = path_parser())]
    pub state_dir: Option<PathBuf>,
    /// Least important events to log
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t = LogLevel::Info)]
    pub log_level: LogLevel,
}

/// Options of `drain`.
#[derive(Args, Debug)]
pub struct DrainArgs {
    /// Drain the caches of this configuration file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["cache", "backing", "state_dir"])]
    pub config: Option<PathBuf>,
    /// Cache to drain [default: cache.img in the state directory]
    #[arg(long, value_name = "PATH", value_parser = path_parser())]
    pub cache: Vec<PathBuf>,
    /// Drain this volume only
    #[arg(long, value_name = "NAME")]
    pub name: Option<Name>,
    /// Control socket of the daemon that may hold the cache [default: as for `status`]
    #[arg(long, value_name = "PATH", value_parser = socket_parser())]
    pub control: Option<SocketPath>,
    /// Backing disk of the volume [default: where it was when last served]
    #[arg(long, visible_alias = "blk-file", value_name = "PATH", value_parser = path_parser())]
    pub backing: Option<PathBuf>,
    /// Take the backing disk as raw, even if it looks like another image format
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub backing_format: Option<BackingFormat>,
    /// Redo area of the volume [default: where it was when last served]
    #[arg(long, value_name = "PATH", value_parser = path_parser())]
    pub redo: Option<PathBuf>,
    /// Treat a cache in RAM as if it were persistent: for tests and benchmarks only
    #[arg(long)]
    pub assume_dax: bool,
    /// Drain although the backing disk does not go with the cache: all that is cached counts
    #[arg(long)]
    pub force_identity: bool,
    /// Drain a damaged volume: what the cache lost stays lost
    #[arg(long)]
    pub accept_loss: bool,
    /// Where the default cache is
    #[arg(long, value_name = "DIR", value_parser = path_parser())]
    pub state_dir: Option<PathBuf>,
    /// Least important events to log
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t = LogLevel::Info)]
    pub log_level: LogLevel,
}

/// Options of `recover-backing`.
#[derive(Args, Debug)]
pub struct RecoverArgs {
    /// Backing disk: a raw image file or a block device; of a consistency group, each of its disks
    #[arg(long, visible_alias = "blk-file", value_name = "PATH", value_parser = path_parser(), required = true)]
    pub backing: Vec<PathBuf>,
    /// Its redo area [default: the backing image's path with .redo appended]; of several disks, one for
    /// each, in their order
    #[arg(long, value_name = "PATH", value_parser = path_parser())]
    pub redo: Vec<PathBuf>,
    /// Apply what is there for these disks although others of their consistency group are missing: they
    /// then do not stand at one point
    #[arg(long)]
    pub alone: bool,
    /// Apply the group although somebody else seems to have written to the disk since
    #[arg(long)]
    pub force: bool,
    /// Least important events to log
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t = LogLevel::Info)]
    pub log_level: LogLevel,
}

/// Options of `resolve`.
///
/// Without `--keep` it only says how the two stand to each other, and what is in the cache alone.
#[derive(Args, Debug)]
pub struct ResolveArgs {
    /// Cache [default: cache.img in the state directory]
    #[arg(long, value_name = "PATH", value_parser = path_parser())]
    pub cache: Vec<PathBuf>,
    /// The volume, if there are several
    #[arg(long, value_name = "NAME")]
    pub name: Option<Name>,
    /// Backing disk of the volume [default: where it was when last served]
    #[arg(long, visible_alias = "blk-file", value_name = "PATH", value_parser = path_parser())]
    pub backing: Option<PathBuf>,
    /// What of the cache is to count beside the disk
    #[arg(long, value_name = "WHAT", value_enum)]
    pub keep: Option<KeepArg>,
    /// Let the volume grow to the size of its disk
    #[arg(long, requires = "keep")]
    pub grow: bool,
    /// With --keep=none: lose what is on no disk
    #[arg(long, requires = "keep")]
    pub accept_loss: bool,
    /// With --keep=none: write down what is lost in this new file, before it is
    #[arg(long, value_name = "FILE", requires = "keep", value_parser = path_parser())]
    pub statement: Option<PathBuf>,
    /// Treat a cache in RAM as if it were persistent: for tests and benchmarks only
    #[arg(long)]
    pub assume_dax: bool,
    /// Where the default cache is
    #[arg(long, value_name = "DIR", value_parser = path_parser())]
    pub state_dir: Option<PathBuf>,
    /// Least important events to log
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t = LogLevel::Info)]
    pub log_level: LogLevel,
}

/// What of a cache is to count.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeepArg {
    /// All of it: the disk has the volume's content, it was moved, copied or touched
    All,
    /// What is not on the disk yet, which will be written to it; what is clean is dropped
    Dirty,
    /// Nothing: the disk alone counts, and what was not written to it is lost
    None,
}

/// Importance of an event.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogLevel {
    /// Something was lost or refused.
    Error,
    /// Something will be, unless somebody acts.
    Warn,
    /// What happened.
    Info,
    /// Why it happened.
    Debug,
    /// How it happened.
    Trace,
}

impl Cli {
    /// The log level, whatever the verb.
    pub fn log_level(&self) -> LogLevel {
        match &self.verb {
            None => self.serve.log_level,
            Some(Verb::Format(args)) => args.log_level,
            Some(Verb::Check(args)) => args.log_level,
            Some(Verb::Dump(args)) => args.log_level,
            Some(Verb::Drain(args)) => args.log_level,
            Some(Verb::RecoverBacking(args)) => args.log_level,
            Some(Verb::Resolve(args)) => args.log_level,
            // What these say is their answer.
            Some(_) => LogLevel::Warn,
        }
    }
}

/// Whether the arguments ask for the capabilities: then every other one is to be ignored, also one
/// that does not parse (QEMU's vhost-user specification, "Backend program conventions").
pub fn asks_for_capabilities(arguments: &[OsString]) -> bool {
    arguments.iter().skip(1).any(|argument| argument == "--print-capabilities")
}

/// What [`asks_for_capabilities`] is answered: the keys of QEMU's `vhost-user.json` schema.
pub const CAPABILITIES: &str = r#"{
  "type": "block",
  "features": [
    "read-only",
    "blk-file"
  ]
}
"#;

pub(super) fn path_parser() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().try_map(|text| match text.is_empty() {
        true => Err(ValueError::EmptyPath),
        false => Ok(PathBuf::from(text)),
    })
}

pub(super) fn socket_parser() -> impl TypedValueParser<Value = SocketPath> {
    OsStringValueParser::new().try_map(|text| SocketPath::new(&text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn capabilities_are_asked_for_by_one_word_among_any() {
        let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        assert!(asks_for_capabilities(&words("pcache-vhost --nonsense --print-capabilities --fd=9")));
        assert!(!asks_for_capabilities(&words("pcache-vhost --socket s")));
        assert!(!asks_for_capabilities(&words("--print-capabilities --socket s")));
    }
}
