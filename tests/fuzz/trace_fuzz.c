/* trace_fuzz.c: any bytes as a capture: refused, or a trace that is JSON. */
#include <stdio.h>

#include "common/base/json.h"
#include "deploy/trace.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const struct json_limits limits = {
        .max_bytes = 1u << 28, .max_depth = 8, .max_containers = 1u << 24, .max_values = 1u << 24};
    FILE *in = fmemopen((void *)(n ? data : (const uint8_t *)" "), n ? n : 1, "r");
    char *text = NULL;
    size_t n_text = 0;
    FILE *out = open_memstream(&text, &n_text);
    if (!in || !out)
        abort();
    struct trace_summary s;
    enum err e = trace_convert(in, "fuzz", out, &s);
    fclose(in);
    fclose(out);
    json_t *root = NULL;
    if (e == ERR_OK ? json_parse(text, n_text, &limits, &root) != ERR_OK : n_text != 0) {
        fprintf(stderr, "%s\n%.*s\n", err_text(ERR_INVALID), (int)n_text, text);
        abort();
    }
    json_decref(root);
    free(text);
    return 0;
}
