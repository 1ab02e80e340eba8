//! What the guest's block layer does beyond plain writes: discards, several queues, and a server that
//! dies under load.

use std::time::{Duration, Instant};

use crate::guest::{Guest, GuestOptions};
use crate::prepare::{host, inapplicable};
use crate::scenarios::survival::boot_and_verify;
use crate::server::{Program, Storage};

/// How often QEMU tries to reach a server that went away.
const RECONNECT_MS: u32 = 200;

#[test]
fn fstrim_frees_what_was_deleted_and_nothing_else() {
    let Some(host) = host() else { return };
    let storage = Storage::new(Program::chosen(), 64, 256);
    let server = storage.serve();
    let script = "disk vda\n\
         test \"$(cat /sys/block/vda/queue/discard_max_bytes)\" -gt 0\n\
         mkfs.ext4 -q -E nodiscard /dev/vda\n\
         mount /dev/vda /mnt\n\
         for n in 1 2 3 4; do make_file /mnt/keep$n 4; head -c 8388608 /dev/urandom >/mnt/drop$n; done\n\
         sync\n\
         rm /mnt/drop*\n\
         sync\n\
         echo TRIMMED $(fstrim -v /mnt)\n\
         umount /mnt\n\
         no_kernel_errors\n";
    let report = Guest::boot(host, GuestOptions::new(script).disk(storage.attached(None))).finish();
    assert!(trimmed_bytes(&report.after("TRIMMED")) >= 4 * (8 << 20), "{:?}", report.lines);
    boot_and_verify(host, storage.attached(None), &report.sums());
    server.kill();
    let server = storage.serve();
    boot_and_verify(host, storage.attached(None), &report.sums());
    server.stop();
    storage.check();
}

#[test]
fn a_discarded_range_reads_as_zeros_also_after_the_server_was_killed() {
    let Some(host) = host() else { return };
    let storage = Storage::new(Program::chosen(), 64, 256);
    let server = storage.serve();
    // 8 MiB of data; 2 MiB in its middle are discarded and 1 MiB further on is overwritten with zeros.
    let script = "disk vda\n\
         head -c 8388608 /dev/urandom >/tmp/expected\n\
         dd if=/tmp/expected of=/dev/vda bs=1M oflag=direct 2>/dev/null\n\
         blkdiscard --offset 2M --length 2M /dev/vda\n\
         blkdiscard --zeroout --offset 5M --length 1M /dev/vda\n\
         dd if=/dev/zero of=/tmp/expected bs=1M seek=2 count=2 conv=notrunc 2>/dev/null\n\
         dd if=/dev/zero of=/tmp/expected bs=1M seek=5 count=1 conv=notrunc 2>/dev/null\n\
         sync /dev/vda\n\
         echo SUM $(sha256sum </tmp/expected)\n\
         echo READ $(dd if=/dev/vda bs=1M count=8 iflag=direct 2>/dev/null | sha256sum)\n\
         no_kernel_errors\n";
    let report = Guest::boot(host, GuestOptions::new(script).disk(storage.attached(None))).finish();
    let expected = report.after("SUM");
    assert_eq!(report.after("READ"), expected, "read back at once");
    server.kill();
    let server = storage.serve();
    let script = "disk vda\necho READ $(dd if=/dev/vda bs=1M count=8 iflag=direct 2>/dev/null | sha256sum)\n";
    let again = Guest::boot(host, GuestOptions::new(script).disk(storage.attached(None))).finish();
    assert_eq!(again.after("READ"), expected, "read back after the kill");
    server.stop();
    storage.check();
}

#[test]
fn two_queues_and_two_processors_verify_every_block() {
    let Some(host) = host() else { return };
    let storage = Storage::new(Program::chosen(), 64, 512).queues(2);
    let server = storage.serve();
    let script = format!(
        "disk vda\n\
         test \"$(ls /sys/block/vda/mq | wc -l)\" = 2\n\
         {}\
         no_kernel_errors\n",
        fio(
            "--numjobs=2 --size=96M --offset_increment=128M --bssplit=4k/60:512/10:16k/20:128k/10 --iodepth=16"
        )
    );
    let options = GuestOptions::new(script).vcpus(2).memory_mib(768).fio().disk(storage.attached(None));
    Guest::boot(host, options).finish();
    server.stop();
    storage.check();
}

#[test]
fn a_guest_under_load_notices_nothing_of_a_server_killed_and_restarted() {
    killed_under_load(|storage| storage, "");
}

#[test]
fn a_guest_with_packed_rings_notices_nothing_of_a_server_killed_and_restarted() {
    // Bit 34 of what the driver and the device have agreed to.
    killed_under_load(Storage::packed, "test \"$(cut -c35 /sys/block/vda/device/features)\" = 1\n");
}

/// A guest on `shape`, which `check` verifies, loses its server four times while it writes.
fn killed_under_load(shape: impl FnOnce(Storage) -> Storage, check: &str) {
    let Some(host) = host() else { return };
    if Program::chosen() == Program::StorageDaemon {
        return inapplicable("qemu-storage-daemon does not track requests in flight and loses them here");
    }
    const KILLS: u32 = 4;
    let storage = shape(Storage::new(Program::chosen(), 64, 512).queues(2));
    let mut server = storage.serve();
    // A fixed rate makes the writing last about 12 s on a fast machine as on a slow one.
    let script = format!(
        "disk vda\n\
         {check}\
         mark started\n\
         {}\
         mark done\n\
         no_kernel_errors\n",
        fio("--numjobs=2 --size=48M --offset_increment=64M --bs=4k --iodepth=8 --rate_iops=1000,1000")
    );
    let options = GuestOptions::new(script).vcpus(2).memory_mib(768).fio();
    let guest = Guest::boot(host, options.disk(storage.attached(Some(RECONNECT_MS))));
    guest.wait_for("started");
    for kill in 0..KILLS {
        // The point of the kill is random with respect to the requests; only the spacing is chosen.
        std::thread::sleep(Duration::from_millis(1500 + 130 * u64::from(kill)));
        assert!(!guest.has_passed("done"), "the guest was done before kill {kill}: nothing was tested");
        server.kill();
        server = storage.serve();
    }
    assert!(!guest.has_passed("done"), "the guest was done before the last restart");
    guest.finish();
    server.stop();
    storage.check();
}

#[test]
fn a_guest_under_load_migrates_there_and_back_and_once_changes_its_mind() {
    migrate(|storage| storage);
}

#[test]
fn a_guest_with_packed_rings_migrates_there_and_back_and_once_changes_its_mind() {
    migrate(Storage::packed);
}

/// A guest that writes and verifies moves from QEMU to QEMU and from server to server, which have a cache
/// each on one backing image. Both of the other host are up before the guest leaves this one: the server
/// waits for the image's lock, and QEMU for the server. `PCACHE_MIGRATIONS` sets how often (default 2);
/// one in the middle is cancelled.
fn migrate(shape: impl FnOnce(Storage) -> Storage) {
    let Some(host) = host() else { return };
    if Program::chosen() == Program::StorageDaemon {
        return inapplicable("a second server on the same image is ours to have");
    }
    let migrations: u32 = match std::env::var("PCACHE_MIGRATIONS") {
        Ok(text) => text.parse().expect("PCACHE_MIGRATIONS is a number"),
        Err(_) => 2,
    };
    let mut storage = shape(Storage::new(Program::chosen(), 64, 512).queues(2));
    let mut server = storage.serve();
    // Writing goes on until the last move: 12,288 blocks at 1000 a second, written and then verified.
    let script = format!(
        "disk vda\n\
         mark started\n\
         {}\
         mark done\n\
         no_kernel_errors\n",
        fio(&format!(
            "--numjobs=2 --size=48M --loops={} --offset_increment=64M --bs=4k --iodepth=8 \
             --rate_iops=1000,1000",
            1 + migrations / 3
        ))
    );
    let options = GuestOptions::new(script).vcpus(2).memory_mib(512).fio();
    let options = options.timeout(Duration::from_secs(240 + 60 * u64::from(migrations)));
    let directory = tempfile::tempdir().expect("a directory for the guest's state");
    let attached = |storage: &Storage| options.clone().disk(storage.attached(Some(RECONNECT_MS)));
    let mut guest = Guest::boot(host, attached(&storage));
    guest.wait_for("started");
    for migration in 0..migrations {
        let state = directory.path().join(format!("state{migration}"));
        std::thread::sleep(Duration::from_secs(1));
        if migration == migrations / 2 {
            guest.migrate_and_cancel(&state, Duration::from_secs(1));
        }
        storage.go_to_another_host();
        let other_server = storage.serve_when_free();
        let other_guest = Guest::boot(host, attached(&storage).incoming(&state));
        assert!(!guest.has_passed("done"), "the guest was done before migration {migration}");
        guest.migrate(&state);
        let begun = Instant::now();
        server.leave();
        eprintln!("migration {migration}: this host was left within {:.1?}", begun.elapsed());
        (server, guest) = (other_server, other_guest);
    }
    guest.finish();
    server.stop();
    storage.check();
}

/// A fio run that writes random blocks with checksums and reads all of them back.
pub fn fio(shape: &str) -> String {
    format!(
        "fio --name=verify --filename=/dev/vda --direct=1 --ioengine=io_uring --rw=randwrite --norandommap=0 \
         --verify=crc32c --verify_fatal=1 --do_verify=1 --thread --group_reporting --minimal --randseed=7 {shape} >/tmp/fio \
         || {{ cat /tmp/fio; exit 1; }}\n"
    )
}

/// The byte count in `/mnt: 123 MiB (128974848 bytes) trimmed`.
fn trimmed_bytes(lines: &[&str]) -> u64 {
    let count = lines.first().and_then(|line| line.split('(').nth(1)?.split(' ').next()?.parse().ok());
    count.unwrap_or_else(|| panic!("fstrim said {lines:?}"))
}
