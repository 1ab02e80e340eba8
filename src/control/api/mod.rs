//! The control API: what can be asked of the running daemon, over HTTP and JSON on a Unix socket.
//!
//! [`ROUTES`] is the whole of it: the server dispatches by it, and `docs/openapi.json` is made of it.
//! A handler takes a moment and no more: what may take long becomes a job, and the answer is its
//! number. So one thread serves everybody, and a status is to be had whatever the disks do.
//!
//! Laws:
//! - Nothing on the data path knows of this. A client can make the daemon busy on one thread at
//!   [`server`]'s bounds, and nothing else.
//! - Who may connect is decided by the socket's mode and group, and once more by the peer's
//!   credentials.
//! - A request is obeyed whole or refused whole, with a sentence.

pub mod client;
pub mod model;
#[cfg(test)]
mod openapi;
mod routes;
pub mod server;

pub use self::routes::{Body, ROUTES, Reply, Route, dispatch};
pub use self::server::{Api, Claimed};

use self::model::Refusal;
use super::daemon::DaemonError;
use super::exit::sentence;

/// What a refusal is to a program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The request makes no sense.
    BadRequest,
    /// What it names is not there.
    NotFound,
    /// Not by this method.
    NotAllowed,
    /// Not now, or not as things are.
    Conflict,
    /// Longer than any sensible request.
    TooLarge,
    /// It was tried and failed.
    Failed,
}

impl Kind {
    /// Its HTTP status (RFC 9110 §15).
    pub fn status(self) -> u16 {
        match self {
            Kind::BadRequest => 400,
            Kind::NotFound => 404,
            Kind::NotAllowed => 405,
            Kind::Conflict => 409,
            Kind::TooLarge => 413,
            Kind::Failed => 500,
        }
    }

    /// Its word.
    pub fn word(self) -> &'static str {
        match self {
            Kind::BadRequest => "bad-request",
            Kind::NotFound => "not-found",
            Kind::NotAllowed => "not-allowed",
            Kind::Conflict => "conflict",
            Kind::TooLarge => "too-large",
            Kind::Failed => "failed",
        }
    }
}

/// A request that was not obeyed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refused {
    /// For programs.
    pub kind: Kind,
    /// For people.
    pub message: String,
}

impl Refused {
    /// A refusal for this reason.
    pub fn new(kind: Kind, why: &dyn std::fmt::Display) -> Self {
        Self { kind, message: sentence(why) }
    }

    /// As it is answered.
    pub fn reply(&self) -> Reply {
        let refusal = Refusal { kind: self.kind.word().into(), message: self.message.clone() };
        Reply::json(self.kind.status(), &refusal)
    }
}

impl From<DaemonError> for Refused {
    fn from(error: DaemonError) -> Self {
        let kind = match &error {
            DaemonError::NoVolume { .. } | DaemonError::NoJob(_) => Kind::NotFound,
            DaemonError::Run(error) if error.exit() == super::exit::Exit::Usage => Kind::BadRequest,
            DaemonError::Run(_) => Kind::Failed,
            _ => Kind::Conflict,
        };
        Self::new(kind, &error)
    }
}
