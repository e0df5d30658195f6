/* accept.c: see accept.h. */
#include "decode_worker/accept.h"

uint32_t accept_window(const struct wire_sampling *s, const struct model_config *m,
                       uint32_t n_output, const int32_t *sampled, const int32_t *draft,
                       uint32_t n_draft, enum wire_finish *ret_finish)
{
    uint32_t n = 0;
    for (;;) {
        int32_t token = sampled[n++];
        *ret_finish = worker_finish(s, m, token, n_output + n);
        if (*ret_finish != WIRE_RUNNING || n > n_draft || token != draft[n - 1])
            return n;
    }
}
