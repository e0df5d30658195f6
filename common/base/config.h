/* config.h: every knob of every process, from one table (config.def).
 *
 * Sources, later ones win: default, --config FILE (a JSON object), environment BATON_NAME, flag.
 * --max_req_total_len and --max-req-total-len are the same flag. Unknown keys stop the start.
 */
#ifndef BATON_CONFIG_H
#define BATON_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "common/base/err.h"

enum config_proc { CONFIG_ROUTER = 1, CONFIG_PREFILL = 2, CONFIG_DECODE = 4, CONFIG_LAUNCHER = 8 };

struct config {
#define STR(name, ...)  const char *name;
#define INT(name, ...)  int64_t name;
#define REAL(name, ...) double name;
#define BOOL(name, ...) bool name;
#include "common/base/config.def"
#undef STR
#undef INT
#undef REAL
#undef BOOL
};

#define CONFIG_AUTO  (-1) /* what "auto" makes of an INT that may be that */
#define MTP_AUTO_MAX 4

/* Most drafts of a step. */
static inline uint32_t config_mtp_max(const struct config *c)
{
    return c->mtp_step == CONFIG_AUTO ? MTP_AUTO_MAX : (uint32_t)c->mtp_step;
}

/* Fills ret for one process. argv[0] is skipped. Handles --help and --version by printing and
 * exiting 0. Flags are "--name value", "--name=value"; a BOOL may stand alone (true) or take
 * true/false. ERR_INVALID names the flag, its value and what is allowed. Strings live until exit.
 * A flag of another process is refused by saying whose it is; --tp other than 1 with its reason. */
MUST_CHECK enum err config_parse(enum config_proc proc, int argc, char **argv, struct config *ret);

/* Which processes (bits of config_proc) a flag "--x" (or "x", either spelling) belongs to; 0 if
 * unknown. *takes_value tells whether the next argument is its value. For the launcher. */
int config_flag_procs(const char *flag, bool *takes_value);

/* Would this value do for the setting "x" or "--x"? shown: how the sentence of ERR_INVALID calls
 * it,
 * "--port" or "cluster.json: port". Unknown settings pass: who owns a setting is another question.
 */
MUST_CHECK enum err config_check(const char *flag, const char *value, const char *shown);

/* Logs "name=value (source)" for every setting of proc: what was set at info level, defaults at
 * debug. */
void config_log(enum config_proc proc, const struct config *c);

#endif
