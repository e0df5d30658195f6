/* wire.c: the one decoder, the builder, and the walk over TOKENS records.
 *
 * Every message passes three gates: the head (magic, version, type, sizes, whether a request is
 * named), the fixed struct of its type, and its arrays, whose length must be exactly what the
 * counts say. Sizes are computed in 64 bits from counts that were already held against their
 * limits, so nothing can wrap. A refusal is ERR_PROTO and one sentence, "SUBMIT: n_ids is 9, not 0
 * or 12".
 *
 * The fingerprint is not judged here: a difference is for the router to refuse by name, which tells
 * the operator more than a bad frame would.
 */
#include "common/base/wire.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "structs go to the wire as they are");
static_assert(sizeof(struct wire_none) == 0, "no padding on the wire");
static_assert(sizeof(struct wire_text) == 256, "no padding on the wire");
static_assert(sizeof(struct wire_hello) == 264, "no padding on the wire");
static_assert(sizeof(struct wire_welcome) == 8, "no padding on the wire");
static_assert(sizeof(struct wire_peer) == 192, "no padding on the wire");
static_assert(sizeof(struct wire_gone) == 16, "no padding on the wire");
static_assert(sizeof(struct wire_beat) == 264, "no padding on the wire");
static_assert(sizeof(struct wire_sampling) == 120, "no padding on the wire");
static_assert(sizeof(struct wire_submit) == 160, "no padding on the wire");
static_assert(sizeof(struct wire_tokens) == 8, "no padding on the wire");
static_assert(sizeof(struct wire_top) == 8, "no padding on the wire");
static_assert(sizeof(struct wire_failed) == 264, "no padding on the wire");
static_assert(sizeof(struct wire_join) == 216, "no padding on the wire");
static_assert(sizeof(struct wire_joined) == 400, "no padding on the wire");
static_assert(sizeof(struct wire_grant) == 8, "no padding on the wire");
static_assert(sizeof(struct wire_pages) == 16, "no padding on the wire");
static_assert(sizeof(struct wire_ready) == 32, "no padding on the wire");
static_assert(sizeof(struct wire_release) == 8, "no padding on the wire");

#define ALL_TRANSPORTS ((uint32_t)(WIRE_KV_IPC | WIRE_KV_NCCL | WIRE_KV_SHM | WIRE_KV_TCP))

/* Wider than what the HTTP API takes: the wire keeps nonsense out, the API tells clients why. */
#define MAX_TEMPERATURE 100.0f
#define MAX_PENALTY     100.0f

#define X(code, http, retry, text) +1
enum { N_ERR = 0 ERR_TABLE(X) };
#undef X

static enum err check_body(const struct wire_msg *m);
static enum err check_head(const struct wire_head *h, size_t n_bytes);

static enum err bad(uint16_t type, const char *field, uint64_t value, const char *allowed)
{
    return err_set(ERR_PROTO, "%s: %s is %" PRIu64 ", not %s", wire_type_name(type), field, value,
                   allowed);
}

const char *wire_type_name(uint16_t type)
{
    switch (type) {
#define X(name, id, body, text)                                                                    \
    case id:                                                                                       \
        return #name;
        WIRE_TABLE(X)
#undef X
    default:
        return "?";
    }
}

size_t wire_body_bytes(uint16_t type)
{
    switch (type) {
#define X(name, id, body, text)                                                                    \
    case id:                                                                                       \
        return sizeof(struct body);
        WIRE_TABLE(X)
#undef X
    default:
        return 0;
    }
}

static bool type_known(uint16_t type) { return wire_type_name(type)[0] != '?'; }

static bool type_has_request(uint16_t type)
{
    switch (type) {
    case WIRE_SUBMIT:
    case WIRE_CANCEL:
    case WIRE_FAILED:
    case WIRE_GRANT:
    case WIRE_PAGES:
    case WIRE_READY:
    case WIRE_RELEASE:
        return true;
    default:
        return false;
    }
}

enum err wire_decode(const void *frame, size_t n_bytes, struct wire_msg *ret)
{
    assert(((uintptr_t)frame & 7) == 0);

    if (n_bytes < sizeof(struct wire_head))
        return err_set(ERR_PROTO, "a frame of %zu bytes is shorter than a head", n_bytes);
    struct wire_msg m = {0};
    memcpy(&m.head, frame, sizeof(m.head));
    TRY(check_head(&m.head, n_bytes));

    size_t fixed = wire_body_bytes(m.head.type);
    m.body = (const uint8_t *)frame + sizeof(struct wire_head);
    m.tail = (const uint8_t *)m.body + fixed;
    m.tail_bytes = m.head.body_bytes - fixed;
    TRY(check_body(&m));
    *ret = m;
    return ERR_OK;
}

static enum err check_head(const struct wire_head *h, size_t n_bytes)
{
    if (h->magic != WIRE_MAGIC)
        return err_set(ERR_PROTO, "magic is %08x, not %08x", h->magic, WIRE_MAGIC);
    if (h->version != WIRE_VERSION)
        return err_set(ERR_PROTO, "wire version is %u, this process speaks %u", h->version,
                       WIRE_VERSION);
    if (!type_known(h->type))
        return err_set(ERR_PROTO, "message type %u is unknown", h->type);
    if (n_bytes > WIRE_MAX_BYTES)
        return err_set(ERR_PROTO, "%s: %zu bytes exceed %u", wire_type_name(h->type), n_bytes,
                       WIRE_MAX_BYTES);
    if (h->zero)
        return bad(h->type, "head.zero", h->zero, "0");
    if (h->body_bytes != n_bytes - sizeof(*h))
        return err_set(ERR_PROTO, "%s: body_bytes is %u in a frame of %zu", wire_type_name(h->type),
                       h->body_bytes, n_bytes);
    if (h->body_bytes < wire_body_bytes(h->type))
        return err_set(ERR_PROTO, "%s: body of %u bytes is cut short, %zu expected",
                       wire_type_name(h->type), h->body_bytes, wire_body_bytes(h->type));
    if (type_has_request(h->type)) {
        if (!h->req_id)
            return bad(h->type, "req_id", 0, "a request's");
    } else if (h->req_id) {
        return bad(h->type, "req_id", h->req_id, "0");
    } else if (h->attempt) {
        return bad(h->type, "attempt", h->attempt, "0");
    }
    return ERR_OK;
}

/* ---- fields ---------------------------------------------------------------------------------- */

static enum err check_zero(uint16_t type, uint32_t zero)
{
    return zero ? bad(type, "zero", zero, "0") : ERR_OK;
}

static enum err check_max(uint16_t type, const char *field, uint64_t value, uint64_t max)
{
    if (value > max)
        return err_set(ERR_PROTO, "%s: %s is %" PRIu64 ", the limit is %" PRIu64,
                       wire_type_name(type), field, value, max);
    return ERR_OK;
}

static enum err check_text(uint16_t type, const char *field, const char *s, size_t cap)
{
    if (!memchr(s, 0, cap))
        return err_set(ERR_PROTO, "%s: %s is not terminated", wire_type_name(type), field);
    return ERR_OK;
}

/* Names and addresses go into logs, metric labels and connect calls: plain characters only. */
static enum err check_word(uint16_t type, const char *field, const char *s, size_t cap)
{
    TRY(check_text(type, field, s, cap));
    for (; *s; s++)
        if (*s <= ' ' || *s > '~' || *s == '"' || *s == '\\')
            return err_set(ERR_PROTO, "%s: %s contains byte 0x%02x", wire_type_name(type), field,
                           (unsigned char)*s);
    return ERR_OK;
}

static enum err check_float(uint16_t type, const char *field, float v, float min, float max)
{
    if (!(v >= min && v <= max)) // NaN fails
        return err_set(ERR_PROTO, "%s: %s is %g, not in %g .. %g", wire_type_name(type), field,
                       (double)v, (double)min, (double)max);
    return ERR_OK;
}

static enum err check_worker_role(uint16_t type, uint32_t role)
{
    if (role != WIRE_PREFILL && role != WIRE_DECODE)
        return bad(type, "role", role, "a worker's");
    return ERR_OK;
}

static enum err check_transports(uint16_t type, uint32_t transports)
{
    if (transports & ~ALL_TRANSPORTS)
        return bad(type, "transports", transports, "a set of known bits");
    return ERR_OK;
}

static enum err check_tail(const struct wire_msg *m, uint64_t want)
{
    if (m->tail_bytes != want)
        return err_set(ERR_PROTO, "%s: arrays take %zu bytes, the counts say %" PRIu64,
                       wire_type_name(m->head.type), m->tail_bytes, want);
    return ERR_OK;
}

static enum err check_ids(uint16_t type, const int32_t *ids, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0)
            return err_set(ERR_PROTO, "%s: token id %zu is %d", wire_type_name(type), i, ids[i]);
    return ERR_OK;
}

static enum err check_n_logprobs(uint16_t type, int32_t n)
{
    if (n < -1 || n > (int32_t)WIRE_MAX_TOP)
        return err_set(ERR_PROTO, "%s: n_logprobs is %d, not in -1 .. %u", wire_type_name(type), n,
                       WIRE_MAX_TOP);
    return ERR_OK;
}

static enum err check_logprob(uint16_t type, float v)
{
    if (!(v < INFINITY)) // -inf is a probability of zero; NaN fails
        return err_set(ERR_PROTO, "%s: a logprob is %g", wire_type_name(type), (double)v);
    return ERR_OK;
}

static enum err check_logprobs(uint16_t type, const uint8_t *p, uint32_t n_tokens, int32_t n)
{
    for (uint32_t t = 0; n >= 0 && t < n_tokens; t++) {
        float chosen;
        memcpy(&chosen, p, sizeof(chosen));
        TRY(check_logprob(type, chosen));
        p += sizeof(chosen);
        for (int32_t i = 0; i < n; i++) {
            struct wire_top top;
            memcpy(&top, p, sizeof(top));
            TRY(check_ids(type, &top.id, 1));
            TRY(check_logprob(type, top.logprob));
            p += sizeof(top);
        }
    }
    return ERR_OK;
}

/* ---- bodies ---------------------------------------------------------------------------------- */

static enum err check_hello(uint16_t type, const struct wire_hello *b)
{
    TRY(check_worker_role(type, b->role));
    TRY(check_transports(type, b->transports));
    if (b->role == WIRE_DECODE)
        TRY(check_max(type, "max_running", b->max_running, WIRE_MAX_STREAMS));
    TRY(check_max(type, "mtp_step", b->mtp_step, WIRE_MAX_MTP_STEP));
    TRY(check_max(type, "max_total_tokens", b->max_total_tokens, WIRE_MAX_PROMPT));
    TRY(check_zero(type, b->zero));
    TRY(check_word(type, "name", b->name, sizeof(b->name)));
    return check_word(type, "endpoint", b->endpoint, sizeof(b->endpoint));
}

static enum err check_peer(uint16_t type, const struct wire_peer *b)
{
    TRY(check_worker_role(type, b->role));
    TRY(check_transports(type, b->transports));
    TRY(check_zero(type, b->zero));
    TRY(check_word(type, "name", b->name, sizeof(b->name)));
    return check_word(type, "endpoint", b->endpoint, sizeof(b->endpoint));
}

static enum err check_beat(uint16_t type, const struct wire_beat *b)
{
    TRY(check_max(type, "busy", b->busy, 1));
    TRY(check_max(type, "draining", b->draining, 1));
    TRY(check_max(type, "mtp_step", b->mtp_step, WIRE_MAX_MTP_STEP));
    return check_zero(type, b->zero);
}

static enum err check_sampling(uint16_t type, const struct wire_sampling *s)
{
    TRY(check_float(type, "temperature", s->temperature, 0, MAX_TEMPERATURE));
    TRY(check_float(type, "top_p", s->top_p, 0, 1));
    TRY(check_float(type, "min_p", s->min_p, 0, 1));
    TRY(check_float(type, "presence_penalty", s->presence_penalty, -MAX_PENALTY, MAX_PENALTY));
    TRY(check_float(type, "frequency_penalty", s->frequency_penalty, -MAX_PENALTY, MAX_PENALTY));
    TRY(check_float(type, "repetition_penalty", s->repetition_penalty, 1e-6f, MAX_PENALTY));
    TRY(check_n_logprobs(type, s->n_logprobs));
    TRY(check_max(type, "max_tokens", s->max_tokens, WIRE_MAX_PROMPT));
    if (!s->max_tokens)
        return bad(type, "max_tokens", 0, "1 or more");
    TRY(check_max(type, "min_tokens", s->min_tokens, s->max_tokens));
    TRY(check_max(type, "ignore_eos", s->ignore_eos, 1));
    TRY(check_max(type, "n_stop_ids", s->n_stop_ids, WIRE_MAX_STOP_IDS));
    return check_ids(type, s->stop_ids, s->n_stop_ids);
}

static enum err check_submit(const struct wire_msg *m, const struct wire_submit *b)
{
    uint16_t type = m->head.type;
    uint64_t n_input = (uint64_t)b->n_prompt + b->n_emitted;
    if (!b->n_prompt)
        return bad(type, "n_prompt", 0, "1 or more");
    TRY(check_max(type, "n_prompt + n_emitted", n_input, WIRE_MAX_PROMPT));
    if (b->n_ids && b->n_ids != n_input)
        return err_set(ERR_PROTO, "SUBMIT: n_ids is %u, not 0 or %" PRIu64, b->n_ids, n_input);
    TRY(check_sampling(type, &b->sampling));
    if (b->n_emitted >= b->sampling.max_tokens)
        return bad(type, "n_emitted", b->n_emitted, "below max_tokens");
    TRY(check_max(type, "n_bias", b->n_bias, WIRE_MAX_BIAS));
    TRY(check_max(type, "n_grammar", b->n_grammar, WIRE_MAX_GRAMMAR));
    TRY(check_tail(m, (uint64_t)b->n_ids * sizeof(int32_t) +
                          (uint64_t)b->n_bias * (sizeof(int32_t) + sizeof(float)) + b->n_grammar));
    const int32_t *ids = m->tail;
    TRY(check_ids(type, ids, b->n_ids + b->n_bias));
    const float *bias = (const float *)m->tail + b->n_ids + b->n_bias;
    for (uint32_t i = 0; i < b->n_bias; i++)
        TRY(check_float(type, "bias", bias[i], -WIRE_MAX_BIAS_VALUE, WIRE_MAX_BIAS_VALUE));
    return ERR_OK;
}

/* Bytes that a record's arrays take, once its counts passed. */
static size_t stream_tail_bytes(const struct wire_stream *s)
{
    return s->n_tokens * (sizeof(int32_t) + wire_logprob_bytes(s->n_logprobs));
}

static enum err check_tokens(const struct wire_msg *m, const struct wire_tokens *b)
{
    uint16_t type = m->head.type;
    TRY(check_zero(type, b->zero));
    TRY(check_max(type, "n_streams", b->n_streams, WIRE_MAX_STREAMS));

    size_t at = 0;
    for (uint32_t i = 0; i < b->n_streams; i++) {
        const uint8_t *p = (const uint8_t *)m->tail + at;
        size_t left = m->tail_bytes - at;
        struct wire_stream s;
        if (left < sizeof(s))
            return err_set(ERR_PROTO, "TOKENS: record %u of %u is cut short", i, b->n_streams);
        memcpy(&s, p, sizeof(s));
        TRY(check_zero(type, s.zero));
        if (!s.req_id)
            return bad(type, "a record's req_id", 0, "a request's");
        TRY(check_max(type, "finish", s.finish, WIRE_LENGTH));
        TRY(check_max(type, "n_tokens", s.n_tokens, WIRE_MAX_STEP));
        if (!s.n_tokens && s.finish != WIRE_LENGTH)
            return bad(type, "n_tokens", 0, "1 or more");
        TRY(check_max(type, "first_pos", s.first_pos, WIRE_MAX_PROMPT));
        TRY(check_n_logprobs(type, s.n_logprobs));
        if (left - sizeof(s) < stream_tail_bytes(&s))
            return err_set(ERR_PROTO, "TOKENS: arrays of record %u of %u are cut short", i,
                           b->n_streams);
        const int32_t *ids = (const int32_t *)(p + sizeof(s));
        TRY(check_ids(type, ids, s.n_tokens));
        TRY(check_logprobs(type, (const uint8_t *)(ids + s.n_tokens), s.n_tokens, s.n_logprobs));
        at += sizeof(s) + stream_tail_bytes(&s);
    }
    return check_tail(m, at);
}

static enum err check_failed(uint16_t type, const struct wire_failed *b)
{
    if (b->code == ERR_OK || b->code >= N_ERR)
        return bad(type, "code", b->code, "a known failure");
    TRY(check_zero(type, b->zero));
    return check_text(type, "text", b->text, sizeof(b->text));
}

static enum err check_join(uint16_t type, const struct wire_join *b)
{
    TRY(check_transports(type, b->transports));
    TRY(check_zero(type, b->zero));
    return check_word(type, "address", b->address, sizeof(b->address));
}

static enum err check_joined(uint16_t type, const struct wire_joined *b)
{
    if (b->code >= N_ERR)
        return bad(type, "code", b->code, "known");
    TRY(check_transports(type, b->transport));
    if (b->code == ERR_OK ? __builtin_popcount(b->transport) != 1 : b->transport != 0)
        return bad(type, "transport", b->transport, "one choice, or 0 with a failure");
    TRY(check_word(type, "address", b->address, sizeof(b->address)));
    return check_text(type, "text", b->text, sizeof(b->text));
}

static enum err check_ready(const struct wire_msg *m, const struct wire_ready *b)
{
    uint16_t type = m->head.type;
    TRY(check_max(type, "n_pages", b->n_pages, WIRE_MAX_PAGES));
    TRY(check_max(type, "n_hidden", b->n_hidden, WIRE_MAX_HIDDEN));
    TRY(check_ids(type, &b->token, 1));
    TRY(check_n_logprobs(type, b->n_logprobs));
    uint64_t hidden_bytes = (uint64_t)b->n_hidden * sizeof(float);
    TRY(check_tail(m, hidden_bytes + wire_logprob_bytes(b->n_logprobs)));
    const float *hidden = m->tail;
    for (uint32_t i = 0; i < b->n_hidden; i++)
        if (!isfinite(hidden[i]))
            return err_set(ERR_PROTO, "READY: hidden[%u] is %g", i, (double)hidden[i]);
    return check_logprobs(type, (const uint8_t *)m->tail + hidden_bytes, 1, b->n_logprobs);
}

static enum err check_body(const struct wire_msg *m)
{
    uint16_t type = m->head.type;
    switch ((enum wire_type)type) {
    case WIRE_SUBMIT:
        return check_submit(m, m->body);
    case WIRE_TOKENS:
        return check_tokens(m, m->body);
    case WIRE_READY:
        return check_ready(m, m->body);
    case WIRE_GRANT: {
        const struct wire_grant *b = m->body;
        TRY(check_zero(type, b->zero));
        TRY(check_max(type, "n_pages", b->n_pages, WIRE_MAX_PAGES));
        return check_tail(m, (uint64_t)b->n_pages * sizeof(uint32_t));
    }
    case WIRE_PAGES: {
        const struct wire_pages *b = m->body;
        TRY(check_zero(type, b->zero));
        TRY(check_max(type, "n_pages", b->n_pages, WIRE_MAX_PAGES));
        return check_tail(m, (uint64_t)b->n_pages * sizeof(uint32_t));
    }
    default:
        break;
    }

    TRY(check_tail(m, 0));
    switch ((enum wire_type)type) {
    case WIRE_HELLO:
        return check_hello(type, m->body);
    case WIRE_WELCOME:
        return check_zero(type, ((const struct wire_welcome *)m->body)->zero);
    case WIRE_REFUSE:
    case WIRE_BYE:
        return check_text(type, "text", ((const struct wire_text *)m->body)->text, WIRE_MAX_TEXT);
    case WIRE_BEAT:
        return check_beat(type, m->body);
    case WIRE_PEER:
        return check_peer(type, m->body);
    case WIRE_GONE:
        return check_zero(type, ((const struct wire_gone *)m->body)->zero);
    case WIRE_FAILED:
        return check_failed(type, m->body);
    case WIRE_JOIN:
        return check_join(type, m->body);
    case WIRE_JOINED:
        return check_joined(type, m->body);
    case WIRE_RELEASE:
        return check_zero(type, ((const struct wire_release *)m->body)->zero);
    default:
        return ERR_OK; // WHO, PULSE, CANCEL: the head says it all
    }
}

/* ---- views ----------------------------------------------------------------------------------- */

size_t wire_logprob_bytes(int32_t n_logprobs)
{
    return n_logprobs < 0 ? 0 : sizeof(float) + (size_t)n_logprobs * sizeof(struct wire_top);
}

bool wire_tokens_next(const struct wire_msg *m, size_t *offset, struct wire_stream_view *ret)
{
    if (*offset >= m->tail_bytes)
        return false;
    const struct wire_stream *s = (const struct wire_stream *)((const uint8_t *)m->tail + *offset);
    const int32_t *ids = (const int32_t *)(s + 1);
    ret->head = s;
    ret->ids = ids;
    ret->logprobs = s->n_logprobs < 0 ? NULL : (const uint8_t *)(ids + s->n_tokens);
    *offset += sizeof(*s) + stream_tail_bytes(s);
    return true;
}

const char *wire_fingerprint_differs(const struct wire_fingerprint *a,
                                     const struct wire_fingerprint *b)
{
#define FIELD(name)                                                                                \
    if (a->name != b->name)                                                                        \
        return #name;
    FIELD(protocol)
    FIELD(n_layers)
    FIELD(n_mtp_layers)
    FIELD(page_tokens)
    FIELD(kv_width)
    FIELD(kv_dtype)
    FIELD(vocab)
    FIELD(hidden)
    FIELD(model_hash)
    FIELD(tokenizer_hash)
#undef FIELD
    return NULL;
}

/* ---- builder --------------------------------------------------------------------------------- */

static bool buf_reserve(struct wire_buf *buf, size_t n)
{
    if (buf->failed)
        return false;
    if (n > WIRE_MAX_BYTES - buf->len) {
        buf->failed = true;
        buf->len = WIRE_MAX_BYTES + 1; // how wire_end tells this from running out of memory
        return false;
    }
    if (buf->len + n <= buf->cap)
        return true;
    size_t cap = buf->cap ? buf->cap : 512;
    while (cap < buf->len + n)
        cap *= 2;
    uint8_t *data = realloc(buf->data, cap);
    if (!data) {
        buf->failed = true;
        return false;
    }
    buf->data = data;
    buf->cap = cap;
    return true;
}

void *wire_begin(struct wire_buf *buf, enum wire_type type, uint64_t req_id, uint32_t attempt)
{
    size_t n = sizeof(struct wire_head) + wire_body_bytes((uint16_t)type);
    buf->len = 0;
    buf->failed = false;
    if (!buf_reserve(buf, n))
        return NULL;
    memset(buf->data, 0, n);
    *(struct wire_head *)buf->data = (struct wire_head){.magic = WIRE_MAGIC,
                                                        .version = WIRE_VERSION,
                                                        .type = (uint16_t)type,
                                                        .req_id = req_id,
                                                        .attempt = attempt};
    buf->len = n;
    return buf->data + sizeof(struct wire_head);
}

void wire_put(struct wire_buf *buf, const void *bytes, size_t n)
{
    if (!n || !buf_reserve(buf, n))
        return;
    memcpy(buf->data + buf->len, bytes, n);
    buf->len += n;
}

enum err wire_end(struct wire_buf *buf)
{
    if (buf->failed && buf->len > WIRE_MAX_BYTES)
        return err_set(ERR_TOO_LARGE, "a message exceeds %u bytes", WIRE_MAX_BYTES);
    if (buf->failed)
        return err_set(ERR_NOMEM, "no memory for a message");
    struct wire_head *h = (struct wire_head *)buf->data;
    h->body_bytes = (uint32_t)(buf->len - sizeof(*h));
    return ERR_OK;
}

void wire_buf_finish(struct wire_buf *buf)
{
    free(buf->data);
    *buf = (struct wire_buf){0};
}
