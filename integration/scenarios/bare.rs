//! What a driver of our own sees, polled, in boots of a tenth of a second.

use crate::bare::{BareGuest, Vmm, Work};
use crate::cloud_hypervisor;
use crate::prepare::{Host, host, inapplicable};
use crate::server::{Program, Storage};

/// Blocks for Cloud Hypervisor, whose KVM may be one that interprets unpaged code: 3 ms a block then.
const INTERPRETED: u32 = 512;
const WORK: Work = Work { mode: "write", seed: 7, blocks: 4096, rounds: 1 };

#[test]
fn a_bare_driver_reads_back_every_block_after_eight_kills() {
    let Some(host) = host() else { return };
    kill_between_boots(host, Vmm::Qemu, 8, 4096);
}

#[test]
fn a_bare_driver_in_flight_notices_nothing_of_five_kills() {
    let Some(host) = host() else { return };
    if Program::chosen() == Program::StorageDaemon {
        return inapplicable("qemu-storage-daemon does not track requests in flight and loses them here");
    }
    kill_in_flight(host, Vmm::Qemu, 5, 2048);
}

#[test]
fn cloud_hypervisor_reads_back_every_block_after_three_kills() {
    let Some(host) = host() else { return };
    match cloud_hypervisor::program() {
        Ok(_) => kill_between_boots(host, Vmm::CloudHypervisor, 3, INTERPRETED),
        Err(missing) => inapplicable(&missing),
    }
}

#[test]
fn cloud_hypervisor_in_flight_notices_nothing_of_five_kills() {
    let Some(host) = host() else { return };
    if Program::chosen() == Program::StorageDaemon {
        return inapplicable("qemu-storage-daemon does not track requests in flight and loses them here");
    }
    match cloud_hypervisor::program() {
        Ok(_) => kill_in_flight(host, Vmm::CloudHypervisor, 5, INTERPRETED),
        Err(missing) => inapplicable(&missing),
    }
}

#[test]
fn a_bare_driver_is_told_wrong_contents_from_right_ones() {
    let Some(host) = host() else { return };
    let storage = Storage::new(Program::StorageDaemon, 0, 64);
    let boot = |work| BareGuest::boot(host, Vmm::Qemu, &storage.bare(), work);
    boot(WORK).finish();
    boot(Work { mode: "verify", ..WORK }).finish();
    let mut guest = boot(Work { mode: "verify", seed: 8, ..WORK });
    assert!(guest.wait_for("FAIL").contains("wrong contents"));
}

/// Writes with a new seed, kills the server, and lets the next boot verify.
fn kill_between_boots(host: &Host, vmm: Vmm, kills: u32, blocks: u32) {
    let storage = Storage::new(Program::chosen(), 64, 256);
    for seed in 0..kills {
        let server = storage.serve();
        let work = Work { mode: "write", seed, blocks, rounds: 1 };
        let compared = format!("compared={blocks}");
        let written = BareGuest::boot(host, vmm, &storage.attached(None), work).finish();
        assert!(written.contains(&compared), "{written}");
        server.kill();
        let server = storage.serve();
        let verify = Work { mode: "verify", ..work };
        let verified = BareGuest::boot(host, vmm, &storage.attached(None), verify).finish();
        assert!(verified.contains(&compared), "{verified}");
        server.stop();
    }
    storage.check();
}

/// Kills the server while the guest writes and compares for ever, each time after it made progress.
fn kill_in_flight(host: &Host, vmm: Vmm, kills: u32, blocks: u32) {
    let storage = Storage::new(Program::chosen(), 64, 256);
    let mut server = storage.serve();
    let work = Work { mode: "churn", seed: 11, blocks, rounds: u32::MAX };
    let mut guest = BareGuest::boot(host, vmm, &storage.attached(Some(200)), work);
    for _ in 0..kills {
        // The round after the next was begun after the last restart, and every block of it compared.
        guest.wait_for_round(guest.rounds() + 2);
        server.kill();
        server = storage.serve();
    }
    guest.wait_for_round(guest.rounds() + 2);
    drop(guest);
    server.stop();
    storage.check();
}
