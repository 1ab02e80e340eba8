//! What a host crash leaves of memory that was not all durable: images of one instant.
//!
//! Which lines are pending, and which stores each of them has seen, is found out once; an image then
//! costs what it changes. Every image is a state that the hardware may leave, and every state that
//! it may leave has a chance to be an image.

use super::memory::{Memory, Survival};
use super::pages::PAGE;
use super::rng::Rng;

/// The pending lines of a memory.
pub(super) struct Loss<'a> {
    memory: &'a Memory,
    /// `(line, store)`, sorted: the stores of a line in the order of their coming.
    touched: Vec<(usize, usize)>,
    /// Where in `touched` each line begins.
    first: Vec<usize>,
}

impl<'a> Loss<'a> {
    pub fn new(memory: &'a Memory) -> Loss<'a> {
        let mut touched = Vec::new();
        for (i, store) in memory.log.iter().enumerate() {
            let lines = store.at / memory.line..store.end().div_ceil(memory.line);
            touched.extend(lines.map(|line| (line, i)));
        }
        touched.sort_unstable();
        let begins = |&i: &usize| i == 0 || touched[i].0 != touched[i - 1].0;
        let first = (0..touched.len()).filter(begins).collect();
        Loss { memory, touched, first }
    }

    /// Number of pending lines.
    pub fn lines(&self) -> usize {
        self.first.len()
    }

    /// Their numbers, ascending.
    pub fn numbers(&self) -> impl Iterator<Item = usize> + '_ {
        self.first.iter().map(|&i| self.touched[i].0)
    }

    fn stores(&self, i: usize) -> &[(usize, usize)] {
        let end = self.first.get(i + 1).copied().unwrap_or(self.touched.len());
        &self.touched[self.first[i]..end]
    }

    /// The memory after the crash, and a hash of its pending lines.
    pub fn image(&self, survival: &Survival, rng: &mut Rng) -> (Memory, u64) {
        let mut image = self.memory.settled();
        match survival {
            Survival::Everything => {}
            Survival::Nothing => self.drop_all(&mut image),
            Survival::Only(one) => {
                self.drop_all(&mut image);
                self.keep(&mut image, *one);
            }
            Survival::AllBut(out) => self.drop(&mut image, *out),
            Survival::TornLine(one) => self.tear(&mut image, *one, rng),
            Survival::Lines(mask) => {
                (0..self.lines()).filter(|i| mask >> i & 1 == 0).for_each(|i| self.drop(&mut image, i));
            }
            Survival::Random if self.is_words() => {
                let mut coins = 0;
                for i in 0..self.lines() {
                    coins = if i % 64 == 0 { rng.next() } else { coins >> 1 };
                    if coins & 1 == 0 {
                        self.drop(&mut image, i);
                    }
                }
            }
            Survival::Random | Survival::Torn => {
                (0..self.lines()).for_each(|i| self.tear(&mut image, i, rng));
            }
        }
        for (&line, bytes) in &self.memory.lost {
            image.now.write(line * image.line, bytes);
        }
        let hash = self.hash(&image);
        (image, hash)
    }

    fn is_words(&self) -> bool {
        self.memory.class.fence_is_durable()
    }

    fn drop_all(&self, image: &mut Memory) {
        for (&number, page) in &self.memory.durable {
            image.now.set_page(number, page.clone());
        }
    }

    /// Takes a line back to what was durable.
    fn drop(&self, image: &mut Memory, i: usize) {
        if let Some(&(line, _)) = self.first.get(i).map(|&at| &self.touched[at]) {
            image.now.write(line * image.line, self.memory.device(line));
        }
    }

    fn keep(&self, image: &mut Memory, i: usize) {
        if let Some(&(line, _)) = self.first.get(i).map(|&at| &self.touched[at]) {
            let at = line * image.line;
            image.now.write(at, self.memory.now.slice(at, image.line));
        }
    }

    /// Leaves a line in any state it may have.
    fn tear(&self, image: &mut Memory, i: usize, rng: &mut Rng) {
        if i >= self.lines() {
            return;
        }
        let stores = self.stores(i);
        let at = stores[0].0 * image.line;
        let mut bytes = [0; 512];
        let bytes = &mut bytes[..image.line];
        bytes.copy_from_slice(self.memory.device(stores[0].0));
        if self.is_words() {
            // Each word in any state it has had.
            for (word, out) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let at = at + word * 8;
                let covers = |&&(_, s): &&(usize, usize)| {
                    let store = &self.memory.log[s];
                    store.at <= at && at < store.end()
                };
                let count = stores.iter().filter(covers).count();
                let which = if count == 0 { 0 } else { rng.index(count + 1) };
                if let Some(&(_, s)) = stores.iter().filter(covers).nth(which) {
                    let store = &self.memory.log[s];
                    out.copy_from_slice(&self.memory.after(store)[at - store.at..][..8]);
                }
            }
        } else {
            // The whole sector as it was after some store.
            let upto = rng.index(stores.len() + 1);
            for &(_, s) in &stores[..upto] {
                let store = &self.memory.log[s];
                let (start, end) = (store.at.max(at), store.end().min(at + image.line));
                let from = &self.memory.after(store)[start - store.at..end - store.at];
                bytes[start - at..end - at].copy_from_slice(from);
            }
        }
        image.now.write(at, bytes);
    }

    /// Four independent sums, so that a processor need not wait for one multiplication to begin
    /// the next.
    fn hash(&self, image: &Memory) -> u64 {
        let mut sums = [0xcbf2_9ce4_8422_2325u64, 1, 2, 3];
        for line in self.numbers() {
            let bytes = image.now.slice(line * image.line, image.line);
            for quad in bytes.as_chunks::<32>().0 {
                for (sum, word) in sums.iter_mut().zip(quad.as_chunks::<8>().0) {
                    *sum = (*sum ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    *sum ^= *sum >> 29;
                }
            }
        }
        sums.iter().fold(0, |hash, sum| (hash ^ sum).wrapping_mul(0x100_0000_01b3).rotate_left(23))
    }
}

const _: () = assert!(PAGE.is_multiple_of(512), "a line lies in one page");

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::memory::SimPmem;
    use super::super::world::{Snapshot, World};
    use super::*;
    use crate::pmem::MediaClass::{AssumeDax, PageCache};
    use crate::pmem::Pmem;

    /// Memory with `lines` lines pending, each stored twice.
    fn pending(class: crate::pmem::MediaClass, lines: u64) -> Memory {
        let world = World::new(
            Snapshot { what: "empty", memory: Memory::new(class, 16 << 10), disks: Vec::new() },
            1,
        );
        let pmem = SimPmem::new(&world);
        for value in [1, 2] {
            for line in 0..lines {
                pmem.write(1024 * line + 8, &[value; 16]).expect("sound memory");
            }
        }
        world.with(|w| w.memory.clone())
    }

    #[test]
    fn every_subset_of_the_pending_lines_is_an_image_of_its_own() {
        for class in [AssumeDax, PageCache] {
            let memory = pending(class, 5);
            let loss = Loss::new(&memory);
            assert_eq!(loss.lines(), 5);
            let mut seen = BTreeSet::new();
            for mask in 0..32 {
                let (image, hash) = loss.image(&Survival::Lines(mask), &mut Rng::new(1));
                seen.insert(hash);
                for line in 0..5 {
                    let kept = if mask >> line & 1 == 1 { 2 } else { 0 };
                    assert_eq!(image.copy(1024 * line + 16, 1), [kept], "{class}, {mask:b}");
                }
                assert_eq!(image.pending_lines(), 0, "what a crash leaves is durable");
            }
            assert_eq!(seen.len(), 32);
            let same = |a, b| {
                let image = |s| loss.image(&s, &mut Rng::new(1)).1;
                image(a) == image(b)
            };
            assert!(
                same(Survival::Everything, Survival::Lines(31))
                    && same(Survival::Nothing, Survival::Lines(0))
            );
            assert!(
                same(Survival::AllBut(1), Survival::Lines(0b11101))
                    && same(Survival::Only(2), Survival::Lines(4))
            );
        }
    }

    #[test]
    fn a_torn_line_is_in_any_state_and_the_others_are_whole() {
        for (class, states) in [(AssumeDax, 9), (PageCache, 3)] {
            let memory = pending(class, 3);
            let loss = Loss::new(&memory);
            let mut seen = BTreeSet::new();
            for seed in 0..200 {
                let (image, _) = loss.image(&Survival::TornLine(1), &mut Rng::new(seed));
                assert_eq!((image.copy(8, 1), image.copy(2048 + 8, 1)), (vec![2], vec![2]));
                seen.insert((image.copy(1024 + 8, 1), image.copy(1024 + 16, 1)));
            }
            assert_eq!(seen.len(), states, "{class}: {seen:?}");
        }
    }
}
