//! The side that takes: a daemon that starts where another one serves.
//!
//! Until [`Predecessor::take_over`] returns, everything here only looks: what is made is what was not
//! there before, and what fails leaves the other one serving: what came from it is held as bare
//! descriptors, which closing harms nobody. From then on this is a start like any after a kill, with
//! sockets and connections that are already there.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::wire::{Message, OfferedVolume, VERSION, Wire, Word, unexpected};
use super::{HandoverError, socket};
use crate::control::api;
use crate::control::config::{ControlConfig, Endpoint, VolumeConfig};
use crate::control::socket::{Bound, Claimed, Incoming};
use crate::control::sys;
use crate::control::value::SocketPath;
use crate::tools::members::CachePaths;
use crate::vhost::{Parked, ParkedSession, Saved};

/// For what the predecessor says at once.
const PROMPT: Duration = Duration::from_secs(5);
/// For it to come to rest, a little longer than it takes itself.
const REST: Duration = Duration::from_secs(10);
/// Most messages of one VMM: its regions and five for each of 256 rings, and some more.
const MESSAGES_MAX: u32 = 4096;
/// Most caches, disks and redo areas.
const PIECES_MAX: usize = 4096;

/// A daemon that serves and is to give itself up.
#[derive(Debug)]
pub struct Predecessor {
    wire: Wire,
    caches: Vec<Arc<File>>,
    disks: BTreeMap<String, Arc<File>>,
    redos: BTreeMap<String, Arc<File>>,
    volumes: Vec<OfferedVolume>,
}

/// What it leaves.
#[derive(Debug, Default)]
pub struct Estate {
    /// The control API's socket.
    pub control: Option<api::Claimed>,
    /// The socket for upgrades.
    pub upgrade: Option<Claimed>,
    /// Front ends, by volume.
    pub front_ends: BTreeMap<String, FrontEndRest>,
}

/// What it will leave: nothing of it is ours yet.
#[derive(Default)]
struct Promised {
    control: Option<(UnixListener, Option<Place>, Option<TcpListener>)>,
    upgrade: Option<(UnixListener, Place)>,
    front_ends: BTreeMap<String, (Parked, Option<Place>)>,
}

/// A socket's path, and what keeps others from it.
struct Place {
    path: SocketPath,
    lock: OwnedFd,
}

/// A front end that goes on.
#[derive(Debug)]
pub struct FrontEndRest {
    /// What it served with.
    pub parked: Parked,
    /// Its socket's place.
    pub bound: Option<Bound>,
}

impl Predecessor {
    /// Asks whoever serves at the control socket to give itself up; `None` if nobody does.
    ///
    /// # Errors
    /// It refuses, or is nobody to take over from.
    pub fn meet(control: Option<&ControlConfig>) -> Result<Option<Self>, HandoverError> {
        let path = socket(control.ok_or(HandoverError::NoControl)?)?;
        let stream = match UnixStream::connect(path.as_path()) {
            Ok(stream) => stream,
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => return Ok(None),
                _ => return Err(HandoverError::io("connecting to")(error)),
            },
        };
        let uid = sys::peer_uid(stream.as_fd()).map_err(HandoverError::io("recognising"))?;
        if uid != 0 && uid != sys::own_uid() {
            return Err(HandoverError::Stranger { socket: path.as_path().into(), uid });
        }
        let mut predecessor = Self {
            wire: Wire::new(stream),
            caches: Vec::new(),
            disks: BTreeMap::new(),
            redos: BTreeMap::new(),
            volumes: Vec::new(),
        };
        predecessor.hear_offer()?;
        Ok(Some(predecessor))
    }

    fn hear_offer(&mut self) -> Result<(), HandoverError> {
        let program = env!("CARGO_PKG_VERSION").to_owned();
        self.wire.say(&Word::Hello { version: VERSION, program, pid: std::process::id() }, &[], PROMPT)?;
        for _ in 0..PIECES_MAX {
            let message = self.wire.hear(PROMPT)?;
            match message.word.clone() {
                Word::Cache { .. } => self.caches.push(file(message)?),
                Word::Disk { volume } => drop(self.disks.insert(volume, file(message)?)),
                Word::Redo { volume } => drop(self.redos.insert(volume, file(message)?)),
                Word::Offered { volumes, .. } => {
                    self.volumes = volumes;
                    return Ok(());
                }
                word => return Err(unexpected(&word)),
            }
        }
        Err(HandoverError::Protocol("it has more than anybody can have".into()))
    }

    /// Refuses a configuration that would not serve what is served.
    ///
    /// # Errors
    /// The first volume that would be missed.
    pub fn judge(&self, volumes: &[VolumeConfig]) -> Result<(), HandoverError> {
        for offered in &self.volumes {
            let Some(wanted) = volumes.iter().find(|volume| volume.name.as_str() == offered.name) else {
                return Err(HandoverError::Forgotten(offered.name.clone()));
            };
            let wanted = match &wanted.endpoint {
                // Its number meant something to the process before, and is not needed any more.
                Endpoint::Inherited(_) => None,
                Endpoint::Socket { path, .. } => Some(
                    std::path::absolute(path.as_path())
                        .map_err(HandoverError::io("comparing sockets with"))?
                        .display()
                        .to_string(),
                ),
            };
            if wanted != offered.socket {
                let say = |path: &Option<String>| path.clone().unwrap_or("an inherited socket".into());
                return Err(HandoverError::Moved {
                    volume: offered.name.clone(),
                    served: say(&offered.socket),
                    wanted: say(&wanted),
                });
            }
        }
        Ok(())
    }

    /// Whether it serves this volume, so that its socket comes from there.
    pub fn serves(&self, volume: &str) -> bool {
        self.volumes.iter().any(|offered| offered.name == volume)
    }

    /// The images of the cache at `paths`, if it has all of them.
    pub fn cache(&self, paths: &CachePaths) -> Option<Vec<Arc<File>>> {
        paths.all().iter().map(|path| same(path, self.caches.iter()).cloned()).collect()
    }

    /// The disk of a volume, if it is the one at `path`.
    pub fn disk(&self, volume: &str, path: &Path) -> Option<Arc<File>> {
        same(path, self.disks.get(volume).into_iter()).cloned()
    }

    /// The redo area of a volume.
    pub fn redo(&self, volume: &str) -> Option<Arc<File>> {
        self.redos.get(volume).cloned()
    }

    /// Everything is prepared: the other one comes to rest and gives itself up. When this returns well,
    /// it is ours.
    ///
    /// # Errors
    /// It goes on.
    pub fn take_over(&mut self, control: &ControlConfig) -> Result<Estate, HandoverError> {
        self.wire.say(&Word::Ready, &[], PROMPT)?;
        let mut promised = Promised::default();
        let mut limit = REST;
        loop {
            let message = self.wire.hear(limit)?;
            limit = PROMPT;
            match message.word.clone() {
                Word::Control { is_bound } => {
                    promised.control = Some(control_socket(message, is_bound, control)?)
                }
                Word::Upgrade => {
                    let [listener, lock] = message.many_fds()?;
                    let place = Place { path: socket(control)?, lock };
                    promised.upgrade = Some((a_socket(listener, true)?.into(), place));
                }
                Word::Rest { volume, listens, is_bound, is_connected, messages } => {
                    let shape = (listens, is_bound, is_connected);
                    let rest = self.hear_front_end(message, &volume, shape, messages)?;
                    drop(promised.front_ends.insert(volume, rest));
                }
                Word::All => break,
                word => return Err(unexpected(&word)),
            }
        }
        self.wire.say(&Word::All, &[], PROMPT)?;
        // It may decide until it has said this, and has nothing left to do before.
        self.wire.expect(&Word::Yours, PROMPT)?;
        Ok(promised.keep(control))
    }

    fn hear_front_end(
        &mut self,
        message: Message,
        volume: &str,
        (listens, is_bound, is_connected): (bool, bool, bool),
        messages: u32,
    ) -> Result<(Parked, Option<Place>), HandoverError> {
        let wrong = |what: &str| HandoverError::Protocol(format!("the front end of {volume}: {what}"));
        let offered = self.volumes.iter().find(|offered| offered.name == volume);
        let path = offered.ok_or_else(|| wrong("it was not offered"))?.socket.clone();
        let mut fds = message.fds.into_iter();
        let mut next = |is_there: bool| match is_there {
            true => fds.next().map(Some).ok_or_else(|| wrong("a descriptor is missing")),
            false => Ok(None),
        };
        let (listener, lock, stream) = (next(listens)?, next(is_bound)?, next(is_connected)?);
        if fds.next().is_some() || messages > MESSAGES_MAX || (messages > 0 && !is_connected) {
            return Err(wrong("more than there can be"));
        }
        let place = match (path, lock) {
            (Some(path), Some(lock)) => Some(Place { path: SocketPath::new(path.as_ref())?, lock }),
            // Inherited, or the service manager's, which keeps it.
            (_, None) => None,
            (None, Some(_)) => return Err(wrong("a lock without a path")),
        };
        let listener = listener.map(|fd| a_socket(fd, true).map(UnixListener::from)).transpose()?;
        let stream = stream.map(|fd| a_socket(fd, false).map(UnixStream::from)).transpose()?;
        let mut told = Vec::new();
        for _ in 0..messages {
            let Message { word, fds } = self.wire.hear(PROMPT)?;
            let Word::Vhost { code, body } = word else { return Err(unexpected(&word)) };
            told.push(Saved { code, body, fds });
        }
        let session = stream.map(|stream| ParkedSession { stream, messages: told, has_left_requests: false });
        Ok((Parked { listener, session }, place))
    }

    /// Says that guests are served again: the other one ends.
    pub fn say_serving(mut self) {
        if let Err(error) = self.wire.say(&Word::Serving, &[], PROMPT) {
            tracing::warn!("the predecessor does not hear that it is over: {error}");
        }
    }

    /// Says why it is not to be: the other one serves on.
    pub fn decline(mut self, why: &str) {
        self.wire.refuse(why);
    }
}

impl Promised {
    /// It is ours now.
    fn keep(self, config: &ControlConfig) -> Estate {
        let control = self.control.and_then(|(listener, place, metrics)| {
            let socket = Claimed::Open(Incoming::Listener(listener), place.and_then(Place::keep));
            api::Claimed::taken(socket, metrics, config)
                .inspect_err(|error| tracing::error!("the control API stays closed: {error}"))
                .ok()
        });
        let upgrade =
            self.upgrade.map(|(listener, place)| Claimed::Open(Incoming::Listener(listener), place.keep()));
        let rest = |(volume, (parked, place)): (String, (Parked, Option<Place>))| {
            (volume, FrontEndRest { parked, bound: place.and_then(Place::keep) })
        };
        Estate { control, upgrade, front_ends: self.front_ends.into_iter().map(rest).collect() }
    }
}

impl Place {
    /// From now on it goes with us. A socket that somebody has removed is served all the same.
    fn keep(self) -> Option<Bound> {
        let path = self.path.clone();
        let taken = Bound::taken(self.path, self.lock).and_then(|mut bound| bound.sign().map(|()| bound));
        taken.inspect_err(|error| tracing::warn!("socket {path}: nobody can connect any more: {error}")).ok()
    }
}

fn file(message: Message) -> Result<Arc<File>, HandoverError> {
    Ok(Arc::new(File::from(message.one_fd()?)))
}

/// The first of `files` that is what `path` means.
fn same<'a>(path: &Path, mut files: impl Iterator<Item = &'a Arc<File>>) -> Option<&'a Arc<File>> {
    let named = fs::metadata(path).ok()?;
    files.find(|file| {
        file.metadata().is_ok_and(|given| (given.dev(), given.ino()) == (named.dev(), named.ino()))
    })
}

fn control_socket(
    message: Message,
    is_bound: bool,
    config: &ControlConfig,
) -> Result<(UnixListener, Option<Place>, Option<TcpListener>), HandoverError> {
    let wrong = || HandoverError::Protocol("the control socket has other descriptors".into());
    let mut fds = message.fds.into_iter();
    let listener = fds.next().ok_or_else(wrong)?;
    let lock = if is_bound { Some(fds.next().ok_or_else(wrong)?) } else { None };
    let metrics = fds.next().map(|fd| a_socket(fd, true).map(TcpListener::from)).transpose()?;
    if fds.next().is_some() {
        return Err(wrong());
    }
    let place = lock.map(|lock| Place { path: config.socket.clone(), lock });
    Ok((a_socket(listener, true)?.into(), place, metrics))
}

/// A descriptor that must be a socket, listening or connected.
fn a_socket(fd: OwnedFd, listens: bool) -> Result<OwnedFd, HandoverError> {
    match sys::is_listening(fd.as_fd()) {
        Ok(found) if found == listens => Ok(fd),
        _ => Err(HandoverError::Protocol("a descriptor is not the socket it should be".into())),
    }
}
