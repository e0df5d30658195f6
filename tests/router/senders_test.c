/* senders_test.c: batches over socket pairs: what is sent, what is not, in which order. */
#include "router/senders.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "common/base/clock.h"
#include "common/base/own.h"
#include "tests/check.h"

enum { N_PAIRS = 200, N_STEPS = 100, N_MESSAGE = 300 };

static int pairs[N_PAIRS][2]; /* ours, theirs */
static char message[N_MESSAGE];

static void pairs_open(void)
{
    for (int i = 0; i < N_PAIRS; i++)
        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pairs[i]) == 0);
    memset(message, 'm', sizeof(message));
}

static void pairs_close(void)
{
    for (int i = 0; i < N_PAIRS; i++) {
        close(pairs[i][0]);
        if (pairs[i][1] >= 0)
            close(pairs[i][1]);
    }
}

/* All of first .. last - 1 in one batch, each with bytes of its own. */
static void post(struct senders *s, int first, int last, const char *data, size_t n)
{
    struct send_batch *b = senders_next(s);
    CHECK(b && b->n == 0);
    for (int i = first; i < last; i++)
        b->jobs[b->n++] =
            (struct send_job){.fd = pairs[i][0], .data = (char *)data, .n = n, .user = &pairs[i]};
    senders_post(s);
}

static void all_is_sent_in_order(void)
{
    static char lines[N_PAIRS / 10 + 1][32], rx[N_STEPS * 32];
    for (uint32_t n_helpers = 1; n_helpers <= 3; n_helpers++) {
        struct senders *s = NULL;
        pairs_open();
        CHECK_OK(senders_create(n_helpers, &s));
        CHECK(senders_collect(s, true) == NULL);
        for (int step = 0; step < N_STEPS; step++) {
            int n_back = 0;
            uint64_t began = clock_now_us(), last = began;
            for (int i = 0; i <= N_PAIRS; i += 10) {
                const struct send_batch *b;
                if (i < N_PAIRS) {
                    size_t n = (size_t)sprintf(lines[i / 10], "%d of step %d\n", i, step);
                    post(s, i, i + 10, lines[i / 10], n);
                    CHECK(senders_out(s));
                }
                while ((b = senders_collect(s, i == N_PAIRS))) {
                    CHECK_INT(b->n, 10);
                    CHECK(b->sent_us >= began && b->sent_us <= clock_now_us());
                    last = MAX(last, b->sent_us);
                    for (uint32_t k = 0; k < b->n; k++) {
                        CHECK(b->jobs[k].user == &pairs[n_back]);
                        CHECK(b->jobs[k].n_sent == (ssize_t)strlen(lines[n_back / 10]));
                        n_back++;
                    }
                }
            }
            CHECK_INT(n_back, N_PAIRS);
            CHECK(!senders_out(s));
        }
        for (int i = 0; i < N_PAIRS; i++) {
            ssize_t n = recv(pairs[i][1], rx, sizeof(rx) - 1, MSG_DONTWAIT), at = 0;
            rx[MAX(n, 0)] = '\0';
            for (int step = 0; step < N_STEPS; step++) {
                char want[32];
                int n_want = sprintf(want, "%d of step %d\n", i / 10 * 10, step);
                CHECK(!strncmp(rx + at, want, (size_t)n_want));
                at += n_want;
            }
            CHECK_INT(n, at);
        }
        senders_destroy(s);
        pairs_close();
    }
}

/* Of every ten readers one is gone, and one does not read. */
static void each_socket_has_its_own_result(void)
{
    struct senders *s = NULL;
    const struct send_batch *b;
    int n_full = 0, n_gone = 0, small = 4096;
    size_t n_sent[N_PAIRS] = {0};
    pairs_open();
    CHECK_OK(senders_create(2, &s));
    for (int i = 0; i < N_PAIRS; i += 10) {
        setsockopt(pairs[i][0], SOL_SOCKET, SO_SNDBUF, &small, sizeof(small));
        close(pairs[i + 1][1]);
        pairs[i + 1][1] = -1;
    }
    for (int step = 0; step < N_STEPS; step++) {
        for (int i = 0; i < N_PAIRS; i += 10)
            post(s, i, i + 10, message, sizeof(message));
        for (int back = 0; (b = senders_collect(s, true)); back += 10)
            for (uint32_t k = 0; k < b->n; k++) {
                const struct send_job *j = &b->jobs[k];
                n_sent[back + (int)k] += (size_t)MAX(j->n_sent, 0);
                if (k == 1)
                    n_gone += j->n_sent == -1 && j->error == EPIPE;
                else if (k == 0)
                    n_full += j->n_sent == -1 && j->error == EAGAIN;
                else
                    CHECK_INT(j->n_sent, N_MESSAGE);
            }
        char rx[2 * N_MESSAGE];
        for (int i = 0; i < N_PAIRS; i++)
            if (i % 10 > 1)
                CHECK_INT(recv(pairs[i][1], rx, sizeof(rx), MSG_DONTWAIT), N_MESSAGE);
    }
    CHECK_INT(n_gone, N_STEPS * N_PAIRS / 10);
    CHECK(n_full > N_STEPS);
    for (int i = 0; i < N_PAIRS; i += 10) { /* what is said to be sent is there */
        char rx[N_MESSAGE];
        size_t n_read = 0;
        for (ssize_t n; (n = recv(pairs[i][1], rx, sizeof(rx), MSG_DONTWAIT)) > 0;)
            n_read += (size_t)n;
        CHECK_INT(n_read, n_sent[i]);
    }
    senders_destroy(s);
    pairs_close();
}

static void the_ring_is_finite(void)
{
    struct senders *s = NULL;
    const struct send_batch *b;
    int n_posted = 0, n_back = 0;
    pairs_open();
    CHECK_OK(senders_create(1, &s));
    while (senders_next(s)) {
        post(s, n_posted, n_posted + 1, message, 1);
        n_posted++;
    }
    CHECK(n_posted > 10 && n_posted < N_PAIRS);
    b = senders_collect(s, true);
    CHECK(b && b->jobs[0].user == &pairs[n_back++]);
    post(s, n_posted, n_posted + 1, message, 1);
    CHECK(senders_next(s) == NULL);
    while ((b = senders_collect(s, true)))
        CHECK(b->jobs[0].user == &pairs[n_back++]);
    CHECK_INT(n_back, n_posted + 1);
    senders_destroy(s);
    pairs_close();
}

static uint64_t cpu_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

static void idle_threads_sleep(void)
{
    struct senders *s = NULL;
    pairs_open();
    CHECK_OK(senders_create(3, &s));
    for (int i = 0; i + 1 < N_PAIRS; i++) {
        post(s, i, i + 1, message, 1);
        if (i % 10 == 0)
            while (senders_collect(s, true))
                ;
    }
    while (senders_collect(s, true))
        ;
    uint64_t before = cpu_us();
    nanosleep(&(struct timespec){.tv_nsec = 200000000}, NULL); /* the time that is measured */
    CHECK(cpu_us() - before < 20000);
    senders_destroy(s);
    pairs_close();
}

int main(void)
{
    RUN(all_is_sent_in_order);
    RUN(each_socket_has_its_own_result);
    RUN(the_ring_is_finite);
    RUN(idle_threads_sleep);
    return check_done();
}
