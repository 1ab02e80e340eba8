//! What may notice a mutant: each takes a seed and says how many images it judged before it noticed
//! anything.

use std::panic::{AssertUnwindSafe, catch_unwind};

use pcache_vhost::cache::Order;
use pcache_vhost::mutant::Mutant;
use pcache_vhost::pmem::MediaClass::{AssumeDax, PageCache};
use pcache_vhost::sim::{Scenario, run_seed};

use super::{failing, fellows, growth, held, pairs, rest, rings, shares, sizes, starts, stories, upgrades};

/// Images judged in each seed of a random run.
const IMAGES_PER_SEED: u64 = 1200;

/// Something that judges images.
#[derive(Clone, Copy)]
pub enum Instrument {
    /// Random requests, cut by crashes, of the seeds whose scenario fits.
    Run(fn(&Scenario) -> bool),
    /// Damage at rest.
    Rest,
    /// Starts cut by a crash, and the starts after them cut again.
    Starts,
    /// One sequence of requests, told by hand.
    Story(fn(&mut u64)),
}

/// A violation.
pub struct Caught {
    /// Images judged before it.
    pub images: u64,
    /// What is wrong.
    pub what: String,
}

impl Instrument {
    /// The name of the instrument that the mutant is hunted with, and itself: random runs, of those
    /// seeds in which its place is reached, unless it takes more than chance.
    pub fn of(mutant: Mutant) -> (&'static str, Instrument) {
        use Instrument::{Rest, Run, Starts, Story};
        use Mutant as M;
        let run = |fits| ("run", Run(fits));
        match mutant {
            M::BadLivenessWordIgnored
            | M::DamagedDirtyReadFromDisk
            | M::HitNotVerified
            | M::PlaceNotChecked
            | M::SequenceGapIgnored
            | M::WitnessIgnored => ("damage at rest", Rest),
            M::DescriptorNewestOverwritten | M::StartPageNewestOverwritten => ("torn starts", Starts),
            M::TrackedChainStays
            | M::TrackedPositionStays
            | M::TrackedTooLate
            | M::TrackedBatchBelieved
            | M::UsedNotTakenBack => ("story of packed rings", Story(rings::packed_rings_that_die)),
            M::AheadOutlivesHeader | M::AheadTakenForAll => {
                ("story of an upgrade", Story(upgrades::with_a_look_ahead))
            }
            M::UnwitnessedNotSettled => run(|s| s.class == AssumeDax),
            M::GrownUnannounced | M::GrownUnnoted => ("story of growth", Story(growth::growing)),
            M::SidecarUnannounced => ("story of a pair", Story(pairs::steps_of_a_pair)),
            M::DroppedCleanCounts => ("story of another disk", Story(pairs::dropped_clean_data)),
            M::FillOutlivesDiskCache => {
                ("story of a fill", Story(stories::a_fill_and_the_disk_that_loses_its_bytes))
            }
            M::LivenessFloorNotWritten | M::LivenessFloorIgnored => {
                ("story of older words", Story(stories::liveness_words_put_back))
            }
            M::RelocatedUnverified => {
                ("story of a rotten block", Story(stories::a_block_that_rots_before_it_is_relocated))
            }
            M::FailedFlushRetried => ("story of a failed FLUSH", Story(failing::a_flush_that_failed)),
            M::LateWriteForgotten => ("story of a late write", Story(failing::a_late_write)),
            M::ScrubBelieves => ("story of rot", Story(failing::damage_that_nobody_reads)),
            M::ScrubDropsDirty => ("story of dirty rot", Story(failing::damage_to_dirty_data)),
            M::HealedBeforeDurable => ("story of a healing", Story(failing::a_healing_that_does_not_last)),
            M::ScrubUnpaced => ("story of haste", Story(failing::a_scrub_in_haste)),
            M::MinimumIgnored => ("story of a minimum", Story(shares::a_minimum)),
            M::MaximumIgnored => ("story of a maximum", Story(shares::a_maximum)),
            M::WeightsIgnored => ("story of equal weights", Story(shares::equal_weights)),
            M::RefusedRecordPublished => {
                ("story of a refusal", Story(stories::a_record_that_the_media_refuses))
            }
            M::TailNewestOverwritten => ("story of a tail", Story(stories::a_tail_torn_while_it_moves)),
            M::DiskBeforeRecordDurable => {
                ("story of a disk ahead", Story(stories::the_disk_ahead_of_the_cache))
            }
            M::StartNotChecked | M::StartNotCounted => {
                ("story of two openings", Story(stories::a_segment_opened_twice))
            }
            M::TornHeaderKept => ("story of a torn header", Story(stories::a_header_torn_twice)),
            M::PartsForgotten => ("story of parts", Story(stories::an_epoch_in_parts)),
            M::GroupBodyUnflushed
            | M::GroupAppliedUncommitted
            | M::GroupVoidedEarly
            | M::GroupNotVoided
            | M::GroupNotJournaled
            | M::RedoBelievedUnflushed
            | M::RedoLeftUnapplied => run(|s| s.styles.iter().any(|s| s.order == Order::Grouped)),
            M::EpochNotShared | M::MemberGoesAhead => run(|s| s.is_joint),
            M::CheckpointForgotten => ("story of a disk kept still", Story(held::a_disk_that_is_kept_still)),
            M::CheckpointUnbounded => ("story of disks kept still", Story(held::a_group_that_is_kept_still)),
            M::MemberForgotten => ("story of a late member", Story(fellows::a_member_that_comes_late)),
            M::JointDecidedByOne
            | M::JointPartBelieved
            | M::DiscardedCountsApplied
            | M::EpochOutgrowsArea => run(|s| s.is_joint && s.styles[0].order == Order::Grouped),
            M::NextOverCommitted | M::NextCommittedEarly | M::NextUnflushed => run(goes_side_by_side),
            M::NextKeepsOldPositions => run(|s| goes_side_by_side(s) && s.housekeeping > 0),
            M::SyncNotMarked | M::DoubtNotNoted => {
                ("story of an untold failure", Story(stories::a_failed_sync_that_nobody_tells))
            }
            M::SyncFailureForgotten => run(|s| s.ends_unsynced),
            M::TicketOfRunningSync
            | M::FlushNeverCompletes
            | M::SealedBeforeDurable
            | M::ReusedBeforeGenerationDurable
            | M::TailBeforeLivenessDurable => run(|s| s.class == PageCache),
            M::VoidNotNoted | M::UsedWhileVoid | M::ShrunkBeforeEmpty | M::RetiredHandedOut => {
                run(|s| s.resizes)
            }
            M::GenerationFloorForgotten => {
                ("story of a segment made anew", Story(sizes::a_segment_that_is_made_anew))
            }
            M::MoveNotMirrored => ("story of a move", Story(sizes::an_update_while_the_back_moves)),
            M::SignpostForgotten => ("story of a signpost", Story(sizes::a_front_that_is_lost)),
            M::CompletedUnsynced => run(|s| s.class == PageCache && s.styles.iter().any(|s| !s.write_cache)),
            M::EpochNotRaisedAtWrite | M::BypassUnflushed => run(|s| s.styles.iter().any(|s| !s.write_cache)),
            M::BypassUndrained | M::AttachUnflushed => run(|s| s.changes_style),
            M::DiskWriteErrorIgnored | M::DiskFlushErrorIgnored => run(|s| s.has_faults),
            _ => run(|_| true),
        }
    }

    /// The seeds it takes.
    pub fn seeds(self) -> Box<dyn Iterator<Item = u64>> {
        match self {
            Instrument::Run(fits) => Box::new((1..).filter(move |&seed| fits(&Scenario::from_seed(seed)))),
            Instrument::Rest | Instrument::Starts => Box::new(1..),
            Instrument::Story(_) => Box::new(1..=1),
        }
    }

    /// Runs a seed; says how many images were judged.
    pub fn run(self, seed: u64) -> Result<u64, Caught> {
        match self {
            Instrument::Run(_) => match run_seed(seed, IMAGES_PER_SEED, 0) {
                Ok(stats) => Ok(stats.images),
                Err(violation) => Err(Caught { images: violation.images, what: violation.what }),
            },
            Instrument::Rest => guarded(|images| rest::judge(seed, images)),
            Instrument::Starts => guarded(|images| starts::judge(seed, images)),
            Instrument::Story(story) => guarded(|images| {
                story(images);
                Ok(())
            }),
        }
    }
}

/// Whether groups go side by side in it, in the first life at least.
fn goes_side_by_side(scenario: &Scenario) -> bool {
    scenario.group_bytes > 0
        && scenario.redo_sectors > 200
        && scenario.styles.iter().any(|s| s.order == Order::Grouped)
}

/// Runs what counts its images; a panic is a violation as well.
fn guarded(judge: impl FnOnce(&mut u64) -> Result<(), String>) -> Result<u64, Caught> {
    let mut images = 0;
    let result = catch_unwind(AssertUnwindSafe(|| judge(&mut images))).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        Err(format!(
            "panic: {}",
            text.or(payload.downcast_ref::<&str>().copied()).unwrap_or("of unknown kind")
        ))
    });
    result.map(|()| images).map_err(|what| Caught { images, what })
}
