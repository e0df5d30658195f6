/* gpus.c: see gpus.h. The part of NVML's interface that we use is declared here; it is versioned by
 * symbol names and has been stable since driver 450. */
#include "deploy/gpus.h"

#include <ctype.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "common/base/own.h"

#define LIBRARY "libnvidia-ml.so.1"

typedef void *nvml_device;

struct nvml_memory {
    unsigned long long total, free, used;
};

struct nvml_pci {
    char bus_id_legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
};

enum { NVML_COMPUTE_EXCLUSIVE_THREAD = 1, NVML_COMPUTE_PROHIBITED, NVML_COMPUTE_EXCLUSIVE_PROCESS };
enum { NVML_P2P_READ = 0, NVML_P2P_NVLINK = 2 }; // what to ask about; the answer 0 is yes

#define NVML_TABLE(X)                                                                              \
    X(init, "nvmlInit_v2", (void))                                                                 \
    X(shutdown, "nvmlShutdown", (void))                                                            \
    X(driver, "nvmlSystemGetDriverVersion", (char *, unsigned))                                    \
    X(cuda, "nvmlSystemGetCudaDriverVersion_v2", (int *))                                          \
    X(count, "nvmlDeviceGetCount_v2", (unsigned *))                                                \
    X(device, "nvmlDeviceGetHandleByIndex_v2", (unsigned, nvml_device *))                          \
    X(name, "nvmlDeviceGetName", (nvml_device, char *, unsigned))                                  \
    X(uuid, "nvmlDeviceGetUUID", (nvml_device, char *, unsigned))                                  \
    X(pci, "nvmlDeviceGetPciInfo_v3", (nvml_device, struct nvml_pci *))                            \
    X(memory, "nvmlDeviceGetMemoryInfo", (nvml_device, struct nvml_memory *))                      \
    X(capability, "nvmlDeviceGetCudaComputeCapability", (nvml_device, int *, int *))               \
    X(mode, "nvmlDeviceGetComputeMode", (nvml_device, int *))                                      \
    X(mig, "nvmlDeviceGetMigMode", (nvml_device, unsigned *, unsigned *))                          \
    X(p2p, "nvmlDeviceGetP2PStatus", (nvml_device, nvml_device, int, int *))

struct nvml {
    void *library;
    const char *(*error_text)(int);
#define X(field, symbol, arguments) int(*field) arguments;
    NVML_TABLE(X)
#undef X
};

static void nvml_drop(struct nvml *n)
{
    if (n->library)
        dlclose(n->library);
}

static enum err nvml_open(struct nvml *ret)
{
    ret->library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (!ret->library)
        return err_set(ERR_NOT_FOUND, "no NVIDIA driver: %s", dlerror());
    *(void **)&ret->error_text = dlsym(ret->library, "nvmlErrorString");
    if (!ret->error_text)
        return err_set(ERR_IO, LIBRARY " has no nvmlErrorString: not NVIDIA's library?");
#define X(field, symbol, arguments)                                                                \
    *(void **)&ret->field = dlsym(ret->library, symbol);                                           \
    if (!ret->field)                                                                               \
        return err_set(ERR_IO, LIBRARY " has no " symbol ": the driver is older than 450");
    NVML_TABLE(X)
#undef X
    return ERR_OK;
}

#define ASK(call)                                                                                  \
    do {                                                                                           \
        int rc_ = nvml->call;                                                                      \
        if (rc_)                                                                                   \
            return err_set(ERR_IO, "the NVIDIA driver does not work: %s", nvml->error_text(rc_));  \
    } while (0)

/* "00000000:1B:00.0" as /sys spells it. */
static void sysfs_name(const struct nvml_pci *pci, char *ret, size_t n)
{
    const char *rest = strchr(pci->bus_id, ':');
    snprintf(ret, n, "%04x%s", pci->domain, rest ? rest : "");
    for (; *ret; ret++)
        *ret = (char)tolower((unsigned char)*ret);
}

static enum err read_gpu(const struct nvml *nvml, nvml_device d, struct gpu *ret)
{
    struct nvml_pci pci = {0};
    struct nvml_memory memory = {0};
    int mode = 0;
    unsigned mig = 0, mig_pending = 0;
    ASK(name(d, ret->name, sizeof ret->name));
    ASK(uuid(d, ret->uuid, sizeof ret->uuid));
    ASK(pci(d, &pci));
    ASK(memory(d, &memory));
    ASK(capability(d, &ret->cc_major, &ret->cc_minor));
    ASK(mode(d, &mode));
    if (nvml->mig(d, &mig, &mig_pending)) // not every GPU knows the question
        mig = 0;
    sysfs_name(&pci, ret->bus_id, sizeof ret->bus_id);
    ret->total_bytes = memory.total;
    ret->free_bytes = memory.free;
    ret->is_exclusive =
        mode == NVML_COMPUTE_EXCLUSIVE_THREAD || mode == NVML_COMPUTE_EXCLUSIVE_PROCESS;
    ret->is_prohibited = mode == NVML_COMPUTE_PROHIBITED;
    ret->is_mig = mig != 0;
    return ERR_OK;
}

static enum gpu_path read_path(const struct nvml *nvml, nvml_device a, nvml_device b)
{
    int status;
    if (!nvml->p2p(a, b, NVML_P2P_NVLINK, &status) && status == 0)
        return GPU_PATH_NVLINK;
    if (!nvml->p2p(a, b, NVML_P2P_READ, &status) && status == 0)
        return GPU_PATH_PCIE;
    return GPU_PATH_NONE;
}

/* The GPU that one entry of CUDA_VISIBLE_DEVICES names; n if none. */
static size_t find_gpu(const struct gpus *all, const char *entry)
{
    char *end;
    size_t chars = strlen(entry);
    unsigned long idx = strtoul(entry, &end, 10);
    if (isdigit((unsigned char)*entry) && !*end)
        return MIN(idx, all->n);
    for (size_t i = 0; i < all->n; i++)
        if (chars > 4 && !strncasecmp(all->gpu[i].uuid, entry, chars))
            return i;
    return all->n;
}

/* Keeps what visible names, in its order. */
static void choose(struct gpus *g, const char *visible)
{
    struct gpus all = *g;
    size_t from[GPUS_MAX];
    char text[2048];
    snprintf(text, sizeof text, "%s", visible);
    g->n = 0;
    char *rest = text, *entry;
    while (g->n < GPUS_MAX && (entry = strsep(&rest, ","))) {
        entry += strspn(entry, " ");
        entry[strcspn(entry, " ")] = '\0';
        size_t i = find_gpu(&all, entry);
        if (i == all.n)
            break;
        g->gpu[g->n] = all.gpu[i];
        from[g->n++] = i;
    }
    for (size_t i = 0; i < g->n; i++)
        for (size_t k = 0; k < g->n; k++)
            g->path[i][k] = all.path[from[i]][from[k]];
}

static enum err read_all(const struct nvml *nvml, struct gpus *ret)
{
    nvml_device device[GPUS_MAX];
    unsigned n = 0;
    ASK(driver(ret->driver, sizeof ret->driver));
    ASK(cuda(&ret->cuda_version));
    ASK(count(&n));
    ret->n = MIN(n, GPUS_MAX);
    for (unsigned i = 0; i < ret->n; i++) {
        ASK(device(i, &device[i]));
        TRY(read_gpu(nvml, device[i], &ret->gpu[i]));
    }
    for (size_t i = 0; i < ret->n; i++)
        for (size_t k = 0; k < ret->n; k++)
            ret->path[i][k] = i == k ? GPU_PATH_NVLINK : read_path(nvml, device[i], device[k]);
    return ERR_OK;
}

enum err gpus_read(const char *visible, struct gpus *ret)
{
    __attribute__((cleanup(nvml_drop))) struct nvml library = {0};
    const struct nvml *nvml = &library;
    TRY(nvml_open(&library));
    ASK(init());
    memset(ret, 0, sizeof *ret);
    enum err e = read_all(nvml, ret);
    nvml->shutdown();
    if (!e && visible)
        choose(ret, visible);
    return e;
}
