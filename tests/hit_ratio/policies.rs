//! Replacement policies as their papers have them, block by block, to compare the engine with.
//!
//! Each holds at most `capacity` blocks, and a block that is asked for becomes cached. They know no
//! dirty data, no log and no bytes spent on anything but blocks: that is what the engine is up
//! against.

use std::collections::{HashMap, VecDeque};

/// A cache of blocks.
pub trait Policy {
    /// Asks for a block; says whether it was cached.
    fn access(&mut self, block: u64) -> bool;
}

/// Every policy there is, with its name.
pub fn all(capacity: usize) -> Vec<(&'static str, Box<dyn Policy>)> {
    vec![
        ("FIFO", Box::new(Fifo::new(capacity))),
        ("LRU", Box::new(Lru::new(capacity))),
        ("ARC", Box::new(Arc::new(capacity))),
        ("SIEVE", Box::new(Sieve::new(capacity))),
        ("S3-FIFO", Box::new(S3Fifo::new(capacity))),
    ]
}

/// Blocks in order of arrival, with removal from anywhere.
#[derive(Default)]
struct Ordered {
    at: HashMap<u64, u64>,
    /// `(block, stamp)`; one whose stamp is not the block's has been removed.
    queue: VecDeque<(u64, u64)>,
    stamp: u64,
}

impl Ordered {
    fn len(&self) -> usize {
        self.at.len()
    }

    fn contains(&self, block: u64) -> bool {
        self.at.contains_key(&block)
    }

    /// Puts a block at the young end, wherever it was.
    fn push(&mut self, block: u64) {
        self.stamp += 1;
        self.at.insert(block, self.stamp);
        self.queue.push_back((block, self.stamp));
    }

    fn remove(&mut self, block: u64) -> bool {
        self.at.remove(&block).is_some()
    }

    /// Takes the oldest.
    fn pop(&mut self) -> Option<u64> {
        while let Some((block, stamp)) = self.queue.pop_front() {
            if self.at.get(&block) == Some(&stamp) {
                self.at.remove(&block);
                return Some(block);
            }
        }
        None
    }
}

/// First in, first out.
pub struct Fifo {
    capacity: usize,
    blocks: Ordered,
}

impl Fifo {
    pub fn new(capacity: usize) -> Fifo {
        Fifo { capacity, blocks: Ordered::default() }
    }
}

impl Policy for Fifo {
    fn access(&mut self, block: u64) -> bool {
        if self.blocks.contains(block) {
            return true;
        }
        if self.blocks.len() == self.capacity {
            self.blocks.pop();
        }
        self.blocks.push(block);
        false
    }
}

/// Least recently used.
pub struct Lru {
    capacity: usize,
    blocks: Ordered,
}

impl Lru {
    pub fn new(capacity: usize) -> Lru {
        Lru { capacity, blocks: Ordered::default() }
    }
}

impl Policy for Lru {
    fn access(&mut self, block: u64) -> bool {
        let hit = self.blocks.contains(block);
        if !hit && self.blocks.len() == self.capacity {
            self.blocks.pop();
        }
        self.blocks.push(block);
        hit
    }
}

/// ARC (Megiddo and Modha, FAST 2003, figure 4).
pub struct Arc {
    capacity: usize,
    /// The size `recent` is to have.
    aim: usize,
    recent: Ordered,
    frequent: Ordered,
    recent_ghosts: Ordered,
    frequent_ghosts: Ordered,
}

impl Arc {
    pub fn new(capacity: usize) -> Arc {
        Arc {
            capacity,
            aim: 0,
            recent: Ordered::default(),
            frequent: Ordered::default(),
            recent_ghosts: Ordered::default(),
            frequent_ghosts: Ordered::default(),
        }
    }

    fn replace(&mut self, is_frequent_ghost: bool) {
        let recent = self.recent.len();
        if recent > 0 && (recent > self.aim || is_frequent_ghost && recent == self.aim) {
            let block = self.recent.pop().expect("it is not empty");
            self.recent_ghosts.push(block);
        } else if let Some(block) = self.frequent.pop() {
            self.frequent_ghosts.push(block);
        }
    }
}

impl Policy for Arc {
    fn access(&mut self, block: u64) -> bool {
        if self.recent.remove(block) || self.frequent.contains(block) {
            self.frequent.push(block);
            return true;
        }
        let (recent, frequent) = (self.recent_ghosts.len(), self.frequent_ghosts.len());
        if self.recent_ghosts.contains(block) {
            self.aim = (self.aim + (frequent / recent).max(1)).min(self.capacity);
            self.replace(false);
            self.recent_ghosts.remove(block);
            self.frequent.push(block);
            return false;
        }
        if self.frequent_ghosts.contains(block) {
            self.aim = self.aim.saturating_sub((recent / frequent).max(1));
            self.replace(true);
            self.frequent_ghosts.remove(block);
            self.frequent.push(block);
            return false;
        }
        let cached = self.recent.len() + self.frequent.len();
        if self.recent.len() + recent == self.capacity {
            if self.recent.len() < self.capacity {
                self.recent_ghosts.pop();
                self.replace(false);
            } else {
                self.recent.pop();
            }
        } else if cached + recent + frequent >= self.capacity {
            if cached + recent + frequent == 2 * self.capacity {
                self.frequent_ghosts.pop();
            }
            self.replace(false);
        }
        self.recent.push(block);
        false
    }
}

/// SIEVE (Zhang et al., NSDI 2024).
pub struct Sieve {
    capacity: usize,
    /// By slot: block, visited, and the neighbours towards the tail and the head.
    nodes: Vec<(u64, bool, usize, usize)>,
    at: HashMap<u64, usize>,
    head: usize,
    tail: usize,
    hand: usize,
}

const NONE: usize = usize::MAX;

impl Sieve {
    pub fn new(capacity: usize) -> Sieve {
        Sieve { capacity, nodes: Vec::new(), at: HashMap::new(), head: NONE, tail: NONE, hand: NONE }
    }

    /// Evicts a block and returns its slot.
    fn evict(&mut self) -> usize {
        let mut slot = if self.hand == NONE { self.tail } else { self.hand };
        while self.nodes[slot].1 {
            self.nodes[slot].1 = false;
            slot = self.nodes[slot].3;
            if slot == NONE {
                slot = self.tail;
            }
        }
        let (block, _, older, younger) = self.nodes[slot];
        self.hand = younger;
        if older == NONE {
            self.tail = younger
        } else {
            self.nodes[older].3 = younger
        }
        if younger == NONE {
            self.head = older
        } else {
            self.nodes[younger].2 = older
        }
        self.at.remove(&block);
        slot
    }
}

impl Policy for Sieve {
    fn access(&mut self, block: u64) -> bool {
        if let Some(&slot) = self.at.get(&block) {
            self.nodes[slot].1 = true;
            return true;
        }
        let slot = if self.at.len() == self.capacity {
            self.evict()
        } else {
            self.nodes.push((0, false, NONE, NONE));
            self.nodes.len() - 1
        };
        self.nodes[slot] = (block, false, self.head, NONE);
        if self.head == NONE {
            self.tail = slot
        } else {
            self.nodes[self.head].3 = slot
        }
        self.head = slot;
        self.at.insert(block, slot);
        false
    }
}

/// S3-FIFO (Yang et al., SOSP 2023): a tenth for the small queue, promotion at two hits.
pub struct S3Fifo {
    small_max: usize,
    main_max: usize,
    small: VecDeque<u64>,
    main: VecDeque<u64>,
    ghosts: Ordered,
    hits: HashMap<u64, u8>,
}

impl S3Fifo {
    pub fn new(capacity: usize) -> S3Fifo {
        let small_max = (capacity / 10).max(1);
        S3Fifo {
            small_max,
            main_max: capacity - small_max,
            small: VecDeque::new(),
            main: VecDeque::new(),
            ghosts: Ordered::default(),
            hits: HashMap::new(),
        }
    }

    fn evict(&mut self) {
        if self.small.len() >= self.small_max { self.evict_small() } else { self.evict_main() }
    }

    fn evict_small(&mut self) {
        while let Some(block) = self.small.pop_front() {
            if self.hits[&block] > 1 {
                if self.main.len() >= self.main_max {
                    self.evict_main();
                }
                self.hits.insert(block, 0);
                self.main.push_back(block);
            } else {
                self.hits.remove(&block);
                if self.ghosts.len() == self.main_max {
                    self.ghosts.pop();
                }
                self.ghosts.push(block);
                return;
            }
        }
    }

    fn evict_main(&mut self) {
        while let Some(block) = self.main.pop_front() {
            let hits = self.hits.get_mut(&block).expect("cached blocks have a count");
            if *hits == 0 {
                self.hits.remove(&block);
                return;
            }
            *hits -= 1;
            self.main.push_back(block);
        }
    }
}

impl Policy for S3Fifo {
    fn access(&mut self, block: u64) -> bool {
        if let Some(hits) = self.hits.get_mut(&block) {
            *hits = (*hits + 1).min(3);
            return true;
        }
        while self.small.len() + self.main.len() >= self.small_max + self.main_max {
            self.evict();
        }
        self.hits.insert(block, 0);
        if self.ghosts.remove(block) {
            self.main.push_back(block)
        } else {
            self.small.push_back(block)
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs letters through a policy; a capital letter stands for a hit.
    fn run(policy: &mut dyn Policy, letters: &str) -> String {
        let ask = |c: char| if policy.access(c as u64) { c.to_ascii_uppercase() } else { c };
        letters.chars().map(ask).collect()
    }

    #[test]
    fn every_policy_decides_as_worked_out_by_hand() {
        // FIFO of 3: a is the oldest although it was read again. LRU keeps it.
        assert_eq!(run(&mut Fifo::new(3), "abcadab"), "abcAdab");
        assert_eq!(run(&mut Lru::new(3), "abcadab"), "abcAdAb");
        // ARC of 2: a, read twice, is frequent, so b gives way to c; b comes back as a ghost, so what is
        // recent gets more room, and a has to go for it.
        assert_eq!(run(&mut Arc::new(2), "aabcaba"), "aAbcAba");
        // SIEVE of 3: a was visited, so the hand clears it and takes b; it goes on at c, not at a.
        assert_eq!(run(&mut Sieve::new(3), "abcadaeabc"), "abcAdAeAbc");
        // S3-FIFO of 10, one small: a is read twice there and is promoted; b to k pass it by.
        assert_eq!(run(&mut S3Fifo::new(10), "aaabcdefghijka"), "aAAbcdefghijkA");
        // A ghost that comes back goes to the main queue: z stays, while others pass.
        assert_eq!(run(&mut S3Fifo::new(10), "zabcdefghijzlmnopqz"), "zabcdefghijzlmnopqZ");
    }

    #[test]
    fn no_policy_holds_more_than_its_capacity_and_each_finds_what_fits() {
        for capacity in [2, 10, 64] {
            for (name, mut policy) in all(capacity) {
                for lap in 0..4 {
                    for block in 0..capacity as u64 {
                        let hit = policy.access(block);
                        assert!(lap < 3 || hit, "{name} of {capacity}: block {block} in lap {lap}");
                    }
                }
                // Never more hits than blocks that fit, on blocks asked for once and then again.
                let fresh = 1000..1000 + 4 * capacity as u64;
                fresh.clone().for_each(|block| assert!(!policy.access(block), "{name}"));
                let hits = fresh.filter(|&block| policy.access(block)).count();
                assert!(hits <= capacity, "{name} of {capacity}: {hits}");
            }
        }
    }
}
