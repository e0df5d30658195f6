/* main.c: the router process: wires configuration, model files, cluster, API and HTTP together, and
 * takes them apart again.
 *
 *   RUNNING -SIGTERM, SIGINT, admin drain-> DRAINING -all answered, or time is up-> CLOSING -> end
 *
 * In DRAINING nothing new is accepted and running answers go on; what is left when drain_timeout_s
 * has passed is cut with an error. In CLOSING the last bytes get a moment to leave. A second signal
 * ends the process at once. SIGQUIT (the launcher is gone, and the workers with it) drains in no
 * time: what runs is cut, with an error.
 */
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <dirent.h>
#include <uv.h>

#include "common/base/admin.h"
#include "common/base/clock.h"
#include "common/base/config.h"
#include "common/base/curve.h"
#include "common/base/log.h"
#include "common/base/metrics.h"
#include "common/base/own.h"
#include "router/api.h"
#include "router/cluster.h"
#include "router/http.h"
#include "router/model_info.h"
#include "router/senders.h"
#include "router/text/tokenizer.h"

#define CHECK_MS 20u
#define FLUSH_US 1000000u /* for the last bytes, once everything is answered */
#define EXIT_MS  5000u    /* for the loop to run empty */

struct router {
    uv_loop_t loop;
    struct config config;
    struct model_info model;
    struct tokenizer *tokenizer;
    struct metrics *metrics;
    struct metric *connections, *exchanges, *rss, *fds;
    struct cluster *cluster;
    struct api *api;
    struct http_handler api_handler;
    struct http_server *http;
    struct admin *admin;
    uv_signal_t sigterm, sigint, sigquit, sighup;
    uv_timer_t check, watchdog;
    bool draining, closing;
    uint64_t started_us;
    uint64_t deadline_us; // of draining, then of closing
};

static enum err start(struct router *r);
static void drain(struct router *r, const char *why);
static void on_signal(uv_signal_t *s, int signum);
static void on_quit(uv_signal_t *s, int signum);
static void on_hangup(uv_signal_t *s, int signum);
static void on_check(uv_timer_t *t);
static void on_watchdog(uv_timer_t *t);
static json_t *on_admin(void *user, const char *command, const char *argument);
static void flush_clients(void *user, bool more);
static void write_metrics(void *user, struct json_out *out);
static void write_status(void *user, struct json_out *out);
static const struct http_handler guard;

int main(int argc, char **argv)
{
    static struct router r;
    signal(SIGPIPE, SIG_IGN);
    log_init("router", LOG_INFO);
    enum err e = config_parse(CONFIG_ROUTER, argc, argv, &r.config);
    if (e != ERR_OK) {
        log_error("main", "%s", err_text(e));
        return err_exit_code(e);
    }
    static const char *const levels[] = {"error", "warn", "info", "debug"};
    for (size_t i = 0; i < ARRAY_LEN(levels); i++)
        if (!strcmp(r.config.log_level, levels[i]))
            log_init("router", (enum log_level)i);
    config_log(CONFIG_ROUTER, &r.config);

    e = curve_load(r.config.curve_key_file, r.config.curve_allow_file, r.config.insecure_tcp);
    if (e == ERR_OK)
        e = start(&r);
    if (e != ERR_OK) {
        log_error("main", "%s", err_text(e));
        return err_exit_code(e);
    }
    uv_run(&r.loop, UV_RUN_DEFAULT);
    uv_close((uv_handle_t *)&r.watchdog, NULL);
    uv_run(&r.loop, UV_RUN_NOWAIT);
    if (uv_loop_close(&r.loop) == 0) {
        metrics_destroy(r.metrics);
        tokenizer_destroy(r.tokenizer);
    }
    log_info("main", "stopped");
    return 0;
}

/* -- start -- */

static bool is_loopback(const char *host)
{
    return !strncmp(host, "127.", 4) || !strcmp(host, "::1") || !strcmp(host, "localhost");
}

static void raise_fd_limit(void)
{
    struct rlimit l;
    if (getrlimit(RLIMIT_NOFILE, &l) == 0 && l.rlim_cur < l.rlim_max) {
        l.rlim_cur = l.rlim_max;
        setrlimit(RLIMIT_NOFILE, &l);
    }
}

/* Readers never see half a number: the file appears under its name when it is whole. */
static enum err write_port_file(const char *path, int port)
{
    char part[4096];
    if ((size_t)snprintf(part, sizeof(part), "%s.part", path) >= sizeof(part))
        return err_set(ERR_INVALID, "port_file: path too long");
    FILE *f = fopen(part, "w");
    if (!f)
        return err_set(ERR_IO, "port_file %s: cannot be written", part);
    bool ok = fprintf(f, "%d\n", port) > 0;
    ok &= fclose(f) == 0;
    if (!ok || rename(part, path))
        return err_set(ERR_IO, "port_file %s: cannot be written", path);
    return ERR_OK;
}

static struct cluster_model model_of(const struct router *r)
{
    const struct config *f = &r->config;
    uint32_t max_total = r->model.max_positions;
    if (f->max_req_total_len > 0)
        max_total = (uint32_t)MIN(f->max_req_total_len, (int64_t)max_total);
    return (struct cluster_model){
        .name = f->served_model_name[0] ? f->served_model_name : r->model.name,
        .max_total_tokens = max_total,
        .vocab = r->model.vocab,
        .n_token_ids = MIN(tokenizer_n_ids(r->tokenizer), r->model.vocab),
        .eos = r->model.eos,
        .n_eos = r->model.n_eos,
        .default_temperature = r->model.temperature,
        .default_top_p = r->model.top_p,
        .default_top_k = r->model.top_k,
    };
}

static void make_process_metrics(struct router *r)
{
    r->connections = metrics_get(r->metrics, METRIC_GAUGE, "baton_http_connections",
                                 "Open client connections", "", NULL, 0);
    r->exchanges = metrics_get(r->metrics, METRIC_GAUGE, "baton_http_exchanges",
                               "Requests between their last byte and their answer's", "", NULL, 0);
    r->rss = metrics_get(r->metrics, METRIC_GAUGE, "process_resident_memory_bytes",
                         "Resident memory size in bytes", "", NULL, 0);
    r->fds = metrics_get(r->metrics, METRIC_GAUGE, "process_open_fds",
                         "Number of open file descriptors", "", NULL, 0);
}

static enum err start(struct router *r)
{
    const struct config *f = &r->config;
    TRY(model_info_load(f->model_dir, &r->model));
    TRY(tokenizer_load(r->model.tokenizer_path, &r->tokenizer));
    raise_fd_limit();
    if (uv_loop_init(&r->loop))
        return err_set(ERR_IO, "no event loop");
    r->metrics = metrics_create();
    if (!r->metrics)
        return err_set(ERR_NOMEM, "no memory for metrics");
    make_process_metrics(r);

    struct cluster_config cc = {
        .loop = &r->loop,
        .config = f,
        .tokenizer = r->tokenizer,
        .model = model_of(r),
        .fingerprint = {.protocol = WIRE_VERSION,
                        .vocab = (uint32_t)r->model.vocab,
                        .tokenizer_hash = r->model.tokenizer_hash},
        .metrics = r->metrics,
        .flush = flush_clients,
        .user = r,
    };
    TRY(cluster_create(&cc, &r->cluster));

    struct api_config ac = {.loop = &r->loop,
                            .config = f,
                            .tokenizer = r->tokenizer,
                            .cluster = r->cluster,
                            .write_metrics = write_metrics,
                            .write_status = write_status,
                            .metrics_user = r};
    TRY(api_create(&ac, &r->api_handler, &r->api));

    struct http_limits limits = http_limits_default;
    limits.max_body_bytes = (size_t)f->max_body_bytes;
    limits.max_connections = (size_t)f->max_connections;
    limits.max_write_buffer = (size_t)f->max_client_buffer;
    TRY(http_server_create(&r->loop, f->host, (int)f->port, &limits, &guard, r, &r->http));
    uint32_t n_threads = f->send_threads > 0 ? (uint32_t)f->send_threads : senders_default();
    TRY(http_server_use_threads(r->http, n_threads));
    if (f->admin_socket[0])
        TRY(admin_create(&r->loop, f->admin_socket, on_admin, r, &r->admin));

    uv_timer_init(&r->loop, &r->check);
    uv_timer_init(&r->loop, &r->watchdog);
    uv_unref((uv_handle_t *)&r->watchdog);
    uv_signal_init(&r->loop, &r->sigterm);
    uv_signal_init(&r->loop, &r->sigint);
    uv_signal_init(&r->loop, &r->sigquit);
    uv_signal_init(&r->loop, &r->sighup);
    r->started_us = clock_now_us();
    r->check.data = r->watchdog.data = r;
    r->sigterm.data = r->sigint.data = r->sigquit.data = r->sighup.data = r;
    uv_signal_start(&r->sigterm, on_signal, SIGTERM);
    uv_signal_start(&r->sigint, on_signal, SIGINT);
    uv_signal_start(&r->sigquit, on_quit, SIGQUIT);
    uv_signal_start(&r->sighup, on_hangup, SIGHUP);

    int port = http_server_port(r->http);
    if (!is_loopback(f->host) && !f->api_key_file[0])
        log_warn("main", "host=%s anyone who reaches this address can use the server", f->host);
    if (f->port_file[0])
        TRY(write_port_file(f->port_file, port));
    bool v6 = strchr(f->host, ':') != NULL;
    log_info("main", "url=http://%s%s%s:%d model=%s max_total_tokens=%u listening", v6 ? "[" : "",
             f->host, v6 ? "]" : "", port, cc.model.name, cc.model.max_total_tokens);
    return ERR_OK;
}

/* -- requests, as long as there is an API -- */

static void guard_headers(void *user, struct http_exchange *x, const struct http_request *q)
{
    struct router *r = user;
    if (r->api && r->api_handler.headers)
        r->api_handler.headers(r->api, x, q);
}

static void say_stopping(struct http_exchange *x)
{
    static const char body[] = "{\"error\":{\"message\":\"the server is stopping\",\"type\":"
                               "\"server_error\",\"param\":null,\"code\":\"unavailable\"}}";
    http_reply(x, 503, "application/json", body, sizeof(body) - 1);
}

static void guard_request(void *user, struct http_exchange *x, const struct http_request *q)
{
    struct router *r = user;
    if (r->api)
        r->api_handler.request(r->api, x, q);
    else
        say_stopping(x);
}

static void guard_gone(void *user, struct http_exchange *x)
{
    struct router *r = user;
    if (r->api)
        r->api_handler.gone(r->api, x);
}

static void guard_refused(void *user, struct http_exchange *x, int status, const char *message,
                          const char *request_id)
{
    struct router *r = user;
    if (r->api)
        r->api_handler.refused(r->api, x, status, message, request_id);
    else
        say_stopping(x);
}

static const struct http_handler guard = {.headers = guard_headers,
                                          .request = guard_request,
                                          .gone = guard_gone,
                                          .refused = guard_refused};

static void on_sent(void *user, size_t n, uint64_t sent_us)
{
    struct router *r = user;
    cluster_sent(r->cluster, n, sent_us);
}

static void flush_clients(void *user, bool more)
{
    struct router *r = user;
    if (r->http)
        http_server_flush(r->http, more, on_sent, r);
}

/* -- stop -- */

static void on_signal(uv_signal_t *s, int signum)
{
    struct router *r = s->data;
    if (r->draining) {
        log_warn("main", "signal=%d second signal, stopping at once", signum);
        _exit(1);
    }
    drain(r, signum == SIGTERM ? "SIGTERM" : "SIGINT");
}

static void on_quit(uv_signal_t *s, int signum)
{
    struct router *r = s->data;
    (void)signum;
    drain(r, "SIGQUIT");
    if (!r->closing)
        r->deadline_us = clock_now_us();
}

/* As daemons do: what can be read again is read again. */
static void on_hangup(uv_signal_t *s, int signum)
{
    struct router *r = s->data;
    size_t n_keys = 0;
    enum err e = r->api ? api_reload_keys(r->api, &n_keys) : ERR_OK;
    if (e != ERR_OK)
        log_error("main", "signal=%d the old keys stay: %s", signum, err_text(e));
    else
        log_info("main", "signal=%d keys=%zu read again", signum, n_keys);
    e = r->cluster ? cluster_reopen_trace(r->cluster) : ERR_OK;
    if (e != ERR_OK)
        log_error("main", "signal=%d the old file stays: %s", signum, err_text(e));
}

static void drain(struct router *r, const char *why)
{
    if (r->draining)
        return;
    r->draining = true;
    r->deadline_us = clock_now_us() + (uint64_t)(r->config.drain_timeout_s * 1e6);
    log_info("main", "why=%s active=%zu draining", why, api_n_active(r->api));
    api_drain(r->api);
    http_server_drain(r->http);
    uv_timer_start(&r->check, on_check, 0, CHECK_MS);
}

static void close_all(struct router *r)
{
    http_server_destroy(r->http);
    cluster_destroy(r->cluster);
    admin_destroy(r->admin);
    r->http = NULL;
    r->cluster = NULL;
    r->admin = NULL;
    uv_close((uv_handle_t *)&r->sigterm, NULL);
    uv_close((uv_handle_t *)&r->sigint, NULL);
    uv_close((uv_handle_t *)&r->sigquit, NULL);
    uv_close((uv_handle_t *)&r->sighup, NULL);
    uv_close((uv_handle_t *)&r->check, NULL);
    uv_timer_start(&r->watchdog, on_watchdog, EXIT_MS, 0);
}

static void on_check(uv_timer_t *t)
{
    struct router *r = t->data;
    uint64_t now = clock_now_us();
    if (r->closing) {
        if (http_server_n_connections(r->http) == 0 || now > r->deadline_us)
            close_all(r);
        return;
    }
    size_t active = api_n_active(r->api);
    if (active > 0 && now < r->deadline_us)
        return;
    if (active > 0)
        log_warn("main", "active=%zu drain_timeout_s passed, cutting", active);
    r->closing = true;
    r->deadline_us = now + FLUSH_US;
    api_destroy(take(&r->api));
}

static void on_watchdog(uv_timer_t *t)
{
    log_warn("main", "something still runs, leaving anyway");
    uv_stop(t->loop);
}

/* -- what operators ask -- */

static double resident_bytes(void)
{
    size_t rss = 0;
    return uv_resident_set_memory(&rss) ? 0 : (double)rss;
}

/* Linux 6.2 and later say how many there are. Reading the directory takes a millisecond of the loop
 * when thousands of clients are connected. */
static int count_fds(void)
{
    struct stat s;
    if (stat("/proc/self/fd", &s) == 0 && s.st_size > 0)
        return (int)s.st_size;
    DIR *d = opendir("/proc/self/fd");
    if (!d)
        return -1;
    int n = 0;
    while (readdir(d))
        n++;
    closedir(d);
    return n - 3; // ".", ".." and the directory itself
}

static void count_handle(uv_handle_t *h, void *user) { ++*(int *)user; }

static const char *state_name(const struct router *r)
{
    return r->closing ? "closing" : r->draining ? "draining" : "running";
}

static json_t *accounting(struct router *r)
{
    int n_handles = 0;
    uv_walk(&r->loop, count_handle, &n_handles);
    json_t *a = json_pack("{s:s, s:s, s:{s:I, s:I}, s:{s:I}, s:i, s:i, s:I}", "process", "router",
                          "state", state_name(r), "http", "connections",
                          (json_int_t)http_server_n_connections(r->http), "exchanges",
                          (json_int_t)http_server_n_exchanges(r->http), "api", "active",
                          (json_int_t)(r->api ? api_n_active(r->api) : 0), "handles", n_handles,
                          "fds", count_fds(), "rss_bytes", (json_int_t)resident_bytes());
    json_t *c = cluster_accounting(r->cluster);
    if (a && c)
        json_object_update(a, c);
    json_decref(c);
    return a;
}

static json_t *on_admin(void *user, const char *command, const char *argument)
{
    struct router *r = user;
    if (!strcmp(command, "accounting"))
        return accounting(r);
    if (!strcmp(command, "drain")) {
        drain(r, "admin");
        return json_pack("{s:b}", "draining", 1);
    }
    return NULL;
}

static void write_metrics(void *user, struct json_out *out)
{
    struct router *r = user;
    metric_set(r->connections, (double)http_server_n_connections(r->http));
    metric_set(r->exchanges, (double)http_server_n_exchanges(r->http));
    metric_set(r->rss, resident_bytes());
    metric_set(r->fds, count_fds());
    cluster_update_metrics(r->cluster);
    metrics_write(r->metrics, out);
}

/* Four digits are enough for curves; everything else is whole. */
static void write_status(void *user, struct json_out *out)
{
    struct router *r = user;
    json_t *all = json_pack("{s:s, s:s, s:{s:I, s:I, s:I, s:I}, s:o*}", "version", BATON_VERSION,
                            "state", state_name(r), "router", "uptime_s",
                            (json_int_t)((clock_now_us() - r->started_us) / 1000000u),
                            "connections", (json_int_t)http_server_n_connections(r->http),
                            "exchanges", (json_int_t)http_server_n_exchanges(r->http), "rss_bytes",
                            (json_int_t)resident_bytes(), "cluster", cluster_status(r->cluster));
    char *text = all ? json_dumps(all, JSON_COMPACT | JSON_REAL_PRECISION(4)) : NULL;
    json_decref(all);
    if (text)
        json_out_raw(out, text, strlen(text));
    else
        out->failed = true;
    free(text);
}
