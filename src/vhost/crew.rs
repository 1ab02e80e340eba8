//! The threads that run queues: one for each, or a few that serve several.
//!
//! ```text
//!  queue ─► seat ┐                       ┌ look at each seat: a turn of its queue
//!  queue ─► seat ┼─► thread: one epoll ──┤ somebody polls: look again
//!  queue ─► seat ┘                       └ nobody: sleep until a seat's kick, wake-up or deadline
//! ```
//!
//! Invariants:
//! - a thread sleeps only when every seat on it has asked for notifications and looked once more since,
//!   or is not to be notified at all, and no queue has been handed to it that it has not seen;
//! - a seat's descriptors are watched as long as its queue runs and no longer: they are taken out of the
//!   epoll before anybody is told of the end;
//! - seats are looked at in turn, a batch each, so none waits for more than a batch of every other;
//! - a thread of its own ends with its queue, one of a crew with the crew.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::affinity;
use super::queue::Stopped;
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{self, Condvar, Mutex, hint};

/// First and last length of a sleep of a thread with a queue that nobody kicks.
const NAP_MIN: Duration = Duration::from_micros(10);
const NAP_MAX: Duration = Duration::from_millis(1);
/// Events taken at once.
const EVENTS: usize = 32;

/// A queue as its thread sees it.
pub(super) trait Seat {
    /// Does what there is to do, at most a batch.
    fn look(&mut self) -> Look;

    /// Has been woken, by its kick or its waker, or by the end of its limit or its nap.
    fn wake(&mut self);
}

/// What a seat wants next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Look {
    /// There was something to do.
    Worked,
    /// Another look soon: it polls.
    Poll,
    /// Nothing until it is woken, or until so much time has passed.
    Sleep(Option<Duration>),
    /// Nothing for the length of a nap: nobody will kick it.
    Nap,
    /// It has ended.
    Ended(Stopped),
}

/// Opens a seat on the thread that is to run it, or says how that ended.
pub(super) type Boarding = Box<dyn FnOnce() -> Result<Box<dyn Seat>, Stopped> + Send>;

/// A queue on its way to a thread.
pub(super) struct Passenger {
    pub board: Boarding,
    /// What wakes it: always the waker's event, and a kick if there is one. Both stay open until it has
    /// ended.
    pub event: RawFd,
    pub kick: Option<RawFd>,
}

/// Where a queue's end is heard of.
#[derive(Debug)]
pub(super) enum End {
    /// From its own thread.
    Own(JoinHandle<Stopped>),
    /// From one of a crew.
    Crew(Ending),
}

impl End {
    /// Waits for it. `None` when the thread panicked.
    pub fn wait(self) -> Option<Stopped> {
        match self {
            End::Own(thread) => thread.join().ok(),
            End::Crew(ending) => ending.wait(),
        }
    }
}

/// How a queue ended, between the thread that knows it and the one that waits for it: nothing yet, or
/// what there is to say, which is nothing if the thread panicked.
#[derive(Clone, Debug, Default)]
pub(super) struct Ending(Arc<(Mutex<Option<Option<Stopped>>>, Condvar)>);

impl Ending {
    fn wait(&self) -> Option<Stopped> {
        let (said, changed) = &*self.0;
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match *said {
                Some(stopped) => return stopped,
                None => said = changed.wait(said).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn say(&self, stopped: Option<Stopped>) {
        let (said, changed) = &*self.0;
        said.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(stopped);
        changed.notify_all();
    }
}

/// Who says it, at the latest when it goes.
struct Teller(Ending);

impl Drop for Teller {
    fn drop(&mut self) {
        self.0.say(None);
    }
}

/// Runs a queue on a thread of its own, on one of `cpus` if there are any.
///
/// # Errors
/// The kernel refused a resource, or the kick cannot be waited for.
pub(super) fn spawn(name: String, passenger: Passenger, cpus: &[u16], index: u16) -> io::Result<End> {
    let mut watch = Watch::new()?;
    watch.add(0, passenger.event, passenger.kick)?;
    let cpu = affinity::of(cpus, index);
    let thread = thread::Builder::new().name(name.clone()).spawn(move || {
        affinity::stay_on(&name, cpu);
        match (passenger.board)() {
            Err(stopped) => stopped,
            Ok(mut seat) => loop {
                if let Some(stopped) = watch.round(seat.look()) {
                    return stopped;
                }
                if watch.is_sleeping() {
                    watch.sleep();
                    seat.wake();
                }
            },
        }
    })?;
    Ok(End::Own(thread))
}

/// What a thread waits for, and whether it may.
struct Watch {
    epoll: Epoll,
    /// Since the last round: whether anybody wants to be looked at again at once, and what is left.
    is_awake: bool,
    limit: Option<Duration>,
    naps: bool,
    nap: Duration,
    woken: Vec<u64>,
}

impl Watch {
    fn new() -> io::Result<Self> {
        let mut watch = Self {
            epoll: Epoll::new()?,
            is_awake: false,
            limit: None,
            naps: false,
            nap: NAP_MIN,
            woken: Vec::with_capacity(EVENTS),
        };
        watch.begin();
        Ok(watch)
    }

    /// Watches a seat's descriptors.
    fn add(&self, seat: u64, event: RawFd, kick: Option<RawFd>) -> io::Result<()> {
        // Edge-triggered: neither descriptor is ever read. Every write to an eventfd is an edge,
        // and a counter of 64 bits does not fill up.
        let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, seat);
        self.epoll.ctl(ControlOperation::Add, event, interest)?;
        if let Some(kick) = kick
            && let Err(error) = self.epoll.ctl(ControlOperation::Add, kick, interest)
        {
            self.remove(event, None);
            return Err(error);
        }
        Ok(())
    }

    fn remove(&self, event: RawFd, kick: Option<RawFd>) {
        for fd in [Some(event), kick].into_iter().flatten() {
            // It was added, and is open still.
            drop(self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()));
        }
    }

    /// Begins a round of looks.
    fn begin(&mut self) {
        (self.is_awake, self.limit, self.naps) = (false, None, false);
    }

    /// Notes what a seat wants; its end, if it has come.
    fn round(&mut self, look: Look) -> Option<Stopped> {
        match look {
            Look::Worked => {
                self.is_awake = true;
                self.nap = NAP_MIN;
            }
            Look::Poll => {
                self.is_awake = true;
                hint::spin_loop();
            }
            Look::Sleep(None) => {}
            Look::Sleep(Some(limit)) => {
                self.limit = Some(self.limit.map_or(limit, |earlier| earlier.min(limit)));
            }
            Look::Nap => self.naps = true,
            Look::Ended(stopped) => return Some(stopped),
        }
        None
    }

    /// Ends a round: whether nobody wants to be looked at again at once.
    fn is_sleeping(&mut self) -> bool {
        let is_sleeping = !self.is_awake;
        self.is_awake = false;
        is_sleeping
    }

    /// Sleeps until an event, the earliest limit, or the end of a nap; who was woken is in `woken`.
    fn sleep(&mut self) {
        let mut events = [EpollEvent::default(); EVENTS];
        let mut count = 0;
        let (epoll, limit, naps) = (&self.epoll, self.limit.take(), std::mem::take(&mut self.naps));
        let limit_ms = limit.map_or(-1, |limit| i32::try_from(limit.as_millis() + 1).unwrap_or(i32::MAX));
        // Errors are EINTR; everybody is looked at again anyway.
        let mut wait = |timeout: i32| {
            count = epoll.wait(timeout, &mut events).unwrap_or(0);
            count > 0
        };
        match naps {
            false => sync::block(limit_ms, wait),
            true if self.nap < NAP_MAX => {
                sync::thread::sleep(self.nap);
                self.nap *= 2;
                wait(0);
            }
            true => sync::block(NAP_MAX.as_millis() as i32, wait),
        }
        self.woken.clear();
        self.woken.extend(events[..count].iter().map(EpollEvent::data));
    }
}

/// Which of a crew's events says that something is in the inbox.
const INBOX: u64 = u64::MAX;

/// What a crew's thread is handed.
struct Order {
    passenger: Passenger,
    teller: Teller,
}

/// One thread of a crew, seen from outside.
struct Member {
    orders: Arc<Inbox>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Orders {
    waiting: Vec<Order>,
    is_over: bool,
    /// The thread has ended: by a bug of ours, where it was not told to.
    is_gone: bool,
}

struct Inbox {
    orders: Mutex<Orders>,
    event: EventFd,
}

impl Inbox {
    fn with<T>(&self, change: impl FnOnce(&mut Orders) -> T) -> T {
        change(&mut self.orders.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn tell(&self) {
        // It can only fail by being full, which says the same.
        drop(self.event.write(1));
    }
}

/// Threads that serve several queues each. Dropping it waits for them; no queue may be left.
pub struct Crew {
    members: Vec<Member>,
}

impl std::fmt::Debug for Crew {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Crew").field("threads", &self.members.len()).finish()
    }
}

impl Crew {
    /// Starts `threads` threads, each on one of `cpus` if there are any.
    ///
    /// # Errors
    /// The kernel refused a resource.
    pub fn new(name: &str, threads: u16, cpus: &[u16]) -> io::Result<Self> {
        let mut crew = Self { members: Vec::new() };
        for number in 0..threads.max(1) {
            let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
            let inbox = Arc::new(Inbox { orders: Mutex::default(), event });
            let mut watch = Watch::new()?;
            watch.add(INBOX, inbox.event.as_raw_fd(), None)?;
            let (orders, cpu, name) =
                (Arc::clone(&inbox), affinity::of(cpus, number), format!("{name}/t{number}"));
            let thread = thread::Builder::new().name(name.clone()).spawn(move || {
                affinity::stay_on(&name, cpu);
                serve(&mut watch, &orders);
            })?;
            crew.members.push(Member { orders: inbox, thread: Some(thread) });
        }
        Ok(crew)
    }

    /// Hands queue `index` to one of the threads.
    ///
    /// # Errors
    /// Its kick cannot be waited for.
    pub(super) fn take(&self, index: u16, passenger: Passenger) -> io::Result<End> {
        // The thread could not refuse it any more.
        Watch::new()?.add(0, passenger.event, passenger.kick)?;
        let ending = Ending::default();
        let member = &self.members[usize::from(index) % self.members.len()];
        let order = Order { passenger, teller: Teller(ending.clone()) };
        let refused = member.orders.with(|orders| match orders.is_gone {
            true => Some(order),
            false => {
                orders.waiting.push(order);
                None
            }
        });
        if refused.is_some() {
            return Err(io::Error::other("the thread that was to run it has panicked"));
        }
        member.orders.tell();
        Ok(End::Crew(ending))
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for member in &self.members {
            member.orders.with(|orders| orders.is_over = true);
            member.orders.tell();
        }
        for thread in self.members.iter_mut().filter_map(|member| member.thread.take()) {
            if thread.join().is_err() {
                tracing::error!("a thread that served queues has panicked");
            }
        }
    }
}

/// A queue that runs on a crew's thread.
struct Seated {
    seat: Box<dyn Seat>,
    number: u64,
    event: RawFd,
    kick: Option<RawFd>,
    teller: Teller,
    /// When it must be looked at again although nothing has woken it.
    until: Option<Instant>,
    naps: bool,
}

/// Whoever waits for a queue, or brings one, learns that the thread is gone.
struct Presence<'a>(&'a Inbox);

impl Drop for Presence<'_> {
    fn drop(&mut self) {
        let left = self.0.with(|orders| {
            orders.is_gone = true;
            std::mem::take(&mut orders.waiting)
        });
        drop(left);
    }
}

fn serve(watch: &mut Watch, inbox: &Inbox) {
    let _here = Presence(inbox);
    let mut seated: Vec<Seated> = Vec::new();
    let mut next = 0;
    loop {
        let (orders, is_over) = inbox.with(|orders| (std::mem::take(&mut orders.waiting), orders.is_over));
        let is_new = !orders.is_empty();
        for order in orders {
            seated.extend(board(watch, order, next));
            next += 1;
        }
        if is_over && seated.is_empty() && !is_new {
            return;
        }
        watch.begin();
        seated.retain_mut(|one| look(watch, one));
        if !watch.is_sleeping() {
            continue;
        }
        watch.sleep();
        let now = Instant::now();
        for one in &mut seated {
            let is_due = one.naps || one.until.is_some_and(|until| until <= now);
            if is_due || watch.woken.contains(&one.number) {
                one.seat.wake();
            }
        }
    }
}

fn board(watch: &Watch, order: Order, number: u64) -> Option<Seated> {
    let Order { passenger: Passenger { board, event, kick }, teller } = order;
    let stopped = match board() {
        Ok(seat) => match watch.add(number, event, kick) {
            Ok(()) => return Some(Seated { seat, number, event, kick, teller, until: None, naps: false }),
            Err(error) => {
                tracing::error!(%error, "a queue's notifications cannot be waited for");
                None
            }
        },
        Err(stopped) => Some(stopped),
    };
    // Nobody may be waiting yet: the answer is kept for who will.
    teller.0.say(stopped);
    None
}

/// Looks at a seat: whether it stays.
fn look(watch: &mut Watch, one: &mut Seated) -> bool {
    let look = one.seat.look();
    one.naps = look == Look::Nap;
    one.until = match look {
        Look::Sleep(Some(limit)) => Some(Instant::now() + limit),
        _ => None,
    };
    let Some(stopped) = watch.round(look) else { return true };
    watch.remove(one.event, one.kick);
    one.teller.0.say(Some(stopped));
    false
}

#[cfg(test)]
#[path = "crew_tests.rs"]
mod tests;
