/* output.h: what a run says: progress, the table, the JSON. */
#ifndef BATON_BENCH_OUTPUT_H
#define BATON_BENCH_OUTPUT_H

#include "common/base/json.h"
#include "tests/bench/load.h"
#include "tests/bench/stats.h"

/* Everything there is to say about a run. */
struct run_info {
    const struct options *o;
    const struct dataset *data;
    const char *label, *model; // model: "" if not sent
    uint64_t prompt_hash;
    uint64_t wall_us; // when it began
    double cpu_s;     // that the load generator used
    const struct record *records;
    const struct stats *stats;
};

/* One line on stderr; tty: written over by the next one. */
struct progress {
    bool tty;
    uint64_t last_us, last_events;
    double *scratch;
};
void progress_show(void *progress, const struct load_state *s);

void output_table(FILE *f, const struct run_info *i);
/* requests: with the array of every request. o->failed: no memory. */
void output_json(const struct run_info *i, bool requests, struct json_out *o);
MUST_CHECK enum err output_file(const char *path, const struct json_out *text);

#endif
