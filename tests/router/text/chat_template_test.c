/* chat_template_test.c: the model's own template, example by example, and the places where ours is
 * kinder; then that no message text becomes a control token.
 *
 * JSON is written here with single quotes, which quoted() turns into double ones. */
#include "router/text/chat_template.h"

#include "check.h"
#include "common/base/json.h"

static struct tokenizer *tokenizer;

static const struct chat_options plain = {.enable_thinking = true, .clear_thinking = true};
static const struct chat_options generate = {
    .add_generation_prompt = true, .enable_thinking = true, .clear_thinking = true};
static const struct chat_options no_thinking = {.add_generation_prompt = true,
                                                .clear_thinking = true};
static const struct chat_options keep_thinking = {.add_generation_prompt = true,
                                                  .enable_thinking = true};
static const struct chat_options continued = {.add_generation_prompt = true,
                                              .enable_thinking = true,
                                              .clear_thinking = true,
                                              .continue_final_message = true};

static json_t *quoted(const char *text)
{
    if (!text)
        return NULL;
    char *copy = strdup(text);
    for (char *p = copy; *p; p++)
        if (*p == '\'')
            *p = '"';
    json_t *value = NULL;
    CHECK_OK(json_parse(copy, strlen(copy), &json_limits_request, &value));
    if (!value)
        fprintf(stderr, "in %s\n", copy);
    free(copy);
    return value;
}

/* Control pieces hold nothing but added tokens, no two neighbours are of one kind, all is covered.
 */
static void check_pieces(const struct chat_prompt *p)
{
    size_t end = 0;
    for (size_t i = 0; i < p->n_pieces; i++) {
        const struct chat_piece *piece = &p->pieces[i];
        CHECK_INT(piece->start, end);
        CHECK(piece->n > 0);
        CHECK(i == 0 || piece->control != p->pieces[i - 1].control);
        end = piece->start + piece->n;
        struct ids ids = {0};
        CHECK_OK(
            tokenizer_encode(tokenizer, p->text + piece->start, piece->n, piece->control, &ids));
        for (size_t k = 0; k < ids.len; k++)
            CHECK_INT(tokenizer_is_added(tokenizer, ids.data[k]), piece->control);
        ids_finish(&ids);
    }
    CHECK_INT(end, p->n_text);
}

static void check(const char *messages, const char *tools, const struct chat_options *options,
                  const char *want)
{
    json_t *m = quoted(messages), *t = quoted(tools);
    struct chat_prompt p = {0};
    CHECK_OK(chat_render(m, t, options, &p));
    CHECK_STR(p.text, want);
    CHECK_INT(p.n_text, strlen(want));
    check_pieces(&p);
    chat_prompt_finish(&p);
    json_decref(m);
    json_decref(t);
}

static void check_refused(const char *messages, const char *field)
{
    json_t *m = quoted(messages);
    struct chat_prompt p = {0};
    enum err e = chat_render(m, NULL, &generate, &p);
    CHECK_INT(e, ERR_INVALID);
    if (e == ERR_INVALID && !strstr(err_text(e), field))
        CHECK_STR(err_text(e), field);
    CHECK(p.text == NULL && p.pieces == NULL);
    json_decref(m);
}

#define WEATHER                                                                                    \
    "{'type':'function','function':{'name':'get_weather','description':'天气 & <b>',"            \
    "'parameters':{'type':'object','properties':{'city':{'type':'string'},"                        \
    "'days':{'type':'integer'}},'required':['city']}}}"
#define TOOLS_HEAD                                                                                 \
    "[gMASK]<sop><|system|>\n# Tools\n\nYou may call one or more functions to assist with the "    \
    "user query.\n\nYou are provided with function signatures within <tools></tools> XML "         \
    "tags:\n<tools>\n"
#define TOOLS_TAIL                                                                                 \
    "</tools>\n\nFor each function call, output the function name and arguments within the "       \
    "following XML format:\n<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>"   \
    "{arg-value-1}</arg_value><arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>"  \
    "...</tool_call>"
#define START "[gMASK]<sop>"
#define THINK "<|assistant|><think>"

static void plain_turns(void)
{
    check("[{'role':'user','content':'Hi'}]", NULL, &generate, START "<|user|>Hi" THINK);
    check("[{'role':'user','content':'Hi'}]", NULL, &no_thinking,
          START "<|user|>Hi<|assistant|></think>");
    check("[{'role':'system','content':'You are X.\\n'},{'role':'user','content':'Hi'}]", NULL,
          &plain, START "<|system|>You are X.\n<|user|>Hi");
    check("[{'role':'user','content':'Hi'},{'role':'system','content':'S2'},"
          "{'role':'user','content':'B'}]",
          NULL, &generate, START "<|user|>Hi<|system|>S2<|user|>B" THINK);
    check("[]", NULL, &generate, START THINK);
    check("[]", "[]", &generate, START THINK);
    check("[]", "null", &plain, START);
}

static void reasoning(void)
{
    static const char given[] =
        "[{'role':'user','content':'Hi'},{'role':'assistant','content':' Hello! \\n',"
        "'reasoning_content':' greet \\n'},{'role':'user','content':'Bye'}]";
    check(given, NULL, &generate, START "<|user|>Hi<|assistant|></think>Hello!<|user|>Bye" THINK);
    check(given, NULL, &keep_thinking,
          START "<|user|>Hi<|assistant|><think>greet</think>Hello!<|user|>Bye" THINK);
    check("[{'role':'user','content':'Hi'},{'role':'assistant','content':"
          "'<think>\\nplan\\n</think>\\n\\nHello!'},{'role':'user','content':'Bye'}]",
          NULL, &keep_thinking,
          START "<|user|>Hi<|assistant|><think>plan</think>Hello!<|user|>Bye" THINK);
    check("[{'role':'user','content':'Hi'},{'role':'assistant','content':'Hello',"
          "'reasoning_content':'r'}]",
          NULL, &plain, START "<|user|>Hi<|assistant|><think>r</think>Hello");

    check("[{'role':'assistant','content':'x</think>y','reasoning_content':''}]", NULL, &plain,
          START "<|assistant|></think>x</think>y");
    check("[{'role':'assistant','content':'y','reasoning_content':'  '}]", NULL, &plain,
          START "<|assistant|><think></think>y");
    check("[{'role':'assistant','content':'y','reasoning_content':null}]", NULL, &plain,
          START "<|assistant|></think>y");
    check("[{'role':'assistant','content':'a</think>b<think>c</think>\\nd'}]", NULL, &plain,
          START "<|assistant|><think>a</think>d");
    check("[{'role':'assistant','content':'<think>a<think>\\n b</think>'}]", NULL, &plain,
          START "<|assistant|><think>b</think>");
    /* white space as Python's strip sees it */
    check("[{'role':'assistant','content':'\xc2\xa0\xe2\x80\x83\\u001c x\xe3\x80\x80\xc2\x85\\t',"
          "'reasoning_content':'\xe2\x80\x8b\xe2\x80\xa8'}]",
          NULL, &plain, START "<|assistant|><think>\xe2\x80\x8b</think>x");
    /* the other name that clients use */
    check("[{'role':'assistant','content':'y','reasoning':'r'}]", NULL, &plain,
          START "<|assistant|><think>r</think>y");
    check("[{'role':'assistant','content':'y','reasoning':'r','reasoning_content':'s'}]", NULL,
          &plain, START "<|assistant|><think>s</think>y");
}

static void tools_block(void)
{
    check("[{'role':'system','content':'Be brief.'},{'role':'user','content':'Weather?'}]",
          "[" WEATHER "]", &generate,
          TOOLS_HEAD
          "{\"type\": \"function\", \"function\": {\"name\": \"get_weather\", \"description\": "
          "\"天气 & <b>\", \"parameters\": {\"type\": \"object\", \"properties\": {\"city\": "
          "{\"type\": \"string\"}, \"days\": {\"type\": \"integer\"}}, \"required\": "
          "[\"city\"]}}}\n" TOOLS_TAIL "<|system|>Be brief.<|user|>Weather?" THINK);
    check("[]", "[{'b':1.50,'a':[]},{'c':'\\u0001\\/\\n'}]", &plain,
          TOOLS_HEAD "{\"b\": 1.5, \"a\": []}\n{\"c\": \"\\u0001/\\n\"}\n" TOOLS_TAIL);
}

static void tool_calls(void)
{
    check("[{'role':'user','content':'Weather?'},{'role':'assistant','content':'',"
          "'reasoning_content':'Need tool.','tool_calls':[{'id':'1','type':'function','function':"
          "{'name':'get_weather','arguments':{'city':'北京','days':3,'opts':{'a':[1,2],'b':null},"
          "'f':true}}}]},{'role':'tool','content':'{\\'temp\\': 21}'}]",
          NULL, &generate,
          START "<|user|>Weather?<|assistant|><think>Need tool.</think><tool_call>get_weather"
                "<arg_key>city</arg_key><arg_value>北京</arg_value><arg_key>days</arg_key>"
                "<arg_value>3</arg_value><arg_key>opts</arg_key><arg_value>{\"a\": [1, 2], \"b\": "
                "null}</arg_value><arg_key>f</arg_key><arg_value>true</arg_value></tool_call>"
                "<|observation|><tool_response>{\"temp\": 21}</tool_response>" THINK);
    static const char *const parallel[] = {
        "{'role':'tool','content':'r1'},{'role':'tool','content':'r2'}",
        "{'role':'tool','content':['r1','r2']}",
        "{'role':'tool','content':[{'output':'r1'},{'output':'r2'}]}",
        "{'role':'function','content':'r1'},{'role':'tool','content':'r2'}",
    };
    for (size_t i = 0; i < ARRAY_LEN(parallel); i++) {
        char messages[1024];
        snprintf(messages, sizeof(messages),
                 "[{'role':'user','content':'Q'},{'role':'assistant','content':'Let me check.',"
                 "'tool_calls':[{'function':{'name':'get_weather','arguments':{'city':'A'}}},"
                 "{'function':{'name':'now','arguments':{}}}]},%s]",
                 parallel[i]);
        check(messages, NULL, &generate,
              START "<|user|>Q<|assistant|></think>Let me check.<tool_call>get_weather<arg_key>"
                    "city</arg_key><arg_value>A</arg_value></tool_call><tool_call>now</tool_call>"
                    "<|observation|><tool_response>r1</tool_response><tool_response>r2"
                    "</tool_response>" THINK);
    }
    /* reasoning of a finished turn disappears */
    check("[{'role':'user','content':'Q'},{'role':'assistant','reasoning_content':'a',"
          "'tool_calls':[{'function':{'name':'f'}}]},{'role':'tool','content':'{\\'temp\\': 21}'},"
          "{'role':'assistant','reasoning_content':'b','content':'21C'},"
          "{'role':'user','content':'thx'}]",
          NULL, &generate,
          START "<|user|>Q<|assistant|></think><tool_call>f</tool_call><|observation|>"
                "<tool_response>{\"temp\": 21}</tool_response><|assistant|></think>21C"
                "<|user|>thx" THINK);
    check("[{'role':'assistant','tool_calls':[{'function':{'name':'f','arguments':"
          "{'a':1.0,'b':'1','c':'true','d':'é\\n<x>'}}}]}]",
          NULL, &plain,
          START "<|assistant|></think><tool_call>f<arg_key>a</arg_key><arg_value>1.0</arg_value>"
                "<arg_key>b</arg_key><arg_value>1</arg_value><arg_key>c</arg_key><arg_value>true"
                "</arg_value><arg_key>d</arg_key><arg_value>é\n<x></arg_value></tool_call>");
    /* without the wrapper, with an empty wrapper, with none */
    check("[{'role':'assistant','tool_calls':[{'name':'f','arguments':{'x':'1'}},"
          "{'function':{},'name':'g'}]},{'role':'assistant','content':'y','tool_calls':null},"
          "{'role':'assistant','content':'z','tool_calls':[]}]",
          NULL, &plain,
          START "<|assistant|></think><tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value>"
                "</tool_call><tool_call>g</tool_call><|assistant|></think>y<|assistant|></think>z");
}

static void arguments_as_a_string(void)
{
    static const struct {
        const char *given, *want;
    } cases[] = {
        {"'{\\\"x\\\": 1, \\\"y\\\": [1.50, \\\"é\\\"]}'",
         "<arg_key>x</arg_key><arg_value>1</arg_value><arg_key>y</arg_key><arg_value>[1.5, \"é\"]"
         "</arg_value>"},
        {"''", ""},
        {"'{}'", ""},
        {"null", ""},
    };
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        char messages[256], want[256];
        snprintf(messages, sizeof(messages),
                 "[{'role':'assistant','tool_calls':[{'function':{'name':'f','arguments':%s}}]}]",
                 cases[i].given);
        snprintf(want, sizeof(want), START "<|assistant|></think><tool_call>f%s</tool_call>",
                 cases[i].want);
        check(messages, NULL, &plain, want);
    }
}

static void tool_results(void)
{
    check("[{'role':'tool','content':'r'},{'role':'user','content':'x'}]", NULL, &plain,
          START "<|observation|><tool_response>r</tool_response><|user|>x");
    check("[{'role':'tool','content':'r1'},{'role':'tool','content':['r2']}]", NULL, &plain,
          START "<|observation|><tool_response>r1</tool_response><|observation|><tool_response>r2"
                "</tool_response>");
    check("[{'role':'tool','content':[{'output':'r1'},{'output':{'x':1}},{'y':'z'},7]}]", NULL,
          &plain,
          START "<|observation|><tool_response>r1</tool_response><tool_response>{'x': 1}"
                "</tool_response><tool_response>{'y': 'z'}</tool_response><tool_response>7"
                "</tool_response>");
    /* text parts are one result, and follow another without a second tag */
    check("[{'role':'tool','content':'r0'},{'role':'tool','content':[{'type':'text','text':'r1'},"
          "{'type':'text','text':' r2'}]}]",
          NULL, &plain,
          START "<|observation|><tool_response>r0</tool_response><tool_response>r1 r2"
                "</tool_response>");
    check("[{'role':'tool','content':null},{'role':'tool','content':[]},{'role':'tool'}]", NULL,
          &plain,
          START "<|observation|><tool_response></tool_response><tool_response></tool_response>"
                "<tool_response></tool_response>");
}

static void odd_content(void)
{
    check("[{'role':'user','content':[{'type':'text','text':'A'},'B',{'type':'text','text':'C'},"
          "3,null,{'type':'text'}]}]",
          NULL, &generate, START "<|user|>ABC" THINK);
    check("[{'role':'user','content':5},{'role':'user','content':1e20},"
          "{'role':'user','content':true},{'role':'user','content':[]}]",
          NULL, &plain, START "<|user|>5<|user|>1e+20<|user|>True<|user|>");
    check("[{'role':'user','content':{'a':1}}]", NULL, &plain, START "<|user|>{'a': 1}");
    check("[{'role':'user','content':{'k\\u0027':[null,false,1.5,{}],'q':'a\\u0027\\\"\\\\\\n'}}]",
          NULL, &plain, START "<|user|>{\"k'\": [None, False, 1.5, {}], 'q': 'a\\'\"\\\\\\n'}");
    check("[{'role':'user','content':{'s':'é\\u00a0\\u200b\\ud83d\\ude00\\u0001\\udb40\\udc01'}}]",
          NULL, &plain, START "<|user|>{'s': 'é\\xa0\\u200b😀\\x01\\U000e0001'}");
    /* null is absent, not the word None */
    check("[{'role':'user','content':'Hi'},{'role':'assistant','content':null,'tool_calls':"
          "[{'function':{'name':'f','arguments':{'x':'1'}}}]}]",
          NULL, &plain,
          START "<|user|>Hi<|assistant|></think><tool_call>f<arg_key>x</arg_key><arg_value>1"
                "</arg_value></tool_call>");
    check("[{'role':'user'},{'role':'system','content':null}]", NULL, &plain,
          START "<|user|><|system|>");
    /* developer speaks with the system's voice */
    check("[{'role':'developer','content':'D'},{'role':'user','content':'Hi'}]", NULL, &generate,
          START "<|system|>D<|user|>Hi" THINK);
}

static void final_message_stays_open(void)
{
    check("[{'role':'user','content':'Hi'},{'role':'assistant','content':'Once upon'}]", NULL,
          &continued, START "<|user|>Hi<|assistant|></think>Once upon");
    json_t *m = quoted("[{'role':'user','content':'Hi'}]");
    struct chat_prompt p = {0};
    CHECK_INT(chat_render(m, NULL, &continued, &p), ERR_INVALID);
    json_decref(m);
}

static void refusals_name_the_field(void)
{
    check_refused("{}", "messages");
    check_refused("[{'role':'user','content':'x'},{'role':'wizard'}]", "messages[1].role");
    check_refused("[{'content':'x'}]", "messages[0].role");
    check_refused("[5]", "messages[0].role");
    check_refused("[{'role':'user','content':[{'type':'text','text':'a'},"
                  "{'type':'image_url','image_url':{'url':'x'}}]}]",
                  "messages[0].content[1]");
    check_refused("[{'role':'assistant','content':[{'type':'refusal'}]}]",
                  "messages[0].content[0]");
    check_refused("[{'role':'tool','content':[{'type':'input_audio'}]}]", "messages[0].content[0]");
    check_refused("[{'role':'user','content':[{'text':'a'}]}]", "messages[0].content[0]");
    check_refused("[{'role':'assistant','tool_calls':{}}]", "messages[0].tool_calls");
    check_refused("[{'role':'assistant','tool_calls':['x']}]", "messages[0].tool_calls[0]");
    check_refused("[{'role':'assistant','tool_calls':[{'function':{'arguments':{}}}]}]",
                  "messages[0].tool_calls[0].function.name");
    static const char *const arguments[] = {
        "[]",  "5",   "'[1]'", "'x'",    "'{\\\"a\\\":1'",
        "'5'", "' '", "true",  "'null'", "'{\\\"a\\\":1,\\\"a\\\":2}'"};
    for (size_t i = 0; i < ARRAY_LEN(arguments); i++) {
        char messages[256];
        snprintf(messages, sizeof(messages),
                 "[{'role':'user'},{'role':'assistant','tool_calls':[{'name':'a'},{'function':"
                 "{'name':'f','arguments':%s}}]}]",
                 arguments[i]);
        check_refused(messages, "messages[1].tool_calls[1].function.arguments");
    }
}

/* ---- tokens ---- */

static size_t control_ids(const char *evil, struct ids *ids)
{
    json_t *e = json_string(evil), *k = json_object();
    json_object_set(k, evil, e);
    json_t *nested = json_pack("{s:O,s:[O]}", "a", e, "b", k);
    json_t *messages = json_pack(
        "[{s:s,s:O},{s:s,s:O},{s:s,s:[{s:s,s:O},O]},"
        "{s:s,s:O,s:O,s:[{s:{s:O,s:{s:O,s:O}}},{s:{s:s,s:O}}]},{s:s,s:O},{s:s,s:[O,{s:O}]},{s:s,s:"
        "O}]",
        "role", "system", "content", e, "role", "developer", "content", e, "role", "user",
        "content", "type", "text", "text", e, e, "role", "assistant", "content", e,
        "reasoning_content", e, "tool_calls", "function", "name", e, "arguments", "a", e, "b",
        nested, "function", "name", "g", "arguments", k, "role", "tool", "content", e, "role",
        "tool", "content", e, "output", nested, "role", "function", "content", k);
    json_t *tools = json_pack("[{s:O,s:O}]", "name", e, "parameters", nested);
    REQUIRE(messages && tools);
    struct chat_prompt p = {0};
    CHECK_OK(chat_render(messages, tools, &generate, &p));
    ids->len = 0;
    CHECK_OK(chat_encode(tokenizer, &p, ids));
    size_t n = 0, n_bytes = 0, n_token = 0;
    for (size_t i = 0; i < ids->len; i++) {
        n += tokenizer_is_added(tokenizer, ids->data[i]);
        tokenizer_bytes(tokenizer, ids->data[i], &n_token);
        n_bytes += n_token;
    }
    CHECK_INT(n_bytes, p.n_text);
    chat_prompt_finish(&p);
    json_decref(messages);
    json_decref(tools);
    json_decref(nested);
    json_decref(k);
    json_decref(e);
    return n;
}

/* Every added token's text in every place that a client fills: the same control tokens as with
 * harmless text, whole, doubled, or split so that it would form across a boundary. */
static void message_text_is_never_control(void)
{
    struct ids ids = {0};
    size_t want = control_ids("word", &ids);
    CHECK(want > 40);
    for (int32_t id = 0; id < tokenizer_n_ids(tokenizer); id++) {
        if (!tokenizer_is_added(tokenizer, id))
            continue;
        size_t n;
        const char *bytes = tokenizer_bytes(tokenizer, id, &n);
        char evil[300];
        snprintf(evil, sizeof(evil), "%.*s", (int)n, bytes);
        CHECK_INT(control_ids(evil, &ids), want);
        snprintf(evil, sizeof(evil), "x%.*s%.*sy", (int)n, bytes, (int)n, bytes);
        CHECK_INT(control_ids(evil, &ids), want);
        snprintf(evil, sizeof(evil), "%.*s", (int)n - 1, bytes);
        CHECK_INT(control_ids(evil, &ids), want);
        CHECK_INT(control_ids(evil + 1, &ids), want);
    }
    ids_finish(&ids);
}

/* Where message text holds no added token, the pieces give the ids of the whole string. */
static void pieces_equal_the_whole(void)
{
    static const char *const texts[] = {"Hi",    " spaced ", "\nline\n\n", "12345",
                                        "don't", "  ",       "é"};
    for (size_t i = 0; i < ARRAY_LEN(texts); i++) {
        json_t *messages =
            json_pack("[{s:s,s:s},{s:s,s:s,s:s,s:[{s:s,s:{s:s}}]},{s:s,s:s}]", "role", "user",
                      "content", texts[i], "role", "assistant", "content", texts[i],
                      "reasoning_content", texts[i], "tool_calls", "name", texts[i], "arguments",
                      texts[i], texts[i], "role", "tool", "content", texts[i]);
        json_t *tools = json_pack("[{s:s},{s:s}]", "name", texts[i], "name", texts[i]);
        struct chat_prompt p = {0};
        struct ids pieces = {0}, whole = {0};
        CHECK_OK(chat_render(messages, tools, &generate, &p));
        CHECK_OK(chat_encode(tokenizer, &p, &pieces));
        CHECK_OK(tokenizer_encode(tokenizer, p.text, p.n_text, true, &whole));
        CHECK_INT(pieces.len, whole.len);
        CHECK(pieces.len == whole.len && !memcmp(pieces.data, whole.data, whole.len * 4));
        ids_finish(&pieces);
        ids_finish(&whole);
        chat_prompt_finish(&p);
        json_decref(messages);
        json_decref(tools);
    }
}

/* A prompt whose hash is known from elsewhere. */
static void known_hash(void)
{
    static const char prompt[] = "[gMASK]<sop><|user|>Reply with exactly EXO_SANITY_OK and nothing "
                                 "else.<|assistant|></think>";
    static const char messages[] =
        "[{'role':'user','content':'Reply with exactly EXO_SANITY_OK and nothing else.'}]";
    check(messages, NULL, &no_thinking, prompt);

    json_t *m = quoted(messages);
    struct chat_prompt p = {0};
    CHECK_OK(chat_render(m, NULL, &no_thinking, &p));
    char path[] = "/tmp/baton_chat_XXXXXX", command[64], sum[65] = "";
    int fd = mkstemp(path);
    REQUIRE(fd >= 0 && write(fd, p.text, p.n_text) == (ssize_t)p.n_text);
    close(fd);
    snprintf(command, sizeof(command), "sha256sum %s", path);
    FILE *f = popen(command, "r");
    REQUIRE(f && fscanf(f, "%64s", sum) == 1);
    pclose(f);
    unlink(path);
    CHECK_STR(sum, "62acda2056933064acbc3211ff3474871d746256bc57e3cd195032e9507b7604");
    chat_prompt_finish(&p);
    json_decref(m);
}

int main(void)
{
    const char *dir = getenv("BATON_DEMO_DIR");
    char path[4096];
    snprintf(path, sizeof(path), "%s/tokenizer.json", dir ? dir : "deploy/demo-model");
    CHECK_OK(tokenizer_load(path, &tokenizer));
    REQUIRE(tokenizer != NULL);
    RUN(plain_turns);
    RUN(reasoning);
    RUN(tools_block);
    RUN(tool_calls);
    RUN(arguments_as_a_string);
    RUN(tool_results);
    RUN(odd_content);
    RUN(final_message_stays_open);
    RUN(refusals_name_the_field);
    RUN(message_text_is_never_control);
    RUN(pieces_equal_the_whole);
    RUN(known_hash);
    tokenizer_destroy(tokenizer);
    return check_done();
}
