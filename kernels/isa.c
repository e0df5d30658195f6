/* isa.c: see isa.h. BATON_HAVE_V3 and BATON_HAVE_V4 come from the build where it compiled those. */
#include "kernels/isa.h"

#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#include "kernels/kernels.h"

struct build {
    const char *name;
    bool (*runs)(void);
#define X(type, name, params, args) type(*name) params;
    ISA_TABLE(X)
#undef X
};

#define X(type, name, params, args) type name##_base params;
ISA_TABLE(X)
#undef X
#ifdef BATON_HAVE_V3
#define X(type, name, params, args) type name##_v3 params;
ISA_TABLE(X)
#undef X
static bool runs_v3(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
#endif
#ifdef BATON_HAVE_V4
#define X(type, name, params, args) type name##_v4 params;
ISA_TABLE(X)
#undef X
static bool runs_v4(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2");
}
#endif
static bool runs_base(void) { return true; }

static const struct build builds[] = {
// best first
#ifdef BATON_HAVE_V4
    {"v4", runs_v4,
#define X(type, name, params, args) name##_v4,
     ISA_TABLE(X)
#undef X
    },
#endif
#ifdef BATON_HAVE_V3
    {"v3", runs_v3,
#define X(type, name, params, args) name##_v3,
     ISA_TABLE(X)
#undef X
    },
#endif
    {"base", runs_base,
#define X(type, name, params, args) name##_base,
     ISA_TABLE(X)
#undef X
    },
};

static _Atomic(const struct build *) chosen;

static const struct build *build_get(void)
{
    const struct build *b = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (b)
        return b;
    b = builds;
    while (!b->runs())
        b++;
    atomic_store_explicit(&chosen, b, memory_order_relaxed);
    return b;
}

bool isa_use(const char *name)
{
    for (size_t i = 0; i < sizeof(builds) / sizeof(builds[0]); i++)
        if (strcmp(builds[i].name, name) == 0 && builds[i].runs()) {
            atomic_store(&chosen, &builds[i]);
            return true;
        }
    return false;
}

#define X(type, name, params, args)                                                                \
    type name params { return build_get()->name args; }
ISA_TABLE(X)
#undef X
