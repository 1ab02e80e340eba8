//! Copies that survive memory which is not there.
//!
//! The cache file may be truncated, a page of it poisoned, a tmpfs full; the guest's memory belongs
//! to another process, which may truncate it under us. Touching such memory raises SIGBUS, whose
//! default is the end of every volume. Here it is the error of one copy: the handler recognises
//! that the faulting instruction lies in one of the routines of `routines.rs` or `sums.rs` and sends
//! that routine to its error exit. Invariants:
//!
//! 1. **Only our routines are excused.** A fault anywhere else goes on to whoever handled it before
//!    us, by default to the death of the process; a SIGBUS that a process sent is always that.
//! 2. **The place is the proof; ranges are not registered.** A routine copies between private memory
//!    and memory its caller says may vanish, so there is nothing a range would add, and nothing to
//!    register, look up or forget at unmapping. Should the private side have failed (a defect of our
//!    own DRAM), the bytes are lost all the same, and failing that copy is right.
//! 3. **SIGBUS only.** The callers keep the address range reserved, so an access to it never raises
//!    SIGSEGV; one that does is a bug of ours and must not look like a fault of the media.
//! 4. **Nothing is mapped over the hole.** A fresh page there would take, and lose, what another
//!    thread stores in it and acknowledges.
//! 5. No frame is skipped: the routine returns to its caller as usual, with another result.
//!
//! A thread that blocks SIGBUS is not protected: the kernel then ends the process.

use std::io;

#[cfg(target_arch = "x86_64")]
use super::{StoreMethod, routines, sums};

mod foreign;

pub use foreign::{ForeignSlice, ForeignSliceMut};

/// The memory was not there: truncated, poisoned, or without a page to back it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the memory is not there")]
pub struct Fault;

/// What a routine answered.
#[cfg(target_arch = "x86_64")]
pub(super) fn answer(abandoned: u32) -> Result<(), Fault> {
    if abandoned == 0 { Ok(()) } else { Err(Fault) }
}

/// Installs the process's SIGBUS handler, the first time it is called. Without it a copy from
/// vanished memory ends the process, so whoever maps such memory calls this before.
///
/// # Errors
/// The kernel refused, or the routines do not exist for this processor.
pub fn install() -> io::Result<()> {
    handler::install()
}

/// Copies `dst.len()` bytes from memory that may vanish to private memory. 1, 2, 4 or 8 bytes are
/// read by a single access.
///
/// # Errors
/// [`Fault`]: some of it is not there; `dst` is then unspecified.
///
/// # Safety
/// `src .. src + dst.len()` was mapped readable and its addresses stay reserved during the call.
/// The memory behind may change, and may vanish, at any time.
#[expect(unsafe_code, reason = "the contract on `src` cannot be checked")]
#[cfg(target_arch = "x86_64")]
#[inline]
pub unsafe fn copy_in(src: *const u8, dst: &mut [u8]) -> Result<(), Fault> {
    // SAFETY: `dst` is exclusively ours and as long as said; the caller vouches for `src`. The
    // routine reads by machine instructions, so a concurrent writer is not a data race in Rust.
    answer(unsafe { routines::copy(dst.as_mut_ptr(), src, dst.len()) })
}

/// Copies `src` to memory that may vanish. 1, 2, 4 or 8 bytes are written by a single access.
///
/// # Errors
/// [`Fault`]: some of it is not there; what is there may have been written.
///
/// # Safety
/// `dst .. dst + src.len()` was mapped writable and its addresses stay reserved during the call; no
/// Rust reference to it exists. The memory behind may change, and may vanish, at any time.
#[expect(unsafe_code, reason = "the contract on `dst` cannot be checked")]
#[cfg(target_arch = "x86_64")]
#[inline]
pub unsafe fn copy_out(src: &[u8], dst: *mut u8) -> Result<(), Fault> {
    // SAFETY: `src` is readable and as long as said; the caller vouches for `dst`.
    answer(unsafe { routines::copy(dst, src.as_ptr(), src.len()) })
}

/// Asks the processor for the line at an address, mapped or not, and does not wait for it.
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "the intrinsic takes a pointer")]
#[inline]
pub(crate) fn prefetch(line: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch reads nothing into the program and faults nowhere, wherever it points.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
}

/// Elsewhere the copies are left to themselves.
#[cfg(not(target_arch = "x86_64"))]
#[inline]
pub(crate) fn prefetch(line: *const u8) {
    _ = line;
}

/// Copies what is lent to private memory and returns its CRC-32, of the bytes that are copied: each is
/// loaded once. `None`: there is no such way here for that length, or some of it is not there.
#[expect(unsafe_code, reason = "copies what is lent")]
#[cfg(target_arch = "x86_64")]
pub fn copy_summed(src: ForeignSlice<'_>, dst: &mut [u8]) -> Option<u32> {
    assert_eq!(dst.len(), src.len(), "all of them");
    let (width, to, len) = (sums::Width::best()?, dst.as_mut_ptr(), dst.len());
    if !sums::takes(StoreMethod::Cached, to, len) {
        return None;
    }
    // SAFETY: `dst` is exclusively ours and as long as said, whoever made `src` vouches for it, and
    // length and width have been asked for.
    unsafe { sums::copy(width, StoreMethod::Cached, to, src.start(), len) }.ok()
}

/// See the x86-64 version.
#[cfg(not(target_arch = "x86_64"))]
pub fn copy_summed(_src: ForeignSlice<'_>, _dst: &mut [u8]) -> Option<u32> {
    None
}

/// See the x86-64 version. There are no guarded routines for this processor and [`install`] says
/// so, hence nothing is ever mapped that could be passed here.
///
/// # Errors
/// Always [`Fault`].
///
/// # Safety
/// None needed: nothing is touched.
#[expect(unsafe_code, reason = "one signature on every processor")]
#[cfg(not(target_arch = "x86_64"))]
pub unsafe fn copy_in(_src: *const u8, _dst: &mut [u8]) -> Result<(), Fault> {
    Err(Fault)
}

/// See the x86-64 version, and [`copy_in`].
///
/// # Errors
/// Always [`Fault`].
///
/// # Safety
/// None needed: nothing is touched.
#[expect(unsafe_code, reason = "one signature on every processor")]
#[cfg(not(target_arch = "x86_64"))]
pub unsafe fn copy_out(_src: &[u8], _dst: *mut u8) -> Result<(), Fault> {
    Err(Fault)
}

#[cfg(not(target_arch = "x86_64"))]
mod handler {
    use std::io;

    pub(super) fn install() -> io::Result<()> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "copies that survive vanished memory exist for x86-64 processors only",
        ))
    }
}

/// The signal handler. Everything in it is async-signal-safe: it reads statics that were set before
/// it was installed, changes the interrupted context, and calls `sigaction` and `raise`.
#[cfg(target_arch = "x86_64")]
mod handler {
    use std::io;
    use std::sync::OnceLock;

    use libc::{c_int, c_void, sigaction, siginfo_t, ucontext_t};

    use super::{routines, sums};

    /// Whose SIGBUS it was before us.
    static PREVIOUS: OnceLock<sigaction> = OnceLock::new();
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();

    #[expect(unsafe_code, reason = "installs a signal handler")]
    pub(super) fn install() -> io::Result<()> {
        let installed = INSTALLED.get_or_init(|| {
            let errno = || io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL);
            // SAFETY: an all-zero sigaction is a valid one (SIG_DFL, empty mask, no flags).
            let (mut previous, mut ours): (sigaction, sigaction) = unsafe { std::mem::zeroed() };
            // SAFETY: only asks; `previous` is a sigaction to write to.
            if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut previous) } != 0 {
                return Err(errno());
            }
            // Known before it can be needed: the handler may run as soon as it is installed.
            PREVIOUS.get_or_init(|| previous);
            ours.sa_sigaction = on_sigbus as *const () as usize;
            // On the alternate stack where a thread has one: the fault may hit near a stack's end.
            ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            // SAFETY: `on_sigbus` has the signature SA_SIGINFO asks for and is async-signal-safe.
            if unsafe { libc::sigaction(libc::SIGBUS, &ours, std::ptr::null_mut()) } != 0 {
                return Err(errno());
            }
            Ok(())
        });
        installed.map_err(io::Error::from_raw_os_error)
    }

    #[expect(unsafe_code, reason = "reads and redirects the interrupted context")]
    extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
        // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
        let code = unsafe { (*info).si_code };
        // Memory found bad that nobody has touched yet: its page is gone, and whoever touches it
        // gets a SIGBUS of their own. Nothing was interrupted because of it.
        if code == libc::BUS_MCEERR_AO {
            return;
        }
        // Zero and below: sent by a process, not by a fault.
        if code > 0 {
            // SAFETY: the kernel passes a valid ucontext, which it restores when we return.
            let registers = unsafe { &mut (*context.cast::<ucontext_t>()).uc_mcontext.gregs };
            let instruction = &mut registers[libc::REG_RIP as usize];
            let at = *instruction as usize;
            if let Some(exit) = routines::exit_of(at).or_else(|| sums::exit_of(at)) {
                *instruction = exit as i64;
                return;
            }
        }
        pass_on(signal, info, context, code);
    }

    /// Not ours: behave as if we were not there.
    #[expect(unsafe_code, reason = "calls another handler, or restores the default")]
    fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void, code: c_int) {
        if let Some(previous) = PREVIOUS.get()
            && code > 0
            && previous.sa_sigaction != libc::SIG_DFL
            && previous.sa_sigaction != libc::SIG_IGN
        {
            if previous.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: whoever set SA_SIGINFO installed a function of this type.
                let handler = unsafe {
                    std::mem::transmute::<usize, extern "C" fn(c_int, *mut siginfo_t, *mut c_void)>(
                        previous.sa_sigaction,
                    )
                };
                handler(signal, info, context);
            } else {
                // SAFETY: without SA_SIGINFO it is a function of the signal number alone.
                let handler =
                    unsafe { std::mem::transmute::<usize, extern "C" fn(c_int)>(previous.sa_sigaction) };
                handler(signal);
            }
            return;
        }
        // SAFETY: an all-zero sigaction is SIG_DFL with an empty mask and no flags.
        let default: sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: both are async-signal-safe. A fault comes again when we return; a signal that was
        // sent is sent again, and is delivered when we return, since it is blocked until then.
        unsafe {
            libc::sigaction(signal, &default, std::ptr::null_mut());
            if code <= 0 {
                libc::raise(signal);
            }
        }
    }
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests;
