//! The verbs that speak to a running daemon through its control API.
//!
//! Each says in words what the daemon answered, or with `--json` the answer itself. Long work is the
//! daemon's job: the verb follows it, and when it is interrupted it calls the job off, says how far
//! it came, and the next one goes on from there.

pub mod args;
mod checkpoint;
mod explain;
mod resize;
mod status;
mod top;
mod watch;

use std::path::{Path, PathBuf};

use serde_json::Value;

use self::args::{AttachArgs, DetachArgs, OnlineArgs, SetArgs, StatsArgs};
use super::announce::{print, word};
use super::api::client::{Client, ClientError};
use super::api::model::{AttachRequest, DaemonStatus, Job, ReloadReport, SetRequest, Stats, VolumeStats};
use super::cli::{DrainArgs, Verb};
use super::config::{self, Consents};
use super::exit::Exit;
use super::run::{RunError, state_dir};
use super::value::{Name, SocketPath, ValueError};
use super::{file, sys};

/// Why a verb did not do it.
#[derive(Debug, thiserror::Error)]
pub enum OnlineError {
    /// The daemon did not.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The kernel refused a resource.
    #[error("speaking to the daemon: {0}")]
    Os(#[from] std::io::Error),
    /// There is no usual place for the socket.
    #[error("neither root nor XDG_RUNTIME_DIR: give --control PATH")]
    NoSocket,
    /// An option is missing.
    #[error("attach needs --{0}")]
    Missing(&'static str),
    /// An option that means nothing here.
    #[error("{0}")]
    Meaningless(&'static str),
    /// A word that is no name or no size.
    #[error(transparent)]
    Value(#[from] ValueError),
    /// The job did not succeed.
    #[error("{0}")]
    Job(String),
}

impl OnlineError {
    /// How the program ends with it.
    pub fn exit(&self) -> Exit {
        match self {
            OnlineError::Client(ClientError::NoDaemon { .. }) => Exit::NoDaemon,
            OnlineError::Client(ClientError::Refused(refusal)) if refusal.kind == "bad-request" => {
                Exit::Usage
            }
            OnlineError::NoSocket
            | OnlineError::Missing(_)
            | OnlineError::Meaningless(_)
            | OnlineError::Value(_) => Exit::Usage,
            _ => Exit::Failed,
        }
    }
}

type Done = Result<Exit, OnlineError>;

/// Where a daemon's control socket is by convention.
pub fn default_socket(is_root: bool, runtime_dir: Option<PathBuf>) -> Option<PathBuf> {
    if is_root {
        return Some("/run/pcache-vhost/control.sock".into());
    }
    Some(runtime_dir.filter(|path| path.is_absolute())?.join("pcache-vhost/control.sock"))
}

fn client(socket: Option<&SocketPath>) -> Result<Client, OnlineError> {
    let default = || default_socket(sys::is_root(), std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from));
    let path = socket.map(|path| path.as_path().to_owned()).or_else(default).ok_or(OnlineError::NoSocket)?;
    Ok(Client::new(&path)?)
}

/// Does what a verb says.
pub(super) fn run(verb: &Verb) -> Done {
    match verb {
        Verb::Status(args) => status::status(args),
        Verb::List(args) => status::list(args),
        Verb::Attach(args) => attach(args),
        Verb::Detach(args) => detach(args),
        Verb::Flush(args) => {
            let path = format!("/v1/volumes/{}/flush", args.volume);
            follow(&args.online, "POST", &path, None)
        }
        Verb::Set(args) => set(args),
        Verb::Resize(args) => resize::resize(args),
        Verb::Checkpoint(args) => checkpoint::checkpoint(args),
        Verb::Stats(args) => stats(args),
        Verb::Top(args) => top::top(args),
        Verb::Explain(args) => explain::explain(args),
        Verb::Reload(args) => reload(args),
        Verb::Format(_)
        | Verb::Check(_)
        | Verb::Dump(_)
        | Verb::Drain(_)
        | Verb::RecoverBacking(_)
        | Verb::Resolve(_)
        | Verb::CheckConfig(_)
        | Verb::Generate(_) => {
            unreachable!("these are done without a daemon")
        }
    }
}

/// Begins a job and follows it to its end.
fn follow(args: &OnlineArgs, method: &str, path: &str, body: Option<&Value>) -> Done {
    let client = client(args.control.as_ref())?;
    let job: Job = client.ask(method, path, body)?;
    let job = watch::follow(&client, job)?;
    if args.json {
        say_json(&serde_json::to_value(&job).expect("a job is JSON"));
        return Ok(if job.state == "done" { Exit::Done } else { Exit::Failed });
    }
    print(&watch::ended(job)?);
    Ok(Exit::Done)
}

fn say_json(value: &Value) {
    print(&format!("{value:#}\n"));
}

/// An answer of the daemon's: as it is, or in words.
fn answer<T: serde::de::DeserializeOwned>(
    args: &OnlineArgs,
    method: &str,
    path: &str,
    words: impl FnOnce(&T) -> String,
) -> Done {
    let value = client(args.control.as_ref())?.ask_json(method, path, None)?;
    if args.json {
        say_json(&value);
        return Ok(Exit::Done);
    }
    let value = serde_json::from_value(value).map_err(|error| ClientError::Confused {
        socket: args.control.as_ref().map_or_else(String::new, ToString::to_string),
        why: error.to_string(),
    })?;
    print(&words(&value));
    Ok(Exit::Done)
}

fn attach(args: &AttachArgs) -> Done {
    let volume = &args.volume;
    let socket = volume.socket.as_ref().ok_or(OnlineError::Missing("socket"))?;
    let backing = volume.backing.as_ref().ok_or(OnlineError::Missing("backing"))?;
    if volume.fd.is_some() {
        return Err(OnlineError::Meaningless("--fd: a running daemon inherits nothing, give --socket"));
    }
    let name = volume.name.as_ref().ok_or(OnlineError::Missing("name"))?;
    let request = AttachRequest {
        name: name.to_string(),
        cache: args.cache.as_ref().map(Name::to_string),
        // The daemon has a working directory of its own.
        socket: absolute(socket.as_path())?,
        socket_mode: volume.socket_mode.map(|mode| format!("{mode:04o}")),
        socket_group: volume.socket_group.clone(),
        backing: absolute(backing)?,
        backing_format: volume.backing_format.map(word),
        backing_size: volume.backing_size.map(|size| format!("{size}B")),
        queues: volume.queues,
        queue_size: volume.queue_size,
        mode: volume.cache_mode.map(word),
        order: volume.order.map(word),
        data_crc: volume.data_crc.then_some(true),
        block_size: volume.block_size,
        read_only: volume.read_only.then_some(true),
        serial: volume.serial.map(|serial| serial.as_str().to_owned()),
        discard: volume.discard.map(word),
        poll: volume.poll.map(word),
        poll_us: volume.poll_us,
        poll_cpu_percent: volume.poll_cpu_percent,
        queue_threads: volume.queue_threads,
        thread_group: volume.thread_group.as_ref().map(Name::to_string),
        cpus: volume.cpus.as_ref().map(ToString::to_string),
        group: volume.group.as_ref().map(|name| name.as_str().to_owned()),
        redo: volume.redo.as_deref().map(absolute).transpose()?,
        redo_size: volume.redo_size.map(|size| format!("{size}B")),
        max_lag_s: volume.max_lag_s,
        max_dirty: volume.max_dirty.map(|size| format!("{size}B")),
        on_backing_error: volume.on_backing_error.map(word),
        backing_timeout_s: volume.backing_timeout_s,
        cache_min: args.share.cache_min.map(size_or_none),
        cache_max: args.share.cache_max.map(size_or_none),
        weight: args.share.weight,
        gc_percent: args.share.gc_percent,
        iops: args.share.iops,
        read_iops: args.share.read_iops,
        write_iops: args.share.write_iops,
        bytes_per_s: args.share.bytes_per_s.map(size_or_none),
        read_bytes_per_s: args.share.read_bytes_per_s.map(size_or_none),
        write_bytes_per_s: args.share.write_bytes_per_s.map(size_or_none),
        burst_ms: args.share.burst_ms,
        sidecar: volume.sidecar,
        admission: volume.admission.map(word),
        sequential_cutoff: volume.sequential_cutoff.map(size_or_none),
        force_identity: args.force_identity,
        accept_loss: args.accept_loss,
    };
    let body = serde_json::to_value(&request).expect("a request is JSON");
    follow(&args.online, "POST", "/v1/volumes", Some(&body))
}

fn absolute(path: &Path) -> Result<String, OnlineError> {
    let path = std::path::absolute(path)?;
    let text = path.to_str().ok_or(OnlineError::Meaningless("a path that is not UTF-8 cannot be sent"))?;
    Ok(text.to_owned())
}

/// A size whose 0 means that there is no bound.
fn size_or_none(size: u64) -> String {
    if size == 0 { "0".into() } else { format!("{size}B") }
}

fn detach(args: &DetachArgs) -> Done {
    let dirty = match (args.dirty.drain, args.dirty.keep_dirty) {
        (true, _) => "drain",
        (_, true) => "keep",
        _ => "discard",
    };
    let path = format!("/v1/volumes/{}?dirty={dirty}&force={}", args.volume, args.force);
    follow(&args.online, "DELETE", &path, None)
}

fn set(args: &SetArgs) -> Done {
    let request = SetRequest {
        mode: args.cache_mode.map(word),
        order: args.order.map(word),
        max_lag_s: args.max_lag_s,
        max_dirty: args.max_dirty.map(size_or_none),
        on_backing_error: args.on_backing_error.map(word),
        backing_timeout_s: args.backing_timeout_s,
        cache_min: args.share.cache_min.map(size_or_none),
        cache_max: args.share.cache_max.map(size_or_none),
        weight: args.share.weight,
        gc_percent: args.share.gc_percent,
        iops: args.share.iops,
        read_iops: args.share.read_iops,
        write_iops: args.share.write_iops,
        bytes_per_s: args.share.bytes_per_s.map(size_or_none),
        read_bytes_per_s: args.share.read_bytes_per_s.map(size_or_none),
        write_bytes_per_s: args.share.write_bytes_per_s.map(size_or_none),
        burst_ms: args.share.burst_ms,
    };
    let body = serde_json::to_value(&request).expect("a request is JSON");
    follow(&args.online, "PATCH", &format!("/v1/volumes/{}", args.volume), Some(&body))
}

fn stats(args: &StatsArgs) -> Done {
    match (&args.volume, args.reset) {
        (Some(volume), true) => {
            let path = format!("/v1/volumes/{volume}/stats/reset");
            answer(&args.online, "POST", &path, |stats: &VolumeStats| status::stats_text(stats))
        }
        (Some(volume), false) => {
            let path = format!("/v1/volumes/{volume}/stats");
            answer(&args.online, "GET", &path, |stats: &VolumeStats| status::stats_text(stats))
        }
        (None, true) => Err(OnlineError::Meaningless("--reset is for one volume at a time: say which")),
        (None, false) => answer(&args.online, "GET", "/v1/stats", |stats: &Stats| {
            stats.volumes.iter().map(status::stats_text).collect::<Vec<_>>().join("\n")
        }),
    }
}

fn reload(args: &OnlineArgs) -> Done {
    let value = client(args.control.as_ref())?.ask_json("POST", "/v1/reload", None)?;
    let report: ReloadReport = serde_json::from_value(value.clone()).unwrap_or_default();
    match args.json {
        true => say_json(&value),
        false => print(&(report.lines().join("\n") + "\n")),
    }
    Ok(if report.failed.is_empty() { Exit::Done } else { Exit::Failed })
}

/// `drain`, if a daemon holds what is to be drained; `None` if nobody does.
pub(super) fn drain(args: &DrainArgs) -> Option<Result<Exit, RunError>> {
    let drained = find_holder(args).and_then(|found| match found {
        Some((client, volumes)) => drain_through(&client, &volumes, args).map(Some).map_err(RunError::from),
        None => Ok(None),
    });
    drained.transpose()
}

/// The daemon that holds the caches to be drained, and the volumes concerned.
fn find_holder(args: &DrainArgs) -> Result<Option<(Client, Vec<String>)>, RunError> {
    let (caches, configured) = match &args.config {
        Some(path) => {
            let config = file::load(path, &Consents::default())?;
            let caches = config.caches().iter().map(|cache| cache.path.first().to_owned()).collect();
            (caches, config.control().map(|control| control.socket.clone()))
        }
        None => {
            let path = config::cache_path(&args.cache, &args.state_dir, state_dir())?;
            (vec![path.first().to_owned()], None)
        }
    };
    let Ok(client) = client(args.control.as_ref().or(configured.as_ref())) else { return Ok(None) };
    let Ok(status) = client.ask::<DaemonStatus>("GET", "/v1/status", None) else { return Ok(None) };
    let canonical = |path: &Path| path.canonicalize().ok();
    let is_held = |path: &str| {
        let held = canonical(Path::new(path));
        held.is_some() && caches.iter().any(|cache| canonical(cache) == held)
    };
    let held: Vec<_> = status.caches.iter().filter(|cache| is_held(&cache.path)).collect();
    if held.is_empty() {
        return Ok(None);
    }
    let on = |volume: &str| held.iter().any(|cache| cache.name == volume);
    let mut volumes: Vec<_> = status.volumes.into_iter().filter(|volume| on(&volume.cache)).collect();
    if let Some(name) = &args.name {
        // One that is not there is the daemon's to refuse.
        return Ok(Some((client, vec![name.to_string()])));
    }
    volumes.retain(|volume| volume.attached || volume.dirty_bytes > 0);
    Ok(Some((client, volumes.into_iter().map(|volume| volume.name).collect())))
}

fn drain_through(client: &Client, volumes: &[String], args: &DrainArgs) -> Done {
    if args.backing.is_some() || args.backing_format.is_some() || args.force_identity || args.accept_loss {
        return Err(OnlineError::Meaningless(
            "a daemon holds this cache: --backing, --backing-format, --force-identity and --accept-loss are \
             said when a volume is attached",
        ));
    }
    for volume in volumes {
        let job = client.ask("POST", &format!("/v1/volumes/{volume}/drain"), None)?;
        print(&watch::ended(watch::follow(client, job)?)?);
    }
    if volumes.is_empty() {
        print("no volume, nothing to drain\n");
    }
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_where_the_user_may_make_one() {
        let dir = |root, dir: Option<&str>| default_socket(root, dir.map(PathBuf::from));
        assert_eq!(dir(true, Some("/x")), Some("/run/pcache-vhost/control.sock".into()));
        assert_eq!(dir(false, Some("/run/user/7")), Some("/run/user/7/pcache-vhost/control.sock".into()));
        assert_eq!(dir(false, Some("x")), None);
        assert_eq!(dir(false, None), None);
    }
}
