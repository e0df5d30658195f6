/* byte_level.c: see byte_level.h. */
#include "common/base/byte_level.h"

#include <stdint.h>

#include "common/base/own.h"

#define ALPHABET 0x144 /* the alphabet's code points lie below */

/* The printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards in
 * order. */
bool byte_level_decode(const char *text, size_t n, char *ret, size_t *ret_n)
{
    static const struct {
        uint16_t first, last, byte;
    } ranges[] = {
        {0x21, 0x7e, 0x21},   {0xa1, 0xac, 0xa1},   {0xae, 0xff, 0xae},
        {0x100, 0x120, 0x00}, {0x121, 0x142, 0x7f}, {0x143, 0x143, 0xad},
    };
    size_t n_out = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t c = (uint8_t)text[i];
        if (c >= 0xc2 && c < 0xe0 && i + 1 < n)
            c = (c & 0x1f) << 6 | ((uint8_t)text[++i] & 0x3f);
        else if (c >= 0x80)
            c = ALPHABET; /* longer sequences all lie above it */
        size_t r = 0;
        while (r < ARRAY_LEN(ranges) && !(c >= ranges[r].first && c <= ranges[r].last))
            r++;
        if (r == ARRAY_LEN(ranges))
            return false;
        ret[n_out++] = (char)(ranges[r].byte + (c - ranges[r].first));
    }
    *ret_n = n_out;
    return true;
}
