//! Descriptors do not leak, whatever a connection goes through. Alone in its process, because it
//! counts them.
#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "vhost_server/disk.rs"]
#[allow(dead_code)]
mod disk;
#[path = "vhost_server/frontend.rs"]
#[allow(dead_code)]
mod frontend;

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Instant;

use pcache_vhost::vhost::{Options, Server};

use disk::{Handle, RamDisk};
use frontend::*;

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .filter(|line| line.contains("/dev/shm"))
        .count()
}

#[test]
fn neither_descriptors_nor_mappings_outlive_their_connection() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let disk = RamDisk::new();
    let listener = UnixListener::bind(&path).unwrap();
    let server = Server::new(listener, Arc::new(Handle(Arc::clone(&disk))), Options::default()).unwrap();
    let stopper = server.stopper();
    let thread = std::thread::spawn(move || server.run());
    // The first connection may load what stays.
    connection(&path, 0);
    let settled = settle(&path, &disk);
    let (fds, maps) = (open_descriptors(), mappings());
    drop(settled);
    for round in 0..200 {
        connection(&path, round);
    }
    let settled = settle(&path, &disk);
    assert_eq!(open_descriptors(), fds);
    assert_eq!(mappings(), maps);
    drop(settled);
    stopper.stop();
    thread.join().unwrap().unwrap();
}

/// Waits until the server is done with every earlier connection, and drops the wakers that the
/// test's disk has collected. While the result lives, the server is at rest.
fn settle(path: &std::path::Path, disk: &RamDisk) -> Frontend {
    let frontend = Frontend::connect(path);
    frontend.ask_u64(GET_FEATURES);
    disk.forget_wakers();
    frontend
}

fn connection(path: &std::path::Path, round: usize) {
    let mut frontend = Frontend::connect(path);
    frontend.negotiate(u64::MAX);
    frontend.share_memory();
    let (area, file) = frontend.get_inflight(4, 64);
    frontend.must(SET_INFLIGHT_FD, &area, &[file.as_raw_fd()]);
    let mut rings: Vec<Ring> = (0..3).map(|index| frontend.start_ring(index, 64)).collect();
    for ring in &mut rings {
        assert_eq!(ring.run(OUT, 0, &[1; 512], 0).status, 0);
    }
    let fd = frontend.memory.as_raw_fd();
    let many: Vec<RawFd> = vec![fd; 33];
    match round % 8 {
        0 => frontend.share_memory(),
        1 => {
            // More descriptors than a message may have.
            frontend.send(SET_MEM_TABLE, 1, &table_body(&[(0, MEMORY, USER, 0)]), &many);
            assert!(frontend.is_closed());
        }
        2 => {
            frontend.send(SET_FEATURES, 1, &u64_body(0), &many[..32]);
            assert!(frontend.is_closed());
        }
        3 => {
            // Descriptors with half a message.
            frontend.stream.set_nonblocking(false).unwrap();
            let half = [SET_MEM_TABLE.to_ne_bytes(), 1u32.to_ne_bytes()].concat();
            vmm_sys_util::sock_ctrl_msg::ScmSocket::send_with_fds(&frontend.stream, &[&half[..]], &many[..5])
                .unwrap();
        }
        4 => assert_eq!(frontend.tell(ADD_MEM_REG, &single_region_body(0, 1, 0, 0), &[fd]), Some(1)),
        5 => assert_eq!(frontend.tell(77, &[], &many[..3]), Some(1)),
        6 => frontend.must(REM_MEM_REG, &single_region_body(0, MEMORY, USER, 0), &[fd]),
        _ => frontend.must(RESET_DEVICE, &[], &[]),
    }
}
