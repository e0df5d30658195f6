/* detokenizer_test.c: whatever the order of tokens, what comes out is UTF-8 and nothing is lost. */
#include "router/text/detokenizer.h"

#include "check.h"

static struct tokenizer *tokenizer;
static uint64_t seed = 20240229;

static uint32_t random_below(uint32_t n)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33) % n;
}

/* The definition, all bytes at hand: a maximal subpart that is no character becomes U+FFFD. */
static void decode_whole(const uint8_t *p, size_t n, struct json_out *out)
{
    for (size_t i = 0; i < n;) {
        size_t best = 0, longest_start = 1;
        for (size_t k = 1; k <= 4 && i + k <= n; k++) {
            if (utf8_check((const char *)p + i, k) == k) {
                best = k;
                break;
            }
            /* does some continuation make these k bytes a character? */
            bool begins = false;
            for (int a = 0x80; a < 0xc0 && !begins && k < 4; a++) {
                char full[4];
                memcpy(full, p + i, k);
                size_t need = p[i] >= 0xf0 ? 4 : p[i] >= 0xe0 ? 3 : 2;
                if (k >= need)
                    break;
                memset(full + k, 0x80, 4 - k);
                full[k] = (char)a;
                begins = utf8_check(full, need) == need;
            }
            if (!begins)
                break;
            longest_start = k;
        }
        if (best)
            json_out_raw(out, (const char *)p + i, best);
        else
            json_out_raw(out, "\xef\xbf\xbd", 3);
        i += best ? best : longest_start;
    }
}

static void check_sequence(const int32_t *ids, size_t n, bool skip_special)
{
    struct json_out bytes = {0}, want = {0}, got = {0};
    struct detokenizer d;
    detokenizer_init(&d, tokenizer, skip_special);
    bool valid = true;
    for (size_t i = 0; i < n; i++) {
        size_t n_token = 0;
        const char *token = tokenizer_bytes(tokenizer, ids[i], &n_token);
        if (token && !(skip_special && tokenizer_is_special(tokenizer, ids[i])))
            json_out_raw(&bytes, token, n_token);
        size_t before = got.len;
        detokenizer_push(&d, ids[i], &got);
        if (got.len > before)
            valid &= utf8_check(got.data + before, got.len - before) == got.len - before;
        valid &= d.n_tail <= 3;
    }
    detokenizer_flush(&d, &got);
    decode_whole((const uint8_t *)bytes.data, bytes.len, &want);
    CHECK(valid);
    CHECK_INT(got.len, want.len);
    CHECK(got.len == want.len && (got.len == 0 || !memcmp(got.data, want.data, got.len)));
    json_out_finish(&bytes);
    json_out_finish(&want);
    json_out_finish(&got);
}

static void every_token_alone(void)
{
    for (int32_t id = 0; id < tokenizer_n_ids(tokenizer); id++)
        check_sequence(&id, 1, false);
}

static void random_sequences(void)
{
    uint32_t n_ids = (uint32_t)tokenizer_n_ids(tokenizer);
    int32_t ids[64];
    for (int round = 0; round < 4000; round++) {
        size_t n = 1 + random_below(64);
        for (size_t i = 0; i < n; i++)
            ids[i] = (int32_t)random_below(n_ids + 2) - 1; /* some ids do not exist */
        check_sequence(ids, n, round % 2);
    }
}

/* Single-byte tokens only: mostly broken characters. */
static void random_bytes(void)
{
    static const uint8_t pool[] = {0x00, 0x41, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc2,
                                   0xdf, 0xe0, 0xe1, 0xed, 0xef, 0xf0, 0xf1, 0xf4, 0xf5, 0xff};
    int32_t of_byte[256];
    memset(of_byte, 0xff, sizeof(of_byte));
    for (int32_t id = 0; id < tokenizer_n_ids(tokenizer); id++) {
        size_t n;
        const char *bytes = tokenizer_bytes(tokenizer, id, &n);
        if (bytes && n == 1)
            of_byte[(uint8_t)bytes[0]] = id;
    }
    int32_t ids[24];
    for (int round = 0; round < 20000; round++) {
        size_t n = 1 + random_below(24);
        for (size_t i = 0; i < n; i++)
            ids[i] = of_byte[pool[random_below(ARRAY_LEN(pool))]];
        check_sequence(ids, n, false);
    }
}

static void text_comes_back(void)
{
    static const char text[] = "naïve 北京 👩‍👩‍👧 \xef\xbf\xbd e\xcc\x81 <think>x";
    struct ids ids = {0};
    CHECK_OK(tokenizer_encode(tokenizer, text, sizeof(text) - 1, true, &ids));
    struct detokenizer d;
    struct json_out out = {0};
    detokenizer_init(&d, tokenizer, true);
    for (size_t i = 0; i < ids.len; i++)
        detokenizer_push(&d, ids.data[i], &out);
    json_out_raw(&out, "", 1);
    CHECK_STR(out.data, text);
    json_out_finish(&out);
    ids_finish(&ids);
}

static void special_tokens_are_left_out(void)
{
    const int32_t ids[] = {tokenizer_added_id(tokenizer, "<|user|>"),
                           tokenizer_added_id(tokenizer, "</think>")};
    struct detokenizer d;
    struct json_out out = {0};
    detokenizer_init(&d, tokenizer, true);
    detokenizer_push(&d, ids[0], &out);
    detokenizer_push(&d, ids[1], &out);
    json_out_raw(&out, "", 1);
    CHECK_STR(out.data, "</think>");
    out.len = 0;
    detokenizer_init(&d, tokenizer, false);
    detokenizer_push(&d, ids[0], &out);
    json_out_raw(&out, "", 1);
    CHECK_STR(out.data, "<|user|>");
    json_out_finish(&out);
}

static void output_ends_inside_a_character(void)
{
    struct ids ids = {0};
    CHECK_OK(tokenizer_encode(tokenizer, "\xf0\x90\x8d\x88", 4, false, &ids));
    REQUIRE(ids.len > 1); /* the demo vocabulary has no Gothic letters */
    struct detokenizer d;
    struct json_out out = {0};
    detokenizer_init(&d, tokenizer, true);
    detokenizer_push(&d, ids.data[0], &out);
    CHECK_INT(out.len, 0);
    detokenizer_flush(&d, &out);
    detokenizer_flush(&d, &out);
    json_out_raw(&out, "", 1);
    CHECK_STR(out.data, "\xef\xbf\xbd");
    json_out_finish(&out);
    ids_finish(&ids);
}

int main(void)
{
    const char *dir = getenv("BATON_DEMO_DIR");
    char path[4096];
    snprintf(path, sizeof(path), "%s/tokenizer.json", dir ? dir : "deploy/demo-model");
    CHECK_OK(tokenizer_load(path, &tokenizer));
    REQUIRE(tokenizer != NULL);
    RUN(every_token_alone);
    RUN(random_sequences);
    RUN(random_bytes);
    RUN(text_comes_back);
    RUN(special_tokens_are_left_out);
    RUN(output_ends_inside_a_character);
    tokenizer_destroy(tokenizer);
    return check_done();
}
