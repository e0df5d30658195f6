/* tokenizer_test.c: ids equal to the reference's, refusals that name the field, and time that grows
 * with the text and not with its square. */
#include "router/text/tokenizer.h"

#include <pthread.h>
#include <time.h>

#include "check.h"
#include "common/base/json.h"

static char demo_path[4096], golden_path[4096], temp_path[] = "/tmp/baton_tokenizer_XXXXXX";
static struct tokenizer *demo;

static void path_from(const char *variable, const char *otherwise, const char *file, char *ret)
{
    const char *dir = getenv(variable);
    snprintf(ret, 4096, "%s/%s", dir ? dir : otherwise, file);
}

static json_t *demo_json(void)
{
    json_t *root = NULL;
    CHECK_OK(json_parse_file(demo_path, &json_limits_file, &root));
    REQUIRE(root != NULL);
    return root;
}

static json_t *at(json_t *root, const char *a, const char *b)
{
    json_t *value = json_object_get(root, a);
    return b ? json_object_get(value, b) : value;
}

/* Writes root where tokenizer_load will find it, loads it, and lets go of root. */
static enum err load_changed(json_t *root, struct tokenizer **ret)
{
    REQUIRE(json_dump_file(root, temp_path, JSON_COMPACT) == 0);
    json_decref(root);
    return tokenizer_load(temp_path, ret);
}

static enum err load_bytes(const char *text, size_t n)
{
    FILE *f = fopen(temp_path, "wb");
    REQUIRE(f != NULL);
    fwrite(text, 1, n, f);
    fclose(f);
    struct tokenizer *t = NULL;
    enum err e = tokenizer_load(temp_path, &t);
    CHECK((e == ERR_OK) == (t != NULL));
    tokenizer_destroy(t);
    return e;
}

static void check_goldens(const struct tokenizer *t)
{
    json_auto_t *cases = NULL;
    CHECK_OK(json_parse_file(golden_path, &json_limits_file, &cases));
    CHECK_INT(json_array_size(cases), 14);
    size_t i, k;
    json_t *one, *id;
    json_array_foreach (cases, i, one) {
        const json_t *text = json_object_get(one, "text");
        struct ids ids = {0};
        CHECK_OK(
            tokenizer_encode(t, json_string_value(text), json_string_length(text), true, &ids));
        CHECK_INT(ids.len, json_array_size(json_object_get(one, "ids")));
        json_array_foreach (json_object_get(one, "ids"), k, id)
            if (k < ids.len && ids.data[k] != json_integer_value(id)) {
                fprintf(stderr, "golden %zu, token %zu\n", i, k);
                CHECK_INT(ids.data[k], json_integer_value(id));
                break;
            }
        ids_finish(&ids);
    }
}

static void goldens(void) { check_goldens(demo); }

/* "a b" and ["a", "b"] say the same. */
static void merges_as_strings_and_pairs(void)
{
    for (int as_strings = 0; as_strings < 2; as_strings++) {
        json_t *root = demo_json();
        json_t *merges = at(root, "model", "merges"), *merge;
        size_t i;
        json_array_foreach (merges, i, merge) {
            char text[512], *space;
            if (json_is_string(merge))
                snprintf(text, sizeof(text), "%s", json_string_value(merge));
            else
                snprintf(text, sizeof(text), "%s %s", json_string_value(json_array_get(merge, 0)),
                         json_string_value(json_array_get(merge, 1)));
            space = strchr(text, ' ');
            REQUIRE(space != NULL);
            json_t *now = as_strings ? json_string(text)
                                     : json_pack("[s%,s]", text, (size_t)(space - text), space + 1);
            REQUIRE(now != NULL);
            json_array_set_new(merges, i, now);
        }
        struct tokenizer *t = NULL;
        CHECK_OK(load_changed(root, &t));
        if (t)
            check_goldens(t);
        tokenizer_destroy(t);
    }
}

static void check_ids(const struct tokenizer *t, const char *text, bool added, const int32_t *want,
                      size_t n)
{
    struct ids ids = {0};
    CHECK_OK(tokenizer_encode(t, text, strlen(text), added, &ids));
    CHECK_INT(ids.len, n);
    for (size_t i = 0; i < n && i < ids.len; i++)
        CHECK_INT(ids.data[i], want[i]);
    ids_finish(&ids);
}
#define IDS(...) (const int32_t[]){__VA_ARGS__}, ARRAY_LEN(((const int32_t[]){__VA_ARGS__}))

/* "qzx" is in the vocabulary but no merge leads there: only ignore_merges finds it, and only when
 * it is a whole piece. */
static void ignore_merges(void)
{
    struct tokenizer *merged = NULL, *direct = NULL;
    for (int ignore = 0; ignore < 2; ignore++) {
        json_t *root = demo_json();
        json_object_set_new(at(root, "model", NULL), "ignore_merges", json_boolean(ignore));
        json_object_set_new(at(root, "model", "vocab"), "qzx", json_integer(5000));
        CHECK_OK(load_changed(root, ignore ? &direct : &merged));
    }
    REQUIRE(merged && direct);
    CHECK_INT(tokenizer_n_ids(direct), 5001);
    struct ids apart = {0};
    CHECK_OK(tokenizer_encode(merged, "qzx", 3, false, &apart));
    CHECK(apart.len > 1);
    check_ids(merged, "qzx", false, apart.data, apart.len);
    check_ids(direct, "qzx", false, IDS(5000));
    struct ids inside = {0};
    CHECK_OK(tokenizer_encode(direct, "qzxq", 4, false, &inside));
    for (size_t i = 0; i < inside.len; i++)
        CHECK(inside.data[i] != 5000);
    ids_finish(&apart);
    ids_finish(&inside);
    check_goldens(merged);
    tokenizer_destroy(merged);
    tokenizer_destroy(direct);
}

static void added_tokens(void)
{
    int32_t user = tokenizer_added_id(demo, "<|user|>"),
            think = tokenizer_added_id(demo, "<think>");
    int32_t end = tokenizer_added_id(demo, "</think>");
    CHECK(user > 0 && think > 0 && end > 0);
    CHECK_INT(tokenizer_added_id(demo, "<|user|"), -1);
    CHECK_INT(tokenizer_added_id(demo, "<|user|>x"), -1);
    CHECK_INT(tokenizer_added_id(demo, ""), -1);
    check_ids(demo, "<|user|><think></think>", true, IDS(user, think, end));
    CHECK(tokenizer_is_added(demo, think) && !tokenizer_is_special(demo, think));
    CHECK(tokenizer_is_added(demo, user) && tokenizer_is_special(demo, user));
    CHECK(!tokenizer_is_added(demo, 40) && !tokenizer_is_added(demo, -1));
    CHECK(!tokenizer_is_added(demo, tokenizer_n_ids(demo)));

    struct ids ids = {0};
    CHECK_OK(tokenizer_encode(demo, "<|user|><think>/nothink", 23, false, &ids));
    for (size_t i = 0; i < ids.len; i++)
        CHECK(!tokenizer_is_added(demo, ids.data[i]));
    ids.len = 0;
    CHECK_OK(tokenizer_encode(demo, "<<think><|use", 13, true, &ids));
    CHECK(ids.len > 2 && ids.data[1] == think);
    ids_finish(&ids);
}

/* At one position the longer of two added tokens is taken, wherever they stand in the list. */
static void added_tokens_longest_first(void)
{
    json_t *root = demo_json();
    json_t *added = at(root, "added_tokens", NULL);
    json_array_append_new(added, json_pack("{s:i,s:s}", "id", 6001, "content", "<x"));
    json_array_append_new(added, json_pack("{s:i,s:s}", "id", 6002, "content", "<xyz>"));
    json_array_append_new(added, json_pack("{s:i,s:s}", "id", 6003, "content", "<xy"));
    json_array_append_new(added, json_pack("{s:i,s:s}", "id", 6004, "content", "<｜x｜>"));
    struct tokenizer *t = NULL;
    CHECK_OK(load_changed(root, &t));
    REQUIRE(t != NULL);
    check_ids(t, "<xyz><xy<x<｜x｜>", true, IDS(6002, 6003, 6001, 6004));
    size_t n = 0;
    const char *bytes = tokenizer_bytes(t, 6004, &n);
    CHECK(bytes && n == 9 && !memcmp(bytes, "<｜x｜>", 9));
    CHECK(tokenizer_bytes(t, 6000, &n) == NULL);
    CHECK(tokenizer_bytes(t, -1, &n) == NULL);
    CHECK(tokenizer_bytes(t, 6005, &n) == NULL);
    tokenizer_destroy(t);
}

static void tokens_are_bytes(void)
{
    int n_bytes[256] = {0};
    for (int32_t id = 0; id < tokenizer_n_ids(demo); id++) {
        size_t n = 0;
        const char *bytes = tokenizer_bytes(demo, id, &n);
        CHECK(bytes && n > 0);
        if (bytes && n == 1)
            n_bytes[(uint8_t)bytes[0]]++;
    }
    for (int b = 0; b < 256; b++)
        CHECK_INT(n_bytes[b], 1);
}

static void bad_utf8_is_refused(void)
{
    static const struct {
        const char *text;
        size_t n, offset;
    } bad[] = {
        {"ab\xff", 3, 2},           {"ab\xc0\x80", 4, 2},       {"\xed\xa0\x80", 3, 0},
        {"\xf4\x90\x80\x80", 4, 0}, {"x\xe4\xbd", 3, 1},        {"\xe0\x9f\xbf", 3, 0},
        {"0123456789\x80", 11, 10}, {"\xf0\x8f\xbf\xbf", 4, 0},
    };
    for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
        CHECK_INT(utf8_check(bad[i].text, bad[i].n), bad[i].offset);
        struct ids ids = {0};
        CHECK_INT(tokenizer_encode(demo, bad[i].text, bad[i].n, true, &ids), ERR_INVALID);
        CHECK_INT(ids.len, 0);
        char where[32];
        snprintf(where, sizeof(where), "byte %zu", bad[i].offset);
        CHECK(strstr(err_text(ERR_INVALID), where) != NULL);
        ids_finish(&ids);
    }
    static const char good[] =
        "a\xc2\x80\xdf\xbf\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80\xf0\x90\x80\x80"
        "\xf4\x8f\xbf\xbf and more ascii";
    CHECK_INT(utf8_check(good, sizeof(good) - 1), sizeof(good) - 1);
    struct ids ids = {0};
    CHECK_OK(tokenizer_encode(demo, "a\0b", 3, true, &ids)); /* a NUL is a byte like any other */
    CHECK_INT(ids.len, 3);
    ids_finish(&ids);
}

/* U+180E is no white space in Unicode (PCRE2 alone thinks so): one piece, and no back-off. */
static void white_space_is_unicodes(void)
{
    json_t *root = demo_json();
    json_object_set_new(at(root, "model", NULL), "ignore_merges", json_true());
    /* spelled in the byte-level alphabet: e1 a0 8e is U+180E, e2 80 af is U+202F */
    json_object_set_new(at(root, "model", "vocab"), "\xc3\xa1\xc5\x82\xc4\xb0!",
                        json_integer(7000));
    json_object_set_new(at(root, "model", "vocab"), "\xc3\xa2\xc4\xa2\xc2\xaf!",
                        json_integer(7001));
    struct tokenizer *t = NULL;
    CHECK_OK(load_changed(root, &t));
    REQUIRE(t != NULL);
    check_ids(t, "\xe1\xa0\x8e!", false, IDS(7000));
    struct ids ids = {0};
    CHECK_OK(tokenizer_encode(t, "\xe2\x80\xaf!", 4, false, &ids));
    CHECK(ids.len > 1); /* a space and the mark are two pieces */
    ids_finish(&ids);
    tokenizer_destroy(t);
}

/* ---- refusals ---- */

static void check_refused(json_t *root, const char *field)
{
    struct tokenizer *t = NULL;
    enum err e = load_changed(root, &t);
    CHECK_INT(e, ERR_BAD_MODEL);
    CHECK(t == NULL);
    tokenizer_destroy(t);
    if (e != ERR_BAD_MODEL || !strstr(err_text(e), field) || !strstr(err_text(e), temp_path)) {
        fprintf(stderr, "\"%s\" does not name %s\n", err_text(e), field);
        CHECK(false);
    }
}

/* Sets (or with NULL removes) parent[key] in a fresh copy of the file. */
static void refuse_with(const char *parent, const char *child, const char *key, const char *json,
                        const char *field)
{
    json_t *root = demo_json();
    json_t *object = parent ? at(root, parent, child) : root;
    REQUIRE(json_is_object(object));
    if (json)
        json_object_set_new(object, key, json_loads(json, JSON_DECODE_ANY, NULL));
    else
        json_object_del(object, key);
    check_refused(root, field);
}

static void refuse_pre(int step, const char *key, const char *json, const char *field)
{
    json_t *root = demo_json();
    json_t *object = json_array_get(at(root, "pre_tokenizer", "pretokenizers"), (size_t)step);
    REQUIRE(json_is_object(object));
    json_object_set_new(object, key, json_loads(json, JSON_DECODE_ANY, NULL));
    check_refused(root, field);
}

static void refuse_added(const char *json, const char *field)
{
    json_t *root = demo_json();
    json_array_append_new(at(root, "added_tokens", NULL), json_loads(json, JSON_DECODE_ANY, NULL));
    check_refused(root, field);
}

static void unsupported_files_are_refused(void)
{
    refuse_with(NULL, NULL, "model", NULL, "model");
    refuse_with(NULL, NULL, "model", "[]", "model");
    refuse_with(NULL, NULL, "added_tokens", "{}", "added_tokens");
    refuse_with(NULL, NULL, "normalizer", "{\"type\":\"NFC\"}", "normalizer");
    refuse_with(NULL, NULL, "decoder", "{\"type\":\"WordPiece\"}", "decoder.type");
    refuse_with(NULL, NULL, "pre_tokenizer", "null", "pre_tokenizer");
    refuse_with("model", NULL, "vocab", NULL, "model.vocab");
    refuse_with("model", NULL, "vocab", "{}", "model.vocab");
    refuse_with("model", NULL, "merges", "\"a b\"", "model.merges");
    refuse_with("model", NULL, "merges", "[[\"a\"]]", "model.merges[0]");
    refuse_with("model", NULL, "merges", "[[\"a\",\"b\"],\"ab\"]", "model.merges[");
    refuse_with("model", NULL, "merges", "[\"a b c\"]", "model.merges[0]");
    refuse_with("model", NULL, "merges", "[\"a \"]", "model.merges[0]");
    refuse_with("model", NULL, "merges", "[5]", "model.merges[0]");
    refuse_with("model", NULL, "merges", "[[\"q\",\"zzqzzq\"]]", "model.merges[0]");
    refuse_with("model", NULL, "merges", "[[\"\xe5\x8c\x97\",\"b\"]]", "model.merges[0]");
    refuse_with("model", NULL, "type", "\"Unigram\"", "model.type");
    refuse_with("model", NULL, "dropout", "0.1", "model.dropout");
    refuse_with("model", NULL, "byte_fallback", "true", "model.byte_fallback");
    refuse_with("model", NULL, "ignore_merges", "1", "model.ignore_merges");
    refuse_with("model", NULL, "end_of_word_suffix", "\"</w>\"", "model.end_of_word_suffix");
    refuse_with("model", "vocab", "a", NULL, "byte 0x61");
    refuse_with("model", "vocab", "", "9999", "model.vocab");
    refuse_with("model", "vocab", "new", "40", "id 40");
    refuse_with("model", "vocab", "new", "-1", "\"new\"");
    refuse_with("model", "vocab", "new", "4000000000", "\"new\"");
    refuse_with("model", "vocab", "new", "1.5", "\"new\"");
    refuse_with("model", "vocab", "new", "\"1\"", "\"new\"");

    refuse_pre(0, "type", "\"Digits\"", "pretokenizers[0].type");
    refuse_pre(0, "behavior", "\"Removed\"", "pretokenizers[0].behavior");
    refuse_pre(0, "invert", "true", "pretokenizers[0].invert");
    refuse_pre(0, "pattern", "{\"String\":\" \"}", "pretokenizers[0].pattern.Regex");
    refuse_pre(0, "pattern", "{\"Regex\":\"(unclosed\"}", "pretokenizers[0].pattern.Regex");
    refuse_pre(0, "pattern", "{\"Regex\":\"\\\\C\"}", "pretokenizers[0].pattern.Regex");
    refuse_pre(1, "use_regex", "true", "pretokenizers[1].use_regex");
    refuse_pre(1, "add_prefix_space", "true", "pretokenizers[1].add_prefix_space");

    refuse_added("5", "added_tokens[36].id");
    refuse_added("{\"content\":\"<x>\"}", "added_tokens[36].id");
    refuse_added("{\"id\":8000}", "added_tokens[36].content");
    refuse_added("{\"id\":8000,\"content\":\"\"}", "added_tokens[36].content");
    refuse_added("{\"id\":8000,\"content\":\"<think>\"}", "added_tokens[36]");
    refuse_added("{\"id\":3007,\"content\":\"<x>\"}", "added_tokens[36]");
    refuse_added("{\"id\":40,\"content\":\"<x>\"}", "added_tokens[36].id");
    refuse_added("{\"id\":8000,\"content\":\"I\"}", "added_tokens[36].id");
    refuse_added("{\"id\":8000,\"content\":\"<x>\",\"lstrip\":true}", "added_tokens[36].lstrip");
    refuse_added("{\"id\":8000,\"content\":\"<x>\",\"special\":1}", "added_tokens[36].special");
}

static void damaged_files_are_refused(void)
{
    struct tokenizer *t = NULL;
    CHECK_INT(tokenizer_load("/nonexistent/tokenizer.json", &t), ERR_BAD_MODEL);
    CHECK(strstr(err_text(ERR_BAD_MODEL), "/nonexistent/tokenizer.json") != NULL);
    CHECK(t == NULL);
    CHECK_INT(load_bytes("", 0), ERR_BAD_MODEL);
    CHECK_INT(load_bytes("[]", 2), ERR_BAD_MODEL);
    CHECK_INT(load_bytes("{}", 2), ERR_BAD_MODEL);
    CHECK_INT(load_bytes("{\"model\":{},\"model\":{}}", 23), ERR_BAD_MODEL);

    char *text;
    size_t n;
    CHECK_OK(file_read(demo_path, 64 << 20, &text, &n));
    for (size_t cut = 0; cut + 4096 < n; cut += n / 50)
        CHECK_INT(load_bytes(text, cut), ERR_BAD_MODEL);
    /* any byte may be wrong: load it or refuse it, but live */
    uint64_t seed = 7;
    for (int round = 0; round < 60; round++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        size_t where = (size_t)(seed >> 20) % n;
        char old = text[where];
        text[where] = (char)(seed >> 56);
        enum err e = load_bytes(text, n);
        CHECK(e == ERR_OK || e == ERR_BAD_MODEL);
        text[where] = old;
    }
    free(text);
}

/* ---- hostile texts ---- */

static double cpu_s(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static double encode_s(const char *unit, size_t n_bytes, size_t *ret_tokens)
{
    size_t n_unit = strlen(unit), n = n_bytes / n_unit * n_unit;
    char *text = malloc(n);
    for (size_t i = 0; i < n; i += n_unit)
        memcpy(text + i, unit, n_unit);
    struct ids ids = {0};
    double best = 1e9;
    for (int round = 0; round < 2; round++) {
        ids.len = 0;
        double start = cpu_s();
        CHECK_OK(tokenizer_encode(demo, text, n, true, &ids));
        best = MIN(best, cpu_s() - start);
    }
    size_t n_decoded = 0, n_token = 0;
    for (size_t i = 0; i < ids.len; i++) {
        tokenizer_bytes(demo, ids.data[i], &n_token);
        n_decoded += n_token;
    }
    CHECK_INT(n_decoded, n);
    *ret_tokens = ids.len;
    ids_finish(&ids);
    free(text);
    return best;
}

static const char *const units[] = {
    "a",
    "e",
    " ",
    "\n",
    "\r\n",
    "7",
    "_",
    "😀",
    "\xcc\x81",
    "e\xcc\x81",
    " a",
    "\t \xc2\xa0",
    "<",
    "<|begin_of_transcription|",
    "<think>",
    "'s",
    "北",
    "ab ba",
    "\xe2\x80\xa8",
    "</think",
};

static void *encode_units(void *arg)
{
    (void)arg;
    for (size_t i = 0; i < ARRAY_LEN(units); i++) {
        size_t tokens;
        double small = encode_s(units[i], 256 << 10, &tokens);
        double large = encode_s(units[i], 1 << 20, &tokens);
        if (!(large < 8 * small + 0.05)) {
            fprintf(stderr, "1 MiB of \"%s\": %.3f s, 256 KiB: %.3f s\n", units[i], large, small);
            CHECK(false);
        }
        CHECK(large < 60); /* against a quadratic that starts early, even under sanitizers */
    }
    return NULL;
}

/* Four times the text, at most eight times the time; and a stack of 128 KiB is enough. */
static void time_and_stack_are_bounded(void)
{
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    REQUIRE(pthread_attr_setstacksize(&attr, 128 << 10) == 0);
    pthread_t thread;
    REQUIRE(pthread_create(&thread, &attr, encode_units, NULL) == 0);
    pthread_join(thread, NULL);
    pthread_attr_destroy(&attr);
}

/* A tokenizer is shared by threads. */
static void *encode_goldens(void *arg)
{
    (void)arg;
    struct ids ids = {0};
    for (int i = 0; i < 200 && ids.len < 1 << 20; i++)
        if (tokenizer_encode(demo, "naïve café  <think> 12345", 27, true, &ids) != ERR_OK)
            break;
    uintptr_t len = ids.len;
    ids_finish(&ids);
    return (void *)len;
}

static void threads_share_it(void)
{
    pthread_t threads[4];
    void *len[4];
    for (size_t i = 0; i < ARRAY_LEN(threads); i++)
        REQUIRE(pthread_create(&threads[i], NULL, encode_goldens, NULL) == 0);
    for (size_t i = 0; i < ARRAY_LEN(threads); i++)
        pthread_join(threads[i], &len[i]);
    for (size_t i = 0; i < ARRAY_LEN(threads); i++)
        CHECK(len[i] && len[i] == len[0]);
}

int main(void)
{
    path_from("BATON_DEMO_DIR", "deploy/demo-model", "tokenizer.json", demo_path);
    path_from("BATON_GOLDEN_DIR", "tests/golden", "golden_tokens.json", golden_path);
    int fd = mkstemp(temp_path);
    REQUIRE(fd >= 0);
    close(fd);
    CHECK_OK(tokenizer_load(demo_path, &demo));
    REQUIRE(demo != NULL);
    RUN(goldens);
    RUN(merges_as_strings_and_pairs);
    RUN(ignore_merges);
    RUN(added_tokens);
    RUN(added_tokens_longest_first);
    RUN(tokens_are_bytes);
    RUN(bad_utf8_is_refused);
    RUN(white_space_is_unicodes);
    RUN(unsupported_files_are_refused);
    RUN(damaged_files_are_refused);
    RUN(time_and_stack_are_bounded);
    RUN(threads_share_it);
    tokenizer_destroy(demo);
    unlink(temp_path);
    return check_done();
}
