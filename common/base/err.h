/* err.h: what can go wrong, in one table.
 *
 * A function that can fail returns `enum err`; TRY passes a failure up; err_set keeps one sentence
 * with the values in it (per thread, overwritten by the next err_set). An error is handled once:
 * returned or logged, never both. `assert` is for our own bugs; what the world does is an enum err.
 */
#ifndef BATON_ERR_H
#define BATON_ERR_H

#include <stdbool.h>

// clang-format off
#define ERR_TABLE(X)                                                                               \
    /* code         http  retry  what it means                                              */     \
    X(OK,            200, false, "success")                                                        \
    X(NOMEM,         503, true,  "out of host memory")                                             \
    X(NO_PAGES,      429, true,  "no free KV pages: wait or shed")                                 \
    X(INVALID,       400, false, "the request or a setting is wrong")                              \
    X(TOO_LONG,      400, false, "prompt and output do not fit the context")                       \
    X(NOT_FOUND,     404, false, "no such thing")                                                  \
    X(TOO_LARGE,     413, false, "larger than a limit")                                            \
    X(BUSY,          429, true,  "a bounded queue is full")                                        \
    X(UNAVAILABLE,   503, true,  "no worker can take it now")                                      \
    X(TIMEOUT,       504, true,  "a deadline passed")                                              \
    X(CANCELLED,     499, false, "the client went away")                                           \
    X(PREEMPTED,     503, true,  "gave its pages back; to be computed again")                      \
    X(PEER_LOST,     502, true,  "a peer process or link died")                                    \
    X(PROTO,         502, false, "a peer broke the wire protocol")                                 \
    X(MISMATCH,      502, false, "peers disagree on model, geometry or version")                   \
    X(CHECKSUM,      502, true,  "KV pages arrived damaged")                                       \
    X(BAD_MODEL,     500, false, "a checkpoint file is missing, damaged or unsupported")           \
    X(IO,            500, false, "the operating system refused")                                   \
    X(ABORTED,       500, true,  "stopped on purpose before it finished")                          \
    X(CUDA,          500, false, "CUDA or NCCL failed: this worker must restart")                  \
    X(INTERNAL,      500, false, "a bug in Baton")
// clang-format on

enum err {
#define X(code, http, retry, text) ERR_##code,
    ERR_TABLE(X)
#undef X
};

#define MUST_CHECK __attribute__((warn_unused_result))

/* Evaluates to the call's failure by returning it from the enclosing function. */
#define TRY(call)                                                                                  \
    do {                                                                                           \
        enum err try_ = (call);                                                                    \
        if (try_ != ERR_OK)                                                                        \
            return try_;                                                                           \
    } while (0)

/* Records one sentence about the failure for err_text, and returns code. */
enum err err_set(enum err code, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Puts "prefix: " before the recorded sentence (for callers that know the file or request). */
enum err err_prefix(enum err code, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* The sentence of the last err_set on this thread, or the table's text for code. */
const char *err_text(enum err code);

const char *err_name(enum err code); /* "NO_PAGES" */
const char *err_meaning(enum err code);
int err_http(enum err code);
/* What a process exits with that could not start: 2 where starting it again cannot help (settings,
 * checkpoint), else 1. Launcher, systemd units and sbatch script go by it. */
int err_exit_code(enum err code);
bool err_retryable(enum err code);

#endif
