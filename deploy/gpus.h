/* gpus.h: which GPUs this machine has, as the NVIDIA driver tells it.
 *
 * Asked through NVML, whose library comes with the driver and is opened when it is needed: the
 * launcher starts where there is no GPU and links no CUDA.
 */
#ifndef BATON_GPUS_H
#define BATON_GPUS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/err.h"

#define GPUS_MAX 32

struct gpu {
    char name[96], uuid[96];
    char bus_id[32]; // "0000:1b:00.0": its directory in /sys/bus/pci/devices
    uint64_t total_bytes, free_bytes;
    int cc_major, cc_minor;           // compute capability
    bool is_exclusive, is_prohibited; // compute mode: one process at a time, none at all
    bool is_mig;                      // cut into instances
};

enum gpu_path { GPU_PATH_NVLINK, GPU_PATH_PCIE, GPU_PATH_NONE };

struct gpus {
    char driver[80];
    int cuda_version; // newest that the driver can run: 12080 is 12.8
    size_t n;
    struct gpu gpu[GPUS_MAX];               // as cuda:N counts them, see gpus_read
    enum gpu_path path[GPUS_MAX][GPUS_MAX]; // how one reads the other's memory
};

/* visible: the value of CUDA_VISIBLE_DEVICES, indexes or UUIDs (their beginnings will do), or NULL
 * for all; like CUDA, the list ends at the first entry that names no GPU. Indexes count in PCI bus
 * order, which is CUDA's with CUDA_DEVICE_ORDER=PCI_BUS_ID. ERR_NOT_FOUND: no driver; ERR_IO: the
 * driver does not work, with its reason. */
MUST_CHECK enum err gpus_read(const char *visible, struct gpus *ret);

#endif
