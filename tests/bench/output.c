/* output.c: see output.h. The summary's members have the names of vllm bench serve's result file.
 */
#include "tests/bench/output.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>
#include <time.h>

#define RAW(o, text)   json_out_raw(o, text, strlen(text))
#define PLAIN_EVERY_US 10000000u

/* ---- progress ---- */

/* TTFT of all that have one so far. */
static void show_ttft(const struct progress *p, const struct load_state *s)
{
    size_t n = 0;
    for (size_t i = 0; i < s->n_sent; i++)
        if (s->records[i].n_events)
            p->scratch[n++] = record_ttft_ms(&s->records[i]);
    if (n == 0)
        return;
    sort_doubles(p->scratch, n);
    fprintf(stderr, "  TTFT p50 %.0f p99 %.0f ms", percentile(p->scratch, n, 50),
            percentile(p->scratch, n, 99));
}

void progress_show(void *progress, const struct load_state *s)
{
    struct progress *p = progress;
    uint64_t spent_us = s->now_us - p->last_us;
    if (spent_us == 0 || (!p->tty && spent_us < PLAIN_EVERY_US && !s->over))
        return;
    double per_event = s->ok_events ? (double)s->ok_tokens / (double)s->ok_events : 1;
    double rate = (double)(s->n_events - p->last_events) * per_event * 1e6 / (double)spent_us;
    fprintf(stderr, "%s%6.1f s  %zu/%zu done  %zu in flight  %zu failed  %.0f tokens/s",
            p->tty ? "\r\033[K" : "", (double)s->now_us / 1e6, s->n_ok + s->n_failed, s->len,
            s->n_in_flight, s->n_failed, rate);
    show_ttft(p, s);
    fputs(p->tty && !s->over ? "" : "\n", stderr);
    fflush(stderr);
    p->last_us = s->now_us;
    p->last_events = s->n_events;
}

/* ---- the table ---- */

static void table_failures(FILE *f, const struct run_info *i)
{
    const struct stats *s = i->stats;
    for (int k = OUTCOME_OK + 1; k < N_OUTCOMES; k++) {
        if (!s->by_outcome[k])
            continue;
        const struct record *example = NULL;
        for (size_t r = 0; r < s->n_requests && !example; r++)
            if (i->records[r].outcome == (enum outcome)k)
                example = &i->records[r];
        fprintf(f, "  %-28s %12zu", outcome_text((enum outcome)k), s->by_outcome[k]);
        if (k == OUTCOME_HTTP_STATUS)
            fprintf(f, "   %d:", example->http_status);
        fprintf(f, "   %.100s\n", example->message);
    }
}

void output_table(FILE *f, const struct run_info *i)
{
    const struct stats *s = i->stats;
    fprintf(f, "\n%s   %s   prompt set %016" PRIx64 "\n\n", i->label, i->model, i->prompt_hash);
    fprintf(f, "requests ok                    %12zu   of %zu\n", s->n_ok, s->n_requests);
    if (s->n_failed)
        fprintf(f, "requests failed                %12zu\n", s->n_failed);
    table_failures(f, i);
    if (s->n_unfinished)
        fprintf(f, "unfinished when interrupted    %12zu\n", s->n_unfinished);
    if (s->n_short)
        fprintf(f, "shorter than asked for         %12zu\n", s->n_short);
    fprintf(f, "duration                       %12.2f s\n", s->duration_s);
    fprintf(f, "input tokens                   %12" PRIu64 "   %.1f per request\n", s->input_tokens,
            s->n_ok ? (double)s->input_tokens / (double)s->n_ok : 0);
    fprintf(f, "output tokens                  %12" PRIu64 "   %.1f per request\n",
            s->output_tokens, s->n_ok ? (double)s->output_tokens / (double)s->n_ok : 0);
    fprintf(f, "requests/s                     %12.2f\n", s->requests_per_s);
    fprintf(f, "output tokens/s                %12.1f   best second %.0f\n", s->output_tokens_per_s,
            s->peak_output_tokens_per_s);
    fprintf(f, "total tokens/s                 %12.1f\n", s->total_tokens_per_s);
    fprintf(f, "most requests in flight        %12zu\n", s->peak_concurrency);
    const struct slo *slo = &i->o->slo;
    if (slo->ttft_ms > 0 || slo->tpot_ms > 0 || slo->e2el_ms > 0)
        fprintf(f, "goodput                        %12.2f   requests/s within %s\n",
                s->goodput_per_s, i->o->goodput);
    if (!i->o->max_concurrency && s->lag_p99_ms > 10)
        fprintf(f, "sent late by (p99)             %12.1f ms after they were due\n", s->lag_p99_ms);
    fprintf(f, "generator's CPU time           %12.2f s   %.0f %% of a core\n", i->cpu_s,
            s->duration_s > 0 ? 100 * i->cpu_s / s->duration_s : 0);
    fprintf(f, "\n%-8s %10s %10s %10s %10s %10s %10s\n", "ms", "mean", "p50", "p90", "p95", "p99",
            "max");
    for (int m = 0; m < N_METRICS; m++) {
        const struct distribution *d = &s->metric[m];
        fprintf(f, "%-8s %10.2f %10.2f %10.2f %10.2f %10.2f %10.2f\n", metric_name((enum metric)m),
                d->mean, d->p50, d->p90, d->p95, d->p99, d->max);
    }
}

/* ---- JSON ---- */

static void put_string(struct json_out *o, const char *name, const char *text)
{
    json_out_fmt(o, "\"%s\":", name);
    json_out_string(o, text, strlen(text));
}

/* Short: a figure with 6 digits is more exact than the clock. */
static void put_numbers(struct json_out *o, const char *name, const double *v, size_t n)
{
    json_out_fmt(o, "\"%s\":[", name);
    for (size_t i = 0; i < n; i++)
        json_out_fmt(o, i ? ",%.6g" : "%.6g", v[i]);
    RAW(o, "]");
}

static void put_options(struct json_out *o, const struct options *opt)
{
    RAW(o, "\"options\":{");
#define STR(name, ...)                                                                             \
    if (strcmp(#name, "api_key") != 0) {                                                           \
        put_string(o, #name, opt->name);                                                           \
        RAW(o, ",");                                                                               \
    }
#define INT(name, ...)  json_out_fmt(o, "\"%s\":%" PRId64 ",", #name, opt->name);
#define REAL(name, ...) json_out_fmt(o, "\"%s\":%.15g,", #name, opt->name);
#include "tests/bench/options.def"
#undef STR
#undef INT
#undef REAL
    json_out_fmt(o, "\"path\":\"%s\"}", endpoint_path(opt->endpoint_kind));
}

static void put_prompt_set(struct json_out *o, const struct run_info *i)
{
    static const char *const forms[] = {"text", "ids", "fit"};
    json_out_fmt(o,
                 "\"prompt_set\":{\"hash\":\"%016" PRIx64 "\",\"form\":\"%s\",\"repeated\":%zu,"
                 "\"left_out\":%zu,",
                 i->prompt_hash, forms[i->o->prompt_form], i->data->n_repeated,
                 i->data->n_left_out);
    char *about = i->data->about ? json_dumps(i->data->about, JSON_COMPACT) : NULL;
    RAW(o, "\"about\":");
    RAW(o, about ? about : "null");
    RAW(o, "}");
    free(about);
}

static void put_summary(struct json_out *o, const struct run_info *i)
{
    const struct stats *s = i->stats;
    json_out_fmt(o,
                 "\"summary\":{\"duration\":%.6f,\"num_prompts\":%zu,\"completed\":%zu,"
                 "\"failed\":%zu,\"unfinished\":%zu,\"short_outputs\":%zu,"
                 "\"total_input_tokens\":%" PRIu64 ",\"total_output_tokens\":%" PRIu64
                 ",\"total_cached_tokens\":%" PRIu64 ",",
                 s->duration_s, s->n_requests, s->n_ok, s->n_failed, s->n_unfinished, s->n_short,
                 s->input_tokens, s->output_tokens, s->cached_tokens);
    json_out_fmt(o,
                 "\"request_throughput\":%.6g,\"request_goodput\":%.6g,"
                 "\"output_throughput\":%.6g,\"total_token_throughput\":%.6g,"
                 "\"max_output_tokens_per_s\":%.6g,\"max_concurrent_requests\":%zu,"
                 "\"p99_lag_ms\":%.6g,\"generator_cpu_s\":%.6g",
                 s->requests_per_s, s->goodput_per_s, s->output_tokens_per_s, s->total_tokens_per_s,
                 s->peak_output_tokens_per_s, s->peak_concurrency, s->lag_p99_ms, i->cpu_s);
    for (int m = 0; m < N_METRICS; m++) {
        const struct distribution *d = &s->metric[m];
        const char *k = metric_key((enum metric)m);
        json_out_fmt(o,
                     ",\"mean_%s_ms\":%.6g,\"median_%s_ms\":%.6g,\"std_%s_ms\":%.6g,"
                     "\"p50_%s_ms\":%.6g,\"p90_%s_ms\":%.6g,\"p95_%s_ms\":%.6g,"
                     "\"p99_%s_ms\":%.6g,\"max_%s_ms\":%.6g",
                     k, d->mean, k, d->p50, k, d->std, k, d->p50, k, d->p90, k, d->p95, k, d->p99,
                     k, d->max);
    }
    RAW(o, ",\"failures\":{");
    const char *comma = "";
    for (int k = OUTCOME_OK + 1; k < N_OUTCOMES; k++) {
        if (!s->by_outcome[k])
            continue;
        json_out_fmt(o, "%s\"%s\":%zu", comma, outcome_text((enum outcome)k), s->by_outcome[k]);
        comma = ",";
    }
    RAW(o, "}}");
}

static void put_curves(struct json_out *o, const struct stats *s)
{
    json_out_fmt(o, "\"series\":{\"interval_s\":%g,", s->series.interval_s);
    put_numbers(o, "output_tokens_per_s", s->series.output_tokens_per_s, s->series.len);
    RAW(o, ",");
    put_numbers(o, "in_flight", s->series.in_flight, s->series.len);
    RAW(o, ",");
    put_numbers(o, "requests_per_s", s->series.requests_per_s, s->series.len);
    RAW(o, "},\"quantiles_ms\":{");
    for (int m = 0; m < N_METRICS; m++) {
        RAW(o, m ? "," : "");
        put_numbers(o, metric_key((enum metric)m), s->metric[m].quantiles, N_QUANTILES);
    }
    RAW(o, "}");
}

static void put_request(struct json_out *o, const struct record *r)
{
    json_out_fmt(o,
                 "{\"outcome\":\"%s\",\"due_us\":%" PRIu64 ",\"sent_us\":%" PRIu64
                 ",\"end_us\":%" PRIu64 ",\"prompt_tokens\":%" PRId64 ",\"output_tokens\":%" PRId64
                 ",\"cached_tokens\":%" PRId64 ",\"wanted_tokens\":%u,\"http_status\":%d,",
                 outcome_text(r->outcome), r->due_us, r->sent_us, r->end_us, r->prompt_tokens,
                 r->output_tokens, r->cached_tokens, r->wanted_tokens, r->http_status);
    put_string(o, "finish_reason", r->finish);
    RAW(o, ",");
    put_string(o, "message", r->message);
    RAW(o, ",\"event_us\":[");
    for (uint32_t i = 0; i < r->n_events; i++)
        json_out_fmt(o, i ? ",%u" : "%u", r->event_us[i]);
    RAW(o, "]}");
}

void output_json(const struct run_info *i, bool requests, struct json_out *o)
{
    time_t seconds = (time_t)(i->wall_us / 1000000);
    struct tm tm;
    char date[32];
    strftime(date, sizeof(date), "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&seconds, &tm));
    RAW(o, "{\"format\":\"baton-bench-1\",\"version\":\"" BATON_VERSION "\",");
    put_string(o, "label", i->label);
    RAW(o, ",");
    put_string(o, "date", date);
    RAW(o, ",");
    put_string(o, "model", i->model);
    RAW(o, ",\n");
    put_options(o, i->o);
    RAW(o, ",\n");
    put_prompt_set(o, i);
    RAW(o, ",\n");
    put_summary(o, i);
    RAW(o, ",\n");
    put_curves(o, i->stats);
    if (requests) {
        RAW(o, ",\n\"requests\":[\n");
        for (size_t r = 0; r < i->stats->n_requests; r++) {
            RAW(o, r ? ",\n" : "");
            put_request(o, &i->records[r]);
        }
        RAW(o, "]");
    }
    RAW(o, "}\n");
}

enum err output_file(const char *path, const struct json_out *text)
{
    if (text->failed)
        return err_set(ERR_NOMEM, "no memory for %s", path);
    FILE *f = fopen(path, "we");
    if (!f)
        return err_set(ERR_IO, "%s: %s", path, strerror(errno));
    size_t n = fwrite(text->data, 1, text->len, f);
    if (fclose(f) != 0 || n != text->len)
        return err_set(ERR_IO, "%s: %s", path, strerror(errno));
    return ERR_OK;
}
