/* api_output.c: a choice's output: through the parser, gathered, and which token is where.
 *
 * Every shape but LightLLM's sees output only as the parser's events, streamed or not. A gen's text
 * is the plain concatenation of its ids' texts (cut short by a stop string, delayed by hold-back),
 * so a detokeniser of our own over the ids tells at which byte of the text a token stands, however
 * late that text arrives.
 */
#include "router/api_internal.h"

#include <math.h>
#include <string.h>

void text_pos_init(struct text_pos *t, const struct tokenizer *tokenizer, bool skip_special)
{
    *t = (struct text_pos){0};
    detokenizer_init(&t->detok, tokenizer, skip_special);
}

void text_pos_push(struct text_pos *t, int32_t id, struct json_out *scratch)
{
    scratch->len = 0;
    scratch->failed = false;
    detokenizer_push(&t->detok, id, scratch);
    t->failed |= scratch->failed;
    t->n_bytes += scratch->len;
    for (size_t i = 0; i < scratch->len; i++)
        t->n_chars += ((unsigned char)scratch->data[i] & 0xc0) != 0x80;
}

static struct api_item *add_item(struct api_choice *choice, const struct glm_event *e)
{
    if (choice->n_items == choice->cap_items) {
        size_t cap = choice->cap_items ? choice->cap_items * 2 : 4;
        struct api_item *items = realloc(choice->items, cap * sizeof(*items));
        if (!items)
            return NULL;
        choice->items = items;
        choice->cap_items = cap;
    }
    struct api_item *item = &choice->items[choice->n_items++];
    *item = (struct api_item){.kind = e->kind};
    return item;
}

void api_gather(struct api_choice *choice, const struct glm_event *e)
{
    struct api_item *last = choice->n_items ? &choice->items[choice->n_items - 1] : NULL;
    switch (e->kind) {
    case GLM_EVENT_CALL_START:
        last = add_item(choice, e);
        if (last) {
            snprintf(last->id, sizeof(last->id), "%s", e->id);
            json_out_raw(&last->name, e->text, e->n_text);
        }
        break;
    case GLM_EVENT_REASONING:
    case GLM_EVENT_CONTENT:
        if (!last || last->kind != e->kind)
            last = add_item(choice, e);
        /* fall through */
    case GLM_EVENT_ARGUMENTS:
        if (last)
            json_out_raw(&last->text, e->text, e->n_text);
        break;
    case GLM_EVENT_CALL_END:
        break;
    }
    if (!last || last->name.failed || last->text.failed)
        choice->call->broken = true;
}

bool api_gather_begins(struct api_choice *choice, const struct glm_event *e)
{
    size_t before = choice->n_items;
    api_gather(choice, e);
    return choice->n_items > before;
}

void api_choice_push(struct api_choice *choice, const struct gen_chunk *c)
{
    glm_parser_push(&choice->parser, c->ids, (size_t)c->n_ids, c->text, c->n_text);
    if (choice->parser.failed)
        choice->call->broken = true;
}

void api_choice_stop(struct api_choice *choice, const struct gen_end *e)
{
    /* As a stop id it has no text; for the parser it is what closes the call. */
    if (choice->call->one_call && e->stop_id == choice->call->api->call_end_id)
        glm_parser_push(&choice->parser, NULL, 0, "</tool_call>", strlen("</tool_call>"));
    glm_parser_end(&choice->parser, e->finish == GEN_STOP);
    if (choice->parser.failed)
        choice->call->broken = true;
}

void out_uint(struct json_out *o, uint32_t n)
{
    char digits[10], *at = digits + sizeof(digits);
    do
        *--at = (char)('0' + n % 10);
    while (n /= 10);
    json_out_raw(o, at, (size_t)(digits + sizeof(digits) - at));
}

void out_text(struct json_out *o, const char *text)
{
    if (text)
        json_out_string(o, text, strlen(text));
    else
        out_raw(o, "null");
}

void out_token(struct json_out *o, const struct tokenizer *t, int32_t id)
{
    size_t n = 0;
    const char *bytes = tokenizer_bytes(t, id, &n);
    if (!bytes)
        n = 0;
    if (utf8_check(bytes ? bytes : "", n) == n) {
        json_out_string(o, bytes ? bytes : "", n);
        return;
    }
    struct json_out text = {0};
    struct detokenizer d;
    detokenizer_init(&d, t, false);
    detokenizer_push(&d, id, &text);
    detokenizer_flush(&d, &text);
    json_out_string(o, text.data ? text.data : "", text.len);
    json_out_finish(&text);
}

/* JSON has no infinity: what cannot be drawn is shown as -9999, as others do. */
void out_float(struct json_out *o, float v)
{
    if (!(v > -9999.0f))
        v = -9999.0f;
    if (!isfinite(v) || v == 0) {
        out_raw(o, "0");
        return;
    }
    char text[32];
    for (int digits = 6; digits <= 9; digits++) {
        snprintf(text, sizeof(text), "%.*g", digits, (double)v);
        if (strtof(text, NULL) == v)
            break;
    }
    out_raw(o, text);
}
