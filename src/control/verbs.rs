//! The offline verbs: `format`, `check`, `dump`, `drain`, `resolve`. What they find goes to standard output,
//! how far they are to standard error.

use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::announce::{self, print};
use super::cli::{CheckArgs, DrainArgs, DumpArgs, FormatArgs, KeepArg, RecoverArgs, ResolveArgs};
use super::config::{self, Consents};
use super::exit::Exit;
use super::file;
use super::progress::Progress;
use super::run::{RunError, of_cache, state_dir};
use crate::cache::{self, Cache, CheckReport, Clock, SystemClock, Verdict};
use crate::onmedia::Geometry;
use crate::pmem::Pmem;
use crate::tools::Host;
use crate::tools::created::Created;
use crate::tools::drain::{DrainOptions, Drained, drain as drain_volume};
use crate::tools::image::{self, ImageError, ImageOptions, Sizing};
use crate::tools::members::CachePaths;
use crate::tools::recover;
use crate::tools::resolve::{self, Keep, ResolveOptions, Standing};
use crate::units::Bytes;

/// `format`: an empty cache where there was nothing, or where `--force` allows it.
pub(super) fn format(args: &FormatArgs) -> Result<Exit, RunError> {
    let path = config::cache_path(&args.cache, &args.state_dir, state_dir())?;
    let default = args.cache.is_empty().then_some(config::DEFAULT_CACHE_SIZE);
    let size = Sizing::of(args.cache_size, default);
    let mut created = Created::default();
    if let (true, Some(directory)) = (args.cache.is_empty(), path.first().parent()) {
        created
            .make_directory(directory)
            .map_err(|source| RunError::Directory { path: directory.into(), source })?;
    }
    let options = ImageOptions {
        path: &path,
        size,
        segment_size: args.segment_size,
        assume_dax: args.assume_dax,
        taken: &[],
    };
    let image = image::format(&options, args.force)?;
    created.keep();
    let geometry = Geometry::choose(image.pmem.len(), args.segment_size)
        .map_err(|source| ImageError::Geometry { path: path.first().into(), source })?;
    let (class, what) = (image.pmem.class(), image::describe(&geometry));
    print(&format!(
        "cache   {}: formatted, {what}, {class}\n        {}\n",
        path.display(),
        announce::durability(class)
    ));
    Ok(Exit::Done)
}

/// `check`: whether everything that must be whole is whole.
pub(super) fn check(args: &CheckArgs) -> Result<Exit, RunError> {
    let path = config::cache_path(&args.cache, &args.state_dir, state_dir())?;
    let pmem = image::open(&path, false, true)?;
    let mut report = cache::check(&pmem);
    if report.verdict == Verdict::NotOurs {
        // The engine knows only that it is not a cache; what it is instead helps more.
        report.findings = vec![format!("holds {}", image::content(path.first(), &*pmem)?)];
    }
    print(&check_text(&path, &report));
    Ok(match report.verdict {
        Verdict::Clean => Exit::Done,
        Verdict::Damaged => Exit::Damaged,
        Verdict::NotOurs => Exit::NotOurs,
    })
}

fn check_text(path: &CachePaths, report: &CheckReport) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        text.push_str(&format!("damage  {finding}\n"));
    }
    if report.verdict == Verdict::NotOurs {
        text = report.findings.iter().map(|finding| format!("content {finding}\n")).collect();
    }
    for remark in &report.remarks {
        text.push_str(&format!("remark  {remark}\n"));
    }
    for row in &report.volumes {
        let size = Bytes(row.sectors * 512);
        writeln!(
            text,
            "volume  {}: {size}, segments={} keys={} dirty_sectors={} tail_epoch={}",
            row.name, row.segments, row.keys, row.dirty_sectors, row.tail
        )
        .expect("a String takes any text");
    }
    if report.verdict != Verdict::NotOurs {
        let [free, open, sealed] = report.segments;
        text.push_str(&format!("segments free={free} open={open} sealed={sealed}\n"));
    }
    let verdict = match report.verdict {
        Verdict::Clean => "clean",
        Verdict::Damaged => "damaged",
        Verdict::NotOurs => "not a pcache-vhost cache",
    };
    text.push_str(&format!("{}: {verdict}\n", path.display()));
    text
}

/// `dump`: what the metadata says.
pub(super) fn dump(args: &DumpArgs) -> Result<Exit, RunError> {
    let path = config::cache_path(&args.cache, &args.state_dir, state_dir())?;
    let pmem = image::open(&path, false, true)?;
    match cache::dump(&pmem, args.keys, &mut io::stdout().lock()) {
        Ok(()) => Ok(Exit::Done),
        // `dump | head` has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Done),
        Err(source) => {
            Err(RunError::Image(ImageError::Io { path: path.first().into(), step: "dumped", source }))
        }
    }
}

/// A cache to drain, and where the disks of its volumes are said to be.
struct DrainJob<'a> {
    cache: &'a CachePaths,
    assume_dax: bool,
    /// Disks by volume, where the configuration knows better than the cache.
    disks: Vec<(&'a str, &'a Path, bool)>,
}

/// `drain`: everything dirty to its disk.
pub(super) fn drain(args: &DrainArgs) -> Result<Exit, RunError> {
    if let Some(file) = &args.config {
        let config = file::load(file, &Consents::default())?;
        for (index, cache) in config.caches().iter().enumerate() {
            let of_cache = config.volumes().iter().filter(|volume| volume.cache == index);
            let disks = of_cache
                .map(|volume| (volume.name.as_str(), volume.backing.path.as_path(), volume.backing.raw));
            let disks = disks.collect();
            drain_cache(&DrainJob { cache: &cache.path, assume_dax: cache.assume_dax, disks }, args)?;
        }
        return Ok(Exit::Done);
    }
    let path = config::cache_path(&args.cache, &args.state_dir, state_dir())?;
    drain_cache(&DrainJob { cache: &path, assume_dax: args.assume_dax, disks: Vec::new() }, args)?;
    Ok(Exit::Done)
}

/// Opens a cache that nobody serves, and recovers it.
fn open_cache(path: &CachePaths, assume_dax: bool) -> Result<Arc<Cache<Host>>, RunError> {
    let options = ImageOptions { path, size: Sizing::AsFound, segment_size: None, assume_dax, taken: &[] };
    let opened = image::open_or_create(&options, &mut Created::default())?;
    let (cache, report) =
        Cache::<Host>::open(opened.pmem, SystemClock::default()).map_err(of_cache(path.first()))?;
    for finding in &report.findings {
        tracing::warn!("cache {}: {finding}", path.display());
    }
    Ok(cache)
}

fn drain_cache(job: &DrainJob<'_>, args: &DrainArgs) -> Result<(), RunError> {
    let cache = open_cache(job.cache, job.assume_dax)?;
    let names = volumes_to_drain(&cache, args)?;
    for name in &names {
        drain_one(job, args, &cache, name)?;
    }
    cache.close().map_err(of_cache(job.cache.first()))?;
    if names.is_empty() {
        print(&format!("{}: no volume, nothing to drain\n", job.cache.display()));
    }
    Ok(())
}

/// The volumes asked for. What is said for one volume must not be taken for several.
fn volumes_to_drain(cache: &Cache<Host>, args: &DrainArgs) -> Result<Vec<String>, RunError> {
    if let Some(name) = &args.name {
        return Ok(vec![name.as_str().into()]);
    }
    let names: Vec<String> = cache.volumes().into_iter().map(|(name, _, _)| name).collect();
    if names.len() > 1 {
        if args.force_identity {
            return Err(RunError::WhichVolume("force-identity"));
        }
        if args.accept_loss {
            return Err(RunError::WhichVolume("accept-loss"));
        }
        if args.backing.is_some() {
            return Err(RunError::WhoseBacking(names.join(", ")));
        }
    }
    Ok(names)
}

fn drain_one(
    job: &DrainJob<'_>,
    args: &DrainArgs,
    cache: &Arc<Cache<Host>>,
    name: &str,
) -> Result<(), RunError> {
    let configured = job.disks.iter().find(|(volume, _, _)| *volume == name);
    let options = DrainOptions {
        backing: args.backing.as_deref().or(configured.map(|(_, path, _)| *path)),
        redo: args.redo.as_deref(),
        raw: args.backing_format.is_some() || configured.is_some_and(|(_, _, raw)| *raw),
        force_identity: args.force_identity,
        accept_loss: args.accept_loss,
    };
    let mut progress = Progress::new(format!("volume {name}"));
    let drained = drain_volume(cache, name, &options, &mut |step| {
        progress.show(step.total_bytes.saturating_sub(step.dirty_bytes), step.total_bytes);
    });
    progress.finish();
    let drained = drained
        .map_err(|source| RunError::Drain { cache: job.cache.first().into(), source: Box::new(source) })?;
    print(&match drained {
        Drained::WasClean => format!("volume  {name}: clean already\n"),
        Drained::Done { backing, bytes, lost_sectors } => {
            let backing = backing.display();
            let mut text = format!("volume  {name}: {} written to {backing}, clean\n", Bytes(bytes));
            if lost_sectors > 0 {
                text += &format!(
                    "        {lost_sectors} sectors are lost to damage of the cache (`check` lists them): the disk \
                     has older bytes there\n"
                );
            }
            text
        }
    });
    Ok(())
}

/// `recover-backing`: disks without their cache.
pub(super) fn recover_backing(args: &RecoverArgs) -> Result<Exit, RunError> {
    let redos = match args.redo.is_empty() {
        true => args.backing.iter().map(|disk| crate::tools::redo::beside(disk)).collect(),
        false => args.redo.clone(),
    };
    let done = recover::recover(&args.backing, &redos, args.force, args.alone)?;
    for ((disk, redo), done) in args.backing.iter().zip(redos).zip(done) {
        let disk = disk.display();
        match done {
            None => print(&format!("{disk}: no group is under way, the disk is consistent as it is\n")),
            Some(done) => print(&format!(
                "{disk}: {} applied from {}; it is as the guest had left it {} s ago\n",
                Bytes(done.sectors * 512),
                redo.display(),
                SystemClock::default().unix_ms().saturating_sub(done.time_ms) / 1000
            )),
        }
    }
    Ok(Exit::Done)
}

/// `resolve`: what counts where a cache and a disk do not go together.
pub(super) fn resolve(args: &ResolveArgs) -> Result<Exit, RunError> {
    let path = config::cache_path(&args.cache, &args.state_dir, state_dir())?;
    let cache = open_cache(&path, args.assume_dax)?;
    let name = match &args.name {
        Some(name) => name.as_str().to_owned(),
        None => {
            let mut names: Vec<String> = cache.volumes().into_iter().map(|(name, _, _)| name).collect();
            match names.len() {
                0 => {
                    cache.close().map_err(of_cache(path.first()))?;
                    print(&format!("{}: no volume, nothing to resolve\n", path.display()));
                    return Ok(Exit::Done);
                }
                1 => names.remove(0),
                _ => return Err(RunError::ResolveWhich(names.join(", "))),
            }
        }
    };
    let options = ResolveOptions {
        backing: args.backing.as_deref(),
        grow: args.grow,
        accept_loss: args.accept_loss,
        statement: args.statement.as_deref(),
    };
    let failed = |source| RunError::Resolve { cache: path.first().into(), source: Box::new(source) };
    let text = match args.keep.map(keep) {
        None => standing(&resolve::judge(&cache, &name, &options).map_err(failed)?),
        Some(keep) => resolve::resolve(&cache, &name, keep, &options).map_err(failed)?,
    };
    cache.close().map_err(of_cache(path.first()))?;
    print(&format!("volume  {name}: {text}\n"));
    Ok(Exit::Done)
}

fn keep(keep: KeepArg) -> Keep {
    match keep {
        KeepArg::All => Keep::All,
        KeepArg::Dirty => Keep::Dirty,
        KeepArg::None => Keep::Nothing,
    }
}

fn standing(standing: &Standing) -> String {
    let dirty = standing.unwritten.dirty_bytes();
    let (clean, dirty) = (Bytes(standing.unwritten.cached_bytes.saturating_sub(dirty)), Bytes(dirty));
    let verdict = match &standing.against {
        None => format!("{} goes with it", standing.path.display()),
        Some(why) => why.to_string(),
    };
    format!(
        "{verdict}\n\
         cached  {clean} clean, {dirty} on no disk\n\
         keep    all: the disk is as the volume left it; {clean} clean count\n\
         keep    dirty: {dirty} will be written to the disk, all else is read from it\n\
         keep    none: the disk alone counts; {dirty} are lost"
    )
}
