#!/usr/bin/env bash
# Prepares what the guest scenarios boot: a Debian kernel as an ELF image and two initramfs archives.
#
#   integration/prepare.sh [--install] DIR
#
# Prints KEY=VALUE lines (QEMU, KERNEL, KERNEL_VERSION, INITRAMFS, INITRAMFS_FIO) on stdout; everything
# else goes to stderr. Exit status 77 means that something of the host is missing and says which
# packages would bring it. With --install, as root on Debian, they are installed.
#
# What it keeps true:
#  - the kernel comes out of Debian's signed archive and is unpacked, never installed on the host;
#  - a second run with nothing changed does nothing: archives are keyed by what went into them;
#  - a file in DIR is complete or absent (built aside, then renamed), and runs exclude each other.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
install=no
if [[ ${1-} == --install ]]; then
    install=yes
    shift
fi
dir=${1:?usage: prepare.sh [--install] DIR}

# Host tools that go into the guest, with the package that brings each.
base_tools=(mkfs.ext4:e2fsprogs e2fsck:e2fsprogs fstrim:util-linux blkdiscard:util-linux ndctl:ndctl)
fio_tools=(fio:fio)
# Tools this script and the harness call themselves.
host_tools=(qemu-system-x86_64:qemu-system-x86 busybox:busybox-static lz4:lz4 flock:util-linux
    ldd:libc-bin apt-get:apt dpkg:dpkg)
# vhost-user-blk's reconnect-ms came with QEMU 9.2; Debian 12 has that in its backports only.
qemu_version_min=9.2
# virtio-serial carries the script's output, the NVDIMM set is for the DAX scenario.
modules=(virtio_pci virtio_blk virtio_console nfit nd_pmem)

say() { printf 'prepare: %s\n' "$*" >&2; }
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

version_at_least() { [[ $(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n1) == "$2" ]]; }

qemu_version() {
    qemu-system-x86_64 --version 2>/dev/null | sed -n '1s/.*version \([0-9.]*\).*/\1/p'
}

# Package names that are missing, one per line.
missing_packages() {
    local entry
    for entry in "${host_tools[@]}" "${base_tools[@]}" "${fio_tools[@]}"; do
        command -v "${entry%%:*}" >/dev/null || echo "${entry##*:}"
    done | sort -u
    if [[ -n $(qemu_version) ]] && ! version_at_least "$(qemu_version)" "$qemu_version_min"; then
        echo qemu-system-x86
    fi
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" >&2
}

install_missing() {
    local release=() plain=() package
    # shellcheck source=/dev/null
    source /etc/os-release
    [[ -n $(find /var/lib/apt/lists -name '*_Packages*' -print -quit 2>/dev/null) ]] || apt-get update -q >&2
    for package in "$@"; do
        if [[ $package == qemu-system-x86 ]]; then
            if [[ ${VERSION_CODENAME-} == bookworm ]]; then
                if ! apt-cache policy | grep -q 'n=bookworm-backports'; then
                    say "adding Debian's bookworm-backports for QEMU $qemu_version_min or newer"
                    echo 'deb http://deb.debian.org/debian bookworm-backports main' \
                        >/etc/apt/sources.list.d/bookworm-backports-qemu.list
                    apt-get update -q >&2
                fi
                release=(-t bookworm-backports)
            fi
            # qemu-utils of the same release: the storage daemon is the baseline the harness is held against.
            apt_install "${release[@]}" qemu-system-x86 qemu-utils
        else
            plain+=("$package")
        fi
    done
    if ((${#plain[@]})); then apt_install "${plain[@]}"; fi
}

require_packages() {
    local missing
    mapfile -t missing < <(missing_packages)
    ((${#missing[@]})) || return 0
    if [[ $install == yes && $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        install_missing "${missing[@]}"
        mapfile -t missing < <(missing_packages)
        ((${#missing[@]})) || return 0
    fi
    say "missing packages: ${missing[*]}"
    say "install them with: apt-get install --no-install-recommends ${missing[*]}"
    say "(on Debian 12 QEMU has to be $qemu_version_min or newer: add '-t bookworm-backports')"
    exit 77
}

# Takes the ELF image out of a compressed kernel: QEMU enters it directly (PVH), which saves the
# decompression that an emulated CPU is slow at.
extract_elf() { # vmlinuz → elf
    local offset
    while IFS=: read -r offset _; do
        # lz4 complains about what follows the stream; the ELF header decides whether it worked.
        tail -c +$((offset + 1)) "$1" | lz4 -dcq >"$2" 2>/dev/null || true
        [[ $(head -c 4 "$2" | tail -c 3) == ELF ]] && return 0
    done < <(LC_ALL=C grep -obUaP '\x02\x21\x4c\x18' "$1" | cut -c1-20)
    rm -f "$2"
    return 1
}

# Leaves DIR/kernel with `version`, `image` and the module tree.
prepare_kernel() {
    [[ -s $dir/kernel/version ]] && return 0
    local package work
    package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null |
        sed -n 's/.*Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n1)
    if [[ -z $package && $install == yes && $(id -u) == 0 ]]; then
        apt-get update -q >&2
        package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n1)
    fi
    if [[ -z $package ]]; then
        say "the package lists know no linux-image-cloud-amd64: run 'apt-get update' on a Debian host"
        exit 77
    fi
    say "fetching the guest kernel $package"
    work=$dir/kernel.new
    rm -rf "$work"
    mkdir -p "$work/deb"
    if ! (cd "$work/deb" && apt-get download -q "$package" >&2); then
        # A security update replaced the file our package lists name.
        if [[ $(id -u) == 0 && $install == yes ]]; then
            apt-get update -q >&2
            (cd "$work/deb" && apt-get download -q "$package" >&2)
        else
            say "could not download $package: run 'apt-get update' and try again"
            exit 77
        fi
    fi
    dpkg -x "$work"/deb/*.deb "$work/tree"
    local vmlinuz=("$work"/tree/boot/vmlinuz-*)
    local version=${vmlinuz[0]##*/vmlinuz-}
    # Debian 13 and merged-/usr packages put modules under usr/lib.
    [[ -d $work/tree/lib/modules ]] || { mkdir -p "$work/tree/lib" && mv "$work/tree/usr/lib/modules" "$work/tree/lib/"; }
    (cd "$work/tree" && busybox depmod -b . "$version") >&2
    if ! extract_elf "${vmlinuz[0]}" "$work/image"; then
        say "no ELF image in ${vmlinuz[0]##*/}; booting it compressed"
        cp "${vmlinuz[0]}" "$work/image"
    fi
    rm -rf "$work/deb" "$work/tree/usr"
    echo "$version" >"$work/version"
    rm -rf "$dir/kernel"
    mv "$work" "$dir/kernel"
}

# Copies a program and the shared objects it needs, links resolved, to the same paths below ROOT.
copy_program() { # root path
    local file
    mkdir -p "$1$(dirname "$2")"
    cp -L "$2" "$1$2"
    while read -r file; do
        [[ -e $1$file ]] && continue
        mkdir -p "$1$(dirname "$file")"
        cp -L "$file" "$1$file"
    done < <(ldd "$2" 2>/dev/null | grep -oE '/[^ ]+' | sort -u)
}

pack() { # root archive
    (cd "$1" && find . -mindepth 1 -print | LC_ALL=C sort | busybox cpio -o -H newc -R 0:0 2>/dev/null) >"$2.new"
    mv "$2.new" "$2"
}

build_base() { # archive
    local root=$dir/root.new version entry module file path
    version=$(<"$dir/kernel/version")
    rm -rf "$root"
    mkdir -p "$root"/{bin,dev,etc,lib,mnt,proc,run,sys,tmp,usr/bin,usr/sbin,sbin}
    cp -L "$(command -v busybox)" "$root/bin/busybox"
    cp "$here/guest/init" "$root/init"
    cp "$here/guest/functions.sh" "$root/lib/guest.sh"
    chmod 755 "$root/init"
    : >"$root/etc/mtab"
    # The shell in busybox prefers its own applets of a name to any program: a function outdoes them.
    for entry in "${base_tools[@]}"; do
        path=$(command -v "${entry%%:*}")
        copy_program "$root" "$path"
        [[ ${entry%%:*} == *.* ]] || echo "${entry%%:*}() { $path \"\$@\"; }" >>"$root/lib/guest.sh"
    done
    local tree=$dir/kernel/tree/lib/modules/$version
    for module in "${modules[@]}"; do
        while read -r file; do
            mkdir -p "$root/lib/modules/$version/$(dirname "$file")"
            cp "$tree/$file" "$root/lib/modules/$version/$file"
        done < <(grep -E "(^|/)$module\.ko[^:/]*:" "$tree/modules.dep" | tr -d ':' | tr ' ' '\n')
    done
    (cd "$root" && busybox depmod -b . "$version") >&2
    pack "$root" "$1"
    rm -rf "$root"
}

build_fio() { # archive
    local root=$dir/root-fio.new entry
    rm -rf "$root"
    mkdir -p "$root"
    for entry in "${fio_tools[@]}"; do copy_program "$root" "$(command -v "${entry%%:*}")"; done
    pack "$root" "$1"
    rm -rf "$root"
}

# A key over this script, its inputs and the programs that go in.
key_of() {
    local entry path
    {
        cat "$here/prepare.sh" "$here/guest/init" "$here/guest/functions.sh" "$dir/kernel/version"
        for entry in "$@"; do
            path=$(readlink -f "$(command -v "${entry%%:*}")")
            stat -L -c '%n %s %Y' "$path"
        done
    } | sha256sum | cut -c1-16
}

mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
require_packages
exec 9>"$dir/lock"
flock 9
prepare_kernel

base=$dir/base-$(key_of busybox: "${base_tools[@]}").cpio
fio=$dir/fio-$(key_of "${fio_tools[@]}").cpio
if [[ ! -s $base ]]; then
    say "building ${base##*/}"
    find "$dir" -maxdepth 1 -name 'base-*.cpio' -delete
    build_base "$base"
fi
if [[ ! -s $fio ]]; then
    say "building ${fio##*/}"
    find "$dir" -maxdepth 1 -name 'fio-*.cpio' -delete
    build_fio "$fio"
fi

echo "QEMU=$(command -v qemu-system-x86_64)"
echo "QEMU_VERSION=$(qemu_version)"
echo "KERNEL=$dir/kernel/image"
echo "KERNEL_VERSION=$(<"$dir/kernel/version")"
echo "INITRAMFS=$base"
echo "INITRAMFS_FIO=$fio"
