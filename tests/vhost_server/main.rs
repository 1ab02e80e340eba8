//! What the vhost-user-blk server promises a front end, right or wrong, through its socket.
#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

#[allow(dead_code, reason = "shared with another test")]
mod disk;
mod frontend;

mod changes;
mod hostile;
mod protocol;
mod requests;

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pcache_vhost::vhost::{self, Options, Server, Stopper};

use disk::{Handle, RamDisk};
use frontend::{Frontend, PATIENCE};

/// Waits for `condition`, at most the tests' patience.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// A server on a socket of its own, stopped when dropped.
struct Running {
    path: PathBuf,
    stopper: Stopper,
    handle: vhost::Handle,
    thread: Option<JoinHandle<std::io::Result<()>>>,
    disk: Arc<RamDisk>,
    _dir: tempfile::TempDir,
}

impl Running {
    fn new(disk: Arc<RamDisk>) -> Self {
        Self::with(disk, Options::default())
    }

    fn with(disk: Arc<RamDisk>, options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let server = Server::new(listener, Arc::new(Handle(Arc::clone(&disk))), options).unwrap();
        let (stopper, handle) = (server.stopper(), server.handle());
        let thread = Some(std::thread::spawn(move || server.run()));
        Self { path, stopper, handle, thread, disk, _dir: dir }
    }

    fn connect(&self) -> Frontend {
        Frontend::connect(&self.path)
    }

    /// A front end that has negotiated everything and shared its memory.
    fn ready(&self) -> Frontend {
        let mut frontend = self.connect();
        frontend.negotiate(u64::MAX);
        frontend.share_memory();
        frontend
    }

    /// Asks the server to stop and waits until it has.
    fn stop(&mut self) {
        self.stopper.stop();
        let Some(thread) = self.thread.take() else { return };
        eventually("the server to stop", || thread.is_finished());
        thread.join().unwrap().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.stop();
        }
    }
}
