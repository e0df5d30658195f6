/* nccl_bench.c: handing KV pages from one GPU to another over NCCL, as the workers do it: pairs of
 * kv_transport.h between two processes, pages of GLM-4.7-Flash (3.54 MB) all over both pools.
 *
 *   nccl_bench [quick | kill]
 *
 * For each number of CTAs and pages per transfer:
 *   us      post to done at the sender, one transfer at a time: median and worst
 *   GB/s    several posted at once, one direction; then both directions at the same time, the sum
 * Then the other process is killed within a transfer: how long until ours knows (told) and is rid
 * of the pair (out). On one GPU it is a rank that sends to itself, in one process, and nobody is
 * killed. The last line is all of it as JSON.
 */
#include <string.h>

#include "check.h"
#include "tests/common/engine/plain_device.h"
#include "common/base/hash.h"
#include "common/base/log.h"
#include "common/engine/kv_child.h"
#include "common/engine/kv_nccl.h"
#include "common/engine/kv_record.h"

#define N_PAGES   96u /* of a pool */
#define MAX_PAGES 64u
#define N_SINGLE  20u /* transfers one at a time, and */
#define N_QUEUED  16u /* at once */

static const uint32_t page_counts[] = {1, 2, 4, 8, 16, 32, 64};
static bool loopback;

/* ---- one end of a pair: pages leave or arrive ---- */

struct end {
    struct kv_pool *pool;
    struct kv_pair *pair;
    struct record record;
    uint64_t seq;
};

static void end_open(struct end *e, int device)
{
    struct kv_pool_config c = {.n_pages = N_PAGES,
                               .n_layers = 48,
                               .kv_width = 576,
                               .dtype_bytes = 2,
                               .device = plain_device(device)};
    memset(e, 0, sizeof(*e));
    record_init(&e->record);
    CHECK_OK(kv_pool_create(&c, &e->pool));
    REQUIRE(e->pool);
    REQUIRE(cudaMemset(kv_pool_base(e->pool), 1 + device, N_PAGES * kv_pool_page_bytes(e->pool)) ==
            cudaSuccess);
    REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
}

static struct kv_pair_config end_config(struct end *e)
{
    return (struct kv_pair_config){
        .pool = e->pool, .token = {1, 2}, .done = on_done, .user = &e->record};
}

static void end_close(struct end *e)
{
    kv_pair_destroy(take(&e->pair));
    kv_pool_destroy(take(&e->pool));
}

/* Posts n transfers of n_pages pages that are nowhere neighbours. */
static void end_post(struct end *e, uint32_t n, uint32_t n_pages)
{
    uint32_t pages[MAX_PAGES];
    for (; n > 0; n--, e->seq++) {
        for (uint32_t i = 0; i < n_pages; i++)
            pages[i] = (uint32_t)((e->seq * 11 + i * 29) % N_PAGES);
        CHECK_OK(kv_pair_post(e->pair, e->seq, pages, n_pages));
    }
}

static void end_wait(struct end *e) { CHECK_INT(record_wait(&e->record, e->seq), ERR_OK); }

/* ---- the other process does what it is told ---- */

enum verb { LISTEN, CONNECT, POST, RUN_QUEUED, CLOSE };

struct order {
    enum verb verb;
    int max_ctas;
    uint32_t n, n_pages;
    char address[WIRE_MAX_ADDRESS];
};

/* The other end: in a process on the second GPU, or, in a loopback, here. */
static struct child other;
static struct end here_receiver, child_receiver, child_sender;

static void options_set(int max_ctas, const void *loopback_base)
{
    struct kv_nccl_options o = kv_nccl_default();
    o.max_ctas = max_ctas;
    o.loopback_base = loopback_base;
    CHECK_OK(kv_nccl_configure(&o));
}

static void receiver_listen(struct end *e, char ret[WIRE_MAX_ADDRESS])
{
    struct kv_pair_config c = end_config(e);
    CHECK_OK(kv_pair_listen(WIRE_KV_NCCL, &c, "127.0.0.1", "", ret, &e->pair));
}

static void sender_connect(struct end *e, const char *address)
{
    struct kv_pair_config c = end_config(e);
    CHECK_OK(kv_pair_connect(WIRE_KV_NCCL, &c, address, &e->pair));
}

static void child_do(struct order *o)
{
    switch (o->verb) {
    case LISTEN:
        options_set(o->max_ctas, NULL);
        end_open(&child_receiver, 1);
        receiver_listen(&child_receiver, o->address);
        break;
    case CONNECT:
        end_open(&child_sender, 1);
        sender_connect(&child_sender, o->address);
        break;
    case POST:
        end_post(&child_receiver, o->n, o->n_pages);
        break;
    case RUN_QUEUED:
        end_post(&child_sender, o->n, o->n_pages);
        end_wait(&child_sender);
        break;
    case CLOSE:
        end_close(&child_receiver);
        if (child_sender.pool)
            end_close(&child_sender);
        break;
    }
}

static int child_main(void)
{
    log_init("bench-child", LOG_ERROR);
    CHECK_OK(kv_nccl_register("127.0.0.1"));
    struct order o;
    while (recv(CONTROL_FD, &o, sizeof(o), MSG_WAITALL) == (ssize_t)sizeof(o)) {
        child_do(&o);
        bytes_write(CONTROL_FD, &o, sizeof(o));
    }
    return check_failures != 0;
}

static void tell(const struct order *o) { bytes_write(other.control, o, sizeof(*o)); }

static struct order answer(void)
{
    struct order o;
    bytes_read(other.control, &o, sizeof(o));
    return o;
}

static struct order ask(const struct order *o)
{
    tell(o);
    return answer();
}

/* ---- a setting: a pair in each direction ---- */

struct setting {
    int max_ctas;
    struct end sender, back; // back: receives from the other process
    double up_ms;
};

static void setting_open(struct setting *s)
{
    end_open(&s->sender, 0);
    uint64_t start_us = clock_now_us();
    struct order o = {.verb = LISTEN, .max_ctas = s->max_ctas};
    options_set(s->max_ctas, loopback ? kv_pool_base(s->sender.pool) : NULL);
    if (loopback) {
        end_open(&here_receiver, 0);
        receiver_listen(&here_receiver, o.address);
    } else {
        o = ask(&o);
    }
    sender_connect(&s->sender, o.address);
    struct order one = {.verb = POST, .n = 1, .n_pages = 1};
    if (loopback)
        end_post(&here_receiver, 1, 1);
    else
        ask(&one);
    end_post(&s->sender, 1, 1);
    end_wait(&s->sender);
    s->up_ms = (double)(clock_now_us() - start_us) / 1000;
    if (loopback)
        return;
    end_open(&s->back, 0);
    o.verb = CONNECT;
    receiver_listen(&s->back, o.address);
    ask(&o);
    end_post(&s->back, 1, 1);
    o = (struct order){.verb = RUN_QUEUED, .n = 1, .n_pages = 1};
    ask(&o);
}

static void setting_close(struct setting *s)
{
    struct order o = {.verb = CLOSE};
    end_close(&s->sender);
    if (loopback) {
        end_close(&here_receiver);
        return;
    }
    end_close(&s->back);
    ask(&o);
}

static void receiver_post(uint32_t n, uint32_t n_pages)
{
    struct order o = {.verb = POST, .n = n, .n_pages = n_pages};
    if (loopback)
        end_post(&here_receiver, n, n_pages);
    else
        ask(&o);
}

struct row {
    int max_ctas;
    uint32_t n_pages;
    double median_us, worst_us, one_gb_s, both_gb_s;
};

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double gb_per_s(const struct end *e, uint32_t n_pages, uint64_t us)
{
    return (double)(N_QUEUED * n_pages * kv_pool_page_bytes(e->pool)) / (double)us / 1000;
}

static struct row row_measure(struct setting *s, uint32_t n_pages)
{
    struct row r = {.max_ctas = s->max_ctas, .n_pages = n_pages};
    double us[N_SINGLE];
    receiver_post(N_SINGLE, n_pages);
    for (uint32_t i = 0; i < N_SINGLE; i++) {
        uint64_t start_us = clock_now_us();
        end_post(&s->sender, 1, n_pages);
        end_wait(&s->sender);
        us[i] = (double)(clock_now_us() - start_us);
    }
    qsort(us, N_SINGLE, sizeof(us[0]), by_value);
    r.median_us = us[N_SINGLE / 2];
    r.worst_us = us[N_SINGLE - 1];

    receiver_post(N_QUEUED, n_pages);
    uint64_t start_us = clock_now_us();
    end_post(&s->sender, N_QUEUED, n_pages);
    end_wait(&s->sender);
    r.one_gb_s = gb_per_s(&s->sender, n_pages, clock_now_us() - start_us);
    if (loopback)
        return r;

    receiver_post(N_QUEUED, n_pages);
    end_post(&s->back, N_QUEUED, n_pages);
    struct order o = {.verb = RUN_QUEUED, .n = N_QUEUED, .n_pages = n_pages};
    start_us = clock_now_us();
    tell(&o);
    end_post(&s->sender, N_QUEUED, n_pages);
    end_wait(&s->sender);
    end_wait(&s->back);
    r.both_gb_s = 2 * gb_per_s(&s->sender, n_pages, clock_now_us() - start_us);
    answer();
    return r;
}

/* ---- the other process dies ---- */

struct death {
    bool we_send;
    enum err result;
    double up_ms, told_ms, out_ms;
};

static struct death death_measure(bool we_send, uint32_t delay_us)
{
    struct death d = {.we_send = we_send};
    struct setting s = {.max_ctas = kv_nccl_default().max_ctas};
    other = child_start("");
    setting_open(&s);
    struct end *own = we_send ? &s.sender : &s.back;
    d.up_ms = s.up_ms;
    uint64_t before = own->seq;
    struct order run = {.verb = RUN_QUEUED, .n = N_QUEUED, .n_pages = MAX_PAGES};
    if (we_send)
        receiver_post(N_QUEUED, MAX_PAGES);
    end_post(own, N_QUEUED, MAX_PAGES);
    if (!we_send)
        tell(&run);
    CHECK_INT(record_wait(&own->record, before + 1), ERR_OK);
    usleep(delay_us); // some moment within one of the others
    uint64_t start_us = clock_now_us();
    kill(other.pid, SIGKILL);
    d.result = record_wait(&own->record, own->seq);
    d.told_ms = (double)(clock_now_us() - start_us) / 1000;
    kv_pair_destroy(take(&own->pair));
    d.out_ms = (double)(clock_now_us() - start_us) / 1000;
    CHECK_INT(d.result, ERR_PEER_LOST);
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
    end_close(&s.sender);
    end_close(&s.back);
    child_wait(&other);
    return d;
}

/* ---- report ---- */

static struct row rows[256];
static struct death deaths[16];
static int n_rows, n_deaths;

static void settings_measure(bool quick)
{
    printf("%4s %5s %9s %9s %9s %9s\n", "CTAs", "pages", "us", "worst us", "GB/s", "both GB/s");
    for (int ctas = quick ? 4 : 1; ctas <= (quick ? 4 : 16); ctas *= 2) {
        struct setting s = {.max_ctas = ctas};
        setting_open(&s);
        printf("up after %.0f ms\n", s.up_ms);
        for (size_t i = 0; i < ARRAY_LEN(page_counts) && !check_failures; i++) {
            struct row r = row_measure(&s, page_counts[i]);
            printf("%4d %5u %9.0f %9.0f %9.1f %9.1f\n", ctas, r.n_pages, r.median_us, r.worst_us,
                   r.one_gb_s, r.both_gb_s);
            rows[n_rows++] = r;
        }
        setting_close(&s);
    }
}

static void deaths_measure(void)
{
    for (int i = 0; i < 10; i++) {
        struct death d = death_measure(i % 2, (uint32_t)i * 777);
        printf(
            "up after %.0f ms, we %s, the peer is killed: told after %.0f ms, out after %.0f ms: "
            "%s\n",
            d.up_ms, d.we_send ? "send" : "receive", d.told_ms, d.out_ms, err_name(d.result));
        deaths[n_deaths++] = d;
    }
}

static void json_print(int n_gpus)
{
    printf("{\"gpus\": %d, \"mode\": \"%s\", \"page_bytes\": %d, \"transfers\": [", n_gpus,
           loopback ? "one rank to itself" : "two ranks", 48 * 64 * 576 * 2);
    for (int i = 0; i < n_rows; i++)
        printf("%s{\"ctas\": %d, \"pages\": %u, \"median_us\": %.0f, \"worst_us\": %.0f, "
               "\"gb_s\": %.1f, \"both_gb_s\": %.1f}",
               i ? ", " : "", rows[i].max_ctas, rows[i].n_pages, rows[i].median_us,
               rows[i].worst_us, rows[i].one_gb_s, rows[i].both_gb_s);
    printf("], \"killed\": [");
    for (int i = 0; i < n_deaths; i++)
        printf("%s{\"we\": \"%s\", \"told_ms\": %.1f, \"out_ms\": %.1f}", i ? ", " : "",
               deaths[i].we_send ? "send" : "receive", deaths[i].told_ms, deaths[i].out_ms);
    printf("]}\n");
}

int main(int argc, char **argv)
{
    crash_report();
    if (argc > 1 && !strcmp(argv[1], "child"))
        return child_main();
    setvbuf(stdout, NULL, _IOLBF, 0);
    log_init("bench", getenv("VERBOSE") ? LOG_DEBUG : LOG_ERROR);
    int n_gpus = count_gpus();
    if (n_gpus == 0) {
        printf("skipped: no CUDA device\n");
        return 77;
    }
    CHECK_OK(kv_nccl_register("127.0.0.1"));
    loopback = n_gpus < 2;
    printf("%s\n", loopback ? "one GPU: a rank that sends to itself, nothing crosses a link"
                            : "cuda:0 to cuda:1, two processes");
    const char *part = argc > 1 ? argv[1] : "";
    if (strcmp(part, "kill")) {
        if (!loopback)
            other = child_start("");
        settings_measure(!strcmp(part, "quick"));
        if (!loopback) {
            shutdown(other.control, SHUT_RDWR);
            CHECK_INT(child_wait(&other), 0);
        }
    }
    if (!loopback)
        deaths_measure();
    json_print(n_gpus);
    return check_done();
}
