/* cpus.c: see cpus.h. */
#include "deploy/cpus.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/own.h"

enum err cpus_parse(const char *list, cpu_set_t *ret)
{
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    for (const char *at = list; *at && *at != '\n';) {
        char *end;
        unsigned long first = strtoul(at, &end, 10), last = first;
        if (end != at && *end == '-') {
            at = end + 1;
            last = strtoul(at, &end, 10);
        }
        bool more = *end == ',' && end[1] >= '0' && end[1] <= '9';
        if (end == at || *at < '0' || *at > '9' || last < first || last >= CPU_SETSIZE ||
            (*end && *end != '\n' && !more))
            return err_set(ERR_INVALID, "'%.*s' is no list of CPUs", (int)strcspn(list, "\n"),
                           list);
        for (; first <= last; first++)
            CPU_SET(first, &cpus);
        at = end + more;
    }
    *ret = cpus;
    return ERR_OK;
}

char *cpus_format(const cpu_set_t *cpus, char *ret, size_t n)
{
    size_t used = 0;
    ret[0] = '\0';
    for (int first = 0; first < CPU_SETSIZE; first++) {
        if (!CPU_ISSET(first, cpus))
            continue;
        int last = first;
        while (last + 1 < CPU_SETSIZE && CPU_ISSET(last + 1, cpus))
            last++;
        const char *comma = used ? "," : "";
        if (used < n)
            used += (size_t)(first == last
                                 ? snprintf(ret + used, n - used, "%s%d", comma, first)
                                 : snprintf(ret + used, n - used, "%s%d-%d", comma, first, last));
        first = last;
    }
    return ret;
}

static enum err read_list(const char *path, cpu_set_t *ret)
{
    char list[4096];
    OWNED_FILE f = fopen(path, "re");
    if (!f || !fgets(list, sizeof list, f))
        return err_set(ERR_NOT_FOUND, "%s cannot be read", path);
    return cpus_parse(list, ret);
}

enum err cpus_near(const char *sys, const char *bus_id, cpu_set_t *ret)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/bus/pci/devices/%s/local_cpulist", sys, bus_id);
    TRY(read_list(path, ret));
    return CPU_COUNT(ret) ? ERR_OK : err_set(ERR_NOT_FOUND, "%s is empty", path);
}

/* The threads of cpu's core; cpu alone where the kernel does not tell. */
static void core_of(const char *sys, int cpu, cpu_set_t *ret)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/devices/system/cpu/cpu%d/topology/thread_siblings_list", sys,
             cpu);
    if (read_list(path, ret) || !CPU_ISSET(cpu, ret)) {
        CPU_ZERO(ret);
        CPU_SET(cpu, ret);
    }
}

void cpus_part(const char *sys, const cpu_set_t *cpus, int part, int n_parts, int min_cpus,
               cpu_set_t *ret)
{
    *ret = *cpus;
    if (CPU_COUNT(cpus) / n_parts < min_cpus)
        return;
    cpu_set_t left = *cpus, cores[CPU_SETSIZE];
    int n_cores = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &left))
            continue;
        cpu_set_t *core = &cores[n_cores++];
        core_of(sys, cpu, core);
        CPU_AND(core, core, &left);
        CPU_XOR(&left, &left, core);
    }
    if (n_cores < n_parts)
        return;
    CPU_ZERO(ret);
    for (int i = part * n_cores / n_parts; i < (part + 1) * n_cores / n_parts; i++)
        CPU_OR(ret, ret, &cores[i]);
}
