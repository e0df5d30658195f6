/* kv_write_ref.c: one token's latent and roped key into its slot of the pool. */
#include "kernels/kernels.h"

#include <string.h>

void kv_write_ref(const struct kv_write_args *a)
{
    for (int t = 0; t < a->T; t++) {
        int64_t slot =
            ((int64_t)a->slot_page[t] * a->n_layers + a->layer) * KV_PAGE_TOKENS + a->slot_row[t];
        float *to = a->pool + slot * KV_WIDTH;
        memcpy(to, a->latent + (int64_t)t * MLA_LATENT, MLA_LATENT * sizeof(float));
        memcpy(to + MLA_LATENT, a->rope + (int64_t)t * a->rope_stride, MLA_ROPE * sizeof(float));
    }
}
