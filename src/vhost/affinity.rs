//! On which processors threads run.

use std::mem::MaybeUninit;

/// The processor of thread `index` among `cpus`: by turns; none means any.
pub(super) fn of(cpus: &[u16], index: u16) -> Option<u16> {
    (!cpus.is_empty()).then(|| cpus[usize::from(index) % cpus.len()])
}

/// Keeps the calling thread on a processor, if it is there. Not being able to is said and no more.
#[expect(unsafe_code, reason = "std has no affinity")]
pub(super) fn stay_on(name: &str, cpu: Option<u16>) {
    let Some(cpu) = cpu else { return };
    // SAFETY: all zeros is an empty set.
    let mut set: libc::cpu_set_t = unsafe { MaybeUninit::zeroed().assume_init() };
    if usize::from(cpu) >= libc::CPU_SETSIZE as usize {
        tracing::warn!(thread = name, cpu, "no such processor: the thread runs on any");
        return;
    }
    // SAFETY: the number was checked to be one the set has room for.
    unsafe { libc::CPU_SET(cpu.into(), &mut set) };
    // SAFETY: the set is alive and its size given; 0 is the calling thread.
    let code = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) };
    if code != 0 {
        let error = std::io::Error::last_os_error();
        tracing::warn!(thread = name, cpu, %error, "the thread cannot be kept on its processor: it runs on any");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_given_by_turns() {
        let given: Vec<_> = (0..5).map(|index| of(&[3, 7], index)).collect();
        assert_eq!(given, [Some(3), Some(7), Some(3), Some(7), Some(3)]);
        assert_eq!(of(&[], 0), None);
    }

    #[test]
    fn a_thread_stays_where_it_is_told_and_a_processor_that_is_not_there_does_no_harm() {
        let allowed = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            line.unwrap().trim().to_owned()
        };
        std::thread::spawn(move || {
            let before = allowed();
            for cpu in [u16::MAX, 1023] {
                stay_on("test", Some(cpu));
                assert_eq!(allowed(), before);
            }
            let first: u16 = before.split(['-', ',']).next().unwrap().parse().unwrap();
            stay_on("test", Some(first));
            assert_eq!(allowed(), first.to_string());
        })
        .join()
        .unwrap();
    }
}
