//! The engine: a log-structured, crash-persistent cache over [`Pmem`](crate::pmem::Pmem) and
//! [`Backing`](crate::backing::Backing).
pub mod index;
