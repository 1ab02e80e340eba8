//! The copy routines, in assembly: the only instructions of this program that touch memory which
//! may vanish.
//!
//! They are assembly, not Rust, because the SIGBUS handler (see [`super::guard`]) must be able to
//! abandon them at any instruction. So they keep three things true:
//!
//! 1. **No frame.** They use caller-saved registers only and never move the stack pointer, hence
//!    the return address is on top of the stack at every instruction, and the handler leaves one
//!    by pointing the instruction pointer at its *exit*, which sets the result to 1 and returns.
//! 2. **One range.** They lie between two labels in one section. Those that use wide registers lie
//!    behind a third label and have an exit of their own that clears the upper halves.
//! 3. **Whole words.** [`store`] and the non-temporal ones never store an aligned 8-byte word of the
//!    destination in parts, unless the source covers only a part of it. [`copy`] promises that for
//!    lengths of 1, 2, 4 and 8 only.
//!
//! Each returns 0 when done, 1 when abandoned; some of the destination may then be written.
#![cfg(target_arch = "x86_64")]

use std::arch::global_asm;
use std::ops::Range;

global_asm!(
    r#"
    .pushsection .text.pcache_vhost_guard, "ax", @progbits
    .p2align 6

    .globl pcache_vhost_guard_begin
    .hidden pcache_vhost_guard_begin
pcache_vhost_guard_begin:

    # copy(rdi = to, rsi = from, rdx = length): cached, any alignment.
    # `rep movsb` from 512 bytes: below that its start-up costs more than a loop (benches/copy.rs).
    .globl pcache_vhost_guard_copy
    .hidden pcache_vhost_guard_copy
    .type pcache_vhost_guard_copy, @function
pcache_vhost_guard_copy:
    .cfi_startproc
    cmp rdx, 16
    jb 4f
    cmp rdx, 512
    jae 8f
2:  cmp rdx, 64
    jb 3f
    movdqu xmm0, [rsi]
    movdqu xmm1, [rsi + 16]
    movdqu xmm2, [rsi + 32]
    movdqu xmm3, [rsi + 48]
    movdqu [rdi], xmm0
    movdqu [rdi + 16], xmm1
    movdqu [rdi + 32], xmm2
    movdqu [rdi + 48], xmm3
    add rsi, 64
    add rdi, 64
    sub rdx, 64
    jmp 2b
3:  cmp rdx, 16
    jb 4f
    movdqu xmm0, [rsi]
    movdqu [rdi], xmm0
    add rsi, 16
    add rdi, 16
    sub rdx, 16
    jmp 3b
    # Less than 16 bytes are left, here and for copy_avx2.
.Lpcache_vhost_guard_copy_rest:
4:  test dl, 8
    jz 5f
    mov rax, [rsi]
    mov [rdi], rax
    add rsi, 8
    add rdi, 8
5:  test dl, 4
    jz 6f
    mov eax, [rsi]
    mov [rdi], eax
    add rsi, 4
    add rdi, 4
6:  test dl, 2
    jz 7f
    movzx eax, word ptr [rsi]
    mov [rdi], ax
    add rsi, 2
    add rdi, 2
7:  test dl, 1
    jz 9f
    movzx eax, byte ptr [rsi]
    mov [rdi], al
9:  xor eax, eax
    ret
8:  mov rcx, rdx
    rep movsb
    xor eax, eax
    ret
    .cfi_endproc
    .size pcache_vhost_guard_copy, . - pcache_vhost_guard_copy

    # store(rdi = to, rsi = from, rdx = length): cached, whole words.
    .globl pcache_vhost_guard_store
    .hidden pcache_vhost_guard_store
    .type pcache_vhost_guard_store, @function
    .p2align 4
pcache_vhost_guard_store:
    .cfi_startproc
    cmp rdx, 8
    je 4f
    # Up to the next word in its aligned pieces, as far as the length reaches.
    test dil, 1
    jz 2f
    cmp rdx, 1
    jb 9f
    movzx eax, byte ptr [rsi]
    mov [rdi], al
    inc rsi
    inc rdi
    dec rdx
2:  test dil, 2
    jz 3f
    cmp rdx, 2
    jb 7f
    movzx eax, word ptr [rsi]
    mov [rdi], ax
    add rsi, 2
    add rdi, 2
    sub rdx, 2
3:  test dil, 4
    jz 8f
    cmp rdx, 4
    jb 6f
    mov eax, [rsi]
    mov [rdi], eax
    add rsi, 4
    add rdi, 4
    sub rdx, 4
8:  cmp rdx, 512
    jae 5f
2:  cmp rdx, 16
    jb 3f
    mov rax, [rsi]
    mov rcx, [rsi + 8]
    mov [rdi], rax
    mov [rdi + 8], rcx
    add rsi, 16
    add rdi, 16
    sub rdx, 16
    jmp 2b
3:  test dl, 8
    jz 5f
4:  mov rax, [rsi]
    mov [rdi], rax
    add rsi, 8
    add rdi, 8
    sub rdx, 8
    # `rep movsq` stores words; interrupted, it stops between two of them.
5:  mov rcx, rdx
    shr rcx, 3
    jz 6f
    rep movsq
6:  test dl, 4
    jz 7f
    mov eax, [rsi]
    mov [rdi], eax
    add rsi, 4
    add rdi, 4
7:  test dl, 2
    jz 8f
    movzx eax, word ptr [rsi]
    mov [rdi], ax
    add rsi, 2
    add rdi, 2
8:  test dl, 1
    jz 9f
    movzx eax, byte ptr [rsi]
    mov [rdi], al
9:  xor eax, eax
    ret
    .cfi_endproc
    .size pcache_vhost_guard_store, . - pcache_vhost_guard_store

    # flush(rdi = first line, rsi = end): write every line in between back to memory.
    .macro PCACHE_VHOST_FLUSH instruction
    .globl pcache_vhost_guard_\instruction
    .hidden pcache_vhost_guard_\instruction
    .type pcache_vhost_guard_\instruction, @function
    .p2align 4
pcache_vhost_guard_\instruction:
    .cfi_startproc
2:  \instruction [rdi]
    add rdi, 64
    cmp rdi, rsi
    jb 2b
    xor eax, eax
    ret
    .cfi_endproc
    .size pcache_vhost_guard_\instruction, . - pcache_vhost_guard_\instruction
    .endm
    PCACHE_VHOST_FLUSH clwb
    PCACHE_VHOST_FLUSH clflushopt
    PCACHE_VHOST_FLUSH clflush

    # nt(rdi = to, rsi = from, rdx = length): whole aligned lines, around the cache; length > 0.
    .globl pcache_vhost_guard_nt_sse2
    .hidden pcache_vhost_guard_nt_sse2
    .type pcache_vhost_guard_nt_sse2, @function
    .p2align 4
pcache_vhost_guard_nt_sse2:
    .cfi_startproc
2:  movdqu xmm0, [rsi]
    movdqu xmm1, [rsi + 16]
    movdqu xmm2, [rsi + 32]
    movdqu xmm3, [rsi + 48]
    movntdq [rdi], xmm0
    movntdq [rdi + 16], xmm1
    movntdq [rdi + 32], xmm2
    movntdq [rdi + 48], xmm3
    add rsi, 64
    add rdi, 64
    sub rdx, 64
    jnz 2b
    xor eax, eax
    ret
    .cfi_endproc
    .size pcache_vhost_guard_nt_sse2, . - pcache_vhost_guard_nt_sse2

    .globl pcache_vhost_guard_wide
    .hidden pcache_vhost_guard_wide
pcache_vhost_guard_wide:

    # copy_avx2(rdi = to, rsi = from, rdx = length): as copy.
    .globl pcache_vhost_guard_copy_avx2
    .hidden pcache_vhost_guard_copy_avx2
    .type pcache_vhost_guard_copy_avx2, @function
    .p2align 4
pcache_vhost_guard_copy_avx2:
    .cfi_startproc
2:  cmp rdx, 128
    jb 3f
    vmovdqu ymm0, [rsi]
    vmovdqu ymm1, [rsi + 32]
    vmovdqu ymm2, [rsi + 64]
    vmovdqu ymm3, [rsi + 96]
    vmovdqu [rdi], ymm0
    vmovdqu [rdi + 32], ymm1
    vmovdqu [rdi + 64], ymm2
    vmovdqu [rdi + 96], ymm3
    add rsi, 128
    add rdi, 128
    sub rdx, 128
    jmp 2b
3:  cmp rdx, 32
    jb 4f
    vmovdqu ymm0, [rsi]
    vmovdqu [rdi], ymm0
    add rsi, 32
    add rdi, 32
    sub rdx, 32
    jmp 3b
4:  vzeroupper
    cmp rdx, 16
    jb .Lpcache_vhost_guard_copy_rest
    movdqu xmm0, [rsi]
    movdqu [rdi], xmm0
    add rsi, 16
    add rdi, 16
    sub rdx, 16
    jmp .Lpcache_vhost_guard_copy_rest
    .cfi_endproc
    .size pcache_vhost_guard_copy_avx2, . - pcache_vhost_guard_copy_avx2

    .globl pcache_vhost_guard_nt_avx2
    .hidden pcache_vhost_guard_nt_avx2
    .type pcache_vhost_guard_nt_avx2, @function
    .p2align 4
pcache_vhost_guard_nt_avx2:
    .cfi_startproc
2:  vmovdqu ymm0, [rsi]
    vmovdqu ymm1, [rsi + 32]
    vmovntdq [rdi], ymm0
    vmovntdq [rdi + 32], ymm1
    add rsi, 64
    add rdi, 64
    sub rdx, 64
    jnz 2b
    vzeroupper
    xor eax, eax
    ret
    .cfi_endproc
    .size pcache_vhost_guard_nt_avx2, . - pcache_vhost_guard_nt_avx2

    .globl pcache_vhost_guard_nt_avx512
    .hidden pcache_vhost_guard_nt_avx512
    .type pcache_vhost_guard_nt_avx512, @function
    .p2align 4
pcache_vhost_guard_nt_avx512:
    .cfi_startproc
2:  vmovdqu64 zmm0, [rsi]
    vmovntdq [rdi], zmm0
    add rsi, 64
    add rdi, 64
    sub rdx, 64
    jnz 2b
    vzeroupper
    xor eax, eax
    ret
    .cfi_endproc
    .size pcache_vhost_guard_nt_avx512, . - pcache_vhost_guard_nt_avx512

    .globl pcache_vhost_guard_end
    .hidden pcache_vhost_guard_end
pcache_vhost_guard_end:

    # Where the handler sends a routine that faulted.
    .globl pcache_vhost_guard_exit_wide
    .hidden pcache_vhost_guard_exit_wide
    .globl pcache_vhost_guard_exit
    .hidden pcache_vhost_guard_exit
    .cfi_startproc
pcache_vhost_guard_exit_wide:
    vzeroupper
pcache_vhost_guard_exit:
    mov eax, 1
    ret
    .cfi_endproc
    .popsection
"#
);

#[expect(unsafe_code, reason = "the routines above are assembly")]
unsafe extern "C" {
    #[link_name = "pcache_vhost_guard_begin"]
    static BEGIN: u8;
    #[link_name = "pcache_vhost_guard_wide"]
    static WIDE: u8;
    #[link_name = "pcache_vhost_guard_end"]
    static END: u8;
    #[link_name = "pcache_vhost_guard_exit"]
    static EXIT: u8;
    #[link_name = "pcache_vhost_guard_exit_wide"]
    static EXIT_WIDE: u8;

    /// Copies `len` bytes, cached; 1, 2, 4 and 8 bytes in a single access.
    #[link_name = "pcache_vhost_guard_copy"]
    fn copy_any(to: *mut u8, from: *const u8, len: usize) -> u32;
    /// The same; the processor and the system must know AVX2.
    #[link_name = "pcache_vhost_guard_copy_avx2"]
    fn copy_avx2(to: *mut u8, from: *const u8, len: usize) -> u32;
    /// Copies `len` bytes, cached, whole aligned words of `to` at a time.
    #[link_name = "pcache_vhost_guard_store"]
    pub(super) fn store(to: *mut u8, from: *const u8, len: usize) -> u32;
    /// `clwb` for every line from `first` (a line's start) below `end`; at least one.
    #[link_name = "pcache_vhost_guard_clwb"]
    pub(super) fn flush_clwb(first: *mut u8, end: *mut u8) -> u32;
    /// The same with `clflushopt`.
    #[link_name = "pcache_vhost_guard_clflushopt"]
    pub(super) fn flush_clflushopt(first: *mut u8, end: *mut u8) -> u32;
    /// The same with `clflush`, which every x86-64 processor has.
    #[link_name = "pcache_vhost_guard_clflush"]
    pub(super) fn flush_clflush(first: *mut u8, end: *mut u8) -> u32;
    /// Stores `len > 0` bytes, a multiple of 64, around the cache; `to` starts a line.
    #[link_name = "pcache_vhost_guard_nt_sse2"]
    pub(super) fn nt_sse2(to: *mut u8, from: *const u8, len: usize) -> u32;
    /// The same by 32 bytes; the processor and the system must know AVX2.
    #[link_name = "pcache_vhost_guard_nt_avx2"]
    pub(super) fn nt_avx2(to: *mut u8, from: *const u8, len: usize) -> u32;
    /// The same by 64 bytes; the processor and the system must know AVX-512F.
    #[link_name = "pcache_vhost_guard_nt_avx512"]
    pub(super) fn nt_avx512(to: *mut u8, from: *const u8, len: usize) -> u32;
}

/// Lengths for which a loop of wide registers beats both a narrow one and the start-up of `rep movsb`
/// (benches/copy.rs); from there on they are equal.
const WIDE_LENS: Range<usize> = 64..4096;

/// Copies `len` bytes, cached; 1, 2, 4 and 8 bytes in a single access.
///
/// # Safety
/// One of the two ranges is private, the other was mapped and its addresses stay reserved.
#[inline]
pub(super) unsafe fn copy(to: *mut u8, from: *const u8, len: usize) -> u32 {
    // SAFETY: passed on from the caller; AVX2 is used only where it exists.
    unsafe {
        if WIDE_LENS.contains(&len) && is_x86_feature_detected!("avx2") {
            copy_avx2(to, from, len)
        } else {
            copy_any(to, from, len)
        }
    }
}

/// Where to go on when the instruction at `at` faulted, if it is one of the routines'.
pub(super) fn exit_of(at: usize) -> Option<usize> {
    let address = |label: *const u8| label.addr();
    let all: Range<usize> = address(&raw const BEGIN)..address(&raw const END);
    if !all.contains(&at) {
        return None;
    }
    let wide = at >= address(&raw const WIDE);
    Some(address(if wide { &raw const EXIT_WIDE } else { &raw const EXIT }))
}
