//! The side that gives: a running daemon comes to rest, and goes on if that was in vain.
//!
//! Order of coming to rest, and what breaks if two are swapped:
//! 1. the control API: a job that begins later would work on what is another's;
//! 2. the front ends, all at once: their queues may need write-back and reclaim to end what they have;
//! 3. the workers: what they have under way on the disks ends with them;
//! 4. the look at what is owed: nobody adds to it any more.
//!
//! Waking up again goes the other way. What cannot wake up, because the kernel refuses a thread, ends the
//! process: that is a kill, after which everything is found again.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::wire::{OfferedVolume, VERSION, Wire, Word};
use super::{HandoverError, socket};
use crate::control::api::{self, Api};
use crate::control::config::{ControlConfig, Endpoint};
use crate::control::daemon::front_end::FrontEnd;
use crate::control::daemon::{Daemon, Served, lock};
use crate::control::exit::{Exit, sentence};
use crate::control::run::RunError;
use crate::control::socket::{Bound, Claimed, Incoming};
use crate::control::sys;
use crate::vhost::Parked;

/// For what the successor says at once.
const PROMPT: Duration = Duration::from_secs(5);
/// For its preparations, during which guests are served: judging disks may mean waiting for them.
const PREPARATION: Duration = Duration::from_secs(120);
/// For the front ends to come to rest. Guests wait meanwhile; longer than disks need that answer at all.
const REST: Duration = Duration::from_secs(5);
/// For the successor to serve: a recovery of the largest cache. Nobody waits for us then.
const RECOVERY: Duration = Duration::from_secs(600);

/// Whether the daemon may be given away. Held from the moment it comes to rest; a stop takes it for good.
#[derive(Default)]
pub struct Gate(Mutex<bool>);

impl Gate {
    /// From now on nothing is given away: the daemon stops. Waits for a hand-over that has begun.
    pub fn close(&self) {
        *lock(&self.0) = true;
    }

    fn enter(&self) -> Option<MutexGuard<'_, bool>> {
        let gate = lock(&self.0);
        (!*gate).then_some(gate)
    }
}

/// Waits for successors. Dropping it removes its socket.
pub struct Giver {
    shared: Arc<Shared>,
}

struct Shared {
    daemon: Arc<Daemon>,
    api: Arc<Mutex<Option<Api>>>,
    gate: Arc<Gate>,
    listener: UnixListener,
    bound: Mutex<Option<Bound>>,
}

/// Everything at rest.
struct AtRest {
    api: Option<api::Claimed>,
    front_ends: Vec<(Arc<Served>, FrontEndAtRest)>,
}

/// A front end at rest: what to resume, and the socket's place. Nothing to resume: it had ended.
type FrontEndAtRest = (Option<Parked>, Option<Bound>);

impl Giver {
    /// The right to the socket for upgrades.
    ///
    /// # Errors
    /// It cannot be had.
    pub fn claim(control: &ControlConfig) -> Result<Claimed, RunError> {
        let path = socket(control).map_err(RunError::Handover)?;
        Ok(Claimed::new(&Endpoint::Socket { path, mode: 0o600, group: None })?)
    }

    /// Waits for successors from now on.
    ///
    /// # Errors
    /// The kernel refused the socket or the thread.
    pub fn open(
        claim: Claimed,
        daemon: &Arc<Daemon>,
        api: &Arc<Mutex<Option<Api>>>,
        gate: &Arc<Gate>,
    ) -> Result<Self, RunError> {
        let (incoming, bound) = claim.open()?;
        let Incoming::Listener(listener) = incoming else {
            unreachable!("a socket that was made at a path listens");
        };
        let shared = Arc::new(Shared {
            daemon: Arc::clone(daemon),
            api: Arc::clone(api),
            gate: Arc::clone(gate),
            listener,
            bound: Mutex::new(bound),
        });
        let own = Arc::clone(&shared);
        // It ends with the process: it holds nothing that a stop has to wait for.
        std::thread::Builder::new()
            .name("pcache-upgrade".into())
            .spawn(move || own.wait())
            .map_err(RunError::os("waiting for upgrades"))?;
        Ok(Self { shared })
    }
}

impl Drop for Giver {
    fn drop(&mut self) {
        drop(lock(&self.shared.bound).take());
    }
}

impl Shared {
    fn wait(&self) {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => self.meet(stream),
                Err(error) => {
                    tracing::warn!(%error, "a successor cannot be heard, trying again");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn meet(&self, stream: UnixStream) {
        use std::os::fd::AsFd;
        let uid = sys::peer_uid(stream.as_fd()).unwrap_or(u32::MAX);
        if uid != 0 && uid != sys::own_uid() {
            tracing::warn!(uid, "somebody who is not our user has tried to take over");
            return;
        }
        let mut wire = Wire::new(stream);
        // It does not return when it succeeds.
        let Err(error) = self.give(&mut wire);
        match &error {
            HandoverError::Refused(why) => {
                tracing::warn!("not handed over, serving on: the successor says: {why}")
            }
            error => {
                let why = sentence(error);
                tracing::warn!("not handed over, serving on: {why}");
                wire.refuse(&why);
            }
        }
    }

    fn give(&self, wire: &mut Wire) -> Result<std::convert::Infallible, HandoverError> {
        let (version, program, pid) = match wire.hear(PROMPT)?.word {
            Word::Hello { version, program, pid } => (version, program, pid),
            word => return Err(super::wire::unexpected(&word)),
        };
        if version != VERSION {
            let why = format!("it speaks version {VERSION} of the protocol of upgrades, not {version}");
            return Err(HandoverError::NotNow(why));
        }
        tracing::info!("process {pid}, version {program}, wants to take over");
        let served = self.daemon.served();
        self.refuse_unless_well(&served)?;
        self.offer(wire, &served)?;
        wire.expect(&Word::Ready, PREPARATION)?;
        self.settle(&served)?;
        let Some(_gate) = self.gate.enter() else { return Err(not_now("the daemon is stopping")) };
        // No server of ours runs for a moment; that is not the end.
        let _running = self.daemon.servers().running();
        let begun = Instant::now();
        let rest = self.come_to_rest(&served)?;
        let rested = begun.elapsed();
        if let Err(error) = self.hand(wire, &rest) {
            self.wake(rest);
            return Err(error);
        }
        // The point of no return is behind us.
        tracing::info!("handed over to process {pid}: rest_us={}", rested.as_micros());
        let code = match wire.expect(&Word::Serving, RECOVERY) {
            Ok(()) => Exit::Done,
            Err(error) => {
                tracing::error!("process {pid} has taken over and does not serve: {}", sentence(&error));
                Exit::Failed
            }
        };
        // No destructor may run: sockets, locks and images are another's.
        std::process::exit(code.code().into());
    }

    fn refuse_unless_well(&self, served: &[Arc<Served>]) -> Result<(), HandoverError> {
        if self.daemon.is_changing() {
            return Err(not_now("a volume is being attached or detached"));
        }
        if let Some(job) = self.daemon.jobs().view().iter().find(|job| job.state == "running") {
            return Err(not_now(&format!("job {} ({} of volume {}) runs", job.id, job.kind, job.volume)));
        }
        for cache in self.daemon.caches() {
            if cache.cache.has_failed() {
                return Err(not_now("the cache has failed once: only a start finds out what is left of it"));
            }
        }
        for served in served {
            let (name, state) = (&served.config.name, served.volume.health().state);
            served.refuse_if_held().map_err(|error| not_now(&sentence(&error)))?;
            if state == crate::cache::VolumeState::Stalled {
                return Err(not_now(&format!("the disk of volume {name} does not answer")));
            }
        }
        Ok(())
    }

    /// What the successor would have to make durable before it serves, as far as it is there already.
    fn settle(&self, served: &[Arc<Served>]) -> Result<(), HandoverError> {
        for cache in self.daemon.caches() {
            let of_cache = |served: &&Arc<Served>| {
                std::ptr::eq(cache, &raw const self.daemon.caches()[served.config.cache])
            };
            let volumes: Vec<_> = served.iter().filter(of_cache).map(|served| &*served.volume).collect();
            cache.cache.settle_ahead(&volumes).map_err(|error| not_now(&sentence(&error)))?;
        }
        Ok(())
    }

    /// Gives what may be looked at while we serve.
    fn offer(&self, wire: &mut Wire, served: &[Arc<Served>]) -> Result<(), HandoverError> {
        let failed = HandoverError::io("giving descriptors to");
        for cache in self.daemon.caches() {
            let images = cache.pmem.sources().map_err(&failed)?;
            for (path, image) in cache.config.path.all().iter().zip(images) {
                let path = path.display().to_string();
                wire.say(&Word::Cache { path }, &[image.as_raw_fd()], PROMPT)?;
            }
        }
        let mut volumes = Vec::new();
        for served in served {
            let volume = served.config.name.to_string();
            let disk = served.volume.backing().source().map_err(&failed)?;
            wire.say(&Word::Disk { volume: volume.clone() }, &[disk.as_raw_fd()], PROMPT)?;
            if let Some(redo) = served.volume.redo_disk() {
                let redo = redo.source().map_err(&failed)?;
                wire.say(&Word::Redo { volume: volume.clone() }, &[redo.as_raw_fd()], PROMPT)?;
            }
            let socket = match &served.config.endpoint {
                Endpoint::Socket { path, .. } => Some(absolute(path.as_path()).map_err(&failed)?),
                Endpoint::Inherited(_) => None,
            };
            volumes.push(OfferedVolume { name: volume, socket });
        }
        let control = self.daemon.control().map(|control| absolute(control.socket.as_path())).transpose();
        let control = control.map_err(failed)?.unwrap_or_default();
        wire.say(&Word::Offered { volumes, control }, &[], PROMPT)
    }

    /// Stops everything that works. On an error everything works again.
    fn come_to_rest(&self, served: &[Arc<Served>]) -> Result<AtRest, HandoverError> {
        let api = lock(&self.api).take().map(Api::park);
        let rest = AtRest { api, front_ends: Vec::new() };
        let now = self.daemon.served();
        let same = now.len() == served.len() && now.iter().zip(served).all(|(a, b)| Arc::ptr_eq(a, b));
        let refused = match same {
            true => self.refuse_unless_well(served),
            false => Err(not_now("volumes were attached or detached meanwhile")),
        };
        if let Err(error) = refused {
            self.wake(rest);
            return Err(error);
        }
        let rest = self.park_front_ends(served, rest)?;
        for cache in self.daemon.caches() {
            drop(lock(&cache.workers).take());
        }
        let owes = |(served, (parked, _)): &&(Arc<Served>, FrontEndAtRest)| {
            let session = parked.as_ref().and_then(|parked| parked.session.as_ref());
            session.is_some_and(|session| session.has_left_requests) || served.volume.has_left_behind()
        };
        if let Some((served, _)) = rest.front_ends.iter().find(owes) {
            let why = format!("the disk of volume {} still owes an answer", served.config.name);
            self.wake(rest);
            return Err(not_now(&why));
        }
        if let Some(cache) = self.daemon.caches().iter().find(|cache| cache.cache.has_failed()) {
            let why = format!("cache {} has failed just now", cache.config.path.display());
            self.wake(rest);
            return Err(not_now(&why));
        }
        Ok(rest)
    }

    fn park_front_ends(&self, served: &[Arc<Served>], mut rest: AtRest) -> Result<AtRest, HandoverError> {
        let deadline = Instant::now() + REST;
        let (sender, receiver) = mpsc::channel();
        let taken = served.iter().filter_map(|served| Some((served, lock(&served.front_end).take()?)));
        let mut left = 0;
        for (served, front_end) in taken {
            front_end.hand_over();
            let (sender, served) = (sender.clone(), Arc::clone(served));
            left += 1;
            // A thread each: one that hangs must not keep the others from waking.
            std::thread::spawn(move || drop(sender.send((served, front_end.park()))));
        }
        drop(sender);
        let mut failure = None;
        while left > 0 {
            let patience = deadline.saturating_duration_since(Instant::now());
            match receiver.recv_timeout(patience) {
                Ok((served, Ok(parked))) => rest.front_ends.push((served, parked)),
                Ok((served, Err(error))) => failure = Some((served, error)),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => break,
            }
            left -= 1;
        }
        if left == 0 && failure.is_none() {
            return Ok(rest);
        }
        let why = match failure {
            Some((served, error)) => {
                format!("the front end of volume {} has ended: {error}", served.config.name)
            }
            None => format!("{left} of the front ends wait for a disk"),
        };
        self.wake(rest);
        // Those that come late wake up late.
        let daemon = Arc::clone(&self.daemon);
        std::thread::spawn(move || {
            for (served, parked) in receiver {
                match parked {
                    Ok(parked) => wake_front_end(&daemon, &served, parked),
                    Err(error) => tracing::error!("volume {}: {error}", served.config.name),
                }
            }
        });
        Err(not_now(&why))
    }

    /// Everything works again.
    fn wake(&self, rest: AtRest) {
        if let Err(error) = self.daemon.work_again() {
            tracing::error!("this daemon cannot go on, which is as good as a kill: {}", sentence(&error));
            std::process::exit(Exit::Failed.code().into());
        }
        for (served, parked) in rest.front_ends {
            wake_front_end(&self.daemon, &served, parked);
        }
        let Some(claim) = rest.api else { return };
        match claim.open(&self.daemon, self.daemon.servers().running()) {
            Ok(api) => *lock(&self.api) = Some(api),
            Err(error) => tracing::error!("the control API stays closed: {}", sentence(&error)),
        }
    }

    /// Gives everything that was kept back until now, and then itself.
    fn hand(&self, wire: &mut Wire, rest: &AtRest) -> Result<(), HandoverError> {
        let failed = HandoverError::io("giving descriptors to");
        if let Some(api) = &rest.api {
            let fds = api.sources().map_err(&failed)?;
            wire.say(&Word::Control { is_bound: api.is_bound() }, &numbers(&fds), PROMPT)?;
        }
        let lock_of = |bound: &Option<Bound>| bound.as_ref().map(Bound::lock).transpose();
        let upgrade: Vec<OwnedFd> = lock_of(&lock(&self.bound)).map_err(&failed)?.into_iter().collect();
        let mut fds = vec![self.listener.as_raw_fd()];
        fds.extend(numbers(&upgrade));
        wire.say(&Word::Upgrade, &fds, PROMPT)?;
        for (served, (parked, bound)) in &rest.front_ends {
            let volume = served.config.name.to_string();
            let path_lock = lock_of(bound).map_err(&failed)?;
            let parked = parked.as_ref();
            let listener = parked.and_then(|parked| parked.listener.as_ref()).map(AsRawFd::as_raw_fd);
            let session = parked.and_then(|parked| parked.session.as_ref());
            let mut fds: Vec<RawFd> = listener.into_iter().collect();
            fds.extend(path_lock.iter().map(AsRawFd::as_raw_fd));
            fds.extend(session.map(|session| session.stream.as_raw_fd()));
            let word = Word::Rest {
                volume,
                listens: listener.is_some(),
                is_bound: path_lock.is_some(),
                is_connected: session.is_some(),
                messages: session.map_or(0, |session| session.messages.len() as u32),
            };
            wire.say(&word, &fds, PROMPT)?;
            for message in session.into_iter().flat_map(|session| &session.messages) {
                let word = Word::Vhost { code: message.code, body: message.body.clone() };
                wire.say(&word, &numbers(&message.fds), PROMPT)?;
            }
        }
        wire.say(&Word::All, &[], PROMPT)?;
        wire.expect(&Word::All, PROMPT)?;
        wire.say(&Word::Yours, &[], PROMPT)
    }
}

fn wake_front_end(daemon: &Daemon, served: &Served, (parked, bound): FrontEndAtRest) {
    let Some(parked) = parked else { return };
    let resumed = FrontEnd::resume(
        parked,
        bound,
        &served.config,
        &served.volume,
        daemon.threads(),
        daemon.servers().running(),
    );
    match resumed {
        Ok(front_end) => *lock(&served.front_end) = Some(front_end),
        Err(error) => tracing::error!("volume {} stays without a socket: {error}", served.config.name),
    }
}

fn not_now(why: &str) -> HandoverError {
    HandoverError::NotNow(why.into())
}

fn numbers(fds: &[OwnedFd]) -> Vec<RawFd> {
    fds.iter().map(AsRawFd::as_raw_fd).collect()
}

/// A path from the root, as text.
fn absolute(path: &std::path::Path) -> io::Result<String> {
    let path: PathBuf = std::path::absolute(path)?;
    path.into_os_string().into_string().map_err(|_| io::Error::other("a socket's path is not text"))
}
