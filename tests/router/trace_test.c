/* trace_test.c: traceparent headers, and the lines of --trace-file. */
#include "router/trace.h"

#include <string.h>

#include "check.h"
#include "common/base/clock.h"
#include "common/base/json.h"
#include "common/base/own.h"
#include "router/traceparent.h"

#define TRACE  "4bf92f3577b34da6a3ce929d0e0e4736"
#define PARENT "00f067aa0ba902b7"

static void traceparents_are_passed_on(void)
{
    struct traceparent t;
    char text[TRACEPARENT_BYTES];
    CHECK(traceparent_parse("00-" TRACE "-" PARENT "-01", 0xabc, &t));
    CHECK_STR(t.trace_id, TRACE);
    CHECK_STR(t.parent_id, PARENT);
    traceparent_write(&t, text);
    CHECK_STR(text, "00-" TRACE "-0000000000000abc-01");
    CHECK(traceparent_parse("00-" TRACE "-" PARENT "-00", 0, &t));
    traceparent_write(&t, text);
    CHECK_STR(text, "00-" TRACE "-0000000000000001-00"); /* 0 would be no span */
    CHECK(traceparent_parse("cc-" TRACE "-" PARENT "-01-what-comes-later", 1, &t));
}

static void others_are_ignored(void)
{
    static const char *const bad[] = {
        "",
        "00",
        "00-" TRACE "-" PARENT,
        "00-" TRACE "-" PARENT "-1",
        "00-" TRACE "-" PARENT "-01-",
        "00-" TRACE "-" PARENT "-01x",
        "cc-" TRACE "-" PARENT "-01x",
        "ff-" TRACE "-" PARENT "-01",
        "0g-" TRACE "-" PARENT "-01",
        "00-" TRACE "-" PARENT "-0g",
        "00_" TRACE "-" PARENT "-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-" PARENT "-01",
        "00-00000000000000000000000000000000-" PARENT "-01",
        "00-" TRACE "-0000000000000000-01",
        "00-" TRACE "-00f067aa0ba902b-701",
    };
    for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
        struct traceparent t = {.trace_id = "as it was"};
        if (traceparent_parse(bad[i], 1, &t))
            fprintf(stderr, "taken: %s\n", bad[i]);
        CHECK_STR(t.trace_id, "as it was");
    }
}

static char *read_whole(const char *path)
{
    char *text = NULL;
    size_t n;
    CHECK_OK(file_read(path, 1 << 20, &text, &n));
    return text;
}

static void lines_are_written_and_files_rotated(void)
{
    char path[] = "/tmp/baton-trace-XXXXXX", moved[64];
    close(mkstemp(path));
    snprintf(moved, sizeof(moved), "%s.1", path);
    struct trace *t;
    CHECK_OK(trace_open(path, &t));
    uint64_t now = clock_now_us();
    struct trace_record r = {.request_id = "a \"name\"",
                             .prefill = "prefill/0",
                             .decode = "",
                             .finish = "abort",
                             .gen_id = 0x1f,
                             .n_choices = 1,
                             .n_prompt = 10,
                             .received_us = now,
                             .queued_us = now + 5,
                             .end_us = now + 90};
    trace_write(t, &r);
    trace_flush(t);
    OWNED_MEM char *text = read_whole(path);
    json_t *line;
    CHECK_OK(json_parse(text, strlen(text), &json_limits_request, &line));
    CHECK(text[strlen(text) - 1] == '\n');
    CHECK_STR(json_string_value(json_object_get(line, "request")), "a \"name\"");
    CHECK_STR(json_string_value(json_object_get(line, "gen")), "1f");
    CHECK(!json_object_get(line, "decode") && !json_object_get(line, "trace"));
    int64_t late =
        (int64_t)clock_wall_us() - json_integer_value(json_object_get(line, "received_us"));
    CHECK(late >= 0 && late < 60000000);
    json_t *at = json_object_get(line, "at_us");
    CHECK_INT(json_object_size(at), 2);
    CHECK_INT(json_integer_value(json_object_get(at, "queued")), 5);
    CHECK_INT(json_integer_value(json_object_get(at, "end")), 90);
    json_decref(line);

    trace_write(t, &r); /* still buffered when the file is moved away */
    CHECK(rename(path, moved) == 0);
    CHECK_OK(trace_reopen(t));
    trace_write(t, &r);
    trace_write(t, &r);
    trace_close(t);
    for (int i = 0; i < 2; i++) {
        OWNED_MEM char *lines = read_whole(i ? path : moved);
        int n = 0;
        for (const char *p = lines; (p = strchr(p, '\n')); p++)
            n++;
        CHECK_INT(n, 2);
    }
    unlink(path);
    unlink(moved);
}

static void what_cannot_be_written_is_survived(void)
{
    struct trace *t;
    CHECK(trace_open("/nonexistent/trace", &t) == ERR_IO);
    CHECK(strstr(err_text(ERR_IO), "/nonexistent/trace") != NULL);
    trace_close(NULL);
    CHECK_OK(trace_open("/dev/full", &t));
    struct trace_record r = {.finish = "stop", .prefill = "", .decode = ""};
    for (int i = 0; i < 1000; i++)
        trace_write(t, &r);
    trace_flush(t);
    trace_close(t);
}

int main(void)
{
    RUN(traceparents_are_passed_on);
    RUN(others_are_ignored);
    RUN(lines_are_written_and_files_rotated);
    RUN(what_cannot_be_written_is_survived);
    return check_done();
}
