/* options.h: the flags of baton bench, from one table (options.def). */
#ifndef BATON_BENCH_OPTIONS_H
#define BATON_BENCH_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

#include "common/base/err.h"

enum endpoint { ENDPOINT_COMPLETIONS, ENDPOINT_CHAT, ENDPOINT_GENERATE };
enum prompt_form { PROMPT_TEXT, PROMPT_IDS, PROMPT_FIT };
enum arrivals { ARRIVE_AT_ONCE, ARRIVE_POISSON, ARRIVE_CONSTANT, ARRIVE_RECORDED };

/* Service levels in ms; 0 = none asked for. */
struct slo {
    double ttft_ms, tpot_ms, e2el_ms;
};

struct options {
#define STR(name, ...)  const char *name;
#define INT(name, ...)  int64_t name;
#define REAL(name, ...) double name;
#include "tests/bench/options.def"
#undef STR
#undef INT
#undef REAL
    // what the words above mean
    enum endpoint endpoint_kind;
    enum prompt_form prompt_form;
    enum arrivals arrival_kind;
    struct slo slo;
    bool synthetic, do_ignore_eos, do_shuffle, do_repeat;
};

/* argv without the program and command. Flags are "--name value" or "--name=value"; --help prints
 * and exits 0. The workload's values are defaults that flags override. ERR_INVALID names the flag,
 * its value and what is allowed. Strings live as long as argv. */
MUST_CHECK enum err options_parse(int argc, char **argv, struct options *ret);

/* The path that requests go to. */
const char *endpoint_path(enum endpoint e);

#endif
