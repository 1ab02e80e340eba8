//! Memory is really taken away here: by truncation, by userfaultfd's poison, by a full hole.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

const PAGE: usize = 4096;

/// Shared memory of a file that can be truncated.
struct Shared {
    file: File,
    base: *mut u8,
    len: usize,
}

impl Shared {
    #[expect(unsafe_code, reason = "maps")]
    fn new(pages: usize) -> Self {
        let len = pages * PAGE;
        // SAFETY: a new descriptor, and a new mapping of it.
        unsafe {
            let file = File::from_raw_fd(libc::memfd_create(c"guard-test".as_ptr(), libc::MFD_CLOEXEC));
            file.set_len(len as u64).unwrap();
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let base = libc::mmap(ptr::null_mut(), len, access, libc::MAP_SHARED, file.as_raw_fd(), 0);
            assert_ne!(base, libc::MAP_FAILED);
            Self { file, base: base.cast(), len }
        }
    }

    fn truncate(&self, pages: usize) {
        self.file.set_len((pages * PAGE) as u64).unwrap();
    }

    #[expect(unsafe_code, reason = "copies from the mapping")]
    fn read(&self, at: usize, dst: &mut [u8]) -> Result<(), Fault> {
        assert!(at + dst.len() <= self.len);
        // SAFETY: in the mapping, which lives as long as `self`.
        unsafe { copy_in(self.base.wrapping_add(at), dst) }
    }

    #[expect(unsafe_code, reason = "copies to the mapping")]
    fn write(&self, src: &[u8], at: usize) -> Result<(), Fault> {
        assert!(at + src.len() <= self.len);
        // SAFETY: in the mapping, which lives as long as `self`.
        unsafe { copy_out(src, self.base.wrapping_add(at)) }
    }
}

impl Drop for Shared {
    #[expect(unsafe_code, reason = "unmaps")]
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

struct Xorshift(u64);

impl Xorshift {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

#[test]
fn a_copy_of_any_length_and_alignment_copies_those_bytes_and_no_others() {
    let shared = Shared::new(2);
    let seed = 0x9e37_79b9_7f4a_7c15;
    let mut random = Xorshift(seed);
    let mut model = vec![0u8; 2 * PAGE];
    for turn in 0..20_000 {
        let len = match random.below(4) {
            0 => random.below(20),
            1 => random.below(200),
            2 => random.below(1100),
            _ => random.below(PAGE),
        };
        let (at, skew) = (random.below(2 * PAGE - len), random.below(64));
        let source: Vec<u8> = (0..len + skew).map(|_| random.next() as u8).collect();
        shared.write(&source[skew..], at).unwrap();
        model[at..at + len].copy_from_slice(&source[skew..]);

        let (from, skew) = (random.below(2 * PAGE - len), random.below(64));
        let mut copy = vec![0xee; skew + len + 1];
        shared.read(from, &mut copy[skew..skew + len]).unwrap();
        assert_eq!(
            copy[skew..skew + len],
            model[from..from + len],
            "seed {seed:#x}, turn {turn}, {len} bytes at {from}"
        );
        assert!(
            copy[..skew].iter().chain(&copy[skew + len..]).all(|byte| *byte == 0xee),
            "seed {seed:#x}, turn {turn}"
        );
    }
    let mut all = vec![0; 2 * PAGE];
    shared.read(0, &mut all).unwrap();
    assert!(all == model);
}

#[test]
fn truncated_memory_is_an_error_of_the_copies_that_touch_it_and_of_no_others() {
    install().unwrap();
    let shared = Shared::new(4);
    shared.write(&[7; 4 * PAGE], 0).unwrap();
    shared.truncate(2);
    // Every loop and tail of the routines, with the hole at the beginning, in the middle, behind.
    for len in [1, 2, 3, 4, 7, 8, 9, 15, 16, 31, 48, 64, 100, 128, 511, 512, 513, 1000, PAGE, 2 * PAGE] {
        let mut copy = vec![0; len];
        for at in [2 * PAGE, 2 * PAGE - len / 2, 2 * PAGE - len + 1, 3 * PAGE - len / 2] {
            let at = at.min(4 * PAGE - len);
            assert_eq!(shared.read(at, &mut copy), Err(Fault), "read of {len} at {at}");
            assert_eq!(shared.write(&vec![7; len], at), Err(Fault), "write of {len} at {at}");
        }
        assert_eq!(shared.read(2 * PAGE - len, &mut copy), Ok(()), "{len} bytes before the hole");
        assert_eq!(shared.write(&vec![7; len], 2 * PAGE - len), Ok(()), "{len} bytes before the hole");
        assert_eq!(copy, vec![7; len]);
    }
    shared.truncate(4);
    let mut copy = [1; 8];
    assert_eq!(shared.read(3 * PAGE, &mut copy), Ok(()), "memory that came back");
    assert_eq!(copy, [0; 8]);
}

#[test]
fn queues_copy_on_while_others_fault() {
    install().unwrap();
    let (shared, stop) = (Shared::new(64), AtomicBool::new(false));
    let base = shared.base.addr();
    let faults = std::thread::scope(|scope| {
        let reader = |seed: u64| {
            let stop = &stop;
            move || {
                let mut random = Xorshift(seed);
                let (mut done, mut faults, mut copy) = (0u64, 0u64, vec![0; 3 * PAGE]);
                while !stop.load(Ordering::Relaxed) || done == 0 || faults == 0 {
                    let len = 1 + random.below(3 * PAGE);
                    let at = random.below(64 * PAGE - len);
                    let from = ptr::with_exposed_provenance(base + at);
                    #[expect(unsafe_code, reason = "copies from the mapping")]
                    // SAFETY: in the mapping, which outlives the scope.
                    match unsafe { copy_in(from, &mut copy[..len]) } {
                        Ok(()) => done += 1,
                        Err(Fault) => faults += 1,
                    }
                }
                faults
            }
        };
        let readers: Vec<_> = [3, 5, 7].map(|seed| scope.spawn(reader(seed))).into_iter().collect();
        for turn in 0..200 {
            shared.truncate(if turn % 2 == 0 { 16 } else { 64 });
            std::thread::yield_now();
        }
        shared.truncate(32);
        stop.store(true, Ordering::Relaxed);
        readers.into_iter().map(|reader| reader.join().unwrap()).sum::<u64>()
    });
    assert!(faults > 0);
}

/// Poison as a machine check leaves it, made by `UFFDIO_POISON` (Linux 6.6).
#[test]
#[expect(unsafe_code, reason = "userfaultfd has no safe face")]
fn poisoned_memory_is_an_error_of_the_copy() {
    #[repr(C)]
    struct Api([u64; 3]);
    #[repr(C)]
    struct Register([u64; 4]);
    #[repr(C)]
    struct Poison([u64; 4]);
    const UFFDIO_API: u64 = 0xc018_aa3f;
    const UFFDIO_REGISTER: u64 = 0xc020_aa00;
    const UFFDIO_POISON: u64 = 0xc020_aa08;
    const MODE_MISSING: u64 = 1;

    install().unwrap();
    let shared = Shared::new(4);
    // SAFETY: only asks for a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd < 0 {
        eprintln!("SKIPPED poison: userfaultfd: {}", io::Error::last_os_error());
        return;
    }
    // SAFETY: just opened.
    let uffd = unsafe { File::from_raw_fd(fd as i32) };
    let base = shared.base.expose_provenance() as u64;
    let mut api = Api([0xaa, 0, 0]);
    let mut register = Register([base, shared.len as u64, MODE_MISSING, 0]);
    // The second page only: the others are filled before, since nobody serves their faults.
    let mut poison = Poison([base + PAGE as u64, PAGE as u64, 0, 0]);
    for page in [0, 2, 3] {
        shared.write(&[9; PAGE], page * PAGE).unwrap();
    }
    // SAFETY: each request takes the struct it is given.
    let answers = unsafe {
        [
            libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &mut api),
            libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, &mut register),
            libc::ioctl(uffd.as_raw_fd(), UFFDIO_POISON, &mut poison),
        ]
    };
    if answers != [0; 3] {
        eprintln!("SKIPPED poison: this kernel's userfaultfd cannot ({answers:?})");
        return;
    }
    let mut copy = vec![0; 2 * PAGE];
    assert_eq!(shared.read(0, &mut copy), Err(Fault), "runs into the poison");
    assert_eq!(shared.read(PAGE, &mut copy[..8]), Err(Fault));
    assert_eq!(shared.read(2 * PAGE - 1, &mut copy[..1]), Err(Fault));
    assert_eq!(shared.write(&[1; 8], PAGE), Err(Fault));
    assert_eq!(shared.read(2 * PAGE, &mut copy), Ok(()), "lies behind the poison");
    assert_eq!(copy, vec![9; 2 * PAGE]);
}

/// Runs `test` of this binary again, alone, as a child that really does `what`.
fn child(test: &str, what: &str) -> std::process::Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("pmem::guard::tests::{test}"), "--nocapture", "--test-threads=1"])
        .env("PCACHE_VHOST_GUARD_CHILD", what)
        .output()
        .unwrap()
}

fn is_child(what: &str) -> bool {
    std::env::var("PCACHE_VHOST_GUARD_CHILD").is_ok_and(|value| value == what)
}

#[test]
fn a_fault_outside_the_routines_still_ends_the_process() {
    if is_child("fault") {
        install().unwrap();
        let shared = Shared::new(1);
        shared.truncate(0);
        assert_eq!(shared.read(0, &mut [0; 8]), Err(Fault));
        println!("guarded");
        #[expect(unsafe_code, reason = "the fault under test")]
        // SAFETY: mapped; the point is that the kernel has no page for it.
        let byte = unsafe { ptr::read_volatile(shared.base) };
        println!("survived with {byte}");
        std::process::exit(0);
    }
    let output = child("a_fault_outside_the_routines_still_ends_the_process", "fault");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{said}");
    assert!(said.contains("guarded") && !said.contains("survived"), "{said}");
}

#[test]
fn news_of_bad_memory_that_nobody_touched_ends_nothing() {
    if is_child("news") {
        install().unwrap();
        #[expect(unsafe_code, reason = "the signal under test")]
        // SAFETY: a siginfo of plain numbers; a process may send itself any code.
        let sent = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            (info.si_signo, info.si_code) = (libc::SIGBUS, libc::BUS_MCEERR_AO);
            libc::syscall(
                libc::SYS_rt_tgsigqueueinfo,
                libc::getpid(),
                libc::gettid(),
                libc::SIGBUS,
                &raw const info,
            )
        };
        assert_eq!(sent, 0);
        std::process::exit(43);
    }
    let output = child("news_of_bad_memory_that_nobody_touched_ends_nothing", "news");
    assert_eq!(output.status.code(), Some(43), "{output:?}");
}

#[test]
fn a_sigbus_that_was_sent_still_ends_the_process() {
    if is_child("sent") {
        install().unwrap();
        println!("installed");
        #[expect(unsafe_code, reason = "the signal under test")]
        // SAFETY: a signal to ourselves.
        unsafe {
            libc::kill(libc::getpid(), libc::SIGBUS);
            libc::sleep(10)
        };
        println!("survived");
        std::process::exit(0);
    }
    let output = child("a_sigbus_that_was_sent_still_ends_the_process", "sent");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{said}");
    assert!(said.contains("installed") && !said.contains("survived"), "{said}");
}

#[test]
fn a_handler_that_was_there_before_gets_the_faults_that_are_not_ours() {
    extern "C" fn theirs(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        #[expect(unsafe_code, reason = "the only way out of a handler for a fault")]
        // SAFETY: async-signal-safe.
        unsafe {
            libc::_exit(42)
        }
    }
    if is_child("before") {
        let shared = Shared::new(1);
        shared.truncate(0);
        #[expect(unsafe_code, reason = "installs the handler under test, and faults")]
        // SAFETY: `theirs` is async-signal-safe and of the type SA_SIGINFO asks for.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = theirs as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGBUS, &action, ptr::null_mut());
            install().unwrap();
            assert_eq!(shared.read(0, &mut [0; 8]), Err(Fault));
            ptr::read_volatile(shared.base);
        }
        std::process::exit(0);
    }
    let output = child("a_handler_that_was_there_before_gets_the_faults_that_are_not_ours", "before");
    assert_eq!(output.status.code(), Some(42), "{output:?}");
}

/// An access across two pages, the second of which is not there, faults as a whole: only pieces of
/// it would leave something behind.
#[test]
fn two_four_and_eight_bytes_are_copied_by_one_access_each() {
    install().unwrap();
    let shared = Shared::new(2);
    shared.write(&[7; 2 * PAGE], 0).unwrap();
    shared.truncate(1);
    for len in [2, 4, 8] {
        for before in 1..len {
            let at = PAGE - before;
            assert_eq!(
                shared.write(&vec![9; len], at),
                Err(Fault),
                "{len} bytes, {before} in the first page"
            );
            let mut copy = vec![3; len];
            assert_eq!(shared.read(at, &mut copy), Err(Fault), "{len} bytes, {before} in the first page");
            assert_eq!(copy, vec![3; len], "{before} in the first page");
            shared.read(at, &mut copy[..before]).unwrap();
            assert_eq!(copy[..before], vec![7; before], "of {len} bytes");
        }
    }
}
