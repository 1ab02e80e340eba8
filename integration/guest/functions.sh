# Words that guest scripts share; every script begins with `. /lib/guest.sh`.

# Waits until a block device is there.
disk() { # name
    local tries=0
    while [ ! -b "/dev/$1" ]; do
        tries=$((tries + 1))
        if [ "$tries" -gt 100 ]; then
            echo "no disk $1"
            exit 1
        fi
        sleep 0.1
    done
}

# Tells the harness that the script has come this far.
mark() { # name
    echo "MARK $1" >&3
}

# Waits until the harness says GO with this name. What else arrives is dropped.
await() { # name
    local line
    while read -r line <&3; do
        [ "$line" = "GO $1" ] && return 0
    done
    echo "the harness went away before GO $1"
    exit 1
}

# Fills a file with bytes nobody can guess, keeps their checksum as a line for the harness.
# The sum is taken from the copy in memory, never from the disk under test.
make_file() { # path MiB
    head -c $(($2 << 20)) /dev/urandom >/tmp/source
    echo "SUM $(sha256sum </tmp/source | cut -d' ' -f1)  ${1##*/}"
    cp /tmp/source "$1"
    rm /tmp/source
}

# Fails unless the files of a directory are what /sums says. Bypasses the page cache of earlier reads.
verify_files() { # directory
    echo 3 >/proc/sys/vm/drop_caches
    (cd "$1" && sha256sum -c /sums)
    echo "VERIFIED $(wc -l </sums) files"
}

# Fails when the kernel reported an error of a block device or a file system.
no_kernel_errors() {
    if dmesg | grep -iE 'I/O error|EXT4-fs error|id [0-9]+ is not a head|blk_update_request|hung task|blocked for more'; then
        echo "the guest's kernel reported errors"
        exit 1
    fi
}
