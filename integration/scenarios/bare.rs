//! What a driver of our own sees, polled, in boots of a tenth of a second.

use crate::bare::{BareGuest, Vmm, Work};
use crate::cloud_hypervisor;
use crate::prepare::{Host, host, skip};
use crate::server::{Program, Storage};

const WORK: Work = Work { mode: "write", seed: 7, blocks: 4096, rounds: 1 };

#[test]
fn a_bare_driver_reads_back_every_block_after_eight_kills() {
    let Some(host) = host() else { return };
    kill_between_boots(host, Vmm::Qemu);
}

#[test]
fn a_bare_driver_in_flight_notices_nothing_of_five_kills() {
    let Some(host) = host() else { return };
    if Program::chosen() == Program::StorageDaemon {
        return skip("qemu-storage-daemon does not track requests in flight and loses them here");
    }
    kill_in_flight(host, Vmm::Qemu);
}

#[test]
fn cloud_hypervisor_reads_back_every_block_after_eight_kills() {
    let Some(host) = host() else { return };
    match cloud_hypervisor::program() {
        Ok(_) => kill_between_boots(host, Vmm::CloudHypervisor),
        Err(missing) => skip_aloud(&missing),
    }
}

#[test]
fn cloud_hypervisor_in_flight_notices_nothing_of_five_kills() {
    let Some(host) = host() else { return };
    if Program::chosen() == Program::StorageDaemon {
        return skip("qemu-storage-daemon does not track requests in flight and loses them here");
    }
    match cloud_hypervisor::program() {
        Ok(_) => kill_in_flight(host, Vmm::CloudHypervisor),
        Err(missing) => skip_aloud(&missing),
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

/// Writes with a new seed, kills the server, and lets the next boot verify; the cache wraps meanwhile.
fn kill_between_boots(host: &Host, vmm: Vmm) {
    let storage = Storage::new(Program::chosen(), 64, 256);
    for seed in 0..8 {
        let server = storage.serve();
        let work = Work { seed, ..WORK };
        let written = BareGuest::boot(host, vmm, &storage.attached(None), work).finish();
        assert!(written.contains("compared=4096"), "{written}");
        server.kill();
        let server = storage.serve();
        let verify = Work { mode: "verify", ..work };
        let verified = BareGuest::boot(host, vmm, &storage.attached(None), verify).finish();
        assert!(verified.contains("compared=4096"), "{verified}");
        server.stop();
    }
    storage.check();
}

/// Kills the server while the guest writes and compares, each time after it made progress.
fn kill_in_flight(host: &Host, vmm: Vmm) {
    const KILLS: u32 = 5;
    // One round takes longer than a kill and restart only on a slow machine: there are enough rounds
    // that the last kill still finds the guest at work, and the assertion says so if not.
    let work = Work { mode: "churn", seed: 11, blocks: 4096, rounds: 4 * KILLS };
    let storage = Storage::new(Program::chosen(), 64, 256);
    let mut server = storage.serve();
    let mut guest = BareGuest::boot(host, vmm, &storage.attached(Some(200)), work);
    for kill in 0..KILLS {
        guest.wait_for(&format!("ROUND round={}", 2 * kill));
        assert!(!guest.has_said("PASS"), "the guest was done before kill {kill}: nothing was tested");
        server.kill();
        server = storage.serve();
    }
    let passed = guest.finish();
    assert!(passed.contains(&format!("compared={}", work.blocks * work.rounds)), "{passed}");
    server.stop();
    storage.check();
}

/// Absent on every Debian host, so absence fails nothing, not even in CI; it is only said.
fn skip_aloud(missing: &str) {
    eprintln!("SKIPPED: {missing}");
}
