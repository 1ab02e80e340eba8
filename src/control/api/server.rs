//! The API's server: one thread, and bounds for whoever uses it badly.
//!
//! `hyper` because it is the HTTP implementation that most of the ecosystem maintains, fuzzes and
//! patches, and lets every buffer and time be bounded; on a current-thread `tokio`, which hyper is
//! tested with. `tiny_http` would be smaller, and has neither time limits nor recent releases; a
//! parser of our own would be smaller still, and ours to keep safe.
//!
//! Bounds: [`CONNECTIONS_MAX`] connections, [`PER_USER_MAX`] of one user, each for at most
//! [`CONNECTION_MAX`] and with one request at a time; a head of [`HEAD_MAX`] bytes within
//! [`HEAD_TIMEOUT`], a body of [`BODY_MAX`] bytes within [`BODY_TIMEOUT`]. So a hostile client has a
//! few MiB of memory at most, and holds up other clients for a moment; volumes have other threads.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::{Kind, Refused, Reply, dispatch};
use crate::control::config::{ControlConfig, Endpoint};
use crate::control::daemon::{Daemon, lock};
use crate::control::run::RunError;
use crate::control::signals::Running;
use crate::control::socket::{self, Bound};
use crate::control::sys;
use crate::control::value::SocketPath;

/// Connections at a time.
const CONNECTIONS_MAX: usize = 64;
/// Of these, one user's.
const PER_USER_MAX: usize = 24;
/// Longest life of a connection.
const CONNECTION_MAX: Duration = Duration::from_secs(120);
/// Bytes of a request's head.
const HEAD_MAX: usize = 16 << 10;
/// Longest time for a request's head, from the connection's begin or the last answer.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a request's body: an attach has a few hundred.
const BODY_MAX: usize = 64 << 10;
/// Longest time for a request's body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests worked on at a time.
const WORKERS_MAX: usize = 4;
/// Between two samples for the decaying windows.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// Pause after a failed accept.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// The right to the control socket, before anybody can connect to it.
pub struct Claimed {
    socket: socket::Claimed,
    path: SocketPath,
    metrics: Option<TcpListener>,
}

impl Claimed {
    /// Claims what the configuration says.
    ///
    /// # Errors
    /// It cannot be had.
    pub fn new(config: &ControlConfig) -> Result<Self, RunError> {
        let (path, mode, group) = (config.socket.clone(), config.mode, config.group.clone());
        let socket = socket::Claimed::new(&Endpoint::Socket { path, mode, group })?;
        let metrics = config
            .metrics
            .map(TcpListener::bind)
            .transpose()
            .map_err(RunError::os("listening at the address for metrics"))?;
        Ok(Self { socket, path: config.socket.clone(), metrics })
    }

    /// Answers from now on.
    ///
    /// # Errors
    /// The kernel refused the socket or the thread.
    pub fn open(self, daemon: &Arc<Daemon>, running: Running) -> Result<Api, RunError> {
        let (incoming, bound) = self.socket.open()?;
        let socket::Incoming::Listener(listener) = incoming else {
            unreachable!("a socket that was made at a path listens");
        };
        let of_group = std::fs::metadata(self.path.as_path()).ok();
        let allowed = Allowed { uid: sys::own_uid(), gid: of_group.map(|about| about.gid()) };
        let (stop, stopped) = oneshot::channel();
        let daemon = Arc::clone(daemon);
        let start = || {
            listener.set_nonblocking(true)?;
            if let Some(metrics) = &self.metrics {
                metrics.set_nonblocking(true)?;
            }
            let runtime = Builder::new_current_thread()
                .enable_all()
                .max_blocking_threads(WORKERS_MAX)
                .thread_name("pcache-api-work")
                .build()?;
            let body = move || {
                let _running = running;
                run(&runtime, listener, self.metrics, &daemon, allowed, stopped);
                // What a handler may still wait for ends with the process.
                runtime.shutdown_timeout(Duration::from_secs(1));
            };
            std::thread::Builder::new().name("pcache-api".into()).spawn(body)
        };
        let thread = start().map_err(RunError::os("starting the control API"))?;
        Ok(Api { stop: Some(stop), thread: Some(thread), _bound: bound })
    }
}

/// The API at work. Dropping it ends it; the socket is gone then.
pub struct Api {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    _bound: Option<Bound>,
}

impl Drop for Api {
    fn drop(&mut self) {
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the control API has ended early");
        }
    }
}

fn run(
    runtime: &Runtime,
    listener: UnixListener,
    metrics: Option<TcpListener>,
    daemon: &Arc<Daemon>,
    allowed: Allowed,
    stopped: oneshot::Receiver<()>,
) {
    let guests = Guests::default();
    runtime.block_on(async {
        let sampled = Arc::clone(daemon);
        tokio::spawn(async move {
            loop {
                sleep(SAMPLE_INTERVAL).await;
                sampled.sample();
            }
        });
        match tokio::net::UnixListener::from_std(listener) {
            Ok(listener) => {
                drop(tokio::spawn(accept_unix(listener, daemon.clone(), allowed, guests.clone())))
            }
            Err(error) => tracing::error!(%error, "the control socket cannot be served"),
        }
        if let Some(metrics) = metrics {
            match tokio::net::TcpListener::from_std(metrics) {
                Ok(listener) => drop(tokio::spawn(accept_tcp(listener, daemon.clone(), guests))),
                Err(error) => tracing::error!(%error, "the address for metrics cannot be served"),
            }
        }
        // Whichever way the sender went, this is the end; tasks end with the runtime.
        drop(stopped.await);
    });
}

async fn accept_unix(
    listener: tokio::net::UnixListener,
    daemon: Arc<Daemon>,
    allowed: Allowed,
    guests: Guests,
) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a control connection cannot be accepted, trying again");
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let Ok(peer) = stream.peer_cred() else { continue };
        let groups = || sys::peer_groups(stream.as_fd()).unwrap_or_default();
        if !allowed.allows(peer.uid(), peer.gid(), groups) {
            tracing::warn!(
                uid = peer.uid(),
                gid = peer.gid(),
                "a control connection of a stranger is refused"
            );
            continue;
        }
        if let Some(place) = guests.enter(Some(peer.uid())) {
            tokio::spawn(serve(stream, daemon.clone(), Scope::All, place));
        }
    }
}

async fn accept_tcp(listener: tokio::net::TcpListener, daemon: Arc<Daemon>, guests: Guests) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if let Some(place) = guests.enter(None) {
                    tokio::spawn(serve(stream, daemon.clone(), Scope::Metrics, place));
                }
            }
            Err(error) => {
                tracing::warn!(%error, "a connection for metrics cannot be accepted, trying again");
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// What a connection may ask for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scope {
    All,
    Metrics,
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, daemon: Arc<Daemon>, scope: Scope, place: Place) {
    let service = service_fn(move |request| answer(daemon.clone(), scope, request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_MAX)
        .serve_connection(TokioIo::new(stream), service);
    // What a client does wrong is its own business; it has been answered if that was possible.
    drop(timeout(CONNECTION_MAX, connection).await);
    drop(place);
}

async fn answer(
    daemon: Arc<Daemon>,
    scope: Scope,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let reply = match timeout(BODY_TIMEOUT, take(request)).await {
        Ok(Ok(taken)) => work(daemon, scope, taken).await,
        Ok(Err(refused)) => refused.reply(),
        Err(_) => Refused::new(Kind::BadRequest, &"the body did not come in time").reply(),
    };
    let response = Response::builder()
        .status(reply.status)
        .header("content-type", reply.content_type)
        .header("cache-control", "no-store")
        .body(Full::new(Bytes::from(reply.body)));
    Ok(response.expect("a status and two plain headers"))
}

/// A request, read whole.
struct Taken {
    method: String,
    path: String,
    query: String,
    body: Bytes,
}

async fn take(request: Request<Incoming>) -> Result<Taken, Refused> {
    let (head, body) = request.into_parts();
    let body = match Limited::new(body, BODY_MAX).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => {
            return Err(Refused::new(Kind::TooLarge, &format!("the body is longer than {BODY_MAX} bytes")));
        }
        Err(_) => return Err(Refused::new(Kind::BadRequest, &"the body is not whole")),
    };
    Ok(Taken {
        method: head.method.as_str().into(),
        path: head.uri.path().into(),
        query: head.uri.query().unwrap_or_default().into(),
        body,
    })
}

/// Does it beside the thread of the connections: a handler may wait for a lock for a moment.
async fn work(daemon: Arc<Daemon>, scope: Scope, taken: Taken) -> Reply {
    if scope == Scope::Metrics && taken.path != "/metrics" {
        return Refused::new(Kind::NotFound, &"only /metrics is here").reply();
    }
    let Taken { method, path, query, body } = taken;
    let done = tokio::task::spawn_blocking(move || dispatch(&daemon, &method, &path, &query, &body)).await;
    // A panic is a bug of ours; the daemon lives, and so does the client.
    done.unwrap_or_else(|_| Refused::new(Kind::Failed, &"the daemon failed at it: see its log").reply())
}

/// Who may use the API, whatever the socket's mode was changed to.
#[derive(Clone, Copy, Debug)]
struct Allowed {
    uid: u32,
    gid: Option<u32>,
}

impl Allowed {
    fn allows(&self, uid: u32, gid: u32, groups: impl FnOnce() -> Vec<u32>) -> bool {
        let is_member = |of: u32| gid == of || groups().contains(&of);
        uid == 0 || uid == self.uid || self.gid.is_some_and(is_member)
    }
}

/// The connections at work, by user; none for those over TCP.
#[derive(Clone, Default)]
struct Guests(Arc<Mutex<HashMap<Option<u32>, usize>>>);

/// One of them.
struct Place(Guests, Option<u32>);

impl Guests {
    /// A place, if there is one. Who gets none is hung up on.
    fn enter(&self, user: Option<u32>) -> Option<Place> {
        let mut guests = lock(&self.0);
        let all: usize = guests.values().sum();
        let own = guests.entry(user).or_default();
        if all >= CONNECTIONS_MAX || *own >= PER_USER_MAX {
            return None;
        }
        *own += 1;
        Some(Place(self.clone(), user))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut guests = lock(&self.0.0);
        if let Some(own) = guests.get_mut(&self.1) {
            *own -= 1;
            if *own == 0 {
                guests.remove(&self.1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_the_owner_and_the_group_may_use_it_and_nobody_else() {
        let allowed = Allowed { uid: 990, gid: Some(36) };
        let rows = [
            (0, 0, vec![], true),
            (990, 990, vec![], true),
            (1000, 36, vec![], true),
            (1000, 1000, vec![4, 36], true),
            (1000, 1000, vec![4], false),
            (1000, 990, vec![], false),
        ];
        for (uid, gid, groups, expected) in rows {
            assert_eq!(allowed.allows(uid, gid, || groups.clone()), expected, "{uid} {gid} {groups:?}");
        }
        assert!(!Allowed { uid: 990, gid: None }.allows(1000, 36, || vec![36]));
    }

    #[test]
    fn one_user_cannot_take_every_place() {
        let guests = Guests::default();
        let mine: Vec<_> = (0..PER_USER_MAX).map(|_| guests.enter(Some(1)).unwrap()).collect();
        assert!(guests.enter(Some(1)).is_none());
        assert!(guests.enter(Some(2)).is_some(), "another one has");
        drop(mine);
        assert!(guests.enter(Some(1)).is_some());
        assert!(lock(&guests.0).is_empty(), "nobody is remembered who has gone");
    }
}
