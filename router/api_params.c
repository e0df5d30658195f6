/* api_params.c: every parameter of every dialect, in one table.
 *
 * A row says who knows the parameter, what it must be and what happens with it. Nothing is ignored
 * by accident: a member without a row is refused by name, one that would change the answer in a way
 * we cannot honour is refused by name, and the harmless ones that SDKs and agents send are listed
 * as ignored. null always means "not said". Values that ask for nothing (false, "", [], {}) pass
 * where the parameter itself is not supported.
 *
 * Cross-field rules come after the rows, in params_check.
 */
#include "router/api_internal.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "common/base/hash.h"

enum kind {
    INT,    /* int64_t at, within min..max */
    REAL,   /* double at, within min..max */
    BOOL,   /* bool at */
    READ,   /* by read() */
    IGNORE, /* harmless, any value */
    SHAPE,  /* the shape reads it itself */
    REFUSE, /* unless it asks for nothing */
    ONLY,   /* a number: nothing but min */
};

typedef enum err read_fn(const char *name, const json_t *value, const struct cluster_model *model,
                         struct api_params *p, struct api_failure *f);
static read_fn read_model, read_seed, read_stop, read_stop_ids, read_logprobs, read_effort,
    read_template_kwargs, read_thinking, read_enable_thinking, read_reasoning, read_stream_options,
    read_tool_choice, read_response_format, read_guided_json, read_structured, read_modalities,
    read_cache_salt, read_decay, read_bias, read_text, read_include, read_truncation,
    read_output_config, read_anthropic_choice;

struct row {
    const char *name;
    unsigned dialects;
    enum kind kind;
    size_t at;
    double min, max;
    read_fn *read;
};

#define OPENAI (API_CHAT | API_COMPLETIONS)
#define ALL    (OPENAI | API_GENERATE)
#define ANY    (OPENAI | NEWER | API_GENERATE_OUTER | API_TOKENIZE | API_DETOKENIZE)
#define NEWER  (API_RESPONSES | API_MESSAGES)
#define CHATTY (API_CHAT | API_TOKENIZE)
#define AT(f)  offsetof(struct api_params, f)

#define MAX_TOKENS 1e9

/* clang-format off */
static const struct row rows[] = {
    // what to generate from: read by the shapes
    {"model",                   ANY,                 READ, .read = read_model},
    {"messages",                CHATTY,              SHAPE},
    {"tools",                   CHATTY,              SHAPE},
    {"messages",                API_MESSAGES,        SHAPE},
    {"tools",                   NEWER,               SHAPE},
    {"input",                   API_RESPONSES,       SHAPE},
    {"instructions",            API_RESPONSES,       SHAPE},
    {"system",                  API_MESSAGES,        SHAPE},
    {"prompt",                  API_COMPLETIONS | API_TOKENIZE, SHAPE},
    {"text",                    API_TOKENIZE,        SHAPE},
    {"inputs",                  API_GENERATE_OUTER | API_TOKENIZE, SHAPE},
    {"parameters",              API_GENERATE_OUTER,  SHAPE},
    {"parameters",              API_TOKENIZE,        IGNORE},
    {"tokens",                  API_DETOKENIZE,      SHAPE},
    {"multimodal_params",       API_GENERATE_OUTER,  SHAPE},

    // sampling
    {"temperature",             OPENAI | NEWER,      REAL, AT(temperature), 0, 2},
    {"temperature",             API_GENERATE,        REAL, AT(temperature), 0, 100},
    {"top_p",                   ALL | NEWER,         REAL, AT(top_p), 0, 1},
    {"top_k",                   ALL | NEWER,         INT,  AT(top_k), -1, INT32_MAX},
    {"min_p",                   ALL | NEWER,         REAL, AT(min_p), 0, 1},
    {"seed",                    ALL | NEWER,         READ, .read = read_seed},
    {"logit_bias",              ALL | NEWER,         READ, .read = read_bias},
    {"presence_penalty",        ALL | NEWER,         REAL, AT(presence_penalty), -2, 2},
    {"frequency_penalty",       ALL | NEWER,         REAL, AT(frequency_penalty), -2, 2},
    {"repetition_penalty",      ALL | NEWER,         REAL, AT(repetition_penalty), 0.01, 100},
    {"do_sample",               API_CHAT | API_GENERATE, BOOL, AT(do_sample)},

    // length and stopping
    {"max_tokens",              API_CHAT,            INT,  AT(max_tokens), 1, MAX_TOKENS},
    {"max_tokens",              API_COMPLETIONS,     INT,  AT(max_tokens), 0, MAX_TOKENS},
    {"max_tokens",              API_MESSAGES,        INT,  AT(max_tokens), 1, MAX_TOKENS},
    {"max_output_tokens",       API_RESPONSES,       INT,  AT(max_tokens), 1, MAX_TOKENS},
    {"max_completion_tokens",   API_CHAT,            INT,  AT(max_completion_tokens), 1, MAX_TOKENS},
    {"max_new_tokens",          API_GENERATE,        INT,  AT(max_tokens), 1, MAX_TOKENS},
    {"min_tokens",              OPENAI,              INT,  AT(min_tokens), 0, MAX_TOKENS},
    {"min_new_tokens",          API_GENERATE,        INT,  AT(min_tokens), 0, MAX_TOKENS},
    {"stop",                    OPENAI,              READ, .read = read_stop},
    {"stop",                    API_RESPONSES,       READ, .read = read_stop},
    {"stop_sequences",          API_GENERATE | API_MESSAGES, READ, .read = read_stop},
    {"stop_token_ids",          ALL | NEWER,         READ, .read = read_stop_ids},
    {"ignore_eos",              ALL | NEWER,         BOOL, AT(ignore_eos)},
    {"include_stop_str_in_output", OPENAI,           BOOL, AT(include_stop)},

    // form of the answer
    {"n",                       ALL,                 INT,  AT(n), 1, API_MAX_N},
    {"best_of",                 API_COMPLETIONS | API_GENERATE, INT, AT(best_of), 1, API_MAX_N},
    {"stream",                  OPENAI | NEWER,      BOOL, AT(stream)},
    {"stream_options",          OPENAI | API_RESPONSES, READ, .read = read_stream_options},
    {"logprobs",                OPENAI,              READ, .read = read_logprobs},
    {"top_logprobs",            API_CHAT,            INT,  AT(top_logprobs), 0, WIRE_MAX_TOP},
    {"echo",                    API_COMPLETIONS,     BOOL, AT(echo)},
    {"skip_special_tokens",     ALL,                 BOOL, AT(skip_special)},
    {"return_details",          API_GENERATE,        BOOL, AT(return_details)},

    // chat template and reasoning
    {"chat_template_kwargs",    CHATTY | NEWER,      READ, .read = read_template_kwargs},
    {"thinking",                API_CHAT | API_MESSAGES, READ, .read = read_thinking},
    {"enable_thinking",         API_CHAT,            READ, .read = read_enable_thinking},
    {"reasoning_effort",        API_CHAT,            READ, .read = read_effort},
    {"reasoning",               API_CHAT | API_RESPONSES, READ, .read = read_reasoning},
    {"separate_reasoning",      API_CHAT,            BOOL, AT(separate_reasoning)},
    {"include_reasoning",       API_CHAT,            BOOL, AT(include_reasoning)},
    {"add_generation_prompt",   CHATTY,              BOOL, AT(add_generation_prompt)},
    {"continue_final_message",  CHATTY,              BOOL, AT(continue_final_message)},
    {"tool_choice",             CHATTY | API_RESPONSES, READ, .read = read_tool_choice},
    {"tool_choice",             API_MESSAGES,        READ, .read = read_anthropic_choice},
    {"parallel_tool_calls",     API_CHAT | API_RESPONSES, BOOL, AT(parallel_tool_calls)},
    {"response_format",         OPENAI,              READ, .read = read_response_format},
    {"guided_json",             ALL,                 READ, .read = read_guided_json},
    {"structured_outputs",      OPENAI,              READ, .read = read_structured},
    {"modalities",              API_CHAT,            READ, .read = read_modalities},
    {"cache_salt",              ALL | NEWER,         READ, .read = read_cache_salt},
    {"text",                    API_RESPONSES,       READ, .read = read_text},
    {"include",                 API_RESPONSES,       READ, .read = read_include},
    {"truncation",              API_RESPONSES,       READ, .read = read_truncation},
    {"output_config",           API_MESSAGES,        READ, .read = read_output_config},

    // what changes no answer
    {"add_special_tokens",      ALL | API_TOKENIZE,  IGNORE}, // the tokeniser adds none
    {"add_spaces_between_special_tokens", API_GENERATE, IGNORE},
    {"spaces_between_special_tokens", OPENAI,        IGNORE},
    {"user",                    ALL | NEWER,              IGNORE},
    {"metadata",                OPENAI | NEWER,       IGNORE},
    {"store",                   OPENAI | NEWER,       IGNORE},
    {"service_tier",            OPENAI | NEWER,       IGNORE},
    {"prompt_cache_key",        OPENAI | NEWER,       IGNORE},
    {"prompt_cache_retention",  OPENAI | NEWER,       IGNORE},
    {"cache_prompt",            OPENAI,              IGNORE},
    {"safety_identifier",       OPENAI | NEWER,       IGNORE},
    {"verbosity",               API_CHAT,            IGNORE},
    {"prediction",              API_CHAT,            IGNORE},
    {"priority",                OPENAI,              IGNORE},
    {"request_id",              OPENAI,              IGNORE},
    {"tool_stream",             API_CHAT,            IGNORE},
    {"stream_reasoning",        API_CHAT,            IGNORE},
    {"usage",                   API_CHAT,            IGNORE},
    {"keep_alive",              OPENAI,              IGNORE},
    {"return_token_strs",       API_TOKENIZE,        IGNORE},
    {"max_tool_calls",          API_RESPONSES,       IGNORE}, // counts calls of tools that run here
    {"prompt_cache_options",    API_RESPONSES,       IGNORE},
    {"client_metadata",         API_RESPONSES,       IGNORE},
    {"cache_control",           API_MESSAGES,        IGNORE}, // every prefix is cached
    {"context_management",      API_MESSAGES,        IGNORE}, // the template clears old reasoning
    {"inference_geo",           API_MESSAGES,        IGNORE},
    {"speed",                   API_MESSAGES,        IGNORE},
    {"diagnostics",             API_MESSAGES,        IGNORE},

    // what would, and is not there
    {"length_penalty",          OPENAI,              ONLY, .min = 1},
    {"exponential_decay_length_penalty", API_GENERATE, READ, .read = read_decay},
    {"early_stopping",          OPENAI,              REFUSE},
    {"use_beam_search",         OPENAI,              REFUSE},
    {"suffix",                  API_COMPLETIONS,     REFUSE},
    {"functions",               API_CHAT,            REFUSE},
    {"function_call",           API_CHAT,            READ, .read = read_tool_choice},
    {"audio",                   API_CHAT,            REFUSE},
    {"web_search_options",      API_CHAT,            REFUSE},
    {"prompt_logprobs",         ALL,                 REFUSE},
    {"prompt_embeds",           OPENAI,              REFUSE},
    {"truncate_prompt_tokens",  OPENAI | API_TOKENIZE, REFUSE},
    {"bad_words",               OPENAI,              REFUSE},
    {"allowed_token_ids",       ALL,                 REFUSE},
    {"logits_processors",       OPENAI,              REFUSE},
    {"guided_regex",            OPENAI,              REFUSE},
    {"guided_choice",           OPENAI,              REFUSE},
    {"guided_grammar",          ALL,                 REFUSE},
    {"regular_constraint",      API_GENERATE,        REFUSE},
    {"json_schema",             OPENAI,              REFUSE},
    {"regex",                   OPENAI,              REFUSE},
    {"ebnf",                    OPENAI,              REFUSE},
    {"grammar",                 OPENAI,              REFUSE},
    {"documents",               CHATTY,              REFUSE},
    {"chat_template",           CHATTY,              REFUSE},
    {"mm_processor_kwargs",     CHATTY,              REFUSE},
    {"return_token_ids",        OPENAI,              REFUSE},
    {"return_tokens_as_token_ids", OPENAI,           REFUSE},
    {"input_penalty",           API_GENERATE,        REFUSE},
    {"print_eos_token",         API_GENERATE,        REFUSE},
    {"kv_transfer_params",      OPENAI,              REFUSE},
    {"previous_response_id",    API_RESPONSES,       REFUSE}, // nothing is kept: send the history
    {"conversation",            API_RESPONSES,       REFUSE},
    {"prompt",                  API_RESPONSES,       REFUSE},
    {"background",              API_RESPONSES,       REFUSE},
    {"context_management",      API_RESPONSES,       REFUSE},
    {"moderation",              API_RESPONSES,       REFUSE},
    {"top_logprobs",            API_RESPONSES,       ONLY, .min = 0},
    {"container",               API_MESSAGES,        REFUSE},
    {"mcp_servers",             API_MESSAGES,        REFUSE},
};
/* clang-format on */

static enum err params_check(enum api_dialect dialect, struct api_params *p, struct api_failure *f);

void api_params_init(struct api_params *p)
{
    *p = (struct api_params){.temperature = -1,
                             .top_p = -1,
                             .min_p = -1,
                             .repetition_penalty = 1,
                             .top_k = -2,
                             .n = 1,
                             .best_of = 0,
                             .max_tokens = -1,
                             .max_completion_tokens = -1,
                             .n_logprobs = -1,
                             .top_logprobs = -1,
                             .skip_special = true,
                             .do_sample = true,
                             .separate_reasoning = true,
                             .include_reasoning = true,
                             .parallel_tool_calls = true,
                             .add_generation_prompt = true,
                             .clear_thinking = true};
}

void api_params_finish(struct api_params *p)
{
    free(p->bias_id);
    p->bias_id = NULL;
    json_decref(p->schema);
    p->schema = NULL;
}

static const char *type_name(const json_t *value)
{
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "an array";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "an integer";
    case JSON_REAL:
        return "a number";
    case JSON_TRUE:
    case JSON_FALSE:
        return "a boolean";
    case JSON_NULL:
        return "null";
    }
    return "?";
}

static enum err wrong_type(struct api_failure *f, const char *name, const char *want,
                           const json_t *value)
{
    return api_refuse(f, name, "%s must be %s, not %s", name, want, type_name(value));
}

static enum err unsupported(struct api_failure *f, const char *name)
{
    return api_fail(f, 400, "unsupported_parameter", name, "%s is not supported", name);
}

static bool asks_for_nothing(const json_t *value)
{
    return json_is_false(value) || (json_is_string(value) && json_string_length(value) == 0) ||
           (json_is_array(value) && json_array_size(value) == 0) ||
           (json_is_object(value) && json_object_size(value) == 0);
}

/* An integer, or a real that is one (some languages write 16.0). */
static bool get_int(const json_t *value, int64_t *ret)
{
    if (json_is_integer(value)) {
        *ret = json_integer_value(value);
        return true;
    }
    double v = json_real_value(value);
    if (!json_is_real(value) || !(fabs(v) < 9e15) || v != floor(v))
        return false;
    *ret = (int64_t)v;
    return true;
}

static enum err read_row(const struct row *row, const json_t *value,
                         const struct cluster_model *model, struct api_params *p,
                         struct api_failure *f)
{
    void *at = (char *)p + row->at;
    const char *name = row->name;
    switch (row->kind) {
    case INT: {
        int64_t v;
        if (!get_int(value, &v))
            return wrong_type(f, name, "an integer", value);
        if ((double)v < row->min || (double)v > row->max)
            return api_refuse(f, name, "%s is %lld, must be between %.0f and %.0f", name,
                              (long long)v, row->min, row->max);
        *(int64_t *)at = v;
        return ERR_OK;
    }
    case REAL: {
        if (!json_is_number(value))
            return wrong_type(f, name, "a number", value);
        double v = json_number_value(value);
        if (!(v >= row->min && v <= row->max)) /* NaN fails too */
            return api_refuse(f, name, "%s is %g, must be between %g and %g", name, v, row->min,
                              row->max);
        *(double *)at = v;
        return ERR_OK;
    }
    case BOOL:
        if (!json_is_boolean(value))
            return wrong_type(f, name, "a boolean", value);
        *(bool *)at = json_is_true(value);
        return ERR_OK;
    case READ:
        return row->read(name, value, model, p, f);
    case IGNORE:
    case SHAPE:
        return ERR_OK;
    case REFUSE:
        return asks_for_nothing(value) ? ERR_OK : unsupported(f, name);
    case ONLY:
        if (!json_is_number(value) || json_number_value(value) != row->min)
            return api_refuse(f, name, "%s can only be %g here", name, row->min);
        return ERR_OK;
    }
    return ERR_OK;
}

enum err api_params_read(const json_t *body, enum api_dialect dialect,
                         const struct cluster_model *model, struct api_params *p,
                         struct api_failure *f)
{
    const char *key;
    json_t *value;
    if (dialect == API_GENERATE)
        p->do_sample = false;
    json_object_foreach ((json_t *)body, key, value) {
        const struct row *row = NULL;
        for (size_t i = 0; i < ARRAY_LEN(rows) && !row; i++)
            if (rows[i].dialects & dialect && !strcmp(rows[i].name, key))
                row = &rows[i];
        if (!row)
            return api_fail(f, 400, "unknown_parameter", key, "unknown parameter \"%.80s\"", key);
        if (!json_is_null(value))
            TRY(read_row(row, value, model, p, f));
    }
    return params_check(dialect, p, f);
}

static enum err params_check(enum api_dialect dialect, struct api_params *p, struct api_failure *f)
{
    if (p->max_completion_tokens >= 0)
        p->max_tokens = p->max_completion_tokens;
    if (p->max_tokens > 0 && p->min_tokens > p->max_tokens)
        return api_refuse(f, dialect == API_GENERATE ? "min_new_tokens" : "min_tokens",
                          "min tokens is %lld, must not exceed max tokens, %lld",
                          (long long)p->min_tokens, (long long)p->max_tokens);
    if (dialect == API_CHAT && p->top_logprobs > 0 && p->n_logprobs < 0)
        return api_refuse(f, "top_logprobs", "top_logprobs needs logprobs to be true");
    if (dialect == API_CHAT && p->n_logprobs >= 0 && p->top_logprobs > 0)
        p->n_logprobs = p->top_logprobs;
    if (dialect == API_COMPLETIONS && p->best_of && p->best_of < p->n)
        return api_refuse(f, "best_of", "best_of is %lld, must not be less than n, %lld",
                          (long long)p->best_of, (long long)p->n);
    if (dialect == API_COMPLETIONS && p->best_of > p->n && p->stream)
        return api_refuse(f, "best_of", "best_of is %lld, more than n, which cannot be streamed",
                          (long long)p->best_of);
    if (dialect == API_GENERATE && p->best_of) {
        if (p->n > 1 && p->n != p->best_of)
            return api_refuse(f, "best_of", "best_of is %lld, must equal n, %lld",
                              (long long)p->best_of, (long long)p->n);
        p->n = p->best_of; /* LightLLM: n follows best_of */
    }
    if (p->echo && p->n_logprobs >= 0)
        return api_refuse(f, "echo", "echo together with logprobs is not supported");
    if (dialect == API_COMPLETIONS && p->max_tokens == 0 && !p->echo)
        return api_refuse(f, "max_tokens",
                          "max_tokens is 0, must be at least 1 unless echo is set");
    if (p->continue_final_message && p->add_generation_prompt)
        return api_refuse(f, "continue_final_message",
                          "continue_final_message needs add_generation_prompt to be false");
    if (p->thinking == API_THINKING_DEFAULT)
        p->thinking = p->effort;
    return ERR_OK;
}

void api_params_sampling(const struct api_params *p, const struct cluster_model *model,
                         struct wire_sampling *ret)
{
    double temperature = p->temperature >= 0 ? p->temperature : model->default_temperature;
    double top_p = p->top_p >= 0 ? p->top_p : model->default_top_p;
    int64_t top_k = p->top_k >= -1 ? p->top_k : model->default_top_k;
    /* Colder than this, float logits divided by it overflow: it is greedy anyway. */
    if (!p->do_sample || temperature < 1e-4 || top_p == 0 || top_k == 1)
        temperature = 0, top_p = 1, top_k = 0;
    *ret = (struct wire_sampling){
        .temperature = (float)temperature,
        .top_p = (float)MAX(top_p, (double)FLT_MIN),
        .min_p = temperature == 0 ? 0 : (float)MAX(p->min_p, 0),
        .presence_penalty = (float)p->presence_penalty,
        .frequency_penalty = (float)p->frequency_penalty,
        .repetition_penalty = (float)p->repetition_penalty,
        .top_k = (int32_t)MAX(top_k, 0),
        .n_logprobs = (int32_t)p->n_logprobs,
        .min_tokens = (uint32_t)p->min_tokens,
        .ignore_eos = p->ignore_eos,
        .n_stop_ids = p->n_stop_ids,
    };
    memcpy(ret->stop_ids, p->stop_ids, sizeof(ret->stop_ids));
}

/* ---- parameters with rules of their own ---- */

static enum err read_model(const char *name, const json_t *value, const struct cluster_model *model,
                           struct api_params *p, struct api_failure *f)
{
    if (!json_is_string(value))
        return wrong_type(f, name, "a string", value);
    p->model = json_string_value(value);
    if (strcmp(p->model, model->name) != 0) {
        (void)api_fail(f, 404, "model_not_found", "model", "the model `%.128s` does not exist",
                       p->model);
        return ERR_NOT_FOUND;
    }
    return ERR_OK;
}

static enum err read_seed(const char *name, const json_t *value, const struct cluster_model *model,
                          struct api_params *p, struct api_failure *f)
{
    (void)model;
    int64_t v;
    if (!get_int(value, &v))
        return wrong_type(f, name, "an integer", value);
    p->seed = (uint64_t)v;
    p->has_seed = true;
    return ERR_OK;
}

static enum err add_stop(const char *name, size_t i, const json_t *value, struct api_params *p,
                         struct api_failure *f)
{
    size_t n = json_string_length(value);
    if (n == 0 || n > STOP_MAX_BYTES)
        return api_refuse(f, name, "%s[%zu] has %zu bytes, must have between 1 and %d", name, i, n,
                          STOP_MAX_BYTES);
    p->stop[p->n_stop] = json_string_value(value);
    p->stop_len[p->n_stop++] = n;
    return ERR_OK;
}

static enum err add_stop_id(const char *name, size_t i, const json_t *value,
                            const struct cluster_model *model, struct api_params *p,
                            struct api_failure *f)
{
    int64_t id;
    if (!json_is_integer(value))
        return api_refuse(f, name, "%s[%zu] must be a token id, not %s", name, i, type_name(value));
    id = json_integer_value(value);
    if (id < 0 || id >= model->n_token_ids)
        return api_refuse(f, name, "%s[%zu] is %lld, must be between 0 and %d", name, i,
                          (long long)id, model->n_token_ids - 1);
    if (p->n_stop_ids == WIRE_MAX_STOP_IDS)
        return api_refuse(f, name, "%s has more than %u token ids", name, WIRE_MAX_STOP_IDS);
    p->stop_ids[p->n_stop_ids++] = (int32_t)id;
    return ERR_OK;
}

static enum err read_stop(const char *name, const json_t *value, const struct cluster_model *model,
                          struct api_params *p, struct api_failure *f)
{
    if (json_is_string(value))
        return add_stop(name, 0, value, p, f);
    if (!json_is_array(value))
        return wrong_type(f, name, "a string or an array of strings", value);
    if (json_array_size(value) > STOP_MAX_STRINGS)
        return api_refuse(f, name, "%s has %zu entries, must have at most %d", name,
                          json_array_size(value), STOP_MAX_STRINGS);
    for (size_t i = 0; i < json_array_size(value); i++) {
        const json_t *v = json_array_get(value, i);
        /* LightLLM also takes stop sequences as lists of ids; those of one id are stop ids. */
        if (json_is_array(v) && json_array_size(v) == 1 && !strcmp(name, "stop_sequences"))
            TRY(add_stop_id(name, i, json_array_get(v, 0), model, p, f));
        else if (json_is_string(v))
            TRY(add_stop(name, i, v, p, f));
        else
            return api_refuse(f, name, "%s[%zu] must be a string, not %s", name, i, type_name(v));
    }
    return ERR_OK;
}

static enum err read_stop_ids(const char *name, const json_t *value,
                              const struct cluster_model *model, struct api_params *p,
                              struct api_failure *f)
{
    if (!json_is_array(value))
        return wrong_type(f, name, "an array of token ids", value);
    for (size_t i = 0; i < json_array_size(value); i++)
        TRY(add_stop_id(name, i, json_array_get(value, i), model, p, f));
    return ERR_OK;
}

/* Chat: a boolean, with top_logprobs beside it. Completions: a number. */
static enum err read_logprobs(const char *name, const json_t *value,
                              const struct cluster_model *model, struct api_params *p,
                              struct api_failure *f)
{
    (void)model;
    int64_t v;
    if (json_is_boolean(value)) {
        p->n_logprobs = json_is_true(value) ? 0 : -1;
        return ERR_OK;
    }
    if (!get_int(value, &v))
        return wrong_type(f, name, "a boolean (chat) or an integer (completions)", value);
    if (v < 0 || v > (int64_t)WIRE_MAX_TOP)
        return api_refuse(f, name, "%s is %lld, must be between 0 and %u", name, (long long)v,
                          WIRE_MAX_TOP);
    p->n_logprobs = v;
    return ERR_OK;
}

static enum err read_switch(const char *name, const json_t *value, enum api_thinking *ret,
                            struct api_failure *f)
{
    if (!json_is_boolean(value))
        return wrong_type(f, name, "a boolean", value);
    *ret = json_is_true(value) ? API_THINKING_ON : API_THINKING_OFF;
    return ERR_OK;
}

static enum err read_template_kwargs(const char *name, const json_t *value,
                                     const struct cluster_model *model, struct api_params *p,
                                     struct api_failure *f)
{
    (void)model;
    if (!json_is_object(value))
        return wrong_type(f, name, "an object", value);
    const char *key;
    json_t *v;
    json_object_foreach ((json_t *)value, key, v) {
        char path[96];
        snprintf(path, sizeof(path), "chat_template_kwargs.%.64s", key);
        enum api_thinking clear = API_THINKING_DEFAULT;
        if (strcmp(key, "enable_thinking") && strcmp(key, "thinking") &&
            strcmp(key, "clear_thinking"))
            return api_fail(f, 400, "unknown_parameter", path,
                            "unknown parameter \"%s\": enable_thinking, thinking and "
                            "clear_thinking are known",
                            path);
        if (json_is_null(v))
            continue;
        if (strcmp(key, "clear_thinking")) {
            TRY(read_switch(path, v, &p->thinking, f));
        } else {
            TRY(read_switch(path, v, &clear, f));
            p->clear_thinking = clear == API_THINKING_ON;
        }
    }
    return ERR_OK;
}

/* {"type": "enabled"} as in the model maker's own API; a plain boolean is understood as well. */
static enum err read_thinking(const char *name, const json_t *value,
                              const struct cluster_model *model, struct api_params *p,
                              struct api_failure *f)
{
    (void)model;
    enum api_thinking v = API_THINKING_DEFAULT;
    if (json_is_object(value)) {
        const json_t *type = json_object_get(value, "type");
        const char *s = json_string_value(type);
        if (s && (!strcmp(s, "enabled") || !strcmp(s, "adaptive")))
            v = API_THINKING_ON;
        else if (s && !strcmp(s, "disabled"))
            v = API_THINKING_OFF;
        else
            return api_refuse(f, "thinking.type", "thinking.type must be enabled or disabled");
        const json_t *clear = json_object_get(value, "clear_thinking");
        if (json_is_boolean(clear))
            p->clear_thinking = json_is_true(clear);
    } else {
        TRY(read_switch(name, value, &v, f));
    }
    if (p->thinking == API_THINKING_DEFAULT)
        p->thinking = v;
    return ERR_OK;
}

static enum err read_enable_thinking(const char *name, const json_t *value,
                                     const struct cluster_model *model, struct api_params *p,
                                     struct api_failure *f)
{
    (void)model;
    enum api_thinking v = API_THINKING_DEFAULT;
    TRY(read_switch(name, value, &v, f));
    if (p->thinking == API_THINKING_DEFAULT)
        p->thinking = v;
    return ERR_OK;
}

static enum err read_effort(const char *name, const json_t *value,
                            const struct cluster_model *model, struct api_params *p,
                            struct api_failure *f)
{
    (void)model;
    static const char *const on[] = {"minimal", "low", "medium", "high", "xhigh", "max"};
    const char *s = json_string_value(value);
    if (!s)
        return wrong_type(f, name, "a string", value);
    if (!strcmp(s, "none")) {
        p->effort = API_THINKING_OFF;
        return ERR_OK;
    }
    for (size_t i = 0; i < ARRAY_LEN(on); i++) {
        if (!strcmp(s, on[i])) {
            p->effort = API_THINKING_ON;
            return ERR_OK;
        }
    }
    return api_refuse(f, name,
                      "%s is \"%.32s\", must be none, minimal, low, medium, high, xhigh or max",
                      name, s);
}

/* {"effort": "low", "enabled": true, "exclude": false}: how gateways say it. */
static enum err read_reasoning(const char *name, const json_t *value,
                               const struct cluster_model *model, struct api_params *p,
                               struct api_failure *f)
{
    if (!json_is_object(value))
        return wrong_type(f, name, "an object", value);
    const json_t *effort = json_object_get(value, "effort");
    const json_t *enabled = json_object_get(value, "enabled");
    const json_t *exclude = json_object_get(value, "exclude");
    if (effort && !json_is_null(effort))
        TRY(read_effort("reasoning.effort", effort, model, p, f));
    if (enabled && !json_is_null(enabled))
        TRY(read_switch("reasoning.enabled", enabled, &p->effort, f));
    if (json_is_true(exclude))
        p->include_reasoning = false;
    return ERR_OK;
}

static enum err read_stream_options(const char *name, const json_t *value,
                                    const struct cluster_model *model, struct api_params *p,
                                    struct api_failure *f)
{
    (void)model;
    if (!json_is_object(value))
        return wrong_type(f, name, "an object", value);
    const char *key;
    json_t *v;
    json_object_foreach ((json_t *)value, key, v) {
        char path[96];
        snprintf(path, sizeof(path), "stream_options.%.64s", key);
        bool usage = !strcmp(key, "include_usage");
        bool running = !strcmp(key, "continuous_usage_stats");
        if (!usage && !running && strcmp(key, "include_obfuscation"))
            return api_fail(f, 400, "unknown_parameter", path, "unknown parameter \"%s\"", path);
        if (json_is_null(v))
            continue;
        if (!json_is_boolean(v))
            return wrong_type(f, path, "a boolean", v);
        if (usage)
            p->include_usage = json_is_true(v);
        if (running)
            p->running_usage = json_is_true(v);
    }
    return ERR_OK;
}

/* "required", or a function: {"type": "function", "function": {"name": ..}}, in the newer shape
 * {"type": "function", "name": ..}. The older function_call has neither. */
static enum err read_tool_choice(const char *name, const json_t *value,
                                 const struct cluster_model *model, struct api_params *p,
                                 struct api_failure *f)
{
    (void)model;
    const char *s = json_string_value(value),
               *type = json_string_value(json_object_get(value, "type"));
    bool tools = !strcmp(name, "tool_choice");
    if (s && (!strcmp(s, "none") || !strcmp(s, "auto"))) {
        if (tools)
            p->tool_choice = !strcmp(s, "none") ? API_TOOLS_NONE : API_TOOLS_AUTO;
        return ERR_OK;
    }
    if (tools && s && !strcmp(s, "required")) {
        p->tool_choice = API_TOOLS_REQUIRED;
        return ERR_OK;
    }
    if (tools && type && !strcmp(type, "function")) {
        const json_t *function = json_object_get(value, "function");
        p->tool_named = json_string_value(json_object_get(function ? function : value, "name"));
        p->tool_choice = API_TOOLS_REQUIRED;
        return p->tool_named ? ERR_OK
                             : api_refuse(f, name, "tool_choice must have the name of a function");
    }
    return api_fail(
        f, 400, "unsupported_value", name, "%s %s%.32s%s is not supported: %s", name, s ? "\"" : "",
        s      ? s
        : type ? type
               : type_name(value),
        s ? "\"" : "", tools ? "auto, none, required and a function are" : "auto and none are");
}

/* {"type": "text" | "json_object" | "json_schema"}. The schema lies in json_schema.schema, in the
 * newer APIs beside the type. It is enforced whether or not strict is said. */
static enum err read_response_format(const char *name, const json_t *value,
                                     const struct cluster_model *model, struct api_params *p,
                                     struct api_failure *f)
{
    (void)model;
    if (!json_is_object(value))
        return wrong_type(f, name, "an object", value);
    const char *type = json_string_value(json_object_get(value, "type"));
    if (!type)
        return api_refuse(f, name, "%s.type must be a string", name);
    json_t *schema = NULL;
    if (!strcmp(type, "json_object")) {
        schema = json_pack("{s:s}", "type", "object");
        if (!schema)
            return api_fail_err(f, err_set(ERR_NOMEM, "no memory for the request"), name);
    } else if (!strcmp(type, "json_schema")) {
        const json_t *outer = json_object_get(value, "json_schema");
        schema = json_incref(json_object_get(outer ? outer : value, "schema"));
        if (!json_is_object(schema)) {
            json_decref(schema);
            return api_refuse(f, name, "%s%s.schema must be an object", name,
                              outer ? ".json_schema" : "");
        }
    } else if (strcmp(type, "text") != 0) {
        return api_fail(f, 400, "unsupported_value", name,
                        "%s.type \"%.32s\" is not supported: text, json_object and json_schema are",
                        name, type);
    }
    json_decref(p->schema);
    p->schema = schema;
    p->schema_param = name;
    return ERR_OK;
}

/* A schema, or the text of one: how vLLM and LightLLM say it. */
static enum err read_guided_json(const char *name, const json_t *value,
                                 const struct cluster_model *model, struct api_params *p,
                                 struct api_failure *f)
{
    (void)model;
    json_t *schema = NULL;
    if (json_is_string(value) && json_string_length(value) == 0)
        return ERR_OK;
    if (json_is_string(value)) {
        enum err e = json_parse(json_string_value(value), json_string_length(value),
                                &json_limits_request, &schema);
        if (e != ERR_OK)
            return api_refuse(f, name, "%s: %s", name, err_text(e));
    } else {
        schema = json_incref((json_t *)value);
    }
    if (!json_is_object(schema)) {
        json_decref(schema);
        return api_refuse(f, name, "%s must be a schema: an object, or its text", name);
    }
    json_decref(p->schema);
    p->schema = schema;
    p->schema_param = name;
    return ERR_OK;
}

/* {"json": schema} or {"json_object": true}. */
static enum err read_structured(const char *name, const json_t *value,
                                const struct cluster_model *model, struct api_params *p,
                                struct api_failure *f)
{
    if (!json_is_object(value))
        return wrong_type(f, name, "an object", value);
    const char *key;
    json_t *v;
    json_object_foreach ((json_t *)value, key, v) {
        if (json_is_null(v) || asks_for_nothing(v))
            continue;
        if (!strcmp(key, "json")) {
            TRY(read_guided_json("structured_outputs.json", v, model, p, f));
        } else if (!strcmp(key, "json_object") && json_is_true(v)) {
            json_t *object = json_pack("{s:s}", "type", "object");
            enum err e = read_guided_json("structured_outputs.json_object", object, model, p, f);
            json_decref(object);
            TRY(e);
        } else {
            char path[96];
            snprintf(path, sizeof(path), "structured_outputs.%.64s", key);
            return unsupported(f, path);
        }
    }
    return ERR_OK;
}

static enum err read_modalities(const char *name, const json_t *value,
                                const struct cluster_model *model, struct api_params *p,
                                struct api_failure *f)
{
    (void)model;
    (void)p;
    if (!json_is_array(value))
        return wrong_type(f, name, "an array", value);
    for (size_t i = 0; i < json_array_size(value); i++) {
        const char *s = json_string_value(json_array_get(value, i));
        if (!s || strcmp(s, "text") != 0)
            return api_fail(f, 400, "unsupported_value", name, "%s can only be [\"text\"]", name);
    }
    return ERR_OK;
}

static enum err read_cache_salt(const char *name, const json_t *value,
                                const struct cluster_model *model, struct api_params *p,
                                struct api_failure *f)
{
    (void)model;
    if (!json_is_string(value))
        return wrong_type(f, name, "a string", value);
    p->cache_salt = hash_bytes(1, json_string_value(value), json_string_length(value));
    return ERR_OK;
}

/* (start, factor): only a factor of 1, which changes nothing. */
static enum err read_decay(const char *name, const json_t *value, const struct cluster_model *model,
                           struct api_params *p, struct api_failure *f)
{
    (void)model;
    (void)p;
    if (json_is_array(value) && json_array_size(value) == 2 &&
        json_number_value(json_array_get(value, 1)) == 1.0)
        return ERR_OK;
    return unsupported(f, name);
}

/* {"id": value}. An id that is written in another way than JSON writes integers is no id. */
static enum err read_bias(const char *name, const json_t *value, const struct cluster_model *model,
                          struct api_params *p, struct api_failure *f)
{
    if (!json_is_object(value))
        return wrong_type(f, name, "an object of token ids and numbers", value);
    size_t n = json_object_size(value);
    if (n > WIRE_MAX_BIAS)
        return api_refuse(f, name, "%s has %zu entries, must have at most %u", name, n,
                          WIRE_MAX_BIAS);
    free(p->bias_id);
    p->n_bias = 0;
    p->bias_id = malloc(MAX(n, 1) * (sizeof(*p->bias_id) + sizeof(*p->bias_value)));
    if (!p->bias_id)
        return api_fail_err(f, err_set(ERR_NOMEM, "no memory for the request"), name);
    p->bias_value = (float *)(p->bias_id + n);
    const char *key;
    json_t *v;
    json_object_foreach ((json_t *)value, key, v) {
        char *end, text[24];
        long id = strtol(key, &end, 10);
        snprintf(text, sizeof(text), "%ld", id);
        if (strcmp(text, key) != 0)
            return api_refuse(f, name, "%s has the key \"%.32s\", which is no token id", name, key);
        if (id < 0 || id >= model->n_token_ids)
            return api_refuse(f, name, "%s has the token id %ld, must be between 0 and %d", name,
                              id, model->n_token_ids - 1);
        double bias = json_number_value(v);
        if (!json_is_number(v) || !(fabs(bias) <= (double)WIRE_MAX_BIAS_VALUE))
            return api_refuse(f, name, "%s[%ld] must be a number between -100 and 100", name, id);
        p->bias_id[p->n_bias] = (int32_t)id;
        p->bias_value[p->n_bias++] = (float)bias;
    }
    return ERR_OK;
}

/* ---- those of /v1/responses and /v1/messages ---- */

static enum err read_text(const char *name, const json_t *value, const struct cluster_model *model,
                          struct api_params *p, struct api_failure *f)
{
    if (!json_is_object(value))
        return wrong_type(f, name, "an object", value);
    const json_t *format = json_object_get(value, "format");
    return format && !json_is_null(format)
               ? read_response_format("text.format", format, model, p, f)
               : ERR_OK; /* verbosity is a hint */
}

/* What there is nothing of is not missing from an answer; log probabilities would be. */
static enum err read_include(const char *name, const json_t *value,
                             const struct cluster_model *model, struct api_params *p,
                             struct api_failure *f)
{
    (void)model;
    (void)p;
    if (!json_is_array(value))
        return wrong_type(f, name, "an array of strings", value);
    for (size_t i = 0; i < json_array_size(value); i++) {
        const char *s = json_string_value(json_array_get(value, i));
        if (!s || strcmp(s, "reasoning.encrypted_content") != 0)
            return api_fail(f, 400, "unsupported_value", name, "%s[%zu] \"%.64s\" is not supported",
                            name, i, s ? s : "");
    }
    return ERR_OK;
}

static enum err read_truncation(const char *name, const json_t *value,
                                const struct cluster_model *model, struct api_params *p,
                                struct api_failure *f)
{
    (void)model;
    (void)p;
    const char *s = json_string_value(value);
    if (!s || strcmp(s, "disabled") != 0)
        return api_fail(f, 400, "unsupported_value", name, "%s can only be \"disabled\"", name);
    return ERR_OK;
}

static enum err read_output_config(const char *name, const json_t *value,
                                   const struct cluster_model *model, struct api_params *p,
                                   struct api_failure *f)
{
    if (!json_is_object(value))
        return wrong_type(f, name, "an object", value);
    const json_t *format = json_object_get(value, "format");
    const json_t *effort = json_object_get(value, "effort");
    if (format && !json_is_null(format))
        TRY(read_response_format("output_config.format", format, model, p, f));
    enum api_thinking before = p->effort; /* how much to think, not whether */
    if (effort && !json_is_null(effort))
        TRY(read_effort("output_config.effort", effort, model, p, f));
    p->effort = before;
    return ERR_OK;
}

static enum err read_anthropic_choice(const char *name, const json_t *value,
                                      const struct cluster_model *model, struct api_params *p,
                                      struct api_failure *f)
{
    if (!json_is_object(value))
        return wrong_type(f, name, "an object", value);
    if (json_is_true(json_object_get(value, "disable_parallel_tool_use")))
        p->parallel_tool_calls = false;
    const json_t *type = json_object_get(value, "type");
    const char *s = json_string_value(type);
    if (!s)
        return api_refuse(f, "tool_choice.type", "tool_choice.type must be a string");
    if (!strcmp(s, "any") || !strcmp(s, "tool")) {
        p->tool_choice = API_TOOLS_REQUIRED;
        p->tool_named = s[0] == 't' ? json_string_value(json_object_get(value, "name")) : NULL;
        if (s[0] == 't' && !p->tool_named)
            return api_refuse(f, "tool_choice.name", "tool_choice must have the name of a tool");
        return ERR_OK;
    }
    return read_tool_choice(name, type, model, p, f);
}
