/* plan.h: which processes `baton serve` starts, and with which arguments.
 *
 * Pure preparation: flags and topology file in, one argument list per process out. Nothing runs
 * yet, so every mistake a user can make in a flag or a topology is found here, before the first
 * fork.
 */
#ifndef BATON_PLAN_H
#define BATON_PLAN_H

#include <jansson.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>

#include "common/base/config.h"
#include "common/base/own.h"

struct plan_proc {
    enum config_proc role;
    char name[32]; // "router", "prefill-0": in front of log lines, names its admin socket
    char *exe;     // absolute path of the program
    json_t
        *flags; // {"mtp_step": "2"}: what it is started with, later settings replace earlier ones
    cpu_set_t cpus; // where it may run; empty: anywhere
};

struct plan {
    struct config config;    // the launcher's own settings
    char **config_argv;      // what they were parsed from; their strings lead into it
    char *run_dir;           // absolute; holds every socket
    bool made_run_dir;       // by us, so it goes when we go
    struct plan_proc *procs; // [0] is the router, then prefill workers, then decode workers
    size_t n_procs, n_prefill, n_decode;
    char place_note[256]; // why workers are not pinned to the cores near their GPU
};

/* argv: the arguments after "serve". ERR_INVALID, ERR_NOT_FOUND, ERR_IO with a sentence for the
 * user. Creates the run directory. Prints and exits for --help. */
MUST_CHECK enum err plan_create(int argc, char **argv, struct plan **ret);
void plan_destroy(struct plan *p); // removes the run directory if plan_create made it
DEFINE_OWNED(plan)

/* run_dir/file, malloc'd. */
char *plan_path(const struct plan *p, const char *file);

/* NULL-terminated {exe, "--flag=value", ...} for execv; free with plan_free_argv. NULL: no memory.
 */
char **plan_argv(const struct plan_proc *p);
void plan_free_argv(char **argv);

#endif
