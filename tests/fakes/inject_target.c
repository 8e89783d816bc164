/* A program to make system calls in: it does one thing until a byte comes at stdin, and notices
 * whether anything about it was changed meanwhile. Says "ready", then one line of JSON.
 *
 *   inject_target MODE [THREADS]              THREADS more check registers all the while
 *   inject_target confined NUMBER ACTION      a seccomp filter answers call NUMBER with ACTION
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define NAP_MS 400

static volatile sig_atomic_t signals;
static volatile int done;
static int interrupted;

static void on_signal(int number) { (void)number, signals++; }

static void fail(const char *what)
{
    printf("{\"bad\": \"%s\"}\n", what);
    fflush(stdout);
    _exit(1);
}

static int byte_waits(void)
{
    int n = 0;
    return ioctl(0, FIONREAD, &n) == 0 && n > 0;
}

/* ---- registers ---- */

struct state {
    uint64_t general[15]; /* rax rbx rcx rdx rsi rdi rbp r8..r15 */
    uint64_t carry;
    unsigned char vector[16][32];
};

/* Loads everything from `in`, counts in the red zone, stores everything to `out`. */
void turn(const struct state *in, struct state *out, long count);
__asm__(
    ".text\n.globl turn\nturn:\n"
    "push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15; push %rsi\n"
    "mov %rdx, -8(%rsp)\n"
    ".set i, 16\n.rept 15\nmovq %rdi, -i(%rsp)\n.set i, i + 8\n.endr\n"
    "vmovdqu 128(%rdi), %ymm0; vmovdqu 160(%rdi), %ymm1; vmovdqu 192(%rdi), %ymm2\n"
    "vmovdqu 224(%rdi), %ymm3; vmovdqu 256(%rdi), %ymm4; vmovdqu 288(%rdi), %ymm5\n"
    "vmovdqu 320(%rdi), %ymm6; vmovdqu 352(%rdi), %ymm7; vmovdqu 384(%rdi), %ymm8\n"
    "vmovdqu 416(%rdi), %ymm9; vmovdqu 448(%rdi), %ymm10; vmovdqu 480(%rdi), %ymm11\n"
    "vmovdqu 512(%rdi), %ymm12; vmovdqu 544(%rdi), %ymm13; vmovdqu 576(%rdi), %ymm14\n"
    "vmovdqu 608(%rdi), %ymm15\n"
    "mov 0(%rdi), %rax; mov 8(%rdi), %rbx; mov 16(%rdi), %rcx; mov 24(%rdi), %rdx\n"
    "mov 32(%rdi), %rsi; mov 48(%rdi), %rbp; mov 56(%rdi), %r8; mov 64(%rdi), %r9\n"
    "mov 72(%rdi), %r10; mov 80(%rdi), %r11; mov 88(%rdi), %r12; mov 96(%rdi), %r13\n"
    "mov 104(%rdi), %r14; mov 112(%rdi), %r15; mov 40(%rdi), %rdi\n"
    "stc\n"
    "1: decq -8(%rsp); jnz 1b\n" /* leaves the carry as it is */
    "xchg %rdi, (%rsp)\n"
    "mov %rax, 0(%rdi); mov %rbx, 8(%rdi); mov %rcx, 16(%rdi); mov %rdx, 24(%rdi)\n"
    "mov %rsi, 32(%rdi); mov %rbp, 48(%rdi); mov %r8, 56(%rdi); mov %r9, 64(%rdi)\n"
    "mov %r10, 72(%rdi); mov %r11, 80(%rdi); mov %r12, 88(%rdi); mov %r13, 96(%rdi)\n"
    "mov %r14, 104(%rdi); mov %r15, 112(%rdi)\n"
    "mov $0, %eax; setc %al; mov %rax, 120(%rdi)\n"
    /* the red zone: fifteen times the first argument, or the carry becomes 7 */
    "mov -16(%rsp), %rcx\n"
    ".set i, 24\n.rept 14\ncmp %rcx, -i(%rsp); jne 2f\n.set i, i + 8\n.endr\n"
    "jmp 3f\n2: movq $7, 120(%rdi)\n3:\n"
    "vmovdqu %ymm0, 128(%rdi); vmovdqu %ymm1, 160(%rdi); vmovdqu %ymm2, 192(%rdi)\n"
    "vmovdqu %ymm3, 224(%rdi); vmovdqu %ymm4, 256(%rdi); vmovdqu %ymm5, 288(%rdi)\n"
    "vmovdqu %ymm6, 320(%rdi); vmovdqu %ymm7, 352(%rdi); vmovdqu %ymm8, 384(%rdi)\n"
    "vmovdqu %ymm9, 416(%rdi); vmovdqu %ymm10, 448(%rdi); vmovdqu %ymm11, 480(%rdi)\n"
    "vmovdqu %ymm12, 512(%rdi); vmovdqu %ymm13, 544(%rdi); vmovdqu %ymm14, 576(%rdi)\n"
    "vmovdqu %ymm15, 608(%rdi); vzeroupper\n"
    "pop %rcx; mov %rcx, 40(%rdi)\n"
    "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n");

/* Those of AVX-512 that `turn` does not touch; the C library does. */
static void wide_load(const unsigned char *from)
{
    if (__builtin_cpu_supports("avx512bw"))
        __asm__ volatile("vmovdqu64 (%0), %%zmm16; vmovdqu64 64(%0), %%zmm23\n"
                         "vmovdqu64 128(%0), %%zmm31; kmovq (%0), %%k1; kmovq 8(%0), %%k7"
                         : : "r"(from) : "memory");
}

static void wide_store(unsigned char *to)
{
    if (__builtin_cpu_supports("avx512bw"))
        __asm__ volatile("vmovdqu64 %%zmm16, (%0); vmovdqu64 %%zmm23, 64(%0)\n"
                         "vmovdqu64 %%zmm31, 128(%0); kmovq %%k1, 192(%0); kmovq %%k7, 200(%0)"
                         : : "r"(to) : "memory");
}

static void *spin(void *argument)
{
    struct state in, out;
    unsigned char wide[208], wide_now[208];
    uint64_t draw = (uintptr_t)&in;
    int main_thread = argument == NULL;
    unsigned rounding = 0x5fa0; /* not the usual MXCSR: another rounding, flags raised */
    uint16_t control = 0x0f7f, seen;
    for (size_t i = 0; i < sizeof wide; i++)
        wide[i] = (unsigned char)(i < 192 ? i * 37 + 11 : wide[i - 192]);
    __asm__ volatile("ldmxcsr %0; fldcw %1" : : "m"(rounding), "m"(control));
    for (int turns = 0; main_thread ? !byte_waits() : !done; turns++) {
        for (size_t i = 0; i < 15; i++)
            in.general[i] = draw = draw * 6364136223846793005u + 1442695040888963407u;
        for (size_t i = 0; i < 16; i++)
            memset(in.vector[i], (int)(draw >> 33) + (int)i, 32);
        in.carry = 1;
        memset(&out, 0, sizeof out);
        memcpy(wide_now, wide, sizeof wide);
        wide_load(wide);
        turn(&in, &out, 20000);
        wide_store(wide_now);
        if (memcmp(in.general, out.general, sizeof in.general))
            fail("general registers");
        if (out.carry != 1)
            fail(out.carry == 7 ? "red zone" : "flags");
        if (memcmp(in.vector, out.vector, sizeof in.vector))
            fail("vector registers");
        if (memcmp(wide, wide_now, sizeof wide))
            fail("wide vector registers");
    }
    unsigned now;
    __asm__ volatile("stmxcsr %0; fnstcw %1" : "=m"(now), "=m"(seen));
    if (now != rounding || seen != control)
        fail("floating-point control");
    return NULL;
}

/* ---- calls that block ---- */

static int again(long result)
{
    if (result >= 0 || errno != EINTR)
        return 0;
    interrupted++;
    return 1;
}

static void read_byte(void)
{
    char byte;
    ssize_t n;
    while (again(n = read(0, &byte, 1)))
        ;
    if (n != 1)
        fail("read");
}

static int word;

static void *wake(void *argument)
{
    read_byte();
    __atomic_store_n(&word, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &word, FUTEX_WAKE, 1, NULL, NULL, 0);
    return argument;
}

static void futex_forever(void)
{
    pthread_t waker;
    if (pthread_create(&waker, NULL, wake, NULL))
        fail("pthread_create");
    while (!__atomic_load_n(&word, __ATOMIC_SEQ_CST))
        if (again(syscall(SYS_futex, &word, FUTEX_WAIT, 0, NULL, NULL, 0)) == 0 && !word)
            fail("futex woke");
    pthread_join(waker, NULL);
}

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static struct timespec rest_of(double end)
{
    double ms = end - now_ms();
    struct timespec t = {0, ms > 0 ? (long)(ms * 1e6) : 0};
    return t;
}

/* Sleep for NAP_MS, as a program does that goes on when it is interrupted. */
static double nap(const char *how)
{
    double start = now_ms(), end = start + NAP_MS;
    struct timespec t = {0, NAP_MS * 1000000};
    if (!strcmp(how, "nanosleep"))
        while (again(nanosleep(&t, &t)))
            ;
    else if (!strcmp(how, "poll"))
        while (again(poll(NULL, 0, (int)(rest_of(end).tv_nsec / 1000000) + 1)))
            ;
    else if (!strcmp(how, "select"))
        while (t = rest_of(end), again(pselect(0, NULL, NULL, NULL, &t, NULL)))
            ;
    else if (!strcmp(how, "futex-timeout")) {
        while (t = rest_of(end), again(syscall(SYS_futex, &word, FUTEX_WAIT, 0, &t, NULL, 0)))
            ;
        if (errno != ETIMEDOUT)
            fail("futex");
    }
    return now_ms() - start;
}

static void wait_at_epoll(void)
{
    struct epoll_event event = {.events = EPOLLIN};
    int n, queue = epoll_create1(0);
    epoll_ctl(queue, EPOLL_CTL_ADD, 0, &event);
    while (again(n = epoll_wait(queue, &event, 1, -1)))
        ;
    if (n != 1)
        fail("epoll_wait");
}

static void wait_at_ppoll(const sigset_t *mask)
{
    struct pollfd waiting = {0, POLLIN, 0};
    struct timespec limit = {30, 0};
    sigset_t other = *mask;
    int n;
    sigdelset(&other, SIGUSR2);
    while (again(n = ppoll(&waiting, 1, &limit, &other)))
        ;
    if (n != 1)
        fail("ppoll");
}

/* ---- restartable sequences ---- */

/* Never leaves the critical section but through its abort, for which the kernel has to know. */
static void abort_until_byte(void)
{
    struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
aborted:
    if (byte_waits())
        return;
    __asm__ volatile goto(
        ".pushsection __rseq_cs, \"aw\"\n.balign 32\n"
        "3: .long 0, 0\n.quad 1f, 2f - 1f, 4f\n.popsection\n"
        "leaq 3b(%%rip), %%rax; movq %%rax, %0\n"
        "1: jmp 1b\n2:\n"
        ".byte 0x0f, 0xb9, 0x3d\n.long 0x53053053\n4: jmp %l[aborted]\n"
        : : "m"(area->rseq_cs) : "rax", "memory" : aborted);
}

/* ---- confinement ---- */

/* A filter that answers `number` with `action`, and the rest with ALLOW. */
static void confine(int number, unsigned action)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)number, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, action),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {4, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, 2, &program))
        fail("seccomp");
}

/* ---- the whole ---- */

static void say_ready(void)
{
    printf("ready\n");
    fflush(stdout);
}

static void *after_leader(void *argument)
{
    say_ready();
    read_byte();
    printf("{\"late\": true}\n");
    exit(0);
    return argument;
}

static ucontext_t home, away;

/* On a stack with somebody else's data around. */
static void read_elsewhere(void)
{
    static unsigned char stack[65536];
    getcontext(&away);
    away.uc_stack.ss_sp = stack;
    away.uc_stack.ss_size = sizeof stack;
    away.uc_link = &home;
    makecontext(&away, read_byte, 0);
    swapcontext(&home, &away);
}

int main(int argc, char **argv)
{
    static unsigned char other_stack[65536];
    const char *mode = argv[1];
    stack_t mine = {.ss_sp = other_stack, .ss_size = sizeof other_stack}, found;
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    pthread_t threads[8];
    int more = argc == 3 ? atoi(argv[2]) : 0;
    double elapsed = 0;
    sigset_t mask, seen;

    sigaltstack(&mine, NULL);
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGUSR2, &action, NULL);
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR2);
    sigaddset(&mask, SIGRTMIN + 3);
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    for (int i = 0; i < more; i++)
        pthread_create(&threads[i], NULL, spin, &mask);

    if (!strcmp(mode, "confined"))
        confine(atoi(argv[2]), (unsigned)strtoul(argv[3], NULL, 0));
    if (!strcmp(mode, "leaderless")) {
        pthread_create(&threads[0], NULL, after_leader, NULL);
        pthread_exit(NULL);
    }
    say_ready();
    if (!strcmp(mode, "spin"))
        spin(NULL);
    else if (!strcmp(mode, "read") || !strcmp(mode, "confined"))
        read_byte();
    else if (!strcmp(mode, "strict")) {
        char byte;
        prctl(PR_SET_SECCOMP, 1);
        syscall(SYS_read, 0, &byte, 1);
        syscall(SYS_exit, 0);
    } else if (!strcmp(mode, "futex"))
        futex_forever();
    else if (!strcmp(mode, "epoll"))
        wait_at_epoll();
    else if (!strcmp(mode, "ppoll"))
        wait_at_ppoll(&mask);
    else if (!strcmp(mode, "pause"))
        pause(), printf("paused\n"), fflush(stdout), read_byte();
    else if (!strcmp(mode, "rseq"))
        abort_until_byte();
    else if (!strcmp(mode, "coroutine"))
        read_elsewhere();
    else
        elapsed = nap(mode);

    done = 1;
    for (int i = 0; i < more; i++)
        pthread_join(threads[i], NULL);
    pthread_sigmask(SIG_SETMASK, NULL, &seen);
    if (memcmp(&seen, &mask, 8))
        fail("signal mask");
    sigaltstack(NULL, &found);
    if (found.ss_sp != mine.ss_sp || found.ss_size != mine.ss_size || found.ss_flags)
        fail("alternate stack");
    printf("{\"signals\": %d, \"interrupted\": %d, \"elapsed\": %.1f}\n", (int)signals,
           interrupted, elapsed);
    return 0;
}
