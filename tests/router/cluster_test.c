/* cluster_test.c: the cluster over a real hub, with scripted workers on real lines in the same
 * loop. */
#include "router/cluster.h"

#include <uv.h>

#include "check.h"
#include "common/base/clock.h"
#include "common/base/link.h"
#include "common/base/log.h"
#include "common/base/own.h"
#include "router/text/detokenizer.h"

#define N_SEEN  64
#define WAIT_US 4000000u

static uv_loop_t loop;
static struct tokenizer *tokenizer;
static struct ids words; // something to say
static struct config config;
static struct cluster *cluster;
static struct metrics *metrics;
static char endpoint[128];

static const struct wire_fingerprint fingerprint = {.protocol = WIRE_VERSION,
                                                    .n_layers = 3,
                                                    .n_mtp_layers = 1,
                                                    .page_tokens = 64,
                                                    .kv_width = 576,
                                                    .kv_dtype = WIRE_F32,
                                                    .vocab = 3072,
                                                    .hidden = 256,
                                                    .model_hash = 77,
                                                    .tokenizer_hash = 99};

/* -- a scripted worker -- */

struct seen {
    uint16_t type;
    uint64_t req_id;
    uint32_t attempt;
    struct wire_submit submit;
    int32_t last_id;
    int32_t bias_id; // the last one
    float bias_value;
    char grammar[32];
};

struct fake {
    struct link_line *line;
    struct wire_hello hello;
    struct wire_beat beat;
    bool welcome, lost, mute;
    uint64_t epoch;
    char refused[WIRE_MAX_TEXT];
    struct seen seen[N_SEEN];
    int n_seen, n_peers, n_gone;
    uint32_t idx;
    uv_timer_t timer;
};

static void fake_send(struct fake *f, struct wire_buf *b)
{
    enum err e = wire_end(b);
    if (e == ERR_OK)
        e = link_line_send(f->line, b);
    if (e != ERR_OK && e != ERR_PEER_LOST)
        CHECK_OK(e);
    wire_buf_finish(b);
}

static void fake_hello(struct fake *f)
{
    struct wire_buf b = {0};
    *(struct wire_hello *)wire_begin(&b, WIRE_HELLO, 0, 0) = f->hello;
    fake_send(f, &b);
}

static void fake_beat(struct fake *f)
{
    struct wire_buf b = {0};
    *(struct wire_beat *)wire_begin(&b, WIRE_BEAT, 0, 0) = f->beat;
    fake_send(f, &b);
}

static void on_fake(void *user, enum link_event event, const struct wire_msg *m, const char *text)
{
    struct fake *f = user;
    if (event == LINK_LOST) {
        f->lost = true;
        return;
    }
    switch (m->head.type) {
    case WIRE_WELCOME:
        f->welcome = true;
        f->epoch = m->head.epoch;
        f->idx = ((const struct wire_welcome *)m->body)->worker_idx;
        link_line_set_epoch(f->line, f->epoch);
        if (!f->mute)
            fake_beat(f);
        break;
    case WIRE_REFUSE:
        memcpy(f->refused, ((const struct wire_text *)m->body)->text, sizeof(f->refused));
        break;
    case WIRE_PEER:
        f->n_peers++;
        break;
    case WIRE_GONE:
        f->n_gone++;
        break;
    case WIRE_SUBMIT:
    case WIRE_CANCEL: {
        REQUIRE(f->n_seen < N_SEEN);
        struct seen *s = &f->seen[f->n_seen++];
        *s = (struct seen){
            .type = m->head.type, .req_id = m->head.req_id, .attempt = m->head.attempt};
        if (m->head.type == WIRE_CANCEL)
            break;
        s->submit = *(const struct wire_submit *)m->body;
        if (s->submit.n_ids)
            s->last_id = ((const int32_t *)m->tail)[s->submit.n_ids - 1];
        if (s->submit.n_bias) {
            uint32_t at = s->submit.n_ids + s->submit.n_bias;
            s->bias_id = ((const int32_t *)m->tail)[at - 1];
            s->bias_value = ((const float *)m->tail)[at + s->submit.n_bias - 1];
        }
        snprintf(s->grammar, sizeof(s->grammar), "%.*s", (int)s->submit.n_grammar,
                 (const char *)m->tail + m->tail_bytes - s->submit.n_grammar);
        break;
    }
    default:
        break;
    }
}

static void on_fake_timer(uv_timer_t *t)
{
    struct fake *f = t->data;
    if (f->welcome && !f->mute && !f->refused[0])
        fake_beat(f);
}

static struct fake *fake_create(enum wire_role role, const char *name)
{
    static uint64_t n_instances = 1000;
    struct fake *f = calloc(1, sizeof(*f));
    REQUIRE(f != NULL);
    f->hello = (struct wire_hello){.role = role,
                                   .transports = WIRE_KV_SHM,
                                   .instance = ++n_instances,
                                   .fingerprint = fingerprint,
                                   .total_pages = 512,
                                   .max_running = 32,
                                   .chunk_tokens = role == WIRE_PREFILL ? 256 : 0,
                                   .max_total_tokens = 4096};
    snprintf(f->hello.name, sizeof(f->hello.name), "%s", name);
    f->beat.free_pages = 512;
    struct link_limits limits = {.dead_us = 3000000, .send_hwm = 1000};
    REQUIRE(link_line_create(&loop, endpoint, role, f->hello.instance, limits, on_fake, f,
                             &f->line) == ERR_OK);
    uv_timer_init(&loop, &f->timer);
    f->timer.data = f;
    uv_timer_start(&f->timer, on_fake_timer, 20, 20);
    return f;
}

static void on_fake_close(uv_handle_t *h) { free(h->data); }

static void fake_destroy(struct fake *f)
{
    link_line_destroy(f->line);
    uv_close((uv_handle_t *)&f->timer, on_fake_close);
}

/* Tokens at a position of the output; words are what is said there. */
static void fake_tokens_of(struct fake *f, uint64_t req_id, uint32_t attempt, uint32_t first,
                           const int32_t *ids, uint32_t n, enum wire_finish finish)
{
    struct wire_buf b = {0};
    struct wire_tokens *t = wire_begin(&b, WIRE_TOKENS, 0, 0);
    t->n_streams = 1;
    struct wire_stream s = {.req_id = req_id,
                            .attempt = attempt,
                            .first_pos = first,
                            .n_tokens = (uint16_t)n,
                            .finish = (uint16_t)finish,
                            .n_logprobs = -1,
                            .n_cached = f->hello.role == WIRE_PREFILL ? 2 : 0,
                            .prefill_us = f->hello.role == WIRE_PREFILL ? 10 : 0};
    wire_put(&b, &s, sizeof(s));
    wire_put(&b, ids, n * sizeof(*ids));
    fake_send(f, &b);
}

static void fake_tokens(struct fake *f, uint64_t req_id, uint32_t attempt, uint32_t first,
                        uint32_t n, enum wire_finish finish)
{
    fake_tokens_of(f, req_id, attempt, first, words.data + first, n, finish);
}

static void fake_failed(struct fake *f, uint64_t req_id, uint32_t attempt, enum err code)
{
    struct wire_buf b = {0};
    struct wire_failed *w = wire_begin(&b, WIRE_FAILED, req_id, attempt);
    w->code = code;
    snprintf(w->text, sizeof(w->text), "as scripted");
    fake_send(f, &b);
}

static struct seen *find_seen(struct fake *f, uint16_t type, uint64_t req_id, uint32_t attempt)
{
    for (int i = 0; i < f->n_seen; i++)
        if (f->seen[i].type == type && f->seen[i].req_id == req_id && f->seen[i].attempt == attempt)
            return &f->seen[i];
    return NULL;
}

/* -- a client -- */

struct client {
    struct gen *gen;
    uint64_t id;
    char text[4096];
    size_t n_text;
    int32_t ids[512];
    int n_ids, n_chunks;
    bool ended, failed, cancel_in_chunk;
    struct gen_end end;
    char stop_string[64];
    enum err code;
    char why[256];
};

static void on_chunk(void *user, const struct gen_chunk *k)
{
    struct client *c = user;
    REQUIRE(c->n_text + k->n_text < sizeof(c->text) && c->n_ids + k->n_ids < 512);
    memcpy(c->text + c->n_text, k->text, k->n_text);
    c->n_text += k->n_text;
    for (int i = 0; i < k->n_ids; i++)
        c->ids[c->n_ids++] = k->ids[i];
    c->n_chunks++;
    if (c->cancel_in_chunk)
        gen_cancel(c->gen);
}

static void on_end(void *user, const struct gen_end *e)
{
    struct client *c = user;
    CHECK(!c->ended && !c->failed);
    c->ended = true;
    c->end = *e;
    snprintf(c->stop_string, sizeof(c->stop_string), "%s", e->stop_string ? e->stop_string : "");
}

static void on_error(void *user, enum err code, const char *text)
{
    struct client *c = user;
    CHECK(!c->ended && !c->failed);
    c->failed = true;
    c->code = code;
    snprintf(c->why, sizeof(c->why), "%s", text);
}

static struct gen_params params_of(uint32_t max_tokens)
{
    static const int32_t prompt[] = {1, 2, 3, 4, 5};
    return (struct gen_params){.prompt = prompt,
                               .n_prompt = 5,
                               .sampling = {.seed = 7,
                                            .temperature = 1,
                                            .top_p = 1,
                                            .repetition_penalty = 1,
                                            .n_logprobs = -1,
                                            .max_tokens = max_tokens},
                               .skip_special = true,
                               .arrival_us = clock_now_us()};
}

static enum err client_try(struct client *c, const struct gen_params *p)
{
    static const struct gen_callbacks callbacks = {on_chunk, on_end, on_error};
    *c = (struct client){.cancel_in_chunk = c->cancel_in_chunk};
    enum err e = gen_start(cluster, p, &callbacks, c, &c->gen);
    if (e == ERR_OK)
        c->id = gen_id(c->gen);
    CHECK(!c->ended && !c->failed && !c->n_chunks); // never from inside
    return e;
}

static void client_start(struct client *c, uint32_t max_tokens)
{
    struct gen_params p = params_of(max_tokens);
    CHECK_OK(client_try(c, &p));
}

/* What the first n words read as. */
static bool says(const struct client *c, uint32_t n)
{
    struct detokenizer d;
    struct json_out o = {0};
    detokenizer_init(&d, tokenizer, true);
    for (uint32_t i = 0; i < n; i++)
        detokenizer_push(&d, words.data[i], &o);
    bool same = o.len == c->n_text && !memcmp(o.data, c->text, o.len);
    if (!same)
        fprintf(stderr, "got \"%.*s\", want \"%.*s\"\n", (int)c->n_text, c->text, (int)o.len,
                o.data);
    json_out_finish(&o);
    return same && (uint32_t)c->n_ids >= n && !memcmp(c->ids, words.data, n * sizeof(int32_t));
}

/* -- the loop -- */

static uv_timer_t ticker;
static void on_ticker(uv_timer_t *t) {}

#define UNTIL(cond)                                                                                \
    do {                                                                                           \
        uint64_t give_up_ = clock_now_us() + WAIT_US;                                              \
        while (!(cond) && clock_now_us() < give_up_)                                               \
            uv_run(&loop, UV_RUN_ONCE);                                                            \
        CHECK(cond);                                                                               \
    } while (0)

static void run_for(uint64_t us)
{
    uint64_t end = clock_now_us() + us;
    while (clock_now_us() < end)
        uv_run(&loop, UV_RUN_ONCE);
}

static struct fake *p0, *d0, *d1;

static void set_up(void)
{
    static const int32_t eos[] = {3000};
    static int n;
    snprintf(endpoint, sizeof(endpoint), "ipc:///tmp/cluster_test-%d-%d.sock", (int)getpid(), n++);
    config.router_endpoint = endpoint;
    metrics = metrics_create();
    struct cluster_config cc = {.loop = &loop,
                                .config = &config,
                                .tokenizer = tokenizer,
                                .model = {.name = "demo",
                                          .max_total_tokens = 4096,
                                          .vocab = 3072,
                                          .n_token_ids = 3072,
                                          .eos = eos,
                                          .n_eos = 1},
                                .fingerprint = {.vocab = 3072, .tokenizer_hash = 99},
                                .metrics = metrics};
    enum err e = cluster_create(&cc, &cluster);
    CHECK_OK(e);
    REQUIRE(e == ERR_OK);
}

static void defaults(void)
{
    char *argv[] = {(char *)"cluster_test", NULL};
    REQUIRE(config_parse(CONFIG_ROUTER, 1, argv, &config) == ERR_OK);
}

static int requests(const char *state)
{
    json_t *a = cluster_accounting(cluster);
    int n = (int)json_integer_value(json_object_get(json_object_get(a, "requests"), state));
    json_decref(a);
    return n;
}

static int64_t dropped(const char *what)
{
    json_t *a = cluster_accounting(cluster);
    int64_t n = json_integer_value(json_object_get(json_object_get(a, "dropped"), what));
    json_decref(a);
    return n;
}

static void tear_down(void)
{
    UNTIL(requests("gens") == 0 && requests("ending") == 0);
    CHECK_INT(requests("suspects"), 0);
    struct json_out o = {0};
    cluster_update_metrics(cluster);
    metrics_write(metrics, &o);
    CHECK(!o.failed && o.len > 1000);
    json_out_finish(&o);
    cluster_destroy(cluster);
    if (p0)
        fake_destroy(p0);
    if (d0)
        fake_destroy(d0);
    if (d1)
        fake_destroy(d1);
    p0 = d0 = d1 = NULL;
    run_for(30000);
    metrics_destroy(metrics);
    unlink(endpoint + 6);
}

static void join(struct fake *f)
{
    fake_hello(f);
    UNTIL(f->welcome);
}

/* One prefill worker and n decode workers, registered. */
static void set_up_with(int n_decode)
{
    set_up();
    p0 = fake_create(WIRE_PREFILL, "prefill/0");
    join(p0);
    for (int i = 0; i < n_decode; i++) {
        struct fake **d = i ? &d1 : &d0;
        *d = fake_create(WIRE_DECODE, i ? "decode/1" : "decode/0");
        join(*d);
    }
    UNTIL(cluster_ready(cluster));
    run_for(50000); // first beats of all
}

/* Which decode worker has this attempt; the other one in *other. */
static struct fake *holder(uint64_t id, uint32_t attempt, struct fake **other)
{
    bool first = d0 && find_seen(d0, WIRE_SUBMIT, id, attempt);
    *other = first ? d1 : d0;
    return first ? d0 : d1;
}

/* -- tests -- */

static void a_request_runs_to_its_end(void)
{
    set_up_with(1);
    CHECK_INT(p0->n_peers, 1);
    CHECK_INT(d0->n_peers, 1);
    struct client c = {0};
    client_start(&c, 20);
    UNTIL(find_seen(p0, WIRE_SUBMIT, c.id, 0) && find_seen(d0, WIRE_SUBMIT, c.id, 0));
    struct seen *at_p = find_seen(p0, WIRE_SUBMIT, c.id, 0);
    struct seen *at_d = find_seen(d0, WIRE_SUBMIT, c.id, 0);
    CHECK_INT(at_p->submit.n_ids, 5);
    CHECK_INT(at_p->last_id, 5);
    CHECK_INT(at_p->submit.peer_idx, d0->idx);
    CHECK_INT(at_p->submit.peer_instance, d0->hello.instance);
    CHECK_INT(at_d->submit.n_ids, 0);
    CHECK_INT(at_d->submit.n_prompt, 5);
    CHECK_INT(at_d->submit.peer_idx, p0->idx);
    CHECK_INT(at_d->submit.sampling.max_tokens, 20);

    fake_tokens(p0, c.id, 0, 0, 1, WIRE_RUNNING);
    UNTIL(c.n_ids == 1);
    fake_tokens(d0, c.id, 0, 0, 3, WIRE_RUNNING); // starts at the first token again
    UNTIL(c.n_ids == 3);
    fake_tokens(d0, c.id, 0, 3, 4, WIRE_RUNNING);
    UNTIL(c.n_ids == 7);
    int32_t last[] = {words.data[7], 3000};
    fake_tokens_of(d0, c.id, 0, 7, last, 2, WIRE_STOP);
    UNTIL(c.ended);
    CHECK(says(&c, 8));
    CHECK_INT(c.end.finish, GEN_STOP);
    CHECK_INT(c.end.stop_id, 3000);
    CHECK(c.end.stop_string == NULL);
    CHECK_INT(c.end.usage.n_prompt, 5);
    CHECK_INT(c.end.usage.n_output, 9);
    CHECK_INT(c.end.usage.n_cached, 2);
    CHECK_INT(c.end.usage.n_attempts, 1);
    run_for(50000);
    CHECK(!find_seen(p0, WIRE_CANCEL, c.id, 0) && !find_seen(d0, WIRE_CANCEL, c.id, 0));
    tear_down();
}

static void strangers_are_refused_by_the_field(void)
{
    set_up_with(0 + 1);
    struct fake *f = fake_create(WIRE_DECODE, "decode/9");
    f->hello.fingerprint.kv_width = 512;
    fake_hello(f);
    UNTIL(f->refused[0]);
    CHECK(strstr(f->refused, "kv_width") != NULL);
    CHECK(!f->welcome);
    fake_destroy(f);

    f = fake_create(WIRE_DECODE, "decode/0");
    fake_hello(f);
    UNTIL(f->refused[0]);
    CHECK(strstr(f->refused, "decode/0") != NULL);
    CHECK(!f->welcome && cluster_ready(cluster));
    fake_destroy(f);
    run_for(50000);
    CHECK_INT(p0->n_peers, 1);
    tear_down();
}

static void the_routers_own_files_count(void)
{
    set_up();
    p0 = fake_create(WIRE_PREFILL, "prefill/0");
    p0->hello.fingerprint.tokenizer_hash = 98;
    fake_hello(p0);
    UNTIL(p0->refused[0]);
    CHECK(strstr(p0->refused, "tokenizer_hash") != NULL);
    int retry = 0;
    CHECK_INT(cluster_admits(cluster, 1, &retry), ERR_UNAVAILABLE);
    CHECK(retry >= 1 && retry <= 5);
    tear_down();
}

static void hello_may_be_repeated(void)
{
    set_up_with(1);
    struct fake *f = fake_create(WIRE_DECODE, "decode/1");
    d1 = f;
    f->mute = true;
    fake_hello(f);
    fake_hello(f);
    fake_hello(f);
    UNTIL(f->n_peers == 3); // greeted three times, one registration
    f->mute = false;
    run_for(100000);
    CHECK_INT(p0->n_peers, 1 + 3);
    CHECK_INT(p0->n_gone, 0);

    // A worker that says HELLO later has forgotten what it had.
    struct client c = {0};
    client_start(&c, 20);
    struct fake *other;
    UNTIL(find_seen(p0, WIRE_SUBMIT, c.id, 0));
    run_for(30000);
    struct fake *d = holder(c.id, 0, &other);
    fake_tokens(d, c.id, 0, 0, 2, WIRE_RUNNING);
    UNTIL(c.n_ids == 2);
    d->welcome = false;
    fake_hello(d);
    UNTIL(d->welcome && find_seen(p0, WIRE_SUBMIT, c.id, 1));
    run_for(50000);
    d = holder(c.id, 1, &other);
    fake_tokens(d, c.id, 1, 2, 2, WIRE_LENGTH);
    UNTIL(c.ended);
    CHECK(says(&c, 4));
    tear_down();
}

static void a_gap_starts_the_next_attempt(void)
{
    set_up_with(1);
    struct client c = {0};
    client_start(&c, 20);
    UNTIL(find_seen(d0, WIRE_SUBMIT, c.id, 0));
    fake_tokens(d0, c.id, 0, 0, 2, WIRE_RUNNING);
    UNTIL(c.n_ids == 2);
    fake_tokens(d0, c.id, 0, 1, 1, WIRE_RUNNING); // old news
    fake_tokens(d0, c.id, 0, 4, 1, WIRE_RUNNING); // 2 and 3 are missing
    UNTIL(find_seen(d0, WIRE_CANCEL, c.id, 0));
    UNTIL(find_seen(p0, WIRE_SUBMIT, c.id, 1));
    struct seen *s = find_seen(p0, WIRE_SUBMIT, c.id, 1);
    CHECK_INT(s->submit.n_emitted, 2);
    CHECK_INT(s->submit.n_ids, 7);
    CHECK_INT(s->last_id, words.data[1]);
    int64_t stale = dropped("stale_attempt");
    fake_tokens(d0, c.id, 0, 2, 5, WIRE_LENGTH); // the old attempt has no say any more
    UNTIL(dropped("stale_attempt") == stale + 1);
    CHECK_INT(c.n_ids, 2);
    UNTIL(find_seen(d0, WIRE_SUBMIT, c.id, 1));
    fake_tokens(d0, c.id, 1, 2, 2, WIRE_LENGTH);
    UNTIL(c.ended);
    CHECK(says(&c, 4));
    CHECK_INT(c.end.usage.n_attempts, 2);
    CHECK_INT(c.end.finish, GEN_LENGTH);
    tear_down();
}

static void a_stream_survives_its_decode_worker(void)
{
    set_up_with(2);
    struct client c = {0};
    client_start(&c, 30);
    UNTIL(find_seen(p0, WIRE_SUBMIT, c.id, 0));
    run_for(30000);
    struct fake *other, *d = holder(c.id, 0, &other);
    fake_tokens(p0, c.id, 0, 0, 1, WIRE_RUNNING);
    fake_tokens(d, c.id, 0, 0, 6, WIRE_RUNNING);
    UNTIL(c.n_ids == 6);
    uint64_t died = clock_now_us();
    fake_destroy(d);
    *(d == d0 ? &d0 : &d1) = NULL;
    UNTIL(find_seen(other, WIRE_SUBMIT, c.id, 1));
    CHECK(clock_now_us() - died < 1000000);
    CHECK_INT(p0->n_gone, 1);
    struct seen *s = find_seen(p0, WIRE_SUBMIT, c.id, 1);
    REQUIRE(s != NULL);
    CHECK_INT(s->submit.n_emitted, 6);
    CHECK_INT(s->submit.n_ids, 11);
    CHECK_INT(s->last_id, words.data[5]);
    CHECK_INT(s->submit.sampling.seed, 7);
    fake_tokens(p0, c.id, 1, 6, 1, WIRE_RUNNING);
    fake_tokens(other, c.id, 1, 6, 5, WIRE_LENGTH);
    UNTIL(c.ended);
    CHECK(says(&c, 11));
    CHECK_INT(c.end.usage.n_output, 11);
    tear_down();
}

static void a_request_that_kills_twice_is_not_tried_again(void)
{
    set_up_with(2);
    struct client c = {0};
    client_start(&c, 30);
    UNTIL(find_seen(p0, WIRE_SUBMIT, c.id, 0));
    run_for(30000);
    for (uint32_t attempt = 0; attempt < 2; attempt++) {
        struct fake *other, *d = holder(c.id, attempt, &other);
        fake_tokens(d, c.id, attempt, attempt, 1, WIRE_RUNNING);
        UNTIL(c.n_ids == (int)attempt + 1);
        fake_destroy(d);
        *(d == d0 ? &d0 : &d1) = NULL;
        if (attempt == 0)
            UNTIL(find_seen(other, WIRE_SUBMIT, c.id, 1));
    }
    UNTIL(c.failed);
    CHECK_INT(c.code, ERR_INTERNAL);
    CHECK(!err_retryable(c.code));
    tear_down();
}

static void preemption_costs_no_attempt(void)
{
    set_up_with(1);
    struct client c = {0};
    client_start(&c, 30);
    for (uint32_t attempt = 0; attempt < 8; attempt++) { // more than max_attempts
        UNTIL(find_seen(d0, WIRE_SUBMIT, c.id, attempt));
        fake_tokens(d0, c.id, attempt, attempt, 1, WIRE_RUNNING);
        fake_failed(d0, c.id, attempt, ERR_PREEMPTED);
    }
    UNTIL(find_seen(d0, WIRE_SUBMIT, c.id, 8));
    fake_tokens(d0, c.id, 8, 8, 1, WIRE_LENGTH);
    UNTIL(c.ended);
    CHECK(says(&c, 9));
    tear_down();
}

static void failures_are_tried_again_and_end(void)
{
    set_up_with(1);
    struct client c = {0};
    client_start(&c, 30);
    for (uint32_t attempt = 0; attempt < 3; attempt++) {
        UNTIL(find_seen(p0, WIRE_SUBMIT, c.id, attempt) &&
              find_seen(d0, WIRE_SUBMIT, c.id, attempt));
        fake_failed(p0, c.id, attempt, ERR_CHECKSUM);
        UNTIL(find_seen(d0, WIRE_CANCEL, c.id, attempt));
        CHECK(!find_seen(p0, WIRE_CANCEL, c.id, attempt)); // it said so itself
    }
    UNTIL(c.failed);
    CHECK_INT(c.code, ERR_CHECKSUM);
    CHECK_STR(c.why, "as scripted");

    client_start(&c, 30);
    UNTIL(find_seen(p0, WIRE_SUBMIT, c.id, 0));
    fake_failed(p0, c.id, 0, ERR_INVALID); // not worth another try
    UNTIL(c.failed);
    CHECK_INT(c.code, ERR_INVALID);
    tear_down();
}

static void both_sides_hear_of_a_cancel(void)
{
    set_up_with(1);
    struct client c = {0};
    client_start(&c, 30);
    UNTIL(find_seen(p0, WIRE_SUBMIT, c.id, 0) && find_seen(d0, WIRE_SUBMIT, c.id, 0));
    fake_tokens(p0, c.id, 0, 0, 1, WIRE_RUNNING);
    UNTIL(c.n_ids == 1);
    gen_cancel(c.gen);
    CHECK_INT(requests("gens"), 0);
    UNTIL(find_seen(p0, WIRE_CANCEL, c.id, 0) && find_seen(d0, WIRE_CANCEL, c.id, 0));

    c.cancel_in_chunk = true; // from inside a callback
    client_start(&c, 30);
    UNTIL(find_seen(d0, WIRE_SUBMIT, c.id, 0));
    fake_tokens(d0, c.id, 0, 0, 2, WIRE_LENGTH);
    UNTIL(requests("gens") == 0);
    CHECK(!c.ended && !c.failed);

    c.cancel_in_chunk = false; // before it was placed
    client_start(&c, 30);
    gen_cancel(c.gen);
    run_for(50000);
    CHECK(!find_seen(p0, WIRE_SUBMIT, c.id, 0));
    tear_down();
}

static void stop_strings_end_the_stream(void)
{
    set_up_with(1);
    // The stop string spans the third and fourth word.
    char all[256] = {0};
    size_t at[8], n = 0;
    for (int i = 0; i < 6; i++) {
        size_t k;
        const char *b = tokenizer_bytes(tokenizer, words.data[i], &k);
        at[i] = n;
        memcpy(all + n, b, k);
        n += k;
    }
    size_t from = at[3] - 1, len = 2;
    const char *stop[] = {all + from};
    for (int keep = 0; keep < 2; keep++) {
        struct gen_params p = params_of(30);
        p.stop = stop;
        p.stop_len = &len;
        p.n_stop = 1;
        p.include_stop = keep;
        struct client c = {0};
        CHECK_OK(client_try(&c, &p));
        UNTIL(find_seen(d0, WIRE_SUBMIT, c.id, 0));
        fake_tokens(d0, c.id, 0, 0, 6, WIRE_RUNNING);
        UNTIL(c.ended);
        CHECK_INT(c.end.finish, GEN_STOP);
        CHECK_INT(c.end.stop_id, -1);
        CHECK_INT(strlen(c.stop_string), 2);
        CHECK_INT(c.n_text, from + (keep ? 2 : 0));
        CHECK(!memcmp(c.text, all, c.n_text));
        CHECK_INT(c.end.usage.n_output, 4);
        UNTIL(find_seen(d0, WIRE_CANCEL, c.id, 0));
    }
    tear_down();
}

static void the_last_token_needs_no_handoff(void)
{
    set_up_with(1);
    struct client c = {0};
    client_start(&c, 1);
    UNTIL(find_seen(p0, WIRE_SUBMIT, c.id, 0));
    CHECK_INT(find_seen(p0, WIRE_SUBMIT, c.id, 0)->submit.peer_idx, UINT32_MAX);
    fake_tokens(p0, c.id, 0, 0, 1, WIRE_LENGTH);
    UNTIL(c.ended);
    CHECK(!find_seen(d0, WIRE_SUBMIT, c.id, 0));

    // Penalties: the decode worker needs the ids as well.
    struct gen_params p = params_of(9);
    p.sampling.presence_penalty = 0.5f;
    CHECK_OK(client_try(&c, &p));
    UNTIL(find_seen(d0, WIRE_SUBMIT, c.id, 0));
    CHECK_INT(find_seen(d0, WIRE_SUBMIT, c.id, 0)->submit.n_ids, 5);
    CHECK_INT(find_seen(d0, WIRE_SUBMIT, c.id, 0)->submit.n_bias, 0);
    // P's own token may be the last: D is told to forget it.
    int32_t eos = 3000;
    fake_tokens_of(p0, c.id, 0, 0, &eos, 1, WIRE_STOP);
    UNTIL(c.ended);
    CHECK_INT(c.n_text, 0);
    UNTIL(find_seen(d0, WIRE_CANCEL, c.id, 0));
    tear_down();
}

static void bias_goes_to_both_and_to_every_attempt(void)
{
    set_up_with(1);
    struct client c = {0};
    struct gen_params p = params_of(9);
    p.n_bias = 2;
    p.bias_id = (const int32_t[]){6, 7};
    p.bias_value = (const float[]){1.5f, -100};
    CHECK_OK(client_try(&c, &p));
    UNTIL(find_seen(p0, WIRE_SUBMIT, c.id, 0) && find_seen(d0, WIRE_SUBMIT, c.id, 0));
    fake_tokens(p0, c.id, 0, 0, 1, WIRE_RUNNING);
    fake_failed(d0, c.id, 0, ERR_PREEMPTED);
    UNTIL(find_seen(p0, WIRE_SUBMIT, c.id, 1) && find_seen(d0, WIRE_SUBMIT, c.id, 1));
    for (uint32_t attempt = 0; attempt < 2; attempt++)
        for (int i = 0; i < 2; i++) {
            const struct seen *s = find_seen(i ? d0 : p0, WIRE_SUBMIT, c.id, attempt);
            CHECK_INT(s->submit.n_ids, i ? 0 : 5 + (int)s->submit.n_emitted);
            CHECK_INT(s->submit.n_bias, 2);
            CHECK_INT(s->bias_id, 7);
            CHECK_NEAR(s->bias_value, -100, 0);
        }
    gen_cancel(c.gen);
    p.bias_id = (const int32_t[]){6, 99999};
    CHECK_INT(client_try(&c, &p), ERR_INVALID);
    p.bias_id = (const int32_t[]){6, 7};
    p.bias_value = (const float[]){1.5f, 101};
    CHECK_INT(client_try(&c, &p), ERR_INVALID);
    tear_down();
}

/* With the ids of what was said, so that the decode worker finds its place in it. */
static void a_grammar_goes_to_both_and_to_every_attempt(void)
{
    set_up_with(1);
    struct client c = {0};
    struct gen_params p = params_of(9);
    p.grammar = "{\"schema\":{}}";
    p.n_grammar = strlen(p.grammar);
    CHECK_OK(client_try(&c, &p));
    UNTIL(find_seen(p0, WIRE_SUBMIT, c.id, 0) && find_seen(d0, WIRE_SUBMIT, c.id, 0));
    fake_tokens(p0, c.id, 0, 0, 1, WIRE_RUNNING);
    fake_failed(d0, c.id, 0, ERR_PREEMPTED);
    UNTIL(find_seen(p0, WIRE_SUBMIT, c.id, 1) && find_seen(d0, WIRE_SUBMIT, c.id, 1));
    for (uint32_t attempt = 0; attempt < 2; attempt++)
        for (int i = 0; i < 2; i++) {
            const struct seen *s = find_seen(i ? d0 : p0, WIRE_SUBMIT, c.id, attempt);
            CHECK_INT(s->submit.n_ids, 5 + (int)s->submit.n_emitted);
            CHECK_STR(s->grammar, p.grammar);
        }
    gen_cancel(c.gen);
    p.n_grammar = WIRE_MAX_GRAMMAR + 1;
    CHECK_INT(client_try(&c, &p), ERR_TOO_LARGE);
    tear_down();
}

static void old_epochs_are_dropped(void)
{
    set_up_with(1);
    struct client c = {0};
    client_start(&c, 9);
    UNTIL(find_seen(d0, WIRE_SUBMIT, c.id, 0));
    int64_t before = dropped("stale_epoch");
    link_line_set_epoch(d0->line, d0->epoch + 2);
    fake_tokens(d0, c.id, 0, 0, 3, WIRE_LENGTH);
    UNTIL(dropped("stale_epoch") > before);
    CHECK_INT(c.n_ids, 0);
    link_line_set_epoch(d0->line, d0->epoch);
    fake_tokens(d0, c.id, 0, 0, 3, WIRE_LENGTH);
    UNTIL(c.ended);
    tear_down();
}

static void deadlines_hold(void)
{
    config.queue_timeout_s = 0.2;
    config.prefill_timeout_s = 0.3;
    config.request_timeout_s = 0.6;
    set_up();
    p0 = fake_create(WIRE_PREFILL, "prefill/0");
    d0 = fake_create(WIRE_DECODE, "decode/0");
    d0->hello.max_running = 1;
    join(p0);
    join(d0);
    UNTIL(cluster_ready(cluster));
    run_for(50000);

    struct client slow = {0}, waiting = {0};
    client_start(&slow, 9); // placed, no token comes
    client_start(&waiting, 9);
    UNTIL(waiting.failed);
    CHECK_INT(waiting.code, ERR_TIMEOUT);
    CHECK(!slow.failed);
    UNTIL(slow.failed);
    CHECK_INT(slow.code, ERR_TIMEOUT);
    UNTIL(find_seen(p0, WIRE_CANCEL, slow.id, 0) && find_seen(d0, WIRE_CANCEL, slow.id, 0));

    client_start(&slow, 9); // starts, never ends
    UNTIL(find_seen(d0, WIRE_SUBMIT, slow.id, 0));
    fake_tokens(p0, slow.id, 0, 0, 1, WIRE_RUNNING);
    fake_tokens(d0, slow.id, 0, 0, 2, WIRE_RUNNING);
    UNTIL(slow.n_ids == 2);
    UNTIL(slow.failed);
    CHECK_INT(slow.code, ERR_TIMEOUT);
    tear_down();
    defaults();
}

static void the_queue_is_bounded(void)
{
    config.max_queued = 2;
    set_up();
    p0 = fake_create(WIRE_PREFILL, "prefill/0");
    d0 = fake_create(WIRE_DECODE, "decode/0");
    d0->hello.max_running = 1;
    join(p0);
    join(d0);
    UNTIL(cluster_ready(cluster));
    run_for(50000);
    struct client c[4] = {0};
    client_start(&c[0], 9);
    UNTIL(find_seen(d0, WIRE_SUBMIT, c[0].id, 0));
    client_start(&c[1], 9);
    client_start(&c[2], 9);
    int retry = 0;
    CHECK_INT(cluster_admits(cluster, 1, &retry), ERR_BUSY);
    CHECK(retry >= 1 && retry <= 5);
    struct gen_params p = params_of(9);
    CHECK_INT(client_try(&c[3], &p), ERR_BUSY);
    fake_tokens(d0, c[0].id, 0, 0, 2, WIRE_LENGTH);
    for (int i = 1; i < 3; i++) { // first come, first served
        UNTIL(find_seen(d0, WIRE_SUBMIT, c[i].id, 0));
        CHECK(i == 2 || !find_seen(d0, WIRE_SUBMIT, c[2].id, 0));
        fake_tokens(d0, c[i].id, 0, 0, 2, WIRE_LENGTH);
        UNTIL(c[i].ended);
    }
    tear_down();
    defaults();
}

static void a_stuck_engine_is_dropped(void)
{
    config.step_timeout_s = 0.3;
    set_up_with(2);
    struct client c = {0};
    client_start(&c, 9);
    UNTIL(find_seen(p0, WIRE_SUBMIT, c.id, 0));
    run_for(30000);
    struct fake *other, *d = holder(c.id, 0, &other);
    fake_tokens(d, c.id, 0, 0, 1, WIRE_RUNNING);
    UNTIL(c.n_ids == 1);
    d->beat.busy = 1; // and progress stays
    UNTIL(d->refused[0]);
    CHECK_STR(d->refused, "no progress");
    UNTIL(find_seen(other, WIRE_SUBMIT, c.id, 1));
    fake_tokens(other, c.id, 1, 1, 2, WIRE_LENGTH);
    UNTIL(c.ended);
    CHECK(says(&c, 3));
    tear_down();
    defaults();
}

static void a_worker_that_talks_nonsense_is_dropped(void)
{
    set_up_with(2);
    struct client c = {0};
    client_start(&c, 9);
    UNTIL(find_seen(p0, WIRE_SUBMIT, c.id, 0));
    run_for(30000);
    struct fake *other, *d = holder(c.id, 0, &other);
    int32_t id = 5000;
    fake_tokens_of(d, c.id, 0, 0, &id, 1, WIRE_RUNNING);
    UNTIL(find_seen(other, WIRE_SUBMIT, c.id, 1));
    CHECK_INT(c.n_ids, 0);
    fake_tokens(other, c.id, 1, 0, 2, WIRE_LENGTH);
    UNTIL(c.ended);
    CHECK(says(&c, 2));
    tear_down();
}

static void draining_workers_get_nothing_new(void)
{
    set_up_with(2);
    d0->beat.draining = 1;
    run_for(100000);
    for (int i = 0; i < 4; i++) {
        struct client c = {0};
        client_start(&c, 9);
        UNTIL(find_seen(d1, WIRE_SUBMIT, c.id, 0));
        fake_tokens(d1, c.id, 0, 0, 2, WIRE_LENGTH);
        UNTIL(c.ended);
    }
    CHECK_INT(d0->n_seen, 0);
    d1->beat.draining = 1;
    UNTIL(!cluster_ready(cluster));
    struct wire_buf b = {0};
    struct wire_text *t = wire_begin(&b, WIRE_BYE, 0, 0);
    snprintf(t->text, sizeof(t->text), "drained");
    fake_send(d0, &b);
    UNTIL(p0->n_gone == 1);
    tear_down();
}

static void what_does_not_fit_is_refused(void)
{
    set_up_with(1);
    struct client c = {0};
    struct gen_params p = params_of(4092);
    CHECK_INT(client_try(&c, &p), ERR_TOO_LONG);
    p = params_of(9);
    int32_t bad[] = {1, 3072};
    p.prompt = bad;
    p.n_prompt = 2;
    CHECK_INT(client_try(&c, &p), ERR_INVALID);
    p = params_of(9);
    p.sampling.temperature = -1;
    CHECK_INT(client_try(&c, &p), ERR_INVALID);
    p = params_of(9);
    p.n_prompt = 0;
    CHECK_INT(client_try(&c, &p), ERR_INVALID);
    CHECK_INT(requests("gens"), 0);
    tear_down();
}

int main(void)
{
    const char *dir = getenv("BATON_DEMO_DIR");
    char path[4096];
    snprintf(path, sizeof(path), "%s/tokenizer.json", dir ? dir : "deploy/demo-model");
    log_init("cluster_test", LOG_ERROR);
    enum err e = tokenizer_load(path, &tokenizer);
    CHECK_OK(e);
    REQUIRE(e == ERR_OK);
    static const char text[] = "The quick brown fox jumps over the lazy dog and runs through the "
                               "forest, where many other animals live.";
    REQUIRE(tokenizer_encode(tokenizer, text, sizeof(text) - 1, false, &words) == ERR_OK);
    REQUIRE(words.len >= 16);
    uv_loop_init(&loop);
    uv_timer_init(&loop, &ticker);
    uv_timer_start(&ticker, on_ticker, 5, 5);
    defaults();

    RUN(a_request_runs_to_its_end);
    RUN(strangers_are_refused_by_the_field);
    RUN(the_routers_own_files_count);
    RUN(hello_may_be_repeated);
    RUN(a_gap_starts_the_next_attempt);
    RUN(a_stream_survives_its_decode_worker);
    RUN(a_request_that_kills_twice_is_not_tried_again);
    RUN(preemption_costs_no_attempt);
    RUN(failures_are_tried_again_and_end);
    RUN(both_sides_hear_of_a_cancel);
    RUN(stop_strings_end_the_stream);
    RUN(the_last_token_needs_no_handoff);
    RUN(bias_goes_to_both_and_to_every_attempt);
    RUN(a_grammar_goes_to_both_and_to_every_attempt);
    RUN(old_epochs_are_dropped);
    RUN(deadlines_hold);
    RUN(the_queue_is_bounded);
    RUN(a_stuck_engine_is_dropped);
    RUN(a_worker_that_talks_nonsense_is_dropped);
    RUN(draining_workers_get_nothing_new);
    RUN(what_does_not_fit_is_refused);

    uv_close((uv_handle_t *)&ticker, NULL);
    uv_run(&loop, UV_RUN_DEFAULT);
    CHECK_INT(uv_loop_close(&loop), 0);
    ids_finish(&words);
    tokenizer_destroy(tokenizer);
    return check_done();
}
