/* The way into the bare guest: a PVH entry, 32-bit, unpaged, with a stack.
 *
 * Cloud Hypervisor loads only ELF64 images and QEMU takes either, so the image is ELF64 while its code
 * is 32-bit. Both read the note below, jump to `entry` in flat protected mode, interrupts off, and put
 * the address of the PVH start info into EBX.
 */
        .section .note.pvh, "a", @note
        .balign 4
        .long   4                       /* size of the name */
        .long   8                       /* size of the description: both loaders read 8 bytes */
        .long   18                      /* XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz  "Xen"
        .quad   entry

        .section .note.GNU-stack, "", @progbits

        .text
        .code32
        .globl  entry
entry:
        cld
        movl    $stack_end, %esp
        xorl    %ebp, %ebp
        pushl   %ebx
        call    guest_main
        /* Power off: Cloud Hypervisor's shutdown port, then the PM1a control register of q35. */
        movw    $0x600, %dx
        movb    $0x34, %al
        outb    %al, %dx
        movw    $0x604, %dx
        movw    $0x2000, %ax
        outw    %ax, %dx
1:      hlt
        jmp     1b

        .bss
        .balign 16
        .skip   16384
stack_end:
