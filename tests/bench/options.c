/* options.c: see options.h. */
#include "tests/bench/options.h"

#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/own.h"

struct row {
    const char *name;
    enum { STRING, INTEGER, NUMBER } type;
    size_t at;
    const char *text; // default
    double min, max;
    const char *unit, *help;
};

#define AT(name) offsetof(struct options, name)
static const struct row rows[] = {
#define STR(name, def, unit, help)            {#name, STRING, AT(name), def, 0, 0, unit, help},
#define INT(name, def, min, max, unit, help)  {#name, INTEGER, AT(name), #def, min, max, unit, help},
#define REAL(name, def, min, max, unit, help) {#name, NUMBER, AT(name), #def, min, max, unit, help},
#include "tests/bench/options.def"
#undef STR
#undef INT
#undef REAL
};

/* The four standard workloads: each as the flags it stands for. */
static const struct {
    const char *name;
    const char *flags[3][2];
} workloads[] = {
    {"burst", {{"num_prompts", "2000"}}},
    {"high-conc", {{"num_prompts", "2000"}, {"max_concurrency", "512"}}},
    {"moderate", {{"num_prompts", "2000"}, {"request_rate", "10"}}},
    {"steady", {{"num_prompts", "2000"}, {"request_rate", "5"}}},
};

static void help(void);

static bool same_name(const char *flag, size_t n, const char *name)
{
    if (strlen(name) != n)
        return false;
    for (size_t i = 0; i < n; i++)
        if ((flag[i] == '-' ? '_' : flag[i]) != name[i])
            return false;
    return true;
}

static const struct row *find_row(const char *flag, size_t n)
{
    for (size_t i = 0; i < ARRAY_LEN(rows); i++)
        if (same_name(flag, n, rows[i].name))
            return &rows[i];
    return NULL;
}

struct flag {
    char text[64];
};

/* "--num-prompts", as people write it. */
static struct flag flag_of(const struct row *r)
{
    struct flag f;
    snprintf(f.text, sizeof(f.text), "--%s", r->name);
    for (char *p = f.text; *p; p++)
        *p = *p == '_' ? '-' : *p;
    return f;
}

static enum err set_value(struct options *o, const struct row *r, const char *value)
{
    void *at = (char *)o + r->at;
    if (r->type == STRING) {
        *(const char **)at = value;
        return ERR_OK;
    }
    char *end;
    errno = 0;
    double real = strtod(value, &end);
    bool good = *value && !*end && real >= r->min && real <= r->max;
    if (r->type == INTEGER) {
        long long whole = strtoll(value, &end, 10);
        good = good && !*end && !errno;
        if (good)
            *(int64_t *)at = whole;
    } else if (good) {
        *(double *)at = real;
    }
    if (!good)
        return err_set(ERR_INVALID, "%s is '%s', must be %s between %.15g and %.15g",
                       flag_of(r).text, value, r->type == INTEGER ? "a whole number" : "a number",
                       r->min, r->max);
    return ERR_OK;
}

static enum err set_defaults(struct options *o)
{
    for (size_t i = 0; i < ARRAY_LEN(rows); i++)
        TRY(set_value(o, &rows[i], rows[i].text));
    return ERR_OK;
}

static enum err apply_workload(struct options *o)
{
    for (size_t w = 0; w < ARRAY_LEN(workloads); w++) {
        if (strcmp(workloads[w].name, o->workload) != 0)
            continue;
        for (size_t i = 0; i < 3 && workloads[w].flags[i][0]; i++) {
            const char *const *f = workloads[w].flags[i];
            TRY(set_value(o, find_row(f[0], strlen(f[0])), f[1]));
        }
        return ERR_OK;
    }
    return err_set(ERR_INVALID,
                   "--workload is '%s', must be burst, high-conc, moderate or "
                   "steady",
                   o->workload);
}

/* Reads the flags into o; only: a single one by name, or all. */
static enum err read_flags(int argc, char **argv, const char *only, struct options *o)
{
    for (int i = 0; i < argc; i++) {
        const char *a = argv[i];
        if (!strcmp(a, "--help") || !strcmp(a, "-h")) {
            help();
            exit(0);
        }
        if (strncmp(a, "--", 2) != 0)
            return err_set(ERR_INVALID, "'%s' is no flag; see baton bench --help", a);
        const char *equals = strchr(a, '=');
        size_t n = equals ? (size_t)(equals - a - 2) : strlen(a + 2);
        const struct row *r = find_row(a + 2, n);
        if (!r)
            return err_set(ERR_INVALID, "unknown flag %s; see baton bench --help", a);
        if (!equals && i + 1 >= argc)
            return err_set(ERR_INVALID, "%s needs a value", a);
        const char *value = equals ? equals + 1 : argv[++i];
        if (!only || !strcmp(r->name, only))
            TRY(set_value(o, r, value));
    }
    return ERR_OK;
}

static enum err choose(const char *flag, const char *value, const char *const *words, size_t n,
                       int *ret)
{
    char all[128] = "";
    for (size_t i = 0; i < n; i++) {
        if (!strcmp(value, words[i])) {
            *ret = (int)i;
            return ERR_OK;
        }
        snprintf(all + strlen(all), sizeof(all) - strlen(all), "%s%s",
                 i == 0       ? ""
                 : i + 1 == n ? " or "
                              : ", ",
                 words[i]);
    }
    return err_set(ERR_INVALID, "--%s is '%s', must be %s", flag, value, all);
}

static enum err read_switch(const char *flag, const char *value, bool *ret)
{
    static const char *const words[] = {"off", "on"};
    int at = 0;
    TRY(choose(flag, value, words, 2, &at));
    *ret = at == 1;
    return ERR_OK;
}

static enum err read_slo(const char *text, struct slo *ret)
{
    struct slo slo = {0};
    for (const char *p = text; *p;) {
        const char *colon = strchr(p, ':');
        size_t n = colon ? (size_t)(colon - p) : 0;
        double *at = n == 4 && !strncmp(p, "ttft", 4)   ? &slo.ttft_ms
                     : n == 4 && !strncmp(p, "tpot", 4) ? &slo.tpot_ms
                     : n == 4 && !strncmp(p, "e2el", 4) ? &slo.e2el_ms
                                                        : NULL;
        char *end = NULL;
        double ms = at ? strtod(colon + 1, &end) : 0;
        if (!at || end == colon + 1 || !(ms > 0) || (*end && *end != ','))
            return err_set(ERR_INVALID,
                           "--goodput is '%s', must be like ttft:500,tpot:50,e2el:10000 (ms)",
                           text);
        *at = ms;
        p = *end ? end + 1 : end;
    }
    *ret = slo;
    return ERR_OK;
}

static enum err resolve(struct options *o)
{
    static const char *const endpoints[] = {"completions", "chat", "generate"};
    static const char *const arrivals[] = {"at-once", "poisson", "constant", "recorded"};
    static const char *const forms[] = {"text", "ids", "fit", "auto"};
    static const char *const progress[] = {"on", "off", "auto"};
    int at = 0;
    TRY(choose("endpoint", o->endpoint, endpoints, 3, &at));
    o->endpoint_kind = (enum endpoint)at;
    o->synthetic = !strcmp(o->data, "synthetic");
    TRY(choose("arrivals", o->arrivals, arrivals, 4, &at));
    o->arrival_kind =
        at != ARRIVE_RECORDED && o->request_rate == 0 ? ARRIVE_AT_ONCE : (enum arrivals)at;
    TRY(choose("prompts", o->prompts, forms, 4, &at));
    if (at == 3)
        at = o->synthetic && o->endpoint_kind == ENDPOINT_COMPLETIONS ? PROMPT_IDS : PROMPT_TEXT;
    o->prompt_form = (enum prompt_form)at;
    if (o->prompt_form != PROMPT_TEXT && o->endpoint_kind != ENDPOINT_COMPLETIONS)
        return err_set(ERR_INVALID, "--prompts %s needs --endpoint completions", o->prompts);
    if (o->prompt_form == PROMPT_FIT && o->synthetic)
        return err_set(ERR_INVALID, "--prompts fit needs a file of texts in --data");
    if (o->arrival_kind == ARRIVE_RECORDED && (o->synthetic || o->request_rate > 0))
        return err_set(ERR_INVALID, "--arrivals recorded needs a file in --data and no "
                                    "--request-rate");
    TRY(choose("progress", o->progress, progress, 3, &at));
    TRY(read_switch("ignore_eos", o->ignore_eos, &o->do_ignore_eos));
    TRY(read_switch("shuffle", o->shuffle, &o->do_shuffle));
    TRY(read_switch("repeat", o->repeat, &o->do_repeat));
    return read_slo(o->goodput, &o->slo);
}

enum err options_parse(int argc, char **argv, struct options *ret)
{
    struct options o = {0};
    TRY(set_defaults(&o));
    TRY(read_flags(argc, argv, "workload", &o));
    if (o.workload[0])
        TRY(apply_workload(&o));
    TRY(read_flags(argc, argv, NULL, &o));
    TRY(resolve(&o));
    *ret = o;
    return ERR_OK;
}

static void help(void)
{
    puts("usage: baton bench [flags]                              run one load and measure it\n"
         "       baton bench report RUN.json... --html FILE\n"
         "                                                        compare runs that --json kept\n"
         "\nflags:");
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        const struct row *r = &rows[i];
        printf("  %-20s %s", flag_of(r).text, r->help);
        if (r->text[0])
            printf("%s[%s%s%s]", r->help[0] ? " " : "", r->text, r->unit[0] ? " " : "", r->unit);
        putchar('\n');
    }
}

const char *endpoint_path(enum endpoint e)
{
    static const char *const paths[] = {"/v1/completions", "/v1/chat/completions",
                                        "/generate_stream"};
    return paths[e];
}
