/* trace.c: see trace.h.
 *
 * A line of the capture becomes a visit to each process that the request was in: the router from
 * its arrival to its end, the prefill worker from placement to first token, the decode worker from
 * there to the last one. Visits that overlap are put on tracks of their own, so that a process has
 * as many tracks as it had requests at once. Inside a visit, stages are spans that follow each
 * other.
 */
#include "deploy/trace.h"

#include <errno.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/json.h"
#include "common/base/own.h"

#define MAX_PROCESSES 4096u
#define MAX_LINE      (1u << 16)
#define MAX_US        (INT64_C(1) << 52) /* what JSON's numbers hold exactly, and a sum of two */
#define NEVER         (-1)

/* The moments of at_us, in their order. */
enum { QUEUED, PLACED, PREFILL_START, PREFILL_END, FIRST_TOKEN, HANDOFF, LAST_TOKEN, END, N_TIMES };
static const char *const time_names[N_TIMES] = {"queued",      "placed",      "prefill_start",
                                                "prefill_end", "first_token", "handoff",
                                                "last_token",  "end"};

struct request {
    int64_t received_us, at_us[N_TIMES]; // at_us: after received_us, or NEVER
    uint32_t process[3];                 // the router, prefill, decode; 0 for none of the latter
    json_t *line;
};

struct visit {
    const struct request *request;
    int64_t from_us, to_us; // absolute
    uint32_t process;
    int kind; // index into request.process
    uint32_t track;
};

struct process {
    char *name;
    int64_t *track_end_us; // [n_tracks]
    uint32_t n_tracks, cap;
};

struct conversion {
    struct request *requests;
    size_t n_requests, cap_requests;
    struct visit *visits;
    size_t n_visits;
    struct process processes[MAX_PROCESSES];
    uint32_t n_processes;
    int64_t origin_us;
};

static void conversion_destroy(struct conversion *c)
{
    if (!c)
        return;
    for (size_t i = 0; i < c->n_requests; i++)
        json_decref(c->requests[i].line);
    for (uint32_t i = 0; i < c->n_processes; i++) {
        free(c->processes[i].name);
        free(c->processes[i].track_end_us);
    }
    free(c->requests);
    free(c->visits);
    free(c);
}
DEFINE_OWNED(conversion)

/* -- reading -- */

static enum err process_find(struct conversion *c, const char *name, uint32_t *ret)
{
    for (*ret = 0; *ret < c->n_processes; ++*ret)
        if (!strcmp(c->processes[*ret].name, name))
            return ERR_OK;
    if (c->n_processes == MAX_PROCESSES)
        return err_set(ERR_INVALID, "more than %u processes", MAX_PROCESSES);
    struct process *p = &c->processes[c->n_processes];
    if (!(p->name = strdup(name)))
        return err_set(ERR_NOMEM, "no memory for the trace");
    *ret = c->n_processes++;
    return ERR_OK;
}

/* What is there must not be after the end. */
static enum err read_times(const json_t *line, struct request *r)
{
    const json_t *at = json_object_get(line, "at_us");
    if (!json_is_object(at))
        return err_set(ERR_INVALID, "at_us is missing or no object");
    for (int i = 0; i < N_TIMES; i++) {
        r->at_us[i] = NEVER;
        TRY(json_get_int(at, time_names[i], 0, MAX_US, &r->at_us[i]));
    }
    if (r->at_us[END] == NEVER)
        return err_set(ERR_INVALID, "at_us.end is missing");
    for (int i = 0; i < END; i++)
        if (r->at_us[i] > r->at_us[END])
            return err_set(ERR_INVALID, "at_us.%s is %" PRId64 ", after the end", time_names[i],
                           r->at_us[i]);
    return ERR_OK;
}

static enum err read_line(struct conversion *c, const char *text, size_t n)
{
    static const struct json_limits limits = {
        .max_bytes = MAX_LINE, .max_depth = 4, .max_containers = 16, .max_values = 256};
    if (c->n_requests == c->cap_requests) {
        size_t cap = c->cap_requests ? c->cap_requests * 2 : 256;
        struct request *grown = realloc(c->requests, cap * sizeof(*grown));
        if (!grown)
            return err_set(ERR_NOMEM, "no memory for the trace");
        c->requests = grown;
        c->cap_requests = cap;
    }
    struct request *r = &c->requests[c->n_requests];
    *r = (struct request){.received_us = NEVER};
    TRY(json_parse(text, n, &limits, &r->line));
    c->n_requests++; // from here the line is the conversion's
    if (!json_is_object(r->line))
        return err_set(ERR_INVALID, "not an object");
    TRY(json_get_int(r->line, "received_us", 0, MAX_US, &r->received_us));
    if (r->received_us == NEVER)
        return err_set(ERR_INVALID, "received_us is missing");
    TRY(read_times(r->line, r));
    const char *prefill = "", *decode = "";
    TRY(json_get_string(r->line, "prefill", &prefill));
    TRY(json_get_string(r->line, "decode", &decode));
    TRY(process_find(c, "router", &r->process[0]));
    if (prefill[0])
        TRY(process_find(c, prefill, &r->process[1]));
    if (decode[0])
        TRY(process_find(c, decode, &r->process[2]));
    return ERR_OK;
}

static enum err read_all(struct conversion *c, FILE *in, const char *name, int *ret_cut)
{
    OWNED_MEM char *line = NULL;
    size_t cap = 0, nth = 0;
    ssize_t n;
    while ((n = getline(&line, &cap, in)) > 0) {
        nth++;
        if (n == 1 && line[0] == '\n')
            continue;
        size_t had = c->n_requests;
        enum err e = read_line(c, line, (size_t)n);
        if (e == ERR_INVALID && line[n - 1] != '\n') {
            *ret_cut = 1;
            while (c->n_requests > had)
                json_decref(c->requests[--c->n_requests].line);
            return ERR_OK;
        }
        if (e != ERR_OK)
            return err_prefix(e, "%s:%zu", name, nth);
    }
    if (ferror(in))
        return err_set(ERR_IO, "%s: %s", name, strerror(errno));
    return ERR_OK;
}

/* -- visits and tracks -- */

static void visit_add(struct conversion *c, const struct request *r, int kind, int64_t from,
                      int64_t to)
{
    if (from == NEVER || (kind > 0 && !r->process[kind]))
        return;
    c->visits[c->n_visits++] = (struct visit){.request = r,
                                              .from_us = r->received_us + from,
                                              .to_us = r->received_us + MAX(from, to),
                                              .process = r->process[kind],
                                              .kind = kind};
}

static int by_start(const void *a, const void *b)
{
    const struct visit *x = a, *y = b;
    return x->from_us < y->from_us ? -1 : x->from_us > y->from_us ? 1 : x->kind - y->kind;
}

/* The first track that is free by then. */
static enum err track_take(struct process *p, struct visit *v)
{
    for (v->track = 0; v->track < p->n_tracks; v->track++)
        if (p->track_end_us[v->track] <= v->from_us)
            break;
    if (v->track == p->cap) {
        uint32_t cap = p->cap ? p->cap * 2 : 16;
        int64_t *grown = realloc(p->track_end_us, cap * sizeof(*grown));
        if (!grown)
            return err_set(ERR_NOMEM, "no memory for the trace");
        p->track_end_us = grown;
        p->cap = cap;
    }
    p->n_tracks = MAX(p->n_tracks, v->track + 1);
    p->track_end_us[v->track] = v->to_us;
    return ERR_OK;
}

static enum err lay_out(struct conversion *c)
{
    c->visits = calloc(3 * c->n_requests + 1, sizeof(*c->visits));
    if (!c->visits)
        return err_set(ERR_NOMEM, "no memory for the trace");
    for (size_t i = 0; i < c->n_requests; i++) {
        const struct request *r = &c->requests[i];
        const int64_t *at = r->at_us;
        c->origin_us = i ? MIN(c->origin_us, r->received_us) : r->received_us;
        visit_add(c, r, 0, 0, at[END]);
        visit_add(c, r, 1, at[PLACED], at[PREFILL_END] == NEVER ? at[END] : at[PREFILL_END]);
        // A decode worker that was faster than the message about it has no time before its tokens.
        int64_t from = at[PREFILL_END] == NEVER ? at[HANDOFF] : at[PREFILL_END];
        visit_add(c, r, 2, from, at[LAST_TOKEN] == NEVER ? at[END] : at[LAST_TOKEN]);
    }
    qsort(c->visits, c->n_visits, sizeof(*c->visits), by_start);
    for (size_t i = 0; i < c->n_visits; i++)
        TRY(track_take(&c->processes[c->visits[i].process], &c->visits[i]));
    return ERR_OK;
}

/* -- writing -- */

struct writer {
    const struct conversion *c;
    FILE *out;
    struct json_out line;
    bool any;
};

static void event_begin(struct writer *w, const char *phase, const struct visit *v, int64_t at_us,
                        const char *name)
{
    struct json_out *o = &w->line;
    o->len = 0;
    json_out_fmt(o, "%s\n{\"ph\":\"%s\",\"pid\":%u,\"tid\":%u,\"ts\":%" PRId64 ",\"name\":",
                 w->any ? "," : "", phase, v->process + 1, v->track + 1, at_us - w->c->origin_us);
    json_out_string(o, name, strlen(name));
    w->any = true;
}

static void event_end(struct writer *w)
{
    json_out_fmt(&w->line, "}");
    if (!w->line.failed)
        fwrite(w->line.data, 1, w->line.len, w->out);
}

static const char *label(const struct request *r)
{
    const char *text = "";
    (void)!json_get_string(r->line, "request", &text);
    if (!text[0])
        (void)!json_get_string(r->line, "gen", &text);
    return text[0] ? text : "request";
}

static void span(struct writer *w, const struct visit *v, const char *name, int64_t from,
                 int64_t to)
{
    if (from == NEVER || to == NEVER || to < from)
        return;
    event_begin(w, "X", v, v->request->received_us + from, name);
    json_out_fmt(&w->line, ",\"dur\":%" PRId64, to - from);
    event_end(w);
}

/* The whole visit, with what the line says beside its times. */
static void span_whole(struct writer *w, const struct visit *v)
{
    event_begin(w, "X", v, v->from_us, label(v->request));
    json_out_fmt(&w->line, ",\"dur\":%" PRId64 ",\"args\":{", v->to_us - v->from_us);
    const char *key;
    json_t *value;
    bool first = true;
    json_object_foreach (v->request->line, key, value) {
        if (!json_is_string(value) && !json_is_integer(value))
            continue;
        json_out_fmt(&w->line, first ? "" : ",");
        json_out_string(&w->line, key, strlen(key));
        json_out_fmt(&w->line, ":");
        if (json_is_string(value))
            json_out_string(&w->line, json_string_value(value), json_string_length(value));
        else
            json_out_fmt(&w->line, "%" JSON_INTEGER_FORMAT, json_integer_value(value));
        first = false;
    }
    json_out_fmt(&w->line, "}");
    event_end(w);
}

/* One end of an arrow between the visits of a request. */
static void arrow(struct writer *w, const struct visit *v, const char *end, int64_t at, int nth)
{
    event_begin(w, end, v, v->request->received_us + at, "moves on");
    json_out_fmt(&w->line, ",\"cat\":\"request\",\"id\":%zu%s",
                 (size_t)(v->request - w->c->requests) * 2 + (size_t)nth,
                 end[0] == 'f' ? ",\"bp\":\"e\"" : "");
    event_end(w);
}

static void write_visit(struct writer *w, const struct visit *v)
{
    const struct request *r = v->request;
    const int64_t *at = r->at_us;
    bool to_prefill = r->process[1] && at[PLACED] != NEVER;
    bool to_decode = to_prefill && r->process[2] && at[PREFILL_END] != NEVER;
    span_whole(w, v);
    if (v->kind == 0) {
        span(w, v, "parse", 0, at[QUEUED]);
        span(w, v, "queue", at[QUEUED], at[PLACED] == NEVER ? at[END] : at[PLACED]);
        span(w, v, "to first token", at[PLACED], at[FIRST_TOKEN]);
        span(w, v, "stream", at[FIRST_TOKEN], at[END]);
        if (to_prefill)
            arrow(w, v, "s", at[PLACED], 0);
    } else if (v->kind == 1) {
        span(w, v, "wait for a chunk", at[PLACED], at[PREFILL_START]);
        span(w, v, "prefill", at[PREFILL_START], at[PREFILL_END]);
        if (to_prefill)
            arrow(w, v, "f", at[PLACED], 0);
        if (to_decode)
            arrow(w, v, "s", at[PREFILL_END], 1);
    } else {
        span(w, v, "handoff", at[PREFILL_END], at[HANDOFF]);
        span(w, v, "decode", at[HANDOFF], at[LAST_TOKEN]);
        if (to_decode)
            arrow(w, v, "f", at[PREFILL_END], 1);
    }
}

static enum err write_all(const struct conversion *c, FILE *out)
{
    struct writer w = {.c = c, .out = out};
    fputs("{\"displayTimeUnit\":\"ms\",\"traceEvents\":[", out);
    for (uint32_t i = 0; i < c->n_processes; i++) {
        struct visit at = {.process = i};
        event_begin(&w, "M", &at, c->origin_us, "process_name");
        json_out_fmt(&w.line, ",\"args\":{\"name\":");
        json_out_string(&w.line, c->processes[i].name, strlen(c->processes[i].name));
        json_out_fmt(&w.line, "}");
        event_end(&w);
    }
    for (size_t i = 0; i < c->n_visits; i++)
        write_visit(&w, &c->visits[i]);
    fputs("\n]}\n", out);
    bool failed = w.line.failed;
    json_out_finish(&w.line);
    if (failed)
        return err_set(ERR_NOMEM, "no memory for the trace");
    if (fflush(out) || ferror(out))
        return err_set(ERR_IO, "the trace cannot be written: %s", strerror(errno));
    return ERR_OK;
}

enum err trace_convert(FILE *in, const char *name, FILE *out, struct trace_summary *ret)
{
    OWNED(conversion) c = calloc(1, sizeof(*c));
    if (!c)
        return err_set(ERR_NOMEM, "no memory for the trace");
    struct trace_summary s = {0};
    TRY(read_all(c, in, name, &s.cut));
    TRY(lay_out(c));
    TRY(write_all(c, out));
    s.n_requests = c->n_requests;
    s.n_processes = c->n_processes;
    *ret = s;
    return ERR_OK;
}

/* -- the command -- */

int trace_main(int argc, char **argv)
{
    if (argc < 1 || argc > 2 || (argv[0][0] == '-' && argv[0][1])) {
        fprintf(stderr,
                "usage: baton trace FILE.jsonl [OUT.json]\n"
                "FILE is what the router wrote to its --trace-file, - for stdin. Open OUT (or "
                "stdout)\nin https://ui.perfetto.dev or chrome://tracing.\n");
        return 2;
    }
    FILE *in = strcmp(argv[0], "-") ? fopen(argv[0], "re") : stdin;
    if (!in) {
        fprintf(stderr, "baton: %s: %s\n", argv[0], strerror(errno));
        return 1;
    }
    FILE *out = argc == 2 ? fopen(argv[1], "we") : stdout;
    if (!out) {
        fprintf(stderr, "baton: %s: %s\n", argv[1], strerror(errno));
        return 1;
    }
    struct trace_summary s;
    enum err e = trace_convert(in, argv[0], out, &s);
    if (e == ERR_OK && out != stdout && fclose(out))
        e = err_set(ERR_IO, "%s: %s", argv[1], strerror(errno));
    if (e != ERR_OK) {
        fprintf(stderr, "baton: %s\n", err_text(e));
        return 1;
    }
    fprintf(stderr, "%zu requests in %zu processes%s\n", s.n_requests, s.n_processes,
            s.cut ? "; the last line is not whole and was left out" : "");
    return 0;
}
