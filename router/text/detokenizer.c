/* detokenizer.c: bytes of tokens to text.
 *
 * The tail is always the beginning of some character, so at most three bytes. A byte that cannot
 * continue it turns the whole tail into one U+FFFD and starts anew: the same result as decoding
 * all bytes at once with replacement of maximal subparts, which is what Python and Rust do.
 */
#include "router/text/detokenizer.h"

#include <string.h>

static const char replacement[] = "\xef\xbf\xbd";

void detokenizer_init(struct detokenizer *d, const struct tokenizer *t, bool skip_special)
{
    *d = (struct detokenizer){.tokenizer = t, .skip_special = skip_special};
}

/* May byte follow the n bytes at tail on the way to a character? */
static bool continues(const uint8_t *tail, size_t n, uint8_t byte)
{
    if (n == 0)
        return byte >= 0xc2 && byte <= 0xf4;
    uint8_t low = 0x80, high = 0xbf;
    if (n == 1) {
        low = tail[0] == 0xe0 ? 0xa0 : tail[0] == 0xf0 ? 0x90 : 0x80;
        high = tail[0] == 0xed ? 0x9f : tail[0] == 0xf4 ? 0x8f : 0xbf;
    }
    return byte >= low && byte <= high;
}

static size_t char_bytes(uint8_t lead) { return lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2; }

static void push_byte(struct detokenizer *d, uint8_t byte, struct json_out *out)
{
    if (d->n_tail && !continues(d->tail, d->n_tail, byte))
        detokenizer_flush(d, out);
    if (d->n_tail == 0 && byte < 0x80) {
        json_out_raw(out, (const char *)&byte, 1);
        return;
    }
    if (d->n_tail == 0 && !continues(d->tail, 0, byte)) {
        json_out_raw(out, replacement, 3);
        return;
    }
    d->tail[d->n_tail++] = byte;
    if (d->n_tail == char_bytes(d->tail[0])) {
        json_out_raw(out, (const char *)d->tail, d->n_tail);
        d->n_tail = 0;
    }
}

void detokenizer_push(struct detokenizer *d, int32_t id, struct json_out *out)
{
    if (d->skip_special && tokenizer_is_special(d->tokenizer, id))
        return;
    size_t n;
    const char *bytes = tokenizer_bytes(d->tokenizer, id, &n);
    if (!bytes)
        return;
    for (size_t i = 0; i < n;) {
        size_t whole = d->n_tail ? 0 : utf8_check(bytes + i, n - i);
        json_out_raw(out, bytes + i, whole);
        i += whole;
        if (i < n)
            push_byte(d, (uint8_t)bytes[i++], out);
    }
}

void detokenizer_flush(struct detokenizer *d, struct json_out *out)
{
    if (d->n_tail)
        json_out_raw(out, replacement, 3);
    d->n_tail = 0;
}
