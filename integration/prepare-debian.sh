#!/usr/bin/env bash
# Prepares the root of a small Debian with systemd and QEMU, for the scenario that installs the package.
#
#   integration/prepare-debian.sh DIR
#
# Prints IMAGE=PATH, an ext4 image that is copied for each guest. Exit status 77 means that something of
# the host is missing, and says what. Takes minutes and 600 MB once; DIR keeps it until this script changes.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dir=${1:?usage: prepare-debian.sh DIR}
suite=bookworm
mirror=${PCACHE_DEBIAN_MIRROR:-http://deb.debian.org/debian}
# What the package needs and the guide uses; the rest of Debian is not asked.
packages=systemd,systemd-sysv,udev,dbus,qemu-system-x86

say() { printf 'prepare-debian: %s\n' "$*" >&2; }
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

for entry in debootstrap:debootstrap mke2fs:e2fsprogs flock:util-linux; do
    command -v "${entry%%:*}" >/dev/null && continue
    say "missing packages: ${entry##*:}"
    exit 77
done
if [[ $(id -u) != 0 ]]; then
    say "debootstrap needs root"
    exit 77
fi

mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
exec 9>"$dir/lock-debian"
flock 9
image=$dir/debian-$(sha256sum <"$here/prepare-debian.sh" | cut -c1-16).img
if [[ ! -s $image ]]; then
    find "$dir" -maxdepth 1 -name 'debian-*.img' -delete
    root=$dir/debian.root
    rm -rf "$root"
    say "installing $suite from $mirror"
    if ! debootstrap --variant=minbase --include="$packages" "$suite" "$root" "$mirror" >"$dir/debootstrap.log" 2>&1; then
        tail -n 5 "$dir/debootstrap.log" >&2
        say "debootstrap failed: is the mirror to be reached?"
        rm -rf "$root"
        exit 77
    fi
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,locale}/*
    # Not its first boot: nothing is to be asked on a console that nobody reads.
    echo 0123456789abcdef0123456789abcdef >"$root/etc/machine-id"
    for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
        systemd-timesyncd.service getty.target serial-getty@ttyS0.service; do
        ln -sf /dev/null "$root/etc/systemd/system/$unit"
    done
    mke2fs -q -t ext4 -d "$root" "$image.new" 2G
    mv "$image.new" "$image"
    rm -rf "$root"
fi
echo "IMAGE=$image"
