/* grammar_bench: what holding outputs to grammars costs a decode step of 64 streams.
 *
 *   grammar_bench [tokenizer.json eos-id]
 *
 * Each stream walks at random through what its masks allow, so states are as varied as answers get.
 * A step is 64 masks and 64 accepts. "shared": all streams have the same schema, as a service has;
 * "own": every stream has a schema that nobody had before, so every mask is new.
 * Without a file the vocabulary is made up: 151,552 tokens, pieces of words, numbers, JSON and
 * UTF-8.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/base/json.h"
#include "common/grammar/constraint.h"

#define N_IDS   151552
#define STREAMS 64
#define STEPS   200

static uint64_t seed = 1;
static int32_t eos = N_IDS - 1;

static uint32_t draw(uint32_t n) /* splitmix64 */
{
    uint64_t z = seed += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ z >> 31) % n);
}

/* CPU time, so that a busy machine changes little. */
static uint64_t cpu_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

/* A token like those of a byte-level vocabulary: mostly words, some with a space in front, some
 * Chinese, some punctuation and code. */
static void make_token(struct json_out *o)
{
    static const char *const code[] = {"\"", "\":", "\",", "{\"", "\"}", "],", "\\n", "\n",
                                       "  ", "()",  "'",   "\"]", "0",   "12", ".5",  "-"};
    uint32_t kind = draw(10);
    if (kind == 0) {
        for (uint32_t i = 1 + draw(3); i > 0; i--)
            json_out_fmt(o, "%s", code[draw(16)]);
    } else if (kind < 3) {
        for (uint32_t i = 1 + draw(3); i > 0; i--)
            json_out_fmt(o, "%c%c%c", 0xe4 + (int)draw(5), 0x80 + (int)draw(64),
                         0x80 + (int)draw(64));
    } else {
        json_out_fmt(o, "%s", draw(2) ? " " : "");
        for (uint32_t i = 2 + draw(8); i > 0; i--)
            json_out_fmt(o, "%c", 'a' + (int)draw(26));
        if (draw(12) == 0)
            json_out_fmt(o, "%s", code[draw(16)]);
    }
}

static enum err made_up(struct grammar_vocab **ret)
{
    static struct grammar_token tokens[N_IDS];
    static struct json_out texts[N_IDS];
    for (int id = 0; id < N_IDS; id++) {
        if (id < 256)
            json_out_raw(&texts[id], (const char[]){(char)id}, 1);
        else
            make_token(&texts[id]);
        tokens[id] = (struct grammar_token){.bytes = texts[id].data, .n = texts[id].len};
    }
    uint64_t start = cpu_us();
    enum err err = grammar_vocab_create(tokens, N_IDS, N_IDS, &eos, 1, ret);
    printf("vocabulary of %d: %.0f ms\n", N_IDS, (double)(cpu_us() - start) / 1000);
    for (int id = 0; id < N_IDS; id++)
        json_out_finish(&texts[id]);
    return err;
}

static const struct {
    const char *name, *schema;
} schemas[] = {
    {"person", "{\"type\":\"object\",\"properties\":{\"name\":{\"type\":\"string\"},\"age\":{"
               "\"type\":\"integer\",\"minimum\":0,\"maximum\":150},"
               "\"email\":{\"type\":[\"string\",\"null\"]},\"tags\":{\"type\":\"array\",\"items\":{"
               "\"enum\":[\"red\",\"green\",\"blue\"]}}},"
               "\"required\":[\"name\",\"age\"],\"additionalProperties\":false}"},
    {"bounded strings",
     "{\"type\":\"array\",\"items\":{\"type\":\"object\",\"properties\":{\"title\":{\"type\":"
     "\"string\",\"maxLength\":80},"
     "\"date\":{\"type\":\"string\",\"format\":\"date\"}},\"required\":[\"title\",\"date\"]}}"},
    {"recursive",
     "{\"$ref\":\"#/$defs/"
     "n\",\"$defs\":{\"n\":{\"type\":\"object\",\"properties\":{\"v\":{\"type\":\"string\"},"
     "\"c\":{\"type\":\"array\",\"items\":{\"$ref\":\"#/$defs/"
     "n\"}}},\"required\":[\"v\",\"c\"]}}}"},
    {"any object", "{\"type\":\"object\"}"},
};

struct walker {
    struct matcher *m;
    struct grammar_state s;
};

/* A random id of the mask, of those up from a random one. */
static int32_t pick(const uint32_t *mask)
{
    uint32_t n_words = (N_IDS + 31) / 32, word = draw(draw(4) ? 8 : n_words);
    while (!mask[word % n_words])
        word++;
    return (int32_t)(word % n_words * 32 + (uint32_t)__builtin_ctz(mask[word % n_words]));
}

static enum err step(struct walker *w, int n, uint64_t *us)
{
    const uint32_t *mask[STREAMS];
    uint64_t start = cpu_us();
    for (int i = 0; i < n; i++)
        TRY(matcher_mask(w[i].m, w[i].s, &mask[i]));
    *us = cpu_us() - start;
    for (int i = 0; i < n; i++) {
        int32_t id = pick(mask[i]);
        bool fits;
        start = cpu_us();
        TRY(matcher_accept(w[i].m, &w[i].s, id, &fits));
        *us += cpu_us() - start;
        if (id == eos)
            w[i].s = matcher_start(w[i].m);
    }
    return ERR_OK;
}

static enum err bench(const struct grammar_vocab *v, const char *name, const char *schema,
                      bool shared)
{
    struct json_out spec = {0};
    struct grammar *g = NULL;
    struct walker w[STREAMS];
    json_out_fmt(&spec, "{\"schema\":%s}", schema);
    uint64_t start = cpu_us(), us, total = 0, most = 0;
    TRY(grammar_compile(spec.data, spec.len, &g));
    uint64_t compile_us = cpu_us() - start;
    for (int i = 0; i < STREAMS; i++) {
        if (i == 0 || !shared)
            TRY(matcher_create(g, v, &w[i].m));
        else
            w[i].m = w[0].m;
        w[i].s = matcher_start(w[i].m);
    }
    for (int k = 0; k < STEPS; k++) {
        TRY(step(w, STREAMS, &us));
        total += us;
        most = MAX(most, us);
    }
    size_t bytes = 0;
    for (int i = 0; i < (shared ? 1 : STREAMS); i++) {
        bytes += matcher_bytes(w[i].m);
        matcher_destroy(w[i].m);
    }
    printf("%-16s %-7s compile %5.2f ms  step mean %7.3f ms  worst %7.3f ms  %6.1f MiB\n", name,
           shared ? "shared" : "own", (double)compile_us / 1000, (double)total / STEPS / 1000,
           (double)most / 1000, (double)bytes / (1 << 20));
    grammar_destroy(g);
    json_out_finish(&spec);
    return ERR_OK;
}

static enum err run(const char *path)
{
    OWNED(grammar_vocab) v = NULL;
    if (path)
        TRY(grammar_vocab_load(path, N_IDS, &eos, 1, &v));
    else
        TRY(made_up(&v));
    for (size_t i = 0; i < ARRAY_LEN(schemas); i++) {
        TRY(bench(v, schemas[i].name, schemas[i].schema, true));
        TRY(bench(v, schemas[i].name, schemas[i].schema, false));
    }
    return ERR_OK;
}

int main(int argc, char **argv)
{
    if (argc == 2 || argc > 3) {
        fprintf(stderr, "usage: grammar_bench [tokenizer.json eos-id]\n");
        return 2;
    }
    if (argc == 3)
        eos = (int32_t)atoi(argv[2]); // without its id a walk has no end
    enum err err = run(argc > 1 ? argv[1] : NULL);
    if (err != ERR_OK)
        fprintf(stderr, "%s\n", err_text(err));
    return err != ERR_OK;
}
