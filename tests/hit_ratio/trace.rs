//! Requests in blocks of 4 KiB: from files of public traces, or made up.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::process::Command;

use pcache_vhost::sim::Rng;
use pcache_vhost::sim::timed::{Ask, Guest};

/// One request.
#[derive(Clone, Copy)]
pub struct Access {
    /// Not asked for before this moment, in µs.
    pub at_us: u64,
    pub block: u64,
    pub blocks: u64,
    pub is_write: bool,
}

/// A workload.
pub struct Trace {
    pub name: &'static str,
    pub accesses: Vec<Access>,
}

/// Bytes of a file, unpacked by a program.
fn unpack(program: &str, path: &Path) -> Result<Vec<u8>, String> {
    let output = Command::new(program).arg("-dc").arg(path).output();
    let output = output.map_err(|e| format!("cannot run {program}: {e}"))?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

/// A disk of a virtual machine over two hours, with its moments, ten times as fast as it was.
/// Partitions begin at sector 63: blocks are counted from there.
///
/// # Errors
/// It cannot be unpacked.
pub fn cloud_physics(folder: &Path) -> Result<Trace, String> {
    let bytes = unpack("xz", &folder.join("cloudPhysicsIO.vscsi.xz"))?;
    let mut accesses = Vec::new();
    for record in bytes.chunks_exact(32) {
        let number = |at: usize, len: usize| {
            record[at..at + len].iter().rev().fold(0u64, |n, &byte| n << 8 | u64::from(byte))
        };
        let (len, command, sector, at_us) = (number(4, 4), number(12, 2), number(16, 8) + 1, number(24, 8));
        let (block, end) = (sector / 8, (sector * 512 + len).div_ceil(4096));
        if end > block {
            accesses.push(Access { at_us, block, blocks: end - block, is_write: command == 0x2a });
        }
    }
    accesses.sort_by_key(|a| a.at_us);
    let begin = accesses.first().map_or(0, |a| a.at_us);
    accesses.iter_mut().for_each(|a| a.at_us = (a.at_us - begin) / 10);
    Ok(Trace { name: "cloudPhysicsIO", accesses: compact(accesses) })
}

/// An hour of a database, reads only.
///
/// # Errors
/// It cannot be unpacked.
pub fn arc_oltp(folder: &Path) -> Result<Trace, String> {
    let text = unpack("zstd", &folder.join("arc_OLTP.lis.zst"))?;
    let text = String::from_utf8(text).map_err(|e| e.to_string())?;
    let row = |line: &str| {
        let mut fields = line.split_whitespace();
        let (block, blocks) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(Access { at_us: 0, block, blocks, is_write: false })
    };
    Ok(Trace { name: "arc_OLTP", accesses: compact(text.lines().filter_map(row).collect()) })
}

/// Skewed reads and writes whose favourites move on, a loop that does not fit, and scans.
pub fn synthetic(seed: u64, requests: usize) -> Trace {
    let mut rng = Rng::new(seed);
    let (skewed, looped, scanned) = (50_000u64, 8_000u64, 40_000u64);
    let (mut accesses, mut in_loop, mut in_scan, mut moved) = (Vec::new(), 0, 0, 0);
    while accesses.len() < requests {
        let mut ask = |block, blocks, is_write| {
            let at_us = accesses.len() as u64 * 500;
            accesses.push(Access { at_us, block, blocks, is_write });
        };
        match rng.below(100) {
            0..70 => {
                // About one over the rank: a uniform exponent of the range.
                let rank = (skewed as f64).powf(rng.below(1 << 20) as f64 / (1 << 20) as f64) as u64;
                let block = (rank.wrapping_mul(7919) + moved) % skewed;
                ask(block, 1, rng.chance(1, 5));
            }
            70..90 => {
                ask(skewed + in_loop, 4, false);
                in_loop = (in_loop + 4) % looped;
            }
            90..94 => {
                ask(skewed + looped + in_scan, 8, false);
                in_scan = (in_scan + 8) % scanned;
            }
            _ => ask(skewed + looped + scanned + rng.below(12_000), 1, true),
        }
        moved += u64::from(rng.chance(1, 50));
    }
    Trace { name: "synthetic", accesses }
}

/// The same with unused stretches of 1 MiB left out: the disk need not be as large.
fn compact(mut accesses: Vec<Access>) -> Vec<Access> {
    let stretches = |a: &Access| a.block >> 8..=(a.block + a.blocks - 1) >> 8;
    let used: BTreeSet<u64> = accesses.iter().flat_map(stretches).collect();
    let used: Vec<u64> = used.into_iter().collect();
    for access in &mut accesses {
        let at = used.binary_search(&(access.block >> 8)).expect("it is used");
        access.block = (at as u64) << 8 | access.block & 255;
    }
    accesses
}

impl Trace {
    /// Different blocks touched.
    pub fn footprint(&self) -> usize {
        let blocks = |a: &Access| a.block..a.block + a.blocks;
        self.accesses.iter().flat_map(blocks).collect::<HashSet<u64>>().len()
    }

    /// Blocks of the smallest disk that has all of them.
    pub fn disk_blocks(&self) -> u64 {
        self.accesses.iter().map(|a| a.block + a.blocks).max().unwrap_or(0).next_multiple_of(256)
    }
}

/// A guest that asks for what a part of a trace did, one request after the other.
pub struct Replay<'a> {
    accesses: std::slice::Iter<'a, Access>,
    /// When the clock was at the trace's beginning.
    pub from_us: u64,
}

impl<'a> Replay<'a> {
    pub fn new(accesses: &'a [Access], from_us: u64) -> Replay<'a> {
        Replay { accesses: accesses.iter(), from_us }
    }
}

impl Guest for Replay<'_> {
    fn next(&mut self, _: &dyn Fn(u64, u64) -> bool) -> Option<(u64, Ask)> {
        let access = self.accesses.next()?;
        let (first, sectors) = (access.block * 8, access.blocks * 8);
        let ask = if access.is_write { Ask::Write { first, sectors } } else { Ask::Read { first, sectors } };
        Some((if access.at_us == 0 { 0 } else { self.from_us + access.at_us }, ask))
    }
}

/// A guest that reads a whole disk once.
pub struct Scan {
    pub next: u64,
    pub end: u64,
}

impl Guest for Scan {
    fn next(&mut self, _: &dyn Fn(u64, u64) -> bool) -> Option<(u64, Ask)> {
        let first = self.next;
        let sectors = (self.end - first).min(512);
        self.next += sectors;
        (sectors > 0).then_some((0, Ask::Read { first, sectors }))
    }
}
