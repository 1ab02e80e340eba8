//! VMMs that do not run here, message for message: what each sends from its connection to the guest's
//! first request and to its end, as its source and documentation have it (Firecracker 1.13, crosvm of
//! August 2026, Cloud Hypervisor after its change for configuration changes).

mod client;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use client::front::{queues_in, ring_addresses};
use client::request::OK;
use client::wire::{Inflight, feature, protocol};
use client::{Client, ClientOptions, Daemon, Memory, Req, Request, Wire, Workspace};

const MIB: u64 = 1 << 20;
const DISK: u64 = 64 * MIB;
const PATIENCE: Duration = Duration::from_secs(20);
/// DEVICE_STATE and SHMEM, which are not offered.
const NEVER: u64 = 1 << 19 | 1 << 22;

fn server(queues: u16) -> (Workspace, Daemon) {
    let workspace = Workspace::new();
    let daemon = Daemon::cached(&workspace, "64MiB", DISK, queues, &[]);
    (workspace, daemon)
}

fn options(queues: u16, features: u64) -> ClientOptions {
    let event_idx = features & feature::EVENT_IDX != 0;
    ClientOptions {
        queues,
        queue_size: 256,
        event_idx,
        features,
        patience: PATIENCE,
        ..ClientOptions::default()
    }
}

/// Writes on every queue, reads it back, and reads from the other queues what one has written.
fn exchange(client: &mut Client, stamp: u8) {
    for queue in 0..client.queues.len() {
        client.assert_works(queue, stamp + queue as u8);
    }
    let data = vec![stamp; 8192];
    assert_eq!(client.execute(&Request::write(2048, data.clone())).status, OK);
    let read = client.execute(&Request::read(2048, 8192));
    assert_eq!((read.status, read.data), (OK, data));
}

/// A ring in the order of the vhost crate's users: addresses, base, call, kick.
fn set_up(wire: &Wire, memory: &Memory, queue: &client::Queue, base: u32) {
    wire.tell(Req::SetVringAddr, &ring_addresses(memory, queue, 0), &[]);
    wire.set_vring(Req::SetVringBase, queue.index, base);
    wire.set_vring_fd(Req::SetVringCall, queue.index, Some(queue.call_fd()));
    wire.set_vring_fd(Req::SetVringKick, queue.index, Some(queue.kick.as_raw_fd()));
}

/// Hands over a channel; our end of it.
fn channel(wire: &Wire) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    ours.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
    wire.tell(Req::SetBackendReqFd, &[], &[theirs.as_raw_fd()]);
    ours
}

#[test]
fn firecracker_with_one_queue_no_flush_and_one_protocol_feature() {
    let (_workspace, daemon) = server(1);
    // The default cache type leaves FLUSH out: every completion is durable.
    for flush in [0, feature::BLK_FLUSH] {
        let wire = Wire::connect(daemon.socket(), PATIENCE);
        wire.tell(Req::SetOwner, &[], &[]);
        let wanted =
            feature::VERSION_1 | feature::EVENT_IDX | feature::PROTOCOL_FEATURES | feature::BLK_RO | flush;
        let features = wire.get_u64(Req::GetFeatures) & wanted;
        assert_eq!(features & feature::BLK_RO, 0);
        let protocol = wire.get_u64(Req::GetProtocolFeatures) & protocol::CONFIG;
        wire.set_u64(Req::SetProtocolFeatures, protocol);
        let config = wire.get_config_with(0, 60, 0, 1).expect("60 bytes with flags 1");
        assert_eq!(config[..8], (DISK / 512).to_le_bytes());
        // The guest activates the device: nothing asks for an acknowledgement.
        wire.set_u64(Req::SetFeatures, features);
        let memory = Arc::new(Memory::new(32 * MIB, 2));
        memory.set_table(&wire);
        let mut queues = queues_in(&memory, 1, 256);
        queues[0].event_idx = true;
        wire.set_vring(Req::SetVringNum, 0, 256);
        set_up(&wire, &memory, &queues[0], 0);
        wire.set_vring(Req::SetVringEnable, 0, 1);
        let mut client = Client::assembled(wire, memory, queues, options(1, features));
        exchange(&mut client, 1);
        // PATCH /drives: it reads the configuration again, under the running ring.
        assert_eq!(client.wire.get_config_with(0, 60, 0, 1), Some(config));
        exchange(&mut client, 2);
        // It ends without a word.
    }
}

#[test]
fn crosvm_reads_fields_one_by_one_hands_over_a_channel_and_resets_by_taking_bases() {
    let (_workspace, daemon) = server(2);
    let mut wire = Wire::connect(daemon.socket(), PATIENCE);
    wire.tell(Req::SetOwner, &[], &[]);
    let wanted =
        feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT | feature::PROTOCOL_FEATURES | 0xff_ffff;
    let features = wire.get_u64(Req::GetFeatures) & wanted;
    wire.set_u64(Req::SetFeatures, features);
    let wanted = protocol::CONFIG | protocol::MQ | protocol::BACKEND_REQ | protocol::REPLY_ACK | NEVER;
    let protocol = wire.get_u64(Req::GetProtocolFeatures) & wanted;
    assert_eq!(protocol & NEVER, 0, "or it would ask for what is not there");
    wire.set_u64(Req::SetProtocolFeatures, protocol);
    wire.need_reply = true;
    let mut channel = channel(&wire);
    assert!(wire.get_u64(Req::GetQueueNum) >= 2);
    // The guest's driver reads each field on its own.
    let field = |offset, len| wire.get_config_with(offset, len, 0, 1).expect("a field");
    assert_eq!(field(0, 4), ((DISK / 512) as u32).to_le_bytes());
    assert_eq!(field(4, 4), [0; 4]);
    assert_eq!(field(20, 4), 512u32.to_le_bytes());
    assert_eq!(field(34, 2), 2u16.to_le_bytes());
    let memory = Arc::new(Memory::new(32 * MIB, 2));
    let start = |wire: &Wire, memory: &Memory, queues: &[client::Queue]| {
        wire.set_u64(Req::SetFeatures, features);
        memory.set_table(wire);
        for queue in queues {
            wire.set_vring(Req::SetVringNum, queue.index, u32::from(queue.size));
            set_up(wire, memory, queue, 0);
            wire.set_vring(Req::SetVringEnable, queue.index, 1);
        }
    };
    let mut queues = queues_in(&memory, 2, 256);
    queues.iter_mut().for_each(|queue| queue.event_idx = true);
    start(&wire, &memory, &queues);
    let mut client = Client::assembled(wire, memory.clone(), queues, options(2, features));
    exchange(&mut client, 1);
    // The guest's driver resets the device: rings are disabled, their bases taken; then it begins anew.
    for _ in 0..3 {
        for index in 0..2 {
            client.wire.set_vring(Req::SetVringEnable, index, 0);
            client.stop_ring(index.into());
        }
        client.queues.iter_mut().for_each(client::Queue::reset);
        start(&client.wire, &memory, &client.queues);
        exchange(&mut client, 4);
    }
    // What it was told of on the channel was nothing: it has read the configuration as it is.
    channel.set_nonblocking(true).expect("it can be");
    assert!(channel.read(&mut [0]).is_err(), "nothing has changed");
}

#[test]
fn cloud_hypervisor_with_a_channel_comes_back_and_is_told_to_look() {
    let (_workspace, mut daemon) = server(1);
    let memory = Arc::new(Memory::new(32 * MIB, 1));
    let mut kept: Option<(Inflight, Vec<client::Queue>)> = None;
    for life in 0..3u8 {
        let mut wire = Wire::connect(daemon.socket(), PATIENCE);
        wire.tell(Req::SetOwner, &[], &[]);
        let wanted = !(feature::RING_PACKED | feature::LOG_ALL);
        let features = wire.get_u64(Req::GetFeatures) & wanted;
        let wanted = protocol::MQ
            | protocol::CONFIGURE_MEM_SLOTS
            | protocol::REPLY_ACK
            | protocol::INFLIGHT_SHMFD
            | protocol::CONFIG
            | protocol::BACKEND_REQ;
        let protocol = wire.get_u64(Req::GetProtocolFeatures) & wanted;
        wire.set_u64(Req::SetProtocolFeatures, protocol);
        wire.need_reply = true;
        if life == 0 {
            // Only once: after a reconnect it believes what it knows.
            assert!(wire.get_u64(Req::GetQueueNum) >= 1);
            assert!(wire.get_config_with(0, 60, client::wire::NEED_REPLY, 1).is_some());
        }
        let mut channel = channel(&wire);
        wire.set_u64(Req::SetFeatures, features);
        memory.set_table(&wire);
        let (inflight, mut queues) = kept.take().unwrap_or_else(|| {
            let mut queues = queues_in(&memory, 1, 256);
            queues[0].event_idx = true;
            (Inflight::get(&wire, 1, 256), queues)
        });
        inflight.set(&wire);
        wire.set_vring(Req::SetVringNum, 0, 256);
        // The available index, wrong for whoever believes it.
        set_up(&wire, &memory, &queues[0], u32::from(queues[0].avail_index()));
        wire.set_vring(Req::SetVringEnable, 0, 1);
        if life > 0 {
            queues[0].kick();
            let mut message = [0; 12];
            channel.read_exact(&mut message).expect("it is told to look again");
            assert_eq!(message[..4], 2u32.to_ne_bytes());
            let answer: Vec<u8> = [2u32, 5, 8, 0, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
            channel.write_all(&answer).expect("the server hears");
            assert!(wire.get_config_with(0, 60, 0, 1).is_some());
        }
        let mut client = Client::assembled(wire, memory.clone(), queues, options(1, features));
        let mut done = Vec::new();
        while client.outstanding() > 0 {
            client.wait(&mut done);
        }
        assert_eq!(done.len(), usize::from(life > 0), "what the last life had in flight comes back once");
        exchange(&mut client, life + 1);
        if life == 2 {
            break;
        }
        // Its server dies with a request in flight, which comes back after all.
        let read = Request::read(2048, 8192);
        assert!(client.submit(0, 9, &read, &client::Layout::plain(&read)));
        daemon.kill();
        client.queues[0].publish();
        daemon.restart();
        kept = Some((inflight, std::mem::take(&mut client.queues)));
    }
}
