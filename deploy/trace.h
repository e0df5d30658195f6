/* trace.h: baton trace: a capture of the router's --trace-file as a Chrome trace, which Perfetto
 * and chrome://tracing show: a track per process, a span per stage, an arrow where a request moves
 * on.
 */
#ifndef BATON_DEPLOY_TRACE_H
#define BATON_DEPLOY_TRACE_H

#include <stddef.h>
#include <stdio.h>

#include "common/base/err.h"

struct trace_summary {
    size_t n_requests, n_processes;
    int cut; // the last line is not whole (the router died, or still writes) and was left out
};
/* Reads lines from in (called name in errors), writes the trace to out. ERR_INVALID names line and
 * member; out has then got nothing. ERR_IO, ERR_NOMEM. */
MUST_CHECK enum err trace_convert(FILE *in, const char *name, FILE *out, struct trace_summary *ret);

/* The command: argv is FILE [OUT]. Returns the exit status. */
int trace_main(int argc, char **argv);

#endif
