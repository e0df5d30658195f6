/* Data readers, distributions, arrivals and flags: what is asked, and when. */
#include "tests/bench/dataset.h"

#include <inttypes.h>
#include <unistd.h>

#include "tests/bench/arrivals.h"
#include "tests/bench/lengths.h"
#include "tests/check.h"

static char path[] = "/tmp/bench-data-XXXXXX";

static void write_file(const char *text)
{
    FILE *f = fopen(path, "w");
    REQUIRE(f != NULL);
    fputs(text, f);
    fclose(f);
}

/* options_parse with "--data path" and the flags given, NULL at the end. */
static struct options options(const char *const *flags)
{
    char *argv[32] = {"--data", path};
    int n = 2;
    struct options o;
    for (; *flags; flags++)
        argv[n++] = (char *)*flags;
    REQUIRE(options_parse(n, argv, &o) == ERR_OK);
    return o;
}
#define OPTIONS(...) options((const char *const[]){__VA_ARGS__, NULL})

static void reads_a_file(void)
{
    write_file("{\"about\":{\"name\":\"x\"}}\n\n"
               "{\"prompt\":\"hello\",\"token_ids\":[1,300],\"output_tokens\":5}\n"
               "{\"prompt\":[7,8,9],\"output_tokens\":6,\"arrival_s\":0.5}\n");
    OWNED(dataset) d = NULL;
    struct options o = OPTIONS("--num-prompts", "1");
    CHECK_OK(dataset_create(&o, &d));
    CHECK_STR(d->prompts[0].text, "hello");
    CHECK(d->prompts[0].ids == NULL && d->about != NULL);
    CHECK_INT(d->n_lines, 2);

    OWNED(dataset) ids = NULL;
    o = OPTIONS("--num-prompts", "2", "--prompts", "ids", "--vocab-size", "256", "--output-len",
                "9");
    CHECK_OK(dataset_create(&o, &ids));
    CHECK_INT(ids->prompts[0].ids[1], 44);
    CHECK_INT(ids->prompts[0].output_tokens, 9);
    CHECK_INT(ids->prompts[1].n_ids, 3);
    CHECK(ids->prompts[0].text == NULL);
    CHECK(dataset_hash(d) != dataset_hash(ids));
}

static void repeats_only_when_told(void)
{
    write_file("{\"prompt\":\"a\",\"output_tokens\":5,\"arrival_s\":1}\n"
               "{\"prompt\":\"b\",\"output_tokens\":500,\"prompt_tokens\":9,\"arrival_s\":2}\n");
    OWNED(dataset) d = NULL;
    struct options o = OPTIONS("--num-prompts", "3");
    CHECK(dataset_create(&o, &d) == ERR_INVALID);
    CHECK(strstr(err_text(ERR_INVALID), "2 usable") != NULL);
    o = OPTIONS("--num-prompts", "3", "--repeat", "on", "--arrivals", "recorded");
    CHECK_OK(dataset_create(&o, &d));
    CHECK_STR(d->prompts[2].text, "a");
    CHECK_INT(d->n_repeated, 1);
    uint64_t due[3];
    arrivals_fill(&o, d, due);
    CHECK_INT(due[1], 2000000);
    CHECK_INT(due[2], 3000000);
    OWNED(dataset) few = NULL;
    o = OPTIONS("--num-prompts", "1", "--max-total-tokens", "100", "--shuffle", "on");
    CHECK_OK(dataset_create(&o, &few));
    CHECK_STR(few->prompts[0].text, "a");
}

static void bad_lines_are_named(void)
{
    static const struct {
        const char *line, *names;
    } bad[] = {
        {"nonsense", "line 2"},
        {"[]", "object"},
        {"{\"output_tokens\":3}", "prompt"},
        {"{\"prompt\":\"a\",\"messages\":[1]}", "prompt and messages"},
        {"{\"prompt\":3,\"output_tokens\":3}", "string"},
        {"{\"prompt\":[],\"output_tokens\":3}", "empty"},
        {"{\"prompt\":[1,-1],\"output_tokens\":3}", "prompt[1]"},
        {"{\"prompt\":\"a\",\"token_ids\":7,\"output_tokens\":3}", "token_ids"},
        {"{\"prompt\":\"a\",\"output_tokens\":0}", "output_tokens"},
        {"{\"prompt\":\"a\",\"output_tokens\":\"3\"}", "output_tokens"},
        {"{\"prompt\":\"a\",\"arrival_s\":1}", "output-len"},
        {"{\"prompt\":\"a\",\"output_tokens\":3,\"arrival_s\":0.5}", "arrival_s"},
    };
    for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
        char text[256];
        snprintf(text, sizeof(text), "{\"prompt\":\"a\",\"output_tokens\":3,\"arrival_s\":1}\n%s\n",
                 bad[i].line);
        write_file(text);
        OWNED(dataset) d = NULL;
        struct options o = OPTIONS("--num-prompts", "2");
        CHECK(dataset_create(&o, &d) == ERR_INVALID);
        if (!strstr(err_text(ERR_INVALID), bad[i].names))
            CHECK_STR(err_text(ERR_INVALID), bad[i].names);
    }
    OWNED(dataset) d = NULL;
    struct options o = OPTIONS("--data", "/nonexistent");
    CHECK(dataset_create(&o, &d) == ERR_NOT_FOUND);
}

static void lengths_have_their_means(void)
{
    static const struct {
        const char *text;
        double mean, sd, tolerance;
    } cases[] = {
        {"100", 100, 0, 0},
        {"uniform:1:9", 5, 2.582, 0.05},
        {"normal:100:10:1:1000", 100, 10, 0.3},
        {"lognormal:100:0.5:1:100000", 100, 53.3, 1},
        {"normal:100:10:100:100", 100, 0, 0},
    };
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        struct lengths l;
        struct rng r = rng_init(1, 0);
        double sum = 0, squares = 0;
        const int n = 20000;
        CHECK_OK(lengths_parse("input-len", cases[i].text, &l));
        for (int k = 0; k < n; k++) {
            double v = lengths_draw(&l, &r);
            sum += v;
            squares += v * v;
        }
        CHECK_NEAR(sum / n, cases[i].mean, cases[i].tolerance);
        CHECK_NEAR(sqrt(fmax(squares / n - sum / n * sum / n, 0)), cases[i].sd,
                   3 * cases[i].tolerance + 1e-6);
    }
    static const char *const bad[] = {"",
                                      "0",
                                      "x",
                                      "uniform:5",
                                      "uniform:9:3",
                                      "5:6",
                                      "normal:5:1",
                                      "lognormal:0:1:1:2",
                                      "uniform:1:2:3",
                                      "normal:5:1:0:9",
                                      "nan",
                                      "-3"};
    for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
        struct lengths l;
        CHECK(lengths_parse("input-len", bad[i], &l) == ERR_INVALID);
    }
}

static void seeds_decide(void)
{
    struct options o = OPTIONS("--data", "synthetic", "--num-prompts", "50", "--seed", "3");
    OWNED(dataset) a = NULL;
    OWNED(dataset) b = NULL;
    OWNED(dataset) c = NULL;
    CHECK_OK(dataset_create(&o, &a));
    CHECK_OK(dataset_create(&o, &b));
    CHECK(dataset_hash(a) == dataset_hash(b));
    o.seed = 4;
    CHECK_OK(dataset_create(&o, &c));
    CHECK(dataset_hash(a) != dataset_hash(c));
}

static void arrivals_keep_their_rate(void)
{
    struct options o = OPTIONS("--data", "synthetic", "--num-prompts", "2000", "--request-rate",
                               "10", "--input-len", "1", "--output-len", "1");
    OWNED(dataset) d = NULL;
    CHECK_OK(dataset_create(&o, &d));
    static uint64_t due[2000];
    arrivals_fill(&o, d, due);
    CHECK_NEAR((double)due[1999], 200e6, 2);
    double squares = 0;
    for (int i = 1; i < 2000; i++) {
        CHECK(due[i] >= due[i - 1]);
        double gap = (double)(due[i] - due[i - 1]) / 1e6;
        squares += (gap - 0.1) * (gap - 0.1);
    }
    CHECK_NEAR(sqrt(squares / 1999), 0.1, 0.01); /* exponential: sd = mean */
    o.arrival_kind = ARRIVE_CONSTANT;
    arrivals_fill(&o, d, due);
    CHECK_INT(due[0], 0);
    CHECK_INT(due[25], 2500000);
}

static void flags_win_over_the_workload(void)
{
    struct options o =
        OPTIONS("--data=synthetic", "--max-concurrency", "8", "--workload", "high-conc");
    CHECK_INT(o.max_concurrency, 8);
    CHECK_INT(o.num_prompts, 2000);
    CHECK_INT(o.arrival_kind, ARRIVE_AT_ONCE);
    o = OPTIONS("--data=synthetic", "--workload", "steady", "--goodput", "ttft:500,e2el:9000.5");
    CHECK_INT(o.arrival_kind, ARRIVE_POISSON);
    CHECK_NEAR(o.request_rate, 5, 0);
    CHECK_NEAR(o.slo.e2el_ms, 9000.5, 0);
    static const char *const bad[][2] = {
        {"--num-prompts", "0"},     {"--num-prompts", "1.5"}, {"--workload", "heavy"},
        {"--goodput", "itl:5"},     {"--goodput", "ttft:x"},  {"--goodput", "ttft:5;"},
        {"--endpoint", "embed"},    {"--nonsense", "1"},      {"word", "1"},
        {"--arrivals", "recorded"}, {"--prompts", "fit"},     {"--request-rate", "nan"},
    };
    for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
        char *argv[] = {(char *)bad[i][0], (char *)bad[i][1]};
        CHECK(options_parse(2, argv, &o) == ERR_INVALID);
        const char *name = bad[i][0] + strspn(bad[i][0], "-");
        CHECK(strstr(err_text(ERR_INVALID), name) || strstr(err_text(ERR_INVALID), "num_prompts") ||
              strstr(err_text(ERR_INVALID), "request_rate"));
    }
}

int main(void)
{
    int fd = mkstemp(path);
    REQUIRE(fd >= 0);
    close(fd);
    RUN(reads_a_file);
    RUN(repeats_only_when_told);
    RUN(bad_lines_are_named);
    RUN(lengths_have_their_means);
    RUN(seeds_decide);
    RUN(arrivals_keep_their_rate);
    RUN(flags_win_over_the_workload);
    unlink(path);
    return check_done();
}
