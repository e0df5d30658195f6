/* schema.c: JSON Schema to automaton.
 *
 * A schema is compiled where it stands, with what follows it as continuation, so most of an answer
 * needs no frame. Where it may come again ($ref, items, merged ones) it is a rule, compiled once:
 * rules wait in a list, so C recursion is bounded by the nesting of the text.
 *
 * Two forms. JSON: inside JSON, strings quoted. ARGUMENT: a call's argument, between tags: strings
 * verbatim, all else JSON. The client types an argument's text by the schema, and where a string is
 * one of several types, text that happens to be JSON of another type becomes that type. So if those
 * others have constraints (the form's bits name them), strings may not begin like them.
 */
#include "common/grammar/schema_impl.h"

#include <stdio.h>
#include <string.h>

#define MAX_RULES  4000
#define MAX_BUDGET 100000

/* ---- rules ---- */

static enum err rule_get(struct schema_compiler *c, const json_t *schema, unsigned form,
                         const char *where, uint32_t *ret)
{
    for (size_t i = 0; i < c->n_rules; i++)
        if (c->rules[i].schema == schema && c->rules[i].form == form) {
            *ret = c->rules[i].forward;
            return ERR_OK;
        }
    if (c->n_rules == MAX_RULES)
        return err_set(ERR_TOO_LARGE, "the schema is too large: it unfolds to more than %d parts",
                       MAX_RULES);
    if (c->n_rules == c->cap_rules) {
        size_t cap = c->cap_rules ? c->cap_rules * 2 : 32;
        void *rules = realloc(c->rules, cap * sizeof(*c->rules));
        if (!rules)
            return err_set(ERR_NOMEM, "no memory for a schema");
        c->rules = rules;
        c->cap_rules = cap;
    }
    struct rule *r = &c->rules[c->n_rules++];
    *r = (struct rule){
        .schema = json_incref((json_t *)schema), .form = form, .forward = program_forward(c->g)};
    size_t n = MIN(strlen(where), sizeof(r->where) - 1);
    memcpy(r->where, where, n); /* cut where it is too long */
    *ret = r->forward;
    return c->g->err;
}

/* The rule of a schema that was put together: equal ones are one. */
static enum err rule_merged(struct schema_compiler *c, json_t *schema, unsigned form, uint32_t *ret)
{
    char *text = json_dumps(schema, JSON_COMPACT | JSON_SORT_KEYS);
    if (!text)
        return err_set(ERR_NOMEM, "no memory for a schema");
    json_t *known = json_object_get(c->known, text);
    if (!known) {
        json_object_set(c->known, text, schema);
        known = schema;
    }
    free(text);
    return rule_get(c, known, form, c->where, ret);
}

enum err schema_run_rules(struct schema_compiler *c)
{
    for (; c->n_done < c->n_rules; c->n_done++) {
        struct rule r = c->rules[c->n_done];
        uint32_t node;
        memcpy(c->where, r.where, sizeof(c->where));
        TRY(schema_build(c, r.schema, r.form, PROGRAM_RETURN, &node));
        program_resolve(c->g, r.forward, node);
    }
    return c->g->err;
}

/* Compiles a member of the schema in hand, whose sentences name it. */
enum err schema_build_member(struct schema_compiler *c, const char *kind, const char *name,
                             const json_t *schema, unsigned form, uint32_t next, uint32_t *ret)
{
    size_t n = strlen(c->where);
    snprintf(c->where + n, sizeof(c->where) - n, "%s%s%s%.60s", n ? "." : "", kind,
             name[0] ? "." : "", name);
    enum err err = schema_build(c, schema, form, next, ret);
    c->where[n] = 0;
    return err;
}

enum err schema_rule_member(struct schema_compiler *c, const char *kind, const json_t *schema,
                            uint32_t *ret)
{
    char where[2 * SCHEMA_MAX_WHERE];
    snprintf(where, sizeof(where), "%s%s%s", c->where, c->where[0] ? "." : "", kind);
    if (json_object_get(schema, "allOf") && json_object_size(schema) == 1) {
        json_t *same = (json_t *)schema; /* perhaps put together */
        return rule_merged(c, same, FORM_JSON, ret);
    }
    return rule_get(c, schema, FORM_JSON, where, ret);
}

/* ---- combinations ---- */

static enum err build_union(struct schema_compiler *c, const char *kind, const json_t *branches,
                            unsigned form, uint32_t next, uint32_t *ret)
{
    uint32_t edges[MERGE_MAX];
    size_t n = json_array_size(branches);
    if (n > MERGE_MAX)
        return schema_refuse(c->where, "\"%s\" has more than %d branches", kind, MERGE_MAX);
    for (size_t i = 0; i < n; i++) {
        char name[24];
        snprintf(name, sizeof(name), "%zu", i);
        TRY(schema_build_member(c, kind, name, json_array_get(branches, i), form, next, &edges[i]));
    }
    *ret = program_split(c->g, edges, n);
    return c->g->err;
}

/* Keywords that say something, the given one aside. */
static bool says_more(const json_t *schema, const char *but)
{
    static const char *const words_[] = {"$ref",
                                         "allOf",
                                         "anyOf",
                                         "oneOf",
                                         "type",
                                         "enum",
                                         "const",
                                         "properties",
                                         "required",
                                         "additionalProperties",
                                         "minProperties",
                                         "maxProperties",
                                         "items",
                                         "prefixItems",
                                         "minItems",
                                         "maxItems",
                                         "minLength",
                                         "maxLength",
                                         "pattern",
                                         "format",
                                         "minimum",
                                         "maximum",
                                         "exclusiveMinimum",
                                         "exclusiveMaximum"};
    for (size_t i = 0; i < ARRAY_LEN(words_); i++)
        if (strcmp(words_[i], but) != 0 && json_object_get(schema, words_[i]))
            return true;
    return false;
}

static enum err build_merged(struct schema_compiler *c, const json_t *schema, unsigned form,
                             uint32_t next, uint32_t *ret)
{
    json_t *list = NULL;
    uint32_t edges[MERGE_MAX], rule;
    TRY(schema_expand(&c->x, schema, &list));
    enum err err = ERR_OK;
    size_t n = 0;
    for (; n < json_array_size(list) && err == ERR_OK; n++) {
        err = rule_merged(c, json_array_get(list, n), form, &rule);
        if (err == ERR_OK)
            edges[n] = program_call(c->g, rule, next);
    }
    json_decref(list);
    TRY(err);
    *ret = program_split(c->g, edges, n);
    return c->g->err;
}

enum err schema_build(struct schema_compiler *c, const json_t *schema, unsigned form, uint32_t next,
                      uint32_t *ret)
{
    *ret = PROGRAM_FAIL;
    TRY(c->g->err);
    if (json_is_false(schema))
        return ERR_OK;
    c->x.where = c->where;
    if (json_is_true(schema))
        return schema_build_plain(c, c->empty, form, next, ret);
    unsigned kinds;
    TRY(schema_keywords(schema, c->where, &kinds));
    if (!(kinds & 1u << KEYWORD_COMBINES))
        return schema_build_plain(c, schema, form, next, ret);

    const json_t *ref = json_object_get(schema, "$ref"), *all = json_object_get(schema, "allOf");
    const json_t *some = json_object_get(schema, "anyOf"), *one = json_object_get(schema, "oneOf");
    if (ref && !says_more(schema, "$ref")) {
        const json_t *target;
        uint32_t rule;
        TRY(schema_follow(&c->x, json_string_value(ref), &target));
        TRY(rule_get(c, target, form, json_string_value(ref), &rule));
        *ret = program_call(c->g, rule, next);
        return c->g->err;
    }
    if (json_array_size(all) == 1 && !says_more(schema, "allOf"))
        return schema_build(c, json_array_get(all, 0), form, next, ret);
    if (some && !says_more(schema, "anyOf"))
        return build_union(c, "anyOf", some, form, next, ret);
    if (one && !says_more(schema, "oneOf")) {
        TRY(schema_check_disjoint(&c->x, one));
        return build_union(c, "oneOf", one, form, next, ret);
    }
    return build_merged(c, schema, form, next, ret);
}

/* ---- entry ---- */

enum err schema_compiler_create(struct grammar *g, const json_t *root, const char *where,
                                struct schema_compiler **ret)
{
    struct schema_compiler *c = calloc(1, sizeof(*c));
    json_t *known = json_object(), *empty = json_object();
    if (!c || !known || !empty) {
        free(c);
        json_decref(known);
        json_decref(empty);
        return err_set(ERR_NOMEM, "no memory for a schema");
    }
    c->g = g;
    c->x = (struct schema_context){.root = root, .where = c->where, .budget = MAX_BUDGET};
    c->known = known;
    c->empty = empty;
    snprintf(c->where, sizeof(c->where), "%s", where);
    *ret = c;
    return ERR_OK;
}

void schema_compiler_destroy(struct schema_compiler *c)
{
    if (!c)
        return;
    for (size_t i = 0; i < c->n_rules; i++)
        json_decref(c->rules[i].schema);
    free(c->rules);
    json_decref(c->known);
    json_decref(c->empty);
    free(c);
}

enum err schema_build_json(struct schema_compiler *c, uint32_t next, uint32_t *ret)
{
    TRY(schema_build(c, c->x.root, FORM_JSON, next, ret));
    return schema_run_rules(c);
}
