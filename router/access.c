/* access.c: the key file, the accounts, and the search that tells nothing by its duration.
 *
 * A key that the file no longer has is unlinked at once, so nobody finds it, and lives on without a
 * list until its last request ends.
 */
#include "router/access.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/json.h"
#include "common/base/own.h"
#include "common/base/sha256.h"

#define MAX_LABEL      64
#define MAX_FILE_BYTES (4u << 20)

struct access_key {
    struct access_key *next;
    char label[MAX_LABEL + 1];
    uint8_t hash[SHA256_BYTES];
    struct access_limits limits;
    double tokens; /* may be below zero */
    uint64_t filled_us;
    uint32_t n_running;
    bool unlinked;
};

struct access {
    char *path;
    struct access_limits defaults;
    struct access_key *keys;
    size_t n_keys;
};
DEFINE_OWNED(access)

/* ---- the file ---- */

static void keys_free(struct access_key *list)
{
    for (struct access_key *next; list; list = next) {
        next = list->next;
        if (list->n_running)
            list->unlinked = true;
        else
            free(list);
    }
}

static bool read_label(const char **at, char label[MAX_LABEL + 1])
{
    static const char allowed[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-@";
    size_t n = strspn(*at, allowed);
    if (n == 0 || n > MAX_LABEL || (*at)[n] != ':')
        return false;
    memcpy(label, *at, n);
    label[n] = '\0';
    *at += n + 1;
    return true;
}

static int hex_digit(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

static bool read_hash(const char **at, uint8_t hash[SHA256_BYTES])
{
    for (int i = 0; i < SHA256_BYTES; i++) {
        int high = hex_digit((*at)[0]), low = high < 0 ? -1 : hex_digit((*at)[1]);
        if (low < 0)
            return false;
        hash[i] = (uint8_t)(high << 4 | low);
        *at += 2;
    }
    return true;
}

static bool read_number(const char **at, const char *name, uint64_t max, uint64_t *ret)
{
    size_t n = strlen(name);
    if (strncmp(*at, name, n) != 0)
        return false;
    const char *p = *at + n;
    uint64_t v = 0;
    for (; *p >= '0' && *p <= '9' && v <= max; p++)
        v = v * 10 + (uint64_t)(*p - '0');
    bool ends = *p == '\0' || *p == ' ' || *p == '\t';
    if (p == *at + n || v > max || !ends)
        return false;
    *ret = v;
    *at = p;
    return true;
}

static enum err read_line(const char *at, size_t n_line, const struct access_limits *defaults,
                          struct access_key *ret)
{
    ret->limits = *defaults;
    if (!read_label(&at, ret->label))
        return err_set(ERR_INVALID,
                       "line %zu: must begin with a label of 1 to %d letters, digits or ._-@ and "
                       "a colon",
                       n_line, MAX_LABEL);
    if (!read_hash(&at, ret->hash) || (*at && !strchr(" \t", *at)))
        return err_set(ERR_INVALID, "line %zu: after the label must come 64 hexadecimal digits",
                       n_line);
    for (at += strspn(at, " \t"); *at; at += strspn(at, " \t")) {
        uint64_t v = 0;
        if (read_number(&at, "concurrency=", UINT32_MAX, &v))
            ret->limits.concurrency = (uint32_t)v;
        else if (read_number(&at, "tokens_per_minute=", UINT32_MAX, &v))
            ret->limits.tokens_per_minute = v;
        else
            return err_set(ERR_INVALID,
                           "line %zu: only concurrency=N and tokens_per_minute=N may follow",
                           n_line);
    }
    return ERR_OK;
}

static struct access_key *find_hash(struct access_key *list, const uint8_t *hash)
{
    while (list && memcmp(list->hash, hash, SHA256_BYTES) != 0)
        list = list->next;
    return list;
}

static enum err add_line(char *line, size_t n_line, const struct access_limits *defaults,
                         struct access_key **list)
{
    line[strcspn(line, "\r")] = '\0';
    line += strspn(line, " \t");
    if (!*line || *line == '#')
        return ERR_OK;
    struct access_key key = {0};
    TRY(read_line(line, n_line, defaults, &key));
    if (find_hash(*list, key.hash))
        return err_set(ERR_INVALID, "line %zu: the key is there already", n_line);
    for (const struct access_key *k = *list; k; k = k->next)
        if (!strcmp(k->label, key.label))
            return err_set(ERR_INVALID, "line %zu: the label is there already", n_line);
    struct access_key *k = malloc(sizeof(*k));
    if (!k)
        return err_set(ERR_NOMEM, "no memory for keys");
    *k = key;
    k->tokens = (double)k->limits.tokens_per_minute;
    k->next = *list;
    *list = k;
    return ERR_OK;
}

static enum err keys_read(const struct access *a, struct access_key **ret)
{
    OWNED_MEM char *text = NULL;
    size_t n_bytes;
    TRY(file_read(a->path, MAX_FILE_BYTES, &text, &n_bytes));
    struct access_key *list = NULL;
    enum err e = strlen(text) == n_bytes ? ERR_OK : err_set(ERR_INVALID, "a NUL byte");
    size_t n_line = 0;
    for (char *line = text; line && e == ERR_OK;) {
        char *end = strchr(line, '\n');
        if (end)
            *end = '\0';
        e = add_line(line, ++n_line, &a->defaults, &list);
        line = end ? end + 1 : NULL;
    }
    if (e == ERR_OK && !list)
        e = err_set(ERR_INVALID, "there is no key in it");
    if (e != ERR_OK) {
        keys_free(list);
        return err_prefix(e, "%s", a->path);
    }
    *ret = list;
    return ERR_OK;
}

/* The key as read, or the one of before with the same hash, which holds account and requests. */
static struct access_key *keep_old(struct access_key *fresh, struct access_key **old)
{
    struct access_key **at = old;
    while (*at && memcmp((*at)->hash, fresh->hash, SHA256_BYTES) != 0)
        at = &(*at)->next;
    struct access_key *k = *at;
    if (!k)
        return fresh;
    *at = k->next;
    if (k->limits.tokens_per_minute != fresh->limits.tokens_per_minute)
        k->tokens = fresh->tokens;
    k->limits = fresh->limits;
    memcpy(k->label, fresh->label, sizeof(k->label));
    free(fresh);
    return k;
}

enum err access_reload(struct access *a)
{
    struct access_key *fresh = NULL, *old = a->keys;
    TRY(keys_read(a, &fresh));
    a->keys = NULL;
    a->n_keys = 0;
    for (struct access_key *next; fresh; fresh = next) {
        next = fresh->next;
        struct access_key *k = keep_old(fresh, &old);
        k->next = a->keys;
        a->keys = k;
        a->n_keys++;
    }
    keys_free(old);
    return ERR_OK;
}

enum err access_create(const char *path, const struct access_limits *defaults, struct access **ret)
{
    OWNED(access) a = calloc(1, sizeof(*a));
    if (a)
        a->path = strdup(path);
    if (!a || !a->path)
        return err_set(ERR_NOMEM, "no memory for keys");
    a->defaults = *defaults;
    TRY(access_reload(a));
    *ret = take(&a);
    return ERR_OK;
}

void access_destroy(struct access *a)
{
    if (!a)
        return;
    keys_free(a->keys);
    free(a->path);
    free(a);
}

size_t access_n_keys(const struct access *a) { return a->n_keys; }

/* ---- who ---- */

struct access_key *access_find(const struct access *a, const char *secret, size_t n)
{
    uint8_t hash[SHA256_BYTES];
    struct access_key *found = NULL;
    if (n > ACCESS_MAX_SECRET)
        return NULL;
    sha256(secret, n, hash);
    for (struct access_key *k = a->keys; k; k = k->next) {
        volatile uint8_t differs = 0;
        for (int i = 0; i < SHA256_BYTES; i++)
            differs |= hash[i] ^ k->hash[i];
        found = differs ? found : k;
    }
    return found;
}

const char *access_label(const struct access_key *k) { return k->label; }

/* ---- how much ---- */

static void fill(struct access_key *k, uint64_t now_us)
{
    double most = (double)k->limits.tokens_per_minute;
    if (now_us > k->filled_us) {
        double more = most / 60e6 * (double)(now_us - k->filled_us);
        k->tokens = fmin(k->tokens + more, most);
        k->filled_us = now_us;
    }
}

enum err access_take(struct access_key *k, uint64_t now_us, struct access_state *ret)
{
    double per_s = (double)k->limits.tokens_per_minute / 60;
    fill(k, now_us);
    bool spent = per_s > 0 && k->tokens <= 0;
    bool crowded = k->limits.concurrency && k->n_running >= k->limits.concurrency;
    if (!spent && !crowded)
        k->n_running++;
    *ret = (struct access_state){.limits = k->limits, .n_running = k->n_running, .retry_s = 1};
    if (per_s > 0) {
        ret->tokens_left = (uint64_t)fmax(k->tokens, 0);
        ret->full_s = (uint32_t)ceil(
            fmin(((double)k->limits.tokens_per_minute - k->tokens) / per_s, UINT32_MAX));
    }
    if (spent) {
        ret->retry_s = (uint32_t)fmax(ceil(fmin(-k->tokens / per_s, UINT32_MAX)), 1);
        return err_set(ERR_BUSY, "this key's limit of %llu tokens per minute is reached",
                       (unsigned long long)k->limits.tokens_per_minute);
    }
    if (crowded)
        return err_set(ERR_BUSY, "this key's limit of %u requests at once is reached",
                       k->limits.concurrency);
    return ERR_OK;
}

void access_spend(struct access_key *k, uint64_t n_tokens, uint64_t now_us)
{
    fill(k, now_us);
    if (k->limits.tokens_per_minute)
        k->tokens -= (double)n_tokens;
}

void access_give(struct access_key *k)
{
    k->n_running--;
    if (k->unlinked && k->n_running == 0)
        free(k);
}
