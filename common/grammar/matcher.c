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
#include "common/grammar/program.h"
#include "common/grammar/vocab.h"

#define DEAD        0u
#define UNKNOWN     UINT32_MAX
#define NOT_UNIFORM (UINT32_MAX - 1)
#define NO_FRAME    UINT32_MAX
#define MAX_WORK    2048u      /* threads under way in one step of the automaton */
#define MAX_STATES  (1u << 19) /* between two trims */
#define MAX_FRAMES  (1u << 20)
#define MAX_ITEMS   (1u << 22)
#define MAX_EFFORT  (1u << 20) /* threads followed for one mask: what a hostile schema may cost */

struct frame {
    uint32_t node, count, parent;
};

struct thread {
    uint32_t node, frame;
};

struct work {
    uint32_t node, count, frame;
};

struct state {
    uint32_t first, n; /* in threads */
    uint32_t plain;    /* where every plain character leads, if to one state */
    bool accept;
    uint32_t *mask;
};

/* A hash table of indexes; the keys are where the indexes lead. */
struct index {
    uint32_t *slots; /* UNKNOWN: empty */
    uint32_t mask, n;
};

struct matcher {
    const struct grammar *g;
    const struct grammar_vocab *v;
    struct frame *frames;
    uint32_t n_frames, cap_frames;
    struct thread *threads;
    uint32_t n_threads, cap_threads;
    struct state *states;
    uint32_t n_states, cap_states;
    uint32_t *next; /* [cap_states, n_classes] */
    struct index frame_index, state_index;
    uint32_t n_masks;
    uint32_t start;

    struct work work[MAX_WORK];
    struct thread found[MAX_WORK];
    uint32_t n_work, n_found, effort;
    bool found_accept;
    uint32_t *stamp; /* [n_nodes] round in which the node was last added to work */
    uint32_t round;

    uint16_t plain_classes[N_SYMBOLS]; /* of the plain ASCII characters */
    uint32_t n_plain_classes;
};

static enum err too_large(void)
{
    return err_set(ERR_TOO_LARGE, "the grammar is too ambiguous: too many states in a step");
}

static enum err grow(void *array, uint32_t *cap, uint32_t n, size_t item, uint32_t max)
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

static uint32_t state_hash(const struct matcher *m, uint32_t s)
{
    const struct state *st = &m->states[s];
    return (uint32_t)hash_bytes(st->accept, m->threads + st->first, st->n * sizeof(struct thread));
}

static enum err index_reserve(struct matcher *m, struct index *x, bool frames)
{
    if (x->slots && x->n * 2 < x->mask)
        return ERR_OK;
    uint32_t size = x->slots ? (x->mask + 1) * 2 : 256;
    uint32_t *slots = malloc(size * sizeof(*slots));
    if (!slots)
        return err_set(ERR_NOMEM, "no memory for a grammar's states");
    memset(slots, 0xff, size * sizeof(*slots));
    for (uint32_t i = 0; i < x->n; i++) {
        uint32_t at = frames ? frame_hash(&m->frames[i]) : state_hash(m, i);
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
    TRY(index_reserve(m, &m->frame_index, true));
    uint32_t *slots = m->frame_index.slots, mask = m->frame_index.mask, at = frame_hash(&f);
    for (; slots[at & mask] != UNKNOWN; at++)
        if (!memcmp(&m->frames[slots[at & mask]], &f, sizeof(f))) {
            *ret = slots[at & mask];
            return ERR_OK;
        }
    TRY(grow(&m->frames, &m->cap_frames, m->n_frames + 1, sizeof(f), MAX_FRAMES));
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
    TRY(index_reserve(m, &m->state_index, false));
    TRY(grow(&m->threads, &m->cap_threads, m->n_threads + m->n_found + 1, sizeof(*m->threads),
             MAX_ITEMS));
    TRY(grow(&m->states, &m->cap_states, m->n_states + 1, sizeof(*m->states), MAX_STATES));
    if (cap != m->cap_states) {
        uint32_t *next = realloc(m->next, (size_t)m->cap_states * n_classes * sizeof(*next));
        if (!next) {
            m->cap_states = cap;
            return err_set(ERR_NOMEM, "no memory for a grammar's states");
        }
        m->next = next;
    }
    uint32_t s = m->n_states;
    m->states[s] = (struct state){
        .first = m->n_threads, .n = m->n_found, .plain = UNKNOWN, .accept = m->found_accept};
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

/* ---- steps of the automaton ---- */

static enum err work_add(struct matcher *m, uint32_t node, uint32_t count, uint32_t frame)
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
                TRY(work_add(m, g->edges[n->at + e], 0, w.frame));
            break;
        case OP_CALL: /* a call at the end of a rule needs no frame: recursion stays flat */
            if (g->nodes[n->next].op != OP_RETURN)
                TRY(frame_get(m, (struct frame){n->next, 0, w.frame}, &frame));
            TRY(work_add(m, n->at, 0, frame));
            break;
        case OP_REPEAT:
            if (w.count >= n->min)
                TRY(work_add(m, n->next, 0, w.frame));
            if (w.count < n->max && g->nodes[n->at].live) {
                TRY(frame_get(m, (struct frame){w.node, count_up(n, w.count), w.frame}, &frame));
                TRY(work_add(m, n->at, 0, frame));
            }
            break;
        case OP_RETURN:
            if (w.frame == NO_FRAME) {
                m->found_accept = true;
            } else {
                struct frame f = m->frames[w.frame];
                TRY(work_add(m, f.node, f.count, f.parent));
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

static void work_begin(struct matcher *m)
{
    m->n_work = m->n_found = 0;
    m->found_accept = false;
    m->round++;
}

static enum err work_end(struct matcher *m, uint32_t *ret)
{
    TRY(work_run(m));
    sort_found(m);
    return state_get(m, ret);
}

static enum err step(struct matcher *m, uint32_t s, uint32_t class, uint32_t *ret)
{
    uint32_t n_classes = m->g->n_classes;
    *ret = m->next[(size_t)s * n_classes + class];
    if (*ret != UNKNOWN)
        return ERR_OK;
    work_begin(m);
    const struct state *st = &m->states[s];
    m->effort += st->n;
    for (uint32_t i = 0; i < st->n; i++) {
        struct thread t = m->threads[st->first + i];
        const struct program_node *n = &m->g->nodes[t.node];
        if (m->g->class_sets[(size_t)n->at * n_classes + class])
            TRY(work_add(m, n->next, 0, t.frame));
    }
    TRY(work_end(m, ret));
    m->next[(size_t)s * n_classes + class] = *ret;
    return ERR_OK;
}

/* ---- masks ---- */

/* Does every continuation of a character, bytes of the given ranges, lead from s to *to? The first
 * one seen sets it. */
static enum err same_end(struct matcher *m, uint32_t s, const uint8_t (*range)[2], int n,
                         uint32_t *to, bool *ret_same)
{
    if (n == 0) {
        if (*to == UNKNOWN)
            *to = s;
        *ret_same = *to == s;
        return ERR_OK;
    }
    bool seen[N_SYMBOLS] = {false};
    *ret_same = true;
    for (int byte = range[0][0]; byte <= range[0][1] && *ret_same; byte++) {
        uint16_t class = m->g->class_of[byte];
        uint32_t next;
        if (seen[class])
            continue;
        seen[class] = true;
        TRY(step(m, s, class, &next));
        TRY(same_end(m, next, range + 1, n - 1, to, ret_same));
    }
    return ERR_OK;
}

/* Where every plain character leads from s, or NOT_UNIFORM. */
static enum err plain_next(struct matcher *m, uint32_t s, uint32_t *ret)
{
    static const struct {
        int n;
        uint8_t range[4][2];
    } wide[] = {
        {2, {{0xc2, 0xdf}, {0x80, 0xbf}}},
        {3, {{0xe0, 0xe0}, {0xa0, 0xbf}, {0x80, 0xbf}}},
        {3, {{0xe1, 0xec}, {0x80, 0xbf}, {0x80, 0xbf}}},
        {3, {{0xed, 0xed}, {0x80, 0x9f}, {0x80, 0xbf}}},
        {3, {{0xee, 0xef}, {0x80, 0xbf}, {0x80, 0xbf}}},
        {4, {{0xf0, 0xf0}, {0x90, 0xbf}, {0x80, 0xbf}, {0x80, 0xbf}}},
        {4, {{0xf1, 0xf3}, {0x80, 0xbf}, {0x80, 0xbf}, {0x80, 0xbf}}},
        {4, {{0xf4, 0xf4}, {0x80, 0x8f}, {0x80, 0xbf}, {0x80, 0xbf}}},
    };
    *ret = m->states[s].plain;
    if (*ret != UNKNOWN)
        return ERR_OK;
    uint32_t to = UNKNOWN, next;
    bool same = true;
    for (uint32_t i = 0; i < m->n_plain_classes && same; i++) {
        TRY(step(m, s, m->plain_classes[i], &next));
        same = to == UNKNOWN || to == next;
        to = next;
    }
    for (size_t i = 0; i < ARRAY_LEN(wide) && same; i++)
        TRY(same_end(m, s, wide[i].range, wide[i].n, &to, &same));
    *ret = m->states[s].plain = same ? to : NOT_UNIFORM;
    return ERR_OK;
}

/* Adds the tokens of t that fit from state s. */
static enum err walk(struct matcher *m, const struct trie *t, uint32_t s, uint32_t *mask)
{
    uint32_t way[VOCAB_MAX_BYTES + 1] = {s};
    const uint32_t n_classes = m->g->n_classes;
    for (uint32_t i = 0; i < t->n;) {
        const struct trie_node *node = &t->nodes[i];
        uint32_t from = way[node->depth], class = m->g->class_of[node->byte];
        uint32_t to = m->next[(size_t)from * n_classes + class];
        if (to == UNKNOWN)
            TRY(step(m, from, class, &to));
        if (to == DEAD) {
            i = node->end;
            continue;
        }
        way[node->depth + 1] = to;
        for (int32_t id = node->token; id >= 0; id = m->v->same[id])
            mask[(uint32_t)id / 32] |= 1u << (id % 32);
        i++;
    }
    return ERR_OK;
}

static enum err mask_fill(struct matcher *m, uint32_t s, uint32_t *mask)
{
    const struct grammar_vocab *v = m->v;
    uint32_t at = s, chars = 0, to;
    while (chars < VOCAB_PLAIN_CHARS) {
        TRY(plain_next(m, at, &to));
        if (to == DEAD || to == NOT_UNIFORM)
            break;
        chars++;
        if (to == at)
            chars = VOCAB_PLAIN_CHARS;
        at = to;
    }
    if (chars < VOCAB_PLAIN_CHARS && to == NOT_UNIFORM) {
        TRY(walk(m, &v->all, s, mask));
    } else {
        memcpy(mask, v->plain + (size_t)chars * v->n_words, v->n_words * sizeof(*mask));
        TRY(walk(m, &v->rest, s, mask));
    }
    for (uint32_t i = 0; i < v->n_added; i++) {
        int32_t id = v->added[i];
        TRY(step(m, s, m->g->class_of[v->tokens[id].symbol], &to));
        if (to != DEAD)
            mask[(uint32_t)id / 32] |= 1u << (id % 32);
    }
    for (int i = 0; i < v->n_eos; i++)
        if (m->states[s].accept)
            mask[(uint32_t)v->eos[i] / 32] |= 1u << (v->eos[i] % 32);
    return ERR_OK;
}

enum err matcher_mask(struct matcher *m, struct grammar_state s, const uint32_t **ret)
{
    m->effort = 0;
    if (!m->states[s.at].mask) {
        uint32_t *mask = calloc(m->v->n_words, sizeof(*mask));
        if (!mask)
            return err_set(ERR_NOMEM, "no memory for a mask");
        enum err err = mask_fill(m, s.at, mask);
        if (err != ERR_OK) {
            free(mask);
            return err;
        }
        m->states[s.at].mask = mask;
        m->n_masks++;
    }
    *ret = m->states[s.at].mask;
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
    uint32_t at = s->at;
    if (t->symbol)
        TRY(step(m, at, m->g->class_of[t->symbol], &at));
    else if (t->n == 0)
        at = DEAD;
    for (uint32_t i = 0; !t->symbol && i < t->n && at != DEAD; i++)
        TRY(step(m, at, m->g->class_of[v->bytes[t->at + i]], &at));
    if (at == DEAD)
        return ERR_OK;
    s->at = at;
    *ret_fits = true;
    return ERR_OK;
}

bool matcher_complete(const struct matcher *m, struct grammar_state s)
{
    return m->states[s.at].accept;
}

/* ---- life ---- */

static enum err begin(struct matcher *m)
{
    work_begin(m);
    uint32_t dead;
    TRY(state_get(m, &dead)); /* no thread, no end: number 0 */
    work_begin(m);
    TRY(work_add(m, m->g->start, 0, NO_FRAME));
    return work_end(m, &m->start);
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
    bool seen[N_SYMBOLS] = {false};
    for (uint32_t byte = 0x20; byte < 0x7f; byte++) {
        uint16_t class = g->class_of[byte];
        if (byte == '"' || byte == '\\' || seen[class])
            continue;
        seen[class] = true;
        m->plain_classes[m->n_plain_classes++] = class;
    }
    TRY(begin(m));
    *ret = take(&m);
    return ERR_OK;
}

void matcher_destroy(struct matcher *m)
{
    if (!m)
        return;
    for (uint32_t i = 0; i < m->n_states; i++)
        free(m->states[i].mask);
    free(m->frames);
    free(m->threads);
    free(m->states);
    free(m->next);
    free(m->frame_index.slots);
    free(m->state_index.slots);
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
    work_begin(to);
    to->found_accept = st->accept;
    for (uint32_t i = 0; i < st->n; i++) {
        struct thread t = move->from->threads[st->first + i];
        TRY(frame_move(move, t.frame, &t.frame));
        to->found[to->n_found++] = t;
    }
    sort_found(to);
    return state_get(to, ret);
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
