// Ways to hand memory to a TCP socket, and to take it from one, over loopback.
//
//   apt-get install liburing-dev
//   cc -O2 -march=native -o tcp-ways benches/tcp_ways.c -luring -lpthread
//   ./tcp-ways [seconds per row, default 1] [rounds, default 3]
//
// One sender, one receiver, a connection with cubic, chunks of 256 KiB. Memory is
// read and written in turn: `1` MiB stays in a cache near the core, `16` and
// `512` do not. With `crc` both ends read every chunk once more (a CRC32C by
// the SSE 4.2 instruction, three streams): the sender behind the kernel's copy, or
// before it where the kernel makes none; the receiver behind each read.
// Rates are medians of the rounds, in 10^9 bytes a second as they arrive; CPU is that of
// both threads for each 10^9 bytes. `copied` says what the kernel reports of
// MSG_ZEROCOPY and SEND_ZC: 1 if it copied after all.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/errqueue.h>
#include <linux/memfd.h>
#include <netinet/tcp.h>
#include <nmmintrin.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

// Of Linux 6.2, and so not in Debian 12's headers.
#ifndef IORING_SEND_ZC_REPORT_USAGE
#define IORING_SEND_ZC_REPORT_USAGE (1U << 3)
#define IORING_NOTIF_USAGE_ZC_COPIED (1U << 31)
#endif

enum { CHUNK = 256 << 10, HUGE_PAGE = 2 << 20, URING_DEPTH = 4 };
enum way { SEND, SENDFILE, VMSPLICE, ZEROCOPY, URING, URING_ZC, WAYS };
static const char *const names[] = {"send", "sendfile", "vmsplice", "MSG_ZEROCOPY", "io_uring", "io_uring SEND_ZC"};

struct end {
    enum way way;
    bool crc;
    int socket, memory_fd;
    char *memory;
    size_t len;
    double cpu;
    unsigned long bytes;
    int copied;
};

static atomic_bool stop;
static volatile unsigned long sink;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static double now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

// Three streams, so that the instruction's latency of three cycles is hidden. What
// is computed is not a CRC of the whole, but costs what one does.
static void read_for_crc(const char *from, size_t len) {
    const unsigned long *p = (const void *)from;
    size_t third = len / 24;
    unsigned long a = 0, b = 0, c = 0;
    for (size_t i = 0; i < third; i++) {
        a = _mm_crc32_u64(a, p[i]);
        b = _mm_crc32_u64(b, p[third + i]);
        c = _mm_crc32_u64(c, p[2 * third + i]);
    }
    sink = a ^ b ^ c;
}

static void send_all(int socket, const char *from, size_t len) {
    while (len) {
        ssize_t sent = send(socket, from, len, MSG_NOSIGNAL);
        if (sent < 0) return;
        from += sent, len -= sent;
    }
}

static void sendfile_all(int socket, int file, off_t at, size_t len) {
    while (len) {
        ssize_t sent = sendfile(socket, file, &at, len);
        if (sent <= 0) return;
        len -= sent;
    }
}

static void vmsplice_all(int socket, int pipe_fds[2], char *from, size_t len) {
    while (len) {
        struct iovec part = {from, len};
        ssize_t in = vmsplice(pipe_fds[1], &part, 1, 0);
        if (in < 0) return;
        for (ssize_t left = in; left > 0;) {
            ssize_t out = splice(pipe_fds[0], NULL, socket, NULL, left, SPLICE_F_MORE);
            if (out <= 0) return;
            left -= out;
        }
        from += in, len -= in;
    }
}

static int reap_zerocopy(int socket) {
    char space[128];
    struct msghdr message = {.msg_control = space, .msg_controllen = sizeof space};
    int copied = -1;
    while (recvmsg(socket, &message, MSG_ERRQUEUE | MSG_DONTWAIT) >= 0) {
        struct sock_extended_err *e = (void *)CMSG_DATA(CMSG_FIRSTHDR(&message));
        copied = !!(e->ee_code & SO_EE_CODE_ZEROCOPY_COPIED);
        message.msg_controllen = sizeof space;
    }
    return copied;
}

// Keeps URING_DEPTH requests going; each waits for all of its bytes.
static void uring(struct end *end, bool sending) {
    struct io_uring ring;
    if (io_uring_queue_init(8, &ring, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN) < 0) die("io_uring");
    size_t at[URING_DEPTH] = {0}, next = 0;
    int begun = 0;
    unsigned long ended = 0;
    while (!atomic_load(&stop)) {
        while (begun < URING_DEPTH) {
            size_t slot = (ended + begun) % URING_DEPTH;
            struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);
            at[slot] = next;
            if (!sending) io_uring_prep_recv(sqe, end->socket, end->memory + next, CHUNK, MSG_WAITALL);
            else if (end->way == URING_ZC) io_uring_prep_send_zc(sqe, end->socket, end->memory + next, CHUNK, MSG_WAITALL | MSG_NOSIGNAL, IORING_SEND_ZC_REPORT_USAGE);
            else io_uring_prep_send(sqe, end->socket, end->memory + next, CHUNK, MSG_WAITALL | MSG_NOSIGNAL);
            // A link keeps the order of the stream.
            if (begun + 1 < URING_DEPTH) sqe->flags |= IOSQE_IO_LINK;
            next = (next + CHUNK) % end->len;
            begun++;
        }
        struct io_uring_cqe *cqe;
        if (io_uring_submit_and_wait(&ring, begun) < 0) break;
        while (begun && io_uring_peek_cqe(&ring, &cqe) == 0) {
            int result = cqe->res;
            unsigned flags = cqe->flags;
            io_uring_cqe_seen(&ring, cqe);
            if (flags & IORING_CQE_F_NOTIF) {
                end->copied = !!((unsigned)result & IORING_NOTIF_USAGE_ZC_COPIED);
                continue;
            }
            if (result <= 0) goto over;
            end->bytes += result;
            if (end->crc) read_for_crc(end->memory + at[ended % URING_DEPTH], CHUNK);
            ended++, begun--;
        }
    }
over:
    // The ring cancels what is left when it goes; shutting down ends it at once.
    shutdown(end->socket, SHUT_RDWR);
    io_uring_queue_exit(&ring);
}

static void *sender(void *argument) {
    struct end *end = argument;
    int pipe_fds[2];
    if (pipe(pipe_fds) < 0) die("pipe");
    fcntl(pipe_fds[1], F_SETPIPE_SZ, CHUNK);
    if (end->way >= URING) uring(end, true);
    for (size_t at = 0; !atomic_load(&stop); at = (at + CHUNK) % end->len) {
        char *from = end->memory + at;
        bool first = end->way == SENDFILE || end->way == VMSPLICE;
        if (end->crc && first) read_for_crc(from, CHUNK);
        switch (end->way) {
        case SENDFILE: sendfile_all(end->socket, end->memory_fd, at, CHUNK); break;
        case VMSPLICE: vmsplice_all(end->socket, pipe_fds, from, CHUNK); break;
        case ZEROCOPY: {
            for (size_t done = 0; done < CHUNK && !atomic_load(&stop);) {
                ssize_t sent = send(end->socket, from + done, CHUNK - done, MSG_NOSIGNAL | MSG_ZEROCOPY);
                if (sent < 0 && errno != ENOBUFS) break;
                done += sent > 0 ? sent : 0;
                int copied = reap_zerocopy(end->socket);
                if (copied >= 0) end->copied = copied;
            }
            break;
        }
        default: send_all(end->socket, from, CHUNK);
        }
        if (end->crc && !first) read_for_crc(from, CHUNK);
    }
    shutdown(end->socket, SHUT_RDWR);
    close(pipe_fds[0]), close(pipe_fds[1]);
    end->cpu = now(CLOCK_THREAD_CPUTIME_ID);
    return NULL;
}

static void *receiver(void *argument) {
    struct end *end = argument;
    if (end->way >= URING) uring(end, false);
    for (size_t at = 0; end->way < URING;) {
        size_t room = CHUNK - at % CHUNK;
        ssize_t got = recv(end->socket, end->memory + at, room, 0);
        if (got <= 0) break;
        if (end->crc) read_for_crc(end->memory + at, got);
        end->bytes += got;
        at = (at + got) % end->len;
    }
    end->cpu = now(CLOCK_THREAD_CPUTIME_ID);
    return NULL;
}

static void give_memory(struct end *end, bool huge) {
    int file = memfd_create("tcp-ways", huge ? MFD_HUGETLB | MFD_HUGE_2MB : 0);
    size_t len = (end->len + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    if (file < 0 || ftruncate(file, len) < 0) die("memfd");
    end->memory = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, 0);
    if (end->memory == MAP_FAILED) die("mmap (vmsplice needs 1 GiB of free 2 MiB pages)");
    memset(end->memory, 'g', len);
    end->memory_fd = file;
}

static void connect_both(struct end *from, struct end *to) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    if (setsockopt(listener, IPPROTO_TCP, TCP_CONGESTION, "cubic", 5) < 0) die("cubic");
    if (bind(listener, (void *)&address, len) < 0 || listen(listener, 1) < 0) die("listen");
    getsockname(listener, (void *)&address, &len);
    from->socket = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(from->socket, IPPROTO_TCP, TCP_CONGESTION, "cubic", 5);
    setsockopt(from->socket, SOL_SOCKET, SO_ZEROCOPY, &one, sizeof one);
    if (connect(from->socket, (void *)&address, len) < 0) die("connect");
    to->socket = accept(listener, NULL, NULL);
    close(listener);
}

static void row(struct end *from, struct end *to, double seconds, double *rate, double *cpu) {
    pthread_t threads[2];
    connect_both(from, to);
    atomic_store(&stop, false);
    to->bytes = 0;
    from->copied = -1;
    double began = now(CLOCK_MONOTONIC);
    pthread_create(&threads[0], NULL, receiver, to);
    pthread_create(&threads[1], NULL, sender, from);
    usleep(seconds * 1e6);
    double took = now(CLOCK_MONOTONIC) - began;
    unsigned long bytes = to->bytes;
    atomic_store(&stop, true);
    shutdown(to->socket, SHUT_RDWR);
    pthread_join(threads[0], NULL), pthread_join(threads[1], NULL);
    close(from->socket), close(to->socket);
    *rate = bytes / took / 1e9;
    *cpu = (from->cpu + to->cpu) / (bytes / 1e9);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int count, char **words) {
    signal(SIGPIPE, SIG_IGN);
    double seconds = count > 1 ? atof(words[1]) : 1;
    int rounds = count > 2 ? atoi(words[2]) : 3;
    if (seconds <= 0 || rounds < 1 || rounds > 99) return fprintf(stderr, "tcp-ways [SECONDS] [ROUNDS]\n"), 2;
    printf("| %-16s | crc | MiB | GB/s | CPU s/GB | copied |\n|---|---|---|---|---|---|\n", "way");
    for (int mib = 1; mib <= 512; mib = mib == 1 ? 16 : mib * 32)
        for (int crc = 0; crc < 2; crc++)
            for (int way = 0; way < WAYS; way++) {
                double rates[99], cpus[99];
                struct end from = {.way = way, .crc = crc, .len = (size_t)mib << 20}, to = from;
                give_memory(&from, way == VMSPLICE), give_memory(&to, false);
                for (int i = 0; i < rounds; i++) row(&from, &to, seconds, &rates[i], &cpus[i]);
                qsort(rates, rounds, sizeof *rates, by_value), qsort(cpus, rounds, sizeof *cpus, by_value);
                printf("| %-16s | %d | %d | %.2f | %.3f | %s |\n", names[way], crc, mib, rates[rounds / 2], cpus[rounds / 2],
                       from.copied < 0 ? "" : from.copied ? "1" : "0");
                fflush(stdout);
                munmap(from.memory, from.len), munmap(to.memory, to.len);
                close(from.memory_fd), close(to.memory_fd);
            }
    return 0;
}
