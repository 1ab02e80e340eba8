//! Copies that checksum what they copy: each byte is loaded once, stored, and folded into a CRC-32 on
//! the way. The bytes that were checksummed are those that were stored, whatever their owner does to
//! the source meanwhile.
//!
//! A copy of 4 KiB between two caches' worths of memory waits for that memory most of its time; the
//! multiplications of the checksum fit into the wait, where a second pass over the bytes comes on top.
//!
//! How it sums (Gopal et al., "Fast CRC Computation Using PCLMULQDQ"): a lane of 128 bits is moved D bits
//! ahead, over the bytes between, by two carry-less products, of its halves with x^(D±32) mod P, and
//! added to the lane it meets there. What is left in the end, 16 bytes, has the remainder of them all: it
//! is moved ahead by 64 and 32 bits, and reduced as Barrett does it, by two products more. A table of
//! remainders would take sixteen loads for that, each waiting for the one before.
//!
//! These are routines like those of `routines.rs`, with a range and exits of their own, and keep the
//! same three things true: no frame, one range, whole words.
#![cfg(target_arch = "x86_64")]

use std::arch::global_asm;
use std::hint::black_box;
use std::ops::Range;
use std::time::Instant;

use super::guard::{Fault, answer};
use super::routines;
use super::store::{StoreMethod, complete_stores};

/// The least that all routines take, and a length they take is a multiple of.
pub(super) const UNIT: usize = 256;

global_asm!(
    r#"
    .pushsection .text.pcache_vhost_sums, "ax", @progbits
    .p2align 6

    .globl pcache_vhost_sums_begin
    .hidden pcache_vhost_sums_begin
pcache_vhost_sums_begin:

    # (rdi = to, rsi = from, rdx = length, rcx = constants, r8 = where the sum goes)

    # From the remainder of all in xmm3 to the sum, and back. Constants are aligned.
    .macro PCACHE_VHOST_SUM_FINISH
    movdqa xmm2, [rcx + 128]
    movdqa xmm0, xmm3
    pclmulqdq xmm0, [rcx + 64], 0x10
    psrldq xmm3, 8
    pxor xmm3, xmm0
    movdqa xmm0, xmm3
    pand xmm0, xmm2
    pclmulqdq xmm0, [rcx + 96], 0x00
    psrldq xmm3, 4
    pxor xmm3, xmm0
    movdqa xmm0, xmm3
    pand xmm0, xmm2
    pclmulqdq xmm0, [rcx + 112], 0x10
    pand xmm0, xmm2
    pclmulqdq xmm0, [rcx + 112], 0x00
    pxor xmm0, xmm3
    psrldq xmm0, 4
    movd eax, xmm0
    not eax
    mov [r8], eax
    xor eax, eax
    ret
    .endm

    .macro PCACHE_VHOST_SUM_NARROW name, store
    .globl pcache_vhost_sums_\name
    .hidden pcache_vhost_sums_\name
    .type pcache_vhost_sums_\name, @function
    .p2align 5
pcache_vhost_sums_\name:
    .cfi_startproc
    movdqu xmm8, [rcx + 16]
    movdqu xmm9, [rcx + 64]
    movdqu xmm0, [rsi]
    movdqu xmm1, [rsi + 16]
    movdqu xmm2, [rsi + 32]
    movdqu xmm3, [rsi + 48]
    \store [rdi], xmm0
    \store [rdi + 16], xmm1
    \store [rdi + 32], xmm2
    \store [rdi + 48], xmm3
    # The sum begins with all ones.
    mov eax, -1
    movd xmm10, eax
    pxor xmm0, xmm10
    jmp 3f
    .p2align 5
2:  movdqu xmm4, [rsi]
    movdqu xmm5, [rsi + 16]
    movdqu xmm6, [rsi + 32]
    movdqu xmm7, [rsi + 48]
    \store [rdi], xmm4
    \store [rdi + 16], xmm5
    \store [rdi + 32], xmm6
    \store [rdi + 48], xmm7
    movdqa xmm11, xmm0
    movdqa xmm12, xmm1
    movdqa xmm13, xmm2
    movdqa xmm14, xmm3
    pclmulqdq xmm11, xmm8, 0x00
    pclmulqdq xmm12, xmm8, 0x00
    pclmulqdq xmm13, xmm8, 0x00
    pclmulqdq xmm14, xmm8, 0x00
    pclmulqdq xmm0, xmm8, 0x11
    pclmulqdq xmm1, xmm8, 0x11
    pclmulqdq xmm2, xmm8, 0x11
    pclmulqdq xmm3, xmm8, 0x11
    pxor xmm0, xmm11
    pxor xmm1, xmm12
    pxor xmm2, xmm13
    pxor xmm3, xmm14
    pxor xmm0, xmm4
    pxor xmm1, xmm5
    pxor xmm2, xmm6
    pxor xmm3, xmm7
3:  add rsi, 64
    add rdi, 64
    sub rdx, 64
    jnz 2b
    # Four lanes to one, 128 bits at a time.
    movdqa xmm11, xmm0
    pclmulqdq xmm11, xmm9, 0x00
    pclmulqdq xmm0, xmm9, 0x11
    pxor xmm1, xmm11
    pxor xmm1, xmm0
    movdqa xmm11, xmm1
    pclmulqdq xmm11, xmm9, 0x00
    pclmulqdq xmm1, xmm9, 0x11
    pxor xmm2, xmm11
    pxor xmm2, xmm1
    movdqa xmm11, xmm2
    pclmulqdq xmm11, xmm9, 0x00
    pclmulqdq xmm2, xmm9, 0x11
    pxor xmm3, xmm11
    pxor xmm3, xmm2
    PCACHE_VHOST_SUM_FINISH
    .cfi_endproc
    .size pcache_vhost_sums_\name, . - pcache_vhost_sums_\name
    .endm
    PCACHE_VHOST_SUM_NARROW narrow_cached, movdqu
    PCACHE_VHOST_SUM_NARROW narrow_nt, movntdq

    .globl pcache_vhost_sums_wide
    .hidden pcache_vhost_sums_wide
pcache_vhost_sums_wide:

    .macro PCACHE_VHOST_SUM_WIDE name, store
    .globl pcache_vhost_sums_\name
    .hidden pcache_vhost_sums_\name
    .type pcache_vhost_sums_\name, @function
    .p2align 5
pcache_vhost_sums_\name:
    .cfi_startproc
    vbroadcasti32x4 zmm8, [rcx]
    vbroadcasti32x4 zmm9, [rcx + 16]
    vmovdqu64 zmm0, [rsi]
    vmovdqu64 zmm1, [rsi + 64]
    vmovdqu64 zmm2, [rsi + 128]
    vmovdqu64 zmm3, [rsi + 192]
    \store [rdi], zmm0
    \store [rdi + 64], zmm1
    \store [rdi + 128], zmm2
    \store [rdi + 192], zmm3
    mov eax, -1
    vmovd xmm10, eax
    vpxorq zmm0, zmm0, zmm10
    jmp 3f
    .p2align 5
2:  vmovdqu64 zmm4, [rsi]
    vmovdqu64 zmm5, [rsi + 64]
    vmovdqu64 zmm6, [rsi + 128]
    vmovdqu64 zmm7, [rsi + 192]
    \store [rdi], zmm4
    \store [rdi + 64], zmm5
    \store [rdi + 128], zmm6
    \store [rdi + 192], zmm7
    vpclmulqdq zmm11, zmm0, zmm8, 0x00
    vpclmulqdq zmm12, zmm1, zmm8, 0x00
    vpclmulqdq zmm13, zmm2, zmm8, 0x00
    vpclmulqdq zmm14, zmm3, zmm8, 0x00
    vpclmulqdq zmm0, zmm0, zmm8, 0x11
    vpclmulqdq zmm1, zmm1, zmm8, 0x11
    vpclmulqdq zmm2, zmm2, zmm8, 0x11
    vpclmulqdq zmm3, zmm3, zmm8, 0x11
    vpternlogq zmm0, zmm11, zmm4, 0x96
    vpternlogq zmm1, zmm12, zmm5, 0x96
    vpternlogq zmm2, zmm13, zmm6, 0x96
    vpternlogq zmm3, zmm14, zmm7, 0x96
3:  add rsi, 256
    add rdi, 256
    sub rdx, 256
    jnz 2b
    # Sixteen lanes to four, 512 bits at a time.
    vpclmulqdq zmm11, zmm0, zmm9, 0x00
    vpclmulqdq zmm0, zmm0, zmm9, 0x11
    vpternlogq zmm1, zmm11, zmm0, 0x96
    vpclmulqdq zmm11, zmm1, zmm9, 0x00
    vpclmulqdq zmm1, zmm1, zmm9, 0x11
    vpternlogq zmm2, zmm11, zmm1, 0x96
    vpclmulqdq zmm11, zmm2, zmm9, 0x00
    vpclmulqdq zmm2, zmm2, zmm9, 0x11
    vpternlogq zmm3, zmm11, zmm2, 0x96
    # The first three lanes to the fourth, by 384, 256 and 128 bits; it has a constant of zero.
    vmovdqu64 zmm4, [rcx + 32]
    vpclmulqdq zmm5, zmm3, zmm4, 0x00
    vpclmulqdq zmm6, zmm3, zmm4, 0x11
    vpxorq zmm5, zmm5, zmm6
    vextracti64x4 ymm6, zmm5, 1
    vextracti32x4 xmm7, zmm3, 3
    vpxor ymm5, ymm5, ymm6
    vextracti128 xmm6, ymm5, 1
    vpxor xmm5, xmm5, xmm6
    vpxor xmm3, xmm5, xmm7
    vzeroupper
    PCACHE_VHOST_SUM_FINISH
    .cfi_endproc
    .size pcache_vhost_sums_\name, . - pcache_vhost_sums_\name
    .endm
    PCACHE_VHOST_SUM_WIDE wide_cached, vmovdqu64
    PCACHE_VHOST_SUM_WIDE wide_nt, vmovntdq

    .globl pcache_vhost_sums_end
    .hidden pcache_vhost_sums_end
pcache_vhost_sums_end:

    .globl pcache_vhost_sums_exit_wide
    .hidden pcache_vhost_sums_exit_wide
    .globl pcache_vhost_sums_exit
    .hidden pcache_vhost_sums_exit
    .cfi_startproc
pcache_vhost_sums_exit_wide:
    vzeroupper
pcache_vhost_sums_exit:
    mov eax, 1
    ret
    .cfi_endproc
    .popsection
"#
);

/// A copy of `len` bytes, a multiple of [`UNIT`] and not zero, which leaves their CRC-32.
type Routine = unsafe extern "C" fn(*mut u8, *const u8, usize, &Constants, &mut u32) -> u32;

#[expect(unsafe_code, reason = "the routines above are assembly")]
unsafe extern "C" {
    #[link_name = "pcache_vhost_sums_begin"]
    static BEGIN: u8;
    #[link_name = "pcache_vhost_sums_wide"]
    static WIDE: u8;
    #[link_name = "pcache_vhost_sums_end"]
    static END: u8;
    #[link_name = "pcache_vhost_sums_exit"]
    static EXIT: u8;
    #[link_name = "pcache_vhost_sums_exit_wide"]
    static EXIT_WIDE: u8;

    #[link_name = "pcache_vhost_sums_narrow_cached"]
    fn narrow_cached(to: *mut u8, from: *const u8, len: usize, by: &Constants, sum: &mut u32) -> u32;
    #[link_name = "pcache_vhost_sums_narrow_nt"]
    fn narrow_nt(to: *mut u8, from: *const u8, len: usize, by: &Constants, sum: &mut u32) -> u32;
    #[link_name = "pcache_vhost_sums_wide_cached"]
    fn wide_cached(to: *mut u8, from: *const u8, len: usize, by: &Constants, sum: &mut u32) -> u32;
    #[link_name = "pcache_vhost_sums_wide_nt"]
    fn wide_nt(to: *mut u8, from: *const u8, len: usize, by: &Constants, sum: &mut u32) -> u32;
}

/// What lanes are multiplied by, as the routines find it: distances of 2048, 512, 384, 256, 128 bits, and
/// nothing; then what the last one is: a distance of 64 bits, what divides, and the bits that are multiplied.
#[repr(C, align(64))]
struct Constants([[u64; 2]; 9]);

static CONSTANTS: Constants = Constants([
    by(2048),
    by(512),
    by(384),
    by(256),
    by(128),
    [0, 0],
    [power(64), 0],
    [DIVISOR, QUOTIENT],
    [u32::MAX as u64, 0],
]);

/// P without its highest power, highest bit first.
const P: u32 = 0x04c1_1db7;

/// P and the quotient of x^64 by it, both of 33 bits, reversed.
const DIVISOR: u64 = reversed((1 << 32) | P as u64);
const QUOTIENT: u64 = reversed(quotient());

/// 33 bits, the lowest for the highest.
const fn reversed(bits: u64) -> u64 {
    bits.reverse_bits() >> 31
}

/// x^64 divided by P.
const fn quotient() -> u64 {
    let (mut rest, mut found, mut power) = (1u128 << 64, 0, 64);
    while power >= 32 {
        if rest >> power & 1 == 1 {
            rest ^= ((1 << 32) | P as u128) << (power - 32);
            found |= 1 << (power - 32);
        }
        power -= 1;
    }
    found
}

/// The two factors that move a lane `bits` ahead: of its low half and of its high one.
const fn by(bits: u32) -> [u64; 2] {
    [power(bits + 32), power(bits - 32)]
}

/// x^n mod P, bits reversed as the lanes' are, and one to the left as products of reversed ones need it.
const fn power(n: u32) -> u64 {
    let (mut remainder, mut i) = (1u32, 0);
    while i < n {
        let carry = remainder >> 31;
        remainder = remainder << 1 ^ if carry == 1 { P } else { 0 };
        i += 1;
    }
    (remainder.reverse_bits() as u64) << 1
}

/// Which registers do it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Width {
    /// Of 16 bytes.
    Narrow,
    /// Of 64 bytes.
    Wide,
}

impl Width {
    /// The widest this processor has, `None` where nothing multiplies without carries.
    pub fn best() -> Option<Self> {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("vpclmulqdq") {
            Some(Width::Wide)
        } else if is_x86_feature_detected!("pclmulqdq") {
            Some(Width::Narrow)
        } else {
            None
        }
    }
}

/// Whether these lengths and places are for the routines: whole aligned lines go around the cache.
pub(super) fn takes(method: StoreMethod, to: *mut u8, len: usize) -> bool {
    let is_whole = len > 0 && len.is_multiple_of(UNIT);
    is_whole && (matches!(method, StoreMethod::Cached) || to.addr().is_multiple_of(64))
}

/// Copies `len` bytes and returns their CRC-32; like the method stores, but for the lines' write-back. Of
/// the methods that go around the cache none is narrower or wider than the sum.
///
/// # Errors
/// [`Fault`]: some of either is not there; what is of `to` may have been written.
///
/// # Safety
/// Either range is private or was mapped, and its addresses stay reserved; nobody refers to `to`;
/// [`takes`] has said so of it, and [`Width::best`] has named the width.
#[expect(unsafe_code, reason = "the contract on the places cannot be checked")]
pub(super) unsafe fn copy(
    width: Width,
    method: StoreMethod,
    to: *mut u8,
    from: *const u8,
    len: usize,
) -> Result<u32, Fault> {
    let is_around = matches!(method, StoreMethod::NonTemporal(..));
    let routine: Routine = match (width, is_around) {
        (Width::Narrow, false) => narrow_cached,
        (Width::Narrow, true) => narrow_nt,
        (Width::Wide, false) => wide_cached,
        (Width::Wide, true) => wide_nt,
    };
    let mut sum = 0;
    // SAFETY: passed on from the caller.
    answer(unsafe { routine(to, from, len, &CONSTANTS, &mut sum) })?;
    Ok(sum)
}

/// Bytes of a store that is measured, stores per sample, and samples of which the fastest counts: what
/// disturbs only adds. Half a millisecond in all.
const PROBE_LEN: usize = 4096;
const PROBE_STORES: usize = 32;
const PROBE_ROUNDS: usize = 7;

/// Whether copying and summing in one pass is faster here than in steps, for blocks stored like that.
///
/// Measured on private memory that is not in the cache, at the source as a guest's seldom is, and at the
/// target as a log never is.
pub(super) fn pays(method: StoreMethod) -> bool {
    let Some(width) = Width::best() else { return false };
    let source = vec![0x5a; PROBE_LEN * PROBE_STORES];
    let mut memory = vec![0xa5; PROBE_LEN * PROBE_STORES + 64];
    let skew = memory.as_ptr().align_offset(64);
    let target = &mut memory[skew..][..PROBE_LEN * PROBE_STORES];
    let mut best = (u64::MAX, u64::MAX);
    for _ in 0..PROBE_ROUNDS {
        best.0 = best.0.min(sample(&source, target, |to, from| in_one_pass(width, method, to, from)));
        best.1 = best.1.min(sample(&source, target, |to, from| in_steps(method, to, from)));
    }
    tracing::debug!(?best, %method, "ns in one pass and in steps");
    best.0 <= best.1
}

#[expect(unsafe_code, reason = "uses the routines on private memory")]
fn in_one_pass(width: Width, method: StoreMethod, to: &mut [u8], from: &[u8]) -> Result<u32, Fault> {
    // SAFETY: both are ours and as long as each other; the target's pieces are aligned like itself.
    unsafe { copy(width, method, to.as_mut_ptr(), from.as_ptr(), to.len()) }
}

#[expect(unsafe_code, reason = "uses the routines on private memory")]
fn in_steps(method: StoreMethod, to: &mut [u8], from: &[u8]) -> Result<u32, Fault> {
    let mut block = [0; PROBE_LEN];
    // SAFETY: all three are ours and as long as each other; only methods this processor has are in use.
    unsafe {
        answer(routines::copy(block.as_mut_ptr(), from.as_ptr(), block.len()))?;
        method.store(to.as_mut_ptr(), &block)?;
    }
    Ok(crc32fast::hash(&block))
}

/// Nanoseconds for fenced stores of all of `source` to `target`, neither of them in the cache.
#[expect(unsafe_code, reason = "uses the routines on private memory")]
fn sample(
    source: &[u8],
    target: &mut [u8],
    mut store: impl FnMut(&mut [u8], &[u8]) -> Result<u32, Fault>,
) -> u64 {
    let (from, to) = (source.as_ptr().cast_mut(), target.as_mut_ptr());
    // SAFETY: both ranges are private and not empty, and writing lines back changes none of them.
    let mut flushed = unsafe { routines::flush_clflush(from, from.wrapping_add(source.len())) };
    // SAFETY: as above.
    flushed |= unsafe { routines::flush_clflush(to, to.wrapping_add(target.len())) };
    complete_stores();
    let mut outcome = answer(flushed);
    let begin = Instant::now();
    for (to, from) in target.chunks_exact_mut(PROBE_LEN).zip(source.chunks_exact(PROBE_LEN)) {
        outcome = outcome.and(store(to, from).map(|sum| _ = black_box(sum)));
        complete_stores();
    }
    // Private memory that faults is a broken machine; its measurement must not win.
    if outcome.is_ok() { begin.elapsed().as_nanos() as u64 } else { u64::MAX }
}

/// Where to go on when the instruction at `at` faulted, if it is one of these.
pub(super) fn exit_of(at: usize) -> Option<usize> {
    let address = |label: *const u8| label.addr();
    let all: Range<usize> = address(&raw const BEGIN)..address(&raw const END);
    if !all.contains(&at) {
        return None;
    }
    let is_wide = at >= address(&raw const WIDE);
    Some(address(if is_wide { &raw const EXIT_WIDE } else { &raw const EXIT }))
}

#[cfg(test)]
mod tests;
