//! The API's other end: one request, one answer, within a time. For the verbs.

use std::path::Path;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use super::model::Refusal;

/// Longest time for an answer: handlers take a moment, and a busy host a little more.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of an answer: thousands of volumes have less.
const ANSWER_MAX: usize = 64 << 20;

/// Why there is no answer, or not the one that was hoped for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "no daemon answers at {socket} ({source}): is it running with a control socket, and is this its path? (--control PATH)"
    )]
    NoDaemon {
        /// Where.
        socket: String,
        /// Why not.
        source: std::io::Error,
    },
    /// What listens is no daemon of ours, or went away in the middle.
    #[error("the daemon at {socket} did not answer as it should: {why}")]
    Confused {
        /// Where.
        socket: String,
        /// What was wrong.
        why: String,
    },
    /// The daemon will not do it.
    #[error("{}", .0.message)]
    Refused(Refusal),
}

/// A client of one daemon.
pub struct Client {
    socket: String,
    runtime: Runtime,
}

impl Client {
    /// A client of the daemon at this socket. It connects for each request.
    ///
    /// # Errors
    /// The kernel refused a resource.
    pub fn new(socket: &Path) -> std::io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        Ok(Self { socket: socket.display().to_string(), runtime })
    }

    /// Asks, and reads the answer as a `T`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn ask<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<T, ClientError> {
        let value = self.ask_json(method, path, body)?;
        serde_json::from_value(value).map_err(|error| self.confused(&error))
    }

    /// Asks, and gives the answer as it is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn ask_json(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        let body = body.map_or_else(Vec::new, |body| body.to_string().into_bytes());
        let (status, answer) = self.runtime.block_on(async {
            match timeout(ANSWER_TIMEOUT, self.exchange(method, path, body)).await {
                Ok(answer) => answer,
                Err(_) => Err(self.confused(&format_args!("not within {ANSWER_TIMEOUT:?}"))),
            }
        })?;
        if (200..300).contains(&status) {
            return serde_json::from_slice(&answer).map_err(|error| self.confused(&error));
        }
        Err(match serde_json::from_slice(&answer) {
            Ok(refusal) => ClientError::Refused(refusal),
            Err(_) => self.confused(&format_args!("HTTP status {status}")),
        })
    }

    async fn exchange(&self, method: &str, path: &str, body: Vec<u8>) -> Result<(u16, Bytes), ClientError> {
        let no_daemon = |source| ClientError::NoDaemon { socket: self.socket.clone(), source };
        let stream = UnixStream::connect(&self.socket).await.map_err(no_daemon)?;
        let confused = |error: hyper::Error| self.confused(&error);
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(confused)?;
        // What goes wrong with the connection is told by the request on it.
        tokio::spawn(async move { drop(connection.await) });
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "pcache-vhost")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| self.confused(&error))?;
        let response = sender.send_request(request).await.map_err(confused)?;
        let status = response.status().as_u16();
        let answer = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
        Ok((status, answer.map_err(|error| self.confused(&error))?.to_bytes()))
    }

    fn confused(&self, why: &dyn std::fmt::Display) -> ClientError {
        ClientError::Confused { socket: self.socket.clone(), why: why.to_string() }
    }
}
