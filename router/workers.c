/* workers.c: see workers.h. Tables are small and fixed, so every look-up is a walk. */
#include "router/workers.h"

#include <string.h>

#include "common/base/own.h"

#define MAX_BEAT_GAP_US 500000u /* what one gap between beats adds to a stall at most */

struct worker_entry *workers_add(struct workers *ws, uint64_t peer, const struct wire_hello *hello,
                                 uint64_t now_us)
{
    for (uint32_t i = 0; i < WORKERS_MAX; i++) {
        struct worker_entry *w = &ws->at[i];
        if (w->present)
            continue;
        *w = (struct worker_entry){
            .present = true, .idx = i, .peer = peer, .hello = *hello, .joined_us = now_us};
        ws->n = MAX(ws->n, i + 1);
        return w;
    }
    return NULL;
}

void workers_remove(struct workers *ws, struct worker_entry *w)
{
    w->present = w->active = false;
    for (uint32_t i = 0; i < ws->n; i++)
        ws->at[i].n_paired[w->idx] = 0; // whoever gets the index is another one
    while (ws->n > 0 && !ws->at[ws->n - 1].present)
        ws->n--;
}

struct worker_entry *workers_by_peer(struct workers *ws, uint64_t peer)
{
    for (uint32_t i = 0; i < ws->n; i++)
        if (ws->at[i].present && ws->at[i].peer == peer)
            return &ws->at[i];
    return NULL;
}

struct worker_entry *workers_by_instance(struct workers *ws, uint64_t instance)
{
    for (uint32_t i = 0; i < ws->n; i++)
        if (ws->at[i].present && ws->at[i].hello.instance == instance)
            return &ws->at[i];
    return NULL;
}

struct worker_entry *workers_by_name(struct workers *ws, const char *name)
{
    for (uint32_t i = 0; i < ws->n; i++)
        if (ws->at[i].present && !strcmp(ws->at[i].hello.name, name))
            return &ws->at[i];
    return NULL;
}

uint32_t workers_usable(const struct workers *ws, enum wire_role role)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < ws->n; i++)
        n += ws->at[i].present && ws->at[i].active && ws->at[i].hello.role == role &&
             !ws->at[i].beat.draining;
    return n;
}

bool workers_beat(struct worker_entry *w, const struct wire_beat *b, uint64_t limit_us,
                  uint64_t now_us)
{
    if (!w->active || !b->busy || b->progress != w->beat.progress)
        w->stall_us = 0;
    else
        w->stall_us += MIN(now_us - w->beat_us, MAX_BEAT_GAP_US);
    w->beat = *b;
    w->beat_us = now_us;
    return w->stall_us > limit_us;
}

const char *workers_mismatch(const struct wire_fingerprint *want,
                             const struct wire_fingerprint *got)
{
    struct wire_fingerprint w = *want;
#define ADOPT(field)                                                                               \
    if (!w.field)                                                                                  \
        w.field = got->field;
    ADOPT(n_layers)
    ADOPT(n_mtp_layers)
    ADOPT(page_tokens)
    ADOPT(kv_width)
    ADOPT(kv_dtype)
    ADOPT(vocab)
    ADOPT(hidden)
    ADOPT(model_hash)
    ADOPT(tokenizer_hash)
#undef ADOPT
    return wire_fingerprint_differs(&w, got);
}

const char *worker_role_name(enum wire_role role)
{
    return role == WIRE_PREFILL ? "prefill" : role == WIRE_DECODE ? "decode" : "router";
}
