/* load.c: see load.h. One thread, one loop; everything below runs in its callbacks. */
#include "tests/bench/load.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/base/own.h"
#include "tests/bench/event.h"
#include "tests/bench/sse_reader.h"

#define TICK_MS         100 // looks for timeouts
#define PROGRESS_TICKS  5
#define MAX_ERROR_BYTES 4096
#define SEND_AT_ONCE    32 // then answers are read before more is sent

/* A request in flight. Kept for the next one when it is done. */
struct call {
    struct exchange x;
    struct run *run;
    struct record *r;
    struct sse_reader sse;
    struct json_out bytes;
    char error_body[MAX_ERROR_BYTES];
    size_t n_error_body;
    uint64_t now_us;
    enum err broken;
    bool error_event;
    struct call *next, *prev;
};

struct run {
    const struct load *l;
    struct record *records;
    struct load_state state;
    uint64_t began_us, last_us;
    size_t n_done;
    struct call *in_flight, *spare;
    uv_timer_t due, tick;
    uv_signal_t interrupt;
    int n_ticks;
    enum err failed;
};

static void send_due(struct run *run);

static uint64_t since_start(const struct run *run) { return clock_now_us() - run->began_us; }

/* ---- what comes back ---- */

/* Keeps the first failure of an answer; the others' sentences come later. */
static void call_broken(struct call *c, enum err e)
{
    if (e == ERR_OK || c->broken)
        return;
    c->broken = e;
    snprintf(c->r->message, sizeof(c->r->message), "%s", err_text(e));
}

static void on_event(void *user, const char *data, size_t n)
{
    struct call *c = user;
    struct record *r = c->r;
    struct event e;
    if (c->broken || (n == 6 && !memcmp(data, "[DONE]", 6)))
        return;
    call_broken(c, event_parse(data, n, &e));
    if (c->broken)
        return;
    if (e.is_error) {
        c->error_event = true;
        snprintf(r->message, sizeof(r->message), "%s", e.message);
    }
    if (e.has_choice)
        r->end_us = c->now_us;
    if (e.has_output) {
        call_broken(c, record_add_event(r, c->now_us));
        c->run->state.n_events++;
    }
    if (e.finish[0])
        memcpy(r->finish, e.finish, sizeof(r->finish));
    if (e.prompt_tokens >= 0)
        r->prompt_tokens = e.prompt_tokens;
    if (e.output_tokens >= 0)
        r->output_tokens = e.output_tokens;
    if (e.cached_tokens >= 0)
        r->cached_tokens = e.cached_tokens;
}

static void on_body(struct exchange *x, const char *bytes, size_t n)
{
    struct call *c = (struct call *)x;
    if (x->status != 200) {
        n = MIN(n, MAX_ERROR_BYTES - c->n_error_body);
        memcpy(c->error_body + c->n_error_body, bytes, n);
        c->n_error_body += n;
        return;
    }
    c->now_us = since_start(c->run);
    if (!c->broken)
        call_broken(c, sse_reader_push(&c->sse, bytes, n));
}

static enum outcome judge(struct call *c, enum err why)
{
    struct record *r = c->r;
    struct event e;
    if (why == ERR_UNAVAILABLE || why == ERR_PROTO || why == ERR_PEER_LOST) {
        snprintf(r->message, sizeof(r->message), "%s",
                 why == ERR_UNAVAILABLE ? err_text(why) : err_meaning(why));
        return why == ERR_UNAVAILABLE ? OUTCOME_CONNECT
               : why == ERR_PROTO     ? OUTCOME_BAD_STREAM
                                      : OUTCOME_CUT;
    }
    if (c->x.status != 200) {
        bool said = event_parse(c->error_body, c->n_error_body, &e) == ERR_OK && e.message[0];
        snprintf(r->message, sizeof(r->message), "%.*s",
                 said ? (int)sizeof(e.message) : (int)c->n_error_body,
                 said ? e.message : c->error_body);
        return OUTCOME_HTTP_STATUS;
    }
    if (c->broken)
        return OUTCOME_BAD_STREAM;
    if (c->error_event)
        return OUTCOME_ERROR_EVENT;
    if (r->n_events == 0 && r->finish[0] && r->output_tokens > 0 &&
        record_add_event(r, r->end_us) != ERR_OK) // tokens without text: seen when they were over
        return OUTCOME_NO_OUTPUT;
    return r->n_events ? OUTCOME_OK : OUTCOME_NO_OUTPUT;
}

static void call_done(struct call *c, enum outcome outcome)
{
    struct run *run = c->run;
    struct record *r = c->r;
    uint64_t now_us = since_start(run);
    r->outcome = outcome;
    r->http_status = c->x.status;
    run->last_us = now_us;
    run->n_done++;
    run->state.n_in_flight--;
    if (outcome == OUTCOME_OK) {
        if (r->output_tokens < 0)
            r->output_tokens = r->n_events;
        run->state.n_ok++;
        run->state.ok_tokens += (uint64_t)r->output_tokens;
        run->state.ok_events += r->n_events;
    } else {
        r->end_us = now_us;
        run->state.n_failed++;
    }
    *(c->prev ? &c->prev->next : &run->in_flight) = c->next;
    if (c->next)
        c->next->prev = c->prev;
    c->next = run->spare;
    run->spare = c;
}

static void on_done(struct exchange *x, enum err why)
{
    struct call *c = (struct call *)x;
    call_done(c, judge(c, why));
    send_due(c->run);
}

/* ---- what goes out ---- */

static struct call *call_get(struct run *run)
{
    struct call *c = run->spare;
    if (c) {
        run->spare = c->next;
        return c;
    }
    c = calloc(1, sizeof(*c));
    if (c)
        sse_reader_init(&c->sse, on_event, c);
    return c;
}

static void send_one(struct run *run, size_t i)
{
    struct call *c = call_get(run);
    const struct prompt *p = &run->l->prompts[i];
    if (c)
        request_write(run->l->form, p, &c->bytes);
    if (!c || c->bytes.failed) {
        run->failed = err_set(ERR_NOMEM, "no memory for a request");
        uv_stop(run->due.loop);
        return;
    }
    c->run = run;
    c->r = &run->records[i];
    c->n_error_body = 0;
    c->broken = ERR_OK;
    c->error_event = false;
    sse_reader_reset(&c->sse);
    c->x = (struct exchange){
        .bytes = c->bytes.data, .n_bytes = c->bytes.len, .on_body = on_body, .done = on_done};
    c->prev = NULL;
    c->next = run->in_flight;
    if (c->next)
        c->next->prev = c;
    run->in_flight = c;
    run->state.n_in_flight++;
    c->r->sent_us = c->r->end_us = since_start(run);
    client_send(run->l->client, &c->x);
}

static void on_due(uv_timer_t *t) { send_due(t->data); }

static void end(struct run *run)
{
    if (run->state.over)
        return;
    run->state.over = true;
    uv_close((uv_handle_t *)&run->due, NULL);
    uv_close((uv_handle_t *)&run->tick, NULL);
    uv_close((uv_handle_t *)&run->interrupt, NULL);
    client_close(run->l->client);
}

static void send_due(struct run *run)
{
    const struct load *l = run->l;
    size_t limit = l->max_concurrency ? l->max_concurrency : SIZE_MAX;
    if (run->state.over)
        return;
    uint64_t now_us = since_start(run);
    size_t stop = run->state.n_sent + SEND_AT_ONCE;
    while (run->state.n_sent < MIN(l->len, stop) && run->state.n_in_flight < limit &&
           l->due_us[run->state.n_sent] <= now_us)
        send_one(run, run->state.n_sent++);
    if (run->n_done == l->len) {
        end(run);
    } else if (run->state.n_sent < l->len && run->state.n_in_flight < limit) {
        uint64_t due_us = l->due_us[run->state.n_sent];
        uint64_t wait_us = due_us > now_us ? due_us - now_us : 0;
        uv_update_time(run->due.loop);
        uv_timer_start(&run->due, on_due, (wait_us + 999) / 1000, 0);
    }
}

/* ---- time and interruption ---- */

static void report(struct run *run)
{
    run->state.now_us = since_start(run);
    if (run->l->on_progress)
        run->l->on_progress(run->l->user, &run->state);
}

static void on_tick(uv_timer_t *t)
{
    struct run *run = t->data;
    uint64_t now_us = since_start(run);
    bool freed = false;
    for (struct call *c = run->in_flight, *next; c; c = next) {
        next = c->next;
        if (now_us - c->r->sent_us < run->l->timeout_us)
            continue;
        client_cancel(run->l->client, &c->x);
        snprintf(c->r->message, sizeof(c->r->message), "no complete answer within %g s",
                 (double)run->l->timeout_us / 1e6);
        call_done(c, OUTCOME_TIMEOUT);
        freed = true;
    }
    if (freed)
        send_due(run);
    if (++run->n_ticks % PROGRESS_TICKS == 0 && !run->state.over)
        report(run);
}

static void on_interrupt(uv_signal_t *s, int signum)
{
    (void)signum;
    struct run *run = s->data;
    run->last_us = since_start(run);
    for (struct call *c = run->in_flight; c; c = c->next)
        client_cancel(run->l->client, &c->x);
    end(run);
}

static void free_calls(struct call *c)
{
    for (struct call *next; c; c = next) {
        next = c->next;
        sse_reader_finish(&c->sse);
        json_out_finish(&c->bytes);
        free(c);
    }
}

enum err load_run(uv_loop_t *loop, const struct load *l, struct record *ret_records,
                  uint64_t *ret_duration_us)
{
    struct run run = {.l = l, .records = ret_records, .state = {.records = ret_records}};
    run.state.len = l->len;
    for (size_t i = 0; i < l->len; i++) {
        const struct prompt *p = &l->prompts[i];
        ret_records[i] =
            (struct record){.due_us = l->due_us[i],
                            .prompt_tokens = p->prompt_tokens ? (int64_t)p->prompt_tokens : -1,
                            .output_tokens = -1,
                            .cached_tokens = -1,
                            .wanted_tokens = p->output_tokens};
    }
    uv_timer_init(loop, &run.due);
    uv_timer_init(loop, &run.tick);
    uv_signal_init(loop, &run.interrupt);
    run.due.data = run.tick.data = run.interrupt.data = &run;
    uv_signal_start_oneshot(&run.interrupt, on_interrupt, SIGINT);
    uv_timer_start(&run.tick, on_tick, TICK_MS, TICK_MS);
    run.began_us = clock_now_us();
    send_due(&run);
    uv_run(loop, UV_RUN_DEFAULT);
    if (run.failed == ERR_OK)
        report(&run);
    else
        end(&run), uv_run(loop, UV_RUN_DEFAULT);
    free_calls(run.in_flight);
    free_calls(run.spare);
    *ret_duration_us = run.last_us;
    return run.failed;
}

/* ---- one request, waited for ---- */

struct fetch {
    struct exchange x;
    struct json_out body;
    enum err why;
    bool over;
};

static void fetch_body(struct exchange *x, const char *bytes, size_t n)
{
    json_out_raw(&((struct fetch *)x)->body, bytes, n);
}

static void fetch_done(struct exchange *x, enum err why)
{
    ((struct fetch *)x)->why = why;
    ((struct fetch *)x)->over = true;
}

enum err load_fetch(uv_loop_t *loop, struct client *c, const char *bytes, size_t n, char **ret_body,
                    size_t *ret_n)
{
    struct fetch f = {
        .x = {.bytes = bytes, .n_bytes = n, .on_body = fetch_body, .done = fetch_done}};
    client_send(c, &f.x);
    while (!f.over)
        uv_run(loop, UV_RUN_ONCE);
    json_out_raw(&f.body, "", 1);
    if (f.why == ERR_OK && f.x.status == 200 && !f.body.failed) {
        *ret_body = f.body.data;
        *ret_n = f.body.len - 1;
        return ERR_OK;
    }
    if (f.why == ERR_OK)
        f.why = err_set(ERR_UNAVAILABLE, "HTTP status %d: %.200s", f.x.status,
                        f.body.data ? f.body.data : "");
    json_out_finish(&f.body);
    return f.why;
}
