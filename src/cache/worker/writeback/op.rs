//! The next operation of a round: how extents become writes to the disk.
//!
//! Payload is verified as it is copied; what is damaged never reaches the disk.

use super::super::super::env::Env;
use super::super::super::health::Failure;
use super::super::super::plan::Plan;
use super::super::super::queue::Reader;
use super::damage::Damage;
use super::{WRITE_SECTORS_MAX, Writeback, ZERO_SECTORS_MAX};
use crate::backing::{AlignedBuf, Op};

impl<E: Env> Writeback<E> {
    /// The next operation: a run of adjacent extents of one kind. `None` when damage has taken the run
    /// apart: what is good of it comes next. Of a committed group damage is a failure instead.
    pub(super) fn next_op(
        &mut self,
        plan: &mut Plan,
        damage: &mut Damage,
        is_committed: bool,
    ) -> Result<Option<Op>, Failure> {
        let first = *plan.todo.front().expect("the caller looked");
        let longest = if first.place.zero { ZERO_SECTORS_MAX } else { WRITE_SECTORS_MAX };
        let mut run = Vec::new();
        let mut end = first.range.start;
        while let Some(extent) = plan.todo.front() {
            let len = extent.range.end() - first.range.start;
            let joins = extent.range.start == end
                && extent.place.zero == first.place.zero
                && (!first.place.zero || extent.place.position % 2 == first.place.position % 2);
            if !joins || (len > longest && !run.is_empty()) {
                break;
            }
            end = extent.range.end();
            run.push(plan.todo.pop_front().expect("it is there"));
        }
        let offset = first.range.start * 512;
        let sectors = end - first.range.start;
        if first.place.zero {
            plan.written.extend_from_slice(&run);
            let unmap = self.volume.pass_discard && first.place.position % 2 == 1;
            return Ok(Some(Op::Zero { offset, len: sectors * 512, unmap }));
        }
        let mut buf = self.buffer(sectors as usize * 512);
        let mut at = 0;
        for extent in &run {
            let copied = self.volume.cache.copy_extent(extent, Reader::Worker, true, |offset, bytes| {
                buf[at + offset..][..bytes.len()].copy_from_slice(bytes);
                Ok(())
            });
            if copied.is_err() && is_committed {
                // What the area has of it is whole.
                return Err(Failure::applying(format!("the cache's copy of {} is damaged", extent.range)));
            }
            if copied.is_err() {
                self.set_aside(plan, damage, run)?;
                return Ok(None);
            }
            at += extent.range.len as usize * 512;
        }
        plan.written.extend_from_slice(&run);
        Ok(Some(Op::Write { offset, buf }))
    }

    fn buffer(&mut self, len: usize) -> AlignedBuf {
        match self.spare.iter().position(|b| b.capacity() >= len) {
            Some(i) => {
                let mut buf = self.spare.swap_remove(i);
                buf.set_len(len);
                buf
            }
            None => AlignedBuf::new(len),
        }
    }
}
