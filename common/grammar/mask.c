/* mask.c: a state's mask over the vocabulary, with as little walking as can be.
 *
 * Where all plain characters (vocab.h) lead to one state, and from that one to one, and so on: the
 * inside of a string, a token is allowed if the way along its plain characters is long enough and
 * its tail, what follows them, fits there. So such a mask is known by the length of the way and by
 * the set of tails that fit from each state on it, and states with equal ones share it.
 *
 * Two things need no look at the automaton at all, which is what makes strings of bounded length as
 * cheap as others, though each character of theirs leads to new states:
 *
 * 1. Next along the way. Inside a rule nothing depends on the frame that it returns to. If a plain
 *    character takes the rule's threads to its end and nowhere else, then so under any frame, and
 *    the next state is where the frame leads (plain_next).
 * 2. Tails. Within a counted loop two states behave the same as far as neither reads to the loop's
 *    bounds. How far tails read is seen when they are walked once (tails_of_loop).
 *
 * Every other mask is a walk over the whole vocabulary.
 */
#include <string.h>

#include "common/grammar/matcher_impl.h"

/* ---- plain characters ---- */

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
        TRY(state_step(m, s, class, &next));
        TRY(same_end(m, next, range + 1, n - 1, to, ret_same));
    }
    return ERR_OK;
}

/* plain_next by trying every character. */
static enum err plain_try(struct matcher *m, uint32_t s, uint32_t *ret)
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
    uint32_t to = UNKNOWN, next;
    bool same = true;
    for (uint32_t i = 0; i < m->n_plain_classes && same; i++) {
        TRY(state_step(m, s, m->plain_classes[i], &next));
        same = to == UNKNOWN || to == next;
        to = next;
    }
    for (size_t i = 0; i < ARRAY_LEN(wide) && same; i++)
        TRY(same_end(m, s, wide[i].range, wide[i].n, &to, &same));
    *ret = same ? to : NOT_UNIFORM;
    return ERR_OK;
}

/* Where a plain character takes all threads of s that take one, if they are of one frame's rule and
 * end it; UNKNOWN if this says nothing. *ret_frame: that frame. */
static enum err plain_return(struct matcher *m, uint32_t s, uint32_t *ret, uint32_t *ret_frame)
{
    const struct state *st = &m->states[s];
    uint32_t frame = NO_FRAME, alone, end;
    *ret = UNKNOWN;
    state_begin(m);
    for (uint32_t i = 0; i < st->n; i++) {
        struct thread t = m->threads[st->first + i];
        if (!m->begins_plain[m->g->nodes[t.node].at])
            continue;
        if (t.frame == NO_FRAME || (m->n_found > 0 && t.frame != frame))
            return ERR_OK;
        frame = t.frame;
        m->found[m->n_found++] = (struct thread){t.node, NO_FRAME};
    }
    if (m->n_found == 0) {
        *ret = DEAD;
        return ERR_OK;
    }
    TRY(state_of_found(m, &alone)); // the rule's threads under no frame
    TRY(plain_next(m, alone, &end));
    if (end >= NOT_UNIFORM || m->states[end].n > 0 || !m->states[end].accept)
        return ERR_OK;
    struct frame f = m->frames[frame];
    state_begin(m);
    TRY(state_add(m, f.node, f.count, f.parent));
    TRY(state_end(m, ret));
    *ret_frame = frame;
    return ERR_OK;
}

enum err plain_next(struct matcher *m, uint32_t s, uint32_t *ret)
{
    uint32_t frame = NO_FRAME;
    *ret = m->states[s].plain;
    if (*ret != UNKNOWN)
        return ERR_OK;
    TRY(plain_return(m, s, ret, &frame));
    if (*ret == UNKNOWN)
        TRY(plain_try(m, s, ret));
    else if (*ret != DEAD)
        m->states[*ret].returned = frame;
    m->states[s].plain = *ret;
    return ERR_OK;
}

/* ---- walks ---- */

/* The state behind a node of a tree, or whether there is one: a leaf makes none. */
static enum err walk_step(struct matcher *m, const struct trie *t, uint32_t i, uint32_t from,
                          uint32_t *ret)
{
    const struct trie_node *node = &t->nodes[i];
    uint32_t class = m->g->class_of[node->byte];
    *ret = m->next[(size_t)from * m->g->n_classes + class];
    if (*ret != UNKNOWN)
        return ERR_OK;
    if (node->end > i + 1)
        return state_step(m, from, class, ret);
    *ret = state_takes(m, from, class) ? UNKNOWN : DEAD;
    return ERR_OK;
}

/* Adds the tokens that fit from state s, and those of the same bytes. */
static enum err walk_all(struct matcher *m, uint32_t s, uint32_t *mask)
{
    const struct trie *t = &m->v->all;
    uint32_t way[VOCAB_MAX_BYTES + 1] = {s}, to;
    for (uint32_t i = 0; i < t->n;) {
        const struct trie_node *node = &t->nodes[i];
        TRY(walk_step(m, t, i, way[node->depth], &to));
        if (to == DEAD) {
            i = node->end;
            continue;
        }
        way[node->depth + 1] = to;
        for (int32_t id = node->value; id >= 0; id = m->v->same[id])
            mask[(uint32_t)id / 32] |= 1u << (id % 32);
        i++;
    }
    return ERR_OK;
}

/* The largest count of loop (its node and parent frame) under which a thread of s stands. */
static uint32_t loop_count(const struct matcher *m, uint32_t s, const struct frame *loop)
{
    const struct state *st = &m->states[s];
    uint32_t most = 0;
    for (uint32_t i = 0; i < st->n; i++)
        for (uint32_t f = m->threads[st->first + i].frame; f != NO_FRAME; f = m->frames[f].parent)
            if (m->frames[f].node == loop->node && m->frames[f].parent == loop->parent)
                most = MAX(most, m->frames[f].count);
    return most;
}

/* The tails that fit from state s, as a list of bits. If loop is given, *ret_reach gets the largest
 * count of it on the way. */
static enum err walk_tails(struct matcher *m, uint32_t s, const struct frame *loop, uint32_t *ret,
                           uint32_t *ret_reach)
{
    const struct trie *t = &m->v->tails;
    uint32_t way[VOCAB_MAX_BYTES + 1] = {s}, to, reach = loop ? loop_count(m, s, loop) : 0;
    memset(m->tail_bits, 0, m->v->n_tail_words * sizeof(*m->tail_bits));
    for (uint32_t i = 0; i < t->n;) {
        const struct trie_node *node = &t->nodes[i];
        TRY(walk_step(m, t, i, way[node->depth], &to));
        if (to == DEAD) {
            i = node->end;
            continue;
        }
        way[node->depth + 1] = to;
        if (loop && to != UNKNOWN)
            reach = MAX(reach, loop_count(m, to, loop));
        if (node->value >= 0)
            m->tail_bits[node->value / 32] |= 1u << (node->value % 32);
        i++;
    }
    *ret_reach = reach;
    return list_get(m, m->tail_bits, m->v->n_tail_words, ret);
}

/* ---- tails ---- */

/* The tails of s, which is where the loop's body returned to with at.count iterations begun. From
 * the least count on that may leave the loop, up to where a tail would read to the largest one,
 * they are the same: walked once, known by (node, parent). */
static enum err tails_of_loop(struct matcher *m, uint32_t s, struct frame at, uint32_t *ret)
{
    const struct program_node *n = &m->g->nodes[at.node];
    uint32_t key[] = {at.node, at.parent}, l, reach;
    TRY(list_get(m, key, ARRAY_LEN(key), &l));
    bool inside = at.count >= n->min;
    if (inside && m->lists[l].tails != UNKNOWN && at.count + m->lists[l].reach < n->max) {
        *ret = m->lists[l].tails;
        return ERR_OK;
    }
    TRY(walk_tails(m, s, &at, ret, &reach));
    if (inside && reach >= at.count && reach < n->max) {
        m->lists[l].tails = *ret;
        m->lists[l].reach = reach - at.count;
    }
    return ERR_OK;
}

static enum err tails_of(struct matcher *m, uint32_t s, uint32_t *ret)
{
    uint32_t returned = m->states[s].returned, reach;
    *ret = m->states[s].tails;
    if (*ret != UNKNOWN)
        return ERR_OK;
    if (returned != NO_FRAME && m->g->nodes[m->frames[returned].node].op == OP_REPEAT)
        TRY(tails_of_loop(m, s, m->frames[returned], ret));
    else
        TRY(walk_tails(m, s, NULL, ret, &reach));
    m->states[s].tails = *ret;
    return ERR_OK;
}

/* ---- masks ---- */

static enum err mask_create(struct matcher *m, uint32_t **ret)
{
    TRY(matcher_grow(&m->masks, &m->cap_masks, m->n_masks + 1, sizeof(*m->masks), MAX_MASKS));
    uint32_t *mask = calloc(m->v->n_words, sizeof(*mask));
    if (!mask)
        return err_set(ERR_NOMEM, "no memory for a mask");
    m->masks[m->n_masks++] = mask;
    *ret = mask;
    return ERR_OK;
}

/* Bit i: symbol 256 + i may come next. The last one: the output may end. */
static uint32_t symbols_of(const struct matcher *m, uint32_t s)
{
    uint32_t bits = m->states[s].accept ? 1u << 31 : 0;
    for (uint32_t symbol = SYMBOL_OTHER; symbol < N_SYMBOLS; symbol++)
        if (state_takes(m, s, m->g->class_of[symbol]))
            bits |= 1u << (symbol - SYMBOL_OTHER);
    return bits;
}

static void add_symbols(const struct matcher *m, uint32_t symbols, uint32_t *mask)
{
    const struct grammar_vocab *v = m->v;
    for (uint32_t i = 0; i < v->n_added; i++) {
        int32_t id = v->added[i];
        if (symbols >> (v->tokens[id].symbol - SYMBOL_OTHER) & 1)
            mask[(uint32_t)id / 32] |= 1u << (id % 32);
    }
    for (int i = 0; i < v->n_eos; i++)
        if (symbols >> 31)
            mask[(uint32_t)v->eos[i] / 32] |= 1u << (v->eos[i] % 32);
}

/* The tokens with a tail: behind k characters it must be among tails[k], the last of n for any more
 * if the way goes on for ever. */
static void add_tails(const struct matcher *m, const uint32_t *tails, uint32_t n, bool endless,
                      uint32_t *mask)
{
    const struct grammar_vocab *v = m->v;
    uint32_t *some = m->tail_bits;
    memset(some, 0, v->n_tail_words * sizeof(*some));
    for (uint32_t k = 0; k < n; k++)
        for (uint32_t w = 0; (k == 0 || tails[k] != tails[k - 1]) && w < v->n_tail_words; w++)
            some[w] |= m->words[m->lists[tails[k]].first + w];
    for (uint32_t tail = 0; tail < v->n_tails; tail++) {
        if (!(some[tail / 32] >> tail % 32 & 1))
            continue;
        for (uint32_t i = v->tail_start[tail]; i < v->tail_start[tail + 1]; i++) {
            uint32_t k = v->tailed[i].chars;
            if (k >= n && !endless)
                break; // they ascend
            const struct list *l = &m->lists[tails[MIN(k, n - 1)]];
            if (!(m->words[l->first + tail / 32] >> tail % 32 & 1))
                continue;
            for (int32_t id = v->tailed[i].id; id >= 0; id = v->same[id])
                mask[(uint32_t)id / 32] |= 1u << (id % 32);
        }
    }
}

/* The states along plain characters from s, into m->way; as many as any token needs. *ret_last:
 * where the way ends, DEAD or NOT_UNIFORM; or the last state, which leads to itself or is far
 * enough. */
static enum err way_along(struct matcher *m, uint32_t s, uint32_t *ret_chars, uint32_t *ret_last)
{
    uint32_t chars = 0, to = s;
    m->way[0] = s;
    while (chars < m->v->max_way) {
        TRY(plain_next(m, m->way[chars], &to));
        if (to == DEAD || to == NOT_UNIFORM || to == m->way[chars])
            break;
        m->way[++chars] = to;
    }
    *ret_chars = chars;
    *ret_last = to;
    return ERR_OK;
}

static enum err mask_inside(struct matcher *m, uint32_t s, uint32_t chars, bool endless,
                            const uint32_t **ret)
{
    const struct grammar_vocab *v = m->v;
    uint32_t n_tails = MIN(chars, v->max_head) + 1, n = 0, l;
    uint32_t length = v->length_of[endless ? v->max_way : chars];
    m->key[n++] = symbols_of(m, s);
    m->key[n++] = length * 2 + endless;
    for (uint32_t k = 0; k < n_tails; k++)
        TRY(tails_of(m, m->way[k], &m->key[n++]));
    TRY(list_get(m, m->key, n, &l));
    if (!m->lists[l].mask) {
        uint32_t *mask = NULL;
        TRY(mask_create(m, &mask));
        memcpy(mask, v->plain + (size_t)length * v->n_words, v->n_words * sizeof(*mask));
        add_tails(m, m->key + 2, n_tails, endless, mask);
        add_symbols(m, m->key[0], mask);
        m->lists[l].mask = mask;
    }
    *ret = m->lists[l].mask;
    return ERR_OK;
}

enum err matcher_mask(struct matcher *m, struct grammar_state s, const uint32_t **ret)
{
    m->effort = 0;
    if (!m->states[s.at].mask) {
        uint32_t chars, last;
        const uint32_t *mask;
        TRY(way_along(m, s.at, &chars, &last));
        if (last == NOT_UNIFORM) {
            uint32_t *fresh = NULL;
            TRY(mask_create(m, &fresh));
            TRY(walk_all(m, s.at, fresh));
            add_symbols(m, symbols_of(m, s.at), fresh);
            mask = fresh;
        } else {
            bool endless = last != DEAD && last == m->way[chars] && chars < m->v->max_way;
            TRY(mask_inside(m, s.at, chars, endless, &mask));
        }
        m->states[s.at].mask = mask;
    }
    *ret = m->states[s.at].mask;
    return ERR_OK;
}

/* ---- life ---- */

static void begins_plain_init(struct matcher *m)
{
    const struct grammar *g = m->g;
    bool begins[N_SYMBOLS] = {false}, seen[N_SYMBOLS] = {false};
    for (uint32_t byte = 0x20; byte < 0xf5; byte++) {
        uint16_t class = g->class_of[byte];
        if (byte == '"' || byte == '\\' || (byte >= 0x7f && byte < 0xc2))
            continue;
        begins[class] = true;
        if (byte < 0x7f && !seen[class])
            m->plain_classes[m->n_plain_classes++] = class;
        seen[class] |= byte < 0x7f;
    }
    for (uint32_t set = 0; set < g->n_sets; set++)
        for (uint32_t class = 0; class < g->n_classes; class ++)
            m->begins_plain[set] |=
                begins[class] && g->class_sets[(size_t)set * g->n_classes + class];
}

enum err masks_init(struct matcher *m)
{
    const struct grammar_vocab *v = m->v;
    m->begins_plain = calloc(m->g->n_sets + 1, sizeof(*m->begins_plain));
    m->way = malloc((v->max_way + 1) * sizeof(*m->way));
    m->key = malloc((v->max_head + 3) * sizeof(*m->key));
    m->tail_bits = malloc((v->n_tail_words + 1) * sizeof(*m->tail_bits));
    if (!m->begins_plain || !m->way || !m->key || !m->tail_bits)
        return err_set(ERR_NOMEM, "no memory for a grammar");
    begins_plain_init(m);
    return ERR_OK;
}

void masks_finish(struct matcher *m)
{
    for (uint32_t i = 0; i < m->n_masks; i++)
        free(m->masks[i]);
    free(m->masks);
    free(m->begins_plain);
    free(m->way);
    free(m->key);
    free(m->tail_bits);
}
