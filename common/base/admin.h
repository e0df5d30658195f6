/* admin.h: a unix socket (mode 0600) per process for operators and tests.
 *
 * One command per line, one JSON object per answer: `accounting`, `drain`, `failpoint SPEC`, plus
 * what the process registers. `baton admin SOCKET COMMAND` speaks it, so does `nc -U`.
 */
#ifndef BATON_ADMIN_H
#define BATON_ADMIN_H

#include <jansson.h>
#include <uv.h>

#include "common/base/err.h"

struct admin;

/* Answers command with argument ("" if none): return an object, which admin dumps and frees, or
 * NULL for "unknown command". Called on the loop's thread. */
typedef json_t *admin_fn(void *user, const char *command, const char *argument);

/* Listens at path (a stale socket is replaced, a live one refused: ERR_IO). `failpoint` is handled
 * here; everything else goes to fn. */
MUST_CHECK enum err admin_create(uv_loop_t *loop, const char *path, admin_fn *fn, void *user,
                                 struct admin **ret);
void admin_destroy(struct admin *a); /* closes; memory goes when the loop has run once more */

#endif
