//! Whose bytes these are: what a device or file holds before it becomes a cache.
//!
//! `format` asks before it overwrites. The answer errs on the side of the owner: [`Content::Blank`]
//! needs the first and last 2 MiB and a sample of the middle to be zeros; anything else is somebody's,
//! named if it is known. Magic numbers are tested most specific first, since many formats keep a
//! boot sector's signature in front of their own.

use std::fmt;

use crate::units::BLOCK;

/// Where file systems, volume managers and caches keep their superblocks: the ends.
const END: u64 = 2 << 20;
/// Blocks looked at between the ends.
const SAMPLES: u64 = 1024;

/// What is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// Zeros wherever we looked.
    Blank,
    /// A cache of this program, whole or damaged.
    Ours,
    /// Something known; its name with an article.
    Known(&'static str),
    /// Something.
    Unknown,
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Content::Blank => "nothing but zeros",
            Content::Ours => "a pcache-vhost cache",
            Content::Known(what) => what,
            Content::Unknown => "data of an unknown kind",
        })
    }
}

/// Counted from the beginning or, negative, from the end.
type Offset = i64;

const NAMES: &[(&str, Offset, &[u8])] = &[
    ("an XFS file system", 0, b"XFSB"),
    ("a Btrfs file system", 0x1_0040, b"_BHRfS_M"),
    ("an F2FS file system", 0x400, b"\x10\x20\xf5\xf2"),
    ("an EROFS file system", 0x400, b"\xe2\xe1\xf5\xe0"),
    ("a SquashFS file system", 0, b"hsqs"),
    ("an ISO 9660 file system", 0x8001, b"CD001"),
    ("LUKS-encrypted data", 0, b"LUKS\xba\xbe"),
    ("LUKS-encrypted data", 0x4000, b"SKUL\xba\xbe"),
    ("an LVM2 physical volume", 0x200, b"LABELONE"),
    ("an LVM2 physical volume", 0, b"LABELONE"),
    ("a bcache device", 0x1018, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
    ("a bcachefs file system", 0x1018, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"),
    ("a dm-writecache cache", 0, &0x2348_9321u32.to_le_bytes()),
    ("a dm-pcache cache", 0x1008, &0x65b0_5efa_96c5_96efu64.to_le_bytes()),
    ("dm-cache metadata", 0x20, &0o6_142_003u64.to_le_bytes()),
    ("dm-thin metadata", 0x20, &27_022_010u64.to_le_bytes()),
    ("a Linux software RAID member", 0, b"\xfc\x4e\x2b\xa9\x01\x00\x00\x00"),
    ("a Linux software RAID member", 0x1000, b"\xfc\x4e\x2b\xa9\x01\x00\x00\x00"),
    ("swap space", 0xff6, b"SWAPSPACE2"),
    ("swap space", 0xff6, b"SWAP-SPACE"),
    ("a Ceph BlueStore device", 0, b"bluestore block device\n"),
    ("a qcow2 image", 0, b"QFI\xfb"),
    ("a VMDK image", 0, b"KDMV"),
    ("a VMDK image", 0, b"# Disk DescriptorFile"),
    ("a VHDX image", 0, b"vhdxfile"),
    ("a VHD image", 0, b"conectix"),
    ("a VHD image", -512, b"conectix"),
    ("a VDI image", 0x40, b"\x7f\x10\xda\xbe"),
    ("an NTFS file system", 3, b"NTFS    "),
    ("an exFAT file system", 3, b"EXFAT   "),
    ("a FAT file system", 0x36, b"FAT1"),
    ("a FAT file system", 0x52, b"FAT32   "),
    ("a GPT partition table", 0x200, b"EFI PART"),
    ("a GPT partition table", 0x1000, b"EFI PART"),
    ("a GPT partition table", -512, b"EFI PART"),
    // Two bytes each: last, or they would claim what is something else by chance.
    ("an ext2, ext3 or ext4 file system", 0x438, b"\x53\xef"),
    ("an MBR partition table or boot sector", 0x1fe, b"\x55\xaa"),
];

/// The label of a member of a cache of ours, where FORMAT.md has its copies.
const MEMBER: &[u8; 8] = b"PCVMEMBR";

/// The first bytes of a cache of ours, which FORMAT.md promises never to change.
const OURS: &[u8; 8] = b"PCVHOST\x01";

/// Looks at `len` bytes through `read`, which fills a buffer from an offset.
///
/// # Errors
/// Whatever `read` fails with.
pub fn identify<E>(len: u64, mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>) -> Result<Content, E> {
    // Before all else: behind its labels a member may hold anything, its own earlier lives included.
    for label in [0, END] {
        if holds(len, label, MEMBER, &mut read)? {
            return Ok(Content::Known("a member of a pcache-vhost cache on several devices"));
        }
    }
    for superblock in [Some(0), len.checked_sub(END)].into_iter().flatten() {
        // The back copy stands a fixed way before the end of the last whole page.
        let superblock = superblock / BLOCK * BLOCK;
        if holds(len, superblock, OURS, &mut read)? {
            return Ok(Content::Ours);
        }
    }
    for &(name, offset, magic) in NAMES {
        let place = if offset < 0 { len.checked_add_signed(offset) } else { Some(offset as u64) };
        if let Some(at) = place
            && holds(len, at, magic, &mut read)?
        {
            return Ok(Content::Known(name));
        }
    }
    if let Some(name) = at_variable_places(len, &mut read)? {
        return Ok(Content::Known(name));
    }
    Ok(if is_blank(len, &mut read)? { Content::Blank } else { Content::Unknown })
}

/// Formats whose superblocks move about: ZFS's ring of uberblocks, md 0.90 and 1.0 near the end.
fn at_variable_places<E>(
    len: u64,
    read: &mut impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<Option<&'static str>, E> {
    const UBERBLOCK: u64 = 0x00ba_b10c;
    for slot in 0..128 {
        for magic in [UBERBLOCK.to_le_bytes(), UBERBLOCK.to_be_bytes()] {
            if holds(len, (128 + slot) << 10, &magic, read)? {
                return Ok(Some("a ZFS pool member"));
            }
        }
    }
    let places = [
        // 0.90: the last 64 KiB that begin at a multiple of it.
        (len & !0xffff).checked_sub(0x1_0000),
        // 1.0: 8 KiB before the end, at a multiple of 4 KiB.
        len.checked_sub(0x2000).map(|at| at & !0xfff),
    ];
    for at in places.into_iter().flatten() {
        if holds(len, at, b"\xfc\x4e\x2b\xa9", read)? {
            return Ok(Some("a Linux software RAID member"));
        }
    }
    Ok(None)
}

fn holds<E>(
    len: u64,
    at: u64,
    magic: &[u8],
    read: &mut impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<bool, E> {
    if at.checked_add(magic.len() as u64).is_none_or(|end| end > len) {
        return Ok(false);
    }
    let mut found = [0; 32];
    let found = &mut found[..magic.len()];
    read(at, found)?;
    Ok(found == magic)
}

fn is_blank<E>(len: u64, read: &mut impl FnMut(u64, &mut [u8]) -> Result<(), E>) -> Result<bool, E> {
    let mut block = [0; BLOCK as usize];
    let mut is_zero = |at: u64| {
        let part = &mut block[..(len - at).min(BLOCK) as usize];
        read(at, part)?;
        Ok(part.iter().all(|&byte| byte == 0))
    };
    let blocks = len.div_ceil(BLOCK);
    let end = END / BLOCK;
    if blocks <= 2 * end + SAMPLES {
        return all(0..blocks, |block| is_zero(block * BLOCK));
    }
    let middle = blocks - 2 * end;
    let samples = (0..SAMPLES)
        .map(|sample| end + (u128::from(middle) * u128::from(sample) / u128::from(SAMPLES)) as u64);
    all((0..end).chain(blocks - end..blocks).chain(samples), |block| is_zero(block * BLOCK))
}

fn all<E>(
    mut blocks: impl Iterator<Item = u64>,
    mut holds: impl FnMut(u64) -> Result<bool, E>,
) -> Result<bool, E> {
    blocks.try_fold(true, |so_far, block| Ok(so_far && holds(block)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    fn of_bytes(bytes: &[u8]) -> Content {
        let Ok(content) = identify::<Infallible>(bytes.len() as u64, |at, buffer| {
            buffer.copy_from_slice(&bytes[at as usize..][..buffer.len()]);
            Ok(())
        });
        content
    }

    #[test]
    fn zeros_are_blank_whatever_their_length() {
        for len in [0, 1, 511, 4096, 4097, (2 << 20) + 1, 9 << 20] {
            assert_eq!(of_bytes(&vec![0; len]), Content::Blank, "{len}");
        }
    }

    #[test]
    fn a_single_byte_at_either_end_is_somebodys() {
        let len = 9 << 20;
        for at in [0, 4095, (2 << 20) - 1, len - (2 << 20), len - 1] {
            let mut bytes = vec![0; len];
            bytes[at] = 1;
            assert_eq!(of_bytes(&bytes), Content::Unknown, "{at}");
        }
    }

    #[test]
    fn data_in_the_middle_alone_is_found_by_the_samples() {
        let mut bytes = vec![0; 64 << 20];
        bytes[20 << 20..21 << 20].fill(7);
        assert_eq!(of_bytes(&bytes), Content::Unknown);
    }

    #[test]
    fn every_signature_of_the_table_is_found_in_its_place() {
        let len = 4 << 20;
        for &(name, offset, magic) in NAMES {
            let mut bytes = vec![0; len];
            let at = if offset < 0 { len - offset.unsigned_abs() as usize } else { offset as usize };
            bytes[at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(of_bytes(&bytes), Content::Known(name), "{name} at {offset:#x}");
        }
        for at in [0, len - (2 << 20)] {
            let mut bytes = vec![0; len];
            bytes[at..at + 8].copy_from_slice(OURS);
            assert_eq!(of_bytes(&bytes), Content::Ours);
        }
        for (at, magic) in
            [(200 << 10, 0x00ba_b10cu64.to_be_bytes()), (128 << 10, 0x00ba_b10cu64.to_le_bytes())]
        {
            let mut bytes = vec![0; len];
            bytes[at..at + 8].copy_from_slice(&magic);
            assert_eq!(of_bytes(&bytes), Content::Known("a ZFS pool member"));
        }
        for at in [len - 0x1_0000, len - 0x2000] {
            let mut bytes = vec![0; len];
            bytes[at..at + 4].copy_from_slice(b"\xfc\x4e\x2b\xa9");
            assert_eq!(of_bytes(&bytes), Content::Known("a Linux software RAID member"));
        }
    }

    #[test]
    fn what_real_tools_make_is_recognised() {
        let dir = tempfile::tempdir().unwrap();
        let rows: &[(&str, &[&str], Content)] = &[
            ("mkfs.ext4", &["-q", "-F"], Content::Known("an ext2, ext3 or ext4 file system")),
            ("mkswap", &["-q"], Content::Known("swap space")),
            ("mkfs.xfs", &["-q", "-f"], Content::Known("an XFS file system")),
            ("mkfs.btrfs", &["-q", "-f"], Content::Known("a Btrfs file system")),
            ("mkfs.vfat", &[], Content::Known("a FAT file system")),
            ("sgdisk", &["-o"], Content::Known("a GPT partition table")),
        ];
        let mut tried = 0;
        for (tool, options, expected) in rows {
            let path = dir.path().join(tool);
            let file = File::create_new(&path).unwrap();
            file.set_len(320 << 20).unwrap();
            let path_with_sbin = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
            let run = Command::new(tool).args(*options).arg(&path).env("PATH", path_with_sbin).output();
            let Ok(output) = run else {
                eprintln!("skipped: {tool} is not installed");
                continue;
            };
            assert!(output.status.success(), "{tool}: {}", String::from_utf8_lossy(&output.stderr));
            let file = File::open(&path).unwrap();
            let found = identify(320 << 20, |at, buffer| file.read_exact_at(buffer, at)).unwrap();
            assert_eq!(found, *expected, "{tool}");
            tried += 1;
        }
        assert!(tried > 0, "no tool that makes a file system is installed");
    }

    #[test]
    fn a_read_that_fails_is_an_error_not_an_answer() {
        assert_eq!(identify(1 << 20, |_, _| Err("poison")), Err("poison"));
    }
}
