//! What a request costs a Linux guest beside the request itself: kicks of the server and interrupts of
//! the guest, printed beside those of a server that does nothing, attached to the same machine.
//!
//! Counts, not times: the null server shares the product's ring and threads and answers at once, so what
//! differs is what the cache does to the rhythm of completions.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use pcache_vhost::vhost::{Options, Server as VhostServer};
use pcache_vhost::volume::{Buffer, Disk, DiskConfig, DiskQueue, Done, Request, Status};
use pcache_vhost::wake::Waker;

use crate::guest::{Guest, GuestOptions};
use crate::prepare::{host, inapplicable};
use crate::qemu;
use crate::server::{Program, Storage};

/// A disk that has done everything at once, and holds nothing.
struct Null;

struct NullQueue<B>(Vec<Done<B>>);

impl Disk for Null {
    type Queue<B: Buffer> = NullQueue<B>;

    fn config(&self) -> DiskConfig {
        DiskConfig {
            sectors: 256 << 11,
            block_size: 512,
            physical_block_size: 4096,
            optimal_io_size: 0,
            read_only: false,
            serial: *b"null\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
            queues: 1,
            queue_size: 256,
        }
    }

    fn write_cache(&self) -> bool {
        true
    }

    fn set_write_cache(&self, _: bool) {}

    fn open_queue<B: Buffer>(&self, _: u16, _: Waker) -> std::io::Result<NullQueue<B>> {
        Ok(NullQueue(Vec::new()))
    }
}

impl<B: Buffer> DiskQueue<B> for NullQueue<B> {
    fn submit(&mut self, request: Request<B>) {
        self.0.push(Done { tag: request.tag, status: Status::Ok, data: request.data });
    }

    fn commit(&mut self) {}

    fn poll(&mut self, done: &mut Vec<Done<B>>) {
        done.append(&mut self.0);
    }

    fn pending(&self) -> usize {
        self.0.len()
    }

    fn park(&mut self) {}

    fn leave_behind(self) {}
}

/// The eventfds that a process has open: by the kernel's number of each, what was written to it and not
/// read.
fn eventfds(pid: u32) -> BTreeMap<u64, u64> {
    let files = fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("the descriptors of a process of ours");
    let texts = files.flatten().filter_map(|file| fs::read_to_string(file.path()).ok());
    let field = |text: &str, name: &str, radix| {
        let value = text.lines().find_map(|line| line.strip_prefix(name))?;
        u64::from_str_radix(value.trim(), radix).ok()
    };
    texts
        .filter_map(|text| Some((field(&text, "eventfd-id:", 10)?, field(&text, "eventfd-count:", 16)?)))
        .collect()
}

/// Kicks that the server `pid` has had of the machine `qemu`: it reads none of its kick descriptors, so
/// each holds their number. What the two share beside them is read by the machine as it comes.
fn kicks(pid: u32, qemu: u32) -> u64 {
    let theirs = eventfds(qemu);
    eventfds(pid).into_iter().filter(|(id, _)| theirs.contains_key(id)).map(|(_, count)| count).sum()
}

#[test]
fn kicks_and_interrupts_of_a_linux_guest_are_few_beside_a_server_that_does_nothing() {
    let Some(host) = host() else { return };
    if Program::chosen() == Program::StorageDaemon {
        return inapplicable("the kicks of another server cannot be counted");
    }
    let storage = Storage::new(Program::chosen(), 512, 256);
    let server = storage.serve();
    let sockets = tempfile::tempdir().expect("a directory for a socket");
    let path = sockets.path().join("null.sock");
    let null =
        VhostServer::new(UnixListener::bind(&path).expect("a socket"), Arc::new(Null), Options::default());
    let null = null.expect("a server");
    let stopper = null.stopper();
    let serving = std::thread::spawn(move || null.run());
    let script = format!(
        "disk vda\n\
         disk vdb\n\
         calls() {{ awk -v d=\"$1\" '$NF ~ d\"-req\" {{ for (i = 2; i < NF; i++) if ($i ~ /^[0-9]+$/) n += $i }} END {{ print n + 0 }}' /proc/interrupts; }}\n\
         requests() {{ awk '{{ print $1 + $5 }}' /sys/block/$1/stat; }}\n\
         run() {{ # disk virtio mark\n\
             local before=$(calls $2) begun=$(requests $1)\n\
             mark $3-begins\n\
             await $3-counted\n\
             {fio}\n\
             mark $3-ends\n\
             await $3-done\n\
             echo COUNTS $1 $(($(requests $1) - begun)) $(($(calls $2) - before))\n\
         }}\n\
         name() {{ basename $(readlink -f /sys/block/$1/device); }}\n\
         dd if=/dev/zero of=/dev/vda bs=1M count=64 oflag=direct 2>/dev/null\n\
         run vda $(name vda) ours\n\
         run vdb $(name vdb) null\n\
         no_kernel_errors\n",
        fio = "fio --name=r --filename=/dev/$1 --direct=1 --ioengine=io_uring --rw=randread --bs=4k --iodepth=32 \
               --iodepth_batch=16 --iodepth_batch_complete_min=8 --size=64M --number_ios=16384 --thread --minimal \
               --randseed=7 >/tmp/fio 2>&1 || { cat /tmp/fio; exit 1; }",
    );
    let options =
        GuestOptions::new(script).vcpus(2).fio().disk(storage.attached(None)).disk(null_disk(&path));
    let mut guest = Guest::boot(host, options);
    let (qemu, own) = (guest.pid(), std::process::id());
    let mut counted = Vec::new();
    for (mark, pid) in [("ours", server.pid()), ("null", own)] {
        guest.wait_for(&format!("{mark}-begins"));
        let before = kicks(pid, qemu);
        guest.go(&format!("{mark}-counted"));
        guest.wait_for(&format!("{mark}-ends"));
        counted.push((mark, kicks(pid, qemu) - before));
        guest.go(&format!("{mark}-done"));
    }
    let report = guest.finish();
    for ((mark, kicks), line) in counted.into_iter().zip(report.after("COUNTS")) {
        let numbers: Vec<f64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
        let (requests, calls) = (numbers[0], numbers[1]);
        let per = (kicks as f64 / requests, calls / requests);
        eprintln!("{mark}: {requests} requests, kicks/request={:.3} interrupts/request={:.3}", per.0, per.1);
        // The guest merges some.
        assert!(requests >= 8192.0 && kicks > 0 && calls > 0.0, "{line}");
        // A guest that keeps 32 in flight and submits 16 at a time needs at most one of each for each.
        assert!(per.0 <= 1.0 && per.1 <= 1.0, "{mark}: {per:?}");
    }
    stopper.stop();
    serving.join().expect("it ends").expect("and well");
    server.stop();
    storage.check();
}

fn null_disk(path: &Path) -> qemu::Disk {
    qemu::Disk::VhostUser { socket: path.to_owned(), queues: 1, reconnect_ms: None, packed: false }
}
