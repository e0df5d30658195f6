/* call_grammar_test.c: grammars and the output parser agree about tool calls: whatever the masks
 * let through for a function's parameters comes out of the parser as one call whose arguments are
 * valid. */
#include "check.h"
#include "common/grammar/grammar.h"
#include "common/grammar/random_schema.h"
#include "common/grammar/validate.h"
#include "router/text/glm_parser.h"

#define N_SCHEMAS 250
#define N_WALKS   5
#define MAX_STEPS 800

static const int32_t eos[] = {3000, 3007, 3009};
static struct tokenizer *tokenizer;
static struct grammar_vocab *vocab;

struct heard {
    struct json_out name, arguments, other;
    int n_calls, n_ends;
};

static void on_event(void *user, const struct glm_event *e)
{
    struct heard *h = user;
    h->n_calls += e->kind == GLM_EVENT_CALL_START;
    h->n_ends += e->kind == GLM_EVENT_CALL_END;
    struct json_out *to = e->kind == GLM_EVENT_CALL_START  ? &h->name
                          : e->kind == GLM_EVENT_ARGUMENTS ? &h->arguments
                                                           : &h->other;
    json_out_raw(to, e->text, e->n_text);
}

static bool is_eos(int32_t id) { return id == eos[0] || id == eos[1] || id == eos[2]; }

/* What closes something: ends, closing tags, quotes and brackets. */
static bool closes(int32_t id)
{
    size_t n = 0;
    const char *bytes = tokenizer_bytes(tokenizer, id, &n);
    return is_eos(id) || (n > 1 && bytes[0] == '<' && bytes[1] == '/') ||
           (n > 0 && strchr("\"]}", bytes[0]) != NULL);
}

static bool walk(struct matcher *m, struct ids *out)
{
    struct grammar_state s = matcher_start(m);
    static int32_t allowed[4000], ends[4000];
    for (int step = 0; step < MAX_STEPS; step++) {
        const uint32_t *mask;
        uint32_t n = 0, n_ends = 0;
        bool fits;
        CHECK_OK(matcher_mask(m, s, &mask));
        for (int32_t id = 0; id < tokenizer_n_ids(tokenizer); id++) {
            if (!(mask[id / 32] >> id % 32 & 1))
                continue;
            allowed[n++] = id;
            if (closes(id))
                ends[n_ends++] = id;
        }
        REQUIRE(n > 0);
        int32_t id = n_ends && draw(3) == 0 ? ends[draw(n_ends)] : allowed[draw(n)];
        CHECK_OK(matcher_accept(m, &s, id, &fits));
        CHECK(fits);
        if (is_eos(id))
            return true;
        CHECK_OK(ids_push(out, id));
    }
    return false;
}

static void listen(const struct ids *ids, const json_t *tools, struct heard *h)
{
    struct glm_parser p;
    struct glm_options options = {.tokenizer = tokenizer, .calls = true, .tools = tools};
    struct json_out text = {0};
    struct detokenizer d;
    detokenizer_init(&d, tokenizer, false);
    for (size_t i = 0; i < ids->len; i++)
        detokenizer_push(&d, ids->data[i], &text);
    detokenizer_flush(&d, &text);
    glm_parser_init(&p, &options, on_event, h);
    glm_parser_push(&p, ids->data, ids->len, text.data, text.len);
    glm_parser_end(&p, true);
    glm_parser_finish(&p);
    json_out_finish(&text);
}

static void check_walk(const json_t *tools, const json_t *schema, struct matcher *m,
                       int *n_complete)
{
    struct ids ids = {0};
    struct heard h = {0};
    if (walk(m, &ids)) {
        (*n_complete)++;
        listen(&ids, tools, &h);
        json_t *v = json_loadb(h.arguments.data ? h.arguments.data : "", h.arguments.len,
                               JSON_REJECT_DUPLICATES, NULL);
        bool ok =
            h.n_calls == 1 && h.n_ends == 1 && h.other.len == 0 && v && valid(schema, schema, v);
        CHECK(ok);
        if (!ok) {
            char *text = json_dumps(schema, JSON_COMPACT);
            fprintf(stderr, "  %s\n  %.*s\n", text, (int)h.arguments.len, h.arguments.data);
            free(text);
        }
        json_decref(v);
    }
    json_out_finish(&h.name);
    json_out_finish(&h.arguments);
    json_out_finish(&h.other);
    ids_finish(&ids);
}

static void arguments_are_valid(void)
{
    int n_compiled = 0, n_complete = 0;
    for (int i = 0; i < N_SCHEMAS; i++) {
        json_t *schema = json_pack("{s:s}", "type", "object");
        random_object(schema, 3);
        json_object_set_new(schema, "$defs", json_pack("{s:o}", "d", random_schema(1)));
        json_t *tools = json_pack("[{s:s,s:{s:s,s:O}}]", "type", "function", "function", "name",
                                  "f", "parameters", schema);
        json_t *spec = json_pack("{s:b,s:[{s:s,s:O}]}", "one_call", 1, "tools", "name", "f",
                                 "parameters", schema);
        char *text = json_dumps(spec, JSON_COMPACT);
        OWNED(grammar) g = NULL;
        OWNED(matcher) m = NULL;
        if (grammar_compile(text, strlen(text), &g) == ERR_OK) {
            n_compiled++;
            CHECK_OK(matcher_create(g, vocab, &m));
            for (int k = 0; k < N_WALKS; k++)
                check_walk(tools, schema, m, &n_complete);
        }
        free(text);
        json_decref(spec);
        json_decref(tools);
        json_decref(schema);
    }
    printf("%d schemas, %d calls\n", n_compiled, n_complete);
    CHECK(n_compiled > N_SCHEMAS / 2 && n_complete > n_compiled);
}

int main(void)
{
    char path[4096];
    snprintf(path, sizeof(path), "%s/tokenizer.json", getenv("BATON_DEMO_DIR"));
    CHECK_OK(tokenizer_load(path, &tokenizer));
    CHECK_OK(grammar_vocab_load(path, 3072, eos, 3, &vocab));
    REQUIRE(tokenizer && vocab);
    RUN(arguments_are_valid);
    grammar_vocab_destroy(vocab);
    tokenizer_destroy(tokenizer);
    return check_done();
}
