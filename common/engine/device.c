/* device.c: see device.h. */
#include "common/engine/device.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MODULE "baton_cuda.so"

/* "cpu" or "cuda:N"; -1 is the CPU. */
static enum err device_parse(const char *name, int *ret)
{
    char *end;
    if (!strcmp(name, "cpu")) {
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
    return err_set(ERR_INVALID, "device %s: must be cpu or cuda:N", name);
}

/* The module lies beside the executable, or in a build tree where that was built. */
static enum err module_find(void **ret)
{
    char here[4096], path[4200];
    const char *named = getenv("BATON_CUDA_MODULE");
    ssize_t n = readlink("/proc/self/exe", here, sizeof(here) - 1);
    if (n <= 0)
        return err_set(ERR_IO, "cannot tell where this executable is");
    here[n] = 0;
    *strrchr(here, '/') = 0;
    snprintf(path, sizeof(path), "%s/" MODULE, here);
    if (access(path, F_OK))
        snprintf(path, sizeof(path), "%s/../common/engine/" MODULE, here);
    *ret = dlopen(named && named[0] ? named : path, RTLD_NOW | RTLD_LOCAL);
    return *ret ? ERR_OK : err_set(ERR_INVALID, "the CUDA module cannot be loaded: %s", dlerror());
}

static enum err module_load(const struct device_module **ret)
{
    *ret = &baton_cuda;
    if (*ret)
        return ERR_OK;
    void *handle;
    TRY(module_find(&handle)); // never unloaded: CUDA does not like that
    *ret = dlsym(handle, "baton_cuda");
    if (!*ret || (*ret)->version != DEVICE_MODULE_VERSION)
        return err_set(ERR_INVALID, MODULE " is not of this program's version");
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
