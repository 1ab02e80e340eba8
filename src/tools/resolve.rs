//! Decides what counts where a cache and a disk do not go together, on the operator's word.
//!
//! An act of its own and no option of a start: what is said once in a unit file would be said again
//! at every start after. Interrupted anywhere, the pair is refused as before or resolved as said.
//!
//! What is to be lost is written down first: the statement is durable before the volume is deleted.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Host;
use super::created::Created;
use super::disk::{self, DiskOptions};
use super::drain::volume_options;
use super::image::Sizing;
use crate::backing::{self, Backing, Disk};
use crate::cache::{AdoptOptions, AttachError, Cache, DeleteError, Unwritten};
use crate::onmedia::{VolumeDescriptor, VolumeState};
use crate::units::{Bytes, SectorRange};

/// What of the cache is to count beside the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keep {
    /// All of it: the disk is the volume's own with the same content, under whatever name.
    All,
    /// What is not on the disk yet; what is clean is dropped.
    Dirty,
    /// Nothing: the disk alone counts, and what was not written back is lost.
    Nothing,
}

/// What the operator said.
#[derive(Clone, Copy, Debug)]
pub struct ResolveOptions<'a> {
    /// The volume's disk, if not where it was when last served.
    pub backing: Option<&'a Path>,
    /// Whether the volume grows with its disk.
    pub grow: bool,
    /// Whether dirty data may be lost.
    pub accept_loss: bool,
    /// Where to write down what is lost.
    pub statement: Option<&'a Path>,
}

/// Why nothing was resolved.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// No such volume.
    #[error("the cache has no volume `{0}`")]
    NoVolume(String),
    /// Its disk could not be opened.
    #[error("volume `{name}`: its backing disk {source}")]
    Disk {
        /// The volume.
        name: String,
        /// Why.
        source: backing::OpenError,
    },
    /// Dirty data would be lost.
    #[error(
        "volume `{name}` has {bytes} that are on no disk: they would be lost; say that this is meant with \
         --accept-loss, and where to write down what is lost with --statement FILE"
    )]
    WouldLose {
        /// The volume.
        name: String,
        /// How much.
        bytes: Bytes,
    },
    /// What would be lost cannot be written down.
    #[error("the statement {} cannot be written: {source}; nothing was changed", .path.display())]
    Statement {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The sidecar stays.
    #[error("volume `{name}`: the sidecar of its disk cannot be removed: {source}")]
    Sidecar {
        /// The volume.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The disk cannot be adopted.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The volume cannot be deleted.
    #[error(transparent)]
    Delete(#[from] DeleteError),
}

/// How volume and disk stand to each other.
#[derive(Debug)]
pub struct Standing {
    /// The disk.
    pub path: PathBuf,
    /// What speaks against it.
    pub against: Option<AttachError>,
    /// What is in the cache alone.
    pub unwritten: Unwritten,
}

/// Judges volume and disk, and changes nothing.
///
/// # Errors
/// [`ResolveError`]: there is no such volume, or no such disk.
pub fn judge(
    cache: &Arc<Cache<Host>>,
    name: &str,
    options: &ResolveOptions<'_>,
) -> Result<Standing, ResolveError> {
    let (descriptor, unwritten) = look(cache, name)?;
    let path = path_of(&descriptor, options);
    let disk = open(name, &path)?;
    let against = cache.judge_pair(&volume_options(&descriptor, disk)).err();
    Ok(Standing { path, against, unwritten })
}

/// Makes the volume and its disk a pair again. Returns what became of it, in words.
///
/// # Errors
/// [`ResolveError`]; the pair is refused as before.
pub fn resolve(
    cache: &Arc<Cache<Host>>,
    name: &str,
    keep: Keep,
    options: &ResolveOptions<'_>,
) -> Result<String, ResolveError> {
    let (descriptor, unwritten) = look(cache, name)?;
    let path = path_of(&descriptor, options);
    if keep == Keep::Nothing {
        return give_up(cache, &descriptor, &path, &unwritten, options);
    }
    let disk = open(name, &path)?;
    let how = AdoptOptions { drop_clean: keep == Keep::Dirty, grow: options.grow };
    cache.adopt(name, &*disk, how)?;
    let (dirty, path) = (unwritten.dirty_bytes(), path.display());
    let clean = Bytes(unwritten.cached_bytes.saturating_sub(dirty));
    let dirty = Bytes(dirty);
    Ok(match keep {
        Keep::All => format!("{path} is its disk now; {clean} clean and {dirty} unwritten stay in the cache"),
        _ => format!(
            "{path} is its disk now; {clean} clean were dropped, {dirty} unwritten stay and will be written to it"
        ),
    })
}

fn look(cache: &Arc<Cache<Host>>, name: &str) -> Result<(VolumeDescriptor, Unwritten), ResolveError> {
    let found = cache.descriptor(name).filter(|d| d.state == VolumeState::InUse).zip(cache.unwritten(name));
    found.ok_or_else(|| ResolveError::NoVolume(name.into()))
}

fn path_of(descriptor: &VolumeDescriptor, options: &ResolveOptions<'_>) -> PathBuf {
    options.backing.map_or_else(|| PathBuf::from(descriptor.path_text().into_owned()), Path::to_path_buf)
}

fn open(name: &str, path: &Path) -> Result<Arc<Disk>, ResolveError> {
    // Whatever its guest has written on it: what is raw was decided when the volume was made.
    let wanted = DiskOptions {
        path,
        read_only: false,
        raw: true,
        size: Sizing::AsFound,
        wait: disk::PREDECESSOR_TIMEOUT,
        taken: None,
    };
    let opened = disk::open_or_create(&wanted, &mut Created::default());
    Ok(opened.map_err(|source| ResolveError::Disk { name: name.into(), source })?.disk)
}

/// Keeps nothing: the volume goes, and the next start makes another of its name.
fn give_up(
    cache: &Arc<Cache<Host>>,
    descriptor: &VolumeDescriptor,
    path: &Path,
    unwritten: &Unwritten,
    options: &ResolveOptions<'_>,
) -> Result<String, ResolveError> {
    let name = descriptor.name_text().into_owned();
    let bytes = Bytes(unwritten.dirty_bytes());
    let loses = !unwritten.dirty.is_empty() || !unwritten.lost.is_empty() || unwritten.damaged;
    if loses && !options.accept_loss {
        return Err(ResolveError::WouldLose { name, bytes });
    }
    // A disk that is gone has no sidecar either.
    let disk = path.exists().then(|| open(&name, path)).transpose()?;
    let text = statement(descriptor, path, unwritten);
    if let Some(file) = options.statement {
        let failed = |source| ResolveError::Statement { path: file.into(), source };
        write_down(file, &text).map_err(failed)?;
    }
    if let Some(disk) = disk {
        let failed = |source| ResolveError::Sidecar { name: name.clone(), source };
        disk.remove_sidecar().map_err(failed)?;
    }
    cache.delete_volume(&name, loses)?;
    Ok(format!("nothing of it is kept, the disk alone counts\n{}", text.trim_end()))
}

/// What is lost, for whoever has to answer for it.
fn statement(descriptor: &VolumeDescriptor, path: &Path, unwritten: &Unwritten) -> String {
    let uuid = descriptor.uuid.map(|byte| format!("{byte:02x}")).concat();
    let (name, path) = (descriptor.name_text(), path.display());
    let mut text = format!("lost    volume {name} ({uuid}), disk {path}\n");
    let total = |ranges: &[SectorRange]| Bytes(ranges.iter().map(|range| range.len * 512).sum());
    let (dirty, lost) = (total(&unwritten.dirty), total(&unwritten.lost));
    let mut line = |line: std::fmt::Arguments<'_>| writeln!(text, "{line}").expect("a String takes any text");
    line(format_args!("lost    {dirty} in {} ranges were not on the disk", unwritten.dirty.len()));
    for range in &unwritten.dirty {
        line(format_args!("lost    {range}"));
    }
    if !unwritten.lost.is_empty() {
        line(format_args!("lost    {lost} in {} ranges were lost before", unwritten.lost.len()));
        for range in &unwritten.lost {
            line(format_args!("lost    {range}"));
        }
    }
    if unwritten.damaged {
        line(format_args!("lost    and dirty data of which the cache no longer knows where it belonged"));
    }
    text
}

/// Writes a new file, durably.
fn write_down(path: &Path, text: &str) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}
