/* trace.c: see trace.h. */
#include "router/trace.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/base/json.h"
#include "common/base/log.h"
#include "common/base/own.h"

#define BUFFER_BYTES (1u << 16)

struct trace {
    char *path;
    FILE *file;
    struct json_out line;
    bool dirty, failing;
};

static void trace_destroy(struct trace *t)
{
    if (!t)
        return;
    if (t->file)
        fclose(t->file);
    json_out_finish(&t->line);
    free(t->path);
    free(t);
}
DEFINE_OWNED(trace)

static enum err file_open(const char *path, FILE **ret)
{
    FILE *f = fopen(path, "ae");
    if (!f)
        return err_set(ERR_IO, "--trace-file %s: %s", path, strerror(errno));
    setvbuf(f, NULL, _IOFBF, BUFFER_BYTES);
    *ret = f;
    return ERR_OK;
}

enum err trace_open(const char *path, struct trace **ret)
{
    OWNED(trace) t = calloc(1, sizeof(*t));
    if (!t || !(t->path = strdup(path)))
        return err_set(ERR_NOMEM, "no memory for a trace");
    TRY(file_open(path, &t->file));
    *ret = take(&t);
    return ERR_OK;
}

enum err trace_reopen(struct trace *t)
{
    FILE *f = NULL;
    TRY(file_open(t->path, &f));
    trace_flush(t);
    fclose(t->file);
    t->file = f;
    t->failing = false;
    return ERR_OK;
}

void trace_close(struct trace *t)
{
    if (t)
        trace_flush(t);
    trace_destroy(t);
}

/* -- a line -- */

static void put_text(struct json_out *o, const char *key, const char *text)
{
    if (!text || !text[0])
        return;
    json_out_fmt(o, ",\"%s\":", key);
    json_out_string(o, text, strlen(text));
}

/* When, after the request was received. */
static void put_time(struct json_out *o, const char *key, uint64_t us, uint64_t received_us)
{
    if (!us)
        return;
    bool first = o->data[o->len - 1] == '{';
    json_out_fmt(o, "%s\"%s\":%" PRIu64, first ? "" : ",", key,
                 us > received_us ? us - received_us : 0);
}

void trace_write(struct trace *t, const struct trace_record *r)
{
    struct json_out *o = &t->line;
    o->len = 0;
    o->failed = false;
    json_out_fmt(o, "{\"received_us\":%" PRIu64,
                 clock_wall_us() - (clock_now_us() - r->received_us));
    put_text(o, "request", r->request_id);
    put_text(o, "trace", r->trace_id);
    put_text(o, "parent", r->parent_id);
    put_text(o, "span", r->span_id);
    json_out_fmt(o, ",\"gen\":\"%" PRIx64 "\",\"choice\":%u,\"n\":%u", r->gen_id, r->choice,
                 r->n_choices);
    put_text(o, "prefill", r->prefill);
    put_text(o, "decode", r->decode);
    put_text(o, "finish", r->finish);
    put_text(o, "error", r->error);
    json_out_fmt(o,
                 ",\"attempts\":%u,\"prompt\":%u,\"cached\":%u,\"output\":%u,\"steps\":%u,"
                 "\"accepted\":%u,\"at_us\":{",
                 r->n_attempts, r->n_prompt, r->n_cached, r->n_output, r->n_steps, r->n_accepted);
    if (o->failed)
        return;
    put_time(o, "queued", r->queued_us, r->received_us);
    put_time(o, "placed", r->placed_us, r->received_us);
    put_time(o, "prefill_start", r->prefill_start_us, r->received_us);
    put_time(o, "prefill_end", r->prefill_end_us, r->received_us);
    put_time(o, "first_token", r->first_token_us, r->received_us);
    put_time(o, "handoff", r->handoff_us, r->received_us);
    put_time(o, "last_token", r->last_token_us, r->received_us);
    put_time(o, "end", r->end_us, r->received_us);
    json_out_fmt(o, "}}\n");
    if (o->failed)
        return;
    t->dirty = true;
    if (fwrite(o->data, 1, o->len, t->file) != o->len && !t->failing) {
        t->failing = true;
        log_error("trace", "file=%s lines are lost: %s", t->path, strerror(errno));
    }
}

void trace_flush(struct trace *t)
{
    if (!t->dirty)
        return;
    t->dirty = false;
    if (fflush(t->file) == 0) {
        t->failing = false;
    } else if (!t->failing) {
        t->failing = true;
        log_error("trace", "file=%s lines are lost: %s", t->path, strerror(errno));
    }
}
