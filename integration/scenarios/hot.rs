//! What changes under a guest while it works: the size of its disk, and its memory.

use std::time::Duration;

use crate::guest::{Guest, GuestOptions};
use crate::prepare::{host, inapplicable};
use crate::server::{Program, Storage};

/// How often QEMU tries to reach a server that went away.
const RECONNECT_MS: u32 = 200;

/// Words for scripts that watch the disk's size.
const WAIT_SECTORS: &str = "
wait_sectors() { # sectors
    local tries=0
    while [ \"$(cat /sys/block/vda/size)\" != \"$1\" ]; do
        tries=$((tries + 1))
        [ $tries -lt 300 ] || { echo \"vda still has $(cat /sys/block/vda/size) sectors\"; exit 1; }
        sleep 0.1
    done
}
";

#[test]
fn a_running_guest_sees_its_disk_grow_twice_and_keeps_what_it_writes_there() {
    let Some(host) = host() else { return };
    if Program::chosen() == Program::StorageDaemon {
        return inapplicable("the verb that makes a disk larger is ours");
    }
    let storage = Storage::new(Program::chosen(), 64, 256).controlled();
    let mut server = storage.serve();
    let script = format!(
        "{WAIT_SECTORS}\
         disk vda\n\
         wait_sectors $((256 * 2048))\n\
         mkfs.ext4 -q /dev/vda\n\
         mount /dev/vda /mnt\n\
         make_file /mnt/before 4\n\
         if dd if=/dev/zero of=/dev/vda bs=1M seek=300 count=1 2>/dev/null; then exit 7; fi\n\
         mark ready\n\
         wait_sectors $((384 * 2048))\n\
         mark seen\n\
         await restarted\n\
         wait_sectors $((512 * 2048))\n\
         dd if=/dev/urandom of=/dev/vda bs=1M seek=500 count=8 oflag=direct 2>/dev/null\n\
         dd if=/dev/vda bs=1M skip=500 count=8 iflag=direct 2>/dev/null | sha256sum >/tmp/first\n\
         sync\n\
         echo NEW $(cat /tmp/first)\n\
         mark written\n\
         await again\n\
         echo NEW $(dd if=/dev/vda bs=1M skip=500 count=8 iflag=direct 2>/dev/null | sha256sum)\n\
         sync\n\
         echo 3 >/proc/sys/vm/drop_caches\n\
         echo BEFORE $(sha256sum </mnt/before | cut -d' ' -f1)\n\
         umount /mnt\n\
         no_kernel_errors\n"
    );
    let mut guest = Guest::boot(host, GuestOptions::new(script).disk(storage.attached(Some(RECONNECT_MS))));
    guest.wait_for("ready");
    let said = storage.ask(&["resize", "disk0", "384MiB"]);
    assert!(said.contains("its VM is told"), "{said}");
    guest.wait_for("seen");
    // A change that comes while nobody is connected is seen as well: the disk grows between two lives.
    server.kill();
    server = storage.serve();
    guest.go("restarted");
    let said = storage.ask(&["resize", "disk0", "512MiB"]);
    assert!(said.contains("384 MiB became 512 MiB"), "{said}");
    guest.wait_for("written");
    server.kill();
    server = storage.serve();
    guest.go("again");
    let report = guest.finish();
    let new = report.after("NEW");
    assert_eq!((new.len(), new[0]), (2, new[1]), "{:?}", report.lines);
    let sum = report.after("SUM")[0].split(' ').next();
    assert_eq!(sum, Some(report.after("BEFORE")[0]), "{:?}", report.lines);
    server.stop();
    storage.check();
    assert_eq!(std::fs::metadata(storage.backing()).expect("the image").len(), 512 << 20);
}

#[test]
fn memory_is_plugged_into_a_guest_under_load_and_requests_use_it() {
    let Some(host) = host() else { return };
    const MORE_MIB: u32 = 384;
    let storage = Storage::new(Program::chosen(), 64, 512).queues(2);
    let server = storage.serve();
    let script = format!(
        "disk vda\n\
         before=$(awk '/MemTotal/ {{ print $2 }}' /proc/meminfo)\n\
         fio --name=verify --filename=/dev/vda --direct=1 --ioengine=io_uring --rw=randwrite --bs=4k --iodepth=8 \
            --size=64M --rate_iops=1200 --verify=crc32c --verify_fatal=1 --do_verify=1 --thread --minimal \
            --randseed=7 >/tmp/fio 2>&1 &\n\
         fio=$!\n\
         sleep 2\n\
         mark loaded\n\
         tries=0\n\
         while [ $(awk '/MemTotal/ {{ print $2 }}' /proc/meminfo) -lt $((before + {least})) ]; do\n\
             for block in /sys/devices/system/memory/memory*/state; do\n\
                 [ $(cat $block) = online ] || echo online_movable >$block 2>/dev/null || true\n\
             done\n\
             tries=$((tries + 1))\n\
             [ $tries -lt 300 ] || {{ echo \"no memory came\"; exit 1; }}\n\
             sleep 0.1\n\
         done\n\
         [ -d /proc/$fio ] && echo PLUGGED under load\n\
         mkdir -p /big\n\
         mount -t tmpfs -o size=600m none /big\n\
         head -c {bytes} /dev/urandom >/big/data\n\
         test $(awk '/MemTotal/ {{ print $2 }}' /proc/meminfo) -gt $before\n\
         dd if=/big/data of=/dev/vda bs=1M seek=128 oflag=direct 2>/dev/null\n\
         echo SUM $(sha256sum </big/data)\n\
         echo READ $(dd if=/dev/vda bs=1M skip=128 count={count} iflag=direct 2>/dev/null | sha256sum)\n\
         wait $fio || {{ cat /tmp/fio; exit 1; }}\n\
         no_kernel_errors\n",
        least = (MORE_MIB - 64) * 1024,
        bytes = 288 << 20,
        count = 288,
    );
    let options = GuestOptions::new(script).vcpus(2).memory_mib(384).spare_mib(1024).fio();
    let guest = Guest::boot(host, options.disk(storage.attached(None)).timeout(Duration::from_secs(400)));
    guest.wait_for("loaded");
    guest.plug_memory(MORE_MIB);
    let report = guest.finish();
    assert_eq!(report.after("PLUGGED"), ["under load"], "{:?}", report.lines);
    assert_eq!(report.after("READ"), report.after("SUM"), "{:?}", report.lines);
    server.stop();
    storage.check();
}
