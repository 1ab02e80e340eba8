//! Tests of `crew`: seats that count, on threads of a crew and on their own.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;

/// A queue that has so much to do, and counts what it has done.
struct Shared {
    event: EventFd,
    kick: EventFd,
    work: AtomicU64,
    done: AtomicU64,
    woken: AtomicU64,
    stop: AtomicBool,
}

impl Shared {
    fn new() -> Arc<Self> {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Arc::new(Self {
            event: event(),
            kick: event(),
            work: AtomicU64::new(0),
            done: AtomicU64::new(0),
            woken: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        })
    }

    fn passenger(self: &Arc<Self>, idle: Look) -> Passenger {
        let shared = Arc::clone(self);
        let kick = (idle != Look::Nap).then(|| self.kick.as_raw_fd());
        let board: Boarding = Box::new(move || Ok(Box::new(Counter { shared, idle }) as Box<dyn Seat>));
        Passenger { board, event: self.event.as_raw_fd(), kick }
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.event.write(1).unwrap();
    }

    fn wait_done(&self, count: u64) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.done.load(Ordering::SeqCst) < count {
            assert!(Instant::now() < deadline, "{count} pieces of work are not done");
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

struct Counter {
    shared: Arc<Shared>,
    idle: Look,
}

const STOPPED: Stopped = Stopped { base: 5, used: 5, broken: false, left: 0 };

impl Seat for Counter {
    fn look(&mut self) -> Look {
        let shared = &self.shared;
        if shared.work.load(Ordering::SeqCst) > 0 {
            shared.work.fetch_sub(1, Ordering::SeqCst);
            shared.done.fetch_add(1, Ordering::SeqCst);
            return Look::Worked;
        }
        if shared.stop.load(Ordering::SeqCst) { Look::Ended(STOPPED) } else { self.idle }
    }

    fn wake(&mut self) {
        self.shared.woken.fetch_add(1, Ordering::SeqCst);
    }
}

fn crew(threads: u16) -> Crew {
    Crew::new("test", threads, &[]).unwrap()
}

#[test]
fn a_few_threads_serve_many_queues_and_each_is_woken_by_its_own_kick() {
    for threads in [1, 3] {
        let crew = crew(threads);
        let queues: Vec<_> = (0..8).map(|_| Shared::new()).collect();
        let ends: Vec<_> = queues
            .iter()
            .enumerate()
            .map(|(at, queue)| crew.take(at as u16, queue.passenger(Look::Sleep(None))).unwrap())
            .collect();
        for round in 1..=100 {
            for (at, queue) in queues.iter().enumerate() {
                queue.work.fetch_add(1, Ordering::SeqCst);
                // Never read, and yet every write counts.
                if at % 2 == 0 { &queue.kick } else { &queue.event }.write(1).unwrap();
            }
            queues.iter().for_each(|queue| queue.wait_done(round));
        }
        for (queue, end) in queues.iter().zip(ends) {
            queue.stop();
            assert_eq!(end.wait(), Some(STOPPED));
        }
    }
}

#[test]
fn an_idle_crew_sleeps_and_only_those_are_woken_who_are_called() {
    let crew = crew(1);
    let queues = [Shared::new(), Shared::new()];
    let ends = queues.each_ref().map(|queue| crew.take(0, queue.passenger(Look::Sleep(None))).unwrap());
    queues[0].work.store(1, Ordering::SeqCst);
    queues[0].kick.write(1).unwrap();
    queues[0].wait_done(1);
    std::thread::sleep(Duration::from_millis(50));
    let woken = queues.each_ref().map(|queue| queue.woken.load(Ordering::SeqCst));
    assert!(woken[0] <= 2 && woken[1] == 0, "{woken:?}");
    queues.iter().for_each(|queue| queue.stop());
    ends.into_iter().for_each(|end| assert_eq!(end.wait(), Some(STOPPED)));
}

#[test]
fn a_queue_that_waits_for_a_time_or_naps_is_looked_at_again() {
    for idle in [Look::Sleep(Some(Duration::from_millis(2))), Look::Nap, Look::Poll] {
        let (crew, with, alone) = (crew(1), Shared::new(), Shared::new());
        let neighbour = Shared::new();
        let beside = crew.take(0, neighbour.passenger(Look::Sleep(None))).unwrap();
        let ends = [
            crew.take(0, with.passenger(idle)).unwrap(),
            spawn("alone".into(), alone.passenger(idle), &[], 0).unwrap(),
        ];
        for queue in [&with, &alone] {
            // Nobody tells it.
            queue.work.store(3, Ordering::SeqCst);
            queue.wait_done(3);
            queue.stop();
        }
        ends.into_iter().for_each(|end| assert_eq!(end.wait(), Some(STOPPED), "{idle:?}"));
        neighbour.stop();
        assert_eq!(beside.wait(), Some(STOPPED));
    }
}

#[test]
fn what_is_signalled_before_the_sleep_ends_it() {
    let shared = Shared::new();
    let mut watch = Watch::new().unwrap();
    watch.add(7, shared.event.as_raw_fd(), Some(shared.kick.as_raw_fd())).unwrap();
    for _ in 0..3 {
        for event in [&shared.event, &shared.kick] {
            event.write(1).unwrap();
            assert_eq!(watch.round(Look::Sleep(None)), None);
            assert!(watch.is_sleeping());
            watch.sleep();
            assert_eq!(watch.woken, [7]);
        }
    }
    watch.remove(shared.event.as_raw_fd(), Some(shared.kick.as_raw_fd()));
    shared.event.write(1).unwrap();
    watch.round(Look::Sleep(Some(Duration::from_millis(1))));
    watch.sleep();
    assert!(watch.woken.is_empty(), "what was taken out wakes nobody");
}

#[test]
fn naps_grow_to_their_limit_and_start_short_again() {
    let shared = Shared::new();
    let mut watch = Watch::new().unwrap();
    watch.add(0, shared.event.as_raw_fd(), None).unwrap();
    for _ in 0..20 {
        watch.round(Look::Nap);
        watch.sleep();
    }
    assert!(watch.nap >= NAP_MAX);
    watch.round(Look::Worked);
    assert_eq!(watch.nap, NAP_MIN);
}

#[test]
fn a_kick_that_cannot_be_waited_for_is_refused_at_once() {
    let file = tempfile::tempfile().unwrap();
    let shared = Shared::new();
    let passenger = || Passenger { kick: Some(file.as_raw_fd()), ..shared.passenger(Look::Nap) };
    assert!(crew(1).take(0, passenger()).is_err());
    assert!(spawn("refused".into(), passenger(), &[], 0).is_err());
}

#[test]
fn a_queue_that_cannot_be_opened_says_how_it_ended() {
    let shared = Shared::new();
    let failed = || Passenger { board: Box::new(|| Err(STOPPED)), ..shared.passenger(Look::Nap) };
    assert_eq!(crew(1).take(0, failed()).unwrap().wait(), Some(STOPPED));
    assert_eq!(spawn("failed".into(), failed(), &[], 0).unwrap().wait(), Some(STOPPED));
}

#[test]
fn a_thread_that_panics_hangs_nobody_who_waits_or_comes_later() {
    let crew = crew(1);
    let (bad, good) = (Shared::new(), Shared::new());
    let waits = crew.take(0, good.passenger(Look::Sleep(None))).unwrap();
    let board: Boarding = Box::new(|| panic!("a bug of ours"));
    let failed = crew.take(0, Passenger { board, ..bad.passenger(Look::Nap) }).unwrap();
    assert_eq!(failed.wait(), None);
    assert_eq!(waits.wait(), None);
    let deadline = Instant::now() + Duration::from_secs(20);
    while crew.take(0, good.passenger(Look::Nap)).is_ok_and(|end| end.wait().is_none()) {
        assert!(Instant::now() < deadline, "it is never told that the thread is gone");
    }
    assert!(crew.take(0, good.passenger(Look::Nap)).is_err());
}
