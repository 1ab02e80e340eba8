/* A bare guest that drives one virtio-blk disk by polling, and prints PASS or FAIL on the serial port.
 *
 * It exists because it boots in a tenth of a second where Linux needs seconds, and because it runs
 * under Cloud Hypervisor on hosts whose KVM cannot run Linux. No interrupts, no paging, no library.
 *
 * The kernel command line says what to do:
 *   mode=write|verify|churn   write all blocks; read and compare all; write and compare again and again
 *   seed=N                    which contents
 *   blocks=N                  how many 4 KiB blocks, spread over the whole disk
 *   rounds=N                  churn: how often each block is written
 *
 * What it keeps true:
 *  - a sector's contents are a function of seed, block, round and place in the block, so that any
 *    other sector, an older round, a torn one or zeros are told from the right answer;
 *  - a used entry must name a request that was outstanding, once, with a good status and length;
 *  - it trusts no PASS: every number it was given and every block it compared is printed.
 *
 * virtio 1.3: §2.7 split rings, §4.1.4 PCI capabilities, §5.2 block device.
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum { BLOCK = 4096, SECTORS_PER_BLOCK = 8, DEPTH = 32, RING_MAX = 128, DESCRIPTORS = 3 };

/* ---- the machine ---- */

static void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static u8 in8(u16 port) { u8 value; __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static void out32(u16 port, u32 value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static u32 in32(u16 port) { u32 value; __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port)); return value; }
/* x86 reorders only a load before an earlier store; everything else is the compiler's doing. */
static void fence(void) { __asm__ volatile("lock; addl $0, (%%esp)" ::: "memory", "cc"); }
static void pause(void) { __asm__ volatile("pause" ::: "memory"); }

void *memset(void *to, int byte, u32 count);
void *memset(void *to, int byte, u32 count) {
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(byte) : "memory");
    return to;
}

static void put(const char *text) {
    for (; *text; text++) {
        while (!(in8(0x3f8 + 5) & 0x20)) pause();
        out8(0x3f8, (u8)*text);
    }
}

static void put_number(u32 value) {
    char text[11], *at = text + 10;
    *at = 0;
    do *--at = (char)('0' + value % 10); while (value /= 10);
    put(at);
}

static void put_field(const char *name, u32 value) {
    put(" "); put(name); put("="); put_number(value);
}

static void power_off(void) __attribute__((noreturn));
static void power_off(void) {
    out8(0x600, 0x34);
    __asm__ volatile("outw %0, %1" ::"a"((u16)0x2000), "Nd"((u16)0x604));
    for (;;) __asm__ volatile("hlt");
}

static void fail(const char *what, u32 first, u32 second) __attribute__((noreturn));
static void fail(const char *what, u32 first, u32 second) {
    put("FAIL "); put(what); put_field("first", first); put_field("second", second); put("\n");
    power_off();
}

/* ---- PCI ---- */

static u32 config_address(u32 device, u32 offset) { return 0x80000000u | device << 11 | (offset & 0xfc); }
static u32 config_read32(u32 device, u32 offset) {
    out32(0xcf8, config_address(device, offset));
    return in32(0xcfc);
}
static u8 config_read8(u32 device, u32 offset) { return (u8)(config_read32(device, offset) >> (offset & 3) * 8); }
static void config_write32(u32 device, u32 offset, u32 value) {
    out32(0xcf8, config_address(device, offset));
    out32(0xcfc, value);
}

static u32 find_disk(void) {
    for (u32 device = 0; device < 32; device++) {
        u32 id = config_read32(device, 0);
        /* virtio-blk, modern or transitional */
        if (id == 0x10421af4 || id == 0x10011af4) return device;
    }
    fail("no virtio-blk device on bus 0", 0, 0);
}

/* Where a BAR lies; what cannot be reached without paging is refused. */
static u32 bar_address(u32 device, u32 bar) {
    u32 low = config_read32(device, 0x10 + bar * 4);
    if (low & 1) fail("an I/O BAR where memory was promised", bar, low);
    if ((low & 6) == 4 && config_read32(device, 0x14 + bar * 4)) fail("a BAR above 4 GiB", bar, low);
    if (!(low & ~15u)) fail("a BAR that firmware did not place", bar, low);
    return low & ~15u;
}

/* ---- virtio ---- */

struct common {
    volatile u32 device_feature_select, device_feature, driver_feature_select, driver_feature;
    volatile u16 config_msix_vector, queue_count;
    volatile u8 status, generation;
    volatile u16 queue_select, queue_size, queue_msix_vector, queue_enable, queue_notify_offset;
    volatile u32 descriptors_low, descriptors_high, available_low, available_high, used_low, used_high;
};
struct descriptor { u64 address; u32 length; u16 flags, next; };
struct available { u16 flags; volatile u16 index; u16 ring[RING_MAX]; u16 used_event; };
struct used_entry { volatile u32 head, length; };
struct used { volatile u16 flags, index; struct used_entry ring[RING_MAX]; u16 available_event; };
struct header { u32 type, reserved; u64 sector; };

enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };
enum { NEXT = 1, DEVICE_WRITES = 2 };
enum { IN = 0, OUT = 1, FLUSH = 4 };
enum { FEATURE_FLUSH = 1u << 9, FEATURE_VERSION_1 = 1u << 0 };

static struct descriptor descriptors[RING_MAX] __attribute__((aligned(4096)));
static struct available available __attribute__((aligned(4096)));
static struct used used __attribute__((aligned(4096)));
static struct header headers[DEPTH];
static volatile u8 statuses[DEPTH];
static u8 outstanding[DEPTH];
static u32 expected_length[DEPTH];
static u32 buffers[DEPTH][BLOCK / 4] __attribute__((aligned(4096)));

static struct common *common;
static volatile u16 *notify;
static u16 ring_size, used_seen;
static u32 capacity_blocks, request_count, compared_count;

static void negotiate(void) {
    common->status = 0;
    while (common->status) pause();
    common->status = ACKNOWLEDGE;
    common->status = ACKNOWLEDGE | DRIVER;
    common->device_feature_select = 0;
    u32 low = common->device_feature & FEATURE_FLUSH;
    if (!low) fail("the disk offers no FLUSH", 0, 0);
    common->device_feature_select = 1;
    if (!(common->device_feature & FEATURE_VERSION_1)) fail("the disk is not virtio 1", 0, 0);
    common->driver_feature_select = 0;
    common->driver_feature = low;
    common->driver_feature_select = 1;
    common->driver_feature = FEATURE_VERSION_1;
    common->status = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    if (!(common->status & FEATURES_OK)) fail("the features were refused", low, 0);
}

static void open_ring(u32 notify_base, u32 notify_multiplier) {
    common->queue_select = 0;
    ring_size = common->queue_size;
    if (ring_size > RING_MAX) common->queue_size = ring_size = RING_MAX;
    if (ring_size < DEPTH * DESCRIPTORS) fail("the ring is too short", ring_size, 0);
    common->queue_msix_vector = 0xffff;
    common->descriptors_low = (u32)descriptors;
    common->descriptors_high = 0;
    common->available_low = (u32)&available;
    common->available_high = 0;
    common->used_low = (u32)&used;
    common->used_high = 0;
    notify = (volatile u16 *)(notify_base + common->queue_notify_offset * notify_multiplier);
    available.flags = 1; /* no interrupts: the used index is polled */
    common->queue_enable = 1;
    common->status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
}

static void open_disk(void) {
    u32 device = find_disk(), notify_base = 0, notify_multiplier = 0, device_config = 0;
    config_write32(device, 4, config_read32(device, 4) | 6); /* memory access, bus master */
    for (u32 at = config_read8(device, 0x34); at; at = config_read8(device, at + 1)) {
        if (config_read8(device, at) != 9) continue;
        u32 kind = config_read8(device, at + 3);
        if (kind != 1 && kind != 2 && kind != 4) continue;
        u32 address = bar_address(device, config_read8(device, at + 4)) + config_read32(device, at + 8);
        if (kind == 1) common = (struct common *)address;
        if (kind == 2) notify_base = address, notify_multiplier = config_read32(device, at + 16);
        if (kind == 4) device_config = address;
    }
    if (!common || !notify_base || !device_config) fail("a virtio capability is missing", notify_base, device_config);
    negotiate();
    volatile u32 *capacity = (volatile u32 *)device_config;
    capacity_blocks = capacity[0] / SECTORS_PER_BLOCK | capacity[1] << 29;
    open_ring(notify_base, notify_multiplier);
}

/* Fills slot `slot` with a request; `kick` makes the slots since the last kick visible. */
static void prepare(u32 slot, u32 type, u32 block) {
    struct descriptor *chain = &descriptors[slot * DESCRIPTORS];
    u16 head = (u16)(slot * DESCRIPTORS);
    headers[slot].type = type;
    headers[slot].sector = (u64)block * SECTORS_PER_BLOCK;
    statuses[slot] = 0xff;
    chain[0] = (struct descriptor){(u32)&headers[slot], sizeof(struct header), NEXT, (u16)(head + 1)};
    if (type == FLUSH) {
        chain[0].next = (u16)(head + 2);
    } else {
        chain[1] = (struct descriptor){(u32)buffers[slot], BLOCK, NEXT | (type == IN ? DEVICE_WRITES : 0), (u16)(head + 2)};
    }
    chain[2] = (struct descriptor){(u32)&statuses[slot], 1, DEVICE_WRITES, 0};
    expected_length[slot] = type == IN ? BLOCK + 1 : 1;
    outstanding[slot] = 1;
    available.ring[available.index % ring_size] = head;
    fence();
    available.index++;
    request_count++;
}

static void kick(void) {
    fence();
    *notify = 0;
}

static void complete(u32 count) {
    while (count--) {
        while (used.index == used_seen) pause();
        fence();
        struct used_entry *entry = &used.ring[used_seen++ % ring_size];
        u32 slot = entry->head / DESCRIPTORS;
        if (entry->head % DESCRIPTORS || slot >= DEPTH || !outstanding[slot]) fail("a used entry nobody asked for", entry->head, used_seen);
        outstanding[slot] = 0;
        if (statuses[slot]) fail("a request failed", statuses[slot], slot);
        if (entry->length != expected_length[slot]) fail("a wrong used length", entry->length, expected_length[slot]);
    }
}

/* ---- the workload ---- */

static u32 seed, block_count, round_count;

/* Spreads block numbers over the disk; distinct because the step is a prime above any capacity here. */
static u32 place_of(u32 index) {
    u64 product = (u64)index * 16777259u;
    /* 64-bit division has no instruction and no library here: subtract shifted divisors. */
    u64 divisor = capacity_blocks;
    while (divisor <= product >> 1) divisor <<= 1;
    for (; divisor >= capacity_blocks; divisor >>= 1) if (product >= divisor) product -= divisor;
    return (u32)product;
}

/* What the rest of a sector repeats after its three numbers. Never zero. */
static u32 filler_of(u32 index, u32 round, u32 sector) {
    u32 state = (seed * 2654435761u) ^ (index * 40503u) ^ (round * 2246822519u) ^ (sector << 27);
    state ^= state >> 15;
    state *= 2246822519u;
    return state | 1;
}

enum { SECTOR_WORDS = 128, NUMBERS = 3 };

/* String instructions, because some KVMs interpret this guest one instruction at a time. */
static void fill(u32 *words, u32 index, u32 round) {
    for (u32 sector = 0; sector < SECTORS_PER_BLOCK; sector++) {
        words[0] = index; words[1] = round; words[2] = sector;
        words += NUMBERS;
        u32 count = SECTOR_WORDS - NUMBERS;
        __asm__ volatile("rep stosl" : "+D"(words), "+c"(count) : "a"(filler_of(index, round, sector)) : "memory");
    }
}

static void compare(const u32 *words, u32 index, u32 round) {
    for (u32 sector = 0; sector < SECTORS_PER_BLOCK; sector++) {
        if (words[0] != index) fail("another block's contents", index, words[0]);
        if (words[1] != round) fail("another round's contents", round, words[1]);
        if (words[2] != sector) fail("another sector's contents", sector, words[2]);
        words += NUMBERS;
        u32 count = SECTOR_WORDS - NUMBERS;
        u8 equal;
        __asm__ volatile("repe scasl\n\tsete %2"
                         : "+D"(words), "+c"(count), "=q"(equal)
                         : "a"(filler_of(index, round, sector))
                         : "memory", "cc");
        if (!equal) fail("wrong contents", index, sector);
    }
    compared_count++;
}

static void write_batch(u32 first, u32 count, u32 round) {
    for (u32 slot = 0; slot < count; slot++) {
        fill(buffers[slot], first + slot, round);
        prepare(slot, OUT, place_of(first + slot));
    }
    kick();
    complete(count);
}

static void verify_batch(u32 first, u32 count, u32 round) {
    for (u32 slot = 0; slot < count; slot++) {
        memset(buffers[slot], 0xa5, BLOCK);
        prepare(slot, IN, place_of(first + slot));
    }
    kick();
    complete(count);
    for (u32 slot = 0; slot < count; slot++) compare(buffers[slot], first + slot, round);
}

static void flush(void) {
    prepare(0, FLUSH, 0);
    kick();
    complete(1);
}

static void write_all(u32 round) {
    for (u32 first = 0; first < block_count; first += DEPTH) {
        write_batch(first, DEPTH, round);
        if (first / DEPTH % 8 == 7) flush();
    }
    flush();
}

static void verify_all(u32 round) {
    for (u32 first = 0; first < block_count; first += DEPTH) verify_batch(first, DEPTH, round);
}

static void churn(void) {
    for (u32 round = 0; round < round_count; round++) {
        write_all(round);
        verify_all(round);
        put("ROUND"); put_field("round", round); put("\n");
    }
}

/* ---- the command line ---- */

static const char *option(const char *line, const char *name) {
    for (; *line; line++) {
        const char *at = line, *want = name;
        while (*want && *at == *want) at++, want++;
        if (!*want && *at == '=') return at + 1;
    }
    return 0;
}

static u32 number(const char *line, const char *name) {
    const char *at = option(line, name);
    u32 value = 0;
    if (!at) fail("a number is missing on the command line", (u8)name[0], 0);
    for (; *at >= '0' && *at <= '9'; at++) value = value * 10 + (u32)(*at - '0');
    return value;
}

void guest_main(const u32 *start_info);
void guest_main(const u32 *start_info) {
    if (start_info[0] != 0x336ec578) fail("no PVH start info", start_info[0], 0);
    const char *line = (const char *)start_info[6];
    const char *mode = option(line, "mode");
    seed = number(line, "seed");
    block_count = number(line, "blocks");
    round_count = number(line, "rounds");
    open_disk();
    put("DISK"); put_field("blocks", capacity_blocks); put_field("ring", ring_size); put("\n");
    if (!mode || !block_count || block_count % DEPTH || block_count > capacity_blocks) fail("a bad command line", block_count, 0);
    /* The step in `place_of` is prime, so it only has to differ from the capacity. */
    if (capacity_blocks >= 16777259u) fail("the disk is too large", capacity_blocks, 0);
    if (*mode == 'w') write_all(0), verify_all(0);
    else if (*mode == 'v') verify_all(0);
    else if (*mode == 'c') churn();
    else fail("an unknown mode", (u8)*mode, 0);
    put("PASS"); put_field("requests", request_count); put_field("compared", compared_count); put("\n");
}
