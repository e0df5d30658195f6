/* api_test.c: the API over real HTTP and the real tokeniser code, with a cluster that is a script.
 *
 * The tokeniser is made here: the 256 bytes and the model's added tokens, so a text's ids are its
 * bytes and every count can be read off. The fake cluster says `script.text` token by token from an
 * idle handle; what it was asked is kept in `asked` for the tests to look at.
 */
#include "router/api.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <strings.h>
#include <sys/socket.h>

#include "check.h"
#include "common/base/clock.h"
#include "common/base/json.h"
#include "common/base/own.h"
#include "router/api_internal.h"
#include "router/cluster.h"

#define CONTEXT 512
#define JSON    "Content-Type: application/json\r\n"

static const char *const added_tokens[] = {
    "<|endoftext|>", "[MASK]",          "[gMASK]",         "[sMASK]",
    "<sop>",         "<eop>",           "<|system|>",      "<|user|>",
    "<|assistant|>", "<|observation|>", "<think>",         "</think>",
    "<tool_call>",   "</tool_call>",    "<tool_response>", "</tool_response>",
    "<arg_key>",     "</arg_key>",      "<arg_value>",     "</arg_value>",
};
#define N_SPECIAL 10 /* the first ones */
#define N_IDS     ((int32_t)(256 + ARRAY_LEN(added_tokens)))
#define EOS       256
#define USER      263
#define THINK_END 267

static uv_loop_t loop;
static struct tokenizer *tokenizer;
static struct api *api;
static struct http_server *server;

/* ---- the fake cluster ---- */

struct gen {
    struct gen *next;
    struct gen_callbacks cb;
    void *user;
    struct ids output; /* what it will say */
    size_t said;
    struct detokenizer detok;
    struct stop *stop;
    struct wire_sampling sampling;
    int nth;
    uint32_t n_prompt;
    uint64_t start_us;
};

struct cluster {
    struct cluster_model model;
    struct gen *gens;
    uv_idle_t idle;
};

static struct {
    const char *letters; /* said first, added tokens spelled out, then half a character; or NULL */
    const char *text;    /* what every gen says, then it ends with eos */
    int per_chunk;       /* tokens per chunk */
    int fail_after;      /* chunks; -1: never */
    enum err fails;      /* then; ERR_OK: ERR_PEER_LOST */
    int hang_after;      /* chunks; -1: never */
    bool no_eos;
    enum err admits, start; /* answers of cluster_admits and of gen_start */
    int dearest;            /* the gen of a request whose logprobs are best; 0: all alike */
    int start_ok;           /* how many gen_starts succeed before `start` is answered */
    bool ready;
} script;

static struct {
    char grammar[400]; /* of the last gen */
    uint32_t n_bias;
    int32_t bias_id;
    float bias_value;
    int n_started, n_cancelled, n_live, n_admits;
    struct wire_sampling sampling[32];
    char prompt[4096]; /* the last one, as text */
    uint32_t n_prompt;
    uint64_t cache_salt;
} asked;

static const int32_t eos_ids[] = {EOS, USER, 265};
static struct cluster cluster = {.model = {.name = "org/demo",
                                           .max_total_tokens = CONTEXT,
                                           .vocab = 320,
                                           .n_token_ids = N_IDS,
                                           .eos = eos_ids,
                                           .n_eos = 3,
                                           .default_temperature = 1,
                                           .default_top_p = 0.95,
                                           .default_top_k = 0}};

static void script_reset(const char *text)
{
    memset(&script, 0, sizeof(script));
    memset(&asked, 0, sizeof(asked));
    script.text = text;
    script.per_chunk = 1;
    script.fail_after = script.hang_after = -1;
    script.ready = true;
}

const struct cluster_model *cluster_get_model(const struct cluster *c) { return &c->model; }
bool cluster_ready(const struct cluster *c)
{
    (void)c;
    return script.ready;
}
uint64_t gen_id(const struct gen *g) { return (uint64_t)(uintptr_t)g; }

enum err cluster_admits(struct cluster *c, uint32_t n, int *ret_retry_after_s)
{
    (void)c;
    asked.n_admits += (int)n;
    if (script.admits != ERR_OK) {
        *ret_retry_after_s = 3;
        return err_set(script.admits, "the queue is full");
    }
    return ERR_OK;
}

static void gen_free(struct gen *g)
{
    for (struct gen **p = &cluster.gens; *p; p = &(*p)->next)
        if (*p == g) {
            *p = g->next;
            break;
        }
    asked.n_live--;
    ids_finish(&g->output);
    stop_destroy(g->stop);
    free(g);
}

enum err gen_start(struct cluster *c, const struct gen_params *p, const struct gen_callbacks *cb,
                   void *user, struct gen **ret)
{
    if (script.start != ERR_OK && asked.n_started >= script.start_ok)
        return err_set(script.start, "no room");
    if (asked.n_started < 32)
        asked.sampling[asked.n_started] = p->sampling;
    asked.n_started++;
    asked.n_live++;
    asked.n_prompt = p->n_prompt;
    asked.cache_salt = p->cache_salt;
    asked.n_bias = p->n_bias;
    snprintf(asked.grammar, sizeof(asked.grammar), "%.*s", (int)p->n_grammar,
             p->n_grammar ? p->grammar : "");
    if (p->n_bias) {
        asked.bias_id = p->bias_id[p->n_bias - 1];
        asked.bias_value = p->bias_value[p->n_bias - 1];
    }
    struct json_out text = {0};
    struct detokenizer d;
    detokenizer_init(&d, tokenizer, false);
    for (uint32_t i = 0; i < p->n_prompt; i++)
        detokenizer_push(&d, p->prompt[i], &text);
    snprintf(asked.prompt, sizeof(asked.prompt), "%.*s", (int)text.len, text.len ? text.data : "");
    json_out_finish(&text);

    struct gen *g = calloc(1, sizeof(*g));
    g->cb = *cb;
    g->user = user;
    g->sampling = p->sampling;
    g->nth = asked.n_started - 1;
    g->n_prompt = p->n_prompt;
    g->start_us = clock_now_us();
    CHECK(p->sampling.max_tokens > 0);
    if (script.letters)
        CHECK_OK(
            tokenizer_encode(tokenizer, script.letters, strlen(script.letters), false, &g->output));
    if (script.letters)
        CHECK_OK(ids_push(&g->output, 0xc3));
    CHECK_OK(tokenizer_encode(tokenizer, script.text, strlen(script.text), true, &g->output));
    if (!script.no_eos && !p->sampling.ignore_eos)
        CHECK_OK(ids_push(&g->output, EOS));
    detokenizer_init(&g->detok, tokenizer, p->skip_special);
    if (p->n_stop)
        CHECK_OK(stop_create(p->stop, p->stop_len, p->n_stop, &g->stop));
    g->next = c->gens;
    c->gens = g;
    *ret = g;
    return ERR_OK;
}

void gen_cancel(struct gen *g)
{
    asked.n_cancelled++;
    gen_free(g);
}

static void gen_finish_with(struct gen *g, enum gen_finish finish)
{
    int32_t last = g->said ? g->output.data[g->said - 1] : -1;
    bool by_id = last == EOS && !g->sampling.ignore_eos;
    for (uint32_t i = 0; i < g->sampling.n_stop_ids; i++)
        by_id |= g->sampling.stop_ids[i] == last;
    struct gen_end e = {.finish = finish,
                        .stop_id = finish == GEN_STOP && by_id ? last : -1,
                        .usage = {.n_prompt = g->n_prompt,
                                  .n_output = (uint32_t)g->said,
                                  .n_cached = 2,
                                  .n_attempts = 1}};
    struct gen_callbacks cb = g->cb;
    void *user = g->user;
    gen_free(g);
    cb.on_end(user, &e);
}

/* One chunk of one gen. */
static void gen_step(struct gen *g)
{
    int chunk = (int)(g->said / (size_t)script.per_chunk);
    if (script.hang_after >= 0 && chunk >= script.hang_after)
        return;
    if (script.fail_after >= 0 && chunk >= script.fail_after) {
        struct gen_callbacks cb = g->cb;
        void *user = g->user;
        gen_free(g);
        cb.on_error(user, script.fails ? script.fails : ERR_PEER_LOST, "the worker died");
        return;
    }
    struct json_out fresh = {0}, text = {0};
    float logprob[64];
    struct wire_top top[64 * WIRE_MAX_TOP];
    int32_t n_top = g->sampling.n_logprobs;
    size_t n = MIN((size_t)script.per_chunk, g->output.len - g->said);
    n = MIN(n, g->sampling.max_tokens - g->said);
    bool over = false, stopped = false;
    int which = -1;
    size_t i = 0;
    for (; i < n && !over; i++) {
        int32_t id = g->output.data[g->said + i];
        float dear = script.dearest && script.dearest != g->nth ? (float)(g->nth + 2) : 1;
        logprob[i] = -0.5f * dear * (float)(g->said + i + 1);
        for (int32_t k = 0; k < n_top; k++)
            top[i * (size_t)n_top + (size_t)k] = (struct wire_top){
                .id = id + k < N_IDS ? id + k : 0, .logprob = logprob[i] - (float)k};
        over = (id == EOS && !g->sampling.ignore_eos);
        for (uint32_t k = 0; k < g->sampling.n_stop_ids; k++)
            over |= g->sampling.stop_ids[k] == id;
        fresh.len = 0;
        if (!over)
            detokenizer_push(&g->detok, id, &fresh);
        if (!g->stop)
            json_out_raw(&text, fresh.data ? fresh.data : "", fresh.len);
        else if (!stopped)
            stopped = stop_push(g->stop, fresh.data ? fresh.data : "", fresh.len, &text, &which);
        over |= stopped;
    }
    stopped = over;
    over |= g->said + i == g->sampling.max_tokens || g->said + i == g->output.len;
    if (over && !stopped) {
        fresh.len = 0;
        detokenizer_flush(&g->detok, &fresh);
        if (!g->stop)
            json_out_raw(&text, fresh.data ? fresh.data : "", fresh.len);
        else
            (void)stop_push(g->stop, fresh.data ? fresh.data : "", fresh.len, &text, &which);
    }
    if (over && which < 0 && g->stop)
        stop_flush(g->stop, &text);
    struct gen_chunk c = {.text = text.data ? text.data : "",
                          .n_text = text.len,
                          .ids = g->output.data + g->said,
                          .n_ids = (int)i,
                          .n_logprobs = n_top,
                          .logprob = n_top >= 0 ? logprob : NULL,
                          .top = n_top > 0 ? top : NULL};
    g->said += i;
    g->cb.on_chunk(g->user, &c);
    json_out_finish(&fresh);
    json_out_finish(&text);
    if (over)
        gen_finish_with(g, stopped ? GEN_STOP : GEN_LENGTH);
}

static void on_idle(uv_idle_t *idle)
{
    (void)idle;
    struct gen *all[256];
    size_t n = 0;
    for (struct gen *g = cluster.gens; g && n < ARRAY_LEN(all); g = g->next)
        all[n++] = g;
    while (n--) { /* the oldest first; one may end others */
        bool alive = false;
        for (struct gen *g = cluster.gens; g; g = g->next)
            alive |= g == all[n];
        if (alive)
            gen_step(all[n]);
    }
}

/* ---- set-up ---- */

static void put_utf8(char *ret, int code)
{
    if (code < 0x80) {
        ret[0] = (char)code, ret[1] = '\0';
    } else {
        ret[0] = (char)(0xc0 | code >> 6), ret[1] = (char)(0x80 | (code & 63)), ret[2] = '\0';
    }
}

/* Ids 0..255 are the bytes themselves, in byte-level BPE's alphabet. */
static void make_tokenizer(void)
{
    json_t *vocab = json_object(), *added = json_array();
    int other = 256;
    for (int b = 0; b < 256; b++) {
        bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        char text[4];
        put_utf8(text, printable ? b : other++);
        json_object_set_new(vocab, text, json_integer(b));
    }
    for (size_t i = 0; i < ARRAY_LEN(added_tokens); i++)
        json_array_append_new(added, json_pack("{s:i,s:s,s:b,s:b,s:b,s:b,s:b}", "id", 256 + (int)i,
                                               "content", added_tokens[i], "special", i < N_SPECIAL,
                                               "lstrip", 0, "rstrip", 0, "single_word", 0,
                                               "normalized", 0));
    static const char regex[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{"
                                "1,3}| ?[^\\s\\p{L}\\p{N}]"
                                "+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
    json_t *root = json_pack(
        "{s:s,s:n,s:o,s:{s:s,s:[{s:s,s:{s:s},s:s,s:b},{s:s,s:b,s:b,s:b}]},s:{s:s},s:{s:s,s:o,s:[]}"
        "}",
        "version", "1.0", "normalizer", "added_tokens", added, "pre_tokenizer", "type", "Sequence",
        "pretokenizers", "type", "Split", "pattern", "Regex", regex, "behavior", "Isolated",
        "invert", 0, "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets", 1, "use_regex", 0,
        "decoder", "type", "ByteLevel", "model", "type", "BPE", "vocab", vocab, "merges");
    REQUIRE(root != NULL);
    char path[] = "/tmp/baton-api-test-XXXXXX";
    int fd = mkstemp(path);
    REQUIRE(fd >= 0);
    REQUIRE(json_dumpfd(root, fd, 0) == 0);
    close(fd);
    json_decref(root);
    enum err e = tokenizer_load(path, &tokenizer);
    unlink(path);
    if (e != ERR_OK)
        fprintf(stderr, "%s\n", err_text(e));
    REQUIRE(e == ERR_OK);
    REQUIRE(tokenizer_n_ids(tokenizer) == N_IDS);
    REQUIRE(tokenizer_added_id(tokenizer, "</think>") == THINK_END);
}

static void write_metrics(void *user, struct json_out *out)
{
    (void)user;
    json_out_fmt(out, "# TYPE demo gauge\ndemo 1\n");
}

static struct config config = {
    .default_reasoning = "on", .reasoning_parser = "glm45", .tool_call_parser = "glm47"};

static void set_up(void)
{
    uv_loop_init(&loop);
    uv_idle_init(&loop, &cluster.idle);
    uv_idle_start(&cluster.idle, on_idle);
    make_tokenizer();
    struct api_config c = {.loop = &loop,
                           .config = &config,
                           .tokenizer = tokenizer,
                           .cluster = &cluster,
                           .write_metrics = write_metrics};
    struct http_handler handler;
    CHECK_OK(api_create(&c, &handler, &api));
    CHECK_OK(
        http_server_create(&loop, "127.0.0.1", 0, &http_limits_default, &handler, api, &server));
}

/* ---- the client ---- */

struct answer {
    int status;
    char *head, *body; /* body without chunk framing */
    size_t n_body;
    bool clean; /* the body's end was marked */
    json_t *json;
};

static int client_open(void)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)http_server_port(server)),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    REQUIRE(connect(fd, (struct sockaddr *)&at, sizeof(at)) == 0);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    return fd;
}

static void client_send(int fd, const char *data, size_t n)
{
    while (n) {
        ssize_t k = send(fd, data, n, MSG_NOSIGNAL);
        if (k > 0)
            data += k, n -= (size_t)k;
        else if (errno != EAGAIN)
            return;
        uv_run(&loop, UV_RUN_NOWAIT);
    }
}

static void client_ask(int fd, const char *method, const char *path, const char *headers,
                       const char *body, size_t n)
{
    struct json_out o = {0};
    json_out_fmt(&o, "%s %s HTTP/1.1\r\nHost: test\r\nConnection: close\r\n%s", method, path,
                 headers);
    if (body)
        json_out_fmt(&o, "Content-Length: %zu\r\n", n);
    json_out_fmt(&o, "\r\n");
    if (body)
        json_out_raw(&o, body, n);
    client_send(fd, o.data, o.len);
    json_out_finish(&o);
}

/* Reads until what was read contains `until`, or to the end (NULL). 10 s at most. */
static void client_read(int fd, struct json_out *in, const char *until)
{
    uint64_t start_us = clock_now_us();
    for (;;) {
        char buf[65536];
        uv_run(&loop, UV_RUN_NOWAIT);
        ssize_t n = recv(fd, buf, sizeof(buf), 0);
        if (n == 0 || (n < 0 && errno != EAGAIN))
            break;
        if (n > 0)
            json_out_raw(in, buf, (size_t)n);
        if (until && in->len && memmem(in->data, in->len, until, strlen(until)))
            break;
        if (clock_now_us() - start_us > 10000000u) {
            CHECK(!"timely answer");
            break;
        }
    }
}

static const char *header(const struct answer *a, const char *name)
{
    static char value[256];
    for (const char *p = a->head; (p = strstr(p, "\r\n")); p++) {
        if (strncasecmp(p + 2, name, strlen(name)) || p[2 + strlen(name)] != ':')
            continue;
        p += 3 + strlen(name);
        p += strspn(p, " ");
        snprintf(value, sizeof(value), "%.*s", (int)strcspn(p, "\r"), p);
        return value;
    }
    return "";
}

static struct answer parse_answer(struct json_out *in)
{
    struct answer a = {0};
    json_out_raw(in, "", 1);
    char *end = strstr(in->data, "\r\n\r\n");
    if (!end)
        fprintf(stderr, "no head in %zu bytes: %s\n", in->len - 1, in->data);
    REQUIRE(end != NULL);
    a.status = atoi(in->data + 9);
    a.head = strndup(in->data, (size_t)(end + 2 - in->data));
    char *p = end + 4;
    size_t left = in->len - 1 - (size_t)(p - in->data);
    struct json_out body = {0};
    if (strstr(a.head, "chunked")) {
        while (left) {
            char *line;
            size_t n = strtoul(p, &line, 16);
            if (line == p)
                break;
            line += 2;
            if (n == 0) {
                a.clean = true;
                break;
            }
            json_out_raw(&body, line, n);
            left -= (size_t)(line + n + 2 - p);
            p = line + n + 2;
        }
    } else {
        json_out_raw(&body, p, left);
        a.clean = left == strtoul(header(&a, "Content-Length"), NULL, 10);
    }
    json_out_raw(&body, "", 1);
    a.body = body.data;
    a.n_body = body.len - 1;
    a.json = json_loadb(a.body, a.n_body, JSON_REJECT_DUPLICATES, NULL);
    json_out_finish(in);
    return a;
}

static void answer_finish(struct answer *a)
{
    free(a->head);
    free(a->body);
    json_decref(a->json);
}

static struct answer ask_raw(const char *method, const char *path, const char *headers,
                             const char *body, size_t n)
{
    int fd = client_open();
    struct json_out in = {0};
    client_ask(fd, method, path, headers, body, n);
    client_read(fd, &in, NULL);
    close(fd);
    return parse_answer(&in);
}

static struct answer ask(const char *method, const char *path, const char *body)
{
    return ask_raw(method, path, body ? "Content-Type: application/json\r\n" : "", body,
                   body ? strlen(body) : 0);
}

/* A member by its way through objects and arrays: "choices.0.message.content". */
static const json_t *at(const json_t *json, const char *way)
{
    char step[64];
    while (json && *way) {
        size_t n = strcspn(way, ".");
        snprintf(step, sizeof(step), "%.*s", (int)n, way);
        json = json_is_array(json) ? json_array_get(json, (size_t)atoi(step))
                                   : json_object_get(json, step);
        way += n + (way[n] == '.');
    }
    return json;
}
static const char *text_at(const json_t *json, const char *way)
{
    const char *s = json_string_value(at(json, way));
    return s ? s : "(none)";
}
static long long int_at(const json_t *json, const char *way)
{
    const json_t *v = at(json, way);
    return json_is_integer(v) ? json_integer_value(v) : -999;
}

/* The events of a stream; "[DONE]" is a string. The array is the caller's. */
static json_t *events_of(const struct answer *a, const char *prefix)
{
    json_t *all = json_array();
    for (const char *p = a->body; (p = strstr(p, prefix));) {
        p += strlen(prefix);
        size_t n = strcspn(p, "\n");
        CHECK(!strncmp(p + n, "\n\n", 2));
        json_t *event = json_loadb(p, n, JSON_REJECT_DUPLICATES, NULL);
        if (!event) {
            CHECK(n == 6 && !strncmp(p, "[DONE]", 6));
            event = json_string("[DONE]");
        }
        json_array_append_new(all, event);
        p += n;
    }
    return all;
}

/* Concatenates a member of all events, of one choice. */
static char *joined(const json_t *events, int idx, const char *way)
{
    struct json_out o = {0};
    for (size_t i = 0; i < json_array_size(events); i++) {
        const json_t *e = json_array_get(events, i);
        const char *s = json_string_value(at(e, way));
        if (s && (idx < 0 || int_at(e, "choices.0.index") == idx))
            json_out_raw(&o, s, strlen(s));
    }
    json_out_raw(&o, "", 1);
    return o.data;
}

#define CHECK_JOINED(events, idx, way, want)                                                       \
    do {                                                                                           \
        char *joined_ = joined(events, idx, way);                                                  \
        CHECK_STR(joined_, want);                                                                  \
        free(joined_);                                                                             \
    } while (0)

#define CHAT   "/v1/chat/completions"
#define COMP   "/v1/completions"
#define F_TOOL "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}],"
#define NESTED "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["
#define CALLED(arguments, result)                                                                  \
    "{\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{\"id\":\"c\",\"type\":\"function\","  \
    "\"function\":{\"name\":\"f\",\"arguments\":\"" arguments                                      \
    "\"}}]},{\"role\":\"tool\",\"tool_call_id\":"                                                  \
    "\"c\",\"content\":\"" result "\"}]}"
#define HI "\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}]"

/* ---- tests ---- */

struct table_row {
    const char *method, *path, *body;
    int status;
    const char *want; /* in the body; param for 400s that name one */
};

/* Every answer must be JSON (except where want says otherwise) and every error nested. */
static void table_of_requests(void)
{
    static const struct table_row rows[] = {
        // plain answers
        {"GET", "/health", NULL, 200, "ok"},
        {"GET", "/healthz", NULL, 200, "ok"},
        {"GET", "/ready", NULL, 200, "ready"},
        {"GET", "/version", NULL, 200, "version"},
        {"GET", "/v1/models", NULL, 200, "\"id\":\"org/demo\""},
        {"GET", "/v1/models/org/demo", NULL, 200, "\"max_model_len\":512"},
        {"GET", "/v1/models/org%2Fdemo", NULL, 200, "\"object\":\"model\""},
        {"GET", "/v1/models/org%2fdem", NULL, 404, "model_not_found"},
        {"GET", "/v1/models/other", NULL, 404, "model_not_found"},
        {"GET", "/v1/models/", NULL, 404, "not_found"},
        // routing
        {"GET", "/nothing", NULL, 404, "\"error\""},
        {"GET", CHAT, NULL, 405, "POST"},
        {"POST", "/health", "{}", 405, "GET"},
        {"PUT", CHAT, "{}", 405, "error"},
        // bodies
        {"POST", CHAT, "", 400, "JSON"},
        {"POST", CHAT, "{", 400, "JSON"},
        {"POST", CHAT, "[]", 400, "object"},
        {"POST", CHAT, "{} x", 400, "JSON"},
        {"POST", CHAT, "{\"n\":1,\"n\":2," HI "}", 400, "JSON"},
        {"POST", CHAT, "{\"a\":\"\xff\"}", 400, "JSON"},
        {"POST", CHAT, "\xef\xbb\xbf{}", 400, "JSON"},
        {"POST", CHAT, "{\"\\u0000\":1}", 400, "JSON"},
        {"POST", CHAT, "{\"temperature\":1e999," HI "}", 400, "\"param\":\"temperature\""},
        {"POST", CHAT, "{\"max_tokens\":1e999," HI "}", 400, "\"param\":\"max_tokens\""},
        {"POST", CHAT, "{\"metadata\":{\"id\":-1e999}," HI "}", 200, ""},
        {"POST", CHAT, "{\"seed\":99999999999999999999," HI "}", 400, "\"param\":\"seed\""},
        {"POST", CHAT, "{\"max_tokens\":99999999999999999999," HI "}", 400,
         "\"param\":\"max_tokens\""},
        {"POST", COMP, "{\"prompt\":[99999999999999999999]}", 400, "\"param\":\"prompt\""},
        {"POST", CHAT, "{\"metadata\":{\"id\":18446744073709551615}," HI "}", 200, ""},
        // what tools found, and what a model called them with
        {"POST", "/tokenize", "{\"text\":\"\\u0000\"}", 200, "\"count\":1"},
        {"POST", CHAT, CALLED("{\\\"x\\\": 12345678901234567890}", "a\\u0000b"), 200, ""},
        {"POST", CHAT, CALLED("{\\\"x\\\": [1e400]}", ""), 200, ""},
        {"POST", CHAT, CALLED("{\\\"x\\\": \\\"\\\\u0000\\\"}", ""), 200, ""},
        {"POST", CHAT, CALLED("{\\\"x\\\": " NESTED "}", ""), 400, "64 levels of nesting"},
        // messages
        {"POST", CHAT, "{" HI "}", 200, "chat.completion"},
        {"POST", CHAT, "{\"model\":\"org/demo\"," HI "}", 200, "chat.completion"},
        {"POST", CHAT, "{\"model\":\"gpt\"," HI "}", 404, "model_not_found"},
        {"POST", CHAT, "{\"model\":5," HI "}", 400, "\"param\":\"model\""},
        {"POST", CHAT, "{}", 400, "\"param\":\"messages\""},
        {"POST", CHAT, "{\"messages\":{}}", 400, "\"param\":\"messages\""},
        {"POST", CHAT, "{\"messages\":[]}", 400, "\"param\":\"messages\""},
        {"POST", CHAT, "{\"messages\":[1]}", 400, "messages[0]"},
        {"POST", CHAT, "{\"messages\":[{\"content\":\"x\"}]}", 400, "messages[0].role"},
        {"POST", CHAT, "{\"messages\":[{\"role\":\"king\",\"content\":\"x\"}]}", 400, "king"},
        {"POST", CHAT, "{\"messages\":[{\"role\":\"user\"}]}", 400, "messages[0].content"},
        {"POST", CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":5}]}", 400,
         "messages[0].content"},
        {"POST", CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\"}]}]}",
         400, "messages[0].content[0].text"},
        {"POST", CHAT,
         "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":{}}]"
         "}]}",
         400, "messages[0]"},
        {"POST", CHAT,
         "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"}]}]}",
         200, "choices"},
        // numbers and ranges
        {"POST", CHAT, "{\"temperature\":0," HI "}", 200, "choices"},
        {"POST", CHAT, "{\"temperature\":2.1," HI "}", 400, "\"param\":\"temperature\""},
        {"POST", CHAT, "{\"temperature\":-1," HI "}", 400, "between 0 and 2"},
        {"POST", CHAT, "{\"temperature\":\"1\"," HI "}", 400, "temperature must be a number"},
        {"POST", CHAT, "{\"temperature\":null," HI "}", 200, "choices"},
        {"POST", CHAT, "{\"top_p\":1.5," HI "}", 400, "\"param\":\"top_p\""},
        {"POST", CHAT, "{\"top_p\":0," HI "}", 200, "choices"},
        {"POST", CHAT, "{\"top_k\":-2," HI "}", 400, "\"param\":\"top_k\""},
        {"POST", CHAT, "{\"top_k\":1.5," HI "}", 400, "\"param\":\"top_k\""},
        {"POST", CHAT, "{\"min_p\":2," HI "}", 400, "\"param\":\"min_p\""},
        {"POST", CHAT, "{\"seed\":-9223372036854775808," HI "}", 200, "choices"},
        {"POST", CHAT, "{\"seed\":true," HI "}", 400, "\"param\":\"seed\""},
        {"POST", CHAT, "{\"max_tokens\":0," HI "}", 400, "\"param\":\"max_tokens\""},
        {"POST", CHAT, "{\"max_tokens\":-1," HI "}", 400, "\"param\":\"max_tokens\""},
        {"POST", CHAT, "{\"max_tokens\":16.0," HI "}", 200, "choices"},
        {"POST", CHAT, "{\"max_tokens\":512," HI "}", 400, "maximum context length"},
        {"POST", CHAT, "{\"max_completion_tokens\":5000," HI "}", 400, "context_length_exceeded"},
        {"POST", CHAT, "{\"min_tokens\":9,\"max_tokens\":8," HI "}", 400,
         "\"param\":\"min_tokens\""},
        {"POST", CHAT, "{\"min_tokens\":511," HI "}", 400, "\"param\":\"min_tokens\""},
        {"POST", CHAT, "{\"presence_penalty\":-3," HI "}", 400, "\"param\":\"presence_penalty\""},
        {"POST", CHAT, "{\"repetition_penalty\":0," HI "}", 400,
         "\"param\":\"repetition_penalty\""},
        {"POST", CHAT, "{\"n\":0," HI "}", 400, "\"param\":\"n\""},
        {"POST", CHAT, "{\"n\":17," HI "}", 400, "\"param\":\"n\""},
        {"POST", CHAT, "{\"logprobs\":true,\"top_logprobs\":21," HI "}", 400,
         "\"param\":\"top_logprobs\""},
        {"POST", CHAT, "{\"top_logprobs\":2," HI "}", 400, "\"param\":\"top_logprobs\""},
        {"POST", CHAT, "{\"stream\":1," HI "}", 400, "\"param\":\"stream\""},
        {"POST", CHAT, "{\"stop\":[1]," HI "}", 400, "\"param\":\"stop\""},
        {"POST", CHAT, "{\"stop\":\"\"," HI "}", 400, "\"param\":\"stop\""},
        {"POST", CHAT,
         "{\"stop\":[\"1\",\"2\",\"3\",\"4\",\"5\",\"6\",\"7\",\"8\",\"9\",\"a\",\"b\",\"c\",\"d\","
         "\"e\","
         "\"f\",\"g\",\"h\"]," HI "}",
         400, "\"param\":\"stop\""},
        {"POST", CHAT, "{\"stop\":[],\"stop_token_ids\":[275]," HI "}", 200, "choices"},
        {"POST", CHAT, "{\"stop_token_ids\":[276]," HI "}", 400, "\"param\":\"stop_token_ids\""},
        {"POST", CHAT, "{\"stop_token_ids\":[-1]," HI "}", 400, "\"param\":\"stop_token_ids\""},
        // what is not there, and what does not matter
        {"POST", CHAT, "{\"banana\":1," HI "}", 400, "unknown parameter \\\"banana\\\""},
        {"POST", CHAT, "{\"tool_choice\":\"required\"," HI "}", 400, "\"param\":\"tool_choice\""},
        {"POST", CHAT, "{\"tool_choice\":{\"type\":\"function\"}," HI "}", 400,
         "\"param\":\"tool_choice\""},
        {"POST", CHAT, "{\"tool_choice\":\"auto\"," HI "}", 200, "choices"},
        {"POST", CHAT, "{\"response_format\":{\"type\":\"json_object\"}," HI "}", 200, "choices"},
        {"POST", CHAT, "{\"response_format\":{\"type\":\"xml\"}," HI "}", 400,
         "response_format.type \\\"xml\\\" is not supported"},
        {"POST", CHAT, "{\"response_format\":{\"type\":\"json_schema\"}," HI "}", 400,
         "response_format.schema must be an object"},
        {"POST", CHAT,
         "{\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"x\","
         "\"schema\":"
         "{\"properties\":{\"a\":{\"not\":{}}}}}}," HI "}",
         400, "response_format: properties.a: \\\"not\\\" is not supported"},
        {"POST", CHAT, "{\"response_format\":{\"type\":\"json_object\"},\"min_tokens\":2," HI "}",
         400, "min_tokens together with response_format is not supported"},
        {"POST", CHAT,
         "{\"response_format\":{\"type\":\"json_object\"},\"ignore_eos\":true," HI "}", 400,
         "\"param\":\"ignore_eos\""},
        {"POST", CHAT,
         "{\"tool_choice\":{\"type\":\"function\",\"function\":{\"name\":\"g\"}}," F_TOOL HI "}",
         400, "names \\\"g\\\", which is none of the tools"},
        {"POST", CHAT, "{\"tool_choice\":{\"type\":\"allowed_tools\"}," F_TOOL HI "}", 400,
         "tool_choice allowed_tools is not supported"},
        {"POST", CHAT, "{\"response_format\":{\"type\":\"text\"}," HI "}", 200, "choices"},
        {"POST", CHAT, "{\"logit_bias\":{\"5\":1,\"6\":-100}," HI "}", 200, "choices"},
        {"POST", CHAT, "{\"logit_bias\":[5]," HI "}", 400, "logit_bias must be an object"},
        {"POST", CHAT, "{\"logit_bias\":{\"05\":1}," HI "}", 400, "\"05\\\", which is no token"},
        {"POST", CHAT, "{\"logit_bias\":{\"dog\":1}," HI "}", 400, "no token id"},
        {"POST", CHAT, "{\"logit_bias\":{\"276\":1}," HI "}", 400, "between 0 and 275"},
        {"POST", CHAT, "{\"logit_bias\":{\"-1\":1}," HI "}", 400, "between 0 and 275"},
        {"POST", CHAT, "{\"logit_bias\":{\"5\":101}," HI "}", 400, "\"param\":\"logit_bias\""},
        {"POST", CHAT, "{\"logit_bias\":{\"5\":\"1\"}," HI "}", 400, "logit_bias[5]"},
        {"POST", CHAT, "{\"parallel_tool_calls\":1," HI "}", 400,
         "\"param\":\"parallel_tool_calls\""},
        {"POST", CHAT,
         "{\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"strict\":true,"
         "\"parameters\":{\"type\":\"object\",\"patternProperties\":{}}}}]," HI "}",
         400, "tools: tool f: \\\"patternProperties\\\" is not supported"},
        {"POST", CHAT, "{\"stream_options\":{\"x\":true}," HI "}", 400, "stream_options.x"},
        {"POST", CHAT, "{\"logit_bias\":{}," HI "}", 200, "choices"},
        {"POST", CHAT, "{\"functions\":[{}]," HI "}", 400, "\"param\":\"functions\""},
        {"POST", CHAT, "{\"kv_transfer_params\":{\"a\":1}," HI "}", 400, "kv_transfer_params"},
        {"POST", CHAT, "{\"chat_template\":\"x\"," HI "}", 400, "chat_template"},
        {"POST", CHAT, "{\"chat_template_kwargs\":{\"x\":1}," HI "}", 400,
         "chat_template_kwargs.x"},
        {"POST", CHAT, "{\"reasoning_effort\":\"huge\"," HI "}", 400,
         "\"param\":\"reasoning_effort\""},
        {"POST", CHAT, "{\"tools\":[{}]," HI "}", 400, "\"param\":\"tools\""},
        {"POST", CHAT,
         "{\"user\":\"u\",\"metadata\":{},\"store\":false,\"service_tier\":\"auto\",\"prompt_cache_"
         "key\":\"k\","
         "\"parallel_tool_calls\":true,\"safety_identifier\":\"s\",\"verbosity\":\"low\","
         "\"logprobs\":false,"
         "\"stream\":false,\"stream_options\":null,\"modalities\":[\"text\"]," HI "}",
         200, "choices"},
        // completions
        {"POST", COMP, "{\"prompt\":\"a\"}", 200, "text_completion"},
        {"POST", COMP, "{\"prompt\":[\"a\",\"b\"]}", 200, "\"index\":1"},
        {"POST", COMP, "{\"prompt\":[65,66]}", 200, "choices"},
        {"POST", COMP, "{\"prompt\":[[65],[66]]}", 200, "\"index\":1"},
        {"POST", COMP, "{}", 400, "\"param\":\"prompt\""},
        {"POST", COMP, "{\"prompt\":[]}", 400, "\"param\":\"prompt\""},
        {"POST", COMP, "{\"prompt\":\"\"}", 400, "\"param\":\"prompt\""},
        {"POST", COMP, "{\"prompt\":[65,\"a\"]}", 400, "prompt[1]"},
        {"POST", COMP, "{\"prompt\":[276]}", 400, "between 0 and 275"},
        {"POST", COMP, "{\"prompt\":[[65],[-1]]}", 400, "prompt[1][0]"},
        {"POST", COMP, "{\"prompt\":{}}", 400, "\"param\":\"prompt\""},
        {"POST", COMP, "{\"prompt\":\"a\",\"suffix\":\"b\"}", 400, "\"param\":\"suffix\""},
        {"POST", COMP, "{\"prompt\":\"a\",\"best_of\":2}", 200, "\"completion_tokens\":12"},
        {"POST", COMP, "{\"prompt\":\"a\",\"n\":3,\"best_of\":2}", 400, "\"param\":\"best_of\""},
        {"POST", COMP, "{\"prompt\":\"a\",\"best_of\":2,\"stream\":true}", 400,
         "\"param\":\"best_of\""},
        {"POST", COMP, "{\"prompt\":\"a\",\"logprobs\":21}", 400, "\"param\":\"logprobs\""},
        {"POST", COMP, "{\"prompt\":\"a\",\"echo\":true,\"logprobs\":1}", 400,
         "\"param\":\"echo\""},
        {"POST", COMP, "{\"prompt\":\"a\",\"max_tokens\":0}", 400, "\"param\":\"max_tokens\""},
        {"POST", COMP, "{\"prompt\":\"ab\",\"max_tokens\":0,\"echo\":true}", 200,
         "\"text\":\"ab\""},
        {"POST", COMP,
         "{\"prompt\":[\"1\",\"2\",\"3\",\"4\",\"5\",\"6\",\"7\",\"8\",\"9\"],\"n\":16}", 400,
         "144 choices"},
        {"POST", COMP, "{\"prompt\":\"a\",\"messages\":[]}", 400, "unknown parameter"},
        // LightLLM
        {"POST", "/generate", "{\"inputs\":\"a\"}", 200, "generated_text"},
        {"POST", "/generate", "{\"inputs\":\"a\",\"parameters\":{\"max_new_tokens\":3}}", 200,
         "\"length\""},
        {"POST", "/generate", "{\"parameters\":{}}", 400, "\"param\":\"inputs\""},
        {"POST", "/generate", "{\"inputs\":\"a\",\"parameters\":[]}", 400,
         "\"param\":\"parameters\""},
        {"POST", "/generate", "{\"inputs\":\"a\",\"parameters\":{\"max_new_tokens\":0}}", 400,
         "max_new_tokens"},
        {"POST", "/generate", "{\"inputs\":\"a\",\"parameters\":{\"group_request_id\":5}}", 400,
         "group_request_id"},
        {"POST", "/generate",
         "{\"inputs\":\"a\",\"parameters\":{\"guided_json\":\"{\\\"not\\\":{}}\"}}", 400,
         "guided_json: \\\"not\\\" is not supported"},
        {"POST", "/generate", "{\"inputs\":\"a\",\"parameters\":{\"guided_json\":\"{\"}}", 400,
         "guided_json: bad JSON at line 1"},
        {"POST", CHAT, "{\"guided_json\":[1]," HI "}", 400, "guided_json must be a schema"},
        {"POST", CHAT, "{\"structured_outputs\":{\"regex\":\"a\"}," HI "}", 400,
         "structured_outputs.regex is not supported"},
        {"POST", "/generate", "{\"inputs\":\"a\",\"multimodal_params\":{\"images\":[1]}}", 400,
         "multimodal"},
        {"POST", "/generate_stream", "{\"inputs\":\"a\",\"parameters\":{\"best_of\":2}}", 400,
         "best_of"},
        // tokeniser
        {"POST", "/tokenize", "{\"text\":\"AB\"}", 200,
         "{\"tokens\":[65,66],\"count\":2,\"ntokens\":2,"},
        {"POST", "/tokenize", "{\"prompt\":\"A<|user|>\"}", 200, "[65,263]"},
        {"POST", "/tokens", "{\"text\":\"AB\",\"parameters\":{}}", 200, "\"ntokens\":2"},
        {"POST", "/tokenize", "{" HI "}", 200, "[258,260,263,72,105,264,266]"},
        {"POST", "/tokenize", "{\"messages\":[{\"role\":\"user\",\"content\":\"<|user|>\"}]}", 200,
         "[258,260,263,60,124,117,115,101,114,124,62,264,266]"},
        {"POST", "/tokenize", "{\"text\":\"a\"," HI "}", 400, "both"},
        {"POST", "/tokenize", "{}", 400, "\"param\":\"text\""},
        {"POST", "/tokenize", "{\"text\":5}", 400, "\"param\":\"text\""},
        {"POST", "/detokenize", "{\"tokens\":[72,105,263]}", 200, "\"prompt\":\"Hi<|user|>\""},
        {"POST", "/detokenize", "{\"tokens\":[226]}", 200, "\xef\xbf\xbd"},
        {"POST", "/detokenize", "{\"tokens\":[]}", 200, "\"text\":\"\""},
        {"POST", "/detokenize", "{\"tokens\":[999]}", 400, "\"param\":\"tokens\""},
        {"POST", "/detokenize", "{\"tokens\":\"a\"}", 400, "\"param\":\"tokens\""},
    };
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        const struct table_row *row = &rows[i];
        script_reset("hello");
        struct answer a = ask(row->method, row->path, row->body);
        if (a.status != row->status || !strstr(a.body, row->want))
            fprintf(stderr, "row %zu: %s %s %s\n  %s\n", i, row->method, row->path,
                    row->body ? row->body : "", a.body);
        CHECK_INT(a.status, row->status);
        CHECK(strstr(a.body, row->want) != NULL);
        CHECK(a.clean && a.json);
        CHECK(strcmp(header(&a, "X-Request-Id"), "") != 0);
        CHECK(strncmp(header(&a, "Content-Type"), "application/json", 16) == 0);
        if (row->status >= 400) {
            CHECK(json_is_string(at(a.json, "error.message")));
            CHECK(json_is_string(at(a.json, "error.type")));
            CHECK(at(a.json, "error.param") != NULL && at(a.json, "error.code") != NULL);
            CHECK_INT(asked.n_started, 0);
        }
        CHECK_INT(asked.n_live, 0);
        answer_finish(&a);
    }
}

/* What the HTTP server refuses before the API sees it looks like every other error. */
static void refusals_are_answers(void)
{
    static const struct {
        const char *request;
        int status;
        const char *id;
    } rows[] = {
        {"nonsense\r\n\r\n", 400, "req-"},
        {"GET / HTTP/1.1\r\n\r\n", 400, "req-"},
        {"BREW / HTTP/1.1\r\nHost: test\r\n\r\n", 405, "req-"},
        {"GET / HTTP/2.0\r\nHost: test\r\n\r\n", 505, "req-"},
        {"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 99999999\r\n\r\n", 413, "req-"},
        {"POST / HTTP/1.1\r\nHost: test\r\nX-Request-Id: mine\r\nContent-Length: 99999999\r\n\r\n",
         413, "mine"},
    };
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        int fd = client_open();
        struct json_out in = {0};
        client_send(fd, rows[i].request, strlen(rows[i].request));
        client_read(fd, &in, NULL);
        close(fd);
        struct answer a = parse_answer(&in);
        CHECK_INT(a.status, rows[i].status);
        CHECK(a.clean && json_is_string(at(a.json, "error.message")));
        CHECK(!strncmp(header(&a, "X-Request-Id"), rows[i].id, strlen(rows[i].id)));
        CHECK(!strncmp(header(&a, "request-id"), rows[i].id, strlen(rows[i].id)));
        answer_finish(&a);
    }
}

static void http_details(void)
{
    script_reset("x");
    struct answer a = ask_raw("OPTIONS", CHAT, "", NULL, 0);
    CHECK_INT(a.status, 204);
    CHECK_STR(header(&a, "Allow"), "POST, OPTIONS");
    answer_finish(&a);
    a = ask_raw("GET", CHAT, "", NULL, 0);
    CHECK_STR(header(&a, "Allow"), "POST, OPTIONS");
    answer_finish(&a);
    a = ask_raw("HEAD", "/health", "", NULL, 0);
    CHECK_INT(a.status, 200);
    CHECK_INT(a.n_body, 0);
    answer_finish(&a);
    a = ask_raw("GET", "/metrics", "X-Request-Id: mine-7\r\n", NULL, 0);
    CHECK_STR(a.body, "# TYPE demo gauge\ndemo 1\n");
    CHECK_STR(header(&a, "Content-Type"), "text/plain; version=0.0.4; charset=utf-8");
    CHECK_STR(header(&a, "X-Request-Id"), "mine-7");
    answer_finish(&a);
    a = ask("GET", "/", NULL);
    CHECK_INT(a.status, 200);
    CHECK(strstr(a.body, "<!doctype html>") != NULL);
    answer_finish(&a);
    static const struct {
        const char *type;
        int status;
    } types[] = {{"", 200},
                 {"Content-Type: application/json; charset=utf-8\r\n", 200},
                 {"Content-Type: Application/JSON\r\n", 200},
                 {"Content-Type: text/plain\r\n", 415},
                 {"Content-Type: application/jsonx\r\n", 415},
                 {"Content-Type: application/x-www-form-urlencoded\r\n", 415}};
    for (size_t i = 0; i < ARRAY_LEN(types); i++) {
        a = ask_raw("POST", "/tokenize", types[i].type, "{\"text\":\"a\"}", 12);
        CHECK_INT(a.status, types[i].status);
        answer_finish(&a);
    }
    a = ask_raw("POST", CHAT, "Content-Length: 99999999999\r\n", NULL, 0);
    CHECK_INT(a.status, 413); /* answered by the HTTP module, in our words */
    CHECK_STR(text_at(a.json, "error.type"), "invalid_request_error");
    answer_finish(&a);
    script.ready = false;
    a = ask("GET", "/ready", NULL);
    CHECK_INT(a.status, 503);
    answer_finish(&a);
    a = ask("GET", "/health", NULL);
    CHECK_INT(a.status, 200);
    answer_finish(&a);
}

static void chat_answers(void)
{
    script_reset("I see.</think>\n\nHello \xf0\x9f\x98\x80!");
    struct answer a = ask("POST", CHAT, "{" HI "}");
    CHECK_INT(a.status, 200);
    CHECK_STR(asked.prompt, "[gMASK]<sop><|user|>Hi<|assistant|><think>");
    CHECK_STR(text_at(a.json, "choices.0.message.content"), "Hello \xf0\x9f\x98\x80!");
    CHECK_STR(text_at(a.json, "choices.0.message.reasoning_content"), "I see.");
    CHECK_STR(text_at(a.json, "choices.0.message.reasoning"), "I see.");
    CHECK_STR(text_at(a.json, "choices.0.message.role"), "assistant");
    CHECK_STR(text_at(a.json, "choices.0.finish_reason"), "stop");
    CHECK_STR(text_at(a.json, "object"), "chat.completion");
    CHECK_STR(text_at(a.json, "model"), "org/demo");
    CHECK(!strncmp(text_at(a.json, "id"), "chatcmpl-", 9));
    CHECK_INT(int_at(a.json, "usage.prompt_tokens"), 7);
    CHECK_INT(int_at(a.json, "usage.completion_tokens"), 6 + 1 + 2 + 11 + 1);
    CHECK_INT(int_at(a.json, "usage.total_tokens"), 7 + 21);
    CHECK_INT(int_at(a.json, "usage.prompt_tokens_details.cached_tokens"), 2);
    CHECK_INT(int_at(a.json, "usage.completion_tokens_details.reasoning_tokens"), 7);
    CHECK(atoi(header(&a, "openai-processing-ms")) >= 0);
    CHECK_INT(asked.sampling[0].max_tokens, CONTEXT - 7);
    CHECK_NEAR(asked.sampling[0].temperature, 1, 0);
    CHECK_NEAR(asked.sampling[0].top_p, 0.95, 1e-6);
    answer_finish(&a);
}

/* The letters of a token are not the token. */
static void reasoning_goes_by_ids(void)
{
    for (int per_chunk = 1; per_chunk < 40; per_chunk += 4) {
        script_reset("</think>b</think>c");
        script.letters = "a</think>";
        script.per_chunk = per_chunk;
        struct answer a = ask("POST", CHAT, "{\"stop\":[\"zzz\",\"</thinkx\"]," HI "}");
        CHECK_STR(text_at(a.json, "choices.0.message.reasoning_content"), "a</think>\xef\xbf\xbd");
        CHECK_STR(text_at(a.json, "choices.0.message.content"), "b</think>c");
        answer_finish(&a);
    }
    script_reset("never closes");
    struct answer a = ask("POST", CHAT, "{" HI "}");
    CHECK_STR(text_at(a.json, "choices.0.message.reasoning_content"), "never closes");
    CHECK_STR(text_at(a.json, "choices.0.message.content"), "");
    answer_finish(&a);

    static const char *const off[] = {
        "{\"chat_template_kwargs\":{\"enable_thinking\":false}," HI "}",
        "{\"chat_template_kwargs\":{\"thinking\":false}," HI "}",
        "{\"reasoning_effort\":\"none\"," HI "}",
        "{\"thinking\":{\"type\":\"disabled\"}," HI "}",
        "{\"enable_thinking\":false,\"reasoning_effort\":\"high\"," HI "}",
    };
    for (size_t i = 0; i < ARRAY_LEN(off); i++) {
        script_reset("plain");
        a = ask("POST", CHAT, off[i]);
        CHECK_STR(asked.prompt, "[gMASK]<sop><|user|>Hi<|assistant|></think>");
        CHECK_STR(text_at(a.json, "choices.0.message.content"), "plain");
        CHECK(!at(a.json, "choices.0.message.reasoning"));
        answer_finish(&a);
    }
    script_reset("r</think>c");
    a = ask("POST", CHAT, "{\"separate_reasoning\":false," HI "}");
    CHECK_STR(text_at(a.json, "choices.0.message.content"), "r</think>c");
    answer_finish(&a);
    a = ask("POST", CHAT, "{\"include_reasoning\":false," HI "}");
    CHECK_STR(text_at(a.json, "choices.0.message.content"), "c");
    CHECK(!at(a.json, "choices.0.message.reasoning"));
    answer_finish(&a);

    /* a call before </think> ends reasoning, if there are tools */
    script_reset("r<tool_call>f");
    a = ask("POST", CHAT,
            "{\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}]," HI "}");
    CHECK(strstr(asked.prompt, "# Tools") != NULL);
    CHECK_STR(text_at(a.json, "choices.0.message.reasoning"), "r<tool_call>f"); /* it is none */
    CHECK_STR(text_at(a.json, "choices.0.message.content"), "");
    CHECK(!at(a.json, "choices.0.message.tool_calls"));
    answer_finish(&a);
    script_reset("r");
    a = ask("POST", CHAT,
            "{\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}],"
            "\"tool_choice\":\"none\"," HI "}");
    CHECK(strstr(asked.prompt, "# Tools") == NULL);
    answer_finish(&a);
}

#define TOOLS                                                                                      \
    "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"light\",\"parameters\":{\"type\":" \
    "\"object\",\"properties\":{\"room\":{\"type\":\"string\"},\"on\":{\"type\":\"boolean\"}}}}}," \
    "{\"type\":\"function\",\"function\":{\"name\":\"now\"}}],"
#define ON "<arg_key>on</arg_key><arg_value>true</arg_value>"

/* The same output whole and streamed. */
static void tool_calls(void)
{
    static const struct {
        const char *output, *reasoning, *content; /* content NULL: null */
        const char *names[2], *arguments[2];
        const char *finish;
        bool limit; /* the output is cut, not ended */
    } rows[] = {
        {"why</think><tool_call>light<arg_key>room</arg_key><arg_value>a \"b\"\n</arg_value>" ON
         "</tool_call>",
         "why",
         NULL,
         {"light"},
         {"{\"room\": \"a \\\"b\\\"\\n\", \"on\": true}"},
         "tool_calls"},
        {"why</think>Wait.<tool_call>now</tool_call> And<tool_call>light" ON "</tool_call>",
         "why",
         "Wait. And",
         {"now", "light"},
         {"{}", "{\"on\": true}"},
         "tool_calls"},
        {"why<tool_call>now</tool_call>", "why", NULL, {"now"}, {"{}"}, "tool_calls"},
        {"</think>no call", "", "no call", {NULL}, {NULL}, "stop"},
        {"</think>", "", "", {NULL}, {NULL}, "stop"},
        {"</think><tool_call>light<arg_key>room</arg_key><arg_value>gar",
         "",
         NULL,
         {"light"},
         {"{\"room\": \"gar"},
         "length",
         true},
        {"</think>a<tool_call>ligh", "", "a<tool_call>ligh", {NULL}, {NULL}, "length", true},
    };
    cluster.model.max_total_tokens = 4096;
    for (size_t i = 0; i < ARRAY_LEN(rows) * 3; i++) {
        size_t k = i / 3;
        script_reset(rows[k].output);
        script.no_eos = rows[k].limit;
        script.per_chunk = i % 3 == 0 ? 1 : i % 3 == 1 ? 7 : 60;
        struct answer a = ask("POST", CHAT, "{" TOOLS HI "}");
        struct answer s = ask("POST", CHAT, "{\"stream\":true," TOOLS HI "}");
        const json_t *m = at(a.json, "choices.0.message");
        CHECK_STR(text_at(a.json, "choices.0.finish_reason"), rows[k].finish);
        CHECK(rows[k].content ? json_is_string(at(m, "content")) : json_is_null(at(m, "content")));
        json_t *e = events_of(&s, "data: ");
        if (rows[k].content)
            CHECK_STR(text_at(m, "content"), rows[k].content);
        CHECK_JOINED(e, 0, "choices.0.delta.content", rows[k].content ? rows[k].content : "");
        CHECK_JOINED(e, 0, "choices.0.delta.reasoning", rows[k].reasoning);
        CHECK(rows[k].reasoning[0] ? !strcmp(text_at(m, "reasoning"), rows[k].reasoning)
                                   : !at(m, "reasoning"));
        CHECK_STR(text_at(json_array_get(e, json_array_size(e) - 2), "choices.0.finish_reason"),
                  rows[k].finish);
        CHECK_INT(json_array_size(at(m, "tool_calls")), !!rows[k].names[0] + !!rows[k].names[1]);
        for (size_t c = 0; c < 2 && rows[k].names[c]; c++) {
            const json_t *call = json_array_get(at(m, "tool_calls"), c);
            CHECK_STR(text_at(call, "function.name"), rows[k].names[c]);
            CHECK_STR(text_at(call, "function.arguments"), rows[k].arguments[c]);
            CHECK_STR(text_at(call, "type"), "function");
            CHECK(!strncmp(text_at(call, "id"), "call_", 5) && strlen(text_at(call, "id")) == 29);
        }
        struct json_out arguments[2] = {{0}};
        int n_heads = 0;
        for (size_t j = 0; j < json_array_size(e); j++) {
            const json_t *t = at(json_array_get(e, j), "choices.0.delta.tool_calls.0");
            if (!t)
                continue;
            long long idx = int_at(t, "index");
            REQUIRE(idx >= 0 && idx < 2 && rows[k].names[idx]);
            if (at(t, "id")) {
                CHECK_INT(idx, n_heads++);
                CHECK_STR(text_at(t, "function.name"), rows[k].names[idx]);
                CHECK_STR(text_at(t, "type"), "function");
            }
            const char *part = text_at(t, "function.arguments");
            json_out_raw(&arguments[idx], part, strlen(part));
        }
        for (int c = 0; c < 2; c++) {
            json_out_raw(&arguments[c], "", 1);
            CHECK_STR(arguments[c].data, rows[k].arguments[c] ? rows[k].arguments[c] : "");
            json_out_finish(&arguments[c]);
        }
        json_decref(e);
        answer_finish(&a);
        answer_finish(&s);
    }

    /* One call at a time: </tool_call> ends the output, of a call without arguments too. */
    static const char *const ones[] = {
        "</think><tool_call>light" ON "</tool_call><tool_call>now</tool_call>",
        "</think><tool_call>now</tool_call><tool_call>now</tool_call>"};
    for (size_t i = 0; i < 2 * ARRAY_LEN(ones); i++) {
        script_reset(ones[i / 2]);
        script.per_chunk = i % 2 ? 1 : 60;
        struct answer one = ask("POST", CHAT, "{\"parallel_tool_calls\":false," TOOLS HI "}");
        CHECK_INT(json_array_size(at(one.json, "choices.0.message.tool_calls")), 1);
        CHECK_STR(text_at(one.json, "choices.0.message.tool_calls.0.function.arguments"),
                  i / 2 ? "{}" : "{\"on\": true}");
        CHECK_STR(text_at(one.json, "choices.0.finish_reason"), "tool_calls");
        CHECK(json_is_null(at(one.json, "choices.0.message.content")));
        answer_finish(&one);
    }

    /* Two requests with one seed do not share ids; --tool-call-parser none leaves all as text. */
    script_reset("</think><tool_call>now</tool_call>");
    struct answer a = ask("POST", CHAT, "{\"seed\":1," TOOLS HI "}");
    struct answer b = ask("POST", CHAT, "{\"seed\":1," TOOLS HI "}");
    CHECK(strcmp(text_at(a.json, "choices.0.message.tool_calls.0.id"),
                 text_at(b.json, "choices.0.message.tool_calls.0.id")) != 0);
    answer_finish(&a);
    answer_finish(&b);
    api->parse_calls = false;
    a = ask("POST", CHAT, "{" TOOLS HI "}");
    CHECK_STR(text_at(a.json, "choices.0.message.content"), "<tool_call>now</tool_call>");
    CHECK_STR(text_at(a.json, "choices.0.finish_reason"), "stop");
    answer_finish(&a);
    api->parse_calls = true;
    cluster.model.max_total_tokens = CONTEXT;
}

static void chat_streams(void)
{
    for (int per_chunk = 1; per_chunk <= 16; per_chunk += 5) {
        script_reset("I see.</think>\n\nHello \xf0\x9f\x98\x80!");
        script.per_chunk = per_chunk;
        struct answer a = ask("POST", CHAT, "{\"stream\":true," HI "}");
        CHECK_INT(a.status, 200);
        CHECK_STR(header(&a, "Content-Type"), "text/event-stream; charset=utf-8");
        CHECK_STR(header(&a, "Cache-Control"), "no-cache");
        CHECK_STR(header(&a, "X-Accel-Buffering"), "no");
        CHECK(a.clean);
        json_t *e = events_of(&a, "data: ");
        size_t n = json_array_size(e);
        REQUIRE(n >= 4);
        CHECK_STR(text_at(e, "0.choices.0.delta.role"), "assistant");
        CHECK_STR(text_at(e, "0.choices.0.delta.content"), "");
        CHECK_JOINED(e, 0, "choices.0.delta.content", "Hello \xf0\x9f\x98\x80!");
        CHECK_JOINED(e, 0, "choices.0.delta.reasoning_content", "I see.");
        CHECK_JOINED(e, 0, "choices.0.delta.reasoning", "I see.");
        CHECK_STR(json_string_value(json_array_get(e, n - 1)), "[DONE]");
        const json_t *last = json_array_get(e, n - 2);
        CHECK_STR(text_at(last, "choices.0.finish_reason"), "stop");
        CHECK_INT(json_object_size(at(last, "choices.0.delta")), 0);
        for (size_t i = 0; i + 1 < n; i++) {
            const json_t *event = json_array_get(e, i);
            CHECK_STR(text_at(event, "object"), "chat.completion.chunk");
            CHECK_STR(text_at(event, "id"), text_at(e, "0.id"));
            CHECK(!at(event, "usage"));
            CHECK(json_is_null(at(event, "choices.0.logprobs")));
            CHECK(i + 2 == n || json_is_null(at(event, "choices.0.finish_reason")));
        }
        json_decref(e);
        answer_finish(&a);
    }
}

static void usage_chunk(void)
{
    script_reset("ab");
    struct answer a =
        ask("POST", CHAT, "{\"stream\":true,\"stream_options\":{\"include_usage\":true}," HI "}");
    json_t *e = events_of(&a, "data: ");
    size_t n = json_array_size(e);
    const json_t *last = json_array_get(e, n - 2);
    CHECK(json_is_array(at(last, "choices")) && json_array_size(at(last, "choices")) == 0);
    CHECK_INT(int_at(last, "usage.prompt_tokens"), 7);
    CHECK_INT(int_at(last, "usage.completion_tokens"), 3);
    CHECK_INT(int_at(last, "usage.total_tokens"), 10);
    for (size_t i = 0; i + 2 < n; i++)
        CHECK(json_is_null(at(json_array_get(e, i), "usage")));
    json_decref(e);
    answer_finish(&a);
    a = ask("POST", CHAT,
            "{\"stream\":true,\"stream_options\":{\"include_usage\":true,"
            "\"continuous_usage_stats\":true}," HI "}");
    e = events_of(&a, "data: ");
    CHECK_INT(int_at(e, "1.usage.completion_tokens"), 1);
    CHECK_INT(int_at(e, "2.usage.completion_tokens"), 2);
    CHECK_INT(int_at(e, "2.usage.total_tokens"), 9);
    CHECK_INT(int_at(json_array_get(e, json_array_size(e) - 2), "usage.completion_tokens"), 3);
    json_decref(e);
    answer_finish(&a);
}

static void several_choices(void)
{
    script_reset("</think>ok");
    struct answer a = ask("POST", CHAT, "{\"n\":3,\"seed\":42," HI "}");
    CHECK_INT(json_array_size(at(a.json, "choices")), 3);
    CHECK_INT(int_at(a.json, "choices.2.index"), 2);
    CHECK_STR(text_at(a.json, "choices.2.message.content"), "ok");
    CHECK_INT(int_at(a.json, "usage.prompt_tokens"), 7); /* once */
    CHECK_INT(int_at(a.json, "usage.completion_tokens"), 3 * 4);
    CHECK_INT(asked.n_started, 3);
    CHECK_INT(asked.n_admits, 3);
    CHECK(asked.sampling[0].seed == 42);
    CHECK(asked.sampling[1].seed != asked.sampling[0].seed &&
          asked.sampling[2].seed != asked.sampling[1].seed);
    uint64_t second = asked.sampling[1].seed;
    answer_finish(&a);
    script_reset("</think>ok");
    a = ask("POST", CHAT, "{\"n\":2,\"seed\":42,\"stream\":true," HI "}");
    CHECK(asked.sampling[1].seed == second);
    json_t *e = events_of(&a, "data: ");
    CHECK_JOINED(e, 0, "choices.0.delta.content", "ok");
    CHECK_JOINED(e, 1, "choices.0.delta.content", "ok");
    CHECK_JOINED(e, 1, "choices.0.delta.role", "assistant");
    CHECK_JOINED(e, 1, "choices.0.finish_reason", "stop");
    json_decref(e);
    answer_finish(&a);
}

static void logprobs(void)
{
    script_reset("</think>a\xc3\xa9");
    struct answer a = ask("POST", CHAT, "{\"logprobs\":true,\"top_logprobs\":2," HI "}");
    CHECK_INT(asked.sampling[0].n_logprobs, 2);
    const json_t *lp = at(a.json, "choices.0.logprobs.content");
    CHECK_INT(json_array_size(lp), 4); /* the eos has none */
    CHECK_STR(text_at(lp, "1.token"), "a");
    CHECK_NEAR(json_number_value(at(lp, "1.logprob")), -1, 1e-6);
    CHECK_INT(int_at(lp, "1.bytes.0"), 'a');
    CHECK_INT(json_array_size(at(lp, "1.top_logprobs")), 2);
    CHECK_STR(text_at(lp, "1.top_logprobs.1.token"), "b");
    CHECK_STR(text_at(lp, "2.token"), "\xef\xbf\xbd");
    CHECK_INT(int_at(lp, "2.bytes.0"), 0xc3);
    answer_finish(&a);

    a = ask("POST", CHAT, "{\"logprobs\":true,\"stream\":true," HI "}");
    json_t *e = events_of(&a, "data: ");
    size_t n = 0;
    for (size_t i = 0; i < json_array_size(e); i++)
        n += json_array_size(at(json_array_get(e, i), "choices.0.logprobs.content"));
    CHECK_INT(n, 4);
    json_decref(e);
    answer_finish(&a);

    script_reset("x\xc3\xa9y");
    a = ask("POST", COMP, "{\"prompt\":\"p\",\"logprobs\":1}");
    lp = at(a.json, "choices.0.logprobs");
    CHECK_STR(text_at(lp, "tokens.0"), "x");
    CHECK_STR(text_at(lp, "tokens.1"), "bytes:\\xc3");
    CHECK_INT(json_array_size(at(lp, "tokens")), 4);
    CHECK_INT(json_array_size(at(lp, "token_logprobs")), 4);
    CHECK_NEAR(json_number_value(at(lp, "token_logprobs.1")), -1, 1e-6);
    CHECK_NEAR(json_number_value(at(lp, "top_logprobs.0.x")), -0.5, 1e-6);
    CHECK_INT(int_at(lp, "text_offset.0"), 0);
    CHECK_INT(int_at(lp, "text_offset.2"), 1);
    CHECK_INT(int_at(lp, "text_offset.3"), 2); /* in characters */
    answer_finish(&a);
}

static void completions(void)
{
    script_reset("ab\xc3\xa9");
    struct answer a = ask("POST", COMP, "{\"prompt\":\"Q<|user|>\",\"max_tokens\":3}");
    CHECK_INT(asked.n_prompt, 2); /* added tokens are recognised in raw prompts */
    CHECK_STR(text_at(a.json, "choices.0.text"), "ab\xef\xbf\xbd");
    CHECK_STR(text_at(a.json, "choices.0.finish_reason"), "length");
    answer_finish(&a);
    a = ask("POST", COMP, "{\"prompt\":[\"P\",[81]],\"n\":2,\"echo\":true}");
    CHECK_INT(a.status, 200);
    CHECK_STR(text_at(a.json, "choices.1.text"), "Pab\xc3\xa9");
    CHECK_STR(text_at(a.json, "choices.2.text"), "Qab\xc3\xa9");
    CHECK_INT(int_at(a.json, "usage.prompt_tokens"), 2);
    answer_finish(&a);
    a = ask("POST", COMP, "{\"prompt\":\"P\",\"echo\":true,\"stream\":true,\"stop\":[\"b\"]}");
    json_t *e = events_of(&a, "data: ");
    CHECK_JOINED(e, 0, "choices.0.text", "Pa");
    CHECK_STR(text_at(e, "0.object"), "text_completion");
    CHECK_JOINED(e, 0, "choices.0.finish_reason", "stop");
    json_decref(e);
    answer_finish(&a);
    a = ask("POST", COMP, "{\"prompt\":\"P\",\"echo\":true,\"stream\":true,\"max_tokens\":0}");
    e = events_of(&a, "data: ");
    CHECK_JOINED(e, 0, "choices.0.text", "P");
    CHECK_JOINED(e, 0, "choices.0.finish_reason", "length");
    CHECK(a.clean);
    json_decref(e);
    answer_finish(&a);

    /* the context, exactly */
    char prompt[CONTEXT + 2], body[CONTEXT + 100];
    static const struct {
        int n_prompt, max_tokens, status;
    } sizes[] = {{CONTEXT - 1, 0, 200}, {CONTEXT, 0, 400},     {CONTEXT + 1, 0, 400},
                 {CONTEXT - 8, 8, 200}, {CONTEXT - 8, 9, 400}, {1, CONTEXT - 1, 200},
                 {1, CONTEXT, 400},     {1, 999999999, 400}};
    for (size_t i = 0; i < ARRAY_LEN(sizes); i++) {
        memset(prompt, 'p', sizeof(prompt));
        prompt[sizes[i].n_prompt] = '\0';
        if (sizes[i].max_tokens)
            snprintf(body, sizeof(body), "{\"prompt\":\"%s\",\"max_tokens\":%d}", prompt,
                     sizes[i].max_tokens);
        else
            snprintf(body, sizeof(body), "{\"prompt\":\"%s\"}", prompt);
        a = ask("POST", COMP, body);
        CHECK_INT(a.status, sizes[i].status);
        if (a.status == 400) {
            CHECK_STR(text_at(a.json, "error.code"), "context_length_exceeded");
            CHECK(strstr(text_at(a.json, "error.message"), "maximum context length") != NULL);
        }
        answer_finish(&a);
    }
}

/* The gens of one prompt: 0 1 2 3; their first logprobs: -1 -1.5 -0.5 -2.5. */
static void best_of(void)
{
    script_reset("x");
    script.dearest = 2;
    struct answer a = ask("POST", COMP, "{\"prompt\":\"a\",\"n\":2,\"best_of\":4,\"logprobs\":0}");
    CHECK_INT(asked.n_started, 4);
    CHECK_INT(json_array_size(at(a.json, "choices")), 2);
    CHECK_INT(int_at(a.json, "choices.1.index"), 1);
    CHECK_NEAR(json_number_value(at(a.json, "choices.0.logprobs.token_logprobs.0")), -0.5, 1e-6);
    CHECK_NEAR(json_number_value(at(a.json, "choices.1.logprobs.token_logprobs.0")), -1, 1e-6);
    CHECK_INT(int_at(a.json, "usage.completion_tokens"), 8); /* those left out cost as well */
    answer_finish(&a);
    script_reset("x");
    script.dearest = 2;
    a = ask("POST", COMP, "{\"prompt\":[\"a\",\"b\"],\"best_of\":3}");
    CHECK_INT(asked.n_started, 6);
    CHECK_INT(json_array_size(at(a.json, "choices")), 2);
    CHECK_INT(int_at(a.json, "choices.1.index"), 1);
    CHECK(json_is_null(at(a.json, "choices.0.logprobs")));
    CHECK_INT(int_at(a.json, "usage.prompt_tokens"), 2);
    answer_finish(&a);
}

static void sampling_reaches_the_worker(void)
{
    script_reset("x");
    struct answer a =
        ask("POST", CHAT,
            "{\"temperature\":0.5,\"top_p\":0.25,\"top_k\":7,\"min_p\":0.125,\"seed\":-1,"
            "\"max_tokens\":20,\"min_tokens\":2,\"presence_penalty\":0.5,\"frequency_penalty\":-1,"
            "\"repetition_penalty\":1.5,\"ignore_eos\":true,\"stop_token_ids\":[65,66],"
            "\"logit_bias\":{\"5\":1,\"200\":-12.5},\"cache_salt\":\"s\"," HI "}");
    CHECK_INT(a.status, 200);
    CHECK_INT(asked.n_bias, 2);
    CHECK_INT(asked.bias_id, 200);
    CHECK_NEAR(asked.bias_value, -12.5, 0);
    const struct wire_sampling *s = &asked.sampling[0];
    CHECK_NEAR(s->temperature, 0.5, 0);
    CHECK_NEAR(s->top_p, 0.25, 0);
    CHECK_INT(s->top_k, 7);
    CHECK_NEAR(s->min_p, 0.125, 0);
    CHECK(s->seed == UINT64_MAX);
    CHECK_INT(s->max_tokens, 20);
    CHECK_INT(s->min_tokens, 2);
    CHECK_NEAR(s->presence_penalty, 0.5, 0);
    CHECK_NEAR(s->frequency_penalty, -1, 0);
    CHECK_NEAR(s->repetition_penalty, 1.5, 0);
    CHECK_INT(s->ignore_eos, 1);
    CHECK_INT(s->n_stop_ids, 2);
    CHECK_INT(s->stop_ids[1], 66);
    CHECK_INT(s->n_logprobs, -1);
    CHECK(asked.cache_salt != 0);
    answer_finish(&a);
    static const char *const greedy[] = {"\"temperature\":0", "\"temperature\":1e-9", "\"top_p\":0",
                                         "\"top_k\":1", "\"do_sample\":false"};
    for (size_t i = 0; i < ARRAY_LEN(greedy); i++) {
        char body[256];
        script_reset("x");
        snprintf(body, sizeof(body), "{%s," HI "}", greedy[i]);
        a = ask("POST", CHAT, body);
        CHECK_INT(a.status, 200);
        CHECK_NEAR(asked.sampling[0].temperature, 0, 0);
        CHECK(asked.sampling[0].top_p > 0);
        answer_finish(&a);
    }
}

static void generate(void)
{
    script_reset("he\xc3\xa9lo");
    struct answer a = ask("POST", "/generate",
                          "{\"inputs\":\"Q\",\"parameters\":{\"max_new_tokens\":100,"
                          "\"return_details\":true,\"skip_special_tokens\":true}}");
    CHECK_STR(text_at(a.json, "generated_text.0"), "he\xc3\xa9lo");
    CHECK_INT(int_at(a.json, "count_output_tokens"), 7);
    CHECK_STR(text_at(a.json, "finish_reason"), "stop");
    CHECK_INT(int_at(a.json, "prompt_tokens"), 1);
    CHECK_INT(json_array_size(at(a.json, "tokens")), 7);
    CHECK_INT(int_at(a.json, "tokens.0.id"), 'h');
    CHECK_STR(text_at(a.json, "tokens.2.text"), "");
    CHECK_STR(text_at(a.json, "tokens.3.text"), "\xc3\xa9");
    CHECK_STR(text_at(a.json, "tokens.6.text"), "");
    CHECK(json_is_true(at(a.json, "tokens.6.special")));
    CHECK_NEAR(asked.sampling[0].temperature, 0, 0); /* do_sample is off unless asked for */
    answer_finish(&a);
    script_reset("xyz");
    a = ask("POST", "/generate",
            "{\"inputs\":\"Q\",\"parameters\":{\"do_sample\":true,\"n\":2,\"best_of\":2,"
            "\"temperature\":3,\"stop_sequences\":[\"yz\",[70]]}}");
    CHECK_STR(text_at(a.json, "generated_text.1"), "x");
    CHECK_INT(json_array_size(at(a.json, "count_output_tokens")), 2);
    CHECK_STR(text_at(a.json, "finish_reason.1"), "stop");
    CHECK(!at(a.json, "tokens"));
    CHECK_NEAR(asked.sampling[0].temperature, 3, 0);
    CHECK_INT(asked.sampling[0].stop_ids[0], 70);
    answer_finish(&a);
}

static void generate_streams(void)
{
    static const struct {
        const char *said, *parameters, *text, *finish;
        int n_events;
    } rows[] = {
        {"he\xc3\xa9lo", "", "he\xc3\xa9lo", "stop", 7},
        {"he\xc3\xa9lo", "\"max_new_tokens\":3", "he\xef\xbf\xbd", "length", 3},
        {"he\xc3\xa9lo", "\"max_new_tokens\":2", "he", "length", 2},
        {"hello", "\"stop_sequences\":\"lo\"", "hel", "stop", 5},
        {"hello", "\"stop_sequences\":[\"lox\"]", "hello", "stop", 6},
        {"hello", "\"skip_special_tokens\":false", "hello", "stop", 6},
    };
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        for (int per_chunk = 1; per_chunk < 8; per_chunk++) {
            char body[256];
            script_reset(rows[i].said);
            script.per_chunk = per_chunk;
            snprintf(body, sizeof(body), "{\"inputs\":\"Q\",\"parameters\":{%s}}",
                     rows[i].parameters);
            struct answer a = ask("POST", "/generate_stream", body);
            CHECK_INT(a.status, 200);
            CHECK(a.clean && !strstr(a.body, "[DONE]") && !strstr(a.body, "data: "));
            json_t *e = events_of(&a, "data:");
            size_t n = json_array_size(e);
            CHECK_INT(n, rows[i].n_events);
            CHECK_JOINED(e, -1, "token.text", rows[i].text);
            for (size_t k = 0; k < n; k++) {
                const json_t *event = json_array_get(e, k);
                CHECK_INT(int_at(event, "token.count_output_tokens"), k + 1);
                CHECK_INT(int_at(event, "token.prompt_tokens"), 1);
                CHECK(json_is_real(at(event, "token.logprob")) ||
                      json_is_integer(at(event, "token.logprob")));
                CHECK(json_is_boolean(at(event, "token.special")));
                CHECK(json_is_true(at(event, "finished")) == (k + 1 == n));
                CHECK(at(event, "details") && json_is_null(at(event, "details")));
                if (k + 1 < n)
                    CHECK(json_is_null(at(event, "finish_reason")) &&
                          json_is_null(at(event, "generated_text")));
            }
            CHECK_STR(text_at(json_array_get(e, n - 1), "finish_reason"), rows[i].finish);
            CHECK_STR(text_at(json_array_get(e, n - 1), "generated_text"), rows[i].text);
            json_decref(e);
            answer_finish(&a);
        }
    }
}

static void large_bodies_use_the_pool(void)
{
    script_reset("x");
    size_t n = 100000;
    char *body = malloc(n + 200);
    char *p = body + sprintf(body, "{\"text\":\"");
    memset(p, 'a', n);
    strcpy(p + n, "\"}");
    struct answer a = ask("POST", "/tokenize", body);
    CHECK_INT(a.status, 200);
    CHECK_INT(int_at(a.json, "count"), n);
    answer_finish(&a);
    p = body + sprintf(body, "{\"prompt\":\"");
    memset(p, 'a', n);
    strcpy(p + n, "\"}");
    a = ask("POST", COMP, body);
    CHECK_INT(a.status, 400);
    CHECK_STR(text_at(a.json, "error.code"), "context_length_exceeded");
    answer_finish(&a);
    p = body + sprintf(body, "{\"metadata\":{\"pad\":\"");
    memset(p, 'a', n);
    strcpy(p + n, "\"}," HI "}");
    a = ask("POST", CHAT, body);
    CHECK_INT(a.status, 200);
    CHECK_STR(text_at(a.json, "choices.0.message.reasoning"), "x");
    answer_finish(&a);
    script.admits = ERR_BUSY; /* asked before the work, not after */
    asked.n_admits = 0;
    a = ask("POST", COMP, body);
    CHECK_INT(a.status, 429);
    CHECK_INT(asked.n_admits, 1);
    answer_finish(&a);

    script.admits = ERR_OK;
    size_t before = api->max_pool_bytes; /* what waits for the pool is bounded */
    api->max_pool_bytes = strlen(body) - 1;
    a = ask("POST", "/tokenize", body);
    CHECK_INT(a.status, 429);
    CHECK_STR(header(&a, "Retry-After"), "1");
    answer_finish(&a);
    api->max_pool_bytes = before;

    /* the client leaves while the pool works */
    for (int i = 0; i < 20; i++) {
        int fd = client_open();
        client_ask(fd, "POST", i % 2 ? COMP : "/tokenize", "", body, strlen(body));
        for (int k = 0; k < i; k++)
            uv_run(&loop, UV_RUN_NOWAIT);
        close(fd);
    }
    uint64_t start_us = clock_now_us();
    while (api_n_active(api) && clock_now_us() - start_us < 10000000u)
        uv_run(&loop, UV_RUN_NOWAIT);
    CHECK_INT(api_n_active(api), 0);
    CHECK_INT(api->pool_bytes, 0);
    free(body);
}

static void overload(void)
{
    script_reset("x");
    script.admits = ERR_BUSY;
    struct answer a = ask("POST", CHAT, "{" HI "}");
    CHECK_INT(a.status, 429);
    CHECK_STR(header(&a, "Retry-After"), "3");
    CHECK_STR(header(&a, "retry-after-ms"), "3000");
    CHECK_STR(text_at(a.json, "error.type"), "rate_limit_error");
    CHECK_STR(text_at(a.json, "error.code"), "rate_limit_exceeded");
    answer_finish(&a);
    script.admits = ERR_UNAVAILABLE;
    a = ask("POST", CHAT, "{\"stream\":true," HI "}");
    CHECK_INT(a.status, 503);
    CHECK_STR(header(&a, "Retry-After"), "3");
    CHECK_STR(text_at(a.json, "error.type"), "server_error");
    answer_finish(&a);
    /* the second of three choices finds no room: the first is cancelled */
    script_reset("x");
    script.start = ERR_BUSY;
    script.start_ok = 1;
    a = ask("POST", CHAT, "{\"n\":3," HI "}");
    CHECK_INT(a.status, 429);
    CHECK_INT(asked.n_cancelled, 1);
    CHECK_INT(asked.n_live, 0);
    answer_finish(&a);
}

#define MESSAGES  "/v1/messages"
#define RESPONSES "/v1/responses"
#define TOOL      "\"tools\":[{\"name\":\"f\",\"input_schema\":{}}],"

static void anthropic_errors(void)
{
    static const struct {
        const char *path, *body;
        int status;
        const char *type, *want;
    } rows[] = {
        {MESSAGES, "{\"max_tokens\":5," HI "}", 200, NULL, "\"stop_reason\":\"max_tokens\""},
        {MESSAGES, "{" HI "}", 400, "invalid_request_error", "max_tokens is required"},
        {MESSAGES, "[]", 400, "invalid_request_error", "object"},
        {MESSAGES, "{\"max_tokens\":5,\"model\":\"x\"," HI "}", 404, "not_found_error", "model"},
        {MESSAGES, "{\"max_tokens\":5,\"system\":5," HI "}", 400, "invalid_request_error",
         "system"},
        {MESSAGES, "{\"max_tokens\":5,\"system\":[{\"type\":\"image\"}]," HI "}", 400,
         "invalid_request_error", "system[0]"},
        {MESSAGES, "{\"max_tokens\":5,\"tools\":[{\"name\":\"f\"}]," HI "}", 400,
         "invalid_request_error", "tools[0]"},
        {MESSAGES,
         "{\"max_tokens\":5,\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"tool_use\"}]}"
         "]}",
         400, "invalid_request_error", "messages[0].content[0]"},
        {MESSAGES,
         "{\"max_tokens\":5,\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"tool_"
         "result\","
         "\"tool_use_id\":\"a\",\"content\":[{\"type\":\"image\"}]}]}]}",
         400, "invalid_request_error", "messages[0].content[0]"},
        {MESSAGES, "{\"max_tokens\":5,\"output_config\":{\"format\":{}}," HI "}", 400,
         "invalid_request_error", "output_config.format"},
        {MESSAGES "/count_tokens", "{" HI "}", 200, NULL, "{\"input_tokens\":7}"},
        {MESSAGES "/count_tokens", "{}", 400, "invalid_request_error", "messages"},
    };
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        script_reset("hello");
        struct answer a = ask("POST", rows[i].path, rows[i].body);
        if (a.status != rows[i].status || !strstr(a.body, rows[i].want))
            fprintf(stderr, "row %zu: %s\n  %s\n", i, rows[i].body, a.body);
        CHECK_INT(a.status, rows[i].status);
        CHECK(strstr(a.body, rows[i].want) != NULL);
        CHECK(a.json && strcmp(header(&a, "request-id"), "") != 0);
        if (rows[i].type) {
            CHECK_STR(text_at(a.json, "type"), "error");
            CHECK_STR(text_at(a.json, "error.type"), rows[i].type);
            CHECK_STR(text_at(a.json, "request_id"), header(&a, "request-id"));
        }
        answer_finish(&a);
    }
    script_reset("x");
    script.admits = ERR_UNAVAILABLE;
    struct answer a = ask("POST", MESSAGES, "{\"max_tokens\":5," HI "}");
    CHECK_INT(a.status, 529);
    CHECK_STR(text_at(a.json, "error.type"), "overloaded_error");
    CHECK_STR(header(&a, "Retry-After"), "3");
    answer_finish(&a);
}

/* Names of the events, and their data in the same order. */
static json_t *named_events(const struct answer *a, char *names, size_t cap)
{
    size_t n = 0;
    names[0] = '\0';
    for (const char *p = a->body; (p = strstr(p, "event: "));) {
        p += strlen("event: ");
        n += (size_t)snprintf(names + n, cap - n, "%.*s ", (int)strcspn(p, "\n"), p);
        REQUIRE(n < cap);
    }
    return events_of(a, "\ndata: ");
}

/* Reasoning that comes back in thousands of pieces costs what its bytes cost: joined two by two it
 * kept a thread of the pool for minutes. */
static void reasoning_in_many_pieces(void)
{
    enum { PIECES = 15000, PIECE_BYTES = 200 };
    static const struct {
        const char *path, *begin, *piece, *end;
    } shapes[] = {
        {MESSAGES "/count_tokens",
         "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"},{\"role\":\"assistant\",\"content\":"
         "[",
         "{\"type\":\"thinking\",\"thinking\":\"%0*d\"},",
         "{\"type\":\"text\",\"text\":\"x\"}]}]}"},
        {RESPONSES, "{\"input\":[{\"type\":\"reasoning\",\"content\":[",
         "{\"type\":\"reasoning_text\",\"text\":\"%0*d\"},",
         "{\"type\":\"reasoning_text\",\"text\":\"x\"}]}]}"},
    };
    char *body = malloc(PIECES * (PIECE_BYTES + 64));
    for (size_t i = 0; i < ARRAY_LEN(shapes); i++) {
        char *p = body + sprintf(body, "%s", shapes[i].begin);
        for (int k = 0; k < PIECES; k++)
            p += sprintf(p, shapes[i].piece, PIECE_BYTES, 0);
        strcpy(p, shapes[i].end);
        uint64_t start_us = clock_now_us();
        struct answer a = ask("POST", shapes[i].path, body);
        CHECK(clock_now_us() - start_us < 10000000u);
        if (i == 0)
            CHECK(int_at(a.json, "input_tokens") > PIECES * PIECE_BYTES);
        else
            CHECK_STR(text_at(a.json, "error.code"), "context_length_exceeded");
        answer_finish(&a);
    }
    free(body);
}

static void newer_streams(void)
{
    char names[4096];
    cluster.model.max_total_tokens = 4096;
    script_reset("a<tool_call>f<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>");
    script.per_chunk = 100;
    struct answer a = ask("POST", MESSAGES, "{\"max_tokens\":900,\"stream\":true," TOOL HI "}");
    json_t *e = named_events(&a, names, sizeof(names));
    CHECK_STR(names,
              "message_start ping content_block_start content_block_delta content_block_stop "
              "content_block_start content_block_delta "
              "content_block_stop message_delta message_stop ");
    CHECK_STR(text_at(e, "2.content_block.type"), "text");
    CHECK_STR(text_at(e, "5.content_block.name"), "f");
    CHECK_STR(text_at(e, "8.delta.stop_reason"), "tool_use");
    CHECK_INT(int_at(e, "0.message.usage.output_tokens"), 0);
    CHECK(a.clean && !strstr(a.body, "[DONE]"));
    json_decref(e);
    answer_finish(&a);

    /* numbers that no double or int64 holds are the model's all the same */
    script_reset("<tool_call>f<arg_key>k</arg_key><arg_value>[1e400, 99999999999999999999]"
                 "</arg_value></tool_call>");
    a = ask("POST", MESSAGES, "{\"max_tokens\":900," TOOL HI "}");
    CHECK(strstr(a.body, "\"input\":{\"k\": [1e400, 99999999999999999999]}") != NULL);
    answer_finish(&a);

    /* cut inside a call */
    script_reset("a<tool_call>f<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>");
    a = ask("POST", MESSAGES, "{\"max_tokens\":8," TOOL HI "}");
    CHECK_STR(text_at(a.json, "stop_reason"), "max_tokens");
    CHECK_STR(text_at(a.json, "content.1.name"), "f");
    CHECK_INT(json_object_size(at(a.json, "content.1.input")), 0);
    answer_finish(&a);

    script_reset("why</think>ab");
    a = ask("POST", RESPONSES, "{\"input\":\"x\",\"stream\":true}");
    e = named_events(&a, names, sizeof(names));
    CHECK_STR(names,
              "response.created response.in_progress response.output_item.added "
              "response.content_part.added response.reasoning_text.delta "
              "response.reasoning_text.delta response.reasoning_text.delta "
              "response.reasoning_text.done response.content_part.done response.output_item.done "
              "response.output_item.added response.content_part.added response.output_text.delta "
              "response.output_text.delta response.output_text.done response.content_part.done "
              "response.output_item.done response.completed ");
    for (size_t i = 0; i < json_array_size(e); i++)
        CHECK_INT(int_at(json_array_get(e, i), "sequence_number"), (long long)i);
    CHECK_STR(text_at(e, "0.response.status"), "in_progress");
    CHECK_STR(text_at(e, "17.response.output.1.content.0.text"), "ab");
    CHECK_STR(text_at(e, "17.response.output.1.id"), text_at(e, "10.item.id"));
    CHECK(a.clean);
    json_decref(e);
    answer_finish(&a);

    /* failures in mid-stream */
    script_reset("hello");
    script.fail_after = 2;
    a = ask("POST", MESSAGES, "{\"max_tokens\":9,\"stream\":true," HI "}");
    e = named_events(&a, names, sizeof(names));
    CHECK(strstr(names, " error ") != NULL && !a.clean);
    CHECK_STR(text_at(json_array_get(e, json_array_size(e) - 1), "error.type"), "api_error");
    json_decref(e);
    answer_finish(&a);
    a = ask("POST", RESPONSES, "{\"input\":\"x\",\"stream\":true}");
    e = named_events(&a, names, sizeof(names));
    CHECK(strstr(names, " error ") != NULL && !a.clean);
    CHECK_STR(text_at(json_array_get(e, json_array_size(e) - 1), "error.message"),
              "the worker died");
    json_decref(e);
    answer_finish(&a);
    cluster.model.max_total_tokens = CONTEXT;
}

static void use_keys(const char *lines)
{
    static const struct access_limits none;
    char path[] = "/tmp/baton-api-keys-XXXXXX";
    int fd = mkstemp(path);
    REQUIRE(fd >= 0 && write(fd, lines, strlen(lines)) == (ssize_t)strlen(lines));
    close(fd);
    access_destroy(api->access);
    api->access = NULL;
    CHECK_OK(access_create(path, &none, &api->access));
    unlink(path);
}

#define ALPHA "Authorization: Bearer sk-alpha\r\n"

static struct answer ask_with(const char *headers, const char *path, const char *body)
{
    char all[512];
    snprintf(all, sizeof(all), JSON "%s", headers);
    return ask_raw(body ? "POST" : "GET", path, all, body, body ? strlen(body) : 0);
}

static void keys(void)
{
    use_keys("alpha:2179e632e89277f18aa600491b68ad55121fd6caa045e047fdeb426088a5a5f1\nbeta:"
             "c29d79ad08b23ba5095b823d0b2e777320983be14c1150de96d07a86da5cd78c\n");
    static const struct {
        const char *headers, *path, *body;
        int status;
    } rows[] = {
        {"", CHAT, "{" HI "}", 401},
        {"", "/v1/models", NULL, 401},
        {"", "/metrics", NULL, 401},
        {"", "/nothing", NULL, 401},
        {"", MESSAGES, "{}", 401},
        {"", "/health", NULL, 200},
        {"", "/ready", NULL, 200},
        {"", "/version", NULL, 200},
        {ALPHA, CHAT, "{" HI "}", 200},
        {ALPHA, "/v1/models", NULL, 200},
        {ALPHA, "/nothing", NULL, 404},
        {"authorization: bearer  sk-beta\r\n", CHAT, "{" HI "}", 200},
        {"x-api-key: sk-beta\r\n", CHAT, "{" HI "}", 200},
        {"x-api-key: sk-gamma\r\n", CHAT, "{" HI "}", 401},
        {"Authorization: Bearer sk-alphab\r\n", CHAT, "{" HI "}", 401},
        {"Authorization: Bearer \r\n", CHAT, "{" HI "}", 401},
        {"Authorization: Basic sk-alpha\r\n", CHAT, "{" HI "}", 401},
        {"Authorization: Basic sk-alpha\r\nx-api-key: sk-beta\r\n", CHAT, "{" HI "}", 401},
    };
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        script_reset("x");
        struct answer a = ask_with(rows[i].headers, rows[i].path, rows[i].body);
        if (a.status != rows[i].status)
            fprintf(stderr, "row %zu: %s\n", i, a.body);
        CHECK_INT(a.status, rows[i].status);
        CHECK_INT(asked.n_live, 0);
        if (a.status == 401) {
            CHECK_STR(header(&a, "WWW-Authenticate"), "Bearer");
            CHECK_STR(text_at(a.json, "error.type"), "authentication_error");
            CHECK(!strcmp(rows[i].path, MESSAGES) ||
                  !strcmp(text_at(a.json, "error.code"), "invalid_api_key"));
            CHECK(!strstr(a.body, "sk-"));
            CHECK_INT(asked.n_started, 0);
        }
        answer_finish(&a);
    }
    access_destroy(take(&api->access));
}

static void limits_of_keys(void)
{
    use_keys("alpha:2179e632e89277f18aa600491b68ad55121fd6caa045e047fdeb426088a5a5f1 "
             "concurrency=1\nbeta:c29d79ad08b23ba5095b823d0b2e777320983be14c1150de96d07a86da5cd78c "
             "tokens_per_minute=20\n");
    script_reset("hello");
    script.hang_after = 1;
    int fd = client_open();
    struct json_out in = {0};
    client_ask(fd, "POST", CHAT, JSON ALPHA, "{\"stream\":true," HI "}",
               strlen("{\"stream\":true," HI "}"));
    client_read(fd, &in, "reasoning");
    struct answer a = ask_with(ALPHA, CHAT, "{" HI "}");
    CHECK_INT(a.status, 429);
    CHECK_STR(text_at(a.json, "error.type"), "rate_limit_error");
    CHECK_STR(text_at(a.json, "error.code"), "rate_limit_exceeded");
    CHECK_STR(header(&a, "Retry-After"), "1");
    CHECK_STR(header(&a, "x-ratelimit-limit-requests"), "1");
    CHECK_STR(header(&a, "x-ratelimit-remaining-requests"), "0");
    answer_finish(&a);
    script.hang_after = -1;
    client_read(fd, &in, NULL); /* the first one ends */
    CHECK(strstr(in.data, "[DONE]") != NULL);
    json_out_finish(&in);
    close(fd);
    a = ask_with(ALPHA, CHAT, "{" HI "}");
    CHECK_INT(a.status, 200);
    CHECK_STR(header(&a, "x-ratelimit-remaining-requests"), "0"); /* while it runs itself */
    CHECK_STR(header(&a, "x-ratelimit-limit-tokens"), "");
    answer_finish(&a);

    /* 7 prompt and 6 output tokens each: two requests are more than 20. */
    static const struct {
        int status;
        const char *left, *reset;
    } want[] = {{200, "20", "0s"}, {200, "7", "39s"}, {429, "0", "1m18s"}};
    for (size_t i = 0; i < ARRAY_LEN(want); i++) {
        a = ask_with("x-api-key: sk-beta\r\n", CHAT, "{" HI "}");
        CHECK_INT(a.status, want[i].status);
        CHECK_STR(header(&a, "x-ratelimit-limit-tokens"), "20");
        CHECK_STR(header(&a, "x-ratelimit-remaining-tokens"), want[i].left);
        CHECK_STR(header(&a, "x-ratelimit-reset-tokens"), want[i].reset);
        CHECK_STR(header(&a, "Retry-After"), i == 2 ? "18" : "");
        answer_finish(&a);
    }
    access_destroy(take(&api->access));
}

static void browsers(void)
{
    static const char *const lists[] = {"", "*", "http://a.example, https://b.example"};
    static const char *const origins[] = {"http://a.example", "https://b.example",
                                          "https://b.example.org"};
    static const bool allowed[3][3] = {{0}, {1, 1, 1}, {1, 1, 0}};
    use_keys("alpha:2179e632e89277f18aa600491b68ad55121fd6caa045e047fdeb426088a5a5f1\n");
    for (size_t i = 0; i < 9; i++) {
        const char *origin = origins[i % 3], *want = allowed[i / 3][i % 3] ? origin : "";
        char headers[256];
        config.cors_allow_origin = lists[i / 3];
        script_reset("x");
        snprintf(headers, sizeof(headers), ALPHA "Origin: %s\r\n", origin);
        struct answer a = ask_with(headers, CHAT, "{\"stream\":true," HI "}");
        CHECK_INT(a.status, 200);
        CHECK_STR(header(&a, "Access-Control-Allow-Origin"), want);
        CHECK_STR(header(&a, "Vary"), i / 3 ? "Origin" : "");
        answer_finish(&a);
        snprintf(headers, sizeof(headers), "Origin: %s\r\n", origin);
        a = ask_with(headers, CHAT, "{" HI "}"); /* a page can read why it is refused */
        CHECK_INT(a.status, 401);
        CHECK_STR(header(&a, "Access-Control-Allow-Origin"), want);
        answer_finish(&a);
        snprintf(headers, sizeof(headers),
                 "Origin: %s\r\nAccess-Control-Request-Method: POST\r\n"
                 "Access-Control-Request-Headers: authorization,x-stainless-os\r\n",
                 origin);
        a = ask_raw("OPTIONS", CHAT, headers, NULL, 0);
        CHECK_INT(a.status, 204);
        CHECK_STR(header(&a, "Access-Control-Allow-Origin"), want);
        CHECK_STR(header(&a, "Access-Control-Allow-Headers"),
                  *want ? "authorization,x-stainless-os" : "");
        CHECK_STR(header(&a, "Access-Control-Allow-Methods"), *want ? "GET, POST, OPTIONS" : "");
        answer_finish(&a);
    }
    config.cors_allow_origin = NULL;
    access_destroy(take(&api->access));
}

static void failures_in_mid_stream(void)
{
    script_reset("abcdef");
    script.fail_after = 3;
    struct answer a = ask("POST", CHAT, "{\"stream\":true,\"n\":2," HI "}");
    CHECK_INT(a.status, 200);
    CHECK(!a.clean);
    json_t *e = events_of(&a, "data: ");
    size_t n = json_array_size(e);
    REQUIRE(n > 2);
    CHECK_STR(json_string_value(json_array_get(e, n - 1)), "[DONE]");
    CHECK_STR(text_at(json_array_get(e, n - 2), "error.message"), "the worker died");
    CHECK_STR(text_at(json_array_get(e, n - 2), "error.type"), "server_error");
    CHECK_INT(asked.n_cancelled, 1); /* the other choice */
    CHECK_INT(asked.n_live, 0);
    json_decref(e);
    answer_finish(&a);
    script.fail_after = 0; /* before the headers: a real status */
    a = ask("POST", CHAT, "{\"stream\":true," HI "}");
    CHECK_INT(a.status, 502);
    CHECK_STR(header(&a, "x-should-retry"), "");
    CHECK(a.clean);
    answer_finish(&a);
    script.fails = ERR_INTERNAL; /* a request that kills its workers must not come back by itself */
    a = ask("POST", CHAT, "{" HI "}");
    CHECK_INT(a.status, 500);
    CHECK_STR(header(&a, "x-should-retry"), "false");
    answer_finish(&a);
    script.fails = ERR_OK;
    script.fail_after = 2;
    a = ask("POST", CHAT, "{" HI "}");
    CHECK_INT(a.status, 502);
    answer_finish(&a);
    a = ask("POST", "/generate_stream", "{\"inputs\":\"Q\"}");
    CHECK(!a.clean && strstr(a.body, "data:{\"error\":") && !strstr(a.body, "[DONE]"));
    answer_finish(&a);
    CHECK_INT(api_n_active(api), 0);
}

static void leaving_cancels(void)
{
    for (int stream = 0; stream < 2; stream++) {
        script_reset("abcdef");
        script.hang_after = 3;
        int fd = client_open();
        struct json_out in = {0};
        const char *body = stream ? "{\"stream\":true,\"n\":2," HI "}" : "{\"n\":2," HI "}";
        client_ask(fd, "POST", CHAT, "", body, strlen(body));
        if (stream)
            client_read(fd, &in, "\"reasoning\":\"c\"");
        uint64_t start_us = clock_now_us();
        while (asked.n_started < 2 && clock_now_us() - start_us < 10000000u)
            uv_run(&loop, UV_RUN_NOWAIT);
        CHECK_INT(asked.n_live, 2);
        close(fd);
        while (asked.n_live && clock_now_us() - start_us < 10000000u)
            uv_run(&loop, UV_RUN_NOWAIT);
        CHECK_INT(asked.n_cancelled, 2);
        CHECK_INT(asked.n_live, 0);
        CHECK_INT(api_n_active(api), 0);
        json_out_finish(&in);
    }
}

static void silence_gets_a_comment(void)
{
    script_reset("abc");
    script.hang_after = 0;
    uint64_t before_us = api->silence_us;
    api->silence_us = 1;
    int fd = client_open();
    struct json_out in = {0};
    const char body[] = "{\"stream\":true," HI "}";
    client_ask(fd, "POST", CHAT, "", body, strlen(body));
    client_read(fd, &in, ": keep-alive\n\n");
    script.hang_after = -1;
    client_read(fd, &in, NULL);
    close(fd);
    struct answer a = parse_answer(&in);
    CHECK_INT(a.status, 200);
    CHECK(a.clean);
    json_t *e = events_of(&a, "data: ");
    CHECK_STR(text_at(e, "0.choices.0.delta.role"), "assistant");
    CHECK_JOINED(e, 0, "choices.0.delta.reasoning", "abc");
    json_decref(e);
    answer_finish(&a);
    api->silence_us = before_us;
}

static void draining_and_destroying(void)
{
    script_reset("abcdef");
    script.hang_after = 2;
    int fds[2] = {client_open(), client_open()};
    struct json_out in[2] = {{0}, {0}};
    client_ask(fds[0], "POST", CHAT, "", "{\"stream\":true," HI "}",
               strlen("{\"stream\":true," HI "}"));
    client_ask(fds[1], "POST", CHAT, "", "{" HI "}", strlen("{" HI "}"));
    client_read(fds[0], &in[0], "\"reasoning\":\"b\"");
    uint64_t start_us = clock_now_us();
    while (asked.n_started < 2 && clock_now_us() - start_us < 10000000u)
        uv_run(&loop, UV_RUN_NOWAIT);
    api_drain(api);
    struct answer a = ask("POST", CHAT, "{" HI "}");
    CHECK_INT(a.status, 503);
    CHECK_STR(header(&a, "Retry-After"), "1");
    answer_finish(&a);
    a = ask("GET", "/ready", NULL);
    CHECK_INT(a.status, 503);
    answer_finish(&a);
    CHECK_INT(api_n_active(api), 2);

    /* one more, in the pool by then */
    size_t n = 2000000;
    char *body = malloc(n + 32);
    char *p = body + sprintf(body, "{\"text\":\"");
    memset(p, 'a', n);
    strcpy(p + n, "\"}");
    api->draining = false;
    int fd = client_open();
    struct json_out late = {0};
    client_ask(fd, "POST", "/tokenize", "", body, strlen(body));
    while (api_n_active(api) < 3 && clock_now_us() - start_us < 10000000u)
        uv_run(&loop, UV_RUN_NOWAIT);
    CHECK_INT(api_n_active(api), 3);
    free(body);

    api_destroy(api);
    http_server_drain(server); /* what was written still goes out */
    for (int i = 0; i < 2; i++) {
        client_read(fds[i], &in[i], NULL);
        close(fds[i]);
        a = parse_answer(&in[i]);
        CHECK_INT(a.status, i == 0 ? 200 : 503);
        CHECK_STR(header(&a, "Retry-After"), i == 0 ? "" : "1");
        CHECK(a.clean == (i == 1));
        CHECK(strstr(a.body, "shutting down") != NULL);
        answer_finish(&a);
    }
    client_read(fd, &late, NULL);
    close(fd);
    a = parse_answer(&late);
    CHECK_INT(a.status, 503);
    answer_finish(&a);
    CHECK_INT(asked.n_live, 0);
    http_server_destroy(server);
    uv_close((uv_handle_t *)&cluster.idle, NULL);
    uv_run(&loop, UV_RUN_DEFAULT);
    CHECK_INT(uv_loop_close(&loop), 0);
    tokenizer_destroy(tokenizer);
}

/* What an output is held to, by response format, tool_choice and strictness. */
static void grammars(void)
{
#define FORMAT                                                                                     \
    "\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"schema\":{\"type\":"         \
    "\"null\"}}},"
#define CALM "\"reasoning_effort\":\"none\","
#define ONE_TOOL(strict, parameters)                                                               \
    "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"strict\":" strict            \
    ",\"parameters\":" parameters "}}],"
#define F "\"tools\":[{\"name\":\"f\",\"parameters\":{\"type\":\"object\"}}]"
    static const struct {
        const char *path, *body, *grammar;
    } cases[] = {
        {CHAT, "{" HI "}", ""},
        {CHAT, "{" F_TOOL HI "}", ""},
        {CHAT, "{" FORMAT CALM HI "}",
         "{\"reasoning\":false,\"one_call\":false,\"schema\":{\"type\":\"null\"}}"},
        {CHAT, "{\"response_format\":{\"type\":\"json_object\"}," HI "}",
         "{\"reasoning\":true,\"one_call\":false,\"schema\":{\"type\":\"object\"}}"},
        {CHAT, "{\"tool_choice\":\"required\"," F_TOOL CALM HI "}",
         "{\"reasoning\":false,\"one_call\":false,\"tools\":[{\"name\":\"f\"}]}"},
        {CHAT, "{\"tool_choice\":\"required\"," ONE_TOOL("null", "{\"not\":{}}") HI "}",
         "{\"reasoning\":true,\"one_call\":false,\"tools\":[{\"name\":\"f\",\"parameters\":true}]"
         "}"},
        {CHAT, "{\"tool_choice\":\"required\",\"parallel_tool_calls\":false," FORMAT F_TOOL HI "}",
         "{\"reasoning\":true,\"one_call\":true,\"tools\":[{\"name\":\"f\"}]}"},
        {CHAT,
         "{\"tool_choice\":{\"type\":\"function\",\"function\":{\"name\":\"f\"}}," F_TOOL HI "}",
         "{\"reasoning\":true,\"one_call\":true,\"tools\":[{\"name\":\"f\"}]}"},
        {CHAT, "{" ONE_TOOL("true", "{\"type\":\"object\"}") HI "}",
         "{\"reasoning\":true,\"one_call\":false," F ",\"free\":true}"},
        {CHAT, "{\"tool_choice\":\"none\"," FORMAT ONE_TOOL("true", "{}") HI "}",
         "{\"reasoning\":true,\"one_call\":false,\"schema\":{\"type\":\"null\"}}"},
        {CHAT, "{" FORMAT F_TOOL HI "}",
         "{\"reasoning\":true,\"one_call\":false,\"schema\":{\"type\":\"null\"},\"tools\":[{"
         "\"name\":\"f\"}]}"},
        {CHAT, "{\"structured_outputs\":{\"json\":{\"type\":\"null\"},\"regex\":null}," HI "}",
         "{\"reasoning\":true,\"one_call\":false,\"schema\":{\"type\":\"null\"}}"},
        {"/generate",
         "{\"inputs\":\"a\",\"parameters\":{\"guided_json\":\"{\\\"type\\\":\\\"null\\\"}\"}}",
         "{\"reasoning\":false,\"one_call\":false,\"schema\":{\"type\":\"null\"}}"},
        {"/v1/completions", "{\"response_format\":{\"type\":\"json_object\"},\"prompt\":\"x\"}",
         "{\"reasoning\":false,\"one_call\":false,\"schema\":{\"type\":\"object\"}}"},
        {"/v1/responses",
         "{\"text\":{\"format\":{\"type\":\"json_schema\",\"name\":\"n\",\"schema\":{}}},\"input\":"
         "\"x\"}",
         "{\"reasoning\":true,\"one_call\":false,\"schema\":{}}"},
        {"/v1/responses",
         "{\"tool_choice\":{\"type\":\"function\",\"name\":\"f\"},\"input\":\"x\",\"tools\":[{"
         "\"type\":\"function\","
         "\"name\":\"f\",\"strict\":true,\"parameters\":{\"type\":\"object\"}}]}",
         "{\"reasoning\":true,\"one_call\":true," F "}"},
        {"/v1/messages",
         "{\"max_tokens\":9,\"tool_choice\":{\"type\":\"any\"},\"messages\":[{\"role\":\"user\","
         "\"content\":\"x\"}],"
         "\"tools\":[{\"name\":\"f\",\"input_schema\":{\"type\":\"object\"}}]}",
         "{\"reasoning\":false,\"one_call\":false," F "}"},
        {"/v1/messages",
         "{\"max_tokens\":9,\"output_config\":{\"format\":{\"type\":\"json_schema\",\"schema\":{"
         "\"type\":\"null\"}}},"
         "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}",
         "{\"reasoning\":false,\"one_call\":false,\"schema\":{\"type\":\"null\"}}"},
    };
    cluster.model.max_total_tokens = 4096; // tools make long prompts
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        script_reset("hello");
        struct answer a = ask("POST", cases[i].path, cases[i].body);
        CHECK_INT(a.status, 200);
        CHECK_STR(asked.grammar, cases[i].grammar);
        answer_finish(&a);
    }
    cluster.model.max_total_tokens = CONTEXT;
}

int main(void)
{
    set_up();
    RUN(table_of_requests);
    RUN(refusals_are_answers);
    RUN(http_details);
    RUN(chat_answers);
    RUN(reasoning_goes_by_ids);
    RUN(tool_calls);
    RUN(grammars);
    RUN(chat_streams);
    RUN(usage_chunk);
    RUN(several_choices);
    RUN(logprobs);
    RUN(completions);
    RUN(best_of);
    RUN(sampling_reaches_the_worker);
    RUN(generate);
    RUN(generate_streams);
    RUN(reasoning_in_many_pieces);
    RUN(large_bodies_use_the_pool);
    RUN(overload);
    RUN(anthropic_errors);
    RUN(newer_streams);
    RUN(keys);
    RUN(limits_of_keys);
    RUN(browsers);
    RUN(failures_in_mid_stream);
    RUN(leaving_cancels);
    RUN(silence_gets_a_comment);
    RUN(draining_and_destroying);
    return check_done();
}
