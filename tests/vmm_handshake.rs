//! The handshakes of real front ends, message for message, against our binary.
//!
//! Each order here was recorded from the front end it is named after; what they have in common is
//! that each does something the others do not. `PCACHE_HANDSHAKE_PEER=qemu` runs those tests that a
//! qemu-storage-daemon can pass against one, to tell a fault of the server from one of the test.

mod client;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use client::front::{queues_in, ring_addresses, set_up_ring};
use client::request::{IOERR, OK};
use client::ring::Descriptor;
use client::wire::{Inflight, NEED_REPLY, words};
use client::{
    Client, ClientOptions, Daemon, Layout, Memory, Queue, Region, Req, Request, Wire, Workspace, feature,
    protocol,
};

const MIB: u64 = 1 << 20;
const DISK: u64 = 64 * MIB;
const PATIENCE: Duration = Duration::from_secs(20);

fn is_peer() -> bool {
    std::env::var_os("PCACHE_HANDSHAKE_PEER").is_some()
}

fn server(queues: u16) -> (Workspace, Daemon) {
    let workspace = Workspace::new();
    let daemon = if is_peer() {
        Daemon::qemu(&workspace, DISK, queues).expect("qemu-storage-daemon is installed")
    } else {
        Daemon::cached(&workspace, "64MiB", DISK, queues, &[])
    };
    (workspace, daemon)
}

fn wire(daemon: &Daemon) -> Wire {
    Wire::connect(daemon.socket(), PATIENCE)
}

fn options(queues: u16, event_idx: bool) -> ClientOptions {
    ClientOptions { queues, event_idx, patience: PATIENCE, ..ClientOptions::default() }
}

/// A write and a read back on every queue, with bytes that nothing else has written.
fn exchange(client: &mut Client, stamp: u8) {
    for queue in 0..client.queues.len() {
        let bytes: Vec<u8> = (0..8192u32).map(|i| (i as u8).wrapping_mul(7) ^ stamp ^ queue as u8).collect();
        let sector = 1000 + 16 * queue as u64;
        let write = Request::write(sector, bytes.clone());
        assert_eq!(client.execute_on(queue, &write, &Layout::plain(&write)).status, OK, "queue {queue}");
        let read = Request::read(sector, bytes.len());
        let done = client.execute_on(queue, &read, &Layout::plain(&read));
        assert_eq!(done.status, OK, "queue {queue}");
        assert_eq!(done.data, bytes, "queue {queue}");
    }
}

const BLOCK: u64 = feature::BLK_SEG_MAX
    | feature::BLK_BLK_SIZE
    | feature::BLK_FLUSH
    | feature::BLK_TOPOLOGY
    | feature::BLK_CONFIG_WCE
    | feature::BLK_MQ
    | feature::BLK_DISCARD
    | feature::BLK_WRITE_ZEROES
    | feature::INDIRECT
    | feature::EVENT_IDX
    | feature::VERSION_1
    | feature::PROTOCOL_FEATURES;

/// GET and SET of features of both kinds; returns those in force.
fn negotiate(wire: &mut Wire, features: u64, wanted: u64) -> (u64, u64) {
    let offered = wire.get_u64(Req::GetFeatures);
    assert_ne!(offered & feature::PROTOCOL_FEATURES, 0);
    let protocol = wire.get_u64(Req::GetProtocolFeatures) & wanted;
    wire.set_u64(Req::SetProtocolFeatures, protocol);
    wire.need_reply = protocol & protocol::REPLY_ACK != 0;
    (offered & features, protocol)
}

const PROTOCOL: u64 = protocol::MQ
    | protocol::REPLY_ACK
    | protocol::CONFIG
    | protocol::INFLIGHT_SHMFD
    | protocol::RESET_DEVICE
    | protocol::CONFIGURE_MEM_SLOTS;

#[test]
fn qemu_with_a_bios_that_drives_one_queue_and_a_kernel_that_drives_all() {
    let (_workspace, daemon) = server(4);
    let mut wire = wire(&daemon);
    let (features, protocol) = negotiate(&mut wire, BLOCK, PROTOCOL & !protocol::INFLIGHT_SHMFD);
    assert!(wire.get_u64(Req::GetQueueNum) >= 4);
    assert!(wire.get_u64(Req::GetMaxMemSlots) >= 32);
    wire.tell(Req::SetOwner, &[], &[]);
    assert_eq!(wire.get_u64(Req::GetFeatures) & BLOCK, features, "features do not change");

    let memory = Arc::new(Memory::new(32 * MIB, 2));
    memory.seal();
    let queues = queues_in(&memory, 4, 128);
    for queue in &queues {
        wire.set_vring_fd(Req::SetVringCall, queue.index, Some(queue.call_fd()));
    }
    let config = wire.get_config(0, 57).expect("QEMU reads 57 bytes");
    assert_eq!(config[..8], (DISK / 512).to_le_bytes());

    // The BIOS: one queue, four features; QEMU enables all four rings all the same.
    let bios = feature::BLK_SIZE_MAX | feature::BLK_SEG_MAX | feature::BLK_BLK_SIZE | feature::VERSION_1;
    let bios = (bios & wire.get_u64(Req::GetFeatures)) | feature::PROTOCOL_FEATURES;
    wire.set_u64(Req::SetFeatures, bios);
    wire.set_u64(Req::SetFeatures, bios);
    memory.add_regions(&wire);
    set_up_ring(&wire, &memory, &queues[0], 0);
    for queue in &queues {
        wire.set_vring(Req::SetVringEnable, queue.index, 1);
    }
    let mut firmware = queues;
    let mut kernel = firmware.split_off(1);
    let mut client = Client::assembled(wire, memory, firmware, options(1, false));
    exchange(&mut client, 1);

    // The machine resets: every ring is disabled and stopped, the memory taken away.
    for index in 0..4 {
        client.wire.set_vring(Req::SetVringEnable, index, 0);
    }
    assert_eq!(client.wire.get_vring_base(0), client.queues[0].avail_index());
    let regions = client.memory.regions().to_vec();
    regions.iter().rev().for_each(|region| client.memory.remove_region(&client.wire, *region));

    // The kernel: all queues from the beginning.
    client.queues[0].reset();
    client.queues.append(&mut kernel);
    client.wire.set_u64(Req::SetFeatures, features);
    client.wire.set_u64(Req::SetFeatures, features);
    client.memory.add_regions(&client.wire);
    for index in 0..4 {
        client.queues[index].event_idx = features & feature::EVENT_IDX != 0;
        client.set_up_ring(index, 0);
    }
    for index in 0..4 {
        client.wire.set_vring(Req::SetVringEnable, index, 1);
    }
    exchange(&mut client, 2);
    assert_ne!(protocol & protocol::CONFIG, 0);
}

#[test]
fn cloud_hypervisor_boots_pauses_resumes_and_stops() {
    let (_workspace, daemon) = server(2);
    let mut wire = wire(&daemon);
    wire.tell(Req::SetOwner, &[], &[]);
    let (features, protocol) = negotiate(&mut wire, BLOCK, PROTOCOL);
    assert!(wire.get_u64(Req::GetQueueNum) >= 2);
    let config = wire.get_config_with(0, 60, NEED_REPLY, 1).expect("60 bytes with flags 1");
    assert_eq!(config[..8], (DISK / 512).to_le_bytes());

    wire.set_u64(Req::SetFeatures, features);
    let memory = Arc::new(Memory::new(32 * MIB, 1));
    memory.set_table(&wire);
    let mut queues = queues_in(&memory, 2, 128);
    if protocol & protocol::INFLIGHT_SHMFD != 0 {
        Inflight::get(&wire, 2, 128).set(&wire);
    }
    for queue in &mut queues {
        queue.event_idx = true;
        wire.set_vring(Req::SetVringNum, queue.index, u32::from(queue.size));
    }
    for queue in &queues {
        // Addresses before the base, call before kick.
        wire.tell(Req::SetVringAddr, &ring_addresses(&memory, queue, 0), &[]);
        wire.set_vring(Req::SetVringBase, queue.index, 0);
        wire.set_vring_fd(Req::SetVringCall, queue.index, Some(queue.call_fd()));
        wire.set_vring_fd(Req::SetVringKick, queue.index, Some(queue.kick.as_raw_fd()));
    }
    for index in 0..2 {
        wire.set_vring(Req::SetVringEnable, index, 1);
    }
    let mut client = Client::assembled(wire, memory, queues, options(2, true));
    exchange(&mut client, 3);

    for round in 0..3 {
        for index in 0..2 {
            client.wire.set_vring(Req::SetVringEnable, index, 0);
        }
        // What the guest still manages to submit waits until it is resumed.
        let write = Request::write(8, vec![round + 1; 4096]);
        assert!(client.submit(1, 7, &write, &Layout::plain(&write)));
        client.queues[1].publish();
        for index in 0..2 {
            client.wire.set_vring(Req::SetVringEnable, index, 1);
        }
        let mut done = Vec::new();
        client.wait(&mut done);
        assert_eq!((done[0].0, done[0].1.tag, done[0].1.status), (1, 7, OK));
        exchange(&mut client, 4 + round);
    }
    for index in 0..2 {
        client.wire.set_vring(Req::SetVringEnable, index as u16, 0);
        assert_eq!(client.stop_ring(index), client.queues[index].avail_index());
    }
}

#[test]
fn libblkio_asks_once_then_connects_again_with_odd_regions_at_their_own_addresses() {
    let (_workspace, daemon) = server(1);
    {
        let mut first = wire(&daemon);
        negotiate(&mut first, BLOCK, PROTOCOL & !protocol::INFLIGHT_SHMFD);
        first.tell(Req::SetOwner, &[], &[]);
        first.get_config(0, 60).expect("a configuration");
    }
    let mut wire = wire(&daemon);
    let wanted = PROTOCOL & !protocol::INFLIGHT_SHMFD;
    let (features, protocol) = negotiate(&mut wire, BLOCK & !feature::EVENT_IDX, wanted);
    assert_ne!(protocol & protocol::CONFIGURE_MEM_SLOTS, 0, "libblkio insists on memory slots");
    wire.tell(Req::SetOwner, &[], &[]);
    wire.set_u64(Req::SetFeatures, features);
    let configs: Vec<_> = (0..3).map(|_| wire.get_config(0, 60).expect("a configuration")).collect();
    assert!(configs.windows(2).all(|pair| pair[0] == pair[1]));

    // Rings in a region of their own; its length is no multiple of a page.
    let memory = Arc::new(Memory::identity(5 * MIB + 1234, 4096));
    memory.add_regions(&wire);
    let queues = queues_in(&memory, 1, 64);
    set_up_ring(&wire, &memory, &queues[0], 0);
    wire.set_vring(Req::SetVringEnable, 0, 1);
    let mut client = Client::assembled(wire, memory, queues, options(1, false));
    exchange(&mut client, 9);

    // Buffers come and go in regions of their own while the ring runs.
    for round in 0..20u8 {
        let buffers = Memory::identity(8192 + 17, 0);
        let region = buffers.regions()[0];
        buffers.add_region(&client.wire, region);
        let status = one_write_from(&mut client, region.guest, 4096);
        assert_eq!(status, OK, "round {round}");
        buffers.remove_region(&client.wire, region);
        refuses_data_at(&mut client, region.guest);
    }
    exchange(&mut client, 10);
}

/// A write of `len` bytes from `data` by a hand-made chain on queue 0; returns the status byte.
fn one_write_from(client: &mut Client, data: u64, len: u32) -> u8 {
    one_request(client, 1, data, len, false)
}

/// A request of type `code` to sector 64 with its data anywhere; returns the status byte.
fn one_request(client: &mut Client, code: u32, data: u64, len: u32, device_writes: bool) -> u8 {
    let middle =
        if device_writes { Descriptor::writable(data, len) } else { Descriptor::readable(data, len) };
    let status = client.queues[0].submit_framed(1, code, 64, &[middle]);
    client.queues[0].publish();
    let mut done = Vec::new();
    client.wait(&mut done);
    let mut byte = [0];
    client.memory.read(status, &mut byte);
    byte[0]
}

/// A request whose data lies outside the memory table fails; the ring goes on. (The peer hangs up.)
fn refuses_data_at(client: &mut Client, data: u64) {
    if !is_peer() {
        assert_eq!(one_request(client, 1, data, 4096, false), IOERR, "write with data at {data:#x}");
        assert_eq!(one_request(client, 0, data, 4096, true), IOERR, "read with data at {data:#x}");
    }
}

#[test]
fn user_mode_linux_with_need_reply_on_everything_and_memory_inside_its_file() {
    let (_workspace, daemon) = server(1);
    let mut wire = wire(&daemon);
    wire.tell(Req::SetOwner, &[], &[]);
    let (features, _) = negotiate(&mut wire, BLOCK, protocol::REPLY_ACK | protocol::CONFIG);
    wire.set_u64(Req::SetFeatures, features);
    // NEED_REPLY on a message with an answer of its own asks for nothing more than that answer.
    let whole = wire.get_config(0, 60).expect("a configuration");
    for len in [36, 16, 25, 33] {
        let part = wire.get_config_with(0, len, NEED_REPLY, 0);
        assert_eq!(part.as_deref(), Some(&whole[..len as usize]), "{len} bytes");
    }
    let ask = wire.try_ask_with(Req::GetFeatures, NEED_REPLY, &[], &[]).expect("an answer");
    assert_eq!(ask.as_u64() & features, features);

    let memory = Arc::new(Memory::identity(16 * MIB, 3 * 4096));
    memory.set_table(&wire);
    let mut queues = queues_in(&memory, 1, 64);
    queues[0].event_idx = features & feature::EVENT_IDX != 0;
    wire.set_vring(Req::SetVringNum, 0, 64);
    wire.set_vring(Req::SetVringBase, 0, 0);
    wire.tell(Req::SetVringAddr, &ring_addresses(&memory, &queues[0], u64::MAX), &[]);
    wire.set_vring_fd(Req::SetVringKick, 0, Some(queues[0].kick.as_raw_fd()));
    wire.set_vring_fd(Req::SetVringCall, 0, Some(queues[0].call_fd()));
    wire.set_vring(Req::SetVringEnable, 0, 1);
    let mut client = Client::assembled(wire, memory, queues, options(1, true));
    exchange(&mut client, 5);

    // Its zero page is part of the kernel's image, not of the memory table.
    let region = client.memory.regions()[0];
    for outside in [region.guest - 4096, region.guest + region.len, region.guest + region.len - 512, 0] {
        refuses_data_at(&mut client, outside);
    }
    exchange(&mut client, 6);
}

#[test]
fn configuration_is_read_at_any_offset_and_length_a_front_end_uses() {
    let (_workspace, daemon) = server(2);
    let mut wire = wire(&daemon);
    negotiate(&mut wire, BLOCK, PROTOCOL);
    let whole = wire.get_config(0, 60).expect("a configuration");
    let field = |at: usize, len: usize| {
        let mut bytes = [0; 8];
        bytes[..len].copy_from_slice(&whole[at..at + len]);
        u64::from_le_bytes(bytes)
    };
    assert_eq!(field(0, 8), DISK / 512, "capacity");
    assert!(field(12, 4) >= 126, "seg_max");
    assert_eq!(field(20, 4), 512, "blk_size");
    assert_eq!(field(34, 2), 2, "num_queues");
    if !is_peer() {
        assert_eq!(field(32, 1), 1, "a write-back disk says so");
        assert_eq!(field(40, 4), 256, "max_discard_seg");
        assert_eq!(field(52, 4), 256, "max_write_zeroes_seg");
    }
    for len in 1..=60 {
        assert_eq!(wire.get_config(0, len).as_deref(), Some(&whole[..len as usize]), "{len} bytes");
    }
    if is_peer() {
        return;
    }
    assert_eq!(wire.get_config(8, 16).as_deref(), Some(&whole[8..24]));
    let long = wire.get_config(0, 256).expect("256 bytes are not too many");
    assert_eq!(long[..60], whole[..]);
    // Cloud Hypervisor up to v46 gives the offset of the PCI capability.
    assert_eq!(wire.get_config(0x100, 60).as_deref(), Some(&whole[..]), "offset 0x100");
    assert_eq!(wire.get_config(0, 257), None, "more than a configuration space can have");
    assert_eq!(wire.get_config(u32::MAX, 60), None, "an offset that overflows");
    assert_eq!(wire.get_config(0, 60).as_deref(), Some(&whole[..]), "a refusal ends nothing");
}

#[test]
fn the_write_cache_can_be_turned_off_and_on_and_shows() {
    let (_workspace, daemon) = server(1);
    let mut client = Client::connect(daemon.socket(), options(1, true));
    assert_ne!(client.features & feature::BLK_CONFIG_WCE, 0);
    for (round, on) in [false, true, false].into_iter().enumerate() {
        client.wire.set_config(32, &[u8::from(on)]);
        let shown = client.wire.get_config(32, 1).expect("one byte");
        // The peer shows 0 whatever it is told.
        assert!(is_peer() || shown == [u8::from(on)], "wce shows {shown:?} after {on}");
        exchange(&mut client, 20 + round as u8);
        assert_eq!(client.execute(&Request::flush()).status, OK);
    }
}

#[test]
fn a_ring_stops_where_it_stood_and_goes_on_from_there() {
    let (_workspace, daemon) = server(2);
    let mut client = Client::connect(daemon.socket(), ClientOptions { queue_size: 8, ..options(2, true) });
    for round in 0..5 {
        // Eight entries, so the ring wraps many times over.
        for stamp in 0..7 {
            exchange(&mut client, stamp * 16 + round);
        }
        for index in 0..2 {
            let base = client.stop_ring(index);
            assert_eq!(base, client.queues[index].avail_index(), "everything was used");
            client.set_up_ring(index, base.into());
            client.wire.set_vring(Req::SetVringEnable, index as u16, 1);
        }
    }
}

#[test]
fn requests_kicked_before_enable_are_served_at_enable() {
    let (_workspace, daemon) = server(1);
    let mut client = Client::connect(daemon.socket(), options(1, true));
    let base = client.stop_ring(0);
    let read = Request::read(0, 512);
    assert!(client.submit(0, 3, &read, &Layout::plain(&read)));
    client.queues[0].store_avail();
    client.queues[0].kick();
    client.set_up_ring(0, base.into());
    client.wire.set_vring(Req::SetVringEnable, 0, 1);
    let mut done = Vec::new();
    client.wait(&mut done);
    assert_eq!((done[0].1.tag, done[0].1.status), (3, OK));
}

#[test]
fn the_call_descriptor_can_be_replaced_while_the_ring_runs() {
    let (_workspace, daemon) = server(1);
    let mut client = Client::connect(daemon.socket(), options(1, true));
    for stamp in 0..10 {
        exchange(&mut client, stamp);
        let event = vmm_sys_util::eventfd::EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK);
        let old = std::mem::replace(&mut client.queues[0].call, event.expect("an eventfd"));
        client.wire.set_vring_fd(Req::SetVringCall, 0, Some(client.queues[0].call_fd()));
        drop(old);
    }
    exchange(&mut client, 99);
}

#[test]
fn a_ring_without_kick_descriptor_is_polled() {
    if is_peer() {
        return;
    }
    let (_workspace, daemon) = server(1);
    let mut client = Client::connect(daemon.socket(), options(1, true));
    let base = client.stop_ring(0);
    client.wire.set_vring(Req::SetVringNum, 0, u32::from(client.queues[0].size));
    client.wire.set_vring(Req::SetVringBase, 0, u32::from(base));
    client.wire.tell(Req::SetVringAddr, &ring_addresses(&client.memory, &client.queues[0], 0), &[]);
    client.wire.set_vring_fd(Req::SetVringKick, 0, None);
    client.wire.set_vring_fd(Req::SetVringCall, 0, Some(client.queues[0].call_fd()));
    client.wire.set_vring(Req::SetVringEnable, 0, 1);
    exchange(&mut client, 1);
}

#[test]
fn the_memory_table_can_grow_under_a_running_ring() {
    let (_workspace, daemon) = server(1);
    let mut wire = wire(&daemon);
    wire.tell(Req::SetOwner, &[], &[]);
    let wanted = protocol::REPLY_ACK | protocol::CONFIG;
    let (features, _) = negotiate(&mut wire, BLOCK & !feature::EVENT_IDX, wanted);
    wire.set_u64(Req::SetFeatures, features);
    let memory = Arc::new(Memory::new(8 * MIB, 1));
    memory.set_table(&wire);
    let queues = queues_in(&memory, 1, 64);
    set_up_ring(&wire, &memory, &queues[0], 0);
    wire.set_vring(Req::SetVringEnable, 0, 1);
    let mut client = Client::assembled(wire, memory, queues, options(1, false));
    exchange(&mut client, 1);
    let hotplugged = Memory::identity(4 * MIB, 0);
    let new = Region { guest: 1 << 40, ..hotplugged.regions()[0] };
    for round in 0..10 {
        refuses_data_at(&mut client, new.guest);
        let mut body = words(&[2, 0]);
        body.extend(client.memory.regions()[0].to_bytes());
        body.extend(new.to_bytes());
        let fds = [client.memory.file().as_raw_fd(), hotplugged.file().as_raw_fd()];
        client.wire.tell(Req::SetMemTable, &body, &fds);
        assert_eq!(one_write_from(&mut client, new.guest, 4096), OK, "round {round}");
        client.memory.set_table(&client.wire);
        exchange(&mut client, round);
    }
}

#[test]
fn a_reset_device_starts_again_from_nothing() {
    if is_peer() {
        return;
    }
    let (_workspace, daemon) = server(2);
    let mut client = Client::connect(daemon.socket(), options(2, true));
    assert_ne!(client.protocol & protocol::RESET_DEVICE, 0);
    exchange(&mut client, 1);
    client.wire.tell(Req::ResetDevice, &[], &[]);
    client.queues.iter_mut().for_each(Queue::reset);
    client.wire.set_u64(Req::SetFeatures, client.features);
    for index in 0..2 {
        client.set_up_ring(index, 0);
        client.wire.set_vring(Req::SetVringEnable, index as u16, 1);
    }
    exchange(&mut client, 2);
}

#[test]
fn the_device_status_is_kept_and_zero_resets_the_device() {
    if is_peer() {
        return;
    }
    let (_workspace, daemon) = server(2);
    let mut client = Client::connect(daemon.socket(), options(2, true));
    assert_ne!(client.protocol & protocol::STATUS, 0);
    assert_eq!(client.wire.get_u64(Req::GetStatus), 0);
    for status in [1, 3, 11, 15] {
        client.wire.set_u64(Req::SetStatus, status);
        assert_eq!(client.wire.get_u64(Req::GetStatus), status);
    }
    exchange(&mut client, 1);
    client.wire.set_u64(Req::SetStatus, 0);
    assert_eq!(client.wire.get_u64(Req::GetStatus), 0);
    client.queues.iter_mut().for_each(Queue::reset);
    client.wire.set_u64(Req::SetFeatures, client.features);
    for index in 0..2 {
        client.set_up_ring(index, 0);
        client.wire.set_vring(Req::SetVringEnable, index as u16, 1);
    }
    exchange(&mut client, 2);
}

#[test]
fn connections_come_and_go_and_leave_no_descriptor_behind() {
    let (_workspace, mut daemon) = server(1);
    let mut counts = Vec::new();
    for round in 0..30u8 {
        if round % 3 == 0 {
            drop(wire(&daemon));
        }
        let mut client = Client::connect(daemon.socket(), options(1, true));
        exchange(&mut client, round);
        counts.push(daemon.open_files());
    }
    assert_eq!(counts[2], counts[29], "open descriptors per connection: {counts:?}");
    daemon.assert_alive();
}
