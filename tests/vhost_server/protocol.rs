//! The protocol: the order of messages, what each leaves in force, sessions one after another.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pcache_vhost::vhost::{Options, Server};

use crate::disk::{Handle, RamDisk};
use crate::frontend::*;
use crate::{Running, eventually};

fn write_cache(server: &Running) -> bool {
    server.disk.write_cache.load(Ordering::SeqCst)
}

#[test]
fn front_ends_are_served_one_after_another() {
    let server = Running::new(RamDisk::new());
    // libblkio: the first connection only asks.
    drop({
        let asking = server.connect();
        asking.ask_u64(GET_FEATURES);
        asking
    });
    let first = server.ready();
    let mut ring = first.start_ring(0, 128);
    ring.run(OUT, 0, &[9; 512], 0);
    // A second one waits its turn.
    let mut second = server.connect();
    assert!(second.send(GET_FEATURES, 1, &[], &[]));
    second.stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut byte = [0];
    assert!(std::io::Read::read(&mut &second.stream, &mut byte).is_err(), "not served yet");
    second.stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(ring.run(IN, 0, &[], 512).data, [9; 512]);
    drop(first);
    assert_eq!(second.receive().unwrap().0, GET_FEATURES);
    second.negotiate(u64::MAX);
    second.share_memory();
    let mut ring = second.start_ring(0, 128);
    assert_eq!(ring.run(IN, 0, &[], 512).data, [9; 512]);
}

#[test]
fn a_connected_socket_is_served_once() {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let disk = RamDisk::new();
    let server = Server::new(theirs, std::sync::Arc::new(Handle(disk)), Options::default()).unwrap();
    let thread = std::thread::spawn(move || server.run());
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let frontend = Frontend { stream: ours, memory: memory_file(MEMORY), features: 0, acks: true };
    assert_eq!(frontend.ask_u64(GET_QUEUE_NUM), 4);
    drop(frontend);
    eventually("the server to end", || thread.is_finished());
    thread.join().unwrap().unwrap();
}

#[test]
fn a_stop_finishes_what_is_in_flight() {
    let mut server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 128);
    server.disk.hold();
    for slot in 0..10 {
        let head = ring.build(slot, OUT, u64::from(slot), &[7; 512], 0);
        ring.offer(head);
    }
    ring.kick();
    server.disk.wait_pending(10);
    server.stopper.stop();
    std::thread::sleep(Duration::from_millis(20));
    assert!(!server.thread.as_ref().unwrap().is_finished(), "it waits for the disk");
    server.disk.release();
    server.stop();
    assert_eq!(ring.used_index(), 10);
    assert!(frontend.is_closed());
    // And stopping once more, or a server that never served, is no trouble.
    server.stopper.stop();
    Running::new(RamDisk::new()).stop();
}

#[test]
fn taking_the_base_waits_for_what_is_in_flight_and_then_nothing_is_touched() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 128);
    server.disk.hold();
    for slot in 0..5 {
        let head = ring.build(slot, OUT, 0, &[1; 512], 0);
        ring.offer(head);
    }
    ring.kick();
    server.disk.wait_pending(5);
    assert!(frontend.send(GET_VRING_BASE, 1, &state_body(0, 0), &[]));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(ring.used_index(), 0);
    server.disk.release();
    let (_, body, _) = frontend.receive().unwrap();
    assert_eq!(body, state_body(0, 5));
    assert_eq!(ring.used_index(), 5);
    // Stopped: what is offered now stays.
    let head = ring.build(5, OUT, 0, &[1; 512], 0);
    ring.offer(head);
    ring.kick();
    frontend.must(SET_VRING_ENABLE, &state_body(0, 1), &[]);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(ring.used_index(), 5);
    // And is found when the ring is set up again.
    ring.set_up(&frontend, 5);
    eventually("the ring to go on", || ring.used_index() == 6);
    assert_eq!(frontend.vring_base(0), 6);
    assert_eq!(frontend.vring_base(3), 0, "a ring never set up");
}

#[test]
fn disabling_a_ring_holds_it_and_enabling_it_goes_on() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 128);
    ring.run(OUT, 0, &[1; 512], 0);
    frontend.must(SET_VRING_ENABLE, &state_body(0, 0), &[]);
    let head = ring.build(0, OUT, 0, &[1; 512], 0);
    ring.offer(head);
    ring.kick();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(ring.used_index(), 1);
    frontend.must(SET_VRING_ENABLE, &state_body(0, 1), &[]);
    assert_eq!(ring.wait().0, u32::from(head));
}

#[test]
fn queues_never_set_up_can_be_enabled() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    for queue in 0..4 {
        frontend.must(SET_VRING_ENABLE, &state_body(queue, 1), &[]);
    }
    assert_eq!(frontend.tell(SET_VRING_ENABLE, &state_body(4, 1), &[]), Some(1));
    let mut ring = frontend.start_ring(2, 128);
    assert_eq!(ring.run(FLUSH, 0, &[], 0).status, 0);
}

#[test]
fn without_protocol_features_rings_need_no_enable() {
    let server = Running::new(RamDisk::new());
    let frontend = server.connect();
    // SeaBIOS through an old VMM: no acknowledgements either.
    assert!(frontend.send(SET_FEATURES, 1, &u64_body(1 << 32 | 1 << 2 | 1 << 6), &[]));
    let fd = frontend.memory.as_raw_fd();
    assert!(frontend.send(SET_MEM_TABLE, 1 | NEED_REPLY, &table_body(&[(0, MEMORY, USER, 0)]), &[fd]));
    let mut ring = Ring::new(&frontend, 0, 128);
    assert!(frontend.send(SET_VRING_NUM, 1, &state_body(0, 128), &[]));
    assert!(frontend.send(SET_VRING_BASE, 1, &state_body(0, 0), &[]));
    assert!(frontend.send(SET_VRING_ADDR, 1, &ring.address_body(), &[]));
    assert!(frontend.send(SET_VRING_KICK, 1, &u64_body(0), &[ring.kick.as_raw_fd()]));
    assert!(frontend.send(SET_VRING_CALL, 1, &u64_body(0), &[ring.call.as_raw_fd()]));
    assert_eq!(ring.run(OUT, 0, &[3; 512], 0).status, 0);
    wait_event(&ring.call);
}

#[test]
fn the_configuration_is_read_in_every_size_front_ends_use() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let whole = frontend.ask(GET_CONFIG, &config_body(0, 256, &[0; 256]));
    assert_eq!(whole.len(), 12 + 256);
    assert_eq!(whole[12..20], 4096u64.to_le_bytes());
    assert_eq!(whole[12 + 32], 1, "write back");
    for size in [57, 60, 36, 16, 25, 33, 1, 96] {
        for offset in [0, 0x100] {
            let body = frontend.ask(GET_CONFIG, &config_body(offset, size, &vec![0; size as usize]));
            assert_eq!(body[..12], config_body(offset, size, &[]));
            assert_eq!(body[12..], whole[12..12 + size as usize]);
        }
    }
    for (offset, size) in [(0, 0), (0, 257), (250, 7), (0xffff_ffff, 1)] {
        assert_eq!(
            frontend.ask(GET_CONFIG, &config_body(offset, size, &[])),
            Vec::<u8>::new(),
            "{offset}+{size}"
        );
    }
    // Resized since.
    server.disk.config.lock().unwrap().sectors = 99;
    assert_eq!(frontend.ask(GET_CONFIG, &config_body(0, 8, &[]))[12..], 99u64.to_le_bytes());
}

#[test]
fn completions_are_durable_for_drivers_that_cannot_or_will_not_flush() {
    let server = Running::new(RamDisk::new());
    let mut frontend = server.connect();
    frontend.negotiate(u64::MAX);
    assert!(write_cache(&server));
    frontend.must(SET_FEATURES, &u64_body(frontend.features & !F_FLUSH), &[]);
    assert!(!write_cache(&server), "cannot flush");
    frontend.must(SET_FEATURES, &u64_body(frontend.features), &[]);
    assert!(write_cache(&server));
    frontend.must(SET_CONFIG, &config_body(32, 1, &[0]), &[]);
    assert!(!write_cache(&server), "will not flush");
    assert_eq!(frontend.ask(GET_CONFIG, &config_body(32, 1, &[]))[12], 0);
    frontend.must(SET_CONFIG, &config_body(0x120, 1, &[1]), &[]);
    assert!(write_cache(&server));
    for (offset, payload) in [(0, vec![0]), (33, vec![0]), (32, vec![0, 0])] {
        let body = config_body(offset, payload.len() as u32, &payload);
        assert_eq!(frontend.tell(SET_CONFIG, &body, &[]), Some(1));
        assert!(frontend.send(SET_CONFIG, 1, &body, &[]), "and it costs nobody the connection");
    }
    assert!(write_cache(&server));
}

#[test]
fn what_the_driver_chose_is_not_forgotten_where_the_vmm_does_not_repeat_it() {
    let server = Running::new(RamDisk::new());
    let (area, file) = {
        let frontend = server.ready();
        let (area, file) = frontend.get_inflight(4, 128);
        frontend.must(SET_INFLIGHT_FD, &area, &[file.as_raw_fd()]);
        frontend.must(SET_CONFIG, &config_body(32, 1, &[0]), &[]);
        // A guest that reboots reads the VMM's copy, so a reset does not change it either.
        frontend.must(RESET_DEVICE, &[], &[]);
        frontend.must(SET_FEATURES, &u64_body(frontend.features), &[]);
        assert!(!write_cache(&server));
        (area, file)
    };
    // Another VM starts afresh.
    let mut other = server.connect();
    other.negotiate(u64::MAX);
    assert!(write_cache(&server));
    drop(other);
    // The same VM comes back.
    let same = server.ready();
    same.must(SET_INFLIGHT_FD, &area, &[file.as_raw_fd()]);
    assert!(!write_cache(&server));
}

#[test]
fn chains_in_flight_at_a_crash_are_executed_again_in_order_and_once() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let (area, file) = frontend.get_inflight(4, 128);
    // What a process killed under load leaves: 5 available, the second returned, the first, third
    // and fourth taken in the order 3, 1, 4, the fifth not yet taken.
    let mut ring = Ring::new(&frontend, 1, 128);
    for slot in [0, 1, 2, 3, 4] {
        let head = ring.build(slot, OUT, 100 + u64::from(slot), &[slot as u8 + 1; 512], 0);
        ring.offer(head);
    }
    ring.put(ring.base() + 0x6004, &[3, 0, 0, 0, 1, 0, 0, 0]);
    ring.put(ring.base() + 0x6002, &1u16.to_le_bytes());
    ring.seen = 1;
    let queue = 2112;
    file.write_all_at(&[1, 0, 128, 0, 3, 0, 1, 0], queue + 8).unwrap();
    for (head, counter) in [(6u64, 10u8), (0, 11), (9, 12)] {
        file.write_all_at(&[1], queue + 16 + head * 16).unwrap();
        file.write_all_at(&[counter], queue + 16 + head * 16 + 8).unwrap();
    }
    frontend.must(SET_INFLIGHT_FD, &area, &[file.as_raw_fd()]);
    // Cloud Hypervisor believes that the available index is where to go on.
    ring.set_up(&frontend, ring.available);
    frontend.must(SET_VRING_ENABLE, &state_body(1, 1), &[]);
    let heads: Vec<u32> = (0..4).map(|_| ring.wait().0).collect();
    assert_eq!(heads, [6, 0, 9, 12]);
    let sectors: Vec<u64> = server.disk.executed().iter().map(|done| done.sector).collect();
    assert_eq!(sectors, [102, 100, 103, 104]);
    wait_event(&ring.call);
    assert_eq!(ring.run(OUT, 0, &[0; 512], 0).status, 0);
    assert_eq!(frontend.vring_base(1), 6);
}

#[test]
fn an_in_flight_area_survives_stops_starts_and_the_end_of_a_session() {
    let server = Running::new(RamDisk::new());
    let first = server.ready();
    let (area, file) = first.get_inflight(4, 128);
    first.must(SET_INFLIGHT_FD, &area, &[file.as_raw_fd()]);
    let mut ring = first.start_ring(0, 128);
    for _ in 0..300 {
        ring.run(OUT, 0, &[0; 512], 0);
    }
    assert_eq!(first.vring_base(0), 300);
    ring.set_up(&first, 300);
    ring.run(OUT, 0, &[0; 512], 0);
    let memory = first.memory.try_clone().unwrap();
    drop(first);
    let mut second = Frontend::with_memory(&server.path, memory);
    second.negotiate(u64::MAX);
    second.share_memory();
    second.must(SET_INFLIGHT_FD, &area, &[file.as_raw_fd()]);
    // A base that is nonsense does not matter.
    ring.set_up(&second, 7);
    second.must(SET_VRING_ENABLE, &state_body(0, 1), &[]);
    ring.run(OUT, 0, &[0; 512], 0);
    assert_eq!(second.vring_base(0), 302);
    assert_eq!(server.disk.executed().len(), 302);
}

#[test]
fn memory_is_replaced_under_load() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 128);
    for round in 0..20u64 {
        for slot in 0..8 {
            let head = ring.build(slot, OUT, 0, &[round as u8; 512], 0);
            ring.offer(head);
        }
        ring.kick();
        // The same guest memory at other addresses of the VMM, with the ring where it was.
        let half = MEMORY / 2;
        let table = table_body(&[(half, half, USER + half, half), (0, half, USER, 0)]);
        let fd = frontend.memory.as_raw_fd();
        frontend.must(SET_MEM_TABLE, &table, &[fd, fd]);
        for _ in 0..8 {
            ring.wait();
        }
    }
    assert_eq!(server.disk.executed().len(), 160);
}

#[test]
fn memory_is_added_while_requests_are_in_flight_and_used_at_once() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 128);
    server.disk.hold();
    let head = ring.build(0, OUT, 0, &[1; 512], 0);
    ring.offer(head);
    ring.kick();
    server.disk.wait_pending(1);
    let more = memory_file(0x1_0000);
    more.write_all_at(&[0x5a; 512], 0x234).unwrap();
    assert_eq!(frontend.ask_u64(GET_MAX_MEM_SLOTS), 509);
    // A small region of odd length, as libblkio makes them.
    let region = single_region_body(MEMORY, 1000, USER + MEMORY, 0x234);
    frontend.must(ADD_MEM_REG, &region, &[more.as_raw_fd()]);
    let head = ring.build(1, OUT, 8, &[0; 512], 0);
    ring.describe(head + 1, MEMORY, 512, NEXT, head + 2);
    ring.offer(head);
    ring.kick();
    server.disk.wait_pending(2);
    // Taking it away waits for the request that uses it.
    assert!(frontend.send(REM_MEM_REG, 1 | NEED_REPLY, &region, &[more.as_raw_fd()]));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(ring.used_index(), 0);
    server.disk.release();
    let (_, body, _) = frontend.receive().unwrap();
    assert_eq!(body, u64_body(0));
    assert_eq!(ring.used_index(), 2);
    ring.seen = 2;
    assert_eq!(ring.run(IN, 8, &[], 512).data, [0x5a; 512]);
    // Gone.
    let head = ring.build(1, OUT, 8, &[0; 512], 0);
    ring.describe(head + 1, MEMORY, 512, NEXT, head + 2);
    ring.offer(head);
    ring.kick();
    ring.wait();
    assert_eq!(ring.get(ring.slot_at(1) + 32, 1), [1]);
}

#[test]
fn a_ring_whose_memory_is_taken_away_goes_on_when_it_comes_back() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 128);
    ring.run(OUT, 0, &[1; 512], 0);
    let region = single_region_body(0, MEMORY, USER, 0);
    frontend.must(REM_MEM_REG, &region, &[]);
    let head = ring.build(0, OUT, 0, &[1; 512], 0);
    ring.offer(head);
    ring.kick();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(ring.used_index(), 1);
    frontend.must(ADD_MEM_REG, &region, &[frontend.memory.as_raw_fd()]);
    ring.wait();
}

#[test]
fn kick_and_call_can_be_replaced_while_the_ring_runs() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 128);
    ring.run(OUT, 0, &[1; 512], 0);
    wait_event(&ring.call);
    let other = Ring::new(&frontend, 0, 128);
    frontend.must(SET_VRING_CALL, &u64_body(0), &[other.call.as_raw_fd()]);
    assert_eq!(wait_event(&other.call), 1, "whatever was told to the old one is told again");
    frontend.must(SET_VRING_KICK, &u64_body(0), &[other.kick.as_raw_fd()]);
    drop(ring.call.read());
    drop(other.call.read());
    ring.kick = other.kick;
    ring.set_used_event(ring.seen);
    ring.run(OUT, 0, &[1; 512], 0);
    wait_event(&other.call);
    assert!(ring.call.read().is_err());
}

#[test]
fn a_kick_before_the_enable_is_not_lost() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = Ring::new(&frontend, 0, 128);
    ring.set_up(&frontend, 0);
    let head = ring.build(0, OUT, 0, &[1; 512], 0);
    ring.offer(head);
    ring.kick();
    frontend.must(SET_VRING_ENABLE, &state_body(0, 1), &[]);
    ring.wait();
}

#[test]
fn a_reset_device_starts_again_from_nothing_but_its_memory() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 128);
    ring.run(OUT, 0, &[1; 512], 0);
    frontend.must(RESET_DEVICE, &[], &[]);
    let head = ring.build(0, OUT, 0, &[1; 512], 0);
    ring.offer(head);
    ring.kick();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(ring.used_index(), 1);
    frontend.must(SET_FEATURES, &u64_body(frontend.features), &[]);
    // The driver starts over with another size.
    ring.put(ring.base() + 0x5000, &[0; 4]);
    ring.put(ring.base() + 0x6000, &[0; 4]);
    let mut ring = frontend.start_ring(0, 64);
    assert_eq!(ring.run(OUT, 0, &[1; 512], 0).status, 0);
}

#[test]
fn two_hundred_and_fifty_six_queues_are_offered_and_all_work() {
    let server = Running::new(RamDisk::with(|config| config.queues = 256));
    let mut frontend = Frontend::with_memory(&server.path, memory_file(256 * 0x8_0000));
    frontend.negotiate(u64::MAX);
    assert_eq!(frontend.ask_u64(GET_QUEUE_NUM), 256);
    let table = table_body(&[(0, 256 * 0x8_0000, USER, 0)]);
    frontend.must(SET_MEM_TABLE, &table, &[frontend.memory.as_raw_fd()]);
    let mut rings: Vec<Ring> = (0..256).map(|index| frontend.start_ring(index, 16)).collect();
    for ring in &mut rings {
        assert_eq!(ring.run(OUT, u64::from(ring.index), &[1; 512], 0).status, 0);
    }
    let mut queues: Vec<u16> = server.disk.executed().iter().map(|done| done.queue).collect();
    queues.dedup();
    assert_eq!(queues.len(), 256);
}

/// What Cloud Hypervisor and Firecracker are built on: another idea of the protocol than ours.
#[test]
fn the_rust_vmm_front_end_drives_a_disk() {
    use vhost::vhost_user::message::{
        VhostUserConfigFlags, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
    };
    use vhost::vhost_user::{Frontend as RustVmm, VhostUserFrontend};
    use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

    let server = Running::new(RamDisk::new());
    let stub = Frontend {
        stream: std::os::unix::net::UnixStream::pair().unwrap().0,
        memory: memory_file(MEMORY),
        features: u64::MAX,
        acks: true,
    };
    let mut vmm = RustVmm::connect(&server.path, 4).unwrap();
    // Its rings are split, and it keeps no dirty log.
    let features = vmm.get_features().unwrap() & !(1 << 34 | 1 << 26);
    assert!(features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0);
    vmm.set_owner().unwrap();
    let protocol = vmm.get_protocol_features().unwrap();
    vmm.set_protocol_features(protocol).unwrap();
    if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        vmm.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
    }
    assert_eq!(vmm.get_queue_num().unwrap(), 4);
    assert_eq!(vmm.get_max_mem_slots().unwrap(), 509);
    vmm.set_features(features).unwrap();
    let (_, config) = vmm.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60]).unwrap();
    assert_eq!(config[0..8], 4096u64.to_le_bytes());
    vmm.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    assert!(!write_cache(&server));

    let mut area = VhostUserInflight { num_queues: 4, queue_size: 64, ..VhostUserInflight::default() };
    let (answered, file) = vmm.get_inflight_fd(&area).unwrap();
    area = answered;
    vmm.set_inflight_fd(&area, file.as_raw_fd()).unwrap();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: MEMORY,
        userspace_addr: USER,
        mmap_offset: 0,
        mmap_handle: stub.memory.as_raw_fd(),
    };
    vmm.set_mem_table(&[region]).unwrap();
    let more = memory_file(0x4000);
    let hotplugged = VhostUserMemoryRegionInfo {
        guest_phys_addr: MEMORY,
        memory_size: 0x4000,
        userspace_addr: USER + MEMORY,
        mmap_offset: 0,
        mmap_handle: more.as_raw_fd(),
    };
    vmm.add_mem_region(&hotplugged).unwrap();
    vmm.remove_mem_region(&hotplugged).unwrap();
    let mut ring = Ring::new(&stub, 0, 64);
    vmm.set_vring_num(0, 64).unwrap();
    let addresses = VringConfigData {
        queue_max_size: 64,
        queue_size: 64,
        flags: 0,
        desc_table_addr: USER,
        used_ring_addr: USER + 0x6000,
        avail_ring_addr: USER + 0x5000,
        log_addr: None,
    };
    vmm.set_vring_addr(0, &addresses).unwrap();
    vmm.set_vring_base(0, 0).unwrap();
    vmm.set_vring_call(0, &ring.call).unwrap();
    vmm.set_vring_kick(0, &ring.kick).unwrap();
    vmm.set_vring_err(0, &ring.err).unwrap();
    vmm.set_vring_enable(0, true).unwrap();
    assert_eq!(ring.run(OUT, 1, &[4; 1024], 0).status, 0);
    assert_eq!(ring.run(IN, 1, &[], 1024).data, [4; 1024]);
    wait_event(&ring.call);
    vmm.set_vring_enable(0, false).unwrap();
    assert_eq!(vmm.get_vring_base(0).unwrap(), 2);
    vmm.reset_device().unwrap();
}

#[test]
fn the_in_flight_area_says_at_every_moment_what_is_in_flight() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let (area, file) = frontend.get_inflight(4, 64);
    frontend.must(SET_INFLIGHT_FD, &area, &[file.as_raw_fd()]);
    let mut ring = frontend.start_ring(0, 64);
    let read = |at: u64, len: usize| {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    };
    let marked = || -> Vec<(u8, u16)> {
        let heads = (0..64u16).filter(|&head| read(16 + u64::from(head) * 16, 1) == [1]);
        let mut heads: Vec<(u8, u16)> =
            heads.map(|head| (read(16 + u64::from(head) * 16 + 8, 1)[0], head)).collect();
        heads.sort_unstable();
        heads
    };
    ring.run(FLUSH, 0, &[], 0);
    eventually("the first mark to go", || marked().is_empty());
    server.disk.hold();
    for slot in [3, 1, 2] {
        let head = ring.build(slot, OUT, 0, &[0; 512], 0);
        ring.offer(head);
    }
    ring.kick();
    server.disk.wait_pending(3);
    assert_eq!(marked(), [(1, 9), (2, 3), (3, 6)]);
    assert_eq!(read(8, 8), [1, 0, 64, 0, 0, 0, 1, 0], "version, size, last batch, used index");
    server.disk.release();
    eventually("the marks to go", || marked().is_empty() && read(14, 2) == [4, 0]);
    assert_eq!(read(12, 2), [6, 0], "the last of the last batch");
    assert_eq!(read(16 + 6 * 16 + 6, 2), [3, 0], "which names the one before");
    assert_eq!(read(16 + 3 * 16 + 6, 2), [9, 0]);
}

#[test]
fn what_an_earlier_life_published_and_did_not_tell_is_told_at_the_start() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let mut ring = Ring::new(&frontend, 0, 64);
    let head = ring.build(0, OUT, 0, &[0; 512], 0);
    ring.offer(head);
    ring.put(ring.base() + 0x6002, &1u16.to_le_bytes());
    ring.set_up(&frontend, 1);
    assert!(ring.call.read().is_err());
    frontend.must(SET_VRING_ENABLE, &state_body(0, 1), &[]);
    assert_eq!(wait_event(&ring.call), 1);
    assert!(server.disk.executed().is_empty());
}

#[test]
fn a_stopped_ring_leaves_no_marks_even_if_it_was_broken() {
    let server = Running::new(RamDisk::new());
    let frontend = server.ready();
    let (area, file) = frontend.get_inflight(4, 64);
    frontend.must(SET_INFLIGHT_FD, &area, &[file.as_raw_fd()]);
    let mut ring = frontend.start_ring(0, 64);
    ring.describe(5, 0, 16, NEXT, 5);
    ring.offer(5);
    ring.kick();
    wait_event(&ring.err);
    let mut mark = [0];
    file.read_exact_at(&mut mark, 16 + 5 * 16).unwrap();
    assert_eq!(mark, [1]);
    assert_eq!(frontend.vring_base(0), 0, "it was not returned");
    file.read_exact_at(&mut mark, 16 + 5 * 16).unwrap();
    assert_eq!(mark, [0], "and is no chain of the next ring");
}

/// Rings that are to stop wait this long for a disk that returns nothing.
fn impatient() -> Options {
    Options { stop_patience: Duration::from_millis(200), ..Options::default() }
}

#[test]
fn a_ring_stops_without_a_hung_disk_and_submits_again_what_it_left() {
    let server = Running::with(RamDisk::new(), impatient());
    let frontend = server.ready();
    let (area, file) = frontend.get_inflight(4, 64);
    frontend.must(SET_INFLIGHT_FD, &area, &[file.as_raw_fd()]);
    let mut ring = frontend.start_ring(0, 64);
    assert_eq!(ring.run(FLUSH, 0, &[], 0).status, 0);
    server.disk.hold();
    for (slot, sector) in [(3, 30), (1, 10), (2, 20)] {
        let head = ring.build(slot, OUT, sector, &[7; 512], 0);
        ring.offer(head);
    }
    ring.kick();
    server.disk.wait_pending(3);
    assert_eq!(frontend.vring_base(0), 1, "what was returned, and no more");
    assert_eq!(server.disk.left.load(Ordering::SeqCst), 3);
    server.disk.release();
    assert_eq!(server.disk.executed().len(), 1, "what was left is not executed behind the ring's back");
    ring.set_up(&frontend, 1);
    for slot in [3, 1, 2] {
        assert_eq!(ring.wait().0, slot * 3, "in the order in which they were taken");
    }
    let sectors: Vec<u64> = server.disk.executed()[1..].iter().map(|e| e.sector).collect();
    assert_eq!(sectors, [30, 10, 20], "each once");
    assert_eq!(ring.run(FLUSH, 0, &[], 0).status, 0, "and the ring goes on");
}

#[test]
fn without_in_flight_tracking_a_ring_waits_for_the_disk_and_a_lost_connection_does_not() {
    let server = Running::with(RamDisk::new(), impatient());
    let frontend = server.ready();
    let mut ring = frontend.start_ring(0, 64);
    server.disk.hold();
    let head = ring.build(0, OUT, 5, &[5; 512], 0);
    ring.offer(head);
    ring.kick();
    server.disk.wait_pending(1);
    std::thread::scope(|scope| {
        let base = scope.spawn(|| frontend.vring_base(0));
        std::thread::sleep(Duration::from_millis(600));
        assert!(!base.is_finished(), "only the answer says whether it has taken effect");
        server.disk.release();
        assert_eq!(base.join().unwrap(), 1);
    });
    ring.set_up(&frontend, 1);
    server.disk.hold();
    let head = ring.build(1, OUT, 6, &[6; 512], 0);
    ring.offer(head);
    ring.kick();
    server.disk.wait_pending(1);
    drop(frontend);
    // The next front end is served although the disk still owes an answer to the last.
    let next = server.ready();
    assert_eq!(server.disk.left.load(Ordering::SeqCst), 1);
    server.disk.release();
    let mut ring = next.start_ring(0, 64);
    assert_eq!(ring.run(FLUSH, 0, &[], 0).status, 0);
}
