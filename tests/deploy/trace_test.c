/* trace_test.c: captures in, Chrome traces out. */
#include "deploy/trace.h"

#include <string.h>

#include "check.h"
#include "common/base/json.h"
#include "common/base/own.h"

#define LINE(received, prefill, decode, times)                                                     \
    "{\"received_us\":" #received ",\"request\":\"r\",\"gen\":\"1f\",\"prefill\":\"" prefill       \
    "\",\"decode\":\"" decode "\",\"finish\":\"stop\",\"prompt\":10,\"at_us\":{" times "}}\n"
#define ALL                                                                                        \
    "\"queued\":10,\"placed\":20,\"prefill_start\":30,\"prefill_end\":100,\"first_token\":100,"    \
    "\"handoff\":150,\"last_token\":400,\"end\":420"

static enum err convert(const char *text, struct trace_summary *s, json_t **ret)
{
    FILE *in = fmemopen((char *)text, strlen(text), "r");
    OWNED_MEM char *out = NULL;
    size_t n = 0;
    FILE *to = open_memstream(&out, &n);
    REQUIRE(in && to);
    *ret = NULL;
    enum err e = trace_convert(in, "cap", to, s);
    fclose(in);
    fclose(to);
    if (e == ERR_OK)
        CHECK_OK(json_parse(out, n, &json_limits_file, ret));
    else
        CHECK(n == 0);
    return e;
}

/* The nth event of that phase and name, in the order of the file; NULL: none. */
static const json_t *event(const json_t *root, const char *phase, const char *name, int nth)
{
    const json_t *events = json_object_get(root, "traceEvents");
    for (size_t i = 0; i < json_array_size(events); i++) {
        const json_t *e = json_array_get(events, i);
        if (!strcmp(json_string_value(json_object_get(e, "ph")), phase) &&
            !strcmp(json_string_value(json_object_get(e, "name")), name) && nth-- == 0)
            return e;
    }
    return NULL;
}

static int64_t num(const json_t *e, const char *key)
{
    return e ? json_integer_value(json_object_get(e, key)) : -1;
}

static void check_span(const json_t *root, const char *name, int nth, int64_t pid, int64_t tid,
                       int64_t ts, int64_t dur)
{
    const json_t *e = event(root, "X", name, nth);
    if (!e || num(e, "pid") != pid || num(e, "tid") != tid || num(e, "ts") != ts ||
        num(e, "dur") != dur)
        fprintf(stderr, "%s %d\n", name, nth);
    CHECK_INT(num(e, "pid"), pid);
    CHECK_INT(num(e, "tid"), tid);
    CHECK_INT(num(e, "ts"), ts);
    CHECK_INT(num(e, "dur"), dur);
}

static void stages_become_spans(void)
{
    struct trace_summary s;
    json_t *root;
    /* The second begins while the first runs, the third when it is over. */
    CHECK_OK(convert(LINE(1000, "prefill/0", "decode/0", ALL)
                         LINE(1050, "prefill/0", "decode/1", ALL)
                             LINE(2000, "prefill/0", "decode/0", ALL),
                     &s, &root));
    CHECK_INT(s.n_requests, 3);
    CHECK_INT(s.n_processes, 4);
    CHECK(!s.cut);
    CHECK_STR(json_string_value(json_object_get(
                  json_object_get(event(root, "M", "process_name", 2), "args"), "name")),
              "decode/0");
    check_span(root, "r", 0, 1, 1, 0, 420);
    check_span(root, "parse", 0, 1, 1, 0, 10);
    check_span(root, "queue", 0, 1, 1, 10, 10);
    check_span(root, "to first token", 0, 1, 1, 20, 80);
    check_span(root, "stream", 0, 1, 1, 100, 320);
    check_span(root, "wait for a chunk", 0, 2, 1, 20, 10);
    check_span(root, "prefill", 0, 2, 1, 30, 70);
    check_span(root, "handoff", 0, 3, 1, 100, 50);
    check_span(root, "decode", 0, 3, 1, 150, 250);
    check_span(root, "prefill", 1, 2, 2, 80, 70);
    check_span(root, "decode", 1, 4, 1, 200, 250);
    check_span(root, "stream", 2, 1, 1, 1100, 320);
    const json_t *args = json_object_get(event(root, "X", "r", 0), "args");
    CHECK_STR(json_string_value(json_object_get(args, "gen")), "1f");
    CHECK_INT(num(args, "prompt"), 10);
    for (int i = 0; i < 6; i++) { /* every arrow has both ends, at one time */
        const json_t *from = event(root, "s", "moves on", i), *to = NULL;
        for (int k = 0; k < 6; k++)
            if (num(event(root, "f", "moves on", k), "id") == num(from, "id"))
                to = event(root, "f", "moves on", k);
        CHECK(from && to && num(from, "ts") == num(to, "ts") && num(from, "pid") < num(to, "pid"));
    }
    CHECK(!event(root, "s", "moves on", 6));
    json_decref(root);
}

static void requests_that_did_not_get_far(void)
{
    struct trace_summary s;
    json_t *root;
    CHECK_OK(convert(LINE(5, "", "", "\"queued\":10,\"end\":30"), &s, &root));
    check_span(root, "queue", 0, 1, 1, 10, 20);
    CHECK(!event(root, "X", "stream", 0) && !event(root, "s", "moves on", 0));
    CHECK_INT(s.n_processes, 1);
    json_decref(root);
    CHECK_OK(convert(LINE(5, "p", "d", "\"queued\":10,\"placed\":11,\"end\":30"), &s, &root));
    check_span(root, "r", 1, 2, 1, 11, 19); /* was in the worker until the end */
    CHECK(!event(root, "X", "prefill", 0) && !event(root, "X", "decode", 0));
    json_decref(root);
    CHECK_OK(convert("", &s, &root));
    CHECK_INT(s.n_requests, 0);
    json_decref(root);
}

static void a_line_cut_short_is_left_out(void)
{
    static const char whole[] = LINE(1000, "p", "d", ALL);
    char text[2 * sizeof(whole)];
    for (size_t n = 1; n < sizeof(whole) - 2; n++) {
        snprintf(text, sizeof(text), "%s%.*s", whole, (int)n, whole);
        struct trace_summary s = {0};
        json_t *root;
        CHECK_OK(convert(text, &s, &root));
        CHECK(s.cut && s.n_requests == 1);
        json_decref(root);
    }
}

static void bad_lines_are_named(void)
{
    static const struct {
        const char *text, *says;
    } bad[] = {
        {"{}\n", "cap:1: received_us is missing"},
        {"\n[]\n", "cap:2: not an object"},
        {"nonsense\n", "cap:1"},
        {LINE(1, "p", "d", ALL) "{\"received_us\":1}\n", "cap:2: at_us is missing"},
        {LINE(1, "p", "d", "\"queued\":1"), "cap:1: at_us.end is missing"},
        {LINE(-1, "p", "d", ALL), "received_us"},
        {LINE(1, "p", "d", "\"queued\":\"x\",\"end\":3"), "queued"},
        {LINE(1, "p", "d", "\"queued\":4,\"end\":3"), "at_us.queued is 4, after the end"},
        {"{\"received_us\":1,\"prefill\":7,\"at_us\":{\"end\":1}}\n", "prefill"},
    };
    for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
        struct trace_summary s;
        json_t *root;
        enum err e = convert(bad[i].text, &s, &root);
        CHECK(e == ERR_INVALID);
        if (!strstr(err_text(e), bad[i].says))
            fprintf(stderr, "%zu: %s\n", i, err_text(e));
        CHECK(strstr(err_text(e), bad[i].says) != NULL);
    }
}

int main(void)
{
    RUN(stages_become_spans);
    RUN(requests_that_did_not_get_far);
    RUN(a_line_cut_short_is_left_out);
    RUN(bad_lines_are_named);
    return check_done();
}
