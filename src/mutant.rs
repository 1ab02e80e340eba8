//! Deliberate bugs, one of which at a time can be switched on in a simulation.
//!
//! A check that cannot fail proves nothing. Each mutant breaks one law of the engine in one line, and
//! `tests/mutants.rs` demands that the checks notice every one of them. The table of all, with what
//! noticed them, is in `sim/MUTANTS.md`.
//!
//! Invariants:
//! - Without the feature `sim` there is no mutant: [`mutated`] is constant, which the compiler checks
//!   below, and neither names nor state are in the build.
//! - With it none is active but inside [`with`], on the calling thread alone. A simulation runs on
//!   one thread, so two can run side by side, one mutated and one not.

macro_rules! mutants {
    ($($name:ident $law:literal $what:literal,)*) => {
        /// A deliberate bug.
        #[derive(Clone, Copy, PartialEq, Eq)]
        pub enum Mutant { $(#[doc = $what] $name,)* }

        #[cfg(feature = "sim")]
        impl Mutant {
            /// Every mutant.
            pub const ALL: &[Mutant] = &[$(Mutant::$name),*];

            /// Its name.
            pub fn name(self) -> &'static str {
                match self { $(Mutant::$name => stringify!($name)),* }
            }

            /// What it does wrong, in words.
            pub fn what(self) -> &'static str {
                match self { $(Mutant::$name => $what),* }
            }

            /// The number of the law it breaks; the laws are in `sim/MUTANTS.md`.
            pub fn law(self) -> u32 {
                match self { $(Mutant::$name => $law),* }
            }
        }
    };
}

mutants! {
    // Writing.
    RecordNotFenced 1 "a write completes before the fence after its record",
    PayloadAfterFence 1 "the last block of a record is stored after the fence",
    RefusedRecordPublished 1 "a record that the media refused is published and its write acknowledged",
    CompletedUnsynced 1 "without a write cache, a write completes before its sync",
    TicketOfRunningSync 1 "a FLUSH joins the sync that has already begun",
    SyncFailureForgotten 8 "after a sync that failed the next one counts as if nothing was lost",
    NewestOnlyHalfIndexed 1 "the index learns all but the last sector of a longer write",
    PositionNotAdvanced 1 "what is left of a partly overwritten extent is read from its beginning",
    FaultedWriteAcknowledged 9 "a write whose buffer was gone half way is acknowledged",
    CompletedWithFirstPart 9 "a request of several parts completes with the first of them",
    FlushNeverCompletes 9 "a FLUSH that had to wait for a sync is forgotten",
    PackedMarkKept 3 "a block taken over from a dropped draft keeps its mark of being packed",
    // Groups.
    GroupBodyUnflushed 7 "a group is committed before what it needs is durable in the redo area",
    GroupAppliedUncommitted 7 "a group goes to the disk before it is durably committed",
    GroupVoidedEarly 7 "the redo area is voided while its group goes to the disk",
    GroupNotVoided 7 "the redo area keeps saying that it holds the last group",
    NextOverCommitted 7 "the next group's body is written where the committed one's lies",
    NextCommittedEarly 7 "the next group is committed before the last one's writes are flushed",
    NextUnflushed 7 "the next group takes over before its header is durable",
    NextKeepsOldPositions 5 "the next group reads dirty data where it was before it was relocated",
    GroupNotJournaled 7 "a group goes to the disk without the redo area",
    PartsForgotten 7 "a start writes the parts of an epoch again that are on the disk already",
    RedoBelievedUnflushed 8 "a start believes a header of the redo area that is not durable",
    TornHeaderKept 7 "a start leaves a torn header in the redo area, for a later one to complete",
    RedoLeftUnapplied 7 "a start leaves the group in the redo area where it is",
    // Changes of size.
    VoidNotNoted 5 "headers are overwritten, or not yet written, that count by what the superblock says",
    UsedWhileVoid 5 "segments made anew are used before they are durably void no more",
    ShrunkBeforeEmpty 12 "a shrink cuts off segments that are in use",
    RetiredHandedOut 12 "what a shrink has emptied goes back to the free list",
    GenerationFloorForgotten 5 "segments made anew begin in their first generation again",
    MoveNotMirrored 2 "while the back metadata is being moved it is stored at its old place alone",
    SignpostForgotten 2 "a cache that ends before its media has no signpost",
    // Checkpoints.
    CheckpointForgotten 7 "write-back goes on while a checkpoint is held",
    CheckpointUnbounded 7 "a member of a group goes beyond the epoch of their checkpoint",
    // Consistency groups.
    EpochNotShared 7 "the volumes of a consistency group count epochs each by itself",
    MemberGoesAhead 7 "a volume writes an epoch back before its group has the one before",
    JointDecidedByOne 7 "one volume's part of a joint group is committed, and the group counts",
    JointPartBelieved 7 "a start applies a part of a joint group that others have not committed",
    DiscardedCountsApplied 7 "a part of a joint group that is given up counts as applied",
    MemberForgotten 7 "a start does not wait for members that are not attached yet",
    EpochOutgrowsArea 7 "an epoch of a joint group may be larger than a redo area",
    // Epochs and FLUSH.
    EpochNotRaisedAtFlush 7 "a FLUSH does not end the epoch",
    EpochNotRaisedAtWrite 7 "without a write cache, a write does not end the epoch",
    FlushClosesOneQueue 7 "a FLUSH ends the epoch of the first queue only",
    OpenEpochTaken 7 "write-back takes the epoch that is still being written",
    EpochRestartsBelowTail 6 "after a start, epochs count from below the tail",
    VersionsRestart 2 "after a start, versions count from the beginning",
    // Segments.
    HeaderCopiesTogether 3 "both copies of a segment's header are written under one fence",
    GenerationNotRaised 5 "a segment is reused in the same generation",
    ReusedBeforeGenerationDurable 5 "a segment is reused before its generation has risen durably",
    EvictionLeavesIndex 5 "the index goes on showing a segment that was reclaimed",
    DirtySegmentReclaimed 12 "reclaim takes segments with dirty data",
    SealedBeforeDurable 2 "a segment is sealed before its records are durable",
    WitnessAhead 2 "the witness of a record is stored before the record",
    WitnessIgnored 2 "recovery takes no notice of the witness",
    // Resurrection.
    ReplacedNotMarkedDead 4 "what a write replaces is not marked dead",
    LivenessNotWritten 4 "liveness words are never written",
    TailBeforeLiveness 4 "the tail moves before the liveness words are written",
    TailBeforeLivenessDurable 4 "the tail moves before the liveness words are durable",
    DeadWordsEndDirtyKeys 4 "recovery believes a liveness word of a dirty key",
    LosersNotKilled 4 "recovery does not mark dead what lost",
    BadLivenessWordIgnored 4 "a liveness word that fails its check says that nothing is dead",
    LivenessFloorNotWritten 4 "nothing says how much the liveness words had durably set",
    LivenessFloorIgnored 4 "liveness words put back to an earlier state are believed",
    // Around the cache.
    BypassLeavesCopies 4 "a write around the cache leaves the cached copies",
    BypassNotDurablyDead 4 "a write around the cache does not wait until the copies are durably dead",
    BypassesOverlap 7 "two overlapping writes around the cache are in flight together",
    BypassUnflushed 1 "without a write cache, a write around the cache does not flush the disk",
    BypassUndrained 7 "a mode that writes around the cache begins over dirty data",
    AttachUnflushed 6 "an attach does not flush what an earlier life wrote to the disk",
    PlaceholderSurvivesBypass 4 "a write around the cache does not break the misses that overlap it",
    PlaceholderBornWhole 4 "a miss that begins under a write around the cache may fill",
    BrokenMissJoined 4 "a read waits for a miss that something newer has overtaken",
    FillOverNewer 4 "a fill covers what was written since its miss began",
    FillOutlivesDiskCache 6 "a fill counts although the disk may lose the bytes it came from",
    DamagedDirtyReadFromDisk 3 "a damaged dirty block is answered with the disk's older bytes",
    HitNotVerified 2 "a hit is answered without a look at its checksum",
    // Disks that fail.
    FailedFlushRetried 6 "a FLUSH that the disk failed is tried again until it succeeds",
    LateWriteForgotten 7 "what overlaps a write that is late goes to the disk beside it",
    // Scrubbing.
    ScrubBelieves 3 "scrubbing does not look at checksums",
    ScrubDropsDirty 3 "scrubbing drops damaged dirty data like clean",
    HealedBeforeDurable 4 "scrubbing tells of a drop before it is durable",
    ScrubUnpaced 12 "scrubbing reads sixteen times as fast as it may",
    // Write-back.
    DiskWriteErrorIgnored 6 "write-back does not look whether a write to the disk failed",
    DiskFlushErrorIgnored 6 "write-back does not look whether a flush of the disk failed",
    TailBeforeFlush 6 "the tail moves without a flush of the disk",
    TailNewestOverwritten 3 "the newest copy of the tail is overwritten",
    DescriptorNewestOverwritten 3 "the newest copy of a volume's descriptor is overwritten",
    StartPageNewestOverwritten 3 "the newest copy of the start page is overwritten",
    DiskBeforeRecordDurable 7 "the disk gets what the cache may still lose",
    OldestOfEpochWritten 7 "of one epoch's versions the oldest is written back",
    ZerosNotWrittenBack 6 "write-back passes over zeros",
    NewestAcrossEpochs 7 "strict write-back takes the newest versions whatever their epoch",
    NextEpochAlong 7 "strict write-back takes the next epoch along without a flush between",
    WritesOverlap 7 "write-back has overlapping writes in flight",
    NewerMarkedClean 6 "what was written during a round is marked clean with it",
    DirtyDroppedAtDetach 6 "a detach declares the dirty data written back",
    // Shares.
    MinimumIgnored 12 "reclaim takes what a volume was promised",
    MaximumIgnored 12 "a volume gets segments beyond its maximum",
    WeightsIgnored 12 "reclaim takes from whoever has what is worth least, however little it holds",
    // Relocation.
    RelocatedWithNewVersion 4 "a relocated copy gets a new version",
    RelocatedInNewEpoch 7 "a relocated copy gets the present epoch",
    SourceFreedBeforeCopy 3 "a segment is freed before the copies of what it held are durable",
    RelocationDropsZeros 3 "relocation leaves dirty zeros behind",
    RelocationDropsSuperseded 7 "relocation leaves behind what an epoch still needs",
    RelocatedUnverified 2 "relocation copies without a look at the checksum",
    RelocatedNotFiled 6 "write-back does not learn of relocated dirty data",
    RelocatedCountsClean 12 "a segment with relocated dirty data counts as clean",
    RoundKeepsOldPositions 5 "a round of write-back reads dirty data where it was before it was relocated",
    // Volumes and disks.
    IncarnationReused 2 "a volume gets the incarnation of one that was deleted",
    DroppedCleanCounts 4 "clean data that the operator has dropped comes back",
    SidecarUnannounced 3 "the sidecar says a generation that the cache has not announced",
    WrongDiskAccepted 10 "an attach takes any disk of the right size",
    GrownUnannounced 3 "a disk is grown before the cache says that it will be",
    GrownUnnoted 2 "a guest may write to the new part of a disk whose size the cache has not noted",
    DetachUnflushed 6 "a detach takes the fingerprint of a disk that it has not flushed",
    // Chains in flight on packed rings.
    TrackedChainStays 9 "a chain that was returned stays in flight in the in-flight area",
    TrackedPositionStays 9 "the in-flight area does not learn where the next used descriptor goes",
    TrackedTooLate 9 "a chain goes to the disk before the in-flight area has it",
    TrackedBatchBelieved 9 "a batch counts as returned whether or not the driver was shown it",
    UsedNotTakenBack 9 "what a life has written into used descriptors and not published stays there",
    // Recovery.
    OldestWins 2 "recovery lets the oldest version win",
    RivalsByPlace 2 "recovery lets the copy that lies highest win, whatever its version",
    ZerosForgotten 2 "recovery passes over dirty zeros",
    SequenceGapIgnored 2 "recovery does not mind missing records",
    GenerationNotChecked 2 "records of a segment's earlier life count",
    StartNotChecked 2 "records of an earlier start count",
    StartNotCounted 2 "a start is not counted",
    PlaceNotChecked 2 "records count wherever they are found",
    RecordCheckIgnored 2 "the keyed check of a record is not compared",
    PayloadNotVerified 2 "the payload of the last record is not verified",
    UnwitnessedNotSettled 8 "recovery believes a record above the witness that may not be durable",
    AheadOutlivesHeader 5 "what was read ahead of a segment counts although its header has changed",
    AheadTakenForAll 2 "what was read ahead of an open segment counts as all that it holds",
    RecoveryNotSyncedFirst 8 "recovery believes what may not be durable",
    SyncNotMarked 8 "nothing says that a sync is under way",
    DoubtNotNoted 8 "the page cache is dropped before it is noted that a sync has failed",
}

#[cfg(not(feature = "sim"))]
mod state {
    /// Whether the engine has this bug: never.
    #[inline(always)]
    pub const fn mutated(_: super::Mutant) -> bool {
        false
    }

    const _: () = assert!(!mutated(super::Mutant::RecordNotFenced));
}

#[cfg(feature = "sim")]
mod state {
    use std::cell::Cell;

    use super::Mutant;

    thread_local! {
        static ACTIVE: Cell<Option<Mutant>> = const { Cell::new(None) };
        static REACHED: Cell<u64> = const { Cell::new(0) };
    }

    /// Whether the engine has this bug, on this thread and now.
    #[inline]
    pub fn mutated(mutant: Mutant) -> bool {
        let is_active = ACTIVE.get() == Some(mutant);
        if is_active {
            REACHED.set(REACHED.get() + 1);
        }
        is_active
    }

    /// The bug that is active on this thread.
    pub fn active() -> Option<Mutant> {
        ACTIVE.get()
    }

    /// Runs `body` with a bug, and says how often its place was reached.
    pub fn with<T>(mutant: Mutant, body: impl FnOnce() -> T) -> (T, u64) {
        /// Ends it also if `body` panics.
        struct End;
        impl Drop for End {
            fn drop(&mut self) {
                ACTIVE.set(None);
            }
        }
        REACHED.set(0);
        ACTIVE.set(Some(mutant));
        let end = End;
        let result = body();
        drop(end);
        (result, REACHED.get())
    }
}

pub use state::*;

/// Does what a bug does, if the engine has it.
#[inline(always)]
pub fn if_mutated(mutant: Mutant, bug: impl FnOnce()) {
    if mutated(mutant) {
        bug();
    }
}
