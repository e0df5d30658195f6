/* constraint.c: see constraint.h. */
#include "common/grammar/constraint.h"

#include <assert.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "common/base/hash.h"
#include "common/base/wire.h"

static_assert(GRAMMAR_MAX_BYTES == WIRE_MAX_GRAMMAR, "what compiles can travel");

#define MAX_UNUSED        64          /* grammars kept without a user */
#define MAX_MATCHER_BYTES (32u << 20) /* then all but the states in use are dropped */
#define MAX_UNUSED_BYTES  (256u << 20)

/* A grammar in use, or used lately. */
struct entry {
    struct entry *next; /* latest use first */
    struct grammar *grammar;
    struct matcher *matcher;
    struct constraint *users;
    uint32_t n_users;
    size_t limit; /* of the matcher's bytes */
    uint64_t hash;
    size_t n;
    char text[];
};

struct constraint {
    struct constraint *next; /* of the same entry */
    struct entry *entry;
    struct grammar_state state;
};

struct constraints {
    struct grammar_vocab *vocab; /* NULL: no tokenizer.json */
    struct entry *entries;
};

enum err constraints_create(const char *dir, int32_t n_logits, const int32_t *eos, int n_eos,
                            struct constraints **ret)
{
    char path[PATH_MAX];
    OWNED(constraints) cs = calloc(1, sizeof(*cs));
    if (!cs)
        return err_set(ERR_NOMEM, "no memory for grammars");
    if ((size_t)snprintf(path, sizeof(path), "%s/tokenizer.json", dir) >= sizeof(path))
        return err_set(ERR_INVALID, "the path %.100s... is too long", dir);
    enum err err = grammar_vocab_load(path, n_logits, eos, n_eos, &cs->vocab);
    if (err != ERR_OK && err != ERR_NOT_FOUND)
        return err;
    *ret = take(&cs);
    return ERR_OK;
}

static void entry_destroy(struct entry *e)
{
    if (!e)
        return;
    matcher_destroy(e->matcher);
    grammar_destroy(e->grammar);
    free(e);
}
DEFINE_OWNED(entry)

void constraints_destroy(struct constraints *cs)
{
    if (!cs)
        return;
    for (struct entry *e = cs->entries, *next; e; e = next) {
        next = e->next;
        assert(!e->users);
        entry_destroy(e);
    }
    grammar_vocab_destroy(cs->vocab);
    free(cs);
}

static enum err entry_create(struct constraints *cs, const char *text, size_t n, uint64_t hash,
                             struct entry **ret)
{
    OWNED(entry) e = calloc(1, sizeof(*e) + n);
    if (!e)
        return err_set(ERR_NOMEM, "no memory for a grammar");
    e->hash = hash;
    e->limit = MAX_MATCHER_BYTES;
    e->n = n;
    memcpy(e->text, text, n);
    TRY(grammar_compile(text, n, &e->grammar));
    TRY(matcher_create(e->grammar, cs->vocab, &e->matcher));
    *ret = take(&e);
    return ERR_OK;
}

/* The grammar's entry, in front. */
static enum err entry_get(struct constraints *cs, const char *text, size_t n, struct entry **ret)
{
    uint64_t hash = hash_bytes(0, text, n);
    struct entry *found = NULL;
    for (struct entry **at = &cs->entries; *at; at = &(*at)->next) {
        struct entry *e = *at;
        if (e->hash != hash || e->n != n || memcmp(e->text, text, n))
            continue;
        *at = e->next;
        found = e;
        break;
    }
    if (!found)
        TRY(entry_create(cs, text, n, hash, &found));
    found->next = cs->entries;
    cs->entries = found;
    *ret = found;
    return ERR_OK;
}

enum err constraint_create(struct constraints *cs, const char *text, size_t n, const int32_t *ids,
                           size_t n_ids, struct constraint **ret)
{
    if (!cs->vocab)
        return err_set(ERR_INVALID, "the checkpoint has no tokenizer.json, which grammars need");
    OWNED(constraint) c = calloc(1, sizeof(*c));
    if (!c)
        return err_set(ERR_NOMEM, "no memory for a grammar");
    struct entry *e;
    TRY(entry_get(cs, text, n, &e));
    c->entry = e;
    c->state = matcher_start(e->matcher);
    c->next = e->users;
    e->users = c;
    e->n_users++;
    for (size_t i = 0; i < n_ids; i++) {
        bool fits;
        TRY(matcher_accept(e->matcher, &c->state, ids[i], &fits));
        if (!fits)
            return err_set(ERR_INVALID, "output token %zu, id %d, does not fit the grammar", i,
                           ids[i]);
    }
    *ret = take(&c);
    return ERR_OK;
}

void constraint_destroy(struct constraint *c)
{
    if (!c)
        return;
    if (c->entry) {
        struct constraint **at = &c->entry->users;
        while (*at != c)
            at = &(*at)->next;
        *at = c->next;
        c->entry->n_users--;
    }
    free(c);
}

struct grammar_state constraint_state(const struct constraint *c) { return c->state; }

enum err constraint_mask(struct constraint *c, struct grammar_state s, const uint32_t **ret)
{
    return matcher_mask(c->entry->matcher, s, ret);
}

enum err constraint_accept(struct constraint *c, struct grammar_state *s, int32_t id,
                           bool *ret_fits)
{
    return matcher_accept(c->entry->matcher, s, id, ret_fits);
}

enum err constraint_advance(struct constraint *c, int32_t id)
{
    bool fits;
    TRY(matcher_accept(c->entry->matcher, &c->state, id, &fits));
    return fits ? ERR_OK : err_set(ERR_INTERNAL, "id %d does not fit the grammar", id);
}

/* What fails for lack of memory is tried again. */
static void trim_states(struct entry *e)
{
    if (matcher_bytes(e->matcher) <= e->limit)
        return;
    OWNED_MEM struct grammar_state **live = malloc((e->n_users + 1) * sizeof(*live));
    size_t n = 0;
    for (struct constraint *c = e->users; live && c; c = c->next)
        live[n++] = &c->state;
    if (live && matcher_trim(e->matcher, e->limit, live, n) == ERR_OK)
        e->limit = MAX(MAX_MATCHER_BYTES, 2 * matcher_bytes(e->matcher));
}

void constraints_trim(struct constraints *cs)
{
    uint32_t n_unused = 0;
    size_t bytes = 0;
    for (struct entry **at = &cs->entries; *at;) {
        struct entry *e = *at;
        trim_states(e);
        if (!e->users) {
            n_unused++;
            bytes += matcher_bytes(e->matcher);
        }
        if (!e->users && (n_unused > MAX_UNUSED || bytes > MAX_UNUSED_BYTES)) {
            *at = e->next;
            entry_destroy(e);
        } else {
            at = &e->next;
        }
    }
}
