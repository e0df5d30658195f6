/* main.c: baton bench, a load generator for servers that speak OpenAI's API or LightLLM's.
 *
 * options.c says what is wanted, dataset.c what is asked, arrivals.c when; load.c does it over
 * client.c and fills a record per request; stats.c makes figures of the records, output.c and
 * report.c show them. One thread: it carries far more events a second than any server sends.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "common/base/clock.h"
#include "common/base/own.h"
#include "tests/bench/arrivals.h"
#include "tests/bench/output.h"
#include "tests/bench/report.h"
#include "tests/bench/stats.h"

#define EXIT_SETTINGS 2

struct bench {
    struct options o;
    uv_loop_t loop;
    struct client *client;
    struct request_form form;
    struct dataset *data; // the warm-up's prompts are the last ones
    size_t n, n_warmups;
    uint64_t *due_us;
    struct record *records;
    struct stats *stats;
    uint64_t hash, wall_us;
    double cpu_s;
};

/* The first model that the server names, if it has such a list. */
static enum err find_model(struct bench *b)
{
    if (b->form.model || b->o.endpoint_kind == ENDPOINT_GENERATE)
        return ERR_OK;
    struct json_out request = {0};
    OWNED_MEM char *body = NULL;
    size_t n = 0;
    request_write_raw(&b->form, "GET", "/v1/models", NULL, &request);
    enum err e = load_fetch(&b->loop, b->client, request.data, request.len, &body, &n);
    json_out_finish(&request);
    if (e)
        return err_prefix(e, "%s/v1/models", b->o.url);
    json_t *list = NULL;
    TRY(json_parse(body, n, &json_limits_request, &list));
    const json_t *first = json_array_get(json_object_get(list, "data"), 0);
    const char *id = json_string_value(json_object_get(first, "id"));
    b->form.model = id ? strdup(id) : NULL;
    json_decref(list);
    return id ? ERR_OK
              : err_set(ERR_INVALID, "%s/v1/models names no model: give --model", b->o.url);
}

/* Replaces the prompt's text by its first prompt_tokens ids by the server's tokeniser. */
static enum err fit_prompt(struct bench *b, struct prompt *p)
{
    struct json_out body = {0}, request = {0};
    OWNED_MEM char *answer = NULL;
    size_t n = 0;
    json_out_raw(&body, "{\"prompt\":", 10);
    json_out_string(&body, p->text, strlen(p->text));
    json_out_raw(&body, "}", 1);
    request_write_raw(&b->form, "POST", "/tokenize", &body, &request);
    enum err e = load_fetch(&b->loop, b->client, request.data, request.len, &answer, &n);
    json_out_finish(&body);
    json_out_finish(&request);
    if (e)
        return err_prefix(e, "/tokenize");
    json_t *json = NULL;
    TRY(json_parse(answer, n, &json_limits_file, &json));
    const json_t *tokens = json_object_get(json, "tokens");
    size_t limit = p->prompt_tokens ? p->prompt_tokens : SIZE_MAX;
    if (b->o.max_prompt_tokens)
        limit = MIN(limit, (size_t)b->o.max_prompt_tokens);
    p->n_ids = MIN(json_array_size(tokens), limit);
    p->ids = malloc((p->n_ids + 1) * sizeof(*p->ids));
    for (size_t i = 0; p->ids && i < p->n_ids; i++)
        p->ids[i] = (int32_t)json_integer_value(json_array_get(tokens, i));
    json_decref(json);
    if (!p->ids || p->n_ids == 0)
        return err_set(ERR_INVALID, "/tokenize gave no tokens");
    p->prompt_tokens = (uint32_t)p->n_ids;
    free(p->text);
    p->text = NULL;
    return ERR_OK;
}

static enum err prepare(struct bench *b)
{
    const struct options *o = &b->o;
    TRY(client_create(&b->loop, o->url, &b->client));
    TRY(request_form_init(&b->form, o, b->client));
    struct options with_warmups = *o;
    with_warmups.num_prompts += o->num_warmups;
    TRY(dataset_create(&with_warmups, &b->data));
    b->n = (size_t)o->num_prompts;
    b->n_warmups = b->data->len - b->n;
    b->data->len = b->n;
    TRY(find_model(b));
    for (size_t i = 0; o->prompt_form == PROMPT_FIT && i < b->n + b->n_warmups; i++)
        TRY(fit_prompt(b, &b->data->prompts[i]));
    b->hash = dataset_hash(b->data);
    size_t most = b->n + b->n_warmups;
    b->due_us = calloc(most, sizeof(*b->due_us));
    b->records = calloc(most, sizeof(*b->records));
    return b->due_us && b->records ? ERR_OK : err_set(ERR_NOMEM, "no memory for the records");
}

static struct load make_load(const struct bench *b, size_t from, size_t n)
{
    return (struct load){.form = &b->form,
                         .client = b->client,
                         .prompts = b->data->prompts + from,
                         .due_us = b->due_us,
                         .len = n,
                         .max_concurrency = (size_t)b->o.max_concurrency,
                         .timeout_us = (uint64_t)(b->o.timeout_s * 1e6)};
}

static enum err warm_up(struct bench *b)
{
    struct load l = make_load(b, b->n, b->n_warmups);
    uint64_t duration_us;
    if (!b->n_warmups)
        return ERR_OK;
    fprintf(stderr, "warming up with %zu requests\n", b->n_warmups);
    TRY(load_run(&b->loop, &l, b->records, &duration_us));
    const struct record *bad = NULL;
    for (size_t i = 0; i < b->n_warmups; i++) {
        if (b->records[i].outcome != OUTCOME_OK && !bad)
            bad = &b->records[i];
        record_finish(&b->records[i]);
    }
    return bad ? err_set(ERR_UNAVAILABLE, "a warm-up request failed: %s %s",
                         outcome_text(bad->outcome), bad->message)
               : ERR_OK;
}

static double cpu_now_s(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static enum err measure(struct bench *b)
{
    const char *word = b->o.progress;
    struct progress p = {.tty = isatty(STDERR_FILENO), .scratch = calloc(b->n, sizeof(double))};
    OWNED_MEM double *scratch = p.scratch;
    struct load l = make_load(b, 0, b->n);
    uint64_t duration_us;
    if (!scratch)
        return err_set(ERR_NOMEM, "no memory for the progress");
    l.on_progress = strcmp(word, "off") != 0 ? progress_show : NULL;
    l.user = &p;
    arrivals_fill(&b->o, b->data, b->due_us);
    b->wall_us = clock_wall_us();
    double before_s = cpu_now_s();
    TRY(load_run(&b->loop, &l, b->records, &duration_us));
    b->cpu_s = cpu_now_s() - before_s;
    return stats_create(b->records, b->n, duration_us, &b->o.slo, &b->stats);
}

static enum err show(const struct bench *b)
{
    const struct options *o = &b->o;
    struct run_info info = {.o = o,
                            .data = b->data,
                            .label = o->label[0]      ? o->label
                                     : o->workload[0] ? o->workload
                                                      : basename(o->data),
                            .model = b->form.model ? b->form.model : "",
                            .prompt_hash = b->hash,
                            .wall_us = b->wall_us,
                            .cpu_s = b->cpu_s,
                            .records = b->records,
                            .stats = b->stats};
    struct json_out text = {0}, run = {0};
    enum err e = ERR_OK;
    output_table(stdout, &info);
    if (o->json[0]) {
        output_json(&info, true, &text);
        e = output_file(o->json, &text);
    }
    if (e == ERR_OK && o->html[0]) {
        output_json(&info, false, &run);
        e = report_write(&run, 1, o->html);
    }
    json_out_finish(&text);
    json_out_finish(&run);
    return e;
}

static void bench_finish(struct bench *b)
{
    if (b->client)
        client_close(b->client);
    uv_run(&b->loop, UV_RUN_DEFAULT);
    uv_loop_close(&b->loop);
    for (size_t i = 0; b->records && i < b->n; i++)
        record_finish(&b->records[i]);
    if (b->data)
        b->data->len = b->n + b->n_warmups;
    dataset_destroy(b->data);
    stats_destroy(b->stats);
    request_form_finish(&b->form);
    client_destroy(b->client);
    free(b->due_us);
    free(b->records);
}

/* A descriptor per request in flight. */
static void raise_limits(void)
{
    struct rlimit l;
    if (getrlimit(RLIMIT_NOFILE, &l) == 0) {
        l.rlim_cur = l.rlim_max;
        setrlimit(RLIMIT_NOFILE, &l);
    }
    signal(SIGPIPE, SIG_IGN);
}

static enum err bench(int argc, char **argv, size_t *ret_failed)
{
    struct bench b = {0};
    TRY(options_parse(argc, argv, &b.o));
    if (!b.o.api_key[0] && getenv("OPENAI_API_KEY"))
        b.o.api_key = getenv("OPENAI_API_KEY");
    uv_loop_init(&b.loop);
    enum err e = prepare(&b);
    if (e == ERR_OK)
        e = warm_up(&b);
    if (e == ERR_OK)
        e = measure(&b);
    if (e == ERR_OK)
        e = show(&b);
    if (e == ERR_OK)
        *ret_failed = b.n - b.stats->n_ok;
    bench_finish(&b);
    return e;
}

int main(int argc, char **argv)
{
    size_t n_failed = 0;
    raise_limits();
    enum err e = argc > 1 && !strcmp(argv[1], "report") ? report_command(argc - 2, argv + 2)
                                                        : bench(argc - 1, argv + 1, &n_failed);
    if (e) {
        fprintf(stderr, "baton bench: %s\n", err_text(e));
        return EXIT_SETTINGS;
    }
    return n_failed ? 1 : 0;
}
