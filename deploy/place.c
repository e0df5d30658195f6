/* place.c: see place.h.
 *
 * A worker's engine thread launches a step every few milliseconds and must not wander to the other
 * socket, away from its GPU's PCIe root and from the memory it allocated. The router stays free: it
 * is one thread, and the scheduler knows better where it fits.
 */
#include "deploy/place.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "deploy/cpus.h"

#define MIN_CPUS 4 // engine, control, transfers, CUDA's own: fewer are shared rather than divided

int place_gpu(const struct plan_proc *p)
{
    if (p->role == CONFIG_ROUTER)
        return -1;
    const char *device = json_string_value(json_object_get(p->flags, "device"));
    if (!device)
        device = getenv("BATON_DEVICE");
    return device && !strncmp(device, "cuda:", 5) ? atoi(device + 5) : -1;
}

bool place_wants_gpus(const struct plan *p)
{
    for (size_t i = 0; i < p->n_procs; i++)
        if (place_gpu(&p->procs[i]) >= 0)
            return true;
    return false;
}

/* The cores near p's GPU that we may use; none if that is not known. */
static void near_cpus(struct plan *plan, const struct plan_proc *p, const struct gpus *gpus,
                      const char *sys, const cpu_set_t *allowed, cpu_set_t *ret)
{
    int idx = place_gpu(p);
    CPU_ZERO(ret);
    if (idx < 0 || (size_t)idx >= gpus->n)
        return;
    enum err e = cpus_near(sys, gpus->gpu[idx].bus_id, ret);
    if (e) {
        snprintf(plan->place_note, sizeof plan->place_note, "%s", err_text(e));
        CPU_ZERO(ret);
    }
    CPU_AND(ret, ret, allowed);
}

void place_pin(struct plan *p, const struct gpus *gpus, const char *sys, const cpu_set_t *allowed)
{
    cpu_set_t *near = calloc(p->n_procs, sizeof *near);
    if (!near)
        return;
    for (size_t i = 0; i < p->n_procs; i++)
        near_cpus(p, &p->procs[i], gpus, sys, allowed, &near[i]);
    for (size_t i = 0; i < p->n_procs; i++) {
        int part = 0, n_parts = 0;
        for (size_t k = 0; k < p->n_procs; k++) {
            part += k < i && CPU_EQUAL(&near[k], &near[i]);
            n_parts += CPU_EQUAL(&near[k], &near[i]);
        }
        if (CPU_COUNT(&near[i]))
            cpus_part(sys, &near[i], part, n_parts, MIN_CPUS, &p->procs[i].cpus);
    }
    free(near);
}

void place_environment(void)
{
    setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID", 0); // so that CUDA and NVML count alike
    setenv("NCCL_NVLS_ENABLE", "0", 0);    // multicast is for collectives; we send and receive
    setenv("NCCL_SOCKET_IFNAME", "lo", 0); // one host
    setenv("NCCL_RAS_ENABLE", "0", 0);     // or every rank listens on the network
    unsetenv("NCCL_COMM_ID");              // would replace the ids that workers agree on
}

void place(struct plan *p)
{
    if (!place_wants_gpus(p))
        return;
    place_environment();
    if (strcmp(p->config.pin, "auto"))
        return;
    struct gpus *gpus = malloc(sizeof *gpus);
    cpu_set_t allowed;
    enum err e = gpus ? gpus_read(getenv("CUDA_VISIBLE_DEVICES"), gpus)
                      : err_set(ERR_NOMEM, "out of memory");
    if (e)
        snprintf(p->place_note, sizeof p->place_note, "%s", err_text(e));
    else if (sched_getaffinity(0, sizeof allowed, &allowed) == 0)
        place_pin(p, gpus, "/sys", &allowed);
    free(gpus);
}
