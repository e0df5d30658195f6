/* api_fuzz.c: a request body through parsing and validation, up to what workers would be told.
 *
 * Every shape tries every body. Whatever comes: either a 4xx whose body is JSON again, or
 * parameters within the limits that workers rely on.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "router/api_internal.h"

#define MUST(cond)                                                                                 \
    do {                                                                                           \
        if (!(cond))                                                                               \
            abort();                                                                               \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void check_refusal(const struct api_failure *f)
{
    MUST(f->status >= 400 && f->status < 500 && f->message[0] && f->type);
    struct json_out o = {0};
    api_out_failure(&o, f);
    MUST(!o.failed);
    json_t *json = json_loadb(o.data, o.len, JSON_REJECT_DUPLICATES, NULL);
    MUST(json_is_string(json_object_get(json_object_get(json, "error"), "message")));
    json_decref(json);
    json_out_finish(&o);
}

static void check_params(const struct api_call *call)
{
    const struct api_params *p = &call->params;
    struct wire_sampling s;
    api_params_sampling(p, &call->model, &s);
    MUST(isfinite(s.temperature) && s.temperature >= 0);
    MUST(s.temperature == 0 || 1 / s.temperature <= 10001);
    MUST(s.top_p > 0 && s.top_p <= 1 && s.min_p >= 0 && s.min_p <= 1);
    MUST(fabsf(s.presence_penalty) <= 2 && fabsf(s.frequency_penalty) <= 2);
    MUST(s.repetition_penalty > 0 && s.repetition_penalty <= 100);
    MUST(s.top_k >= 0 && s.n_logprobs >= -1 && s.n_logprobs <= (int32_t)WIRE_MAX_TOP);
    MUST(s.n_stop_ids <= WIRE_MAX_STOP_IDS && s.ignore_eos <= 1);
    for (uint32_t i = 0; i < s.n_stop_ids; i++)
        MUST(s.stop_ids[i] >= 0 && s.stop_ids[i] < call->model.n_token_ids);
    MUST(p->n_stop <= STOP_MAX_STRINGS);
    for (size_t i = 0; i < p->n_stop; i++)
        MUST(p->stop_len[i] >= 1 && p->stop_len[i] <= STOP_MAX_BYTES);
    MUST(p->n >= 1 && p->n <= API_MAX_N && call->n_choices <= API_MAX_CHOICES);
    MUST(call->n_prompts >= 1);
    for (size_t i = 0; i < call->n_prompts; i++)
        for (size_t k = 0; k < call->prompts[i].ids.len; k++)
            MUST(call->prompts[i].ids.data[k] >= 0 &&
                 call->prompts[i].ids.data[k] < call->model.n_token_ids);
}

static void try_shape(const struct api_shape *shape, bool stream_path, const uint8_t *data,
                      size_t n)
{
    static const int32_t eos[] = {256, 263};
    static struct api api = {.default_thinking = true, .parse_calls = true};
    struct api_call call = {.api = &api,
                            .shape = shape,
                            .stream_path = stream_path,
                            .n_body = n,
                            .model = {.name = "demo",
                                      .max_total_tokens = 4096,
                                      .vocab = 320,
                                      .n_token_ids = 276,
                                      .eos = eos,
                                      .n_eos = 2,
                                      .default_temperature = 1,
                                      .default_top_p = 0.95}};
    call.body = malloc(n + 1);
    MUST(call.body);
    memcpy(call.body, data, n);
    call.body[n] = '\0';
    if (api_call_parse(&call) == ERR_OK)
        check_params(&call);
    else
        check_refusal(&call.failure);
    api_call_finish(&call);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    try_shape(&api_shape_chat, false, data, n);
    try_shape(&api_shape_completions, false, data, n);
    try_shape(&api_shape_responses, false, data, n);
    try_shape(&api_shape_messages, false, data, n);
    try_shape(&api_shape_count_tokens, false, data, n);
    try_shape(&api_shape_generate, false, data, n);
    try_shape(&api_shape_generate, true, data, n);
    try_shape(&api_shape_tokenize, false, data, n);
    try_shape(&api_shape_detokenize, false, data, n);
    return 0;
}
