/* api_grammar.c: from tool_choice, strict tools and response formats to the grammar of an output.
 *
 *   tool_choice       response format   output
 *   required, named   (does not matter) calls; named: one, of that function
 *   auto              a schema          an answer in JSON, or calls
 *   auto              none              text and calls; only if a tool is strict, else no grammar
 *   none, no tools    a schema          an answer in JSON
 *
 * A tool that is not strict and whose parameters cannot be enforced may have any arguments. All
 * else that cannot be enforced is refused, with the grammar compiler's sentence.
 */
#include "router/api_internal.h"

#include <string.h>

#include "common/grammar/grammar.h"

static const char *tool_name(const json_t *tool)
{
    return json_string_value(json_object_get(json_object_get(tool, "function"), "name"));
}

static bool is_strict(const json_t *tool)
{
    return json_is_true(json_object_get(json_object_get(tool, "function"), "strict"));
}

static bool any_strict(const json_t *tools)
{
    for (size_t i = 0; i < json_array_size(tools); i++)
        if (is_strict(json_array_get(tools, i)))
            return true;
    return false;
}

static enum err no_memory(struct api_call *call)
{
    return api_fail_err(&call->failure, err_set(ERR_NOMEM, "no memory for the request"), "");
}

/* A tool as grammars know it; NULL: out of memory. */
static json_t *grammar_tool(const json_t *tool)
{
    json_t *function = json_object_get(tool, "function");
    json_t *out = json_pack("{s:O,s:O*}", "name", json_object_get(function, "name"), "parameters",
                            json_object_get(function, "parameters"));
    if (!out || is_strict(tool))
        return out;
    json_t *spec = json_pack("{s:[O]}", "tools", out);
    char *text = json_dumps(spec, JSON_COMPACT);
    struct grammar *g = NULL;
    if (!text || grammar_compile(text, strlen(text), &g) != ERR_OK)
        json_object_set_new(out, "parameters", json_true());
    grammar_destroy(g);
    free(text);
    json_decref(spec);
    return out;
}

static json_t *grammar_tools(const json_t *tools, const char *only)
{
    json_t *all = json_array();
    for (size_t i = 0; i < json_array_size(tools); i++) {
        const json_t *tool = json_array_get(tools, i);
        if (!only || !strcmp(tool_name(tool), only))
            json_array_append_new(all, grammar_tool(tool));
    }
    return all;
}

static enum err check_choice(struct api_call *call, const json_t *tools)
{
    const struct api_params *p = &call->params;
    struct api_failure *f = &call->failure;
    if (p->tool_choice == API_TOOLS_AUTO || p->tool_choice == API_TOOLS_NONE)
        return ERR_OK;
    if (json_array_size(tools) == 0)
        return api_refuse(f, "tool_choice", "tool_choice asks for a call, but there are no tools");
    for (size_t i = 0; p->tool_named && i < json_array_size(tools); i++)
        if (!strcmp(tool_name(json_array_get(tools, i)), p->tool_named))
            return ERR_OK;
    return p->tool_named ? api_refuse(f, "tool_choice",
                                      "tool_choice names \"%.64s\", which is none of "
                                      "the tools",
                                      p->tool_named)
                         : ERR_OK;
}

/* Parameters that a grammar leaves no room for. */
static enum err check_others(struct api_call *call, bool calls, const char *why)
{
    const struct api_params *p = &call->params;
    const char *other = p->ignore_eos               ? "ignore_eos"
                        : p->min_tokens > 0         ? "min_tokens"
                        : p->continue_final_message ? "continue_final_message"
                                                    : NULL;
    if (other)
        return api_refuse(&call->failure, other, "%s together with %s is not supported", other,
                          why);
    if (calls && (!call->api->parse_calls || call->api->call_end_id < 0))
        return api_refuse(&call->failure, "tool_choice",
                          "%s is not supported without a tool call parser", why);
    return ERR_OK;
}

static enum err keep_text(struct api_call *call, json_t *spec, const char *param)
{
    char *text = json_dumps(spec, JSON_COMPACT);
    struct grammar *g = NULL;
    if (!text)
        return no_memory(call);
    size_t n = strlen(text);
    enum err e = grammar_compile(text, n, &g);
    grammar_destroy(g);
    if (e == ERR_OK) {
        call->grammar = text;
        call->n_grammar = n;
        return ERR_OK;
    }
    free(text);
    return e == ERR_NOMEM ? no_memory(call)
                          : api_fail(&call->failure, 400, "unsupported_value", param, "%s: %s",
                                     param, err_text(e));
}

enum err api_grammar_make(struct api_call *call, const json_t *tools)
{
    const struct api_params *p = &call->params;
    TRY(check_choice(call, tools));
    bool forced = p->tool_choice == API_TOOLS_REQUIRED;
    bool strict = any_strict(tools), schema = p->schema && !forced;
    bool calls = forced || (json_array_size(tools) > 0 && (schema || strict));
    if (!calls && !schema)
        return ERR_OK;
    TRY(check_others(call, calls,
                     schema   ? p->schema_param
                     : forced ? "tool_choice"
                              : "a strict tool"));
    json_t *spec = json_pack("{s:b,s:b}", "reasoning", call->thinking, "one_call",
                             !p->parallel_tool_calls || p->tool_named);
    if (schema)
        json_object_set(spec, "schema", p->schema);
    if (calls)
        json_object_set_new(spec, "tools", grammar_tools(tools, p->tool_named));
    if (!forced && !schema)
        json_object_set_new(spec, "free", json_true());
    enum err e = spec ? keep_text(call, spec, schema ? p->schema_param : "tools") : no_memory(call);
    json_decref(spec);
    return e;
}
