//! Images that are not raw, told by their first or last bytes.
//!
//! Serving one of these raw would show the guest its metadata as data, and the first write would
//! destroy it. The reverse mistake is possible too: a guest can write such bytes to its raw disk
//! itself, which is why the operator can say that the format is raw, and why nothing here is ever
//! interpreted further.

/// Bytes to read at the beginning of a disk for [`foreign_format`].
pub(super) const HEAD: usize = 512;

/// A mark at a place in the first sector.
const HEADS: [(usize, &[u8], &str); 13] = [
    (0, b"QFI\xfb\0\0\0\x01", "a qcow image"),
    (0, b"QFI\xfb", "a qcow2 image"),
    (0, b"QED\0", "a QED image"),
    (0, b"KDMV", "a VMDK image"),
    (0, b"COWD", "a VMDK image"),
    (0, b"# Disk DescriptorFile", "a VMDK descriptor"),
    (0, b"vhdxfile", "a VHDX image"),
    (0, b"conectix", "a VHD image"),
    (64, b"\x7f\x10\xda\xbe", "a VDI image"),
    (0, b"LUKS\xba\xbe", "a LUKS container"),
    (0, b"WithoutFreeSpace", "a Parallels image"),
    (0, b"WithouFreSpacExt", "a Parallels image"),
    (0, b"Bochs Virtual HD Image", "a Bochs image"),
];

/// The format of an image that begins with `head` and ends with `tail`, its last sector; `None` if
/// it may well be raw.
pub(super) fn foreign_format(head: &[u8], tail: &[u8]) -> Option<&'static str> {
    let has = |bytes: &[u8], at: usize, mark: &[u8]| bytes.get(at..).is_some_and(|b| b.starts_with(mark));
    if let Some((_, _, format)) = HEADS.iter().find(|(at, mark, _)| has(head, *at, mark)) {
        return Some(format);
    }
    // A fixed VHD is raw data with a footer; very old ones have a footer of 511 bytes.
    (has(tail, 0, b"conectix") || has(tail, 1, b"conectix")).then_some("a fixed-size VHD image")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mark_is_recognised_in_its_place_and_nowhere_else() {
        for (at, mark, format) in HEADS {
            let mut head = [0; HEAD];
            head[at..at + mark.len()].copy_from_slice(mark);
            assert_eq!(foreign_format(&head, &[0; 512]), Some(format));
            head.copy_within(at..at + mark.len(), 200);
            head[at..at + mark.len()].fill(0);
            assert_eq!(foreign_format(&head, &[0; 512]), None, "{format} in the wrong place");
        }
    }

    #[test]
    fn what_raw_disks_begin_with_is_raw() {
        let mut boot = [0; HEAD];
        boot[0..3].copy_from_slice(b"\xeb\x63\x90");
        boot[510..].copy_from_slice(b"\x55\xaa");
        assert_eq!(foreign_format(&boot, &[0; 512]), None);
        assert_eq!(foreign_format(&[], &[]), None);
        assert_eq!(foreign_format(b"QFI", b""), None);
    }

    #[test]
    fn a_fixed_vhd_is_told_by_its_footer() {
        let mut tail = [0; 512];
        tail[..8].copy_from_slice(b"conectix");
        assert_eq!(foreign_format(&[0; HEAD], &tail), Some("a fixed-size VHD image"));
        tail.copy_within(0..8, 1);
        tail[0] = 0;
        assert_eq!(foreign_format(&[0; HEAD], &tail), Some("a fixed-size VHD image"));
        tail.copy_within(1..9, 3);
        tail[1..3].fill(0);
        assert_eq!(foreign_format(&[0; HEAD], &tail), None);
    }
}
