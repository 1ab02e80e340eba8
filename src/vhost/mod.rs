//! Requests in, used descriptors out: the vhost-user-blk front end.
//!
//! ```text
//!  socket ─► server ─► message ─► session ─► vring ──── starts and stops ────┐
//!            accepts   framing,   protocol   a ring as the                   ▼
//!            in turn   fds        state      VMM set it up          queue: on a thread (crew)
//!                                   │                               ring ─► request ─► DiskQueue
//!                                   └► memory: the guest's RAM ◄──── descriptors, data, status
//! ```
//!
//! Everything that arrives here is hostile: messages, descriptors, ring contents and the in-flight
//! area are bounded and checked before use. What fails, fails small: a request gets a status, a
//! ring that cannot be believed any more is *broken* (it stops, its neighbours go on), a message
//! that cannot be obeyed ends its connection, and nothing ends the process.
//!
//! The message loop and the ring are our own rather than `vhost-user-backend` and `virtio-queue`:
//! those refuse the in-flight messages that make a restart harmless, accept only one connection
//! per object, and cost about a hundred nanoseconds per request where a bounds-checked pointer
//! costs five.

mod affinity;
mod channel;
mod config_space;
mod copy;
mod crew;
mod decode;
mod dirty_log;
mod fds;
mod features;
mod idle;
mod inflight;
mod inflight_packed;
mod memory;
mod message;
mod notify;
mod packed;
mod queue;
mod request;
mod ring;
mod server;
mod session;
mod split;
mod vring;

pub use channel::Handle;
pub use crew::Crew;
pub use idle::{PollMode, Polling};
#[cfg(feature = "sim")]
pub use inflight_packed_lives::packed_ring_lives;
#[cfg(feature = "sim")]
pub use queue::stepper::{QueueStepper, RingSetup};
pub use server::{Endpoint, Options, Parked, Presence, Server, Stopper};
pub use session::{ParkedSession, Saved};

#[cfg(any(test, feature = "sim"))]
mod inflight_packed_lives;
#[cfg(any(test, feature = "sim"))]
#[cfg_attr(not(test), allow(dead_code, reason = "only unit tests need all of it"))]
mod testing;
#[cfg(all(test, feature = "weave"))]
mod weave_tests;
