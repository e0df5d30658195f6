/* plan.c: see plan.h.
 *
 * A flag on the command line goes to every process that knows it (config.def says which), so
 * `--mtp-step 2` reaches prefill and decode workers and `--max-queued 10` only the router. A
 * topology file has flags for all and for each; the command line wins over it, and a --config
 * file counts as command line. Endpoints, sockets and names are the launcher's to choose: they must
 * agree between processes.
 */
#include "deploy/plan.h"

#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/base/json.h"
#include "common/base/own.h"

/* "/decode-63.admin" must still fit into sun_path (108 bytes). */
#define MAX_RUN_DIR 88

static enum err flags_from_argv(int argc, char **argv, json_t *cli);
static enum err flags_from_file(json_t *cli);
static enum err launcher_config(struct plan *p, const json_t *cli);
static enum err check_ready_file(const struct plan *p);
static enum err make_run_dir(struct plan *p);
static enum err procs_from_counts(struct plan *p, const json_t *cli);
static enum err procs_from_topology(struct plan *p, const json_t *cli);
static enum err wire_up(struct plan *p, const json_t *cli);
static enum err find_program(const char *name, char **ret);
static enum err demo_model(char **ret);

static const char *const ours[] = {"admin_socket", "port_file", "peer_endpoint", "router_endpoint",
                                   "name"};

enum err plan_create(int argc, char **argv, struct plan **ret)
{
    json_auto_t *cli = json_object();
    struct plan *p = calloc(1, sizeof *p);
    if (!cli || !p) {
        free(p);
        return err_set(ERR_NOMEM, "out of memory");
    }
    enum err e = flags_from_argv(argc, argv, cli);
    if (!e)
        e = flags_from_file(cli);
    if (!e)
        e = launcher_config(p, cli);
    if (!e)
        e = p->config.topology[0] ? procs_from_topology(p, cli) : procs_from_counts(p, cli);
    unsetenv("BATON_BIN_DIR"); // ours alone; the children would wonder about it
    if (!e)
        e = check_ready_file(p);
    if (!e)
        e = make_run_dir(p);
    if (!e)
        e = wire_up(p, cli);
    if (e) {
        plan_destroy(p);
        return e;
    }
    *ret = p;
    return ERR_OK;
}

void plan_destroy(struct plan *p)
{
    if (!p)
        return;
    for (size_t i = 0; i < p->n_procs; i++) {
        if (p->made_run_dir) { // only names that we gave out: nothing of the user's can be hit
            char file[64];
            snprintf(file, sizeof file, "%s.admin", p->procs[i].name);
            OWNED_MEM char *admin = plan_path(p, file);
            snprintf(file, sizeof file, "%s.sock", p->procs[i].name);
            OWNED_MEM char *sock = plan_path(p, file);
            unlink(admin);
            unlink(sock);
        }
        free(p->procs[i].exe);
        json_decref(p->procs[i].flags);
    }
    if (p->made_run_dir) {
        OWNED_MEM char *port = plan_path(p, "port");
        OWNED_MEM char *pids = plan_path(p, "pids.json");
        unlink(port);
        unlink(pids);
        rmdir(p->run_dir);
    }
    plan_free_argv(p->config_argv);
    free(p->procs);
    free(p->run_dir);
    free(p);
}

static char *text(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static char *text(const char *fmt, ...)
{
    char *s;
    va_list ap;
    va_start(ap, fmt);
    int n = vasprintf(&s, fmt, ap);
    va_end(ap);
    if (n < 0)
        abort(); // a few bytes at startup
    return s;
}

char *plan_path(const struct plan *p, const char *file) { return text("%s/%s", p->run_dir, file); }

/* ---- flags ---- */

/* "--max-queued" and "max_queued" become "max_queued". */
static char *flag_key(const char *flag, size_t n)
{
    while (n && *flag == '-')
        flag++, n--;
    char *key = strndup(flag, n);
    if (!key)
        abort();
    for (char *c = key; *c; c++)
        if (*c == '-')
            *c = '_';
    return key;
}

static bool is_ours(const char *key)
{
    for (size_t i = 0; i < ARRAY_LEN(ours); i++)
        if (!strcmp(key, ours[i]))
            return true;
    return false;
}

static enum err set_flag(json_t *flags, const char *key, const char *value)
{
    if (json_object_set_new(flags, key, json_string(value)) < 0)
        return err_set(ERR_INVALID, "--%s: the value is not UTF-8 text", key);
    return ERR_OK;
}

static enum err flags_from_argv(int argc, char **argv, json_t *cli)
{
    for (int i = 0; i < argc; i++) {
        const char *a = argv[i];
        if (!strcmp(a, "-h") || !strcmp(a, "--help"))
            a = "--help";
        if (strncmp(a, "--", 2) || !a[2])
            return err_set(ERR_INVALID, "unexpected argument '%s': flags start with --", a);
        const char *eq = strchr(a, '=');
        OWNED_MEM char *key = flag_key(a, eq ? (size_t)(eq - a) : strlen(a));
        if (is_ours(key))
            return err_set(ERR_INVALID,
                           "--%s is chosen by `baton serve` for every process; to set "
                           "it, start the processes one by one",
                           key);
        bool takes_value = true;
        int procs = config_flag_procs(key, &takes_value);
        const char *value = "true";
        if (eq) {
            value = eq + 1;
        } else if (!procs) {
            value = i + 1 < argc && strncmp(argv[i + 1], "--", 2) ? argv[++i] : "";
        } else if (takes_value) {
            if (++i == argc)
                return err_set(ERR_INVALID, "%s needs a value", a);
            value = argv[i];
        } else if (i + 1 < argc &&
                   (!strcmp(argv[i + 1], "true") || !strcmp(argv[i + 1], "false"))) {
            value = argv[++i];
        }
        OWNED_MEM char *shown = text("%.*s", eq ? (int)(eq - a) : (int)strlen(a), a);
        TRY(config_check(key, value, shown));
        TRY(set_flag(cli, key, value));
    }
    return ERR_OK;
}

/* A setting of a JSON file as a flag's value; NULL if it is a list, an object or null. */
static char *value_text(const json_t *value)
{
    if (json_is_string(value))
        return text("%s", json_string_value(value));
    if (json_is_integer(value))
        return text("%" JSON_INTEGER_FORMAT, json_integer_value(value));
    if (json_is_real(value))
        return text("%.17g", json_real_value(value));
    return json_is_boolean(value) ? text("%s", json_is_true(value) ? "true" : "false") : NULL;
}

/* whose: "decode-0: " or "". */
static enum err check_in_file(const char *file, const char *whose, const char *name,
                              const char *key, const char *value)
{
    OWNED_MEM char *shown = text("%s: %s%s", file, whose, name);
    return config_check(key, value, shown);
}

/* --config FILE may hold settings of several processes, each of which would refuse the others'. So
 * the file is read here and its settings become flags, unless a flag or the environment wins. */
static enum err flags_from_file(json_t *cli)
{
    const char *flag = json_string_value(json_object_get(cli, "config"));
    OWNED_MEM char *path = text("%s", flag                     ? flag
                                      : getenv("BATON_CONFIG") ? getenv("BATON_CONFIG")
                                                               : "");
    json_object_del(cli, "config");
    unsetenv("BATON_CONFIG");
    if (!path[0])
        return ERR_OK;
    json_t *root;
    TRY(json_parse_file(path, &json_limits_file, &root));
    enum err e =
        json_is_object(root) ? ERR_OK : err_set(ERR_INVALID, "%s: must be an object", path);
    const char *name;
    json_t *value;
    json_object_foreach (root, name, value) {
        if (e)
            break;
        OWNED_MEM char *key = flag_key(name, strlen(name));
        OWNED_MEM char *variable = text("BATON_%s", key);
        for (char *c = variable; *c; c++)
            *c = (char)toupper((unsigned char)*c);
        OWNED_MEM char *s = value_text(value);
        bool takes_value;
        if (is_ours(key) || !config_flag_procs(key, &takes_value))
            e = err_set(ERR_INVALID, "%s: '%s' is not a setting of `baton serve`", path, name);
        else if (!s)
            e = err_set(ERR_INVALID, "%s: '%s' must be text, a number, true or false", path, name);
        else
            e = check_in_file(path, "", name, key, s);
        if (!e && !json_object_get(cli, key) && !getenv(variable))
            e = set_flag(cli, key, s);
    }
    json_decref(root);
    return e;
}

/* "--max-queued=10", as people write it. */
static char *flag_text(const char *key, const char *value)
{
    char *flag = text("--%s=%s", key, value);
    for (char *c = flag; *c != '='; c++)
        if (*c == '_')
            *c = '-';
    return flag;
}

/* The launcher's own flags; those that nobody knows go along, so that config_parse refuses them in
 * its own words (it knows reasons, for --tp and the like). */
static enum err launcher_config(struct plan *p, const json_t *cli)
{
    char **argv = p->config_argv = calloc(json_object_size(cli) + 2, sizeof *argv);
    if (!argv)
        return err_set(ERR_NOMEM, "out of memory");
    int argc = 0;
    argv[argc++] = text("baton serve");
    const char *key;
    json_t *value;
    bool takes_value;
    json_object_foreach ((json_t *)cli, key, value) {
        int procs = config_flag_procs(key, &takes_value);
        if (!strcmp(key, "help") || !strcmp(key, "version"))
            argv[argc++] = text("--%s", key);
        else if (!procs || procs & CONFIG_LAUNCHER)
            argv[argc++] = flag_text(key, json_string_value(value));
    }
    return config_parse(CONFIG_LAUNCHER, argc, argv, &p->config);
}

static enum err apply_cli(struct plan_proc *p, const json_t *cli)
{
    const char *key;
    json_t *value;
    bool takes_value;
    json_object_foreach ((json_t *)cli, key, value) {
        if (config_flag_procs(key, &takes_value) & (int)p->role)
            TRY(set_flag(p->flags, key, json_string_value(value)));
    }
    return ERR_OK;
}

/* ---- processes ---- */

static enum err add_proc(struct plan *p, enum config_proc role, size_t idx)
{
    struct plan_proc *procs = realloc(p->procs, (p->n_procs + 1) * sizeof *procs);
    if (!procs)
        return err_set(ERR_NOMEM, "out of memory");
    p->procs = procs;
    struct plan_proc *q = &procs[p->n_procs++];
    memset(q, 0, sizeof *q);
    q->role = role;
    q->flags = json_object();
    const char *kind = role == CONFIG_ROUTER    ? "router"
                       : role == CONFIG_PREFILL ? "prefill"
                                                : "decode";
    if (role == CONFIG_ROUTER)
        snprintf(q->name, sizeof q->name, "%s", kind);
    else
        snprintf(q->name, sizeof q->name, "%s-%zu", kind, idx);
    OWNED_MEM char *program = text("baton-%s", kind);
    return find_program(program, &q->exe);
}

static enum err procs_from_counts(struct plan *p, const json_t *cli)
{
    p->n_prefill = (size_t)p->config.prefill;
    p->n_decode = (size_t)p->config.decode;
    TRY(add_proc(p, CONFIG_ROUTER, 0));
    for (size_t i = 0; i < p->n_prefill; i++)
        TRY(add_proc(p, CONFIG_PREFILL, i));
    for (size_t i = 0; i < p->n_decode; i++)
        TRY(add_proc(p, CONFIG_DECODE, i));
    for (size_t i = 0; i < p->n_procs; i++)
        TRY(apply_cli(&p->procs[i], cli));
    return ERR_OK;
}

/* An object of the topology file: {"device": "cuda:0", "mtp_step": 2}. for_all: the one for every
 * process, of which each takes what it knows. */
static enum err apply_object(struct plan_proc *q, const char *file, json_t *object, bool for_all)
{
    const char *whose = for_all ? "all" : q->name;
    if (object && !json_is_object(object))
        return err_set(ERR_INVALID, "%s: %s must be an object of flags", file, whose);
    const char *flag;
    json_t *value;
    json_object_foreach (object, flag, value) {
        OWNED_MEM char *key = flag_key(flag, strlen(flag));
        bool takes_value;
        int procs = config_flag_procs(key, &takes_value);
        if (is_ours(key))
            return err_set(ERR_INVALID, "%s: %s: '%s' is chosen by `baton serve`", file, whose,
                           flag);
        if (!(procs & (for_all ? CONFIG_ROUTER | CONFIG_PREFILL | CONFIG_DECODE : (int)q->role)))
            return err_set(ERR_INVALID, "%s: %s has no flag '%s'", file, whose, flag);
        OWNED_MEM char *s = value_text(value);
        if (!s)
            return err_set(ERR_INVALID, "%s: %s: '%s' must be text, a number, true or false", file,
                           whose, flag);
        OWNED_MEM char *prefix = text("%s: ", whose);
        TRY(check_in_file(file, prefix, flag, key, s));
        if (procs & (int)q->role)
            TRY(set_flag(q->flags, key, s));
    }
    return ERR_OK;
}

static enum err add_from_topology(struct plan *p, enum config_proc role, size_t idx, json_t *all,
                                  json_t *own)
{
    TRY(add_proc(p, role, idx));
    struct plan_proc *q = &p->procs[p->n_procs - 1];
    TRY(apply_object(q, p->config.topology, all, true));
    return apply_object(q, p->config.topology, own, false);
}

static enum err procs_from_topology(struct plan *p, const json_t *cli)
{
    const char *file = p->config.topology;
    if (json_object_get(cli, "prefill") || json_object_get(cli, "decode"))
        return err_set(ERR_INVALID,
                       "--topology %s already says how many workers there are; leave "
                       "--prefill and --decode out",
                       file);
    json_t *root;
    TRY(json_parse_file(file, &json_limits_file, &root));
    json_auto_t *owner = root;
    if (!json_is_object(owner))
        return err_set(ERR_INVALID, "%s: must be an object", file);
    const char *key;
    json_t *value;
    json_object_foreach (owner, key, value) {
        if (strcmp(key, "router") && strcmp(key, "prefill") && strcmp(key, "decode") &&
            strcmp(key, "about") && strcmp(key, "all"))
            return err_set(ERR_INVALID,
                           "%s: unknown key '%s' (about, all, router, prefill, decode)", file, key);
    }
    json_t *all = json_object_get(owner, "all");
    TRY(add_from_topology(p, CONFIG_ROUTER, 0, all, json_object_get(owner, "router")));
    static const struct {
        const char *key;
        enum config_proc role;
    } lists[] = {{"prefill", CONFIG_PREFILL}, {"decode", CONFIG_DECODE}};
    for (size_t l = 0; l < ARRAY_LEN(lists); l++) {
        json_t *list = json_object_get(owner, lists[l].key);
        size_t n = json_array_size(list);
        if (n < 1 || n > 64)
            return err_set(ERR_INVALID, "%s: '%s' must be a list of 1 to 64 workers", file,
                           lists[l].key);
        for (size_t i = 0; i < n; i++)
            TRY(add_from_topology(p, lists[l].role, i, all, json_array_get(list, i)));
        *(lists[l].role == CONFIG_PREFILL ? &p->n_prefill : &p->n_decode) = n;
    }
    for (size_t i = 0; i < p->n_procs; i++)
        TRY(apply_cli(&p->procs[i], cli));
    return ERR_OK;
}

/* What the processes must agree on: endpoints, sockets, names, the model. */
static enum err wire_up(struct plan *p, const json_t *cli)
{
    OWNED_MEM char *demo = NULL;
    const char *model = p->config.model_dir;
    if (!model[0]) {
        TRY(demo_model(&demo));
        model = demo;
    }
    OWNED_MEM char *endpoint = text("ipc://%s/router.sock", p->run_dir);
    for (size_t i = 0; i < p->n_procs; i++) {
        struct plan_proc *q = &p->procs[i];
        OWNED_MEM char *admin = text("%s/%s.admin", p->run_dir, q->name);
        if (!json_object_get(q->flags, "model_dir") || json_object_get(cli, "model_dir"))
            TRY(set_flag(q->flags, "model_dir", model));
        TRY(set_flag(q->flags, "router_endpoint", endpoint));
        TRY(set_flag(q->flags, "admin_socket", admin));
        if (q->role == CONFIG_ROUTER) {
            OWNED_MEM char *port = text("%lld", (long long)p->config.port);
            OWNED_MEM char *port_file = plan_path(p, "port");
            if (!json_object_get(q->flags, "host"))
                TRY(set_flag(q->flags, "host", p->config.host));
            if (!json_object_get(q->flags, "port"))
                TRY(set_flag(q->flags, "port", port));
            TRY(set_flag(q->flags, "port_file", port_file));
        } else {
            OWNED_MEM char *name = text("%s", q->name); // log lines and metrics say decode/0
            *strchr(name, '-') = '/';
            TRY(set_flag(q->flags, "name", name));
        }
        if (q->role == CONFIG_DECODE) {
            OWNED_MEM char *peer = text("ipc://%s/%s.sock", p->run_dir, q->name);
            TRY(set_flag(q->flags, "peer_endpoint", peer));
        }
    }
    return ERR_OK;
}

char **plan_argv(const struct plan_proc *p)
{
    size_t n = json_object_size(p->flags), i = 0;
    char **argv = calloc(n + 2, sizeof *argv);
    if (!argv)
        return NULL;
    argv[i++] = text("%s", p->exe);
    const char *key;
    json_t *value;
    json_object_foreach (p->flags, key, value)
        argv[i++] = text("--%s=%s", key, json_string_value(value));
    return argv;
}

void plan_free_argv(char **argv)
{
    for (char **a = argv; argv && *a; a++)
        free(*a);
    free(argv);
}

/* ---- files ---- */

/* Private (0700), because whoever can open the sockets inside can drive the cluster. */
static enum err make_run_dir(struct plan *p)
{
    const char *wanted = p->config.run_dir;
    if (wanted[0]) {
        if (mkdir(wanted, 0700) == 0)
            p->made_run_dir = true;
        else if (errno != EEXIST)
            return err_set(ERR_IO, "--run-dir %s: %s", wanted, strerror(errno));
        struct stat st;
        p->run_dir = realpath(wanted, NULL);
        if (!p->run_dir || stat(p->run_dir, &st))
            return err_set(ERR_IO, "--run-dir %s: %s", wanted, strerror(errno));
        if (!S_ISDIR(st.st_mode))
            return err_set(ERR_INVALID, "--run-dir %s: is not a directory", wanted);
        if (strlen(p->run_dir) > MAX_RUN_DIR)
            return err_set(ERR_INVALID,
                           "--run-dir %s is longer than %d characters: names of unix "
                           "sockets are limited",
                           p->run_dir, MAX_RUN_DIR);
        return ERR_OK;
    }
    const char *tmp = getenv("TMPDIR");
    if (!tmp || !tmp[0] || strlen(tmp) > MAX_RUN_DIR - 16)
        tmp = "/tmp";
    OWNED_MEM char *path = text("%s/baton-XXXXXX", tmp);
    if (!mkdtemp(path))
        return err_set(ERR_IO, "%s: %s", path, strerror(errno));
    p->run_dir = take(&path);
    p->made_run_dir = true;
    return ERR_OK;
}

/* Whoever waits for the file would wait for ever if it could not be written once all is up. */
static enum err check_ready_file(const struct plan *p)
{
    const char *path = p->config.ready_file, *slash = strrchr(path, '/');
    if (!path[0])
        return ERR_OK;
    OWNED_MEM char *dir = text("%.*s", slash > path ? (int)(slash - path) : 1, slash ? path : ".");
    if (access(dir, W_OK | X_OK) != 0)
        return err_set(ERR_IO, "--ready-file %s: %s: %s", path, dir, strerror(errno));
    return ERR_OK;
}

static char *own_dir(void)
{
    char *exe = realpath("/proc/self/exe", NULL);
    if (exe)
        *strrchr(exe, '/') = '\0';
    return exe ? exe : text(".");
}

/* Beside this program (installed), or in its role's directory of the build tree. */
static enum err find_program(const char *name, char **ret)
{
    const char *env = getenv("BATON_BIN_DIR");
    OWNED_MEM char *self = own_dir();
    const char *dir = env && env[0] ? env : self;
    const char *role = strchr(name, '-') + 1;
    const char *worker = strcmp(role, "router") ? "_worker" : "";
    OWNED_MEM char *beside = text("%s/%s", dir, name);
    OWNED_MEM char *sibling = text("%s/../%s%s/%s", dir, role, worker, name);
    OWNED_MEM char *below = text("%s/%s%s/%s", dir, role, worker, name);
    const char *paths[] = {beside, sibling, below};
    for (size_t i = 0; i < ARRAY_LEN(paths); i++) {
        if (access(paths[i], X_OK) == 0) {
            *ret = realpath(paths[i], NULL);
            return *ret ? ERR_OK : err_set(ERR_IO, "%s: %s", paths[i], strerror(errno));
        }
    }
    return err_set(ERR_NOT_FOUND,
                   "cannot find the program %s in %s: is the build complete? "
                   "(BATON_BIN_DIR names another directory)",
                   name, dir);
}

static enum err demo_model(char **ret)
{
    OWNED_MEM char *self = own_dir();
    OWNED_MEM char *moved = text("%s/../share/baton/demo-model", self);
    const char *paths[] = {moved, BATON_DEMO_SOURCE, BATON_DEMO_INSTALLED};
    for (size_t i = 0; i < ARRAY_LEN(paths); i++) {
        OWNED_MEM char *config = text("%s/config.json", paths[i]);
        if (access(config, R_OK) == 0) {
            *ret = realpath(paths[i], NULL);
            return *ret ? ERR_OK : err_set(ERR_IO, "%s: %s", paths[i], strerror(errno));
        }
    }
    return err_set(ERR_NOT_FOUND, "the demo model is not at %s: give --model-dir",
                   BATON_DEMO_INSTALLED);
}
