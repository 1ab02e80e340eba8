//! How long write-back, and whatever else tries again, waits after a failure.

/// First and longest delay after a failed round. Half of it is chance, so that the volumes of one
/// broken disk array do not come back all at once.
const RETRY_MS: (u64, u64) = (100, 30_000);

/// How long to wait after a round that failed when `failures` before it had: doubled each time, and
/// half of it by `chance`.
pub(super) fn delay_ms(failures: u32, chance: u64) -> u64 {
    delay_within(RETRY_MS.1, failures, chance)
}

/// The same with another longest delay.
pub(crate) fn delay_within(longest_ms: u64, failures: u32, chance: u64) -> u64 {
    let longest = (RETRY_MS.0 << failures.min(10)).min(longest_ms);
    // One multiplication mixes neighbouring moments apart (Fibonacci hashing).
    let mixed = chance.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    longest / 2 + mixed % (longest / 2 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_after_failures_double_to_a_limit_and_differ_by_chance() {
        for (failures, low, high) in [(0, 50, 100), (1, 100, 200), (4, 800, 1600), (9, 15_000, 30_000)] {
            let delays: Vec<u64> = (0..100).map(|chance| delay_ms(failures, chance)).collect();
            assert!(delays.iter().all(|ms| (low..=high).contains(ms)), "{failures}: {delays:?}");
            let (least, most) = (delays.iter().min().unwrap(), delays.iter().max().unwrap());
            assert!(most - least > (high - low) / 2, "{failures}: {least} to {most}");
        }
        assert!(delay_ms(u32::MAX, 7) <= RETRY_MS.1);
    }
}
