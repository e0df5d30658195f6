/* goldens.h: the demo model's goldens (tests/golden), for the tests of the engines. */
#ifndef BATON_GOLDENS_H
#define BATON_GOLDENS_H

#include "check.h"
#include "common/base/json.h"

#define N_DRAFTS 4

struct golden_case {
    const char *name;
    int32_t *seq; // prompt, then greedy continuation
    int n_prompt, n_greedy;
    int n_ties; // routing ties with logits of their own: see tests/oracle/goldens.py
    double margin, mean_accepted[N_DRAFTS];
    const json_t *drafts;
};

static struct golden_case cases[16];
static int n_cases;
static char *tensors; // golden.safetensors
static json_t *tensor_header, *golden;

static void goldens_open(void)
{
    char path[4096];
    const char *dir = getenv("BATON_GOLDEN_DIR");
    REQUIRE(dir);
    snprintf(path, sizeof(path), "%s/golden.json", dir);
    CHECK_OK(json_parse_file(path, &json_limits_file, &golden));
    size_t n;
    snprintf(path, sizeof(path), "%s/golden.safetensors", dir);
    CHECK_OK(file_read(path, 1 << 30, &tensors, &n));
    REQUIRE(golden && tensors && n > 8);
    uint64_t header_bytes;
    memcpy(&header_bytes, tensors, 8);
    CHECK_OK(json_parse(tensors + 8, header_bytes, &json_limits_file, &tensor_header));

    const char *name;
    json_t *v;
    json_object_foreach (json_object_get(golden, "cases"), name, v) {
        struct golden_case *c = &cases[n_cases++];
        const json_t *prompt = json_object_get(v, "prompt_ids");
        const json_t *greedy = json_object_get(v, "greedy_ids");
        c->name = name;
        c->n_prompt = (int)json_array_size(prompt);
        c->n_greedy = (int)json_array_size(greedy);
        c->seq = calloc((size_t)(c->n_prompt + c->n_greedy), sizeof(*c->seq));
        REQUIRE(c->seq);
        for (int i = 0; i < c->n_prompt; i++)
            c->seq[i] = (int32_t)json_integer_value(json_array_get(prompt, (size_t)i));
        for (int i = 0; i < c->n_greedy; i++)
            c->seq[c->n_prompt + i] =
                (int32_t)json_integer_value(json_array_get(greedy, (size_t)i));
        c->margin = json_number_value(json_object_get(v, "min_margin"));
        c->n_ties = (int)json_array_size(json_object_get(v, "routing_ties"));
        c->drafts = json_object_get(v, "drafts");
        for (int k = 0; k < N_DRAFTS; k++)
            c->mean_accepted[k] = json_number_value(json_object_get(
                json_object_get(v, "mean_accepted"), (const char[]){(char)('1' + k), 0}));
    }
    CHECK_INT(n_cases, 13);
    if (!getenv("BATON_TEST_QUICK")) // set for builds that are many times slower
        return;
    int n_kept = 0, n_long = 0; // one of several pages stays
    for (int i = 0; i < n_cases; i++)
        if (cases[i].n_prompt <= 64 || (cases[i].n_prompt < 300 && n_long++ == 0))
            cases[n_kept++] = cases[i];
        else
            free(cases[i].seq);
    n_cases = n_kept;
}

static const float *golden_tensor(const char *case_name, const char *what)
{
    char key[80];
    snprintf(key, sizeof(key), "%s.%s", case_name, what);
    uint64_t header_bytes;
    memcpy(&header_bytes, tensors, 8);
    const json_t *o = json_object_get(json_object_get(tensor_header, key), "data_offsets");
    REQUIRE(o);
    return (const float *)(tensors + 8 + header_bytes + json_integer_value(json_array_get(o, 0)));
}

static double largest_difference(const float *a, const float *b, int n)
{
    double most = 0;
    for (int i = 0; i < n; i++)
        most = fmax(most, isfinite(a[i]) ? fabs((double)a[i] - (double)b[i]) : INFINITY);
    return most;
}

#endif
