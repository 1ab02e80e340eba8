#!/usr/bin/env bash
# Builds the bare guest: 32-bit code in an ELF64 image, without a 32-bit C library or linker target.
#
#   cloud-hypervisor/guest/build.sh IMAGE
#
# The compiler writes 32-bit assembly, which the 64-bit assembler takes under `.code32`.
set -euo pipefail
image=${1:?usage: build.sh IMAGE}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Beside the image, so that the last step is a rename: others may be booting an older build.
work=$(mktemp -d "$(dirname "$image")/bare.XXXXXX")
trap 'rm -rf "$work"' EXIT

gcc -m32 -march=i686 -mgeneral-regs-only -O2 -Wall -Wextra -Werror -ffreestanding -fno-pic -fno-pie \
    -fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables \
    -S -o "$work/body.s" "$here/guest.c"
{
    echo .code32
    cat "$work/body.s"
} >"$work/guest.s"
gcc -c -o "$work/guest.o" "$work/guest.s"
gcc -c -o "$work/entry.o" "$here/entry.S"
ld -m elf_x86_64 -static -nostdlib --build-id=none -z noexecstack -Ttext-segment=0x200000 -e entry \
    -o "$work/image" "$work/entry.o" "$work/guest.o"
mv "$work/image" "$image"
