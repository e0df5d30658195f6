/* curve_fuzz.c: the texts of key files and allow lists. */
#include <stdlib.h>
#include <string.h>

#include "common/base/curve.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct curve_pair pair;
    struct curve_list *list = NULL;
    if (curve_parse_pair((const char *)data, n, &pair) == ERR_OK &&
        strlen(pair.public_key) + strlen(pair.secret_key) != 2 * CURVE_KEY_CHARS)
        abort();
    if (curve_parse_list((const char *)data, n, &list) == ERR_OK && !list)
        abort();
    curve_list_destroy(list);
    return 0;
}
