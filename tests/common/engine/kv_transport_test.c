/* kv_transport_test.c: pages move whole and in order or the transfer fails, on all kinds of a
 * CPU, within a process and between two, whoever dies, aborts or lies. */
#include "common/engine/kv_transport.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "check.h"
#include "common/base/clock.h"
#include "common/base/failpoint.h"
#include "common/base/hash.h"
#include "common/base/log.h"
#include "kv_aside.h"
#include "kv_record.h"

static enum wire_transport kind;
static bool is_aside; // kv_aside.h took the place of tcp

static uint64_t rng_state;
static uint32_t rng(uint32_t n)
{
    rng_state += 0x9e3779b97f4a7c15u;
    return (uint32_t)(hash_mix(rng_state) % n);
}

/* ---- two pools and a pair ---- */

struct geometry {
    uint32_t n_pages, n_layers, kv_width;
};
static const struct geometry small = {64, 2, 36}; // 18 KiB per page
static const struct geometry big = {32, 8, 576};  // 1.1 MiB per page

static struct kv_pool *pool_of(const struct geometry *g, const char *shm_name)
{
    struct kv_pool_config c = {
        .n_pages = g->n_pages,
        .n_layers = g->n_layers,
        .kv_width = g->kv_width,
        .dtype_bytes = 4,
        .shm_name = shm_name,
    };
    struct kv_pool *p = NULL;
    CHECK_OK(kv_pool_create(&c, &p));
    REQUIRE(p != NULL);
    return p;
}

static const char *source_name(void)
{
    static char name[64];
    snprintf(name, sizeof(name), "/baton-test-kv-%d", (int)getpid());
    return name;
}

struct rig {
    struct kv_pool *from, *to;
    struct record sent, received;
    struct kv_pair *sender, *receiver;
    char address[WIRE_MAX_ADDRESS];
};

static struct kv_pair_config config_of(struct kv_pool *pool, struct record *r)
{
    return (struct kv_pair_config){
        .pool = pool, .token = {0x1234, 0x5678}, .done = on_done, .user = r};
}

static void rig_listen(struct rig *t, const struct geometry *g)
{
    memset(t, 0, sizeof(*t));
    record_init(&t->sent);
    record_init(&t->received);
    t->from = pool_of(g, source_name());
    t->to = pool_of(g, NULL);
    struct kv_pair_config c = config_of(t->to, &t->received);
    CHECK_OK(kv_pair_listen(kind, &c, "127.0.0.1", source_name(), t->address, &t->receiver));
    REQUIRE(t->receiver != NULL);
}

static void rig_connect(struct rig *t)
{
    struct kv_pair_config c = config_of(t->from, &t->sent);
    CHECK_OK(kv_pair_connect(kind, &c, t->address, &t->sender));
    REQUIRE(t->sender != NULL);
}

static void rig_open(struct rig *t, const struct geometry *g)
{
    rig_listen(t, g);
    rig_connect(t);
}

static void rig_close(struct rig *t)
{
    kv_pair_destroy(take(&t->sender));
    kv_pair_destroy(take(&t->receiver));
    CHECK(!t->sent.out_of_order);
    CHECK(!t->received.out_of_order);
    kv_pool_destroy(take(&t->from));
    kv_pool_destroy(take(&t->to));
}

/* Content of the i-th page of transfer seq. */
static void page_fill(struct kv_pool *p, uint32_t page, uint64_t seq, uint32_t i)
{
    uint64_t *w = kv_pool_page(p, page), x = hash_mix(seq * 1000 + i + 1);
    for (size_t j = 0; j < kv_pool_page_bytes(p) / 8; j++)
        w[j] = x += 0x9e3779b97f4a7c15u;
}

static bool page_is(struct kv_pool *p, uint32_t page, uint64_t seq, uint32_t i)
{
    const uint64_t *w = kv_pool_page(p, page);
    uint64_t x = hash_mix(seq * 1000 + i + 1);
    for (size_t j = 0; j < kv_pool_page_bytes(p) / 8; j++)
        if (w[j] != (x += 0x9e3779b97f4a7c15u))
            return false;
    return true;
}

/* ---- many transfers ---- */

#define MAX_PAGES 8

struct move {
    uint32_t n, pages[MAX_PAGES];
    uint64_t checksum;
};

/* One end of a long random run: pages come from the pool and go back when done. */
struct end {
    struct kv_pool *pool;
    struct kv_pair *pair;
    struct record *record;
    uint64_t n_posted, n_seen;
    struct move moves[MAX_DONE];
};

static void end_post(struct end *e, uint32_t n)
{
    struct move *m = &e->moves[e->n_posted];
    m->n = n;
    REQUIRE(kv_pool_alloc(e->pool, n, m->pages) == ERR_OK);
    for (uint32_t i = n; i > 1; i--) { // no order that a bug could hide behind
        uint32_t j = rng(i), swap = m->pages[j];
        m->pages[j] = m->pages[i - 1];
        m->pages[i - 1] = swap;
    }
    for (uint32_t i = 0; i < n; i++)
        kv_pool_transfer_begin(e->pool, m->pages[i]);
}

static void end_send(struct end *e, uint32_t n)
{
    end_post(e, n);
    struct move *m = &e->moves[e->n_posted];
    for (uint32_t i = 0; i < n; i++) {
        page_fill(e->pool, m->pages[i], e->n_posted, i);
        CHECK_OK(kv_pool_checksum(e->pool, &m->pages[i], 1, i, &m->checksum));
    }
    CHECK_OK(kv_pair_post(e->pair, e->n_posted, m->pages, n));
    e->n_posted++;
}

static void end_expect(struct end *e, uint32_t n)
{
    end_post(e, n);
    CHECK_OK(kv_pair_post(e->pair, e->n_posted, e->moves[e->n_posted].pages, n));
    e->n_posted++;
}

/* Deals with what has ended since; the receiver's pages are looked at. */
static void end_collect(struct end *e, const struct end *sender)
{
    for (uint64_t n = record_count(e->record); e->n_seen < n; e->n_seen++) {
        struct move *m = &e->moves[e->n_seen];
        CHECK_INT(record_wait(e->record, e->n_seen + 1), ERR_OK);
        uint64_t sum = 0;
        bool equal = true;
        for (uint32_t i = 0; i < m->n; i++) {
            kv_pool_transfer_end(e->pool, m->pages[i]);
            if (e != sender) {
                equal &= page_is(e->pool, m->pages[i], e->n_seen, i);
                CHECK_OK(kv_pool_checksum(e->pool, &m->pages[i], 1, i, &sum));
            }
            kv_pool_unref(e->pool, m->pages[i]);
        }
        CHECK(equal);
        if (sender && e != sender)
            CHECK(sum == sender->moves[e->n_seen].checksum);
    }
}

static uint32_t pages_of(uint64_t seq) { return 1 + (uint32_t)(hash_mix(seq + 99) % MAX_PAGES); }

static void random_transfers_arrive_whole(void)
{
    uint32_t N = is_aside ? 300 : 2000; // a connection each
    struct rig *t = malloc(sizeof(*t));
    rig_open(t, &small);
    struct end *s = calloc(1, sizeof(*s)), *r = calloc(1, sizeof(*r));
    s->pool = t->from, s->pair = t->sender, s->record = &t->sent;
    r->pool = t->to, r->pair = t->receiver, r->record = &t->received;
    while ((s->n_seen < N || r->n_seen < N) && !check_failures) {
        uint32_t burst = rng(6);
        while (burst-- && s->n_posted < N && kv_pool_counts(s->pool).free >= pages_of(s->n_posted))
            end_send(s, pages_of(s->n_posted));
        burst = rng(6);
        while (burst-- && r->n_posted < s->n_posted &&
               kv_pool_counts(r->pool).free >= pages_of(r->n_posted))
            end_expect(r, pages_of(r->n_posted));
        if (!rng(3) && r->n_posted > r->n_seen) // sometimes let everything settle
            record_wait(r->record, r->n_posted);
        end_collect(r, s);
        end_collect(s, s);
    }
    CHECK_INT(kv_pool_counts(t->from).free, small.n_pages);
    CHECK_INT(kv_pool_counts(t->to).free, small.n_pages);
    kv_pool_check(t->from);
    kv_pool_check(t->to);
    free(s);
    free(r);
    rig_close(t);
    free(t);
}

/* ---- two processes ---- */

static void bytes_write(int fd, const void *bytes, size_t n)
{
    REQUIRE(write(fd, bytes, n) == (ssize_t)n);
}

static void bytes_read(int fd, void *ret, size_t n)
{
    for (uint8_t *at = ret; n > 0;) {
        ssize_t got = read(fd, at, n);
        REQUIRE(got > 0);
        at += got;
        n -= (size_t)got;
    }
}

/* The other process: control is a socket to the parent. */
struct child {
    pid_t pid;
    int control;
};

typedef void child_fn(int control, const char *source);

static struct child child_start(child_fn *body)
{
    int ends[2];
    REQUIRE(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
    const char *source = source_name(); // the parent's pid: both know it
    fflush(NULL);
    pid_t pid = fork();
    REQUIRE(pid >= 0);
    if (pid == 0) {
        close(ends[0]);
        body(ends[1], source);
        fflush(NULL);
        _exit(check_failures != 0);
    }
    close(ends[1]);
    return (struct child){pid, ends[0]};
}

static int child_wait(struct child *c)
{
    int status = -1;
    REQUIRE(waitpid(c->pid, &status, 0) == c->pid);
    close(c->control);
    return status;
}

/* Sends n transfers (asked for over control), from a pool of its own. */
static void sender_process(int control, const char *source, const struct geometry *g)
{
    struct record sent;
    record_init(&sent);
    OWNED(kv_pool) pool = pool_of(g, source);
    bytes_write(control, "r", 1);
    char address[WIRE_MAX_ADDRESS];
    uint32_t n;
    bytes_read(control, address, sizeof(address));
    bytes_read(control, &n, sizeof(n));
    struct kv_pair_config c = config_of(pool, &sent);
    struct end *s = calloc(1, sizeof(*s));
    *s = (struct end){.pool = pool, .record = &sent};
    CHECK_OK(kv_pair_connect(kind, &c, address, &s->pair));
    while (s->n_seen < n && !check_failures) {
        while (s->n_posted < n && kv_pool_counts(pool).free >= pages_of(s->n_posted))
            end_send(s, pages_of(s->n_posted));
        CHECK_INT(record_wait(&sent, s->n_seen + 1), ERR_OK);
        end_collect(s, s);
    }
    char byte;
    bytes_read(control, &byte, 1); // the parent has seen everything
    kv_pair_destroy(s->pair);
    free(s);
}

static void small_sender_process(int control, const char *source)
{
    sender_process(control, source, &small);
}

static void child_tell(struct child *c, const char address[WIRE_MAX_ADDRESS], uint32_t n)
{
    bytes_write(c->control, address, WIRE_MAX_ADDRESS);
    bytes_write(c->control, &n, sizeof(n));
}

/* A receiving rig whose source is the child's pool. */
static void rig_receive_from(struct rig *t, struct child *c, const struct geometry *g)
{
    memset(t, 0, sizeof(*t));
    record_init(&t->received);
    record_init(&t->sent);
    t->to = pool_of(g, NULL);
    char byte;
    bytes_read(c->control, &byte, 1);
    struct kv_pair_config config = config_of(t->to, &t->received);
    CHECK_OK(kv_pair_listen(kind, &config, "127.0.0.1", source_name(), t->address, &t->receiver));
    REQUIRE(t->receiver != NULL);
}

static void transfers_between_processes_arrive_whole(void)
{
    uint32_t N = is_aside ? 300 : 2000; // a connection each
    struct child c = child_start(small_sender_process);
    struct rig *t = malloc(sizeof(*t));
    rig_receive_from(t, &c, &small);
    child_tell(&c, t->address, N);
    struct end *r = calloc(1, sizeof(*r));
    r->pool = t->to, r->pair = t->receiver, r->record = &t->received;
    while (r->n_seen < N && !check_failures) {
        while (r->n_posted < N && kv_pool_counts(r->pool).free >= pages_of(r->n_posted))
            end_expect(r, pages_of(r->n_posted));
        CHECK_INT(record_wait(r->record, r->n_seen + 1), ERR_OK);
        end_collect(r, NULL);
    }
    bytes_write(c.control, "q", 1);
    CHECK_INT(child_wait(&c), 0);
    free(r);
    rig_close(t);
    free(t);
}

static uint32_t all_pages[MAX_DONE];

#ifdef BATON_FAILPOINTS
/* Dies when it starts on the fourth transfer. */
static void dying_sender_process(int control, const char *source)
{
    CHECK_OK(failpoint_set("kv.send@3=kill"));
    sender_process(control, source, &small);
}

static void a_sender_killed_between_transfers_is_noticed(void)
{
    struct child c = child_start(dying_sender_process);
    struct rig *t = malloc(sizeof(*t));
    rig_receive_from(t, &c, &small);
    for (uint64_t seq = 0; seq < 6; seq++)
        CHECK_OK(kv_pair_post(t->receiver, seq, all_pages + seq * MAX_PAGES, pages_of(seq)));
    child_tell(&c, t->address, 6);
    int status = child_wait(&c);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    uint64_t start_us = clock_now_us();
    CHECK_INT(record_wait(&t->received, 6), ERR_PEER_LOST);
    CHECK(clock_now_us() - start_us < 1000000);
    for (uint64_t seq = 0; seq < 6; seq++) {
        enum err e = record_wait(&t->received, seq + 1);
        if (seq >= 3)
            CHECK_INT(e, ERR_PEER_LOST);
        for (uint32_t i = 0; e == ERR_OK && i < pages_of(seq); i++)
            CHECK(page_is(t->to, all_pages[seq * MAX_PAGES + i], seq, i));
    }
    shm_unlink(source_name()); // nobody else does
    rig_close(t);
    free(t);
}
#endif

/* Posts all its pages as one transfer and waits to be killed. */
static void big_sender_process(int control, const char *source)
{
    struct record sent;
    record_init(&sent);
    OWNED(kv_pool) pool = pool_of(&big, source);
    for (uint32_t i = 0; i < big.n_pages; i++)
        page_fill(pool, i, 0, i);
    bytes_write(control, "r", 1);
    char address[WIRE_MAX_ADDRESS];
    uint32_t n;
    bytes_read(control, address, sizeof(address));
    bytes_read(control, &n, sizeof(n));
    struct kv_pair_config c = config_of(pool, &sent);
    struct kv_pair *pair = NULL;
    CHECK_OK(kv_pair_connect(kind, &c, address, &pair));
    CHECK_OK(kv_pair_post(pair, 0, all_pages, big.n_pages));
    bytes_read(control, &n, 1);
    kv_pair_destroy(pair);
}

/* Watches memory that the pair's thread writes: a race on purpose. */
__attribute__((no_sanitize("thread"))) static bool has_changed(const volatile uint64_t *w)
{
    return *w != 0;
}

static void wait_for_first_page(const struct rig *t)
{
    const uint64_t *last =
        (const uint64_t *)kv_pool_page(t->to, 0) + kv_pool_page_bytes(t->to) / 8 - 1;
    for (uint64_t end_us = clock_now_us() + PATIENCE_US; !has_changed(last);) {
        sched_yield();
        REQUIRE(clock_now_us() < end_us);
    }
}

static void a_sender_killed_within_a_transfer_is_noticed(void)
{
    struct child c = child_start(big_sender_process);
    struct rig *t = malloc(sizeof(*t));
    rig_receive_from(t, &c, &big);
    child_tell(&c, t->address, 0);
    CHECK_OK(kv_pair_post(t->receiver, 0, all_pages, big.n_pages));
    wait_for_first_page(t);
    uint64_t start_us = clock_now_us();
    kill(c.pid, SIGKILL);
    child_wait(&c);
    enum err e = record_wait(&t->received, 1);
    CHECK(clock_now_us() - start_us < 1000000);
    // What is OK is whole. Otherwise it is the peer's death and nothing else.
    if (e == ERR_OK) {
        for (uint32_t i = 0; i < big.n_pages; i++)
            CHECK(page_is(t->to, i, 0, i));
    } else {
        CHECK_INT(e, ERR_PEER_LOST);
    }
    CHECK_OK(kv_pair_post(t->receiver, 1, all_pages, 1)); // later ones fail too
    CHECK_INT(record_wait(&t->received, 2), ERR_PEER_LOST);
    shm_unlink(source_name());
    rig_close(t);
    free(t);
}

#ifdef BATON_FAILPOINTS
/* Dies when it starts on the third transfer. */
static void dying_receiver_process(int control, const char *source)
{
    CHECK_OK(failpoint_set("kv.recv@2=kill"));
    struct record received;
    record_init(&received);
    OWNED(kv_pool) pool = pool_of(&small, NULL);
    struct kv_pair_config c = config_of(pool, &received);
    char address[WIRE_MAX_ADDRESS] = "";
    struct kv_pair *pair = NULL;
    CHECK_OK(kv_pair_listen(kind, &c, "127.0.0.1", source, address, &pair));
    for (uint64_t seq = 0; seq < 4; seq++)
        CHECK_OK(kv_pair_post(pair, seq, all_pages, 1));
    bytes_write(control, address, sizeof(address));
    char byte;
    bytes_read(control, &byte, 1);
}

static void a_killed_receiver_is_noticed(void)
{
    struct rig *t = calloc(1, sizeof(*t));
    record_init(&t->sent);
    t->from = pool_of(&small, source_name());
    struct child c = child_start(dying_receiver_process);
    bytes_read(c.control, t->address, sizeof(t->address));
    rig_connect(t);
    for (uint64_t seq = 0; seq < 4; seq++)
        CHECK_OK(kv_pair_post(t->sender, seq, all_pages, 1));
    int status = child_wait(&c);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    uint64_t start_us = clock_now_us();
    CHECK_INT(record_wait(&t->sent, 4), ERR_PEER_LOST);
    CHECK(clock_now_us() - start_us < 1000000);
    // The ack of a finished transfer may be lost with its sender, never the other way round.
    CHECK_INT(record_wait(&t->sent, 3), ERR_PEER_LOST);
    rig_close(t);
    free(t);
}
#endif

/* ---- late, aborted, destroyed ---- */

static void a_receiver_may_post_late(void)
{
    struct rig *t = malloc(sizeof(*t));
    rig_listen(t, &small);
    struct kv_pair_config c = config_of(t->from, &t->sent);
    CHECK_OK(kv_pair_connect(kind, &c, t->address, &t->sender));
    for (uint64_t seq = 0; seq < 3; seq++) {
        uint32_t page = (uint32_t)seq;
        page_fill(t->from, page, seq, 0);
        CHECK_OK(kv_pair_post(t->sender, seq, &page, 1));
    }
    for (uint64_t seq = 0; seq < 3; seq++) {
        uint32_t page = 10 + (uint32_t)seq;
        CHECK_INT(record_count(&t->received), seq);
        CHECK(record_count(&t->sent) <= seq);
        CHECK_OK(kv_pair_post(t->receiver, seq, &page, 1));
        CHECK_INT(record_wait(&t->received, seq + 1), ERR_OK);
        CHECK_INT(record_wait(&t->sent, seq + 1), ERR_OK);
        CHECK(page_is(t->to, page, seq, 0));
    }
    rig_close(t);
    free(t);
}

static void abort_ends_what_was_posted(void)
{
    struct rig *t = malloc(sizeof(*t));
    rig_open(t, &small);
    for (uint64_t seq = 0; seq < 3; seq++) // the receiver waits for more than is sent
        CHECK_OK(kv_pair_post(t->receiver, seq, all_pages + seq, 1));
    CHECK_OK(kv_pair_post(t->sender, 0, all_pages, 1));
    CHECK_INT(record_wait(&t->sent, 1), ERR_OK);
    kv_pair_abort(t->receiver);
    CHECK_INT(record_count(&t->received), 3);
    CHECK_INT(record_wait(&t->received, 1), ERR_OK);
    CHECK_INT(record_wait(&t->received, 2), ERR_ABORTED);
    CHECK_INT(record_wait(&t->received, 3), ERR_ABORTED);
    CHECK_INT(kv_pair_post(t->receiver, 3, all_pages, 1), ERR_ABORTED);
    kv_pair_abort(t->receiver); // once more does nothing
    CHECK_OK(kv_pair_post(t->sender, 1, all_pages, 1));
    CHECK_INT(record_wait(&t->sent, 2), ERR_PEER_LOST);
    CHECK_INT(record_count(&t->received), 3);
    rig_close(t);

    rig_open(t, &small); // and the other way round
    CHECK_OK(kv_pair_post(t->sender, 0, all_pages, 1));
    CHECK_OK(kv_pair_post(t->sender, 1, all_pages, 1));
    kv_pair_abort(t->sender);
    CHECK_INT(record_count(&t->sent), 2);
    CHECK_INT(record_wait(&t->sent, 2), ERR_ABORTED);
    CHECK_OK(kv_pair_post(t->receiver, 0, all_pages, 1));
    CHECK_OK(kv_pair_post(t->receiver, 1, all_pages, 1));
    kv_pair_abort(t->receiver); // a receiver that never met its sender would wait forever
    CHECK_INT(record_count(&t->received), 2);
    rig_close(t);
    free(t);
}

/* After an abort by the sender its pages belong to somebody else at once. The receiver must not
 * call a transfer good that has seen any of it. */
static void an_aborted_sender_may_reuse_its_pages(void)
{
    for (int round = 0; round < 8; round++) {
        struct rig *t = malloc(sizeof(*t));
        rig_open(t, &big);
        for (uint32_t i = 0; i < big.n_pages; i++)
            page_fill(t->from, i, 0, i);
        CHECK_OK(kv_pair_post(t->receiver, 0, all_pages, big.n_pages));
        CHECK_OK(kv_pair_post(t->sender, 0, all_pages, big.n_pages));
        wait_for_first_page(t);
        kv_pair_abort(t->sender);
        memset(kv_pool_base(t->from), 0xee, big.n_pages * kv_pool_page_bytes(t->from));
        if (record_wait(&t->received, 1) == ERR_OK)
            for (uint32_t i = 0; i < big.n_pages; i++)
                CHECK(page_is(t->to, i, 0, i));
        else
            CHECK_INT(record_wait(&t->received, 1), ERR_PEER_LOST);
        rig_close(t);
        free(t);
    }
}

/* After an abort by the receiver its pages belong to somebody else at once. */
static void an_aborted_receiver_may_reuse_its_pages(void)
{
    for (int round = 0; round < 8; round++) {
        struct rig *t = malloc(sizeof(*t));
        rig_open(t, &big);
        for (uint32_t i = 0; i < big.n_pages; i++)
            page_fill(t->from, i, 0, i);
        CHECK_OK(kv_pair_post(t->receiver, 0, all_pages, big.n_pages));
        CHECK_OK(kv_pair_post(t->sender, 0, all_pages, big.n_pages));
        wait_for_first_page(t);
        kv_pair_abort(t->receiver);
        uint8_t *m = kv_pool_base(t->to);
        size_t n = big.n_pages * kv_pool_page_bytes(t->to), n_wrong = 0;
        memset(m, 0xee, n);
        enum err e = record_wait(&t->sent, 1); // the sender is through with it too
        CHECK(e == ERR_OK || e == ERR_PEER_LOST);
        for (size_t i = 0; i < n; i++)
            n_wrong += m[i] != 0xee;
        CHECK_INT(n_wrong, 0);
        rig_close(t);
        free(t);
    }
}

static void pairs_are_destroyed_in_any_order_and_state(void)
{
    for (int round = 0; round < 60; round++) {
        struct rig *t = malloc(sizeof(*t));
        bool connect = rng(4) != 0, receiver_first = rng(2);
        uint64_t n_send = rng(8), n_expect = rng(8);
        rig_listen(t, &small);
        if (connect)
            rig_connect(t);
        for (uint64_t i = 0; connect && i < n_send; i++)
            CHECK_OK(kv_pair_post(t->sender, i, all_pages + i, 1 + (uint32_t)i % 3));
        for (uint64_t i = 0; i < n_expect; i++)
            CHECK_OK(kv_pair_post(t->receiver, i, all_pages + i, 1 + (uint32_t)i % 3));
        if (connect && n_send && n_expect && rng(2))
            record_wait(&t->received, 1 + rng((uint32_t)MIN(n_send, n_expect)));
        if (receiver_first)
            kv_pair_destroy(take(&t->receiver));
        kv_pair_destroy(take(&t->sender));
        kv_pair_destroy(take(&t->receiver));
        CHECK_INT(t->sent.n_done, connect ? n_send : 0); // each exactly once
        CHECK_INT(t->received.n_done, n_expect);
        bool failed = false;
        for (uint64_t i = 0; i < n_expect; i++) {
            CHECK(!failed || t->received.results[i] != ERR_OK);
            failed |= t->received.results[i] != ERR_OK;
        }
        rig_close(t);
        free(t);
    }
}

/* ---- strangers and liars ---- */

/* A plain socket to where the receiver listens; -1: refused. */
static int stranger_connect(const char *address)
{
    struct sockaddr_un local = {.sun_family = AF_UNIX};
    struct sockaddr_in net = {.sin_family = AF_INET};
    struct sockaddr *to = (struct sockaddr *)&local;
    socklen_t n = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(address));
    memcpy(local.sun_path + 1, address + 1, strlen(address + 1));
    if (kind == WIRE_KV_TCP) {
        char host[64];
        snprintf(host, sizeof(host), "%s", address);
        char *colon = strrchr(host, ':');
        *colon = 0;
        net.sin_port = htons((uint16_t)atoi(colon + 1));
        inet_pton(AF_INET, host, &net.sin_addr);
        to = (struct sockaddr *)&net;
        n = sizeof(net);
    }
    int fd = socket(to->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    REQUIRE(fd >= 0);
    if (!connect(fd, to, n))
        return fd;
    close(fd);
    return -1;
}

static void one_transfer_works(struct rig *t, uint64_t seq)
{
    uint32_t from = 3, to = 5;
    page_fill(t->from, from, seq, 0);
    CHECK_OK(kv_pair_post(t->sender, seq, &from, 1));
    CHECK_OK(kv_pair_post(t->receiver, seq, &to, 1));
    CHECK_INT(record_wait(&t->received, seq + 1), ERR_OK);
    CHECK_INT(record_wait(&t->sent, seq + 1), ERR_OK);
    CHECK(page_is(t->to, to, seq, 0));
}

static void a_wrong_token_is_refused(void)
{
    struct rig *t = malloc(sizeof(*t));
    rig_listen(t, &small);
    for (int bit = 0; bit < 128; bit += 37) {
        struct record r;
        record_init(&r);
        struct kv_pair_config c = config_of(t->from, &r);
        c.token[bit / 64] ^= 1ull << bit % 64;
        OWNED(kv_pair) wrong = NULL;
        CHECK_OK(kv_pair_connect(kind, &c, t->address, &wrong));
        CHECK_OK(kv_pair_post(wrong, 0, all_pages, 1));
        CHECK_INT(record_wait(&r, 1), ERR_PEER_LOST);
    }
    CHECK_INT(record_count(&t->received), 0);
    rig_connect(t); // the right one is still welcome
    one_transfer_works(t, 0);
    rig_close(t);
    free(t);
}

static void strangers_do_not_disturb(void)
{
    struct rig *t = malloc(sizeof(*t));
    rig_listen(t, &small);
    int fds[24];
    char garbage[200];
    memset(garbage, 'x', sizeof(garbage));
    for (size_t i = 0; i < ARRAY_LEN(fds); i++) {
        fds[i] = stranger_connect(t->address);
        CHECK(fds[i] >= 0);
        if (i % 3) // some say nothing at all, some half a word, some too much
            (void)!send(fds[i], garbage, i % 3 == 1 ? 7 : sizeof(garbage), MSG_NOSIGNAL);
    }
    rig_connect(t);
    one_transfer_works(t, 0);
    CHECK_INT(stranger_connect(t->address), -1); // the door is closed behind the sender
    one_transfer_works(t, 1);
    for (size_t i = 0; i < ARRAY_LEN(fds); i++)
        close(fds[i]);
    one_transfer_works(t, 2);
    rig_close(t);
    free(t);
}

/* The stream as kv_stream.c describes it, spoken by hand. */
struct hello {
    uint32_t magic, version;
    uint64_t token[2], page_bytes;
    uint32_t n_pages, n_layers, kv_width, dtype_bytes;
};
struct head {
    uint64_t seq, page_bytes;
    uint32_t n_pages, zero;
    uint32_t indexes[4];
};

static struct hello hello_of(const struct rig *t)
{
    return (struct hello){0x31564b42u,      1,
                          {0x1234, 0x5678}, kv_pool_page_bytes(t->from),
                          small.n_pages,    small.n_layers,
                          small.kv_width,   4};
}

/* Sends the two and returns how the receiver's transfer of one page ended. */
static enum err lie(struct rig *t, const struct hello *hello, const struct head *head)
{
    int fd = stranger_connect(t->address);
    REQUIRE(fd >= 0);
    CHECK_OK(kv_pair_post(t->receiver, 0, all_pages + 7, 1));
    bytes_write(fd, hello, sizeof(*hello));
    uint32_t welcome[2] = {0};
    bytes_read(fd, welcome, sizeof(welcome));
    if (welcome[1] == ERR_OK)
        (void)!send(fd, head, sizeof(*head), MSG_NOSIGNAL);
    enum err e = record_wait(&t->received, 1);
    close(fd);
    return e;
}

static void a_lying_sender_gets_nothing_done(void)
{
    struct rig *t = malloc(sizeof(*t));
    for (int what = 0; what < 12; what++) {
        rig_listen(t, &small);
        struct hello hello = hello_of(t);
        struct head head = {.page_bytes = kv_pool_page_bytes(t->from), .n_pages = 1};
        bool shm_only = what >= 10;
        switch (what) {
        case 0:
            hello.page_bytes *= 2;
            break;
        case 1:
            hello.n_layers++;
            break;
        case 2:
            hello.kv_width--;
            break;
        case 3:
            hello.dtype_bytes = 2;
            break;
        case 4:
            hello.n_pages = 0;
            break;
        case 5:
            head.seq = 1;
            break;
        case 6:
            head.page_bytes -= 8;
            break;
        case 7:
            head.n_pages = 2;
            break;
        case 8:
            head.n_pages = UINT32_MAX;
            break;
        case 9:
            head.zero = 1;
            break;
        case 10:
            head.indexes[0] = small.n_pages;
            break;
        case 11:
            hello.n_pages = small.n_pages + 1;
            head.indexes[0] = small.n_pages;
            break;
        }
        if (!shm_only || kind == WIRE_KV_SHM)
            CHECK_INT(lie(t, &hello, &head), ERR_PROTO);
        const uint64_t *untouched = kv_pool_base(t->to);
        size_t n_set = 0;
        for (size_t i = 0; i < small.n_pages * kv_pool_page_bytes(t->to) / 8; i++)
            n_set += untouched[i] != 0;
        CHECK_INT(n_set, 0);
        rig_close(t);
    }
    free(t);
}

/* A receiver that acknowledges what was not sent. */
static void a_lying_receiver_is_noticed(void)
{
    static const uint64_t acks[][2] = {{1, 0}, {0, 7ull << 32}, {0, ERR_PROTO}, {1, 1ull << 32}};
    for (size_t i = 0; i < ARRAY_LEN(acks); i++) {
        struct sockaddr_un local = {.sun_family = AF_UNIX, .sun_path = "\0baton-test-liar"};
        struct sockaddr_in net = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
        socklen_t n = sizeof(net);
        bool tcp = kind == WIRE_KV_TCP;
        int listener = socket(tcp ? AF_INET : AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        char address[WIRE_MAX_ADDRESS];
        if (tcp) {
            REQUIRE(!bind(listener, (struct sockaddr *)&net, sizeof(net)));
            REQUIRE(!getsockname(listener, (struct sockaddr *)&net, &n));
            snprintf(address, sizeof(address), "127.0.0.1:%d", ntohs(net.sin_port));
        } else {
            snprintf(local.sun_path + 1, sizeof(local.sun_path) - 1, "baton-liar-%d",
                     (int)getpid());
            n = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 +
                            strlen(local.sun_path + 1));
            REQUIRE(!bind(listener, (struct sockaddr *)&local, n));
            snprintf(address, sizeof(address), "@%s", local.sun_path + 1);
        }
        REQUIRE(!listen(listener, 1));
        struct record r;
        record_init(&r);
        OWNED(kv_pool) pool = pool_of(&small, NULL);
        struct kv_pair_config c = config_of(pool, &r);
        OWNED(kv_pair) sender = NULL;
        CHECK_OK(kv_pair_connect(kind, &c, address, &sender));
        CHECK_OK(kv_pair_post(sender, 0, all_pages, 1));
        int fd = accept(listener, NULL, NULL);
        struct hello hello;
        bytes_read(fd, &hello, sizeof(hello));
        uint32_t welcome[2] = {0x31564b42u, ERR_OK};
        bytes_write(fd, welcome, sizeof(welcome));
        if (is_aside)
            bytes_write(fd, aside_greeting, sizeof(aside_greeting));
        struct head head;
        bytes_read(fd, &head, offsetof(struct head, indexes));
        bytes_write(fd, acks[i], sizeof(acks[i]));
        CHECK_INT(record_wait(&r, 1), ERR_PROTO);
        close(fd);
        close(listener);
    }
}

/* A sender that has not said that it sent everything has not, whatever arrived. */
static void content_counts_when_the_sender_says_so(void)
{
    enum { SENT, NOT_SENT, OTHER_SEQ, NOT_OK, SILENT, N_CASES };
    static const uint64_t notes[][2] = {
        {0, 2ull << 32}, {0, 0}, {1, 2ull << 32}, {0, 2ull << 32 | ERR_ABORTED}};
    for (int i = 0; i < N_CASES; i++) {
        struct rig *t = malloc(sizeof(*t));
        rig_listen(t, &small);
        page_fill(t->from, 0, 0, 0);
        struct hello hello = hello_of(t);
        struct head head = {.page_bytes = kv_pool_page_bytes(t->from), .n_pages = 1};
        int fd = stranger_connect(t->address);
        CHECK_OK(kv_pair_post(t->receiver, 0, all_pages, 1));
        bytes_write(fd, &hello, sizeof(hello));
        uint32_t welcome[2];
        char greeting[sizeof(aside_greeting)], address[WIRE_MAX_ADDRESS];
        uint64_t ready[2];
        bytes_read(fd, welcome, sizeof(welcome));
        bytes_read(fd, greeting, sizeof(greeting));
        bytes_write(fd, &head, offsetof(struct head, indexes));
        bytes_read(fd, ready, sizeof(ready));
        CHECK_INT(ready[0], 0);
        CHECK_INT(ready[1], 1ull << 32);
        bytes_read(fd, address, sizeof(address));
        int side = aside_connect_to(address);
        REQUIRE(side >= 0);
        bytes_write(side, kv_pool_page(t->from, 0), kv_pool_page_bytes(t->from));
        wait_for_first_page(t);
        if (i != SILENT)
            bytes_write(fd, notes[i], sizeof(notes[i]));
        else
            shutdown(fd, SHUT_RDWR);
        enum err e = record_wait(&t->received, 1);
        CHECK_INT(e, i == SENT ? ERR_OK : i == SILENT ? ERR_PEER_LOST : ERR_PROTO);
        CHECK(page_is(t->to, 0, 0, 0)); // it had all arrived
        close(side);
        close(fd);
        rig_close(t);
        free(t);
    }
}

static void different_geometry_is_refused(void)
{
    struct rig *t = malloc(sizeof(*t));
    rig_listen(t, &small);
    struct geometry other = {small.n_pages, small.n_layers * 2, small.kv_width / 2};
    OWNED(kv_pool) pool = pool_of(&other, NULL); // as many bytes per page
    struct kv_pair_config c = config_of(pool, &t->sent);
    CHECK_OK(kv_pair_connect(kind, &c, t->address, &t->sender));
    CHECK_OK(kv_pair_post(t->sender, 0, all_pages, 1));
    CHECK_OK(kv_pair_post(t->receiver, 0, all_pages, 1));
    CHECK_INT(record_wait(&t->sent, 1), ERR_PROTO);
    CHECK_INT(record_wait(&t->received, 1), ERR_PROTO);
    rig_close(t);
    free(t);
}

static void impossible_posts_are_refused(void)
{
    struct rig *t = malloc(sizeof(*t));
    rig_open(t, &small);
    uint32_t bad[2] = {0, small.n_pages};
    CHECK_INT(kv_pair_post(t->sender, 0, bad, 2), ERR_INVALID);
    CHECK_INT(kv_pair_post(t->receiver, 0, bad, 2), ERR_INVALID);
    CHECK_INT(kv_pair_post(t->sender, 0, bad, 0), ERR_INVALID);
    CHECK_INT(kv_pair_post(t->sender, 1, bad, 1), ERR_INVALID);
    one_transfer_works(t, 0); // and nothing has happened
    CHECK_INT(kv_pair_post(t->sender, 0, bad, 1), ERR_INVALID);
    one_transfer_works(t, 1);
    rig_close(t);
    free(t);
}

static void impossible_addresses_are_refused(void)
{
    struct record r;
    record_init(&r);
    OWNED(kv_pool) pool = pool_of(&small, NULL);
    struct kv_pair_config c = config_of(pool, &r);
    struct kv_pair *p = NULL;
    char address[WIRE_MAX_ADDRESS] = "unset";
    static const char *const bad[] = {"",         "@",    "x",   ":",      "1.2.3.4",
                                      "1.2.3.4:", "[]:1", "[:1", "host:1", "1.2.3.4:x"};
    for (size_t i = 0; i < ARRAY_LEN(bad); i++)
        CHECK_INT(kv_pair_connect(kind, &c, bad[i], &p), ERR_INVALID);
    CHECK_INT(kv_pair_listen(WIRE_KV_NCCL, &c, "127.0.0.1", "", address, &p), ERR_INVALID);
    CHECK_INT(kv_pair_connect(WIRE_KV_IPC, &c, "", &p), ERR_INVALID);
    if (kind == WIRE_KV_TCP) {
        CHECK_INT(kv_pair_listen(kind, &c, "0.0.0.0", "", address, &p), ERR_INVALID);
        CHECK_INT(kv_pair_listen(kind, &c, "::", "", address, &p), ERR_INVALID);
        CHECK_INT(kv_pair_listen(kind, &c, "192.0.2.1", "", address, &p), ERR_IO);
        CHECK_INT(kv_pair_listen(kind, &c, NULL, "", address, &p), ERR_INVALID);
    } else {
        CHECK_INT(kv_pair_listen(kind, &c, "", NULL, address, &p), ERR_INVALID);
        CHECK_INT(kv_pair_listen(kind, &c, "", "", address, &p), ERR_INVALID);
        CHECK_INT(kv_pair_listen(kind, &c, "", "/../etc/passwd", address, &p), ERR_INVALID);
        CHECK_INT(kv_pair_listen(kind, &c, "", "/baton-test-absent", address, &p), ERR_IO);
        OWNED(kv_pool) other = pool_of(&big, source_name());
        if (kv_pool_page_bytes(other) % kv_pool_page_bytes(pool)) // else only hello can tell
            CHECK_INT(kv_pair_listen(kind, &c, "", source_name(), address, &p), ERR_MISMATCH);
    }
    CHECK_STR(address, "unset"); // written only on success
    CHECK(p == NULL);

    // Nobody there: connect returns, the transfer fails.
    CHECK_OK(kv_pair_connect(kind, &c, kind == WIRE_KV_TCP ? "127.0.0.1:1" : "@baton-nobody", &p));
    CHECK_OK(kv_pair_post(p, 0, all_pages, 1));
    CHECK_INT(record_wait(&r, 1), ERR_PEER_LOST);
    CHECK_OK(kv_pair_post(p, 1, all_pages, 1));
    CHECK_INT(record_wait(&r, 2), ERR_PEER_LOST);
    kv_pair_destroy(p);
}

/* ---- failpoints ---- */

#ifdef BATON_FAILPOINTS
static void failpoints_fail_and_drop(void)
{
    static const char *const names[] = {"kv.send", "kv.recv"};
    for (size_t i = 0; i < ARRAY_LEN(names); i++) {
        struct rig *t = malloc(sizeof(*t));
        char spec[64];
        rig_open(t, &small);
        snprintf(spec, sizeof(spec), "%s@1=error", names[i]);
        CHECK_OK(failpoint_set(spec));
        one_transfer_works(t, 0);
        CHECK_OK(kv_pair_post(t->receiver, 1, all_pages, 1));
        CHECK_OK(kv_pair_post(t->sender, 1, all_pages, 1));
        CHECK_INT(record_wait(&t->sent, 2), ERR_PEER_LOST);
        CHECK_INT(record_wait(&t->received, 2), ERR_PEER_LOST);
        snprintf(spec, sizeof(spec), "%s=off", names[i]);
        CHECK_OK(failpoint_set(spec));
        rig_close(t);

        rig_open(t, &small);
        snprintf(spec, sizeof(spec), "%s@1=drop", names[i]);
        CHECK_OK(failpoint_set(spec));
        one_transfer_works(t, 0);
        CHECK_OK(kv_pair_post(t->receiver, 1, all_pages, 1));
        CHECK_OK(kv_pair_post(t->sender, 1, all_pages, 1));
        CHECK_OK(kv_pair_post(t->sender, 2, all_pages, 1));
        kv_pair_abort(t->sender);
        CHECK_INT(record_count(&t->sent), 3);
        CHECK_INT(record_wait(&t->sent, 2), ERR_ABORTED);
        CHECK_INT(record_wait(&t->received, 2), ERR_PEER_LOST);
        snprintf(spec, sizeof(spec), "%s=off", names[i]);
        CHECK_OK(failpoint_set(spec));
        rig_close(t);
        free(t);
    }
}
#endif

/* ---- names ---- */

static void names_and_choice(void)
{
    uint32_t bits = 0;
    CHECK_OK(kv_transports_parse("auto", false, &bits));
    CHECK_INT(bits, WIRE_KV_SHM | WIRE_KV_TCP);
    CHECK_OK(kv_transports_parse("shm", false, &bits));
    CHECK_INT(bits, WIRE_KV_SHM);
    CHECK_OK(kv_transports_parse("tcp", false, &bits));
    CHECK_INT(bits, WIRE_KV_TCP);
    CHECK_INT(kv_transports_parse("nccl", false, &bits), ERR_INVALID);
    CHECK_INT(kv_transports_parse("", false, &bits), ERR_INVALID);
    CHECK_INT(bits, WIRE_KV_TCP);
    uint32_t both = WIRE_KV_SHM | WIRE_KV_TCP;
    CHECK_INT(kv_transport_choose(both, both, true), WIRE_KV_SHM);
    CHECK_INT(kv_transport_choose(both, both, false), WIRE_KV_TCP);
    CHECK_INT(kv_transport_choose(both, WIRE_KV_TCP, true), WIRE_KV_TCP);
    CHECK_INT(kv_transport_choose(WIRE_KV_SHM, WIRE_KV_TCP, true), 0);
    CHECK_INT(kv_transport_choose(WIRE_KV_SHM, both, false), 0);
    CHECK_STR(kv_transport_name(WIRE_KV_SHM), "shm");
    CHECK_STR(kv_transport_name(WIRE_KV_TCP), "tcp");
    CHECK_STR(kv_transport_name((enum wire_transport)0), "?");
    CHECK(kv_host_id() != 0);
    CHECK(kv_host_id() == kv_host_id());
}

/* What a registered kind was called with. */
static char called_with[WIRE_MAX_ADDRESS];

static enum err fake_listen(const struct kv_pair_config *c, const char *where,
                            char ret_address[WIRE_MAX_ADDRESS], struct kv_pair **ret)
{
    snprintf(called_with, sizeof(called_with), "%s", where);
    return ERR_BUSY;
}

static enum err fake_connect(const struct kv_pair_config *c, const char *address,
                             struct kv_pair **ret)
{
    snprintf(called_with, sizeof(called_with), "%s", address);
    return ERR_BUSY;
}

/* A device whose memory is the heap. */
static enum err heap_alloc(struct device *d, uint64_t bytes, struct device_memory *ret)
{
    *ret = (struct device_memory){.base = calloc(1, bytes), .bytes = bytes, .fd = -1};
    return ret->base ? ERR_OK : err_set(ERR_NOMEM, "heap");
}

static void heap_release(struct device *d, struct device_memory *m) { free(m->base); }

static const struct device_ops heap_ops = {.alloc = heap_alloc, .release = heap_release};

/* Last: there is no way back. */
static void registered_kinds_are_there(void)
{
    uint32_t bits = 0, all = WIRE_KV_IPC | WIRE_KV_NCCL;
    CHECK_INT(kv_transports_parse("nccl", true, &bits), ERR_INVALID);
    CHECK_STR(err_text(ERR_INVALID),
              "--kv-transport nccl: with pages in GPU memory it is one of auto, ipc");
    kv_transport_register(WIRE_KV_NCCL, fake_listen, fake_connect);
    kv_transport_register(WIRE_KV_IPC, fake_listen, fake_connect);
    CHECK_OK(kv_transports_parse("auto", true, &bits));
    CHECK_INT(bits, all);
    CHECK_OK(kv_transports_parse("nccl", true, &bits));
    CHECK_INT(bits, WIRE_KV_NCCL);
    CHECK_INT(kv_transports_parse("nccl", false, &bits), ERR_INVALID);
    CHECK_INT(kv_transport_choose(all, all, true), WIRE_KV_IPC);
    CHECK_INT(kv_transport_choose(all, all, false), WIRE_KV_NCCL);
    CHECK_INT(kv_transport_choose(all, WIRE_KV_NCCL, true), WIRE_KV_NCCL);

    struct device gpu = {.ops = &heap_ops};
    struct kv_pool_config g = {.n_pages = 1, .n_layers = 1, .kv_width = 1, .dtype_bytes = 2};
    OWNED(kv_pool) host = NULL;
    OWNED(kv_pool) device = NULL;
    CHECK_OK(kv_pool_create(&g, &host));
    g.device = &gpu;
    CHECK_OK(kv_pool_create(&g, &device));
    struct kv_pair_config on_host = {.pool = host}, on_device = {.pool = device};
    struct kv_pair *p = NULL;
    char address[WIRE_MAX_ADDRESS];
    CHECK_INT(kv_pair_listen(WIRE_KV_NCCL, &on_device, "host", "peer", address, &p), ERR_BUSY);
    CHECK_STR(called_with, "host");
    CHECK_INT(kv_pair_listen(WIRE_KV_IPC, &on_device, "host", "peer", address, &p), ERR_BUSY);
    CHECK_STR(called_with, "peer");
    CHECK_INT(kv_pair_connect(WIRE_KV_NCCL, &on_device, "there", &p), ERR_BUSY);
    CHECK_STR(called_with, "there");
    CHECK_INT(kv_pair_connect(WIRE_KV_IPC, &on_host, "", &p), ERR_INVALID);
    CHECK_INT(kv_pair_connect(WIRE_KV_TCP, &on_device, "127.0.0.1:1", &p), ERR_INVALID);
    CHECK_STR(err_text(ERR_INVALID),
              "KV transport tcp moves pages in host memory, ours are in GPU memory");
    CHECK_INT(kv_pair_listen(WIRE_KV_SHM, &on_device, "", "/x", address, &p), ERR_INVALID);
}

static int count_files(const char *folder, const char *prefix)
{
    DIR *d = opendir(folder);
    REQUIRE(d != NULL);
    int n = 0;
    for (struct dirent *e; (e = readdir(d));)
        n += !strncmp(e->d_name, prefix, strlen(prefix));
    closedir(d);
    return n;
}

int main(void)
{
    const char *seed = getenv("BATON_TEST_SEED");
    rng_state = seed ? strtoull(seed, NULL, 0) : clock_now_us();
    printf("BATON_TEST_SEED=%llu\n", (unsigned long long)rng_state);
    log_init("test", LOG_ERROR);
    for (uint32_t i = 0; i < ARRAY_LEN(all_pages); i++)
        all_pages[i] = i % small.n_pages;
    RUN(names_and_choice);
    static const enum wire_transport kinds[] = {WIRE_KV_SHM, WIRE_KV_TCP, WIRE_KV_TCP};
    for (size_t i = 0; i < ARRAY_LEN(kinds); i++) {
        kind = kinds[i];
        is_aside = i == 2;
        if (is_aside)
            kv_transport_register(kind, aside_listen, aside_connect);
        printf("%s:\n", is_aside ? "aside" : kv_transport_name(kind));
        int n_fds = count_files("/proc/self/fd", "");
        RUN(transfers_between_processes_arrive_whole);
        RUN(random_transfers_arrive_whole);
        RUN(a_sender_killed_within_a_transfer_is_noticed);
        RUN(a_receiver_may_post_late);
        RUN(abort_ends_what_was_posted);
        RUN(an_aborted_sender_may_reuse_its_pages);
        RUN(an_aborted_receiver_may_reuse_its_pages);
        RUN(pairs_are_destroyed_in_any_order_and_state);
        RUN(a_wrong_token_is_refused);
        RUN(strangers_do_not_disturb);
        RUN(a_lying_sender_gets_nothing_done);
        RUN(a_lying_receiver_is_noticed);
        if (is_aside)
            RUN(content_counts_when_the_sender_says_so);
        RUN(different_geometry_is_refused);
        RUN(impossible_posts_are_refused);
        RUN(impossible_addresses_are_refused);
#ifdef BATON_FAILPOINTS
        RUN(a_sender_killed_between_transfers_is_noticed);
        RUN(a_killed_receiver_is_noticed);
        RUN(failpoints_fail_and_drop);
#endif
        CHECK_INT(count_files("/proc/self/fd", ""), n_fds);
        CHECK_INT(count_files("/dev/shm", source_name() + 1), 0);
    }
    RUN(registered_kinds_are_there);
    return check_done();
}
