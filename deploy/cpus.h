/* cpus.h: sets of CPUs: which are near a GPU, and how several workers divide them. */
#ifndef BATON_CPUS_H
#define BATON_CPUS_H

#include <sched.h>
#include <stddef.h>

#include "common/base/err.h"

/* "0-23,48-71", as the kernel writes it. ERR_INVALID names the list. */
MUST_CHECK enum err cpus_parse(const char *list, cpu_set_t *ret);
/* The same the other way, cut to n bytes. Returns ret. */
char *cpus_format(const cpu_set_t *cpus, char *ret, size_t n);

/* The CPUs of the memory node that a PCI device hangs on. sys: "/sys", or a directory like it.
 * ERR_NOT_FOUND: the kernel does not know the device or its node. */
MUST_CHECK enum err cpus_near(const char *sys, const char *bus_id, cpu_set_t *ret);

/* Part `part` of `n_parts` of cpus: neighbouring cores, both threads of a core in the same part.
 * All of cpus if there are fewer than min_cpus for each part: sharing then beats starving. */
void cpus_part(const char *sys, const cpu_set_t *cpus, int part, int n_parts, int min_cpus,
               cpu_set_t *ret);

#endif
