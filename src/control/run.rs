//! From a parsed command line to an exit status: which verb, on what, and what went wrong.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::activation::ActivationError;
use super::cli::{Cli, ServeArgs, Verb};
use super::config::{self, CacheConfig, Config, ConfigError, Consents, VolumeConfig};
use super::exit::{Exit, complain};
use super::file::{self, FileError};
use super::handover::HandoverError;
use super::online::OnlineError;
use super::sandbox::SandboxError;
use super::serve::{Start, serve};
use super::socket::SocketError;
use super::value::Name;
use super::{check_config, generate, online, sys, verbs};
use crate::backing;
use crate::cache::{AttachError, OpenError};
use crate::tools::drain::DrainFailure;
use crate::tools::image::ImageError;
use crate::tools::recover::RecoverError;
use crate::tools::resolve::ResolveError;

/// Why it was not done. Each is one sentence for the operator.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The command line contradicts itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The configuration file is wrong.
    #[error(transparent)]
    File(#[from] FileError),
    /// The socket cannot be had.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// What the service manager passed cannot be used.
    #[error(transparent)]
    Activation(#[from] ActivationError),
    /// The process is to be confined, and is not.
    #[error("sandbox: {0}; `--sandbox auto` serves without")]
    Sandbox(#[from] SandboxError),
    /// The cache's image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A backing disk cannot be used.
    #[error("backing disk {0}")]
    Disk(backing::OpenError),
    /// What is in the image cannot be used.
    #[error("cache {}: {source}", .path.display())]
    Cache {
        /// The image.
        path: PathBuf,
        /// Why.
        source: Box<OpenError>,
    },
    /// Cache and disk do not go together.
    #[error("volume `{volume}` on cache {}: {source}", .cache.display())]
    Attach {
        /// The cache.
        cache: PathBuf,
        /// The volume.
        volume: Name,
        /// Why.
        source: Box<AttachError>,
    },
    /// A volume is still dirty.
    #[error("cache {}: {source}", .cache.display())]
    Drain {
        /// The cache.
        cache: PathBuf,
        /// Why.
        source: Box<DrainFailure>,
    },
    /// A disk without its cache stays as it is.
    #[error(transparent)]
    Recover(#[from] RecoverError),
    /// A volume and its disk are no pair.
    #[error("cache {}: {source}", .cache.display())]
    Resolve {
        /// The cache.
        cache: PathBuf,
        /// Why.
        source: Box<ResolveError>,
    },
    /// A decision for several volumes at once.
    #[error("the cache has {0}: say for which of them with --name")]
    ResolveWhich(String),
    /// A consent for several volumes at once.
    #[error("--{0} is given for one volume at a time: say which with --name")]
    WhichVolume(&'static str),
    /// A disk for several volumes at once.
    #[error("--backing is one volume's disk, and the cache has {0}: say which with --name")]
    WhoseBacking(String),
    /// The state directory cannot be made.
    #[error("directory {} cannot be made: {source}", .path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The daemon did not do it.
    #[error(transparent)]
    Online(#[from] OnlineError),
    /// The running daemon goes on.
    #[error("not taken over: {0}")]
    Handover(#[from] HandoverError),
    /// Somebody wants something of a daemon at its end.
    #[error("the daemon is stopping")]
    Stopping,
    /// The kernel refused something ordinary.
    #[error("{doing}: {source}")]
    Os {
        /// What was tried.
        doing: &'static str,
        /// Why not.
        source: io::Error,
    },
}

impl RunError {
    /// Wraps what the kernel said while `doing` something.
    pub fn os(doing: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Os { doing, source }
    }

    /// Wraps why `volume` cannot be attached to `cache`.
    pub fn attach(cache: &CacheConfig, volume: &VolumeConfig) -> impl Fn(AttachError) -> Self {
        let (path, volume) = (cache.path.first().to_owned(), volume.name.clone());
        move |source| match source {
            // The cache itself, whatever the volume.
            AttachError::Cache(source) => Self::Cache { path: path.clone(), source: Box::new(source) },
            source => Self::Attach { cache: path.clone(), volume: volume.clone(), source: Box::new(source) },
        }
    }

    /// How the program ends with it.
    pub fn exit(&self) -> Exit {
        match self {
            RunError::Config(_)
            | RunError::File(_)
            | RunError::WhichVolume(_)
            | RunError::ResolveWhich(_)
            | RunError::WhoseBacking(_) => Exit::Usage,
            RunError::Online(error) => error.exit(),
            _ => Exit::Failed,
        }
    }
}

/// Does what the command line says.
pub fn run(cli: &Cli) -> Exit {
    let result = match &cli.verb {
        None => {
            let args = &cli.serve;
            let wait_for_disks = Duration::from_secs(args.wait_for_disks.into());
            let start = Start { take_over: args.take_over, wait_for_disks };
            serve_config(args).and_then(|config| serve(&config, args.config.as_deref(), &start))
        }
        Some(Verb::Format(args)) => verbs::format(args),
        Some(Verb::Check(args)) => verbs::check(args),
        Some(Verb::Dump(args)) => verbs::dump(args),
        Some(Verb::Drain(args)) => online::drain(args).unwrap_or_else(|| verbs::drain(args)),
        Some(Verb::RecoverBacking(args)) => verbs::recover_backing(args),
        Some(Verb::Resolve(args)) => verbs::resolve(args),
        Some(Verb::CheckConfig(args)) => check_config::check_config(args),
        Some(Verb::Generate(args)) => generate::generate(args),
        Some(verb) => online::run(verb).map_err(RunError::from),
    };
    result.unwrap_or_else(|error| {
        complain(&error);
        error.exit()
    })
}

fn serve_config(args: &ServeArgs) -> Result<Config, RunError> {
    match &args.config {
        Some(path) => {
            let consents = Consents {
                force_identity: args.force_identity.clone(),
                accept_loss: args.accept_loss.clone(),
            };
            let mut config = file::load(path, &consents)?;
            config.set_control(args.control.config());
            config.confine(args.sandbox);
            Ok(config)
        }
        None => Ok(Config::from_args(args, state_dir())?),
    }
}

/// Where state is kept unless told.
pub(super) fn state_dir() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    config::default_state_dir(sys::is_root(), variable("XDG_STATE_HOME"), variable("HOME"))
}

/// Attributes an error to a cache.
pub(super) fn of_cache(path: &Path) -> impl Fn(OpenError) -> RunError {
    let path = path.to_owned();
    move |source| RunError::Cache { path: path.clone(), source: Box::new(source) }
}
