//! A guest's rings: descriptors, indirect tables, indices, requests, and the in-flight area.
//!
//! The input is a script of a driver's doings. As long as it has done nothing wrong (it is *honest*)
//! everything it is promised is checked: each request comes back once, with the status the disk gave
//! it and the bytes it asked for, also over the daemon's death. From its first wrong step on only this
//! holds: no panic, no step without end, the queue's books agree, and no byte beside the guest's
//! memory is touched. No system call is made, so an execution takes microseconds.

mod disk;
mod packed;

use std::cell::RefCell;
use std::sync::Arc;

use self::disk::{Ledger, Shared, content};
use self::packed::Packed;
use super::Input;
use crate::vhost::{QueueStepper, RingSetup};
use crate::volume::Status;

/// Where the parts of an honest ring are.
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x600;
/// Where an honest driver's buffers are.
const BUFFERS: u64 = 0x900;
const BUFFERS_END: u64 = 0x5000;
/// Steps of a script.
const STEPS_MAX: u32 = 200;
/// Turns after which everything must have come back: a ring is no longer than 64, a batch 16.
const TURNS_MAX: u32 = 600;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A request an honest driver waits for.
#[derive(Clone, Debug)]
struct Waiting {
    head: u16,
    slots: Vec<u16>,
    sector: u64,
    /// Where the status byte is.
    status_at: u64,
    /// Of a read: where its data is, and how much.
    data: Option<(u64, u32)>,
    /// Answered by the front end itself, whatever the disk.
    without_disk: Option<u8>,
    written: u32,
}

/// The driver, and what it knows.
struct Driver<'a> {
    bench: &'a mut QueueStepper<Shared>,
    disk: Shared,
    setup: RingSetup,
    honest: bool,
    runs: bool,
    /// Of a packed ring, where the driver stands.
    packed: Option<Packed>,
    /// Descriptors of a split ring, ids of a packed one.
    free: Vec<u16>,
    waiting: Vec<Waiting>,
    available: u16,
    used: u16,
    next_buffer: u64,
    next_sector: u64,
    deaths: u32,
}

thread_local! {
    static BENCH: RefCell<QueueStepper<Shared>> =
        RefCell::new(QueueStepper::new().expect("a guest's memory can be made"));
}

/// The target.
pub fn ring(bytes: &[u8]) {
    BENCH.with_borrow_mut(|bench| {
        bench.clear();
        let mut input = Input::new(bytes);
        let mut driver = Driver::begin(bench, &mut input);
        for _ in 0..STEPS_MAX {
            if input.is_over() {
                break;
            }
            driver.step(&mut input);
        }
        driver.end();
        assert!(!bench.strays(), "bytes beside the guest's memory have changed");
    });
}

impl<'a> Driver<'a> {
    fn begin(bench: &'a mut QueueStepper<Shared>, input: &mut Input<'_>) -> Self {
        let (shape, features) = (input.byte(), input.byte());
        let is_packed = features & 64 != 0;
        let mut size = 1u16 << (shape & 7).min(6);
        // A packed ring may have any size.
        if is_packed && size > 2 && shape & 16 != 0 {
            size -= 1;
        }
        // SEG_MAX, BLK_SIZE, CONFIG_WCE and the like change nothing here.
        let mut bits = 1 << 32 | 1 << 30 | u64::from(is_packed) << 34;
        for (bit, at) in [(9, 0), (13, 1), (14, 2), (28, 3), (29, 4)] {
            bits |= u64::from(!features >> at & 1) << bit;
        }
        let base = if shape & 8 != 0 { input.half() } else { 0 };
        let mut addresses = [DESCRIPTORS, AVAILABLE, USED];
        let crooked = shape & 0xf0 == 0xf0;
        if crooked {
            addresses = [(); 3].map(|()| input.edge());
        }
        let place = if is_packed { packed::START } else { base.into() };
        let setup = RingSetup { size, addresses, base: place, features: bits, inflight: features & 32 == 0 };
        let ledger = Ledger { honest: !crooked, ..Ledger::default() };
        let disk = Shared::new(ledger);
        let mut driver = Self {
            bench,
            disk,
            setup,
            honest: !crooked,
            runs: false,
            packed: is_packed.then(|| Packed::new(size)),
            free: (0..size).rev().collect(),
            waiting: Vec::new(),
            available: base,
            used: base,
            next_buffer: BUFFERS,
            next_sector: 1,
            deaths: 0,
        };
        if !is_packed {
            driver.put(AVAILABLE + 2, base);
            driver.put(USED + 2, base);
        }
        driver.start();
        driver
    }

    fn put(&self, at: u64, value: u16) {
        self.bench.write(at, &value.to_le_bytes());
    }

    fn get(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.bench.read(at, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Shows the device everything placed.
    fn show(&mut self) {
        match &mut self.packed {
            None => self.put(AVAILABLE + 2, self.available),
            Some(packed) => {
                for (slot, flags) in packed.show() {
                    self.put(DESCRIPTORS + 16 * u64::from(slot) + 14, flags);
                }
            }
        }
    }

    /// From here on the driver is not to be believed.
    fn tamper(&mut self) {
        self.honest = false;
        self.disk.ledger().honest = false;
    }

    fn start(&mut self) {
        self.runs = self.bench.start(&self.setup, &Arc::new(self.disk.clone()));
        assert!(self.runs || !self.honest, "a good ring does not start");
    }

    fn turn(&mut self) -> bool {
        let did = self.bench.turn(false);
        if self.honest {
            self.collect();
        }
        did
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 20 {
            0..6 => self.request(input),
            6..8 => _ = self.turn(),
            8 => {
                let mut ledger = self.disk.ledger();
                let choice = input.byte();
                (ledger.status, ledger.lifo) = (choice, choice & 8 != 0);
                (ledger.holds, ledger.let_go) = (choice & 16 != 0, u32::from(choice >> 5));
                drop(ledger);
                self.turn();
            }
            9 => self.notifications(input),
            10 => self.die(),
            11 => self.restart(input),
            12 => {
                self.tamper();
                let (at, len) = (input.half(), input.below(32));
                self.bench.write(at.into(), input.slice(len));
            }
            13 => {
                self.tamper();
                let at = input.half() % 2080;
                let len = input.below(24);
                self.bench.poke_area(at.into(), input.slice(len));
            }
            14 | 15 => self.wild_descriptor(input),
            16 => {
                self.tamper();
                self.offer_wild(u16::from(input.byte()) % (self.setup.size * 2));
            }
            17 => {
                self.tamper();
                let jump = input.half();
                self.available = self.available.wrapping_add(jump);
                match &self.packed {
                    None => self.put(AVAILABLE + 2, self.available),
                    Some(_) => self.put(DESCRIPTORS + 16 * u64::from(jump % self.setup.size) + 14, jump),
                }
            }
            18 => {
                self.tamper();
                self.bench.show_third_region(input.byte() & 1 == 0);
            }
            _ => self.wild_request(input),
        }
    }

    /// Offers a head, or a slot with an id, that may be none.
    fn offer_wild(&mut self, head: u16) {
        if let Some(packed) = &self.packed {
            let (slot, state) = packed.slot(head >> 4);
            let at = DESCRIPTORS + 16 * u64::from(slot);
            self.put(at + 12, head);
            let flags = self.get(at + 14) & 7;
            return self.put(at + 14, flags | state);
        }
        let slot = u64::from(self.available % self.setup.size);
        self.put(AVAILABLE + 4 + 2 * slot, head);
        self.available = self.available.wrapping_add(1);
        self.put(AVAILABLE + 2, self.available);
    }

    fn notifications(&mut self, input: &mut Input<'_>) {
        if self.packed.is_some() {
            let (event, flags) = (input.half(), u16::from(input.byte() & 3));
            self.put(AVAILABLE, event);
            return self.put(AVAILABLE + 2, flags);
        }
        let event = self.used.wrapping_add(input.byte() as i8 as u16);
        self.put(AVAILABLE, event & 1);
        self.put(AVAILABLE + 4 + 2 * u64::from(self.setup.size), event);
    }

    /// The daemon dies and comes back. Without the in-flight area what was in flight is lost.
    fn die(&mut self) {
        self.bench.kill();
        if !self.setup.inflight && !self.waiting.is_empty() {
            self.tamper();
        }
        // The VMM says what it knows, which is the used index, and of a packed ring nothing.
        self.setup.base = match &self.packed {
            None => self.get(USED + 2).into(),
            Some(_) if self.setup.inflight => packed::START,
            Some(packed) => packed.position(),
        };
        self.deaths += 1;
        self.start();
    }

    /// The VMM stops the ring and starts it again, with other features when nothing is available.
    fn restart(&mut self, input: &mut Input<'_>) {
        self.drain();
        let change = input.byte();
        let Some(base) = self.bench.stop() else { return };
        self.setup.base = base;
        if self.waiting.is_empty() || !self.honest {
            for (bit, at) in [(9, 0), (13, 1), (14, 2), (28, 3), (29, 4)] {
                self.setup.features ^= u64::from(change >> at & 1) << bit;
            }
        }
        self.start();
    }

    /// Lets everything the disk holds come back.
    fn drain(&mut self) {
        self.disk.ledger().holds = false;
        for _ in 0..TURNS_MAX {
            if !self.bench.turn(true) && self.bench.pending() == 0 {
                break;
            }
        }
        assert_eq!(self.bench.pending(), 0, "a stopping queue never becomes empty");
        if self.honest {
            self.collect();
        }
    }

    /// Takes used elements, and compares each with what it was promised.
    fn collect(&mut self) {
        if self.packed.is_some() {
            return self.collect_packed();
        }
        let used = self.get(USED + 2);
        while self.used != used {
            let slot = u64::from(self.used % self.setup.size);
            let mut element = [0; 8];
            self.bench.read(USED + 4 + 8 * slot, &mut element);
            self.used = self.used.wrapping_add(1);
            let element = u64::from_le_bytes(element);
            let (id, written) = (element as u32, (element >> 32) as u32);
            let found = self.waiting.iter().position(|waiting| u32::from(waiting.head) == id);
            let found = found.unwrap_or_else(|| panic!("{id} comes back and was not under way"));
            let waiting = self.waiting.swap_remove(found);
            self.judge(&waiting, written);
            self.free.extend(&waiting.slots);
        }
        if self.waiting.is_empty() {
            self.next_buffer = BUFFERS;
        }
    }

    fn judge(&self, waiting: &Waiting, written: u32) {
        let mut status = [0];
        self.bench.read(waiting.status_at, &mut status);
        let ledger = self.disk.ledger();
        let mut runs = ledger.executed.iter().filter(|(sector, _)| *sector == waiting.sector);
        let count = runs.clone().count() as u32;
        let expected = match waiting.without_disk {
            Some(status) => {
                assert_eq!(count, 0, "the disk is asked for nothing: {waiting:?}");
                status
            }
            None => {
                assert!((1..=self.deaths + 1).contains(&count), "executed {count} times: {waiting:?}");
                match runs.next_back().expect("there is one").1 {
                    Status::Ok => 0,
                    Status::IoError => 1,
                    Status::Unsupported => 2,
                }
            }
        };
        assert_eq!(status, [expected], "the status: {waiting:?}");
        assert_eq!(written, if expected == 0 { waiting.written } else { 1 }, "the length: {waiting:?}");
        if let (0, Some((at, len))) = (expected, waiting.data) {
            let (mut first, mut last) = ([0], [0]);
            self.bench.read(at, &mut first);
            self.bench.read(at + u64::from(len) - 1, &mut last);
            assert_eq!((first, last), ([content(waiting.sector)], [content(waiting.sector)]), "{waiting:?}");
        }
    }

    fn buffer(&mut self, len: u64) -> Option<u64> {
        let at = self.next_buffer;
        (at + len <= BUFFERS_END).then(|| {
            self.next_buffer = at + len;
            at
        })
    }

    /// A good request, cut into pieces somehow.
    fn request(&mut self, input: &mut Input<'_>) {
        let (choice, cuts) = (input.byte(), input.byte());
        let sector = self.next_sector;
        let len = 512 * u64::from(choice >> 5);
        let features = self.setup.features;
        let has = |bit: u32| features >> bit & 1 == 1;
        let (code, sent, room, without_disk) = match choice % 8 {
            0..3 => (0, 0, len, (len == 0).then_some(0)),
            3..5 => (1, len, 0, (len == 0).then_some(0)),
            5 => (11, 16, 0, (!has(13)).then_some(2)),
            6 => (13, 16, 0, (!has(14)).then_some(2)),
            _ => (8, 0, 20, Some(0)),
        };
        let Some(at) = self.buffer(16 + sent + room + 1) else { return };
        let mut readable = vec![0; 16 + sent as usize];
        readable[0] = code;
        readable[8..16].copy_from_slice(&sector.to_le_bytes());
        match code {
            1 => readable[16..].fill(sector as u8),
            11 | 13 => {
                readable[16..24].copy_from_slice(&sector.to_le_bytes());
                readable[24] = 1;
            }
            _ => {}
        }
        self.bench.write(at, &readable);
        self.bench.write(at + 16 + sent + room, &[0xee]);
        let mut parts = cut(at, 16 + sent, cuts & 3, 0);
        parts.extend(cut(at + 16 + sent, room + 1, cuts >> 2 & 3, WRITE));
        let table = has(28) && cuts & 16 != 0;
        let Some(slots) = self.place(&parts, table) else { return };
        self.next_sector += 1;
        self.waiting.push(Waiting {
            head: slots[0],
            slots,
            sector,
            status_at: at + 16 + sent + room,
            data: (code == 0 && len > 0).then_some((at + 16, len as u32)),
            without_disk,
            written: room as u32 + 1,
        });
        if cuts & 32 == 0 {
            self.show();
        }
        if cuts & 64 == 0 {
            self.show();
            self.turn();
        }
    }

    /// Puts a chain into free descriptors and offers it.
    fn place(&mut self, parts: &[(u64, u32, u16)], table: bool) -> Option<Vec<u16>> {
        let count = if table { 1 } else { parts.len() };
        if self.packed.is_some() {
            return self.place_packed(parts, count);
        }
        if self.free.len() < count {
            return None;
        }
        let slots: Vec<u16> = (0..count).map(|_| self.free.pop().expect("there are as many")).collect();
        let link = |last: bool| if last { 0 } else { NEXT };
        if table {
            let Some(at) = self.buffer(16 * parts.len() as u64) else {
                self.free.extend(slots);
                return None;
            };
            for (i, &(addr, len, flags)) in parts.iter().enumerate() {
                let flags = flags | link(i + 1 == parts.len());
                self.bench.write(at + 16 * i as u64, &descriptor(addr, len, flags, i as u16 + 1));
            }
            let bytes = descriptor(at, 16 * parts.len() as u32, INDIRECT, 0);
            self.bench.write(DESCRIPTORS + 16 * u64::from(slots[0]), &bytes);
        } else {
            for (i, &(addr, len, flags)) in parts.iter().enumerate() {
                let next = slots.get(i + 1).copied();
                let bytes = descriptor(addr, len, flags | link(next.is_none()), next.unwrap_or(0));
                self.bench.write(DESCRIPTORS + 16 * u64::from(slots[i]), &bytes);
            }
        }
        let slot = u64::from(self.available % self.setup.size);
        self.put(AVAILABLE + 4 + 2 * slot, slots[0]);
        self.available = self.available.wrapping_add(1);
        Some(slots)
    }

    /// Any descriptor into any slot of the ring's table, or of what may be an indirect one.
    fn wild_descriptor(&mut self, input: &mut Input<'_>) {
        self.tamper();
        let slot = input.byte();
        let base = if slot & 0x80 == 0 { DESCRIPTORS } else { BUFFERS };
        let bytes = self.laid_out(wild(input));
        self.bench.write(base + 16 * u64::from(slot & 0x3f), &bytes);
    }

    /// A chain of up to eight wild descriptors that begins with a header.
    fn wild_request(&mut self, input: &mut Input<'_>) {
        self.tamper();
        let code = input.byte();
        let sector = input.edge();
        let header = [&[code % 16, 0, 0, 0, 0, 0, 0, 0], &sector.to_le_bytes()[..]].concat();
        self.bench.write(BUFFERS, &header);
        let count = u16::from(code >> 4).min(self.setup.size - 1).min(8);
        let mut bytes = descriptor(BUFFERS, 16, NEXT, 1);
        for slot in 0..=count {
            match &self.packed {
                None => self.bench.write(DESCRIPTORS + 16 * u64::from(slot), &bytes),
                Some(packed) => {
                    let at = DESCRIPTORS + 16 * u64::from(packed.slot(slot).0);
                    self.bench.write(at, &self.laid_out(bytes))
                }
            };
            bytes = wild(input);
            // Most of them in order: a chain that ends at once has been tried often enough.
            if bytes[14] & 0x80 == 0 {
                bytes[14..].copy_from_slice(&(slot + 2).to_le_bytes());
                bytes[12] |= NEXT as u8 * u8::from(slot + 1 < count);
            }
        }
        self.offer_wild(0);
        self.turn();
    }

    /// Everything published comes back, exactly once.
    fn end(mut self) {
        if !self.runs {
            return;
        }
        self.disk.ledger().holds = false;
        self.show();
        for _ in 0..TURNS_MAX {
            if !self.turn() && self.bench.pending() == 0 {
                break;
            }
        }
        assert_eq!(self.bench.pending(), 0, "the queue never becomes empty");
        if self.honest {
            assert!(!self.bench.is_broken(), "an honest driver's ring is broken");
            assert!(self.waiting.is_empty(), "never came back: {:?}", self.waiting);
            let position = self.packed.as_ref().map_or(self.available.into(), Packed::position);
            assert_eq!(self.bench.stop(), Some(position), "the position of an idle ring");
        } else {
            self.drain();
        }
    }
}

/// `len` bytes at `at` in up to four pieces, one of which may be empty of sense but not of bytes.
fn cut(at: u64, len: u64, cuts: u8, flags: u16) -> Vec<(u64, u32, u16)> {
    let mut parts = Vec::new();
    let (mut at, mut left) = (at, len);
    for i in 0..u64::from(cuts) {
        let piece = [1, 15, 511][i as usize % 3].min(left.saturating_sub(1));
        if piece > 0 {
            parts.push((at, piece as u32, flags));
            (at, left) = (at + piece, left - piece);
        }
    }
    parts.push((at, left as u32, flags));
    parts
}

fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// A descriptor whose fields are often nearly right.
fn wild(input: &mut Input<'_>) -> [u8; 16] {
    let choice = input.byte();
    let addr = match choice & 7 {
        0..3 => BUFFERS + u64::from(input.half() % 0x4800),
        3 => u64::from(input.half()),
        4 => 0x4fff - u64::from(input.byte()),
        5 => 0x10000 + u64::from(input.half()),
        6 => u64::MAX - u64::from(input.byte()),
        _ => input.edge(),
    };
    let len = match choice >> 3 & 3 {
        0 => [0, 1, 16, 32, 512, 1024, 4096, 8192][input.below(8)],
        1 => u32::from(input.half()),
        2 => 512 * u32::from(input.byte()),
        _ => input.edge() as u32,
    };
    let flags = [0, 1, 1, 2, 2, 3, 4, u16::from(choice)][usize::from(choice >> 5)];
    descriptor(addr, len, flags, u16::from(input.byte()))
}
