/* kv_nccl_test.c: pages between GPU pools by NCCL: whole and in their places or not at all, whoever
 * aborts, stalls or dies, and how long the survivor takes to get out.
 *
 * One GPU: a one-rank communicator that sends to itself. Two: two ranks, in one process and in two.
 * Skips (77) without a GPU.
 */
#include "common/engine/kv_nccl.h"

#include "check.h"
#include "plain_device.h"
#include "common/base/failpoint.h"
#include "common/base/hash.h"
#include "common/base/log.h"
#include "kv_child.h"
#include "kv_record.h"

#define MAX_PAGES  64
#define GET_OUT_US 5000000u

static uint64_t rng_state;
static uint32_t rng(uint32_t n)
{
    rng_state += 0x9e3779b97f4a7c15u;
    return (uint32_t)(hash_mix(rng_state) % n);
}

static double ms_since(uint64_t start_us) { return (double)(clock_now_us() - start_us) / 1000; }

/* ---- pools and their content ---- */

struct geometry {
    uint32_t n_pages, n_layers, kv_width;
};
static const struct geometry small = {64, 2, 36};   // 9 KiB per page
static const struct geometry flash = {32, 48, 576}; // GLM-4.7-Flash: 3.5 MB per page

static struct kv_pool *pool_of(const struct geometry *g, int device)
{
    struct kv_pool_config c = {.n_pages = g->n_pages,
                               .n_layers = g->n_layers,
                               .kv_width = g->kv_width,
                               .dtype_bytes = 2,
                               .device = plain_device(device)};
    struct kv_pool *p = NULL;
    CHECK_OK(kv_pool_create(&c, &p));
    REQUIRE(p != NULL);
    return p;
}

static void pool_free(struct kv_pool *p) { kv_pool_destroy(p); }

static void pool_paint(struct kv_pool *p, int byte)
{
    size_t n = kv_pool_get_config(p)->n_pages * kv_pool_page_bytes(p);
    CHECK(cudaSetDevice(kv_pool_get_config(p)->device->ordinal) == cudaSuccess);
    CHECK(cudaMemset(kv_pool_base(p), byte, n) == cudaSuccess);
    CHECK(cudaStreamSynchronize(0) == cudaSuccess);
}

/* Content of the i-th page of transfer seq. */
static void *pattern(uint64_t bytes, uint64_t seq, uint32_t i)
{
    uint64_t *w = malloc(bytes), x = hash_mix(seq * 1000 + i + 1);
    REQUIRE(w != NULL);
    for (size_t j = 0; j < bytes / 8; j++)
        w[j] = x += 0x9e3779b97f4a7c15u;
    return w;
}

static void page_fill(struct kv_pool *p, uint32_t page, uint64_t seq, uint32_t i)
{
    uint64_t bytes = kv_pool_page_bytes(p);
    OWNED_MEM void *want = pattern(bytes, seq, i);
    CHECK(cudaSetDevice(kv_pool_get_config(p)->device->ordinal) == cudaSuccess);
    CHECK(cudaMemcpy(kv_pool_page(p, page), want, bytes, cudaMemcpyHostToDevice) == cudaSuccess);
    CHECK(cudaStreamSynchronize(0) == cudaSuccess); // the copy may still be on its way
}

static void *page_read(struct kv_pool *p, uint32_t page)
{
    uint64_t bytes = kv_pool_page_bytes(p);
    void *got = malloc(bytes);
    REQUIRE(got != NULL);
    CHECK(cudaSetDevice(kv_pool_get_config(p)->device->ordinal) == cudaSuccess);
    CHECK(cudaMemcpy(got, kv_pool_page(p, page), bytes, cudaMemcpyDeviceToHost) == cudaSuccess);
    return got;
}

static bool page_is(struct kv_pool *p, uint32_t page, uint64_t seq, uint32_t i)
{
    OWNED_MEM void *got = page_read(p, page);
    OWNED_MEM void *want = pattern(kv_pool_page_bytes(p), seq, i);
    return !memcmp(got, want, kv_pool_page_bytes(p));
}

static bool page_is_painted(struct kv_pool *p, uint32_t page, uint8_t byte)
{
    OWNED_MEM uint8_t *got = page_read(p, page);
    for (size_t i = 0; i < kv_pool_page_bytes(p); i++)
        if (got[i] != byte)
            return false;
    return true;
}

/* ---- a pair in this process ---- */

static bool loopback;
static int from_device, to_device;
static struct kv_nccl_options options;

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

static void rig_receiver(struct rig *t, const struct geometry *g)
{
    t->to = pool_of(g, to_device);
    record_init(&t->received);
    options.loopback_base = loopback ? kv_pool_base(t->from) : NULL;
    CHECK_OK(kv_nccl_configure(&options));
    struct kv_pair_config c = config_of(t->to, &t->received);
    CHECK_OK(kv_pair_listen(WIRE_KV_NCCL, &c, "127.0.0.1", "", t->address, &t->receiver));
    REQUIRE(t->receiver != NULL);
}

static void rig_sender(struct rig *t, const struct geometry *g)
{
    if (!t->from)
        t->from = pool_of(g, from_device);
    record_init(&t->sent);
    CHECK_OK(kv_nccl_configure(&options));
    struct kv_pair_config c = config_of(t->from, &t->sent);
    CHECK_OK(kv_pair_connect(WIRE_KV_NCCL, &c, t->address, &t->sender));
    REQUIRE(t->sender != NULL);
}

static void rig_open(struct rig *t, const struct geometry *g)
{
    memset(t, 0, sizeof(*t));
    t->from = pool_of(g, from_device);
    rig_receiver(t, g);
    rig_sender(t, g);
}

static void rig_close(struct rig *t)
{
    kv_pair_destroy(take(&t->sender));
    kv_pair_destroy(take(&t->receiver));
    CHECK(!t->sent.out_of_order);
    CHECK(!t->received.out_of_order);
    pool_free(take(&t->from));
    pool_free(take(&t->to));
}

/* ---- many transfers ---- */

static void shuffled(uint32_t *ret, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        uint32_t j = rng(i + 1);
        ret[i] = i;
        ret[i] = ret[j];
        ret[j] = i;
    }
}

/* Several transfers at once, of pages all over both pools; what no transfer names stays as it is.
 */
static uint32_t burst(struct rig *t, uint64_t seq, uint32_t max_pages)
{
    uint32_t total = kv_pool_get_config(t->to)->n_pages, from[MAX_PAGES], to[MAX_PAGES];
    uint32_t at[MAX_PAGES + 1] = {0}, n = 0;
    shuffled(from, total);
    shuffled(to, total);
    pool_paint(t->to, 0x11);
    for (uint32_t n_transfers = 1 + rng(6), left = total - 1; n < n_transfers && left; n++) {
        at[n + 1] = at[n] + 1 + rng(MIN(max_pages, left));
        left = total - 1 - at[n + 1];
        for (uint32_t i = at[n]; i < at[n + 1]; i++)
            page_fill(t->from, from[i], seq + n, i - at[n]);
    }
    for (uint32_t i = 0, j = 0; i < n || j < n;) { // the ends post at their own pace
        if (i < n && (j == n || rng(2))) {
            CHECK_OK(kv_pair_post(t->sender, seq + i, from + at[i], at[i + 1] - at[i]));
            i++;
        } else {
            CHECK_OK(kv_pair_post(t->receiver, seq + j, to + at[j], at[j + 1] - at[j]));
            j++;
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        CHECK_INT(record_wait(&t->received, seq + i + 1), ERR_OK);
        CHECK_INT(record_wait(&t->sent, seq + i + 1), ERR_OK);
        for (uint32_t k = at[i]; k < at[i + 1]; k++)
            CHECK(page_is(t->to, to[k], seq + i, k - at[i]));
    }
    for (uint32_t i = at[n]; i < total; i++)
        CHECK(page_is_painted(t->to, to[i], 0x11));
    return n;
}

static void many(const struct geometry *g, uint64_t n, uint32_t max_pages)
{
    struct rig t;
    rig_open(&t, g);
    uint64_t seq = 0;
    while (seq < n && !check_failures)
        seq += burst(&t, seq, max_pages);
    rig_close(&t);
}

static void random_transfers_arrive_whole(void)
{
    many(&small, 1000, 12);
    many(&flash, 20, 20);
}

static void any_number_of_ctas_arrives_whole(void)
{
    for (int ctas = 1; ctas <= 16; ctas *= 4) {
        options.max_ctas = ctas;
        many(&small, 50, 40);
        many(&flash, 5, 20);
    }
    options = kv_nccl_default();
}

static void a_receiver_may_post_late(void)
{
    struct rig t;
    rig_open(&t, &small);
    for (uint64_t seq = 0; seq < 3; seq++) {
        uint32_t page = (uint32_t)seq;
        page_fill(t.from, page, seq, 0);
        CHECK_OK(kv_pair_post(t.sender, seq, &page, 1));
    }
    for (uint64_t seq = 0; seq < 3; seq++) {
        uint32_t page = 10 + (uint32_t)seq;
        CHECK_INT(record_count(&t.received), seq);
        CHECK(record_count(&t.sent) <= seq);
        CHECK_OK(kv_pair_post(t.receiver, seq, &page, 1));
        CHECK_INT(record_wait(&t.received, seq + 1), ERR_OK);
        CHECK_INT(record_wait(&t.sent, seq + 1), ERR_OK);
        CHECK(page_is(t.to, page, seq, 0));
    }
    rig_close(&t);
}

/* ---- abort ---- */

static uint32_t all_pages[MAX_PAGES];

/* A transfer of the whole pool is under way when one end aborts after delay_us. What it touched is
 * somebody else's from then on: overwritten at once, it must stay that way, and the other end must
 * not call the transfer good if it has seen any of it. */
static void abort_after(uint32_t delay_us, bool abort_sender, double *worst_ms, int *n_within)
{
    struct rig t;
    rig_open(&t, &flash);
    uint32_t page = 0;
    page_fill(t.from, page, 0, 0);
    CHECK_OK(kv_pair_post(t.receiver, 0, &page, 1)); // the pair is up after this
    CHECK_OK(kv_pair_post(t.sender, 0, &page, 1));
    CHECK_INT(record_wait(&t.sent, 1), ERR_OK);
    for (uint32_t i = 0; i < flash.n_pages; i++)
        page_fill(t.from, i, 1, i);
    CHECK_OK(kv_pair_post(t.receiver, 1, all_pages, flash.n_pages));
    CHECK_OK(kv_pair_post(t.sender, 1, all_pages, flash.n_pages));
    for (uint64_t end_us = clock_now_us() + delay_us; clock_now_us() < end_us;)
        ;
    uint64_t start_us = clock_now_us();
    kv_pair_abort(abort_sender ? t.sender : t.receiver);
    *worst_ms = fmax(*worst_ms, ms_since(start_us));
    CHECK(clock_now_us() - start_us < GET_OUT_US);
    struct record *own = abort_sender ? &t.sent : &t.received;
    struct record *other = abort_sender ? &t.received : &t.sent;
    CHECK_INT(record_count(own), 2);
    enum err e = record_wait(own, 2);
    CHECK(e == ERR_OK || e == ERR_ABORTED);
    *n_within += e == ERR_ABORTED;
    pool_paint(abort_sender ? t.from : t.to, 0xee);
    e = record_wait(other, 2);
    CHECK(e == ERR_OK || e == ERR_PEER_LOST);
    CHECK(clock_now_us() - start_us < GET_OUT_US);
    kv_pair_destroy(take(abort_sender ? &t.receiver : &t.sender));
    for (uint32_t i = 0; i < flash.n_pages; i++)
        if (!abort_sender)
            CHECK(page_is_painted(t.to, i, 0xee));
        else if (e == ERR_OK)
            CHECK(page_is(t.to, i, 1, i));
    rig_close(&t);
}

static void an_aborted_transfer_touches_nothing_more(void)
{
    double worst_ms = 0;
    int n_within = 0, n_rounds = 12;
    for (int i = 0; i < n_rounds && !check_failures; i++) // in a loopback the sender has no kernel
        abort_after(rng(3000), !loopback && i % 2, &worst_ms, &n_within);
    printf("     %d aborts, %d within a transfer, worst %.1f ms\n", n_rounds, n_within, worst_ms);
}

static void pairs_are_destroyed_in_any_state(void)
{
    for (int i = 0; i < 6; i++) {
        struct rig t = {0};
        t.from = pool_of(&small, from_device);
        rig_receiver(&t, &small);
        CHECK_OK(kv_pair_post(t.receiver, 0, all_pages, 3));
        if (i)
            rig_sender(&t, &small);
        if (i > 1)
            CHECK_OK(kv_pair_post(t.sender, 0, all_pages, 3));
        usleep(rng(1000000)); // anywhere from connecting to done
        uint64_t start_us = clock_now_us();
        if (i % 2)
            kv_pair_destroy(take(&t.receiver));
        kv_pair_destroy(take(&t.sender));
        kv_pair_destroy(take(&t.receiver));
        CHECK(clock_now_us() - start_us < GET_OUT_US);
        CHECK_INT(t.received.n_done, 1);
        rig_close(&t);
    }
}

#ifdef BATON_FAILPOINTS
/* One end never launches: the other one's kernel must not wait forever. (It waits when the transfer
 * is larger than NCCL's buffers; a smaller one would be sent without anybody to receive it.) */
static void a_stalled_peer_is_given_up(void)
{
    struct rig t;
    options.stall_us = 1000000;
    rig_open(&t, &flash);
    uint32_t page = 7;
    CHECK_OK(kv_pair_post(t.receiver, 0, &page, 1));
    CHECK_OK(kv_pair_post(t.sender, 0, &page, 1));
    CHECK_INT(record_wait(&t.sent, 1), ERR_OK);
    CHECK_OK(failpoint_set("kv.nccl@0*1=drop"));
    uint64_t start_us = clock_now_us();
    CHECK_OK(kv_pair_post(t.receiver, 1, all_pages, flash.n_pages));
    CHECK_OK(kv_pair_post(t.sender, 1, all_pages, flash.n_pages));
    CHECK_INT(record_wait(&t.received, 2), ERR_PEER_LOST);
    CHECK_INT(record_wait(&t.sent, 2), ERR_PEER_LOST);
    CHECK(clock_now_us() - start_us >= 1000000);
    CHECK(clock_now_us() - start_us < GET_OUT_US);
    printf("     given up after %.0f ms (1000 allowed)\n", ms_since(start_us));
    CHECK_OK(failpoint_set("kv.nccl=off"));
    options = kv_nccl_default();
    rig_close(&t);
}
#endif

/* NCCL wants a GPU per rank; two that share one must learn it, not hang. */
static void two_ranks_on_one_gpu_are_refused(void)
{
    struct rig t;
    uint32_t page = 1;
    loopback = false;
    rig_open(&t, &small);
    uint64_t start_us = clock_now_us();
    CHECK_OK(kv_pair_post(t.receiver, 0, &page, 1));
    CHECK_OK(kv_pair_post(t.sender, 0, &page, 1));
    CHECK_INT(record_wait(&t.sent, 1), ERR_PEER_LOST);
    CHECK_INT(record_wait(&t.received, 1), ERR_PEER_LOST);
    printf("     refused after %.0f ms\n", ms_since(start_us));
    rig_close(&t);
    loopback = true;
}

/* ---- two processes ---- */

/* What a child shall do: n transfers of n_pages pages each, one after the other. */
struct order {
    char address[WIRE_MAX_ADDRESS]; // to a sender
    uint32_t n, n_pages;
    bool is_flash;
    bool tells; // its parent before each post
    char failpoints[64];
};

static uint32_t order_page(const struct order *o, uint64_t seq, uint32_t i, uint32_t n_pages)
{
    return (uint32_t)((seq * 5 + i * 3) % n_pages); // 3 is prime to both pools' sizes
}

/* Sends or receives everything in turn. */
static void order_carry_out(struct kv_pair *pair, struct kv_pool *pool, struct record *r,
                            const struct order *o, bool send, int tell)
{
    uint32_t total = kv_pool_get_config(pool)->n_pages, pages[MAX_PAGES];
    for (uint64_t seq = 0; seq < o->n && !check_failures; seq++) {
        for (uint32_t i = 0; i < o->n_pages; i++) {
            pages[i] = order_page(o, seq, i, total);
            if (send)
                page_fill(pool, pages[i], seq, i);
        }
        if (tell >= 0)
            bytes_write(tell, "g", 1);
        CHECK_OK(kv_pair_post(pair, seq, pages, o->n_pages));
        enum err e = record_wait(r, seq + 1);
        CHECK_INT(e, ERR_OK);
        for (uint32_t i = 0; i < o->n_pages && !send && e == ERR_OK; i++)
            CHECK(page_is(pool, pages[i], seq, i));
    }
}

static int child_main(const char *role)
{
    bool send = !strcmp(role, "sender");
    struct rig t = {0};
    struct order o;
    char byte;
    log_init(role, LOG_ERROR);
    CHECK_OK(kv_nccl_register("127.0.0.1"));
    options = kv_nccl_default();
    from_device = to_device = 1; // the parent has 0
    bytes_read(CONTROL_FD, &o, sizeof(o));
    const struct geometry *g = o.is_flash ? &flash : &small;
    if (o.failpoints[0])
        CHECK_OK(failpoint_set(o.failpoints));
    if (send) {
        memcpy(t.address, o.address, sizeof(t.address));
        rig_sender(&t, g);
    } else {
        rig_receiver(&t, g);
        bytes_write(CONTROL_FD, t.address, sizeof(t.address));
    }
    order_carry_out(send ? t.sender : t.receiver, send ? t.from : t.to,
                    send ? &t.sent : &t.received, &o, send, o.tells ? CONTROL_FD : -1);
    bytes_read(CONTROL_FD, &byte, 1); // the parent has seen everything
    rig_close(&t);
    return check_failures ? 1 : 0;
}

/* Our end of a pair whose other end is a child. */
static void pair_with(struct rig *t, struct child *c, struct order *o, bool we_send)
{
    memset(t, 0, sizeof(*t));
    const struct geometry *g = o->is_flash ? &flash : &small;
    if (we_send) {
        bytes_write(c->control, o, sizeof(*o));
        bytes_read(c->control, t->address, sizeof(t->address));
        rig_sender(t, g);
    } else {
        rig_receiver(t, g);
        memcpy(o->address, t->address, sizeof(o->address));
        bytes_write(c->control, o, sizeof(*o));
    }
}

static void transfers_between_processes_arrive_whole(void)
{
    for (int we_send = 0; we_send < 2; we_send++) {
        struct order o = {.n = 300, .n_pages = 5};
        struct child c = child_start(we_send ? "receiver" : "sender");
        struct rig t;
        to_device = from_device = 0;
        pair_with(&t, &c, &o, we_send);
        order_carry_out(we_send ? t.sender : t.receiver, we_send ? t.from : t.to,
                        we_send ? &t.sent : &t.received, &o, we_send, -1);
        bytes_write(c.control, "q", 1);
        CHECK_INT(child_wait(&c), 0);
        rig_close(&t);
    }
}

/* The peer dies within transfer number `last`, at once or delay_us after it was posted there. */
static void peer_dies(bool we_send, const char *failpoints, uint32_t delay_us, double *worst_ms,
                      int *n_within)
{
    enum { LAST = 3 };
    struct order o = {.n = LAST + 1, .n_pages = 30, .is_flash = true, .tells = true};
    snprintf(o.failpoints, sizeof(o.failpoints), "%s", failpoints);
    struct child c = child_start(we_send ? "receiver" : "sender");
    struct rig t;
    to_device = from_device = 0;
    pair_with(&t, &c, &o, we_send);
    struct kv_pair *own = we_send ? t.sender : t.receiver;
    struct record *r = we_send ? &t.sent : &t.received;
    for (uint64_t seq = 0; seq <= LAST; seq++) {
        char byte;
        uint32_t pages[MAX_PAGES];
        for (uint32_t i = 0; i < o.n_pages; i++) {
            pages[i] = order_page(&o, seq, i, flash.n_pages);
            if (we_send)
                page_fill(t.from, pages[i], seq, i);
        }
        CHECK_OK(kv_pair_post(own, seq, pages, o.n_pages));
        bytes_read(c.control, &byte, 1);
        if (seq < LAST)
            CHECK_INT(record_wait(r, seq + 1), ERR_OK);
    }
    if (!failpoints[0]) {
        usleep(delay_us);
        kill(c.pid, SIGKILL);
    }
    uint64_t start_us = clock_now_us();
    int status = child_wait(&c);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    double reaped_ms = ms_since(start_us);
    enum err e = record_wait(r, LAST + 1);
    double told_ms = ms_since(start_us);
    CHECK(e == ERR_PEER_LOST || (e == ERR_OK && !failpoints[0]));
    *n_within += e != ERR_OK;
    kv_pair_destroy(take(we_send ? &t.sender : &t.receiver));
    double out_ms = ms_since(start_us);
    CHECK(out_ms * 1000 < GET_OUT_US);
    *worst_ms = fmax(*worst_ms, out_ms);
    printf("     we %s, peer killed %s: reaped %.0f, told %.0f, out after %.0f ms: %s\n",
           we_send ? "send" : "receive", failpoints[0] ? "before its kernel" : "at some moment",
           reaped_ms, told_ms, out_ms, err_name(e));
    CHECK(cudaDeviceSynchronize() == cudaSuccess); // our context lives
    rig_close(&t);
}

/* While peers of ours die, a pair with somebody else goes on. */
static void a_killed_peer_is_survived(void)
{
    double worst_ms = 0;
    int n_within = 0;
    struct order o = {.n = 4, .n_pages = 5};
    struct child bystander = child_start("sender");
    struct rig t;
    to_device = from_device = 0;
    pair_with(&t, &bystander, &o, false);
    for (int we_send = 0; we_send < 2; we_send++) {
        struct order one = o;
#ifdef BATON_FAILPOINTS
        peer_dies(we_send, "kv.nccl@3=kill", 0, &worst_ms, &n_within);
#endif
        for (int i = 0; i < 3; i++)
            peer_dies(we_send, "", rng(3000), &worst_ms, &n_within);
        for (uint64_t seq = (uint64_t)we_send * 2; seq < (uint64_t)we_send * 2 + 2; seq++) {
            uint32_t pages[MAX_PAGES];
            for (uint32_t i = 0; i < one.n_pages; i++)
                pages[i] = order_page(&one, seq, i, small.n_pages);
            CHECK_OK(kv_pair_post(t.receiver, seq, pages, one.n_pages));
            CHECK_INT(record_wait(&t.received, seq + 1), ERR_OK);
            for (uint32_t i = 0; i < one.n_pages; i++)
                CHECK(page_is(t.to, pages[i], seq, i));
        }
    }
    bytes_write(bystander.control, "q", 1);
    CHECK_INT(child_wait(&bystander), 0);
    rig_close(&t);
    printf("     %d died within a transfer, the slowest way out took %.0f ms\n", n_within,
           worst_ms);
}

/* ---- without a GPU ---- */

static void wrong_settings_are_refused(void)
{
    struct kv_nccl_options o = kv_nccl_default();
    CHECK_OK(kv_nccl_configure(&o));
    o.max_ctas = 0;
    CHECK_INT(kv_nccl_configure(&o), ERR_INVALID);
    o.max_ctas = 33;
    CHECK_INT(kv_nccl_configure(&o), ERR_INVALID);
    o = kv_nccl_default();
    o.stall_us = 0;
    CHECK_INT(kv_nccl_configure(&o), ERR_INVALID);

    uint32_t bits = 0;
    setenv("NCCL_COMM_ID", "10.0.0.1:1", 1);
    CHECK_INT(kv_nccl_register("127.0.0.1"), ERR_INVALID);
    CHECK_INT(kv_transports_parse("nccl", true, &bits), ERR_INVALID);
    unsetenv("NCCL_COMM_ID");
    CHECK_OK(kv_nccl_register("127.0.0.1"));
    CHECK_OK(kv_transports_parse("nccl", true, &bits));
    CHECK_INT(bits, WIRE_KV_NCCL);
    CHECK_STR(getenv("NCCL_NVLS_ENABLE"), "0");
    CHECK_STR(getenv("NCCL_SOCKET_IFNAME"), "lo");

    struct kv_pool_config c = {.n_pages = 1, .n_layers = 1, .kv_width = 8, .dtype_bytes = 2};
    OWNED(kv_pool) host = NULL;
    CHECK_OK(kv_pool_create(&c, &host));
    struct record r;
    record_init(&r);
    struct kv_pair_config p = config_of(host, &r);
    struct kv_pair *pair = NULL;
    char address[WIRE_MAX_ADDRESS] = "unset";
    CHECK_INT(kv_pair_listen(WIRE_KV_NCCL, &p, "127.0.0.1", "", address, &pair), ERR_INVALID);
    CHECK_INT(kv_pair_connect(WIRE_KV_NCCL, &p, "127.0.0.1:1", &pair), ERR_INVALID);
    CHECK_STR(address, "unset");
}

static void pairs_in_this_process(void)
{
    RUN(a_receiver_may_post_late);
    RUN(random_transfers_arrive_whole);
    RUN(any_number_of_ctas_arrives_whole);
    RUN(an_aborted_transfer_touches_nothing_more);
    RUN(pairs_are_destroyed_in_any_state);
}

int main(int argc, char **argv)
{
    crash_report();
    if (argc == 3 && !strcmp(argv[1], "child"))
        return child_main(argv[2]);
    const char *seed = getenv("BATON_TEST_SEED"), *level = getenv("VERBOSE");
    rng_state = seed ? strtoull(seed, NULL, 0) : clock_now_us();
    printf("BATON_TEST_SEED=%llu\n", (unsigned long long)rng_state);
    setvbuf(stdout, NULL, _IOLBF, 0);
    log_init("test", level ? LOG_DEBUG : LOG_ERROR);
    for (uint32_t i = 0; i < MAX_PAGES; i++)
        all_pages[i] = i;
    RUN(wrong_settings_are_refused);
    options = kv_nccl_default();
    int n_gpus = count_gpus();
    if (n_gpus == 0) {
        printf("skipped the rest: no CUDA device\n");
        return check_failures ? 1 : 77;
    }
    printf("one rank on one GPU:\n");
    loopback = true;
    pairs_in_this_process();
    RUN(two_ranks_on_one_gpu_are_refused);
    if (n_gpus < 2) {
        printf("skipped two ranks: one GPU\n");
        return check_done();
    }
    printf("two ranks on two GPUs:\n");
    loopback = false;
    to_device = 1;
    pairs_in_this_process();
#ifdef BATON_FAILPOINTS
    RUN(a_stalled_peer_is_given_up);
#endif
    printf("two processes:\n");
    RUN(transfers_between_processes_arrive_whole);
    RUN(a_killed_peer_is_survived);
    return check_done();
}
