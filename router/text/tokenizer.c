/* tokenizer.c: tokenizer.json in, ids out.
 *
 * At load the byte-level alphabet ("Ġ" for a space) is undone once, so that vocabulary, merges and
 * texts are all plain bytes afterwards. Merging follows the published BPE rule: of all adjacent
 * pairs take the one of lowest rank, the leftmost among equals, until none is left. A heap of
 * (rank, position) finds it; entries that a merge made stale are recognised when they come up,
 * because the pair at that position then has another rank. A megabyte of one letter is a single
 * piece to the regex, so nothing here may be quadratic or recursive: people do send that.
 *
 * Two things differ between the regex library that wrote the vocabulary (Oniguruma) and PCRE2:
 * U+180E is a space to PCRE2 only, so \s is spelled out (see regex_translate); and newly assigned
 * letters follow each library's version of Unicode.
 */
#include "router/text/tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <jansson.h>
#include <pcre2.h>
#include <string.h>

#include "common/base/byte_level.h"
#include "common/base/hash.h"
#include "common/base/json.h"

enum {
    MAX_FILE_BYTES = 64 << 20,
    MAX_IDS = 1 << 22,
    MAX_PATTERN_BYTES = 4096,
    MAX_ADDED_BYTES = 256, /* of one added token: bounds the scan for them */
    MAX_TEXT_BYTES = 1 << 30,
    MAX_REGEX_HEAP_KIB = 256 << 10, /* only used where PCRE2 has no JIT */
};

struct token {
    uint32_t start, n; /* in tokenizer.bytes */
    bool present, added, special;
};

struct vocab_slot {
    uint32_t hash;
    int32_t id; /* -1: empty */
};

struct pair_slot {
    uint64_t pair; /* left id << 32 | right id */
    uint32_t rank; /* NO_RANK: empty */
    int32_t id;    /* what the pair becomes */
};

#define NO_RANK UINT32_MAX

/* Added tokens, one node per byte. Node 0 is unused, so 0 means none. */
struct trie_node {
    uint32_t child, sibling;
    int32_t id; /* -1: no token ends here */
    uint8_t byte;
};

struct tokenizer {
    struct json_out bytes; /* all tokens' bytes, end to end */
    struct token *tokens;  /* by id */
    int32_t n_ids;

    struct vocab_slot *vocab;
    size_t vocab_mask;
    struct pair_slot *pairs;
    size_t pair_mask;
    int32_t byte_id[256];
    bool ignore_merges;

    struct trie_node *trie;
    uint32_t n_trie, trie_cap;
    uint32_t trie_root[256];

    pcre2_code *regex;
    pcre2_match_context *limits;
};

struct symbol {
    int32_t id; /* -1: merged into its left neighbour */
    uint32_t prev, next;
};

#define NO_SYMBOL UINT32_MAX

/* What one call of tokenizer_encode needs, reused from piece to piece. */
struct work {
    const struct tokenizer *t;
    struct ids *ids;
    pcre2_match_data *match;
    struct symbol *symbols; /* one per byte of a piece */
    uint64_t *heap;         /* rank << 32 | position of the pair's left symbol */
    size_t n_heap, cap;     /* cap in bytes of a piece; the heap holds twice as many */
};

static enum err load_tokenizer(const json_t *root, struct tokenizer *t);
static enum err load_model_settings(const json_t *model, struct tokenizer *t);
static enum err load_tokens(const json_t *vocab, const json_t *added, struct tokenizer *t);
static enum err load_merges(const json_t *merges, struct tokenizer *t);
static enum err load_added(const json_t *added, struct tokenizer *t);
static enum err load_regex(const json_t *root, struct tokenizer *t);
static void regex_translate(const char *pattern, struct json_out *ret);
static bool alphabet_decode(const char *text, size_t n, struct json_out *ret);

static int32_t vocab_find(const struct tokenizer *t, const char *bytes, size_t n);
static struct pair_slot *pair_find(const struct tokenizer *t, int32_t left, int32_t right);
static enum err trie_add(struct tokenizer *t, const char *text, size_t n, int32_t id);
static int32_t trie_longest(const struct tokenizer *t, const char *text, size_t n, size_t *ret_n);

static enum err encode_segment(struct work *w, const char *text, size_t n);
static enum err encode_piece(struct work *w, const char *piece, size_t n);

/* ---- loading ---- */

static enum err out_of_memory(void) { return err_set(ERR_NOMEM, "tokenizer"); }

#define REFUSE(...) err_set(ERR_BAD_MODEL, __VA_ARGS__)

enum err tokenizer_load(const char *path, struct tokenizer **ret)
{
    struct json_limits limits = json_limits_file;
    limits.max_bytes = MIN(limits.max_bytes, (size_t)MAX_FILE_BYTES);
    json_auto_t *root = NULL;
    enum err e = json_parse_file(path, &limits, &root);
    if (e != ERR_OK && e != ERR_NOMEM) {
        char sentence[512];
        snprintf(sentence, sizeof(sentence), "%s", err_text(e));
        return REFUSE("%s", sentence);
    }
    TRY(e);

    OWNED(tokenizer) t = calloc(1, sizeof(*t));
    if (!t)
        return out_of_memory();
    e = load_tokenizer(root, t);
    if (e != ERR_OK)
        return err_prefix(e, "%s", path);
    *ret = take(&t);
    return ERR_OK;
}

void tokenizer_destroy(struct tokenizer *t)
{
    if (!t)
        return;
    json_out_finish(&t->bytes);
    free(t->tokens);
    free(t->vocab);
    free(t->pairs);
    free(t->trie);
    pcre2_code_free(t->regex);
    pcre2_match_context_free(t->limits);
    free(t);
}

static enum err load_tokenizer(const json_t *root, struct tokenizer *t)
{
    if (!json_is_object(root))
        return REFUSE("the file is not a JSON object");
    const json_t *model = json_object_get(root, "model");
    const json_t *vocab = json_object_get(model, "vocab");
    const json_t *merges = json_object_get(model, "merges");
    const json_t *added = json_object_get(root, "added_tokens");
    if (!json_is_object(model))
        return REFUSE("model is missing or not an object");
    if (!json_is_object(vocab))
        return REFUSE("model.vocab is missing or not an object");
    if (!json_is_array(merges))
        return REFUSE("model.merges is missing or not an array");
    if (!json_is_array(added))
        return REFUSE("added_tokens is missing or not an array");

    const json_t *normalizer = json_object_get(root, "normalizer");
    if (normalizer && !json_is_null(normalizer))
        return REFUSE("normalizer is not supported, it must be null");
    const char *decoder =
        json_string_value(json_object_get(json_object_get(root, "decoder"), "type"));
    if (!decoder || strcmp(decoder, "ByteLevel") != 0)
        return REFUSE("decoder.type is \"%.32s\", supported is \"ByteLevel\"",
                      decoder ? decoder : "");

    TRY(load_model_settings(model, t));
    TRY(load_tokens(vocab, added, t));
    TRY(load_merges(merges, t));
    TRY(load_added(added, t));
    return load_regex(root, t);
}

static enum err load_model_settings(const json_t *model, struct tokenizer *t)
{
    const char *type = json_string_value(json_object_get(model, "type"));
    if (!type || strcmp(type, "BPE") != 0)
        return REFUSE("model.type is \"%.32s\", supported is \"BPE\"", type ? type : "");
    const json_t *dropout = json_object_get(model, "dropout");
    if (dropout && !json_is_null(dropout))
        return REFUSE("model.dropout must be null");
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    for (size_t i = 0; i < ARRAY_LEN(affixes); i++) {
        const json_t *affix = json_object_get(model, affixes[i]);
        if (affix && !json_is_null(affix) &&
            !(json_is_string(affix) && json_string_length(affix) == 0))
            return REFUSE("model.%s must be null", affixes[i]);
    }
    const json_t *fallback = json_object_get(model, "byte_fallback");
    if (fallback && !json_is_null(fallback) && !json_is_false(fallback))
        return REFUSE("model.byte_fallback must be false");
    const json_t *ignore = json_object_get(model, "ignore_merges");
    if (ignore && !json_is_null(ignore) && !json_is_boolean(ignore))
        return REFUSE("model.ignore_merges must be true or false");
    t->ignore_merges = json_is_true(ignore);
    return ERR_OK;
}

static enum err token_set(struct tokenizer *t, int32_t id, size_t start)
{
    if (t->bytes.failed)
        return out_of_memory();
    t->tokens[id].start = (uint32_t)start;
    t->tokens[id].n = (uint32_t)(t->bytes.len - start);
    t->tokens[id].present = true;
    return ERR_OK;
}

/* Power of two with at most two thirds of the slots used. */
static size_t table_slots(size_t n_entries)
{
    size_t slots = 16;
    while (slots * 2 < n_entries * 3)
        slots *= 2;
    return slots;
}

static uint32_t vocab_hash(const char *bytes, size_t n)
{
    return (uint32_t)hash_bytes(0, bytes, n);
}

/* Reads both lists' ids first: they decide how large the table by id is. Then the vocabulary. */
static enum err load_tokens(const json_t *vocab, const json_t *added, struct tokenizer *t)
{
    int32_t max_id = -1;
    const char *text;
    const json_t *value;
    json_object_foreach ((json_t *)vocab, text, value) {
        if (!json_is_integer(value) || json_integer_value(value) < 0 ||
            json_integer_value(value) >= MAX_IDS)
            return REFUSE("model.vocab: the id of \"%.64s\" is not an integer in [0, %d)", text,
                          MAX_IDS);
        max_id = MAX(max_id, (int32_t)json_integer_value(value));
    }
    size_t i;
    json_array_foreach (added, i, value) {
        const json_t *id = json_object_get(value, "id");
        if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= MAX_IDS)
            return REFUSE("added_tokens[%zu].id is not an integer in [0, %d)", i, MAX_IDS);
        max_id = MAX(max_id, (int32_t)json_integer_value(id));
    }
    t->n_ids = max_id + 1;
    t->tokens = calloc((size_t)t->n_ids + 1, sizeof(*t->tokens));
    size_t slots = table_slots(json_object_size(vocab));
    t->vocab = malloc(slots * sizeof(*t->vocab));
    if (!t->tokens || !t->vocab)
        return out_of_memory();
    t->vocab_mask = slots - 1;
    for (size_t k = 0; k < slots; k++)
        t->vocab[k].id = -1;

    json_object_foreach ((json_t *)vocab, text, value) {
        int32_t id = (int32_t)json_integer_value(value);
        if (t->tokens[id].present)
            return REFUSE("model.vocab: two tokens have the id %d", id);
        size_t n = strlen(text), start = t->bytes.len;
        if (n == 0)
            return REFUSE("model.vocab: id %d is an empty token", id);
        bool plain = alphabet_decode(text, n, &t->bytes);
        if (!plain) /* no text can produce it; ids still print as they are written */
            json_out_raw(&t->bytes, text, n);
        TRY(token_set(t, id, start));
        if (!plain)
            continue;
        uint32_t hash = vocab_hash(t->bytes.data + start, t->tokens[id].n);
        size_t at = hash & t->vocab_mask;
        while (t->vocab[at].id >= 0)
            at = (at + 1) & t->vocab_mask;
        t->vocab[at] = (struct vocab_slot){.hash = hash, .id = id};
    }
    for (int byte = 0; byte < 256; byte++) {
        char c = (char)byte;
        t->byte_id[byte] = vocab_find(t, &c, 1);
        if (t->byte_id[byte] < 0)
            return REFUSE("model.vocab has no token for byte 0x%02x", byte);
    }
    return ERR_OK;
}

static enum err merge_halves(const json_t *merge, size_t i, struct json_out *bytes,
                             size_t *ret_left)
{
    const char *left = NULL, *right = NULL;
    size_t n_left = 0, n_right = 0;
    if (json_is_string(merge)) {
        left = json_string_value(merge);
        const char *space = strchr(left, ' ');
        if (space && !strchr(space + 1, ' ')) {
            n_left = (size_t)(space - left);
            right = space + 1;
            n_right = json_string_length(merge) - n_left - 1;
        }
    } else if (json_array_size(merge) == 2 && json_is_string(json_array_get(merge, 0)) &&
               json_is_string(json_array_get(merge, 1))) {
        left = json_string_value(json_array_get(merge, 0));
        n_left = json_string_length(json_array_get(merge, 0));
        right = json_string_value(json_array_get(merge, 1));
        n_right = json_string_length(json_array_get(merge, 1));
    }
    if (n_left == 0 || n_right == 0)
        return REFUSE("model.merges[%zu] is neither \"a b\" nor [\"a\", \"b\"]", i);
    bytes->len = 0;
    bool plain = alphabet_decode(left, n_left, bytes);
    *ret_left = bytes->len;
    plain = plain && alphabet_decode(right, n_right, bytes);
    if (bytes->failed)
        return out_of_memory();
    if (!plain)
        return REFUSE("model.merges[%zu] has a character outside the byte-level alphabet", i);
    return ERR_OK;
}

static void scratch_drop(struct json_out *o) { json_out_finish(o); }
#define SCRATCH __attribute__((cleanup(scratch_drop))) struct json_out

static enum err load_merges(const json_t *merges, struct tokenizer *t)
{
    size_t slots = table_slots(json_array_size(merges));
    t->pairs = malloc(slots * sizeof(*t->pairs));
    if (!t->pairs)
        return out_of_memory();
    t->pair_mask = slots - 1;
    for (size_t k = 0; k < slots; k++)
        t->pairs[k].rank = NO_RANK;

    SCRATCH bytes = {0};
    size_t i;
    const json_t *merge;
    json_array_foreach (merges, i, merge) {
        size_t n_left = 0;
        TRY(merge_halves(merge, i, &bytes, &n_left));
        int32_t left = vocab_find(t, bytes.data, n_left);
        int32_t right = vocab_find(t, bytes.data + n_left, bytes.len - n_left);
        int32_t both = vocab_find(t, bytes.data, bytes.len);
        if (left < 0 || right < 0 || both < 0)
            return REFUSE("model.merges[%zu]: %s is not in model.vocab", i,
                          left < 0    ? "the left side"
                          : right < 0 ? "the right side"
                                      : "the result");
        struct pair_slot *slot = pair_find(t, left, right);
        /* of a pair listed twice the later rank counts, as in the reference implementation */
        *slot = (struct pair_slot){
            .pair = (uint64_t)left << 32 | (uint32_t)right, .rank = (uint32_t)i, .id = both};
    }
    return ERR_OK;
}

static enum err load_added(const json_t *added, struct tokenizer *t)
{
    size_t i;
    const json_t *entry;
    json_array_foreach (added, i, entry) {
        const json_t *content = json_object_get(entry, "content");
        const json_t *special = json_object_get(entry, "special");
        const char *text = json_string_value(content);
        size_t n = json_string_length(content);
        if (n == 0 || n > MAX_ADDED_BYTES)
            return REFUSE("added_tokens[%zu].content is not a string of 1 to %d bytes", i,
                          MAX_ADDED_BYTES);
        if (special && !json_is_boolean(special))
            return REFUSE("added_tokens[%zu].special is not true or false", i);
        static const char *const flags[] = {"lstrip", "rstrip", "single_word"};
        for (size_t k = 0; k < ARRAY_LEN(flags); k++) {
            const json_t *flag = json_object_get(entry, flags[k]);
            if (flag && !json_is_false(flag))
                return REFUSE("added_tokens[%zu].%s is not supported, it must be false", i,
                              flags[k]);
        }
        int32_t id = (int32_t)json_integer_value(json_object_get(entry, "id"));
        struct token *token = &t->tokens[id];
        if (token->added || tokenizer_added_id(t, text) >= 0)
            return REFUSE("added_tokens[%zu] repeats an earlier id or content", i);
        int32_t in_vocab = vocab_find(t, text, n);
        if (in_vocab >= 0 && in_vocab != id)
            return REFUSE("added_tokens[%zu].id is %d, model.vocab says %d", i, id, in_vocab);
        if (token->present && (token->n != n || memcmp(t->bytes.data + token->start, text, n) != 0))
            return REFUSE("added_tokens[%zu].id is %d, which model.vocab gives to another token", i,
                          id);
        if (!token->present) {
            size_t start = t->bytes.len;
            json_out_raw(&t->bytes, text, n);
            TRY(token_set(t, id, start));
        }
        token->added = true;
        token->special = json_is_true(special);
        TRY(trie_add(t, text, n, id));
    }
    return ERR_OK;
}

static enum err load_regex(const json_t *root, struct tokenizer *t)
{
    const json_t *pre = json_object_get(root, "pre_tokenizer");
    const char *type = json_string_value(json_object_get(pre, "type"));
    const json_t *steps = json_object_get(pre, "pretokenizers");
    if (!type || strcmp(type, "Sequence") != 0 || json_array_size(steps) != 2)
        return REFUSE("pre_tokenizer is not a Sequence of Split and ByteLevel");

    const json_t *split = json_array_get(steps, 0), *level = json_array_get(steps, 1);
    type = json_string_value(json_object_get(split, "type"));
    if (!type || strcmp(type, "Split") != 0)
        return REFUSE("pre_tokenizer.pretokenizers[0].type is not \"Split\"");
    const char *behavior = json_string_value(json_object_get(split, "behavior"));
    if (!behavior || strcmp(behavior, "Isolated") != 0)
        return REFUSE("pre_tokenizer.pretokenizers[0].behavior is not \"Isolated\"");
    if (!json_is_false(json_object_get(split, "invert")))
        return REFUSE("pre_tokenizer.pretokenizers[0].invert is not false");
    const json_t *regex = json_object_get(json_object_get(split, "pattern"), "Regex");
    if (json_string_length(regex) == 0 || json_string_length(regex) > MAX_PATTERN_BYTES)
        return REFUSE("pre_tokenizer.pretokenizers[0].pattern.Regex is not a string of 1 to %d "
                      "bytes",
                      MAX_PATTERN_BYTES);

    type = json_string_value(json_object_get(level, "type"));
    if (!type || strcmp(type, "ByteLevel") != 0)
        return REFUSE("pre_tokenizer.pretokenizers[1].type is not \"ByteLevel\"");
    if (!json_is_false(json_object_get(level, "add_prefix_space")))
        return REFUSE("pre_tokenizer.pretokenizers[1].add_prefix_space is not false");
    if (!json_is_false(json_object_get(level, "use_regex")))
        return REFUSE("pre_tokenizer.pretokenizers[1].use_regex is not false");

    SCRATCH pattern = {0};
    regex_translate(json_string_value(regex), &pattern);
    if (pattern.failed)
        return out_of_memory();
    int code;
    PCRE2_SIZE at;
    t->regex = pcre2_compile((PCRE2_SPTR)pattern.data, pattern.len,
                             PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &code, &at, NULL);
    if (!t->regex) {
        char why[120] = "";
        pcre2_get_error_message(code, (PCRE2_UCHAR *)why, sizeof(why));
        return REFUSE("pre_tokenizer.pretokenizers[0].pattern.Regex: %s", why);
    }
    t->limits = pcre2_match_context_create(NULL);
    if (!t->limits)
        return out_of_memory();
    pcre2_set_heap_limit(t->limits, MAX_REGEX_HEAP_KIB);
    (void)pcre2_jit_compile(t->regex, PCRE2_JIT_COMPLETE); /* without JIT it is only slower */
    return ERR_OK;
}

/* Copies the pattern with \s and \S spelled out as Unicode's White_Space. (\S inside a class has
 * no such spelling and keeps PCRE2's meaning.) */
static void regex_translate(const char *pattern, struct json_out *ret)
{
    static const char space[] = "\\t-\\r\\x20\\x85\\xa0\\x{1680}\\x{2000}-\\x{200a}\\x{2028}"
                                "\\x{2029}\\x{202f}\\x{205f}\\x{3000}";
    bool in_class = false;
    for (const char *p = pattern; *p; p++) {
        if (*p == '\\' && p[1]) {
            bool set = p[1] == 's', inverse = p[1] == 'S' && !in_class;
            if (!set && !inverse) {
                json_out_raw(ret, p, 2);
            } else {
                if (!in_class)
                    json_out_raw(ret, inverse ? "[^" : "[", inverse ? 2 : 1);
                json_out_raw(ret, space, sizeof(space) - 1);
                if (!in_class)
                    json_out_raw(ret, "]", 1);
            }
            p++;
            continue;
        }
        if (*p == '[')
            in_class = true;
        else if (*p == ']')
            in_class = false;
        json_out_raw(ret, p, 1);
    }
}

/* Appends the bytes that text stands for; false, and nothing appended, where a character is not of
 * the alphabet. */
static bool alphabet_decode(const char *text, size_t n, struct json_out *ret)
{
    size_t before = ret->len, n_bytes = 0;
    json_out_raw(ret, text, n); /* room: there are no more bytes than that */
    if (ret->failed)
        return false;
    bool plain = byte_level_decode(text, n, ret->data + before, &n_bytes);
    ret->len = plain ? before + n_bytes : before;
    return plain;
}

/* ---- tables ---- */

static int32_t vocab_find(const struct tokenizer *t, const char *bytes, size_t n)
{
    uint32_t hash = vocab_hash(bytes, n);
    for (size_t at = hash & t->vocab_mask; t->vocab[at].id >= 0; at = (at + 1) & t->vocab_mask) {
        if (t->vocab[at].hash != hash)
            continue;
        const struct token *token = &t->tokens[t->vocab[at].id];
        if (token->n == n && memcmp(t->bytes.data + token->start, bytes, n) == 0)
            return t->vocab[at].id;
    }
    return -1;
}

/* The pair's slot, or the empty one where it would go. */
static struct pair_slot *pair_find(const struct tokenizer *t, int32_t left, int32_t right)
{
    uint64_t pair = (uint64_t)left << 32 | (uint32_t)right;
    size_t at = hash_mix(pair) & t->pair_mask;
    while (t->pairs[at].rank != NO_RANK && t->pairs[at].pair != pair)
        at = (at + 1) & t->pair_mask;
    return &t->pairs[at];
}

static uint32_t trie_child(const struct tokenizer *t, uint32_t node, uint8_t byte)
{
    uint32_t child = t->trie[node].child;
    while (child && t->trie[child].byte != byte)
        child = t->trie[child].sibling;
    return child;
}

static enum err trie_add(struct tokenizer *t, const char *text, size_t n, int32_t id)
{
    uint32_t node = 0;
    for (size_t i = 0; i < n; i++) {
        uint8_t byte = (uint8_t)text[i];
        uint32_t next = node ? trie_child(t, node, byte) : t->trie_root[byte];
        if (!next) {
            if (t->n_trie + 2 > t->trie_cap) {
                uint32_t cap = t->trie_cap ? t->trie_cap * 2 : 1024;
                struct trie_node *grown = realloc(t->trie, cap * sizeof(*grown));
                if (!grown)
                    return out_of_memory();
                t->trie = grown;
                t->trie_cap = cap;
            }
            next = ++t->n_trie;
            t->trie[next] = (struct trie_node){.id = -1, .byte = byte};
            if (node) {
                t->trie[next].sibling = t->trie[node].child;
                t->trie[node].child = next;
            } else {
                t->trie_root[byte] = next;
            }
        }
        node = next;
    }
    t->trie[node].id = id;
    return ERR_OK;
}

/* The longest added token that text starts with, or -1. */
static int32_t trie_longest(const struct tokenizer *t, const char *text, size_t n, size_t *ret_n)
{
    int32_t id = -1;
    uint32_t node = n ? t->trie_root[(uint8_t)text[0]] : 0;
    for (size_t i = 1; node; i++) {
        if (t->trie[node].id >= 0) {
            id = t->trie[node].id;
            *ret_n = i;
        }
        node = i < n ? trie_child(t, node, (uint8_t)text[i]) : 0;
    }
    return id;
}

int32_t tokenizer_n_ids(const struct tokenizer *t) { return t->n_ids; }

int32_t tokenizer_added_id(const struct tokenizer *t, const char *text)
{
    size_t n = strlen(text), matched = 0;
    int32_t id = trie_longest(t, text, n, &matched);
    return matched == n ? id : -1;
}

static const struct token *token_get(const struct tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->n_ids && t->tokens[id].present ? &t->tokens[id] : NULL;
}

const char *tokenizer_bytes(const struct tokenizer *t, int32_t id, size_t *ret_n)
{
    const struct token *token = token_get(t, id);
    if (!token)
        return NULL;
    *ret_n = token->n;
    return t->bytes.data + token->start;
}

bool tokenizer_is_added(const struct tokenizer *t, int32_t id)
{
    const struct token *token = token_get(t, id);
    return token && token->added;
}

bool tokenizer_is_special(const struct tokenizer *t, int32_t id)
{
    const struct token *token = token_get(t, id);
    return token && token->special;
}

/* ---- encoding ---- */

enum err ids_push(struct ids *ids, int32_t id)
{
    if (ids->len == ids->cap) {
        size_t cap = ids->cap ? ids->cap * 2 : 64;
        int32_t *grown = realloc(ids->data, cap * sizeof(*grown));
        if (!grown)
            return err_set(ERR_NOMEM, "%zu token ids", cap);
        ids->data = grown;
        ids->cap = cap;
    }
    ids->data[ids->len++] = id;
    return ERR_OK;
}

void ids_finish(struct ids *ids)
{
    free(ids->data);
    *ids = (struct ids){0};
}

static void work_drop(struct work *w)
{
    pcre2_match_data_free(w->match);
    free(w->symbols);
    free(w->heap);
}

static enum err encode(struct work *w, const char *text, size_t n, bool added)
{
    if (!added)
        return encode_segment(w, text, n);
    size_t start = 0;
    for (size_t at = 0; at < n;) {
        size_t n_token = 0;
        int32_t id = trie_longest(w->t, text + at, n - at, &n_token);
        if (id < 0) {
            at++;
            continue;
        }
        TRY(encode_segment(w, text + start, at - start));
        TRY(ids_push(w->ids, id));
        at += n_token;
        start = at;
    }
    return encode_segment(w, text + start, n - start);
}

enum err tokenizer_encode(const struct tokenizer *t, const char *text, size_t n, bool added,
                          struct ids *ids)
{
    if (n > MAX_TEXT_BYTES)
        return err_set(ERR_TOO_LARGE, "text of %zu bytes, at most %d can be tokenised", n,
                       MAX_TEXT_BYTES);
    size_t valid = utf8_check(text, n);
    if (valid != n)
        return err_set(ERR_INVALID, "text is not valid UTF-8 at byte %zu", valid);
    __attribute__((cleanup(work_drop))) struct work w = {.t = t, .ids = ids};
    w.match = pcre2_match_data_create_from_pattern(t->regex, NULL);
    if (!w.match)
        return out_of_memory();
    size_t before = ids->len;
    enum err e = encode(&w, text, n, added);
    if (e != ERR_OK)
        ids->len = before;
    return e;
}

/* Cuts a text without added tokens into the regex's matches and what lies between them. */
static enum err encode_segment(struct work *w, const char *text, size_t n)
{
    const struct tokenizer *t = w->t;
    const uint32_t options = PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY;
    for (size_t at = 0; at < n;) {
        PCRE2_SPTR subject = (PCRE2_SPTR)text;
        int rc = pcre2_match(t->regex, subject, n, at, options, w->match, t->limits);
        if (rc == PCRE2_ERROR_JIT_STACKLIMIT) /* the interpreter keeps its state on the heap */
            rc = pcre2_match(t->regex, subject, n, at, options | PCRE2_NO_JIT, w->match, t->limits);
        size_t start = n, end = n;
        if (rc >= 0) {
            const PCRE2_SIZE *match = pcre2_get_ovector_pointer(w->match);
            start = match[0];
            end = match[1];
        }
        if ((rc < 0 && rc != PCRE2_ERROR_NOMATCH) || start < at || end < start)
            return err_set(ERR_INVALID, "the tokenizer's regex gave up at byte %zu (PCRE2 %d)", at,
                           rc);
        TRY(encode_piece(w, text + at, start - at));
        TRY(encode_piece(w, text + start, end - start));
        at = end;
    }
    return ERR_OK;
}

static enum err work_reserve(struct work *w, size_t n)
{
    if (n <= w->cap)
        return ERR_OK;
    size_t cap = MAX(n, (size_t)256);
    free(w->symbols);
    free(w->heap);
    w->cap = 0;
    w->symbols = malloc(cap * sizeof(*w->symbols));
    w->heap = malloc(2 * cap * sizeof(*w->heap));
    if (!w->symbols || !w->heap)
        return err_set(ERR_NOMEM, "tokenising a piece of %zu bytes", n);
    w->cap = cap;
    return ERR_OK;
}

static void heap_sink(uint64_t *heap, size_t n, size_t at)
{
    uint64_t item = heap[at];
    for (size_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && heap[child + 1] < heap[child])
            child++;
        if (heap[child] >= item)
            break;
        heap[at] = heap[child];
    }
    heap[at] = item;
}

static void heap_add(struct work *w, uint64_t item)
{
    size_t at = w->n_heap++;
    for (; at > 0 && w->heap[(at - 1) / 2] > item; at = (at - 1) / 2)
        w->heap[at] = w->heap[(at - 1) / 2];
    w->heap[at] = item;
}

static uint32_t pair_rank(const struct work *w, uint32_t left)
{
    uint32_t right = w->symbols[left].next;
    if (right == NO_SYMBOL)
        return NO_RANK;
    return pair_find(w->t, w->symbols[left].id, w->symbols[right].id)->rank;
}

static void pair_offer(struct work *w, uint32_t left)
{
    uint32_t rank = pair_rank(w, left);
    if (rank != NO_RANK)
        heap_add(w, (uint64_t)rank << 32 | left);
}

/* A merge takes one entry off the heap and adds two at most, and there are fewer merges than
 * bytes: twice the bytes is room enough. */
static enum err encode_piece(struct work *w, const char *piece, size_t n)
{
    if (n == 0)
        return ERR_OK;
    if (w->t->ignore_merges) {
        int32_t id = vocab_find(w->t, piece, n);
        if (id >= 0)
            return ids_push(w->ids, id);
    }
    TRY(work_reserve(w, n));
    struct symbol *s = w->symbols;
    for (uint32_t i = 0; i < n; i++)
        s[i] = (struct symbol){.id = w->t->byte_id[(uint8_t)piece[i]],
                               .prev = i ? i - 1 : NO_SYMBOL,
                               .next = i + 1 < n ? i + 1 : NO_SYMBOL};
    w->n_heap = 0;
    for (uint32_t i = 0; i + 1 < n; i++) {
        uint32_t rank = pair_rank(w, i);
        if (rank != NO_RANK)
            w->heap[w->n_heap++] = (uint64_t)rank << 32 | i;
    }
    for (size_t i = w->n_heap / 2; i-- > 0;)
        heap_sink(w->heap, w->n_heap, i);

    while (w->n_heap) {
        uint32_t left = (uint32_t)w->heap[0], rank = (uint32_t)(w->heap[0] >> 32);
        w->heap[0] = w->heap[--w->n_heap];
        heap_sink(w->heap, w->n_heap, 0);
        uint32_t right = s[left].next;
        if (s[left].id < 0 || right == NO_SYMBOL)
            continue;
        const struct pair_slot *pair = pair_find(w->t, s[left].id, s[right].id);
        if (pair->rank != rank)
            continue; /* stale: one side has grown since */
        s[left].id = pair->id;
        s[left].next = s[right].next;
        s[right].id = -1;
        if (s[left].next != NO_SYMBOL) {
            s[s[left].next].prev = left;
            pair_offer(w, left);
        }
        if (s[left].prev != NO_SYMBOL)
            pair_offer(w, s[left].prev);
    }
    for (uint32_t i = 0; i != NO_SYMBOL; i = s[i].next)
        TRY(ids_push(w->ids, s[i].id));
    return ERR_OK;
}
