/* matcher.c: the states of a grammar, made as they are reached.
 *
 * A state is a set of threads (node that takes a symbol, frame to return to), as if all ways to
 * read the output so far were followed at once. Frames are shared: one exists per (node, count,
 * parent). States are numbered, equal ones once; what a state does on a class of symbols is
 * computed once, and so is its mask. So a grammar that a batch shares costs each step a look-up per
 * row.
 *
 * 1. Only live nodes become threads (program.h), so every state but DEAD has a way to the end, and
 *    as each byte is a token, every mask has a bit.
 * 2. Nothing moves or is freed but in matcher_trim.
 */
#include <string.h>

#include "common/base/hash.h"
#include "common/grammar/matcher_impl.h"

#define MAX_STATES (1u << 19) /* between two trims */
#define MAX_FRAMES (1u << 20)
#define MAX_ITEMS  (1u << 22)
#define MAX_WORDS  (1u << 24)
#define MAX_EFFORT (1u << 20) /* threads followed for one mask: what a hostile schema may cost */

static enum err too_large(void)
{
    return err_set(ERR_TOO_LARGE, "the grammar is too ambiguous: too many states in a step");
}

enum err matcher_grow(void *array, uint32_t *cap, uint32_t n, size_t item, uint32_t max)
{
    if (n <= *cap)
        return ERR_OK;
    if (n > max)
        return too_large();
    uint32_t more = MIN(MAX(n, *cap ? *cap * 2 : 64), max);
    void *bigger = realloc(*(void **)array, more * item);
    if (!bigger)
        return err_set(ERR_NOMEM, "no memory for a grammar's states");
    *(void **)array = bigger;
    *cap = more;
    return ERR_OK;
}

/* ---- frames and states, each once ---- */

static uint32_t frame_hash(const struct frame *f) { return (uint32_t)hash_bytes(0, f, sizeof(*f)); }

static uint32_t list_hash(const struct matcher *m, uint32_t l)
{
    return (uint32_t)hash_bytes(0, m->words + m->lists[l].first, m->lists[l].n * sizeof(uint32_t));
}

static uint32_t state_hash(const struct matcher *m, uint32_t s)
{
    const struct state *st = &m->states[s];
    return (uint32_t)hash_bytes(st->accept, m->threads + st->first, st->n * sizeof(struct thread));
}

static uint32_t hash_of(const struct matcher *m, const struct index *x, uint32_t i)
{
    return x == &m->frame_index   ? frame_hash(&m->frames[i])
           : x == &m->state_index ? state_hash(m, i)
                                  : list_hash(m, i);
}

static enum err index_reserve(const struct matcher *m, struct index *x)
{
    if (x->slots && x->n * 2 < x->mask)
        return ERR_OK;
    uint32_t size = x->slots ? (x->mask + 1) * 2 : 256;
    uint32_t *slots = malloc(size * sizeof(*slots));
    if (!slots)
        return err_set(ERR_NOMEM, "no memory for a grammar's states");
    memset(slots, 0xff, size * sizeof(*slots));
    for (uint32_t i = 0; i < x->n; i++) {
        uint32_t at = hash_of(m, x, i);
        while (slots[at & (size - 1)] != UNKNOWN)
            at++;
        slots[at & (size - 1)] = i;
    }
    free(x->slots);
    x->slots = slots;
    x->mask = size - 1;
    return ERR_OK;
}

static enum err frame_get(struct matcher *m, struct frame f, uint32_t *ret)
{
    TRY(index_reserve(m, &m->frame_index));
    uint32_t *slots = m->frame_index.slots, mask = m->frame_index.mask, at = frame_hash(&f);
    for (; slots[at & mask] != UNKNOWN; at++)
        if (!memcmp(&m->frames[slots[at & mask]], &f, sizeof(f))) {
            *ret = slots[at & mask];
            return ERR_OK;
        }
    TRY(matcher_grow(&m->frames, &m->cap_frames, m->n_frames + 1, sizeof(f), MAX_FRAMES));
    m->frames[m->n_frames] = f;
    slots[at & mask] = m->n_frames;
    m->frame_index.n++;
    *ret = m->n_frames++;
    return ERR_OK;
}

/* The state of m->found, which is sorted. */
static enum err state_get(struct matcher *m, uint32_t *ret)
{
    uint32_t n_classes = m->g->n_classes, cap = m->cap_states;
    TRY(index_reserve(m, &m->state_index));
    TRY(matcher_grow(&m->threads, &m->cap_threads, m->n_threads + m->n_found + 1,
                     sizeof(*m->threads), MAX_ITEMS));
    TRY(matcher_grow(&m->states, &m->cap_states, m->n_states + 1, sizeof(*m->states), MAX_STATES));
    if (cap != m->cap_states) {
        uint32_t *next = realloc(m->next, (size_t)m->cap_states * n_classes * sizeof(*next));
        if (!next) {
            m->cap_states = cap;
            return err_set(ERR_NOMEM, "no memory for a grammar's states");
        }
        m->next = next;
    }
    uint32_t s = m->n_states;
    m->states[s] = (struct state){.first = m->n_threads,
                                  .n = m->n_found,
                                  .plain = UNKNOWN,
                                  .returned = NO_FRAME,
                                  .tails = UNKNOWN,
                                  .accept = m->found_accept};
    memcpy(m->threads + m->n_threads, m->found, m->n_found * sizeof(*m->found));
    uint32_t *slots = m->state_index.slots, mask = m->state_index.mask, at = state_hash(m, s);
    for (; slots[at & mask] != UNKNOWN; at++) {
        const struct state *old = &m->states[slots[at & mask]];
        if (old->n == m->n_found && old->accept == m->found_accept &&
            !memcmp(m->threads + old->first, m->found, old->n * sizeof(*m->found))) {
            *ret = slots[at & mask];
            return ERR_OK;
        }
    }
    slots[at & mask] = s;
    m->state_index.n++;
    m->n_states++;
    m->n_threads += m->n_found;
    memset(m->next + (size_t)s * n_classes, 0xff, n_classes * sizeof(*m->next));
    *ret = s;
    return ERR_OK;
}

enum err list_get(struct matcher *m, const uint32_t *words, uint32_t n, uint32_t *ret)
{
    TRY(index_reserve(m, &m->list_index));
    uint32_t *slots = m->list_index.slots, mask = m->list_index.mask;
    uint32_t at = (uint32_t)hash_bytes(0, words, n * sizeof(*words));
    for (; slots[at & mask] != UNKNOWN; at++) {
        const struct list *old = &m->lists[slots[at & mask]];
        if (old->n == n && !memcmp(m->words + old->first, words, n * sizeof(*words))) {
            *ret = slots[at & mask];
            return ERR_OK;
        }
    }
    TRY(matcher_grow(&m->lists, &m->cap_lists, m->n_lists + 1, sizeof(*m->lists), MAX_STATES));
    TRY(matcher_grow(&m->words, &m->cap_words, m->n_words + n, sizeof(*words), MAX_WORDS));
    m->lists[m->n_lists] =
        (struct list){.first = m->n_words, .n = n, .tails = UNKNOWN, .reach = UNKNOWN};
    memcpy(m->words + m->n_words, words, n * sizeof(*words));
    m->n_words += n;
    slots[at & mask] = m->n_lists;
    m->list_index.n++;
    *ret = m->n_lists++;
    return ERR_OK;
}

/* ---- steps of the automaton ---- */

enum err state_add(struct matcher *m, uint32_t node, uint32_t count, uint32_t frame)
{
    if (!m->g->nodes[node].live)
        return ERR_OK;
    struct work w = {node, count, frame};
    for (uint32_t i = 0; i < m->n_work && m->stamp[node] == m->round; i++)
        if (!memcmp(&m->work[i], &w, sizeof(w)))
            return ERR_OK;
    if (m->n_work == MAX_WORK || ++m->effort > MAX_EFFORT)
        return too_large();
    m->stamp[node] = m->round;
    m->work[m->n_work++] = w;
    return ERR_OK;
}

/* Iterations begun, as far as they matter. */
static uint32_t count_up(const struct program_node *n, uint32_t count)
{
    return n->max == REPEAT_UNLIMITED ? MIN(count + 1, n->min) : count + 1;
}

/* Follows everything that takes no symbol. What does take one ends up in m->found. */
static enum err work_run(struct matcher *m)
{
    const struct grammar *g = m->g;
    for (uint32_t i = 0; i < m->n_work; i++) {
        struct work w = m->work[i];
        const struct program_node *n = &g->nodes[w.node];
        uint32_t frame = w.frame;
        switch ((enum program_op)n->op) {
        case OP_SYMBOLS:
            m->found[m->n_found++] = (struct thread){w.node, w.frame};
            break;
        case OP_SPLIT:
            for (uint32_t e = 0; e < n->n; e++)
                TRY(state_add(m, g->edges[n->at + e], 0, w.frame));
            break;
        case OP_CALL: /* a call at the end of a rule needs no frame: recursion stays flat */
            if (g->nodes[n->next].op != OP_RETURN)
                TRY(frame_get(m, (struct frame){n->next, 0, w.frame}, &frame));
            TRY(state_add(m, n->at, 0, frame));
            break;
        case OP_REPEAT:
            if (w.count >= n->min)
                TRY(state_add(m, n->next, 0, w.frame));
            if (w.count < n->max && g->nodes[n->at].live) {
                TRY(frame_get(m, (struct frame){w.node, count_up(n, w.count), w.frame}, &frame));
                TRY(state_add(m, n->at, 0, frame));
            }
            break;
        case OP_RETURN:
            if (w.frame == NO_FRAME) {
                m->found_accept = true;
            } else {
                struct frame f = m->frames[w.frame];
                TRY(state_add(m, f.node, f.count, f.parent));
            }
            break;
        }
    }
    return ERR_OK;
}

static void sort_found(struct matcher *m)
{
    for (uint32_t i = 1; i < m->n_found; i++) {
        struct thread t = m->found[i];
        uint32_t k = i;
        for (; k > 0 && (m->found[k - 1].node > t.node ||
                         (m->found[k - 1].node == t.node && m->found[k - 1].frame > t.frame));
             k--)
            m->found[k] = m->found[k - 1];
        m->found[k] = t;
    }
}

void state_begin(struct matcher *m)
{
    m->n_work = m->n_found = 0;
    m->found_accept = false;
    m->round++;
}

enum err state_of_found(struct matcher *m, uint32_t *ret)
{
    sort_found(m);
    return state_get(m, ret);
}

enum err state_end(struct matcher *m, uint32_t *ret)
{
    TRY(work_run(m));
    return state_of_found(m, ret);
}

enum err state_step(struct matcher *m, uint32_t s, uint32_t class, uint32_t *ret)
{
    uint32_t n_classes = m->g->n_classes;
    *ret = m->next[(size_t)s * n_classes + class];
    if (*ret != UNKNOWN)
        return ERR_OK;
    state_begin(m);
    const struct state *st = &m->states[s];
    m->effort += st->n;
    for (uint32_t i = 0; i < st->n; i++) {
        struct thread t = m->threads[st->first + i];
        const struct program_node *n = &m->g->nodes[t.node];
        if (m->g->class_sets[(size_t)n->at * n_classes + class])
            TRY(state_add(m, n->next, 0, t.frame));
    }
    TRY(state_end(m, ret));
    m->next[(size_t)s * n_classes + class] = *ret;
    return ERR_OK;
}

bool state_takes(const struct matcher *m, uint32_t s, uint32_t class)
{
    const struct state *st = &m->states[s];
    for (uint32_t i = 0; i < st->n; i++) {
        const struct program_node *n = &m->g->nodes[m->threads[st->first + i].node];
        if (m->g->class_sets[(size_t)n->at * m->g->n_classes + class])
            return true; // the node is live, so what follows it is
    }
    return false;
}

/* ---- reading ids ---- */

/* Where a token of plain characters leads, if that is known without its bytes. */
static enum err accept_plain(struct matcher *m, uint32_t s, uint32_t chars, uint32_t *ret)
{
    for (; chars > 0 && s != DEAD && s != NOT_UNIFORM; chars--)
        TRY(plain_next(m, s, &s));
    *ret = s;
    return ERR_OK;
}

enum err matcher_accept(struct matcher *m, struct grammar_state *s, int32_t id, bool *ret_fits)
{
    const struct grammar_vocab *v = m->v;
    *ret_fits = false;
    m->effort = 0;
    if (id < 0 || id >= v->n_ids)
        return ERR_OK;
    if (vocab_is_eos(v, id)) {
        *ret_fits = m->states[s->at].accept;
        return ERR_OK;
    }
    const struct vocab_token *t = &v->tokens[id];
    uint32_t at = NOT_UNIFORM;
    if (t->plain && t->n > 1)
        TRY(accept_plain(m, s->at, t->plain, &at));
    bool by_bytes = at == NOT_UNIFORM && !t->symbol;
    if (at == NOT_UNIFORM)
        at = s->at;
    if (t->symbol)
        TRY(state_step(m, at, m->g->class_of[t->symbol], &at));
    else if (t->n == 0)
        at = DEAD;
    for (uint32_t i = 0; by_bytes && i < t->n && at != DEAD; i++)
        TRY(state_step(m, at, m->g->class_of[v->bytes[t->at + i]], &at));
    if (at == DEAD)
        return ERR_OK;
    s->at = at;
    *ret_fits = true;
    return ERR_OK;
}

/* ---- life ---- */

static enum err begin(struct matcher *m)
{
    state_begin(m);
    uint32_t dead;
    TRY(state_get(m, &dead)); /* no thread, no end: number 0 */
    state_begin(m);
    TRY(state_add(m, m->g->start, 0, NO_FRAME));
    return state_end(m, &m->start);
}

enum err matcher_create(const struct grammar *g, const struct grammar_vocab *v,
                        struct matcher **ret)
{
    OWNED(matcher) m = calloc(1, sizeof(*m));
    if (!m)
        return err_set(ERR_NOMEM, "no memory for a grammar");
    m->g = g;
    m->v = v;
    m->stamp = calloc(g->n_nodes, sizeof(*m->stamp));
    if (!m->stamp)
        return err_set(ERR_NOMEM, "no memory for a grammar");
    TRY(masks_init(m));
    TRY(begin(m));
    *ret = take(&m);
    return ERR_OK;
}

void matcher_destroy(struct matcher *m)
{
    if (!m)
        return;
    masks_finish(m);
    free(m->frames);
    free(m->threads);
    free(m->states);
    free(m->next);
    free(m->frame_index.slots);
    free(m->state_index.slots);
    free(m->list_index.slots);
    free(m->lists);
    free(m->words);
    free(m->stamp);
    free(m);
}

struct grammar_state matcher_start(const struct matcher *m)
{
    return (struct grammar_state){m->start};
}

size_t matcher_bytes(const struct matcher *m)
{
    return (size_t)m->cap_frames * sizeof(*m->frames) +
           (size_t)m->cap_threads * sizeof(*m->threads) +
           (size_t)m->cap_states * (sizeof(*m->states) + m->g->n_classes * sizeof(*m->next)) +
           (size_t)m->cap_lists * sizeof(*m->lists) + (size_t)m->cap_words * sizeof(*m->words) +
           (size_t)m->n_masks * m->v->n_words * sizeof(uint32_t);
}

struct move {
    const struct matcher *from;
    struct matcher *to;
    uint32_t *moved; /* [n_frames] in `to`, or UNKNOWN */
    uint32_t *way;   /* [n_frames] */
};

/* A frame and those below it, the lowest first. */
static enum err frame_move(struct move *move, uint32_t at, uint32_t *ret)
{
    const struct frame *frames = move->from->frames;
    uint32_t depth = 0;
    for (; at != NO_FRAME && move->moved[at] == UNKNOWN; at = frames[at].parent)
        move->way[depth++] = at;
    uint32_t parent = at == NO_FRAME ? NO_FRAME : move->moved[at];
    while (depth > 0) {
        at = move->way[--depth];
        struct frame f = {frames[at].node, frames[at].count, parent};
        TRY(frame_get(move->to, f, &parent));
        move->moved[at] = parent;
    }
    *ret = parent;
    return ERR_OK;
}

static enum err state_move(struct move *move, uint32_t s, uint32_t *ret)
{
    struct matcher *to = move->to;
    const struct state *st = &move->from->states[s];
    state_begin(to);
    to->found_accept = st->accept;
    for (uint32_t i = 0; i < st->n; i++) {
        struct thread t = move->from->threads[st->first + i];
        TRY(frame_move(move, t.frame, &t.frame));
        to->found[to->n_found++] = t;
    }
    return state_of_found(to, ret);
}

enum err matcher_trim(struct matcher *m, size_t limit, struct grammar_state *const *live, size_t n)
{
    if (matcher_bytes(m) <= limit)
        return ERR_OK;
    OWNED(matcher) fresh = NULL;
    TRY(matcher_create(m->g, m->v, &fresh));
    OWNED_MEM uint32_t *moved = malloc(((size_t)m->n_frames + 1) * sizeof(*moved));
    OWNED_MEM uint32_t *way = malloc(((size_t)m->n_frames + 1) * sizeof(*way));
    OWNED_MEM uint32_t *at = malloc((n + 1) * sizeof(*at));
    if (!moved || !way || !at)
        return err_set(ERR_NOMEM, "no memory for a grammar's states");
    memset(moved, 0xff, m->n_frames * sizeof(*moved));
    struct move move = {m, fresh, moved, way};
    for (size_t i = 0; i < n; i++)
        TRY(state_move(&move, live[i]->at, &at[i]));
    for (size_t i = 0; i < n; i++)
        live[i]->at = at[i];
    struct matcher old = *m;
    *m = *fresh;
    *fresh = old;
    return ERR_OK;
}
