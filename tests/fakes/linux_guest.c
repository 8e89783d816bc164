/* The first and only program of the Linux guest: see linux_guest.py.
 *
 * It takes writer_mib, rate and address from its environment, which is the kernel's command line.
 * One process prints ticks, one writes and verifies memory, one answers on TCP port 7.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WORDS 512
#define MILLISECOND 1000000L
#define REPORTS 20

struct shared {
    volatile uint64_t touches, tick;
};

static struct shared *shared;

/* one write a line, so that lines do not mix */
static void say(const char *format, ...)
{
    char line[256];
    va_list arguments;
    __builtin_va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    __builtin_va_end(arguments);
    if (write(1, line, length) != length)
        _exit(1);
}

static int64_t now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void rest(int64_t nanoseconds)
{
    struct timespec t = {nanoseconds / 1000000000L, nanoseconds % 1000000000L};
    nanosleep(&t, NULL);
}

static long number(const char *name)
{
    const char *value = getenv(name);
    return value ? atol(value) : 0;
}

/* --- memory */

/* splitmix64 */
static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

/* word 0 is the page's sequence number, word 1 its hash with the page's number, and the others
 * follow from that */
static void write_page(uint64_t *page, uint64_t index, uint64_t sequence)
{
    uint64_t word = mix(index << 32 ^ sequence);
    page[0] = sequence;
    for (int i = 1; i < WORDS; i++) {
        page[i] = word;
        word = word * 6364136223846793005 + 1442695040888963407;
    }
}

static void verify_page(const uint64_t *page, uint64_t index, uint64_t sequence)
{
    static int reports;
    uint64_t word = mix(index << 32 ^ sequence);
    int i = 0;
    if (page[0] == sequence)
        for (i = 1; i < WORDS && page[i] == word; i++)
            word = word * 6364136223846793005 + 1442695040888963407;
    if (i < WORDS && reports++ < REPORTS)
        say("BAD page %lu at %p: word %d, has sequence %lu, expected %lu\n", index, (void *)page, i,
            page[0], sequence);
}

/* Verify and rewrite a page at random, verify the next one in order, for ever. */
static void write_memory(uint64_t bytes, long rate)
{
    uint64_t pages = bytes / (WORDS * 8), draw = 1, cursor = 0, due = 0;
    uint64_t *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t *sequences = calloc(pages, sizeof *sequences);
    if (memory == MAP_FAILED || !sequences) {
        say("BAD writer: no memory\n");
        _exit(1);
    }
    for (uint64_t i = 0; i < pages; i++)
        write_page(memory + i * WORDS, i, 0);
    say("writer ready %lu pages\n", pages);
    int64_t began = now(CLOCK_MONOTONIC);
    for (;;) {
        if (rate) {
            while (due <= shared->touches) {
                rest(10 * MILLISECOND);
                /* what was missed while the guest was stopped is not caught up with */
                int64_t passed = now(CLOCK_MONOTONIC) - began;
                if (passed > 100 * MILLISECOND)
                    passed = 100 * MILLISECOND;
                began = now(CLOCK_MONOTONIC);
                due = shared->touches + (rate * passed + 999999999) / 1000000000;
            }
        }
        draw = mix(draw);
        uint64_t index = draw % pages;
        verify_page(memory + index * WORDS, index, sequences[index]);
        write_page(memory + index * WORDS, index, ++sequences[index]);
        verify_page(memory + cursor * WORDS, cursor, sequences[cursor]);
        cursor = (cursor + 1) % pages;
        shared->touches++;
    }
}

/* --- devices and network */

static void load_modules(void)
{
    char name[128];
    FILE *list = fopen("/modules/order", "r");
    while (list && fscanf(list, "%127s", name) == 1) {
        int fd = open(name, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
            say("module %s: %s\n", name, strerror(errno));
        close(fd);
    }
    if (list)
        fclose(list);
}

static int configure(int s, const char *name, const char *address)
{
    struct ifreq request = {0};
    struct sockaddr_in *to = (struct sockaddr_in *)&request.ifr_addr;
    strcpy(request.ifr_name, name);
    to->sin_family = AF_INET;
    to->sin_addr.s_addr = inet_addr(address);
    if (ioctl(s, SIOCSIFADDR, &request))
        return -1;
    to->sin_addr.s_addr = inet_addr("255.255.255.0");
    if (ioctl(s, SIOCSIFNETMASK, &request) || ioctl(s, SIOCGIFFLAGS, &request))
        return -1;
    request.ifr_flags |= IFF_UP;
    return ioctl(s, SIOCSIFFLAGS, &request);
}

/* One line for each connection: the number of the last tick. */
static void serve(void)
{
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(7)};
    int on = 1, s = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(s, (struct sockaddr *)&any, sizeof any) || listen(s, 8)) {
        say("net cannot listen: %s\n", strerror(errno));
        _exit(1);
    }
    for (;;) {
        int c = accept(s, NULL, NULL);
        if (c >= 0) {
            dprintf(c, "tick %lu\n", shared->tick);
            close(c);
        }
    }
}

static void start_network(void)
{
    const char *address = getenv("address");
    int s = socket(AF_INET, SOCK_DGRAM, 0);
    configure(s, "lo", "127.0.0.1");
    if (address && if_nametoindex("eth0") && !configure(s, "eth0", address)) {
        say("net eth0 %s\n", address);
        if (!fork())
            serve();
    } else {
        say("net none\n");
    }
    close(s);
}

static void say_clock(void)
{
    char text[64] = "unknown\n";
    int fd = open("/sys/devices/system/clocksource/clocksource0/current_clocksource", O_RDONLY);
    ssize_t length = read(fd, text, sizeof text - 1);
    if (length > 0)
        text[length] = 0;
    say("clocksource %s", text);
    close(fd);
}

int main(void)
{
    mount("none", "/dev", "devtmpfs", 0, "");
    mount("none", "/proc", "proc", 0, "");
    mount("none", "/sys", "sysfs", 0, "");
    say("init\n");
    load_modules();
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    start_network();
    say_clock();
    pid_t writer = 0;
    if (number("writer_mib") && !(writer = fork()))
        write_memory((uint64_t)number("writer_mib") << 20, number("rate"));
    for (;; shared->tick++) {
        say("tick %lu %ld %ld %lu\n", shared->tick, now(CLOCK_MONOTONIC), now(CLOCK_REALTIME),
            shared->touches);
        if (writer > 0 && waitpid(writer, NULL, WNOHANG) == writer)
            say("BAD writer: it died\n");
        rest(100 * MILLISECOND);
    }
}
