//! The disks of a consistency group whose cache is lost: what their redo areas hold is brought to all of
//! them, or to none.
//!
//! Laws:
//! - What counts is told by the areas alone, by the rule of FORMAT.md ("Several disks"); reading them
//!   decides for all disks before the first is written to.
//! - A group that counts goes on counting while it is applied and after: who is interrupted, or has done
//!   one of the disks, comes to the same verdict again.
//! - Of a group that does not count nothing is on any disk. Its headers are taken back one by one, and
//!   each that is makes it count no more than before.
//! - One area or disk that cannot be read leaves all of them as they are.

use std::sync::Arc;

use super::redo::{Recovered, Redo, RedoError};
use crate::backing::Backing;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::RedoHeader;

/// A disk and its redo area.
pub struct Member<'a, B: Backing> {
    /// Where its groups lie before they are on it.
    pub redo: Arc<B>,
    /// The disk.
    pub disk: &'a B,
}

/// Brings disks whose cache is lost to the end of what their redo areas hold: those of a consistency
/// group to one common point. `None` for a disk whose area holds nothing that counts: it is as it is to
/// be. With `alone` a part of a group counts although the others of its group are not given.
///
/// # Errors
/// [`RedoError`]; where a disk and its area do not belong together, or one of a group is missing,
/// nothing has been changed.
pub fn recover_group<B: Backing>(
    members: &[Member<'_, B>],
    force: bool,
    alone: bool,
) -> Result<Vec<Option<Recovered>>, RedoError> {
    let redos =
        members.iter().map(|member| Redo::open(member.redo.clone())).collect::<Result<Vec<_>, _>>()?;
    let headers: Vec<RedoHeader> = redos.iter().map(Redo::header).collect();
    let mut counts = Vec::with_capacity(redos.len());
    for (redo, member) in redos.iter().zip(members) {
        let does_count = redo.is_committed() && does_count(redo, &headers, alone)?;
        if does_count {
            redo.check_disk(member.disk, force)?;
        }
        counts.push(does_count);
    }
    let mut recovered = Vec::with_capacity(redos.len());
    for ((redo, member), does_count) in redos.iter().zip(members).zip(counts) {
        recovered.push(match does_count {
            true => Some(redo.finish(member.disk)?),
            false if redo.is_committed() => {
                redo.take_back()?;
                None
            }
            false => None,
        });
    }
    Ok(recovered)
}

/// Whether the committed group of an area counts, by what the areas given say.
fn does_count<B: Backing>(redo: &Redo<B>, headers: &[RedoHeader], alone: bool) -> Result<bool, RedoError> {
    let own = redo.header();
    if mutated(Mutant::JointPartBelieved) {
        return Ok(true);
    }
    for uuid in own.members.iter().filter(|uuid| **uuid != own.volume_uuid) {
        match headers.iter().find(|header| header.volume_uuid == *uuid) {
            // An area that has held nothing yet says nothing of a group either.
            Some(header) if header.group_uuid == own.group_uuid && header.epoch >= own.epoch => {}
            Some(_) => return Ok(false),
            None if alone => {}
            None => return Err(RedoError::NotAll { path: redo.path(), members: own.members.len() }),
        }
    }
    Ok(true)
}
