/* dataset.c: see dataset.h. */
#include "tests/bench/dataset.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "common/base/hash.h"
#include "common/base/json.h"
#include "tests/bench/lengths.h"

#define MAX_LINE_BYTES (64u << 20)
#define SYNTHETIC_IDS  256 // every byte-level vocabulary has these
#define DEFAULT_OUTPUT "lognormal:194:0.9:4:1024"

enum stream { STREAM_INPUT_LEN, STREAM_OUTPUT_LEN, STREAM_IDS, STREAM_ORDER };

static const struct json_limits line_limits = {
    .max_bytes = MAX_LINE_BYTES, .max_depth = 16, .max_containers = 100000, .max_values = 4000000};

static enum err read_file(const struct options *o, struct dataset *d);
static enum err read_prompt(const json_t *line, struct prompt *p);
static enum err draw_synthetic(const struct options *o, struct dataset *d);
static enum err choose_prompts(const struct options *o, struct dataset *d);
static enum err set_output_lengths(const struct options *o, struct dataset *d);
static void prompt_finish(struct prompt *p);

static struct prompt *append(struct dataset *d)
{
    if (d->len == d->cap) {
        size_t cap = d->cap ? 2 * d->cap : 256;
        struct prompt *more = reallocarray(d->prompts, cap, sizeof(*more));
        if (!more)
            return NULL;
        d->prompts = more;
        d->cap = cap;
    }
    d->prompts[d->len] = (struct prompt){0};
    return &d->prompts[d->len++];
}

enum err dataset_create(const struct options *o, struct dataset **ret)
{
    OWNED(dataset) d = calloc(1, sizeof(*d));
    if (!d)
        return err_set(ERR_NOMEM, "no memory for the data");
    if (o->synthetic) {
        TRY(draw_synthetic(o, d));
        TRY(set_output_lengths(o, d));
    } else {
        TRY(read_file(o, d));
        TRY(set_output_lengths(o, d));
        TRY(choose_prompts(o, d));
    }
    *ret = take(&d);
    return ERR_OK;
}

void dataset_destroy(struct dataset *d)
{
    if (!d)
        return;
    for (size_t i = 0; i < d->len; i++)
        prompt_finish(&d->prompts[i]);
    free(d->prompts);
    json_decref(d->about);
    free(d);
}

static void prompt_finish(struct prompt *p)
{
    free(p->text);
    free(p->messages);
    free(p->ids);
}

/* ---- a file ---- */

static enum err read_line(struct dataset *d, const char *line, size_t n, bool first)
{
    json_t *json = NULL;
    TRY(json_parse(line, n, &line_limits, &json));
    enum err e = ERR_OK;
    json_t *about = json_object_get(json, "about");
    if (!json_is_object(json)) {
        e = err_set(ERR_INVALID, "not an object");
    } else if (first && about) {
        d->about = json_incref(about);
    } else {
        struct prompt *p = append(d);
        e = p ? read_prompt(json, p) : err_set(ERR_NOMEM, "no memory for the data");
        if (e == ERR_OK && d->len > 1 && p->arrival_s < d->prompts[d->len - 2].arrival_s)
            e = err_set(ERR_INVALID, "arrival_s is %g, less than the line before", p->arrival_s);
    }
    json_decref(json);
    return e;
}

static enum err read_file(const struct options *o, struct dataset *d)
{
    OWNED_FILE f = fopen(o->data, "re");
    if (!f)
        return err_set(ERR_NOT_FOUND, "--data %s: %s", o->data, strerror(errno));
    OWNED_MEM char *line = NULL;
    size_t cap = 0, number = 0;
    ssize_t n;
    while ((n = getline(&line, &cap, f)) > 0) {
        number++;
        if (strspn(line, " \t\r\n") == (size_t)n)
            continue;
        enum err e = read_line(d, line, (size_t)n, number == 1);
        if (e)
            return err_prefix(e, "%s line %zu", o->data, number);
    }
    if (ferror(f))
        return err_set(ERR_IO, "--data %s: %s", o->data, strerror(errno));
    d->n_lines = d->len;
    return ERR_OK;
}

static enum err read_ids(const json_t *array, const char *name, struct prompt *p)
{
    size_t n = json_array_size(array);
    if (n == 0)
        return err_set(ERR_INVALID, "%s is empty", name);
    p->ids = malloc(n * sizeof(*p->ids));
    if (!p->ids)
        return err_set(ERR_NOMEM, "no memory for the data");
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_array_get(array, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) > INT32_MAX)
            return err_set(ERR_INVALID, "%s[%zu] is no token id", name, i);
        p->ids[i] = (int32_t)json_integer_value(id);
    }
    p->n_ids = n;
    return ERR_OK;
}

static enum err read_prompt(const json_t *line, struct prompt *p)
{
    const json_t *prompt = json_object_get(line, "prompt");
    const json_t *messages = json_object_get(line, "messages");
    const json_t *ids = json_object_get(line, "token_ids");
    int64_t prompt_tokens = 0, output_tokens = 0;
    TRY(json_get_int(line, "prompt_tokens", 1, 100000000, &prompt_tokens));
    TRY(json_get_int(line, "output_tokens", 1, 100000000, &output_tokens));
    TRY(json_get_double(line, "arrival_s", 0, 1e9, &p->arrival_s));
    if (!prompt == !messages)
        return err_set(ERR_INVALID, "exactly one of prompt and messages is required");
    if (prompt && !json_is_string(prompt) && !json_is_array(prompt))
        return err_set(ERR_INVALID, "prompt must be a string or an array of token ids");
    if (messages && json_array_size(messages) == 0)
        return err_set(ERR_INVALID, "messages must be an array and not be empty");
    if (ids && !json_is_array(ids))
        return err_set(ERR_INVALID, "token_ids must be an array");
    if (json_is_array(prompt))
        TRY(read_ids(prompt, "prompt", p));
    else if (ids)
        TRY(read_ids(ids, "token_ids", p));
    if (json_is_string(prompt))
        p->text = strdup(json_string_value(prompt));
    if (messages)
        p->messages = json_dumps(messages, JSON_COMPACT);
    if ((json_is_string(prompt) && !p->text) || (messages && !p->messages))
        return err_set(ERR_NOMEM, "no memory for the data");
    p->prompt_tokens = prompt_tokens ? (uint32_t)prompt_tokens : (uint32_t)p->n_ids;
    p->output_tokens = (uint32_t)output_tokens;
    return ERR_OK;
}

/* ---- which of them, in which form ---- */

static bool fits(const struct options *o, const struct prompt *p)
{
    uint64_t total = (uint64_t)p->prompt_tokens + p->output_tokens;
    bool cut = o->prompt_form == PROMPT_FIT; // the client shortens those
    return (!o->max_prompt_tokens || cut || p->prompt_tokens <= o->max_prompt_tokens) &&
           (!o->max_total_tokens || total <= (uint64_t)o->max_total_tokens);
}

/* Keeps the one form that is sent. False: this prompt cannot be had in that form. */
static bool take_form(const struct options *o, struct prompt *p)
{
    bool want_ids = o->prompt_form == PROMPT_IDS || !(p->text || p->messages);
    if (want_ids) {
        if (!p->ids || o->endpoint_kind != ENDPOINT_COMPLETIONS || o->prompt_form == PROMPT_FIT)
            return false;
        free(p->text);
        free(p->messages);
        p->text = p->messages = NULL;
        for (size_t i = 0; o->vocab_size && i < p->n_ids; i++)
            p->ids[i] = (int32_t)(p->ids[i] % o->vocab_size);
        return true;
    }
    free(p->ids);
    p->ids = NULL;
    p->n_ids = 0;
    return p->text || o->endpoint_kind == ENDPOINT_CHAT;
}

static void shuffle(struct dataset *d, uint64_t seed)
{
    struct rng r = rng_init(seed, STREAM_ORDER);
    for (size_t i = d->len; i > 1; i--) {
        size_t k = rng_below(&r, i);
        struct prompt p = d->prompts[i - 1];
        d->prompts[i - 1] = d->prompts[k];
        d->prompts[k] = p;
    }
}

static enum err copy_prompt(struct dataset *d, size_t from)
{
    if (!append(d))
        return err_set(ERR_NOMEM, "no memory for the data");
    const struct prompt *a = &d->prompts[from];
    struct prompt *b = &d->prompts[d->len - 1];
    *b = *a;
    b->text = a->text ? strdup(a->text) : NULL;
    b->messages = a->messages ? strdup(a->messages) : NULL;
    b->ids = a->ids ? malloc(a->n_ids * sizeof(*b->ids)) : NULL;
    if (!b->text != !a->text || !b->messages != !a->messages || !b->ids != !a->ids)
        return err_set(ERR_NOMEM, "no memory for the data");
    if (b->ids)
        memcpy(b->ids, a->ids, a->n_ids * sizeof(*b->ids));
    return ERR_OK;
}

static enum err choose_prompts(const struct options *o, struct dataset *d)
{
    if (o->do_shuffle)
        shuffle(d, (uint64_t)o->seed);
    size_t kept = 0, wanted = (size_t)o->num_prompts;
    for (size_t i = 0; i < d->len; i++) {
        struct prompt *p = &d->prompts[i];
        if (kept < wanted && fits(o, p) && take_form(o, p)) {
            d->prompts[kept++] = *p;
        } else {
            d->n_left_out += kept < wanted;
            prompt_finish(p);
        }
    }
    d->len = kept;
    if (kept == 0 || (kept < wanted && !o->do_repeat))
        return err_set(ERR_INVALID,
                       "%s has %zu usable prompts (%zu left out: too long, or not to be had as "
                       "--prompts %s for this endpoint), %zu are wanted: lower --num-prompts or "
                       "give --repeat on",
                       o->data, kept, d->n_left_out, o->prompts, wanted);
    double span_s = d->prompts[kept - 1].arrival_s;
    for (size_t i = kept; i < wanted; i++) {
        TRY(copy_prompt(d, i % kept));
        d->prompts[i].arrival_s += span_s * (double)(i / kept);
        d->n_repeated++;
    }
    return ERR_OK;
}

static enum err set_output_lengths(const struct options *o, struct dataset *d)
{
    const char *text = o->output_len[0] ? o->output_len : o->synthetic ? DEFAULT_OUTPUT : NULL;
    struct lengths l;
    struct rng r = rng_init((uint64_t)o->seed, STREAM_OUTPUT_LEN);
    if (text)
        TRY(lengths_parse("output-len", text, &l));
    for (size_t i = 0; i < d->len; i++) {
        if (text)
            d->prompts[i].output_tokens = lengths_draw(&l, &r);
        else if (!d->prompts[i].output_tokens)
            return err_set(ERR_INVALID, "%s: prompt %zu has no output_tokens: give --output-len",
                           o->data, i + 1);
    }
    return ERR_OK;
}

/* ---- synthetic ---- */

static enum err draw_ids(struct prompt *p, uint32_t vocab, struct rng *r)
{
    p->ids = malloc(p->prompt_tokens * sizeof(*p->ids));
    if (!p->ids)
        return err_set(ERR_NOMEM, "no memory for the data");
    p->n_ids = p->prompt_tokens;
    for (size_t i = 0; i < p->n_ids; i++)
        p->ids[i] = (int32_t)rng_below(r, vocab);
    return ERR_OK;
}

/* One word per token asked for: common words are one token in large vocabularies. */
static enum err draw_words(struct prompt *p, struct rng *r)
{
    static const char *const words[] = {
        " time", " people", " water", " way",    " house", " world", " school", " state",
        " day",  " family", " hand",  " group",  " part",  " place", " case",   " week",
        " work", " system", " point", " number", " night", " home",  " room",   " money",
        " book", " story",  " fact",  " month",  " right", " study", " word",   " music"};
    struct json_out text = {0};
    for (uint32_t i = 0; i < p->prompt_tokens; i++) {
        const char *w = words[rng_below(r, ARRAY_LEN(words))];
        json_out_raw(&text, w + (i == 0), strlen(w) - (i == 0));
    }
    json_out_raw(&text, "", 1);
    if (text.failed) {
        json_out_finish(&text);
        return err_set(ERR_NOMEM, "no memory for the data");
    }
    p->text = text.data;
    return ERR_OK;
}

static enum err draw_synthetic(const struct options *o, struct dataset *d)
{
    struct lengths l;
    TRY(lengths_parse("input-len", o->input_len, &l));
    struct rng lengths = rng_init((uint64_t)o->seed, STREAM_INPUT_LEN);
    struct rng tokens = rng_init((uint64_t)o->seed, STREAM_IDS);
    uint32_t vocab = o->vocab_size ? (uint32_t)o->vocab_size : SYNTHETIC_IDS;
    for (int64_t i = 0; i < o->num_prompts; i++) {
        struct prompt *p = append(d);
        if (!p)
            return err_set(ERR_NOMEM, "no memory for the data");
        p->prompt_tokens = lengths_draw(&l, &lengths);
        TRY(o->prompt_form == PROMPT_IDS ? draw_ids(p, vocab, &tokens) : draw_words(p, &tokens));
    }
    d->n_lines = d->len;
    return ERR_OK;
}

uint64_t dataset_hash(const struct dataset *d)
{
    uint64_t h = 0;
    for (size_t i = 0; i < d->len; i++) {
        const struct prompt *p = &d->prompts[i];
        const char *text = p->text ? p->text : p->messages;
        uint32_t form[2] = {p->text ? 0u : p->messages ? 1u : 2u, p->output_tokens};
        h = hash_bytes(h, form, sizeof(form));
        h = text ? hash_bytes(h, text, strlen(text))
                 : hash_bytes(h, p->ids, p->n_ids * sizeof(*p->ids));
    }
    return h;
}
