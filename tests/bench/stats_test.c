/* Figures against hand-made records: the definitions, percentiles, series. */
#include "tests/bench/stats.h"

#include "tests/check.h"

#include "common/base/own.h"

static const struct slo no_slo;

static struct record *add(struct record *r, uint64_t sent_us, int64_t tokens, uint32_t n_events,
                          const uint32_t *event_us)
{
    *r = (struct record){.due_us = sent_us, .sent_us = sent_us, .prompt_tokens = 10};
    r->output_tokens = r->wanted_tokens = (uint32_t)tokens;
    r->cached_tokens = -1;
    r->outcome = OUTCOME_OK;
    for (uint32_t i = 0; i < n_events; i++)
        REQUIRE(record_add_event(r, sent_us + event_us[i]) == ERR_OK);
    r->end_us = sent_us + event_us[n_events - 1];
    return r;
}

static void drop(struct record *r, size_t n)
{
    for (size_t i = 0; i < n; i++)
        record_finish(&r[i]);
}

static void percentiles_are_numpys(void)
{
    double one[] = {7}, v[] = {1, 2, 3, 4, 10};
    CHECK_NEAR(percentile(one, 1, 99), 7, 0);
    CHECK_NEAR(percentile(v, 5, 0), 1, 0);
    CHECK_NEAR(percentile(v, 5, 50), 3, 0);
    CHECK_NEAR(percentile(v, 5, 90), 7.6, 1e-12);
    CHECK_NEAR(percentile(v, 5, 99), 9.76, 1e-12);
    CHECK_NEAR(percentile(v, 5, 100), 10, 0);
}

/* Two requests: 4 tokens in 3 events from 0, 1 token from 0.5 s. */
static void definitions(void)
{
    struct record r[3];
    add(&r[0], 0, 4, 3, (uint32_t[]){100000, 150000, 400000});
    add(&r[1], 500000, 1, 1, (uint32_t[]){300000});
    r[2] = (struct record){.sent_us = 0, .end_us = 700000, .outcome = OUTCOME_TIMEOUT};
    struct stats *s;
    struct slo slo = {.ttft_ms = 300, .tpot_ms = 99};
    CHECK_OK(stats_create(r, 3, 2000000, &slo, &s));
    CHECK_INT(s->n_ok, 2);
    CHECK_INT(s->n_failed, 1);
    CHECK_INT(s->by_outcome[OUTCOME_TIMEOUT], 1);
    CHECK_INT(s->output_tokens, 5);
    CHECK_INT(s->input_tokens, 20);
    CHECK_NEAR(s->output_tokens_per_s, 2.5, 1e-9);
    CHECK_NEAR(s->total_tokens_per_s, 12.5, 1e-9);
    CHECK_NEAR(s->requests_per_s, 1, 1e-9);
    CHECK_NEAR(s->metric[METRIC_TTFT].mean, 200, 1e-9);
    CHECK_NEAR(s->metric[METRIC_TTFT].std, 100, 1e-9);
    CHECK_INT(s->metric[METRIC_TPOT].n, 1); /* one token has none */
    CHECK_NEAR(s->metric[METRIC_TPOT].mean, 100, 1e-9);
    CHECK_INT(s->metric[METRIC_ITL].n, 2);
    CHECK_NEAR(s->metric[METRIC_ITL].max, 250, 1e-9);
    CHECK_NEAR(s->metric[METRIC_ITL].p50, 150, 1e-9);
    CHECK_NEAR(s->metric[METRIC_E2EL].mean, 350, 1e-9);
    CHECK_NEAR(s->goodput_per_s, 0.5, 1e-9); /* the first has a TPOT of 100, the second of 0 */
    CHECK_INT(s->peak_concurrency, 1);       /* 0..0.4 and 0.5..0.8 */
    stats_destroy(s);
    drop(r, 3);
}

static void series_add_up(void)
{
    struct record r[2];
    add(&r[0], 0, 30, 3, (uint32_t[]){500000, 1500000, 2500000});
    add(&r[1], 1000000, 2, 2, (uint32_t[]){100000, 2000000});
    struct stats *s;
    CHECK_OK(stats_create(r, 2, 3000000, &no_slo, &s));
    double tokens = 0, busy = 0, done = 0;
    for (size_t i = 0; i < s->series.len; i++) {
        tokens += s->series.output_tokens_per_s[i] * s->series.interval_s;
        busy += s->series.in_flight[i] * s->series.interval_s;
        done += s->series.requests_per_s[i] * s->series.interval_s;
    }
    CHECK_NEAR(tokens, 32, 1e-6);
    CHECK_NEAR(busy, 4.5, 1e-6);
    CHECK_NEAR(done, 2, 1e-6);
    CHECK_NEAR(s->peak_output_tokens_per_s, 11, 1e-9); /* second 1: 10 of one, 1 of the other */
    CHECK_INT(s->peak_concurrency, 2);
    stats_destroy(s);
    drop(r, 2);
}

static void nothing_succeeded(void)
{
    struct record r[1] = {{.outcome = OUTCOME_CONNECT}};
    struct stats *s;
    CHECK_OK(stats_create(r, 1, 0, &no_slo, &s));
    CHECK_INT(s->n_failed, 1);
    CHECK_NEAR(s->output_tokens_per_s, 0, 0);
    CHECK_NEAR(s->metric[METRIC_TTFT].p99, 0, 0);
    stats_destroy(s);
}

static void short_answers_are_counted(void)
{
    struct record r[1];
    add(&r[0], 0, 3, 1, (uint32_t[]){1000});
    r[0].wanted_tokens = 4;
    struct stats *s;
    CHECK_OK(stats_create(r, 1, 1000, &no_slo, &s));
    CHECK_INT(s->n_short, 1);
    stats_destroy(s);
    drop(r, 1);
}

int main(void)
{
    RUN(percentiles_are_numpys);
    RUN(definitions);
    RUN(series_add_up);
    RUN(nothing_succeeded);
    RUN(short_answers_are_counted);
    return check_done();
}
