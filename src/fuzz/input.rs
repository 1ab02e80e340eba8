//! Bytes read as a script. When they run out, everything is zero, so every prefix of a script is a
//! script, and a mutation in one step leaves the later ones what they were.

/// What is left of an input.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether there is nothing left.
    pub fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// The next two bytes, little endian.
    pub fn half(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// The next four bytes, little endian.
    pub fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// The next eight bytes, little endian.
    pub fn long(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `bound`, at least 1 and at most 256, from one byte.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.byte()) % bound
    }

    /// A number that is often one at which something overflows, ends or begins.
    pub fn edge(&mut self) -> u64 {
        let choice = self.byte();
        let shift = u32::from(choice >> 3);
        match choice & 7 {
            0 => u64::from(self.byte()),
            1 => u64::from(self.half()),
            2 => u64::from(self.word()),
            3 => self.long(),
            4 => 1 << (shift * 2),
            5 => (1 << (shift * 2)) - 1,
            6 => u64::MAX - u64::from(choice >> 3),
            _ => (u64::MAX >> 1).wrapping_sub(u64::from(choice >> 3)),
        }
    }

    /// The next `len` bytes, fewer at the end.
    pub fn slice(&mut self, len: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        head
    }

    /// Everything left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let slice = self.slice(N);
        array[..slice.len()].copy_from_slice(slice);
        array
    }
}
