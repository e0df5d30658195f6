/* supervisor.c: see supervisor.h.
 *
 *   STARTING -all ready-> SERVING -signal-> DRAINING -router gone-> STOPPING -5 s-> KILLING
 *       |                    |                                         ^               ^
 *       +---- cannot go on --+-----------------------------------------+  2nd signal --+
 *
 * 1. A process that dies is started again after 0.2 s, then 0.4 s ... 5 s. A worker that dies a
 *    fourth time within 5 minutes stays down; the router never does, all traffic needs it.
 * 2. Exit code 2 means "my settings are wrong": starting again would not help.
 * 3. Draining starts at the router, because only it knows when the last answer is out. Until then
 *    workers that die are started again: the answers that run go on there.
 * 4. Children are in process groups of their own, so that Ctrl-C reaches the launcher alone and
 * rule 3 holds.
 * 5. PR_SET_PDEATHSIG ends them at once if the launcher is killed: workers leave, and the router
 * has nothing to drain for. SIGQUIT tells it so.
 *
 * We fork ourselves rather than by uv_spawn, which has no place for the prctl. Nothing else forks
 * or runs threads here, so SIGCHLD is ours.
 */
#include "deploy/supervisor.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
#include <uv.h>

#include "common/base/log.h"
#include "common/base/own.h"
#include "deploy/cpus.h"
#include "deploy/notify.h"
#include "deploy/probe.h"

#define RESTART_FIRST_MS  200
#define RESTART_MAX_MS    5000
#define RESTART_LIVED_MS  30000 // after that long the next delay is the first one again
#define RESTART_WINDOW_MS (5 * 60 * 1000)
#define MAX_RESTARTS      3
#define STOP_MS           5000 // SIGTERM to SIGKILL for workers
#define DRAIN_SLACK_MS    2000 // the router ends its own drain first
#define TWICE_MS          300  // two signals within that are one wish: timeout(1) sends two
#define EXIT_SETTINGS     2

enum phase { STARTING, SERVING, DRAINING, STOPPING, KILLING };

struct child {
    struct supervisor *s;
    const struct plan_proc *proc;
    uv_timer_t restart;
    pid_t pid;             // 0 = not running
    struct outlet *outlet; // of its current life
    bool given_up;
    uint64_t started_ms, delay_ms;       // delay_ms: before the next restart
    uint64_t restarted_ms[MAX_RESTARTS]; // the latest ones, oldest first
    int n_restarts;                      // used in restarted_ms
    char last_error[256];                // its latest log line at level E, for our own message
};

struct supervisor {
    const struct plan *plan;
    uv_loop_t loop;
    uv_signal_t sigchld, sigint, sigterm, sighup;
    uv_timer_t deadline;
    struct probe *probe;
    struct child *children;
    enum phase phase;
    bool was_ready, colour;
    int exit_code;
    uint64_t started_ms, asked_ms; // asked_ms: last signal to stop, 0 = none
};

/* The reading end of one life of a child: outlives the process until its last line is out. */
struct outlet {
    uv_pipe_t pipe;
    struct child *child;
    size_t n;
    char line[8192];
};

static void start_child(struct child *c);
static void child_gone(struct child *c, int status);
static void restart_later(struct child *c);
static void give_up(struct child *c, const char *how);
static void on_ready(void *user, int port);
static void on_sigchld(uv_signal_t *h, int signum);
static void on_stop_signal(uv_signal_t *h, int signum);
static void on_deadline(uv_timer_t *h);
static void stop_workers(struct supervisor *s);
static void fail(struct supervisor *s, int exit_code);
static void write_pids(struct supervisor *s);
static void say_places(struct supervisor *s);
static void say(struct supervisor *s, enum log_level level, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

int supervise(const struct plan *plan)
{
    struct supervisor *s = calloc(1, sizeof *s);
    struct child *children = calloc(plan->n_procs, sizeof *children);
    if (!s || !children) {
        fprintf(stderr, "baton: out of memory\n");
        free(s);
        free(children);
        return 1;
    }
    s->plan = plan;
    s->children = children;
    s->colour = isatty(STDERR_FILENO);
    signal(SIGPIPE, SIG_IGN);
    uv_loop_init(&s->loop);
    s->loop.data = s;
    s->started_ms = uv_now(&s->loop);
    uv_timer_init(&s->loop, &s->deadline);
    uv_signal_init(&s->loop, &s->sigchld);
    uv_signal_init(&s->loop, &s->sigint);
    uv_signal_init(&s->loop, &s->sigterm);
    uv_signal_init(&s->loop, &s->sighup);
    uv_signal_start(&s->sigchld, on_sigchld, SIGCHLD);
    uv_signal_start(&s->sigint, on_stop_signal, SIGINT);
    uv_signal_start(&s->sigterm, on_stop_signal, SIGTERM);
    uv_signal_start(&s->sighup, on_stop_signal, SIGHUP);

    const char *host = json_string_value(json_object_get(plan->procs[0].flags, "host"));
    OWNED_MEM char *port_file = plan_path(plan, "port");
    enum err e = probe_create(&s->loop, host, port_file, on_ready, s, &s->probe);
    if (e) {
        fprintf(stderr, "baton: %s\n", err_text(e));
        s->exit_code = EXIT_SETTINGS;
    } else {
        const char *model = json_string_value(json_object_get(plan->procs[0].flags, "model_dir"));
        say(s, LOG_INFO, "prefill=%zu decode=%zu run_dir=%s model=%s starting", plan->n_prefill,
            plan->n_decode, plan->run_dir, model);
        for (size_t i = 0; i < plan->n_procs; i++) {
            children[i].s = s;
            children[i].proc = &plan->procs[i];
            uv_timer_init(&s->loop, &children[i].restart);
            children[i].restart.data = &children[i];
        }
        say_places(s);
        for (size_t i = 0; i < plan->n_procs; i++)
            start_child(&children[i]);
        probe_start(s->probe);
        uv_run(&s->loop, UV_RUN_DEFAULT); // ends by uv_stop, when the last child is gone
        for (size_t i = 0; i < plan->n_procs; i++)
            uv_close((uv_handle_t *)&children[i].restart, NULL);
    }
    uv_close((uv_handle_t *)&s->deadline, NULL);
    uv_close((uv_handle_t *)&s->sigchld, NULL);
    uv_close((uv_handle_t *)&s->sigint, NULL);
    uv_close((uv_handle_t *)&s->sigterm, NULL);
    uv_close((uv_handle_t *)&s->sighup, NULL);
    probe_destroy(s->probe);
    uv_run(&s->loop, UV_RUN_DEFAULT); // last log lines, close callbacks
    uv_loop_close(&s->loop);
    int exit_code = s->exit_code;
    free(children);
    free(s);
    return exit_code;
}

/* ---- output ---- */

static void print_prefix(struct supervisor *s, const char *name, size_t idx)
{
    static const int colours[] = {36, 32, 33, 35, 34, 31};
    char prefix[64];
    int n = s->colour ? snprintf(prefix, sizeof prefix, "\033[%dm%-9s\033[0m | ",
                                 colours[idx % ARRAY_LEN(colours)], name)
                      : snprintf(prefix, sizeof prefix, "%-9s | ", name);
    fwrite(prefix, 1, (size_t)n, stderr);
    fflush(stderr);
}

/* An event of our own, in the same columns as the children's. */
static void say(struct supervisor *s, enum log_level level, const char *fmt, ...)
{
    static const char *const names[] = {"error", "warn", "info", "debug"};
    for (size_t i = 0; i < ARRAY_LEN(names); i++)
        if (!strcmp(s->plan->config.log_level, names[i]) && level > (enum log_level)i)
            return;
    char line[2048];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    print_prefix(s, "baton", 0);
    log_event(level, "serve", "%s", line);
}

static void say_places(struct supervisor *s)
{
    char list[512];
    if (s->plan->place_note[0])
        say(s, LOG_WARN, "workers run on any core: %s", s->plan->place_note);
    for (size_t i = 0; i < s->plan->n_procs; i++)
        if (CPU_COUNT(&s->plan->procs[i].cpus))
            say(s, LOG_INFO, "process=%s cpus=%s near its GPU", s->plan->procs[i].name,
                cpus_format(&s->plan->procs[i].cpus, list, sizeof list));
}

static void print_line(struct child *c, const char *line, size_t n, bool progress)
{
    struct supervisor *s = c->s;
    if (progress && !s->colour)
        return; // a bar that redraws itself means nothing in a file
    if (n >= 15 && !memcmp(line + 12, " E ", 3))
        snprintf(c->last_error, sizeof c->last_error, "%.*s", (int)(n - 15), line + 15);
    print_prefix(s, c->proc->name, 1 + (size_t)(c - s->children));
    fwrite(line, 1, n, stderr);
    fputs(progress ? "\033[K\r" : "\n", stderr);
    fflush(stderr);
}

static void outlet_closed(uv_handle_t *h)
{
    struct outlet *o = h->data;
    if (o->child->outlet == o)
        o->child->outlet = NULL;
    free(o);
}

/* n more bytes are in o->line; n < 0: there will be no more. */
static void outlet_feed(struct outlet *o, ssize_t n)
{
    if (n > 0)
        o->n += (size_t)n;
    size_t start = 0;
    for (size_t i = 0; i < o->n; i++) {
        if (o->line[i] == '\n' || o->line[i] == '\r') {
            if (i > start)
                print_line(o->child, o->line + start, i - start, o->line[i] == '\r');
            start = i + 1;
        }
    }
    bool cut = start < o->n && (n < 0 || (start == 0 && o->n == sizeof o->line));
    if (cut) {
        print_line(o->child, o->line + start, o->n - start, false);
        start = o->n;
    }
    memmove(o->line, o->line + start, o->n - start);
    o->n -= start;
}

static void outlet_buffer(uv_handle_t *h, size_t suggested, uv_buf_t *buf)
{
    struct outlet *o = h->data;
    *buf = uv_buf_init(o->line + o->n, (unsigned)(sizeof o->line - o->n));
}

static void outlet_read(uv_stream_t *stream, ssize_t n, const uv_buf_t *buf)
{
    outlet_feed(stream->data, n);
    if (n < 0 && !uv_is_closing((uv_handle_t *)stream))
        uv_close((uv_handle_t *)stream, outlet_closed);
}

/* What a child wrote just before its end may still be in the pipe; it belongs above our own message
 * about that end. */
static void read_last_lines(struct child *c)
{
    struct outlet *o = c->outlet;
    int fd;
    ssize_t n;
    if (!o || uv_fileno((uv_handle_t *)&o->pipe, &fd))
        return;
    while ((n = read(fd, o->line + o->n, sizeof o->line - o->n)) > 0)
        outlet_feed(o, n);
}

/* ---- one child ---- */

static void exec_child(char **argv, const struct plan_proc *proc, int out, pid_t launcher)
{
    for (int i = 1; i < NSIG; i++)
        signal(i, SIG_DFL); // SIGKILL and SIGSTOP refuse
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    unsetenv("NOTIFY_SOCKET"); // ours
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, proc->role == CONFIG_ROUTER ? SIGQUIT : SIGTERM);
    if (getppid() != launcher) // it died before the prctl
        _exit(1);
    if (CPU_COUNT(&proc->cpus))
        sched_setaffinity(0, sizeof proc->cpus,
                          &proc->cpus); // a preference: without it all still works
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (null >= 0)
        dup2(null, STDIN_FILENO);
    dup2(out, STDOUT_FILENO);
    dup2(out, STDERR_FILENO);
    execv(argv[0], argv);
    dprintf(STDERR_FILENO, "cannot start %s: %s\n", argv[0], strerror(errno));
    _exit(127);
}

static void start_child(struct child *c)
{
    struct supervisor *s = c->s;
    int fds[2] = {-1, -1};
    struct outlet *o = calloc(1, sizeof *o);
    char **argv = plan_argv(c->proc);
    if (!o || !argv || pipe2(fds, O_CLOEXEC) < 0) {
        say(s, LOG_ERROR, "process=%s cannot be started: %s", c->proc->name, strerror(errno));
        free(o);
        plan_free_argv(argv);
        restart_later(c);
        return;
    }
    c->last_error[0] = '\0';
    if (c->proc->role == CONFIG_ROUTER) { // or the probe would ask a port of the router's last life
        OWNED_MEM char *port_file = plan_path(s->plan, "port");
        unlink(port_file);
    }
    // Until it has taken our handlers off, a signal to the child would write into the pipe that our
    // loop reads: we would take it for ours.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pid_t launcher = getpid(), pid = fork();
    if (pid == 0)
        exec_child(argv, c->proc, fds[1], launcher);
    int fork_errno = errno;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    plan_free_argv(argv);
    close(fds[1]);
    uv_pipe_init(&s->loop, &o->pipe, 0);
    o->pipe.data = o;
    o->child = c;
    c->outlet = o;
    uv_pipe_open(&o->pipe, fds[0]);
    if (pid < 0) {
        say(s, LOG_ERROR, "process=%s cannot be started: %s", c->proc->name, strerror(fork_errno));
        uv_close((uv_handle_t *)&o->pipe, outlet_closed);
        restart_later(c);
        return;
    }
    c->pid = pid;
    c->started_ms = uv_now(&s->loop);
    uv_read_start((uv_stream_t *)&o->pipe, outlet_buffer, outlet_read);
    write_pids(s);
}

static void on_restart(uv_timer_t *h)
{
    struct child *c = h->data;
    struct supervisor *s = c->s;
    if (s->phase > DRAINING || (s->phase == DRAINING && c->proc->role == CONFIG_ROUTER))
        return;
    start_child(c);
    if (c->pid)
        say(s, LOG_INFO, "process=%s pid=%d started again", c->proc->name, (int)c->pid);
    if (c->pid && s->phase <= SERVING)
        probe_start(s->probe);
}

/* Rule 1. */
static void restart_later(struct child *c)
{
    struct supervisor *s = c->s;
    uint64_t now = uv_now(&s->loop);
    int old = 0;
    while (old < c->n_restarts && now - c->restarted_ms[old] > RESTART_WINDOW_MS)
        old++;
    if (old == 0 && c->n_restarts == MAX_RESTARTS) {
        if (c->proc->role != CONFIG_ROUTER) {
            give_up(c, "keeps dying");
            return;
        }
        old = 1;
    }
    memmove(c->restarted_ms, c->restarted_ms + old,
            (size_t)(c->n_restarts - old) * sizeof *c->restarted_ms);
    c->n_restarts -= old;
    c->restarted_ms[c->n_restarts++] = now;
    bool lived = now - c->started_ms > RESTART_LIVED_MS;
    c->delay_ms = lived || !c->delay_ms ? RESTART_FIRST_MS : MIN(2 * c->delay_ms, RESTART_MAX_MS);
    uv_timer_start(&c->restart, on_restart, c->delay_ms, 0);
}

static size_t n_alive(const struct supervisor *s, enum config_proc role)
{
    size_t n = 0;
    for (size_t i = 0; i < s->plan->n_procs; i++)
        n += s->children[i].proc->role == role && !s->children[i].given_up;
    return n;
}

static void give_up(struct child *c, const char *how)
{
    struct supervisor *s = c->s;
    c->given_up = true;
    bool fatal = n_alive(s, c->proc->role) == 0 || (!s->was_ready && !strcmp(how, "cannot start"));
    say(s, LOG_ERROR, "process=%s %s%s%s; %s", c->proc->name, how, c->last_error[0] ? ": " : "",
        c->last_error, fatal ? "the cluster stops" : "going on without it");
    if (fatal)
        fail(s, !strcmp(how, "cannot start") ? EXIT_SETTINGS : 1);
}

static void child_gone(struct child *c, int status)
{
    struct supervisor *s = c->s;
    read_last_lines(c);
    c->pid = 0;
    write_pids(s);
    char how[96];
    if (WIFSIGNALED(status))
        snprintf(how, sizeof how, "signal=%d was killed (%s)", WTERMSIG(status),
                 strsignal(WTERMSIG(status)));
    else
        snprintf(how, sizeof how, "code=%d exited", WEXITSTATUS(status));
    bool router = c->proc->role == CONFIG_ROUTER;
    bool clean = WIFEXITED(status) ? WEXITSTATUS(status) == 0 : WTERMSIG(status) == SIGTERM;
    if (s->phase <= SERVING || (s->phase == DRAINING && !router)) {
        say(s, LOG_WARN, "process=%s %s", c->proc->name, how);
        // A router that ends by itself before anything worked: the port is taken, or the like. One
        // that did work is started again whatever it says: a file that it misses may come back.
        bool in_vain = router ? !s->was_ready : WEXITSTATUS(status) == EXIT_SETTINGS;
        if (WIFEXITED(status) && in_vain)
            give_up(c, "cannot start");
        else
            restart_later(c);
    } else {
        say(s, clean ? LOG_DEBUG : LOG_WARN, "process=%s %s", c->proc->name, how);
    }
    if (s->phase == DRAINING && router)
        stop_workers(s);
    bool any = false;
    for (size_t i = 0; i < s->plan->n_procs; i++)
        any |= s->children[i].pid != 0;
    if (!any && s->phase > SERVING)
        uv_stop(&s->loop);
}

static void on_sigchld(uv_signal_t *h, int signum)
{
    struct supervisor *s = h->loop->data;
    for (size_t i = 0; i < s->plan->n_procs; i++) {
        int status;
        struct child *c = &s->children[i];
        if (c->pid && waitpid(c->pid, &status, WNOHANG) == c->pid)
            child_gone(c, status);
    }
}

/* ---- the cluster ---- */

static void write_text(struct supervisor *s, const char *path, const char *text)
{
    char tmp[4096];
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    FILE *f = fopen(tmp, "we");
    bool ok = f && fputs(text, f) >= 0;
    if (f)
        ok = !fclose(f) && ok;
    if (!ok || rename(tmp, path) < 0) // by rename: a reader sees all of it or nothing
        say(s, LOG_WARN, "file=%s cannot be written: %s", path, strerror(errno));
}

static void write_pids(struct supervisor *s)
{
    json_t *pids = json_pack("{s:i}", "launcher", (int)getpid());
    for (size_t i = 0; i < s->plan->n_procs; i++)
        json_object_set_new(pids, s->children[i].proc->name, json_integer(s->children[i].pid));
    OWNED_MEM char *text = json_dumps(pids, JSON_INDENT(1));
    OWNED_MEM char *path = plan_path(s->plan, "pids.json");
    if (text)
        write_text(s, path, text);
    json_decref(pids);
}

static void on_ready(void *user, int port)
{
    struct supervisor *s = user;
    if (s->was_ready) {
        say(s, LOG_INFO, "port=%d ready again", port);
        return;
    }
    s->was_ready = true;
    s->phase = SERVING;
    // A router that dies comes back where clients know it.
    json_object_set_new(s->plan->procs[0].flags, "port", json_sprintf("%d", port));
    char url[128];
    snprintf(url, sizeof url, "http://%s:%d\n", probe_url_host(s->probe), port);
    uv_update_time(&s->loop);
    printf("ready: http://%s:%d after %.2f s (%zu prefill, %zu decode)\n", probe_url_host(s->probe),
           port, (double)(uv_now(&s->loop) - s->started_ms) / 1e3, s->plan->n_prefill,
           s->plan->n_decode);
    fflush(stdout);
    notify("READY=1");
    if (s->plan->config.ready_file[0])
        write_text(s, s->plan->config.ready_file, url);
}

static void signal_children(struct supervisor *s, bool router, int signum)
{
    for (size_t i = 0; i < s->plan->n_procs; i++) {
        struct child *c = &s->children[i];
        if (c->pid && (c->proc->role == CONFIG_ROUTER) == router) {
            kill(c->pid, signum);
            kill(c->pid, SIGCONT); // a stopped process would not hear it
        }
    }
}

static void on_stop_signal(uv_signal_t *h, int signum)
{
    struct supervisor *s = h->loop->data;
    uint64_t now = uv_now(&s->loop), since = now - s->asked_ms;
    if (s->asked_ms && since < TWICE_MS)
        return;
    s->asked_ms = now;
    if (s->phase > SERVING) {
        say(s, LOG_WARN, "asked twice, killing what is left");
        s->phase = KILLING;
        signal_children(s, true, SIGKILL);
        signal_children(s, false, SIGKILL);
        return;
    }
    say(s, LOG_INFO, "timeout_s=%g draining; once more to end at once",
        s->plan->config.drain_timeout_s);
    notify("STOPPING=1");
    probe_stop(s->probe);
    if (!s->children[0].pid) {
        stop_workers(s);
        return;
    }
    s->phase = DRAINING;
    signal_children(s, true, SIGTERM);
    uv_timer_start(&s->deadline, on_deadline,
                   (uint64_t)(s->plan->config.drain_timeout_s * 1e3) + DRAIN_SLACK_MS, 0);
}

static void stop_workers(struct supervisor *s)
{
    s->phase = STOPPING;
    probe_stop(s->probe);
    signal_children(s, true, SIGTERM);
    signal_children(s, false, SIGTERM);
    uv_timer_start(&s->deadline, on_deadline, STOP_MS, 0);
    for (size_t i = 0; i < s->plan->n_procs; i++)
        if (s->children[i].pid)
            return;
    uv_stop(&s->loop);
}

static void on_deadline(uv_timer_t *h)
{
    struct supervisor *s = h->loop->data;
    if (s->phase == DRAINING) {
        say(s, LOG_WARN, "the router did not end in time");
        signal_children(s, true, SIGKILL);
        stop_workers(s);
        return;
    }
    say(s, LOG_WARN, "workers did not end in time, killing them");
    s->phase = KILLING;
    signal_children(s, true, SIGKILL);
    signal_children(s, false, SIGKILL);
}

static void fail(struct supervisor *s, int exit_code)
{
    if (!s->exit_code)
        s->exit_code = exit_code;
    if (s->phase <= SERVING)
        stop_workers(s);
}
