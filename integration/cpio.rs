//! A writer of `newc` cpio archives, the form the kernel unpacks as an initramfs.
//!
//! It exists so that a run's own files (script, checksums, programs) can be appended to a prepared
//! archive without unpacking or rebuilding that one: the kernel takes any number in a row.
//!
//! Invariant: `finish` leaves a length that is a multiple of 512, so the next archive may follow.

use std::io::{self, Write};

/// Directories are created by the first file below them.
pub struct Archive<W: Write> {
    out: W,
    inode: u32,
    written: usize,
    directories: Vec<String>,
}

const DIRECTORY: u32 = 0o040_755;
const REGULAR: u32 = 0o100_000;

impl<W: Write> Archive<W> {
    /// Starts an archive that will be appended to `out`, which must be 4-byte aligned.
    pub fn new(out: W) -> Self {
        Self { out, inode: 1, written: 0, directories: Vec::new() }
    }

    /// Adds a regular file; `path` has no leading slash.
    pub fn file(&mut self, path: &str, permissions: u32, contents: &[u8]) -> io::Result<()> {
        for (index, _) in path.match_indices('/') {
            let directory = &path[..index];
            if !self.directories.iter().any(|known| known == directory) {
                self.directories.push(directory.to_owned());
                self.entry(directory, DIRECTORY, &[])?;
            }
        }
        self.entry(path, REGULAR | permissions, contents)
    }

    /// Ends the archive and gives the writer back.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, &[])?;
        self.pad(512)?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, contents: &[u8]) -> io::Result<()> {
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let size = u32::try_from(contents.len()).map_err(io::Error::other)?;
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        // magic, then: inode, mode, uid, gid, links, mtime, size, device ×2, rdevice ×2, name size, check
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.inode += 1;
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad(4)?;
        self.put(contents)?;
        self.pad(4)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    fn pad(&mut self, alignment: usize) -> io::Result<()> {
        let missing = self.written.next_multiple_of(alignment) - self.written;
        self.put(&vec![0; missing])
    }
}
