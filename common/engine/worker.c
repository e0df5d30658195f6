/* worker.c: the control thread of a worker. See worker.h for the picture. */
#include "common/engine/worker.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>
#include <uv.h>

#include "common/base/admin.h"
#include "common/base/clock.h"
#include "common/base/link.h"
#include "common/base/log.h"
#include "common/base/own.h"
#include "common/engine/kv_transport.h"
#include "common/engine/weights.h"
#include "kernels/kernels.h"

#define BEAT_MS      100
#define DEAD_US      3000000u
#define ADMIN_WAIT_S 5
#define STOP_S       3 /* for the engine thread to end */

enum post_type { POST_ROUTER, POST_PEER, POST_CONNECT, POST_DISCONNECT, POST_QUIT };

struct post {
    struct post *next;
    enum post_type type;
    uint64_t peer;
    uint64_t generation;
    int exit_code;
    struct wire_buf buf;
    char text[WIRE_MAX_ADDRESS];
};

/* A decode worker this prefill worker talks to, or a prefill worker that talks to this one. */
struct peer {
    struct peer *next;
    uint64_t key;
    struct link_line *line; // prefill only
    struct worker *worker;
};

struct worker {
    struct worker_config config;
    uv_loop_t loop;
    uv_async_t wake;
    uv_timer_t beat_timer;
    uv_signal_t sigterm, sigint;
    struct link_line *router;
    struct link_hub *hub; // decode only
    struct peer *peers;
    struct admin *admin;
    bool welcomed, quitting;
    uint64_t hello_us;
    uint64_t epoch;
    int exit_code;
    char quit_reason[WIRE_MAX_TEXT];

    pthread_t engine_thread;
    void (*engine_fn)(void *);
    void *engine_arg;

    pthread_mutex_t lock; // guards what follows
    pthread_cond_t mail_ready, admin_ready;
    struct mail *mail_head, **mail_tail;
    struct post *post_head, **post_tail;
    struct wire_beat beat;
    json_t *admin_answer;
    bool admin_answered;
    uint64_t generation; // grows with every epoch mail

    uint64_t engine_generation; // engine thread only: generation of the last epoch mail it read
    atomic_ullong progress;
    atomic_bool busy;
};

static void on_router(void *user, enum link_event event, const struct wire_msg *m,
                      const char *text);
static void on_hub(void *user, uint64_t peer, enum link_event event, const struct wire_msg *m,
                   const char *text);
static void on_line(void *user, enum link_event event, const struct wire_msg *m, const char *text);
static void on_beat(uv_timer_t *t);
static void on_wake(uv_async_t *a);
static void on_signal(uv_signal_t *s, int signum);
static json_t *on_admin(void *user, const char *command, const char *argument);

/* ---- mail ---- */

static struct mail *mail_new(enum mail_type type, size_t extra)
{
    struct mail *m = calloc(1, sizeof(*m) + extra);
    if (m)
        m->type = type;
    return m;
}

static void mail_push(struct worker *w, struct mail *m)
{
    if (!m) {
        // Without memory for a few bytes of mail nothing can be kept consistent.
        log_error("worker", "out of memory for mail, leaving");
        _exit(1);
    }
    pthread_mutex_lock(&w->lock);
    if (m->type == MAIL_EPOCH)
        m->seq = ++w->generation;
    *w->mail_tail = m;
    w->mail_tail = &m->next;
    pthread_cond_signal(&w->mail_ready);
    pthread_mutex_unlock(&w->lock);
}

static void mail_message(struct worker *w, enum mail_type type, uint64_t peer,
                         const struct wire_msg *msg)
{
    size_t body = msg->head.body_bytes;
    struct mail *m = mail_new(type, (body + 7) & ~(size_t)7);
    if (m) {
        // The body starts a fresh aligned copy; the head is already decoded.
        memcpy(m->frame, msg->body, body);
        m->msg = *msg;
        m->msg.body = m->frame;
        m->msg.tail =
            (const uint8_t *)m->frame + ((const uint8_t *)msg->tail - (const uint8_t *)msg->body);
        m->peer = peer;
    }
    mail_push(w, m);
}

static bool has_mail(const struct worker *w, bool meanwhile)
{
    const struct mail *m = w->mail_head;
    return m && !(meanwhile && (m->type == MAIL_EPOCH || m->type == MAIL_STOP));
}

static struct mail *mail_take(struct worker *w, uint64_t wait_us, bool meanwhile)
{
    pthread_mutex_lock(&w->lock);
    if (!has_mail(w, meanwhile) && wait_us) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        uint64_t ns = (uint64_t)until.tv_nsec + wait_us * 1000u;
        until.tv_sec += (time_t)(ns / 1000000000u);
        until.tv_nsec = (long)(ns % 1000000000u);
        while (!has_mail(w, meanwhile))
            if (pthread_cond_timedwait(&w->mail_ready, &w->lock, &until) == ETIMEDOUT)
                break;
    }
    struct mail *m = has_mail(w, meanwhile) ? w->mail_head : NULL;
    if (m) {
        w->mail_head = m->next;
        if (!w->mail_head)
            w->mail_tail = &w->mail_head;
    }
    pthread_mutex_unlock(&w->lock);
    if (m && m->type == MAIL_EPOCH)
        w->engine_generation = m->seq;
    return m;
}

struct mail *worker_mail_next(struct worker *w, uint64_t wait_us)
{
    return mail_take(w, wait_us, false);
}

struct mail *worker_mail_meanwhile(struct worker *w, uint64_t wait_us)
{
    return mail_take(w, wait_us, true);
}

void worker_mail_transfer(struct worker *w, uint64_t owner, uint64_t seq, enum err err)
{
    struct mail *m = mail_new(MAIL_TRANSFER, 0);
    if (m) {
        m->owner = owner;
        m->seq = seq;
        m->err = err;
    }
    mail_push(w, m);
}

/* ---- posts ---- */

static void post_push(struct worker *w, enum post_type type, uint64_t peer, struct wire_buf *buf,
                      const char *text, int exit_code)
{
    struct post *p = calloc(1, sizeof(*p));
    if (!p) {
        log_error("worker", "out of memory for a message, leaving");
        _exit(1);
    }
    p->type = type;
    p->peer = peer;
    p->exit_code = exit_code;
    p->generation = w->engine_generation;
    if (buf) {
        p->buf = *buf;
        *buf = (struct wire_buf){0};
    }
    if (text)
        snprintf(p->text, sizeof(p->text), "%s", text);
    pthread_mutex_lock(&w->lock);
    *w->post_tail = p;
    w->post_tail = &p->next;
    pthread_mutex_unlock(&w->lock);
    uv_async_send(&w->wake);
}

void worker_post_router(struct worker *w, struct wire_buf *buf)
{
    post_push(w, POST_ROUTER, 0, buf, NULL, 0);
}

void worker_post_peer(struct worker *w, uint64_t peer, struct wire_buf *buf)
{
    post_push(w, POST_PEER, peer, buf, NULL, 0);
}

void worker_peer_connect(struct worker *w, uint64_t peer, const char *endpoint)
{
    post_push(w, POST_CONNECT, peer, NULL, endpoint, 0);
}

void worker_peer_disconnect(struct worker *w, uint64_t peer)
{
    post_push(w, POST_DISCONNECT, peer, NULL, NULL, 0);
}

void worker_quit(struct worker *w, int exit_code, const char *reason)
{
    post_push(w, POST_QUIT, 0, NULL, reason, exit_code);
}

static struct peer *peer_find(struct worker *w, uint64_t key)
{
    for (struct peer *p = w->peers; p; p = p->next)
        if (p->key == key)
            return p;
    return NULL;
}

static struct peer *peer_add(struct worker *w, uint64_t key)
{
    struct peer *p = calloc(1, sizeof(*p));
    if (!p) {
        log_error("worker", "out of memory for a peer, leaving");
        _exit(1);
    }
    p->key = key;
    p->worker = w;
    p->next = w->peers;
    w->peers = p;
    return p;
}

static void peer_remove(struct worker *w, struct peer *gone)
{
    for (struct peer **at = &w->peers; *at; at = &(*at)->next)
        if (*at == gone) {
            *at = gone->next;
            link_line_destroy(gone->line);
            free(gone);
            return;
        }
}

static enum err send_to(struct worker *w, struct post *p)
{
    TRY(wire_end(&p->buf));
    if (p->type == POST_ROUTER)
        return link_line_send(w->router, &p->buf);
    struct peer *peer = peer_find(w, p->peer);
    if (!peer)
        return err_set(ERR_PEER_LOST, "peer %016" PRIx64 " is gone", p->peer);
    return w->hub ? link_hub_send(w->hub, peer->key, &p->buf) : link_line_send(peer->line, &p->buf);
}

static void quit(struct worker *w, int exit_code, const char *reason)
{
    if (w->quitting)
        return;
    w->quitting = true;
    w->exit_code = exit_code;
    snprintf(w->quit_reason, sizeof(w->quit_reason), "%s", reason);
    mail_push(w, mail_new(MAIL_STOP, 0));
    uv_stop(&w->loop);
}

static void on_wake(uv_async_t *a)
{
    struct worker *w = a->data;
    pthread_mutex_lock(&w->lock);
    struct post *p = w->post_head;
    w->post_head = NULL;
    w->post_tail = &w->post_head;
    uint64_t generation = w->generation;
    pthread_mutex_unlock(&w->lock);

    while (p) {
        struct post *next = p->next;
        enum err err = ERR_OK;
        switch (p->type) {
        case POST_ROUTER:
        case POST_PEER:
            if (p->generation == generation)
                err = send_to(w, p);
            if (err != ERR_OK)
                log_debug("link", "message not sent: %s", err_text(err));
            break;
        case POST_CONNECT:
            if (peer_find(w, p->peer))
                break;
            struct peer *peer = peer_add(w, p->peer);
            struct link_limits limits = {.dead_us = DEAD_US, .send_hwm = 100000};
            err = link_line_create(&w->loop, p->text, w->config.role, w->config.hello.instance,
                                   limits, on_line, peer, &peer->line);
            if (err != ERR_OK) {
                log_error("link", "endpoint=%s %s", p->text, err_text(err));
                peer_remove(w, peer);
                break;
            }
            link_line_set_epoch(peer->line, w->epoch);
            break;
        case POST_DISCONNECT:
            if (w->hub)
                link_hub_forget(w->hub, p->peer);
            struct peer *gone = peer_find(w, p->peer);
            if (gone)
                peer_remove(w, gone);
            break;
        case POST_QUIT:
            quit(w, p->exit_code, p->text);
            break;
        }
        wire_buf_finish(&p->buf);
        free(p);
        p = next;
    }
}

/* ---- links ---- */

static void send_hello(struct worker *w)
{
    struct wire_buf buf = {0};
    struct wire_hello *h = wire_begin(&buf, WIRE_HELLO, 0, 0);
    if (h)
        *h = w->config.hello;
    if (wire_end(&buf) == ERR_OK && link_line_send(w->router, &buf) == ERR_OK)
        w->hello_us = clock_now_us();
    wire_buf_finish(&buf);
}

/* The router is gone or has forgotten us: whatever is under way is void. */
static void lose_router(struct worker *w, const char *why)
{
    if (w->welcomed)
        log_warn("link", "router lost, work dropped: %s", why);
    w->welcomed = false;
    mail_push(w, mail_new(MAIL_EPOCH, 0));
    if (link_line_restart(w->router) != ERR_OK)
        quit(w, 1, "cannot reopen the router link");
    else
        send_hello(w);
}

static void on_router(void *user, enum link_event event, const struct wire_msg *m, const char *text)
{
    struct worker *w = user;
    if (event == LINK_LOST) {
        lose_router(w, text);
        return;
    }
    switch (m->head.type) {
    case WIRE_PULSE:
        break;
    case WIRE_WHO:
        // A router that is new, or dropped us; answer at most twice a second.
        if (w->welcomed || clock_now_us() - w->hello_us > 500000u)
            lose_router(w, "it does not know this worker");
        break;
    case WIRE_REFUSE: {
        const struct wire_text *t = m->body;
        log_error("link", "the router refused this worker: %s", t->text);
        // At HELLO: the settings do not fit. Later: the router takes us for stuck; a new start
        // helps.
        quit(w, w->welcomed ? 1 : 2, t->text);
        break;
    }
    case WIRE_WELCOME:
        w->epoch = m->head.epoch;
        w->welcomed = true;
        link_line_set_epoch(w->router, w->epoch);
        if (w->hub)
            link_hub_set_epoch(w->hub, w->epoch);
        for (struct peer *p = w->peers; p; p = p->next)
            if (p->line)
                link_line_set_epoch(p->line, w->epoch);
        log_info("link", "registered epoch=%016" PRIx64, w->epoch);
        mail_push(w, mail_new(MAIL_EPOCH, 0));
        break;
    default:
        if (w->welcomed)
            mail_message(w, MAIL_ROUTER, 0, m);
    }
}

static void peer_lost(struct worker *w, uint64_t key, const char *text)
{
    log_warn("link", "peer=%016" PRIx64 " lost: %s", key, text);
    struct mail *m = mail_new(MAIL_PEER_LOST, 0);
    if (m)
        m->peer = key;
    mail_push(w, m);
}

static void on_hub(void *user, uint64_t key, enum link_event event, const struct wire_msg *m,
                   const char *text)
{
    struct worker *w = user;
    struct peer *p = peer_find(w, key);
    if (event == LINK_LOST) {
        if (p)
            peer_remove(w, p);
        peer_lost(w, key, text);
        return;
    }
    if (!p)
        peer_add(w, key);
    if (m->head.type != WIRE_PULSE)
        mail_message(w, MAIL_PEER, key, m);
}

static void on_line(void *user, enum link_event event, const struct wire_msg *m, const char *text)
{
    struct peer *p = user;
    if (event == LINK_LOST) {
        // The engine decides whether to connect again (GONE from the router forbids it).
        peer_lost(p->worker, p->key, text);
        return;
    }
    if (m->head.type == WIRE_WHO) {
        peer_lost(p->worker, p->key, "it does not know this worker");
        return;
    }
    if (m->head.type != WIRE_PULSE)
        mail_message(p->worker, MAIL_PEER, p->key, m);
}

static void on_beat(uv_timer_t *t)
{
    struct worker *w = t->data;
    if (!w->welcomed) {
        if (clock_now_us() - w->hello_us > 250000u)
            send_hello(w);
        return;
    }
    struct wire_buf buf = {0};
    struct wire_beat *b = wire_begin(&buf, WIRE_BEAT, 0, 0);
    if (b) {
        pthread_mutex_lock(&w->lock);
        *b = w->beat;
        pthread_mutex_unlock(&w->lock);
        b->progress = atomic_load(&w->progress);
        b->busy = atomic_load(&w->busy);
        b->n_stale += link_line_stale(w->router);
    }
    if (wire_end(&buf) == ERR_OK && link_line_send(w->router, &buf) != ERR_OK)
        log_debug("link", "beat not sent");
    wire_buf_finish(&buf);

    for (struct peer *p = w->peers, *next; p; p = next) {
        next = p->next;
        struct wire_buf pulse = {0};
        wire_begin(&pulse, WIRE_PULSE, 0, 0);
        if (wire_end(&pulse) == ERR_OK &&
            (w->hub ? link_hub_send(w->hub, p->key, &pulse) : link_line_send(p->line, &pulse)))
            log_debug("link", "pulse not sent to peer=%016" PRIx64, p->key);
        wire_buf_finish(&pulse);
    }
}

/* ---- life of the process ---- */

static uint64_t random_u64(void)
{
    uint64_t v;
    while (getrandom(&v, sizeof(v), 0) != sizeof(v))
        ;
    return v | 1;
}

enum err worker_create(const struct worker_config *c, struct worker **ret)
{
    struct worker *w = calloc(1, sizeof(*w));
    if (!w)
        return err_set(ERR_NOMEM, "no memory for the worker");
    w->config = *c;
    w->mail_tail = &w->mail_head;
    w->post_tail = &w->post_head;
    pthread_mutex_init(&w->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&w->mail_ready, &attr);
    pthread_cond_init(&w->admin_ready, &attr);
    pthread_condattr_destroy(&attr);
    uv_loop_init(&w->loop);

    struct wire_hello *h = &w->config.hello;
    h->role = c->role;
    h->instance = random_u64();
    h->host = kv_host_id();
    h->pid = (uint64_t)getpid();
    snprintf(h->name, sizeof(h->name), "%s", c->config->name);

    struct link_limits limits = {.dead_us = DEAD_US, .send_hwm = 100000};
    enum err err = ERR_OK;
    if (c->role == WIRE_DECODE) {
        char endpoint[WIRE_MAX_ADDRESS];
        if (c->config->peer_endpoint[0])
            snprintf(endpoint, sizeof(endpoint), "%s", c->config->peer_endpoint);
        else
            snprintf(endpoint, sizeof(endpoint), "ipc:///tmp/baton-decode-%d.sock", (int)getpid());
        err = link_hub_create(&w->loop, endpoint, limits, on_hub, w, &w->hub);
        if (err == ERR_OK)
            snprintf(h->endpoint, sizeof(h->endpoint), "%s", link_hub_endpoint(w->hub));
    }
    if (err == ERR_OK)
        err = link_line_create(&w->loop, c->config->router_endpoint, c->role, h->instance, limits,
                               on_router, w, &w->router);
    if (err == ERR_OK && c->config->admin_socket[0])
        err = admin_create(&w->loop, c->config->admin_socket, on_admin, w, &w->admin);
    if (err != ERR_OK) {
        worker_destroy(w);
        return err;
    }
    uv_async_init(&w->loop, &w->wake, on_wake);
    uv_timer_init(&w->loop, &w->beat_timer);
    uv_signal_init(&w->loop, &w->sigterm);
    uv_signal_init(&w->loop, &w->sigint);
    w->wake.data = w->beat_timer.data = w->sigterm.data = w->sigint.data = w;
    *ret = w;
    return ERR_OK;
}

static void *engine_main(void *arg)
{
    struct worker *w = arg;
    w->engine_fn(w->engine_arg);
    return NULL;
}

int worker_run(struct worker *w, void (*engine)(void *arg), void *arg)
{
    w->engine_fn = engine;
    w->engine_arg = arg;
    uv_timer_start(&w->beat_timer, on_beat, 0, BEAT_MS);
    uv_signal_start(&w->sigterm, on_signal, SIGTERM);
    uv_signal_start(&w->sigint, on_signal, SIGINT);
    if (pthread_create(&w->engine_thread, NULL, engine_main, w) != 0) {
        log_error("worker", "cannot start the engine thread");
        return 1;
    }
    send_hello(w);
    uv_run(&w->loop, UV_RUN_DEFAULT);

    struct wire_buf buf = {0};
    struct wire_text *bye = wire_begin(&buf, WIRE_BYE, 0, 0);
    if (bye)
        snprintf(bye->text, sizeof(bye->text), "%s", w->quit_reason);
    if (wire_end(&buf) == ERR_OK && w->welcomed)
        (void)!link_line_send(w->router, &buf);
    wire_buf_finish(&buf);
    // A stuck engine never reads MAIL_STOP; the process has to end all the same.
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += STOP_S;
    if (pthread_clockjoin_np(w->engine_thread, NULL, CLOCK_MONOTONIC, &until) != 0) {
        log_error("worker", "the engine does not stop, leaving without it");
        _exit(w->exit_code ? w->exit_code : 1);
    }
    return w->exit_code;
}

static void on_signal(uv_signal_t *s, int signum)
{
    struct worker *w = s->data;
    log_info("worker", "signal=%d leaving", signum);
    quit(w, 0, "asked to stop");
}

static void close_walk(uv_handle_t *h, void *arg)
{
    (void)arg;
    if (!uv_is_closing(h))
        uv_close(h, NULL);
}

void worker_destroy(struct worker *w)
{
    if (!w)
        return;
    while (w->peers)
        peer_remove(w, w->peers);
    link_line_destroy(w->router);
    link_hub_destroy(w->hub);
    admin_destroy(w->admin);
    uv_run(&w->loop, UV_RUN_NOWAIT);
    uv_walk(&w->loop, close_walk, NULL);
    uv_run(&w->loop, UV_RUN_DEFAULT);
    uv_loop_close(&w->loop);
    for (struct mail *m = w->mail_head, *next; m; m = next) {
        next = m->next;
        free(m);
    }
    for (struct post *p = w->post_head, *next; p; p = next) {
        next = p->next;
        wire_buf_finish(&p->buf);
        free(p);
    }
    pthread_mutex_destroy(&w->lock);
    pthread_cond_destroy(&w->mail_ready);
    pthread_cond_destroy(&w->admin_ready);
    free(w);
}

uint64_t worker_instance(const struct worker *w) { return w->config.hello.instance; }
uint64_t worker_host(const struct worker *w) { return w->config.hello.host; }

void worker_progress(struct worker *w, bool busy)
{
    atomic_fetch_add(&w->progress, 1);
    atomic_store(&w->busy, busy);
}

void worker_computing(void *worker) { worker_progress(worker, true); }

void worker_set_beat(struct worker *w, const struct wire_beat *beat)
{
    pthread_mutex_lock(&w->lock);
    w->beat = *beat;
    pthread_mutex_unlock(&w->lock);
}

/* ---- admin ---- */

/* Accounting is the engine thread's to tell: ask it by mail and wait, bounded. */
static json_t *on_admin(void *user, const char *command, const char *argument)
{
    (void)argument;
    struct worker *w = user;
    if (!strcmp(command, "drain")) {
        mail_push(w, mail_new(MAIL_DRAIN, 0));
        return json_pack("{s:b}", "draining", 1);
    }
    if (strcmp(command, "accounting") != 0)
        return NULL;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += ADMIN_WAIT_S;
    mail_push(w, mail_new(MAIL_ADMIN, 0));
    pthread_mutex_lock(&w->lock);
    while (!w->admin_answered)
        if (pthread_cond_timedwait(&w->admin_ready, &w->lock, &until) == ETIMEDOUT)
            break;
    json_t *answer = w->admin_answer;
    w->admin_answer = NULL;
    bool answered = w->admin_answered;
    w->admin_answered = false;
    pthread_mutex_unlock(&w->lock);
    if (!answered)
        return json_pack("{s:s}", "error", "the engine thread did not answer");
    json_object_set_new(answer, "pid", json_integer((json_int_t)getpid()));
    json_object_set_new(answer, "registered", json_boolean(w->welcomed));
    json_object_set_new(answer, "stale_messages",
                        json_integer((json_int_t)link_line_stale(w->router)));
    return answer;
}

void worker_admin_answer(struct worker *w, json_t *answer)
{
    pthread_mutex_lock(&w->lock);
    if (w->admin_answer) // the one who asked has given up
        json_decref(w->admin_answer);
    w->admin_answer = answer;
    w->admin_answered = true;
    pthread_cond_signal(&w->admin_ready);
    pthread_mutex_unlock(&w->lock);
}

/* ---- helpers for both mains ---- */

void worker_sample_row(const struct wire_sampling *s, uint32_t position, uint32_t n_output,
                       const int32_t *banned, int n_banned, struct sample_row *ret)
{
    *ret = (struct sample_row){
        .seed = s->seed,
        .position = (int32_t)position,
        .temperature = s->temperature,
        .top_p = s->top_p,
        .min_p = s->min_p,
        .presence = s->presence_penalty,
        .frequency = s->frequency_penalty,
        .repetition = s->repetition_penalty,
        .top_k = s->top_k,
        .n_logprobs = s->n_logprobs,
    };
    if (n_output < s->min_tokens) {
        ret->banned = banned;
        ret->n_banned = n_banned;
    }
}

int worker_stop_ids(const struct wire_sampling *s, const struct model_config *m, int32_t *ret)
{
    int n = 0;
    if (!s->ignore_eos)
        for (int i = 0; i < m->n_eos; i++)
            ret[n++] = m->eos[i];
    for (uint32_t i = 0; i < s->n_stop_ids; i++)
        ret[n++] = s->stop_ids[i];
    return n;
}

enum wire_finish worker_finish(const struct wire_sampling *s, const struct model_config *m,
                               int32_t token, uint32_t n_output)
{
    int32_t ids[MODEL_MAX_EOS + WIRE_MAX_STOP_IDS];
    int n = worker_stop_ids(s, m, ids);
    for (int i = 0; i < n; i++)
        if (ids[i] == token)
            return WIRE_STOP;
    return n_output >= s->max_tokens ? WIRE_LENGTH : WIRE_RUNNING;
}
