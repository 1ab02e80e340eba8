//! What a front end is told of a configuration that changes, and what it can do with the channel on
//! which it is told.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::disk::{RamDisk, SECTORS};
use crate::frontend::*;
use crate::{Running, eventually};

const REPLY_ACK: u64 = 1 << 3;
const VERSION: u32 = 1;

/// A front end with a ring that runs and a channel; the channel's other end.
fn with_channel(server: &Running, protocol: u64) -> (Frontend, Ring, UnixStream) {
    let mut frontend = server.connect();
    frontend.negotiate_with(u64::MAX, protocol);
    frontend.share_memory();
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(frontend.send(SET_BACKEND_REQ_FD, VERSION, &[], &[theirs.as_raw_fd()]));
    assert_eq!(frontend.capacity(), SECTORS, "read before anything runs");
    let ring = frontend.start_ring(0, 64);
    assert_eq!(frontend.capacity(), SECTORS, "and as the ring runs");
    (frontend, ring, ours)
}

/// The next message on the channel: its flags.
fn told(channel: &mut UnixStream) -> u32 {
    let mut bytes = [0; 12];
    channel.read_exact(&mut bytes).expect("the front end is told");
    assert_eq!(bytes[..4], 2u32.to_ne_bytes(), "CONFIG_CHANGE_MSG");
    assert_eq!(bytes[8..], [0; 4], "without a body");
    u32::from_ne_bytes(bytes[4..8].try_into().unwrap())
}

fn answer(channel: &mut UnixStream) {
    let header: Vec<u8> = [2, VERSION | 4, 8u32].iter().flat_map(|field| field.to_ne_bytes()).collect();
    channel.write_all(&[&header[..], &[0; 8]].concat()).expect("the back end hears");
}

/// That nothing more is said for a while.
fn silent(channel: &mut UnixStream) {
    channel.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(channel.read_exact(&mut [0]).is_err(), "nothing more is said");
    channel.set_read_timeout(Some(PATIENCE)).unwrap();
}

/// The status of a read of one sector.
fn read(ring: &mut Ring, sector: u64) -> u8 {
    ring.run(IN, sector, &[], 512).status
}

fn resize(server: &Running, sectors: u64) {
    server.disk.config.lock().unwrap().sectors = sectors;
    server.disk.bytes.lock().unwrap().resize(sectors as usize * 512, 0);
    server.handle.config_changed();
}

#[test]
fn a_front_end_is_told_of_a_new_size_and_reads_it() {
    for (protocol, flags) in [(u64::MAX, VERSION | NEED_REPLY), (!REPLY_ACK, VERSION)] {
        let server = Running::new(RamDisk::new());
        let (frontend, mut ring, mut channel) = with_channel(&server, protocol);
        eventually("the channel to be there", || server.handle.is_heard());
        for sectors in [2 * SECTORS, 3 * SECTORS] {
            resize(&server, sectors);
            assert_eq!(told(&mut channel), flags);
            assert_eq!(frontend.capacity(), sectors);
            if flags & NEED_REPLY != 0 {
                answer(&mut channel);
            }
            assert_eq!(read(&mut ring, sectors - 1), 0, "the new part is there");
        }
        silent(&mut channel);
    }
}

#[test]
fn changes_before_an_answer_are_told_once_after_it() {
    let server = Running::new(RamDisk::new());
    let (frontend, _ring, mut channel) = with_channel(&server, u64::MAX);
    resize(&server, SECTORS + 1);
    told(&mut channel);
    for more in 2..10 {
        resize(&server, SECTORS + more);
        frontend.capacity();
    }
    silent(&mut channel);
    answer(&mut channel);
    told(&mut channel);
    answer(&mut channel);
    silent(&mut channel);
}

#[test]
fn a_front_end_that_never_reads_its_channel_holds_nothing_up() {
    for protocol in [u64::MAX, !REPLY_ACK] {
        let mut server = Running::new(RamDisk::new());
        let (frontend, mut ring, channel) = with_channel(&server, protocol);
        for change in 0..3000 {
            resize(&server, SECTORS + change % 7);
            if change % 100 == 0 {
                assert_eq!(read(&mut ring, change), 0);
                frontend.capacity();
            }
        }
        server.stop();
        drop(channel);
    }
}

#[test]
fn a_channel_that_is_closed_or_misused_ends_alone() {
    type Act = fn(UnixStream) -> Option<UnixStream>;
    let acts: [(&str, Act); 3] = [
        ("closed", |_| None),
        ("garbage", |mut channel| {
            channel.write_all(&[0xee; 100]).unwrap();
            Some(channel)
        }),
        ("shut down", |channel| {
            channel.shutdown(std::net::Shutdown::Both).unwrap();
            Some(channel)
        }),
    ];
    for (what, act) in acts {
        let server = Running::new(RamDisk::new());
        let (frontend, mut ring, channel) = with_channel(&server, u64::MAX);
        eventually("the channel to be there", || server.handle.is_heard());
        let left = act(channel);
        eventually("the channel to be gone", || !server.handle.is_heard());
        resize(&server, SECTORS + 8);
        assert_eq!(frontend.capacity(), SECTORS + 8, "{what}: it can still ask");
        assert_eq!(read(&mut ring, 1), 0, "{what}");
        drop(left);
        // And hand over another.
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        assert!(frontend.send(SET_BACKEND_REQ_FD, VERSION, &[], &[theirs.as_raw_fd()]));
        eventually("the other channel to be there", || server.handle.is_heard());
        resize(&server, SECTORS);
        told(&mut ours);
    }
}

#[test]
fn a_change_that_nobody_could_be_told_of_is_told_when_rings_run() {
    let server = Running::new(RamDisk::new());
    // A front end that comes back and does not ask again, as QEMU does.
    let mut frontend = server.connect();
    frontend.negotiate(u64::MAX);
    frontend.share_memory();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(frontend.send(SET_BACKEND_REQ_FD, VERSION | NEED_REPLY, &[], &[theirs.as_raw_fd()]));
    assert_eq!(frontend.receive().expect("an acknowledgement").1, [0; 8]);
    silent(&mut ours);
    let _ring = frontend.start_ring(0, 64);
    told(&mut ours);
    answer(&mut ours);
    assert_eq!(frontend.capacity(), SECTORS);
    // One that has asked and was told while nothing ran is told again.
    let (frontend, _ring, mut channel) = {
        drop(frontend);
        let mut frontend = server.connect();
        frontend.negotiate(u64::MAX);
        frontend.share_memory();
        assert_eq!(frontend.capacity(), SECTORS);
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        assert!(frontend.send(SET_BACKEND_REQ_FD, VERSION, &[], &[theirs.as_raw_fd()]));
        eventually("the channel to be there", || server.handle.is_heard());
        resize(&server, 2 * SECTORS);
        let mut channel = ours;
        told(&mut channel);
        answer(&mut channel);
        let ring = frontend.start_ring(0, 64);
        (frontend, ring, channel)
    };
    told(&mut channel);
    assert_eq!(frontend.capacity(), 2 * SECTORS);
}

#[test]
fn a_front_end_that_leaves_its_connection_in_its_channel_holds_up_nobody() {
    let server = Running::new(RamDisk::new());
    for round in 0..3 {
        let mut frontend = server.connect();
        frontend.negotiate(u64::MAX);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let left = match round {
            // The connection's own end as the channel.
            0 => frontend.stream.as_raw_fd(),
            // In the queue of the channel: before it is handed over, and after.
            1 => {
                ours.send_with_fds(&[&[0u8; 1][..]], &[frontend.stream.as_raw_fd()]).unwrap();
                theirs.as_raw_fd()
            }
            _ => theirs.as_raw_fd(),
        };
        assert!(frontend.send(SET_BACKEND_REQ_FD, VERSION, &[], &[left]));
        if round == 2 {
            ours.send_with_fds(&[&[0u8; 1][..]], &[frontend.stream.as_raw_fd()]).unwrap();
        }
        drop((frontend, ours, theirs));
        let mut next = server.connect();
        next.negotiate(u64::MAX);
        next.share_memory();
        assert_eq!(read(&mut next.start_ring(0, 64), 3), 0, "round {round}");
    }
}
