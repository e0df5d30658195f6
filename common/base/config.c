/* config.c: config.def turned into a table, and the sources that fill it.
 *
 * Values come in order from defaults, the file, the environment and the flags; each source goes
 * through value_set, so range, word list and sentence are the same wherever a value came from.
 * A flag or file key of another process is an error that says whose it is. A BATON_ variable of
 * another process is not: one environment serves them all.
 */
#include "common/base/config.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/json.h"
#include "common/base/log.h"
#include "common/base/own.h"

#ifndef BATON_VERSION
#define BATON_VERSION "unknown"
#endif

extern char **environ;

enum kind { KIND_STR, KIND_INT, KIND_REAL, KIND_BOOL };

struct setting {
    const char *name;
    int procs;
    enum kind kind;
    size_t offset;
    const char *str; // defaults, by kind
    int64_t num, min, max;
    double real, real_min, real_max;
    bool on;
    const char *unit, *help;
};

static const struct setting settings[] = {
#define STR(name, procs, def, unit, help)                                                          \
    {#name, procs, KIND_STR, offsetof(struct config, name), def, 0, 0, 0, 0, 0, 0,                 \
     false, unit,  help},
#define INT(name, procs, def, min, max, unit, help)                                                \
    {#name, procs, KIND_INT, offsetof(struct config, name), NULL, def, min, max, 0, 0, 0,          \
     false, unit,  help},
#define REAL(name, procs, def, min, max, unit, help)                                               \
    {#name, procs, KIND_REAL, offsetof(struct config, name), NULL, 0, 0, 0, def, min, max,         \
     false, unit,  help},
#define BOOL(name, procs, def, unit, help)                                                         \
    {#name, procs, KIND_BOOL, offsetof(struct config, name), NULL, 0, 0, 0, 0, 0, 0,               \
     def,   unit,  help},
#include "common/base/config.def"
#undef STR
#undef INT
#undef REAL
#undef BOOL
};

/* Settings that take one of a few words. */
static const struct {
    const char *name;
    const char *words[6];
} choices[] = {
    {"log_level", {"error", "warn", "info", "debug"}},
    {"default_reasoning", {"on", "off"}},
    {"access_log", {"on", "off"}},
    {"tool_call_parser", {"glm47", "none"}},
    {"reasoning_parser", {"glm45", "none"}},
    {"load_format", {"auto", "dummy"}},
    {"kv_transport", {"auto", "ipc", "nccl", "shm", "tcp"}},
    {"kv_checksum", {"on", "off"}},
    {"mtp_mode", {"eagle_with_att", "vanilla_with_att"}},
    {"prefix_cache", {"on", "off"}},
    {"pin", {"auto", "off"}},
};

/* Numbers that a worker can choose by itself. */
static const char *const autos[] = {"mtp_step"};

static const char *const endpoints[] = {"router_endpoint", "peer_endpoint"};

static const struct {
    enum config_proc proc;
    const char *name, *what;
} procs[] = {
    {CONFIG_ROUTER, "baton-router", "takes HTTP requests and places them on workers"},
    {CONFIG_PREFILL, "baton-prefill", "computes prompts and hands their KV pages over"},
    {CONFIG_DECODE, "baton-decode", "generates tokens from handed-over KV pages"},
    {CONFIG_LAUNCHER, "baton serve", "starts a router and its workers on this host"},
};

#define ALL_PROCS (CONFIG_ROUTER | CONFIG_PREFILL | CONFIG_DECODE | CONFIG_LAUNCHER)

/* Where each setting's value came from, for config_log. */
static const char *sources[ARRAY_LEN(settings)];

static enum err value_set(const struct setting *s, const char *value, const char *shown,
                          struct config *c);
static void help_print(enum config_proc proc);

static const char *proc_name(int proc)
{
    for (size_t i = 0; i < ARRAY_LEN(procs); i++)
        if ((int)procs[i].proc == proc)
            return procs[i].name;
    return "?";
}

static const char *proc_list(int bits, char *text, size_t n)
{
    text[0] = 0;
    for (size_t i = 0, at = 0; i < ARRAY_LEN(procs); i++)
        if (bits & (int)procs[i].proc && at < n)
            at += (size_t)snprintf(text + at, n - at, "%s%s", at ? ", " : "", procs[i].name);
    return text;
}

/* name: n bytes, with - or _ and without leading dashes. */
static const struct setting *setting_find(const char *name, size_t n)
{
    for (size_t i = 0; i < ARRAY_LEN(settings); i++) {
        const char *have = settings[i].name;
        size_t k = 0;
        while (k < n && have[k] && (have[k] == name[k] || (have[k] == '_' && name[k] == '-')))
            k++;
        if (k == n && !have[k])
            return &settings[i];
    }
    return NULL;
}

/* ---- strings live until exit ----------------------------------------------------------------- */

static const char *keep(const char *s)
{
    static struct kept {
        struct kept *next;
        char text[];
    } * all;
    size_t n = strlen(s) + 1;
    struct kept *k = malloc(sizeof(*k) + n);
    if (!k)
        return NULL;
    memcpy(k->text, s, n);
    k->next = all;
    all = k;
    return k->text;
}

/* ---- values ---------------------------------------------------------------------------------- */

static enum err check_words(const struct setting *s, const char *value, const char *shown)
{
    for (size_t i = 0; i < ARRAY_LEN(choices); i++) {
        if (strcmp(choices[i].name, s->name))
            continue;
        char list[128] = "";
        for (const char *const *w = choices[i].words; *w; w++) {
            if (!strcmp(*w, value))
                return ERR_OK;
            size_t at = strlen(list);
            snprintf(list + at, sizeof(list) - at, "%s%s", at ? (w[1] ? ", " : " or ") : "", *w);
        }
        return err_set(ERR_INVALID, "%s is '%s', must be %s", shown, value, list);
    }
    return ERR_OK;
}

static enum err check_string(const struct setting *s, const char *value, const char *shown)
{
    TRY(check_words(s, value, shown));
    if (!strcmp(s->name, "device")) {
        const char *n = strncmp(value, "cuda:", 5) ? NULL : value + 5;
        bool good = !strcmp(value, "cpu") || !strcmp(value, "mock") || (n && *n && strlen(n) <= 3);
        for (; good && n && *n; n++)
            good = isdigit((unsigned char)*n);
        if (!good)
            return err_set(ERR_INVALID, "%s is '%s', must be cpu, mock or cuda:N", shown, value);
    }
    for (size_t i = 0; i < ARRAY_LEN(endpoints); i++)
        if (!strcmp(s->name, endpoints[i]) && *value && strncmp(value, "tcp://", 6) &&
            strncmp(value, "ipc://", 6))
            return err_set(ERR_INVALID, "%s is '%s', must start with tcp:// or ipc://", shown,
                           value);
    return ERR_OK;
}

static const char *unit_suffix(const struct setting *s, char *text, size_t n)
{
    snprintf(text, n, "%s%s", *s->unit ? " " : "", s->unit);
    return text;
}

static bool may_be_auto(const struct setting *s)
{
    for (size_t i = 0; i < ARRAY_LEN(autos); i++)
        if (!strcmp(s->name, autos[i]))
            return true;
    return false;
}

static bool is_auto(const json_t *v)
{
    return json_is_string(v) && !strcmp(json_string_value(v), "auto");
}

/* shown: how the user wrote the setting, for the sentence. */
static enum err value_set(const struct setting *s, const char *value, const char *shown,
                          struct config *c)
{
    void *field = (char *)c + s->offset;
    char *end;
    char unit[32];
    errno = 0;
    switch (s->kind) {
    case KIND_STR: {
        TRY(check_string(s, value, shown));
        const char *kept = keep(value);
        if (!kept)
            return err_set(ERR_NOMEM, "no memory for settings");
        *(const char **)field = kept;
        return ERR_OK;
    }
    case KIND_INT: {
        if (may_be_auto(s) && !strcmp(value, "auto")) {
            *(int64_t *)field = CONFIG_AUTO;
            return ERR_OK;
        }
        long long v = strtoll(value, &end, 10);
        if (end == value || *end || isspace((unsigned char)*value))
            return err_set(ERR_INVALID, "%s is '%s', must be an integer%s", shown, value,
                           may_be_auto(s) ? " or auto" : "");
        if (errno == ERANGE || v < s->min || v > s->max)
            return err_set(ERR_INVALID, "%s is %s, must be in %" PRId64 " .. %" PRId64 "%s", shown,
                           value, s->min, s->max, unit_suffix(s, unit, sizeof(unit)));
        *(int64_t *)field = v;
        return ERR_OK;
    }
    case KIND_REAL: {
        double v = strtod(value, &end);
        if (end == value || *end || isspace((unsigned char)*value))
            return err_set(ERR_INVALID, "%s is '%s', must be a number", shown, value);
        if (!(v >= s->real_min && v <= s->real_max))
            return err_set(ERR_INVALID, "%s is %s, must be in %g .. %g%s", shown, value,
                           s->real_min, s->real_max, unit_suffix(s, unit, sizeof(unit)));
        *(double *)field = v;
        return ERR_OK;
    }
    case KIND_BOOL:
        if (strcmp(value, "true") && strcmp(value, "false"))
            return err_set(ERR_INVALID, "%s is '%s', must be true or false", shown, value);
        *(bool *)field = value[0] == 't';
        return ERR_OK;
    }
    return ERR_OK;
}

static void set_defaults(struct config *c)
{
    for (size_t i = 0; i < ARRAY_LEN(settings); i++) {
        const struct setting *s = &settings[i];
        void *field = (char *)c + s->offset;
        switch (s->kind) {
        case KIND_STR:
            *(const char **)field = s->str;
            break;
        case KIND_INT:
            *(int64_t *)field = s->num;
            break;
        case KIND_REAL:
            *(double *)field = s->real;
            break;
        case KIND_BOOL:
            *(bool *)field = s->on;
            break;
        }
        sources[i] = "default";
    }
}

static enum err check_owner(enum config_proc proc, const struct setting *s, const char *shown)
{
    char whose[128];
    if (s->procs & (int)proc)
        return ERR_OK;
    return err_set(ERR_INVALID, "%s is a setting of %s, not of %s", shown,
                   proc_list(s->procs, whose, sizeof(whose)), proc_name(proc));
}

static enum err check_tp(const char *value)
{
    if (strcmp(value, "1"))
        return err_set(ERR_INVALID,
                       "--tp is '%s', must be 1: a worker keeps the whole model on one device; "
                       "scale with more workers",
                       value);
    return ERR_OK;
}

/* ---- sources --------------------------------------------------------------------------------- */

static enum err read_file(enum config_proc proc, const char *path, struct config *c)
{
    json_t *root = NULL;
    TRY(json_parse_file(path, &json_limits_file, &root));

    enum err e = ERR_OK;
    if (!json_is_object(root))
        e = err_set(ERR_INVALID, "%s: must be a JSON object", path);
    const char *key;
    json_t *v;
    json_object_foreach (root, key, v) {
        const struct setting *s = setting_find(key, strlen(key));
        if (!s || !strcmp(s->name, "config")) {
            e = err_set(ERR_INVALID, "%s: '%s' is not a setting", path, key);
            break;
        }
        bool fits = s->kind == KIND_STR    ? json_is_string(v)
                    : s->kind == KIND_INT  ? json_is_integer(v) || (may_be_auto(s) && is_auto(v))
                    : s->kind == KIND_REAL ? json_is_number(v)
                                           : json_is_boolean(v);
        struct json_out text = {0};
        if (json_is_string(v))
            json_out_fmt(&text, "%s", json_string_value(v));
        else if (json_is_integer(v))
            json_out_fmt(&text, "%" JSON_INTEGER_FORMAT, json_integer_value(v));
        else if (json_is_real(v))
            json_out_double(&text, json_real_value(v));
        else
            json_out_fmt(&text, "%s", json_is_true(v) ? "true" : "false");
        json_out_raw(&text, "", 1); // the NUL

        e = check_owner(proc, s, key);
        if (e == ERR_OK && !fits)
            e = err_set(ERR_INVALID, "%s must be %s", key,
                        s->kind == KIND_STR    ? "a string"
                        : s->kind == KIND_INT  ? "an integer"
                        : s->kind == KIND_REAL ? "a number"
                                               : "true or false");
        if (e == ERR_OK)
            e = text.failed ? err_set(ERR_NOMEM, "no memory for settings")
                            : value_set(s, text.data, key, c);
        json_out_finish(&text);
        if (e != ERR_OK) {
            e = err_prefix(e, "%s", path);
            break;
        }
        sources[s - settings] = "file";
    }
    json_decref(root);
    return e;
}

static enum err read_environment(enum config_proc proc, struct config *c)
{
    for (size_t i = 0; i < ARRAY_LEN(settings); i++) {
        const struct setting *s = &settings[i];
        if (!(s->procs & (int)proc))
            continue;
        char var[64] = "BATON_";
        size_t n = strlen(var);
        for (const char *p = s->name; *p && n < sizeof(var) - 1; p++)
            var[n++] = (char)toupper((unsigned char)*p);
        var[n] = 0;
        const char *value = getenv(var);
        if (!value)
            continue;
        TRY(value_set(s, value, var, c));
        sources[i] = "environment";
    }
    return ERR_OK;
}

/* Reads one flag at argv[*at] and moves *at past it and its value. */
static enum err read_flag(enum config_proc proc, int argc, char **argv, int *at, struct config *c)
{
    const char *arg = argv[(*at)++];
    if (strncmp(arg, "--", 2) || !arg[2])
        return err_set(ERR_INVALID, "unexpected argument '%s': settings are --name value", arg);
    const char *name = arg + 2;
    const char *value = strchr(name, '=');
    size_t n = value ? (size_t)(value++ - name) : strlen(name);
    char shown[96];
    snprintf(shown, sizeof(shown), "--%.*s", (int)MIN(n, 80u), name);

    bool is_tp = n == 2 && !memcmp(name, "tp", 2);
    const struct setting *s = is_tp ? NULL : setting_find(name, n);
    if (!s && !is_tp)
        return err_set(ERR_INVALID, "%s is not a setting; see --help", shown);
    if (s)
        TRY(check_owner(proc, s, shown));
    if (!value && s && s->kind == KIND_BOOL) {
        bool given = *at < argc && (!strcmp(argv[*at], "true") || !strcmp(argv[*at], "false"));
        value = given ? argv[(*at)++] : "true";
    }
    if (!value) {
        if (*at >= argc || !strncmp(argv[*at], "--", 2)) // no setting's value starts with --
            return err_set(ERR_INVALID, "%s needs a value", shown);
        value = argv[(*at)++];
    }
    if (is_tp)
        return check_tp(value);
    TRY(value_set(s, value, shown, c));
    sources[s - settings] = "flag";
    return ERR_OK;
}

static enum err read_flags(enum config_proc proc, int argc, char **argv, struct config *c)
{
    for (int at = 1; at < argc;)
        TRY(read_flag(proc, argc, argv, &at, c));
    return ERR_OK;
}

enum err config_parse(enum config_proc proc, int argc, char **argv, struct config *ret)
{
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            help_print(proc);
            exit(0);
        }
        if (!strcmp(argv[i], "--version")) {
            printf("%s %s\n", proc_name(proc), BATON_VERSION);
            exit(0);
        }
    }

    // The file's name comes from the later sources, so these are read twice: once to find it.
    struct config c;
    set_defaults(&c);
    TRY(read_environment(proc, &c));
    TRY(read_flags(proc, argc, argv, &c));
    const char *path = c.config;
    if (*path) {
        set_defaults(&c);
        TRY(read_file(proc, path, &c));
        TRY(read_environment(proc, &c));
        TRY(read_flags(proc, argc, argv, &c));
    }
    *ret = c;
    return ERR_OK;
}

int config_flag_procs(const char *flag, bool *takes_value)
{
    const char *name = strncmp(flag, "--", 2) ? flag : flag + 2;
    size_t n = strcspn(name, "=");
    const struct setting *s = setting_find(name, n);
    bool is_tp = n == 2 && !memcmp(name, "tp", 2);
    *takes_value = !name[n] && (is_tp || (s && s->kind != KIND_BOOL));
    return is_tp ? ALL_PROCS : s ? s->procs : 0;
}

enum err config_check(const char *flag, const char *value, const char *shown)
{
    const char *name = strncmp(flag, "--", 2) ? flag : flag + 2;
    const struct setting *s = setting_find(name, strlen(name));
    struct config unused;
    return s ? value_set(s, value, shown, &unused) : ERR_OK;
}

/* ---- showing --------------------------------------------------------------------------------- */

static const char *value_text(const struct setting *s, const struct config *c, char *text, size_t n)
{
    const void *field = (const char *)c + s->offset;
    switch (s->kind) {
    case KIND_STR:
        return *(const char *const *)field;
    case KIND_INT:
        if (may_be_auto(s) && *(const int64_t *)field == CONFIG_AUTO)
            return "auto";
        snprintf(text, n, "%" PRId64, *(const int64_t *)field);
        return text;
    case KIND_REAL:
        snprintf(text, n, "%g", *(const double *)field);
        return text;
    case KIND_BOOL:
        return *(const bool *)field ? "true" : "false";
    }
    return "";
}

static bool variable_known(const char *var, size_t n)
{
    char name[64];
    if (n >= sizeof(name))
        return false;
    for (size_t i = 0; i < n; i++)
        name[i] = (char)tolower((unsigned char)var[i]);
    name[n] = '\0';
    return setting_find(name, n) || !strcmp(name, "failpoints") || !strcmp(name, "module_dir");
}

void config_log(enum config_proc proc, const struct config *c)
{
    char text[64];
    for (size_t i = 0; i < ARRAY_LEN(settings); i++)
        if (settings[i].procs & (int)proc)
            log_event(strcmp(sources[i], "default") ? LOG_INFO : LOG_DEBUG, "config", "%s=%s (%s)",
                      settings[i].name, value_text(&settings[i], c, text, sizeof(text)),
                      sources[i]);
    // A misspelt variable would otherwise be silence.
    for (char **e = environ; e && *e; e++) {
        size_t n = strcspn(*e, "=");
        if (n > 6 && !strncmp(*e, "BATON_", 6) && !variable_known(*e + 6, n - 6))
            log_warn("config", "variable=%.*s is not a setting, ignored", (int)n, *e);
    }
}

static void help_print_setting(const struct setting *s, const struct config *defaults)
{
    char flag[64], range[96] = "", text[64], unit[32];
    snprintf(flag, sizeof(flag), "--%s%s", s->name,
             s->kind == KIND_INT    ? " N"
             : s->kind == KIND_REAL ? " X"
             : s->kind == KIND_STR  ? " TEXT"
                                    : "");
    for (char *p = flag; *p; p++)
        if (*p == '_')
            *p = '-';
    if (s->kind == KIND_INT && s->max == INT64_MAX)
        snprintf(range, sizeof(range), ", from %" PRId64, s->min);
    else if (s->kind == KIND_INT)
        snprintf(range, sizeof(range), ", %" PRId64 " .. %" PRId64 "%s", s->min, s->max,
                 may_be_auto(s) ? " or auto" : "");
    else if (s->kind == KIND_REAL)
        snprintf(range, sizeof(range), ", %g .. %g", s->real_min, s->real_max);
    const char *def = value_text(s, defaults, text, sizeof(text));
    printf("  %-28s %s\n", flag, s->help);
    printf("  %-28s [%s%s%s]\n", "", *def ? def : "empty", unit_suffix(s, unit, sizeof(unit)),
           range);
}

static void help_print(enum config_proc proc)
{
    static const char *const titles[] = {"Shared with other processes:", "Only for this process:"};
    struct config defaults;
    set_defaults(&defaults);
    for (size_t i = 0; i < ARRAY_LEN(procs); i++)
        if (procs[i].proc == proc)
            printf("%s %s: %s.\n\nUsage: %s [--name value]...\n", procs[i].name, BATON_VERSION,
                   procs[i].what, procs[i].name);
    printf("Sources, later ones win: default, --config FILE (a JSON object), environment\n"
           "BATON_NAME, flag. Below each setting: [default unit, allowed range].\n");
    for (int own = 1; own >= 0; own--) {
        printf("\n%s\n", titles[own]);
        for (size_t i = 0; i < ARRAY_LEN(settings); i++)
            if (settings[i].procs & (int)proc && (settings[i].procs == (int)proc) == own)
                help_print_setting(&settings[i], &defaults);
    }
    if (proc == CONFIG_LAUNCHER)
        printf("\nWhat else a router or a worker takes can be given too, and is passed on: see\n"
               "baton-router --help, baton-prefill --help, baton-decode --help.\n");
    printf("\nOther:\n"
           "  %-28s accepted for 1 only: a worker keeps the whole model on one device\n"
           "  %-28s print this\n"
           "  %-28s print the version\n",
           "--tp N", "--help", "--version");
}
