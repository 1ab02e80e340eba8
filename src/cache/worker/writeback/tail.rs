//! The end of a round, once the disk has all of it, flushed: liveness words, both copies of the tail, marks.
//! The steps 5 to 7 of `../writeback.rs`, where it says what breaks if two are swapped.

use std::sync::atomic::Ordering;

use super::super::super::counters::add;
use super::super::super::env::Env;
use super::super::super::health::Failure;
use super::super::super::stripes::lock;
use super::super::super::syncer::{Durable, Outcome};
use super::super::Progress;
use super::{Phase, Round, Writeback};
use crate::mutant::{Mutant, mutated};

impl<E: Env> Writeback<E> {
    pub(super) fn flushed_ungrouped(&mut self, mut round: Round) -> Progress {
        if let Err(error) = self.list_lost(&mut round) {
            return self.fail(error);
        }
        // What is superseded must be durably dead as well: recovery ignores zeros below the tail,
        // and an older clean copy of those sectors would come back.
        let cache = self.volume.cache.clone();
        if mutated(Mutant::TailBeforeLiveness) {
            return self.media_done(round, cache.syncer.request(&*cache.media.pmem, None));
        }
        let ticket = match cache.write_liveness(None) {
            Ok(ticket) => ticket,
            Err(error) => {
                return self.fail(Failure::media(format!("liveness words cannot be written: {error}")));
            }
        };
        self.phase = Phase::MakingDurable(round, ticket);
        Progress::Did
    }

    pub(super) fn media_done(&mut self, mut round: Round, ticket: Durable) -> Progress {
        let cache = self.volume.cache.clone();
        match cache.syncer.outcome(ticket) {
            Outcome::Waiting if mutated(Mutant::TailBeforeLivenessDurable) => {}
            Outcome::Waiting => {
                self.phase = Phase::MakingDurable(round, ticket);
                return Progress::Waiting;
            }
            Outcome::Failed => {
                return self.fail(Failure::media("the cache cannot be made durable".to_owned()));
            }
            Outcome::Reached => {}
        }
        let core = &self.volume.core;
        *lock(&core.lost) = round.damage.take_list();
        let next = lock(&core.tail_page).1;
        if mutated(Mutant::TailNewestOverwritten) {
            _ = cache.write_tail(core, 1 - next, round.epoch);
        }
        if let Err(error) = cache.write_tail(core, next, round.epoch) {
            return self.fail(Failure::media(format!("the tail cannot be written: {error}")));
        }
        let ticket = cache.syncer.request(&*cache.media.pmem, None);
        self.phase = Phase::MovingTail(round, ticket);
        Progress::Did
    }

    pub(super) fn tail_done(&mut self, round: Round, ticket: Durable) -> Progress {
        let cache = self.volume.cache.clone();
        match cache.syncer.outcome(ticket) {
            Outcome::Waiting => {
                self.phase = Phase::MovingTail(round, ticket);
                return Progress::Waiting;
            }
            Outcome::Failed => {
                return self.fail(Failure::media("the tail cannot be made durable".to_owned()));
            }
            Outcome::Reached => {}
        }
        let core = &self.volume.core;
        if let Err(error) = cache.write_tail_again(core, round.epoch) {
            return self.fail(Failure::media(format!("the tail's other copy cannot be written: {error}")));
        }
        let (mut written, mut cleaned) = (0, 0);
        let mut plan = lock(&core.plan);
        for extent in plan.written.iter().chain(&plan.earlier) {
            cleaned += core.index.mark_clean_if(*extent, true);
            written += extent.range.len;
        }
        add(&core.tally.written_back_sectors, written);
        add(&core.tally.cleaned_sectors, cleaned);
        self.lose(&round.damage);
        // Last: from then on reclaim may take the segments, and with them their cursors.
        self.settle(round.epoch, &mut plan);
        core.tail.store(round.epoch, Ordering::SeqCst);
        self.note_settled(round.epoch);
        core.pacer.end_round(true);
        plan.advance();
        drop(plan);
        self.note_age(round.epoch);
        cache.housekeeper.raise();
        self.forget_parts();
        self.recovered();
        self.go_on()
    }
}
