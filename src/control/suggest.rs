//! Which known word was meant: so that a slip of the finger is answered with its correction.

/// The candidate nearest to `given`, if one is near enough to be what was meant: at most a third of
/// its letters inserted, deleted, changed or swapped with their neighbour.
pub fn nearest<'a>(given: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // Dashes and underscores are mistaken for each other, and case for nothing.
    let fold = |text: &str| text.to_ascii_lowercase().replace('-', "_").into_bytes();
    let given = fold(given);
    candidates
        .map(|candidate| (distance(&given, &fold(candidate)), candidate))
        .filter(|&(distance, candidate)| distance <= candidate.len().max(3) / 3)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, candidate)| candidate)
}

/// Optimal string alignment: insertions, deletions, substitutions and swaps of neighbours.
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    rows[0] = (0..=b.len()).collect();
    for i in 1..=a.len() {
        rows[i][0] = i;
        for j in 1..=b.len() {
            let change = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = change.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_finds_its_word_and_a_stranger_finds_none() {
        let words = ["name", "cache", "socket", "socket_mode", "queue_size", "queues", "backing"];
        let rows = [
            ("cahce", Some("cache")),
            ("Cache", Some("cache")),
            ("sokcet", Some("socket")),
            ("queue-size", Some("queue_size")),
            ("queue", Some("queues")),
            ("bakcing", Some("backing")),
            ("nmae", Some("name")),
            ("gigabytes", None),
            ("", None),
            ("x", None),
        ];
        for (given, meant) in rows {
            assert_eq!(nearest(given, words.into_iter()), meant, "{given}");
        }
    }

    #[test]
    fn distance_counts_single_slips_as_one() {
        for (a, b, slips) in
            [("abc", "abc", 0), ("abc", "acb", 1), ("abc", "ab", 1), ("ab", "abc", 1), ("abc", "xyz", 3)]
        {
            assert_eq!(distance(a.as_bytes(), b.as_bytes()), slips, "{a} {b}");
        }
    }
}
