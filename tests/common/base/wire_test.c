/* wire_test.c: the bytes of every message, and every way to get them wrong.
 *
 * The golden bytes were computed from the layout in wire.h by another program than this compiler's
 * structs. "*12" stands for twelve zero bytes. A change here is a change of the protocol: bump
 * WIRE_VERSION.
 */
#include "common/base/wire.h"

#include <float.h>
#include <stdlib.h>

#include "check.h"

struct golden {
    enum wire_type type;
    const char *hex;
};

static const struct golden goldens[] = {
    {WIRE_HELLO, "4241544e040001005a5a *6 0a *19 0801 *10 020000000c00000008070605040302011817"
                 "161514131211e110 *6 010000000600000001000000400000004002000002 *4 1000000001"
                 "0000887766554433221100ffeeddccbbaa99f40100000001 *6 03 *4 80 *6 6465636f6465"
                 "2f30 *24 7463703a2f2f3132372e302e302e313a37303031 *108"},
    {WIRE_WELCOME, "4241544e040002005a5a *6 14 *19 08 *11 03 *7"},
    {WIRE_REFUSE, "4241544e040003005a5a *6 1e *20 01 *10 66696e6765727072696e743a20766f63616220"
                  "64696666657273 *230"},
    {WIRE_WHO, "4241544e040004005a5a *6 28 *31"},
    {WIRE_BEAT, "4241544e040005005a5a *6 32 *19 0801 *10 e903 *6 01 *7 0b0000000c0000000d000000"
                "0e0000000f00000010000000110000001200000013 *7 14 *7 15 *7 16 *7 17 *7 18 *7 "
                "19 *7 1a *7 1b *7 1c *7 1d *7 1e *7 1f *7 20 *7 21 *7 22 *7 23 *7 24 *7 25 *"
                "7 26 *7 27 *7 28 *7 29 *7 2a *7 2b *7 2c *7 05 *7"},
    {WIRE_PULSE, "4241544e040006005a5a *6 3c *31"},
    {WIRE_BYE, "4241544e040007005a5a *6 46 *20 01 *10 647261696e6564 *249"},
    {WIRE_PEER, "4241544e040008005a5a *6 50 *19 c0 *11 04000000010000000807060504030201181716"
                "151413121108 *7 70726566696c6c2f31 *151"},
    {WIRE_GONE, "4241544e040009005a5a *6 5a *19 10 *11 04 *7 0807060504030201"},
    {WIRE_SUBMIT,
     "4241544e04000a005a5a *6 64 *7 77 *7 01000000bf *11 0200000001000000030000000"
     "50000000807060504030201cdab *6 2a *10 3f0000403f0000803e000080bf0000c03f0000"
     "00402800000002000000100000000100000001000000020000000700000008 *59 02 *3 03 *3 640000006"
     "500000066000000090000000a0000000000c8c20000003f616263"},
    {WIRE_CANCEL, "4241544e04000b005a5a *6 6e *7 77 *7 01 *15"},
    {WIRE_TOKENS, "4241544e04000c005a5a *6 78 *19 74 *11 02 *7 77 *7 010000000400000003000000ff"
                  "ffffff *16 05000000060000000700000078 *15 010001000100000040000000dc05000014"
                  " *7 09 *6 bf09 *6 bf"},
    {WIRE_FAILED, "4241544e04000d005a5a *6 82 *7 77 *7 010000000801 *10 02 *7 6e6f2066726565204"
                  "b56207061676573 *240"},
    {WIRE_JOIN, "4241544e040014005a5a *6 c8 *19 d8 *11 0807060504030201181716151413121121 *7 "
                "22 *7 0c *7 010000000600000001000000400000004002000002 *4 100000000100008877"
                "66554433221100ffeeddccbbaa992f6261746f6e2d706f6f6c2d31 *115"},
    {WIRE_JOINED, "4241544e040015005a5a *6 d2 *19 9001 *10 0807060504030201 *4 080000003132372e"
                  "302e302e313a37303032 *370"},
    {WIRE_GRANT, "4241544e040016005a5a *6 dc *7 77 *7 0100000014 *11 03 *7 0400000005000000090"
                 "00000"},
    {WIRE_PAGES, "4241544e040017005a5a *6 e6 *7 77 *7 0100000018 *11 06 *7 02 *7 0400000005000"
                 "000"},
    {WIRE_READY, "4241544e040018005a5a *6 f0 *7 77 *7 0100000034 *11 cefaedfe *4 0300000002000"
                 "00011000000010000000200000040 *5 803f000000c0000080be11 *5 80be"},
    {WIRE_RELEASE, "4241544e040019005a5a *6 fa *7 77 *7 0100000008 *11 02 *7"},
};

#define N_GOLDENS (sizeof(goldens) / sizeof(goldens[0]))

static size_t unhex(const char *hex, uint8_t *ret)
{
    size_t n = 0;
    while (*hex) {
        char *end;
        if (*hex == ' ') {
            hex++;
        } else if (*hex == '*') {
            size_t zeros = strtoul(hex + 1, &end, 10);
            memset(ret + n, 0, zeros);
            n += zeros;
            hex = end;
        } else {
            char two[3] = {hex[0], hex[1], 0};
            ret[n++] = (uint8_t)strtoul(two, NULL, 16);
            hex += 2;
        }
    }
    return n;
}

/* ---- the same messages, built through the API -------------------------------------------------
 */

static const struct wire_fingerprint fingerprint = {
    .protocol = 1,
    .n_layers = 6,
    .n_mtp_layers = 1,
    .page_tokens = 64,
    .kv_width = 576,
    .kv_dtype = WIRE_BF16,
    .vocab = 4096,
    .hidden = 256,
    .model_hash = 0x1122334455667788,
    .tokenizer_hash = 0x99aabbccddeeff00,
};

#define INSTANCE 0x0102030405060708u
#define HOST     0x1112131415161718u

static void put_logprobs(struct wire_buf *b, float chosen, struct wire_top top)
{
    wire_put(b, &chosen, sizeof(chosen));
    wire_put(b, &top, sizeof(top));
}

static void fill(struct wire_buf *b, enum wire_type type, void *body)
{
    switch (type) {
    case WIRE_HELLO: {
        struct wire_hello *m = body;
        *m = (struct wire_hello){.role = WIRE_DECODE,
                                 .transports = WIRE_KV_SHM | WIRE_KV_TCP,
                                 .instance = INSTANCE,
                                 .host = HOST,
                                 .pid = 4321,
                                 .fingerprint = fingerprint,
                                 .total_pages = 500,
                                 .max_running = 256,
                                 .mtp_step = 3,
                                 .max_total_tokens = 32768,
                                 .name = "decode/0",
                                 .endpoint = "tcp://127.0.0.1:7001"};
        break;
    }
    case WIRE_WELCOME:
        ((struct wire_welcome *)body)->worker_idx = 3;
        break;
    case WIRE_REFUSE:
        strcpy(((struct wire_text *)body)->text, "fingerprint: vocab differs");
        break;
    case WIRE_BEAT: {
        struct wire_beat *m = body;
        *m = (struct wire_beat){.progress = 1001, .busy = 1};
        uint32_t *small = &m->free_pages;
        for (uint32_t i = 0; i < 8; i++)
            small[i] = 11 + i;
        uint64_t *large = &m->waiting_tokens;
        for (uint32_t i = 0; i < 26; i++)
            large[i] = 19 + i;
        m->mtp_step = 5;
        break;
    }
    case WIRE_BYE:
        strcpy(((struct wire_text *)body)->text, "drained");
        break;
    case WIRE_PEER: {
        struct wire_peer *m = body;
        *m = (struct wire_peer){.worker_idx = 4,
                                .role = WIRE_PREFILL,
                                .instance = INSTANCE,
                                .host = HOST,
                                .transports = WIRE_KV_TCP,
                                .name = "prefill/1"};
        break;
    }
    case WIRE_GONE:
        *(struct wire_gone *)body = (struct wire_gone){.worker_idx = 4, .instance = INSTANCE};
        break;
    case WIRE_SUBMIT: {
        struct wire_submit *m = body;
        *m = (struct wire_submit){.n_prompt = 2,
                                  .n_emitted = 1,
                                  .n_ids = 3,
                                  .peer_idx = 5,
                                  .peer_instance = INSTANCE,
                                  .cache_salt = 0xabcd,
                                  .n_bias = 2,
                                  .n_grammar = 3};
        m->sampling = (struct wire_sampling){.seed = 42,
                                             .temperature = 0.5f,
                                             .top_p = 0.75f,
                                             .min_p = 0.25f,
                                             .presence_penalty = -1.0f,
                                             .frequency_penalty = 1.5f,
                                             .repetition_penalty = 2.0f,
                                             .top_k = 40,
                                             .n_logprobs = 2,
                                             .max_tokens = 16,
                                             .min_tokens = 1,
                                             .ignore_eos = 1,
                                             .n_stop_ids = 2,
                                             .stop_ids = {7, 8}};
        wire_put(b, (int32_t[]){100, 101, 102}, 12);
        wire_put(b, (int32_t[]){9, 10}, 8);
        wire_put(b, (float[]){-100, 0.5f}, 8);
        wire_put(b, "abc", 3);
        break;
    }
    case WIRE_TOKENS: {
        ((struct wire_tokens *)body)->n_streams = 2;
        struct wire_stream s = {
            .req_id = 0x77, .attempt = 1, .first_pos = 4, .n_tokens = 3, .n_logprobs = -1};
        wire_put(b, &s, sizeof(s));
        wire_put(b, (int32_t[]){5, 6, 7}, 12);
        s = (struct wire_stream){.req_id = 0x78,
                                 .n_tokens = 1,
                                 .finish = WIRE_STOP,
                                 .n_logprobs = 1,
                                 .n_cached = 64,
                                 .prefill_us = 1500,
                                 .queue_us = 20};
        wire_put(b, &s, sizeof(s));
        wire_put(b, (int32_t[]){9}, 4);
        put_logprobs(b, -0.5f, (struct wire_top){9, -0.5f});
        break;
    }
    case WIRE_FAILED: {
        struct wire_failed *m = body;
        m->code = ERR_NO_PAGES;
        strcpy(m->text, "no free KV pages");
        break;
    }
    case WIRE_JOIN: {
        struct wire_join *m = body;
        *m = (struct wire_join){.instance = INSTANCE,
                                .host = HOST,
                                .token = {0x21, 0x22},
                                .transports = WIRE_KV_SHM | WIRE_KV_TCP,
                                .fingerprint = fingerprint,
                                .address = "/baton-pool-1"};
        break;
    }
    case WIRE_JOINED: {
        struct wire_joined *m = body;
        *m = (struct wire_joined){
            .instance = INSTANCE, .transport = WIRE_KV_TCP, .address = "127.0.0.1:7002"};
        break;
    }
    case WIRE_GRANT:
        ((struct wire_grant *)body)->n_pages = 3;
        wire_put(b, (uint32_t[]){4, 5, 9}, 12);
        break;
    case WIRE_PAGES:
        *(struct wire_pages *)body = (struct wire_pages){.transfer_seq = 6, .n_pages = 2};
        wire_put(b, (uint32_t[]){4, 5}, 8);
        break;
    case WIRE_READY:
        *(struct wire_ready *)body = (struct wire_ready){.checksum = 0xfeedface,
                                                         .n_pages = 3,
                                                         .n_hidden = 2,
                                                         .token = 17,
                                                         .n_logprobs = 1,
                                                         .n_transfers = 2,
                                                         .n_cached = 64};
        wire_put(b, (float[]){1.0f, -2.0f}, 8);
        put_logprobs(b, -0.25f, (struct wire_top){17, -0.25f});
        break;
    case WIRE_RELEASE:
        ((struct wire_release *)body)->n_transfers = 2;
        break;
    case WIRE_WHO:
    case WIRE_PULSE:
    case WIRE_CANCEL:
        break;
    }
}

static bool has_request(enum wire_type type)
{
    return type == WIRE_SUBMIT || type == WIRE_CANCEL || type == WIRE_FAILED ||
           (type >= WIRE_GRANT && type <= WIRE_RELEASE);
}

static void build(struct wire_buf *b, enum wire_type type)
{
    bool req = has_request(type);
    void *body = wire_begin(b, type, req ? 0x77 : 0, req ? 1 : 0);
    REQUIRE(body);
    fill(b, type, body);
    CHECK_OK(wire_end(b));
    struct wire_head *h = (struct wire_head *)b->data;
    h->epoch = 0x5a5a;
    h->seq = (uint64_t)type * 10;
}

static void every_message_has_its_golden_bytes(void)
{
    struct wire_buf b = {0};
    for (size_t i = 0; i < N_GOLDENS; i++) {
        uint8_t want[2048];
        size_t n = unhex(goldens[i].hex, want);
        build(&b, goldens[i].type);
        CHECK_INT(b.len, n);
        size_t at = 0;
        while (at < n && at < b.len && b.data[at] == want[at])
            at++;
        if (at != n)
            fprintf(stderr, "%s differs at byte %zu: %02x, want %02x\n",
                    wire_type_name((uint16_t)goldens[i].type), at, b.data[at], want[at]);
        CHECK_INT(at, n);
    }
    wire_buf_finish(&b);
    size_t n_types = 0;
#define X(name, id, body, text) n_types++;
    WIRE_TABLE(X)
#undef X
    CHECK_INT(N_GOLDENS, n_types);
}

static void every_message_round_trips(void)
{
    struct wire_buf b = {0};
    for (size_t i = 0; i < N_GOLDENS; i++) {
        _Alignas(8) uint8_t frame[2048];
        size_t n = unhex(goldens[i].hex, frame);
        struct wire_msg m = {0};
        CHECK_OK(wire_decode(frame, n, &m));
        CHECK_INT(m.head.type, goldens[i].type);
        CHECK_INT(m.head.seq, goldens[i].type * 10);
        CHECK_INT(m.head.epoch, 0x5a5a);
        size_t fixed = wire_body_bytes(m.head.type);
        CHECK_INT(48 + fixed + m.tail_bytes, n);
        void *body = wire_begin(&b, goldens[i].type, m.head.req_id, m.head.attempt);
        memcpy(body, m.body, fixed);
        wire_put(&b, m.tail, m.tail_bytes);
        CHECK_OK(wire_end(&b));
        struct wire_head *h = (struct wire_head *)b.data;
        h->epoch = m.head.epoch;
        h->seq = m.head.seq;
        CHECK(b.len == n && !memcmp(b.data, frame, n));
    }
    wire_buf_finish(&b);
}

/* A copy of exactly n bytes, so that the sanitizer sees a read past the end. */
static enum err decode_copy(const uint8_t *bytes, size_t n)
{
    uint8_t *exact = malloc(n ? n : 1);
    memcpy(exact, bytes, n);
    struct wire_msg m;
    enum err e = wire_decode(exact, n, &m);
    free(exact);
    return e;
}

static void every_message_is_refused_when_cut_or_grown(void)
{
    for (size_t i = 0; i < N_GOLDENS; i++) {
        uint8_t frame[2048] = {0};
        size_t n = unhex(goldens[i].hex, frame);
        for (size_t cut = 0; cut < n; cut++) {
            CHECK_INT(decode_copy(frame, cut), ERR_PROTO);
            if (cut < sizeof(struct wire_head))
                continue;
            uint8_t honest[2048]; // the head admits the cut
            memcpy(honest, frame, n);
            ((struct wire_head *)honest)->body_bytes = (uint32_t)(cut - sizeof(struct wire_head));
            CHECK_INT(decode_copy(honest, cut), ERR_PROTO);
        }
        for (size_t more = 1; more <= 16; more++) {
            CHECK_INT(decode_copy(frame, n + more), ERR_PROTO);
            uint8_t honest[2048 + 16];
            memcpy(honest, frame, n + more);
            ((struct wire_head *)honest)->body_bytes =
                (uint32_t)(n + more - sizeof(struct wire_head));
            CHECK_INT(decode_copy(honest, n + more), ERR_PROTO);
        }
    }
}

/* Builds type, lets the statement spoil it (h: head, m: body, t: tail), and wants a refusal whose
 * sentence names field. */
#define REFUSED(type, body_type, field, ...)                                                       \
    do {                                                                                           \
        struct wire_buf b_ = {0};                                                                  \
        build(&b_, type);                                                                          \
        struct wire_head *h = (struct wire_head *)b_.data;                                         \
        struct body_type *m = (struct body_type *)(h + 1);                                         \
        uint8_t *t = (uint8_t *)m + wire_body_bytes(type);                                         \
        (void)m;                                                                                   \
        (void)t;                                                                                   \
        __VA_ARGS__;                                                                               \
        enum err e_ = decode_copy(b_.data, b_.len);                                                \
        CHECK_INT(e_, ERR_PROTO);                                                                  \
        if (!strstr(err_text(e_), field))                                                          \
            fprintf(stderr, "%s:%d: \"%s\" does not name %s\n", __FILE__, __LINE__, err_text(e_),  \
                    field);                                                                        \
        CHECK(strstr(err_text(e_), field));                                                        \
        wire_buf_finish(&b_);                                                                      \
    } while (0)

static void heads_are_checked(void)
{
    for (size_t i = 0; i < N_GOLDENS; i++) {
        enum wire_type type = goldens[i].type;
        REFUSED(type, wire_none, "magic", h->magic ^= 1);
        REFUSED(type, wire_none, "version", h->version++);
        REFUSED(type, wire_none, "type", h->type = 14);
        REFUSED(type, wire_none, "type", h->type = 0);
        REFUSED(type, wire_none, "type", h->type = 65535);
        REFUSED(type, wire_none, "zero", h->zero = 1);
        REFUSED(type, wire_none, "zero", h->zero = 1ull << 63);
        REFUSED(type, wire_none, "body_bytes", h->body_bytes++);
        REFUSED(type, wire_none, "body_bytes", h->body_bytes = UINT32_MAX);
        if (has_request(type)) {
            REFUSED(type, wire_none, "req_id", h->req_id = 0);
        } else {
            REFUSED(type, wire_none, "req_id", h->req_id = 1);
            REFUSED(type, wire_none, "attempt", h->attempt = 1);
        }
    }
}

static void reserved_fields_must_be_zero(void)
{
    REFUSED(WIRE_HELLO, wire_hello, "zero", m->zero = 1);
    REFUSED(WIRE_WELCOME, wire_welcome, "zero", m->zero = 1);
    REFUSED(WIRE_PEER, wire_peer, "zero", m->zero = 1);
    REFUSED(WIRE_GONE, wire_gone, "zero", m->zero = 1);
    REFUSED(WIRE_TOKENS, wire_tokens, "zero", m->zero = 1);
    REFUSED(WIRE_TOKENS, wire_tokens, "zero", ((struct wire_stream *)t)->zero = 1);
    REFUSED(WIRE_FAILED, wire_failed, "zero", m->zero = 1);
    REFUSED(WIRE_JOIN, wire_join, "zero", m->zero = 1);
    REFUSED(WIRE_GRANT, wire_grant, "zero", m->zero = 1);
    REFUSED(WIRE_PAGES, wire_pages, "zero", m->zero = 1);
    REFUSED(WIRE_RELEASE, wire_release, "zero", m->zero = 1);
}

static void strings_must_end_and_be_plain(void)
{
    REFUSED(WIRE_HELLO, wire_hello, "name", memset(m->name, 'x', sizeof(m->name)));
    REFUSED(WIRE_HELLO, wire_hello, "name", m->name[2] = '\n');
    REFUSED(WIRE_HELLO, wire_hello, "name", m->name[2] = '"');
    REFUSED(WIRE_HELLO, wire_hello, "endpoint", memset(m->endpoint, 'x', sizeof(m->endpoint)));
    REFUSED(WIRE_HELLO, wire_hello, "endpoint", m->endpoint[0] = (char)0xff);
    REFUSED(WIRE_REFUSE, wire_text, "text", memset(m->text, 'x', sizeof(m->text)));
    REFUSED(WIRE_BYE, wire_text, "text", memset(m->text, 'x', sizeof(m->text)));
    REFUSED(WIRE_PEER, wire_peer, "name", memset(m->name, 'x', sizeof(m->name)));
    REFUSED(WIRE_PEER, wire_peer, "endpoint", memset(m->endpoint, 'x', sizeof(m->endpoint)));
    REFUSED(WIRE_FAILED, wire_failed, "text", memset(m->text, 'x', sizeof(m->text)));
    REFUSED(WIRE_JOIN, wire_join, "address", memset(m->address, 'x', sizeof(m->address)));
    REFUSED(WIRE_JOINED, wire_joined, "address", memset(m->address, 'x', sizeof(m->address)));
    REFUSED(WIRE_JOINED, wire_joined, "text", memset(m->text, 'x', sizeof(m->text)));
}

static void enums_and_limits_are_checked(void)
{
    REFUSED(WIRE_HELLO, wire_hello, "role", m->role = 0);
    REFUSED(WIRE_HELLO, wire_hello, "role", m->role = 3);
    REFUSED(WIRE_HELLO, wire_hello, "transports", m->transports = 16);
    REFUSED(WIRE_HELLO, wire_hello, "max_running", m->max_running = WIRE_MAX_STREAMS + 1);
    REFUSED(WIRE_HELLO, wire_hello, "mtp_step", m->mtp_step = WIRE_MAX_MTP_STEP + 1);
    REFUSED(WIRE_HELLO, wire_hello, "max_total", m->max_total_tokens = WIRE_MAX_PROMPT + 1);
    REFUSED(WIRE_BEAT, wire_beat, "busy", m->busy = 2);
    REFUSED(WIRE_BEAT, wire_beat, "draining", m->draining = 2);
    REFUSED(WIRE_BEAT, wire_beat, "mtp_step", m->mtp_step = WIRE_MAX_MTP_STEP + 1);
    REFUSED(WIRE_BEAT, wire_beat, "zero", m->zero = 1);
    REFUSED(WIRE_PEER, wire_peer, "role", m->role = 0);
    REFUSED(WIRE_PEER, wire_peer, "transports", m->transports = 1u << 31);
    REFUSED(WIRE_FAILED, wire_failed, "code", m->code = 0);
    REFUSED(WIRE_FAILED, wire_failed, "code", m->code = ERR_INTERNAL + 1);
    REFUSED(WIRE_JOIN, wire_join, "transports", m->transports = 32);
    REFUSED(WIRE_JOINED, wire_joined, "code", m->code = 1000);
    REFUSED(WIRE_JOINED, wire_joined, "transport", m->transport = 0);
    REFUSED(WIRE_JOINED, wire_joined, "transport", m->transport = 3);
    REFUSED(WIRE_JOINED, wire_joined, "transport", m->transport = 16);
    REFUSED(WIRE_JOINED, wire_joined, "transport", m->code = ERR_MISMATCH);
    REFUSED(WIRE_GRANT, wire_grant, "n_pages", m->n_pages = WIRE_MAX_PAGES + 1);
    REFUSED(WIRE_GRANT, wire_grant, "arrays", m->n_pages = 2);
    REFUSED(WIRE_GRANT, wire_grant, "arrays", m->n_pages = 4);
    REFUSED(WIRE_PAGES, wire_pages, "n_pages", m->n_pages = UINT32_MAX);
    REFUSED(WIRE_PAGES, wire_pages, "arrays", m->n_pages = 0);
    REFUSED(WIRE_READY, wire_ready, "n_pages", m->n_pages = WIRE_MAX_PAGES + 1);
    REFUSED(WIRE_READY, wire_ready, "n_hidden", m->n_hidden = WIRE_MAX_HIDDEN + 1);
    REFUSED(WIRE_READY, wire_ready, "arrays", m->n_hidden = 1);
    REFUSED(WIRE_READY, wire_ready, "token", m->token = -1);
    REFUSED(WIRE_READY, wire_ready, "n_logprobs", m->n_logprobs = -2);
    REFUSED(WIRE_READY, wire_ready, "n_logprobs", m->n_logprobs = WIRE_MAX_TOP + 1);
    REFUSED(WIRE_READY, wire_ready, "arrays", m->n_logprobs = -1);
    REFUSED(WIRE_READY, wire_ready, "hidden", *(float *)t = NAN);
    REFUSED(WIRE_READY, wire_ready, "hidden", *(float *)t = INFINITY);
    REFUSED(WIRE_READY, wire_ready, "logprob", *(float *)(t + 8) = NAN);
    REFUSED(WIRE_READY, wire_ready, "token id", *(int32_t *)(t + 12) = -1);
    REFUSED(WIRE_READY, wire_ready, "logprob", *(float *)(t + 16) = INFINITY);
}

static void submissions_are_checked(void)
{
    REFUSED(WIRE_SUBMIT, wire_submit, "n_prompt", m->n_prompt = 0);
    REFUSED(WIRE_SUBMIT, wire_submit, "n_prompt", m->n_prompt = UINT32_MAX);
    REFUSED(WIRE_SUBMIT, wire_submit, "n_prompt", m->n_emitted = UINT32_MAX - 1);
    REFUSED(WIRE_SUBMIT, wire_submit, "n_ids", m->n_ids = 2);
    REFUSED(WIRE_SUBMIT, wire_submit, "n_ids", m->n_ids = 4);
    REFUSED(WIRE_SUBMIT, wire_submit, "arrays", m->n_ids = 0);
    REFUSED(WIRE_SUBMIT, wire_submit, "token id", ((int32_t *)t)[2] = -1);
    REFUSED(WIRE_SUBMIT, wire_submit, "n_bias", m->n_bias = WIRE_MAX_BIAS + 1);
    REFUSED(WIRE_SUBMIT, wire_submit, "arrays", m->n_bias = 1);
    REFUSED(WIRE_SUBMIT, wire_submit, "n_grammar", m->n_grammar = WIRE_MAX_GRAMMAR + 1);
    REFUSED(WIRE_SUBMIT, wire_submit, "arrays", m->n_grammar = 2);
    REFUSED(WIRE_SUBMIT, wire_submit, "token id", ((int32_t *)t)[4] = -1);
    REFUSED(WIRE_SUBMIT, wire_submit, "bias", ((float *)t)[5] = 101);
    REFUSED(WIRE_SUBMIT, wire_submit, "bias", ((float *)t)[6] = NAN);
    REFUSED(WIRE_SUBMIT, wire_submit, "n_emitted", m->sampling.max_tokens = 1);

#define SAMPLING(field, value) REFUSED(WIRE_SUBMIT, wire_submit, #field, m->sampling.field = value)
    SAMPLING(temperature, -0.1f);
    SAMPLING(temperature, NAN);
    SAMPLING(temperature, INFINITY);
    SAMPLING(temperature, FLT_MAX);
    SAMPLING(top_p, -0.1f);
    SAMPLING(top_p, 1.1f);
    SAMPLING(top_p, NAN);
    SAMPLING(min_p, -0.1f);
    SAMPLING(min_p, 1.1f);
    SAMPLING(min_p, NAN);
    SAMPLING(presence_penalty, NAN);
    SAMPLING(presence_penalty, 101);
    SAMPLING(presence_penalty, -INFINITY);
    SAMPLING(frequency_penalty, NAN);
    SAMPLING(frequency_penalty, -101);
    SAMPLING(repetition_penalty, 0);
    SAMPLING(repetition_penalty, NAN);
    SAMPLING(repetition_penalty, 101);
    SAMPLING(n_logprobs, -2);
    SAMPLING(n_logprobs, WIRE_MAX_TOP + 1);
    SAMPLING(max_tokens, 0);
    SAMPLING(max_tokens, WIRE_MAX_PROMPT + 1);
    SAMPLING(min_tokens, 17);
    SAMPLING(ignore_eos, 2);
    SAMPLING(n_stop_ids, WIRE_MAX_STOP_IDS + 1);
#undef SAMPLING
    REFUSED(WIRE_SUBMIT, wire_submit, "token id", m->sampling.stop_ids[1] = -5);
}

static void token_records_are_checked(void)
{
#define STREAM(field, text, value)                                                                 \
    REFUSED(WIRE_TOKENS, wire_tokens, text, ((struct wire_stream *)t)->field = value)
    REFUSED(WIRE_TOKENS, wire_tokens, "n_streams", m->n_streams = WIRE_MAX_STREAMS + 1);
    REFUSED(WIRE_TOKENS, wire_tokens, "cut short", m->n_streams = 3);
    REFUSED(WIRE_TOKENS, wire_tokens, "arrays", m->n_streams = 1);
    REFUSED(WIRE_TOKENS, wire_tokens, "arrays", m->n_streams = 0);
    STREAM(req_id, "req_id", 0);
    STREAM(n_tokens, "n_tokens", WIRE_MAX_STEP + 1);
    STREAM(n_tokens, "n_tokens", 0);
    STREAM(n_tokens, "token id", 16); // the next record read as ids
    STREAM(finish, "finish", 3);
    STREAM(first_pos, "first_pos", UINT32_MAX);
    STREAM(n_logprobs, "n_logprobs", -2);
    STREAM(n_logprobs, "n_logprobs", INT32_MIN);
    STREAM(n_logprobs, "n_logprobs", WIRE_MAX_TOP + 1);
    STREAM(n_logprobs, "cut short", WIRE_MAX_TOP);
    REFUSED(WIRE_TOKENS, wire_tokens, "token id", *(int32_t *)(t + 44) = -1);
    REFUSED(WIRE_TOKENS, wire_tokens, "logprob", *(float *)(t + 52 + 44) = NAN);
    REFUSED(WIRE_TOKENS, wire_tokens, "token id", *(int32_t *)(t + 52 + 48) = -1);
    REFUSED(WIRE_TOKENS, wire_tokens, "logprob", *(float *)(t + 52 + 52) = NAN);
#undef STREAM
}

static void token_records_are_walked(void)
{
    struct wire_buf b = {0};
    build(&b, WIRE_TOKENS);
    struct wire_msg m;
    CHECK_OK(wire_decode(b.data, b.len, &m));
    size_t offset = 0;
    struct wire_stream_view v;
    REQUIRE(wire_tokens_next(&m, &offset, &v));
    CHECK_INT(v.head->req_id, 0x77);
    CHECK_INT(v.head->n_tokens, 3);
    CHECK_INT(v.ids[2], 7);
    CHECK(!v.logprobs);
    REQUIRE(wire_tokens_next(&m, &offset, &v));
    CHECK_INT(v.head->req_id, 0x78);
    CHECK_INT(v.head->finish, WIRE_STOP);
    CHECK_INT(v.ids[0], 9);
    REQUIRE(v.logprobs);
    CHECK_NEAR(*(const float *)v.logprobs, -0.5, 0);
    CHECK_INT(((const struct wire_top *)(v.logprobs + 4))->id, 9);
    CHECK(!wire_tokens_next(&m, &offset, &v));

    ((struct wire_tokens *)wire_begin(&b, WIRE_TOKENS, 0, 0))->n_streams = 0; // nothing to say
    CHECK_OK(wire_end(&b));
    CHECK_OK(wire_decode(b.data, b.len, &m));
    offset = 0;
    CHECK(!wire_tokens_next(&m, &offset, &v));
    wire_buf_finish(&b);
    CHECK_INT(wire_logprob_bytes(-1), 0);
    CHECK_INT(wire_logprob_bytes(0), 4);
    CHECK_INT(wire_logprob_bytes(20), 164);
}

/* Flipped bits never crash the decoder, and what it accepts can be walked. */
static void noise_is_survived(void)
{
    uint64_t x = 88172645463325252u; // xorshift64
    for (int round = 0; round < 200000; round++) {
        _Alignas(8) uint8_t frame[2048];
        size_t n = unhex(goldens[(size_t)round % N_GOLDENS].hex, frame);
        for (int k = 0; k < 1 + round % 3; k++) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            frame[8 + (x >> 8) % (n - 8)] ^= (uint8_t)(1u << (x & 7));
        }
        struct wire_msg m;
        if (wire_decode(frame, n, &m) != ERR_OK || m.head.type != WIRE_TOKENS)
            continue;
        size_t offset = 0;
        struct wire_stream_view v;
        while (wire_tokens_next(&m, &offset, &v))
            ;
        if (offset != m.tail_bytes)
            CHECK(offset == m.tail_bytes);
    }
}

static void builders_report_size_and_can_be_used_again(void)
{
    struct wire_buf b = {0};
    static uint8_t block[1 << 20];
    wire_begin(&b, WIRE_GRANT, 1, 0);
    for (int i = 0; i < 9; i++)
        wire_put(&b, block, sizeof(block));
    CHECK_INT(wire_end(&b), ERR_TOO_LARGE);
    wire_begin(&b, WIRE_PULSE, 0, 0);
    CHECK_OK(wire_end(&b));
    CHECK_INT(b.len, sizeof(struct wire_head));
    wire_buf_finish(&b);
    wire_buf_finish(&b);
}

static void fingerprints_name_the_first_difference(void)
{
    struct wire_fingerprint other = fingerprint;
    CHECK(!wire_fingerprint_differs(&fingerprint, &other));
    other.tokenizer_hash++;
    CHECK_STR(wire_fingerprint_differs(&fingerprint, &other), "tokenizer_hash");
    other.kv_dtype = WIRE_F32;
    CHECK_STR(wire_fingerprint_differs(&fingerprint, &other), "kv_dtype");
    other.protocol++;
    CHECK_STR(wire_fingerprint_differs(&fingerprint, &other), "protocol");
}

static void names_and_sizes(void)
{
    CHECK_STR(wire_type_name(WIRE_SUBMIT), "SUBMIT");
    CHECK_STR(wire_type_name(14), "?");
    CHECK_INT(wire_body_bytes(WIRE_HELLO), sizeof(struct wire_hello));
    CHECK_INT(wire_body_bytes(WIRE_WHO), 0);
    CHECK_INT(wire_body_bytes(999), 0);
}

int main(void)
{
    RUN(every_message_has_its_golden_bytes);
    RUN(every_message_round_trips);
    RUN(every_message_is_refused_when_cut_or_grown);
    RUN(heads_are_checked);
    RUN(reserved_fields_must_be_zero);
    RUN(strings_must_end_and_be_plain);
    RUN(enums_and_limits_are_checked);
    RUN(submissions_are_checked);
    RUN(token_records_are_checked);
    RUN(token_records_are_walked);
    RUN(noise_is_survived);
    RUN(builders_report_size_and_can_be_used_again);
    RUN(fingerprints_name_the_first_difference);
    RUN(names_and_sizes);
    return check_done();
}
