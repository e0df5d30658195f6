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
    free(v->rest.nodes);
    free(v->plain);
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

/* Characters of a plain token; 0 if it is not plain. */
static uint32_t plain_chars(const uint8_t *bytes, size_t n)
{
    uint32_t chars = 0;
    for (size_t i = 0; i < n; i++) {
        if (bytes[i] < 0x20 || bytes[i] == 0x7f || bytes[i] == '"' || bytes[i] == '\\')
            return 0;
        chars += (bytes[i] & 0xc0) != 0x80;
    }
    return chars <= VOCAB_PLAIN_CHARS && utf8_check((const char *)bytes, n) == n ? chars : 0;
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

static int id_order(const void *a, const void *b, void *vocab)
{
    const struct grammar_vocab *v = vocab;
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    const struct vocab_token *p = &v->tokens[x], *q = &v->tokens[y];
    int order = memcmp(v->bytes + p->at, v->bytes + q->at, MIN(p->n, q->n));
    if (!order)
        order = (p->n > q->n) - (p->n < q->n);
    return order ? order : (x > y) - (x < y);
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

/* ids in order of their bytes, no two alike. */
static enum err trie_build(const struct grammar_vocab *v, const int32_t *ids, size_t n,
                           struct trie *t)
{
    uint32_t open[VOCAB_MAX_BYTES]; /* nodes on the way to the last token */
    size_t depth = 0;
    for (size_t i = 0; i < n; i++) {
        const struct vocab_token *token = &v->tokens[ids[i]];
        const uint8_t *bytes = v->bytes + token->at;
        size_t shared = 0;
        while (shared < depth && shared < token->n && t->nodes[open[shared]].byte == bytes[shared])
            shared++;
        while (depth > shared)
            t->nodes[open[--depth]].end = t->n;
        for (; depth < token->n; depth++) {
            open[depth] = t->n;
            TRY(trie_add(t, (struct trie_node){
                                .token = -1, .depth = (uint16_t)depth, .byte = bytes[depth]}));
        }
        t->nodes[t->n - 1].token = ids[i];
    }
    while (depth > 0)
        t->nodes[open[--depth]].end = t->n;
    return ERR_OK;
}

static enum err build(struct grammar_vocab *v)
{
    size_t n_ids = (size_t)v->n_ids, n = 0, n_rest = 0;
    OWNED_MEM int32_t *ids = malloc((n_ids + 1) * sizeof(*ids));
    v->same = malloc((n_ids + 1) * sizeof(*v->same));
    v->plain = calloc((size_t)(VOCAB_PLAIN_CHARS + 1) * v->n_words, sizeof(*v->plain));
    if (!ids || !v->same || !v->plain)
        return no_memory();
    for (int32_t id = 0; id < v->n_ids; id++) {
        v->same[id] = -1;
        if (v->tokens[id].n)
            ids[n++] = id;
    }
    qsort_r(ids, n, sizeof(*ids), id_order, v);

    bool has_byte[256] = {false};
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        const struct vocab_token *t = &v->tokens[ids[i]];
        if (t->n == 1)
            has_byte[v->bytes[t->at]] = true;
        uint32_t chars = plain_chars(v->bytes + t->at, t->n);
        for (uint32_t k = chars; chars && k <= VOCAB_PLAIN_CHARS; k++)
            v->plain[(size_t)k * v->n_words + (uint32_t)ids[i] / 32] |= 1u << (ids[i] % 32);
        const struct vocab_token *last = kept ? &v->tokens[ids[kept - 1]] : NULL;
        if (last && last->n == t->n && !memcmp(v->bytes + last->at, v->bytes + t->at, t->n)) {
            v->same[ids[i]] = v->same[ids[kept - 1]];
            v->same[ids[kept - 1]] = ids[i];
        } else {
            ids[kept++] = ids[i];
        }
    }
    for (int byte = 0; byte < 256; byte++)
        if (!has_byte[byte])
            return err_set(ERR_BAD_MODEL, "the vocabulary has no token for byte 0x%02x", byte);
    TRY(trie_build(v, ids, kept, &v->all));
    for (size_t i = 0; i < kept; i++) {
        const struct vocab_token *t = &v->tokens[ids[i]];
        if (!plain_chars(v->bytes + t->at, t->n))
            ids[n_rest++] = ids[i];
    }
    return trie_build(v, ids, n_rest, &v->rest);
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
