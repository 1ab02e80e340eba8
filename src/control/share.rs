//! What a volume may hold of its cache and ask of its disk: keys, options and values of `cache_min` to
//! `burst_ms`, the same on the command line, in the file and in the API.
//!
//! All of them can change while the volume is used, so what was said of them is kept as it was said
//! ([`ShareArgs`]: `None` stays) and applied to what is the case ([`ShareConfig`]).

use clap::Args;

use super::value::{self, ValueError};
use crate::cache::{Env, GC_PERCENT_MAX, IoLimits, ShareError, Shares, Volume, WEIGHT_MAX};
use crate::units::Bytes;

/// The `gc_percent` that means none.
pub const GC_PERCENT_NONE: u8 = 100;

/// What a volume may hold and ask for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ShareConfig {
    /// Of the cache.
    pub shares: Shares,
    /// Of the disk.
    pub limits: IoLimits,
}

/// What was said of it.
#[derive(Args, Clone, Copy, PartialEq, Eq, Debug, Default)]
#[command(next_help_heading = "Shares and limits")]
pub struct ShareArgs {
    /// Cache space that other volumes never push it below; 0 for none [default: 0]
    #[arg(long, value_name = "SIZE", value_parser = size_or_none)]
    pub cache_min: Option<u64>,
    /// Most cache space it may hold; 0 for no bound [default: 0]
    #[arg(long, value_name = "SIZE", value_parser = size_or_none)]
    pub cache_max: Option<u64>,
    /// Its part of cache space that all volumes want, relative to the others' weights, 1 to 10000
    /// [default: 100]
    #[arg(long, value_name = "N", value_parser = weight)]
    pub weight: Option<u32>,
    /// Share of cache-max, or of the cache, from which on its clean data is dropped and its dirty data
    /// written back although nobody needs the space: 0 to 90, 100 for none [default: 100]
    #[arg(long, value_name = "PERCENT", value_parser = gc_percent)]
    pub gc_percent: Option<u8>,
    /// Most requests a second; 0 for no limit [default: 0]
    #[arg(long, value_name = "N", value_parser = iops)]
    pub iops: Option<u64>,
    /// Most reads a second; 0 for no limit [default: 0]
    #[arg(long, value_name = "N", value_parser = iops)]
    pub read_iops: Option<u64>,
    /// Most writes and discards a second; 0 for no limit [default: 0]
    #[arg(long, value_name = "N", value_parser = iops)]
    pub write_iops: Option<u64>,
    /// Most bytes a second, like 200MiB; 0 for no limit [default: 0]
    #[arg(long, value_name = "SIZE", value_parser = size_or_none)]
    pub bytes_per_s: Option<u64>,
    /// Most bytes read a second; 0 for no limit [default: 0]
    #[arg(long, value_name = "SIZE", value_parser = size_or_none)]
    pub read_bytes_per_s: Option<u64>,
    /// Most bytes written a second; 0 for no limit [default: 0]
    #[arg(long, value_name = "SIZE", value_parser = size_or_none)]
    pub write_bytes_per_s: Option<u64>,
    /// For how long what these limits leave unused may be saved up, in milliseconds, 1 to 60000
    /// [default: 100]
    #[arg(long, value_name = "MILLISECONDS", value_parser = burst_ms)]
    pub burst_ms: Option<u32>,
}

impl ShareConfig {
    /// A volume's, as they are now.
    pub fn of<E: Env>(volume: &Volume<E>) -> Self {
        Self { shares: volume.shares(), limits: volume.io_limits() }
    }

    /// Makes them a volume's, at once.
    ///
    /// # Errors
    /// The cache cannot keep them; nothing has changed.
    pub fn set<E: Env>(&self, volume: &Volume<E>) -> Result<(), ShareError> {
        volume.set_shares(self.shares)?;
        volume.set_io_limits(self.limits);
        Ok(())
    }

    /// What differs in `wanted`, and that in words.
    pub fn differences(&self, wanted: &ShareConfig) -> (ShareArgs, Vec<String>) {
        let mut said = Vec::new();
        let mut number = |key: &str, now: u64, then: u64, is_size: bool| {
            if now == then {
                return None;
            }
            let text = |n: u64| match (is_size, n) {
                (true, 0) => "none".to_owned(),
                (true, n) => Bytes(n).to_string(),
                (false, n) => n.to_string(),
            };
            said.push(format!("{key} {} becomes {}", text(now), text(then)));
            Some(then)
        };
        let (a, b) = (&self.shares, &wanted.shares);
        let (c, d) = (&self.limits, &wanted.limits);
        let gc = |shares: &Shares| u64::from(shares.gc_percent.unwrap_or(GC_PERCENT_NONE));
        let differing = ShareArgs {
            cache_min: number("cache_min", a.min, b.min, true),
            cache_max: number("cache_max", a.max, b.max, true),
            weight: number("weight", a.weight.into(), b.weight.into(), false).map(|n| n as u32),
            gc_percent: number("gc_percent", gc(a), gc(b), false).map(|n| n as u8),
            iops: number("iops", c.iops, d.iops, false),
            read_iops: number("read_iops", c.read_iops, d.read_iops, false),
            write_iops: number("write_iops", c.write_iops, d.write_iops, false),
            bytes_per_s: number("bytes_per_s", c.bytes_per_s, d.bytes_per_s, true),
            read_bytes_per_s: number("read_bytes_per_s", c.read_bytes_per_s, d.read_bytes_per_s, true),
            write_bytes_per_s: number("write_bytes_per_s", c.write_bytes_per_s, d.write_bytes_per_s, true),
            burst_ms: number("burst_ms", c.burst_ms.into(), d.burst_ms.into(), false).map(|n| n as u32),
        };
        (differing, said)
    }
}

impl ShareArgs {
    /// Whether anything was said.
    pub fn is_any(&self) -> bool {
        *self != ShareArgs::default()
    }

    /// What `before` becomes with it.
    pub fn applied_to(&self, before: ShareConfig) -> ShareConfig {
        let ShareConfig { shares, limits } = before;
        let gc = |percent: u8| (percent != GC_PERCENT_NONE).then_some(percent);
        ShareConfig {
            shares: Shares {
                min: self.cache_min.unwrap_or(shares.min),
                max: self.cache_max.unwrap_or(shares.max),
                weight: self.weight.unwrap_or(shares.weight),
                gc_percent: self.gc_percent.map_or(shares.gc_percent, gc),
            },
            limits: IoLimits {
                iops: self.iops.unwrap_or(limits.iops),
                read_iops: self.read_iops.unwrap_or(limits.read_iops),
                write_iops: self.write_iops.unwrap_or(limits.write_iops),
                bytes_per_s: self.bytes_per_s.unwrap_or(limits.bytes_per_s),
                read_bytes_per_s: self.read_bytes_per_s.unwrap_or(limits.read_bytes_per_s),
                write_bytes_per_s: self.write_bytes_per_s.unwrap_or(limits.write_bytes_per_s),
                burst_ms: self.burst_ms.unwrap_or(limits.burst_ms),
            },
        }
    }
}

/// A size, or `0` for none.
///
/// # Errors
/// Neither.
pub fn size_or_none(text: &str) -> Result<u64, ValueError> {
    if text == "0" { Ok(0) } else { text.parse().map(|Bytes(size)| size) }
}

/// A weight.
///
/// # Errors
/// Not a number from 1 to [`WEIGHT_MAX`].
pub fn weight(text: &str) -> Result<u32, ValueError> {
    Ok(value::whole(text, 1, WEIGHT_MAX.into())? as u32)
}

/// A share in percent, as dm-pcache takes it.
///
/// # Errors
/// Neither a number from 0 to [`GC_PERCENT_MAX`] nor [`GC_PERCENT_NONE`].
pub fn gc_percent(text: &str) -> Result<u8, ValueError> {
    if text == GC_PERCENT_NONE.to_string() {
        return Ok(GC_PERCENT_NONE);
    }
    Ok(value::whole(text, 0, GC_PERCENT_MAX.into())? as u8)
}

/// Requests a second, or 0 for no limit.
///
/// # Errors
/// Not a number up to a thousand million.
pub fn iops(text: &str) -> Result<u64, ValueError> {
    value::whole(text, 0, 1_000_000_000)
}

/// How long is saved up, in milliseconds.
///
/// # Errors
/// Not a number from 1 to a minute.
pub fn burst_ms(text: &str) -> Result<u32, ValueError> {
    Ok(value::whole(text, 1, 60_000)? as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> ShareArgs {
        ShareArgs {
            cache_min: Some(1 << 30),
            cache_max: Some(2 << 30),
            weight: Some(300),
            gc_percent: Some(70),
            iops: Some(1),
            read_iops: Some(2),
            write_iops: Some(3),
            bytes_per_s: Some(4096),
            read_bytes_per_s: Some(8192),
            write_bytes_per_s: Some(12_288),
            burst_ms: Some(7),
        }
    }

    #[test]
    fn what_was_said_is_applied_and_the_rest_stays() {
        let before = ShareConfig::default();
        assert_eq!(ShareArgs::default().applied_to(before), before);
        let after = all().applied_to(before);
        let (differing, said) = before.differences(&after);
        assert_eq!(differing, all(), "every key differs and is found");
        assert_eq!(said.len(), 11);
        assert_eq!(said[0], "cache_min none becomes 1 GiB");
        assert_eq!((said[3].as_str(), said[4].as_str()), ("gc_percent 100 becomes 70", "iops 0 becomes 1"));
        assert_eq!(differing.applied_to(before), after);
        assert_eq!(after.differences(&before).0.applied_to(after), before, "and back");
        assert_eq!(after.differences(&after), (ShareArgs::default(), vec![]));
        let weight = ShareArgs { weight: Some(9), ..ShareArgs::default() };
        let changed = weight.applied_to(after);
        assert_eq!((changed.shares.weight, changed.shares.min, changed.limits), (9, 1 << 30, after.limits));
    }

    #[test]
    fn values_are_within_their_bounds() {
        assert_eq!((size_or_none("0"), size_or_none("3GiB")), (Ok(0), Ok(3 << 30)));
        assert!(size_or_none("3GB").is_err() && size_or_none("-1").is_err());
        assert_eq!((weight("1"), weight("10000")), (Ok(1), Ok(10_000)));
        assert!(weight("0").is_err() && weight("10001").is_err());
        assert_eq!((gc_percent("0"), gc_percent("90"), gc_percent("100")), (Ok(0), Ok(90), Ok(100)));
        assert!(gc_percent("91").is_err() && gc_percent("306").is_err(), "nothing is cut to eight bits");
        assert_eq!((iops("0"), burst_ms("60000")), (Ok(0), Ok(60_000)));
        assert!(burst_ms("0").is_err());
    }
}
