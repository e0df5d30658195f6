/* program.c: see program.h. */
#include "common/grammar/program.h"

#include <string.h>

static bool fail(struct grammar *g, enum err err)
{
    if (g->err == ERR_OK)
        g->err = err;
    return false;
}

static bool grow(struct grammar *g, void *array, uint32_t *cap, uint32_t n, size_t item,
                 uint32_t max)
{
    if (g->err != ERR_OK)
        return false;
    if (n <= *cap)
        return true;
    if (n > max)
        return fail(g, err_set(ERR_TOO_LARGE,
                               "the schema is too large: its automaton exceeds %u parts", max));
    uint32_t more = MAX(n, *cap * 2);
    void *bigger = realloc(*(void **)array, more * item);
    if (!bigger)
        return fail(g, err_set(ERR_NOMEM, "no memory for a grammar"));
    *(void **)array = bigger;
    *cap = more;
    return true;
}

static uint32_t node_add(struct grammar *g, struct program_node node)
{
    if (!grow(g, &g->nodes, &g->cap_nodes, g->n_nodes + 1, sizeof(*g->nodes), PROGRAM_MAX))
        return PROGRAM_FAIL;
    g->nodes[g->n_nodes] = node;
    return g->n_nodes++;
}

enum err program_init(struct grammar *g)
{
    node_add(g, (struct program_node){.op = OP_RETURN});
    node_add(g, (struct program_node){.op = OP_SPLIT});
    return g->err;
}

void grammar_destroy(struct grammar *g)
{
    if (!g)
        return;
    free(g->nodes);
    free(g->edges);
    free(g->sets);
    free(g->class_sets);
    free(g);
}

/* ---- builders ---- */

uint32_t program_set(struct grammar *g, const struct symset *set, uint32_t next)
{
    if (next == PROGRAM_FAIL)
        return PROGRAM_FAIL;
    uint32_t at = 0; /* few are distinct: bytes, and what schemas are made of */
    while (at < g->n_sets && memcmp(&g->sets[at], set, sizeof(*set)))
        at++;
    if (at == g->n_sets) {
        if (!grow(g, &g->sets, &g->cap_sets, at + 1, sizeof(*g->sets), PROGRAM_MAX_SETS))
            return PROGRAM_FAIL;
        g->sets[g->n_sets++] = *set;
    }
    return node_add(g, (struct program_node){.op = OP_SYMBOLS, .at = at, .next = next});
}

uint32_t program_range(struct grammar *g, uint32_t first, uint32_t last, uint32_t next)
{
    if (next == PROGRAM_FAIL)
        return PROGRAM_FAIL;
    uint32_t known = first == last ? g->single[first] : 0;
    if (known)
        return node_add(g, (struct program_node){.op = OP_SYMBOLS, .at = known - 1, .next = next});
    struct symset set = {0};
    symset_range(&set, first, last);
    uint32_t node = program_set(g, &set, next);
    if (first == last && node != PROGRAM_FAIL)
        g->single[first] = g->nodes[node].at + 1;
    return node;
}

uint32_t program_tag(struct grammar *g, enum grammar_tag tag, uint32_t next)
{
    return program_range(g, SYMBOL_TAG(tag), SYMBOL_TAG(tag), next);
}

uint32_t program_text(struct grammar *g, const char *bytes, size_t n, uint32_t next)
{
    while (n-- > 0)
        next = program_range(g, (uint8_t)bytes[n], (uint8_t)bytes[n], next);
    return next;
}

uint32_t program_split(struct grammar *g, const uint32_t *edges, size_t n)
{
    size_t kept = 0;
    uint32_t only = PROGRAM_FAIL;
    for (size_t i = 0; i < n; i++)
        if (edges[i] != PROGRAM_FAIL) {
            kept++;
            only = edges[i];
        }
    if (kept < 2)
        return only;
    if (!grow(g, &g->edges, &g->cap_edges, g->n_edges + (uint32_t)kept, sizeof(*g->edges),
              2 * PROGRAM_MAX))
        return PROGRAM_FAIL;
    uint32_t at = g->n_edges;
    for (size_t i = 0; i < n; i++)
        if (edges[i] != PROGRAM_FAIL)
            g->edges[g->n_edges++] = edges[i];
    return node_add(g, (struct program_node){.op = OP_SPLIT, .at = at, .n = (uint32_t)kept});
}

uint32_t program_either(struct grammar *g, uint32_t a, uint32_t b)
{
    return program_split(g, (uint32_t[]){a, b}, 2);
}

uint32_t program_call(struct grammar *g, uint32_t rule, uint32_t next)
{
    if (rule == PROGRAM_FAIL || next == PROGRAM_FAIL)
        return PROGRAM_FAIL;
    return node_add(g, (struct program_node){.op = OP_CALL, .at = rule, .next = next});
}

uint32_t program_repeat(struct grammar *g, uint32_t rule, uint32_t min, uint32_t max, uint32_t next)
{
    if (next == PROGRAM_FAIL || max < min || (rule == PROGRAM_FAIL && min > 0))
        return PROGRAM_FAIL;
    if (max == 0 || rule == PROGRAM_FAIL)
        return next;
    return node_add(g, (struct program_node){
                           .op = OP_REPEAT, .at = rule, .min = min, .max = max, .next = next});
}

uint32_t program_forward(struct grammar *g)
{
    if (!grow(g, &g->edges, &g->cap_edges, g->n_edges + 1, sizeof(*g->edges), 2 * PROGRAM_MAX))
        return PROGRAM_FAIL;
    g->edges[g->n_edges] = PROGRAM_FAIL;
    return node_add(g, (struct program_node){.op = OP_SPLIT, .at = g->n_edges++, .n = 1});
}

void program_resolve(struct grammar *g, uint32_t forward, uint32_t to)
{
    if (forward != PROGRAM_FAIL)
        g->edges[g->nodes[forward].at] = to;
}

static size_t shared_bytes(const char *a, size_t n_a, const char *b, size_t n_b, size_t from)
{
    while (from < n_a && from < n_b && a[from] == b[from])
        from++;
    return from;
}

/* texts[first, last) are sorted and agree in their first `depth` bytes. What all of them share is
 * built at once, so recursion is as deep as there are texts, not bytes. */
static uint32_t texts_node(struct grammar *g, const char *const *texts, const size_t *lens,
                           size_t first, size_t last, size_t depth, uint32_t next)
{
    const char *prefix = texts[first] + depth;
    size_t at = shared_bytes(texts[first], lens[first], texts[last - 1], lens[last - 1], depth);
    uint32_t edges[257];
    size_t n = 0, n_prefix = at - depth;
    if (lens[first] == at) {
        edges[n++] = next;
        first++;
    }
    while (first < last) {
        size_t end = first + 1;
        while (end < last && texts[end][at] == texts[first][at])
            end++;
        edges[n++] = texts_node(g, texts, lens, first, end, at, next);
        first = end;
    }
    return program_text(g, prefix, n_prefix, program_split(g, edges, n));
}

struct text {
    const char *bytes;
    size_t n;
};

static int text_order(const void *a, const void *b)
{
    const struct text *x = a, *y = b;
    int order = memcmp(x->bytes, y->bytes, MIN(x->n, y->n));
    return order ? order : (x->n > y->n) - (x->n < y->n);
}

uint32_t program_texts(struct grammar *g, const char *const *texts, const size_t *lens, size_t n,
                       uint32_t next)
{
    if (n == 0)
        return PROGRAM_FAIL;
    OWNED_MEM struct text *sorted = malloc(n * sizeof(*sorted));
    OWNED_MEM const char **bytes = malloc(n * sizeof(*bytes));
    OWNED_MEM size_t *sizes = malloc(n * sizeof(*sizes));
    if (!sorted || !bytes || !sizes) {
        fail(g, err_set(ERR_NOMEM, "no memory for a grammar"));
        return PROGRAM_FAIL;
    }
    for (size_t i = 0; i < n; i++)
        sorted[i] = (struct text){texts[i], lens[i]};
    qsort(sorted, n, sizeof(*sorted), text_order);
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        if (kept && sorted[i].n == sizes[kept - 1] &&
            !memcmp(sorted[i].bytes, bytes[kept - 1], sorted[i].n))
            continue;
        bytes[kept] = sorted[i].bytes;
        sizes[kept++] = sorted[i].n;
    }
    return texts_node(g, bytes, sizes, 0, kept, 0, next);
}

uint32_t program_wide_char(struct grammar *g, uint32_t next)
{
    return program_code_points(g, 0x80, 0x10ffff, next);
}

static uint32_t encode(uint32_t c, uint8_t out[4])
{
    if (c < 0x80) {
        out[0] = (uint8_t)c;
        return 1;
    }
    uint32_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (uint32_t i = n - 1; i > 0; i--, c >>= 6)
        out[i] = (uint8_t)(0x80 | (c & 0x3f));
    out[0] = (uint8_t)((n == 2 ? 0xc0 : n == 3 ? 0xe0 : 0xf0) | c);
    return n;
}

/* Characters of one encoded length: where first and last bytes differ, the ends are split off until
 * the bytes between are free. */
static uint32_t utf8_range(struct grammar *g, const uint8_t *a, const uint8_t *b, uint32_t n,
                           uint32_t next)
{
    if (n == 1)
        return program_range(g, a[0], b[0], next);
    if (a[0] == b[0])
        return program_range(g, a[0], a[0], utf8_range(g, a + 1, b + 1, n - 1, next));
    static const uint8_t low[3] = {0x80, 0x80, 0x80}, high[3] = {0xbf, 0xbf, 0xbf};
    uint32_t first = a[0], last = b[0], edges[3] = {PROGRAM_FAIL, PROGRAM_FAIL, PROGRAM_FAIL};
    if (memcmp(a + 1, low, n - 1)) {
        edges[0] = program_range(g, first, first, utf8_range(g, a + 1, high, n - 1, next));
        first++;
    }
    if (memcmp(b + 1, high, n - 1)) {
        edges[1] = program_range(g, last, last, utf8_range(g, low, b + 1, n - 1, next));
        last--;
    }
    if (first <= last)
        edges[2] = program_range(g, first, last, utf8_range(g, low, high, n - 1, next));
    return program_split(g, edges, 3);
}

uint32_t program_code_points(struct grammar *g, uint32_t first, uint32_t last, uint32_t next)
{
    static const uint32_t ends[] = {0x7f, 0x7ff, 0xd7ff, 0xffff, 0x10ffff};
    static const uint32_t starts[] = {0, 0x80, 0x800, 0xe000, 0x10000};
    uint32_t edges[ARRAY_LEN(ends)];
    for (size_t i = 0; i < ARRAY_LEN(ends); i++) {
        uint32_t from = MAX(first, starts[i]), to = MIN(last, ends[i]);
        edges[i] = PROGRAM_FAIL;
        if (from > to)
            continue;
        uint8_t a[4], b[4];
        uint32_t n = encode(from, a);
        encode(to, b);
        edges[i] = utf8_range(g, a, b, n, next);
    }
    return program_split(g, edges, ARRAY_LEN(ends));
}

/* ---- finishing ---- */

/* Which nodes can reach the end of their rule: a least fixpoint. Nodes mostly point to older ones,
 * rules often to newer ones, so a few passes in both directions do. */
static bool is_live(const struct grammar *g, const struct program_node *n)
{
    switch ((enum program_op)n->op) {
    case OP_SYMBOLS:
        return g->nodes[n->next].live;
    case OP_SPLIT:
        for (uint32_t i = 0; i < n->n; i++)
            if (g->nodes[g->edges[n->at + i]].live)
                return true;
        return false;
    case OP_CALL:
        return g->nodes[n->at].live && g->nodes[n->next].live;
    case OP_REPEAT:
        return (n->min == 0 || g->nodes[n->at].live) && g->nodes[n->next].live;
    case OP_RETURN:
        break;
    }
    return true;
}

static void find_live(struct grammar *g)
{
    uint32_t n = g->n_nodes;
    for (bool changed = true, up = true; changed; up = !up) {
        changed = false;
        for (uint32_t k = 0; k < n; k++) {
            struct program_node *node = &g->nodes[up ? k : n - 1 - k];
            if (!node->live && is_live(g, node))
                node->live = changed = true;
        }
    }
}

/* Nodes from which the end of the rule can be reached without a symbol. */
static bool is_nullable(const struct grammar *g, const bool *nullable, const struct program_node *n)
{
    switch ((enum program_op)n->op) {
    case OP_SYMBOLS:
        return false;
    case OP_SPLIT:
        for (uint32_t i = 0; i < n->n; i++)
            if (nullable[g->edges[n->at + i]])
                return true;
        return false;
    case OP_CALL:
        return nullable[n->at] && nullable[n->next];
    case OP_REPEAT:
        return (n->min == 0 || nullable[n->at]) && nullable[n->next];
    case OP_RETURN:
        break;
    }
    return true;
}

/* What is reached from a node without a symbol: successor k of node, or UINT32_MAX at the end. */
static uint32_t silent_edge(const struct grammar *g, const bool *nullable, uint32_t node,
                            uint32_t k)
{
    const struct program_node *n = &g->nodes[node];
    switch ((enum program_op)n->op) {
    case OP_SPLIT:
        return k < n->n ? g->edges[n->at + k] : UINT32_MAX;
    case OP_CALL:
        if (k == 0)
            return n->at;
        return k == 1 && nullable[n->at] ? n->next : UINT32_MAX;
    case OP_REPEAT:
        if (k == 0)
            return n->at;
        return k == 1 && (n->min == 0 || nullable[n->at]) ? n->next : UINT32_MAX;
    case OP_SYMBOLS:
    case OP_RETURN:
        break;
    }
    return UINT32_MAX;
}

/* A way from a node to itself without a symbol would be followed for ever. */
static enum err check_recursion(const struct grammar *g)
{
    OWNED_MEM bool *nullable = calloc(g->n_nodes, sizeof(*nullable));
    OWNED_MEM uint8_t *color = calloc(g->n_nodes, 1); /* 1: on the way, 2: done */
    OWNED_MEM uint32_t *way = malloc(2 * (size_t)g->n_nodes * sizeof(*way));
    if (!nullable || !color || !way)
        return err_set(ERR_NOMEM, "no memory for a grammar");
    for (bool changed = true, up = true; changed; up = !up) {
        changed = false;
        for (uint32_t k = 0; k < g->n_nodes; k++) {
            uint32_t i = up ? k : g->n_nodes - 1 - k;
            if (!nullable[i] && is_nullable(g, nullable, &g->nodes[i]))
                nullable[i] = changed = true;
        }
    }
    uint32_t *edge = way + g->n_nodes;
    for (uint32_t root = 0; root < g->n_nodes; root++) {
        if (color[root])
            continue;
        uint32_t n = 0;
        way[n] = root, edge[n++] = 0, color[root] = 1;
        while (n > 0) {
            uint32_t to = silent_edge(g, nullable, way[n - 1], edge[n - 1]++);
            if (to == UINT32_MAX) {
                color[way[--n]] = 2;
            } else if (color[to] == 1) {
                return err_set(ERR_INVALID, "$ref leads to itself without any content between");
            } else if (color[to] == 0) {
                way[n] = to, edge[n++] = 0, color[to] = 1;
            }
        }
    }
    return ERR_OK;
}

static void number_classes(struct grammar *g)
{
    uint32_t n = 1;
    memset(g->class_of, 0, sizeof(g->class_of));
    for (uint32_t s = 0; s < g->n_sets && n < N_SYMBOLS; s++) {
        uint16_t moved[N_SYMBOLS]; /* class -> class of its members in the set */
        bool outside[N_SYMBOLS] = {false};
        memset(moved, 0xff, sizeof(moved));
        for (uint32_t i = 0; i < N_SYMBOLS; i++)
            if (!symset_has(&g->sets[s], i))
                outside[g->class_of[i]] = true;
        for (uint32_t i = 0; i < N_SYMBOLS; i++) {
            uint16_t c = g->class_of[i];
            if (!symset_has(&g->sets[s], i) || !outside[c])
                continue;
            if (moved[c] == UINT16_MAX)
                moved[c] = (uint16_t)n++;
            g->class_of[i] = moved[c];
        }
    }
    g->n_classes = n;
}

enum err program_finish(struct grammar *g)
{
    TRY(g->err);
    find_live(g);
    if (!g->nodes[g->start].live)
        return err_set(ERR_INVALID, "no value can match the schema");
    TRY(check_recursion(g));
    number_classes(g);
    g->class_sets = calloc(MAX(g->n_sets, 1u), g->n_classes);
    if (!g->class_sets)
        return err_set(ERR_NOMEM, "no memory for a grammar");
    for (uint32_t s = 0; s < g->n_sets; s++)
        for (uint32_t i = 0; i < N_SYMBOLS; i++)
            if (symset_has(&g->sets[s], i))
                g->class_sets[(size_t)s * g->n_classes + g->class_of[i]] = 1;
    return ERR_OK;
}
