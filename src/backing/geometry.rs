//! Sizes and alignments of an open file or block device, asked from the kernel.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::{AlignedBuf, usage};

/// Largest `st_blksize` taken for a physical block; network file systems report a transfer size.
const PHYSICAL_MAX: u32 = 64 << 10;

/// Block sizes of a disk in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Blocks {
    pub(super) logical: u32,
    pub(super) physical: u32,
    pub(super) optimal: u32,
}

/// Size in bytes, also of a block device, whose metadata says 0.
pub(super) fn size(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Blocks of a regular file: addressed by sector like any image, but its file system reads before
/// it writes less than a block.
pub(super) fn file_blocks(file: &File) -> io::Result<Blocks> {
    let unit = u32::try_from(file.metadata()?.blksize()).unwrap_or(PHYSICAL_MAX);
    Ok(blocks_for_unit(unit))
}

fn blocks_for_unit(unit: u32) -> Blocks {
    // Rounded down to a power of two, which is what a guest's configuration can express.
    let physical = (1u32 << unit.max(1).ilog2()).clamp(4096, PHYSICAL_MAX);
    Blocks { logical: 512, physical, optimal: if unit > physical { unit } else { 0 } }
}

/// Blocks of a block device.
pub(super) fn device_blocks(file: &File) -> io::Result<Blocks> {
    let logical = ioctl(file, libc::BLKSSZGET)?;
    let physical = ioctl(file, libc::BLKPBSZGET)?.max(logical);
    let optimal = ioctl(file, libc::BLKIOOPT)?;
    Ok(Blocks { logical, physical, optimal: optimal - optimal % logical.max(1) })
}

/// Whether a block device refuses writes.
pub(super) fn device_is_read_only(file: &File) -> io::Result<bool> {
    // <linux/fs.h>: BLKROGET is _IO(0x12, 94) and BLKSSZGET is _IO(0x12, 104) everywhere, but what
    // _IO makes of that depends on the architecture.
    Ok(ioctl(file, libc::BLKSSZGET - 104 + 94)? != 0)
}

/// Whether zeroing a range of a block device can deallocate it: the kernel needs both a device that
/// discards and one that promises zeros.
pub(super) fn device_can_unmap(dev: u64) -> bool {
    let folder = usage::sysfs(dev);
    // A partition has no queue of its own.
    let queue = [folder.join("queue"), folder.join("../queue")].into_iter().find(|q| q.exists());
    queue.is_some_and(|queue| {
        ["discard_max_bytes", "write_zeroes_max_bytes"].iter().all(|name| {
            fs::read_to_string(queue.join(name))
                .is_ok_and(|text| text.trim().parse::<u64>().is_ok_and(|n| n > 0))
        })
    })
}

/// What direct I/O on a regular file must be aligned to in offset, length and memory; `None` if
/// there is no direct I/O on it. The descriptor has been opened for it.
pub(super) fn direct_align(file: &File) -> Option<u32> {
    match statx_align(file) {
        Some((_, 0)) => None,
        Some((memory, offset)) => Some(memory.max(offset)),
        // Kernels before 6.1 and many file systems do not tell, but a misaligned read does.
        None => [512, 4096].into_iter().find(|align| file.read_at(&mut AlignedBuf::new(*align), 0).is_ok()),
    }
    .map(|align| align as u32)
    // Our buffers are aligned to pages of 4 KiB and no more.
    .filter(|align| align.is_power_of_two() && *align <= 4096)
}

/// Alignment of memory and of offsets as statx tells it, if it does.
#[expect(unsafe_code, reason = "std has no statx alignment")]
fn statx_align(file: &File) -> Option<(usize, usize)> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string and `stat` a structure of the size the kernel fills,
    // both alive during the call; AT_EMPTY_PATH makes it about the open descriptor.
    let code = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            stat.as_mut_ptr(),
        )
    };
    // SAFETY: all-zero bytes are a valid `statx`, and the kernel only ever writes integers to it.
    let stat = unsafe { stat.assume_init() };
    (code == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0)
        .then_some((stat.stx_dio_mem_align as usize, stat.stx_dio_offset_align as usize))
}

/// Turns direct I/O off on an open descriptor, which keeps its locks.
#[expect(unsafe_code, reason = "std has no file status flags")]
pub(super) fn make_buffered(file: &File) -> io::Result<()> {
    // SAFETY: plain integers; the descriptor is open as long as `file`.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    let code = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !libc::O_DIRECT) };
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether an open descriptor goes around the page cache. One that was opened with other rights than
/// `read_only` says is an error.
#[expect(unsafe_code, reason = "std has no file status flags")]
pub(super) fn is_direct(file: &File, read_only: bool) -> io::Result<bool> {
    // SAFETY: plain integers; the descriptor is open as long as `file`.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    if (flags & libc::O_ACCMODE == libc::O_RDONLY) != read_only {
        return Err(io::Error::other("it was opened for reading only, or is to be now: restart instead"));
    }
    Ok(flags & libc::O_DIRECT != 0)
}

/// A block device ioctl that fills in one `int`.
#[expect(unsafe_code, reason = "std has no ioctl")]
fn ioctl(file: &File, request: libc::Ioctl) -> io::Result<u32> {
    let mut value: libc::c_int = 0;
    // SAFETY: every request passed here stores one `int` through its argument, which is alive.
    if unsafe { libc::ioctl(file.as_raw_fd(), request, &mut value) } == 0 {
        Ok(value as u32)
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn physical_blocks_of_files_are_powers_of_two_within_bounds() {
        for (unit, physical, optimal) in [
            (0, 4096, 0),
            (512, 4096, 0),
            (4096, 4096, 0),
            (6000, 4096, 6000),
            (65536, 65536, 0),
            (131_072, 65536, 131_072),
            (1 << 20, 65536, 1 << 20),
        ] {
            assert_eq!(blocks_for_unit(unit), Blocks { logical: 512, physical, optimal }, "{unit}");
        }
    }
}
