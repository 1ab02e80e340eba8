//! What each policy does, one request at a time; and what a deadline leaves behind.

use pcache_vhost::cache::{Mode, OnBackingError, Order, VolumeState};
use pcache_vhost::pmem::MediaClass::AssumeDax;
use pcache_vhost::sim::timed::{Fleet, Member};
use pcache_vhost::sim::{Scene, SimBuffer, Style};
use pcache_vhost::volume::{RequestKind, Status};

use crate::{MEMBER, seed};

fn style(mode: Mode) -> Style {
    Style { mode, order: Order::Strict, write_cache: true, pass_discard: false }
}

fn scene(mode: Mode, policy: OnBackingError, timeout_ms: u64) -> Scene {
    let scene = Scene::new(AssumeDax, style(mode));
    scene.machine.served[0].volume.set_on_backing_error(policy, timeout_ms);
    scene
}

fn away(scene: &Scene, is_away: bool) {
    scene.world.with(|w| w.faults.away = u64::from(is_away));
}

fn hung(scene: &Scene, is_hung: bool) {
    scene.world.with(|w| w.faults.hung = u64::from(is_hung));
}

/// Lets time pass, and the queue and the workers with it; what has ended meanwhile.
fn pass(scene: &mut Scene, ms: u64) -> Vec<(u32, Status)> {
    let mut ended = Vec::new();
    for _ in 0..40 {
        scene.machine.clock.advance(ms / 40);
        scene.machine.step_all();
        ended.extend(scene.machine.poll(0, 0).into_iter().map(|done| (done.tag, done.status)));
    }
    ended
}

/// What is asked of a disk that is away.
const ASKED: [(&str, Mode, RequestKind, [Option<Status>; 3]); 5] = {
    const OK: Option<Status> = Some(Status::Ok);
    const ERROR: Option<Status> = Some(Status::IoError);
    const WAITS: Option<Status> = None;
    // In the order of the policies below.
    [
        ("a miss", Mode::Writeback, RequestKind::Read, [WAITS, ERROR, ERROR]),
        ("a write", Mode::Writeback, RequestKind::Write, [OK, OK, ERROR]),
        ("a FLUSH", Mode::Writeback, RequestKind::Flush, [OK, OK, OK]),
        ("a write around", Mode::Writearound, RequestKind::Write, [WAITS, ERROR, ERROR]),
        // It says that what was written before is not there.
        ("a FLUSH around", Mode::Writearound, RequestKind::Flush, [ERROR, ERROR, ERROR]),
    ]
};

const POLICIES: [OnBackingError; 3] = [OnBackingError::Wait, OnBackingError::Error, OnBackingError::ReadOnly];

#[test]
fn each_policy_answers_as_its_table_says_and_ends_with_the_failure() {
    for (what, mode, kind, statuses) in ASKED {
        for (policy, status) in POLICIES.into_iter().zip(statuses) {
            let row = format!("{what}, {policy:?}");
            let mut scene = scene(mode, policy, 0);
            away(&scene, true);
            // So that the engine knows: a write that cannot be brought to the disk, or a miss.
            if mode == Mode::Writeback && policy != OnBackingError::ReadOnly {
                scene.write(200, 8, 900);
            }
            scene.submit(RequestKind::Read, 400, SimBuffer::to_read(8));
            pass(&mut scene, 2000);
            let data = || match kind {
                RequestKind::Read => SimBuffer::to_read(8),
                RequestKind::Write => SimBuffer::of_write(0, 8, 8, 901),
                _ => SimBuffer::default(),
            };
            let sector = if kind == RequestKind::Flush { 0 } else { 8 };
            let tag = scene.submit(kind, sector, data());
            let ended = pass(&mut scene, 6000);
            let found = ended.iter().find(|(t, _)| *t == tag).map(|(_, status)| *status);
            assert_eq!(found, status, "{row}");
            assert_eq!(scene.machine.served[0].volume.health().state, VolumeState::Degraded, "{row}");
            away(&scene, false);
            let ended = pass(&mut scene, 40_000);
            if status.is_none() {
                assert!(ended.contains(&(tag, Status::Ok)), "{row}: it goes on by itself: {ended:?}");
            }
            assert_eq!(scene.request(kind, sector, data()).0, Status::Ok, "{row}: all is well again");
            assert_eq!(scene.machine.served[0].volume.health().state, VolumeState::Ok, "{row}");
        }
    }
}

#[test]
fn a_change_of_policy_holds_for_what_waits_already() {
    let mut scene = scene(Mode::Writeback, OnBackingError::Wait, 0);
    away(&scene, true);
    let tag = scene.submit(RequestKind::Read, 8, SimBuffer::to_read(8));
    assert_eq!(pass(&mut scene, 5000), []);
    scene.machine.served[0].volume.set_on_backing_error(OnBackingError::Error, 0);
    assert_eq!(pass(&mut scene, 10), [(tag, Status::IoError)]);
}

#[test]
fn what_waits_for_its_next_try_ends_when_the_queue_is_given_up() {
    use pcache_vhost::volume::DiskQueue;
    let mut scene = scene(Mode::Writearound, OnBackingError::Wait, 0);
    away(&scene, true);
    let tags = [
        scene.submit(RequestKind::Read, 8, SimBuffer::to_read(8)),
        scene.submit(RequestKind::Write, 64, SimBuffer::of_write(0, 64, 8, 900)),
    ];
    assert_eq!(pass(&mut scene, 5000), []);
    scene.machine.served[0].queues[0].give_up();
    let mut ended = pass(&mut scene, 10);
    ended.sort_unstable_by_key(|(tag, _)| *tag);
    assert_eq!(ended, tags.map(|tag| (tag, Status::IoError)));
}

#[test]
fn a_late_answer_is_an_error_for_the_guest_and_never_a_fill() {
    for policy in [OnBackingError::Error, OnBackingError::ReadOnly] {
        let mut scene = scene(Mode::Writeback, policy, 3000);
        hung(&scene, true);
        let tag = scene.submit(RequestKind::Read, 8, SimBuffer::to_read(8));
        assert_eq!(pass(&mut scene, 2000), [], "there is time left");
        let health = scene.machine.served[0].volume.health();
        assert_eq!(health.state, VolumeState::Ok);
        assert_eq!(pass(&mut scene, 2000), [(tag, Status::IoError)]);
        let volume = scene.machine.served[0].volume.clone();
        assert_eq!(volume.health().state, VolumeState::Stalled, "{:?}", volume.health());
        assert_eq!(volume.counters().deadline_errors, 1);
        hung(&scene, false);
        pass(&mut scene, 4000);
        assert_eq!(volume.counters().fill_sectors, 0, "nobody knows what the disk held since");
        assert_eq!(volume.health().state, VolumeState::Ok);
        assert_eq!(scene.read(8), 9);
    }
}

#[test]
fn nothing_that_waits_has_a_deadline() {
    let mut scene = scene(Mode::Writeback, OnBackingError::Wait, 1000);
    hung(&scene, true);
    let tag = scene.submit(RequestKind::Read, 8, SimBuffer::to_read(8));
    assert_eq!(pass(&mut scene, 60_000), []);
    hung(&scene, false);
    assert_eq!(pass(&mut scene, 1000), [(tag, Status::Ok)]);
}

/// The simulated disk panics when two overlapping writes are in flight.
#[test]
fn what_overlaps_a_late_write_reaches_the_disk_after_it() {
    let mut scene = scene(Mode::Writearound, OnBackingError::Error, 3000);
    hung(&scene, true);
    let first = scene.submit(RequestKind::Write, 8, SimBuffer::of_write(0, 8, 16, 900));
    assert_eq!(pass(&mut scene, 4000), [(first, Status::IoError)]);
    let second = scene.submit(RequestKind::Write, 16, SimBuffer::of_write(0, 16, 16, 901));
    assert_eq!(pass(&mut scene, 2000), [], "it waits for the first");
    hung(&scene, false);
    assert_eq!(pass(&mut scene, 4000), [(second, Status::Ok)]);
    assert_eq!((scene.on_disk(8), scene.on_disk(16), scene.on_disk(24)), (900, 901, 901));
    // One that has to wait for too long ends like any other.
    hung(&scene, true);
    let third = scene.submit(RequestKind::Write, 8, SimBuffer::of_write(0, 8, 8, 902));
    assert_eq!(pass(&mut scene, 4000), [(third, Status::IoError)]);
    let fourth = scene.submit(RequestKind::Write, 8, SimBuffer::of_write(0, 8, 8, 903));
    assert_eq!(pass(&mut scene, 4000), [(fourth, Status::IoError)]);
    hung(&scene, false);
    pass(&mut scene, 1000);
    scene.flush();
    assert_eq!(scene.on_disk(8), 902, "what was never submitted has no effect");
    assert_eq!(scene.read(8), 902);
}

#[test]
fn a_guest_under_load_whose_writes_are_turned_away_reads_on_and_writes_again_afterwards() {
    let mut fleet = Fleet::new(seed(), 96, &[Member { request_us: 2000, ..MEMBER }]);
    fleet.volumes[0].set_on_backing_error(OnBackingError::ReadOnly, 5000);
    fleet.run(10_000);
    fleet.fail_disk(0, true);
    fleet.run(5000);
    let seen = fleet.run(60_000)[0];
    assert_eq!(seen.writes, 0, "{seen:?}");
    assert!(seen.failed_writes > 2000 && seen.reads > 200, "what is cached is read: {seen:?}");
    let health = fleet.volumes[0].health();
    assert!(health.cause.contains("turned away"), "{health:?}");
    fleet.fail_disk(0, false);
    fleet.run(60_000);
    assert_eq!(fleet.run(5000)[0].failed(), 0);
    fleet.drain(60_000);
    fleet.judge_disk(0).expect("nothing is lost");
}

#[test]
fn a_guest_under_load_gets_its_errors_in_time_from_a_disk_that_hangs() {
    let mut fleet = Fleet::new(seed(), 24, &[Member { order: Order::Strict, write_percent: 98, ..MEMBER }]);
    fleet.volumes[0].set_on_backing_error(OnBackingError::Error, 2000);
    fleet.run(3000);
    fleet.hang_disk(0, true);
    for _ in 0..60 {
        fleet.run(5000);
    }
    let seen = fleet.seen(0);
    assert!(seen.failed_reads > 50 && seen.failed_writes > 100, "{seen:?}");
    fleet.quiesce(3000);
    fleet.hang_disk(0, false);
    fleet.run(60_000);
    assert_eq!(fleet.run(5000)[0].failed(), 0);
    fleet.drain(60_000);
    fleet.judge_disk(0).expect("nothing is lost");
}
