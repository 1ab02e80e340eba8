//! Why values that are fine one by one are refused together.

use super::super::value::Name;

/// Why values that are fine one by one do not go together.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConfigError {
    /// Nowhere to listen.
    #[error("nothing to serve: give --socket PATH, --fd N or --config FILE (see --help)")]
    NoEndpoint,
    /// A cache without its disk.
    #[error("--cache needs --backing PATH: which disk does this cache stand in front of?")]
    CacheWithoutBacking,
    /// The control socket where a volume's is.
    #[error("the control socket is also the socket of volume `{0}`: each needs its own")]
    ControlIsVolume(Name),
    /// An empty file.
    #[error("there is no [[volume]]: nothing to serve")]
    NoVolume,
    /// Two of a kind share what they cannot share.
    #[error("volumes `{first}` and `{second}` have the same {what} {value}: each needs its own")]
    Shared {
        /// The earlier one.
        first: Name,
        /// The later one.
        second: Name,
        /// What they share.
        what: &'static str,
        /// Its value.
        value: String,
    },
    /// Two caches share what they cannot share.
    #[error("two caches have the same {what} {value}: each needs its own")]
    SharedCache {
        /// What they share.
        what: &'static str,
        /// Its value.
        value: String,
    },
    /// One thing in two roles.
    #[error("{path} is both a cache and the backing disk of volume `{volume}`")]
    CacheIsBacking {
        /// The thing.
        path: String,
        /// Whose disk it is.
        volume: Name,
    },
    /// A disk to be created that the guest could not address to its end.
    #[error("volume `{volume}`: a disk of {size} bytes is not a multiple of its block size {block_size}")]
    DiskNotWholeBlocks {
        /// Which.
        volume: Name,
        /// Size asked for.
        size: u64,
        /// Block size asked for.
        block_size: u32,
    },
    /// A consent for nobody.
    #[error("--{option}={given}: there is no such volume{}", .nearest.as_ref().map_or(String::new(), |near| format!(": did you mean {near}?")))]
    NoSuchVolume {
        /// The option.
        option: &'static str,
        /// What it said.
        given: String,
        /// What may have been meant.
        nearest: Option<String>,
    },
    /// A consent for anybody.
    #[error("--{option} must name its volume when there are several: --{option}=NAME")]
    WhichVolume {
        /// The option.
        option: &'static str,
    },
    /// No place for the default files.
    #[error("neither XDG_STATE_HOME nor HOME is set: give --state-dir DIR, or --cache and --backing")]
    NoStateDir,
}
