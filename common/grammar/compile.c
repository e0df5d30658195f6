/* compile.c: the text that travels with a request, see grammar.h. */
#include <stdio.h>
#include <string.h>

#include "common/base/json.h"
#include "common/grammar/program.h"
#include "common/grammar/schema.h"

#define MAX_TOOLS 1024

static const struct json_limits limits = {
    .max_bytes = GRAMMAR_MAX_BYTES, .max_depth = 72, .max_containers = 20000, .max_values = 100000};

/* Any output symbol that is neither of two tags. */
static uint32_t anything_but(struct grammar *g, enum grammar_tag a, enum grammar_tag b,
                             uint32_t next)
{
    struct symset set = {0};
    for (uint32_t s = 0; s < N_SYMBOLS; s++)
        if (s != SYMBOL_TAG(a) && s != SYMBOL_TAG(b))
            symset_add(&set, s);
    return program_set(g, &set, next);
}

/* Text without tags, as long as it likes, then `after`. */
static uint32_t free_text(struct grammar *g, uint32_t after)
{
    struct symset set = {0};
    symset_range(&set, 0, SYMBOL_OTHER);
    uint32_t loop = program_forward(g);
    program_resolve(g, loop, program_either(g, program_set(g, &set, loop), after));
    return loop;
}

static enum err build_tool(struct grammar *g, const json_t *tool, uint32_t end, uint32_t *ret)
{
    const json_t *name = json_object_get(tool, "name");
    const json_t *parameters = json_object_get(tool, "parameters");
    if (!json_is_string(name) || !json_string_length(name))
        return err_set(ERR_INVALID, "a tool has no name");
    for (const char *c = json_string_value(name); *c; c++)
        if ((unsigned char)*c <= ' ')
            return err_set(ERR_INVALID, "tool \"%.64s\": a name cannot have a space",
                           json_string_value(name));
    uint32_t arguments = end;
    if (parameters && !json_is_null(parameters)) {
        char where[100];
        snprintf(where, sizeof(where), "tool %.80s", json_string_value(name));
        if (!json_is_object(parameters) && !json_is_boolean(parameters))
            return err_set(ERR_INVALID, "%s: parameters must be a schema", where);
        OWNED(schema_compiler) c = NULL;
        TRY(schema_compiler_create(g, parameters, where, &c));
        TRY(schema_build_arguments(c, end, &arguments));
    }
    *ret = program_text(g, json_string_value(name), json_string_length(name), arguments);
    return g->err;
}

/* One call, or several one after the other; then the output is over. */
static enum err build_calls(struct grammar *g, const json_t *tools, bool one, uint32_t *ret)
{
    size_t n = json_array_size(tools);
    if (n == 0 || n > MAX_TOOLS)
        return err_set(ERR_INVALID, "tools has %zu entries, must have between 1 and %d", n,
                       MAX_TOOLS);
    OWNED_MEM uint32_t *edges = malloc(n * sizeof(*edges));
    if (!edges)
        return err_set(ERR_NOMEM, "no memory for a grammar");
    uint32_t again = program_forward(g);
    uint32_t end = program_tag(g, TAG_CALL_END, one ? PROGRAM_RETURN : again);
    for (size_t i = 0; i < n; i++)
        TRY(build_tool(g, json_array_get(tools, i), end, &edges[i]));
    *ret = program_tag(g, TAG_CALL, program_split(g, edges, n));
    program_resolve(g, again, program_either(g, PROGRAM_RETURN, *ret));
    return g->err;
}

static enum err build(struct grammar *g, const json_t *spec)
{
    const json_t *schema = json_object_get(spec, "schema"), *tools = json_object_get(spec, "tools");
    bool reasoning = false, free_answer = false, one = false;
    TRY(json_get_bool(spec, "reasoning", &reasoning));
    TRY(json_get_bool(spec, "free", &free_answer));
    TRY(json_get_bool(spec, "one_call", &one));
    uint32_t json = PROGRAM_FAIL, calls = PROGRAM_FAIL, text = PROGRAM_FAIL;
    if (schema) {
        if (!json_is_object(schema) && !json_is_boolean(schema))
            return err_set(ERR_INVALID, "the schema must be an object");
        OWNED(schema_compiler) c = NULL;
        TRY(schema_compiler_create(g, schema, "", &c));
        TRY(schema_build_json(c, PROGRAM_RETURN, &json));
    }
    if (tools)
        TRY(build_calls(g, tools, one, &calls));
    if (free_answer)
        text = free_text(g, program_either(g, PROGRAM_RETURN, calls));
    else
        text = calls;
    g->start = program_either(g, json, text);
    if (reasoning) { /* a call may begin where </think> was forgotten; clients drop the new lines */
        uint32_t loop = program_forward(g), line = program_text(g, "\n", 1, PROGRAM_RETURN);
        uint32_t answer = program_repeat(g, line, 0, 2, g->start);
        uint32_t edges[] = {anything_but(g, TAG_THINK_END, TAG_CALL, loop),
                            program_tag(g, TAG_THINK_END, answer), calls};
        program_resolve(g, loop, program_split(g, edges, 3));
        g->start = loop;
    }
    return g->err;
}

enum err grammar_compile(const char *text, size_t n, struct grammar **ret)
{
    json_t *spec = NULL;
    TRY(json_parse(text, n, &limits, &spec));
    OWNED(grammar) g = calloc(1, sizeof(*g));
    enum err err = g ? program_init(g) : err_set(ERR_NOMEM, "no memory for a grammar");
    if (err == ERR_OK)
        err = json_is_object(spec) ? build(g, spec)
                                   : err_set(ERR_INVALID, "a grammar must be an object");
    json_decref(spec);
    TRY(err);
    TRY(program_finish(g));
    *ret = take(&g);
    return ERR_OK;
}
