//! Servers that do less than ours, by the same front end: what is left when they are taken off is the
//! engine's price.
//!
//! `null` completes what it is asked and touches no data. `copy` copies 4 KiB and more between the guest
//! and memory on tmpfs, with the stores and the fence per batch that ours makes, and remembers nothing else.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use pcache_vhost::pmem::guard::ForeignSliceMut;
use pcache_vhost::pmem::{MappedPmem, OpenOptions, Pmem};
use pcache_vhost::vhost::{Options, Server};
use pcache_vhost::volume::{Buffer, Disk, DiskConfig, DiskQueue, Done, Request, RequestKind, Status};
use pcache_vhost::wake::Waker;

struct Null {
    sectors: u64,
    memory: Option<Arc<MappedPmem>>,
}

struct NullQueue<B> {
    memory: Option<Arc<MappedPmem>>,
    done: Vec<Done<B>>,
    is_written: bool,
}

impl Disk for Null {
    type Queue<B: Buffer> = NullQueue<B>;

    fn config(&self) -> DiskConfig {
        DiskConfig {
            sectors: self.sectors,
            block_size: 512,
            physical_block_size: 4096,
            optimal_io_size: 0,
            read_only: false,
            serial: [0; 20],
            queues: 2,
            queue_size: 128,
        }
    }

    fn write_cache(&self) -> bool {
        true
    }

    fn set_write_cache(&self, _on: bool) {}

    fn open_queue<B: Buffer>(&self, _index: u16, _waker: Waker) -> io::Result<NullQueue<B>> {
        Ok(NullQueue { memory: self.memory.clone(), done: Vec::new(), is_written: false })
    }
}

impl<B: Buffer> NullQueue<B> {
    /// Copies between the guest and the memory at the request's sector, wrapped to fit.
    fn copy(&mut self, memory: &MappedPmem, request: &mut Request<B>) -> bool {
        let len = request.data.len();
        let mut block = [0; 4096];
        let room = memory.len() - len as u64;
        for at in (0..len).step_by(4096) {
            let place = ((request.sector * 512 % room) & !4095) + at as u64;
            let is_whole = len - at >= 4096;
            let part = &mut block[..(len - at).min(4096)];
            let copied = match request.kind {
                RequestKind::Write => {
                    self.is_written = true;
                    let stored = request
                        .data
                        .lend(at, 4096 * usize::from(is_whole), |src| memory.write_summed(place, src));
                    stored.flatten().is_some()
                        || (request.data.copy_out(at, part).is_ok() && memory.write(place, part).is_ok())
                }
                _ => {
                    let len = 4096 * usize::from(is_whole);
                    let pass = |mut to: ForeignSliceMut<'_>| memory.read_summed(place, &mut to);
                    request.data.lend_mut(at, len, pass).flatten().is_some()
                        || (memory.read(place, part).is_ok() && request.data.copy_in(at, part).is_ok())
                }
            };
            if !copied {
                return false;
            }
        }
        true
    }
}

impl<B: Buffer> DiskQueue<B> for NullQueue<B> {
    fn submit(&mut self, mut request: Request<B>) {
        let memory = self.memory.clone();
        let is_done = match (&memory, request.kind) {
            (Some(memory), RequestKind::Read | RequestKind::Write) => self.copy(memory, &mut request),
            _ => true,
        };
        let status = if is_done { Status::Ok } else { Status::IoError };
        self.done.push(Done { tag: request.tag, status, data: request.data });
    }

    fn commit(&mut self) {
        if let (true, Some(memory)) = (std::mem::take(&mut self.is_written), &self.memory) {
            memory.fence();
        }
    }

    fn poll(&mut self, done: &mut Vec<Done<B>>) {
        done.append(&mut self.done);
    }

    fn pending(&self) -> usize {
        self.done.len()
    }

    fn park(&mut self) {}

    fn leave_behind(self) {}
}

/// Serves until killed. `memory` names the file that `copy` copies to.
pub fn serve(socket: &Path, bytes: u64, memory: Option<&Path>) -> io::Result<()> {
    let memory = match memory {
        Some(path) => {
            pcache_vhost::pmem::create(path, bytes).map_err(io::Error::other)?;
            let options = OpenOptions { assume_dax: true, prefault: true, ..OpenOptions::new(path) };
            Some(Arc::new(MappedPmem::open(&options).map_err(io::Error::other)?))
        }
        None => None,
    };
    let disk = Null { sectors: bytes * 4 / 512, memory };
    Server::new(UnixListener::bind(socket)?, Arc::new(disk), Options::default())?.run()
}
