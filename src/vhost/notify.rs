//! Telling the driver that something was used, or the VMM that a ring is broken.
//!
//! The descriptor is the peer's, so writing to it must not be able to hold a queue thread: where
//! it may block, it is asked first whether it would. A counter that is full needs no further
//! write, it says what it should already.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::PoisonError;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::fds;
use crate::sync::Mutex;

/// Where to send notifications; nowhere until a descriptor is set. Replacing it takes effect at
/// once: when `set` returns, the old descriptor is written no more.
#[derive(Debug, Default)]
pub(super) struct Notifier(Mutex<Option<Target>>);

#[derive(Debug)]
struct Target {
    file: File,
    /// Present when a write could block.
    writable: Option<Epoll>,
}

impl Notifier {
    /// Notifies through `fd` from now on, or not at all.
    pub fn set(&self, fd: Option<OwnedFd>) {
        let target = fd.map(|fd| {
            let writable = fds::may_block(fd.as_fd()).then(|| watch(&fd)).flatten();
            Target { file: File::from(fd), writable }
        });
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = target;
    }

    /// A descriptor of its target, for somebody else who is to notify it.
    ///
    /// # Errors
    /// The process has as many descriptors as it may have.
    pub fn source(&self) -> io::Result<Option<OwnedFd>> {
        let target = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        target.as_ref().map(|target| target.file.try_clone().map(OwnedFd::from)).transpose()
    }

    /// Notifies, if there is anybody to notify.
    pub fn notify(&self) {
        let target = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(target) = target.as_ref() else { return };
        if let Some(epoll) = &target.writable {
            let mut events = [EpollEvent::default()];
            if !matches!(epoll.wait(0, &mut events), Ok(1)) {
                return;
            }
        }
        // A full counter is as good as one more; a descriptor that cannot be written is its
        // sender's loss.
        drop((&target.file).write(&1u64.to_ne_bytes()));
    }
}

/// Watches for `fd` to take a write. `None` for what cannot be watched: plain files never block.
fn watch(fd: &OwnedFd) -> Option<Epoll> {
    let epoll = Epoll::new().ok()?;
    epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::OUT, 0)).ok()?;
    Some(epoll)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{FromRawFd, IntoRawFd};

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    #[expect(unsafe_code, reason = "an EventFd gives up its descriptor as a number only")]
    fn owned(event: &EventFd) -> OwnedFd {
        let number = event.try_clone().unwrap().into_raw_fd();
        // SAFETY: the clone has just given it up.
        unsafe { OwnedFd::from_raw_fd(number) }
    }

    #[test]
    fn a_full_blocking_eventfd_does_not_hold_the_notifier() {
        let event = EventFd::new(0).unwrap();
        event.write(u64::MAX - 1).unwrap();
        let notifier = Notifier::default();
        notifier.set(Some(owned(&event)));
        notifier.notify();
        assert_eq!(event.read().unwrap(), u64::MAX - 1);
        notifier.notify();
        assert_eq!(event.read().unwrap(), 1);
    }

    #[test]
    fn after_a_replacement_the_old_descriptor_is_silent() {
        let (old, new) = (EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
        let notifier = Notifier::default();
        notifier.notify();
        notifier.set(Some(owned(&old)));
        notifier.set(Some(owned(&new)));
        notifier.notify();
        assert!(old.read().is_err());
        assert_eq!(new.read().unwrap(), 1);
        notifier.set(None);
        notifier.notify();
        assert!(new.read().is_err());
    }
}
