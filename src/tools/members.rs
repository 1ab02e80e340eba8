//! A cache on several devices: put together from its members, or refused before anything is written.
//!
//! Laws, as FORMAT.md has them (*Members*):
//! 1. All members are there, in order, each whole, all of one cache: its superblock's table and the
//!    labels say so, or nobody gets to see the media. What is wrong is said in one sentence, of the
//!    member that somebody has to do something about.
//! 2. A path alone is a cache alone: neither the first of several nor any other is opened without the rest.
//! 3. Judging writes nothing. Making writes labels first, then what `format` of one device writes.
//! 4. Whoever holds a member holds its lock, from before it is looked at until the whole is closed.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::image::{self, ImageError, ImageOptions};
use super::signature::Content;
use crate::cache::{self, FormatError, FormatOptions, SystemClock};
use crate::onmedia::{
    MEMBER_LABELS, MEMBER_START_MIN, MEMBERS_MAX, Member, MemberLabel, PAGE, Superblock, Uuid,
};
use crate::pmem::{JoinError, MappedPmem, OpenOptions, Place, Pmem};

/// Where a cache is: a device or file, or several that follow one another.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CachePaths(Vec<PathBuf>);

impl CachePaths {
    /// These, in order; `None` if there are none.
    pub fn new(paths: Vec<PathBuf>) -> Option<Self> {
        (!paths.is_empty()).then_some(Self(paths))
    }

    /// The first, by which the cache is called.
    pub fn first(&self) -> &Path {
        &self.0[0]
    }

    /// All, in order.
    pub fn all(&self) -> &[PathBuf] {
        &self.0
    }

    /// Whether it is one device.
    pub fn is_one(&self) -> bool {
        self.0.len() == 1
    }

    /// For a line of text.
    pub fn display(&self) -> &impl fmt::Display {
        self
    }
}

impl From<PathBuf> for CachePaths {
    fn from(path: PathBuf) -> Self {
        Self(vec![path])
    }
}

impl From<&str> for CachePaths {
    fn from(path: &str) -> Self {
        Self(vec![path.into()])
    }
}

impl fmt::Display for CachePaths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, path) in self.0.iter().enumerate() {
            write!(f, "{}{}", if index == 0 { "" } else { " + " }, path.display())?;
        }
        Ok(())
    }
}

/// Why several paths are not a cache, or one is not all of it. Members are counted from 1.
#[derive(Debug, thiserror::Error)]
pub enum MemberError {
    /// No label.
    #[error("cache {} holds {content}, not a member of cache {}", path.display(), first.display())]
    NotAMember {
        /// Which.
        path: PathBuf,
        /// The cache.
        first: PathBuf,
        /// What it holds.
        content: Content,
    },
    /// A label of another cache.
    #[error("cache {} is a member of another cache than {}", path.display(), first.display())]
    OtherCache {
        /// Which.
        path: PathBuf,
        /// The cache.
        first: PathBuf,
    },
    /// A label of another place.
    #[error("cache {} is member {is} of its cache and is named as member {named}: name all of them in their order", path.display())]
    Place {
        /// Which.
        path: PathBuf,
        /// What it is.
        is: usize,
        /// As what it was named.
        named: usize,
    },
    /// Not all of them.
    #[error("cache {} has {members} members, {named} named here: name all of them in their order", first.display())]
    Incomplete {
        /// The cache.
        first: PathBuf,
        /// How many there are.
        members: usize,
        /// How many are named.
        named: usize,
    },
    /// The table and the labels differ.
    #[error("cache {} is not the device that cache {} has as member {number}", path.display(), first.display())]
    Stranger {
        /// Which.
        path: PathBuf,
        /// The cache.
        first: PathBuf,
        /// Its number.
        number: usize,
    },
    /// Fewer bytes than there were.
    #[error("cache {} ends {missing} bytes before its cache does: it has been cut off, or is another device", path.display())]
    CutOff {
        /// The last member.
        path: PathBuf,
        /// Bytes that are missing.
        missing: u64,
    },
    /// Nothing would be left of it.
    #[error("cache {} has {len} bytes, too few for a member: {least} at least", path.display())]
    TooSmall {
        /// Which.
        path: PathBuf,
        /// Bytes it has.
        len: u64,
        /// Bytes it needs.
        least: u64,
    },
    /// More than a superblock names.
    #[error("a cache has {MEMBERS_MAX} members at most, not {0}")]
    TooMany(usize),
    /// They do not go together.
    #[error(transparent)]
    Join(#[from] JoinError),
}

/// How a member is opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct How<'a> {
    pub assume_dax: bool,
    pub read_only: bool,
    /// Open files of all members, in order, or nothing.
    pub taken: &'a [Arc<fs::File>],
}

impl How<'_> {
    fn open(&self, index: usize, path: &Path) -> Result<MappedPmem, ImageError> {
        let mut options = OpenOptions::new(path);
        options.assume_dax = self.assume_dax;
        options.read_only = self.read_only;
        options.taken = self.taken.get(index).cloned();
        Ok(MappedPmem::open(&options)?)
    }

    pub(super) fn open_each(&self, paths: &CachePaths) -> Result<Vec<MappedPmem>, ImageError> {
        paths.all().iter().enumerate().map(|(index, path)| self.open(index, path)).collect()
    }
}

/// Opens the media of a cache: all members of it, and no more.
pub(super) fn open(paths: &CachePaths, how: How<'_>) -> Result<Arc<MappedPmem>, ImageError> {
    let mut members = how.open_each(paths)?;
    let found = cache::superblock(&members[0]);
    if paths.is_one() {
        let whole = members.remove(0);
        refuse_part(paths.first(), &whole, found.as_ref())?;
        return Ok(Arc::new(whole));
    }
    let labels = read_labels(paths, &members)?;
    // The front superblock tells best what is wrong; where it is damaged, the labels lead to the other.
    if let Some(superblock) = &found {
        judge(paths, superblock, &labels)?;
    }
    let places = labels.iter().map(|label| Place { base: label.base, start: label.start });
    let places: Vec<Place> = [Place { base: 0, start: 0 }].into_iter().chain(places).collect();
    refuse_unordered(paths, &labels)?;
    let whole = MappedPmem::join(members, &places).map_err(MemberError::from)?;
    if let Some(superblock) = cache::superblock(&whole) {
        judge(paths, &superblock, &labels)?;
        let missing = superblock.device_size.saturating_sub(whole.len());
        if missing > 0 {
            let path = paths.all()[labels.len()].clone();
            return Err(MemberError::CutOff { path, missing }.into());
        }
    }
    Ok(Arc::new(whole))
}

/// Law 2.
fn refuse_part(path: &Path, media: &MappedPmem, found: Option<&Superblock>) -> Result<(), MemberError> {
    if let Some(label) = read_label(media) {
        return Err(MemberError::Place { path: path.into(), is: label.index as usize + 1, named: 1 });
    }
    match found.map_or(0, |superblock| superblock.members().len()) {
        0 => Ok(()),
        members => Err(MemberError::Incomplete { first: path.into(), members, named: 1 }),
    }
}

/// The label of a member, from either copy.
fn read_label(media: &MappedPmem) -> Option<MemberLabel> {
    MEMBER_LABELS.into_iter().find_map(|at| {
        let mut page = [0; PAGE];
        let is_there = at + PAGE as u64 <= media.len() && media.read(at, &mut page).is_ok();
        is_there.then(|| MemberLabel::decode(&page).ok())?
    })
}

/// The labels of all but the first.
fn read_labels(paths: &CachePaths, members: &[MappedPmem]) -> Result<Vec<MemberLabel>, ImageError> {
    let first = || paths.first().to_owned();
    if let Some(label) = read_label(&members[0]) {
        let is = label.index as usize + 1;
        return Err(MemberError::Place { path: first(), is, named: 1 }.into());
    }
    let mut labels: Vec<MemberLabel> = Vec::new();
    for (path, member) in paths.all().iter().zip(members).skip(1) {
        let Some(label) = read_label(member) else {
            let content = image::content(path, member)?;
            return Err(MemberError::NotAMember { path: path.clone(), first: first(), content }.into());
        };
        labels.push(label);
    }
    Ok(labels)
}

/// Whether labels alone make an order in which members can lie.
fn refuse_unordered(paths: &CachePaths, labels: &[MemberLabel]) -> Result<(), MemberError> {
    let mut end = 0;
    for (index, label) in labels.iter().enumerate() {
        let path = paths.all()[index + 1].clone();
        if label.index as usize != index + 1 {
            return Err(MemberError::Place { path, is: label.index as usize + 1, named: index + 2 });
        }
        if label.cache_uuid != labels[0].cache_uuid || label.base <= end {
            return Err(MemberError::OtherCache { path, first: paths.first().into() });
        }
        end = label.base;
    }
    Ok(())
}

/// Whether these labels are those that the superblock's table has, and all of them.
fn judge(paths: &CachePaths, superblock: &Superblock, labels: &[MemberLabel]) -> Result<(), MemberError> {
    let first = || paths.first().to_owned();
    let table = superblock.members();
    for (index, label) in labels.iter().enumerate() {
        let (path, number) = (paths.all()[index + 1].clone(), index + 2);
        if label.cache_uuid != superblock.uuid {
            return Err(MemberError::OtherCache { path, first: first() });
        }
        if label.index as usize != index + 1 {
            return Err(MemberError::Place { path, is: label.index as usize + 1, named: number });
        }
        if table.get(index + 1) != Some(&label.member()) {
            return Err(MemberError::Stranger { path, first: first(), number });
        }
    }
    match table.len() {
        members if members == labels.len() + 1 => Ok(()),
        members => Err(MemberError::Incomplete { first: first(), members, named: labels.len() + 1 }),
    }
}

/// Makes an empty cache of several devices or files, which are there and are blank, or may be overwritten.
pub(super) fn format(options: &ImageOptions<'_>, force: bool) -> Result<Arc<MappedPmem>, ImageError> {
    let paths = options.path;
    let how = How { assume_dax: options.assume_dax, read_only: false, taken: &[] };
    if paths.all().len() > MEMBERS_MAX {
        return Err(MemberError::TooMany(paths.all().len()).into());
    }
    let members = how.open_each(paths)?;
    for (path, member) in paths.all().iter().zip(&members) {
        let content = image::content(path, member)?;
        if content != Content::Blank && !force {
            return Err(ImageError::NotBlank { path: path.clone(), content });
        }
    }
    let uuids = (0..=members.len()).map(|_| random_uuid(paths.first())).collect::<Result<Vec<_>, _>>()?;
    let table = lay_out(paths, &members, &uuids[1..])?;
    let places: Vec<Place> = table.iter().map(|m| Place { base: m.base, start: m.start }).collect();
    let whole = MappedPmem::join(members, &places).map_err(MemberError::from)?;
    image::refuse_other_size(options, whole.len())?;
    image::choose_geometry(paths.first(), whole.len(), options.segment_size)?;
    write_labels(paths, &whole, uuids[0], &table, how)?;
    let format = FormatOptions {
        segment_size: options.segment_size,
        identity: Some(uuids[0]),
        members: table,
        ..FormatOptions::default()
    };
    cache::format(&whole, &SystemClock::default(), &format)
        .map_err(|source| ImageError::Format { path: paths.first().into(), source })?;
    Ok(Arc::new(whole))
}

fn random_uuid(path: &Path) -> Result<Uuid, ImageError> {
    let mut uuid = [0; 16];
    let failed = |source: getrandom::Error| ImageError::Format {
        path: path.into(),
        source: FormatError::Random(source.to_string()),
    };
    getrandom::fill(&mut uuid).map_err(failed)?;
    Ok(uuid)
}

/// Where each member is to lie: whole units of each but the last, which is taken as it is.
fn lay_out(paths: &CachePaths, members: &[MappedPmem], uuids: &[Uuid]) -> Result<Vec<Member>, MemberError> {
    let unit = MappedPmem::join_unit(members);
    let mut base = 0;
    let mut table = Vec::new();
    for (index, (member, uuid)) in members.iter().zip(uuids).enumerate() {
        let start = if index == 0 { 0 } else { MEMBER_START_MIN.next_multiple_of(unit) };
        let held = member.len().saturating_sub(start) / unit * unit;
        if held == 0 {
            let (path, least) = (paths.all()[index].clone(), start + unit);
            return Err(MemberError::TooSmall { path, len: member.len(), least });
        }
        table.push(Member { uuid: *uuid, base, start });
        base += held;
    }
    Ok(table)
}

/// Writes the labels, durably. They lie outside of the whole, so each file is mapped once more.
fn write_labels(
    paths: &CachePaths,
    whole: &MappedPmem,
    cache_uuid: Uuid,
    table: &[Member],
    how: How<'_>,
) -> Result<(), ImageError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ImageError::Io { path: path.clone(), step: "labelled", source }
    };
    let files: Vec<_> = whole.sources().map_err(failed(paths.first()))?.into_iter().map(Arc::new).collect();
    let how = How { taken: &files, ..how };
    for (index, (path, member)) in paths.all().iter().zip(table).enumerate().skip(1) {
        let media = how.open(index, path)?;
        let label = MemberLabel::new(cache_uuid, index as u32, member).encode();
        for at in MEMBER_LABELS {
            media.write(at, &label).map_err(|source| ImageError::Media { path: path.clone(), source })?;
        }
        media.fence();
        media.sync().map_err(|error| failed(path)(error.0))?;
    }
    Ok(())
}
