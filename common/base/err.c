/* err.c: the error table's lookups and the per-thread sentence. */
#include "common/base/err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char sentence[512];
static _Thread_local enum err sentence_code;

static const struct {
    const char *name, *meaning;
    int http;
    bool retry;
} table[] = {
#define X(code, http, retry, text) {#code, text, http, retry},
    ERR_TABLE(X)
#undef X
};

enum err err_set(enum err code, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(sentence, sizeof(sentence), fmt, ap);
    va_end(ap);
    sentence_code = code;
    return code;
}

enum err err_prefix(enum err code, const char *fmt, ...)
{
    char old[sizeof(sentence)];
    snprintf(old, sizeof(old), "%s", err_text(code));
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(sentence, sizeof(sentence), fmt, ap);
    va_end(ap);
    size_t room = n > 0 && (size_t)n + 2 < sizeof(sentence) ? sizeof(sentence) - (size_t)n - 2 : 0;
    if (room)
        snprintf(sentence + n, room + 2, ": %.*s", (int)room - 1, old);
    sentence_code = code;
    return code;
}

const char *err_text(enum err code)
{
    return sentence[0] && sentence_code == code ? sentence : err_meaning(code);
}

const char *err_name(enum err code) { return table[code].name; }
const char *err_meaning(enum err code) { return table[code].meaning; }
int err_http(enum err code) { return table[code].http; }
bool err_retryable(enum err code) { return table[code].retry; }

int err_exit_code(enum err code)
{
    bool in_vain = code == ERR_INVALID || code == ERR_BAD_MODEL || code == ERR_NOT_FOUND ||
                   code == ERR_MISMATCH;
    return in_vain ? 2 : 1;
}
