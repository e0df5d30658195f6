/* report.h: the HTML report: one file that needs nothing else. */
#ifndef BATON_BENCH_REPORT_H
#define BATON_BENCH_REPORT_H

#include <stddef.h>

#include "common/base/json.h"

/* runs: what output_json wrote. Writes path. */
MUST_CHECK enum err report_write(const struct json_out *runs, size_t n, const char *path);

/* `baton bench report RUN.json... --html FILE` */
MUST_CHECK enum err report_command(int argc, char **argv);

#endif
