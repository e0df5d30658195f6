/* wire.h: the protocol between router, prefill workers and decode workers.
 *
 * One message is one ZeroMQ frame: a 48-byte head, a fixed body, then the body's arrays in the
 * order named beside the struct. Little-endian, no padding, reserved fields zero. wire_decode
 * checks everything that can be checked without context; past it the code trusts the struct.
 * Ids are never reused; a change of layout bumps WIRE_VERSION.
 *
 * Delivery is not assumed: ZeroMQ drops silently and replays after reconnects. So every message
 * carries the router's epoch (older ones are counted and dropped), a per-link sequence number (a
 * gap means the link lost something, and is treated like the peer's death) and, where it is about
 * a request, the attempt (a request that moved to another worker has a higher one).
 *
 *     router             prefill            decode
 *       |---SUBMIT--------->|                  |
 *       |---SUBMIT---------------------------->|   reserves pages
 *       |                   |<-----GRANT-------|
 *       |                   |------PAGES------>|   one per transfer, announces it
 *       |<--TOKENS----------|------READY------>|   first token; everything was pushed
 *       |<--TOKENS-----------------------------|   one message per step for all streams
 *       |---CANCEL--------->|---RELEASE------->|   nothing more will be sent for this attempt
 */
#ifndef BATON_WIRE_H
#define BATON_WIRE_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/err.h"

#define WIRE_MAGIC   0x4e544142u /* "BATN" */
#define WIRE_VERSION 4

/* name, id, body struct, what it means */
// clang-format off
#define WIRE_TABLE(X)                                                                              \
    X(HELLO,   1,  wire_hello,   "worker -> router: who I am, what I hold, my fingerprint")        \
    X(WELCOME, 2,  wire_welcome, "router -> worker: accepted; this is the epoch")                  \
    X(REFUSE,  3,  wire_text,    "router -> worker: refused, names the field that differs")        \
    X(WHO,     4,  wire_none,    "router -> worker: I do not know you, say HELLO")                 \
    X(BEAT,    5,  wire_beat,    "worker -> router: progress, load and counters")                  \
    X(PULSE,   6,  wire_none,    "router -> worker, prefill <-> decode: I am alive")               \
    X(BYE,     7,  wire_text,    "worker -> router: leaving, with the reason")                     \
    X(PEER,    8,  wire_peer,    "router -> worker: a worker of the other role, introduced")       \
    X(GONE,    9,  wire_gone,    "router -> worker: that peer is no longer part of the cluster")   \
    X(SUBMIT,  10, wire_submit,  "router -> worker: a request, or its next attempt")               \
    X(CANCEL,  11, wire_none,    "router -> worker: drop this attempt and free what it holds")     \
    X(TOKENS,  12, wire_tokens,  "worker -> router: new tokens of every stream of a step")         \
    X(FAILED,  13, wire_failed,  "worker -> router: this attempt ended without finishing")         \
    X(JOIN,    20, wire_join,    "prefill -> decode: open a KV transport with me")                 \
    X(JOINED,  21, wire_joined,  "decode -> prefill: transport chosen, and where it listens")      \
    X(GRANT,   22, wire_grant,   "decode -> prefill: pages reserved for this attempt")             \
    X(PAGES,   23, wire_pages,   "prefill -> decode: a transfer follows with this number")         \
    X(READY,   24, wire_ready,   "prefill -> decode: all pages pushed; here is the first token")   \
    X(RELEASE, 25, wire_release, "prefill -> decode: no more transfers for this attempt")
// clang-format on

enum wire_type {
#define X(name, id, body, text) WIRE_##name = id,
    WIRE_TABLE(X)
#undef X
};

/* Limits. A decoder refuses what exceeds them; a sender must not build it. */
#define WIRE_MAX_BYTES      (8u << 20) /* one message; also ZMQ_MAXMSGSIZE */
#define WIRE_MAX_PROMPT     (1u << 20) /* token ids in SUBMIT */
#define WIRE_MAX_STOP_IDS   16u
#define WIRE_MAX_BIAS       1024u /* ids with a logit bias in SUBMIT */
#define WIRE_MAX_BIAS_VALUE 100.0f
#define WIRE_MAX_GRAMMAR    (256u << 10) /* bytes of a grammar in SUBMIT */
#define WIRE_MAX_PAGES      16384u       /* page indexes in GRANT and PAGES */
#define WIRE_MAX_HIDDEN     8192u        /* floats in READY */
#define WIRE_MAX_STREAMS    4096u        /* records in TOKENS */
#define WIRE_MAX_STEP       16u          /* tokens of one stream in one step */
#define WIRE_MAX_TOP        20u          /* alternatives per token */
#define WIRE_MAX_NAME       32u
#define WIRE_MAX_ADDRESS    128u
#define WIRE_MAX_TEXT       256u
#define WIRE_MAX_MTP_STEP   7u

struct wire_head {
    uint32_t magic;
    uint16_t version, type;
    uint64_t epoch;      // the router's, drawn at its start; 0 before WELCOME and in HELLO
    uint64_t seq;        // per link and direction, from 0
    uint64_t req_id;     // 0 where the message is about no single request
    uint32_t attempt;    // of req_id, from 0
    uint32_t body_bytes; // all that follows the head: body and arrays
    uint64_t zero;
};
static_assert(sizeof(struct wire_head) == 48, "no padding on the wire");

enum wire_role { WIRE_ROUTER = 0, WIRE_PREFILL = 1, WIRE_DECODE = 2 };

/* Must be equal in every process of a cluster; a difference is refused by the field's name. */
struct wire_fingerprint {
    uint32_t protocol;       // WIRE_VERSION
    uint32_t n_layers;       // decoder layers, without MTP
    uint32_t n_mtp_layers;   // MTP layers with KV in a page
    uint32_t page_tokens;    // 64
    uint32_t kv_width;       // values per token and layer, 576
    uint32_t kv_dtype;       // enum wire_dtype
    uint32_t vocab;          // logits width
    uint32_t hidden;         // values in READY
    uint64_t model_hash;     // config.json and the tensor index
    uint64_t tokenizer_hash; // tokenizer.json
};
static_assert(sizeof(struct wire_fingerprint) == 48, "no padding on the wire");

enum wire_dtype { WIRE_F32 = 1, WIRE_BF16 = 2 };

/* Bits of the transports a worker can use, in order of preference. */
enum wire_transport {
    WIRE_KV_IPC = 1,
    WIRE_KV_NCCL = 2,
    WIRE_KV_SHM = 4,
    WIRE_KV_TCP = 8,
};

struct wire_none {
    uint8_t nothing[0];
};

struct wire_text {
    char text[WIRE_MAX_TEXT]; // NUL-terminated
};

struct wire_hello {
    uint32_t role;       // enum wire_role
    uint32_t transports; // bits of enum wire_transport
    uint64_t instance;   // random, new at every start of the process
    uint64_t host;       // equal on one host (boot id), for ipc and shm
    uint64_t pid;        // for the operator
    struct wire_fingerprint fingerprint;
    uint32_t total_pages;
    uint32_t max_running;      // decode: streams at once; prefill: prompts queued at once
    uint32_t chunk_tokens;     // prefill: --chunked-prefill-size; decode: 0
    uint32_t mtp_step;         // decode: drafts per step; prefill: 1 if it writes MTP pages
    uint32_t max_total_tokens; // longest sequence that it takes
    uint32_t zero;
    char name[WIRE_MAX_NAME];        // "decode/0", for logs and metrics
    char endpoint[WIRE_MAX_ADDRESS]; // decode: where prefill workers connect; prefill: ""
};

struct wire_welcome {
    uint32_t worker_idx; // the router's index for this worker, in later PEER and SUBMIT
    uint32_t zero;
};

struct wire_peer {
    uint32_t worker_idx;
    uint32_t role;
    uint64_t instance;
    uint64_t host;
    uint32_t transports;
    uint32_t zero;
    char name[WIRE_MAX_NAME];
    char endpoint[WIRE_MAX_ADDRESS];
};

struct wire_gone {
    uint32_t worker_idx;
    uint32_t zero;
    uint64_t instance;
};

/* Counters are totals since the process started; the router turns them into its metrics. */
struct wire_beat {
    uint64_t progress; // grows while the engine thread lives; see busy
    uint32_t busy;     // 1: work is under way, so progress must move within the stage deadline
    uint32_t draining; // 1: takes nothing new
    uint32_t free_pages, reserved_pages, in_flight_pages, live_pages, cached_pages;
    uint32_t n_running, n_waiting;
    uint32_t step_us; // running mean of a decode step, or of a chunk
    uint64_t waiting_tokens;
    uint64_t prompt_tokens, generated_tokens;
    uint64_t prefix_queried_tokens, prefix_hit_tokens;
    uint64_t n_preemptions;
    uint64_t handoff_bytes, n_handoffs, n_handoff_failures, handoff_us;
    uint64_t n_drafts, n_draft_tokens, n_accepted_tokens;
    uint64_t accepted_at[WIRE_MAX_MTP_STEP]; // by draft position
    uint64_t n_steps, n_stale;               // engine steps; messages dropped for epoch or attempt
    uint64_t step_total_us;                  // in all steps or chunks
    uint64_t gap_us; // between steps that followed each other at once: the host's own time
    uint64_t n_grants, grant_wait_us; // decode: GRANTs sent; from SUBMIT to GRANT, summed
    uint32_t mtp_step, zero;          // decode: drafts per sequence of the last step
};

/* How tokens are drawn: see common/engine/sampler.h. */
struct wire_sampling {
    uint64_t seed;
    float temperature;        // 0 = greedy
    float top_p;              // 1 = off
    float min_p;              // 0 = off
    float presence_penalty;   // 0 = off; over output tokens
    float frequency_penalty;  // 0 = off; over output tokens
    float repetition_penalty; // 1 = off; over prompt and output tokens
    int32_t top_k;            // <= 0 = off
    int32_t n_logprobs;       // -1 = none; 0 = the chosen token's; n = and the n best
    uint32_t max_tokens;      // output tokens in all, those of earlier attempts included
    uint32_t min_tokens;      // no eos or stop id before that many output tokens
    uint32_t ignore_eos;      // 1: the model's eos ids do not stop
    uint32_t n_stop_ids;
    int32_t stop_ids[WIRE_MAX_STOP_IDS];
};

/* + int32_t ids[n_ids], int32_t bias_id[n_bias], float bias_value[n_bias], char grammar[n_grammar].
 * ids: prompt then output of earlier attempts. To the prefill worker all of them. To the decode
 * worker all of them when penalties or a grammar need them, else none (n_ids = 0). */
struct wire_submit {
    uint32_t n_prompt, n_emitted; // emitted: output tokens of earlier attempts, part of the input
    uint32_t n_ids;
    uint32_t
        peer_idx; // the worker of the other role, as in PEER; UINT32_MAX: no handoff, P finishes
    uint64_t peer_instance;
    uint64_t cache_salt; // prefix-cache pages are shared only within equal salts
    struct wire_sampling sampling;
    uint32_t n_bias;    // added to the logits of that many ids
    uint32_t n_grammar; // bytes of what the output is held to (common/grammar/grammar.h); 0: none
};

enum wire_finish { WIRE_RUNNING = 0, WIRE_STOP = 1, WIRE_LENGTH = 2 };

/* + records: struct wire_stream, int32_t ids[n_tokens], then if n_logprobs >= 0 for every token one
 * float (the chosen token's logprob) and n_logprobs x struct wire_top. Repeated n_streams times. */
struct wire_tokens {
    uint32_t n_streams;
    uint32_t zero;
};

struct __attribute__((packed, aligned(4))) wire_stream { // follows ids: only 4-byte aligned
    uint64_t req_id;
    uint32_t attempt;
    uint32_t first_pos; // index in the output (0 = the request's first output token)
    uint16_t n_tokens;
    uint16_t finish;     // enum wire_finish; STOP: the last id is the eos or stop id that ended it
    int32_t n_logprobs;  // -1 or alternatives per token
    uint32_t n_cached;   // prompt tokens that came from the prefix cache (prefill's record)
    uint32_t prefill_us; // start of the first chunk to first token (prefill's record)
    uint32_t queue_us;   // waiting at the prefill worker before its first chunk (prefill's record)
    uint32_t zero;
};
static_assert(sizeof(struct wire_stream) == 40, "no padding on the wire");

struct wire_top {
    int32_t id;
    float logprob;
};

struct wire_failed {
    uint32_t code; // enum err
    uint32_t zero;
    char text[WIRE_MAX_TEXT];
};

struct wire_join {
    uint64_t instance; // the prefill worker's, as the router introduced it
    uint64_t host;
    uint64_t token[2]; // random, guards the transport's own connection
    uint32_t transports;
    uint32_t zero;
    struct wire_fingerprint fingerprint;
    char address[WIRE_MAX_ADDRESS]; // shm, ipc: name of the sender's pool; else ""
};

struct wire_joined {
    uint64_t instance; // the decode worker's
    uint32_t code;     // enum err; not OK: refused, text says why
    uint32_t transport;
    char address[WIRE_MAX_ADDRESS]; // where the sender connects
    char text[WIRE_MAX_TEXT];
};

/* + uint32_t pages[n_pages]: indexes in the decode pool, in sequence order */
struct wire_grant {
    uint32_t n_pages;
    uint32_t zero;
};

/* + uint32_t pages[n_pages]: the granted pages that transfer `transfer_seq` fills */
struct wire_pages {
    uint64_t transfer_seq; // per pair, from 0
    uint32_t n_pages;
    uint32_t zero;
};

/* + float hidden[n_hidden], then like a stream record: one float and n_logprobs x wire_top if
 * n_logprobs >= 0. hidden is the main model's, after the final norm, at the last input position:
 * what the MTP layer needs to make the first draft. */
struct wire_ready {
    uint64_t checksum; // of all pushed pages, see kv_pool_checksum; 0 = not computed
    uint32_t n_pages;  // pushed in all
    uint32_t n_hidden;
    int32_t token;
    int32_t n_logprobs;
    uint32_t n_transfers; // PAGES messages of this attempt
    uint32_t n_cached;
};

struct wire_release {
    uint32_t n_transfers; // PAGES messages of this attempt: all of them end, well or not
    uint32_t zero;
};

/* A decoded message. The pointers lead into the received frame. */
struct wire_msg {
    struct wire_head head;
    const void *body; // the struct that WIRE_TABLE names, aligned for it
    const void *tail; // the arrays after it, 4-byte aligned
    size_t tail_bytes;
};

/* Checks frame (8-byte aligned) and points ret into it.
 * ERR_PROTO with a sentence naming the message and field if anything is off: magic, version, type,
 * size, non-zero reserved field, a count over its limit, an unterminated string, an unknown enum.
 */
MUST_CHECK enum err wire_decode(const void *frame, size_t n_bytes, struct wire_msg *ret);

const char *wire_type_name(uint16_t type); /* "SUBMIT"; "?" when unknown */
size_t wire_body_bytes(uint16_t type);     /* of the fixed struct; 0 also for unknown types */

/* A growing frame under construction. Zero-initialise; wire_buf_finish frees. */
struct wire_buf {
    uint8_t *data;
    size_t len, cap;
    bool failed; // out of memory or over WIRE_MAX_BYTES; wire_end reports it
};

/* Starts a message: head and zeroed body. Returns the body to fill in (valid until the next put),
 * or NULL when out of memory (wire_end will then fail). epoch and seq are the link's to fill in. */
void *wire_begin(struct wire_buf *buf, enum wire_type type, uint64_t req_id, uint32_t attempt);
void wire_put(struct wire_buf *buf, const void *bytes, size_t n);
/* Closes the message. ERR_NOMEM or ERR_TOO_LARGE. */
MUST_CHECK enum err wire_end(struct wire_buf *buf);
void wire_buf_finish(struct wire_buf *buf);

/* Walks the records of TOKENS. *offset starts at 0. Returns false at the end. Cannot fail after
 * wire_decode accepted the message. */
struct wire_stream_view {
    const struct wire_stream *head;
    const int32_t *ids;
    const uint8_t *logprobs; // NULL if none; token i at i * wire_logprob_bytes(n_logprobs)
};
bool wire_tokens_next(const struct wire_msg *m, size_t *offset, struct wire_stream_view *ret);

/* Bytes per token: a float and n_logprobs x wire_top; 0 for n_logprobs < 0. */
size_t wire_logprob_bytes(int32_t n_logprobs);

/* NULL if equal, else the name of the first field that differs. */
const char *wire_fingerprint_differs(const struct wire_fingerprint *a,
                                     const struct wire_fingerprint *b);

#endif
