//! What a start made and must unmake if it fails: a refusal leaves nothing behind.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Files and directories made so far. Dropped without [`Created::keep`], it removes them, the
/// newest first.
#[derive(Debug, Default)]
pub struct Created(Vec<Made>);

#[derive(Debug)]
enum Made {
    File(PathBuf),
    Directory(PathBuf),
}

impl Created {
    /// Remembers a file that the caller has just made.
    pub fn file(&mut self, path: &Path) {
        self.0.push(Made::File(path.into()));
    }

    /// Makes the directory `path` and what is missing above it, for the owner only: what guests
    /// write is kept there.
    ///
    /// # Errors
    /// One of them could not be made; those that were are remembered.
    pub fn make_directory(&mut self, path: &Path) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        if path.as_os_str().is_empty() || path.is_dir() {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.make_directory(parent)?;
        }
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => self.0.push(Made::Directory(path.into())),
            // Somebody else made it meanwhile: good, and not ours to remove.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Lets everything stay.
    pub fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        for made in self.0.drain(..).rev() {
            let (path, removed) = match &made {
                Made::File(path) => (path, fs::remove_file(path)),
                Made::Directory(path) => (path, fs::remove_dir(path)),
            };
            if let Err(error) = removed {
                tracing::warn!("{} was made for nothing and could not be removed: {error}", path.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_kept_is_gone_and_what_was_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let old = dir.path().join("old");
        fs::create_dir(&old).unwrap();
        let deep = old.join("a/b");
        let mut created = Created::default();
        created.make_directory(&deep).unwrap();
        fs::write(deep.join("f"), "").unwrap();
        created.file(&deep.join("f"));
        assert!(deep.join("f").exists());
        drop(created);
        assert!(old.is_dir() && !old.join("a").exists());
    }

    #[test]
    fn what_is_kept_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let mut created = Created::default();
        created.make_directory(&path).unwrap();
        created.keep();
        assert!(path.is_dir());
    }

    #[test]
    fn a_file_in_the_way_of_a_directory_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("f"), "").unwrap();
        assert!(Created::default().make_directory(&dir.path().join("f/a")).is_err());
    }
}
