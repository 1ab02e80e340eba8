//! A planned upgrade: a running daemon gives everything it serves to its successor.
//!
//! `pcache-vhost --take-over …` connects to `CONTROL.upgrade`, a socket beside the control socket. What
//! passes are descriptors: the cache images and the disks with their locks, which belong to the open file
//! and so are never free in between; the listening sockets with theirs; and each VMM's connection with
//! what that VMM has said. A VMM notices a pause, and nothing else.
//!
//! ```text
//!  successor                                      predecessor, serving
//!    Hello ───────────────────────────────────────►  right version, right user?
//!    ◄─────────────────────── Cache, Disk, Redo, Offered
//!    maps the images, judges disks and volumes
//!    Ready ───────────────────────────────────────►  comes to rest: control API, rings, write-back
//!    ◄────────── Control, Upgrade, Rest, Vhost …, All
//!    All ─────────────────────────────────────────►
//!    ◄─────────────────────────────────────── Yours  ════ the point of no return
//!    recovers, serves
//!    Serving ─────────────────────────────────────►  ends
//! ```
//!
//! Laws:
//! - Before `Yours` the successor changes nothing: it writes neither to an image, nor to a disk that was
//!   there, nor to a ring. Until then whatever fails, on either side or between them, leaves the
//!   predecessor serving, from the memory it has, as if nothing had been asked.
//! - `Yours` is sent when nothing of the predecessor's is under way any more: rings have stopped with
//!   everything returned, workers have ended, no disk owes an answer. A disk that owes one is refused:
//!   the lock, which makes a successor of the dead wait, does not help between the living.
//! - From `Yours` on the predecessor touches nothing and ends without its destructors: sockets and locks
//!   are another's. If the successor dies, that is a death like any other: VMMs reconnect, and what was
//!   in flight is in their in-flight areas. For the same reason the engine is not told of the change: it
//!   recovers from the media as after a kill, the path that is proven best.
//! - The service manager hears of the successor from the predecessor, when that serves: a manager that
//!   watched it earlier would take its death for that of the service, while the predecessor serves on.
//! - Both ends are of one user, or root's, as the kernel says; nobody else is answered.
//! - Every wait is bounded, and so is every message, before it is believed.
//! - One hand-over at a time, and none while the daemon stops, a job runs, a checkpoint holds a disk, or a
//!   disk or the cache has failed.

mod give;
mod take;
mod wire;

use std::io;
use std::path::PathBuf;

pub use self::give::{Gate, Giver};
pub use self::take::{Estate, FrontEndRest, Predecessor};
use super::config::ControlConfig;
use super::value::{SocketPath, ValueError};

/// What is appended to the control socket's name.
const SUFFIX: &str = ".upgrade";

/// Why nothing was handed over.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// There is no place for it.
    #[error(
        "there is no daemon to take over from without a control socket: name it with --control or [control]"
    )]
    NoControl,
    /// The name is too long.
    #[error("the socket for upgrades: {0}")]
    Path(#[from] ValueError),
    /// Who answers is somebody else.
    #[error("{socket} belongs to user {uid}: only root and one's own user are taken over from", socket = .socket.display())]
    Stranger {
        /// Where.
        socket: PathBuf,
        /// Whose.
        uid: u32,
    },
    /// It says something that nobody says there.
    #[error("the other daemon does not keep to the protocol of upgrades: {0}")]
    Protocol(String),
    /// It cannot be now.
    #[error("{0}")]
    NotNow(String),
    /// It does not want to.
    #[error("the running daemon goes on: {0}")]
    Refused(String),
    /// It serves what this one would not.
    #[error(
        "the running daemon serves volume `{0}`, and this configuration does not: add it, or detach it first"
    )]
    Forgotten(String),
    /// A volume's VMMs would not find it.
    #[error("volume `{volume}` is served at {served}, and would be at {wanted}: change that by a restart")]
    Moved {
        /// Which.
        volume: String,
        /// Where it is.
        served: String,
        /// Where it would be.
        wanted: String,
    },
    /// The connection failed.
    #[error("{doing} the other daemon: {source}")]
    Io {
        /// A participle.
        doing: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl HandoverError {
    fn io(doing: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}

/// Where a daemon that is controlled at that socket can be taken over from.
fn socket(control: &ControlConfig) -> Result<SocketPath, HandoverError> {
    Ok(SocketPath::new(control.socket.with_suffix(SUFFIX).as_os_str())?)
}
