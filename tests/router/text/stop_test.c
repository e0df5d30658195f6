/* stop_test.c: the streaming search against a search over the whole text, cut in every way. */
#include "router/text/stop.h"

#include <string.h>

#include "check.h"
#include "common/base/own.h"

static uint64_t seed = 1729;

static uint32_t random_below(uint32_t n)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33) % n;
}

struct stops {
    const char *strings[STOP_MAX_STRINGS];
    size_t lens[STOP_MAX_STRINGS];
    size_t n;
};

/* Earliest position, then longest, then first in the list. Returns -1 without a match. */
static int search(const struct stops *s, const char *text, size_t n, size_t *ret_start)
{
    for (size_t at = 0; at < n; at++) {
        int which = -1;
        for (size_t i = 0; i < s->n; i++)
            if (s->lens[i] <= n - at && !memcmp(text + at, s->strings[i], s->lens[i]) &&
                (which < 0 || s->lens[i] > s->lens[which]))
                which = (int)i;
        if (which >= 0) {
            *ret_start = at;
            return which;
        }
    }
    *ret_start = n;
    return -1;
}

/* Bytes at the end of text that some stop string begins with. */
static size_t undecided(const struct stops *s, const char *text, size_t n)
{
    size_t most = 0;
    for (size_t i = 0; i < s->n; i++)
        for (size_t k = 1; k < s->lens[i] && k <= n; k++)
            if (!memcmp(text + n - k, s->strings[i], k))
                most = MAX(most, k);
    return most;
}

/* cuts: bit i set means a cut after byte i. Returns false, having said why, if anything is wrong.
 */
static bool run_case(const struct stops *s, const char *text, size_t n, uint64_t cuts)
{
    struct stop *stop = NULL;
    if (stop_create(s->strings, s->lens, s->n, &stop) != ERR_OK)
        return false;
    size_t want_n;
    int want = search(s, text, n, &want_n), got = -1;
    struct json_out out = {0};
    bool ok = true, matched = false;
    for (size_t start = 0; start < n;) {
        size_t end = start + 1;
        while (end < n && !(cuts >> (end - 1) & 1))
            end++;
        int which = -1;
        bool now = stop_push(stop, text + start, end - start, &out, &which);
        ok &= !matched || now; /* once matched, always matched */
        if (now && !matched)
            got = which;
        matched = now;
        size_t match_start;
        int so_far = search(s, text, end, &match_start);
        if (!matched && so_far < 0) /* held back only what has to be */
            ok &= out.len == end - undecided(s, text, end);
        ok &= out.len <= match_start;
        start = end;
    }
    int at_end = stop_flush(stop, &out);
    if (!matched)
        got = at_end;
    ok &= at_end == got && got == want && out.len == want_n &&
          (want_n == 0 || !memcmp(out.data, text, want_n));
    if (!ok) {
        fprintf(stderr, "text \"%.*s\" cuts %llx: got %d after \"%.*s\", want %d after %zu; stops",
                (int)n, text, (unsigned long long)cuts, got, (int)out.len, out.data ? out.data : "",
                want, want_n);
        for (size_t i = 0; i < s->n; i++)
            fprintf(stderr, " \"%.*s\"", (int)s->lens[i], s->strings[i]);
        fprintf(stderr, "\n");
    }
    json_out_finish(&out);
    stop_destroy(stop);
    return ok;
}

static struct stops random_stops(char store[][8], uint32_t max_n, uint32_t max_len,
                                 uint32_t letters)
{
    struct stops s = {.n = 1 + random_below(max_n)};
    for (size_t i = 0; i < s.n; i++) {
        s.lens[i] = 1 + random_below(max_len);
        for (size_t k = 0; k < s.lens[i]; k++)
            store[i][k] = (char)('a' + random_below(letters));
        s.strings[i] = store[i];
    }
    return s;
}

static void short_texts_in_every_split(void)
{
    char store[4][8], text[8];
    int wrong = 0;
    for (int round = 0; round < 20000 && wrong < 5; round++) {
        struct stops s = random_stops(store, 4, 4, 2 + round % 2);
        size_t n = 1 + random_below(8);
        for (size_t i = 0; i < n; i++)
            text[i] = (char)('a' + random_below(2 + (uint32_t)round % 2));
        for (uint64_t cuts = 0; cuts < 1ull << (n - 1); cuts++)
            wrong += !run_case(&s, text, n, cuts);
    }
    CHECK_INT(wrong, 0);
}

static void longer_texts_in_random_splits(void)
{
    char store[STOP_MAX_STRINGS][8], text[48];
    int wrong = 0;
    for (int round = 0; round < 120000 && wrong < 5; round++) {
        struct stops s =
            random_stops(store, round % 16 ? 4 : STOP_MAX_STRINGS, 8, 2 + (uint32_t)round % 3);
        size_t n = 1 + random_below(48);
        for (size_t i = 0; i < n; i++)
            text[i] = (char)('a' + random_below(2 + (uint32_t)round % 3));
        uint64_t cuts = (uint64_t)random_below(1u << 31) << 20 ^ random_below(1u << 31);
        if (round % 3 == 0)
            cuts &= cuts >> 3;
        wrong += !run_case(&s, text, n, cuts);
    }
    CHECK_INT(wrong, 0);
}

static void check_text(const char *const *chunks, size_t n, const char *const *strings,
                       size_t n_strings, const char *want, int want_which)
{
    struct stops s = {.n = n_strings};
    for (size_t i = 0; i < n_strings; i++) {
        s.strings[i] = strings[i];
        s.lens[i] = strlen(strings[i]);
    }
    struct stop *stop = NULL;
    CHECK_OK(stop_create(s.strings, s.lens, s.n, &stop));
    struct json_out out = {0};
    int which = -1;
    bool matched = false;
    for (size_t i = 0; i < n; i++)
        matched = stop_push(stop, chunks[i], strlen(chunks[i]), &out, &which);
    int at_end = stop_flush(stop, &out);
    CHECK_INT(matched ? which : at_end, want_which);
    json_out_raw(&out, "", 1);
    CHECK_STR(out.data, want);
    json_out_finish(&out);
    stop_destroy(stop);
}
#define TEXT(...)                                                                                  \
    (const char *const[]){__VA_ARGS__}, ARRAY_LEN(((const char *const[]){__VA_ARGS__}))
#define STRINGS(...) TEXT(__VA_ARGS__)

static void known_cases(void)
{
    check_text(TEXT("Hello", " wor", "ld END more"), STRINGS("END"), "Hello world ", 0);
    check_text(TEXT("a</thi", "nk", "er"), STRINGS("</think>"), "a</thinker", -1);
    check_text(TEXT("x", "ab", "y"), STRINGS("b", "abc"), "xa", 0);
    check_text(TEXT("x", "ab", "c"), STRINGS("b", "abc"), "x", 1);
    check_text(TEXT("x", "ab"), STRINGS("b", "abc"), "xa", 0); /* decided by the end */
    check_text(TEXT("one\n", "\n"), STRINGS("\n", "\n\n"), "one", 1);
    check_text(TEXT("one\n", "two"), STRINGS("\n", "\n\n"), "one", 0);
    check_text(TEXT("aa", "a", "ab"), STRINGS("aab"), "aa", 0);
    check_text(TEXT("北", "京你", "好"), STRINGS("你好"), "北京", 0);
    check_text(TEXT("same"), STRINGS("e", "e"), "sam", 0);
}

static void nothing_to_stop_at(void)
{
    struct stop *stop = NULL;
    CHECK_OK(stop_create(NULL, NULL, 0, &stop));
    struct json_out out = {0};
    int which;
    CHECK(!stop_push(stop, "text", 4, &out, &which));
    CHECK_INT(out.len, 4);
    CHECK_INT(stop_flush(stop, &out), -1);
    json_out_finish(&out);
    stop_destroy(stop);
}

static void limits(void)
{
    static char long_string[STOP_MAX_BYTES + 1];
    memset(long_string, 'x', sizeof(long_string));
    const char *strings[STOP_MAX_STRINGS + 1];
    size_t lens[STOP_MAX_STRINGS + 1];
    for (size_t i = 0; i < ARRAY_LEN(lens); i++) {
        strings[i] = long_string;
        lens[i] = STOP_MAX_BYTES;
    }
    struct stop *stop = NULL;
    CHECK_INT(stop_create(strings, lens, STOP_MAX_STRINGS + 1, &stop), ERR_INVALID);
    lens[1] = 0;
    CHECK_INT(stop_create(strings, lens, 2, &stop), ERR_INVALID);
    lens[1] = STOP_MAX_BYTES + 1;
    CHECK_INT(stop_create(strings, lens, 2, &stop), ERR_INVALID);
    CHECK(stop == NULL);

    /* the longest string, one byte at a time: all of it is held, then matched */
    CHECK_OK(stop_create(strings, lens, 1, &stop));
    struct json_out out = {0};
    int which = -1;
    CHECK(!stop_push(stop, "y", 1, &out, &which));
    for (size_t i = 0; i + 1 < STOP_MAX_BYTES; i++)
        CHECK(!stop_push(stop, "x", 1, &out, &which));
    CHECK(stop_push(stop, "x", 1, &out, &which));
    CHECK_INT(which, 0);
    CHECK_INT(out.len, 1);
    CHECK(stop_push(stop, "more", 4, &out, &which));
    CHECK_INT(out.len, 1);
    json_out_finish(&out);
    stop_destroy(stop);
    stop_destroy(NULL);
}

int main(void)
{
    RUN(short_texts_in_every_split);
    RUN(longer_texts_in_random_splits);
    RUN(known_cases);
    RUN(nothing_to_stop_at);
    RUN(limits);
    return check_done();
}
