//! Bad things that a guest does to ring 0, which has 16 entries and a neighbour.

use super::front::Client;
use super::ring::Descriptor;

/// Something bad done to ring 0; it is kicked afterwards.
pub type Attack = fn(&mut Client);

/// On split rings.
pub mod split {
    use super::{Attack, Client, Descriptor};

    /// A chain on ring 0 with its header in front and its status behind.
    fn framed(client: &mut Client, code: u32, middle: &[Descriptor]) {
        client.queues[0].submit_framed(0xbad, code, 0, middle);
    }

    /// One indirect descriptor on ring 0 over a table of `entries`, `len` bytes long as it claims.
    fn indirect(client: &mut Client, entries: &[Descriptor], len: u32) {
        let memory = client.memory.clone();
        let table = client.queues[0].alloc(4096);
        for (i, entry) in entries.iter().enumerate() {
            memory.write(table + 16 * i as u64, &entry.to_bytes());
        }
        client.queues[0].submit_raw(0xbad, &[Descriptor::indirect(table, len)]);
    }

    const NEXT: u16 = 1;
    const INDIRECT: u16 = 4;

    /// All of them.
    pub const ALL: &[(&str, Attack)] = &[
        ("the available index jumps by more than the ring", |c| c.queues[0].jump(17)),
        ("the available index jumps by half its range", |c| c.queues[0].jump(1 << 15)),
        ("the available index goes backwards", |c| c.queues[0].jump(u16::MAX)),
        ("a head outside the table", |c| c.queues[0].offer(16)),
        ("the highest head", |c| c.queues[0].offer(u16::MAX)),
        ("a descriptor that is its own next", |c| {
            let addr = c.queues[0].alloc(16);
            for slot in 0..16 {
                let own = Descriptor { addr, len: 16, flags: NEXT, next: slot };
                c.queues[0].write_descriptor(slot, own);
            }
            c.queues[0].offer(3);
        }),
        ("two descriptors that are each other's next", |c| {
            let addr = c.queues[0].alloc(16);
            for slot in 0..16 {
                c.queues[0].write_descriptor(slot, Descriptor { addr, len: 16, flags: NEXT, next: slot ^ 1 });
            }
            c.queues[0].offer(4);
        }),
        ("a next outside the table", |c| {
            let addr = c.queues[0].alloc(16);
            c.queues[0].write_descriptor(5, Descriptor { addr, len: 16, flags: NEXT, next: 16 });
            c.queues[0].offer(5);
        }),
        ("one head offered twice", |c| {
            let addr = c.queues[0].alloc(4096);
            framed(c, 0, &[Descriptor { addr, len: 512, flags: 2, next: 0 }]);
            let head =
                c.memory.load(c.queues[0].avail_at + 4 + 2 * u64::from(c.queues[0].avail_index() % 16));
            c.queues[0].offer(head);
        }),
        ("an indirect table of no bytes", |c| indirect(c, &[], 0)),
        ("an indirect table of odd length", |c| indirect(c, &[Descriptor::readable(0, 16)], 17)),
        ("an indirect table of 4 GiB", |c| indirect(c, &[Descriptor::readable(0, 16)], !15)),
        ("an indirect table in an indirect table", |c| {
            let at = c.queues[0].alloc(64);
            indirect(c, &[Descriptor::indirect(at, 16)], 16);
        }),
        ("an indirect table whose entries loop", |c| {
            let addr = c.queues[0].alloc(16);
            indirect(c, &[Descriptor { addr, len: 16, flags: NEXT, next: 0 }], 16);
        }),
        ("an indirect table with a next outside of it", |c| {
            let addr = c.queues[0].alloc(16);
            indirect(c, &[Descriptor { addr, len: 16, flags: NEXT, next: 9 }], 32);
        }),
        ("an indirect descriptor that has a next", |c| {
            let table = c.queues[0].alloc(64);
            c.queues[0].submit_raw(
                0xbad,
                &[
                    Descriptor { addr: table, len: 32, flags: INDIRECT, next: 0 },
                    Descriptor::writable(table, 1),
                ],
            );
        }),
        ("an indirect table outside the memory", |c| {
            c.queues[0].submit_raw(0xbad, &[Descriptor::indirect(1 << 60, 64)]);
        }),
        ("a readable piece behind a writable one", |c| {
            let at = c.queues[0].alloc(1024);
            framed(c, 1, &[Descriptor::writable(at, 512), Descriptor::readable(at + 512, 512)]);
        }),
        ("a chain that cannot be answered", |c| {
            let at = c.queues[0].alloc(16);
            c.queues[0].submit_raw(0xbad, &[Descriptor::readable(at, 16)]);
        }),
        ("a chain without header", |c| {
            let at = c.queues[0].alloc(16);
            c.queues[0].submit_raw(0xbad, &[Descriptor::writable(at, 1)]);
        }),
        ("a header cut short", |c| {
            let at = c.queues[0].alloc(16);
            c.queues[0].submit_raw(0xbad, &[Descriptor::readable(at, 8), Descriptor::writable(at, 1)]);
        }),
        ("a descriptor of nothing", |c| {
            let at = c.queues[0].alloc(16);
            framed(c, 1, &[Descriptor::readable(at, 0)]);
        }),
        ("a descriptor whose end overflows", |c| framed(c, 1, &[Descriptor::readable(u64::MAX - 16, 512)])),
        ("4 GiB in one descriptor", |c| {
            let at = c.queues[0].alloc(16);
            framed(c, 1, &[Descriptor::readable(at, u32::MAX)]);
        }),
        ("a piece that runs out of its region", |c| {
            let region = c.memory.regions()[0];
            framed(c, 0, &[Descriptor::writable(region.guest + region.len - 256, 512)]);
        }),
        ("a status byte outside the memory", |c| {
            let at = c.queues[0].alloc(16);
            c.queues[0].submit_raw(0xbad, &[Descriptor::readable(at, 16), Descriptor::writable(1 << 60, 1)]);
        }),
        ("data over the rings themselves", |c| {
            let (at, len) = (c.queues[0].desc_at, 512);
            framed(c, 0, &[Descriptor::writable(at, len)]);
        }),
    ];
}

/// On packed rings.
pub mod packed {
    use super::{Attack, Client, Descriptor};

    const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;

    fn offer(client: &mut Client, slots: &[(Descriptor, u16)]) {
        client.queues[0].offer_packed(slots);
    }

    /// A piece of a chain, in memory of its own.
    pub fn part(client: &mut Client, len: u32, flags: u16) -> Descriptor {
        let addr = client.queues[0].alloc(len.into());
        Descriptor { addr, len, flags, next: 0 }
    }

    fn indirect(client: &mut Client, entries: &[Descriptor], len: u32) {
        let table = client.queues[0].alloc(4096);
        client.queues[0].write_table(table, &mut entries.to_vec());
        offer(client, &[(Descriptor { addr: table, len, flags: INDIRECT, next: 0 }, 0)]);
    }

    /// Each leaves no way to answer: the ring is broken and says so.
    pub const ALL: &[(&str, Attack)] = &[
        ("a chain as long as the ring that goes on", |c| {
            let slots: Vec<_> = (0..16).map(|id| (part(c, 16, NEXT), id)).collect();
            offer(c, &slots);
        }),
        ("an id outside the ring", |c| {
            let one = part(c, 16, WRITE);
            offer(c, &[(one, 16)]);
        }),
        ("the highest id", |c| {
            let one = part(c, 16, WRITE);
            offer(c, &[(one, u16::MAX)]);
        }),
        ("a piece to read behind one to write", |c| {
            let (first, last) = (part(c, 16, WRITE | NEXT), part(c, 16, 0));
            offer(c, &[(first, 0), (last, 0)]);
        }),
        ("a chain without room for a status", |c| {
            let one = part(c, 16, 0);
            offer(c, &[(one, 0)]);
        }),
        ("a status outside the memory", |c| {
            let first = part(c, 16, NEXT);
            offer(c, &[(first, 0), (Descriptor::writable(1 << 60, 1), 0)]);
        }),
        ("an indirect table of no bytes", |c| indirect(c, &[], 0)),
        ("an indirect table of odd length", |c| indirect(c, &[Descriptor::readable(0, 16)], 17)),
        ("an indirect table of 4 GiB", |c| indirect(c, &[Descriptor::readable(0, 16)], !15)),
        ("an indirect table in an indirect table", |c| {
            let at = c.queues[0].alloc(64);
            indirect(c, &[Descriptor::indirect(at, 16)], 16);
        }),
        ("an indirect table outside the memory", |c| {
            offer(c, &[(Descriptor::indirect(1 << 60, 64), 0)]);
        }),
        ("an indirect descriptor that goes on", |c| {
            let (table, last) = (part(c, 64, INDIRECT | NEXT), part(c, 1, WRITE));
            offer(c, &[(table, 0), (last, 0)]);
        }),
    ];
}
