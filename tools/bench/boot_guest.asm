; The boot guest: see boot_guest.py, which holds the assembled bytes.
;   nasm -f bin -o boot_guest.bin boot_guest.asm
; Two sectors for a disk, and behind them what starts them from a ROM in place of the BIOS. Real
; mode, then at once long mode with 4 GiB mapped one to one, then ring 3 with IOPL 3: some nested
; hosts run ring 3 at full speed and interpret ring 0.

BLOCK       equ 0x8000          ; the parameter block, 8 bytes a field
MAGIC       equ BLOCK + 0x00
REQUEST     equ BLOCK + 0x08    ; raised from outside after other fields were changed
SEEN        equ BLOCK + 0x10    ; the request the guest acts upon
MODE        equ BLOCK + 0x18
LOW         equ BLOCK + 0x20
HIGH        equ BLOCK + 0x28
DELAY       equ BLOCK + 0x30    ; `pause` instructions after each touch
POSITION    equ BLOCK + 0x38    ; the next page of mode 1
RANDOM      equ BLOCK + 0x40    ; state of xorshift64
TOUCHES     equ BLOCK + 0x48
WRITES      equ BLOCK + 0x50
PASSES      equ BLOCK + 0x58
BUSY        equ BLOCK + 0x60    ; 1 between the start of a touch and its being counted
LONGEST     equ BLOCK + 0x68    ; cycles between the ends of two touches
BACKWARDS   equ BLOCK + 0x70    ; times the time stamp counter was seen to go back
TIME        equ BLOCK + 0x78    ; the time stamp counter after the last touch
FIELDS      equ 16
HISTOGRAM   equ BLOCK + 0x200   ; 256 counters, by a touch's cycles: see touched
BLOCK_END   equ BLOCK + 0xa00

TABLES      equ 0x1000          ; level 4, level 3, four of level 2
COM1        equ 0x3f8

            org 0x7c00
            bits 16
            cli
            cld
            xor ax, ax
            mov ds, ax
            mov es, ax
            mov ss, ax
            mov sp, 0x7c00
            mov bx, more        ; dl is the drive this sector came from
            mov ax, 0x0201
            mov cx, 2
            xor dh, dh
            int 0x13
            jc $
            cli

; from here with ds, es and ss zero
loaded:     xor eax, eax
            mov di, TABLES
            mov cx, 6 * 1024
            rep stosd
            mov word [TABLES], TABLES + 0x1007
            mov di, TABLES + 0x1000
            mov ax, TABLES + 0x2007
directory:  mov [di], ax
            add di, 8
            add ax, 0x1000
            cmp ax, TABLES + 0x6007
            jne directory
            mov di, TABLES + 0x2000
            mov eax, 0x87       ; present, writable, user, 2 MiB
large:      mov [di], eax
            add di, 8
            add eax, 0x200000
            jnc large           ; till 4 GiB

            mov eax, TABLES
            mov cr3, eax
            mov eax, cr4
            or al, 0x20         ; PAE
            mov cr4, eax
            mov ecx, 0xc0000080
            rdmsr
            or ah, 1            ; EFER.LME
            wrmsr
            lgdt [descriptor]
            mov eax, cr0
            or eax, 0x80000001
            mov cr0, eax
            jmp 0x08:long_mode

            align 8
segments:   dq 0
            dq 0x00af9a000000ffff   ; 08 code, ring 0
            dq 0x00cf92000000ffff   ; 10 data, ring 0
            dq 0x00cff2000000ffff   ; 18 data, ring 3
            dq 0x00affa000000ffff   ; 20 code, ring 3
descriptor: dw $ - segments - 1
            dd segments

            bits 64
; one touch of the page rdi
touch:      mov byte [BUSY], 1
            call cycles
            mov r9, rax
            cmp r8d, 2
            ja look
            je count
            inc byte [rdi]
count:      inc qword [rdi + 8]
            inc qword [WRITES]
            jmp touched
look:       mov rax, [rdi + 8]
touched:    mov byte [BUSY], 0
            inc qword [TOUCHES]
            call cycles
            mov rdx, rax
            sub rdx, r9
            js back
            or rdx, 4           ; four counters an octave: the bit length and two bits more
            bsr rcx, rdx
            lea r10d, [rcx * 4 - 4]
            sub ecx, 2
            shr rdx, cl
            add edx, r10d
            inc qword [HISTOGRAM + rdx * 8]
            mov rdx, rax
            test r12, r12
            jz first
            sub rdx, r12
            js back
            cmp rdx, [LONGEST]
            jbe first
            mov [LONGEST], rdx
            jmp first
back:       inc qword [BACKWARDS]
first:      mov r12, rax
            mov [TIME], rax
            mov rcx, r15
            jrcxz waited
waiting:    pause
            loop waiting
waited:     ret

cycles:     lfence
            rdtsc
            shl rdx, 32
            or rax, rdx
            lfence
            ret

print:      mov dx, COM1
            out dx, al
            ret

            times 510 - ($ - $$) db 0
            dw 0xaa55

more:
long_mode:  mov ax, 0x10
            mov ds, ax
            mov es, ax
            mov ss, ax
            mov esp, 0x7c00
            push 0x1b
            push 0x7c00
            push 0x3002         ; IOPL 3, interrupts off
            push 0x23
            push user
            iretq

user:       mov esi, template
            mov edi, BLOCK
            mov ecx, FIELDS
            rep movsq
            xor eax, eax
            mov ecx, (BLOCK_END - BLOCK) / 8 - FIELDS
            rep stosq
            mov rax, 'FERRYVM1'
            mov [MAGIC], rax
            mov al, 'A'
            call print

; r8 mode, r13 low, r14 pages, r15 delay, rsi page of mode 1, rbx random, r12 end of last touch
obey:       mov rax, [REQUEST]
            mov r8, [MODE]
            mov r13, [LOW]
            mov r14, [HIGH]
            mov r15, [DELAY]
            mov rbx, [RANDOM]
            mov rsi, [POSITION]
            cmp rsi, r13
            jb restart
            cmp rsi, r14
            jb inside
restart:    mov rsi, r13
inside:     sub r14, r13
            jbe lazy
            shr r14, 12
            lea ecx, [r8 - 1]
            cmp ecx, 3
            jb ready
lazy:       xor r8d, r8d
ready:      xor r12d, r12d
            mov [SEEN], rax
again:      mov rax, [REQUEST]
            cmp rax, [SEEN]
            jne obey
            cmp r8d, 1
            je in_order
            ja at_random
            pause
            jmp again

in_order:   mov rdi, rsi
            call touch
            add rsi, 0x1000
            mov rax, r14
            shl rax, 12
            add rax, r13
            cmp rsi, rax
            jb same_pass
            mov rsi, r13
            inc qword [PASSES]
            mov al, 'B'
            call print
same_pass:  mov [POSITION], rsi
            jmp again

at_random:  mov rax, rbx
            shl rax, 13
            xor rbx, rax
            mov rax, rbx
            shr rax, 7
            xor rbx, rax
            mov rax, rbx
            shl rax, 17
            xor rbx, rax
            mov [RANDOM], rbx
            mov rdi, rbx
            shr rdi, 32
            imul rdi, r14
            shr rdi, 32
            shl rdi, 12
            add rdi, r13
            call touch
            jmp again

            times 1024 - FIELDS * 8 - ($ - $$) db 0
template:   dq 0, 0, 0, 1, 0x100000, 0x6400000, 0, 0, 0x9e3779b97f4a7c15
            times 1024 - ($ - $$) db 0

; at f000:0400 in the ROM, with the sectors at f000:0000
            bits 16
            cli
            cld
            mov ax, 0xf000
            mov ds, ax
            xor si, si
            mov es, si
            mov di, 0x7c00
            mov cx, 512
            rep movsw
            xor ax, ax
            mov ds, ax
            mov ss, ax
            mov sp, 0x7c00
            jmp 0:loaded
