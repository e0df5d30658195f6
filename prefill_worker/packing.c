/* packing.c: see packing.h for the rule. */
#include "prefill_worker/packing.h"

uint32_t packing_choose(const uint32_t *left, uint32_t n, uint32_t chunk_tokens,
                        uint32_t max_prompts, uint32_t *ret)
{
    uint32_t room = chunk_tokens, n_taken = 0;
    for (uint32_t i = 0; i < n; i++)
        ret[i] = 0;
    if (n == 0 || max_prompts == 0)
        return 0;

    // The oldest fits whole: plain order serves everybody best.
    // Otherwise prompts that half of the chunk can finish go first; one place stays for the oldest.
    if (left[0] > room) {
        uint32_t half = chunk_tokens / 2;
        for (uint32_t i = 1; i < n && n_taken + 1 < max_prompts; i++) {
            if (left[i] > half)
                continue;
            ret[i] = left[i];
            half -= left[i];
            room -= left[i];
            n_taken++;
        }
    }
    for (uint32_t i = 0; i < n && room > 0 && n_taken < max_prompts; i++) {
        if (ret[i])
            continue;
        ret[i] = left[i] < room ? left[i] : room;
        room -= ret[i];
        n_taken++;
    }
    return chunk_tokens - room;
}
