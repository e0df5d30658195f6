/* api_output.c: what a choice's tokens and text mean: reasoning or answer, and which token is
 * where.
 *
 * The one seam where output is taken apart: every shape, streamed or not, sees a choice's text only
 * through output_push. It goes by token ids, because a model can write the letters "</think>"
 * without meaning the token. A gen's text is the plain concatenation of its ids' texts (cut short
 * by a stop string, delayed by hold-back), so a detokeniser of our own over the ids tells at which
 * byte of the text a token stands, however late that text arrives.
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

void output_init(struct output *o, const struct tokenizer *tokenizer, bool reasoning,
                 bool skip_special, int32_t close_id, int32_t tool_id)
{
    *o = (struct output){.close_at = UINT64_MAX,
                         .close_id = close_id,
                         .tool_id = tool_id,
                         .reasoning = reasoning && close_id >= 0};
    text_pos_init(&o->pos, tokenizer, skip_special);
}

/* Looks for the token that ends reasoning. */
static void find_close(struct output *o, const struct gen_chunk *c, struct json_out *scratch)
{
    for (int i = 0; i < c->n_ids && o->close_at == UINT64_MAX; i++) {
        int32_t id = c->ids[i];
        text_pos_push(&o->pos, id, scratch);
        o->n_reasoning++;
        if (id != o->close_id && id != o->tool_id)
            continue;
        size_t n = 0;
        bool shown =
            tokenizer_bytes(o->pos.detok.tokenizer, id, &n) &&
            !(o->pos.detok.skip_special && tokenizer_is_special(o->pos.detok.tokenizer, id));
        o->close_at = o->pos.n_bytes - (shown ? n : 0);
        o->close_n = shown && id == o->close_id ? n : 0;
        o->skip_newlines = id == o->close_id;
    }
}

void output_push(struct output *o, const struct gen_chunk *c, struct json_out *scratch,
                 output_fn *fn, void *user)
{
    if (o->reasoning)
        find_close(o, c, scratch);

    const char *p = c->text, *end = c->text + c->n_text;
    if (o->reasoning) {
        uint64_t left = o->close_at - o->n_text; /* of reasoning, from p on */
        size_t n = MIN((uint64_t)c->n_text, left);
        if (n)
            fn(user, OUTPUT_REASONING, p, n);
        p += n;
        o->n_text += n;
        if (o->n_text < o->close_at)
            return;
        o->reasoning = false;
    }
    if (o->close_n) {
        size_t n = MIN((uint64_t)(end - p), o->close_n);
        p += n;
        o->close_n -= n;
    }
    if (o->skip_newlines && o->close_n == 0 && p < end) {
        while (p < end && *p == '\n')
            p++;
        o->skip_newlines = p == end;
    }
    if (p < end)
        fn(user, OUTPUT_CONTENT, p, (size_t)(end - p));
}

void out_raw(struct json_out *o, const char *text) { json_out_raw(o, text, strlen(text)); }

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
    if (!isfinite(v))
        v = 0;
    char text[32];
    for (int digits = 6; digits <= 9; digits++) {
        snprintf(text, sizeof(text), "%.*g", digits, (double)v);
        if (strtof(text, NULL) == v)
            break;
    }
    out_raw(o, text);
}
