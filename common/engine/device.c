/* device.c: see device.h. */
#include "common/engine/device.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* "cpu", "mock" or "cuda:N"; -1 is the CPU, on which a mock runs too. */
static enum err device_parse(const char *name, int *ret)
{
    char *end;
    if (!strcmp(name, "cpu") || !strcmp(name, "mock")) {
        *ret = -1;
        return ERR_OK;
    }
    if (!strncmp(name, "cuda:", 5) && name[5] >= '0' && name[5] <= '9') {
        long n = strtol(name + 5, &end, 10);
        if (!*end && n < 64) {
            *ret = (int)n;
            return ERR_OK;
        }
    }
    return err_set(ERR_INVALID, "device %s: must be cpu, mock or cuda:N", name);
}

/* Modules lie beside the executable, or in a build tree where they were built. Never unloaded: CUDA
 * does not like that. */
static enum err module_find(const char *name, void **ret)
{
    char here[4096], path[4200];
    const char *named = getenv("BATON_MODULE_DIR");
    ssize_t n = readlink("/proc/self/exe", here, sizeof(here) - 1);
    if (n <= 0)
        return err_set(ERR_IO, "cannot tell where this executable is");
    here[n] = 0;
    *strrchr(here, '/') = 0;
    snprintf(path, sizeof(path), "%s/%s", named && named[0] ? named : here, name);
    if (access(path, F_OK))
        snprintf(path, sizeof(path), "%s/../common/engine/%s", here, name);
    if (access(path, F_OK))
        return err_set(ERR_INVALID,
                       "%s is not part of this build: build where nvcc and NCCL are found "
                       "(-Dcuda=enabled), or name its directory in BATON_MODULE_DIR",
                       name);
    *ret = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    return *ret ? ERR_OK : err_set(ERR_INVALID, "%s cannot be loaded: %s", name, dlerror());
}

static enum err module_load(const struct device_module **ret)
{
    *ret = &baton_cuda;
    if (*ret)
        return ERR_OK;
    void *handle;
    TRY(module_find("baton_cuda.so", &handle));
    *ret = dlsym(handle, "baton_cuda");
    if (!*ret || (*ret)->version != DEVICE_MODULE_VERSION)
        return err_set(ERR_INVALID, "baton_cuda.so is not of this program's version");
    return ERR_OK;
}

enum err device_open(const char *name, struct device **ret)
{
    int ordinal = -1;
    TRY(device_parse(name, &ordinal));
    *ret = NULL;
    if (ordinal < 0)
        return ERR_OK;
    const struct device_module *module;
    TRY(module_load(&module));
    return module->open(ordinal, ret);
}

enum err device_load_nccl(const char *host)
{
    void *handle;
    TRY(module_find("baton_nccl.so", &handle));
    union {
        void *found;
        enum err (*call)(const char *host);
    } start = {.found = dlsym(handle, "kv_nccl_register")};
    if (!start.found)
        return err_set(ERR_INVALID, "baton_nccl.so is not of this program's version");
    return start.call(host);
}

void device_destroy(struct device *d)
{
    if (d)
        d->ops->close(d);
}

void device_release(struct device *d, struct device_memory *m)
{
    if (m->base)
        d->ops->release(d, m);
    *m = (struct device_memory){.fd = -1};
}
