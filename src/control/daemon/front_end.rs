//! The front end of one volume: the socket and the thread that serves it.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::super::config::VolumeConfig;
use super::super::run::RunError;
use super::super::signals::Running;
use super::super::socket::{Bound, Claimed, Incoming};
use crate::cache::Volume;
use crate::cache::volume::VolumeDisk;
use crate::tools::Host;
use crate::vhost::{self, Handle, Presence, Server, Stopper};

/// A front end at work. Dropping it asks it to end and does not wait.
pub struct FrontEnd {
    stopper: Stopper,
    presence: Presence,
    handle: Handle,
    thread: Option<JoinHandle<io::Result<()>>>,
    /// Removes the socket.
    _bound: Option<Bound>,
}

impl FrontEnd {
    /// Opens a claimed endpoint to VMMs. `running` is let go when it ends.
    ///
    /// # Errors
    /// The kernel refused the socket or the thread.
    pub fn open(
        claim: Claimed,
        config: &VolumeConfig,
        volume: &Arc<Volume<Host>>,
        running: Running,
    ) -> Result<Self, RunError> {
        let (incoming, bound) = claim.open()?;
        let endpoint = match incoming {
            Incoming::Listener(listener) => vhost::Endpoint::Listener(listener),
            Incoming::Connected(stream) => vhost::Endpoint::Stream(stream),
        };
        let options = vhost::Options {
            name: config.name.as_str().into(),
            poll_max: Duration::from_micros(config.poll_us.into()),
            ..vhost::Options::default()
        };
        let disk = Arc::new(VolumeDisk(Arc::clone(volume)));
        let start = || {
            let server = Server::new(endpoint, disk, options)?;
            let (stopper, presence, handle) = (server.stopper(), server.presence(), server.handle());
            let name: String = format!("vhost-{}", config.name).chars().take(15).collect();
            let thread = std::thread::Builder::new().name(name).spawn(move || {
                let _running = running;
                server.run()
            })?;
            Ok((stopper, presence, handle, thread))
        };
        let (stopper, presence, handle, thread) = start().map_err(RunError::os("starting the server"))?;
        Ok(Self { stopper, presence, handle, thread: Some(thread), _bound: bound })
    }

    /// Whether a VMM is connected.
    pub fn is_connected(&self) -> bool {
        self.presence.is_connected()
    }

    /// Has the VMM told that the disk's configuration has changed. Whether one is there that hears it.
    pub fn config_changed(&self) -> bool {
        self.handle.config_changed();
        self.handle.is_heard()
    }

    /// Asks it to end: it finishes what is in flight first.
    pub fn stop(&self) {
        self.stopper.stop();
    }

    /// Waits for its end; the socket is gone then.
    ///
    /// # Errors
    /// What ended it before it was told to.
    pub fn join(mut self) -> Result<(), RunError> {
        self.stopper.stop();
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(ended)) => ended.map_err(RunError::os("accepting front ends")),
            Some(Err(panic)) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for FrontEnd {
    fn drop(&mut self) {
        self.stopper.stop();
    }
}
