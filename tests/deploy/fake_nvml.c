/* fake_nvml.c: a libnvidia-ml.so.1 whose GPUs come from the environment. Types are those that
 * gpus.c declares, to the letter: UBSan compares them at every call.
 *
 *   FAKE_GPUS   "CC,TOTAL_GIB,FREE_GIB,MODE,MIG;..."   one per GPU; bus ids are 0001:10:00.0, :11:
 * .. FAKE_LINKS  nvlink (default), pcie or none         between all of them FAKE_CUDA   12080
 * newest CUDA of the driver FAKE_ERROR  9                                      what nvmlInit_v2
 * returns
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct fake {
    int idx, cc, total_gib, free_gib, mode;
    unsigned mig;
};

static struct fake gpus[32];
static unsigned n_gpus;

static int number(const char *variable, int otherwise)
{
    const char *text = getenv(variable);
    return text ? atoi(text) : otherwise;
}

int nvmlInit_v2(void);
int nvmlInit_v2(void)
{
    const char *at = getenv("FAKE_GPUS");
    n_gpus = 0;
    for (; at && *at; at += *at == ';') {
        struct fake *g = &gpus[n_gpus];
        g->idx = (int)n_gpus;
        if (sscanf(at, "%d,%d,%d,%d,%u", &g->cc, &g->total_gib, &g->free_gib, &g->mode, &g->mig) ==
            5)
            n_gpus++;
        at += strcspn(at, ";");
    }
    return number("FAKE_ERROR", 0);
}

int nvmlShutdown(void);
int nvmlShutdown(void) { return 0; }

const char *nvmlErrorString(int code);
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : "Unknown Error"; }

int nvmlSystemGetDriverVersion(char *text, unsigned n);
int nvmlSystemGetDriverVersion(char *text, unsigned n) { return snprintf(text, n, "999.1") < 0; }

int nvmlSystemGetCudaDriverVersion_v2(int *version);
int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    *version = number("FAKE_CUDA", 14000);
    return 0;
}

int nvmlDeviceGetCount_v2(unsigned *n);
int nvmlDeviceGetCount_v2(unsigned *n)
{
    *n = n_gpus;
    return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned idx, void **g);
int nvmlDeviceGetHandleByIndex_v2(unsigned idx, void **g)
{
    *g = &gpus[idx];
    return idx < n_gpus ? 0 : 2;
}

int nvmlDeviceGetName(void *device, char *text, unsigned n);
int nvmlDeviceGetName(void *device, char *text, unsigned n)
{
    const struct fake *g = device;
    return snprintf(text, n, "Fake %d", g->idx) < 0;
}

int nvmlDeviceGetUUID(void *device, char *text, unsigned n);
int nvmlDeviceGetUUID(void *device, char *text, unsigned n)
{
    const struct fake *g = device;
    return snprintf(text, n, "GPU-%02dabcdef", g->idx) < 0;
}

struct nvml_pci {
    char legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
};
int nvmlDeviceGetPciInfo_v3(void *device, struct nvml_pci *pci);
int nvmlDeviceGetPciInfo_v3(void *device, struct nvml_pci *pci)
{
    const struct fake *g = device;
    const char *bus = getenv("FAKE_BUS");
    pci->domain = bus ? (unsigned)strtoul(bus, NULL, 16) : 1;
    if (bus)
        return snprintf(pci->bus_id, sizeof pci->bus_id, "%08X%s", pci->domain, bus + 4) < 0;
    return snprintf(pci->bus_id, sizeof pci->bus_id, "00000001:%02X:00.0", 16 + g->idx) < 0;
}

struct nvml_memory {
    unsigned long long total, free, used;
};
int nvmlDeviceGetMemoryInfo(void *device, struct nvml_memory *memory);
int nvmlDeviceGetMemoryInfo(void *device, struct nvml_memory *memory)
{
    const struct fake *g = device;
    memory->total = (unsigned long long)g->total_gib << 30;
    memory->free = (unsigned long long)g->free_gib << 30;
    memory->used = memory->total - memory->free;
    return 0;
}

int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor);
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor)
{
    const struct fake *g = device;
    *major = g->cc / 10;
    *minor = g->cc % 10;
    return 0;
}

int nvmlDeviceGetComputeMode(void *device, int *mode);
int nvmlDeviceGetComputeMode(void *device, int *mode)
{
    const struct fake *g = device;
    *mode = g->mode;
    return 0;
}

int nvmlDeviceGetMigMode(void *device, unsigned *now, unsigned *pending);
int nvmlDeviceGetMigMode(void *device, unsigned *now, unsigned *pending)
{
    const struct fake *g = device;
    *now = *pending = g->mig;
    return g->mig > 1 ? 3 : 0; // not supported
}

int nvmlDeviceGetP2PStatus(void *a, void *b, int what, int *status);
int nvmlDeviceGetP2PStatus(void *a, void *b, int what, int *status)
{
    const char *links = getenv("FAKE_LINKS");
    *status = 0;
    if (links && (!strcmp(links, "none") || (!strcmp(links, "pcie") && what == 2)))
        *status = 4;
    return 0;
}
