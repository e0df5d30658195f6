/* isa.h: the references are compiled once per instruction set, from the same sources.
 *
 * Each build gives its functions a suffix (gemm_ref_v4); isa.c holds the plain names and forwards
 * them to the best build that the processor can run. Sources that are compiled several times see
 * only their own suffix: vec.h renames before kernels.h declares.
 */
#ifndef BATON_ISA_H
#define BATON_ISA_H

#include <stdbool.h>

#define ISA_TABLE(X)                                                                               \
    X(void, embed_ref, (const struct embed_args *a), (a))                                          \
    X(void, rmsnorm_ref, (const struct rmsnorm_args *a, struct par *par), (a, par))                \
    X(void, gemm_ref, (const struct gemm_args *a, struct par *par), (a, par))                      \
    X(void, rope_ref, (const struct rope_args *a), (a))                                            \
    X(void, mla_ref, (const struct mla_args *a, struct par *par), (a, par))                        \
    X(void, mla_expanded_ref, (const struct mla_args *a, struct par *par), (a, par))               \
    X(int64_t, mla_work_floats, (int64_t max_ctx), (max_ctx))                                      \
    X(void, route_ref, (const struct route_args *a), (a))                                          \
    X(void, swiglu_ref, (const struct swiglu_args *a), (a))                                        \
    X(void, moe_ref, (const struct moe_args *a, struct par *par), (a, par))                        \
    X(int64_t, moe_work_floats, (int T, int H, int F, int E, int k), (T, H, F, E, k))              \
    X(void, argmax_ref, (const struct argmax_args *a), (a))

/* For tests: use one build from now on ("base", "v3", "v4"). False if it is not compiled in or the
 * processor cannot run it. */
bool isa_use(const char *name);

#endif
