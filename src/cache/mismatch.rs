//! Why a disk is refused: the ways in which a cache and a disk are found not to go together.
//!
//! Each is half a sentence for the operator, who alone knows which of the two is right; what can be
//! done about all of them is the verb `resolve`.

/// What speaks against a disk.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Mismatch {
    /// After an orderly end the file's time of change must be the one noted then.
    #[error("it has been written to since the volume was detached")]
    Written,
    /// The kernel counts writes to devices.
    #[error("the kernel has counted {0} sectors written to it since the volume was detached")]
    Counted(u64),
    /// The samples of an orderly end differ.
    #[error("samples of its content differ from those taken when the volume was detached")]
    Samples,
    /// A copy whose samples agree and whose time of change does not.
    #[error("it looks like a copy of the volume's disk, but may have been written to since it was made")]
    Copy,
    /// After a crash the file was written to at a time when its daemon was dead.
    #[error("it has been written to after the server of the volume had died")]
    WrittenAfterDeath,
    /// Since the boot after a crash somebody else wrote to the device.
    #[error("{0} sectors have been written to it since this host was booted, none by this volume's server")]
    WrittenSinceBoot(u64),
    /// After a crash the file's time of change is before one that was seen.
    #[error("it has been put back to an earlier state than the server of the volume has left")]
    RolledBack,
    /// What is clean in the cache is not what the disk has.
    #[error(
        "at sector {sector} it has not what was written back or read there: one of the two is of another time"
    )]
    Content {
        /// Where.
        sector: u64,
    },
    /// The sidecar is gone.
    #[error("its sidecar `{0}` is missing: move it along with the disk")]
    NoSidecar(String),
    /// The sidecar is of another volume.
    #[error(
        "its sidecar says that it goes with volume `{name}` of cache {cache}, which may hold newer data: \
         drain that and give the disk up with `pcache-vhost resolve --keep=none` there, or take it over \
         with --force-identity"
    )]
    OtherCache {
        /// The volume there.
        name: String,
        /// That cache's UUID.
        cache: String,
    },
    /// The sidecar is behind the cache.
    #[error("its sidecar is of an earlier time than the cache: it was restored from a snapshot or a backup")]
    DiskOlder,
    /// The sidecar is ahead of the cache.
    #[error("its sidecar is of a later time than the cache: the cache is an old copy of one used since")]
    CacheOlder,
    /// Both have gone on, apart from each other.
    #[error("its sidecar is of another history than the cache: two copies of one pair were mixed")]
    Forked,
    /// Neither copy of the sidecar is whole.
    #[error("its sidecar `{0}` is damaged")]
    SidecarDamaged(String),
    /// Something else is in the sidecar's place.
    #[error("its sidecar `{path}` cannot be read: {why}")]
    SidecarUnreadable {
        /// Where it should be.
        path: String,
        /// Why not.
        why: String,
    },
}
