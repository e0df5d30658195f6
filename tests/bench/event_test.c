/* Events in the three shapes, and streams cut anywhere. */
#include "tests/bench/event.h"
#include "tests/bench/sse_reader.h"

#include "tests/check.h"

static struct event parse(const char *text)
{
    struct event e;
    REQUIRE(event_parse(text, strlen(text), &e) == ERR_OK);
    return e;
}

static void completions_events(void)
{
    struct event e =
        parse("{\"id\":\"x\",\"choices\":[{\"index\":0,\"text\":\"a\\\"}\",\"logprobs\":"
              "{\"tokens\":[\"text\"]},\"finish_reason\":null}],\"usage\":null}");
    CHECK(e.has_choice && e.has_output && !e.is_error && !e.finish[0]);
    CHECK_INT(e.output_tokens, -1);
    e = parse("{\"choices\":[{\"text\":\"\",\"finish_reason\":null}]}");
    CHECK(e.has_choice && e.has_output); /* a token without text */
    e = parse("{\"choices\":[{\"text\":\"\",\"finish_reason\":\"length\"}]}");
    CHECK(e.has_choice && !e.has_output);
    CHECK_STR(e.finish, "length");
    e = parse("{\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":12,"
              "\"prompt_tokens_details\":{\"cached_tokens\":3}}}");
    CHECK(!e.has_choice && !e.has_output);
    CHECK_INT(e.prompt_tokens, 7);
    CHECK_INT(e.output_tokens, 12);
    CHECK_INT(e.cached_tokens, 3);
}

static void chat_events(void)
{
    struct event e = parse("{\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}");
    CHECK(e.has_choice && !e.has_output);
    CHECK(parse("{\"choices\":[{\"delta\":{\"content\":\"x\"}}]}").has_output);
    CHECK(parse("{\"choices\":[{\"delta\":{\"reasoning_content\":\"x\"}}]}").has_output);
    CHECK(parse("{\"choices\":[{\"delta\":{\"reasoning\":\"x\"}}]}").has_output);
    CHECK(parse("{\"choices\":[{\"delta\":{\"tool_calls\":[{\"index\":0}]}}]}").has_output);
    CHECK(!parse("{\"choices\":[{\"delta\":{\"tool_calls\":[]}}]}").has_output);
    CHECK(!parse("{\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}").has_output);
    CHECK(!parse("{\"delta\":{\"content\":\"x\"}}").has_output); /* not in a choice */
}

static void generate_events(void)
{
    struct event e = parse("{\"token\":{\"id\":5,\"text\":\"\",\"count_output_tokens\":9,"
                           "\"prompt_tokens\":4},\"finished\":true,\"finish_reason\":\"stop\"}");
    CHECK(e.has_choice && e.has_output);
    CHECK_INT(e.output_tokens, 9);
    CHECK_INT(e.prompt_tokens, 4);
    CHECK_STR(e.finish, "stop");
}

static void errors(void)
{
    struct event e = parse("{\"error\":{\"message\":\"too busy\",\"code\":429}}");
    CHECK(e.is_error && !e.has_choice);
    CHECK_STR(e.message, "too busy");
    CHECK_STR(parse("{\"error\":\"plain\"}").message, "plain");
    CHECK(!parse("{\"error\":null,\"choices\":[]}").is_error);
    static const char *const bad[] = {
        "",      "{",          "{\"a\"}", "{\"a\":}", "[1,]", "{\"a\":1}x", "nul",   "\"a",
        "\"a\\", "{\"a\":1,}", "1.2.3",   "\"\n\"",   "}",    "{\"a\" 1}",  "{a:1}", "[1 2]",
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        if (event_parse(bad[i], strlen(bad[i]), &e) != ERR_INVALID)
            fprintf(stderr, "passed: %s\n", bad[i]);
        CHECK(event_parse(bad[i], strlen(bad[i]), &e) == ERR_INVALID);
    }
    char deep[200];
    memset(deep, '[', sizeof(deep));
    CHECK(event_parse(deep, sizeof(deep), &e) == ERR_INVALID);
    CHECK_INT(parse("{\"usage\":{\"completion_tokens\":-5}}").output_tokens, -1);
}

/* ---- the stream ---- */

static char got[4096];

static void on_event(void *user, const char *data, size_t n)
{
    (void)user;
    snprintf(got + strlen(got), sizeof(got) - strlen(got), "<%.*s>", (int)n, data);
}

static void streams_cut_anywhere(void)
{
    static const char stream[] =
        ": ping\n\ndata: {\"a\":1}\n\nevent: x\r\ndata:one\r\ndata: two\r\n"
        "id: 3\r\n\r\ndata\n\ndatax: no\n\ndata:  sp\r\rdata: [DONE]\n\nrest";
    static const char want[] = "<{\"a\":1}><one\ntwo><>< sp><[DONE]>";
    size_t n = sizeof(stream) - 1;
    for (size_t a = 0; a <= n; a++) {
        for (size_t b = a; b <= n; b++) {
            struct sse_reader r;
            sse_reader_init(&r, on_event, NULL);
            got[0] = '\0';
            bool good = sse_reader_push(&r, stream, a) == ERR_OK &&
                        sse_reader_push(&r, stream + a, b - a) == ERR_OK &&
                        sse_reader_push(&r, stream + b, n - b) == ERR_OK;
            if (!good || strcmp(got, want) != 0)
                CHECK_STR(got, want);
            sse_reader_finish(&r);
        }
    }
    CHECK_STR(got, want);
}

static void endless_line_is_refused(void)
{
    struct sse_reader r;
    static char block[1 << 20];
    enum err e = ERR_OK;
    memset(block, 'x', sizeof(block));
    sse_reader_init(&r, on_event, NULL);
    for (int i = 0; i < 5 && e == ERR_OK; i++)
        e = sse_reader_push(&r, block, sizeof(block));
    CHECK(e == ERR_TOO_LARGE);
    sse_reader_finish(&r);
}

int main(void)
{
    RUN(completions_events);
    RUN(chat_events);
    RUN(generate_events);
    RUN(errors);
    RUN(streams_cut_anywhere);
    RUN(endless_line_is_refused);
    return check_done();
}
