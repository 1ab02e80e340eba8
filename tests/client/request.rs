//! virtio-blk requests as a driver writes them, in any framing (virtio 1.3 §5.2.6, §2.6.4).
//!
//! A request is two streams of bytes: what the device reads (16 bytes of header, then data) and what
//! it writes (data, then one byte of status). Where descriptors cut the streams is the driver's
//! business, so it is a value of its own here: [`Layout`].

use super::rng::Rng;

/// Bytes per sector, whatever the block size.
pub const SECTOR: u64 = 512;
/// `VIRTIO_BLK_S_OK`.
pub const OK: u8 = 0;
/// `VIRTIO_BLK_S_IOERR`.
pub const IOERR: u8 = 1;
/// `VIRTIO_BLK_S_UNSUPP`.
pub const UNSUPP: u8 = 2;
/// What the status byte holds before the device writes it.
pub const UNTOUCHED: u8 = 0xaa;

/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`.
pub const UNMAP: u32 = 1;

/// Request types.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    In,
    Out,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    /// A type by its number, for those nobody knows.
    Other(u32),
}

impl Kind {
    /// `type` in the header.
    pub fn code(self) -> u32 {
        match self {
            Kind::In => 0,
            Kind::Out => 1,
            Kind::Flush => 4,
            Kind::GetId => 8,
            Kind::Discard => 11,
            Kind::WriteZeroes => 13,
            Kind::Other(code) => code,
        }
    }
}

/// One range of a discard or write-zeroes request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    pub sector: u64,
    pub sectors: u32,
    pub flags: u32,
}

/// What the driver wants.
#[derive(Clone, Debug)]
pub struct Request {
    pub kind: Kind,
    pub sector: u64,
    /// Data for the device.
    pub out: Vec<u8>,
    /// Bytes of data from the device.
    pub in_len: usize,
}

impl Request {
    pub fn read(sector: u64, len: usize) -> Self {
        Self { kind: Kind::In, sector, out: Vec::new(), in_len: len }
    }

    pub fn write(sector: u64, data: Vec<u8>) -> Self {
        Self { kind: Kind::Out, sector, out: data, in_len: 0 }
    }

    pub fn flush() -> Self {
        Self { kind: Kind::Flush, sector: 0, out: Vec::new(), in_len: 0 }
    }

    pub fn get_id() -> Self {
        Self { kind: Kind::GetId, sector: 0, out: Vec::new(), in_len: 20 }
    }

    /// A discard or write-zeroes request.
    pub fn ranges(kind: Kind, ranges: &[Range]) -> Self {
        let bytes = ranges.iter().flat_map(|range| {
            let mut bytes = range.sector.to_le_bytes().to_vec();
            bytes.extend(range.sectors.to_le_bytes());
            bytes.extend(range.flags.to_le_bytes());
            bytes
        });
        Self { kind, sector: 0, out: bytes.collect(), in_len: 0 }
    }

    /// Type and place in a few words.
    pub fn describe(&self) -> String {
        match self.kind {
            Kind::In | Kind::Out => {
                format!("{:?} {}+{}", self.kind, self.sector, (self.in_len + self.out.len()) as u64 / SECTOR)
            }
            Kind::Discard | Kind::WriteZeroes => format!("{:?} of {} ranges", self.kind, self.out.len() / 16),
            _ => format!("{:?}", self.kind),
        }
    }

    /// Everything the device reads.
    pub fn readable(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(16 + self.out.len());
        bytes.extend(self.kind.code().to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(self.sector.to_le_bytes());
        bytes.extend(&self.out);
        bytes
    }
}

/// Where descriptors cut a request: lengths of the device-readable pieces, then of the writable ones.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    pub readable: Vec<usize>,
    pub writable: Vec<usize>,
    /// Whether the descriptors lie in a table of their own.
    pub indirect: bool,
}

impl Layout {
    /// Header, data and status each in one descriptor, as most drivers do.
    pub fn plain(request: &Request) -> Self {
        let mut layout = Self { readable: vec![16], writable: vec![], indirect: false };
        if !request.out.is_empty() {
            layout.readable.push(request.out.len());
        }
        if request.in_len > 0 {
            layout.writable.push(request.in_len);
        }
        layout.writable.push(1);
        layout
    }

    /// Data in pieces of whole sectors, header and status apart, as Linux does.
    pub fn segmented(request: &Request, rng: &mut Rng, segments: usize, indirect: bool) -> Self {
        let mut readable = vec![16];
        readable.extend(cut(request.out.len(), SECTOR as usize, segments, rng));
        let mut writable = cut(request.in_len, SECTOR as usize, segments, rng);
        writable.push(1);
        Self { readable, writable, indirect }
    }

    /// Cut anywhere: inside the header, between odd bytes of the data, status joined to the data.
    pub fn ragged(request: &Request, rng: &mut Rng, segments: usize, indirect: bool) -> Self {
        Self {
            readable: cut(16 + request.out.len(), 1, segments, rng),
            writable: cut(request.in_len + 1, 1, segments, rng),
            indirect,
        }
    }

    /// One of the above.
    pub fn random(request: &Request, rng: &mut Rng, segments: usize, indirect: bool) -> Self {
        match rng.below(10) {
            0..3 => Self { indirect, ..Self::plain(request) },
            3..8 => Self::segmented(request, rng, segments, indirect),
            _ => Self::ragged(request, rng, segments, indirect),
        }
    }

    /// Descriptors it needs.
    pub fn len(&self) -> usize {
        self.readable.len() + self.writable.len()
    }
}

/// Cuts `len` into at most `pieces` non-empty pieces at multiples of `unit`.
fn cut(len: usize, unit: usize, pieces: usize, rng: &mut Rng) -> Vec<usize> {
    let mut cuts: Vec<usize> = (1..rng.between(1, pieces.max(1) as u64))
        .map(|_| rng.below((len / unit) as u64 + 1) as usize * unit)
        .collect();
    cuts.extend([0, len]);
    cuts.sort_unstable();
    cuts.windows(2).map(|pair| pair[1] - pair[0]).filter(|piece| *piece > 0).collect()
}

/// A request that the device has used.
#[derive(Debug)]
pub struct Completion {
    /// The submitter's number.
    pub tag: u64,
    /// The status byte, [`UNTOUCHED`] if the device never wrote it.
    pub status: u8,
    /// What the device says it wrote.
    pub used_len: u32,
    /// The data it wrote.
    pub data: Vec<u8>,
}
