/* failpoint.h: named places where a test can make a process die, stall or fail.
 *
 * Compiled in with -Dfailpoints=true (the default of debug builds), absent otherwise. Set through
 * the environment, BATON_FAILPOINTS="decode.step@40=kill,kv.send=error", or the admin socket:
 *   NAME[@K][*N]=ACTION   K: the K-th time it is passed (from 0; default: every time),
 *                         N: at most N times; ACTION: kill stop exit sleep:MS error drop off
 */
#ifndef BATON_FAILPOINT_H
#define BATON_FAILPOINT_H

#include "common/base/err.h"

enum failpoint_result { FAILPOINT_NONE, FAILPOINT_ERROR, FAILPOINT_DROP };

#ifdef BATON_FAILPOINTS
/* Thread-safe. kill, stop, exit and sleep happen inside; error and drop are the caller's to do. */
enum failpoint_result failpoint_pass(const char *name);
/* Parses and adds a list of settings. ERR_INVALID names the bad one. */
MUST_CHECK enum err failpoint_set(const char *spec);
#else
static inline enum failpoint_result failpoint_pass(const char *name)
{
    (void)name;
    return FAILPOINT_NONE;
}
static inline MUST_CHECK enum err failpoint_set(const char *spec)
{
    return err_set(ERR_INVALID, "this build has no failpoints (asked for '%s')", spec);
}
#endif

#endif
