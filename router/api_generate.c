/* api_generate.c: POST /generate and /generate_stream, LightLLM's shape.
 *
 * One event per token, although a gen's chunk may bring several: text is dealt out to the tokens by
 * where each one's text ends. The last token's event also says that it is the last, so an event is
 * held while that is open: it ends the output, fills max_new_tokens, or part of its text is missing
 * (a stop string may have begun). All others go out at once.
 */
#include "router/api_internal.h"

#include <string.h>

static enum err generate_parse(struct api_call *call, const json_t *body)
{
    struct api_failure *f = &call->failure;
    struct api_params *p = &call->params;
    TRY(api_params_read(body, API_GENERATE_OUTER, &call->model, p, f));
    const json_t *parameters = json_object_get(body, "parameters");
    if (parameters && !json_is_null(parameters)) {
        if (!json_is_object(parameters))
            return api_refuse(f, "parameters", "parameters must be an object");
        TRY(api_params_read(parameters, API_GENERATE, &call->model, p, f));
    } else {
        p->do_sample = false;
    }
    if (call->stream_path && p->n != 1)
        return api_refuse(f, "best_of", "n is %lld, can only be 1 in a stream", (long long)p->n);
    p->n_logprobs = call->stream_path || p->return_details ? 0 : -1;

    const json_t *media = json_object_get(body, "multimodal_params");
    const char *key;
    json_t *v;
    if (media && !json_is_null(media) && !json_is_object(media))
        return api_refuse(f, "multimodal_params", "multimodal_params must be an object");
    json_object_foreach ((json_t *)media, key, v) {
        if (!json_is_null(v) && !(json_is_array(v) && json_array_size(v) == 0))
            return api_fail(f, 400, "unsupported_parameter", "multimodal_params",
                            "multimodal_params is not supported: this model reads text only");
    }
    const json_t *inputs = json_object_get(body, "inputs");
    if (!json_is_string(inputs))
        return api_refuse(f, "inputs", "inputs is required and must be a string");
    struct api_prompt *prompt = api_call_add_prompts(call, 1);
    if (!prompt)
        return ERR_NOMEM;
    prompt->text = json_string_value(inputs);
    prompt->n_text = json_string_length(inputs);
    return api_grammar_make(call, NULL);
}

static enum err generate_encode(struct api_call *call)
{
    TRY(api_prompts_encode(call));
    return api_call_encoded(call, "inputs");
}

/* ---- output ---- */

static void out_event_token(struct api_choice *choice, struct json_out *o)
{
    const struct held_token *t = &choice->token;
    out_raw(o, "{\"id\":");
    out_uint(o, (uint32_t)t->id);
    out_raw(o, ",\"text\":");
    json_out_string(o, t->text.len ? t->text.data : "", t->text.len);
    out_raw(o, ",\"logprob\":");
    out_float(o, t->logprob);
    bool special = tokenizer_is_special(choice->call->api->c.tokenizer, t->id);
    out_raw(o, special ? ",\"special\":true,\"count_output_tokens\":"
                       : ",\"special\":false,\"count_output_tokens\":");
    out_uint(o, t->count);
    out_raw(o, ",\"prompt_tokens\":");
    out_uint(o, choice->prompt->n_ids);
    out_raw(o, "}");
}

/* Sends the held token's event; finish: NULL, or why it is the last. */
static void release_token(struct api_choice *choice, const char *finish)
{
    struct held_token *t = &choice->token;
    struct api_call *call = choice->call;
    json_out_raw(&choice->text, t->text.len ? t->text.data : "", t->text.len);
    if (call->params.stream) {
        struct json_out *o = api_line_begin(call);
        out_raw(o, "{\"token\":");
        out_event_token(choice, o);
        out_raw(o, ",\"generated_text\":");
        if (finish)
            json_out_string(o, choice->text.len ? choice->text.data : "", choice->text.len);
        else
            out_raw(o, "null");
        out_raw(o, finish ? ",\"finished\":true" : ",\"finished\":false");
        out_raw(o, ",\"finish_reason\":");
        out_text(o, finish);
        out_raw(o, ",\"details\":null}");
        api_line_end(call);
    } else if (call->params.return_details) {
        out_raw(&choice->logprobs, choice->logprobs.len ? "," : "");
        out_event_token(choice, &choice->logprobs);
    }
    if (choice->text.failed || t->text.failed || choice->logprobs.failed || choice->pos.failed)
        call->broken = true;
    t->held = false;
    t->text.len = 0;
}

/* Gives the held token text up to byte `until` of the output. */
static void deal_text(struct api_choice *choice, const char **p, const char *end, uint64_t until)
{
    size_t n = MIN((uint64_t)(end - *p), until - MIN(choice->n_text, until));
    json_out_raw(&choice->token.text, *p, n);
    choice->n_text += n;
    *p += n;
}

static void generate_chunk(struct api_choice *choice, const struct gen_chunk *c)
{
    struct api_call *call = choice->call;
    struct held_token *t = &choice->token;
    const char *p = c->text, *end = c->text + c->n_text;
    if (!call->params.stream && !call->params.return_details) {
        json_out_raw(&choice->text, c->text, c->n_text);
        if (choice->text.failed)
            call->broken = true;
        return;
    }
    deal_text(choice, &p, end, choice->pos.n_bytes);
    for (int i = 0; i < c->n_ids; i++) {
        if (t->held)
            release_token(choice, NULL);
        text_pos_push(&choice->pos, c->ids[i], &call->api->scratch);
        t->held = true;
        t->id = c->ids[i];
        t->logprob = c->n_logprobs >= 0 ? c->logprob[i] : 0;
        t->count++;
        deal_text(choice, &p, end, choice->pos.n_bytes);
    }
    deal_text(choice, &p, end, UINT64_MAX); /* the replacement of a character cut short */
    bool open = api_ends_output(call, t->id) || t->count >= choice->prompt->max_tokens ||
                choice->n_text < choice->pos.n_bytes;
    if (t->held && !open)
        release_token(choice, NULL);
}

static void generate_end(struct api_choice *choice, const struct gen_end *e)
{
    (void)e;
    if (choice->call->params.stream || choice->token.held || choice->token.text.len)
        release_token(choice, api_finish_name(choice));
}

/* One value if there is one choice, else an array of each's. */
static void out_each(struct api_call *call, struct json_out *o, const char *name,
                     void (*out)(struct api_choice *choice, struct json_out *o))
{
    json_out_fmt(o, ",\"%s\":%s", name, call->n_choices > 1 ? "[" : "");
    for (size_t i = 0; i < call->n_choices; i++) {
        out_raw(o, i ? "," : "");
        out(&call->choices[i], o);
    }
    out_raw(o, call->n_choices > 1 ? "]" : "");
}

static void out_count(struct api_choice *choice, struct json_out *o)
{
    json_out_fmt(o, "%u", choice->usage.n_output);
}

static void out_finish(struct api_choice *choice, struct json_out *o)
{
    out_text(o, api_finish_name(choice));
}

static void out_tokens(struct api_choice *choice, struct json_out *o)
{
    out_raw(o, "[");
    json_out_raw(o, choice->logprobs.len ? choice->logprobs.data : "", choice->logprobs.len);
    out_raw(o, "]");
}

static void generate_body(struct api_call *call, struct json_out *o)
{
    out_raw(o, "{\"generated_text\":[");
    for (size_t i = 0; i < call->n_choices; i++) {
        const struct json_out *text = &call->choices[i].text;
        out_raw(o, i ? "," : "");
        json_out_string(o, text->len ? text->data : "", text->len);
    }
    out_raw(o, "]");
    out_each(call, o, "count_output_tokens", out_count);
    out_each(call, o, "finish_reason", out_finish);
    json_out_fmt(o, ",\"prompt_tokens\":%u", call->prompts[0].n_ids);
    if (call->params.return_details)
        out_each(call, o, "tokens", out_tokens);
    out_raw(o, "}");
}

const struct api_shape api_shape_generate = {
    .id_prefix = "gen-",
    .generates = true,
    .parse = generate_parse,
    .encode = generate_encode,
    .chunk = generate_chunk,
    .end = generate_end,
    .body = generate_body,
};
