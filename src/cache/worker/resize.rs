//! The steps of a change of size; the laws are in `cache/resize.rs`.
//!
//! A shrink first empties the segments beyond the new end, as reclaim does everything: dirty data reaches
//! its disk (write-back hurries), what is hot may be copied, the rest is dropped. Then both go on alike:
//!
//! | step | stored, and durable before the next step | a crash after it leaves |
//! |---|---|---|
//! | `Void` (shrink) | both superblocks: the segments beyond are void | the old size; a start makes them again |
//! | `Post` | the signpost, of the old size, where it was none | the old size |
//! | `Copy` | the back metadata at its new place; from now on it is stored twice | the old size |
//! | `Back` | the back superblock there, of the new size | the old size |
//! | `Front` | the front superblock, of the new size | the new size |
//! | `Repost` | the signpost, of the new size | the new size |
//! | `Make` (growth) | headers of the new segments | the new size; a start makes them again |
//! | `Settle` (growth) | both superblocks: nothing is void | the new size |
//!
//! What breaks if two are swapped: `Copy` before `Void`, and a crash finds headers overwritten that count;
//! `Front` before `Back`, and a torn front superblock leaves none; `Repost` before `Front`, the same, or
//! the new size without the front; `Settle` before `Make`, and headers count that are not there.

use std::sync::atomic::Ordering;

use super::super::env::Env;
use super::super::resize::{ResizeError, first_header, whole_superblock};
use super::super::segments::State;
use super::super::stripes::lock;
use super::super::syncer::{Durable, Outcome};
use super::Progress;
use super::housekeeper::Housekeeper;
use crate::mutant::{Mutant, mutated};
use crate::onmedia::{Geometry, Superblock};
use crate::pmem::Pmem;

/// Segments made in one step.
const MAKE_BATCH: u32 = 64;
/// Segments emptied at a time.
const EMPTY_BATCH: usize = 8;

/// What is done next, once what was stored last is durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Empty,
    Void(u32),
    Post,
    Copy,
    Back,
    Front,
    Repost,
    Move,
    Make(u32),
    Settle(u32),
    Count,
}

/// A change of size under way.
pub(super) struct Task {
    from: Geometry,
    to: Geometry,
    /// As it was stored last.
    superblock: Superblock,
    step: Step,
    /// What the step waits for.
    durable: Option<Durable>,
    /// Segments to be emptied or made.
    total: u32,
}

impl Task {
    fn grows(&self) -> bool {
        self.to.segment_count > self.from.segment_count
    }
}

impl<E: Env> Housekeeper<E> {
    /// Takes one step of a change of size, if one is asked for.
    pub(super) fn resize(&mut self) -> Progress {
        let Some(mut task) = self.resizing.take() else { return self.take_up_resize() };
        if let Some(ticket) = task.durable {
            match self.cache.syncer.outcome(ticket) {
                Outcome::Reached => task.durable = None,
                Outcome::Failed => {
                    self.cache.resizing.end(Err(ResizeError::NotDurable));
                    return Progress::Did;
                }
                Outcome::Waiting => {
                    self.resizing = Some(task);
                    return Progress::Waiting;
                }
            }
        }
        match self.resize_step(&mut task) {
            Ok(Some(progress)) => {
                self.resizing = Some(task);
                progress
            }
            Ok(None) => {
                self.cache.resizing.end(Ok(()));
                Progress::Did
            }
            Err(error) => {
                self.give_up(&task, &error);
                self.cache.resizing.end(Err(error));
                Progress::Did
            }
        }
    }

    /// Begins what is asked for.
    fn take_up_resize(&mut self) -> Progress {
        let asked = lock(&self.cache.resizing.asked).as_ref().filter(|a| a.ended.is_none()).map(|a| a.target);
        let Some(to) = asked else { return Progress::Idle };
        let from = self.cache.media.geometry.now();
        match whole_superblock(&*self.cache.media.pmem) {
            Ok(superblock) => {
                let total = to.segment_count.abs_diff(from.segment_count);
                let grows = to.segment_count > from.segment_count;
                let step = if grows { Step::Post } else { Step::Empty };
                self.resizing = Some(Task { from, to, superblock, step, durable: None, total });
                if !grows {
                    self.cache.retire_free(to.segment_count as usize);
                }
            }
            Err(error) => self.cache.resizing.end(Err(error)),
        }
        Progress::Did
    }

    /// Undoes what is undone in DRAM alone; a failure later than that is finished by a start.
    fn give_up(&self, task: &Task, error: &ResizeError) {
        match task.step {
            Step::Empty => self.cache.set_segments(task.from.segment_count as usize),
            Step::Post | Step::Copy | Step::Back if task.grows() => self.cache.media.abandon_move(),
            _ => {}
        }
        tracing::warn!(%error, step = ?task.step, "the cache's size is not changed");
    }

    /// Does the task's step and names the next. `None` when nothing is left to do.
    fn resize_step(&mut self, task: &mut Task) -> Result<Option<Progress>, ResizeError> {
        let cache = self.cache.clone();
        let (media, grows) = (&cache.media, task.grows());
        let void_from = Some(task.from.segment_count).filter(|_| grows && !mutated(Mutant::VoidNotNoted));
        match task.step {
            Step::Empty => return self.empty_some(task).map(Some),
            Step::Void(copy) => {
                let step = if copy == 1 { Step::Void(0) } else { Step::Post };
                if copy == 1 {
                    // Media that have grown behind the cache's back: it is to be found before the front
                    // is stored.
                    media.put_signpost(&task.superblock)?;
                }
                if !mutated(Mutant::VoidNotNoted) {
                    self.store_superblock(task, copy as usize, |s, from, to| {
                        s.with_size(from, Some(to.segment_count))
                    })?;
                }
                task.step = step;
            }
            Step::Post => {
                media.put_signpost(&task.superblock)?;
                task.step = Step::Copy;
            }
            Step::Copy => {
                media.begin_move(task.to.superblock(1))?;
                task.step = Step::Back;
            }
            Step::Back => {
                task.superblock.sequence += 1;
                task.superblock = task.superblock.clone().with_size(&task.to, void_from);
                media.pmem.write(task.to.superblock(1), &task.superblock.encode()[..])?;
                task.step = Step::Front;
            }
            Step::Front => {
                media.pmem.write(task.to.superblock(0), &task.superblock.encode()[..])?;
                task.step = Step::Repost;
            }
            Step::Repost => {
                media.put_signpost(&task.superblock)?;
                task.step = Step::Move;
            }
            Step::Move => {
                media.finish_move(&task.to);
                if !grows {
                    return Ok(None);
                }
                cache.segments.make(task.to.segment_count as usize);
                task.step = Step::Make(task.from.segment_count);
                return Ok(Some(Progress::Did));
            }
            Step::Make(next) => task.step = self.make_some(task, next)?,
            Step::Settle(_) if mutated(Mutant::UsedWhileVoid) => task.step = Step::Count,
            Step::Settle(copy) => {
                self.store_superblock(task, copy as usize, |s, _, to| s.with_size(to, None))?;
                task.step = if copy == 1 { Step::Settle(0) } else { Step::Count };
            }
            Step::Count => {
                cache.set_segments(task.to.segment_count as usize);
                cache.is_exhausted.store(false, Ordering::SeqCst);
                cache.all_volumes().iter().for_each(|volume| volume.wake_waiting());
                return Ok(None);
            }
        }
        task.durable = Some(cache.syncer.request(&*media.pmem, None));
        Ok(Some(Progress::Did))
    }

    /// Stores one copy of the superblock, changed, where both are of the geometry that the cache has.
    fn store_superblock(
        &self,
        task: &mut Task,
        copy: usize,
        change: impl FnOnce(Superblock, &Geometry, &Geometry) -> Superblock,
    ) -> Result<(), ResizeError> {
        let media = &self.cache.media;
        let mut superblock = change(task.superblock.clone(), &task.from, &task.to);
        superblock.sequence += 1;
        media.pmem.write(media.geometry.superblock(copy), &superblock.encode()[..])?;
        task.superblock = superblock;
        Ok(())
    }

    /// Writes the headers of some new segments.
    fn make_some(&self, task: &Task, next: u32) -> Result<Step, ResizeError> {
        let end = task.to.segment_count.min(next + MAKE_BATCH);
        for id in next..end {
            let first = first_header(&task.superblock, id);
            let segment = &self.cache.segments[id as usize];
            segment.generation.store(first.generation, Ordering::Relaxed);
            self.cache.write_header(id, |header| header.generation = first.generation)?;
        }
        self.cache.resizing.note(end - task.from.segment_count, task.total, Vec::new());
        Ok(if end == task.to.segment_count { Step::Settle(1) } else { Step::Make(end) })
    }

    /// Looks at the segments beyond the new end: has them closed, emptied and retired.
    fn empty_some(&mut self, task: &mut Task) -> Result<Progress, ResizeError> {
        let cache = self.cache.clone();
        if lock(&cache.resizing.asked).as_ref().is_none_or(|asked| asked.is_cancelled) {
            return Err(ResizeError::Interrupted);
        }
        let ids = task.to.segment_count..task.from.segment_count;
        cache.judge_volumes(ids.start as usize)?;
        self.relocator.leave(ids.start);
        self.close_beyond(ids.start);
        let (mut left, mut waits_for) = (0, Vec::new());
        let mut victims = Vec::new();
        for id in ids.clone() {
            let segment = &cache.segments[id as usize];
            match segment.state() {
                State::Retired | State::Bad => continue,
                State::Sealed if victims.len() < EMPTY_BATCH && self.take(id) => victims.push(id),
                State::Sealed => {
                    let owner = cache.volume_of(segment.owner.load(Ordering::Relaxed));
                    let dirty = owner
                        .filter(|v| segment.max_epoch.load(Ordering::SeqCst) > v.tail.load(Ordering::SeqCst));
                    waits_for.extend(dirty.map(|volume| volume.descriptor_name()));
                }
                _ => {}
            }
            left += 1;
        }
        waits_for.sort_unstable();
        waits_for.dedup();
        cache.resizing.is_pressing.store(!waits_for.is_empty(), Ordering::Relaxed);
        if !waits_for.is_empty() {
            cache.all_volumes().iter().for_each(|volume| volume.writeback.raise());
        }
        cache.resizing.note(task.total - left, task.total, waits_for);
        if left == 0 || mutated(Mutant::ShrunkBeforeEmpty) {
            cache.resizing.is_pressing.store(false, Ordering::Relaxed);
            let generation = |id: u32| cache.segments[id as usize].generation.load(Ordering::Relaxed);
            let floor = ids.map(generation).max().unwrap_or(0) + 1;
            if !mutated(Mutant::GenerationFloorForgotten) {
                task.superblock = task.superblock.clone().with_generation_floor(floor);
            }
            task.step = Step::Void(1);
            return Ok(Progress::Did);
        }
        if victims.is_empty() {
            return Ok(Progress::Waiting);
        }
        self.empty(victims);
        Ok(Progress::Did)
    }

    /// Ends the open segments that are to go. Whoever was about to append takes another.
    fn close_beyond(&self, from: u32) {
        for volume in self.cache.all_volumes() {
            for stream in volume.all_streams() {
                // Who holds it is asked again at the next look.
                let Ok(mut stream) = stream.try_lock() else { continue };
                if stream.open.as_ref().is_some_and(|open| open.id >= from) {
                    self.cache.close_segment(&mut stream);
                }
            }
        }
    }
}
