/* api_completions.c: POST /v1/completions, OpenAI's older shape: raw text (or token ids) in, text
 * out.
 *
 * Added tokens in a prompt's text are recognised: whoever uses this writes the template by hand.
 * Several prompts are several choices, n for each in turn.
 */
#include "router/api_internal.h"

#include <string.h>

static enum err read_ids(struct api_call *call, const json_t *array, struct api_prompt *p,
                         const char *where);

/* ---- request ---- */

static enum err read_prompt(struct api_call *call, const json_t *v, size_t i, struct api_prompt *p)
{
    char where[32];
    snprintf(where, sizeof(where), "prompt[%zu]", i);
    if (json_is_array(v))
        return read_ids(call, v, p, where);
    if (!json_is_string(v))
        return api_refuse(&call->failure, "prompt",
                          "%s must be a string or an array of token ids, like the others", where);
    p->text = json_string_value(v);
    p->n_text = json_string_length(v);
    return ERR_OK;
}

static enum err read_prompts(struct api_call *call, const json_t *prompt)
{
    struct api_failure *f = &call->failure;
    if (!prompt || json_is_null(prompt))
        return api_refuse(f, "prompt", "prompt is required");
    size_t n = json_array_size(prompt);
    if (json_is_string(prompt) || json_is_integer(json_array_get(prompt, 0))) {
        struct api_prompt *p = api_call_add_prompts(call, 1);
        if (!p)
            return ERR_NOMEM;
        if (json_is_array(prompt))
            return read_ids(call, prompt, p, "prompt");
        p->text = json_string_value(prompt);
        p->n_text = json_string_length(prompt);
        return ERR_OK;
    }
    if (!json_is_array(prompt) || n == 0)
        return api_refuse(f, "prompt",
                          "prompt must be a string, an array of strings, an array of token ids or "
                          "an array of such arrays, and not be empty");
    if (n > API_MAX_CHOICES)
        return api_refuse(f, "prompt", "prompt has %zu entries, must have at most %d", n,
                          API_MAX_CHOICES);
    struct api_prompt *p = api_call_add_prompts(call, n);
    if (!p)
        return ERR_NOMEM;
    for (size_t i = 0; i < n; i++)
        TRY(read_prompt(call, json_array_get(prompt, i), i, &p[i]));
    return ERR_OK;
}

static enum err read_ids(struct api_call *call, const json_t *array, struct api_prompt *p,
                         const char *where)
{
    struct api_failure *f = &call->failure;
    for (size_t i = 0; i < json_array_size(array); i++) {
        const json_t *v = json_array_get(array, i);
        if (!json_is_integer(v))
            return api_refuse(f, "prompt", "%s[%zu] must be a token id", where, i);
        if (json_integer_value(v) < 0 || json_integer_value(v) >= call->model.n_token_ids)
            return api_refuse(f, "prompt", "%s[%zu] is %lld, must be between 0 and %d", where, i,
                              (long long)json_integer_value(v), call->model.n_token_ids - 1);
        if (ids_push(&p->ids, (int32_t)json_integer_value(v)) != ERR_OK)
            return api_fail_err(f, ERR_NOMEM, "prompt");
    }
    return ERR_OK;
}

static enum err completions_parse(struct api_call *call, const json_t *body)
{
    TRY(api_params_read(body, API_COMPLETIONS, &call->model, &call->params, &call->failure));
    TRY(read_prompts(call, json_object_get(body, "prompt")));
    TRY(api_grammar_make(call, NULL));
    json_out_fmt(&call->head, "{\"id\":\"%s\",\"object\":\"text_completion\",\"created\":%llu,",
                 call->id, (unsigned long long)call->created_s);
    out_raw(&call->head, "\"model\":");
    out_text(&call->head, call->model.name);
    out_raw(&call->head, ",\"choices\":[");
    if (call->head.failed)
        return api_fail_err(&call->failure, err_set(ERR_NOMEM, "no memory for the request"), "");
    return ERR_OK;
}

/* What echo repeats: the text as it came, or that of the ids. */
static enum err keep_echo(struct api_call *call, struct api_prompt *p)
{
    struct json_out text = {0};
    if (p->text) {
        json_out_raw(&text, p->text, p->n_text);
    } else {
        struct detokenizer d;
        detokenizer_init(&d, call->api->c.tokenizer, call->params.skip_special);
        for (size_t i = 0; i < p->ids.len; i++)
            detokenizer_push(&d, p->ids.data[i], &text);
        detokenizer_flush(&d, &text);
    }
    if (text.failed) {
        json_out_finish(&text);
        return api_fail_err(&call->failure, err_set(ERR_NOMEM, "no memory for the request"), "");
    }
    p->echo = text.data;
    p->n_echo = text.len;
    return ERR_OK;
}

static enum err completions_encode(struct api_call *call)
{
    TRY(api_prompts_encode(call));
    TRY(api_call_encoded(call, "prompt"));
    for (size_t i = 0; call->params.echo && i < call->n_prompts; i++)
        TRY(keep_echo(call, &call->prompts[i]));
    return ERR_OK;
}

/* ---- output ---- */

/* A token as this shape names it: its text, or bytes:\xe2\x80 if it is no text by itself. */
static void out_name(struct json_out *o, const struct tokenizer *t, int32_t id)
{
    size_t n = 0;
    const char *bytes = tokenizer_bytes(t, id, &n);
    if (!bytes || utf8_check(bytes, n) == n) {
        json_out_string(o, bytes ? bytes : "", bytes ? n : 0);
        return;
    }
    out_raw(o, "\"bytes:");
    for (size_t i = 0; i < n; i++)
        json_out_fmt(o, "\\\\x%02x", (unsigned char)bytes[i]);
    out_raw(o, "\"");
}

static void gather_logprobs(struct api_choice *choice, const struct gen_chunk *c)
{
    struct api_call *call = choice->call;
    const struct tokenizer *t = call->api->c.tokenizer;
    for (int i = 0; c->n_logprobs >= 0 && i < c->n_ids; i++)
        choice->sum_logprob += (double)c->logprob[i];
    if (call->params.n_logprobs < 0 || c->n_logprobs < 0)
        return;
    for (int i = 0; i < c->n_ids; i++) {
        uint64_t at = choice->pos.n_chars;
        text_pos_push(&choice->pos, c->ids[i], &call->api->scratch);
        if (api_ends_output(call, c->ids[i]))
            continue;
        const char *comma = choice->logprobs.len ? "," : "";
        out_raw(&choice->logprobs, comma);
        out_name(&choice->logprobs, t, c->ids[i]);
        out_raw(&choice->lp_values, comma);
        out_float(&choice->lp_values, c->logprob[i]);
        json_out_fmt(&choice->lp_offsets, "%s%llu", comma, (unsigned long long)at);
        out_raw(&choice->lp_top, comma);
        if (c->n_logprobs == 0)
            out_raw(&choice->lp_top, "null");
        for (int k = 0; k < c->n_logprobs; k++) {
            const struct wire_top *top = &c->top[(size_t)i * (size_t)c->n_logprobs + (size_t)k];
            out_raw(&choice->lp_top, k ? "," : "{");
            out_name(&choice->lp_top, t, top->id);
            out_raw(&choice->lp_top, ":");
            out_float(&choice->lp_top, top->logprob);
            out_raw(&choice->lp_top, k + 1 == c->n_logprobs ? "}" : "");
        }
    }
    if (choice->pos.failed || choice->logprobs.failed || choice->lp_values.failed ||
        choice->lp_top.failed || choice->lp_offsets.failed)
        call->broken = true;
}

static void move_column(struct json_out *o, const char *name, struct json_out *column)
{
    json_out_fmt(o, "\"%s\":[", name);
    json_out_raw(o, column->len ? column->data : "", column->len);
    out_raw(o, "]");
    column->len = 0;
}

/* The rest of a choice after its text. */
static void out_choice_end(struct api_choice *choice, struct json_out *o, const char *finish)
{
    struct api_call *call = choice->call;
    out_raw(o, ",\"logprobs\":");
    if (call->params.n_logprobs >= 0 && (choice->logprobs.len || !call->params.stream)) {
        out_raw(o, "{");
        move_column(o, "tokens", &choice->logprobs);
        out_raw(o, ",");
        move_column(o, "token_logprobs", &choice->lp_values);
        out_raw(o, ",");
        move_column(o, "top_logprobs", &choice->lp_top);
        out_raw(o, ",");
        move_column(o, "text_offset", &choice->lp_offsets);
        out_raw(o, "}");
    } else {
        out_raw(o, "null");
    }
    out_raw(o, ",\"finish_reason\":");
    out_text(o, finish);
    out_raw(o, "}");
}

static void write_line(struct api_choice *choice, const char *text, size_t n, const char *finish)
{
    struct json_out *o = api_line_begin(choice->call);
    out_raw(o, "{\"index\":");
    out_uint(o, choice->idx);
    out_raw(o, ",\"text\":");
    json_out_string(o, text, n);
    out_choice_end(choice, o, finish);
    api_out_line_usage(choice->call, o);
    api_line_end(choice->call);
}

static void completions_open(struct api_choice *choice)
{
    if (choice->prompt->n_echo)
        write_line(choice, choice->prompt->echo, choice->prompt->n_echo, NULL);
}

/* A raw prompt has neither reasoning nor calls: it is all content. */
static void on_output(void *user, const struct glm_event *e)
{
    struct api_choice *choice = user;
    if (choice->call->params.stream) {
        write_line(choice, e->text, e->n_text, NULL);
        return;
    }
    json_out_raw(&choice->text, e->text, e->n_text);
    if (choice->text.failed)
        choice->call->broken = true;
}

static void completions_chunk(struct api_choice *choice, const struct gen_chunk *c)
{
    gather_logprobs(choice, c);
    api_choice_push(choice, c);
}

static void completions_end(struct api_choice *choice, const struct gen_end *e)
{
    api_choice_stop(choice, e);
    if (choice->call->params.stream)
        write_line(choice, "", 0, api_finish_name(choice));
}

static void completions_stream_end(struct api_call *call)
{
    if (!call->params.include_usage)
        return;
    struct json_out *o = api_line_begin(call);
    out_raw(o, "],\"usage\":");
    api_out_usage(call, o);
    out_raw(o, "}");
    api_line_end(call);
}

/* best_of: of each prompt's choices the n with the highest log probability per token stay, best
 * first. */
static void keep_best(struct api_call *call)
{
    size_t n = (size_t)call->params.n;
    if (call->n_each == n)
        return;
    for (size_t i = 0; i < call->n_choices; i++)
        call->choices[i].dropped = true;
    for (size_t k = 0; k < call->n_prompts * n; k++) {
        struct api_choice *group = call->choices + k / n * call->n_each, *best = NULL;
        double best_mean = 0;
        for (struct api_choice *c = group; c < group + call->n_each; c++) {
            double mean = c->sum_logprob / MAX(c->n_tokens, 1);
            if (c->dropped && (!best || mean > best_mean))
                best = c, best_mean = mean;
        }
        best->dropped = false;
        best->idx = (uint32_t)k;
    }
}

static struct api_choice *choice_at(struct api_call *call, size_t idx)
{
    for (size_t i = 0; i < call->n_choices; i++)
        if (call->choices[i].idx == idx && !call->choices[i].dropped)
            return &call->choices[i];
    return NULL;
}

static void completions_body(struct api_call *call, struct json_out *o)
{
    json_out_raw(o, call->head.data, call->head.len);
    keep_best(call);
    for (size_t i = 0; i < call->n_prompts * (size_t)call->params.n; i++) {
        struct api_choice *choice = choice_at(call, i);
        const struct api_prompt *p = choice->prompt;
        json_out_fmt(o, "%s{\"index\":%u,\"text\":", i ? "," : "", choice->idx);
        if (p->n_echo) {
            struct json_out *whole = &call->api->scratch;
            whole->len = 0;
            whole->failed = false;
            json_out_raw(whole, p->echo, p->n_echo);
            json_out_raw(whole, choice->text.len ? choice->text.data : "", choice->text.len);
            json_out_string(o, whole->len ? whole->data : "", whole->len);
            o->failed |= whole->failed;
        } else {
            json_out_string(o, choice->text.len ? choice->text.data : "", choice->text.len);
        }
        out_choice_end(choice, o, api_finish_name(choice));
    }
    out_raw(o, "],\"usage\":");
    api_out_usage(call, o);
    out_raw(o, "}");
}

const struct api_shape api_shape_completions = {
    .id_prefix = "cmpl-",
    .generates = true,
    .done_line = true,
    .parse = completions_parse,
    .encode = completions_encode,
    .open = completions_open,
    .chunk = completions_chunk,
    .end = completions_end,
    .output = on_output,
    .stream_end = completions_stream_end,
    .body = completions_body,
};
