/* api_internal.h: what the files of the API share. See api.h for who does what.
 *
 * A POST with a body becomes one api_call: parsed, validated, tokenised, run as n choices (a gen
 * each), answered. Every step that differs between the shapes is a function in its api_shape; every
 * path is a row in api.c's route table. A new API is a new file with a shape, and a row.
 */
#ifndef BATON_API_INTERNAL_H
#define BATON_API_INTERNAL_H

#include <string.h>

#include "common/base/json.h"
#include "common/base/own.h"
#include "router/access.h"
#include "router/api.h"
#include "router/text/chat_template.h"
#include "router/traceparent.h"
#include "router/text/detokenizer.h"
#include "router/text/glm_parser.h"
#include "router/text/stop.h"

#define API_MAX_N       16   /* choices per prompt */
#define API_MAX_CHOICES 128  /* prompts x n of one request */
#define API_MAX_TOOLS   1024 /* tool definitions */
#define API_POOL_BYTES  8192 /* larger bodies are parsed and tokenised in the libuv pool */

struct api_call;
struct api_choice;

/* ---- failures ---- */

/* Why a request is refused or failed, ready to be written in a shape's error format. */
struct api_failure {
    int status;        /* 0: none */
    const char *type;  /* OpenAI's error.type */
    const char *code;  /* OpenAI's error.code, or NULL */
    char param[96];    /* the field, or "" */
    char message[640]; /* valid UTF-8 */
    int retry_after_s; /* 0: no Retry-After */
    bool hopeless; /* the same request would fail again: clients that retry 5xx are told not to */
};

/* Record a failure and return an enum err for TRY. refuse: 400 about one field. */
enum err api_refuse(struct api_failure *f, const char *param, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
enum err api_fail(struct api_failure *f, int status, const char *code, const char *param,
                  const char *fmt, ...) __attribute__((format(printf, 5, 6)));
/* From what err_set left; status and retry advice come from the error table. */
enum err api_fail_err(struct api_failure *f, enum err code, const char *param);
enum err api_fail_context(struct api_failure *f, const char *param, size_t n_prompt,
                          int64_t max_tokens, uint32_t limit);

/* ---- parameters: api_params.c ---- */

/* The dialects of a request body; a parameter's row lists those that know it. */
enum api_dialect {
    API_CHAT = 1,
    API_COMPLETIONS = 2,
    API_GENERATE = 4,       /* LightLLM's "parameters" object */
    API_GENERATE_OUTER = 8, /* and what is around it */
    API_TOKENIZE = 16,
    API_DETOKENIZE = 32,
    API_RESPONSES = 64,
    API_MESSAGES = 128,
};

enum api_thinking { API_THINKING_DEFAULT, API_THINKING_ON, API_THINKING_OFF };

enum api_tool_choice { API_TOOLS_AUTO, API_TOOLS_NONE, API_TOOLS_REQUIRED };

/* Everything a client can ask for, preset to "not said". Strings lead into the parsed body. */
struct api_params {
    const char *model;
    double temperature, top_p, min_p; /* -1: not said */
    double presence_penalty, frequency_penalty, repetition_penalty;
    int64_t top_k;                                            /* -2: not said */
    int64_t n, max_tokens, max_completion_tokens, min_tokens; /* max_*: -1 not said */
    int64_t n_logprobs, top_logprobs;                         /* -1: not said */
    uint64_t seed, cache_salt;
    bool has_seed;
    bool stream, include_usage, running_usage, echo, ignore_eos, skip_special, include_stop;
    bool do_sample, return_details;
    bool parallel_tool_calls, separate_reasoning, include_reasoning;
    bool add_generation_prompt, continue_final_message, clear_thinking;
    enum api_tool_choice tool_choice;
    const char *tool_named;     /* REQUIRED: only this function, or NULL */
    json_t *schema;             /* of the answer, owned; NULL: any text */
    const char *schema_param;   /* the parameter that said so */
    enum api_thinking thinking; /* chat_template_kwargs, thinking, enable_thinking */
    enum api_thinking effort;   /* reasoning_effort, which yields to the former */
    int64_t best_of;
    const char *stop[STOP_MAX_STRINGS];
    size_t stop_len[STOP_MAX_STRINGS];
    size_t n_stop;
    int32_t stop_ids[WIRE_MAX_STOP_IDS];
    uint32_t n_stop_ids;
    int32_t *bias_id; /* [n_bias], owned; values behind them */
    float *bias_value;
    uint32_t n_bias;
};

void api_params_init(struct api_params *p);
void api_params_finish(struct api_params *p);
/* Reads every member of body by the table's rows for dialect; a member without a row is refused by
 * name. Members that a shape reads itself (messages, prompt, ...) have rows that skip them.
 * Model names, ids and lengths are checked against model. */
MUST_CHECK enum err api_params_read(const json_t *body, enum api_dialect dialect,
                                    const struct cluster_model *model, struct api_params *p,
                                    struct api_failure *f);
/* Fills what workers need; max_tokens is the prompt's own (see api_call_encoded). */
void api_params_sampling(const struct api_params *p, const struct cluster_model *model,
                         struct wire_sampling *ret);

/* ---- text of tokens: api_output.c ---- */

/* Where a token's text ends in the stream of a gen: byte and character counts of all ids so far. */
struct text_pos {
    struct detokenizer detok;
    uint64_t n_bytes, n_chars;
    bool failed; /* out of memory: the counts are wrong from here on */
};
void text_pos_init(struct text_pos *t, const struct tokenizer *tokenizer, bool skip_special);
void text_pos_push(struct text_pos *t, int32_t id, struct json_out *scratch);

/* A stretch of a choice's output, gathered: reasoning, content or a call. */
struct api_item {
    enum glm_event_kind kind;   /* REASONING, CONTENT, or CALL_START for a call */
    char id[32];                /* of a call */
    struct json_out name, text; /* of a call: function and arguments */
};
/* Adds e to choice->items; events of one kind that follow each other are one item. Out of memory:
 * the call is marked broken. */
void api_gather(struct api_choice *choice, const struct glm_event *e);
/* The same; true if e began a new item. Nothing more is to be written for e once call->broken. */
bool api_gather_begins(struct api_choice *choice, const struct glm_event *e);

/* JSON of a token's text, bytes that are no UTF-8 replaced; and of a float, shortest form. */
void out_token(struct json_out *o, const struct tokenizer *t, int32_t id);
void out_float(struct json_out *o, float v);
void out_text(struct json_out *o, const char *text); /* NUL-terminated, quoted; null for NULL */
void out_uint(struct json_out *o, uint32_t n);       /* json_out_fmt is too slow for every event */
/* NUL-terminated, as it is. */
static inline void out_raw(struct json_out *o, const char *text)
{
    json_out_raw(o, text, strlen(text));
}

/* ---- calls ---- */

struct api_shape {
    const char *id_prefix; /* "chatcmpl-" */
    bool generates;        /* asks cluster_admits */
    bool done_line;        /* streams end with data: [DONE] */
    bool anthropic;        /* errors in Anthropic's shape, and a request-id */
    /* Both run on the loop or in the pool, touching nothing but the call. parse: validates body and
     * sets params, prompts or chat. encode: tokenises. On failure call->failure is set. */
    enum err (*parse)(struct api_call *call, const json_t *body);
    enum err (*encode)(struct api_call *call);
    /* Instead of generating: answers. */
    void (*answer)(struct api_call *call);
    /* A choice's output. open: once, before the first line of a streamed choice. chunk, end: as gen
     * says. */
    void (*open)(struct api_choice *choice);
    void (*chunk)(struct api_choice *choice, const struct gen_chunk *c);
    void (*end)(struct api_choice *choice, const struct gen_end *e);
    /* What the output says, taken apart (user: the choice); called by api_choice_push and _stop. */
    glm_event_fn *output;
    /* All choices ended. stream: writes what comes before [DONE]. body: the whole answer. */
    void (*stream_end)(struct api_call *call);
    /* Writes the event of a failure in mid-stream; NULL: as OpenAI's chat does. */
    void (*stream_failure)(struct api_call *call, const struct api_failure *f);
    void (*body)(struct api_call *call, struct json_out *out);
};

struct api_prompt {
    const char *text; /* into the parsed body; NULL: ids were given */
    size_t n_text;
    struct ids ids;
    char *echo; /* owned */
    size_t n_echo;
    uint32_t n_ids, max_tokens; /* after encode */
};

/* A token event of /generate that waits for its text, or to learn whether it is the last. */
struct held_token {
    bool held;
    int32_t id;
    float logprob;
    uint32_t count;
    struct json_out text;
};

struct api_choice {
    struct api_call *call;
    uint32_t idx;
    struct api_prompt *prompt;
    struct gen *gen; /* NULL: not started, or gone */
    bool opened, ended;
    enum gen_finish finish;
    struct gen_usage usage;
    struct glm_parser parser;
    struct api_item *items;
    size_t n_items, cap_items;
    struct json_out text;
    struct json_out logprobs; /* entries not yet written, comma-separated */
    struct text_pos pos;      /* completions' text_offset, /generate's tokens */
    double sum_logprob;       /* of all tokens, where best_of needs it */
    bool dropped;             /* not among the best */
    struct json_out lp_values, lp_top, lp_offsets; /* completions' other columns */
    struct held_token token;
    uint64_t n_text;
    uint32_t n_tokens;
};

/* One request with a body, from arrival to the end of its answer.
 *
 *   ARRIVED -parsed, tokenised (in the pool if large)-> RUNNING -all gens ended-> ENDED -> freed
 *      |                                                   |
 *      +---- refused, failed, client gone, api destroyed --+--> ENDED -> freed
 *
 * 1. x is NULL from the moment the exchange is finished or gone; nothing is written after that.
 * 2. call_release is the only place that frees, and it waits for the pool (in_pool).
 * 3. A call that ends cancels the gens it still has, before it is freed.
 */
enum { API_REQUEST_ID_BYTES = 132 }; // a client's, or ours, with its NUL

struct api_call {
    /* What every event needs, up to id, lies together. */
    struct api *api;
    struct http_exchange *x;
    const struct api_shape *shape;
    enum { CALL_ARRIVED, CALL_RUNNING, CALL_ENDED } state;
    bool in_pool, admitted;
    bool headers_out;
    bool broken; /* out of memory inside a callback: failed by the next tick */
    uint64_t last_write_us;
    struct json_out head;         /* what all lines of the stream begin with */
    struct api_call *prev, *next; /* api->calls */

    bool stream_path; /* /generate_stream */
    char id[48], request_id[API_REQUEST_ID_BYTES];
    const char *path;         /* the route's */
    int status;               /* of the answer; 499: the client left before it */
    struct traceparent trace; /* the caller's; trace_id "": none */
    struct access_key *key;   /* that the call was taken from, or NULL */
    uint64_t arrival_us, created_s;
    uv_work_t work;
    enum err work_result;

    char *body;
    size_t n_body;
    json_t *json;
    struct cluster_model model;
    struct api_params params;
    struct api_failure failure;
    struct chat_prompt chat;
    json_t *tools; /* those that the model was shown, or NULL */
    bool one_call; /* the output ends after the first call: </tool_call> is a stop id */
    bool thinking; /* the chat's output begins inside reasoning */
    char *grammar; /* [n_grammar] what every output is held to, or NULL */
    size_t n_grammar;

    struct api_prompt *prompts;
    size_t n_prompts;
    struct api_choice *choices;
    size_t n_each; /* choices per prompt */
    size_t n_choices, n_running;
    uint64_t seed;
    uint32_t n_events; /* of a stream whose events are numbered */
};

struct api {
    struct api_config c;
    struct api_call *calls;
    size_t n_calls;
    uv_timer_t tick;
    bool tick_closed, draining, destroyed;
    uint64_t random; /* state; ids and seeds are drawn from it */
    uint64_t created_s;
    size_t pool_bytes, max_pool_bytes; /* of bodies in the pool or waiting for it */
    uint64_t silence_us;               /* a stream that says nothing for that long gets a comment */
    int32_t call_end_id;               /* </tool_call>, -1: unknown */
    struct access *access;             /* NULL: everyone may use the server */
    bool log_access;
    bool split_reasoning, parse_calls, default_thinking;
    struct json_out line, scratch; /* reused by everything on the loop */
};

uint64_t api_random(struct api *a);
/* Parses and validates call->body by its shape; what a fuzzer wants. */
MUST_CHECK enum err api_call_parse(struct api_call *call);
/* Takes a zeroed call's parts apart again (not the call itself). */
void api_call_finish(struct api_call *call);

/* For parse: a new prompt of the call. NULL: out of memory, failure is set. */
struct api_prompt *api_call_add_prompts(struct api_call *call, size_t n);
/* For parse and encode: messages and tools of body to call->chat, and its ids to the one prompt. */
MUST_CHECK enum err api_chat_render(struct api_call *call, const json_t *body);
MUST_CHECK enum err api_chat_encode(struct api_call *call);
/* For encode: tokenises prompts that came as text (added tokens are recognised). */
MUST_CHECK enum err api_prompts_encode(struct api_call *call);
/* For encode: checks every prompt against the context and sets its max_tokens. */
MUST_CHECK enum err api_call_encoded(struct api_call *call, const char *param);

/* For parse: the grammar that tools (those the model is shown, or NULL) and params ask for, if any.
 * Refuses what cannot be enforced. */
MUST_CHECK enum err api_grammar_make(struct api_call *call, const json_t *tools);

/* An id that ends the output (so it has no text and no logprob entry of its own). */
bool api_ends_output(const struct api_call *call, int32_t id);

/* Output through the parser to the shape's output; at its end what the parser held back. */
void api_choice_push(struct api_choice *choice, const struct gen_chunk *c);
void api_choice_stop(struct api_choice *choice, const struct gen_end *e);

/* A line of a stream: begin gives the buffer with "data: " and call->head in it. */
struct json_out *api_line_begin(struct api_call *call);
void api_line_end(struct api_call *call);
/* The same for a named event, without call->head. */
struct json_out *api_event_begin(struct api_call *call, const char *name);
/* "usage" of the whole call so far (prompt tokens once per prompt), as an object. */
/* How a line of an OpenAI stream ends: its usage as the client wants it. */
void api_out_line_usage(struct api_call *call, struct json_out *o);
void api_out_usage(struct api_call *call, struct json_out *o);
/* "stop" or "length"; "tool_calls" if the model stopped after calls. */
const char *api_finish_name(const struct api_choice *choice);

/* Answers at once. type NULL: application/json. request_id "": one is drawn. shape: whose error
 * format and headers apply, NULL: OpenAI's. */
void api_reply(struct api *a, struct http_exchange *x, const char *request_id, uint64_t arrival_us,
               int status, const char *type, const char *body, size_t n);
void api_reply_failure(struct api *a, struct http_exchange *x, const char *request_id,
                       uint64_t arrival_us, const struct api_shape *shape,
                       const struct api_failure *f);
/* Answers and ends a call that does not generate. */
void api_call_reply(struct api_call *call, struct json_out *body);
void api_out_failure(struct json_out *o, const struct api_failure *f);
void api_out_failure_anthropic(struct json_out *o, const struct api_failure *f,
                               const char *request_id);

/* ---- keys, limits, browsers, the access log: api_access.c ---- */

MUST_CHECK enum err api_access_open(struct api *a);
/* May the sender of r use the server, and by which key (NULL: none is needed)? */
bool api_access_find(const struct api *a, const struct http_request *r, struct access_key **ret);
/* f gets the 401; x its header. */
void api_access_refuse(struct http_exchange *x, const struct http_request *r,
                       struct api_failure *f);
/* access_take, with its headers for x. Nothing without a key. */
MUST_CHECK enum err api_access_take(struct access_key *k, struct http_exchange *x,
                                    struct api_failure *f);
/* Headers that let a page of an allowed origin read the answer; once per exchange. */
void api_cors(const struct api *a, struct http_exchange *x, const struct http_request *r);
/* The line of a call that ends, and of a request that became none. */
void api_access_log(const struct api_call *call);
void api_access_log_refused(const struct api *a, const char *request_id, const char *path,
                            int status);

/* ---- conversations in other words than chat's: api_history.c ---- */

/* Zero-initialise. Texts and ids are JSON strings and are shared, not copied. */
struct api_history {
    json_t *messages;          /* NULL: none yet */
    json_t *open;              /* the one that pieces are added to, or NULL */
    struct json_out reasoning; /* of the open one */
    bool failed;               /* out of memory; api_history_render says so */
};
void api_history_close(struct api_history *h); /* what comes next is a new message */
void api_history_text(struct api_history *h, const char *role, const json_t *text);
void api_history_reasoning(struct api_history *h, const json_t *text);
void api_history_call(struct api_history *h, const json_t *id, const json_t *name,
                      const json_t *arguments);
void api_history_result(struct api_history *h, const json_t *id); /* its texts follow, role tool */
bool api_history_says(const struct api_history *h); /* the open message has text or calls */
/* As api_chat_render does. tools: as chat has them, or NULL. */
MUST_CHECK enum err api_history_render(struct api_history *h, json_t *tools, struct api_call *call);
void api_history_finish(struct api_history *h);

/* ---- shapes and plain answers ---- */

extern const struct api_shape api_shape_chat, api_shape_completions, api_shape_generate,
    api_shape_tokenize, api_shape_detokenize, api_shape_responses, api_shape_messages,
    api_shape_count_tokens;

typedef void api_get_fn(struct api *a, struct http_exchange *x, const struct http_request *r);
api_get_fn api_get_models, api_get_model, api_get_health, api_get_ready, api_get_metrics,
    api_get_version, api_get_page, api_get_status, api_get_openapi;

/* Logprob entries of a chunk in chat form, appended to choice->logprobs. */
void api_chat_logprobs(struct api_choice *choice, const struct gen_chunk *c);

#endif
