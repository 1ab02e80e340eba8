//! A cache's image on this host: made whole or not at all, and never in place of something else.
//!
//! - A new file is allocated and formatted under `PATH.new` and then linked to its name, so a kill
//!   at any instruction leaves either no cache or a formatted one.
//! - An existing image is used if it holds a cache of ours. Blank or foreign content is refused
//!   with its name; only `format` turns it into a cache.
//! - What would be refused later is refused before anything is made: the geometry is chosen first.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::created::Created;
use super::members::{self, CachePaths, How, MemberError};
use super::signature::{self, Content};
use crate::cache::{self, FormatError, FormatOptions, SystemClock};
use crate::onmedia::{Geometry, GeometryError};
use crate::pmem::{self, CreateError, MappedPmem, MediaError, Pmem};
use crate::units::Bytes;

/// How large something is, or is to be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sizing {
    /// It must exist.
    AsFound,
    /// It is made this large if it does not exist.
    AsFoundOr(u64),
    /// It is made this large if it does not exist, and must be this large if it does.
    Exactly(u64),
}

impl Sizing {
    /// What was asked for, else a default, else nothing is made.
    pub fn of(asked: Option<u64>, default: Option<u64>) -> Self {
        match (asked, default) {
            (Some(size), _) => Sizing::Exactly(size),
            (None, Some(size)) => Sizing::AsFoundOr(size),
            (None, None) => Sizing::AsFound,
        }
    }

    /// The size to create with, if creating is allowed.
    pub fn to_create(self) -> Option<u64> {
        match self {
            Sizing::AsFound => None,
            Sizing::AsFoundOr(size) | Sizing::Exactly(size) => Some(size),
        }
    }
}

/// Which image, and what it may become.
#[derive(Clone, Copy, Debug)]
pub struct ImageOptions<'a> {
    /// Device or file, or several.
    pub path: &'a CachePaths,
    /// How large.
    pub size: Sizing,
    /// Segment size if it is formatted now; `None` goes by the image's size.
    pub segment_size: Option<u32>,
    /// Whether RAM passes as persistent.
    pub assume_dax: bool,
    /// Opened already, by a process that gives them up: every path's file, or none.
    pub taken: &'a [Arc<fs::File>],
}

/// An open image.
pub struct Image {
    /// Its bytes.
    pub pmem: Arc<MappedPmem>,
    /// Whether it was made just now.
    pub is_new: bool,
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It could not be opened.
    #[error(transparent)]
    Open(#[from] pmem::OpenError),
    /// It is not all of one cache.
    #[error(transparent)]
    Members(#[from] MemberError),
    /// It could not be made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// It is not there, and nobody said how large to make it.
    #[error("cache {} does not exist: say its size (--cache-size) to create it", .0.display())]
    Missing(PathBuf),
    /// No cache fits.
    #[error("cache {}: {source}", .path.display())]
    Geometry {
        /// Where.
        path: PathBuf,
        /// Why, and what the least is.
        source: GeometryError,
    },
    /// It has another size than asked for.
    #[error("cache {} has {found} bytes, not the {asked} asked for: leave the size away to use it as it is", .path.display())]
    SizeDiffers {
        /// Where.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// The size asked for.
        asked: u64,
    },
    /// Zeros.
    #[error("cache {path} holds nothing but zeros: if it is to be a cache, run `pcache-vhost format --cache {path}`", path = .0.display())]
    Blank(PathBuf),
    /// Somebody's data.
    #[error("cache {path} holds {content}, not a cache: choose another, or overwrite it with `pcache-vhost format --cache {path} --force`", path = .path.display())]
    Foreign {
        /// Where.
        path: PathBuf,
        /// What.
        content: Content,
    },
    /// Somebody's data, and `format` was not told to overwrite it.
    #[error("{} holds {content}: nothing was changed; use --force to overwrite it", .path.display())]
    NotBlank {
        /// Where.
        path: PathBuf,
        /// What.
        content: Content,
    },
    /// Formatting failed.
    #[error("cache {}: {source}", .path.display())]
    Format {
        /// Where.
        path: PathBuf,
        /// Why.
        source: FormatError,
    },
    /// The media failed.
    #[error("cache {}: {source}", .path.display())]
    Media {
        /// Where.
        path: PathBuf,
        /// How.
        source: MediaError,
    },
    /// The file system refused a step.
    #[error("cache {} cannot be {step}: {source}", .path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// A past participle.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Opens an image that holds a cache of ours, or makes one where nothing is and a size is known.
///
/// # Errors
/// [`ImageError`]; nothing has been changed.
pub fn open_or_create(options: &ImageOptions<'_>, created: &mut Created) -> Result<Image, ImageError> {
    let path = options.path.first();
    if options.path.is_one() && is_missing(path)? {
        let size = options.size.to_create().ok_or_else(|| ImageError::Missing(path.into()))?;
        let pmem = create(options, size)?;
        created.file(path);
        return Ok(Image { pmem, is_new: true });
    }
    let how = How { assume_dax: options.assume_dax, read_only: false, taken: options.taken };
    let pmem = members::open(options.path, how)?;
    if !options.taken.is_empty() {
        // Every page is touched now, while the other process still serves: later guests would wait for it.
        let failed = |source| ImageError::Io { path: path.into(), step: "pre-faulted", source };
        pmem.prefault().map_err(failed)?;
    }
    refuse_other_size(options, pmem.len())?;
    match content(path, &*pmem)? {
        Content::Ours => Ok(Image { pmem, is_new: false }),
        Content::Blank => Err(ImageError::Blank(path.into())),
        content => Err(ImageError::Foreign { path: path.into(), content }),
    }
}

/// Makes an empty cache, on purpose: of a missing file, of a blank image, or with `force` of
/// anything that is not in use.
///
/// # Errors
/// [`ImageError`]; nothing has been changed, unless formatting itself failed.
pub fn format(options: &ImageOptions<'_>, force: bool) -> Result<Image, ImageError> {
    if !options.path.is_one() {
        return Ok(Image { pmem: members::format(options, force)?, is_new: false });
    }
    let path = options.path.first();
    if is_missing(path)? {
        let size = options.size.to_create().ok_or_else(|| ImageError::Missing(path.into()))?;
        return Ok(Image { pmem: create(options, size)?, is_new: true });
    }
    let pmem = open_alone(path, options.assume_dax)?;
    refuse_other_size(options, pmem.len())?;
    choose_geometry(path, pmem.len(), options.segment_size)?;
    let content = content(path, &*pmem)?;
    if content != Content::Blank && !force {
        return Err(ImageError::NotBlank { path: path.into(), content });
    }
    format_as_cache(path, &pmem, options.segment_size)?;
    Ok(Image { pmem, is_new: false })
}

/// Opens the media of a cache, all of them, alone or, to look only, with others who look.
///
/// # Errors
/// [`ImageError::Open`], [`ImageError::Members`].
pub fn open(paths: &CachePaths, assume_dax: bool, read_only: bool) -> Result<Arc<MappedPmem>, ImageError> {
    members::open(paths, How { assume_dax, read_only, taken: &[] })
}

/// Opens whatever is at `path`, for it to become something else.
fn open_alone(path: &Path, assume_dax: bool) -> Result<Arc<MappedPmem>, ImageError> {
    let options = pmem::OpenOptions { assume_dax, ..pmem::OpenOptions::new(path) };
    Ok(Arc::new(MappedPmem::open(&options)?))
}

/// What an open image holds.
///
/// # Errors
/// The media failed.
pub fn content(path: &Path, pmem: &impl Pmem) -> Result<Content, ImageError> {
    signature::identify(pmem.len(), |at, buffer| pmem.read(at, buffer))
        .map_err(|source| ImageError::Media { path: path.into(), source })
}

fn is_missing(path: &Path) -> Result<bool, ImageError> {
    match fs::metadata(path) {
        Ok(_) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(source) => Err(ImageError::Io { path: path.into(), step: "examined", source }),
    }
}

pub(super) fn refuse_other_size(options: &ImageOptions<'_>, found: u64) -> Result<(), ImageError> {
    match options.size {
        Sizing::Exactly(asked) if asked != found => {
            Err(ImageError::SizeDiffers { path: options.path.first().into(), found, asked })
        }
        _ => Ok(()),
    }
}

pub(super) fn choose_geometry(
    path: &Path,
    size: u64,
    segment_size: Option<u32>,
) -> Result<Geometry, ImageError> {
    Geometry::choose(size, segment_size).map_err(|source| ImageError::Geometry { path: path.into(), source })
}

fn format_as_cache(path: &Path, pmem: &MappedPmem, segment_size: Option<u32>) -> Result<(), ImageError> {
    let options = FormatOptions { segment_size, ..FormatOptions::default() };
    cache::format(pmem, &SystemClock::default(), &options)
        .map(drop)
        .map_err(|source| ImageError::Format { path: path.into(), source })
}

/// Makes a formatted file of `size` bytes at `path`, where nothing is. The file stays locked from
/// before it has its name.
fn create(options: &ImageOptions<'_>, size: u64) -> Result<Arc<MappedPmem>, ImageError> {
    let path = options.path.first();
    let failed = |step| move |source| ImageError::Io { path: path.into(), step, source };
    choose_geometry(path, size, options.segment_size)?;
    let unfinished = unfinished(path);
    if !is_missing(&unfinished)? {
        // Left by a kill. Whoever is still at work on it holds its lock, and then this is an error.
        drop(open_alone(&unfinished, false)?);
        fs::remove_file(&unfinished).map_err(failed("made: its unfinished predecessor stays"))?;
    }
    pmem::create(&unfinished, size)?;
    let mut made = Created::default();
    made.file(&unfinished);
    let pmem = open_alone(&unfinished, options.assume_dax)?;
    format_as_cache(path, &pmem, options.segment_size)?;
    // Fails if something has appeared there meanwhile; a rename would replace it.
    fs::hard_link(&unfinished, path).map_err(failed("given its name"))?;
    drop(made);
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    fs::File::open(directory.unwrap_or(Path::new(".")))
        .and_then(|directory| directory.sync_all())
        .map_err(failed("made durable"))?;
    Ok(pmem)
}

fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

/// One line about an image's size and segments.
pub fn describe(geometry: &Geometry) -> String {
    let (size, segment) = (Bytes(geometry.device_size), Bytes(geometry.segment_size.into()));
    format!("{size}, {} segments of {segment}", geometry.segment_count)
}
