/* vocab.c: see vocab.h. */
#include "common/grammar/vocab.h"

#include <string.h>

#include "common/base/byte_level.h"
#include "common/base/json.h"
#include "common/base/utf8.h"
#include "common/grammar/program.h"

#define MAX_FILE_BYTES (64u << 20)
#define MAX_IDS        (1 << 22)

const char *const grammar_tag_text[GRAMMAR_N_TAGS] = {
    "</think>",   "<tool_call>", "</tool_call>", "<arg_key>",
    "</arg_key>", "<arg_value>", "</arg_value>",
};

static enum err no_memory(void) { return err_set(ERR_NOMEM, "no memory for a vocabulary"); }

void grammar_vocab_destroy(struct grammar_vocab *v)
{
    if (!v)
        return;
    free(v->tokens);
    free(v->bytes);
    free(v->same);
    free(v->all.nodes);
    free(v->length_of);
    free(v->plain);
    free(v->tails.nodes);
    free(v->tail_start);
    free(v->tailed);
    free(v->added);
    free(v->eos);
    free(v);
}

bool vocab_is_eos(const struct grammar_vocab *v, int32_t id)
{
    for (int i = 0; i < v->n_eos; i++)
        if (v->eos[i] == id)
            return true;
    return false;
}

/* Bytes of the plain character at the start, 0: there is none. */
static size_t plain_char(const uint8_t *bytes, size_t n)
{
    if (bytes[0] < 0x80)
        return bytes[0] >= 0x20 && bytes[0] != 0x7f && bytes[0] != '"' && bytes[0] != '\\';
    size_t len = bytes[0] < 0xe0 ? 2 : bytes[0] < 0xf0 ? 3 : 4;
    return len <= n && utf8_check((const char *)bytes, len) == len ? len : 0;
}

/* Of the plain characters at the start: bytes, and how many there are. */
static size_t plain_head(const uint8_t *bytes, size_t n, uint32_t *ret_chars)
{
    size_t at = 0, len;
    for (*ret_chars = 0; at < n && (len = plain_char(bytes + at, n - at)) > 0; at += len)
        ++*ret_chars;
    return at;
}

static enum err copy_tokens(struct grammar_vocab *v, const struct grammar_token *tokens)
{
    size_t n_bytes = 0, at = 0;
    for (int32_t id = 0; id < v->n_ids; id++)
        n_bytes += tokens[id].bytes ? tokens[id].n : 0;
    v->tokens = calloc((size_t)v->n_ids + 1, sizeof(*v->tokens));
    v->bytes = malloc(n_bytes + 1);
    v->added = malloc(((size_t)v->n_ids + 1) * sizeof(*v->added));
    if (!v->tokens || !v->bytes || !v->added || n_bytes > UINT32_MAX)
        return no_memory();
    for (int32_t id = 0; id < v->n_ids; id++) {
        const struct grammar_token *t = &tokens[id];
        if (!t->bytes || vocab_is_eos(v, id))
            continue;
        if (t->added) {
            v->tokens[id].symbol = SYMBOL_OTHER;
            for (int tag = 0; tag < GRAMMAR_N_TAGS; tag++)
                if (strlen(grammar_tag_text[tag]) == t->n &&
                    !memcmp(grammar_tag_text[tag], t->bytes, t->n))
                    v->tokens[id].symbol = (uint16_t)SYMBOL_TAG(tag);
            v->added[v->n_added++] = id;
        } else if (t->n <= VOCAB_MAX_BYTES) {
            memcpy(v->bytes + at, t->bytes, t->n);
            v->tokens[id] = (struct vocab_token){.at = (uint32_t)at, .n = (uint16_t)t->n};
            at += t->n;
        }
    }
    return ERR_OK;
}

/* Some bytes of the vocabulary, and what they stand for. */
struct span {
    uint32_t at, n;
    int32_t id;
    uint32_t chars; /* of a tail: plain characters before it */
};

static int span_order(const struct grammar_vocab *v, const struct span *a, const struct span *b)
{
    int order = memcmp(v->bytes + a->at, v->bytes + b->at, MIN(a->n, b->n));
    return order ? order : (a->n > b->n) - (a->n < b->n);
}

static int token_order(const void *a, const void *b, void *vocab)
{
    const struct span *x = a, *y = b;
    int order = span_order(vocab, x, y);
    return order ? order : (x->id > y->id) - (x->id < y->id);
}

static int tail_order(const void *a, const void *b, void *vocab)
{
    const struct span *x = a, *y = b;
    int order = span_order(vocab, x, y);
    if (!order)
        order = (x->chars > y->chars) - (x->chars < y->chars);
    return order ? order : (x->id > y->id) - (x->id < y->id);
}

static enum err trie_add(struct trie *t, struct trie_node node)
{
    if (t->n == t->cap) {
        uint32_t cap = t->cap ? t->cap * 2 : 1024;
        void *nodes = realloc(t->nodes, cap * sizeof(*t->nodes));
        if (!nodes)
            return no_memory();
        t->nodes = nodes;
        t->cap = cap;
    }
    t->nodes[t->n++] = node;
    return ERR_OK;
}

/* The next of spans that come in order, no two alike. open[*depth]: nodes on the way to the last.
 */
static enum err trie_push(const struct grammar_vocab *v, struct trie *t, const struct span *s,
                          int32_t value, uint32_t *open, uint32_t *depth)
{
    const uint8_t *bytes = v->bytes + s->at;
    uint32_t shared = 0;
    while (shared < *depth && shared < s->n && t->nodes[open[shared]].byte == bytes[shared])
        shared++;
    while (*depth > shared)
        t->nodes[open[--*depth]].end = t->n;
    for (; *depth < s->n; ++*depth) {
        open[*depth] = t->n;
        TRY(trie_add(
            t, (struct trie_node){.value = -1, .depth = (uint16_t)*depth, .byte = bytes[*depth]}));
    }
    t->nodes[t->n - 1].value = value;
    return ERR_OK;
}

static void trie_close(struct trie *t, const uint32_t *open, uint32_t depth)
{
    while (depth > 0)
        t->nodes[open[--depth]].end = t->n;
}

/* Links tokens of the same bytes and keeps the first; *n gets smaller. */
static enum err build_all(struct grammar_vocab *v, struct span *spans, size_t *n)
{
    uint32_t open[VOCAB_MAX_BYTES], depth = 0;
    size_t kept = 0;
    qsort_r(spans, *n, sizeof(*spans), token_order, v);
    for (size_t i = 0; i < *n; i++) {
        if (kept > 0 && !span_order(v, &spans[kept - 1], &spans[i])) {
            v->same[spans[i].id] = v->same[spans[kept - 1].id];
            v->same[spans[kept - 1].id] = spans[i].id;
            continue;
        }
        spans[kept++] = spans[i];
        TRY(trie_push(v, &v->all, &spans[i], spans[i].id, open, &depth));
    }
    trie_close(&v->all, open, depth);
    *n = kept;
    return ERR_OK;
}

/* One row of bits for each length that a plain token has, with all tokens of that length at most.
 */
static enum err build_plain(struct grammar_vocab *v)
{
    bool has[VOCAB_MAX_BYTES + 1] = {false};
    uint16_t row = 0;
    for (int32_t id = 0; id < v->n_ids; id++) {
        has[v->tokens[id].plain] = true;
        v->max_way = MAX(v->max_way, v->tokens[id].plain);
    }
    v->max_way = MAX(v->max_way, v->max_head);
    v->length_of = calloc(v->max_way + 1, sizeof(*v->length_of));
    if (!v->length_of)
        return no_memory();
    for (uint32_t chars = 1; chars <= v->max_way; chars++)
        v->length_of[chars] = has[chars] ? ++row : row;
    v->plain = calloc((size_t)(row + 1) * v->n_words, sizeof(*v->plain));
    if (!v->plain)
        return no_memory();
    for (int32_t id = 0; id < v->n_ids; id++)
        for (uint16_t r = v->length_of[v->tokens[id].plain]; v->tokens[id].plain && r <= row; r++)
            v->plain[(size_t)r * v->n_words + (uint32_t)id / 32] |= 1u << (id % 32);
    return ERR_OK;
}

/* spans: of tails, of the tokens that are not plain. */
static enum err build_tails(struct grammar_vocab *v, struct span *spans, size_t n)
{
    uint32_t open[VOCAB_MAX_BYTES], depth = 0;
    qsort_r(spans, n, sizeof(*spans), tail_order, v);
    v->tailed = malloc((n + 1) * sizeof(*v->tailed));
    v->tail_start = malloc((n + 1) * sizeof(*v->tail_start));
    if (!v->tailed || !v->tail_start)
        return no_memory();
    for (size_t i = 0; i < n; i++) {
        v->tailed[i] = (struct vocab_tailed){spans[i].id, spans[i].chars};
        v->max_head = MAX(v->max_head, spans[i].chars);
        if (i > 0 && !span_order(v, &spans[i - 1], &spans[i]))
            continue;
        v->tail_start[v->n_tails] = (uint32_t)i;
        TRY(trie_push(v, &v->tails, &spans[i], (int32_t)v->n_tails++, open, &depth));
    }
    trie_close(&v->tails, open, depth);
    v->tail_start[v->n_tails] = (uint32_t)n;
    v->n_tail_words = (v->n_tails + 31) / 32;
    return ERR_OK;
}

static enum err build(struct grammar_vocab *v)
{
    size_t n = 0, n_tailed = 0;
    bool has_byte[256] = {false};
    OWNED_MEM struct span *spans = malloc(((size_t)v->n_ids + 1) * sizeof(*spans));
    v->same = malloc(((size_t)v->n_ids + 1) * sizeof(*v->same));
    if (!spans || !v->same)
        return no_memory();
    for (int32_t id = 0; id < v->n_ids; id++) {
        struct vocab_token *t = &v->tokens[id];
        v->same[id] = -1;
        if (t->n == 0)
            continue;
        spans[n++] = (struct span){t->at, t->n, id, 0};
        if (t->n == 1)
            has_byte[v->bytes[t->at]] = true;
        uint32_t chars;
        if (plain_head(v->bytes + t->at, t->n, &chars) == t->n)
            t->plain = (uint16_t)chars;
    }
    for (int byte = 0; byte < 256; byte++)
        if (!has_byte[byte])
            return err_set(ERR_BAD_MODEL, "the vocabulary has no token for byte 0x%02x", byte);
    TRY(build_all(v, spans, &n));
    for (size_t i = 0; i < n; i++) {
        struct span s = spans[i];
        if (v->tokens[s.id].plain)
            continue;
        uint32_t head = (uint32_t)plain_head(v->bytes + s.at, s.n, &s.chars);
        spans[n_tailed++] = (struct span){s.at + head, s.n - head, s.id, s.chars};
    }
    TRY(build_tails(v, spans, n_tailed));
    return build_plain(v);
}

enum err grammar_vocab_create(const struct grammar_token *tokens, int32_t n_ids, int32_t n_logits,
                              const int32_t *eos, int n_eos, struct grammar_vocab **ret)
{
    OWNED(grammar_vocab) v = calloc(1, sizeof(*v));
    if (!v)
        return no_memory();
    v->n_ids = n_ids;
    v->n_words = (uint32_t)(MAX(n_logits, n_ids) + 31) / 32;
    v->eos = malloc(((size_t)n_eos + 1) * sizeof(*v->eos));
    if (!v->eos)
        return no_memory();
    for (int i = 0; i < n_eos; i++)
        if (eos[i] >= 0 && eos[i] < n_ids)
            v->eos[v->n_eos++] = eos[i];
    TRY(copy_tokens(v, tokens));
    TRY(build(v));
    *ret = take(&v);
    return ERR_OK;
}

/* ---- tokenizer.json ---- */

/* The largest id + 1 and the bytes of all texts, which theirs do not exceed. */
static enum err measure(json_t *vocab, json_t *added, int64_t *ret_ids, size_t *ret_bytes)
{
    const char *text;
    json_t *value;
    json_object_foreach (vocab, text, value) {
        if (!json_is_integer(value) || json_integer_value(value) < 0 ||
            json_integer_value(value) >= MAX_IDS)
            return err_set(ERR_BAD_MODEL, "model.vocab: an id is not in [0, %d)", MAX_IDS);
        *ret_ids = MAX(*ret_ids, json_integer_value(value) + 1);
        *ret_bytes += strlen(text);
    }
    size_t i;
    json_array_foreach (added, i, value) {
        const json_t *id = json_object_get(value, "id");
        if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= MAX_IDS)
            return err_set(ERR_BAD_MODEL, "added_tokens: an id is not in [0, %d)", MAX_IDS);
        *ret_ids = MAX(*ret_ids, json_integer_value(id) + 1);
    }
    return ERR_OK;
}

static void read_tokens(json_t *vocab, json_t *added, struct grammar_token *tokens, char *bytes)
{
    const char *text;
    json_t *value;
    json_object_foreach (vocab, text, value) {
        size_t n = 0;
        if (!byte_level_decode(text, strlen(text), bytes, &n))
            continue; /* no text can produce it */
        tokens[json_integer_value(value)] = (struct grammar_token){.bytes = bytes, .n = n};
        bytes += n;
    }
    size_t i;
    json_array_foreach (added, i, value) {
        const json_t *content = json_object_get(value, "content");
        tokens[json_integer_value(json_object_get(value, "id"))] = (struct grammar_token){
            .bytes = json_is_string(content) ? json_string_value(content) : "",
            .n = json_string_length(content),
            .added = true};
    }
}

static enum err load(json_t *root, int32_t n_logits, const int32_t *eos, int n_eos,
                     struct grammar_vocab **ret)
{
    json_t *vocab = json_object_get(json_object_get(root, "model"), "vocab");
    json_t *added = json_object_get(root, "added_tokens");
    if (!json_is_object(vocab) || !json_is_array(added))
        return err_set(ERR_BAD_MODEL, "model.vocab or added_tokens is missing");
    int64_t n_ids = 0;
    size_t n_bytes = 0;
    TRY(measure(vocab, added, &n_ids, &n_bytes));
    OWNED_MEM struct grammar_token *tokens = calloc((size_t)n_ids + 1, sizeof(*tokens));
    OWNED_MEM char *bytes = malloc(n_bytes + 1);
    if (!tokens || !bytes)
        return no_memory();
    read_tokens(vocab, added, tokens, bytes);
    return grammar_vocab_create(tokens, (int32_t)n_ids, n_logits, eos, n_eos, ret);
}

enum err grammar_vocab_load(const char *path, int32_t n_logits, const int32_t *eos, int n_eos,
                            struct grammar_vocab **ret)
{
    struct json_limits limits = json_limits_file;
    limits.max_bytes = MIN(limits.max_bytes, (size_t)MAX_FILE_BYTES);
    json_t *root = NULL;
    TRY(json_parse_file(path, &limits, &root));
    enum err err = load(root, n_logits, eos, n_eos, ret);
    json_decref(root);
    return err == ERR_OK ? ERR_OK : err_prefix(err, "%s", path);
}
