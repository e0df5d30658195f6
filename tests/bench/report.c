/* report.c: puts runs into the page (report.html, compiled in), which draws them. */
#include "tests/bench/report.h"

#include <stdlib.h>
#include <string.h>

#include "common/base/own.h"
#include "tests/bench/output.h"
#include "report_page.h" /* report_page[], report_page_bytes */

#define MARK     "/*RUNS*/"
#define MAX_RUNS 64

static const char *find_mark(void)
{
    return memmem(report_page, report_page_bytes, MARK, strlen(MARK));
}

/* The JSON stands in a script element: no text may end it. */
static void put_script(struct json_out *o, const char *text, size_t n)
{
    for (const char *p = text, *end = text + n, *lt; p < end; p = lt) {
        lt = memchr(p, '<', (size_t)(end - p));
        if (!lt)
            lt = end;
        json_out_raw(o, p, (size_t)(lt - p));
        if (lt < end) {
            json_out_raw(o, "\\u003c", 6);
            lt++;
        }
    }
}

enum err report_write(const struct json_out *runs, size_t n, const char *path)
{
    const char *mark = find_mark();
    struct json_out page = {0};
    json_out_raw(&page, (const char *)report_page, (size_t)(mark - (const char *)report_page));
    for (size_t i = 0; i < n; i++) {
        json_out_raw(&page, ",", i > 0);
        put_script(&page, runs[i].data, runs[i].len);
        page.failed |= runs[i].failed;
    }
    mark += strlen(MARK);
    json_out_raw(&page, mark, (size_t)((const char *)report_page + report_page_bytes - mark));
    enum err e = output_file(path, &page);
    json_out_finish(&page);
    return e;
}

/* A run without its requests. */
static enum err read_run(const char *path, struct json_out *ret)
{
    json_t *json = NULL;
    TRY(json_parse_file(path, &json_limits_file, &json));
    const char *format = json_string_value(json_object_get(json, "format"));
    enum err e = ERR_OK;
    if (!format || strcmp(format, "baton-bench-1") != 0) {
        e = err_set(ERR_INVALID, "%s is no run of baton bench (--json)", path);
    } else {
        json_object_del(json, "requests");
        char *text = json_dumps(json, JSON_COMPACT | JSON_REAL_PRECISION(6));
        json_out_raw(ret, text ? text : "", text ? strlen(text) : 0);
        ret->failed |= !text;
        free(text);
    }
    json_decref(json);
    return e;
}

enum err report_command(int argc, char **argv)
{
    struct json_out runs[MAX_RUNS] = {0};
    size_t n = 0;
    const char *html = NULL;
    enum err e = ERR_OK;
    for (int i = 0; i < argc && e == ERR_OK; i++) {
        if (!strcmp(argv[i], "--html") && i + 1 < argc)
            html = argv[++i];
        else if (argv[i][0] == '-')
            e = err_set(ERR_INVALID, "report knows only RUN.json... and --html FILE, not %s",
                        argv[i]);
        else if (n == MAX_RUNS)
            e = err_set(ERR_INVALID, "more than %d runs", MAX_RUNS);
        else
            e = read_run(argv[i], &runs[n++]);
    }
    if (e == ERR_OK && (!html || n == 0))
        e = err_set(ERR_INVALID, "report needs RUN.json... and --html FILE");
    if (e == ERR_OK)
        e = report_write(runs, n, html);
    for (size_t i = 0; i < n; i++)
        json_out_finish(&runs[i]);
    return e;
}
