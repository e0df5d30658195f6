/* engine_mock_test.c: its costs, its tokens, and that it notices pages and states in wrong places.
 */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "common/base/clock.h"
#include "common/engine/engine.h"
#include "common/engine/mock_costs.h"
#include "common/engine/mock_outputs.h"
#include "scratch.h"

#define N_PAGES 8
#define HIDDEN  16

static const struct model_config model = {.hidden = HIDDEN,
                                          .n_layers = 1,
                                          .n_mtp_layers = 1,
                                          .vocab = 96,
                                          .n_token_ids = 90,
                                          .n_text_ids = 64,
                                          .eos = {70},
                                          .n_eos = 1,
                                          .max_positions = 1024};
static const struct mock_costs no_time = {.decode = {1, {{1, 0}}},
                                          .verify_row = {1, {{1, 0}}},
                                          .draft = {1, {{1, 0}}},
                                          .prefill_tokens_per_s = 1e9};

struct bench {
    struct weights *w;
    struct kv_pool *pool;
    struct engine *engine;
};

static struct bench bench_open(const struct mock_costs *costs, void (*progress)(void *))
{
    struct bench b = {0};
    struct kv_pool_config p = {
        .n_pages = N_PAGES, .n_layers = 2, .kv_width = MOCK_KV_WIDTH, .dtype_bytes = 4};
    struct engine_config c = {.mock = costs,
                              .max_rows = 128,
                              .max_seqs = 4,
                              .max_logits = 8,
                              .max_imports = 2,
                              .max_ctx = 512,
                              .progress = progress};
    CHECK_OK(weights_none(&model, &b.w));
    CHECK_OK(kv_pool_create(&p, &b.pool));
    CHECK_OK(engine_create(&c, b.w, b.pool, &b.engine));
    REQUIRE(b.engine);
    return b;
}

static void bench_close(struct bench *b)
{
    engine_destroy(b->engine);
    kv_pool_destroy(b->pool);
    weights_destroy(b->w);
}

/* n rows of one sequence that end at slot ctx, in two pages; logits of the last one. */
static enum err pass(struct bench *b, int n, int ctx, const int32_t pages[2],
                     const struct hidden_ref *hidden)
{
    int32_t token[128] = {0}, position[128], start[2] = {0, n}, last = n - 1, id;
    for (int i = 0; i < n; i++)
        position[i] = ctx - n + i;
    struct batch batch = {.n_rows = n,
                          .n_seqs = 1,
                          .n_logits = 1,
                          .max_pages = 2,
                          .token = token,
                          .position = position,
                          .seq_start = start,
                          .ctx_len = &ctx,
                          .block_table = pages,
                          .logit_row = &last};
    return hidden ? engine_draft(b->engine, &batch, hidden, &id)
                  : engine_forward(b->engine, &batch);
}

struct other_work {
    int n_calls;
    uint64_t longest_us;
};

/* Takes a third of the time it is given. */
static void meanwhile(void *user, uint64_t wait_us)
{
    struct other_work *o = user;
    o->n_calls++;
    o->longest_us = MAX(o->longest_us, wait_us);
    uint64_t end_us = clock_now_us() + wait_us / 3;
    while (clock_now_us() < end_us)
        ;
}

static void the_thread_is_lent_out_meanwhile(void)
{
    struct mock_costs costs = no_time;
    costs.decode.at[0].ms = 30;
    struct bench b = bench_open(&costs, NULL);
    struct other_work o = {0};
    engine_set_meanwhile(b.engine, meanwhile, &o);
    uint64_t start_us = clock_now_us();
    CHECK_OK(pass(&b, 3, 3, (int32_t[]){0, 1}, NULL));
    CHECK(clock_now_us() - start_us >= 30000);
    CHECK(o.n_calls > 3); // again and again
    CHECK(o.longest_us > 0 && o.longest_us <= 30000);
    bench_close(&b);
}

static void costs_follow_the_table(void)
{
    const struct mock_costs *c = &mock_costs_h100;
    CHECK_NEAR(mock_costs_step_ms(c, 1, 1), 4.5, 1e-9);
    CHECK_NEAR(mock_costs_step_ms(c, 512, 512), 33.5, 1e-9);
    CHECK_NEAR(mock_costs_step_ms(c, 96, 96), (20.5 + 22.9) / 2, 1e-9);
    CHECK_NEAR(mock_costs_step_ms(c, 768, 768), 33.5 + 7.3, 1e-9);
    CHECK_NEAR(mock_costs_step_ms(c, 64, 192) + 2 * mock_costs_draft_ms(c, 64), 25.4, 0.01);
    CHECK_NEAR(mock_costs_step_ms(c, 256, 768) + 2 * mock_costs_draft_ms(c, 256), 34.9, 0.05);
    CHECK(mock_costs_step_ms(c, 512, 513) > mock_costs_step_ms(c, 512, 512));
    CHECK_NEAR(mock_costs_chunk_ms(c, 100), 20, 1e-9);
    CHECK_NEAR(mock_costs_chunk_ms(c, 6600), 100, 1e-9);
}

/* text becomes the content of *ret's file. */
static enum err costs_of(const struct scratch *s, const char *text, struct mock_costs *ret)
{
    scratch_text(s, "costs.json", text);
    return mock_costs_load(scratch_path(s, "costs.json"), ret);
}

static void costs_come_from_a_file(void)
{
    struct scratch s = scratch_open();
    struct mock_costs c;
    CHECK_OK(costs_of(&s, "{\"decode_ms\": [[1, 2], [3, 6]], \"prefill_chunk_ms\": 7}", &c));
    CHECK_NEAR(mock_costs_step_ms(&c, 2, 2), 4, 1e-9);
    CHECK_NEAR(mock_costs_chunk_ms(&c, 1), 7, 1e-9);
    CHECK_NEAR(mock_costs_draft_ms(&c, 512), 1.48, 1e-9);
    static const struct {
        const char *text, *names;
    } bad[] = {
        {"[]", "not an object"},
        {"{\"decode\": []}", "unknown member decode"},
        {"{\"decode_ms\": []}", "decode_ms"},
        {"{\"decode_ms\": 5}", "decode_ms"},
        {"{\"draft_ms\": [[1, 2, 3]]}", "draft_ms[0]"},
        {"{\"draft_ms\": [[1, \"2\"]]}", "draft_ms[0]"},
        {"{\"draft_ms\": [[2, 1], [2, 1]]}", "draft_ms[1]: batch 2 does not ascend"},
        {"{\"draft_ms\": [[1, -1]]}", "draft_ms[0]"},
        {"{\"verify_row_ms\": [[0, 1]]}", "verify_row_ms[0]"},
        {"{\"prefill_tokens_per_s\": 0}", "prefill_tokens_per_s"},
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        char want[128];
        snprintf(want, sizeof(want), "costs.json: %s", bad[i].names);
        CHECK_REFUSED(costs_of(&s, bad[i].text, &c), ERR_INVALID, want);
    }
    scratch_close(&s);
    CHECK_INT(mock_costs_load("/nonexistent.json", &c), ERR_NOT_FOUND);
}

static int32_t drawn(struct bench *b, const struct sample_row *row)
{
    int32_t idx = 0, id = -1, top_id[2];
    float logprob = 1, top[2];
    CHECK_OK(engine_sample(b->engine, 1, &idx, row, 2, &id, &logprob, top_id, top));
    if (row->n_logprobs == 2) {
        CHECK_INT(top_id[0], id);
        CHECK_NEAR(top[0], logprob, 0);
        CHECK(top[1] < top[0] && top_id[1] != id);
    }
    return id;
}

static void tokens_are_a_function_of_seed_and_position(void)
{
    struct bench b = bench_open(&no_time, NULL);
    const int32_t pages[2] = {3, 1};
    CHECK_OK(pass(&b, 1, 1, pages, NULL));
    struct sample_row row = {.seed = 7, .position = 2, .n_logprobs = 2};
    int n_seen = 0;
    bool seen[96] = {false};
    for (row.position = 0; row.position < 1000; row.position++) {
        int32_t id = drawn(&b, &row);
        CHECK_INT(id, mock_token(&model, 7, (uint32_t)row.position));
        REQUIRE(id >= 0 && id < model.n_text_ids);
        n_seen += !seen[id];
        seen[id] = true;
    }
    CHECK_INT(n_seen, model.n_text_ids);
    CHECK_INT(mock_token(&(struct model_config){.n_text_ids = 3000}, 7, 13), 2754);
    CHECK_INT(mock_token(&(struct model_config){.n_text_ids = 151329}, 123456789012345, 70000),
              7711);
    CHECK(mock_token(&model, 7, 1) != mock_token(&model, 8, 1) ||
          mock_token(&model, 7, 2) != mock_token(&model, 8, 2));

    row.position = 5;
    int32_t free_id = drawn(&b, &row);
    row.banned = &free_id;
    row.n_banned = 1;
    CHECK_INT(drawn(&b, &row), free_id + 1);
    uint32_t mask[3] = {0, 0, 1u << (70 - 64) | 1u << (71 - 64)};
    row.allowed = mask;
    CHECK_INT(drawn(&b, &row), 71);
    mask[2] = 1u << (70 - 64); // nothing but the end fits
    CHECK_INT(drawn(&b, &row), 70);
    bench_close(&b);
}

/* What a seed of output `number`, begun at position `first`, draws at a position. */
static int32_t given(struct bench *b, uint64_t number, uint64_t first, int32_t position)
{
    struct sample_row row = {.seed = 77ull << 32 | number << 16 | first, .position = position};
    return drawn(b, &row);
}

static void outputs_are_given(void)
{
    struct scratch s = scratch_open();
    struct mock_costs c;
    char text[4200];
    scratch_text(&s, "outputs.json", "[[5, 70, 6], [], [8]]");
    snprintf(text, sizeof(text), "{\"outputs\": \"%s\"}", scratch_path(&s, "outputs.json"));
    CHECK_OK(costs_of(&s, text, &c));
    struct mock_costs costs = no_time;
    memcpy(costs.outputs, c.outputs, sizeof(costs.outputs));
    struct bench b = bench_open(&costs, NULL);
    const int32_t pages[2] = {3, 1};
    CHECK_OK(pass(&b, 1, 1, pages, NULL));
    CHECK_INT(given(&b, 1, 40, 40), 5);
    CHECK_INT(given(&b, 1, 40, 41), 70); /* the end, where it is given */
    CHECK_INT(given(&b, 1, 40, 42), 6);
    CHECK_INT(given(&b, 3, 0, 0), 8);
    static const struct {
        uint64_t number, first;
        int32_t position;
    } made_up[] = {{1, 40, 39}, {1, 40, 43}, {2, 40, 40}, {3, 0, 1}, {0, 40, 40}, {4, 40, 40}};
    for (size_t i = 0; i < ARRAY_LEN(made_up); i++)
        CHECK_INT(given(&b, made_up[i].number, made_up[i].first, made_up[i].position),
                  mock_token(&model, 77ull << 32 | made_up[i].number << 16 | made_up[i].first,
                             (uint32_t)made_up[i].position));
    uint32_t mask[3] = {1u << 9, 0, 0};
    struct sample_row row = {.seed = 1 << 16 | 40, .position = 40, .allowed = mask};
    CHECK_INT(drawn(&b, &row), 9); /* a grammar's mask is stronger */
    bench_close(&b);

    static const struct {
        const char *text, *names;
    } bad[] = {{"{}", "list of at most"},
               {"[[1], 2]", "output 1 must be a list"},
               {"[[1, 90]]", "output 0: [1] must be a token id, 0 to 89"},
               {"[[-1]]", "output 0: [0]"},
               {"[[1.5]]", "output 0: [0]"}};
    for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
        struct mock_outputs *o = NULL;
        scratch_text(&s, "outputs.json", bad[i].text);
        CHECK_INT(mock_outputs_load(c.outputs, 90, &o), ERR_INVALID);
        CHECK(strstr(err_text(ERR_INVALID), bad[i].names) != NULL);
    }
    CHECK_INT(costs_of(&s, "{\"outputs\": 5}", &c), ERR_INVALID);
    scratch_close(&s);
}

static void pages_in_wrong_places_are_noticed(void)
{
    struct bench b = bench_open(&no_time, NULL);
    const int32_t pages[2] = {3, 1}, swapped[2] = {1, 3}, other[2] = {3, 2};
    CHECK_OK(pass(&b, 70, 70, pages, NULL));
    CHECK_OK(pass(&b, 2, 72, pages, NULL));
    CHECK_OK(pass(&b, 2, 71, pages, NULL)); // a rejected draft's slot is written again
    CHECK_INT(pass(&b, 1, 72, swapped, NULL), ERR_INTERNAL);
    CHECK_INT(pass(&b, 1, 72, other, NULL), ERR_INTERNAL);
    CHECK(strstr(err_text(ERR_INTERNAL), "slot 64") != NULL);
    CHECK_INT(pass(&b, 1, 76, pages, NULL), ERR_INTERNAL);
    CHECK_OK(pass(&b, 1, 72, pages, NULL));
    bench_close(&b);
}

static void hidden_states_belong_to_slots(void)
{
    struct bench b = bench_open(&no_time, NULL);
    const int32_t pages[2] = {0, 1};
    float hidden[HIDDEN];
    struct hidden_ref main_rows[3] = {{HIDDEN_MAIN, 0}, {HIDDEN_MAIN, 1}, {HIDDEN_MAIN, 2}};
    CHECK_OK(pass(&b, 3, 3, pages, NULL));
    CHECK_OK(engine_export_hidden(b.engine, 2, hidden));
    CHECK_OK(pass(&b, 2, 2, pages, main_rows));
    CHECK_OK(engine_import_hidden(b.engine, 1, hidden));
    CHECK_OK(pass(&b, 1, 3, pages, &(struct hidden_ref){HIDDEN_IMPORT, 1}));
    CHECK_OK(pass(&b, 1, 4, pages, &(struct hidden_ref){HIDDEN_DRAFT, 0}));
    CHECK_INT(pass(&b, 1, 4, pages, &(struct hidden_ref){HIDDEN_DRAFT, 0}), ERR_INTERNAL);
    CHECK_INT(pass(&b, 1, 2, pages, &(struct hidden_ref){HIDDEN_IMPORT, 1}), ERR_INTERNAL);
    CHECK_INT(pass(&b, 1, 3, pages, &main_rows[1]), ERR_INTERNAL);
    hidden[HIDDEN - 1] += 1;
    CHECK_INT(engine_import_hidden(b.engine, 1, hidden), ERR_INTERNAL);
    hidden[0] = NAN;
    CHECK_INT(engine_import_hidden(b.engine, 1, hidden), ERR_INTERNAL);
    bench_close(&b);
}

static uint64_t stall_us;

static void stall(void *user)
{
    (void)user;
    for (uint64_t end = clock_now_us() + stall_us; clock_now_us() < end;)
        ;
}

static uint64_t step_us(struct bench *b, int ctx)
{
    const int32_t pages[2] = {0, 1};
    uint64_t start = clock_now_us();
    CHECK_OK(pass(b, 1, ctx, pages, NULL));
    return clock_now_us() - start;
}

static void steps_take_their_time(void)
{
    struct mock_costs costs = no_time;
    costs.decode.at[0].ms = 20;
    struct bench b = bench_open(&costs, stall);
    uint64_t start = clock_now_us();
    stall_us = 0;
    for (int i = 0; i < 5; i++)
        step_us(&b, i + 1);
    CHECK(clock_now_us() - start >= 5 * 20000);
    // A step that overslept makes the next one shorter. A busy machine may hide that often.
    uint64_t shortest = UINT64_MAX;
    for (int i = 0; i < 60 && shortest >= 20000; i++) {
        stall_us = 15000;
        step_us(&b, 6 + 2 * i);
        stall_us = 0;
        shortest = MIN(shortest, step_us(&b, 7 + 2 * i));
    }
    CHECK(shortest < 20000);
    bench_close(&b);
}

static void a_mock_needs_its_own_pages(void)
{
    struct weights *w = NULL;
    struct kv_pool *pool = NULL;
    struct engine *e = NULL;
    struct kv_pool_config p = {.n_pages = 1, .n_layers = 2, .kv_width = KV_WIDTH, .dtype_bytes = 4};
    struct engine_config c = {
        .mock = &no_time, .max_rows = 1, .max_seqs = 1, .max_logits = 1, .max_ctx = 1};
    CHECK_OK(weights_none(&model, &w));
    CHECK_OK(kv_pool_create(&p, &pool));
    CHECK_INT(engine_create(&c, w, pool, &e), ERR_INVALID);
    kv_pool_destroy(pool);
    weights_destroy(w);
}

int main(void)
{
    RUN(costs_follow_the_table);
    RUN(costs_come_from_a_file);
    RUN(tokens_are_a_function_of_seed_and_position);
    RUN(outputs_are_given);
    RUN(pages_in_wrong_places_are_noticed);
    RUN(hidden_states_belong_to_slots);
    RUN(steps_take_their_time);
    RUN(the_thread_is_lent_out_meanwhile);
    RUN(a_mock_needs_its_own_pages);
    return check_done();
}
